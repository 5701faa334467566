//! The live feed.

use std::time::Duration;

use fieldline_model::{DeviceId, EventKind, Params, Scope};
use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value as Json, json};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use crate::support::{Bench, Client, TENANT};

struct Feed(WebSocketStream<TcpStream>);

async fn open(client: &Client, query: &str, headers: &[(&str, &str)]) -> Result<Feed, Error> {
    let url = format!("ws://{}/api/v1/ws{query}", client.address);
    let mut request = url.into_client_request().unwrap();
    for (name, value) in headers {
        let name: hyper::header::HeaderName = name.parse().unwrap();
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    let stream = TcpStream::connect(client.address).await.unwrap();
    client_async(request, stream).await.map(|(socket, _)| Feed(socket))
}

async fn signed_in(client: &Client) -> Feed {
    let bearer = format!("Bearer {}", client.token.as_ref().unwrap());
    open(client, "", &[("authorization", &bearer)]).await.unwrap()
}

impl Feed {
    async fn say(&mut self, said: Json) {
        self.0.send(Message::text(said.to_string())).await.unwrap();
    }

    async fn subscribe(&mut self, said: Json) {
        self.say(said).await;
        assert_eq!(self.next().await["type"], "subscribed");
    }

    /// The next thing said, pings aside.
    async fn next(&mut self) -> Json {
        loop {
            match timeout(Duration::from_secs(5), self.0.next()).await.expect("something comes") {
                Some(Ok(Message::Text(text))) => return serde_json::from_str(&text).unwrap(),
                Some(Ok(Message::Ping(_))) => {}
                other => panic!("expected text, got {other:?}"),
            }
        }
    }

    async fn closed(&mut self) -> Option<CloseFrame> {
        loop {
            match timeout(Duration::from_secs(5), self.0.next()).await.expect("it is closed") {
                Some(Ok(Message::Close(frame))) => return frame,
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return None,
            }
        }
    }

    /// Whether nothing comes that names one of `ids`.
    async fn silent_about(&mut self, ids: &[&str]) -> bool {
        while let Ok(said) = timeout(Duration::from_millis(200), self.0.next()).await {
            match said {
                Some(Ok(Message::Text(text))) if ids.iter().any(|id| text.contains(id)) => {
                    return false;
                }
                Some(Ok(_)) => {}
                _ => return false,
            }
        }
        true
    }
}

async fn publish(client: &Client, device: &str, n: i64) {
    client.post(&format!("/api/v1/devices/{device}/messages"), json!({"n": n})).await.expect(200);
}

#[tokio::test]
async fn messages_state_events_and_logs_come_as_they_happen() {
    let bench = Bench::start().await;
    let device = bench.root.device("a").await;
    let mut feed = signed_in(&bench.root).await;
    feed.subscribe(json!({"subscribe": ["message", "state", "log"], "id": 7})).await;
    publish(&bench.root, &device, 42).await;
    let (mut message, mut state) = (Json::Null, Json::Null);
    while message.is_null() || state.is_null() {
        let push = feed.next().await;
        match push["type"].as_str().unwrap() {
            "message" => message = push,
            "state" => state = push,
            other => panic!("{other}: {push}"),
        }
    }
    assert_eq!((&message["device"], &message["items"][0]["n"]), (&json!(device), &json!(42)));
    assert_eq!((&state["device"], &state["values"]["n"]["value"]), (&json!(device), &json!(42)));
    assert_eq!(state["online"], false);

    // The next subscription takes the place of the one before.
    feed.subscribe(json!({"subscribe": ["event"]})).await;
    publish(&bench.root, &device, 43).await;
    let id: DeviceId = device.parse().unwrap();
    let event = bench.ingest.new_event(bench.account, EventKind::Online, id, Params::new());
    bench.ingest.event(event).await;
    let push = loop {
        let push = feed.next().await;
        assert_eq!(push["type"], "event", "{push}");
        if push["event"]["kind"] == "online" {
            break push;
        }
    };
    assert_eq!(push["event"]["object"], device);

    feed.say(json!({"subscribe": ["everything"]})).await;
    let error = feed.next().await;
    assert!(
        error["type"] == "error" && error["detail"].as_str().unwrap().contains("everything"),
        "{error}"
    );
    feed.say(json!([])).await;
    assert_eq!(feed.next().await["type"], "error");
}

#[tokio::test]
async fn a_feed_shows_its_own_account_and_its_own_devices_only() {
    let bench = Bench::start().await;
    let (a, b) = (bench.tenant("alpha").await, bench.tenant("beta").await);
    let (owner, foreign) = (bench.token(a, &TENANT).await, bench.token(b, &TENANT).await);
    let (one, two) = (owner.device("one").await, owner.device("two").await);
    let restricted = bench.token_for(a, &TENANT, vec![one.parse().unwrap()], None).await;
    let all = json!({"subscribe": ["message", "state", "event", "log"]});
    let named = json!({"subscribe": ["message", "state", "event", "log"], "devices": [one, two]});
    let mut outside = signed_in(&foreign).await;
    outside.subscribe(all.clone()).await;
    let mut outside_named = signed_in(&foreign).await;
    outside_named.subscribe(named.clone()).await;
    let mut limited = signed_in(&restricted).await;
    limited.subscribe(json!({"subscribe": ["message"]})).await;
    let mut limited_named = signed_in(&restricted).await;
    limited_named.subscribe(json!({"subscribe": ["message"], "devices": [two]})).await;
    let mut own = signed_in(&owner).await;
    own.subscribe(json!({"subscribe": ["message"], "devices": [two]})).await;

    publish(&owner, &two, 1).await;
    publish(&owner, &one, 2).await;
    assert_eq!(limited.next().await["device"], one);
    assert_eq!(own.next().await["device"], two);
    for feed in [&mut outside, &mut outside_named, &mut limited, &mut limited_named, &mut own] {
        assert!(feed.silent_about(&[&one, &two]).await);
    }
}

#[tokio::test]
async fn everyone_says_who_they_are() {
    let bench = Bench::start().await;
    let token = bench.root.token.clone().unwrap();
    let mut by_query = open(&bench.root, &format!("?token={token}"), &[]).await.unwrap();
    by_query.subscribe(json!({"subscribe": ["event"]})).await;
    let mut by_message = open(&bench.root, "", &[]).await.unwrap();
    by_message.say(json!({"token": token, "subscribe": ["event"]})).await;
    assert_eq!(by_message.next().await["type"], "subscribed");

    let mut nameless = open(&bench.root, "", &[]).await.unwrap();
    nameless.say(json!({"subscribe": ["event"]})).await;
    assert_eq!(u16::from(nameless.closed().await.unwrap().code), 4_401);
    let mut wrong = open(&bench.root, "", &[]).await.unwrap();
    wrong.say(json!({"token": format!("flt_{}", "x".repeat(40))})).await;
    assert_eq!(u16::from(wrong.closed().await.unwrap().code), 4_401);
    let publisher = bench.token(bench.account, &[Scope::Publish]).await;
    let refused =
        open(&publisher, &format!("?token={}", publisher.token.clone().unwrap()), &[]).await;
    assert!(matches!(refused, Err(Error::Http(response)) if response.status() == 403));
    let refused = open(&bench.root, "?token=nonsense", &[]).await;
    assert!(matches!(refused, Err(Error::Http(response)) if response.status() == 401));

    // A page of another site has the cookie's user, but not its say.
    let reply = bench.anyone().post("/api/v1/auth/link", json!({"secret": bench.link})).await;
    let cookie = reply.header("set-cookie").split(';').next().unwrap().to_owned();
    let refused =
        open(&bench.root, "", &[("cookie", &cookie), ("origin", "https://evil.example.org")]).await;
    assert!(matches!(refused, Err(Error::Http(response)) if response.status() == 403));
    let own = format!("http://{}", bench.address);
    let mut welcome =
        open(&bench.root, "", &[("cookie", &cookie), ("origin", &own)]).await.unwrap();
    welcome.subscribe(json!({"subscribe": ["event"]})).await;
}

#[tokio::test]
async fn a_revoked_token_ends_its_feeds() {
    let bench = Bench::start().await;
    let made = bench
        .root
        .post("/api/v1/tokens", json!({"name": "t", "scopes": ["read"]}))
        .await
        .expect(201);
    let client =
        Client { token: Some(made["secret"].as_str().unwrap().to_owned()), ..bench.anyone() };
    let mut feed = signed_in(&client).await;
    feed.subscribe(json!({"subscribe": ["message"]})).await;
    bench.root.delete(&format!("/api/v1/tokens/{}", made["id"].as_str().unwrap())).await;
    assert_eq!(u16::from(feed.closed().await.unwrap().code), 4_401);
}

#[tokio::test]
async fn an_expired_token_ends_its_feeds() {
    let bench = Bench::start().await;
    let soon = bench.ingest.now().plus_micros(700_000);
    let client = bench.token_for(bench.account, &[Scope::Read], Vec::new(), Some(soon)).await;
    let mut feed = signed_in(&client).await;
    feed.subscribe(json!({"subscribe": ["message"]})).await;
    assert_eq!(u16::from(feed.closed().await.unwrap().code), 4_401);
    assert!(bench.ingest.now() >= soon);
}

#[tokio::test]
async fn feeds_are_bounded_and_closed_at_shutdown() {
    let config = fieldline_rest::RestConfig { feeds_per_account_max: 2, ..Default::default() };
    let bench = Bench::with(config, None).await;
    let (mut a, mut b) = (signed_in(&bench.root).await, signed_in(&bench.root).await);
    a.subscribe(json!({"subscribe": ["message"]})).await;
    b.subscribe(json!({"subscribe": []})).await;
    let mut third = signed_in(&bench.root).await;
    assert_eq!(u16::from(third.closed().await.unwrap().code), 4_429);
    b.0.send(Message::text("x".repeat(200 << 10))).await.ok();
    let frame = b.closed().await;
    assert!(frame.is_none_or(|frame| u16::from(frame.code) == 1_009));
    let stopping = tokio::spawn(bench.stop());
    assert_eq!(u16::from(a.closed().await.unwrap().code), 1_001);
    drop((a, b, third));
    assert_eq!(stopping.await.unwrap().abandoned, 0);
}

/// A client that reads nothing is told what it missed; the others are not held up.
#[tokio::test]
async fn a_slow_reader_is_told_what_it_missed() {
    let bench = Bench::start().await;
    let device: DeviceId = bench.root.device("a").await.parse().unwrap();
    let mut slow = signed_in(&bench.root).await;
    slow.subscribe(json!({"subscribe": ["event"]})).await;
    let filler = "x".repeat(2_000);
    for n in 0..30_000_i64 {
        let params =
            fieldline_ingest::own_params([("n", n.into()), ("fill", filler.as_str().into())]);
        let event = bench.ingest.new_event(bench.account, EventKind::Rejected, device, params);
        let item = fieldline_contracts::BusItem::Event(std::sync::Arc::new(event));
        bench.platform.bus.publish(bench.account, vec![item]).await;
        if n % 500 == 0 {
            tokio::task::yield_now().await;
        }
    }
    let (mut dropped, mut last) = (0, -1);
    while last < 29_999 {
        let push = slow.next().await;
        match push["type"].as_str().unwrap() {
            "lagged" => dropped += push["dropped"].as_i64().unwrap(),
            "event" if push["event"]["kind"] == "rejected" => {
                let n = push["event"]["params"]["n"].as_i64().unwrap();
                assert!(n > last, "in order");
                last = n;
            }
            _ => {}
        }
    }
    assert!(dropped > 0, "it was told what it missed");
}
