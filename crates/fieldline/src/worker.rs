//! What runs: chooses the backends, starts the services, and stops them in order.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fieldline_auth::{Auth, Bootstrap};
use fieldline_contracts::{ChannelControl, cluster};
use fieldline_gateway::{Gateway, GatewayConfig, LostConfig};
use fieldline_ingest::Ingest;
use fieldline_mqtt::MqttConfig;
use fieldline_rest::{RestConfig, RestListener, SystemInfo};
use fieldline_router::ClusterChannels;
use fieldline_runtime::telemetry::{self, MetricsPage};
use fieldline_runtime::tls::{ReloadingTls, TlsFiles};
use fieldline_runtime::{DataDir, crash, limits, shutdown as signals, supervise};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::announce::{self, Started};
use crate::backends::Backends;
use crate::between::Between;
use crate::cli::{ServeArgs, UpArgs};
use crate::config::Config;
use crate::demo::Demo;
use crate::housekeeping;
use crate::node::{self, Role};

/// How long to wait for a worker before us to let go of the data directory.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long to wait for channels before saying that all is ready.
const READY_WAIT: Duration = Duration::from_secs(10);
/// Stack of a service's thread: futures live on the heap, calls are shallow.
const STACK_BYTES: usize = 1 << 20;

/// Why it ended.
pub(crate) enum Failure {
    /// It cannot start so; starting again would not help.
    Setup(String),
    /// It failed while starting or running.
    Running(String),
}

/// What is to run.
struct Plan {
    config: Config,
    roles: Vec<Role>,
    /// Where data is kept; a node of a cluster keeps none.
    data: Option<DataDir>,
    demo: Option<UpArgs>,
    admin_token: Option<String>,
    has_master: bool,
    began: Instant,
}

/// `fieldline up`: everything in one process.
pub(crate) fn run(args: UpArgs) -> Result<(), Failure> {
    let began = Instant::now();
    crash::abort_on_panic();
    let mut config = Config::load(args.config.as_deref()).map_err(setup)?;
    config.http.listen = args.http.unwrap_or(config.http.listen);
    config.mqtt.listen = args.mqtt.unwrap_or(config.mqtt.listen);
    let config = config.validate().map_err(setup)?;
    if let Some(section) = config.of_a_cluster() {
        let text = format!(
            "the configuration has a section `{section}`, which is for a cluster: start it with `fieldline serve`, or leave the section out"
        );
        return Err(Failure::Setup(text));
    }
    let (runtime, metrics) = prepare(&config)?;
    let data = DataDir::open(&args.data, PATIENCE).map_err(setup)?;
    let plan = Plan {
        config,
        roles: Role::ALL.to_vec(),
        data: Some(data),
        admin_token: args.admin_token.clone(),
        has_master: args.worker,
        demo: args.demo.then_some(args),
        began,
    };
    // Waits for work on the store that is still going on: the directory is let go of after it.
    run_on(runtime, start(plan, metrics))
}

/// `fieldline serve`: one node of a cluster.
pub(crate) fn run_node(args: ServeArgs) -> Result<(), Failure> {
    let began = Instant::now();
    crash::abort_on_panic();
    let config = Config::load(Some(&args.config)).map_err(setup)?;
    let config =
        node::complete(config, &args).map_err(Failure::Setup)?.validate().map_err(setup)?;
    let (runtime, metrics) = prepare(&config)?;
    let roles = if args.roles.is_empty() { Role::ALL.to_vec() } else { args.roles };
    let plan = Plan {
        config,
        roles,
        data: None,
        demo: None,
        admin_token: args.admin_token,
        has_master: args.worker,
        began,
    };
    run_on(runtime, start(plan, metrics))
}

fn prepare(config: &Config) -> Result<(tokio::runtime::Runtime, MetricsPage), Failure> {
    telemetry::init_logs(&config.log);
    let metrics = telemetry::init_metrics().map_err(setup)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_name("main")
        .build()
        .map_err(|error| Failure::Running(format!("cannot start: {error}")))?;
    Ok((runtime, metrics))
}

/// Runs to the end, then waits for what still works in the background; what the future gave back is let go of after it.
fn run_on(
    runtime: tokio::runtime::Runtime,
    all: impl Future<Output = (Result<(), Failure>, Option<DataDir>)>,
) -> Result<(), Failure> {
    let (result, data) = runtime.block_on(all);
    drop(runtime);
    drop(data);
    result
}

pub(crate) fn setup(error: impl std::fmt::Display) -> Failure {
    Failure::Setup(error.to_string())
}

/// Everything that runs, and how to stop it.
struct Running {
    services: Vec<Service>,
    stop: CancellationToken,
}

async fn start(plan: Plan, metrics: MetricsPage) -> (Result<(), Failure>, Option<DataDir>) {
    let Plan { config, roles, data, demo, admin_token, has_master, began } = plan;
    let stop = CancellationToken::new();
    let result = async {
        // Bound first: a port in use ends the start before anything is touched.
        let sockets = Sockets::bind(&config, &roles).await?;
        let backends = match (&data, &config.node) {
            (Some(data), _) => Backends::embedded(&config, data).await?,
            (None, Some(node)) => {
                let between = Between::start(node).await?;
                Backends::cluster(&config, node, &roles, between).await?
            }
            (None, None) => return Err(Failure::Setup("a node needs a section `node`".to_owned())),
        };
        tokio::spawn(end_on_signal(has_master, stop.clone()));
        let started = Box::pin(serve(Serve {
            config,
            roles,
            data: data.as_ref(),
            demo,
            admin_token: admin_token.filter(|token| !token.is_empty()),
            metrics,
            sockets,
            backends: &backends,
            stop: stop.clone(),
            began,
        }));
        let served = started.await;
        let closed = backends.close().await;
        served?;
        closed?;
        tracing::info!("stopped");
        Ok(())
    };
    (Box::pin(result).await, data)
}

/// What [`serve`] is given.
struct Serve<'a> {
    config: Config,
    roles: Vec<Role>,
    data: Option<&'a DataDir>,
    demo: Option<UpArgs>,
    admin_token: Option<String>,
    metrics: MetricsPage,
    sockets: Sockets,
    backends: &'a Backends,
    stop: CancellationToken,
    began: Instant,
}

/// Starts the services of the roles and runs until `stop`.
async fn serve(all: Serve<'_>) -> Result<(), Failure> {
    let Serve { config, roles, data, demo, admin_token, metrics, sockets, backends, stop, began } =
        all;
    let platform = backends.platform.clone();
    let ingest = Ingest::new(platform.clone());
    let run_began = platform.clock.now();
    backends.begin(&ingest).await?;
    let auth = Auth::new(Arc::clone(&platform.registry), Arc::clone(&platform.clock));
    let bootstrap = bootstrap(backends, &auth, admin_token).await?;
    let demo = match demo {
        Some(args) => {
            let demo = Demo::prepare(&platform, &args).await.map_err(Failure::Running)?;
            Some((demo, args.demo_devices))
        }
        None => None,
    };

    let shares = limits::shares(limits::raise_open_files());
    let mut running = Running { services: Vec::new(), stop: stop.clone() };
    let listeners = sockets.listeners();
    let Sockets { http, mqtt } = sockets;
    let gateway = roles.contains(&Role::Gateway).then(|| {
        let gateway_config = GatewayConfig {
            connections_max: config.gateway.connections_max.min(shares.gateway),
            balancers: config.balancers.clone(),
            ..config.gateway.clone()
        };
        match backends.name_among_others() {
            Some(node) => Gateway::on_node(gateway_config, ingest.clone(), node),
            None => Gateway::new(gateway_config, ingest.clone()),
        }
    });
    if let Some(gateway) = gateway.clone() {
        running.start("gateway", move |stop| async move {
            if let Err(error) = fieldline_gateway::run(gateway, stop).await {
                tracing::error!(%error, "the gateway could not run");
            }
        })?;
    }
    // Answers other nodes too, whether or not this one serves the API.
    let local = gateway.clone().map(|gateway| Arc::new(gateway) as Arc<dyn ChannelControl>);
    let (cluster, calls) = (Arc::clone(&backends.cluster), Arc::clone(&backends.calls));
    let handlers = &backends.handlers;
    let everywhere: Arc<dyn ChannelControl> =
        Arc::new(ClusterChannels::new(backends.node_name(), local, cluster, calls, handlers));
    if roles.contains(&Role::Mqtt) {
        let auth = auth.clone();
        let services = fieldline_mqtt::Services {
            platform: platform.clone(),
            ingest: ingest.clone(),
            auth,
            store: Arc::clone(&backends.client_store),
            node: backends.name_among_others().map(str::to_owned),
        };
        let config = MqttConfig {
            connections_max: config.mqtt.connections_max.min(shares.mqtt),
            balancers: config.balancers.clone(),
            ..MqttConfig::default()
        };
        running.start("mqtt", move |stop| async move {
            let listeners = mqtt
                .into_iter()
                .map(|(_, _, socket)| socket.into_listener())
                .collect::<std::io::Result<Vec<_>>>();
            match listeners {
                Ok(listeners) => {
                    fieldline_mqtt::run(config, listeners, services, stop).await;
                }
                Err(error) => tracing::error!(%error, "the MQTT broker could not run"),
            }
        })?;
    }
    let http_address = http.as_ref().map(|(_, _, address)| *address);
    if let Some((listener, tls, _)) = http {
        let services = fieldline_rest::Services {
            platform: platform.clone(),
            ingest: ingest.clone(),
            auth,
            cluster: Arc::clone(&backends.cluster),
            channels: Arc::clone(&everywhere),
            metrics,
            ready: backends.ready(),
            optional: backends.optional(),
            insight: backends.insight(&ingest),
            system: SystemInfo {
                node: backends.node_name().to_owned(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                listeners: listeners
                    .iter()
                    .map(|(name, address)| ((*name).to_owned(), address.to_string()))
                    .collect(),
            },
        };
        let config = RestConfig {
            requests_per_s_max: config.http.requests_per_s_max,
            balancers: config.balancers.clone(),
            connections_max: RestConfig::default().connections_max.min(shares.http),
            ..RestConfig::default()
        };
        running.start("http", move |stop| async move {
            match TcpListener::from_std(listener) {
                Ok(listener) => {
                    let listeners = vec![RestListener { listener, tls }];
                    fieldline_rest::run(config, listeners, services, stop).await;
                }
                Err(error) => tracing::error!(%error, "the API could not run"),
            }
        })?;
    }
    if let Some(gateway) = &gateway {
        match (backends.name_among_others(), data) {
            (Some(node), _) => {
                let (cluster, node) = (Arc::clone(&backends.cluster), node.to_owned());
                let after = config.gateway.lost_after;
                let patience = LostConfig { after, ..LostConfig::default() };
                tokio::spawn(fieldline_gateway::run_lost(patience, cluster, node, ingest.clone()));
            }
            (None, Some(data)) => {
                let mark = data.join("sessions_since");
                let wait = config.gateway.lost_after;
                let gateway = gateway.clone();
                tokio::spawn(housekeeping::end_former_sessions(gateway, mark, run_began, wait));
            }
            (None, None) => {}
        }
    }
    tokio::spawn(housekeeping::expire(platform.clone()));
    let mark = data.map(|data| data.join("retained_at"));
    tokio::spawn(housekeeping::retain(platform.clone(), Arc::clone(&backends.cluster), mark));
    let mut channels = Vec::new();
    if let Some(gateway) = &gateway {
        gateway.ready(READY_WAIT).await;
        channels = announce::channels(&platform, gateway).await;
    }
    backends.announce(true).await?;
    let started = Started {
        secure: config.http.tls_certificate.is_some(),
        http: http_address,
        mqtt: listeners.into_iter().filter(|(name, _)| *name != "http").collect(),
        bootstrap,
        channels,
        demo_devices: demo.as_ref().map(|(_, devices)| *devices),
        took: began.elapsed(),
    };
    started
        .announce(data)
        .map_err(|error| Failure::Running(format!("cannot write run.json: {error}")))?;
    if let (Some((demo, _)), Some(gateway)) = (demo, gateway) {
        let platform = platform.clone();
        running.start("demo", move |stop| demo.run(gateway, platform, stop))?;
    }

    stop.cancelled().await;
    // Others take over what is owned while connections are drained here.
    if let Err(Failure::Running(error) | Failure::Setup(error)) = backends.announce(false).await {
        tracing::warn!(error, "other nodes could not be told that this one stops");
    }
    running.join().await;
    ingest.flush().await;
    Ok(())
}

/// Makes the first account and administrator where there are none; nodes that start together do it one after the other.
async fn bootstrap(
    backends: &Backends,
    auth: &Auth,
    admin_token: Option<String>,
) -> Result<Option<Bootstrap>, Failure> {
    let turn = cluster::hold(&*backends.cluster, "bootstrap").await.map_err(setup)?;
    tokio::select! {
        made = auth.bootstrap(admin_token) => {
            turn.release();
            made.map_err(setup)
        }
        () = turn.lost() => Err(Failure::Running(
            "the cluster went away while the first account was looked for: start again".to_owned(),
        )),
    }
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

/// The sockets of this node's roles, bound.
struct Sockets {
    http: Option<(std::net::TcpListener, Option<Arc<ReloadingTls>>, SocketAddr)>,
    mqtt: Vec<(&'static str, SocketAddr, MqttSocket)>,
}

impl Sockets {
    async fn bind(config: &Config, roles: &[Role]) -> Result<Self, Failure> {
        let mut sockets = Self { http: None, mqtt: Vec::new() };
        if roles.contains(&Role::Rest) {
            let (listener, address) = bind("http.listen", config.http.listen).await?;
            let files = config.http.tls_certificate.clone().zip(config.http.tls_key.clone());
            let tls = load_tls(files, RestListener::PROTOCOLS)?;
            sockets.http = Some((listener, tls, address));
        }
        if roles.contains(&Role::Mqtt) {
            let (listener, address) = bind("mqtt.listen", config.mqtt.listen).await?;
            sockets.mqtt.push(("mqtt", address, MqttSocket { listener, tls: None }));
            if let Some(wanted) = config.mqtt.listen_tls {
                let files = config.mqtt.tls_certificate.clone().zip(config.mqtt.tls_key.clone());
                let tls = load_tls(files, &["mqtt"])?;
                let (listener, address) = bind("mqtt.listen_tls", wanted).await?;
                sockets.mqtt.push(("mqtts", address, MqttSocket { listener, tls }));
            }
        }
        Ok(sockets)
    }

    /// Name and address of each.
    fn listeners(&self) -> Vec<(&'static str, SocketAddr)> {
        let http = self.http.iter().map(|(_, _, address)| ("http", *address));
        http.chain(self.mqtt.iter().map(|(name, address, _)| (*name, *address))).collect()
    }
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

fn load_tls(
    files: Option<(std::path::PathBuf, std::path::PathBuf)>,
    protocols: &[&str],
) -> Result<Option<Arc<ReloadingTls>>, Failure> {
    let load = |(certificate, key)| {
        ReloadingTls::load(TlsFiles { certificate, key }, protocols).map(Arc::new)
    };
    files.map(load).transpose().map_err(setup)
}

/// A socket that listens, without a runtime yet.
pub(crate) async fn bind(
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
