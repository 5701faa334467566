//! Nodes within one process.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::RwLock;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{CallError, Caller, Calls, Duplex, Handlers, TraceParent, fits};

#[derive(Clone)]
struct Member {
    handlers: Handlers,
    cut_off: Arc<AtomicBool>,
    /// Changes whenever it is cut off, so that what is under way breaks.
    cut: watch::Sender<()>,
}

/// A node of several within one process. Dropping it takes it away.
pub struct MemoryCalls {
    name: String,
    own: Member,
    network: Arc<RwLock<HashMap<String, Member>>>,
}

impl MemoryCalls {
    /// The first node of a network.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self::on(Arc::default(), name)
    }

    /// Another node of the same network, in the place of one of the same name.
    #[must_use]
    pub fn beside(&self, name: &str) -> Self {
        Self::on(Arc::clone(&self.network), name)
    }

    fn on(network: Arc<RwLock<HashMap<String, Member>>>, name: &str) -> Self {
        let own = Member {
            handlers: Handlers::new(),
            cut_off: Arc::default(),
            cut: watch::Sender::new(()),
        };
        network.write().insert(name.to_owned(), own.clone());
        Self { name: name.to_owned(), own, network }
    }

    /// What this node is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What this node answers.
    #[must_use]
    pub const fn handlers(&self) -> &Handlers {
        &self.own.handlers
    }

    /// Whether others reach this node, and it them. Calls that are under way break.
    pub fn cut_off(&self, cut_off: bool) {
        self.own.cut_off.store(cut_off, Ordering::Release);
        self.own.cut.send_replace(());
    }

    fn reach(&self, node: &str) -> Result<Member, CallError> {
        let found = self.network.read().get(node).cloned();
        let member = found.ok_or_else(|| CallError::NoSuchNode(node.to_owned()))?;
        let cut = |member: &Member| member.cut_off.load(Ordering::Acquire);
        if node != self.name && (cut(&member) || cut(&self.own)) {
            return Err(unreachable(node));
        }
        Ok(member)
    }

    fn caller(&self, deadline: Duration) -> Caller {
        let trace = TraceParent::next();
        Caller { node: self.name.clone(), deadline: Instant::now() + deadline, trace }
    }
}

fn unreachable(node: &str) -> CallError {
    CallError::Unreachable(format!("{node} cannot be reached"))
}

impl Drop for MemoryCalls {
    fn drop(&mut self) {
        let mut network = self.network.write();
        // Another may have taken its place.
        if network.get(&self.name).is_some_and(|one| Arc::ptr_eq(&one.cut_off, &self.own.cut_off)) {
            network.remove(&self.name);
        }
    }
}

#[async_trait]
impl Calls for MemoryCalls {
    async fn call(
        &self,
        node: &str,
        method: &'static str,
        request: Bytes,
        deadline: Duration,
    ) -> Result<Bytes, CallError> {
        fits(&request)?;
        let member = self.reach(node)?;
        let (mut theirs, mut ours) = (member.cut.subscribe(), self.own.cut.subscribe());
        tokio::select! {
            answer = member.handlers.answer(method, request, self.caller(deadline)) => answer,
            _ = theirs.changed(), if node != self.name => Err(unreachable(node)),
            _ = ours.changed(), if node != self.name => Err(unreachable(node)),
        }
    }

    async fn open(
        &self,
        node: &str,
        method: &'static str,
        hello: Bytes,
        deadline: Duration,
    ) -> Result<Box<dyn Duplex>, CallError> {
        fits(&hello)?;
        let member = self.reach(node)?;
        let stream = member.handlers.accept(method, hello, self.caller(deadline)).await?;
        if node == self.name {
            return Ok(Box::new(stream));
        }
        // Between two nodes it breaks when one is cut off.
        let (mut theirs, mut ours) = (member.cut.subscribe(), self.own.cut.subscribe());
        let (here, mut middle) = tokio::io::duplex(super::STREAM_BUFFER_BYTES);
        let mut stream = stream;
        tokio::spawn(async move {
            tokio::select! {
                // Either side may end it.
                _ = tokio::io::copy_bidirectional(&mut middle, &mut stream) => {}
                _ = theirs.changed() => {}
                _ = ours.changed() => {}
            }
        });
        Ok(Box::new(here))
    }
}
