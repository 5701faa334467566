//! `fieldline protocol`: the tools for protocol descriptions.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::sync::Arc;

use fieldline_contracts::{Clock as _, SystemClock};
use fieldline_model::{Transport, value};
use fieldline_pvm::{Frame, Options, Program, Session, Step, library, vectors};
use serde_json::{Value as Json, json};

use crate::cli::{DecodeArgs, ProtocolCommand, TestArgs, TransportArg};
use crate::sessions;

/// Runs one of the tools.
pub(crate) fn run(command: ProtocolCommand) -> Result<(), String> {
    match command {
        ProtocolCommand::List => list(),
        ProtocolCommand::Check { protocols } => check(&protocols),
        ProtocolCommand::Fmt { check, files } => {
            let mut wrong = Vec::new();
            for file in &files {
                if !format_file(file, check)? {
                    wrong.push(file.display().to_string());
                }
            }
            if wrong.is_empty() {
                Ok(())
            } else {
                Err(format!("not in the standard layout: {}", wrong.join(", ")))
            }
        }
        ProtocolCommand::Decode(args) => decode(&args, false),
        ProtocolCommand::Trace(args) => decode(&args, true),
        ProtocolCommand::Disasm { protocol } => print(&load(&protocol)?.disassemble()),
        ProtocolCommand::Test(args) => test(&args),
    }
}

/// Prints text and a line end, and fails where nobody reads it.
pub(crate) fn print(text: &str) -> Result<(), String> {
    writeln!(std::io::stdout(), "{}", text.trim_end())
        .map_err(|error| format!("standard output: {error}"))
}

fn list() -> Result<(), String> {
    let mut out = String::new();
    for (name, _) in library::built_in() {
        let program = load(name)?;
        let transports: Vec<String> =
            program.transports().iter().map(|t| format!("{t:?}").to_lowercase()).collect();
        // Writing to a String cannot fail.
        let _written =
            writeln!(out, "{name:<16} {:<10} {}", transports.join(","), program.description());
    }
    print(&out)
}

fn check(protocols: &[String]) -> Result<(), String> {
    let mut wrong = 0;
    for protocol in protocols {
        match load(protocol) {
            Ok(program) => print(&format!("{protocol}: ok, protocol {}", program.name()))?,
            Err(error) => {
                wrong += 1;
                print(&error)?;
            }
        }
    }
    if wrong == 0 {
        Ok(())
    } else {
        Err(format!("{wrong} of {} cannot be compiled", protocols.len()))
    }
}

/// Formats a file; with `only_check` says whether it is formatted.
fn format_file(file: &Path, only_check: bool) -> Result<bool, String> {
    let source = read(file)?;
    let formatted =
        fieldline_pvm::format(&source).map_err(|error| format!("{}:\n{error}", file.display()))?;
    if source == formatted || only_check {
        return Ok(source == formatted);
    }
    std::fs::write(file, formatted).map_err(|error| format!("{}: {error}", file.display()))?;
    Ok(true)
}

fn read(file: &Path) -> Result<String, String> {
    std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))
}

/// The program of a file, a folder that holds `protocol.pvm`, or a built-in name.
fn load(protocol: &str) -> Result<Arc<Program>, String> {
    let path = Path::new(protocol);
    let file = if path.is_dir() { path.join("protocol.pvm") } else { path.to_owned() };
    let (name, source) = if file.is_file() {
        (file.display().to_string(), read(&file)?)
    } else {
        let built_in = library::built_in().iter().find(|(name, _)| *name == protocol);
        let Some((name, source)) = built_in else {
            let known: Vec<&str> = library::built_in().iter().map(|(name, _)| *name).collect();
            return Err(format!(
                "`{protocol}` is neither a file, a folder with a protocol.pvm, nor a built-in protocol ({})",
                known.join(", ")
            ));
        };
        ((*name).to_owned(), (*source).to_owned())
    };
    fieldline_pvm::compile(&name, &source).map(Arc::new).map_err(|error| error.to_string())
}

/// Settings of `NAME` and `NAME=VALUE` arguments.
fn settings(args: &[String]) -> BTreeMap<String, Json> {
    let pair = |arg: &String| match arg.split_once('=') {
        Some((name, value)) => {
            (name.to_owned(), serde_json::from_str(value).unwrap_or_else(|_| value.into()))
        }
        None => (arg.clone(), Json::Bool(true)),
    };
    args.iter().map(pair).collect()
}

fn decode(args: &DecodeArgs, trace: bool) -> Result<(), String> {
    let program = load(&args.protocol)?;
    let text = match &args.hex {
        Some(hex) => hex.clone(),
        None => {
            let mut input = String::new();
            std::io::stdin()
                .read_to_string(&mut input)
                .map_err(|error| format!("standard input: {error}"))?;
            input
        }
    };
    let bytes = value::from_hex(&text)
        .ok_or("the bytes must be pairs of hex digits, such as 000f333536; give them as an argument or on standard input")?;
    let transport = match args.transport {
        TransportArg::Tcp => Transport::Tcp,
        TransportArg::Udp => Transport::Udp,
    };
    let options = Options { lenient: args.lenient, trace, ..Options::new(transport) };
    let mut session = Session::new(program, options);
    let settings = settings(&args.settings);
    if let Some(ident) = &args.ident {
        session.identify(ident, &settings);
    }
    session.feed(&bytes);
    session.end_of_input();
    let mut failed = None;
    loop {
        match session.step(SystemClock.now()) {
            Step::NeedMore => break,
            Step::Login { ident, password } => {
                print(&json!({ "login": ident, "password": password }).to_string())?;
                session.login_accepted(&settings);
            }
            Step::Frame(frame) => {
                print(&if trace { frame_trace(&frame) } else { frame_json(&frame).to_string() })?;
                failed = frame.error.map(|error| error.to_string()).or(failed);
                if frame.close.is_some() {
                    break;
                }
            }
        }
    }
    failed.map_or(Ok(()), Err)
}

/// A frame as JSON.
fn frame_json(frame: &Frame) -> Json {
    let messages: Vec<Json> = frame
        .messages
        .iter()
        .map(|message| {
            let mut object = serde_json::Map::new();
            if let Some(at) = message.timestamp {
                object.insert("timestamp".to_owned(), at.to_string().into());
            }
            object.extend(
                message
                    .params
                    .iter()
                    .map(|(name, value)| (name.as_str().to_owned(), value.to_json())),
            );
            Json::Object(object)
        })
        .collect();
    let replies: Vec<String> =
        frame.replies.iter().map(|reply| value::to_hex(&reply.bytes)).collect();
    json!({
        "ident": frame.ident.as_deref(),
        "bytes": frame.bytes.len(),
        "messages": messages,
        "replies": replies,
        "answer": frame.command_answer.as_ref().map(|answer| &answer.text),
        "error": frame.error.as_ref().map(ToString::to_string),
        "close": frame.close.map(fieldline_model::CloseCode::name),
    })
}

/// A frame's fields, one a line: place, bytes, name and value.
fn frame_trace(frame: &Frame) -> String {
    let mut out =
        format!("frame of {} bytes, {} messages\n", frame.bytes.len(), frame.messages.len());
    for field in &frame.fields {
        let bytes = frame.bytes.get(field.start..field.end).unwrap_or_default();
        let shown = value::to_hex(bytes.get(..bytes.len().min(12)).unwrap_or_default());
        let more = if bytes.len() > 12 { "…" } else { "" };
        let message = field.message.map(|n| format!("[{n}] ")).unwrap_or_default();
        let mut text = String::new();
        match &field.value {
            Some(value) => value.write_json(&mut text),
            None => text.push_str("absent"),
        }
        let note = field.note.as_ref().map(|note| format!("   ! {note}")).unwrap_or_default();
        // Writing to a String cannot fail.
        let _written = writeln!(
            out,
            "{:>6}..{:<6} {:<26} {message}{} = {text}{note}",
            field.start,
            field.end,
            shown + more,
            field.name
        );
    }
    for reply in &frame.replies {
        let _written = writeln!(out, "reply {}", value::to_hex(&reply.bytes));
    }
    if let Some(error) = &frame.error {
        let _written = writeln!(out, "error {error}, line {}", error.line);
    }
    out
}

/// Runs vectors and sessions; the last line says `N passed, N failed`.
fn test(args: &TestArgs) -> Result<(), String> {
    let mut total = vectors::Report::default();
    let mut add = |part: vectors::Report| {
        total.passed += part.passed;
        total.failed += part.failed;
        total.failures.extend(part.failures);
    };
    let mut programs: BTreeMap<String, Arc<Program>> = BTreeMap::new();
    for (name, _) in library::built_in() {
        programs.insert((*name).to_owned(), load(name)?);
    }
    for folder in &args.folders {
        let program = load(&folder.display().to_string())?;
        programs.insert(program.name().to_owned(), program);
    }
    let find = |name: &str| programs.get(name).cloned();
    let folder_vectors = args.folders.iter().map(|folder| folder.join("vectors.json"));
    for file in args.vectors.iter().cloned().chain(folder_vectors) {
        let text = read(&file)?;
        if args.protocols.is_empty() {
            add(vectors::run(&text, None, &find));
        }
        for protocol in &args.protocols {
            add(vectors::run(&text, Some(protocol), &find));
        }
    }
    for file in &args.sessions {
        add(sessions::run(&read(file)?, &args.protocols)?);
    }
    if args.vectors.is_empty() && args.sessions.is_empty() && args.folders.is_empty() {
        return Err(
            "nothing to test: give folders of protocols, --vectors FILE or --sessions FILE"
                .to_owned(),
        );
    }
    print(&total.to_string())?;
    if total.failed == 0 { Ok(()) } else { Err(format!("{} failed", total.failed)) }
}
