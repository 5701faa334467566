//! One account's clients: who is connected, and what they subscribed to.
//!
//! A hub knows one account only. It follows that account's bus while anybody is
//! connected and hands every message, encoded once, to the queues of those who
//! want it. Nothing in here waits for a client.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use fieldline_auth::Identity;
use fieldline_contracts::{
    Bus, BusItem, ClientSessions, Clock, LastValue, Platform, RetainLimits, State, StateError,
    TopicFilter, WillKey,
};
use fieldline_model::{AccountId, DeviceId, Event, Scope, SeriesKind, Stored};
use parking_lot::Mutex;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;
use uuid::Uuid;

use crate::Services;
use crate::codec::Reason;
use crate::config::MqttConfig;
use crate::link::{Delivery, Identifiers, Link, Message, Pushed, QueueLimits};
use crate::metrics;
use crate::nodes::Nodes;
use crate::retained::Retained;
use crate::routes::{Entry, Options, Routes};
use crate::topic::push_level;

/// How long the bus is followed after the last client has left.
const LINGER: Duration = Duration::from_secs(10);
/// Deliveries after which the connections get their turn, so that a burst goes
/// out while it comes in instead of filling their queues first.
const TURN_DELIVERIES: usize = 64;
/// Bytes of a payload that count as one publish.
const PACE_BYTES: usize = 4_096;
/// How long, and how many, queued commands are known again when a client sends them again.
const COMMAND_MEMORY: Duration = Duration::from_secs(60);
const COMMANDS_MAX: usize = 1_024;
/// Seconds that the publish rate is averaged over.
const RATE_S: f64 = 10.0;

/// A connected client.
pub(crate) struct Member {
    /// Its queue.
    pub(crate) link: Arc<Link>,
    /// Its name.
    pub(crate) client_id: Arc<str>,
    /// Who it is, and what it may see.
    pub(crate) identity: Arc<Identity>,
    /// Its will, as it is kept.
    pub(crate) will: Option<Arc<str>>,
}

impl Member {
    /// Whether its connection has not been told to end.
    fn stays(&self) -> bool {
        self.link.kicked().is_none()
    }
}

/// Whether `identity` may see what is about `object`: one restricted to some
/// devices sees nothing that is not about one of them.
pub(crate) fn may_see(identity: &Identity, object: Option<Uuid>) -> bool {
    identity.sees_all() || object.is_some_and(|object| identity.may_see(DeviceId(object)))
}

#[derive(Default)]
struct Inner {
    members: HashMap<u64, Member>,
    clients: HashMap<Arc<str>, Seat>,
    routes: Routes,
    /// Whether a task follows the bus.
    followed: bool,
}

/// Who has a client id.
struct Seat {
    session: u64,
    /// Its number among the sessions of all nodes; 0 until it has one.
    number: u64,
    /// The highest number that other nodes told while it had none.
    heard: u64,
}

struct Bucket {
    tokens: f64,
    at: Instant,
}

/// One client that gets a message, and how.
struct Hit {
    link: Arc<Link>,
    qos: u8,
    retain_as_published: bool,
    identifiers: Identifiers,
}

/// One account's clients.
pub(crate) struct Hub {
    account: AccountId,
    config: Arc<MqttConfig>,
    bus: Arc<dyn Bus>,
    state: Arc<dyn State>,
    clock: Arc<dyn Clock>,
    /// What clients retain.
    pub(crate) retained: Retained,
    /// The other nodes, if there may be some.
    nodes: Option<Arc<Nodes>>,
    /// Whether last values could not be read when last asked for: an outage is logged once.
    state_fails: AtomicBool,
    inner: Mutex<Inner>,
    /// Held while the bus is being subscribed to.
    starting: tokio::sync::Mutex<()>,
    bucket: Mutex<Bucket>,
    /// Commands whose answers are awaited.
    answers: AtomicUsize,
    /// Fingerprints of the commands queued lately, oldest first.
    commands: Mutex<VecDeque<(Instant, u64)>>,
    hasher: RandomState,
}

impl Hub {
    pub(crate) fn new(
        account: AccountId,
        config: Arc<MqttConfig>,
        services: &Services,
        nodes: Option<Arc<Nodes>>,
    ) -> Self {
        let Platform { bus, state, clock, .. } = &services.platform;
        let (bus, state, clock) = (Arc::clone(bus), Arc::clone(state), Arc::clone(clock));
        let limits = RetainLimits {
            messages: config.retained_messages_max,
            bytes: config.retained_bytes_max,
        };
        let store = Arc::clone(&services.store);
        let tokens = f64::from(config.account_publishes_per_s_max) * RATE_S;
        Self {
            account,
            config,
            bus,
            state,
            retained: Retained::new(account, store, Arc::clone(&clock), limits),
            clock,
            nodes,
            state_fails: AtomicBool::new(false),
            inner: Mutex::default(),
            starting: tokio::sync::Mutex::default(),
            bucket: Mutex::new(Bucket { tokens, at: Instant::now() }),
            answers: AtomicUsize::new(0),
            commands: Mutex::default(),
            hasher: RandomState::new(),
        }
    }

    fn limits(&self) -> QueueLimits {
        QueueLimits {
            messages_max: self.config.queue_messages_max,
            bytes_max: self.config.queue_bytes_max,
        }
    }

    /// Takes a client in; one of the same name is told that it was taken over.
    ///
    /// # Errors
    ///
    /// If the account has as many clients as it may.
    pub(crate) fn join(&self, session: u64, member: Member) -> Result<(), Reason> {
        let mut inner = self.inner.lock();
        let earlier = inner.clients.get(&member.client_id).map(|seat| seat.session);
        if earlier.is_none() && inner.members.len() >= self.config.account_connections_max {
            return Err(Reason::QuotaExceeded);
        }
        if let Some(earlier) = earlier.and_then(|earlier| inner.members.get(&earlier)) {
            earlier.link.kick(Reason::SessionTakenOver);
        }
        let seat = Seat { session, number: 0, heard: 0 };
        inner.clients.insert(Arc::clone(&member.client_id), seat);
        inner.members.insert(session, member);
        Ok(())
    }

    /// Lets a client go, with its subscriptions.
    pub(crate) fn leave<'a>(&self, session: u64, filters: impl Iterator<Item = &'a str>) {
        let mut inner = self.inner.lock();
        for filter in filters {
            inner.routes.remove(filter, session);
        }
        let Some(member) = inner.members.remove(&session) else { return };
        // If it was taken over, the name is another session's by now.
        if inner.clients.get(&member.client_id).is_some_and(|seat| seat.session == session) {
            inner.clients.remove(&member.client_id);
        }
    }

    /// Adds a subscription; returns whether it is new. Filters are checked before.
    pub(crate) fn subscribe(&self, session: u64, filter: &str, options: Options) -> bool {
        self.inner.lock().routes.insert(filter, Entry { session, options })
    }

    /// Ends a subscription; returns whether there was one.
    pub(crate) fn unsubscribe(&self, session: u64, filter: &str) -> bool {
        self.inner.lock().routes.remove(filter, session)
    }

    /// Whether there is nothing in it worth keeping.
    pub(crate) fn is_idle(&self) -> bool {
        let inner = self.inner.lock();
        inner.members.is_empty() && !inner.followed
    }

    /// Whether a client of this id is connected here.
    pub(crate) fn has_client(&self, client_id: &str) -> bool {
        self.inner.lock().clients.contains_key(client_id)
    }

    /// The wills of all sessions that have a number.
    pub(crate) fn wills(&self) -> Vec<(WillKey, Arc<str>)> {
        let inner = self.inner.lock();
        let will = |(client_id, seat): (&Arc<str>, &Seat)| {
            let will = inner.members.get(&seat.session)?.will.clone()?;
            let (account, client_id, number) = (self.account, Arc::clone(client_id), seat.number);
            (number > 0).then_some((WillKey { account, client_id, number }, will))
        };
        inner.clients.iter().filter_map(will).collect()
    }

    /// Messages that wait for all clients together, those of the fullest queue,
    /// and commands whose answers are awaited.
    pub(crate) fn depths(&self) -> (usize, usize, usize) {
        let (mut sum, mut most) = (0, 0);
        self.each_member(|member| {
            let depth = member.link.len();
            sum += depth;
            most = most.max(depth);
        });
        (sum, most, self.answers.load(Ordering::Acquire))
    }

    /// Calls `visit` for every client.
    pub(crate) fn each_member(&self, mut visit: impl FnMut(&Member)) {
        self.inner.lock().members.values().for_each(&mut visit);
    }

    /// Counts a publish of so many bytes against the account's rate: each started
    /// [`PACE_BYTES`] count as one. Returns how long the client is to wait before
    /// it publishes on, if the account is too fast.
    pub(crate) fn pace(&self, bytes: usize) -> Option<Duration> {
        let count = u32::try_from(bytes / PACE_BYTES).unwrap_or(u32::MAX).saturating_add(1);
        let rate = f64::from(self.config.account_publishes_per_s_max);
        let mut bucket = self.bucket.lock();
        let now = Instant::now();
        let refill = now.duration_since(bucket.at).as_secs_f64() * rate;
        bucket.at = now;
        bucket.tokens = (bucket.tokens + refill).min(rate * RATE_S) - f64::from(count);
        if bucket.tokens >= 0.0 {
            return None;
        }
        // At most a second: the next publish is asked again.
        Some(Duration::from_secs_f64((-bucket.tokens / rate).clamp(0.001, 1.0)))
    }

    /// Makes room for one more command whose answer is awaited.
    pub(crate) fn reserve_answer(&self) -> bool {
        let reserved = self.answers.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| {
            (n < self.config.answers_max).then_some(n + 1)
        });
        reserved.is_ok()
    }

    /// Gives that room back.
    pub(crate) fn release_answer(&self) {
        self.answers.fetch_sub(1, Ordering::AcqRel);
    }

    /// A number for `content`, the same only in this hub.
    pub(crate) fn fingerprint(&self, content: &impl Hash) -> u64 {
        self.hasher.hash_one(content)
    }

    /// Notes that the command of this fingerprint was queued.
    pub(crate) fn note_command(&self, print: u64) {
        let mut commands = self.commands.lock();
        if commands.len() >= COMMANDS_MAX {
            commands.pop_front();
        }
        commands.push_back((Instant::now(), print));
    }

    /// Whether the command of this fingerprint was queued within a minute.
    pub(crate) fn is_recent_command(&self, print: u64) -> bool {
        let now = Instant::now();
        let mut commands = self.commands.lock();
        while commands.front().is_some_and(|(at, _)| now.duration_since(*at) > COMMAND_MEMORY) {
            commands.pop_front();
        }
        commands.iter().any(|(_, known)| *known == print)
    }

    /// Whether there are no other nodes.
    pub(crate) fn is_alone(&self) -> bool {
        self.nodes.is_none()
    }

    /// Gives a message to the other nodes, in the order of the calls. Waits for none of them.
    pub(crate) async fn spread(&self, message: &Message) {
        if let Some(nodes) = &self.nodes {
            metrics::between_nodes("out");
            self.bus.publish(self.account, vec![nodes.outgoing(message)]).await;
        }
    }

    /// Gives a session its number among those of all nodes, and tells them of it; `None` if another has taken its place
    /// here meanwhile. To be called once the bus is followed:
    /// then of two that connect at once the one with the higher number hears of the other or is heard by it, and stays.
    pub(crate) async fn take_seat(&self, session: u64, client_id: &Arc<str>) -> Option<u64> {
        let number = match &self.nodes {
            Some(nodes) => nodes.number().await,
            // Above those of the process before.
            None => u64::try_from(self.clock.now().as_micros()).unwrap_or(0).max(1),
        };
        {
            let mut inner = self.inner.lock();
            let inner = &mut *inner;
            // If another took the name here meanwhile, it tells the others itself.
            let seat = inner.clients.get_mut(client_id).filter(|seat| seat.session == session)?;
            seat.number = number;
            if seat.heard > number {
                if let Some(member) = inner.members.get(&session) {
                    member.link.kick(Reason::SessionTakenOver);
                }
                return Some(number);
            }
        }
        if let Some(nodes) = &self.nodes {
            self.tell_sessions(nodes, vec![(Arc::clone(client_id), number)]).await;
        }
        Some(number)
    }

    /// Tells the other nodes of sessions here.
    async fn tell_sessions(&self, nodes: &Nodes, sessions: Vec<(Arc<str>, u64)>) {
        let items = nodes.sessions(&sessions);
        if !items.is_empty() {
            self.bus.publish(self.account, items).await;
        }
    }

    /// Tells the other nodes of all sessions here: what was told before may not have been heard. Who knows of a newer one
    /// answers.
    async fn tell_all_sessions(&self) {
        let Some(nodes) = &self.nodes else { return };
        let all = {
            let inner = self.inner.lock();
            let told = |seat: &Seat| {
                let stays = inner.members.get(&seat.session).is_some_and(Member::stays);
                seat.number > 0 && stays
            };
            let seats = inner.clients.iter().filter(|(_, seat)| told(seat));
            seats.map(|(client_id, seat)| (Arc::clone(client_id), seat.number)).collect()
        };
        self.tell_sessions(nodes, all).await;
    }

    /// Another node has sessions: of two of one client id the older goes.
    async fn heard(&self, told: &ClientSessions) {
        let Some(nodes) = self.nodes.as_ref().filter(|nodes| nodes.origin() != told.origin) else {
            return;
        };
        let mut newer = Vec::new();
        {
            let mut inner = self.inner.lock();
            let inner = &mut *inner;
            for (client_id, number) in &told.sessions {
                nodes.meet(*number);
                let Some(seat) = inner.clients.get_mut(client_id) else { continue };
                if seat.number == 0 {
                    seat.heard = seat.heard.max(*number);
                    continue;
                }
                let Some(member) = inner.members.get(&seat.session) else { continue };
                // Two of one number were given it by clocks: then chance decides, the same on both sides.
                if (*number, told.origin) > (seat.number, nodes.origin()) {
                    member.link.kick(Reason::SessionTakenOver);
                } else if member.stays() {
                    newer.push((Arc::clone(client_id), seat.number));
                }
            }
        }
        self.tell_sessions(nodes, newer).await;
    }

    /// Hands a message to everyone who wants it; returns how many that are.
    pub(crate) fn publish(&self, message: &Arc<Message>) -> usize {
        let hits = self.find(&message.topic, message.object, message.publisher);
        self.push(&hits, message)
    }

    /// Who wants what is published to `topic`.
    fn find(&self, topic: &str, object: Option<Uuid>, publisher: u64) -> Vec<Hit> {
        let inner = self.inner.lock();
        let mut entries = Vec::new();
        inner.routes.find(topic, &mut entries);
        if entries.is_empty() {
            return Vec::new();
        }
        // Overlapping filters of one client make one delivery, with the highest
        // QoS and every identifier.
        entries.sort_unstable_by_key(|e| e.session);
        let mut hits = Vec::with_capacity(entries.len());
        for group in entries.chunk_by(|a, b| a.session == b.session) {
            let Some(first) = group.first() else { continue };
            let Some(member) = inner.members.get(&first.session) else { continue };
            // As `Identity::may_hear`: what people change is for administrators.
            let audit = topic.starts_with("event/audit/") && !member.identity.may(Scope::Admin);
            if audit || !may_see(&member.identity, object) {
                continue;
            }
            let own = publisher != 0 && publisher == first.session;
            let wanted = || group.iter().map(|e| e.options).filter(|o| !(own && o.no_local));
            let Some(qos) = wanted().map(|o| o.qos).max() else { continue };
            let mut identifiers = wanted().map(|o| o.identifier).filter(|n| *n > 0);
            let identifiers = match (identifiers.next(), identifiers.next()) {
                (None, _) => Identifiers::None,
                (Some(one), None) => Identifiers::One(one),
                (Some(one), Some(two)) => {
                    Identifiers::Many([one, two].into_iter().chain(identifiers).collect())
                }
            };
            hits.push(Hit {
                link: Arc::clone(&member.link),
                qos,
                retain_as_published: wanted().any(|o| o.retain_as_published),
                identifiers,
            });
        }
        hits
    }

    fn push(&self, hits: &[Hit], message: &Arc<Message>) -> usize {
        let limits = self.limits();
        let mut queued = 0;
        for hit in hits {
            let delivery = Delivery {
                message: Arc::clone(message),
                qos: hit.qos.min(message.qos),
                retain: hit.retain_as_published && message.retain,
                identifiers: hit.identifiers.clone(),
            };
            match hit.link.push(delivery, limits) {
                Pushed::Queued => queued += 1,
                Pushed::Dropped => metrics::dropped("slow_client"),
                Pushed::Overflowed => metrics::dropped("overflow"),
            }
        }
        metrics::delivered(queued);
        hits.len()
    }

    /// Follows the account's bus from now on, until nobody is connected any more:
    /// to be called after joining. When this returns, whatever is published is
    /// routed. Cancel-safe: a dropped call has begun to follow or not.
    pub(crate) async fn follow(self: &Arc<Self>, tasks: &TaskTracker, stop: &CancellationToken) {
        let _starting = self.starting.lock().await;
        if self.inner.lock().followed {
            return;
        }
        let mut items = self.bus.subscribe(self.account, TopicFilter::default()).await;
        self.inner.lock().followed = true;
        let (hub, stop) = (Arc::clone(self), stop.clone());
        tasks.spawn(async move {
            let mut idle = tokio::time::interval(LINGER);
            idle.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut deliveries = 0;
            loop {
                let item = tokio::select! {
                    () = stop.cancelled() => break,
                    item = items.next() => item,
                    _ = idle.tick() => {
                        let mut inner = hub.inner.lock();
                        if inner.members.is_empty() {
                            inner.followed = false;
                            return;
                        }
                        continue;
                    }
                };
                match item {
                    None => break,
                    Some(Ok(item)) => deliveries += 1 + hub.route(item).await,
                    Some(Err(lagged)) => {
                        metrics::lagged(lagged.0);
                        warn!(dropped = lagged.0, "bus is faster than MQTT routing, items lost");
                        // Last values can be made good; the rest is in history.
                        hub.each_member(|member| member.link.mark_stale());
                        hub.tell_all_sessions().await;
                    }
                }
                if deliveries >= TURN_DELIVERIES {
                    deliveries = 0;
                    tokio::task::yield_now().await;
                }
            }
            hub.inner.lock().followed = false;
        });
    }

    /// Routes one item of the bus; returns the deliveries it made.
    async fn route(&self, item: BusItem) -> usize {
        match item {
            BusItem::Messages { device, messages } => {
                let topic = format!("message/{device}");
                self.send_lines(&topic, device.0, &messages)
            }
            BusItem::Log { kind, object, lines } => {
                let name = if kind == SeriesKind::ChannelLog { "channel" } else { "device" };
                self.send_lines(&format!("log/{name}/{object}"), object, &lines)
            }
            BusItem::Event(event) => {
                let topic = format!("event/{}/{}", event.kind.name(), event.object);
                let hits = self.find(&topic, Some(event.object), 0);
                if hits.is_empty() {
                    return 0;
                }
                let payload = event_json(&event).into();
                self.push(&hits, &Arc::new(own(topic, payload, Some(event.object), false)))
            }
            BusItem::Client(told) => {
                let Some(nodes) = &self.nodes else { return 0 };
                let Some(message) = nodes.incoming(&told) else { return 0 };
                metrics::between_nodes("in");
                self.publish(&Arc::new(message))
            }
            BusItem::Sessions(told) => {
                self.heard(&told).await;
                0
            }
            BusItem::State { device, params } => {
                if !self.inner.lock().routes.listens_to("state") {
                    return 0;
                }
                let states = self.state.get_many(self.account, &[device], &params).await;
                let Some(states) = self.told(states) else {
                    // Sessions try until they have sent all last values again.
                    self.each_member(|member| member.link.mark_stale());
                    return 0;
                };
                let mut deliveries = 0;
                for (name, last) in states.into_iter().flat_map(|(_, values)| values) {
                    let topic = state_topic(device, name.as_str());
                    let hits = self.find(&topic, Some(device.0), 0);
                    if !hits.is_empty() {
                        let message = state_message(topic, device, &last);
                        deliveries += self.push(&hits, &Arc::new(message));
                    }
                }
                deliveries
            }
        }
    }

    /// What last values answered; `None` if they could not be read, which is logged once an outage.
    pub(crate) fn told<T>(&self, answer: Result<T, StateError>) -> Option<T> {
        match answer {
            Ok(answer) => {
                // Read first: the common case writes nothing that is shared.
                if self.state_fails.load(Ordering::Relaxed)
                    && self.state_fails.swap(false, Ordering::AcqRel)
                {
                    tracing::info!(account = %self.account, "last values can be read again");
                }
                Some(answer)
            }
            Err(error) => {
                metrics::state_failed();
                if !self.state_fails.swap(true, Ordering::AcqRel) {
                    warn!(account = %self.account, %error, "retained last values are sent later");
                }
                None
            }
        }
    }

    fn send_lines(&self, topic: &str, object: Uuid, lines: &[Stored]) -> usize {
        let hits = self.find(topic, Some(object), 0);
        if hits.is_empty() {
            return 0;
        }
        let topic: Arc<str> = topic.into();
        for line in lines {
            let mut json = String::new();
            line.write_json(&mut json);
            let message = own(Arc::clone(&topic), json.into(), Some(object), false);
            self.push(&hits, &Arc::new(message));
        }
        hits.len() * lines.len()
    }
}

/// A message of the server itself.
pub(crate) fn own(
    topic: impl Into<Arc<str>>,
    payload: Bytes,
    object: Option<Uuid>,
    retain: bool,
) -> Message {
    Message {
        topic: topic.into(),
        payload,
        props: Bytes::new(),
        expires_at: None,
        qos: 1,
        retain,
        publisher: 0,
        object,
    }
}

/// The topic of a last value.
pub(crate) fn state_topic(device: DeviceId, name: &str) -> String {
    let mut topic = format!("state/{device}/");
    push_level(&mut topic, name);
    topic
}

/// A last value as a message.
pub(crate) fn state_message(topic: String, device: DeviceId, last: &LastValue) -> Message {
    let mut json = String::from(r#"{"value":"#);
    last.value.write_json(&mut json);
    json.push_str(r#","timestamp":""#);
    json.push_str(&last.timestamp.to_string());
    json.push_str(r#""}"#);
    own(topic, json.into(), Some(device.0), true)
}

/// An event as JSON: its own members, then its parameters under `params`, every digit kept.
fn event_json(event: &Event) -> String {
    let mut json = format!(
        r#"{{"id":"{}","kind":"{}","object":"{}","timestamp":"{}","params":{{"#,
        event.id,
        event.kind.name(),
        event.object,
        event.timestamp
    );
    event.params.write_json_members(&mut json);
    json.push_str("}}");
    json
}
