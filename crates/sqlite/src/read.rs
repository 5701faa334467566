//! Queries that read.

use fieldline_contracts::registry::AuditAction;
use fieldline_contracts::{Actor, Audit, Kind, Page, Record, RegistryError};
use fieldline_model::{AccountId, Timestamp};
use rusqlite::types::{Type, Value};
use rusqlite::{Connection, OptionalExtension, Row, params_from_iter};
use serde_json::Value as Json;
use uuid::Uuid;

use crate::thread::unavailable;

/// Most changes of one answer.
const CHANGES_MAX: usize = 10_000;

/// The newest sequence that was ever given, also where its entry was trimmed.
pub(crate) fn newest_sequence(db: &Connection) -> rusqlite::Result<u64> {
    // A new file has no tables yet.
    if !db.table_exists(None, "sqlite_sequence")? {
        return Ok(0);
    }
    newest_known(db)
}

/// As [`newest_sequence`], where the tables are known to be there.
pub(crate) fn newest_known(db: &Connection) -> rusqlite::Result<u64> {
    db.prepare_cached("SELECT seq FROM sqlite_sequence WHERE name = 'audit'")?
        .query_row([], |row| row.get::<_, i64>(0))
        .optional()
        .map(|sequence| unsigned(sequence.unwrap_or(0)))
}

/// The object of `account` with this id.
pub(crate) fn get(
    db: &Connection,
    account: AccountId,
    kind: Kind,
    id: Uuid,
) -> Result<Option<Record>, RegistryError> {
    let sql = "SELECT id, account, revision, body FROM objects \
               WHERE kind = ?1 AND id = ?2 AND account = ?3";
    let row = (kind.name(), id.as_bytes(), account.as_bytes());
    let found = db
        .prepare_cached(sql)
        .and_then(|mut query| query.query_row(row, raw).optional())
        .map_err(|error| unavailable(&error))?;
    found.map(|found| found.record(kind)).transpose()
}

/// The object with this key: of `account`, or of any where the key is unique on the installation.
pub(crate) fn find(
    db: &Connection,
    account: Option<AccountId>,
    kind: Kind,
    key: &str,
    value: &str,
) -> Result<Option<Record>, RegistryError> {
    // An empty blob matches no account, and is the installation's scope.
    let scope: &[u8] = account.as_ref().map_or(&[], |account| account.as_bytes());
    let sql = "SELECT o.id, o.account, o.revision, o.body \
               FROM keys k JOIN objects o ON o.kind = k.kind AND o.id = k.object \
               WHERE k.kind = ?1 AND k.scope IN (?2, x'') AND k.key = ?3 AND k.value = ?4 \
               AND (o.account = ?2 OR ?2 = x'')";
    let found = db
        .prepare_cached(sql)
        .and_then(|mut query| query.query_row((kind.name(), scope, key, value), raw).optional())
        .map_err(|error| unavailable(&error))?;
    found.map(|found| found.record(kind)).transpose()
}

/// A page of objects in order of ids. Their bodies are left to the caller's thread.
pub(crate) fn list(
    db: &Connection,
    account: Option<AccountId>,
    kind: Kind,
    page: &Page,
) -> Result<Vec<Raw>, RegistryError> {
    // The kind's name is ours: written out, so that partial indexes apply.
    let mut sql =
        format!("SELECT id, account, revision, body FROM objects WHERE kind = '{}'", kind.name());
    let mut values: Vec<Value> = Vec::new();
    let mut term = |text: &str, value: Value| {
        values.push(value);
        // The number of the value just pushed.
        sql.push_str(&text.replace('?', &format!("?{}", values.len())));
    };
    if let Some(account) = account {
        term(" AND account = ?", Value::Blob(account.as_bytes().to_vec()));
    }
    if let Some(after) = page.after {
        term(" AND id > ?", Value::Blob(after.as_bytes().to_vec()));
    }
    for (name, value) in &page.equals {
        // `->` gives the member as JSON text, so that "1", 1 and true are apart. It fails for what
        // is no JSON, of which the indexes hold nothing.
        let indexed = kind == Kind::Command && matches!(name.as_str(), "device" | "status");
        let simple =
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        let equal = Value::Text(value.to_string());
        if indexed {
            // Written out, so that the indexes on the member apply.
            term(&format!(" AND (body -> '$.\"{name}\"') = ?"), equal);
        } else if simple {
            let member = format!("CASE WHEN json_valid(body) THEN body -> '$.\"{name}\"' END");
            term(&format!(" AND ({member}) = ?"), equal);
        } else if name.contains(['"', '\\']) || name.chars().any(char::is_control) {
            // No object of ours has such a member, and a path cannot say it.
            return Ok(Vec::new());
        } else {
            term(
                " AND (CASE WHEN json_valid(body) THEN body -> ? END)",
                Value::Text(format!("$.\"{name}\"")),
            );
            term(" = ?", equal);
        }
    }
    let limit = page.limit.min(Page::LIMIT_MAX);
    term(" ORDER BY id LIMIT ?", Value::Integer(i64::try_from(limit).unwrap_or(i64::MAX)));
    rows(db, &sql, values, raw)
}

/// The audit trail of an account, newest first.
pub(crate) fn audit(
    db: &Connection,
    account: AccountId,
    before: Option<u64>,
    limit: usize,
) -> Result<Vec<Audit>, RegistryError> {
    let sql = "SELECT sequence, at, account, actor, address, action, kind, object, changed \
               FROM audit WHERE account = ?1 AND sequence < ?2 ORDER BY sequence DESC LIMIT ?3";
    let values = vec![
        Value::Blob(account.as_bytes().to_vec()),
        Value::Integer(signed(before.unwrap_or(u64::MAX))),
        Value::Integer(limit_of(limit)),
    ];
    rows(db, sql, values, audited)
}

/// Changes of all accounts, oldest first.
pub(crate) fn changes(
    db: &Connection,
    after: u64,
    limit: usize,
) -> Result<Vec<Audit>, RegistryError> {
    let sql = "SELECT sequence, at, account, actor, address, action, kind, object, changed \
               FROM audit WHERE sequence > ?1 ORDER BY sequence LIMIT ?2";
    let values = vec![Value::Integer(signed(after)), Value::Integer(limit_of(limit))];
    rows(db, sql, values, audited)
}

fn rows<T>(
    db: &Connection,
    sql: &str,
    values: Vec<Value>,
    read: fn(&Row<'_>) -> rusqlite::Result<T>,
) -> Result<Vec<T>, RegistryError> {
    let all = || -> rusqlite::Result<Vec<T>> {
        let mut query = db.prepare_cached(sql)?;
        query.query_map(params_from_iter(values), read)?.collect()
    };
    all().map_err(|error| unavailable(&error))
}

/// A row of `objects`, its body not yet read.
pub(crate) struct Raw {
    pub(crate) id: Uuid,
    pub(crate) account: AccountId,
    pub(crate) revision: u64,
    // Bytes: damaged text must not keep the rows beside it from being read.
    body: Vec<u8>,
}

pub(crate) fn raw(row: &Row<'_>) -> rusqlite::Result<Raw> {
    Ok(Raw {
        id: Uuid::from_bytes(row.get(0)?),
        account: AccountId::from_bytes(row.get(1)?),
        revision: unsigned(row.get(2)?),
        body: row.get_ref(3)?.as_bytes()?.to_vec(),
    })
}

impl Raw {
    pub(crate) fn record(self, kind: Kind) -> Result<Record, RegistryError> {
        let Self { id, account, revision, body } = self;
        match serde_json::from_slice::<Json>(&body) {
            Ok(body) => Ok(Record { kind, id, account, revision, body }),
            Err(error) => Err(RegistryError::Corrupt { kind, id, reason: error.to_string() }),
        }
    }

    /// As one of many: a body that is no JSON is null, so that whoever reads it names it, and goes
    /// on with the others.
    pub(crate) fn listed(self, kind: Kind) -> Record {
        let Self { id, account, revision, body } = self;
        let body = serde_json::from_slice::<Json>(&body).unwrap_or(Json::Null);
        Record { kind, id, account, revision, body }
    }
}

fn audited(row: &Row<'_>) -> rusqlite::Result<Audit> {
    let action = match row.get_ref(5)?.as_str()? {
        "create" => AuditAction::Create,
        "update" => AuditAction::Update,
        "delete" => AuditAction::Delete,
        other => return Err(unknown(5, other)),
    };
    let name = row.get_ref(6)?.as_str()?;
    let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name);
    let changed = row.get_ref(8)?.as_str()?;
    Ok(Audit {
        sequence: unsigned(row.get(0)?),
        at: Timestamp::from_micros(row.get(1)?),
        account: AccountId::from_bytes(row.get(2)?),
        actor: Actor { name: row.get(3)?, address: row.get(4)? },
        action,
        kind: kind.ok_or_else(|| unknown(6, name))?,
        object: Uuid::from_bytes(row.get(7)?),
        changed: serde_json::from_str(changed).map_err(|_| unknown(8, changed))?,
    })
}

fn unknown(column: usize, found: &str) -> rusqlite::Error {
    let reason = format!("the audit trail holds `{found}`, which this version does not know");
    rusqlite::Error::FromSqlConversionFailure(column, Type::Text, reason.into())
}

fn limit_of(limit: usize) -> i64 {
    i64::try_from(limit.min(CHANGES_MAX)).unwrap_or(i64::MAX)
}

/// SQLite's integers are signed, and ours count up from one.
pub(crate) fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

pub(crate) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
