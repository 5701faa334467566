//! Clients of two nodes, who must not notice that there are two.

use std::time::{Duration, Instant};

use fieldline_model::Scope;
use fieldline_mqtt::MqttConfig;
use mqtt_protocol_core::mqtt::packet::Property;

use crate::harness::{SOON, Server};
use crate::wire::{Hello, Wire, text};

async fn pair() -> [Server; 2] {
    Server::nodes(MqttConfig::default()).await.0
}

/// Whether the connection is still there.
async fn answers(wire: &mut Wire) -> bool {
    if tokio::io::AsyncWriteExt::write_all(&mut wire.stream, &[0xc0, 0]).await.is_err() {
        return false;
    }
    loop {
        match wire.try_recv(SOON).await {
            Ok(got) if got.first == 0xd0 => return true,
            Ok(_) => {}
            Err("closed") => return false,
            Err(why) => panic!("neither there nor gone: {why}"),
        }
    }
}

#[tokio::test]
async fn messages_reach_clients_of_every_node_once_and_as_they_were() {
    let nodes = pair().await;
    let tenant = nodes[0].tenant("a").await;
    let mut here = Wire::join(&nodes[0], true, "here", &tenant.token).await;
    let mut there = Wire::join(&nodes[1], true, "there", &tenant.token).await;
    let mut old = Wire::join(&nodes[1], false, "old", &tenant.token).await;
    // An identifier, no local and retain as published are the subscriber's own.
    assert_eq!(there.subscribe_as("client/#", 0x01 | 0x04 | 0x08, &[11, 7]).await, 1);
    assert_eq!(here.subscribe("client/#", 0x01 | 0x04).await, 1);
    old.subscribe("client/+", 0).await;
    let mut props = vec![1, 1, 2, 0, 0, 0, 100, 3];
    text(&mut props, "text/plain");
    props.push(8);
    text(&mut props, "client/answers");
    props.push(9);
    text(&mut props, "seven");
    props.push(38);
    text(&mut props, "key");
    text(&mut props, "value");
    let id = here.publish("client/x", "hello", 0x02, &props).await.unwrap();
    assert_eq!(here.puback(id).await, 0);
    let got = there.message().await;
    assert_eq!((&*got.topic, &*got.payload, got.qos, got.retain), ("client/x", "hello", 1, false));
    assert_eq!(got.identifiers, [7]);
    let shown = format!("{:?}", got.props);
    for part in ["text/plain", "client/answers", "key", "value", "PayloadFormatIndicator"] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
    let has = |wanted: fn(&Property) -> bool| got.props.iter().any(wanted);
    assert!(has(|p| matches!(p, Property::CorrelationData(d) if d.val() == b"seven")));
    assert!(has(
        |p| matches!(p, Property::MessageExpiryInterval(n) if (99..=100).contains(&n.val()))
    ));
    assert_eq!(old.message().await.payload, "hello");
    there.ack(got.packet_id.unwrap()).await;

    // In the order they were published, each once, back and forth.
    for n in 0..300 {
        here.publish("client/n", &n.to_string(), 0, &[]).await;
        there.publish("client/m", &n.to_string(), 0, &[]).await;
    }
    for n in 0..300 {
        assert_eq!(there.message().await.payload, n.to_string());
        assert_eq!(here.message().await.payload, n.to_string());
    }
    assert!(answers(&mut here).await && answers(&mut there).await);
    here.silent().await;
    there.silent().await;

    // What crosses has nothing of another account's, and nobody who is restricted hears too much.
    let foreign = nodes[1].tenant("b").await;
    let mut spy = Wire::join(&nodes[1], true, "there", &foreign.token).await;
    let seen = nodes[0].device(tenant.account, "seen").await;
    let token = nodes[0].token(tenant.account, vec![Scope::Read], vec![seen.id]).await;
    let mut some = Wire::join(&nodes[1], true, "some", &token).await;
    spy.subscribe("#", 0).await;
    some.subscribe("#", 0).await;
    here.publish_acked("client/free", "x").await;
    here.publish_acked(&format!("client/{}/x", tenant.device.id), "x").await;
    here.publish_acked(&format!("client/{}/x", seen.id), "seen").await;
    assert_eq!(some.message().await.payload, "seen");
    some.silent().await;
    spy.silent().await;
}

/// The largest properties that a client may send cross; larger ones never leave its node.
#[tokio::test]
async fn large_properties_cross_whole_and_too_many_not_at_all() {
    let nodes = pair().await;
    let tenant = nodes[0].tenant("a").await;
    let mut there = Wire::join(&nodes[1], true, "there", &tenant.token).await;
    there.subscribe("client/#", 0).await;
    let mut here = Wire::join(&nodes[0], true, "here", &tenant.token).await;
    let value = "v".repeat(50_000);
    let mut props = Vec::new();
    for _ in 0..4 {
        props.push(38);
        text(&mut props, "k");
        text(&mut props, &value);
    }
    let id = here.publish("client/large", "x", 0x02, &props).await.unwrap();
    assert_eq!(here.puback(id).await, 0);
    let got = there.message().await;
    assert_eq!((&*got.payload, got.props.len()), ("x", 4));
    // Above the packet's limit, and above that of user properties.
    let mut many = Vec::new();
    for _ in 0..65 {
        many.push(38);
        text(&mut many, "k");
        text(&mut many, "v");
    }
    props.extend_from_within(..100_008);
    for (props, reason) in [(props, 0x95), (many, 0x97)] {
        let mut here = Wire::join(&nodes[0], true, "hostile", &tenant.token).await;
        here.publish("client/large", "x", 0x02, &props).await;
        assert_eq!(here.closed().await, Some(reason));
    }
    assert!(answers(&mut there).await);
    there.silent().await;
}

/// The older connection of a client id is told within a second, on whichever node it is.
#[tokio::test]
async fn the_newest_connection_of_a_client_id_wins_over_all_nodes() {
    let nodes = pair().await;
    let (a, b) = (nodes[0].tenant("a").await, nodes[0].tenant("b").await);
    let mut other = Wire::join(&nodes[1], true, "same", &b.token).await;
    let mut last = Wire::join(&nodes[0], true, "same", &a.token).await;
    for round in 0..6 {
        // Without last values' store, the clock decides.
        nodes[0].state.set_away(round >= 4);
        let newer = Wire::join(&nodes[(round + 1) % 2], true, "same", &a.token).await;
        let began = Instant::now();
        assert_eq!(last.closed().await, Some(0x8e));
        assert!(began.elapsed() < Duration::from_secs(1), "told after {:?}", began.elapsed());
        last = newer;
    }
    assert!(answers(&mut last).await && answers(&mut other).await);
}

/// Of those that connect at the same instant, one stays.
#[tokio::test]
async fn of_two_that_connect_at_once_exactly_one_stays() {
    let nodes = pair().await;
    let tenant = nodes[0].tenant("a").await;
    for round in 0..12 {
        // Without last values' store too.
        nodes[0].state.set_away(round % 4 == 3);
        let name = format!("same-{round}");
        let hello = Hello::new(true, &name, &tenant.token);
        let mut all = futures_util::future::join_all((0..4).map(|at| {
            let (node, hello) = (&nodes[at % 2], hello.bytes());
            async move {
                let mut wire = Wire::open(node).await;
                wire.send(&hello).await;
                // Those of one node may take the place of each other before the answer.
                wire.try_recv(SOON).await.ok().map(|_| wire)
            }
        }))
        .await;
        let began = Instant::now();
        let mut there = 4;
        while there != 1 {
            assert!(began.elapsed() < SOON, "{there} stay in round {round}");
            there = 0;
            for wire in all.iter_mut().flatten() {
                there += usize::from(answers(wire).await);
            }
            assert!(there > 0, "none stays in round {round}");
        }
    }
}

/// While nodes cannot hear each other each has its own; once they can, the newest stays.
#[tokio::test]
async fn what_was_not_heard_is_made_good() {
    let (nodes, bus) = Server::nodes(MqttConfig::default()).await;
    let tenant = nodes[0].tenant("a").await;
    let mut first = Wire::join(&nodes[0], true, "same", &tenant.token).await;
    bus.cut();
    let mut second = Wire::join(&nodes[1], true, "same", &tenant.token).await;
    let mut third = Wire::join(&nodes[1], true, "other", &tenant.token).await;
    let mut fourth = Wire::join(&nodes[0], true, "other", &tenant.token).await;
    for wire in [&mut first, &mut second, &mut third, &mut fourth] {
        assert!(answers(wire).await);
    }
    bus.mend();
    assert_eq!(first.closed().await, Some(0x8e));
    assert_eq!(third.closed().await, Some(0x8e));
    assert!(answers(&mut second).await && answers(&mut fourth).await);
}

/// The answer to a command reaches the asker wherever it is connected by then.
#[tokio::test]
async fn answers_to_commands_reach_every_node() {
    let nodes = pair().await;
    let tenant = nodes[0].tenant("a").await;
    let mut asks = Wire::join(&nodes[0], true, "asks", &tenant.token).await;
    let mut waits = Wire::join(&nodes[1], true, "waits", &tenant.token).await;
    waits.subscribe("client/answers", 1).await;
    waits.subscribe("command/+/+/answer", 1).await;
    let mut props = vec![8];
    text(&mut props, "client/answers");
    props.push(9);
    text(&mut props, "seven");
    let topic = format!("command/{}/text", tenant.device.id);
    for props in [&props[..], &[]] {
        let id = asks.publish(&topic, "x", 0x02, props).await.unwrap();
        assert_eq!(asks.puback(id).await, 0);
        let commands = &nodes[0].services.platform.commands;
        for command in commands.list(tenant.account, tenant.device.id, 10).await.unwrap() {
            let actor = fieldline_contracts::Actor::system("test");
            // The first is over when the second is sent.
            if !command.status.is_final() {
                commands.cancel(tenant.account, command.id, &actor).await.unwrap();
            }
        }
        let got = waits.message().await;
        waits.ack(got.packet_id.unwrap()).await;
        assert!(got.payload.contains("cancelled"), "{got:?}");
        if props.is_empty() {
            assert_eq!(got.topic, format!("{topic}/answer"));
        } else {
            assert_eq!(got.topic, "client/answers");
            assert!(format!("{:?}", got.props).contains("CorrelationData"));
        }
    }
}

/// A token that is revoked ends the connections of all nodes.
#[tokio::test]
async fn a_revoked_token_ends_the_connections_of_every_node() {
    let nodes = pair().await;
    let tenant = nodes[0].tenant("a").await;
    let new = fieldline_auth::NewToken {
        name: "short".into(),
        scopes: vec![Scope::Read],
        ..Default::default()
    };
    let (id, secret) = nodes[0].new_token(tenant.account, new).await;
    let mut one = Wire::join(&nodes[0], true, "one", &secret).await;
    let mut two = Wire::join(&nodes[1], true, "two", &secret).await;
    let registry = &nodes[0].services.platform.registry;
    let actor = fieldline_contracts::Actor::system("test");
    registry
        .delete(tenant.account, fieldline_contracts::Kind::Token, id.0, None, &actor)
        .await
        .unwrap();
    assert_eq!(one.closed().await, Some(0x87));
    assert_eq!(two.closed().await, Some(0x87));
}

/// What one account floods with arrives late for nobody else, and nobody's session ends.
#[tokio::test]
async fn a_flood_of_one_account_does_not_delay_another() {
    let nodes = pair().await;
    let (a, b) = (nodes[0].tenant("a").await, nodes[0].tenant("b").await);
    let mut sink = Wire::join(&nodes[1], true, "sink", &a.token).await;
    sink.subscribe("client/#", 0).await;
    let mut hears = Wire::join(&nodes[1], true, "hears", &b.token).await;
    hears.subscribe("client/#", 0).await;
    let mut says = Wire::join(&nodes[0], true, "says", &b.token).await;
    let flood = Wire::join(&nodes[0], true, "flood", &a.token).await;
    let flooding = tokio::spawn(async move {
        let mut flood = flood;
        let payload = "x".repeat(4_000);
        loop {
            flood.publish("client/x", &payload, 0, &[]).await;
        }
    });
    // Nobody reads `sink`: its queue is full all the time.
    let mut slowest = Duration::ZERO;
    for n in 0..50 {
        let began = Instant::now();
        says.publish_acked("client/x", &n.to_string()).await;
        let heard = hears.message().await;
        assert_eq!(heard.payload, n.to_string());
        slowest = slowest.max(began.elapsed());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    eprintln!("during a flood of another account a message took {slowest:?} at most");
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    flooding.abort();
}

/// What is retained on one node is there on the other, bounded over both, whether or not they hear each other.
#[tokio::test]
async fn retained_messages_are_the_same_on_every_node() {
    let config = MqttConfig { retained_messages_max: 3, ..MqttConfig::default() };
    let (nodes, bus) = Server::nodes(config).await;
    let tenant = nodes[0].tenant("a").await;
    let mut one = Wire::join(&nodes[0], true, "one", &tenant.token).await;
    let mut two = Wire::join(&nodes[1], true, "two", &tenant.token).await;
    bus.cut();
    let retain = async |wire: &mut Wire, topic: &str, payload: &str, props: &[u8]| {
        let id = wire.publish(topic, payload, 0x03, props).await.unwrap();
        wire.puback(id).await
    };
    let mut props = vec![2, 0, 0, 0, 100, 9];
    text(&mut props, "seven");
    assert_eq!(retain(&mut one, "client/a/1", "one", &props).await, 0);
    assert_eq!(retain(&mut two, "client/a/2", "two", &[]).await, 0);
    assert_eq!(retain(&mut two, "client/b", "b", &[]).await, 0);
    assert_eq!(retain(&mut one, "client/c", "c", &[]).await, 0x97, "the bound is the account's");
    for (filter, expected) in [
        ("client/a/1", vec!["one"]),
        ("client/a/+", vec!["one", "two"]),
        ("client/a/#", vec!["one", "two"]),
        ("#", vec!["one", "two", "b"]),
        ("client/none", vec![]),
    ] {
        for (node, v5) in [(&nodes[0], true), (&nodes[1], false)] {
            let mut wire = Wire::join(node, v5, "reads", &tenant.token).await;
            wire.subscribe(filter, 1).await;
            for payload in &expected {
                let got = wire.message().await;
                assert_eq!((&*got.payload, got.retain, got.qos), (*payload, true, 1), "{filter}");
                wire.ack(got.packet_id.unwrap()).await;
                if *payload == "one" && v5 {
                    let shown = format!("{:?}", got.props);
                    assert!(shown.contains("CorrelationData"), "{shown}");
                    assert!(shown.contains("MessageExpiryInterval"), "{shown}");
                }
            }
            assert!(answers(&mut wire).await);
        }
    }
    // Forgotten on the other node than it was retained on; then there is room.
    assert_eq!(retain(&mut two, "client/a/1", "", &[]).await, 0);
    assert_eq!(retain(&mut one, "client/c", "c", &[]).await, 0);
    // What was said while they could not hear each other comes to those who subscribed before.
    two.subscribe("client/c", 0x20).await;
    assert_eq!(retain(&mut one, "client/c", "newer", &[]).await, 0);
    bus.mend();
    let got = two.message().await;
    assert_eq!((&*got.payload, got.retain), ("newer", true));
    let foreign = nodes[1].tenant("b").await;
    let mut spy = Wire::join(&nodes[1], true, "reads", &foreign.token).await;
    spy.subscribe("#", 0).await;
    spy.silent().await;
}
