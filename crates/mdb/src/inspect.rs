//! A look at a store without opening it: what `doctor` asks, also beside a running server.

use std::path::Path;
use std::sync::Arc;

use crate::cache::Cache;
use crate::disk::{Disk, RealDisk};
use crate::manifest::{self, Manifest};
use crate::open::{DAMAGED, number_in, read_all};
use crate::segment::Segment;

/// What of the store in `dir` is known to be damaged or missing, in words; empty if it is sound
/// or not there. Reads the index of every segment, none of its messages, and changes nothing.
#[must_use]
pub fn inspect(dir: &Path) -> Vec<String> {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let mut names = disk.list(dir).unwrap_or_default();
    names.sort_unstable();
    let mut found = Vec::new();
    for name in names.iter().filter(|name| name.starts_with("shard-")) {
        let Some(number) = number_in(name, "shard-", "") else { continue };
        let number = u16::try_from(number).unwrap_or(u16::MAX);
        match of_shard(&disk, &dir.join(name), number) {
            Ok(of_shard) => found.extend(of_shard),
            Err(reason) => found.push(format!("shard {number} cannot be looked at: {reason}")),
        }
    }
    found
}

fn of_shard(disk: &Arc<dyn Disk>, dir: &Path, number: u16) -> Result<Vec<String>, String> {
    let manifest = || -> Result<Manifest, String> {
        let file = disk.open(&dir.join(manifest::NAME)).map_err(|error| error.to_string())?;
        let bytes = read_all(&*file).map_err(|error| error.to_string())?;
        Manifest::from_bytes(&bytes)
    };
    let mut found = Vec::new();
    // Beside a running server files come and go: then it is looked again.
    for _ in 0..3 {
        let before = manifest().map_err(|reason| format!("its manifest: {reason}"))?;
        found = look(disk, dir, number, &before)?;
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
                if segment.verify().is_err() {
                    found.extend(segment.warning());
                }
            }
        }
    }
    Ok(found)
}
