//! Queries that write. Each runs in a savepoint that is rolled back where it returns an error.

use std::collections::BTreeMap;

use fieldline_contracts::registry::{AuditAction, UniqueIn};
use fieldline_contracts::{Actor, Draft, Kind, Record, RegistryError};
use fieldline_model::{AccountId, Timestamp};
use rusqlite::{Connection, OptionalExtension};
use serde_json::Value as Json;
use uuid::Uuid;

use crate::read::{self, signed, unsigned};
use crate::thread::unavailable;

/// Who changes what, for the audit trail.
struct Change<'a> {
    account: AccountId,
    kind: Kind,
    id: Uuid,
    actor: &'a Actor,
    at: Timestamp,
}

pub(crate) fn create(
    db: &Connection,
    account: AccountId,
    draft: Draft,
    actor: &Actor,
    at: Timestamp,
) -> Result<Record, RegistryError> {
    let Draft { kind, id, unique, body } = draft;
    let there = db
        .prepare_cached("SELECT 1 FROM objects WHERE kind = ?1 AND id = ?2")
        .and_then(|mut query| query.exists((kind.name(), id.as_bytes())))
        .map_err(|error| unavailable(&error))?;
    if there {
        return Err(RegistryError::Taken { kind, key: "id".to_owned(), value: id.to_string() });
    }
    let change = Change { account, kind, id, actor, at };
    let revision = audit(db, &change, AuditAction::Create, &[])?;
    execute(
        db,
        "INSERT INTO objects (kind, id, account, revision, body) VALUES (?1, ?2, ?3, ?4, ?5)",
        (kind.name(), id.as_bytes(), account.as_bytes(), signed(revision), body.to_string()),
    )?;
    set_keys(db, &change, &unique)?;
    Ok(Record { kind, id, account, revision, body })
}

pub(crate) fn update(
    db: &Connection,
    account: AccountId,
    draft: Draft,
    expected: Option<u64>,
    actor: &Actor,
    at: Timestamp,
) -> Result<Record, RegistryError> {
    let Draft { kind, id, unique, body } = draft;
    let before = present(db, account, kind, id, expected)?;
    let change = Change { account, kind, id, actor, at };
    let revision = audit(db, &change, AuditAction::Update, &changed(&before.body, &body))?;
    execute(
        db,
        "UPDATE objects SET revision = ?3, body = ?4 WHERE kind = ?1 AND id = ?2",
        (kind.name(), id.as_bytes(), signed(revision), body.to_string()),
    )?;
    drop_keys(db, kind, id)?;
    set_keys(db, &change, &unique)?;
    Ok(Record { kind, id, account, revision, body })
}

pub(crate) fn delete(
    db: &Connection,
    account: AccountId,
    kind: Kind,
    id: Uuid,
    expected: Option<u64>,
    actor: &Actor,
    at: Timestamp,
) -> Result<(), RegistryError> {
    present(db, account, kind, id, expected)?;
    drop_keys(db, kind, id)?;
    execute(db, "DELETE FROM objects WHERE kind = ?1 AND id = ?2", (kind.name(), id.as_bytes()))?;
    if kind == Kind::Account {
        execute(db, "DELETE FROM retained WHERE account = ?1", [account.as_bytes()])?;
    }
    audit(db, &Change { account, kind, id, actor, at }, AuditAction::Delete, &[]).map(|_| ())
}

/// The object as it is stored, if it is the account's and of the expected revision.
fn present(
    db: &Connection,
    account: AccountId,
    kind: Kind,
    id: Uuid,
    expected: Option<u64>,
) -> Result<Record, RegistryError> {
    let record = match read::get(db, account, kind, id) {
        Ok(found) => found.ok_or(RegistryError::NotFound { kind, id })?,
        // What cannot be read may still be replaced or deleted.
        Err(RegistryError::Corrupt { .. }) => {
            let revision: i64 = db
                .query_row(
                    "SELECT revision FROM objects WHERE kind = ?1 AND id = ?2",
                    (kind.name(), id.as_bytes()),
                    |row| row.get(0),
                )
                .map_err(|error| unavailable(&error))?;
            Record { kind, id, account, revision: unsigned(revision), body: Json::Null }
        }
        Err(other) => return Err(other),
    };
    match expected {
        Some(expected) if expected != record.revision => {
            Err(RegistryError::Changed { expected, found: record.revision })
        }
        _ => Ok(record),
    }
}

/// Names of top-level members that differ, those of the new body first.
fn changed(before: &Json, after: &Json) -> Vec<String> {
    let empty = serde_json::Map::new();
    let before = before.as_object().unwrap_or(&empty);
    let after = after.as_object().unwrap_or(&empty);
    let set = after.iter().filter(|(name, value)| before.get(*name) != Some(value));
    let gone = before.iter().filter(|(name, _)| !after.contains_key(*name));
    set.chain(gone).map(|(name, _)| name.clone()).collect()
}

fn set_keys(
    db: &Connection,
    change: &Change<'_>,
    unique: &BTreeMap<&'static str, (UniqueIn, String)>,
) -> Result<(), RegistryError> {
    let kind = change.kind;
    for (key, (scope, value)) in unique {
        let scope: &[u8] = match scope {
            UniqueIn::Account => change.account.as_bytes(),
            UniqueIn::Installation => &[],
        };
        let sql = "SELECT 1 FROM keys WHERE kind = ?1 AND scope = ?2 AND key = ?3 AND value = ?4";
        let taken = db
            .prepare_cached(sql)
            .and_then(|mut query| {
                query.query_row((kind.name(), scope, key, value), |_| Ok(())).optional()
            })
            .map_err(|error| unavailable(&error))?;
        if taken.is_some() {
            let (key, value) = ((*key).to_owned(), value.clone());
            return Err(RegistryError::Taken { kind, key, value });
        }
        execute(
            db,
            "INSERT INTO keys (kind, scope, key, value, object) VALUES (?1, ?2, ?3, ?4, ?5)",
            (kind.name(), scope, key, value, change.id.as_bytes()),
        )?;
    }
    Ok(())
}

fn drop_keys(db: &Connection, kind: Kind, id: Uuid) -> Result<(), RegistryError> {
    execute(db, "DELETE FROM keys WHERE kind = ?1 AND object = ?2", (kind.name(), id.as_bytes()))
}

/// Notes the change; its sequence is the object's new revision.
fn audit(
    db: &Connection,
    change: &Change<'_>,
    action: AuditAction,
    changed: &[String],
) -> Result<u64, RegistryError> {
    let Change { account, kind, id, actor, at } = change;
    let action = match action {
        AuditAction::Create => "create",
        AuditAction::Update => "update",
        AuditAction::Delete => "delete",
    };
    execute(
        db,
        "INSERT INTO audit (at, account, actor, address, action, kind, object, changed) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        (
            at.as_micros(),
            account.as_bytes(),
            &actor.name,
            &actor.address,
            action,
            kind.name(),
            id.as_bytes(),
            Json::from(changed).to_string(),
        ),
    )?;
    Ok(unsigned(db.last_insert_rowid()))
}

fn execute(db: &Connection, sql: &str, values: impl rusqlite::Params) -> Result<(), RegistryError> {
    db.prepare_cached(sql)
        .and_then(|mut statement| statement.execute(values))
        .map(|_| ())
        .map_err(|error| unavailable(&error))
}
