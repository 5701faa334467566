//! Events: what happens to a device or an account.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{AccountId, EventId, Params, Timestamp};

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum EventKind {
    /// A device connected.
    Online,
    /// A device's connection ended.
    Offline,
    /// A device was registered by its first message.
    Registered,
    /// A connection was refused or its bytes could not be used.
    Rejected,
    /// A command changed its status.
    Command,
    /// Someone changed an object.
    Audit,
}

impl EventKind {
    /// Its name in topics and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Offline => "offline",
            Self::Registered => "registered",
            Self::Rejected => "rejected",
            Self::Command => "command",
            Self::Audit => "audit",
        }
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Event {
    /// Its id.
    pub id: EventId,
    /// Whose it is.
    pub account: AccountId,
    /// What happened.
    pub kind: EventKind,
    /// The device, channel or other object it happened to.
    pub object: Uuid,
    /// When.
    pub timestamp: Timestamp,
    /// More about it.
    #[serde(default)]
    pub params: Params,
}
