//! Measures the message store on this machine: durable appends against the wall of the disk,
//! and bytes per message once sealed.
//!
//! ```text
//! cargo run --release -p fieldline-mdb --example mdb_bench -- [--messages N] [--devices N]
//!     [--writers N] [--batch N] [--shards N] [--dir DIR] [--export-csv FILE]
//! ```
//!
//! The wall is what a plain file does with groups of the same size, written and synced one after
//! the other in the same run, before and after: group size × syncs per second. No store can beat
//! it: a ratio above 1 says that the disk was slower while the wall was measured, and that only
//! `sync_share_of_time` tells how much of the time was the disk's. The last line printed is
//! `{"messages":N,"bytes":B}`; the CSV holds the same messages for comparison with other stores.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    clippy::indexing_slicing,
    reason = "a program to measure with, run by hand"
)]

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use fieldline_contracts::{History, Query, SystemClock};
use fieldline_mdb::{Mdb, MdbConfig};
use fieldline_model::{
    Accepted, AccountId, Cursor, Decimal, Decoded, DeviceId, ParamName, Params, Schema, Series,
    Timestamp, Value,
};
use metrics_exporter_prometheus::PrometheusBuilder;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

struct Args {
    messages: usize,
    devices: usize,
    writers: usize,
    batch: usize,
    shards: u16,
    dir: PathBuf,
    csv: Option<PathBuf>,
}

fn args() -> Args {
    let mut args = Args {
        messages: 1_000_000,
        devices: 500,
        writers: 64,
        batch: 25,
        shards: 1,
        dir: std::env::temp_dir(),
        csv: None,
    };
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        let value = given.next().unwrap_or_else(|| panic!("{name} needs a value"));
        match name.as_str() {
            "--messages" => args.messages = value.parse().unwrap(),
            "--devices" => args.devices = value.parse().unwrap(),
            "--writers" => args.writers = value.parse().unwrap(),
            "--batch" => args.batch = value.parse().unwrap(),
            "--shards" => args.shards = value.parse().unwrap(),
            "--dir" => args.dir = value.into(),
            "--export-csv" => args.csv = Some(value.into()),
            other => panic!("unknown argument {other}"),
        }
    }
    args
}

/// One vehicle: drives for some minutes, parks for some.
struct Tracker {
    series: Series,
    at: i64,
    latitude: f64,
    longitude: f64,
    altitude: f64,
    heading: f64,
    speed: f64,
    odometer: f64,
    voltage: f64,
    until: i64,
    moving: bool,
}

const NAMES: [&str; 9] = [
    "position.latitude",
    "position.longitude",
    "position.altitude",
    "position.speed",
    "position.direction",
    "position.satellites",
    "engine.ignition",
    "external.voltage",
    "odometer",
];

impl Tracker {
    fn new(account: AccountId, number: usize, random: &mut StdRng) -> Self {
        let start = Timestamp::from_seconds(1_795_000_000);
        let device = DeviceId::new(start.plus_micros(number as i64 * 1_000), random.random());
        Self {
            series: Series::messages(account, device),
            at: 1_795_000_000 + random.random_range(0..300),
            latitude: random.random_range(40.0..60.0),
            longitude: random.random_range(-5.0..30.0),
            altitude: random.random_range(20.0..300.0),
            heading: random.random_range(0.0..360.0),
            speed: 0.0,
            odometer: random.random_range(1_000.0..200_000.0),
            voltage: 12.6,
            until: 0,
            moving: false,
        }
    }

    /// The next message; moves the tracker on.
    fn message(&mut self, names: &[ParamName], schema: &Schema, random: &mut StdRng) -> Accepted {
        if self.at >= self.until {
            self.moving = !self.moving;
            self.until =
                self.at + random.random_range(if self.moving { 600..3_600 } else { 300..7_200 });
        }
        let step = if self.moving { random.random_range(2..=30) } else { 300 };
        self.at += step;
        if self.moving {
            self.heading = (self.heading + random.random_range(-20.0..20.0)).rem_euclid(360.0);
            self.speed = (self.speed + random.random_range(-12.0..13.0)).clamp(0.0, 110.0);
            let metres = self.speed / 3.6 * step as f64;
            self.latitude += metres * self.heading.to_radians().cos() / 111_320.0;
            self.longitude += metres * self.heading.to_radians().sin()
                / (111_320.0 * self.latitude.to_radians().cos());
            self.altitude += random.random_range(-2.0..2.0);
            self.odometer += metres / 1_000.0;
            self.voltage = 14.1 + random.random_range(-0.15..0.15);
        } else {
            self.speed = 0.0;
            self.voltage = (self.voltage - 0.001).max(12.2) + random.random_range(-0.01..0.01);
        }
        // Receivers jitter by about a metre, also when parked.
        let jitter = || -> f64 { 1.0e-5 };
        let latitude = self.latitude + random.random_range(-1.0..1.0) * jitter();
        let longitude = self.longitude + random.random_range(-1.0..1.0) * jitter();
        let scaled = |x: f64, scale: u8| {
            let mantissa = (x * 10_f64.powi(i32::from(scale))).round() as i64;
            Value::Decimal(Decimal::new(mantissa, scale).unwrap())
        };
        let values = [
            scaled(latitude, 7),
            scaled(longitude, 7),
            Value::Int(self.altitude.round() as i64),
            Value::Int(self.speed.round() as i64),
            Value::Int(self.heading.round() as i64),
            Value::Int(random.random_range(8..16)),
            Value::Bool(self.moving),
            scaled(self.voltage, 3),
            scaled(self.odometer, 3),
        ];
        let params: Params = names.iter().cloned().zip(values).collect();
        let timestamp = Timestamp::from_seconds(self.at);
        let received = timestamp.plus_micros(random.random_range(200_000..3_000_000));
        let decoded = Decoded { timestamp: Some(timestamp), params };
        Accepted::validate(decoded, self.series, received, schema).unwrap()
    }
}

/// Messages of a fleet in the order of their times.
fn fleet(devices: usize, messages: usize) -> Vec<Accepted> {
    let mut random = StdRng::seed_from_u64(7);
    let schema = Schema::with_dictionary([]);
    let names: Vec<ParamName> = NAMES.iter().map(|n| ParamName::new(*n).unwrap()).collect();
    let account = AccountId::new(Timestamp::from_seconds(1_795_000_000), random.random());
    let mut trackers: Vec<Tracker> =
        (0..devices).map(|n| Tracker::new(account, n, &mut random)).collect();
    let mut next: BinaryHeap<Reverse<(i64, usize)>> =
        trackers.iter().enumerate().map(|(n, t)| Reverse((t.at, n))).collect();
    let mut all = Vec::with_capacity(messages);
    while all.len() < messages {
        let Reverse((_, n)) = next.pop().unwrap();
        all.push(trackers[n].message(&names, &schema, &mut random));
        next.push(Reverse((trackers[n].at, n)));
    }
    all
}

fn export(messages: &[Accepted], path: &Path) {
    let mut out = BufWriter::new(File::create(path).unwrap());
    writeln!(out, "device,timestamp_us,received_us,{}", NAMES.join(",")).unwrap();
    for message in messages {
        let at = message.timestamp().as_micros();
        write!(out, "{},{at},{}", message.series().object, message.received().as_micros()).unwrap();
        for name in NAMES {
            let mut text = String::new();
            message.params().get(name).unwrap().write_json(&mut text);
            write!(out, ",{text}").unwrap();
        }
        writeln!(out).unwrap();
    }
    out.flush().unwrap();
}

fn directory_bytes(dir: &Path) -> u64 {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let meta = entry.metadata().unwrap();
        bytes += if meta.is_dir() { directory_bytes(&entry.path()) } else { meta.len() };
    }
    bytes
}

/// Syncs per second of a plain file that grows by `bytes` each time.
fn wall(dir: &Path, bytes: usize) -> f64 {
    let path = dir.join("wall");
    let file = File::create(&path).unwrap();
    let content: Vec<u8> = (0..bytes).map(|n| (n * 31 % 251) as u8).collect();
    let started = Instant::now();
    let mut syncs = 0_u64;
    while started.elapsed().as_secs_f64() < 2.0 {
        file.write_all_at(&content, syncs * bytes as u64).unwrap();
        file.sync_data().unwrap();
        syncs += 1;
    }
    std::fs::remove_file(path).unwrap();
    syncs as f64 / started.elapsed().as_secs_f64()
}

/// Processor seconds that this process has used.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after = stat.rsplit_once(')').unwrap().1;
    let ticks = |n: usize| after.split_whitespace().nth(n).unwrap().parse::<f64>().unwrap();
    (ticks(11) + ticks(12)) / 100.0
}

/// The sum of a metric over all shards.
fn metric(text: &str, name: &str) -> f64 {
    let of = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
    text.lines().filter(of).map(|l| l.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()).sum()
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let args = args();
    let recorder = PrometheusBuilder::new().build_recorder();
    let metrics = recorder.handle();
    metrics::set_global_recorder(recorder).unwrap();
    let temporary = tempfile::tempdir_in(&args.dir).unwrap();
    eprintln!("generating {} messages of {} trackers", args.messages, args.devices);
    let messages = fleet(args.devices, args.messages);
    if let Some(path) = &args.csv {
        export(&messages, path);
    }

    // Batches of one device each, as links deliver them; each writer has its own devices.
    let mut batches: Vec<Vec<Vec<Accepted>>> = vec![Vec::new(); args.writers];
    let mut open: std::collections::HashMap<Series, Vec<Accepted>> =
        std::collections::HashMap::new();
    let mut keep = |series: Series, batch: Vec<Accepted>| {
        batches[(series.hash64() >> 8) as usize % args.writers].push(batch);
    };
    for message in &messages {
        let batch = open.entry(message.series()).or_default();
        batch.push(message.clone());
        if batch.len() >= args.batch {
            keep(message.series(), std::mem::take(batch));
        }
    }
    for (series, batch) in open {
        keep(series, batch);
    }
    // The disk's speed drifts: its wall is measured before and after, with groups of the
    // size that this many writers make.
    let group_bytes = (args.writers / usize::from(args.shards)).max(1) * args.batch * 50;
    let before = wall(temporary.path(), group_bytes);
    let dir = temporary.path().join("append");
    let config = MdbConfig { shards: args.shards, ..MdbConfig::default() };
    let store = Arc::new(Mdb::open(&dir, config.clone(), Arc::new(SystemClock)).unwrap());
    let (started, cpu) = (Instant::now(), cpu_seconds());
    let mut tasks = tokio::task::JoinSet::new();
    for own in batches {
        let store = store.clone();
        tasks.spawn(async move {
            let mut slowest = 0.0_f64;
            for batch in own {
                let started = Instant::now();
                store.append(batch).await.unwrap();
                slowest = slowest.max(started.elapsed().as_secs_f64());
            }
            slowest
        });
    }
    let mut slowest = 0.0_f64;
    while let Some(done) = tasks.join_next().await {
        slowest = slowest.max(done.unwrap());
    }
    let seconds = started.elapsed().as_secs_f64();
    let cpu = cpu_seconds() - cpu;
    let rendered = metrics.render();
    let syncs = metric(&rendered, "fieldline_mdb_sync_seconds_count");
    let sync_seconds = metric(&rendered, "fieldline_mdb_sync_seconds_sum");
    let log_bytes = metric(&rendered, "fieldline_mdb_log_bytes_total");
    let group = args.messages as f64 / syncs;
    let rate = args.messages as f64 / seconds;
    store.close().await.unwrap();
    drop(store);
    let after = wall(temporary.path(), (log_bytes / syncs) as usize);
    let wall = f64::midpoint(before, after) * group;
    println!(
        "{}",
        serde_json::json!({
            "bench": "append", "messages": args.messages, "writers": args.writers, "batch": args.batch,
            "shards": args.shards, "messages_per_s": rate.round(), "mean_group": group.round(),
            "log_bytes_per_message": (log_bytes / args.messages as f64 * 10.0).round() / 10.0,
            "sync_share_of_time": (sync_seconds / seconds * 100.0).round() / 100.0,
            "wall_syncs_per_s": [before.round(), after.round()], "wall_messages_per_s": wall.round(), "ratio_to_wall": (rate / wall * 100.0).round() / 100.0,
            "messages_per_cpu_s": (args.messages as f64 / cpu).round(), "slowest_append_ms": (slowest * 1e3).round(),
        })
    );

    // Once more in order of time, for the bytes; sealed and merged as it would be over a day.
    let started = Instant::now();
    let store = Mdb::open(&dir, config.clone(), Arc::new(SystemClock)).unwrap();
    eprintln!("restart took {:.0} ms", started.elapsed().as_secs_f64() * 1e3);
    let started = Instant::now();
    let mut cursor = Cursor::default();
    let mut tailed = 0;
    loop {
        let page = store.tail(cursor, 5_000).await.unwrap();
        let Some(last) = page.last() else { break };
        cursor = last.cursor();
        tailed += page.len();
    }
    let tail_rate = tailed as f64 / started.elapsed().as_secs_f64();
    let series = messages[0].series();
    let started = Instant::now();
    let newest = store.read(&Query::newest(series, 1_000)).await.unwrap().len();
    println!(
        "{}",
        serde_json::json!({
            "bench": "read", "tail_messages_per_s": tail_rate.round(), "tailed": tailed,
            "newest_1000_ms": (started.elapsed().as_secs_f64() * 1e4).round() / 10.0, "newest": newest,
        })
    );
    drop(store);

    let dir = temporary.path().join("size");
    let store = Mdb::open(&dir, MdbConfig { shards: 1, ..config }, Arc::new(SystemClock)).unwrap();
    for batch in messages.chunks(2_000) {
        store.append(batch.to_vec()).await.unwrap();
    }
    store.seal().await.unwrap();
    let sealed = directory_bytes(&dir);
    store.merge().await.unwrap();
    store.close().await.unwrap();
    let bytes = directory_bytes(&dir);
    println!(
        "{}",
        serde_json::json!({
            "bench": "size", "values_per_message": NAMES.len(),
            "sealed_bytes_per_message": (sealed as f64 / args.messages as f64 * 100.0).round() / 100.0,
            "merged_bytes_per_message": (bytes as f64 / args.messages as f64 * 100.0).round() / 100.0,
        })
    );
    println!("{{\"messages\":{},\"bytes\":{bytes}}}", args.messages);
}
