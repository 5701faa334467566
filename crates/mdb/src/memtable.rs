//! Messages that are durable in the log and not sealed yet.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use fieldline_contracts::state::DEVICE_BYTES_MAX;
use fieldline_contracts::{Order, Query};
use fieldline_model::{Cursor, ParamName, Series, SeriesKind, Stored, Timestamp, Value};

use crate::block::Block;
use crate::codec::Decoded;
use crate::dict::Dict;
use crate::hash::FoldMap;
use crate::snapshot::Latest;
use crate::value::Shape;

/// One message in memory, its values in a chunk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message {
    pub(crate) seq: u64,
    pub(crate) timestamp: i64,
    pub(crate) received: i64,
    pub(crate) hash: u64,
    pub(crate) series: u32,
    pub(crate) shape: u32,
    pub(crate) chunk: u32,
    pub(crate) start: u32,
    pub(crate) length: u32,
}

/// Memory of a message beside its body: itself and its place in the order of its series.
const MESSAGE_BYTES: usize = size_of::<Message>() + 30;

pub(crate) struct SeriesMessages {
    pub(crate) series: Series,
    /// By timestamp, then by arrival: the place in [`Memtable::messages`].
    pub(crate) order: BTreeSet<(i64, u32)>,
    pub(crate) body_bytes: u64,
}

/// One message taken out to be read without a lock.
#[derive(Clone)]
pub(crate) struct Hit {
    pub(crate) seq: u64,
    pub(crate) timestamp: i64,
    series: Series,
    received: i64,
    shape: Arc<Shape>,
    chunk: Arc<[u8]>,
    start: u32,
    length: u32,
}

impl Hit {
    /// A row of a block, its values at `start` of a chunk that is still to be set.
    pub(crate) fn of_row(block: &Block, row: usize, (start, length): (u32, u32)) -> Option<Self> {
        let (timestamp, seq) = block.key(row)?;
        Some(Self {
            seq,
            timestamp,
            series: block.series,
            received: block.received(row),
            shape: block.shape(row)?.clone(),
            chunk: Arc::default(),
            start,
            length,
        })
    }

    /// Bytes of its values.
    pub(crate) const fn body_bytes(&self) -> usize {
        self.length as usize
    }

    pub(crate) fn set_chunk(&mut self, chunk: &Arc<[u8]>) {
        self.chunk = chunk.clone();
    }

    pub(crate) fn stored(&self, shard: u16) -> Decoded<Stored> {
        let start = self.start as usize;
        let body = self.chunk.get(start..start + self.length as usize).unwrap_or(&[]);
        Ok(Stored::read_back(
            self.series,
            Timestamp::from_micros(self.timestamp),
            Timestamp::from_micros(self.received),
            self.shape.decode(body)?,
            Cursor { shard, seq: self.seq },
        ))
    }
}

/// The newest value of each parameter of one series, with its time.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct LastValues {
    values: BTreeMap<ParamName, (Value, i64)>,
    bytes: usize,
}

/// Bytes that a last value counts for.
fn cost(name: &ParamName, value: &Value) -> usize {
    name.as_str().len() + 16 + value.heap_bytes()
}

impl LastValues {
    /// Most parameters of one series whose last values are kept: a device that
    /// makes up names must not fill memory with them.
    pub(crate) const PARAMS_MAX: usize = 4_096;

    /// Takes a value over unless the present one is newer. One that does not fit takes
    /// the one before it away: absent is not wrong, old is.
    pub(crate) fn set(&mut self, name: ParamName, value: Value, timestamp: i64) {
        let before = match self.values.get(&name) {
            Some((_, newest)) if *newest > timestamp => return,
            Some((present, _)) => Some(cost(&name, present)),
            None => None,
        };
        let rest = self.bytes - before.unwrap_or(0);
        let after = rest + cost(&name, &value);
        let room = before.is_some() || self.values.len() < Self::PARAMS_MAX;
        if room && after <= DEVICE_BYTES_MAX {
            self.values.insert(name, (value, timestamp));
            self.bytes = after;
        } else if self.values.remove(&name).is_some() {
            self.bytes = rest;
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.values.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&ParamName, &(Value, i64))> {
        self.values.iter()
    }
}

#[derive(Default)]
pub(crate) struct Memtable {
    series_ids: FoldMap<Series, u32>,
    pub(crate) series: Vec<SeriesMessages>,
    pub(crate) shapes: Vec<Arc<Shape>>,
    /// In order of arrival.
    pub(crate) messages: Vec<Message>,
    pub(crate) chunks: Vec<Arc<[u8]>>,
    /// Memory it takes without its dictionary, about.
    pub(crate) bytes: usize,
    /// Log files that hold these messages; they go when it is sealed.
    pub(crate) files: Vec<u64>,
    /// Bytes of those files.
    pub(crate) file_bytes: u64,
    /// When its first message came, by the store's clock.
    pub(crate) since: Option<Timestamp>,
}

impl Memtable {
    /// Makes a group visible. Its messages number their chunk 0.
    pub(crate) fn publish(
        &mut self,
        dict: &Dict,
        group: impl IntoIterator<Item = Message>,
        chunk: Arc<[u8]>,
    ) {
        let shapes = dict.shapes.iter().skip(self.shapes.len());
        self.shapes.extend(shapes.map(|entry| entry.item.shape.clone()));
        for entry in dict.series.iter().skip(self.series.len()) {
            let series = entry.item.series;
            self.series_ids.insert(series, u32::try_from(self.series.len()).unwrap_or(u32::MAX));
            self.series.push(SeriesMessages { series, order: BTreeSet::new(), body_bytes: 0 });
        }
        let number = u32::try_from(self.chunks.len()).unwrap_or(u32::MAX);
        self.bytes += chunk.len() + 32;
        self.chunks.push(chunk);
        for message in group {
            let at = u32::try_from(self.messages.len()).unwrap_or(u32::MAX);
            if let Some(series) = self.series.get_mut(message.series as usize) {
                series.order.insert((message.timestamp, at));
                series.body_bytes += u64::from(message.length);
            }
            self.messages.push(Message { chunk: number, ..message });
            self.bytes += MESSAGE_BYTES;
        }
    }

    /// An empty one, with log files that belong to it already.
    pub(crate) fn of_files(files: Vec<u64>) -> Self {
        Self { files, ..Self::default() }
    }

    /// What [`Memtable::latest`] needs, taken out to be used without a lock.
    pub(crate) fn copy(&self) -> Self {
        let empty = |s: &SeriesMessages| SeriesMessages {
            series: s.series,
            order: BTreeSet::new(),
            body_bytes: s.body_bytes,
        };
        Self {
            series: self.series.iter().map(empty).collect(),
            shapes: self.shapes.clone(),
            messages: self.messages.clone(),
            chunks: self.chunks.clone(),
            ..Self::default()
        }
    }

    /// The newest time of every series that has messages here, and the last values of
    /// message series; sorted by series.
    pub(crate) fn latest(&self) -> Vec<(Series, Latest)> {
        let mut latest: Vec<Option<Latest>> = vec![None; self.series.len()];
        for message in &self.messages {
            let at = message.series as usize;
            let (Some(slot), Some(series)) = (latest.get_mut(at), self.series.get(at)) else {
                continue;
            };
            let slot = slot
                .get_or_insert_with(|| Latest { newest: i64::MIN, values: LastValues::default() });
            slot.newest = slot.newest.max(message.timestamp);
            if series.series.kind != SeriesKind::Message {
                continue;
            }
            // A body that its shape does not fit was never written.
            let shape = self.shapes.get(message.shape as usize);
            let Some(Ok(params)) = shape.map(|shape| shape.decode(self.body(message))) else {
                continue;
            };
            for (name, value) in params {
                slot.values.set(name, value, message.timestamp);
            }
        }
        let mut latest: Vec<(Series, Latest)> = self
            .series
            .iter()
            .zip(latest)
            .filter_map(|(series, latest)| Some((series.series, latest?)))
            .collect();
        latest.sort_unstable_by_key(|(series, _)| *series);
        latest
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    pub(crate) fn find_series(&self, series: &Series) -> Option<&SeriesMessages> {
        self.series.get(*self.series_ids.get(series)? as usize)
    }

    pub(crate) fn body(&self, message: &Message) -> &[u8] {
        let start = message.start as usize;
        let chunk = self.chunks.get(message.chunk as usize);
        chunk.and_then(|c| c.get(start..start + message.length as usize)).unwrap_or(&[])
    }

    fn hit(&self, message: &Message) -> Option<Hit> {
        Some(Hit {
            seq: message.seq,
            timestamp: message.timestamp,
            series: self.series.get(message.series as usize)?.series,
            received: message.received,
            shape: self.shapes.get(message.shape as usize)?.clone(),
            chunk: self.chunks.get(message.chunk as usize)?.clone(),
            start: message.start,
            length: message.length,
        })
    }

    /// The sequence of a message of this time and content.
    pub(crate) fn find(&self, series: &Series, timestamp: i64, hash: u64) -> Option<u64> {
        let order = &self.find_series(series)?.order;
        order.range((timestamp, 0)..=(timestamp, u32::MAX)).find_map(|(_, at)| {
            let message = self.messages.get(*at as usize)?;
            (message.hash == hash).then_some(message.seq)
        })
    }

    /// The first messages that `query` asks for, in its order.
    pub(crate) fn read(&self, query: &Query, limit: usize, into: &mut Vec<Hit>) {
        let Some(series) = self.find_series(&query.series) else { return };
        // Places before `from` of the same instant are those that arrived earlier.
        let place = |seq: u64| {
            let at = self.messages.partition_point(|m| m.seq <= seq);
            u32::try_from(at).unwrap_or(u32::MAX)
        };
        let mut low = Bound::Included((query.from.as_micros(), 0));
        let mut high = Bound::Excluded((query.to.as_micros(), 0));
        if let Some((timestamp, cursor)) = query.after {
            let timestamp = timestamp.as_micros();
            match query.order {
                Order::Ascending if timestamp >= query.from.as_micros() => {
                    low = Bound::Included((timestamp, place(cursor.seq)));
                }
                Order::Descending if timestamp < query.to.as_micros() => {
                    high = Bound::Excluded((timestamp, place(cursor.seq.saturating_sub(1))));
                }
                _ => {}
            }
        }
        // An empty range must not reach BTreeSet::range, which panics on it.
        if let (Bound::Included(low), Bound::Excluded(high)) = (low, high)
            && low >= high
        {
            return;
        }
        let hit = |(_, at): &(i64, u32)| self.hit(self.messages.get(*at as usize)?);
        let range = series.order.range((low, high));
        match query.order {
            Order::Ascending => into.extend(range.take(limit).filter_map(hit)),
            Order::Descending => into.extend(range.rev().take(limit).filter_map(hit)),
        }
    }

    /// Messages after `seq`, in order of arrival.
    pub(crate) fn tail(&self, seq: u64, limit: usize, into: &mut Vec<Hit>) {
        let start = self.messages.partition_point(|m| m.seq <= seq);
        let messages = self.messages.get(start..).unwrap_or(&[]);
        into.extend(messages.iter().take(limit).filter_map(|m| self.hit(m)));
    }
}
