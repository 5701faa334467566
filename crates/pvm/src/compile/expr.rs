//! Expressions to instructions.

use std::collections::HashMap;

use super::{Compiler, Fun};
use crate::ast::{BinaryOp, Expr, ExprKind, Name, UnaryOp};
use crate::diagnostics::nearest;
use crate::lexer::Span;
use crate::op::{Builtin, Kind, Op, Reg};
use crate::vm::arithmetic;
use crate::vm::functions::Context;
use crate::vm::value::Val;

/// Definitions within definitions.
const EXPANSION_MAX: usize = 16;

impl<'a> Compiler<'a, '_> {
    /// The value of an expression that must not depend on anything.
    pub(super) fn constant(&mut self, expr: &'a Expr) -> Val {
        match fold(expr) {
            Some(value) => value,
            None => {
                self.finding(expr.span, "this is not known before the program runs").expected =
                    Some("a literal".into());
                Val::Null
            }
        }
    }

    /// Whether evaluating `expr` reads bytes.
    pub(super) fn reads(&self, expr: &Expr, depth: usize) -> bool {
        let mut found = false;
        crate::check::subexpressions(expr, &mut |e| {
            if found {
                return;
            }
            found = match &e.kind {
                ExprKind::Until { .. } => true,
                ExprKind::Name(name) => match self.defines.get(name.as_str()) {
                    Some(define) if self.local(name).is_none() => {
                        depth < EXPANSION_MAX && self.reads(define.body, depth + 1)
                    }
                    _ => {
                        self.local(name).is_none()
                            && (Kind::named(name).is_some() || name == "rest")
                    }
                },
                ExprKind::Call { name, .. } => match self.defines.get(name.text.as_str()) {
                    Some(define) => depth < EXPANSION_MAX && self.reads(define.body, depth + 1),
                    None => matches!(name.text.as_str(), "bytes" | "text"),
                },
                _ => false,
            };
        });
        found
    }

    pub(super) fn local(&self, name: &str) -> Option<Reg> {
        self.scopes.iter().rev().find_map(|scope| scope.get(name).copied())
    }

    /// Evaluates into a register: the variable's own, or a new one.
    pub(super) fn eval(&mut self, expr: &'a Expr) -> Reg {
        if let ExprKind::Name(name) = &expr.kind
            && let Some(reg) = self.local(name)
        {
            return reg;
        }
        let dst = self.register(expr.span);
        self.eval_into(expr, dst);
        dst
    }

    /// Evaluates into `dst`; registers taken on the way are free again.
    pub(super) fn eval_into(&mut self, expr: &'a Expr, dst: Reg) {
        let mark = self.next;
        self.evaluate(expr, dst);
        self.next = mark;
    }

    fn load(&mut self, dst: Reg, value: Val) {
        let index = self.add_const(value);
        self.emit(Op::Const { dst, index });
    }

    fn evaluate(&mut self, expr: &'a Expr, dst: Reg) {
        if self.full {
            return;
        }
        if let Some(value) = fold(expr) {
            if matches!(value, Val::Invalid) {
                self.finding(expr.span, "this has no result").hint =
                    Some("it overflows, divides by zero or mixes kinds".into());
            }
            self.load(dst, value);
            return;
        }
        match &expr.kind {
            ExprKind::Name(name) => self.name(name, expr.span, dst),
            ExprKind::Call { name, args } => self.call_function(name, args, dst),
            ExprKind::Peek(inner) => match &inner.kind {
                ExprKind::Name(kind) if Kind::named(kind).is_some_and(|k| !k.is_float()) => {
                    if let Some(kind) = Kind::named(kind) {
                        self.emit(Op::Peek { dst, kind });
                    }
                }
                _ => {
                    self.finding(inner.span, "this cannot be looked at").expected =
                        Some("a kind of whole number, such as `peek u16`".into());
                }
            },
            ExprKind::Until { delimiter, or_end } => {
                let index = self.add_const(Val::Bytes(delimiter.as_slice().into()));
                self.emit(Op::Until { dst, index, or_end: *or_end });
            }
            ExprKind::Unary { op, value } => {
                let src = self.eval(value);
                self.emit(Op::Unary { op: *op, dst, src });
            }
            ExprKind::Binary { op: BinaryOp::And, left, right } => {
                self.junction(left, right, dst, false)
            }
            ExprKind::Binary { op: BinaryOp::Or, left, right } => {
                self.junction(left, right, dst, true)
            }
            ExprKind::Binary { op, left, right } => {
                let left = self.eval(left);
                if let Some(value) = fold(right) {
                    let index = self.add_const(value);
                    self.emit(Op::BinaryConst { op: *op, dst, left, index });
                } else {
                    let right = self.eval(right);
                    self.emit(Op::Binary { op: *op, dst, left, right });
                }
            }
            ExprKind::In { value, low, high } => {
                let first = self.arguments([&**value, low, high]);
                self.emit(Op::Apply { fun: Fun::Between, dst, first, count: 3 });
            }
            ExprKind::Choose { condition, then, otherwise } => {
                let src = self.eval(condition);
                let to_otherwise = self.emit(Op::JumpIfNot { src, to: 0 });
                self.eval_into(then, dst);
                let to_end = self.emit(Op::Jump { to: 0 });
                self.land(to_otherwise);
                self.eval_into(otherwise, dst);
                self.land(to_end);
            }
            _ => {}
        }
    }

    /// `and`, `or`: the right side is evaluated only where it decides.
    fn junction(&mut self, left: &'a Expr, right: &'a Expr, dst: Reg, or: bool) {
        self.eval_into(left, dst);
        let jump =
            if or { Op::JumpIf { src: dst, to: 0 } } else { Op::JumpIfNot { src: dst, to: 0 } };
        let at = self.emit(jump);
        self.eval_into(right, dst);
        self.land(at);
    }

    /// Evaluates into registers next to each other; returns the first.
    pub(super) fn arguments(&mut self, args: impl IntoIterator<Item = &'a Expr>) -> Reg {
        let mut first = None;
        for arg in args {
            let reg = self.register(arg.span);
            first.get_or_insert(reg);
            self.eval_into(arg, reg);
        }
        first.unwrap_or(0)
    }

    fn name(&mut self, name: &str, span: Span, dst: Reg) {
        if let Some(src) = self.local(name) {
            if src != dst {
                self.emit(Op::Move { dst, src });
            }
        } else if let Some(index) = self.var_names.get(name).copied() {
            self.emit(Op::LoadVar { dst, index });
        } else if self.defines.contains_key(name) {
            self.expand(&Name { text: name.to_owned(), span }, &[], dst);
        } else if let Some((_, what)) = Builtin::ALL.iter().find(|(n, _)| *n == name) {
            self.emit(Op::LoadBuiltin { dst, what: *what });
        } else if let Some(kind) = Kind::named(name) {
            self.emit(Op::Read { dst, kind });
        } else if name == "rest" {
            self.emit(Op::Rest { dst });
        } else if let Some(index) = self.session_index(name) {
            self.emit(Op::LoadSession { dst, index });
        } else if let Some(index) = self.setting_index(name) {
            self.emit(Op::LoadSetting { dst, index });
        } else {
            self.unknown_name(name, span);
        }
    }

    pub(super) fn session_index(&self, name: &str) -> Option<u16> {
        let name = name.strip_prefix("session.")?;
        let at = self.program.session_vars.iter().position(|(n, _)| n == name)?;
        u16::try_from(at).ok()
    }

    fn setting_index(&self, name: &str) -> Option<u16> {
        let name = name.strip_prefix("setting.")?;
        u16::try_from(self.program.settings.iter().position(|s| s.name == name)?).ok()
    }

    fn unknown_name(&mut self, name: &str, span: Span) {
        let mut known: Vec<String> = self.scopes.iter().flat_map(HashMap::keys).cloned().collect();
        known.extend(self.var_names.keys().map(|n| (*n).to_owned()));
        known.extend(self.defines.keys().map(|n| (*n).to_owned()));
        known.extend(Builtin::ALL.iter().map(|(n, _)| (*n).to_owned()));
        known.extend(Kind::ALL.iter().map(|(n, _)| (*n).to_owned()));
        known.extend(self.program.session_vars.iter().map(|(n, _)| format!("session.{n}")));
        known.extend(self.program.settings.iter().map(|s| format!("setting.{}", s.name)));
        let hint = match nearest(name, known.iter().map(String::as_str)) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!(
                "a value lives in the block that sets it; for use after it, write `{name} = null` before the block"
            ),
        };
        self.finding(span, format!("nothing is called `{name}` here")).hint = Some(hint);
    }

    /// A function, a read with a length, an encoding, or a definition.
    fn call_function(&mut self, name: &'a Name, args: &'a [Expr], dst: Reg) {
        let text = name.text.as_str();
        if self.defines.contains_key(text) {
            self.expand(name, args, dst);
        } else if let Some((fun, least, most)) = Fun::named(text) {
            if !(least..=most).contains(&args.len()) {
                let wanted =
                    if least == most { least.to_string() } else { format!("{least} to {most}") };
                self.finding(name.span, format!("`{text}` is given {} values", args.len()))
                    .expected = Some(wanted);
                return;
            }
            if fun == Fun::Datetime {
                self.datetime_patterns(args);
            }
            match (fun, args) {
                (Fun::Number, [text]) => {
                    let src = self.eval(text);
                    self.emit(Op::Number { dst, src });
                    return;
                }
                (Fun::Unless, [value, others @ ..]) => {
                    let others: Option<Vec<Val>> = others.iter().map(fold).collect();
                    if let Some(others) = others {
                        self.eval_into(value, dst);
                        for other in others {
                            let index = self.add_const(other);
                            self.emit(Op::NullIf { reg: dst, index });
                        }
                        return;
                    }
                }
                _ => {}
            }
            let first = self.arguments(args);
            let count = u8::try_from(args.len()).unwrap_or(u8::MAX);
            self.emit(Op::Apply { fun, dst, first, count });
        } else if matches!(text, "bytes" | "text") {
            let [count] = args else {
                self.finding(name.span, format!("`{text}` reads a count of bytes")).expected =
                    Some(format!("`{text}(COUNT)`"));
                return;
            };
            let count = self.eval(count);
            self.emit(Op::Take { dst, count, text: text == "text" });
        } else if text == "join" {
            self.emit(Op::Begin);
            self.parts(args);
            self.emit(Op::Join { dst });
        } else if Kind::named(text).is_some() {
            self.emit(Op::Begin);
            self.part_call(name, args);
            self.emit(Op::Join { dst });
        } else {
            let known: Vec<&str> = Fun::ALL
                .iter()
                .map(|f| f.0)
                .chain(self.defines.keys().copied())
                .chain(["bytes", "text", "join", "until"])
                .collect();
            self.unknown(name, "function", known.iter().copied());
        }
    }

    fn datetime_patterns(&mut self, args: &[Expr]) {
        for pattern in args.iter().step_by(2) {
            if !matches!(pattern.kind, ExprKind::Text(_)) {
                self.finding(pattern.span, "this is no pattern of a time").expected =
                    Some("text such as \"DDMMYY\"".into());
            }
        }
        if args.len() % 2 == 1
            && let Some(last) = args.last()
        {
            self.finding(last.span, "the pattern has no text to read").expected =
                Some("pairs of pattern and text".into());
        }
    }

    /// Appends to the output: integers by their kind, all else as its bytes.
    pub(super) fn parts(&mut self, parts: &'a [Expr]) {
        for part in parts {
            let mark = self.next;
            match &part.kind {
                ExprKind::Call { name, args }
                    if Kind::named(&name.text).is_some()
                        && !self.defines.contains_key(name.text.as_str()) =>
                {
                    self.part_call(name, args);
                }
                _ => {
                    let src = self.eval(part);
                    self.emit(Op::Emit { src });
                }
            }
            self.next = mark;
        }
    }

    fn part_call(&mut self, name: &Name, args: &'a [Expr]) {
        let (Some(kind), [value]) = (Kind::named(&name.text), args) else {
            self.finding(name.span, format!("`{}` writes one number", name.text)).expected =
                Some(format!("`{}(NUMBER)`", name.text));
            return;
        };
        if kind.is_float() {
            self.finding(name.span, "floats cannot be written").expected =
                Some("a kind of whole number".into());
        }
        let src = self.eval(value);
        self.emit(Op::EmitInt { kind, src });
    }

    /// Evaluates a definition with its parameters bound; it sees no variables but those.
    fn expand(&mut self, name: &Name, args: &'a [Expr], dst: Reg) {
        let Some(define) = self.defines.get(name.text.as_str()) else { return };
        let (params, body) = (define.params, define.body);
        if self.expanding.contains(&name.text) || self.expanding.len() >= EXPANSION_MAX {
            self.finding(name.span, format!("`{}` is defined by itself", name.text)).hint =
                Some("a definition must end in reads and functions".into());
            return;
        }
        if params.len() != args.len() {
            self.finding(name.span, format!("`{}` is given {} values", name.text, args.len()))
                .expected = Some(params.len().to_string());
            return;
        }
        let mut scope = HashMap::new();
        for (param, arg) in params.iter().zip(args) {
            let reg = self.eval(arg);
            scope.insert(param.text.clone(), reg);
        }
        let outer = std::mem::replace(&mut self.scopes, vec![scope]);
        self.expanding.push(name.text.clone());
        self.eval_into(body, dst);
        self.expanding.pop();
        self.scopes = outer;
    }
}

/// The value of an expression of literals only.
pub(super) fn fold(expr: &Expr) -> Option<Val> {
    let context = Context { input: &[], derived: &[], pool: &[], inflate_bytes_max: 0, cost: 0 };
    Some(match &expr.kind {
        ExprKind::Null => Val::Null,
        ExprKind::Bool(b) => Val::Bool(*b),
        ExprKind::Int(n) => Val::int(*n),
        ExprKind::Dec(d) => Val::Dec(*d),
        ExprKind::Text(text) => Val::Text(text.as_str().into()),
        ExprKind::Bytes(bytes) => Val::Bytes(bytes.as_slice().into()),
        ExprKind::Date(seconds) => Val::Time(seconds.saturating_mul(1_000_000)),
        ExprKind::Unary { op: op @ (UnaryOp::Minus | UnaryOp::Invert), value } => {
            arithmetic::unary(*op, &fold(value)?)
        }
        ExprKind::Binary { op, left, right } if !matches!(op, BinaryOp::And | BinaryOp::Or) => {
            arithmetic::binary(&context, *op, &fold(left)?, &fold(right)?)
        }
        _ => return None,
    })
}
