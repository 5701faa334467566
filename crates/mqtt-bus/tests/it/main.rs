//! The bus over a real mosquitto, with faults.

#![allow(
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "tests panic by design, and say what they measured"
)]

mod connect;
mod faults;
mod load;
mod nodes;
mod partitions;
mod scripted;

use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::{
    Bus, BusItem, Lagged, Subscription, SystemClock, TopicFilter, conformance,
};
use fieldline_model::{
    AccountId, Cursor, DeviceId, ParamName, Params, Series, Stored, Timestamp, Value,
};
use fieldline_mqtt_bus::{MqttBus, MqttBusConfig};
use fieldline_testkit::servers::Mosquitto;

/// Shows what the bus says where `RUST_LOG` asks for it.
fn log() {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_test_writer()
        .try_init()
        .unwrap_or_default();
}

/// Settings with a short patience, so that tests are quick.
fn config(port: u16) -> MqttBusConfig {
    MqttBusConfig {
        url: format!("mqtt://127.0.0.1:{port}"),
        silence_max: Duration::from_secs(1),
        ..MqttBusConfig::default()
    }
}

async fn node(port: u16) -> MqttBus {
    log();
    MqttBus::connect(config(port), Arc::new(SystemClock)).await.unwrap()
}

fn account(n: u8) -> AccountId {
    AccountId::from_bytes([n; 16])
}

fn device(n: u8) -> DeviceId {
    DeviceId::from_bytes([n; 16])
}

/// One message of a device, with its number in the cursor.
fn message(account: AccountId, device: DeviceId, seq: u64) -> BusItem {
    let at = Timestamp::from_seconds(1_800_000_000);
    let params: Params = [
        ("position.latitude", Value::scaled(547_146_368, 7).unwrap()),
        ("position.speed", Value::Int(42)),
    ]
    .into_iter()
    .map(|(name, value)| (ParamName::new(name).unwrap(), value))
    .collect();
    let series = Series::messages(account, device);
    let message = Stored::read_back(series, at, at, params, Cursor { shard: 0, seq });
    BusItem::Messages { device, messages: vec![message].into() }
}

fn number(item: &BusItem) -> (DeviceId, u64) {
    match item {
        BusItem::Messages { device, messages } => (*device, messages[0].cursor().seq),
        other => panic!("expected messages, got {other:?}"),
    }
}

async fn next(subscription: &mut Box<dyn Subscription>) -> Result<BusItem, Lagged> {
    let next = tokio::time::timeout(Duration::from_secs(20), subscription.next()).await;
    next.expect("an item arrives").expect("the bus is open")
}

async fn next_number(subscription: &mut Box<dyn Subscription>) -> u64 {
    number(&next(subscription).await.expect("nothing is dropped")).1
}

async fn silent(subscription: &mut Box<dyn Subscription>, millis: u64) {
    let next = tokio::time::timeout(Duration::from_millis(millis), subscription.next()).await;
    assert!(next.is_err(), "unexpected: {next:?}");
}

async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "not so: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bus_over_mqtt_conforms() {
    let broker = Mosquitto::start();
    conformance::bus::run(Arc::new(node(broker.port()).await)).await;
}

/// What the suite asks of one process holds between two as well, but for what is published before the broker knows.
struct Apart {
    here: MqttBus,
    there: MqttBus,
}

#[async_trait::async_trait]
impl Bus for Apart {
    async fn publish(&self, account: AccountId, items: Vec<BusItem>) {
        self.here.publish(account, items).await;
    }

    async fn subscribe(&self, account: AccountId, filter: TopicFilter) -> Box<dyn Subscription> {
        // What was published before is there when a sign comes that was published after it.
        let (sign, seq) = (crate::account(250), rand::random());
        let mut signs = self.there.subscribe(sign, TopicFilter::default()).await;
        self.here.publish(sign, vec![message(sign, device(1), seq)]).await;
        while next_number(&mut signs).await != seq {}
        self.there.subscribe(account, filter).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_conform() {
    let broker = Mosquitto::start_with("max_queued_messages 100000");
    let (here, there) = (node(broker.port()).await, node(broker.port()).await);
    conformance::bus::run(Arc::new(Apart { here, there })).await;
}
