//! Signing in at the console: links, passwords, cookies.

use hyper::Method;
use serde_json::{Value as Json, json};

use crate::support::{Bench, Client, Reply};

const PASSWORD: &str = "correct horse battery";
const CSRF: (&str, &str) = ("x-fieldline-csrf", "1");

/// The caller that the cookie of this answer makes.
fn signed_in(bench: &Bench, reply: &Reply) -> Client {
    let cookie = reply.header("set-cookie");
    for part in ["HttpOnly", "SameSite=Strict", "Path=/", "Max-Age="] {
        assert!(cookie.contains(part), "{part} is not in {cookie}");
    }
    assert!(!cookie.contains("Secure"), "plain HTTP: the browser would not keep it");
    let value = cookie.split(';').next().unwrap().strip_prefix("fieldline_session=").unwrap();
    Client { cookie: Some(value.to_owned()), ..bench.anyone() }
}

async fn change(client: &Client, method: Method, path: &str, body: Json) -> Reply {
    client.send(method, path, &[CSRF], Some(body)).await
}

#[tokio::test]
async fn a_newcomer_signs_in_by_the_link_and_sets_a_password() {
    let bench = Bench::start().await;
    let anyone = bench.anyone();
    let reply = anyone.post("/api/v1/auth/link", json!({"secret": bench.link})).await;
    let admin = signed_in(&bench, &reply);
    let welcome = reply.expect(200);
    assert_eq!(
        (&welcome["user"]["name"], &welcome["must_set_password"]),
        (&json!("admin"), &json!(true))
    );
    anyone
        .post("/api/v1/auth/link", json!({"secret": bench.link}))
        .await
        .problem(401, "unauthenticated");

    let me = admin.get("/api/v1/auth/me").await.expect(200);
    assert_eq!(
        (&me["kind"], &me["account"]["name"], &me["must_set_password"]),
        (&json!("user"), &json!("default"), &json!(true))
    );
    change(&admin, Method::POST, "/api/v1/auth/password", json!({"new": "short"}))
        .await
        .problem(422, "invalid");
    let set = change(&admin, Method::POST, "/api/v1/auth/password", json!({"new": PASSWORD})).await;
    assert_eq!(set.status, 204);
    assert_eq!(admin.get("/api/v1/auth/me").await.expect(200)["must_set_password"], false);

    anyone
        .post("/api/v1/auth/sign-in", json!({"name": "admin", "password": "wrong"}))
        .await
        .problem(401, "unauthenticated");
    let reply =
        anyone.post("/api/v1/auth/sign-in", json!({"name": "admin", "password": PASSWORD})).await;
    let second = signed_in(&bench, &reply);
    reply.expect(200);
    let out = change(&second, Method::POST, "/api/v1/auth/sign-out", json!({})).await;
    assert_eq!(out.status, 204);
    assert!(out.header("set-cookie").contains("Max-Age=0"));
    second.get("/api/v1/auth/me").await.problem(401, "unauthenticated");
    admin.get("/api/v1/auth/me").await.expect(200);
    bench.ingest.flush().await;
    let events = admin.get("/api/v1/events").await.expect(200);
    let signs = events["items"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|event| event["params"]["action"] == "sign_in");
    assert_eq!(signs.count(), 1);
}

#[tokio::test]
async fn the_last_one_with_all_rights_stays() {
    let bench = Bench::start().await;
    let root = &bench.root;
    let users = root.get("/api/v1/users").await.expect(200);
    let admin = format!("/api/v1/users/{}", users["items"][0]["id"].as_str().unwrap());
    for refused in [
        root.delete(&admin).await,
        root.patch(&admin, json!({"enabled": false})).await,
        root.patch(&admin, json!({"scopes": ["admin"]})).await,
    ] {
        let detail = refused.problem(409, "conflict");
        assert!(detail.contains("give it to another user"), "{detail}");
    }
    root.patch(&admin, json!({"name": "chief"})).await.expect(200);

    // One of another account does, as long as that one is there and enabled.
    let other = root.post("/api/v1/accounts", json!({"name": "ops"})).await.expect(201);
    let account = format!("/api/v1/accounts/{}", other["id"].as_str().unwrap());
    let new =
        json!({"name": "ada", "scopes": ["root"], "password": PASSWORD, "account": other["id"]});
    root.post("/api/v1/users", new).await.expect(201);
    root.patch(&admin, json!({"enabled": false})).await.expect(200);
    root.patch(&account, json!({"enabled": false})).await.problem(409, "conflict");
    root.delete(&account).await.problem(409, "conflict");
    root.patch(&account, json!({"retention_days": 3})).await.expect(200);
    // Without a password she could not take over from one who has it.
    root.patch(&admin, json!({"enabled": true})).await.expect(200);
    root.delete(&account).await.problem(409, "conflict");
    assert_eq!(root.delete(&admin).await.status, 204);
}

#[tokio::test]
async fn a_change_by_cookie_needs_the_header() {
    let bench = Bench::start().await;
    let reply = bench.anyone().post("/api/v1/auth/link", json!({"secret": bench.link})).await;
    let admin = signed_in(&bench, &reply);
    admin.post("/api/v1/devices", json!({"ident": "a"})).await.problem(403, "csrf");
    admin.delete("/api/v1/devices/x").await.problem(403, "csrf");
    change(&admin, Method::POST, "/api/v1/devices", json!({"ident": "a"})).await.expect(201);
    // A form of a foreign page cannot sign anyone in either.
    let form = [("content-type", "text/plain")];
    let body = json!({"name": "admin", "password": "x"}).to_string().into_bytes();
    bench
        .anyone()
        .raw(Method::POST, "/api/v1/auth/sign-in", &form, body)
        .await
        .problem(415, "not_json");
}

#[tokio::test]
async fn guessing_a_password_is_slowed_down() {
    let bench = Bench::start().await;
    let mut waits = 0;
    for _ in 0..12 {
        let reply = bench
            .anyone()
            .post("/api/v1/auth/sign-in", json!({"name": "admin", "password": "a wrong guess"}))
            .await;
        if reply.status == 429 {
            assert!(reply.header("retry-after").parse::<u64>().unwrap() >= 1);
            waits += 1;
        } else {
            reply.problem(401, "unauthenticated");
        }
    }
    assert!(waits >= 5, "{waits} of 12 were told to wait");
}

#[tokio::test]
async fn users_are_managed_within_the_rights_of_the_manager() {
    let bench = Bench::start().await;
    let admin = bench.token(bench.account, &[fieldline_model::Scope::Admin]).await;
    let made = admin
        .post("/api/v1/users", json!({"name": "ada", "scopes": ["read", "write"]}))
        .await
        .expect(201);
    assert!(made["link"].is_string() && made.get("password_hash").is_none());
    let path = format!("/api/v1/users/{}", made["id"].as_str().unwrap());
    admin
        .post("/api/v1/users", json!({"name": "eve", "scopes": ["root"]}))
        .await
        .problem(422, "invalid");
    admin.patch(&path, json!({"scopes": ["root"]})).await.problem(422, "invalid");
    assert_eq!(
        admin.patch(&path, json!({"scopes": ["read"]})).await.expect(200)["scopes"],
        json!(["read"])
    );

    // The operator is beyond an administrator: no link, no change, no deletion.
    let users = admin.get("/api/v1/users").await.expect(200);
    let root =
        users["items"].as_array().unwrap().iter().find(|user| user["name"] == "admin").unwrap();
    let root = format!("/api/v1/users/{}", root["id"].as_str().unwrap());
    admin.post(&format!("{root}/link"), json!({})).await.problem(422, "invalid");
    admin.patch(&root, json!({"enabled": false})).await.problem(422, "invalid");
    admin.delete(&root).await.problem(422, "invalid");

    let link = admin.post(&format!("{path}/link"), json!({})).await.expect(201);
    let secret = link["link"].as_str().unwrap().rsplit_once('=').unwrap().1.to_owned();
    let reply = bench.anyone().post("/api/v1/auth/link", json!({"secret": secret})).await;
    let ada = signed_in(&bench, &reply);
    ada.get("/api/v1/devices").await.expect(200);
    ada.get("/api/v1/users").await.problem(403, "scope_missing");
    assert_eq!(admin.delete(&path).await.status, 204);
    ada.get("/api/v1/devices").await.problem(401, "unauthenticated");
}

#[tokio::test]
async fn a_token_is_shown_once_and_revoked_at_once() {
    let bench = Bench::start().await;
    let made = bench
        .root
        .post(
            "/api/v1/tokens",
            json!({"name": "ci", "scopes": ["read"], "networks": ["127.0.0.0/8"]}),
        )
        .await
        .expect(201);
    let secret = made["secret"].as_str().unwrap().to_owned();
    let path = format!("/api/v1/tokens/{}", made["id"].as_str().unwrap());
    let read = bench.root.get(&path).await.expect(200);
    assert!(read.get("secret").is_none() && read.get("secret_hash").is_none());
    assert!(!bench.root.get("/api/v1/tokens").await.text().contains(&secret));
    let client = Client { token: Some(secret), ..bench.anyone() };
    client.get("/api/v1/devices").await.expect(200);
    bench.root.patch(&path, json!({"networks": ["10.0.0.0/8"]})).await.expect(200);
    client.get("/api/v1/devices").await.problem(401, "unauthenticated");
    bench.root.patch(&path, json!({"networks": []})).await.expect(200);
    client.get("/api/v1/devices").await.expect(200);
    bench.root.patch(&path, json!({"networks": ["10.0.0.0/99"]})).await.problem(422, "invalid");
    assert_eq!(bench.root.delete(&path).await.status, 204);
    client.get("/api/v1/devices").await.problem(401, "unauthenticated");
}
