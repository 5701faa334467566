//! Calls between nodes over HTTP/2 with mutual TLS: `docs/adr/0006-calls-between-nodes.md` is the guideline.
//!
//! [`NodeCalls`] is both sides of one node. Its server, [`NodeCalls::serve`], answers what is in the table of handlers;
//! its client keeps one connection to each node that it has asked. A node is who its certificate says: by name, never by
//! address. Everything is bounded: bytes, calls of one peer and of all, connections, and every wait.
//!
//! `wire.rs` is what is written into headers and bodies, `client.rs` the connections to others, `server.rs` those from
//! others, `pipe.rs` the bytes of streams, and `peers.rs` the one question that the cluster itself asks.

mod client;
mod peers;
mod pipe;
mod server;
#[cfg(test)]
mod tests;
pub mod wire;

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use fieldline_contracts::calls::fits;
use fieldline_contracts::{
    CallError, Caller, Calls, Duplex, Handlers, Membership, Node, TraceParent,
};
use parking_lot::Mutex;
use rustls::{ClientConfig, ServerConfig};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

pub use peers::ClusterPeers;

/// The port that nodes listen on for each other where nothing else is set.
pub const PORT: u16 = 7080;

/// Longest that a connection may take to be made.
const DIAL_MAX: Duration = Duration::from_secs(2);
/// Wait after the first failed dial; it doubles with each.
const BACK_OFF_MIN: Duration = Duration::from_millis(100);
/// Longest wait after a failed dial.
const BACK_OFF_MAX: Duration = Duration::from_secs(2);
/// How often a connection is tried by a ping.
const PING_EVERY: Duration = Duration::from_secs(2);
/// How long the answer to a ping may take: a node that is paused or cut off is noticed after both.
const PING_MAX: Duration = Duration::from_secs(3);
/// Most calls of one peer that are worked on at once.
const CALLS_OF_PEER_MAX: usize = 128;
/// Most calls of all peers that are worked on at once.
const CALLS_MAX: usize = 512;
/// Most streams that one peer has open.
const STREAMS_OF_PEER_MAX: u32 = 8_192;
/// Bytes of one stream that are under way.
const STREAM_WINDOW_BYTES: u32 = 64 << 10;
/// Bytes of all streams of a connection that are under way: so many that one which is not read holds up no other.
const CONNECTION_WINDOW_BYTES: u32 = 1 << 30;
/// Most connections from other nodes.
const CONNECTIONS_MAX: usize = 512;
/// Longest that an end waits for calls that are under way.
const DRAIN_MAX: Duration = Duration::from_secs(1);
/// Longest deadline of a call.
const DEADLINE_MAX: Duration = Duration::from_secs(600);

/// Both directions of mutual TLS, made of one certificate and one authority.
#[derive(Clone)]
pub struct MutualTls {
    /// For connections from others; asks for their certificates.
    pub server: Arc<ServerConfig>,
    /// For connections to others; shows ours.
    pub client: Arc<ClientConfig>,
}

impl std::fmt::Debug for MutualTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MutualTls(…)")
    }
}

/// How nodes know each other.
#[derive(Clone)]
pub enum Security {
    /// Not at all: for several nodes on one machine, to try.
    Plain,
    /// By certificates; asked for anew with each connection, so that changed files are followed.
    Mutual(Arc<dyn Fn() -> MutualTls + Send + Sync>),
}

impl Security {
    const fn scheme(&self) -> &'static str {
        match self {
            Self::Plain => "http",
            Self::Mutual(_) => "https",
        }
    }
}

/// One node's calls, to others and from others. Clones share them.
#[derive(Clone)]
pub struct NodeCalls {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    handlers: Handlers,
    security: Security,
    /// Runs what goes on in the background.
    runtime: Handle,
    membership: OnceLock<watch::Receiver<Arc<Membership>>>,
    peers: Mutex<HashMap<String, Arc<client::Peer>>>,
    served: Mutex<HashMap<String, Arc<server::Served>>>,
    calls: Arc<Semaphore>,
}

impl NodeCalls {
    /// The calls of the node `name`; its connections are kept by `runtime`, whichever runtime asks.
    #[must_use]
    pub fn new(name: &str, handlers: Handlers, security: Security, runtime: Handle) -> Self {
        let inner = Inner {
            name: name.to_owned(),
            handlers,
            security,
            runtime,
            membership: OnceLock::new(),
            peers: Mutex::default(),
            served: Mutex::default(),
            calls: Arc::new(Semaphore::new(CALLS_MAX)),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Finds others among these members from now on, and answers no one else. Until then it knows nobody and answers
    /// whoever has a certificate. Only the first call has an effect.
    pub fn follow(&self, membership: watch::Receiver<Arc<Membership>>) {
        drop(self.inner.membership.set(membership));
    }

    /// What this node answers.
    #[must_use]
    pub fn handlers(&self) -> &Handlers {
        &self.inner.handlers
    }

    fn find(&self, name: &str) -> Result<Node, CallError> {
        let membership = self.inner.membership.get().map(|members| Arc::clone(&members.borrow()));
        let members = membership.iter().flat_map(|membership| &membership.members);
        let found = members.map(|member| &member.node).find(|node| node.name == name);
        found.cloned().ok_or_else(|| CallError::NoSuchNode(name.to_owned()))
    }

    /// Asks a node that need not be a known member.
    ///
    /// # Errors
    ///
    /// As [`Calls::call`].
    pub async fn call_node(
        &self,
        node: &Node,
        method: &'static str,
        request: Bytes,
        deadline: Duration,
    ) -> Result<Bytes, CallError> {
        let deadline = deadline.min(DEADLINE_MAX);
        let began = Instant::now();
        let trace = TraceParent::next();
        let answer = if node.name == self.inner.name {
            self.inner.handlers.answer(method, request, self.own(began + deadline, trace)).await
        } else {
            fits(&request)?;
            let head = self.head(&node.name, deadline, trace, None);
            let ask = Box::pin(self.inner.ask(node, method, head, request));
            let answer = tokio::time::timeout(deadline, ask).await;
            answer.unwrap_or(Err(CallError::DeadlineExceeded))
        };
        note("out", method, answer.as_ref().err(), began);
        answer
    }

    fn own(&self, deadline: Instant, trace: TraceParent) -> Caller {
        Caller { node: self.inner.name.clone(), deadline, trace }
    }

    fn head(
        &self,
        to: &str,
        deadline: Duration,
        trace: TraceParent,
        hello: Option<usize>,
    ) -> wire::Head {
        let (node, to) = (self.inner.name.clone(), to.to_owned());
        wire::Head { node, to, version: wire::Version::OWN, deadline, trace, hello }
    }
}

/// Counts a call and the time that it took.
fn note(direction: &'static str, method: &'static str, error: Option<&CallError>, began: Instant) {
    let outcome = error.map_or("answered", CallError::class);
    metrics::counter!("fieldline_calls_total", "direction" => direction, "method" => method, "outcome" => outcome)
        .increment(1);
    metrics::histogram!("fieldline_call_seconds", "direction" => direction, "method" => method)
        .record(began.elapsed().as_secs_f64());
}

#[async_trait]
impl Calls for NodeCalls {
    async fn call(
        &self,
        node: &str,
        method: &'static str,
        request: Bytes,
        deadline: Duration,
    ) -> Result<Bytes, CallError> {
        if node == self.inner.name {
            let began = Instant::now();
            let own = self.own(began + deadline, TraceParent::next());
            let answer = self.inner.handlers.answer(method, request, own).await;
            note("own", method, answer.as_ref().err(), began);
            return answer;
        }
        self.call_node(&self.find(node)?, method, request, deadline).await
    }

    async fn open(
        &self,
        node: &str,
        method: &'static str,
        hello: Bytes,
        deadline: Duration,
    ) -> Result<Box<dyn Duplex>, CallError> {
        fits(&hello)?;
        let deadline = deadline.min(DEADLINE_MAX);
        let (began, trace) = (Instant::now(), TraceParent::next());
        if node == self.inner.name {
            let own = self.own(began + deadline, trace);
            let handlers = self.inner.handlers.clone();
            let method = method.to_owned();
            // On the runtime of the listener, as it is for others.
            let accepting = async move { handlers.accept(&method, hello, own).await };
            let accepting = pipe::Aborting(self.inner.runtime.spawn(accepting));
            let stream = accepting.await.unwrap_or_else(|| Err(client::shutting_down()))?;
            return Ok(Box::new(stream));
        }
        let found = self.find(node)?;
        let head = self.head(node, deadline, trace, Some(hello.len()));
        let opened =
            tokio::time::timeout(deadline, Box::pin(self.inner.open(&found, method, head, hello)));
        let opened = opened.await.unwrap_or(Err(CallError::DeadlineExceeded));
        note("out", method, opened.as_ref().err(), began);
        opened
    }
}
