//! Numbers and coordinates in text, read exactly.

use super::value::Val;

/// The first place of `needle` in `bytes`, from `from` on.
pub(crate) fn find(bytes: &[u8], needle: &[u8], from: usize) -> Option<usize> {
    let rest = bytes.get(from..)?;
    let (first, more) = needle.split_first()?;
    if more.is_empty() {
        return rest.iter().position(|b| b == first).map(|at| from + at);
    }
    rest.windows(needle.len()).position(|w| w == needle).map(|at| from + at)
}

/// The number that `text` spells: sign, digits, point or comma, digits. Exact if it fits 64 bits and
/// 18 decimals; otherwise, and with an exponent, the nearest float.
pub(crate) fn number(text: &[u8]) -> Val {
    let text = text.trim_ascii();
    let (negative, digits) = sign(text);
    if let Some(short) = short_number(negative, digits) {
        return short;
    }
    let mut mantissa = 0_i128;
    let mut scale = None;
    let mut any = false;
    for &byte in digits {
        match byte {
            b'0'..=b'9' => {
                any = true;
                let next =
                    mantissa.checked_mul(10).and_then(|m| m.checked_add(i128::from(byte - b'0')));
                let Some(next) = next else { return float(text) };
                mantissa = next;
                scale = scale.map(|s: u32| s + 1);
            }
            b'.' | b',' if scale.is_none() => scale = Some(0),
            b'e' | b'E' if any => return float(text),
            _ => return Val::Invalid,
        }
    }
    if !any {
        return Val::Invalid;
    }
    let signed = if negative { -mantissa } else { mantissa };
    match Val::decimal(signed, scale.unwrap_or(0)) {
        Val::Invalid => float(text),
        exact => exact,
    }
}

/// The same for the usual case: few enough digits for 64 bits.
#[inline]
fn short_number(negative: bool, digits: &[u8]) -> Option<Val> {
    if digits.len() > 18 {
        return None;
    }
    let mut mantissa = 0_i64;
    let mut scale = None;
    let mut count = 0_u8;
    for &byte in digits {
        match byte {
            b'0'..=b'9' => {
                mantissa = mantissa * 10 + i64::from(byte - b'0');
                count += 1;
            }
            b'.' | b',' if scale.is_none() => scale = Some(count),
            _ => return None,
        }
    }
    let signed = if negative { -mantissa } else { mantissa };
    match scale.map(|before| count - before) {
        _ if count == 0 => None,
        None | Some(0) => Some(Val::Int(signed)),
        Some(scale) => fieldline_model::Decimal::new(signed, scale).map(Val::Dec),
    }
}

fn float(text: &[u8]) -> Val {
    let fits = |b: &u8| b.is_ascii_digit() || b"+-.,eE".contains(b);
    if text.len() > 400 || !text.iter().all(fits) {
        return Val::Invalid;
    }
    let text: String = text.iter().map(|b| if *b == b',' { '.' } else { char::from(*b) }).collect();
    text.parse().map_or(Val::Invalid, Val::float)
}

/// The whole number that `text` spells.
pub(crate) fn integer(text: &[u8]) -> Val {
    let (negative, digits) = sign(text.trim_ascii());
    if digits.is_empty() {
        return Val::Invalid;
    }
    let mut number = 0_i128;
    for byte in digits {
        if !byte.is_ascii_digit() {
            return Val::Invalid;
        }
        number = number * 10 + i128::from(byte - b'0');
        if number > i128::from(u64::MAX) {
            return Val::Invalid;
        }
    }
    Val::int(if negative { -number } else { number })
}

/// The number that hex digits spell, after an optional `0x`.
pub(crate) fn hex_number(text: &[u8]) -> Option<Val> {
    let text = text.trim_ascii();
    let digits = text.strip_prefix(b"0x").or_else(|| text.strip_prefix(b"0X")).unwrap_or(text);
    if digits.is_empty() {
        return None;
    }
    let mut number = 0_u64;
    for byte in digits {
        let digit = char::from(*byte).to_digit(16)?;
        number = number.checked_mul(16)?.checked_add(u64::from(digit))?;
    }
    Some(Val::uint(number))
}

fn sign(text: &[u8]) -> (bool, &[u8]) {
    match text {
        [b'-', rest @ ..] => (true, rest),
        [b'+', rest @ ..] => (false, rest),
        _ => (false, text),
    }
}

/// Degrees of `DDMM.MMMM` or `DDDMM.MMMM` and a letter of `NSEW`, rounded to seven decimals without
/// passing through floats. Minutes beyond 59 are taken as they are: devices send them.
pub(crate) fn coordinate(text: &[u8], hemisphere: &[u8]) -> Option<Val> {
    let (most, negative) = match hemisphere.trim_ascii() {
        b"N" | b"n" => (90, false),
        b"S" | b"s" => (90, true),
        b"E" | b"e" => (180, false),
        b"W" | b"w" => (180, true),
        _ => return None,
    };
    let text = text.trim_ascii();
    let point = text.iter().position(|b| *b == b'.' || *b == b',');
    let (whole, fraction) = match point {
        Some(at) => (text.get(..at)?, text.get(at + 1..)?),
        None => (text, &[][..]),
    };
    if whole.is_empty() || whole.len() > 9 {
        return None;
    }
    let mut number = 0_i64;
    for byte in whole {
        number = number * 10 + i64::from(byte.is_ascii_digit().then(|| byte - b'0')?);
    }
    let (degrees, minutes) = (number / 100, number % 100);
    let of_minutes = minutes_as_units(minutes, fraction)?;
    let units = degrees * 10_000_000 + of_minutes;
    if units > most * 10_000_000 {
        return None;
    }
    let units = if negative { -units } else { units };
    fieldline_model::Decimal::new(units, 7).map(Val::Dec)
}

/// Minutes and their decimals as ten-millionths of a degree, halves away from zero.
fn minutes_as_units(minutes: i64, fraction: &[u8]) -> Option<i64> {
    // One degree is 10^7 units; a minute is a sixtieth of it.
    if fraction.len() <= 9 {
        let (mut minutes, mut unit) = (minutes, 1_i64);
        for byte in fraction {
            minutes = minutes * 10 + i64::from(byte.is_ascii_digit().then(|| byte - b'0')?);
            unit *= 10;
        }
        return Some((minutes * 20_000_000 + 60 * unit) / (120 * unit));
    }
    let (mut minutes, mut unit) = (i128::from(minutes), 1_i128);
    for (at, byte) in fraction.iter().enumerate() {
        let digit = i128::from(byte.is_ascii_digit().then(|| byte - b'0')?);
        // Beyond 24 decimals nothing changes the seventh one of a degree.
        if at < 24 {
            minutes = minutes * 10 + digit;
            unit *= 10;
        }
    }
    i64::try_from((minutes * 20_000_000 + 60 * unit) / (120 * unit)).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shown(value: Val) -> String {
        value.to_string()
    }

    #[test]
    fn numbers_keep_their_digits() {
        for (text, read) in [
            ("79,8", "79.8"),
            ("-4.000", "-4.000"),
            ("+7", "7"),
            (".5", "0.5"),
            ("18446744073709551615", "18446744073709551615"),
            ("0.100000000000000000000", "0.100000000000000000"),
            ("1e3", "1000"),
            ("", "invalid"),
            ("-", "invalid"),
            ("1.2.3", "invalid"),
            ("nan", "invalid"),
            ("12a", "invalid"),
        ] {
            assert_eq!(shown(number(text.as_bytes())), read, "{text}");
        }
        assert_eq!(shown(integer(b"-9223372036854775808")), "-9223372036854775808");
        assert_eq!(shown(integer(b"18446744073709551616")), "invalid");
        assert_eq!(hex_number(b"0x9b0").map(shown), Some("2480".into()));
    }

    #[test]
    fn coordinates_are_exact_to_seven_decimals() {
        let degrees =
            |text: &str, letter: &str| coordinate(text.as_bytes(), letter.as_bytes()).map(shown);
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(degrees("5544.6025", "N"), some("55.7433750"));
        assert_eq!(degrees("15112.5000", "W"), some("-151.2083333"));
        assert_eq!(degrees("5364.0167", "N"), some("54.0669450"));
        assert_eq!(degrees("5429.681944502211763", "N"), some("54.4946991"));
        assert_eq!(degrees("9000.0001", "N"), None);
        assert_eq!(degrees("55x4.6025", "N"), None);
        assert_eq!(degrees("5544.6025", "X"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text: Vec<u8>, letter in "[NSEW]?") {
            let _read = (number(&text), integer(&text), hex_number(&text));
            let _degrees = coordinate(&text, letter.as_bytes());
        }

        #[test]
        fn whole_numbers_round_trip(n: i64) {
            prop_assert_eq!(shown(integer(n.to_string().as_bytes())), n.to_string());
            prop_assert_eq!(shown(number(n.to_string().as_bytes())), n.to_string());
        }
    }
}
