//! Ownership of many keys, spread over the nodes that are ready: the way in which every service that must run things
//! once holds them.
//!
//! A service says which keys there are and what to run for one; [`Ownership::run`] claims those that rendezvous hashing
//! places here, runs them for as long as they are held, and hands over, a few at a time, what belongs elsewhere since a
//! node came. Keys of a node that is gone are taken at once. While the cluster cannot be reached nothing moves.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use fieldline_model::placement::Rebalance;
use serde::Serialize;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{Cluster, ClusterError, Holder, Lease};

/// Longest wait between two looks at who holds what, if no sign of a change comes.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How long changes are gathered before looking: a node that goes takes many keys with it.
const GATHER: Duration = Duration::from_millis(20);
/// Wait before what has ended by itself is run again.
const RUN_AGAIN: Duration = Duration::from_secs(1);
/// Claims that wait for the cluster's answer at a time.
const CLAIMS_MAX: usize = 32;

/// How far the keys of a role are where they belong.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// Keys there are.
    pub keys: usize,
    /// Keys that this node holds.
    pub held: usize,
    /// Keys that nobody holds.
    pub orphans: usize,
    /// Keys that belong elsewhere than where they are.
    pub misplaced: usize,
    /// Whether nothing moves because the cluster cannot be reached.
    pub frozen: bool,
}

/// What spreads keys, and how gently.
#[derive(Clone, Debug)]
pub struct Ownership {
    /// Before each key in the cluster, such as `modules/`.
    pub prefix: String,
    /// The role whose ready members share the keys.
    pub role: String,
    /// The name of this node.
    pub node: String,
    /// Keys that this node hands over at a time; the next follow when those have new owners.
    pub moves_max: usize,
    /// How long what runs for a key may take to end once it is told to; then it is dropped.
    pub stop_max: Duration,
}

/// Runs one key: until it is told to stop, or by itself, which gives the key up and takes it again.
///
/// It must ask [`Lease::is_held`] before what it does outside, and give [`Lease::epoch`] to stores. When the lease is lost
/// its future is dropped at once, without being asked.
pub trait Work: Send + Sync + 'static {
    /// Runs until `stop` is cancelled.
    fn run(
        &self,
        key: String,
        lease: Arc<Lease>,
        stop: CancellationToken,
    ) -> impl Future<Output = ()> + Send;
}

struct Running {
    stop: CancellationToken,
    /// Told to stop because it belongs elsewhere.
    leaving: bool,
}

impl Ownership {
    /// Holds keys until `shutdown`, then gives all up. `keys` are without the prefix. How it stands is seen in `progress`.
    ///
    /// Dropping the future drops all that runs and gives its keys up.
    pub async fn run(
        self,
        cluster: Arc<dyn Cluster>,
        mut keys: watch::Receiver<Arc<BTreeSet<String>>>,
        work: Arc<impl Work>,
        progress: watch::Sender<Progress>,
        shutdown: CancellationToken,
    ) {
        let mut membership = cluster.membership();
        let mut handed_over = cluster.handed_over();
        let mut running: BTreeMap<String, Running> = BTreeMap::new();
        let mut tasks: JoinSet<String> = JoinSet::new();
        loop {
            let wanted = Arc::clone(&keys.borrow_and_update());
            let members = Arc::clone(&membership.borrow_and_update());
            handed_over.borrow_and_update();
            let nodes: BTreeSet<String> = members.ready(&self.role).map(str::to_owned).collect();
            match cluster.holders(&self.prefix).await {
                Ok(holders) if members.fresh => {
                    let holders = self.holders(&wanted, holders);
                    for (key, one) in &mut running {
                        if !wanted.contains(key) {
                            one.stop.cancel();
                        }
                    }
                    let plan = Rebalance::plan(&holders, &nodes);
                    self.hand_over(&plan, &mut running);
                    self.claim(&plan, &cluster, &work, &mut running, &mut tasks).await;
                    let orphans = plan.moves().iter().filter(|one| one.from.is_none()).count();
                    progress.send_replace(Progress {
                        keys: wanted.len(),
                        held: running.len(),
                        orphans,
                        misplaced: plan.moves().len() - orphans,
                        frozen: false,
                    });
                }
                // Nothing moves. What is held ends at its own deadline.
                Ok(_) | Err(_) => {
                    progress.send_modify(|progress| {
                        progress.frozen = true;
                        progress.held = running.len();
                    });
                }
            }
            tokio::select! {
                () = shutdown.cancelled() => break,
                // An error says that nobody will change it any more: that wakes nobody.
                Ok(()) = keys.changed() => {}
                Ok(()) = membership.changed() => {}
                Ok(()) = handed_over.changed() => {}
                Some(ended) = tasks.join_next() => forget(ended, &mut running),
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
            tokio::time::sleep(GATHER).await;
            while let Some(ended) = tasks.try_join_next() {
                forget(ended, &mut running);
            }
        }
        running.values().for_each(|one| one.stop.cancel());
        while tasks.join_next().await.is_some() {}
    }

    /// Who holds each key that there is.
    fn holders(
        &self,
        wanted: &BTreeSet<String>,
        mut holders: BTreeMap<String, Holder>,
    ) -> BTreeMap<String, Option<String>> {
        let holder = |key: &String| {
            let full = format!("{}{key}", self.prefix);
            (key.clone(), holders.remove(&full).map(|holder| holder.node))
        };
        wanted.iter().map(holder).collect()
    }

    /// Tells what belongs elsewhere to stop, a few at a time.
    fn hand_over(&self, plan: &Rebalance, running: &mut BTreeMap<String, Running>) {
        // Those that were given up and have no new owner yet count: they are on their way.
        let leaving = running.values().filter(|one| one.leaving).count();
        let orphans = plan.moves().iter().filter(|one| one.from.is_none()).count();
        let mut room = self.moves_max.saturating_sub(leaving + orphans);
        let from_here = |one: &&fieldline_model::placement::Move| {
            one.from.as_deref() == Some(self.node.as_str()) && one.to.is_some()
        };
        for one in plan.moves().iter().filter(from_here) {
            let Some(running) = running.get_mut(&one.key).filter(|running| !running.leaving) else {
                continue;
            };
            if room == 0 {
                return;
            }
            debug!(key = one.key, to = one.to, "a key is handed over");
            running.leaving = true;
            running.stop.cancel();
            room -= 1;
        }
    }

    /// Claims what belongs here and nobody holds.
    async fn claim(
        &self,
        plan: &Rebalance,
        cluster: &Arc<dyn Cluster>,
        work: &Arc<impl Work>,
        running: &mut BTreeMap<String, Running>,
        tasks: &mut JoinSet<String>,
    ) {
        let here = |one: &&fieldline_model::placement::Move| {
            one.from.is_none() && one.to.as_deref() == Some(self.node.as_str())
        };
        let mut claims: JoinSet<(String, Result<Option<Lease>, ClusterError>)> = JoinSet::new();
        let free: Vec<String> = plan
            .moves()
            .iter()
            .filter(here)
            .map(|one| one.key.clone())
            .filter(|key| !running.contains_key(key))
            .collect();
        let mut free = free.into_iter();
        loop {
            while claims.len() < CLAIMS_MAX
                && let Some(key) = free.next()
            {
                let (cluster, full) = (Arc::clone(cluster), format!("{}{key}", self.prefix));
                claims.spawn(async move { (key, cluster.claim(&full).await) });
            }
            let Some(claimed) = claims.join_next().await else { return };
            match claimed {
                Ok((key, Ok(Some(lease)))) => {
                    let stop = CancellationToken::new();
                    running.insert(key.clone(), Running { stop: stop.clone(), leaving: false });
                    tasks.spawn(hold(key, lease, stop, Arc::clone(work), self.stop_max));
                }
                // Somebody was faster, or has not seen yet that it belongs here.
                Ok((_, Ok(None))) => {}
                Ok((key, Err(error))) => warn!(%error, key, "a key could not be claimed"),
                Err(error) => warn!(%error, "a claim ended badly"),
            }
        }
    }
}

fn forget(ended: Result<String, tokio::task::JoinError>, running: &mut BTreeMap<String, Running>) {
    match ended {
        Ok(key) => {
            running.remove(&key);
        }
        // `hold` runs the work in a task of its own, so that this does not happen.
        Err(error) => warn!(%error, "what held a key ended badly"),
    }
}

/// Runs one key until it ends, is told to stop, or is lost; gives the key up after it.
async fn hold(
    key: String,
    lease: Lease,
    stop: CancellationToken,
    work: Arc<impl Work>,
    stop_max: Duration,
) -> String {
    let lease = Arc::new(lease);
    let mut run = JoinSet::new();
    {
        let (key, lease, stop) = (key.clone(), Arc::clone(&lease), stop.clone());
        run.spawn(async move { work.run(key, lease, stop).await });
    }
    let told = async {
        stop.cancelled().await;
        tokio::time::sleep(stop_max).await;
    };
    tokio::select! {
        ended = run.join_next() => {
            if let Some(Err(error)) = ended {
                warn!(%error, key, "what ran for a key ended badly");
            }
            // Held meanwhile, so that what ends at once costs the cluster's store little.
            tokio::select! {
                () = tokio::time::sleep(RUN_AGAIN) => {}
                () = stop.cancelled() => {}
                () = lease.lost() => {}
            }
        }
        () = lease.lost() => warn!(key, epoch = %lease.epoch(), "a key was lost: what ran for it is cut"),
        () = told => warn!(key, "what ran for a key did not stop in time: it is cut"),
    }
    run.shutdown().await;
    if let Ok(lease) = Arc::try_unwrap(lease) {
        lease.release();
    } else {
        warn!(key, "what ran for a key kept its lease after it ended");
    }
    key
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use parking_lot::Mutex;

    use super::*;
    use crate::{MemoryCluster, Node};

    /// Notes who runs what, and panics where two run one key at a time.
    #[derive(Default)]
    struct Book {
        owners: Mutex<HashMap<String, String>>,
        starts: AtomicUsize,
    }

    struct Noting {
        node: String,
        book: Arc<Book>,
    }

    struct Line<'a>(&'a Noting, String);

    impl Drop for Line<'_> {
        fn drop(&mut self) {
            self.0.book.owners.lock().remove(&self.1);
        }
    }

    impl Work for Noting {
        async fn run(&self, key: String, lease: Arc<Lease>, stop: CancellationToken) {
            assert!(lease.is_held());
            let before = self.book.owners.lock().insert(key.clone(), self.node.clone());
            assert_eq!(before, None, "{key} has two owners");
            let _line = Line(self, key);
            self.book.starts.fetch_add(1, Ordering::SeqCst);
            stop.cancelled().await;
        }
    }

    struct Member {
        cluster: Arc<dyn Cluster>,
        progress: watch::Receiver<Progress>,
        shutdown: CancellationToken,
        task: tokio::task::JoinHandle<()>,
    }

    fn described(name: &str) -> Node {
        Node {
            name: name.to_owned(),
            address: String::new(),
            roles: vec!["drivers".to_owned()],
            zone: None,
            version: String::new(),
            ready: true,
        }
    }

    fn ownership(name: &str, moves_max: usize) -> Ownership {
        Ownership {
            prefix: "modules/".to_owned(),
            role: "drivers".to_owned(),
            node: name.to_owned(),
            moves_max,
            stop_max: Duration::from_secs(1),
        }
    }

    async fn member(
        cluster: &MemoryCluster,
        name: &str,
        keys: &watch::Sender<Arc<BTreeSet<String>>>,
        book: &Arc<Book>,
        moves_max: usize,
    ) -> Member {
        let cluster: Arc<dyn Cluster> = Arc::new(cluster.beside());
        cluster.join(described(name)).await.unwrap();
        let work = Arc::new(Noting { node: name.to_owned(), book: Arc::clone(book) });
        let (sender, progress) = watch::channel(Progress::default());
        let shutdown = CancellationToken::new();
        let run = ownership(name, moves_max).run(
            Arc::clone(&cluster),
            keys.subscribe(),
            work,
            sender,
            shutdown.clone(),
        );
        Member { cluster, progress, shutdown, task: tokio::spawn(run) }
    }

    fn keys(count: usize) -> Arc<BTreeSet<String>> {
        Arc::new((0..count).map(|n| format!("module-{n}")).collect())
    }

    async fn settled(member: &mut Member, count: usize) {
        let done = |progress: &Progress| {
            progress.keys == count && progress.orphans == 0 && progress.misplaced == 0
        };
        let wait = tokio::time::timeout(Duration::from_secs(20), member.progress.wait_for(done));
        wait.await.expect("keys settle").unwrap();
    }

    async fn eventually(what: &str, holds: impl Fn() -> bool) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(tokio::time::Instant::now() < deadline, "not so: {what}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Counts how often it is run, and ends at once.
    struct Ending(AtomicUsize);

    impl Work for Ending {
        async fn run(&self, _key: String, _lease: Arc<Lease>, _stop: CancellationToken) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Neither keys that nobody will change nor work that ends at once makes it spin.
    #[tokio::test(start_paused = true)]
    async fn it_does_not_spin() {
        let cluster: Arc<dyn Cluster> = Arc::new(MemoryCluster::new());
        cluster.join(described("one")).await.unwrap();
        let (_, wanted) = watch::channel(keys(1));
        let (sender, _progress) = watch::channel(Progress::default());
        let (work, shutdown) = (Arc::new(Ending(AtomicUsize::new(0))), CancellationToken::new());
        let run =
            ownership("one", 1).run(cluster, wanted, Arc::clone(&work), sender, shutdown.clone());
        let run = tokio::spawn(run);
        tokio::time::sleep(Duration::from_secs(10)).await;
        shutdown.cancel();
        run.await.unwrap();
        let runs = work.0.load(Ordering::SeqCst);
        assert!((4..=11).contains(&runs), "run {runs} times in ten seconds");
    }

    #[tokio::test]
    async fn keys_follow_the_nodes_and_have_one_owner_at_a_time() {
        let (cluster, book) = (MemoryCluster::new(), Arc::new(Book::default()));
        let wanted = watch::Sender::new(keys(300));
        let mut one = member(&cluster, "one", &wanted, &book, 10).await;
        settled(&mut one, 300).await;
        assert_eq!(book.owners.lock().len(), 300);

        let mut two = member(&cluster, "two", &wanted, &book, 10).await;
        let mut three = member(&cluster, "three", &wanted, &book, 10).await;
        for member in [&mut one, &mut two, &mut three] {
            settled(member, 300).await;
        }
        let count = |name: &str| book.owners.lock().values().filter(|node| *node == name).count();
        assert!(count("one") > 70 && count("two") > 70 && count("three") > 70);
        let starts = book.starts.load(Ordering::SeqCst);
        assert!(starts < 300 + 260, "{starts} starts: more moved than had to");

        // A node that dies takes nothing with it: its keys are run by the others.
        two.task.abort();
        two.cluster.leave().await;
        let all = || book.owners.lock().len();
        eventually("the others have all", || count("two") == 0 && all() == 300).await;
        settled(&mut one, 300).await;
        settled(&mut three, 300).await;

        wanted.send_replace(keys(20));
        settled(&mut one, 20).await;
        settled(&mut three, 20).await;
        eventually("keys that are gone do not run", || all() == 20).await;
        for member in [one, three] {
            member.shutdown.cancel();
            member.task.await.unwrap();
        }
        assert!(book.owners.lock().is_empty());
        assert!(cluster.holders("").await.unwrap().is_empty());
    }
}
