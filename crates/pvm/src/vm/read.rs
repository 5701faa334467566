//! Instructions that read bytes.

use fieldline_model::{Decimal, Value};

use super::run::{Next, Ran};
use super::value::{Part, Val};
use super::{Environment, Machine, OPEN, Stop};
use crate::op::{Kind, Reg};
use crate::program::{BAD_VALUE, FRAME_TOO_LARGE, LIMIT_EXCEEDED, TRUNCATED};
use crate::vm::Fault;

/// The whole number at `at`, its bits in the low end, if its bytes are there.
#[inline]
fn bits(data: &[u8], at: usize, kind: Kind) -> Option<u64> {
    macro_rules! number {
        ($kind:ty, $from:ident, $width:literal) => {
            u64::from(<$kind>::$from(data.get(at..at + $width)?.try_into().ok()?))
        };
    }
    Some(match kind {
        Kind::U8 | Kind::S8 => u64::from(*data.get(at)?),
        Kind::U16 | Kind::S16 => number!(u16, from_be_bytes, 2),
        Kind::U32 | Kind::S32 | Kind::F32 => number!(u32, from_be_bytes, 4),
        Kind::U64 | Kind::S64 | Kind::F64 => number!(u64, from_be_bytes, 8),
        Kind::U16Le | Kind::S16Le => number!(u16, from_le_bytes, 2),
        Kind::U32Le | Kind::S32Le | Kind::F32Le => number!(u32, from_le_bytes, 4),
        Kind::U64Le | Kind::S64Le | Kind::F64Le => number!(u64, from_le_bytes, 8),
        Kind::U24 => match data.get(at..at + 3)? {
            [a, b, c] => u64::from(u32::from_be_bytes([0, *a, *b, *c])),
            _ => return None,
        },
        Kind::U24Le => match data.get(at..at + 3)? {
            [a, b, c] => u64::from(u32::from_le_bytes([*a, *b, *c, 0])),
            _ => return None,
        },
    })
}

/// The two's complement of a number of that width.
#[inline]
#[allow(clippy::cast_possible_truncation, reason = "the low bits are what is wanted")]
fn signed(bits: u64, kind: Kind) -> Option<i64> {
    Some(match kind {
        Kind::S8 => i64::from(bits as i8),
        Kind::S16 | Kind::S16Le => i64::from(bits as i16),
        Kind::S32 | Kind::S32Le => i64::from(bits as i32),
        Kind::S64 | Kind::S64Le => bits.cast_signed(),
        _ => return None,
    })
}

#[allow(clippy::cast_possible_truncation, reason = "the low bits are the float's")]
fn value(bits: u64, kind: Kind) -> Val {
    if let Some(n) = signed(bits, kind) {
        return Val::Int(n);
    }
    match kind {
        // The shortest decimal that names a single float is what its maker meant.
        Kind::F32 | Kind::F32Le => {
            let single = f32::from_bits(bits as u32);
            if single.is_finite() {
                super::text::number(single.to_string().as_bytes())
            } else {
                Val::Invalid
            }
        }
        Kind::F64 | Kind::F64Le => Val::float(f64::from_bits(bits)),
        _ => Val::uint(bits),
    }
}

impl Machine {
    /// The number at the read position, if it is there whole.
    #[inline]
    fn number(&self, data: &[u8], kind: Kind) -> Option<u64> {
        if self.pos + kind.width() > self.end {
            return None;
        }
        bits(data, self.pos, kind)
    }

    #[inline]
    pub(super) fn read(&mut self, env: &Environment<'_>, data: &[u8], dst: Reg, kind: Kind) -> Ran {
        let Some(bits) = self.number(data, kind) else {
            self.set(dst, Val::Null);
            return self.missing(env, data, kind.width());
        };
        self.pos += kind.width();
        self.set(dst, value(bits, kind));
        Ok(Next::Go)
    }

    pub(super) fn peek(&mut self, env: &Environment<'_>, data: &[u8], dst: Reg, kind: Kind) -> Ran {
        let Some(bits) = self.number(data, kind) else {
            self.set(dst, Val::Null);
            return self.missing(env, data, kind.width());
        };
        self.set(dst, value(bits, kind));
        Ok(Next::Go)
    }

    #[inline]
    pub(super) fn read_param(
        &mut self,
        env: &Environment<'_>,
        data: &[u8],
        name: u16,
        kind: Kind,
        scale: u16,
    ) -> Ran {
        let Some(bits) = self.number(data, kind) else {
            return self.missing(env, data, kind.width());
        };
        self.pos += kind.width();
        let Some(name) = env.program.names.get(usize::from(name)) else { return Ok(Next::Go) };
        let value = match usize::from(scale)
            .checked_sub(1)
            .and_then(|at| env.program.scales.get(at))
        {
            None => match signed(bits, kind) {
                Some(n) => Value::Int(n),
                None if kind.is_float() => match super::out::plain(&value(bits, kind)) {
                    Some(value) => value,
                    None => return Ok(Next::Go),
                },
                None => Value::from(bits),
            },
            Some(factor) => {
                let number = signed(bits, kind).map_or(i128::from(bits), i128::from);
                let scaled = i64::try_from(number * i128::from(factor.mantissa())).ok();
                match scaled.and_then(|m| Decimal::new(m, factor.scale())) {
                    Some(decimal) if decimal.scale() > 0 => Value::Decimal(decimal),
                    Some(decimal) => Value::Int(decimal.mantissa()),
                    None => {
                        let product = number * i128::from(factor.mantissa());
                        match super::out::plain(&Val::decimal(product, u32::from(factor.scale()))) {
                            Some(value) => value,
                            None => return Ok(Next::Go),
                        }
                    }
                }
            }
        };
        self.store(env, name.clone(), value)?;
        Ok(Next::Go)
    }

    pub(super) fn read_entry(
        &mut self,
        env: &Environment<'_>,
        data: &[u8],
        table: u8,
        id: Kind,
        value: Kind,
    ) -> Ran {
        let at = self.pos;
        let fits = at + id.width() + value.width() <= self.end;
        let read = bits(data, at, id).zip(bits(data, at + id.width(), value)).filter(|_| fits);
        let Some((number, raw)) = read else {
            return self.missing_entry(env, data, id.width(), value.width());
        };
        self.pos += id.width() + value.width();
        self.store_number(env, table, number, raw, value.width())?;
        Ok(Next::Go)
    }

    pub(super) fn read_entries(
        &mut self,
        env: &Environment<'_>,
        data: &[u8],
        count: Reg,
        table: u8,
        id: Kind,
        value: Kind,
    ) -> Ran {
        let Val::Int(mut left) = *self.reg(count) else { return Ok(Next::Go) };
        let width = id.width() + value.width();
        while left > 0 {
            let at = self.pos;
            let fits = at + width <= self.end;
            let read = bits(data, at, id).zip(bits(data, at + id.width(), value)).filter(|_| fits);
            let Some((number, raw)) = read else {
                self.set(count, Val::Int(left));
                return self.missing_entry(env, data, id.width(), value.width());
            };
            self.pos += width;
            self.steps += 1;
            if self.steps > self.allowed_steps(&env.limits) {
                return Err(Fault::new(LIMIT_EXCEEDED, "too many steps"));
            }
            self.store_number(env, table, number, raw, value.width())?;
            left -= 1;
        }
        Ok(Next::Go)
    }

    /// An id or the value after it is missing: said as if they were read one after the other.
    fn missing_entry(
        &mut self,
        env: &Environment<'_>,
        data: &[u8],
        id: usize,
        value: usize,
    ) -> Ran {
        let start = self.pos;
        if start + id > self.end.min(data.len()) {
            return self.missing(env, data, id);
        }
        self.pos += id;
        let next = self.missing(env, data, value);
        if matches!(next, Ok(Next::Stop(Stop::NeedMore))) {
            self.pos = start;
        }
        next
    }

    pub(super) fn take(
        &mut self,
        env: &Environment<'_>,
        data: &[u8],
        dst: Reg,
        count: Reg,
        text: bool,
    ) -> Ran {
        let count = match self.reg(count).as_int().map(usize::try_from) {
            Some(Ok(count)) => count,
            _ => {
                let message = format!("{} is no count of bytes", self.reg(count));
                return Err(Fault::new(BAD_VALUE, message));
            }
        };
        let end = self.end.min(data.len());
        let to = self.pos.saturating_add(count);
        if to > end {
            self.set(dst, Val::Null);
            let next = self.missing(env, data, count)?;
            if matches!(next, Next::Go) {
                // Lenient, and the input has ended: what is there is taken.
                self.part(dst, end, text);
            }
            return Ok(next);
        }
        self.part(dst, to, text);
        Ok(Next::Go)
    }

    /// Sets the register to the bytes up to `to` and goes there.
    #[allow(
        clippy::cast_possible_truncation,
        reason = "frames are shorter than 4 GiB by their limit"
    )]
    fn part(&mut self, dst: Reg, to: usize, text: bool) {
        let part = Part { buffer: self.buffer, text, start: self.pos as u32, end: to as u32 };
        self.pos = to;
        self.set(dst, Val::Part(part));
    }

    pub(super) fn rest(&mut self, env: &Environment<'_>, data: &[u8], dst: Reg) -> Ran {
        if self.end == OPEN && !env.ended {
            return self.missing(env, data, data.len() + 1 - self.pos);
        }
        self.part(dst, self.end.min(data.len()), true);
        Ok(Next::Go)
    }

    pub(super) fn until(
        &mut self,
        env: &Environment<'_>,
        data: &[u8],
        dst: Reg,
        index: u16,
        or_end: bool,
    ) -> Ran {
        let delimiter = match env.program.consts.get(usize::from(index)) {
            Some(Val::Part(part)) => {
                env.program.pool.get(part.start as usize..part.end as usize).unwrap_or(&[])
            }
            _ => &[],
        };
        let end = self.end.min(data.len());
        let visible = data.get(..end).unwrap_or(&[]);
        let from = self.pos.max(self.searched.saturating_sub(delimiter.len().saturating_sub(1)));
        self.steps += (end.saturating_sub(from) / 16) as u64;
        if let Some(at) = super::text::find(visible, delimiter, from) {
            self.searched = 0;
            self.part(dst, at, true);
            self.pos += delimiter.len();
            return Ok(Next::Go);
        }
        let open = self.end == OPEN;
        if open && end >= env.limits.frame_bytes_max {
            let message = format!("no delimiter within {} bytes", env.limits.frame_bytes_max);
            return Err(Fault::new(FRAME_TOO_LARGE, message));
        }
        if open && !env.ended {
            self.searched = end;
            return Ok(Next::Stop(Stop::NeedMore));
        }
        if or_end || env.lenient {
            self.searched = 0;
            self.part(dst, end, true);
            return Ok(Next::Go);
        }
        Err(Fault::new(TRUNCATED, format!("no delimiter after {}", self.pos)))
    }

    pub(super) fn skip(&mut self, env: &Environment<'_>, data: &[u8], count: Reg) -> Ran {
        let count = match self.reg(count).as_int().map(usize::try_from) {
            Some(Ok(count)) => count,
            _ => {
                return Err(Fault::new(
                    BAD_VALUE,
                    format!("{} is no count of bytes", self.reg(count)),
                ));
            }
        };
        let to = self.pos.saturating_add(count);
        if to > self.end.min(data.len()) {
            return self.missing(env, data, count);
        }
        self.pos = to;
        Ok(Next::Go)
    }

    /// The head of a loop to the end of the sub-buffer.
    pub(super) fn next_inner(
        &mut self,
        env: &Environment<'_>,
        data: &[u8],
        reg: Reg,
        to: u32,
    ) -> Ran {
        if self.pos >= self.end.min(data.len()) {
            if self.end == OPEN && !env.ended {
                return Ok(Next::Stop(Stop::NeedMore));
            }
            return Ok(Next::Jump(to));
        }
        let place = i64::try_from(self.pos).unwrap_or(i64::MAX);
        if matches!(self.reg(reg), Val::Int(last) if *last == place) {
            return Err(Fault::new(LIMIT_EXCEEDED, "a loop reads nothing"));
        }
        self.set(reg, Val::Int(place));
        Ok(Next::Go)
    }
}
