//! From memory to segments: a thread per shard that appends do not wait for,
//! except, within a bound, where it falls behind by [`crate::MdbConfig::frozen_max`] memtables.
//!
//! Order of steps: segment durable, snapshot durable, manifest replaced, readers
//! switched, log files removed. A crash between any two leaves the old truth or
//! the new one; what neither names is removed at the next start.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use fieldline_contracts::HistoryError;
use fieldline_model::Series;
use metrics::{counter, gauge, histogram};
use tokio::sync::oneshot;
use tracing::{debug, error, info};

use crate::block::BlockBuilder;
use crate::columns::Effort;
use crate::dict::ColumnKey;
use crate::memtable::Memtable;
use crate::open::NotReplaced;
use crate::segment::{Segment, SegmentMeta};
use crate::segment_writer::SegmentWriter;
use crate::shard::{Shard, Version};
use crate::snapshot::{self, Latest, MergeError};
use crate::writer::to_f64;

/// How often the age of what is not sealed is looked at.
const TICK: Duration = Duration::from_secs(1);
/// How long a failed seal waits before the next attempt.
const RETRY: Duration = Duration::from_millis(500);

/// Seals until the shard stops.
pub(crate) fn run(shard: &Shard) {
    let _ended = Ended(shard);
    shard.keep_reserve();
    loop {
        let front = {
            let mut sealing = shard.sealing.lock();
            loop {
                if sealing.stop {
                    return;
                }
                if let Some(front) = shard.view.read().frozen.front().cloned() {
                    break front;
                }
                shard.frozen.wait_for(&mut sealing, TICK);
                shard.freeze_if_old();
            }
        };
        let started = Instant::now();
        match seal(shard, &front) {
            Ok(meta) => {
                counter!("fieldline_mdb_seals_total", "shard" => shard.label.clone()).increment(1);
                histogram!("fieldline_mdb_seal_seconds", "shard" => shard.label.clone())
                    .record(started.elapsed().as_secs_f64());
                gauge!("fieldline_mdb_segments", "shard" => shard.label.clone())
                    .set(to_f64(shard.version().segments.len()));
                debug!(
                    shard = shard.number,
                    segment = meta.number,
                    messages = meta.messages,
                    bytes = meta.bytes,
                    "sealed"
                );
                shard.keep_reserve();
                shard.sealing.lock().failed = None;
                shard.sealed.notify_all();
            }
            Err(cause) => {
                counter!("fieldline_mdb_seal_errors_total", "shard" => shard.label.clone())
                    .increment(1);
                let text = format!("seal messages in `{}`: {cause}", shard.dir.display());
                let failed = match cause.kind() {
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                        HistoryError::Full(text)
                    }
                    _ => HistoryError::Failed(text),
                };
                let mut sealing = shard.sealing.lock();
                if sealing.failed.is_none() {
                    error!(shard = shard.number, %cause, "messages could not be sealed, trying again");
                }
                sealing.failed = Some(failed);
                sealing.failures += 1;
                shard.sealed.notify_all();
                if !sealing.stop {
                    shard.frozen.wait_for(&mut sealing, RETRY);
                }
            }
        }
    }
}

/// Says why memtables pile up where the sealer ended by a panic.
struct Ended<'a>(&'a Shard);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let text = format!("the sealer of `{}` panicked", self.0.dir.display());
            error!(shard = self.0.number, "the sealer of a shard panicked");
            let mut sealing = self.0.sealing.lock();
            sealing.failed = Some(HistoryError::Failed(text));
            sealing.failures += 1;
            self.0.sealed.notify_all();
        }
    }
}

impl Shard {
    /// Has the memtable frozen when its first message is old enough.
    fn freeze_if_old(&self) {
        let since = self.view.read().active.since;
        let age_max = i64::try_from(self.config.seal_age_max.as_micros()).unwrap_or(i64::MAX);
        if since.is_some_and(|since| self.clock.now().micros_since(since) >= age_max) {
            self.queue.freeze(oneshot::channel().0);
        }
    }

    /// Writes a new snapshot, `later` merged in and without what `keep` refuses; the
    /// caller holds `snapshotting` and puts it into the manifest.
    pub(crate) fn write_snapshot(
        &self,
        later: Vec<(Series, Latest)>,
        keep: &dyn Fn(&Series, &Latest) -> bool,
    ) -> io::Result<(u64, u64)> {
        let number = self.take_number();
        let path = self.dir.join(snapshot::file_name(number));
        let old = self.manifest.lock().snapshot.map(|n| self.dir.join(snapshot::file_name(n)));
        let written = snapshot::merge(&*self.disk, old.as_deref(), later.clone(), keep, &path);
        let written = match written {
            Err(MergeError::Read(unreadable)) => {
                error!(
                    shard = self.number,
                    reason = unreadable.0,
                    "the snapshot of last values is made anew from the segments"
                );
                let mut all = self.version().latest().map_err(io::Error::other)?;
                for (series, latest) in later {
                    all.entry(series).or_insert_with(|| latest.clone()).merge(latest);
                }
                snapshot::merge(&*self.disk, None, all.into_iter().collect(), keep, &path)
            }
            other => other,
        };
        match written {
            Ok(bytes) => Ok((number, bytes)),
            Err(MergeError::Write(error)) => {
                self.discard(&path);
                Err(error)
            }
            Err(MergeError::Read(unreadable)) => Err(io::Error::other(unreadable.0)),
        }
    }

    /// Removes a file that nothing names. What cannot be removed now is at the next start.
    pub(crate) fn discard(&self, path: &Path) {
        if let Err(error) = self.disk.remove(path) {
            debug!(path = %path.display(), %error, "a file was not removed");
        }
    }
}

/// Seals the oldest frozen memtable.
fn seal(shard: &Shard, table: &Arc<Memtable>) -> io::Result<SegmentMeta> {
    let _snapshotting = shard.snapshotting.lock();
    let mut writer =
        SegmentWriter::create(&*shard.disk, &shard.dir, shard.take_number(), Effort::Seal)?;
    let path = writer.path().to_owned();
    let written = write_table(&mut writer, table).and_then(|()| writer.finish());
    let meta = match written {
        Ok(meta) => meta,
        Err(error) => {
            shard.discard(&path);
            return Err(error);
        }
    };
    match switch(shard, table, &meta) {
        Ok(()) => Ok(meta),
        Err(NotReplaced { error, unknown }) => {
            if !unknown {
                shard.discard(&path);
            }
            Err(error)
        }
    }
}

fn switch(shard: &Shard, table: &Arc<Memtable>, meta: &SegmentMeta) -> Result<(), NotReplaced> {
    let before = |error| NotReplaced { error, unknown: false };
    let snapshot = shard.write_snapshot(table.latest(), &|_, _| true);
    let (snapshot, snapshot_bytes) = snapshot.map_err(before)?;
    shard.disk.sync_dir(&shard.dir).map_err(before)?;
    let segment =
        Segment::open_written(&shard.disk, &shard.cache, &shard.dir, shard.number, meta.clone());
    let segment = Arc::new(segment.map_err(before)?);
    let old = shard.manifest.lock().snapshot;
    let log_from = table.files.iter().max().map(|last| last + 1);
    let changed = shard.change(
        |manifest| {
            manifest.segments.push(meta.clone());
            manifest.snapshot = Some(snapshot);
            manifest.log_from = manifest.log_from.max(log_from.unwrap_or(0));
            manifest.next_seq = manifest.next_seq.max(meta.last_seq.saturating_add(1));
        },
        |view| {
            let mut segments = view.version.segments.clone();
            segments.push(segment);
            view.version = Arc::new(Version {
                segments,
                sealed_seq: view.version.sealed_seq.max(meta.last_seq),
                ..*view.version
            });
            view.frozen.pop_front();
        },
    );
    if let Err(not) = changed {
        if !not.unknown {
            shard.discard(&shard.dir.join(snapshot::file_name(snapshot)));
        }
        return Err(not);
    }
    shard.snapshot_bytes.store(snapshot_bytes, Ordering::Relaxed);
    for file in &table.files {
        shard.discard(&shard.wal_path(*file));
    }
    if let Some(old) = old {
        shard.discard(&shard.dir.join(snapshot::file_name(old)));
    }
    info!(
        shard = shard.number,
        segment = meta.number,
        messages = meta.messages,
        bytes = meta.bytes,
        "messages were sealed"
    );
    Ok(())
}

/// Writes a memtable's messages, by series and time.
fn write_table(writer: &mut SegmentWriter, table: &Memtable) -> io::Result<()> {
    let mut order: Vec<_> = table.series.iter().filter(|s| !s.order.is_empty()).collect();
    order.sort_unstable_by_key(|s| s.series);
    let mut shapes: Vec<Option<(u32, Box<[ColumnKey]>)>> = vec![None; table.shapes.len()];
    for series in order {
        let mut block = BlockBuilder::default();
        for (timestamp, at) in &series.order {
            let Some(message) = table.messages.get(*at as usize) else { continue };
            if block.is_closed_for(*timestamp) {
                writer.block(series.series, &block)?;
                block = BlockBuilder::default();
            }
            let at = message.shape as usize;
            let (Some(slot), Some(shape)) = (shapes.get_mut(at), table.shapes.get(at)) else {
                return Err(io::Error::other("a message without a shape"));
            };
            let (shape, keys) = slot.get_or_insert_with(|| writer.shape(shape));
            block
                .push(
                    (*timestamp, message.seq, message.received),
                    *shape,
                    keys,
                    table.body(message),
                )
                .map_err(|damage| io::Error::other(damage.0))?;
        }
        writer.block(series.series, &block)?;
    }
    Ok(())
}
