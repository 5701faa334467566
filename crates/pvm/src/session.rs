//! One connection's run of a program: bytes in, frames out. No sockets, no clock.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use fieldline_model::{CloseCode, Decoded, Params, Timestamp, Transport, Value};

use crate::Program;

/// What one frame may use at most. A frame that needs more ends with class `limit_exceeded` or
/// `frame_too_large`, and nothing of it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Instructions, long operations on bytes counted by their length.
    pub steps_max: u64,
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
#[derive(Debug)]
pub struct Session {
    program: Arc<Program>,
    options: Options,
    buffer: Vec<u8>,
}

impl Session {
    /// A session that has seen no bytes.
    #[must_use]
    pub fn new(program: Arc<Program>, options: Options) -> Self {
        Self { program, options, buffer: Vec::new() }
    }

    /// Makes the device known as if it had logged in, or replaces its settings.
    pub fn identify(&mut self, ident: &str, settings: &BTreeMap<String, serde_json::Value>) {
        let _known = (ident, settings, &self.program, &self.options);
    }

    /// Appends what the device sent.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Says that no more bytes will come: what is incomplete then is `truncated`.
    pub fn end_of_input(&mut self) {}

    /// Runs until something happens. `now` is what the program sees as the current time.
    pub fn step(&mut self, now: Timestamp) -> Step {
        let _now = now;
        Step::NeedMore
    }

    /// Answers [`Step::Login`]: the device is known, with these settings.
    pub fn login_accepted(&mut self, settings: &BTreeMap<String, serde_json::Value>) {
        let _settings = settings;
    }

    /// Answers [`Step::Login`]: the device is not known. The protocol's words for that come with
    /// the next [`Step::Frame`].
    pub fn login_refused(&mut self) {}

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
        let _params = params;
        Err(CommandError::Unknown {
            protocol: self.program.name().to_owned(),
            name: name.to_owned(),
            known: String::new(),
        })
    }

    /// Bytes fed and not yet part of a finished frame.
    #[must_use]
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Whether a frame was begun and not finished.
    #[must_use]
    pub fn mid_frame(&self) -> bool {
        !self.buffer.is_empty()
    }
}
