//! The tree that the parser makes and the compiler takes.

use fieldline_model::Decimal;

use crate::lexer::Span;

/// A name and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Name {
    pub(crate) text: String,
    pub(crate) span: Span,
}

/// A whole source.
#[derive(Debug, Default)]
pub(crate) struct File {
    pub(crate) name: Option<Name>,
    pub(crate) description: String,
    pub(crate) items: Vec<Item>,
}

/// A declaration at the top.
#[derive(Debug)]
pub(crate) enum Item {
    /// `transport tcp, udp`
    Transport(Vec<Name>),
    /// `setting io16: bool = false "…"`
    Setting { name: Name, kind: Name, default: Expr, description: String },
    /// `error bad_crc lenient close protocol_error answer x"00"`
    Error { names: Vec<Name>, lenient: bool, close: Option<Option<Name>>, answer: Vec<Stmt> },
    /// `session version = null`: kept for the connection.
    Session { name: Name, value: Expr },
    /// `var kind = null`: fresh in every frame.
    Var { name: Name, value: Expr },
    /// `define field(x) = …`: an expression with a name.
    Define { name: Name, params: Vec<Name>, body: Expr },
    /// `table io "io.{id}" { … }`
    Table { name: Name, unknown: Option<(String, Span)>, rows: Vec<Row> },
    /// `rule record(codec) { … }`
    Rule { name: Name, params: Vec<Name>, body: Vec<Stmt> },
    /// `on tcp { … }`
    On { transports: Vec<Name>, body: Vec<Stmt>, span: Span },
    /// `command text "…" { … }`
    Command { name: Name, title: String, params: Vec<CommandParam>, body: Vec<Stmt> },
}

/// `param text: text "…"` of a command.
#[derive(Debug)]
pub(crate) struct CommandParam {
    pub(crate) name: Name,
    pub(crate) kind: Name,
    pub(crate) description: String,
}

/// A line of a table: `72: temperature.1 signed * 0.1 except 850, 2000`
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) id: u64,
    pub(crate) id_span: Span,
    pub(crate) name: Name,
    pub(crate) kind: RowKind,
    pub(crate) factor: Option<Decimal>,
    pub(crate) offset: Option<Decimal>,
    pub(crate) except: Vec<i64>,
}

/// How a table's line reads its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowKind {
    /// A whole number without sign.
    Unsigned,
    /// A whole number in two's complement of the width that it came in.
    Signed,
    /// 0 or 1.
    Bool,
    /// Text.
    Text,
    /// Bytes.
    Bytes,
}

/// A statement and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct Stmt {
    pub(crate) kind: StmtKind,
    pub(crate) span: Span,
}

/// Where a value goes.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// A variable.
    Name(Name),
    /// A parameter of the open message.
    Param(Name),
    /// A parameter whose name is computed: `#(name)`.
    Dynamic(Expr),
    /// A parameter found in a table: `#io[u8]`.
    Entry(Name, Expr),
}

/// What a statement does.
#[derive(Clone, Debug)]
pub(crate) enum StmtKind {
    /// `target: value else class` reads; `target = value else class` computes.
    Set { target: Target, value: Expr, reads: bool, otherwise: Option<Name> },
    /// `check condition else class`
    Check { condition: Expr, class: Name },
    /// `fail class`
    Fail { class: Name },
    /// `if … { } else { }`
    If { condition: Expr, then: Vec<Stmt>, otherwise: Vec<Stmt> },
    /// `switch … { … }`
    Switch { subject: Expr, cases: Vec<Case>, otherwise: Option<Vec<Stmt>> },
    /// `repeat n { }`; without a count, `repeat to end { }`.
    Repeat { count: Option<Expr>, body: Vec<Stmt> },
    /// `within bytes { }`
    Within { part: Expr, body: Vec<Stmt> },
    /// `message { }`
    Message { body: Vec<Stmt> },
    /// `attempt { } else { }`
    Attempt { body: Vec<Stmt>, otherwise: Vec<Stmt> },
    /// `login ident password p refused { }`
    Login { ident: Expr, password: Option<Expr>, refused: Option<Vec<Stmt>> },
    /// `reply a, b`; in a command, `send a, b`.
    Reply { parts: Vec<Expr> },
    /// `answer text`, or `answer refused text`.
    Answer { value: Expr, accepted: bool },
    /// `close code`
    Close { code: Option<Name> },
    /// `done`
    Done,
    /// `break`
    Break,
    /// `skip n`
    Skip { count: Expr },
    /// `expect answer`, in a command.
    Expect,
    /// `rule(a, b)`
    Call { name: Name, args: Vec<Expr> },
}

/// `1, 2 { … }` of a switch.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) values: Vec<Expr>,
    pub(crate) body: Vec<Stmt>,
}

/// An expression and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct Expr {
    pub(crate) kind: ExprKind,
    pub(crate) span: Span,
}

/// What an expression is.
#[derive(Clone, Debug)]
pub(crate) enum ExprKind {
    Null,
    Bool(bool),
    Int(i128),
    Dec(Decimal),
    Text(String),
    Bytes(Vec<u8>),
    Date(i64),
    /// A variable, a builtin such as `left`, or a read such as `u16`.
    Name(String),
    /// A function, a read with an argument, or a definition.
    Call {
        name: Name,
        args: Vec<Expr>,
    },
    /// `peek u8`
    Peek(Box<Expr>),
    /// `until ";"`, `until "\n" or end`
    Until {
        delimiter: Vec<u8>,
        or_end: bool,
    },
    Unary {
        op: UnaryOp,
        value: Box<Expr>,
    },
    Binary {
        op: BinaryOp,
        left: Box<Expr>,
        right: Box<Expr>,
    },
    /// `a in 1..9`
    In {
        value: Box<Expr>,
        low: Box<Expr>,
        high: Box<Expr>,
    },
    /// `c ? a : b`
    Choose {
        condition: Box<Expr>,
        then: Box<Expr>,
        otherwise: Box<Expr>,
    },
}

/// An operator before its operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UnaryOp {
    Not,
    Minus,
    Invert,
}

/// An operator between operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BinaryOp {
    And,
    Or,
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    Add,
    Sub,
    Mul,
    Div,
    Rem,
    BitAnd,
    BitOr,
    BitXor,
    Shl,
    Shr,
}
