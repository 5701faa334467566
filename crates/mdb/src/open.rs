//! Opening: what is on disk becomes what is in memory.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::thread::JoinHandle;

use fieldline_contracts::Clock;
use fieldline_model::Series;
use parking_lot::{Condvar, Mutex, RwLock};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tracing::{error, info, warn};

use crate::cache::Cache;
use crate::config::{MdbConfig, OpenError};
use crate::dict::Dict;
use crate::disk::{Disk, DiskFile};
use crate::hash::FoldMap;
use crate::manifest::{self, Manifest};
use crate::memtable::{Memtable, Message};
use crate::queue::Queue;
use crate::segment::{self, Segment};
use crate::shard::{RESERVE, Sealing, Shard, Version, View};
use crate::snapshot::{self, SnapshotReader};
use crate::writer::Writer;
use crate::{merge, seal, wal};

/// What opening a directory gives.
pub(crate) struct Opened {
    pub(crate) shards: Vec<Arc<Shard>>,
    pub(crate) threads: Vec<JoinHandle<()>>,
    pub(crate) lock: Box<dyn Send + Sync>,
}

/// Ends the names of what was cut off damaged logs; one that is empty stands for a lost file.
pub(crate) const DAMAGED: &str = ".damaged";

/// The format this program writes.
const FORMAT: u32 = 1;

/// The file that says what the directory is.
#[derive(Serialize, Deserialize)]
struct StoreFile {
    format: u32,
    shards: u16,
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::Io { action, path, source }
}

/// All of a file.
pub(crate) fn read_all(file: &dyn DiskFile) -> io::Result<Vec<u8>> {
    let length = usize::try_from(file.len()?).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// A file could not be put in the place of another.
pub(crate) struct NotReplaced {
    pub(crate) error: io::Error,
    /// Whether the old file may be gone all the same: then what either names must stay.
    pub(crate) unknown: bool,
}

/// Puts a file in the place of another, whole or not at all, durably.
pub(crate) fn replace(
    disk: &dyn Disk,
    dir: &Path,
    name: &str,
    bytes: &[u8],
) -> Result<(), NotReplaced> {
    let temporary = dir.join(format!("{name}.tmp"));
    let written = disk.create(&temporary).and_then(|file| {
        file.write_all_at(bytes, 0)?;
        file.sync()
    });
    written.map_err(|error| NotReplaced { error, unknown: false })?;
    let switched = disk.rename(&temporary, &dir.join(name)).and_then(|()| disk.sync_dir(dir));
    switched.map_err(|error| NotReplaced { error, unknown: true })
}

impl From<NotReplaced> for io::Error {
    fn from(not: NotReplaced) -> Self {
        not.error
    }
}

/// The number in a name such as `wal-000000000001.log`.
pub(crate) fn number_in(name: &str, prefix: &str, suffix: &str) -> Option<u64> {
    name.strip_prefix(prefix)?.strip_suffix(suffix)?.parse().ok()
}

pub(crate) fn open(
    disk: Arc<dyn Disk>,
    dir: &Path,
    mut config: MdbConfig,
    clock: Arc<dyn Clock>,
) -> Result<Opened, OpenError> {
    config.validate()?;
    disk.create_dir_all(dir).map_err(io_error("create", dir))?;
    let lock_path = dir.join("LOCK");
    let lock = disk.lock(&lock_path).map_err(|source| match source.kind() {
        io::ErrorKind::WouldBlock => OpenError::Locked { path: dir.to_owned() },
        _ => OpenError::Io { action: "lock", path: lock_path, source },
    })?;
    config.shards = store_file(&*disk, dir, config.shards)?;
    let mut shards = Vec::new();
    let mut threads = Vec::new();
    let cache = Arc::new(Cache::new(config.cache_bytes_max));
    let shared = Shared { disk: &disk, store: dir, config: &config, clock: &clock, cache: &cache };
    let mut writers = Vec::new();
    for number in 0..config.shards {
        let (shard, writer) = open_shard(&shared, number)?;
        writers.push((shard.clone(), writer));
        shards.push(shard);
    }
    // Threads last: where a shard does not open, none is left running.
    for (shard, writer) in writers {
        let number = shard.number;
        let mut start = |name: &str, work: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(format!("mdb-{name}-{number}"));
            threads.push(thread.spawn(work).map_err(io_error("start a thread for", dir))?);
            Ok(())
        };
        let (sealing, merging) = (shard.clone(), shard);
        start("write", Box::new(move || writer.run()))?;
        start("seal", Box::new(move || seal::run(&sealing)))?;
        start("merge", Box::new(move || merge::run(&merging)))?;
    }
    Ok(Opened { shards, threads, lock })
}

/// Reads or makes the file at the top; returns the count of shards.
fn store_file(disk: &dyn Disk, dir: &Path, shards: u16) -> Result<u16, OpenError> {
    const NAME: &str = "STORE";
    let path = dir.join(NAME);
    let names = disk.list(dir).map_err(io_error("list", dir))?;
    if !names.iter().any(|name| name == NAME) {
        if names.iter().any(|name| name.starts_with("shard-")) {
            let reason = "it is missing, but there are shards".to_owned();
            return Err(OpenError::Damaged { path, reason });
        }
        let text = serde_json::to_vec(&StoreFile { format: FORMAT, shards }).unwrap_or_default();
        replace(disk, dir, NAME, &text)
            .map_err(io::Error::from)
            .map_err(io_error("write", &path))?;
        return Ok(shards);
    }
    let file = disk.open(&path).map_err(io_error("open", &path))?;
    let bytes = read_all(&*file).map_err(io_error("read", &path))?;
    let store: StoreFile = serde_json::from_slice(&bytes)
        .map_err(|error| OpenError::Damaged { path: path.clone(), reason: error.to_string() })?;
    if store.format > FORMAT {
        return Err(OpenError::Newer { path, found: store.format, known: FORMAT });
    }
    if !(1..=64).contains(&store.shards) {
        let reason = format!("it names {} shards", store.shards);
        return Err(OpenError::Damaged { path, reason });
    }
    if store.shards != shards {
        warn!(stored = store.shards, configured = shards, "the store keeps its count of shards");
    }
    Ok(store.shards)
}

/// Memtables as the log brings them back.
struct Recovery {
    dict: Dict,
    active: Memtable,
    frozen: VecDeque<Arc<Memtable>>,
    newest: FoldMap<Series, i64>,
    next_seq: u64,
    /// The log file that was read last, and up to where it is sound.
    before: Option<wal::FileBefore>,
    damaged: DamagedLogs,
}

/// Names of what is left of damaged log files.
struct DamagedLogs(Vec<String>);

impl DamagedLogs {
    /// Notes that a log file is damaged or missing.
    fn add(&mut self, log: u64) {
        let name = format!("{}{DAMAGED}", wal::file_name(log));
        if !self.0.contains(&name) {
            self.0.push(name);
        }
    }
}

/// What all shards of a store share.
struct Shared<'a> {
    disk: &'a Arc<dyn Disk>,
    store: &'a Path,
    config: &'a MdbConfig,
    clock: &'a Arc<dyn Clock>,
    cache: &'a Arc<Cache>,
}

fn open_shard(shared: &Shared<'_>, number: u16) -> Result<(Arc<Shard>, Writer), OpenError> {
    let Shared { disk, store, config, clock, cache } = shared;
    let dir = store.join(format!("shard-{number:02}"));
    disk.create_dir_all(&dir).map_err(io_error("create", &dir))?;
    disk.sync_dir(store).map_err(io_error("sync", store))?;
    let names = disk.list(&dir).map_err(io_error("list", &dir))?;
    let manifest = read_manifest(&***disk, &dir, number, &names)?;
    let mut segments = Vec::new();
    for meta in &manifest.segments {
        let path = dir.join(segment::file_name(meta.number));
        let opened = Segment::open(disk, cache, &dir, number, meta.clone());
        segments.push(Arc::new(opened.map_err(io_error("open", &path))?));
    }
    segments.sort_by_key(|segment| segment.meta.first_seq);
    // What was read may be in the system's memory only, after a sync that failed in the
    // process before. It must be durable before what it makes superfluous is removed,
    // and all that it names is there.
    manifest.write(&***disk, &dir).map_err(io::Error::from).map_err(io_error("write", &dir))?;
    let logs = sweep(&***disk, &dir, &names, &manifest);
    let damaged = names.iter().filter(|name| name.ends_with(DAMAGED)).cloned();
    let sealed_seq = manifest.next_seq - 1;
    let version = Version { segments, sealed_seq, retained: 0 };
    let (newest, snapshot_bytes) = read_newest(&***disk, &dir, &manifest, &version);
    let mut recovery = Recovery {
        dict: Dict::default(),
        active: Memtable::default(),
        frozen: VecDeque::new(),
        newest,
        next_seq: manifest.next_seq,
        before: None,
        damaged: DamagedLogs(damaged.collect()),
    };
    let mut expected = manifest.log_from;
    for log in &logs {
        // Numbers are given without gaps, and files are removed from the first on.
        if *log > expected {
            missing(&***disk, &dir, expected, log - expected)
                .map_err(io_error("write in", &dir))?;
            recovery.damaged.add(expected);
        }
        let newest = logs.last() == Some(log);
        recovery.log(&***disk, &dir, (*log, newest), number, config, clock)?;
        expected = log.saturating_add(1);
    }
    let next_file = logs.last().map_or(manifest.log_from, |last| last + 1);
    let messages = recovery.active.messages.len()
        + recovery.frozen.iter().map(|table| table.messages.len()).sum::<usize>();
    info!(shard = number, messages, segments = manifest.segments.len(), "a shard was opened");
    let Recovery { dict, active, frozen, newest, next_seq, before, damaged } = recovery;
    let shard = Arc::new(Shard {
        number,
        label: number.to_string(),
        dir,
        disk: (*disk).clone(),
        clock: (*clock).clone(),
        config: (*config).clone(),
        queue: Queue::default(),
        room: Arc::new(Semaphore::new(config.queue_bytes_max / 1024)),
        view: RwLock::new(View { active, frozen, version: Arc::new(version) }),
        cache: (*cache).clone(),
        next_number: AtomicU64::new(manifest.next_number),
        manifest: Mutex::new(manifest),
        snapshot_bytes: AtomicU64::new(snapshot_bytes),
        ended: AtomicBool::new(false),
        replacing: Mutex::new(()),
        snapshotting: Mutex::new(()),
        trouble: Mutex::new(None),
        damaged_logs: damaged.0.len(),
        sealing: Mutex::new(Sealing::default()),
        frozen: Condvar::new(),
        sealed: Condvar::new(),
    });
    let writer = Writer::new(shard.clone(), dict, next_file, before, next_seq, newest);
    Ok((shard, writer))
}

fn read_manifest(
    disk: &dyn Disk,
    dir: &Path,
    shard: u16,
    names: &[String],
) -> Result<Manifest, OpenError> {
    let path = dir.join(manifest::NAME);
    if !names.iter().any(|name| name == manifest::NAME) {
        // It is made before anything else: one that was lost must not make the rest look left over.
        if names.iter().any(|name| !name.ends_with(".tmp") && name != RESERVE) {
            let reason = "it is missing, but there are other files".to_owned();
            return Err(OpenError::Damaged { path, reason });
        }
        let manifest = Manifest::new(shard);
        manifest.write(disk, dir).map_err(io::Error::from).map_err(io_error("write", &path))?;
        return Ok(manifest);
    }
    let file = disk.open(&path).map_err(io_error("open", &path))?;
    let bytes = read_all(&*file).map_err(io_error("read", &path))?;
    let mut manifest = Manifest::from_bytes(&bytes)
        .map_err(|reason| OpenError::Damaged { path: path.clone(), reason })?;
    if manifest.format > manifest::FORMAT {
        let (found, known) = (manifest.format, manifest::FORMAT);
        return Err(OpenError::Newer { path, found, known });
    }
    if manifest.shard != shard || manifest.next_seq == 0 {
        let reason = format!("it is of shard {}", manifest.shard);
        return Err(OpenError::Damaged { path, reason });
    }
    // From now on there are segments that earlier programs cannot read.
    manifest.format = manifest::FORMAT;
    Ok(manifest)
}

/// Removes what a crash left over; returns the log files that count, in order.
fn sweep(disk: &dyn Disk, dir: &Path, names: &[String], manifest: &Manifest) -> Vec<u64> {
    let mut logs = Vec::new();
    for name in names {
        let left_over = if let Some(number) = number_in(name, "wal-", ".log") {
            if number >= manifest.log_from {
                logs.push(number);
            }
            number < manifest.log_from
        } else if let Some(number) = number_in(name, "seg-", ".seg") {
            !manifest.segments.iter().any(|segment| segment.number == number)
        } else if let Some(number) = number_in(name, "last-", ".snap") {
            manifest.snapshot != Some(number)
        } else {
            name.ends_with(".tmp")
        };
        if left_over && let Err(error) = disk.remove(&dir.join(name)) {
            warn!(dir = %dir.display(), name, %error, "a left-over file was not removed");
        }
    }
    logs.sort_unstable();
    logs
}

/// The newest time of every sealed series, and the size of the snapshot it is from.
fn read_newest(
    disk: &dyn Disk,
    dir: &Path,
    manifest: &Manifest,
    version: &Version,
) -> (FoldMap<Series, i64>, u64) {
    let mut newest = FoldMap::default();
    let Some(number) = manifest.snapshot else { return (newest, 0) };
    let path = dir.join(snapshot::file_name(number));
    let read = SnapshotReader::open(disk, &path).and_then(|mut reader| {
        while let Some((series, latest)) = reader.next()? {
            newest.insert(series, latest.newest);
        }
        Ok(reader.bytes())
    });
    match read {
        Ok(bytes) => (newest, bytes),
        Err(unreadable) => {
            error!(path = %path.display(), reason = unreadable.0, "the snapshot cannot be read; it is made anew with the next seal");
            for segment in &version.segments {
                // A damaged index hides its messages: its duplicates are not known either.
                let Ok(pages) = segment.series_pages() else { continue };
                for page in pages.flatten() {
                    for (series, blocks) in page.iter() {
                        let last = blocks.iter().map(|block| block.to).max().unwrap_or(i64::MIN);
                        let known = newest.entry(*series).or_insert(last);
                        *known = last.max(*known);
                    }
                }
            }
            (newest, 0)
        }
    }
}

impl Recovery {
    /// Takes in one log file, and cuts off what is torn. Notes where this one or the one
    /// before is damaged.
    fn log(
        &mut self,
        disk: &dyn Disk,
        dir: &Path,
        (number, is_newest): (u64, bool),
        shard: u16,
        config: &MdbConfig,
        clock: &Arc<dyn Clock>,
    ) -> Result<(), OpenError> {
        let name = wal::file_name(number);
        let path = dir.join(&name);
        let file = disk.open(&path).map_err(io_error("open", &path))?;
        let bytes = read_all(&*file).map_err(io_error("read", &path))?;
        let mut messages: Vec<Message> = Vec::new();
        let mut bodies: Vec<u8> = Vec::new();
        let Self { dict, active, newest, next_seq, damaged: damaged_logs, .. } = self;
        let extent = wal::replay(&bytes, number, shard, |message| {
            let series = dict.series(message.series, || newest.get(&message.series).copied());
            if let Some(entry) = dict.series.get_mut(series as usize) {
                entry.item.newest = entry.item.newest.max(Some(message.timestamp));
            }
            let shape = message.shape.intern(dict);
            *next_seq = (*next_seq).max(message.seq.saturating_add(1));
            messages.push(Message {
                seq: message.seq,
                timestamp: message.timestamp,
                received: message.received,
                hash: message.hash,
                series,
                shape,
                chunk: 0,
                start: u32::try_from(bodies.len()).unwrap_or(u32::MAX),
                length: u32::try_from(message.body.len()).unwrap_or(u32::MAX),
            });
            bodies.extend_from_slice(message.body);
        });
        if !messages.is_empty() {
            active.publish(dict, messages, bodies.into());
            active.file_bytes += extent.sound as u64;
            active.since.get_or_insert(clock.now());
        }
        active.files.push(number);
        // It was durable up to there when this file was begun. That it was cut between two frames
        // cannot be seen from itself.
        if let (Some(known), Some(told)) = (self.before, extent.before)
            && known.number == told.number
            && known.bytes < told.bytes
        {
            lost_end(disk, dir, known, told).map_err(io_error("write in", dir))?;
            damaged_logs.add(known.number);
        }
        self.before = Some(wal::FileBefore { number, bytes: extent.sound as u64 });
        let rest = bytes.get(extent.sound..).unwrap_or(&[]);
        // A header is durable before a frame follows it, and a file's end before the next
        // file is begun: only the end of the newest file can be torn.
        let damaged = extent.more
            || (!rest.is_empty() && !is_newest)
            || (!extent.header && bytes.len() > wal::HEADER_BYTES);
        if damaged {
            let cut = if rest.is_empty() { bytes.get(..wal::HEADER_BYTES) } else { Some(rest) };
            let kept = replace(disk, dir, &format!("{name}{DAMAGED}"), cut.unwrap_or(&[]));
            kept.map_err(io::Error::from).map_err(io_error("keep what is damaged of", &path))?;
            metrics::counter!("fieldline_mdb_log_damaged_total").increment(1);
            error!(path = %path.display(), offset = extent.sound, bytes = rest.len(), header = extent.header,
                "the log is damaged; what cannot be read is kept beside it as .damaged");
            // Messages in there were seen: their numbers must not be given again.
            *next_seq += (rest.len() / wal::MESSAGE_BYTES_MIN) as u64 + 1;
            damaged_logs.add(number);
        } else if !rest.is_empty() {
            info!(path = %path.display(), offset = extent.sound, bytes = rest.len(),
                "a torn tail was cut off the log");
        }
        // From now on these messages are known, and a sender of duplicates is told that
        // they are durable. They may be in the system's memory only: the process before
        // was killed before its sync, or its sync failed, after which another sync alone
        // says nothing. Writing the same bytes again and syncing them does.
        if let Some(frames) = bytes.get(wal::HEADER_BYTES..extent.sound) {
            let written = file
                .write_all_at(&wal::header(number, shard), 0)
                .and_then(|()| file.write_all_at(frames, wal::HEADER_BYTES as u64))
                .and_then(|()| file.sync());
            written.map_err(io_error("sync", &path))?;
        }
        if !rest.is_empty() {
            let cut = file.set_len(extent.sound as u64).and_then(|()| file.sync());
            cut.map_err(io_error("cut", &path))?;
        }
        // As full as the writer lets them become.
        if active.bytes + dict.bytes >= config.memtable_bytes_max
            || active.file_bytes >= config.wal_bytes_max
        {
            let dict = std::mem::take(&mut self.dict);
            let known = dict.series.iter().filter_map(|e| Some((e.item.series, e.item.newest?)));
            self.newest.extend(known);
            self.frozen.push_back(Arc::new(std::mem::take(&mut self.active)));
        }
        Ok(())
    }
}

/// A log file ends before where a later one says that it was durable: leaves a mark of it, unless
/// what was damaged of it is kept already.
fn lost_end(
    disk: &dyn Disk,
    dir: &Path,
    known: wal::FileBefore,
    told: wal::FileBefore,
) -> io::Result<()> {
    let name = wal::file_name(known.number);
    let mark = format!("{name}{DAMAGED}");
    if disk.list(dir)?.contains(&mark) {
        return Ok(());
    }
    metrics::counter!("fieldline_mdb_log_damaged_total").increment(1);
    error!(path = %dir.join(name).display(), bytes = known.bytes, durable = told.bytes,
        "a log file has lost its end, and the messages in it");
    Ok(replace(disk, dir, &mark, &[])?)
}

/// Log files from `number` on are not there though a later one is: leaves a mark of them.
fn missing(disk: &dyn Disk, dir: &Path, number: u64, count: u64) -> io::Result<()> {
    let path = dir.join(wal::file_name(number));
    metrics::counter!("fieldline_mdb_log_damaged_total").increment(count);
    error!(path = %path.display(), count, "log files are missing, and the messages in them are lost");
    Ok(replace(disk, dir, &format!("{}{DAMAGED}", wal::file_name(number)), &[])?)
}
