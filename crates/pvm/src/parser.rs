//! Tokens to tree. After a mistake it goes on with the next line, so that all mistakes are found at once.

mod expr;
mod stmt;

use fieldline_model::Decimal;

use crate::ast::{CommandParam, Expr, File, Item, Name, Row, RowKind, Stmt, StmtKind};
use crate::diagnostics::{Finding, nearest};
use crate::lexer::{Span, Tok, Token, lex};

/// Deepest nesting of blocks and of expressions.
const NESTING_MAX: usize = 48;

/// A statement or item was given up; the finding is already noted.
pub(crate) struct GivenUp;

type Parsed<T> = Result<T, GivenUp>;

/// The tree of `source`, with whatever is wrong added to `findings`.
pub(crate) fn parse(source: &str, findings: &mut Vec<Finding>) -> File {
    let tokens = lex(source, findings);
    let tokens = tokens.into_iter().filter(|t| t.tok != Tok::Comment).collect();
    let mut parser = Parser { source, tokens, at: 0, nesting: 0, findings };
    parser.file()
}

struct Parser<'a, 'f> {
    source: &'a str,
    tokens: Vec<Token>,
    at: usize,
    nesting: usize,
    findings: &'f mut Vec<Finding>,
}

const ITEMS: &[&str] = &[
    "transport",
    "setting",
    "error",
    "session",
    "var",
    "define",
    "table",
    "rule",
    "on",
    "command",
];

impl Parser<'_, '_> {
    fn tok(&self) -> &Tok {
        self.tokens.get(self.at).map_or(&Tok::End, |t| &t.tok)
    }

    fn span(&self) -> Span {
        let end = Span { start: self.source.len(), end: self.source.len() };
        self.tokens.get(self.at).map_or(end, |t| t.span)
    }

    /// End of the token before this one.
    fn before(&self) -> Span {
        self.at.checked_sub(1).and_then(|at| self.tokens.get(at)).map_or(self.span(), |t| t.span)
    }

    fn advance(&mut self) {
        self.at = (self.at + 1).min(self.tokens.len());
    }

    fn is(&self, punct: &str) -> bool {
        matches!(self.tok(), Tok::Punct(p) if *p == punct)
    }

    fn is_word(&self, word: &str) -> bool {
        matches!(self.tok(), Tok::Name(n) if n == word)
    }

    fn take(&mut self, punct: &str) -> bool {
        let found = self.is(punct);
        if found {
            self.advance();
        }
        found
    }

    fn take_word(&mut self, word: &str) -> bool {
        let found = self.is_word(word);
        if found {
            self.advance();
        }
        found
    }

    fn newlines(&mut self) {
        while *self.tok() == Tok::Newline {
            self.advance();
        }
    }

    fn found(&self) -> String {
        match self.tok() {
            Tok::Newline => "the end of the line".into(),
            Tok::End => "the end of the source".into(),
            _ => {
                let span = self.span();
                format!("`{}`", self.source.get(span.start..span.end).unwrap_or(""))
            }
        }
    }

    fn unexpected<T>(&mut self, expected: &str) -> Parsed<T> {
        let message = format!("unexpected {}", self.found());
        self.findings.push(Finding::new(self.span(), message).expected(expected));
        Err(GivenUp)
    }

    fn expect(&mut self, punct: &'static str, after: &str) -> Parsed<()> {
        if self.take(punct) { Ok(()) } else { self.unexpected(&format!("`{punct}` {after}")) }
    }

    fn name(&mut self, what: &str) -> Parsed<Name> {
        if let Tok::Name(text) = self.tok() {
            let name = Name { text: text.clone(), span: self.span() };
            self.advance();
            return Ok(name);
        }
        self.unexpected(what)
    }

    fn names(&mut self, what: &str) -> Parsed<Vec<Name>> {
        let mut names = vec![self.name(what)?];
        while self.take(",") {
            self.newlines();
            names.push(self.name(what)?);
        }
        Ok(names)
    }

    fn text(&mut self, what: &str) -> Parsed<String> {
        if let Tok::Text(text) = self.tok() {
            let text = text.clone();
            self.advance();
            return Ok(text);
        }
        self.unexpected(what)
    }

    fn end_of_line(&mut self) -> Parsed<()> {
        match self.tok() {
            Tok::Newline => {
                self.newlines();
                Ok(())
            }
            Tok::End => Ok(()),
            Tok::Punct("}") => Ok(()),
            _ => self.unexpected("the end of the line"),
        }
    }

    /// After a mistake: to the start of the next line, over blocks that open on the way.
    fn recover(&mut self) {
        let mut depth = 0_usize;
        loop {
            match self.tok() {
                Tok::End => return,
                _ if self.at_item() => return,
                Tok::Newline if depth == 0 => {
                    self.newlines();
                    return;
                }
                Tok::Punct("{") => depth += 1,
                Tok::Punct("}") if depth == 0 => return,
                Tok::Punct("}") => depth -= 1,
                _ => {}
            }
            self.advance();
        }
    }

    fn file(&mut self) -> File {
        let mut file = File::default();
        self.newlines();
        if self.take_word("protocol") {
            let header = self.name("the protocol's name").and_then(|name| {
                let description = self.text("what it is, in quotes")?;
                Ok((name, description))
            });
            match header.and_then(|header| self.end_of_line().map(|()| header)) {
                Ok((name, description)) => {
                    file.name = Some(name);
                    file.description = description;
                }
                Err(GivenUp) => self.recover(),
            }
        } else {
            let finding = Finding::new(self.span(), format!("unexpected {}", self.found()));
            self.findings.push(
                finding
                    .expected("`protocol NAME \"DESCRIPTION\"`")
                    .hint("the first line names the protocol"),
            );
            if !matches!(self.tok(), Tok::Name(word) if ITEMS.contains(&word.as_str())) {
                self.recover();
            }
        }
        loop {
            self.newlines();
            if *self.tok() == Tok::End {
                return file;
            }
            let before = self.at;
            match self.item() {
                Ok(item) => file.items.push(item),
                Err(GivenUp) => self.recover(),
            }
            if self.at == before {
                // A brace that closes nothing.
                self.advance();
            }
        }
    }

    fn item(&mut self) -> Parsed<Item> {
        let Tok::Name(word) = self.tok().clone() else {
            return self.unexpected("a declaration, such as `rule`, `table` or `on tcp`");
        };
        let span = self.span();
        if !ITEMS.contains(&word.as_str()) {
            let mut finding = Finding::new(span, format!("`{word}` begins no declaration"))
                .expected(format!("one of {}", ITEMS.join(", ")));
            finding.hint = match nearest(&word, ITEMS.iter().copied()) {
                Some(known) => Some(format!("did you mean `{known}`?")),
                None => Some("statements stand within `rule NAME { … }` or `on tcp { … }`".into()),
            };
            self.findings.push(finding);
            return Err(GivenUp);
        }
        self.advance();
        let item = match word.as_str() {
            "transport" => Item::Transport(self.names("`tcp` or `udp`")?),
            "setting" => self.setting()?,
            "error" => self.error_classes()?,
            "session" | "var" => {
                let name = self.name("a variable's name")?;
                self.expect("=", "and its first value")?;
                let value = self.expr()?;
                if word == "var" {
                    Item::Var { name, value }
                } else {
                    Item::Session { name, value }
                }
            }
            "define" => {
                let name = self.name("a name for the expression")?;
                let params = self.params()?;
                self.expect("=", "and the expression")?;
                self.newlines();
                Item::Define { name, params, body: self.expr()? }
            }
            "table" => self.table()?,
            "rule" => {
                let name = self.name("the rule's name")?;
                let params = self.params()?;
                Item::Rule { name, params, body: self.block()? }
            }
            "on" => {
                let transports = self.names("`tcp` or `udp`")?;
                Item::On { transports, body: self.block()?, span }
            }
            _ => self.command()?,
        };
        self.end_of_line()?;
        Ok(item)
    }

    /// `(a, b)`, or nothing.
    fn params(&mut self) -> Parsed<Vec<Name>> {
        if !self.take("(") || self.take(")") {
            return Ok(Vec::new());
        }
        let names = self.names("a parameter's name")?;
        self.expect(")", "after the parameters")?;
        Ok(names)
    }

    fn setting(&mut self) -> Parsed<Item> {
        let name = self.name("the setting's name")?;
        self.expect(":", "and its kind")?;
        let kind = self.name("`bool`, `int` or `text`")?;
        self.expect("=", "and its default")?;
        let default = self.expr()?;
        let description = self.text("what it is for, in quotes")?;
        Ok(Item::Setting { name, kind, default, description })
    }

    fn error_classes(&mut self) -> Parsed<Item> {
        let names = self.names("the class of error")?;
        let lenient = self.take_word("lenient");
        let mut close = None;
        if self.take_word("close") {
            let code = match self.tok() {
                Tok::Name(word) if word != "answer" => Some(self.name("a close code")?),
                _ => None,
            };
            close = Some(code);
        }
        let mut answer = Vec::new();
        if self.is_word("answer") {
            let start = self.span();
            self.advance();
            let parts = self.list()?;
            answer.push(Stmt { kind: StmtKind::Reply { parts }, span: start.to(self.before()) });
        }
        Ok(Item::Error { names, lenient, close, answer })
    }

    fn table(&mut self) -> Parsed<Item> {
        let name = self.name("the table's name")?;
        let mut unknown = None;
        if let Tok::Text(text) = self.tok() {
            unknown = Some((text.clone(), self.span()));
            self.advance();
        }
        self.expect("{", "and the table's lines")?;
        let mut rows = Vec::new();
        loop {
            self.newlines();
            if self.take("}") {
                return Ok(Item::Table { name, unknown, rows });
            }
            if *self.tok() == Tok::End || self.at_item() {
                return self.unexpected("`}` at the end of the table");
            }
            match self.row().and_then(|row| self.end_of_line().map(|()| row)) {
                Ok(row) => rows.push(row),
                Err(GivenUp) => self.recover(),
            }
        }
    }

    fn row(&mut self) -> Parsed<Row> {
        let id_span = self.span();
        let id = match *self.tok() {
            Tok::Int(id) => u64::try_from(id).unwrap_or(u64::MAX),
            _ => return self.unexpected("an id, such as `66: external.voltage * 0.001`"),
        };
        self.advance();
        self.expect(":", "and the parameter's name")?;
        let name = self.name("the parameter's name")?;
        let kinds = [
            ("signed", RowKind::Signed),
            ("bool", RowKind::Bool),
            ("text", RowKind::Text),
            ("bytes", RowKind::Bytes),
        ];
        let mut kind = RowKind::Unsigned;
        for (word, named) in kinds {
            if self.take_word(word) {
                kind = named;
                break;
            }
        }
        let factor = if self.take("*") { Some(self.decimal()?) } else { None };
        let offset = if self.is("+") || self.is("-") { Some(self.decimal()?) } else { None };
        let mut except = Vec::new();
        if self.take_word("except") {
            loop {
                let number = self.decimal()?;
                except.push(number.mantissa());
                if !self.take(",") {
                    break;
                }
                self.newlines();
            }
        }
        Ok(Row { id, id_span, name, kind, factor, offset, except })
    }

    /// A literal number with an optional sign.
    fn decimal(&mut self) -> Parsed<Decimal> {
        let negative = self.take("-");
        if !negative {
            self.take("+");
        }
        let number = match *self.tok() {
            Tok::Int(n) => i64::try_from(n).ok().and_then(|n| Decimal::new(n, 0)),
            Tok::Dec(d) => Some(d),
            _ => None,
        };
        let Some(number) = number else { return self.unexpected("a number") };
        self.advance();
        let signed = if negative { -number.mantissa() } else { number.mantissa() };
        Ok(Decimal::new(signed, number.scale()).unwrap_or(number))
    }

    fn command(&mut self) -> Parsed<Item> {
        let name = self.name("the command's name")?;
        let title = self.text("its name for people, in quotes")?;
        self.expect("{", "and the command's parameters")?;
        let mut params = Vec::new();
        self.newlines();
        while self.is_word("param") {
            self.advance();
            let name = self.name("the parameter's name")?;
            self.expect(":", "and its kind")?;
            let kind = self.name("`bool`, `int` or `text`")?;
            let description = self.text("what it is for, in quotes")?;
            params.push(CommandParam { name, kind, description });
            self.end_of_line()?;
        }
        let body = self.statements()?;
        Ok(Item::Command { name, title, params, body })
    }

    /// `{ … }`
    fn block(&mut self) -> Parsed<Vec<Stmt>> {
        self.expect("{", "and a block")?;
        self.statements()
    }

    /// Statements up to and with `}`.
    fn statements(&mut self) -> Parsed<Vec<Stmt>> {
        if self.nesting >= NESTING_MAX {
            let finding = Finding::new(self.span(), "blocks are nested too deeply");
            self.findings.push(finding.hint(format!("at most {NESTING_MAX} deep; use a rule")));
            return Err(GivenUp);
        }
        self.nesting += 1;
        let mut statements = Vec::new();
        let closed = loop {
            self.newlines();
            if self.take("}") {
                break true;
            }
            if *self.tok() == Tok::End || self.at_item() {
                break false;
            }
            let (start, before) = (self.span(), self.at);
            match self.stmt().and_then(|kind| self.end_of_line().map(|()| kind)) {
                Ok(kind) => statements.push(Stmt { kind, span: start.to(self.before()) }),
                Err(GivenUp) => self.recover(),
            }
            if self.at == before {
                self.advance();
            }
        };
        self.nesting -= 1;
        if closed {
            return Ok(statements);
        }
        let finding = Finding::new(self.span(), format!("unexpected {}", self.found()));
        // The blocks around it are left open by the same mistake.
        if self.findings.last().is_none_or(|last| last.span != finding.span) {
            self.findings.push(finding.expected("`}` at the end of the block before it"));
        }
        Err(GivenUp)
    }

    /// Whether a declaration begins here: its word and a name, at the start of a line.
    fn at_item(&self) -> bool {
        let words = ["rule", "table", "on", "command", "define"];
        let before = self.at.checked_sub(1).and_then(|at| self.tokens.get(at));
        matches!(self.tok(), Tok::Name(word) if words.contains(&word.as_str()))
            && matches!(self.tokens.get(self.at + 1), Some(Token { tok: Tok::Name(_), .. }))
            && before.is_none_or(|t| t.tok == Tok::Newline)
    }

    fn list(&mut self) -> Parsed<Vec<Expr>> {
        let mut items = vec![self.expr()?];
        while self.take(",") {
            self.newlines();
            items.push(self.expr()?);
        }
        Ok(items)
    }
}
