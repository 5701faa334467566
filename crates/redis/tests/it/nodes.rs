//! Several nodes on one server.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fieldline_contracts::State;
use fieldline_model::{ConnectionId, Cursor, Params, Series, Stored, Value};
use fieldline_testkit::history::ScriptedHistory;
use fieldline_testkit::servers::Redis;

use crate::support::{
    account, at, device, eventually, last, name, node, ready, run, stored, submit,
};

/// Whatever the order in which two nodes write, what is newer wins: by time, then by arrival.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_that_write_one_device_agree() {
    let redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let (a, b) = (node(&redis.url(), "a", &history).await, node(&redis.url(), "b", &history).await);
    let (account, device) = (account(), device());
    let series = Series::messages(account, device);
    // Of every instant there are several messages, and neither node has them in order.
    let message = |n: i64| {
        let params: Params =
            [(name("n"), Value::Int(n)), (name(&format!("p{}", n % 5)), Value::Int(n))]
                .into_iter()
                .collect();
        let cursor = Cursor { shard: 0, seq: n.unsigned_abs() };
        Stored::read_back(series, at(n / 10), at(n), params, cursor)
    };
    let all: Vec<i64> = (1..1_000).collect();
    let (odd, even): (Vec<i64>, Vec<i64>) = all.into_iter().partition(|n| n % 2 == 1);
    let write = |state: Arc<fieldline_redis::RedisState>, mut numbers: Vec<i64>, batch: usize| {
        for at in 0..numbers.len() {
            numbers.swap(at, rand::random_range(0..=at));
        }
        async move {
            for chunk in numbers.chunks(batch) {
                let messages: Vec<Stored> = chunk.iter().map(|n| message(*n)).collect();
                state.apply(&messages).await.unwrap();
            }
        }
    };
    tokio::join!(write(Arc::clone(&a), odd, 7), write(Arc::clone(&b), even, 3));
    for state in [&a, &b] {
        let values = state.get(account, device).await.unwrap();
        assert_eq!(values["n"], last(999, 99));
        for rest in 0..5 {
            assert_eq!(values[format!("p{rest}").as_str()], last(995 + rest, 99));
        }
        assert_eq!(state.presence(account, device).await.unwrap().seen_at, Some(at(999)));
    }
}

/// A node that dies takes its connections with it; one that ends in order too, and at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_nodes_connections_end() {
    let redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let (a, b) = (node(&redis.url(), "a", &history).await, node(&redis.url(), "b", &history).await);
    let (account, device) = (account(), device());
    let connection = ConnectionId::from_bytes([1; 16]);
    let peer = || "192.0.2.1:5".to_owned();
    assert!(a.connected(account, device, connection, 1, peer(), at(1)).await.unwrap());
    // What was stored and not applied when it died is mended as well.
    submit(&history, &*b, account, device, 1).await.unwrap();
    stored(&history, account, device, 2, &[("n", 2)]).await;
    assert_eq!(b.presence(account, device).await.unwrap().connection, Some(connection));
    drop(a);
    let began = Instant::now();
    eventually("the device is offline", || async {
        b.presence(account, device).await.is_ok_and(|presence| presence.connection.is_none())
    })
    .await;
    let took = began.elapsed();
    println!("a node died: its devices are offline after {took:?} (node_ttl is 1 s)");
    assert!(took < Duration::from_secs(4));
    let presence = b.presence(account, device).await.unwrap();
    assert_eq!((presence.peer, presence.node.as_deref()), (Some(peer()), Some("a")));
    eventually("what it had not told is read from history", || async {
        b.value(account, device, "n").await.unwrap() == Some(last(2, 2))
    })
    .await;
    println!("a node died: what it had not told is there after {:?}", began.elapsed());
    // The same node again: what its predecessor held does not come alive.
    let a = node(&redis.url(), "a", &history).await;
    assert_eq!(b.presence(account, device).await.unwrap().connection, None);
    assert!(a.connected(account, device, connection, 2, peer(), at(3)).await.unwrap());
    a.close().await;
    assert_eq!(b.presence(account, device).await.unwrap().connection, None);
    assert!(a.get(account, device).await.is_err());
}

/// Connections that came and went while the server was away are told when it is back, and an older
/// one of another node does not come in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_of_an_outage_are_told_later() {
    let redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let (a, b) = (node(&redis.url(), "a", &history).await, node(&redis.url(), "b", &history).await);
    let (account, came, went, moved) = (account(), device(), device(), device());
    let connection = |n: u8| ConnectionId::from_bytes([n; 16]);
    let peer = || "192.0.2.1:5".to_owned();
    assert!(a.connected(account, went, connection(1), 1, peer(), at(1)).await.unwrap());
    redis.process.pause();
    a.connected(account, came, connection(2), 2, peer(), at(2)).await.unwrap_err();
    a.disconnected(account, went, connection(1), 1, at(3)).await.unwrap_err();
    // It came to a, then to b: b says so first.
    a.connected(account, moved, connection(3), 3, peer(), at(4)).await.unwrap_err();
    b.connected(account, moved, connection(4), 4, peer(), at(2)).await.unwrap_err();
    redis.process.resume();
    ready(&a).await;
    ready(&b).await;
    let of = async |device| b.presence(account, device).await.unwrap().connection;
    assert_eq!(of(came).await, Some(connection(2)));
    assert_eq!(of(went).await, None);
    assert_eq!(of(moved).await, Some(connection(4)));
    assert!(!a.disconnected(account, moved, connection(3), 3, at(9)).await.unwrap());
    assert_eq!(of(moved).await, Some(connection(4)));
    // And again after all memory is lost.
    run(&redis.url(), &["FLUSHALL"]).await;
    eventually("presence is told again", || async { b.presence(account, came).await.is_ok() })
        .await;
    assert_eq!(of(came).await, Some(connection(2)));
    assert_eq!(of(moved).await, Some(connection(4)));
}

/// A node that slept beyond its time is alive again when it wakes, without having lost anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_alone_fills_and_the_others_see_it() {
    let redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let account = account();
    let devices: Vec<_> = (0..300).map(|_| device()).collect();
    for device in &devices {
        stored(&history, account, *device, 1, &[("a", 1), ("b", 2)]).await;
    }
    let url = redis.url();
    let names = ["a", "b", "c"];
    let nodes = names.map(|name| node(&url, name, &history));
    let [a, b, c] = nodes;
    let (a, b, c) = tokio::join!(a, b, c);
    for state in [&a, &b, &c] {
        let all = state.get_many(account, &devices, &[name("b")]).await.unwrap();
        assert!(all.iter().all(|(_, values)| values["b"] == last(2, 1) && values.len() == 1));
    }
}
