//! What is said of a store that is not opened.

use fieldline_contracts::History;
use fieldline_mdb::{Depth, Mdb, MdbConfig};

use crate::common::{append, clock, device, message, small};

#[tokio::test]
async fn a_look_from_outside_finds_what_is_damaged_or_missing() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(
        fieldline_mdb::inspect(dir.path(), Depth::Blocks),
        Vec::<String>::new(),
        "nothing is there yet"
    );
    let config = MdbConfig { merge_fan_in: 50, ..small() };
    let store = Mdb::open(dir.path(), config, clock()).unwrap();
    for n in 0..3 {
        append(&store, vec![message(device(1), n, n)]).await;
        store.seal().await.unwrap();
    }
    append(&store, vec![message(device(1), 10, 10)]).await;
    append(&store, vec![message(device(1), 11, 11)]).await;
    assert_eq!(
        fieldline_mdb::inspect(dir.path(), Depth::Blocks),
        Vec::<String>::new(),
        "beside a running store"
    );
    store.close().await.unwrap();
    assert_eq!(fieldline_mdb::inspect(dir.path(), Depth::Blocks), Vec::<String>::new());
    let shard = dir.path().join("shard-00");
    let named = |part: &str| {
        let entries = std::fs::read_dir(&shard).unwrap().map(|entry| entry.unwrap().path());
        let mut named: Vec<_> =
            entries.filter(|path| path.to_string_lossy().contains(part)).collect();
        named.sort();
        named
    };
    let told = |part: &str| {
        let found = fieldline_mdb::inspect(dir.path(), Depth::Indexes);
        assert!(found.iter().any(|text| text.contains(part)), "{part} is missing: {found:?}");
        found.len()
    };
    let segments = named(".seg");
    // A byte of a block, and of a frame that another follows: only reading them tells.
    for (path, at, said) in [
        (&segments[2], 30, &*segments[2].file_name().unwrap().to_string_lossy()),
        (&named("wal-").pop().unwrap(), 40, "is damaged at byte 22"),
    ] {
        let sound = std::fs::read(path).unwrap();
        let mut bytes = sound.clone();
        bytes[at] ^= 1;
        std::fs::write(path, bytes).unwrap();
        assert!(fieldline_mdb::inspect(dir.path(), Depth::Indexes).is_empty());
        let found = fieldline_mdb::inspect(dir.path(), Depth::Blocks);
        assert!(found.len() == 1 && found[0].contains(said), "{found:?}");
        std::fs::write(path, sound).unwrap();
    }
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
