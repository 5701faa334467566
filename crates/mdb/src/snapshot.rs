//! Snapshots: the newest time of every series, and the last values of message
//! series, as of everything sealed. A restart reads this instead of the segments.
//!
//! ```text
//! file    := magic[8] section* end
//! section := length:u32 crc:u32 squeezed(entry*)
//! entry   := account[16] kind object[16] newest count (name kind scale Δtime value)*
//! end     := 0:u32 crc:u32 of the magic
//! ```
//!
//! Entries are sorted by series, so that a new snapshot is the old one and a
//! memtable merged as they are read: memory does not grow with the fleet.

#![allow(clippy::cast_possible_truncation, reason = "series kinds are u8 by their repr")]

use std::io;
use std::path::Path;

use fieldline_model::{AccountId, ParamName, Series, SeriesKind};
use uuid::Uuid;

use crate::codec::{
    Damage, Decoded, INFLATED_BYTES_MAX, Input, checksum, put_bytes, put_signed, put_squeezed,
    put_varint, unsqueeze,
};
use crate::disk::{Disk, DiskFile};
use crate::memtable::LastValues;
use crate::value::{Kind, put_value, take_value};

const MAGIC: &[u8; 8] = b"FLDSNAP1";
/// A section is closed beyond this size; the last values of one series, which are bounded
/// to about as much, follow whole.
const SECTION_BYTES: usize = 256 << 10;

/// What a snapshot says of a series.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Latest {
    /// Its newest timestamp.
    pub(crate) newest: i64,
    /// Empty for what are no messages.
    pub(crate) values: LastValues,
}

impl Latest {
    /// Takes over what came later.
    pub(crate) fn merge(&mut self, later: Self) {
        self.newest = self.newest.max(later.newest);
        for (name, (value, timestamp)) in later.values.iter() {
            self.values.set(name.clone(), value.clone(), *timestamp);
        }
    }
}

pub(crate) fn file_name(number: u64) -> String {
    format!("last-{number:012}.snap")
}

/// Writes a snapshot; series come in order.
pub(crate) struct SnapshotWriter {
    file: Box<dyn DiskFile>,
    written: u64,
    plain: Vec<u8>,
}

impl SnapshotWriter {
    pub(crate) fn create(disk: &dyn Disk, path: &Path) -> io::Result<Self> {
        let file = disk.create(path)?;
        file.write_all_at(MAGIC, 0)?;
        Ok(Self { file, written: MAGIC.len() as u64, plain: Vec::new() })
    }

    pub(crate) fn put(&mut self, series: &Series, latest: &Latest) -> io::Result<()> {
        let out = &mut self.plain;
        out.extend_from_slice(series.account.as_bytes());
        out.push(series.kind as u8);
        out.extend_from_slice(series.object.as_bytes());
        put_signed(out, latest.newest);
        put_varint(out, latest.values.len() as u64);
        for (name, (value, timestamp)) in latest.values.iter() {
            put_bytes(out, name.as_str().as_bytes());
            let (kind, scale) = Kind::of(value);
            out.extend_from_slice(&[kind as u8, scale]);
            put_signed(out, timestamp.wrapping_sub(latest.newest));
            put_value(out, value);
        }
        if self.plain.len() >= SECTION_BYTES { self.section() } else { Ok(()) }
    }

    fn section(&mut self) -> io::Result<()> {
        let mut small = Vec::new();
        put_squeezed(&mut small, &self.plain, 1);
        self.plain.clear();
        let length = u32::try_from(small.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut head = length.to_le_bytes().to_vec();
        head.extend_from_slice(&checksum(&[&small]).to_le_bytes());
        self.file.write_all_at(&head, self.written)?;
        self.file.write_all_at(&small, self.written + 8)?;
        self.written += 8 + u64::from(length);
        Ok(())
    }

    /// Makes the file durable; the directory is the caller's. Returns its size.
    pub(crate) fn finish(mut self) -> io::Result<u64> {
        if !self.plain.is_empty() {
            self.section()?;
        }
        let mut end = [0; 8];
        let (_, crc) = end.split_at_mut(4);
        crc.copy_from_slice(&checksum(&[MAGIC]).to_le_bytes());
        self.file.write_all_at(&end, self.written)?;
        self.file.sync()?;
        Ok(self.written + 8)
    }
}

/// Reads a snapshot, a section at a time.
pub(crate) struct SnapshotReader {
    file: Box<dyn DiskFile>,
    at: u64,
    bytes: u64,
    section: std::vec::IntoIter<(Series, Latest)>,
    ended: bool,
}

/// Why a snapshot cannot be read: it is then made anew from the segments.
#[derive(Debug)]
pub(crate) struct Unreadable(pub(crate) String);

impl From<io::Error> for Unreadable {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<Damage> for Unreadable {
    fn from(damage: Damage) -> Self {
        Self(damage.0.to_owned())
    }
}

impl SnapshotReader {
    pub(crate) fn open(disk: &dyn Disk, path: &Path) -> Result<Self, Unreadable> {
        let file = disk.open(path)?;
        let bytes = file.len()?;
        let mut magic = [0; 8];
        file.read_exact_at(&mut magic, 0)?;
        if magic != *MAGIC {
            return Err(Unreadable("it is no snapshot".to_owned()));
        }
        Ok(Self { file, at: 8, bytes, section: Vec::new().into_iter(), ended: false })
    }

    /// Size of the file.
    pub(crate) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The next series.
    pub(crate) fn next(&mut self) -> Result<Option<(Series, Latest)>, Unreadable> {
        loop {
            if let Some(entry) = self.section.next() {
                return Ok(Some(entry));
            }
            if self.ended {
                return Ok(None);
            }
            let mut head = [0; 8];
            self.file.read_exact_at(&mut head, self.at)?;
            let mut input = Input(&head);
            let (length, crc) = (input.u32()?, input.u32()?);
            self.at += 8;
            if length == 0 {
                if crc != checksum(&[MAGIC]) {
                    return Err(Unreadable("its end mark is damaged".to_owned()));
                }
                self.ended = true;
                continue;
            }
            if u64::from(length) > self.bytes.min(INFLATED_BYTES_MAX as u64) {
                return Err(Unreadable("a section is larger than the file".to_owned()));
            }
            let mut small = vec![0; length as usize];
            self.file.read_exact_at(&mut small, self.at)?;
            self.at += u64::from(length);
            if checksum(&[&small]) != crc {
                return Err(Unreadable(format!("the checksum at byte {} does not fit", self.at)));
            }
            self.section = entries(&unsqueeze(&small)?)?.into_iter();
        }
    }
}

pub(crate) fn entries(plain: &[u8]) -> Decoded<Vec<(Series, Latest)>> {
    let mut input = Input(plain);
    let mut entries = Vec::new();
    while !input.is_empty() {
        let account = AccountId::from_bytes(input.array()?);
        let kind = SeriesKind::from_u8(input.u8()?).ok_or(Damage("unknown series kind"))?;
        let object = Uuid::from_bytes(input.array()?);
        let newest = input.signed()?;
        let mut values = LastValues::default();
        for _ in 0..input.count()? {
            let name = ParamName::new(input.text()?).map_err(|_| Damage("no name"))?;
            let kind = Kind::from_u8(input.u8()?)?;
            let scale = input.u8()?;
            let timestamp = newest.wrapping_add(input.signed()?);
            values.set(name, take_value(&mut input, kind, scale)?, timestamp);
        }
        let latest = Latest { newest, values };
        entries.push((Series { account, kind, object }, latest));
    }
    Ok(entries)
}

/// Writes the old snapshot, if there is one, with `later` merged in and without
/// what `keep` refuses. Returns the size of the new one.
pub(crate) fn merge(
    disk: &dyn Disk,
    old: Option<&Path>,
    later: Vec<(Series, Latest)>,
    keep: &dyn Fn(&Series, &Latest) -> bool,
    new: &Path,
) -> Result<u64, MergeError> {
    let mut writer = SnapshotWriter::create(disk, new).map_err(MergeError::Write)?;
    let mut reader = match old {
        Some(old) => Some(SnapshotReader::open(disk, old).map_err(MergeError::Read)?),
        None => None,
    };
    let mut take = || match &mut reader {
        Some(reader) => reader.next().map_err(MergeError::Read),
        None => Ok(None),
    };
    let mut later = later.into_iter().peekable();
    let mut before = take()?;
    loop {
        let (series, latest) = match (before.take(), later.peek()) {
            (None, None) => break,
            (Some((series, mut latest)), Some((next, _))) if series == *next => {
                if let Some((_, more)) = later.next() {
                    latest.merge(more);
                }
                before = take()?;
                (series, latest)
            }
            (Some(entry), Some((next, _))) if entry.0 < *next => {
                before = take()?;
                entry
            }
            (entry, Some(_)) => {
                before = entry;
                match later.next() {
                    Some(next) => next,
                    None => continue,
                }
            }
            (Some(entry), None) => {
                before = take()?;
                entry
            }
        };
        if keep(&series, &latest) {
            writer.put(&series, &latest).map_err(MergeError::Write)?;
        }
    }
    writer.finish().map_err(MergeError::Write)
}

/// Which side of a merge failed.
#[derive(Debug)]
pub(crate) enum MergeError {
    /// The old snapshot cannot be read.
    Read(Unreadable),
    /// The new one cannot be written.
    Write(io::Error),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let _read = entries(&bytes);
        }
    }
}
