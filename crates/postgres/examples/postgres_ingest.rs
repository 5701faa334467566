//! Messages a second through `PostgresHistory::append`, and by bare COPY of the same rows in the same run.
//!
//! `DATABASE` names the server; the tables are made in schemas of their own and removed. See
//! `bench/postgres_ingest.sh`.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    reason = "a measurement: it ends where something fails, and prints"
)]

use std::sync::Arc;
use std::time::Instant;

use bytes::{BufMut as _, Bytes, BytesMut};
use fieldline_contracts::registry::UniqueIn;
use fieldline_contracts::{Actor, Draft, History, Kind, Query, Registry, SystemClock};
use fieldline_model::{
    Accepted, AccountId, Cursor, Decimal, DeviceId, ParamName, Params, Series, Timestamp, Value,
};
use fieldline_postgres::row::{self, Dictionary};
use fieldline_postgres::{PostgresHistory, PostgresRegistry, Settings};
use futures_util::SinkExt as _;
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;

const ACCOUNT: AccountId = AccountId::from_bytes([7; 16]);
const DEVICES: usize = 2_000;
/// Callers at once: connections of devices whose frames arrive together.
const CALLERS: usize = 256;
/// Messages of one append: a frame of a tracker.
const FRAME: usize = 20;
const MESSAGES: usize = 200_000;
/// Rows of one transaction of bare COPY.
const COPY_ROWS: usize = 10_000;
const ROUNDS: usize = 3;

/// What a tracker sends: position, speed, power, a few inputs.
fn params(names: &[ParamName], device: usize, n: usize) -> Params {
    let number = |at: usize| i64::try_from((n * 31 + device * 17 + at * 7) % 1_000).unwrap();
    let values = names.iter().enumerate().map(|(at, name)| {
        let value = match at {
            0 | 1 => Value::Decimal(Decimal::new(547_146_368 + number(at) * 13, 7).unwrap()),
            2..=4 => Value::Int(number(at)),
            5..=7 => Value::Decimal(Decimal::new(12_000 + number(at), 3).unwrap()),
            8..=11 => Value::Bool(number(at) % 2 == 0),
            _ => Value::Int(number(at) * 1_000),
        };
        (name.clone(), value)
    });
    values.collect()
}

fn names() -> Vec<ParamName> {
    [
        "position.latitude",
        "position.longitude",
        "position.altitude",
        "position.direction",
        "position.speed",
        "power.voltage",
        "battery.voltage",
        "battery.current",
        "engine.ignition",
        "movement",
        "din.1",
        "din.2",
        "odometer.total",
        "gsm.operator",
        "position.satellites",
    ]
    .map(|name| ParamName::new(name).unwrap())
    .to_vec()
}

fn message(names: &[ParamName], base: i64, device: usize, n: usize) -> Accepted {
    let series = series(device);
    let at = Timestamp::from_seconds(base + i64::try_from(n).unwrap());
    Accepted::own(series, at, params(names, device, n))
}

fn series(device: usize) -> Series {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&device.to_be_bytes());
    Series::messages(ACCOUNT, DeviceId::from_bytes(id))
}

/// Appends all messages, each caller frame by frame; returns messages a second.
async fn through_append(history: &Arc<PostgresHistory>, base: i64) -> f64 {
    let names = Arc::new(names());
    let (began, cpu) = (Instant::now(), cpu_seconds());
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..CALLERS {
        let (history, names) = (Arc::clone(history), Arc::clone(&names));
        callers.spawn(async move {
            let own: Vec<usize> = (caller..DEVICES).step_by(CALLERS).collect();
            let each = MESSAGES / DEVICES;
            let (mut stored, mut latencies) = (0, Vec::new());
            for frame in 0..each / FRAME {
                for device in &own {
                    let numbers = frame * FRAME..(frame + 1) * FRAME;
                    let batch = numbers.map(|n| message(&names, base, *device, n)).collect();
                    let sent = Instant::now();
                    let receipts = history.append(batch).await.unwrap();
                    latencies.push(sent.elapsed());
                    stored += receipts.iter().filter(|receipt| !receipt.duplicate).count();
                }
            }
            (stored, latencies)
        });
    }
    let done = callers.join_all().await;
    let took = began.elapsed();
    let stored: usize = done.iter().map(|(stored, _)| stored).sum();
    let mut latencies: Vec<_> = done.into_iter().flat_map(|(_, latencies)| latencies).collect();
    latencies.sort_unstable();
    let at = |part: usize| latencies[(latencies.len() - 1) * part / 100];
    println!(
        "  append: {:.0} messages/s, {stored} new; answered after {:.1} ms (p50), {:.1} ms (p99); {:.1} µs of CPU a message here",
        MESSAGES as f64 / took.as_secs_f64(),
        at(50).as_secs_f64() * 1e3,
        at(99).as_secs_f64() * 1e3,
        (cpu_seconds() - cpu) / MESSAGES as f64 * 1e6,
    );
    MESSAGES as f64 / took.as_secs_f64()
}

/// What this process has used so far.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks = |at: usize| fields[at].parse::<f64>().unwrap();
    (ticks(11) + ticks(12)) / 100.0
}

/// The same rows by COPY alone, two connections, a commit each [`COPY_ROWS`]; returns rows a second.
async fn bare_copy(database: &str, base: i64, indexed: bool, wide: bool) -> f64 {
    let names = names();
    // As the history numbers them.
    let dictionary = Dictionary::of((1..).zip(names.iter().cloned()));
    let mut all: Vec<Vec<Bytes>> = vec![Vec::new(), Vec::new()];
    let rows = (0..MESSAGES / DEVICES).flat_map(|n| (0..DEVICES).map(move |device| (n, device)));
    let mut part = header();
    let mut seq = 0_i64;
    for (n, device) in rows {
        seq += 1;
        let message = message(&names, base, device, n);
        put(&mut part, &dictionary, &message, i64::try_from(device).unwrap(), seq, wide);
        if usize::try_from(seq).unwrap().is_multiple_of(COPY_ROWS) {
            part.put_i16(-1);
            let turn = usize::try_from(seq).unwrap() / COPY_ROWS % 2;
            all[turn].push(std::mem::replace(&mut part, header()).freeze());
        }
    }
    let client = connect(database).await;
    let id = if wide { "account uuid, kind int2, object uuid" } else { "series bigint" };
    let key = if wide { "account, kind, object" } else { "series" };
    client
        .batch_execute(&format!(
            "DROP TABLE IF EXISTS bare; CREATE TABLE bare ({id}, at bigint, received bigint, \
             shard smallint, seq bigint, hash bigint, body bytea)"
        ))
        .await
        .unwrap();
    if indexed {
        let sql =
            format!("CREATE INDEX ON bare ({key}, at, seq); CREATE INDEX ON bare (shard, seq)");
        client.batch_execute(&sql).await.unwrap();
    }
    let began = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for parts in all {
        let database = database.to_owned();
        tasks.spawn(async move {
            let client = connect(&database).await;
            for part in parts {
                let sink = client.copy_in("COPY bare FROM STDIN (FORMAT binary)").await.unwrap();
                let mut sink = std::pin::pin!(sink);
                let mut rest = part;
                while !rest.is_empty() {
                    let chunk = rest.split_to(rest.len().min(128 << 10));
                    sink.send(chunk).await.unwrap();
                }
                sink.finish().await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    let rate = MESSAGES as f64 / began.elapsed().as_secs_f64();
    let size: i64 =
        client.query_one("SELECT pg_total_relation_size('bare')", &[]).await.unwrap().get(0);
    client.batch_execute("DROP TABLE bare").await.unwrap();
    println!(
        "  bare COPY, {}, {}: {rate:.0} rows/s, {:.0} bytes a row",
        if indexed { "the same indexes" } else { "no index" },
        if wide { "uuids" } else { "series ids" },
        size as f64 / MESSAGES as f64
    );
    rate
}

fn header() -> BytesMut {
    let mut out = BytesMut::new();
    out.put_slice(b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0");
    out
}

fn put(
    out: &mut BytesMut,
    dictionary: &Dictionary,
    message: &Accepted,
    id: i64,
    seq: i64,
    wide: bool,
) {
    let mut body = Vec::new();
    row::encode(&mut body, message.params(), dictionary, &mut |_| {});
    let at = message.timestamp().as_micros();
    let number = |out: &mut BytesMut, n: i64| {
        out.put_i32(8);
        out.put_i64(n);
    };
    out.put_i16(if wide { 9 } else { 7 });
    if wide {
        out.put_i32(16);
        out.put_slice(message.series().account.as_bytes());
        out.put_i32(2);
        out.put_i16(0);
        out.put_i32(16);
        out.put_slice(message.series().object.as_bytes());
    } else {
        number(out, id);
    }
    number(out, at);
    number(out, at);
    out.put_i32(2);
    out.put_i16(i16::try_from(id % 8).unwrap());
    number(out, seq);
    number(out, message.hash().cast_signed());
    out.put_i32(i32::try_from(body.len()).unwrap());
    out.put_slice(&body);
}

async fn connect(database: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(database, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Objects created a second, by as many callers at once as appended.
async fn registry_rate(settings: &Settings) {
    let registry = PostgresRegistry::connect(settings, Arc::new(SystemClock)).await.unwrap();
    let registry = Arc::new(registry);
    let began = Instant::now();
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..CALLERS {
        let registry = Arc::clone(&registry);
        callers.spawn(async move {
            for n in 0..40 {
                let id = Uuid::from_u128((caller * 1_000 + n) as u128);
                let key = (UniqueIn::Account, id.to_string());
                let unique = [("ident", key)].into();
                let body =
                    serde_json::json!({"name": "truck", "ident": id.to_string(), "labels": {}});
                let draft = Draft { kind: Kind::Device, id, unique, body };
                registry.create(ACCOUNT, draft, &Actor::system("bench")).await.unwrap();
            }
        });
    }
    callers.join_all().await;
    let rate = (CALLERS * 40) as f64 / began.elapsed().as_secs_f64();
    println!("registry: {rate:.0} objects/s created by {CALLERS} callers");
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

#[tokio::main]
async fn main() {
    let database = std::env::var("DATABASE").expect("DATABASE names the server");
    let client = connect(&database).await;
    let schema = "fieldline_bench";
    let clear = format!("DROP SCHEMA IF EXISTS {schema} CASCADE");
    client.batch_execute(&clear).await.unwrap();
    let settings = Settings { schema: schema.to_owned(), ..Settings::new(&database) };
    let clock = Arc::new(SystemClock);
    let history = Arc::new(PostgresHistory::connect(&settings, clock).await.unwrap());

    // Names get their numbers in the background.
    let first = message(&names(), 1_700_000_000, 0, 0);
    history.append(vec![first]).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;

    let (mut appended, mut indexed, mut plain) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        println!(
            "round {}: {MESSAGES} messages of {DEVICES} devices, {CALLERS} callers, frames of {FRAME}",
            round + 1
        );
        // A day each, so that every round fills a partition from empty.
        let base = 1_800_000_000 + i64::try_from(round).unwrap() * 86_400;
        plain.push(bare_copy(&database, base, false, false).await);
        indexed.push(bare_copy(&database, base, true, false).await);
        appended.push(through_append(&history, base).await);
    }
    bare_copy(&database, 1_800_000_000, true, true).await;
    println!("sent once more, all duplicates:");
    through_append(&history, 1_800_000_000).await;

    let began = Instant::now();
    let mut count = 0;
    let mut cursor = Cursor { shard: 0, seq: 0 };
    loop {
        let page = history.tail(cursor, 10_000).await.unwrap();
        let Some(last) = page.last() else { break };
        cursor = last.cursor();
        count += page.len();
    }
    println!(
        "tail of one shard: {:.0} messages/s",
        f64::from(u32::try_from(count).unwrap()) / began.elapsed().as_secs_f64()
    );
    let began = Instant::now();
    for device in 0..200 {
        assert_eq!(history.read(&Query::newest(series(device), 100)).await.unwrap().len(), 100);
    }
    println!("the newest 100 of a device: {:.2} ms", began.elapsed().as_secs_f64() * 1e3 / 200.0);
    let began = Instant::now();
    let mut values = 0;
    history.last_values(&mut |_, _, _, _| values += 1).await.unwrap();
    println!("last values: {values} in {:.2} s", began.elapsed().as_secs_f64());
    let size: i64 = client
        .query_one("SELECT sum(pg_total_relation_size(c.oid))::bigint FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relkind = 'r' AND c.relname LIKE 'messages%'", &[&schema])
        .await
        .unwrap()
        .get(0);
    let stats = history.stats(None);
    println!(
        "{} bytes a message on disk; {} by the statistics",
        u64::try_from(size).unwrap() / stats.messages,
        stats.bytes / stats.messages
    );
    history.close().await.unwrap();
    registry_rate(&settings).await;
    client.batch_execute(&clear).await.unwrap();

    let (appended, indexed, plain) = (median(appended), median(indexed), median(plain));
    println!(
        "append {appended:.0} messages/s; bare COPY {indexed:.0} rows/s with the same indexes, {plain:.0} without"
    );
    println!(
        "ratio to bare COPY: {:.2} with the same indexes, {:.2} without (goal: 60,000 messages/s or 0.5)",
        appended / indexed,
        appended / plain
    );
}
