//! The objects that people manage. Each is a JSON document in the `Registry`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{AccountId, ChannelId, DeviceId, ProtocolId, Timestamp, TokenId, UserId};

/// Labels: free text by key, to find and group objects by.
pub type Labels = BTreeMap<String, String>;

/// A tenant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Account {
    /// Its id.
    pub id: AccountId,
    /// Its name, unique on this installation.
    pub name: String,
    /// Whether its devices, users and tokens are let in.
    pub enabled: bool,
    /// Days that messages are kept; 0 keeps them until space runs out.
    pub retention_days: u32,
    /// Bytes of messages that are kept; 0 sets no limit.
    pub storage_bytes_max: u64,
    /// Labels.
    #[serde(default)]
    pub labels: Labels,
    /// When it was created.
    pub created_at: Timestamp,
}

/// A person who signs in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct User {
    /// The id.
    pub id: UserId,
    /// The account.
    pub account: AccountId,
    /// The name to sign in with, unique on this installation.
    pub name: String,
    /// What the user may do.
    pub scopes: Vec<Scope>,
    /// Hash of the password by argon2id; absent until one is set. Never leaves the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_hash: Option<String>,
    /// Whether the user is let in.
    pub enabled: bool,
    /// When it was created.
    pub created_at: Timestamp,
}

/// What a user or token may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Scope {
    /// Read objects, messages, state and logs of the account.
    #[serde(rename = "read")]
    Read,
    /// Create, change and delete devices, channels, protocols and parameters.
    #[serde(rename = "write")]
    Write,
    /// Send commands to devices.
    #[serde(rename = "command")]
    Command,
    /// Publish messages into the pipeline.
    #[serde(rename = "publish")]
    Publish,
    /// Manage users, tokens and settings of the account.
    #[serde(rename = "admin")]
    Admin,
    /// Manage accounts and the installation.
    #[serde(rename = "root")]
    Root,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Self; 6] =
        [Self::Read, Self::Write, Self::Command, Self::Publish, Self::Admin, Self::Root];

    /// Its name in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Command => "command",
            Self::Publish => "publish",
            Self::Admin => "admin",
            Self::Root => "root",
        }
    }
}

/// An API token. The secret itself is shown once and kept nowhere.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Token {
    /// The id.
    pub id: TokenId,
    /// The account.
    pub account: AccountId,
    /// What it is for.
    pub name: String,
    /// SHA-256 of the secret, as hex digits. Never leaves the server.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub secret_hash: String,
    /// The first characters of the secret, to tell tokens apart.
    pub prefix: String,
    /// What it may do.
    pub scopes: Vec<Scope>,
    /// The only devices it may see; empty for all of the account.
    #[serde(default)]
    pub devices: Vec<DeviceId>,
    /// The only addresses (`10.0.0.0/8`, `2001:db8::/32`) it works from; empty for all.
    #[serde(default)]
    pub networks: Vec<String>,
    /// When it stops working; absent for never.
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
    /// When it was created.
    pub created_at: Timestamp,
    /// Who created it.
    #[serde(default)]
    pub created_by: String,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Device {
    /// The id.
    pub id: DeviceId,
    /// The account.
    pub account: AccountId,
    /// Name for people.
    pub name: String,
    /// What it calls itself on the wire (IMEI, serial number); unique in the account.
    pub ident: String,
    /// The protocol it speaks, empty if any.
    #[serde(default)]
    pub protocol: String,
    /// Kind or model, free text.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// Whether it is let in.
    pub enabled: bool,
    /// Settings that its protocol declares, by name (such as `io16`).
    #[serde(default)]
    pub settings: BTreeMap<String, serde_json::Value>,
    /// Labels.
    #[serde(default)]
    pub labels: Labels,
    /// When it was created.
    pub created_at: Timestamp,
}

/// What carries a channel's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Transport {
    /// TCP.
    Tcp,
    /// TLS over TCP.
    Tls,
    /// UDP.
    Udp,
}

/// A listener for devices of one protocol.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Channel {
    /// The id.
    pub id: ChannelId,
    /// The account.
    pub account: AccountId,
    /// Name for people.
    pub name: String,
    /// The protocol's name.
    pub protocol: String,
    /// What carries the bytes.
    pub transport: Transport,
    /// Address and port to listen on, such as `0.0.0.0:5027`.
    pub listen: String,
    /// Whether it listens.
    pub enabled: bool,
    /// Whether a device that is not registered is registered by its first login.
    #[serde(default)]
    pub auto_register: bool,
    /// Silence after which a device is disconnected, in seconds.
    #[serde(default = "defaults::idle_timeout_s")]
    pub idle_timeout_s: u32,
    /// Most connections held at once.
    #[serde(default = "defaults::connections_max")]
    pub connections_max: u32,
    /// Longest frame, in bytes.
    #[serde(default = "defaults::frame_bytes_max")]
    pub frame_bytes_max: u32,
    /// Most bytes a second that one connection may send, averaged over ten seconds; 0 sets no limit.
    #[serde(default = "defaults::connection_bytes_per_s_max")]
    pub connection_bytes_per_s_max: u32,
    /// PEM file of the certificate chain; TLS only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_certificate: Option<String>,
    /// PEM file of the private key; TLS only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<String>,
    /// Labels.
    #[serde(default)]
    pub labels: Labels,
    /// When it was created.
    pub created_at: Timestamp,
}

/// Defaults of settings, named so that documents and code agree.
pub mod defaults {
    /// Ten minutes: trackers keep alive every one to five.
    #[must_use]
    pub const fn idle_timeout_s() -> u32 {
        600
    }

    /// As many as leave room for other files under the usual limit of 20,000.
    #[must_use]
    pub const fn connections_max() -> u32 {
        15_000
    }

    /// Black-box lines and camera packets reach hundreds of kilobytes.
    #[must_use]
    pub const fn frame_bytes_max() -> u32 {
        1 << 20
    }

    /// 1 MiB/s: far above any tracker, far below what would crowd out the others.
    #[must_use]
    pub const fn connection_bytes_per_s_max() -> u32 {
        1 << 20
    }
}

/// A protocol description that an account uploaded. Built-in ones live in the program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Protocol {
    /// The id.
    pub id: ProtocolId,
    /// The account.
    pub account: AccountId,
    /// Its name, unique in the account; one that is built in is replaced for this account.
    pub name: String,
    /// The source text.
    pub source: String,
    /// Counts up with every change of the source.
    pub version: u32,
    /// When it was created.
    pub created_at: Timestamp,
    /// When its source last changed.
    pub updated_at: Timestamp,
}
