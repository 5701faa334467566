//! Merging: small segments of a day become fewer and larger ones, in the
//! background, so that their number is bounded and their blocks are well filled.
//!
//! Segments are grouped by the day of their newest message and, within it, by
//! size: only those of about one size are merged with each other, so each message
//! is written a handful of times in its life. Days that are over end as one
//! segment, or as many as [`crate::MdbConfig::segment_bytes_max`] asks for.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use fieldline_contracts::HistoryError;
use fieldline_model::Series;
use metrics::{counter, histogram};
use tracing::{debug, error, info};

use crate::block::{Block, BlockBuilder, day};
use crate::columns::Effort;
use crate::config::MdbConfig;
use crate::dict::ColumnKey;
use crate::hash::FoldMap;
use crate::index::BlockEntry;
use crate::open::NotReplaced;
use crate::read::Candidate;
use crate::segment::{Segment, SegmentMeta};
use crate::segment_writer::SegmentWriter;
use crate::shard::{Shard, Version};

/// How often segments are looked at when nothing was sealed.
const TICK: Duration = Duration::from_secs(10);
/// Most segments of one merge.
const INPUTS_MAX: usize = 32;

/// Merges until the shard stops.
pub(crate) fn run(shard: &Shard) {
    // Damage is to be known before somebody asks for what it hides.
    for segment in &shard.version().segments {
        if shard.sealing.lock().stop {
            return;
        }
        if let Err(cause) = segment.verify() {
            debug!(shard = shard.number, %cause, "the index of a segment cannot be read");
        }
    }
    loop {
        match merge_once(shard) {
            Ok(true) => {}
            Ok(false) => {
                let mut sealing = shard.sealing.lock();
                if sealing.stop {
                    return;
                }
                shard.sealed.wait_for(&mut sealing, TICK);
                if sealing.stop {
                    return;
                }
            }
            Err(cause) => {
                counter!("fieldline_mdb_merge_errors_total", "shard" => shard.label.clone())
                    .increment(1);
                error!(shard = shard.number, %cause, "segments could not be merged, trying again later");
                let mut sealing = shard.sealing.lock();
                if !sealing.stop {
                    shard.sealed.wait_for(&mut sealing, TICK);
                }
                if sealing.stop {
                    return;
                }
            }
        }
    }
}

/// Size classes: each is four times the one before.
const fn class(bytes: u64) -> u32 {
    match (bytes >> 14).checked_ilog2() {
        Some(log) => log / 2 + 1,
        None => 0,
    }
}

/// The segments to merge next, if there are any; `today` is the present day.
fn pick(segments: &[Arc<Segment>], config: &MdbConfig, today: i64) -> Option<Vec<Arc<Segment>>> {
    let mut days: BTreeMap<i64, Vec<&Arc<Segment>>> = BTreeMap::new();
    for segment in segments {
        let fits = segment.meta.bytes < config.segment_bytes_max;
        let left_alone =
            segment.damaged.load(Ordering::Relaxed) || segment.crowded.load(Ordering::Relaxed);
        if fits && !left_alone {
            days.entry(day(segment.meta.to)).or_default().push(segment);
        }
    }
    for (of, mut segments) in days {
        segments.sort_unstable_by_key(|s| s.meta.bytes);
        // Late data of an old day comes as a trickle: it waits for company, too.
        let over = of < today - 1 && segments.len() >= 2;
        let mut classes: BTreeMap<u32, Vec<&Arc<Segment>>> = BTreeMap::new();
        for segment in &segments {
            classes.entry(class(segment.meta.bytes)).or_default().push(*segment);
        }
        let mut chosen = classes.into_values().find(|of| of.len() >= config.merge_fan_in);
        if chosen.is_none() && (over || segments.len() >= 4 * config.merge_fan_in) {
            chosen = Some(segments);
        }
        if let Some(chosen) = chosen {
            let mut bytes = 0;
            let within = chosen.into_iter().take(INPUTS_MAX).take_while(|segment| {
                bytes += segment.meta.bytes;
                bytes <= config.segment_bytes_max
            });
            let within: Vec<Arc<Segment>> = within.cloned().collect();
            if within.len() >= 2 {
                return Some(within);
            }
        }
    }
    None
}

/// Those of `inputs` whose indexes fit into one together. One that takes more than
/// half of the room is left alone from now on.
fn by_index(
    inputs: Vec<Arc<Segment>>,
    bytes_max: usize,
) -> Result<Vec<Arc<Segment>>, HistoryError> {
    let mut bytes = 0;
    let mut within = Vec::new();
    for segment in inputs {
        let own = segment.directory()?.index_bytes;
        if own > bytes_max / 2 {
            segment.crowded.store(true, Ordering::Relaxed);
        } else if bytes + own <= bytes_max {
            bytes += own;
            within.push(segment);
        }
    }
    Ok(within)
}

/// Merges one group of segments; false if there is none.
pub(crate) fn merge_once(shard: &Shard) -> io::Result<bool> {
    let _replacing = shard.replacing.lock();
    if shard.stops() {
        return Ok(false);
    }
    let version = shard.version();
    let today = day(shard.clock.now().as_micros());
    let Some(inputs) = pick(&version.segments, &shard.config, today) else { return Ok(false) };
    let inputs = match by_index(inputs, shard.config.merge_index_bytes_max) {
        // Two that are not left alone fit: else there are fewer, and others are picked next.
        Ok(inputs) if inputs.len() < 2 => return Ok(true),
        Ok(inputs) => inputs,
        Err(cause) => {
            error!(shard = shard.number, %cause, "a damaged segment is not merged");
            return Ok(true);
        }
    };
    let started = Instant::now();
    let mut writer =
        SegmentWriter::create(&*shard.disk, &shard.dir, shard.take_number(), Effort::Merge)?;
    let path = writer.path().to_owned();
    match write_merged(shard, &mut writer, &inputs) {
        Ok(()) => {}
        Err(Stopped::Stop) => {
            shard.discard(&path);
            return Ok(false);
        }
        Err(Stopped::Damage(cause)) => {
            // The damaged one is marked and left alone from now on.
            shard.discard(&path);
            error!(shard = shard.number, %cause, "a damaged segment is not merged");
            return Ok(false);
        }
        Err(Stopped::Write(error)) => {
            shard.discard(&path);
            return Err(error);
        }
    }
    let finished = finish(shard, writer, &inputs, false);
    match finished {
        Ok(meta) => {
            counter!("fieldline_mdb_merges_total", "shard" => shard.label.clone()).increment(1);
            histogram!("fieldline_mdb_merge_seconds", "shard" => shard.label.clone())
                .record(started.elapsed().as_secs_f64());
            info!(
                shard = shard.number,
                inputs = inputs.len(),
                segment = meta.number,
                messages = meta.messages,
                bytes = meta.bytes,
                "segments were merged"
            );
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
            for segment in &inputs {
                segment.crowded.store(true, Ordering::Relaxed);
            }
            error!(shard = shard.number, %error, "segments are not merged any more");
            Ok(true)
        }
        Err(error) => Err(error),
    }
}

/// Makes a written segment durable and puts it in the place of others.
fn finish(
    shard: &Shard,
    writer: SegmentWriter,
    old: &[Arc<Segment>],
    retention: bool,
) -> io::Result<SegmentMeta> {
    let path = writer.path().to_owned();
    let durable = writer.finish().and_then(|meta| {
        shard.disk.sync_dir(&shard.dir)?;
        Ok(meta)
    });
    let replaced = match durable {
        Ok(meta) => replace(shard, old, Some(meta.clone()), retention).map(|()| meta),
        Err(error) => Err(NotReplaced { error, unknown: false }),
    };
    replaced.map_err(|not| {
        if !not.unknown {
            shard.discard(&path);
        }
        not.error
    })
}

/// Puts one segment, or none, in the place of others.
fn replace(
    shard: &Shard,
    old: &[Arc<Segment>],
    new: Option<SegmentMeta>,
    retention: bool,
) -> Result<(), NotReplaced> {
    let segment = match &new {
        Some(meta) => {
            let meta = meta.clone();
            let opened =
                Segment::open_written(&shard.disk, &shard.cache, &shard.dir, shard.number, meta);
            Some(Arc::new(opened.map_err(|error| NotReplaced { error, unknown: false })?))
        }
        None => None,
    };
    let is_old = |number: u64| old.iter().any(|segment| segment.meta.number == number);
    shard.change(
        |manifest| {
            manifest.segments.retain(|meta| !is_old(meta.number));
            manifest.segments.extend(new);
            manifest.segments.sort_by_key(|meta| meta.first_seq);
        },
        |view| {
            let mut segments = view.version.segments.clone();
            segments.retain(|segment| !is_old(segment.meta.number));
            segments.extend(segment);
            segments.sort_by_key(|segment| segment.meta.first_seq);
            view.version = Arc::new(Version {
                segments,
                sealed_seq: view.version.sealed_seq,
                retained: view.version.retained + u64::from(retention),
            });
        },
    )?;
    for segment in old {
        segment.retire();
    }
    Ok(())
}

/// Why a merge did not end.
enum Stopped {
    Stop,
    Damage(HistoryError),
    Write(io::Error),
}

/// The number of a shape in the new segment, and its columns.
type NewShape = (u32, Box<[ColumnKey]>);

fn write_merged(
    shard: &Shard,
    writer: &mut SegmentWriter,
    inputs: &[Arc<Segment>],
) -> Result<(), Stopped> {
    let mut all: BTreeMap<Series, Vec<Candidate<'_>>> = BTreeMap::new();
    for segment in inputs {
        for page in segment.series_pages().map_err(Stopped::Damage)? {
            for (series, blocks) in page.map_err(Stopped::Damage)?.iter() {
                let candidates = blocks.iter().map(|entry| Candidate { segment, entry: *entry });
                all.entry(*series).or_default().extend(candidates);
            }
        }
    }
    let mut shapes: FoldMap<(u64, i64), NewShape> = FoldMap::default();
    for (series, candidates) in all {
        if shard.sealing.lock().stop {
            return Err(Stopped::Stop);
        }
        let mut builder = BlockBuilder::default();
        let mut body = Vec::new();
        sweep(series, candidates, &mut |segment, block, row| {
            let (Some((timestamp, seq)), Some(shape)) = (block.key(row), block.shape(row)) else {
                return Ok(());
            };
            if builder.is_closed_for(timestamp) {
                writer.block(series, &builder).map_err(Stopped::Write)?;
                builder = BlockBuilder::default();
            }
            // Its number counts within its segment.
            let number = (segment, block.shape_number(row).unwrap_or(0));
            let (id, keys) = shapes.entry(number).or_insert_with(|| writer.shape(shape));
            body.clear();
            let damaged = |damage: crate::codec::Damage| {
                Stopped::Damage(HistoryError::Corrupt(damage.0.to_owned()))
            };
            block.body(row, &mut body).map_err(damaged)?;
            builder.push((timestamp, seq, block.received(row)), *id, keys, &body).map_err(damaged)
        })?;
        writer.block(series, &builder).map_err(Stopped::Write)?;
    }
    Ok(())
}

/// Hands over the rows of a series in order, with the number of their segment; holds only blocks that overlap.
fn sweep(
    series: Series,
    mut candidates: Vec<Candidate<'_>>,
    emit: &mut impl FnMut(u64, &Block, usize) -> Result<(), Stopped>,
) -> Result<(), Stopped> {
    candidates.sort_unstable_by_key(|c| c.entry.from);
    let mut pending: Vec<(i64, u64, u64, Arc<Block>, usize)> = Vec::new();
    let mut candidates = candidates.into_iter().peekable();
    while let Some(Candidate { segment, entry }) = candidates.next() {
        let block = Arc::new(segment.block_once(series, &entry).map_err(Stopped::Damage)?);
        let number = segment.meta.number;
        for row in 0..block.rows() {
            if let Some((timestamp, seq)) = block.key(row) {
                pending.push((timestamp, seq, number, block.clone(), row));
            }
        }
        pending.sort_unstable_by_key(|(timestamp, seq, ..)| (*timestamp, *seq));
        let settled = match candidates.peek() {
            Some(next) => pending.partition_point(|(at, ..)| *at < next.entry.from),
            None => pending.len(),
        };
        for (_, _, number, block, row) in pending.drain(..settled) {
            emit(number, &block, row)?;
        }
    }
    debug_assert!(pending.is_empty(), "the last block settles all");
    Ok(())
}

/// Removes a segment. The caller holds `replacing`. Returns the bytes set free.
pub(crate) fn remove(shard: &Shard, segment: &Arc<Segment>) -> Result<u64, HistoryError> {
    replace(shard, std::slice::from_ref(segment), None, true).map_err(|not| {
        HistoryError::Failed(format!("remove `{}`: {}", segment.path.display(), not.error))
    })?;
    Ok(segment.meta.bytes)
}

/// Writes a segment anew without the blocks that `keep` refuses, which are copied
/// as they are. The caller holds `replacing`. Returns the bytes set free.
pub(crate) fn rewrite(
    shard: &Shard,
    segment: &Arc<Segment>,
    keep: &dyn Fn(&Series, &BlockEntry) -> bool,
) -> Result<u64, HistoryError> {
    let failed = |error: io::Error| {
        HistoryError::Failed(format!("rewrite `{}`: {error}", segment.path.display()))
    };
    let mut kept = false;
    for page in segment.series_pages()? {
        kept = kept || page?.iter().any(|(s, blocks)| blocks.iter().any(|b| keep(s, b)));
    }
    if !kept {
        return remove(shard, segment);
    }
    let writer =
        SegmentWriter::create(&*shard.disk, &shard.dir, shard.take_number(), Effort::Merge);
    let mut writer = writer.map_err(failed)?;
    let path = writer.path().to_owned();
    if let Err(error) = copy_kept(&mut writer, segment, keep) {
        shard.discard(&path);
        return Err(failed(error));
    }
    let meta = finish(shard, writer, std::slice::from_ref(segment), true).map_err(failed)?;
    debug!(
        shard = shard.number,
        segment = segment.meta.number,
        "a segment was rewritten for retention"
    );
    Ok(segment.meta.bytes.saturating_sub(meta.bytes))
}

fn copy_kept(
    writer: &mut SegmentWriter,
    segment: &Segment,
    keep: &dyn Fn(&Series, &BlockEntry) -> bool,
) -> io::Result<()> {
    writer.adopt(segment).map_err(io::Error::other)?;
    for page in segment.series_pages().map_err(io::Error::other)? {
        for (series, blocks) in page.map_err(io::Error::other)?.iter() {
            for entry in blocks.iter().filter(|entry| keep(series, entry)) {
                let raw = segment.raw(entry).map_err(io::Error::other)?;
                writer.copy(*series, *entry, &raw)?;
            }
        }
    }
    Ok(())
}
