//! The live feed: a WebSocket that is sent messages, state, events and logs as they happen.
//!
//! Each feed reads the account's bus, whose ring is bounded: a client that is
//! too slow loses the oldest items and is told how many. Nobody waits for it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use fieldline_auth::Identity;
use fieldline_contracts::{BusItem, Lagged, StateError, Subscription, Topic, TopicFilter};
use fieldline_model::{DeviceId, ParamName, Scope, Stored};
use futures_util::{FutureExt as _, SinkExt as _, StreamExt as _};
use hyper::header::{CONNECTION, HeaderValue, ORIGIN, UPGRADE};
use hyper::upgrade::Upgraded;
use hyper::{HeaderMap, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout, timeout_at};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Bytes, Message, Utf8Bytes};
use uuid::Uuid;

use crate::api::messages::is_log;
use crate::api::state::{write_time, write_values};
use crate::app::App;
use crate::call::{Call, empty};
use crate::problem::Problem;
use crate::route::Answer;
use crate::serve::{Origin, authenticate};

/// How often the client is asked whether it is there.
const PING_EVERY: Duration = Duration::from_secs(20);
/// Time to say who it is, where the request did not.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for one batch to get out: a client that reads nothing for so long is gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);
/// Largest message of a client.
const MESSAGE_BYTES_MAX: usize = 128 << 10;
/// Buffers of a connection: small, since most of them are idle.
const BUFFER_BYTES: usize = 4 << 10;
/// Bytes that may wait to be written.
const WAITING_BYTES_MAX: usize = 4 << 20;
/// Items written before the socket is flushed and the client is listened to.
const BATCH_MAX: usize = 256;
/// Most devices that a subscription names.
const DEVICES_MAX: usize = 2_000;

/// Sent with the close: the token or session ended, or was never good.
const CLOSE_UNAUTHENTICATED: u16 = 4_401;
/// Sent with the close: the scope `read` is missing.
const CLOSE_FORBIDDEN: u16 = 4_403;
/// Sent with the close: the account has too many feeds.
const CLOSE_TOO_MANY: u16 = 4_429;

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// What a client says.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Said {
    /// An API token, as the first thing said.
    #[serde(default)]
    token: Option<String>,
    /// What to send from now on, in place of what was before.
    #[serde(default)]
    subscribe: Option<Vec<Feed>>,
    /// Only about these devices or channels.
    #[serde(default)]
    devices: Option<Vec<Uuid>>,
    /// Comes back with the answer.
    #[serde(default)]
    id: serde_json::Value,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Feed {
    Message,
    State,
    Event,
    Log,
}

impl Feed {
    const fn topic(self) -> Topic {
        match self {
            Self::Message => Topic::Message,
            Self::State => Topic::State,
            Self::Event => Topic::Event,
            Self::Log => Topic::Log,
        }
    }
}

impl Said {
    fn read(text: &str) -> Result<Self, String> {
        if !text.trim_start().starts_with('{') {
            return Err("say a JSON object".to_owned());
        }
        serde_json::from_str(text).map_err(|error| error.to_string())
    }
}

/// Why a feed ends.
enum Ended {
    /// The client left, or its connection broke.
    Gone,
    /// We end it, with this code and these words.
    Close(u16, String),
}

impl From<tokio_tungstenite::tungstenite::Error> for Ended {
    fn from(error: tokio_tungstenite::tungstenite::Error) -> Self {
        use tokio_tungstenite::tungstenite::Error;
        match error {
            Error::Capacity(reason) => Self::Close(CloseCode::Size.into(), reason.to_string()),
            _ => Self::Gone,
        }
    }
}

/// `GET /ws`
pub(crate) async fn upgrade(mut call: Call) -> Answer {
    let key = call.header("sec-websocket-key").map(|key| derive_accept_key(key.as_bytes()));
    let version = call.header("sec-websocket-version") == Some("13");
    let wanted = call.header("upgrade").is_some_and(|text| text.eq_ignore_ascii_case("websocket"));
    let (Some(key), Some(upgrade), true, true) = (key, call.upgrade.take(), version, wanted) else {
        return Err(Problem::bad_request(
            "this is a WebSocket; connect with a WebSocket client (version 13)",
        ));
    };
    let origin = Origin { peer: call.peer, secure: call.secure };
    let token = call.query.get("token").map(str::to_owned);
    let signed = call.headers.contains_key("authorization") || token.is_some();
    let identity = if let Some(token) = &token {
        Some(call.app.services.auth.token(token, call.peer.ip()).await?)
    } else if signed || crate::serve::cookie(&call.headers).is_some() {
        let (identity, by_cookie) = authenticate(&call.app, &call.headers, origin).await?;
        if by_cookie && !same_origin(&call.headers) {
            return Err(Problem::csrf(
                "a page of another site cannot open this feed with your session",
            ));
        }
        Some(identity)
    } else {
        // The first message says who it is.
        None
    };
    if let Some(identity) = &identity
        && !identity.may(Scope::Read)
    {
        return Err(Problem::scope_missing("this needs the scope `read`"));
    }
    let app = Arc::clone(&call.app);
    let nameless = if identity.is_none() {
        let place = Arc::clone(&app.nameless).try_acquire_owned();
        Some(place.map_err(|_| {
            Problem::unavailable("too many feeds wait for their token; send it with the request")
                .retry_after(5)
        })?)
    } else {
        None
    };
    let tracked = app.tasks.clone();
    tracked.spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        let config = WebSocketConfig::default()
            .read_buffer_size(BUFFER_BYTES)
            .write_buffer_size(BUFFER_BYTES)
            .max_write_buffer_size(WAITING_BYTES_MAX)
            .max_message_size(Some(MESSAGE_BYTES_MAX))
            .max_frame_size(Some(MESSAGE_BYTES_MAX));
        let stream = TokioIo::new(upgraded);
        let mut socket = WebSocketStream::from_raw_socket(stream, Role::Server, Some(config)).await;
        let ended = Box::pin(serve(&app, &mut socket, origin, identity, nameless)).await;
        if let Err(Ended::Close(code, reason)) = ended {
            // A close frame has room for 123 bytes of reason.
            let reason: String = reason.chars().take(100).collect();
            let frame = CloseFrame { code: code.into(), reason: Utf8Bytes::from(reason) };
            let closing = timeout(WRITE_TIMEOUT, socket.close(Some(frame))).await;
            // The client may be gone by now.
            drop(closing);
        }
    });
    let mut response = empty(StatusCode::SWITCHING_PROTOCOLS);
    let headers = response.headers_mut();
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    let key = HeaderValue::from_str(&key).map_err(Problem::fault)?;
    headers.insert("sec-websocket-accept", key);
    Ok::<Response<_>, Problem>(response)
}

/// Whether the page that opens the socket is this server's own.
fn same_origin(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(ORIGIN) else {
        // Not a browser: those always say.
        return true;
    };
    let host = headers.get("host").and_then(|host| host.to_str().ok());
    let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
    matches!((origin, host), (Some((_, origin)), Some(host)) if origin.eq_ignore_ascii_case(host))
}

async fn serve(
    app: &Arc<App>,
    socket: &mut Socket,
    origin: Origin,
    identity: Option<Identity>,
    nameless: Option<OwnedSemaphorePermit>,
) -> Result<(), Ended> {
    let mut first = None;
    let identity = match identity {
        Some(identity) => identity,
        None => {
            let (identity, said) = introduced(app, socket, origin).await?;
            first = Some(said);
            identity
        }
    };
    drop(nameless);
    if !identity.may(Scope::Read) {
        return Err(Ended::Close(CLOSE_FORBIDDEN, "the scope `read` is missing".to_owned()));
    }
    let place = app.tenants.feed(identity.account);
    let _place =
        place.map_err(|problem| Ended::Close(CLOSE_TOO_MANY, problem.detail().to_owned()))?;
    metrics::gauge!("fieldline_http_feeds").increment(1.0);
    let _counted = Counted;
    let mut rights = app.services.auth.changes();
    rights.mark_unchanged();
    let mut pings = interval_at(Instant::now() + PING_EVERY, PING_EVERY);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut expiry = pin!(until_expiry(app, &identity));
    let mut feed: Option<Box<dyn Subscription>> = None;
    let mut heard = Instant::now();
    if let Some(said) = first {
        subscribe(app, socket, &identity, said, &mut feed).await?;
    }
    loop {
        tokio::select! {
            () = app.shutdown.cancelled() => {
                return Err(Ended::Close(CloseCode::Away.into(), "the server is shutting down".to_owned()));
            }
            said = socket.next() => {
                heard = Instant::now();
                match said {
                    Some(Ok(Message::Text(text))) => {
                        match Said::read(&text) {
                            Ok(said) => subscribe(app, socket, &identity, said, &mut feed).await?,
                            Err(error) => tell_error(socket, &error).await?,
                        }
                    }
                    Some(Ok(Message::Binary(_))) => {
                        tell_error(socket, "send text, a JSON object").await?;
                    }
                    Some(Ok(Message::Close(_))) | None => return Err(Ended::Gone),
                    // Pings are answered by the library.
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Err(error.into()),
                }
            }
            item = next(&mut feed) => {
                let Some(item) = item else {
                    return Err(Ended::Close(CloseCode::Away.into(), "the feed has ended".to_owned()));
                };
                let sending = send_batch(app, socket, &identity, &mut feed, item);
                match timeout(WRITE_TIMEOUT, sending).await {
                    Ok(sent) => sent?,
                    Err(_) => return Err(Ended::Gone),
                }
            }
            _ = pings.tick() => {
                if heard.elapsed() > 3 * PING_EVERY {
                    return Err(Ended::Gone);
                }
                send(socket, Message::Ping(Bytes::new())).await?;
            }
            () = expiry.as_mut() => return Err(ended("the token or session has expired")),
            moved = rights.changed() => {
                if moved.is_err() {
                    return Err(Ended::Gone);
                }
                rights.mark_unchanged();
                match app.services.auth.recheck(&identity).await {
                    Ok(()) => {}
                    Err(fieldline_auth::AuthError::Unauthenticated(text)) => return Err(ended(text)),
                    // It cannot be known now: the next change, or the expiry, will tell.
                    Err(error) => tracing::warn!(%error, "the rights of a feed could not be checked"),
                }
            }
        }
    }
}

/// Ends when the identity does, by its own terms.
async fn until_expiry(app: &App, identity: &Identity) {
    let Some(at) = identity.expires_at else { return std::future::pending().await };
    let left = at.micros_since(app.platform().clock.now());
    sleep(Duration::from_micros(u64::try_from(left).unwrap_or(0))).await;
}

/// Takes a feed out of the count when it ends.
struct Counted;

impl Drop for Counted {
    fn drop(&mut self) {
        metrics::gauge!("fieldline_http_feeds").decrement(1.0);
    }
}

fn ended(text: &str) -> Ended {
    Ended::Close(CLOSE_UNAUTHENTICATED, text.to_owned())
}

/// Waits for the first message, which says who the client is.
async fn introduced(
    app: &App,
    socket: &mut Socket,
    origin: Origin,
) -> Result<(Identity, Said), Ended> {
    let until = Instant::now() + TOKEN_TIMEOUT;
    loop {
        let said = match timeout_at(until, socket.next()).await {
            Err(_) => return Err(ended("no token came within ten seconds")),
            Ok(None | Some(Ok(Message::Close(_)))) => return Err(Ended::Gone),
            Ok(Some(Err(error))) => return Err(error.into()),
            Ok(Some(Ok(Message::Text(text)))) => text,
            Ok(Some(Ok(_))) => continue,
        };
        let said = Said::read(&said).ok();
        let Some(Said { token: Some(token), .. }) = &said else {
            return Err(ended("say {\"token\": \"flt_…\"} first"));
        };
        let identity = app.services.auth.token(token, origin.peer.ip()).await;
        let identity = identity.map_err(|error| ended(&error.to_string()))?;
        return said.map(|said| (identity, said)).ok_or(Ended::Gone);
    }
}

/// Subscribes as the client says, in place of what was before.
async fn subscribe(
    app: &App,
    socket: &mut Socket,
    identity: &Identity,
    said: Said,
    feed: &mut Option<Box<dyn Subscription>>,
) -> Result<(), Ended> {
    let Said { token: _, subscribe, devices, id } = said;
    let Some(feeds) = subscribe else {
        // A token alone, or a message with nothing in it.
        return send_json(socket, &json!({ "type": "welcome", "id": id })).await;
    };
    if devices.as_ref().is_some_and(|devices| devices.len() > DEVICES_MAX) {
        return tell_error(socket, &format!("at most {DEVICES_MAX} devices can be named")).await;
    }
    let restricted = !identity.sees_all();
    let named = devices.is_some();
    let objects: Vec<Uuid> = match devices {
        Some(devices) if restricted => {
            devices.into_iter().filter(|id| identity.may_see(DeviceId(*id))).collect()
        }
        Some(devices) => devices,
        None if restricted => identity.devices.iter().map(|id| id.0).collect(),
        None => Vec::new(),
    };
    // An empty filter means all: it must not come of a list that was emptied.
    let nothing = feeds.is_empty() || (objects.is_empty() && (named || restricted));
    *feed = if nothing {
        None
    } else {
        let mut topics: Vec<Topic> = feeds.iter().map(|feed| feed.topic()).collect();
        topics.dedup();
        let filter = TopicFilter { topics, objects };
        Some(app.platform().bus.subscribe(identity.account, filter).await)
    };
    send_json(socket, &json!({ "type": "subscribed", "id": id })).await
}

/// The next item; never, while nothing is subscribed.
async fn next(feed: &mut Option<Box<dyn Subscription>>) -> Option<Result<BusItem, Lagged>> {
    match feed {
        Some(feed) => feed.next().await,
        None => std::future::pending().await,
    }
}

/// Sends `first` and whatever else is there already, then flushes once.
async fn send_batch(
    app: &App,
    socket: &mut Socket,
    identity: &Identity,
    feed: &mut Option<Box<dyn Subscription>>,
    first: Result<BusItem, Lagged>,
) -> Result<(), Ended> {
    // Several changes of one device's state are one, with the newest values.
    let mut states: BTreeMap<DeviceId, BTreeSet<ParamName>> = BTreeMap::new();
    let mut item = Some(first);
    let mut count = 0;
    while let Some(taken) = item {
        match taken {
            Err(Lagged(dropped)) => {
                let text = json!({ "type": "lagged", "dropped": dropped }).to_string();
                socket.feed(Message::text(text)).await?;
            }
            Ok(BusItem::State { device, params }) => {
                states.entry(device).or_default().extend(params.iter().cloned());
            }
            Ok(BusItem::Event(event)) if !identity.may_hear(&event) => {}
            Ok(item) => {
                if let Some(text) = push(&item) {
                    socket.feed(Message::text(text)).await?;
                }
            }
        }
        count += 1;
        item = if count < BATCH_MAX { next(feed).now_or_never().flatten() } else { None };
    }
    for (device, params) in states {
        let params: Vec<ParamName> = params.into_iter().collect();
        let text = match push_state(app, identity, device, &params).await {
            Ok(text) => text,
            // The client reads again what it wants to know, as after any other loss.
            Err(_) => json!({ "type": "lagged", "dropped": 1 }).to_string(),
        };
        socket.feed(Message::text(text)).await?;
    }
    socket.flush().await?;
    Ok(())
}

fn push(item: &BusItem) -> Option<String> {
    let mut out = String::with_capacity(256);
    let (head, items): (_, &[Stored]) = match item {
        BusItem::Messages { device, messages } => {
            (format!("{{\"type\":\"message\",\"device\":\"{device}\",\"items\":["), messages)
        }
        BusItem::Log { kind, object, lines } if is_log(*kind) => {
            (format!("{{\"type\":\"log\",\"object\":\"{object}\",\"items\":["), lines)
        }
        BusItem::Event(event) => {
            let event = serde_json::to_string(&**event).ok()?;
            return Some(format!("{{\"type\":\"event\",\"event\":{event}}}"));
        }
        _ => return None,
    };
    out.push_str(&head);
    for (at, stored) in items.iter().enumerate() {
        if at > 0 {
            out.push(',');
        }
        stored.write_json(&mut out);
    }
    out.push_str("]}");
    Some(out)
}

async fn push_state(
    app: &App,
    identity: &Identity,
    device: DeviceId,
    params: &[ParamName],
) -> Result<String, StateError> {
    let state = &app.platform().state;
    let values = state.get_many(identity.account, &[device], params).await?;
    let presence = state.presence(identity.account, device).await?;
    let mut out = String::with_capacity(128 + 80 * params.len());
    let online = presence.connection.is_some();
    let written = write!(out, "{{\"type\":\"state\",\"device\":\"{device}\",\"online\":{online}");
    debug_assert!(written.is_ok(), "writing to a String cannot fail");
    write_time(&mut out, "seen_at", presence.seen_at);
    out.push_str(",\"values\":");
    match values.first() {
        Some((_, values)) => write_values(&mut out, values),
        None => out.push_str("{}"),
    }
    out.push('}');
    Ok(out)
}

async fn tell_error(socket: &mut Socket, detail: &str) -> Result<(), Ended> {
    let detail: String = detail.chars().take(300).collect();
    send_json(socket, &json!({ "type": "error", "detail": detail })).await
}

async fn send_json(socket: &mut Socket, value: &serde_json::Value) -> Result<(), Ended> {
    send(socket, Message::text(value.to_string())).await
}

async fn send(socket: &mut Socket, message: Message) -> Result<(), Ended> {
    match timeout(WRITE_TIMEOUT, socket.send(message)).await {
        Ok(sent) => Ok(sent?),
        Err(_) => Err(Ended::Gone),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_page_is_told_by_its_origin() {
        let headers = |origin: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            headers.insert("host", HeaderValue::from_static("fleet.example.org:8080"));
            if let Some(origin) = origin {
                headers.insert(ORIGIN, HeaderValue::from_static(origin));
            }
            headers
        };
        assert!(same_origin(&headers(None)));
        assert!(same_origin(&headers(Some("https://fleet.example.org:8080"))));
        for foreign in [
            "https://evil.example.org",
            "http://fleet.example.org",
            "null",
            "https://fleet.example.org:8080.evil.org",
        ] {
            assert!(!same_origin(&headers(Some(foreign))), "{foreign}");
        }
    }

    #[test]
    fn what_a_client_says_is_read_strictly() {
        let said = Said::read;
        said(r#"{"subscribe":["message","state","event","log"],"devices":[],"id":1}"#).unwrap();
        said(r#"{"token":"flt_x"}"#).unwrap();
        for wrong in [
            r#"{"subscribe":["messages"]}"#,
            r#"{"subscribe":"message"}"#,
            r#"{"devices":["x"]}"#,
            "[]",
            "1",
            r#"{"sub":[]}"#,
        ] {
            assert!(said(wrong).is_err(), "{wrong}");
        }
    }
}
