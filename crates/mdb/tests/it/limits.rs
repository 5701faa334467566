//! Bounds: queues that fill, sealing that lags, restarts with settings of another kind.

use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::{History, HistoryError, Query, TestClock};
use fieldline_mdb::{Mdb, MdbConfig, OpenError};
use fieldline_model::{Accepted, Cursor, Timestamp, Value};

use crate::common::{START, all, append, device, message, open, params, small};
use crate::fake_disk::FakeDisk;

fn large(number: u8, n: i64) -> Accepted {
    let at = START.plus_micros(n);
    Accepted::own(
        device(number),
        at,
        params([("n", Value::Int(n)), ("text", Value::from(noise(n, 200_000)))]),
    )
}

/// Text that does not get small by compression: what is sealed takes room as well.
fn noise(seed: i64, bytes: usize) -> String {
    let mut state = seed.unsigned_abs().wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        char::from(b'0' + u8::try_from(state % 64).unwrap())
    };
    (0..bytes).map(|_| next()).collect()
}

#[tokio::test]
async fn appends_wait_for_room_and_are_refused_when_it_does_not_come() {
    let disk = FakeDisk::new();
    let config = MdbConfig {
        queue_bytes_max: 1 << 20,
        queue_wait_max: Duration::from_millis(50),
        seal_wait_max: Duration::from_millis(400),
        frozen_max: 1,
        ..small()
    };
    let store = Arc::new(open(&disk.disk(), config).unwrap());
    append(&store, vec![large(1, 0)]).await;
    // Sealing fails from now on, so memtables pile up and the writer waits for it.
    disk.set_space(Some(3 << 20));
    let mut tasks = tokio::task::JoinSet::new();
    for n in 1..40 {
        let store = store.clone();
        tasks.spawn(async move { store.append(vec![large(1, n)]).await.map(|_| n) });
    }
    let (mut stored, mut refused) = (vec![0], 0);
    while let Some(result) = tasks.join_next().await {
        match result.unwrap() {
            Ok(n) => stored.push(n),
            Err(HistoryError::Busy | HistoryError::Full(_)) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert!(refused > 0, "more than the queue holds was taken");
    disk.set_space(None);
    stored.sort_unstable();
    assert_eq!(crate::common::numbers(&all(&store, device(1)).await), stored);
    // Sealing catches up by itself.
    for n in 100.. {
        assert!(n < 200, "it does not recover");
        if store.append(vec![large(1, n)]).await.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn old_messages_are_sealed_by_the_clock() {
    let disk = FakeDisk::new();
    let clock = Arc::new(TestClock::at(START));
    let store = Mdb::open_on(disk.disk(), "/store", MdbConfig::default(), clock.clone()).unwrap();
    append(&store, vec![message(device(1), 1, 1)]).await;
    assert_eq!(store.stats(None).unsealed, 1);
    clock.advance_micros(16 * 60 * 1_000_000);
    for _ in 0..100 {
        if store.stats(None).unsealed == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let stats = store.stats(None);
    assert_eq!((stats.unsealed, stats.segments, stats.messages), (0, 1, 1));
    assert!(disk.find("wal-").is_empty(), "a log file of sealed messages is left");
}

#[tokio::test]
async fn the_count_of_shards_is_fixed_when_the_store_is_made() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), MdbConfig { shards: 3, ..small() }).unwrap();
    append(&store, (0..30).map(|n| message(device(n), 1, 1)).collect()).await;
    drop(store);
    let store = open(&disk.disk(), MdbConfig { shards: 1, ..small() }).unwrap();
    assert_eq!(store.shards(), 3);
    for n in 0..30 {
        assert_eq!(all(&store, device(n)).await.len(), 1);
    }
}

#[test]
fn settings_out_of_range_are_refused() {
    let disk = FakeDisk::new();
    for config in [
        MdbConfig { shards: 0, ..small() },
        MdbConfig { wal_bytes_max: 1, ..small() },
        MdbConfig { memtable_bytes_max: 1, ..small() },
        MdbConfig { merge_fan_in: 1, ..small() },
        MdbConfig { queue_bytes_max: 0, ..small() },
    ] {
        assert!(matches!(open(&disk.disk(), config), Err(OpenError::Config(_))));
    }
}

#[tokio::test]
async fn aggregates_are_what_the_messages_say() {
    let disk = FakeDisk::new();
    let store = open(
        &disk.disk(),
        MdbConfig { memtable_bytes_max: 8 << 20, wal_bytes_max: 8 << 20, ..small() },
    )
    .unwrap();
    let series = device(1);
    let content = |n: i64| n * n * 31 % 1_009 - 300;
    append(&store, (0..9_000).map(|n| message(series, n, content(n))).collect()).await;
    store.seal().await.unwrap();
    // Late messages that overlap one block, and some in memory.
    append(&store, (5_000..5_010).map(|n| message(series, n, -7_000 - n)).collect()).await;
    store.seal().await.unwrap();
    append(&store, (9_000..9_500).map(|n| message(series, n, content(n))).collect()).await;
    let mut points: Vec<(i64, i64)> = (0..9_500).map(|n| (n, content(n))).collect();
    points.extend((5_000..5_010).map(|n| (n, -7_000 - n)));
    points.sort_by_key(|(at, _)| *at);
    let time = |seconds: i64| START.plus_micros(seconds * 1_000_000);
    for (from, to) in
        [(0, 10_000), (100, 8_000), (4_990, 5_005), (9_100, 9_200), (0, 4_096), (20_000, 30_000)]
    {
        // `height` is a decimal of the same number.
        let inside: Vec<f64> = points
            .iter()
            .filter(|(at, _)| *at >= from && *at < to)
            .map(|(_, n)| *n as f64)
            .collect();
        for name in ["n", "height"] {
            let got = store.aggregate(series, name, time(from), time(to)).await.unwrap();
            let Some(got) = got else {
                assert!(inside.is_empty());
                continue;
            };
            assert_eq!(got.count, inside.len() as u64, "{from}..{to}");
            assert_eq!(got.sum, inside.iter().sum::<f64>());
            assert_eq!(got.min, inside.iter().copied().fold(f64::INFINITY, f64::min));
            assert_eq!(got.max, inside.iter().copied().fold(f64::NEG_INFINITY, f64::max));
            assert_eq!((got.first, got.last), (inside[0], inside[inside.len() - 1]));
            if from == 0 && to > 4_096 {
                assert!(got.blocks_not_read >= 1, "every block was read");
            }
        }
    }
    assert_eq!(store.aggregate(series, "absent", time(0), time(9_000)).await.unwrap(), None);
    assert_eq!(store.aggregate(series, "n", Timestamp::MIN, Timestamp::MIN).await.unwrap(), None);
}

#[tokio::test]
async fn what_is_refused_and_stored_is_counted() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).unwrap();
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    append(&store, vec![message(device(1), 1, 1), message(device(1), 1, 1)]).await;
    disk.set_space(Some(0));
    assert!(store.append(vec![message(device(1), 2, 2)]).await.is_err());
    disk.set_space(None);
    store.seal().await.unwrap();
    let text = handle.render();
    // Other tests of this process may have counted, too.
    for name in [
        "fieldline_mdb_messages_total{shard=\"0\"}",
        "fieldline_mdb_duplicates_total{shard=\"0\"}",
        "fieldline_mdb_refused_total{shard=\"0\",code=\"storage_full\"}",
        "fieldline_mdb_write_errors_total{shard=\"0\"}",
        "fieldline_mdb_log_bytes_total{shard=\"0\"}",
        "fieldline_mdb_seals_total{shard=\"0\"}",
        "fieldline_mdb_sync_seconds_count{shard=\"0\"}",
        "fieldline_mdb_group_messages_count{shard=\"0\"}",
        "fieldline_mdb_queue_messages{shard=\"0\"}",
        "fieldline_mdb_segments{shard=\"0\"}",
    ] {
        let line = text.lines().find(|line| line.starts_with(name));
        assert!(line.is_some(), "{name} is missing in\n{text}");
    }
}

#[tokio::test]
async fn segments_whose_indexes_are_too_large_together_are_not_merged() {
    let disk = FakeDisk::new();
    let config = || MdbConfig { merge_index_bytes_max: 8 << 10, ..small() };
    let store = open(&disk.disk(), config()).unwrap();
    // Some make up names, so that their index outgrows their messages; the others do not.
    let named = |n: i64| {
        let values = (0..200).map(|at| {
            let name = format!("made-up-{n}-{at}-{}", "x".repeat(60));
            (fieldline_model::ParamName::new(name).unwrap(), Value::Int(at))
        });
        let values = values.collect::<fieldline_model::Params>();
        Accepted::own(device(9), START.plus_micros(n), values)
    };
    for n in 0..4 {
        append(&store, vec![named(n), message(device(1), n, n)]).await;
        store.seal().await.unwrap();
    }
    for n in 4..8 {
        append(&store, vec![message(device(1), n, n)]).await;
        store.seal().await.unwrap();
    }
    store.merge().await.unwrap();
    assert_eq!(store.stats(None).segments, 4 + 1, "only what has small indexes is merged");
    drop(store);
    let store = open(&disk.disk(), config()).unwrap();
    assert_eq!(crate::common::numbers(&all(&store, device(1)).await), (0..8).collect::<Vec<_>>());
    assert_eq!(all(&store, device(9)).await.len(), 4);
}

#[tokio::test]
async fn last_values_of_a_device_are_bounded_in_bytes() {
    let disk = FakeDisk::new();
    let config = || MdbConfig { memtable_bytes_max: 8 << 20, wal_bytes_max: 8 << 20, ..small() };
    let store = open(&disk.disk(), config()).unwrap();
    let text = |n: i64| {
        let name = fieldline_model::ParamName::new(format!("text{n}")).unwrap();
        let values = [(name, Value::from("x".repeat(100_000)))];
        Accepted::own(device(1), START.plus_micros(n), values.into_iter().collect())
    };
    append(&store, (0..10).map(text).collect()).await;
    store.seal().await.unwrap();
    append(&store, (10..20).map(text).collect()).await;
    for sealed in [false, true] {
        if sealed {
            store.seal().await.unwrap();
        }
        let mut bytes = 0;
        let mut visit = |_, _: &fieldline_model::ParamName, value: &Value, _| {
            bytes += value.heap_bytes();
        };
        store.last_values(&mut visit).await.unwrap();
        assert_eq!(bytes, 200_000);
    }
    assert_eq!(all(&store, device(1)).await.len(), 20, "history keeps all");
}

/// Appends that never end must not put off what asks for a freeze.
#[tokio::test]
async fn sealing_has_its_turn_while_appends_come() {
    let disk = FakeDisk::new();
    let store = Arc::new(open(&disk.disk(), MdbConfig::default()).unwrap());
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..8 {
        let store = store.clone();
        tasks.spawn(async move {
            for n in 0.. {
                append(&store, vec![message(device(number), n, n)]).await;
            }
        });
    }
    for _ in 0..5 {
        let sealed = tokio::time::timeout(Duration::from_secs(10), store.seal()).await;
        sealed.expect("sealing starves").unwrap();
    }
    tasks.shutdown().await;
    assert!(store.stats(None).segments > 0);
}

/// Pages are bounded in bytes, and so is what is read and held for them.
#[tokio::test]
async fn a_page_of_large_messages_takes_little_memory() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), MdbConfig { merge_fan_in: 500, ..small() }).unwrap();
    for part in 0..10 {
        append(&store, (part * 20..part * 20 + 20).map(|n| large(1, n)).collect()).await;
    }
    store.seal().await.unwrap();
    assert!(disk.bytes() > 25 << 20, "{} bytes are sealed", disk.bytes());
    tokio::time::sleep(Duration::from_millis(200)).await;
    disk.take_bytes_read();
    for query in [Query::oldest(device(1), 10_000), Query::newest(device(1), 10_000)] {
        let page = store.read(&query).await.unwrap();
        assert!((30..=41).contains(&page.len()), "{} messages", page.len());
        let bytes = disk.take_bytes_read();
        assert!(bytes < 12 << 20, "{bytes} bytes were read for one page");
    }
    let page = store.tail(Cursor::default(), 10_000).await.unwrap();
    assert!((30..=41).contains(&page.len()), "{} messages", page.len());
    // What is too large for a window is known by now.
    disk.take_bytes_read();
    let mut cursor = page.last().unwrap().cursor();
    let mut seen = page.len();
    loop {
        let page = store.tail(cursor, 10_000).await.unwrap();
        let Some(last) = page.last() else { break };
        (cursor, seen) = (last.cursor(), seen + page.len());
    }
    assert_eq!(seen, 200);
    let bytes = disk.take_bytes_read();
    assert!(bytes < 160 << 20, "{bytes} bytes were read for the rest of the tail");
}
