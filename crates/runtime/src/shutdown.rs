//! Signals: SIGTERM and SIGINT begin a clean shutdown, a second one ends it at once.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Cancels `shutdown` at the first SIGTERM or SIGINT, and ends the process at
/// the second. Must run in a task of the worker's main runtime.
///
/// # Errors
///
/// If the handlers cannot be installed.
pub async fn on_signals(shutdown: CancellationToken) -> io::Result<()> {
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    for first in [true, false] {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        if first {
            tracing::info!(signal = name, "shutting down; a second signal ends at once");
            shutdown.cancel();
        } else {
            tracing::warn!(signal = name, "ending at once");
            std::process::exit(130);
        }
    }
    Ok(())
}
