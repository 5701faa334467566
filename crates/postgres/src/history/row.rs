//! Parameters as the bytes of one column, exactly: `[format][count]`, then for each its name, the kind of
//! its value, the decimals of a decimal, and the value. A name is its number in the [`Dictionary`], or 0 and
//! its text: a tracker's message has three times as many bytes of names as of values. Nothing here trusts a
//! length.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "varint and zigzag coding takes numbers apart bit by bit"
)]

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use fieldline_model::{Decimal, ParamName, Params, Value};
use serde_json::{Map, Number, Value as Json};

/// The present format. Readers know all that ever were.
const FORMAT: u8 = 1;

/// Deepest nesting that is kept as a tree; what is below is kept as text.
/// What the parser of JSON takes (128) is far below it.
const JSON_DEPTH_MAX: u32 = 256;

/// Most names that a [`Names`] remembers.
const NAMES_MAX: usize = 4_096;

/// The bytes are not what [`encode`] makes; says what is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage(pub &'static str);

/// What [`decode`] says where a name's number is not in the dictionary at hand.
pub(crate) const UNNAMED: Damage = Damage("the number of a name is not known");

/// Names by number, from 1, as the table `names` has them.
#[derive(Debug, Default)]
pub struct Dictionary {
    names: HashMap<u32, ParamName>,
    numbers: HashMap<ParamName, u32>,
}

impl Dictionary {
    /// These names with these numbers.
    pub fn of(names: impl IntoIterator<Item = (u32, ParamName)>) -> Self {
        let names: HashMap<u32, ParamName> = names.into_iter().collect();
        let numbers = names.iter().map(|(number, name)| (name.clone(), *number)).collect();
        Self { names, numbers }
    }

    /// The number of a name.
    pub(crate) fn number(&self, name: &ParamName) -> Option<u32> {
        self.numbers.get(name).copied()
    }

    /// Count of names.
    pub(crate) fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether `other` has all of these names with the same numbers.
    pub(crate) fn is_within(&self, other: &Self) -> bool {
        self.names.iter().all(|(number, name)| other.names.get(number) == Some(name))
    }
}

/// What names are read with. Those that come as text are remembered: the messages of an answer share them.
#[derive(Default)]
pub struct Names {
    texts: HashSet<ParamName>,
    pub(crate) dictionary: Arc<Dictionary>,
}

impl Names {
    /// Names by the numbers of `dictionary`.
    #[must_use]
    pub fn of(dictionary: Arc<Dictionary>) -> Self {
        Self { texts: HashSet::new(), dictionary }
    }

    pub(crate) fn text(&mut self, text: &str) -> Result<ParamName, Damage> {
        if let Some(known) = self.texts.get(text) {
            return Ok(known.clone());
        }
        let name = ParamName::new(text).map_err(|_| Damage("a name is none"))?;
        if self.texts.len() < NAMES_MAX {
            self.texts.insert(name.clone());
        }
        Ok(name)
    }

    fn take(&mut self, input: &mut Input<'_>) -> Result<ParamName, Damage> {
        match input.varint()? {
            0 => self.text(input.text()?),
            number => {
                let number = u32::try_from(number).map_err(|_| UNNAMED)?;
                self.dictionary.names.get(&number).cloned().ok_or(UNNAMED)
            }
        }
    }
}

/// Appends `params`; calls `unknown` with each name that is not in the dictionary.
pub fn encode(
    out: &mut Vec<u8>,
    params: &Params,
    dictionary: &Dictionary,
    unknown: &mut dyn FnMut(&ParamName),
) {
    out.push(FORMAT);
    put_varint(out, params.len() as u64);
    for (name, value) in params {
        if let Some(number) = dictionary.number(name) {
            put_varint(out, u64::from(number));
        } else {
            unknown(name);
            out.push(0);
            put_bytes(out, name.as_str().as_bytes());
        }
        put_value(out, value);
    }
}

/// Reads what [`encode`] made.
///
/// # Errors
///
/// If it made no such bytes.
pub fn decode(bytes: &[u8], names: &mut Names) -> Result<Params, Damage> {
    let mut input = Input(bytes);
    if input.u8()? != FORMAT {
        return Err(Damage("the format is unknown: a newer version wrote it"));
    }
    let count = input.count()?;
    let mut params = Params::with_capacity(count.min(1_024));
    for _ in 0..count {
        let name = names.take(&mut input)?;
        params.push(name, take_value(&mut input)?);
    }
    if input.0.is_empty() { Ok(params) } else { Err(Damage("bytes are left after the message")) }
}

/// Appends the kind of a value and the value.
pub(crate) fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Bool(b) => out.extend_from_slice(&[0, u8::from(*b)]),
        Value::Int(n) => {
            out.push(1);
            put_varint(out, zigzag(*n));
        }
        Value::Uint(n) => {
            out.push(2);
            put_varint(out, *n);
        }
        Value::Decimal(d) => {
            out.extend_from_slice(&[3, d.scale()]);
            put_varint(out, zigzag(d.mantissa()));
        }
        Value::Float(x) => {
            out.push(4);
            out.extend_from_slice(&x.to_bits().to_le_bytes());
        }
        Value::Text(text) => {
            out.push(5);
            put_bytes(out, text.as_bytes());
        }
        Value::Bytes(bytes) => {
            out.push(6);
            put_bytes(out, bytes);
        }
        Value::Json(json) => {
            out.push(7);
            put_json(out, json, 0);
        }
    }
}

pub(crate) fn take_value(input: &mut Input<'_>) -> Result<Value, Damage> {
    Ok(match input.u8()? {
        0 => match input.u8()? {
            0 => Value::Bool(false),
            1 => Value::Bool(true),
            _ => return Err(Damage("neither true nor false")),
        },
        1 => Value::Int(unzigzag(input.varint()?)),
        2 => Value::Uint(input.varint()?),
        3 => {
            let scale = input.u8()?;
            let mantissa = unzigzag(input.varint()?);
            Value::Decimal(Decimal::new(mantissa, scale).ok_or(Damage("too many decimals"))?)
        }
        4 => Value::Float(f64::from_bits(input.u64()?)),
        5 => Value::Text(input.text()?.into()),
        6 => Value::Bytes(input.bytes()?.into()),
        7 => Value::Json(Arc::new(take_json(input, 0)?)),
        _ => return Err(Damage("unknown kind of value")),
    })
}

/// Appends a tree exactly: text would round floats and forget the kind of numbers.
fn put_json(out: &mut Vec<u8>, json: &Json, depth: u32) {
    match json {
        Json::Null => out.push(0),
        Json::Bool(b) => out.push(1 + u8::from(*b)),
        Json::Number(n) => {
            if let Some(n) = n.as_i64() {
                out.push(3);
                put_varint(out, zigzag(n));
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

fn take_json(input: &mut Input<'_>, depth: u32) -> Result<Json, Damage> {
    Ok(match input.u8()? {
        7 | 8 if depth >= JSON_DEPTH_MAX => return Err(Damage("JSON is nested too deeply")),
        0 => Json::Null,
        1 => Json::Bool(false),
        2 => Json::Bool(true),
        3 => Json::Number(unzigzag(input.varint()?).into()),
        4 => Json::Number(input.varint()?.into()),
        5 => {
            let number = f64::from_bits(input.u64()?);
            Json::Number(Number::from_f64(number).ok_or(Damage("JSON has no such number"))?)
        }
        6 => Json::String(input.text()?.to_owned()),
        7 => {
            // No capacity from the count: a tree in memory is larger than its bytes.
            let mut items = Vec::new();
            for _ in 0..input.count()? {
                items.push(take_json(input, depth + 1)?);
            }
            Json::Array(items)
        }
        8 => {
            let mut map = Map::new();
            for _ in 0..input.count()? {
                let name = input.text()?.to_owned();
                map.insert(name, take_json(input, depth + 1)?);
            }
            Json::Object(map)
        }
        _ => return Err(Damage("unknown kind of JSON value")),
    })
}

pub(crate) fn put_varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

pub(crate) const fn zigzag(n: i64) -> u64 {
    ((n << 1) ^ (n >> 63)) as u64
}

pub(crate) const fn unzigzag(n: u64) -> i64 {
    (n >> 1) as i64 ^ -((n & 1) as i64)
}

pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Bytes that are read from the front.
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn u8(&mut self) -> Result<u8, Damage> {
        let (first, rest) = self.0.split_first().ok_or(Damage("ends early"))?;
        self.0 = rest;
        Ok(*first)
    }

    fn u64(&mut self) -> Result<u64, Damage> {
        let (first, rest) = self.0.split_first_chunk().ok_or(Damage("ends early"))?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*first))
    }

    pub(crate) fn varint(&mut self) -> Result<u64, Damage> {
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

    /// A count of things of which each takes at least one of the bytes left.
    pub(crate) fn count(&mut self) -> Result<usize, Damage> {
        let count = self.varint()?;
        usize::try_from(count)
            .ok()
            .filter(|count| *count <= self.0.len())
            .ok_or(Damage("a count is larger than its contents"))
    }

    fn bytes(&mut self) -> Result<&'a [u8], Damage> {
        let count = self.count()?;
        let (first, rest) = self.0.split_at_checked(count).ok_or(Damage("ends early"))?;
        self.0 = rest;
        Ok(first)
    }

    pub(crate) fn text(&mut self) -> Result<&'a str, Damage> {
        std::str::from_utf8(self.bytes()?).map_err(|_| Damage("text is not UTF-8"))
    }
}

#[cfg(test)]
mod tests {
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

    fn any_value() -> impl Strategy<Value = Value> {
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

    fn any_params() -> impl Strategy<Value = Params> {
        prop::collection::vec(("[^\\p{Cc}]{1,20}", any_value()), 0..12).prop_map(|all| {
            all.into_iter().map(|(name, value)| (ParamName::new(name).unwrap(), value)).collect()
        })
    }

    /// What a value is kept as, beyond what makes it equal to another.
    fn form(value: &Value) -> (std::mem::Discriminant<Value>, u8) {
        let scale = if let Value::Decimal(d) = value { d.scale() } else { 0 };
        (std::mem::discriminant(value), scale)
    }

    proptest! {
        #[test]
        fn parameters_round_trip_to_the_last_bit(params in any_params(), known in 0_usize..12) {
            let names = params.iter().take(known).map(|(name, _)| name.clone());
            let dictionary = Arc::new(Dictionary::of((1..).step_by(1_000).zip(names)));
            let (mut out, mut unknown) = (Vec::new(), 0);
            encode(&mut out, &params, &dictionary, &mut |_| unknown += 1);
            prop_assert!(unknown <= params.len().saturating_sub(known));
            let read = decode(&out, &mut Names::of(Arc::clone(&dictionary))).unwrap();
            if unknown < params.len() {
                prop_assert_eq!(decode(&out, &mut Names::default()), Err(UNNAMED));
            }
            prop_assert_eq!(&read, &params);
            for ((_, a), (_, b)) in read.iter().zip(&params) {
                prop_assert_eq!(form(a), form(b));
            }
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let _read = decode(&bytes, &mut Names::default());
            let _read = decode(&[&[FORMAT][..], &bytes].concat(), &mut Names::default());
        }

        #[test]
        fn what_is_cut_short_is_noticed(params in any_params(), at: prop::sample::Index) {
            let mut out = Vec::new();
            encode(&mut out, &params, &Dictionary::default(), &mut |_| {});
            let cut = &out[..at.index(out.len())];
            prop_assert!(decode(cut, &mut Names::default()).is_err());
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
        let mut read = &take_json(&mut Input(&out), 0).unwrap();
        while let Some(inner) = read.get(0) {
            read = inner;
        }
        assert!(read.as_str().unwrap().starts_with("[[["));
    }
}
