//! Aggregates of one parameter over a span of time: from the statistics of blocks
//! that lie within it, and from messages only at its edges and where blocks overlap.

use std::sync::Arc;

use fieldline_contracts::{HistoryError, Order, Query};
use fieldline_model::{Params, Series, Timestamp};

use crate::block::{Block, Summary, read_stats};
use crate::index::BlockEntry;
use crate::read::Candidate;
use crate::segment::Segment;
use crate::shard::Shard;
use crate::value::Kind;

/// Numbers of one parameter over a span of time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Aggregate {
    /// Messages that have it as a number.
    pub count: u64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// The sum; exact within blocks for integers and decimals, then rounded.
    pub sum: f64,
    /// The first by time.
    pub first: f64,
    /// The last by time.
    pub last: f64,
    /// Blocks that were answered from their statistics alone.
    pub blocks_not_read: u64,
}

impl Aggregate {
    const fn of(number: f64) -> Self {
        Self {
            count: 1,
            min: number,
            max: number,
            sum: number,
            first: number,
            last: number,
            blocks_not_read: 0,
        }
    }

    /// Takes in what is later.
    fn add(&mut self, later: &Self) {
        self.count += later.count;
        self.min = self.min.min(later.min);
        self.max = self.max.max(later.max);
        self.sum += later.sum;
        self.last = later.last;
        self.blocks_not_read += later.blocks_not_read;
    }

    #[allow(clippy::cast_precision_loss, reason = "aggregates are floats")]
    fn of_summary(summary: &Summary, scale: u8) -> Self {
        let unit = 10_f64.powi(i32::from(scale));
        match *summary {
            Summary::Ints { count, min, max, sum, first, last } => Self {
                count,
                min: min as f64 / unit,
                max: max as f64 / unit,
                sum: sum as f64 / unit,
                first: first as f64 / unit,
                last: last as f64 / unit,
                blocks_not_read: 1,
            },
            Summary::Floats { count, min, max, sum, first, last } => {
                Self { count, min, max, sum, first, last, blocks_not_read: 1 }
            }
        }
    }
}

/// A number with its place in the order of its series.
type Point = ((i64, u64), f64);

fn number(params: &Params, name: &str) -> Option<f64> {
    params.get(name)?.as_f64()
}

impl Shard {
    pub(crate) fn aggregate(
        &self,
        series: Series,
        name: &str,
        from: Timestamp,
        to: Timestamp,
    ) -> Result<Option<Aggregate>, HistoryError> {
        let whole =
            Query { series, from, to, order: Order::Ascending, after: None, limit: usize::MAX };
        let mut hits = Vec::new();
        let version = {
            let view = self.view.read();
            for table in view.tables() {
                table.read(&whole, usize::MAX, &mut hits);
            }
            view.version.clone()
        };
        let mut points: Vec<Point> = Vec::new();
        for hit in &hits {
            let damaged = |damage: crate::codec::Damage| HistoryError::Corrupt(damage.0.to_owned());
            let stored = hit.stored(self.number).map_err(damaged)?;
            points.extend(number(stored.params(), name).map(|n| ((hit.timestamp, hit.seq), n)));
        }
        let (from, to) = (from.as_micros(), to.as_micros());
        let Some(last) = to.checked_sub(1).filter(|last| *last >= from) else { return Ok(None) };
        let mut candidates = version.candidates(&series, from, last).whole()?;
        candidates.sort_unstable_by_key(|c| c.entry.from);
        let in_memory: Vec<i64> = hits.iter().map(|hit| hit.timestamp).collect();
        let spans: Vec<BlockEntry> = candidates.iter().map(|c| c.entry).collect();
        // Of a block by itself, as if it were one point at its start.
        let mut parts: Vec<((i64, u64), Aggregate)> = Vec::new();
        for (at, Candidate { segment, entry }) in candidates.into_iter().enumerate() {
            let within = entry.from >= from && entry.to <= last;
            let meets = |other: &BlockEntry| other.from <= entry.to && other.to >= entry.from;
            let alone = spans.iter().enumerate().all(|(n, other)| n == at || !meets(other))
                && !in_memory.iter().any(|t| (entry.from..=entry.to).contains(t));
            let known = if within && alone { from_stats(segment, &entry, name)? } else { None };
            match known {
                Some(Some(part)) => parts.push(((entry.from, entry.first_seq), part)),
                Some(None) => {}
                None => {
                    let block = segment.block(series, &entry)?;
                    read_points(segment, &entry, &block, name, from..=last, &mut points)?;
                }
            }
        }
        parts.extend(points.into_iter().map(|(key, n)| (key, Aggregate::of(n))));
        parts.sort_unstable_by_key(|(key, _)| *key);
        let mut parts = parts.into_iter().map(|(_, part)| part);
        let Some(mut all) = parts.next() else { return Ok(None) };
        parts.for_each(|part| all.add(&part));
        Ok(Some(all))
    }
}

/// The aggregate of a block from its statistics; `None` where they do not tell.
#[allow(clippy::option_option, reason = "not known is another thing than known to be absent")]
fn from_stats(
    segment: &Segment,
    entry: &BlockEntry,
    name: &str,
) -> Result<Option<Option<Aggregate>>, HistoryError> {
    let Some(stats) = segment.stats(entry)? else { return Ok(None) };
    let stats = read_stats(&stats).map_err(|d| segment.error(entry.offset, d.0))?;
    let Some(number) = segment.name_number(name)? else { return Ok(Some(None)) };
    let mut found = None;
    for ((id, kind, scale), _, summary) in stats {
        if id != number {
            continue;
        }
        match (kind, summary) {
            // Truth values and texts are no numbers.
            (Kind::Bool | Kind::Text | Kind::Bytes | Kind::Json, _) => {}
            // Columns of several kinds: which came first is not known here.
            (_, Some(_)) if found.is_some() => return Ok(None),
            (_, Some(summary)) => found = Some(Aggregate::of_summary(&summary, scale)),
            (_, None) => return Ok(None),
        }
    }
    Ok(Some(found))
}

fn read_points(
    segment: &Segment,
    entry: &BlockEntry,
    block: &Arc<Block>,
    name: &str,
    span: std::ops::RangeInclusive<i64>,
    into: &mut Vec<Point>,
) -> Result<(), HistoryError> {
    let mut scratch = Vec::new();
    for row in 0..block.rows() {
        let Some(key) = block.key(row).filter(|(at, _)| span.contains(at)) else { continue };
        let params = block.params(row, &mut scratch);
        let params = params.map_err(|d| segment.error(entry.offset, d.0))?;
        into.extend(number(&params, name).map(|n| (key, n)));
    }
    Ok(())
}
