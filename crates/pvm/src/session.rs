//! One connection's run of a program: bytes in, frames out. No sockets, no clock.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use fieldline_model::{CloseCode, Decoded, Params, Timestamp, Transport, Value};

use crate::vm::value::Val;
use crate::vm::{Environment, Machine, Stop};
use crate::{Program, SettingDecl};

/// What one frame may use at most. A frame that needs more ends with class `limit_exceeded` or
/// `frame_too_large`, and nothing of it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Instructions, long operations on bytes counted by their length.
    pub steps_max: u64,
    /// Instructions before a byte is read.
    pub steps_base_max: u64,
    /// Further instructions for each byte that was read or inflated: a frame may take time by its
    /// length, so that a loop over nothing ends soon, whatever `steps_max` is.
    pub steps_per_byte_max: u64,
    /// Rule calls and sub-buffers within each other.
    pub depth_max: usize,
    /// Bytes of one frame, and of what is inflated from it.
    pub frame_bytes_max: usize,
    /// Messages of one frame.
    pub messages_max: usize,
    /// Bytes of names and contents of one message.
    pub message_bytes_max: usize,
    /// Bytes of all messages and replies of one frame.
    pub output_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            steps_max: 20_000_000,
            steps_base_max: 20_000,
            steps_per_byte_max: 256,
            depth_max: 32,
            frame_bytes_max: 1 << 20,
            messages_max: 8_192,
            message_bytes_max: 256 << 10,
            output_bytes_max: 32 << 20,
        }
    }
}

/// How a session runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// What carries the bytes; TLS runs as TCP.
    pub transport: Transport,
    /// What a frame may use.
    pub limits: Limits,
    /// Whether failed checks of checksums, lengths and counts are only noted, and truncated frames
    /// give what they hold: for import of old logs.
    pub lenient: bool,
    /// Whether frames list their fields.
    pub trace: bool,
}

impl Options {
    /// Strict, without a trace, with the default limits.
    #[must_use]
    pub fn new(transport: Transport) -> Self {
        Self { transport, limits: Limits::default(), lenient: false, trace: false }
    }
}

/// What [`Session::step`] came to.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Nothing to do before more bytes come; what was run so far is kept.
    NeedMore,
    /// A device says who it is: answer with [`Session::login_accepted`] or
    /// [`Session::login_refused`], then step again.
    Login {
        /// The name it gives itself.
        ident: String,
        /// The password, if it sent one.
        password: Option<String>,
    },
    /// One whole frame was run.
    Frame(Frame),
}

/// Bytes to be written to the device once the frame's messages are durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The bytes.
    pub bytes: Bytes,
}

/// A device's answer to the command in flight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandAnswer {
    /// What it says; hex digits where it is no text.
    pub text: String,
    /// Whether the device did as told.
    pub accepted: bool,
}

/// One named value of a frame and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceField {
    /// Name in the program, or of the parameter.
    pub name: String,
    /// First byte within the frame.
    pub start: usize,
    /// Byte after the last; equal to `start` for what was computed.
    pub end: usize,
    /// The value; absent where the device sent none.
    pub value: Option<Value>,
    /// What is remarkable about it, such as a failed check under the lenient option.
    pub note: Option<String>,
    /// Index of the message that it belongs to.
    pub message: Option<usize>,
}

/// Why a frame was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{class} at byte {offset} in {rule}: {message}")]
pub struct FrameError {
    /// Kind of error, such as `bad_crc`: declared by the program, or one of the machine's own
    /// (`truncated`, `frame_too_large`, `limit_exceeded`, `bad_value`).
    pub class: Arc<str>,
    /// What was wrong, in words.
    pub message: String,
    /// Byte of the frame at which it was noticed.
    pub offset: usize,
    /// Rule of the program that was running.
    pub rule: Arc<str>,
    /// Line of the program, from 1.
    pub line: u32,
}

/// One frame: what was sent, what it says and what to answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Frame {
    /// The raw bytes.
    pub bytes: Bytes,
    /// The device that it is from, if it is known by now.
    pub ident: Option<Arc<str>>,
    /// What it says; empty where there is an error.
    pub messages: Vec<Decoded>,
    /// What to write, in order, once the messages are durable.
    pub replies: Vec<Reply>,
    /// The answer to the command in flight, if it holds one.
    pub command_answer: Option<CommandAnswer>,
    /// Its fields, if they were asked for.
    pub fields: Vec<TraceField>,
    /// Why it was not taken.
    pub error: Option<FrameError>,
    /// Whether the protocol ends the connection here, and why.
    pub close: Option<CloseCode>,
    /// Whether the bytes hold a password, or may since something was wrong where one is read: not to be kept raw.
    pub secret: bool,
}

/// A command as bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedCommand {
    /// What to write to the device.
    pub bytes: Bytes,
    /// Whether the device will answer.
    pub expects_answer: bool,
}

/// Why a command could not be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// The protocol has no such command.
    #[error("protocol {protocol} has no command `{name}`; it has: {known}")]
    Unknown {
        /// The protocol.
        protocol: String,
        /// The command asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// A parameter is missing or of the wrong kind.
    #[error("parameter `{param}` of command `{name}`: {problem}")]
    Param {
        /// The command.
        name: String,
        /// Its parameter.
        param: String,
        /// What is wrong.
        problem: String,
    },
    /// The program failed on it.
    #[error("command `{name}` could not be encoded: {problem}")]
    Failed {
        /// The command.
        name: String,
        /// Why.
        problem: String,
    },
}

/// The run of a program over one TCP connection, or over one UDP datagram.
///
/// A caller feeds what came, then steps until [`Step::NeedMore`]:
///
/// ```text
/// feed(bytes) → step() → Login → login_accepted() → step() → Frame → step() → NeedMore → feed(…)
/// ```
#[derive(Debug)]
pub struct Session {
    program: Arc<Program>,
    options: Options,
    buffer: Vec<u8>,
    /// First byte of the frame that is run or comes next.
    start: usize,
    ended: bool,
    ident: Option<Arc<str>>,
    settings: Vec<Val>,
    session_vars: Vec<Val>,
    machine: Option<Box<Machine>>,
    running: bool,
    pending: Option<(String, Option<String>)>,
    /// Messages of the last frame and parameters of its last message: room for the next.
    hints: (usize, usize),
}

/// Longest spare room that a session keeps between frames.
const SPARE_BYTES_MAX: usize = 64 << 10;

impl Session {
    /// A session that has seen no bytes.
    #[must_use]
    pub fn new(program: Arc<Program>, options: Options) -> Self {
        let settings = settings_of(&program, &BTreeMap::new());
        let session_vars = program.session_vars.iter().map(|(_, value)| value.clone()).collect();
        Self {
            program,
            options,
            buffer: Vec::new(),
            start: 0,
            ended: false,
            ident: None,
            settings,
            session_vars,
            machine: None,
            running: false,
            pending: None,
            hints: (0, 0),
        }
    }

    /// Makes the device known as if it had logged in, or replaces its settings.
    pub fn identify(&mut self, ident: &str, settings: &BTreeMap<String, serde_json::Value>) {
        self.ident = Some(ident.into());
        self.settings = settings_of(&self.program, settings);
    }

    /// Sets a variable of the connection as if a frame had; false if there is none of that name.
    pub(crate) fn set_variable(&mut self, name: &str, value: Value) -> bool {
        let at = self.program.session_vars.iter().position(|(n, _)| n == name);
        match at.and_then(|at| self.session_vars.get_mut(at)) {
            Some(slot) => {
                *slot = Val::from(&value);
                true
            }
            None => false,
        }
    }

    /// Appends what the device sent.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.start > 0 && self.start * 2 >= self.buffer.len() {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Says that no more bytes will come: what is incomplete then is `truncated`.
    pub fn end_of_input(&mut self) {
        self.ended = true;
    }

    /// Runs until something happens. `now` is what the program sees as the current time.
    ///
    /// Until a [`Step::Login`] is answered, it comes again.
    pub fn step(&mut self, now: Timestamp) -> Step {
        if let Some((ident, password)) = &self.pending {
            return Step::Login { ident: ident.clone(), password: password.clone() };
        }
        let datagram = self.options.transport == Transport::Udp;
        if !self.running {
            if self.start >= self.buffer.len() {
                return Step::NeedMore;
            }
            let rule = if datagram { self.program.on_datagram } else { self.program.on_stream };
            let Some(rule) = rule else { return self.no_rule() };
            let (program, traced) = (&self.program, self.options.trace || self.options.lenient);
            match &mut self.machine {
                Some(machine) => machine.reset(program, rule, traced, self.hints),
                None => {
                    self.machine = Some(Box::new(Machine::new(program, rule, traced, self.hints)));
                }
            }
            self.running = true;
        }
        let Some(machine) = &mut self.machine else { return Step::NeedMore };
        let available = self.buffer.get(self.start..).unwrap_or(&[]);
        let most = available.len().min(self.options.limits.frame_bytes_max);
        let mut env = Environment {
            program: &self.program,
            input: available.get(..most).unwrap_or(available),
            ended: self.ended,
            limits: self.options.limits,
            lenient: self.options.lenient,
            // Under the lenient option a read may half succeed: only single steps do that right.
            traced: self.options.trace || self.options.lenient,
            datagram,
            now,
            ident: self.ident.as_ref(),
            settings: &self.settings,
            session_vars: &mut self.session_vars,
        };
        match machine.run(&mut env) {
            Stop::NeedMore => Step::NeedMore,
            Stop::Login { ident, password } => {
                self.pending = Some((ident.clone(), password.clone()));
                Step::Login { ident, password }
            }
            Stop::Done { length } => {
                // Always some progress: a frame of no bytes would come again for ever.
                let length = length.clamp(1, available.len().max(1)).min(available.len());
                let frame = Frame {
                    bytes: Bytes::copy_from_slice(available.get(..length).unwrap_or(&[])),
                    ident: self.ident.clone(),
                    messages: std::mem::take(&mut machine.messages),
                    replies: std::mem::take(&mut machine.replies),
                    command_answer: machine.answer.take(),
                    fields: if self.options.trace {
                        std::mem::take(&mut machine.fields)
                    } else {
                        Vec::new()
                    },
                    error: machine.error.take(),
                    close: machine.close,
                    secret: machine.secret,
                };
                self.hints = (frame.messages.len(), machine.params_hint());
                self.finish(length);
                Step::Frame(frame)
            }
        }
    }

    /// The frame's bytes are done with.
    fn finish(&mut self, length: usize) {
        self.running = false;
        self.start += length;
        if self.start >= self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
            if self.buffer.capacity() > SPARE_BYTES_MAX {
                self.buffer = Vec::new();
                self.machine = None;
            }
        }
    }

    /// The protocol says nothing about this transport.
    fn no_rule(&mut self) -> Step {
        let rest = self.buffer.get(self.start..).unwrap_or(&[]);
        let bytes = Bytes::copy_from_slice(rest);
        let error = FrameError {
            class: "unsupported_transport".into(),
            message: format!("protocol {} does not use this transport", self.program.name()),
            offset: 0,
            rule: "?".into(),
            line: 0,
        };
        self.finish(bytes.len());
        Step::Frame(Frame {
            bytes,
            error: Some(error),
            close: Some(CloseCode::Unsupported),
            ..Frame::default()
        })
    }

    /// Answers [`Step::Login`]: the device is known, with these settings.
    pub fn login_accepted(&mut self, settings: &BTreeMap<String, serde_json::Value>) {
        let Some((ident, _)) = self.pending.take() else { return };
        self.identify(&ident, settings);
        if let Some(machine) = &mut self.machine {
            machine.login(true);
        }
    }

    /// Answers [`Step::Login`]: the device is not known. The protocol's words for that come with
    /// the next [`Step::Frame`], and with them a close code.
    pub fn login_refused(&mut self) {
        if self.pending.take().is_some()
            && let Some(machine) = &mut self.machine
        {
            machine.login(false);
        }
    }

    /// The bytes of command `name`.
    ///
    /// # Errors
    ///
    /// If the protocol has no such command or cannot make it of `params`.
    pub fn encode_command(
        &mut self,
        name: &str,
        params: &Params,
    ) -> Result<EncodedCommand, CommandError> {
        let program = Arc::clone(&self.program);
        let found =
            program.commands.iter().zip(&program.command_rules).find(|(c, _)| c.name == name);
        let Some((command, rule)) = found else {
            let known: Vec<&str> = program.commands.iter().map(|c| c.name.as_str()).collect();
            return Err(CommandError::Unknown {
                protocol: program.name().to_owned(),
                name: name.to_owned(),
                known: if known.is_empty() { "none".into() } else { known.join(", ") },
            });
        };
        let mut args = Vec::with_capacity(command.params.len());
        for param in &command.params {
            let value = params.get(&param.name);
            let arg = value.and_then(|value| param.kind.take(value));
            let problem = match value {
                Some(_) => format!("must be of kind {}", param.kind.name()),
                None => "is missing".to_owned(),
            };
            args.push(arg.ok_or_else(|| CommandError::Param {
                name: name.to_owned(),
                param: param.name.clone(),
                problem,
            })?);
        }
        let mut machine = Machine::new(&program, *rule, false, (0, 0));
        machine.arguments(args);
        let mut session_vars = self.session_vars.clone();
        let mut env = Environment {
            program: &program,
            input: &[],
            ended: true,
            limits: self.options.limits,
            lenient: false,
            traced: false,
            datagram: self.options.transport == Transport::Udp,
            now: Timestamp::default(),
            ident: self.ident.as_ref(),
            settings: &self.settings,
            session_vars: &mut session_vars,
        };
        let stop = machine.run(&mut env);
        let failed = |problem: String| CommandError::Failed { name: name.to_owned(), problem };
        if let Some(error) = machine.error {
            return Err(failed(error.to_string()));
        }
        if !matches!(stop, Stop::Done { .. }) || machine.replies.is_empty() {
            return Err(failed("the program sends nothing".into()));
        }
        self.session_vars = session_vars;
        let bytes: Vec<u8> = machine.replies.iter().flat_map(|r| r.bytes.iter().copied()).collect();
        Ok(EncodedCommand { bytes: bytes.into(), expects_answer: machine.expects })
    }

    /// The device that is logged in.
    #[must_use]
    pub fn ident(&self) -> Option<&str> {
        self.ident.as_deref()
    }

    /// Bytes fed and not yet part of a finished frame.
    #[must_use]
    pub fn buffered(&self) -> usize {
        self.buffer.len() - self.start
    }

    /// Whether a frame was begun and not finished.
    #[must_use]
    pub fn mid_frame(&self) -> bool {
        self.running
    }
}

/// Values of the program's settings: those given, of the right kind, or the defaults.
fn settings_of(program: &Program, given: &BTreeMap<String, serde_json::Value>) -> Vec<Val> {
    let value = |setting: &SettingDecl| {
        let given = given.get(&setting.name).and_then(|json| Value::from_json(json.clone()));
        given.and_then(|value| setting.kind.take(&value)).unwrap_or_else(|| {
            Value::from_json(setting.default.clone()).map_or(Val::Null, |value| Val::from(&value))
        })
    };
    program.settings.iter().map(value).collect()
}
