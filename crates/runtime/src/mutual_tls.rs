//! Mutual TLS between nodes, with certificates that are read again when their files change.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use crate::tls::TlsError;

/// How often the files are looked at, at most.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Where a node's certificate is, and that of who signs the certificates of all nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MutualTlsFiles {
    /// PEM file of the authority's certificate; several while one follows another.
    pub ca: PathBuf,
    /// PEM file of the node's certificate chain, its own first.
    pub certificate: PathBuf,
    /// PEM file of the private key.
    pub key: PathBuf,
}

/// Both directions, made of the same files.
#[derive(Clone)]
pub struct MutualTlsConfigs {
    /// Asks others for their certificates.
    pub server: Arc<ServerConfig>,
    /// Shows ours to others.
    pub client: Arc<ClientConfig>,
}

struct Current {
    configs: MutualTlsConfigs,
    changed: [Option<SystemTime>; 3],
    looked: Instant,
}

/// Configurations that follow their files. A change that cannot be used is logged, and what was before stays.
pub struct ReloadingMutualTls {
    files: MutualTlsFiles,
    name: String,
    protocols: Vec<Vec<u8>>,
    current: Mutex<Current>,
}

impl ReloadingMutualTls {
    /// Reads the files of the node `name`; `protocols` are for ALPN.
    ///
    /// # Errors
    ///
    /// [`TlsError`] naming the file, also where the certificate is not of the authority, not for this name, or not valid
    /// now: others would refuse it.
    pub fn load(files: MutualTlsFiles, name: &str, protocols: &[&str]) -> Result<Self, TlsError> {
        let protocols: Vec<Vec<u8>> =
            protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        let changed = changed(&files);
        let configs = configs(&files, name, &protocols)?;
        let current = Mutex::new(Current { configs, changed, looked: Instant::now() });
        Ok(Self { files, name: name.to_owned(), protocols, current })
    }

    /// For the next connection.
    #[must_use]
    pub fn current(&self) -> MutualTlsConfigs {
        let mut current = self.current.lock();
        if current.looked.elapsed() >= LOOK_EVERY {
            current.looked = Instant::now();
            let changed = changed(&self.files);
            if changed != current.changed {
                match configs(&self.files, &self.name, &self.protocols) {
                    Ok(configs) => {
                        current.configs = configs;
                        tracing::info!(certificate = %self.files.certificate.display(), "certificate for other nodes reloaded");
                    }
                    Err(error) => {
                        tracing::error!(%error, "changed certificate for other nodes cannot be used, keeping the one before");
                    }
                }
                current.changed = changed;
            }
        }
        current.configs.clone()
    }
}

fn changed(files: &MutualTlsFiles) -> [Option<SystemTime>; 3] {
    [&files.ca, &files.certificate, &files.key]
        .map(|path| std::fs::metadata(path).and_then(|meta| meta.modified()).ok())
}

fn configs(
    files: &MutualTlsFiles,
    name: &str,
    protocols: &[Vec<u8>],
) -> Result<MutualTlsConfigs, TlsError> {
    let pem = |path: &PathBuf, reason: String| TlsError::Pem { path: path.clone(), reason };
    let read = |path: &PathBuf| {
        let all = CertificateDer::pem_file_iter(path)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|error| pem(path, error.to_string()))?;
        let none = || pem(path, "it holds no certificate".to_owned());
        if all.is_empty() { Err(none()) } else { Ok(all) }
    };
    let unusable = |reason: String| TlsError::Unusable {
        certificate: files.certificate.clone(),
        key: files.key.clone(),
        reason,
    };
    let failed = |error: rustls::Error| unusable(error.to_string());
    let (authorities, chain) = (read(&files.ca)?, read(&files.certificate)?);
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|error| pem(&files.key, error.to_string()))?;
    let mut roots = RootCertStore::empty();
    for authority in authorities {
        roots.add(authority).map_err(|error| pem(&files.ca, error.to_string()))?;
    }
    let (roots, provider) =
        (Arc::new(roots), Arc::new(rustls::crypto::aws_lc_rs::default_provider()));

    // As the others judge it.
    let server_name = ServerName::try_from(name.to_owned()).map_err(|_| {
        unusable(format!("the node's name `{name}` is no DNS name, and no certificate can have it"))
    })?;
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|error| unusable(error.to_string()))?;
    let (own, between) =
        chain.split_first().ok_or_else(|| unusable("no certificate".to_owned()))?;
    verifier.verify_server_cert(own, between, &server_name, &[], UnixTime::now()).map_err(
        |error| {
            unusable(format!(
                "{error}: issue one for {name} by the authority in `{}`",
                files.ca.display()
            ))
        },
    )?;

    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|error| unusable(error.to_string()))?;
    let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(failed)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain.clone(), key.clone_key())
        .map_err(failed)?;
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(failed)?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .map_err(failed)?;
    server.alpn_protocols = protocols.to_vec();
    client.alpn_protocols = protocols.to_vec();
    Ok(MutualTlsConfigs { server: Arc::new(server), client: Arc::new(client) })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

    use super::*;

    struct Authority {
        issuer: Issuer<'static, KeyPair>,
        pem: String,
    }

    fn authority() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Authority { issuer: Issuer::new(params, key), pem }
    }

    fn write(folder: &Path, by: &Authority, trusted: &Authority, name: &str) -> MutualTlsFiles {
        let files = MutualTlsFiles {
            ca: folder.join("ca.pem"),
            certificate: folder.join("cert.pem"),
            key: folder.join("key.pem"),
        };
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &by.issuer).unwrap();
        std::fs::write(&files.ca, &trusted.pem).unwrap();
        std::fs::write(&files.certificate, certificate.pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
        files
    }

    #[test]
    fn what_others_would_refuse_is_refused_at_the_start() {
        let folder = tempfile::tempdir().unwrap();
        let (ours, theirs) = (authority(), authority());
        let load = |by, trusted, name| {
            let files = write(folder.path(), by, trusted, name);
            ReloadingMutualTls::load(files, "node-1", &["h2"])
                .map(|_| ())
                .map_err(|e| e.to_string())
        };
        assert_eq!(load(&ours, &ours, "node-1"), Ok(()));
        let other = load(&ours, &ours, "node-2").unwrap_err();
        assert!(other.contains("issue one for node-1"), "{other}");
        let foreign = load(&theirs, &ours, "node-1").unwrap_err();
        assert!(foreign.contains("by the authority in") && foreign.contains("ca.pem"), "{foreign}");
    }

    #[test]
    fn changed_files_are_used_and_broken_ones_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let ours = authority();
        let files = write(folder.path(), &ours, &ours, "node-1");
        let tls = ReloadingMutualTls::load(files.clone(), "node-1", &["h2"]).unwrap();
        let later = |seconds| {
            let file = std::fs::File::options().append(true).open(&files.key).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
        };
        let current = || {
            tls.current.lock().looked -= LOOK_EVERY;
            tls.current().client
        };
        let first = current();
        write(folder.path(), &ours, &ours, "node-1");
        later(5);
        let second = current();
        assert!(!Arc::ptr_eq(&first, &second));
        write(folder.path(), &ours, &ours, "node-2");
        later(6);
        assert!(Arc::ptr_eq(&second, &current()));
    }
}
