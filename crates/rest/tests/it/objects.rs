//! Objects: create, read, list, patch, delete, and what is refused.

use fieldline_contracts::Missing;
use fieldline_model::Scope;
use hyper::Method;
use serde_json::{Value as Json, json};

use crate::support::{Bench, TENANT, connection};

#[tokio::test]
async fn a_device_is_made_read_changed_and_deleted() {
    let bench = Bench::start().await;
    let client = &bench.root;
    let input = json!({"ident": "359632101234567", "type": "FMB920", "labels": {"fleet": "north"}, "settings": {"io16": true}});
    let reply = client.post("/api/v1/devices", input).await;
    let etag = reply.header("etag").to_owned();
    let made = reply.expect(201);
    assert_eq!(made["name"], "359632101234567", "the name is the ident where none is given");
    assert_eq!(
        (&made["enabled"], &made["online"], &made["seen_at"]),
        (&json!(true), &json!(false), &Json::Null)
    );
    assert_eq!(etag, format!("\"{}\"", made["revision"]));
    let path = format!("/api/v1/devices/{}", made["id"].as_str().unwrap());
    assert_eq!(client.get(&path).await.expect(200), made);

    let changed = client
        .patch(&path, json!({"name": "Truck 7", "labels": {"fleet": null, "city": "Vilnius"}}))
        .await
        .expect(200);
    assert_eq!(changed["name"], "Truck 7");
    assert_eq!(changed["labels"], json!({"city": "Vilnius"}), "null takes a member away");
    assert_eq!(changed["type"], "FMB920", "what is not named stays");
    assert!(changed["revision"].as_u64() > made["revision"].as_u64());
    // What was read may be sent back whole.
    client.patch(&path, changed.clone()).await.expect(200);

    assert_eq!(client.delete(&path).await.status, 204);
    let detail = client.get(&path).await.problem(404, "not_found");
    assert!(detail.contains(made["id"].as_str().unwrap()), "{detail}");
    client.delete(&path).await.problem(404, "not_found");
}

#[tokio::test]
async fn a_lost_update_is_refused() {
    let bench = Bench::start().await;
    let id = bench.root.device("a").await;
    let path = format!("/api/v1/devices/{id}");
    let etag = bench.root.get(&path).await.header("etag").to_owned();
    let patch = async |etag: &str, name: &str| {
        let headers = [("if-match", etag)];
        bench.root.send(Method::PATCH, &path, &headers, Some(json!({"name": name}))).await
    };
    patch(&etag, "first").await.expect(200);
    let detail = patch(&etag, "second").await.problem(412, "changed");
    assert!(detail.contains("read it again"), "{detail}");
    patch("*", "third").await.expect(200);
    patch("nonsense", "fourth").await.problem(412, "changed");
    let deleted = bench.root.send(Method::DELETE, &path, &[("if-match", &etag)], None).await;
    deleted.problem(412, "changed");
    assert_eq!(bench.root.get(&path).await.expect(200)["name"], "third");
}

/// Changes without `If-Match` that overtake each other are all made.
#[tokio::test]
async fn concurrent_patches_of_different_members_all_hold() {
    let bench = Bench::start().await;
    let id = bench.root.device("a").await;
    let path = format!("/api/v1/devices/{id}");
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..4 {
        let (client, path) = (bench.root.clone(), path.clone());
        tasks.spawn(async move {
            client.patch(&path, json!({"labels": {format!("k{n}"): "v"}})).await.expect(200);
        });
    }
    tasks.join_all().await;
    let labels = &bench.root.get(&path).await.expect(200)["labels"];
    assert_eq!(labels.as_object().unwrap().len(), 4, "{labels}");
}

#[tokio::test]
async fn wrong_input_is_refused_with_its_member_and_the_remedy() {
    let bench = Bench::start().await;
    bench.root.device("taken").await;
    let path = "/api/v1/devices";
    for (body, code, words) in [
        (json!({}), 422, "missing field `ident`"),
        (json!({"ident": "a", "nam": "x"}), 422, "unknown field `nam`"),
        (json!({"ident": 5}), 422, "`ident`"),
        (json!({"ident": "a", "labels": {"k": 1}}), 422, "`labels.k`"),
        (json!({"ident": ""}), 422, "1 to 64"),
        (json!({"ident": "x".repeat(65)}), 422, "1 to 64"),
        (json!({"ident": "a/b"}), 422, "# + /"),
        (json!({"ident": "a\u{7}"}), 422, "control characters"),
        (json!({"ident": " a"}), 422, "space"),
        (json!({"ident": "a", "protocol": "teltonica"}), 422, "teltonika"),
        (json!({"ident": "a", "labels": {"k:": "v"}}), 422, "colon"),
        (json!({"ident": "a", "settings": {"s": "x".repeat(20_000)}}), 422, "`settings`"),
        (json!({"ident": "taken"}), 409, "another device has the ident `taken`"),
        (json!(["ident"]), 422, "object"),
        (json!("text"), 422, ""),
    ] {
        let reply = bench.root.post(path, body.clone()).await;
        assert_eq!(reply.status, code, "{body}: {}", reply.text());
        let detail = reply.json()["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains(words), "{body}: {detail}");
    }
    let raw = async |kind: &str, body: &str| {
        bench
            .root
            .raw(Method::POST, path, &[("content-type", kind)], body.as_bytes().to_vec())
            .await
    };
    raw("application/json", "{\"ident\":").await.problem(400, "bad_request");
    raw("application/json", "").await.problem(400, "bad_request");
    raw("application/json", "{\"ident\":\"a\"} x").await.problem(400, "bad_request");
    raw("text/plain", "{\"ident\":\"a\"}").await.problem(415, "not_json");
    raw("application/x-www-form-urlencoded", "ident=a").await.problem(415, "not_json");
    let large = format!("{{\"ident\":\"{}\"}}", "x".repeat(1 << 20));
    raw("application/json", &large).await.problem(413, "too_large");
    let deep = format!("{{\"ident\":\"a\",\"settings\":{{\"s\":{}}}}}", "[".repeat(5_000));
    raw("application/json", &deep).await.problem(400, "bad_request");
    assert_eq!(
        bench.root.get("/api/v1/devices").await.expect(200)["items"].as_array().unwrap().len(),
        1
    );
}

#[tokio::test]
async fn lists_are_paged_and_filtered() {
    let bench = Bench::start().await;
    for n in 0..7 {
        let fleet = if n % 2 == 0 { "north" } else { "south" };
        let input = json!({"ident": format!("dev-{n}"), "name": format!("Truck {n}"), "labels": {"fleet": fleet, "n": n.to_string()}});
        bench.root.post("/api/v1/devices", input).await.expect(201);
    }
    let list =
        async |query: &str| bench.root.get(&format!("/api/v1/devices?{query}")).await.expect(200);
    let count = async |query: &str| list(query).await["items"].as_array().unwrap().len();
    assert_eq!(count("").await, 7);
    assert_eq!(count("q=TRUCK%203").await, 1);
    assert_eq!(count("q=dev-").await, 7);
    assert_eq!(count("ident=dev-4").await, 1);
    assert_eq!(count("ident=dev").await, 0);
    assert_eq!(count("label=fleet:north").await, 4);
    assert_eq!(count("label=fleet:north&label=n:2").await, 1);
    assert_eq!(count("label=fleet").await, 7);
    assert_eq!(count("online=true").await, 0);
    assert_eq!(count("online=false").await, 7);

    for filter in ["", "&label=fleet:north"] {
        let (mut path, mut seen) = (format!("/api/v1/devices?limit=2{filter}"), Vec::new());
        loop {
            let reply = bench.root.get(&path).await;
            let link = reply.header("link").to_owned();
            let page = reply.expect(200);
            assert!(page["items"].as_array().unwrap().len() <= 2);
            seen.extend(
                page["items"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|item| item["ident"].as_str().unwrap().to_owned()),
            );
            if page["next"].is_null() {
                assert_eq!(link, "");
                break;
            }
            // The link leads to the same page as the cursor.
            let (next, rel) = link.strip_prefix('<').unwrap().split_once('>').unwrap();
            assert_eq!(rel, "; rel=\"next\"");
            assert!(next.contains(page["next"].as_str().unwrap()));
            path = next.to_owned();
        }
        let mut sorted = seen.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!(seen.len(), if filter.is_empty() { 7 } else { 4 });
        assert_eq!(sorted, seen, "in the order they were made, none twice");
    }
    for wrong in ["lable=a:b", "limit=0", "limit=x", "cursor=x", "online=maybe"] {
        bench.root.get(&format!("/api/v1/devices?{wrong}")).await.problem(400, "bad_query");
    }
}

#[tokio::test]
async fn channels_are_checked_at_the_edge() {
    let bench = Bench::start().await;
    let base =
        json!({"name": "c", "protocol": "teltonika", "transport": "tcp", "listen": "0.0.0.0:5027"});
    let with = |name: &str, value: Json| {
        let mut body = base.clone();
        body[name] = value;
        body
    };
    for (body, member) in [
        (with("listen", json!("5027")), "listen"),
        (with("listen", json!("localhost:5027")), "listen"),
        (with("protocol", json!("none")), "protocol"),
        (with("transport", json!("tls")), "tls_certificate"),
        (with("idle_timeout_s", json!(0)), "idle_timeout_s"),
        (with("connections_max", json!(0)), "connections_max"),
        (with("frame_bytes_max", json!(20_000_000)), "frame_bytes_max"),
        (with("name", json!(" ")), "name"),
    ] {
        let reply = bench.root.post("/api/v1/channels", body).await;
        let detail = reply.problem(422, "invalid");
        assert!(detail.starts_with(&format!("`{member}`")), "{member}: {detail}");
    }
    bench
        .root
        .post("/api/v1/channels", with("transport", json!("carrier pigeon")))
        .await
        .problem(422, "invalid");
    let made = bench.root.post("/api/v1/channels", base.clone()).await.expect(201);
    assert_eq!(made["status"]["listening"], true);
    assert_eq!(made["idle_timeout_s"], 600);
    bench.root.post("/api/v1/channels", with("name", json!("d"))).await.problem(409, "taken");
    let udp =
        json!({"name": "d", "protocol": "teltonika", "transport": "udp", "listen": "0.0.0.0:5027"});
    bench.root.post("/api/v1/channels", udp).await.expect(201);

    // A file on the server is named by operators only.
    let tenant = bench.token(bench.tenant("t").await, &TENANT).await;
    let tls = json!({"name": "s", "protocol": "teltonika", "transport": "tls", "listen": "0.0.0.0:5028", "tls_certificate": "/etc/x.pem", "tls_key": "/etc/y.pem"});
    let detail = tenant.post("/api/v1/channels", tls.clone()).await.problem(422, "invalid");
    assert!(detail.contains("root"), "{detail}");
    bench.root.post("/api/v1/channels", tls).await.expect(201);

    let id = made["id"].as_str().unwrap();
    let path = format!("/api/v1/channels/{id}");
    let changed = bench
        .root
        .patch(&path, json!({"auto_register": true, "idle_timeout_s": null}))
        .await
        .expect(200);
    assert_eq!(
        (&changed["auto_register"], &changed["idle_timeout_s"]),
        (&json!(true), &json!(600))
    );
    bench.root.patch(&path, changed).await.expect(200);
    let info = connection(id.parse().unwrap(), None, "352094087654321");
    bench.channels.connections.lock().push((bench.account, info.clone()));
    let connections = bench.root.get(&format!("{path}/connections")).await.expect(200);
    assert_eq!(connections["items"][0]["ident"], "352094087654321");
    assert_eq!(connections["items"][0]["node"], "node-1");
    assert_eq!(connections["unreachable"], json!([]));
    let close = format!("{path}/connections/{}", info.id);
    assert_eq!(bench.root.delete(&close).await.status, 204);
    bench.root.delete(&close).await.problem(404, "not_found");
    // A node that gives no answer is named, and what it may hold is not said to be absent.
    let (node, reason) = ("node-2".to_owned(), "it sleeps".to_owned());
    bench.channels.missing.lock().push(Missing { node, reason });
    let connections = bench.root.get(&format!("{path}/connections")).await.expect(200);
    let expected = json!([{ "node": "node-2", "reason": "it sleeps" }]);
    assert_eq!(connections["unreachable"], expected);
    let refused = bench.root.delete(&close).await;
    assert!(refused.text().contains("node-2 (it sleeps)"), "{}", refused.text());
    assert_eq!(refused.status, 503);
    bench.channels.missing.lock().clear();
    let points = bench.root.get("/api/v1/connect").await.expect(200);
    let points = points["channels"].as_array().unwrap();
    assert!(points.iter().any(|point| point["host"] == "127.0.0.1" && point["port"] == 5027));
    assert_eq!(bench.root.delete(&path).await.status, 204);
}

#[tokio::test]
async fn a_post_with_a_key_is_done_once() {
    let bench = Bench::start().await;
    let post = async |key: &str, path: &str, body: Json| {
        bench.root.send(Method::POST, path, &[("idempotency-key", key)], Some(body)).await
    };
    let devices = "/api/v1/devices";
    let first = post("k1", devices, json!({"ident": "a"})).await;
    let etag = first.header("etag").to_owned();
    let first = first.expect(201);
    let again = post("k1", devices, json!({"ident": "a"})).await;
    assert_eq!(
        (again.header("etag"), again.header("idempotency-replayed")),
        (etag.as_str(), "true")
    );
    assert_eq!(again.expect(201), first);
    post("k1", devices, json!({"ident": "b"})).await.problem(422, "invalid");
    post("k2", devices, json!({"ident": "a"})).await.problem(409, "taken");
    post("k2", devices, json!({"ident": "a"})).await.problem(409, "taken");
    // A secret is shown once: not even the same key gets it again.
    let token = json!({"name": "t", "scopes": ["read"]});
    assert!(post("k3", "/api/v1/tokens", token.clone()).await.expect(201)["secret"].is_string());
    let detail = post("k3", "/api/v1/tokens", token).await.problem(409, "repeated");
    assert!(detail.contains("shown once"), "{detail}");
    // Another caller's key is another key.
    let other = bench.token(bench.account, &TENANT).await;
    let reply = other
        .send(Method::POST, devices, &[("idempotency-key", "k1")], Some(json!({"ident": "c"})))
        .await;
    reply.expect(201);
}

#[tokio::test]
async fn accounts_are_managed_by_operators_and_deleted_whole() {
    let bench = Bench::start().await;
    let made = bench
        .root
        .post("/api/v1/accounts", json!({"name": "acme", "retention_days": 30}))
        .await
        .expect(201);
    let id = made["id"].as_str().unwrap().to_owned();
    let path = format!("/api/v1/accounts/{id}");
    bench.root.post("/api/v1/accounts", json!({"name": "acme"})).await.problem(409, "taken");
    let user = json!({"name": "acme-admin", "scopes": ["admin"], "account": id});
    let user = bench.root.post("/api/v1/users", user).await.expect(201);
    assert!(user["link"].as_str().unwrap().starts_with("/#/sign-in?link=fll_"));
    let token = json!({"name": "t", "scopes": ["admin", "publish"], "account": id});
    let secret = bench.root.post("/api/v1/tokens", token).await.expect(201)["secret"]
        .as_str()
        .unwrap()
        .to_owned();
    let tenant = crate::support::Client { token: Some(secret), ..bench.anyone() };
    let device = tenant.device("x").await;
    tenant.post(&format!("/api/v1/devices/{device}/messages"), json!({"a": 1})).await.expect(200);
    assert_eq!(tenant.get(&path).await.expect(200)["name"], "acme");
    assert_eq!(
        tenant.get("/api/v1/accounts").await.expect(200)["items"].as_array().unwrap().len(),
        1
    );
    assert_eq!(
        bench.root.get("/api/v1/accounts").await.expect(200)["items"].as_array().unwrap().len(),
        2
    );
    tenant.patch(&path, json!({"retention_days": 0})).await.problem(403, "scope_missing");

    bench.root.patch(&path, json!({"enabled": false})).await.expect(200);
    tenant.get(&path).await.problem(401, "unauthenticated");
    bench.root.patch(&path, json!({"enabled": true})).await.expect(200);
    tenant.get(&path).await.expect(200);

    assert_eq!(bench.root.delete(&path).await.status, 204);
    tenant.get(&path).await.problem(401, "unauthenticated");
    bench.root.get(&path).await.problem(404, "not_found");
    let own = format!("/api/v1/accounts/{}", bench.account);
    bench.root.delete(&own).await.problem(409, "conflict");
    bench.root.patch(&own, json!({"enabled": false})).await.problem(409, "conflict");
}

#[tokio::test]
async fn parameters_and_settings_are_declared_and_checked() {
    let bench = Bench::start().await;
    let all = bench.root.get("/api/v1/parameters?limit=1000").await.expect(200);
    let built_in = all["items"].as_array().unwrap().len();
    assert!(built_in >= 120);
    for wrong in [
        json!({"name": "Upper", "kind": "int"}),
        json!({"name": "a", "kind": "number"}),
        json!({"name": "a", "kind": "int", "decimals": 2}),
        json!({"name": "a", "kind": "decimal", "decimals": 19}),
        json!({"name": "a", "kind": "int", "bits": 65}),
        json!({"name": "timestamp", "kind": "text"}),
        json!({"name": "position.latitude", "kind": "text"}),
    ] {
        bench.root.post("/api/v1/parameters", wrong).await.problem(422, "invalid");
    }
    let own = json!({"name": "tank.level", "kind": "decimal", "decimals": 2, "unit": "L"});
    let made = bench.root.post("/api/v1/parameters", own).await.expect(201);
    let path = format!("/api/v1/parameters/{}", made["id"].as_str().unwrap());
    let changed = bench.root.patch(&path, json!({"title": "Tank"})).await.expect(200);
    assert_eq!((&changed["title"], &changed["decimals"]), (&json!("Tank"), &json!(2)));
    let all = bench.root.get("/api/v1/parameters?limit=1000").await.expect(200);
    assert_eq!(all["items"].as_array().unwrap().len(), built_in + 1);
    assert_eq!(bench.root.delete(&path).await.status, 204);

    let settings = bench.root.get("/api/v1/settings").await.expect(200);
    assert_eq!(settings["map.tiles_url"], Json::Null);
    let url = "https://tiles.example.org/{z}/{x}/{y}.png";
    let set = bench.root.patch("/api/v1/settings", json!({"map.tiles_url": url})).await.expect(200);
    assert_eq!(set["map.tiles_url"], url);
    for wrong in [
        json!({"map.tiles": 1}),
        json!({"map.tiles_url": "javascript:alert(1)"}),
        json!({"map.tiles_url": 5}),
    ] {
        bench.root.patch("/api/v1/settings", wrong).await.problem(422, "invalid");
    }
    let unset =
        bench.root.patch("/api/v1/settings", json!({"map.tiles_url": null})).await.expect(200);
    assert_eq!(unset["map.tiles_url"], Json::Null);
}

#[tokio::test]
async fn a_token_that_could_not_work_is_not_made() {
    let bench = Bench::start().await;
    let (root, device) = (&bench.root, bench.root.device("a").await);
    let foreign = bench.token(bench.tenant("t").await, &TENANT).await.device("b").await;
    let none = "01a00000-0000-7000-8000-000000000000";
    for wrong in [
        json!({"expires_at": "2020-01-01T00:00:00Z"}),
        json!({"devices": [device, none]}),
        json!({"devices": [foreign]}),
    ] {
        let mut body = json!({"name": "t", "scopes": ["read"]});
        for (name, value) in wrong.as_object().unwrap() {
            body[name] = value.clone();
        }
        root.post("/api/v1/tokens", body).await.problem(422, "invalid");
    }
    let body = json!({"name": "t", "scopes": ["read"], "devices": [device]});
    let made = root.post("/api/v1/tokens", body).await.expect(201);
    let path = format!("/api/v1/tokens/{}", made["id"].as_str().unwrap());
    for wrong in
        [json!({"expires_at": 1}), json!({"devices": [device, foreign]}), json!({"nope": null})]
    {
        root.patch(&path, wrong).await.problem(422, "invalid");
    }
    // One that is deleted later may stay in it: it opens nothing.
    assert_eq!(root.delete(&format!("/api/v1/devices/{device}")).await.status, 204);
    root.patch(&path, json!({"name": "u", "devices": [device]})).await.expect(200);
}

#[tokio::test]
async fn every_change_is_in_the_audit_trail_and_told_as_an_event() {
    let bench = Bench::start().await;
    let id = bench.root.device("a").await;
    let path = format!("/api/v1/devices/{id}");
    bench.root.patch(&path, json!({"name": "b"})).await.expect(200);
    bench.root.delete(&path).await;
    let trail = bench.root.get("/api/v1/audit?limit=3").await.expect(200);
    let items = trail["items"].as_array().unwrap();
    let actions: Vec<&str> = items.iter().map(|item| item["action"].as_str().unwrap()).collect();
    assert_eq!(actions, ["delete", "update", "create"]);
    assert_eq!(items[1]["changed"], json!(["name"]));
    assert!(items.iter().all(|item| item["object"] == id && item["kind"] == "device"));
    assert!(items[0]["actor"]["name"].as_str().unwrap().starts_with("token:flt_"));
    assert_eq!(items[0]["actor"]["address"], "127.0.0.1");
    let before = items[2]["sequence"].as_u64().unwrap();
    let older = bench.root.get(&format!("/api/v1/audit?before={before}")).await.expect(200);
    assert!(
        older["items"]
            .as_array()
            .unwrap()
            .iter()
            .all(|item| item["sequence"].as_u64().unwrap() < before)
    );
    crate::support::eventually("three events tell of it", async || {
        bench.ingest.flush().await;
        let events = bench.root.get("/api/v1/events?limit=100").await.expect(200);
        let about =
            events["items"].as_array().unwrap().iter().filter(|event| event["object"] == id);
        about.filter(|event| event["kind"] == "audit").count() == 3
    })
    .await;
    let reader = bench.token(bench.account, &[Scope::Read]).await;
    reader.get("/api/v1/audit").await.problem(403, "scope_missing");
}

#[tokio::test]
async fn a_post_with_a_key_runs_to_its_end_without_its_client() {
    let bench = Bench::start().await;
    let device = bench.root.device("a").await;
    let path = format!("/api/v1/devices/{device}/commands?wait_ms=1500");
    let body = json!({"name": "text", "params": {"text": "getinfo"}});
    let key = [("idempotency-key", "k1")];
    let send = || bench.root.send(Method::POST, &path, &key, Some(body.clone()));
    // The client gives up long before the answer.
    let gone = tokio::time::timeout(std::time::Duration::from_millis(300), send()).await;
    assert!(gone.is_err());
    send().await.problem(409, "repeated");
    tokio::time::sleep(std::time::Duration::from_millis(2_000)).await;
    let again = send().await;
    assert_eq!(again.header("idempotency-replayed"), "true");
    again.expect(201);
    let commands = format!("/api/v1/devices/{device}/commands");
    let commands = bench.root.get(&commands).await.expect(200);
    assert_eq!(commands["items"].as_array().unwrap().len(), 1, "queued once");
}

#[tokio::test]
async fn settings_are_those_that_the_protocol_declares() {
    let bench = Bench::start().await;
    let make = async |ident: &str, settings: Json| {
        let body = json!({"ident": ident, "protocol": "teltonika", "settings": settings});
        bench.root.post("/api/v1/devices", body).await
    };
    let wrong = make("a", json!({"io16": "maybe"})).await.problem(422, "invalid");
    assert!(wrong.contains("`settings.io16`"), "{wrong}");
    let wrong = make("a", json!({"nosuch": 1})).await.problem(422, "invalid");
    assert!(wrong.contains("`settings.nosuch`") && wrong.contains("`io16`"), "{wrong}");
    make("a", json!({"password": 5})).await.problem(422, "invalid");
    let made = make("a", json!({"io16": true, "password": "secret"})).await.expect(201);
    let path = format!("/api/v1/devices/{}", made["id"].as_str().unwrap());
    let change = async |body: Json| bench.root.patch(&path, body).await;
    change(json!({"settings": {"io16": 7}})).await.problem(422, "invalid");
    change(json!({"protocol": "wialon_ips"})).await.problem(422, "invalid");
    let changed = change(json!({"protocol": "wialon_ips", "settings": {"io16": null}})).await;
    assert_eq!(changed.expect(200)["settings"], json!({"password": "secret"}));

    // A password is for those who may set it.
    let reader = bench.token(bench.account, &[Scope::Read]).await;
    assert_eq!(reader.get(&path).await.expect(200)["settings"], json!({}));
    let list = reader.get("/api/v1/devices").await.expect(200);
    assert_eq!(list["items"][0]["settings"], json!({}));
    let writer = bench.token(bench.account, &[Scope::Write]).await;
    assert_eq!(writer.get(&path).await.expect(200)["settings"]["password"], "secret");
}

#[tokio::test]
async fn what_cannot_be_seen_stands_in_no_ident_and_no_name() {
    let bench = Bench::start().await;
    for body in [
        json!({"ident": "a\u{202e}b"}),
        json!({"ident": "a\u{200d}b"}),
        json!({"ident": "a", "name": "x\u{200b}y"}),
    ] {
        bench.root.post("/api/v1/devices", body).await.problem(422, "invalid");
    }
    let made = json!({"ident": "a", "name": "می\u{200c}خواهم"});
    bench.root.post("/api/v1/devices", made).await.expect(201);
    let wrong = bench.root.post("/api/v1/devices", json!({"ident": "b", "bogus": 1})).await;
    let wrong = wrong.expect(422);
    assert_eq!((&wrong["member"], &wrong["errors"]), (&json!("bogus"), &Json::Null), "{wrong}");
}
