//! The functions that programs call. Null in gives null out; what has no result is the error value.

use std::io::Read as _;
use std::sync::Arc;

use super::crc;
use super::text::{coordinate, hex_number, integer, number};
use super::time::Clock;
use super::value::{POOL, Part, Val};

macro_rules! functions {
    ($($(#[doc = $doc:literal])+ $fun:ident $name:literal $least:literal $most:literal;)+) => {
        /// A function that programs call.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Fun {
            $($(#[doc = $doc])+ $fun,)+
        }

        impl Fun {
            /// Every function with its name and the least and most arguments that it takes.
            pub(crate) const ALL: &'static [(&'static str, Self, usize, usize)] =
                &[$(($name, Self::$fun, $least, $most),)+];
        }
    };
}

functions! {
    /// Count of bytes.
    Size "size" 1 1;
    /// The number that text spells, exactly; decimal point or comma.
    Number "number" 1 1;
    /// The whole number that text spells.
    Integer "integer" 1 1;
    /// The number that hex digits spell, `0x` before it or not.
    HexNumber "hex_number" 1 1;
    /// Degrees of `DDMM.MMMM` and a hemisphere letter, to seven decimals.
    Degrees "degrees" 2 2;
    /// The time that texts spell by patterns: `datetime("DDMMYY", a, "hhmmss", b)`.
    Datetime "datetime" 2 8;
    /// The time that many seconds after 1970.
    Unix "unix" 1 1;
    /// The time that many milliseconds after 1970.
    UnixMs "unix_ms" 1 1;
    /// The time that many seconds after another.
    After "after" 2 2;
    /// Count of pieces between separators.
    Count "count" 2 2;
    /// Text without white space around it.
    Trim "trim" 1 1;
    /// Null if the first argument equals one of the others; else the first.
    Unless "unless" 2 8;
    /// What stands before the last separator, with it; nothing if there is none.
    UpToLast "up_to_last" 2 2;
    /// What stands after the last separator; all if there is none.
    AfterLast "after_last" 2 2;
    /// The first without the second at its end.
    WithoutEnd "without_end" 2 2;
    /// The second where the first is null or the error value.
    Default "default" 2 2;
    /// Bytes from a place to before another.
    Slice "slice" 3 3;
    /// The byte at a place.
    At "at" 2 2;
    /// Whether the first begins with the second.
    StartsWith "starts_with" 2 2;
    /// Whether it is digits only, at least one.
    IsDigits "is_digits" 1 1;
    /// Numbers between separators, as a list; null where empty or equal to one of the further arguments.
    Numbers "numbers" 2 8;
    /// A number rounded to that many decimals, halves to even.
    Round "round" 2 2;
    /// Bytes as text of hex digits.
    Hex "hex" 1 1;
    /// Text of hex digits as bytes.
    Unhex "unhex" 1 1;
    /// Bytes taken as text.
    AsText "as_text" 1 1;
    /// CRC-16/ARC.
    CrcArc "crc16_arc" 1 1;
    /// CRC-16/KERMIT.
    CrcKermit "crc16_kermit" 1 1;
    /// CRC-16/X-25.
    CrcX25 "crc16_x25" 1 1;
    /// CRC-16/MODBUS.
    CrcModbus "crc16_modbus" 1 1;
    /// A reflected CRC: bytes, width, reflected polynomial, initial value, final xor.
    Crc "crc" 5 5;
    /// Exclusive or of all bytes.
    Xor8 "xor8" 1 1;
    /// Sum of all bytes, modulo 256.
    Sum8 "sum8" 1 1;
    /// What a zlib stream holds.
    Inflate "inflate" 1 1;
    /// Whether the first is within the bounds.
    Between "between" 3 3;
}

impl Fun {
    /// The function that a program calls `name`, with the least and most arguments that it takes.
    pub(crate) fn named(name: &str) -> Option<(Self, usize, usize)> {
        Self::ALL.iter().find(|f| f.0 == name).map(|f| (f.1, f.2, f.3))
    }

    pub(crate) fn name(self) -> &'static str {
        Self::ALL.iter().find(|f| f.1 == self).map_or("?", |f| f.0)
    }
}

/// Longest list of numbers.
const LIST_MAX: usize = 4_096;

/// Where the bytes of parts are, and what a call may use.
pub(crate) struct Context<'a> {
    pub(crate) input: &'a [u8],
    pub(crate) derived: &'a [Arc<[u8]>],
    /// Constants of the program.
    pub(crate) pool: &'a [u8],
    /// Most bytes that may be inflated.
    pub(crate) inflate_bytes_max: usize,
    /// Steps that the call costs beyond its own.
    pub(crate) cost: u64,
}

impl<'a> Context<'a> {
    /// The bytes of text, bytes or a part.
    #[inline]
    pub(crate) fn bytes<'v>(&self, value: &'v Val) -> Option<&'v [u8]>
    where
        'a: 'v,
    {
        Some(match value {
            Val::Part(part) => self.part(*part),
            Val::Text(text) => text.as_bytes(),
            Val::Bytes(bytes) => bytes,
            _ => return None,
        })
    }

    #[inline]
    pub(crate) fn part(&self, part: Part) -> &'a [u8] {
        let buffer = match part.buffer {
            0 => self.input,
            POOL => self.pool,
            derived => self.derived.get(usize::from(derived) - 1).map_or(&[][..], |b| &**b),
        };
        buffer.get(part.start as usize..part.end as usize).unwrap_or(&[])
    }

    fn charge(&mut self, bytes: usize) {
        self.cost += bytes as u64 / 8;
    }

    /// Calls `fun`.
    pub(crate) fn apply(&mut self, fun: Fun, args: &[Val]) -> Val {
        if fun == Fun::Default {
            let first = args.first().filter(|v| !matches!(v, Val::Null | Val::Invalid));
            return first.or(args.get(1)).cloned().unwrap_or_default();
        }
        if args.iter().any(|a| matches!(a, Val::Invalid)) {
            return Val::Invalid;
        }
        if matches!(args.first(), Some(Val::Null)) && fun != Fun::Datetime {
            return Val::Null;
        }
        self.call(fun, args).unwrap_or(Val::Invalid)
    }

    fn call(&mut self, fun: Fun, args: &[Val]) -> Option<Val> {
        let first = args.first()?;
        if let Some(bytes) = self.bytes(first) {
            self.charge(bytes.len());
        }
        let second = args.get(1);
        Some(match fun {
            Fun::Size => Val::uint(self.bytes(first)?.len() as u64),
            Fun::Number => match first {
                Val::Int(_) | Val::Uint(_) | Val::Dec(_) | Val::Float(_) => first.clone(),
                text => number(self.bytes(text)?),
            },
            Fun::Integer => match first {
                Val::Int(_) | Val::Uint(_) => first.clone(),
                text => integer(self.bytes(text)?),
            },
            Fun::HexNumber => hex_number(self.bytes(first)?)?,
            Fun::Degrees => coordinate(self.bytes(first)?, self.bytes(second?)?)?,
            Fun::Datetime => self.datetime(args)?,
            Fun::Unix => time(first.as_int()?.checked_mul(1_000_000)?),
            Fun::UnixMs => time(first.as_int()?.checked_mul(1_000)?),
            Fun::After => match (first, second?) {
                (Val::Time(base), seconds) => {
                    let micros = seconds.as_int()?.checked_mul(1_000_000)?;
                    time(micros.checked_add(i128::from(*base))?)
                }
                _ => return None,
            },
            Fun::Count => {
                let (text, separator) = (self.bytes(first)?, self.bytes(second?)?);
                Val::uint(pieces(text, separator).count() as u64)
            }
            Fun::Trim => {
                let bytes = self.bytes(first)?;
                let lead = bytes.len() - bytes.trim_ascii_start().len();
                piece(first, bytes, lead, lead + bytes.trim_ascii().len())
            }
            Fun::Unless => {
                let same = |other: &Val| super::arithmetic::equal(self, first, other);
                if args.iter().skip(1).any(same) { Val::Null } else { first.clone() }
            }
            Fun::UpToLast => {
                let (bytes, separator) = (self.bytes(first)?, self.bytes(second?)?);
                let end = last(bytes, separator).map_or(0, |at| at + separator.len());
                piece(first, bytes, 0, end)
            }
            Fun::AfterLast => {
                let (bytes, separator) = (self.bytes(first)?, self.bytes(second?)?);
                let start = last(bytes, separator).map_or(0, |at| at + separator.len());
                piece(first, bytes, start, bytes.len())
            }
            Fun::WithoutEnd => {
                let bytes = self.bytes(first)?;
                let kept = bytes.strip_suffix(self.bytes(second?)?).unwrap_or(bytes);
                piece(first, bytes, 0, kept.len())
            }
            // Taken care of before: it looks at what others give up on.
            Fun::Default => return None,
            Fun::Slice => {
                let bytes = self.bytes(first)?;
                let from = usize::try_from(second?.as_int()?).ok()?;
                let to = usize::try_from(args.get(2)?.as_int()?).ok()?;
                bytes.get(from..to)?;
                piece(first, bytes, from, to)
            }
            Fun::At => {
                let at = usize::try_from(second?.as_int()?).ok()?;
                Val::Int(i64::from(*self.bytes(first)?.get(at)?))
            }
            Fun::StartsWith => Val::Bool(self.bytes(first)?.starts_with(self.bytes(second?)?)),
            Fun::IsDigits => {
                let bytes = self.bytes(first)?;
                Val::Bool(!bytes.is_empty() && bytes.iter().all(u8::is_ascii_digit))
            }
            Fun::Numbers => self.numbers(first, second?, args.get(2..)?)?,
            Fun::Round => round(first, u32::try_from(second?.as_int()?).ok()?)?,
            Fun::Hex => Val::Text(fieldline_model::value::to_hex(self.bytes(first)?).into()),
            Fun::Unhex => {
                let text = std::str::from_utf8(self.bytes(first)?).ok()?;
                Val::Bytes(fieldline_model::value::from_hex(text)?.into())
            }
            Fun::AsText => match first {
                Val::Part(part) => Val::Part(Part { text: true, ..*part }),
                other => Val::Text(String::from_utf8_lossy(self.bytes(other)?).into()),
            },
            Fun::CrcArc => Val::Int(crc::ARC.of(self.bytes(first)?)),
            Fun::CrcKermit => Val::Int(crc::KERMIT.of(self.bytes(first)?)),
            Fun::CrcX25 => Val::Int(crc::X25.of(self.bytes(first)?)),
            Fun::CrcModbus => Val::Int(crc::MODBUS.of(self.bytes(first)?)),
            Fun::Crc => {
                let number = |at: usize| u64::try_from(args.get(at)?.as_int()?).ok();
                let bytes = self.bytes(first)?;
                self.charge(bytes.len().saturating_mul(8));
                Val::uint(crc::reflected(bytes, number(1)?, number(2)?, number(3)?, number(4)?)?)
            }
            Fun::Xor8 => Val::Int(i64::from(self.bytes(first)?.iter().fold(0, |x, b| x ^ b))),
            Fun::Sum8 => {
                let sum = self.bytes(first)?.iter().fold(0_u8, |sum, b| sum.wrapping_add(*b));
                Val::Int(i64::from(sum))
            }
            Fun::Inflate => {
                let limit = self.inflate_bytes_max as u64;
                let mut bytes = Vec::new();
                let zlib = flate2::read::ZlibDecoder::new(self.bytes(first)?);
                let length = zlib.take(limit + 1).read_to_end(&mut bytes).ok()?;
                self.charge(length);
                if length as u64 > limit {
                    return None;
                }
                Val::Bytes(bytes.into())
            }
            Fun::Between => {
                use std::cmp::Ordering::{Greater, Less};
                let low = super::arithmetic::compare(self, first, second?)?;
                let high = super::arithmetic::compare(self, first, args.get(2)?)?;
                Val::Bool(low != Less && high != Greater)
            }
        })
    }

    /// Pairs of pattern and text. All texts absent: null; some: no time.
    fn datetime(&self, args: &[Val]) -> Option<Val> {
        let texts = || args.iter().skip(1).step_by(2);
        if texts().all(|text| matches!(text, Val::Null)) {
            return Some(Val::Null);
        }
        let mut clock = Clock::default();
        for (pattern, text) in args.iter().step_by(2).zip(texts()) {
            let pattern = std::str::from_utf8(self.bytes(pattern)?).ok()?;
            clock.read(pattern, self.bytes(text)?)?;
        }
        clock.micros().map(Val::Time)
    }

    fn numbers(&self, text: &Val, separator: &Val, absent: &[Val]) -> Option<Val> {
        let mut list = Vec::new();
        for piece in pieces(self.bytes(text)?, self.bytes(separator)?) {
            if list.len() >= LIST_MAX {
                return None;
            }
            let piece = piece.trim_ascii();
            let absent = piece.is_empty() || absent.iter().any(|a| self.bytes(a) == Some(piece));
            list.push(match number(piece) {
                _ if absent => serde_json::Value::Null,
                Val::Int(n) => n.into(),
                Val::Uint(n) => n.into(),
                Val::Dec(d) => fieldline_model::Value::Decimal(d).to_json(),
                Val::Float(x) => x.into(),
                _ => return None,
            });
        }
        Some(Val::Json(Arc::new(list.into())))
    }
}

/// A time that RFC 3339 can spell, from microseconds since 1970.
fn time(micros: i128) -> Val {
    // 9999-12-31T23:59:59Z and the year 0.
    let fits = (-62_167_219_200_000_000..=253_402_300_799_999_999).contains(&micros);
    i64::try_from(micros).ok().filter(|_| fits).map_or(Val::Invalid, Val::Time)
}

/// The bytes `start..end` of `whole`, whose bytes are `bytes`.
#[allow(clippy::cast_possible_truncation, reason = "frames are shorter than 4 GiB by their limit")]
fn piece(whole: &Val, bytes: &[u8], start: usize, end: usize) -> Val {
    match whole {
        Val::Part(part) => Val::Part(Part {
            start: part.start + start as u32,
            end: part.start + end as u32,
            ..*part
        }),
        Val::Text(_) => {
            Val::Text(String::from_utf8_lossy(bytes.get(start..end).unwrap_or(&[])).into())
        }
        _ => Val::Bytes(bytes.get(start..end).unwrap_or(&[]).into()),
    }
}

fn last(bytes: &[u8], separator: &[u8]) -> Option<usize> {
    match separator {
        [] => None,
        [one] => bytes.iter().rposition(|b| b == one),
        many => bytes.windows(many.len()).rposition(|w| w == many),
    }
}

/// The pieces of `bytes` between separators.
fn pieces<'a>(bytes: &'a [u8], separator: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
    let mut rest = Some(bytes);
    std::iter::from_fn(move || {
        let bytes = rest?;
        match super::text::find(bytes, separator, 0) {
            Some(at) => {
                rest = bytes.get(at + separator.len()..);
                bytes.get(..at)
            }
            None => rest.take(),
        }
    })
}

fn round(value: &Val, decimals: u32) -> Option<Val> {
    if let Val::Float(x) = value {
        return fieldline_model::Decimal::from_f64(*x, u8::try_from(decimals).ok()?).map(Val::Dec);
    }
    let (mantissa, scale) = value.as_scaled()?;
    if scale <= decimals {
        return Some(value.clone());
    }
    let divisor = 10_i128.checked_pow(scale - decimals)?;
    Some(Val::decimal(super::arithmetic::divide_half_even(mantissa, divisor), decimals))
}
