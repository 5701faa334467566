//! The machine itself.

use std::time::{Duration, SystemTime};

use fieldline_contracts::finding::Finding;
use fieldline_contracts::{Clock as _, SystemClock};
use fieldline_model::Timestamp;

use super::Patient;

/// Fewer open files than this limit the devices that can connect.
const OPEN_FILES_MIN: u64 = 20_000;
/// Files are not written later than now, but for a clock that was moved a little.
const AHEAD_MAX: Duration = Duration::from_secs(60);

/// The limit that a start raises its own to.
pub(super) fn open_files(_patient: &Patient) -> Vec<Finding> {
    let check = "open files";
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    vec![match limit {
        Some(limit) if limit < OPEN_FILES_MIN => Finding::warning(
            check,
            "limit of this session",
            format!("at most {limit}: fewer devices than that can connect"),
            format!(
                "raise it: LimitNOFILE={OPEN_FILES_MIN} in the unit, or `ulimit -Hn {OPEN_FILES_MIN}`"
            ),
        ),
        Some(limit) => Finding::ok(check, "limit of this session", format!("at most {limit}")),
        None => Finding::ok(check, "limit of this session", "no limit"),
    }]
}

/// Whether the clock is behind what was written before. Other machines' clocks are compared where they are asked.
pub(super) fn clock(patient: &Patient) -> Vec<Finding> {
    let Some(data) = &patient.data else { return Vec::new() };
    let newest = |path: &std::path::Path| {
        let files = std::fs::read_dir(path).into_iter().flatten().flatten();
        files.filter_map(|file| file.metadata().ok()?.modified().ok()).max()
    };
    let folders = [data.clone(), data.join("messages")];
    let Some(newest) = folders.iter().filter_map(|folder| newest(folder)).max() else {
        return Vec::new();
    };
    let since = newest.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let newest = Timestamp::from_micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX));
    let now = SystemClock.now();
    let ahead = i64::try_from(AHEAD_MAX.as_micros()).unwrap_or(i64::MAX);
    let at = data.display().to_string();
    vec![if newest.micros_since(now) > ahead {
        Finding::broken(
            "clock",
            at,
            format!(
                "it shows {now}, and files here were written at {newest}: new messages would be the older ones"
            ),
            "set the clock, and let chrony or systemd-timesyncd keep it",
        )
    } else {
        Finding::ok("clock", at, "it is not behind what was written")
    }]
}
