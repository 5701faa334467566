//! The loop over instructions.

use super::functions::Context;
use super::value::{POOL, Val};
use super::{Attempt, Call, Environment, Fault, Machine, OPEN, Stop, Within, arithmetic};
use crate::ast::BinaryOp;
use crate::op::{Builtin, Op, Reg};
use crate::program::{BAD_VALUE, LIMIT_EXCEEDED, TRUNCATED};
use crate::session::{FrameError, Limits, TraceField};

/// Bytes that a frame may make, by inflating and joining, in longest frames.
const MADE_FRAMES_MAX: usize = 4;
/// Buffers that a frame may make and read within.
const DERIVED_MAX: usize = 4_096;

/// What an instruction leads to.
pub(super) enum Next {
    /// The next instruction.
    Go,
    /// Another one.
    Jump(u32),
    /// Out of the loop.
    Stop(Stop),
    /// The buffer that is read is another one now.
    Switched,
}

pub(super) type Ran = Result<Next, Fault>;

impl Machine {
    /// Runs until the frame is done or something is missing.
    pub(crate) fn run(&mut self, env: &mut Environment<'_>) -> Stop {
        loop {
            // The bytes that instructions read; another buffer comes with another round.
            let held = usize::from(self.buffer)
                .checked_sub(1)
                .and_then(|at| self.derived.get(at).cloned());
            let data: &[u8] = match &held {
                Some(buffer) => buffer,
                None => env.input,
            };
            match self.run_in(env, data) {
                Ok(Some(stop)) => return stop,
                Ok(None) => {}
                Err(fault) => {
                    if let Some(stop) = self.fail(env, fault) {
                        return stop;
                    }
                }
            }
        }
    }

    /// Steps that the frame may have taken by now.
    pub(super) fn allowed_steps(&self, limits: &Limits) -> u64 {
        let read = (self.pos.max(self.searched) + self.derived_bytes) as u64;
        let by_length = limits.steps_per_byte_max.saturating_mul(read);
        limits.steps_max.min(limits.steps_base_max.saturating_add(by_length))
    }

    /// Runs while `data` is what is read. `None`: the buffer changed.
    fn run_in(&mut self, env: &mut Environment<'_>, data: &[u8]) -> Result<Option<Stop>, Fault> {
        let program = env.program;
        let code = if env.traced { &program.traced } else { &program.plain };
        let mut allowed = self.allowed_steps(&env.limits);
        loop {
            let Some(op) = code.ops.get(self.pc) else {
                return Ok(Some(Stop::Done { length: self.length() }));
            };
            self.steps += 1;
            if self.steps > allowed {
                // It grows with what was read since.
                allowed = self.allowed_steps(&env.limits);
                if self.steps > allowed {
                    let at = self.pos;
                    let message = format!("more than {allowed} steps by byte {at}");
                    return Err(Fault::new(LIMIT_EXCEEDED, message));
                }
            }
            match self.execute(env, data, *op)? {
                Next::Go => self.pc += 1,
                Next::Jump(to) => self.pc = to as usize,
                Next::Switched => return Ok(None),
                Next::Stop(stop) => return Ok(Some(stop)),
            }
        }
    }

    #[inline(always)]
    fn execute(&mut self, env: &mut Environment<'_>, data: &[u8], op: Op) -> Ran {
        let program = env.program;
        match op {
            Op::Const { dst, index } => {
                let value = program.consts.get(usize::from(index)).cloned().unwrap_or_default();
                self.set(dst, value);
            }
            Op::Move { dst, src } => self.set(dst, self.reg(src).clone()),
            Op::LoadVar { dst, index } => {
                let value = self.vars.get(usize::from(index)).cloned().unwrap_or_default();
                self.set(dst, value);
            }
            Op::StoreVar { index, src } => {
                let value = self.reg(src).clone();
                if let Some(slot) = self.vars.get_mut(usize::from(index)) {
                    *slot = value;
                }
            }
            Op::Binary { op, dst, left, right } => {
                let context = self.context(env);
                let value = arithmetic::binary(&context, op, self.reg(left), self.reg(right));
                self.set(dst, value);
            }
            Op::BinaryConst { op, dst, left, index } => {
                let constant = program.consts.get(usize::from(index)).unwrap_or(&Val::Null);
                let value = match (op, self.reg(left), constant) {
                    (BinaryOp::BitAnd, Val::Int(a), Val::Int(b)) => Val::Int(a & b),
                    (BinaryOp::Ne, Val::Int(a), Val::Int(b)) => Val::Bool(a != b),
                    (BinaryOp::Eq, Val::Int(a), Val::Int(b)) => Val::Bool(a == b),
                    (BinaryOp::Gt, Val::Int(a), Val::Int(b)) => Val::Bool(a > b),
                    (op, left, constant) => {
                        arithmetic::binary(&self.context(env), op, left, constant)
                    }
                };
                self.set(dst, value);
            }
            Op::Unary { op, dst, src } => {
                let value = arithmetic::unary(op, self.reg(src));
                self.set(dst, value);
            }
            Op::Apply { fun, dst, first, count } => {
                let from = self.base + usize::from(first);
                let args = self.regs.get(from..from + usize::from(count)).unwrap_or(&[]);
                let mut context = self.context(env);
                let value = context.apply(fun, args);
                let cost = context.cost;
                self.steps += cost;
                if let Val::Bytes(_) | Val::Text(_) | Val::Json(_) = &value {
                    self.made(env, &value)?;
                }
                self.set(dst, value);
            }
            Op::Number { dst, src } => {
                let value = match self.reg(src) {
                    Val::Null => Val::Null,
                    Val::Invalid => Val::Invalid,
                    number @ (Val::Int(_) | Val::Uint(_) | Val::Dec(_) | Val::Float(_)) => {
                        number.clone()
                    }
                    text => match self.context(env).bytes(text) {
                        Some(text) => super::text::number(text),
                        None => Val::Invalid,
                    },
                };
                self.set(dst, value);
            }
            Op::NullIf { reg, index } => {
                let constant = program.consts.get(usize::from(index)).unwrap_or(&Val::Null);
                if arithmetic::equal(&self.context(env), self.reg(reg), constant) {
                    self.set(reg, Val::Null);
                }
            }
            Op::Jump { to } => return Ok(Next::Jump(to)),
            Op::JumpIf { src, to } => {
                if self.truth(src)? {
                    return Ok(Next::Jump(to));
                }
            }
            Op::JumpIfNot { src, to } => {
                if !self.truth(src)? {
                    return Ok(Next::Jump(to));
                }
            }
            Op::JumpUnless { src, index, to } => {
                let constant = program.consts.get(usize::from(index)).unwrap_or(&Val::Null);
                if !arithmetic::equal(&self.context(env), self.reg(src), constant) {
                    return Ok(Next::Jump(to));
                }
            }
            Op::Read { dst, kind } => return self.read(env, data, dst, kind),
            Op::ReadParam { name, kind, scale } => {
                return self.read_param(env, data, name, kind, scale);
            }
            Op::Entry { table, id, value } => return self.read_entry(env, data, table, id, value),
            Op::Entries { count, table, id, value } => {
                return self.read_entries(env, data, count, table, id, value);
            }
            Op::Next { reg, to } => match self.reg(reg) {
                Val::Int(left) if *left > 0 => {
                    let left = left - 1;
                    self.set(reg, Val::Int(left));
                }
                _ => return Ok(Next::Jump(to)),
            },
            Op::MessageBegin => self.begin_message(),
            Op::MessageEnd => self.end_message(env)?,
            Op::Call { rule, base } => {
                if self.calls.len() + self.withins.len() >= env.limits.depth_max {
                    return Err(too_deep(env));
                }
                self.calls.push(Call { pc: self.pc + 1, base: self.base });
                self.enter(program, rule, env.traced, self.base + usize::from(base));
                return Ok(Next::Jump(u32::try_from(self.pc).unwrap_or(u32::MAX)));
            }
            Op::Return => match self.calls.pop() {
                Some(call) => {
                    self.base = call.base;
                    return Ok(Next::Jump(u32::try_from(call.pc).unwrap_or(u32::MAX)));
                }
                None => return Ok(Next::Stop(Stop::Done { length: self.length() })),
            },
            Op::Until { dst, index, or_end } => return self.until(env, data, dst, index, or_end),
            Op::Store { name, src } => {
                let name = program.names.get(usize::from(name));
                if let (Some(name), Some(value)) = (name, self.value(env, src)) {
                    self.store(env, name.clone(), value)?;
                }
            }
            Op::Require { src, class } => {
                if matches!(self.reg(src), Val::Invalid) {
                    return Err(Fault::new(class, "the value has not the form that it must have"));
                }
            }
            other => return self.execute_rare(env, data, other),
        }
        Ok(Next::Go)
    }

    /// Instructions that do not repeat within a record.
    #[inline(never)]
    fn execute_rare(&mut self, env: &mut Environment<'_>, data: &[u8], op: Op) -> Ran {
        match op {
            Op::LoadSession { dst, index } => {
                let value = env.session_vars.get(usize::from(index)).cloned().unwrap_or_default();
                self.set(dst, value);
            }
            Op::StoreSession { index, src } => {
                // It outlives the frame, so it must not point into it.
                let value = self.owned(env, src);
                if let Some(slot) = env.session_vars.get_mut(usize::from(index)) {
                    *slot = value;
                }
            }
            Op::LoadSetting { dst, index } => {
                let value = env.settings.get(usize::from(index)).cloned().unwrap_or_default();
                self.set(dst, value);
            }
            Op::LoadBuiltin { dst, what } => {
                let value = self.builtin(env, data, what);
                self.set(dst, value);
            }
            Op::Peek { dst, kind } => return self.peek(env, data, dst, kind),
            Op::Take { dst, count, text } => return self.take(env, data, dst, count, text),
            Op::Rest { dst } => return self.rest(env, data, dst),
            Op::Skip { count } => return self.skip(env, data, count),
            Op::StoreTime { src } => {
                if let Val::Time(micros) = self.reg(src) {
                    self.message.timestamp = Some(fieldline_model::Timestamp::from_micros(*micros));
                }
            }
            Op::StoreDynamic { name, src } => self.store_dynamic(env, name, src)?,
            Op::StoreEntry { table, id, src, bytes } => {
                self.store_entry(env, table, id, src, bytes)?;
            }
            Op::Within { part, to } => return self.within(env, part, to),
            Op::Leave => return Ok(self.leave(env.lenient)),
            Op::Attempt { to } => self.attempts.push(Attempt {
                to: to as usize,
                withins: self.withins.len(),
                calls: self.calls.len(),
                base: self.base,
                buffer: self.buffer,
                pos: self.pos,
                end: self.end,
                messages: self.messages.len(),
                open: self.open,
                params: self.message.params.len(),
                marks: self.marks.len(),
                out: self.out.len(),
                replies: self.replies.len(),
                derived: self.derived.len(),
            }),
            Op::AttemptEnd { to } => {
                self.attempts.pop();
                return Ok(Next::Jump(to));
            }
            Op::Count { reg } => match self.reg(reg).as_int() {
                Some(count) if count >= 0 => {
                    let count = i64::try_from(count).unwrap_or(i64::MAX);
                    self.set(reg, Val::Int(count));
                }
                _ => {
                    let message = format!("{} is no count", self.reg(reg));
                    return Err(Fault::new(BAD_VALUE, message));
                }
            },
            Op::NextInner { reg, to } => return self.next_inner(env, data, reg, to),
            Op::Check { src, class } if !self.holds(src) => {
                return self.soft(env, class, "the check does not hold");
            }
            Op::Fail { class } => return Err(Fault::new(class, "the program refuses this")),
            Op::Login { ident, password, to } => return self.ask_login(env, ident, password, to),
            Op::Begin => self.marks.push(self.out.len()),
            Op::Emit { src } => self.emit(env, src)?,
            Op::EmitInt { kind, src } => self.emit_int(env, kind, src)?,
            Op::Reply => self.end_reply(env)?,
            Op::Join { dst } => {
                let mark = self.marks.pop().unwrap_or(0).min(self.out.len());
                let value = Val::Bytes(self.out.split_off(mark).into());
                self.made(env, &value)?;
                self.set(dst, value);
            }
            Op::Answer { src, accepted } => self.set_answer(env, src, accepted),
            Op::Close { code } => {
                let code = fieldline_model::CloseCode::ALL.iter().find(|c| c.number() == code);
                self.close = self.close.or(code.copied());
            }
            Op::Expect => self.expects = true,
            Op::Done => return Ok(Next::Stop(Stop::Done { length: self.length() })),
            Op::FieldStart => self.field_start = self.pos,
            Op::Field { name, src } => {
                let name = env.program.names.get(usize::from(name)).map_or("?", |n| n.as_str());
                self.field(env, name.to_owned(), src, true, None);
            }
            Op::Shown { name, src } => {
                let name = env.program.names.get(usize::from(name)).map_or("?", |n| n.as_str());
                self.field(env, name.to_owned(), src, false, None);
            }
            Op::FieldDynamic { name, src } => {
                let name = self.spelled(env, name).unwrap_or_default();
                self.field(env, name, src, true, None);
            }
            Op::FieldEntry { table, id, src } => self.field_entry(env, table, id, src),
            // Handled where it is quick.
            _ => {}
        }
        Ok(Next::Go)
    }

    /// Counts bytes that were made and not sent by the device.
    #[inline(never)]
    fn made(&mut self, env: &Environment<'_>, value: &Val) -> Result<(), Fault> {
        let bytes = match value {
            Val::Bytes(bytes) => bytes.len(),
            Val::Text(text) => text.len(),
            _ => 0,
        };
        self.derived_bytes = self.derived_bytes.saturating_add(bytes);
        if self.derived_bytes > env.limits.frame_bytes_max.saturating_mul(MADE_FRAMES_MAX) {
            return Err(Fault::new(LIMIT_EXCEEDED, "too many bytes were made in this frame"));
        }
        Ok(())
    }

    pub(super) fn context<'c>(&'c self, env: &Environment<'c>) -> Context<'c> {
        let room = env.limits.frame_bytes_max;
        Context {
            input: env.input,
            derived: &self.derived,
            pool: &env.program.pool,
            inflate_bytes_max: room,
            cost: 0,
        }
    }

    /// Whether a condition holds: numbers other than 0 do, null does not.
    fn truth(&self, src: Reg) -> Result<bool, Fault> {
        match self.reg(src) {
            Val::Bool(b) => Ok(*b),
            Val::Int(n) => Ok(*n != 0),
            Val::Uint(_) => Ok(true),
            Val::Null => Ok(false),
            other => Err(Fault::new(BAD_VALUE, format!("{other} is no condition"))),
        }
    }

    /// The same for a check, which an error value fails like any other.
    fn holds(&self, src: Reg) -> bool {
        self.truth(src).unwrap_or(false)
    }

    fn builtin(&self, env: &Environment<'_>, data: &[u8], what: Builtin) -> Val {
        match what {
            Builtin::Left => {
                let end = self.end.min(data.len());
                Val::uint(end.saturating_sub(self.pos) as u64)
            }
            Builtin::Messages => Val::uint(self.messages.len() as u64),
            Builtin::Ident => env.ident.map_or(Val::Null, |ident| Val::Text(ident.clone())),
            Builtin::Transport => {
                let [stream, datagram] = &env.program.carriers;
                if env.datagram { datagram.clone() } else { stream.clone() }
            }
            Builtin::Now => Val::Time(env.now.as_micros()),
            Builtin::Lenient => Val::Bool(env.lenient),
        }
    }

    /// A failed check: under the lenient option, some are only noted.
    pub(super) fn soft(&mut self, env: &Environment<'_>, class: u16, message: &str) -> Ran {
        let known = env.program.classes.get(usize::from(class));
        match known {
            Some(known) if env.lenient && known.lenient => {
                let name = known.name.to_string();
                self.note(env, name, message.to_owned());
                Ok(Next::Go)
            }
            _ => Err(Fault::new(class, message)),
        }
    }

    /// Adds a remark to the trace.
    pub(super) fn note(&mut self, env: &Environment<'_>, name: String, note: String) {
        if env.traced && self.fields.len() < super::out::FIELDS_MAX {
            let at = self.length().min(env.input.len());
            let message = self.open.then_some(self.messages.len());
            self.fields.push(TraceField {
                name,
                start: at,
                end: at,
                value: None,
                note: Some(note),
                message,
            });
        }
    }

    /// A sub-buffer: text or bytes that were taken before.
    fn within(&mut self, env: &Environment<'_>, part: Reg, to: u32) -> Ran {
        if self.calls.len() + self.withins.len() >= env.limits.depth_max {
            return Err(too_deep(env));
        }
        let saved = Within {
            buffer: self.buffer,
            pos: self.pos,
            end: self.end,
            to: to as usize,
            calls: self.calls.len(),
            base: self.base,
            attempts: self.attempts.len(),
            open: self.open,
        };
        let part = match self.reg(part) {
            Val::Part(part) if part.buffer != POOL => *part,
            // Nothing is there, so nothing is run.
            Val::Null => return Ok(Next::Jump(to)),
            other => {
                let bytes: std::sync::Arc<[u8]> = match other {
                    Val::Bytes(bytes) => bytes.clone(),
                    Val::Text(text) => text.as_bytes().into(),
                    Val::Part(part) => self.context(env).part(*part).into(),
                    other => return Err(Fault::new(BAD_VALUE, format!("{other} has no bytes"))),
                };
                if self.derived.len() >= DERIVED_MAX {
                    return Err(Fault::new(
                        LIMIT_EXCEEDED,
                        "too many buffers were made in this frame",
                    ));
                }
                let end = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                self.derived.push(bytes);
                let buffer = u16::try_from(self.derived.len()).unwrap_or(u16::MAX);
                super::value::Part { buffer, text: false, start: 0, end }
            }
        };
        self.withins.push(saved);
        let switched = part.buffer != self.buffer;
        self.buffer = part.buffer;
        self.pos = part.start as usize;
        self.end = part.end as usize;
        if switched {
            self.pc += 1;
            return Ok(Next::Switched);
        }
        Ok(Next::Go)
    }

    fn leave(&mut self, lenient: bool) -> Next {
        let Some(outer) = self.withins.pop() else { return Next::Go };
        let switched = outer.buffer != self.buffer;
        // Under the lenient option a block may have read on after its end.
        let overrun = if lenient && !switched { self.pos } else { 0 };
        self.buffer = outer.buffer;
        self.pos = outer.pos.max(overrun);
        self.end = outer.end;
        if switched {
            self.pc += 1;
            return Next::Switched;
        }
        Next::Go
    }

    /// Bytes are missing: wait for them, or the frame is cut short.
    #[inline(never)]
    pub(super) fn missing(&mut self, env: &Environment<'_>, data: &[u8], needed: usize) -> Ran {
        let inner = self.end != OPEN;
        let wanted = self.pos.saturating_add(needed);
        if !inner && self.buffer == 0 && wanted > env.limits.frame_bytes_max {
            let message = format!(
                "the frame needs {wanted} bytes, at most {} are taken",
                env.limits.frame_bytes_max
            );
            return Err(Fault::new(crate::program::FRAME_TOO_LARGE, message));
        }
        if !inner && !env.ended {
            return Ok(Next::Stop(Stop::NeedMore));
        }
        let have = self.end.min(data.len()).saturating_sub(self.pos);
        let message = format!("needs {needed} bytes at {}, has {have}", self.pos);
        if !env.lenient {
            return Err(Fault::new(TRUNCATED, message));
        }
        self.note(env, "truncated".into(), message);
        if let Some(outer) = self.withins.last()
            && outer.buffer == self.buffer
        {
            // The declared end may be what is wrong: what follows it is read on, or waited for.
            let goes_on = if outer.end == OPEN {
                !env.ended || wanted <= data.len()
            } else {
                self.end < outer.end && wanted <= outer.end
            };
            if inner && goes_on {
                self.end = outer.end;
                return Ok(Next::Jump(u32::try_from(self.pc).unwrap_or(u32::MAX)));
            }
        }
        if let Some(within) = self.withins.pop() {
            self.open = within.open;
            self.calls.truncate(within.calls);
            self.attempts.truncate(within.attempts);
            self.base = within.base;
            let furthest = if self.buffer == within.buffer { self.pos } else { 0 };
            self.buffer = within.buffer;
            self.pos = within.pos.max(furthest);
            self.end = within.end;
            self.pc = within.to;
            return Ok(Next::Switched);
        }
        Ok(Next::Go)
    }

    /// Ends an attempt or the frame. `None`: the program goes on.
    fn fail(&mut self, env: &mut Environment<'_>, fault: Fault) -> Option<Stop> {
        let class = env.program.classes.get(usize::from(fault.class));
        // Whatever was wrong before a password was read, one may stand there.
        let places = self.calls.iter().map(|call| call.pc).chain([self.pc]);
        let rules = places.filter_map(|pc| env.program.rule_at(pc, env.traced));
        self.secret |= rules.into_iter().any(|rule| rule.secret);
        let hard = matches!(fault.class, LIMIT_EXCEEDED | crate::program::FRAME_TOO_LARGE);
        if !hard
            && !self.failed
            && let Some(attempt) = self.attempts.pop()
        {
            let name = class.map_or_else(String::new, |c| c.name.to_string());
            self.note(env, name, fault.message);
            self.withins.truncate(attempt.withins);
            self.calls.truncate(attempt.calls);
            self.messages.truncate(attempt.messages);
            self.marks.truncate(attempt.marks);
            self.out.truncate(attempt.out);
            self.replies.truncate(attempt.replies);
            self.derived.truncate(attempt.derived);
            if attempt.open {
                let kept =
                    std::mem::take(&mut self.message.params).into_iter().take(attempt.params);
                self.message.params = kept.collect();
            }
            self.open = attempt.open;
            (self.buffer, self.pos, self.end) = (attempt.buffer, attempt.pos, attempt.end);
            (self.base, self.pc) = (attempt.base, attempt.to);
            return None;
        }
        let cut_short = fault.class == TRUNCATED && self.withins.is_empty();
        let length = if cut_short { env.input.len() } else { self.length() };
        if self.failed {
            return Some(Stop::Done { length });
        }
        let code = if env.traced { &env.program.traced } else { &env.program.plain };
        let offset = if self.buffer == 0 { self.pos } else { length };
        self.error = Some(FrameError {
            class: class.map_or_else(|| "unknown".into(), |c| c.name.clone()),
            message: fault.message,
            offset,
            rule: env
                .program
                .rule_at(self.pc, env.traced)
                .map_or_else(|| "?".into(), |rule| rule.name.clone()),
            line: code.lines.get(self.pc).copied().unwrap_or(0),
        });
        self.failed = true;
        self.open = false;
        self.messages = Vec::new();
        self.replies = Vec::new();
        self.answer = None;
        self.close = class.and_then(|c| c.close).or(self.close);
        let Some(rule) = class.and_then(|c| c.answer).filter(|_| !hard) else {
            return Some(Stop::Done { length });
        };
        // The answer reads nothing: it sees variables and what it writes itself.
        self.calls.clear();
        self.attempts.clear();
        self.withins.clear();
        (self.buffer, self.pos, self.end) = (0, length, OPEN);
        self.out.clear();
        self.marks.clear();
        self.enter(env.program, rule, env.traced, 0);
        None
    }
}

fn too_deep(env: &Environment<'_>) -> Fault {
    let message =
        format!("rules and sub-buffers are nested more than {} deep", env.limits.depth_max);
    Fault::new(LIMIT_EXCEEDED, message)
}
