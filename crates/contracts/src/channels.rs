//! `ChannelControl`: what management may ask of the links that hold channels open.

use async_trait::async_trait;
use fieldline_model::{AccountId, ChannelId, ConnectionId, DeviceId, Timestamp, Transport};
use serde::{Deserialize, Serialize};

/// How a channel fares.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelStatus {
    /// Whether devices can connect now.
    pub listening: bool,
    /// Why not, or what is wrong although it listens (a certificate that cannot be read).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The address it listens on; the port is the real one where port 0 was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Connections held now, over UDP devices heard of within the idle timeout.
    pub connections: u32,
    /// How it fares on each node; empty where one node speaks for itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<NodeChannelStatus>,
}

/// How a channel fares on one node of several.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeChannelStatus {
    /// The node.
    pub node: String,
    /// Whether devices can connect to it.
    pub listening: bool,
    /// Why not, what is wrong although it listens, or why the node gives no answer.
    pub error: Option<String>,
    /// The address it listens on.
    pub address: Option<String>,
    /// Connections that it holds.
    pub connections: u32,
}

/// Connections of a channel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Connections {
    /// Those that are known, oldest first; at most 10,000.
    pub items: Vec<ConnectionInfo>,
    /// Nodes that may hold others.
    pub missing: Vec<Missing>,
}

/// A node that gave no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The node.
    pub node: String,
    /// Why not.
    pub reason: String,
}

/// One connection of a channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionInfo {
    /// Its id.
    pub id: ConnectionId,
    /// The node that holds it; empty where one node speaks for itself.
    #[serde(default)]
    pub node: String,
    /// The channel.
    pub channel: ChannelId,
    /// The device, once it has identified itself.
    #[serde(default)]
    pub device: Option<DeviceId>,
    /// What the device calls itself.
    #[serde(default)]
    pub ident: Option<String>,
    /// The address it comes from.
    pub peer: String,
    /// What carries its bytes.
    pub transport: Transport,
    /// When it was made.
    pub connected_at: Timestamp,
    /// When bytes last came.
    #[serde(default)]
    pub received_at: Option<Timestamp>,
    /// Bytes received.
    pub received_bytes: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Messages stored.
    pub messages: u64,
}

/// Looks at channels and their connections, and closes these.
///
/// Channels are opened and changed by writing them to the `Registry`; this is
/// for what is not configuration.
#[async_trait]
pub trait ChannelControl: Send + Sync + 'static {
    /// How a channel fares; not listening for one that is unknown.
    async fn status(&self, account: AccountId, channel: ChannelId) -> ChannelStatus;

    /// How each of several channels fares, in the same order: over several nodes one question to each.
    async fn statuses(&self, account: AccountId, channels: &[ChannelId]) -> Vec<ChannelStatus> {
        let mut all = Vec::with_capacity(channels.len());
        for channel in channels {
            all.push(self.status(account, *channel).await);
        }
        all
    }

    /// The connections of a channel.
    async fn connections(&self, account: AccountId, channel: ChannelId) -> Connections;

    /// Closes a connection; false if there is no such one.
    ///
    /// # Errors
    ///
    /// The nodes that may hold it and gave no answer, if no other does.
    async fn close(
        &self,
        account: AccountId,
        channel: ChannelId,
        connection: ConnectionId,
    ) -> Result<bool, Vec<Missing>>;

    /// Whether each channel was opened since the start, or has failed to: what then does not
    /// listen is among the [`ChannelControl::problems`], and tried again.
    async fn opened(&self) -> bool;

    /// What keeps enabled channels from listening, as `channel ID: REASON`; empty when all do.
    async fn problems(&self) -> Vec<String>;
}
