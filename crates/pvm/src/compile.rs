//! Tree to bytecode.

mod expr;
mod stmt;

pub(crate) use stmt::NO_REG;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use fieldline_model::{CloseCode, Decimal, ParamName, Transport};

use crate::ast::{Expr, File, Item, Name, Row, RowKind, Stmt};
use crate::diagnostics::{Finding, Lines, nearest};
use crate::lexer::Span;
use crate::op::{Builtin, Kind, Op, Reg};
use crate::program::{
    Class, Code, CommandDecl, DeclKind, Entry, MACHINE_CLASSES, ParamDecl, Program, Rule,
    SettingDecl, Table,
};
use crate::vm::functions::Fun;
use crate::vm::value::{POOL, Part, Val};

/// Most instructions of a program.
const OPS_MAX: usize = 60_000;
/// Most registers of a rule; one number is kept for "none".
const REGISTERS_MAX: usize = 250;

/// A name that stands for an expression.
struct Define<'a> {
    params: &'a [Name],
    body: &'a Expr,
}

/// A rule's source.
struct Source<'a> {
    name: Arc<str>,
    params: Vec<&'a str>,
    body: &'a [Stmt],
    span: Span,
}

/// Makes a program of `file`; whatever is wrong is added to `findings`.
pub(crate) fn compile(source: &str, file: &File, findings: &mut Vec<Finding>) -> Program {
    let broken = !findings.is_empty();
    let mut compiler = Compiler {
        broken,
        lines: Lines::new(source),
        program: Program::default(),
        findings,
        defines: HashMap::new(),
        rule_names: HashMap::new(),
        class_names: HashMap::new(),
        table_names: HashMap::new(),
        var_names: HashMap::new(),
        name_indexes: HashMap::new(),
        expanding: Vec::new(),
        traced: false,
        code: Code::default(),
        scopes: Vec::new(),
        next: 0,
        most: 0,
        referenced: HashSet::new(),
        loops: Vec::new(),
        blocks: Vec::new(),
        line: 0,
        full: false,
        in_command: false,
        takes_password: false,
    };
    compiler.file(file);
    compiler.program
}

/// A loop being compiled: its exits, and how many blocks were open where it began.
struct Loop {
    exits: Vec<usize>,
    blocks: usize,
}

struct Compiler<'a, 'f> {
    /// The source did not parse whole, so what is missing may be what was not understood.
    broken: bool,
    lines: Lines,
    program: Program,
    findings: &'f mut Vec<Finding>,
    defines: HashMap<&'a str, Define<'a>>,
    rule_names: HashMap<&'a str, (u16, usize)>,
    class_names: HashMap<String, u16>,
    table_names: HashMap<&'a str, u8>,
    var_names: HashMap<&'a str, u16>,
    name_indexes: HashMap<String, u16>,
    /// Definitions being expanded: one within itself would never end.
    expanding: Vec<String>,
    traced: bool,
    code: Code,
    scopes: Vec<HashMap<String, Reg>>,
    next: usize,
    most: usize,
    /// Names that the rule's expressions use.
    referenced: HashSet<String>,
    loops: Vec<Loop>,
    /// Open `within`, `message` and `attempt` blocks of the rule.
    blocks: Vec<&'static str>,
    line: u32,
    full: bool,
    in_command: bool,
    /// Whether the present rule reads a password.
    takes_password: bool,
}

impl<'a> Compiler<'a, '_> {
    fn finding(&mut self, span: Span, message: impl Into<String>) -> &mut Finding {
        self.findings.push(Finding::new(span, message));
        let last = self.findings.len() - 1;
        #[allow(clippy::indexing_slicing, reason = "the element was pushed two lines above")]
        &mut self.findings[last]
    }

    fn unknown<'n>(
        &mut self,
        name: &Name,
        what: &str,
        known: impl IntoIterator<Item = &'n str> + Clone,
    ) {
        let hint = match nearest(&name.text, known.clone()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => {
                let mut known: Vec<&str> = known.into_iter().collect();
                known.sort_unstable();
                known.truncate(12);
                if known.is_empty() {
                    "none is declared".into()
                } else {
                    format!("known: {}", known.join(", "))
                }
            }
        };
        self.finding(name.span, format!("there is no {what} `{}`", name.text)).hint = Some(hint);
    }

    fn file(&mut self, file: &'a File) {
        if let Some(name) = &file.name {
            self.program.name.clone_from(&name.text);
            let fits = name
                .text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
            if !fits || name.text.len() > 64 {
                self.finding(name.span, "this is no name of a protocol").expected =
                    Some("at most 64 lower-case letters, digits and `_`".into());
            }
        }
        self.program.description.clone_from(&file.description);
        self.program.carriers = ["tcp", "udp"].map(|name| self.pooled(Val::Text(name.into())));
        for (name, close) in MACHINE_CLASSES {
            self.class(name, false, *close);
        }
        self.declare(file);
        let sources = self.sources(file);
        crate::check::check(&sources_view(&sources), self.findings);
        if self.findings.is_empty() {
            for traced in [false, true] {
                self.traced = traced;
                self.code = Code::default();
                for (at, source) in sources.iter().enumerate() {
                    self.rule(at, source);
                }
                let code = std::mem::take(&mut self.code);
                if traced {
                    self.program.traced = code
                } else {
                    self.program.plain = code
                }
                if !self.findings.is_empty() {
                    return;
                }
            }
        } else {
            // The findings of the bodies are wanted too; the code is not.
            for (at, source) in sources.iter().enumerate() {
                self.rule(at, source);
            }
        }
    }

    fn class(&mut self, name: &str, lenient: bool, close: Option<CloseCode>) -> u16 {
        let at = u16::try_from(self.program.classes.len()).unwrap_or(u16::MAX);
        self.program.classes.push(Class { name: name.into(), lenient, close, answer: None });
        self.class_names.insert(name.to_owned(), at);
        at
    }

    /// Everything but the bodies of rules.
    fn declare(&mut self, file: &'a File) {
        for item in &file.items {
            match item {
                Item::Transport(names) => {
                    for name in names {
                        match name.text.as_str() {
                            "tcp" => {
                                self.program.transports.extend([Transport::Tcp, Transport::Tls])
                            }
                            "udp" => self.program.transports.push(Transport::Udp),
                            _ => self.unknown(name, "transport", ["tcp", "udp"]),
                        }
                    }
                }
                Item::Setting { name, kind, default, description } => {
                    self.setting(name, kind, default, description);
                }
                Item::Error { names, lenient, close, .. } => {
                    let close = close.as_ref().map(|code| match code {
                        Some(code) => self.close_code(code),
                        None => CloseCode::ProtocolError,
                    });
                    for name in names {
                        match self.class_names.get(&name.text) {
                            Some(at) if usize::from(*at) < MACHINE_CLASSES.len() => {
                                if let Some(class) = self.program.classes.get_mut(usize::from(*at))
                                {
                                    class.close = close.or(class.close);
                                    class.lenient = *lenient;
                                }
                            }
                            Some(_) => self.twice(name, "class of error"),
                            None => {
                                self.class(&name.text, *lenient, close);
                            }
                        }
                    }
                }
                Item::Session { name, value } => {
                    let value = self.constant(value);
                    if self.program.session_vars.iter().any(|(n, _)| *n == name.text)
                        || name.text == "ident"
                    {
                        self.twice(name, "session variable");
                    }
                    self.program.session_vars.push((name.text.clone(), value));
                }
                Item::Var { name, value } => {
                    self.not_reserved(name);
                    let value = self.constant(value);
                    let value = self.pooled(value);
                    let at = u16::try_from(self.program.vars.len()).unwrap_or(u16::MAX);
                    if self.var_names.insert(&name.text, at).is_some() {
                        self.twice(name, "variable");
                    }
                    self.program.vars.push(value);
                }
                Item::Define { name, params, body } => {
                    self.not_reserved(name);
                    let define = Define { params, body };
                    if Fun::named(&name.text).is_some()
                        || self.defines.insert(&name.text, define).is_some()
                    {
                        self.twice(name, "function or definition");
                    }
                }
                Item::Table { name, unknown, rows } => self.table(name, unknown.as_ref(), rows),
                Item::Rule { .. } | Item::On { .. } | Item::Command { .. } => {}
            }
        }
    }

    fn twice(&mut self, name: &Name, what: &str) {
        self.finding(name.span, format!("there already is a {what} `{}`", name.text)).hint =
            Some("use another name".into());
    }

    fn not_reserved(&mut self, name: &Name) {
        let text = name.text.as_str();
        let builtin = Builtin::ALL.iter().any(|(n, _)| *n == text);
        let kind = Kind::named(text).is_some() || text == "rest";
        if builtin || kind {
            let what = if kind { "a way to read" } else { "a value of the machine" };
            self.finding(name.span, format!("`{text}` is {what}")).hint =
                Some("use another name".into());
        }
        if ["session.", "setting."].iter().any(|p| text.starts_with(p)) {
            self.finding(name.span, format!("`{text}` must be declared at the top")).hint =
                Some("write `session NAME = VALUE` or `setting NAME: KIND = VALUE \"…\"`".into());
        }
    }

    fn close_code(&mut self, name: &Name) -> CloseCode {
        let code = CloseCode::ALL.iter().find(|code| code.name() == name.text);
        match code {
            Some(code) => *code,
            None => {
                self.unknown(name, "close code", CloseCode::ALL.iter().map(|code| code.name()));
                CloseCode::ProtocolError
            }
        }
    }

    fn kind(&mut self, name: &Name) -> DeclKind {
        DeclKind::named(&name.text).unwrap_or_else(|| {
            self.unknown(name, "kind", ["bool", "int", "text"]);
            DeclKind::Text
        })
    }

    fn setting(&mut self, name: &Name, kind: &Name, default: &'a Expr, description: &str) {
        let kind = self.kind(kind);
        let value = self.constant(default);
        let (fits, json) = match (kind, &value) {
            (DeclKind::Bool, Val::Bool(b)) => (true, (*b).into()),
            (DeclKind::Int, Val::Int(n)) => (true, (*n).into()),
            (DeclKind::Text, Val::Text(text)) => (true, (&**text).into()),
            (_, Val::Null) => (true, serde_json::Value::Null),
            _ => (false, serde_json::Value::Null),
        };
        if !fits {
            self.finding(default.span, "the default is of another kind").expected =
                Some(format!("a value of kind `{}`", kind.name()));
        }
        if self.program.settings.iter().any(|s| s.name == name.text) {
            self.twice(name, "setting");
        }
        self.program.settings.push(SettingDecl {
            name: name.text.clone(),
            kind,
            default: json,
            description: description.to_owned(),
        });
    }

    fn table(&mut self, name: &'a Name, unknown: Option<&(String, Span)>, rows: &[Row]) {
        let pattern = unknown.and_then(|(text, span)| {
            let split = text.split_once("{id}");
            if split.is_none() {
                self.finding(*span, "the name of unknown ids holds no id").expected =
                    Some("`{id}` in it, such as \"io.{id}\"".into());
            }
            split.map(|(before, after)| (before.to_owned(), after.to_owned()))
        });
        let draft = Table::new(name.text.clone(), pattern.clone(), HashMap::new());
        let mut entries = HashMap::new();
        for row in rows {
            let Ok(param) = ParamName::new(row.name.text.as_str()) else {
                self.finding(row.name.span, "this is no parameter's name");
                continue;
            };
            let plain = row.factor.is_none() && row.offset.is_none();
            if matches!(row.kind, RowKind::Bool | RowKind::Text | RowKind::Bytes) && !plain {
                self.finding(row.name.span, "only numbers have a factor or an offset");
            }
            let entry = Entry {
                raw: draft.raw_name(row.id).unwrap_or_else(|| param.clone()),
                name: param,
                kind: row.kind,
                factor: row.factor,
                offset: row.offset,
                except: row.except.clone().into(),
            };
            if entries.insert(row.id, entry).is_some() {
                self.finding(row.id_span, format!("id {} stands in the table twice", row.id));
            }
        }
        let at = u8::try_from(self.program.tables.len()).unwrap_or(u8::MAX);
        if at == u8::MAX {
            self.finding(name.span, "there are too many tables").hint = Some("at most 255".into());
            return;
        }
        if self.table_names.insert(&name.text, at).is_some() {
            self.twice(name, "table");
        }
        self.program.tables.push(Table::new(name.text.clone(), pattern, entries));
    }

    /// The bodies to compile, in the order of their rule numbers.
    fn sources(&mut self, file: &'a File) -> Vec<Source<'a>> {
        let mut sources = Vec::new();
        let number = |sources: &Vec<Source<'_>>| u16::try_from(sources.len()).unwrap_or(u16::MAX);
        for item in &file.items {
            match item {
                Item::Rule { name, params, body } => {
                    let place = (number(&sources), params.len());
                    if Fun::named(&name.text).is_some()
                        || self.defines.contains_key(name.text.as_str())
                    {
                        self.twice(name, "function or definition");
                    } else if self.rule_names.insert(&name.text, place).is_some() {
                        self.twice(name, "rule");
                    }
                    let params = params.iter().map(|p| p.text.as_str()).collect();
                    let (text, span) = (name.text.as_str().into(), name.span);
                    sources.push(Source { name: text, params, body, span });
                }
                Item::On { transports, body, span } => {
                    for transport in transports {
                        let at = number(&sources);
                        let slot = match transport.text.as_str() {
                            "tcp" => &mut self.program.on_stream,
                            "udp" => &mut self.program.on_datagram,
                            _ => {
                                self.unknown(transport, "transport", ["tcp", "udp"]);
                                continue;
                            }
                        };
                        if slot.replace(at).is_some() {
                            self.twice(transport, "block `on`");
                        }
                    }
                    let names: Vec<&str> = transports.iter().map(|t| t.text.as_str()).collect();
                    let name = format!("on {}", names.join(", ")).into();
                    sources.push(Source { name, params: Vec::new(), body, span: *span });
                }
                Item::Command { name, title, params, body } => {
                    let decls = params.iter().map(|p| ParamDecl {
                        name: p.name.text.clone(),
                        kind: self.kind(&p.kind),
                        description: p.description.clone(),
                    });
                    let decls = decls.collect();
                    if self.program.commands.iter().any(|c| c.name == name.text) {
                        self.twice(name, "command");
                    }
                    self.program.command_rules.push(number(&sources));
                    self.program.commands.push(CommandDecl {
                        name: name.text.clone(),
                        title: title.clone(),
                        params: decls,
                    });
                    let params = params.iter().map(|p| p.name.text.as_str()).collect();
                    let text = format!("command {}", name.text).into();
                    sources.push(Source { name: text, params, body, span: name.span });
                }
                _ => {}
            }
        }
        if !self.broken {
            self.transports(file);
        }
        // Answers to errors are compiled like rules.
        for item in &file.items {
            if let Item::Error { names, answer, .. } = item
                && let Some(first) = names.first()
                && !answer.is_empty()
            {
                let at = number(&sources);
                for name in names {
                    let class = self.class_names.get(&name.text).copied();
                    let class = class.and_then(|at| self.program.classes.get_mut(usize::from(at)));
                    if let Some(class) = class {
                        class.answer = Some(at);
                    }
                }
                let name = format!("error {}", first.text).into();
                sources.push(Source { name, params: Vec::new(), body: answer, span: first.span });
            }
        }
        sources
    }

    /// Every transport that is declared has its block, and the other way round.
    fn transports(&mut self, file: &File) {
        let declared = |transport| self.program.transports.contains(&transport);
        let missing = [
            ("tcp", declared(Transport::Tcp), self.program.on_stream.is_some()),
            ("udp", declared(Transport::Udp), self.program.on_datagram.is_some()),
        ];
        let place = file.name.as_ref().map_or(Span::default(), |name| name.span);
        for (transport, declared, handled) in missing {
            match (declared, handled) {
                (true, false) => {
                    self.finding(place, format!("nothing says what comes over {transport}")).hint =
                        Some(format!("write `on {transport} {{ … }}`"));
                }
                (false, true) => {
                    self.finding(place, format!("transport {transport} is not declared")).hint =
                        Some(format!("write `transport {transport}`"));
                }
                _ => {}
            }
        }
        if self.program.transports.is_empty() && self.program.on_stream.is_none() {
            self.finding(place, "the protocol has no transport").hint =
                Some("write `transport tcp` and `on tcp { … }`".into());
        }
    }

    /// Compiles one body.
    fn rule(&mut self, at: usize, source: &Source<'a>) {
        let start = u32::try_from(self.code.ops.len()).unwrap_or(u32::MAX);
        self.scopes = vec![HashMap::new()];
        (self.next, self.most) = (0, 0);
        self.loops.clear();
        self.blocks.clear();
        self.takes_password = false;
        self.in_command = source.name.starts_with("command ");
        self.referenced.clear();
        for define in self.defines.values() {
            collect_names(define.body, &mut self.referenced);
        }
        for stmt in source.body {
            names_of(stmt, &mut self.referenced);
        }
        self.line = self.lines.line(source.span.start);
        for param in &source.params {
            let reg = self.register(source.span);
            if let Some(scope) = self.scopes.last_mut() {
                scope.insert((*param).to_owned(), reg);
            }
        }
        self.statements(source.body);
        self.emit(Op::Return);
        let registers = u16::try_from(self.most).unwrap_or(u16::MAX);
        if self.traced {
            if let Some(rule) = self.program.rules.get_mut(at) {
                rule.start_traced = start;
                rule.registers = rule.registers.max(registers);
            }
        } else {
            let (name, secret) = (Arc::clone(&source.name), self.takes_password);
            let (start_plain, start_traced) = (start, 0);
            self.program.rules.push(Rule { name, start_plain, start_traced, registers, secret });
        }
    }

    fn emit(&mut self, op: Op) -> usize {
        if self.code.ops.len() >= OPS_MAX && !self.full {
            self.full = true;
            let span = Span::default();
            self.finding(span, format!("the program has more than {OPS_MAX} instructions")).hint =
                Some("use rules where text repeats".into());
        }
        if !self.full {
            self.code.ops.push(op);
            self.code.lines.push(self.line);
        }
        self.code.ops.len().saturating_sub(1)
    }

    /// The place of the next instruction.
    fn here(&self) -> u32 {
        u32::try_from(self.code.ops.len()).unwrap_or(u32::MAX)
    }

    /// Makes the jump at `at` lead here.
    fn land(&mut self, at: usize) {
        let here = self.here();
        match self.code.ops.get_mut(at) {
            Some(
                Op::Jump { to }
                | Op::JumpIf { to, .. }
                | Op::JumpIfNot { to, .. }
                | Op::JumpUnless { to, .. }
                | Op::Within { to, .. }
                | Op::Attempt { to }
                | Op::AttemptEnd { to }
                | Op::Next { to, .. }
                | Op::NextInner { to, .. }
                | Op::Login { to, .. },
            ) => *to = here,
            _ => debug_assert!(self.full, "only jumps land"),
        }
    }

    fn register(&mut self, span: Span) -> Reg {
        let reg = self.next;
        self.next += 1;
        self.most = self.most.max(self.next);
        if reg >= REGISTERS_MAX {
            if reg == REGISTERS_MAX {
                self.finding(span, "the rule has too many values").hint =
                    Some("move a part of it into a rule of its own".into());
            }
            return 0;
        }
        Reg::try_from(reg).unwrap_or(0)
    }

    /// Texts and bytes live in the program's pool, so that loading one costs no counting.
    fn pooled(&mut self, value: Val) -> Val {
        let (text, bytes) = match &value {
            Val::Text(text) => (true, text.as_bytes()),
            Val::Bytes(bytes) => (false, &**bytes),
            _ => return value,
        };
        let pool = &mut self.program.pool;
        let found = crate::vm::text::find(pool, bytes, 0);
        let start = found.unwrap_or_else(|| {
            pool.extend_from_slice(bytes);
            pool.len() - bytes.len()
        });
        // The source is shorter than 4 GiB, and so is the pool.
        let place = |at: usize| u32::try_from(at).unwrap_or(0);
        Val::Part(Part { buffer: POOL, text, start: place(start), end: place(start + bytes.len()) })
    }

    fn add_const(&mut self, value: Val) -> u16 {
        let value = self.pooled(value);
        let same = |other: &Val| match (other, &value) {
            (Val::Int(a), Val::Int(b)) => a == b,
            (Val::Part(a), Val::Part(b)) => a == b,
            (Val::Null, Val::Null) => true,
            (Val::Bool(a), Val::Bool(b)) => a == b,
            _ => false,
        };
        let at = self.program.consts.iter().position(same).unwrap_or_else(|| {
            self.program.consts.push(value);
            self.program.consts.len() - 1
        });
        u16::try_from(at).unwrap_or_else(|_| {
            self.full = true;
            0
        })
    }

    fn add_name(&mut self, name: &str, span: Span) -> u16 {
        if let Some(at) = self.name_indexes.get(name) {
            return *at;
        }
        let Ok(param) = ParamName::new(name) else {
            self.finding(span, "this is no name of a parameter").expected =
                Some(format!("1 to {} characters", ParamName::BYTES_MAX));
            return 0;
        };
        let at = u16::try_from(self.program.names.len()).unwrap_or_else(|_| {
            self.full = true;
            0
        });
        self.program.names.push(param);
        self.name_indexes.insert(name.to_owned(), at);
        at
    }

    fn add_scale(&mut self, factor: Decimal) -> u16 {
        let same = |f: &Decimal| f.mantissa() == factor.mantissa() && f.scale() == factor.scale();
        let at = self.program.scales.iter().position(same).unwrap_or_else(|| {
            self.program.scales.push(factor);
            self.program.scales.len() - 1
        });
        u16::try_from(at + 1).unwrap_or(0)
    }

    fn class_of(&mut self, name: &Name) -> u16 {
        if let Some(at) = self.class_names.get(&name.text) {
            return *at;
        }
        let known: Vec<String> = self.class_names.keys().cloned().collect();
        self.unknown(name, "class of error", known.iter().map(String::as_str));
        0
    }
}

/// Names that the expressions of `stmt` use.
fn names_of(stmt: &Stmt, names: &mut HashSet<String>) {
    crate::check::expressions(stmt, &mut |expr| collect_names(expr, names));
}

fn collect_names(expr: &Expr, names: &mut HashSet<String>) {
    crate::check::subexpressions(expr, &mut |e| {
        if let crate::ast::ExprKind::Name(name) = &e.kind {
            names.insert(name.clone());
        }
    });
}

/// What the checker needs of the sources.
fn sources_view<'s>(sources: &'s [Source<'_>]) -> Vec<crate::check::Body<'s>> {
    let view = |s: &'s Source<'_>| crate::check::Body { name: &s.name, body: s.body, span: s.span };
    sources.iter().map(view).collect()
}
