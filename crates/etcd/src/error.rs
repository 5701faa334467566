use std::time::Duration;

use etcd_client::Error;
use fieldline_contracts::ClusterError;
use tokio::time::timeout;

/// Status codes of gRPC.
const UNKNOWN: i32 = 2;
const DEADLINE_EXCEEDED: i32 = 4;
const UNAVAILABLE: i32 = 14;

/// Why there is no contact with etcd, and what to do.
#[derive(Debug)]
#[non_exhaustive]
pub enum ConnectError {
    /// Nothing answers.
    Silent {
        /// Where it was looked for.
        places: String,
        /// In the words of the system.
        reason: String,
    },
    /// It answers, and refuses.
    Refused {
        /// Where.
        places: String,
        /// In its words.
        reason: String,
        /// What to do.
        remedy: &'static str,
    },
}

impl std::fmt::Display for ConnectError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Silent { places, reason } => write!(
                f,
                "etcd at {places} does not answer ({reason}): start it, or name where it listens for clients (port 2379 mostly), with https:// if it wants TLS"
            ),
            Self::Refused { places, reason, remedy } => {
                write!(f, "etcd at {places} cannot be used ({reason}): {remedy}")
            }
        }
    }
}

impl std::error::Error for ConnectError {}

impl ConnectError {
    pub(crate) fn new(places: &str, error: &Error) -> Self {
        let (places, reason) = (places.to_owned(), innermost(error));
        let any = |parts: &[&str]| parts.iter().any(|part| reason.contains(part));
        let remedy = if any(&["certificate", "UnknownIssuer"]) {
            "let `node.etcd_ca` be the file of who signed its certificate, name it as the certificate does, and give \
             `node.etcd_certificate` and `node.etcd_key` if it wants one"
        } else if any(&["corrupt message", "InvalidContentType", "handshake eof"]) {
            "it does not speak TLS there; write http://, or its port with TLS"
        } else if any(&["authentication failed", "user name is empty", "invalid auth token"]) {
            "give the name and password of a user that etcd knows, as `node.etcd_user` and `node.etcd_password`"
        } else if any(&["permission denied"]) {
            "grant its user read and write of all keys below the prefix"
        } else if any(&["authentication is not enabled"]) {
            "leave out name and password, or enable authentication in etcd"
        } else {
            match error {
                Error::InvalidUri(_) | Error::InvalidArgs(_) | Error::EndpointError(_) => {
                    "write each endpoint like http://10.0.0.1:2379"
                }
                Error::TransportError(_)
                | Error::IoError(_)
                | Error::Internal(_)
                | Error::GRpcStatus(_) => return Self::Silent { places, reason },
                _ => "see the log of etcd",
            }
        };
        Self::Refused { places, reason, remedy }
    }
}

/// What lies at the bottom of an error: what is above it says only that there was one.
fn innermost(error: &Error) -> String {
    let mut inner: &dyn std::error::Error = match error {
        Error::GRpcStatus(status) => status,
        other => other,
    };
    while let Some(source) = inner.source() {
        inner = source;
    }
    match error {
        Error::GRpcStatus(status) if std::error::Error::source(status).is_none() => {
            status.message().to_owned()
        }
        _ => inner.to_string(),
    }
}

/// Whether another member may answer what this one did not.
pub(crate) fn may_pass(error: &Error) -> bool {
    match error {
        Error::TransportError(_) | Error::IoError(_) | Error::Internal(_) => true,
        // It is what tonic gives where a connection cannot be made.
        Error::GRpcStatus(status) => {
            matches!(status.code() as i32, UNKNOWN | UNAVAILABLE | DEADLINE_EXCEEDED)
        }
        _ => false,
    }
}

/// A request with its deadline.
pub(crate) async fn in_time<T>(
    most: Duration,
    request: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    match timeout(most, request).await {
        Ok(answer) => answer,
        Err(_) => Err(Error::Internal(format!("no answer in {} ms", most.as_millis()))),
    }
}

pub(crate) fn unavailable(error: &Error) -> ClusterError {
    ClusterError::Unavailable(error.to_string())
}
