//! What every [`ClientStore`] must do. Checks make accounts and processes of their own, so they may share one store.
#![allow(
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    reason = "a suite for tests: it panics by design"
)]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fieldline_model::{AccountId, Timestamp};

use crate::client_store::{ClientStore, RetainLimits, RetainedMessage, WillChange, WillKey};

const NOW: Timestamp = Timestamp::from_seconds(1_800_000_000);
const ENOUGH: RetainLimits = RetainLimits { messages: 10_000, bytes: 8 << 20 };

/// Runs every check; panics at the first that fails.
pub async fn run(store: Arc<dyn ClientStore>) {
    retained_messages_come_back_as_they_were(&*store).await;
    the_last_of_a_topic_stays(&*store).await;
    accounts_are_apart(&*store).await;
    an_account_has_a_bound(&*store).await;
    what_expired_makes_room(&*store).await;
    writers_at_once_keep_the_bound(&store).await;
    wills_are_of_the_newest_session(&*store).await;
    doing_it_again_changes_nothing(&*store).await;
}

fn account() -> AccountId {
    AccountId::new(NOW, rand::random())
}

/// A process; small enough for every backend's numbers.
fn owner() -> u64 {
    rand::random::<u64>() >> 1
}

fn message(topic: &str, payload: &str) -> RetainedMessage {
    RetainedMessage {
        topic: topic.into(),
        payload: Bytes::copy_from_slice(payload.as_bytes()),
        props: Bytes::new(),
        at_least_once: false,
        expires_at: None,
    }
}

async fn retain(store: &dyn ClientStore, account: AccountId, all: &[RetainedMessage]) {
    let taken = store.retain(account, all.to_vec(), ENOUGH, NOW).await.unwrap();
    assert_eq!(taken, vec![true; all.len()]);
}

async fn all(store: &dyn ClientStore, account: AccountId) -> Vec<(String, String)> {
    let found = store.retained(account, "", None, 1_000).await.unwrap();
    let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
    found.iter().map(|one| (one.topic.to_string(), text(&one.payload))).collect()
}

fn pair(topic: &str, payload: &str) -> (String, String) {
    (topic.to_owned(), payload.to_owned())
}

async fn retained_messages_come_back_as_they_were(store: &dyn ClientStore) {
    let account = account();
    let strange = RetainedMessage {
        topic: "client/\u{e9}/\u{1f600} %_'\\".into(),
        payload: vec![0, 255, 1].into(),
        props: vec![38, 0, 1, b'a', 0, 0].into(),
        at_least_once: true,
        expires_at: Some(NOW.plus_micros(1)),
    };
    let large = RetainedMessage { payload: vec![7; 250_000].into(), ..message("client/large", "") };
    retain(store, account, &[strange.clone(), large.clone()]).await;
    let found = store.retained(account, "client/", None, 10).await.unwrap();
    assert!(found == [large, strange.clone()], "something else came back");
    assert_eq!(store.retained(account, &strange.topic, None, 10).await.unwrap(), [strange]);
    // By pages, in order of bytes.
    let account = self::account();
    let topics = ["client/B", "client/a", "client/a/b", "client/a0", "client/\u{e9}"];
    let put: Vec<_> = topics.iter().rev().map(|topic| message(topic, "x")).collect();
    retain(store, account, &put).await;
    let (mut after, mut found): (Option<Arc<str>>, Vec<Arc<str>>) = (None, Vec::new());
    loop {
        let page = store.retained(account, "client/", after.as_deref(), 2).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(Arc::clone(&last.topic));
        found.extend(page.iter().map(|one| Arc::clone(&one.topic)));
    }
    assert!(found.iter().map(|one| &**one).eq(topics));
    let below = store.retained(account, "client/a/", None, 10).await.unwrap();
    assert_eq!(below.iter().map(|one| &*one.topic).collect::<Vec<_>>(), ["client/a/b"]);
}

async fn the_last_of_a_topic_stays(store: &dyn ClientStore) {
    let account = account();
    let (a, b) = ("client/a", "client/b");
    retain(store, account, &[message(a, "1"), message(b, "1"), message(a, "2")]).await;
    assert_eq!(all(store, account).await, [pair(a, "2"), pair(b, "1")]);
    // Forgotten, and retained again, in one go.
    retain(store, account, &[message(a, ""), message(b, ""), message(b, "3")]).await;
    assert_eq!(all(store, account).await, [pair(b, "3")]);
    // What is not there can be forgotten too.
    retain(store, account, &[message("client/none", ""), message(b, "")]).await;
    assert_eq!(all(store, account).await, []);
}

async fn accounts_are_apart(store: &dyn ClientStore) {
    let (own, foreign) = (account(), account());
    retain(store, own, &[message("client/a", "own")]).await;
    retain(store, foreign, &[message("client/a", "foreign"), message("client/b", "x")]).await;
    retain(store, foreign, &[message("client/b", "")]).await;
    assert_eq!(all(store, own).await, [pair("client/a", "own")]);
    assert_eq!(all(store, foreign).await, [pair("client/a", "foreign")]);
}

async fn an_account_has_a_bound(store: &dyn ClientStore) {
    let account = account();
    let limits = RetainLimits { messages: 3, bytes: 1_000 };
    let put = |topic: &str, payload: String| {
        store.retain(account, vec![message(topic, &payload)], limits, NOW)
    };
    assert_eq!(put("client/1", "x".repeat(2_000)).await.unwrap(), [false]);
    let many: Vec<_> = (1..=5).map(|n| message(&format!("client/{n}"), "x")).collect();
    let taken = store.retain(account, many, limits, NOW).await.unwrap();
    assert_eq!(taken, [true, true, true, false, false]);
    assert_eq!(put("client/3", "y".repeat(900)).await.unwrap(), [true], "in the place of another");
    assert_eq!(put("client/2", "y".repeat(900)).await.unwrap(), [false]);
    assert_eq!(all(store, account).await[1], pair("client/2", "x"), "what stood there stays");
    assert_eq!(put("client/2", String::new()).await.unwrap(), [true]);
    assert_eq!(put("client/4", "x".to_owned()).await.unwrap(), [true]);
    assert_eq!(
        store.retain(self::account(), vec![message("client/1", "x")], limits, NOW).await.unwrap(),
        [true]
    );
}

async fn what_expired_makes_room(store: &dyn ClientStore) {
    let account = account();
    let limits = RetainLimits { messages: 1, bytes: 1_000 };
    let expiring =
        RetainedMessage { expires_at: Some(NOW.plus_micros(10)), ..message("client/a", "x") };
    assert_eq!(store.retain(account, vec![expiring], limits, NOW).await.unwrap(), [true]);
    let next = || vec![message("client/b", "x")];
    assert_eq!(store.retain(account, next(), limits, NOW.plus_micros(9)).await.unwrap(), [false]);
    assert_eq!(store.retain(account, next(), limits, NOW.plus_micros(10)).await.unwrap(), [true]);
    assert_eq!(all(store, account).await, [pair("client/b", "x")]);
}

async fn writers_at_once_keep_the_bound(store: &Arc<dyn ClientStore>) {
    let account = account();
    let limits = RetainLimits { messages: 10, bytes: 1 << 20 };
    let mut writing = tokio::task::JoinSet::new();
    for writer in 0..4 {
        let store = Arc::clone(store);
        writing.spawn(async move {
            let mut taken = 0;
            for n in 0..10 {
                let own = message(&format!("client/{writer}/{n}"), "x");
                let shared = message("client/shared", &writer.to_string());
                let done = store.retain(account, vec![own, shared], limits, NOW).await.unwrap();
                taken += usize::from(done[0]);
            }
            taken
        });
    }
    let taken: usize = writing.join_all().await.into_iter().sum();
    assert_eq!(taken, 9, "one is for the topic that all write");
    assert_eq!(all(&**store, account).await.len(), 10);
}

fn begin(account: AccountId, client: &str, number: u64, will: Option<&str>) -> WillChange {
    WillChange::Begin { key: key(account, client, number), will: will.map(str::to_owned) }
}

fn end(account: AccountId, client: &str, number: u64) -> WillChange {
    WillChange::End { key: key(account, client, number) }
}

fn key(account: AccountId, client: &str, number: u64) -> WillKey {
    WillKey { account, client_id: client.into(), number }
}

async fn left(store: &dyn ClientStore, owner: u64) -> Vec<(String, String)> {
    let mut left: Vec<_> = store.wills(owner, 100).await.unwrap();
    left.sort_by(|a, b| a.0.client_id.cmp(&b.0.client_id));
    left.into_iter().map(|(key, will)| (key.client_id.to_string(), will)).collect()
}

async fn wills_are_of_the_newest_session(store: &dyn ClientStore) {
    let (account, foreign, one, two) = (account(), account(), owner(), owner());
    let changes = [
        begin(account, "a", 10, Some("a of one")),
        begin(account, "b", 11, Some("b of one")),
        begin(foreign, "a", 12, Some("a of another account")),
        begin(account, "c", 13, Some("c of one")),
        end(account, "c", 13),
    ];
    store.keep_wills(one, &changes).await.unwrap();
    assert_eq!(store.wills(one, 2).await.unwrap().len(), 2);
    // Elsewhere: one with a will, one without, and an older that is late.
    let changes = [
        begin(account, "a", 20, Some("a of two")),
        begin(account, "b", 21, None),
        begin(foreign, "a", 5, Some("late")),
    ];
    store.keep_wills(two, &changes).await.unwrap();
    // The end of what was superseded takes nothing away.
    store.keep_wills(one, &[end(account, "a", 10), end(account, "a", 20)]).await.unwrap();
    assert_eq!(left(store, one).await, [pair("a", "a of another account")]);
    assert_eq!(left(store, two).await, [pair("a", "a of two")]);
    store.forget_owner(two).await.unwrap();
    assert_eq!(left(store, two).await, []);
    assert_eq!(left(store, one).await.len(), 1);
    store.forget_owner(one).await.unwrap();
}

async fn doing_it_again_changes_nothing(store: &dyn ClientStore) {
    let (account, one) = (account(), owner());
    let changes = [
        begin(account, "a", 1, Some("x")),
        begin(account, "b", 2, Some("y")),
        end(account, "b", 2),
    ];
    for _ in 0..2 {
        store.keep_wills(one, &changes).await.unwrap();
        assert_eq!(left(store, one).await, [pair("a", "x")]);
    }
    store.forget_owner(one).await.unwrap();
}

/// For backends that several processes share: who falls silent is adopted, by one at a time.
pub async fn the_silent_are_adopted(store: Arc<dyn ClientStore>) {
    let (account, dead, one, two) = (account(), owner(), owner(), owner());
    for owner in [dead, one, two] {
        assert!(!store.beat(owner).await.unwrap());
        assert!(store.beat(owner).await.unwrap());
    }
    store.keep_wills(dead, &[begin(account, "a", 1, Some("x"))]).await.unwrap();
    assert_eq!(store.adopt(one, Duration::from_secs(60)).await.unwrap(), None);
    let silence = Duration::from_millis(1_500);
    let mut adopted = Vec::new();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while adopted.is_empty() {
        assert!(tokio::time::Instant::now() < deadline, "nobody adopts the silent");
        tokio::time::sleep(Duration::from_millis(50)).await;
        for owner in [one, two] {
            store.beat(owner).await.unwrap();
        }
        let (a, b) = tokio::join!(store.adopt(one, silence), store.adopt(two, silence));
        adopted.extend([a.unwrap(), b.unwrap()].into_iter().flatten());
    }
    assert_eq!(adopted, [dead], "one at a time adopts it");
    assert_eq!(left(&*store, dead).await, [pair("a", "x")]);
    store.forget_owner(dead).await.unwrap();
    assert!(!store.beat(dead).await.unwrap(), "it learns that it was taken for dead");
    for owner in [dead, one, two] {
        store.forget_owner(owner).await.unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client_store::MemoryClientStore;

    #[tokio::test]
    async fn the_store_in_memory_conforms() {
        let store = Arc::new(MemoryClientStore::new());
        run(store.clone()).await;
        the_silent_are_adopted(store).await;
    }
}
