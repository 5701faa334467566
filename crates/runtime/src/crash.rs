//! What is kept of a worker that died: `crash/TIME.txt` in the data directory.

use std::backtrace::Backtrace;
use std::collections::VecDeque;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use fieldline_model::Timestamp;

/// Most reports kept; the oldest go.
const REPORTS_MAX: usize = 20;

/// Writes a panic and its backtrace to standard error, where the master keeps
/// the last lines for the report, and ends the process: a half-dead worker
/// would hold devices without serving them.
pub fn abort_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let backtrace = Backtrace::force_capture();
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        // Nothing can be done if standard error is gone.
        let _gone = writeln!(std::io::stderr(), "panic in thread `{name}`: {panic}\n{backtrace}");
        std::process::abort();
    }));
}

/// Writes a report of a worker that ended with `status` and returns its path.
///
/// # Errors
///
/// If it cannot be written.
pub fn write_report(
    data: &Path,
    at: Timestamp,
    status: ExitStatus,
    last_lines: &VecDeque<String>,
) -> std::io::Result<PathBuf> {
    let folder = data.join("crash");
    std::fs::create_dir_all(&folder)?;
    let name = at.to_string().replace(':', "-");
    let path = folder.join(format!("{name}.txt"));
    let mut file = std::fs::File::create(&path)?;
    writeln!(
        file,
        "time: {at}\nversion: {}\nend: {status}\n\nlast log lines:",
        env!("CARGO_PKG_VERSION")
    )?;
    for line in last_lines {
        writeln!(file, "{line}")?;
    }
    let mut reports: Vec<PathBuf> =
        std::fs::read_dir(&folder)?.filter_map(|e| Some(e.ok()?.path())).collect();
    reports.sort();
    let surplus = reports.len().saturating_sub(REPORTS_MAX);
    for old in reports.iter().take(surplus) {
        std::fs::remove_file(old)?;
    }
    Ok(path)
}
