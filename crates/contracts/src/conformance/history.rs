//! What every [`History`] must do. Run [`run`] against a backend, and [`survives_reopening`] if it
//! keeps anything beyond its process.
//!
//! Checks make accounts and devices of their own, so they may share one store, even one in use.
#![allow(
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    clippy::cast_possible_wrap,
    reason = "a suite for tests: it panics by design"
)]

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use fieldline_model::{
    Accepted, AccountId, Cursor, Decimal, DeviceId, ParamName, Params, Receipt, Series, Stored,
    Timestamp, Value,
};

use crate::history::BATCH_MAX;
use crate::{History, HistoryError, Order, Query, Retention};

/// 2027-01-15T08:00:00Z.
const START: Timestamp = Timestamp::from_seconds(1_800_000_000);

/// Runs every check; panics at the first that fails.
pub async fn run(history: Arc<dyn History>) {
    let ran = checks(&history).await;
    assert!(ran >= 26, "only {ran} checks were run");
}

/// What was appended is there, once and in its order, after the store was closed and opened again;
/// duplicates are still known and cursors go on counting from where they were.
pub async fn survives_reopening<F, R>(open: F)
where
    F: Fn() -> R,
    R: Future<Output = Arc<dyn History>>,
{
    let history = open().await;
    let device = device();
    let batch: Vec<Accepted> = (0..500).map(|n| at(device, n % 250, n)).collect();
    let receipts = append(&history, batch.clone()).await;
    let before = all(&history, device).await;
    let highest = receipts.iter().map(|r| r.cursor.seq).max().unwrap_or(0);
    history.close().await.expect("closes");
    let closed = history.read(&Query::newest(device, 1)).await;
    assert!(matches!(closed, Err(HistoryError::Closed)), "a closed store answers {closed:?}");
    drop(history);

    let history = open().await;
    assert_eq!(all(&history, device).await, before, "another content after reopening");
    let again = append(&history, batch).await;
    assert!(again.iter().all(|r| r.duplicate), "duplicates are forgotten by reopening");
    let next = append(&history, vec![at(device, 9_000, 9_000)]).await;
    assert!(next[0].cursor.seq > highest, "cursors are not used again");
    assert_eq!(all(&history, device).await.len(), before.len() + 1);
    let values = last_values(&history, device).await;
    assert_eq!(values["n"], (Value::Int(9_000), START.plus_micros(9_000_000_000)));
    history.close().await.expect("closes");
}

/// Fresh ids: tests may run at once against one store.
fn device() -> Series {
    let now = Timestamp::from_seconds(1_790_000_000);
    Series::messages(AccountId::new(now, rand::random()), DeviceId::new(now, rand::random()))
}

fn name(text: &str) -> ParamName {
    ParamName::new(text).expect("a name")
}

fn params<const N: usize>(values: [(&str, Value); N]) -> Params {
    values.into_iter().map(|(n, v)| (name(n), v)).collect()
}

/// Message `n` of a series, `seconds` after the start.
fn at(series: Series, seconds: i64, n: i64) -> Accepted {
    let params = params([("n", Value::Int(n))]);
    Accepted::own(series, START.plus_micros(seconds * 1_000_000), params)
}

async fn append(history: &Arc<dyn History>, batch: Vec<Accepted>) -> Vec<Receipt> {
    let count = batch.len();
    let receipts = history.append(batch).await.expect("appends");
    assert_eq!(receipts.len(), count, "one receipt a message");
    receipts
}

async fn read(history: &Arc<dyn History>, query: &Query) -> Vec<Stored> {
    history.read(query).await.expect("reads")
}

async fn all(history: &Arc<dyn History>, series: Series) -> Vec<Stored> {
    read(history, &Query::oldest(series, Query::LIMIT_MAX)).await
}

fn numbers(messages: &[Stored]) -> Vec<i64> {
    messages.iter().filter_map(|m| m.params().get("n")?.as_i64()).collect()
}

/// Where each shard ends now.
async fn ends(history: &Arc<dyn History>) -> Vec<Cursor> {
    let mut ends = Vec::new();
    for shard in 0..history.shards() {
        let mut cursor = Cursor { shard, seq: 0 };
        loop {
            let page = history.tail(cursor, Query::LIMIT_MAX).await.expect("tails");
            let Some(last) = page.last() else { break };
            cursor = last.cursor();
        }
        ends.push(cursor);
    }
    ends
}

/// All that one shard holds after `cursor`, read in pages.
async fn tail(history: &Arc<dyn History>, mut cursor: Cursor, page: usize) -> Vec<Stored> {
    let mut messages = Vec::new();
    loop {
        let more = history.tail(cursor, page).await.expect("tails");
        assert!(more.len() <= page, "a page is larger than asked for");
        for message in &more {
            assert_eq!(message.cursor().shard, cursor.shard, "a message of another shard");
            assert!(message.cursor().seq > cursor.seq, "cursors do not rise");
            cursor = message.cursor();
        }
        // A shorter page is no end.
        if more.is_empty() {
            return messages;
        }
        messages.extend(more);
    }
}

async fn last_values(
    history: &Arc<dyn History>,
    series: Series,
) -> BTreeMap<String, (Value, Timestamp)> {
    let mut values = BTreeMap::new();
    let mut visit = |of: Series, name: &ParamName, value: &Value, at: Timestamp| {
        if of == series {
            let before = values.insert(name.as_str().to_owned(), (value.clone(), at));
            assert!(before.is_none(), "{name} was visited twice");
        }
    };
    history.last_values(&mut visit).await.expect("visits last values");
    values
}

macro_rules! suite {
    ($($(#[doc = $doc:literal])+ async fn $name:ident($history:ident) $body:block)+) => {
        $($(#[doc = $doc])+ async fn $name($history: &Arc<dyn History>) $body)+

        /// Runs all, one after the other, and returns how many.
        async fn checks(history: &Arc<dyn History>) -> usize {
            let mut ran = 0;
            $(
                tracing::info!(check = stringify!($name), "conformance of History");
                Box::pin($name(history)).await;
                ran += 1;
            )+
            ran
        }
    };
}

suite! {
    /// What was appended is read back to the last detail.
    async fn reads_back_what_was_appended(history) {
        let series = device();
        let text = "šventė 🚚";
        let tree = serde_json::json!({"a": [1, -2.5, null, {"b": true}], "c": 0.1, "d": u64::MAX});
        let decimal = |m, s| Value::Decimal(Decimal::new(m, s).expect("a decimal"));
        let values = params([
            ("bool", Value::Bool(true)),
            ("int", Value::Int(i64::MIN)),
            ("uint", Value::Uint(u64::MAX)),
            ("float", Value::Float(0.1 + 0.2)),
            ("zero", Value::Float(-0.0)),
            ("text", Value::from(text)),
            ("empty", Value::from("")),
            ("bytes", Value::from(&[0_u8, 255, 7][..])),
            ("json", Value::Json(Arc::new(tree))),
            ("latitude", decimal(547_146_368, 7)),
            ("scaled", decimal(1_500, 3)),
            ("tiny", decimal(i64::MIN, 18)),
            ("a.name with spaces: Батарея", Value::Int(0)),
        ]);
        let message = Accepted::own(series, START, values.clone());
        let receipts = append(history, vec![message.clone()]).await;
        assert!(!receipts[0].duplicate);
        let read = all(history, series).await;
        assert_eq!(read, vec![message.stored(receipts[0])]);
        assert_eq!(read[0].params().iter().map(|(n, _)| n).collect::<Vec<_>>(),
            values.iter().map(|(n, _)| n).collect::<Vec<_>>(), "parameters keep their order");
        let Some(Value::Decimal(scaled)) = read[0].params().get("scaled") else {
            panic!("a decimal became {:?}", read[0].params().get("scaled"))
        };
        assert_eq!((scaled.mantissa(), scaled.scale()), (1_500, 3), "a decimal keeps its decimals");
    }

    /// Appending nothing is no error.
    async fn an_empty_batch_is_taken(history) {
        assert!(append(history, Vec::new()).await.is_empty());
    }

    /// A batch beyond the limit is refused, one at the limit is not.
    async fn batches_are_limited(history) {
        let series = device();
        let largest: Vec<Accepted> = (0..BATCH_MAX).map(|n| at(series, n as i64, n as i64)).collect();
        append(history, largest.clone()).await;
        let beyond: Vec<Accepted> = (0..=BATCH_MAX).map(|n| at(series, n as i64, -1)).collect();
        assert!(history.append(beyond).await.is_err());
        assert_eq!(all(history, series).await.len(), BATCH_MAX, "a refused batch left something");
    }

    /// A message without parameters is a message.
    async fn empty_messages_are_kept(history) {
        let series = device();
        append(history, vec![Accepted::own(series, START, Params::new())]).await;
        assert_eq!(all(history, series).await.len(), 1);
    }

    /// The received time is kept beside the device's own.
    async fn the_received_time_is_kept(history) {
        let series = device();
        let decoded = fieldline_model::Decoded {
            timestamp: Some(START),
            params: params([("n", Value::Int(1))]),
        };
        let received = START.plus_micros(1_234_567);
        let schema = fieldline_model::Schema::default();
        let message = Accepted::validate(decoded, series, received, &schema).expect("is accepted");
        append(history, vec![message]).await;
        let read = all(history, series).await;
        assert_eq!((read[0].timestamp(), read[0].received()), (START, received));
    }

    /// Order is by timestamp whatever the order of arrival, both ways.
    async fn reads_go_both_ways(history) {
        let series = device();
        for n in [5, 1, 4, 2, 3] {
            append(history, vec![at(series, n, n)]).await;
        }
        assert_eq!(numbers(&all(history, series).await), [1, 2, 3, 4, 5]);
        assert_eq!(numbers(&read(history, &Query::newest(series, 10)).await), [5, 4, 3, 2, 1]);
        assert_eq!(numbers(&read(history, &Query::newest(series, 2)).await), [5, 4]);
        assert_eq!(numbers(&read(history, &Query::oldest(series, 2)).await), [1, 2]);
        assert!(read(history, &Query::oldest(series, 0)).await.is_empty());
    }

    /// Messages of one instant are read in their order of arrival.
    async fn one_instant_keeps_the_order_of_arrival(history) {
        let series = device();
        append(history, (0..50).map(|n| at(series, 7, n)).collect()).await;
        append(history, (50..100).map(|n| at(series, 7, n)).collect()).await;
        assert_eq!(numbers(&all(history, series).await), (0..100).collect::<Vec<_>>());
        let newest = read(history, &Query::newest(series, 3)).await;
        assert_eq!(numbers(&newest), [99, 98, 97]);
    }

    /// A range takes its start and leaves its end.
    async fn ranges_are_half_open(history) {
        let series = device();
        append(history, (0..10).map(|n| at(series, n, n)).collect()).await;
        let range = |from: i64, to: i64, order| Query {
            from: START.plus_micros(from * 1_000_000),
            to: START.plus_micros(to * 1_000_000),
            order,
            ..Query::oldest(series, 100)
        };
        assert_eq!(numbers(&read(history, &range(2, 5, Order::Ascending)).await), [2, 3, 4]);
        assert_eq!(numbers(&read(history, &range(2, 5, Order::Descending)).await), [4, 3, 2]);
        assert!(read(history, &range(5, 5, Order::Ascending)).await.is_empty());
        assert!(read(history, &range(5, 2, Order::Descending)).await.is_empty());
    }

    /// Pages join to the whole, in both orders, also within one instant and with limits of any size.
    async fn pages_join_without_gap_or_overlap(history) {
        let series = device();
        // Three messages an instant, arriving out of order.
        let batch = (0..120).map(|n| at(series, (n * 7) % 40, n)).collect();
        append(history, batch).await;
        for order in [Order::Ascending, Order::Descending] {
            let whole = read(history, &Query { order, ..Query::oldest(series, 1_000) }).await;
            assert_eq!(whole.len(), 120);
            for limit in [1, 7, 40, 119, 120] {
                let mut pages: Vec<Stored> = Vec::new();
                loop {
                    let after = pages.last().map(|m| (m.timestamp(), m.cursor()));
                    let query = Query { order, after, limit, ..Query::oldest(series, limit) };
                    let page = read(history, &query).await;
                    assert!(page.len() <= limit);
                    if page.is_empty() {
                        break;
                    }
                    pages.extend(page);
                }
                assert_eq!(pages, whole, "{order:?} in pages of {limit}");
            }
        }
    }

    /// Where a page ended counts within the range only.
    async fn a_page_end_outside_the_range_changes_nothing(history) {
        let series = device();
        append(history, (0..10).map(|n| at(series, n, n)).collect()).await;
        let whole = all(history, series).await;
        let (first, last) = (&whole[0], &whole[9]);
        let query = |order, after: &Stored| Query {
            from: START.plus_micros(3_000_000),
            to: START.plus_micros(6_000_000),
            order,
            after: Some((after.timestamp(), after.cursor())),
            ..Query::oldest(series, 100)
        };
        assert_eq!(numbers(&read(history, &query(Order::Ascending, first)).await), [3, 4, 5]);
        assert_eq!(numbers(&read(history, &query(Order::Descending, last)).await), [5, 4, 3]);
        assert!(read(history, &query(Order::Ascending, last)).await.is_empty());
        assert!(read(history, &query(Order::Descending, first)).await.is_empty());
    }

    /// An answer has a largest size whatever is asked for.
    async fn answers_are_capped(history) {
        let series = device();
        for part in 0..3 {
            let numbers = part * 5_000..(part + 1) * 5_000;
            append(history, numbers.map(|n| at(series, n, n)).collect()).await;
        }
        let read = read(history, &Query::oldest(series, usize::MAX)).await;
        assert_eq!(read.len(), Query::LIMIT_MAX);
    }

    /// Pages of large messages end early, have one at least, and join to the whole.
    async fn pages_are_bounded_in_bytes(history) {
        let before = ends(history).await;
        let series = device();
        for part in 0..6 {
            let text = |n: i64| "fieldline ".repeat(50_000 + usize::try_from(n).expect("small") * 40);
            let large = |n: i64| {
                let params = params([("n", Value::Int(n)), ("text", Value::from(text(n)))]);
                Accepted::own(series, START.plus_micros(n * 1_000_000), params)
            };
            append(history, (part * 10..part * 10 + 10).map(large).collect()).await;
        }
        let bounded = |page: &[Stored]| {
            let bytes: usize = page.iter().map(|m| m.params().content_bytes()).sum();
            assert!(page.len() <= 1 || bytes <= Query::BYTES_MAX, "{bytes} bytes in {}", page.len());
        };
        for order in [Order::Ascending, Order::Descending] {
            let mut seen: Vec<i64> = Vec::new();
            let mut after = None;
            loop {
                let page = read(history, &Query { order, after, ..Query::oldest(series, 10_000) }).await;
                let Some(last) = page.last() else { break };
                after = Some((last.timestamp(), last.cursor()));
                bounded(&page);
                seen.extend(numbers(&page));
            }
            if order == Order::Descending {
                seen.reverse();
            }
            assert_eq!(seen, (0..60).collect::<Vec<_>>(), "{order:?}");
        }
        let mut seen = Vec::new();
        for mut cursor in before {
            loop {
                let page = history.tail(cursor, 10_000).await.expect("tails");
                let Some(last) = page.last() else { break };
                cursor = last.cursor();
                bounded(&page);
                let own: Vec<Stored> = page.into_iter().filter(|m| m.series() == series).collect();
                seen.extend(numbers(&own));
            }
        }
        assert_eq!(seen, (0..60).collect::<Vec<_>>());
    }

    /// A message that is sent again is stored once, and the receipt says so.
    async fn duplicates_are_stored_once(history) {
        let series = device();
        let first = append(history, vec![at(series, 1, 1), at(series, 2, 2)]).await;
        let again = append(history, vec![at(series, 1, 1), at(series, 2, 2), at(series, 3, 3)]).await;
        assert_eq!(again.iter().map(|r| r.duplicate).collect::<Vec<_>>(), [true, true, false]);
        for (first, again) in first.iter().zip(&again) {
            assert!(again.cursor == first.cursor || again.cursor.seq == 0, "a duplicate's place is the first's or 0");
        }
        assert_eq!(numbers(&all(history, series).await), [1, 2, 3]);
    }

    /// A duplicate within one batch is one, too.
    async fn duplicates_within_a_batch_are_stored_once(history) {
        let series = device();
        let batch = vec![at(series, 5, 5), at(series, 1, 1), at(series, 5, 5), at(series, 1, 1)];
        let receipts = append(history, batch).await;
        assert_eq!(receipts.iter().map(|r| r.duplicate).collect::<Vec<_>>(), [false, false, true, true]);
        assert_eq!(numbers(&all(history, series).await), [1, 5]);
    }

    /// Equality is of content: the order of parameters and the scale of decimals do not matter.
    async fn duplicates_are_recognised_by_value(history) {
        let series = device();
        let decimal = |text: &str| Value::Decimal(Decimal::parse(text).expect("a decimal"));
        let a = params([("x", decimal("1.50")), ("y", Value::Int(2))]);
        let b = params([("y", Value::Int(2)), ("x", decimal("1.5"))]);
        append(history, vec![Accepted::own(series, START, a)]).await;
        let receipts = append(history, vec![Accepted::own(series, START, b)]).await;
        assert!(receipts[0].duplicate);
    }

    /// Different messages of one instant are all kept; the same content at another instant, too.
    async fn different_messages_of_one_instant_are_kept(history) {
        let series = device();
        let receipts = append(history, vec![at(series, 1, 1), at(series, 1, 2), at(series, 2, 1)]).await;
        assert!(receipts.iter().all(|r| !r.duplicate));
        assert_eq!(numbers(&all(history, series).await), [1, 2, 1]);
    }

    /// The same message of another device or kind of series is another message.
    async fn series_are_apart(history) {
        let series = device();
        let other = Series { object: DeviceId::new(START, rand::random()).0, ..series };
        let log = Series::device_log(series.account, DeviceId(series.object));
        let foreign = Series { account: AccountId::new(START, rand::random()), ..series };
        let batch = [series, other, log, foreign].map(|s| at(s, 1, 1)).to_vec();
        let receipts = append(history, batch).await;
        assert!(receipts.iter().all(|r| !r.duplicate));
        for of in [series, other, log, foreign] {
            let read = all(history, of).await;
            assert_eq!((read.len(), read[0].series()), (1, of));
        }
        assert!(all(history, device()).await.is_empty(), "an unknown series has messages");
    }

    /// Receipts come in the order of a batch that spans many series, and name the right places.
    async fn receipts_are_in_order(history) {
        let account = device().account;
        let many: Vec<Series> = (0..20).map(|_| Series { account, ..device() }).collect();
        let batch: Vec<Accepted> = (0..200).map(|n| at(many[n % 20], n as i64, n as i64)).collect();
        let receipts = append(history, batch.clone()).await;
        for (message, receipt) in batch.into_iter().zip(receipts) {
            let query = Query { from: message.timestamp(), ..Query::oldest(message.series(), 1) };
            assert_eq!(read(history, &query).await, vec![message.stored(receipt)]);
        }
    }

    /// The tail has everything once, in order of arrival, and pages of it join.
    async fn the_tail_has_no_gaps(history) {
        let before = ends(history).await;
        let account = device().account;
        let many: Vec<Series> = (0..10).map(|_| Series { account, ..device() }).collect();
        let mut expected: HashSet<Cursor> = HashSet::new();
        for round in 0..20 {
            // Times fall while arrival goes on.
            let batch = many.iter().map(|s| at(*s, 1_000 - round, round)).collect();
            expected.extend(append(history, batch).await.iter().map(|r| r.cursor));
        }
        for page in [1, 7, 1_000] {
            let mut seen = HashSet::new();
            let mut rounds: BTreeMap<Series, Vec<i64>> = BTreeMap::new();
            for cursor in &before {
                for message in tail(history, *cursor, page).await {
                    if message.series().account == account {
                        assert!(seen.insert(message.cursor()), "a message comes twice");
                        rounds.entry(message.series()).or_default().extend(numbers(&[message]));
                    }
                }
            }
            assert_eq!(seen, expected, "the tail in pages of {page} is not what was appended");
            assert_eq!(rounds.len(), 10);
            assert!(rounds.values().all(|r| *r == (0..20).collect::<Vec<_>>()), "not in order of arrival");
        }
    }

    /// A message of the tail equals the one that is read.
    async fn the_tail_and_reads_agree(history) {
        let before = ends(history).await;
        let series = device();
        append(history, (0..30).map(|n| at(series, 100 - n, n)).collect()).await;
        let mut by_tail = Vec::new();
        for cursor in &before {
            let messages = tail(history, *cursor, 1_000).await;
            by_tail.extend(messages.into_iter().filter(|m| m.series() == series));
        }
        by_tail.sort_by_key(|m| (m.timestamp(), m.cursor()));
        assert_eq!(by_tail, all(history, series).await);
    }

    /// Where nothing is damaged, passing over damage changes nothing, and nothing is told.
    async fn the_tail_over_damage_is_the_tail_where_there_is_none(history) {
        let before = ends(history).await;
        append(history, (0..30).map(|n| at(device(), n, n)).collect()).await;
        for cursor in before {
            let over = history.tail_over_damage(cursor, 10_000).await.expect("tails");
            assert_eq!(over, tail(history, cursor, 10_000).await);
        }
        assert!(history.warnings().is_empty(), "{:?}", history.warnings());
    }

    /// At the end of a shard, or of one that is not there, there is nothing.
    async fn the_tail_ends(history) {
        for cursor in ends(history).await {
            assert!(tail(history, cursor, 10).await.is_empty());
            let beyond = Cursor { seq: cursor.seq + 1_000_000, ..cursor };
            assert!(tail(history, beyond, 10).await.is_empty());
        }
        let absent = Cursor { shard: u16::MAX, seq: 0 };
        assert!(history.tail(absent, 10).await.expect("tails").is_empty());
    }

    /// Appends at the same time are all stored, each series in its order.
    async fn appends_at_once_keep_each_series_in_order(history) {
        let account = device().account;
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..16 {
            let (history, series) = (history.clone(), Series { account, ..device() });
            tasks.spawn(async move {
                for n in 0..30 {
                    append(&history, vec![at(series, n / 2, 2 * n), at(series, n / 2, 2 * n + 1)]).await;
                }
                series
            });
        }
        while let Some(series) = tasks.join_next().await {
            let read = all(history, series.expect("a task ends")).await;
            assert_eq!(numbers(&read), (0..60).collect::<Vec<_>>());
            assert!(read.is_sorted_by_key(|m| m.cursor().seq));
        }
    }

    /// Last values are the newest by timestamp, and of one instant the later message's.
    async fn last_values_are_the_newest(history) {
        let series = device();
        let message = |seconds: i64, values| {
            Accepted::own(series, START.plus_micros(seconds * 1_000_000), values)
        };
        append(history, vec![
            message(1, params([("a", Value::Int(1)), ("b", Value::Int(1))])),
            message(5, params([("a", Value::Int(5))])),
            message(3, params([("a", Value::Int(3)), ("c", Value::from("three"))])),
            message(5, params([("a", Value::Int(6))])),
        ]).await;
        let time = |seconds: i64| START.plus_micros(seconds * 1_000_000);
        let expected = BTreeMap::from([
            ("a".to_owned(), (Value::Int(6), time(5))),
            ("b".to_owned(), (Value::Int(1), time(1))),
            ("c".to_owned(), (Value::from("three"), time(3))),
        ]);
        assert_eq!(last_values(history, series).await, expected);
    }

    /// Logs and events have no last values.
    async fn only_messages_have_last_values(history) {
        let series = device();
        let log = Series::device_log(series.account, DeviceId(series.object));
        let events = Series::events(series.account);
        append(history, vec![at(log, 1, 1), at(events, 1, 1)]).await;
        assert!(last_values(history, log).await.is_empty());
        assert!(last_values(history, events).await.is_empty());
    }

    /// Statistics count messages once, by account.
    async fn statistics_count_what_is_stored(history) {
        let series = device();
        let before = history.stats(None);
        append(history, (0..40).map(|n| at(series, n % 20, n % 20)).collect()).await;
        let own = history.stats(Some(series.account));
        assert_eq!(own.messages, 20);
        assert!(own.unsealed <= own.messages);
        let total = history.stats(None);
        assert!(total.messages >= before.messages + 20);
        assert!(total.bytes > 0);
        assert_eq!(history.stats(Some(device().account)).messages, 0);
    }

    /// Retention keeps what is newer, and takes nothing of another account.
    async fn retention_keeps_what_is_newer(history) {
        let (series, foreign) = (device(), device());
        // A message a day for ten days.
        let batch = |of| (0..10).map(|n| at(of, n * 86_400, n)).collect();
        append(history, batch(series)).await;
        append(history, batch(foreign)).await;
        let before = Some(START.plus_micros(5 * 86_400 * 1_000_000));
        let retention = Retention { account: series.account, before, bytes_max: None };
        history.retain(retention).await.expect("retains");
        let left = numbers(&all(history, series).await);
        assert!(left.ends_with(&[5, 6, 7, 8, 9]), "newer messages went: {left:?}");
        assert_eq!(numbers(&all(history, foreign).await), (0..10).collect::<Vec<_>>());
        let stats = history.stats(Some(series.account));
        assert_eq!(stats.messages, left.len() as u64);
        // What is left is still recognised, and appending goes on.
        let receipts = append(history, vec![at(series, 9 * 86_400, 9), at(series, 10 * 86_400, 10)]).await;
        assert_eq!(receipts.iter().map(|r| r.duplicate).collect::<Vec<_>>(), [true, false]);
    }

    /// Retention without a limit changes nothing.
    async fn retention_without_limits_keeps_all(history) {
        let series = device();
        append(history, (0..10).map(|n| at(series, n, n)).collect()).await;
        let retention = Retention { account: series.account, before: None, bytes_max: None };
        history.retain(retention).await.expect("retains");
        assert_eq!(numbers(&all(history, series).await), (0..10).collect::<Vec<_>>());
    }

    /// The tail goes on after what retention took.
    async fn the_tail_starts_at_the_oldest_left(history) {
        let before = ends(history).await;
        let series = device();
        append(history, (0..10).map(|n| at(series, n * 86_400, n)).collect()).await;
        let retention = Retention {
            account: series.account,
            before: Some(START.plus_micros(7 * 86_400 * 1_000_000)),
            bytes_max: None,
        };
        history.retain(retention).await.expect("retains");
        let mut left = Vec::new();
        for cursor in before {
            let messages = tail(history, cursor, 3).await;
            left.extend(messages.into_iter().filter(|m| m.series() == series));
        }
        assert_eq!(left, all(history, series).await, "the tail and reads differ after retention");
        assert!(numbers(&left).ends_with(&[7, 8, 9]));
    }
}
