//! The worker: chooses the backends, starts the services, and stops them in order.

use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fieldline_auth::{Auth, Bootstrap};
use fieldline_contracts::{
    Clock, Kind, MemoryBus, MemoryState, Page, Platform, Retention, State as _, SystemClock,
};
use fieldline_gateway::{Gateway, GatewayConfig};
use fieldline_ingest::Ingest;
use fieldline_mdb::{Mdb, MdbConfig};
use fieldline_model::{Account, DeviceId, SeriesKind};
use fieldline_router::LocalCommands;
use fieldline_runtime::telemetry::{self, MetricsPage};
use fieldline_runtime::tls::{ReloadingTls, TlsFiles};
use fieldline_runtime::{Config, DataDir, crash, shutdown as signals, supervise};
use fieldline_sqlite::SqliteRegistry;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::cli::UpArgs;
use crate::demo;

/// How long to wait for a worker before us to let go of the data directory.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often what is beyond retention is looked for.
const RETAIN_EVERY: Duration = Duration::from_secs(10 * 60);
/// How often expired commands are looked for.
const EXPIRE_EVERY: Duration = Duration::from_secs(1);
/// Stack of a service's thread: futures live on the heap, calls are shallow.
const STACK_BYTES: usize = 1 << 20;

/// Why the worker ended.
pub(crate) enum Failure {
    /// It cannot start so; starting again would not help.
    Setup(String),
    /// It failed while starting or running.
    Running(String),
}

/// Starts everything, runs until a signal or the master's end, and stops everything.
pub(crate) fn run(args: UpArgs) -> Result<(), Failure> {
    let began = Instant::now();
    crash::abort_on_panic();
    let mut config = Config::load(args.config.as_deref()).map_err(setup)?;
    config.http.listen = args.http.unwrap_or(config.http.listen);
    config.mqtt.listen = args.mqtt.unwrap_or(config.mqtt.listen);
    let config = config.validate().map_err(setup)?;
    telemetry::init_logs(&config.log);
    let metrics = telemetry::init_metrics().map_err(setup)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_name("main")
        .build()
        .map_err(|error| Failure::Running(format!("cannot start: {error}")))?;
    runtime.block_on(serve(args, config, metrics, began))
}

fn setup(error: impl std::fmt::Display) -> Failure {
    Failure::Setup(error.to_string())
}

async fn serve(args: UpArgs, config: Config, metrics: MetricsPage, began: Instant) -> Result<(), Failure> {
    let data = DataDir::open(&args.data, PATIENCE).map_err(setup)?;
    let (http, http_tls) = http_listener(&config).await?;
    let mqtt_listeners = mqtt_listeners(&config).await?;
    let mqtt_address = local(&mqtt_listeners.first().map(|l| l.listener.local_addr()));

    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let registry = Arc::new(SqliteRegistry::open(&data.join("registry.db"), Arc::clone(&clock)).map_err(setup)?);
    let history = Arc::new(Mdb::open(&data.join("messages"), store_config(&config), Arc::clone(&clock)).map_err(setup)?);
    let state = Arc::new(MemoryState::new());
    rebuild(&*history, &state).await?;
    let commands = LocalCommands::new(registry.clone(), Arc::clone(&clock));
    let platform = Platform {
        registry,
        history,
        state,
        bus: Arc::new(MemoryBus::new()),
        commands: Arc::new(commands.clone()),
        clock: Arc::clone(&clock),
    };
    let ingest = Ingest::new(platform.clone());
    let events = ingest.clone();
    commands.set_events(move |event| events.event_soon(event));
    commands.recover().await.map_err(|error| Failure::Running(error.to_string()))?;
    let auth = Auth::new(platform.registry.clone(), Arc::clone(&clock));
    let bootstrap = auth.bootstrap(args.admin_token.clone()).await.map_err(setup)?;

    let stop = CancellationToken::new();
    tokio::spawn(wait_for_end(args.worker, stop.clone()));
    todo_wire(&args, began);
    let _ = (http, http_tls, mqtt_address, metrics, bootstrap, stop, ingest, auth, data);
    Ok(())
}
