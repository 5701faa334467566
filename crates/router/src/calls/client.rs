//! Connections to other nodes: one to each, made when it is first needed, tried by pings, made again where it broke.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use fieldline_contracts::calls::{CALL_BYTES_MAX, STREAM_BUFFER_BYTES};
use fieldline_contracts::{CallError, Duplex, Node};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tracing::{debug, info, warn};

use super::pipe::{Opened, Outgoing, ReadError, pump, read_all};
use super::wire::{self, Head, PROBLEM_BYTES_MAX};
use super::{
    BACK_OFF_MAX, BACK_OFF_MIN, CONNECTION_WINDOW_BYTES, DIAL_MAX, Inner, PING_EVERY, PING_MAX,
    PORT, STREAM_WINDOW_BYTES, Security,
};

/// Most bytes that are read before HTTP/2 begins.
const FIRST_BYTES_MAX: usize = 1_024;

pub(super) fn shutting_down() -> CallError {
    CallError::Unreachable("this node shuts down".to_owned())
}

/// Another node, as it is connected to.
#[derive(Default)]
pub(super) struct Peer {
    slot: Mutex<Slot>,
}

#[derive(Default)]
struct Slot {
    state: State,
    /// Dials that failed since the last answer.
    failures: u32,
}

type Dialled = Option<Result<Connection, CallError>>;

#[derive(Default)]
enum State {
    #[default]
    Idle,
    Dialling(watch::Receiver<Dialled>),
    Open(Connection),
    Failed {
        address: String,
        until: Instant,
        error: CallError,
    },
}

#[derive(Clone)]
struct Connection {
    sender: SendRequest<Outgoing>,
    address: String,
    /// The certificate that we showed.
    shown: Option<Arc<ClientConfig>>,
    /// Whether it ever answered a call.
    proved: Arc<AtomicBool>,
}

impl Peer {
    /// Notes that it could not be reached; it is not tried again before a moment has gone by.
    fn failed(&self, name: &str, address: &str, error: &CallError) {
        let mut slot = self.slot.lock();
        let wait = BACK_OFF_MIN.saturating_mul(1 << slot.failures.min(10)).min(BACK_OFF_MAX);
        // Said once, not with each try.
        if slot.failures == 0 {
            warn!(node = name, address, %error, "another node cannot be reached");
        }
        slot.failures = slot.failures.saturating_add(1);
        let (address, until) = (address.to_owned(), Instant::now() + wait);
        slot.state = State::Failed { address, until, error: error.clone() };
        metrics::counter!("fieldline_calls_dials_failed_total").increment(1);
    }

    fn answered(&self, name: &str, connection: &Connection) {
        if !connection.proved.swap(true, Ordering::AcqRel) {
            let mut slot = self.slot.lock();
            if slot.failures > 0 {
                info!(node = name, "another node is reached again");
            }
            slot.failures = 0;
        }
    }
}

impl Inner {
    fn peer(&self, name: &str) -> Arc<Peer> {
        let mut peers = self.peers.lock();
        if let Some(peer) = peers.get(name) {
            return Arc::clone(peer);
        }
        // Nodes that left are let go of.
        if let Some(members) = self.membership.get() {
            let members = Arc::clone(&members.borrow());
            peers.retain(|name, _| members.members.iter().any(|one| one.node.name == *name));
        }
        Arc::clone(peers.entry(name.to_owned()).or_default())
    }

    /// The connection to a node, made if there is none.
    async fn connection(
        self: &Arc<Self>,
        peer: &Arc<Peer>,
        node: &Node,
    ) -> Result<Connection, CallError> {
        let shown = match &self.security {
            Security::Plain => None,
            Security::Mutual(current) => Some(current().client),
        };
        let mut dialled = {
            let mut slot = peer.slot.lock();
            match &slot.state {
                State::Open(open)
                    if !open.sender.is_closed()
                        && open.address == node.address
                        && open.shown.as_ref().map(Arc::as_ptr)
                            == shown.as_ref().map(Arc::as_ptr) =>
                {
                    return Ok(open.clone());
                }
                State::Failed { address, until, error }
                    if *address == node.address && Instant::now() < *until =>
                {
                    return Err(error.clone());
                }
                State::Dialling(dialled) => dialled.clone(),
                _ => {
                    let (sender, receiver) = watch::channel(None);
                    slot.state = State::Dialling(receiver.clone());
                    let (peer, node) = (Arc::clone(peer), node.clone());
                    self.runtime.spawn(async move {
                        let dialled = Box::pin(dial(&node, shown)).await;
                        match &dialled {
                            Ok(open) => peer.slot.lock().state = State::Open(open.clone()),
                            Err(error) => peer.failed(&node.name, &node.address, error),
                        }
                        sender.send_replace(Some(dialled));
                    });
                    receiver
                }
            }
        };
        let dialled = dialled.wait_for(Option::is_some).await.map_err(|_| shutting_down())?;
        dialled.clone().unwrap_or_else(|| Err(shutting_down()))
    }

    /// Sends a request, once more where the connection had ended before it left.
    async fn send(
        self: &Arc<Self>,
        node: &Node,
        mut request: Request<Outgoing>,
    ) -> Result<Response<Incoming>, CallError> {
        let peer = self.peer(&node.name);
        let mut again = true;
        loop {
            let mut connection = self.connection(&peer, node).await?;
            match connection.sender.try_send_request(request).await {
                Ok(response) => {
                    peer.answered(&node.name, &connection);
                    return Ok(response);
                }
                Err(mut failed) => {
                    let error = broke(node, failed.error());
                    if !connection.proved.load(Ordering::Acquire) {
                        peer.failed(&node.name, &node.address, &error);
                        return Err(error);
                    }
                    match failed.take_message().filter(|_| again) {
                        Some(unsent) => request = unsent,
                        None => return Err(error),
                    }
                    again = false;
                    let mut slot = peer.slot.lock();
                    if matches!(&slot.state, State::Open(open) if Arc::ptr_eq(&open.proved, &connection.proved))
                    {
                        slot.state = State::Idle;
                    }
                }
            }
        }
    }

    fn request(
        &self,
        node: &Node,
        method: &str,
        head: &Head,
        body: Outgoing,
    ) -> Result<Request<Outgoing>, CallError> {
        // Any name will do where it is in the certificate that it counts.
        let authority =
            if node.name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b)) {
                node.name.as_str()
            } else {
                "node"
            };
        let uri = Uri::builder()
            .scheme(self.security.scheme())
            .authority(authority)
            .path_and_query(wire::path(method))
            .build()
            .map_err(|error| CallError::Refused(error.to_string()))?;
        let mut request = Request::new(body);
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri;
        head.write(request.headers_mut())?;
        Ok(request)
    }

    /// One question and its answer.
    pub(super) async fn ask(
        self: &Arc<Self>,
        node: &Node,
        method: &'static str,
        head: Head,
        request: Bytes,
    ) -> Result<Bytes, CallError> {
        let request = self.request(node, method, &head, Outgoing::bytes(request))?;
        let response = self.send(node, request).await?;
        if response.status() != StatusCode::OK {
            return Err(why(node, response).await);
        }
        read_all(response.into_body(), CALL_BYTES_MAX).await.map_err(|error| match error {
            ReadError::TooLong => CallError::Failed(format!("{} answers with too much", node.name)),
            ReadError::Broken(error) => broke(node, &error),
        })
    }

    /// One question, its answer, and a stream.
    pub(super) async fn open(
        self: &Arc<Self>,
        node: &Node,
        method: &'static str,
        head: Head,
        hello: Bytes,
    ) -> Result<Box<dyn Duplex>, CallError> {
        let (here, there) = tokio::io::duplex(STREAM_BUFFER_BYTES);
        let (reader, writer) = tokio::io::split(there);
        let request = self.request(node, method, &head, Outgoing::stream(hello, reader))?;
        let response = self.send(node, request).await?;
        if response.status() != StatusCode::OK {
            return Err(why(node, response).await);
        }
        let (opened, unwanted) = Opened::new(here);
        self.runtime.spawn(async move {
            tokio::select! {
                () = unwanted.cancelled() => {}
                () = pump(Bytes::new(), response.into_body(), writer) => {}
            }
        });
        Ok(Box::new(opened))
    }
}

/// What a refusal says.
async fn why(node: &Node, response: Response<Incoming>) -> CallError {
    let status = response.status();
    let body = read_all(response.into_body(), PROBLEM_BYTES_MAX).await;
    let problem = body.ok().and_then(|body| wire::read_problem(&body));
    problem.unwrap_or_else(|| {
        let (name, address) = (&node.name, &node.address);
        CallError::Unreachable(format!(
            "what answers at {address} ({status}) is no listener for nodes: check node.listen and node.address of {name}"
        ))
    })
}

/// All that an error has to say.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    text
}

fn broke(node: &Node, error: &hyper::Error) -> CallError {
    CallError::Unreachable(format!("the connection to {} broke: {}", node.name, chain(error)))
}

/// Why a connection came to nothing after the first words.
fn not_taken(node: &Node, error: &std::io::Error) -> CallError {
    let (name, text) = (&node.name, chain(error));
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    CallError::Unreachable(match tls {
        Some(rustls::Error::AlertReceived(_)) => format!(
            "{name} refuses the certificate of this node ({text}): both need certificates of one authority, the one in node.ca"
        ),
        _ => format!("{name} ended the connection at {} at once: {text}", node.address),
    })
}

/// Connects, and shows and asks for certificates.
async fn dial(node: &Node, shown: Option<Arc<ClientConfig>>) -> Result<Connection, CallError> {
    let (name, address) = (&node.name, &node.address);
    let unreachable = |text: String| {
        CallError::Unreachable(format!("{name} cannot be reached at {address}: {text}"))
    };
    let secure = shown.is_some();
    let (host, port) = place(address, secure).map_err(unreachable)?;
    let connect = async {
        let stream = TcpStream::connect((host.as_str(), port)).await;
        let stream = stream.map_err(|error| unreachable(error.to_string()))?;
        stream.set_nodelay(true).map_err(|error| unreachable(error.to_string()))?;
        let Some(config) = shown.clone() else { return handshake(stream, node).await };
        let server = ServerName::try_from(name.clone()).map_err(|_| {
            unreachable("its name is no DNS name, and no certificate has it".to_owned())
        })?;
        let secured = TlsConnector::from(config).connect(server, stream).await;
        let secured = secured.map_err(|error| unreachable(judged(name, &error)))?;
        handshake(secured, node).await
    };
    let connected = timeout(DIAL_MAX, Box::pin(connect)).await;
    let sender = connected.map_err(|_| unreachable(format!("no answer in {DIAL_MAX:?}")))??;
    debug!(node = name, address, "connected to another node");
    Ok(Connection { sender, address: address.clone(), shown, proved: Arc::default() })
}

/// What is wrong with the other node's certificate, and what to do.
fn judged(name: &str, error: &std::io::Error) -> String {
    let text = chain(error);
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidCertificate(problem)) => {
            use rustls::CertificateError as Wrong;
            match problem {
                Wrong::UnknownIssuer | Wrong::BadSignature => format!(
                    "its certificate is of another authority than node.ca: issue the certificates of all nodes by one ({text})"
                ),
                Wrong::NotValidForName | Wrong::NotValidForNameContext { .. } => format!(
                    "its certificate is not for {name}: another node is at this address, or it has another's files ({text})"
                ),
                Wrong::Expired | Wrong::ExpiredContext { .. } => {
                    format!("its certificate has expired: issue a new one ({text})")
                }
                _ => text,
            }
        }
        _ => text,
    }
}

async fn handshake<S>(mut stream: S, node: &Node) -> Result<SendRequest<Outgoing>, CallError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    // A listener for nodes speaks first, once it has taken our certificate for good: with TLS 1.3 that is after we think that
    // we are connected. One that sleeps says nothing.
    let mut first = vec![0; FIRST_BYTES_MAX];
    let read = stream.read(&mut first).await.map_err(|error| not_taken(node, &error))?;
    if read == 0 {
        let error = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
        return Err(not_taken(node, &error));
    }
    first.truncate(read);
    let (reader, writer) = tokio::io::split(stream);
    let stream = tokio::io::join(std::io::Cursor::new(first).chain(reader), writer);
    let made = Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_MAX)
        .keep_alive_while_idle(true)
        .handshake(TokioIo::new(stream))
        .await;
    let (sender, connection) = made.map_err(|error| broke(node, &error))?;
    let name = node.name.clone();
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            debug!(node = name, error = chain(&error), "a connection to another node ended");
        }
    });
    Ok(sender)
}

/// Host and port of an address.
fn place(address: &str, secure: bool) -> Result<(String, u16), String> {
    let uri: Uri = address.parse().map_err(|_| {
        format!(
            "it announces `{address}`, which is no address: expected such as https://node-1:{PORT}"
        )
    })?;
    match (uri.scheme_str(), secure) {
        (None, _) | (Some("https"), true) | (Some("http"), false) => {}
        (Some("http"), true) => {
            return Err(
                "it has no certificate, and this node has one: give all nodes certificates"
                    .to_owned(),
            );
        }
        (Some("https"), false) => {
            return Err("it has a certificate, and this node has none: set node.ca, node.certificate and node.key".to_owned());
        }
        (Some(other), _) => return Err(format!("it announces `{other}`, and not http or https")),
    }
    let host = uri.host().ok_or("its address has no host")?.trim_matches(['[', ']']);
    Ok((host.to_owned(), uri.port_u16().unwrap_or(PORT)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_host_and_perhaps_a_port() {
        for (address, secure, expected) in [
            ("https://node-1:7081", true, Ok(("node-1", 7081))),
            ("https://node-1", true, Ok(("node-1", 7080))),
            ("http://127.0.0.1:1", false, Ok(("127.0.0.1", 1))),
            ("https://[::1]:7080", true, Ok(("::1", 7080))),
            ("node-1:7080", true, Ok(("node-1", 7080))),
            ("http://node-1:7080", true, Err("give all nodes certificates")),
            ("https://node-1:7080", false, Err("set node.ca")),
            ("ftp://node-1", true, Err("`ftp`")),
            ("", true, Err("no address")),
            ("/", true, Err("no host")),
        ] {
            match (place(address, secure), expected) {
                (Ok((host, port)), Ok(place)) => assert_eq!((host.as_str(), port), place),
                (Err(error), Err(part)) => assert!(error.contains(part), "{address}: {error}"),
                (found, _) => panic!("{address}: {found:?}"),
            }
        }
    }
}
