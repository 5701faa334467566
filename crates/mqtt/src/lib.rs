//! The MQTT broker: live messages for an account's clients, and a link of its
//! own for devices that publish JSON.
//!
//! MQTT 3.1.1 and 5 over TCP and TLS, QoS 0 and 1. A client signs in with an
//! API token, which decides the account; each account has a routing table and
//! a bus subscription of its own (`hub.rs`), so nothing of another's can be
//! named, let alone reached. What a client publishes to `ingest/…` goes through
//! `fieldline_ingest::Ingest` and is acknowledged when it is durable; what
//! it publishes to `command/…` is queued by `Commands`. `docs/mqtt.md` is for
//! users.
//!
//! In a cluster each node runs one, and clients see one server: `nodes.rs` gives
//! what they say to the other nodes and keeps one session for each client id,
//! `retained.rs` and `wills.rs` keep what they leave where every node finds it.
//!
//! It is not a general broker: sessions end with their connection, and free
//! topics exist under `client/` only. QoS 2 and persistent sessions have their
//! place in `session.rs`: what a connection owes its client is the queue of
//! `link` and the packet numbers of `inflight`, both made to be kept longer.
//!
//! Start reading at [`run`], then `session.rs`. It may import
//! `fieldline-contracts`, `fieldline-ingest`, `fieldline-auth`,
//! `fieldline-model` and `fieldline-runtime`.

pub mod codec;
mod config;
pub mod encode;
mod fields;
mod handshake;
mod hub;
mod link;
mod metrics;
mod nodes;
pub mod payload;
mod publish;
mod reason;
mod replay;
mod retained;
mod rights;
mod routes;
mod session;
mod stream;
mod topic;
mod wills;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fieldline_auth::Auth;
use fieldline_contracts::{ClientStore, Platform};
use fieldline_ingest::Ingest;
use fieldline_model::AccountId;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

pub use config::{ConfigError, MqttConfig};
use handshake::Handshakes;
use hub::Hub;
use nodes::Nodes;
pub use topic::ROOTS;
use wills::Wills;

/// Wait after the system refused a connection, mostly for want of files.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);
/// Silence after which the system asks whether the peer is still there: 3.1.1
/// clients may turn off the keep alive of the protocol.
const TCP_KEEPALIVE: Duration = Duration::from_secs(120);

/// Gives the TLS settings for the next connection, so that certificates can be reloaded.
pub type Acceptor = Arc<dyn Fn() -> TlsAcceptor + Send + Sync>;

/// A bound listener.
pub struct Listener {
    /// Where clients connect.
    pub listener: TcpListener,
    /// TLS, or none.
    pub tls: Option<Acceptor>,
}

/// What the broker works with.
#[derive(Clone)]
pub struct Services {
    /// State, bus, registry, commands and the clock.
    pub platform: Platform,
    /// The pipeline.
    pub ingest: Ingest,
    /// Sign-in.
    pub auth: Auth,
    /// What clients leave with the server.
    pub store: Arc<dyn ClientStore>,
    /// The name of this node where there may be others.
    pub node: Option<String>,
}

/// How the broker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Connections that were cut because they did not end in time.
    pub abandoned: usize,
}

/// What all connections share.
pub(crate) struct Shared {
    config: Arc<MqttConfig>,
    services: Services,
    hubs: Mutex<HashMap<AccountId, Arc<Hub>>>,
    nodes: Option<Arc<Nodes>>,
    wills: Arc<Wills>,
    sessions: AtomicU64,
    permits: Arc<Semaphore>,
    handshakes: Arc<Handshakes>,
    /// Tasks that serve no one connection.
    background: TaskTracker,
    stop: CancellationToken,
}

impl Shared {
    fn hub(&self, account: AccountId) -> Arc<Hub> {
        let mut hubs = self.hubs.lock();
        let hub = hubs.entry(account).or_insert_with(|| {
            let (config, nodes) = (Arc::clone(&self.config), self.nodes.clone());
            Arc::new(Hub::new(account, config, &self.services, nodes))
        });
        Arc::clone(hub)
    }

    fn hubs(&self) -> Vec<Arc<Hub>> {
        self.hubs.lock().values().cloned().collect()
    }

    fn next_session(&self) -> u64 {
        // From 1: 0 is the server itself.
        self.sessions.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn permit(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.permits).try_acquire_owned().ok()
    }

    /// Lets go of hubs that hold nothing any more.
    fn forget_idle_hubs(&self) {
        // A client that is joining holds the hub too.
        self.hubs.lock().retain(|_, hub| Arc::strong_count(hub) > 1 || !hub.is_idle());
    }
}

/// Serves MQTT clients until `shutdown`, then drains.
///
/// Listeners are bound by the caller, so "port taken" fails at start-up. All
/// connections run on the present runtime. On shutdown accepting stops at once;
/// clients get what is queued for them and, in MQTT 5, a DISCONNECT with reason
/// 0x8B; what has not ended after `drain_timeout` is cut. Wills are not
/// published then.
pub async fn run(
    config: MqttConfig,
    listeners: Vec<Listener>,
    services: Services,
    shutdown: CancellationToken,
) -> Drained {
    let drain_timeout = config.drain_timeout;
    let nodes = services.node.as_ref().map(|_| {
        let Platform { clock, state, .. } = &services.platform;
        Arc::new(Nodes::new(Arc::clone(clock), Arc::clone(state)))
    });
    let (clock, store) = (&services.platform.clock, Arc::clone(&services.store));
    let [a, b, c, d, e, f, g, h, ..] = clock.random();
    let owner = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
    let (wills, will_changes) = Wills::new(owner, store, nodes.is_some());
    let shared = Arc::new(Shared {
        nodes,
        wills,
        permits: Arc::new(Semaphore::new(config.connections_max.min(Semaphore::MAX_PERMITS))),
        handshakes: Arc::new(Handshakes::new(config.handshakes_max)),
        config: Arc::new(config),
        services,
        hubs: Mutex::default(),
        sessions: AtomicU64::new(0),
        background: TaskTracker::new(),
        stop: CancellationToken::new(),
    });
    let (connections, cut) = (TaskTracker::new(), CancellationToken::new());
    let acceptors = TaskTracker::new();
    for listener in listeners {
        let accepting = accept(
            Arc::clone(&shared),
            listener,
            connections.clone(),
            shutdown.clone(),
            cut.clone(),
        );
        acceptors.spawn(accepting);
    }
    acceptors.close();
    shared.background.spawn(rights::watch(Arc::clone(&shared)));
    shared.background.spawn(wills::run(Arc::clone(&shared), will_changes));

    shutdown.cancelled().await;
    acceptors.wait().await;
    shared.stop.cancel();
    for hub in shared.hubs() {
        hub.each_member(|member| member.link.kick(codec::Reason::ServerShuttingDown));
    }
    connections.close();
    let drained = tokio::time::timeout(drain_timeout, connections.wait()).await.is_ok();
    let abandoned = if drained { 0 } else { connections.len() };
    if abandoned > 0 {
        warn!(abandoned, "drain timeout reached, cutting MQTT connections");
    }
    cut.cancel();
    connections.wait().await;
    shared.background.close();
    shared.background.wait().await;
    Drained { abandoned }
}

async fn accept(
    shared: Arc<Shared>,
    Listener { listener, tls }: Listener,
    connections: TaskTracker,
    shutdown: CancellationToken,
    cut: CancellationToken,
) {
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let place = shared.handshakes.enter();
                let (shared, tls, cut) = (Arc::clone(&shared), tls.clone(), cut.clone());
                connections.spawn(async move {
                    let serving = connection(shared, stream, peer, tls, place);
                    tokio::select! {
                        () = cut.cancelled() => {}
                        () = serving => {}
                    }
                });
            }
            Err(error) => {
                warn!(%error, "MQTT connection cannot be accepted, waiting");
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
            }
        }
    }
}

async fn connection(
    shared: Arc<Shared>,
    stream: TcpStream,
    peer: SocketAddr,
    tls: Option<Acceptor>,
    place: handshake::Place,
) {
    let keepalive = socket2::TcpKeepalive::new().with_time(TCP_KEEPALIVE);
    let tuned = stream
        .set_nodelay(true)
        .and_then(|()| socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive));
    if let Err(error) = tuned {
        // It works all the same, only later or longer.
        tracing::debug!(%error, "socket options were refused");
    }
    // Boxed: an idle session must not hold the room that signing in once took.
    let signed_in = tokio::select! {
        () = shared.stop.cancelled() => None,
        () = place.lost() => {
            metrics::refused("displaced");
            None
        }
        signed_in = Box::pin(handshake::handshake(&shared, stream, peer, tls)) => signed_in,
    };
    drop(place);
    drop(shared);
    if let Some((session, stream)) = signed_in {
        session.run(stream).await;
    }
}
