//! `Cluster`: who is there, and who owns what.
//!
//! What must run once is owned: a module, a trigger, a schedule, a compaction. An owner holds a [`Lease`], a key with
//! an epoch that grows with every change of hands. Two things keep a former owner from doing harm: stores refuse what
//! an older epoch writes, and the lease itself ends at its deadline on the owner's own clock, whether or not the
//! cluster can be reached. Ask [`Lease::is_held`] before every act whose effect is outside, and drop the lease as soon as it is
//! lost: a [`Watchdog`] ends a process that keeps one for longer than [`GRACE`].

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use fieldline_model::placement::Epoch;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;

/// A process of the cluster, as it registers itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its name, unique in the cluster and the same after a restart.
    pub name: String,
    /// Where other nodes reach it, such as `https://node-1:7080`.
    pub address: String,
    /// What it does, such as `gateway`.
    pub roles: Vec<String>,
    /// The zone of failure that it is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// The version of its program.
    pub version: String,
    /// Whether it takes work. One that drains is there, and not ready.
    pub ready: bool,
}

/// A node that is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Member {
    /// What it says of itself.
    #[serde(flatten)]
    pub node: Node,
    /// Grows with each time that a node of this name joins.
    pub epoch: Epoch,
}

/// Who is there, as far as this node knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Membership {
    /// All members, in order of names.
    pub members: Vec<Member>,
    /// Whether the cluster answers. While it does not, `members` are those last known and nothing is placed anew: a
    /// fleet is never dropped because discovery is empty.
    pub fresh: bool,
}

impl Membership {
    /// Names of the ready members that have a role.
    pub fn ready<'a>(&'a self, role: &'a str) -> impl Iterator<Item = &'a str> {
        let has = move |node: &Node| node.ready && node.roles.iter().any(|one| one == role);
        self.members.iter().filter(move |one| has(&one.node)).map(|one| one.node.name.as_str())
    }
}

/// Who owns a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The node.
    pub node: String,
    /// Since which epoch.
    pub epoch: Epoch,
}

/// Why the cluster refused.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// It cannot be reached. What is held stays held until its deadline.
    #[error("the cluster cannot be reached: {0}")]
    Unavailable(String),
    /// This node has not joined, or has left.
    #[error("this node is not a member: join first")]
    NotJoined,
    /// Another process that lives has this node's name.
    #[error(
        "another process is member of the cluster by the name `{0}`: give each node a name of its own (`node.name`, `--node`), or end the other"
    )]
    NameTaken(String),
}

/// How long what is owned may go on after its [`Deadline`] until a [`Watchdog`] ends the process. Backends set the deadline
/// earlier than others may take over, by more than this.
pub const GRACE: Duration = Duration::from_millis(400);

/// Ends this process where what it owns goes on after its lease, be it that a thread is stalled or that the whole process is
/// stopped: it must not depend on the owner being awake.
pub trait Watchdog: Send + Sync + 'static {
    /// All that is owned is held for `held` from now on: the process ends [`GRACE`] after that, unless this is called again.
    /// Zero twice does not begin the grace anew. `None`: nothing is owned.
    fn set(&self, held: Option<Duration>);
}

/// The end of all that a node holds, on its own clock. Backends move it with every renewal.
#[derive(Debug)]
pub struct Deadline {
    origin: Instant,
    /// Microseconds after `origin`.
    until: AtomicU64,
    moved: watch::Sender<()>,
    guarded: Mutex<Guarded>,
    /// The node's, for the deadline of one lease that was not dropped. Locked before `guarded` of the node's.
    node: Mutex<Option<Arc<Deadline>>>,
}

/// What a watchdog is told of.
#[derive(Default)]
struct Guarded {
    watchdog: Option<Arc<dyn Watchdog>>,
    /// Leases that were not dropped.
    leases: usize,
    /// Of these, those that ended before the node's deadline.
    ended: usize,
}

impl std::fmt::Debug for Guarded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Guarded({} leases, {} ended)", self.leases, self.ended)
    }
}

impl Deadline {
    /// One that is past until it is moved.
    #[must_use]
    pub fn new() -> Self {
        Self {
            origin: Instant::now(),
            until: AtomicU64::new(0),
            moved: watch::Sender::new(()),
            guarded: Mutex::default(),
            node: Mutex::new(None),
        }
    }

    /// One that never comes.
    #[must_use]
    pub fn never() -> Self {
        let deadline = Self::new();
        deadline.until.store(u64::MAX, Ordering::Release);
        deadline
    }

    /// Puts it `after` from `from` on. `from` is when the renewal was sent, not when it was answered.
    pub fn renew(&self, from: Instant, after: Duration) {
        let until = from.saturating_duration_since(self.origin).saturating_add(after);
        self.until.store(u64::try_from(until.as_micros()).unwrap_or(u64::MAX), Ordering::Release);
        self.moved.send_replace(());
        self.count(|_| {});
    }

    /// Ends it now.
    pub fn end(&self) {
        {
            let node = self.node.lock();
            let before = self.until.swap(0, Ordering::AcqRel);
            if let Some(node) = node.as_ref().filter(|_| before != 0) {
                node.count(|guarded| guarded.ended += 1);
            }
        }
        self.moved.send_replace(());
        self.count(|_| {});
    }

    /// Has `watchdog` see to it that leases which end with this deadline are dropped in time.
    pub fn guard_by(&self, watchdog: Arc<dyn Watchdog>) {
        self.count(|guarded| guarded.watchdog = Some(watchdog));
    }

    /// Notes a change of what is owned, or of the deadline, and tells the watchdog.
    fn count(&self, change: impl FnOnce(&mut Guarded)) {
        let mut guarded = self.guarded.lock();
        change(&mut guarded);
        let Some(watchdog) = &guarded.watchdog else { return };
        watchdog.set(match (guarded.leases, guarded.ended) {
            (0, _) => None,
            (_, 0) => Some(self.remaining()),
            _ => Some(Duration::ZERO),
        });
    }

    /// Counts a lease whose own deadline this is.
    fn attach(&self, node: &Arc<Self>) {
        let mut of = self.node.lock();
        let ended = self.until.load(Ordering::Acquire) == 0;
        node.count(|guarded| {
            guarded.leases += 1;
            guarded.ended += usize::from(ended);
        });
        *of = Some(Arc::clone(node));
    }

    /// Counts it no more.
    fn detach(&self) {
        let mut of = self.node.lock();
        let Some(node) = of.take() else { return };
        let ended = self.until.load(Ordering::Acquire) == 0;
        node.count(|guarded| {
            guarded.leases -= 1;
            guarded.ended -= usize::from(ended);
        });
    }

    /// How long until it comes.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        let until = Duration::from_micros(self.until.load(Ordering::Acquire));
        until.saturating_sub(self.origin.elapsed())
    }

    /// Waits until it has come. Cancel-safe.
    pub async fn passed(&self) {
        let mut moved = self.moved.subscribe();
        loop {
            moved.borrow_and_update();
            let remaining = self.remaining();
            if remaining.is_zero() {
                return;
            }
            // Either it moved or it is time to look again.
            tokio::time::timeout(remaining, moved.changed()).await.map(|_| ()).unwrap_or_default();
        }
    }
}

impl Default for Deadline {
    fn default() -> Self {
        Self::new()
    }
}

/// Ownership of a key. Dropping it gives the key up.
pub struct Lease {
    key: String,
    epoch: Epoch,
    node: Arc<Deadline>,
    own: Arc<Deadline>,
    /// Gives the key up when dropped.
    guard: Box<dyn Send + Sync>,
    _counted: Counted,
}

/// Counts a lease for the watchdog until it is dropped.
struct Counted(Arc<Deadline>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.detach();
    }
}

impl Lease {
    /// A lease that ends with the node's deadline, or with its own: a backend ends that one to end it alone.
    #[must_use]
    pub fn new(
        key: String,
        epoch: Epoch,
        node: Arc<Deadline>,
        own: Arc<Deadline>,
        guard: Box<dyn Send + Sync>,
    ) -> Self {
        own.attach(&node);
        let counted = Counted(Arc::clone(&own));
        Self { key, epoch, node, own, guard, _counted: counted }
    }

    /// What is owned.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// What stores are given with every write.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether it is still held, by this node's clock. It may end right after: act at once, or with a deadline of
    /// [`Lease::remaining`].
    #[must_use]
    pub fn is_held(&self) -> bool {
        !self.remaining().is_zero()
    }

    /// How long it is held for certain.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.node.remaining().min(self.own.remaining())
    }

    /// Waits until it is held no more. Cancel-safe.
    pub async fn lost(&self) {
        tokio::select! {
            () = self.node.passed() => {}
            () = self.own.passed() => {}
        }
    }

    /// Gives the key up.
    pub fn release(self) {
        self.own.end();
        drop(self.guard);
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lease({} at {})", self.key, self.epoch)
    }
}

/// Members and ownership.
#[async_trait]
pub trait Cluster: Send + Sync + 'static {
    /// Registers this process, or changes what it said of itself. It stays registered until it leaves or dies.
    ///
    /// # Errors
    ///
    /// [`ClusterError::Unavailable`], [`ClusterError::NameTaken`].
    async fn join(&self, node: Node) -> Result<(), ClusterError>;

    /// Gives up all that is held and the membership: others need not wait for a deadline.
    async fn leave(&self);

    /// Who is there; changes are seen at once.
    fn membership(&self) -> watch::Receiver<Arc<Membership>>;

    /// Takes a key that nobody holds; `None` where somebody does, be it this node.
    ///
    /// Of several that try at once exactly one succeeds. The epoch is greater than any that was given for any key.
    /// Cancel-safe: a key that was taken for a dropped future is given up.
    ///
    /// # Errors
    ///
    /// [`ClusterError::Unavailable`], [`ClusterError::NotJoined`].
    async fn claim(&self, key: &str) -> Result<Option<Lease>, ClusterError>;

    /// Who holds the keys that begin with `prefix`.
    ///
    /// # Errors
    ///
    /// [`ClusterError::Unavailable`].
    async fn holders(&self, prefix: &str) -> Result<BTreeMap<String, Holder>, ClusterError>;

    /// Who holds the first `limit` keys, in order of keys, of those that begin with `prefix`.
    ///
    /// # Errors
    ///
    /// [`ClusterError::Unavailable`].
    async fn first_holders(
        &self,
        prefix: &str,
        limit: usize,
    ) -> Result<BTreeMap<String, Holder>, ClusterError>;

    /// Changes whenever a key may have changed hands: then ask [`Cluster::holders`] again.
    fn handed_over(&self) -> watch::Receiver<u64>;

    /// Tries whether the store of the cluster is out of this node's reach, for another node that asks. Who says so
    /// claims nothing until it has reached the store again and has rested since for the time of a lease: the other
    /// goes on with what it holds, on the strength of that.
    async fn is_gone(&self) -> bool;
}

/// Asks other nodes directly, past the cluster's store.
#[async_trait]
pub trait Peers: Send + Sync + 'static {
    /// Whether the store of the cluster is gone for `node` too, as its [`Cluster::is_gone`] says; `None` where it gives
    /// no answer.
    async fn without_cluster(&self, node: &Node) -> Option<bool>;
}

/// Nobody to ask: what is held ends at its deadline.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoPeers;

#[async_trait]
impl Peers for NoPeers {
    async fn without_cluster(&self, _node: &Node) -> Option<bool> {
        None
    }
}

/// Longest wait between two tries of [`hold`], if no sign of a change comes.
const CLAIM_AGAIN: Duration = Duration::from_secs(1);

/// Waits until `key` is ours. Cancel-safe. Who campaigns to lead holds the key of what is led.
///
/// # Errors
///
/// [`ClusterError::NotJoined`]. It waits for as long as the cluster cannot be reached.
pub async fn hold(cluster: &dyn Cluster, key: &str) -> Result<Lease, ClusterError> {
    let mut changes = cluster.handed_over();
    loop {
        changes.borrow_and_update();
        match cluster.claim(key).await {
            Ok(Some(lease)) => return Ok(lease),
            Ok(None) | Err(ClusterError::Unavailable(_)) => {}
            Err(error) => return Err(error),
        }
        // Either something changed hands or it is time to try again.
        tokio::time::timeout(CLAIM_AGAIN, changes.changed()).await.map(|_| ()).unwrap_or_default();
    }
}

/// A cluster within this process. Each [`MemoryCluster`] is one node of it; clones of [`MemoryCluster::beside`] are others.
pub struct MemoryCluster {
    shared: Arc<Shared>,
    deadline: Arc<Deadline>,
    joined: Mutex<Option<String>>,
}

struct Shared {
    state: Mutex<Keys>,
    membership: watch::Sender<Arc<Membership>>,
    handed_over: watch::Sender<u64>,
}

#[derive(Default)]
struct Keys {
    epoch: u64,
    held: HashMap<String, Holder>,
}

impl MemoryCluster {
    /// A cluster without members.
    #[must_use]
    pub fn new() -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            membership: watch::Sender::new(Arc::new(Membership {
                members: Vec::new(),
                fresh: true,
            })),
            handed_over: watch::Sender::new(0),
        });
        Self::of(shared)
    }

    /// Another node of the same cluster.
    #[must_use]
    pub fn beside(&self) -> Self {
        Self::of(Arc::clone(&self.shared))
    }

    fn of(shared: Arc<Shared>) -> Self {
        Self { shared, deadline: Arc::new(Deadline::never()), joined: Mutex::new(None) }
    }
}

impl Default for MemoryCluster {
    fn default() -> Self {
        Self::new()
    }
}

impl Shared {
    fn change(&self, change: impl FnOnce(&mut Vec<Member>)) {
        self.membership.send_modify(|membership| {
            let mut members = membership.members.clone();
            change(&mut members);
            members.sort_by(|a, b| a.node.name.cmp(&b.node.name));
            *membership = Arc::new(Membership { members, fresh: true });
        });
    }

    fn release(&self, key: &str, epoch: Epoch) {
        let mut state = self.state.lock();
        if state.held.get(key).is_some_and(|holder| holder.epoch == epoch) {
            state.held.remove(key);
            drop(state);
            self.handed_over.send_modify(|changes| *changes += 1);
        }
    }
}

struct Release {
    shared: Arc<Shared>,
    key: String,
    epoch: Epoch,
}

impl Drop for Release {
    fn drop(&mut self) {
        self.shared.release(&self.key, self.epoch);
    }
}

#[async_trait]
impl Cluster for MemoryCluster {
    async fn join(&self, node: Node) -> Result<(), ClusterError> {
        let mut joined = self.joined.lock();
        let members = &self.shared.membership.borrow().members.clone();
        let present = members.iter().find(|member| member.node.name == node.name);
        let own = joined.as_ref().is_some_and(|name| *name == node.name);
        if present.is_some() && !own {
            return Err(ClusterError::NameTaken(node.name));
        }
        let epoch = present.map_or_else(
            || {
                let mut state = self.shared.state.lock();
                state.epoch += 1;
                Epoch(state.epoch)
            },
            |member| member.epoch,
        );
        let before = joined.replace(node.name.clone());
        self.deadline.renew(Instant::now(), Duration::MAX);
        self.shared.change(|members| {
            members.retain(|one| {
                one.node.name != node.name && Some(&one.node.name) != before.as_ref()
            });
            members.push(Member { node, epoch });
        });
        Ok(())
    }

    async fn leave(&self) {
        let Some(name) = self.joined.lock().take() else { return };
        self.deadline.end();
        self.shared.state.lock().held.retain(|_, holder| holder.node != name);
        self.shared.change(|members| members.retain(|one| one.node.name != name));
        self.shared.handed_over.send_modify(|changes| *changes += 1);
    }

    fn membership(&self) -> watch::Receiver<Arc<Membership>> {
        self.shared.membership.subscribe()
    }

    async fn claim(&self, key: &str) -> Result<Option<Lease>, ClusterError> {
        let node = self.joined.lock().clone().ok_or(ClusterError::NotJoined)?;
        let epoch = {
            let mut state = self.shared.state.lock();
            if state.held.contains_key(key) {
                return Ok(None);
            }
            state.epoch += 1;
            let epoch = Epoch(state.epoch);
            state.held.insert(key.to_owned(), Holder { node, epoch });
            epoch
        };
        self.shared.handed_over.send_modify(|changes| *changes += 1);
        let release = Release { shared: Arc::clone(&self.shared), key: key.to_owned(), epoch };
        let (node, own) = (Arc::clone(&self.deadline), Arc::new(Deadline::never()));
        Ok(Some(Lease::new(key.to_owned(), epoch, node, own, Box::new(release))))
    }

    async fn holders(&self, prefix: &str) -> Result<BTreeMap<String, Holder>, ClusterError> {
        let state = self.shared.state.lock();
        let held = state.held.iter().filter(|(key, _)| key.starts_with(prefix));
        Ok(held.map(|(key, holder)| (key.clone(), holder.clone())).collect())
    }

    async fn first_holders(
        &self,
        prefix: &str,
        limit: usize,
    ) -> Result<BTreeMap<String, Holder>, ClusterError> {
        Ok(self.holders(prefix).await?.into_iter().take(limit).collect())
    }

    fn handed_over(&self) -> watch::Receiver<u64> {
        self.shared.handed_over.subscribe()
    }

    async fn is_gone(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Notes what it was last told.
    #[derive(Default)]
    struct Told(Mutex<Option<Duration>>);

    impl Watchdog for Told {
        fn set(&self, held: Option<Duration>) {
            *self.0.lock() = held;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_watchdog_knows_whether_and_for_how_long_something_is_owned() {
        let (node, told) = (Arc::new(Deadline::new()), Arc::new(Told::default()));
        node.guard_by(Arc::clone(&told) as Arc<dyn Watchdog>);
        let after = Duration::from_secs(3);
        node.renew(Instant::now(), after);
        let says = || *told.0.lock();
        assert_eq!(says(), None, "nothing is owned");
        let lease = |own: &Arc<Deadline>| {
            let (node, own) = (Arc::clone(&node), Arc::clone(own));
            Lease::new("key".to_owned(), Epoch(1), node, own, Box::new(()))
        };
        let (first, second) = (Arc::new(Deadline::never()), Arc::new(Deadline::never()));
        let (one, two) = (lease(&first), lease(&second));
        assert_eq!(says(), Some(after));
        tokio::time::advance(Duration::from_secs(1)).await;
        drop(two);
        assert_eq!(says(), Some(Duration::from_secs(2)));
        node.renew(Instant::now(), after);
        assert_eq!(says(), Some(after));
        // One that was lost alone has to be let go of, whatever is renewed.
        second.end();
        assert_eq!(says(), Some(after), "it was dropped before");
        first.end();
        first.end();
        node.renew(Instant::now(), after);
        assert_eq!(says(), Some(Duration::ZERO));
        let third = Arc::new(Deadline::never());
        let three = lease(&third);
        assert_eq!(says(), Some(Duration::ZERO));
        drop(one);
        assert_eq!(says(), Some(after));
        three.release();
        assert_eq!(says(), None);
        assert!(!format!("{node:?}").contains("ended: 1"));
    }
}
