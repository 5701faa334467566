//! The data directory of one process alone.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use fieldline_contracts::finding::Finding;
use fieldline_contracts::{Clock as _, SystemClock};
use fieldline_mdb::Depth;
use fieldline_runtime::DataDir;

use super::Patient;

/// Less free space than this is a warning.
const FREE_BYTES_WARNING: u64 = 1 << 30;
/// Less than this is soon gone.
const FREE_BYTES_MIN: u64 = 64 << 20;
/// Fewer free file numbers than this are soon gone.
const FREE_FILES_MIN: u64 = 1_000;
/// A sync of the disk that takes longer than this limits how soon devices are acknowledged.
const SYNC_MAX: Duration = Duration::from_millis(100);
/// Syncs that are timed.
const SYNCS: usize = 11;
/// Most files whose owners are looked at.
const FILES_MAX: usize = 100_000;
/// Crashes that are older are over.
const CRASH_DAYS: u64 = 7;

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// The data directory, where it is there.
fn present(patient: &Patient) -> Option<&Path> {
    patient.data.as_deref().filter(|data| data.is_dir())
}

/// Whether a running Fieldline uses it.
pub(super) fn is_in_use(data: &Path) -> bool {
    let lock = File::open(data.join("lock"));
    lock.is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// Whether it is there, can be locked, and belongs to who runs the program and to nobody else.
pub(super) fn directory(patient: &Patient) -> Vec<Finding> {
    let Some(data) = &patient.data else { return Vec::new() };
    let (check, at) = ("data directory", shown(data));
    let meta = match std::fs::metadata(data) {
        Ok(meta) if meta.is_dir() => meta,
        Ok(_) => {
            return vec![Finding::broken(check, at, "it is a file", "choose another with --data")];
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return vec![Finding::ok(check, at, "it is new: the first start makes it")];
        }
        Err(error) => {
            let remedy = "run doctor as the user that runs Fieldline, or correct the path";
            return vec![Finding::broken(
                check,
                at,
                format!("it cannot be looked at: {error}"),
                remedy,
            )];
        }
    };
    let mut findings = Vec::new();
    if let Ok(lock) = File::open(data.join("lock"))
        && let Err(TryLockError::Error(error)) = lock.try_lock_shared()
    {
        let remedy = "keep data on a disk of this machine: network file systems often cannot lock";
        findings.push(Finding::broken(check, &at, format!("it cannot be locked: {error}"), remedy));
    }
    let own = rustix::process::geteuid().as_raw();
    if own != 0 && own != meta.uid() {
        let found = format!("it belongs to user {}, and you are {own}", meta.uid());
        findings.push(Finding::broken(
            check,
            &at,
            found,
            format!("run `chown -R {own} {at}`, or be that user"),
        ));
    }
    if let Some((path, uid)) = of_another(data, meta.uid()) {
        findings.push(Finding::broken(
            check,
            shown(&path),
            format!("it belongs to user {uid}, and the directory to {}: was Fieldline once started by another?", meta.uid()),
            format!("run `chown -R --reference={at} {at}`"),
        ));
    }
    let mode = meta.mode() & 0o777;
    if mode & 0o022 != 0 {
        let found = format!("others may write to it (mode {mode:04o})");
        findings.push(Finding::broken(check, &at, found, format!("run `chmod go-w {at}`")));
    } else if mode & 0o007 != 0 {
        let found = format!("everybody on this machine may look into it (mode {mode:04o})");
        findings.push(Finding::warning(check, &at, found, format!("run `chmod o= {at}`")));
    }
    if findings.is_empty() {
        let used = if is_in_use(data) { "used by a running Fieldline" } else { "not in use" };
        findings.push(Finding::ok(check, at, used));
    }
    findings
}

/// A file below that has another owner.
fn of_another(data: &Path, uid: u32) -> Option<(PathBuf, u32)> {
    let (mut folders, mut seen) = (vec![data.to_owned()], 0);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            seen += 1;
            let Ok(meta) = entry.metadata() else { continue };
            if meta.uid() != uid {
                return Some((entry.path(), meta.uid()));
            }
            if seen > FILES_MAX {
                return None;
            }
            if meta.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    None
}

/// Whether this program can read it.
pub(super) fn format(patient: &Patient) -> Vec<Finding> {
    let Some(data) = present(patient) else { return Vec::new() };
    let check = "data format";
    vec![match DataDir::format(data) {
        Ok(Some(format)) => Finding::ok(check, shown(data), format!("of format {format}")),
        Ok(None) => Finding::ok(check, shown(data), "it has none yet"),
        Err(error) => Finding::of_error(check, shown(data), &error),
    }]
}

/// The folder itself, or the nearest one above that is there.
fn existing(data: &Path) -> &Path {
    let found = data.ancestors().find(|path| path.is_dir());
    found.filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Space and file numbers.
pub(super) fn space(patient: &Patient) -> Vec<Finding> {
    let Some(data) = patient.data.as_deref().map(existing) else { return Vec::new() };
    let (check, at) = ("disk space", shown(data));
    let remedy = "add space, or set storage_bytes_max or retention_days on accounts; acknowledgements stop when it is gone, and go on by themselves when it returns";
    let stat = match rustix::fs::statvfs(data) {
        Ok(stat) => stat,
        Err(error) => {
            return vec![Finding::broken(
                check,
                at,
                format!("it cannot be told: {error}"),
                "see the disk",
            )];
        }
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let found = format!("{} MiB free", free >> 20);
    vec![if free < FREE_BYTES_MIN {
        Finding::broken(check, at, found, remedy)
    } else if stat.f_files > 0 && stat.f_favail < FREE_FILES_MIN {
        let found = format!("{found}, and room for only {} more files", stat.f_favail);
        Finding::broken(
            check,
            at,
            found,
            "remove files of others, or make a file system with more inodes",
        )
    } else if free < FREE_BYTES_WARNING {
        Finding::warning(check, at, found, remedy)
    } else {
        Finding::ok(check, at, found)
    }]
}

/// Times syncs of a small file, as the log makes them.
pub(super) fn sync_time(patient: &Patient) -> Vec<Finding> {
    let Some(data) = patient.data.as_deref().map(existing) else { return Vec::new() };
    let check = "disk sync";
    let path = data.join(format!(".fieldline-doctor-{}", std::process::id()));
    let timed = || -> std::io::Result<Duration> {
        let mut file = OpenOptions::new().create_new(true).write(true).open(&path)?;
        let mut all = Vec::with_capacity(SYNCS);
        for _ in 0..SYNCS {
            let began = Instant::now();
            file.write_all(&[0; 4_096])?;
            file.sync_data()?;
            all.push(began.elapsed());
        }
        all.sort_unstable();
        Ok(all.get(SYNCS / 2).copied().unwrap_or_default())
    };
    let result = timed();
    let _gone_already = std::fs::remove_file(&path);
    vec![match result {
        Ok(each) if each > SYNC_MAX => Finding::warning(
            check,
            shown(data),
            format!("{each:.1?} a sync: devices wait at least that long for each acknowledgement"),
            "keep data on a disk of its own that syncs fast, such as an SSD with a safe cache",
        ),
        Ok(each) => Finding::ok(check, shown(data), format!("{each:.1?} a sync")),
        Err(error) => Finding::broken(
            check,
            shown(data),
            format!("nothing can be written: {error}"),
            "make space, mount it writable, or correct its owner",
        ),
    }]
}

/// The registry: there beside a store, sound, and of a schema that this program knows.
pub(super) fn registry(patient: &Patient) -> Vec<Finding> {
    let Some(data) = present(patient) else { return Vec::new() };
    let (check, path) = ("registry", data.join("registry.db"));
    if let Some(missing) = crate::backends::missing_registry(data) {
        return vec![Finding::broken(
            check,
            shown(&path),
            missing,
            "restore it from a backup, or move the data directory aside to begin anew",
        )];
    }
    vec![match fieldline_sqlite::inspect(&path) {
        Ok(true) => Finding::ok(check, shown(&path), "it is sound"),
        Ok(false) => Finding::ok(check, shown(&path), "it is new: the first start makes it"),
        Err(error) => Finding::of_error(check, shown(&path), &error),
    }]
}

/// Logs and segments: every block is read, unless it is to be quick.
pub(super) fn messages(patient: &Patient) -> Vec<Finding> {
    let Some(data) = present(patient) else { return Vec::new() };
    let (check, path) = ("messages", data.join("messages"));
    let depth = if patient.quick { Depth::Indexes } else { Depth::Blocks };
    let found = fieldline_mdb::inspect(&path, depth);
    if found.is_empty() {
        let all = if patient.quick { "logs and indexes are sound" } else { "every block is sound" };
        return vec![Finding::ok(check, shown(&path), all)];
    }
    let finding = |text: String| {
        let remedy =
            "restore the file from a backup; what is beside the damage is read all the same";
        Finding::broken(check, shown(&path), text, remedy)
    };
    found.into_iter().map(finding).collect()
}

/// Reports of workers that died lately.
pub(super) fn crashes(patient: &Patient) -> Vec<Finding> {
    let Some(data) = present(patient) else { return Vec::new() };
    let (check, folder) = ("crashes", data.join("crash"));
    let now = SystemClock.now();
    let age = |path: &Path| -> Option<u64> {
        let written = path.metadata().ok()?.modified().ok()?.duration_since(SystemTime::UNIX_EPOCH);
        let written = written.ok()?.as_secs();
        Some(u64::try_from(now.as_micros() / 1_000_000).unwrap_or(0).saturating_sub(written))
    };
    let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
    let newest = entries.map(|entry| entry.path()).max();
    vec![match newest {
        Some(report) if age(&report).is_none_or(|age| age < CRASH_DAYS * 86_400) => {
            Finding::warning(
                check,
                shown(&report),
                "the worker died",
                "read the report; its end says why: send it with a fault report",
            )
        }
        _ => Finding::ok(check, shown(&folder), format!("none in {CRASH_DAYS} days")),
    }]
}
