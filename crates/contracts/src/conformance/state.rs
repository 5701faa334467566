//! What every [`State`] must do. Checks make accounts of their own, so they may share one store.
#![allow(
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a suite for tests: it panics by design"
)]

use std::sync::Arc;

use fieldline_model::{
    AccountId, ConnectionId, Cursor, DeviceId, ParamName, Params, Series, Stored, Timestamp, Value,
};

use crate::{LastValue, State};

const START: Timestamp = Timestamp::from_seconds(1_800_000_000);

/// Runs every check; panics at the first that fails.
pub async fn run(state: Arc<dyn State>) {
    let ran = checks(&state).await;
    assert!(ran >= 10, "only {ran} checks were run");
}

fn account() -> AccountId {
    AccountId::new(START, rand::random())
}

fn device() -> DeviceId {
    DeviceId::new(START, rand::random())
}

fn name(text: &str) -> ParamName {
    ParamName::new(text).expect("a name")
}

fn at(seconds: i64) -> Timestamp {
    START.plus_micros(seconds * 1_000_000)
}

fn message<const N: usize>(series: Series, seconds: i64, values: [(&str, i64); N]) -> Stored {
    let params: Params = values.into_iter().map(|(n, v)| (name(n), Value::Int(v))).collect();
    Stored::read_back(series, at(seconds), at(seconds + 1), params, Cursor::default())
}

fn last(value: i64, seconds: i64) -> LastValue {
    LastValue { value: Value::Int(value), timestamp: at(seconds) }
}

macro_rules! suite {
    ($($(#[doc = $doc:literal])+ async fn $name:ident($state:ident) $body:block)+) => {
        $($(#[doc = $doc])+ async fn $name($state: &Arc<dyn State>) $body)+

        /// Runs all, one after the other, and returns how many.
        async fn checks(state: &Arc<dyn State>) -> usize {
            let mut ran = 0;
            $(
                tracing::info!(check = stringify!($name), "conformance of State");
                Box::pin($name(state)).await;
                ran += 1;
            )+
            ran
        }
    };
}

suite! {
    /// An unknown device has nothing.
    async fn an_unknown_device_has_nothing(state) {
        assert!(state.get(account(), device()).await.is_empty());
        assert_eq!(state.presence(account(), device()).await, crate::Presence::default());
    }

    /// Values of a message are there afterwards, and are told as changes.
    async fn values_are_taken_over(state) {
        let (account, device) = (account(), device());
        let series = Series::messages(account, device);
        let changes = state.apply(&[message(series, 1, [("a", 1), ("b", 2)])]).await;
        assert_eq!(changes.len(), 1);
        let (of, which, mut names) = changes[0].clone();
        names.sort();
        assert_eq!((of, which, names), (account, device, vec![name("a"), name("b")]));
        let values = state.get(account, device).await;
        assert_eq!((&values["a"], &values["b"]), (&last(1, 1), &last(2, 1)));
    }

    /// An older message changes nothing but what it alone knows.
    async fn values_never_go_back_in_time(state) {
        let (account, device) = (account(), device());
        let series = Series::messages(account, device);
        state.apply(&[message(series, 5, [("a", 5)])]).await;
        let changes = state.apply(&[message(series, 3, [("a", 3), ("b", 3)])]).await;
        assert_eq!(changes, vec![(account, device, vec![name("b")])]);
        let values = state.get(account, device).await;
        assert_eq!((&values["a"], &values["b"]), (&last(5, 5), &last(3, 3)));
        assert!(state.apply(&[message(series, 2, [("a", 2)])]).await.is_empty());
    }

    /// Of messages of one instant the later counts.
    async fn of_one_instant_the_later_counts(state) {
        let (account, device) = (account(), device());
        let series = Series::messages(account, device);
        state.apply(&[message(series, 5, [("a", 1)]), message(series, 5, [("a", 2)])]).await;
        assert_eq!(state.get(account, device).await["a"], last(2, 5));
    }

    /// Logs and events are passed over.
    async fn other_series_are_passed_over(state) {
        let (account, device) = (account(), device());
        let log = message(Series::device_log(account, device), 1, [("a", 1)]);
        assert!(state.apply(&[log]).await.is_empty());
        assert!(state.get(account, device).await.is_empty());
    }

    /// The same device under another account is another.
    async fn accounts_are_apart(state) {
        let (own, foreign, device) = (account(), account(), device());
        state.apply(&[message(Series::messages(own, device), 1, [("a", 1)])]).await;
        assert!(state.get(foreign, device).await.is_empty());
        assert!(state.get_many(foreign, &[device], &[]).await[0].1.is_empty());
        state.forget(foreign, device).await;
        assert_eq!(state.get(own, device).await.len(), 1);
    }

    /// Many are read at once, in the order asked for, all values or those named.
    async fn many_are_read_at_once(state) {
        let (account, a, b, c) = (account(), device(), device(), device());
        state.apply(&[
            message(Series::messages(account, a), 1, [("x", 1), ("y", 2)]),
            message(Series::messages(account, b), 1, [("x", 3)]),
        ]).await;
        let whole = state.get_many(account, &[b, c, a], &[]).await;
        assert_eq!(whole.iter().map(|(d, v)| (*d, v.len())).collect::<Vec<_>>(), [(b, 1), (c, 0), (a, 2)]);
        let some = state.get_many(account, &[a, b], &[name("y"), name("z")]).await;
        assert_eq!(some[0].1.len(), 1);
        assert_eq!(some[0].1["y"], last(2, 1));
        assert!(some[1].1.is_empty());
    }

    /// A value restored from history is there, and does not replace a newer one.
    async fn restored_values_count_by_their_time(state) {
        let (account, device) = (account(), device());
        state.restore(account, device, &name("a"), &Value::Int(1), at(1));
        assert_eq!(state.get(account, device).await["a"], last(1, 1));
        state.apply(&[message(Series::messages(account, device), 5, [("a", 5)])]).await;
        state.restore(account, device, &name("a"), &Value::Int(2), at(2));
        assert_eq!(state.get(account, device).await["a"], last(5, 5));
    }

    /// A connection makes a device present until it ends.
    async fn presence_follows_the_connection(state) {
        let (account, device) = (account(), device());
        let connection = ConnectionId::new(START, rand::random());
        state.connected(account, device, connection, "192.0.2.1:5".to_owned(), at(1)).await;
        let presence = state.presence(account, device).await;
        assert_eq!((presence.connection, presence.changed_at), (Some(connection), Some(at(1))));
        assert_eq!(presence.peer.as_deref(), Some("192.0.2.1:5"));
        assert!(state.disconnected(account, device, connection, at(2)).await);
        let presence = state.presence(account, device).await;
        assert_eq!((presence.connection, presence.changed_at), (None, Some(at(2))));
        assert_eq!(presence.peer.as_deref(), Some("192.0.2.1:5"), "the last address stays known");
        assert!(!state.disconnected(account, device, connection, at(3)).await, "it ended already");
    }

    /// The end of a connection that was replaced does not make the device absent.
    async fn the_newest_connection_wins(state) {
        let (account, device) = (account(), device());
        let (old, new) =
            (ConnectionId::new(START, rand::random()), ConnectionId::new(START, rand::random()));
        state.connected(account, device, old, "192.0.2.1:5".to_owned(), at(1)).await;
        state.connected(account, device, new, "192.0.2.2:6".to_owned(), at(2)).await;
        assert!(!state.disconnected(account, device, old, at(3)).await);
        let many = state.presence_many(account, &[device]).await;
        assert_eq!(many[0].1.connection, Some(new));
    }

    /// The time of the last message is when it was received.
    async fn seen_at_is_when_the_last_message_came(state) {
        let (account, device) = (account(), device());
        let series = Series::messages(account, device);
        state.apply(&[message(series, 5, [("a", 5)]), message(series, 3, [("a", 3)])]).await;
        assert_eq!(state.presence(account, device).await.seen_at, Some(at(6)));
    }

    /// A forgotten device is unknown.
    async fn a_forgotten_device_is_unknown(state) {
        let (account, device) = (account(), device());
        state.apply(&[message(Series::messages(account, device), 1, [("a", 1)])]).await;
        state.forget(account, device).await;
        assert!(state.get(account, device).await.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn state_in_memory_conforms() {
        run(Arc::new(crate::MemoryState::new())).await;
    }
}
