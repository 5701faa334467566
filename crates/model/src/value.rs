//! Values of parameters. Numbers that a device sent exactly stay exact.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number with a known count of decimals: `mantissa × 10^-scale`.
///
/// Equality is numeric (`1.50 == 1.5`).
#[derive(Clone, Copy)]
pub struct Decimal {
    mantissa: i64,
    scale: u8,
}

impl Decimal {
    /// Most decimals that a number may have; more do not fit 64 bits.
    pub const SCALE_MAX: u8 = 18;

    /// `mantissa × 10^-scale`; `None` if `scale` is above [`Self::SCALE_MAX`].
    #[must_use]
    pub const fn new(mantissa: i64, scale: u8) -> Option<Self> {
        if scale > Self::SCALE_MAX { None } else { Some(Self { mantissa, scale }) }
    }

    /// The scaled integer.
    #[must_use]
    pub const fn mantissa(self) -> i64 {
        self.mantissa
    }

    /// Count of decimals.
    #[must_use]
    pub const fn scale(self) -> u8 {
        self.scale
    }

    /// The same number with `scale` decimals, if it has no more and fits.
    #[must_use]
    pub fn rescale(self, scale: u8) -> Option<Self> {
        if scale > Self::SCALE_MAX {
            return None;
        }
        if scale >= self.scale {
            let mantissa = self.mantissa.checked_mul(pow10(scale - self.scale))?;
            return Some(Self { mantissa, scale });
        }
        let divisor = pow10(self.scale - scale);
        (self.mantissa % divisor == 0).then(|| Self { mantissa: self.mantissa / divisor, scale })
    }

    /// The number rounded half away from zero to `scale` decimals.
    ///
    /// Returns the number itself where it has no more decimals than that.
    #[must_use]
    pub fn round(self, scale: u8) -> Self {
        if scale >= self.scale {
            return self;
        }
        let divisor = pow10(self.scale - scale);
        let (whole, rest) = (self.mantissa / divisor, self.mantissa % divisor);
        let up = i64::from(rest.unsigned_abs() * 2 >= divisor.unsigned_abs());
        Self { mantissa: whole + up * self.mantissa.signum(), scale }
    }

    /// The nearest `f64`.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "the nearest f64 is what is asked for")]
    pub fn to_f64(self) -> f64 {
        self.mantissa as f64 / pow10(self.scale) as f64
    }

    /// Reads plain decimal text: `-12.50`, `.5`, `7`. No exponent, no spaces.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (negative, digits) = match text.as_bytes() {
            [b'-', ..] => (true, text.get(1..)?),
            [b'+', ..] => (false, text.get(1..)?),
            _ => (false, text),
        };
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let scale = u8::try_from(fraction.len()).ok().filter(|s| *s <= Self::SCALE_MAX)?;
        let mut mantissa = 0_i64;
        for byte in whole.bytes().chain(fraction.bytes()) {
            if !byte.is_ascii_digit() {
                return None;
            }
            mantissa = mantissa.checked_mul(10)?.checked_sub(i64::from(byte - b'0'))?;
        }
        let mantissa = if negative { mantissa } else { mantissa.checked_neg()? };
        Some(Self { mantissa, scale })
    }

    /// The decimal of at most `scale` decimals whose `f64` is `number`, if there is one.
    #[must_use]
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        reason = "checked by the comparison after it"
    )]
    pub fn from_f64(number: f64, scale: u8) -> Option<Self> {
        if scale > Self::SCALE_MAX {
            return None;
        }
        let scaled = (number * pow10(scale) as f64).round();
        // 2^53: beyond it neighbours are further apart than one unit.
        if !scaled.is_finite() || scaled.abs() > 9_007_199_254_740_992.0 {
            return None;
        }
        let decimal = Self { mantissa: scaled as i64, scale };
        (decimal.to_f64() == number).then_some(decimal)
    }

    /// The number without trailing zeros after the point.
    #[must_use]
    pub fn normalize(mut self) -> Self {
        while self.scale > 0 && self.mantissa % 10 == 0 {
            self.mantissa /= 10;
            self.scale -= 1;
        }
        self
    }
}

/// 10^`exponent`, for exponents up to 18.
const fn pow10(exponent: u8) -> i64 {
    10_i64.pow(if exponent > 18 { 18 } else { exponent as u32 })
}

impl PartialEq for Decimal {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Decimal {}

impl PartialOrd for Decimal {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Decimal {
    fn cmp(&self, other: &Self) -> Ordering {
        let left = i128::from(self.mantissa) * i128::from(pow10(other.scale));
        let right = i128::from(other.mantissa) * i128::from(pow10(self.scale));
        left.cmp(&right)
    }
}

impl fmt::Display for Decimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.scale == 0 {
            return write!(f, "{}", self.mantissa);
        }
        let divisor = pow10(self.scale).unsigned_abs();
        let magnitude = self.mantissa.unsigned_abs();
        let sign = if self.mantissa < 0 { "-" } else { "" };
        let width = usize::from(self.scale);
        write!(f, "{sign}{}.{:0width$}", magnitude / divisor, magnitude % divisor)
    }
}

impl fmt::Debug for Decimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A parameter's value.
///
/// Clones are cheap: long contents are shared.
#[derive(Clone, Debug)]
pub enum Value {
    /// True or false.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A whole number above `i64::MAX`; smaller ones are always [`Value::Int`].
    Uint(u64),
    /// A number of known decimals.
    Decimal(Decimal),
    /// A number whose decimals are unknown. Never NaN or infinite.
    Float(f64),
    /// Text.
    Text(Arc<str>),
    /// Bytes; lower-case hex digits in JSON.
    Bytes(Arc<[u8]>),
    /// An array or object.
    Json(Arc<serde_json::Value>),
}

impl Value {
    /// A float, or `None` for NaN and the infinities, which no store or JSON can hold.
    #[must_use]
    pub fn float(number: f64) -> Option<Self> {
        number.is_finite().then_some(Self::Float(number))
    }

    /// `mantissa × 10^-scale`; whole when `scale` is 0.
    #[must_use]
    pub fn scaled(mantissa: i64, scale: u8) -> Option<Self> {
        match scale {
            0 => Some(Self::Int(mantissa)),
            _ => Decimal::new(mantissa, scale).map(Self::Decimal),
        }
    }

    /// The value as a float, if it is a number.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "the nearest f64 is what is asked for")]
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Int(n) => Some(*n as f64),
            Self::Uint(n) => Some(*n as f64),
            Self::Decimal(d) => Some(d.to_f64()),
            Self::Float(x) => Some(*x),
            _ => None,
        }
    }

    /// The value as a whole number, if it is one.
    #[must_use]
    pub fn as_i64(&self) -> Option<i64> {
        match self {
            Self::Int(n) => Some(*n),
            Self::Decimal(d) => d.rescale(0).map(Decimal::mantissa),
            _ => None,
        }
    }

    /// The text, if the value is text.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Bytes that its content takes beyond the value itself; what size limits count.
    #[must_use]
    pub fn heap_bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Bytes(bytes) => bytes.len(),
            Self::Json(json) => json_bytes(json),
            _ => 0,
        }
    }

    /// Appends the value as JSON text, every digit kept.
    pub fn write_json(&self, out: &mut String) {
        use fmt::Write as _;
        // Writing to a String cannot fail.
        let written = match self {
            Self::Bool(b) => write!(out, "{b}"),
            Self::Int(n) => write!(out, "{n}"),
            Self::Uint(n) => write!(out, "{n}"),
            Self::Decimal(d) => write!(out, "{}", d.normalize()),
            Self::Float(x) => write!(out, "{}", serde_json::Value::from(*x)),
            Self::Text(text) => write!(out, "{}", serde_json::Value::from(&**text)),
            Self::Bytes(bytes) => {
                out.push('"');
                hex_into(bytes, out);
                out.push('"');
                Ok(())
            }
            Self::Json(json) => write!(out, "{json}"),
        };
        debug_assert!(written.is_ok());
    }

    /// The value as a JSON tree. Decimals beyond 15 digits lose the last ones:
    /// where exactness matters, use [`Value::write_json`].
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        match self {
            Self::Bool(b) => (*b).into(),
            Self::Int(n) => (*n).into(),
            Self::Uint(n) => (*n).into(),
            Self::Decimal(d) => match d.normalize() {
                whole if whole.scale == 0 => whole.mantissa.into(),
                other => other.to_f64().into(),
            },
            Self::Float(x) => (*x).into(),
            Self::Text(text) => (&**text).into(),
            Self::Bytes(bytes) => to_hex(bytes).into(),
            Self::Json(json) => (**json).clone(),
        }
    }

    /// The value of a JSON tree: numbers written with a point become decimals.
    /// `None` for `null`, which means absent, and for numbers that do not fit.
    #[must_use]
    pub fn from_json(json: serde_json::Value) -> Option<Self> {
        Some(match json {
            serde_json::Value::Null => return None,
            serde_json::Value::Bool(b) => Self::Bool(b),
            serde_json::Value::Number(n) => match (n.as_i64(), n.as_u64()) {
                (Some(n), _) => Self::Int(n),
                (_, Some(n)) => Self::Uint(n),
                _ => match Decimal::parse(&n.to_string()) {
                    Some(decimal) => Self::Decimal(decimal),
                    None => Self::float(n.as_f64()?)?,
                },
            },
            serde_json::Value::String(text) => Self::Text(text.into()),
            tree => Self::Json(Arc::new(tree)),
        })
    }
}

fn json_bytes(json: &serde_json::Value) -> usize {
    match json {
        serde_json::Value::String(text) => text.len(),
        serde_json::Value::Array(items) => items.iter().map(|i| 16 + json_bytes(i)).sum(),
        serde_json::Value::Object(map) => {
            map.iter().map(|(k, v)| 16 + k.len() + json_bytes(v)).sum()
        }
        _ => 8,
    }
}

/// Lower-case hex digits of `bytes`.
#[must_use]
pub fn to_hex(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len() * 2);
    hex_into(bytes, &mut out);
    out
}

fn hex_into(bytes: &[u8], out: &mut String) {
    for byte in bytes {
        for nibble in [byte >> 4, byte & 15] {
            out.push(char::from_digit(u32::from(nibble), 16).unwrap_or('0'));
        }
    }
}

/// Bytes of hex digits, spaces and line breaks between them allowed; `None` where a digit is not one
/// or their count is odd.
#[must_use]
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let mut nibbles =
        text.bytes().filter(|b| !b.is_ascii_whitespace()).map(|b| char::from(b).to_digit(16));
    let mut out = Vec::with_capacity(text.len() / 2);
    while let Some(high) = nibbles.next() {
        out.push(u8::try_from(high? * 16 + nibbles.next()??).ok()?);
    }
    Some(out)
}

impl PartialEq for Value {
    /// Numbers are equal by value, whatever they are kept as; floats by their bits.
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Bool(a), Self::Bool(b)) => a == b,
            (Self::Int(a), Self::Int(b)) => a == b,
            (Self::Uint(a), Self::Uint(b)) => a == b,
            (Self::Decimal(a), Self::Decimal(b)) => a == b,
            (Self::Int(a), Self::Decimal(b)) | (Self::Decimal(b), Self::Int(a)) => {
                b.rescale(0).is_some_and(|b| b.mantissa == *a)
            }
            (Self::Float(a), Self::Float(b)) => a.to_bits() == b.to_bits(),
            (Self::Text(a), Self::Text(b)) => a == b,
            (Self::Bytes(a), Self::Bytes(b)) => a == b,
            (Self::Json(a), Self::Json(b)) => a == b,
            _ => false,
        }
    }
}

impl From<bool> for Value {
    fn from(b: bool) -> Self {
        Self::Bool(b)
    }
}

impl From<i64> for Value {
    fn from(n: i64) -> Self {
        Self::Int(n)
    }
}

impl From<u64> for Value {
    fn from(n: u64) -> Self {
        i64::try_from(n).map_or(Self::Uint(n), Self::Int)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text.into())
    }
}

impl From<&[u8]> for Value {
    fn from(bytes: &[u8]) -> Self {
        Self::Bytes(bytes.into())
    }
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_json().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = serde_json::Value::deserialize(deserializer)?;
        Self::from_json(json).ok_or_else(|| {
            serde::de::Error::custom("expected a value, found null or a number out of range")
        })
    }
}

#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for Value {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::SchemaType::AnyValue)
            .description(Some("boolean, number, text, hex digits of bytes, array or object"))
            .into()
    }
}

#[cfg(feature = "openapi")]
impl utoipa::ToSchema for Value {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn decimal_text_round_trips(mantissa: i64, scale in 0_u8..=18) {
            let decimal = Decimal::new(mantissa, scale).unwrap();
            let read = Decimal::parse(&decimal.to_string());
            prop_assert_eq!(read.map(|d| (d.mantissa, d.scale)), Some((mantissa, scale)));
        }

        #[test]
        fn parsing_any_text_never_panics(text in ".{0,40}") {
            let _parsed = (Decimal::parse(&text), from_hex(&text));
        }

        #[test]
        fn json_text_keeps_every_digit(mantissa: i64, scale in 1_u8..=18) {
            let mut text = String::new();
            Value::scaled(mantissa, scale).unwrap().write_json(&mut text);
            prop_assert_eq!(Decimal::parse(&text), Decimal::new(mantissa, scale));
        }

        #[test]
        fn hex_round_trips(bytes: Vec<u8>) {
            prop_assert_eq!(from_hex(&to_hex(&bytes)), Some(bytes));
        }
    }

    #[test]
    fn rounding_is_half_away_from_zero() {
        let round = |text: &str| Decimal::parse(text).unwrap().round(1).to_string();
        assert_eq!(
            [round("0.25"), round("-0.25"), round("0.24"), round("9.96")],
            ["0.3", "-0.3", "0.2", "10.0"]
        );
    }

    #[test]
    fn floats_on_the_decimal_grid_become_decimals() {
        assert_eq!(Decimal::from_f64(12.8, 3).map(|d| d.mantissa()), Some(12_800));
        assert_eq!(Decimal::from_f64(1.0 / 3.0, 3), None);
    }
}
