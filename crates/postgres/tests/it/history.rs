//! The history on one node: the conformance suite, and what a partition can do to us.

use std::sync::Arc;

use fieldline_contracts::conformance::history;
use fieldline_contracts::{History, SystemClock};
use fieldline_postgres::{PostgresHistory, Settings};
use fieldline_testkit::servers::Postgres;

use crate::settings;

async fn open(settings: &Settings) -> PostgresHistory {
    PostgresHistory::connect(settings, Arc::new(SystemClock)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms() {
    let server = Postgres::start();
    history::run(Arc::new(open(&settings(&server)).await)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn survives_reopening() {
    let server = Postgres::start();
    let settings = settings(&server);
    history::survives_reopening(|| async { Arc::new(open(&settings).await) as Arc<dyn History> })
        .await;
}
