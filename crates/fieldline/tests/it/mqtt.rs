//! A foreign client, `mosquitto_sub`, sees what its account's devices say and nothing else.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc;

use serde_json::{Value as Json, json};

use crate::device::Fleet;
use crate::server::{PATIENCE, Server, request, wait_for};

/// A running `mosquitto_sub`; its lines arrive on the channel.
pub(crate) fn subscribe(
    server: &Server,
    token: &str,
    topic: &str,
) -> (std::process::Child, mpsc::Receiver<String>) {
    let (host, port) = server.mqtt.rsplit_once(':').unwrap();
    let mut client = Command::new("mosquitto_sub")
        .args(["-h", host, "-p", port, "-u", "any", "-P", token, "-t", topic, "-v", "-q", "1"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("mosquitto_sub runs; `cargo xtask test rust` installs it");
    let received = lines(&mut client);
    (client, received)
}

/// What a program prints, line by line.
pub(crate) fn lines(program: &mut std::process::Child) -> mpsc::Receiver<String> {
    let output = BufReader::new(program.stdout.take().unwrap());
    let (lines, received) = mpsc::channel();
    std::thread::spawn(move || {
        for line in output.lines().map_while(Result::ok) {
            // The test may have ended.
            let _ended = lines.send(line);
        }
    });
    received
}

#[test]
fn an_account_sees_its_own_messages_and_nothing_of_anothers() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start(data.path(), &[]);
    let (_, port) = server.channel("wialon_ips", "tcp", json!({}));

    // Another account with a token of its own.
    let account = server.ask("POST", "/api/v1/accounts", Some(&json!({ "name": "other" })));
    let other = json!({ "name": "other", "scopes": ["read"], "account": account["id"] });
    let other =
        server.ask("POST", "/api/v1/tokens", Some(&other))["secret"].as_str().unwrap().to_owned();
    let (status, me) = request(&server.http, &other, "GET", "/api/v1/auth/me", None).unwrap();
    assert_eq!((status, &me["account"]["name"]), (200, &Json::from("other")), "{me}");

    let (mut ours, our_lines) = subscribe(&server, crate::server::TOKEN, "message/#");
    let (mut theirs, their_lines) = subscribe(&server, &other, "#");
    let fleet = Fleet::start(port, 2);
    let line = our_lines.recv_timeout(PATIENCE).expect("a message");
    let (topic, payload) = line.split_once(' ').unwrap();
    assert!(topic.starts_with("message/"), "{line}");
    let payload: Json = serde_json::from_str(payload).unwrap();
    assert!(payload["position.latitude"].is_number() && payload["seq"].is_number(), "{payload}");
    let acked = fleet.acked();
    wait_for("more messages", || (fleet.acked() > acked + 50).then_some(()));
    assert_eq!(their_lines.try_recv().ok(), None, "a foreign account saw a message");
    fleet.finish();

    let (host, port) = server.mqtt.rsplit_once(':').unwrap();
    let refused = Command::new("mosquitto_sub")
        .args(["-h", host, "-p", port, "-u", "any", "-P", "flt_wrong", "-t", "#", "-W", "5"])
        .output()
        .unwrap();
    assert!(!refused.status.success(), "{refused:?}");
    for client in [&mut ours, &mut theirs] {
        client.kill().unwrap();
        client.wait().unwrap();
    }
}

#[test]
fn a_published_message_is_stored_and_last_values_are_retained() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start(data.path(), &[]);
    let made = server.ask(
        "POST",
        "/api/v1/devices",
        Some(&json!({ "name": "Sensor", "ident": "sensor-1" })),
    );
    let device = made["id"].as_str().unwrap();
    let (host, port) = server.mqtt.rsplit_once(':').unwrap();
    let published = Command::new("mosquitto_pub")
        .args(["-h", host, "-p", port, "-u", "any", "-P", crate::server::TOKEN, "-q", "1"])
        .args(["-t", "ingest/sensor-1", "-m", r#"{"temperature.1": 21.5}"#])
        .status()
        .unwrap();
    assert!(published.success());
    // Acknowledged, so it is there without waiting.
    let messages = server.list(&format!("/api/v1/devices/{device}/messages"));
    assert_eq!(messages.len(), 1, "{messages:?}");
    assert_eq!(messages[0]["temperature.1"], json!(21.5));
    let (mut client, lines) = subscribe(&server, crate::server::TOKEN, "state/#");
    let line = lines.recv_timeout(PATIENCE).expect("the retained value");
    assert!(
        line.contains(&format!("state/{device}/temperature.1")) && line.contains("21.5"),
        "{line}"
    );
    client.kill().unwrap();
    client.wait().unwrap();
}
