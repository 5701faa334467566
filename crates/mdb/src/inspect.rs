//! A look at a store without opening it: what `doctor` asks, also beside a running server.

use std::path::Path;
use std::sync::Arc;

use crate::cache::Cache;
use crate::disk::{Disk, RealDisk};
use crate::manifest::{self, Manifest};
use crate::open::{DAMAGED, number_in, read_all};
use crate::segment::Segment;
use crate::wal;

/// How much of a store is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// The index of every segment, none of its messages.
    Indexes,
    /// Every block, and every log: as long as reading all that is stored takes.
    Blocks,
}

/// What of the store in `dir` is known to be damaged or missing, in words; empty if it is sound
/// or not there. Changes nothing.
#[must_use]
pub fn inspect(dir: &Path, depth: Depth) -> Vec<String> {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let mut names = disk.list(dir).unwrap_or_default();
    names.sort_unstable();
    let mut found = Vec::new();
    for name in names.iter().filter(|name| name.starts_with("shard-")) {
        let Some(number) = number_in(name, "shard-", "") else { continue };
        let number = u16::try_from(number).unwrap_or(u16::MAX);
        match of_shard(&disk, &dir.join(name), number, depth) {
            Ok(of_shard) => found.extend(of_shard),
            Err(reason) => found.push(format!("shard {number} cannot be looked at: {reason}")),
        }
    }
    found
}

fn of_shard(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    number: u16,
    depth: Depth,
) -> Result<Vec<String>, String> {
    let manifest = || -> Result<Manifest, String> {
        let file = disk.open(&dir.join(manifest::NAME)).map_err(|error| error.to_string())?;
        let bytes = read_all(&*file).map_err(|error| error.to_string())?;
        Manifest::from_bytes(&bytes)
    };
    let mut found = Vec::new();
    // Beside a running server files come and go: then it is looked again.
    for _ in 0..3 {
        let before = manifest().map_err(|reason| format!("its manifest: {reason}"))?;
        found = look(disk, dir, number, &before, depth)?;
        if found.is_empty() || manifest().is_ok_and(|after| after == before) {
            break;
        }
    }
    Ok(found)
}

fn look(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    number: u16,
    manifest: &Manifest,
    depth: Depth,
) -> Result<Vec<String>, String> {
    let mut found = Vec::new();
    let names = disk.list(dir).map_err(|error| error.to_string())?;
    let damaged = names.iter().filter(|name| name.ends_with(DAMAGED)).count();
    if damaged > 0 {
        found.push(format!(
            "shard {number} had {damaged} damaged or lost log files: messages may be missing; \
             what is left of them lies in `{}` as *{DAMAGED} until it is removed",
            dir.display()
        ));
    }
    let logs = names.iter().filter_map(|name| number_in(name, "wal-", ".log"));
    let mut logs: Vec<u64> = logs.filter(|log| *log >= manifest.log_from).collect();
    logs.sort_unstable();
    let mut expected = manifest.log_from;
    if depth == Depth::Blocks {
        found.extend(of_logs(disk, dir, number, &logs));
    }
    for log in logs {
        let marked = names
            .iter()
            .any(|name| number_in(name, "wal-", &format!(".log{DAMAGED}")) == Some(expected));
        if log > expected && !marked {
            found.push(format!("log files from {expected} to {} of shard {number} are missing: the messages in them are lost", log - 1));
        }
        expected = log.saturating_add(1);
    }
    let cache = Arc::new(Cache::new(0));
    for meta in &manifest.segments {
        let file = crate::segment::file_name(meta.number);
        match Segment::open(disk, &cache, dir, number, meta.clone()) {
            Err(error) => found.push(format!(
                "`{file}` of shard {number} cannot be opened: {error}; restore it from a backup"
            )),
            Ok(segment) => {
                let mut sound = segment.verify().is_ok();
                if depth == Depth::Blocks {
                    sound &= read_blocks(&segment);
                }
                if !sound {
                    found.extend(segment.warning());
                }
            }
        }
    }
    Ok(found)
}

/// Reads every block of a segment and its statistics; whether all are sound. What is not, the segment notes.
fn read_blocks(segment: &Segment) -> bool {
    let Ok(pages) = segment.series_pages() else { return false };
    let mut sound = true;
    for page in pages {
        let Ok(page) = page else {
            sound = false;
            continue;
        };
        for (series, blocks) in page.iter() {
            for entry in blocks {
                // To the end, so that all that is damaged is known.
                sound &= segment.stats(entry).is_ok();
                sound &= segment.block_once(*series, entry).is_ok();
            }
        }
    }
    sound
}

/// Reads the logs that are not sealed yet. What is torn at the end of the last one was never acknowledged.
fn of_logs(disk: &Arc<dyn Disk>, dir: &Path, shard: u16, logs: &[u64]) -> Vec<String> {
    let mut found = Vec::new();
    let mut before: Option<(u64, u64)> = None;
    for log in logs {
        let name = wal::file_name(*log);
        let bytes = match disk.open(&dir.join(&name)).and_then(|file| read_all(&*file)) {
            Ok(bytes) => bytes,
            // Sealed meanwhile.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => {
                found.push(format!("`{name}` of shard {shard} cannot be read: {error}"));
                continue;
            }
        };
        let extent = wal::replay(&bytes, *log, shard, |_| {});
        if extent.more || (!extent.header && bytes.len() >= wal::HEADER_BYTES) {
            found.push(format!(
                "`{name}` of shard {shard} is damaged at byte {}: messages behind it are lost at the next start",
                extent.sound
            ));
        }
        if let (Some(said), Some((number, sound))) = (extent.before, before)
            && said.number == number
            && sound < said.bytes
        {
            found.push(format!(
                "`{}` of shard {shard} ends at byte {sound} of {}: the messages at its end are lost",
                wal::file_name(number),
                said.bytes
            ));
        }
        before = Some((*log, extent.sound as u64));
    }
    found
}
