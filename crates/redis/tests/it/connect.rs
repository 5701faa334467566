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
    assert!(!words.contains('\n') && words.len() < 400, "{words}");
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

#[tokio::test]
async fn settings_are_all_looked_at() {
    let wrong = RedisConfig {
        url: "http://:hunter2@there".to_owned(),
        prefix: "a*b".to_owned(),
        deadline: Duration::ZERO,
        node_ttl: Duration::ZERO,
        waiting_bytes_max: 0,
    };
    assert_eq!(wrong.validate().unwrap_err().len(), 5);
    let words = refused(wrong).await;
    assert!(words.contains("write redis://HOST:PORT") && words.contains("prefix"), "{words}");
    let words = refused(config("rediss://there/#insecure")).await;
    assert!(words.contains("would trust any server"), "{words}");
}
