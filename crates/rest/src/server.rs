//! Listeners and connections.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use fieldline_runtime::tls::ReloadingTls;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::app::App;
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

/// Accepts until shutdown.
pub(crate) async fn accept(app: Arc<App>, listener: RestListener, places: Arc<Semaphore>) {
    let RestListener { listener, tls } = listener;
    loop {
        // A place first: at the limit we stop accepting, not start dropping.
        let place = tokio::select! {
            () = app.shutdown.cancelled() => break,
            place = Arc::clone(&places).acquire_owned() => place,
        };
        let Ok(place) = place else { break };
        let accepted = tokio::select! {
            () = app.shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let (served, tls) = (Arc::clone(&app), tls.clone());
                app.tasks.spawn(async move {
                    if let Err(error) = connection(served, stream, peer, tls).await {
                        debug!(%peer, %error, "connection ended");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                warn!(%error, "accepting an HTTP connection failed");
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
            }
        }
    }
}

async fn connection(
    app: Arc<App>,
    stream: TcpStream,
    peer: SocketAddr,
    tls: Option<Arc<ReloadingTls>>,
) -> io::Result<()> {
    // Answers are written whole: waiting to fill a packet would only delay them.
    stream.set_nodelay(true)?;
    let Some(tls) = tls else {
        return http1(app, stream, Origin { peer, secure: false }).await;
    };
    let handshake = timeout(app.config.header_timeout, tls.acceptor().accept(stream));
    let stream = handshake.await.map_err(|_| io::ErrorKind::TimedOut)??;
    let origin = Origin { peer, secure: true };
    if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
        http2(app, stream, origin).await
    } else {
        http1(app, stream, origin).await
    }
}

async fn http1<S>(app: Arc<App>, stream: S, origin: Origin) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (shutdown, served) = (app.shutdown.clone(), Arc::clone(&app));
    let service = service_fn(move |request| {
        let app = Arc::clone(&served);
        async move { Ok::<_, Infallible>(serve(app, origin, request).await) }
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        // Also ends connections that are kept open and say nothing. The number of headers stays at
        // hyper's own limit of 100: another one would cost an allocation a request.
        .header_read_timeout(app.config.header_timeout)
        .max_buf_size(64 << 10)
        .pipeline_flush(true);
    let mut connection =
        pin!(builder.serve_connection(TokioIo::new(stream), service).with_upgrades());
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    ended.map_err(io::Error::other)
}

async fn http2<S>(app: Arc<App>, stream: S, origin: Origin) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (shutdown, served) = (app.shutdown.clone(), Arc::clone(&app));
    let service = service_fn(move |request| {
        let app = Arc::clone(&served);
        async move { Ok::<_, Infallible>(serve(app, origin, request).await) }
    });
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEADER_BYTES_MAX)
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(app.config.header_timeout);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    ended.map_err(io::Error::other)
}
