//! Nodes of one role each, killed and stopped.

use std::cell::RefCell;
use std::net::TcpStream;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use fieldline_testkit::servers::Place;
use rustix::process::Signal;
use serde_json::json;

use super::{Effect, Fault, Load, is_whole};
use crate::cluster::{World, address};
use crate::device::Manner;
use crate::mqtt::subscribe;
use crate::server::{Server, TOKEN, free_port, wait_for};

/// Longer than a lease lasts.
const STOPPED: Duration = Duration::from_secs(6);
const DEAD: Duration = Duration::from_secs(2);

struct Stage {
    world: World,
}

impl Stage {
    fn node(&self, role: &str, number: usize) -> Server {
        let config = self.world.config(number);
        Server::node_at(&Place::here(), &config, &format!("{role}-{number}"), role)
    }

    /// Sends SIGCONT to a node that was stopped. One that had ended, because it owned something past its lease, is started
    /// again, as an init system does.
    fn wake(&self, node: &mut Server, role: &str, number: usize) {
        if node.has_ended() {
            *node = self.node(role, number);
        } else {
            node.signal(Signal::CONT);
        }
    }
}

/// Whether a node is a member and ready, as `seen_by` another; `epoch` is that of its former life.
fn is_member(seen_by: &Server, name: &str, epoch: u64) -> Option<u64> {
    let (status, answer) = seen_by.try_ask("GET", "/api/v1/nodes", None)?;
    let node = answer["items"].as_array()?.iter().find(|node| node["name"] == name)?;
    let now = node["epoch"].as_u64()?;
    (status == 200 && node["ready"].as_bool()? && now > epoch).then_some(now)
}

/// A client of MQTT that hears messages, and ends with this.
struct Client(std::process::Child, Receiver<String>);

impl Client {
    fn start(node: &Server) -> Self {
        let (child, lines) = subscribe(node, TOKEN, "message/#");
        Self(child, lines)
    }

    /// Whether it hears what is said from now on.
    fn hears(&self) -> Option<()> {
        while self.1.try_recv().is_ok() {}
        self.1.recv_timeout(Duration::from_millis(200)).ok().map(|_| ())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // It may have ended by itself.
        self.0.kill().unwrap_or_default();
        self.0.wait().map(|_| ()).unwrap_or_default();
    }
}

/// Each role is killed and stopped; the other node of the role goes on, and the one that comes back takes part again.
#[test]
fn faults_of_each_role() {
    let stage = Stage { world: World::start() };
    let mut rest = [1, 2].map(|number| stage.node("rest", number));
    rest.iter().for_each(|node| wait_for("the API", || is_whole(node)));
    let mut gateways = [1, 2].map(|number| stage.node("gateway", number));
    let mut brokers = [1, 2].map(|number| stage.node("mqtt", number));
    for role in ["gateway", "mqtt"] {
        for number in [1, 2] {
            let name = format!("{role}-{number}");
            wait_for("nodes without an API", || is_member(&rest[0], &name, 0));
        }
    }
    let port = free_port();
    let channel = json!({
        "name": "trackers", "protocol": "wialon_ips", "transport": "tcp",
        "listen": format!("0.0.0.0:{port}"), "auto_register": true,
    });
    rest[0].ask("POST", "/api/v1/channels", Some(&channel));
    let places = [1, 2].map(|number| format!("{}:{port}", address(number)));
    let listens = |number: usize| TcpStream::connect(&places[number - 1]).ok().map(|_| ());
    [1, 2].into_iter().for_each(|number| wait_for("gateways to listen", || listens(number)));
    let manner = Manner { patience: Duration::from_secs(5), rest: Duration::from_millis(10) };
    let mut load = Load::start(&places, &[&rest[0], &rest[1]], manner);
    let of_second = Client::start(&brokers[1]);
    wait_for("messages over MQTT", || of_second.hears());

    let killed = |what, serving, effect| Fault { what, lasts: DEAD, effect, serving };
    let stopped = |what, serving, effect| Fault { lasts: STOPPED, ..killed(what, serving, effect) };

    // A gateway killed: its devices are at the other. Then that one is stopped, with all devices.
    let epoch = is_member(&rest[0], "gateway-1", 0).unwrap();
    let gateway = RefCell::new(&mut gateways[0]);
    load.through(
        &killed("a gateway node killed, started again after 2 s", &[0, 1], Effect::Moved),
        || gateway.borrow().signal(Signal::KILL),
        || **gateway.borrow_mut() = stage.node("gateway", 1),
        || {
            is_member(&rest[0], "gateway-1", epoch)?;
            listens(1)
        },
    );
    let gateway = RefCell::new(&mut gateways[1]);
    load.through(
        &stopped("a gateway node stopped for 6 s, with all devices", &[0, 1], Effect::Moved),
        || gateway.borrow().signal(Signal::STOP),
        || stage.wake(&mut gateway.borrow_mut(), "gateway", 2),
        || {
            is_member(&rest[0], "gateway-2", 0)?;
            listens(2)
        },
    );

    // What devices had sent to the stopped one before they gave up counts as their newest connection there, once it wakes:
    // they connect once more.
    load.settles();

    // The other node of the API goes on.
    let [first, second] = &mut rest;
    let epoch = is_member(second, "rest-1", 0).unwrap();
    let node = RefCell::new(first);
    load.through(
        &killed("a rest node killed, started again after 2 s", &[1], Effect::None),
        || node.borrow().signal(Signal::KILL),
        || **node.borrow_mut() = stage.node("rest", 1),
        || {
            is_member(second, "rest-1", epoch)?;
            is_whole(&node.borrow())
        },
    );
    load.ask_instead(0, &rest[0]);
    let [first, second] = &mut rest;
    let node = RefCell::new(second);
    load.through(
        &stopped("a rest node stopped for 6 s", &[0], Effect::None),
        || node.borrow().signal(Signal::STOP),
        || stage.wake(&mut node.borrow_mut(), "rest", 2),
        || {
            is_member(first, "rest-2", 0)?;
            is_whole(&node.borrow())
        },
    );
    load.ask_instead(1, &rest[1]);

    // Clients of the other broker hear on; those of a dead one come back to it.
    let epoch = is_member(&rest[0], "mqtt-1", 0).unwrap();
    let broker = RefCell::new(&mut brokers[0]);
    load.through(
        &killed("an mqtt node killed, started again after 2 s", &[0, 1], Effect::None),
        || {
            broker.borrow().signal(Signal::KILL);
            wait_for("clients at the other to hear", || of_second.hears());
        },
        || **broker.borrow_mut() = stage.node("mqtt", 1),
        || is_member(&rest[0], "mqtt-1", epoch).map(|_| ()),
    );
    let of_first = Client::start(&brokers[0]);
    wait_for("messages over MQTT from the node that came back", || of_first.hears());
    let broker = RefCell::new(&mut brokers[1]);
    load.through(
        &stopped("an mqtt node stopped for 6 s", &[0, 1], Effect::None),
        || {
            broker.borrow().signal(Signal::STOP);
            wait_for("clients at the other to hear", || of_first.hears());
        },
        || stage.wake(&mut broker.borrow_mut(), "mqtt", 2),
        || is_member(&rest[0], "mqtt-2", 0).map(|_| ()),
    );
    let of_second = Client::start(&brokers[1]);
    wait_for("messages over MQTT from the node that was stopped", || of_second.hears());
    load.finish(&rest[0], "each role killed and stopped");
    rest.into_iter().chain(gateways).chain(brokers).for_each(Server::stop);
}
