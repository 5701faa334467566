//! Expressions, by precedence.

use super::{GivenUp, NESTING_MAX, Parsed, Parser};
use crate::ast::{BinaryOp, Expr, ExprKind, Name, UnaryOp};
use crate::diagnostics::Finding;
use crate::lexer::Tok;

/// Operators of one precedence, loosest first. Bits bind tighter than comparisons: `a & 1 == 0`
/// means `(a & 1) == 0`.
const LEVELS: &[&[(&str, BinaryOp)]] = &[
    &[
        ("==", BinaryOp::Eq),
        ("!=", BinaryOp::Ne),
        ("<=", BinaryOp::Le),
        (">=", BinaryOp::Ge),
        ("<", BinaryOp::Lt),
        (">", BinaryOp::Gt),
    ],
    &[("|", BinaryOp::BitOr)],
    &[("^", BinaryOp::BitXor)],
    &[("&", BinaryOp::BitAnd)],
    &[("<<", BinaryOp::Shl), (">>", BinaryOp::Shr)],
    &[("+", BinaryOp::Add), ("-", BinaryOp::Sub)],
    &[("*", BinaryOp::Mul), ("/", BinaryOp::Div), ("%", BinaryOp::Rem)],
];

impl Parser<'_, '_> {
    pub(super) fn expr(&mut self) -> Parsed<Expr> {
        if self.nesting >= NESTING_MAX {
            let finding = Finding::new(self.span(), "the expression is nested too deeply");
            self.findings.push(finding.hint("name parts of it with `name = …`"));
            return Err(GivenUp);
        }
        self.nesting += 1;
        let parsed = self.choose();
        self.nesting -= 1;
        parsed
    }

    fn choose(&mut self) -> Parsed<Expr> {
        let condition = self.or()?;
        if !self.take("?") {
            return Ok(condition);
        }
        self.newlines();
        let then = self.expr()?;
        self.newlines();
        self.expect(":", "and the other value")?;
        self.newlines();
        let otherwise = self.expr()?;
        let span = condition.span.to(otherwise.span);
        let (condition, then, otherwise) =
            (Box::new(condition), Box::new(then), Box::new(otherwise));
        Ok(Expr { kind: ExprKind::Choose { condition, then, otherwise }, span })
    }

    /// Counts a link of a chain of operators: a long chain is a deep tree.
    fn link(&mut self, length: &mut usize) -> Parsed<()> {
        *length += 1;
        if *length > NESTING_MAX { self.unexpected("a shorter expression") } else { Ok(()) }
    }

    fn or(&mut self) -> Parsed<Expr> {
        let mut left = self.and()?;
        let mut length = 0_usize;
        while self.take_word("or") {
            self.newlines();
            self.link(&mut length)?;
            left = binary(BinaryOp::Or, left, self.and()?);
        }
        Ok(left)
    }

    fn and(&mut self) -> Parsed<Expr> {
        let mut left = self.not()?;
        let mut length = 0_usize;
        while self.take_word("and") {
            self.newlines();
            self.link(&mut length)?;
            left = binary(BinaryOp::And, left, self.not()?);
        }
        Ok(left)
    }

    fn not(&mut self) -> Parsed<Expr> {
        let start = self.span();
        if !self.is_word("not") {
            return self.comparison();
        }
        let mut count = 0_usize;
        while self.take_word("not") {
            count += 1;
        }
        let value = self.comparison()?;
        if count.is_multiple_of(2) {
            return Ok(value);
        }
        let span = start.to(value.span);
        Ok(Expr { kind: ExprKind::Unary { op: UnaryOp::Not, value: Box::new(value) }, span })
    }

    fn comparison(&mut self) -> Parsed<Expr> {
        let left = self.level(0)?;
        if !self.take_word("in") {
            return Ok(left);
        }
        let low = self.level(1)?;
        self.expect("..", "between the least and the greatest value")?;
        let high = self.level(1)?;
        let span = left.span.to(high.span);
        let (value, low, high) = (Box::new(left), Box::new(low), Box::new(high));
        Ok(Expr { kind: ExprKind::In { value, low, high }, span })
    }

    fn level(&mut self, level: usize) -> Parsed<Expr> {
        let Some(operators) = LEVELS.get(level) else { return self.unary() };
        let mut left = self.level(level + 1)?;
        let mut length = 0_usize;
        loop {
            let op = operators.iter().find(|(punct, _)| self.is(punct)).map(|(_, op)| *op);
            let Some(op) = op else { return Ok(left) };
            self.advance();
            self.newlines();
            self.link(&mut length)?;
            left = binary(op, left, self.level(level + 1)?);
        }
    }

    fn unary(&mut self) -> Parsed<Expr> {
        let start = self.span();
        let op = match self.tok() {
            Tok::Punct("-") => UnaryOp::Minus,
            Tok::Punct("~") => UnaryOp::Invert,
            _ => return self.primary(),
        };
        self.advance();
        let value = self.primary()?;
        let span = start.to(value.span);
        Ok(Expr { kind: ExprKind::Unary { op, value: Box::new(value) }, span })
    }

    fn primary(&mut self) -> Parsed<Expr> {
        let span = self.span();
        let kind = match self.tok().clone() {
            Tok::Int(n) => ExprKind::Int(n),
            Tok::Dec(d) => ExprKind::Dec(d),
            Tok::Text(text) => ExprKind::Text(text),
            Tok::Bytes(bytes) => ExprKind::Bytes(bytes),
            Tok::Date(seconds) => ExprKind::Date(seconds),
            Tok::Punct("(") => {
                self.advance();
                let inner = self.expr()?;
                self.expect(")", "to match `(`")?;
                return Ok(Expr { kind: inner.kind, span: span.to(self.before()) });
            }
            Tok::Name(word) => return self.named(word),
            _ => return self.unexpected("a value"),
        };
        self.advance();
        Ok(Expr { kind, span })
    }

    fn named(&mut self, word: String) -> Parsed<Expr> {
        let start = self.span();
        self.advance();
        let kind = match word.as_str() {
            "null" => ExprKind::Null,
            "true" => ExprKind::Bool(true),
            "false" => ExprKind::Bool(false),
            "peek" => {
                let inner = self.name("what to look at, such as `peek u8`")?;
                let kind = ExprKind::Name(inner.text);
                ExprKind::Peek(Box::new(Expr { kind, span: inner.span }))
            }
            "until" => {
                let delimiter = match self.tok().clone() {
                    Tok::Text(text) if !text.is_empty() => text.into_bytes(),
                    Tok::Bytes(bytes) if !bytes.is_empty() => bytes,
                    _ => return self.unexpected("the delimiter, such as `until \";\"`"),
                };
                self.advance();
                let or_end = self.is_word("or")
                    && matches!(self.tokens.get(self.at + 1), Some(t) if t.tok == Tok::Name("end".into()));
                if or_end {
                    self.advance();
                    self.advance();
                }
                ExprKind::Until { delimiter, or_end }
            }
            _ => {
                let name = Name { text: word, span: start };
                if self.take("(") {
                    let mut args = Vec::new();
                    if !self.is(")") {
                        args = self.list()?;
                    }
                    self.expect(")", "after the arguments")?;
                    ExprKind::Call { name, args }
                } else {
                    ExprKind::Name(name.text)
                }
            }
        };
        Ok(Expr { kind, span: start.to(self.before()) })
    }
}

fn binary(op: BinaryOp, left: Expr, right: Expr) -> Expr {
    let span = left.span.to(right.span);
    Expr { kind: ExprKind::Binary { op, left: Box::new(left), right: Box::new(right) }, span }
}
