//! What an operator sets.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

/// `[postgres]`: where the database is and how it is used.
///
/// `Debug` leaves the password out.
#[derive(Clone, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Where it is, as PostgreSQL's own programs take it; several servers are tried in turn until one
    /// takes writes: `postgres://fieldline:SECRET@db1:5432,db2:5432,db3:5432/fieldline`. Without a user, it is
    /// `postgres`; without a database, the one named like the user.
    pub url: String,
    /// The schema that holds the tables; made if it is not there. Lower-case letters, digits and `_`.
    pub schema: String,
    /// TLS to the server. Needed where the URL says `sslmode=require`.
    pub tls: Option<TlsSettings>,
    /// Most connections for reads and changes, for each of the two backends; the writers of messages
    /// have their own. At least 1.
    pub connections_max: usize,
    /// Shards of the history. Chosen once, when the tables are made (8 if not set); `None` takes what
    /// was chosen. At most 256.
    pub shards: Option<u16>,
    /// Tasks that write messages on this node, a connection each. From 1 to the count of shards.
    pub writers: u16,
    /// Most bytes of messages that wait for the writers; appends beyond it are refused as busy.
    /// At least 1 MiB.
    pub queue_bytes_max: u32,
    /// Longest that one statement may take, and how long a node that stands still may hold up the others.
    /// At least 100 ms.
    #[serde(with = "humantime_serde")]
    pub statement_timeout: Duration,
    /// Longest that an append may take, reconnecting included, until its caller is told that it is not
    /// known whether the messages are durable. At least 1 s.
    #[serde(with = "humantime_serde")]
    pub append_timeout: Duration,
    /// Whether this program may change the tables when it needs to. When not, somebody else has to do
    /// it before a program of a newer version is started.
    pub migrate: bool,
}

/// `[postgres.tls]`: how the server is known, and how we are.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct TlsSettings {
    /// PEM file with the certificates of those who sign the server's.
    pub ca: PathBuf,
    /// PEM file with our certificate, where the server asks for one.
    #[serde(default)]
    pub certificate: Option<PathBuf>,
    /// PEM file with the key of our certificate.
    #[serde(default)]
    pub key: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            url: String::new(),
            schema: "fieldline".to_owned(),
            tls: None,
            connections_max: 8,
            shards: None,
            writers: 2,
            queue_bytes_max: 64 << 20,
            statement_timeout: Duration::from_secs(5),
            append_timeout: Duration::from_secs(20),
            migrate: true,
        }
    }
}

impl Settings {
    /// The settings for the database at `url`, all else as by default.
    #[must_use]
    pub fn new(url: impl Into<String>) -> Self {
        Self { url: url.into(), ..Self::default() }
    }

    /// Checks what types cannot, and returns every problem at once.
    ///
    /// # Errors
    ///
    /// A sentence for each setting that cannot be used.
    pub fn check(&self) -> Result<(), Vec<String>> {
        // Exhaustive on purpose: a new field does not compile until judged here.
        let Self {
            url,
            schema,
            tls,
            connections_max,
            shards,
            writers,
            queue_bytes_max,
            statement_timeout,
            append_timeout,
            migrate: _,
        } = self;
        let mut wrong = Vec::new();
        let mut must = |holds: bool, text: &str| {
            if !holds {
                wrong.push(text.to_owned());
            }
        };
        must(
            !url.is_empty(),
            "`url` is missing: set it to such as postgres://user:password@host/database",
        );
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        must(
            (1..=40).contains(&schema.len())
                && schema.bytes().all(plain)
                && !schema.starts_with("pg_")
                && !schema.starts_with(|first: char| first.is_ascii_digit()),
            "`schema` has to be 1 to 40 lower-case letters, digits and `_`, and may not begin with a digit or `pg_`",
        );
        must(*connections_max > 0, "`connections_max` has to be at least 1");
        must(shards.is_none_or(|n| (1..=256).contains(&n)), "`shards` has to be from 1 to 256");
        must((1..=256).contains(writers), "`writers` has to be from 1 to 256");
        must(*queue_bytes_max >= 1 << 20, "`queue_bytes_max` has to be at least 1 MiB");
        must(
            *statement_timeout >= Duration::from_millis(100)
                && *statement_timeout <= Duration::from_secs(3_600),
            "`statement_timeout` has to be from 100 ms to 1 h",
        );
        must(
            *append_timeout >= Duration::from_secs(1)
                && *append_timeout <= Duration::from_secs(3_600),
            "`append_timeout` has to be from 1 s to 1 h",
        );
        if let Some(TlsSettings { ca: _, certificate, key }) = tls {
            must(
                certificate.is_some() == key.is_some(),
                "`tls.certificate` and `tls.key` have to be set together",
            );
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parsed = self.url.parse::<tokio_postgres::Config>();
        let hosts = parsed.as_ref().map(tokio_postgres::Config::get_hosts).unwrap_or_default();
        f.debug_struct("Settings")
            .field("hosts", &hosts)
            .field("schema", &self.schema)
            .field("tls", &self.tls)
            .field("connections_max", &self.connections_max)
            .field("shards", &self.shards)
            .field("writers", &self.writers)
            .field("queue_bytes_max", &self.queue_bytes_max)
            .field("statement_timeout", &self.statement_timeout)
            .field("append_timeout", &self.append_timeout)
            .field("migrate", &self.migrate)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wrong_setting_is_named_at_once() {
        let settings = Settings {
            schema: "Bad-Name".to_owned(),
            connections_max: 0,
            writers: 0,
            ..Settings::default()
        };
        let wrong = settings.check().unwrap_err();
        for part in ["url", "schema", "connections_max", "writers"] {
            assert!(wrong.iter().any(|text| text.contains(part)), "{part}: {wrong:?}");
        }
        Settings::new("postgres://localhost/x").check().unwrap();
    }

    #[test]
    fn the_password_is_not_shown() {
        let shown = format!("{:?}", Settings::new("postgres://ada:s3cret@db1,db2/x"));
        assert!(!shown.contains("s3cret") && shown.contains("db2"), "{shown}");
    }
}
