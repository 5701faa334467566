//! The suite that every `History` passes, with stores of several kinds.

use std::sync::Arc;

use fieldline_contracts::conformance::history;
use fieldline_contracts::{History, SystemClock};
use fieldline_mdb::{Mdb, MdbConfig};

fn open(dir: &std::path::Path, config: MdbConfig) -> Arc<dyn History> {
    Arc::new(Mdb::open(dir, config, Arc::new(SystemClock)).unwrap())
}

#[tokio::test]
async fn a_store_of_one_shard_conforms() {
    let dir = tempfile::tempdir().unwrap();
    history::run(open(dir.path(), MdbConfig::default())).await;
}

#[tokio::test]
async fn a_store_of_three_shards_conforms() {
    let dir = tempfile::tempdir().unwrap();
    history::run(open(dir.path(), MdbConfig { shards: 3, ..MdbConfig::default() })).await;
}

#[tokio::test]
async fn a_store_survives_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let config = MdbConfig { shards: 2, ..MdbConfig::default() };
    history::survives_reopening(|| async { open(dir.path(), config.clone()) }).await;
}
