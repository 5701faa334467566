//! How a value stands in Redis: exactly as it was, with what decides whether another is newer.
//!
//! ```text
//! record  = version cost value
//! version = timestamp (8) sequence (8)      greater is newer, byte by byte
//! cost    = what it counts for (4)
//! value   = format (1) tagged value of `fieldline_model::codec`
//! ```
//!
//! Numbers before the value are big-endian. A timestamp has its sign bit turned, so that bytes sort as times do.

use fieldline_model::codec::{Input, PARTS_MAX, put_tagged, take_tagged};
use fieldline_model::{Timestamp, Value};

/// Bytes before the value of a record.
pub(crate) const HEAD_BYTES: usize = 20;

/// The format of values, also part of each generation's name: a memory that was filled in another format
/// is filled anew. Below 16 are the kinds of a form that had no such byte.
pub(crate) const FORMAT: u8 = 18;

/// Decides which of two values of one parameter is the newer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version {
    pub(crate) timestamp: Timestamp,
    /// Place in the order of arrival; 0 where it is not known.
    pub(crate) seq: u64,
}

/// A timestamp as eight bytes that sort as times do.
pub(crate) fn time_bytes(at: Timestamp) -> [u8; 8] {
    (at.as_micros().cast_unsigned() ^ (1 << 63)).to_be_bytes()
}

/// The timestamp of [`time_bytes`].
pub(crate) fn read_time(bytes: &[u8]) -> Option<Timestamp> {
    let number = u64::from_be_bytes(bytes.try_into().ok()?);
    Some(Timestamp::from_micros((number ^ (1 << 63)).cast_signed()))
}

/// A value as a field of a device's hash. One that is too large to be kept anyway goes without
/// its content: its cost says so.
pub(crate) fn record(version: Version, cost: usize, cost_max: usize, value: &Value) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEAD_BYTES + 16);
    out.extend(time_bytes(version.timestamp));
    out.extend(version.seq.to_be_bytes());
    out.extend(u32::try_from(cost).unwrap_or(u32::MAX).to_be_bytes());
    if cost <= cost_max {
        put_value(&mut out, value);
    }
    out
}

/// A field of a device's hash; `None` if it is none of ours.
pub(crate) fn read_record(bytes: &[u8]) -> Option<(Value, Timestamp)> {
    let timestamp = read_time(bytes.get(..8)?)?;
    Some((read_value(bytes.get(HEAD_BYTES..)?)?, timestamp))
}

/// Appends a value.
pub(crate) fn put_value(out: &mut Vec<u8>, value: &Value) {
    out.push(FORMAT);
    put_tagged(out, value);
}

/// A value that [`put_value`] wrote; `None` if the bytes are anything else.
pub(crate) fn read_value(bytes: &[u8]) -> Option<Value> {
    let mut input = Input(bytes.strip_prefix(&[FORMAT])?);
    let value = take_tagged(&mut input, &mut { PARTS_MAX }).ok()?;
    input.is_empty().then_some(value)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use fieldline_model::Decimal;
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// The codec has its own properties: here a few of each kind are enough.
    fn value() -> impl Strategy<Value = Value> {
        prop_oneof![
            any::<bool>().prop_map(Value::Bool),
            any::<i64>().prop_map(Value::Int),
            any::<u64>().prop_map(Value::from),
            (any::<i64>(), 0..=Decimal::SCALE_MAX)
                .prop_map(|(mantissa, scale)| Decimal::new(mantissa, scale).unwrap())
                .prop_map(Value::Decimal),
            any::<f64>().prop_filter_map("finite", Value::float),
            ".{0,40}".prop_map(Value::from),
            any::<Vec<u8>>().prop_map(|bytes| Value::Bytes(bytes.into())),
            any::<i64>().prop_map(|n| Value::Json(Arc::new(serde_json::json!({"a": [n]})))),
        ]
    }

    proptest! {
        /// Not only equal: of the same kind, with the same decimals and the same text.
        #[test]
        fn values_come_back_as_they_were(value in value(), at: i64, seq: u64) {
            let version = Version { timestamp: Timestamp::from_micros(at), seq };
            let (read, timestamp) = read_record(&record(version, 1, 1, &value)).unwrap();
            prop_assert_eq!(timestamp.as_micros(), at);
            prop_assert_eq!(std::mem::discriminant(&read), std::mem::discriminant(&value));
            if let (Value::Decimal(a), Value::Decimal(b)) = (&read, &value) {
                prop_assert_eq!((a.mantissa(), a.scale()), (b.mantissa(), b.scale()));
            }
            if let (Value::Json(a), Value::Json(b)) = (&read, &value) {
                prop_assert_eq!(a.to_string(), b.to_string());
            }
            prop_assert_eq!(read, value);
        }

        /// What decides in the script is the order of bytes.
        #[test]
        fn versions_sort_as_bytes(a: (i64, u64), b: (i64, u64)) {
            let version = |(at, seq)| Version { timestamp: Timestamp::from_micros(at), seq };
            let bytes = |v| record(v, 1, 1, &Value::Bool(true))[..16].to_vec();
            let (a, b) = (version(a), version(b));
            prop_assert_eq!(bytes(a).cmp(&bytes(b)), a.cmp(&b));
        }

        /// Whatever somebody writes into our keys, reading it ends, and takes no more than there is.
        #[test]
        fn reading_any_bytes_never_panics(bytes: Vec<u8>, flips in vec((any::<u16>(), any::<u8>()), 0..4), value in value()) {
            let _any = (read_value(&bytes), read_record(&bytes));
            let mut damaged = Vec::new();
            put_value(&mut damaged, &value);
            for (at, with) in flips {
                let at = usize::from(at) % damaged.len();
                damaged[at] ^= with;
            }
            let _damaged = read_value(&damaged);
        }
    }

    #[test]
    fn a_value_of_another_format_is_refused() {
        let mut bytes = Vec::new();
        put_value(&mut bytes, &Value::Int(1));
        assert_eq!(bytes, [18, 1, 2]);
        assert_eq!(read_value(&bytes), Some(Value::Int(1)));
        for format in (0..16).chain([17, 19]) {
            bytes[0] = format;
            assert_eq!(read_value(&bytes), None);
        }
    }

    #[test]
    fn a_value_too_large_goes_without_its_content() {
        let version = Version { timestamp: Timestamp::from_seconds(1), seq: 1 };
        let large = Value::from("x".repeat(1 << 20));
        assert_eq!(record(version, 1 << 20, 1 << 18, &large).len(), HEAD_BYTES);
    }
}
