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
            Self::Silent { places } => write!(
                f,
                "etcd at {places} does not answer: start it, or name where it listens for clients (port 2379 mostly)"
            ),
            Self::Refused { places, reason, remedy } => {
                write!(f, "etcd at {places} refuses: {reason}; {remedy}")
            }
        }
    }
}

impl std::error::Error for ConnectError {}

impl ConnectError {
    pub(crate) fn new(places: &str, error: Error) -> Self {
        let places = places.to_owned();
        let remedy = match &error {
            Error::TransportError(_) | Error::IoError(_) | Error::Internal(_) => {
                return Self::Silent { places };
            }
            Error::InvalidUri(_) | Error::InvalidArgs(_) | Error::EndpointError(_) => {
                "write each endpoint like http://10.0.0.1:2379"
            }
            Error::GRpcStatus(status) => {
                let text = status.message();
                if text.contains("authentication failed") || text.contains("user name is empty") {
                    "give the name and password of a user that etcd knows"
                } else if text.contains("permission denied") {
                    "grant its user read and write of all keys below the prefix"
                } else if text.contains("not enabled") {
                    "leave out name and password, or enable authentication in etcd"
                } else {
                    return Self::Silent { places };
                }
            }
            _ => "see the log of etcd",
        };
        let reason = match &error {
            Error::GRpcStatus(status) => status.message().to_owned(),
            other => other.to_string(),
        };
        Self::Refused { places, reason, remedy }
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
