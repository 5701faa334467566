//! Log lines of devices and channels.

use std::net::SocketAddr;
use std::sync::LazyLock;

use bytes::Bytes;
use fieldline_contracts::Clock;
use fieldline_ingest::Ingest;
use fieldline_model::{
    Accepted, Channel, CloseCode, Decoded, Device, ParamName, Params, Series, Timestamp, Value,
};
use fieldline_pvm::FrameError;

use crate::channel::ChannelLive;
use crate::connection::Connection;

/// Longest frame kept in a line, in bytes.
const FRAME_BYTES_MAX: usize = 64 << 10;
/// Most messages, and bytes of messages, kept in a line.
const MESSAGES_MAX: usize = 256;
const MESSAGES_BYTES_MAX: usize = 128 << 10;

macro_rules! names {
    ($($field:ident = $text:literal),+ $(,)?) => {
        /// Names of the parameters of log lines, made once.
        struct Names { $($field: Option<ParamName>,)+ }

        static NAMES: LazyLock<Names> =
            LazyLock::new(|| Names { $($field: ParamName::new($text).ok(),)+ });
    };
}

names! {
    kind = "log.kind",
    connection = "connection.id",
    peer = "peer",
    ident = "ident",
    hex = "frame.hex",
    cut = "frame.cut",
    masked = "frame.masked",
    size = "frame.size",
    messages = "messages",
    messages_cut = "messages.cut",
    class = "error.class",
    error = "error.text",
    offset = "error.offset",
    code = "close.code",
    code_name = "close.name",
    text = "text",
    channel = "channel.id",
    protocol = "protocol",
    suppressed = "suppressed",
    command = "command.id",
    transport = "transport",
}

/// A log line in the making.
pub(crate) struct Line(Params);

impl Line {
    /// A line of one of the kinds `connected`, `login`, `frame`, `reply`, `command`, `answer`,
    /// `error`, `closed`, `refused`, `compile`, `started`, `stopped`.
    pub(crate) fn new(kind: &'static str) -> Self {
        Self(Params::with_capacity(10)).with(&NAMES.kind, kind)
    }

    fn with(mut self, name: &Option<ParamName>, value: impl Into<Value>) -> Self {
        if let Some(name) = name {
            self.0.push(name.clone(), value.into());
        }
        self
    }

    pub(crate) fn connection(self, connection: &Connection) -> Self {
        self.with(&NAMES.connection, connection.id.to_string())
    }

    pub(crate) fn peer(self, peer: SocketAddr) -> Self {
        self.with(&NAMES.peer, peer.to_string())
    }

    pub(crate) fn channel(self, channel: &ChannelLive) -> Self {
        let settings = channel.settings();
        self.with(&NAMES.channel, channel.id.to_string())
            .with(&NAMES.protocol, settings.protocol.as_str())
    }

    /// By what a frame came: channel, protocol and transport.
    fn way(self, connection: &Connection) -> Self {
        self.with(&NAMES.channel, connection.channel.to_string())
            .with(&NAMES.protocol, connection.settings.protocol.as_str())
            .transport(connection)
    }

    pub(crate) fn transport(self, connection: &Connection) -> Self {
        let name = match connection.transport {
            fieldline_model::Transport::Tcp => "tcp",
            fieldline_model::Transport::Tls => "tls",
            fieldline_model::Transport::Udp => "udp",
        };
        self.with(&NAMES.transport, name)
    }

    pub(crate) fn ident(self, ident: &str) -> Self {
        // What a peer calls itself before it is known may be anything.
        self.with(&NAMES.ident, ident.chars().take(64).collect::<String>())
    }

    pub(crate) fn text(self, text: &str) -> Self {
        if text.is_empty() { self } else { self.with(&NAMES.text, text) }
    }

    pub(crate) fn close(self, code: CloseCode) -> Self {
        self.with(&NAMES.code, i64::from(code.number())).with(&NAMES.code_name, code.name())
    }

    pub(crate) fn command(self, id: &str) -> Self {
        self.with(&NAMES.command, id)
    }

    pub(crate) fn suppressed(self, count: u64) -> Self {
        if count == 0 { self } else { self.with(&NAMES.suppressed, count) }
    }

    pub(crate) fn bytes(self, bytes: &[u8]) -> Self {
        match bytes.get(..FRAME_BYTES_MAX) {
            Some(part) if part.len() < bytes.len() => {
                self.with(&NAMES.hex, part).with(&NAMES.cut, true)
            }
            _ => self.with(&NAMES.hex, bytes),
        }
    }

    /// What a device sent; only how much it is, where a password is in it.
    pub(crate) fn received(self, bytes: &[u8], secret: bool) -> Self {
        if !secret {
            return self.bytes(bytes);
        }
        let size = i64::try_from(bytes.len()).unwrap_or(i64::MAX);
        self.with(&NAMES.masked, true).with(&NAMES.size, size)
    }

    pub(crate) fn frame_error(self, error: &FrameError) -> Self {
        let offset = i64::try_from(error.offset).unwrap_or(i64::MAX);
        self.with(&NAMES.class, &*error.class)
            .with(&NAMES.error, error.message.as_str())
            .with(&NAMES.offset, offset)
    }

    fn messages(self, messages: &[Decoded]) -> Self {
        if messages.is_empty() {
            return self;
        }
        let mut bytes = 0;
        let mut shown = Vec::with_capacity(messages.len().min(MESSAGES_MAX));
        for message in messages.iter().take(MESSAGES_MAX) {
            bytes += message.params.content_bytes();
            if bytes > MESSAGES_BYTES_MAX {
                break;
            }
            shown.push(message_json(message));
        }
        let cut = shown.len() < messages.len();
        let line = self.with(&NAMES.messages, Value::Json(serde_json::Value::Array(shown).into()));
        if cut { line.with(&NAMES.messages_cut, true) } else { line }
    }

    /// The line as a record of the device's log.
    pub(crate) fn of_device(self, device: &Device, at: Timestamp) -> Accepted {
        Accepted::own(Series::device_log(device.account, device.id), at, self.0)
    }

    /// The line as a record of the log of a channel that does not listen.
    pub(crate) fn of_settings(self, channel: &Channel, at: Timestamp) -> Accepted {
        Accepted::own(Series::channel_log(channel.account, channel.id), at, self.0)
    }

    /// The line as a record of the channel's log.
    pub(crate) fn of_channel(self, channel: &ChannelLive, at: Timestamp) -> Accepted {
        Accepted::own(Series::channel_log(channel.account, channel.id), at, self.0)
    }
}

fn message_json(message: &Decoded) -> serde_json::Value {
    let mut object = serde_json::Map::with_capacity(message.params.len() + 1);
    if let Some(at) = message.timestamp {
        object.insert("timestamp".to_owned(), at.to_string().into());
    }
    for (name, value) in &message.params {
        object.insert(name.as_str().to_owned(), value.to_json());
    }
    object.into()
}

/// One frame and what it says, made into a line away from the event loop.
pub(crate) struct FrameLine {
    pub(crate) bytes: Bytes,
    /// Whether the bytes hold a password.
    pub(crate) secret: bool,
    pub(crate) messages: Vec<Decoded>,
    pub(crate) error: Option<FrameError>,
    pub(crate) suppressed: u64,
}

/// Queues the line of one frame of a device.
pub(crate) fn log_frame(
    ingest: &Ingest,
    device: &std::sync::Arc<Device>,
    connection: &std::sync::Arc<Connection>,
    at: Timestamp,
    frame: FrameLine,
) {
    let held = frame.bytes.len()
        + frame.messages.iter().map(|message| message.params.content_bytes()).sum::<usize>();
    let (device, connection) = (std::sync::Arc::clone(device), std::sync::Arc::clone(connection));
    ingest.log_with(held, move || {
        let kind = if frame.error.is_some() { "error" } else { "frame" };
        let mut line = Line::new(kind)
            .connection(&connection)
            .way(&connection)
            .received(&frame.bytes, frame.secret)
            .messages(&frame.messages)
            .suppressed(frame.suppressed);
        if let Some(error) = &frame.error {
            line = line.frame_error(error);
        }
        line.of_device(&device, at)
    });
}

/// Queues a line of a channel, of which there are few.
pub(crate) fn log_channel(ingest: &Ingest, clock: &dyn Clock, channel: &ChannelLive, line: Line) {
    let line = line.of_channel(channel, clock.now());
    ingest.log_with(256, move || line);
}
