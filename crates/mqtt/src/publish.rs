//! What becomes of a client's PUBLISH, and of its will, which is one.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fieldline_auth::Identity;
use fieldline_contracts::clients::CLIENT_MESSAGE_BYTES_MAX;
use fieldline_contracts::{CommandError, HistoryError, NewCommand};
use fieldline_ingest::own_params;
use fieldline_model::{
    Accepted, CommandId, ConnectionId, Decoded, Device, DeviceId, EventKind, Scope, Series,
    Timestamp, Value,
};
use serde_json::Value as Json;
use tokio::time::Instant;
use tracing::{debug, warn};
use uuid::Uuid;

use crate::Shared;
use crate::codec::{PublishProps, Qos, Reason};
use crate::encode;
use crate::hub::{Hub, may_see, own};
use crate::link::Message;
use crate::metrics;
use crate::payload;
use crate::retained::NotRetained;
use crate::topic::{Target, target};

/// Seconds that a command is worth sending, unless its publisher says otherwise
/// by the message expiry of MQTT 5.
const COMMAND_TTL_S: u32 = 3_600;
/// Longest that a command may be worth sending, in seconds.
const COMMAND_TTL_S_MAX: u32 = 2_592_000;
/// How long the answer to a command is waited for at a time, in milliseconds.
const ANSWER_WAIT_MS: u64 = 30_000;
/// Longest raw payload in a device's log, in bytes.
const LOG_BYTES_MAX: usize = 64 * 1024;
/// What the client is told when the registry does not answer.
const UNAVAILABLE: &str = "the registry is unavailable; try again soon";
/// How often one connection's refused messages are told of by an event.
const REJECTED_EVERY: Duration = Duration::from_secs(10);

/// A signed-in client, without its socket.
pub(crate) struct Client {
    pub(crate) shared: Arc<Shared>,
    pub(crate) hub: Arc<Hub>,
    /// Who it is.
    pub(crate) identity: Arc<Identity>,
    /// Number of the session on this server, not reused.
    pub(crate) session: u64,
    /// What logs call the connection.
    pub(crate) connection: ConnectionId,
    pub(crate) peer: SocketAddr,
}

/// A message that a client wants published.
pub(crate) struct Incoming<'a> {
    pub(crate) topic: &'a str,
    pub(crate) payload: Bytes,
    pub(crate) qos: Qos,
    pub(crate) retain: bool,
    pub(crate) props: PublishProps,
    /// The number of a QoS 1 packet.
    pub(crate) packet_id: Option<u16>,
    /// Whether the client says that it sends it again.
    pub(crate) dup: bool,
}

/// Why a message was not taken.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) reason: Reason,
    pub(crate) text: Cow<'static, str>,
}

impl Refusal {
    pub(crate) fn new(reason: Reason, text: impl Into<Cow<'static, str>>) -> Self {
        Self { reason, text: text.into() }
    }
}

/// Messages for the pipeline, not stored yet.
pub(crate) struct Batch {
    pub(crate) device: Arc<Device>,
    pub(crate) messages: Vec<Decoded>,
    payload: Bytes,
}

impl Batch {
    /// Bytes of the payload it came in.
    pub(crate) fn bytes(&self) -> usize {
        self.payload.len()
    }
}

/// What was taken.
pub(crate) enum Taken {
    /// It is done with.
    Done(Reason),
    /// It is to be stored first: [`Client::store`].
    Batch(Batch),
}

impl Client {
    /// Whether `topic` may be published to, without doing so.
    ///
    /// # Errors
    ///
    /// Why not.
    pub(crate) fn authorise<'t>(&self, topic: &'t str) -> Result<Target<'t>, Refusal> {
        let target = target(topic).map_err(|text| Refusal::new(Reason::TopicNameInvalid, text))?;
        let (scope, seen, object) = match &target {
            // The device of an ident is not known yet: `device` looks.
            Target::Ingest { .. } => (Scope::Publish, true, None),
            Target::Command { device, .. } => {
                (Scope::Command, may_see(&self.identity, Some(device.0)), Some(*device))
            }
            Target::Client { object } => (Scope::Publish, may_see(&self.identity, *object), None),
        };
        if !self.identity.may(scope) {
            let text = format!("the token lacks the scope `{}`", scope.name());
            return Err(Refusal::new(Reason::NotAuthorized, text));
        }
        match (seen, object) {
            (true, _) => Ok(target),
            (false, Some(device)) => Err(no_device(&device)),
            (false, None) => Err(Refusal::new(
                Reason::NotAuthorized,
                "the token is for some devices only: use client/{device id}/…",
            )),
        }
    }

    /// Takes a message. What is to be stored is handed back, to be stored with
    /// more of its kind.
    ///
    /// # Errors
    ///
    /// Why it was not taken.
    pub(crate) async fn take(&self, incoming: Incoming<'_>) -> Result<Taken, Refusal> {
        let target = self.authorise(incoming.topic);
        let kind = target.as_ref().map_or("none", Target::kind);
        let outcome = match target {
            Ok(Target::Ingest { device }) => self.batch(device, incoming.payload).await,
            Ok(Target::Command { device, name }) => self.command(device, name, &incoming).await,
            Ok(Target::Client { object }) => self.route(object, &incoming).await,
            Err(refusal) => Err(refusal),
        };
        match &outcome {
            Ok(Taken::Done(reason)) => metrics::published(kind, *reason),
            Err(refusal) => metrics::published(kind, refusal.reason),
            // Counted when it is stored.
            Ok(Taken::Batch(_)) => {}
        }
        outcome
    }

    async fn batch(&self, name: &str, payload: Bytes) -> Result<Taken, Refusal> {
        let device = self.device(name).await?;
        let messages = payload::messages(&payload)
            .map_err(|error| Refusal::new(Reason::PayloadFormatInvalid, error.to_string()));
        match messages {
            Ok(messages) => Ok(Taken::Batch(Batch { device, messages, payload })),
            Err(refusal) => {
                self.log_error(&device, &payload, "bad_payload", &refusal.text);
                Err(refusal)
            }
        }
    }

    /// The device of an id or ident, if this client may see it.
    async fn device(&self, name: &str) -> Result<Arc<Device>, Refusal> {
        let (ingest, account) = (&self.shared.services.ingest, self.identity.account);
        let unavailable = |error: fieldline_contracts::RegistryError| {
            debug!(%error, "device cannot be looked up");
            Refusal::new(Reason::Unspecified, UNAVAILABLE)
        };
        let mut found = None;
        if let Ok(id) = name.parse::<DeviceId>() {
            found = ingest.device(account, id).await.map_err(unavailable)?;
        }
        if found.is_none() {
            found = ingest.device_by_ident(account, name).await.map_err(unavailable)?;
        }
        let Some(device) = found.filter(|d| may_see(&self.identity, Some(d.id.0))) else {
            return Err(no_device(&name));
        };
        if !device.enabled || !ingest.account_enabled(account) {
            return Err(Refusal::new(Reason::NotAuthorized, "the device is disabled"));
        }
        Ok(device)
    }

    /// Stores messages of one device. When this returns `Ok` they are durable.
    ///
    /// # Errors
    ///
    /// If they are not, or it is not known; nothing may be acknowledged.
    pub(crate) async fn store(
        &self,
        device: &Arc<Device>,
        batches: Vec<Batch>,
    ) -> Result<(), Refusal> {
        let ingest = &self.shared.services.ingest;
        let received = ingest.now();
        let messages: Vec<Decoded> =
            batches.iter().flat_map(|batch| batch.messages.iter().cloned()).collect();
        let outcome =
            match ingest.submit(self.identity.account, device.id, received, messages).await {
                Ok(submitted) if submitted.rejected > 0 => Err(Refusal::new(
                    Reason::PayloadFormatInvalid,
                    "a message is too large to be kept; the device's log says more",
                )),
                Ok(_) => Ok(()),
                Err(error) => {
                    debug!(%error, code = error.code(), "messages were not stored");
                    Err(not_stored(&error))
                }
            };
        for batch in batches {
            match &outcome {
                Ok(()) => {
                    metrics::published("ingest", Reason::Success);
                    self.log_frame(batch, received);
                }
                Err(refusal) => {
                    metrics::published("ingest", refusal.reason);
                    self.log_error(device, &batch.payload, "not_stored", &refusal.text);
                }
            }
        }
        outcome
    }

    /// Hands a message to other clients of the account.
    async fn route(&self, object: Option<Uuid>, incoming: &Incoming<'_>) -> Result<Taken, Refusal> {
        let now = Instant::now();
        let expires_at = incoming.props.expiry_s.map(|s| now + Duration::from_secs(u64::from(s)));
        let message = Arc::new(Message {
            topic: incoming.topic.into(),
            payload: incoming.payload.clone(),
            props: incoming.props.forward.clone(),
            expires_at,
            qos: if incoming.qos == Qos::AtMostOnce { 0 } else { 1 },
            retain: incoming.retain,
            publisher: self.session,
            object,
        });
        if !self.hub.is_alone() && message.bytes() > CLIENT_MESSAGE_BYTES_MAX {
            let text = "a message to clients of all nodes has at most 1 MiB";
            return Err(Refusal::new(Reason::QuotaExceeded, text));
        }
        if incoming.retain {
            self.hub.retained.put(&message).await.map_err(|why| not_retained(&why))?;
        }
        let here = self.hub.publish(&message);
        self.hub.spread(&message).await;
        // Of subscribers on other nodes nothing is known.
        let reason = match here {
            0 if self.hub.is_alone() => Reason::NoMatchingSubscribers,
            _ => Reason::Success,
        };
        Ok(Taken::Done(reason))
    }

    /// Queues a command for a device; its answer is published when it comes.
    async fn command(
        &self,
        device: DeviceId,
        name: &str,
        incoming: &Incoming<'_>,
    ) -> Result<Taken, Refusal> {
        let answer_to = match &incoming.props.response_topic {
            None => (format!("command/{device}/{name}/answer"), Some(device.0)),
            Some(topic) => match target(topic.as_str()) {
                Ok(Target::Client { object }) if may_see(&self.identity, object) => {
                    (topic.as_str().to_owned(), object)
                }
                _ => {
                    let text = "the response topic must be one under client/ that you may use";
                    return Err(Refusal::new(Reason::TopicNameInvalid, text));
                }
            },
        };
        let params = payload::arguments(&incoming.payload)
            .map_err(|error| Refusal::new(Reason::PayloadFormatInvalid, error.to_string()))?;
        // The expiry of MQTT 5 says how long the command is worth sending.
        let ttl_s = incoming.props.expiry_s.unwrap_or(COMMAND_TTL_S).clamp(1, COMMAND_TTL_S_MAX);
        let print = incoming.packet_id.map(|packet_id| {
            let Incoming { topic, payload, props, .. } = incoming;
            let answer_to = props.response_topic.as_ref().map(|topic| topic.as_str());
            let content = (*topic, payload, answer_to, &props.correlation);
            self.hub.fingerprint(&(&self.identity.actor.name, packet_id, content))
        });
        // Its PUBACK was lost, and the command is on its way.
        if incoming.dup && print.is_some_and(|print| self.hub.is_recent_command(print)) {
            return Ok(Taken::Done(Reason::Success));
        }
        let Some(room) = AnswerRoom::take(&self.hub) else {
            let text = "the account awaits as many answers by MQTT as it may";
            return Err(Refusal::new(Reason::QuotaExceeded, text));
        };
        let commands = &self.shared.services.platform.commands;
        let new = NewCommand { name: name.to_owned(), params, ttl_s };
        let account = self.identity.account;
        let command = commands
            .submit(account, device, new, &self.identity.actor)
            .await
            .map_err(|error| not_queued(&error))?;
        if let Some(print) = print {
            self.hub.note_command(print);
        }
        let correlation = incoming.props.correlation.clone();
        self.await_answer(room, command.id, answer_to, correlation);
        Ok(Taken::Done(Reason::Success))
    }

    fn await_answer(
        &self,
        room: AnswerRoom,
        id: CommandId,
        (topic, object): (String, Option<Uuid>),
        correlation: Option<Bytes>,
    ) {
        let (shared, account) = (Arc::clone(&self.shared), self.identity.account);
        self.shared.background.spawn(async move {
            let commands = Arc::clone(&shared.services.platform.commands);
            loop {
                let waited = tokio::select! {
                    () = shared.stop.cancelled() => return,
                    waited = commands.wait(account, id, ANSWER_WAIT_MS) => waited,
                };
                match waited {
                    Ok(command) if command.status.is_final() => {
                        let payload = payload::answer(&command).into();
                        let mut message = own(topic, payload, object, false);
                        if let Some(data) = correlation {
                            message.props = encode::correlation(&data).freeze();
                        }
                        let message = Arc::new(message);
                        room.hub.publish(&message);
                        room.hub.spread(&message).await;
                        return;
                    }
                    Ok(_) => {}
                    // Nobody can be told more than the command's own record says.
                    Err(error) => {
                        warn!(%error, command = %id, "answer cannot be awaited");
                        return;
                    }
                }
            }
        });
    }

    /// The raw payload beside the decoded messages, in the device's log.
    fn log_frame(&self, batch: Batch, at: Timestamp) {
        let Batch { device, messages, payload } = batch;
        let series = Series::device_log(self.identity.account, device.id);
        let (connection, peer) = (self.connection, self.peer);
        self.shared.services.ingest.log_with(payload.len() * 2 + 256, move || {
            let decoded: Vec<Json> = messages.iter().map(decoded_json).collect();
            let mut params = frame_params(connection, peer, &device, "frame", &payload);
            for (name, value) in own_params([("messages", Value::Json(Arc::new(decoded.into())))]) {
                params.set(name, value);
            }
            Accepted::own(series, at, params)
        });
    }

    fn log_error(&self, device: &Arc<Device>, payload: &Bytes, class: &'static str, text: &str) {
        let series = Series::device_log(self.identity.account, device.id);
        let (connection, peer, device) = (self.connection, self.peer, Arc::clone(device));
        let (payload, text) = (payload.clone(), text.to_owned());
        let at = self.shared.services.ingest.now();
        self.shared.services.ingest.log_with(payload.len() + 256, move || {
            let mut params = frame_params(connection, peer, &device, "error", &payload);
            let error = [("error.class", class.into()), ("error.text", text.into())];
            for (name, value) in own_params(error) {
                params.set(name, value);
            }
            Accepted::own(series, at, params)
        });
    }

    /// Tells of a refused message where nothing else does, by an event.
    pub(crate) fn tell_refused(&self, last: &mut Option<Instant>, topic: &str, refusal: &Refusal) {
        let now = Instant::now();
        if last.is_some_and(|at| now.duration_since(at) < REJECTED_EVERY) {
            return;
        }
        *last = Some(now);
        let topic: String = topic.chars().take(256).collect();
        let params = own_params([
            ("protocol", "mqtt".into()),
            ("peer", self.peer.to_string().into()),
            ("connection.id", self.connection.to_string().into()),
            ("topic", topic.into()),
            ("error.class", refusal.reason.code().into()),
            ("error.text", refusal.text.as_ref().into()),
        ]);
        let ingest = &self.shared.services.ingest;
        let account = self.identity.account;
        ingest.event_soon(ingest.new_event(account, EventKind::Rejected, account.0, params));
    }
}

/// Room for one more answer, given back when dropped.
struct AnswerRoom {
    hub: Arc<Hub>,
}

impl AnswerRoom {
    fn take(hub: &Arc<Hub>) -> Option<Self> {
        hub.reserve_answer().then(|| Self { hub: Arc::clone(hub) })
    }
}

impl Drop for AnswerRoom {
    fn drop(&mut self) {
        self.hub.release_answer();
    }
}

/// What the client is told when messages were not stored: the details, such as
/// paths, are the operator's.
fn not_stored(error: &HistoryError) -> Refusal {
    match error {
        HistoryError::Full(_) => {
            Refusal::new(Reason::QuotaExceeded, "no space is left to store messages")
        }
        HistoryError::Busy => {
            Refusal::new(Reason::QuotaExceeded, "the store is busy; send it again soon")
        }
        HistoryError::Closed => {
            Refusal::new(Reason::Unspecified, "the server is shutting down; send it again")
        }
        _ => Refusal::new(
            Reason::Unspecified,
            "the message could not be made durable for sure; send it again",
        ),
    }
}

/// What the client is told when a message was not retained; nobody gets it then.
fn not_retained(why: &NotRetained) -> Refusal {
    match why {
        NotRetained::Full => Refusal::new(
            Reason::QuotaExceeded,
            "the account retains as many messages or bytes as it may",
        ),
        NotRetained::Failed(error) => {
            debug!(error, "a message was not retained");
            Refusal::new(
                Reason::Unspecified,
                "the message could not be retained for sure; send it again",
            )
        }
    }
}

/// What the client is told when a command was not queued.
fn not_queued(error: &CommandError) -> Refusal {
    let reason = match error {
        CommandError::NoDevice(_) => Reason::TopicNameInvalid,
        CommandError::QueueFull(_) => Reason::QuotaExceeded,
        CommandError::Invalid(_) => Reason::PayloadFormatInvalid,
        _ => {
            debug!(%error, "command was not queued");
            return Refusal::new(Reason::Unspecified, UNAVAILABLE);
        }
    };
    Refusal::new(reason, error.to_string())
}

/// The same words for a device that is not there and one that may not be seen.
fn no_device(name: &dyn std::fmt::Display) -> Refusal {
    let name: String = name.to_string().chars().take(64).collect();
    Refusal::new(Reason::TopicNameInvalid, format!("there is no device {name} in this account"))
}

fn frame_params(
    connection: ConnectionId,
    peer: SocketAddr,
    device: &Device,
    kind: &'static str,
    payload: &[u8],
) -> fieldline_model::Params {
    let cut = payload.get(..LOG_BYTES_MAX);
    let mut params = own_params([
        ("log.kind", kind.into()),
        ("connection.id", connection.to_string().into()),
        ("peer", peer.to_string().into()),
        ("ident", device.ident.as_str().into()),
        ("protocol", "mqtt".into()),
        ("frame.hex", Value::from(cut.unwrap_or(payload))),
    ]);
    if cut.is_some_and(|cut| cut.len() < payload.len()) {
        for (name, value) in own_params([("frame.cut", true.into())]) {
            params.set(name, value);
        }
    }
    params
}

fn decoded_json(decoded: &Decoded) -> Json {
    let mut members = serde_json::Map::new();
    if let Some(at) = decoded.timestamp {
        members.insert("timestamp".to_owned(), at.to_string().into());
    }
    for (name, value) in &decoded.params {
        members.insert(name.as_str().to_owned(), value.to_json());
    }
    Json::Object(members)
}
