//! PostgreSQL as registry and history, against a real server.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "tests may panic, and print what they measured"
)]

mod clients;
mod connect;
mod faults;
mod history;
mod nodes;
mod registry;
mod standby;
mod upkeep;

use std::collections::HashMap;
use std::sync::Arc;

use fieldline_contracts::{History, Query, SystemClock};
use fieldline_model::{
    Accepted, AccountId, Cursor, DeviceId, ParamName, Params, Series, Stored, Timestamp, Value,
};
use fieldline_postgres::{PostgresHistory, Settings};
use fieldline_testkit::servers::Postgres;

/// 2027-01-15T08:00:00Z.
const START: Timestamp = Timestamp::from_seconds(1_800_000_000);

const ACCOUNT: AccountId = AccountId::from_bytes([1; 16]);

/// The settings for a server of the test's own.
fn settings(server: &Postgres) -> Settings {
    Settings::new(server.url())
}

async fn history(settings: &Settings) -> Arc<PostgresHistory> {
    Arc::new(PostgresHistory::connect(settings, Arc::new(SystemClock)).await.unwrap())
}

/// The messages of device `n`.
fn device(n: u8) -> Series {
    Series::messages(ACCOUNT, DeviceId::from_bytes([n; 16]))
}

/// Message `n` of a series, `millis` after the start.
fn at(series: Series, millis: i64, n: i64) -> Accepted {
    let name = |text: &str| ParamName::new(text.to_owned()).unwrap();
    let params: Params = [(name("n"), Value::Int(n))].into_iter().collect();
    Accepted::own(series, START.plus_micros(millis * 1_000), params)
}

fn number(message: &Stored) -> i64 {
    message.params().get("n").and_then(Value::as_i64).unwrap()
}

/// All that is stored, by the tails of all shards; asserts that no sequence is left out.
async fn everything(history: &PostgresHistory) -> HashMap<Series, Vec<Stored>> {
    let mut all: HashMap<Series, Vec<Stored>> = HashMap::new();
    for shard in 0..history.shards() {
        let mut cursor = Cursor { shard, seq: 0 };
        loop {
            let page = history.tail(cursor, 1_000).await.unwrap();
            if page.is_empty() {
                break;
            }
            for message in page {
                assert_eq!(message.cursor().seq, cursor.seq + 1, "a gap in shard {shard}");
                cursor = message.cursor();
                all.entry(message.series()).or_default().push(message);
            }
        }
    }
    all
}

async fn all(history: &PostgresHistory, series: Series) -> Vec<Stored> {
    history.read(&Query::oldest(series, Query::LIMIT_MAX)).await.unwrap()
}

/// Runs one statement with psql, and returns what it printed.
fn psql(server: &Postgres, sql: &str) -> String {
    let output = std::process::Command::new("psql")
        .args(["-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql, &server.url()])
        .output()
        .expect("psql is there");
    let (text, errors) = (output.stdout, String::from_utf8_lossy(&output.stderr).into_owned());
    assert!(output.status.success(), "{sql}: {errors}");
    String::from_utf8_lossy(&text).trim().to_owned()
}
