//! The lease of this node: made when it joins, renewed each third of its time, made anew when etcd lost it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use etcd_client::{
    Compare, CompareOp, Error, LeaseKeepAliveStream, LeaseKeeper, PutOptions, Txn, TxnOp,
    TxnOpResponse,
};
use fieldline_contracts::cluster::GRACE;
use fieldline_contracts::{ClusterError, Node};
use futures_util::future::join_all;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{info, warn};

use crate::error::unavailable;
use crate::keys::{Held, Registered};
use crate::{Inner, REQUEST_MAX};

/// How much earlier than in etcd what is held ends here: for the watchdog, and for clocks that run apart.
const MARGIN: Duration = GRACE.saturating_add(Duration::from_millis(100));
/// How long a peer may take to say whether etcd is gone for it too.
const ASK_MAX: Duration = Duration::from_millis(400);
/// For what part of a lease the word of all others lasts: time for two further questions, one of which may fail. They claim
/// nothing for longer than that, a whole lease and more: see [`crate::view`].
const WORD: (u32, u32) = (5, 6);
/// Requests to etcd that wait for an answer at a time.
const REQUESTS_MAX: usize = 64;

/// What this node is registered as.
pub(crate) struct Session {
    pub(crate) name: String,
    registered: Registered,
    beats: JoinHandle<()>,
}

impl Inner {
    pub(crate) async fn join(self: &Arc<Self>, node: Node) -> Result<(), ClusterError> {
        let mut session = self.registered.lock().await;
        if let Some(session) = &mut *session
            && session.name == node.name
        {
            let registered = Registered { node, instance: session.registered.instance };
            self.register(&registered, self.lease.load(Ordering::Acquire)).await?;
            session.registered = registered;
            return Ok(());
        }
        if let Some(before) = session.take() {
            self.end(before).await;
        }
        let registered = Registered { node, instance: rand::random() };
        let sent = Instant::now();
        let lease = self.grant().await.map_err(|error| unavailable(&error))?;
        // One of our name that died holds it for as long as its lease lasts.
        let patience = Instant::now() + self.ttl + REQUEST_MAX * 2;
        loop {
            match self.register(&registered, lease).await {
                Ok(()) => break,
                Err(ClusterError::NameTaken(_)) if Instant::now() < patience => {
                    tokio::time::sleep(REQUEST_MAX / 4).await;
                    // The lease must last until then.
                    let mut client = self.client().lease_client();
                    self.ask(REQUEST_MAX, client.keep_alive(lease))
                        .await
                        .map_err(|error| unavailable(&error))?;
                }
                Err(error) => {
                    // It ends by itself if this does not reach etcd.
                    let revoked =
                        self.ask(REQUEST_MAX, self.client().lease_client().revoke(lease)).await;
                    revoked.map(|_| ()).unwrap_or_default();
                    return Err(error);
                }
            }
        }
        self.lease.store(lease, Ordering::Release);
        self.renewed(sent);
        let inner = Arc::downgrade(self);
        let stop = self.stop.clone();
        let name = registered.node.name.clone();
        let beats = tokio::spawn(async move {
            let mut beat = Beat { keeper: None, lease: 0 };
            loop {
                let Some(inner) = inner.upgrade() else { return };
                let began = Instant::now();
                // Sooner where it failed: there must be time for a try, and a question to the peers, before the deadline.
                let renewed = inner.beat(&mut beat).await;
                let next = began + if renewed { inner.ttl / 3 } else { inner.ttl / 6 };
                inner.give_up_released().await;
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = sleep_until(next) => {}
                    () = inner.released.notified() => {}
                }
            }
        });
        *session = Some(Session { name, registered, beats });
        Ok(())
    }

    pub(crate) async fn leave(&self) {
        if let Some(session) = self.registered.lock().await.take() {
            self.end(session).await;
        }
    }

    async fn end(&self, session: Session) {
        session.beats.abort();
        self.end_all();
        self.deadline.end();
        let lease = self.lease.swap(0, Ordering::AcqRel);
        if let Err(error) = self.ask(REQUEST_MAX, self.client().lease_client().revoke(lease)).await
        {
            warn!(%error, "this node could not be taken from the cluster: others see it until its lease ends");
        }
        self.releases.lock().clear();
    }

    async fn grant(&self) -> Result<i64, Error> {
        let ttl = i64::try_from(self.ttl.as_secs()).unwrap_or(i64::MAX);
        Ok(self.ask(REQUEST_MAX, self.client().lease_client().grant(ttl, None)).await?.id())
    }

    /// Writes the registration, unless another process has the name.
    async fn register(&self, registered: &Registered, lease: i64) -> Result<(), ClusterError> {
        let key = self.keys.member(&registered.node.name);
        let put = || {
            let options = PutOptions::new().with_lease(lease);
            TxnOp::put(key.as_str(), registered.to_json(), Some(options))
        };
        let free = Txn::new()
            .when([Compare::create_revision(key.as_str(), CompareOp::Equal, 0)])
            .and_then([put()])
            .or_else([TxnOp::get(key.as_str(), None)]);
        let mut client = self.client().kv_client();
        let failed = |error: Error| unavailable(&error);
        let answer = self.ask(REQUEST_MAX, client.txn(free)).await.map_err(failed)?;
        if answer.succeeded() {
            return Ok(());
        }
        let present = answer.op_responses().into_iter().find_map(|one| match one {
            TxnOpResponse::Get(found) => {
                let entry = found.kvs().first()?;
                let instance = Registered::from_json(entry.value())?.instance;
                Some((instance, entry.mod_revision()))
            }
            _ => None,
        });
        let taken = || ClusterError::NameTaken(registered.node.name.clone());
        let (_, revision) =
            present.filter(|(instance, _)| *instance == registered.instance).ok_or_else(taken)?;
        let same = Txn::new()
            .when([Compare::mod_revision(key.as_str(), CompareOp::Equal, revision)])
            .and_then([put()]);
        let answer = self.ask(REQUEST_MAX, client.txn(same)).await.map_err(failed)?;
        if answer.succeeded() { Ok(()) } else { Err(taken()) }
    }

    /// What is held is held from `sent` on for the time of a lease. Whoever was past its deadline has lost it for good.
    fn renewed(&self, sent: Instant) {
        if self.deadline.remaining().is_zero() {
            self.end_all();
        }
        self.deadline.renew(sent, self.ttl.saturating_sub(MARGIN));
    }

    /// Ends all that is held; it is given up when its owners let go of it.
    fn end_all(&self) {
        for (_, own) in std::mem::take(&mut *self.held.lock()).into_values() {
            own.end();
        }
    }

    /// Renews the lease once; asks the peers where etcd does not answer and the deadline is near. Whether it was renewed.
    async fn beat(&self, beat: &mut Beat) -> bool {
        let sent = Instant::now();
        let lease = self.lease.load(Ordering::Acquire);
        let renewed = match self.ask(self.ttl / 6, Box::pin(beat.renew(self, lease))).await {
            Ok(true) => {
                self.renewed(sent);
                return true;
            }
            Ok(false) => self.ask(self.ttl / 3, Box::pin(self.begin_again(sent))).await,
            Err(error) => Err(error),
        };
        beat.keeper = None;
        let Err(error) = renewed else { return true };
        metrics::counter!("fieldline_cluster_renewals_failed_total").increment(1);
        let remaining = self.deadline.remaining();
        // A deadline that has passed is not moved again.
        if !remaining.is_zero() {
            warn!(%error, ?remaining, "the lease of this node could not be renewed");
            if remaining < self.ttl / 2 {
                self.ask_peers().await;
            }
        }
        false
    }

    /// Goes on without etcd for one more beat where all other members say that it is gone for them too. All, not most: one that
    /// still reaches etcd sees our keys become free, and may take them.
    async fn ask_peers(&self) {
        let asked = Instant::now();
        let own = self.registered.lock().await.as_ref().map(|session| session.name.clone());
        let members = self.membership.borrow().members.clone();
        let others = members.into_iter().filter(|one| Some(&one.node.name) != own.as_ref());
        let mut asking = JoinSet::new();
        for one in others {
            let peers = Arc::clone(&self.peers);
            asking.spawn(async move {
                let answer = timeout(ASK_MAX, peers.without_cluster(&one.node)).await;
                answer.ok().flatten() == Some(true)
            });
        }
        let answers = asking.join_all().await;
        let all = !answers.is_empty() && answers.iter().all(|gone| *gone);
        if all && !self.deadline.remaining().is_zero() {
            self.deadline.renew(asked, self.ttl * WORD.0 / WORD.1);
            info!(
                peers = answers.len(),
                "etcd is gone for all: this node goes on with what it holds"
            );
        }
    }

    /// A new lease, after etcd ended ours or lost its data. What is still held here, and was taken by nobody, is taken back.
    async fn begin_again(&self, sent: Instant) -> Result<(), Error> {
        let session = self.registered.lock().await;
        let Some(registered) = session.as_ref().map(|session| session.registered.clone()) else {
            return Ok(());
        };
        self.read_generation().await?;
        let lease = self.grant().await?;
        self.lease.store(lease, Ordering::Release);
        if self.deadline.remaining().is_zero() {
            self.end_all();
        }
        match self.register(&registered, lease).await {
            Ok(()) => {}
            Err(ClusterError::Unavailable(text)) => return Err(Error::Internal(text)),
            Err(error) => warn!(%error, "this node has lost its name to another process"),
        }
        let held: Vec<(String, Held)> =
            self.held.lock().iter().map(|(key, (held, _))| (key.clone(), held.clone())).collect();
        let (all, mut lost) = (held.len(), 0);
        for some in held.chunks(REQUESTS_MAX) {
            let mut take_back = Vec::with_capacity(some.len());
            for (key, held) in some {
                take_back.push(self.take_back(key, held, lease));
            }
            for (taken, (key, held)) in join_all(take_back).await.into_iter().zip(some) {
                if !taken {
                    lost += 1;
                    let mut all = self.held.lock();
                    if let Some((_, own)) = all.get(key).filter(|(one, _)| one.nonce == held.nonce)
                    {
                        own.end();
                        all.remove(key);
                    }
                }
            }
        }
        self.renewed(sent);
        info!(held = all - lost, lost, "this node has a new lease");
        Ok(())
    }

    /// Writes a key that is held here, if nobody has it.
    async fn take_back(&self, key: &str, held: &Held, lease: i64) -> bool {
        let name = self.keys.held(key);
        let put = || {
            let options = PutOptions::new().with_lease(lease);
            TxnOp::put(name.as_str(), held.to_json(), Some(options))
        };
        let free = Compare::create_revision(name.as_str(), CompareOp::Equal, 0);
        // Or it is there yet, on the lease that ended.
        let ours =
            held.stored().map(|value| Compare::value(name.as_str(), CompareOp::Equal, value));
        for condition in std::iter::once(free).chain(ours) {
            let take = Txn::new().when([condition]).and_then([put()]);
            let answer = self.ask(REQUEST_MAX, self.client().kv_client().txn(take)).await;
            if answer.is_ok_and(|answer| answer.succeeded()) {
                return true;
            }
        }
        false
    }

    /// Takes from etcd what was given up. What could not be reached is tried again with the next beat.
    async fn give_up_released(&self) {
        let released = std::mem::take(&mut *self.releases.lock());
        for some in released.chunks(REQUESTS_MAX) {
            let mut give_up = Vec::with_capacity(some.len());
            for (key, held) in some {
                give_up.push(self.give_up(key, held));
            }
            for (done, one) in join_all(give_up).await.into_iter().zip(some) {
                if !done {
                    self.releases.lock().push(one.clone());
                }
            }
        }
    }

    /// Deletes a key if it is still this claim's.
    async fn give_up(&self, key: &str, held: &Held) -> bool {
        let name = self.keys.held(key);
        for value in held.stored() {
            let delete = Txn::new()
                .when([Compare::value(name.as_str(), CompareOp::Equal, value)])
                .and_then([TxnOp::delete(name.as_str(), None)]);
            if self.ask(REQUEST_MAX, self.client().kv_client().txn(delete)).await.is_err() {
                return false;
            }
        }
        true
    }
}

/// The stream over which a lease is renewed.
struct Beat {
    keeper: Option<(LeaseKeeper, LeaseKeepAliveStream)>,
    lease: i64,
}

impl Beat {
    /// False when etcd does not know the lease.
    async fn renew(&mut self, inner: &Inner, lease: i64) -> Result<bool, Error> {
        if self.lease != lease {
            self.keeper = None;
            self.lease = lease;
        }
        let Some((keeper, answers)) = &mut self.keeper else {
            // Opening the stream renews once.
            return match inner.client().lease_client().keep_alive(lease).await {
                Ok(keeper) => {
                    self.keeper = Some(keeper);
                    Ok(true)
                }
                Err(Error::LeaseKeepAliveError(_)) => Ok(false),
                Err(error) => Err(error),
            };
        };
        keeper.keep_alive().await?;
        let answer = answers.message().await?;
        let ended = || Error::Internal("etcd ended the stream of renewals".to_owned());
        Ok(answer.ok_or_else(ended)?.ttl() > 0)
    }
}
