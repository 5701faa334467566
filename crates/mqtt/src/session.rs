//! One signed-in connection: reads packets, answers them, and sends what is queued.
//!
//! A session is one task. It waits at one place ([`Session::wait`]) for bytes,
//! for room to write, for its queue and for its deadlines, and holds no buffers
//! while it is idle. Packets are handled in the order they came; a PUBACK is
//! written only after what it acknowledges is durable.

mod subscribe;

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use fieldline_contracts::WillKey;
use fieldline_model::Device;
use futures_util::future::join_all;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep};
use tracing::debug;

use crate::codec::{
    self, CodecError, Connect, Packet, Publish, PublishProps, Qos, Reason, Version, Will,
    take_frame,
};
use crate::encode::{Outgoing, publish_bytes};
use crate::hub::Hub;
use crate::link::{Delivery, Link};
use crate::metrics;
use crate::publish::{Batch, Client, Incoming, Refusal, Taken};
use crate::replay::Replay;
use crate::routes::Options;
use crate::stream::Stream;
use crate::wills::Wills;

/// Highest topic alias that clients may use.
pub(crate) const TOPIC_ALIAS_MAX: u16 = 16;
/// Bytes to write above which nothing more is read or taken from the queue.
const OUTPUT_BYTES_HIGH: usize = 64 * 1024;
/// Queued messages above which retained ones wait.
const REPLAY_QUEUE_LOW: usize = 256;
/// Bytes of payloads that are stored together.
const BATCH_BYTES_MAX: usize = 1 << 20;
/// What retaining a message counts for, as bytes published: it is written to the disk.
const RETAIN_COST_BYTES: usize = 9 * 4_096;
/// How long the last packet may take to be sent.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(2);
/// A deadline that is looked at again when it comes.
const NO_DEADLINE: Duration = Duration::from_secs(3_600);

/// Why a session ended.
pub(crate) enum End {
    /// The client said goodbye.
    Goodbye {
        /// It wants its will published all the same.
        with_will: bool,
    },
    /// The client closed the connection, or the network failed.
    Lost(&'static str),
    /// The client broke the protocol or reached a limit, or 3.1.1 has no other way to refuse.
    Error(Reason, Cow<'static, str>),
    /// Another part of the server ends it.
    Kicked(Reason),
}

impl From<CodecError> for End {
    fn from(error: CodecError) -> Self {
        Self::Error(error.reason, error.what.into())
    }
}

enum Wake {
    Read(std::io::Result<usize>),
    Wrote(std::io::Result<usize>),
    Queue,
    Deadline,
}

/// A subscription, as its session keeps it.
struct Subscribed {
    filter: Box<str>,
    options: Options,
}

/// Being in the hub; dropping it leaves.
struct Membership {
    hub: Arc<Hub>,
    session: u64,
    subscribed: Vec<Subscribed>,
    /// Where its will is kept.
    kept: Option<(Arc<Wills>, WillKey)>,
}

impl Drop for Membership {
    fn drop(&mut self) {
        if let Some((wills, key)) = self.kept.take() {
            wills.end(key);
        }
        self.hub.leave(self.session, self.subscribed.iter().map(|s| &*s.filter));
        metrics::sessions(-1.0);
    }
}

/// A message of the pipeline that is not stored yet.
struct Pending {
    batch: Batch,
    packet_id: Option<u16>,
}

/// A signed-in connection.
pub(crate) struct Session {
    client: Client,
    link: Arc<Link>,
    membership: Membership,
    _permit: OwnedSemaphorePermit,
    version: Version,
    keep_alive: Duration,
    problem_information: bool,
    /// Most QoS 1 messages on their way at once.
    window: usize,
    /// Longest packet that the client takes, in bytes.
    packet_bytes_max: usize,
    will: Option<Box<Will>>,
    aliases: BTreeMap<u16, Box<str>>,
    input: BytesMut,
    output: BytesMut,
    /// QoS 1 messages on their way, oldest first.
    inflight: VecDeque<u16>,
    next_packet_id: u16,
    replays: VecDeque<Box<Replay>>,
    last_packet: Instant,
    /// Since when a packet is begun and not whole.
    partial_since: Option<Instant>,
    /// When the client last took something, or had nothing to take.
    progress: Instant,
    paused_until: Option<Instant>,
    /// When retained last values are tried again that could not be read.
    replay_after: Option<Instant>,
    /// Whether whole packets may wait in `input`.
    unread: bool,
    unflushed: bool,
    read_next: bool,
    told_refused: Option<Instant>,
}

impl Session {
    /// A session that has joined its hub. `output` holds CONNACK, `input` what
    /// came after CONNECT.
    pub(crate) fn new(
        client: Client,
        link: Arc<Link>,
        permit: OwnedSemaphorePermit,
        connect: Connect,
        keep_alive_s: u16,
        input: BytesMut,
        output: BytesMut,
    ) -> Self {
        metrics::sessions(1.0);
        let now = Instant::now();
        let membership = Membership {
            hub: Arc::clone(&client.hub),
            session: client.session,
            subscribed: Vec::new(),
            kept: None,
        };
        let config = &client.shared.config;
        Self {
            window: usize::from(connect.receive_maximum.min(config.inflight_max)),
            client,
            link,
            membership,
            _permit: permit,
            version: connect.version,
            // One and a half times, as the standard asks.
            keep_alive: Duration::from_millis(u64::from(keep_alive_s) * 1_500),
            problem_information: connect.wants_reasons(),
            packet_bytes_max: usize::try_from(connect.packet_bytes_max).unwrap_or(usize::MAX),
            will: connect.will.map(Box::new),
            aliases: BTreeMap::new(),
            unread: !input.is_empty(),
            input,
            output,
            inflight: VecDeque::new(),
            next_packet_id: 1,
            replays: VecDeque::new(),
            last_packet: now,
            partial_since: None,
            progress: now,
            paused_until: None,
            replay_after: None,
            unflushed: false,
            read_next: false,
            told_refused: None,
        }
    }

    /// Notes that the session began, with its number among those of all nodes; the will is kept until it ends.
    pub(crate) fn begin(&mut self, client_id: &Arc<str>, number: u64, will: Option<&Arc<str>>) {
        let (account, client_id) = (self.client.identity.account, Arc::clone(client_id));
        let key = WillKey { account, client_id, number };
        let wills = &self.client.shared.wills;
        wills.begin(key.clone(), will);
        self.membership.kept = will.map(|_| (Arc::clone(wills), key));
    }

    /// The protocol's revision.
    pub(crate) fn version(&self) -> Version {
        self.version
    }

    /// Runs until the connection ends, then publishes the will if it is to be.
    pub(crate) async fn run(mut self, mut stream: Stream) {
        let end = self.serve(&mut stream).await;
        Box::pin(self.finish(stream, end)).await;
    }

    async fn serve(&mut self, stream: &mut Stream) -> End {
        let sleep = tokio::time::sleep(NO_DEADLINE);
        let mut sleep = std::pin::pin!(sleep);
        loop {
            if let Some(reason) = self.link.kicked() {
                return End::Kicked(reason);
            }
            if self.link.take_stale() {
                self.replay_lost();
            }
            if self.may_replay() {
                Box::pin(self.replay()).await;
            }
            self.fill();
            if self.unread && self.may_read() {
                if let Err(end) = Box::pin(self.process()).await {
                    return end;
                }
                continue;
            }
            let deadline = self.deadline();
            if deadline < sleep.deadline() || sleep.is_elapsed() {
                sleep.as_mut().reset(deadline);
            }
            match self.wait(stream, sleep.as_mut()).await {
                Wake::Read(Ok(0)) => return End::Lost("closed_by_client"),
                Wake::Read(Ok(_)) => self.unread = true,
                Wake::Wrote(Ok(0)) => return End::Lost("network"),
                Wake::Wrote(Ok(bytes)) => {
                    self.output.advance(bytes);
                    self.progress = Instant::now();
                    if self.output.is_empty() {
                        // An idle session holds no buffers.
                        self.output = BytesMut::new();
                    }
                }
                Wake::Read(Err(error)) | Wake::Wrote(Err(error)) => {
                    debug!(%error, "MQTT connection failed");
                    return End::Lost("network");
                }
                Wake::Queue => {}
                Wake::Deadline => {
                    if let Some(end) = self.overdue() {
                        return end;
                    }
                }
            }
        }
    }

    /// Whether the client is read now: not while it does not take what it is
    /// sent, nor while its account publishes too fast.
    fn may_read(&self) -> bool {
        self.output.len() < OUTPUT_BYTES_HIGH && self.paused_until.is_none()
    }

    fn may_replay(&self) -> bool {
        let wanted =
            !self.replays.is_empty() && self.paused_until.is_none() && self.replay_after.is_none();
        wanted && self.link.len() < REPLAY_QUEUE_LOW
    }

    /// Counts work against the account's rate, and pauses if there is too much.
    fn pace(&mut self, bytes: usize) {
        if let Some(wait) = self.client.hub.pace(bytes) {
            metrics::throttled();
            self.paused_until = Some(Instant::now() + wait);
        }
    }

    fn may_send(&self, qos: u8) -> bool {
        qos == 0 || self.inflight.len() < self.window
    }

    async fn wait(&mut self, stream: &mut Stream, mut sleep: Pin<&mut Sleep>) -> Wake {
        std::future::poll_fn(move |cx| {
            self.link.register(cx);
            let may_read = self.may_read();
            let sendable = self.output.len() < OUTPUT_BYTES_HIGH
                && self.link.front_qos().is_some_and(|qos| self.may_send(qos));
            if self.link.is_signalled() || sendable || self.may_replay() {
                return Poll::Ready(Wake::Queue);
            }
            // In turns, so that neither a flood in nor one out starves the other.
            self.read_next = !self.read_next;
            for read in [self.read_next, !self.read_next] {
                if read && may_read {
                    if let Poll::Ready(read) = stream.poll_read_into(cx, &mut self.input) {
                        return Poll::Ready(Wake::Read(read));
                    }
                } else if !read && !self.output.is_empty() {
                    if let Poll::Ready(wrote) = stream.poll_write(cx, &self.output) {
                        self.unflushed = true;
                        return Poll::Ready(Wake::Wrote(wrote));
                    }
                } else if !read && self.unflushed {
                    match stream.poll_flush(cx) {
                        Poll::Ready(Ok(())) => self.unflushed = false,
                        Poll::Ready(Err(error)) => return Poll::Ready(Wake::Wrote(Err(error))),
                        Poll::Pending => {}
                    }
                }
            }
            sleep.as_mut().poll(cx).map(|()| Wake::Deadline)
        })
        .await
    }

    /// The next instant at which something is overdue.
    fn deadline(&self) -> Instant {
        let config = &self.client.shared.config;
        let keep_alive = (!self.keep_alive.is_zero() && self.may_read())
            .then(|| self.last_packet + self.keep_alive);
        let packet = self
            .partial_since
            .filter(|_| self.may_read())
            .map(|since| since + config.packet_timeout);
        let write = (!self.output.is_empty()).then(|| self.progress + config.write_timeout);
        [keep_alive, packet, write, self.paused_until, self.replay_after]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or_else(|| Instant::now() + NO_DEADLINE)
    }

    fn overdue(&mut self) -> Option<End> {
        let now = Instant::now();
        let config = &self.client.shared.config;
        if self.replay_after.is_some_and(|after| after <= now) {
            self.replay_after = None;
        }
        if self.paused_until.is_some_and(|until| until <= now) {
            self.paused_until = None;
            // The pause was ours: it does not count against the client.
            self.last_packet = now;
            if self.partial_since.is_some() {
                self.partial_since = Some(now);
            }
            return None;
        }
        if !self.output.is_empty() && self.progress + config.write_timeout <= now {
            return Some(End::Lost("write_timeout"));
        }
        if !self.may_read() {
            return None;
        }
        if self.partial_since.is_some_and(|since| since + config.packet_timeout <= now) {
            let text = "a packet was begun and not finished in time";
            return Some(End::Error(Reason::ProtocolError, text.into()));
        }
        if !self.keep_alive.is_zero() && self.last_packet + self.keep_alive <= now {
            let text = "no packet came within one and a half keep alives";
            return Some(End::Error(Reason::KeepAliveTimeout, text.into()));
        }
        None
    }

    /// Moves messages from the queue to the output, as far as the client takes them.
    fn fill(&mut self) {
        let was_empty = self.output.is_empty();
        let mut now = None;
        while self.output.len() < OUTPUT_BYTES_HIGH {
            let room = self.inflight.len() < self.window;
            let Some(delivery) = self.link.pop_if(|d| d.qos == 0 || room) else { break };
            let expiry_s = match delivery.message.expires_at {
                None => None,
                Some(at) => {
                    let now = *now.get_or_insert_with(Instant::now);
                    if at <= now {
                        metrics::dropped("expired");
                        continue;
                    }
                    // Rounded up: what is worth a moment yet must not become worth for ever.
                    let left = at.duration_since(now).as_millis().div_ceil(1_000);
                    Some(u32::try_from(left).unwrap_or(u32::MAX))
                }
            };
            self.send(&delivery, expiry_s);
        }
        if was_empty && !self.output.is_empty() {
            self.progress = Instant::now();
        }
    }

    fn send(&mut self, delivery: &Delivery, expiry_s: Option<u32>) {
        let message = &delivery.message;
        let mut outgoing = Outgoing {
            topic: &message.topic,
            payload: &message.payload,
            packet_id: (delivery.qos > 0).then_some(1),
            retain: delivery.retain,
            props: &message.props,
            expiry_s,
            identifiers: delivery.identifiers.as_slice(),
        };
        let bytes = publish_bytes(self.version, &outgoing);
        if bytes > self.packet_bytes_max.min(codec::REMAINING_BYTES_MAX) {
            metrics::dropped("too_large_for_client");
            return;
        }
        if delivery.qos > 0 {
            let mut id = self.next_packet_id;
            // The window is smaller than the numbers there are.
            while self.inflight.contains(&id) {
                id = id.checked_add(1).unwrap_or(1);
            }
            self.next_packet_id = id.checked_add(1).unwrap_or(1);
            self.inflight.push_back(id);
            outgoing.packet_id = Some(id);
        }
        codec::publish(&mut self.output, self.version, &outgoing);
    }

    /// Handles the whole packets that came in.
    async fn process(&mut self) -> Result<(), End> {
        self.unread = false;
        let was_empty = self.output.is_empty();
        let mut pending = Vec::new();
        let outcome = self.packets(&mut pending).await;
        // What came before a violation was sent in good faith: it is stored and acknowledged.
        let stored = self.store(&mut pending).await;
        if self.input.is_empty() {
            self.input = BytesMut::new();
        }
        if was_empty && !self.output.is_empty() {
            self.progress = Instant::now();
        }
        outcome.and(stored)
    }

    async fn packets(&mut self, pending: &mut Vec<Pending>) -> Result<(), End> {
        let limit = self.client.shared.config.packet_bytes_max;
        loop {
            if !self.may_read() {
                self.unread = !self.input.is_empty();
                return Ok(());
            }
            let Some(frame) = take_frame(&mut self.input, limit)? else { break };
            self.last_packet = Instant::now();
            self.partial_since = None;
            let packet = Packet::decode(frame, self.version)?;
            self.packet(packet, pending).await?;
        }
        if self.input.is_empty() {
            self.partial_since = None;
        } else if self.partial_since.is_none() {
            self.partial_since = Some(Instant::now());
        }
        Ok(())
    }

    async fn packet(&mut self, packet: Packet, pending: &mut Vec<Pending>) -> Result<(), End> {
        match packet {
            Packet::Publish(publish) => self.publish(publish, pending).await?,
            Packet::Puback { packet_id } => {
                // Mostly the oldest. An unknown number is passed over, as the standard says.
                if let Some(at) = self.inflight.iter().position(|id| *id == packet_id) {
                    self.inflight.remove(at);
                }
                if self.inflight.is_empty() {
                    self.inflight = VecDeque::new();
                }
            }
            Packet::Subscribe(subscribe) => self.subscribe(subscribe),
            Packet::Unsubscribe { packet_id, filters } => {
                let results: Vec<Reason> =
                    filters.iter().map(|filter| self.unsubscribe(filter.as_str())).collect();
                codec::unsuback(&mut self.output, self.version, packet_id, &results);
            }
            Packet::Pingreq => codec::pingresp(&mut self.output),
            Packet::Disconnect { with_will } => return Err(End::Goodbye { with_will }),
        }
        Ok(())
    }

    async fn publish(&mut self, publish: Publish, pending: &mut Vec<Pending>) -> Result<(), End> {
        if publish.qos == Qos::ExactlyOnce {
            return Err(End::Error(Reason::QosNotSupported, "QoS 2 is not offered".into()));
        }
        self.pace(publish.payload.len() + if publish.retain { RETAIN_COST_BYTES } else { 0 });
        let Publish { dup, qos, retain, topic, packet_id, props, payload } = publish;
        let alias = self.resolve(topic.as_str(), &props)?;
        let topic = alias.as_deref().unwrap_or(topic.as_str());
        let is_batch = topic.starts_with("ingest/");
        if !is_batch {
            // Acknowledgements leave in the order that messages came.
            self.store(pending).await?;
        }
        let incoming = Incoming { topic, payload, qos, retain, props, packet_id, dup };
        match self.client.take(incoming).await {
            Ok(Taken::Batch(batch)) => {
                pending.push(Pending { batch, packet_id });
                let bytes: usize = pending.iter().map(|p| p.batch.bytes()).sum();
                let most = usize::from(self.client.shared.config.receive_maximum);
                if pending.len() >= most || bytes >= BATCH_BYTES_MAX {
                    self.store(pending).await?;
                }
                Ok(())
            }
            Ok(Taken::Done(reason)) => {
                if let Some(packet_id) = packet_id {
                    codec::puback(&mut self.output, self.version, packet_id, reason, None);
                }
                Ok(())
            }
            Err(refusal) => {
                self.store(pending).await?;
                self.client.tell_refused(&mut self.told_refused, topic, &refusal);
                self.refuse(packet_id, &refusal)
            }
        }
    }

    /// Refuses a message: by PUBACK in MQTT 5. 3.1.1 has no such thing, so there
    /// the connection ends without an acknowledgement. At QoS 0 nobody waits.
    fn refuse(&mut self, packet_id: Option<u16>, refusal: &Refusal) -> Result<(), End> {
        let Some(packet_id) = packet_id else { return Ok(()) };
        if self.version == Version::V3 {
            return Err(End::Error(refusal.reason, refusal.text.clone()));
        }
        let text = self.problem_information.then_some(refusal.text.as_ref());
        codec::puback(&mut self.output, self.version, packet_id, refusal.reason, text);
        Ok(())
    }

    /// The topic that an alias stands for, if the packet has one.
    fn resolve(&mut self, topic: &str, props: &PublishProps) -> Result<Option<Box<str>>, End> {
        let Some(alias) = props.topic_alias else { return Ok(None) };
        if alias > TOPIC_ALIAS_MAX {
            return Err(End::Error(
                Reason::TopicAliasInvalid,
                "the topic alias is above 16".into(),
            ));
        }
        if topic.is_empty() {
            let known = self.aliases.get(&alias);
            return match known {
                Some(topic) => Ok(Some(topic.clone())),
                None => {
                    let text = "the topic alias was not introduced";
                    Err(End::Error(Reason::ProtocolError, text.into()))
                }
            };
        }
        // Longer ones cannot be published to anyway, and need not be remembered.
        if topic.len() <= crate::topic::TOPIC_BYTES_MAX {
            self.aliases.insert(alias, topic.into());
        }
        Ok(None)
    }

    /// Stores what is pending, then acknowledges it, in the order it came.
    /// Devices are stored beside each other, the messages of each in their order.
    async fn store(&mut self, pending: &mut Vec<Pending>) -> Result<(), End> {
        if pending.is_empty() {
            return Ok(());
        }
        let mut groups: Vec<(Arc<Device>, Vec<Batch>)> = Vec::new();
        let mut acks = Vec::with_capacity(pending.len());
        for Pending { batch, packet_id } in pending.drain(..) {
            let place = groups.iter().position(|(device, _)| device.id == batch.device.id);
            let place = place.unwrap_or(groups.len());
            acks.push((place, packet_id));
            match groups.get_mut(place) {
                Some((_, batches)) => batches.push(batch),
                None => groups.push((Arc::clone(&batch.device), vec![batch])),
            }
        }
        let client = &self.client;
        let stores = groups
            .into_iter()
            .map(|(device, batches)| async move { client.store(&device, batches).await });
        let outcomes = join_all(stores).await;
        for (place, packet_id) in acks {
            match outcomes.get(place) {
                Some(Err(refusal)) => self.refuse(packet_id, refusal)?,
                _ => {
                    if let Some(packet_id) = packet_id {
                        let done = Reason::Success;
                        codec::puback(&mut self.output, self.version, packet_id, done, None);
                    }
                }
            }
        }
        Ok(())
    }

    /// Says why, closes, and publishes the will if it is to be.
    async fn finish(mut self, mut stream: Stream, end: End) {
        let (label, reason, text) = match &end {
            End::Goodbye { .. } => ("goodbye", None, None),
            End::Lost(label) => (*label, None, None),
            End::Error(reason, text) => (reason.code(), Some(*reason), Some(text.as_ref())),
            End::Kicked(reason) => (reason.code(), Some(*reason), None),
        };
        metrics::closed(label);
        debug!(
            peer = %self.client.peer, connection = %self.client.connection, reason = label,
            text = text.unwrap_or_default(), "MQTT client disconnected"
        );
        let mut limit = GOODBYE_TIMEOUT;
        if let End::Kicked(Reason::ServerShuttingDown) = end {
            limit = self.client.shared.config.drain_timeout;
            self.fill();
        }
        if let Some(reason) = reason {
            let text = text.filter(|_| self.problem_information);
            codec::disconnect(&mut self.output, self.version, reason, text);
        }
        if !matches!(end, End::Lost(_)) {
            stream.finish(&mut self.output, limit).await;
        }
        drop(stream);
        let wanted = match &end {
            End::Goodbye { with_will } => *with_will,
            // Without its rights it may not publish; and a restart is no failure of the client's.
            End::Kicked(
                Reason::NotAuthorized | Reason::AdministrativeAction | Reason::ServerShuttingDown,
            ) => false,
            _ => true,
        };
        if let Some(will) = self.will.take().filter(|_| wanted)
            && let Err((topic, refusal)) = self.client.publish_will(*will).await
        {
            self.client.tell_refused(&mut self.told_refused, &topic, &refusal);
        }
    }
}
