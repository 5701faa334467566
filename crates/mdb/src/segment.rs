//! Segments: immutable files of blocks, sorted by series and time, with an index at the end.
//!
//! ```text
//! file    := magic[8] block* index trailer
//! block   := [crc:u32 stats] crc:u32 data             each crc over what follows it
//! index   := names shapes accounts series*            squeezed
//! trailer := index_bytes:u32 index_crc:u32 magic[8]
//! ```

#![allow(clippy::cast_possible_truncation, reason = "series kinds are u8 by their repr")]

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fieldline_contracts::HistoryError;
use fieldline_model::{AccountId, ParamName, Series, SeriesKind};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::block::{Block, BlockBuilder, Shapes};
use crate::cache::{Cache, Item, Key};
use crate::codec::{
    Damage, Decoded, Input, checksum, put_bytes, put_section, put_signed, put_squeezed, put_varint,
    section, unsqueeze,
};
use crate::columns::Effort;
use crate::dict::ColumnKey;
use crate::disk::{Disk, DiskFile};
use crate::hash::FoldMap;
use crate::shard::corrupt;
use crate::value::{Column, Kind, Shape};

const MAGIC: &[u8; 8] = b"FLDSEG01";
const END: &[u8; 8] = b"FLDSEGE1";
const TRAILER_BYTES: usize = 16;
/// Largest section that is read: what a block of the largest messages may come to.
const SECTION_BYTES_MAX: u64 = 64 << 20;
/// Largest index that is written, before it is squeezed: always readable.
const INDEX_BYTES_MAX: usize = 60 << 20;
/// Bytes gathered before they are written.
const WRITE_BYTES: usize = 1 << 20;

/// What of an account is in a segment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AccountMeta {
    pub(crate) account: AccountId,
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
    pub(crate) from: i64,
    pub(crate) to: i64,
}

/// What the manifest says of a segment. Times and sequences are the first and the last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SegmentMeta {
    pub(crate) number: u64,
    pub(crate) bytes: u64,
    pub(crate) messages: u64,
    pub(crate) from: i64,
    pub(crate) to: i64,
    pub(crate) first_seq: u64,
    pub(crate) last_seq: u64,
    pub(crate) accounts: Vec<AccountMeta>,
}

/// Where a block is and what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockEntry {
    pub(crate) offset: u64,
    /// Of the statistics with their checksum; 0 if there are none.
    pub(crate) stats_bytes: u32,
    /// Of the data with its checksum.
    pub(crate) data_bytes: u32,
    pub(crate) rows: u32,
    pub(crate) from: i64,
    pub(crate) to: i64,
    pub(crate) first_seq: u64,
    pub(crate) last_seq: u64,
}

impl BlockEntry {
    pub(crate) const fn bytes(&self) -> u64 {
        self.stats_bytes as u64 + self.data_bytes as u64
    }
}

/// The index of a segment.
#[derive(Default)]
pub(crate) struct Footer {
    pub(crate) names: Vec<ParamName>,
    pub(crate) shapes: Arc<Shapes>,
    /// Sorted; with the blocks of each in order of time.
    pub(crate) series: Vec<(Series, Vec<BlockEntry>)>,
    /// Of the index, not squeezed.
    pub(crate) index_bytes: usize,
    pub(crate) heap_bytes: usize,
}

impl Footer {
    pub(crate) fn blocks(&self, series: &Series) -> &[BlockEntry] {
        let at = self.series.binary_search_by(|(other, _)| other.cmp(series));
        at.ok().and_then(|at| self.series.get(at)).map_or(&[], |(_, blocks)| blocks)
    }

    fn put(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_varint(&mut out, self.names.len() as u64);
        for name in &self.names {
            put_bytes(&mut out, name.as_str().as_bytes());
        }
        put_varint(&mut out, self.shapes.keys.len() as u64);
        for keys in &self.shapes.keys {
            put_varint(&mut out, keys.len() as u64);
            for (name, kind, scale) in keys {
                put_varint(&mut out, u64::from(*name));
                out.extend_from_slice(&[*kind as u8, *scale]);
            }
        }
        put_varint(&mut out, self.series.len() as u64);
        let mut account = None;
        let (mut offset, mut time, mut seq) = (0_u64, 0_i64, 0_u64);
        for (series, blocks) in &self.series {
            // Sorted by account first, so it is written where it changes only.
            out.push(u8::from(account != Some(series.account)));
            if account != Some(series.account) {
                account = Some(series.account);
                out.extend_from_slice(series.account.as_bytes());
            }
            out.push(series.kind as u8);
            out.extend_from_slice(series.object.as_bytes());
            put_varint(&mut out, blocks.len() as u64);
            for block in blocks {
                put_varint(&mut out, block.offset.wrapping_sub(offset));
                put_varint(&mut out, u64::from(block.stats_bytes));
                put_varint(&mut out, u64::from(block.data_bytes));
                put_varint(&mut out, u64::from(block.rows));
                put_signed(&mut out, block.from.wrapping_sub(time));
                put_signed(&mut out, block.to.wrapping_sub(block.from));
                put_signed(&mut out, block.first_seq.wrapping_sub(seq).cast_signed());
                put_signed(&mut out, block.last_seq.wrapping_sub(block.first_seq).cast_signed());
                offset = block.offset + block.bytes();
                (time, seq) = (block.from, block.first_seq);
            }
        }
        out
    }

    fn read(bytes: &[u8]) -> Decoded<Self> {
        let mut input = Input(bytes);
        let mut names = Vec::new();
        for _ in 0..input.count()? {
            names.push(ParamName::new(input.text()?).map_err(|_| Damage("no name"))?);
        }
        let mut shapes = Shapes::default();
        for _ in 0..input.count()? {
            let mut keys: Vec<ColumnKey> = Vec::new();
            let mut columns = Vec::new();
            for _ in 0..input.count()? {
                let id = input.id()?;
                let name = names.get(id as usize).ok_or(Damage("unknown name"))?.clone();
                let kind = Kind::from_u8(input.u8()?)?;
                let scale = input.u8()?;
                keys.push((id, kind, scale));
                columns.push(Column { name, kind, scale });
            }
            shapes.keys.push(keys.into());
            shapes.shapes.push(Arc::new(Shape(columns.into())));
        }
        let mut series: Vec<(Series, Vec<BlockEntry>)> = Vec::new();
        let mut account = None;
        let (mut offset, mut time, mut seq) = (0_u64, 0_i64, 0_u64);
        for _ in 0..input.count()? {
            if input.u8()? != 0 {
                account = Some(AccountId::from_bytes(input.array()?));
            }
            let account = account.ok_or(Damage("a series without account"))?;
            let kind = SeriesKind::from_u8(input.u8()?).ok_or(Damage("unknown series kind"))?;
            let object = Uuid::from_bytes(input.array()?);
            let this = Series { account, kind, object };
            if series.last().is_some_and(|(last, _)| *last >= this) {
                return Err(Damage("series are not in order"));
            }
            let mut blocks = Vec::new();
            for _ in 0..input.count()? {
                offset = offset.wrapping_add(input.varint()?);
                let stats_bytes = input.id()?;
                let data_bytes = input.id()?;
                let rows = input.id()?;
                let from = time.wrapping_add(input.signed()?);
                let to = from.wrapping_add(input.signed()?);
                let first_seq = seq.wrapping_add_signed(input.signed()?);
                let last_seq = first_seq.wrapping_add_signed(input.signed()?);
                let block = BlockEntry {
                    offset,
                    stats_bytes,
                    data_bytes,
                    rows,
                    from,
                    to,
                    first_seq,
                    last_seq,
                };
                blocks.push(block);
                offset = offset.wrapping_add(block.bytes());
                (time, seq) = (from, first_seq);
            }
            series.push((this, blocks));
        }
        if !input.is_empty() {
            return Err(Damage("bytes are left after the index"));
        }
        let index_bytes = bytes.len();
        let heap_bytes = index_bytes * 6 + 1_024;
        Ok(Self { names, shapes: Arc::new(shapes), series, index_bytes, heap_bytes })
    }
}

/// A sealed segment. Its file goes when the last reader of an obsolete one is done.
pub(crate) struct Segment {
    pub(crate) meta: SegmentMeta,
    pub(crate) path: PathBuf,
    shard: u16,
    file: Box<dyn DiskFile>,
    disk: Arc<dyn Disk>,
    cache: Arc<Cache>,
    obsolete: AtomicBool,
    /// A block could not be read: it is not merged, so that the damage does not spread.
    pub(crate) damaged: AtomicBool,
    /// Its index is too large for it to be merged.
    pub(crate) crowded: AtomicBool,
    /// Accounts whose part of it, which cannot be read, is beyond their retention.
    past: Mutex<BTreeSet<AccountId>>,
}

impl Drop for Segment {
    fn drop(&mut self) {
        if self.obsolete.load(Ordering::Acquire)
            && let Err(error) = self.disk.remove(&self.path)
        {
            // Opening the store removes what the manifest does not name.
            tracing::warn!(path = %self.path.display(), %error, "an old segment was not removed");
        }
    }
}

/// The name of segment `number`.
pub(crate) fn file_name(number: u64) -> String {
    format!("seg-{number:012}.seg")
}

impl Segment {
    pub(crate) fn open(
        disk: &Arc<dyn Disk>,
        cache: &Arc<Cache>,
        dir: &Path,
        shard: u16,
        meta: SegmentMeta,
    ) -> io::Result<Self> {
        let path = dir.join(file_name(meta.number));
        let file = disk.open(&path)?;
        Ok(Self {
            meta,
            path,
            shard,
            file,
            disk: disk.clone(),
            cache: cache.clone(),
            obsolete: AtomicBool::new(false),
            damaged: AtomicBool::new(false),
            crowded: AtomicBool::new(false),
            past: Mutex::default(),
        })
    }

    /// As [`Segment::open`], for one that was just written: reads its index, so that
    /// nothing is removed for the sake of a file that cannot be read.
    pub(crate) fn open_written(
        disk: &Arc<dyn Disk>,
        cache: &Arc<Cache>,
        dir: &Path,
        shard: u16,
        meta: SegmentMeta,
    ) -> io::Result<Self> {
        let segment = Self::open(disk, cache, dir, shard, meta)?;
        segment.footer().map_err(io::Error::other)?;
        Ok(segment)
    }

    /// The manifest does not name it any more.
    pub(crate) fn retire(&self) {
        self.obsolete.store(true, Ordering::Release);
    }

    /// Notes that all of an account in it is beyond retention; whether that is so of all accounts.
    pub(crate) fn is_past(&self, account: AccountId) -> bool {
        let mut past = self.past.lock();
        past.insert(account);
        self.meta.accounts.iter().all(|part| past.contains(&part.account))
    }

    fn corrupt(&self, offset: u64, reason: &str) -> HistoryError {
        self.damaged.store(true, Ordering::Relaxed);
        metrics::counter!("fieldline_mdb_corrupt_total").increment(1);
        corrupt(&self.path, offset, reason)
    }

    fn read_at(&self, offset: u64, bytes: u64) -> Result<Vec<u8>, HistoryError> {
        if bytes > SECTION_BYTES_MAX {
            return Err(self.corrupt(offset, "a section is larger than any that was written"));
        }
        let mut content = vec![0; usize::try_from(bytes).unwrap_or(0)];
        match self.file.read_exact_at(&mut content, offset) {
            Ok(()) => Ok(content),
            Err(error) => Err(self.corrupt(offset, &error.to_string())),
        }
    }

    /// Its index, from memory or disk.
    pub(crate) fn footer(&self) -> Result<Arc<Footer>, HistoryError> {
        let key = Key::Footer(self.shard, self.meta.number);
        if let Some(Item::Footer(footer)) = self.cache.get(key) {
            return Ok(footer);
        }
        let end = self.meta.bytes.saturating_sub(TRAILER_BYTES as u64);
        let trailer = self.read_at(end, TRAILER_BYTES as u64)?;
        let mut input = Input(&trailer);
        let read = |input: &mut Input<'_>| -> Decoded<(u64, u32)> {
            let (bytes, crc) = (input.u32()?, input.u32()?);
            if input.0 == END { Ok((u64::from(bytes), crc)) } else { Err(Damage("no end mark")) }
        };
        let (bytes, crc) = read(&mut input).map_err(|damage| self.corrupt(end, damage.0))?;
        let start = end.saturating_sub(bytes);
        let index = self.read_at(start, bytes)?;
        if checksum(&[&index]) != crc {
            return Err(self.corrupt(start, "the checksum of the index does not fit"));
        }
        let footer = unsqueeze(&index).and_then(|plain| Footer::read(&plain));
        let footer = Arc::new(footer.map_err(|damage| self.corrupt(start, damage.0))?);
        self.cache.put(key, Item::Footer(footer.clone()), footer.heap_bytes);
        Ok(footer)
    }

    /// A block, from memory or disk.
    pub(crate) fn block(
        &self,
        footer: &Footer,
        series: Series,
        entry: &BlockEntry,
    ) -> Result<Arc<Block>, HistoryError> {
        let key = Key::Block(self.shard, self.meta.number, entry.offset);
        if let Some(Item::Block(block)) = self.cache.get(key) {
            return Ok(block);
        }
        let block = Arc::new(self.block_once(footer, series, entry)?);
        self.cache.put(key, Item::Block(block.clone()), block.heap_bytes());
        Ok(block)
    }

    /// A block from disk, which is not needed again soon.
    pub(crate) fn block_once(
        &self,
        footer: &Footer,
        series: Series,
        entry: &BlockEntry,
    ) -> Result<Block, HistoryError> {
        let offset = entry.offset + u64::from(entry.stats_bytes);
        let bytes = self.read_at(offset, u64::from(entry.data_bytes))?;
        let block = section(&bytes)
            .and_then(|data| Block::read(data, series, &footer.shapes))
            .map_err(|damage| self.corrupt(offset, damage.0))?;
        if block.rows() == entry.rows as usize {
            Ok(block)
        } else {
            Err(self.corrupt(offset, "a block has another count of rows than the index says"))
        }
    }

    /// The statistics of a block, checked; `None` where it has none.
    pub(crate) fn stats(&self, entry: &BlockEntry) -> Result<Option<Vec<u8>>, HistoryError> {
        if entry.stats_bytes == 0 {
            return Ok(None);
        }
        let bytes = self.read_at(entry.offset, u64::from(entry.stats_bytes))?;
        let plain = section(&bytes).and_then(unsqueeze).map(std::borrow::Cow::into_owned);
        plain.map(Some).map_err(|damage| self.corrupt(entry.offset, damage.0))
    }

    /// A block as it is on disk, unchecked.
    pub(crate) fn raw(&self, entry: &BlockEntry) -> Result<Vec<u8>, HistoryError> {
        self.read_at(entry.offset, entry.bytes())
    }
}

/// Writes one segment. Series come in order, the rows of each in order of time.
pub(crate) struct SegmentWriter {
    path: PathBuf,
    file: Box<dyn DiskFile>,
    buffer: Vec<u8>,
    written: u64,
    names: Vec<ParamName>,
    name_ids: HashMap<ParamName, u32>,
    shapes: Vec<Box<[ColumnKey]>>,
    shape_ids: FoldMap<Box<[ColumnKey]>, u32>,
    series: Vec<(Series, Vec<BlockEntry>)>,
    effort: Effort,
    index_bytes_max: usize,
    meta: SegmentMeta,
}

impl SegmentWriter {
    pub(crate) fn create(
        disk: &dyn Disk,
        dir: &Path,
        number: u64,
        effort: Effort,
    ) -> io::Result<Self> {
        let path = dir.join(file_name(number));
        let file = disk.create(&path)?;
        Ok(Self {
            path,
            file,
            buffer: MAGIC.to_vec(),
            written: 0,
            names: Vec::new(),
            name_ids: HashMap::new(),
            shapes: Vec::new(),
            shape_ids: FoldMap::default(),
            series: Vec::new(),
            effort,
            index_bytes_max: INDEX_BYTES_MAX,
            meta: SegmentMeta {
                number,
                bytes: 0,
                messages: 0,
                from: i64::MAX,
                to: i64::MIN,
                first_seq: u64::MAX,
                last_seq: 0,
                accounts: Vec::new(),
            },
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The number of a shape in this segment.
    pub(crate) fn shape(&mut self, shape: &Shape) -> (u32, Box<[ColumnKey]>) {
        let mut keys: Vec<ColumnKey> = Vec::with_capacity(shape.0.len());
        for column in &shape.0 {
            let id = match self.name_ids.get(&column.name) {
                Some(id) => *id,
                None => {
                    let id = u32::try_from(self.names.len()).unwrap_or(u32::MAX);
                    self.name_ids.insert(column.name.clone(), id);
                    self.names.push(column.name.clone());
                    id
                }
            };
            keys.push((id, column.kind, column.scale));
        }
        let keys: Box<[ColumnKey]> = keys.into();
        if let Some(id) = self.shape_ids.get(&keys) {
            return (*id, keys);
        }
        let id = u32::try_from(self.shapes.len()).unwrap_or(u32::MAX);
        self.shape_ids.insert(keys.clone(), id);
        self.shapes.push(keys.clone());
        (id, keys)
    }

    /// Takes over the names and shapes of another, so that its blocks can be copied as they are.
    pub(crate) fn adopt(&mut self, footer: &Footer) {
        self.names.clone_from(&footer.names);
        self.shapes.clone_from(&footer.shapes.keys);
    }

    /// Writes a block; empty ones are passed over.
    pub(crate) fn block(&mut self, series: Series, block: &BlockBuilder) -> io::Result<()> {
        let (Some(from), Some(to)) = (block.timestamps.first(), block.timestamps.last()) else {
            return Ok(());
        };
        let seqs = || block.seqs.iter().map(|seq| seq.cast_unsigned());
        let mut raw = Vec::new();
        let stats = block.stats();
        if !stats.is_empty() {
            let mut squeezed = Vec::new();
            put_squeezed(&mut squeezed, &stats, self.effort.zstd_level());
            put_section(&mut raw, &squeezed);
        }
        let stats_bytes = raw.len();
        put_section(&mut raw, &block.data(self.effort));
        let small = |bytes: usize| u32::try_from(bytes).map_err(|_| io::ErrorKind::FileTooLarge);
        let entry = BlockEntry {
            offset: 0,
            stats_bytes: small(stats_bytes)?,
            data_bytes: small(raw.len() - stats_bytes)?,
            rows: small(block.rows())?,
            from: *from,
            to: *to,
            first_seq: seqs().min().unwrap_or(0),
            last_seq: seqs().max().unwrap_or(0),
        };
        self.copy(series, entry, &raw)
    }

    /// Writes a block as it is on disk.
    pub(crate) fn copy(&mut self, series: Series, entry: BlockEntry, raw: &[u8]) -> io::Result<()> {
        let offset = self.written + self.buffer.len() as u64;
        let entry = BlockEntry { offset, ..entry };
        self.buffer.extend_from_slice(raw);
        let meta = &mut self.meta;
        meta.messages += u64::from(entry.rows);
        meta.from = meta.from.min(entry.from);
        meta.to = meta.to.max(entry.to);
        meta.first_seq = meta.first_seq.min(entry.first_seq);
        meta.last_seq = meta.last_seq.max(entry.last_seq);
        match meta.accounts.last_mut() {
            Some(last) if last.account == series.account => {
                last.messages += u64::from(entry.rows);
                last.bytes += entry.bytes();
                last.from = last.from.min(entry.from);
                last.to = last.to.max(entry.to);
            }
            _ => meta.accounts.push(AccountMeta {
                account: series.account,
                messages: u64::from(entry.rows),
                bytes: entry.bytes(),
                from: entry.from,
                to: entry.to,
            }),
        }
        match self.series.last_mut() {
            Some((last, blocks)) if *last == series => blocks.push(entry),
            _ => self.series.push((series, vec![entry])),
        }
        if self.buffer.len() >= WRITE_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buffer, self.written)?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Writes the index and makes the file durable. The directory is the caller's.
    /// Fails with [`io::ErrorKind::FileTooLarge`] where the index could not be read back.
    pub(crate) fn finish(mut self) -> io::Result<SegmentMeta> {
        let shapes = Shapes { shapes: Vec::new(), keys: std::mem::take(&mut self.shapes) };
        let footer = Footer {
            names: std::mem::take(&mut self.names),
            shapes: Arc::new(shapes),
            series: std::mem::take(&mut self.series),
            index_bytes: 0,
            heap_bytes: 0,
        };
        let plain = footer.put();
        if plain.len() > self.index_bytes_max {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("an index of {} bytes is more than can be read back", plain.len()),
            ));
        }
        let mut index = Vec::new();
        put_squeezed(&mut index, &plain, 3);
        let bytes = u32::try_from(index.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        self.buffer.extend_from_slice(&index);
        self.buffer.extend_from_slice(&bytes.to_le_bytes());
        self.buffer.extend_from_slice(&checksum(&[&index]).to_le_bytes());
        self.buffer.extend_from_slice(END);
        self.flush()?;
        self.file.sync()?;
        self.meta.bytes = self.written;
        Ok(self.meta)
    }
}

/// Reads whatever bytes as a segment, all of it, believing no checksum: what fuzzing does.
pub(crate) fn read_any(bytes: &[u8]) -> Decoded<usize> {
    let end = bytes.len().checked_sub(TRAILER_BYTES).ok_or(Damage("ends early"))?;
    let (body, trailer) = bytes.split_at_checked(end).ok_or(Damage("ends early"))?;
    let length = Input(trailer).u32()? as usize;
    let start = body.len().saturating_sub(length);
    let footer = Footer::read(&unsqueeze(body.get(start..).unwrap_or(&[]))?)?;
    let mut rows = 0;
    for (series, blocks) in &footer.series {
        for entry in blocks {
            let at = usize::try_from(entry.offset).unwrap_or(usize::MAX);
            let Some(raw) = body.get(at..) else { continue };
            let Some((stats, data)) = raw.split_at_checked(entry.stats_bytes as usize) else {
                continue;
            };
            if let Some(stats) = stats.get(4..) {
                drop(unsqueeze(stats).and_then(|plain| crate::block::read_stats(&plain)));
            }
            let data = data.get(4..entry.data_bytes as usize).unwrap_or(&[]);
            let Ok(block) = Block::read(data, *series, &footer.shapes) else { continue };
            let mut scratch = Vec::new();
            for row in 0..block.rows() {
                rows += usize::from(block.stored(row, 0, &mut scratch).is_ok());
            }
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_index_too_large_to_be_read_back_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        for (limit, fits) in [(100, false), (10_000, true)] {
            let mut writer =
                SegmentWriter::create(&crate::disk::RealDisk, dir.path(), 1, Effort::Seal).unwrap();
            writer.index_bytes_max = limit;
            for n in 0..50 {
                let name = ParamName::new(format!("name{n}")).unwrap();
                writer.shape(&Shape([Column { name, kind: Kind::Int, scale: 0 }].into()));
            }
            match writer.finish() {
                Ok(_) => assert!(fits),
                Err(error) => assert!(!fits && error.kind() == io::ErrorKind::FileTooLarge),
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let mut framed = bytes.clone();
            framed.extend_from_slice(&u32::try_from(bytes.len()).unwrap().to_le_bytes());
            framed.extend_from_slice(&[0; 12]);
            let _read = (read_any(&bytes), read_any(&framed), Footer::read(&bytes).is_ok());
        }
    }
}
