//! `Calls`: what nodes ask of each other directly, past the stores that they share.
//!
//! A service registers what it answers in the node's [`Handlers`], and asks others by their names through [`Calls`]. A
//! call is a question and an answer; a stream is a question, an answer, and then bytes both ways for as long as both
//! sides want. A node may ask itself: that takes no network, and all else is the same.
//!
//! A method is a name such as `channels/status`. A node of the version before does not know the newest methods and says
//! [`CallError::NoSuchMethod`]: the caller then does without. What a method means never changes; what changes gets a new
//! name. Requests and answers are whatever the service writes, JSON by habit, and are judged as bytes from outside.

mod memory;
mod trace;

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::RwLock;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

pub use memory::MemoryCalls;
pub use trace::{TraceError, TraceParent};

/// Most bytes of one request, one answer, and what opens a stream: 4 MiB.
pub const CALL_BYTES_MAX: usize = 4 << 20;
/// Longest name of a method, in bytes.
pub const METHOD_BYTES_MAX: usize = 64;
/// Bytes of a stream that wait to be read, each way, before who writes has to wait; a network adds its own.
pub const STREAM_BUFFER_BYTES: usize = 16 << 10;

/// Why a call gave no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// No node of that name is a member. Nothing was done.
    #[error("no node of the cluster has the name {0}")]
    NoSuchNode(String),
    /// The node cannot be reached, or the connection to it broke before the answer came. It may have been done.
    #[error("{0}")]
    Unreachable(String),
    /// No answer came in time. It may have been done.
    #[error("the node gave no answer in time")]
    DeadlineExceeded,
    /// The node does not know this method: its program is older, or it still starts. Nothing was done.
    #[error("the node does not know the method {0}: its program is older, or it still starts")]
    NoSuchMethod(String),
    /// The node does not do this now: too many calls at once, too large a request, or it says no. Nothing was done.
    #[error("{0}")]
    Refused(String),
    /// The node tried and failed, with this reason.
    #[error("{0}")]
    Failed(String),
}

impl CallError {
    /// Whether it is certain that the other node has done nothing, so that asking again, or another node, does nothing
    /// twice.
    #[must_use]
    pub const fn nothing_was_done(&self) -> bool {
        matches!(self, Self::NoSuchNode(_) | Self::NoSuchMethod(_) | Self::Refused(_))
    }

    /// A short name for metrics.
    #[must_use]
    pub const fn class(&self) -> &'static str {
        match self {
            Self::NoSuchNode(_) => "no_such_node",
            Self::Unreachable(_) => "unreachable",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::NoSuchMethod(_) => "no_such_method",
            Self::Refused(_) => "refused",
            Self::Failed(_) => "failed",
        }
    }
}

/// Bytes both ways between two nodes.
///
/// Shutting it down for writing is seen by the other side as the end of what it reads; the other direction goes on.
/// Dropping it ends both. A stream whose other node died ends as well, by an end or an error: whoever must know that all
/// was said says so in his own words.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Asks other nodes.
#[async_trait]
pub trait Calls: Send + Sync + 'static {
    /// Asks `node`, which may be this one, and waits for the answer until `deadline` has gone by.
    ///
    /// Cancel-safe: the other node gives up too when the future is dropped, but may have done it already.
    ///
    /// # Errors
    ///
    /// [`CallError`]; what the handler says comes as it said it.
    async fn call(
        &self,
        node: &str,
        method: &'static str,
        request: Bytes,
        deadline: Duration,
    ) -> Result<Bytes, CallError>;

    /// Opens a stream: `hello` is what the handler judges before it accepts, and `deadline` is for its answer alone; the
    /// stream then lasts until both sides have ended it or one of them is gone.
    ///
    /// Cancel-safe: a stream that is opened for a dropped future ends at once.
    ///
    /// # Errors
    ///
    /// [`CallError`]; what the handler says comes as it said it.
    async fn open(
        &self,
        node: &str,
        method: &'static str,
        hello: Bytes,
        deadline: Duration,
    ) -> Result<Box<dyn Duplex>, CallError>;
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The node, as its certificate says where nodes have certificates.
    pub node: String,
    /// Until when the answer is of use: the handler is dropped then.
    pub deadline: Instant,
    /// What this belongs to. Calls that the handler makes carry it on by themselves.
    pub trace: TraceParent,
}

type Answer<T> = Pin<Box<dyn Future<Output = Result<T, CallError>> + Send>>;
type CallHandler = Arc<dyn Fn(Bytes, Caller) -> Answer<Bytes> + Send + Sync>;
type Done = Pin<Box<dyn Future<Output = ()> + Send>>;
type StreamHandler = Arc<dyn Fn(Opening, Caller) -> Done + Send + Sync>;

#[derive(Clone)]
enum Handler {
    Call(CallHandler),
    Stream(StreamHandler),
}

/// What a node answers: a table that services fill at wiring, and that the node's listener for other nodes serves.
///
/// Clones share it.
#[derive(Clone, Default)]
pub struct Handlers {
    table: Arc<RwLock<HashMap<&'static str, Handler>>>,
}

impl std::fmt::Debug for Handlers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.table.read().keys()).finish()
    }
}

impl Handlers {
    /// An empty table.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Answers calls of `method` from now on, in the place of who did before.
    ///
    /// The handler's future is dropped, at whichever `await` it is, when the deadline has gone by or the caller has gone
    /// away. It runs on the runtime of the listener, which it must not block.
    ///
    /// # Panics
    ///
    /// If the name is not 1 to [`METHOD_BYTES_MAX`] bytes of `a-z`, `0-9`, `-`, `_` and `/`.
    pub fn on_call<F>(
        &self,
        method: &'static str,
        handler: impl Fn(Bytes, Caller) -> F + Send + Sync + 'static,
    ) where
        F: Future<Output = Result<Bytes, CallError>> + Send + 'static,
    {
        let handler: CallHandler =
            Arc::new(move |request, caller| Box::pin(handler(request, caller)));
        self.put(method, Handler::Call(handler));
    }

    /// Answers streams of `method` from now on, in the place of who did before.
    ///
    /// The handler judges [`Opening::hello`], then accepts or refuses. Until then its future may be dropped as that of a
    /// call is; once it has accepted it runs to its end, and learns from the stream that the other side is gone.
    ///
    /// # Panics
    ///
    /// As [`Handlers::on_call`].
    pub fn on_stream<F>(
        &self,
        method: &'static str,
        handler: impl Fn(Opening, Caller) -> F + Send + Sync + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let handler: StreamHandler =
            Arc::new(move |opening, caller| Box::pin(handler(opening, caller)));
        self.put(method, Handler::Stream(handler));
    }

    fn put(&self, method: &'static str, handler: Handler) {
        assert!(is_method(method), "`{method}` is no name of a method");
        self.table.write().insert(method, handler);
    }

    /// The name as it was registered: bounded, so that it can be a label.
    #[must_use]
    pub fn known(&self, method: &str) -> Option<&'static str> {
        self.table.read().get_key_value(method).map(|(name, _)| *name)
    }

    fn find(&self, method: &str) -> Option<Handler> {
        self.table.read().get(method).cloned()
    }

    /// Runs the handler of a call until the caller's deadline; for backends.
    ///
    /// # Errors
    ///
    /// What the handler says; [`CallError::NoSuchMethod`], [`CallError::DeadlineExceeded`], [`CallError::Refused`] and
    /// [`CallError::Failed`] for what is larger than [`CALL_BYTES_MAX`].
    pub async fn answer(
        &self,
        method: &str,
        request: Bytes,
        caller: Caller,
    ) -> Result<Bytes, CallError> {
        fits(&request)?;
        let Some(Handler::Call(handler)) = self.find(method) else {
            return Err(CallError::NoSuchMethod(method.to_owned()));
        };
        let (deadline, trace) = (caller.deadline, caller.trace);
        let answered = timeout_at(deadline, trace.scope(handler(request, caller))).await;
        let answer = answered.map_err(|_| CallError::DeadlineExceeded)??;
        if answer.len() > CALL_BYTES_MAX {
            let text = format!(
                "the answer to {method} has {} bytes; at most {CALL_BYTES_MAX} can be sent",
                answer.len()
            );
            return Err(CallError::Failed(text));
        }
        Ok(answer)
    }

    /// Runs the handler of a stream until it accepts, and on in the background from then; for backends. Must be called on
    /// a tokio runtime.
    ///
    /// # Errors
    ///
    /// As [`Handlers::answer`].
    pub async fn accept(
        &self,
        method: &str,
        hello: Bytes,
        caller: Caller,
    ) -> Result<DuplexStream, CallError> {
        fits(&hello)?;
        let Some(Handler::Stream(handler)) = self.find(method) else {
            return Err(CallError::NoSuchMethod(method.to_owned()));
        };
        let (deadline, trace) = (caller.deadline, caller.trace);
        let (sender, accepted) = oneshot::channel();
        let opening = Opening { hello, sender };
        let mut running = AbortOnDrop(Some(tokio::spawn(trace.scope(handler(opening, caller)))));
        let accepted = timeout_at(deadline, accepted).await;
        let accepted = accepted.map_err(|_| CallError::DeadlineExceeded)?;
        let silent = || CallError::Failed(format!("{method} neither accepted nor refused"));
        let stream = accepted.map_err(|_| silent())??;
        // It runs to its end by itself.
        running.0.take();
        Ok(stream)
    }
}

fn is_method(method: &str) -> bool {
    (1..=METHOD_BYTES_MAX).contains(&method.len())
        && method
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_/".contains(&b))
}

/// Refuses what is too large to be sent; for backends, which ask before anything is sent.
///
/// # Errors
///
/// [`CallError::Refused`].
pub fn fits(request: &Bytes) -> Result<(), CallError> {
    if request.len() <= CALL_BYTES_MAX {
        return Ok(());
    }
    let text = format!(
        "a request to another node has {} bytes; at most {CALL_BYTES_MAX} can be sent",
        request.len()
    );
    Err(CallError::Refused(text))
}

struct AbortOnDrop(Option<tokio::task::JoinHandle<()>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        if let Some(running) = &self.0 {
            running.abort();
        }
    }
}

/// A stream that another node asks for. Dropping it without a word fails it.
pub struct Opening {
    hello: Bytes,
    sender: oneshot::Sender<Result<DuplexStream, CallError>>,
}

impl std::fmt::Debug for Opening {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Opening({} bytes)", self.hello.len())
    }
}

impl Opening {
    /// What the other node said first.
    #[must_use]
    pub const fn hello(&self) -> &Bytes {
        &self.hello
    }

    /// Accepts it. If the caller is gone by now the stream is at its end.
    #[must_use]
    pub fn accept(self) -> Box<dyn Duplex> {
        let (here, there) = tokio::io::duplex(STREAM_BUFFER_BYTES);
        drop(self.sender.send(Ok(there)));
        Box::new(here)
    }

    /// Refuses it.
    pub fn refuse(self, error: CallError) {
        drop(self.sender.send(Err(error)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::calls as suite;

    #[tokio::test]
    async fn calls_within_a_process_keep_the_contract() {
        let network = MemoryCalls::new("first");
        let counter = std::sync::atomic::AtomicUsize::new(0);
        suite::run(async || {
            let number = counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let calls = network.beside(&format!("node-{number}"));
            let handlers = calls.handlers().clone();
            suite::TestNode { name: calls.name().to_owned(), handlers, calls: Arc::new(calls) }
        })
        .await;
    }

    #[tokio::test]
    async fn a_node_that_is_cut_off_or_gone_is_not_asked() {
        let here = MemoryCalls::new("here");
        let there = here.beside("there");
        there.handlers().on_call("echo", |request, _| async move { Ok(request) });
        let ask = || here.call("there", "echo", Bytes::from_static(b"a"), Duration::from_secs(5));
        assert_eq!(ask().await, Ok(Bytes::from_static(b"a")));
        there.cut_off(true);
        assert!(matches!(ask().await, Err(CallError::Unreachable(_))));
        there.cut_off(false);
        assert_eq!(ask().await, Ok(Bytes::from_static(b"a")));
        drop(there);
        assert_eq!(ask().await, Err(CallError::NoSuchNode("there".to_owned())));
    }

    #[test]
    #[should_panic(expected = "no name of a method")]
    fn a_method_has_a_plain_name() {
        Handlers::new().on_call("Not so", |request, _| async move { Ok(request) });
    }
}
