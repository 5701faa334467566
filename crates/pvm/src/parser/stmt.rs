//! Statements.

use super::{Parsed, Parser};
use crate::ast::{Case, Name, Stmt, StmtKind, Target};
use crate::diagnostics::{Finding, nearest};
use crate::lexer::Tok;

const WORDS: &[&str] = &[
    "check", "fail", "if", "switch", "repeat", "within", "message", "attempt", "login", "reply",
    "send", "answer", "close", "done", "break", "skip", "expect",
];

impl Parser<'_, '_> {
    pub(super) fn stmt(&mut self) -> Parsed<StmtKind> {
        let word = match self.tok().clone() {
            Tok::Param(name) => {
                let name = Name { text: name, span: self.span() };
                self.advance();
                if !self.take("[") {
                    return self.set(Target::Param(name));
                }
                let index = self.expr()?;
                self.expect("]", "after the id")?;
                return self.set(Target::Entry(name, index));
            }
            Tok::Punct("#") => {
                self.advance();
                self.expect("(", "and the parameter's name")?;
                let name = self.expr()?;
                self.expect(")", "after the parameter's name")?;
                return self.set(Target::Dynamic(name));
            }
            Tok::Name(word) => word,
            _ => return self.unexpected("a statement"),
        };
        let name = Name { text: word.clone(), span: self.span() };
        self.advance();
        // What follows decides: words such as `close` may also name a field.
        if self.is(":") || self.is("=") {
            return self.set(Target::Name(name));
        }
        if !WORDS.contains(&word.as_str()) {
            return self.call(name);
        }
        Ok(match word.as_str() {
            "check" => {
                let condition = self.expr()?;
                if !self.take_word("else") {
                    return self.unexpected("`else` and the class of error");
                }
                StmtKind::Check { condition, class: self.name("the class of error")? }
            }
            "fail" => StmtKind::Fail { class: self.name("the class of error")? },
            "if" => self.condition()?,
            "switch" => self.switch()?,
            "repeat" => {
                let to_end = self.is_word("to");
                let count = if to_end {
                    self.advance();
                    if !self.take_word("end") {
                        return self.unexpected("`end`");
                    }
                    None
                } else {
                    Some(self.expr()?)
                };
                StmtKind::Repeat { count, body: self.block()? }
            }
            "within" => {
                let part = self.expr()?;
                StmtKind::Within { part, body: self.block()? }
            }
            "message" => StmtKind::Message { body: self.block()? },
            "attempt" => {
                let body = self.block()?;
                let otherwise = if self.take_word("else") { self.block()? } else { Vec::new() };
                StmtKind::Attempt { body, otherwise }
            }
            "login" => {
                let ident = self.expr()?;
                let password = if self.take_word("password") { Some(self.expr()?) } else { None };
                let refused = if self.take_word("refused") { Some(self.block()?) } else { None };
                StmtKind::Login { ident, password, refused }
            }
            "reply" | "send" => StmtKind::Reply { parts: self.list()? },
            "answer" => {
                let accepted = !self.take_word("refused");
                StmtKind::Answer { value: self.expr()?, accepted }
            }
            "close" => {
                let named = matches!(self.tok(), Tok::Name(_));
                StmtKind::Close {
                    code: if named { Some(self.name("a close code")?) } else { None },
                }
            }
            "done" => StmtKind::Done,
            "break" => StmtKind::Break,
            "skip" => StmtKind::Skip { count: self.expr()? },
            _ => {
                if !self.take_word("answer") {
                    return self.unexpected("`answer`");
                }
                StmtKind::Expect
            }
        })
    }

    fn set(&mut self, target: Target) -> Parsed<StmtKind> {
        let reads = self.is(":");
        if !reads && !self.is("=") {
            return self.unexpected("`:` and what is read, or `=` and a value");
        }
        self.advance();
        self.newlines();
        let value = self.expr()?;
        let otherwise =
            if self.take_word("else") { Some(self.name("the class of error")?) } else { None };
        Ok(StmtKind::Set { target, value, reads, otherwise })
    }

    fn call(&mut self, name: Name) -> Parsed<StmtKind> {
        if !self.take("(") {
            let known = nearest(&name.text, WORDS.iter().copied());
            let mut finding =
                Finding::new(name.span, format!("`{}` begins no statement", name.text)).expected(
                    "a field `name: u16`, a value `name = …`, a call `rule()` or a statement",
                );
            finding.hint = known.map(|word| format!("did you mean `{word}`?"));
            self.findings.push(finding);
            return Err(super::GivenUp);
        }
        let mut args = Vec::new();
        if !self.is(")") {
            args = self.list()?;
        }
        self.expect(")", "after the arguments")?;
        Ok(StmtKind::Call { name, args })
    }

    fn condition(&mut self) -> Parsed<StmtKind> {
        let condition = self.expr()?;
        let then = self.block()?;
        let mut otherwise = Vec::new();
        if self.take_word("else") {
            if self.is_word("if") {
                let start = self.span();
                self.advance();
                self.nesting += 1;
                if self.nesting > super::NESTING_MAX {
                    return self.unexpected("fewer `else if`; use `switch`");
                }
                let kind = self.condition()?;
                self.nesting -= 1;
                otherwise = vec![Stmt { kind, span: start.to(self.before()) }];
            } else {
                otherwise = self.block()?;
            }
        }
        Ok(StmtKind::If { condition, then, otherwise })
    }

    fn switch(&mut self) -> Parsed<StmtKind> {
        let subject = self.expr()?;
        self.expect("{", "and the cases")?;
        let mut cases = Vec::new();
        let mut otherwise = None;
        loop {
            self.newlines();
            if self.take("}") {
                return Ok(StmtKind::Switch { subject, cases, otherwise });
            }
            if *self.tok() == Tok::End {
                return self.unexpected("`}` at the end of the cases");
            }
            if self.take_word("else") {
                otherwise = Some(self.block()?);
            } else {
                let values = self.list()?;
                cases.push(Case { values, body: self.block()? });
            }
        }
    }
}
