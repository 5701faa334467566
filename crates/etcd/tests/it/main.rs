//! The cluster on a real etcd, with faults.

#![allow(
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "tests panic by design, and say what they measured"
)]

mod faults;
mod peers;

use std::sync::Arc;

use fieldline_contracts::{Cluster, NoPeers, Node, Peers, SystemClock, conformance};
use fieldline_etcd::{Config, EtcdCluster};
use fieldline_testkit::servers::Etcd;

/// Shows what the cluster says where `RUST_LOG` asks for it.
fn log() {
    tracing_subscriber::fmt().with_test_writer().try_init().unwrap_or_default();
}

async fn connect(port: u16, prefix: &str, peers: Arc<dyn Peers>) -> EtcdCluster {
    log();
    let config = Config {
        prefix: prefix.to_owned(),
        ..Config::new(vec![format!("http://127.0.0.1:{port}")])
    };
    EtcdCluster::connect(config, Arc::new(SystemClock), peers).await.unwrap()
}

fn described(name: &str) -> Node {
    Node {
        name: name.to_owned(),
        address: format!("https://{name}:7080"),
        roles: vec!["drivers".to_owned()],
        zone: None,
        version: "0.1.0".to_owned(),
        ready: true,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cluster_on_etcd_conforms() {
    let etcd = Etcd::start();
    // The first contact makes the keyspace, in which nobody may claim until it is some seconds old.
    let first = connect(etcd.process.port(), "a/", Arc::new(NoPeers)).await;
    first.join(described("first")).await.unwrap();
    let key = fieldline_contracts::cluster::hold(&first, "first").await.unwrap();
    assert!(key.is_held());
    conformance::cluster::run(async || {
        Arc::new(connect(etcd.process.port(), "a/", Arc::new(NoPeers)).await) as Arc<dyn Cluster>
    })
    .await;
}

/// A member that is dead keeps nobody from starting, wherever it stands in the list.
#[tokio::test]
async fn a_dead_member_is_passed_over() {
    let etcd = Etcd::start();
    let (dead, alive) = ("http://127.0.0.1:1".to_owned(), etcd.url());
    for endpoints in [[dead.clone(), alive.clone()], [alive, dead]] {
        let config = Config::new(endpoints.to_vec());
        let peers = Arc::new(NoPeers);
        let cluster = EtcdCluster::connect(config, Arc::new(SystemClock), peers).await.unwrap();
        cluster.join(described("one")).await.unwrap();
        cluster.leave().await;
    }
}

#[tokio::test]
async fn what_is_wrong_at_the_start_is_said() {
    let refused = async |endpoint: String| {
        let connected = EtcdCluster::connect(
            Config::new(vec![endpoint]),
            Arc::new(SystemClock),
            Arc::new(NoPeers),
        );
        connected.await.err().expect("it cannot connect").to_string()
    };
    let nobody = refused("http://127.0.0.1:1".to_owned()).await;
    assert!(nobody.contains("does not answer (") && nobody.contains("): start it"), "{nobody}");
    let words = refused("not an address".to_owned()).await;
    assert!(words.contains("write each endpoint like"), "{words}");
}
