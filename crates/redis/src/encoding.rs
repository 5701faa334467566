//! How a value stands in Redis: exactly as it was, with what decides whether another is newer.
//!
//! ```text
//! record  = version cost value
//! version = timestamp (8) sequence (8)      greater is newer, byte by byte
//! cost    = what it counts for (4)
//! value   = kind (1) content
//! ```
//!
//! Numbers are big-endian. A timestamp has its sign bit turned, so that bytes sort as times do.

use std::sync::Arc;

use fieldline_model::{Decimal, Timestamp, Value};
use serde_json::{Map, Number, Value as Json};

/// Bytes before the value of a record.
pub(crate) const HEAD_BYTES: usize = 20;

/// Deepest nesting of a JSON value that is kept; no parser gives more.
const DEPTH_MAX: usize = 256;

mod kind {
    pub(super) const FALSE: u8 = 0;
    pub(super) const TRUE: u8 = 1;
    pub(super) const INT: u8 = 2;
    pub(super) const UINT: u8 = 3;
    pub(super) const DECIMAL: u8 = 4;
    pub(super) const FLOAT: u8 = 5;
    pub(super) const TEXT: u8 = 6;
    pub(super) const BYTES: u8 = 7;
    /// The kinds of a JSON tree begin here.
    pub(super) const JSON: u8 = 8;
    pub(super) const NULL: u8 = 9;
    pub(super) const ARRAY: u8 = 10;
    pub(super) const OBJECT: u8 = 11;
}

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
    match value {
        Value::Bool(b) => out.push(if *b { kind::TRUE } else { kind::FALSE }),
        Value::Int(n) => put(out, kind::INT, &n.to_be_bytes()),
        Value::Uint(n) => put(out, kind::UINT, &n.to_be_bytes()),
        Value::Decimal(d) => {
            put(out, kind::DECIMAL, &[d.scale()]);
            out.extend(d.mantissa().to_be_bytes());
        }
        Value::Float(x) => put(out, kind::FLOAT, &x.to_bits().to_be_bytes()),
        Value::Text(text) => put(out, kind::TEXT, text.as_bytes()),
        Value::Bytes(bytes) => put(out, kind::BYTES, bytes),
        Value::Json(json) => {
            out.push(kind::JSON);
            put_json(out, json, 0);
        }
    }
}

fn put(out: &mut Vec<u8>, kind: u8, content: &[u8]) {
    out.push(kind);
    out.extend(content);
}

fn put_sized(out: &mut Vec<u8>, bytes: &[u8]) {
    put_count(out, bytes.len());
    out.extend(bytes);
}

/// Contents are below a few megabytes wherever values come from.
fn put_count(out: &mut Vec<u8>, count: usize) {
    out.extend(u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes());
}

/// A tree's numbers by their bits: no text of them is exact.
fn put_json(out: &mut Vec<u8>, json: &Json, depth: usize) {
    match json {
        _ if depth >= DEPTH_MAX => out.push(kind::NULL),
        Json::Null => out.push(kind::NULL),
        Json::Bool(b) => out.push(if *b { kind::TRUE } else { kind::FALSE }),
        Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(n), _, _) => put(out, kind::INT, &n.to_be_bytes()),
            (_, Some(n), _) => put(out, kind::UINT, &n.to_be_bytes()),
            (_, _, x) => put(out, kind::FLOAT, &x.unwrap_or(0.0).to_bits().to_be_bytes()),
        },
        Json::String(text) => {
            out.push(kind::TEXT);
            put_sized(out, text.as_bytes());
        }
        Json::Array(items) => {
            out.push(kind::ARRAY);
            put_count(out, items.len());
            items.iter().for_each(|item| put_json(out, item, depth + 1));
        }
        Json::Object(members) => {
            out.push(kind::OBJECT);
            put_count(out, members.len());
            for (name, value) in members {
                put_sized(out, name.as_bytes());
                put_json(out, value, depth + 1);
            }
        }
    }
}

/// A value that [`put_value`] wrote; `None` if the bytes are anything else.
pub(crate) fn read_value(bytes: &[u8]) -> Option<Value> {
    let (kind, content) = bytes.split_first()?;
    let whole = |content: &[u8]| content.try_into().ok();
    Some(match *kind {
        kind::FALSE | kind::TRUE if content.is_empty() => Value::Bool(*kind == kind::TRUE),
        kind::INT => Value::Int(i64::from_be_bytes(whole(content)?)),
        kind::UINT => Value::from(u64::from_be_bytes(whole(content)?)),
        kind::DECIMAL => {
            let (scale, mantissa) = content.split_first()?;
            Value::Decimal(Decimal::new(i64::from_be_bytes(whole(mantissa)?), *scale)?)
        }
        kind::FLOAT => Value::float(f64::from_bits(u64::from_be_bytes(whole(content)?)))?,
        kind::TEXT => Value::Text(std::str::from_utf8(content).ok()?.into()),
        kind::BYTES => Value::Bytes(content.into()),
        kind::JSON => {
            let mut input = Input(content);
            let json = input.json(0)?;
            if !input.0.is_empty() {
                return None;
            }
            Value::Json(Arc::new(json))
        }
        _ => return None,
    })
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self) -> Option<[u8; 8]> {
        self.take(8)?.try_into().ok()
    }

    /// A count of what takes at least `bytes_each`: never more than there is room for.
    fn count(&mut self, bytes_each: usize) -> Option<usize> {
        let count = usize::try_from(u32::from_be_bytes(self.take(4)?.try_into().ok()?)).ok()?;
        (count <= self.0.len() / bytes_each).then_some(count)
    }

    fn text(&mut self) -> Option<String> {
        let count = self.count(1)?;
        Some(std::str::from_utf8(self.take(count)?).ok()?.to_owned())
    }

    fn json(&mut self, depth: usize) -> Option<Json> {
        if depth > DEPTH_MAX {
            return None;
        }
        Some(match *self.take(1)?.first()? {
            kind::NULL => Json::Null,
            kind::FALSE => Json::Bool(false),
            kind::TRUE => Json::Bool(true),
            kind::INT => i64::from_be_bytes(self.number()?).into(),
            kind::UINT => u64::from_be_bytes(self.number()?).into(),
            kind::FLOAT => {
                let float = f64::from_bits(u64::from_be_bytes(self.number()?));
                Json::Number(Number::from_f64(float)?)
            }
            kind::TEXT => Json::String(self.text()?),
            kind::ARRAY => {
                let count = self.count(1)?;
                let mut items = Vec::with_capacity(count);
                for _ in 0..count {
                    items.push(self.json(depth + 1)?);
                }
                Json::Array(items)
            }
            kind::OBJECT => {
                let count = self.count(5)?;
                let mut members = Map::with_capacity(count);
                for _ in 0..count {
                    let name = self.text()?;
                    members.insert(name, self.json(depth + 1)?);
                }
                Json::Object(members)
            }
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;

    use super::*;

    fn json() -> impl Strategy<Value = Json> {
        let leaf = prop_oneof![
            Just(Json::Null),
            any::<bool>().prop_map(Json::from),
            any::<i64>().prop_map(Json::from),
            any::<u64>().prop_map(Json::from),
            any::<f64>().prop_filter_map("finite", Number::from_f64).prop_map(Json::Number),
            ".{0,12}".prop_map(Json::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                vec(inner.clone(), 0..4).prop_map(Json::Array),
                btree_map(".{0,6}", inner, 0..4)
                    .prop_map(|members| Json::Object(members.into_iter().collect())),
            ]
        })
    }

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
            json().prop_map(|json| Value::Json(Arc::new(json))),
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
    fn a_value_too_large_goes_without_its_content() {
        let version = Version { timestamp: Timestamp::from_seconds(1), seq: 1 };
        let large = Value::from("x".repeat(1 << 20));
        assert_eq!(record(version, 1 << 20, 1 << 18, &large).len(), HEAD_BYTES);
    }
}
