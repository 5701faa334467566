//! Commands: queued, waited for, cancelled.

use fieldline_contracts::Outcome;
use fieldline_model::{ConnectionId, DeviceId};
use serde_json::json;

use crate::support::{Bench, eventually};

#[tokio::test]
async fn a_command_waits_for_its_device_and_brings_the_answer() {
    let bench = Bench::start().await;
    let device = bench.root.device("a").await;
    let path = format!("/api/v1/devices/{device}/commands");
    let queued = bench
        .root
        .post(&path, json!({"name": "text", "params": {"text": "getver"}, "ttl_s": 60}))
        .await
        .expect(201);
    assert_eq!(queued["status"], "queued");
    assert!(queued["created_by"].as_str().unwrap().starts_with("token:"));
    let own = format!("/api/v1/commands/{}", queued["id"].as_str().unwrap());
    let still = bench.root.get(&format!("{own}?wait_ms=50")).await.expect(200);
    assert_eq!(still["status"], "queued");

    // The device connects: the link that holds it is handed the command and reports.
    let id: DeviceId = device.parse().unwrap();
    let connection = ConnectionId::new(bench.ingest.now(), [1; 10]);
    let commands = bench.platform.commands.clone();
    let mut session = commands.attach(bench.account, id, connection).await;
    let account = bench.account;
    let link = tokio::spawn(async move {
        let dispatch = session.dispatches.recv().await.unwrap();
        commands.report(account, connection, dispatch.command.id, Outcome::Sent).await;
        let answer = Outcome::Answered("Ver:1.2".to_owned());
        commands.report(account, connection, dispatch.command.id, answer).await;
        session
    });
    let answered = bench.root.get(&format!("{own}?wait_ms=5000")).await.expect(200);
    assert_eq!((&answered["status"], &answered["answer"]), (&json!("answered"), &json!("Ver:1.2")));
    let _session = link.await.unwrap();
    let list = bench.root.get(&path).await.expect(200);
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_command_is_cancelled_while_it_waits() {
    let bench = Bench::start().await;
    let device = bench.root.device("a").await;
    let path = format!("/api/v1/devices/{device}/commands");
    let queued = bench.root.post(&path, json!({"name": "text"})).await.expect(201);
    let own = format!("/api/v1/commands/{}", queued["id"].as_str().unwrap());
    assert_eq!(bench.root.delete(&own).await.expect(200)["status"], "cancelled");
    bench.root.delete(&own).await.problem(409, "conflict");
    for wrong in [
        json!({"name": ""}),
        json!({"name": "text", "ttl_s": 0}),
        json!({"name": "text", "ttl_s": 99_999_999}),
        json!({"nam": "text"}),
    ] {
        bench.root.post(&path, wrong).await.problem(422, "invalid");
    }
    for _ in 0..100 {
        bench.root.post(&path, json!({"name": "text"})).await.expect(201);
    }
    bench.root.post(&path, json!({"name": "text"})).await.problem(429, "too_many");
}

#[tokio::test]
async fn a_command_that_the_protocol_has_not_is_refused_at_once() {
    let bench = Bench::start().await;
    let device = bench
        .root
        .post("/api/v1/devices", json!({"ident": "a", "protocol": "teltonika"}))
        .await
        .expect(201);
    let path = format!("/api/v1/devices/{}/commands", device["id"].as_str().unwrap());
    let detail =
        bench.root.post(&path, json!({"name": "reboot-please"})).await.problem(422, "invalid");
    assert!(detail.contains("text"), "the commands that there are are named: {detail}");
    for (params, member) in [
        (json!({}), "`params.text`: is missing"),
        (json!({"text": 5}), "`params.text`: is no text"),
        (json!({"text": "getinfo", "txt": "x"}), "`params.txt`"),
    ] {
        let wrong = bench.root.post(&path, json!({"name": "text", "params": params})).await;
        let detail = wrong.problem(422, "invalid");
        assert!(detail.starts_with(member), "{detail}");
    }
    bench
        .root
        .post(&path, json!({"name": "text", "params": {"text": "getinfo"}}))
        .await
        .expect(201);
    eventually("it is queued", async || {
        bench.root.get(&path).await.expect(200)["items"].as_array().unwrap().len() == 1
    })
    .await;
}
