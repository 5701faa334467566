//! Two nodes on one broker.

use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::{Bus, BusItem, Lagged, SystemClock, Topic, TopicFilter};
use fieldline_model::{ParamName, SeriesKind};
use fieldline_mqtt_bus::{MqttBus, MqttBusConfig, encoding};
use fieldline_testkit::servers::Mosquitto;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event, MqttOptions};

use super::{
    account, config, device, eventually, message, next, next_number, node, number, silent,
};

/// Both hear both, in order, once; nobody hears itself again from the broker.
#[tokio::test(flavor = "multi_thread")]
async fn items_come_once_to_all_nodes() {
    const COUNT: u64 = 3_000;
    let broker = Mosquitto::start_with("max_queued_messages 100000");
    let nodes = [node(broker.port()).await, node(broker.port()).await];
    let mut readers = Vec::new();
    for bus in &nodes {
        readers.push(bus.subscribe(account(1), TopicFilter::default()).await);
        readers.push(bus.subscribe(account(1), TopicFilter::default()).await);
    }
    let mut foreign = nodes[1].subscribe(account(2), TopicFilter::default()).await;
    for n in 0..COUNT {
        for (at, bus) in (0_u8..).zip(&nodes) {
            bus.publish(account(1), vec![message(account(1), device(at), n)]).await;
        }
    }
    for reader in &mut readers {
        let mut expected = [0; 2];
        for _ in 0..COUNT * 2 {
            let (of, seq) = number(&next(reader).await.expect("nothing is dropped"));
            let at = usize::from(of == device(1));
            assert_eq!(seq, expected[at]);
            expected[at] += 1;
        }
        silent(reader, 100).await;
    }
    silent(&mut foreign, 10).await;
}

/// All kinds of items arrive as they were, in the order of one device across kinds.
#[tokio::test(flavor = "multi_thread")]
async fn kinds_keep_their_order() {
    let broker = Mosquitto::start();
    let (here, there) = (node(broker.port()).await, node(broker.port()).await);
    let mut items = there.subscribe(account(1), TopicFilter::default()).await;
    let name = ParamName::new("position.speed").unwrap();
    for n in 0..50 {
        let state = BusItem::State { device: device(1), params: vec![name.clone()].into() };
        let kind = SeriesKind::DeviceLog;
        let log = BusItem::Log { kind, object: device(1).0, lines: Vec::new().into() };
        here.publish(account(1), vec![message(account(1), device(1), n), state, log]).await;
    }
    for n in 0..50 {
        assert_eq!(next_number(&mut items).await, n);
        assert_eq!(next(&mut items).await.unwrap().topic(), Topic::State);
        assert_eq!(next(&mut items).await.unwrap().topic(), Topic::Log);
    }
}

/// One node that does not read costs neither the other node nor its own neighbours.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_subscriber_costs_nobody() {
    const COUNT: u64 = 40_000;
    let broker = Mosquitto::start_with("max_queued_messages 100000");
    let (here, there) = (node(broker.port()).await, node(broker.port()).await);
    let mut slow = there.subscribe(account(1), TopicFilter::default()).await;
    let mut quick = there.subscribe(account(1), TopicFilter::default()).await;
    for first in (0..COUNT).step_by(100) {
        let items = (first..first + 100).map(|n| message(account(1), device(1), n)).collect();
        here.publish(account(1), items).await;
        for n in first..first + 100 {
            assert_eq!(next_number(&mut quick).await, n);
        }
    }
    assert!(next(&mut slow).await.unwrap_err().0 > 0);
}

/// A client of the broker that is none of ours.
fn foreign(port: u16) -> (AsyncClient, tokio::sync::mpsc::Receiver<(String, Vec<u8>)>) {
    let mut options = MqttOptions::new("foreign", "127.0.0.1", port);
    options.set_max_packet_size(Some(16 << 20));
    let (client, mut events) = AsyncClient::new(options, 16);
    let (sender, receiver) = tokio::sync::mpsc::channel(1_024);
    tokio::spawn(async move {
        while let Ok(event) = events.poll().await {
            if let Event::Incoming(Packet::Publish(publish)) = event {
                let topic = String::from_utf8_lossy(&publish.topic).into_owned();
                if sender.send((topic, publish.payload.to_vec())).await.is_err() {
                    return;
                }
            }
        }
    });
    (client, receiver)
}

/// The broker is asked for an account once, while there is a subscriber of it.
#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_needed_is_asked_for() {
    let broker = Mosquitto::start_with("sys_interval 1");
    let bus = node(broker.port()).await;
    let (client, mut counts) = foreign(broker.port());
    client.subscribe("$SYS/broker/subscriptions/count", QoS::AtMostOnce).await.unwrap();
    let mut count = async |expected: &str| {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        loop {
            let (_, payload) =
                tokio::time::timeout_at(deadline, counts.recv()).await.unwrap().unwrap();
            let now = String::from_utf8(payload).unwrap();
            if now == expected {
                return;
            }
        }
    };
    count("1").await;
    let one = bus.subscribe(account(1), TopicFilter::default()).await;
    let other = bus.subscribe(account(1), TopicFilter::default()).await;
    let foreign = bus.subscribe(account(2), TopicFilter::default()).await;
    count("3").await;
    drop((one, foreign));
    count("2").await;
    drop(other);
    count("1").await;
    let _again = bus.subscribe(account(1), TopicFilter::default()).await;
    count("2").await;
}

/// Whatever stands on the topics of the bus, it does no harm.
#[tokio::test(flavor = "multi_thread")]
async fn garbage_harms_nothing() {
    let broker = Mosquitto::start();
    let (here, there) = (node(broker.port()).await, node(broker.port()).await);
    let mut items = there.subscribe(account(1), TopicFilter::default()).await;
    let (client, _events) = foreign(broker.port());
    let (ours, about) = (account(1), device(1));
    let topics = [
        format!("fieldline/{ours}/message/{about}"),
        format!("fieldline/{ours}/state/{about}"),
        format!("fieldline/{ours}/event/{about}"),
        format!("fieldline/{ours}/log/{about}"),
        format!("fieldline/{ours}/mark/{about}"),
        format!("fieldline/{ours}/message"),
        format!("fieldline/{ours}/message/{about}/more"),
        format!("fieldline/{ours}/else/{about}"),
        format!("fieldline/{ours}"),
    ];
    let mut random = 1_u64;
    for n in 0..200_usize {
        let mut bytes: Vec<u8> = Vec::new();
        for _ in 0..n * 7 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            bytes.push(random.to_be_bytes()[0]);
        }
        let topic = topics[n % topics.len()].clone();
        client.publish(topic, QoS::AtLeastOnce, n % 3 == 0, bytes).await.unwrap();
        here.publish(ours, vec![message(ours, about, n as u64)]).await;
    }
    // Larger than any payload of the bus: the broker does not even forward it.
    client.publish(topics[0].clone(), QoS::AtLeastOnce, false, vec![1; 8 << 20]).await.unwrap();
    here.publish(ours, vec![message(ours, about, 200)]).await;
    for n in 0..=200 {
        assert_eq!(next_number(&mut items).await, n);
    }
    silent(&mut items, 200).await;
    assert!(here.problems().is_empty() && there.problems().is_empty());
}

/// While nodes are replaced, one of another encoding may publish: what it says cannot be read, and is told as missing.
#[tokio::test(flavor = "multi_thread")]
async fn what_another_version_publishes_is_told_as_missing() {
    let broker = Mosquitto::start();
    let there = node(broker.port()).await;
    let mut items = there.subscribe(account(1), TopicFilter::default()).await;
    let (client, _events) = foreign(broker.port());
    let item = message(account(1), device(1), 1);
    for sequence in 1..=100 {
        let batch = encoding::encode(account(1), std::slice::from_ref(&item)).remove(0);
        let about = batch.about;
        let mut payload = batch.seal(77, sequence, 0);
        payload[0] += 1;
        let check = encoding::HEAD_BYTES - 4;
        let parts: [&[u8]; 5] = [
            about.account.as_bytes(),
            about.kind.name().as_bytes(),
            about.object.as_bytes(),
            &payload[..check],
            &payload[encoding::HEAD_BYTES..],
        ];
        let crc = parts.iter().fold(0, |crc, part| crc32c::crc32c_append(crc, part));
        payload[check..encoding::HEAD_BYTES].copy_from_slice(&crc.to_be_bytes());
        let topic = about.topic("fieldline");
        client.publish(topic, QoS::AtLeastOnce, false, payload).await.unwrap();
    }
    assert_eq!(next(&mut items).await.unwrap_err(), Lagged(0));
    // At once for many, not for each.
    let mut told = 1;
    while let Ok(next) = tokio::time::timeout(Duration::from_millis(600), items.next()).await {
        assert_eq!(next.unwrap().unwrap_err(), Lagged(0));
        told += 1;
    }
    assert!(told < 20, "told {told} times of 100");
}

/// What was captured and comes again changes nothing, under its topic or another.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_replayed_comes_once() {
    let broker = Mosquitto::start();
    let (here, there) = (node(broker.port()).await, node(broker.port()).await);
    let (client, mut captured) = foreign(broker.port());
    client.subscribe("fieldline/#", QoS::AtLeastOnce).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut items = there.subscribe(account(1), TopicFilter::default()).await;
    let mut other = there.subscribe(account(2), TopicFilter::default()).await;
    for n in 0..10 {
        here.publish(account(1), vec![message(account(1), device(1), n)]).await;
    }
    for n in 0..10 {
        assert_eq!(next_number(&mut items).await, n);
    }
    for _ in 0..10 {
        let (topic, payload) = captured.recv().await.unwrap();
        let elsewhere = topic.replace(&account(1).to_string(), &account(2).to_string());
        for topic in [topic, elsewhere] {
            client.publish(topic, QoS::AtLeastOnce, false, payload.clone()).await.unwrap();
        }
    }
    silent(&mut items, 300).await;
    silent(&mut other, 10).await;
}

/// What waits is sent before a node ends.
#[tokio::test(flavor = "multi_thread")]
async fn closing_sends_what_waits() {
    let broker = Mosquitto::start_with("max_queued_messages 100000");
    let (here, there) = (node(broker.port()).await, node(broker.port()).await);
    let mut items = there.subscribe(account(1), TopicFilter::default()).await;
    for n in 0..5_000 {
        here.publish(account(1), vec![message(account(1), device(1), n)]).await;
    }
    assert_eq!(here.close(Duration::from_secs(10)).await, 0);
    for n in 0..5_000 {
        assert_eq!(next_number(&mut items).await, n);
    }
}

/// Two installations on one broker hear nothing of each other.
#[tokio::test(flavor = "multi_thread")]
async fn prefixes_are_apart() {
    let broker = Mosquitto::start();
    let bus = async |prefix: &str| {
        let config = MqttBusConfig { prefix: prefix.to_owned(), ..config(broker.port()) };
        MqttBus::connect(config, Arc::new(SystemClock)).await.unwrap()
    };
    let (one, other) = (bus("one").await, bus("other").await);
    let mut items = other.subscribe(account(1), TopicFilter::default()).await;
    one.publish(account(1), vec![message(account(1), device(1), 1)]).await;
    eventually("it is sent", || one.depth().items == 0 && one.depth().sent == 0).await;
    silent(&mut items, 200).await;
}
