//! Messages and last values.

use fieldline_model::ConnectionId;
use hyper::Method;
use serde_json::{Value as Json, json};

use crate::support::{Bench, Client};

async fn publish(client: &Client, device: &str, messages: Json) -> Json {
    client.post(&format!("/api/v1/devices/{device}/messages"), messages).await.expect(200)
}

#[tokio::test]
async fn what_is_published_is_read_with_every_digit() {
    let bench = Bench::start().await;
    let client = &bench.root;
    let device = client.device("a").await;
    let path = format!("/api/v1/devices/{device}");
    let body = br#"[{"timestamp":"2026-11-20T10:00:00.5Z","position.latitude":54.7146368,"big":9223372036854775807,"exact":0.123456789012345678,"text":"\u0414\u043e\u043c \"x\"","flag":true,"list":[1,{"a":null}],"gone":null}]"#;
    let reply = client
        .raw(
            Method::POST,
            &format!("{path}/messages"),
            &[("content-type", "application/json")],
            body.to_vec(),
        )
        .await;
    let published = reply.expect(200);
    assert_eq!(published, json!({"stored": 1, "duplicates": 0, "rejected": 0}));
    let reply = client
        .raw(
            Method::POST,
            &format!("{path}/messages"),
            &[("content-type", "application/json")],
            body.to_vec(),
        )
        .await;
    assert_eq!(reply.expect(200)["duplicates"], 1, "again is the same as once");

    let text = client.get(&format!("{path}/messages")).await.text();
    for part in [
        r#""timestamp":"2026-11-20T10:00:00.5Z""#,
        r#""position.latitude":54.7146368"#,
        r#""big":9223372036854775807"#,
        r#""flag":true"#,
        r#""list":[1,{"a":null}]"#,
        r#""next":null"#,
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let json: Json = serde_json::from_str(&text).unwrap();
    assert_eq!(json["items"][0]["text"], "Дом \"x\"");
    assert!(json["items"][0].get("gone").is_none());

    let state = client.get(&format!("{path}/state")).await;
    let etag = state.header("etag").to_owned();
    let state = state.expect(200);
    assert_eq!(
        state["values"]["position.latitude"],
        json!({"value": 54.7146368, "timestamp": "2026-11-20T10:00:00.5Z"})
    );
    let known =
        client.send(Method::GET, &format!("{path}/state"), &[("if-none-match", &etag)], None).await;
    assert_eq!((known.status.as_u16(), known.body.len()), (304, 0));
    let value = client.get(&format!("{path}/state/position.latitude")).await;
    assert_eq!(value.text(), r#"{"value":54.7146368,"timestamp":"2026-11-20T10:00:00.5Z"}"#);
    let detail = client.get(&format!("{path}/state/never.sent")).await.problem(404, "not_found");
    assert!(detail.contains("never.sent"), "{detail}");
    let head = client.send(Method::HEAD, &format!("{path}/state/flag"), &[], None).await;
    assert_eq!((head.status.as_u16(), head.body.len()), (200, 0));
}

#[tokio::test]
async fn pages_of_messages_follow_each_other_both_ways() {
    let bench = Bench::start().await;
    let device = bench.root.device("a").await;
    // Three instants, several different messages at each.
    let messages: Vec<Json> =
        (0..25).map(|n| json!({"timestamp": 1_790_000_000 + n / 9, "n": n})).collect();
    publish(&bench.root, &device, json!(messages)).await;
    for reverse in [false, true] {
        let (mut cursor, mut seen) = (String::new(), Vec::new());
        loop {
            let path = format!(
                "/api/v1/devices/{device}/messages?limit=4&reverse={reverse}&fields=n&cursor={cursor}"
            );
            let page = bench.root.get(&path).await.expect(200);
            seen.extend(
                page["items"].as_array().unwrap().iter().map(|item| item["n"].as_i64().unwrap()),
            );
            match page["next"].as_str() {
                Some(next) => cursor = next.to_owned(),
                None => break,
            }
        }
        let wanted: Vec<i64> = if reverse { (0..25).rev().collect() } else { (0..25).collect() };
        assert_eq!(seen, wanted);
    }
    let part = format!(
        "/api/v1/devices/{device}/messages?from=1790000001&to=2026-09-21T14:13:22Z&fields=n,absent"
    );
    let part = bench.root.get(&part).await.expect(200);
    assert_eq!(part["items"].as_array().unwrap().len(), 9, "{part}");
    assert!(part["items"][0].get("absent").is_none());
    for wrong in ["from=yesterday", "cursor=1.2", "cursor=1.2.3.4", "reverse=x"] {
        bench
            .root
            .get(&format!("/api/v1/devices/{device}/messages?{wrong}"))
            .await
            .problem(400, "bad_query");
    }
}

#[tokio::test]
async fn wrong_messages_are_refused_whole_with_the_place() {
    let bench = Bench::start().await;
    let device = bench.root.device("a").await;
    let path = format!("/api/v1/devices/{device}/messages");
    for (body, words) in [
        (json!("x"), "array of messages"),
        (json!([{"a": 1}, 5]), "`[1]`"),
        (json!([{"a": 1}, {"timestamp": "soon"}]), "`[1].timestamp`"),
        (json!([{"": 1}]), "`[0].`"),
    ] {
        let reply = bench.root.post(&path, body.clone()).await;
        let detail = reply.problem(422, "invalid");
        assert!(detail.contains(words), "{body}: {detail}");
    }
    let none = bench.root.get(&path).await.expect(200);
    assert_eq!(none["items"], json!([]), "nothing of a refused batch is stored");
    let large = json!([{"text": "x".repeat(8 << 20)}]);
    bench.root.post(&path, large).await.problem(413, "too_large");
    bench
        .root
        .patch(&format!("/api/v1/devices/{device}"), json!({"enabled": false}))
        .await
        .expect(200);
    bench.root.post(&path, json!({"a": 1})).await.problem(409, "conflict");
}

#[tokio::test]
async fn a_message_that_is_too_large_is_named_and_the_others_are_stored() {
    let bench = Bench::start().await;
    let device = bench.root.device("a").await;
    let path = format!("/api/v1/devices/{device}/messages");
    let large: Json = (0..1_025).map(|n| (format!("p{n}"), Json::from(n))).collect();
    let mixed = json!([{"a": 1}, large, {"a": 2}, {"text": "x".repeat(1 << 20)}]);
    let published = publish(&bench.root, &device, mixed).await;
    assert_eq!((&published["stored"], &published["rejected"]), (&json!(2), &json!(2)));
    let errors = published["errors"].as_array().unwrap();
    assert_eq!((&errors[0]["index"], &errors[1]["index"]), (&json!(1), &json!(3)));
    assert!(errors[0]["detail"].as_str().unwrap().contains("1025 parameters"), "{errors:?}");
    assert!(errors[1]["detail"].as_str().unwrap().contains("bytes"), "{errors:?}");
    // Where none is stored, that is no success.
    let refused = bench.root.post(&path, large.clone()).await.expect(422);
    assert_eq!(
        (&refused["member"], refused["errors"].as_array().unwrap().len()),
        (&json!("[0]"), 1)
    );
    let refused = bench.root.post(&path, json!([large, large])).await.expect(422);
    assert_eq!(refused["errors"][1]["index"], 1, "{refused}");
    assert_eq!(publish(&bench.root, &device, json!([])).await["stored"], 0);
}

/// What is not known now is said to be so; what does not depend on it goes on.
#[tokio::test]
async fn last_values_that_are_away_are_said_to_be() {
    let bench = Bench::start().await;
    let device = bench.root.device("dev").await;
    publish(&bench.root, &device, json!({"x": 1})).await;
    bench.state.set_away(true);
    let asked = [
        format!("/api/v1/devices/{device}/state"),
        format!("/api/v1/devices/{device}/state/x"),
        format!("/api/v1/devices/{device}/state/none"),
        "/api/v1/state".to_owned(),
        "/api/v1/devices?online=false".to_owned(),
    ];
    for path in &asked {
        let reply = bench.root.get(path).await;
        assert_eq!(reply.header("retry-after"), "1", "{path}");
        reply.problem(503, "state_unavailable");
    }
    publish(&bench.root, &device, json!({"x": 2})).await;
    let listed = bench.root.get("/api/v1/devices").await.expect(200);
    assert!(listed["items"][0]["online"].is_null(), "{listed}");
    let path = format!("/api/v1/devices/{device}");
    assert!(bench.root.get(&path).await.expect(200)["online"].is_null());
    let renamed = bench.root.patch(&path, json!({"name": "other"})).await.expect(200);
    assert_eq!((&renamed["name"], &renamed["online"]), (&json!("other"), &json!(null)));
    bench.state.set_away(false);
    assert_eq!(bench.root.get(&path).await.expect(200)["online"], false);
    bench.root.get(&asked[1]).await.expect(200);
    bench.state.set_away(true);
    bench.root.delete(&path).await.expect(204);
}

#[tokio::test]
async fn the_fleet_is_read_at_once() {
    let bench = Bench::start().await;
    for n in 0..5 {
        let device = bench.root.device(&format!("dev-{n}")).await;
        publish(
            &bench.root,
            &device,
            json!({"position.latitude": n, "position.longitude": 25, "other": 1}),
        )
        .await;
        if n == 2 {
            let (id, now) = (device.parse().unwrap(), bench.ingest.now());
            let connection = ConnectionId::new(now, [1; 10]);
            bench
                .platform
                .state
                .connected(bench.account, id, connection, 1, "192.0.2.5:1".to_owned(), now)
                .await
                .unwrap();
        }
    }
    let page = bench
        .root
        .get("/api/v1/state?params=position.latitude,position.longitude&limit=3")
        .await
        .expect(200);
    let items = page["items"].as_array().unwrap();
    assert_eq!(items.len(), 3);
    assert_eq!(items[2]["values"]["position.latitude"]["value"], 2);
    assert!(items[2]["values"].get("other").is_none());
    assert_eq!((&items[2]["online"], &items[1]["online"]), (&json!(true), &json!(false)));
    assert_eq!(items[2]["name"], "dev-2");
    assert!(items[0]["seen_at"].is_string());
    let next = page["next"].as_str().unwrap();
    let rest = bench.root.get(&format!("/api/v1/state?limit=3&cursor={next}")).await.expect(200);
    assert_eq!(rest["items"].as_array().unwrap().len(), 2);
    assert_eq!(
        bench.root.get("/api/v1/devices?online=true").await.expect(200)["items"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    let state = bench
        .root
        .get(&format!("/api/v1/devices/{}/state", items[2]["device"].as_str().unwrap()))
        .await
        .expect(200);
    assert_eq!(state["peer"], "192.0.2.5:1");
}

/// Pages are read in parts, which must not be seen from outside.
#[tokio::test]
async fn a_large_page_is_whole_and_in_order() {
    let bench = Bench::start().await;
    let device = bench.root.device("a").await;
    let messages: Vec<Json> =
        (0..700).map(|n| json!({"timestamp": 1_790_000_000 + n, "n": n})).collect();
    publish(&bench.root, &device, Json::from(messages)).await;
    let numbers = |page: &Json| -> Vec<i64> {
        page["items"].as_array().unwrap().iter().map(|m| m["n"].as_i64().unwrap()).collect()
    };
    let path = format!("/api/v1/devices/{device}/messages");
    let all = bench.root.get(&format!("{path}?limit=10000")).await.expect(200);
    assert_eq!(numbers(&all), (0..700).collect::<Vec<_>>());
    assert_eq!(all["next"], Json::Null);
    let some = bench.root.get(&format!("{path}?limit=300&reverse=true")).await.expect(200);
    assert_eq!(numbers(&some), (400..700).rev().collect::<Vec<_>>());
    let next = some["next"].as_str().unwrap();
    let rest = format!("{path}?limit=1000&reverse=true&cursor={next}");
    assert_eq!(
        numbers(&bench.root.get(&rest).await.expect(200)),
        (0..400).rev().collect::<Vec<_>>()
    );
    // One that is large in bytes ends early, and goes on.
    let large: Vec<Json> = (0..25)
        .map(|n| json!({"timestamp": 1_791_000_000 + n, "t": "x".repeat(600_000)}))
        .collect();
    for part in large.chunks(5) {
        publish(&bench.root, &device, Json::from(part.to_vec())).await;
    }
    let page = bench.root.get(&format!("{path}?from=1791000000&limit=25")).await.expect(200);
    let first = page["items"].as_array().unwrap().len();
    assert!((10..20).contains(&first), "{first} of 25");
    let next = page["next"].as_str().unwrap();
    let rest = format!("{path}?from=1791000000&limit=25&cursor={next}");
    let rest = bench.root.get(&rest).await.expect(200);
    assert_eq!(rest["items"].as_array().unwrap().len() + first, 25);
    let wrong = format!("{path}?from=2026-01-02T00:00:00Z&to=2026-01-01T00:00:00Z");
    bench.root.get(&wrong).await.problem(400, "bad_query");
    let detail = bench.root.get("/api/v1/audit?cursor=zzz").await.problem(400, "bad_query");
    assert!(detail.contains("not one that this path gave"), "{detail}");
}

#[tokio::test]
async fn numbers_have_the_digits_that_were_sent_or_are_refused() {
    let bench = Bench::start().await;
    let device = bench.root.device("a").await;
    let path = format!("/api/v1/devices/{device}/messages");
    let send = async |body: &str| {
        let json = [("content-type", "application/json")];
        bench.root.raw(Method::POST, &path, &json, body.as_bytes().to_vec()).await
    };
    send(r#"{"a": 12345678901234.56789, "b": 0.30000000000000004}"#).await.expect(200);
    let text = bench.root.get(&path).await.text();
    assert!(
        text.contains("12345678901234.56789") && text.contains("0.30000000000000004"),
        "{text}"
    );
    for wrong in ["18446744073709551616", "123456789012345678901234567890.5", "1e-400"] {
        let detail = send(&format!("[{{\"a\": {wrong}}}]")).await.problem(422, "invalid");
        assert!(detail.starts_with("`[0].a`"), "{detail}");
    }
}
