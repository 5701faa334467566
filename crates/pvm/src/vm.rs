//! The machine: runs a frame, stops where bytes are missing, and goes on from there.
//!
//! Every instruction that reads looks first and changes nothing if it has to wait, so a stopped
//! machine resumes with that very instruction. Only a search for a delimiter remembers how far it
//! has looked. Memory is bounded by the session's limits: registers by the depth of calls, messages
//! and output by count and size, and every loop spends steps.

pub(crate) mod arithmetic;
pub(crate) mod crc;
pub(crate) mod functions;
mod out;
mod read;
pub(crate) mod run;
pub(crate) mod text;
pub(crate) mod time;
pub(crate) mod value;

use std::sync::Arc;

use fieldline_model::{CloseCode, Decoded, Params, Timestamp};

use crate::op::Reg;
use crate::program::Program;
use crate::session::{CommandAnswer, FrameError, Limits, Reply, TraceField};
use value::Val;

/// Why the machine stopped.
#[derive(Debug, PartialEq)]
pub(crate) enum Stop {
    /// More bytes are needed.
    NeedMore,
    /// The session must say whether the device is known.
    Login { ident: String, password: Option<String> },
    /// The frame is done; this many bytes belong to it.
    Done { length: usize },
}

/// A failed instruction: class and words.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) class: u16,
    pub(crate) message: String,
}

impl Fault {
    pub(crate) fn new(class: u16, message: impl Into<String>) -> Self {
        Self { class, message: message.into() }
    }
}

/// What surrounds the run of a frame.
pub(crate) struct Environment<'a> {
    pub(crate) program: &'a Program,
    /// From the frame's first byte to all that has come.
    pub(crate) input: &'a [u8],
    /// No more will come.
    pub(crate) ended: bool,
    pub(crate) limits: Limits,
    pub(crate) lenient: bool,
    pub(crate) traced: bool,
    pub(crate) datagram: bool,
    pub(crate) now: Timestamp,
    pub(crate) ident: Option<&'a Arc<str>>,
    pub(crate) settings: &'a [Val],
    pub(crate) session_vars: &'a mut Vec<Val>,
}

/// A rule's return place.
#[derive(Clone, Copy, Debug)]
struct Call {
    pc: usize,
    base: usize,
}

/// What a sub-buffer's end returns to.
#[derive(Clone, Copy, Debug)]
struct Within {
    buffer: u16,
    pos: usize,
    end: usize,
    /// Instruction after the block.
    to: usize,
    calls: usize,
    base: usize,
    attempts: usize,
    /// Whether a message was open.
    open: bool,
}

/// What a failed attempt returns to.
#[derive(Clone, Copy, Debug)]
struct Attempt {
    to: usize,
    withins: usize,
    calls: usize,
    base: usize,
    buffer: u16,
    pos: usize,
    end: usize,
    messages: usize,
    open: bool,
    params: usize,
    marks: usize,
    out: usize,
    replies: usize,
    derived: usize,
}

/// End of the input, which may yet grow.
const OPEN: usize = usize::MAX;

/// The state of one frame.
#[derive(Debug)]
pub(crate) struct Machine {
    pc: usize,
    base: usize,
    regs: Vec<Val>,
    vars: Vec<Val>,
    calls: Vec<Call>,
    withins: Vec<Within>,
    attempts: Vec<Attempt>,
    /// Which buffer is read: 0 is the input.
    buffer: u16,
    pos: usize,
    /// End of the sub-buffer, or [`OPEN`].
    end: usize,
    /// Buffers that were made while running, such as inflated ones.
    derived: Vec<Arc<[u8]>>,
    derived_bytes: usize,
    /// How far a waiting search has looked.
    searched: usize,
    steps: u64,
    /// Failed once: the class's answer is being made.
    failed: bool,
    open: bool,
    message: Decoded,
    /// Count of parameters of the message before: room for the next.
    params_hint: usize,
    message_bytes: usize,
    output_bytes: usize,
    out: Vec<u8>,
    marks: Vec<usize>,
    waiting_login: Option<u32>,
    field_start: usize,
    pub(crate) messages: Vec<Decoded>,
    pub(crate) replies: Vec<Reply>,
    pub(crate) answer: Option<CommandAnswer>,
    pub(crate) fields: Vec<TraceField>,
    pub(crate) error: Option<FrameError>,
    pub(crate) close: Option<CloseCode>,
    pub(crate) expects: bool,
    /// Whether the frame holds a password, or may.
    pub(crate) secret: bool,
}

impl Machine {
    /// A machine at the start of rule `rule`.
    pub(crate) fn new(program: &Program, rule: u16, traced: bool, hints: (usize, usize)) -> Self {
        let mut machine = Self {
            pc: 0,
            base: 0,
            regs: Vec::new(),
            vars: program.vars.clone(),
            calls: Vec::new(),
            withins: Vec::new(),
            attempts: Vec::new(),
            buffer: 0,
            pos: 0,
            end: OPEN,
            derived: Vec::new(),
            derived_bytes: 0,
            searched: 0,
            steps: 0,
            failed: false,
            open: false,
            message: Decoded::default(),
            params_hint: hints.1,
            message_bytes: 0,
            output_bytes: 0,
            out: Vec::new(),
            marks: Vec::new(),
            waiting_login: None,
            field_start: 0,
            messages: Vec::with_capacity(hints.0.min(256)),
            replies: Vec::new(),
            answer: None,
            fields: Vec::new(),
            error: None,
            close: None,
            expects: false,
            secret: false,
        };
        machine.enter(program, rule, traced, 0);
        machine
    }

    /// Makes ready for another frame, keeping what was allocated.
    pub(crate) fn reset(
        &mut self,
        program: &Program,
        rule: u16,
        traced: bool,
        hints: (usize, usize),
    ) {
        self.calls.clear();
        self.withins.clear();
        self.attempts.clear();
        (self.buffer, self.pos, self.end) = (0, 0, OPEN);
        self.derived.clear();
        self.derived_bytes = 0;
        (self.searched, self.steps) = (0, 0);
        (self.failed, self.open, self.expects) = (false, false, false);
        self.secret = false;
        self.message = Decoded::default();
        self.params_hint = hints.1;
        (self.message_bytes, self.output_bytes) = (0, 0);
        self.out.clear();
        self.marks.clear();
        self.waiting_login = None;
        self.field_start = 0;
        self.messages = Vec::with_capacity(hints.0.min(256));
        self.replies = Vec::new();
        self.answer = None;
        self.fields = Vec::new();
        self.error = None;
        self.close = None;
        self.vars.clear();
        self.vars.extend_from_slice(&program.vars);
        // Registers may hold text of the frame before.
        self.regs.fill(Val::Null);
        self.enter(program, rule, traced, 0);
    }

    /// Goes to the first instruction of `rule` with its registers from `base` on.
    fn enter(&mut self, program: &Program, rule: u16, traced: bool, base: usize) {
        let rule = program.rules.get(usize::from(rule));
        let start = rule.map_or(u32::MAX, |r| if traced { r.start_traced } else { r.start_plain });
        self.pc = usize::try_from(start).unwrap_or(usize::MAX);
        self.base = base;
        let needed = base + rule.map_or(0, |r| usize::from(r.registers));
        if self.regs.len() < needed {
            self.regs.resize(needed, Val::Null);
        }
    }

    /// Count of parameters of the last message, for the next frame's.
    pub(crate) fn params_hint(&self) -> usize {
        self.params_hint
    }

    /// Answers [`Stop::Login`].
    pub(crate) fn login(&mut self, accepted: bool) {
        let Some(refused) = self.waiting_login.take() else { return };
        if accepted {
            self.pc += 1;
        } else {
            self.messages.clear();
            self.pc = usize::try_from(refused).unwrap_or(usize::MAX);
        }
    }

    /// Sets the first registers, which are the arguments of a command.
    pub(crate) fn arguments(&mut self, args: Vec<Val>) {
        for (slot, arg) in self.regs.iter_mut().zip(args) {
            *slot = arg;
        }
    }

    #[inline]
    fn reg(&self, reg: Reg) -> &Val {
        self.regs.get(self.base + usize::from(reg)).unwrap_or(&Val::Null)
    }

    /// Inlined, so that a value is made where it belongs: copying one right after making it stalls.
    #[allow(clippy::inline_always, reason = "measured: a call costs more than the assignment")]
    #[inline(always)]
    fn set(&mut self, reg: Reg, value: Val) {
        let Some(slot) = self.regs.get_mut(self.base + usize::from(reg)) else { return };
        match slot {
            Val::Text(_) | Val::Bytes(_) | Val::Json(_) => *slot = value,
            // Nothing to drop: saying so spares a detour over the stack.
            _ => std::mem::forget(std::mem::replace(slot, value)),
        }
    }

    /// Bytes of the input that the frame has taken so far.
    fn length(&self) -> usize {
        self.withins.first().map_or(self.pos, |outermost| outermost.pos.max(self.input_pos()))
    }

    /// The place in the input that is being read, or 0 in a derived buffer.
    fn input_pos(&self) -> usize {
        if self.buffer == 0 { self.pos } else { 0 }
    }

    fn begin_message(&mut self) {
        self.open = true;
        self.message_bytes = 0;
        self.message =
            Decoded { timestamp: None, params: Params::with_capacity(self.params_hint.min(1_024)) };
    }
}

/// What a table's entry makes of a number of that width in bytes.
pub(crate) fn named_value(
    entry: &crate::program::Entry,
    raw: u64,
    width: usize,
) -> (fieldline_model::ParamName, fieldline_model::Value) {
    let (name, value) = out::named(entry, raw, width);
    (name.clone(), value)
}
