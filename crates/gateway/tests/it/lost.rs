//! Sessions whose node is gone: their end is told once, by another, and never for want of discovery.

use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::registry::RegistryExt;
use fieldline_contracts::{Clock, Cluster, MemoryBus, MemoryCluster, Node, State, SystemClock};
use fieldline_gateway::LostConfig;
use fieldline_ingest::stored_event;
use fieldline_model::{
    Account, DeviceId, Event, EventKind, SeriesKind, Timestamp, Transport, Value,
};
use fieldline_redis::{RedisConfig, RedisState};
use fieldline_testkit::servers::Redis;
use fieldline_testkit::{MemoryRegistry, ScriptedHistory};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::nodes::{Backends, Nodes};
use crate::{SOON, World, actor, config, login, rest};

const PATIENCE: LostConfig = LostConfig {
    after: Duration::from_millis(800),
    settle: Duration::from_millis(200),
    look_every: Duration::from_millis(300),
};
/// How long a node of these tests counts as alive for Redis after it spoke up last.
const NODE_TTL: Duration = Duration::from_secs(1);
/// Beyond it what was to happen has.
const LONG: Duration = Duration::from_millis(2_500);

/// Nodes over one Redis and one cluster, each of which would end lost sessions.
struct Fleet {
    redis: Redis,
    nodes: Nodes,
    clusters: Vec<Arc<MemoryCluster>>,
    looking: Vec<JoinHandle<()>>,
}

fn member(number: usize) -> Node {
    Node {
        name: format!("node-{number}"),
        address: String::new(),
        roles: vec!["gateway".to_owned()],
        zone: None,
        version: "0".to_owned(),
        ready: true,
    }
}

impl Fleet {
    async fn start(count: usize) -> Self {
        let redis = Redis::start();
        let registry = Arc::new(MemoryRegistry::new(Arc::new(SystemClock)));
        let bus = Arc::new(MemoryBus::new());
        let (mut backends, mut clusters) = (Vec::new(), Vec::new());
        let first = Arc::new(MemoryCluster::new());
        for number in 0..count {
            let settings =
                RedisConfig { url: redis.url(), node_ttl: NODE_TTL, ..RedisConfig::default() };
            let history = Arc::new(ScriptedHistory::new());
            let name = format!("node-{number}");
            let state = RedisState::connect(settings, &name, history).await.unwrap();
            assert!(state.ready(SOON).await, "{:?}", state.problems());
            let (registry, bus) = (registry.clone(), bus.clone());
            backends.push(Backends { registry, state: Arc::new(state), bus });
            let cluster = if number == 0 { first.clone() } else { Arc::new(first.beside()) };
            cluster.join(member(number)).await.unwrap();
            clusters.push(cluster);
        }
        let nodes = Nodes::over(backends, Transport::Tcp, config()).await;
        let looking =
            nodes.nodes.iter().zip(&clusters).enumerate().map(|(number, (node, cluster))| {
                let (cluster, ingest) = (Arc::clone(cluster), node.ingest.clone());
                tokio::spawn(fieldline_gateway::run_lost(
                    PATIENCE,
                    cluster,
                    format!("node-{number}"),
                    ingest,
                ))
            });
        let looking = looking.collect();
        Self { redis, nodes, clusters, looking }
    }

    /// Kills the last node and, as its lease in the cluster runs out, takes its membership away.
    async fn kill_last(&mut self) {
        let last = self.nodes.nodes.len() - 1;
        let looking = self.looking.pop().unwrap();
        looking.abort();
        // What it holds of the node goes with it.
        assert!(looking.await.unwrap_err().is_cancelled());
        self.nodes.kill(last).await;
        self.clusters.pop().unwrap().leave().await;
    }

    async fn offline(&self) -> Vec<Event> {
        let events = self.nodes.log(SeriesKind::Event).await;
        let events = events.iter().filter_map(stored_event);
        events.filter(|event| event.kind == EventKind::Offline).collect()
    }

    async fn went_offline(&self, devices: &[DeviceId]) -> Vec<Event> {
        let mut found = Vec::new();
        for _ in 0..1_000 {
            found = self.offline().await;
            if devices.iter().all(|device| found.iter().any(|event| event.object == device.0)) {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("not all of {devices:?} went offline: {found:?}");
    }

    async fn connect(&self, node: usize, ident: u64) -> (DeviceId, TcpStream) {
        let ident = format!("{ident}");
        let stream = login(self.nodes.nodes[node].address, &ident).await;
        (self.nodes.device(&ident).await.id, stream)
    }

    async fn end(mut self) {
        for looking in self.looking.drain(..) {
            looking.abort();
        }
        self.nodes.stop_all().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_nodes_devices_go_offline_once() {
    let mut fleet = Fleet::start(3).await;
    let (dead, mut first) = fleet.connect(2, 358_000_000_000_001).await;
    let (moved, _second) = fleet.connect(2, 358_000_000_000_002).await;
    let (also, _third) = fleet.connect(2, 358_000_000_000_003).await;
    let (elsewhere, _fourth) = fleet.connect(0, 358_000_000_000_004).await;
    let state = fleet.nodes.nodes[0].platform.state.clone();
    let before = state.presence(fleet.nodes.account, dead).await.unwrap();
    assert_eq!(before.node.as_deref(), Some("node-2"));
    fleet.kill_last().await;
    rest(&mut first).await;
    let (_, _fifth) = fleet.connect(1, 358_000_000_000_002).await;

    let offline = fleet.went_offline(&[dead, also]).await;
    let event = offline.iter().find(|event| event.object == dead.0).unwrap();
    let said = |name: &str| event.params.get(name).and_then(Value::as_str).unwrap_or_default();
    assert_eq!((said("node"), said("close.name")), ("node-2", "node_lost"));
    assert_eq!(said("connection.id"), before.connection.unwrap().to_string());
    assert_eq!(said("ident"), "358000000000001");
    let log = fleet.nodes.log(SeriesKind::DeviceLog).await;
    let closed = log.iter().filter(|line| {
        line.params().get("close.name").and_then(Value::as_str) == Some("node_lost")
    });
    assert_eq!(closed.count(), 2, "each device's log says so");
    // Nobody says it again, and those who are elsewhere are left alone.
    tokio::time::sleep(LONG).await;
    let all = fleet.offline().await;
    assert_eq!(all.len(), 2, "{all:?}");
    for (device, online) in [(dead, false), (also, false), (moved, true), (elsewhere, true)] {
        let presence = state.presence(fleet.nodes.account, device).await.unwrap();
        assert_eq!(presence.connection.is_some(), online, "{device}");
    }
    let after = state.presence(fleet.nodes.account, dead).await.unwrap();
    assert!(after.epoch > before.epoch, "a node that was only cut off would let go of it");
    // And it may come back.
    let (_, _sixth) = fleet.connect(0, 358_000_000_000_001).await;
    assert!(state.presence(fleet.nodes.account, dead).await.unwrap().connection.is_some());
    fleet.end().await;
}

/// Neither the cluster nor Redis alone may say that a fleet is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_fleet_is_offline_for_want_of_discovery() {
    let mut fleet = Fleet::start(2).await;
    let mut held = Vec::new();
    for number in 0..10 {
        held.push(fleet.connect(number % 2, 358_000_000_000_100 + number as u64).await);
    }
    // Discovery is empty, and stays so: the nodes are not members any more, and speak up to Redis.
    for cluster in &fleet.clusters {
        cluster.leave().await;
    }
    tokio::time::sleep(LONG).await;
    assert!(fleet.offline().await.is_empty());
    for (number, cluster) in fleet.clusters.iter().enumerate() {
        cluster.join(member(number)).await.unwrap();
    }
    for (number, node) in fleet.nodes.nodes.iter().enumerate() {
        let (cluster, ingest) = (Arc::clone(&fleet.clusters[number]), node.ingest.clone());
        let name = format!("node-{number}");
        let run = fieldline_gateway::run_lost(PATIENCE, cluster, name, ingest);
        fleet.looking.push(tokio::spawn(run));
    }
    // One alone is no member, as where its lease ran out: its devices are there, and Redis hears it.
    fleet.clusters[1].leave().await;
    tokio::time::sleep(LONG).await;
    assert!(fleet.offline().await.is_empty());
    // Redis stood still for so long that it takes every node for dead; then it loses all it had.
    fleet.redis.process.pause();
    tokio::time::sleep(NODE_TTL * 2).await;
    fleet.redis.process.resume();
    tokio::time::sleep(LONG / 2).await;
    fleet.redis.restart_empty();
    tokio::time::sleep(LONG).await;
    assert!(fleet.offline().await.is_empty());
    assert_eq!(fleet.nodes.counts(), [5, 5], "and nobody was let go of");
    fleet.end().await;
}

/// Who is killed between storing the event and ending the session is followed by one who says the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_begun_is_finished_and_told_once() {
    let mut fleet = Fleet::start(2).await;
    let (device, _stream) = fleet.connect(1, 358_000_000_000_201).await;
    let state: Arc<dyn State> = fleet.nodes.nodes[0].platform.state.clone();
    let (lost, _) = state.lost_sessions(0).await.unwrap();
    assert!(lost.is_empty(), "its node lives: {lost:?}");
    fleet.kill_last().await;
    let mut lost = Vec::new();
    for _ in 0..500 {
        lost = state.lost_sessions(0).await.unwrap().0;
        if !lost.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(lost[0].device, device);
    // As one does that is killed right after.
    let at = Timestamp::from_seconds(1_700_000_000);
    assert_eq!(state.mark_lost(&lost[0], at).await.unwrap(), Some(at));
    assert_eq!(state.mark_lost(&lost[0], SystemClock.now()).await.unwrap(), Some(at));
    let offline = fleet.went_offline(&[device]).await;
    assert_eq!(offline[0].timestamp, at, "the one who follows says what the first would have");
    assert_eq!(state.mark_lost(&lost[0], at).await.unwrap(), None);
    assert!(!state.end_lost(&lost[0], at).await.unwrap());
    fleet.end().await;
}

/// A process that is alone: whoever was connected when it was killed is told offline by the next run, once.
#[tokio::test]
async fn sessions_of_the_former_run_are_ended() {
    let mut world = World::start(config()).await;
    let account: Account = serde_json::from_value(serde_json::json!({
        "id": world.account, "name": "ours", "enabled": true, "retention_days": 0,
        "storage_bytes_max": 0, "created_at": SystemClock.now(),
    }))
    .unwrap();
    world.registry.create_object(world.account, &account, &actor()).await.unwrap();
    let (channel, address) = world.open("teltonika").await;
    let idents = ["358000000000301", "358000000000302", "358000000000303"];
    let mut streams = Vec::new();
    for ident in idents {
        streams.push(login(address, ident).await);
    }
    // One says goodbye; two are there when the program is killed.
    drop(streams.remove(0));
    for _ in 0..500 {
        if world.gateway.connections_count() == 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    world.ingest.flush().await;
    let mut next = world.killed_and_started_again(config()).await;
    let started = SystemClock.now();
    let address = next.address(&channel).await;
    let _back = login(address, idents[1]).await;
    let ended = next.gateway.end_former_sessions(Timestamp::MIN, started).await.unwrap();
    assert_eq!(ended, 1);
    // The next start reads it all again, if it has to.
    assert_eq!(next.gateway.end_former_sessions(Timestamp::MIN, started).await.unwrap(), 0);
    let events = next.log(SeriesKind::Event).await;
    let events = events.iter().filter_map(stored_event);
    let offline: Vec<Event> = events.filter(|event| event.kind == EventKind::Offline).collect();
    assert_eq!(offline.len(), 2, "{offline:?}");
    let device = next.device(idents[2]).await;
    assert_eq!((offline[1].object, offline[1].timestamp), (device.id.0, started));
    let name = offline[1].params.get("close.name").and_then(Value::as_str);
    assert_eq!(name, Some("node_lost"));
    assert!(!next.is_online(&device).await);
    next.stop().await;
    drop(world);
}
