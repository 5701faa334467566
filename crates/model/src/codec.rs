//! Values as bytes, the same in every store and on the bus.
//!
//! ```text
//! number  = seven bits a byte, the low ones first, the high bit set where more follow; signed ones zigzag
//! value   = by its kind: bool (1) | number | signed number | bits of a float (8, little-endian)
//!         | length, then text, bytes or a tree
//! tree    = 0 null | 1 false | 2 true | 3 signed number | 4 number | 5 bits of a float (8)
//!         | 6 length text | 7 count tree* | 8 count (length text tree)*
//! tagged  = tag (1) value         the tag is the kind; of a decimal 32 and its scale
//! ```
//!
//! What is read back is what was written, to the last bit. Nothing here trusts a length, and what is read
//! takes memory in proportion to its bytes; where a few megabytes of it would be too much already, a reader
//! gives a bound on the parts too.
//!
//! The forms are on the disks of users: they never change, and no number is used again.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "varint and zigzag coding takes numbers apart bit by bit"
)]

use std::sync::Arc;

use serde_json::{Map, Number, Value as Json};

use crate::{Decimal, Value};

/// The bytes are not what a writer of this format makes; says what is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Damage(pub &'static str);

/// Parts (values and nodes of JSON trees) of what one message may hold at most, by its limit in bytes, and
/// some more: a bound for readers of bytes from outside.
pub const PARTS_MAX: usize = 1 << 18;

/// Appends a number.
#[inline]
pub fn put_varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// A signed number as one that is small where it is near zero.
#[must_use]
#[inline]
pub const fn zigzag(n: i64) -> u64 {
    ((n << 1) ^ (n >> 63)) as u64
}

/// The reverse of [`zigzag`].
#[must_use]
#[inline]
pub const fn unzigzag(n: u64) -> i64 {
    (n >> 1) as i64 ^ -((n & 1) as i64)
}

/// Appends a signed number.
#[inline]
pub fn put_signed(out: &mut Vec<u8>, n: i64) {
    put_varint(out, zigzag(n));
}

/// Appends bytes behind their length.
#[inline]
pub fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Bytes that are read from the front.
///
/// Each method takes what it names, or fails with [`Damage`] where the bytes are something else; after
/// that the place is of no meaning.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a>(pub &'a [u8]);

#[allow(clippy::missing_errors_doc, reason = "the type says when all of them fail")]
impl<'a> Input<'a> {
    /// Whether all was taken.
    #[must_use]
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Count of bytes that were not taken.
    #[must_use]
    #[inline]
    pub const fn left(&self) -> usize {
        self.0.len()
    }

    /// One byte.
    #[inline]
    pub fn u8(&mut self) -> Result<u8, Damage> {
        let (first, rest) = self.0.split_first().ok_or(Damage("ends early"))?;
        self.0 = rest;
        Ok(*first)
    }

    /// `N` bytes.
    #[inline]
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Damage> {
        let (first, rest) = self.0.split_first_chunk().ok_or(Damage("ends early"))?;
        self.0 = rest;
        Ok(*first)
    }

    /// Four bytes, little-endian.
    #[inline]
    pub fn u32(&mut self) -> Result<u32, Damage> {
        self.array().map(u32::from_le_bytes)
    }

    /// Eight bytes, little-endian.
    #[inline]
    pub fn u64(&mut self) -> Result<u64, Damage> {
        self.array().map(u64::from_le_bytes)
    }

    /// `count` bytes.
    #[inline]
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], Damage> {
        let (first, rest) = self.0.split_at_checked(count).ok_or(Damage("ends early"))?;
        self.0 = rest;
        Ok(first)
    }

    /// A number of [`put_varint`].
    #[inline]
    pub fn varint(&mut self) -> Result<u64, Damage> {
        let mut n = 0_u64;
        let mut bytes = self.0.iter();
        for shift in (0..64).step_by(7) {
            let byte = *bytes.next().ok_or(Damage("ends within a number"))?;
            let part = u64::from(byte & 0x7f);
            if shift == 63 && part > 1 {
                return Err(Damage("a number has more than 64 bits"));
            }
            n |= part << shift;
            if byte & 0x80 == 0 {
                self.0 = bytes.as_slice();
                return Ok(n);
            }
        }
        Err(Damage("a number has more than 64 bits"))
    }

    /// A number of [`put_signed`].
    #[inline]
    pub fn signed(&mut self) -> Result<i64, Damage> {
        self.varint().map(unzigzag)
    }

    /// A number of 32 bits.
    #[inline]
    pub fn id(&mut self) -> Result<u32, Damage> {
        u32::try_from(self.varint()?).map_err(|_| Damage("a number is out of range"))
    }

    /// A count of things of which each takes at least one of the bytes left.
    #[inline]
    pub fn count(&mut self) -> Result<usize, Damage> {
        let count = self.varint()?;
        usize::try_from(count)
            .ok()
            .filter(|count| *count <= self.left())
            .ok_or(Damage("a count is larger than its contents"))
    }

    /// Bytes of [`put_bytes`].
    #[inline]
    pub fn bytes(&mut self) -> Result<&'a [u8], Damage> {
        let count = self.count()?;
        self.take(count)
    }

    /// Bytes of [`put_bytes`] that are text.
    #[inline]
    pub fn text(&mut self) -> Result<&'a str, Damage> {
        std::str::from_utf8(self.bytes()?).map_err(|_| Damage("text is not UTF-8"))
    }
}

/// How a value is stored. The numbers are stored: never reuse one.
#[allow(missing_docs, reason = "the variants of `Value`, which has words for them")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    Bool = 0,
    Int = 1,
    Uint = 2,
    Decimal = 3,
    Float = 4,
    Text = 5,
    Bytes = 6,
    Json = 7,
}

impl Kind {
    /// The kind of this number.
    ///
    /// # Errors
    ///
    /// If there is none.
    #[inline]
    pub const fn from_u8(number: u8) -> Result<Self, Damage> {
        Ok(match number {
            0 => Self::Bool,
            1 => Self::Int,
            2 => Self::Uint,
            3 => Self::Decimal,
            4 => Self::Float,
            5 => Self::Text,
            6 => Self::Bytes,
            7 => Self::Json,
            _ => return Err(Damage("unknown kind of value")),
        })
    }

    /// The kind of `value`, and its decimals.
    #[must_use]
    #[inline]
    pub const fn of(value: &Value) -> (Self, u8) {
        match value {
            Value::Bool(_) => (Self::Bool, 0),
            Value::Int(_) => (Self::Int, 0),
            Value::Uint(_) => (Self::Uint, 0),
            Value::Decimal(d) => (Self::Decimal, d.scale()),
            Value::Float(_) => (Self::Float, 0),
            Value::Text(_) => (Self::Text, 0),
            Value::Bytes(_) => (Self::Bytes, 0),
            Value::Json(_) => (Self::Json, 0),
        }
    }
}

/// Appends a value without its kind and scale.
#[inline]
pub fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Bool(b) => out.push(u8::from(*b)),
        Value::Int(n) => put_signed(out, *n),
        Value::Uint(n) => put_varint(out, *n),
        Value::Decimal(d) => put_signed(out, d.mantissa()),
        Value::Float(x) => out.extend_from_slice(&x.to_bits().to_le_bytes()),
        Value::Text(text) => put_bytes(out, text.as_bytes()),
        Value::Bytes(bytes) => put_bytes(out, bytes),
        Value::Json(json) => {
            let mut tree = Vec::new();
            put_json(&mut tree, json, 0);
            put_bytes(out, &tree);
        }
    }
}

/// Reads a value of [`put_value`].
///
/// # Errors
///
/// If the bytes are none.
#[inline]
pub fn take_value(input: &mut Input<'_>, kind: Kind, scale: u8) -> Result<Value, Damage> {
    // Bounded by the bytes alone, which a store has checked.
    take_within(input, kind, scale, &mut { usize::MAX })
}

#[inline]
fn take_within(
    input: &mut Input<'_>,
    kind: Kind,
    scale: u8,
    parts: &mut usize,
) -> Result<Value, Damage> {
    part(parts)?;
    Ok(match kind {
        Kind::Bool => Value::Bool(input.u8()? != 0),
        Kind::Int => Value::Int(input.signed()?),
        Kind::Uint => Value::Uint(input.varint()?),
        Kind::Decimal => {
            Value::Decimal(Decimal::new(input.signed()?, scale).ok_or(Damage("too many decimals"))?)
        }
        Kind::Float => Value::Float(f64::from_bits(input.u64()?)),
        Kind::Text => Value::Text(input.text()?.into()),
        Kind::Bytes => Value::Bytes(input.bytes()?.into()),
        Kind::Json => Value::Json(Arc::new(tree(input.bytes()?, parts)?)),
    })
}

/// The tag of a decimal without decimals; those with some follow.
const TAG_DECIMAL: u8 = 32;

/// Appends a value that says itself of which kind it is.
#[inline]
pub fn put_tagged(out: &mut Vec<u8>, value: &Value) {
    out.push(match Kind::of(value) {
        (Kind::Decimal, scale) => TAG_DECIMAL + scale,
        (kind, _) => kind as u8,
    });
    put_value(out, value);
}

/// Reads a value of [`put_tagged`]. It and each node of its tree take one of `parts`; see [`PARTS_MAX`].
///
/// # Errors
///
/// If the bytes are none, or have more parts.
#[inline]
pub fn take_tagged(input: &mut Input<'_>, parts: &mut usize) -> Result<Value, Damage> {
    let tag = input.u8()?;
    match (tag.checked_sub(TAG_DECIMAL), Kind::from_u8(tag)) {
        (Some(scale), _) => take_within(input, Kind::Decimal, scale, parts),
        (None, Ok(Kind::Decimal)) => Err(Damage("a decimal without its decimals")),
        (None, kind) => take_within(input, kind?, 0, parts),
    }
}

/// Takes one of the parts that may still come.
///
/// # Errors
///
/// If none may.
#[inline]
pub fn part(parts: &mut usize) -> Result<(), Damage> {
    *parts = parts.checked_sub(1).ok_or(Damage("has more parts than a message may"))?;
    Ok(())
}

/// Deepest nesting that is kept as a tree; what is below is kept as text.
/// What the parser of JSON takes (128) is far below it.
const JSON_DEPTH_MAX: u32 = 256;

/// Appends a tree exactly: text would round floats and forget the kind of numbers.
fn put_json(out: &mut Vec<u8>, json: &Json, depth: u32) {
    match json {
        Json::Null => out.push(0),
        Json::Bool(b) => out.push(1 + u8::from(*b)),
        Json::Number(n) => {
            if let Some(n) = n.as_i64() {
                out.push(3);
                put_signed(out, n);
            } else if let Some(n) = n.as_u64() {
                out.push(4);
                put_varint(out, n);
            } else {
                out.push(5);
                out.extend_from_slice(&n.as_f64().unwrap_or(0.0).to_bits().to_le_bytes());
            }
        }
        Json::String(text) => {
            out.push(6);
            put_bytes(out, text.as_bytes());
        }
        deep if depth >= JSON_DEPTH_MAX => {
            out.push(6);
            put_bytes(out, deep.to_string().as_bytes());
        }
        Json::Array(items) => {
            out.push(7);
            put_varint(out, items.len() as u64);
            for item in items {
                put_json(out, item, depth + 1);
            }
        }
        Json::Object(map) => {
            out.push(8);
            put_varint(out, map.len() as u64);
            for (name, item) in map {
                put_bytes(out, name.as_bytes());
                put_json(out, item, depth + 1);
            }
        }
    }
}

/// The tree that these bytes are, all of them.
fn tree(bytes: &[u8], parts: &mut usize) -> Result<Json, Damage> {
    let mut input = Input(bytes);
    let json = take_json(&mut input, 0, parts)?;
    if input.is_empty() { Ok(json) } else { Err(Damage("bytes are left after the JSON tree")) }
}

fn take_json(input: &mut Input<'_>, depth: u32, parts: &mut usize) -> Result<Json, Damage> {
    if depth > JSON_DEPTH_MAX {
        return Err(Damage("JSON is nested too deeply"));
    }
    part(parts)?;
    Ok(match input.u8()? {
        0 => Json::Null,
        1 => Json::Bool(false),
        2 => Json::Bool(true),
        3 => Json::Number(input.signed()?.into()),
        4 => Json::Number(input.varint()?.into()),
        5 => {
            let number = f64::from_bits(input.u64()?);
            Json::Number(Number::from_f64(number).ok_or(Damage("JSON has no such number"))?)
        }
        6 => Json::String(input.text()?.to_owned()),
        7 => {
            let count = input.count()?;
            // No capacity from the count: a tree in memory is larger than its bytes.
            let mut items = Vec::new();
            for _ in 0..count {
                items.push(take_json(input, depth + 1, parts)?);
            }
            Json::Array(items)
        }
        8 => {
            let count = input.count()?;
            let mut map = Map::new();
            for _ in 0..count {
                let name = input.text()?.to_owned();
                map.insert(name, take_json(input, depth + 1, parts)?);
            }
            Json::Object(map)
        }
        _ => return Err(Damage("unknown kind of JSON value")),
    })
}

#[cfg(test)]
mod tests;
