//! Sockets → durable → acknowledged: messages a second and core, and the ratio
//! to the wall of this disk (messages of one group commit × syncs a second).
//!
//! The trackers run in a process of their own (this program with `--load`), so
//! that the server's processor time is its own. Settings by environment:
//! `BENCH_DIR` (where to store), `BENCH_SECONDS`, `BENCH_DEVICES`, `BENCH_PROTOCOL`.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::cast_precision_loss,
    reason = "a program that prints figures"
)]

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fieldline_contracts::registry::RegistryExt;
use fieldline_contracts::{
    Actor, ChannelControl, Clock, History, MemoryBus, MemoryState, Platform, SystemClock,
};
use fieldline_gateway::{Gateway, GatewayConfig};
use fieldline_ingest::Ingest;
use fieldline_mdb::{Disk, DiskFile, Mdb, MdbConfig, RealDisk};
use fieldline_model::{AccountId, Channel, ChannelId};
use fieldline_router::LocalCommands;
use fieldline_testkit::{Fleet, MemoryRegistry, Protocol, Stats};
use tokio_util::sync::CancellationToken;

// As the program itself has.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Outcome<T> = Result<T, Box<dyn Error>>;

fn setting<T: std::str::FromStr>(name: &str, default: T) -> T {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn main() -> Outcome<()> {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (Some("--load"), Some(target)) => load(target),
        _ => bench(),
    }
}

/// The trackers: as fast as they are acknowledged, until the process is ended.
fn load(target: String) -> Outcome<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let protocol = Protocol::parse(&setting("BENCH_PROTOCOL", "teltonika".to_owned()))?;
        let devices = setting("BENCH_DEVICES", 200);
        let fleet = Fleet::new(protocol, devices, 0.0, target, Arc::new(SystemClock));
        fleet.run(CancellationToken::new(), Arc::new(Stats::default())).await;
        Ok(())
    })
}

struct Load(Child);

impl Drop for Load {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.0.kill().and_then(|()| self.0.wait());
    }
}

#[derive(Default)]
struct Counts {
    syncs: AtomicU64,
    bytes: AtomicU64,
}

/// The real disk, with what is written to logs counted.
struct CountingDisk(Arc<Counts>);
struct CountingFile(Box<dyn DiskFile>, Arc<Counts>);

impl DiskFile for CountingFile {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(into, offset)
    }
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.1.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.0.write_all_at(bytes, offset)
    }
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.0.set_len(bytes)
    }
    fn sync(&self) -> io::Result<()> {
        self.1.syncs.fetch_add(1, Ordering::Relaxed);
        self.0.sync()
    }
}

impl Disk for CountingDisk {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        RealDisk.create_dir_all(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.sync_dir(path)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        RealDisk.list(path)
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let file = RealDisk.create(path)?;
        if path.extension().is_some_and(|extension| extension == "log") {
            return Ok(Box::new(CountingFile(file, Arc::clone(&self.0))));
        }
        Ok(file)
    }
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        RealDisk.open(path)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }
    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        RealDisk.lock(path)
    }
}

/// Processor seconds that this process has used.
fn processor_s() -> Outcome<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // After the name in brackets; user and system time are the 14th and 15th fields.
    let rest = stat.rsplit_once(')').ok_or("no process name")?.1;
    let ticks: u64 =
        rest.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<u64>().ok()).sum();
    Ok(ticks as f64 / 100.0)
}

/// Syncs a second of `bytes` each, appended to one file in `dir`.
fn syncs_per_s(dir: &Path, bytes: usize) -> io::Result<f64> {
    use std::io::Write;
    let path = dir.join("wall");
    let mut file = std::fs::File::create(&path)?;
    let block = vec![0xa5_u8; bytes.max(1)];
    let begun = Instant::now();
    let mut count = 0_u32;
    while begun.elapsed() < Duration::from_secs(3) {
        file.write_all(&block)?;
        file.sync_data()?;
        count += 1;
    }
    let rate = f64::from(count) / begun.elapsed().as_secs_f64();
    std::fs::remove_file(path)?;
    Ok(rate)
}

fn bench() -> Outcome<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(serve())
}

async fn serve() -> Outcome<()> {
    let seconds: u64 = setting("BENCH_SECONDS", 15);
    let protocol: String = setting("BENCH_PROTOCOL", "teltonika".to_owned());
    let parent = setting("BENCH_DIR", PathBuf::from("bench/out"));
    std::fs::create_dir_all(&parent)?;
    let folder = tempfile::tempdir_in(&parent)?;

    let clock = Arc::new(SystemClock);
    let counts = Arc::new(Counts::default());
    let disk = Arc::new(CountingDisk(Arc::clone(&counts)));
    let history = Arc::new(Mdb::open_on(
        disk,
        folder.path().join("mdb"),
        MdbConfig::default(),
        clock.clone(),
    )?);
    let registry = Arc::new(MemoryRegistry::new(clock.clone()));
    let platform = Platform {
        registry: registry.clone(),
        history: history.clone(),
        state: Arc::new(MemoryState::new()),
        bus: Arc::new(MemoryBus::new()),
        commands: Arc::new(LocalCommands::new(registry.clone(), clock.clone())),
        clock: clock.clone(),
    };
    let gateway = Gateway::new(GatewayConfig::default(), Ingest::new(platform));
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(fieldline_gateway::run(gateway.clone(), shutdown.clone()));
    let account = AccountId::new(clock.now(), clock.random());
    let channel: Channel = serde_json::from_value(serde_json::json!({
        "id": ChannelId::new(clock.now(), clock.random()), "account": account, "name": "bench",
        "protocol": protocol, "transport": "tcp", "listen": "127.0.0.1:0", "enabled": true,
        "auto_register": true, "connection_bytes_per_s_max": 0, "created_at": clock.now(),
    }))?;
    registry.create_object(account, &channel, &Actor::system("bench")).await?;
    let address = loop {
        let status = gateway.status(account, channel.id).await;
        if let Some(error) = status.error {
            return Err(error.into());
        }
        if let Some(address) = status.address {
            break address;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let program = std::env::current_exe()?;
    let trackers =
        Load(Command::new(program).args(["--load", &address]).stdin(Stdio::null()).spawn()?);

    // The first seconds connect and fill caches.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let messages = async || -> u64 {
        let connections = gateway.connections(account, channel.id).await.items;
        connections.iter().map(|connection| connection.messages).sum()
    };
    let (begun, used) = (Instant::now(), processor_s()?);
    let (before, stored_before) = (messages().await, history.stats(None).messages);
    let (syncs_before, bytes_before) =
        (counts.syncs.load(Ordering::Relaxed), counts.bytes.load(Ordering::Relaxed));
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let acked = (messages().await - before) as f64;
    let stored = (history.stats(None).messages - stored_before) as f64;
    let elapsed_s = begun.elapsed().as_secs_f64();
    let used_s = processor_s()? - used;
    let syncs = counts.syncs.load(Ordering::Relaxed) - syncs_before;
    let bytes = counts.bytes.load(Ordering::Relaxed) - bytes_before;
    let connections = gateway.connections_count();
    drop(trackers);
    shutdown.cancel();
    running.await??;
    history.close().await?;

    let group = stored / syncs.max(1) as f64;
    let group_bytes = usize::try_from(bytes / syncs.max(1)).unwrap_or(usize::MAX);
    let wall_syncs = syncs_per_s(folder.path(), group_bytes)?;
    let wall = group * wall_syncs;
    let rate = acked / elapsed_s;
    println!("protocol {protocol}, {connections} connections, {elapsed_s:.1} s");
    println!(
        "acknowledged {rate:.0} messages/s with {:.2} cores busy in the server",
        used_s / elapsed_s
    );
    println!(
        "stored {:.0} records/s, log lines included; {:.0} syncs/s of {group:.0} records, {group_bytes} bytes",
        stored / elapsed_s,
        syncs as f64 / elapsed_s
    );
    println!(
        "this disk alone: {wall_syncs:.0} syncs/s of that size, a wall of {wall:.0} records/s"
    );
    println!("messages per second and core {:.0}", acked / used_s);
    println!("ratio to the wall {:.2}", stored / elapsed_s / wall);
    println!("messages per second {rate:.0}");
    Ok(())
}
