//! Console sessions and one-time links, as the registry keeps them.

use std::collections::BTreeMap;

use fieldline_contracts::Kind;
use fieldline_contracts::registry::{Entity, UniqueIn};
use fieldline_model::{AccountId, Timestamp, UserId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

const SECOND_MICROS: i64 = 1_000_000;
const DAY_MICROS: i64 = 24 * 3_600 * SECOND_MICROS;

/// How long a session lasts without use.
pub const SESSION_IDLE_MICROS: i64 = 30 * DAY_MICROS;
/// How long a session lasts, however much it is used.
pub const SESSION_AGE_MICROS_MAX: i64 = 180 * DAY_MICROS;
/// How long a one-time link lasts.
pub const LINK_AGE_MICROS_MAX: i64 = 15 * 60 * SECOND_MICROS;
/// How often the use of a session is written down: each is a durable write.
pub(crate) const SEEN_EVERY_MICROS: i64 = 3_600 * SECOND_MICROS;
/// Most sessions of a user; the longest unused one ends when another begins.
pub const SESSIONS_MAX: usize = 20;

/// What a secret opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Purpose {
    /// An API token; never stored as a session.
    Token,
    /// A session in a browser.
    Session,
    /// A link that signs in once.
    Link,
}

/// A session or link. Only a hash of its secret is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Session {
    pub(crate) id: Uuid,
    pub(crate) account: AccountId,
    pub(crate) user: UserId,
    pub(crate) purpose: Purpose,
    /// Whether a one-time link opened it: then a new password may be set without the old one, once.
    #[serde(default)]
    pub(crate) by_link: bool,
    pub(crate) secret_hash: String,
    pub(crate) address: Option<String>,
    pub(crate) created_at: Timestamp,
    pub(crate) seen_at: Timestamp,
}

impl Session {
    /// When it ends if it is not used again.
    pub(crate) fn expires_at(&self) -> Timestamp {
        match self.purpose {
            Purpose::Link => self.created_at.plus_micros(LINK_AGE_MICROS_MAX),
            Purpose::Session | Purpose::Token => self
                .seen_at
                .plus_micros(SESSION_IDLE_MICROS)
                .min(self.created_at.plus_micros(SESSION_AGE_MICROS_MAX)),
        }
    }
}

impl Entity for Session {
    const KIND: Kind = Kind::Session;

    fn id(&self) -> Uuid {
        self.id
    }

    fn unique(&self) -> BTreeMap<&'static str, (UniqueIn, String)> {
        BTreeMap::from([("secret", (UniqueIn::Installation, self.secret_hash.clone()))])
    }
}
