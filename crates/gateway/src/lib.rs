//! Channels for devices over TCP, TLS and UDP: the link that trackers come by.
//!
//! The registry says which channels there are; [`run`] keeps a listener of each
//! on every event loop and follows changes. What a device says is decoded by
//! the channel's protocol (`fieldline-pvm`), stored through `fieldline-ingest`,
//! and answered only after that: an acknowledgement never leaves before its
//! messages are durable.
//!
//! Several nodes may have the channels of one registry. A device is held by one
//! connection at a time, wherever that is: `presence.rs` says which, and
//! `elsewhere.rs` closes the others, and `lost.rs` tells the end of those
//! whose node is gone.
//!
//! It knows no protocol by name and makes no policy: limits and timeouts are
//! settings of the channel or of [`GatewayConfig`]. Start reading at [`run`],
//! then `tcp.rs` (`Serving::serve`). It may import `contracts`, `ingest`,
//! `model`, `pvm` and `runtime` of the workspace.

mod channel;
mod config;
mod connection;
mod control;
mod drain;
mod elsewhere;
mod event_loop;
mod former;
mod journal;
mod limit;
mod listen;
mod lost;
mod presence;
mod programs;
mod shared;
mod sniff;
mod supervisor;
mod tcp;
mod udp;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use fieldline_ingest::Ingest;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::info;

pub use config::{ConfigError, GatewayConfig};
pub use former::FormerError;
pub use lost::{LOST_KEY, LostConfig, run as run_lost};

use elsewhere::Elsewhere;
use event_loop::EventLoops;
use shared::Shared;
use supervisor::Supervisor;

/// The gateway as others see it: how its channels fare, and a way to close
/// connections. Clones share it. Serves nothing until [`run`].
#[derive(Clone)]
pub struct Gateway {
    shared: Arc<Shared>,
    ready: watch::Sender<bool>,
}

impl Gateway {
    /// A gateway that stores through `ingest`, whose platform it uses.
    ///
    /// Metrics are registered here: install the recorder before.
    #[must_use]
    pub fn new(config: GatewayConfig, ingest: Ingest) -> Self {
        Self::of(config, ingest, None)
    }

    /// The gateway of the node `node`, one of several over the same registry,
    /// state and bus. Its name is unique among them. It follows where devices
    /// connect: one that does so on another node is let go of here.
    ///
    /// Metrics are registered here: install the recorder before.
    #[must_use]
    pub fn on_node(config: GatewayConfig, ingest: Ingest, node: &str) -> Self {
        Self::of(config, ingest, Some(node.to_owned()))
    }

    fn of(config: GatewayConfig, ingest: Ingest, node: Option<String>) -> Self {
        let shared = Arc::new(Shared::new(config, ingest, node));
        Self { shared, ready: watch::Sender::new(false) }
    }

    /// Waits until every channel that can listen does; returns false if that
    /// takes longer than `limit`. Cancel-safe.
    pub async fn ready(&self, limit: Duration) -> bool {
        let mut ready = self.ready.subscribe();
        let waited = tokio::time::timeout(limit, ready.wait_for(|ready| *ready)).await;
        matches!(waited, Ok(Ok(_)))
    }

    /// Connections held now, of all channels.
    #[must_use]
    pub fn connections_count(&self) -> usize {
        let channels = self.shared.channels.read();
        let live = channels.values().filter_map(|entry| entry.live.as_ref());
        live.map(|live| usize::try_from(live.count()).unwrap_or(usize::MAX)).sum()
    }
}

/// How a shutdown went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Connections that were cut because they had not ended in time.
    pub abandoned: usize,
}

/// Serves devices until `shutdown`, then drains.
///
/// Channels come from the registry, and are opened, changed and closed as it
/// changes; one that cannot listen is reported and tried again. On shutdown
/// accepting stops at once, and the gateway is not ready any more. Connections
/// are closed with [`fieldline_model::CloseCode::Shutdown`], not all at once: so that other
/// nodes can take the devices as they come, more than a thousand a second are
/// spread over half of `drain_timeout`. Each stores and answers the frames it
/// has first, and waits for the rest of one that is begun and for the answer
/// to a command on the wire. What is left after `drain_timeout` is cut. To be
/// called once.
///
/// Not cancel-safe: a dropped call leaves the event loops to end by themselves.
///
/// # Errors
///
/// If event loops cannot be started.
pub async fn run(gateway: Gateway, shutdown: CancellationToken) -> io::Result<Drained> {
    let Gateway { shared, ready } = gateway;
    let loops = EventLoops::start(&shared)?;
    let elsewhere = Elsewhere::new(&shared);
    let supervisor = Supervisor { shared: Arc::clone(&shared), loops, ready, elsewhere };
    supervisor.run(&shutdown).await;
    supervisor.ready.send_replace(false);
    let abandoned = supervisor.drain().await;
    supervisor.loops.stop().await;
    shared.ingest.flush().await;
    info!(abandoned, "gateway stopped");
    Ok(Drained { abandoned })
}
