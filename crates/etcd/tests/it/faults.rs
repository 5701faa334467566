//! What nodes do while etcd is away, comes back empty, or one of them is cut off.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use fieldline_contracts::cluster::hold;
use fieldline_contracts::{Cluster, Lease, NoPeers, Node, Peers};
use fieldline_etcd::EtcdCluster;
use fieldline_testkit::servers::{Cut, Etcd, Flow};
use tokio::time::{sleep, timeout};

use super::{connect, described};

/// Says what the test tells it to.
struct Told(AtomicBool);

#[async_trait]
impl Peers for Told {
    async fn without_cluster(&self, _node: &Node) -> Option<bool> {
        Some(self.0.load(Ordering::SeqCst))
    }
}

async fn member(port: u16, name: &str, peers: Arc<dyn Peers>) -> EtcdCluster {
    let cluster = connect(port, "f/", peers).await;
    cluster.join(described(name)).await.unwrap();
    cluster
}

pub(crate) async fn members(cluster: &EtcdCluster, names: &[&str], most: Duration) {
    let mut membership = cluster.membership();
    let seen = membership.wait_for(|all| {
        all.fresh && all.members.iter().map(|one| one.node.name.as_str()).eq(names.iter().copied())
    });
    timeout(most, seen).await.expect("the members are seen").unwrap();
}

pub(crate) async fn held(cluster: &EtcdCluster, key: &str) -> Lease {
    timeout(Duration::from_secs(20), hold(cluster, key)).await.expect("it becomes free").unwrap()
}

/// A node that dies is noticed in five seconds, and what it held is free in ten.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_node_held_is_free_soon() {
    let etcd = Etcd::start();
    let port = etcd.process.port();
    let one = member(port, "one", Arc::new(NoPeers)).await;
    let cut = Cut::before(port).await;
    let two = member(cut.port(), "two", Arc::new(NoPeers)).await;
    let lease = held(&two, "key").await;
    members(&one, &["one", "two"], Duration::from_secs(5)).await;
    let began = Instant::now();
    cut.set(Flow::Held);
    members(&one, &["one"], Duration::from_secs(5)).await;
    let noticed = began.elapsed();
    let next = held(&one, "key").await;
    assert!(!lease.is_held(), "the former owner stopped before the next one began");
    assert!(next.epoch() > lease.epoch());
    println!("noticed after {noticed:?}, owned again after {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(10));
    // Cut off, it cannot take anything, and it does not believe that it is alone.
    assert!(two.claim("other").await.is_err());
    let membership = two.membership();
    assert!(!membership.borrow().fresh && membership.borrow().members.len() == 2);
    // Back again, it is a member, and what it lost stays lost.
    cut.set(Flow::Open);
    members(&two, &["one", "two"], Duration::from_secs(20)).await;
    assert!(!lease.is_held() && next.is_held());
    drop(lease);
    sleep(Duration::from_millis(500)).await;
    assert_eq!(one.holders("key").await.unwrap()["key"].node, "one");
}

/// An owner is never told that it holds what another holds, sampled each millisecond while the wire is cut one way, both ways, and mended.
#[tokio::test(flavor = "multi_thread")]
async fn two_never_own_at_a_time() {
    let etcd = Etcd::start();
    let port = etcd.process.port();
    let one = Arc::new(member(port, "one", Arc::new(NoPeers)).await);
    let cut = Cut::before(port).await;
    let two = Arc::new(member(cut.port(), "two", Arc::new(NoPeers)).await);
    let stop = Arc::new(AtomicBool::new(false));
    let owners: [Arc<parking_lot::Mutex<Option<Arc<Lease>>>>; 2] = Default::default();
    let mut holding = tokio::task::JoinSet::new();
    for (cluster, slot) in [(&one, &owners[0]), (&two, &owners[1])] {
        let (cluster, slot, stop) = (Arc::clone(cluster), Arc::clone(slot), Arc::clone(&stop));
        holding.spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                let Ok(Ok(lease)) = timeout(Duration::from_secs(1), hold(&*cluster, "key")).await
                else {
                    continue;
                };
                let lease = Arc::new(lease);
                *slot.lock() = Some(Arc::clone(&lease));
                // Now and then it lets go by itself.
                timeout(Duration::from_secs(2), lease.lost()).await.unwrap_or_default();
                slot.lock().take();
                drop(lease);
                sleep(Duration::from_millis(100)).await;
            }
        });
    }
    let sampler = {
        let (owners, stop) = (owners.clone(), Arc::clone(&stop));
        std::thread::spawn(move || {
            let (mut owned, mut samples, mut changes, mut last) = (0_u32, 0_u32, 0_u32, None);
            while !stop.load(Ordering::SeqCst) {
                let held = |at: usize| {
                    owners[at]
                        .lock()
                        .as_ref()
                        .filter(|lease| lease.is_held())
                        .map(|lease| lease.epoch())
                };
                let first = held(0);
                let second = held(1);
                // The first may have let go while the second was looked at.
                let both = first.is_some() && second.is_some() && held(0) == first;
                assert!(!both, "two owners: {first:?} and {second:?}");
                let now = first.map(|_| 0).or(second.map(|_| 1));
                if now.is_some() && now != last {
                    changes += 1;
                    last = now;
                }
                owned += u32::from(now.is_some());
                samples += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            (samples, owned, changes)
        })
    };
    for flow in
        [Flow::ToServerHeld, Flow::Open, Flow::ToClientHeld, Flow::Open, Flow::Refused, Flow::Open]
    {
        sleep(Duration::from_millis(5_500)).await;
        cut.set(flow);
    }
    sleep(Duration::from_secs(6)).await;
    stop.store(true, Ordering::SeqCst);
    holding.join_all().await;
    let (samples, owned, changes) = sampler.join().unwrap();
    println!("{samples} samples, {owned} with an owner, {changes} changes of hands");
    assert!(owned > samples / 3 && changes >= 4);
}

/// etcd is gone for all: who asks the others goes on, who cannot ask stops at its deadline; members stay as last known.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_freezes_and_ends_only_what_nobody_vouches_for() {
    let mut etcd = Etcd::start();
    let port = etcd.process.port();
    let vouched = member(port, "one", Arc::new(Told(AtomicBool::new(true)))).await;
    let denied = member(port, "two", Arc::new(Told(AtomicBool::new(false)))).await;
    let (kept, ends) = (held(&vouched, "a").await, held(&denied, "b").await);
    members(&vouched, &["one", "two"], Duration::from_secs(5)).await;
    etcd.process.kill();
    timeout(Duration::from_secs(4), ends.lost()).await.expect("it stops at its deadline");
    for _ in 0..60 {
        sleep(Duration::from_millis(100)).await;
        assert!(kept.is_held(), "it goes on for as long as all say so");
    }
    let membership = vouched.membership();
    assert!(!membership.borrow().fresh);
    assert_eq!(membership.borrow().members.len(), 2);
    etcd.restart();
    members(&vouched, &["one", "two"], Duration::from_secs(20)).await;
    assert!(kept.is_held(), "it is held on after the outage");
    assert!(!ends.is_held());
    let holders = vouched.holders("").await.unwrap();
    assert_eq!(holders["a"].epoch, kept.epoch());
    drop(ends);
    assert!(held(&vouched, "b").await.is_held());
}

/// etcd comes back without its data: members come back, who still holds keeps what it holds, epochs grow.
#[tokio::test(flavor = "multi_thread")]
async fn data_lost_by_etcd_is_written_again_by_those_who_hold() {
    let mut etcd = Etcd::start();
    let port = etcd.process.port();
    let one = member(port, "one", Arc::new(Told(AtomicBool::new(true)))).await;
    let two = member(port, "two", Arc::new(Told(AtomicBool::new(true)))).await;
    let leases = [held(&one, "a").await, held(&two, "b").await];
    members(&one, &["one", "two"], Duration::from_secs(5)).await;
    etcd.restart_empty();
    members(&one, &["one", "two"], Duration::from_secs(20)).await;
    members(&two, &["one", "two"], Duration::from_secs(20)).await;
    assert!(leases.iter().all(Lease::is_held), "nobody else could have taken them");
    let holders = one.holders("").await.unwrap();
    for (lease, name) in leases.iter().zip(["one", "two"]) {
        let holder = &holders[lease.key()];
        assert_eq!((holder.node.as_str(), holder.epoch), (name, lease.epoch()));
        assert!(one.claim(lease.key()).await.unwrap().is_none(), "it is taken");
    }
    let [a, b] = leases;
    let newest = a.epoch().max(b.epoch());
    a.release();
    let next = held(&two, "a").await;
    assert!(next.epoch() > newest, "epochs grow although revisions began again");
}

/// A process that was stopped longer than its lease lasts finds, when it wakes, that it holds nothing.
#[tokio::test(flavor = "multi_thread")]
async fn etcd_that_sleeps_is_an_outage() {
    let etcd = Etcd::start();
    let one = member(etcd.process.port(), "one", Arc::new(NoPeers)).await;
    let lease = held(&one, "a").await;
    etcd.process.pause();
    timeout(Duration::from_secs(4), lease.lost()).await.expect("it stops at its deadline");
    let mut membership = one.membership();
    let noticed = membership.wait_for(|all| !all.fresh);
    timeout(Duration::from_secs(5), noticed).await.expect("silence is noticed").unwrap();
    etcd.process.resume();
    members(&one, &["one"], Duration::from_secs(20)).await;
    assert!(!lease.is_held(), "what was lost stays lost");
    drop(lease);
    assert!(held(&one, "a").await.is_held());
}

/// Each asks the other whether etcd is gone, as nodes do over the network.
#[derive(Default)]
struct Each(parking_lot::Mutex<std::collections::HashMap<String, Arc<EtcdCluster>>>);

#[async_trait]
impl Peers for Each {
    async fn without_cluster(&self, node: &Node) -> Option<bool> {
        let asked = self.0.lock().get(&node.name).cloned()?;
        Some(asked.is_gone().await)
    }
}

/// etcd sleeps, so that nothing but a try shows that it is gone: all vouch for each other and go on. One that still reaches
/// it does not vouch for one that is cut off.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_vouch_for_what_they_have_tried() {
    let etcd = Etcd::start();
    let port = etcd.process.port();
    let each = Arc::new(Each::default());
    let cut = Cut::before(port).await;
    let one = Arc::new(member(port, "one", each.clone()).await);
    let two = Arc::new(member(cut.port(), "two", each.clone()).await);
    each.0.lock().extend([("one".to_owned(), one.clone()), ("two".to_owned(), two.clone())]);
    let leases = [held(&one, "a").await, held(&two, "b").await];
    members(&one, &["one", "two"], Duration::from_secs(5)).await;
    members(&two, &["one", "two"], Duration::from_secs(5)).await;
    etcd.process.pause();
    for _ in 0..70 {
        sleep(Duration::from_millis(100)).await;
        assert!(leases.iter().all(Lease::is_held), "both go on");
    }
    // Who vouched claims nothing, though etcd may be back at any moment.
    assert!(one.claim("other").await.is_err());
    etcd.process.resume();
    members(&one, &["one", "two"], Duration::from_secs(20)).await;
    members(&two, &["one", "two"], Duration::from_secs(20)).await;
    assert!(leases.iter().all(Lease::is_held), "and after it");
    assert!(one.claim("other").await.unwrap().is_some());
    assert!(!one.is_gone().await);
    cut.set(Flow::Held);
    timeout(Duration::from_secs(4), leases[1].lost()).await.expect("it ends at its deadline");
    assert!(leases[0].is_held());
    let [_a, b] = leases;
    assert!(held(&one, "b").await.epoch() > b.epoch());
    each.0.lock().clear();
}
