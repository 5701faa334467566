//! What is said of a store that is not opened.

use fieldline_contracts::History;
use fieldline_mdb::{Mdb, MdbConfig, inspect};

use crate::common::{append, clock, device, message, small};

#[tokio::test]
async fn a_look_from_outside_finds_what_is_damaged_or_missing() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(inspect(dir.path()), Vec::<String>::new(), "nothing is there yet");
    let config = MdbConfig { merge_fan_in: 50, ..small() };
    let store = Mdb::open(dir.path(), config, clock()).unwrap();
    for n in 0..3 {
        append(&store, vec![message(device(1), n, n)]).await;
        store.seal().await.unwrap();
    }
    append(&store, vec![message(device(1), 10, 10)]).await;
    assert_eq!(inspect(dir.path()), Vec::<String>::new(), "beside a running store");
    store.close().await.unwrap();
    assert_eq!(inspect(dir.path()), Vec::<String>::new());
    let shard = dir.path().join("shard-00");
    let named = |part: &str| {
        let entries = std::fs::read_dir(&shard).unwrap().map(|entry| entry.unwrap().path());
        let mut named: Vec<_> =
            entries.filter(|path| path.to_string_lossy().contains(part)).collect();
        named.sort();
        named
    };
    let told = |part: &str| {
        let found = inspect(dir.path());
        assert!(found.iter().any(|text| text.contains(part)), "{part} is missing: {found:?}");
        found.len()
    };
    let segments = named(".seg");
    let mut bytes = std::fs::read(&segments[0]).unwrap();
    let at = bytes.len() - 3;
    bytes[at] ^= 1;
    std::fs::write(&segments[0], bytes).unwrap();
    assert_eq!(told("`seg-000000000001.seg`"), 1);
    std::fs::remove_file(&segments[1]).unwrap();
    assert_eq!(told("cannot be opened"), 2);
    let log = named("wal-").pop().unwrap();
    std::fs::rename(&log, shard.join("wal-000000000099.log")).unwrap();
    assert_eq!(told("to 98 of shard 0 are missing"), 3);
    std::fs::write(shard.join("wal-000000000050.log.damaged"), []).unwrap();
    assert_eq!(told("1 damaged or lost log"), 4);
    std::fs::write(shard.join("MANIFEST"), "no").unwrap();
    assert_eq!(told("its manifest"), 1);
}
