//! Instructions of the machine, and their text form.

use std::fmt::Write as _;

use crate::ast::{BinaryOp, UnaryOp};
use crate::program::Program;
use crate::vm::functions::Fun;
use crate::vm::value::Val;

/// A register of the running rule.
pub(crate) type Reg = u8;

/// How a number stands on the wire: width in bytes, sign, byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    U8,
    U16,
    U24,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    U16Le,
    U24Le,
    U32Le,
    U64Le,
    S16Le,
    S32Le,
    S64Le,
    F32,
    F64,
    F32Le,
    F64Le,
}

impl Kind {
    pub(crate) const ALL: &'static [(&'static str, Self)] = &[
        ("u8", Self::U8),
        ("u16", Self::U16),
        ("u24", Self::U24),
        ("u32", Self::U32),
        ("u64", Self::U64),
        ("s8", Self::S8),
        ("s16", Self::S16),
        ("s32", Self::S32),
        ("s64", Self::S64),
        ("u16le", Self::U16Le),
        ("u24le", Self::U24Le),
        ("u32le", Self::U32Le),
        ("u64le", Self::U64Le),
        ("s16le", Self::S16Le),
        ("s32le", Self::S32Le),
        ("s64le", Self::S64Le),
        ("f32", Self::F32),
        ("f64", Self::F64),
        ("f32le", Self::F32Le),
        ("f64le", Self::F64Le),
    ];

    /// The kind that a program calls `name`.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(n, _)| *n == name).map(|(_, kind)| *kind)
    }

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, kind)| *kind == self).map_or("?", |(name, _)| name)
    }

    /// Bytes that it takes.
    pub(crate) const fn width(self) -> usize {
        match self {
            Self::U8 | Self::S8 => 1,
            Self::U16 | Self::S16 | Self::U16Le | Self::S16Le => 2,
            Self::U24 | Self::U24Le => 3,
            Self::U32 | Self::S32 | Self::U32Le | Self::S32Le | Self::F32 | Self::F32Le => 4,
            Self::U64 | Self::S64 | Self::U64Le | Self::S64Le | Self::F64 | Self::F64Le => 8,
        }
    }

    /// Whether it is a whole number without sign.
    pub(crate) const fn is_unsigned(self) -> bool {
        matches!(
            self,
            Self::U8
                | Self::U16
                | Self::U24
                | Self::U32
                | Self::U64
                | Self::U16Le
                | Self::U24Le
                | Self::U32Le
                | Self::U64Le
        )
    }

    /// Whether it has a fraction.
    pub(crate) const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F64 | Self::F32Le | Self::F64Le)
    }
}

/// Values that the machine itself knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Builtin {
    /// Bytes left in the innermost sub-buffer.
    Left,
    /// Messages of this frame so far.
    Messages,
    /// The device that is logged in.
    Ident,
    /// `tcp` or `udp`.
    Transport,
    /// The current time.
    Now,
    /// Whether failed checks are only noted.
    Lenient,
}

impl Builtin {
    pub(crate) const ALL: &'static [(&'static str, Self)] = &[
        ("left", Self::Left),
        ("messages", Self::Messages),
        ("session.ident", Self::Ident),
        ("transport", Self::Transport),
        ("now", Self::Now),
        ("lenient", Self::Lenient),
    ];
}

/// One instruction. Destinations come first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Op {
    Const {
        dst: Reg,
        index: u16,
    },
    Move {
        dst: Reg,
        src: Reg,
    },
    LoadVar {
        dst: Reg,
        index: u16,
    },
    StoreVar {
        index: u16,
        src: Reg,
    },
    LoadSession {
        dst: Reg,
        index: u16,
    },
    StoreSession {
        index: u16,
        src: Reg,
    },
    LoadSetting {
        dst: Reg,
        index: u16,
    },
    LoadBuiltin {
        dst: Reg,
        what: Builtin,
    },
    Unary {
        op: UnaryOp,
        dst: Reg,
        src: Reg,
    },
    Binary {
        op: BinaryOp,
        dst: Reg,
        left: Reg,
        right: Reg,
    },
    BinaryConst {
        op: BinaryOp,
        dst: Reg,
        left: Reg,
        index: u16,
    },
    Apply {
        fun: Fun,
        dst: Reg,
        first: Reg,
        count: u8,
    },
    /// `number(…)`, which text protocols live on.
    Number {
        dst: Reg,
        src: Reg,
    },
    /// Makes the register null if it equals the constant.
    NullIf {
        reg: Reg,
        index: u16,
    },
    Jump {
        to: u32,
    },
    JumpIf {
        src: Reg,
        to: u32,
    },
    JumpIfNot {
        src: Reg,
        to: u32,
    },
    /// Jumps unless the register equals the constant.
    JumpUnless {
        src: Reg,
        index: u16,
        to: u32,
    },
    Read {
        dst: Reg,
        kind: Kind,
    },
    Peek {
        dst: Reg,
        kind: Kind,
    },
    Take {
        dst: Reg,
        count: Reg,
        text: bool,
    },
    Rest {
        dst: Reg,
    },
    Until {
        dst: Reg,
        index: u16,
        or_end: bool,
    },
    Skip {
        count: Reg,
    },
    /// Reads a number and stores it, multiplied by a decimal constant (`scale` − 1 of the scales; 0: not).
    ReadParam {
        name: u16,
        kind: Kind,
        scale: u16,
    },
    /// Reads id and value and stores the value under the table's name for the id.
    Entry {
        table: u8,
        id: Kind,
        value: Kind,
    },
    /// The same as often as the register counts.
    Entries {
        count: Reg,
        table: u8,
        id: Kind,
        value: Kind,
    },
    Store {
        name: u16,
        src: Reg,
    },
    StoreTime {
        src: Reg,
    },
    StoreDynamic {
        name: Reg,
        src: Reg,
    },
    /// Stores under the table's name for the id; `bytes` is the width that the value came in, 0 if unknown.
    StoreEntry {
        table: u8,
        id: Reg,
        src: Reg,
        bytes: u8,
    },
    Within {
        part: Reg,
        to: u32,
    },
    Leave,
    MessageBegin,
    MessageEnd,
    Attempt {
        to: u32,
    },
    AttemptEnd {
        to: u32,
    },
    /// Makes the register a loop count, or fails.
    Count {
        reg: Reg,
    },
    /// Counts down; at zero, jumps.
    Next {
        reg: Reg,
        to: u32,
    },
    /// At the end of the sub-buffer, jumps; fails if nothing was read since the last time.
    NextInner {
        reg: Reg,
        to: u32,
    },
    Check {
        src: Reg,
        class: u16,
    },
    /// Fails if the register is an error value.
    Require {
        src: Reg,
        class: u16,
    },
    Fail {
        class: u16,
    },
    Call {
        rule: u16,
        base: Reg,
    },
    Return,
    /// Asks for the device; refused, jumps. Register 255 stands for no password.
    Login {
        ident: Reg,
        password: Reg,
        to: u32,
    },
    Begin,
    Emit {
        src: Reg,
    },
    EmitInt {
        kind: Kind,
        src: Reg,
    },
    Reply,
    Join {
        dst: Reg,
    },
    Answer {
        src: Reg,
        accepted: bool,
    },
    Close {
        code: u8,
    },
    Expect,
    Done,
    /// Tracing only: notes where the next field begins.
    FieldStart,
    /// Tracing only: a field ends here.
    Field {
        name: u16,
        src: Reg,
    },
    /// Tracing only: a field named by a table ends here.
    FieldEntry {
        table: u8,
        id: Reg,
        src: Reg,
    },
    /// Tracing only: a field named by a register ends here.
    FieldDynamic {
        name: Reg,
        src: Reg,
    },
    /// Tracing only: a computed value.
    Shown {
        name: u16,
        src: Reg,
    },
}

impl Program {
    /// Its bytecode as text, each instruction with the line that it comes from.
    #[must_use]
    pub fn disassemble(&self) -> String {
        let code = &self.plain;
        let mut text = format!("; protocol {}: {}\n", self.name, self.description);
        for (at, op) in code.ops.iter().enumerate() {
            let at32 = u32::try_from(at).unwrap_or(u32::MAX);
            if let Some(rule) = self.rules.iter().find(|rule| rule.start_plain == at32) {
                let written = writeln!(text, "\n{}: ; {} registers", rule.name, rule.registers);
                debug_assert!(written.is_ok(), "writing to a String cannot fail");
            }
            let line = code.lines.get(at).copied().unwrap_or(0);
            let written = writeln!(text, "{at:5}  {:<44}; line {line}", self.op_text(op));
            debug_assert!(written.is_ok(), "writing to a String cannot fail");
        }
        text
    }

    /// One instruction, its constants and names spelled out.
    fn op_text(&self, op: &Op) -> String {
        let constant = |index: u16| match self.consts.get(usize::from(index)) {
            Some(Val::Part(part)) => {
                let bytes = self.pool.get(part.start as usize..part.end as usize).unwrap_or(&[]);
                match std::str::from_utf8(bytes) {
                    Ok(text) => format!("{text:?}"),
                    Err(_) => format!("x\"{}\"", fieldline_model::value::to_hex(bytes)),
                }
            }
            Some(other) => other.to_string(),
            None => "?".into(),
        };
        let class = |index: u16| {
            self.classes.get(usize::from(index)).map_or_else(|| "?".into(), |c| c.name.to_string())
        };
        let name = |index: u16| {
            self.names.get(usize::from(index)).map_or_else(|| "?".into(), ToString::to_string)
        };
        match *op {
            Op::Const { dst, index } => format!("const r{dst}, {}", constant(index)),
            Op::BinaryConst { op, dst, left, index } => {
                format!("{op:?} r{dst}, r{left}, {}", constant(index)).to_lowercase()
            }
            Op::NullIf { reg, index } => format!("null_if r{reg}, {}", constant(index)),
            Op::JumpUnless { src, index, to } => {
                format!("jump_unless r{src} == {}, {to}", constant(index))
            }
            Op::Read { dst, kind } => format!("read r{dst}, {}", kind.name()),
            Op::Peek { dst, kind } => format!("peek r{dst}, {}", kind.name()),
            Op::Until { dst, index, .. } => format!("until r{dst}, {}", constant(index)),
            Op::ReadParam { name: at, kind, scale } => {
                let factor = usize::from(scale).checked_sub(1).and_then(|at| self.scales.get(at));
                let factor = factor.map(|f| format!(" * {f}")).unwrap_or_default();
                format!("read_param #{}, {}{factor}", name(at), kind.name())
            }
            Op::Store { name: at, src } => format!("store #{}, r{src}", name(at)),
            Op::Check { src, class: at } => format!("check r{src}, {}", class(at)),
            Op::Require { src, class: at } => format!("require r{src}, {}", class(at)),
            Op::Fail { class: at } => format!("fail {}", class(at)),
            Op::Apply { fun, dst, first, count } => {
                format!("{} r{dst}, r{first}, {count}", fun.name())
            }
            Op::Call { rule, base } => {
                let rule = self.rules.get(usize::from(rule)).map_or("?", |r| &*r.name);
                format!("call {rule}, r{base}")
            }
            other => plain_text(other),
        }
    }
}

/// `Entries { count: 3, table: 0 }` as `entries count 3, table 0`.
fn plain_text(op: Op) -> String {
    let debug = format!("{op:?}");
    let (name, rest) = debug.split_once(' ').unwrap_or((&debug, ""));
    let mut text = String::new();
    for (at, c) in name.chars().enumerate() {
        if c.is_ascii_uppercase() && at > 0 {
            text.push('_');
        }
        text.push(c.to_ascii_lowercase());
    }
    let rest = rest.trim_start_matches('{').trim_end_matches('}').trim().replace(':', "");
    format!("{text} {}", rest.to_lowercase()).trim_end().to_owned()
}
