//! Single faults of disk and process, one by one, with what they must lead to.

use std::sync::Arc;

use fieldline_contracts::{History, HistoryError, Retention};
use fieldline_mdb::{Mdb, OpenError};
use fieldline_model::Cursor;

use crate::common::{
    ACCOUNT, START, all, append, batch, begun, clock, device, open, reopened, said, small, tail,
};
use crate::fake_disk::FakeDisk;

fn listed(numbers: impl Iterator<Item = i64>) -> Vec<i64> {
    numbers.collect()
}

/// What a power cut leaves of the disk holds this, and all of it is known as duplicates.
async fn assert_left(disk: &FakeDisk, seed: u64, expected: &[i64], of: &str) {
    let store = reopened(&disk.after_power_cut(seed));
    assert_eq!(said(&store).await, expected, "{of}, seed {seed}");
    let in_tail = tail(&store, Cursor::default(), 7).await.len();
    assert_eq!(in_tail, expected.len(), "{of}, seed {seed}");
    let again = expected.iter().flat_map(|n| batch(*n, n + 1)).collect();
    assert!(append(&store, again).await.iter().all(|r| r.duplicate), "{of}, seed {seed}");
}

#[tokio::test]
async fn a_full_disk_refuses_and_recovers_without_restart() {
    let (disk, store) = begun(5).await;
    for space in [0, 1, 50, 150] {
        disk.set_space(Some(space));
        let refused = store.append(batch(100, 110)).await;
        assert!(matches!(refused, Err(HistoryError::Full(_))), "{refused:?}");
        assert_eq!(said(&store).await.len(), 5, "refused messages are visible");
    }
    disk.set_space(None);
    let receipts = append(&store, batch(5, 10)).await;
    assert!(receipts.iter().all(|r| !r.duplicate));
    drop(store);
    assert_eq!(said(&reopened(&disk)).await, listed(0..10));
}

/// Appends while `syncs` syncs and `cuts` cuts fail are refused, then they go on.
async fn refused_and_gone_on(syncs: u32, cuts: u32, refusals: u32) -> FakeDisk {
    let (disk, store) = begun(5).await;
    disk.fail_syncs(syncs);
    disk.fail_cuts(cuts);
    for _ in 0..refusals {
        let refused = store.append(batch(5, 10)).await;
        assert!(matches!(refused, Err(HistoryError::Failed(_))), "{refused:?}");
    }
    append(&store, batch(10, 15)).await;
    let expected = listed((0..5).chain(10..15));
    assert_eq!(said(&store).await, expected);
    assert_left(&disk, 3, &expected, "after a refusal").await;
    disk
}

#[tokio::test]
async fn a_failed_sync_refuses_and_goes_on_in_a_new_file() {
    let disk = refused_and_gone_on(1, 0, 1).await;
    assert_eq!(disk.find("wal-").len(), 2, "a file whose sync failed is written no more");
}

#[tokio::test]
async fn a_log_that_cannot_be_cut_stays_refused_until_it_can() {
    refused_and_gone_on(1, 2, 2).await;
}

/// A group whose sync failed and which could not be cut off is seen again by the next
/// process, from the system's memory. Once a sender is told that it is there, it must be.
#[tokio::test]
async fn what_is_found_again_after_a_failed_sync_is_made_durable() {
    let (disk, store) = begun(5).await;
    disk.fail_syncs(1);
    disk.fail_cuts(1);
    assert!(store.append(batch(5, 10)).await.is_err());
    drop(store);
    let store = reopened(&disk);
    append(&store, batch(5, 10)).await;
    assert_left(&disk, 3, &listed(0..10), "after it was found").await;
}

/// Sealing and merging with a fault at every step; `fault` says whether there was one.
async fn at_every_step(steps_min: u64, fault: impl AsyncFn(&FakeDisk, &Mdb, u64) -> bool) {
    for step in 0.. {
        let (disk, store) = begun(30).await;
        store.seal().await.unwrap();
        append(&store, batch(20, 60)).await;
        let was_one = fault(&disk, &store, step).await;
        // The faults are over, as far as the next process is concerned.
        for seed in 0..4 {
            assert_left(&disk, seed, &listed(0..60), &format!("step {step}")).await;
        }
        drop(store);
        if !was_one {
            assert!(step > steps_min, "only {step} steps were tried");
            return;
        }
    }
}

#[tokio::test]
async fn a_power_cut_at_any_step_of_sealing_and_merging_loses_nothing() {
    at_every_step(10, async |disk, store, step| {
        disk.cut_power_after(step);
        let sealed = store.seal().await.is_ok() && store.merge().await.is_ok();
        !sealed || disk.is_dead()
    })
    .await;
}

#[tokio::test]
async fn any_sync_that_fails_while_sealing_and_merging_loses_nothing() {
    at_every_step(5, async |disk, store, step| {
        let before = disk.syncs();
        disk.fail_sync_after(step);
        // One of these fails, and all is tried again by itself.
        drop(store.seal().await);
        drop(store.merge().await);
        disk.syncs() - before >= step
    })
    .await;
}

#[tokio::test]
async fn retention_frees_a_full_disk() {
    let (disk, store) = begun(500).await;
    store.seal().await.unwrap();
    append(&store, batch(500, 510)).await;
    disk.set_space(Some(0));
    assert!(matches!(store.append(batch(600, 700)).await, Err(HistoryError::Full(_))));
    let account = ACCOUNT;
    let before = Some(START.plus_micros(500_000_000));
    let freed = store.retain(Retention { account, before, bytes_max: None });
    assert!(freed.await.unwrap() > 0);
    append(&store, batch(600, 610)).await;
    assert_eq!(all(&store, device(1)).await.len(), 20);
}

#[tokio::test]
async fn a_lost_snapshot_is_made_anew() {
    let (disk, store) = begun(50).await;
    store.seal().await.unwrap();
    drop(store);
    let snapshot = disk.find(".snap").pop().unwrap();
    disk.tamper(&snapshot, |bytes| bytes[30] ^= 1);
    let store = reopened(&disk);
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
    let store = reopened(&disk);
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
    let (disk, store) = begun(5).await;
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
    let (disk, store) = begun(0).await;
    assert!(matches!(open(&disk.disk(), small()), Err(OpenError::Locked { .. })));
    store.close().await.unwrap();
    let _again = reopened(&disk);
    assert!(matches!(store.append(batch(0, 1)).await, Err(HistoryError::Closed)));
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

#[tokio::test]
async fn what_keeps_the_store_from_storing_is_told() {
    let (disk, store) = begun(5).await;
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
        let store = Arc::new(reopened(&disk));
        for n in 0..10 {
            append(&store, batch(n * 50, n * 50 + 50)).await;
            store.seal().await.unwrap();
        }
        let retaining = store.clone();
        let task = tokio::spawn(async move {
            let before = Some(START.plus_micros(333_000_000));
            let account = ACCOUNT;
            let retention = Retention { account, before, bytes_max: None };
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
        let _again = reopened(&disk);
    }
}
