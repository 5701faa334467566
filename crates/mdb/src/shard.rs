//! What the writer, the sealer and the readers of one shard share.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use fieldline_contracts::{Clock, HistoryError, HistoryStats, Order, Query};
use fieldline_model::{AccountId, Series, SeriesKind, Stored};
use parking_lot::{Condvar, Mutex, RwLock};
use tokio::sync::Semaphore;

use crate::config::MdbConfig;
use crate::dict::Dict;
use crate::disk::Disk;
use crate::memtable::{Hit, LastValues, Memtable, Message};
use crate::queue::Queue;

/// What readers see; changed under one lock, so that a message is never seen
/// twice nor missed while it moves from memory to disk.
pub(crate) struct View {
    pub(crate) active: Memtable,
    /// Waiting to be sealed, oldest first.
    pub(crate) frozen: VecDeque<Arc<Memtable>>,
}

/// How sealing goes.
#[derive(Default)]
pub(crate) struct Sealing {
    /// Why the last attempt failed.
    pub(crate) failed: Option<HistoryError>,
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
    pub(crate) sealing: Mutex<Sealing>,
    /// Something was frozen, or the sealer is to stop.
    pub(crate) frozen: Condvar,
    /// Something was sealed.
    pub(crate) sealed: Condvar,
}

/// An error of reading stored bytes.
pub(crate) fn corrupt(path: &Path, offset: u64, reason: &str) -> HistoryError {
    HistoryError::Corrupt(format!("`{}` at byte {offset}: {reason}", path.display()))
}

impl Shard {
    pub(crate) fn wal_path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("wal-{number:012}.log"))
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

    /// The sequence of the message of this series, time and content, if it is there.
    pub(crate) fn find(&self, series: &Series, timestamp: i64, hash: u64) -> Option<u64> {
        let view = self.view.read();
        let mut tables = view.frozen.iter().rev().map(|frozen| &**frozen).chain([&view.active]);
        tables.find_map(|table| table.find(series, timestamp, hash))
    }

    pub(crate) fn read(&self, query: &Query) -> Result<Vec<Stored>, HistoryError> {
        let limit = query.limit.min(Query::LIMIT_MAX);
        let mut hits = Vec::new();
        {
            let view = self.view.read();
            for table in view.frozen.iter().map(|frozen| &**frozen).chain([&view.active]) {
                table.read(query, limit, &mut hits);
            }
        }
        hits.sort_unstable_by_key(|hit: &Hit| (hit.timestamp, hit.seq));
        if query.order == Order::Descending {
            hits.reverse();
        }
        hits.truncate(limit);
        hits.iter().map(|hit| self.stored(hit)).collect()
    }

    pub(crate) fn tail(&self, after: u64, limit: usize) -> Result<Vec<Stored>, HistoryError> {
        let mut hits = Vec::new();
        {
            let view = self.view.read();
            for table in view.frozen.iter().map(|frozen| &**frozen).chain([&view.active]) {
                table.tail(after, limit.saturating_sub(hits.len()), &mut hits);
            }
        }
        hits.iter().map(|hit| self.stored(hit)).collect()
    }

    /// Message series with their last values.
    pub(crate) fn last_values(&self) -> Vec<(Series, LastValues)> {
        let mut values: BTreeMap<Series, LastValues> = BTreeMap::new();
        let view = self.view.read();
        for table in view.frozen.iter().map(|frozen| &**frozen).chain([&view.active]) {
            for series in table.series.iter().filter(|s| s.series.kind == SeriesKind::Message) {
                table.last_values(series, values.entry(series.series).or_default());
            }
        }
        values.into_iter().collect()
    }

    pub(crate) fn stats(&self, account: Option<AccountId>, into: &mut HistoryStats) {
        let view = self.view.read();
        for table in view.frozen.iter().map(|frozen| &**frozen).chain([&view.active]) {
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

    fn stored(&self, hit: &Hit) -> Result<Stored, HistoryError> {
        // The log's checksum was right, so this is a fault of whoever wrote it.
        hit.stored(self.number)
            .map_err(|damage| HistoryError::Corrupt(format!("message {}: {}", hit.seq, damage.0)))
    }
}
