//! The tables, and how an older file is brought to the present form.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, TransactionBehavior};

use crate::{OpenError, open_error};

/// Marks the file as ours: `FLRG` in ASCII.
const APPLICATION_ID: i32 = 0x464C_5247;

/// How long another program (a backup, a shell) may hold the file before a call fails.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Statements kept prepared by each connection.
const STATEMENTS_MAX: usize = 64;

/// Each brings the schema one version on. Never change one that was released: add another.
const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE objects (
        number   INTEGER PRIMARY KEY,
        kind     TEXT NOT NULL,
        id       BLOB NOT NULL,
        account  BLOB NOT NULL,
        revision INTEGER NOT NULL,
        body     TEXT NOT NULL,
        UNIQUE (kind, id)
    ) STRICT;
    CREATE INDEX objects_of_account ON objects (account, kind, id);
    -- Commands are many; they are asked for by device, and by status.
    CREATE INDEX commands_of_device ON objects (account, (body -> '$.\"device\"'), id)
        WHERE kind = 'command';
    CREATE INDEX commands_of_status ON objects ((body -> '$.\"status\"'), id)
        WHERE kind = 'command';
    -- The scope is the account, or empty where a key is unique on the installation.
    CREATE TABLE keys (
        kind   TEXT NOT NULL,
        scope  BLOB NOT NULL,
        key    TEXT NOT NULL,
        value  TEXT NOT NULL,
        object BLOB NOT NULL,
        PRIMARY KEY (kind, scope, key, value)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX keys_of_object ON keys (kind, object);
    CREATE TABLE audit (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        at       INTEGER NOT NULL,
        account  BLOB NOT NULL,
        actor    TEXT NOT NULL,
        address  TEXT,
        action   TEXT NOT NULL,
        kind     TEXT NOT NULL,
        object   BLOB NOT NULL,
        changed  TEXT NOT NULL
    ) STRICT;
    CREATE INDEX audit_of_account ON audit (account, sequence);
",
    "
    -- What MQTT clients retain. Times are microseconds since 1970.
    CREATE TABLE retained (
        number        INTEGER PRIMARY KEY,
        account       BLOB NOT NULL,
        topic         TEXT NOT NULL,
        bytes         INTEGER NOT NULL,
        at_least_once INTEGER NOT NULL,
        expires_at    INTEGER,
        payload       BLOB NOT NULL,
        props         BLOB NOT NULL,
        UNIQUE (account, topic)
    ) STRICT;
    CREATE INDEX retained_bytes ON retained (account, bytes);
    -- The wills of clients that are connected; `owner` is the process that they are connected to.
    CREATE TABLE wills (
        account   BLOB NOT NULL,
        client_id TEXT NOT NULL,
        number    INTEGER NOT NULL,
        owner     INTEGER NOT NULL,
        will      TEXT NOT NULL,
        PRIMARY KEY (account, client_id)
    ) STRICT;
    CREATE INDEX wills_of_owner ON wills (owner);
",
];

/// Settings of a connection.
pub(crate) fn configure(db: &Connection) -> rusqlite::Result<()> {
    db.busy_timeout(BUSY_TIMEOUT)?;
    db.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
    db.pragma_update(None, "journal_mode", "WAL")?;
    // With a write-ahead log, only FULL syncs at each commit.
    db.pragma_update(None, "synchronous", "FULL")?;
    // A damaged page is an error where it is met, not a strange answer.
    db.pragma_update(None, "cell_size_check", true)?;
    db.pragma_update(None, "trusted_schema", false)
}

/// Runs `work`, which gives way at once where another program holds the file.
pub(crate) fn without_waiting<T>(
    db: &Connection,
    work: impl FnOnce(&Connection) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    db.busy_timeout(Duration::ZERO)?;
    let done = work(db);
    db.busy_timeout(BUSY_TIMEOUT)?;
    done
}

/// Checks the whole file; the inner error is the first damage found.
pub(crate) fn check(db: &Connection) -> rusqlite::Result<Result<(), String>> {
    let found: String = db.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    Ok(if found == "ok" { Ok(()) } else { Err(found) })
}

/// Refuses a file of another program, or of a newer version of this one.
pub(crate) fn known(db: &Connection, path: &Path) -> Result<(), OpenError> {
    let named = |error: rusqlite::Error| open_error(path, &error);
    let known = u32::try_from(MIGRATIONS.len()).unwrap_or(u32::MAX);
    let found: u32 =
        db.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(named)?;
    let owner: i32 =
        db.pragma_query_value(None, "application_id", |row| row.get(0)).map_err(named)?;
    if owner != APPLICATION_ID {
        return Err(OpenError::Foreign { path: path.to_owned() });
    }
    if found > known {
        return Err(OpenError::Newer { path: path.to_owned(), found, known });
    }
    Ok(())
}

/// Brings the file to the present schema, whole or not at all.
pub(crate) fn migrate(db: &mut Connection, path: &Path) -> Result<(), OpenError> {
    let named = |error: rusqlite::Error| open_error(path, &error);
    let known = u32::try_from(MIGRATIONS.len()).unwrap_or(u32::MAX);
    let tx = db.transaction_with_behavior(TransactionBehavior::Immediate).map_err(named)?;
    let found: u32 =
        tx.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(named)?;
    let owner: i32 =
        tx.pragma_query_value(None, "application_id", |row| row.get(0)).map_err(named)?;
    let tables: u32 =
        tx.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0)).map_err(named)?;
    if owner != APPLICATION_ID && tables > 0 {
        return Err(OpenError::Foreign { path: path.to_owned() });
    }
    if found > known {
        return Err(OpenError::Newer { path: path.to_owned(), found, known });
    }
    let missing = MIGRATIONS.iter().skip(usize::try_from(found).unwrap_or(usize::MAX));
    for migration in missing {
        tx.execute_batch(migration).map_err(named)?;
    }
    if found < known {
        tx.pragma_update(None, "application_id", APPLICATION_ID).map_err(named)?;
        tx.pragma_update(None, "user_version", known).map_err(named)?;
        tracing::info!(path = %path.display(), from = found, to = known, "registry schema brought up to date");
    }
    tx.commit().map_err(named)
}
