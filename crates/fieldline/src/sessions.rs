//! Session scripts, played against a gateway of this process over real
//! sockets, with the store and registry that a server has.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::{Clock, MemoryBus, MemoryState, Platform, SystemClock};
use fieldline_gateway::{Gateway, GatewayConfig};
use fieldline_ingest::Ingest;
use fieldline_mdb::{Mdb, MdbConfig};
use fieldline_pvm::vectors::{Failure, Report};
use fieldline_router::LocalCommands;
use fieldline_sqlite::SqliteRegistry;
use fieldline_testkit::sessions;
use tokio_util::sync::CancellationToken;

/// How long the gateway may take to be there.
const READY_WAIT: Duration = Duration::from_secs(10);

/// Plays the scripts of `json`, of all protocols or of those named.
pub(crate) fn run(json: &str, protocols: &[String]) -> Result<Report, String> {
    let folder =
        tempfile::tempdir().map_err(|error| format!("cannot make a temporary folder: {error}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start: {error}"))?;
    runtime.block_on(play(json, protocols, folder.path()))
}

async fn play(json: &str, protocols: &[String], folder: &Path) -> Result<Report, String> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let registry = SqliteRegistry::open(&folder.join("registry.db"), Arc::clone(&clock));
    let registry = Arc::new(registry.map_err(|error| error.to_string())?);
    let history = Mdb::open(folder.join("messages"), MdbConfig::default(), Arc::clone(&clock));
    let platform = Platform {
        commands: Arc::new(LocalCommands::new(registry.clone(), Arc::clone(&clock))),
        registry,
        history: Arc::new(history.map_err(|error| error.to_string())?),
        state: Arc::new(MemoryState::new()),
        bus: Arc::new(MemoryBus::new()),
        clock,
    };
    let ingest = Ingest::new(platform.clone());
    let config = GatewayConfig { event_loops: 1, ..GatewayConfig::default() };
    let gateway = Gateway::new(config, ingest);
    let stop = CancellationToken::new();
    let running = tokio::spawn(fieldline_gateway::run(gateway.clone(), stop.clone()));
    gateway.ready(READY_WAIT).await;
    let server = sessions::LocalServer::new(platform, Arc::new(gateway));
    let mut total = Report::default();
    let only: Vec<Option<&str>> = if protocols.is_empty() {
        vec![None]
    } else {
        protocols.iter().map(|name| Some(name.as_str())).collect()
    };
    for protocol in only {
        let sessions::Report { passed, failed, failures } =
            sessions::run(json, protocol, &server, None).await;
        total.passed += passed;
        total.failed += failed;
        let as_failure = |text: String| {
            let (id, problem) = text.split_once(": ").unwrap_or(("session", &text));
            Failure { id: id.to_owned(), problems: vec![problem.to_owned()] }
        };
        total.failures.extend(failures.into_iter().map(as_failure));
    }
    stop.cancel();
    match running.await {
        Ok(Ok(_)) => Ok(total),
        Ok(Err(error)) => Err(format!("the gateway failed: {error}")),
        Err(error) => Err(format!("the gateway failed: {error}")),
    }
}
