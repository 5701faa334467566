//! PostgreSQL's primary killed: three nodes, three etcd and three PostgreSQL under Patroni, one
//! of each in each zone.

use std::cell::RefCell;
use std::path::PathBuf;
use std::time::Duration;

use fieldline_testkit::servers::{EtcdCluster, Mosquitto, Pace, Patroni, Place, Redis, Zones};
use serde_json::json;
use tempfile::TempDir;

use super::{Effect, Fault, Load, is_whole};
use crate::device::Manner;
use crate::server::{Server, free_port, wait_for};

/// Zones with a node, an etcd and a PostgreSQL each; Redis and the broker are in the fourth.
const ZONES: usize = 3;
const OTHERS: usize = 3;
/// Devices give up soon, and are at another node then.
const MANNER: Manner = Manner { patience: Duration::from_secs(4), rest: Duration::from_millis(10) };

fn config(
    folder: &TempDir,
    zone: usize,
    place: &Place,
    [etcd, postgres, redis, broker]: &[String; 4],
) -> PathBuf {
    let text = format!(
        "[node]\nlisten = \"127.0.0.1:0\"\nzone = \"{zone}\"\netcd = {etcd}\n[postgres]\nurl = \"{postgres}\"\n[redis]\nurl = \"{redis}\"\n[mqtt_bus]\nurl = \"{broker}\"\n[gateway]\nlisten_address = \"{}\"\nlisten_retry_delay = \"200ms\"\n",
        place.address(),
    );
    let path = folder.path().join(format!("node-{zone}.toml"));
    std::fs::write(&path, text).unwrap();
    path
}

/// All of it, under load.
struct Stage {
    load: Load,
    nodes: Vec<Server>,
    _etcd: EtcdCluster,
    patroni: RefCell<Patroni>,
    _redis: Redis,
    _broker: Mosquitto,
    _folder: TempDir,
    _zones: Zones,
}

impl Stage {
    fn set() -> Self {
        let zones = Zones::start(ZONES + 1);
        let places: Vec<Place> = (0..ZONES).map(|zone| zones.place(zone)).collect();
        let etcd = EtcdCluster::start_at(&places);
        let redis = Redis::start_at(&zones.place(OTHERS), &[]);
        let broker = Mosquitto::start_at(&zones.place(OTHERS), "");
        let mut patroni = Patroni::start_at(&places, &etcd.hosts(), Pace::Quick);
        let urls = [
            serde_json::to_string(&etcd.urls()).unwrap(),
            patroni.make_database("fieldline"),
            redis.url(),
            broker.url(),
        ];
        let folder = tempfile::tempdir().unwrap();
        let node = |zone: usize| {
            let config = config(&folder, zone, &places[zone], &urls);
            Server::node_at(&places[zone], &config, &format!("node-{zone}"), "gateway,rest,mqtt")
        };
        let nodes: Vec<Server> = (0..ZONES).map(node).collect();
        wait_for("all nodes", || nodes.iter().try_for_each(is_whole));
        let port = free_port();
        let channel = json!({
            "name": "trackers", "protocol": "wialon_ips", "transport": "tcp",
            "listen": format!("0.0.0.0:{port}"), "auto_register": true,
        });
        nodes[0].ask("POST", "/api/v1/channels", Some(&channel));
        let targets: Vec<String> =
            places.iter().map(|place| place.socket(port).to_string()).collect();
        for target in &targets {
            wait_for("gateways to listen", || std::net::TcpStream::connect(target).ok());
        }
        let load = Load::start(&targets, &nodes.iter().collect::<Vec<_>>(), MANNER);
        let patroni = RefCell::new(patroni);
        let (_redis, _broker, _folder) = (redis, broker, folder);
        Self { load, nodes, _etcd: etcd, patroni, _redis, _broker, _folder, _zones: zones }
    }

    fn whole(&self) -> Option<()> {
        self.nodes.iter().try_for_each(is_whole)
    }

    fn end(self, what: &str) {
        self.load.finish(&self.nodes[0], what);
        self.nodes.into_iter().for_each(Server::stop);
    }
}

/// PostgreSQL's primary dies with its Patroni; the standby that has every confirmed commit is promoted.
#[test]
fn a_primary_may_die() {
    let stage = Stage::set();
    let primary = stage.patroni.borrow_mut().whole();
    let all: Vec<usize> = (0..ZONES).collect();
    let fault = Fault {
        what: "PostgreSQL's primary killed with its Patroni, a standby promoted",
        lasts: Duration::ZERO,
        effect: Effect::Failover,
        serving: &all,
    };
    let kill = || stage.patroni.borrow_mut().member(primary).kill();
    let restart = || {
        let leader = stage.patroni.borrow().leader();
        assert!(leader.is_some_and(|leader| leader != primary), "promoted: {leader:?}");
        stage.patroni.borrow_mut().member(primary).restart();
    };
    stage.load.through(&fault, kill, restart, || stage.whole());
    stage.end("a primary killed");
}
