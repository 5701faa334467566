//! Instants: UTC microseconds inside, RFC 3339 outside.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// An instant in microseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(i64);

/// The text was not a time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a time: expected RFC 3339 (2026-11-20T10:00:00Z) or Unix seconds (1795168800)"
)]
pub struct TimeError {
    text: String,
}

impl Timestamp {
    /// The earliest instant that fits.
    pub const MIN: Self = Self(i64::MIN);
    /// The latest instant that fits.
    pub const MAX: Self = Self(i64::MAX);

    /// From microseconds since 1970.
    #[must_use]
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// From milliseconds since 1970, saturating.
    #[must_use]
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis.saturating_mul(1_000))
    }

    /// From seconds since 1970, saturating.
    #[must_use]
    pub const fn from_seconds(seconds: i64) -> Self {
        Self(seconds.saturating_mul(1_000_000))
    }

    /// Microseconds since 1970.
    #[must_use]
    pub const fn as_micros(self) -> i64 {
        self.0
    }

    /// Whole seconds since 1970, rounded down.
    #[must_use]
    pub const fn as_seconds(self) -> i64 {
        self.0.div_euclid(1_000_000)
    }

    /// This instant moved by `micros`, saturating.
    #[must_use]
    pub const fn plus_micros(self, micros: i64) -> Self {
        Self(self.0.saturating_add(micros))
    }

    /// Microseconds from `earlier` to this instant, saturating; negative if it is later.
    #[must_use]
    pub const fn micros_since(self, earlier: Self) -> i64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_microsecond(self.0) {
            Ok(instant) => fmt::Display::fmt(&instant, f),
            // Beyond the year 9999 there is no RFC 3339 form.
            Err(_) => write!(f, "{}", self.as_seconds()),
        }
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Timestamp {
    type Err = TimeError;

    /// Reads RFC 3339, or Unix seconds with an optional fraction.
    fn from_str(text: &str) -> Result<Self, TimeError> {
        let wrong = || TimeError { text: text.chars().take(64).collect() };
        if let Ok(seconds) = text.parse::<i64>() {
            return Ok(Self::from_seconds(seconds));
        }
        if let Some((whole, fraction)) = text.split_once('.')
            && !fraction.is_empty()
            && fraction.bytes().all(|b| b.is_ascii_digit())
            && let Ok(seconds) = whole.parse::<i64>()
        {
            let digits: String = fraction.chars().chain("000000".chars()).take(6).collect();
            let micros = digits.parse::<i64>().map_err(|_| wrong())?;
            let sign = if whole.starts_with('-') { -1 } else { 1 };
            return Ok(Self::from_seconds(seconds).plus_micros(sign * micros));
        }
        let instant: jiff::Timestamp = text.parse().map_err(|_| wrong())?;
        Ok(Self(instant.as_microsecond()))
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    /// Accepts RFC 3339 text, or a number of Unix seconds.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::String(text) => text.parse().map_err(de::Error::custom),
            serde_json::Value::Number(number) => {
                number.to_string().parse().map_err(de::Error::custom)
            }
            other => Err(de::Error::custom(format!("expected a time, found {other}"))),
        }
    }
}

#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for Timestamp {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::Type::String)
            .format(Some(utoipa::openapi::SchemaFormat::KnownFormat(
                utoipa::openapi::KnownFormat::DateTime,
            )))
            .into()
    }
}

#[cfg(feature = "openapi")]
impl utoipa::ToSchema for Timestamp {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn text_round_trips(micros in -62_000_000_000_000_000_i64..250_000_000_000_000_000) {
            let at = Timestamp::from_micros(micros);
            prop_assert_eq!(at, at.to_string().parse().unwrap());
        }
    }

    #[test]
    fn seconds_and_fractions_are_read() {
        assert_eq!("1.5".parse::<Timestamp>().unwrap().as_micros(), 1_500_000);
        assert_eq!("-1.5".parse::<Timestamp>().unwrap().as_micros(), -1_500_000);
        assert_eq!("1700000000".parse::<Timestamp>().unwrap().as_seconds(), 1_700_000_000);
        assert!("soon".parse::<Timestamp>().is_err());
    }
}
