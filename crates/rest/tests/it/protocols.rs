//! Protocols: upload, compile errors, the playground.

use serde_json::{Value as Json, json};

use crate::support::{Bench, renamed};

#[tokio::test]
async fn a_protocol_is_uploaded_replaced_used_and_deleted() {
    let bench = Bench::start().await;
    let client = &bench.root;
    let path = "/api/v1/protocols/my_ips";
    let source = renamed("wialon_ips", "my_ips");
    let first = client.put(path, json!({"source": source})).await;
    let etag = first.header("etag").to_owned();
    let first = first.expect(201);
    assert_eq!((&first["version"], &first["built_in"]), (&json!(1), &json!(false)));
    assert!(first["transports"].as_array().unwrap().contains(&json!("tcp")));
    let second =
        client.put(path, json!({"source": format!("{source}\n// changed\n")})).await.expect(200);
    assert_eq!(second["version"], 2);
    let stale = client
        .send(hyper::Method::PUT, path, &[("if-match", &etag)], Some(json!({"source": source})))
        .await;
    stale.problem(412, "changed");
    let read = client.get(path).await.expect(200);
    assert!(read["source"].as_str().unwrap().ends_with("// changed\n"));
    let names = client.get("/api/v1/protocols").await.expect(200);
    let names: Vec<&Json> =
        names["items"].as_array().unwrap().iter().map(|one| &one["name"]).collect();
    assert_eq!(names, ["my_ips", "teltonika", "wialon_ips"]);

    let channel =
        json!({"name": "c", "protocol": "my_ips", "transport": "tcp", "listen": "127.0.0.1:5039"});
    let channel = client.post("/api/v1/channels", channel).await.expect(201);
    let detail = client.delete(path).await.problem(409, "conflict");
    assert!(detail.contains("c;"), "the channel is named: {detail}");
    client.delete(&format!("/api/v1/channels/{}", channel["id"].as_str().unwrap())).await;
    assert_eq!(client.delete(path).await.status, 204);
    client.get(path).await.problem(404, "not_found");
    client.delete("/api/v1/protocols/teltonika").await.problem(409, "conflict");
}

#[tokio::test]
async fn compile_errors_have_their_places() {
    let bench = Bench::start().await;
    let source = renamed("wialon_ips", "my_ips");
    let broken = source.replacen("transport tcp, udp", "transport tcp, pigeon", 1);
    for path in ["/api/v1/protocols/my_ips/check", "/api/v1/protocols/my_ips"] {
        let body = json!({"source": broken});
        let reply = if path.ends_with("check") {
            bench.root.post(path, body).await
        } else {
            bench.root.put(path, body).await
        };
        assert_eq!(reply.status, 422, "{}", reply.text());
        let problem = reply.json();
        assert_eq!(problem["code"], "does_not_compile");
        let errors = problem["errors"].as_array().unwrap();
        let error =
            errors.iter().find(|error| error["line"] == 3).expect("the place of the change");
        assert!(error["message"].as_str().unwrap().contains("pigeon") && error["hint"].is_string());
        assert!(error["column"].as_u64().unwrap() > 1 && error["message"].is_string());
    }
    bench.root.get("/api/v1/protocols/my_ips").await.problem(404, "not_found");
    // The name in the source and in the path must agree.
    let detail = bench
        .root
        .put("/api/v1/protocols/other", json!({"source": source}))
        .await
        .problem(422, "invalid");
    assert!(detail.contains("my_ips") && detail.contains("other"), "{detail}");
    bench
        .root
        .put("/api/v1/protocols/Not-A-Name", json!({"source": source}))
        .await
        .problem(422, "invalid");
    let checked = bench
        .root
        .post("/api/v1/protocols/my_ips/check", json!({"source": source}))
        .await
        .expect(200);
    assert_eq!(checked["name"], "my_ips");
}

#[tokio::test]
async fn the_playground_shows_frames_and_fields() {
    let bench = Bench::start().await;
    let path = "/api/v1/protocols/wialon_ips/decode";
    let hex = |text: &str| fieldline_model::value::to_hex(text.as_bytes());
    let line = "#SD#270413;205601;5544.6025;N;03739.6834;E;1;2;3;4\r\n";
    let input =
        json!({"hex": hex(&format!("{line}#SD#2704")), "transport": "tcp", "identified": true});
    let decoded = bench.root.post(path, input).await.expect(200);
    let frames = decoded["frames"].as_array().unwrap();
    assert_eq!(frames.len(), 1, "{decoded}");
    assert_eq!(frames[0]["messages"][0]["position.latitude"], 55.743375);
    assert_eq!((&frames[0]["start"], &frames[0]["end"]), (&json!(0), &json!(line.len())));
    assert_eq!(frames[0]["replies"][0], hex("#ASD#1\r\n"));
    assert!(!frames[0]["fields"].as_array().unwrap().is_empty());
    assert_eq!(decoded["remaining"], hex("#SD#2704"));

    let whole = format!("#L#my-ident;NA\r\n{line}");
    let decoded =
        bench.root.post(path, json!({"hex": hex(&whole), "transport": "tcp"})).await.expect(200);
    let frames = decoded["frames"].as_array().unwrap();
    assert_eq!(frames.len(), 2, "{decoded}");
    assert_eq!(frames[1]["ident"], "my-ident");
    assert_eq!(frames[1]["start"], 16);

    let garbage = bench
        .root
        .post(path, json!({"hex": hex("GET / HTTP/1.1\r\n\r\n"), "transport": "tcp"}))
        .await
        .expect(200);
    assert!(garbage["frames"][0]["error"]["class"].is_string(), "{garbage}");
    bench.root.post(path, json!({"hex": "0"})).await.problem(422, "invalid");
    bench.root.post(path, json!({"hex": "zz"})).await.problem(422, "invalid");
    bench
        .root
        .post(path, json!({"hex": "00", "source": "nonsense"}))
        .await
        .problem(422, "does_not_compile");
}
