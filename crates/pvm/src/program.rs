//! A compiled protocol and what it declares.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use fieldline_model::{CloseCode, Decimal, ParamName, Transport, Value};

use crate::ast::RowKind;
use crate::op::Op;
use crate::vm::value::Val;

/// A setting of a device that a protocol reads.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct SettingDecl {
    /// Its name.
    pub name: String,
    /// What it holds.
    pub kind: DeclKind,
    /// What it is where nothing is set.
    pub default: serde_json::Value,
    /// What it is for.
    pub description: String,
}

/// What a setting or a command's parameter holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DeclKind {
    /// True or false.
    Bool,
    /// A whole number.
    Int,
    /// Text.
    Text,
}

impl DeclKind {
    /// The kind that a program calls `name`.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "bool" => Self::Bool,
            "int" => Self::Int,
            "text" => Self::Text,
            _ => return None,
        })
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::Int => "int",
            Self::Text => "text",
        }
    }

    /// The value, if it is of this kind.
    pub(crate) fn take(self, value: &Value) -> Option<Val> {
        match (self, value) {
            (Self::Bool, Value::Bool(_)) | (Self::Text, Value::Text(_)) => Some(Val::from(value)),
            (Self::Int, _) => value.as_i64().map(Val::Int),
            _ => None,
        }
    }
}

/// A command that a protocol can send.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct CommandDecl {
    /// Its name.
    pub name: String,
    /// Its name for people.
    pub title: String,
    /// What must be given with it.
    pub params: Vec<ParamDecl>,
}

/// A parameter of a command.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ParamDecl {
    /// Its name.
    pub name: String,
    /// What it holds.
    pub kind: DeclKind,
    /// What it is for.
    pub description: String,
}

/// A compiled protocol. Shared by all its sessions; immutable.
#[derive(Debug, Default)]
pub struct Program {
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) transports: Vec<Transport>,
    pub(crate) settings: Vec<SettingDecl>,
    pub(crate) commands: Vec<CommandDecl>,
    /// Index of the rule of each command.
    pub(crate) command_rules: Vec<u16>,
    /// Runs where nobody looks.
    pub(crate) plain: Code,
    /// The same, telling of each field.
    pub(crate) traced: Code,
    pub(crate) consts: Vec<Val>,
    /// Contents of constant texts and bytes.
    pub(crate) pool: Vec<u8>,
    /// `tcp` and `udp`, as programs see them.
    pub(crate) carriers: [Val; 2],
    pub(crate) names: Vec<ParamName>,
    pub(crate) scales: Vec<Decimal>,
    pub(crate) classes: Vec<Class>,
    pub(crate) rules: Vec<Rule>,
    pub(crate) tables: Vec<Table>,
    /// Values of the frame's variables when it begins.
    pub(crate) vars: Vec<Val>,
    /// Names and first values of the connection's variables.
    pub(crate) session_vars: Vec<(String, Val)>,
    pub(crate) on_stream: Option<u16>,
    pub(crate) on_datagram: Option<u16>,
}

/// Instructions, and the line that each comes from.
#[derive(Debug, Default)]
pub(crate) struct Code {
    pub(crate) ops: Vec<Op>,
    pub(crate) lines: Vec<u32>,
}

/// A rule's place in the code.
#[derive(Debug)]
pub(crate) struct Rule {
    pub(crate) name: Arc<str>,
    pub(crate) start_plain: u32,
    pub(crate) start_traced: u32,
    /// Registers that it uses, arguments of its calls not counted.
    pub(crate) registers: u16,
    /// Whether it reads a password.
    pub(crate) secret: bool,
}

/// A class of errors.
#[derive(Debug)]
pub(crate) struct Class {
    pub(crate) name: Arc<str>,
    /// Whether the lenient option makes its checks pass.
    pub(crate) lenient: bool,
    pub(crate) close: Option<CloseCode>,
    /// The rule that answers it.
    pub(crate) answer: Option<u16>,
}

/// Classes that the machine itself raises, in the order of their indexes.
pub(crate) const MACHINE_CLASSES: &[(&str, Option<CloseCode>)] = &[
    ("truncated", None),
    ("frame_too_large", Some(CloseCode::FrameTooLarge)),
    ("limit_exceeded", Some(CloseCode::LimitExceeded)),
    ("bad_value", Some(CloseCode::ProtocolError)),
];

/// Index of `truncated` among the classes.
pub(crate) const TRUNCATED: u16 = 0;
/// Index of `frame_too_large`.
pub(crate) const FRAME_TOO_LARGE: u16 = 1;
/// Index of `limit_exceeded`.
pub(crate) const LIMIT_EXCEEDED: u16 = 2;
/// Index of `bad_value`.
pub(crate) const BAD_VALUE: u16 = 3;

/// What a table says of one id.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// The parameter; for an id that the table lacks, the same as `raw`.
    pub(crate) name: ParamName,
    /// The parameter that keeps the value as sent, where it is not of the declared kind.
    pub(crate) raw: ParamName,
    pub(crate) kind: RowKind,
    pub(crate) factor: Option<Decimal>,
    pub(crate) offset: Option<Decimal>,
    /// Numbers that are no values but codes; they are kept as sent.
    pub(crate) except: Box<[i64]>,
}

/// Ids whose entries are made once and kept, a page of them when the first of it is met.
const PAGES: usize = 256;
const PAGE: usize = 256;

/// Entries of neighbouring ids; `None` for those that are not stored.
type Page = Box<[Option<Entry>]>;

/// Parameters by id.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) name: String,
    /// Name of ids that it lacks, before and after the id; without one they are not stored.
    unknown: Option<(String, String)>,
    rows: HashMap<u64, Entry>,
    pages: Box<[OnceLock<Page>]>,
}

impl Table {
    pub(crate) fn new(
        name: String,
        unknown: Option<(String, String)>,
        rows: HashMap<u64, Entry>,
    ) -> Self {
        let pages = (0..PAGES).map(|_| OnceLock::new()).collect();
        Self { name, unknown, rows, pages }
    }

    /// Ids that it names.
    pub(crate) fn rows(&self) -> &HashMap<u64, Entry> {
        &self.rows
    }

    /// Name of the raw value of `id`.
    pub(crate) fn raw_name(&self, id: u64) -> Option<ParamName> {
        let (before, after) = self.unknown.as_ref()?;
        ParamName::new(format!("{before}{id}{after}")).ok()
    }

    fn make(&self, id: u64) -> Option<Entry> {
        if let Some(entry) = self.rows.get(&id) {
            return Some(entry.clone());
        }
        let raw = self.raw_name(id)?;
        let (factor, offset, except) = (None, None, Box::default());
        Some(Entry { name: raw.clone(), raw, kind: RowKind::Unsigned, factor, offset, except })
    }

    /// What is said of `id`: from the pages, or made and put into `spare` for a large id.
    pub(crate) fn entry<'a>(&'a self, id: u64, spare: &'a mut Option<Entry>) -> Option<&'a Entry> {
        let at = usize::try_from(id).unwrap_or(usize::MAX);
        if let Some(page) = self.pages.get(at / PAGE) {
            let first = (at / PAGE * PAGE) as u64;
            let page =
                page.get_or_init(|| (first..first + PAGE as u64).map(|id| self.make(id)).collect());
            return page.get(at % PAGE)?.as_ref();
        }
        *spare = self.make(id);
        spare.as_ref()
    }
}

impl Program {
    /// The protocol's name, as declared in its first line.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is, for people.
    #[must_use]
    pub fn description(&self) -> &str {
        &self.description
    }

    /// What can carry it.
    #[must_use]
    pub fn transports(&self) -> &[Transport] {
        &self.transports
    }

    /// Settings of a device that it reads.
    #[must_use]
    pub fn settings(&self) -> &[SettingDecl] {
        &self.settings
    }

    /// Commands that it can send.
    #[must_use]
    pub fn commands(&self) -> &[CommandDecl] {
        &self.commands
    }

    /// The rule that instruction `pc` belongs to.
    pub(crate) fn rule_at(&self, pc: usize, traced: bool) -> Option<&Rule> {
        let start = |rule: &Rule| {
            let start = if traced { rule.start_traced } else { rule.start_plain };
            usize::try_from(start).unwrap_or(usize::MAX)
        };
        self.rules.iter().filter(|r| start(r) <= pc).max_by_key(|r| start(r))
    }
}
