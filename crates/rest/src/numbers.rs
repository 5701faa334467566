//! Numbers of published messages, with the digits they were sent with.
//!
//! The JSON parser keeps numbers as 64-bit integers or floats. What has more
//! digits is read here from the text itself, or refused: never stored as another number.

use std::collections::HashMap;

use fieldline_model::{Decimal, Value};

use crate::problem::Problem;

/// Texts up to this length are read exactly by any parser, if they have no exponent.
const PLAIN_BYTES_MAX: usize = 15;

/// Values that the parser would have rounded, by the message's place and the member's name.
pub(crate) type Exact = HashMap<(usize, String), Value>;

/// Reads the numbers of `body`, which is sound JSON: a message, or an array of them.
///
/// # Errors
///
/// 422 with the member whose number cannot be kept.
pub(crate) fn read(body: &[u8]) -> Result<Exact, Problem> {
    let mut exact = Exact::new();
    let mut open: Vec<u8> = Vec::new();
    let mut messages = 0_usize;
    let mut key: &[u8] = b"";
    let mut rest = body;
    while let Some((first, behind)) = rest.split_first() {
        let level = matches!(open.as_slice(), b"{" | b"[{");
        match first {
            b'"' => {
                let (text, after) = behind.split_at(string_end(behind));
                rest = after.get(1..).unwrap_or_default();
                if level && rest.trim_ascii_start().first() == Some(&b':') {
                    key = text;
                    if !exact.is_empty() {
                        // Of a name that stands twice, the last one counts.
                        exact.remove(&(messages.saturating_sub(1), name(key)));
                    }
                }
                continue;
            }
            b'{' | b'[' => {
                open.push(*first);
                messages += usize::from(matches!(open.as_slice(), b"{" | b"[{"));
            }
            b'}' | b']' => drop(open.pop()),
            b'-' | b'0'..=b'9' => {
                let end = rest.iter().position(|b| !b"+-.0123456789eE".contains(b));
                let (token, after) = rest.split_at(end.unwrap_or(rest.len()));
                rest = after;
                let text = std::str::from_utf8(token).unwrap_or("");
                let plain = text.len() <= PLAIN_BYTES_MAX && !text.contains(['e', 'E']);
                if plain || level && matches!(key, b"timestamp" | b"received") {
                    continue;
                }
                let at = messages.saturating_sub(1);
                let value = one(text, level).map_err(|problem| {
                    let text: String = text.chars().take(64).collect();
                    Problem::member(&format!("[{at}].{}", name(key)), format!("{text} {problem}"))
                })?;
                if let Some(value) = value.filter(|_| level) {
                    exact.insert((at, name(key)), value);
                }
                continue;
            }
            _ => {}
        }
        rest = behind;
    }
    Ok(exact)
}

/// Bytes of a string before the quotation mark that ends it.
fn string_end(text: &[u8]) -> usize {
    let mut escaped = false;
    let end = text.iter().position(|byte| {
        let ends = *byte == b'"' && !escaped;
        escaped = *byte == b'\\' && !escaped;
        ends
    });
    end.unwrap_or(text.len())
}

fn name(raw: &[u8]) -> String {
    let quoted = [b"\"", raw, b"\""].concat();
    serde_json::from_slice(&quoted).unwrap_or_default()
}

/// The value of one number, where the parser's may be another. With `decimals`, more digits fit.
fn one(text: &str, decimals: bool) -> Result<Option<Value>, &'static str> {
    if !text.contains(['.', 'e', 'E']) {
        let fits = text.parse::<i64>().is_ok() || text.parse::<u64>().is_ok();
        return if fits { Ok(None) } else { Err("is a whole number of more than 64 bits") };
    }
    if decimals && let Some(decimal) = Decimal::parse(text) {
        return Ok(Some(Value::Decimal(decimal)));
    }
    let number: f64 = text.parse().map_err(|_| "is no number")?;
    if digits(text) != digits(&format!("{number:e}")) {
        return Err("has more digits than are kept: 18, or 15 to 17 beside an exponent");
    }
    Ok(Value::float(number))
}

/// The digits that count.
fn digits(text: &str) -> String {
    let mantissa = text.split(['e', 'E']).next().unwrap_or("");
    let digits: String = mantissa.chars().filter(char::is_ascii_digit).collect();
    digits.trim_matches('0').to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes: Vec<u8>) {
            drop(read(&bytes));
        }

        #[test]
        fn any_double_is_kept(number in proptest::num::f64::NORMAL) {
            for text in [format!("{{\"a\":{number}}}"), format!("{{\"a\":{number:e}}}")] {
                // Display writes large ones in full, as whole numbers.
                if text.contains(['.', 'e']) {
                    for value in read(text.as_bytes()).unwrap().values() {
                        let mut out = String::new();
                        value.write_json(&mut out);
                        prop_assert_eq!(out.parse::<f64>().unwrap(), number);
                    }
                }
            }
        }
    }

    #[test]
    fn every_digit_is_kept_or_the_member_is_named() {
        let body = br#"[{"n.\u0061":12345678901234.56789, "t":"1e999, \"9"},
            {"n":[0.5,{"n":1}], "m":0.12345678901234567, "m":0.5, "timestamp":1800000000.123456789}]"#;
        let exact = read(body).unwrap();
        assert_eq!(exact.len(), 1);
        let mut out = String::new();
        exact.get(&(0, "n.a".to_owned())).unwrap().write_json(&mut out);
        assert_eq!(out, "12345678901234.56789");
        for wrong in [
            "18446744073709551616",
            "-9223372036854775809",
            "123456789012345678901234567890.123456789",
            "0.10000000000000000000000000000000001",
            "1e-400",
        ] {
            let problem = read(format!("[{{}},{{\"x\":{wrong}}}]").as_bytes()).unwrap_err();
            assert!(problem.detail().starts_with("`[1].x`: "), "{problem:?}");
            let nested = format!("{{\"x\":[{wrong}]}}");
            assert!(read(nested.as_bytes()).is_err(), "{nested}");
        }
    }
}
