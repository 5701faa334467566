//! Channels: listeners for devices.

use std::net::SocketAddr;
use std::time::Duration;

use fieldline_contracts::registry::Versioned;
use fieldline_contracts::{ChannelStatus, Missing, RegistryExt as _};
use fieldline_model::object::{Labels, defaults};
use fieldline_model::{Channel, ChannelId, ConnectionId, DeviceId, Scope, Timestamp, Transport};
use hyper::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use utoipa::ToSchema;
use uuid::Uuid;

use super::accounts::yes;
use super::devices::check_protocol;
use super::sample;
use crate::app::App;
use crate::call::{Ctx, empty, json, with_etag};
use crate::objects::{change, check_labels, check_name, check_range, page, remove, scan};
use crate::patch::merged;
use crate::problem::{Problem, missing};
use crate::route::Answer;

/// Longest that the maker of a channel waits until it listens or has failed to.
const OPENING_MAX: Duration = Duration::from_secs(1);
/// Wait between two looks at it.
const OPENING_PAUSE: Duration = Duration::from_millis(20);

/// A channel and how it fares.
#[derive(Serialize, ToSchema)]
pub(crate) struct ChannelView {
    #[serde(flatten)]
    channel: Channel,
    /// Counts up with every change; the `ETag`.
    revision: u64,
    status: Status,
}

/// How a channel fares.
#[derive(Serialize, ToSchema)]
pub(crate) struct Status {
    /// Whether devices can connect now.
    listening: bool,
    /// Why not, or what else is wrong.
    error: Option<String>,
    /// The address it listens on.
    address: Option<String>,
    /// Connections held now, on all nodes.
    connections: u32,
    /// How it fares on each node that holds channels, in order of names.
    nodes: Vec<NodeStatus>,
}

/// How a channel fares on one node.
#[derive(Serialize, ToSchema)]
pub(crate) struct NodeStatus {
    node: String,
    listening: bool,
    /// Why not, what else is wrong, or why the node gives no answer.
    error: Option<String>,
    address: Option<String>,
    connections: u32,
}

/// Connections of a channel on all nodes.
#[derive(Serialize, ToSchema)]
pub(crate) struct ConnectionsView {
    items: Vec<ConnectionView>,
    /// Always null: all are in one answer.
    next: Option<String>,
    /// Nodes that gave no answer, and may hold more.
    unreachable: Vec<UnreachableView>,
}

/// A node that gave no answer.
#[derive(Serialize, ToSchema)]
pub(crate) struct UnreachableView {
    node: String,
    reason: String,
}

/// One connection of a channel.
#[derive(Serialize, ToSchema)]
pub(crate) struct ConnectionView {
    id: Uuid,
    /// The node that holds it.
    node: String,
    channel: Uuid,
    /// The device, once it has identified itself.
    device: Option<DeviceId>,
    /// What the device calls itself.
    ident: Option<String>,
    /// The address it comes from.
    peer: String,
    transport: Transport,
    connected_at: Timestamp,
    /// When bytes last came.
    received_at: Option<Timestamp>,
    received_bytes: u64,
    sent_bytes: u64,
    /// Messages stored.
    messages: u64,
}

/// A channel to be made, and the members of one that can be changed.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ChannelInput {
    /// Name for people, unique in the account.
    #[schema(min_length = 1, max_length = 64)]
    name: String,
    /// The protocol's name.
    protocol: String,
    /// What carries the bytes.
    transport: Transport,
    /// Address and port to listen on, such as `0.0.0.0:5027`.
    listen: String,
    /// Whether it listens.
    #[serde(default = "yes")]
    enabled: bool,
    /// Whether a device that is not registered is registered by its first login.
    #[serde(default)]
    auto_register: bool,
    /// Silence after which a device is disconnected, in seconds: 5 to 86,400.
    #[serde(default = "defaults::idle_timeout_s")]
    #[schema(minimum = 5, maximum = 86_400)]
    idle_timeout_s: u32,
    /// Most connections held at once: 1 to 100,000.
    #[serde(default = "defaults::connections_max")]
    #[schema(minimum = 1, maximum = 100_000)]
    connections_max: u32,
    /// Longest frame, in bytes: 64 to 16,777,216.
    #[serde(default = "defaults::frame_bytes_max")]
    #[schema(minimum = 64, maximum = 16_777_216)]
    frame_bytes_max: u32,
    /// Most bytes a second of one connection, averaged over ten seconds: 0 for no limit, or 64 and more.
    #[serde(default = "defaults::connection_bytes_per_s_max")]
    connection_bytes_per_s_max: u32,
    /// PEM file of the certificate chain on the server; TLS only, set with the scope `root`.
    #[serde(default)]
    tls_certificate: Option<String>,
    /// PEM file of the private key on the server; TLS only, set with the scope `root`.
    #[serde(default)]
    tls_key: Option<String>,
    /// Labels.
    #[serde(default)]
    labels: Labels,
}

/// A `$to` of the members that channel and input share, taken from `$from`, and of those that follow.
macro_rules! with_members {
    ($to:ident, $from:expr, $($more:tt)*) => {{
        let from = $from;
        $to {
            name: from.name,
            protocol: from.protocol,
            transport: from.transport,
            listen: from.listen,
            enabled: from.enabled,
            auto_register: from.auto_register,
            idle_timeout_s: from.idle_timeout_s,
            connections_max: from.connections_max,
            frame_bytes_max: from.frame_bytes_max,
            connection_bytes_per_s_max: from.connection_bytes_per_s_max,
            tls_certificate: from.tls_certificate,
            tls_key: from.tls_key,
            labels: from.labels,
            $($more)*
        }
    }};
}

impl ChannelInput {
    fn of(channel: &Channel) -> Self {
        with_members!(Self, channel.clone(),)
    }

    /// Checks it, and puts the address into its one form; `before` is what was there.
    fn checked(
        mut self,
        ctx: &Ctx,
        before: Option<&Channel>,
        protocols: &[String],
    ) -> Result<Self, Problem> {
        check_name("name", &self.name, 64)?;
        check_labels(&self.labels)?;
        if before.is_none_or(|before| before.protocol != self.protocol) {
            check_protocol(&self.protocol, protocols)?;
        }
        let address: SocketAddr = self.listen.trim().parse().map_err(|_| {
            let text: String = self.listen.chars().take(64).collect();
            Problem::member(
                "listen",
                format!(
                    "`{text}` is no address and port; expected such as 0.0.0.0:5027 or [::]:5027"
                ),
            )
        })?;
        // One form, so that the same address twice is recognised.
        self.listen = address.to_string();
        check_range("idle_timeout_s", self.idle_timeout_s, 5, 86_400)?;
        check_range("connections_max", self.connections_max, 1, 100_000)?;
        check_range("frame_bytes_max", self.frame_bytes_max, 64, 16 << 20)?;
        if self.connection_bytes_per_s_max != 0 {
            check_range(
                "connection_bytes_per_s_max",
                self.connection_bytes_per_s_max,
                64,
                u32::MAX,
            )?;
        }
        let files = [("tls_certificate", &self.tls_certificate), ("tls_key", &self.tls_key)];
        let were = before.map(|before| [&before.tls_certificate, &before.tls_key]);
        for (at, (member, file)) in files.into_iter().enumerate() {
            match file {
                Some(path) => check_name(member, path, 1_024)?,
                None if self.transport == Transport::Tls => {
                    return Err(Problem::member(
                        member,
                        "is needed for TLS: name a PEM file on the server",
                    ));
                }
                None => {}
            }
            let same = were.and_then(|were| were.get(at).copied()).is_some_and(|was| was == file);
            if file.is_some() && !same && !ctx.identity.may(Scope::Root) {
                return Err(Problem::member(
                    member,
                    "names a file on the server, which needs the scope `root`",
                ));
            }
        }
        Ok(self)
    }

    fn onto(self, channel: Channel) -> Channel {
        with_members!(Channel, self, ..channel)
    }

    /// Whether its protocol can be carried so.
    async fn check_transport(&self, ctx: &Ctx) -> Result<(), Problem> {
        let found = ctx.app.programs.find(&ctx.app, ctx.account(), &self.protocol).await?;
        let Some(program) = found.and_then(|found| found.program.ok()) else { return Ok(()) };
        // TLS is TCP within.
        let carried =
            if self.transport == Transport::Tls { Transport::Tcp } else { self.transport };
        let able = program.transports();
        if able.is_empty() || able.contains(&carried) || able.contains(&self.transport) {
            return Ok(());
        }
        let able: Vec<String> = able.iter().map(|t| format!("{t:?}").to_lowercase()).collect();
        Err(Problem::member(
            "transport",
            format!("the protocol {} is carried by: {}", self.protocol, able.join(", ")),
        ))
    }
}

async fn view(app: &App, found: Versioned<Channel>) -> ChannelView {
    let channel = &found.object;
    let status = app.services.channels.status(channel.account, channel.id).await;
    with_status(found, status)
}

fn with_status(found: Versioned<Channel>, status: ChannelStatus) -> ChannelView {
    let Versioned { object: channel, revision } = found;
    let nodes = status.nodes.into_iter().map(|on| NodeStatus {
        node: on.node,
        listening: on.listening,
        error: on.error,
        address: on.address,
        connections: on.connections,
    });
    let status = Status {
        listening: status.listening,
        error: status.error,
        address: status.address,
        connections: status.connections,
        nodes: nodes.collect(),
    };
    ChannelView { channel, revision, status }
}

/// Waits for a moment until it is known whether a channel listens, so that its maker is told.
async fn opened(app: &App, channel: &Channel) {
    let opened = async {
        loop {
            let status = app.services.channels.status(channel.account, channel.id).await;
            if status.listening || status.error.is_some() {
                return;
            }
            tokio::time::sleep(OPENING_PAUSE).await;
        }
    };
    tokio::time::timeout(OPENING_MAX, opened).await.unwrap_or_default();
}

/// `GET /channels`
pub(crate) async fn list(ctx: Ctx) -> Answer {
    let listed = scan::<Channel>(&ctx, ctx.account(), Vec::new(), false, |_| true).await?;
    let ids: Vec<ChannelId> = listed.items.iter().map(|found| found.object.id).collect();
    let statuses = ctx.app.services.channels.statuses(ctx.account(), &ids).await;
    let items = listed.items.into_iter().zip(statuses);
    let items: Vec<ChannelView> = items.map(|(found, status)| with_status(found, status)).collect();
    page(&ctx, &items, listed.next.map(|id| id.to_string()))
}

/// `POST /channels`
pub(crate) async fn create(ctx: Ctx) -> Answer {
    ctx.unrestricted("making a channel")?;
    let input: ChannelInput = ctx.json()?;
    let protocols = ctx.app.programs.names(&ctx.app, ctx.account()).await?;
    let input = input.checked(&ctx, None, &protocols)?;
    input.check_transport(&ctx).await?;
    let clock = &ctx.app.platform().clock;
    let now = clock.now();
    let id = ChannelId::new(now, clock.random());
    let channel = with_members!(Channel, input, id, account: ctx.account(), created_at: now);
    let registry = ctx.app.registry();
    let made = registry.create_object(ctx.account(), &channel, &ctx.identity.actor).await?;
    if made.object.enabled {
        opened(&ctx.app, &made.object).await;
    }
    let etag = format!("\"{}\"", made.revision);
    Ok(with_etag(json(StatusCode::CREATED, &view(&ctx.app, made).await)?, &etag))
}

/// `GET /channels/{id}`
pub(crate) async fn read(ctx: Ctx) -> Answer {
    let found = ctx.load::<Channel>(ctx.id(0, "channel")?).await?;
    let etag = format!("\"{}\"", found.revision);
    // The status is not in the revision: no 304 for it.
    Ok(with_etag(json(StatusCode::OK, &view(&ctx.app, found).await)?, &etag))
}

/// `PATCH /channels/{id}`
pub(crate) async fn patch(ctx: Ctx) -> Answer {
    ctx.unrestricted("changing a channel")?;
    let id = ctx.id(0, "channel")?;
    let body: Json = ctx.json()?;
    let protocols = ctx.app.programs.names(&ctx.app, ctx.account()).await?;
    let wanted = |channel: &Channel, revision: u64| {
        let mut seen = serde_json::to_value(channel).map_err(Problem::fault)?;
        if let Some(members) = seen.as_object_mut() {
            members.insert("revision".to_owned(), Json::from(revision));
        }
        let mut patch = body.clone();
        // The status is never part of a change; a whole object may be sent back.
        if let Some(members) = patch.as_object_mut() {
            members.remove("status");
        }
        merged(&ChannelInput::of(channel), &seen, patch)?.checked(&ctx, Some(channel), &protocols)
    };
    let before = ctx.load::<Channel>(id).await?;
    wanted(&before.object, before.revision)?.check_transport(&ctx).await?;
    let changed = change::<Channel>(&ctx, ctx.account(), id, |channel, revision| {
        Ok(wanted(&channel, revision)?.onto(channel))
    })
    .await?;
    let etag = format!("\"{}\"", changed.revision);
    Ok(with_etag(json(StatusCode::OK, &view(&ctx.app, changed).await)?, &etag))
}

/// `DELETE /channels/{id}`
pub(crate) async fn delete(ctx: Ctx) -> Answer {
    ctx.unrestricted("deleting a channel")?;
    let id = ctx.id(0, "channel")?;
    remove::<Channel>(&ctx, ctx.account(), id).await
}

/// `GET /channels/{id}/connections`
pub(crate) async fn connections(ctx: Ctx) -> Answer {
    let id = ctx.id(0, "channel")?;
    ctx.load::<Channel>(id).await?;
    let found = ctx.app.services.channels.connections(ctx.account(), ChannelId(id)).await;
    // A restricted caller sees those of its devices only.
    let seen = found.items.into_iter().filter(|connection| {
        ctx.identity.sees_all() || connection.device.is_some_and(|id| ctx.identity.may_see(id))
    });
    let items = seen
        .map(|connection| ConnectionView {
            id: connection.id.0,
            node: connection.node,
            channel: connection.channel.0,
            device: connection.device,
            ident: connection.ident,
            peer: connection.peer,
            transport: connection.transport,
            connected_at: connection.connected_at,
            received_at: connection.received_at,
            received_bytes: connection.received_bytes,
            sent_bytes: connection.sent_bytes,
            messages: connection.messages,
        })
        .collect();
    let unreachable = found
        .missing
        .into_iter()
        .map(|Missing { node, reason }| UnreachableView { node, reason })
        .collect();
    json(StatusCode::OK, &ConnectionsView { items, next: None, unreachable })
}

/// `DELETE /channels/{id}/connections/{connection}`
pub(crate) async fn close(ctx: Ctx) -> Answer {
    ctx.unrestricted("closing a connection")?;
    let channel = ctx.id(0, "channel")?;
    ctx.load::<Channel>(channel).await?;
    let connection = ConnectionId(ctx.id(1, "connection")?);
    let channels = &ctx.app.services.channels;
    match channels.close(ctx.account(), ChannelId(channel), connection).await {
        Ok(true) => Ok(empty(StatusCode::NO_CONTENT)),
        Ok(false) => Err(missing("connection", ctx.segment(1))),
        Err(nodes) => {
            let nodes: Vec<String> = nodes
                .into_iter()
                .map(|Missing { node, reason }| format!("{node} ({reason})"))
                .collect();
            Err(Problem::unavailable(format!(
                "no node that answers holds this connection, and {} gave no answer: try again when it does",
                nodes.join(", ")
            )))
        }
    }
}

/// A place to connect a device to.
#[derive(Serialize, ToSchema)]
pub(crate) struct ConnectPoint {
    id: Uuid,
    name: String,
    protocol: String,
    transport: Transport,
    /// Host as the caller reaches this server.
    host: String,
    port: u16,
    /// A command for a shell that sends a first message.
    test_command: String,
}

/// Where devices can connect.
#[derive(Serialize, ToSchema)]
pub(crate) struct ConnectView {
    channels: Vec<ConnectPoint>,
}

/// `GET /connect`
pub(crate) async fn connect(ctx: Ctx) -> Answer {
    let page = fieldline_contracts::Page::first(200);
    let found = ctx.app.registry().list_objects::<Channel>(ctx.account(), &page).await?;
    let host = host(&ctx);
    let mut channels = Vec::new();
    let found: Vec<Channel> =
        found.into_iter().map(|found| found.object).filter(|channel| channel.enabled).collect();
    let ids: Vec<ChannelId> = found.iter().map(|channel| channel.id).collect();
    let statuses = ctx.app.services.channels.statuses(ctx.account(), &ids).await;
    for (channel, status) in found.into_iter().zip(statuses) {
        let address = status.address.as_deref().unwrap_or(&channel.listen);
        let Ok(address) = address.parse::<SocketAddr>() else { continue };
        let port = address.port();
        // One that listens on this machine alone cannot be reached by the name the caller uses.
        let host =
            if address.ip().is_unspecified() { host.clone() } else { address.ip().to_string() };
        let test_command =
            sample::test_command(&channel, &host, port, ctx.app.platform().clock.now());
        channels.push(ConnectPoint {
            id: channel.id.0,
            name: channel.name,
            protocol: channel.protocol,
            transport: channel.transport,
            host,
            port,
            test_command,
        });
    }
    json(StatusCode::OK, &ConnectView { channels })
}

/// The host that the caller reached us by, without its port.
fn host(ctx: &Ctx) -> String {
    let text = ctx.header("host").or_else(|| ctx.uri.host()).unwrap_or("127.0.0.1");
    let host = match text.rsplit_once(':') {
        // An IPv6 address has colons of its own, within brackets.
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => text,
    };
    let plain = host.trim_matches(['[', ']']);
    // It goes into a shell's command line: nothing but what names a host.
    let fits =
        !plain.is_empty() && plain.chars().all(|c| c.is_ascii_alphanumeric() || ".-:_".contains(c));
    if fits { plain.to_owned() } else { "127.0.0.1".to_owned() }
}
