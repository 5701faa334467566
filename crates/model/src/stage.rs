//! The stages of what a device says: `Decoded → Accepted → Stored`.
//!
//! Each is made only from the one before: the store takes [`Accepted`], readers
//! and the bus take [`Stored`]. A skipped step does not compile.

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::{AccountId, ChannelId, DeviceId, ParamName, Params, Schema, Timestamp, Value};

/// What a series holds. The numbers are stored: never reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum SeriesKind {
    /// Messages of a device.
    Message = 0,
    /// Log of a device: connections, raw frames, errors.
    DeviceLog = 1,
    /// Log of a channel: connections that never became a device's.
    ChannelLog = 2,
    /// Events of an account; its object is the account.
    Event = 3,
}

impl SeriesKind {
    /// The kind with this stored number.
    #[must_use]
    pub const fn from_u8(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Message),
            1 => Some(Self::DeviceLog),
            2 => Some(Self::ChannelLog),
            3 => Some(Self::Event),
            _ => None,
        }
    }
}

/// One ordered sequence of messages: of one kind, about one object, of one account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Series {
    /// Whose it is.
    pub account: AccountId,
    /// What it holds.
    pub kind: SeriesKind,
    /// The device, channel or account that it is about.
    pub object: Uuid,
}

impl Series {
    /// The messages of a device.
    #[must_use]
    pub const fn messages(account: AccountId, device: DeviceId) -> Self {
        Self { account, kind: SeriesKind::Message, object: device.0 }
    }

    /// The log of a device.
    #[must_use]
    pub const fn device_log(account: AccountId, device: DeviceId) -> Self {
        Self { account, kind: SeriesKind::DeviceLog, object: device.0 }
    }

    /// The log of a channel.
    #[must_use]
    pub const fn channel_log(account: AccountId, channel: ChannelId) -> Self {
        Self { account, kind: SeriesKind::ChannelLog, object: channel.0 }
    }

    /// The events of an account.
    #[must_use]
    pub const fn events(account: AccountId) -> Self {
        Self { account, kind: SeriesKind::Event, object: account.0 }
    }

    /// A hash that is the same on every machine and in every version; what shards are chosen by.
    #[must_use]
    pub fn hash64(&self) -> u64 {
        let mut key = [0_u8; 33];
        let (account, rest) = key.split_at_mut(16);
        account.copy_from_slice(self.account.as_bytes());
        let (object, kind) = rest.split_at_mut(16);
        object.copy_from_slice(self.object.as_bytes());
        kind.fill(self.kind as u8);
        xxh3_64(&key)
    }
}

/// What a link took off the wire, before anything is known of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decoded {
    /// The device's own time; absent if it sent none.
    pub timestamp: Option<Timestamp>,
    /// What it said.
    pub params: Params,
}

/// Why a decoded message was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// More parameters than [`Accepted::PARAMS_MAX`].
    #[error("the message has {count} parameters; at most {} are kept", Accepted::PARAMS_MAX)]
    TooManyParams {
        /// How many it has.
        count: usize,
    },
    /// More content than [`Accepted::BYTES_MAX`].
    #[error("the message has {bytes} bytes; at most {} are kept", Accepted::BYTES_MAX)]
    TooLarge {
        /// How many it has.
        bytes: usize,
    },
}

/// A message that may be stored: checked against the schema, timed, and identified.
#[derive(Clone, Debug)]
pub struct Accepted {
    series: Series,
    timestamp: Timestamp,
    received: Timestamp,
    params: Params,
    hash: u64,
}

impl Accepted {
    /// Most parameters of a message.
    pub const PARAMS_MAX: usize = 1_024;
    /// Most bytes of names and contents of a message.
    pub const BYTES_MAX: usize = 1 << 20;
    /// How far ahead of ours a device's clock may be.
    pub const AHEAD_MICROS_MAX: i64 = 24 * 3_600 * 1_000_000;
    /// 2000-01-01T00:00:00Z: a device's clock before it was never set.
    pub const EARLIEST: Timestamp = Timestamp::from_seconds(946_684_800);

    /// Checks `decoded` for `series`.
    ///
    /// Values are brought to their declared kind; one that has no place there
    /// is kept as it came, since refusing it would make the device send it for
    /// ever. A time out of range becomes `received`, and the device's own is
    /// kept as `timestamp.device`.
    ///
    /// # Errors
    ///
    /// If it is too large to be kept.
    pub fn validate(
        decoded: Decoded,
        series: Series,
        received: Timestamp,
        schema: &Schema,
    ) -> Result<Self, Rejected> {
        Self::check(&decoded)?;
        let Decoded { timestamp, mut params } = decoded;
        params.dedup();
        for (name, value) in params.iter_mut() {
            if let Some(spec) = schema.get(name.as_str())
                && let Some(conformed) = spec.conform(value)
            {
                *value = conformed;
            }
        }
        let latest = received.plus_micros(Self::AHEAD_MICROS_MAX);
        let timestamp = match timestamp {
            Some(at) if at >= Self::EARLIEST && at <= latest => at,
            Some(at) => {
                if let Ok(name) = ParamName::new("timestamp.device") {
                    params.set(name, Value::from(at.to_string()));
                }
                received
            }
            None => received,
        };
        let hash = content_hash(&params);
        Ok(Self { series, timestamp, received, params, hash })
    }

    /// Checks what [`Accepted::validate`] refuses, for who has to say which of many it was.
    ///
    /// # Errors
    ///
    /// If it is too large to be kept.
    pub fn check(decoded: &Decoded) -> Result<(), Rejected> {
        let params = &decoded.params;
        if params.len() > Self::PARAMS_MAX {
            return Err(Rejected::TooManyParams { count: params.len() });
        }
        let bytes = params.content_bytes();
        if bytes > Self::BYTES_MAX {
            return Err(Rejected::TooLarge { bytes });
        }
        Ok(())
    }

    /// A record that Fieldline itself made: a log line or an event.
    #[must_use]
    pub fn own(series: Series, timestamp: Timestamp, params: Params) -> Self {
        let hash = content_hash(&params);
        Self { series, timestamp, received: timestamp, params, hash }
    }

    /// The series it belongs to.
    #[must_use]
    pub const fn series(&self) -> Series {
        self.series
    }

    /// When it was so, by the device.
    #[must_use]
    pub const fn timestamp(&self) -> Timestamp {
        self.timestamp
    }

    /// When we received it.
    #[must_use]
    pub const fn received(&self) -> Timestamp {
        self.received
    }

    /// What it says.
    #[must_use]
    pub const fn params(&self) -> &Params {
        &self.params
    }

    /// A hash of its parameters, whatever their order. With series and time it
    /// identifies the message: the same again is a re-sent one.
    #[must_use]
    pub const fn hash(&self) -> u64 {
        self.hash
    }

    /// The message as stored under `receipt`, which must come from appending it.
    #[must_use]
    pub fn stored(self, receipt: Receipt) -> Stored {
        let Self { series, timestamp, received, params, hash: _ } = self;
        Stored { series, timestamp, received, params, cursor: receipt.cursor }
    }
}

/// A hash of `params` that does not depend on their order.
#[must_use]
pub fn content_hash(params: &Params) -> u64 {
    params.iter().fold(0, |sum: u64, (name, value)| {
        let mut hasher = Xxh3::new();
        hasher.update(name.as_str().as_bytes());
        match value {
            Value::Bool(b) => hasher.update(&[0, u8::from(*b)]),
            Value::Int(n) => {
                hasher.update(&[1, 0]);
                hasher.update(&n.to_le_bytes());
            }
            Value::Uint(n) => {
                hasher.update(&[2]);
                hasher.update(&n.to_le_bytes());
            }
            Value::Decimal(d) => {
                // Equal numbers hash equally, whatever their scale.
                let d = d.normalize();
                hasher.update(&[1, d.scale()]);
                hasher.update(&d.mantissa().to_le_bytes());
            }
            Value::Float(x) => {
                hasher.update(&[3]);
                hasher.update(&x.to_bits().to_le_bytes());
            }
            Value::Text(text) => {
                hasher.update(&[4]);
                hasher.update(text.as_bytes());
            }
            Value::Bytes(bytes) => {
                hasher.update(&[5]);
                hasher.update(bytes);
            }
            Value::Json(json) => {
                hasher.update(&[6]);
                hasher.update(json.to_string().as_bytes());
            }
        }
        sum.wrapping_add(hasher.digest())
    })
}

/// A place in a shard's order of arrival.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Cursor {
    /// The shard.
    pub shard: u16,
    /// Sequence within it, from 1 and without reuse; 0 is before the first.
    pub seq: u64,
}

/// Proof that one message is durable. Only a `History` backend makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// Where it stands; for a duplicate, where the first one stands or 0.
    pub cursor: Cursor,
    /// Whether the very same message was stored before: it is there once.
    pub duplicate: bool,
}

/// A message that is durable.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    series: Series,
    timestamp: Timestamp,
    received: Timestamp,
    params: Params,
    cursor: Cursor,
}

impl Stored {
    /// A message as a `History` backend read it back.
    #[must_use]
    pub const fn read_back(
        series: Series,
        timestamp: Timestamp,
        received: Timestamp,
        params: Params,
        cursor: Cursor,
    ) -> Self {
        Self { series, timestamp, received, params, cursor }
    }

    /// The series it belongs to.
    #[must_use]
    pub const fn series(&self) -> Series {
        self.series
    }

    /// When it was so, by the device.
    #[must_use]
    pub const fn timestamp(&self) -> Timestamp {
        self.timestamp
    }

    /// When we received it.
    #[must_use]
    pub const fn received(&self) -> Timestamp {
        self.received
    }

    /// What it says.
    #[must_use]
    pub const fn params(&self) -> &Params {
        &self.params
    }

    /// Where it stands in its shard.
    #[must_use]
    pub const fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Appends the message as a JSON object: `timestamp`, `received`, then its parameters.
    pub fn write_json(&self, out: &mut String) {
        use std::fmt::Write as _;
        let written =
            write!(out, r#"{{"timestamp":"{}","received":"{}""#, self.timestamp, self.received);
        debug_assert!(written.is_ok(), "writing to a String cannot fail");
        if !self.params.is_empty() {
            out.push(',');
            self.params.write_json_members(out);
        }
        out.push('}');
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Decimal;

    const RECEIVED: Timestamp = Timestamp::from_seconds(1_800_000_000);

    fn series() -> Series {
        Series::messages(AccountId::from_bytes([1; 16]), DeviceId::from_bytes([2; 16]))
    }

    fn message(timestamp: Option<Timestamp>, params: &[(&str, Value)]) -> Accepted {
        let params = params.iter().map(|(n, v)| (ParamName::new(*n).unwrap(), v.clone())).collect();
        Accepted::validate(
            Decoded { timestamp, params },
            series(),
            RECEIVED,
            &Schema::with_dictionary([]),
        )
        .unwrap()
    }

    #[test]
    fn a_clock_that_was_never_set_does_not_place_the_message() {
        let accepted = message(Some(Timestamp::from_seconds(364)), &[("io.1", Value::Int(1))]);
        assert_eq!(accepted.timestamp(), RECEIVED);
        assert_eq!(
            accepted.params().get("timestamp.device"),
            Some(&Value::from("1970-01-01T00:06:04Z"))
        );
    }

    #[test]
    fn identity_is_the_content_whatever_its_order_or_scale() {
        let scaled = Value::Decimal(Decimal::parse("12.50").unwrap());
        let a = message(None, &[("x", Value::Int(1)), ("y", scaled)]);
        let b = message(
            None,
            &[("y", Value::Decimal(Decimal::parse("12.5").unwrap())), ("x", Value::Int(1))],
        );
        let c = message(None, &[("x", Value::Int(1)), ("y", Value::Int(12))]);
        assert_eq!(a.hash(), b.hash());
        assert_ne!(a.hash(), c.hash());
    }

    proptest! {
        #[test]
        fn swapped_values_are_another_message(a: i64, b: i64) {
            prop_assume!(a != b);
            let one = message(None, &[("x", Value::Int(a)), ("y", Value::Int(b))]);
            let two = message(None, &[("x", Value::Int(b)), ("y", Value::Int(a))]);
            prop_assert_ne!(one.hash(), two.hash());
        }
    }
}
