//! Directories that earlier formats left are opened and read.

use std::path::Path;

use fieldline_contracts::History;
use fieldline_mdb::{Mdb, MdbConfig};
use fieldline_model::Cursor;

use crate::common::{all, append, clock, device, message, numbers, small, tail};

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// Devices 1 to 3 with 120 messages each: two segments whose index is one piece, and a log.
#[tokio::test]
async fn the_first_format_is_read_and_becomes_the_present_one() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/format-1");
    let dir = tempfile::tempdir().unwrap();
    copy(&fixture, dir.path());
    let config = MdbConfig { merge_fan_in: 50, ..small() };
    let expected: Vec<i64> = (0..120).map(|n| n * n % 97).collect();
    let batch = |number| (0..120).map(|n| message(device(number), n, n * n % 97)).collect();
    let store = Mdb::open(dir.path(), config, clock()).unwrap();
    assert_eq!(store.stats(None).segments, 2);
    for number in 1..4 {
        assert_eq!(numbers(&all(&store, device(number)).await), expected);
        assert!(append(&store, batch(number)).await.iter().all(|receipt| receipt.duplicate));
    }
    assert_eq!(tail(&store, Cursor::default(), 50).await.len(), 360);
    store.close().await.unwrap();
    let store = Mdb::open(dir.path(), small(), clock()).unwrap();
    store.seal().await.unwrap();
    store.merge().await.unwrap();
    assert_eq!(store.stats(None).segments, 1);
    for number in 1..4 {
        assert_eq!(numbers(&all(&store, device(number)).await), expected);
    }
    store.close().await.unwrap();
    let manifest = std::fs::read_to_string(dir.path().join("shard-00/MANIFEST")).unwrap();
    assert!(manifest.contains("\"format\":2"), "an earlier program would read it: {manifest}");
}
