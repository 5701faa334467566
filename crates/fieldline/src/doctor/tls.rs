//! Certificates, keys and secrets in files, and who can reach what is not encrypted.

use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use fieldline_contracts::finding::Finding;
use fieldline_contracts::{Clock as _, SystemClock};
use fieldline_runtime::{ReloadingTls, TlsFiles};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use x509_parser::parse_x509_certificate;

use super::Patient;

/// A certificate that ends within this is a warning.
const SOON_DAYS: i64 = 14;

/// Certificates of our listeners, and their keys.
pub(super) fn certificates(patient: &Patient) -> Vec<Finding> {
    let config = &patient.config;
    let (http, mqtt) = (&config.http, &config.mqtt);
    let node = config.node.as_ref();
    let pairs = [
        ("http", http.tls_certificate.as_deref(), http.tls_key.as_deref()),
        ("mqtt", mqtt.tls_certificate.as_deref(), mqtt.tls_key.as_deref()),
        (
            "node",
            node.and_then(|node| node.certificate.as_deref()),
            node.and_then(|node| node.key.as_deref()),
        ),
        (
            "node.etcd",
            node.and_then(|node| node.etcd_certificate.as_deref()),
            node.and_then(|node| node.etcd_key.as_deref()),
        ),
    ];
    let mut findings = Vec::new();
    for (of, certificate, key) in pairs {
        let (Some(certificate), Some(key)) = (certificate, key) else { continue };
        findings.push(validity(of, certificate));
        findings.push(private(of, key));
        let files = TlsFiles { certificate: certificate.to_owned(), key: key.to_owned() };
        if let Err(error) = ReloadingTls::load(files, &[]) {
            let remedy = "name the key that belongs to the certificate, both in PEM";
            findings.push(Finding::broken("certificate", of, error.to_string(), remedy));
        }
    }
    findings
}

/// Whether a certificate is valid now, and for a while yet.
fn validity(of: &str, path: &Path) -> Finding {
    let (check, at) = ("certificate", format!("{of} {}", path.display()));
    let remedy = "renew it and put the new one in its place: it is taken up without a restart";
    let read = CertificateDer::from_pem_file(path).map_err(|error| error.to_string());
    let dates = read.and_then(|der| {
        let (_, parsed) = parse_x509_certificate(&der).map_err(|error| error.to_string())?;
        let validity = parsed.validity();
        Ok((validity.not_before.timestamp(), validity.not_after.timestamp()))
    });
    let (from, to) = match dates {
        Ok(dates) => dates,
        Err(error) => {
            let remedy = "name the PEM file of the certificate";
            return Finding::broken(check, at, format!("it cannot be read: {error}"), remedy);
        }
    };
    let now = SystemClock.now().as_micros() / 1_000_000;
    let days = (to - now) / 86_400;
    if now >= to {
        Finding::broken(check, at, format!("it ended {} days ago", (now - to) / 86_400), remedy)
    } else if now < from {
        Finding::broken(
            check,
            at,
            "it is not valid yet",
            "look at the clock of this machine, or who made it",
        )
    } else if days < SOON_DAYS {
        Finding::warning(check, at, format!("it ends in {days} days"), remedy)
    } else {
        Finding::ok(check, at, format!("valid for {days} more days"))
    }
}

/// Whether a key is for its owner alone.
fn private(of: &str, path: &Path) -> Finding {
    let (check, at) = ("certificate key", format!("{of} {}", path.display()));
    match path.metadata() {
        Ok(meta) if meta.mode() & 0o007 != 0 => Finding::broken(
            check,
            at,
            format!("everybody on this machine may read it (mode {:04o})", meta.mode() & 0o777),
            format!("run `chmod o= {}`, and make a new key: this one may be known", path.display()),
        ),
        Ok(_) => Finding::ok(check, at, "not for everybody"),
        Err(error) => {
            Finding::broken(check, at, format!("it cannot be read: {error}"), "correct the path")
        }
    }
}

/// A configuration with passwords is not for everybody.
pub(super) fn secrets(patient: &Patient) -> Vec<Finding> {
    let Some(path) = &patient.config_file else { return Vec::new() };
    let (check, at) = ("passwords", path.display().to_string());
    let config = &patient.config;
    let in_url = |url: &str| {
        let login = url.split_once("://").and_then(|(_, rest)| rest.rsplit_once('@'));
        login
            .is_some_and(|(login, _)| login.split_once(':').is_some_and(|(_, one)| !one.is_empty()))
    };
    let urls = [&config.postgres.url, &config.redis.url, &config.mqtt_bus.url];
    let secret = urls.into_iter().any(|url| in_url(url))
        || config.node.as_ref().is_some_and(|node| node.etcd_password.is_some());
    let mode = path.metadata().map_or(0, |meta| meta.mode() & 0o777);
    vec![if secret && mode & 0o007 != 0 {
        Finding::warning(
            check,
            &at,
            format!("everybody on this machine may read the passwords in it (mode {mode:04o})"),
            format!("run `chmod o= {at}`"),
        )
    } else {
        Finding::ok(check, at, "not for everybody")
    }]
}

fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let shared = matches!(ip.octets(), [100, 64..=127, ..]);
            !(ip.is_loopback()
                || ip.is_private()
                || ip.is_link_local()
                || ip.is_unspecified()
                || shared)
        }
        IpAddr::V6(ip) => {
            let [first, ..] = ip.octets();
            !(ip.is_loopback() || ip.is_unspecified() || first & 0xfe == 0xfc || first == 0xfe)
        }
    }
}

/// What is reached from other networks without encryption. Between nodes the configuration itself is refused.
pub(super) fn exposure(patient: &Patient) -> Vec<Finding> {
    let config = &patient.config;
    let check = "encryption";
    let mut findings = Vec::new();
    let plain = [
        ("http.listen", config.http.listen, config.http.tls_certificate.is_none()),
        ("mqtt.listen", config.mqtt.listen, true),
    ];
    for (key, listen, plain) in plain {
        if plain && is_public(listen.ip()) {
            findings.push(Finding::warning(
                check,
                format!("{key} {listen}"),
                "it is a public address, and what passes there is not encrypted: tokens travel in every request",
                "set a certificate, or listen on an address of your own network behind a balancer that ends TLS",
            ));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(check, "addresses", "nothing public is without TLS"));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_addresses_are_known() {
        for (ip, expected) in [
            ("127.0.0.1", false),
            ("10.1.2.3", false),
            ("192.168.1.1", false),
            ("100.64.0.1", false),
            ("0.0.0.0", false),
            ("203.0.113.7", true),
            ("::1", false),
            ("fd00::1", false),
            ("fe80::1", false),
            ("2001:db8::1", true),
        ] {
            assert_eq!(is_public(ip.parse().unwrap()), expected, "{ip}");
        }
    }
}
