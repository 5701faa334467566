//! Runs conformance vectors: bytes in, messages and answers out.
//!
//! A vector goes through the same compiler, machine and answer path as live traffic. What a vector
//! states and the messages lack must be shown by the frame's trace.

mod compare;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use fieldline_model::{Decoded, Params, Timestamp, Transport, Value};
use serde_json::Value as Json;

use crate::{DeclKind, FrameError, Options, Program, Session, Step, TraceField};
use compare::Frame;

/// What came of a run of vectors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Vectors that did all that they state.
    pub passed: usize,
    /// Vectors that did not, or could not be run.
    pub failed: usize,
    /// What was wrong, vector by vector.
    pub failures: Vec<Failure>,
}

/// A vector that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The vector's id, or its place in the file.
    pub id: String,
    /// Everything that differs.
    pub problems: Vec<String>,
}

impl Report {
    fn fail(&mut self, id: impl Into<String>, problems: Vec<String>) {
        self.failed += 1;
        self.failures.push(Failure { id: id.into(), problems });
    }
}

impl fmt::Display for Report {
    /// One line for each problem; the last line says `N passed, N failed`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for failure in &self.failures {
            for problem in &failure.problems {
                writeln!(f, "{}: {problem}", failure.id)?;
            }
        }
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

/// Runs every vector of the file's text `json`, or those of protocol `only`, with the programs that
/// `programs` finds by name. An unknown protocol, a vector that cannot be run and a file without
/// vectors count as failed.
#[must_use]
pub fn run(
    json: &str,
    only: Option<&str>,
    programs: &dyn Fn(&str) -> Option<Arc<Program>>,
) -> Report {
    let mut report = Report::default();
    let file: Json = match serde_json::from_str(json) {
        Ok(file) => file,
        Err(error) => {
            report.fail("file", vec![format!("is no JSON: {error}")]);
            return report;
        }
    };
    let vectors = file.get("vectors").unwrap_or(&file).as_array().cloned().unwrap_or_default();
    let mut seen = 0_usize;
    for (at, vector) in vectors.iter().enumerate() {
        let text = |key: &str| vector.get(key).and_then(Json::as_str);
        let protocol = text("protocol").or(only).unwrap_or("");
        if only.is_some_and(|only| only != protocol) {
            continue;
        }
        seen += 1;
        let id = text("id").map_or_else(|| format!("vector {}", at + 1), str::to_owned);
        let Some(program) = programs(protocol) else {
            report.fail(id, vec![format!("there is no protocol `{protocol}`")]);
            continue;
        };
        let mut case = Case { vector, program, problems: Vec::new() };
        case.run();
        if case.problems.is_empty() {
            report.passed += 1;
        } else {
            report.fail(id, case.problems);
        }
    }
    if seen == 0 {
        let what = only.map_or_else(String::new, |only| format!(" of protocol {only}"));
        report.fail("file", vec![format!("holds no vectors{what}")]);
    }
    report
}

/// What a session made of a vector's bytes.
#[derive(Default)]
struct Outcome {
    ident: Option<String>,
    messages: Vec<Decoded>,
    replies: Vec<u8>,
    fields: Vec<TraceField>,
    error: Option<FrameError>,
    left: usize,
}

struct Case<'a> {
    vector: &'a Json,
    program: Arc<Program>,
    problems: Vec<String>,
}

impl Case<'_> {
    fn text(&self, key: &str) -> Option<&str> {
        self.vector.get(key).and_then(Json::as_str)
    }

    fn problem(&mut self, problem: impl Into<String>) {
        self.problems.push(problem.into());
    }

    fn run(&mut self) {
        let bytes = self.text("hex").and_then(fieldline_model::value::from_hex);
        let transport = match self.text("transport").unwrap_or("tcp") {
            "tcp" => Some(Transport::Tcp),
            "udp" => Some(Transport::Udp),
            _ => None,
        };
        let (Some(bytes), Some(transport)) = (bytes, transport) else {
            return self.problem("cannot be run: it needs `hex` and a transport `tcp` or `udp`");
        };
        let strict = self.outcome(&bytes, transport, false);
        let expected = self.vector.get("expected").cloned().unwrap_or(Json::Null);
        let lenient = self.vector.get("lenient").filter(|l| l.is_object()).cloned();
        if self.text("kind") == Some("negative") {
            let accepted = self.outcome(&bytes, transport, true);
            self.negative(&expected, &strict, &accepted);
            if let Some(lenient) = lenient {
                self.problems.extend(
                    body(&self.program, &lenient, &accepted)
                        .into_iter()
                        .map(|p| format!("lenient: {p}")),
                );
            }
            return;
        }
        if let Some(error) = &strict.error {
            self.problem(format!("is refused: {error}"));
        }
        if strict.left > 0 {
            self.problem(format!("{} bytes are left over", strict.left));
        }
        self.count(strict.messages.len());
        self.reply(&strict.replies);
        self.problems.extend(body(&self.program, &expected, &strict));
        if self.text("direction") == Some("server") && self.text("kind") == Some("command") {
            self.command(&expected, &bytes, transport);
        }
    }

    /// Runs the bytes in a fresh session, identified unless they are a login.
    fn outcome(&mut self, bytes: &[u8], transport: Transport, lenient: bool) -> Outcome {
        let options = Options { lenient, trace: true, ..Options::new(transport) };
        let mut session = Session::new(Arc::clone(&self.program), options);
        let settings = self.settings();
        if self.text("kind") != Some("login") {
            session.identify("000000000000000", &settings);
        }
        let context =
            self.vector.get("context").and_then(Json::as_object).cloned().unwrap_or_default();
        for (name, value) in context {
            let known = Value::from_json(value).is_some_and(|v| session.set_variable(&name, v));
            if !known {
                self.problem(format!("the protocol keeps no `{name}`"));
            }
        }
        session.feed(bytes);
        session.end_of_input();
        let mut outcome = Outcome::default();
        // Every step takes a byte or answers a login.
        for _ in 0..=bytes.len() * 2 {
            match session.step(Timestamp::default()) {
                Step::NeedMore => break,
                Step::Login { ident, .. } => {
                    outcome.ident = Some(ident);
                    session.login_accepted(&settings);
                }
                Step::Frame(frame) => {
                    outcome.messages.extend(frame.messages);
                    outcome.replies.extend(frame.replies.iter().flat_map(|r| r.bytes.iter()));
                    outcome.fields.extend(frame.fields);
                    outcome.error = outcome.error.or(frame.error);
                    if frame.close.is_some() {
                        break;
                    }
                }
            }
        }
        outcome.left = session.buffered();
        outcome
    }

    /// The settings that the vector requires, switched on.
    fn settings(&mut self) -> BTreeMap<String, Json> {
        let required = match self.vector.get("requires") {
            Some(Json::String(name)) => vec![name.clone()],
            Some(Json::Array(names)) => {
                names.iter().filter_map(|n| n.as_str().map(str::to_owned)).collect()
            }
            _ => Vec::new(),
        };
        for name in &required {
            if !self.program.settings().iter().any(|s| s.name == *name) {
                self.problem(format!("the protocol has no setting `{name}`"));
            }
        }
        required.into_iter().map(|name| (name, Json::Bool(true))).collect()
    }

    fn count(&mut self, messages: usize) {
        let count = self.vector.get("count").and_then(Json::as_u64);
        if let Some(count) = count.filter(|count| *count != messages as u64) {
            self.problem(format!("gives {messages} messages, not {count}"));
        }
    }

    fn negative(&mut self, expected: &Json, strict: &Outcome, accepted: &Outcome) {
        let stated =
            expected.get("error").and_then(Json::as_str).or_else(|| self.text("frame_error"));
        let class = stated.and_then(|s| s.split(':').next()).unwrap_or("").to_owned();
        match &strict.error {
            Some(error) if *error.class == *class => {}
            Some(error) => {
                let problem = format!("is refused with {}, not {class}: {error}", error.class);
                self.problem(problem);
            }
            None => self.problem(format!("is taken, not refused with {class}")),
        }
        if !strict.messages.is_empty() {
            self.problem("gives messages though it is bad");
        }
        self.count(strict.messages.len());
        if self.vector.get("reply_hex").is_some() {
            self.reply(&strict.replies);
        } else if !strict.replies.is_empty() && strict.replies == accepted.replies {
            self.problem("is answered as if it were good");
        }
        let mut stated = expected.clone();
        if let Some(stated) = stated.as_object_mut() {
            stated.remove("messages");
        }
        self.problems.extend(body(&self.program, &stated, strict));
    }

    fn reply(&mut self, replies: &[u8]) {
        let got = fieldline_model::value::to_hex(replies);
        if let Some(reply) = self.text("reply_hex") {
            if !reply.eq_ignore_ascii_case(&got) {
                let problem = format!("answers `{got}`, not `{reply}`");
                self.problem(problem);
            }
        } else if let Some(reply) = self.text("reply_optional_hex") {
            if !got.is_empty() && !reply.eq_ignore_ascii_case(&got) {
                let problem = format!("answers `{got}`, not `{reply}` or nothing");
                self.problem(problem);
            }
        } else if self.vector.get("reply_dynamic").is_some_and(|d| *d != Json::Bool(false))
            && got.is_empty()
        {
            self.problem("answers nothing");
        }
    }

    /// Some command of the protocol must give the very bytes of a text that a server sent.
    fn command(&mut self, expected: &Json, bytes: &[u8], transport: Transport) {
        let message = expected.get("messages").and_then(|m| m.get(0)).cloned().unwrap_or_default();
        let Some(text) = message.get("payload.text").and_then(Json::as_str) else { return };
        let mut session = Session::new(Arc::clone(&self.program), Options::new(transport));
        let ident = message.get("ident").and_then(Json::as_str).unwrap_or("000000000000000");
        session.identify(ident, &BTreeMap::new());
        let mut tried = false;
        for command in self.program.commands() {
            let [param] = command.params.as_slice() else { continue };
            let Ok(name) = fieldline_model::ParamName::new(param.name.as_str()) else { continue };
            if param.kind != DeclKind::Text {
                continue;
            }
            tried = true;
            let params: Params = std::iter::once((name, Value::from(text))).collect();
            if session.encode_command(&command.name, &params).is_ok_and(|c| *c.bytes == *bytes) {
                return;
            }
        }
        if tried {
            self.problem("no command gives these bytes");
        }
    }
}

/// What differs between what `stated` says of a frame and what came of it.
fn body(program: &Program, stated: &Json, outcome: &Outcome) -> Vec<String> {
    let mut problems = Vec::new();
    let Some(stated) = stated.as_object() else { return problems };
    let whole = Frame { program, fields: &outcome.fields, message: None, decoded: None };
    for (key, value) in stated {
        match key.as_str() {
            "error" | "advisory" => {}
            "messages" => {}
            "ident" if outcome.ident.as_deref().is_some_and(|i| Some(i) == value.as_str()) => {}
            "count" if outcome.messages.len() as u64 == value.as_u64().unwrap_or(u64::MAX) => {}
            _ => whole.check(key, value, &mut problems),
        }
    }
    let messages = stated.get("messages").and_then(Json::as_array);
    let Some(messages) = messages else { return problems };
    // Frames that give no messages, such as texts, are described by their trace alone.
    let traced_only = outcome.messages.is_empty();
    if !traced_only && outcome.messages.len() != messages.len() {
        problems.push(format!("gives {} messages, not {}", outcome.messages.len(), messages.len()));
    }
    for (at, message) in messages.iter().enumerate() {
        let Some(message) = message.as_object() else { continue };
        let frame = Frame {
            program,
            fields: &outcome.fields,
            message: (!traced_only).then_some(at),
            decoded: outcome.messages.get(at),
        };
        let mut differing = Vec::new();
        for (key, value) in message {
            frame.check(key, value, &mut differing);
        }
        problems.extend(differing.into_iter().map(|p| format!("message {at}: {p}")));
    }
    problems
}
