//! Log files that are torn, damaged, cut or missing: what a crash leaves, and what it cannot leave.

use std::path::PathBuf;

use fieldline_contracts::History;
use fieldline_mdb::MdbConfig;
use fieldline_model::{Accepted, Cursor, Value};

use crate::common::{
    START, append, batch, begun, device, message, numbers, open, params, reopened, said, tail,
};
use crate::fake_disk::FakeDisk;

/// Log files with so many groups of five messages each, and where the groups of the first end.
async fn logs_of(groups: &[i64]) -> (FakeDisk, Vec<PathBuf>, Vec<usize>) {
    let (disk, store) = begun(0).await;
    let (mut ends, mut next) = (Vec::new(), 0);
    for (at, count) in groups.iter().enumerate() {
        if at > 0 {
            // What follows a failed sync goes into a new file.
            disk.fail_syncs(1);
            assert!(store.append(batch(900, 901)).await.is_err());
        }
        for _ in 0..*count {
            append(&store, batch(next, next + 5)).await;
            next += 5;
            if at == 0 {
                ends.push(disk.content(&disk.find("wal-")[0]).len());
            }
        }
    }
    drop(store);
    let logs = disk.find("wal-");
    assert_eq!(logs.len(), groups.len());
    (disk, logs, ends)
}

/// The store opens with these messages, says once that a log is damaged, and again when it is
/// opened again.
async fn assert_told(disk: &FakeDisk, left: impl Iterator<Item = i64>) {
    let left: Vec<i64> = left.collect();
    for _ in 0..2 {
        let store = reopened(disk);
        assert_eq!(said(&store).await, left);
        assert_eq!(disk.find(".damaged").len(), 1, "what is damaged is not kept or marked");
        let warnings = store.warnings();
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains("1 damaged or lost log"), "{warnings:?}");
        assert!(!warnings[0].contains("/store"), "a path is told: {warnings:?}");
        assert_eq!(store.problems(), Vec::<String>::new(), "it stores all the same");
    }
}

#[tokio::test]
async fn a_torn_tail_is_cut_wherever_it_is_torn() {
    let (disk, logs, ends) = logs_of(&[2]).await;
    for torn in ends[0]..ends[1] {
        let disk = disk.after_power_cut(1);
        disk.tamper(&logs[0], |bytes| bytes.truncate(torn));
        let store = reopened(&disk);
        assert_eq!(said(&store).await, [0, 1, 2, 3, 4], "torn at {torn}");
        append(&store, batch(5, 7)).await;
        drop(store);
        let store = reopened(&disk);
        assert_eq!(said(&store).await, [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(store.warnings(), Vec::<String>::new(), "a crash is no damage");
    }
}

#[tokio::test]
async fn a_flipped_bit_in_the_log_keeps_what_precedes_and_what_follows_is_put_aside() {
    let (disk, logs, ends) = logs_of(&[3]).await;
    disk.tamper(&logs[0], |bytes| bytes[ends[0] + 20] ^= 4);
    assert_told(&disk, 0..5).await;
}

#[tokio::test]
async fn a_damaged_header_of_a_log_costs_no_message() {
    for at in 0..22 {
        let (disk, logs, _) = logs_of(&[3, 1]).await;
        disk.tamper(&logs[0], |bytes| bytes[at] ^= 1);
        assert_told(&disk, 0..20).await;
    }
}

#[tokio::test]
async fn a_log_that_ends_early_though_another_follows_is_told() {
    let (disk, logs, ends) = logs_of(&[3, 1]).await;
    assert_eq!(reopened(&disk).warnings(), Vec::<String>::new());
    disk.tamper(&logs[0], |bytes| bytes.truncate(ends[1] - 3));
    assert_told(&disk, (0..5).chain(15..20)).await;
}

/// Cut between two groups it looks whole: that something is missing only the next file tells.
#[tokio::test]
async fn a_log_that_lost_whole_groups_at_its_end_is_told() {
    let (whole, logs, ends) = logs_of(&[3, 1]).await;
    for (to, left) in [(0, 0), (22, 0), (ends[0], 5), (ends[1], 10)] {
        let disk = whole.after_power_cut(1);
        disk.tamper(&logs[0], |bytes| bytes.truncate(to));
        assert_told(&disk, (0..left).chain(15..20)).await;
        // The numbers that went stay out of use.
        let next = append(&reopened(&disk), vec![message(device(2), 1, 1)]).await;
        assert!(next[0].cursor.seq > 20, "{next:?}");
    }
}

#[tokio::test]
async fn a_log_that_is_missing_between_others_is_told() {
    for (missing, gone) in [(0, 0..5), (1, 5..10)] {
        let (disk, logs, _) = logs_of(&[1, 1, 1]).await;
        disk.disk().remove(&logs[missing]).unwrap();
        assert_told(&disk, (0..15).filter(|n| !gone.contains(n))).await;
    }
}

/// Restarts, full disks and seals leave no file shorter than the next one says.
#[tokio::test]
async fn logs_that_followed_each_other_soundly_are_not_told() {
    let disk = FakeDisk::new();
    for round in 0..20_i64 {
        let store = reopened(&disk);
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
        let store = reopened(&next);
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
    let (disk, logs, ends) = logs_of(&[3]).await;
    let seen = Cursor { shard: 0, seq: 15 };
    disk.tamper(&logs[0], |bytes| bytes[ends[0] + 20] ^= 4);
    let store = reopened(&disk);
    append(&store, batch(20, 23)).await;
    assert_eq!(numbers(&tail(&store, seen, 2).await), [20, 21, 22]);
    assert_eq!(numbers(&tail(&store, Cursor::default(), 2).await), [0, 1, 2, 3, 4, 20, 21, 22]);
}

/// A frame's length that is damaged hides where the next begins: it is looked for.
#[tokio::test]
async fn a_sound_frame_far_behind_a_damaged_length_is_found() {
    let disk = FakeDisk::new();
    let config = MdbConfig::default;
    let store = open(&disk.disk(), config()).unwrap();
    let text = Value::from("fieldline".repeat(20_000));
    let large = params([("text", text)]);
    let at = START.plus_micros(1);
    append(&store, vec![Accepted::own(device(1), at, large)]).await;
    append(&store, batch(1, 5)).await;
    drop(store);
    let log = disk.find("wal-").pop().unwrap();
    disk.tamper(&log, |bytes| bytes[23] ^= 8);
    let store = open(&disk.disk(), config()).unwrap();
    assert_eq!(disk.find(".damaged").len(), 1, "acknowledged bytes were thrown away");
    assert_eq!(store.warnings().len(), 1);
}
