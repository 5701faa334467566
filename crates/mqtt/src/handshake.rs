//! From the first byte to CONNACK: who is there, and may they come in.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use fieldline_auth::{AuthError, Identity};
use fieldline_model::ConnectionId;
use fieldline_runtime::balancers::Header;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::Notify;

use crate::codec::{self, CodecError, ConnackProps, Connect, Qos, Reason, Version, take_frame};
use crate::hub::Member;
use crate::link::Link;
use crate::publish::Client;
use crate::session::{Session, TOPIC_ALIAS_MAX};
use crate::stream::Stream;
use crate::{Acceptor, Shared, metrics, wills};

/// Longest client id, in bytes.
const CLIENT_ID_BYTES_MAX: usize = 256;
/// How long a refusal may take to be sent.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(2);

/// The connections that have not signed in yet.
///
/// At the limit the oldest loses its place to the newest: a client signs in
/// within moments, and one that sends nothing must not keep it waiting.
pub(crate) struct Handshakes {
    max: usize,
    places: Mutex<Places>,
}

#[derive(Default)]
struct Places {
    last: u64,
    taken: BTreeMap<u64, Arc<Notify>>,
}

impl Handshakes {
    pub(crate) fn new(max: usize) -> Self {
        Self { max, places: Mutex::default() }
    }

    /// Takes a place, and the oldest's if there is none left.
    pub(crate) fn enter(self: &Arc<Self>) -> Place {
        let lost = Arc::new(Notify::new());
        let mut places = self.places.lock();
        while places.taken.len() >= self.max {
            let Some((_, oldest)) = places.taken.pop_first() else { break };
            oldest.notify_one();
        }
        places.last += 1;
        let number = places.last;
        places.taken.insert(number, Arc::clone(&lost));
        Place { of: Arc::clone(self), number, lost }
    }
}

/// A place among the connections that have not signed in; given back when dropped.
pub(crate) struct Place {
    of: Arc<Handshakes>,
    number: u64,
    lost: Arc<Notify>,
}

impl Place {
    /// Waits until it is lost to another. Cancel-safe.
    pub(crate) async fn lost(&self) {
        self.lost.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.of.places.lock().taken.remove(&self.number);
    }
}

/// Why a connection did not become a session.
struct Refused {
    version: Version,
    /// Absent if the client is told nothing: it may not be speaking MQTT.
    reason: Option<Reason>,
    label: &'static str,
    text: Cow<'static, str>,
    /// Whether the client wants to be told the text.
    tell: bool,
}

impl Refused {
    fn silent(label: &'static str, text: impl Into<Cow<'static, str>>) -> Self {
        Self { version: Version::V3, reason: None, label, text: text.into(), tell: false }
    }

    fn with(version: Version, reason: Reason, text: impl Into<Cow<'static, str>>) -> Self {
        Self { version, reason: Some(reason), label: reason.code(), text: text.into(), tell: true }
    }
}

/// Reads CONNECT, signs the client in and answers. Returns `None` if it was
/// refused, which is counted and logged here.
pub(crate) async fn handshake(
    shared: &Arc<Shared>,
    mut stream: TcpStream,
    peer: SocketAddr,
    acceptor: Option<Acceptor>,
) -> Option<(Session, Stream)> {
    let peer = match shared.config.balancers.peer(&mut stream, peer, Header::Required).await {
        Ok(peer) => peer,
        Err(error) => {
            refuse(None, peer, Refused::silent("proxy_header", error.to_string())).await;
            return None;
        }
    };
    let timeout = shared.config.connect_timeout;
    let opened = tokio::time::timeout(timeout, open(shared, stream, acceptor)).await;
    let (stream, input, connect) = match opened {
        Ok(Ok(opened)) => opened,
        Ok(Err((stream, refused))) => {
            refuse(stream, peer, refused).await;
            return None;
        }
        Err(_) => {
            let text = "nothing, or no whole CONNECT, came in time";
            refuse(None, peer, Refused::silent("connect_timeout", text)).await;
            return None;
        }
    };
    let (version, tell) = (connect.version, connect.wants_reasons());
    // The sign-in has a time of its own: it may have to wait for the registry.
    let admitted = tokio::time::timeout(timeout, admit(shared, peer, connect, input)).await;
    let refused = match admitted {
        Ok(Ok(session)) => return Some((session, stream)),
        Ok(Err(refused)) => refused,
        Err(_) => Refused::with(version, Reason::ServerUnavailable, "the registry is slow"),
    };
    refuse(Some(stream), peer, Refused { tell, ..refused }).await;
    None
}

/// Counts and logs a refusal; tells the client if there still is a stream.
async fn refuse(stream: Option<Stream>, peer: SocketAddr, refused: Refused) {
    let Refused { version, reason, label, text, tell } = refused;
    metrics::refused(label);
    match reason {
        Some(_) => tracing::info!(%peer, reason = label, %text, "MQTT client refused"),
        // Scanners and broken networks are no news, and nobody should fill the log with them.
        None => tracing::debug!(%peer, reason = label, %text, "no MQTT client"),
    }
    let Some(mut stream) = stream else { return };
    let mut output = BytesMut::new();
    if let Some(reason) = reason {
        let reason_string = tell.then_some(text.as_ref());
        let props = ConnackProps { reason_string, ..ConnackProps::default() };
        codec::connack(&mut output, version, reason, &props);
    }
    stream.finish(&mut output, REFUSAL_TIMEOUT).await;
}

type Opened = Result<(Stream, BytesMut, Connect), (Option<Stream>, Refused)>;

/// Does the TLS handshake if there is to be one, and reads CONNECT.
async fn open(shared: &Shared, stream: TcpStream, acceptor: Option<Acceptor>) -> Opened {
    let mut stream = match acceptor {
        None => Stream::Plain(stream),
        Some(acceptor) => match acceptor().accept(stream).await {
            Ok(stream) => Stream::Tls(Box::new(stream)),
            Err(error) => return Err((None, Refused::silent("tls", error.to_string()))),
        },
    };
    let mut input = BytesMut::new();
    let connect = loop {
        let read = std::future::poll_fn(|cx| stream.poll_read_into(cx, &mut input)).await;
        match read {
            Ok(0) => return Err((None, Refused::silent("closed", "closed before CONNECT"))),
            Ok(_) => {}
            Err(error) => return Err((None, Refused::silent("network", error.to_string()))),
        }
        // What is no CONNECT is not waited for, however long it says it is.
        let wrong = input.first().is_some_and(|first| *first != 0x10);
        let frame = if wrong {
            Err(CodecError {
                reason: Reason::ProtocolError,
                what: "the first packet is no CONNECT",
            })
        } else {
            take_frame(&mut input, shared.config.connect_bytes_max)
        };
        match frame.and_then(|frame| frame.as_ref().map(Connect::decode).transpose()) {
            Ok(Some(connect)) => break connect,
            Ok(None) => {}
            Err(error) => {
                let refused = match error.reason {
                    Reason::UnsupportedVersion => {
                        Refused::with(Version::V3, error.reason, error.what)
                    }
                    _ => Refused::silent(error.reason.code(), error.what),
                };
                return Err((Some(stream), refused));
            }
        }
    };
    Ok((stream, input, connect))
}

/// Signs the client in and makes its session, CONNACK included.
async fn admit(
    shared: &Arc<Shared>,
    peer: SocketAddr,
    connect: Connect,
    input: BytesMut,
) -> Result<Session, Refused> {
    let version = connect.version;
    let refuse = |reason, text: Cow<'static, str>| Refused::with(version, reason, text);
    if connect.authentication_method {
        let text = "enhanced authentication is not offered: sign in with a token as password";
        return Err(refuse(Reason::BadAuthenticationMethod, text.into()));
    }
    let secret = secret(&connect).ok_or_else(|| {
        refuse(Reason::BadUserNameOrPassword, "sign in with an API token as password".into())
    })?;
    let signed_in = shared.services.auth.token(secret, peer.ip()).await;
    let identity = signed_in.map_err(|error| not_signed_in(version, &error))?;
    let identity = Arc::new(identity);
    if !shared.services.ingest.account_enabled(identity.account) {
        return Err(refuse(Reason::NotAuthorized, "the account is disabled".into()));
    }
    let given = connect.client_id.as_str();
    if given.len() > CLIENT_ID_BYTES_MAX {
        return Err(refuse(Reason::ClientIdNotValid, "a client id has at most 256 bytes".into()));
    }
    if given.is_empty() && version == Version::V3 && !connect.clean_start {
        let text = "a client without an id must ask for a clean session";
        return Err(refuse(Reason::ClientIdNotValid, text.into()));
    }
    let Some(permit) = shared.permit() else {
        return Err(refuse(Reason::ServerBusy, "as many clients are connected as may be".into()));
    };
    let (clock, number) = (&shared.services.platform.clock, shared.next_session());
    let connection = ConnectionId::new(clock.now(), clock.random());
    let client_id: Arc<str> = match given {
        "" => format!("fieldline-{connection}").into(),
        given => given.into(),
    };
    let hub = shared.hub(identity.account);
    let client = Client {
        shared: Arc::clone(shared),
        hub: Arc::clone(&hub),
        identity: Arc::clone(&identity),
        session: number,
        connection,
        peer,
    };
    if let Some(will) = &connect.will {
        if version == Version::V5 && will.qos == Qos::ExactlyOnce {
            return Err(refuse(Reason::QosNotSupported, "QoS 2 is not offered".into()));
        }
        client
            .authorise(will.topic.as_str())
            .map_err(|why| refuse(why.reason, format!("the will: {}", why.text).into()))?;
    }
    let will = connect.will.as_ref().and_then(|will| wills::kept(&client, will));
    let link = Arc::new(Link::default());
    let member = Member {
        link: Arc::clone(&link),
        client_id: Arc::clone(&client_id),
        identity: Arc::clone(&identity),
        will: will.clone(),
    };
    hub.join(number, member).map_err(|reason| {
        refuse(reason, "as many clients of this account are connected as may be".into())
    })?;
    // From here on the session leaves the hub when it is dropped.
    let asked = connect.keep_alive_s;
    let most = shared.config.keep_alive_s_max;
    let keep_alive_s = match version {
        Version::V5 if asked == 0 || asked > most => most,
        _ => asked,
    };
    let mut output = BytesMut::new();
    let props = ConnackProps {
        assigned_client_id: given.is_empty().then_some(&*client_id),
        session_expiry_s: Some(0),
        keep_alive_s: (keep_alive_s != asked).then_some(keep_alive_s),
        receive_maximum: shared.config.receive_maximum,
        packet_bytes_max: u32::try_from(shared.config.packet_bytes_max).unwrap_or(u32::MAX),
        topic_alias_max: TOPIC_ALIAS_MAX,
        reason_string: None,
    };
    codec::connack(&mut output, version, Reason::Success, &props);
    tracing::debug!(%peer, %connection, client_id = %client_id, actor = %identity.actor.name, "MQTT client connected");
    let mut session = Session::new(client, link, permit, connect, keep_alive_s, input, output);
    // After joining, so that the bus is not let go of between the two.
    hub.follow(&shared.background, &shared.stop).await;
    if let Some(seat) = hub.take_seat(number, &client_id).await {
        session.begin(&client_id, seat, will.as_ref());
    }
    recheck(shared, &identity, session).await
}

/// The token may have been revoked while the client joined; later revocations
/// are watched for.
async fn recheck(
    shared: &Shared,
    identity: &Identity,
    session: Session,
) -> Result<Session, Refused> {
    let welcome = shared.services.auth.recheck(identity).await;
    welcome.map_err(|error| not_signed_in(session.version(), &error))?;
    Ok(session)
}

/// What the client is told when it is not signed in.
fn not_signed_in(version: Version, error: &AuthError) -> Refused {
    let reason = match error {
        AuthError::Unauthenticated(_) => Reason::BadUserNameOrPassword,
        AuthError::TooMany { .. } => Reason::ConnectionRateExceeded,
        AuthError::Refused(_) => Reason::NotAuthorized,
        _ => {
            tracing::warn!(%error, "MQTT client cannot be signed in");
            let text = "sign-in does not work at present; try again soon";
            return Refused::with(version, Reason::ServerUnavailable, text);
        }
    };
    Refused::with(version, reason, error.to_string())
}

/// The token among user name and password: either will do.
fn secret(connect: &Connect) -> Option<&str> {
    let password = connect.password.as_deref().and_then(|p| std::str::from_utf8(p).ok());
    let password = password.filter(|p| !p.is_empty());
    let user_name = connect.user_name.as_ref().map(codec::Text::as_str).filter(|n| !n.is_empty());
    match (password, user_name) {
        // Some clients insist on a password: a token is told by its prefix.
        (Some(password), Some(name))
            if name.starts_with("flt_") && !password.starts_with("flt_") =>
        {
            Some(name)
        }
        (password, name) => password.or(name),
    }
}
