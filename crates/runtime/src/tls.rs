//! TLS for listeners, with certificates that are read again when their files change.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

/// How often the files are looked at, at most.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Where a certificate is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TlsFiles {
    /// PEM file of the certificate chain, the server's own first.
    pub certificate: PathBuf,
    /// PEM file of the private key.
    pub key: PathBuf,
}

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read as PEM.
    #[error("cannot read `{path}` as PEM: {reason}", path = path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Certificate and key do not fit each other or TLS.
    #[error("`{certificate}` and `{key}` cannot be used for TLS: {reason}", certificate = certificate.display(), key = key.display())]
    Unusable {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

struct Current {
    config: Arc<ServerConfig>,
    changed: (Option<SystemTime>, Option<SystemTime>),
    looked: Instant,
}

/// A server configuration that follows its files. A change that cannot be used
/// is logged, and the certificate before it stays.
pub struct ReloadingTls {
    files: TlsFiles,
    protocols: Vec<Vec<u8>>,
    current: Mutex<Current>,
}

impl ReloadingTls {
    /// Reads the files; `protocols` are offered by ALPN (`h2`, `http/1.1`, …).
    ///
    /// # Errors
    ///
    /// [`TlsError`] naming the file.
    pub fn load(files: TlsFiles, protocols: &[&str]) -> Result<Self, TlsError> {
        let protocols: Vec<Vec<u8>> =
            protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        let changed = changed(&files);
        let config = server_config(&files, &protocols)?;
        let current = Mutex::new(Current { config, changed, looked: Instant::now() });
        Ok(Self { files, protocols, current })
    }

    /// The acceptor for the next connection.
    #[must_use]
    pub fn acceptor(&self) -> TlsAcceptor {
        let mut current = self.current.lock();
        if current.looked.elapsed() >= LOOK_EVERY {
            current.looked = Instant::now();
            let changed = changed(&self.files);
            if changed != current.changed {
                current.changed = changed;
                match server_config(&self.files, &self.protocols) {
                    Ok(config) => {
                        current.config = config;
                        tracing::info!(certificate = %self.files.certificate.display(), "certificate reloaded");
                    }
                    Err(error) => {
                        tracing::error!(%error, "changed certificate cannot be used, keeping the one before")
                    }
                }
            }
        }
        TlsAcceptor::from(Arc::clone(&current.config))
    }
}

fn changed(files: &TlsFiles) -> (Option<SystemTime>, Option<SystemTime>) {
    let modified = |path: &Path| std::fs::metadata(path).and_then(|meta| meta.modified()).ok();
    (modified(&files.certificate), modified(&files.key))
}

fn server_config(files: &TlsFiles, protocols: &[Vec<u8>]) -> Result<Arc<ServerConfig>, TlsError> {
    let pem = |path: &Path, reason: String| TlsError::Pem { path: path.to_owned(), reason };
    let chain = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| pem(&files.certificate, error.to_string()))?;
    if chain.is_empty() {
        return Err(pem(&files.certificate, "it holds no certificate".to_owned()));
    }
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|error| pem(&files.key, error.to_string()))?;
    let unusable = |error: rustls::Error| TlsError::Unusable {
        certificate: files.certificate.clone(),
        key: files.key.clone(),
        reason: error.to_string(),
    };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(unusable)?;
    config.alpn_protocols = protocols.to_vec();
    Ok(Arc::new(config))
}

/// Turns a [`TlsError`] into the error of an I/O call.
impl From<TlsError> for io::Error {
    fn from(error: TlsError) -> Self {
        Self::new(io::ErrorKind::InvalidInput, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_certificate(folder: &Path) -> TlsFiles {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let files = TlsFiles { certificate: folder.join("cert.pem"), key: folder.join("key.pem") };
        std::fs::write(&files.certificate, made.cert.pem()).unwrap();
        std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
        files
    }

    #[test]
    fn a_changed_certificate_is_used_and_a_broken_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let files = write_certificate(folder.path());
        let tls = ReloadingTls::load(files.clone(), &["http/1.1"]).unwrap();
        let config = |tls: &ReloadingTls| {
            tls.current.lock().looked -= LOOK_EVERY;
            Arc::clone(tls.acceptor().config())
        };
        let first = config(&tls);
        let later = SystemTime::UNIX_EPOCH + Duration::from_secs(5);
        write_certificate(folder.path());
        std::fs::File::options()
            .append(true)
            .open(&files.certificate)
            .unwrap()
            .set_modified(later)
            .unwrap();
        let second = config(&tls);
        assert!(!Arc::ptr_eq(&first, &second));
        std::fs::write(&files.certificate, "none").unwrap();
        assert!(Arc::ptr_eq(&second, &config(&tls)));
    }

    #[test]
    fn a_missing_file_is_named() {
        let files =
            TlsFiles { certificate: "/nowhere/cert.pem".into(), key: "/nowhere/key.pem".into() };
        let message = ReloadingTls::load(files, &[]).err().unwrap().to_string();
        assert!(message.contains("/nowhere/cert.pem"), "{message}");
    }
}
