//! Late messages: those older than what is known of their device are looked up on the one
//! thread that appends for all, so a look-up must cost little, whatever is stored.

use fieldline_contracts::History;
use fieldline_mdb::{Mdb, MdbConfig};
use fieldline_model::{Accepted, ParamName, Params, Value};

use crate::common::{START, append, message, numbered, open, small};
use crate::fake_disk::FakeDisk;

/// Has 16 KiB of names of its own, as a device may make up.
fn inventive(number: u32, seconds: i64) -> Accepted {
    let values = (0..128).map(|at| {
        let name = format!("made-up-{number}-{seconds}-{at}-{}", "x".repeat(100));
        (ParamName::new(name).unwrap(), Value::Int(at))
    });
    let at = START.plus_micros(seconds * 1_000_000);
    Accepted::own(numbered(number), at, values.collect::<Params>())
}

/// A fleet whose index does not fit into the cache, and beside it devices that make up names.
async fn store(disk: &FakeDisk) -> Mdb {
    let config = MdbConfig {
        memtable_bytes_max: 16 << 20,
        wal_bytes_max: 16 << 20,
        cache_bytes_max: 1 << 20,
        merge_fan_in: 50,
        ..small()
    };
    let store = open(&disk.disk(), config).unwrap();
    for part in 0..3_i64 {
        for of in 0..4 {
            let devices = of * 2_000..of * 2_000 + 2_000;
            let times = [part * 100, part * 100 + 50];
            let batch = devices.flat_map(|n| times.map(|at| message(numbered(n), at, 1)));
            append(&store, batch.collect()).await;
        }
        append(&store, (9_000..9_040).map(|n| inventive(n, part)).collect()).await;
        store.seal().await.unwrap();
    }
    // Until the merger has looked at all of them.
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    store
}

#[tokio::test]
async fn a_late_message_costs_little_in_a_large_fleet() {
    let disk = FakeDisk::new();
    let store = store(&disk).await;
    let index: usize = disk.find(".seg").iter().map(|path| disk.content(path).len()).sum();
    assert!(index > 600_000, "only {index} bytes are sealed");
    disk.take_bytes_read();
    // A black box of one device, message by message, within what is sealed.
    for n in 1..50 {
        assert!(!append(&store, vec![message(numbered(77), n, 2)]).await[0].duplicate);
    }
    let one = disk.take_bytes_read();
    assert!(one < 100_000, "{one} bytes were read for the late messages of one device");
    // One late message of each of many devices.
    for n in (0..8_000).step_by(80) {
        assert!(!append(&store, vec![message(numbered(n), 130, 2)]).await[0].duplicate);
    }
    let many = disk.take_bytes_read() / 100;
    assert!(many < 20_000, "{many} bytes were read for a late message");
}

#[tokio::test]
async fn a_duplicate_is_recognised_with_few_reads() {
    let disk = FakeDisk::new();
    let store = store(&disk).await;
    disk.take_bytes_read();
    for n in (0..8_000).step_by(80) {
        let again = vec![message(numbered(n), 150, 1), message(numbered(n), 250, 1)];
        assert!(append(&store, again).await.iter().all(|receipt| receipt.duplicate));
    }
    let each = disk.take_bytes_read() / 200;
    assert!(each < 20_000, "{each} bytes were read for a duplicate");
    for number in [9_000, 9_039] {
        let again = vec![inventive(number, 0), inventive(number, 1)];
        assert!(append(&store, again).await.iter().all(|receipt| receipt.duplicate));
    }
    let inventive = disk.take_bytes_read() / 4;
    assert!(inventive < 50_000, "{inventive} bytes were read for one that makes up names");
    assert_eq!(store.stats(None).messages, 3 * 16_040);
}
