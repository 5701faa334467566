//! Parameters: their names, what is declared of them, and the sets that messages carry.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{Decimal, Value};

/// A parameter's name: dotted, from general to specific (`position.latitude`).
///
/// Names that devices make up (Wialon IPS `name:type:value`) may hold any
/// characters but control characters; names that we declare are lower case.
/// Clones share the text.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParamName(Arc<str>);

/// The text is no parameter name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a parameter name has 1 to {} bytes and no control characters", ParamName::BYTES_MAX)]
pub struct ParamNameError;

impl ParamName {
    /// Longest name, in bytes.
    pub const BYTES_MAX: usize = 128;

    /// Checks and takes `name`.
    ///
    /// # Errors
    ///
    /// If it is empty, longer than [`Self::BYTES_MAX`] or holds control characters.
    pub fn new(name: impl Into<Arc<str>> + AsRef<str>) -> Result<Self, ParamNameError> {
        let text = name.as_ref();
        let fits = (1..=Self::BYTES_MAX).contains(&text.len());
        if !fits || text.chars().any(char::is_control) {
            return Err(ParamNameError);
        }
        Ok(Self(name.into()))
    }

    /// The name's text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether both are clones of one name: cheaper than comparing text, and
    /// false does not mean different.
    #[must_use]
    pub fn same_text(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Display for ParamName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ParamName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Borrow<str> for ParamName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl Serialize for ParamName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for ParamName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

/// The parameters of one message, in the order they were set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Params(Vec<(ParamName, Value)>);

impl Params {
    /// No parameters.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// No parameters, with room for `count`.
    #[must_use]
    pub fn with_capacity(count: usize) -> Self {
        Self(Vec::with_capacity(count))
    }

    /// Appends without looking for an earlier value of `name`; [`Params::dedup`] settles those.
    pub fn push(&mut self, name: ParamName, value: Value) {
        self.0.push((name, value));
    }

    /// Sets `name`, replacing an earlier value in its place.
    pub fn set(&mut self, name: ParamName, value: Value) {
        match self.0.iter_mut().find(|(n, _)| *n == name) {
            Some(slot) => slot.1 = value,
            None => self.0.push((name, value)),
        }
    }

    /// The value of `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|(n, _)| n.as_str() == name).map(|(_, v)| v)
    }

    /// Takes `name` out.
    pub fn remove(&mut self, name: &str) -> Option<Value> {
        let at = self.0.iter().position(|(n, _)| n.as_str() == name)?;
        Some(self.0.remove(at).1)
    }

    /// Keeps the last value of each name, in the place of the first.
    pub fn dedup(&mut self) {
        // Small sets are compared pairwise: no allocation, and pointers mostly decide.
        if self.0.len() > 64 {
            let mut places: HashMap<ParamName, usize> = HashMap::with_capacity(self.0.len());
            let mut kept: Vec<(ParamName, Value)> = Vec::with_capacity(self.0.len());
            for (name, value) in self.0.drain(..) {
                match places.get(&name).and_then(|at| kept.get_mut(*at)) {
                    Some(slot) => slot.1 = value,
                    None => {
                        places.insert(name.clone(), kept.len());
                        kept.push((name, value));
                    }
                }
            }
            self.0 = kept;
            return;
        }
        let mut at = 1;
        while at < self.0.len() {
            let (before, rest) = self.0.split_at_mut(at);
            let Some((name, value)) = rest.first_mut() else { break };
            match before.iter_mut().find(|(n, _)| n.same_text(name) || n == name) {
                Some(slot) => {
                    std::mem::swap(&mut slot.1, value);
                    self.0.remove(at);
                }
                None => at += 1,
            }
        }
    }

    /// Count of parameters.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Names and values in order.
    pub fn iter(&self) -> std::slice::Iter<'_, (ParamName, Value)> {
        self.0.iter()
    }

    /// Names and values in order, values changeable.
    pub fn iter_mut(&mut self) -> std::slice::IterMut<'_, (ParamName, Value)> {
        self.0.iter_mut()
    }

    /// Bytes of all names and contents: what the limit on a message's size counts.
    #[must_use]
    pub fn content_bytes(&self) -> usize {
        self.0.iter().map(|(n, v)| n.as_str().len() + 8 + v.heap_bytes()).sum()
    }

    /// Appends the parameters as members of a JSON object, without braces: `"a":1,"b":2`.
    pub fn write_json_members(&self, out: &mut String) {
        for (at, (name, value)) in self.0.iter().enumerate() {
            if at > 0 {
                out.push(',');
            }
            out.push_str(&serde_json::Value::from(name.as_str()).to_string());
            out.push(':');
            value.write_json(out);
        }
    }
}

impl FromIterator<(ParamName, Value)> for Params {
    fn from_iter<I: IntoIterator<Item = (ParamName, Value)>>(iter: I) -> Self {
        Self(iter.into_iter().collect())
    }
}

impl IntoIterator for Params {
    type Item = (ParamName, Value);
    type IntoIter = std::vec::IntoIter<(ParamName, Value)>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'a> IntoIterator for &'a Params {
    type Item = &'a (ParamName, Value);
    type IntoIter = std::slice::Iter<'a, (ParamName, Value)>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl Serialize for Params {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(n, v)| (n, v)))
    }
}

impl<'de> Deserialize<'de> for Params {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let map = serde_json::Map::deserialize(deserializer)?;
        let mut params = Self::with_capacity(map.len());
        for (name, json) in map {
            let name = ParamName::new(name).map_err(de::Error::custom)?;
            if let Some(value) = Value::from_json(json) {
                params.push(name, value);
            }
        }
        Ok(params)
    }
}

#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for Params {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .additional_properties(Some(<Value as utoipa::PartialSchema>::schema()))
            .description(Some("values by parameter name"))
            .into()
    }
}

#[cfg(feature = "openapi")]
impl utoipa::ToSchema for Params {}

#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for ParamName {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::Type::String)
            .into()
    }
}

#[cfg(feature = "openapi")]
impl utoipa::ToSchema for ParamName {}

/// What kind of value a parameter has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum ParamKind {
    /// True or false.
    Bool,
    /// A whole number.
    Int,
    /// A number of declared decimals.
    Decimal,
    /// A number of unknown decimals.
    Float,
    /// Text.
    Text,
    /// Bytes.
    Bytes,
    /// An array or object.
    Json,
}

/// What is declared of a parameter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ParamSpec {
    /// Its name.
    pub name: ParamName,
    /// Kind of its values.
    pub kind: ParamKind,
    /// Significant bits of a whole number, or 0 if not declared.
    #[serde(default)]
    pub bits: u8,
    /// Decimals of a [`ParamKind::Decimal`].
    #[serde(default)]
    pub decimals: u8,
    /// Unit by UCUM (`km/h`, `Cel`, `mV`), empty if it has none.
    #[serde(default)]
    pub unit: String,
    /// Title for people.
    #[serde(default)]
    pub title: String,
    /// What it means.
    #[serde(default)]
    pub description: String,
}

impl ParamSpec {
    /// The value in the declared kind, exactly, or `None` if it has none there.
    ///
    /// A decimal of more decimals than declared is rounded: the declaration
    /// says how many of them mean something.
    #[must_use]
    pub fn conform(&self, value: &Value) -> Option<Value> {
        match (self.kind, value) {
            (ParamKind::Decimal, Value::Int(n)) => {
                Decimal::new(*n, 0)?.rescale(self.decimals).map(Value::Decimal)
            }
            (ParamKind::Decimal, Value::Decimal(d)) => {
                d.round(self.decimals).rescale(self.decimals).map(Value::Decimal)
            }
            (ParamKind::Decimal, Value::Float(x)) => {
                // A float is rounded to the grid: beyond the declared decimals it holds noise.
                let factor = 10_f64.powi(i32::from(self.decimals));
                Decimal::from_f64((x * factor).round() / factor, self.decimals).map(Value::Decimal)
            }
            (ParamKind::Int, Value::Int(_) | Value::Uint(_)) => Some(value.clone()),
            (ParamKind::Int, Value::Decimal(_)) => value.as_i64().map(Value::Int),
            (ParamKind::Bool, Value::Int(n @ (0 | 1))) => Some(Value::Bool(*n == 1)),
            (ParamKind::Bool, Value::Bool(_))
            | (ParamKind::Float, Value::Float(_))
            | (ParamKind::Text, Value::Text(_))
            | (ParamKind::Bytes, Value::Bytes(_))
            | (ParamKind::Json, _) => Some(value.clone()),
            (ParamKind::Float, Value::Int(_) | Value::Uint(_) | Value::Decimal(_)) => {
                value.as_f64().map(Value::Float)
            }
            _ => None,
        }
    }
}

/// The parameters that are declared for an account: the built-in dictionary and its own.
#[derive(Clone, Debug, Default)]
pub struct Schema {
    specs: HashMap<ParamName, Arc<ParamSpec>>,
}

impl Schema {
    /// The built-in dictionary, then `own`, which replaces what it names again.
    #[must_use]
    pub fn with_dictionary(own: impl IntoIterator<Item = ParamSpec>) -> Self {
        let built_in = crate::dictionary::dictionary().iter().cloned();
        let own = own.into_iter().map(Arc::new);
        Self { specs: built_in.chain(own).map(|spec| (spec.name.clone(), spec)).collect() }
    }

    /// The declaration of `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Arc<ParamSpec>> {
        self.specs.get(name)
    }

    /// All declarations, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<ParamSpec>> {
        self.specs.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ParamName {
        ParamName::new(text).unwrap()
    }

    #[test]
    fn the_last_value_of_a_name_stays_in_the_first_place() {
        for count in [3, 100] {
            let mut params: Params = (0..count)
                .flat_map(|n| [(name(&format!("p{}", n % (count - 1))), Value::Int(n))])
                .collect();
            params.dedup();
            assert_eq!(params.len(), usize::try_from(count - 1).unwrap());
            assert_eq!(params.iter().next().unwrap(), &(name("p0"), Value::Int(count - 1)));
        }
    }

    #[test]
    fn declared_decimals_are_kept_exactly() {
        let schema = Schema::with_dictionary([]);
        let spec = schema.get("position.latitude").unwrap();
        let exact = spec.conform(&Value::Decimal(Decimal::parse("54.7146368").unwrap()));
        assert_eq!(exact, Some(Value::Decimal(Decimal::parse("54.7146368").unwrap())));
        assert_eq!(spec.conform(&Value::from("north")), None);
    }

    #[test]
    fn wrong_names_are_refused() {
        assert!(ParamName::new("a\nb").is_err() && ParamName::new("").is_err());
        assert!(ParamName::new("x".repeat(129)).is_err());
        assert!(ParamName::new("Батарея").is_ok());
    }
}
