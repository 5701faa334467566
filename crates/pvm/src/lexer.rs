//! Source text to tokens. Never fails: what it cannot read becomes a finding and is left out.

use fieldline_model::Decimal;

use crate::diagnostics::Finding;

/// Byte range of the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Span {
    /// First byte.
    pub(crate) start: usize,
    /// Byte after the last.
    pub(crate) end: usize,
}

impl Span {
    /// From the start of this to the end of `other`.
    pub(crate) fn to(self, other: Self) -> Self {
        Self { start: self.start, end: other.end.max(self.end) }
    }
}

/// What a token is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Tok {
    /// A name, perhaps dotted: `crc.ok`.
    Name(String),
    /// A parameter: `#position.speed`.
    Param(String),
    /// A whole number.
    Int(i128),
    /// A number with a point or exponent.
    Dec(Decimal),
    /// Text in quotes.
    Text(String),
    /// Bytes: `x"0C 01"`.
    Bytes(Vec<u8>),
    /// A date, as seconds since 1970: `@2007-01-01`.
    Date(i64),
    /// An operator or bracket.
    Punct(&'static str),
    /// End of a line that ends a statement.
    Newline,
    /// `// …`, kept for the formatter only.
    Comment,
    /// End of the source.
    End,
}

/// A token and its place.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Token {
    pub(crate) tok: Tok,
    pub(crate) span: Span,
}

/// Longest source that is looked at, in bytes.
pub(crate) const SOURCE_BYTES_MAX: usize = 1 << 20;

const PUNCTS: &[&str] = &[
    "..", "<<", ">>", "<=", ">=", "==", "!=", "{", "}", "(", ")", "[", "]", ",", ":", "=", "<",
    ">", "+", "-", "*", "/", "%", "&", "|", "^", "~", "?", "#",
];

/// The tokens of `source`, comments among them, ending with [`Tok::End`].
pub(crate) fn lex(source: &str, findings: &mut Vec<Finding>) -> Vec<Token> {
    let mut lexer = Lexer { source, at: 0, nesting: 0, tokens: Vec::new(), findings };
    if source.len() > SOURCE_BYTES_MAX {
        lexer.findings.push(
            Finding::new(Span::default(), "the source is too long")
                .hint(format!("a protocol has at most {SOURCE_BYTES_MAX} bytes")),
        );
    } else {
        while lexer.token() {}
    }
    let end = Span { start: lexer.at, end: lexer.at };
    lexer.tokens.push(Token { tok: Tok::Newline, span: end });
    lexer.tokens.push(Token { tok: Tok::End, span: end });
    lexer.tokens
}

struct Lexer<'a, 'f> {
    source: &'a str,
    at: usize,
    /// Open `(` and `[`: lines may break within them.
    nesting: usize,
    tokens: Vec<Token>,
    findings: &'f mut Vec<Finding>,
}

impl Lexer<'_, '_> {
    fn rest(&self) -> &str {
        self.source.get(self.at..).unwrap_or("")
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    /// Moves over the characters that fit and returns them.
    fn take(&mut self, fits: impl Fn(char) -> bool) -> &str {
        let start = self.at;
        let length = self.rest().find(|c| !fits(c)).unwrap_or(self.rest().len());
        self.at += length;
        self.source.get(start..self.at).unwrap_or("")
    }

    fn push(&mut self, tok: Tok, start: usize) {
        self.tokens.push(Token { tok, span: Span { start, end: self.at } });
    }

    fn finding(&mut self, start: usize, message: impl Into<String>) -> &mut Finding {
        let end = self.at.max(start + 1);
        self.findings.push(Finding::new(Span { start, end }, message));
        // Just pushed.
        let last = self.findings.len() - 1;
        #[allow(clippy::indexing_slicing, reason = "the element was pushed two lines above")]
        &mut self.findings[last]
    }

    /// Reads one token; false at the end.
    fn token(&mut self) -> bool {
        self.take(|c| c == ' ' || c == '\t' || c == '\r');
        let start = self.at;
        let Some(c) = self.peek() else { return false };
        match c {
            '\n' => {
                self.at += 1;
                let repeated =
                    matches!(self.tokens.last(), None | Some(Token { tok: Tok::Newline, .. }));
                if self.nesting == 0 && !repeated {
                    self.push(Tok::Newline, start);
                }
            }
            '/' if self.rest().starts_with("//") => {
                self.take(|c| c != '\n');
                self.push(Tok::Comment, start);
            }
            '"' => {
                if let Some(text) = self.quoted() {
                    self.push(Tok::Text(text), start);
                }
            }
            'x' if self.rest().starts_with("x\"") => {
                self.at += 1;
                if let Some(digits) = self.quoted() {
                    match fieldline_model::value::from_hex(&digits) {
                        Some(bytes) => self.push(Tok::Bytes(bytes), start),
                        None => {
                            self.finding(start, "these are no bytes").expected =
                                Some("pairs of hex digits, such as x\"0C 01\"".into());
                        }
                    }
                }
            }
            '#' => {
                self.at += 1;
                let name =
                    self.take(|c| c.is_ascii_alphanumeric() || c == '.' || c == '_').to_owned();
                self.push(if name.is_empty() { Tok::Punct("#") } else { Tok::Param(name) }, start);
            }
            '@' => self.date(start),
            _ if c.is_ascii_digit() => self.number(start),
            _ if c.is_ascii_alphabetic() || c == '_' => {
                self.take(|c| c.is_ascii_alphanumeric() || c == '_');
                loop {
                    let mut after = self.rest().chars();
                    let dotted = after.next() == Some('.')
                        && after.next().is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
                    if !dotted {
                        break;
                    }
                    self.at += 1;
                    self.take(|c| c.is_ascii_alphanumeric() || c == '_');
                }
                let name = self.source.get(start..self.at).unwrap_or("").to_owned();
                self.push(Tok::Name(name), start);
            }
            _ => match PUNCTS.iter().find(|p| self.rest().starts_with(**p)) {
                Some(punct) => {
                    self.at += punct.len();
                    match *punct {
                        "(" | "[" => self.nesting += 1,
                        ")" | "]" => self.nesting = self.nesting.saturating_sub(1),
                        // A brace never stands in parentheses: one of those was left open.
                        "{" | "}" => self.nesting = 0,
                        _ => {}
                    }
                    self.push(Tok::Punct(punct), start);
                }
                None => {
                    self.at += c.len_utf8();
                    if c == '\'' {
                        self.take(|c| c != '\'' && c != '\n');
                        self.at += usize::from(self.peek() == Some('\''));
                    }
                    let finding =
                        self.finding(start, format!("`{}` has no meaning here", shown(c)));
                    finding.hint = match c {
                        ';' => Some("statements end with the line".into()),
                        '\'' => Some("text stands in double quotes".into()),
                        '!' => Some("write `not` before a condition, `!=` between values".into()),
                        _ => None,
                    };
                }
            },
        }
        true
    }

    fn number(&mut self, start: usize) {
        let rest = self.rest();
        let radix = match rest.get(..2) {
            Some("0x") => 16,
            Some("0b") => 2,
            _ => 10,
        };
        if radix != 10 {
            self.at += 2;
            let digits = self.take(|c| c.is_ascii_alphanumeric() || c == '_').replace('_', "");
            match i128::from_str_radix(&digits, radix) {
                Ok(n) if n <= i128::from(u64::MAX) => self.push(Tok::Int(n), start),
                _ => {
                    self.finding(start, "this is no number").expected =
                        Some(format!("digits of base {radix}, at most 64 bits"));
                }
            }
            return;
        }
        let mut text = self.take(|c| c.is_ascii_digit() || c == '_').replace('_', "");
        let mut exponent = 0_i32;
        let mut whole = true;
        let mut after = self.rest().chars();
        if after.next() == Some('.') && after.next().is_some_and(|c| c.is_ascii_digit()) {
            self.at += 1;
            text.push('.');
            text.push_str(&self.take(|c| c.is_ascii_digit() || c == '_').replace('_', ""));
            whole = false;
        }
        let mut after = self.rest().chars();
        if after.next() == Some('e') && after.next().is_some_and(|c| c == '-' || c.is_ascii_digit())
        {
            self.at += 1;
            let negative = self.rest().starts_with('-');
            self.at += usize::from(negative);
            let digits: i32 = self.take(|c| c.is_ascii_digit()).parse().unwrap_or(i32::MAX);
            exponent = if negative { -digits } else { digits };
            whole = false;
        }
        let read = if whole {
            text.parse().ok().filter(|n| *n <= i128::from(u64::MAX)).map(Tok::Int)
        } else {
            scaled(&text, exponent).map(Tok::Dec)
        };
        match read {
            Some(tok) => self.push(tok, start),
            None => {
                self.finding(start, "this number does not fit").expected =
                    Some("at most 64 bits and 18 decimals".into());
            }
        }
    }

    fn date(&mut self, start: usize) {
        self.at += 1;
        let text = self.take(|c| c.is_ascii_digit() || c == '-').to_owned();
        let parts: Vec<i64> = text.split('-').filter_map(|p| p.parse().ok()).collect();
        match parts.as_slice() {
            [year, month, day] if crate::vm::time::is_date(*year, *month, *day) => {
                let days = crate::vm::time::days_from_civil(*year, *month, *day);
                self.push(Tok::Date(days * 86_400), start);
            }
            _ => {
                self.finding(start, "this is no date").expected =
                    Some("such as @2007-01-01".into());
            }
        }
    }

    /// Reads quoted text at a `"`; `None` after a finding.
    fn quoted(&mut self) -> Option<String> {
        let start = self.at;
        self.at += 1;
        let mut text = String::new();
        loop {
            let Some(c) = self.peek().filter(|c| *c != '\n') else {
                self.finding(start, "the text does not end").expected =
                    Some("`\"` on the same line".into());
                return None;
            };
            let place = self.at;
            self.at += c.len_utf8();
            match c {
                '"' => return Some(text),
                '\\' => match self.escape() {
                    Some(c) => text.push(c),
                    None => {
                        self.finding(place, "unknown escape").expected =
                            Some(r#"one of \n \r \t \0 \\ \" \u{…}"#.into());
                    }
                },
                c => text.push(c),
            }
        }
    }

    fn escape(&mut self) -> Option<char> {
        let c = self.peek()?;
        if c == '\n' {
            return None;
        }
        self.at += c.len_utf8();
        Some(match c {
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            '0' => '\0',
            '\\' => '\\',
            '"' => '"',
            'u' => {
                let digits = self.take(|c| c == '{' || c == '}' || c.is_ascii_hexdigit());
                let digits = digits.strip_prefix('{')?.strip_suffix('}')?;
                char::from_u32(u32::from_str_radix(digits, 16).ok()?)?
            }
            _ => return None,
        })
    }
}

/// A character for a message: as it is, unless it would not be seen.
fn shown(c: char) -> String {
    if c.is_control() || c.is_whitespace() { c.escape_unicode().to_string() } else { c.to_string() }
}

/// The decimal `text × 10^exponent`, if it fits.
fn scaled(text: &str, exponent: i32) -> Option<Decimal> {
    let decimal = Decimal::parse(text)?;
    let scale = i32::from(decimal.scale()).checked_sub(exponent)?;
    if scale >= 0 {
        return Decimal::new(decimal.mantissa(), u8::try_from(scale).ok()?);
    }
    let factor = 10_i64.checked_pow(scale.unsigned_abs())?;
    Decimal::new(decimal.mantissa().checked_mul(factor)?, 0)
}
