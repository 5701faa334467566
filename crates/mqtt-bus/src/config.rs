//! Settings, and what can be wrong with them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use percent_encoding::percent_decode_str;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde::Deserialize;
use tokio_rustls::TlsConnector;

use crate::ConnectError;

/// `[mqtt_bus]`: the private broker between the nodes of a cluster.
#[derive(Clone, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct MqttBusConfig {
    /// `mqtt://[USER[:PASSWORD]@]HOST[:PORT]`; `mqtts://` for TLS. Special characters of user and password are
    /// percent-encoded.
    pub url: String,
    /// First level of all topics: several installations may share a broker. Letters, digits, `-`, `_` and `.`.
    pub prefix: String,
    /// With `mqtts://`: a file with the certificates in PEM that may have signed the broker's.
    pub authority: Option<PathBuf>,
    /// With `mqtts://`: this node's certificate in PEM, where the broker asks for one. Needs `key`.
    pub certificate: Option<PathBuf>,
    /// The private key of `certificate`, in PEM.
    pub key: Option<PathBuf>,
    /// Most items that wait for the broker; beyond it the oldest are dropped, and other nodes are told how many. At least
    /// 1,000.
    pub queue_items_max: usize,
    /// Most bytes of what waits for the broker; beyond it the oldest are dropped. At least 4 MiB. What is on its way and not
    /// acknowledged comes on top: 4 MiB at most.
    pub queue_bytes_max: usize,
    /// Longest that a new subscriber waits for the broker to confirm; after it, it is told once the broker has.
    #[serde(with = "humantime_serde")]
    pub subscribe_wait: Duration,
    /// A broker that is silent for so long counts as away. Between 1 s and 60 s.
    #[serde(with = "humantime_serde")]
    pub silence_max: Duration,
}

impl Default for MqttBusConfig {
    fn default() -> Self {
        Self {
            url: "mqtt://127.0.0.1:1883".to_owned(),
            prefix: "fieldline".to_owned(),
            authority: None,
            certificate: None,
            key: None,
            queue_items_max: 100_000,
            queue_bytes_max: 64 << 20,
            subscribe_wait: Duration::from_secs(2),
            silence_max: Duration::from_secs(5),
        }
    }
}

impl std::fmt::Debug for MqttBusConfig {
    /// Without the password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = self.url.rsplit('@').next().unwrap_or_default();
        write!(f, "MqttBusConfig({place}, {}/#)", self.prefix)
    }
}

impl MqttBusConfig {
    /// Checks what types cannot, and returns every problem at once, one sentence each.
    ///
    /// # Errors
    ///
    /// The sentences.
    pub fn validate(&self) -> Result<(), Vec<String>> {
        let Self {
            url,
            prefix,
            authority,
            certificate,
            key,
            queue_items_max,
            queue_bytes_max,
            subscribe_wait,
            silence_max,
        } = self;
        let mut problems = Vec::new();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        match Address::of(url) {
            Err(problem) => problems.push(problem),
            Ok(address) if address.tls && authority.is_none() => problems.push(
                "`mqtt_bus.authority` is missing: with `mqtts://`, name the file of the certificates that signed the broker's"
                    .to_owned(),
            ),
            Ok(address) if !address.tls && (authority.is_some() || certificate.is_some()) => {
                problems.push(
                    "`mqtt_bus.authority` and `mqtt_bus.certificate` are for TLS: write `mqtts://` in `mqtt_bus.url`, or leave \
                     them out"
                        .to_owned(),
                );
            }
            Ok(_) => {}
        }
        if certificate.is_some() != key.is_some() {
            problems.push("`mqtt_bus.certificate` and `mqtt_bus.key` go together".to_owned());
        }
        if !(1..=64).contains(&prefix.len()) || !prefix.chars().all(plain) {
            problems.push(
                "`mqtt_bus.prefix` has 1 to 64 letters, digits, `-`, `_` and `.`; choose another"
                    .to_owned(),
            );
        }
        if *queue_items_max < 1_000 {
            problems.push("`mqtt_bus.queue_items_max` is at least 1000".to_owned());
        }
        if *queue_bytes_max < 4 << 20 {
            problems.push("`mqtt_bus.queue_bytes_max` is at least 4194304".to_owned());
        }
        if *subscribe_wait > Duration::from_secs(30) {
            problems.push("`mqtt_bus.subscribe_wait` is at most 30s; 2s is usual".to_owned());
        }
        if !(Duration::from_secs(1)..=Duration::from_secs(60)).contains(silence_max) {
            problems.push("`mqtt_bus.silence_max` is between 1s and 60s; 5s is usual".to_owned());
        }
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }
}

/// A broker's address and who we are to it, taken from its URL.
#[derive(Clone)]
pub(crate) struct Address {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) login: Option<(String, String)>,
    pub(crate) tls: bool,
}

impl Address {
    pub(crate) fn of(url: &str) -> Result<Self, String> {
        let wrong = || {
            "`mqtt_bus.url` is not understood: write it like mqtt://user:password@10.0.0.1:1883, or mqtts:// for TLS".to_owned()
        };
        let (tls, rest) = match url.split_once("://") {
            Some(("mqtt", rest)) => (false, rest),
            Some(("mqtts", rest)) => (true, rest),
            _ => return Err(wrong()),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (login, place) = match rest.rsplit_once('@') {
            Some((login, place)) => (Some(login), place),
            None => (None, rest),
        };
        let decoded = |text: &str| {
            percent_decode_str(text).decode_utf8().map(String::from).map_err(|_| wrong())
        };
        let login = match login.map(|login| login.split_once(':').unwrap_or((login, ""))) {
            Some((user, password)) => Some((decoded(user)?, decoded(password)?)),
            None => None,
        };
        // An IPv6 address stands in brackets.
        let (host, port) = match place.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => {
                (host, port.parse().map_err(|_| wrong())?)
            }
            _ => (place, if tls { 8883 } else { 1883 }),
        };
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        let unfit = |c: char| c.is_whitespace() || c.is_control() || "/?#@".contains(c);
        if host.is_empty() || port == 0 || host.contains(unfit) {
            return Err(wrong());
        }
        Ok(Self { host: host.to_owned(), port, login, tls })
    }
}

impl Address {
    /// Whether only machines of one's own network can reach it, as far as the address tells.
    pub(crate) fn is_private(&self) -> bool {
        match self.host.parse() {
            Ok(std::net::IpAddr::V4(ip)) => {
                ip.is_loopback() || ip.is_private() || ip.is_link_local()
            }
            Ok(std::net::IpAddr::V6(ip)) => ip.is_loopback() || ip.octets()[0] & 0xfe == 0xfc,
            // A name of one level is one's own.
            Err(_) => {
                !self.host.contains('.')
                    || self.host.ends_with(".local")
                    || self.host.ends_with(".internal")
            }
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// How to speak TLS to the broker.
#[derive(Clone)]
pub(crate) struct Tls {
    pub(crate) connector: TlsConnector,
    pub(crate) name: ServerName<'static>,
}

/// TLS as the settings say; `None` for a plain connection. Reads files.
pub(crate) fn tls(config: &MqttBusConfig, address: &Address) -> Result<Option<Tls>, ConnectError> {
    if !address.tls {
        return Ok(None);
    }
    let wrong = |text: String| ConnectError::Settings(text);
    let read = |key: &str, path: &Option<PathBuf>| {
        let path = path.clone().unwrap_or_default();
        std::fs::read(&path).map_err(|error| {
            let path = path.display();
            wrong(format!("`mqtt_bus.{key}`: {path} cannot be read ({error}); correct the path"))
        })
    };
    let certificates = |key: &str, path: &Option<PathBuf>| {
        let all: Result<Vec<CertificateDer<'static>>, _> =
            CertificateDer::pem_slice_iter(&read(key, path)?).collect();
        match all {
            Ok(all) if !all.is_empty() => Ok(all),
            _ => {
                Err(wrong(format!("`mqtt_bus.{key}` has no certificate in PEM; name another file")))
            }
        }
    };
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates("authority", &config.authority)?);
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let refused = |error: rustls::Error| {
        wrong(format!("TLS cannot be used with these certificates ({error}); make them anew"))
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(refused)?
        .with_root_certificates(roots);
    let client = if config.certificate.is_some() {
        let key = PrivateKeyDer::from_pem_slice(&read("key", &config.key)?).map_err(|_| {
            wrong("`mqtt_bus.key` has no private key in PEM; name another file".to_owned())
        })?;
        let chain = certificates("certificate", &config.certificate)?;
        builder.with_client_auth_cert(chain, key).map_err(refused)?
    } else {
        builder.with_no_client_auth()
    };
    let name = ServerName::try_from(address.host.clone()).map_err(|_| {
        wrong("`mqtt_bus.url`: a host name or address is needed for TLS; correct it".to_owned())
    })?;
    Ok(Some(Tls { connector: TlsConnector::from(Arc::new(client)), name }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_taken_apart() {
        let of = |url: &str| Address::of(url).unwrap();
        let all = of("mqtts://us%40er:p%3Aw@broker.example:8884/");
        assert_eq!((all.host.as_str(), all.port, all.tls), ("broker.example", 8884, true));
        assert_eq!(all.login, Some(("us@er".to_owned(), "p:w".to_owned())));
        assert_eq!(of("mqtt://[::1]").to_string(), "[::1]:1883");
        assert_eq!(of("mqtts://10.0.0.1").to_string(), "10.0.0.1:8883");
        for wrong in
            ["", "redis://x", "mqtt://", "mqtt://a b", "mqtt://h:x", "mqtt://h:0", "mqtt://h/p"]
        {
            assert!(Address::of(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn all_that_is_wrong_is_said_at_once_and_no_password() {
        let config = MqttBusConfig {
            url: "mqtts://user:secret@host".to_owned(),
            prefix: "a/b".to_owned(),
            key: Some("key.pem".into()),
            queue_items_max: 0,
            ..MqttBusConfig::default()
        };
        let problems = config.validate().unwrap_err();
        assert_eq!(problems.len(), 4, "{problems:?}");
        assert!(!format!("{config:?} {problems:?}").contains("secret"));
        assert!(MqttBusConfig::default().validate().is_ok());
    }
}
