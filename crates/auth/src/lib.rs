//! Who may do what: tokens, sign-in, sessions and scopes.
//!
//! [`Auth::token`] and [`Auth::session`] turn a secret into an [`Identity`];
//! services ask the identity what it may do and see, and pass its account to
//! every query. Secrets are random, shown once, and kept as SHA-256; passwords
//! are kept by argon2id. There is no default secret: [`Auth::bootstrap`] makes
//! a one-time link.
//!
//! It knows no HTTP and no MQTT. It may import `fieldline-contracts` and
//! `fieldline-model`. Start reading at [`Auth`].

mod auth;
mod backoff;
mod manage;
mod password;
mod secret;
mod session;

use std::net::IpAddr;

use fieldline_contracts::{Actor, RegistryError};
use fieldline_model::{AccountId, DeviceId, Event, EventKind, Scope, Timestamp, TokenId, UserId};
use uuid::Uuid;

pub use auth::{Auth, SignedIn};
pub use fieldline_model::{Network, NetworkError};
pub use manage::{Bootstrap, DEVICES_MAX, NewToken, NewUser, TOKENS_MAX, USERS_MAX};
pub use password::PASSWORD_CHARS;
pub use session::{LINK_AGE_MICROS_MAX, SESSION_AGE_MICROS_MAX, SESSION_IDLE_MICROS, SESSIONS_MAX};

/// Whether an identity is a person or a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IdentityKind {
    /// A person who signed in.
    User(UserId),
    /// An API token.
    Token(TokenId),
}

/// Who is calling, and what they may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The account; nothing of another is ever shown.
    pub account: AccountId,
    /// For the audit trail.
    pub actor: Actor,
    /// What it may do.
    pub scopes: Vec<Scope>,
    /// The only devices it may see; empty for all of the account.
    pub devices: Vec<DeviceId>,
    /// Person or program.
    pub kind: IdentityKind,
    /// The session, for a person.
    pub session: Option<Uuid>,
    /// When it stops being valid by itself.
    pub expires_at: Option<Timestamp>,
}

impl Identity {
    /// Whether it may do what needs `scope`.
    ///
    /// [`Scope::Root`] includes all, [`Scope::Admin`] all but root; writing and
    /// commanding include reading, publishing does not.
    #[must_use]
    pub fn may(&self, scope: Scope) -> bool {
        self.scopes.iter().any(|held| match held {
            Scope::Root => true,
            Scope::Admin => scope != Scope::Root,
            Scope::Write => matches!(scope, Scope::Write | Scope::Read),
            Scope::Command => matches!(scope, Scope::Command | Scope::Read),
            // A program that only publishes has no business reading.
            Scope::Publish => scope == Scope::Publish,
            Scope::Read => scope == Scope::Read,
        })
    }

    /// Whether it may see this device of its account.
    #[must_use]
    pub fn may_see(&self, device: DeviceId) -> bool {
        self.devices.is_empty() || self.devices.contains(&device)
    }

    /// Whether it may be told of an event: what people change is for administrators,
    /// all else for whoever sees the object.
    #[must_use]
    pub fn may_hear(&self, event: &Event) -> bool {
        self.may_see(DeviceId(event.object))
            && (event.kind != EventKind::Audit || self.may(Scope::Admin))
    }

    /// Whether it sees all devices of its account, so that lists need no filter.
    #[must_use]
    pub fn sees_all(&self) -> bool {
        self.devices.is_empty()
    }

    /// Whether it was valid by its own terms at `now`; a revocation is another matter ([`Auth::recheck`]).
    #[must_use]
    pub fn expired(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }
}

/// Why someone was not let in, or a change was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthError {
    /// The secret, name or password is wrong, or no longer right.
    #[error("{0}")]
    Unauthenticated(&'static str),
    /// Too many failures; worth trying again later.
    #[error("too many attempts; try again in {retry_after_s} s")]
    TooMany {
        /// How much later, in seconds.
        retry_after_s: u64,
    },
    /// What is asked for is not allowed; the text says what would be.
    #[error("{0}")]
    Refused(String),
    /// The registry failed or refused.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A fault of ours.
    #[error("sign-in failed: {0}")]
    Failed(String),
}

/// The actor of a person or program that calls from `peer`.
fn actor(name: String, peer: IpAddr) -> Actor {
    Actor { name, address: Some(peer.to_canonical().to_string()) }
}
