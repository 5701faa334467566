//! What the nodes tell each other of an account's MQTT clients.

use std::sync::Arc;

use bytes::Bytes;
use fieldline_model::Timestamp;

/// Largest message of a client that goes to other nodes, in bytes of its topic, payload and properties.
pub const CLIENT_MESSAGE_BYTES_MAX: usize = 1 << 20;
/// Most sessions of one [`ClientSessions`].
pub const CLIENT_SESSIONS_MAX: usize = 256;

/// A message from client to client, or an answer for one. The node that took it has given it to its own clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientMessage {
    /// The service that took it: one run of one process.
    pub origin: u64,
    /// Where.
    pub topic: Arc<str>,
    /// What.
    pub payload: Bytes,
    /// The MQTT 5 properties that receivers get, encoded as MQTT encodes them.
    pub props: Bytes,
    /// Whether it was published with QoS 1.
    pub at_least_once: bool,
    /// Whether it was published as a retained one.
    pub retain: bool,
    /// When it is worth nothing any more, by the clock of the node that took it.
    pub expires_at: Option<Timestamp>,
}

impl ClientMessage {
    /// Bytes of what it carries.
    #[must_use]
    pub fn content_bytes(&self) -> usize {
        self.topic.len() + self.payload.len() + self.props.len()
    }
}

/// Sessions that a node has: of two of one client id the one with the higher number stays, wherever it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientSessions {
    /// The service that has them: one run of one process.
    pub origin: u64,
    /// Client ids, and the numbers of their sessions; at most [`CLIENT_SESSIONS_MAX`].
    pub sessions: Vec<(Arc<str>, u64)>,
}
