//! Programs with what must come of them at their top.
//!
//! Lines `//# KEY VALUE`: `udp`, `lenient`, `ident NAME`, `setting NAME JSON`, `send HEX` (one run of
//! bytes each), `refuse` (the next login), `end` (no more input), `message JSON`, `reply HEX`,
//! `error CLASS`, `close CODE`, `command NAME JSON = HEX`, `field NAME JSON`, and for programs that
//! do not compile `finding LINE:COLUMN TEXT`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use fieldline_model::value::{from_hex, to_hex};
use fieldline_model::{Decoded, Params, Timestamp, Transport};
use fieldline_pvm::{Options, Session, Step};
use serde_json::Value as Json;

fn json(decoded: &Decoded) -> Json {
    let mut text = String::from("{");
    if let Some(at) = decoded.timestamp {
        text.push_str(&format!("\"timestamp\":\"{at}\""));
        if !decoded.params.is_empty() {
            text.push(',');
        }
    }
    decoded.params.write_json_members(&mut text);
    text.push('}');
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn check(source: &str) -> Result<(), String> {
    let directives: Vec<(&str, &str)> = source
        .lines()
        .filter_map(|line| line.strip_prefix("//# "))
        .map(|line| line.split_once(' ').unwrap_or((line, "")))
        .collect();
    let all = |key: &str| -> std::vec::IntoIter<String> {
        let values = directives.iter().filter(|(k, _)| *k == key).map(|(_, v)| v.trim().to_owned());
        values.collect::<Vec<_>>().into_iter()
    };
    let findings: Vec<String> = all("finding").collect();
    let program = match fieldline_pvm::compile("test", source) {
        Ok(program) if findings.is_empty() => Arc::new(program),
        Ok(_) => return Err("compiles, but must not".into()),
        Err(found) => {
            let shown: Vec<String> = found
                .items()
                .iter()
                .map(|d| {
                    let more = [("expected", &d.expected), ("hint", &d.hint)];
                    let more =
                        more.iter().filter_map(|(k, v)| Some(format!("; {k}: {}", v.as_ref()?)));
                    format!("{}:{} {}{}", d.line, d.column, d.message, more.collect::<String>())
                })
                .collect();
            return if shown == findings {
                Ok(())
            } else {
                Err(format!(
                    "{found}\nas directives:\n//# finding {}",
                    shown.join("\n//# finding ")
                ))
            };
        }
    };
    let formatted = fieldline_pvm::format(source).map_err(|e| e.to_string())?;
    if fieldline_pvm::format(&formatted).as_ref() != Ok(&formatted) {
        return Err(format!("layout is not stable:\n{formatted}"));
    }
    let reformatted = fieldline_pvm::compile("test", &formatted).map_err(|e| e.to_string())?;
    let code = |listing: String| -> Vec<String> {
        listing.lines().map(|l| l.split("; line").next().unwrap_or("").to_owned()).collect()
    };
    if code(reformatted.disassemble()) != code(program.disassemble()) {
        return Err("the laid out source means something else".into());
    }
    let transport = if all("udp").next().is_some() { Transport::Udp } else { Transport::Tcp };
    let settings: BTreeMap<String, Json> = all("setting")
        .filter_map(|s| {
            s.split_once(' ').map(|(n, v)| (n.to_owned(), serde_json::from_str(v).unwrap()))
        })
        .collect();
    let options = Options {
        lenient: all("lenient").next().is_some(),
        trace: true,
        ..Options::new(transport)
    };
    let mut session = Session::new(Arc::clone(&program), options);
    let mut plain = Session::new(Arc::clone(&program), Options { trace: false, ..options });
    for ident in all("ident") {
        session.identify(&ident, &settings);
        plain.identify(&ident, &settings);
    }
    let mut refuse = false;
    let (mut messages, mut replies, mut fields) = (Vec::new(), Vec::new(), Vec::new());
    let (mut errors, mut closes) = (Vec::new(), Vec::new());
    for (key, value) in &directives {
        match *key {
            "send" => {
                let bytes = match value.trim().strip_prefix('"').and_then(|v| v.strip_suffix('"')) {
                    Some(text) => text.replace("\\r", "\r").replace("\\n", "\n").into_bytes(),
                    None => from_hex(value).ok_or("bad hex")?,
                };
                session.feed(&bytes);
                plain.feed(&bytes);
            }
            "end" => {
                session.end_of_input();
                plain.end_of_input();
            }
            "refuse" => refuse = true,
            "command" => {
                let (call, hex) = value.split_once(" = ").ok_or("command NAME JSON = HEX")?;
                let (name, params) = call.split_once(' ').ok_or("command NAME JSON")?;
                let params: Params = serde_json::from_str(params).map_err(|e| e.to_string())?;
                let got = session.encode_command(name, &params);
                let got = got.map_or_else(|e| format!("error: {e}"), |c| to_hex(&c.bytes));
                if got != hex.trim() {
                    return Err(format!("command gives {got}"));
                }
            }
            _ => {}
        }
        if !matches!(*key, "send" | "end") {
            continue;
        }
        loop {
            let step = session.step(Timestamp::from_seconds(1_700_000_000));
            let mut same = plain.step(Timestamp::from_seconds(1_700_000_000));
            if let (Step::Frame(a), Step::Frame(b)) = (&step, &mut same) {
                b.fields.clone_from(&a.fields);
                // Where exactly the steps run out depends on what is traced.
                let class =
                    |f: &fieldline_pvm::Frame| f.error.as_ref().map(|e| e.class.to_string());
                if class(a).as_deref() == Some("limit_exceeded") && class(a) == class(b) {
                    b.error.clone_from(&a.error);
                }
            }
            if step != same {
                let shown = format!("{step:?} and {same:?}");
                return Err(format!("tracing changes what happens: {shown:.2000}"));
            }
            match step {
                Step::NeedMore => break,
                Step::Login { .. } if refuse => {
                    session.login_refused();
                    plain.login_refused();
                }
                Step::Login { .. } => {
                    session.login_accepted(&settings);
                    plain.login_accepted(&settings);
                }
                Step::Frame(frame) => {
                    messages.extend(frame.messages.iter().map(json));
                    replies.extend(frame.replies.iter().map(|r| to_hex(&r.bytes)));
                    errors.extend(frame.error.iter().map(|e| e.class.to_string()));
                    closes.extend(frame.close.iter().map(|c| c.name().to_owned()));
                    fields.extend(frame.fields);
                }
            }
        }
    }
    let wanted: Vec<Json> = all("message").map(|m| serde_json::from_str(&m).unwrap()).collect();
    if messages != wanted {
        let shown: Vec<String> = messages.iter().map(ToString::to_string).collect();
        return Err(format!(
            "messages:\n//# message {}\nerrors: {errors:?}",
            shown.join("\n//# message ")
        ));
    }
    for (what, got) in [("reply", replies), ("error", errors), ("close", closes)] {
        let wanted: Vec<String> = all(what).collect();
        if got != wanted {
            return Err(format!("{what}: {got:?}, not {wanted:?}"));
        }
    }
    for field in all("field") {
        let (name, value) = field.split_once(' ').ok_or("field NAME JSON")?;
        let value: Json = serde_json::from_str(value).map_err(|e| e.to_string())?;
        let shown =
            |f: &fieldline_pvm::TraceField| f.value.as_ref().map_or(Json::Null, |v| v.to_json());
        if !fields.iter().any(|f| f.name == name && shown(f) == value) {
            return Err(format!("no field {name} = {value} in {fields:#?}"));
        }
    }
    Ok(())
}

#[test]
fn programs_do_what_they_state() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lang");
    let mut failures = Vec::new();
    let mut count = 0;
    let mut paths: Vec<_> =
        std::fs::read_dir(directory).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        count += 1;
        let source = std::fs::read_to_string(&path).unwrap();
        if let Err(problem) = check(&source) {
            failures.push(format!("{}: {problem}", path.file_name().unwrap().display()));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    assert!(count >= 20, "only {count} programs");
}
