//! A tenant sees only its own, and a restricted token only its devices.

use fieldline_model::{ChannelId, DeviceId, EventKind, Scope, Series, Value};

use crate::harness::{Server, Tenant};
use crate::wire::{Wire, text};

/// Every kind of topic that a client can subscribe to. A kind that is not in
/// here fails `every_root_is_in_the_table`.
const KINDS: [&str; 6] = ["message", "state", "event", "log", "command", "client"];

/// What each kind is asked for by: about `device`, and by wildcards.
fn filters(kind: &str, device: DeviceId, channel: ChannelId) -> Vec<String> {
    let mut filters = vec![format!("{kind}/#"), format!("+/{device}/#"), format!("{kind}/+")];
    filters.extend(match kind {
        "message" => vec![format!("message/{device}")],
        "state" => vec![format!("state/{device}/+"), format!("state/{device}/secret")],
        "event" => vec![format!("event/online/{device}"), "event/+/+".into()],
        "log" => vec![format!("log/device/{device}"), format!("log/channel/{channel}")],
        "command" => vec![format!("command/{device}/+/answer")],
        "client" => vec![format!("client/{device}"), "client/kept".into()],
        other => panic!("the topic kind `{other}` is not in the table"),
    });
    filters
}

/// Makes one of everything happen in `tenant`; returns how many messages that is.
async fn everything(server: &Server, tenant: &Tenant, own: &mut Wire, channel: ChannelId) {
    let (account, device) = (tenant.account, tenant.device.id);
    server.say(account, device, &[("secret", Value::from("sesame"))]).await;
    server.happen(account, EventKind::Online, device).await;
    server.log(Series::device_log(account, device)).await;
    server.log(Series::channel_log(account, channel)).await;
    for (topic, flags) in [("client/kept", 0x03), ("client/live", 0x02)] {
        let id = own.publish(topic, "sesame", flags, &[]).await.unwrap();
        assert!(own.puback(id).await < 0x80);
    }
    let topic = format!("client/{device}");
    assert!(own.publish_acked(&topic, "sesame").await < 0x80);
    // A command, cancelled at once, so that an answer is published.
    let topic = format!("command/{device}/text");
    assert_eq!(own.publish_acked(&topic, "x").await, 0);
    let commands = &server.services.platform.commands;
    let list = commands.list(account, device, 10).await.unwrap();
    let actor = fieldline_contracts::Actor::system("test");
    for command in list.iter().filter(|c| !c.status.is_final()) {
        commands.cancel(account, command.id, &actor).await.unwrap();
    }
}

#[tokio::test]
async fn a_foreign_token_gets_nothing_of_any_topic() {
    let server = Server::start().await;
    let (own, foreign) = (server.tenant("own").await, server.tenant("foreign").await);
    let channel = ChannelId::from_bytes([7; 16]);
    let mut publisher = Wire::join(&server, true, "publisher", &own.token).await;
    // What is retained before anyone subscribes.
    everything(&server, &own, &mut publisher, channel).await;
    for v5 in [true, false] {
        for kind in KINDS {
            for filter in filters(kind, own.device.id, channel) {
                let mut spy = Wire::join(&server, v5, "spy", &foreign.token).await;
                let mut member = Wire::join(&server, v5, "member", &own.token).await;
                assert_eq!(spy.subscribe(&filter, 0).await, 0);
                assert_eq!(member.subscribe(&filter, 0).await, 0);
                everything(&server, &own, &mut publisher, channel).await;
                if filter != format!("{kind}/+") || matches!(kind, "message" | "client") {
                    // The same filter does deliver to the account's own client.
                    member.message().await;
                }
                // A PINGRESP comes after all that was queued before it.
                spy.send(&[0xc0, 0]).await;
                assert_eq!(spy.recv().await.first, 0xd0, "{filter} of a foreign account");
            }
        }
    }
    let mut spy = Wire::join(&server, true, "spy", &foreign.token).await;
    spy.subscribe("#", 0).await;
    everything(&server, &own, &mut publisher, channel).await;
    spy.silent().await;
}

#[tokio::test]
async fn a_foreign_device_is_no_device() {
    let server = Server::start().await;
    let (own, foreign) = (server.tenant("own").await, server.tenant("foreign").await);
    let nobody = DeviceId::from_bytes([9; 16]);
    let mut spy = Wire::join(&server, true, "spy", &foreign.token).await;
    for (theirs, none) in [
        (format!("ingest/{}", own.device.id), format!("ingest/{nobody}")),
        (format!("ingest/{}", own.device.ident), "ingest/nobody".to_owned()),
        (format!("command/{}/text", own.device.id), format!("command/{nobody}/text")),
    ] {
        assert_eq!(spy.publish_acked(&theirs, r#"{"x":1}"#).await, 0x90, "{theirs}");
        assert_eq!(spy.publish_acked(&none, r#"{"x":1}"#).await, 0x90, "{none}");
    }
    let list = server.services.platform.commands.list(own.account, own.device.id, 10).await;
    assert_eq!(list.unwrap().len(), 0);
    assert_eq!(server.history.all(fieldline_model::SeriesKind::Message).len(), 0);
}

#[tokio::test]
async fn a_token_of_some_devices_sees_only_those() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let seen = server.device(tenant.account, "seen").await;
    let scopes = vec![Scope::Read, Scope::Publish, Scope::Command];
    let token = server.token(tenant.account, scopes, vec![seen.id]).await;
    let channel = ChannelId::from_bytes([7; 16]);
    let mut publisher = Wire::join(&server, true, "publisher", &tenant.token).await;
    everything(&server, &tenant, &mut publisher, channel).await;
    let mut wire = Wire::join(&server, true, "some", &token).await;
    assert_eq!(wire.subscribe("#", 0).await, 0);
    everything(&server, &tenant, &mut publisher, channel).await;
    wire.silent().await;
    server.say(tenant.account, seen.id, &[("x", Value::Int(1))]).await;
    let mut topics = vec![wire.message().await.topic, wire.message().await.topic];
    topics.sort();
    assert_eq!(topics, [format!("message/{}", seen.id), format!("state/{}/x", seen.id)]);
    let again = Wire::join(&server, true, "again", &token).await;
    let mut again = again;
    again.subscribe("state/#", 0).await;
    assert_eq!(again.message().await.topic, format!("state/{}/x", seen.id));
    again.silent().await;

    // What it may publish to.
    let hidden = &tenant.device;
    for (topic, reason) in [
        (format!("ingest/{}", hidden.ident), 0x90),
        (format!("ingest/{}", hidden.id), 0x90),
        (format!("command/{}/text", hidden.id), 0x90),
        ("client/free".to_owned(), 0x87),
        (format!("client/{}", hidden.id), 0x87),
        (format!("ingest/{}", seen.ident), 0),
        (format!("command/{}/text", seen.id), 0),
        (format!("client/{}/note", seen.id), 0),
    ] {
        assert_eq!(again.publish_acked(&topic, r#"{"x":1}"#).await, reason, "{topic}");
        while again.try_recv(std::time::Duration::from_millis(20)).await.is_ok() {}
    }
    let mut props = vec![8];
    text(&mut props, "client/free");
    let id = again.publish(&format!("command/{}/text", seen.id), "x", 0x02, &props).await.unwrap();
    assert_eq!(again.puback(id).await, 0x90);
}

#[tokio::test]
async fn reading_needs_its_scope() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let token = server.token(tenant.account, vec![Scope::Publish], vec![]).await;
    for (v5, refused) in [(true, 0x87), (false, 0x80)] {
        let mut wire = Wire::join(&server, v5, "c", &token).await;
        for kind in KINDS {
            assert_eq!(wire.subscribe(&format!("{kind}/#"), 0).await, refused);
        }
        assert_eq!(wire.subscribe("#", 0).await, refused);
    }
}

#[tokio::test]
async fn every_root_is_in_the_table() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let mut wire = Wire::join(&server, true, "c", &tenant.token).await;
    for root in fieldline_mqtt::ROOTS {
        assert!(KINDS.contains(&root), "`{root}/` can be subscribed to and is not in the table");
        assert_eq!(wire.subscribe(&format!("{root}/#"), 0).await, 0);
        drop(filters(root, tenant.device.id, ChannelId::from_bytes([7; 16])));
    }
}
