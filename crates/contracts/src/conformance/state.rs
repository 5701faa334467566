//! What every [`State`] must do. Checks make accounts of their own, so they may share one store.
#![allow(
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    reason = "a suite for tests: it panics by design"
)]

use std::sync::Arc;
use std::time::Duration;

use fieldline_model::{
    AccountId, ConnectionId, Cursor, DeviceId, ParamName, Params, Series, Stored, Timestamp, Value,
};

use crate::status::{STATUS_BYTES_MAX, STATUS_NAME_BYTES_MAX};
use crate::{LastValue, State, StateError, Status, StatusChange, StatusFilter, StatusWatch};

const START: Timestamp = Timestamp::from_seconds(1_800_000_000);

/// Runs every check; panics at the first that fails.
pub async fn run(state: Arc<dyn State>) {
    let ran = checks(&state).await;
    assert!(ran >= 20, "only {ran} checks were run");
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

fn connection() -> ConnectionId {
    ConnectionId::new(START, rand::random())
}

async fn connect(
    state: &Arc<dyn State>,
    account: AccountId,
    device: DeviceId,
    connection: ConnectionId,
    epoch: u64,
) -> bool {
    let peer = "192.0.2.1:5".to_owned();
    state.connected(account, device, connection, epoch, peer, at(1)).await.unwrap()
}

async fn disconnect(
    state: &Arc<dyn State>,
    account: AccountId,
    device: DeviceId,
    connection: ConnectionId,
    epoch: u64,
    seconds: i64,
) -> bool {
    state.disconnected(account, device, connection, epoch, at(seconds)).await.unwrap()
}

/// Waits until a watcher is told that the value `n` of `key` is this, or that it is gone. Returns
/// the keys that it was told of.
async fn until(watch: &mut dyn StatusWatch, key: &str, wanted: Option<i64>) -> Vec<String> {
    let mut told = Vec::new();
    let wait = async {
        while let Some(change) = watch.next().await {
            let (of, value) = match change {
                StatusChange::Set { key, value, .. } => (key, Some(value.value)),
                StatusChange::Gone { key } => (key, None),
                StatusChange::Resynced => continue,
            };
            told.push(of.to_string());
            if *of == *key && value == wanted.map(Value::Int) {
                return;
            }
        }
        panic!("the watch ended");
    };
    let in_time = tokio::time::timeout(Duration::from_secs(10), wait).await;
    assert!(in_time.is_ok(), "never told that {key} is {wanted:?}, only of {told:?}");
    told
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
        assert!(state.get(account(), device()).await.unwrap().is_empty());
        assert_eq!(state.presence(account(), device()).await.unwrap(), crate::Presence::default());
    }

    /// Values of a message are there afterwards, and are told as changes.
    async fn values_are_taken_over(state) {
        let (account, device) = (account(), device());
        let series = Series::messages(account, device);
        let changes = state.apply(&[message(series, 1, [("a", 1), ("b", 2)])]).await.unwrap();
        assert_eq!(changes.len(), 1);
        let (of, which, mut names) = changes[0].clone();
        names.sort();
        assert_eq!((of, which, names), (account, device, vec![name("a"), name("b")]));
        let values = state.get(account, device).await.unwrap();
        assert_eq!((&values["a"], &values["b"]), (&last(1, 1), &last(2, 1)));
    }

    /// An older message changes nothing but what it alone knows.
    async fn values_never_go_back_in_time(state) {
        let (account, device) = (account(), device());
        let series = Series::messages(account, device);
        state.apply(&[message(series, 5, [("a", 5)])]).await.unwrap();
        let changes = state.apply(&[message(series, 3, [("a", 3), ("b", 3)])]).await.unwrap();
        assert_eq!(changes, vec![(account, device, vec![name("b")])]);
        let values = state.get(account, device).await.unwrap();
        assert_eq!((&values["a"], &values["b"]), (&last(5, 5), &last(3, 3)));
        assert!(state.apply(&[message(series, 2, [("a", 2)])]).await.unwrap().is_empty());
    }

    /// Of messages of one instant the later counts.
    async fn of_one_instant_the_later_counts(state) {
        let (account, device) = (account(), device());
        let series = Series::messages(account, device);
        state.apply(&[message(series, 5, [("a", 1)]), message(series, 5, [("a", 2)])]).await.unwrap();
        assert_eq!(state.get(account, device).await.unwrap()["a"], last(2, 5));
    }

    /// Tickets grow, above whatever is asked for, also where many ask at once.
    async fn tickets_grow(state) {
        let floor = 1_800_000_000_000_000;
        let first = state.ticket(floor).await.unwrap();
        assert!(first > floor);
        let second = state.ticket(0).await.unwrap();
        assert!(second > first);
        assert!(state.ticket(second + 10).await.unwrap() > second + 10);
        let mut asking = tokio::task::JoinSet::new();
        for _ in 0..50 {
            let state = Arc::clone(state);
            asking.spawn(async move { state.ticket(0).await.unwrap() });
        }
        let mut given = asking.join_all().await;
        given.sort_unstable();
        given.dedup();
        assert_eq!(given.len(), 50, "a number was given twice");
        assert!(given[0] > second + 11);
    }

    /// Logs and events are passed over.
    async fn other_series_are_passed_over(state) {
        let (account, device) = (account(), device());
        let log = message(Series::device_log(account, device), 1, [("a", 1)]);
        assert!(state.apply(&[log]).await.unwrap().is_empty());
        assert!(state.get(account, device).await.unwrap().is_empty());
    }

    /// The same device under another account is another.
    async fn accounts_are_apart(state) {
        let (own, foreign, device) = (account(), account(), device());
        state.apply(&[message(Series::messages(own, device), 1, [("a", 1)])]).await.unwrap();
        assert!(state.get(foreign, device).await.unwrap().is_empty());
        assert!(state.get_many(foreign, &[device], &[]).await.unwrap()[0].1.is_empty());
        state.forget(foreign, device).await.unwrap();
        assert_eq!(state.get(own, device).await.unwrap().len(), 1);
    }

    /// Many are read at once, in the order asked for, all values or those named.
    async fn many_are_read_at_once(state) {
        let (account, a, b, c) = (account(), device(), device(), device());
        state.apply(&[
            message(Series::messages(account, a), 1, [("x", 1), ("y", 2)]),
            message(Series::messages(account, b), 1, [("x", 3)]),
        ]).await.unwrap();
        let whole = state.get_many(account, &[b, c, a], &[]).await.unwrap();
        assert_eq!(whole.iter().map(|(d, v)| (*d, v.len())).collect::<Vec<_>>(), [(b, 1), (c, 0), (a, 2)]);
        let some = state.get_many(account, &[a, b], &[name("y"), name("z")]).await.unwrap();
        assert_eq!(some[0].1.len(), 1);
        assert_eq!(some[0].1["y"], last(2, 1));
        assert!(some[1].1.is_empty());
    }

    /// Every kind of value comes back as it was.
    async fn values_come_back_exactly(state) {
        let (account, device) = (account(), device());
        let json = serde_json::json!({ "z": [1, null, 1.5], "a": "\u{0}\u{1f600}" });
        let values = [
            ("bool", Value::Bool(true)),
            ("int", Value::Int(i64::MIN)),
            ("uint", Value::from(u64::MAX)),
            ("decimal", Value::scaled(-1_250, 2).unwrap()),
            ("float", Value::float(-0.0).unwrap()),
            ("text", Value::from("\u{0}\r\n\u{1f600}")),
            ("bytes", Value::from(&[0_u8, 255, 13, 10][..])),
            ("json", Value::Json(Arc::new(json))),
            ("0 * [?] %", Value::from("")),
        ];
        let params: Params = values.iter().map(|(n, v)| (name(n), v.clone())).collect();
        let series = Series::messages(account, device);
        let stored = Stored::read_back(series, at(1), at(2), params, Cursor::default());
        state.apply(&[stored]).await.unwrap();
        let read = state.get(account, device).await.unwrap();
        for (name, value) in values {
            let (mut wrote, mut came) = (String::new(), String::new());
            value.write_json(&mut wrote);
            read[name].value.write_json(&mut came);
            assert_eq!((came, &read[name].value), (wrote, &value));
            let one = state.value(account, device, name).await.unwrap();
            assert_eq!(one.as_ref(), Some(&read[name]));
        }
        assert_eq!(state.value(account, device, "none").await.unwrap(), None);
    }

    /// A device cannot fill the memory with names or contents; what does not fit is absent, not old.
    async fn a_device_has_a_bound(state) {
        let (account, device) = (account(), device());
        let series = Series::messages(account, device);
        let put = |seconds, name: ParamName, value: Value| {
            let params: Params = [(name, value)].into_iter().collect();
            Stored::read_back(series, at(seconds), at(seconds), params, Cursor::default())
        };
        let large = Value::from("x".repeat(60 << 10));
        for n in 0..10 {
            state.apply(&[put(1, name(&format!("p{n}")), large.clone())]).await.unwrap();
        }
        let mut names: Vec<_> = state.get(account, device).await.unwrap().into_keys().collect();
        names.sort();
        assert_eq!(names, ["p0", "p1", "p2", "p3"].map(name));
        let larger = Value::from("x".repeat(200 << 10));
        assert!(state.apply(&[put(2, name("p0"), larger)]).await.unwrap().is_empty());
        assert_eq!(state.value(account, device, "p0").await.unwrap(), None);
        state.apply(&[put(3, name("p0"), Value::Int(1))]).await.unwrap();
        assert_eq!(state.value(account, device, "p0").await.unwrap(), Some(last(1, 3)));
        let many = crate::state::PARAMS_MAX + 10;
        let params: Params = (0..many).map(|n| (name(&format!("q{n}")), Value::Int(1))).collect();
        let stored = Stored::read_back(series, at(4), at(4), params, Cursor::default());
        state.apply(&[stored]).await.unwrap();
        let count = state.get(account, device).await.unwrap().len();
        assert!(count <= crate::state::PARAMS_MAX && count > 1_000, "{count}");
    }

    /// A connection makes a device present until it ends.
    async fn presence_follows_the_connection(state) {
        let (account, device) = (account(), device());
        let connection = ConnectionId::new(START, rand::random());
        assert!(connect(state, account, device, connection, 1).await);
        let presence = state.presence(account, device).await.unwrap();
        assert_eq!((presence.connection, presence.changed_at), (Some(connection), Some(at(1))));
        assert_eq!(presence.peer.as_deref(), Some("192.0.2.1:5"));
        assert!(disconnect(state, account, device, connection, 1, 2).await);
        let presence = state.presence(account, device).await.unwrap();
        assert_eq!((presence.connection, presence.changed_at), (None, Some(at(2))));
        assert_eq!(presence.peer.as_deref(), Some("192.0.2.1:5"), "the last address stays known");
        assert!(!disconnect(state, account, device, connection, 1, 3).await, "it ended already");
    }

    /// The end of a connection that was replaced does not make the device absent.
    async fn the_newest_connection_wins(state) {
        let (account, device, old, new) = (account(), device(), connection(), connection());
        assert!(connect(state, account, device, old, 1).await);
        assert!(connect(state, account, device, new, 2).await);
        assert!(!disconnect(state, account, device, old, 1, 3).await);
        let many = state.presence_many(account, &[device]).await.unwrap();
        assert_eq!(many[0].1.connection, Some(new));
        assert!(disconnect(state, account, device, new, 2, 4).await);
    }

    /// Epochs decide which connection is newer, not the order in which nodes tell of them.
    async fn an_older_connection_never_replaces_a_newer_one(state) {
        let (account, device, old, new) = (account(), device(), connection(), connection());
        assert!(connect(state, account, device, new, 8).await);
        assert!(!connect(state, account, device, old, 7).await);
        assert_eq!(state.presence(account, device).await.unwrap().connection, Some(new));
        assert!(connect(state, account, device, new, 8).await, "saying it again is harmless");
        assert!(!connect(state, account, device, old, 8).await, "an epoch is of one connection");
        assert!(disconnect(state, account, device, new, 8, 9).await);
        for (late, epoch) in [(old, 7), (new, 8)] {
            assert!(!connect(state, account, device, late, epoch).await, "it was over by then");
        }
        assert_eq!(state.presence(account, device).await.unwrap().connection, None);
    }

    /// An end that is heard of before its beginning stands.
    async fn an_end_may_come_before_its_beginning(state) {
        let (account, device, old, new) = (account(), device(), connection(), connection());
        assert!(connect(state, account, device, old, 1).await);
        assert!(disconnect(state, account, device, new, 2, 5).await);
        assert!(!connect(state, account, device, new, 2).await);
        assert_eq!(state.presence(account, device).await.unwrap().connection, None);
    }

    /// Connections are of an account, as everything is.
    async fn presence_of_another_account_is_apart(state) {
        let (own, foreign, device) = (account(), account(), device());
        let (here, there) = (connection(), connection());
        assert!(connect(state, own, device, here, 5).await);
        assert_eq!(state.presence(foreign, device).await.unwrap(), crate::Presence::default());
        assert!(connect(state, foreign, device, there, 1).await);
        assert!(disconnect(state, foreign, device, there, 1, 2).await);
        assert_eq!(state.presence(own, device).await.unwrap().connection, Some(here));
    }

    /// The time of the last message is when it was received.
    async fn seen_at_is_when_the_last_message_came(state) {
        let (account, device) = (account(), device());
        let series = Series::messages(account, device);
        state.apply(&[message(series, 5, [("a", 5)]), message(series, 3, [("a", 3)])]).await.unwrap();
        assert_eq!(state.presence(account, device).await.unwrap().seen_at, Some(at(6)));
    }

    /// A forgotten device is unknown.
    async fn a_forgotten_device_is_unknown(state) {
        let (account, device) = (account(), device());
        state.apply(&[message(Series::messages(account, device), 1, [("a", 1)])]).await.unwrap();
        state.forget(account, device).await.unwrap();
        assert!(state.get(account, device).await.unwrap().is_empty());
    }

    /// A status is what its owner set last; saying it again is no change.
    async fn a_status_is_what_was_set(state) {
        let account = account();
        assert_eq!(state.status_get(account, "m").await.unwrap(), Status::default());
        assert!(state.status_set(account, "m", 3, "power", &Value::Bool(true)).await.unwrap());
        assert!(!state.status_set(account, "m", 3, "power", &Value::Bool(true)).await.unwrap());
        assert!(state.status_set(account, "m", 3, "input", &Value::from("hdmi")).await.unwrap());
        let status = state.status_get(account, "m").await.unwrap();
        assert_eq!((status.epoch, status.values.len()), (3, 2));
        assert_eq!(status.values["power"].value, Value::Bool(true));
        let before = status.values["power"].version;
        assert!(state.status_set(account, "m", 3, "power", &Value::Bool(false)).await.unwrap());
        assert!(state.status_get(account, "m").await.unwrap().values["power"].version > before);
        let foreign = state.status_get(self::account(), "m").await.unwrap();
        assert_eq!(foreign, Status::default());
        state.status_clear(account, "m", 3).await.unwrap();
        assert!(state.status_get(account, "m").await.unwrap().values.is_empty());
    }

    /// Who owned a module once changes nothing of it.
    async fn an_older_epoch_is_refused(state) {
        let account = account();
        let set = async |epoch, n| state.status_set(account, "m", epoch, "n", &Value::Int(n)).await;
        assert!(set(5, 1).await.unwrap());
        assert!(set(6, 2).await.unwrap());
        let refused = set(5, 3).await.unwrap_err();
        assert!(
            matches!(&refused, StateError::Superseded { given: 5, present: 6, .. }),
            "{refused}"
        );
        let cleared = state.status_clear(account, "m", 5).await;
        assert!(matches!(cleared, Err(StateError::Superseded { .. })), "{cleared:?}");
        let status = state.status_get(account, "m").await.unwrap();
        assert_eq!((status.epoch, &status.values["n"].value), (6, &Value::Int(2)));
        // Nor after its successor has ended it.
        state.status_clear(account, "m", 6).await.unwrap();
        assert!(matches!(set(5, 3).await, Err(StateError::Superseded { .. })));
        assert!(set(7, 4).await.unwrap());
    }

    /// A status has limits, and says so.
    async fn a_status_has_limits(state) {
        let account = account();
        let set = async |key: String, name: &str, value: Value| {
            state.status_set(account, &key, 1, name, &value).await
        };
        for key in [String::new(), "x".repeat(STATUS_NAME_BYTES_MAX + 1), "a\nb".to_owned()] {
            let refused = set(key, "n", Value::Int(1)).await;
            assert!(matches!(refused, Err(StateError::Refused(_))), "{refused:?}");
        }
        let refused = set("m".to_owned(), "", Value::Int(1)).await;
        assert!(matches!(refused, Err(StateError::Refused(_))), "{refused:?}");
        let large = Value::from("x".repeat(STATUS_BYTES_MAX / 2));
        assert!(set("m".to_owned(), "a", large.clone()).await.unwrap());
        let refused = set("m".to_owned(), "b", large).await;
        assert!(matches!(refused, Err(StateError::Refused(_))), "{refused:?}");
        assert!(set("m".to_owned(), "a", Value::Int(1)).await.unwrap());
    }

    /// A watcher is told what is there, then what changes, and always ends on the newest.
    async fn a_watcher_ends_on_the_newest(state) {
        let account = account();
        let set = async |key: &str, n: i64| {
            state.status_set(account, key, 1, "n", &Value::Int(n)).await.unwrap();
        };
        set("a", 1).await;
        let mut all = state.status_watch(account, StatusFilter::default()).await.unwrap();
        let only = StatusFilter { keys: ["b".to_owned()].into() };
        let mut some = state.status_watch(account, only).await.unwrap();
        assert_eq!(until(&mut *all, "a", Some(1)).await, ["a"]);
        for n in 2..50 {
            set("a", n).await;
            set("b", n).await;
        }
        until(&mut *all, "b", Some(49)).await;
        assert!(until(&mut *some, "b", Some(49)).await.iter().all(|key| key == "b"));
        state.status_clear(account, "b", 1).await.unwrap();
        until(&mut *all, "b", None).await;
        until(&mut *some, "b", None).await;
        set("b", 1).await;
        until(&mut *some, "b", Some(1)).await;
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
