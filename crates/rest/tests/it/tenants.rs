//! Every route is tried with a foreign account's token. A route that is not in
//! the table below fails the test: whoever adds one says here what others see of it.

use fieldline_contracts::Kind;
use fieldline_contracts::Page;
use fieldline_model::{ChannelId, DeviceId};
use fieldline_rest::{RouteRow, routes};
use hyper::Method;
use serde_json::{Value as Json, json};

use crate::support::{Bench, Client, TENANT, connection};

/// Stands in every name, value and text of the account that is to be hidden.
const MARK: &str = "hidden-from-others";

/// What a foreign caller must meet.
enum Foreign {
    /// It does not exist for them.
    Hidden,
    /// They see what is their own: nothing with the mark in it.
    Own(u16),
    /// It is for operators.
    Forbidden,
    /// It shows nothing of any account.
    Public,
}

struct Ids {
    account: String,
    user: String,
    token: String,
    device: String,
    channel: String,
    connection: String,
    command: String,
    parameter: String,
}

/// What a foreign caller must meet at this route, and the body to try it with.
fn judge(row: &RouteRow, ids: &Ids) -> (Foreign, String, Json) {
    use Foreign::{Forbidden, Hidden, Own, Public};
    let route = format!("{} {}", row.method, row.path.trim_start_matches("/api/v1"));
    let (foreign, id, body) = match route.as_str() {
        "POST /auth/link" | "POST /auth/sign-in" => (Public, "", json!({})),
        "POST /auth/sign-out" => (Own(204), "", json!({})),
        "GET /auth/me" => (Own(200), "", json!({})),
        "POST /auth/password" => (Own(422), "", json!({"new": "a long new password"})),
        "GET /accounts" => (Own(200), "", json!({})),
        "POST /accounts" => (Forbidden, "", json!({"name": "another"})),
        "GET /accounts/{id}" => (Hidden, ids.account.as_str(), json!({})),
        "PATCH /accounts/{id}" => (Forbidden, ids.account.as_str(), json!({"enabled": false})),
        "DELETE /accounts/{id}" => (Forbidden, ids.account.as_str(), json!({})),
        "GET /users" | "GET /tokens" => (Own(200), "", json!({})),
        "POST /users" => {
            (Hidden, "", json!({"name": "eve", "scopes": ["read"], "account": ids.account}))
        }
        "POST /tokens" => {
            (Hidden, "", json!({"name": "eve", "scopes": ["read"], "account": ids.account}))
        }
        "GET /users/{id}" | "DELETE /users/{id}" | "POST /users/{id}/link" => {
            (Hidden, ids.user.as_str(), json!({}))
        }
        "PATCH /users/{id}" => (Hidden, ids.user.as_str(), json!({"enabled": false})),
        "GET /tokens/{id}" | "DELETE /tokens/{id}" => (Hidden, ids.token.as_str(), json!({})),
        "PATCH /tokens/{id}" => (Hidden, ids.token.as_str(), json!({"name": "x"})),
        "GET /nodes" => (Forbidden, "", json!({})),
        "GET /devices" | "GET /state" | "GET /channels" | "GET /connect" | "GET /protocols"
        | "GET /parameters" | "GET /events" | "GET /audit" | "GET /settings" | "GET /system" => {
            (Own(200), "", json!({}))
        }
        // An ident is taken in its own account only: making the same is possible, and shows nothing.
        "POST /devices" => (Own(201), "", json!({"ident": "own-device"})),
        "GET /devices/{id}"
        | "DELETE /devices/{id}"
        | "GET /devices/{id}/messages"
        | "GET /devices/{id}/state"
        | "GET /devices/{id}/state/{param}"
        | "GET /devices/{id}/log"
        | "GET /devices/{id}/commands" => (Hidden, ids.device.as_str(), json!({})),
        "PATCH /devices/{id}" => (Hidden, ids.device.as_str(), json!({"name": "taken over"})),
        "POST /devices/{id}/messages" => (Hidden, ids.device.as_str(), json!([{"text": "forged"}])),
        "POST /devices/{id}/commands" => {
            (Hidden, ids.device.as_str(), json!({"name": "text", "params": {"text": "x"}}))
        }
        "GET /commands/{id}" | "DELETE /commands/{id}" => (Hidden, ids.command.as_str(), json!({})),
        "POST /channels" => (
            Own(201),
            "",
            json!({"name": "own", "protocol": "teltonika", "transport": "tcp", "listen": "127.0.0.1:4001"}),
        ),
        "GET /channels/{id}"
        | "DELETE /channels/{id}"
        | "GET /channels/{id}/connections"
        | "DELETE /channels/{id}/connections/{connection}"
        | "GET /channels/{id}/log" => (Hidden, ids.channel.as_str(), json!({})),
        "PATCH /channels/{id}" => (Hidden, ids.channel.as_str(), json!({"enabled": false})),
        "GET /protocols/{name}" | "DELETE /protocols/{name}" => {
            (Hidden, "hidden_protocol", json!({}))
        }
        "PUT /protocols/{name}" => (Own(422), "hidden_protocol", json!({"source": "nonsense"})),
        "POST /protocols/{name}/check" => {
            (Own(422), "hidden_protocol", json!({"source": "nonsense"}))
        }
        "POST /protocols/{name}/decode" => (Hidden, "hidden_protocol", json!({"hex": "00"})),
        "POST /parameters" => (Own(201), "", json!({"name": "own.parameter", "kind": "int"})),
        "GET /parameters/{id}" | "DELETE /parameters/{id}" => {
            (Hidden, ids.parameter.as_str(), json!({}))
        }
        "PATCH /parameters/{id}" => (Hidden, ids.parameter.as_str(), json!({"title": "x"})),
        "PATCH /settings" => (Own(200), "", json!({"map.attribution": "own"})),
        "GET /ws" | "GET /healthz" | "GET /readyz" | "GET /metrics" | "GET /openapi.json" => {
            (Public, "", json!({}))
        }
        _ => panic!("{route} is not in this table: say what a foreign account meets there"),
    };
    let path = row
        .path
        .replace("{id}", id)
        .replace("{name}", id)
        .replace("{param}", "text")
        .replace("{connection}", &ids.connection);
    (foreign, path, body)
}

/// An account with one of everything, each bearing the mark.
async fn furnish(bench: &Bench, client: &Client) -> Ids {
    let text = |json: &Json| json["id"].as_str().unwrap().to_owned();
    let device = client
        .post(
            "/api/v1/devices",
            json!({"ident": "359632101234567", "name": MARK, "labels": {"k": MARK}}),
        )
        .await
        .expect(201);
    let device = text(&device);
    client
        .post(
            &format!("/api/v1/devices/{device}/messages"),
            json!([{"text": MARK, "position.latitude": 54.7}]),
        )
        .await
        .expect(200);
    let channel = client
        .post(
            "/api/v1/channels",
            json!({"name": MARK, "protocol": "teltonika", "transport": "tcp", "listen": "127.0.0.1:4000"}),
        )
        .await
        .expect(201);
    let channel = text(&channel);
    let command = client
        .post(
            &format!("/api/v1/devices/{device}/commands"),
            json!({"name": "text", "params": {"text": MARK}}),
        )
        .await
        .expect(201);
    let parameter = client
        .post(
            "/api/v1/parameters",
            json!({"name": "secret.parameter", "kind": "int", "title": MARK}),
        )
        .await
        .expect(201);
    client.patch("/api/v1/settings", json!({"map.attribution": MARK})).await.expect(200);
    let user = client
        .post(
            "/api/v1/users",
            json!({"name": MARK, "scopes": ["read"], "password": "quite a long one"}),
        )
        .await
        .expect(201);
    let token =
        client.post("/api/v1/tokens", json!({"name": MARK, "scopes": ["read"]})).await.expect(201);
    let source = crate::support::renamed("wialon_ips", "hidden_protocol");
    client.put("/api/v1/protocols/hidden_protocol", json!({ "source": source })).await.expect(201);
    let info = connection(
        ChannelId(channel.parse::<ChannelId>().unwrap().0),
        Some(device.parse::<DeviceId>().unwrap()),
        MARK,
    );
    let account = client.get("/api/v1/auth/me").await.expect(200)["account"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let held = (account.parse().unwrap(), info.clone());
    bench.channels.connections.lock().push(held);
    Ids {
        account,
        user: text(&user),
        token: text(&token),
        device,
        channel,
        connection: info.id.to_string(),
        command: text(&command),
        parameter: text(&parameter),
    }
}

#[tokio::test]
async fn every_route_shows_nothing_to_a_foreign_account() {
    let bench = Bench::start().await;
    let (a, b) = (bench.tenant("alpha").await, bench.tenant("beta").await);
    let owner = bench.token(a, &TENANT).await;
    let foreign = bench.token(b, &TENANT).await;
    let ids = furnish(&bench, &owner).await;
    bench.ingest.flush().await;
    let before = contents(&bench, a).await;

    for row in routes() {
        let (expected, path, body) = judge(&row, &ids);
        let method: Method = row.method.parse().unwrap();
        let body = (row.method != "GET" && row.method != "DELETE").then_some(body);
        if row.method == "GET" && matches!(expected, Foreign::Hidden) {
            // What is hidden must be there to be seen by its owner.
            let own = owner.get(&path).await;
            assert_eq!(own.status, 200, "the owner at {path}: {}", own.text());
        }
        let reply = foreign.send(method, &path, &[], body).await;
        let (status, text) = (reply.status.as_u16(), reply.text());
        let said = format!("{} {path}: {status} {text}", row.method);
        assert!(!text.contains(MARK), "the other account's content is shown: {said}");
        // What is in the path comes back in words; what is not, must not.
        assert!(path.contains("hidden_protocol") || !text.contains("hidden_protocol"), "{said}");
        match expected {
            Foreign::Hidden => assert_eq!(status, 404, "{said}"),
            Foreign::Own(wanted) => {
                assert_eq!(status, wanted, "{said}");
                assert!(!text.contains(&ids.device) && !text.contains(&ids.channel), "{said}");
            }
            Foreign::Forbidden => assert_eq!(status, 403, "{said}"),
            Foreign::Public => assert!(row.public, "{said}"),
        }
    }
    bench.ingest.flush().await;
    assert_eq!(contents(&bench, a).await, before, "a foreign account changed something");
    let state = owner.get(&format!("/api/v1/devices/{}/state/text", ids.device)).await.expect(200);
    assert_eq!(state["value"], MARK);
    assert_eq!(bench.channels.connections.lock().len(), 1, "a foreign account closed a connection");
}

/// Every object of an account with its revision.
async fn contents(
    bench: &Bench,
    account: fieldline_model::AccountId,
) -> Vec<(Kind, uuid::Uuid, u64)> {
    let mut all = Vec::new();
    for kind in Kind::ALL {
        let page = Page::first(1_000);
        for record in bench.platform.registry.list(account, kind, &page).await.unwrap() {
            all.push((kind, record.id, record.revision));
        }
    }
    all
}

#[tokio::test]
async fn every_route_that_is_not_public_wants_a_token() {
    let bench = Bench::start().await;
    let anyone = bench.anyone();
    let wrong = Client { token: Some(format!("flt_{}", "x".repeat(40))), ..anyone.clone() };
    for row in routes().into_iter().filter(|row| !row.public) {
        let path = row.path.replace(['{', '}'], "");
        let method: Method = row.method.parse().unwrap();
        let reply = anyone.send(method.clone(), &path, &[], None).await;
        assert_eq!(reply.status, 401, "{} {path}", row.method);
        assert!(reply.header("www-authenticate").starts_with("Bearer"));
        let reply = wrong.send(method, &path, &[], None).await;
        // After many wrong ones, the address is told to slow down.
        assert!(
            matches!(reply.status.as_u16(), 401 | 429),
            "{} {path}: {}",
            row.method,
            reply.status
        );
    }
}

#[tokio::test]
async fn every_scope_is_asked_for() {
    let bench = Bench::start().await;
    let account = bench.tenant("alpha").await;
    let publisher = bench.token(account, &[fieldline_model::Scope::Publish]).await;
    let reader = bench.token(account, &[fieldline_model::Scope::Read]).await;
    for row in routes() {
        let Some(scope) = row.scope else { continue };
        let path = row.path.replace(['{', '}'], "");
        let method: Method = row.method.parse().unwrap();
        let client = if scope == fieldline_model::Scope::Read { &publisher } else { &reader };
        let reply = client.send(method, &path, &[], None).await;
        let detail = reply.problem(403, "scope_missing");
        assert!(detail.contains(scope.name()), "{} {path}: {detail}", row.method);
    }
}

/// A token that is restricted to some devices sees those, and nothing of the others.
#[tokio::test]
async fn a_restricted_token_sees_its_devices_only() {
    let bench = Bench::start().await;
    let account = bench.tenant("alpha").await;
    let owner = bench.token(account, &TENANT).await;
    let ids = furnish(&bench, &owner).await;
    let mine = owner.device("mine").await;
    let devices = vec![mine.parse::<DeviceId>().unwrap()];
    let restricted = bench.token_for(account, &TENANT, devices, None).await;
    bench.ingest.flush().await;

    let listed = restricted.get("/api/v1/devices").await.expect(200);
    assert_eq!(listed["items"].as_array().unwrap().len(), 1);
    assert_eq!(listed["items"][0]["ident"], "mine");
    let states = restricted.get("/api/v1/state").await.expect(200);
    assert_eq!(states["items"].as_array().unwrap().len(), 1);
    for row in routes() {
        let (_, path, body) = judge(&row, &ids);
        // What the account shares among its tokens is not about devices.
        let shared = [
            "/channels",
            "/connect",
            "/settings",
            "/parameters",
            "/protocols",
            "/auth/me",
            "/accounts",
        ];
        let path_of = path.trim_start_matches("/api/v1");
        let about_devices = !shared.iter().any(|shared| path_of.starts_with(shared))
            || path_of.contains("/connections")
            || path_of.contains("/log");
        let method: Method = row.method.parse().unwrap();
        let changes = row.method != "GET";
        let body = (changes && row.method != "DELETE").then_some(body);
        if row.public
            || path_of.starts_with("/auth")
            || path_of.ends_with("/check")
            || path_of.ends_with("/decode")
        {
            continue;
        }
        let reply = restricted.send(method, &path, &[], body).await;
        let said = format!("{} {path}: {} {}", row.method, reply.status, reply.text());
        assert!(!(about_devices && reply.text().contains(MARK)), "{said}");
        assert!(
            !(changes && reply.status.is_success()),
            "a restricted token changed something: {said}"
        );
    }
}
