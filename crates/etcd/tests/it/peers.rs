//! Members that ask each other over the network, as nodes do.

use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::{Cluster, Handlers, Lease, Node};
use fieldline_etcd::EtcdCluster;
use fieldline_router::calls::{ClusterPeers, NodeCalls, Security};
use fieldline_testkit::servers::Etcd;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{connect, described};
use crate::faults::{held, members};

struct Member {
    cluster: Arc<EtcdCluster>,
    answers: CancellationToken,
    lease: Lease,
}

async fn member(port: u16, name: &str) -> Member {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let calls = NodeCalls::new(name, Handlers::new(), Security::Plain, Handle::current());
    let answers = CancellationToken::new();
    let (serving, until) = (calls.clone(), answers.clone());
    tokio::spawn(async move { serving.serve(listener, until).await });
    let peers = ClusterPeers::new(calls.clone());
    let cluster = Arc::new(connect(port, "p/", Arc::new(peers.clone())).await);
    peers.answer_for(&cluster);
    calls.follow(cluster.membership());
    cluster.join(Node { address, ..described(name) }).await.unwrap();
    let lease = held(&cluster, name).await;
    Member { cluster, answers, lease }
}

/// While etcd sleeps all vouch for all, and go on; when one of them gives no answer any more, all end at their deadlines.
#[tokio::test(flavor = "multi_thread")]
async fn all_members_must_say_so_over_the_network() {
    let etcd = Etcd::start();
    let names = ["one", "two", "three"];
    let mut all = Vec::new();
    for name in names {
        all.push(member(etcd.process.port(), name).await);
    }
    for member in &all {
        members(&member.cluster, &["one", "three", "two"], Duration::from_secs(10)).await;
    }
    etcd.process.pause();
    for _ in 0..60 {
        sleep(Duration::from_millis(100)).await;
        assert!(all.iter().all(|member| member.lease.is_held()), "all go on");
    }
    all[2].answers.cancel();
    for member in &all[..2] {
        timeout(Duration::from_secs(6), member.lease.lost()).await.expect("it ends");
    }
    // That one still has the word of the others, and its own silence harms it not.
    etcd.process.resume();
    for member in &all {
        members(&member.cluster, &["one", "three", "two"], Duration::from_secs(20)).await;
    }
    assert!(!all[0].lease.is_held() && !all[1].lease.is_held(), "what was lost stays lost");
}
