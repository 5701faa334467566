//! Single faults, one by one, with what they must lead to.

use std::sync::Arc;

use fieldline_contracts::{History, HistoryError};
use fieldline_mdb::{Mdb, OpenError};
use fieldline_model::Cursor;

use crate::common::{all, append, clock, device, message, numbers, open, small, tail};
use crate::fake_disk::FakeDisk;

fn batch(from: i64, to: i64) -> Vec<fieldline_model::Accepted> {
    (from..to).map(|n| message(device(1), n, n)).collect()
}

#[tokio::test]
async fn a_torn_tail_is_cut_wherever_it_is_torn() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    append(&store, batch(0, 5)).await;
    let log = disk.find("wal-").pop().unwrap();
    let whole = disk.content(&log).len();
    append(&store, batch(5, 10)).await;
    let end = disk.content(&log).len();
    drop(store);
    for torn in whole..end {
        let disk = disk.after_power_cut(1);
        disk.tamper(&log, |bytes| bytes.truncate(torn));
        let store = open(&disk.disk(), small()).unwrap();
        assert_eq!(numbers(&all(&store, device(1)).await), [0, 1, 2, 3, 4], "torn at {torn}");
        append(&store, batch(5, 7)).await;
        drop(store);
        let store = open(&disk.disk(), small()).unwrap();
        assert_eq!(numbers(&all(&store, device(1)).await), [0, 1, 2, 3, 4, 5, 6]);
    }
}

#[tokio::test]
async fn a_flipped_bit_in_the_log_keeps_what_precedes_and_what_follows_is_put_aside() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    append(&store, batch(0, 5)).await;
    let log = disk.find("wal-").pop().unwrap();
    let first = disk.content(&log).len();
    append(&store, batch(5, 10)).await;
    append(&store, batch(10, 15)).await;
    drop(store);
    disk.tamper(&log, |bytes| bytes[first + 20] ^= 4);
    let store = open(&disk.disk(), small()).unwrap();
    assert_eq!(numbers(&all(&store, device(1)).await), [0, 1, 2, 3, 4]);
    assert_eq!(disk.find(".damaged").len(), 1, "acknowledged bytes were thrown away");
}

#[tokio::test]
async fn a_full_disk_refuses_and_recovers_without_restart() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    append(&store, batch(0, 5)).await;
    for space in [0, 1, 50, 150] {
        disk.set_space(Some(space));
        let refused = store.append(batch(100, 110)).await;
        assert!(matches!(refused, Err(HistoryError::Full(_))), "{refused:?}");
        assert_eq!(all(&store, device(1)).await.len(), 5, "refused messages are visible");
    }
    disk.set_space(None);
    let receipts = append(&store, batch(5, 10)).await;
    assert!(receipts.iter().all(|r| !r.duplicate));
    drop(store);
    let store = open(&disk.disk(), small()).unwrap();
    assert_eq!(numbers(&all(&store, device(1)).await), (0..10).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_failed_sync_refuses_and_goes_on_in_a_new_file() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    append(&store, batch(0, 5)).await;
    disk.fail_syncs(1);
    let refused = store.append(batch(5, 10)).await;
    assert!(matches!(refused, Err(HistoryError::Failed(_))), "{refused:?}");
    append(&store, batch(10, 15)).await;
    assert_eq!(disk.find("wal-").len(), 2, "a file whose sync failed is written no more");
    let expected: Vec<i64> = (0..5).chain(10..15).collect();
    assert_eq!(numbers(&all(&store, device(1)).await), expected);
    let disk = disk.after_power_cut(3);
    drop(store);
    let store = open(&disk.disk(), small()).unwrap();
    assert_eq!(numbers(&all(&store, device(1)).await), expected);
}

#[tokio::test]
async fn a_log_that_cannot_be_cut_stays_refused_until_it_can() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    append(&store, batch(0, 5)).await;
    disk.fail_syncs(1);
    disk.fail_cuts(2);
    for _ in 0..2 {
        let refused = store.append(batch(5, 10)).await;
        assert!(matches!(refused, Err(HistoryError::Failed(_))), "{refused:?}");
    }
    append(&store, batch(10, 15)).await;
    drop(store);
    let disk = disk.after_power_cut(3);
    let store = open(&disk.disk(), small()).unwrap();
    let expected: Vec<i64> = (0..5).chain(10..15).collect();
    assert_eq!(numbers(&all(&store, device(1)).await), expected);
}

/// A group whose sync failed and which could not be cut off is seen again by the next
/// process, from the system's memory. Once a sender is told that it is there, it must be.
#[tokio::test]
async fn what_is_found_again_after_a_failed_sync_is_made_durable() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    append(&store, batch(0, 5)).await;
    disk.fail_syncs(1);
    disk.fail_cuts(1);
    assert!(store.append(batch(5, 10)).await.is_err());
    drop(store);
    let store = open(&disk.disk(), small()).unwrap();
    append(&store, batch(5, 10)).await;
    let disk = disk.after_power_cut(3);
    drop(store);
    let store = open(&disk.disk(), small()).unwrap();
    assert_eq!(numbers(&all(&store, device(1)).await), (0..10).collect::<Vec<_>>());
}

#[tokio::test]
async fn retention_frees_a_full_disk() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    append(&store, batch(0, 500)).await;
    store.seal().await.unwrap();
    append(&store, batch(500, 510)).await;
    disk.set_space(Some(0));
    assert!(matches!(store.append(batch(600, 700)).await, Err(HistoryError::Full(_))));
    let account = crate::common::ACCOUNT;
    let before = Some(crate::common::START.plus_micros(500_000_000));
    let freed = store.retain(fieldline_contracts::Retention { account, before, bytes_max: None });
    assert!(freed.await.unwrap() > 0);
    append(&store, batch(600, 610)).await;
    assert_eq!(all(&store, device(1)).await.len(), 20);
}

#[tokio::test]
async fn a_lost_snapshot_is_made_anew() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    append(&store, batch(0, 50)).await;
    store.seal().await.unwrap();
    drop(store);
    let snapshot = disk.find(".snap").pop().unwrap();
    disk.tamper(&snapshot, |bytes| bytes[30] ^= 1);
    let store = open(&disk.disk(), small()).unwrap();
    let mut values = Vec::new();
    store
        .last_values(&mut |_, name, value, _| values.push((name.clone(), value.clone())))
        .await
        .unwrap();
    assert_eq!(values.len(), 2);
    assert!(append(&store, batch(0, 50)).await.iter().all(|r| r.duplicate));
    append(&store, batch(50, 51)).await;
    store.seal().await.unwrap();
    drop(store);
    let store = open(&disk.disk(), small()).unwrap();
    let mut newest = None;
    let mut visit = |_, name: &fieldline_model::ParamName, value: &fieldline_model::Value, _| {
        if name.as_str() == "n" {
            newest = value.as_i64();
        }
    };
    store.last_values(&mut visit).await.unwrap();
    assert_eq!(newest, Some(50));
}

#[tokio::test]
async fn a_damaged_manifest_stops_the_start_and_says_so() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    append(&store, batch(0, 5)).await;
    store.seal().await.unwrap();
    drop(store);
    let manifest = disk.find("MANIFEST").pop().unwrap();
    disk.tamper(&manifest, |bytes| bytes[60] ^= 1);
    match open(&disk.disk(), small()) {
        Err(OpenError::Damaged { path, .. }) => assert_eq!(path, manifest),
        other => panic!("expected damage, got {:?}", other.map(|_| ())),
    }
}

#[tokio::test]
async fn one_store_is_opened_once() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    assert!(matches!(open(&disk.disk(), small()), Err(OpenError::Locked { .. })));
    store.close().await.unwrap();
    let _again = open(&disk.disk(), small()).unwrap();
    assert!(matches!(store.append(batch(0, 1)).await, Err(HistoryError::Closed)));
}

#[tokio::test]
async fn a_power_cut_at_any_step_of_sealing_and_merging_loses_nothing() {
    for step in 0.. {
        let disk = FakeDisk::new();
        let store = open(&disk.disk(), small()).unwrap();
        append(&store, batch(0, 30)).await;
        store.seal().await.unwrap();
        append(&store, batch(20, 60)).await;
        disk.cut_power_after(step);
        let sealed = store.seal().await.is_ok() && store.merge().await.is_ok();
        let done = sealed && !disk.is_dead();
        drop(store);
        for seed in 0..4 {
            let disk = disk.after_power_cut(seed);
            let store = open(&disk.disk(), small()).unwrap();
            let expected: Vec<i64> = (0..60).collect();
            assert_eq!(
                numbers(&all(&store, device(1)).await),
                expected,
                "step {step}, seed {seed}"
            );
            assert_eq!(
                tail(&store, Cursor::default(), 7).await.len(),
                60,
                "step {step}, seed {seed}"
            );
            let again = append(&store, batch(0, 60)).await;
            assert!(again.iter().all(|r| r.duplicate), "step {step}, seed {seed}");
        }
        if done {
            assert!(step > 10, "only {step} steps were tried");
            break;
        }
    }
}

#[tokio::test]
async fn any_sync_that_fails_while_sealing_and_merging_loses_nothing() {
    for step in 0.. {
        let disk = FakeDisk::new();
        let store = open(&disk.disk(), small()).unwrap();
        append(&store, batch(0, 30)).await;
        store.seal().await.unwrap();
        append(&store, batch(20, 60)).await;
        let before = disk.syncs();
        disk.fail_sync_after(step);
        // One of these fails, and all is tried again by itself.
        drop(store.seal().await);
        drop(store.merge().await);
        let untouched = disk.syncs() - before < step;
        for seed in 0..4 {
            let disk = disk.after_power_cut(seed);
            let store = open(&disk.disk(), small()).unwrap();
            let expected: Vec<i64> = (0..60).collect();
            assert_eq!(
                numbers(&all(&store, device(1)).await),
                expected,
                "step {step}, seed {seed}"
            );
        }
        drop(store);
        if untouched {
            assert!(step > 5, "only {step} syncs were tried");
            break;
        }
    }
}

/// With root's rights, on a file system of 1 MiB; without, the fake disk above stands for it.
#[tokio::test]
#[allow(clippy::print_stdout, reason = "who runs it should know what was not tested")]
async fn a_real_full_disk_refuses_and_recovers() {
    let dir = tempfile::tempdir().unwrap();
    let mount = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
        .arg(dir.path())
        .output();
    if !mount.is_ok_and(|output| output.status.success()) {
        println!("NOT RUN: mounting a small file system takes root's rights");
        return;
    }
    let result = tokio::spawn(fill(dir.path().to_owned())).await;
    let unmount = std::process::Command::new("umount").arg(dir.path()).status();
    assert!(unmount.unwrap().success());
    result.unwrap();
}

async fn fill(dir: std::path::PathBuf) {
    let store = Mdb::open(dir.join("store"), small(), clock()).unwrap();
    let store = Arc::new(store);
    let ballast = dir.join("ballast");
    std::fs::write(&ballast, vec![1; 600 << 10]).unwrap();
    let mut stored = 0;
    let refused = loop {
        match store.append(batch(stored, stored + 50)).await {
            Ok(_) => stored += 50,
            Err(error) => break error,
        }
        assert!(stored < 1_000_000, "the disk never fills");
    };
    assert!(matches!(refused, HistoryError::Full(_)), "{refused:?}");
    assert!(matches!(store.append(batch(stored, stored + 50)).await, Err(HistoryError::Full(_))));
    assert_eq!(store.stats(None).messages, stored as u64);
    std::fs::remove_file(&ballast).unwrap();
    for _ in 0..50 {
        // Sealing, which freed nothing while the disk was full, has to catch up first.
        match store.append(batch(stored, stored + 50)).await {
            Ok(_) => {
                stored += 50;
                break;
            }
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(100)).await,
        }
    }
    store.close().await.unwrap();
    let store = Mdb::open(dir.join("store"), small(), clock()).unwrap();
    let mut count = 0;
    let mut cursor = Cursor::default();
    loop {
        let page = store.tail(cursor, 5_000).await.unwrap();
        let Some(last) = page.last() else { break };
        cursor = last.cursor();
        count += page.len() as i64;
    }
    assert_eq!(count, stored);
    assert!(stored > 50);
}

/// Three groups in the first log file, one in the second, and where the groups of the first end.
async fn two_logs() -> (FakeDisk, Vec<std::path::PathBuf>, Vec<usize>) {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    let mut ends = Vec::new();
    for n in 0..3 {
        append(&store, batch(n * 5, n * 5 + 5)).await;
        ends.push(disk.content(&disk.find("wal-")[0]).len());
    }
    disk.fail_syncs(1);
    assert!(store.append(batch(90, 91)).await.is_err());
    append(&store, batch(15, 20)).await;
    drop(store);
    let logs = disk.find("wal-");
    assert_eq!(logs.len(), 2);
    (disk, logs, ends)
}

#[tokio::test]
async fn a_damaged_header_of_a_log_costs_no_message() {
    for at in 0..22 {
        let (disk, logs, _) = two_logs().await;
        disk.tamper(&logs[0], |bytes| bytes[at] ^= 1);
        for _ in 0..2 {
            let store = open(&disk.disk(), small()).unwrap();
            assert_eq!(numbers(&all(&store, device(1)).await), (0..20).collect::<Vec<_>>());
            assert_eq!(disk.find(".damaged").len(), 1);
            let warnings = store.warnings();
            assert!(warnings[0].contains("1 damaged or lost log"), "{warnings:?}");
            assert_eq!(store.problems(), Vec::<String>::new(), "it stores all the same");
        }
    }
}

#[tokio::test]
async fn a_log_that_ends_early_though_another_follows_is_told() {
    let (disk, logs, ends) = two_logs().await;
    assert_eq!(open(&disk.disk(), small()).unwrap().warnings(), Vec::<String>::new());
    disk.tamper(&logs[0], |bytes| bytes.truncate(ends[1] - 3));
    let store = open(&disk.disk(), small()).unwrap();
    let left: Vec<i64> = (0..5).chain(15..20).collect();
    assert_eq!(numbers(&all(&store, device(1)).await), left);
    assert_eq!(disk.find(".damaged").len(), 1);
    assert_eq!(store.warnings().len(), 1);
    assert!(!store.warnings()[0].contains("/store"), "a path is told");
}

#[tokio::test]
async fn a_log_that_is_missing_between_others_is_told() {
    let (disk, logs, _) = two_logs().await;
    disk.disk().remove(&logs[0]).unwrap();
    for _ in 0..2 {
        let store = open(&disk.disk(), small()).unwrap();
        assert_eq!(numbers(&all(&store, device(1)).await), [15, 16, 17, 18, 19]);
        assert_eq!(store.warnings().len(), 1);
    }
}

/// Cut between two groups it looks whole: that something is missing only the next file tells.
#[tokio::test]
async fn a_log_that_lost_whole_groups_at_its_end_is_told() {
    for cut in 0..4 {
        let (disk, logs, ends) = two_logs().await;
        let to = [0, 22, ends[0], ends[1]][cut];
        disk.tamper(&logs[0], |bytes| bytes.truncate(to));
        let left: Vec<i64> = (0..[0, 0, 5, 10][cut]).chain(15..20).collect();
        for _ in 0..2 {
            let store = open(&disk.disk(), small()).unwrap();
            assert_eq!(numbers(&all(&store, device(1)).await), left);
            assert_eq!(disk.find(".damaged").len(), 1);
            let warnings = store.warnings();
            assert_eq!(warnings.len(), 1, "{warnings:?}");
            // The numbers that went stay out of use.
            let next = append(&store, vec![message(device(2), 1, 1)]).await[0].cursor;
            assert!(next.seq > 20, "{next:?}");
        }
    }
}

#[tokio::test]
async fn a_log_that_is_missing_in_the_middle_is_told() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    for n in 0..3 {
        append(&store, batch(n * 5, n * 5 + 5)).await;
        disk.fail_syncs(1);
        assert!(store.append(batch(90, 91)).await.is_err());
    }
    drop(store);
    let logs = disk.find("wal-");
    assert_eq!(logs.len(), 3);
    disk.disk().remove(&logs[1]).unwrap();
    for _ in 0..2 {
        let store = open(&disk.disk(), small()).unwrap();
        let left: Vec<i64> = (0..5).chain(10..15).collect();
        assert_eq!(numbers(&all(&store, device(1)).await), left);
        let warnings = store.warnings();
        assert!(warnings[0].contains("1 damaged or lost log"), "{warnings:?}");
        assert_eq!(store.problems(), Vec::<String>::new());
    }
}

/// Restarts, full disks and seals leave no file shorter than the next one says.
#[tokio::test]
async fn logs_that_followed_each_other_soundly_are_not_told() {
    let disk = FakeDisk::new();
    for round in 0..20_i64 {
        let store = open(&disk.disk(), small()).unwrap();
        assert_eq!(store.warnings(), Vec::<String>::new(), "round {round}");
        append(&store, batch(round * 10, round * 10 + 5)).await;
        match round % 5 {
            0 => disk.fail_syncs(1),
            1 => disk.set_space(Some(60)),
            2 => {
                disk.fail_syncs(1);
                disk.fail_cuts(1);
            }
            3 => store.seal().await.unwrap(),
            _ => disk.cut_power_after(1),
        }
        drop(store.append(batch(round * 10 + 5, round * 10 + 8)).await);
        disk.set_space(None);
        drop(store.append(batch(round * 10 + 8, round * 10 + 10)).await);
        drop(store);
        let next = disk.after_power_cut(round.unsigned_abs());
        let store = open(&next.disk(), small()).unwrap();
        assert_eq!(store.warnings(), Vec::<String>::new(), "round {round}");
        drop(store);
        if disk.is_dead() {
            // The same files, with power again.
            disk.restore_power();
        }
    }
}

#[tokio::test]
async fn numbers_of_messages_that_were_lost_are_not_given_again() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    append(&store, batch(0, 5)).await;
    let log = disk.find("wal-").pop().unwrap();
    let first = disk.content(&log).len();
    append(&store, batch(5, 10)).await;
    let seen = append(&store, batch(10, 15)).await.last().unwrap().cursor;
    drop(store);
    disk.tamper(&log, |bytes| bytes[first + 20] ^= 4);
    let store = open(&disk.disk(), small()).unwrap();
    append(&store, batch(20, 23)).await;
    assert_eq!(numbers(&tail(&store, seen, 2).await), [20, 21, 22]);
    assert_eq!(numbers(&tail(&store, Cursor::default(), 2).await), [0, 1, 2, 3, 4, 20, 21, 22]);
}

/// A frame's length that is damaged hides where the next begins: it is looked for.
#[tokio::test]
async fn a_sound_frame_far_behind_a_damaged_length_is_found() {
    let disk = FakeDisk::new();
    let config = fieldline_mdb::MdbConfig::default;
    let store = open(&disk.disk(), config()).unwrap();
    let text = fieldline_model::Value::from("fieldline".repeat(20_000));
    let large = crate::common::params([("text", text)]);
    let at = crate::common::START.plus_micros(1);
    append(&store, vec![fieldline_model::Accepted::own(device(1), at, large)]).await;
    append(&store, batch(1, 5)).await;
    drop(store);
    let log = disk.find("wal-").pop().unwrap();
    disk.tamper(&log, |bytes| bytes[23] ^= 8);
    let store = open(&disk.disk(), config()).unwrap();
    assert_eq!(disk.find(".damaged").len(), 1, "acknowledged bytes were thrown away");
    assert_eq!(store.warnings().len(), 1);
}

#[tokio::test]
async fn what_keeps_the_store_from_storing_is_told() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    append(&store, batch(0, 5)).await;
    disk.set_space(Some(0));
    assert!(store.append(batch(5, 10)).await.is_err());
    let problems = store.problems();
    assert!(problems[0].contains("no space is left"), "{problems:?}");
    disk.set_space(None);
    append(&store, batch(5, 10)).await;
    assert_eq!(store.problems(), Vec::<String>::new());
}

#[tokio::test]
async fn closing_waits_for_retention_and_nothing_is_changed_later() {
    for wait in 0..20 {
        let disk = FakeDisk::new();
        let store = Arc::new(open(&disk.disk(), small()).unwrap());
        for n in 0..10 {
            append(&store, batch(n * 50, n * 50 + 50)).await;
            store.seal().await.unwrap();
        }
        let retaining = store.clone();
        let task = tokio::spawn(async move {
            let before = Some(crate::common::START.plus_micros(333_000_000));
            let account = crate::common::ACCOUNT;
            let retention = fieldline_contracts::Retention { account, before, bytes_max: None };
            (retaining.retain(retention).await, retaining.merge().await)
        });
        tokio::time::sleep(std::time::Duration::from_micros(wait * 300)).await;
        store.close().await.unwrap();
        let files = |disk: &FakeDisk| {
            disk.paths().into_iter().map(|path| (disk.content(&path), path)).collect::<Vec<_>>()
        };
        let closed = files(&disk);
        drop(task.await.unwrap());
        assert!(files(&disk) == closed, "files were changed after the store was closed");
        drop(store);
        assert!(files(&disk) == closed);
        let _again = open(&disk.disk(), small()).unwrap();
    }
}
