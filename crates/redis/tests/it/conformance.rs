//! The suite that every `State` passes, and what is this one's own.

use std::sync::Arc;

use fieldline_contracts::conformance::state as suite;
use fieldline_contracts::{State, StateError};
use fieldline_model::{Cursor, Params, Series, Stored, Value};
use fieldline_redis::RedisConfig;
use fieldline_testkit::history::ScriptedHistory;
use fieldline_testkit::servers::Redis;

use crate::support::{account, at, config, device, last, name, node, node_with, run, stored};

#[tokio::test]
async fn state_in_redis_conforms() {
    let redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    suite::run(node(&redis.url(), "a", &history).await).await;
}

/// Two installations on one server know nothing of each other.
#[tokio::test]
async fn prefixes_are_apart() {
    let redis = Redis::start();
    let (one, two) = (Arc::new(ScriptedHistory::new()), Arc::new(ScriptedHistory::new()));
    let of = |prefix: &str| RedisConfig { prefix: prefix.to_owned(), ..config(&redis.url()) };
    let first = node_with(of("one"), "a", &one).await;
    let second = node_with(of("two"), "a", &two).await;
    let (account, device) = (account(), device());
    first.apply(&[stored(&one, account, device, 1, &[("n", 1)]).await]).await.unwrap();
    first.status_set(account, "m", 1, "n", &Value::Int(1)).await.unwrap();
    assert!(second.get(account, device).await.unwrap().is_empty());
    assert!(second.status_get(account, "m").await.unwrap().values.is_empty());
    // Nor does one that fills itself anew take anything from the other.
    run(&redis.url(), &["DEL", "two:marker"]).await;
    crate::support::eventually("two is filled again", || async {
        second.get(account, device).await.is_ok()
    })
    .await;
    assert_eq!(first.value(account, device, "n").await.unwrap(), Some(last(1, 1)));
}

/// Names and keys are only what they say, whatever characters they have.
#[tokio::test]
async fn names_cannot_reach_elsewhere() {
    let redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let state = node(&redis.url(), "a", &history).await;
    let (account, device) = (account(), device());
    state.apply(&[stored(&history, account, device, 1, &[("n", 1)]).await]).await.unwrap();
    for own in ["\0g", "\0b", "\0s", ""] {
        assert_eq!(state.value(account, device, own).await.unwrap(), None, "{own:?}");
    }
    for key in ["*", "a:s:m", "[a-z]", "k"] {
        assert!(state.status_set(account, key, 1, "n", &Value::Int(1)).await.unwrap());
        assert_eq!(state.status_get(account, key).await.unwrap().values.len(), 1, "{key}");
    }
    for key in ["\0e", ""] {
        let refused = state.status_set(account, key, 1, "n", &Value::Int(1)).await;
        assert!(matches!(refused, Err(StateError::Refused(_))), "{refused:?}");
        let refused = state.status_set(account, "m", 1, key, &Value::Int(1)).await;
        assert!(matches!(refused, Err(StateError::Refused(_))), "{refused:?}");
    }
}

/// A batch of a whole black box: more names and messages than one call of a script takes.
#[tokio::test]
async fn a_large_batch_is_applied_whole() {
    let redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let state = node(&redis.url(), "a", &history).await;
    let (account, device) = (account(), device());
    let message = |n: i64| {
        let pair = |at: i64| (name(&format!("p{at}")), Value::Int(n));
        let params: Params = (0..1_000).map(|k| pair((n * 7 + k) % 1_700)).collect();
        let seq = u64::try_from(n).unwrap();
        let cursor = Cursor { shard: 0, seq };
        Stored::read_back(Series::messages(account, device), at(n), at(n), params, cursor)
    };
    let batch: Vec<Stored> = (1..=50).map(message).collect();
    let changes = state.apply(&batch).await.unwrap();
    let all = state.get(account, device).await.unwrap();
    assert_eq!((changes.len(), changes[0].2.len()), (1, all.len()));
    for (name, value) in &all {
        let newest = batch.iter().rev().find(|m| m.params().get(name.as_str()).is_some()).unwrap();
        assert_eq!(value.timestamp, newest.timestamp(), "{name}");
    }
    assert!(all.len() > 1_000, "{}", all.len());
    // The same again, from the last to the first: nothing moves.
    for message in batch.iter().rev() {
        state.apply(std::slice::from_ref(message)).await.unwrap();
    }
    assert_eq!(state.get(account, device).await.unwrap(), all);
}
