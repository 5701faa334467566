//! Wills of clients whose node is gone.
//!
//! A will is kept in the store from CONNECT on, with the rights that its client had, and forgotten when its session ends.
//! Each process says every [`BEAT`] that it lives. Of one that has not for [`SILENCE`], another publishes what it left,
//! unless the client has connected again; in one process that needs nothing else, the next start does. It may be published
//! twice if that one dies too, in between; not at all if the store was away when the client connected, and until it died.
//!
//! Nobody is taken for dead by one that could not reach the store itself a while ago: after an outage of the store
//! everybody has had the time to say that he lives.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use fieldline_auth::{AuthError, Identity, IdentityKind};
use fieldline_contracts::{Actor, ClientStore, RegistryError, WillChange, WillKey};
use fieldline_model::{AccountId, ConnectionId, DeviceId, Scope, Timestamp, TokenId};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tracing::{debug, info, warn};

use crate::codec::{Qos, Reason, Text, Will};
use crate::fields::read_forwarded;
use crate::publish::{Client, Incoming, Taken};
use crate::{Shared, metrics};

/// How often a process says that it lives.
const BEAT: Duration = Duration::from_secs(2);
/// Longest that saying so may take: a connection that is dead must not keep it silent.
const BEAT_MAX: Duration = Duration::from_secs(3);
/// Who has not said so for this long is dead.
const SILENCE: Duration = Duration::from_secs(12);
/// How long this process must have said so without a failure before it takes another for dead.
const SETTLED: Duration = Duration::from_secs(15);
/// Changes that wait to be stored. Of more, all are told again.
const CHANGES_MAX: usize = 65_536;
/// Changes, and wills, that go to or come from the store at once.
const BATCH: usize = 256;
/// Longest that the store is waited for at the end.
const END_MAX: Duration = Duration::from_secs(2);

/// What is kept of the wills of this process.
pub(crate) struct Wills {
    /// This process, in the store.
    owner: u64,
    store: Arc<dyn ClientStore>,
    changes: mpsc::Sender<WillChange>,
    /// Whether changes were lost: then all are told again.
    lost: AtomicBool,
    /// Whether other nodes may have wills of a client that has none here.
    among_others: bool,
    /// Since when the store has known without a break that we live.
    alive_since: Mutex<Option<Instant>>,
}

/// A will as it is kept.
#[derive(Serialize, Deserialize)]
struct Kept {
    topic: String,
    payload: String,
    at_least_once: bool,
    retain: bool,
    props: String,
    expiry_s: Option<u32>,
    token: TokenId,
    actor: Actor,
    scopes: Vec<Scope>,
    devices: Vec<DeviceId>,
    expires_at: Option<Timestamp>,
    peer: std::net::SocketAddr,
}

/// A will in the form that it is kept in; `None` for a client that is no program.
pub(crate) fn kept(client: &Client, will: &Will) -> Option<Arc<str>> {
    let Identity { actor, scopes, devices, kind, expires_at, .. } = &*client.identity;
    let IdentityKind::Token(token) = *kind else { return None };
    let kept = Kept {
        topic: will.topic.as_str().to_owned(),
        payload: BASE64.encode(&will.payload),
        at_least_once: will.qos != Qos::AtMostOnce,
        retain: will.retain,
        props: BASE64.encode(&will.props.forward),
        expiry_s: will.props.expiry_s,
        token,
        actor: actor.clone(),
        scopes: scopes.clone(),
        devices: devices.clone(),
        expires_at: *expires_at,
        peer: client.peer,
    };
    serde_json::to_string(&kept).ok().map(Arc::from)
}

impl Kept {
    /// The will, and who left it.
    fn read(self, account: AccountId) -> Option<(Will, Identity, std::net::SocketAddr)> {
        let props = read_forwarded(&Bytes::from(BASE64.decode(self.props).ok()?), self.expiry_s)?;
        let will = Will {
            topic: Text::new(self.topic)?,
            payload: BASE64.decode(self.payload).ok()?.into(),
            qos: if self.at_least_once { Qos::AtLeastOnce } else { Qos::AtMostOnce },
            retain: self.retain,
            props,
        };
        let identity = Identity {
            account,
            actor: self.actor,
            scopes: self.scopes,
            devices: self.devices,
            kind: IdentityKind::Token(self.token),
            session: None,
            expires_at: self.expires_at,
        };
        Some((will, identity, self.peer))
    }
}

impl Wills {
    /// The wills of a process, and what [`run`] is given.
    pub(crate) fn new(
        owner: u64,
        store: Arc<dyn ClientStore>,
        among_others: bool,
    ) -> (Arc<Self>, mpsc::Receiver<WillChange>) {
        let (changes, received) = mpsc::channel(CHANGES_MAX);
        let lost = AtomicBool::new(false);
        let alive_since = Mutex::default();
        (Arc::new(Self { owner, store, changes, lost, among_others, alive_since }), received)
    }

    /// A session began, with or without a will.
    pub(crate) fn begin(&self, key: WillKey, will: Option<&Arc<str>>) {
        // Alone, nobody else has one of this client.
        if will.is_some() || self.among_others {
            self.tell(WillChange::Begin { key, will: will.map(|will| (**will).to_owned()) });
        }
    }

    /// A session with a will ended, and it is published or is not to be.
    pub(crate) fn end(&self, key: WillKey) {
        self.tell(WillChange::End { key });
    }

    /// Whether others may be taken for dead.
    fn may_adopt(&self) -> bool {
        let settled = |since: Instant| since.elapsed() >= SETTLED;
        !self.among_others || self.alive_since.lock().is_some_and(settled)
    }

    fn tell(&self, change: WillChange) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.changes.try_send(change) {
            self.lost.store(true, Ordering::Release);
        }
    }
}

/// Keeps wills, and publishes those of the dead, until the server stops.
pub(crate) async fn run(shared: Arc<Shared>, changes: mpsc::Receiver<WillChange>) {
    let (stop, wills) = (shared.stop.clone(), Arc::clone(&shared.wills));
    let mut keeper = Keeper { shared, pending: Vec::new(), failing: false };
    // Beside each other: what is slow to be stored must not make others take us for dead.
    tokio::select! {
        () = stop.cancelled() => {}
        () = live(&wills) => {}
        () = keeper.keep(changes) => {}
    }
    // Clients are told that the server stops, and no will is published for that.
    match timeout(END_MAX, wills.store.forget_owner(wills.owner)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => warn!(%error, "wills are left that another node may publish"),
        Err(_) => warn!("wills are left that another node may publish: the store is slow"),
    }
}

/// Says that we live, for ever.
async fn live(wills: &Wills) {
    let mut beat = tokio::time::interval(BEAT);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        beat.tick().await;
        match timeout(BEAT_MAX, wills.store.beat(wills.owner)).await {
            Ok(Ok(known)) => {
                wills.alive_since.lock().get_or_insert_with(Instant::now);
                if !known {
                    // We are new, or others took us for dead.
                    wills.lost.store(true, Ordering::Release);
                }
            }
            Ok(Err(_)) | Err(_) => *wills.alive_since.lock() = None,
        }
    }
}

struct Keeper {
    shared: Arc<Shared>,
    /// Changes that are not stored yet.
    pending: Vec<WillChange>,
    /// Whether the store failed when last asked: an outage is logged once.
    failing: bool,
}

impl Keeper {
    /// Stores what changes, and from time to time looks for the dead.
    async fn keep(&mut self, mut changes: mpsc::Receiver<WillChange>) {
        let wills = Arc::clone(&self.shared.wills);
        let mut look = tokio::time::interval(BEAT);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // What could not be stored waits for the next look.
                _ = changes.recv_many(&mut self.pending, BATCH), if self.pending.is_empty() => {
                    self.flush().await;
                }
                _ = look.tick() => {
                    if wills.lost.swap(false, Ordering::AcqRel) {
                        self.tell_all(&wills).await;
                    }
                    while self.flush().await && !changes.is_empty() {
                        changes.recv_many(&mut self.pending, BATCH).await;
                    }
                    if self.pending.is_empty() && wills.may_adopt() {
                        self.adopt().await;
                    }
                }
            }
        }
    }

    fn told<T>(&mut self, answer: Result<T, RegistryError>) -> Option<T> {
        match answer {
            Ok(answer) => {
                if std::mem::take(&mut self.failing) {
                    info!("wills can be kept again");
                }
                Some(answer)
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    warn!(%error, "wills cannot be kept: those of a node that dies now may not be published");
                }
                None
            }
        }
    }

    /// Stores what is pending; whether it is.
    async fn flush(&mut self) -> bool {
        if self.pending.is_empty() {
            return true;
        }
        let wills = Arc::clone(&self.shared.wills);
        let stored = wills.store.keep_wills(wills.owner, &self.pending).await;
        let stored = self.told(stored).is_some();
        if stored {
            metrics::wills_stored(self.pending.len());
            self.pending.clear();
        }
        stored
    }

    /// Stores all wills anew: others took us for dead, or changes were lost.
    async fn tell_all(&mut self, wills: &Wills) {
        let all = self.shared.hubs().into_iter().flat_map(|hub| hub.wills());
        let all: Vec<WillChange> = all
            .map(|(key, will)| WillChange::Begin { key, will: Some((*will).to_owned()) })
            .collect();
        // With those of sessions that are over.
        let told = async {
            wills.store.forget_owner(wills.owner).await?;
            wills.store.beat(wills.owner).await?;
            for part in all.chunks(BATCH) {
                wills.store.keep_wills(wills.owner, part).await?;
            }
            Ok(())
        };
        let told = told.await;
        if self.told(told).is_none() {
            wills.lost.store(true, Ordering::Release);
        }
    }

    /// Publishes what the dead left.
    async fn adopt(&mut self) {
        let wills = Arc::clone(&self.shared.wills);
        while !self.shared.stop.is_cancelled() {
            let found = wills.store.adopt(wills.owner, SILENCE).await;
            let Some(Some(dead)) = self.told(found) else { return };
            let published = self.publish_all(&wills, dead).await;
            match published {
                Ok(count) if count > 0 => {
                    info!(count, "wills of a process that is gone were published")
                }
                Ok(_) => {}
                Err(error) => {
                    // It is adopted again when it has been silent for as long again.
                    self.told::<()>(Err(error));
                    return;
                }
            }
        }
    }

    async fn publish_all(&self, wills: &Wills, dead: u64) -> Result<usize, RegistryError> {
        let mut count = 0;
        loop {
            let left = wills.store.wills(dead, BATCH).await?;
            if left.is_empty() || self.shared.stop.is_cancelled() {
                break;
            }
            for (key, will) in left {
                if self.publish(&key, &will).await? {
                    count += 1;
                }
                wills.store.keep_wills(dead, &[WillChange::End { key }]).await?;
            }
            // Neither is it adopted by another meanwhile, nor are we.
            wills.store.beat(dead).await?;
            wills.store.beat(wills.owner).await?;
        }
        if !self.shared.stop.is_cancelled() {
            wills.store.forget_owner(dead).await?;
        }
        Ok(count)
    }

    /// Publishes one, as its client would; whether it was to be.
    async fn publish(&self, key: &WillKey, will: &str) -> Result<bool, RegistryError> {
        let hub = self.shared.hub(key.account);
        let read = serde_json::from_str::<Kept>(will).ok();
        let Some((will, identity, peer)) = read.and_then(|kept| kept.read(key.account)) else {
            warn!(client_id = %key.client_id, "a will that was left cannot be read");
            return Ok(false);
        };
        // It has connected again, and what it left is no longer so.
        if hub.has_client(&key.client_id) {
            return Ok(false);
        }
        match self.shared.services.auth.recheck(&identity).await {
            Ok(()) => {}
            // Without its rights a client publishes no will.
            Err(AuthError::Unauthenticated(_)) => return Ok(false),
            Err(error) => return Err(RegistryError::Unavailable(error.to_string())),
        }
        let clock = &self.shared.services.platform.clock;
        let client = Client {
            shared: Arc::clone(&self.shared),
            hub,
            identity: Arc::new(identity),
            session: self.shared.next_session(),
            connection: ConnectionId::new(clock.now(), clock.random()),
            peer,
        };
        match client.publish_will(will).await {
            Ok(()) => {
                metrics::will_adopted();
                Ok(true)
            }
            // The store or the registry is away: it is tried again.
            Err((_, refusal)) if refusal.reason == Reason::Unspecified => {
                Err(RegistryError::Unavailable(refusal.text.into_owned()))
            }
            Err((topic, refusal)) => {
                client.tell_refused(&mut None, &topic, &refusal);
                Ok(true)
            }
        }
    }
}

impl Client {
    /// A will is a message of the client like any other.
    ///
    /// # Errors
    ///
    /// Its topic, and why it was not taken.
    pub(crate) async fn publish_will(
        &self,
        will: Will,
    ) -> Result<(), (String, crate::publish::Refusal)> {
        let Will { topic, payload, qos, retain, props } = will;
        // It outlived its packet, whose memory it must not hold on to when it waits somewhere.
        let payload = Bytes::copy_from_slice(&payload);
        let topic = topic.as_str();
        let (packet_id, dup) = (None, false);
        let incoming = Incoming { topic, payload, qos, retain, props, packet_id, dup };
        let outcome = match self.take(incoming).await {
            Ok(Taken::Batch(batch)) => {
                let device = Arc::clone(&batch.device);
                self.store(&device, vec![batch]).await
            }
            Ok(Taken::Done(_)) => Ok(()),
            Err(refusal) => Err(refusal),
        };
        if let Err(refusal) = &outcome {
            debug!(topic, why = %refusal.text, "a will was not taken");
        }
        outcome.map_err(|refusal| (topic.to_owned(), refusal))
    }
}
