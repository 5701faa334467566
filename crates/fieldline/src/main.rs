//! The program: command line and wiring, nothing else.

mod announce;
mod backends;
mod between;
mod blobs;
mod certificates;
mod cli;
mod config;
mod ctl;
mod demo;
mod doctor;
mod generate;
mod housekeeping;
mod http_client;
mod node;
mod protocol;
mod sessions;
mod simulate;
mod up;
mod worker;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;

use crate::cli::{Cli, Command};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Up(args) => return up::run(args),
        Command::Serve(args) => return up::run_node(args),
        Command::Protocol(command) => protocol::run(command),
        Command::Simulate(command) => block_on(simulate::run(command)),
        Command::Ctl(args) => block_on(ctl::run(args)),
        Command::Doctor(args) => block_on(doctor::run(args)),
        Command::Certificates(command) => certificates::run(command),
        Command::Generate { document } => generate::run(document),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // Nothing can be done about a closed terminal.
            let _closed = writeln!(std::io::stderr(), "fieldline: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a future to its end on a runtime of this thread.
fn block_on<T>(future: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| format!("cannot start: {error}"))?.block_on(future)
}
