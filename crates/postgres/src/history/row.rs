//! Parameters as the bytes of one column, exactly: `[format][count]`, then for each its name, the kind of
//! its value, the decimals of a decimal, and the value. A name is its number in the [`Dictionary`], or 0 and
//! its text: a tracker's message has three times as many bytes of names as of values. Nothing here trusts a
//! length.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

pub use fieldline_model::codec::Damage;
pub(crate) use fieldline_model::codec::{
    Input, PARTS_MAX, put_bytes, put_signed, put_tagged, put_varint, take_tagged,
};
use fieldline_model::{ParamName, Params};

/// The format that is written, and the only one that is read: rows of format 1 were made by no released
/// version. A change of the encoding takes another number and keeps reading this one.
const FORMAT: u8 = 2;

/// What is said of bytes that a newer program wrote: they are whole, and not ours to replace.
pub(crate) const NEWER: Damage = Damage("the format is unknown: a newer program wrote it");

/// Reads the byte that says the format.
pub(crate) fn take_format(input: &mut Input<'_>, present: u8) -> Result<(), Damage> {
    match input.u8()? {
        found if found == present => Ok(()),
        found if found > present => Err(NEWER),
        _ => Err(Damage("the format is one that no released program wrote")),
    }
}

/// Most names that a [`Names`] remembers.
const NAMES_MAX: usize = 4_096;

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
        put_tagged(out, value);
    }
}

/// Reads what [`encode`] made.
///
/// # Errors
///
/// If it made no such bytes.
pub fn decode(bytes: &[u8], names: &mut Names) -> Result<Params, Damage> {
    let mut input = Input(bytes);
    take_format(&mut input, FORMAT)?;
    let count = input.count()?;
    let mut params = Params::with_capacity(count.min(1_024));
    let mut parts = PARTS_MAX;
    for _ in 0..count {
        let name = names.take(&mut input)?;
        params.push(name, take_tagged(&mut input, &mut parts)?);
    }
    if input.is_empty() { Ok(params) } else { Err(Damage("bytes are left after the message")) }
}

#[cfg(test)]
mod tests {
    use fieldline_model::{Decimal, Value};
    use proptest::prelude::*;

    use super::*;

    /// The codec has its own properties: here a few of each kind are enough.
    fn any_value() -> impl Strategy<Value = Value> {
        prop_oneof![
            any::<bool>().prop_map(Value::Bool),
            any::<i64>().prop_map(Value::Int),
            (any::<i64>(), 0_u8..=18)
                .prop_map(|(m, s)| Value::Decimal(Decimal::new(m, s).unwrap())),
            any::<u64>().prop_map(|bits| Value::Float(f64::from_bits(bits))),
            ".{0,20}".prop_map(Value::from),
            any::<Vec<u8>>().prop_map(|b| Value::from(&b[..])),
            any::<i64>().prop_map(|n| Value::Json(Arc::new(serde_json::json!({"a": [n]})))),
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
    fn a_row_of_another_format_is_named_as_such() {
        let mut out = Vec::new();
        let params = [(ParamName::new("n").unwrap(), Value::Int(1))].into_iter().collect();
        encode(&mut out, &params, &Dictionary::default(), &mut |_| {});
        assert_eq!(out, [2, 1, 0, 1, b'n', 1, 2]);
        out[0] = 3;
        assert_eq!(decode(&out, &mut Names::default()), Err(NEWER));
        out[0] = 1;
        let older = decode(&out, &mut Names::default()).unwrap_err();
        assert!(older.to_string().contains("no released program"), "{older}");
    }
}
