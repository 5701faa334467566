//! The REST API, the WebSocket feed and the console, over HTTP and HTTPS.
//!
//! Every route stands in one table (`routes.rs`) with its right and its
//! documentation: dispatch, the OpenAPI document and the test that tries every
//! route with a foreign account's token all read that table, so a route cannot
//! be in one and not in the other. Handlers are in `api/`; `serve.rs` is the
//! way of a request. There is no web framework between hyper and the table: the
//! last value of a parameter is asked for as often as a file server is asked
//! for files, and should cost about as much.
//!
//! It holds no data: everything is behind the contracts. It may import
//! `fieldline-contracts`, `-model`, `-pvm`, `-runtime`, `-ingest` and `-auth`.
//! Start reading at [`run`].

mod announce;
mod api;
mod app;
mod call;
mod console;
mod document;
mod idempotency;
mod insight;
mod linger;
mod live;
mod numbers;
mod objects;
mod patch;
mod problem;
mod query;
mod route;
mod routes;
mod serve;
mod server;
mod tenants;

use std::sync::Arc;
use std::time::Duration;

use fieldline_auth::Auth;
use fieldline_contracts::{ChannelControl, Cluster, Platform};
use fieldline_ingest::Ingest;
use fieldline_runtime::Balancers;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::warn;

pub use insight::{Insight, Lag, LagCheck, Led, Size, Spread};
pub use server::RestListener;

use app::App;

/// Limits of the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestConfig {
    /// Requests of one account a second, averaged over ten seconds. At least 1.
    pub requests_per_s_max: u32,
    /// Requests of one account that run at once.
    pub running_per_account_max: u32,
    /// Live feeds of one account.
    pub feeds_per_account_max: u32,
    /// Connections held at once; further ones wait in the backlog.
    pub connections_max: usize,
    /// Time for the headers of a request, a TLS handshake, or the next request of a connection.
    pub header_timeout: Duration,
    /// Time for the body of a request.
    pub body_timeout: Duration,
    /// Time for the work of a request.
    pub request_timeout: Duration,
    /// Time for the work of a request that asks to wait (`wait_ms`, at most a minute).
    pub wait_timeout: Duration,
    /// Time that requests in hand have at shutdown.
    pub drain_timeout: Duration,
    /// Who may say on whose behalf they ask.
    pub balancers: Balancers,
}

impl Default for RestConfig {
    fn default() -> Self {
        Self {
            requests_per_s_max: 5_000,
            running_per_account_max: 256,
            feeds_per_account_max: 200,
            connections_max: 4_096,
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(30),
            wait_timeout: Duration::from_secs(75),
            drain_timeout: Duration::from_secs(5),
            balancers: Balancers::default(),
        }
    }
}

/// A reason why the server is not ready, in words; empty when it is.
pub type ReadyCheck = Arc<dyn Fn() -> Vec<String> + Send + Sync>;

/// What is said of this process.
#[derive(Clone, Debug, Default)]
pub struct SystemInfo {
    /// The name of this node.
    pub node: String,
    /// The version of the program.
    pub version: String,
    /// Name and address of each listener (`http`, `mqtt` …).
    pub listeners: Vec<(String, String)>,
}

/// What the API stands on.
#[derive(Clone)]
pub struct Services {
    /// The contracts.
    pub platform: Platform,
    /// The pipeline.
    pub ingest: Ingest,
    /// Sign-in and tokens.
    pub auth: Auth,
    /// The other nodes.
    pub cluster: Arc<dyn Cluster>,
    /// The links that hold channels.
    pub channels: Arc<dyn ChannelControl>,
    /// Renders all metrics in the text format of Prometheus.
    pub metrics: Arc<dyn Fn() -> String + Send + Sync>,
    /// Asked by `/readyz`, besides the channels.
    pub ready: Vec<ReadyCheck>,
    /// What the node can do without for a while, by name: where a check has reasons `/readyz` warns,
    /// since a balancer must not take all nodes away for it, and `GET /nodes` tells them.
    pub optional: Vec<(&'static str, ReadyCheck)>,
    /// What `GET /nodes` tells of the cluster besides who is there.
    pub insight: Insight,
    /// What is said of this process.
    pub system: SystemInfo,
}

/// How serving ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Connections that were cut, since they did not end in time.
    pub abandoned: usize,
}

/// Serves until `shutdown`, then drains.
///
/// The caller binds the listeners. On shutdown, accepting stops at once, feeds
/// are closed, and requests in hand are answered; what is left after
/// `drain_timeout` is abandoned: it ends with the runtime.
pub async fn run(
    config: RestConfig,
    listeners: Vec<RestListener>,
    services: Services,
    shutdown: CancellationToken,
) -> Drained {
    let drain_timeout = config.drain_timeout;
    let places = Arc::new(Semaphore::new(config.connections_max));
    let app = Arc::new(App::new(config, services, shutdown));
    app.tasks.spawn(announce::changes(Arc::clone(&app)));
    let accepting = listeners
        .into_iter()
        .map(|listener| server::accept(Arc::clone(&app), listener, Arc::clone(&places)));
    futures_util::future::join_all(accepting).await;
    app.tasks.close();
    let drained = tokio::time::timeout(drain_timeout, app.tasks.wait()).await.is_ok();
    let abandoned = if drained { 0 } else { app.tasks.len() };
    if abandoned > 0 {
        warn!(abandoned, "drain timeout reached, connections abandoned");
    }
    Drained { abandoned }
}

/// The OpenAPI document of all routes, as JSON.
#[must_use]
pub fn openapi() -> String {
    document::render()
}

/// Reads `text` as the query of every route, each parameter in every way there is. For fuzzing: it
/// must not panic, whatever the text.
#[doc(hidden)]
pub fn read_query(text: &str) {
    for route in routes::ROUTES {
        let names = route.query.iter().map(|param| param.name);
        let Ok(query) = query::Query::read(Some(text), names.clone()) else { continue };
        let _pages = (query.after_id(), query.after_message(), query.limit(1, 1_000));
        for name in names {
            let _read = (query.time(name), query.flag(name), query.number(name, 0, 0..=60_000));
        }
    }
}

/// A row of the table of routes, for tests that go through all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteRow {
    /// The method.
    pub method: &'static str,
    /// The path, with variable parts in braces.
    pub path: &'static str,
    /// The scope that it needs; absent for routes that need none.
    pub scope: Option<fieldline_model::Scope>,
    /// Whether it is for anyone, without signing in.
    pub public: bool,
}

/// Every route that there is.
#[must_use]
pub fn routes() -> Vec<RouteRow> {
    let row = |route: &route::Route| RouteRow {
        method: route.method,
        path: route.path,
        scope: route.scope(),
        public: route.is_public(),
    };
    routes::ROUTES.iter().map(row).collect()
}
