//! Messages in segments behave as they did in memory.

use std::collections::BTreeMap;

use fieldline_contracts::{History, Order, Query, Retention};
use fieldline_mdb::MdbConfig;
use fieldline_model::{Accepted, AccountId, Cursor, DeviceId, Series, Stored, Timestamp, Value};

use crate::common::{
    ACCOUNT, START, all, append, device, message, numbers, open, params, small, tail,
};
use crate::fake_disk::FakeDisk;

#[tokio::test]
async fn duplicates_are_known_across_sealing_and_restart() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    let batch: Vec<Accepted> = (0..300).map(|n| message(device(1), n / 3, n)).collect();
    let first = append(&store, batch.clone()).await;
    store.seal().await.unwrap();
    let again = append(&store, batch.clone()).await;
    assert!(again.iter().all(|r| r.duplicate));
    assert!(
        first.iter().zip(&again).all(|(a, b)| a.cursor == b.cursor),
        "a duplicate names the first's place"
    );
    drop(store);
    let store = open(&disk.disk(), small()).unwrap();
    assert!(append(&store, batch).await.iter().all(|r| r.duplicate));
    // Late data between is no duplicate.
    let late = append(&store, vec![message(device(1), 50, 999), message(device(1), -5, 1)]).await;
    assert!(late.iter().all(|r| !r.duplicate));
    assert_eq!(all(&store, device(1)).await.len(), 302);
}

#[tokio::test]
async fn every_kind_of_value_survives_sealing_and_merging() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    let series = device(1);
    let mut expected: Vec<Stored> = Vec::new();
    for part in 0..4_i64 {
        let mut batch = Vec::new();
        for n in part * 200..part * 200 + 200 {
            let at = START.plus_micros(n * 1_500_000);
            let tree = serde_json::json!({"n": n, "list": [n, null, 0.5], "text": "x".repeat((n % 7) as usize)});
            let scale = (n % 4) as u8;
            let values = params([
                ("bool", Value::Bool(n % 3 == 0)),
                ("int", Value::Int(n * n - 5_000)),
                ("uint", Value::Uint(u64::MAX - n as u64)),
                ("decimal", Value::Decimal(fieldline_model::Decimal::new(n * 17, scale).unwrap())),
                ("float", Value::Float((n as f64).sqrt())),
                ("text", Value::from(format!("text {}", n % 11))),
                ("bytes", Value::from(&n.to_le_bytes()[..])),
                ("json", Value::Json(std::sync::Arc::new(tree))),
            ]);
            // Messages of many shapes: some parameters are missing, and their order varies.
            let mut kept: Vec<_> = values
                .into_iter()
                .enumerate()
                .filter(|(i, _)| (n >> i) & 1 == 0 || n % 5 == 0)
                .map(|(_, v)| v)
                .collect();
            if n % 2 == 0 {
                kept.reverse();
            }
            batch.push(Accepted::own(series, at, kept.into_iter().collect()));
        }
        let receipts = append(&store, batch.clone()).await;
        expected.extend(batch.into_iter().zip(receipts).map(|(m, r)| m.stored(r)));
        store.seal().await.unwrap();
    }
    let exact = |messages: &[Stored]| {
        assert_eq!(messages, expected);
        for (a, b) in messages.iter().zip(&expected) {
            for ((_, a), (_, b)) in a.params().iter().zip(b.params()) {
                if let (Value::Decimal(a), Value::Decimal(b)) = (a, b) {
                    assert_eq!(a.scale(), b.scale());
                }
            }
        }
    };
    exact(&all(&store, series).await);
    store.merge().await.unwrap();
    // Four parts were sealed; the merger in the background may have been first.
    assert!(store.stats(None).segments < 4, "nothing was merged");
    exact(&all(&store, series).await);
    exact(&tail(&store, Cursor::default(), 33).await);
    drop(store);
    exact(&all(&open(&disk.disk(), small()).unwrap(), series).await);
}

#[tokio::test]
async fn pages_and_ranges_are_the_same_over_segments_and_memory() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    let series = device(1);
    let mut model: Vec<(i64, i64)> = Vec::new();
    // Each part overlaps the one before, and some instants have several messages.
    for part in 0..5_i64 {
        let batch: Vec<(i64, i64)> =
            (0..200).map(|n| ((part * 60 + n * 7) % 400, part * 1_000 + n)).collect();
        append(&store, batch.iter().map(|(at, n)| message(series, *at, *n)).collect()).await;
        model.extend(batch);
        if part < 4 {
            store.seal().await.unwrap();
        }
    }
    model.sort_by_key(|(at, _)| *at);
    for order in [Order::Ascending, Order::Descending] {
        for (from, to) in [(0, 400), (100, 250), (399, 400), (30, 31), (250, 100)] {
            let time = |seconds: i64| START.plus_micros(seconds * 1_000_000);
            let mut expected: Vec<i64> =
                model.iter().filter(|(at, _)| *at >= from && *at < to).map(|(_, n)| *n).collect();
            if order == Order::Descending {
                expected.reverse();
            }
            for limit in [1_usize, 13, 5_000] {
                let mut got: Vec<Stored> = Vec::new();
                loop {
                    let query = Query {
                        series,
                        from: time(from),
                        to: time(to),
                        order,
                        after: got.last().map(|m| (m.timestamp(), m.cursor())),
                        limit,
                    };
                    let page = store.read(&query).await.unwrap();
                    if page.is_empty() {
                        break;
                    }
                    got.extend(page);
                }
                assert_eq!(numbers(&got), expected, "{order:?} {from}..{to} by {limit}");
            }
        }
    }
}

#[tokio::test]
async fn the_tail_of_many_devices_is_whole_after_merging() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    let mut expected = Vec::new();
    for round in 0..60_i64 {
        let batch: Vec<Accepted> = (0..50).map(|d| message(device(d), round, round)).collect();
        let receipts = append(&store, batch.clone()).await;
        expected.extend(batch.into_iter().zip(receipts).map(|(m, r)| m.stored(r)));
        if round % 15 == 14 {
            store.seal().await.unwrap();
        }
    }
    append(&store, (0..50).map(|d| message(device(d), 900, 900)).collect()).await;
    for merged in [false, true] {
        if merged {
            store.merge().await.unwrap();
        }
        for page in [1, 999, 10_000] {
            let seen = tail(&store, Cursor::default(), page).await;
            assert_eq!(seen[..3_000], expected[..], "pages of {page}, merged: {merged}");
            assert_eq!(seen.len(), 3_050);
        }
        let middle = store.tail(Cursor { shard: 0, seq: 1_499 }, 2).await.unwrap();
        assert_eq!(middle[..], expected[1_499..1_501]);
    }
}

fn of_account(account: u8, number: u8) -> Series {
    Series::messages(AccountId::from_bytes([account; 16]), DeviceId::from_bytes([number; 16]))
}

fn day(n: i64) -> Timestamp {
    START.plus_micros(n * 86_400 * 1_000_000)
}

#[tokio::test]
async fn retention_by_age_frees_bytes_and_keeps_others() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), MdbConfig { merge_fan_in: 100, ..small() }).unwrap();
    for n in 0..10_i64 {
        let mut batch = Vec::new();
        for account in 1..=2 {
            for step in 0..400 {
                batch.push(message(
                    of_account(account, 1),
                    n * 86_400 + step,
                    step * step * 31 % 1_009,
                ));
            }
        }
        append(&store, batch).await;
        store.seal().await.unwrap();
    }
    let (one, two) = (AccountId::from_bytes([1; 16]), AccountId::from_bytes([2; 16]));
    let (before, bytes_before) = (store.stats(Some(one)), disk.bytes());
    let retention = Retention { account: one, before: Some(day(6)), bytes_max: None };
    let freed = store.retain(retention).await.unwrap();
    let after = store.stats(Some(one));
    assert_eq!(after.messages, before.messages * 4 / 10, "whole days went");
    assert!(
        freed > 0 && bytes_before - disk.bytes() >= freed as usize / 2,
        "bytes are not free: {freed}"
    );
    assert_eq!(store.stats(Some(two)).messages, 4_000);
    assert_eq!(all(&store, of_account(1, 1)).await.len(), 1_600);
    assert_eq!(all(&store, of_account(2, 1)).await.len(), 4_000);
    assert_eq!(tail(&store, Cursor::default(), 1_000).await.len(), 5_600);
    // All of an account, as when it is deleted.
    let gone = Retention { account: one, before: Some(Timestamp::MAX), bytes_max: None };
    store.retain(gone).await.unwrap();
    assert_eq!(store.stats(Some(one)).messages, 0);
    let mut left = BTreeMap::new();
    store
        .last_values(&mut |series, name, _, _| {
            left.insert((series, name.clone()), ());
        })
        .await
        .unwrap();
    assert!(
        left.keys().all(|(series, _)| series.account == two),
        "last values of a deleted account"
    );
    drop(store);
    let store = open(&disk.disk(), small()).unwrap();
    assert!(all(&store, of_account(1, 1)).await.is_empty());
    assert_eq!(all(&store, of_account(2, 1)).await.len(), 4_000);
}

#[tokio::test]
async fn retention_by_bytes_takes_the_oldest_first() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), MdbConfig { merge_fan_in: 100, shards: 2, ..small() }).unwrap();
    for n in 0..10_i64 {
        let batch = (0..800).map(|step| {
            message(device((step % 5) as u8), n * 86_400 + step, step * step * 31 % 1_009)
        });
        append(&store, batch.collect()).await;
        store.seal().await.unwrap();
    }
    let before = store.stats(Some(ACCOUNT));
    let bytes_max = Some(before.bytes / 2);
    store.retain(Retention { account: ACCOUNT, before: None, bytes_max }).await.unwrap();
    let after = store.stats(Some(ACCOUNT));
    assert!(after.bytes <= before.bytes / 2, "{} of {} bytes are left", after.bytes, before.bytes);
    assert!(
        after.messages >= before.messages / 3,
        "too much went: {} of {}",
        after.messages,
        before.messages
    );
    for number in 0..5 {
        let left = all(&store, device(number)).await;
        assert!(left.first().unwrap().timestamp() >= day(4), "older messages are left than went");
        assert_eq!(
            left.last().unwrap().timestamp().as_seconds() / 86_400,
            day(9).as_seconds() / 86_400
        );
    }
    let none = store.retain(Retention { account: ACCOUNT, before: None, bytes_max }).await.unwrap();
    assert_eq!(none, 0, "a second time there is nothing to free");
}

#[tokio::test]
async fn sealing_keeps_pace_by_itself_and_files_stay_few() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), MdbConfig { merge_fan_in: 3, ..small() }).unwrap();
    for round in 0..120_i64 {
        let batch =
            (0..200).map(|n| message(device((n % 20) as u8), round * 10 + n / 20, round * 200 + n));
        append(&store, batch.collect()).await;
    }
    store.seal().await.unwrap();
    store.merge().await.unwrap();
    let stats = store.stats(None);
    assert_eq!(stats.messages, 24_000);
    assert!(stats.segments <= 12, "{} segments", stats.segments);
    assert!(disk.find("wal-").len() <= 3, "{:?}", disk.find("wal-"));
    assert_eq!(disk.find(".snap").len(), 1);
    assert_eq!(disk.find(".seg").len() as u64, stats.segments);
    assert_eq!(tail(&store, Cursor::default(), 5_000).await.len(), 24_000);
}

#[tokio::test]
async fn many_appends_share_few_syncs() {
    let disk = FakeDisk::new();
    let store = std::sync::Arc::new(open(&disk.disk(), MdbConfig::default()).unwrap());
    let before = disk.syncs();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..200_u8 {
        let store = store.clone();
        tasks.spawn(async move { append(&store, vec![message(device(n), 1, 1)]).await });
    }
    while let Some(receipts) = tasks.join_next().await {
        assert_eq!(receipts.unwrap().len(), 1);
    }
    assert!(disk.syncs() - before < 150, "{} syncs for 200 appends", disk.syncs() - before);
}

#[tokio::test]
async fn a_message_that_is_too_large_is_refused_and_others_are_not() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), MdbConfig::default()).unwrap();
    let text = |bytes: usize| {
        Accepted::own(device(1), START, params([("text", Value::from("x".repeat(bytes)))]))
    };
    assert!(store.append(vec![text(5 << 20)]).await.is_err());
    append(&store, vec![text(3 << 20)]).await;
    store.seal().await.unwrap();
    let read = all(&store, device(1)).await;
    assert_eq!(read[0].params().get("text").unwrap().as_str().unwrap().len(), 3 << 20);
}
