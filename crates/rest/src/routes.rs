//! The table of all routes. What is not here cannot be reached, and is not in the OpenAPI document.

use fieldline_model::{Command, Event, Scope};

use crate::api::{
    accounts, auth, channels, commands, devices, messages, nodes, parameters, protocols, settings,
    state, system, tokens, trails, users,
};
use crate::live;
use crate::route::{Handler, Param, Route, Shape, delete, get, patch, post, put};

/// Largest body of messages.
const MESSAGES_BYTES_MAX: usize = 8 << 20;

const LIMIT: Param = param("limit", "integer", "Most items of the page; larger values are capped");
const CURSOR: Param = param("cursor", "string", "`next` of the page before");
const FROM: Param = param("from", "date-time", "From this instant on; RFC 3339 or Unix seconds");
const TO: Param = param("to", "date-time", "Before this instant; RFC 3339 or Unix seconds");
const REVERSE: Param = param("reverse", "boolean", "Whether the newest come first");
const WAIT: Param = param("wait_ms", "integer", "Wait so long for the answer, at most 60,000");
const ACCOUNT: Param = param("account", "uuid", "Another account; needs the scope `root`");
const QUERY: Param = param("q", "string", "Part of the name or ident, whatever the case");
const IDENT: Param = param("ident", "string", "Exactly this ident");
const LABEL: Param = param("label", "string", "`KEY:VALUE`, or `KEY` for any value; all must hold");
const ONLINE: Param =
    param("online", "boolean", "Only devices that are connected, or that are not");

const PAGE: &[Param] = &[LIMIT, CURSOR];

const fn param(name: &'static str, kind: &'static str, about: &'static str) -> Param {
    Param { name, kind, about }
}

macro_rules! anyone {
    ($handler:path) => {
        Handler::Public(|call| Box::pin($handler(call)))
    };
}

macro_rules! signed_in {
    ($handler:path) => {
        Handler::Private(None, |ctx| Box::pin($handler(ctx)))
    };
}

macro_rules! with {
    ($scope:ident, $handler:path) => {
        Handler::Private(Some(Scope::$scope), |ctx| Box::pin($handler(ctx)))
    };
}

/// Every route.
pub(crate) static ROUTES: &[Route] = &[
    // Signing in.
    post("/api/v1/auth/link", anyone!(auth::link), "auth", "Sign in by a one-time link")
        .about("Begins a session, held by a cookie. The link works once.")
        .takes::<auth::LinkInput>()
        .gives::<auth::SignedInView>()
        .status(200),
    post("/api/v1/auth/sign-in", anyone!(auth::sign_in), "auth", "Sign in by password")
        .about("Begins a session, held by a cookie.")
        .takes::<auth::SignInInput>()
        .gives::<auth::SignedInView>()
        .status(200),
    post("/api/v1/auth/sign-out", signed_in!(auth::sign_out), "auth", "End the session")
        .status(204),
    get("/api/v1/auth/me", signed_in!(auth::me), "auth", "Who is calling").gives::<auth::Me>(),
    post("/api/v1/auth/password", signed_in!(auth::password), "auth", "Set the password")
        .about("Ends all other sessions of the user.")
        .takes::<auth::PasswordInput>()
        .status(204)
        .secret(),
    // Accounts, users, tokens.
    get("/api/v1/accounts", signed_in!(accounts::list), "accounts", "List accounts")
        .about("With the scope `root` all, otherwise the caller's own.")
        .query(PAGE)
        .lists::<accounts::AccountView>(),
    post("/api/v1/accounts", with!(Root, accounts::create), "accounts", "Create an account")
        .takes::<accounts::AccountInput>()
        .gives::<accounts::AccountView>()
        .revision(),
    get("/api/v1/accounts/{id}", signed_in!(accounts::read), "accounts", "Read an account")
        .gives::<accounts::AccountView>()
        .revision(),
    patch("/api/v1/accounts/{id}", with!(Root, accounts::patch), "accounts", "Change an account")
        .takes::<accounts::AccountInput>()
        .gives::<accounts::AccountView>()
        .revision(),
    delete("/api/v1/accounts/{id}", with!(Root, accounts::delete), "accounts", "Delete an account")
        .about("With everything in it, messages included. It can be done again where it was cut short.")
        .revision()
        .waits(),
    get("/api/v1/users", with!(Admin, users::list), "users", "List users")
        .query(&[LIMIT, CURSOR, ACCOUNT])
        .lists::<users::UserView>(),
    post("/api/v1/users", with!(Admin, users::create), "users", "Create a user")
        .about("Without a password the answer holds a one-time link, shown this once.")
        .takes::<users::UserInput>()
        .gives::<users::UserView>()
        .revision()
        .secret(),
    get("/api/v1/users/{id}", with!(Admin, users::read), "users", "Read a user")
        .gives::<users::UserView>()
        .revision(),
    patch("/api/v1/users/{id}", with!(Admin, users::patch), "users", "Change a user")
        .takes::<users::UserPatch>()
        .gives::<users::UserView>()
        .revision(),
    delete("/api/v1/users/{id}", with!(Admin, users::delete), "users", "Delete a user")
        .about("Ends the user's sessions; tokens that the user made stay.")
        .revision(),
    post("/api/v1/users/{id}/link", with!(Admin, users::create_link), "users", "Make a one-time link")
        .about("For a user who lost the password. It works once, within fifteen minutes.")
        .gives::<users::LinkView>()
        .secret(),
    get("/api/v1/tokens", with!(Admin, tokens::list), "tokens", "List tokens")
        .query(&[LIMIT, CURSOR, ACCOUNT])
        .lists::<tokens::TokenView>(),
    post("/api/v1/tokens", with!(Admin, tokens::create), "tokens", "Create a token")
        .about("The answer holds its secret, shown this once.")
        .takes::<tokens::TokenInput>()
        .gives::<tokens::TokenView>()
        .revision()
        .secret(),
    get("/api/v1/tokens/{id}", with!(Admin, tokens::read), "tokens", "Read a token")
        .gives::<tokens::TokenView>()
        .revision(),
    patch("/api/v1/tokens/{id}", with!(Admin, tokens::patch), "tokens", "Change a token")
        .takes::<tokens::TokenPatch>()
        .gives::<tokens::TokenView>()
        .revision(),
    delete("/api/v1/tokens/{id}", with!(Admin, tokens::delete), "tokens", "Revoke a token")
        .about("It stops working at once, also for connections that are open.")
        .revision(),
    // Devices and what they say.
    get("/api/v1/devices", with!(Read, devices::list), "devices", "List devices")
        .query(&[LIMIT, CURSOR, QUERY, IDENT, LABEL, ONLINE])
        .lists::<devices::DeviceView>(),
    post("/api/v1/devices", with!(Write, devices::create), "devices", "Create a device")
        .takes::<devices::DeviceInput>()
        .gives::<devices::DeviceView>()
        .revision(),
    get("/api/v1/devices/{id}", with!(Read, devices::read), "devices", "Read a device")
        .gives::<devices::DeviceView>()
        .revision(),
    patch("/api/v1/devices/{id}", with!(Write, devices::patch), "devices", "Change a device")
        .takes::<devices::DeviceInput>()
        .gives::<devices::DeviceView>()
        .revision(),
    delete("/api/v1/devices/{id}", with!(Write, devices::delete), "devices", "Delete a device")
        .revision(),
    get("/api/v1/devices/{id}/messages", with!(Read, messages::list), "messages", "Read messages of a device")
        .about("Oldest first, or newest first with `reverse`. Numbers have the digits that the device sent.")
        .query(&[
            FROM,
            TO,
            LIMIT,
            CURSOR,
            REVERSE,
            param("fields", "string", "Only these parameters, separated by commas"),
        ])
        .lists::<messages::Message>(),
    post("/api/v1/devices/{id}/messages", with!(Publish, messages::publish), "messages", "Publish messages of a device")
        .about("One message or an array of at most 10,000; durable when answered. The same time and content again is stored once.")
        .takes::<messages::MessagesInput>()
        .body_max(MESSAGES_BYTES_MAX)
        .gives::<messages::Published>()
        .status(200),
    get("/api/v1/devices/{id}/state", with!(Read, state::read), "state", "Read the last values of a device")
        .gives::<state::DeviceState>(),
    get("/api/v1/devices/{id}/state/{param}", with!(Read, state::value), "state", "Read one last value of a device")
        .gives::<state::Sample>(),
    get("/api/v1/state", with!(Read, state::list), "state", "Read last values of many devices")
        .query(&[
            LIMIT,
            CURSOR,
            QUERY,
            IDENT,
            LABEL,
            param("params", "string", "Only these parameters, separated by commas; at most 32"),
        ])
        .lists::<state::DeviceState>(),
    get("/api/v1/devices/{id}/log", with!(Read, messages::device_log), "logs", "Read the log of a device")
        .about("Newest first, or oldest first with `reverse=false`: connections, raw frames beside their messages, errors.")
        .query(&[FROM, TO, LIMIT, CURSOR, REVERSE])
        .lists::<messages::Message>(),
    // Commands.
    get("/api/v1/devices/{id}/commands", with!(Read, commands::list), "commands", "List commands of a device")
        .about("Newest first.")
        .query(&[LIMIT])
        .lists::<Command>(),
    post("/api/v1/devices/{id}/commands", with!(Command, commands::create), "commands", "Send a command to a device")
        .about("Queued durably; sent when the device is connected, unless `ttl_s` has passed before.")
        .query(&[WAIT])
        .takes::<commands::CommandInput>()
        .gives::<Command>()
        .waits(),
    get("/api/v1/commands/{id}", with!(Read, commands::read), "commands", "Read a command")
        .query(&[WAIT])
        .gives::<Command>()
        .waits(),
    delete("/api/v1/commands/{id}", with!(Command, commands::cancel), "commands", "Cancel a command")
        .about("As long as it has not been sent.")
        .gives::<Command>()
        .status(200),
    // Channels.
    get("/api/v1/channels", with!(Read, channels::list), "channels", "List channels")
        .query(PAGE)
        .lists::<channels::ChannelView>(),
    post("/api/v1/channels", with!(Write, channels::create), "channels", "Create a channel")
        .about("It listens at once; `status` says whether it could.")
        .takes::<channels::ChannelInput>()
        .gives::<channels::ChannelView>()
        .revision(),
    get("/api/v1/channels/{id}", with!(Read, channels::read), "channels", "Read a channel")
        .gives::<channels::ChannelView>()
        .revision(),
    patch("/api/v1/channels/{id}", with!(Write, channels::patch), "channels", "Change a channel")
        .takes::<channels::ChannelInput>()
        .gives::<channels::ChannelView>()
        .revision(),
    delete("/api/v1/channels/{id}", with!(Write, channels::delete), "channels", "Delete a channel")
        .revision(),
    get("/api/v1/channels/{id}/connections", with!(Read, channels::connections), "channels", "List connections of a channel")
        .about("Of all nodes, oldest first, at most 10,000. A node that gives no answer within a second is named.")
        .query(PAGE)
        .gives::<channels::ConnectionsView>(),
    delete("/api/v1/channels/{id}/connections/{connection}", with!(Write, channels::close), "channels", "Close a connection"),
    get("/api/v1/channels/{id}/log", with!(Read, messages::channel_log), "logs", "Read the log of a channel")
        .about("Newest first, or oldest first with `reverse=false`.")
        .query(&[FROM, TO, LIMIT, CURSOR, REVERSE])
        .lists::<messages::Message>(),
    get("/api/v1/connect", with!(Read, channels::connect), "channels", "Where devices can connect")
        .gives::<channels::ConnectView>(),
    // Protocols.
    get("/api/v1/protocols", with!(Read, protocols::list), "protocols", "List protocols")
        .about("Those that are built in and the account's own, by name.")
        .query(PAGE)
        .lists::<protocols::ProtocolView>(),
    get("/api/v1/protocols/{name}", with!(Read, protocols::read), "protocols", "Read a protocol with its source")
        .gives::<protocols::ProtocolView>()
        .revision(),
    put("/api/v1/protocols/{name}", with!(Write, protocols::put), "protocols", "Upload a protocol")
        .about("Channels that use it take it up at once; others are not touched. Under the name of one that is built in it takes its place, for this account.")
        .takes::<protocols::SourceInput>()
        .gives::<protocols::ProtocolView>()
        .revision(),
    delete("/api/v1/protocols/{name}", with!(Write, protocols::delete), "protocols", "Delete a protocol")
        .revision(),
    post("/api/v1/protocols/{name}/check", with!(Read, protocols::check), "protocols", "Check a source")
        .about("Nothing is stored.")
        .takes::<protocols::SourceInput>()
        .gives::<protocols::ProtocolView>()
        .status(200),
    post("/api/v1/protocols/{name}/decode", with!(Read, protocols::decode), "protocols", "Decode bytes")
        .about("The playground: nothing is stored. Each frame lists its fields with their places.")
        .takes::<protocols::DecodeInput>()
        .gives::<protocols::DecodedView>()
        .status(200),
    // Parameters.
    get("/api/v1/parameters", with!(Read, parameters::list), "parameters", "List parameters")
        .about("The account's own, and the dictionary on the last page.")
        .query(PAGE)
        .lists::<parameters::ParameterView>(),
    post("/api/v1/parameters", with!(Write, parameters::create), "parameters", "Declare a parameter")
        .takes::<parameters::ParameterInput>()
        .gives::<parameters::ParameterView>()
        .revision(),
    get("/api/v1/parameters/{id}", with!(Read, parameters::read), "parameters", "Read a declared parameter")
        .gives::<parameters::ParameterView>()
        .revision(),
    patch("/api/v1/parameters/{id}", with!(Write, parameters::patch), "parameters", "Change a declared parameter")
        .takes::<parameters::ParameterInput>()
        .gives::<parameters::ParameterView>()
        .revision(),
    delete("/api/v1/parameters/{id}", with!(Write, parameters::delete), "parameters", "Delete a declared parameter")
        .revision(),
    // What happened.
    get("/api/v1/events", with!(Read, trails::events), "events", "Read events")
        .about("Newest first.")
        .query(&[FROM, TO, LIMIT, CURSOR])
        .lists::<Event>(),
    get("/api/v1/audit", with!(Admin, trails::audit), "events", "Read the audit trail")
        .about("Every change of an object: who, from where, what. Newest first.")
        .query(&[
            LIMIT,
            CURSOR,
            param("before", "integer", "Only changes before this sequence"),
        ])
        .lists::<trails::AuditView>(),
    // Settings and the server.
    get("/api/v1/settings", with!(Read, settings::read), "settings", "Read settings of the account")
        .shape(Shape::Object),
    patch("/api/v1/settings", with!(Admin, settings::patch), "settings", "Change settings of the account")
        .about("Members that are named change; null takes a setting back to its default.")
        .takes::<settings::SettingsInput>()
        .shape(Shape::Object),
    get("/api/v1/system", with!(Read, system::read), "system", "The server")
        .gives::<system::SystemView>(),
    get("/api/v1/nodes", with!(Root, nodes::read), "system", "The nodes of the cluster, and what each owns")
        .about("One process that is alone is a cluster of one node.")
        .gives::<nodes::NodesView>(),
    get("/api/v1/ws", anyone!(live::upgrade), "live", "Live feed")
        .about(
            "A WebSocket. Sign in by cookie, by `Authorization`, by `?token=`, or by a first message \
             `{\"token\": \"flt_…\"}`. Say `{\"subscribe\": [\"message\", \"state\", \"event\", \"log\"], \
             \"devices\": […], \"id\": 1}`; each such message takes the place of the one before. A client \
             that is too slow is told `{\"type\": \"lagged\", \"dropped\": 120}`. Closed with \
             4401 where the token or session is not or no longer valid, 4403 without the scope `read`, 4429 where \
             the account has too many feeds.",
        )
        .query(&[param("token", "string", "An API token, for clients that can set no header")])
        .shape(Shape::Upgrade)
        .status(101),
    get("/healthz", anyone!(system::healthz), "system", "Whether the process answers")
        .shape(Shape::Text),
    get("/readyz", anyone!(system::readyz), "system", "Whether it can do its work")
        .about("503 with the reasons while it cannot.")
        .shape(Shape::Object),
    get("/metrics", anyone!(system::metrics), "system", "Metrics in the text format of Prometheus")
        .shape(Shape::Text),
    get("/openapi.json", anyone!(system::openapi), "system", "This description")
        .shape(Shape::Object),
];
