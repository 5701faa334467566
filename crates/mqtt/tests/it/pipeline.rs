//! What clients publish: into the pipeline, and to devices.

use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::{HistoryError, Outcome};
use fieldline_model::{ConnectionId, DeviceId, Scope, SeriesKind, Value};
use fieldline_mqtt::MqttConfig;
use mqtt_protocol_core::mqtt::packet::Property;

use crate::harness::{SOON, Server, wait_for};
use crate::wire::{Wire, packet, text};

#[tokio::test]
async fn messages_are_acknowledged_when_they_are_durable() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let topics =
        [format!("ingest/{}", tenant.device.id), format!("ingest/{}", tenant.device.ident)];
    for v5 in [true, false] {
        for topic in &topics {
            let mut wire = Wire::join(&server, v5, "c", &tenant.token).await;
            let before = server.history.all(SeriesKind::Message).len();
            let held = server.history.hold().await;
            let payload = format!(r#"[{{"x":{before}}},{{"x":-1,"y":{before}}}]"#);
            let id = wire.publish(topic, &payload, 0x02, &[]).await.unwrap();
            wire.silent().await;
            drop(held);
            assert_eq!(wire.puback(id).await, 0);
            assert_eq!(server.history.all(SeriesKind::Message).len(), before + 2);
        }
    }
    // The raw payload is in the device's log beside what it says.
    server.services.ingest.flush().await;
    let log = server.history.all(SeriesKind::DeviceLog);
    let line = log.last().unwrap().params();
    assert_eq!(line.get("log.kind"), Some(&Value::from("frame")));
    assert_eq!(line.get("protocol"), Some(&Value::from("mqtt")));
    assert!(matches!(line.get("messages"), Some(Value::Json(m)) if m[1]["x"] == -1), "{line:?}");
}

#[tokio::test]
async fn a_burst_is_stored_in_order_in_few_commits_and_acknowledged_in_order() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let other = server.device(tenant.account, "other").await;
    let mut wire = Wire::join(&server, true, "c", &tenant.token).await;
    server.history.set_delay(Duration::from_millis(20));
    let mut ids = vec![];
    for n in 0..200 {
        let device = if n % 3 == 0 { &other.ident } else { &tenant.device.ident };
        let topic = format!("ingest/{device}");
        ids.push(wire.publish(&topic, &format!(r#"{{"n":{n}}}"#), 0x02, &[]).await.unwrap());
        if n == 100 {
            // Another kind of message between them does not overtake.
            ids.push(wire.publish("client/x", "", 0x02, &[]).await.unwrap());
        }
    }
    for id in ids {
        assert!(wire.puback(id).await < 0x80);
    }
    let stored = server.history.all(SeriesKind::Message);
    assert_eq!(stored.len(), 200);
    for device in [other.id, tenant.device.id] {
        let of = stored.iter().filter(|m| m.series().object == device.0);
        let numbers: Vec<i64> =
            of.map(|m| m.params().get("n").unwrap().as_i64().unwrap()).collect();
        assert!(numbers.is_sorted(), "{numbers:?}");
    }
    assert!(server.history.appends() < 100, "{} commits", server.history.appends());
}

#[tokio::test]
async fn nothing_is_acknowledged_that_is_not_stored() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let topic = format!("ingest/{}", tenant.device.ident);
    for (error, reason) in [
        (HistoryError::Full("disk".into()), 0x97),
        (HistoryError::Busy, 0x97),
        (HistoryError::Failed("EIO".into()), 0x80),
    ] {
        server.history.fail_always(Some(error));
        let mut v5 = Wire::join(&server, true, "5", &tenant.token).await;
        assert_eq!(v5.publish_acked(&topic, r#"{"x":1}"#).await, reason);
        // 3.1.1 has no negative acknowledgement: the connection ends without any.
        let mut v3 = Wire::join(&server, false, "3", &tenant.token).await;
        v3.publish(&topic, r#"{"x":1}"#, 0x02, &[]).await;
        assert_eq!(v3.try_recv(SOON).await, Err("closed"));
        server.history.fail_always(None);
        assert_eq!(v5.publish_acked(&topic, r#"{"x":1}"#).await, 0, "it recovers by itself");
    }
}

#[tokio::test]
async fn what_cannot_be_used_is_refused_with_the_reason() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let device = &tenant.device.ident;
    let reader = server.token(tenant.account, vec![Scope::Read], vec![]).await;
    let nobody = DeviceId::from_bytes([9; 16]);
    let ingest = format!("ingest/{device}");
    let command = format!("command/{}/text", tenant.device.id);
    let mut events = Wire::join(&server, true, "events", &tenant.token).await;
    events.subscribe("event/rejected/+", 0).await;
    for (token, topic, payload, reason) in [
        (&tenant.token, ingest.as_str(), "no json", 0x99),
        (&tenant.token, &ingest, "{}", 0x99),
        (&tenant.token, "ingest/unknown", "{\"x\":1}", 0x90),
        (&tenant.token, "message/x", "{\"x\":1}", 0x90),
        (&tenant.token, "nowhere", "", 0x90),
        (&tenant.token, &format!("command/{nobody}/text"), "x", 0x90),
        (&tenant.token, &command, "{\"x\":", 0x99),
        (&reader, &ingest, "{\"x\":1}", 0x87),
        (&reader, &command, "x", 0x87),
        (&reader, "client/x", "", 0x87),
    ] {
        let mut v5 = Wire::join(&server, true, "5", token).await;
        assert_eq!(v5.publish_acked(topic, payload).await, reason, "{topic} {payload}");
        // Each connection tells of its first refusal by an event.
        let event = events.message().await;
        assert!(event.payload.contains(r#""protocol":"mqtt""#), "{}", event.payload);
        let mut v3 = Wire::join(&server, false, "3", token).await;
        v3.publish(topic, payload, 0x02, &[]).await;
        assert_eq!(v3.try_recv(SOON).await, Err("closed"), "{topic} {payload}");
        events.message().await;
        // At QoS 0 nobody waits for an answer, and the connection stays.
        v5.publish(topic, payload, 0, &[]).await;
        v5.send(&[0xc0, 0]).await;
        assert_eq!(v5.recv().await.first, 0xd0);
    }
    assert_eq!(server.history.all(SeriesKind::Message).len(), 0);
}

#[tokio::test]
async fn a_disabled_device_is_refused() {
    use fieldline_contracts::{Actor, RegistryExt as _};
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let topic = format!("ingest/{}", tenant.device.ident);
    let mut wire = Wire::join(&server, true, "c", &tenant.token).await;
    assert_eq!(wire.publish_acked(&topic, r#"{"x":1}"#).await, 0);
    let mut device = tenant.device.clone();
    device.enabled = false;
    let registry = &server.services.platform.registry;
    registry.update_object(tenant.account, &device, None, &Actor::system("test")).await.unwrap();
    assert_eq!(wire.publish_acked(&topic, r#"{"x":2}"#).await, 0x87);
}

#[tokio::test]
async fn a_command_reaches_the_device_and_its_answer_comes_back() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let device = tenant.device.id;
    let commands = server.services.platform.commands.clone();
    let connection = ConnectionId::from_bytes([3; 16]);
    let mut held = commands.attach(tenant.account, device, connection).await;
    let mut wire = Wire::join(&server, true, "c", &tenant.token).await;
    wire.subscribe("command/+/+/answer", 0).await;
    wire.subscribe("client/answers/#", 0).await;
    let topic = format!("command/{device}/text");

    // Plain text, the default topic.
    assert_eq!(wire.publish_acked(&topic, "getinfo").await, 0);
    let dispatch = tokio::time::timeout(SOON, held.dispatches.recv()).await.unwrap().unwrap();
    assert_eq!(dispatch.command.params.get("text"), Some(&Value::from("getinfo")));
    assert_eq!(dispatch.command.created_by, {
        let prefix: String = tenant.token.chars().take(10).collect();
        format!("token:{prefix}")
    });
    let id = dispatch.command.id;
    commands.report(tenant.account, connection, id, Outcome::Sent).await;
    commands.report(tenant.account, connection, id, Outcome::Answered("fine".into())).await;
    let got = wire.message().await;
    assert_eq!(got.topic, format!("command/{device}/text/answer"));
    let json: serde_json::Value = serde_json::from_str(&got.payload).unwrap();
    assert_eq!(
        (json["status"].as_str(), json["answer"].as_str()),
        (Some("answered"), Some("fine"))
    );

    // Sent again because its PUBACK was lost: once on each connection, the same command is known.
    let mut body = Vec::new();
    text(&mut body, &topic);
    body.extend([0x12, 0x34, 0]);
    body.extend(b"reboot");
    wire.send(&packet(0x32, &body)).await;
    assert_eq!(wire.puback(0x1234).await, 0);
    let mut again = Wire::join(&server, true, "again", &tenant.token).await;
    again.send(&packet(0x3a, &body)).await;
    assert_eq!(again.puback(0x1234).await, 0);
    let dispatch = tokio::time::timeout(SOON, held.dispatches.recv()).await.unwrap().unwrap();
    let answered = Outcome::Answered("once".into());
    commands.report(tenant.account, connection, dispatch.command.id, answered).await;
    assert!(wire.message().await.payload.contains("once"));
    assert!(held.dispatches.try_recv().is_err(), "it was queued twice");

    // JSON, a response topic with correlation data, and an expiry of a minute.
    let mut props = vec![8];
    text(&mut props, "client/answers/1");
    props.push(9);
    text(&mut props, "seven");
    props.extend([2, 0, 0, 0, 60]);
    let id = wire.publish(&topic, r#"{"text":"getver"}"#, 0x02, &props).await.unwrap();
    assert_eq!(wire.puback(id).await, 0);
    let dispatch = tokio::time::timeout(SOON, held.dispatches.recv()).await.unwrap().unwrap();
    let command = &dispatch.command;
    assert_eq!(command.expires_at.micros_since(command.created_at), 60_000_000);
    let failed = Outcome::Failed("no such command".into());
    commands.report(tenant.account, connection, command.id, failed).await;
    let got = wire.message().await;
    assert_eq!(got.topic, "client/answers/1");
    assert!(
        got.props.iter().any(|p| matches!(p, Property::CorrelationData(d) if d.val() == b"seven"))
    );
    assert!(got.payload.contains(r#""status":"failed""#), "{}", got.payload);

    // The answer cannot be sent where the client may not publish.
    let mut props = vec![8];
    text(&mut props, &format!("state/{device}/x"));
    let id = wire.publish(&topic, "x", 0x02, &props).await.unwrap();
    assert_eq!(wire.puback(id).await, 0x90);
}

#[tokio::test]
async fn a_will_may_be_a_message_of_the_device() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let topic = format!("ingest/{}", tenant.device.ident);
    let mut hello = crate::wire::Hello::new(false, "c", &tenant.token);
    hello.will = Some((&topic, r#"{"link.lost":true}"#, 1, false));
    drop(Wire::hello(&server, &hello).await);
    let history = server.history.clone();
    wait_for("the will", || history.all(SeriesKind::Message).len() == 1).await;
    let stored = history.all(SeriesKind::Message);
    assert_eq!(stored[0].params().get("link.lost"), Some(&Value::Bool(true)));
}

/// What was acknowledged is on disk at that moment: a copy of the directory has it.
#[tokio::test]
async fn acknowledged_messages_survive_the_end_of_the_process() {
    use fieldline_contracts::{History, Query, SystemClock};
    use fieldline_mdb::{Mdb, MdbConfig};
    use fieldline_model::Series;
    let directory = tempfile::tempdir().unwrap();
    let clock = Arc::new(SystemClock);
    let (live, copy) = (directory.path().join("live"), directory.path().join("copy"));
    let store: Arc<dyn History> =
        Arc::new(Mdb::open(&live, MdbConfig::default(), clock.clone()).unwrap());
    let server = Server::over(MqttConfig::default(), None, Some(store)).await;
    let tenant = server.tenant("a").await;
    let topic = format!("ingest/{}", tenant.device.ident);
    let mut wire = Wire::join(&server, false, "c", &tenant.token).await;
    let mut ids = vec![];
    for n in 0..300 {
        ids.push(wire.publish(&topic, &format!(r#"{{"n":{n}}}"#), 0x02, &[]).await.unwrap());
    }
    for id in ids {
        assert_eq!(wire.puback(id).await, 0);
    }
    let copied = std::process::Command::new("cp").arg("-r").arg(&live).arg(&copy).status();
    assert!(copied.unwrap().success());
    let opened = Mdb::open(&copy, MdbConfig::default(), clock).unwrap();
    let series = Series::messages(tenant.account, tenant.device.id);
    let read = opened.read(&Query::oldest(series, 1_000)).await.unwrap();
    let numbers: Vec<i64> =
        read.iter().map(|m| m.params().get("n").unwrap().as_i64().unwrap()).collect();
    assert_eq!(numbers, (0..300).collect::<Vec<i64>>());
}
