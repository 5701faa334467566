//! The configuration file, judged whole before a port is bound.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use fieldline_gateway::GatewayConfig;
use fieldline_mqtt_bus::MqttBusConfig;
use fieldline_redis::RedisConfig;
use fieldline_runtime::Balancers;
use fieldline_runtime::telemetry::LogConfig;
use serde::Deserialize;

use crate::node::NodeConfig;

/// Why the configuration was refused: every problem at once.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration file `{path}`: {source}; check the path and its permissions", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not TOML, or has an unknown key or a value of the wrong type.
    #[error("the configuration file `{path}` is wrong in line {line}: {message}", path = path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What, and what to write instead. Nothing of the line itself, which may hold a password.
        message: String,
    },
    /// Values that cannot be.
    #[error("the configuration is wrong: {}", .0.join("; "))]
    Invalid(Vec<String>),
}

/// The whole configuration; every key has a default.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// The API and console.
    pub(crate) http: HttpConfig,
    /// The MQTT broker.
    pub(crate) mqtt: MqttConfig,
    /// Connections of devices.
    pub(crate) gateway: GatewayConfig,
    /// The balancers before it.
    pub(crate) balancers: Balancers,
    /// The message store.
    pub(crate) store: StoreConfig,
    /// Where cold segments and binaries are kept.
    pub(crate) blobs: fieldline_blobs::Settings,
    /// Logs.
    pub(crate) log: LogConfig,
    /// This process among others; for `fieldline serve`, as are the sections below.
    pub(crate) node: Option<NodeConfig>,
    /// The database of a cluster.
    pub(crate) postgres: fieldline_postgres::Settings,
    /// Last values of a cluster.
    pub(crate) redis: RedisConfig,
    /// What carries live items between the nodes of a cluster.
    pub(crate) mqtt_bus: MqttBusConfig,
}

/// `[http]`: the API and console.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct HttpConfig {
    /// Address to listen on. Default `127.0.0.1:8080`.
    pub(crate) listen: SocketAddr,
    /// PEM file of the certificate chain; with `tls_key` it makes the listener HTTPS.
    pub(crate) tls_certificate: Option<PathBuf>,
    /// PEM file of the private key.
    pub(crate) tls_key: Option<PathBuf>,
    /// Requests a second that one account may make, averaged over ten seconds. Default 5,000; at least 1.
    pub(crate) requests_per_s_max: u32,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            tls_certificate: None,
            tls_key: None,
            requests_per_s_max: 5_000,
        }
    }
}

/// `[mqtt]`: the MQTT broker.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct MqttConfig {
    /// Address to listen on without TLS. Default `127.0.0.1:1883`.
    pub(crate) listen: SocketAddr,
    /// Address to listen on with TLS; needs the two files below.
    pub(crate) listen_tls: Option<SocketAddr>,
    /// PEM file of the certificate chain.
    pub(crate) tls_certificate: Option<PathBuf>,
    /// PEM file of the private key.
    pub(crate) tls_key: Option<PathBuf>,
    /// Most clients at once. Default 10,000.
    pub(crate) connections_max: usize,
}

impl Default for MqttConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 1883)),
            listen_tls: None,
            tls_certificate: None,
            tls_key: None,
            connections_max: 10_000,
        }
    }
}

/// `[store]`: the message store.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct StoreConfig {
    /// Bytes of a log file before the next is begun. Default 64 MiB; at least 1 MiB.
    pub(crate) log_file_bytes: u64,
    /// Bytes of messages held in memory before they are sealed. Default 32 MiB; at least 1 MiB.
    pub(crate) memory_bytes_max: usize,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self { log_file_bytes: 64 << 20, memory_bytes_max: 32 << 20 }
    }
}

impl Config {
    /// Reads and judges the file at `path`, or takes the defaults.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], naming every problem.
    pub(crate) fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let Some(path) = path else { return Ok(Self::default()) };
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let config: Self = toml::from_str(&text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start);
            let before = text.get(..start).unwrap_or_default();
            ConfigError::Parse {
                path: path.to_owned(),
                line: before.matches('\n').count() + 1,
                message: in_words(error.message()),
            }
        })?;
        config.validate()
    }

    /// A section that is set and means nothing to one process alone.
    pub(crate) fn of_a_cluster(&self) -> Option<&'static str> {
        let none = Self::default();
        let set = [
            ("node", self.node.is_some()),
            ("postgres", self.postgres != none.postgres),
            ("redis", self.redis != none.redis),
            ("mqtt_bus", self.mqtt_bus != none.mqtt_bus),
        ];
        set.into_iter().find_map(|(section, set)| set.then_some(section))
    }

    /// Checks what types cannot, and returns every problem at once.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Invalid`].
    pub(crate) fn validate(self) -> Result<Self, ConfigError> {
        let mut problems = Vec::new();
        {
            // Exhaustive on purpose: a new key does not compile until it is judged here.
            let Self {
                http,
                mqtt,
                gateway,
                balancers: _,
                store,
                blobs,
                log,
                node,
                postgres,
                redis,
                mqtt_bus,
            } = &self;
            let HttpConfig { listen: http_listen, tls_certificate, tls_key, requests_per_s_max } =
                http;
            let mut check = |holds: bool, problem: String| {
                if !holds {
                    problems.push(problem);
                }
            };
            check(
                tls_certificate.is_some() == tls_key.is_some(),
                "http.tls_certificate and http.tls_key belong together: set both, or neither for plain HTTP".to_owned(),
            );
            for (key, file) in
                [("http.tls_certificate", tls_certificate), ("http.tls_key", tls_key)]
            {
                check_file(key, file.as_deref(), &mut check);
            }
            check(
                *requests_per_s_max >= 1,
                "http.requests_per_s_max must be at least 1".to_owned(),
            );
            let MqttConfig { listen, listen_tls, tls_certificate, tls_key, connections_max } = mqtt;
            check(
                listen_tls.is_none() || (tls_certificate.is_some() && tls_key.is_some()),
                "mqtt.listen_tls needs mqtt.tls_certificate and mqtt.tls_key".to_owned(),
            );
            for (key, file) in
                [("mqtt.tls_certificate", tls_certificate), ("mqtt.tls_key", tls_key)]
            {
                check_file(key, file.as_deref(), &mut check);
            }
            check(
                listen != http_listen || listen.port() == 0,
                format!(
                    "mqtt.listen and http.listen are both {listen}; give each a port of its own"
                ),
            );
            check(*connections_max >= 1, "mqtt.connections_max must be at least 1".to_owned());
            for error in gateway.clone().validate().err().unwrap_or_default() {
                check(false, error.to_string());
            }
            let StoreConfig { log_file_bytes, memory_bytes_max } = store;
            check(
                *log_file_bytes >= 1 << 20,
                format!(
                    "store.log_file_bytes is {log_file_bytes}; at least 1048576 (1 MiB) is needed"
                ),
            );
            check(
                *memory_bytes_max >= 1 << 20,
                format!(
                    "store.memory_bytes_max is {memory_bytes_max}; at least 1048576 (1 MiB) is needed"
                ),
            );
            for problem in crate::blobs::check(blobs, node.is_some()) {
                check(false, problem);
            }
            if let Some(node) = node {
                node.check(&mut check);
                let of = |section: &str, problems: Result<(), Vec<String>>| {
                    let problems = problems.err().unwrap_or_default();
                    problems
                        .into_iter()
                        .map(|text| format!("{section}: {text}"))
                        .collect::<Vec<_>>()
                };
                let all = of("postgres", postgres.check()).into_iter();
                all.chain(of("redis", redis.validate()))
                    .chain(of("mqtt_bus", mqtt_bus.validate()))
                    .for_each(|problem| check(false, problem));
            }
            let LogConfig { format: _, filter } = log;
            if let Err(reason) = LogConfig::check_filter(filter) {
                check(false, reason);
            }
        }
        if problems.is_empty() { Ok(self) } else { Err(ConfigError::Invalid(problems)) }
    }
}

/// What the parser says, as a sentence: with the nearest key in place of an unknown one, and without values.
fn in_words(message: &str) -> String {
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    if let Some((unknown, known)) = quoted.split_first()
        && message.starts_with("unknown field")
    {
        let nearest = known.iter().map(|key| (distance(unknown, key), *key)).min();
        let mut sentence = format!("there is no key or section `{unknown}` here");
        // Half of it may be otherwise: what differs more is another word.
        match nearest {
            Some((apart, key)) if apart * 2 <= unknown.chars().count().max(2) => {
                sentence.push_str(&format!("; did you mean `{key}`?"));
            }
            _ if known.is_empty() => sentence.push_str("; leave it out"),
            _ => sentence.push_str(&format!("; write one of {}", known.join(", "))),
        }
        return sentence;
    }
    // Such as: invalid type: string "…", expected u16
    let mut sentence = String::new();
    let mut rest = message;
    while let Some((before, value)) = rest.split_once("string \"") {
        sentence.push_str(before);
        sentence.push_str("a text");
        let end = value.rfind("\", expected").or_else(|| value.rfind('"'));
        rest = end.and_then(|end| value.get(end + 1..)).unwrap_or_default();
    }
    sentence.push_str(rest);
    sentence.replace('\n', ", ").trim_end_matches(", ").to_owned()
}

/// How many letters have to be put in, left out, changed or swapped with the next to make one word of another.
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=other.len()).collect();
    let mut previous = None;
    for (at, letter) in one.chars().enumerate() {
        let mut row = vec![at + 1];
        for (to, theirs) in other.iter().enumerate() {
            let get = |row: &[usize], at: usize| row.get(at).copied().unwrap_or(usize::MAX / 2);
            let changed = get(&last, to) + usize::from(letter != *theirs);
            let mut best = changed.min(get(&last, to + 1) + 1).min(get(&row, to) + 1);
            let swapped = to > 0 && previous == Some(*theirs) && other.get(to - 1) == Some(&letter);
            if swapped && to > 0 {
                best = best.min(get(&before_last, to - 1) + 1);
            }
            row.push(best);
        }
        before_last = std::mem::replace(&mut last, row);
        previous = Some(letter);
    }
    last.last().copied().unwrap_or_default()
}

/// Tells of a file that cannot be opened.
pub(crate) fn check_file(key: &str, file: Option<&Path>, check: &mut impl FnMut(bool, String)) {
    if let Some(path) = file {
        let opened = std::fs::File::open(path);
        let reason = opened.as_ref().err().map(ToString::to_string).unwrap_or_default();
        check(
            opened.is_ok(),
            format!(
                "{key}: cannot read `{}` ({reason}), correct the path or its permissions",
                path.display()
            ),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::load(Some(file.path()))
    }

    #[test]
    fn an_empty_file_is_the_defaults() {
        assert_eq!(load("").unwrap(), Config::default());
    }

    #[test]
    fn sections_of_a_cluster_are_not_passed_over() {
        for (text, section) in [
            ("", None),
            ("[postgres]\nurl = \"postgres://db/fieldline\"\n", Some("postgres")),
            ("[redis]\nurl = \"redis://cache\"\n", Some("redis")),
            ("[mqtt_bus]\nurl = \"mqtt://broker\"\n", Some("mqtt_bus")),
        ] {
            assert_eq!(load(text).unwrap().of_a_cluster(), section, "{text}");
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let message = load("[http]\nlisten = \"127.0.0.1:1\"\nprot = 1\n").unwrap_err().to_string();
        assert!(message.contains("line 3") && message.contains("prot"), "{message}");
        assert!(message.contains("write one of listen, "), "{message}");
    }

    #[test]
    fn the_nearest_key_is_named() {
        for (text, nearest) in [
            ("[htp]\n", "`http`"),
            ("[http]\nlistne = \"x\"\n", "`listen`"),
            ("[postgres]\nulr = \"x\"\n", "`url`"),
            ("[mqtt-bus]\n", "`mqtt_bus`"),
            ("[postgres.tls]\ncaa = \"x\"\n", "`ca`"),
        ] {
            let message = load(text).unwrap_err().to_string();
            assert!(message.contains(&format!("did you mean {nearest}?")), "{message}");
        }
    }

    #[test]
    fn no_value_of_the_file_is_repeated() {
        for text in [
            "[redis]\nurl = [\"s3cret\"]\n",
            "[redis]\nnode_ttl = \"s3cret\"\n",
            "[redis]\nurl = s3cret\n",
            "[redis]\nurl = \"s3cret\n",
            "[postgres]\nconnections_max = \"a \\\"s3cret\\\", expected\"\n",
            "redis = \"s3cret\"\n",
            "[http]\nlisten = \"s3cret\"\n",
        ] {
            let message = load(text).unwrap_err().to_string();
            assert!(!message.contains("s3cret") && !message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn every_problem_is_said_at_once() {
        let text = "[http]\ntls_key = \"/none.pem\"\n[store]\nmemory_bytes_max = 1\n[log]\nfilter = \"=\"\n";
        let message = load(text).unwrap_err().to_string();
        for part in ["belong together", "/none.pem", "memory_bytes_max is 1", "log.filter"] {
            assert!(message.contains(part), "{part} is missing in: {message}");
        }
    }

    #[test]
    fn blobs_are_at_one_place() {
        let both = "[blobs]\ndirectory = \"/blobs\"\nurl = \"s3://bucket\"\n";
        let message = load(both).unwrap_err().to_string();
        assert!(message.contains("are both set"), "{message}");
        let of_one = "[node]\netcd = [\"http://e\"]\n[blobs]\ndirectory = \"/blobs\"\n";
        let message = load(of_one).unwrap_err().to_string();
        assert!(message.contains("node of several"), "{message}");
        load("[blobs]\nurl = \"s3://bucket/prefix\"\n").unwrap();
    }

    #[test]
    fn a_missing_file_is_named() {
        let message = Config::load(Some(Path::new("/nowhere.toml"))).unwrap_err().to_string();
        assert!(message.contains("/nowhere.toml"), "{message}");
    }
}
