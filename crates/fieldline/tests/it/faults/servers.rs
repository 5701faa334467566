//! The servers that a cluster stands on: restarted, restarted without their data, paused, and cut off one way.

use std::cell::RefCell;
use std::time::Duration;

use fieldline_testkit::servers::Zones;

use super::{Effect, Fault, Load, is_whole};
use crate::cluster::{World, channel};
use crate::device::Manner;
use crate::mqtt::subscribe;
use crate::server::{Server, TOKEN};

/// Zones of the servers.
const ETCD: usize = 0;
const POSTGRES: usize = 1;
const REDIS: usize = 2;
const BROKER: usize = 3;

const MANNER: Manner =
    Manner { patience: Duration::from_secs(30), rest: Duration::from_millis(10) };
/// Longer than any lease lasts.
const LONG: Duration = Duration::from_secs(6);
const SHORT: Duration = Duration::from_secs(3);

/// Two nodes whose servers are in zones of their own, under load.
struct Stage {
    load: Load,
    nodes: [Server; 2],
    world: RefCell<World>,
    zones: Zones,
}

impl Stage {
    fn set() -> Self {
        let zones = Zones::start(4);
        let world = World::start_at(&[ETCD, POSTGRES, REDIS, BROKER].map(|one| zones.place(one)));
        let nodes = [world.node(1), world.node(2)];
        let places = channel(&[&nodes[0], &nodes[1]]);
        let load = Load::start(&places, &[&nodes[0], &nodes[1]], MANNER);
        let stage = Self { load, nodes, world: RefCell::new(world), zones };
        crate::server::wait_for("last values to be there", || stage.whole());
        stage
    }

    fn whole(&self) -> Option<()> {
        self.nodes.iter().try_for_each(is_whole)
    }

    fn fault(&self, what: &str, lasts: Duration, begin: impl FnOnce(), end: impl FnOnce()) {
        let fault = Fault { what, lasts, effect: Effect::None, serving: &[0, 1] };
        self.load.through(&fault, begin, end, || self.whole());
    }

    /// Cut off one way, the other way, and both.
    fn cuts(&self, server: &str, zone: usize, lasts: Duration) {
        for (words, cut) in [
            ("what it says is lost", Zones::cut_from as fn(&Zones, usize)),
            ("what it is told is lost", Zones::cut_to),
        ] {
            let what = format!("{server} cut off one way ({words}), {} s", lasts.as_secs());
            self.fault(&what, lasts, || cut(&self.zones, zone), || self.zones.heal(zone));
        }
    }

    fn end(self, what: &str) {
        self.load.finish(&self.nodes[1], what);
        self.nodes.into_iter().for_each(Server::stop);
    }
}

/// Devices stay connected to their nodes and are acknowledged whatever etcd does, and the API answers.
#[test]
fn faults_of_etcd() {
    let stage = Stage::set();
    let world = || stage.world.borrow_mut();
    stage.fault("etcd restarted", Duration::ZERO, || world().etcd.restart(), || {});
    let killed = || world().etcd.process.kill();
    stage.fault("etcd killed, away for 6 s", LONG, killed, || world().etcd.restart());
    stage
        .fault("etcd restarted with its data lost", SHORT, killed, || world().etcd.restart_empty());
    let (pause, resume) = (|| world().etcd.process.pause(), || world().etcd.process.resume());
    stage.fault("etcd paused for 6 s", LONG, pause, resume);
    stage.cuts("etcd", ETCD, LONG);
    stage.end("faults of etcd");
}

/// Redis is not missed by devices, and last values are what was said last after each fault.
#[test]
fn faults_of_redis() {
    let stage = Stage::set();
    let world = || stage.world.borrow_mut();
    let killed = || world().redis.process.kill();
    let empty = || world().redis.restart_empty();
    stage.fault("Redis restarted, its data lost with it", Duration::ZERO, empty, || {});
    stage.fault("Redis killed, away for 3 s", SHORT, killed, empty);
    let (pause, resume) = (|| world().redis.process.pause(), || world().redis.process.resume());
    stage.fault("Redis paused for 6 s", LONG, pause, resume);
    stage.cuts("Redis", REDIS, LONG);
    stage.end("faults of Redis");
}

/// The broker is not missed by devices, and what one node receives is live at the other after each fault.
#[test]
fn faults_of_the_broker() {
    let stage = Stage::set();
    let world = || stage.world.borrow_mut();
    // The first device is at the first node; who listens is at the second.
    let device = stage.nodes[1].device("kill-000").unwrap();
    let (mut client, lines) = subscribe(&stage.nodes[1], TOKEN, &format!("message/{device}"));
    let through = |what: &str, lasts, begin: &dyn Fn(), end: &dyn Fn()| {
        let fault = Fault { what, lasts, effect: Effect::None, serving: &[0, 1] };
        let mut after = None;
        stage.load.through(&fault, begin, end, || {
            stage.whole()?;
            let seq = |line: &str| {
                let (_, payload) = line.split_once(' ')?;
                serde_json::from_str::<serde_json::Value>(payload).ok()?["seq"].as_u64()
            };
            // Said after it was whole again, and heard.
            let after = *after.get_or_insert_with(|| stage.load.fleet.most());
            lines.try_iter().any(|line| seq(&line) > Some(after)).then_some(())
        });
    };
    let killed = || world().broker.process.kill();
    let again = || world().broker.process.start_again();
    through("the broker restarted, its data lost with it", Duration::ZERO, &again, &|| {});
    through("the broker killed, away for 3 s", SHORT, &killed, &again);
    through("the broker paused for 6 s", LONG, &|| world().broker.process.pause(), &|| {
        world().broker.process.resume();
    });
    for (words, cut) in [
        ("what it says is lost", Zones::cut_from as fn(&Zones, usize)),
        ("what it is told is lost", Zones::cut_to),
    ] {
        let what = format!("the broker cut off one way ({words}), 6 s");
        through(&what, LONG, &|| cut(&stage.zones, BROKER), &|| stage.zones.heal(BROKER));
    }
    client.kill().unwrap();
    client.wait().unwrap();
    stage.end("faults of the broker");
}

/// Without PostgreSQL nothing is acknowledged; devices send again, and what was stored already is recognised.
#[test]
fn faults_of_postgresql() {
    let stage = Stage::set();
    let world = || stage.world.borrow_mut();
    let fault = |what: &str, lasts, begin: &dyn Fn(), end: &dyn Fn()| {
        let fault = Fault { what, lasts, effect: Effect::Silence, serving: &[] };
        stage.load.through(&fault, begin, end, || stage.whole());
    };
    fault("PostgreSQL killed, away for 3 s", SHORT, &|| world().postgres.process.kill(), &|| {
        world().postgres.crash();
    });
    fault("PostgreSQL paused for 6 s", LONG, &|| world().postgres.pause(), &|| {
        world().postgres.resume();
    });
    for (words, cut) in [
        ("what it says is lost", Zones::cut_from as fn(&Zones, usize)),
        ("what it is told is lost", Zones::cut_to),
    ] {
        let what = format!("PostgreSQL cut off one way ({words}), 8 s");
        let lasts = Duration::from_secs(8);
        fault(&what, lasts, &|| cut(&stage.zones, POSTGRES), &|| stage.zones.heal(POSTGRES));
    }
    stage.end("faults of PostgreSQL");
}
