//! Blocks: up to some thousand messages of one series and one day, by columns.
//!
//! ```text
//! data  := rows columns*        every column: length bytes
//!          timestamps, sequences, received−timestamp, shapes, then one column per parameter
//!          in the order in which the shapes of the rows first name it
//! stats := (name kind scale count [min max sum first last])*
//! ```
//!
//! Which parameters there are follows from the shapes, so nothing says it again.

#![allow(
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::cast_possible_truncation,
    reason = "sequences and shape numbers are carried as i64 columns, floats as bits"
)]

use std::sync::Arc;

use fieldline_model::{Cursor, Params, Series, Stored, Timestamp};

use crate::codec::{Damage, Decoded, Input, put_bytes, put_signed, put_varint};
use crate::columns::{Effort, Values, ints, put_ints};
use crate::dict::{ColumnKey, ShapeEntry};
use crate::hash::FoldMap;
use crate::value::{Kind, Shape};

/// Most rows of a block that is written.
pub(crate) const ROWS_MAX: usize = 4_096;
/// A block is closed beyond so many bytes of values.
pub(crate) const BODY_BYTES_MAX: usize = 1 << 20;
/// A block is closed beyond so many columns: of a device that makes up names, too, a
/// block is read with few of them.
const COLUMNS_MAX: usize = 2_048;
/// Most rows of a block that is read.
const ROWS_READ_MAX: usize = 1 << 16;
/// Blocks of fewer rows have no statistics: reading them is as fast.
pub(crate) const STATS_ROWS_MIN: usize = 32;

const DAY_MICROS: i64 = 86_400 * 1_000_000;

/// The UTC day of an instant, counted from 1970.
pub(crate) const fn day(timestamp: i64) -> i64 {
    timestamp.div_euclid(DAY_MICROS)
}

/// Collects the rows of one block, in order.
#[derive(Default)]
pub(crate) struct BlockBuilder {
    pub(crate) timestamps: Vec<i64>,
    pub(crate) seqs: Vec<i64>,
    received: Vec<i64>,
    shapes: Vec<i64>,
    columns: Vec<(ColumnKey, Values)>,
    places: FoldMap<ColumnKey, usize>,
    body_bytes: usize,
}

impl BlockBuilder {
    pub(crate) const fn rows(&self) -> usize {
        self.timestamps.len()
    }

    /// Whether a row of this time does not belong into this block any more.
    pub(crate) fn is_closed_for(&self, timestamp: i64) -> bool {
        self.rows() >= ROWS_MAX
            || self.body_bytes >= BODY_BYTES_MAX
            || self.columns.len() >= COLUMNS_MAX
            || self.timestamps.last().is_some_and(|last| day(*last) != day(timestamp))
    }

    /// Adds a row; `shape` is its number in the segment and `keys` its columns there.
    pub(crate) fn push(
        &mut self,
        (timestamp, seq, received): (i64, u64, i64),
        shape: u32,
        keys: &[ColumnKey],
        body: &[u8],
    ) -> Decoded<()> {
        let mut input = Input(body);
        for key in keys {
            let at = match self.places.get(key) {
                Some(at) => *at,
                None => {
                    self.places.insert(*key, self.columns.len());
                    self.columns.push((*key, Values::new(key.1)));
                    self.columns.len() - 1
                }
            };
            if let Some((_, values)) = self.columns.get_mut(at) {
                values.push_from(&mut input, key.1)?;
            }
        }
        self.timestamps.push(timestamp);
        self.seqs.push(seq as i64);
        self.received.push(received.wrapping_sub(timestamp));
        self.shapes.push(i64::from(shape));
        self.body_bytes += body.len();
        Ok(())
    }

    /// The data section.
    pub(crate) fn data(&self, effort: Effort) -> Vec<u8> {
        let mut out = Vec::new();
        put_varint(&mut out, self.rows() as u64);
        let mut column = Vec::new();
        for numbers in [&self.timestamps, &self.seqs, &self.received, &self.shapes] {
            column.clear();
            put_ints(&mut column, numbers, effort);
            put_bytes(&mut out, &column);
        }
        for (_, values) in &self.columns {
            column.clear();
            values.put(&mut column, effort);
            put_bytes(&mut out, &column);
        }
        out
    }

    /// The statistics section; empty for a small block.
    pub(crate) fn stats(&self) -> Vec<u8> {
        let mut out = Vec::new();
        if self.rows() < STATS_ROWS_MIN {
            return out;
        }
        for ((name, kind, scale), values) in &self.columns {
            put_varint(&mut out, u64::from(*name));
            out.extend_from_slice(&[*kind as u8, *scale]);
            put_varint(&mut out, values.len() as u64);
            if let Some(summary) = Summary::of(values, *kind) {
                summary.put(&mut out);
            }
        }
        out
    }
}

/// Count, extremes, sum, first and last of the values of a column, in the order of time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Summary {
    /// Of integers, booleans as 0 and 1, and mantissas.
    Ints { count: u64, min: i64, max: i64, sum: i128, first: i64, last: i64 },
    /// Of floats.
    Floats { count: u64, min: f64, max: f64, sum: f64, first: f64, last: f64 },
}

impl Summary {
    /// Of all values; `None` where they are no numbers that compare, or none.
    pub(crate) fn of(values: &Values, kind: Kind) -> Option<Self> {
        match values {
            // Bits of u64 do not compare as i64.
            Values::Ints(_) if kind == Kind::Uint => None,
            Values::Ints(numbers) => Self::of_ints(numbers),
            Values::Floats(bits) => Self::of_floats(bits),
            Values::Blobs(_) => None,
        }
    }

    pub(crate) fn of_ints(numbers: &[i64]) -> Option<Self> {
        Some(Self::Ints {
            count: numbers.len() as u64,
            min: *numbers.iter().min()?,
            max: *numbers.iter().max()?,
            sum: numbers.iter().map(|n| i128::from(*n)).sum(),
            first: *numbers.first()?,
            last: *numbers.last()?,
        })
    }

    pub(crate) fn of_floats(bits: &[i64]) -> Option<Self> {
        let float = |bits: &i64| f64::from_bits(*bits as u64);
        Some(Self::Floats {
            count: bits.len() as u64,
            min: bits.iter().map(float).reduce(f64::min)?,
            max: bits.iter().map(float).reduce(f64::max)?,
            sum: bits.iter().map(float).sum(),
            first: bits.first().map(float)?,
            last: bits.last().map(float)?,
        })
    }

    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::Ints { count: _, min, max, sum, first, last } => {
                for number in [min, max, first, last] {
                    put_signed(out, *number);
                }
                // As two halves of its two's complement.
                put_signed(out, (*sum >> 64) as i64);
                put_varint(out, *sum as u64);
            }
            Self::Floats { count: _, min, max, sum, first, last } => {
                for number in [min, max, sum, first, last] {
                    out.extend_from_slice(&number.to_bits().to_le_bytes());
                }
            }
        }
    }

    fn take(input: &mut Input<'_>, kind: Kind, count: u64) -> Decoded<Option<Self>> {
        Ok(match kind {
            Kind::Bool | Kind::Int | Kind::Decimal => {
                let (min, max) = (input.signed()?, input.signed()?);
                let (first, last) = (input.signed()?, input.signed()?);
                let sum = i128::from(input.signed()?) << 64 | i128::from(input.varint()?);
                Some(Self::Ints { count, min, max, sum, first, last })
            }
            Kind::Float => {
                let mut next = || input.u64().map(f64::from_bits);
                let (min, max, sum) = (next()?, next()?, next()?);
                Some(Self::Floats { count, min, max, sum, first: next()?, last: next()? })
            }
            Kind::Uint | Kind::Text | Kind::Bytes | Kind::Json => None,
        })
    }
}

/// The statistics of a block: of each column its key, count, and summary if it has one.
pub(crate) fn read_stats(bytes: &[u8]) -> Decoded<Vec<(ColumnKey, u64, Option<Summary>)>> {
    let mut input = Input(bytes);
    let mut stats = Vec::new();
    while !input.is_empty() {
        let name = input.id()?;
        let kind = Kind::from_u8(input.u8()?)?;
        let scale = input.u8()?;
        let count = input.varint()?;
        stats.push(((name, kind, scale), count, Summary::take(&mut input, kind, count)?));
    }
    Ok(stats)
}

/// A block in memory.
pub(crate) struct Block {
    pub(crate) series: Series,
    pub(crate) timestamps: Vec<i64>,
    pub(crate) seqs: Vec<i64>,
    received: Vec<i64>,
    shapes: Vec<i64>,
    pub(crate) columns: Vec<(ColumnKey, Values)>,
    /// The shapes that occur, each with the columns of its parameters.
    shape_columns: FoldMap<i64, (Arc<ShapeEntry>, Box<[usize]>)>,
    /// Of each row: where its places begin in `places`. Empty where row `n` of
    /// every column belongs to row `n` of the block.
    starts: Vec<usize>,
    places: Vec<u32>,
}

/// Gives a shape by its number in the segment.
pub(crate) type ShapeOf<'a> = &'a mut dyn FnMut(u32) -> Decoded<Arc<ShapeEntry>>;

/// The times of a block, which come first in its data section.
pub(crate) fn timestamps(data: &[u8]) -> Decoded<Vec<i64>> {
    let mut input = Input(data);
    let rows = row_count(&mut input)?;
    ints(input.bytes()?, rows)
}

fn row_count(input: &mut Input<'_>) -> Decoded<usize> {
    let rows = usize::try_from(input.varint()?).unwrap_or(usize::MAX);
    if rows == 0 || rows > ROWS_READ_MAX {
        return Err(Damage("a block has an impossible count of rows"));
    }
    Ok(rows)
}

impl Block {
    /// Reads a data section.
    pub(crate) fn read(data: &[u8], series: Series, shape_of: ShapeOf<'_>) -> Decoded<Self> {
        let mut input = Input(data);
        let rows = row_count(&mut input)?;
        let timestamps = ints(input.bytes()?, rows)?;
        let seqs = ints(input.bytes()?, rows)?;
        let received = ints(input.bytes()?, rows)?;
        let shapes = ints(input.bytes()?, rows)?;
        let mut block = Self {
            series,
            timestamps,
            seqs,
            received,
            shapes,
            columns: Vec::new(),
            shape_columns: FoldMap::default(),
            starts: Vec::new(),
            places: Vec::new(),
        };
        let counts = block.lay_out(shape_of)?;
        for ((key, values), count) in block.columns.iter_mut().zip(counts) {
            *values = Values::take(input.bytes()?, key.1, count)?;
        }
        if input.is_empty() { Ok(block) } else { Err(Damage("bytes are left after a block")) }
    }

    /// Finds out which columns there are, how many values each has, and where those of a row are.
    fn lay_out(&mut self, shape_of: ShapeOf<'_>) -> Decoded<Vec<usize>> {
        let mut found: FoldMap<ColumnKey, usize> = FoldMap::default();
        let mut counts: Vec<usize> = Vec::new();
        let one_shape = self.shapes.windows(2).all(|w| w.first() == w.last());
        for (row, shape) in self.shapes.iter().enumerate() {
            if !self.shape_columns.contains_key(shape) {
                let number = u32::try_from(*shape).ok();
                let entry = shape_of(number.ok_or(Damage("a block names an unknown shape"))?)?;
                let mut columns = Vec::with_capacity(entry.keys.len());
                for key in &entry.keys {
                    let at = *found.entry(*key).or_insert_with(|| {
                        self.columns.push((*key, Values::new(key.1)));
                        counts.push(0);
                        counts.len() - 1
                    });
                    columns.push(at);
                }
                let distinct = found.len() == columns.len();
                self.shape_columns.insert(*shape, (entry, columns.into()));
                if one_shape && distinct {
                    counts.fill(self.shapes.len());
                    return Ok(counts);
                }
            }
            let columns = self.shape_columns.get(shape).map_or(&[][..], |(_, columns)| columns);
            self.starts.push(self.places.len());
            for at in columns {
                if let Some(count) = counts.get_mut(*at) {
                    self.places.push(*count as u32);
                    *count += 1;
                }
            }
            // A shape of a thousand parameters in each of many rows: beyond what was ever written.
            if self.places.len() > crate::codec::INFLATED_BYTES_MAX / 4 {
                return Err(Damage("a block has too many values"));
            }
            debug_assert_eq!(self.starts.len(), row + 1, "one start a row");
        }
        Ok(counts)
    }

    pub(crate) const fn rows(&self) -> usize {
        self.timestamps.len()
    }

    pub(crate) fn key(&self, row: usize) -> Option<(i64, u64)> {
        Some((*self.timestamps.get(row)?, *self.seqs.get(row)? as u64))
    }

    /// Memory of one row, about.
    pub(crate) fn row_bytes(&self) -> usize {
        let values: usize = self.columns.iter().map(|(_, values)| values.heap_bytes()).sum();
        values / self.rows().max(1) + 64
    }

    /// Memory it takes, about.
    pub(crate) fn heap_bytes(&self) -> usize {
        let columns: usize = self.columns.iter().map(|(_, values)| values.heap_bytes() + 64).sum();
        let shapes = self.shape_columns.values().map(|(entry, at)| {
            let names = entry.shape.0.iter().map(|column| column.name.as_str().len());
            entry.heap_bytes() + at.len() * 8 + names.sum::<usize>()
        });
        columns
            + shapes.sum::<usize>()
            + self.rows() * 32
            + self.places.len() * 4
            + self.starts.len() * 8
            + 512
    }

    /// When a row was received.
    pub(crate) fn received(&self, row: usize) -> i64 {
        let timestamp = self.timestamps.get(row).copied().unwrap_or(0);
        timestamp.wrapping_add(self.received.get(row).copied().unwrap_or(0))
    }

    /// The number of the shape of a row in its segment.
    pub(crate) fn shape_number(&self, row: usize) -> Option<i64> {
        self.shapes.get(row).copied()
    }

    /// The shape of a row.
    pub(crate) fn shape(&self, row: usize) -> Option<&Arc<Shape>> {
        self.shape_columns.get(self.shapes.get(row)?).map(|(entry, _)| &entry.shape)
    }

    /// Appends the values of a row as a message's body.
    pub(crate) fn body(&self, row: usize, into: &mut Vec<u8>) -> Decoded<()> {
        const MISSING: Damage = Damage("a block lacks a value");
        let shape = self.shapes.get(row).ok_or(MISSING)?;
        let (_, columns) = self.shape_columns.get(shape).ok_or(MISSING)?;
        for (slot, column) in columns.iter().enumerate() {
            let at = match self.starts.get(row) {
                Some(start) => *self.places.get(start + slot).ok_or(MISSING)? as usize,
                None => row,
            };
            let (key, values) = self.columns.get(*column).ok_or(MISSING)?;
            if !values.append_to(into, key.1, at) {
                return Err(MISSING);
            }
        }
        Ok(())
    }

    pub(crate) fn params(&self, row: usize, scratch: &mut Vec<u8>) -> Decoded<Params> {
        scratch.clear();
        self.body(row, scratch)?;
        self.shape(row).ok_or(Damage("a block lacks a shape"))?.decode(scratch)
    }

    pub(crate) fn stored(&self, row: usize, shard: u16, scratch: &mut Vec<u8>) -> Decoded<Stored> {
        let (timestamp, seq) = self.key(row).ok_or(Damage("a block lacks a row"))?;
        Ok(Stored::read_back(
            self.series,
            Timestamp::from_micros(timestamp),
            Timestamp::from_micros(self.received(row)),
            self.params(row, scratch)?,
            Cursor { shard, seq },
        ))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::section;

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let series = Series::events(fieldline_model::AccountId::from_bytes([0; 16]));
            let mut shape = |number: u32| {
                let keys = [(0, Kind::Int, 0), (number, Kind::Text, 0)].into();
                Ok(Arc::new(ShapeEntry { shape: Arc::default(), keys }))
            };
            let _read = (
                Block::read(&bytes, series, &mut shape).is_ok(),
                timestamps(&bytes),
                read_stats(&bytes),
                section(&bytes),
            );
        }

        #[test]
        fn summaries_round_trip(numbers in prop::collection::vec(any::<i64>(), 1..50)) {
            for (values, kind) in [
                (Values::Ints(numbers.clone()), Kind::Int),
                (Values::Floats(numbers.iter().map(|n| (*n as f64).to_bits() as i64).collect()), Kind::Float),
            ] {
                let summary = Summary::of(&values, kind).unwrap();
                let mut out = Vec::new();
                summary.put(&mut out);
                let read = Summary::take(&mut Input(&out), kind, numbers.len() as u64);
                prop_assert_eq!(read, Ok(Some(summary)));
            }
        }
    }
}
