//! Queries that read.

use std::sync::Arc;

use fieldline_contracts::registry::AuditAction;
use fieldline_contracts::{Actor, Audit, Kind, Page, Record, RegistryError};
use fieldline_model::{AccountId, Timestamp};
use futures_util::FutureExt as _;
use serde_json::Value as Json;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;
use xxhash_rust::xxh3::Xxh3;

use crate::connect::Link;
use crate::error::Fault;
use crate::pool::Pool;

/// Most changes of one answer.
const CHANGES_MAX: usize = 10_000;

/// The newest sequence.
pub(crate) async fn newest(link: &Link) -> Result<u64, Fault> {
    let statement = link.prepared("SELECT sequence FROM counter").await?;
    let row = link.client.query_one(&statement, &[]).await?;
    Ok(unsigned(row.try_get(0)?))
}

/// A value of a query, owned.
type Term = Box<dyn ToSql + Send + Sync>;

async fn rows(pool: &Arc<Pool>, sql: String, terms: Vec<Term>) -> Result<Vec<Row>, RegistryError> {
    let asked = Arc::new((sql, terms));
    let all = pool.run(move |link| {
        let asked = Arc::clone(&asked);
        async move { query(link, &asked.0, &asked.1).await }.boxed()
    });
    all.await.map_err(|fault| fault.registry())
}

async fn query(link: &Link, sql: &str, terms: &[Term]) -> Result<Vec<Row>, Fault> {
    let statement = link.prepared(sql).await?;
    let terms: Vec<&(dyn ToSql + Sync)> = terms.iter().map(|term| &**term as _).collect();
    Ok(link.client.query(&statement, &terms).await?)
}

pub(crate) async fn get(
    pool: &Arc<Pool>,
    account: AccountId,
    kind: Kind,
    id: Uuid,
) -> Result<Option<Record>, RegistryError> {
    let sql = "SELECT id, account, revision, body FROM objects \
               WHERE kind = $1 AND id = $2 AND account = $3";
    let terms: Vec<Term> = vec![Box::new(kind.name()), Box::new(id), Box::new(account.0)];
    one(rows(pool, sql.to_owned(), terms).await?, kind)
}

/// The object with this key: of `account`, or of any where the key is unique on the installation.
pub(crate) async fn find(
    pool: &Arc<Pool>,
    account: Option<AccountId>,
    kind: Kind,
    key: &str,
    value: &str,
) -> Result<Option<Record>, RegistryError> {
    if key.contains('\0') {
        return Ok(None);
    }
    // An empty scope is the installation.
    let scope = account.map_or_else(Vec::new, |account| account.as_bytes().to_vec());
    let sql = "SELECT o.id, o.account, o.revision, o.body \
               FROM keys k JOIN objects o ON o.kind = k.kind AND o.id = k.object \
               WHERE k.kind = $1 AND k.scope IN ($2, ''::bytea) AND k.key = $3 \
               AND sha256(k.value) = sha256($4) AND k.value = $4 \
               AND ($5::uuid IS NULL OR o.account = $5)";
    let terms: Vec<Term> = vec![
        Box::new(kind.name()),
        Box::new(scope),
        Box::new(key.to_owned()),
        Box::new(value.as_bytes().to_vec()),
        Box::new(account.map(|account| account.0)),
    ];
    one(rows(pool, sql.to_owned(), terms).await?, kind)
}

fn one(rows: Vec<Row>, kind: Kind) -> Result<Option<Record>, RegistryError> {
    let row = rows.into_iter().next();
    row.map(|row| raw(&row).map_err(|fault| fault.registry())?.record(kind)).transpose()
}

/// A page of objects in order of ids.
pub(crate) async fn list(
    pool: &Arc<Pool>,
    account: Option<AccountId>,
    kind: Kind,
    page: &Page,
) -> Result<Vec<Record>, RegistryError> {
    let mut page = page.clone();
    let wanted = page.limit.min(Page::LIMIT_MAX);
    let members: Vec<i64> =
        page.equals.iter().map(|(name, value)| member_hash(name, value)).collect();
    let mut found = Vec::new();
    loop {
        page.limit = wanted - found.len();
        let mut sql = "SELECT id, account, revision, body FROM objects WHERE kind = $1".to_owned();
        let mut terms: Vec<Term> = vec![Box::new(kind.name())];
        let mut term = |text: &str, value: Term| {
            terms.push(value);
            sql.push_str(&text.replace('?', &format!("${}", terms.len())));
        };
        if let Some(account) = account {
            term(" AND account = ?", Box::new(account.0));
        }
        if let Some(after) = page.after {
            term(" AND id > ?", Box::new(after));
        }
        if !members.is_empty() {
            term(" AND members @> ?", Box::new(members.clone()));
        }
        term(" ORDER BY id LIMIT ?", Box::new(i64::try_from(page.limit).unwrap_or(i64::MAX)));
        let rows = rows(pool, sql, terms).await?;
        let complete = rows.len() < page.limit;
        for row in rows {
            let raw = raw(&row).map_err(|fault| fault.registry())?;
            page.after = Some(raw.id);
            let record = raw.listed(kind);
            // A hash may be that of another value.
            let fits = |(name, value): &(String, Json)| record.body.get(name) == Some(value);
            if page.equals.iter().all(fits) {
                found.push(record);
            }
        }
        if complete || found.len() >= wanted {
            return Ok(found);
        }
    }
}

/// What stands for a top-level member and its value in the index. Stored: never change it.
pub(crate) fn member_hash(name: &str, value: &Json) -> i64 {
    let mut hasher = Xxh3::new();
    hasher.update(name.as_bytes());
    hasher.update(&[0]);
    hasher.update(value.to_string().as_bytes());
    hasher.digest().cast_signed()
}

/// The account's audit trail, newest first.
pub(crate) async fn audit(
    pool: &Arc<Pool>,
    account: AccountId,
    before: Option<u64>,
    limit: usize,
) -> Result<Vec<Audit>, RegistryError> {
    let sql = "SELECT sequence, at, account, actor, address, action, kind, object, changed \
               FROM audit WHERE account = $1 AND sequence < $2 ORDER BY sequence DESC LIMIT $3";
    let before = signed(before.unwrap_or(u64::MAX));
    let terms: Vec<Term> = vec![Box::new(account.0), Box::new(before), Box::new(limit_of(limit))];
    rows(pool, sql.to_owned(), terms).await?.iter().map(audited).collect()
}

/// Changes of all accounts, oldest first.
pub(crate) async fn changes(
    pool: &Arc<Pool>,
    after: u64,
    limit: usize,
) -> Result<Vec<Audit>, RegistryError> {
    let sql = "SELECT sequence, at, account, actor, address, action, kind, object, changed \
               FROM audit WHERE sequence > $1 ORDER BY sequence LIMIT $2";
    let terms: Vec<Term> = vec![Box::new(signed(after)), Box::new(limit_of(limit))];
    rows(pool, sql.to_owned(), terms).await?.iter().map(audited).collect()
}

/// A row of `objects`, its body not yet read.
pub(crate) struct Raw {
    pub(crate) id: Uuid,
    account: AccountId,
    pub(crate) revision: u64,
    body: String,
}

pub(crate) fn raw(row: &Row) -> Result<Raw, Fault> {
    Ok(Raw {
        id: row.try_get(0)?,
        account: AccountId(row.try_get(1)?),
        revision: unsigned(row.try_get(2)?),
        body: row.try_get(3)?,
    })
}

impl Raw {
    pub(crate) fn record(self, kind: Kind) -> Result<Record, RegistryError> {
        let Self { id, account, revision, body } = self;
        match serde_json::from_str::<Json>(&body) {
            Ok(body) => Ok(Record { kind, id, account, revision, body }),
            Err(error) => Err(RegistryError::Corrupt { kind, id, reason: error.to_string() }),
        }
    }

    /// As one of many: a body that is no JSON is null, so that whoever reads it names it, and goes on
    /// with the others.
    pub(crate) fn listed(self, kind: Kind) -> Record {
        let Self { id, account, revision, body } = self;
        let body = serde_json::from_str::<Json>(&body).unwrap_or(Json::Null);
        Record { kind, id, account, revision, body }
    }
}

fn audited(row: &Row) -> Result<Audit, RegistryError> {
    let unknown = |found: &str| {
        let text =
            format!("the audit trail holds `{found}`, which this version does not know; update it");
        RegistryError::Unavailable(text)
    };
    let fields = || -> Result<_, tokio_postgres::Error> {
        let action: &str = row.try_get(5)?;
        let kind: &str = row.try_get(6)?;
        let changed: &str = row.try_get(8)?;
        let sequence = unsigned(row.try_get(0)?);
        let actor = Actor { name: row.try_get(3)?, address: row.try_get(4)? };
        let at = Timestamp::from_micros(row.try_get(1)?);
        let (account, object): (Uuid, Uuid) = (row.try_get(2)?, row.try_get(7)?);
        Ok((action, kind, changed, sequence, actor, at, account, object))
    };
    let (action, name, changed, sequence, actor, at, account, object) =
        fields().map_err(|error| Fault::from(error).registry())?;
    let action = match action {
        "create" => AuditAction::Create,
        "update" => AuditAction::Update,
        "delete" => AuditAction::Delete,
        other => return Err(unknown(other)),
    };
    let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name);
    let kind = kind.ok_or_else(|| unknown(name))?;
    let changed = serde_json::from_str(changed).map_err(|_| unknown(changed))?;
    Ok(Audit { sequence, at, account: AccountId(account), actor, action, kind, object, changed })
}

fn limit_of(limit: usize) -> i64 {
    i64::try_from(limit.min(CHANGES_MAX)).unwrap_or(i64::MAX)
}

/// PostgreSQL's integers are signed, and ours count up from one.
pub(crate) fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

pub(crate) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
