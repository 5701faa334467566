//! Reading sealed messages: by series and time, by content, and in order of arrival.

use std::collections::BTreeMap;
use std::sync::Arc;

use fieldline_contracts::{HistoryError, Order, Query};
use fieldline_model::stage::content_hash;
use fieldline_model::{Series, SeriesKind};

use crate::block::Block;
use crate::cache::{Cache, Item, Key};
use crate::index::BlockEntry;
use crate::memtable::Hit;
use crate::segment::Segment;
use crate::shard::{Version, corrupt};
use crate::snapshot::Latest;

/// Where a message was found.
pub(crate) enum Found {
    /// In a memtable, or copied out of a block.
    Memory(Hit),
    /// In a row of a block.
    Sealed(Arc<Block>, usize),
}

impl Found {
    /// What messages of a series are ordered by.
    pub(crate) fn key(&self) -> (i64, u64) {
        match self {
            Self::Memory(hit) => (hit.timestamp, hit.seq),
            Self::Sealed(block, row) => block.key(*row).unwrap_or((i64::MIN, 0)),
        }
    }
}

/// A block that may hold what is looked for.
pub(crate) struct Candidate<'a> {
    pub(crate) segment: &'a Segment,
    pub(crate) entry: BlockEntry,
}

/// Where a series may be found.
#[derive(Default)]
pub(crate) struct Candidates<'a> {
    pub(crate) blocks: Vec<Candidate<'a>>,
    /// First and last time of what of the account is in segments whose index cannot be read.
    pub(crate) unread: Vec<(i64, i64, HistoryError)>,
}

impl<'a> Candidates<'a> {
    /// The blocks, if there are no others.
    pub(crate) fn whole(mut self) -> Result<Vec<Candidate<'a>>, HistoryError> {
        self.unread.pop().map_or(Ok(self.blocks), |(_, _, error)| Err(error))
    }
}

/// Sequences of one window of the tail: decoded at once, and small enough to be kept.
const WINDOW_SEQS: u64 = 65_536;
/// Memory of a message of a window beside its body.
const HIT_BYTES: usize = size_of::<Hit>();

impl Version {
    /// The blocks of a series with times from `from` to `to`, both included.
    pub(crate) fn candidates(&self, series: &Series, from: i64, to: i64) -> Candidates<'_> {
        let mut found = Candidates::default();
        for segment in &self.segments {
            let of_account = segment.meta.accounts.iter().find(|a| a.account == series.account);
            let Some(part) = of_account.filter(|a| a.from <= to && a.to >= from) else { continue };
            match segment.blocks(series, from, to) {
                Ok(entries) => {
                    let candidates = entries.into_iter();
                    found.blocks.extend(candidates.map(|entry| Candidate { segment, entry }));
                }
                Err(error) => found.unread.push((part.from, part.to, error)),
            }
        }
        found
    }

    /// The sequence of a message, if it is sealed. What cannot be read counts as
    /// absent: rather a double than a loss.
    pub(crate) fn find(&self, series: &Series, timestamp: i64, hash: u64) -> Option<u64> {
        let candidates = self.candidates(series, timestamp, timestamp).blocks;
        let mut scratch = Vec::new();
        for Candidate { segment, entry } in candidates {
            // Late messages are mostly new: their times tell.
            if !segment.has_time(&entry, timestamp).unwrap_or(false) {
                continue;
            }
            let Ok(block) = segment.block(*series, &entry) else { continue };
            let start = block.timestamps.partition_point(|t| *t < timestamp);
            for row in start..block.rows() {
                let Some((at, seq)) = block.key(row) else { break };
                if at != timestamp {
                    break;
                }
                if block.params(row, &mut scratch).is_ok_and(|p| content_hash(&p) == hash) {
                    return Some(seq);
                }
            }
        }
        None
    }

    /// The first messages that `query` asks for, in its order, and possibly more;
    /// `memory` are the keys of those that are not sealed.
    ///
    /// Where the index of a segment cannot be read, answers that do not reach its times
    /// are given all the same.
    pub(crate) fn read(
        &self,
        query: &Query,
        limit: usize,
        memory: &[(i64, u64)],
    ) -> Result<Vec<Found>, HistoryError> {
        let mut from = query.from.as_micros();
        let Some(mut to) = query.to.as_micros().checked_sub(1) else { return Ok(Vec::new()) };
        let ascending = query.order == Order::Ascending;
        let after = query.after.map(|(timestamp, cursor)| (timestamp.as_micros(), cursor.seq));
        if let Some((timestamp, _)) = after {
            if ascending {
                from = from.max(timestamp);
            } else {
                to = to.min(timestamp);
            }
        }
        let mut found = Vec::new();
        if from > to || limit == 0 {
            return Ok(found);
        }
        let Candidates { blocks: mut candidates, mut unread } =
            self.candidates(&query.series, from, to);
        if ascending {
            candidates.sort_unstable_by_key(|c| c.entry.from);
        } else {
            candidates.sort_unstable_by_key(|c| std::cmp::Reverse(c.entry.to));
        }
        // The nearest time at which something is hidden.
        let hidden = if ascending {
            unread.sort_unstable_by_key(|(first, ..)| std::cmp::Reverse(*first));
            unread.pop().map(|(first, _, error)| (first, error))
        } else {
            unread.sort_unstable_by_key(|(_, last, _)| *last);
            unread.pop().map(|(_, last, error)| (last, error))
        };
        let before = |timestamp: i64, limit: i64| {
            if ascending { timestamp < limit } else { timestamp > limit }
        };
        let mut candidates = candidates.into_iter().peekable();
        while let Some(Candidate { segment, entry }) = candidates.next() {
            let block = segment.block(query.series, &entry)?;
            let start = block.timestamps.partition_point(|t| *t < from);
            let end = block.timestamps.partition_point(|t| *t <= to);
            for row in start..end {
                let key = block.key(row);
                let wanted = match (key, after) {
                    (Some(key), Some(after)) if ascending => key > after,
                    (Some(key), Some(after)) => key < after,
                    (key, None) => key.is_some(),
                    (None, _) => false,
                };
                if wanted {
                    found.push(Found::Sealed(block.clone(), row));
                }
            }
            // Nothing that follows comes before what is beyond its nearest time.
            let enough = match candidates.peek() {
                None => break,
                Some(next) if found.len() >= limit => {
                    let nearest = if ascending { next.entry.from } else { next.entry.to };
                    let settled = found.iter().filter(|found| before(found.key().0, nearest));
                    settled.count() >= limit
                }
                Some(_) => false,
            };
            if enough {
                break;
            }
        }
        if let Some((nearest, error)) = hidden {
            // An answer that does not reach what is hidden is whole.
            let settled = found.iter().map(Found::key).chain(memory.iter().copied());
            if settled.filter(|(timestamp, _)| before(*timestamp, nearest)).count() < limit {
                return Err(error);
            }
        }
        Ok(found)
    }

    /// Sealed messages after `after`, in order of arrival, and whether what is in memory
    /// follows them: it does not where damage ends them early.
    pub(crate) fn tail(
        &self,
        shard: u16,
        cache: &Cache,
        mut after: u64,
        limit: usize,
    ) -> Result<(Vec<Hit>, bool), HistoryError> {
        let mut hits: Vec<Hit> = Vec::new();
        while after < self.sealed_seq && hits.len() < limit {
            // Where retention left a hole, go on behind it.
            let nearest = self.segments.iter().filter(|s| s.meta.last_seq > after);
            let Some(nearest) = nearest.map(|s| s.meta.first_seq).min() else { break };
            after = after.max(nearest.saturating_sub(1));
            let number = after / WINDOW_SEQS;
            let first = number * WINDOW_SEQS + 1;
            let last = (first + WINDOW_SEQS - 1).min(self.sealed_seq);
            let key = Key::Window(shard, first, last, self.retained);
            let window = match cache.get(key) {
                Some(Item::Window(window)) => window,
                _ => match self.window(first, last) {
                    Ok((window, bytes)) => {
                        cache.put(key, Item::Window(window.clone()), bytes);
                        window
                    }
                    Err(damage) => {
                        // What arrived before the damage can still be read.
                        take(&damage.before, after, limit, &mut hits);
                        return if hits.is_empty() { Err(damage.error) } else { Ok((hits, false)) };
                    }
                },
            };
            take(&window, after, limit, &mut hits);
            after = last;
        }
        Ok((hits, true))
    }

    /// The sealed messages from sequence `first` to `last`.
    fn window(&self, first: u64, last: u64) -> Result<(Arc<Vec<Hit>>, usize), Box<DamagedWindow>> {
        let mut hits: Vec<Hit> = Vec::new();
        let mut bodies = Vec::new();
        let mut damage: Option<(u64, HistoryError)> = None;
        let mut fail = |at: u64, error: HistoryError| {
            if damage.as_ref().is_none_or(|(before, _)| at < *before) {
                damage = Some((at, error));
            }
        };
        for segment in &self.segments {
            if segment.meta.first_seq > last || segment.meta.last_seq < first {
                continue;
            }
            let pages = match segment.series_pages() {
                Ok(pages) => pages,
                Err(error) => {
                    fail(segment.meta.first_seq, error);
                    continue;
                }
            };
            for page in pages {
                let page = match page {
                    Ok(page) => page,
                    Err(error) => {
                        fail(segment.meta.first_seq, error);
                        continue;
                    }
                };
                let blocks = page.iter().flat_map(|(series, blocks)| {
                    let within =
                        blocks.iter().filter(|b| b.first_seq <= last && b.last_seq >= first);
                    within.map(move |entry| (*series, entry))
                });
                for (series, entry) in blocks {
                    // One block at a time: all of a large fleet would not fit into memory.
                    let added = segment.block_once(series, entry).and_then(|block| {
                        let seqs = block.seqs.iter().map(|seq| seq.cast_unsigned());
                        for (row, _) in seqs.enumerate().filter(|(_, s)| (first..=last).contains(s))
                        {
                            let start = bodies.len();
                            block
                                .body(row, &mut bodies)
                                .map_err(|damage| corrupt(&segment.path, entry.offset, damage.0))?;
                            let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
                            let place = (small(start), small(bodies.len() - start));
                            hits.extend(Hit::of_row(&block, row, place));
                        }
                        Ok(())
                    });
                    if let Err(error) = added {
                        fail(entry.first_seq, error);
                    }
                }
            }
        }
        let bytes = bodies.len() + hits.len() * HIT_BYTES;
        let chunk: Arc<[u8]> = bodies.into();
        for hit in &mut hits {
            hit.set_chunk(&chunk);
        }
        hits.sort_unstable_by_key(|hit| hit.seq);
        match damage {
            None => Ok((Arc::new(hits), bytes)),
            Some((at, error)) => {
                hits.retain(|hit| hit.seq < at);
                Err(Box::new(DamagedWindow { before: Arc::new(hits), error }))
            }
        }
    }

    /// The newest time of every series and the last values, from all blocks: slow,
    /// for when there is no snapshot.
    pub(crate) fn latest(&self) -> Result<BTreeMap<Series, Latest>, HistoryError> {
        let mut all: BTreeMap<Series, Latest> = BTreeMap::new();
        let mut scratch = Vec::new();
        for segment in &self.segments {
            // So does a damaged index: rather fewer last values than none.
            let Ok(pages) = segment.series_pages() else { continue };
            for page in pages.flatten() {
                for (series, blocks) in page.iter() {
                    let latest = all.entry(*series).or_insert_with(|| Latest {
                        newest: i64::MIN,
                        values: crate::memtable::LastValues::default(),
                    });
                    for entry in blocks {
                        latest.newest = latest.newest.max(entry.to);
                        if series.kind == SeriesKind::Message {
                            latest.take(segment, *series, entry, &mut scratch);
                        }
                    }
                }
            }
        }
        Ok(all)
    }
}

impl Latest {
    /// Takes in the values of a block; a damaged one hides its values only.
    fn take(
        &mut self,
        segment: &Segment,
        series: Series,
        entry: &BlockEntry,
        scratch: &mut Vec<u8>,
    ) {
        let Ok(block) = segment.block_once(series, entry) else { return };
        for row in 0..block.rows() {
            let timestamp = block.timestamps.get(row).copied().unwrap_or(i64::MIN);
            let Ok(params) = block.params(row, scratch) else { continue };
            for (name, value) in params {
                self.values.set(name, value, timestamp);
            }
        }
    }
}

/// A window of which some cannot be read.
struct DamagedWindow {
    before: Arc<Vec<Hit>>,
    error: HistoryError,
}

fn take(window: &[Hit], after: u64, limit: usize, into: &mut Vec<Hit>) {
    let start = window.partition_point(|hit| hit.seq <= after);
    let room = limit.saturating_sub(into.len());
    into.extend(window.get(start..).unwrap_or(&[]).iter().take(room).cloned());
}
