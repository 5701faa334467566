//! Files of the store with any bytes changed, read past their checksums: what fuzzing
//! finds over hours is looked for here for a second.

use fieldline_mdb::{MdbConfig, fuzz};
use fieldline_model::{Accepted, Value};
use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use crate::common::{START, append, device, open, params};
use crate::fake_disk::FakeDisk;

/// A log and a segment with columns of all kinds.
fn files() -> (Vec<u8>, Vec<u8>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let disk = FakeDisk::new();
        let store = open(&disk.disk(), MdbConfig::default()).unwrap();
        let mut batch = Vec::new();
        for n in 0..400_i64 {
            let mut values = params([
                ("int", Value::Int(n * n * 31 % 1_009)),
                ("float", Value::Float(n as f64 * 0.1)),
                ("text", Value::from(format!("text {}", n % 7))),
                ("json", Value::Json(std::sync::Arc::new(serde_json::json!({"n": [n, null]})))),
            ]);
            if n % 3 == 0 {
                values.remove("float");
            }
            batch.push(Accepted::own(device((n % 2) as u8), START.plus_micros(n * n), values));
        }
        append(&store, batch).await;
        let log = disk.content(&disk.find("wal-")[0]);
        store.seal().await.unwrap();
        (log, disk.content(&disk.find(".seg")[0]))
    })
}

fn mutate(bytes: &mut Vec<u8>, random: &mut StdRng) {
    for _ in 0..random.random_range(1..8) {
        let at = random.random_range(0..bytes.len());
        match random.random_range(0..5) {
            0 => bytes[at] ^= 1 << random.random_range(0..8),
            1 => bytes[at] = random.random(),
            2 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.random_range(0..5_usize)],
            3 => {
                bytes.remove(at);
            }
            _ => bytes.insert(at, random.random()),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4, ..ProptestConfig::default() })]

    #[test]
    fn changed_files_are_read_without_panic(seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let (log, segment) = files();
        assert!(fuzz::segment(&segment) == 400 && fuzz::wal(&log) == 400);
        for _ in 0..300 {
            let mut changed = segment.clone();
            mutate(&mut changed, &mut random);
            let _messages = fuzz::segment(&changed);
            // The frames of the log without their headers, each in one of up to 255 bytes.
            let mut changed = log[22..].to_vec();
            mutate(&mut changed, &mut random);
            let _messages = fuzz::wal(&changed);
        }
    }
}
