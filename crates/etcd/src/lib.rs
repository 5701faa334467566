//! `Cluster` on etcd: members under leases, ownership with epochs, and watches that miss nothing.
//!
//! A node has one lease, which it renews each second and which ends three seconds after the last time. Its registration and
//! all that it owns hang on it, so that all are gone at once when it dies. On its own clock they end earlier, counted from
//! when the renewal was sent, and whoever slept through the end has lost them for good.
//!
//! While etcd cannot be reached nothing is placed anew: members stay as last known, and when etcd is back everything rests
//! for the length of a lease, so that those who were cut off can come back first. What a node owns ends at its deadline,
//! unless every other member, asked directly, says that etcd is gone for it too: then nobody can have taken it.
//!
//! Start reading at [`EtcdCluster::connect`]. Only this crate imports the client of etcd.

mod epochs;
mod error;
mod examine;
mod keys;
mod session;
mod view;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, Error, GetOptions, Identity,
    PutOptions, TlsOptions, Txn, TxnOp,
};
use fieldline_contracts::{
    Clock, Cluster, ClusterError, Deadline, Holder, Lease, Membership, Node, Peers, Watchdog,
};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

pub use crate::error::ConnectError;
use crate::error::{in_time, unavailable};
pub use crate::examine::{Examined, examine};
use crate::keys::{Held, Keys};

/// Longest that one request may take.
const REQUEST_MAX: Duration = Duration::from_secs(1);
/// Longest that the first contact may take.
const CONNECT_MAX: Duration = Duration::from_secs(3);
/// Least time that a member of etcd is asked before another is.
const CHOICE_MIN: Duration = Duration::from_millis(300);
/// Wait between two tries of it.
const CONNECT_AGAIN: Duration = Duration::from_millis(100);

/// Where etcd is and how it is used.
#[derive(Clone)]
pub struct Config {
    /// Its members, such as `http://10.0.0.1:2379`; `https` with [`Config::tls`].
    pub endpoints: Vec<String>,
    /// Before all keys, such as `fieldline/`: installations may share one etcd.
    pub prefix: String,
    /// How long what a dead node held stays taken; 2 seconds or more.
    pub ttl: Duration,
    /// Name and password, where etcd asks for them.
    pub user: Option<(String, String)>,
    /// Certificates, for `https`.
    pub tls: Option<Tls>,
}

impl std::fmt::Debug for Config {
    /// Without the password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Config({}, {})", self.endpoints.join(", "), self.prefix)
    }
}

impl Config {
    /// The usual settings for these endpoints.
    #[must_use]
    pub fn new(endpoints: Vec<String>) -> Self {
        let (prefix, ttl) = ("fieldline/".to_owned(), Duration::from_secs(3));
        Self { endpoints, prefix, ttl, user: None, tls: None }
    }
}

/// Certificates in PEM.
#[derive(Clone)]
pub struct Tls {
    /// Who may have signed etcd's.
    pub authority: Vec<u8>,
    /// Our own certificate and its key, where etcd asks for one.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls(…)")
    }
}

/// A node of a cluster on etcd. Dropping it stops its renewals: what it held is free when its lease ends.
pub struct EtcdCluster {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    /// One for each member of etcd: a client of several would go on giving requests to a dead one.
    clients: Vec<Client>,
    /// Which of them is asked.
    current: AtomicUsize,
    /// When another was last chosen.
    chosen: Mutex<Option<Instant>>,
    keys: Keys,
    ttl: Duration,
    clock: Arc<dyn Clock>,
    peers: Arc<dyn Peers>,
    runtime: Handle,
    /// The end of all that this node holds.
    deadline: Arc<Deadline>,
    /// Its lease; 0 while it has none.
    lease: AtomicI64,
    /// What it said of itself. Held while the session changes.
    registered: tokio::sync::Mutex<Option<session::Session>>,
    /// What it holds, by key.
    held: Mutex<BTreeMap<String, (Held, Arc<Deadline>)>>,
    /// What was given up and is not yet known to be gone: at most what was held.
    releases: Mutex<Vec<(String, Held)>>,
    released: Notify,
    /// Minutes in which the keyspace was made; see [`epochs`].
    generation: AtomicU64,
    membership: watch::Sender<Arc<Membership>>,
    /// How often another node was told that etcd is gone here.
    told_gone: watch::Sender<u64>,
    handed_over: watch::Sender<u64>,
    stop: CancellationToken,
}

impl Drop for EtcdCluster {
    fn drop(&mut self) {
        self.inner.stop.cancel();
        self.inner.deadline.end();
    }
}

/// How each member is connected to.
pub(crate) fn options(config: &Config) -> ConnectOptions {
    let mut options = ConnectOptions::new()
        .with_connect_timeout(REQUEST_MAX)
        .with_keep_alive(REQUEST_MAX, REQUEST_MAX)
        .with_keep_alive_while_idle(true)
        .with_require_leader(true);
    if let Some((name, password)) = &config.user {
        options = options.with_user(name, password);
    }
    if let Some(Tls { authority, identity }) = &config.tls {
        let mut with = TlsOptions::new().ca_certificate(Certificate::from_pem(authority));
        if let Some((certificate, key)) = identity {
            with = with.identity(Identity::from_pem(certificate, key));
        }
        options = options.with_tls(with);
    }
    options
}

impl EtcdCluster {
    /// Connects and begins to watch. It is no member until it joins.
    ///
    /// `peers` asks other nodes whether etcd is gone for them too. Must be called on a tokio runtime, which then runs what goes
    /// on in the background.
    ///
    /// # Errors
    ///
    /// [`ConnectError`] says what is wrong and how to mend it.
    pub async fn connect(
        config: Config,
        clock: Arc<dyn Clock>,
        peers: Arc<dyn Peers>,
    ) -> Result<Self, ConnectError> {
        let places = config.endpoints.join(", ");
        let options = options(&config);
        let refused = |error: Error| ConnectError::new(&places, &error);
        let began = Instant::now();
        let mut clients = Vec::with_capacity(config.endpoints.len());
        let mut last = None;
        for endpoint in &config.endpoints {
            // Where etcd asks for a name this signs in; else the first request connects.
            let connect = Client::connect([endpoint], Some(options.clone()));
            match timeout(CONNECT_MAX, connect).await {
                Ok(Ok(client)) => clients.push(client),
                Ok(Err(error)) if error::may_pass(&error) => last = Some(error),
                Ok(Err(error)) => return Err(refused(error)),
                Err(_) => {}
            }
        }
        if clients.is_empty() {
            let reason = "it took the connection and said nothing".to_owned();
            let silent = ConnectError::Silent { places: places.clone(), reason };
            return Err(last.map_or(silent, refused));
        }
        let inner = Arc::new(Inner {
            clients,
            current: AtomicUsize::new(0),
            chosen: Mutex::new(None),
            keys: Keys::under(&config.prefix),
            ttl: config.ttl.max(Duration::from_secs(2)),
            clock,
            peers,
            runtime: Handle::current(),
            deadline: Arc::new(Deadline::new()),
            lease: AtomicI64::new(0),
            registered: tokio::sync::Mutex::new(None),
            held: Mutex::default(),
            releases: Mutex::default(),
            released: Notify::new(),
            generation: AtomicU64::new(0),
            membership: watch::Sender::new(Arc::default()),
            told_gone: watch::Sender::new(0),
            handed_over: watch::Sender::new(0),
            stop: CancellationToken::new(),
        });
        // A request may go to a member that is dead: another may answer.
        while let Err(error) = inner.read_generation().await {
            if !error::may_pass(&error) || began.elapsed() > CONNECT_MAX {
                return Err(refused(error));
            }
            tokio::time::sleep(CONNECT_AGAIN).await;
        }
        tokio::spawn(view::follow(Arc::downgrade(&inner), inner.stop.clone()));
        Ok(Self { inner })
    }

    /// Has `watchdog` see to it that what this node owns stops when its lease has ended. To be called before it joins.
    pub fn guard_by(&self, watchdog: Arc<dyn Watchdog>) {
        self.inner.deadline.guard_by(watchdog);
    }
}

impl Inner {
    /// The member of etcd that is asked now.
    pub(crate) fn client(&self) -> Client {
        let current = self.current.load(Ordering::Acquire) % self.clients.len();
        #[allow(clippy::indexing_slicing, reason = "it is below the length, which is at least one")]
        self.clients[current].clone()
    }

    /// Asks, for `most` at longest. Where no answer comes another member is asked the next time.
    pub(crate) async fn ask<T>(
        &self,
        most: Duration,
        request: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let answer = in_time(most, request).await;
        if answer.as_ref().err().is_some_and(error::may_pass) {
            self.choose_another();
        }
        answer
    }

    fn choose_another(&self) {
        let mut chosen = self.chosen.lock();
        // Many requests may fail for one reason.
        if chosen.is_none_or(|chosen| chosen.elapsed() >= CHOICE_MIN) {
            *chosen = Some(Instant::now());
            self.current.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Claims a key in a task of its own, so that what a caller who has gone away got is given up again.
    async fn claim(self: Arc<Self>, key: String) -> Result<Option<Lease>, ClusterError> {
        let lease = self.lease.load(Ordering::Acquire);
        let Some(node) = self.registered.lock().await.as_ref().map(|one| one.name.clone()) else {
            return Err(ClusterError::NotJoined);
        };
        if self.deadline.remaining().is_zero() {
            return Err(ClusterError::Unavailable(
                "this node's lease could not be renewed".to_owned(),
            ));
        }
        // Others may go on with what they hold because this node told them that etcd is gone: until it has rested, nothing
        // is claimed here.
        let mut membership = self.membership.subscribe();
        let fresh = timeout(REQUEST_MAX, membership.wait_for(|all| all.fresh)).await;
        if !matches!(fresh, Ok(Ok(_))) {
            return Err(resting());
        }
        drop(fresh);
        let held = Held { node, nonce: rand::random(), epoch: None };
        let name = self.keys.held(&key);
        let take = Txn::new()
            .when([
                Compare::create_revision(name.as_str(), CompareOp::Equal, 0),
                // While the keyspace is young, those who held keys before it was lost take them back.
                Compare::create_revision(self.keys.young.as_str(), CompareOp::Equal, 0),
            ])
            .and_then([TxnOp::put(
                name.as_str(),
                held.to_json(),
                Some(PutOptions::new().with_lease(lease)),
            )]);
        let generation = self.generation.load(Ordering::Acquire);
        match self.ask(REQUEST_MAX, self.client().kv_client().txn(take)).await {
            Ok(answer) if answer.succeeded() => {
                let revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
                let epoch = epochs::epoch(generation, revision);
                let own = Arc::new(Deadline::never());
                let held = Held { epoch: Some(epoch), ..held };
                self.held.lock().insert(key.clone(), (held.clone(), Arc::clone(&own)));
                // Lost between the claim and now: those who end all that is held may not have seen it.
                if self.lease.load(Ordering::Acquire) != lease {
                    own.end();
                }
                let release = Release { inner: Arc::clone(&self), key: key.clone(), held };
                let node = Arc::clone(&self.deadline);
                let lease = Lease::new(key, epoch, node, own, Box::new(release));
                // Another node was told meanwhile; this one is given up again.
                if !self.membership.borrow().fresh {
                    return Err(resting());
                }
                Ok(Some(lease))
            }
            Ok(_) => Ok(None),
            Err(error) => {
                // It may have been carried out: then it is ours, and nobody's.
                self.release(key, held);
                Err(unavailable(&error))
            }
        }
    }

    async fn holders(
        &self,
        prefix: &str,
        options: GetOptions,
    ) -> Result<BTreeMap<String, Holder>, ClusterError> {
        let (prefix, generation) =
            (self.keys.held(prefix), self.generation.load(Ordering::Acquire));
        let mut client = self.client().kv_client();
        let read = client.get(prefix.as_str(), Some(options.with_prefix()));
        let answer = self.ask(REQUEST_MAX, read).await.map_err(|error| unavailable(&error))?;
        let holders = answer.kvs().iter().filter_map(|entry| {
            let (key, held) = (self.keys.of_held(entry.key())?, Held::from_json(entry.value())?);
            let epoch = held.epoch.unwrap_or(epochs::epoch(generation, entry.create_revision()));
            Some((key.to_owned(), Holder { node: held.node, epoch }))
        });
        Ok(holders.collect())
    }

    /// Gives a key up as soon as etcd answers.
    fn release(&self, key: String, held: Held) {
        self.held.lock().retain(|name, (one, _)| *name != key || one.nonce != held.nonce);
        self.releases.lock().push((key, held));
        self.released.notify_one();
    }
}

fn resting() -> ClusterError {
    ClusterError::Unavailable(
        "etcd was away for this node: it claims nothing until etcd has answered for the time of a lease"
            .to_owned(),
    )
}

/// Gives a key up when its lease is dropped.
struct Release {
    inner: Arc<Inner>,
    key: String,
    held: Held,
}

impl Drop for Release {
    fn drop(&mut self) {
        self.inner.release(std::mem::take(&mut self.key), self.held.clone());
    }
}

#[async_trait]
impl Cluster for EtcdCluster {
    async fn join(&self, node: Node) -> Result<(), ClusterError> {
        self.inner.join(node).await
    }

    async fn leave(&self) {
        self.inner.leave().await;
    }

    fn membership(&self) -> watch::Receiver<Arc<Membership>> {
        self.inner.membership.subscribe()
    }

    async fn claim(&self, key: &str) -> Result<Option<Lease>, ClusterError> {
        let inner = Arc::clone(&self.inner);
        let claim = self.inner.runtime.spawn(inner.claim(key.to_owned()));
        claim.await.map_err(|error| ClusterError::Unavailable(error.to_string()))?
    }

    async fn holders(&self, prefix: &str) -> Result<BTreeMap<String, Holder>, ClusterError> {
        self.inner.holders(prefix, GetOptions::new()).await
    }

    async fn first_holders(
        &self,
        prefix: &str,
        limit: usize,
    ) -> Result<BTreeMap<String, Holder>, ClusterError> {
        // For etcd no limit is 0.
        if limit == 0 {
            return Ok(BTreeMap::new());
        }
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        self.inner.holders(prefix, GetOptions::new().with_limit(limit)).await
    }

    fn handed_over(&self) -> watch::Receiver<u64> {
        self.inner.handed_over.subscribe()
    }

    async fn is_gone(&self) -> bool {
        self.inner.is_gone().await
    }
}
