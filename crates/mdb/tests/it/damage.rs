//! Damaged segments: what is hidden, what is not, and what is said.

use fieldline_contracts::{History, HistoryError, Query, Retention};
use fieldline_mdb::{Mdb, MdbConfig};
use fieldline_model::{AccountId, Cursor, Series, Timestamp};

use crate::common::{
    ACCOUNT, START, all, append, batch, device, message, numbered, numbers, open, small,
};
use crate::fake_disk::FakeDisk;

fn unmerged() -> MdbConfig {
    MdbConfig { merge_fan_in: 50, ..small() }
}

fn time(seconds: i64) -> Timestamp {
    START.plus_micros(seconds * 1_000_000)
}

/// A segment of devices 1 and 2 with 100 messages each, which came in turn.
async fn two_devices() -> FakeDisk {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), unmerged()).unwrap();
    let both = |n: i64| [1, 2].map(|number| message(device(number), n, n * n * 31 % 1_009));
    append(&store, (0..100).flat_map(both).collect()).await;
    store.seal().await.unwrap();
    disk
}

/// Two segments of device 1 with ten messages each, and ten in the log.
async fn two_segments() -> FakeDisk {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), unmerged()).unwrap();
    append(&store, batch(0, 10)).await;
    store.seal().await.unwrap();
    append(&store, batch(10, 20)).await;
    store.seal().await.unwrap();
    append(&store, batch(20, 30)).await;
    drop(store);
    disk
}

fn first_segment(disk: &FakeDisk) -> std::path::PathBuf {
    disk.find(".seg").into_iter().min().unwrap()
}

/// Damages a block of device 1 in the first segment, so that device 2 is readable.
async fn damage_block(disk: &FakeDisk) {
    let segment = first_segment(disk);
    for at in (8..disk.content(&segment).len()).step_by(24) {
        let trial = disk.after_power_cut(1);
        trial.tamper(&segment, |bytes| bytes[at] ^= 1);
        let store = open(&trial.disk(), unmerged()).unwrap();
        let reads = async |number| store.read(&Query::oldest(device(number), 1)).await.is_ok();
        if !reads(1).await && reads(2).await {
            return disk.tamper(&segment, |bytes| bytes[at] ^= 1);
        }
    }
    panic!("no byte is of device 1 alone");
}

/// Damages what the index of the first segment is found by.
fn damage_index(disk: &FakeDisk) {
    disk.tamper(&first_segment(disk), |bytes| {
        let at = bytes.len() - 3;
        bytes[at] ^= 1;
    });
}

/// Waits for what is found in the background.
async fn warnings(store: &Mdb) -> Vec<String> {
    for _ in 0..100 {
        if !store.warnings().is_empty() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    store.warnings()
}

/// An error of reading names the file, the times and the remedy, and no path.
fn assert_told(answer: Result<Vec<fieldline_model::Stored>, HistoryError>) {
    let Err(HistoryError::Corrupt(text)) = answer else { panic!("no damage: {answer:?}") };
    for part in ["`seg-000000000001.seg` of shard 0", "at byte ", "2027-01-15T", "backup"] {
        assert!(text.contains(part), "{part} is missing: {text}");
    }
    assert!(!text.contains("/store"), "a path is told: {text}");
}

#[tokio::test]
async fn a_damaged_block_hides_its_times_of_its_device_alone() {
    let disk = two_devices().await;
    damage_block(&disk).await;
    let store = open(&disk.disk(), unmerged()).unwrap();
    append(&store, (200..210).map(|n| message(device(1), n, n)).collect()).await;
    assert_told(store.read(&Query::oldest(device(1), 10)).await);
    assert_eq!(all(&store, device(2)).await.len(), 100, "another device is not read");
    let later = Query { from: time(100), ..Query::oldest(device(1), 100) };
    assert_eq!(store.read(&later).await.unwrap().len(), 10, "other times are not read");
    // A page ends before the damage; the one that would begin there says so.
    let page = store.read(&Query::newest(device(1), 100)).await.unwrap();
    assert_eq!(numbers(&page), (200..210).rev().collect::<Vec<_>>());
    let after = page.last().map(|last| (last.timestamp(), last.cursor()));
    assert_told(store.read(&Query { after, ..Query::newest(device(1), 100) }).await);
    let warnings = store.warnings();
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].contains("`seg-000000000001.seg` in shard 0"), "{warnings:?}");
    assert!(!warnings[0].contains("/store"), "a path is told: {warnings:?}");
    assert_eq!(store.problems(), Vec::<String>::new(), "it stores all the same");
}

#[tokio::test]
async fn a_damaged_page_of_the_index_hides_its_devices_alone() {
    let disk = FakeDisk::new();
    let config = MdbConfig { memtable_bytes_max: 1 << 20, wal_bytes_max: 1 << 20, ..unmerged() };
    let store = open(&disk.disk(), config).unwrap();
    append(&store, (0..1_000).map(|n| message(numbered(n), 1, 1)).collect()).await;
    store.seal().await.unwrap();
    drop(store);
    // The last page of series stands before a small one of shapes and the directory.
    disk.tamper(&first_segment(&disk), |bytes| {
        let end = bytes.len() - 16;
        let directory = u32::from_le_bytes(bytes[end..end + 4].try_into().unwrap()) as usize;
        bytes[end - directory - 200] ^= 1;
    });
    let store = open(&disk.disk(), small()).unwrap();
    let mut readable = 0;
    for n in 0..1_000 {
        readable += usize::from(store.read(&Query::oldest(numbered(n), 1)).await.is_ok());
    }
    assert!((500..999).contains(&readable), "{readable} devices are read");
    assert_eq!(warnings(&store).await.len(), 1);
}

#[tokio::test]
async fn a_damaged_index_hides_the_times_of_its_segment_alone() {
    let disk = two_segments().await;
    damage_index(&disk);
    let store = open(&disk.disk(), unmerged()).unwrap();
    assert!(warnings(&store).await[0].contains("`seg-000000000001.seg`"));
    let newest = store.read(&Query::newest(device(1), 25)).await.unwrap();
    assert_eq!(numbers(&newest), (10..30).rev().collect::<Vec<_>>());
    let after = newest.last().map(|last| (last.timestamp(), last.cursor()));
    assert_told(store.read(&Query { after, ..Query::newest(device(1), 25) }).await);
    assert_told(store.read(&Query::oldest(device(1), 5)).await);
    let later = Query { from: time(10), ..Query::oldest(device(1), 5) };
    assert_eq!(numbers(&store.read(&later).await.unwrap()), [10, 11, 12, 13, 14]);
    // Duplicates of what can be read are known, and so are all last values that can be read.
    assert!(append(&store, batch(10, 20)).await.iter().all(|receipt| receipt.duplicate));
    drop(store);
    let snapshot = disk.find(".snap").pop().unwrap();
    disk.tamper(&snapshot, |bytes| bytes[30] ^= 1);
    let store = open(&disk.disk(), unmerged()).unwrap();
    let mut count = 0;
    store.last_values(&mut |_, _, _, _| count += 1).await.unwrap();
    assert_eq!(count, 2);
    store.seal().await.unwrap();
}

#[tokio::test]
async fn the_tail_tells_a_gap_and_goes_on_behind_it() {
    let disk = two_devices().await;
    damage_block(&disk).await;
    let store = open(&disk.disk(), unmerged()).unwrap();
    append(&store, vec![message(device(1), 500, 1)]).await;
    let seqs = |page: &[fieldline_model::Stored]| {
        page.iter().map(|message| message.cursor().seq).collect::<Vec<_>>()
    };
    let at = |seq| Cursor { shard: 0, seq };
    for limit in [1_000, 7] {
        // As long as nobody decides, it is the same.
        for _ in 0..2 {
            let Err(HistoryError::Gap(gap)) = store.tail(at(0), limit).await else {
                panic!("messages behind damage were taken for the next")
            };
            assert_eq!((gap.from, gap.to), (at(1), at(199)));
            let text = gap.to_string();
            assert!(text.contains("seg-000000000001.seg") && text.contains("backup"), "{text}");
            assert!(!text.contains("/store"), "a path is told: {text}");
        }
        let (mut cursor, mut seen) = (at(0), Vec::new());
        while cursor < at(199) {
            let page = store.tail_over_damage(cursor, limit).await.unwrap();
            seen.extend(seqs(&page));
            cursor = page.last().unwrap().cursor();
        }
        loop {
            let page = store.tail(cursor, limit).await.unwrap();
            let Some(last) = page.last() else { break };
            seen.extend(seqs(&page));
            cursor = last.cursor();
        }
        // Of device 2 all, of device 1 what came later.
        assert_eq!(seen, (1..101).map(|n| n * 2).chain([201]).collect::<Vec<_>>());
    }
    assert_eq!(seqs(&store.tail(at(199), 10).await.unwrap()), [200, 201]);
}

#[tokio::test]
async fn the_tail_goes_up_to_the_damage() {
    let disk = two_segments().await;
    let second = disk.find(".seg").into_iter().max().unwrap();
    disk.tamper(&second, |bytes| bytes.truncate(bytes.len() - 1));
    let store = open(&disk.disk(), unmerged()).unwrap();
    let page = store.tail(Cursor::default(), 1_000).await.unwrap();
    assert_eq!(numbers(&page), (0..10).collect::<Vec<_>>());
    let next = store.tail(page[9].cursor(), 1_000).await;
    let Err(HistoryError::Gap(gap)) = next else { panic!("no gap: {next:?}") };
    assert_eq!((gap.from.seq, gap.to.seq), (11, 20));
    assert_eq!(numbers(&store.tail(gap.to, 5).await.unwrap()), [20, 21, 22, 23, 24]);
}

#[tokio::test]
async fn a_failure_that_passes_is_forgotten() {
    let disk = two_devices().await;
    let store = open(&disk.disk(), unmerged()).unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    disk.fail_reads(1);
    assert_told(store.read(&Query::oldest(device(1), 10)).await);
    assert_eq!(store.warnings().len(), 1);
    assert_eq!(all(&store, device(1)).await.len(), 100);
    assert_eq!(store.warnings(), Vec::<String>::new());
}

#[tokio::test]
async fn any_flipped_bit_of_a_segment_is_noticed_or_harmless() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), small()).unwrap();
    append(&store, batch(0, 60)).await;
    store.seal().await.unwrap();
    drop(store);
    let segment = disk.find(".seg").pop().unwrap();
    let expected: Vec<i64> = (0..60).collect();
    let length = disk.content(&segment).len();
    for at in 0..length {
        let disk = disk.after_power_cut(1);
        disk.tamper(&segment, |bytes| bytes[at] ^= 1 << (at % 8));
        let store = open(&disk.disk(), small()).unwrap();
        match store.read(&Query::oldest(device(1), 100)).await {
            Ok(messages) => assert_eq!(numbers(&messages), expected, "byte {at}"),
            Err(HistoryError::Corrupt(_)) => {}
            Err(other) => panic!("byte {at}: {other}"),
        }
    }
}

#[tokio::test]
async fn retention_passes_over_damage_and_drops_it_when_all_of_it_is_past() {
    let disk = FakeDisk::new();
    let store = open(&disk.disk(), unmerged()).unwrap();
    let other = AccountId::from_bytes([8; 16]);
    let theirs = Series { account: other, ..device(1) };
    append(&store, batch(0, 10)).await;
    append(&store, (0..10).map(|n| message(theirs, n, n)).collect()).await;
    store.seal().await.unwrap();
    append(&store, batch(10, 20)).await;
    store.seal().await.unwrap();
    drop(store);
    damage_index(&disk);
    let store = open(&disk.disk(), unmerged()).unwrap();
    let before = Some(time(1_000));
    let retain = async |account| {
        let retention = Retention { account, before, bytes_max: None };
        store.retain(retention).await.unwrap()
    };
    assert!(retain(ACCOUNT).await > 0, "what is sound must go");
    assert_eq!(store.stats(None).segments, 1, "of another account something is in it");
    assert!(retain(other).await > 0);
    assert_eq!(store.stats(None).segments, 0);
    assert_eq!(all(&store, device(1)).await.len(), 0);
}
