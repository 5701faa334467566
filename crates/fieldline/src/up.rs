//! `fieldline up` and `serve`: the master, which becomes a parent of the worker, or the worker itself.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use fieldline_runtime::supervise::{self, EXIT_CONFIGURATION, WorkerCommand};

use crate::cli::{ServeArgs, UpArgs};
use crate::worker;

/// Runs as master or worker, as the arguments say.
pub(crate) fn run(args: UpArgs) -> ExitCode {
    if args.worker || args.no_master {
        return ended(worker::run(args));
    }
    supervised(Some(args.data))
}

/// Runs a node of a cluster: alone where something else starts it again, as systemd does, else as master or worker.
pub(crate) fn run_node(args: ServeArgs) -> ExitCode {
    // The kernel lets no watchdog end the first process of a container: that one is the master.
    let master = args.master || std::process::id() == 1;
    if master && !args.worker {
        return supervised(None);
    }
    ended(worker::run_node(args))
}

/// Runs as master; `data` takes crash reports.
fn supervised(data: Option<PathBuf>) -> ExitCode {
    match master(data) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            say(&format!("cannot start: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Tells why it ended, and says so by the exit code.
fn ended(result: Result<(), worker::Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(worker::Failure::Setup(message)) => {
            say(&message);
            // Starting again would not help.
            ExitCode::from(u8::try_from(EXIT_CONFIGURATION).unwrap_or(1))
        }
        Err(worker::Failure::Running(message)) => {
            say(&message);
            ExitCode::FAILURE
        }
    }
}

fn master(data: Option<PathBuf>) -> std::io::Result<i32> {
    let program = std::env::current_exe()?;
    let given = std::env::args().skip(1);
    let command =
        WorkerCommand { program, args: given.chain(["--worker".to_owned()]).collect(), data };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(supervise::run_master(command))
}

/// Tells the person at the terminal.
fn say(message: &str) {
    // Nothing can be done about a closed terminal.
    let _closed = writeln!(std::io::stderr(), "fieldline: {message}");
}
