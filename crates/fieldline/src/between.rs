//! The listener for other nodes, on an event loop of its own: it answers before this node is a member, and until all else
//! has ended.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;

use fieldline_contracts::Handlers;
use fieldline_router::calls::{MutualTls, NodeCalls, Security};
use fieldline_runtime::mutual_tls::ReloadingMutualTls;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::node::NodeConfig;
use crate::worker::{Failure, bind, setup};

/// What nodes speak with each other.
const PROTOCOLS: &[&str] = &["h2"];

/// Calls from and to other nodes, while it lives.
pub(crate) struct Between {
    pub(crate) calls: NodeCalls,
    /// Where others reach it.
    pub(crate) address: String,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Between {
    /// Listens, and answers from then on.
    pub(crate) async fn start(node: &NodeConfig) -> Result<Self, Failure> {
        let security = match node.tls_files() {
            None => Security::Plain,
            Some(files) => {
                let tls = ReloadingMutualTls::load(files, &node.name, PROTOCOLS).map_err(setup)?;
                Security::Mutual(Arc::new(move || {
                    let current = tls.current();
                    MutualTls { server: current.server, client: current.client }
                }))
            }
        };
        let plain = matches!(security, Security::Plain);
        let (listener, bound) = bind("node.listen", node.listen).await?;
        if plain {
            tracing::warn!(
                listen = %bound,
                "nodes talk to each other without certificates, which is for a trial on one machine: set node.ca, node.certificate and node.key"
            );
        }
        let failed =
            |error| Failure::Running(format!("cannot start the listener for nodes: {error}"));
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let handle = runtime.handle().clone();
        let calls = NodeCalls::new(&node.name, Handlers::new(), security, handle);
        let stop = CancellationToken::new();
        let (serving, until) = (calls.clone(), stop.clone());
        let thread = std::thread::Builder::new().name("nodes".to_owned()).spawn(move || {
            runtime.block_on(async move {
                match TcpListener::from_std(listener) {
                    Ok(listener) => serving.serve(listener, until).await,
                    Err(error) => tracing::error!(%error, "the listener for nodes could not run"),
                }
            });
        });
        let thread = Some(thread.map_err(failed)?);
        Ok(Self { calls, address: node.announced(bound), stop, thread })
    }

    /// Answers no more, once what is under way has its answer.
    pub(crate) async fn end(mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let joined = tokio::task::spawn_blocking(move || thread.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                tracing::error!("the listener for nodes ended badly");
            }
        }
    }
}

impl Drop for Between {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Where others reach a node that listens at `bound`.
pub(crate) fn announced(scheme: &str, name: &str, bound: SocketAddr) -> String {
    if bound.ip().is_unspecified() {
        format!("{scheme}://{name}:{}", bound.port())
    } else {
        format!("{scheme}://{bound}")
    }
}
