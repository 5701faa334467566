//! Several nodes over one database.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fieldline_contracts::{History, Retention};
use fieldline_model::{Cursor, Stored};
use fieldline_testkit::servers::Postgres;

use crate::{ACCOUNT, START, all, at, device, everything, history, number, settings};

/// Follows all shards until told that all is written and there is no more; asserts that nothing is left out
/// or comes twice.
async fn follow(history: Arc<impl History>, written: Arc<AtomicBool>) -> Vec<Stored> {
    let mut seen = Vec::new();
    let mut cursors: Vec<Cursor> =
        (0..history.shards()).map(|shard| Cursor { shard, seq: 0 }).collect();
    loop {
        let last_look = written.load(Ordering::SeqCst);
        let mut found = false;
        for cursor in &mut cursors {
            let page = history.tail(*cursor, 100).await.unwrap();
            found |= !page.is_empty();
            for message in page {
                let (expected, got) = (cursor.seq + 1, message.cursor());
                assert_eq!(got.seq, expected, "shard {} goes on with {}", cursor.shard, got.seq);
                *cursor = got;
                seen.push(message);
            }
        }
        if last_look && !found {
            return seen;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Eight tasks on two nodes append to the same shards, some the same messages, while a third node follows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_follows_sees_no_gap_and_no_double() {
    const ROUNDS: i64 = 60;
    let server = Postgres::start();
    let settings = settings(&server);
    let nodes = [history(&settings).await, history(&settings).await];
    let written = Arc::new(AtomicBool::new(false));
    let follower = tokio::spawn(follow(history(&settings).await, Arc::clone(&written)));
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..8_u8 {
        let node = Arc::clone(&nodes[usize::from(task % 2)]);
        tasks.spawn(async move {
            let mut stored = 0;
            for round in 0..ROUNDS {
                // Its own three devices, and one that all send the same of.
                let own = (0..9).map(|n| {
                    at(
                        device(10 + task * 3 + n % 3),
                        round * 9 + i64::from(n),
                        round * 9 + i64::from(n),
                    )
                });
                let batch = own.chain([at(device(1), round, round)]).collect();
                let receipts = node.append(batch).await.unwrap();
                stored += receipts.iter().filter(|receipt| !receipt.duplicate).count();
            }
            stored
        });
    }
    let stored: usize = tasks.join_all().await.into_iter().sum();
    written.store(true, Ordering::SeqCst);
    let seen = follower.await.unwrap();
    let wanted = usize::try_from(8 * ROUNDS * 9 + ROUNDS).unwrap();
    assert_eq!((seen.len(), stored), (wanted, wanted));
    for own in 10..34 {
        let of = seen.iter().filter(|message| message.series() == device(own)).map(number);
        assert!(of.is_sorted(), "device {own} is not in the order in which it was sent");
    }
    assert_eq!(all(&nodes[0], device(1)).await.len(), usize::try_from(ROUNDS).unwrap());
    let stats = nodes[0].stats(None).messages + nodes[1].stats(None).messages;
    assert!(stats > 0);
    // Counted each ten seconds.
    tokio::time::sleep(Duration::from_secs(13)).await;
    for node in &nodes {
        assert_eq!(
            node.stats(Some(ACCOUNT)).messages,
            wanted as u64,
            "what others stored is counted too"
        );
    }
}

/// Messages of many days at once, from two nodes, while another makes the same partitions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_make_the_same_partitions_at_once() {
    let server = Postgres::start();
    let settings = settings(&server);
    let (one, two, three) =
        tokio::join!(history(&settings), history(&settings), history(&settings));
    let mut tasks = tokio::task::JoinSet::new();
    for (task, node) in (0_u8..).zip([&one, &two, &three, &one, &two, &three]) {
        let node = Arc::clone(node);
        tasks.spawn(async move {
            for part in 0..4_i64 {
                let days = (0..10).map(|day| (part * 10 + day) * 86_400_000);
                // Also of ten years before and of the year 2150.
                let days = days.chain([-315_360_000_000, 4_000_000_000_000]);
                let batch = days.map(|millis| at(device(task), millis + part, part)).collect();
                node.append(batch).await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    let stored: usize = everything(&one).await.values().map(Vec::len).sum();
    assert_eq!(stored, 6 * 4 * 12);
    for n in 0..6 {
        assert_eq!(all(&two, device(n)).await.len(), 48);
    }
}

/// A partition is dropped by one node while another appends to it and a third reads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_is_dropped_under_load() {
    let server = Postgres::start();
    let settings = settings(&server);
    let (one, two) = (history(&settings).await, history(&settings).await);
    let stop = Arc::new(AtomicBool::new(false));
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..3_u8 {
        let (node, stop) = (Arc::clone(&one), Arc::clone(&stop));
        tasks.spawn(async move {
            let mut n = 0;
            while !stop.load(Ordering::SeqCst) {
                n += 1;
                // Today's, and some that are a day old.
                let old = at(device(task), n, n);
                let new = at(device(task), n + 86_400_000, n);
                let receipts = node.append(vec![old, new]).await.unwrap();
                assert!(!receipts[1].duplicate);
                assert!(
                    !node
                        .read(&fieldline_contracts::Query::newest(device(task), 5))
                        .await
                        .unwrap()
                        .is_empty()
                );
            }
            (task, n)
        });
    }
    let before = Some(START.plus_micros(86_400_000_000));
    let mut freed = 0;
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(150)).await;
        freed += two.retain(Retention { account: ACCOUNT, before, bytes_max: None }).await.unwrap();
    }
    stop.store(true, Ordering::SeqCst);
    let sent = tasks.join_all().await;
    assert!(freed > 0);
    two.retain(Retention { account: ACCOUNT, before, bytes_max: None }).await.unwrap();
    for (task, sent) in sent {
        let left: Vec<i64> = all(&two, device(task)).await.iter().map(number).collect();
        let kept = left.ends_with(&(1..=sent).collect::<Vec<_>>());
        assert!(kept, "newer ones went with the old: of {sent}, {left:?}");
        assert_eq!(left.len(), usize::try_from(sent).unwrap());
    }
    let total: usize = everything_left(&*two).await;
    assert_eq!(two.stats(Some(ACCOUNT)).messages, total as u64);
}

/// As `everything`, where retention took some.
async fn everything_left(history: &impl History) -> usize {
    let mut count = 0;
    for shard in 0..history.shards() {
        let mut cursor = Cursor { shard, seq: 0 };
        loop {
            let page = history.tail(cursor, 1_000).await.unwrap();
            let Some(last) = page.last() else { break };
            cursor = last.cursor();
            count += page.len();
        }
    }
    count
}
