//! The one task that speaks to the broker: sends what waits, hands on what comes, connects again.
//!
//! What was sent is kept until it is acknowledged, in order, and sent again first on the next connection: so the items of one
//! device never overtake each other, and may come twice, which whoever hears them sees by their numbers.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use fieldline_contracts::{Bus as _, Clock};
use fieldline_model::AccountId;
use rumqttc::v5::mqttbytes::v5::{
    Disconnect, DisconnectProperties, DisconnectReasonCode, Filter, Packet, PingReq, PubAck,
    PubAckReason, Publish, RetainForwardRule, SubAck, Subscribe, SubscribeReasonCode, Unsubscribe,
};
use rumqttc::v5::mqttbytes::{Error as PacketError, QoS};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, WriteHalf};
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::encoding::{self, About, Refused};
use crate::heard::Heard;
use crate::wire::{Opened, PACKET_BYTES_MAX, Stream, Target};
use crate::{Away, Shared};

/// First and longest wait before connecting again; it doubles.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// A connection that lasted so long was a good one.
const GOOD_AFTER: Duration = Duration::from_secs(2);
/// Most bytes that were sent and not acknowledged, beside one that is larger alone.
const WINDOW_BYTES: usize = 4 << 20;
/// Bytes that are made ready to be written at a time.
const OUT_BYTES: usize = 128 << 10;
/// Room for what is read at a time.
const READ_BYTES: usize = 64 << 10;
/// Items that are handed on before others have a turn: those who read them, above all.
const TURN_ITEMS: usize = 256;
/// Topics of one SUBSCRIBE.
const FILTERS_MAX: usize = 64;
/// How long the broker may leave a packet without an acknowledgement, in silences.
const ACK_SILENCES: u32 = 3;
/// When a refused subscription is tried again.
const REFUSED_RETRY: Duration = Duration::from_secs(10);
/// Longest that saying good-bye may take.
const GOODBYE_MAX: Duration = Duration::from_millis(500);

pub(crate) struct Session {
    shared: Arc<Shared>,
    target: Target,
    clock: Arc<dyn Clock>,
    /// What was sent and is not acknowledged, oldest first.
    sent: VecDeque<Sent>,
    sent_bytes: usize,
    /// What was sent on an earlier connection, after all of `sent`, and has no room on this one yet.
    again: VecDeque<Sent>,
    packet_id: u16,
    /// What the broker was asked for.
    subscribed: HashMap<AccountId, Asked>,
    /// SUBSCRIBEs without an answer.
    asked: HashMap<u16, Vec<AccountId>>,
    retry_at: Option<Instant>,
    heard: HashMap<AccountId, Heard>,
    /// Accounts of which a node of another version published something: told with the next tick, once for all.
    unread: HashSet<AccountId>,
    garbage_was_said: bool,
}

/// A subscription at the broker.
struct Asked {
    /// Of the packet that asked for it.
    id: u16,
    confirmed: bool,
}

struct Sent {
    id: u16,
    topic: Bytes,
    payload: Bytes,
    items: u64,
    at: Instant,
    acknowledged: bool,
}

/// What a connection knows beside its stream.
struct Link {
    inbox: BytesMut,
    out: BytesMut,
    /// Whether written bytes may still be in a buffer below.
    unflushed: bool,
    window: usize,
    packet_bytes_max: usize,
    heard_at: Instant,
    pinged_at: Instant,
}

impl Link {
    /// Whether the broker takes a publication as large.
    fn takes(&self, topic: &Bytes, payload: &Bytes) -> bool {
        // 16 bytes are more than the header and the lengths take.
        let bytes = topic.len() + payload.len() + 16;
        bytes <= self.packet_bytes_max && payload.len() <= encoding::PAYLOAD_BYTES_MAX
    }
}

/// Why a connection ended; none if it was told to.
type Lost = ControlFlow<Option<String>>;

fn lost(reason: impl Into<String>) -> Lost {
    ControlFlow::Break(Some(reason.into()))
}

impl Session {
    pub(crate) fn new(shared: Arc<Shared>, target: Target, clock: Arc<dyn Clock>) -> Self {
        Self {
            shared,
            target,
            clock,
            sent: VecDeque::new(),
            sent_bytes: 0,
            again: VecDeque::new(),
            packet_id: 0,
            subscribed: HashMap::new(),
            asked: HashMap::new(),
            retry_at: None,
            heard: HashMap::new(),
            unread: HashSet::new(),
            garbage_was_said: false,
        }
    }

    /// Runs until `stop`, beginning with the connection that is there.
    pub(crate) async fn run(mut self, mut first: Option<Opened>, stop: CancellationToken) {
        let mut wait = BACKOFF.0;
        let mut fresh = first.is_none();
        loop {
            let opened = match first.take() {
                Some(opened) => Ok(opened),
                None => tokio::select! {
                    () = stop.cancelled() => return,
                    opened = self.target.open(fresh) => opened,
                },
            };
            let reason = match opened {
                Ok(opened) => {
                    fresh = false;
                    let began = Instant::now();
                    match self.serve(opened, &stop).await {
                        Some(reason) => {
                            if began.elapsed() >= GOOD_AFTER {
                                wait = BACKOFF.0;
                            }
                            format!("the MQTT broker at {} was lost: {reason}", self.target.address)
                        }
                        None => return,
                    }
                }
                Err(error) => error.to_string(),
            };
            self.away(reason);
            // Nodes that lost the broker together do not come back together.
            let delay = wait.mul_f64(rand::random_range(0.5..1.0));
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(delay) => {}
            }
            wait = (wait * 2).min(BACKOFF.1);
        }
    }

    fn away(&self, reason: String) {
        self.shared.metrics.away.set(1.0);
        self.shared.link.send_modify(|link| match &mut link.away {
            Some(away) => {
                debug!(reason, "the bus stays away");
                away.reason = reason;
            }
            None => {
                warn!(reason, "the bus between the nodes is away");
                link.away = Some(Away { since: self.clock.now(), reason });
            }
        });
    }

    fn back(&self, session_present: bool) {
        self.shared.metrics.away.set(0.0);
        self.shared.metrics.connections.increment(1);
        let address = &self.target.address;
        let client = &self.target.client_id;
        info!(%address, client, session_present, "the bus between the nodes is connected");
        self.shared.link.send_modify(|link| link.away = None);
    }

    /// Serves one connection until it is lost, and says why, or until `stop`.
    async fn serve(&mut self, opened: Opened, stop: &CancellationToken) -> Option<String> {
        let now = Instant::now();
        let mut link = Link {
            inbox: opened.inbox,
            out: BytesMut::new(),
            unflushed: false,
            window: opened.window,
            packet_bytes_max: opened.packet_bytes_max,
            heard_at: now,
            pinged_at: now,
        };
        let (mut read, mut write) = tokio::io::split(opened.stream);
        self.resume(opened.session_present, &mut link);
        self.back(opened.session_present);
        let silence = self.target.silence_max;
        let mut tick = tokio::time::interval(silence / 6);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let shared = Arc::clone(&self.shared);
        // What came with the welcome.
        let mut next = self.packets(&mut link).await;
        loop {
            if let ControlFlow::Break(reason) = next {
                return reason;
            }
            self.fill(&mut link);
            link.inbox.reserve(READ_BYTES);
            let room = self.has_room(&link) && link.out.len() < OUT_BYTES;
            let to_write = !link.out.is_empty() || link.unflushed;
            next = tokio::select! {
                () = stop.cancelled() => {
                    let goodbye = goodbye(&mut link, &mut write);
                    timeout(GOODBYE_MAX, goodbye).await.unwrap_or_default();
                    return None;
                }
                count = read.read_buf(&mut link.inbox) => match count {
                    Ok(0) => lost("it ended the connection"),
                    Ok(_) => {
                        link.heard_at = Instant::now();
                        self.packets(&mut link).await
                    }
                    Err(error) => lost(error.to_string()),
                },
                written = write_some(&mut link.out, &mut link.unflushed, &mut write), if to_write => {
                    match written {
                        Ok(()) => ControlFlow::Continue(()),
                        Err(error) => lost(error.to_string()),
                    }
                }
                () = shared.queue.wake.notified(), if room => ControlFlow::Continue(()),
                () = shared.interests.wake.notified() => {
                    self.listen(&mut link);
                    ControlFlow::Continue(())
                }
                _ = tick.tick() => self.tick(&mut link),
            };
        }
    }

    /// Begins a connection: what was sent on the last one and not acknowledged comes first, in order.
    fn resume(&mut self, session_present: bool, link: &mut Link) {
        // What has no answer is asked for anew.
        for account in self.asked.drain().flat_map(|(_, accounts)| accounts) {
            self.subscribed.remove(&account);
            self.shared.interests.again(account);
        }
        if !session_present {
            self.subscribed.clear();
            self.shared.interests.forget();
        }
        // First, so that what others send from now on is not missed longer than it must.
        self.listen(link);
        // An acknowledgement before that of an older one: the broker has it.
        let unsent = self.sent.drain(..).filter(|one| !one.acknowledged);
        let unsent: VecDeque<Sent> = unsent.chain(self.again.drain(..)).collect();
        self.again = unsent;
        self.sent_bytes = 0;
        self.send_again(session_present, link);
    }

    /// Sends again what was sent before, as far as there is room; whether that is all.
    fn send_again(&mut self, session_present: bool, link: &mut Link) -> bool {
        while self.has_room(link) {
            let Some(mut one) = self.again.pop_front() else { return true };
            // The broker came back with other settings.
            if !link.takes(&one.topic, &one.payload) {
                self.too_large(one.items, &one.topic);
                continue;
            }
            one.at = Instant::now();
            put_publish(&mut link.out, &one, session_present);
            self.sent_bytes += one.payload.len();
            self.sent.push_back(one);
        }
        self.again.is_empty()
    }

    fn has_room(&self, link: &Link) -> bool {
        self.sent.len() < link.window && self.sent_bytes < WINDOW_BYTES
    }

    /// Makes ready to be written what waits, as far as there is room.
    fn fill(&mut self, link: &mut Link) {
        if !self.send_again(false, link) {
            return;
        }
        while self.has_room(link) && link.out.len() < OUT_BYTES {
            let Some(ready) = self.shared.queue.pop() else { return };
            let topic = ready.about.topic(&self.shared.prefix);
            let payload = Bytes::from(ready.payload);
            let topic = Bytes::from(topic);
            if !link.takes(&topic, &payload) {
                self.too_large(ready.items, &topic);
                continue;
            }
            let id = self.next_id();
            let (items, at) = (ready.items, Instant::now());
            let one = Sent { id, topic, payload, items, at, acknowledged: false };
            put_publish(&mut link.out, &one, false);
            self.sent_bytes += one.payload.len();
            self.sent.push_back(one);
        }
    }

    /// Others see by the numbers that they are missing.
    fn too_large(&self, items: u64, topic: &Bytes) {
        self.shared.metrics.dropped_large.increment(items);
        self.shared.queue.done(items);
        debug!(?topic, items, "too large for the broker, items dropped");
    }

    /// Never one that is on its way: there are far fewer of those than of ids.
    fn next_id(&mut self) -> u16 {
        self.packet_id = self.packet_id.checked_add(1).unwrap_or(1);
        self.packet_id
    }

    /// Asks the broker for the accounts that came, and no more for those that went.
    fn listen(&mut self, link: &mut Link) {
        let (mut come, mut gone) = (Vec::new(), Vec::new());
        for (account, wanted) in self.shared.interests.changes() {
            match (wanted, self.subscribed.get(&account).map(|asked| asked.confirmed)) {
                (true, None) => come.push(account),
                // It went and came again before we looked.
                (true, Some(true)) => {
                    self.shared.interests.confirm(account, &self.shared.memory);
                }
                (false, Some(_)) => gone.push(account),
                (true, Some(false)) | (false, None) => {}
            }
        }
        let filter = |account: &AccountId| format!("{}/{account}/#", self.shared.prefix);
        let subscribes: Vec<Subscribe> = come
            .chunks(FILTERS_MAX)
            .map(|accounts| {
                let filters = accounts.iter().map(|account| Filter {
                    nolocal: true,
                    preserve_retain: true,
                    retain_forward_rule: RetainForwardRule::Never,
                    ..Filter::new(filter(account), QoS::AtLeastOnce)
                });
                Subscribe::new_many(filters, None)
            })
            .collect();
        let unsubscribes: Vec<Unsubscribe> = gone
            .chunks(FILTERS_MAX)
            .map(|accounts| Unsubscribe {
                filters: accounts.iter().map(filter).collect(),
                ..Unsubscribe::default()
            })
            .collect();
        for (accounts, mut subscribe) in come.chunks(FILTERS_MAX).zip(subscribes) {
            subscribe.pkid = self.next_id();
            self.asked.insert(subscribe.pkid, accounts.to_vec());
            let asked =
                |account: &AccountId| (*account, Asked { id: subscribe.pkid, confirmed: false });
            self.subscribed.extend(accounts.iter().map(asked));
            put(&mut link.out, &Packet::Subscribe(subscribe));
        }
        for mut unsubscribe in unsubscribes {
            unsubscribe.pkid = self.next_id();
            put(&mut link.out, &Packet::Unsubscribe(unsubscribe));
        }
        for account in gone {
            self.subscribed.remove(&account);
            self.heard.remove(&account);
            self.unread.remove(&account);
        }
    }

    /// What is to be done from time to time.
    fn tick(&mut self, link: &mut Link) -> Lost {
        let (now, silence) = (Instant::now(), self.target.silence_max);
        if now - link.heard_at >= silence {
            return lost(format!("it said nothing for {} ms", silence.as_millis()));
        }
        let late = silence * ACK_SILENCES;
        if self.sent.front().is_some_and(|oldest| now - oldest.at >= late) {
            return lost(format!("it acknowledged nothing for {} ms", late.as_millis()));
        }
        if now - link.heard_at >= silence / 3 && now - link.pinged_at >= silence / 3 {
            link.pinged_at = now;
            put(&mut link.out, &Packet::PingReq(PingReq));
        }
        if self.retry_at.is_some_and(|at| now >= at) {
            self.retry_at = None;
            self.listen(link);
        }
        for account in self.unread.drain() {
            self.shared.memory.missed(account, 0);
        }
        self.shared.queue.mark();
        ControlFlow::Continue(())
    }

    /// Handles all whole packets that came.
    async fn packets(&mut self, link: &mut Link) -> Lost {
        let mut handed_on = 0;
        loop {
            if handed_on >= TURN_ITEMS {
                handed_on = 0;
                tokio::task::yield_now().await;
            }
            match Packet::read(&mut link.inbox, Some(PACKET_BYTES_MAX)) {
                Ok(Packet::Publish(publish)) => handed_on += self.publish(&publish, link).await,
                Ok(Packet::PubAck(ack)) => self.acknowledged(&ack),
                Ok(Packet::SubAck(ack)) => self.confirmed(&ack),
                Ok(Packet::Disconnect(words)) => {
                    return lost(format!("it ended the connection, {:?}", words.reason_code));
                }
                Ok(_) => {}
                Err(PacketError::InsufficientBytes(_)) => return ControlFlow::Continue(()),
                Err(error) => return lost(format!("its packet is not understood: {error}")),
            }
        }
    }

    fn acknowledged(&mut self, ack: &PubAck) {
        let Some(one) = self.sent.iter_mut().find(|one| one.id == ack.pkid) else { return };
        if std::mem::replace(&mut one.acknowledged, true) {
            return;
        }
        self.shared.queue.done(one.items);
        match ack.reason {
            PubAckReason::Success | PubAckReason::NoMatchingSubscribers => {
                self.shared.metrics.sent.increment(one.items);
                self.shared.accepted();
            }
            reason => {
                self.shared.metrics.dropped_refused.increment(one.items);
                self.shared.refused(format!(
                    "the MQTT broker at {} refuses what this node publishes ({reason:?}): allow its user to write to {}/#",
                    self.target.address, self.shared.prefix
                ));
            }
        }
        while let Some(one) = self.sent.pop_front_if(|one| one.acknowledged) {
            self.sent_bytes -= one.payload.len();
        }
    }

    fn confirmed(&mut self, ack: &SubAck) {
        let Some(accounts) = self.asked.remove(&ack.pkid) else { return };
        let codes = ack.return_codes.iter().map(Some).chain(std::iter::repeat(None));
        for (account, code) in accounts.into_iter().zip(codes) {
            // It may have gone meanwhile, and come again: then another answer counts.
            let asked = self.subscribed.get_mut(&account).filter(|asked| asked.id == ack.pkid);
            let Some(asked) = asked else { continue };
            if let Some(SubscribeReasonCode::Success(_)) = code {
                asked.confirmed = true;
                self.shared.interests.confirm(account, &self.shared.memory);
                continue;
            }
            self.subscribed.remove(&account);
            self.shared.interests.owe(account);
            self.shared.interests.again(account);
            self.retry_at = Some(Instant::now() + REFUSED_RETRY);
            self.shared.refused(format!(
                "the MQTT broker at {} refuses to let this node listen ({code:?}): allow its user to read {}/#",
                self.target.address, self.shared.prefix
            ));
        }
    }

    /// Hands on what another node published, and returns how many items.
    async fn publish(&mut self, publish: &Publish, link: &mut Link) -> usize {
        if publish.qos == QoS::AtLeastOnce {
            put(&mut link.out, &Packet::PubAck(PubAck::new(publish.pkid, None)));
        }
        let Some(about) = About::of_topic(&self.shared.prefix, &publish.topic) else {
            self.garbage(&publish.topic, "its topic is none of the bus");
            return 0;
        };
        // What was on its way when the last subscriber went.
        if !self.subscribed.contains_key(&about.account) {
            return 0;
        }
        let (head, items) = match encoding::open(about, &publish.payload) {
            Ok(opened) => opened,
            Err(refused) => {
                // What it says is not known here, but that something was said is.
                if let Refused::Version(_) = refused {
                    self.unread.insert(about.account);
                }
                self.garbage(&publish.topic, &refused.to_string());
                return 0;
            }
        };
        // A broker that does not know how to leave out our own.
        if head.publisher == self.shared.publisher {
            return 0;
        }
        let heard = self.heard.entry(about.account).or_default();
        let Some(news) = heard.take(head, Instant::now()) else {
            self.shared.metrics.repeats.increment(1);
            return 0;
        };
        let read = encoding::items(about, head, items);
        let unread = if read.is_err() { u64::from(head.count) } else { 0 };
        let missed = news.missed.saturating_add(unread);
        if missed > 0 {
            self.shared.metrics.missed.increment(missed);
            self.shared.memory.missed(about.account, missed);
        }
        match read {
            Ok(mut items) => {
                items.drain(..news.skip.min(items.len()));
                let count = items.len();
                self.shared.metrics.received.increment(count as u64);
                if count > 0 {
                    self.shared.memory.publish(about.account, items).await;
                }
                count
            }
            Err(refused) => {
                self.garbage(&publish.topic, &refused.to_string());
                0
            }
        }
    }

    /// Counted each time, said once.
    fn garbage(&mut self, topic: &[u8], reason: &str) {
        self.shared.metrics.garbage.increment(1);
        if !std::mem::replace(&mut self.garbage_was_said, true) {
            let topic: String = String::from_utf8_lossy(topic).chars().take(200).collect();
            warn!(
                topic,
                reason,
                "somebody else publishes on the topics of the bus, or a node of another version; further ones are only counted"
            );
        }
    }
}

/// Writes as much as goes, and sees to it that nothing stays in between. Cancel-safe.
async fn write_some(
    out: &mut BytesMut,
    unflushed: &mut bool,
    write: &mut WriteHalf<Box<dyn Stream>>,
) -> std::io::Result<()> {
    if !out.is_empty() {
        let written = write.write_buf(out).await?;
        *unflushed = true;
        if written == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
    }
    if out.is_empty() {
        write.flush().await?;
        *unflushed = false;
    }
    Ok(())
}

/// Takes leave for good: the broker keeps nothing for us.
async fn goodbye(link: &mut Link, write: &mut WriteHalf<Box<dyn Stream>>) {
    let mut words = Disconnect::new(DisconnectReasonCode::NormalDisconnection);
    words.properties = Some(DisconnectProperties {
        session_expiry_interval: Some(0),
        reason_string: None,
        user_properties: Vec::new(),
        server_reference: None,
    });
    put(&mut link.out, &Packet::Disconnect(words));
    while !link.out.is_empty() || link.unflushed {
        if write_some(&mut link.out, &mut link.unflushed, write).await.is_err() {
            return;
        }
    }
    // The connection ends in any case.
    write.shutdown().await.unwrap_or_default();
}

fn put_publish(out: &mut BytesMut, one: &Sent, again: bool) {
    let publish = Publish {
        dup: again,
        qos: QoS::AtLeastOnce,
        retain: false,
        topic: one.topic.clone(),
        pkid: one.id,
        payload: one.payload.clone(),
        properties: None,
    };
    put(out, &Packet::Publish(publish));
}

fn put(out: &mut BytesMut, packet: &Packet) {
    // It can only be too large, and sizes were looked at.
    if let Err(error) = packet.write(out, None) {
        warn!(%error, "a packet could not be written");
    }
}
