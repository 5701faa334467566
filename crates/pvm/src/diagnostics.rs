//! What is wrong with a program's source, and where.

use std::fmt;

use crate::lexer::Span;

/// One finding in a source text.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Diagnostic {
    /// Line, from 1.
    pub line: u32,
    /// Column of the first character, from 1.
    pub column: u32,
    /// Column after the last character, on the same line.
    pub end: u32,
    /// What is wrong.
    pub message: String,
    /// What was expected there, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<String>,
    /// What to do about it, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Everything found in one source, in order of place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostics {
    name: String,
    source: String,
    items: Vec<Diagnostic>,
}

impl Diagnostics {
    fn new(name: &str, source: &str, mut items: Vec<Diagnostic>) -> Self {
        items.sort_by_key(|d| (d.line, d.column));
        items.dedup();
        Self { name: name.to_owned(), source: source.to_owned(), items }
    }

    /// The findings, in order of place; never empty.
    #[must_use]
    pub fn items(&self) -> &[Diagnostic] {
        &self.items
    }
}

impl IntoIterator for Diagnostics {
    type Item = Diagnostic;
    type IntoIter = std::vec::IntoIter<Diagnostic>;

    fn into_iter(self) -> Self::IntoIter {
        self.items.into_iter()
    }
}

impl std::error::Error for Diagnostics {}

impl fmt::Display for Diagnostics {
    /// Each finding with the line of source it is in and a mark under the place.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, item) in self.items.iter().enumerate() {
            if at > 0 {
                writeln!(f)?;
            }
            let number = item.line.to_string();
            let margin = " ".repeat(number.len());
            writeln!(f, "error: {}", item.message)?;
            writeln!(f, "{margin}--> {}:{}:{}", self.name, item.line, item.column)?;
            let line = usize::try_from(item.line).unwrap_or(1).saturating_sub(1);
            if let Some(text) = self.source.lines().nth(line) {
                // Tabs count as one column: shown as one space so that the mark stands under its place.
                let text: String =
                    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
                let indent =
                    " ".repeat(usize::try_from(item.column).unwrap_or(1).saturating_sub(1));
                let width =
                    usize::try_from(item.end.saturating_sub(item.column)).unwrap_or(1).max(1);
                writeln!(f, "{margin} |")?;
                writeln!(f, "{number} | {text}")?;
                write!(f, "{margin} | {indent}{}", "^".repeat(width))?;
                match &item.expected {
                    Some(expected) => writeln!(f, " expected {expected}")?,
                    None => writeln!(f)?,
                }
            }
            if let Some(hint) = &item.hint {
                writeln!(f, "{margin} = hint: {hint}")?;
            }
        }
        Ok(())
    }
}

/// A finding by byte range, before lines and columns are known.
#[derive(Clone, Debug)]
pub(crate) struct Finding {
    pub(crate) span: Span,
    pub(crate) message: String,
    pub(crate) expected: Option<String>,
    pub(crate) hint: Option<String>,
}

impl Finding {
    pub(crate) fn new(span: Span, message: impl Into<String>) -> Self {
        Self { span, message: message.into(), expected: None, hint: None }
    }

    pub(crate) fn expected(mut self, expected: impl Into<String>) -> Self {
        self.expected = Some(expected.into());
        self
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// Line numbers of byte offsets.
#[derive(Debug)]
pub(crate) struct Lines {
    starts: Vec<usize>,
}

impl Lines {
    pub(crate) fn new(source: &str) -> Self {
        let breaks = source.bytes().enumerate().filter(|(_, b)| *b == b'\n').map(|(at, _)| at + 1);
        Self { starts: std::iter::once(0).chain(breaks).collect() }
    }

    /// The line of byte `offset`, from 1.
    pub(crate) fn line(&self, offset: usize) -> u32 {
        u32::try_from(self.starts.partition_point(|start| *start <= offset)).unwrap_or(u32::MAX)
    }

    fn start(&self, line: u32) -> usize {
        let at = usize::try_from(line).unwrap_or(0).saturating_sub(1);
        self.starts.get(at).copied().unwrap_or(0)
    }
}

/// The findings with their lines and columns.
pub(crate) fn diagnostics(name: &str, source: &str, findings: Vec<Finding>) -> Diagnostics {
    let lines = Lines::new(source);
    let columns = |from: usize, to: usize| {
        let text = source.get(from..to.min(source.len())).unwrap_or("");
        u32::try_from(text.chars().count()).unwrap_or(u32::MAX).saturating_add(1)
    };
    let items = findings.into_iter().map(|finding| {
        let Finding { span, message, expected, hint } = finding;
        let line = lines.line(span.start);
        let start = lines.start(line);
        let line_end = source
            .get(start..)
            .and_then(|rest| rest.find('\n'))
            .map_or(source.len(), |length| start + length);
        let column = columns(start, span.start);
        let end = columns(start, span.end.min(line_end)).max(column.saturating_add(1));
        Diagnostic { line, column, end, message, expected, hint }
    });
    Diagnostics::new(name, source, items.collect())
}

/// The known name nearest to `word`, if one is near enough to be what was meant.
pub(crate) fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let allowed = (word.chars().count() * 2 / 5).clamp(1, 3);
    known
        .into_iter()
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|(d, _)| *d <= allowed)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Count of characters to add, drop or replace to get from one word to the other.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().take(64).enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        if let Some(first) = row.first_mut() {
            *first = left;
        }
        for (b, slot) in to.iter().zip(row.iter_mut().skip(1)) {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = *slot;
            left = replaced.min(diagonal + 1).min(left + 1);
            *slot = left;
        }
    }
    row.last().copied().unwrap_or(0)
}
