//! What all requests share.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bytes::Bytes;
use fieldline_contracts::{Platform, Registry};
use hyper::{Method, StatusCode};
use metrics::Counter;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::protocols::Programs;
use crate::idempotency::Idempotency;
use crate::route::Route;
use crate::routes::ROUTES;
use crate::server::Connections;
use crate::tenants::{TenantLimits, Tenants};
use crate::{RestConfig, Services};

/// Live feeds that have not said yet who they are.
const NAMELESS_MAX: usize = 256;

/// Playground runs at once: each may use a core for a while.
const DECODES_AT_ONCE_MAX: usize = 2;

pub(crate) struct App {
    pub(crate) config: RestConfig,
    pub(crate) services: Services,
    pub(crate) tenants: Tenants,
    pub(crate) idempotency: Idempotency,
    pub(crate) programs: Programs,
    pub(crate) connections: Connections,
    pub(crate) decodes: Semaphore,
    pub(crate) nameless: Arc<Semaphore>,
    /// Held while a user with the scope `root` may go: of two at once, one has to stay.
    pub(crate) roots: tokio::sync::Mutex<()>,
    pub(crate) openapi: Bytes,
    pub(crate) started: Instant,
    pub(crate) shutdown: CancellationToken,
    pub(crate) tasks: TaskTracker,
    router: matchit::Router<Vec<usize>>,
    counters: Vec<Counters>,
    pub(crate) unmatched: Counters,
}

/// Metrics of one route. A series begins with the first request that it counts.
pub(crate) struct Counters {
    method: &'static str,
    path: &'static str,
    /// By the hundreds of the status: 1xx to 5xx.
    requests: [OnceLock<Counter>; 5],
    micros: OnceLock<Counter>,
}

impl Counters {
    fn of(method: &'static str, path: &'static str) -> Self {
        Self { method, path, requests: Default::default(), micros: OnceLock::new() }
    }

    /// Counts a request that was answered with `status`, `micros` after it came.
    pub(crate) fn count(&self, status: StatusCode, micros: u64) {
        const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];
        let (method, route) = (self.method, self.path);
        let at = usize::from(status.as_u16() / 100).saturating_sub(1);
        if let (Some(counter), Some(class)) = (self.requests.get(at), CLASSES.get(at)) {
            let fresh = || metrics::counter!("fieldline_http_requests_total", "method" => method, "route" => route, "status" => *class);
            counter.get_or_init(fresh).increment(1);
        }
        let fresh = || metrics::counter!("fieldline_http_request_micros_total", "method" => method, "route" => route);
        self.micros.get_or_init(fresh).increment(micros);
    }
}

impl App {
    pub(crate) fn new(config: RestConfig, services: Services, shutdown: CancellationToken) -> Self {
        let mut by_path: Vec<(&'static str, Vec<usize>)> = Vec::new();
        for (at, route) in ROUTES.iter().enumerate() {
            match by_path.iter_mut().find(|(path, _)| *path == route.path) {
                Some((_, all)) => all.push(at),
                None => by_path.push((route.path, vec![at])),
            }
        }
        let mut router = matchit::Router::new();
        for (path, all) in by_path {
            // The paths are ours; a test inserts each of them.
            if let Err(error) = router.insert(path, all) {
                tracing::error!(path, %error, "a route cannot be reached");
            }
        }
        let limits = TenantLimits {
            requests_per_s_max: config.requests_per_s_max,
            running_max: config.running_per_account_max,
            feeds_max: config.feeds_per_account_max,
        };
        Self {
            tenants: Tenants::new(limits),
            idempotency: Idempotency::default(),
            programs: Programs::new(),
            connections: Connections::default(),
            decodes: Semaphore::new(DECODES_AT_ONCE_MAX),
            nameless: Arc::new(Semaphore::new(NAMELESS_MAX)),
            roots: tokio::sync::Mutex::default(),
            openapi: Bytes::from(crate::openapi()),
            started: Instant::now(),
            shutdown,
            tasks: TaskTracker::new(),
            router,
            counters: ROUTES.iter().map(|route| Counters::of(route.method, route.path)).collect(),
            unmatched: Counters::of("any", "other"),
            config,
            services,
        }
    }

    pub(crate) fn platform(&self) -> &Platform {
        &self.services.platform
    }

    pub(crate) fn registry(&self) -> &Arc<dyn Registry> {
        &self.services.platform.registry
    }

    /// The routes of `path`, and the variable parts of it as they stand.
    pub(crate) fn find(&self, path: &str) -> Option<(&[usize], Vec<String>)> {
        let found = self.router.at(path).ok()?;
        let decode = |raw: &str| {
            percent_encoding::percent_decode_str(raw).decode_utf8().map(|text| text.into_owned())
        };
        // What is no UTF-8 names nothing that exists.
        let parts: Result<Vec<String>, _> =
            found.params.iter().map(|(_, value)| decode(value)).collect();
        Some((found.value, parts.ok()?))
    }

    /// The one of `routes` for `method`, with its metrics.
    pub(crate) fn pick(
        &self,
        routes: &[usize],
        method: &Method,
    ) -> Option<(&'static Route, &Counters)> {
        let at = routes.iter().find(|at| ROUTES.get(**at).is_some_and(|route| route.is(method)))?;
        Some((ROUTES.get(*at)?, self.counters.get(*at)?))
    }

    /// Methods of `routes`, for `Allow`.
    pub(crate) fn allowed(routes: &[usize]) -> String {
        let methods = routes.iter().filter_map(|at| Some(ROUTES.get(*at)?.method));
        methods.collect::<Vec<_>>().join(", ")
    }
}

/// Named values by text, for what is looked up by name.
pub(crate) type ByName<T> = HashMap<String, T>;
