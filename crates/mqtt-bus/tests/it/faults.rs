//! Faults of the broker and of the wire, under load.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fieldline_contracts::{Bus, SystemClock, TopicFilter};
use fieldline_mqtt_bus::{MqttBus, MqttBusConfig};
use fieldline_testkit::servers::{Cut, Flow, Mosquitto};

use super::load::{Load, Published, Reader};
use super::{account, config, device, eventually, message, next, next_number, node};

/// Longest that publishing may take on a busy machine: it waits for nobody, whatever happens.
const PUBLISH_MAX: Duration = Duration::from_millis(500);
/// How long a fault lasts: longer than the patience of the tests.
const FAULT: Duration = Duration::from_millis(2_500);

fn judge(what: &str, published: &Published, received: u64, lost: u64) {
    let Published { items, longest, deepest } = published;
    println!(
        "{what}: {items} items, {received} came, {lost} told as lost; longest publish {longest:?}, deepest queue {deepest}"
    );
    assert!(*items > 2_000, "too little load");
    assert!(*longest < PUBLISH_MAX, "publishing waited for {longest:?}");
}

/// Both nodes behind wires of their own.
struct World {
    broker: Mosquitto,
    here_wire: Cut,
    there_wire: Cut,
    here: Arc<MqttBus>,
    there: MqttBus,
}

async fn world(lines: &str, change: impl Fn(MqttBusConfig) -> MqttBusConfig) -> World {
    super::log();
    let broker = Mosquitto::start_with(lines);
    let (here_wire, there_wire) =
        (Cut::before(broker.port()).await, Cut::before(broker.port()).await);
    let bus = async |wire: &Cut| {
        MqttBus::connect(change(config(wire.port())), Arc::new(SystemClock)).await.unwrap()
    };
    let (here, there) = (Arc::new(bus(&here_wire).await), bus(&there_wire).await);
    World { broker, here_wire, there_wire, here, there }
}

/// Runs load through a fault, and closes the books.
async fn through(what: &str, world: World, fault: impl AsyncFnOnce(&mut World)) -> (u64, u64) {
    let mut world = world;
    let (local, remote) = (Reader::of(&world.here).await, Reader::of(&world.there).await);
    let load = Load::start(Arc::clone(&world.here));
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = local.received();
    let began = Instant::now();
    fault(&mut world).await;
    let during = local.received() - before;
    assert!(during > 0 || began.elapsed() < Duration::from_millis(100), "the own ones wait");
    let healed = Instant::now();
    let came = remote.received();
    eventually("items come again", || remote.received() > came).await;
    println!("{what}: the first item came {:?} after the fault", healed.elapsed());
    tokio::time::sleep(Duration::from_millis(500)).await;
    let published = load.stop().await;
    // What the process says itself reaches its own at once, all of it, be the broker there or not.
    assert_eq!(local.settle(published.items).await, (published.items, 0));
    let (received, lost) = remote.settle(published.items).await;
    judge(what, &published, received, lost);
    assert_eq!(world.here.problems(), Vec::<String>::new());
    assert_eq!(world.there.problems(), Vec::<String>::new());
    (received, lost)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_killed_and_started_again() {
    let world = world("", |config| config).await;
    through("killed", world, async |world| {
        world.broker.process.kill();
        tokio::time::sleep(FAULT).await;
        let problems = world.here.problems();
        assert!(problems.len() == 1 && problems[0].contains("away since"), "{problems:?}");
        assert!(world.here.depth().items > 0);
        world.broker.process.start_again();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_paused() {
    let world = world("", |config| config).await;
    through("paused", world, async |world| {
        world.broker.process.pause();
        tokio::time::sleep(FAULT).await;
        assert!(!world.here.problems().is_empty());
        world.broker.process.resume();
    })
    .await;
}

/// Every way a wire can be cut, of who publishes.
#[tokio::test(flavor = "multi_thread")]
async fn the_publishers_wire_is_cut() {
    for flow in [Flow::ToServerHeld, Flow::ToClientHeld, Flow::Held, Flow::Refused] {
        let world = world("max_queued_messages 100000", |config| config).await;
        let what = format!("publisher {flow:?}");
        let (_, lost) = through(&what, world, async |world| {
            world.here_wire.set(flow);
            tokio::time::sleep(FAULT).await;
            world.here_wire.set(Flow::Open);
        })
        .await;
        assert_eq!(lost, 0, "there was room for all");
    }
}

/// Every way a wire can be cut, of who listens. The broker keeps for it what it has room for.
#[tokio::test(flavor = "multi_thread")]
async fn the_subscribers_wire_is_cut() {
    for flow in [Flow::ToServerHeld, Flow::ToClientHeld, Flow::Held, Flow::Refused] {
        let world = world("max_queued_messages 100000", |config| config).await;
        let what = format!("subscriber {flow:?}");
        let (_, lost) = through(&what, world, async |world| {
            world.there_wire.set(flow);
            tokio::time::sleep(FAULT).await;
            world.there_wire.set(Flow::Open);
        })
        .await;
        assert_eq!(lost, 0, "the broker had room for all");
    }
}

/// The broker keeps more payloads than may be on their way to us at a time: they come in order all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_absence() {
    let world = world("max_queued_messages 100000", |config| config).await;
    let (_, lost) = through("long absence", world, async |world| {
        world.there_wire.set(Flow::Refused);
        tokio::time::sleep(FAULT * 23 / 10).await;
        world.there_wire.set(Flow::Open);
    })
    .await;
    assert_eq!(lost, 0, "the broker had room for all");
}

/// A broker of usual settings keeps 1,000 payloads for who is away: the rest is told as lost.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_broker_drops_is_told() {
    let world = world("max_queued_messages 100", |config| config).await;
    let (_, lost) = through("small broker", world, async |world| {
        world.there_wire.set(Flow::Refused);
        tokio::time::sleep(FAULT).await;
        world.there_wire.set(Flow::Open);
    })
    .await;
    assert!(lost > 0, "the broker keeps 100 payloads only");
}

/// Short cuts one after the other, on both wires, so that much is sent twice.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_again_comes_once() {
    let world = world("max_queued_messages 100000", |config| config).await;
    let (_, lost) = through("flapping", world, async |world| {
        for n in 0..20 {
            let wire = if n % 2 == 0 { &world.here_wire } else { &world.there_wire };
            wire.set(Flow::ToClientHeld);
            tokio::time::sleep(Duration::from_millis(30)).await;
            wire.set(Flow::Refused);
            tokio::time::sleep(Duration::from_millis(30)).await;
            wire.set(Flow::Open);
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
    })
    .await;
    assert_eq!(lost, 0, "there was room for all");
}

/// More than has room: the oldest go, the newest come, and those elsewhere are told how many are missing.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_drops_the_oldest_and_tells() {
    let small = |config| MqttBusConfig { queue_items_max: 1_000, ..config };
    let World { broker, here_wire, here, there, there_wire } = world("", small).await;
    let mut items = there.subscribe(account(1), TopicFilter::default()).await;
    here.publish(account(1), vec![message(account(1), device(2), 0)]).await;
    assert_eq!(next_number(&mut items).await, 0);
    here_wire.set(Flow::Refused);
    eventually("the bus is away", || !here.problems().is_empty()).await;
    let mut longest = Duration::ZERO;
    for n in 1..=10_000 {
        let began = Instant::now();
        here.publish(account(1), vec![message(account(1), device(2), n)]).await;
        longest = longest.max(began.elapsed());
        assert!(here.depth().items <= 1_000);
    }
    assert!(longest < PUBLISH_MAX, "{longest:?}");
    let depth = here.depth();
    assert_eq!((depth.items, depth.dropped), (1_000, 9_000));
    here_wire.set(Flow::Open);
    let lost = next(&mut items).await.unwrap_err();
    assert_eq!(lost.0, 9_000);
    for n in 9_001..=10_000 {
        assert_eq!(next_number(&mut items).await, n);
    }
    drop((broker, there_wire));
}

/// A node that starts while the broker is away serves its own; when the broker comes, its subscribers are told.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_comes_later() {
    let broker = Mosquitto::start();
    let wire = Cut::before(broker.port()).await;
    wire.set(Flow::Refused);
    let late = MqttBus::start(config(wire.port()), Arc::new(SystemClock)).unwrap();
    assert_eq!(late.problems().len(), 1);
    let began = Instant::now();
    let mut items = late.subscribe(account(1), TopicFilter::default()).await;
    assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
    late.publish(account(1), vec![message(account(1), device(2), 1)]).await;
    assert_eq!(next_number(&mut items).await, 1);
    wire.set(Flow::Open);
    assert_eq!(next(&mut items).await.unwrap_err().0, 0, "some may be missing");
    assert!(late.problems().is_empty());
    let other = node(broker.port()).await;
    other.publish(account(1), vec![message(account(1), device(3), 2)]).await;
    assert_eq!(next_number(&mut items).await, 2);
}

/// After the last item of a burst was lost, nobody has to wait for the next one to hear of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_loss_at_the_end_is_noticed() {
    let World { broker, here_wire, here, there, there_wire } =
        world("max_queued_messages 10\nmax_inflight_messages 10", |config| config).await;
    let mut items = there.subscribe(account(1), TopicFilter::default()).await;
    here.publish(account(1), vec![message(account(1), device(2), 0)]).await;
    assert_eq!(next_number(&mut items).await, 0);
    there_wire.set(Flow::Refused);
    eventually("the bus is away", || !there.problems().is_empty()).await;
    for n in 1..=500_u64 {
        // Objects of their own, so that each is a payload.
        let device = device(u8::try_from(n % 100).unwrap());
        here.publish(account(1), vec![message(account(1), device, n)]).await;
    }
    eventually("all is sent", || here.depth().items == 0 && here.depth().sent == 0).await;
    there_wire.set(Flow::Open);
    let (mut came, mut lost) = (0, 0);
    while came + lost < 500 {
        match next(&mut items).await {
            Ok(_) => came += 1,
            Err(lagged) => lost += lagged.0,
        }
    }
    println!("{came} came, {lost} told as lost");
    assert!(lost > 0);
    drop((broker, here_wire));
}
