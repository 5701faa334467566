//! What can go wrong with the server, and what to do about it.

use std::time::Duration;

use fieldline_contracts::history::Gap;
use fieldline_contracts::{HistoryError, RegistryError};
use tokio_postgres::error::SqlState;

/// Why the database cannot be used. Each says what and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// A setting cannot be used.
    #[error("the PostgreSQL settings cannot be used: {0}")]
    Settings(String),
    /// No server answers.
    #[error("PostgreSQL cannot be reached ({reason}): start it, or correct host and port in `url`")]
    Unreachable {
        /// What each server did.
        reason: String,
    },
    /// The server does not take the user or his password.
    #[error(
        "PostgreSQL at {server} does not let `{user}` in ({reason}): correct user and password in `url`, or pg_hba.conf of the server"
    )]
    Refused {
        /// Which server.
        server: String,
        /// Who was refused.
        user: String,
        /// What it said.
        reason: String,
    },
    /// Server and settings do not agree about TLS.
    #[error("no encrypted connection to PostgreSQL at {server} ({reason}): {remedy}")]
    Tls {
        /// Which server.
        server: String,
        /// What it said.
        reason: String,
        /// What to do.
        remedy: &'static str,
    },
    /// There is no such database.
    #[error(
        "PostgreSQL at {server} has no database `{database}`: make it with `createdb {database}`, or correct `url`"
    )]
    NoDatabase {
        /// Which server.
        server: String,
        /// Which database.
        database: String,
    },
    /// The user may not do what has to be done.
    #[error(
        "`{user}` may not make tables ({reason}): run GRANT CREATE ON DATABASE \"{database}\" TO \"{user}\", and make him the owner of schema `{schema}` if it is there"
    )]
    NoRight {
        /// Who.
        user: String,
        /// In which database.
        database: String,
        /// In which schema.
        schema: String,
        /// What the server said.
        reason: String,
    },
    /// The server is older than what is needed.
    #[error("PostgreSQL at {server} is too old ({reason}): 14 or newer is needed")]
    TooOld {
        /// Which server.
        server: String,
        /// What it said.
        reason: String,
    },
    /// Only standbys answer.
    #[error(
        "no PostgreSQL that takes writes was found ({reason}): add the primary to `url`, or promote a standby"
    )]
    ReadOnly {
        /// What each server did.
        reason: String,
    },
    /// The database does not keep text as UTF-8.
    #[error(
        "the database `{database}` keeps text as {found}: make one with `createdb --encoding=UTF8 --template=template0 {database}`"
    )]
    Encoding {
        /// Which database.
        database: String,
        /// Its encoding.
        found: String,
    },
    /// The tables are of a version too far from ours.
    #[error(
        "the tables in schema `{schema}` are of version {found}, and this program works with {oldest} to {newest}: {remedy}"
    )]
    Version {
        /// In which schema.
        schema: String,
        /// Their version.
        found: i32,
        /// The oldest version that this program works with.
        oldest: i32,
        /// The newest version that this program works with.
        newest: i32,
        /// What to do.
        remedy: &'static str,
    },
    /// The history was made with another count of shards.
    #[error(
        "the history in schema `{schema}` was made with {found} shards, and `shards` says {asked}: set it to {found} or leave it out"
    )]
    Shards {
        /// In which schema.
        schema: String,
        /// What it has.
        found: u16,
        /// What was asked for.
        asked: u16,
    },
    /// Anything else.
    #[error("PostgreSQL cannot be used: {0}")]
    Other(String),
}

/// What became of one exchange with the server.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    #[error("{}", told(.0))]
    Server(#[from] tokio_postgres::Error),
    #[error("no answer within {} ms", .0.as_millis())]
    Slow(Duration),
    #[error("{0}")]
    Connect(#[from] ConnectError),
    #[error("all {0} connections are in use")]
    Exhausted(usize),
    #[error("{0}")]
    Damaged(String),
    #[error("{0}")]
    Gap(Box<Gap>),
}

/// What the server said, on one line.
pub(crate) fn told(error: &tokio_postgres::Error) -> String {
    if let Some(db) = error.as_db_error() {
        return format!("{} ({})", db.message(), db.code().code());
    }
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

/// How a fault leaves the transaction that it happened in, and the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The same may be tried again on the same connection: nothing was kept.
    Again,
    /// A table that was thought to be there is not.
    NoTable,
    /// The connection is of no more use; whether a commit under way was kept is not known.
    Lost,
    /// There is no space.
    Full,
    /// Trying again changes nothing.
    Final,
}

impl Fault {
    pub(crate) fn verdict(&self) -> Verdict {
        let error = match self {
            Self::Server(error) => error,
            Self::Slow(_) | Self::Connect(_) => return Verdict::Lost,
            Self::Exhausted(_) => return Verdict::Again,
            Self::Damaged(_) | Self::Gap(_) => return Verdict::Final,
        };
        let Some(code) = error.code() else { return Verdict::Lost };
        match code.code().as_bytes() {
            // disk_full; out_of_memory and too_many_connections may pass.
            b"53100" => Verdict::Full,
            // serialization_failure, deadlock_detected, lock_not_available, query_canceled
            b"40001" | b"40P01" | b"55P03" | b"57014" => Verdict::Again,
            b"42P01" => Verdict::NoTable,
            // read_only_sql_transaction: the primary has become a standby.
            b"25006"
            | [b'0', b'8', ..]
            | [b'5', b'3', ..]
            | [b'5', b'7', ..]
            | b"XX000"
            | b"58030"
            | b"25P03"
            | b"25P02"
            | b"28000"
            | b"28P01" => Verdict::Lost,
            _ => Verdict::Final,
        }
    }

    pub(crate) fn is(&self, state: &SqlState) -> bool {
        matches!(self, Self::Server(error) if error.code() == Some(state))
    }

    pub(crate) fn registry(&self) -> RegistryError {
        RegistryError::Unavailable(self.to_string())
    }

    /// For reads, of which nobody acknowledges anything.
    pub(crate) fn history(&self) -> HistoryError {
        match self {
            Self::Damaged(what) => HistoryError::Corrupt(what.clone()),
            Self::Gap(gap) => HistoryError::Gap(gap.clone()),
            Self::Exhausted(_) => HistoryError::Busy,
            // Its own words name files.
            other
                if other.is(&SqlState::DATA_CORRUPTED) || other.is(&SqlState::INDEX_CORRUPTED) =>
            {
                HistoryError::Corrupt(
                    "PostgreSQL finds damaged pages: look with pg_amcheck, and restore a backup"
                        .to_owned(),
                )
            }
            other => HistoryError::Failed(other.to_string()),
        }
    }
}
