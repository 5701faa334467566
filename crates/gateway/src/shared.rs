//! What all event loops and connections of the gateway share, and what each
//! connection does with a device: identify it, take what it says.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use fieldline_contracts::{HistoryError, Outcome, Platform, RegistryError};
use fieldline_ingest::{Ingest, RegisterError, own_params};
use fieldline_model::{
    AccountId, ChannelId, CloseCode, Command, CommandId, ConnectionId, Device, EventKind, Timestamp,
};
use fieldline_pvm::{CommandAnswer, Frame, Options, Program, Session};
use fieldline_runtime::balancers::HeaderError;
use metrics::{Counter, Gauge};
use parking_lot::RwLock;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::channel::ChannelLive;
use crate::config::GatewayConfig;
use crate::connection::{Connection, Directory};
use crate::journal::{self, FrameLine, Line};
use crate::limit::{LineLimit, RefusalLimit, Registrations};
use crate::programs::Programs;

/// Lines of frames that one device may log in a burst, and a second in the long run: a black box
/// that empties itself shows its beginning, and crowds nobody out.
const FRAME_LINES_BURST: f64 = 100.0;
const FRAME_LINES_PER_S: f64 = 5.0;

/// Why a connection ends.
#[derive(Clone, Debug)]
pub(crate) struct End {
    pub(crate) code: CloseCode,
    /// More about it, for the log; may be empty.
    pub(crate) text: String,
}

impl End {
    pub(crate) fn new(code: CloseCode, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }
}

/// A channel as the supervisor knows it.
pub(crate) struct Entry {
    pub(crate) account: AccountId,
    pub(crate) enabled: bool,
    pub(crate) live: Option<Arc<ChannelLive>>,
    pub(crate) error: Option<String>,
}

pub(crate) struct Metrics {
    pub(crate) opened: Counter,
    pub(crate) connections: Gauge,
    pub(crate) frames: Counter,
    pub(crate) frame_errors: Counter,
    pub(crate) received_bytes: Counter,
    pub(crate) sent_bytes: Counter,
    pub(crate) datagrams: Counter,
    /// Bytes of datagrams that wait for workers.
    pub(crate) datagram_queue_bytes: Gauge,
    pub(crate) lines_suppressed: Counter,
    closed: HashMap<CloseCode, Counter>,
}

impl Metrics {
    fn new() -> Self {
        let closed = |code: &CloseCode| {
            (
                *code,
                metrics::counter!("fieldline_gateway_connections_closed_total", "code" => code.name()),
            )
        };
        Self {
            opened: metrics::counter!("fieldline_gateway_connections_opened_total"),
            connections: metrics::gauge!("fieldline_gateway_connections"),
            frames: metrics::counter!("fieldline_gateway_frames_total"),
            frame_errors: metrics::counter!("fieldline_gateway_frame_errors_total"),
            received_bytes: metrics::counter!("fieldline_gateway_received_bytes_total"),
            sent_bytes: metrics::counter!("fieldline_gateway_sent_bytes_total"),
            datagrams: metrics::counter!("fieldline_gateway_datagrams_total"),
            datagram_queue_bytes: metrics::gauge!("fieldline_gateway_datagram_queue_bytes"),
            lines_suppressed: metrics::counter!("fieldline_gateway_log_lines_suppressed_total"),
            closed: CloseCode::ALL.iter().map(closed).collect(),
        }
    }

    pub(crate) fn closed(&self, code: CloseCode) {
        if let Some(counter) = self.closed.get(&code) {
            counter.increment(1);
        }
    }

    /// Datagrams let go unread or unanswered; reasons are few and fixed.
    pub(crate) fn datagram_dropped(&self, reason: &'static str) {
        metrics::counter!("fieldline_gateway_datagrams_dropped_total", "reason" => reason)
            .increment(1);
    }
}

pub(crate) struct Shared {
    pub(crate) config: GatewayConfig,
    pub(crate) ingest: Ingest,
    pub(crate) programs: Programs,
    pub(crate) directory: Directory,
    pub(crate) channels: RwLock<HashMap<ChannelId, Entry>>,
    /// Every task that holds a connection.
    pub(crate) tasks: TaskTracker,
    pub(crate) metrics: Metrics,
    /// The name of this node; `None` where there is but one.
    pub(crate) node: Option<String>,
    /// Until when connections may finish what they have begun, once the gateway drains.
    pub(crate) drain: OnceLock<Instant>,
    /// The limit on the operator's log lines about what could not be stored or looked up.
    pub(crate) failures: RefusalLimit,
    registrations: Registrations,
    total: AtomicUsize,
    /// The epoch of the connection that takes a device next.
    pub(crate) epochs: AtomicU64,
}

/// A connection's place under the limits, given back when dropped.
pub(crate) struct Place {
    shared: Arc<Shared>,
    channel: Arc<ChannelLive>,
    id: ConnectionId,
    /// The address that it counts for, if connections are counted by address.
    address: Option<IpAddr>,
}

impl Place {
    /// Counts the connection for the address of its peer, unless that is a balancer, which stands for many.
    pub(crate) fn count(&mut self, peer: SocketAddr) -> Result<(), End> {
        let config = &self.shared.config;
        let max = config.connections_per_address_max;
        if max == 0 || self.address.is_some() || config.balancers.lists(peer.ip()) {
            return Ok(());
        }
        let admitted = self.channel.admit_address(peer.ip(), max);
        admitted.map_err(|text| End::new(CloseCode::TooManyConnections, text))?;
        self.address = Some(peer.ip());
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.channel.remove(self.id, self.address);
        self.shared.total.fetch_sub(1, Ordering::AcqRel);
        self.shared.metrics.connections.decrement(1.0);
    }
}

impl Shared {
    pub(crate) fn new(config: GatewayConfig, ingest: Ingest, node: Option<String>) -> Self {
        // Above those of an earlier run of this process.
        let first = u64::try_from(ingest.now().as_micros()).unwrap_or(0).max(1);
        Self {
            config,
            ingest,
            programs: Programs::default(),
            directory: Directory::new(),
            channels: RwLock::default(),
            tasks: TaskTracker::new(),
            metrics: Metrics::new(),
            node,
            drain: OnceLock::new(),
            failures: RefusalLimit::of(1.0),
            registrations: Registrations::default(),
            total: AtomicUsize::new(0),
            epochs: AtomicU64::new(first),
        }
    }

    pub(crate) fn platform(&self) -> &Platform {
        self.ingest.platform()
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.ingest.now()
    }

    pub(crate) fn fresh_id(&self, now: Timestamp) -> ConnectionId {
        ConnectionId::new(now, self.platform().clock.random())
    }

    /// Takes a place for `connection` under all limits.
    pub(crate) fn admit(
        self: &Arc<Self>,
        channel: &Arc<ChannelLive>,
        connection: &Arc<Connection>,
    ) -> Result<Place, End> {
        let full = |text: String| End::new(CloseCode::TooManyConnections, text);
        let max = self.config.connections_max;
        let taken = self.total.fetch_update(Ordering::AcqRel, Ordering::Acquire, |total| {
            (total < max).then_some(total + 1)
        });
        if taken.is_err() {
            return Err(full(format!("the gateway holds {max} connections already")));
        }
        if let Err(text) = channel.admit() {
            self.total.fetch_sub(1, Ordering::AcqRel);
            return Err(full(text));
        }
        self.metrics.opened.increment(1);
        self.metrics.connections.increment(1.0);
        channel.add(Arc::clone(connection));
        let (shared, of) = (Arc::clone(self), Arc::clone(channel));
        // Refused by its address, it gives the rest back.
        let mut place = Place { shared, channel: of, id: connection.id, address: None };
        place.count(connection.peer())?;
        Ok(place)
    }

    /// The end of a connection whose balancer did not say whose it is.
    pub(crate) fn unnamed(error: &HeaderError) -> End {
        let code = match error {
            HeaderError::Missing(_) | HeaderError::Malformed(..) => CloseCode::WrongProtocol,
            HeaderError::Late(_) => CloseCode::LoginTimeout,
            HeaderError::Closed => CloseCode::DeviceClosed,
            HeaderError::Network(_) => CloseCode::NetworkError,
        };
        End::new(code, error.to_string())
    }

    /// A session for a connection or datagram of `channel`.
    pub(crate) fn session(&self, channel: &ChannelLive, program: Arc<Program>) -> Session {
        let settings = channel.settings();
        let mut options = Options::new(settings.transport);
        options.limits.frame_bytes_max = usize::try_from(settings.frame_bytes_max)
            .unwrap_or(usize::MAX)
            .min(options.limits.frame_bytes_max.max(16 << 20));
        Session::new(program, options)
    }

    fn unreachable(&self, error: &RegistryError) -> End {
        self.unavailable(error, "devices cannot be looked up now; it is to try again")
    }

    /// Whether a device would have to register itself by `ident`, and may.
    pub(crate) async fn is_new(&self, channel: &ChannelLive, ident: &str) -> Result<bool, End> {
        if !channel.settings().auto_register {
            return Ok(false);
        }
        let known = self.ingest.device_by_ident(channel.account, ident).await;
        Ok(known.map_err(|error| self.unreachable(&error))?.is_none())
    }

    /// The device that calls itself `ident` at `peer`, if it is let in.
    pub(crate) async fn identify(
        &self,
        channel: &ChannelLive,
        ident: &str,
        password: Option<&str>,
        peer: SocketAddr,
    ) -> Result<Arc<Device>, End> {
        let account = channel.account;
        let unavailable = |error: RegistryError| self.unreachable(&error);
        let known = self.ingest.device_by_ident(account, ident).await.map_err(unavailable)?;
        let device = match known {
            Some(device) => device,
            None => {
                let settings = channel.settings();
                if !settings.auto_register {
                    let text = "register the device, or let the channel register devices by itself";
                    return Err(End::new(CloseCode::UnknownDevice, text));
                }
                let limited = self.registrations.refuse(&self.config, channel.id, peer.ip());
                if let Some((limit, text)) = limited {
                    return Err(limited_end(limit, text));
                }
                let registered = self.ingest.register(&settings, ident).await;
                registered.map_err(|error| match error {
                    RegisterError::Registry(error) => unavailable(error),
                    RegisterError::TooMany => limited_end("account", error.to_string()),
                    refused => End::new(CloseCode::UnknownDevice, refused.to_string()),
                })?
            }
        };
        if !device.enabled || !self.ingest.account_enabled(account) {
            return Err(End::new(CloseCode::DeviceDisabled, ""));
        }
        match own_password(&device).as_deref() {
            Some(expected) if password.is_none_or(|given| given != expected) => {
                let text = match password {
                    Some(_) => "the password is not the one in the device's settings",
                    None => "the device's settings have a password, and none came",
                };
                Err(End::new(CloseCode::UnknownDevice, text))
            }
            _ => match foreign_protocol(channel, &device) {
                Some(text) => Err(End::new(CloseCode::UnknownDevice, text)),
                None => Ok(device),
            },
        }
    }

    /// The end for a store that does not answer: fixed words for the tenant's logs, the details,
    /// such as paths, for the operator's.
    fn unavailable(&self, error: &dyn std::fmt::Display, text: &str) -> End {
        if let Some(suppressed) = self.failures.allow() {
            tracing::warn!(%error, suppressed, "a device is put off");
        }
        End::new(CloseCode::StorageUnavailable, text)
    }

    /// Notes a connection that ended without having become a device's. The channel's log has so
    /// many of them a second, and the count of the others.
    pub(crate) fn refused(
        &self,
        channel: &ChannelLive,
        connection: &Connection,
        ident: Option<&str>,
        end: &End,
    ) {
        let Some(suppressed) = channel.refusals.allow() else {
            self.metrics.lines_suppressed.increment(1);
            return;
        };
        let kind = if ident.is_some() { "refused" } else { "closed" };
        let peer = connection.peer();
        let mut line = Line::new(kind).connection(connection).peer(peer).close(end.code);
        if let Some(ident) = ident {
            line = line.ident(ident);
            let mut params = own_params([
                ("ident", ident.chars().take(64).collect::<String>().into()),
                ("peer", peer.to_string().into()),
                ("close.name", end.code.name().into()),
            ]);
            if !end.text.is_empty() {
                params = params
                    .into_iter()
                    .chain(own_params([("text", end.text.as_str().into())]))
                    .collect();
            }
            let rejected = EventKind::Rejected;
            let event = self.ingest.new_event(channel.account, rejected, channel.id, params);
            self.ingest.event_soon(event);
        }
        let line = line.text(&end.text).suppressed(suppressed);
        journal::log_channel(&self.ingest, &*self.platform().clock, channel, line);
    }

    /// Notes a frame that could not be used and whose device is not known.
    pub(crate) fn log_stray(&self, channel: &ChannelLive, connection: &Connection, frame: &Frame) {
        let Some(error) = &frame.error else { return };
        let Some(suppressed) = channel.refusals.allow() else {
            self.metrics.lines_suppressed.increment(1);
            return;
        };
        let line = Line::new("error")
            .connection(connection)
            .peer(connection.peer())
            .received(frame.bytes.get(..1_024).unwrap_or(&frame.bytes), frame.secret)
            .frame_error(error)
            .suppressed(suppressed);
        journal::log_channel(&self.ingest, &*self.platform().clock, channel, line);
    }

    /// Takes frames of one device: logs them and stores what they say, in one batch. Only when it
    /// returns `Ok` may the replies be sent.
    ///
    /// Not cancel-safe, as [`Ingest::submit`].
    pub(crate) async fn take(
        &self,
        connection: &Arc<Connection>,
        device: &Arc<Device>,
        lines: &mut FrameLines,
        received: Timestamp,
        frames: Vec<Frame>,
    ) -> Result<Taken, End> {
        let mut taken = Taken::default();
        let mut messages = Vec::with_capacity(frames.iter().map(|f| f.messages.len()).sum());
        self.metrics.frames.increment(frames.len() as u64);
        for (at, frame) in frames.into_iter().enumerate() {
            if frame.error.is_some() {
                self.metrics.frame_errors.increment(1);
            }
            if let Some(suppressed) = lines.allow(self) {
                let line = FrameLine {
                    bytes: frame.bytes,
                    secret: frame.secret,
                    messages: frame.messages.clone(),
                    error: frame.error,
                    suppressed,
                };
                journal::log_frame(&self.ingest, device, connection, received, line);
            }
            messages.extend(frame.messages);
            taken.replies.extend(frame.replies.into_iter().map(|reply| (at, reply.bytes)));
            taken.answers.extend(frame.command_answer);
        }
        if messages.is_empty() {
            return Ok(taken);
        }
        let count = messages.len();
        let submit = self.ingest.submit(device.account, device.id, received, messages);
        match submit.await {
            Ok(submitted) if submitted.rejected == 0 => {
                connection.note_messages(count);
                Ok(taken)
            }
            Ok(submitted) => {
                let text = format!("{} of {count} messages are too large", submitted.rejected);
                Err(End::new(CloseCode::LimitExceeded, text))
            }
            Err(error) => {
                let text = match error {
                    HistoryError::Full(_) => "no space is left to store its messages",
                    HistoryError::Busy => "the store is busy; it is to send them again",
                    _ => "its messages are not stored for sure; it is to send them again",
                };
                Err(self.unavailable(&error, text))
            }
        }
    }

    /// Logs what was sent to a device.
    pub(crate) fn log_sent(
        &self,
        connection: &Arc<Connection>,
        device: &Arc<Device>,
        lines: &mut FrameLines,
        line: impl FnOnce() -> Line,
    ) {
        if let Some(suppressed) = lines.allow(self) {
            let line = line().connection(connection).suppressed(suppressed);
            let line = line.of_device(device, self.now());
            self.ingest.log_with(line.params().content_bytes(), move || line);
        }
    }

    /// Tells what became of a command, by the device's answer.
    pub(crate) async fn answered(
        &self,
        connection: &Arc<Connection>,
        device: &Arc<Device>,
        command: CommandId,
        answer: CommandAnswer,
    ) {
        let line = Line::new("answer")
            .connection(connection)
            .command(&command.to_string())
            .text(&answer.text)
            .of_device(device, self.now());
        self.ingest.log(vec![line]).await;
        let outcome = if answer.accepted {
            Outcome::Answered(answer.text)
        } else {
            let because = if answer.text.is_empty() { "without a reason" } else { &answer.text };
            Outcome::Failed(format!("the device refused it: {because}"))
        };
        self.report(device, connection, command, outcome).await;
    }

    pub(crate) async fn report(
        &self,
        device: &Device,
        connection: &Connection,
        command: CommandId,
        outcome: Outcome,
    ) {
        let commands = &self.platform().commands;
        commands.report(device.account, connection.id, command, outcome).await;
    }
}

/// The end of a device that may not register itself yet.
fn limited_end(limit: &'static str, text: String) -> End {
    metrics::counter!("fieldline_gateway_registrations_refused_total", "limit" => limit)
        .increment(1);
    End::new(CloseCode::RegistrationLimited, text)
}

/// The password that a device has to give, if its settings have one.
fn own_password(device: &Device) -> Option<String> {
    match device.settings.get("password")? {
        serde_json::Value::Null => None,
        serde_json::Value::String(text) => (!text.is_empty()).then(|| text.clone()),
        other => Some(other.to_string()),
    }
}

/// Why the device does not belong on `channel`, if its protocol is another. A protocol without
/// passwords would else be a way round the one that has them.
pub(crate) fn foreign_protocol(channel: &ChannelLive, device: &Device) -> Option<String> {
    let (own, spoken) = (&device.protocol, &channel.settings().protocol);
    (!own.is_empty() && own != spoken).then(|| {
        format!("the device is set to the protocol {own}, and the channel speaks {spoken}")
    })
}

/// What is to be done once frames are stored.
#[derive(Default)]
pub(crate) struct Taken {
    /// Replies in order, each with the place of its frame.
    pub(crate) replies: Vec<(usize, Bytes)>,
    pub(crate) answers: Vec<CommandAnswer>,
}

/// The limit on one device's log lines of frames.
pub(crate) struct FrameLines(LineLimit);

impl FrameLines {
    pub(crate) fn new(now: Instant) -> Self {
        Self(LineLimit::new(FRAME_LINES_PER_S, FRAME_LINES_BURST, now))
    }

    fn allow(&mut self, shared: &Shared) -> Option<u64> {
        let allowed = self.0.allow(Instant::now());
        if allowed.is_none() {
            shared.metrics.lines_suppressed.increment(1);
        }
        allowed
    }
}

/// A command on the wire whose answer is awaited.
struct Pending {
    id: CommandId,
    expires_at: Timestamp,
    sent_at: Instant,
    deadline: Instant,
}

/// Whose answer comes next on one connection.
///
/// Answers carry no ids. So one that is owed for a command that was given up
/// must not be taken for the next command's: that one waits until the late
/// answer has come, or is no longer to be expected.
#[derive(Default)]
pub(crate) struct Awaited {
    pending: Option<Pending>,
    /// Until when an answer is owed for a command that was given up.
    owed_until: Option<Instant>,
}

impl Awaited {
    /// Whether the next command may be put on the wire.
    pub(crate) fn is_free(&self) -> bool {
        self.pending.is_none() && self.owed_until.is_none()
    }

    /// A command was sent that the device will answer.
    pub(crate) fn sent(&mut self, command: &Command, now: Timestamp, limit: Duration) {
        let left_us = command.expires_at.micros_since(now).max(0);
        let left = Duration::from_micros(left_us.unsigned_abs());
        let sent_at = Instant::now();
        let deadline = sent_at + left.min(limit);
        let (id, expires_at) = (command.id, command.expires_at);
        self.pending = Some(Pending { id, expires_at, sent_at, deadline });
    }

    /// An answer came: the command it belongs to, unless that was given up or nobody asked.
    pub(crate) fn answered(&mut self) -> Option<CommandId> {
        if self.owed_until.take().is_some() {
            return None;
        }
        self.pending.take().map(|pending| pending.id)
    }

    /// When [`Self::overdue`] is to be asked.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let pending = self.pending.as_ref().map(|pending| pending.deadline);
        pending.or(self.owed_until)
    }

    /// The command that is given up now, if one is, and what became of it. It is not sent again
    /// on a connection that lives: two answers would come to it.
    pub(crate) fn overdue(
        &mut self,
        wall: Timestamp,
        limit: Duration,
    ) -> Option<(CommandId, Outcome)> {
        let now = Instant::now();
        if self.owed_until.is_some_and(|until| until <= now) {
            self.owed_until = None;
        }
        let pending = self.pending.take_if(|pending| pending.deadline <= now)?;
        self.owed_until = Some(pending.sent_at + limit + limit / 2);
        let expired = pending.expires_at <= wall;
        let outcome = if expired {
            Outcome::Lost
        } else {
            Outcome::Failed(format!("no answer within {} s", limit.as_secs_f64()))
        };
        Some((pending.id, outcome))
    }

    /// Whether a command is on the wire and its answer to come.
    pub(crate) fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// Forgets everything, since the connection lets go of the device: the command that has no
    /// answer yet.
    pub(crate) fn clear(&mut self) -> Option<CommandId> {
        self.owed_until = None;
        self.pending.take().map(|pending| pending.id)
    }
}
