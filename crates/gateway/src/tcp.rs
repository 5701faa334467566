//! One TCP or TLS connection, from its first byte to its close code.

use std::cell::RefCell;
use std::future::{pending, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use fieldline_contracts::{Dispatch, Outcome, SessionHandle};
use fieldline_model::{CloseCode, Device, Timestamp};
use fieldline_pvm::{Frame, Session, Step};
use fieldline_runtime::balancers::Header;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::channel::ChannelLive;
use crate::connection::Connection;
use crate::journal::Line;
use crate::limit::Bucket;
use crate::shared::{Awaited, End, FrameLines, Place, Shared, foreign_protocol};
use crate::sniff;

/// Bytes read at once, into a buffer that all connections of an event loop share.
const READ_BYTES: usize = 64 << 10;
/// A batch is stored when it has so many messages or frames, however much is in the buffer.
const BATCH_MESSAGES: usize = 2_000;
const BATCH_FRAMES: usize = 512;
/// Bytes by which a peer that is no tracker is recognised.
const FIRST_BYTES: usize = 8;
/// Seconds over which a connection's bytes are averaged.
const RATE_WINDOW_S: f64 = 10.0;
/// Time a peer has to take our last words, and how much of its own we let go by meanwhile.
const LINGER: Duration = Duration::from_millis(500);
const LINGER_BYTES: usize = 256 << 10;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

/// Serves one connection to its end.
///
/// Until its first byte a connection is only this small future: the session and
/// its buffers come with the first byte.
pub(crate) async fn run(
    shared: Arc<Shared>,
    channel: Arc<ChannelLive>,
    mut stream: TcpStream,
    connection: Arc<Connection>,
    mut place: Place,
) {
    let started = Instant::now();
    if shared.config.balancers.lists(connection.peer().ip())
        && let Err(end) = name_peer(&shared, &mut stream, &connection, &mut place).await
    {
        shared.metrics.closed(end.code);
        shared.refused(&channel, &connection, None, &end);
        return;
    }
    let deadline = started + shared.config.login_timeout;
    let mut first = [0; 1];
    let silent = loop {
        tokio::select! {
            biased;
            () = connection.asked() => {
                if let Some(code) = connection.closing() {
                    break Some(End::new(code, ""));
                }
            }
            // Readiness alone may be a false alarm; looking at a byte is not.
            looked = stream.peek(&mut first) => match looked {
                Ok(_) => break None,
                Err(error) => break Some(End::new(CloseCode::NetworkError, error.to_string())),
            },
            () = sleep_until(deadline) => {
                break Some(End::new(CloseCode::LoginTimeout, "no byte came"));
            }
        }
    };
    match silent {
        Some(end) => {
            shared.metrics.closed(end.code);
            shared.refused(&channel, &connection, None, &end);
        }
        None => Box::pin(begin(shared, channel, stream, connection, started)).await,
    }
    drop(place);
}

/// Asks the balancer that the connection came by whose it is.
async fn name_peer(
    shared: &Shared,
    stream: &mut TcpStream,
    connection: &Connection,
    place: &mut Place,
) -> Result<(), End> {
    let peer = connection.peer();
    let named = tokio::select! {
        () = connection.asked() => {
            return Err(End::new(connection.closing().unwrap_or(CloseCode::InternalError), ""));
        }
        named = shared.config.balancers.peer(stream, peer, Header::Required) => named,
    };
    connection.set_peer(named.map_err(|error| Shared::unnamed(&error))?);
    place.count(connection.peer())
}

async fn begin(
    shared: Arc<Shared>,
    channel: Arc<ChannelLive>,
    stream: TcpStream,
    connection: Arc<Connection>,
    started: Instant,
) {
    let Some(tls) = &channel.tls else {
        return Serving::new(shared, channel, stream, connection, started).run().await;
    };
    let accept = Box::pin(tls.acceptor().accept(stream));
    let failed = tokio::select! {
        () = connection.asked() => {
            End::new(connection.closing().unwrap_or(CloseCode::InternalError), "")
        }
        accepted = timeout_at(started + shared.config.login_timeout, accept) => match accepted {
            Ok(Ok(stream)) => {
                let serving = Serving::new(shared, Arc::clone(&channel), stream, connection, started);
                return serving.run().await;
            }
            Ok(Err(error)) => End::new(CloseCode::TlsFailed, error.to_string()),
            Err(_) => End::new(CloseCode::TlsFailed, "the handshake was not finished in time"),
        }
    };
    shared.metrics.closed(failed.code);
    shared.refused(&channel, &connection, None, &failed);
}

/// What a connection waited for.
enum Waited {
    Bytes(usize),
    /// The device will send nothing more.
    End,
    Failed(io::Error),
    Asked,
    Command(Option<Box<Dispatch>>),
    Deadline,
}

/// A connection that has spoken.
///
/// What it waits in is kept small: whatever else it does is boxed while it does
/// it, so that ten thousand quiet devices cost little.
struct Serving<S> {
    shared: Arc<Shared>,
    channel: Arc<ChannelLive>,
    connection: Arc<Connection>,
    io: S,
    session: Session,
    device: Option<Arc<Device>>,
    commands: Option<SessionHandle>,
    awaited: Awaited,
    /// The ident that was refused, and why.
    refused: Option<(String, End)>,
    started: Instant,
    received: Instant,
    /// Since when a frame is begun and not finished.
    partial_since: Option<Instant>,
    rate: Bucket,
    lines: FrameLines,
    first: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Serving<S> {
    fn new(
        shared: Arc<Shared>,
        channel: Arc<ChannelLive>,
        io: S,
        connection: Arc<Connection>,
        started: Instant,
    ) -> Self {
        let session = shared.session(&channel, channel.program());
        let now = Instant::now();
        let rate = f64::from(channel.settings().connection_bytes_per_s_max);
        Self {
            shared,
            channel,
            connection,
            io,
            session,
            device: None,
            commands: None,
            awaited: Awaited::default(),
            refused: None,
            started,
            received: now,
            partial_since: None,
            rate: Bucket::full(rate * RATE_WINDOW_S, now),
            lines: FrameLines::new(now),
            first: Vec::new(),
        }
    }

    async fn run(mut self) {
        let end = self.serve().await;
        Box::pin(self.finish(end)).await;
    }

    async fn finish(&mut self, end: End) {
        self.shared.metrics.closed(end.code);
        self.release(&end).await;
        if self.device.is_none() {
            let ident = self.refused.as_ref().map(|(ident, _)| ident.as_str());
            self.shared.refused(&self.channel, &self.connection, ident, &end);
        }
        self.hang_up(&end).await;
    }

    async fn serve(&mut self) -> End {
        loop {
            if let Some(code) = self.closing() {
                return End::new(code, "");
            }
            match self.wait().await {
                Waited::Bytes(count) => {
                    if let Some(end) = self.note_received(count) {
                        return end;
                    }
                    if let Some(end) = Box::pin(self.frames()).await {
                        return end;
                    }
                    if let Some(end) = self.judge_rest() {
                        return end;
                    }
                }
                Waited::End => {
                    self.session.end_of_input();
                    let last = Box::pin(self.frames()).await;
                    return match last {
                        Some(end) if end.code != CloseCode::ProtocolError => end,
                        _ => self.foreign().unwrap_or(End::new(CloseCode::DeviceClosed, "")),
                    };
                }
                Waited::Failed(error) => return network(&error),
                Waited::Asked => {
                    if self.closing().is_none()
                        && self.connection.take_refresh()
                        && let Some(end) = Box::pin(self.refresh()).await
                    {
                        return end;
                    }
                }
                Waited::Command(Some(dispatch)) => {
                    if let Some(end) = Box::pin(self.command(*dispatch)).await {
                        return end;
                    }
                }
                // Another connection took the device's commands over.
                Waited::Command(None) => self.commands = None,
                Waited::Deadline => {
                    if let Some(end) = Box::pin(self.overdue()).await {
                        return end;
                    }
                }
            }
        }
    }

    /// Why the connection is to be closed now, if it is.
    fn closing(&self) -> Option<CloseCode> {
        let code = self.connection.closing()?;
        (!self.finishes(code)).then_some(code)
    }

    /// Whether it first finishes what is begun, since the gateway drains: the answer to a command, or a frame.
    fn finishes(&self, code: CloseCode) -> bool {
        let begun = self.awaited.is_pending() || self.partial_since.is_some();
        code == CloseCode::Shutdown
            && self.device.is_some()
            && begun
            && self.shared.drain.get().is_some_and(|until| Instant::now() < *until)
    }

    /// Waits for whatever comes first. Bytes that were read are in the session already.
    async fn wait(&mut self) -> Waited {
        let deadline = self.deadline();
        let Self { connection, commands, awaited, io, session, first, .. } = self;
        let command = async {
            match commands {
                // One that is about to end takes no more.
                Some(commands) if awaited.is_free() && connection.closing().is_none() => {
                    commands.dispatches.recv().await.map(Box::new)
                }
                _ => pending().await,
            }
        };
        tokio::select! {
            biased;
            () = connection.asked() => Waited::Asked,
            dispatch = command => Waited::Command(dispatch),
            read = read_into(io, session, first) => match read {
                Ok(0) => Waited::End,
                Ok(count) => Waited::Bytes(count),
                Err(error) => Waited::Failed(error),
            },
            () = sleep_until(deadline) => Waited::Deadline,
        }
    }

    fn idle_timeout(&self) -> Duration {
        Duration::from_secs(u64::from(self.channel.settings().idle_timeout_s.max(1)))
    }

    /// The earliest instant at which the connection is overdue for something.
    fn deadline(&self) -> Instant {
        let config = &self.shared.config;
        let mut deadline = match &self.device {
            None => self.started + config.login_timeout,
            Some(_) => self.received + self.idle_timeout(),
        };
        if let Some(since) = self.partial_since {
            deadline = deadline.min(since + config.frame_timeout);
        }
        if let Some(awaited) = self.awaited.deadline() {
            deadline = deadline.min(awaited);
        }
        if self.connection.closing().is_some()
            && let Some(until) = self.shared.drain.get()
        {
            deadline = deadline.min(*until);
        }
        deadline
    }

    async fn overdue(&mut self) -> Option<End> {
        let now = Instant::now();
        let config = &self.shared.config;
        let overdue = self.awaited.overdue(self.shared.now(), config.answer_timeout);
        if let (Some((id, outcome)), Some(device)) = (overdue, self.device.clone()) {
            self.shared.report(&device, &self.connection, id, outcome).await;
            return None;
        }
        if self.partial_since.is_some_and(|since| since + config.frame_timeout <= now) {
            let text = format!("{} bytes of a frame came", self.session.buffered());
            return Some(End::new(CloseCode::FrameTimeout, text));
        }
        if self.device.is_none() && self.started + config.login_timeout <= now {
            let text = format!("{} bytes came, no identification", self.session.buffered());
            return Some(self.foreign().unwrap_or(End::new(CloseCode::LoginTimeout, text)));
        }
        if self.device.is_some() && self.received + self.idle_timeout() <= now {
            return Some(End::new(CloseCode::IdleTimeout, ""));
        }
        None
    }

    fn note_received(&mut self, count: usize) -> Option<End> {
        let now = Instant::now();
        self.received = now;
        self.connection.note_received(count, self.shared.now());
        self.shared.metrics.received_bytes.increment(count as u64);
        let max = self.channel.settings().connection_bytes_per_s_max;
        let per_s = f64::from(max);
        #[allow(clippy::cast_precision_loss, reason = "a read is at most 64 KiB")]
        let within = max == 0 || self.rate.take(count as f64, per_s, per_s * RATE_WINDOW_S, now);
        (!within)
            .then(|| End::new(CloseCode::RateLimited, format!("more than {max} bytes a second")))
    }

    /// Whether what is left in the buffer may wait for more.
    fn judge_rest(&mut self) -> Option<End> {
        let buffered = self.session.buffered();
        if buffered == 0 {
            self.partial_since = None;
        } else {
            self.partial_since.get_or_insert(self.received);
        }
        if self.device.is_none()
            && let Some(end) = self.foreign()
        {
            return Some(end);
        }
        let max = usize::try_from(self.channel.settings().frame_bytes_max).unwrap_or(usize::MAX);
        (buffered > max.saturating_add(READ_BYTES)).then(|| {
            End::new(CloseCode::FrameTooLarge, format!("a frame has more than {max} bytes"))
        })
    }

    /// The end of a peer that is no tracker.
    fn foreign(&self) -> Option<End> {
        if self.device.is_some() {
            return None;
        }
        let protocol = sniff::foreign_protocol(&self.first)?;
        Some(End::new(CloseCode::WrongProtocol, format!("the peer speaks {protocol}")))
    }

    /// Runs what is in the buffer: frames are stored in batches, their replies sent in order.
    async fn frames(&mut self) -> Option<End> {
        let now = self.shared.now();
        let mut batch: Vec<Frame> = Vec::new();
        let mut messages = 0;
        loop {
            match self.session.step(now) {
                Step::NeedMore => {
                    if let Some(end) = self.flush(batch, now).await {
                        return Some(end);
                    }
                    // The protocol has no words for a refusal.
                    return self.refusal();
                }
                Step::Login { ident, password } => {
                    // What came before is the other device's, if this one is another.
                    if let Some(end) = self.flush(std::mem::take(&mut batch), now).await {
                        return Some(end);
                    }
                    messages = 0;
                    if let Some(end) = self.login(&ident, password.as_deref()).await {
                        return Some(end);
                    }
                }
                Step::Frame(frame) => {
                    self.partial_since = None;
                    let close = closes(&frame);
                    let refused = self.refused.is_some();
                    messages += frame.messages.len();
                    batch.push(frame);
                    if let Some(end) = close {
                        if let Some(end) = self.flush(batch, now).await {
                            return Some(end);
                        }
                        let wrong = end.code == CloseCode::ProtocolError;
                        return self
                            .refusal()
                            .or(if wrong { self.foreign() } else { None })
                            .or(Some(end));
                    }
                    if refused || messages >= BATCH_MESSAGES || batch.len() >= BATCH_FRAMES {
                        let full = std::mem::take(&mut batch);
                        if let Some(end) = self.flush(full, now).await {
                            return Some(end);
                        }
                        messages = 0;
                    }
                    if refused {
                        return self.refusal();
                    }
                }
            }
        }
    }

    /// The end of a connection whose device was refused.
    fn refusal(&self) -> Option<End> {
        self.refused.as_ref().map(|(_, end)| end.clone())
    }

    async fn login(&mut self, ident: &str, password: Option<&str>) -> Option<End> {
        match self.shared.identify(&self.channel, ident, password, self.connection.peer()).await {
            Ok(device) => {
                let same = self.device.as_ref().is_some_and(|known| known.id == device.id);
                if !same {
                    let end =
                        End::new(CloseCode::DeviceClosed, "the connection changed its device");
                    self.release(&end).await;
                    let handle = self.shared.attach(&self.channel, &self.connection, &device).await;
                    self.commands = handle;
                }
                self.session.login_accepted(&device.settings);
                self.device = Some(device);
                None
            }
            // Not known now whether it may come in: no answer, so that it tries again.
            Err(end) if end.code == CloseCode::StorageUnavailable => {
                self.refused = Some((ident.to_owned(), end.clone()));
                Some(end)
            }
            Err(end) => {
                let other = End::new(CloseCode::DeviceClosed, "the connection changed its device");
                self.release(&other).await;
                self.device = None;
                self.refused = Some((ident.to_owned(), end));
                self.session.login_refused();
                None
            }
        }
    }

    /// Stores what frames say, then sends their replies.
    async fn flush(&mut self, frames: Vec<Frame>, received: Timestamp) -> Option<End> {
        if frames.is_empty() {
            return None;
        }
        let Some(device) = self.device.clone() else {
            return self.flush_unknown(frames).await;
        };
        let (shared, connection) = (Arc::clone(&self.shared), Arc::clone(&self.connection));
        let taken = shared.take(&connection, &device, &mut self.lines, received, frames).await;
        let taken = match taken {
            Ok(taken) => taken,
            Err(end) => return Some(end),
        };
        if !taken.replies.is_empty() {
            let replies: Vec<u8> =
                taken.replies.iter().flat_map(|(_, bytes)| bytes.iter().copied()).collect();
            if let Err(end) = self.write(&replies).await {
                return Some(end);
            }
            let line = || Line::new("reply").bytes(&replies);
            shared.log_sent(&connection, &device, &mut self.lines, line);
        }
        for answer in taken.answers {
            // An answer that nobody waits for is in the log of frames.
            if let Some(id) = self.awaited.answered() {
                shared.answered(&connection, &device, id, answer).await;
            }
        }
        None
    }

    /// Frames before any identification, or after a refusal: nothing of them is kept.
    async fn flush_unknown(&mut self, frames: Vec<Frame>) -> Option<End> {
        let mut replies = Vec::new();
        let mut spoke = false;
        self.shared.metrics.frames.increment(frames.len() as u64);
        for frame in frames {
            if frame.error.is_some() {
                self.shared.metrics.frame_errors.increment(1);
                self.shared.log_stray(&self.channel, &self.connection, &frame);
            }
            spoke |= !frame.messages.is_empty();
            // A reply to messages would acknowledge what is not stored.
            if frame.messages.is_empty() {
                frame.replies.iter().for_each(|reply| replies.extend_from_slice(&reply.bytes));
            }
        }
        if !replies.is_empty()
            && let Err(end) = self.write(&replies).await
        {
            return Some(end);
        }
        let text = "messages came before the device identified itself";
        spoke.then(|| End::new(CloseCode::ProtocolError, text))
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), End> {
        let limit = self.shared.config.write_timeout;
        let Self { io, connection, .. } = self;
        let written = timeout(limit, async {
            io.write_all(bytes).await?;
            io.flush().await
        });
        let mut written = std::pin::pin!(written);
        let mut asked = false;
        let outcome = loop {
            tokio::select! {
                biased;
                outcome = &mut written => break Some(outcome),
                () = connection.asked() => asked = true,
            }
            // A peer that does not read any more, since it is connected elsewhere, keeps nobody waiting.
            if connection.closing().is_some() {
                break timeout(LINGER, written).await.ok();
            }
        };
        if asked {
            connection.ask_again();
        }
        match outcome {
            Some(Ok(Ok(()))) => {
                self.connection.note_sent(bytes.len());
                self.shared.metrics.sent_bytes.increment(bytes.len() as u64);
                Ok(())
            }
            Some(Ok(Err(error))) => Err(network(&error)),
            Some(Err(_)) => Err(End::new(CloseCode::WriteTimeout, "")),
            None => {
                let code = self.connection.closing().unwrap_or(CloseCode::WriteTimeout);
                Err(End::new(code, "what was to be sent could not be"))
            }
        }
    }

    /// Puts a command on the wire.
    async fn command(&mut self, dispatch: Dispatch) -> Option<End> {
        let device = Arc::clone(self.device.as_ref()?);
        let (shared, connection) = (Arc::clone(&self.shared), Arc::clone(&self.connection));
        let command = dispatch.command;
        let encoded = match self.session.encode_command(&command.name, &command.params) {
            Ok(encoded) => encoded,
            Err(error) => {
                let failed = Outcome::Failed(error.to_string());
                shared.report(&device, &connection, command.id, failed).await;
                return None;
            }
        };
        if let Err(end) = self.write(&encoded.bytes).await {
            shared.report(&device, &connection, command.id, Outcome::Lost).await;
            return Some(end);
        }
        let line = || Line::new("command").command(&command.id.to_string()).bytes(&encoded.bytes);
        shared.log_sent(&connection, &device, &mut self.lines, line);
        shared.report(&device, &connection, command.id, Outcome::Sent).await;
        if !encoded.expects_answer {
            let answered = Outcome::Answered(String::new());
            shared.report(&device, &connection, command.id, answered).await;
            return None;
        }
        self.awaited.sent(&command, shared.now(), shared.config.answer_timeout);
        None
    }

    /// Looks at the device again after it was changed.
    async fn refresh(&mut self) -> Option<End> {
        let known = Arc::clone(self.device.as_ref()?);
        let ingest = &self.shared.ingest;
        match ingest.device(known.account, known.id).await {
            Ok(Some(device)) if device.ident != known.ident => {
                Some(End::new(CloseCode::UnknownDevice, "the device has another ident now"))
            }
            Ok(Some(device)) if !device.enabled => Some(End::new(CloseCode::DeviceDisabled, "")),
            Ok(Some(device)) => {
                if let Some(text) = foreign_protocol(&self.channel, &device) {
                    return Some(End::new(CloseCode::UnknownDevice, text));
                }
                if device.settings != known.settings {
                    self.session.identify(&device.ident, &device.settings);
                }
                self.connection.set_device(Some(Arc::clone(&device)));
                self.device = Some(device);
                None
            }
            Ok(None) => Some(End::new(CloseCode::UnknownDevice, "the device was deleted")),
            // What is known goes on being right until told otherwise.
            Err(_) => None,
        }
    }

    /// Lets go of the device, if there is one.
    async fn release(&mut self, end: &End) {
        let Some(device) = self.device.clone() else { return };
        if let Some(id) = self.awaited.clear() {
            self.shared.report(&device, &self.connection, id, Outcome::Lost).await;
        }
        self.commands = None;
        self.shared.detach(&self.channel, &self.connection, &device, end).await;
    }

    /// Ends the stream in order, so that our last words arrive: closing a
    /// socket with unread bytes would take them back.
    async fn hang_up(&mut self, end: &End) {
        let gone = matches!(
            end.code,
            CloseCode::NetworkError | CloseCode::WriteTimeout | CloseCode::DeviceClosed
        );
        let io = &mut self.io;
        let farewell = async {
            io.shutdown().await?;
            let mut left = if gone { 0 } else { LINGER_BYTES };
            let mut sink = [0_u8; 512];
            while left > 0 {
                let count = io.read(&mut sink).await?;
                if count == 0 {
                    break;
                }
                left = left.saturating_sub(count);
            }
            io::Result::Ok(())
        };
        // Whatever becomes of it, the connection is over.
        let _outcome = timeout(LINGER, farewell).await;
    }
}

fn network(error: &io::Error) -> End {
    End::new(CloseCode::NetworkError, error.to_string())
}

/// Why a frame ends its connection, if it does.
fn closes(frame: &Frame) -> Option<End> {
    let text = frame.error.as_ref().map(ToString::to_string).unwrap_or_default();
    if let Some(code) = frame.close {
        return Some(End::new(code, text));
    }
    // After these the place in the stream is lost, whatever the protocol says.
    match frame.error.as_ref().map(|error| &*error.class) {
        Some("frame_too_large") => Some(End::new(CloseCode::FrameTooLarge, text)),
        Some("limit_exceeded") => Some(End::new(CloseCode::LimitExceeded, text)),
        _ => None,
    }
}

/// Reads what is there into the session. Cancel-safe: bytes are read and fed at once.
async fn read_into<S: AsyncRead + Unpin>(
    io: &mut S,
    session: &mut Session,
    first: &mut Vec<u8>,
) -> io::Result<usize> {
    poll_fn(|context| {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            ready!(Pin::new(&mut *io).poll_read(context, &mut buffer))?;
            session.feed(buffer.filled());
            let wanted = FIRST_BYTES.saturating_sub(first.len());
            first.extend(buffer.filled().iter().take(wanted));
            Poll::Ready(Ok(buffer.filled().len()))
        })
    })
    .await
}

#[cfg(test)]
mod tests;
