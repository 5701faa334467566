//! Wrong settings end the start with one sentence that says what and how to mend it.

use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::History;
use fieldline_redis::{RedisConfig, RedisState};
use fieldline_testkit::history::ScriptedHistory;
use fieldline_testkit::servers::{Redis, free_port};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;

use crate::support::{config, run};

async fn refused(config: RedisConfig) -> String {
    let history: Arc<dyn History> = Arc::new(ScriptedHistory::new());
    let began = std::time::Instant::now();
    let connected = RedisState::connect(config, "a", history).await;
    assert!(began.elapsed() < Duration::from_secs(8), "it took {:?}", began.elapsed());
    let words = connected.err().expect("it does not connect").to_string();
    assert!(!words.contains('\n') && words.len() < 600, "{words}");
    assert!(!words.contains("hunter2"), "a password is told: {words}");
    words
}

#[tokio::test]
async fn a_wrong_password_is_said() {
    let redis = Redis::start_with(&["--requirepass", "secret"]);
    let port = redis.process.port();
    let words = refused(config(&redis.url())).await;
    assert!(words.contains("wants a password"), "{words}");
    let words = refused(config(&format!("redis://:hunter2@127.0.0.1:{port}"))).await;
    assert!(words.contains("refuses the user or password"), "{words}");
    let words = refused(config(&format!("redis://nobody:hunter2@127.0.0.1:{port}"))).await;
    assert!(words.contains("refuses the user or password"), "{words}");
    let history: Arc<dyn History> = Arc::new(ScriptedHistory::new());
    let right = config(&format!("redis://:secret@127.0.0.1:{port}"));
    assert!(RedisState::connect(right, "a", history).await.is_ok());
}

#[tokio::test]
async fn nobody_there_is_said() {
    let words = refused(config(&format!("redis://127.0.0.1:{}", free_port()))).await;
    assert!(words.contains("no Redis listens at 127.0.0.1:"), "{words}");
    let words = refused(config("redis://no-such-host.invalid")).await;
    assert!(words.contains("cannot be reached"), "{words}");
}

#[tokio::test]
async fn what_is_not_redis_is_said() {
    for answer in [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], b"\x16\x03\x01\x02\x00", b""] {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("redis://127.0.0.1:{}", listener.local_addr().unwrap().port());
        tokio::spawn(async move {
            let mut open = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                stream.write_all(answer).await.unwrap_or_default();
                open.push(stream);
            }
        });
        let words = refused(config(&url)).await;
        let says = words.contains("is not Redis") || words.contains("does not answer as Redis");
        assert!(says && words.contains("correct `redis.url`"), "{words}");
    }
}

#[tokio::test]
async fn a_server_that_is_not_fit_is_said() {
    let primary = Redis::start();
    let port = primary.process.port().to_string();
    let replica = Redis::start_with(&["--replicaof", "127.0.0.1", &port]);
    let words = refused(config(&replica.url())).await;
    assert!(words.contains("is a replica: let `redis.url` name the primary"), "{words}");
    run(&primary.url(), &["CONFIG", "SET", "maxmemory", "100mb"]).await;
    run(&primary.url(), &["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]).await;
    let words = refused(config(&primary.url())).await;
    assert!(words.contains("set it to noeviction"), "{words}");
    let cluster = Redis::start_with(&["--cluster-enabled", "yes"]);
    let words = refused(config(&cluster.url())).await;
    assert!(words.contains("Redis Cluster"), "{words}");
}

#[tokio::test]
async fn rights_that_are_missing_are_said() {
    let redis = Redis::start();
    let url = format!("redis://some:hunter2@127.0.0.1:{}", redis.process.port());
    run(&redis.url(), &["ACL", "SETUSER", "some", "on", ">hunter2", "~*", "+@read", "+hello"])
        .await;
    let words = refused(config(&url)).await;
    assert!(words.contains("allow its ACL"), "{words}");
}

/// Over TLS with a certificate that a private authority signed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_is_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let file = |name: &str, text: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let certificate = file("cert.pem", made.cert.pem());
    let key = file("key.pem", made.signing_key.serialize_pem());
    let port = free_port();
    let (port_text, certificate_text, key_text) =
        (port.to_string(), certificate.to_str().unwrap(), key.to_str().unwrap());
    let options = [
        ["--tls-port", &port_text],
        ["--tls-cert-file", certificate_text],
        ["--tls-key-file", key_text],
        ["--tls-auth-clients", "no"],
    ];
    let redis = Redis::start_with(&options.concat());
    let url = format!("rediss://localhost:{port}");
    let words = refused(config(&url)).await;
    assert!(words.contains("set `redis.tls_ca`"), "{words}");
    let trusted = |url: &str| RedisConfig { tls_ca: Some(certificate.clone()), ..config(url) };
    let words = refused(trusted(&format!("rediss://127.0.0.1:{port}"))).await;
    assert!(words.contains("certificate that is not trusted"), "{words}");
    let words = refused(trusted(&redis.url().replace("redis:", "rediss:"))).await;
    // It takes the greeting for a command that is not complete, and waits for the rest.
    assert!(words.contains("does not answer as Redis does"), "{words}");
    let missing = RedisConfig { tls_ca: Some("/nowhere/ca.pem".into()), ..config(&url) };
    let words = refused(missing).await;
    assert!(words.contains("`/nowhere/ca.pem`, which cannot be read"), "{words}");
    let words = refused(config(&format!("redis://127.0.0.1:{port}"))).await;
    assert!(words.contains("correct `redis.url`"), "{words}");
    let history = Arc::new(ScriptedHistory::new());
    let state = crate::support::node_with(trusted(&url), "a", &history).await;
    let (account, device) = (crate::support::account(), crate::support::device());
    crate::support::submit(&history, &*state, account, device, 1).await.unwrap();
    let found = fieldline_contracts::State::value(&*state, account, device, "n").await.unwrap();
    assert_eq!(found, Some(crate::support::last(1, 1)));
}

#[tokio::test]
async fn settings_are_all_looked_at() {
    let wrong = RedisConfig {
        url: "http://:hunter2@there".to_owned(),
        tls_ca: Some("ca.pem".into()),
        prefix: "a*b".to_owned(),
        deadline: Duration::ZERO,
        node_ttl: Duration::ZERO,
        waiting_bytes_max: 0,
    };
    assert_eq!(wrong.validate().unwrap_err().len(), 6);
    let words = refused(wrong).await;
    assert!(words.contains("write redis://HOST:PORT") && words.contains("prefix"), "{words}");
    let words = refused(config("rediss://there/#insecure")).await;
    assert!(words.contains("would trust any server"), "{words}");
}
