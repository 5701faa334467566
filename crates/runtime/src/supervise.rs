//! Master and worker: the master is small, holds no data, and starts the
//! worker again when it dies.
//!
//! The worker's standard input is a pipe that the master holds: should the
//! master be killed, the pipe closes and the worker shuts down by itself, so
//! that never two workers outlive each other on one data directory.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fieldline_contracts::{Clock, SystemClock};
use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::signal::unix::{SignalKind, signal};

use crate::crash;

/// The worker ends with this status where starting again cannot help: a wrong
/// setting, a port in use, a data directory of a newer version.
pub const EXIT_CONFIGURATION: i32 = 78;

/// Log lines kept for a crash report.
const LINES_MAX: usize = 200;
/// Longest log line kept, in bytes.
const LINE_BYTES_MAX: usize = 4_096;
/// Wait before the first restart; doubles up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest wait before a restart.
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// A worker that lived this long starts the back-off anew.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

/// How the worker is started.
#[derive(Clone, Debug)]
pub struct WorkerCommand {
    /// The program, usually this one.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Where crash reports go; without it, only the log has the last lines.
    pub data: Option<PathBuf>,
}

/// Runs the worker until it ends by itself or by a signal to the master;
/// returns the exit status for the process.
///
/// # Errors
///
/// If signals cannot be handled or the worker cannot be started at all.
pub async fn run_master(command: WorkerCommand) -> io::Result<i32> {
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut backoff = BACKOFF_MIN;
    loop {
        let began = Instant::now();
        let last_lines = Arc::new(Mutex::new(VecDeque::new()));
        let mut worker = start(&command)?;
        let copier = worker
            .stderr
            .take()
            .map(|stderr| tokio::spawn(copy_lines(stderr, Arc::clone(&last_lines))));
        // Taken out, since waiting for a child closes the input that it still has.
        let mut input = worker.stdin.take();
        let status = loop {
            tokio::select! {
                status = worker.wait() => break status?,
                _ = terminate.recv() => forward(&mut worker, &mut input)?,
                _ = interrupt.recv() => forward(&mut worker, &mut input)?,
            }
        };
        if let Some(copier) = copier {
            // A grandchild could hold the pipe open; its lines are not waited for.
            let _late = tokio::time::timeout(Duration::from_secs(1), copier).await;
        }
        if input.is_none() || status.success() || status.code() == Some(EXIT_CONFIGURATION) {
            return Ok(status.code().unwrap_or(1));
        }
        let report = command
            .data
            .as_deref()
            .map(|data| crash::write_report(data, SystemClock.now(), status, &last_lines.lock()));
        if began.elapsed() > HEALTHY_AFTER {
            backoff = BACKOFF_MIN;
        }
        announce(status, report, backoff);
        tokio::select! {
            () = tokio::time::sleep(backoff) => {}
            _ = terminate.recv() => return Ok(0),
            _ = interrupt.recv() => return Ok(0),
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

fn start(command: &WorkerCommand) -> io::Result<Child> {
    Command::new(&command.program)
        .args(&command.args)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        // A terminal sends its Ctrl-C to the whole group: the worker is in its
        // own, so that it hears of it from the master alone, once.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

/// Passes a signal on: closing the pipe asks for a clean shutdown, the second time the worker is killed.
fn forward(worker: &mut Child, input: &mut Option<ChildStdin>) -> io::Result<()> {
    match input.take() {
        Some(open) => drop(open),
        None => worker.start_kill()?,
    }
    Ok(())
}

/// Copies the worker's log to ours, and keeps the last lines.
async fn copy_lines(stderr: tokio::process::ChildStderr, last_lines: Arc<Mutex<VecDeque<String>>>) {
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut limited = (&mut reader).take(LINE_BYTES_MAX as u64);
        match limited.read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        // Without a reader of our log the worker must go on all the same.
        let _closed = io::stderr().write_all(&line);
        let mut lines = last_lines.lock();
        if lines.len() == LINES_MAX {
            lines.pop_front();
        }
        lines.push_back(String::from_utf8_lossy(&line).trim_end().to_owned());
    }
}

fn announce(status: ExitStatus, report: Option<io::Result<PathBuf>>, backoff: Duration) {
    let report = match report {
        Some(Ok(path)) => format!("; see {}", path.display()),
        Some(Err(error)) => format!("; no crash report could be written: {error}"),
        None => String::new(),
    };
    // It cannot say so itself.
    let killed = if status.signal() == Some(9) {
        "; that was the watchdog of its lease if it had been stopped, the system if it had no memory left, or `kill -9`"
    } else {
        ""
    };
    let _closed = writeln!(
        io::stderr(),
        "the worker ended ({status}){killed}{report}; starting it again in {backoff:?}"
    );
}

/// Returns when the master has closed our standard input: it wants a shutdown, or is dead.
///
/// Read on a thread of its own: a runtime would wait for that read at its end.
pub async fn master_gone() {
    let (gone, told) = tokio::sync::oneshot::channel::<()>();
    let watch = move || {
        let mut scratch = [0_u8; 64];
        while matches!(io::Read::read(&mut io::stdin(), &mut scratch), Ok(count) if count > 0) {}
        drop(gone);
    };
    if std::thread::Builder::new().name("master".to_owned()).spawn(watch).is_err() {
        // Without it the worker is stopped by signals alone.
        std::future::pending::<()>().await;
    }
    // It is told by the sender's end.
    let _closed = told.await;
}
