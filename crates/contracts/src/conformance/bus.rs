//! What every [`Bus`] must do. Checks make accounts of their own, so they may share one bus.
#![allow(
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a suite for tests: it panics by design"
)]

use std::sync::Arc;
use std::time::Duration;

use fieldline_model::{
    AccountId, Cursor, DeviceId, Event, EventId, EventKind, Params, Series, SeriesKind, Stored,
    Timestamp,
};

use crate::{
    Bus, BusItem, ClientMessage, ClientSessions, Lagged, Subscription, Topic, TopicFilter,
};

const START: Timestamp = Timestamp::from_seconds(1_800_000_000);

/// Longest that an item may take to arrive.
const ARRIVAL_MAX: Duration = Duration::from_secs(10);
/// How long nothing must come for it to count as nothing.
const SILENCE: Duration = Duration::from_millis(100);

/// Runs every check; panics at the first that fails.
pub async fn run(bus: Arc<dyn Bus>) {
    let ran = checks(&bus).await;
    assert!(ran >= 7, "only {ran} checks were run");
}

fn account() -> AccountId {
    AccountId::new(START, rand::random())
}

fn device() -> DeviceId {
    DeviceId::new(START, rand::random())
}

fn messages(account: AccountId, device: DeviceId, seq: u64) -> BusItem {
    let cursor = Cursor { shard: 0, seq };
    let series = Series::messages(account, device);
    let message = Stored::read_back(series, START, START, Params::new(), cursor);
    BusItem::Messages { device, messages: vec![message].into() }
}

fn event(account: AccountId, device: DeviceId) -> BusItem {
    BusItem::Event(Arc::new(Event {
        id: EventId::new(START, rand::random()),
        account,
        kind: EventKind::Online,
        object: device.0,
        timestamp: START,
        params: Params::new(),
    }))
}

fn log(device: DeviceId) -> BusItem {
    BusItem::Log { kind: SeriesKind::DeviceLog, object: device.0, lines: Vec::new().into() }
}

fn seq(item: &BusItem) -> u64 {
    match item {
        BusItem::Messages { messages, .. } => messages[0].cursor().seq,
        other => panic!("expected messages, got {other:?}"),
    }
}

async fn next(subscription: &mut Box<dyn Subscription>) -> Result<BusItem, Lagged> {
    let next = tokio::time::timeout(ARRIVAL_MAX, subscription.next()).await;
    next.expect("an item arrives").expect("the bus is open")
}

async fn silent(subscription: &mut Box<dyn Subscription>) {
    let next = tokio::time::timeout(SILENCE, subscription.next()).await;
    assert!(next.is_err(), "unexpected: {next:?}");
}

macro_rules! suite {
    ($($(#[doc = $doc:literal])+ async fn $name:ident($bus:ident) $body:block)+) => {
        $($(#[doc = $doc])+ async fn $name($bus: &Arc<dyn Bus>) $body)+

        /// Runs all, one after the other, and returns how many.
        async fn checks(bus: &Arc<dyn Bus>) -> usize {
            let mut ran = 0;
            $(
                tracing::info!(check = stringify!($name), "conformance of Bus");
                Box::pin($name(bus)).await;
                ran += 1;
            )+
            ran
        }
    };
}

suite! {
    /// Publishing where nobody listens is no error.
    async fn nobody_needs_to_listen(bus) {
        let account = account();
        bus.publish(account, vec![messages(account, device(), 1)]).await;
    }

    /// Items come in the order they were published in, to every subscriber.
    async fn items_come_in_order_to_all(bus) {
        let (account, device) = (account(), device());
        let mut one = bus.subscribe(account, TopicFilter::default()).await;
        let mut two = bus.subscribe(account, TopicFilter::default()).await;
        for first in [0, 10] {
            let items = (first..first + 10).map(|n| messages(account, device, n)).collect();
            bus.publish(account, items).await;
        }
        for subscription in [&mut one, &mut two] {
            for expected in 0..20 {
                assert_eq!(seq(&next(subscription).await.expect("no item is dropped")), expected);
            }
        }
    }

    /// A subscriber hears of its own account only.
    async fn accounts_are_apart(bus) {
        let (own, foreign, device) = (account(), account(), device());
        let mut subscription = bus.subscribe(own, TopicFilter::default()).await;
        let mut other = bus.subscribe(foreign, TopicFilter::default()).await;
        bus.publish(foreign, vec![messages(foreign, device, 1)]).await;
        bus.publish(own, vec![messages(own, device, 2)]).await;
        assert_eq!(seq(&next(&mut subscription).await.expect("no item is dropped")), 2);
        assert_eq!(seq(&next(&mut other).await.expect("no item is dropped")), 1);
        silent(&mut subscription).await;
        silent(&mut other).await;
    }

    /// Only the topics asked for come.
    async fn topics_are_chosen(bus) {
        let (account, device) = (account(), device());
        let filter = TopicFilter { topics: vec![Topic::Event, Topic::Log], objects: Vec::new() };
        let mut subscription = bus.subscribe(account, filter).await;
        let items = vec![messages(account, device, 1), event(account, device), log(device)];
        bus.publish(account, items).await;
        assert_eq!(next(&mut subscription).await.expect("no item is dropped").topic(), Topic::Event);
        assert_eq!(next(&mut subscription).await.expect("no item is dropped").topic(), Topic::Log);
        silent(&mut subscription).await;
    }

    /// Only the objects asked for come.
    async fn objects_are_chosen(bus) {
        let (account, one, other) = (account(), device(), device());
        let filter = TopicFilter { topics: Vec::new(), objects: vec![one.0] };
        let mut subscription = bus.subscribe(account, filter).await;
        bus.publish(account, vec![messages(account, other, 1), messages(account, one, 2), event(account, other)]).await;
        assert_eq!(seq(&next(&mut subscription).await.expect("no item is dropped")), 2);
        silent(&mut subscription).await;
    }

    /// A subscription begins now: what was published before does not come.
    async fn a_subscription_begins_now(bus) {
        let (account, device) = (account(), device());
        let _other = bus.subscribe(account, TopicFilter::default()).await;
        bus.publish(account, vec![messages(account, device, 1)]).await;
        let mut subscription = bus.subscribe(account, TopicFilter::default()).await;
        bus.publish(account, vec![messages(account, device, 2)]).await;
        assert_eq!(seq(&next(&mut subscription).await.expect("no item is dropped")), 2);
    }

    /// A subscriber that does not read loses items, is told how many, and goes on after them;
    /// neither the publisher nor another subscriber waits for it or loses any.
    async fn only_the_slow_lose(bus) {
        const COUNT: u64 = 100_000;
        let (account, device) = (account(), device());
        let mut slow = bus.subscribe(account, TopicFilter::default()).await;
        let mut fast = bus.subscribe(account, TopicFilter::default()).await;
        for first in (0..COUNT).step_by(100) {
            let items = (first..first + 100).map(|n| messages(account, device, n)).collect();
            bus.publish(account, items).await;
            for expected in first..first + 100 {
                assert_eq!(seq(&next(&mut fast).await.expect("the fast lose nothing")), expected);
            }
        }
        let (mut dropped, mut received) = (0, 0);
        while dropped + received < COUNT {
            match next(&mut slow).await {
                Ok(item) => {
                    assert_eq!(seq(&item), dropped + received, "a gap that was not told");
                    received += 1;
                }
                Err(Lagged(count)) => dropped += count,
            }
        }
        assert!(dropped > 0, "a queue without a bound");
    }

    /// What is between clients arrives as it was, in order, and apart from other topics.
    async fn messages_of_clients_arrive_as_they_were(bus) {
        let (account, device) = (account(), device());
        let filter = TopicFilter { topics: vec![Topic::Client], objects: Vec::new() };
        let mut subscription = bus.subscribe(account, filter).await;
        let message = |payload: &[u8], expires_at| ClientMessage {
            origin: u64::MAX,
            topic: "client/a/\u{e9}".into(),
            payload: payload.to_vec().into(),
            props: vec![0x26, 0, 1, b'a', 0, 1, b'b'].into(),
            at_least_once: expires_at != Some(START),
            retain: expires_at == Some(START),
            expires_at,
        };
        let sessions = ClientSessions { origin: 0, sessions: vec![("a".into(), 1), ("".into(), u64::MAX)] };
        // The last is as large as messages may be.
        let large = vec![7; crate::clients::CLIENT_MESSAGE_BYTES_MAX - 64];
        let all = [message(b"", None), message(&[0, 255], Some(START)), message(&large, None)];
        let client = |one: &ClientMessage| BusItem::Client(Arc::new(one.clone()));
        let mut items: Vec<BusItem> = all.iter().map(client).collect();
        items.insert(1, messages(account, device, 1));
        items.insert(2, BusItem::Sessions(Arc::new(sessions.clone())));
        bus.publish(account, items).await;
        let mut came = Vec::new();
        for _ in 0..4 {
            came.push(next(&mut subscription).await.expect("no item is dropped"));
        }
        let BusItem::Sessions(heard) = came.remove(1) else { panic!("expected sessions") };
        assert_eq!(*heard, sessions);
        for (one, expected) in came.iter().zip(&all) {
            let BusItem::Client(heard) = one else { panic!("expected a message of a client") };
            assert!(**heard == *expected, "another message came");
        }
        silent(&mut subscription).await;
    }

    /// A dropped subscription disturbs nobody.
    async fn leaving_disturbs_nobody(bus) {
        let (account, device) = (account(), device());
        let mut stays = bus.subscribe(account, TopicFilter::default()).await;
        drop(bus.subscribe(account, TopicFilter::default()).await);
        bus.publish(account, vec![messages(account, device, 1)]).await;
        assert_eq!(seq(&next(&mut stays).await.expect("no item is dropped")), 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_bus_in_memory_conforms() {
        run(Arc::new(crate::MemoryBus::new())).await;
    }
}
