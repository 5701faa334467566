//! Retention: what is too old or too much goes, by whole blocks.
//!
//! A block holds one series and one day at most, so age costs little beyond the
//! limit. A segment of which nothing is left is removed; one of which a fair part
//! may go is written anew, its other blocks copied as they are.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use fieldline_contracts::HistoryError;
use fieldline_model::{AccountId, Series};
use tracing::warn;

use crate::index::BlockEntry;
use crate::merge::{remove, rewrite};
use crate::segment::{AccountMeta, Segment};
use crate::shard::Shard;
use crate::snapshot;

/// A segment of which less than one part in so many of an account may go by age is left as it is.
const PART: u64 = 4;

/// Whether a memtable of the shard holds messages of `account` from before `before`.
pub(crate) fn holds_old(shard: &Shard, account: AccountId, before: i64) -> bool {
    let view = shard.view.read();
    view.tables().any(|table| {
        table.series.iter().any(|series| {
            let oldest = series.order.first().is_some_and(|(at, _)| *at < before);
            series.series.account == account && oldest
        })
    })
}

/// Time of the newest message and bytes of every sealed block of an account.
fn blocks(shard: &Shard, account: AccountId, into: &mut Vec<(i64, u64)>) {
    for segment in &shard.version().segments {
        if !segment.meta.accounts.iter().any(|a| a.account == account) {
            continue;
        }
        // One that cannot be read cannot be judged, and stays.
        let Ok(pages) = segment.series_pages() else { continue };
        for page in pages.flatten() {
            let own = page.iter().filter(|(series, _)| series.account == account);
            let entries = own.flat_map(|(_, entries)| entries);
            into.extend(entries.map(|entry| (entry.to, entry.bytes())));
        }
    }
}

/// The instant before which sealed messages of an account must go, for no more than
/// `bytes_max` to be left.
pub(crate) fn cut_by_bytes(
    shards: &[Arc<Shard>],
    account: AccountId,
    bytes_max: u64,
) -> Option<i64> {
    let mut all = Vec::new();
    for shard in shards {
        blocks(shard, account, &mut all);
    }
    let mut excess = all.iter().map(|(_, bytes)| bytes).sum::<u64>().checked_sub(bytes_max)?;
    if excess == 0 {
        return None;
    }
    all.sort_unstable();
    for (to, bytes) in all {
        if bytes >= excess {
            return Some(to.saturating_add(1));
        }
        excess -= bytes;
    }
    Some(i64::MAX)
}

/// Takes what an account has from before `before`; `exact` where as much as
/// possible must go. Returns the bytes set free.
pub(crate) fn drop_before(
    shard: &Shard,
    account: AccountId,
    before: i64,
    exact: bool,
) -> Result<u64, HistoryError> {
    let _replacing = shard.replacing.lock();
    let mut freed = 0;
    let goes = |series: &Series, entry: &BlockEntry| series.account == account && entry.to < before;
    for segment in &shard.version().segments {
        let Some(part) = segment.meta.accounts.iter().find(|a| a.account == account) else {
            continue;
        };
        if part.from >= before {
            continue;
        }
        if shard.stops() {
            return Err(HistoryError::Closed);
        }
        let dropped = drop_from(shard, segment, part, &goes, exact);
        match dropped {
            Ok(bytes) => freed += bytes,
            // What else may go must not wait for it.
            Err(cause) if segment.damaged.load(Ordering::Relaxed) => {
                if part.to < before && segment.is_past(account) {
                    freed += remove(shard, segment)?;
                } else {
                    warn!(shard = shard.number, %cause, "retention leaves a damaged segment");
                }
            }
            Err(error) => return Err(error),
        }
    }
    if freed > 0 {
        freed += forget(shard, account, before)?;
    }
    Ok(freed)
}

/// Takes what `goes` says out of one segment, where it is worth it or all must go.
fn drop_from(
    shard: &Shard,
    segment: &Arc<Segment>,
    part: &AccountMeta,
    goes: &dyn Fn(&Series, &BlockEntry) -> bool,
    exact: bool,
) -> Result<u64, HistoryError> {
    let bytes = droppable(segment, part.account, goes)?;
    if bytes == 0 || (!exact && bytes * PART < part.bytes.max(1)) {
        return Ok(0);
    }
    rewrite(shard, segment, &|series, entry| !goes(series, entry))
}

fn droppable(
    segment: &Segment,
    account: AccountId,
    goes: &dyn Fn(&Series, &BlockEntry) -> bool,
) -> Result<u64, HistoryError> {
    let mut bytes = 0;
    for page in segment.series_pages()? {
        let page = page?;
        let own = page.iter().filter(|(series, _)| series.account == account);
        let entries = own.flat_map(|(series, entries)| entries.iter().map(move |e| (series, e)));
        bytes += entries.filter(|(series, e)| goes(series, e)).map(|(_, e)| e.bytes()).sum::<u64>();
    }
    Ok(bytes)
}

/// Takes series of which nothing is left out of the snapshot.
fn forget(shard: &Shard, account: AccountId, before: i64) -> Result<u64, HistoryError> {
    let failed = |error: std::io::Error| {
        HistoryError::Failed(format!("write last values in `{}`: {error}", shard.dir.display()))
    };
    let _snapshotting = shard.snapshotting.lock();
    let old: Option<PathBuf> = {
        let manifest = shard.manifest.lock();
        manifest.snapshot.map(|number| shard.dir.join(snapshot::file_name(number)))
    };
    let Some(old) = old else { return Ok(0) };
    let before_bytes = shard.snapshot_bytes.load(Ordering::Relaxed);
    if shard.stops() {
        return Ok(0);
    }
    // A series of which anything is left must stay known, or its duplicates would not be.
    let mut left = BTreeSet::new();
    for segment in &shard.version().segments {
        let Ok(pages) = segment.series_pages() else { return Ok(0) };
        for page in pages {
            let Ok(page) = page else { return Ok(0) };
            left.extend(page.iter().map(|(series, _)| *series));
        }
    }
    let keep = |series: &Series, latest: &snapshot::Latest| {
        series.account != account || latest.newest >= before || left.contains(series)
    };
    let (number, bytes) = shard.write_snapshot(Vec::new(), &keep).map_err(failed)?;
    shard.disk.sync_dir(&shard.dir).map_err(failed)?;
    let changed = shard.change(|manifest| manifest.snapshot = Some(number), |_| {});
    changed.map_err(|not| failed(not.error))?;
    shard.snapshot_bytes.store(bytes, Ordering::Relaxed);
    shard.discard(&old);
    Ok(before_bytes.saturating_sub(bytes))
}
