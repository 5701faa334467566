//! Settings, and what can be wrong with them.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

/// `[redis]`: where last values, presence and module status are kept.
#[derive(Clone, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct RedisConfig {
    /// `redis://[USER][:PASSWORD@]HOST[:PORT][/DB]`; `rediss://` for TLS. One server, or an
    /// address that always leads to the primary; not a Redis Cluster.
    pub url: String,
    /// PEM file with the certificates of those who sign the server's, for `rediss://`; the machine's
    /// own if it is not set.
    pub tls_ca: Option<PathBuf>,
    /// What all keys begin with: several installations may share a server. Letters, digits,
    /// `-`, `_` and `.`.
    pub prefix: String,
    /// Longest that a read or write may take before it is given up. What was to be written is
    /// made good later.
    #[serde(with = "humantime_serde")]
    pub deadline: Duration,
    /// How long a node that does not speak up any more counts as alive, with its connections. It
    /// speaks up five times in that.
    #[serde(with = "humantime_serde")]
    pub node_ttl: Duration,
    /// Most bytes of messages that wait to be applied while the server is away. Beyond it they
    /// are dropped here and all last values are read from history afterwards.
    pub waiting_bytes_max: usize,
}

impl Default for RedisConfig {
    fn default() -> Self {
        Self {
            url: "redis://127.0.0.1:6379".to_owned(),
            tls_ca: None,
            prefix: "fieldline".to_owned(),
            deadline: Duration::from_millis(250),
            node_ttl: Duration::from_secs(5),
            waiting_bytes_max: 64 << 20,
        }
    }
}

impl std::fmt::Debug for RedisConfig {
    /// Without the password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = self.url.rsplit('@').next().unwrap_or_default();
        write!(f, "RedisConfig({place}, {}:*)", self.prefix)
    }
}

impl RedisConfig {
    /// Checks what types cannot, and returns every problem at once, one sentence each.
    ///
    /// # Errors
    ///
    /// The sentences.
    pub fn validate(&self) -> Result<(), Vec<String>> {
        let Self { url, tls_ca, prefix, deadline, node_ttl, waiting_bytes_max } = self;
        let mut problems = Vec::new();
        if let Err(problem) = crate::connect::info(url) {
            problems.push(problem.to_string());
        }
        if tls_ca.is_some() && !url.starts_with("rediss://") {
            problems.push(
                "`redis.tls_ca` is set, and `redis.url` is without TLS: write rediss://".to_owned(),
            );
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if !(1..=64).contains(&prefix.len()) || !prefix.chars().all(plain) {
            problems.push(
                "`redis.prefix` has 1 to 64 letters, digits, `-`, `_` and `.`; choose another"
                    .to_owned(),
            );
        }
        if !(Duration::from_millis(10)..=Duration::from_secs(10)).contains(deadline) {
            problems.push("`redis.deadline` is between 10ms and 10s; 250ms is usual".to_owned());
        }
        if !(Duration::from_secs(1)..=Duration::from_secs(60)).contains(node_ttl) {
            problems.push("`redis.node_ttl` is between 1s and 60s; 5s is usual".to_owned());
        }
        if *waiting_bytes_max < 1 << 20 {
            problems.push("`redis.waiting_bytes_max` is at least 1048576".to_owned());
        }
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }
}

/// Why there is no connection, in one sentence that says what and how to mend it. It names the
/// server's address, never a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConnectError(pub(crate) String);
