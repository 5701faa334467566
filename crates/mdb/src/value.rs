//! Values as bytes. A shape says which parameters a message has and of which
//! kind, so that messages that look alike, as most of a device do, store values only.

use std::sync::Arc;

use fieldline_model::{Decimal, ParamName, Params, Value};
use serde_json::{Map, Number, Value as Json};

use crate::codec::{Damage, Decoded, Input, put_bytes, put_signed, put_varint};

/// How a value is stored. The numbers are stored: never reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub(crate) enum Kind {
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
    pub(crate) const fn from_u8(number: u8) -> Decoded<Self> {
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
    pub(crate) const fn of(value: &Value) -> (Self, u8) {
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

/// One parameter of a shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Column {
    pub(crate) name: ParamName,
    pub(crate) kind: Kind,
    /// Decimals of a [`Kind::Decimal`], else 0.
    pub(crate) scale: u8,
}

impl Column {
    pub(crate) fn fits(&self, name: &ParamName, value: &Value) -> bool {
        (self.name.same_text(name) || self.name == *name)
            && Kind::of(value) == (self.kind, self.scale)
    }
}

/// The parameters of a message, in order, without their values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Shape(pub(crate) Box<[Column]>);

impl Shape {
    pub(crate) fn fits(&self, params: &Params) -> bool {
        self.0.len() == params.len()
            && self.0.iter().zip(params).all(|(column, (name, value))| column.fits(name, value))
    }

    /// Reads the values of a message of this shape.
    pub(crate) fn decode(&self, body: &[u8]) -> Decoded<Params> {
        let mut input = Input(body);
        let mut params = Params::with_capacity(self.0.len());
        for column in &self.0 {
            params.push(column.name.clone(), take_value(&mut input, column.kind, column.scale)?);
        }
        if input.is_empty() { Ok(params) } else { Err(Damage("bytes are left after the message")) }
    }

    /// Whether `body` has the values of this shape and nothing more.
    pub(crate) fn check(&self, body: &[u8]) -> Decoded<()> {
        let mut input = Input(body);
        for column in &self.0 {
            match column.kind {
                Kind::Bool => {
                    input.u8()?;
                }
                Kind::Int | Kind::Uint | Kind::Decimal => {
                    input.varint()?;
                }
                Kind::Float => {
                    input.u64()?;
                }
                Kind::Text => {
                    input.text()?;
                }
                Kind::Bytes | Kind::Json => {
                    input.bytes()?;
                }
            }
        }
        if input.is_empty() { Ok(()) } else { Err(Damage("bytes are left after the message")) }
    }
}

/// Appends a value without its kind and scale.
pub(crate) fn put_value(out: &mut Vec<u8>, value: &Value) {
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

pub(crate) fn take_value(input: &mut Input<'_>, kind: Kind, scale: u8) -> Decoded<Value> {
    Ok(match kind {
        Kind::Bool => Value::Bool(input.u8()? != 0),
        Kind::Int => Value::Int(input.signed()?),
        Kind::Uint => Value::Uint(input.varint()?),
        Kind::Decimal => Value::Decimal(decimal(input.signed()?, scale)?),
        Kind::Float => Value::Float(f64::from_bits(input.u64()?)),
        Kind::Text => Value::Text(input.text()?.into()),
        Kind::Bytes => Value::Bytes(input.bytes()?.into()),
        Kind::Json => Value::Json(Arc::new(json_of(input.bytes()?)?)),
    })
}

pub(crate) fn decimal(mantissa: i64, scale: u8) -> Decoded<Decimal> {
    Decimal::new(mantissa, scale).ok_or(Damage("too many decimals"))
}

/// Deepest nesting that is kept as a tree; what is below is kept as text.
/// What the parser of JSON takes (128) is far below it.
const JSON_DEPTH_MAX: u32 = 256;

/// Appends a tree exactly: text would round floats and forget the kind of numbers.
pub(crate) fn put_json(out: &mut Vec<u8>, json: &Json, depth: u32) {
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
pub(crate) fn json_of(bytes: &[u8]) -> Decoded<Json> {
    let mut input = Input(bytes);
    let json = take_json(&mut input, 0)?;
    if input.is_empty() { Ok(json) } else { Err(Damage("bytes are left after the JSON tree")) }
}

fn take_json(input: &mut Input<'_>, depth: u32) -> Decoded<Json> {
    if depth > JSON_DEPTH_MAX {
        return Err(Damage("JSON is nested too deeply"));
    }
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
                items.push(take_json(input, depth + 1)?);
            }
            Json::Array(items)
        }
        8 => {
            let count = input.count()?;
            let mut map = Map::new();
            for _ in 0..count {
                let name = input.text()?.to_owned();
                map.insert(name, take_json(input, depth + 1)?);
            }
            Json::Object(map)
        }
        _ => return Err(Damage("unknown kind of JSON value")),
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_json() -> impl Strategy<Value = Json> {
        let leaf = prop_oneof![
            Just(Json::Null),
            any::<bool>().prop_map(Json::Bool),
            any::<i64>().prop_map(Json::from),
            any::<u64>().prop_map(Json::from),
            any::<f64>().prop_map(Json::from),
            ".{0,8}".prop_map(Json::String),
        ];
        leaf.prop_recursive(4, 24, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Json::Array),
                prop::collection::vec((".{0,4}", inner), 0..6)
                    .prop_map(|items| Json::Object(items.into_iter().collect())),
            ]
        })
    }

    pub(crate) fn any_value() -> impl Strategy<Value = Value> {
        prop_oneof![
            any::<bool>().prop_map(Value::Bool),
            any::<i64>().prop_map(Value::Int),
            any::<u64>().prop_map(Value::from),
            (any::<i64>(), 0_u8..=18)
                .prop_map(|(m, s)| Value::Decimal(Decimal::new(m, s).unwrap())),
            any::<u64>().prop_map(|bits| Value::Float(f64::from_bits(bits))),
            ".{0,20}".prop_map(Value::from),
            any::<Vec<u8>>().prop_map(|b| Value::from(&b[..])),
            any_json().prop_map(|j| Value::Json(Arc::new(j))),
        ]
    }

    /// Equal to the last bit: scale and kind too.
    pub(crate) fn identical(a: &Value, b: &Value) -> bool {
        Kind::of(a) == Kind::of(b) && a == b
    }

    proptest! {
        #[test]
        fn values_round_trip_to_the_last_bit(value in any_value()) {
            let (kind, scale) = Kind::of(&value);
            let mut out = Vec::new();
            put_value(&mut out, &value);
            let mut input = Input(&out);
            let read = take_value(&mut input, kind, scale).unwrap();
            prop_assert!(identical(&read, &value), "{read:?} {value:?}");
            prop_assert!(input.is_empty());
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>, kind in 0_u8..8, scale: u8) {
            let kind = Kind::from_u8(kind).unwrap();
            let _read = (take_value(&mut Input(&bytes), kind, scale), json_of(&bytes));
        }
    }

    #[test]
    fn deep_json_is_kept_as_text_below_the_limit() {
        let mut json = Json::Null;
        for _ in 0..400 {
            json = Json::Array(vec![json]);
        }
        let mut out = Vec::new();
        put_json(&mut out, &json, 0);
        let mut read = &json_of(&out).unwrap();
        while let Some(inner) = read.get(0) {
            read = inner;
        }
        assert!(read.as_str().unwrap().starts_with("[[["));
    }
}
