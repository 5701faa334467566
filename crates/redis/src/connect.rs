//! Connections: made, looked at before they are trusted, and what is wrong with them in words.

use std::path::Path;
use std::time::Duration;

use redis::aio::{AsyncPushSender, MultiplexedConnection};
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo,
    ProtocolVersion, RedisError, ServerErrorKind, TlsCertificates,
};
use tokio::time::timeout;

use crate::config::ConnectError;
use crate::scripts::Scripts;

/// Longest that connecting and looking at a server may take.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A connection to a server that was found fit.
pub(crate) struct Connected {
    pub(crate) connection: MultiplexedConnection,
    /// Names the server's process: another one has another memory.
    pub(crate) run_id: String,
}

/// Reads `redis.url`.
pub(crate) fn info(url: &str) -> Result<ConnectionInfo, ConnectError> {
    let wrong = |why: &str| {
        ConnectError(format!(
            "`redis.url` is no address of Redis ({why}): write redis://HOST:PORT, or rediss://HOST:PORT for TLS"
        ))
    };
    let info = url.into_connection_info().map_err(|error| {
        // The client's words may quote the address, and with it a password.
        wrong(if error.kind() == ErrorKind::InvalidClientConfig {
            "it cannot be read"
        } else {
            "a part of it is wrong"
        })
    })?;
    if let ConnectionAddr::TcpTls { insecure: true, .. } = info.addr() {
        return Err(wrong("`#insecure` would trust any server"));
    }
    let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    Ok(info.set_redis_settings(settings))
}

/// A client that trusts whom it is told to.
pub(crate) fn client(info: ConnectionInfo, tls_ca: Option<&Path>) -> Result<Client, ConnectError> {
    let address = info.addr().to_string();
    let client = match tls_ca {
        None => Client::open(info),
        Some(path) => {
            let read = std::fs::read(path).map_err(|error| {
                let path = path.display();
                ConnectError(format!(
                    "`redis.tls_ca` names `{path}`, which cannot be read: {error}"
                ))
            });
            let tls = TlsCertificates { client_tls: None, root_cert: Some(read?) };
            Client::build_with_tls(info, tls)
        }
    };
    client.map_err(|error| in_words(&address, &error))
}

/// Connects, looks whether the server can be relied on, and loads the scripts.
pub(crate) async fn connect(
    client: &Client,
    scripts: &Scripts,
    push: Option<impl AsyncPushSender>,
) -> Result<Connected, ConnectError> {
    let address = client.get_connection_info().addr().to_string();
    let silent = || {
        ConnectError(format!(
            "what listens at {address} does not answer as Redis does within {} s: correct `redis.url`, or look whether the server is stopped",
            CONNECT_TIMEOUT.as_secs()
        ))
    };
    let work = async {
        let mut config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(None);
        if let Some(push) = push {
            config = config.set_push_sender(push);
        }
        let connected = client.get_multiplexed_async_connection_with_config(&config).await;
        let mut connection = connected.map_err(|error| in_words(&address, &error))?;
        let run_id = inspect(&mut connection, &address).await?;
        for script in scripts.all() {
            let loaded = script.load_async(&mut connection).await;
            loaded.map_err(|error| in_words(&address, &error))?;
        }
        Ok(Connected { connection, run_id })
    };
    timeout(CONNECT_TIMEOUT, work).await.unwrap_or_else(|_| Err(silent()))
}

/// Has TLS done by aws-lc-rs where the address wants it.
pub(crate) fn choose_provider(info: &ConnectionInfo) {
    if matches!(info.addr(), ConnectionAddr::TcpTls { .. }) {
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        // Else the program has chosen one already.
        if provider.install_default().is_ok() {
            tracing::debug!("TLS to Redis by aws-lc-rs");
        }
    }
}

/// What the server says of itself.
pub(crate) async fn information(
    connection: &mut MultiplexedConnection,
    address: &str,
) -> Result<String, ConnectError> {
    let asked = redis::cmd("INFO").query_async::<redis::Value>(connection).await;
    Ok(match asked.map_err(|error| in_words(address, &error))? {
        redis::Value::VerbatimString { text, .. } => text,
        other => redis::from_redis_value::<String>(other).unwrap_or_default(),
    })
}

/// A field of it; empty if it is not there.
pub(crate) fn field(text: &str, name: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.map(str::trim).unwrap_or_default().to_owned()
}

/// Refuses a server that would lose or hide what it is given.
async fn inspect(
    connection: &mut MultiplexedConnection,
    address: &str,
) -> Result<String, ConnectError> {
    let text = information(connection, address).await?;
    let get = |name: &str| field(&text, name);
    if get("loading") == "1" {
        return Err(ConnectError(format!("Redis at {address} is loading its data: wait")));
    }
    if get("role") == "slave" {
        return Err(ConnectError(format!(
            "Redis at {address} is a replica: let `redis.url` name the primary"
        )));
    }
    if get("cluster_enabled") == "1" {
        return Err(ConnectError(format!(
            "Redis at {address} is part of a Redis Cluster, which Fieldline does not use: let `redis.url` name a server of its own, with replicas"
        )));
    }
    let policy = get("maxmemory_policy");
    if get("maxmemory") != "0" && !policy.is_empty() && policy != "noeviction" {
        return Err(ConnectError(format!(
            "Redis at {address} forgets keys when its memory is full (maxmemory-policy {policy}): set it to noeviction"
        )));
    }
    match get("run_id") {
        id if id.is_empty() => Err(ConnectError(format!(
            "what answers at {address} does not say which Redis it is (INFO has no run_id): correct `redis.url`"
        ))),
        id => Ok(id),
    }
}

/// What is wrong, and how to mend it.
pub(crate) fn in_words(address: &str, error: &RedisError) -> ConnectError {
    let code = error.code().unwrap_or_default();
    let words = match error.kind() {
        ErrorKind::AuthenticationFailed if code == "NOAUTH" => wants_password(address),
        ErrorKind::AuthenticationFailed => {
            format!("Redis at {address} refuses the user or password: correct them in `redis.url`")
        }
        _ if code == "WRONGPASS" => {
            format!("Redis at {address} refuses the user or password: correct them in `redis.url`")
        }
        _ if code == "NOAUTH" => wants_password(address),
        ErrorKind::Server(ServerErrorKind::NoPerm) => format!(
            "Redis at {address} does not let this user run what is needed ({error}): allow its ACL all commands and channels of the prefix, with INFO and SCRIPT"
        ),
        ErrorKind::Server(ServerErrorKind::BusyLoading) => {
            format!("Redis at {address} is loading its data: wait")
        }
        ErrorKind::RESP3NotSupported => {
            format!("Redis at {address} is older than 6.0: install a newer one")
        }
        ErrorKind::Parse | ErrorKind::UnexpectedReturnType => {
            format!("what answers at {address} is not Redis: correct `redis.url`")
        }
        ErrorKind::Io if error.is_timeout() => format!(
            "what listens at {address} does not answer as Redis does in time: correct `redis.url`, or look whether the server is stopped"
        ),
        ErrorKind::Io if error.is_connection_refusal() => {
            format!("no Redis listens at {address}: start it, or correct `redis.url`")
        }
        ErrorKind::Io if error.is_connection_dropped() => format!(
            "what listens at {address} closed the connection: look into its log, or correct `redis.url` (rediss:// if it wants TLS)"
        ),
        ErrorKind::Io if error.to_string().contains("certificate") => format!(
            "Redis at {address} shows a certificate that is not trusted ({error}): set `redis.tls_ca` to who signed it, and let `redis.url` have the name that it is for"
        ),
        ErrorKind::Io if error.to_string().contains("corrupt message") => format!(
            "what listens at {address} does not speak TLS: write redis:// in `redis.url`, or its port with TLS"
        ),
        ErrorKind::Io => format!(
            "Redis at {address} cannot be reached ({error}): look at the network and `redis.url`"
        ),
        _ => format!("Redis at {address} failed: {error}; look into its log"),
    };
    ConnectError(words)
}

fn wants_password(address: &str) -> String {
    format!(
        "Redis at {address} wants a password: write it into `redis.url`, as redis://:PASSWORD@HOST"
    )
}
