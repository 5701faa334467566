//! Reading sealed messages: by series and time, by content, and in order of arrival.

use std::collections::BTreeMap;
use std::sync::Arc;

use fieldline_contracts::{HistoryError, Order, Query};
use fieldline_model::stage::content_hash;
use fieldline_model::{Series, SeriesKind, Timestamp};

use crate::block::Block;
use crate::index::BlockEntry;
use crate::memtable::Hit;
use crate::segment::Segment;
use crate::shard::Version;
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

/// Up to where an answer is whole.
pub(crate) struct Horizon {
    ascending: bool,
    /// The nearest time, in the order of the query, at which something may be missing.
    at: Option<i64>,
    /// Why, where it cannot be read.
    pub(crate) error: Option<HistoryError>,
}

impl Horizon {
    const fn precedes(&self, timestamp: i64, limit: i64) -> bool {
        if self.ascending { timestamp < limit } else { timestamp > limit }
    }

    /// Whether all of this time is known.
    pub(crate) fn holds(&self, timestamp: i64) -> bool {
        self.at.is_none_or(|at| self.precedes(timestamp, at))
    }

    /// From here on nothing was looked for.
    fn end(&mut self, nearest: i64) {
        (self.at, self.error) = (Some(nearest), None);
    }

    /// Something from `first` to `last` cannot be read.
    fn hide(&mut self, first: i64, last: i64, error: &HistoryError) {
        let nearest = if self.ascending { first } else { last };
        if self.holds(nearest) {
            self.at = Some(nearest);
            let (first, last) = (Timestamp::from_micros(first), Timestamp::from_micros(last));
            let reason = match error {
                HistoryError::Corrupt(reason) => reason.clone(),
                other => other.to_string(),
            };
            self.error = Some(HistoryError::Corrupt(format!(
                "{reason}: messages from {first} to {last} cannot be read; ask for times before or after, \
                 or restore the file from a backup"
            )));
        }
    }
}

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

    /// The first messages that `query` asks for, in its order, and possibly more. Only those
    /// before the horizon are all there are.
    pub(crate) fn read(&self, query: &Query, limit: usize) -> (Vec<Found>, Horizon) {
        let ascending = query.order == Order::Ascending;
        let mut horizon = Horizon { ascending, at: None, error: None };
        let mut found = Vec::new();
        let mut from = query.from.as_micros();
        let Some(mut to) = query.to.as_micros().checked_sub(1) else { return (found, horizon) };
        let after = query.after.map(|(timestamp, cursor)| (timestamp.as_micros(), cursor.seq));
        if let Some((timestamp, _)) = after {
            if ascending {
                from = from.max(timestamp);
            } else {
                to = to.min(timestamp);
            }
        }
        if from > to || limit == 0 {
            return (found, horizon);
        }
        let Candidates { blocks: mut candidates, unread } =
            self.candidates(&query.series, from, to);
        for (first, last, error) in unread {
            horizon.hide(first.max(from), last.min(to), &error);
        }
        let nearest = |entry: &BlockEntry| if ascending { entry.from } else { entry.to };
        if ascending {
            candidates.sort_unstable_by_key(|c| c.entry.from);
        } else {
            candidates.sort_unstable_by_key(|c| std::cmp::Reverse(c.entry.to));
        }
        // Of every block that was read: how many of its rows were taken, and their size.
        let mut taken: Vec<(usize, usize)> = Vec::new();
        for Candidate { segment, entry } in candidates {
            // Nothing that follows comes before what is beyond its nearest time.
            let nearest = nearest(&entry);
            if !horizon.holds(nearest) {
                break;
            }
            let bytes: usize = taken.iter().map(|(rows, row_bytes)| rows * row_bytes).sum();
            if found.len() >= limit || bytes >= Query::BYTES_MAX {
                let (mut count, mut bytes, mut rows) = (0, 0, found.iter());
                for (taken, row_bytes) in &taken {
                    let settled = |found: &&Found| horizon.precedes(found.key().0, nearest);
                    let of_block = rows.by_ref().take(*taken).filter(settled).count();
                    count += of_block;
                    bytes += of_block * row_bytes;
                }
                if count >= limit || bytes >= Query::BYTES_MAX {
                    horizon.end(nearest);
                    break;
                }
            }
            let block = match segment.block(query.series, &entry) {
                Ok(block) => block,
                Err(error) => {
                    horizon.hide(entry.from.max(from), entry.to.min(to), &error);
                    continue;
                }
            };
            let start = block.timestamps.partition_point(|t| *t < from);
            let end = block.timestamps.partition_point(|t| *t <= to);
            let before = found.len();
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
            taken.push((found.len() - before, block.row_bytes()));
        }
        (found, horizon)
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
