//! Listeners, connections, limits, the console's page.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fieldline_contracts::ownership::{Ownership, Progress, Work};
use fieldline_contracts::{Cluster as _, Lease};
use fieldline_rest::RestConfig;
use http_body_util::{BodyExt as _, Empty};
use hyper::{Method, Request};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::{Value as Json, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::support::{Bench, eventually};

#[tokio::test]
async fn health_metrics_and_description_are_for_anyone() {
    let bench = Bench::start().await;
    let anyone = bench.anyone();
    assert_eq!(anyone.get("/healthz").await.text(), "ok\n");
    assert_eq!(anyone.get("/metrics").await.text(), "fieldline_up 1\n");
    assert_eq!(anyone.get("/readyz").await.expect(200)["ready"], true);
    let openapi = anyone.get("/openapi.json").await.expect(200);
    assert_eq!(openapi["openapi"], "3.1.0");
    assert_eq!(openapi, serde_json::from_str::<Json>(&fieldline_rest::openapi()).unwrap());
    let system = bench.root.get("/api/v1/system").await.expect(200);
    assert_eq!(system["version"], "0.0.0-test");
    assert!(system["memory"]["resident_bytes"].as_u64().unwrap() > 1_000_000);
    assert_eq!(system["close_codes"][0]["name"], "device_closed");
}

#[tokio::test]
async fn the_cluster_is_told() {
    let bench = Bench::start().await;
    let lease = bench.cluster.claim("retention").await.unwrap().unwrap();
    let nodes = bench.root.get("/api/v1/nodes").await.expect(200);
    assert_eq!(nodes["node"], "test");
    assert_eq!(nodes["items"][0]["roles"], json!(["rest"]));
    assert_eq!((&nodes["items"][0]["zone"], &nodes["fresh"]), (&json!("a"), &json!(true)));
    let held = json!([{"key": "retention", "node": "test", "epoch": lease.epoch().0}]);
    assert_eq!(nodes["held"], held);
    assert_eq!(nodes["problems"], json!([]));
    let led = |at: usize| (&nodes["led"][at]["key"], &nodes["led"][at]["node"]);
    assert_eq!(led(0), (&json!("retention"), &json!("test")));
    assert_eq!(led(1), (&json!("upkeep"), &Json::Null));
    let named: Vec<_> = nodes["lags"].as_array().unwrap().iter().map(|lag| &lag["name"]).collect();
    assert_eq!(named, ["database", "cluster", "append"]);
    assert!(nodes["lags"][0]["value"].as_f64().unwrap() > 0.0, "{nodes}");
    assert_eq!(nodes["lags"][2]["value"], Json::Null, "nothing was stored yet");

    // What can be done without takes no node out of service; why it is away is for administrators.
    bench.state.set_away(true);
    let ready = bench.anyone().get("/readyz").await.expect(200);
    assert_eq!(ready["warnings"], json!(["last values: away; see /api/v1/nodes"]));
    let nodes = bench.root.get("/api/v1/nodes").await.expect(200);
    assert!(nodes["problems"][0].as_str().unwrap().contains("a test took it away"), "{nodes}");
}

/// Keys that are spread are told with how far they are, and no more keys are read than are told.
#[tokio::test]
async fn keys_are_told_up_to_a_bound() {
    const KEYS: usize = 10_050;
    let bench = Bench::start().await;
    let mut leases = Vec::new();
    for number in 0..KEYS {
        leases.push(bench.cluster.claim(&format!("filler/{number:05}")).await.unwrap().unwrap());
    }
    let retention = bench.cluster.claim("retention").await.unwrap();
    let nodes = bench.root.get("/api/v1/nodes").await.expect(200);
    let held = nodes["held"].as_array().unwrap();
    assert_eq!((held.len(), &held[9_999]["key"]), (10_000, &json!("filler/09999")));
    assert_eq!(nodes["led"][0]["node"], "test", "it is beyond what is told, and looked for");
    drop((leases, retention));

    let keys = Arc::new((0..30).map(|n| format!("module-{n}")).collect());
    let (_keys, wanted) = watch::channel(keys);
    let ownership = Ownership {
        prefix: "modules/".to_owned(),
        role: "rest".to_owned(),
        node: "test".to_owned(),
        moves_max: 10,
        stop_max: Duration::from_secs(1),
    };
    let stop = CancellationToken::new();
    let run = ownership.run(
        bench.cluster.clone(),
        wanted,
        Arc::new(Waiting),
        bench.progress.clone(),
        stop.clone(),
    );
    let run = tokio::spawn(run);
    let settled = |progress: &Progress| progress.keys == 30 && progress.orphans == 0;
    bench.progress.subscribe().wait_for(settled).await.unwrap();
    let nodes = bench.root.get("/api/v1/nodes").await.expect(200);
    let spread = json!([{
        "role": "rest", "prefix": "modules/", "keys": 30, "held": 30, "orphans": 0, "misplaced": 0, "frozen": false,
    }]);
    assert_eq!(nodes["spread"], spread);
    stop.cancel();
    run.await.unwrap();
}

struct Waiting;

impl Work for Waiting {
    async fn run(&self, _key: String, _lease: Arc<Lease>, stop: CancellationToken) {
        stop.cancelled().await;
    }
}

#[tokio::test]
async fn readiness_waits_for_channels_but_no_tenant_can_take_it_away() {
    let bench = Bench::start().await;
    let anyone = bench.anyone();
    *bench.channels.opening.lock() = true;
    let not_yet = anyone.get("/readyz").await.expect(503);
    assert!(not_yet["reasons"][0].as_str().unwrap().contains("being opened"), "{not_yet}");
    // One that has failed is known to have: nothing is waited for, and it is named, but not the
    // reason, which is its account's own.
    *bench.channels.opening.lock() = false;
    let failed = |n: u32| format!("channel {n}: cannot listen on /secret");
    *bench.channels.problems.lock() = vec![failed(7)];
    let ready = anyone.get("/readyz").await.expect(200);
    assert_eq!(ready["warnings"], json!(["channel 7 does not listen; see its status"]));
    *bench.channels.problems.lock() = (0..12).map(failed).collect();
    let ready = anyone.get("/readyz").await.expect(200);
    assert_eq!(ready["warnings"][10], "2 more channels do not listen");
}

#[tokio::test]
async fn unknown_paths_and_methods_say_what_there_is() {
    let bench = Bench::start().await;
    bench.root.get("/api/v1/nothing").await.problem(404, "not_found");
    bench.root.get("/api/v2/devices").await.problem(404, "not_found");
    let reply = bench.root.put("/api/v1/devices", json!({})).await;
    assert_eq!(reply.header("allow"), "GET, POST");
    reply.problem(405, "method_not_allowed");
    bench.root.post("/somewhere", json!({})).await.problem(404, "not_found");
    bench.root.get("/api/v1/devices/%ff/state").await.problem(404, "not_found");
    bench.root.get("/api/v1/devices/..%2f..%2fetc").await.problem(404, "not_found");
}

#[tokio::test]
async fn the_console_page_is_served_with_its_policy() {
    let bench = Bench::start().await;
    for path in ["/", "/devices/42", "/index.html", "/..%2f..%2fetc/passwd"] {
        let accept = ("accept", "text/html,application/xhtml+xml,*/*;q=0.8");
        let page = bench.anyone().send(Method::GET, path, &[accept], None).await;
        assert_eq!(page.status, 200, "{path}");
        assert!(page.header("content-type").starts_with("text/html"));
        let policy = page.header("content-security-policy");
        assert!(
            policy.contains("default-src 'self'") && policy.contains("frame-ancestors 'none'"),
            "{policy}"
        );
        assert_eq!(page.header("referrer-policy"), "no-referrer");
        assert_eq!(page.header("x-content-type-options"), "nosniff");
        assert!(!policy.contains("http") && !policy.contains("unsafe"), "{policy}");
    }
    for path in ["/", "/index.html"] {
        assert_eq!(bench.anyone().get(path).await.status, 200, "{path}");
    }
    // A program that has mistyped a path gets no page.
    for path in ["/API/V1/devices", "/devices/42", "/healthy"] {
        bench.anyone().get(path).await.problem(404, "not_found");
    }
    bench.anyone().get("/assets/none.js").await.problem(404, "not_found");
    let url = "https://tiles.example.org/{z}/{x}/{y}.png";
    bench.root.patch("/api/v1/settings", json!({"map.tiles_url": url})).await.expect(200);
    let reply = bench.anyone().post("/api/v1/auth/link", json!({"secret": bench.link})).await;
    let cookie = reply.header("set-cookie").split(';').next().unwrap().to_owned();
    let page = bench.anyone().send(Method::GET, "/", &[("cookie", &cookie)], None).await;
    assert!(
        page.header("content-security-policy")
            .contains("img-src 'self' data: blob: https://tiles.example.org;")
    );
    assert!(!bench.anyone().get("/").await.header("content-security-policy").contains("example"));
}

#[tokio::test]
async fn an_account_beyond_its_rate_is_told_to_slow_down() {
    let config = RestConfig { requests_per_s_max: 2, ..RestConfig::default() };
    let bench = Bench::with(config, None).await;
    let other = bench.token(bench.tenant("other").await, &[fieldline_model::Scope::Read]).await;
    let mut limited = 0;
    for _ in 0..30 {
        let reply = bench.root.get("/api/v1/system").await;
        if reply.status == 429 {
            assert!(reply.header("retry-after").parse::<u64>().unwrap() >= 1);
            limited += 1;
        }
    }
    assert!((5..=12).contains(&limited), "{limited} of 30");
    other.get("/api/v1/system").await.expect(200);
}

/// Slow, endless and nonsensical requests end by themselves, and others are served meanwhile.
#[tokio::test]
async fn bad_connections_end_and_hold_nobody_up() {
    let config = RestConfig {
        header_timeout: Duration::from_millis(300),
        body_timeout: Duration::from_millis(300),
        ..RestConfig::default()
    };
    let bench = Bench::with(config, None).await;
    let token = bench.root.token.clone().unwrap();
    let sends: Vec<Vec<u8>> = vec![
        Vec::new(),
        b"GET / HT".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        format!("GET / HTTP/1.1\r\nx: {}\r\n", "y".repeat(100_000)).into_bytes(),
        format!("GET / HTTP/1.1\r\n{}", "a: b\r\n".repeat(200)).into_bytes(),
        format!("POST /api/v1/devices HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{{").into_bytes(),
        format!("POST /api/v1/devices HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\ncontent-length: 99999999999\r\n\r\n").into_bytes(),
        // A chunked body that would never end.
        format!("POST /api/v1/devices HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\ntransfer-encoding: chunked\r\n\r\n{}", format!("ffff\r\n{}\r\n", "z".repeat(0xffff)).repeat(20)).into_bytes(),
    ];
    for (at, bytes) in sends.into_iter().enumerate() {
        let began = Instant::now();
        let stream = TcpStream::connect(bench.address).await.unwrap();
        let (mut reader, mut writer) = stream.into_split();
        let writing = tokio::spawn(async move {
            // The server may close before it has read all.
            let _closed = writer.write_all(&bytes).await;
            writer
        });
        bench.root.get("/api/v1/system").await.expect(200);
        let mut answer = Vec::new();
        let read =
            tokio::time::timeout(Duration::from_secs(5), reader.read_to_end(&mut answer)).await;
        assert!(read.is_ok(), "connection {at} was still open after {:?}", began.elapsed());
        let _writer = writing.await.unwrap();
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{at}: {answer}");
    }
}

/// Who sends too much is told so, though he is still sending.
#[tokio::test]
async fn requests_that_are_too_large_are_answered() {
    let bench = Bench::start().await;
    let ask = async |request: String| {
        let mut stream = TcpStream::connect(bench.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        tokio::time::timeout(Duration::from_secs(10), read).await.unwrap().unwrap();
        String::from_utf8(answer).unwrap()
    };
    let rest = "HTTP/1.1\r\nhost: x\r\nconnection: close\r\n";
    for (request, status) in [
        (format!("GET /healthz {rest}{}\r\n", "a: b\r\n".repeat(200)), 431),
        (format!("GET /healthz {rest}x: {}\r\n\r\n", "y".repeat(4 << 20)), 431),
        (format!("GET /healthz?{} {rest}\r\n", "y".repeat(10_000)), 414),
        ("\x16\x03\x01 hello\r\n\r\n".to_owned(), 400),
    ] {
        let answer = ask(request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{status}: {answer:.200}");
    }
    // Beyond the buffer it depends on how it comes in which of the two is said.
    let answer = ask(format!("GET /healthz?{} {rest}\r\n", "y".repeat(1 << 20))).await;
    assert!(answer.starts_with("HTTP/1.1 431 ") || answer.starts_with("HTTP/1.1 414 "));
    // A body that is too large as well: the answer is there before its end.
    let token = bench.root.token.as_deref().unwrap();
    let body = format!(
        "POST /api/v1/devices {rest}authorization: Bearer {token}\r\ncontent-length: {}\r\n\r\n{}",
        8 << 20,
        "z".repeat(8 << 20)
    );
    let answer = ask(body).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer:.200}");
}

fn certificate(dir: &Path, name: &str) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
    std::fs::write(dir.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    std::fs::write(dir.join("cert.pem"), made.cert.pem()).unwrap();
    made.cert.der().clone()
}

/// The status of `GET /healthz` over TLS, and whether by HTTP/2.
async fn over_tls(
    bench: &Bench,
    trusted: &CertificateDer<'static>,
    protocols: &[&str],
) -> Result<(u16, bool), String> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let stream = TcpStream::connect(bench.address).await.unwrap();
    let name = ServerName::try_from("fieldline.test").unwrap();
    let stream = connector.connect(name, stream).await.map_err(|error| error.to_string())?;
    let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    let request =
        Request::builder().uri("https://fieldline.test/healthz").header("host", "fieldline.test");
    let request = request.body(Empty::<bytes::Bytes>::new()).unwrap();
    let io = TokioIo::new(stream);
    let response = if http2 {
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
        tokio::spawn(connection);
        sender.send_request(request).await.unwrap()
    } else {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
        tokio::spawn(connection);
        sender.send_request(request).await.unwrap()
    };
    let status = response.status().as_u16();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "ok\n");
    Ok((status, http2))
}

#[tokio::test]
async fn https_offers_both_versions_and_follows_its_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let first = certificate(dir.path(), "fieldline.test");
    let bench = Bench::with(RestConfig::default(), Some(dir.path())).await;
    assert_eq!(over_tls(&bench, &first, &["h2", "http/1.1"]).await, Ok((200, true)));
    assert_eq!(over_tls(&bench, &first, &["http/1.1"]).await, Ok((200, false)));
    assert_eq!(over_tls(&bench, &first, &[]).await, Ok((200, false)));

    let second = certificate(dir.path(), "fieldline.test");
    eventually("the new certificate is used", async || {
        over_tls(&bench, &second, &["h2"]).await.is_ok()
    })
    .await;
    over_tls(&bench, &first, &["h2"]).await.unwrap_err();
    // Over TLS the cookie is for TLS only; here plain HTTP gets nothing at all.
    let mut plain = TcpStream::connect(bench.address).await.unwrap();
    plain.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    plain.read_to_end(&mut answer).await.unwrap();
    assert!(!answer.starts_with(b"HTTP"));
}

#[tokio::test]
async fn requests_in_hand_are_answered_at_shutdown() {
    let bench = Bench::start().await;
    let device = bench.root.device("a").await;
    let client = bench.root.clone();
    let waiting = tokio::spawn(async move {
        let path = format!("/api/v1/devices/{device}/commands?wait_ms=600");
        client.post(&path, json!({"name": "text"})).await.status
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    let drained = bench.stop().await;
    assert_eq!(waiting.await.unwrap(), 201);
    assert_eq!(drained.abandoned, 0);
}

/// Silent connections cannot keep others out.
#[tokio::test]
async fn at_the_limit_the_oldest_idle_connection_gives_way() {
    let config = RestConfig { connections_max: 4, ..RestConfig::default() };
    let bench = Bench::with(config, None).await;
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(TcpStream::connect(bench.address).await.unwrap());
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let reply = tokio::time::timeout(Duration::from_secs(5), bench.anyone().get("/healthz")).await;
    assert_eq!(reply.expect("it is let in").status, 200);
    let mut byte = [0];
    let ended = tokio::time::timeout(Duration::from_secs(5), silent[0].read(&mut byte)).await;
    assert!(matches!(ended.expect("the oldest has ended"), Ok(0) | Err(_)));
}
