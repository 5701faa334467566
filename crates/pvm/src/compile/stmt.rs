//! Statements to instructions.

use std::collections::HashMap;

use fieldline_model::{CloseCode, Decimal};

use super::expr::fold;
use super::{Compiler, Loop};
use crate::ast::{BinaryOp, Case, Expr, ExprKind, Name, Stmt, StmtKind, Target};
use crate::lexer::Span;
use crate::op::{Builtin, Kind, Op, Reg};
use crate::vm::value::Val;

/// Stands for "no register".
pub(crate) const NO_REG: Reg = Reg::MAX;

impl<'a> Compiler<'a, '_> {
    pub(super) fn statements(&mut self, stmts: &'a [Stmt]) {
        for (at, stmt) in stmts.iter().enumerate() {
            if self.full {
                return;
            }
            self.line = self.lines.line(stmt.span.start);
            self.statement(stmt);
            let ends =
                matches!(stmt.kind, StmtKind::Fail { .. } | StmtKind::Done | StmtKind::Break);
            if ends && let Some(next) = stmts.get(at + 1) {
                self.finding(next.span, "this is never reached").hint =
                    Some("the statement before it ends the block".into());
            }
        }
    }

    /// A block with its own variables.
    fn block(&mut self, stmts: &'a [Stmt]) {
        let mark = self.next;
        self.scopes.push(HashMap::new());
        self.statements(stmts);
        self.scopes.pop();
        self.next = mark;
    }

    /// A block that is left only at its end.
    fn closed_block(&mut self, what: &'static str, stmts: &'a [Stmt]) {
        self.blocks.push(what);
        self.block(stmts);
        self.blocks.pop();
    }

    fn statement(&mut self, stmt: &'a Stmt) {
        let mark = self.next;
        match &stmt.kind {
            StmtKind::Set { target, value, reads, otherwise } => {
                self.set(target, value, *reads, otherwise.as_ref());
                return;
            }
            StmtKind::Check { condition, class } => {
                let src = self.eval(condition);
                let class = self.class_of(class);
                self.emit(Op::Check { src, class });
            }
            StmtKind::Fail { class } => {
                let class = self.class_of(class);
                self.emit(Op::Fail { class });
            }
            StmtKind::If { condition, then, otherwise } => {
                let src = self.eval(condition);
                let to_otherwise = self.emit(Op::JumpIfNot { src, to: 0 });
                self.block(then);
                if otherwise.is_empty() {
                    self.land(to_otherwise);
                } else {
                    let to_end = self.emit(Op::Jump { to: 0 });
                    self.land(to_otherwise);
                    self.block(otherwise);
                    self.land(to_end);
                }
            }
            StmtKind::Switch { subject, cases, otherwise } => {
                self.switch(subject, cases, otherwise.as_deref());
            }
            StmtKind::Repeat { count: Some(count), body } => {
                let reg = self.register(count.span);
                self.eval_into(count, reg);
                self.emit(Op::Count { reg });
                if let Some(entries) = self.entries(reg, body) {
                    self.emit(entries);
                } else {
                    let top = self.here();
                    let next = self.emit(Op::Next { reg, to: 0 });
                    self.loop_body(top, next, body);
                }
            }
            StmtKind::Repeat { count: None, body } => {
                let reg = self.register(stmt.span);
                let index = self.add_const(Val::Null);
                self.emit(Op::Const { dst: reg, index });
                let top = self.here();
                let next = self.emit(Op::NextInner { reg, to: 0 });
                self.loop_body(top, next, body);
            }
            StmtKind::Within { part, body } => {
                let part = self.eval(part);
                let at = self.emit(Op::Within { part, to: 0 });
                self.closed_block("within", body);
                self.emit(Op::Leave);
                self.land(at);
            }
            StmtKind::Message { body } => {
                self.emit(Op::MessageBegin);
                self.closed_block("message", body);
                self.emit(Op::MessageEnd);
            }
            StmtKind::Attempt { body, otherwise } => {
                let begin = self.emit(Op::Attempt { to: 0 });
                self.closed_block("attempt", body);
                let end = self.emit(Op::AttemptEnd { to: 0 });
                self.land(begin);
                self.block(otherwise);
                self.land(end);
            }
            StmtKind::Login { ident, password, refused } => {
                self.login(ident, password.as_ref(), refused.as_deref());
            }
            StmtKind::Reply { parts } => {
                self.emit(Op::Begin);
                self.parts(parts);
                self.emit(Op::Reply);
            }
            StmtKind::Answer { value, accepted } => {
                let src = self.eval(value);
                self.emit(Op::Answer { src, accepted: *accepted });
            }
            StmtKind::Close { code } => {
                let code = match code {
                    Some(name) => self.close_code(name),
                    None => CloseCode::ProtocolError,
                };
                self.emit(Op::Close { code: code.number() });
            }
            StmtKind::Done => {
                self.emit(Op::Done);
            }
            StmtKind::Break => self.leave_loop(stmt.span),
            StmtKind::Skip { count } => {
                let count = self.eval(count);
                self.emit(Op::Skip { count });
            }
            StmtKind::Expect => {
                if !self.in_command {
                    self.finding(stmt.span, "only a command expects an answer");
                }
                self.emit(Op::Expect);
            }
            StmtKind::Call { name, args } => self.call_rule(name, args),
        }
        self.next = mark;
    }

    fn loop_body(&mut self, top: u32, next: usize, body: &'a [Stmt]) {
        self.loops.push(Loop { exits: vec![next], blocks: self.blocks.len() });
        self.block(body);
        self.emit(Op::Jump { to: top });
        for exit in self.loops.pop().map(|l| l.exits).unwrap_or_default() {
            self.land(exit);
        }
    }

    fn leave_loop(&mut self, span: Span) {
        match self.loops.last() {
            None => {
                self.finding(span, "there is no loop to leave");
            }
            Some(innermost) if innermost.blocks != self.blocks.len() => {
                let block = self.blocks.last().copied().unwrap_or("within");
                self.finding(span, format!("`break` cannot leave a `{block}`")).hint =
                    Some("set a variable there and leave the loop after the block".into());
            }
            Some(_) => {
                let at = self.emit(Op::Jump { to: 0 });
                if let Some(innermost) = self.loops.last_mut() {
                    innermost.exits.push(at);
                }
            }
        }
    }

    /// A loop whose body is one table entry of plain numbers runs as one instruction.
    fn entries(&mut self, count: Reg, body: &'a [Stmt]) -> Option<Op> {
        if self.traced {
            return None;
        }
        let [Stmt { kind: StmtKind::Set { target, value, reads: true, otherwise: None }, .. }] =
            body
        else {
            return None;
        };
        match self.entry(target, value)? {
            Op::Entry { table, id, value } => Some(Op::Entries { count, table, id, value }),
            _ => None,
        }
    }

    fn entry(&mut self, target: &Target, value: &Expr) -> Option<Op> {
        let Target::Entry(table, id) = target else { return None };
        let table = *self.table_names.get(table.text.as_str())?;
        let number = |expr: &Expr| self.number_kind(expr).filter(|k| k.is_unsigned());
        Some(Op::Entry { table, id: number(id)?, value: number(value)? })
    }

    /// The kind, if the expression only reads a number.
    fn number_kind(&self, expr: &Expr) -> Option<Kind> {
        match &expr.kind {
            ExprKind::Name(name)
                if self.local(name).is_none()
                    && !self.defines.contains_key(name.as_str())
                    && !self.var_names.contains_key(name.as_str()) =>
            {
                Kind::named(name)
            }
            _ => None,
        }
    }

    /// `#param: u16 * 0.1` as one instruction, if nothing else needs the value.
    fn read_param(&mut self, name: &Name, value: &Expr) -> Option<Op> {
        if self.traced || name.text == "timestamp" || self.referenced.contains(&name.text) {
            return None;
        }
        let (kind, factor) = match &value.kind {
            ExprKind::Binary { op: BinaryOp::Mul, left, right } => {
                let factor = match fold(right)? {
                    Val::Dec(factor) => factor,
                    Val::Int(factor) => Decimal::new(factor, 0)?,
                    _ => return None,
                };
                (self.number_kind(left).filter(|k| !k.is_float())?, Some(factor))
            }
            _ => (self.number_kind(value)?, None),
        };
        let scale = factor.map_or(0, |factor| self.add_scale(factor));
        let name = self.add_name(&name.text, name.span);
        Some(Op::ReadParam { name, kind, scale })
    }

    fn set(&mut self, target: &'a Target, value: &'a Expr, reads: bool, otherwise: Option<&Name>) {
        let does_read = self.reads(value, 0);
        let before = self.findings.len();
        self.set_target(target, value, reads, otherwise);
        // What is unknown may have been meant to read.
        if reads == does_read || self.findings.len() > before {
            return;
        }
        if reads {
            self.finding(value.span, "this reads no bytes").hint =
                Some("`name: …` is for fields of the frame; write `name = …`".into());
        } else {
            self.finding(value.span, "this reads bytes").hint =
                Some("`name = …` is for what is computed; write `name: …`".into());
        }
    }

    fn set_target(
        &mut self,
        target: &'a Target,
        value: &'a Expr,
        reads: bool,
        otherwise: Option<&Name>,
    ) {
        if otherwise.is_none() {
            let quick = match target {
                Target::Param(name) => self.read_param(name, value),
                Target::Entry(..) if !self.traced => self.entry(target, value),
                _ => None,
            };
            if let Some(op) = quick {
                self.emit(op);
                return;
            }
        }
        match target {
            Target::Name(name) => self.set_name(name, value, reads, otherwise),
            Target::Param(name) => {
                let kept = self.referenced.contains(&name.text) && name.text != "timestamp";
                let mark = self.next;
                let src = if kept { self.variable(name) } else { self.register(value.span) };
                self.begin_field(reads);
                self.eval_into(value, src);
                self.require(src, otherwise);
                if name.text == "timestamp" {
                    self.emit(Op::StoreTime { src });
                } else {
                    let name = self.add_name(&name.text, name.span);
                    self.emit(Op::Store { name, src });
                }
                self.end_field(&name.text, name.span, reads, src);
                if !kept {
                    self.next = mark;
                }
            }
            Target::Dynamic(name) => {
                let mark = self.next;
                let name = self.eval(name);
                self.begin_field(reads);
                let src = self.eval(value);
                self.emit(Op::StoreDynamic { name, src });
                self.require(src, otherwise);
                if self.traced {
                    self.emit(Op::FieldDynamic { name, src });
                }
                self.next = mark;
            }
            Target::Entry(table, id) => {
                let mark = self.next;
                let Some(at) = self.table_names.get(table.text.as_str()).copied() else {
                    let known: Vec<&str> = self.table_names.keys().copied().collect();
                    self.unknown(table, "table", known.iter().copied());
                    return;
                };
                let id = self.eval(id);
                let width = self.number_kind(value).map_or(0, Kind::width);
                self.begin_field(reads);
                let src = self.eval(value);
                self.require(src, otherwise);
                let bytes = u8::try_from(width).unwrap_or(0);
                self.emit(Op::StoreEntry { table: at, id, src, bytes });
                if self.traced {
                    self.emit(Op::FieldEntry { table: at, id, src });
                }
                self.next = mark;
            }
        }
    }

    fn require(&mut self, src: Reg, otherwise: Option<&Name>) {
        if let Some(class) = otherwise {
            let class = self.class_of(class);
            self.emit(Op::Require { src, class });
        }
    }

    fn begin_field(&mut self, reads: bool) {
        if self.traced && reads {
            self.emit(Op::FieldStart);
        }
    }

    fn end_field(&mut self, name: &str, span: Span, reads: bool, src: Reg) {
        if self.traced {
            let name = self.add_name(name, span);
            self.emit(if reads { Op::Field { name, src } } else { Op::Shown { name, src } });
        }
    }

    /// The register of a variable, taken if it is new.
    fn variable(&mut self, name: &Name) -> Reg {
        if let Some(reg) = self.local(&name.text) {
            return reg;
        }
        self.not_reserved(name);
        let reg = self.register(name.span);
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name.text.clone(), reg);
        }
        reg
    }

    fn set_name(&mut self, name: &'a Name, value: &'a Expr, reads: bool, otherwise: Option<&Name>) {
        let var = self.var_names.get(name.text.as_str()).copied();
        let session = self.session_index(&name.text);
        let builtin = Builtin::ALL.iter().any(|(n, _)| *n == name.text);
        if builtin
            || Kind::named(&name.text).is_some()
            || self.defines.contains_key(name.text.as_str())
        {
            self.finding(name.span, format!("`{}` cannot be set", name.text)).hint =
                Some("it has a meaning of its own; use another name".into());
            return;
        }
        let mark = self.next;
        let known = self.local(&name.text);
        // The old value may be needed until the new one is complete.
        let fresh = known.is_none() && var.is_none() && session.is_none();
        let src = self.register(value.span);
        self.begin_field(reads);
        self.eval_into(value, src);
        self.require(src, otherwise);
        if let Some(index) = session {
            self.emit(Op::StoreSession { index, src });
        } else if let Some(dst) = known {
            self.emit(Op::Move { dst, src });
        } else if let Some(index) = var {
            self.emit(Op::StoreVar { index, src });
        } else {
            self.not_reserved(name);
            if let Some(scope) = self.scopes.last_mut() {
                scope.insert(name.text.clone(), src);
            }
        }
        self.end_field(&name.text, name.span, reads, src);
        if !fresh {
            self.next = mark;
        }
    }

    fn switch(&mut self, subject: &'a Expr, cases: &'a [Case], otherwise: Option<&'a [Stmt]>) {
        let src = self.eval(subject);
        let mut ends = Vec::new();
        let mut seen: Vec<u16> = Vec::new();
        for case in cases {
            let mut bodies = Vec::new();
            let mut miss = None;
            for (at, value) in case.values.iter().enumerate() {
                if let Some(miss) = miss.take() {
                    self.land(miss);
                }
                let constant = self.constant(value);
                let index = self.add_const(constant);
                if seen.contains(&index) {
                    self.finding(value.span, "this case stands twice").hint =
                        Some("the first one is taken".into());
                }
                seen.push(index);
                miss = Some(self.emit(Op::JumpUnless { src, index, to: 0 }));
                if at + 1 < case.values.len() {
                    bodies.push(self.emit(Op::Jump { to: 0 }));
                }
            }
            for body in bodies {
                self.land(body);
            }
            self.block(&case.body);
            ends.push(self.emit(Op::Jump { to: 0 }));
            if let Some(miss) = miss {
                self.land(miss);
            }
        }
        if let Some(block) = otherwise {
            self.block(block);
        }
        for end in ends {
            self.land(end);
        }
    }

    fn login(&mut self, ident: &'a Expr, password: Option<&'a Expr>, refused: Option<&'a [Stmt]>) {
        let ident = self.eval(ident);
        self.takes_password |= password.is_some();
        let password = password.map_or(NO_REG, |p| self.eval(p));
        let login = self.emit(Op::Login { ident, password, to: 0 });
        let accepted = self.emit(Op::Jump { to: 0 });
        self.land(login);
        self.block(refused.unwrap_or(&[]));
        self.emit(Op::Close { code: CloseCode::UnknownDevice.number() });
        self.emit(Op::Done);
        self.land(accepted);
    }

    fn call_rule(&mut self, name: &'a Name, args: &'a [Expr]) {
        let Some((rule, count)) = self.rule_names.get(name.text.as_str()).copied() else {
            let known: Vec<&str> = self.rule_names.keys().copied().collect();
            self.unknown(name, "rule", known.iter().copied());
            return;
        };
        if args.len() != count {
            self.finding(name.span, format!("`{}` is given {} values", name.text, args.len()))
                .expected = Some(count.to_string());
        }
        let base = Reg::try_from(self.next).unwrap_or(0);
        for arg in args {
            let reg = self.register(arg.span);
            self.eval_into(arg, reg);
        }
        self.emit(Op::Call { rule, base });
    }
}
