//! Finds the server that takes writes, and connects to it.
//!
//! Each server of the URL is tried in turn, beginning with the one that was right last, and each has
//! [`CONNECT_MAX`] for the whole handshake: one that takes connections and says nothing, as behind a dead
//! link, does not keep us from the next.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::poll_fn;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{AsyncMessage, Client, Config, Connection, NoTls, Socket, Statement};

use crate::error::{ConnectError, Fault, told};
use crate::settings::Settings;
use crate::tls::Tls;

/// Longest that one server may take to let us in.
pub(crate) const CONNECT_MAX: Duration = Duration::from_secs(3);

/// Longest that a session may say nothing within a transaction: what it has locked, others wait for.
const IDLE_MILLIS: u128 = 3_000;

/// Most statements that a connection keeps prepared.
const STATEMENTS_MAX: usize = 256;

/// The servers of the settings.
pub(crate) struct Servers {
    each: Vec<(String, Config)>,
    tls: Option<Tls>,
    /// Which took writes last.
    last: AtomicUsize,
    pub(crate) schema: String,
    pub(crate) user: String,
    pub(crate) database: String,
    pub(crate) statement_timeout: Duration,
}

impl Servers {
    pub(crate) fn new(settings: &Settings) -> Result<Self, ConnectError> {
        settings.check().map_err(|wrong| ConnectError::Settings(wrong.join("; ")))?;
        let wrong = |text: String| ConnectError::Settings(text);
        // Not its own words: they may quote the password.
        let config: Config = settings.url.parse().map_err(|_| {
            wrong(if settings.url.contains("sslmode=verify") {
                "`url` may say sslmode=require; with `tls.ca` the server is always verified"
                    .to_owned()
            } else {
                "`url` is no PostgreSQL URL: it looks like postgres://user:password@host/database"
                    .to_owned()
            })
        })?;
        let tls = settings.tls.as_ref().map(Tls::new).transpose()?;
        if tls.is_none() && config.get_ssl_mode() == SslMode::Require {
            let text = "`url` says sslmode=require: set `tls.ca` to the PEM file of who signs the server's certificate";
            return Err(wrong(text.to_owned()));
        }
        let (hosts, addresses, ports) =
            (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
        let count = hosts.len().max(addresses.len());
        if count == 0 || (ports.len() > 1 && ports.len() != count) {
            return Err(wrong(
                "`url` has to name a host, and a port for each or one for all".to_owned(),
            ));
        }
        let user = config.get_user().unwrap_or("postgres").to_owned();
        let database = config.get_dbname().unwrap_or(&user).to_owned();
        let options = session_options(settings, config.get_options());
        let mut each = Vec::with_capacity(count);
        for at in 0..count {
            let mut one = Config::new();
            let mut label = String::new();
            match hosts.get(at) {
                Some(Host::Tcp(host)) => {
                    one.host(host);
                    label.push_str(host);
                }
                #[cfg(unix)]
                Some(Host::Unix(path)) => {
                    one.host_path(path);
                    label.push_str(&path.to_string_lossy());
                }
                None => {}
            }
            if let Some(address) = addresses.get(at) {
                one.hostaddr(*address);
                if label.is_empty() {
                    label = address.to_string();
                }
            }
            let port = ports.get(at).or_else(|| ports.first()).copied().unwrap_or(5_432);
            one.port(port);
            // Writing to a String cannot fail.
            let _written = write!(label, ":{port}");
            one.user(&user).dbname(&database).options(&options);
            if let Some(password) = config.get_password() {
                one.password(password);
            }
            one.application_name(config.get_application_name().unwrap_or("fieldline"))
                .ssl_mode(if tls.is_some() { SslMode::Require } else { SslMode::Disable })
                .channel_binding(config.get_channel_binding())
                .connect_timeout(CONNECT_MAX)
                .tcp_user_timeout(Duration::from_secs(10))
                .keepalives_idle(Duration::from_secs(5))
                .keepalives_interval(Duration::from_secs(2))
                .keepalives_retries(3)
                .target_session_attrs(TargetSessionAttrs::ReadWrite);
            each.push((label, one));
        }
        Ok(Self {
            each,
            tls,
            last: AtomicUsize::new(0),
            schema: settings.schema.clone(),
            user,
            database,
            statement_timeout: settings.statement_timeout,
        })
    }

    /// Each server with its name, never a password.
    pub(crate) fn each(&self) -> &[(String, Config)] {
        &self.each
    }

    /// The names of all.
    pub(crate) fn labels(&self) -> String {
        self.each.iter().map(|(label, _)| label.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// Connects to the first server that takes writes.
    pub(crate) async fn connect(&self) -> Result<Link, ConnectError> {
        let first = self.last.load(Ordering::Relaxed);
        let mut refused = Vec::new();
        for step in 0..self.each.len() {
            let at = (first + step) % self.each.len();
            let Some((label, config)) = self.each.get(at) else { continue };
            let tried = tokio::time::timeout(CONNECT_MAX, self.open(config)).await;
            match tried {
                Ok(Ok(link)) => {
                    self.last.store(at, Ordering::Relaxed);
                    return Ok(link);
                }
                Ok(Err(error)) => refused.push((label, self.judge(label, &error))),
                Err(_) => {
                    let reason = format!("no answer within {} s", CONNECT_MAX.as_secs());
                    refused.push((label, ConnectError::Unreachable { reason }));
                }
            }
        }
        Err(most_telling(refused))
    }

    pub(crate) async fn open(&self, config: &Config) -> Result<Link, tokio_postgres::Error> {
        let notified = Arc::new(Notify::new());
        let (client, task) = match &self.tls {
            Some(tls) => drive(config, tls.clone(), Arc::clone(&notified)).await?,
            None => drive(config, NoTls, Arc::clone(&notified)).await?,
        };
        let link = Link { client, task, notified, statements: Mutex::default() };
        // What is acknowledged has to be on disk, whatever the server's default.
        link.client
            .batch_execute(
                "SELECT set_config('synchronous_commit', 'on', false) \
                 WHERE current_setting('synchronous_commit') IN ('off', 'local')",
            )
            .await?;
        Ok(link)
    }

    /// What a refusal means for who set the server up.
    pub(crate) fn judge(&self, server: &str, error: &tokio_postgres::Error) -> ConnectError {
        let (server, reason) = (server.to_owned(), told(error));
        let any = |parts: &[&str]| parts.iter().any(|part| reason.contains(part));
        let tls = if any(&["no encryption"]) && self.tls.is_none() {
            "set `postgres.tls.ca` to the PEM file of who signs its certificate"
        } else if any(&["does not support TLS"]) {
            "switch ssl on in the server, or leave `postgres.tls` out"
        } else if any(&["certificate"]) && self.tls.is_some() {
            "let `postgres.tls.ca` be the file of who signed its certificate, and name the server in `url` as the certificate does"
        } else {
            ""
        };
        if !tls.is_empty() {
            return ConnectError::Tls { server, reason, remedy: tls };
        }
        let (user, database) = (self.user.clone(), self.database.clone());
        let Some(code) = error.code() else {
            if reason.contains("does not allow writes") {
                return ConnectError::ReadOnly { reason: "it is a standby".to_owned() };
            }
            if reason.contains("password missing") || reason.contains("authentication") {
                return ConnectError::Refused { server, user, reason };
            }
            return ConnectError::Unreachable { reason };
        };
        if *code == SqlState::INVALID_PASSWORD
            || *code == SqlState::INVALID_AUTHORIZATION_SPECIFICATION
        {
            ConnectError::Refused { server, user, reason }
        } else if *code == SqlState::INVALID_CATALOG_NAME {
            ConnectError::NoDatabase { server, database }
        } else if *code == SqlState::UNDEFINED_OBJECT {
            // A setting of our sessions that it does not know.
            ConnectError::TooOld { server, reason }
        } else if code.code().starts_with("57") || code.code().starts_with("53") {
            ConnectError::Unreachable { reason }
        } else {
            ConnectError::Other(format!("{server}: {reason}"))
        }
    }
}

/// Of what each server did, what says best what to do.
fn most_telling(mut refused: Vec<(&String, ConnectError)>) -> ConnectError {
    if refused.len() == 1
        && let Some((label, error)) = refused.pop()
    {
        return match error {
            ConnectError::Unreachable { reason } => {
                ConnectError::Unreachable { reason: format!("{label}: {reason}") }
            }
            ConnectError::ReadOnly { reason } => {
                ConnectError::ReadOnly { reason: format!("{label}: {reason}") }
            }
            other => other,
        };
    }
    let mut reasons = Vec::with_capacity(refused.len());
    let mut read_only = false;
    for (label, error) in &refused {
        match error {
            ConnectError::Unreachable { reason } => reasons.push(format!("{label}: {reason}")),
            ConnectError::ReadOnly { reason } => {
                read_only = true;
                reasons.push(format!("{label}: {reason}"));
            }
            other => return other.clone(),
        }
    }
    let reason = reasons.join(", ");
    if read_only { ConnectError::ReadOnly { reason } } else { ConnectError::Unreachable { reason } }
}

/// Settings of every session. The server ends what we left behind: a node that is gone without a word
/// must not hold a lock for longer than these.
fn session_options(settings: &Settings, given: Option<&str>) -> String {
    let milliseconds = settings.statement_timeout.as_millis();
    let mut options = given.map(|given| format!("{given} ")).unwrap_or_default();
    let ours = [
        format!("search_path={}", settings.schema),
        format!("statement_timeout={milliseconds}"),
        format!("lock_timeout={}", milliseconds / 2),
        format!("idle_in_transaction_session_timeout={}", milliseconds.min(IDLE_MILLIS)),
        "client_connection_check_interval=2000".to_owned(),
        "tcp_keepalives_idle=5".to_owned(),
        "tcp_keepalives_interval=2".to_owned(),
        "tcp_keepalives_count=3".to_owned(),
        "tcp_user_timeout=10000".to_owned(),
        // Queries here are short, and their tables are chosen by their values.
        "jit=off".to_owned(),
        "plan_cache_mode=force_custom_plan".to_owned(),
        // They are written for the indexes; a fresh table has no statistics that would say so.
        "enable_seqscan=off".to_owned(),
        "enable_hashjoin=off".to_owned(),
        "enable_mergejoin=off".to_owned(),
    ];
    for option in ours {
        let _written = write!(options, "-c {option} ");
    }
    options.truncate(options.trim_end().len());
    options
}

async fn drive<T>(
    config: &Config,
    tls: T,
    notified: Arc<Notify>,
) -> Result<(Client, JoinHandle<()>), tokio_postgres::Error>
where
    T: MakeTlsConnect<Socket>,
    T::Stream: Send + 'static,
{
    let (client, connection) = config.connect(tls).await?;
    Ok((client, tokio::spawn(exchange(connection, notified))))
}

/// Moves bytes until the connection ends.
async fn exchange<S>(mut connection: Connection<Socket, S>, notified: Arc<Notify>)
where
    S: tokio_postgres::tls::TlsStream + Unpin,
{
    loop {
        match poll_fn(|cx| connection.poll_message(cx)).await {
            Some(Ok(AsyncMessage::Notification(_))) => notified.notify_one(),
            Some(Ok(AsyncMessage::Notice(notice))) => {
                if notice.severity() == "WARNING" {
                    tracing::warn!(notice = notice.message(), "PostgreSQL warns");
                }
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                tracing::debug!(error = told(&error), "a connection to PostgreSQL ended");
                break;
            }
            None => break,
        }
    }
    // Who waits for notifications has to look.
    notified.notify_one();
}

/// One connection. Dropping it ends it at once, whatever is under way.
pub(crate) struct Link {
    pub(crate) client: Client,
    /// Told of each notification, and of the end.
    pub(crate) notified: Arc<Notify>,
    task: JoinHandle<()>,
    statements: Mutex<HashMap<Box<str>, Statement>>,
}

impl Link {
    /// The statement of this text, prepared at its first use.
    pub(crate) async fn prepared(&self, sql: &str) -> Result<Statement, Fault> {
        if let Some(statement) = self.statements.lock().get(sql) {
            return Ok(statement.clone());
        }
        let statement = self.client.prepare(sql).await?;
        let mut statements = self.statements.lock();
        if statements.len() >= STATEMENTS_MAX {
            statements.clear();
        }
        statements.insert(sql.into(), statement.clone());
        Ok(statement)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Waits for `work`, but no longer than `limit`.
pub(crate) async fn within<T, E: Into<Fault>>(
    limit: Duration,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, Fault> {
    match tokio::time::timeout(limit, work).await {
        Ok(done) => done.map_err(Into::into),
        Err(_) => Err(Fault::Slow(limit)),
    }
}
