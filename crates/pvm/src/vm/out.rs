//! Instructions that store, answer and trace.

use std::sync::Arc;

use bytes::Bytes;
use fieldline_model::{Decimal, ParamName, Timestamp, Value};

use super::run::{Next, Ran};
use super::value::Val;
use super::{Environment, Fault, Machine, Stop};
use crate::ast::RowKind;
use crate::compile::NO_REG;
use crate::op::{Kind, Reg};
use crate::program::{BAD_VALUE, Entry, LIMIT_EXCEEDED};
use crate::session::{CommandAnswer, Reply, TraceField};

/// Most fields that a trace lists.
pub(super) const FIELDS_MAX: usize = 50_000;
/// Most parameters of a message.
const PARAMS_MAX: usize = 8_192;
/// What a parameter counts against the limit on output, besides its content.
const PARAM_BYTES: usize = 40;

/// A value that is not a part of a buffer, as it is stored; `None` for null and the error value.
pub(super) fn plain(value: &Val) -> Option<Value> {
    Some(match value {
        Val::Bool(b) => Value::Bool(*b),
        Val::Int(n) => Value::Int(*n),
        Val::Uint(n) => Value::from(*n),
        Val::Dec(d) => Value::Decimal(*d),
        Val::Float(x) => Value::float(*x)?,
        Val::Time(micros) => Value::Text(Timestamp::from_micros(*micros).to_string().into()),
        Val::Text(text) => Value::Text(Arc::clone(text)),
        Val::Bytes(bytes) => Value::Bytes(Arc::clone(bytes)),
        Val::Json(json) => Value::Json(Arc::clone(json)),
        Val::Null | Val::Invalid | Val::Part(_) => return None,
    })
}

/// Bytes as text; as bytes where they are no UTF-8.
fn text_or_bytes(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => Value::Text(text.into()),
        Err(_) => Value::Bytes(bytes.into()),
    }
}

/// The number times the entry's factor plus its offset, if that fits.
fn scaled(entry: &Entry, number: i128) -> Option<(i128, u8)> {
    let (mut mantissa, mut scale) = (number, 0_u8);
    if let Some(factor) = entry.factor {
        mantissa = mantissa.checked_mul(i128::from(factor.mantissa()))?;
        scale = factor.scale();
    }
    if let Some(offset) = entry.offset {
        let both = scale.max(offset.scale());
        let lift = |from: u8| 10_i128.checked_pow(u32::from(both - from));
        let lifted = i128::from(offset.mantissa()).checked_mul(lift(offset.scale())?)?;
        mantissa = mantissa.checked_mul(lift(scale)?)?.checked_add(lifted)?;
        scale = both;
    }
    Some((mantissa, scale))
}

/// A number as table entry `entry` says: its name and value.
#[inline]
pub(super) fn named(entry: &Entry, raw: u64, width: usize) -> (&ParamName, Value) {
    let plain_row = entry.factor.is_none() && entry.offset.is_none() && entry.except.is_empty();
    if plain_row && entry.kind == RowKind::Unsigned {
        return (&entry.name, Value::from(raw));
    }
    let number = match entry.kind {
        RowKind::Bool if raw <= 1 => return (&entry.name, Value::Bool(raw == 1)),
        RowKind::Unsigned => i128::from(raw),
        RowKind::Signed => {
            let unused = 64 - 8 * u32::try_from(width.clamp(1, 8)).unwrap_or(8);
            i128::from((raw << unused).cast_signed() >> unused)
        }
        _ => return (&entry.raw, Value::from(raw)),
    };
    if entry.except.iter().any(|code| i128::from(*code) == number) {
        return (&entry.raw, Value::from(raw));
    }
    let Some((mantissa, scale)) = scaled(entry, number) else {
        return (&entry.raw, Value::from(raw));
    };
    match i64::try_from(mantissa).ok().and_then(|m| Decimal::new(m, scale)) {
        Some(decimal) if scale > 0 => (&entry.name, Value::Decimal(decimal)),
        Some(decimal) => (&entry.name, Value::Int(decimal.mantissa())),
        None => match (scale, u64::try_from(mantissa)) {
            (0, Ok(n)) => (&entry.name, Value::from(n)),
            _ => (&entry.raw, Value::from(raw)),
        },
    }
}

impl Machine {
    /// The register as it is stored.
    pub(super) fn value(&self, env: &Environment<'_>, src: Reg) -> Option<Value> {
        match self.reg(src) {
            Val::Part(part) if part.text => Some(text_or_bytes(self.context(env).part(*part))),
            Val::Part(part) => Some(Value::Bytes(self.context(env).part(*part).into())),
            other => plain(other),
        }
    }

    /// The register without references into the frame.
    pub(super) fn owned(&self, env: &Environment<'_>, src: Reg) -> Val {
        match self.reg(src) {
            Val::Part(_) => self.value(env, src).map_or(Val::Null, |value| Val::from(&value)),
            other => other.clone(),
        }
    }

    /// The register as text, if it is text or a whole number.
    pub(super) fn spelled(&self, env: &Environment<'_>, src: Reg) -> Option<String> {
        match self.reg(src) {
            Val::Int(n) => Some(n.to_string()),
            Val::Uint(n) => Some(n.to_string()),
            other => {
                let bytes = self.context(env).bytes(other)?;
                std::str::from_utf8(bytes).ok().map(str::to_owned)
            }
        }
    }

    #[inline]
    pub(super) fn store(
        &mut self,
        env: &Environment<'_>,
        name: ParamName,
        value: Value,
    ) -> Result<(), Fault> {
        if !self.open {
            return Ok(());
        }
        if !matches!(value, Value::Int(_) | Value::Decimal(_) | Value::Bool(_) | Value::Uint(_)) {
            self.message_bytes += value.heap_bytes();
            if self.message_bytes > env.limits.message_bytes_max {
                let message =
                    format!("a message has more than {} bytes", env.limits.message_bytes_max);
                return Err(Fault::new(LIMIT_EXCEEDED, message));
            }
        }
        if self.message.params.len() >= PARAMS_MAX {
            return Err(Fault::new(
                LIMIT_EXCEEDED,
                format!("a message has more than {PARAMS_MAX} values"),
            ));
        }
        self.message.params.push(name, value);
        Ok(())
    }

    pub(super) fn store_dynamic(
        &mut self,
        env: &Environment<'_>,
        name: Reg,
        src: Reg,
    ) -> Result<(), Fault> {
        let param = match self.context(env).bytes(self.reg(name)).map(std::str::from_utf8) {
            Some(Ok(text)) => ParamName::new(text).ok(),
            Some(Err(_)) => None,
            None => self.spelled(env, name).and_then(|text| ParamName::new(text).ok()),
        };
        match (param, self.value(env, src)) {
            (Some(param), Some(value)) => {
                self.message_bytes += param.as_str().len();
                self.store(env, param, value)
            }
            (None, _) => {
                self.set(src, Val::Invalid);
                Ok(())
            }
            (Some(_), None) => Ok(()),
        }
    }

    #[inline]
    pub(super) fn store_number(
        &mut self,
        env: &Environment<'_>,
        table: u8,
        id: u64,
        raw: u64,
        width: usize,
    ) -> Result<(), Fault> {
        let Some(table) = env.program.tables.get(usize::from(table)) else { return Ok(()) };
        let mut spare = None;
        let Some(entry) = table.entry(id, &mut spare) else { return Ok(()) };
        let (name, value) = named(entry, raw, width);
        let name = name.clone();
        self.store(env, name, value)
    }

    pub(super) fn store_entry(
        &mut self,
        env: &Environment<'_>,
        table: u8,
        id: Reg,
        src: Reg,
        bytes: u8,
    ) -> Result<(), Fault> {
        let Some(id) = self.reg(id).as_int().and_then(|id| u64::try_from(id).ok()) else {
            return Ok(());
        };
        if let Val::Int(_) | Val::Uint(_) = self.reg(src)
            && let Some(number) = self.reg(src).as_int()
        {
            let width = if bytes == 0 { 8 } else { usize::from(bytes) };
            // Two's complement of the width that it came in.
            let mask = u128::from(u64::MAX >> (64 - 8 * width.min(8)));
            let raw = u64::try_from(number.cast_unsigned() & mask).unwrap_or(0);
            return self.store_number(env, table, id, raw, width);
        }
        let Some(value) = self.value(env, src) else { return Ok(()) };
        let Some(table) = env.program.tables.get(usize::from(table)) else { return Ok(()) };
        let mut spare = None;
        let Some(entry) = table.entry(id, &mut spare) else { return Ok(()) };
        let (name, value) = match (entry.kind, value) {
            (RowKind::Text, Value::Bytes(bytes)) => match text_or_bytes(&bytes) {
                text @ Value::Text(_) => (&entry.name, text),
                bytes => (&entry.raw, bytes),
            },
            (RowKind::Text, text @ Value::Text(_)) => (&entry.name, text),
            (RowKind::Bytes, value) => (&entry.name, value),
            (_, value) => (&entry.raw, value),
        };
        let name = name.clone();
        self.store(env, name, value)
    }

    pub(super) fn end_message(&mut self, env: &Environment<'_>) -> Result<(), Fault> {
        if !self.open {
            return Ok(());
        }
        self.open = false;
        if self.messages.len() >= env.limits.messages_max {
            let message = format!("more than {} messages in a frame", env.limits.messages_max);
            return Err(Fault::new(LIMIT_EXCEEDED, message));
        }
        let count = self.message.params.len();
        self.params_hint = count;
        self.output(env, count * PARAM_BYTES + self.message_bytes + PARAM_BYTES)?;
        self.messages.push(std::mem::take(&mut self.message));
        Ok(())
    }

    fn output(&mut self, env: &Environment<'_>, bytes: usize) -> Result<(), Fault> {
        self.output_bytes = self.output_bytes.saturating_add(bytes);
        if self.output_bytes > env.limits.output_bytes_max {
            let message = format!("a frame gives more than {} bytes", env.limits.output_bytes_max);
            return Err(Fault::new(LIMIT_EXCEEDED, message));
        }
        Ok(())
    }

    pub(super) fn emit(&mut self, env: &Environment<'_>, src: Reg) -> Result<(), Fault> {
        let before = self.out.len();
        match self.reg(src) {
            Val::Null => {}
            Val::Int(n) => {
                let text = n.to_string();
                self.out.extend_from_slice(text.as_bytes());
            }
            value => match self.context(env).bytes(value) {
                Some(bytes) => {
                    let bytes = bytes.to_vec();
                    self.out.extend_from_slice(&bytes);
                }
                None => {
                    return Err(Fault::new(
                        BAD_VALUE,
                        format!("{value} cannot be written as bytes"),
                    ));
                }
            },
        }
        self.output(env, self.out.len() - before)
    }

    pub(super) fn emit_int(
        &mut self,
        env: &Environment<'_>,
        kind: Kind,
        src: Reg,
    ) -> Result<(), Fault> {
        let value = self.reg(src);
        if matches!(value, Val::Null) {
            return Ok(());
        }
        let width = kind.width();
        let bits = 8 * u32::try_from(width).unwrap_or(8);
        let range = if kind.is_unsigned() {
            0..1_i128 << bits
        } else {
            -(1_i128 << (bits - 1))..1_i128 << (bits - 1)
        };
        let Some(number) = value.as_int().filter(|n| range.contains(n)) else {
            return Err(Fault::new(BAD_VALUE, format!("{value} does not fit {width} bytes")));
        };
        let all = number.to_be_bytes();
        let bytes = all.get(all.len() - width..).unwrap_or(&[]);
        let little = matches!(
            kind,
            Kind::U16Le
                | Kind::U24Le
                | Kind::U32Le
                | Kind::U64Le
                | Kind::S16Le
                | Kind::S32Le
                | Kind::S64Le
        );
        if little {
            self.out.extend(bytes.iter().rev());
        } else {
            self.out.extend_from_slice(bytes);
        }
        self.output(env, width)
    }

    pub(super) fn end_reply(&mut self, env: &Environment<'_>) -> Result<(), Fault> {
        let mark = self.marks.pop().unwrap_or(0).min(self.out.len());
        let bytes = self.out.get(mark..).unwrap_or(&[]);
        if !bytes.is_empty() {
            let bytes = Bytes::copy_from_slice(bytes);
            self.replies.push(Reply { bytes });
        }
        self.out.truncate(mark);
        self.output(env, PARAM_BYTES)
    }

    pub(super) fn set_answer(&mut self, env: &Environment<'_>, src: Reg, accepted: bool) {
        let text = match self.value(env, src) {
            Some(Value::Text(text))
                if text.chars().all(|c| !c.is_control() || c.is_ascii_whitespace()) =>
            {
                text.to_string()
            }
            Some(Value::Text(text)) => fieldline_model::value::to_hex(text.as_bytes()),
            Some(Value::Bytes(bytes)) => match std::str::from_utf8(&bytes) {
                Ok(text) if text.chars().all(|c| !c.is_control() || c.is_ascii_whitespace()) => {
                    text.to_owned()
                }
                _ => fieldline_model::value::to_hex(&bytes),
            },
            Some(other) => {
                let mut text = String::new();
                other.write_json(&mut text);
                text
            }
            None => String::new(),
        };
        self.answer = Some(CommandAnswer { text, accepted });
    }

    pub(super) fn ask_login(
        &mut self,
        env: &Environment<'_>,
        ident: Reg,
        password: Reg,
        to: u32,
    ) -> Ran {
        let given = if password == NO_REG { None } else { self.spelled(env, password) };
        let password = given.filter(|text| !text.is_empty());
        self.secret |= password.is_some();
        let spelled = self.spelled(env, ident).map(|text| text.trim().to_owned());
        let fits =
            |text: &String| (1..=128).contains(&text.len()) && !text.chars().any(char::is_control);
        let Some(ident) = spelled.filter(fits) else {
            return Err(Fault::new(BAD_VALUE, "the device gives no name that can be one"));
        };
        if env.ident.is_some_and(|known| **known == *ident) {
            return Ok(Next::Go);
        }
        self.waiting_login = Some(to);
        Ok(Next::Stop(Stop::Login { ident, password }))
    }

    /// Adds a field to the trace: what was read since the last start, or what was computed here.
    pub(super) fn field(
        &mut self,
        env: &Environment<'_>,
        name: String,
        src: Reg,
        read: bool,
        note: Option<String>,
    ) {
        if self.fields.len() >= FIELDS_MAX {
            return;
        }
        // What stands in a derived buffer has no place of its own in the frame.
        let (start, end) = match self.reg(src) {
            Val::Part(part) if part.buffer == 0 && read => (part.start as usize, part.end as usize),
            _ if self.buffer > 0 => (self.length(), self.length()),
            _ if read => (self.field_start.min(self.pos), self.pos),
            _ => (self.pos, self.pos),
        };
        let invalid = matches!(self.reg(src), Val::Invalid)
            .then(|| "has not the form that it must have".to_owned());
        let message = self.open.then_some(self.messages.len());
        let value = self.value(env, src);
        self.fields.push(TraceField { name, start, end, value, note: note.or(invalid), message });
    }

    pub(super) fn field_entry(&mut self, env: &Environment<'_>, table: u8, id: Reg, src: Reg) {
        let Some(id) = self.reg(id).as_int().and_then(|id| u64::try_from(id).ok()) else { return };
        let Some(table) = env.program.tables.get(usize::from(table)) else { return };
        let mut spare = None;
        // The name under which it was just stored.
        let name = match table.entry(id, &mut spare) {
            Some(entry) => {
                let stored = self.message.params.iter().next_back().map(|(name, _)| name);
                let stored = stored.filter(|name| **name == entry.name || **name == entry.raw);
                stored.unwrap_or(&entry.name).to_string()
            }
            None => format!("{}.{id}", table.name),
        };
        self.field(env, name, src, true, Some(format!("id {id}")));
    }
}
