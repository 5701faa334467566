//! Reading sealed messages in order of arrival.
//!
//! Segments are sorted by series, so messages are read in windows of sequences: all
//! blocks that reach into one are read, and what they hold of it is kept for the pages to come.

use std::sync::Arc;

use fieldline_contracts::history::Gap;
use fieldline_contracts::{HistoryError, Query};
use fieldline_model::{Cursor, Series};

use crate::cache::{Cache, Item, Key};
use crate::index::BlockEntry;
use crate::memtable::Hit;
use crate::segment::Segment;
use crate::shard::Version;

/// Most sequences of one window: decoded at once.
const WINDOW_SEQS: u64 = 65_536;
/// A window with more bytes is read in so many parts.
const PARTS: u64 = 8;
/// Most bytes of a window of more than one message, small enough to be kept.
const WINDOW_BYTES_MAX: usize = 8 << 20;
/// Memory of a message of a window beside its body.
const HIT_BYTES: usize = size_of::<Hit>();

/// Sequences of which some cannot be read.
struct Damaged {
    first: u64,
    last: u64,
    error: HistoryError,
}

/// The sealed messages of a range of sequences, in order.
#[derive(Default)]
pub(crate) struct Window {
    hits: Vec<Hit>,
    /// By their first.
    damaged: Vec<Damaged>,
}

impl Version {
    /// Sealed messages after `after`, in order of arrival, and whether what is in memory
    /// follows them: it does not where damage ends them early. Damage right behind `after` is
    /// an error, unless it is to be passed over.
    pub(crate) fn tail(
        &self,
        shard: u16,
        cache: &Cache,
        mut after: u64,
        limit: usize,
        over_damage: bool,
    ) -> Result<(Vec<Hit>, bool), HistoryError> {
        let mut hits: Vec<Hit> = Vec::new();
        let mut bytes = 0;
        while after < self.sealed_seq && hits.len() < limit && bytes < Query::BYTES_MAX {
            // Where retention left a hole, go on behind it.
            let nearest = self.segments.iter().filter(|s| s.meta.last_seq > after);
            let Some(nearest) = nearest.map(|s| s.meta.first_seq).min() else { break };
            after = after.max(nearest.saturating_sub(1));
            let (window, last) = self.window_after(shard, cache, after);
            let damaged = window.damaged.iter().find(|damaged| damaged.last > after);
            let Some(damaged) = damaged.filter(|_| !over_damage) else {
                bytes += window.take(after, u64::MAX, limit, &mut hits);
                after = last;
                continue;
            };
            // What arrived before the damage can still be read.
            window.take(after, damaged.first, limit, &mut hits);
            if !hits.is_empty() {
                return Ok((hits, false));
            }
            let to = window.damaged.iter().filter(|other| other.last > after);
            let to = to.fold(damaged.last, |to, other| {
                if other.first <= to.saturating_add(1) { to.max(other.last) } else { to }
            });
            let place = |seq| Cursor { shard, seq };
            return Err(HistoryError::Gap(Box::new(Gap {
                from: place(damaged.first.max(after + 1)),
                to: place(to),
                reason: damaged.error.to_string(),
            })));
        }
        Ok((hits, true))
    }

    /// The window with what follows `after`, from memory or disk, and its last sequence.
    fn window_after(&self, shard: u16, cache: &Cache, after: u64) -> (Arc<Window>, u64) {
        let mut seqs = WINDOW_SEQS;
        loop {
            let first = after / seqs * seqs + 1;
            let last = (first + seqs - 1).min(self.sealed_seq);
            let key = Key::Window(shard, first, last, self.retained);
            match cache.get(key) {
                Some(Item::Window(window)) => return (window, last),
                Some(Item::TooLarge) => {}
                _ => match self.window(first, last) {
                    Some((window, bytes)) => {
                        let window = Arc::new(window);
                        // Damage may be mended, or have been a passing failure.
                        if window.damaged.is_empty() {
                            cache.put(key, Item::Window(window.clone()), bytes);
                        }
                        return (window, last);
                    }
                    None => cache.put(key, Item::TooLarge, 128),
                },
            }
            seqs = (seqs / PARTS).max(1);
        }
    }

    /// The sealed messages from sequence `first` to `last`, and their memory in bytes; `None`
    /// where they are several and too large together.
    fn window(&self, first: u64, last: u64) -> Option<(Window, usize)> {
        let (mut window, mut bodies) = (Window::default(), Vec::new());
        for segment in &self.segments {
            if segment.meta.first_seq > last || segment.meta.last_seq < first {
                continue;
            }
            let whole = |error| Damaged {
                first: segment.meta.first_seq,
                last: segment.meta.last_seq,
                error,
            };
            let pages = match segment.series_pages() {
                Ok(pages) => pages,
                Err(error) => {
                    window.damaged.push(whole(error));
                    continue;
                }
            };
            for page in pages {
                let page = match page {
                    Ok(page) => page,
                    Err(error) => {
                        window.damaged.push(whole(error));
                        continue;
                    }
                };
                for (series, blocks) in page.iter() {
                    for entry in blocks {
                        if entry.first_seq > last || entry.last_seq < first {
                            continue;
                        }
                        // One block at a time: all of a large fleet would not fit into memory.
                        if bodies.len() > WINDOW_BYTES_MAX && last > first {
                            return None;
                        }
                        let place = (&**segment, *series, entry);
                        if let Err(error) = window.add(place, first..=last, &mut bodies) {
                            let (first, last) = (entry.first_seq, entry.last_seq);
                            window.damaged.push(Damaged { first, last, error });
                        }
                    }
                }
            }
        }
        if bodies.len() > WINDOW_BYTES_MAX && last > first {
            return None;
        }
        let bytes = bodies.len() + window.hits.len() * HIT_BYTES;
        let chunk: Arc<[u8]> = bodies.into();
        for hit in &mut window.hits {
            hit.set_chunk(&chunk);
        }
        window.hits.sort_unstable_by_key(|hit| hit.seq);
        window.damaged.sort_by_key(|damaged| damaged.first);
        Some((window, bytes))
    }
}

impl Window {
    /// Adds what a block holds of `seqs`, its values to `bodies`.
    fn add(
        &mut self,
        (segment, series, entry): (&Segment, Series, &BlockEntry),
        seqs: std::ops::RangeInclusive<u64>,
        bodies: &mut Vec<u8>,
    ) -> Result<(), HistoryError> {
        let block = segment.block_once(series, entry)?;
        for (row, seq) in block.seqs.iter().enumerate() {
            if !seqs.contains(&seq.cast_unsigned()) {
                continue;
            }
            let start = bodies.len();
            let body = block.body(row, bodies);
            body.map_err(|damage| segment.error(entry.offset, damage.0))?;
            let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let place = (small(start), small(bodies.len() - start));
            self.hits.extend(Hit::of_row(&block, row, place));
        }
        Ok(())
    }

    /// Those after `after` and before `before`, as many as there is room for. Returns their bytes.
    fn take(&self, after: u64, before: u64, limit: usize, into: &mut Vec<Hit>) -> usize {
        let start = self.hits.partition_point(|hit| hit.seq <= after);
        let end = self.hits.partition_point(|hit| hit.seq < before);
        let room = limit.saturating_sub(into.len());
        let hits = self.hits.get(start..end).unwrap_or(&[]).iter().take(room);
        into.extend(hits.clone().cloned());
        hits.map(Hit::body_bytes).sum()
    }
}
