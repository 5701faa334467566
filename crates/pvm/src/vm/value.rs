//! Values in the machine: cheap to copy, text and bytes mostly as places in the frame.

use std::fmt;
use std::sync::Arc;

use fieldline_model::{Decimal, Value};

/// A value in a register.
#[derive(Clone, Debug, Default)]
pub(crate) enum Val {
    /// Absent.
    #[default]
    Null,
    /// What a conversion or calculation gives that has no result.
    Invalid,
    Bool(bool),
    Int(i64),
    /// Above `i64::MAX`.
    Uint(u64),
    Dec(Decimal),
    Float(f64),
    /// Microseconds since 1970.
    Time(i64),
    /// Bytes of the frame or of a derived buffer.
    Part(Part),
    Text(Arc<str>),
    Bytes(Arc<[u8]>),
    Json(Arc<serde_json::Value>),
}

/// The buffer that holds the program's constant texts and bytes.
pub(crate) const POOL: u16 = u16::MAX;

/// A range of a buffer: 0 is the input, from the frame's first byte; [`POOL`] the program's
/// constants; others are derived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) buffer: u16,
    pub(crate) text: bool,
    pub(crate) start: u32,
    pub(crate) end: u32,
}

impl Val {
    /// A whole number that may be above `i64::MAX`.
    pub(crate) fn uint(n: u64) -> Self {
        i64::try_from(n).map_or(Self::Uint(n), Self::Int)
    }

    /// A whole number, or [`Val::Invalid`] beyond 64 bits.
    pub(crate) fn int(n: i128) -> Self {
        match i64::try_from(n) {
            Ok(n) => Self::Int(n),
            Err(_) => u64::try_from(n).map_or(Self::Invalid, Self::Uint),
        }
    }

    /// `mantissa × 10^-scale`, or [`Val::Invalid`] if it does not fit.
    pub(crate) fn decimal(mut mantissa: i128, mut scale: u32) -> Self {
        while scale > 0 && (scale > 18 || i64::try_from(mantissa).is_err()) && mantissa % 10 == 0 {
            mantissa /= 10;
            scale -= 1;
        }
        if scale == 0 {
            return Self::int(mantissa);
        }
        let decimal = i64::try_from(mantissa).ok().zip(u8::try_from(scale).ok());
        decimal.and_then(|(m, s)| Decimal::new(m, s)).map_or(Self::Invalid, Self::Dec)
    }

    pub(crate) fn float(x: f64) -> Self {
        if x.is_finite() { Self::Float(x) } else { Self::Invalid }
    }

    /// The value as a whole number.
    pub(crate) fn as_int(&self) -> Option<i128> {
        match self {
            Self::Int(n) => Some(i128::from(*n)),
            Self::Uint(n) => Some(i128::from(*n)),
            Self::Dec(d) => d.rescale(0).map(|d| i128::from(d.mantissa())),
            _ => None,
        }
    }

    /// The value as mantissa and scale, if it is an exact number.
    pub(crate) fn as_scaled(&self) -> Option<(i128, u32)> {
        match self {
            Self::Int(n) => Some((i128::from(*n), 0)),
            Self::Uint(n) => Some((i128::from(*n), 0)),
            Self::Dec(d) => Some((i128::from(d.mantissa()), u32::from(d.scale()))),
            _ => None,
        }
    }

    #[allow(clippy::cast_precision_loss, reason = "the nearest f64 is what is asked for")]
    pub(crate) fn as_float(&self) -> Option<f64> {
        match self {
            Self::Int(n) => Some(*n as f64),
            Self::Uint(n) => Some(*n as f64),
            Self::Dec(d) => Some(d.to_f64()),
            Self::Float(x) => Some(*x),
            _ => None,
        }
    }
}

impl From<&Value> for Val {
    fn from(value: &Value) -> Self {
        match value {
            Value::Bool(b) => Self::Bool(*b),
            Value::Int(n) => Self::Int(*n),
            Value::Uint(n) => Self::Uint(*n),
            Value::Decimal(d) => Self::Dec(*d),
            Value::Float(x) => Self::float(*x),
            Value::Text(text) => Self::Text(Arc::clone(text)),
            Value::Bytes(bytes) => Self::Bytes(Arc::clone(bytes)),
            Value::Json(json) => Self::Json(Arc::clone(json)),
        }
    }
}

impl fmt::Display for Val {
    /// As a program writes it; for listings.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Invalid => f.write_str("invalid"),
            Self::Bool(b) => write!(f, "{b}"),
            Self::Int(n) => write!(f, "{n}"),
            Self::Uint(n) => write!(f, "{n}"),
            Self::Dec(d) => write!(f, "{d}"),
            Self::Float(x) => write!(f, "{x}"),
            Self::Time(at) => write!(f, "@{}", fieldline_model::Timestamp::from_micros(*at)),
            Self::Part(part) => write!(f, "bytes {}..{}", part.start, part.end),
            Self::Text(text) => write!(f, "{text:?}"),
            Self::Bytes(bytes) => write!(f, "x\"{}\"", fieldline_model::value::to_hex(bytes)),
            Self::Json(json) => write!(f, "{json}"),
        }
    }
}
