//! Identifiers that sort by the time they were made.
//!
//! Every id is a UUID of version 7 (RFC 9562 §5.7): 48 bits of Unix
//! milliseconds, then random bits. Text and byte order are both time order, so
//! a list by id is a list by age and an id can serve as a page cursor.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::{Builder, Uuid};

use crate::Timestamp;

/// The text was not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an id: expected a UUID such as 01932f6e-8f7a-7cc0-98c4-dc0c0c07398f")]
pub struct IdError {
    text: String,
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        #[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
        pub struct $name(pub Uuid);

        impl $name {
            /// Makes an id for the moment `at` from ten random bytes.
            #[must_use]
            pub fn new(at: Timestamp, random: [u8; 10]) -> Self {
                Self(uuid_v7(at, random))
            }

            /// The id's bytes, in time order.
            #[must_use]
            pub fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }

            /// The id that has these bytes.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                // At most 64 characters are quoted back: the text is from outside.
                Uuid::try_parse(text)
                    .map(Self)
                    .map_err(|_| IdError { text: text.chars().take(64).collect() })
            }
        }

        impl From<$name> for Uuid {
            fn from(id: $name) -> Uuid {
                id.0
            }
        }
    )+};
}

ids! {
    /// A tenant.
    AccountId,
    /// A person who signs in.
    UserId,
    /// An API token.
    TokenId,
    /// A device.
    DeviceId,
    /// A listener for one protocol.
    ChannelId,
    /// A protocol description that an account uploaded.
    ProtocolId,
    /// One connection of a device, or one UDP session.
    ConnectionId,
    /// A command to a device.
    CommandId,
    /// Something that happened.
    EventId,
}

/// A UUID of version 7 for `at`; times before 1970 count as 1970.
#[must_use]
pub fn uuid_v7(at: Timestamp, random: [u8; 10]) -> Uuid {
    let unix_ms = u64::try_from(at.as_micros() / 1_000).unwrap_or(0);
    Builder::from_unix_timestamp_millis(unix_ms, &random).into_uuid()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ids_sort_by_time_and_survive_text(a in 0_i64..4_000_000_000_000, b in 0_i64..4_000_000_000_000, r: [u8; 10], s: [u8; 10]) {
            let (x, y) = (DeviceId::new(Timestamp::from_millis(a), r), DeviceId::new(Timestamp::from_millis(b), s));
            if a != b {
                prop_assert_eq!(a.cmp(&b), x.cmp(&y));
                prop_assert_eq!(a.cmp(&b), x.to_string().cmp(&y.to_string()));
            }
            prop_assert_eq!(x, x.to_string().parse().unwrap());
        }
    }

    #[test]
    fn a_wrong_id_is_quoted_but_not_at_length() {
        let error = "x".repeat(1_000).parse::<DeviceId>().unwrap_err().to_string();
        assert!(error.starts_with("`xxxx") && error.len() < 200, "{error}");
    }
}
