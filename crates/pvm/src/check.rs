//! What must hold across rules: none calls itself, and messages are opened where values are stored.

use std::collections::HashMap;

use crate::ast::{Expr, ExprKind, Stmt, StmtKind, Target};
use crate::diagnostics::Finding;
use crate::lexer::Span;

/// A rule, a block `on`, a command or an error's answer.
pub(crate) struct Body<'a> {
    pub(crate) name: &'a str,
    pub(crate) body: &'a [Stmt],
    pub(crate) span: Span,
}

/// What a rule asks of its callers.
#[derive(Clone, Copy, Default)]
struct Facts {
    /// It stores values and opens no message for them.
    stores: bool,
    /// It opens a message.
    opens: bool,
}

/// Adds what is wrong to `findings`.
pub(crate) fn check(bodies: &[Body<'_>], findings: &mut Vec<Finding>) {
    let by_name: HashMap<&str, usize> =
        bodies.iter().enumerate().map(|(at, b)| (b.name, at)).collect();
    let mut checker =
        Checker { bodies, by_name, facts: vec![None; bodies.len()], path: Vec::new(), findings };
    for (at, body) in bodies.iter().enumerate() {
        let facts = checker.facts(at);
        let entry = ["on ", "command ", "error "].iter().any(|kind| body.name.starts_with(kind));
        if entry && facts.stores {
            let finding = Finding::new(
                body.span,
                format!("`{}` stores a value outside of a message", body.name),
            );
            checker
                .findings
                .push(finding.hint("put what belongs to one message into `message { … }`"));
        }
    }
}

struct Checker<'a, 'f> {
    bodies: &'a [Body<'a>],
    by_name: HashMap<&'a str, usize>,
    facts: Vec<Option<Facts>>,
    path: Vec<usize>,
    findings: &'f mut Vec<Finding>,
}

impl Checker<'_, '_> {
    fn facts(&mut self, at: usize) -> Facts {
        if let Some(Some(facts)) = self.facts.get(at) {
            return *facts;
        }
        let Some(body) = self.bodies.get(at) else { return Facts::default() };
        if self.path.contains(&at) {
            let finding = Finding::new(body.span, format!("rule `{}` calls itself", body.name));
            self.findings
                .push(finding.hint("use `repeat`: rules cannot call each other in a circle"));
            return Facts::default();
        }
        self.path.push(at);
        let mut facts = Facts::default();
        self.block(body.body, false, &mut facts);
        self.path.pop();
        if let Some(slot) = self.facts.get_mut(at) {
            *slot = Some(facts);
        }
        facts
    }

    fn block(&mut self, stmts: &[Stmt], open: bool, facts: &mut Facts) {
        for stmt in stmts {
            match &stmt.kind {
                StmtKind::Set { target: Target::Name(_), .. } => {}
                StmtKind::Set { .. } => facts.stores |= !open,
                StmtKind::Message { body } => {
                    if open {
                        self.nested(stmt.span);
                    }
                    facts.opens = true;
                    self.block(body, true, facts);
                }
                StmtKind::Call { name, .. } => {
                    let Some(callee) = self.by_name.get(name.text.as_str()).copied() else {
                        continue;
                    };
                    let called = self.facts(callee);
                    if open && called.opens {
                        self.nested(name.span);
                    }
                    facts.stores |= called.stores && !open;
                    facts.opens |= called.opens;
                }
                _ => each_block(stmt, &mut |block| self.block(block, open, facts)),
            }
        }
    }

    fn nested(&mut self, span: Span) {
        let finding = Finding::new(span, "a message is opened within a message");
        self.findings.push(finding.hint("end the first one before: messages do not nest"));
    }
}

/// Calls `see` with each block of `stmt`.
pub(crate) fn each_block<'s>(stmt: &'s Stmt, see: &mut dyn FnMut(&'s [Stmt])) {
    match &stmt.kind {
        StmtKind::If { then, otherwise, .. } => {
            see(then);
            see(otherwise);
        }
        StmtKind::Switch { cases, otherwise, .. } => {
            for case in cases {
                see(&case.body);
            }
            if let Some(block) = otherwise {
                see(block);
            }
        }
        StmtKind::Repeat { body, .. }
        | StmtKind::Within { body, .. }
        | StmtKind::Message { body } => see(body),
        StmtKind::Attempt { body, otherwise } => {
            see(body);
            see(otherwise);
        }
        StmtKind::Login { refused: Some(block), .. } => see(block),
        _ => {}
    }
}

/// Calls `see` with each expression of `stmt` and of the statements in it.
pub(crate) fn expressions<'s>(stmt: &'s Stmt, see: &mut dyn FnMut(&'s Expr)) {
    match &stmt.kind {
        StmtKind::Set { target, value, .. } => {
            if let Target::Dynamic(expr) | Target::Entry(_, expr) = target {
                see(expr);
            }
            see(value);
        }
        StmtKind::Check { condition: expr, .. }
        | StmtKind::If { condition: expr, .. }
        | StmtKind::Repeat { count: Some(expr), .. }
        | StmtKind::Within { part: expr, .. }
        | StmtKind::Answer { value: expr, .. }
        | StmtKind::Skip { count: expr } => see(expr),
        StmtKind::Switch { subject, cases, .. } => {
            see(subject);
            cases.iter().flat_map(|case| &case.values).for_each(&mut *see);
        }
        StmtKind::Login { ident, password, .. } => {
            see(ident);
            password.iter().for_each(&mut *see);
        }
        StmtKind::Reply { parts } => parts.iter().for_each(&mut *see),
        StmtKind::Call { args, .. } => args.iter().for_each(&mut *see),
        _ => {}
    }
    each_block(stmt, &mut |block| {
        for stmt in block {
            expressions(stmt, see);
        }
    });
}

/// Calls `see` with `expr` and every expression in it.
pub(crate) fn subexpressions<'e>(expr: &'e Expr, see: &mut dyn FnMut(&'e Expr)) {
    see(expr);
    match &expr.kind {
        ExprKind::Call { args, .. } => args.iter().for_each(|arg| subexpressions(arg, see)),
        ExprKind::Peek(inner) | ExprKind::Unary { value: inner, .. } => subexpressions(inner, see),
        ExprKind::Binary { left, right, .. } => {
            subexpressions(left, see);
            subexpressions(right, see);
        }
        ExprKind::In { value, low, high } => {
            subexpressions(value, see);
            subexpressions(low, see);
            subexpressions(high, see);
        }
        ExprKind::Choose { condition, then, otherwise } => {
            subexpressions(condition, see);
            subexpressions(then, see);
            subexpressions(otherwise, see);
        }
        _ => {}
    }
}
