//! Connections from other nodes.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fieldline_contracts::calls::CALL_BYTES_MAX;
use fieldline_contracts::{CallError, Caller};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http2::Builder;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument as _, debug, info_span, warn};

use super::pipe::{Outgoing, ReadError, pump, read_all, read_first};
use super::wire::{self, Head, PROBLEM_TYPE, Version};
use super::{
    CALLS_OF_PEER_MAX, CONNECTION_WINDOW_BYTES, CONNECTIONS_MAX, DEADLINE_MAX, DIAL_MAX, DRAIN_MAX,
    NodeCalls, PING_EVERY, PING_MAX, STREAM_WINDOW_BYTES, STREAMS_OF_PEER_MAX, Security, note,
};

/// Wait after a connection could not be taken.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// How long a node that is not known yet may take to become a member.
const MEMBER_WAIT: Duration = Duration::from_secs(1);
/// How often a refused connection is told of.
const TELL_EVERY: Duration = Duration::from_secs(10);
/// Most peers whose calls are counted: those that have none are let go of beyond it.
const SERVED_MAX: usize = 1_024;
/// Most bytes of a request's headers.
const HEADER_BYTES_MAX: u32 = 16 << 10;

/// What one peer may have under way.
pub(super) struct Served {
    calls: Arc<Semaphore>,
}

/// Tells of refused connections, now and then.
#[derive(Default)]
struct Tell {
    last: Option<Instant>,
    untold: u64,
}

impl NodeCalls {
    /// Answers other nodes until `stop`; then calls that are under way have a second.
    pub async fn serve(&self, listener: TcpListener, stop: CancellationToken) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let tell = Arc::new(Mutex::new(Tell::default()));
        let tasks = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "a connection of another node could not be taken");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                    continue;
                }
            };
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                metrics::counter!("fieldline_calls_connections_refused_total").increment(1);
                continue;
            };
            let (calls, stop, tell) = (self.clone(), stop.clone(), Arc::clone(&tell));
            tasks.spawn(async move {
                metrics::gauge!("fieldline_calls_connections").increment(1.0);
                if let Err(reason) = Box::pin(calls.connection(stream, stop)).await {
                    metrics::counter!("fieldline_calls_connections_refused_total").increment(1);
                    let mut tell = tell.lock();
                    if tell.last.is_none_or(|last| last.elapsed() >= TELL_EVERY) {
                        let untold = std::mem::take(&mut tell.untold);
                        warn!(%address, reason, untold, "a connection to the listener for nodes was refused");
                        tell.last = Some(Instant::now());
                    } else {
                        tell.untold += 1;
                    }
                }
                metrics::gauge!("fieldline_calls_connections").decrement(1.0);
                drop(place);
            });
        }
        tasks.close();
        timeout(DRAIN_MAX * 2, tasks.wait()).await.unwrap_or_default();
    }

    /// Serves a connection to its end. The error is for one that came to nothing.
    async fn connection(&self, stream: TcpStream, stop: CancellationToken) -> Result<(), String> {
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        match &self.inner.security {
            Security::Plain => self.requests(stream, None, stop).await,
            Security::Mutual(current) => {
                let accepting = TlsAcceptor::from(current().server).accept(stream);
                let accepted = timeout(DIAL_MAX, accepting).await;
                let stream = accepted
                    .map_err(|_| format!("no certificate was shown in {DIAL_MAX:?}"))?
                    .map_err(|error| {
                        format!(
                            "{error}: nodes need certificates of one authority, the one in node.ca"
                        )
                    })?;
                let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
                let shown = shown.ok_or("no certificate was shown")?.clone().into_owned();
                self.requests(stream, Some(shown), stop).await;
            }
        }
        Ok(())
    }

    async fn requests<S>(
        &self,
        stream: S,
        shown: Option<CertificateDer<'static>>,
        stop: CancellationToken,
    ) where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let identity = Arc::new(Identity { shown, known: Mutex::default() });
        let calls = self.clone();
        let service = service_fn(move |request| {
            let (calls, identity) = (calls.clone(), Arc::clone(&identity));
            async move { Ok::<_, Infallible>(Box::pin(calls.request(&identity, request)).await) }
        });
        let connection = Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_concurrent_streams(STREAMS_OF_PEER_MAX)
            .max_header_list_size(HEADER_BYTES_MAX)
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_MAX)
            .serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                timeout(DRAIN_MAX, connection).await.unwrap_or(Ok(()))
            }
        };
        if let Err(error) = ended {
            debug!(%error, "a connection of another node ended");
        }
    }

    async fn request(&self, identity: &Identity, request: Request<Incoming>) -> Response<Outgoing> {
        let began = Instant::now();
        let method = wire::method(request.uri().path()).map(ToOwned::to_owned);
        let label = method.as_deref().and_then(|name| self.inner.handlers.known(name));
        let answer = match method {
            Some(method) if request.method() == Method::POST => {
                self.answer(identity, &method, request, began).await
            }
            _ => Err(CallError::NoSuchMethod(request.uri().path().chars().take(64).collect())),
        };
        note("in", label.unwrap_or("unknown"), answer.as_ref().err(), began);
        let mut response = match answer {
            Ok(body) => Response::new(body),
            Err(error) => {
                let (status, body) = wire::problem(&error);
                let mut response = Response::new(Outgoing::bytes(body));
                *response.status_mut() =
                    StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
                response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(PROBLEM_TYPE));
                response
            }
        };
        if let Ok(version) = HeaderValue::from_str(&Version::OWN.to_string()) {
            response.headers_mut().insert("fieldline-version", version);
        }
        response
    }

    async fn answer(
        &self,
        identity: &Identity,
        method: &str,
        request: Request<Incoming>,
        began: Instant,
    ) -> Result<Outgoing, CallError> {
        let Head { node, to, version, deadline, trace, hello } = Head::read(request.headers())?;
        if to != self.inner.name {
            return Err(CallError::Refused(format!(
                "this is {}, and {to} was meant: check node.address of {to}",
                self.inner.name
            )));
        }
        if !version.fits(Version::OWN) {
            let own = Version::OWN;
            return Err(CallError::Refused(format!(
                "this node runs version {own} and {node} runs {version}: nodes may be one minor version apart, update the older"
            )));
        }
        identity.is(&node)?;
        let deadline = began + deadline.min(DEADLINE_MAX);
        timeout_at(deadline, self.check_member(&node))
            .await
            .map_err(|_| CallError::DeadlineExceeded)??;
        let served = self.served(&node);
        let busy = |_| {
            CallError::Refused(
                "this node has as many calls under way as it may: try again in a moment".to_owned(),
            )
        };
        let of_peer = Arc::clone(&served.calls).try_acquire_owned().map_err(busy)?;
        let of_all = Arc::clone(&self.inner.calls).try_acquire_owned().map_err(busy)?;
        let span = info_span!("call", method, node = %node, trace = %trace.trace_id());
        let caller = Caller { node, deadline, trace };
        let handlers = &self.inner.handlers;
        let work = async {
            let Some(bytes) = hello else {
                let body =
                    timeout_at(deadline, read_all(request.into_body(), CALL_BYTES_MAX)).await;
                let body = body.map_err(|_| CallError::DeadlineExceeded)?;
                let body = body.map_err(|error| match error {
                    ReadError::TooLong => {
                        CallError::Refused(format!("a request has at most {CALL_BYTES_MAX} bytes"))
                    }
                    ReadError::Broken(error) => CallError::Unreachable(error.to_string()),
                })?;
                return handlers.answer(method, body, caller).await.map(Outgoing::bytes);
            };
            if bytes > CALL_BYTES_MAX {
                let text = format!("what opens a stream has at most {CALL_BYTES_MAX} bytes");
                return Err(CallError::Refused(text));
            }
            let mut body = request.into_body();
            let first = timeout_at(deadline, read_first(&mut body, bytes)).await;
            let first = first.map_err(|_| CallError::DeadlineExceeded)?;
            let cut = || CallError::Refused("what opens the stream did not come whole".to_owned());
            let (hello, left) = first.ok_or_else(cut)?;
            let stream = handlers.accept(method, hello, caller).await?;
            let (reader, writer) = tokio::io::split(stream);
            tokio::spawn(pump(left, body, writer));
            Ok(Outgoing::stream(Bytes::new(), reader))
        };
        let answer = work.instrument(span).await;
        drop((of_peer, of_all));
        answer
    }

    /// Only members are answered, as far as they are known. One that has just joined may be known in a moment.
    async fn check_member(&self, node: &str) -> Result<(), CallError> {
        let Some(members) = self.inner.membership.get() else { return Ok(()) };
        let mut members = members.clone();
        let known = members.wait_for(|all| {
            let any = all.members.iter().any(|member| member.node.name == node);
            // Nothing is known before the first contact.
            any || all.members.is_empty()
        });
        match timeout(MEMBER_WAIT, known).await {
            Ok(_) => Ok(()),
            Err(_) => Err(CallError::Refused(format!("{node} is no member of this cluster"))),
        }
    }

    fn served(&self, node: &str) -> Arc<Served> {
        let mut served = self.inner.served.lock();
        if served.len() >= SERVED_MAX {
            served.retain(|_, one| one.calls.available_permits() < CALLS_OF_PEER_MAX);
        }
        let fresh = || Arc::new(Served { calls: Arc::new(Semaphore::new(CALLS_OF_PEER_MAX)) });
        Arc::clone(served.entry(node.to_owned()).or_insert_with(fresh))
    }
}

/// Who is at the other end of a connection.
struct Identity {
    shown: Option<CertificateDer<'static>>,
    /// The name that was looked for last, and found.
    known: Mutex<Option<String>>,
}

impl Identity {
    /// Whether it is the node that it says.
    fn is(&self, name: &str) -> Result<(), CallError> {
        let Some(shown) = &self.shown else { return Ok(()) };
        let mut known = self.known.lock();
        if known.as_deref() == Some(name) {
            return Ok(());
        }
        let parsed = rustls::server::ParsedCertificate::try_from(shown).ok();
        let wanted = ServerName::try_from(name).ok();
        let is = parsed.zip(wanted).is_some_and(|(parsed, wanted)| {
            rustls::client::verify_server_name(&parsed, &wanted).is_ok()
        });
        if !is {
            return Err(CallError::Refused(format!(
                "the certificate that was shown is not for {name}: each node needs one of its own name"
            )));
        }
        *known = Some(name.to_owned());
        Ok(())
    }
}
