//! Nodes, devices and messages for the tests.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fieldline_contracts::{History, LastValue, State, StateError};
use fieldline_model::{
    Accepted, AccountId, DeviceId, ParamName, Params, Series, Stored, Timestamp, Value,
};
use fieldline_redis::{RedisConfig, RedisState};
use fieldline_testkit::history::ScriptedHistory;

pub(crate) const START: Timestamp = Timestamp::from_seconds(1_800_000_000);
/// Longest that recovery may take: the machine is shared.
pub(crate) const RECOVERY: Duration = Duration::from_secs(30);

pub(crate) fn config(url: &str) -> RedisConfig {
    RedisConfig { url: url.to_owned(), node_ttl: Duration::from_secs(1), ..RedisConfig::default() }
}

pub(crate) async fn node(url: &str, name: &str, history: &Arc<ScriptedHistory>) -> Arc<RedisState> {
    node_with(config(url), name, history).await
}

pub(crate) async fn node_with(
    config: RedisConfig,
    name: &str,
    history: &Arc<ScriptedHistory>,
) -> Arc<RedisState> {
    let history: Arc<dyn History> = Arc::clone(history) as _;
    let state = RedisState::connect(config, name, history).await.unwrap();
    ready(&state).await;
    Arc::new(state)
}

/// Waits until the node can tell everything; returns how long that took.
pub(crate) async fn ready(state: &RedisState) -> Duration {
    let began = Instant::now();
    assert!(state.ready(RECOVERY).await, "{:?}", state.problems());
    began.elapsed()
}

pub(crate) fn account() -> AccountId {
    AccountId::new(START, rand::random())
}

pub(crate) fn device() -> DeviceId {
    DeviceId::new(START, rand::random())
}

pub(crate) fn name(text: &str) -> ParamName {
    ParamName::new(text).unwrap()
}

pub(crate) fn at(seconds: i64) -> Timestamp {
    START.plus_micros(seconds * 1_000_000)
}

pub(crate) fn last(value: i64, seconds: i64) -> LastValue {
    LastValue { value: Value::Int(value), timestamp: at(seconds) }
}

/// Stores one message as the pipeline does; its last values are still to be applied.
pub(crate) async fn stored(
    history: &ScriptedHistory,
    account: AccountId,
    device: DeviceId,
    seconds: i64,
    values: &[(&str, i64)],
) -> Stored {
    let params: Params = values.iter().map(|(n, v)| (name(n), Value::Int(*v))).collect();
    let accepted = Accepted::own(Series::messages(account, device), at(seconds), params);
    let receipts = history.append(vec![accepted.clone()]).await.unwrap();
    accepted.stored(receipts[0])
}

/// Stores and applies `n` at the second `n`.
pub(crate) async fn submit(
    history: &ScriptedHistory,
    state: &dyn State,
    account: AccountId,
    device: DeviceId,
    n: i64,
) -> Result<(), StateError> {
    let message = stored(history, account, device, n, &[("n", n)]).await;
    state.apply(&[message]).await.map(|_| ())
}

/// A connection without anything between.
pub(crate) async fn raw(url: &str) -> redis::aio::MultiplexedConnection {
    redis::Client::open(url).unwrap().get_multiplexed_async_connection().await.unwrap()
}

pub(crate) async fn run(url: &str, command: &[&str]) -> redis::Value {
    let (first, rest) = command.split_first().unwrap();
    let mut cmd = redis::cmd(first);
    rest.iter().for_each(|arg| _ = cmd.arg(*arg));
    cmd.query_async(&mut raw(url).await).await.unwrap()
}

/// Waits until `holds` does.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < RECOVERY, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
