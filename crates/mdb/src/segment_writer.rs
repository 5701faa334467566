//! Writing a segment: blocks as they come, then the pages of its index, then their directory.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use fieldline_contracts::HistoryError;
use fieldline_model::{ParamName, Series};

use crate::block::BlockBuilder;
use crate::codec::{checksum, put_section, put_squeezed};
use crate::columns::Effort;
use crate::dict::ColumnKey;
use crate::disk::{Disk, DiskFile};
use crate::hash::FoldMap;
use crate::index::{self, BlockEntry, PAGE_BYTES_MAX, Place};
use crate::segment::{AccountMeta, END, MAGIC, Segment, SegmentMeta, file_name};
use crate::value::Shape;

/// Bytes gathered before they are written.
const WRITE_BYTES: usize = 1 << 20;

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
    page_bytes_max: usize,
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
            page_bytes_max: PAGE_BYTES_MAX,
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
    pub(crate) fn adopt(&mut self, segment: &Segment) -> Result<(), HistoryError> {
        for page in segment.shape_pages()? {
            let page = page?;
            for (number, name) in &page.names {
                // Names have numbers by where they first occur; pages repeat those before.
                if *number as usize == self.names.len() {
                    self.names.push(name.clone());
                }
            }
            self.shapes.extend(page.shapes.iter().map(|entry| entry.keys.clone()));
        }
        Ok(())
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

    /// Writes the index and makes the file durable. The directory of the file is the caller's.
    /// Fails with [`io::ErrorKind::FileTooLarge`] where a page could not be read back.
    pub(crate) fn finish(mut self) -> io::Result<SegmentMeta> {
        let (names, shapes) = (std::mem::take(&mut self.names), std::mem::take(&mut self.shapes));
        let series = std::mem::take(&mut self.series);
        let plain = index::write(&names, &shapes, &series, |plain| self.put_page(plain))?;
        let mut directory = Vec::new();
        put_squeezed(&mut directory, &plain, 3);
        let bytes = u32::try_from(directory.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        self.buffer.extend_from_slice(&directory);
        self.buffer.extend_from_slice(&bytes.to_le_bytes());
        self.buffer.extend_from_slice(&checksum(&[&directory]).to_le_bytes());
        self.buffer.extend_from_slice(END);
        self.flush()?;
        self.file.sync()?;
        self.meta.bytes = self.written;
        Ok(self.meta)
    }

    fn put_page(&mut self, plain: &[u8]) -> io::Result<Place> {
        if plain.len() > self.page_bytes_max {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("a page of {} bytes is more than can be read back", plain.len()),
            ));
        }
        let mut squeezed = Vec::new();
        put_squeezed(&mut squeezed, plain, 3);
        let offset = self.written + self.buffer.len() as u64;
        put_section(&mut self.buffer, &squeezed);
        if self.buffer.len() >= WRITE_BYTES {
            self.flush()?;
        }
        let bytes = u32::try_from(squeezed.len() + 4).map_err(|_| io::ErrorKind::FileTooLarge)?;
        Ok(Place { offset, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::value::{Column, Kind};

    #[test]
    fn a_page_too_large_to_be_read_back_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        for (limit, fits) in [(100, false), (10_000, true)] {
            let mut writer =
                SegmentWriter::create(&crate::disk::RealDisk, dir.path(), 1, Effort::Seal).unwrap();
            writer.page_bytes_max = limit;
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
}
