//! The one accepted layout: four spaces a block, one space between words, lines broken where they
//! were, comments kept and those behind statements aligned.
//!
//! It works on tokens, not on the tree, so that nothing can get lost.

use crate::lexer::{Tok, Token, lex};

/// Words after which a parenthesis does not begin arguments.
const WORDS: &[&str] = &[
    "if", "else", "check", "switch", "repeat", "within", "reply", "send", "answer", "refused",
    "login", "password", "and", "or", "not", "in", "peek", "until", "skip", "to", "end",
];

/// One line: depth of indentation, statement, comment behind it.
struct Line {
    indent: usize,
    code: String,
    comment: String,
}

/// `source` laid out. Only give it what parses.
pub(crate) fn format(source: &str) -> String {
    let tokens: Vec<Token> = lex(source, &mut Vec::new())
        .into_iter()
        .filter(|t| !matches!(t.tok, Tok::Newline | Tok::End))
        .collect();
    let mut lines: Vec<Line> = Vec::new();
    let (mut depth, mut open, mut at) = (0_usize, 0_usize, 0_usize);
    let mut last_end = 0;
    let mut continues = false;
    while let Some(first) = tokens.get(at) {
        let rest = tokens.get(at..).unwrap_or(&[]);
        let line_end = source.get(first.span.start..).and_then(|s| s.find('\n'));
        let line_end = line_end.map_or(source.len(), |length| first.span.start + length);
        let on_line = rest.iter().take_while(|t| t.span.start < line_end).count().max(1);
        let line = rest.get(..on_line).unwrap_or(&[]);
        at += on_line;

        let gap = source.get(last_end..first.span.start).unwrap_or("");
        last_end = line.last().map_or(line_end, |t| t.span.end);
        let closes = matches!(first.tok, Tok::Punct("}" | ")" | "]"));
        let opened = matches!(lines.last(), Some(line) if line.code.ends_with('{') || line.code.is_empty() && line.comment.is_empty());
        if gap.matches('\n').count() > 1 && !lines.is_empty() && !opened && !closes {
            lines.push(Line { indent: 0, code: String::new(), comment: String::new() });
        }

        let closing = line.iter().take_while(|t| t.tok == Tok::Punct("}")).count();
        let unopened = line.iter().take_while(|t| matches!(t.tok, Tok::Punct(")" | "]"))).count();
        let indent = depth.saturating_sub(closing)
            + usize::from(open.saturating_sub(unopened) > 0 || (continues && open == 0));
        let mut code = String::new();
        let mut comment = String::new();
        let mut before: Option<&Token> = None;
        let mut before_that: Option<&Token> = None;
        let mut chosen = 0_usize;
        for token in line {
            let text = source.get(token.span.start..token.span.end).unwrap_or("");
            match token.tok {
                Tok::Comment => {
                    text.trim_end().clone_into(&mut comment);
                    continue;
                }
                Tok::Punct("{") => depth += 1,
                Tok::Punct("}") => depth = depth.saturating_sub(1),
                Tok::Punct("(" | "[") => open += 1,
                Tok::Punct(")" | "]") => open = open.saturating_sub(1),
                Tok::Punct("?") => chosen += 1,
                _ => {}
            }
            if let Some(before) = before
                && spaced(before_that, before, token, chosen > 0)
            {
                code.push(' ');
            }
            if token.tok == Tok::Punct(":") {
                chosen = chosen.saturating_sub(1);
            }
            code.push_str(text);
            before_that = before;
            before = Some(token);
        }
        if let Some(last) = before {
            continues = continues_after(&last.tok);
        }
        lines.push(Line { indent, code, comment });
    }
    write(&lines)
}

/// Whether a statement goes on after a line that ends so.
fn continues_after(tok: &Tok) -> bool {
    match tok {
        Tok::Punct(p) => !matches!(*p, "{" | "}" | ")" | "]"),
        Tok::Name(word) => matches!(word.as_str(), "and" | "or"),
        _ => false,
    }
}

/// Whether a space stands between two tokens.
fn spaced(before_that: Option<&Token>, before: &Token, token: &Token, choosing: bool) -> bool {
    let punct = |t: &Token| match t.tok {
        Tok::Punct(p) => Some(p),
        _ => None,
    };
    match punct(before) {
        Some("(" | "[" | ".." | "#" | "~") => return false,
        Some("-") => {
            // A sign, where nothing stands before it that it could be taken from.
            let sign = match before_that {
                None => true,
                Some(t) => match &t.tok {
                    Tok::Punct(p) => !matches!(*p, ")" | "]"),
                    Tok::Name(word) => WORDS.contains(&word.as_str()) || word == "except",
                    _ => false,
                },
            };
            if sign {
                return false;
            }
        }
        _ => {}
    }
    match punct(token) {
        Some(")" | "]" | "," | "..") => false,
        Some(":") => choosing,
        Some("(") => !matches!(&before.tok, Tok::Name(word) if !WORDS.contains(&word.as_str())),
        Some("[") => !matches!(before.tok, Tok::Param(_)),
        _ => true,
    }
}

fn write(lines: &[Line]) -> String {
    let mut out = String::new();
    for (at, line) in lines.iter().enumerate() {
        let own = |line: &Line| line.indent * 4 + line.code.chars().count();
        if !line.code.is_empty() || !line.comment.is_empty() {
            out.push_str(&" ".repeat(line.indent * 4));
        }
        out.push_str(&line.code);
        if !line.comment.is_empty() {
            if !line.code.is_empty() {
                // Comments of neighbouring lines stand under each other.
                let behind = |line: &&Line| !line.code.is_empty() && !line.comment.is_empty();
                let above = lines.get(..at).unwrap_or(&[]).iter().rev().take_while(behind);
                let below = lines.get(at..).unwrap_or(&[]).iter().take_while(behind);
                let column = above.chain(below).map(own).max().unwrap_or(0) + 2;
                out.push_str(&" ".repeat(column - own(line)));
            }
            out.push_str(&line.comment);
        }
        out.push('\n');
    }
    while out.ends_with("\n\n") {
        out.pop();
    }
    out
}
