//! The worker: chooses the backends, starts the services, and stops them in order.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fieldline_auth::Auth;
use fieldline_contracts::{
    Clock, History, MemoryBus, MemoryState, Platform, Registry, State, SystemClock,
};
use fieldline_gateway::{Gateway, GatewayConfig};
use fieldline_ingest::Ingest;
use fieldline_mdb::{Mdb, MdbConfig};
use fieldline_mqtt::MqttConfig;
use fieldline_rest::{RestConfig, RestListener, SystemInfo};
use fieldline_router::LocalCommands;
use fieldline_runtime::telemetry::{self, MetricsPage};
use fieldline_runtime::tls::{ReloadingTls, TlsFiles};
use fieldline_runtime::{DataDir, crash, limits, shutdown as signals, supervise};
use fieldline_sqlite::SqliteRegistry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::announce::{self, Started};
use crate::cli::UpArgs;
use crate::config::Config;
use crate::demo::Demo;
use crate::housekeeping;

/// How long to wait for a worker before us to let go of the data directory.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long to wait for channels before saying that all is ready.
const READY_WAIT: Duration = Duration::from_secs(10);
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
    let data = DataDir::open(&args.data, PATIENCE).map_err(setup)?;
    let result = runtime.block_on(serve(args, config, metrics, &data, began));
    // Waits for work on the store that is still going on: the directory is let go of after it.
    drop(runtime);
    drop(data);
    result
}

fn setup(error: impl std::fmt::Display) -> Failure {
    Failure::Setup(error.to_string())
}

/// Everything that runs, and how to stop it.
struct Running {
    services: Vec<Service>,
    stop: CancellationToken,
}

async fn serve(
    args: UpArgs,
    config: Config,
    metrics: MetricsPage,
    data: &DataDir,
    began: Instant,
) -> Result<(), Failure> {
    // Bound first: a port in use ends the start before anything is touched.
    let (http, http_address) = http_listener(&config).await?;
    let (mqtt, mqtt_addresses) = mqtt_listeners(&config).await?;

    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    check_pair(data)?;
    let sqlite = Arc::new(
        SqliteRegistry::open(&data.join("registry.db"), Arc::clone(&clock)).map_err(setup)?,
    );
    let registry: Arc<dyn Registry> = sqlite.clone();
    let history: Arc<dyn History> = Arc::new(
        Mdb::open(data.join("messages"), store_config(&config), Arc::clone(&clock))
            .map_err(setup)?,
    );
    let memory = MemoryState::new();
    let rebuilt = memory.rebuild(&*history).await;
    rebuilt.map_err(|error| Failure::Running(format!("reading last values: {error}")))?;
    let state: Arc<dyn State> = Arc::new(memory);
    let commands = LocalCommands::new(Arc::clone(&registry), Arc::clone(&clock));
    let platform = Platform {
        registry,
        history,
        state,
        bus: Arc::new(MemoryBus::new()),
        commands: Arc::new(commands.clone()),
        clock,
    };
    let ingest = Ingest::new(platform.clone());
    let events = ingest.clone();
    commands.set_events(move |event| events.event_soon(event));
    commands.recover().await.map_err(|error| Failure::Running(error.to_string()))?;
    let auth = Auth::new(Arc::clone(&platform.registry), Arc::clone(&platform.clock));
    let bootstrap = auth
        .bootstrap(args.admin_token.clone().filter(|token| !token.is_empty()))
        .await
        .map_err(setup)?;
    let demo = if args.demo {
        Some(Demo::prepare(&platform, &args).await.map_err(Failure::Running)?)
    } else {
        None
    };

    let stop = CancellationToken::new();
    tokio::spawn(end_on_signal(args.worker, stop.clone()));
    let shares = limits::shares(limits::raise_open_files());
    let gateway_config = GatewayConfig {
        connections_max: config.gateway.connections_max.min(shares.gateway),
        ..config.gateway.clone()
    };
    let gateway = Gateway::new(gateway_config, ingest.clone());
    let mut listeners = vec![("http".to_owned(), http_address.to_string())];
    listeners.extend(
        mqtt_addresses.iter().map(|(name, address)| ((*name).to_owned(), address.to_string())),
    );
    let services = fieldline_rest::Services {
        platform: platform.clone(),
        ingest: ingest.clone(),
        auth: auth.clone(),
        channels: Arc::new(gateway.clone()),
        metrics,
        ready: vec![Arc::new({
            let history = Arc::clone(&platform.history);
            move || history.problems()
        })],
        system: SystemInfo { version: env!("CARGO_PKG_VERSION").to_owned(), listeners },
    };
    let mut running = Running { services: Vec::new(), stop: stop.clone() };
    running.start("gateway", {
        let gateway = gateway.clone();
        move |stop| async move {
            if let Err(error) = fieldline_gateway::run(gateway, stop).await {
                tracing::error!(%error, "the gateway could not run");
            }
        }
    })?;
    running.start("mqtt", {
        let services =
            fieldline_mqtt::Services { platform: platform.clone(), ingest: ingest.clone(), auth };
        let config = MqttConfig {
            connections_max: config.mqtt.connections_max.min(shares.mqtt),
            ..MqttConfig::default()
        };
        move |stop| async move {
            let listeners = mqtt
                .into_iter()
                .map(MqttSocket::into_listener)
                .collect::<std::io::Result<Vec<_>>>();
            match listeners {
                Ok(listeners) => {
                    fieldline_mqtt::run(config, listeners, services, stop).await;
                }
                Err(error) => tracing::error!(%error, "the MQTT broker could not run"),
            }
        }
    })?;
    running.start("http", {
        let config = RestConfig {
            requests_per_s_max: config.http.requests_per_s_max,
            connections_max: RestConfig::default().connections_max.min(shares.http),
            ..RestConfig::default()
        };
        move |stop| async move {
            match TcpListener::from_std(http.0) {
                Ok(listener) => {
                    let listeners = vec![RestListener { listener, tls: http.1 }];
                    fieldline_rest::run(config, listeners, services, stop).await;
                }
                Err(error) => tracing::error!(%error, "the API could not run"),
            }
        }
    })?;
    tokio::spawn(housekeeping::expire(platform.clone()));
    tokio::spawn(housekeeping::retain(platform.clone(), data.join("retained_at")));
    gateway.ready(READY_WAIT).await;
    let started = Started {
        secure: config.http.tls_certificate.is_some(),
        http: http_address,
        mqtt: mqtt_addresses,
        bootstrap,
        channels: announce::channels(&platform, &gateway).await,
        demo_devices: args.demo.then_some(args.demo_devices),
        took: began.elapsed(),
    };
    started
        .announce(data)
        .map_err(|error| Failure::Running(format!("cannot write run.json: {error}")))?;
    let history = Arc::clone(&platform.history);
    if let Some(demo) = demo {
        running.start("demo", move |stop| demo.run(gateway, platform, stop))?;
    }

    stop.cancelled().await;
    running.join().await;
    ingest.flush().await;
    let closed = history.close().await;
    closed.map_err(|error| Failure::Running(format!("closing the store: {error}")))?;
    if let Err(error) = sqlite.settle().await {
        tracing::warn!(%error, "the registry's journal could not be emptied");
    }
    tracing::info!("stopped");
    Ok(())
}

/// A service on a thread of its own.
struct Service {
    name: &'static str,
    thread: JoinHandle<()>,
}

impl Running {
    /// Runs `body` on an event loop of its own; it ends when the token given to it is cancelled.
    fn start<F>(
        &mut self,
        name: &'static str,
        body: impl FnOnce(CancellationToken) -> F + Send + 'static,
    ) -> Result<(), Failure>
    where
        F: Future<Output = ()>,
    {
        let failed = |error| Failure::Running(format!("cannot start {name}: {error}"));
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let stop = self.stop.clone();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                runtime.block_on(body(stop.clone()));
                // One service alone is of no use: if it ends by itself, all do.
                stop.cancel();
            });
        self.services.push(Service { name, thread: thread.map_err(failed)? });
        Ok(())
    }

    /// Waits for all services; each has a deadline of its own.
    async fn join(self) {
        for Service { name, thread } in self.services {
            let joined = tokio::task::spawn_blocking(move || thread.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                tracing::error!(service = name, "a service ended badly");
            }
        }
    }
}

/// Cancels `stop` at a signal, or when the master is gone.
async fn end_on_signal(has_master: bool, stop: CancellationToken) {
    let signals = tokio::spawn(signals::on_signals(stop.clone()));
    if has_master {
        supervise::master_gone().await;
        stop.cancel();
    }
    if let Ok(Err(error)) = signals.await {
        tracing::error!(%error, "signals cannot be handled");
    }
}

/// Refuses a store whose registry is gone: a new one would give the account and
/// devices other ids, and what is stored would belong to nobody.
fn check_pair(data: &DataDir) -> Result<(), Failure> {
    let (registry, store) = (data.join("registry.db"), data.join("messages/MANIFEST"));
    if registry.exists() || !store.exists() {
        return Ok(());
    }
    Err(Failure::Setup(format!(
        "`{}` is missing, though `{}` holds messages; restore it from a backup, or move the data directory aside to begin anew",
        registry.display(),
        data.join("messages").display(),
    )))
}

type HttpSocket = (std::net::TcpListener, Option<Arc<ReloadingTls>>);

async fn http_listener(config: &Config) -> Result<(HttpSocket, SocketAddr), Failure> {
    let (listener, address) = bind("http.listen", config.http.listen).await?;
    let files = config.http.tls_certificate.clone().zip(config.http.tls_key.clone());
    let tls = load_tls(files, RestListener::PROTOCOLS)?;
    Ok(((listener, tls), address))
}

/// A bound socket for MQTT clients.
struct MqttSocket {
    listener: std::net::TcpListener,
    tls: Option<Arc<ReloadingTls>>,
}

impl MqttSocket {
    /// Registers the socket with the present runtime.
    fn into_listener(self) -> std::io::Result<fieldline_mqtt::Listener> {
        let tls =
            self.tls.map(|tls| -> fieldline_mqtt::Acceptor { Arc::new(move || tls.acceptor()) });
        Ok(fieldline_mqtt::Listener { listener: TcpListener::from_std(self.listener)?, tls })
    }
}

async fn mqtt_listeners(
    config: &Config,
) -> Result<(Vec<MqttSocket>, Vec<(&'static str, SocketAddr)>), Failure> {
    let (listener, address) = bind("mqtt.listen", config.mqtt.listen).await?;
    let mut sockets = vec![MqttSocket { listener, tls: None }];
    let mut addresses = vec![("mqtt", address)];
    if let Some(wanted) = config.mqtt.listen_tls {
        let files = config.mqtt.tls_certificate.clone().zip(config.mqtt.tls_key.clone());
        let tls = load_tls(files, &["mqtt"])?;
        let (listener, address) = bind("mqtt.listen_tls", wanted).await?;
        sockets.push(MqttSocket { listener, tls });
        addresses.push(("mqtts", address));
    }
    Ok((sockets, addresses))
}

fn load_tls(
    files: Option<(std::path::PathBuf, std::path::PathBuf)>,
    protocols: &[&str],
) -> Result<Option<Arc<ReloadingTls>>, Failure> {
    let load = |(certificate, key)| {
        ReloadingTls::load(TlsFiles { certificate, key }, protocols).map(Arc::new)
    };
    files.map(load).transpose().map_err(setup)
}

async fn bind(
    key: &str,
    address: SocketAddr,
) -> Result<(std::net::TcpListener, SocketAddr), Failure> {
    let failed = |error: std::io::Error| {
        Failure::Setup(format!(
            "cannot listen on {address} ({key}): {error}; stop what uses it, or set another address"
        ))
    };
    let bound = async {
        let listener = TcpListener::bind(address).await?;
        let local = listener.local_addr()?;
        Ok((listener.into_std()?, local))
    };
    bound.await.map_err(failed)
}

fn store_config(config: &Config) -> MdbConfig {
    MdbConfig {
        wal_bytes_max: config.store.log_file_bytes,
        memtable_bytes_max: config.store.memory_bytes_max,
        ..MdbConfig::default()
    }
}
