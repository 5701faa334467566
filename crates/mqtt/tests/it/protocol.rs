//! The standard, packet by packet.

use std::time::Duration;

use fieldline_model::{Decimal, EventKind, Series, Value};
use fieldline_mqtt::MqttConfig;
use mqtt_protocol_core::mqtt::packet::{Property, v5_0};

use crate::harness::Server;
use crate::wire::{Hello, Wire, packet, text};

#[tokio::test]
async fn connack_says_what_is_offered() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let mut hello = Hello::new(true, "", &tenant.token);
    hello.keep_alive_s = 0;
    // Session expiry of an hour is asked for.
    hello.props = vec![17, 0, 0, 0x0e, 0x10];
    let (_wire, body) = Wire::hello(&server, &hello).await;
    let (connack, used) = v5_0::Connack::parse(&body).unwrap();
    assert_eq!(used, body.len());
    let props = connack.props();
    assert_eq!(props.len(), 8);
    for property in props {
        match property {
            Property::SessionExpiryInterval(p) => assert_eq!(p.val(), 0),
            Property::MaximumQos(p) => assert_eq!(p.val(), 1),
            Property::SharedSubscriptionAvailable(p) => assert_eq!(p.val(), 0),
            Property::ServerKeepAlive(p) => assert_eq!(p.val(), 3_600),
            Property::ReceiveMaximum(p) => assert_eq!(p.val(), 256),
            Property::TopicAliasMaximum(p) => assert_eq!(p.val(), 16),
            Property::MaximumPacketSize(p) => assert_eq!(p.val(), 256 * 1024),
            Property::AssignedClientIdentifier(p) => assert!(p.val().starts_with("fieldline-")),
            other => panic!("unexpected {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_token_is_taken_as_password_or_as_user_name() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let token = tenant.token.as_str();
    for (user, password) in [
        (Some("any"), Some(token)),
        (Some(token), None),
        (Some(token), Some("x")),
        (Some(token), Some("")),
    ] {
        for v5 in [false, true] {
            let hello = Hello { user_name: user, password, ..Hello::new(v5, "c", token) };
            Wire::hello(&server, &hello).await;
        }
    }
    // MQTT 5 allows a password alone.
    let hello = Hello { user_name: None, ..Hello::new(true, "c", token) };
    Wire::hello(&server, &hello).await;
}

#[tokio::test]
async fn a_wrong_or_missing_token_is_refused() {
    let server = Server::start().await;
    let wrong = "flt_0000000000000000000000000000000000000000";
    for (user, password) in [(None, None), (Some("x"), Some(wrong)), (Some("x"), Some("y"))] {
        for (v5, expected) in [(true, 0x86), (false, 4)] {
            let hello = Hello { user_name: user, password, ..Hello::new(v5, "c", "") };
            let mut wire = Wire::open(&server).await;
            wire.send(&hello.bytes()).await;
            let connack = wire.recv().await;
            assert_eq!((connack.first, connack.body[1]), (0x20, expected), "{connack:?}");
            wire.closed().await;
        }
    }
}

#[tokio::test]
async fn other_revisions_and_methods_are_refused() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    // 3.1 and a revision that does not exist.
    for bytes in [
        packet(0x10, b"\x00\x06MQIsdp\x03\x02\x00\x00\x00\x01c"),
        packet(0x10, b"\x00\x04MQTT\x06\x02\x00\x00\x00\x01c"),
    ] {
        let mut wire = Wire::open(&server).await;
        wire.send(&bytes).await;
        assert_eq!(wire.recv().await.body, [0, 1]);
        wire.closed().await;
    }
    let mut hello = Hello::new(true, "c", &tenant.token);
    hello.props = vec![21, 0, 1, b'x'];
    let mut wire = Wire::open(&server).await;
    wire.send(&hello.bytes()).await;
    assert_eq!(wire.recv().await.body[1], 0x8c);
    // A 3.1.1 client without an id must ask for a clean session.
    let hello = Hello { clean: false, ..Hello::new(false, "", &tenant.token) };
    let mut wire = Wire::open(&server).await;
    wire.send(&hello.bytes()).await;
    assert_eq!(wire.recv().await.body, [0, 2]);
}

#[tokio::test]
async fn the_newest_connection_of_a_client_id_wins_in_its_account_only() {
    let server = Server::start().await;
    let (a, b) = (server.tenant("a").await, server.tenant("b").await);
    let mut first = Wire::join(&server, true, "same", &a.token).await;
    let mut other = Wire::join(&server, true, "same", &b.token).await;
    let mut old = Wire::join(&server, false, "old", &a.token).await;
    let mut second = Wire::join(&server, true, "same", &a.token).await;
    let _newer = Wire::join(&server, false, "old", &a.token).await;
    assert_eq!(first.closed().await, Some(0x8e));
    assert_eq!(old.closed().await, None, "3.1.1 has no DISCONNECT from a server");
    for wire in [&mut second, &mut other] {
        wire.send(&[0xc0, 0]).await;
        assert_eq!(wire.recv().await.first, 0xd0);
    }
}

#[tokio::test]
async fn silence_beyond_the_keep_alive_ends_the_connection() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let hello = Hello { keep_alive_s: 1, ..Hello::new(true, "c", &tenant.token) };
    let (mut wire, _) = Wire::hello(&server, &hello).await;
    let begun = std::time::Instant::now();
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(1_000)).await;
        wire.send(&[0xc0, 0]).await;
        assert_eq!(wire.recv().await.first, 0xd0);
    }
    assert_eq!(wire.closed().await, Some(0x8d));
    assert!(begun.elapsed() >= Duration::from_millis(3_400), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn qos_2_is_refused_by_its_name_and_granted_as_1() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    for v5 in [true, false] {
        let mut wire = Wire::join(&server, v5, "c", &tenant.token).await;
        assert_eq!(wire.subscribe("client/#", 2).await, 1);
        wire.publish("client/x", "hello", 0x04, &[]).await;
        assert_eq!(wire.closed().await, v5.then_some(0x9b));
    }
    let mut hello = Hello::new(true, "c", &tenant.token);
    hello.will = Some(("client/x", "", 2, false));
    let mut wire = Wire::open(&server).await;
    wire.send(&hello.bytes()).await;
    assert_eq!(wire.recv().await.body[1], 0x9b);
}

#[tokio::test]
async fn filters_that_cannot_match_are_refused() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let mut v5 = Wire::join(&server, true, "5", &tenant.token).await;
    let mut v3 = Wire::join(&server, false, "3", &tenant.token).await;
    for (filter, reason) in [
        ("$share/g/message/#", 0x9e),
        ("mesage/#", 0x8f),
        ("message/#/x", 0x8f),
        ("$SYS/#", 0x8f),
        ("ingest/#", 0x8f),
        ("message/+", 1),
        ("#", 1),
    ] {
        assert_eq!(v5.subscribe(filter, 1).await, reason, "{filter}");
        let granted = if reason >= 0x80 { 0x80 } else { reason };
        assert_eq!(v3.subscribe(filter, 1).await, granted, "{filter}");
    }
}

#[tokio::test]
async fn every_kind_of_topic_is_published_to_its_subscribers() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let (account, device) = (tenant.account, tenant.device.id);
    for v5 in [true, false] {
        let mut wire = Wire::join(&server, v5, "c", &tenant.token).await;
        wire.subscribe(&format!("message/{device}"), 1).await;
        let speed = Value::Decimal(Decimal::parse("12.50").unwrap());
        server.say(account, device, &[("position.speed", speed)]).await;
        let got = wire.message().await;
        assert_eq!((got.topic, got.qos, got.retain), (format!("message/{device}"), 1, false));
        let json: serde_json::Value = serde_json::from_str(&got.payload).unwrap();
        assert_eq!(json["position.speed"], 12.5);
        assert!(json["timestamp"].is_string() && json["received"].is_string(), "{json}");

        wire.subscribe("log/device/+", 0).await;
        server.log(Series::device_log(account, device)).await;
        let got = wire.message().await;
        assert_eq!((got.topic, got.qos), (format!("log/device/{device}"), 0));
        assert!(got.payload.contains(r#""log.kind":"connected""#), "{}", got.payload);

        let channel = fieldline_model::ChannelId::from_bytes([7; 16]);
        wire.subscribe("log/channel/#", 0).await;
        server.log(Series::channel_log(account, channel)).await;
        assert_eq!(wire.message().await.topic, format!("log/channel/{channel}"));

        wire.subscribe("event/online/#", 0).await;
        server.happen(account, EventKind::Offline, device).await;
        server.happen(account, EventKind::Online, device).await;
        let got = wire.message().await;
        assert_eq!(got.topic, format!("event/online/{device}"));
        assert!(got.payload.contains(r#""kind":"online""#), "{}", got.payload);
        wire.send(&[0xe0, 0]).await;
        wire.closed().await;
    }
}

#[tokio::test]
async fn last_values_come_on_subscribing_and_then_live() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let (account, device) = (tenant.account, tenant.device.id);
    // More devices than one page of the registry and many pages of values.
    let mut devices = vec![device];
    for n in 0..300 {
        devices.push(server.device(account, &format!("more-{n}")).await.id);
    }
    for device in &devices {
        server
            .say(account, *device, &[("position.speed", Value::Int(1)), ("a/b+#%", Value::Int(2))])
            .await;
    }
    for (v5, filter, expected) in [
        (true, "state/#".to_owned(), 602),
        (false, "state/+/position.speed".to_owned(), 301),
        (true, format!("state/{device}/+"), 2),
        (true, format!("state/{device}/position.speed"), 1),
        (false, "#".to_owned(), 602),
        (true, "+/+/position.speed".to_owned(), 301),
    ] {
        let mut wire = Wire::join(&server, v5, "c", &tenant.token).await;
        assert_eq!(wire.subscribe(&filter, 1).await, 1);
        let mut topics = std::collections::BTreeSet::new();
        for _ in 0..expected {
            let got = wire.message().await;
            assert!(got.retain && got.topic.starts_with("state/"), "{got:?}");
            assert_eq!(got.topic.split('/').count(), 3);
            wire.ack(got.packet_id.unwrap()).await;
            assert!(topics.insert(got.topic.clone()), "twice: {}", got.topic);
        }
        wire.silent().await;
        server.say(account, device, &[("position.speed", Value::Int(3))]).await;
        let got = loop {
            let got = wire.message().await;
            wire.ack(got.packet_id.unwrap()).await;
            if got.topic.starts_with("state/") {
                break got;
            }
        };
        assert!(!got.retain, "live values are not marked as retained");
        assert!(got.payload.starts_with(r#"{"value":3,"timestamp":""#), "{}", got.payload);
    }
}

#[tokio::test]
async fn last_values_are_made_good_when_the_bus_was_too_fast() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let (account, device) = (tenant.account, tenant.device.id);
    let mut wire = Wire::join(&server, true, "c", &tenant.token).await;
    wire.subscribe("state/#", 0).await;
    server.say(account, device, &[("x", Value::Int(1))]).await;
    assert!(wire.message().await.payload.starts_with(r#"{"value":1,"#));
    // More at once than the bus holds for its slowest subscriber: the change is lost in it.
    let platform = &server.services.platform;
    let noise = fieldline_contracts::BusItem::Log {
        kind: fieldline_model::SeriesKind::DeviceLog,
        object: device.0,
        lines: [].into(),
    };
    let stored = fieldline_model::Stored::read_back(
        Series::messages(account, device),
        server.services.ingest.now(),
        server.services.ingest.now(),
        fieldline_ingest::own_params([("x", Value::Int(2))]),
        Default::default(),
    );
    platform.state.apply(&[stored]).await.unwrap();
    platform.bus.publish(account, vec![noise; 40_000]).await;
    let got = wire.message().await;
    assert!(got.retain && got.payload.starts_with(r#"{"value":2,"#), "{got:?}");
}

/// Last values that are away are sent when they are back: to who subscribes meanwhile, and to who
/// missed a change.
#[tokio::test]
async fn last_values_that_were_away_are_sent_when_they_are_back() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let (account, device) = (tenant.account, tenant.device.id);
    let mut there = Wire::join(&server, true, "c", &tenant.token).await;
    there.subscribe("state/#", 0).await;
    server.say(account, device, &[("x", Value::Int(1))]).await;
    assert!(there.message().await.payload.starts_with(r#"{"value":1,"#));
    server.state.set_away(true);
    let mut new = Wire::join(&server, true, "d", &tenant.token).await;
    new.subscribe(&format!("state/{device}/x"), 0).await;
    server.say(account, device, &[("x", Value::Int(2))]).await;
    there.silent().await;
    new.silent().await;
    server.state.set_away(false);
    // What came meanwhile is not made good by this one: the last that it knows is sent.
    for wire in [&mut there, &mut new] {
        let got = wire.message().await;
        assert!(got.retain && got.payload.starts_with(r#"{"value":1,"#), "{got:?}");
    }
    server.say(account, device, &[("x", Value::Int(3))]).await;
    for wire in [&mut there, &mut new] {
        assert!(wire.message().await.payload.starts_with(r#"{"value":3,"#));
    }
}

#[tokio::test]
async fn options_of_a_subscription_are_kept() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let mut wire = Wire::join(&server, true, "c", &tenant.token).await;
    let mut other = Wire::join(&server, true, "d", &tenant.token).await;
    assert_eq!(wire.publish_acked("client/kept", "1").await, 0x10, "nobody is subscribed");
    let id = wire.publish("client/kept", "1", 0x03, &[]).await.unwrap();
    assert_eq!(wire.puback(id).await, 0x10);

    // No local: what this client publishes does not come back; what others do, does.
    assert_eq!(wire.subscribe("client/a", 0x05).await, 1);
    assert_eq!(wire.publish_acked("client/a", "own").await, 0x10);
    other.publish("client/a", "other", 0, &[]).await;
    assert_eq!(wire.message().await.payload, "other");

    // Retain handling: 2 never, 1 only when new, 0 always.
    assert_eq!(wire.subscribe("client/kept", 0x21).await, 1);
    wire.silent().await;
    assert_eq!(wire.subscribe("client/kept", 0x11).await, 1);
    wire.silent().await;
    assert_eq!(wire.subscribe("client/kept", 0x00).await, 0);
    let got = wire.message().await;
    assert_eq!((got.payload.as_str(), got.retain, got.qos), ("1", true, 0));
    assert_eq!(other.subscribe("client/kept", 0x11).await, 1);
    let got = other.message().await;
    assert_eq!((got.retain, got.qos), (true, 1));
    other.ack(got.packet_id.unwrap()).await;

    // Retain as published: only who asks sees the flag on live messages.
    assert_eq!(wire.subscribe("client/flag", 0x08).await, 0);
    assert_eq!(other.subscribe("client/flag", 0x00).await, 0);
    other.publish("client/flag", "x", 0x01, &[]).await;
    assert!(wire.message().await.retain);
    assert!(!other.message().await.retain);

    // An empty retained message clears.
    other.publish("client/flag", "", 0x01, &[]).await;
    assert_eq!(wire.message().await.payload, "");
    assert_eq!(wire.subscribe("client/flag", 0x00).await, 0);
    wire.silent().await;
}

#[tokio::test]
async fn overlapping_filters_make_one_message_with_every_identifier() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let mut wire = Wire::join(&server, true, "c", &tenant.token).await;
    assert_eq!(wire.subscribe_as("client/#", 0, &[11, 1]).await, 0);
    assert_eq!(wire.subscribe_as("client/+", 1, &[11, 0x80, 0x01]).await, 1);
    let id = wire.publish("client/x", "once", 0x02, &[]).await.unwrap();
    let (mut acked, mut got) = (false, None);
    for _ in 0..2 {
        let packet = wire.recv().await;
        match packet.first >> 4 {
            4 => acked = packet.body[..2] == id.to_be_bytes(),
            _ => got = Some(crate::wire::received(&packet, true)),
        }
    }
    let got = got.unwrap();
    assert!(acked);
    let mut identifiers = got.identifiers.clone();
    identifiers.sort_unstable();
    assert_eq!((got.qos, identifiers), (1, vec![1, 128]));
    wire.silent().await;
    // Unsubscribing one leaves the other.
    let mut body = vec![0, 99, 0];
    text(&mut body, "client/+");
    text(&mut body, "client/none");
    wire.send(&packet(0xa2, &body)).await;
    assert_eq!(wire.recv().await.body, [0, 99, 0, 0, 0x11]);
    wire.publish("client/y", "again", 0, &[]).await;
    assert_eq!(wire.message().await.identifiers, [1]);
}

#[tokio::test]
async fn properties_travel_with_the_message() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let mut from = Wire::join(&server, true, "from", &tenant.token).await;
    let mut to = Wire::join(&server, true, "to", &tenant.token).await;
    let mut old = Wire::join(&server, false, "old", &tenant.token).await;
    to.subscribe("client/#", 0).await;
    old.subscribe("client/#", 0).await;
    let mut props = vec![1, 1, 2, 0, 0, 0, 100, 35, 0, 3];
    props.push(3);
    text(&mut props, "text/plain");
    props.push(8);
    text(&mut props, "client/answers");
    props.push(9);
    text(&mut props, "seven");
    props.push(38);
    text(&mut props, "key");
    text(&mut props, "value");
    from.publish("client/x", "hello", 0, &props).await;
    // Now by the alias alone.
    from.publish("", "again", 0, &[35, 0, 3]).await;
    let got = to.message().await;
    let shown = format!("{:?}", got.props);
    for part in ["text/plain", "client/answers", "key", "value", "PayloadFormatIndicator"] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
    assert!(
        got.props.iter().any(|p| matches!(p, Property::CorrelationData(d) if d.val() == b"seven"))
    );
    assert!(
        got.props.iter().any(|p| matches!(p, Property::MessageExpiryInterval(n) if n.val() == 100))
    );
    assert!(!got.props.iter().any(|p| matches!(p, Property::TopicAlias(_))));
    let again = to.message().await;
    assert_eq!((again.topic.as_str(), again.payload.as_str()), ("client/x", "again"));
    assert_eq!(old.message().await.payload, "hello");
    assert_eq!(old.message().await.payload, "again");
    // An alias that was not introduced, and one above the agreed maximum.
    from.publish("", "x", 0, &[35, 0, 4]).await;
    assert_eq!(from.closed().await, Some(0x82));
    let mut from = Wire::join(&server, true, "from", &tenant.token).await;
    from.publish("client/x", "x", 0, &[35, 0, 17]).await;
    assert_eq!(from.closed().await, Some(0x94));
}

#[tokio::test]
async fn no_more_is_on_its_way_than_the_client_takes() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let mut hello = Hello::new(true, "c", &tenant.token);
    // Receive maximum 2, maximum packet size 200.
    hello.props = vec![33, 0, 2, 39, 0, 0, 0, 200];
    let (mut wire, _) = Wire::hello(&server, &hello).await;
    wire.subscribe("client/#", 1).await;
    let mut from = Wire::join(&server, true, "from", &tenant.token).await;
    from.publish_acked("client/x", &"long".repeat(60)).await;
    for n in 0..5 {
        assert_eq!(from.publish_acked("client/x", &n.to_string()).await, 0);
    }
    let first = wire.message().await;
    let second = wire.message().await;
    assert_eq!((first.payload.as_str(), second.payload.as_str()), ("0", "1"));
    wire.silent().await;
    wire.ack(second.packet_id.unwrap()).await;
    assert_eq!(wire.message().await.payload, "2");
    wire.silent().await;
    wire.ack(first.packet_id.unwrap()).await;
    assert_eq!(wire.message().await.payload, "3");
}

#[tokio::test]
async fn wills_are_published_unless_the_client_says_goodbye() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let mut watch = Wire::join(&server, true, "watch", &tenant.token).await;
    watch.subscribe("client/#", 1).await;
    for v5 in [true, false] {
        let mut hello = Hello::new(v5, "c", &tenant.token);
        hello.will = Some(("client/gone", "lost", 1, false));
        let (wire, _) = Wire::hello(&server, &hello).await;
        drop(wire);
        let got = watch.message().await;
        assert_eq!((got.topic.as_str(), got.payload.as_str()), ("client/gone", "lost"));
        watch.ack(got.packet_id.unwrap()).await;
        let (mut wire, _) = Wire::hello(&server, &hello).await;
        wire.send(&[0xe0, 0]).await;
        wire.closed().await;
        watch.silent().await;
    }
    // MQTT 5 can say goodbye and ask for the will all the same.
    let mut hello = Hello::new(true, "c", &tenant.token);
    hello.will = Some(("client/gone", "asked", 0, false));
    let (mut wire, _) = Wire::hello(&server, &hello).await;
    wire.send(&[0xe0, 1, 4]).await;
    assert_eq!(watch.message().await.payload, "asked");
    // A will is checked when it is left, like any message.
    for (v5, expected) in [(true, 0x90), (false, 5)] {
        let mut hello = Hello::new(v5, "c", &tenant.token);
        hello.will = Some(("state/x/y", "", 0, false));
        let mut wire = Wire::open(&server).await;
        wire.send(&hello.bytes()).await;
        assert_eq!(wire.recv().await.body[1], expected);
    }
}

#[tokio::test]
async fn a_message_expires() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let mut from = Wire::join(&server, true, "from", &tenant.token).await;
    from.publish("client/brief", "x", 0x01, &[2, 0, 0, 0, 1]).await;
    from.publish("client/long", "y", 0x01, &[2, 0, 0, 0, 60]).await;
    assert_eq!(from.publish_acked("client/z", "").await, 0x10);
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    let mut wire = Wire::join(&server, true, "c", &tenant.token).await;
    wire.subscribe("client/#", 0).await;
    let got = wire.message().await;
    assert_eq!(got.topic, "client/long");
    let left = got.props.iter().find_map(|p| match p {
        Property::MessageExpiryInterval(n) => Some(n.val()),
        _ => None,
    });
    assert!(left.is_some_and(|left| (50..60).contains(&left)), "{left:?}");
    wire.silent().await;
}

#[tokio::test]
async fn shutdown_tells_and_drains() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let mut wire = Wire::join(&server, true, "c", &tenant.token).await;
    wire.subscribe("message/#", 1).await;
    let mut old = Wire::join(&server, false, "d", &tenant.token).await;
    // Half a handshake is no reason to wait.
    let _half = Wire::open(&server).await;
    server.say(tenant.account, tenant.device.id, &[("x", Value::Int(1))]).await;
    server.shutdown.cancel();
    assert_eq!(wire.closed().await, Some(0x8b));
    old.closed().await;
    let begun = std::time::Instant::now();
    assert_eq!(server.stop().await.abandoned, 0);
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_slow_handshake_and_a_slow_packet_end() {
    let config = MqttConfig {
        connect_timeout: Duration::from_millis(300),
        packet_timeout: Duration::from_millis(300),
        ..MqttConfig::default()
    };
    let server = Server::with(config, None).await;
    let tenant = server.tenant("a").await;
    let mut silent = Wire::open(&server).await;
    let mut half = Wire::open(&server).await;
    half.send(&Hello::new(true, "c", &tenant.token).bytes()[..10]).await;
    silent.closed().await;
    half.closed().await;
    let mut wire = Wire::join(&server, true, "c", &tenant.token).await;
    wire.send(&[0x30, 10, 0]).await;
    assert_eq!(wire.closed().await, Some(0x82));
}
