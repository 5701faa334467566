//! Devices over UDP: each datagram is a session of its own; a device heard of
//! within the idle timeout counts as connected.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use fieldline_contracts::{Dispatch, Outcome, SessionHandle};
use fieldline_model::{CloseCode, Device, Timestamp};
use fieldline_pvm::{CommandAnswer, Frame, Step};
use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tracing::warn;

use crate::channel::ChannelLive;
use crate::connection::Connection;
use crate::journal::Line;
use crate::limit::Bucket;
use crate::shared::{Awaited, End, FrameLines, Place, Shared, foreign_protocol};

/// Workers of one channel and event loop; what one address sends goes to one of them, in order.
const WORKERS: usize = 16;
/// Datagrams that wait for one worker. Full: further ones are dropped, and the device sends again.
const QUEUE_MAX: usize = 1_024;
/// Bytes that wait for all workers of one channel and event loop.
const QUEUE_BYTES_MAX: usize = 16 << 20;
/// Datagrams whose messages are stored together.
const BATCH_MAX: usize = 256;
/// Most bytes of a datagram.
const DATAGRAM_BYTES_MAX: usize = 65_535;
/// Seconds over which a device's bytes are averaged.
const RATE_WINDOW_S: f64 = 10.0;

/// A device heard of over UDP.
pub(crate) struct UdpDevice {
    connection: Arc<Connection>,
    heard: Mutex<Heard>,
    /// Answers to commands. Full: dropped, and the command counts as lost in time.
    answers: mpsc::Sender<CommandAnswer>,
    lines: tokio::sync::Mutex<FrameLines>,
}

struct Heard {
    at: Instant,
    rate: Bucket,
    /// The socket that the device was last heard on.
    socket: Arc<UdpSocket>,
}

struct Datagram {
    peer: SocketAddr,
    bytes: Bytes,
}

/// Reads datagrams and hands them to workers until the channel stops.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    channel: Arc<ChannelLive>,
    socket: std::net::UdpSocket,
) {
    let socket = match UdpSocket::from_std(socket) {
        Ok(socket) => Arc::new(socket),
        Err(error) => {
            warn!(%error, channel = %channel.id, "the event loop cannot take the socket");
            return;
        }
    };
    let waiting_bytes = Arc::new(AtomicUsize::new(0));
    let mut workers = Vec::with_capacity(WORKERS);
    for _ in 0..WORKERS {
        let (sender, datagrams) = mpsc::channel(QUEUE_MAX);
        let worker = Worker {
            shared: Arc::clone(&shared),
            channel: Arc::clone(&channel),
            socket: Arc::clone(&socket),
            waiting_bytes: Arc::clone(&waiting_bytes),
        };
        shared.tasks.spawn(worker.run(datagrams));
        workers.push(sender);
    }
    let hasher = RandomState::new();
    let mut buffer = vec![0_u8; DATAGRAM_BYTES_MAX];
    loop {
        let received = tokio::select! {
            biased;
            () = channel.stop.cancelled() => break,
            received = socket.recv_from(&mut buffer) => received,
        };
        // An error is of one datagram (a port unreachable, reported late), not of the socket.
        let Ok((count, peer)) = received else {
            shared.metrics.datagram_dropped("network");
            tokio::task::yield_now().await;
            continue;
        };
        shared.metrics.datagrams.increment(1);
        shared.metrics.received_bytes.increment(count as u64);
        let worker = usize::try_from(hasher.hash_one(peer) % WORKERS as u64).unwrap_or(0);
        let (Some(bytes), Some(worker)) = (buffer.get(..count), workers.get(worker)) else {
            continue;
        };
        let before = waiting_bytes.fetch_add(count, Ordering::AcqRel);
        let datagram = Datagram { peer, bytes: Bytes::copy_from_slice(bytes) };
        if before + count > QUEUE_BYTES_MAX || worker.try_send(datagram).is_err() {
            waiting_bytes.fetch_sub(count, Ordering::AcqRel);
            shared.metrics.datagram_dropped("queue_full");
        } else {
            shared.metrics.datagram_queue_bytes.increment(to_f64(count));
        }
    }
}

/// The length of a datagram, which fits 16 bits.
fn to_f64(bytes: usize) -> f64 {
    f64::from(u32::try_from(bytes).unwrap_or(u32::MAX))
}

struct Worker {
    shared: Arc<Shared>,
    channel: Arc<ChannelLive>,
    socket: Arc<UdpSocket>,
    waiting_bytes: Arc<AtomicUsize>,
}

/// A device that nobody knows yet, as it calls itself.
struct New {
    ident: String,
    password: Option<String>,
}

/// What one device said in a batch of datagrams.
struct Group {
    udp: Arc<UdpDevice>,
    device: Arc<Device>,
    frames: Vec<Frame>,
    /// Where each frame came from.
    peers: Vec<SocketAddr>,
}

impl Worker {
    async fn run(self, mut datagrams: mpsc::Receiver<Datagram>) {
        let mut batch = Vec::with_capacity(BATCH_MAX);
        while datagrams.recv_many(&mut batch, BATCH_MAX).await > 0 {
            let now = self.shared.now();
            let mut groups: Vec<Group> = Vec::new();
            for datagram in batch.drain(..) {
                let bytes = datagram.bytes.len();
                self.waiting_bytes.fetch_sub(bytes, Ordering::AcqRel);
                self.shared.metrics.datagram_queue_bytes.decrement(to_f64(bytes));
                self.read(datagram, now, &mut groups).await;
            }
            // Different devices meet in one group commit.
            join_all(groups.into_iter().map(|group| self.take(group, now))).await;
        }
    }

    /// Runs one datagram.
    async fn read(&self, datagram: Datagram, now: Timestamp, groups: &mut Vec<Group>) {
        let Datagram { peer, bytes } = datagram;
        let (shared, channel) = (&self.shared, &self.channel);
        let mut session = shared.session(channel, channel.program());
        session.feed(&bytes);
        session.end_of_input();
        let mut current: Option<(Arc<UdpDevice>, Arc<Device>)> = None;
        let mut refused = false;
        let mut new: Option<New> = None;
        loop {
            match session.step(now) {
                Step::NeedMore => return,
                Step::Login { ident, password } => {
                    // One that would register itself has to say something first: anybody can name an ident.
                    if let Ok(true) = shared.is_new(channel, &ident).await {
                        session.login_accepted(&BTreeMap::new());
                        (new, current) = (Some(New { ident, password }), None);
                        continue;
                    }
                    new = None;
                    match self.hear(&ident, password.as_deref(), peer, bytes.len(), now).await {
                        Ok(device) => {
                            session.login_accepted(&device.1.settings);
                            current = Some(device);
                        }
                        Err(end) => {
                            self.refuse(&ident, &end, peer, now);
                            // Silence where it may yet be let in, and for what is too much.
                            let known = matches!(
                                end.code,
                                CloseCode::UnknownDevice | CloseCode::DeviceDisabled
                            );
                            if !known {
                                return;
                            }
                            refused = true;
                            session.login_refused();
                        }
                    }
                }
                Step::Frame(frame) => {
                    let close = frame.close.is_some();
                    let speaks = frame.error.is_none() && !frame.messages.is_empty();
                    if speaks && let Some(New { ident, password }) = new.take() {
                        match self.hear(&ident, password.as_deref(), peer, bytes.len(), now).await {
                            Ok(device) => current = Some(device),
                            Err(end) => return self.refuse(&ident, &end, peer, now),
                        }
                    }
                    match &current {
                        Some((udp, device)) => add(groups, udp, device, frame, peer),
                        None => self.stray(frame, peer, refused, now).await,
                    }
                    if close || refused {
                        return;
                    }
                }
            }
        }
    }

    /// Notes that the device of a datagram was not let in.
    fn refuse(&self, ident: &str, end: &End, peer: SocketAddr, now: Timestamp) {
        let connection = self.stranger(peer, now);
        self.shared.metrics.closed(end.code);
        self.shared.refused(&self.channel, &connection, Some(ident), end);
    }

    /// A connection for the log of a peer that is no device's.
    fn stranger(&self, peer: SocketAddr, now: Timestamp) -> Connection {
        Connection::new(self.shared.fresh_id(now), self.channel.settings(), peer, now)
    }

    /// A frame of an unknown device: logged if it is wrong, answered only with a refusal.
    async fn stray(&self, frame: Frame, peer: SocketAddr, refused: bool, now: Timestamp) {
        self.shared.metrics.frames.increment(1);
        if !refused && frame.error.is_none() {
            self.shared.metrics.datagram_dropped("unregistered");
        }
        if frame.error.is_some() {
            self.shared.metrics.frame_errors.increment(1);
            let connection = self.stranger(peer, now);
            self.shared.log_stray(&self.channel, &connection, &frame);
        }
        // Others get no answer: who sends with a false address would make us send to its owner.
        if refused && frame.messages.is_empty() {
            for reply in frame.replies {
                self.send(&reply.bytes, peer).await;
            }
        }
    }

    async fn send(&self, bytes: &[u8], peer: SocketAddr) -> bool {
        send(&self.shared, &self.socket, bytes, peer).await
    }

    /// Finds the device of a datagram and notes that it was heard of.
    async fn hear(
        &self,
        ident: &str,
        password: Option<&str>,
        peer: SocketAddr,
        bytes: usize,
        at: Timestamp,
    ) -> Result<(Arc<UdpDevice>, Arc<Device>), End> {
        let (shared, channel) = (&self.shared, &self.channel);
        let device = shared.identify(channel, ident, password, peer).await?;
        if channel.stop.is_cancelled() {
            // What waited for a worker meanwhile is sent again, to whoever listens then.
            return Err(End::new(CloseCode::ChannelChanged, ""));
        }
        let now = Instant::now();
        let max = channel.settings().connection_bytes_per_s_max;
        let per_s = f64::from(max);
        let (udp, fresh) = {
            let mut devices = channel.udp_devices.lock();
            let known = devices.get(&device.id).filter(|u| u.connection.closing().is_none());
            match known {
                Some(known) => (Arc::clone(known), None),
                None => {
                    // Before it has an entry: one that nobody holds would never end.
                    let mut rate = Bucket::full(per_s * RATE_WINDOW_S, now);
                    let burst = per_s * RATE_WINDOW_S;
                    if max != 0 && !rate.take(to_f64(bytes), per_s, burst, now) {
                        return Err(self.too_fast(max));
                    }
                    let connection = Arc::new(self.stranger(peer, at));
                    let place = shared.admit(channel, &connection)?;
                    let (answers, answered) = mpsc::channel(16);
                    let heard = Heard { at: now, rate, socket: Arc::clone(&self.socket) };
                    let udp = Arc::new(UdpDevice {
                        connection,
                        heard: Mutex::new(heard),
                        answers,
                        lines: tokio::sync::Mutex::new(FrameLines::new(now)),
                    });
                    devices.insert(device.id, Arc::clone(&udp));
                    (udp, Some((place, answered)))
                }
            }
        };
        if fresh.is_some() && channel.stop.is_cancelled() {
            // Everyone else was told to end before this one was there to be told.
            udp.connection.close(CloseCode::ChannelChanged);
        }
        udp.connection.set_peer(peer);
        udp.connection.note_received(bytes, at);
        {
            let mut heard = udp.heard.lock();
            heard.at = now;
            heard.socket = Arc::clone(&self.socket);
            let within = max == 0
                || fresh.is_some()
                || heard.rate.take(to_f64(bytes), per_s, per_s * RATE_WINDOW_S, now);
            if !within {
                return Err(self.too_fast(max));
            }
        }
        if let Some((place, answered)) = fresh {
            let handle = shared.attach(channel, &udp.connection, &device).await;
            let holding = Holding {
                shared: Arc::clone(shared),
                channel: Arc::clone(channel),
                udp: Arc::clone(&udp),
                device: Arc::clone(&device),
                commands: handle,
                answered,
                awaited: Awaited::default(),
            };
            shared.tasks.spawn(holding.run(place));
        }
        Ok((udp, device))
    }

    fn too_fast(&self, max: u32) -> End {
        self.shared.metrics.datagram_dropped("rate_limited");
        End::new(CloseCode::RateLimited, format!("more than {max} bytes a second"))
    }

    /// Stores what one device said, then answers.
    async fn take(&self, group: Group, now: Timestamp) {
        let Group { udp, device, frames, peers } = group;
        let mut lines = udp.lines.lock().await;
        let taken = self.shared.take(&udp.connection, &device, &mut lines, now, frames).await;
        let taken = match taken {
            Ok(taken) => taken,
            Err(end) => {
                self.shared.metrics.datagram_dropped(end.code.name());
                let line = || Line::new("error").close(end.code).text(&end.text);
                self.shared.log_sent(&udp.connection, &device, &mut lines, line);
                return;
            }
        };
        for (at, bytes) in taken.replies {
            let Some(peer) = peers.get(at) else { continue };
            if self.send(&bytes, *peer).await {
                udp.connection.note_sent(bytes.len());
                let line = || Line::new("reply").bytes(&bytes);
                self.shared.log_sent(&udp.connection, &device, &mut lines, line);
            }
        }
        for answer in taken.answers {
            // Full only if a device answers far more than it was asked.
            udp.answers.try_send(answer).unwrap_or_default();
        }
    }
}

fn add(
    groups: &mut Vec<Group>,
    udp: &Arc<UdpDevice>,
    device: &Arc<Device>,
    frame: Frame,
    peer: SocketAddr,
) {
    let group = match groups.iter_mut().find(|group| Arc::ptr_eq(&group.udp, udp)) {
        Some(group) => group,
        None => {
            let (udp, device) = (Arc::clone(udp), Arc::clone(device));
            groups.push(Group { udp, device, frames: Vec::new(), peers: Vec::new() });
            let Some(group) = groups.last_mut() else { return };
            group
        }
    };
    group.frames.push(frame);
    group.peers.push(peer);
}

async fn send(shared: &Shared, socket: &UdpSocket, bytes: &[u8], peer: SocketAddr) -> bool {
    match socket.send_to(bytes, peer).await {
        Ok(count) => {
            shared.metrics.sent_bytes.increment(count as u64);
            true
        }
        // The device sends again what was not acknowledged.
        Err(_) => {
            shared.metrics.datagram_dropped("unsent");
            false
        }
    }
}

/// The task that stands for a device's connection: its idle timeout and its commands.
struct Holding {
    shared: Arc<Shared>,
    channel: Arc<ChannelLive>,
    udp: Arc<UdpDevice>,
    device: Arc<Device>,
    commands: Option<SessionHandle>,
    answered: mpsc::Receiver<CommandAnswer>,
    awaited: Awaited,
}

enum Waited {
    Asked,
    Command(Option<Box<Dispatch>>),
    Answer(CommandAnswer),
    Deadline,
}

impl Holding {
    async fn run(mut self, place: Place) {
        let end = self.serve().await;
        self.shared.metrics.closed(end.code);
        {
            let mut devices = self.channel.udp_devices.lock();
            if devices.get(&self.device.id).is_some_and(|held| Arc::ptr_eq(held, &self.udp)) {
                devices.remove(&self.device.id);
            }
        }
        let connection = &self.udp.connection;
        if let Some(id) = self.awaited.clear() {
            self.shared.report(&self.device, connection, id, Outcome::Lost).await;
        }
        self.commands = None;
        self.shared.detach(&self.channel, connection, &self.device, &end).await;
        drop(place);
    }

    async fn serve(&mut self) -> End {
        loop {
            match self.wait().await {
                Waited::Asked => {
                    if let Some(code) = self.udp.connection.closing() {
                        return End::new(code, "");
                    }
                    if self.udp.connection.take_refresh()
                        && let Some(end) = self.refresh().await
                    {
                        return end;
                    }
                }
                Waited::Command(Some(dispatch)) => self.command(*dispatch).await,
                Waited::Command(None) => self.commands = None,
                Waited::Answer(answer) => {
                    // An answer that nobody waits for is in the log of frames.
                    if let Some(id) = self.awaited.answered() {
                        let connection = &self.udp.connection;
                        self.shared.answered(connection, &self.device, id, answer).await;
                    }
                }
                Waited::Deadline => {
                    let now = Instant::now();
                    let limit = self.shared.config.answer_timeout;
                    if let Some((id, outcome)) = self.awaited.overdue(self.shared.now(), limit) {
                        let connection = &self.udp.connection;
                        self.shared.report(&self.device, connection, id, outcome).await;
                    }
                    if self.idle_at() <= now {
                        // So that the next datagram makes a connection of its own.
                        self.udp.connection.close(CloseCode::IdleTimeout);
                        return End::new(CloseCode::IdleTimeout, "");
                    }
                }
            }
        }
    }

    fn idle_at(&self) -> Instant {
        let idle_s = u64::from(self.channel.settings().idle_timeout_s.max(1));
        self.udp.heard.lock().at + Duration::from_secs(idle_s)
    }

    async fn wait(&mut self) -> Waited {
        let mut deadline = self.idle_at();
        if let Some(awaited) = self.awaited.deadline() {
            deadline = deadline.min(awaited);
        }
        let Self { udp, commands, awaited, answered, .. } = self;
        let command = async {
            match commands {
                Some(commands) if awaited.is_free() => {
                    commands.dispatches.recv().await.map(Box::new)
                }
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = udp.connection.asked() => Waited::Asked,
            Some(answer) = answered.recv() => Waited::Answer(answer),
            dispatch = command => Waited::Command(dispatch),
            () = sleep_until(deadline) => Waited::Deadline,
        }
    }

    /// Sends a command to where the device was last heard of.
    async fn command(&mut self, dispatch: Dispatch) {
        let (shared, connection) = (&self.shared, &self.udp.connection);
        let command = dispatch.command;
        let mut session = shared.session(&self.channel, self.channel.program());
        session.identify(&self.device.ident, &self.device.settings);
        let encoded = match session.encode_command(&command.name, &command.params) {
            Ok(encoded) => encoded,
            Err(error) => {
                let failed = Outcome::Failed(error.to_string());
                return shared.report(&self.device, connection, command.id, failed).await;
            }
        };
        let socket = Arc::clone(&self.udp.heard.lock().socket);
        if !send(shared, &socket, &encoded.bytes, connection.peer()).await {
            let failed = Outcome::Failed("the datagram could not be sent".to_owned());
            return shared.report(&self.device, connection, command.id, failed).await;
        }
        connection.note_sent(encoded.bytes.len());
        let id = command.id.to_string();
        let line = || Line::new("command").command(&id).bytes(&encoded.bytes);
        let mut lines = self.udp.lines.lock().await;
        shared.log_sent(connection, &self.device, &mut lines, line);
        drop(lines);
        shared.report(&self.device, connection, command.id, Outcome::Sent).await;
        if !encoded.expects_answer {
            let answered = Outcome::Answered(String::new());
            return shared.report(&self.device, connection, command.id, answered).await;
        }
        self.awaited.sent(&command, shared.now(), shared.config.answer_timeout);
    }

    async fn refresh(&mut self) -> Option<End> {
        let known = &self.device;
        match self.shared.ingest.device(known.account, known.id).await {
            Ok(Some(device)) if device.ident != known.ident => {
                Some(End::new(CloseCode::UnknownDevice, "the device has another ident now"))
            }
            Ok(Some(device)) if !device.enabled => Some(End::new(CloseCode::DeviceDisabled, "")),
            Ok(Some(device)) => {
                if let Some(text) = foreign_protocol(&self.channel, &device) {
                    return Some(End::new(CloseCode::UnknownDevice, text));
                }
                self.udp.connection.set_device(Some(Arc::clone(&device)));
                self.device = device;
                None
            }
            Ok(None) => Some(End::new(CloseCode::UnknownDevice, "the device was deleted")),
            // What is known goes on being right until told otherwise.
            Err(_) => None,
        }
    }
}
