//! PostgreSQL's primary killed, and a whole zone cut off: three nodes, three etcd and three PostgreSQL under Patroni, one
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
    let (name, certificates) = (format!("node-{zone}"), folder.path());
    crate::calls::certificates(certificates, &["issue", "--name", &name]);
    let (address, certificates) = (place.address(), certificates.display());
    let text = format!(
        "[node]\nlisten = \"{address}:0\"\nca = \"{certificates}/ca.pem\"\ncertificate = \"{certificates}/{name}.pem\"\nkey = \"{certificates}/{name}.key\"\nzone = \"{zone}\"\netcd = {etcd}\n[postgres]\nurl = \"{postgres}\"\n[redis]\nurl = \"{redis}\"\n[mqtt_bus]\nurl = \"{broker}\"\n[gateway]\nlisten_address = \"{address}\"\nlisten_retry_delay = \"200ms\"\n",
    );
    let path = folder.path().join(format!("node-{zone}.toml"));
    std::fs::write(&path, text).unwrap();
    path
}

/// All of it, under load.
struct Stage {
    load: Load,
    nodes: Vec<Server>,
    etcd: EtcdCluster,
    patroni: RefCell<Patroni>,
    _redis: Redis,
    _broker: Mosquitto,
    _folder: TempDir,
    zones: Zones,
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
        crate::calls::certificates(folder.path(), &["new-ca"]);
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
        Self { load, nodes, etcd, patroni, _redis, _broker, _folder, zones }
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

/// A zone with a node, an etcd and PostgreSQL's primary hears and is heard no more, and comes back.
#[test]
fn a_whole_zone_may_be_cut_off() {
    let stage = Stage::set();
    let zone = stage.patroni.borrow_mut().whole();
    let others: Vec<usize> = (0..ZONES).filter(|other| *other != zone).collect();
    let leaders = if stage.etcd.leader() == Some(zone) { ", and the leader of etcd" } else { "" };
    let fault = Fault {
        what: &format!("a whole zone cut off, with PostgreSQL's primary{leaders}"),
        lasts: Duration::ZERO,
        effect: Effect::Failover,
        serving: &others,
    };
    let heal = || {
        let leader = stage.patroni.borrow().leader();
        assert!(leader.is_some_and(|leader| leader != zone), "promoted: {leader:?}");
        stage.zones.heal(zone);
    };
    stage.load.through(&fault, || stage.zones.cut(zone), heal, || stage.whole());
    // The former primary comes back as a standby, and takes nothing from the new one.
    let leader = stage.patroni.borrow_mut().whole();
    assert_ne!(leader, zone, "the primary that was cut off leads again");
    stage.load.all_get_on("all devices to be acknowledged once PostgreSQL is whole");
    stage.end("a zone cut off");
}
