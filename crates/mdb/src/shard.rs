//! What the writer, the sealer and the readers of one shard share.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use fieldline_contracts::{Clock, HistoryError, HistoryStats, Order, Query};
use fieldline_model::{AccountId, Series, SeriesKind, Stored};
use parking_lot::{Condvar, Mutex, RwLock};
use tokio::sync::Semaphore;
use tracing::warn;

use crate::cache::Cache;
use crate::config::MdbConfig;
use crate::dict::Dict;
use crate::disk::Disk;
use crate::manifest::Manifest;
use crate::memtable::{LastValues, Memtable, Message};
use crate::open::NotReplaced;
use crate::queue::Queue;
use crate::read::Found;
use crate::segment::Segment;
use crate::snapshot::{self, Latest, SnapshotReader};
use crate::wal;

/// What readers see; changed under one lock, so that a message is never seen
/// twice nor missed while it moves from memory to disk.
pub(crate) struct View {
    pub(crate) active: Memtable,
    /// Waiting to be sealed, oldest first.
    pub(crate) frozen: VecDeque<Arc<Memtable>>,
    pub(crate) version: Arc<Version>,
}

/// The segments that count.
#[derive(Clone, Default)]
pub(crate) struct Version {
    /// By their first sequence.
    pub(crate) segments: Vec<Arc<Segment>>,
    /// Messages up to this sequence are in segments, or gone.
    pub(crate) sealed_seq: u64,
    /// How often retention took something.
    pub(crate) retained: u64,
}

/// How sealing goes.
#[derive(Default)]
pub(crate) struct Sealing {
    /// Why the last attempt failed.
    pub(crate) failed: Option<HistoryError>,
    /// How many attempts have failed.
    pub(crate) failures: u64,
    pub(crate) stop: bool,
}

pub(crate) struct Shard {
    pub(crate) number: u16,
    /// The number as a label of metrics.
    pub(crate) label: String,
    pub(crate) dir: PathBuf,
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) config: MdbConfig,
    pub(crate) queue: Queue,
    /// Room in the queue, in KiB.
    pub(crate) room: Arc<Semaphore>,
    pub(crate) view: RwLock<View>,
    pub(crate) cache: Arc<Cache>,
    /// The manifest as it is on disk.
    pub(crate) manifest: Mutex<Manifest>,
    /// The number of the next segment or snapshot.
    pub(crate) next_number: AtomicU64,
    pub(crate) snapshot_bytes: AtomicU64,
    /// It is closed: the directory may be another's, nothing is changed in it any more.
    pub(crate) ended: AtomicBool,
    /// Held by what replaces segments by others: merging and retention.
    pub(crate) replacing: Mutex<()>,
    /// Held by what replaces the snapshot: sealing and retention.
    pub(crate) snapshotting: Mutex<()>,
    /// Why nothing can be appended now.
    pub(crate) trouble: Mutex<Option<HistoryError>>,
    /// Log files that were found damaged and of which what is left lies beside them.
    pub(crate) damaged_logs: usize,
    pub(crate) sealing: Mutex<Sealing>,
    /// Something was frozen, or the sealer is to stop.
    pub(crate) frozen: Condvar,
    /// Something was sealed, or the merger is to stop.
    pub(crate) sealed: Condvar,
}

/// The file whose bytes are set aside for a full disk.
pub(crate) const RESERVE: &str = "RESERVE";
const RESERVE_BYTES: u64 = 64 << 10;
/// Damaged segments of a shard that are named in warnings.
const WARNINGS_MAX: usize = 5;

impl Shard {
    pub(crate) fn wal_path(&self, number: u64) -> PathBuf {
        self.dir.join(wal::file_name(number))
    }

    /// Notes that a log file was begun: it belongs to the memtable that is filled now.
    pub(crate) fn log_began(&self, number: u64) {
        self.view.write().active.files.push(number);
    }

    /// Whether the memtable, with `dict_bytes` of its dictionary, is to be sealed.
    pub(crate) fn is_full(&self, dict_bytes: usize) -> bool {
        let view = self.view.read();
        view.active.bytes + dict_bytes >= self.config.memtable_bytes_max
            || view.active.file_bytes >= self.config.wal_bytes_max
    }

    pub(crate) fn publish(
        &self,
        dict: &Dict,
        messages: Vec<Message>,
        bodies: Arc<[u8]>,
        file_bytes: u64,
    ) {
        let now = self.clock.now();
        let mut view = self.view.write();
        view.active.publish(dict, messages, bodies);
        view.active.file_bytes = file_bytes;
        view.active.since.get_or_insert(now);
    }

    /// Sets the memtable aside to be sealed and begins an empty one. False, with
    /// nothing changed, where too many wait already, for all of `seal_wait_max` if `wait`.
    pub(crate) fn freeze(&self, wait: bool) -> bool {
        let deadline = Instant::now() + self.config.seal_wait_max;
        let mut sealing = self.sealing.lock();
        loop {
            let mut view = self.view.write();
            if view.active.is_empty() {
                // Its files may hold what was refused: they stay until the next seal.
                let files = std::mem::take(&mut view.active.files);
                view.active = Memtable::of_files(files);
                return true;
            }
            if view.frozen.len() < self.config.frozen_max {
                let memtable = std::mem::take(&mut view.active);
                view.frozen.push_back(Arc::new(memtable));
                self.frozen.notify_all();
                return true;
            }
            drop(view);
            if !wait || sealing.stop || self.sealed.wait_until(&mut sealing, deadline).timed_out() {
                return false;
            }
        }
    }

    /// What appends are told while sealing does not keep up.
    pub(crate) fn seal_refusal(&self) -> HistoryError {
        self.sealing.lock().failed.clone().unwrap_or(HistoryError::Busy)
    }

    /// Changes the manifest on disk, then what readers see, as one step. Where it is
    /// not known whether the disk took it, nothing changes here, and no file that the
    /// old or the new manifest names may be removed.
    pub(crate) fn change(
        &self,
        edit: impl FnOnce(&mut Manifest),
        apply: impl FnOnce(&mut View),
    ) -> Result<(), NotReplaced> {
        let mut manifest = self.manifest.lock();
        if self.ended.load(Ordering::Acquire) {
            let error = io::Error::other("the store is closed");
            return Err(NotReplaced { error, unknown: false });
        }
        let mut next = manifest.clone();
        edit(&mut next);
        next.next_number = self.next_number.load(Ordering::Acquire);
        let mut written = next.write(&*self.disk, &self.dir);
        // Retention must work on a full disk: that is what it is for.
        if let Err(NotReplaced { error, unknown: false }) = &written
            && error.kind() == io::ErrorKind::StorageFull
            && self.disk.remove(&self.dir.join(RESERVE)).is_ok()
        {
            warn!(shard = self.number, "the disk is full: the reserve was given up");
            written = next.write(&*self.disk, &self.dir);
        }
        written?;
        *manifest = next;
        apply(&mut self.view.write());
        Ok(())
    }

    /// Sets bytes aside that a change of the manifest may use on a full disk. Without
    /// them everything else works: a failure is no error.
    pub(crate) fn keep_reserve(&self) {
        let path = self.dir.join(RESERVE);
        if self.disk.open(&path).and_then(|file| file.len()).is_ok_and(|n| n == RESERVE_BYTES) {
            return;
        }
        let zeros = vec![0; usize::try_from(RESERVE_BYTES).unwrap_or(0)];
        let made = self.disk.create(&path).and_then(|file| file.write_all_at(&zeros, 0));
        if made.is_err() {
            self.discard(&path);
        }
    }

    /// What keeps it from storing, in words that name no paths.
    pub(crate) fn problems(&self, into: &mut Vec<String>) {
        let number = self.number;
        let because = |error: &HistoryError| match error {
            HistoryError::Full(_) => "no space is left on the disk".to_owned(),
            HistoryError::Busy => "sealing does not keep up".to_owned(),
            other => format!("the disk fails ({})", other.code()),
        };
        if let Some(trouble) = &*self.trouble.lock() {
            let why = because(trouble);
            into.push(format!("shard {number} of the message store cannot append: {why}"));
        }
        if let Some(failed) = &self.sealing.lock().failed {
            let why = because(failed);
            into.push(format!("shard {number} of the message store cannot seal messages: {why}"));
        }
    }

    /// What was lost or cannot be read, in words that name no paths.
    pub(crate) fn warnings(&self, into: &mut Vec<String>) {
        let number = self.number;
        if self.damaged_logs > 0 {
            let count = self.damaged_logs;
            into.push(format!(
                "shard {number} of the message store had {count} damaged or lost log files: messages may \
                 be missing; what is left of them lies in its directory as *.damaged until it is removed"
            ));
        }
        let version = self.version();
        let damaged = version.segments.iter().filter_map(|segment| segment.warning());
        let before = into.len();
        into.extend(damaged.take(WARNINGS_MAX + 1));
        if into.len() > before + WARNINGS_MAX {
            into.truncate(before + WARNINGS_MAX);
            into.push(format!("more segments of shard {number} of the message store are damaged"));
        }
    }

    /// Waits for what changes files of the shard now, and lets nothing do so later.
    /// Its threads have ended.
    pub(crate) fn end(&self) {
        let _replacing = self.replacing.lock();
        let _snapshotting = self.snapshotting.lock();
        self.ended.store(true, Ordering::Release);
    }

    /// Whether it is to stop; what takes long looks often.
    pub(crate) fn stops(&self) -> bool {
        self.sealing.lock().stop
    }

    pub(crate) fn take_number(&self) -> u64 {
        self.next_number.fetch_add(1, Ordering::AcqRel)
    }

    pub(crate) fn version(&self) -> Arc<Version> {
        self.view.read().version.clone()
    }

    /// The sequence of the message of this series, time and content, if it is there.
    pub(crate) fn find(&self, series: &Series, timestamp: i64, hash: u64) -> Option<u64> {
        let version = {
            let view = self.view.read();
            let mut tables = view.tables().rev();
            let found = tables.find_map(|table| table.find(series, timestamp, hash));
            if found.is_some() {
                return found;
            }
            view.version.clone()
        };
        version.find(series, timestamp, hash)
    }

    pub(crate) fn read(&self, query: &Query) -> Result<Vec<Stored>, HistoryError> {
        let limit = query.limit.min(Query::LIMIT_MAX);
        let mut hits = Vec::new();
        let version = {
            let view = self.view.read();
            for table in view.tables() {
                table.read(query, limit, &mut hits);
            }
            view.version.clone()
        };
        let (mut found, horizon) = version.read(query, limit);
        found.extend(hits.into_iter().map(Found::Memory));
        // What follows something that is hidden is not the next.
        found.retain(|found| horizon.holds(found.key().0));
        if let Some(error) = horizon.error.filter(|_| found.is_empty()) {
            return Err(error);
        }
        found.sort_unstable_by_key(Found::key);
        if query.order == Order::Descending {
            found.reverse();
        }
        found.truncate(limit);
        self.page(found.iter())
    }

    pub(crate) fn tail(
        &self,
        after: u64,
        limit: usize,
        over_damage: bool,
    ) -> Result<Vec<Stored>, HistoryError> {
        let mut hits = Vec::new();
        let version = {
            let view = self.view.read();
            // What is sealed comes first, and from the segments.
            let after = after.max(view.version.sealed_seq);
            for table in view.tables() {
                table.tail(after, limit.saturating_sub(hits.len()), &mut hits);
            }
            view.version.clone()
        };
        let (mut sealed, whole) =
            version.tail(self.number, &self.cache, after, limit, over_damage)?;
        if whole {
            sealed.extend(hits);
        }
        sealed.truncate(limit);
        let found: Vec<Found> = sealed.into_iter().map(Found::Memory).collect();
        self.page(found.iter())
    }

    /// As many messages as one answer may have in bytes, and one at least.
    fn page<'a>(
        &self,
        found: impl Iterator<Item = &'a Found>,
    ) -> Result<Vec<Stored>, HistoryError> {
        let (mut page, mut bytes, mut scratch) = (Vec::new(), 0, Vec::new());
        for found in found {
            let stored = self.stored(found, &mut scratch)?;
            bytes += stored.params().content_bytes();
            if bytes > Query::BYTES_MAX && !page.is_empty() {
                break;
            }
            page.push(stored);
        }
        Ok(page)
    }

    /// Hands over every message series with its last values.
    pub(crate) fn last_values(
        &self,
        mut visit: impl FnMut(Series, LastValues) -> bool,
    ) -> Result<(), HistoryError> {
        // The snapshot must not be replaced and removed while it is read.
        let snapshotting = self.snapshotting.lock();
        let snapshot = self.manifest.lock().snapshot;
        let (tables, version) = {
            let view = self.view.read();
            let mut tables: Vec<Arc<Memtable>> = view.frozen.iter().cloned().collect();
            tables.push(Arc::new(view.active.copy()));
            (tables, view.version.clone())
        };
        let mut later: BTreeMap<Series, Latest> = BTreeMap::new();
        for table in &tables {
            for (series, latest) in table.latest() {
                later.entry(series).or_default().merge(latest);
            }
        }
        let sealed = snapshot.map(|n| self.dir.join(snapshot::file_name(n)));
        let sealed = sealed.map(|path| SnapshotReader::open(&*self.disk, &path)).transpose();
        let mut give = |series: Series, latest: Latest| {
            series.kind != SeriesKind::Message || visit(series, latest.values)
        };
        let read = sealed.and_then(|reader| {
            let Some(mut reader) = reader else { return Ok(true) };
            while let Some((series, mut latest)) = reader.next()? {
                if let Some(more) = later.remove(&series) {
                    latest.merge(more);
                }
                if !give(series, latest) {
                    return Ok(false);
                }
            }
            Ok(true)
        });
        drop(snapshotting);
        match read {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(unreadable) => {
                warn!(
                    shard = self.number,
                    reason = unreadable.0,
                    "last values are read from the segments"
                );
                for (series, mut latest) in version.latest()? {
                    if let Some(more) = later.remove(&series) {
                        latest.merge(more);
                    }
                    if !give(series, latest) {
                        return Ok(());
                    }
                }
            }
        }
        for (series, latest) in later {
            if !give(series, latest) {
                break;
            }
        }
        Ok(())
    }

    pub(crate) fn stats(&self, account: Option<AccountId>, into: &mut HistoryStats) {
        let view = self.view.read();
        for segment in &view.version.segments {
            match account {
                None => {
                    into.messages += segment.meta.messages;
                    into.bytes += segment.meta.bytes;
                    into.segments += 1;
                }
                Some(account) => {
                    for part in segment.meta.accounts.iter().filter(|a| a.account == account) {
                        into.messages += part.messages;
                        into.bytes += part.bytes;
                        into.segments += 1;
                    }
                }
            }
        }
        if account.is_none() {
            into.bytes += self.snapshot_bytes.load(Ordering::Relaxed);
        }
        for table in view.tables() {
            for series in &table.series {
                if account.is_none_or(|account| account == series.series.account) {
                    let count = series.order.len() as u64;
                    into.messages += count;
                    into.unsealed += count;
                    if account.is_some() {
                        into.bytes += series.body_bytes;
                    }
                }
            }
            if account.is_none() {
                into.bytes += table.file_bytes;
            }
        }
    }

    fn stored(&self, found: &Found, scratch: &mut Vec<u8>) -> Result<Stored, HistoryError> {
        // The checksums were right, so damage here is a fault of whoever wrote it.
        let stored = match found {
            Found::Memory(hit) => hit.stored(self.number),
            Found::Sealed(block, row) => block.stored(*row, self.number, scratch),
        };
        let (_, seq) = found.key();
        stored.map_err(|damage| HistoryError::Corrupt(format!("message {seq}: {}", damage.0)))
    }
}

impl View {
    /// All memtables, oldest first.
    pub(crate) fn tables(&self) -> impl DoubleEndedIterator<Item = &Memtable> {
        self.frozen.iter().map(|frozen| &**frozen).chain([&self.active])
    }
}
