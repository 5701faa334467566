//! How far the registry had come, in a small file beside it.
//!
//! To SQLite a write-ahead log that is cut short or damaged is no error: it takes what is sound from
//! its beginning, and what was behind has never been. Changes that were answered would be gone
//! without a word, and devices would register anew under other ids. So the sequence of the newest
//! change is noted here too, after each commit and before anyone is answered. A registry that is
//! behind its mark has lost changes, and is not opened.
//!
//! The log is synced at each commit, the mark only when the log is emptied: after a loss of power it
//! may be behind the registry, which is no finding, and never before it. It costs one small write a
//! commit. It does not see damage that leaves the newest change in place: for that there are the
//! log's checksums and SQLite's own check of the file.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// The file of the registry at `path`.
pub(crate) fn path_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-mark");
    PathBuf::from(name)
}

/// The open file.
pub(crate) struct Mark {
    file: File,
    /// Whether the last note could be written; said once when that changes.
    works: bool,
}

impl Mark {
    /// Opens or creates the mark of the registry at `path`, and reads what was noted last, if it can
    /// be read.
    pub(crate) fn open(path: &Path) -> io::Result<(Self, Option<u64>)> {
        let path = path_of(path);
        let mut options = OpenOptions::new();
        let mut file = options.create(true).truncate(false).read(true).write(true).open(&path)?;
        let mut text = Vec::new();
        (&mut file).take(256).read_to_end(&mut text)?;
        let noted = parse(&text);
        if noted.is_none() && !text.is_empty() {
            tracing::warn!(path = %path.display(), "the mark beside the registry cannot be read: whether changes were lost is not known this time");
        }
        Ok((Self { file, works: true }, noted))
    }

    /// What was noted last at the registry at `path`, if it can be read.
    pub(crate) fn noted(path: &Path) -> Option<u64> {
        let mut text = Vec::new();
        File::open(path_of(path)).ok()?.take(256).read_to_end(&mut text).ok()?;
        parse(&text)
    }

    /// Notes that `sequence` is committed.
    pub(crate) fn note(&mut self, sequence: u64) {
        // Twice: one that was written in part does not agree with itself.
        let text = format!("{sequence:020} {sequence:020}\n");
        let written = self.file.write_all_at(text.as_bytes(), 0);
        if let Err(error) = &written
            && self.works
        {
            tracing::warn!(%error, "the mark beside the registry cannot be written: a loss of changes may not be noticed");
        }
        self.works = written.is_ok();
    }

    /// Makes what was noted durable.
    pub(crate) fn sync(&self) {
        if let Err(error) = self.file.sync_data() {
            tracing::warn!(%error, "the mark beside the registry cannot be synced");
        }
    }
}

fn parse(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    let (first, second) = text.strip_suffix('\n')?.split_once(' ')?;
    let digits = |part: &str| part.len() == 20 && part.bytes().all(|b| b.is_ascii_digit());
    if !digits(first) || first != second {
        return None;
    }
    first.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_read_again_and_damage_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry.db");
        let (mut mark, noted) = Mark::open(&path).unwrap();
        assert_eq!(noted, None);
        for sequence in [7, 123_456, u64::MAX] {
            mark.note(sequence);
            mark.sync();
            assert_eq!(Mark::open(&path).unwrap().1, Some(sequence));
        }
        let whole = std::fs::read(path_of(&path)).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            assert_eq!(parse(&flipped), None, "byte {at}");
            assert_eq!(parse(&whole[..at]), None, "cut at {at}");
        }
    }
}
