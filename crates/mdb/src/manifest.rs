//! The manifest of a shard: which files count. It is replaced whole; whatever it
//! does not name is left over from a crash and is removed at the next start.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::codec::checksum;
use crate::disk::Disk;
use crate::open::{NotReplaced, replace};
use crate::segment::SegmentMeta;

pub(crate) const NAME: &str = "MANIFEST";
/// The format this program writes. The first one had segments whose index is one piece.
pub(crate) const FORMAT: u32 = 2;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) format: u32,
    pub(crate) shard: u16,
    /// The number of the next segment or snapshot; none is used again.
    pub(crate) next_number: u64,
    /// Log files of lower numbers are sealed.
    pub(crate) log_from: u64,
    /// The sequence of the next message is at least this: lower ones are in segments, or gone.
    pub(crate) next_seq: u64,
    /// The snapshot of last values, covering all segments.
    pub(crate) snapshot: Option<u64>,
    pub(crate) segments: Vec<SegmentMeta>,
}

impl Manifest {
    pub(crate) const fn new(shard: u16) -> Self {
        Self {
            format: FORMAT,
            shard,
            next_number: 1,
            log_from: 1,
            next_seq: 1,
            snapshot: None,
            segments: Vec::new(),
        }
    }

    /// Puts it in the place of the one on disk, durably.
    pub(crate) fn write(&self, disk: &dyn Disk, dir: &Path) -> Result<(), NotReplaced> {
        let bytes = self.to_bytes().map_err(|error| NotReplaced { error, unknown: false })?;
        replace(disk, dir, NAME, &bytes)
    }

    /// A line with the checksum of what follows, then JSON: readable when something is wrong.
    pub(crate) fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let json = serde_json::to_vec(self)?;
        let mut bytes = format!("fieldline-mdb manifest {:08x}\n", checksum(&[&json])).into_bytes();
        bytes.extend_from_slice(&json);
        Ok(bytes)
    }

    /// Reads what [`Manifest::to_bytes`] made; the error says what is wrong.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let line = bytes.iter().position(|b| *b == b'\n').ok_or("it has no first line")?;
        let (line, json) = bytes.split_at_checked(line + 1).ok_or("it has no content")?;
        let crc = std::str::from_utf8(line)
            .ok()
            .and_then(|line| line.trim_end().rsplit_once(' '))
            .and_then(|(_, crc)| u32::from_str_radix(crc, 16).ok())
            .ok_or("its first line has no checksum")?;
        if checksum(&[json]) != crc {
            return Err("its checksum does not fit".to_owned());
        }
        serde_json::from_slice(json).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_bit_is_noticed() {
        let bytes = Manifest::new(3).to_bytes().unwrap();
        assert_eq!(Manifest::from_bytes(&bytes), Ok(Manifest::new(3)));
        for at in 23..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            assert!(Manifest::from_bytes(&flipped).is_err(), "byte {at}");
        }
    }
}
