//! Listeners and connections.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use fieldline_runtime::balancers::Header;
use fieldline_runtime::tls::ReloadingTls;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::app::App;
use crate::linger;
use crate::serve::{Origin, serve};

/// A bound listener, with TLS if it has a certificate.
pub struct RestListener {
    /// Where connections come in; the caller binds it, so that a port in use fails at the start.
    pub listener: TcpListener,
    /// The certificate, followed by changes of its files; its protocols should be
    /// [`RestListener::PROTOCOLS`]. Without one it is plain HTTP.
    pub tls: Option<Arc<ReloadingTls>>,
}

impl RestListener {
    /// What to offer by ALPN.
    pub const PROTOCOLS: &'static [&'static str] = &["h2", "http/1.1"];
}

/// Pause after the system refused a connection, usually for want of file handles.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);
/// Most requests of one HTTP/2 connection at once.
const STREAMS_MAX: u32 = 64;
/// Most bytes of the headers of one request.
const HEADER_BYTES_MAX: u32 = 32 << 10;
/// How often a silent HTTP/2 connection is asked whether it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// The connections of all listeners, so that at the limit the one that was idle for longest gives
/// way: silent ones cannot keep others out.
#[derive(Default)]
pub(crate) struct Connections {
    all: Mutex<HashMap<u64, Arc<Held>>>,
    last: AtomicU64,
}

/// One connection.
struct Held {
    /// Requests that run on it.
    running: AtomicUsize,
    idle_since: Mutex<Instant>,
    leave: CancellationToken,
}

impl Connections {
    fn add(&self) -> (u64, Arc<Held>) {
        let held = Arc::new(Held {
            running: AtomicUsize::new(0),
            idle_since: Mutex::new(Instant::now()),
            leave: CancellationToken::new(),
        });
        let id = self.last.fetch_add(1, Ordering::Relaxed);
        self.all.lock().insert(id, Arc::clone(&held));
        (id, held)
    }

    /// Ends the connection that was idle for longest, if any is.
    fn end_idle(&self) {
        let all = self.all.lock();
        let idle = all
            .values()
            .filter(|held| held.running.load(Ordering::Acquire) == 0 && !held.leave.is_cancelled());
        if let Some(oldest) = idle.min_by_key(|held| *held.idle_since.lock()) {
            metrics::counter!("fieldline_http_idle_ended_total").increment(1);
            oldest.leave.cancel();
        }
    }
}

/// A request that runs; dropped at its end.
struct Running(Arc<Held>);

impl Held {
    fn running(self: &Arc<Self>) -> Running {
        self.running.fetch_add(1, Ordering::AcqRel);
        Running(Arc::clone(self))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        *self.0.idle_since.lock() = Instant::now();
        self.0.running.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Accepts until shutdown.
pub(crate) async fn accept(app: Arc<App>, listener: RestListener, places: Arc<Semaphore>) {
    let RestListener { listener, tls } = listener;
    loop {
        let accepted = tokio::select! {
            () = app.shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "accepting an HTTP connection failed");
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
                continue;
            }
        };
        if places.available_permits() == 0 {
            app.connections.end_idle();
        }
        // Where all are busy, the next ones wait in the system's queue.
        let place = tokio::select! {
            () = app.shutdown.cancelled() => break,
            place = Arc::clone(&places).acquire_owned() => place,
        };
        let Ok(place) = place else { break };
        let (served, tls) = (Arc::clone(&app), tls.clone());
        app.tasks.spawn(async move {
            let (id, held) = served.connections.add();
            let ended = tokio::select! {
                ended = connection(Arc::clone(&served), &held, stream, peer, tls) => ended,
                () = held.leave.cancelled() => Ok(()),
            };
            if let Err(error) = ended {
                debug!(%peer, %error, "connection ended");
            }
            served.connections.all.lock().remove(&id);
            drop(place);
        });
    }
}

async fn connection(
    app: Arc<App>,
    held: &Arc<Held>,
    mut stream: TcpStream,
    peer: SocketAddr,
    tls: Option<Arc<ReloadingTls>>,
) -> io::Result<()> {
    let named = app.config.balancers.peer(&mut stream, peer, Header::Optional).await;
    let peer = named.map_err(io::Error::other)?;
    // Answers are written whole: waiting to fill a packet would only delay them.
    stream.set_nodelay(true)?;
    let (stream, owner) = linger::lend(stream);
    let ended = match tls {
        None => http1(&app, held, stream, Origin { peer, secure: false }).await,
        Some(tls) => {
            let handshake = timeout(app.config.header_timeout, tls.acceptor().accept(stream));
            let stream = handshake.await.map_err(|_| io::ErrorKind::TimedOut)??;
            let origin = Origin { peer, secure: true };
            if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
                http2(&app, held, stream, origin).await
            } else {
                http1(&app, held, stream, origin).await
            }
        }
    };
    owner.close().await;
    ended.map_err(io::Error::other)
}

/// Serves the requests of one connection.
fn service(
    app: &Arc<App>,
    held: &Arc<Held>,
    origin: Origin,
) -> impl Service<
    Request<Incoming>,
    Response = Response<Full<Bytes>>,
    Error = Infallible,
    Future: Send + 'static,
> + use<> {
    let (app, held) = (Arc::clone(app), Arc::clone(held));
    service_fn(move |request| {
        let (app, running) = (Arc::clone(&app), held.running());
        async move {
            let response = serve(app, origin, request).await;
            drop(running);
            Ok(response)
        }
    })
}

/// Runs a connection to its end; from the shutdown on, to that of the requests in hand.
async fn to_its_end<C: Future<Output = hyper::Result<()>>>(
    app: &App,
    connection: C,
    leave: impl FnOnce(Pin<&mut C>),
) -> hyper::Result<()> {
    let mut connection = pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => ended,
        () = app.shutdown.cancelled() => {
            leave(connection.as_mut());
            connection.await
        }
    }
}

async fn http1<S>(app: &Arc<App>, held: &Arc<Held>, stream: S, origin: Origin) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = hyper::server::conn::http1::Builder::new();
    // Not `pipeline_flush`: with bytes unread it keeps even the answer to a request that is too large.
    builder
        .timer(TokioTimer::new())
        // Also ends connections that are kept open and say nothing. The number of headers stays at
        // hyper's own limit of 100: another one would cost an allocation a request.
        .header_read_timeout(app.config.header_timeout)
        .max_buf_size(64 << 10);
    let service = service(app, held, origin);
    let connection = builder.serve_connection(TokioIo::new(stream), service).with_upgrades();
    to_its_end(app, connection, |connection| connection.graceful_shutdown()).await
}

async fn http2<S>(app: &Arc<App>, held: &Arc<Held>, stream: S, origin: Origin) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEADER_BYTES_MAX)
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(app.config.header_timeout);
    let connection = builder.serve_connection(TokioIo::new(stream), service(app, held, origin));
    to_its_end(app, connection, |connection| connection.graceful_shutdown()).await
}
