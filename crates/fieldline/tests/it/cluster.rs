//! Several nodes over real servers, any of which may die.

#[path = "balancer.rs"]
mod balancer;
#[path = "lost.rs"]
mod lost;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use fieldline_testkit::servers::{Etcd, Mosquitto, Place, Postgres, Redis};
use rustix::process::Signal;
use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::device::{self, Fleet};
use crate::mqtt::subscribe;
use crate::server::{PATIENCE, Server, TOKEN, wait_for};

const DEVICES: usize = 12;

/// The servers that a cluster stands on.
pub(crate) struct World {
    pub(crate) etcd: Etcd,
    pub(crate) postgres: Postgres,
    pub(crate) redis: Redis,
    pub(crate) broker: Mosquitto,
    folder: TempDir,
}

impl World {
    pub(crate) fn start() -> Self {
        Self::start_at(&[(); 4].map(|()| Place::here()))
    }

    /// Starts etcd, PostgreSQL, Redis and the broker, each at a place of its own.
    pub(crate) fn start_at([etcd, postgres, redis, broker]: &[Place; 4]) -> Self {
        Self {
            etcd: Etcd::start_at(etcd),
            postgres: Postgres::start_at(postgres, &[]),
            redis: Redis::start_at(redis, &[]),
            broker: Mosquitto::start_at(broker, ""),
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// The configuration of a node, whose channels listen on an address of its own.
    pub(crate) fn config(&self, number: usize) -> PathBuf {
        let text = format!(
            "[node]\nlisten = \"127.0.0.1:0\"\netcd = [\"{}\"]\n[postgres]\nurl = \"{}\"\n[redis]\nurl = \"{}\"\n[mqtt_bus]\nurl = \"{}\"\n[gateway]\nlisten_address = \"{}\"\nlisten_retry_delay = \"200ms\"\nlost_after = \"2s\"\n[balancers]\naddresses = [\"{}\"]\n",
            self.etcd.url(),
            self.postgres.url(),
            self.redis.url(),
            self.broker.url(),
            address(number),
            balancer::ADDRESS,
        );
        let path = self.folder.path().join(format!("node-{number}.toml"));
        // Renamed into place: a node that starts may be reading it, where several share a number.
        let written = path.with_extension("new");
        std::fs::write(&written, text).unwrap();
        std::fs::rename(&written, &path).unwrap();
        path
    }

    pub(crate) fn node(&self, number: usize) -> Server {
        Server::node(&self.config(number), &format!("node-{number}"))
    }
}

pub(crate) fn address(number: usize) -> String {
    format!("127.0.0.{}", number + 1)
}

/// Makes a channel at the first node and waits until all listen; returns where.
pub(crate) fn channel(nodes: &[&Server]) -> Vec<String> {
    let (id, port) = nodes[0].channel("wialon_ips", "tcp", json!({}));
    let began = Instant::now();
    wait_for("the channel to listen on each node", || {
        let channel = nodes[0].ask("GET", &format!("/api/v1/channels/{id}"), None);
        let on = channel["status"]["nodes"].as_array()?;
        let all = on.len() == nodes.len() && on.iter().all(|one| one["listening"] == true);
        all.then_some(())
    });
    let took = began.elapsed();
    println!("a new channel listens on {} nodes after {took:?}", nodes.len());
    assert!(took < Duration::from_secs(2), "a change reaches every node in a second: {took:?}");
    (1..=nodes.len()).map(|number| format!("{}:{port}", address(number))).collect()
}

/// Waits until devices get on.
fn gets_on(fleet: &Fleet, what: &str) -> Duration {
    let (before, began) = (fleet.acked() + 100, Instant::now());
    wait_for(what, || (fleet.acked() > before).then_some(()));
    began.elapsed()
}

fn finish(fleet: Fleet, server: &Server, what: &str) {
    let acknowledged = fleet.finish();
    let compared = device::check(server, &acknowledged);
    println!("{what}: {compared} acknowledged messages: 0 lost, 0 doubled");
}

/// Nodes are killed and stopped under load; the others go on, and nothing that was acknowledged is lost.
#[test]
fn nodes_may_die() {
    let world = World::start();
    let mut nodes: Vec<Server> = (1..=3).map(|number| world.node(number)).collect();
    let places = channel(&nodes.iter().collect::<Vec<_>>());
    let fleet = Fleet::start_at(&places, DEVICES);
    gets_on(&fleet, "the first messages");
    for number in 1..=3 {
        nodes.remove(0).kill();
        let took = gets_on(&fleet, "messages after a node died");
        println!("node {number} killed: devices got on after {took:?}");
        nodes.push(world.node(number));
    }
    nodes[0].signal(Signal::STOP);
    gets_on(&fleet, "messages while a node is stopped");
    std::thread::sleep(Duration::from_secs(5));
    nodes[0].signal(Signal::CONT);
    gets_on(&fleet, "messages after it woke");
    finish(fleet, &nodes[1], "nodes killed and stopped");
    for node in nodes {
        node.stop();
    }
}

/// The servers below die one after the other. Redis and etcd are not missed; without PostgreSQL nothing is acknowledged.
#[test]
fn servers_may_die() {
    let mut world = World::start();
    let nodes = [world.node(1), world.node(2)];
    let places = channel(&[&nodes[0], &nodes[1]]);
    let fleet = Fleet::start_at(&places, DEVICES);
    gets_on(&fleet, "the first messages");
    let connections = |node: &Server| -> Vec<Json> {
        let channels = node.list("/api/v1/channels");
        let id = channels[0]["id"].as_str().unwrap();
        let found = node.list(&format!("/api/v1/channels/{id}/connections"));
        let own = found.iter().filter(|one| one["node"] == "node-1");
        own.map(|one| one["id"].clone()).collect()
    };
    let before = connections(&nodes[0]);
    assert!(!before.is_empty());

    world.redis.process.kill();
    gets_on(&fleet, "messages without Redis");
    let device = nodes[0].device("kill-000").unwrap();
    let path = format!("/api/v1/devices/{device}/state");
    wait_for("the API to say that it does not know", || {
        let (status, answer) = nodes[0].try_ask("GET", &path, None)?;
        (status == 503 && answer["code"] == "state_unavailable").then_some(())
    });
    world.redis.restart_empty();
    wait_for("last values after Redis lost its memory", || {
        let (status, answer) = nodes[1].try_ask("GET", &path, None)?;
        (status == 200 && !answer["values"].as_object()?.is_empty()).then_some(())
    });

    world.broker.process.kill();
    gets_on(&fleet, "messages without the broker");
    world.broker.process.start_again();

    world.etcd.process.kill();
    gets_on(&fleet, "messages without etcd");
    std::thread::sleep(Duration::from_secs(6));
    gets_on(&fleet, "messages without etcd after its leases ended");
    world.etcd.restart_empty();
    gets_on(&fleet, "messages after etcd lost its data");
    assert_eq!(connections(&nodes[0]), before, "no connection was dropped");

    world.postgres.crash();
    let took = gets_on(&fleet, "messages after PostgreSQL crashed");
    println!("PostgreSQL crashed: devices got on after {took:?}");
    finish(fleet, &nodes[1], "servers killed");
    for node in nodes {
        node.stop();
    }
}

/// What one node receives is live on another: a client of MQTT there hears it, and the API knows who is online.
#[test]
fn live_items_reach_every_node() {
    let world = World::start();
    let nodes = [world.node(1), world.node(2)];
    let places = channel(&[&nodes[0], &nodes[1]]);
    let (mut client, lines) = subscribe(&nodes[1], TOKEN, "message/#");
    let fleet = Fleet::start_at(&places[..1], 1);
    let heard = lines.recv_timeout(PATIENCE).expect("a message at the other node");
    assert!(heard.contains("\"seq\""), "{heard}");
    let device = nodes[1].device("kill-000").unwrap();
    wait_for("the other node to know that it is online", || {
        let found = nodes[1].ask("GET", &format!("/api/v1/devices/{device}"), None);
        found["online"].as_bool()?.then_some(())
    });
    client.kill().unwrap();
    client.wait().unwrap();
    finish(fleet, &nodes[1], "seen from the other node");
    for node in nodes {
        node.stop();
    }
}

/// A device is held by one node: where it connects last. What is asked of it on any node reaches it there.
#[test]
fn a_device_is_held_by_one_node_and_commanded_from_any() {
    let world = World::start();
    let nodes = [world.node(1), world.node(2)];
    let (id, port) = nodes[0].channel("teltonika", "tcp", json!({}));
    // Seen from the second, of either.
    let held = |number: usize| {
        let channel = nodes[1].ask("GET", &format!("/api/v1/channels/{id}"), None);
        let on = channel["status"]["nodes"].as_array().unwrap();
        let name = format!("node-{number}");
        let node = on.iter().find(|one| one["node"] == name.as_str()).expect("it is named");
        node["connections"].as_u64().unwrap()
    };
    let tracker = |number: usize| {
        let target = format!("{}:{port}", address(number));
        let mut command = Command::new(env!("CARGO_BIN_EXE_fieldline"));
        command.args(["simulate", "trackers", "--protocol", "teltonika", "--devices", "1"]);
        command.args(["--rate", "2", "--seed", "7", "--target", &target]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let mut first = tracker(1);
    wait_for("the device at the first node", || (held(1) == 1).then_some(()));
    let device = wait_for("the device", || {
        let devices = nodes[1].list("/api/v1/devices");
        Some(devices.first()?["id"].as_str()?.to_owned())
    });
    let ask = |node: &Server| {
        let path = format!("/api/v1/devices/{device}/commands?wait_ms=20000");
        let command = json!({ "name": "text", "params": { "text": "getinfo" } });
        let answered = node.ask("POST", &path, Some(&command));
        assert_eq!(answered["status"], "answered", "{answered}");
    };
    // The one that holds it, and the other.
    let began = Instant::now();
    ask(&nodes[0]);
    let own = began.elapsed();
    ask(&nodes[1]);
    println!("a command was answered in {own:?}, from another node in {:?}", began.elapsed() - own);

    // The first is cut as soon as the second connects; then it comes back, and so on: the newest wins each time.
    first.kill().unwrap();
    first.wait().unwrap();
    wait_for("nobody to hold it", || (held(1) == 0).then_some(()));
    let silent = TcpStream::connect(format!("{}:{port}", address(1))).unwrap();
    let login = |mut stream: &TcpStream| {
        let ident = nodes[0].list("/api/v1/devices")[0]["ident"].as_str().unwrap().to_owned();
        stream.write_all(&[0, 15]).unwrap();
        stream.write_all(ident.as_bytes()).unwrap();
        let mut answer = [0];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [1]);
    };
    login(&silent);
    let mut second = tracker(2);
    let began = Instant::now();
    silent.set_read_timeout(Some(PATIENCE)).unwrap();
    let read = (&silent).read(&mut [0; 64]);
    println!("the older connection was closed after {:?}", began.elapsed());
    assert!(matches!(read, Ok(0)) || read.is_err(), "{read:?}");
    wait_for("the device at the second node alone", || {
        (held(1) == 0 && held(2) == 1).then_some(())
    });
    // Whether a device is online is told once all nodes have said what they hold.
    wait_for("the device to be online", || {
        let found = nodes[0].ask("GET", &format!("/api/v1/devices/{device}"), None);
        found["online"].as_bool()?.then_some(())
    });
    ask(&nodes[0]);
    second.kill().unwrap();
    second.wait().unwrap();
    for node in nodes {
        node.stop();
    }
}
