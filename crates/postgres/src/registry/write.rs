//! Changes. Each is one transaction; one of which it is not known whether it was kept is looked up.

use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::registry::UniqueIn;
use fieldline_contracts::{Actor, Draft, Kind, Record, RegistryError};
use fieldline_model::{AccountId, Timestamp};
use serde_json::Value as Json;
use tokio::time::Instant;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use crate::connect::{Link, within};
use crate::error::{Fault, Verdict};
use crate::pool::Pool;
use crate::registry::read::{self, signed, unsigned};

/// Longest that a change is tried, reconnecting included.
const TRY_MAX: Duration = Duration::from_secs(20);

/// What is to be changed, by whom and when.
pub(crate) struct Change {
    pub(crate) account: AccountId,
    pub(crate) actor: Actor,
    pub(crate) at: Timestamp,
    pub(crate) what: What,
}

pub(crate) enum What {
    Create(Draft),
    Update(Draft, Option<u64>),
    Delete(Kind, Uuid, Option<u64>),
}

impl Change {
    fn object(&self) -> (Kind, Uuid) {
        match &self.what {
            What::Create(draft) | What::Update(draft, _) => (draft.kind, draft.id),
            What::Delete(kind, id, _) => (*kind, *id),
        }
    }
}

/// Why a transaction was not finished.
enum Stop {
    /// The change is not allowed; nothing was kept.
    Refused(RegistryError),
    /// Something failed; nothing was kept.
    Failed(Fault),
    /// The connection was lost while committing: it may have been kept under this number.
    Unknown(Fault, Record),
}

impl<E: Into<Fault>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// Makes `change`, and returns the object as it is now, or was.
pub(crate) async fn make(pool: &Arc<Pool>, change: &Change) -> Result<Record, RegistryError> {
    let deadline = Instant::now() + TRY_MAX;
    let limit = pool.servers.statement_timeout + Duration::from_secs(1);
    let mut unknown: Option<Record> = None;
    loop {
        let fault = match attempt(pool, change, &mut unknown, limit).await {
            Ok(record) => return Ok(record),
            Err(Stop::Refused(error)) => return Err(error),
            Err(Stop::Failed(fault)) => fault,
            Err(Stop::Unknown(fault, record)) => {
                unknown = Some(record);
                fault
            }
        };
        let passes = !matches!(fault.verdict(), Verdict::Final | Verdict::Full | Verdict::NoTable);
        if !passes || Instant::now() >= deadline {
            let not_known = if unknown.is_some() {
                "; whether the change was made is not known: look before you repeat it"
            } else {
                ""
            };
            return Err(RegistryError::Unavailable(format!("{fault}{not_known}")));
        }
        tracing::debug!(%fault, "a change of the registry is tried again");
        tokio::time::sleep(Duration::from_millis(50 + rand::random::<u64>() % 100)).await;
    }
}

async fn attempt(
    pool: &Arc<Pool>,
    change: &Change,
    unknown: &mut Option<Record>,
    limit: Duration,
) -> Result<Record, Stop> {
    let lease = pool.take().await?;
    if let Some(record) = unknown.as_ref() {
        if within(limit, was_kept(&lease, change, record)).await? {
            let record = record.clone();
            lease.give_back();
            return Ok(record);
        }
        *unknown = None;
    }
    let prepared = match within_stop(limit, stage(&lease, change)).await {
        Ok(record) => record,
        Err(Stop::Refused(error)) => {
            within(limit, lease.client.batch_execute("ROLLBACK")).await?;
            lease.give_back();
            return Err(Stop::Refused(error));
        }
        // The connection ends, and the transaction with it.
        Err(other) => return Err(other),
    };
    match within(limit, lease.client.batch_execute("COMMIT")).await {
        Ok(()) => {
            lease.give_back();
            Ok(prepared)
        }
        Err(fault) if fault.verdict() == Verdict::Lost => Err(Stop::Unknown(fault, prepared)),
        Err(fault) => Err(Stop::Failed(fault)),
    }
}

async fn within_stop<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, Stop>>,
) -> Result<T, Stop> {
    match tokio::time::timeout(limit, work).await {
        Ok(done) => done,
        Err(_) => Err(Stop::Failed(Fault::Slow(limit))),
    }
}

/// Whether a change whose commit was cut off is there. Waits for its transaction to end, if the server
/// has not noticed yet that its client is gone; and is a change itself, so that its commit too waits
/// until a standby has both.
async fn was_kept(link: &Link, change: &Change, record: &Record) -> Result<bool, Fault> {
    let (kind, id) = change.object();
    link.client.batch_execute("BEGIN; UPDATE counter SET sequence = sequence").await?;
    let sql = "SELECT EXISTS (SELECT FROM audit WHERE sequence = $1 AND kind = $2 AND object = $3 \
               AND at = $4 AND actor = $5)";
    let statement = link.prepared(sql).await?;
    let terms: [&(dyn ToSql + Sync); 5] = [
        &signed(record.revision),
        &kind.name(),
        &id,
        &change.at.as_micros(),
        &text(&change.actor.name),
    ];
    let kept = link.client.query_one(&statement, &terms).await?.try_get(0)?;
    link.client.batch_execute("SET LOCAL statement_timeout = 0; COMMIT").await?;
    Ok(kept)
}

/// Does all but commit.
async fn stage(link: &Link, change: &Change) -> Result<Record, Stop> {
    let (kind, id) = change.object();
    let account = change.account;
    let mut changed = Vec::new();
    let (draft, action) = match &change.what {
        What::Create(draft) => {
            link.client.batch_execute("BEGIN").await?;
            (draft, "create")
        }
        What::Update(draft, expected) => {
            let before = present(link, account, kind, id, *expected).await?;
            changed = differing(&before.body, &draft.body);
            (draft, "update")
        }
        What::Delete(_, _, expected) => {
            let before = present(link, account, kind, id, *expected).await?;
            let revision = finish(link, change, "delete", &[], None).await?;
            return Ok(Record { revision, ..before });
        }
    };
    let revision = finish(link, change, action, &changed, Some(draft)).await?;
    Ok(Record { kind, id, account, revision, body: draft.body.clone() })
}

/// Begins, and locks the object; it has to be the account's and of the expected revision.
async fn present(
    link: &Link,
    account: AccountId,
    kind: Kind,
    id: Uuid,
    expected: Option<u64>,
) -> Result<Record, Stop> {
    let sql = "SELECT id, account, revision, body FROM objects \
               WHERE kind = $1 AND id = $2 AND account = $3 FOR UPDATE";
    let statement = link.prepared(sql).await?;
    let terms: [&(dyn ToSql + Sync); 3] = [&kind.name(), &id, &account.0];
    let begin = link.client.batch_execute("BEGIN");
    let (begun, row) = tokio::join!(begin, link.client.query_opt(&statement, &terms));
    begun?;
    let Some(row) = row? else {
        return Err(Stop::Refused(RegistryError::NotFound { kind, id }));
    };
    // One that cannot be read may still be replaced or deleted.
    let record = read::raw(&row)?.listed(kind);
    match expected {
        Some(expected) if expected != record.revision => {
            Err(Stop::Refused(RegistryError::Changed { expected, found: record.revision }))
        }
        _ => Ok(record),
    }
}

/// Sends the statements of a change together, the counter behind the keys: it is locked for as short as
/// possible. Returns the change's number.
async fn finish(
    link: &Link,
    change: &Change,
    action: &str,
    changed: &[String],
    draft: Option<&Draft>,
) -> Result<u64, Stop> {
    let (kind, id) = change.object();
    let (name, account) = (kind.name(), change.account.0);
    let creates = matches!(change.what, What::Create(_));
    let forget = link.prepared("DELETE FROM keys WHERE kind = $1 AND object = $2").await?;
    let claim = link
        .prepared(
            "INSERT INTO keys (kind, scope, key, value, object) \
             SELECT $1, k.scope, k.key, k.value, $5 \
             FROM unnest($2::bytea[], $3::text[], $4::bytea[]) AS k (scope, key, value) \
             ORDER BY 3, 2 ON CONFLICT DO NOTHING RETURNING key",
        )
        .await?;
    let count =
        link.prepared("UPDATE counter SET sequence = sequence + 1 RETURNING sequence").await?;
    let put = link
        .prepared(match (draft.is_some(), creates) {
            (true, true) => {
                "INSERT INTO objects (kind, id, account, members, body, revision) \
                 SELECT $1, $2, $3, $4, $5, sequence FROM counter ON CONFLICT DO NOTHING"
            }
            (true, false) => {
                "UPDATE objects SET members = $4, body = $5, revision = counter.sequence \
                 FROM counter WHERE kind = $1 AND id = $2 AND account = $3"
            }
            (false, _) => {
                "DELETE FROM objects WHERE kind = $1 AND id = $2 AND account = $3 \
                 AND $4::bigint[] IS NOT NULL AND $5::text IS NOT NULL"
            }
        })
        .await?;
    let note = link
        .prepared(
            "INSERT INTO audit (sequence, at, account, actor, address, action, kind, object, changed) \
             SELECT sequence, $1, $2, $3, $4, $5, $6, $7, $8 FROM counter",
        )
        .await?;
    // Told of where `follow.rs` listens.
    let sql = "SELECT pg_notify(current_schema()::text || '_changes', sequence::text) FROM counter";
    let tell = link.prepared(sql).await?;

    let (mut scopes, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for (key, (scope, value)) in draft.iter().flat_map(|draft| &draft.unique) {
        scopes.push(match scope {
            UniqueIn::Account => change.account.as_bytes().to_vec(),
            UniqueIn::Installation => Vec::new(),
        });
        keys.push(*key);
        values.push(value.as_bytes().to_vec());
    }
    let (members, body) = match draft {
        Some(draft) => (members(&draft.body), draft.body.to_string()),
        None => (Vec::new(), String::new()),
    };
    let (at, actor) = (change.at.as_micros(), text(&change.actor.name));
    let address = change.actor.address.as_deref().map(text);
    let changed = Json::from(changed).to_string();

    let client = &link.client;
    let forget_terms: [&(dyn ToSql + Sync); 2] = [&name, &id];
    let claim_terms: [&(dyn ToSql + Sync); 5] = [&name, &scopes, &keys, &values, &id];
    let put_terms: [&(dyn ToSql + Sync); 5] = [&name, &id, &account, &members, &body];
    let note_terms: [&(dyn ToSql + Sync); 8] =
        [&at, &account, &actor, &address, &action, &name, &id, &changed];
    // Sent in this order without waiting in between; each fails where one before it has.
    let (forgot, claimed, counted, put, noted, notified, unlimited) = tokio::join!(
        client.execute(&forget, &forget_terms),
        client.query(&claim, &claim_terms),
        client.query_one(&count, &[]),
        client.execute(&put, &put_terms),
        client.execute(&note, &note_terms),
        client.query(&tell, &[]),
        // A standby may take its time to confirm the commit; giving up would be to lie.
        client.batch_execute("SET LOCAL statement_timeout = 0"),
    );
    forgot?;
    let claimed = claimed?;
    let revision = unsigned(counted?.try_get(0)?);
    let put = put?;
    noted?;
    notified?;
    unlimited?;
    if put == 0 && creates {
        let taken = RegistryError::Taken { kind, key: "id".to_owned(), value: id.to_string() };
        return Err(Stop::Refused(taken));
    }
    if claimed.len() < keys.len() {
        let won: Vec<&str> = claimed.iter().filter_map(|row| row.try_get(0).ok()).collect();
        let unique = draft.iter().flat_map(|draft| &draft.unique);
        for (key, (_, value)) in unique {
            if !won.contains(key) {
                let (key, value) = ((*key).to_owned(), value.clone());
                return Err(Stop::Refused(RegistryError::Taken { kind, key, value }));
            }
        }
    }
    Ok(revision)
}

/// A hash of each top-level member.
fn members(body: &Json) -> Vec<i64> {
    let Some(members) = body.as_object() else { return Vec::new() };
    members.iter().map(|(name, value)| read::member_hash(name, value)).collect()
}

/// Names of top-level members that differ, those of the new body first.
fn differing(before: &Json, after: &Json) -> Vec<String> {
    let empty = serde_json::Map::new();
    let before = before.as_object().unwrap_or(&empty);
    let after = after.as_object().unwrap_or(&empty);
    let set = after.iter().filter(|(name, value)| before.get(*name) != Some(value));
    let gone = before.iter().filter(|(name, _)| !after.contains_key(*name));
    set.chain(gone).map(|(name, _)| name.clone()).collect()
}

/// Text as PostgreSQL takes it: it has no NUL.
fn text(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}
