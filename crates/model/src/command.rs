//! Commands: what is asked of a device.

use serde::{Deserialize, Serialize};

use crate::{AccountId, CommandId, DeviceId, Params, Timestamp};

/// How far a command has come. Only [`CommandStatus::Queued`] and [`CommandStatus::Sent`] can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum CommandStatus {
    /// Waiting for the device to connect, or for its turn.
    Queued,
    /// On the wire; an answer is awaited.
    Sent,
    /// The device answered.
    Answered,
    /// It could not be sent or the device refused it; `error` says why.
    Failed,
    /// Its time ran out first.
    Expired,
    /// Someone took it back before it was sent.
    Cancelled,
}

impl CommandStatus {
    /// Whether nothing more will happen to it.
    #[must_use]
    pub const fn is_final(self) -> bool {
        !matches!(self, Self::Queued | Self::Sent)
    }
}

/// A command and what became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Command {
    /// Its id.
    pub id: CommandId,
    /// Whose device.
    pub account: AccountId,
    /// Which device.
    pub device: DeviceId,
    /// The command's name in its protocol, such as `text`.
    pub name: String,
    /// Its arguments by name.
    #[serde(default)]
    pub params: Params,
    /// How far it has come.
    pub status: CommandStatus,
    /// When it was queued.
    pub created_at: Timestamp,
    /// When it stops being worth sending or waiting for.
    pub expires_at: Timestamp,
    /// When it was last put on the wire.
    #[serde(default)]
    pub sent_at: Option<Timestamp>,
    /// When it reached a final status.
    #[serde(default)]
    pub finished_at: Option<Timestamp>,
    /// How often it was put on the wire.
    #[serde(default)]
    pub attempts: u32,
    /// The device's answer.
    #[serde(default)]
    pub answer: Option<String>,
    /// Why it failed.
    #[serde(default)]
    pub error: Option<String>,
    /// The user or token that queued it.
    #[serde(default)]
    pub created_by: String,
}
