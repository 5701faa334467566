//! Module status: who may write it, and that no watcher misses the newest.

use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::{State, StateError, StatusChange, StatusFilter, StatusWatch};
use fieldline_model::Value;
use fieldline_testkit::history::ScriptedHistory;
use fieldline_testkit::servers::{Cut, Flow, Redis};

use crate::support::{RECOVERY, account, eventually, node, ready, run};

/// Waits until the watcher was told this value of `m/n`; returns whether it was told of a resync.
async fn until(watch: &mut dyn StatusWatch, wanted: i64) -> bool {
    let mut resynced = false;
    let wait = async {
        loop {
            match watch.next().await.expect("the watch goes on") {
                StatusChange::Resynced => resynced = true,
                StatusChange::Set { name, value, .. }
                    if &*name == "n" && value.value == Value::Int(wanted) =>
                {
                    return;
                }
                _ => {}
            }
        }
    };
    tokio::time::timeout(RECOVERY, wait).await.expect("told in time");
    resynced
}

/// Nothing more comes that differs from what was told last.
async fn quiet(watch: &mut dyn StatusWatch, last: i64) {
    while let Ok(change) = tokio::time::timeout(Duration::from_millis(300), watch.next()).await {
        if let Some(StatusChange::Set { name, value, .. }) = change {
            assert!(&*name != "n" || value.value == Value::Int(last), "{value:?} after {last}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_former_owner_changes_nothing() {
    let redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let (a, b) = (node(&redis.url(), "a", &history).await, node(&redis.url(), "b", &history).await);
    let account = account();
    a.status_set(account, "m", 10, "n", &Value::Int(1)).await.unwrap();
    // An owner that paused, while another took over.
    b.status_set(account, "m", 11, "n", &Value::Int(2)).await.unwrap();
    let refused = a.status_set(account, "m", 10, "n", &Value::Int(3)).await.unwrap_err();
    assert!(matches!(&refused, StateError::Superseded { given: 10, present: 11, .. }), "{refused}");
    let cleared = a.status_clear(account, "m", 10).await;
    assert!(matches!(cleared, Err(StateError::Superseded { .. })), "{cleared:?}");
    assert_eq!(b.status_get(account, "m").await.unwrap().values["n"].value, Value::Int(2));
    // Nor after the memory was lost, whichever of them speaks first.
    run(&redis.url(), &["FLUSHALL"]).await;
    eventually("status is told again", || async { b.status_get(account, "m").await.is_ok() }).await;
    let status = b.status_get(account, "m").await.unwrap();
    assert_eq!((status.epoch, &status.values["n"].value), (11, &Value::Int(2)));
}

/// The server is killed and comes back empty: owners say again what they said, and watchers hear.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_lives_through_a_server_that_lost_its_memory() {
    let mut redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let (a, b) = (node(&redis.url(), "a", &history).await, node(&redis.url(), "b", &history).await);
    let account = account();
    a.status_set(account, "m", 1, "n", &Value::Int(1)).await.unwrap();
    a.status_set(account, "m", 1, "other", &Value::Bool(true)).await.unwrap();
    let mut watch = b.status_watch(account, StatusFilter::default()).await.unwrap();
    until(&mut *watch, 1).await;
    quiet(&mut *watch, 1).await;
    for round in 0..2_i64 {
        let before = round * 10;
        a.status_set(account, "m", 1, "n", &Value::Int(before + 2)).await.unwrap();
        until(&mut *watch, before + 2).await;
        redis.process.kill();
        let lost = a.status_set(account, "m", 1, "n", &Value::Int(-1)).await;
        assert!(matches!(lost, Err(StateError::Unavailable(_))), "{lost:?}");
        redis.restart_empty();
        // The owner goes on as soon as it can, before anybody has settled.
        let n = Value::Int(before + 3);
        eventually("it can be set again", || async {
            a.status_set(account, "m", 1, "n", &n).await.is_ok()
        })
        .await;
        until(&mut *watch, before + 3).await;
        ready(&b).await;
        let status = b.status_get(account, "m").await.unwrap();
        assert_eq!((&status.values["n"].value, status.values.len()), (&n, 2));
        quiet(&mut *watch, before + 3).await;
    }
}

/// The watcher's own connection is cut while values change: it ends on the newest all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_that_was_cut_off_ends_on_the_newest() {
    let redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let cut = Cut::before(redis.process.port()).await;
    let a = node(&redis.url(), "a", &history).await;
    let b = node(&format!("redis://127.0.0.1:{}", cut.port()), "b", &history).await;
    let account = account();
    a.status_set(account, "m", 1, "n", &Value::Int(0)).await.unwrap();
    a.status_set(account, "gone", 1, "n", &Value::Int(-5)).await.unwrap();
    let mut watch = b.status_watch(account, StatusFilter::default()).await.unwrap();
    until(&mut *watch, 0).await;
    for (round, flow) in [Flow::Refused, Flow::ToClientHeld, Flow::Held].into_iter().enumerate() {
        let n = i64::try_from(round).unwrap() * 100;
        cut.set(flow);
        for k in 1..=50 {
            a.status_set(account, "m", 1, "n", &Value::Int(n + k)).await.unwrap();
        }
        a.status_clear(account, "gone", 1).await.unwrap();
        // Longer than it takes to notice.
        tokio::time::sleep(Duration::from_millis(2_500)).await;
        cut.set(Flow::Open);
        let resynced = until(&mut *watch, n + 50).await;
        println!("{flow:?}: ended on the newest, told of a resync: {resynced}");
        ready(&b).await;
        quiet(&mut *watch, n + 50).await;
        assert_eq!(b.status_get(account, "m").await.unwrap().values["n"].value, Value::Int(n + 50));
    }
}

/// FLUSHALL keeps the subscription: values that are said again are told, and nothing old stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_lives_through_a_flush() {
    let redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let (a, b) = (node(&redis.url(), "a", &history).await, node(&redis.url(), "b", &history).await);
    let account = account();
    a.status_set(account, "m", 1, "n", &Value::Int(1)).await.unwrap();
    let mut watch = b.status_watch(account, StatusFilter::default()).await.unwrap();
    until(&mut *watch, 1).await;
    run(&redis.url(), &["FLUSHALL"]).await;
    a.status_set(account, "m", 1, "n", &Value::Int(2)).await.unwrap();
    until(&mut *watch, 2).await;
    quiet(&mut *watch, 2).await;
    // Noticed by the first who asks, or at the next look.
    eventually("status is told again", || async { b.status_get(account, "m").await.is_ok() }).await;
    quiet(&mut *watch, 2).await;
    let status = b.status_get(account, "m").await.unwrap();
    assert_eq!(status.values["n"].value, Value::Int(2));
}
