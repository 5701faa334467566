//! Segments: immutable files of blocks, sorted by series and time, with an index at the end.
//!
//! ```text
//! file    := magic[8] block* page* directory trailer
//! block   := [crc:u32 stats] crc:u32 data             each crc over what follows it
//! trailer := directory_bytes:u32 crc:u32 magic[8]     the directory is squeezed; see `index`
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use fieldline_contracts::HistoryError;
use fieldline_model::{AccountId, Series, Timestamp};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tracing::error;

use crate::block::{self, Block};
use crate::cache::{Cache, Item, Key};
use crate::codec::{Damage, Decoded, Input, checksum, section, unsqueeze};
use crate::dict::ShapeEntry;
use crate::disk::{Disk, DiskFile};
use crate::index::{BlockEntry, Directory, Place, SeriesPage, ShapePage, read_whole};

pub(crate) const MAGIC: &[u8; 8] = b"FLDSEG01";
pub(crate) const END: &[u8; 8] = b"FLDSEGE2";
/// Ends segments of the first format, whose index is one piece.
const END_WHOLE: &[u8; 8] = b"FLDSEGE1";
const TRAILER_BYTES: usize = 16;
/// Largest section that is read: what a block of the largest messages may come to.
const SECTION_BYTES_MAX: u64 = 64 << 20;
/// Damaged places of a segment that are told apart.
const DAMAGE_MAX: usize = 1_000;

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

/// A sealed segment. Its file goes when the last reader of an obsolete one is done.
pub(crate) struct Segment {
    pub(crate) meta: SegmentMeta,
    pub(crate) path: PathBuf,
    shard: u16,
    file: Box<dyn DiskFile>,
    disk: Arc<dyn Disk>,
    cache: Arc<Cache>,
    /// Read when it is first needed, then kept.
    directory: OnceLock<Directory>,
    obsolete: AtomicBool,
    /// What of it could not be read, by where it begins.
    damage: Mutex<BTreeMap<u64, String>>,
    /// Whether there is any: it is not merged, so that the damage does not spread.
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
            directory: OnceLock::new(),
            obsolete: AtomicBool::new(false),
            damage: Mutex::default(),
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
        segment.verify().map_err(io::Error::other)?;
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

    /// An error of reading it, in words that name no path.
    pub(crate) fn error(&self, offset: u64, reason: &str) -> HistoryError {
        let (file, shard) = (file_name(self.meta.number), self.shard);
        HistoryError::Corrupt(format!(
            "`{file}` of shard {shard} is damaged at byte {offset} ({reason})"
        ))
    }

    /// Notes what cannot be read; told in the log once.
    fn corrupt(&self, offset: u64, reason: &str) -> HistoryError {
        let mut damage = self.damage.lock();
        self.damaged.store(true, Ordering::Release);
        if damage.len() < DAMAGE_MAX && damage.insert(offset, reason.to_owned()).is_none() {
            metrics::counter!("fieldline_mdb_corrupt_total").increment(1);
            error!(path = %self.path.display(), offset, reason, from = %Timestamp::from_micros(self.meta.from),
                to = %Timestamp::from_micros(self.meta.to),
                "a part of a segment cannot be read; what is beside it can; restore the file from a backup");
        }
        self.error(offset, reason)
    }

    /// Notes that what begins at `offset` can be read: a failure of the disk may pass.
    fn sound(&self, offset: u64) {
        if self.damaged.load(Ordering::Acquire) {
            let mut damage = self.damage.lock();
            damage.remove(&offset);
            self.damaged.store(!damage.is_empty(), Ordering::Release);
        }
    }

    fn checked<T>(&self, offset: u64, read: Decoded<T>) -> Result<T, HistoryError> {
        match read {
            Ok(content) => {
                self.sound(offset);
                Ok(content)
            }
            Err(damage) => Err(self.corrupt(offset, damage.0)),
        }
    }

    /// What is damaged, in words for who runs it; `None` if nothing is.
    pub(crate) fn warning(&self) -> Option<String> {
        let damage = self.damage.lock();
        let (at, reason) = damage.first_key_value()?;
        let (places, file, shard) = (damage.len(), file_name(self.meta.number), self.shard);
        let time = Timestamp::from_micros;
        Some(format!(
            "`{file}` in shard {shard} of the message store is damaged (places: {places}, the first at byte {at}: {reason}): \
             messages from {} to {} may be missing; restore the file from a backup and start again",
            time(self.meta.from),
            time(self.meta.to),
        ))
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

    /// Where the pages of its index are.
    pub(crate) fn directory(&self) -> Result<&Directory, HistoryError> {
        if let Some(directory) = self.directory.get() {
            return Ok(directory);
        }
        let directory = self.read_directory()?;
        Ok(self.directory.get_or_init(|| directory))
    }

    fn read_directory(&self) -> Result<Directory, HistoryError> {
        let end = self.meta.bytes.saturating_sub(TRAILER_BYTES as u64);
        let bytes = self.read_at(end, TRAILER_BYTES as u64)?;
        let trailer = self.checked(end, Trailer::read(&bytes))?;
        let offset = end.saturating_sub(u64::from(trailer.bytes));
        if trailer.whole {
            let place = Place { offset, bytes: trailer.bytes };
            return Ok(Directory::of_whole(place, trailer.crc));
        }
        let bytes = self.read_at(offset, u64::from(trailer.bytes))?;
        let content = if checksum(&[&bytes]) == trailer.crc {
            Ok(&bytes[..])
        } else {
            Err(Damage("the checksum of the index does not fit"))
        };
        let directory = content.and_then(unsqueeze).and_then(|plain| Directory::read(&plain));
        self.checked(offset, directory)
    }

    /// Reads a page of the index.
    fn page<T>(
        &self,
        place: Place,
        whole: Option<u32>,
        read: impl FnOnce(&[u8]) -> Decoded<T>,
    ) -> Result<T, HistoryError> {
        let bytes = self.read_at(place.offset, u64::from(place.bytes))?;
        let content = match whole {
            None => section(&bytes),
            Some(crc) if checksum(&[&bytes]) == crc => Ok(&bytes[..]),
            Some(_) => Err(Damage("the checksum of the index does not fit")),
        };
        let page = content.and_then(unsqueeze).and_then(|plain| read(&plain));
        self.checked(place.offset, page)
    }

    fn series_page_once(
        &self,
        place: Place,
        whole: Option<u32>,
    ) -> Result<SeriesPage, HistoryError> {
        self.page(place, whole, |plain| match whole {
            None => SeriesPage::read(plain),
            Some(_) => read_whole(plain).map(|(series, _)| series),
        })
    }

    /// The blocks of a series with times from `from` to `to`, both included, in order of time.
    pub(crate) fn blocks(
        &self,
        series: &Series,
        from: i64,
        to: i64,
    ) -> Result<Vec<BlockEntry>, HistoryError> {
        let directory = self.directory()?;
        let Some(at) = directory.page_of(series) else { return Ok(Vec::new()) };
        let Some((_, place)) = directory.series.get(at) else { return Ok(Vec::new()) };
        let key = Key::SeriesPage(self.shard, self.meta.number, at);
        let page = match self.cache.get(key) {
            Some(Item::SeriesPage(page)) => page,
            _ => {
                let page = Arc::new(self.series_page_once(*place, directory.whole)?);
                self.cache.put(key, Item::SeriesPage(page.clone()), page.heap_bytes());
                page
            }
        };
        let blocks = page.blocks(series).iter();
        Ok(blocks.filter(|entry| entry.from <= to && entry.to >= from).copied().collect())
    }

    /// All series with their blocks, a page at a time; each may be unreadable by itself.
    pub(crate) fn series_pages(
        &self,
    ) -> Result<impl Iterator<Item = Result<SeriesPage, HistoryError>>, HistoryError> {
        let directory = self.directory()?;
        let pages = directory.series.iter();
        Ok(pages.map(|(_, place)| self.series_page_once(*place, directory.whole)))
    }

    /// The page of shapes number `at`, from memory or disk.
    fn shape_page(&self, directory: &Directory, at: usize) -> Result<Arc<ShapePage>, HistoryError> {
        let key = Key::ShapePage(self.shard, self.meta.number, at);
        if let Some(Item::ShapePage(page)) = self.cache.get(key) {
            return Ok(page);
        }
        let place = directory.shapes.get(at).map(|(_, place)| *place);
        let place = place.unwrap_or(Place { offset: 0, bytes: 0 });
        let page = self.page(place, directory.whole, |plain| match directory.whole {
            None => ShapePage::read(plain),
            Some(_) => read_whole(plain).map(|(_, shapes)| shapes),
        });
        let page = Arc::new(page?);
        self.cache.put(key, Item::ShapePage(page.clone()), page.heap_bytes);
        Ok(page)
    }

    /// All shapes with their names, a page at a time.
    pub(crate) fn shape_pages(
        &self,
    ) -> Result<impl Iterator<Item = Result<Arc<ShapePage>, HistoryError>>, HistoryError> {
        let directory = self.directory()?;
        Ok((0..directory.shapes.len()).map(|at| self.shape_page(directory, at)))
    }

    fn shape(&self, number: u32) -> Result<Arc<ShapeEntry>, HistoryError> {
        let directory = self.directory()?;
        let unknown = || self.corrupt(0, "a block names an unknown shape");
        let (at, first) = directory.page_of_shape(number).ok_or_else(unknown)?;
        let page = self.shape_page(directory, at)?;
        page.shapes.get((number - first) as usize).cloned().ok_or_else(unknown)
    }

    /// The number that a name has in statistics.
    pub(crate) fn name_number(&self, name: &str) -> Result<Option<u32>, HistoryError> {
        for page in self.shape_pages()? {
            let page = page?;
            let found = page.names.iter().find(|(_, other)| other.as_str() == name);
            if let Some((number, _)) = found {
                return Ok(Some(*number));
            }
        }
        Ok(None)
    }

    /// Reads all of its index.
    pub(crate) fn verify(&self) -> Result<(), HistoryError> {
        let mut result = Ok(());
        // To the end, so that all that is damaged is known.
        for page in self.series_pages()? {
            result = result.and(page.map(drop));
        }
        for page in self.shape_pages()? {
            result = result.and(page.map(drop));
        }
        result
    }

    /// A block, from memory or disk.
    pub(crate) fn block(
        &self,
        series: Series,
        entry: &BlockEntry,
    ) -> Result<Arc<Block>, HistoryError> {
        let key = Key::Block(self.shard, self.meta.number, entry.offset);
        if let Some(Item::Block(block)) = self.cache.get(key) {
            return Ok(block);
        }
        let block = Arc::new(self.block_once(series, entry)?);
        self.cache.put(key, Item::Block(block.clone()), block.heap_bytes());
        Ok(block)
    }

    /// A block from disk, which is not needed again soon.
    pub(crate) fn block_once(
        &self,
        series: Series,
        entry: &BlockEntry,
    ) -> Result<Block, HistoryError> {
        let offset = entry.offset + u64::from(entry.stats_bytes);
        let bytes = self.read_at(offset, u64::from(entry.data_bytes))?;
        let mut of_shapes = None;
        let mut shape = |number| {
            self.shape(number).map_err(|error| {
                of_shapes = Some(error);
                Damage("its shapes cannot be read")
            })
        };
        let block = section(&bytes).and_then(|data| Block::read(data, series, &mut shape));
        if let Some(error) = of_shapes {
            return Err(error);
        }
        let rows = entry.rows as usize;
        let fits = |block: Block| {
            let same = block.rows() == rows;
            if same { Ok(block) } else { Err(Damage("it has another count of rows than is said")) }
        };
        self.checked(offset, block.and_then(fits))
    }

    /// Whether a block has a message of this time. Costs less than the whole block.
    pub(crate) fn has_time(
        &self,
        entry: &BlockEntry,
        timestamp: i64,
    ) -> Result<bool, HistoryError> {
        let number = self.meta.number;
        if let Some(Item::Block(block)) =
            self.cache.get(Key::Block(self.shard, number, entry.offset))
        {
            return Ok(block.timestamps.binary_search(&timestamp).is_ok());
        }
        let key = Key::Times(self.shard, number, entry.offset);
        if let Some(Item::Times(times)) = self.cache.get(key) {
            return Ok(times.binary_search(&timestamp).is_ok());
        }
        let offset = entry.offset + u64::from(entry.stats_bytes);
        let bytes = self.read_at(offset, u64::from(entry.data_bytes))?;
        let times = section(&bytes).and_then(block::timestamps);
        let times: Arc<[i64]> = self.checked(offset, times)?.into();
        let has = times.binary_search(&timestamp).is_ok();
        let bytes = size_of_val(&*times) + 64;
        self.cache.put(key, Item::Times(times), bytes);
        Ok(has)
    }

    /// The statistics of a block, checked; `None` where it has none.
    pub(crate) fn stats(&self, entry: &BlockEntry) -> Result<Option<Vec<u8>>, HistoryError> {
        if entry.stats_bytes == 0 {
            return Ok(None);
        }
        let bytes = self.read_at(entry.offset, u64::from(entry.stats_bytes))?;
        let plain = section(&bytes).and_then(unsqueeze).map(std::borrow::Cow::into_owned);
        self.checked(entry.offset, plain).map(Some)
    }

    /// A block as it is on disk, unchecked.
    pub(crate) fn raw(&self, entry: &BlockEntry) -> Result<Vec<u8>, HistoryError> {
        self.read_at(entry.offset, entry.bytes())
    }
}

/// What ends a segment.
struct Trailer {
    bytes: u32,
    crc: u32,
    /// Whether it is of the first format.
    whole: bool,
}

impl Trailer {
    fn read(bytes: &[u8]) -> Decoded<Self> {
        let mut input = Input(bytes);
        let (bytes, crc) = (input.u32()?, input.u32()?);
        if input.0 != END && input.0 != END_WHOLE {
            return Err(Damage("no end mark"));
        }
        Ok(Self { bytes, crc, whole: input.0 == END_WHOLE })
    }
}

/// Reads whatever bytes as a segment, all of it, believing no checksum: what fuzzing does.
pub(crate) fn read_any(bytes: &[u8]) -> Decoded<usize> {
    let end = bytes.len().checked_sub(TRAILER_BYTES).ok_or(Damage("ends early"))?;
    let (body, trailer) = bytes.split_at_checked(end).ok_or(Damage("ends early"))?;
    let length = Input(trailer).u32()? as usize;
    let start = body.len().saturating_sub(length);
    let index = unsqueeze(body.get(start..).unwrap_or(&[]))?;
    let (mut pages, mut shapes) = (Vec::new(), Vec::new());
    if trailer.ends_with(END_WHOLE) {
        let (series, of) = read_whole(&index)?;
        pages.push(series);
        shapes = of.shapes;
    } else {
        let directory = Directory::read(&index)?;
        let plain = |place: &Place| {
            let at = usize::try_from(place.offset).unwrap_or(usize::MAX);
            let content = body.get(at..).and_then(|raw| raw.get(4..place.bytes as usize));
            unsqueeze(content.unwrap_or(&[]))
        };
        for (_, place) in &directory.shapes {
            let page = plain(place).and_then(|plain| ShapePage::read(&plain));
            shapes.extend(page.into_iter().flat_map(|page| page.shapes));
        }
        for (_, place) in &directory.series {
            pages.extend(plain(place).and_then(|plain| SeriesPage::read(&plain)));
        }
    }
    let entries = pages.iter().flat_map(SeriesPage::iter);
    let entries = entries.flat_map(|(series, blocks)| blocks.iter().map(move |b| (series, b)));
    let mut rows = 0;
    for (series, entry) in entries {
        let at = usize::try_from(entry.offset).unwrap_or(usize::MAX);
        let Some(raw) = body.get(at..) else { continue };
        let Some((stats, data)) = raw.split_at_checked(entry.stats_bytes as usize) else {
            continue;
        };
        if let Some(stats) = stats.get(4..) {
            drop(unsqueeze(stats).and_then(|plain| block::read_stats(&plain)));
        }
        let data = data.get(4..entry.data_bytes as usize).unwrap_or(&[]);
        let mut shape = |number: u32| {
            shapes.get(number as usize).cloned().ok_or(Damage("a block names an unknown shape"))
        };
        let Ok(block) = Block::read(data, *series, &mut shape) else { continue };
        let mut scratch = Vec::new();
        for row in 0..block.rows() {
            rows += usize::from(block.stored(row, 0, &mut scratch).is_ok());
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let mut framed = bytes.clone();
            framed.extend_from_slice(&u32::try_from(bytes.len()).unwrap().to_le_bytes());
            framed.extend_from_slice(&[0; 12]);
            let _read = (read_any(&bytes), read_any(&framed));
        }
    }
}
