//! One transaction that makes a group of changes.
//!
//! It locks the row of `counter` first: whoever changes the registry, on whichever node, comes after it or
//! before it. What is there is read then, what each change does is decided in `plan.rs`, and what all of
//! them leave is written in a few statements, sent together with the commit.

use std::time::Duration;

use fieldline_contracts::{Kind, Record, RegistryError};
use fieldline_model::AccountId;
use futures_util::future::try_join_all;
use serde_json::Value as Json;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use crate::connect::{Link, within};
use crate::error::{Fault, Verdict};
use crate::registry::plan::{Change, Key, Object, Plan, Stands};
use crate::registry::read::{self, signed, unsigned};

/// What each change of a group came to.
pub(crate) type Answers = Vec<Result<Record, RegistryError>>;

/// The last entry of a group in the audit trail: there with all the others, or not.
pub(crate) struct Mark {
    sequence: u64,
    object: Object,
    at: i64,
    actor: String,
}

impl Mark {
    /// The number of the group's last change.
    pub(crate) const fn sequence(&self) -> u64 {
        self.sequence
    }
}

/// Why a transaction was not finished.
pub(crate) enum Stop {
    /// Something failed; nothing was kept.
    Failed(Fault),
    /// The connection was lost while committing: it may have been kept.
    Unknown(Fault, Mark, Answers),
}

impl<E: Into<Fault>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// Makes the changes that may be made, all of them or none. Without an error the connection is in order.
pub(crate) async fn make(
    link: &Link,
    changes: &[&Change],
    limit: Duration,
) -> Result<(Answers, Option<u64>), Stop> {
    let mut plan = within(limit, read_all(link, changes)).await?;
    let make = |(at, change): (usize, &&Change)| plan.make(at, change);
    let answers: Answers = changes.iter().enumerate().map(make).collect();
    let Some(last) = plan.entries.last() else {
        within(limit, link.client.batch_execute("ROLLBACK")).await?;
        return Ok((answers, None));
    };
    let Some(change) = changes.get(last.change) else {
        return Err(Fault::Damaged("a group of changes lost one".to_owned()).into());
    };
    let mark = Mark {
        sequence: last.sequence,
        object: change.object(),
        at: change.at.as_micros(),
        actor: text(&change.actor.name),
    };
    let written = Written::new(&plan, changes);
    let prepared = within(limit, written.prepare(link)).await?;
    match within(limit, written.send(link, &prepared)).await {
        Ok(()) => Ok((answers, Some(plan.sequence))),
        Err(fault) if fault.verdict() == Verdict::Lost => Err(Stop::Unknown(fault, mark, answers)),
        Err(fault) => Err(Stop::Failed(fault)),
    }
}

/// Whether a group whose commit was cut off is there. Waits for its transaction to end, if the server has
/// not noticed yet that its client is gone; and is a change itself, so that its commit too waits until a
/// standby has both.
pub(crate) async fn was_kept(link: &Link, mark: &Mark) -> Result<bool, Fault> {
    link.client.batch_execute("BEGIN; UPDATE counter SET sequence = sequence").await?;
    let sql = "SELECT EXISTS (SELECT FROM audit WHERE sequence = $1 AND kind = $2 AND object = $3 \
               AND at = $4 AND actor = $5)";
    let statement = link.prepared(sql).await?;
    let (kind, id) = mark.object;
    let terms: [&(dyn ToSql + Sync); 5] =
        [&signed(mark.sequence), &kind.name(), &id, &mark.at, &mark.actor];
    let kept = link.client.query_one(&statement, &terms).await?.try_get(0)?;
    link.client.batch_execute("SET LOCAL statement_timeout = 0; COMMIT").await?;
    Ok(kept)
}

/// Begins, and reads what the changes touch.
async fn read_all(link: &Link, changes: &[&Change]) -> Result<Plan, Fault> {
    let count = link.prepared("SELECT sequence FROM counter FOR UPDATE").await?;
    // Each with a look of its own at what is there: not before the counter is ours.
    let objects = link
        .prepared(
            "SELECT o.id, o.account, o.revision, o.body, o.kind \
             FROM unnest($1::text[], $2::uuid[]) AS t (kind, id) \
             JOIN objects o ON o.kind = t.kind AND o.id = t.id",
        )
        .await?;
    let keys = link
        .prepared(
            "SELECT k.kind, k.scope, k.key, k.value, k.object \
             FROM unnest($1::text[], $2::uuid[]) AS t (kind, id) \
             JOIN keys k ON k.kind = t.kind AND k.object = t.id \
             UNION \
             SELECT k.kind, k.scope, k.key, k.value, k.object \
             FROM unnest($3::text[], $4::bytea[], $5::text[], $6::bytea[]) AS w (kind, scope, key, value) \
             JOIN keys k ON k.kind = w.kind AND k.scope = w.scope AND k.key = w.key \
             AND sha256(k.value) = sha256(w.value) AND k.value = w.value",
        )
        .await?;
    let (mut kinds, mut ids) = (Vec::new(), Vec::new());
    let mut touched: Vec<Object> = changes.iter().map(|change| change.object()).collect();
    touched.sort_unstable();
    touched.dedup();
    for (kind, id) in touched {
        kinds.push(kind.name());
        ids.push(id);
    }
    let mut wanted = Rows::default();
    for change in changes {
        for (name, unique) in change.draft().iter().flat_map(|draft| &draft.unique) {
            wanted.key(&Key::of(change.object().0, change.account, name, unique));
        }
    }
    let object_terms: [&(dyn ToSql + Sync); 2] = [&kinds, &ids];
    let key_terms: [&(dyn ToSql + Sync); 6] =
        [&kinds, &ids, &wanted.kinds, &wanted.scopes, &wanted.keys, &wanted.values];
    let client = &link.client;
    // Sent in this order without waiting in between; each fails where one before it has.
    let (begun, counted, objects, keys) = tokio::join!(
        client.batch_execute("BEGIN ISOLATION LEVEL READ COMMITTED"),
        client.query_one(&count, &[]),
        client.query(&objects, &object_terms),
        client.query(&keys, &key_terms),
    );
    begun?;
    let mut plan = Plan::new(unsigned(counted?.try_get(0)?));
    for row in objects? {
        let kind = kind_of(row.try_get(4)?)?;
        // One that cannot be read may still be replaced or deleted.
        let record = read::raw(&row)?.listed(kind);
        let (account, revision, body) = (record.account, record.revision, record.body);
        plan.found((kind, record.id), Stands { account, revision, body });
    }
    for row in keys? {
        let kind = kind_of(row.try_get(0)?)?;
        let key =
            Key { kind, scope: row.try_get(1)?, key: row.try_get(2)?, value: row.try_get(3)? };
        plan.found_key(key, row.try_get(4)?);
    }
    Ok(plan)
}

fn kind_of(name: &str) -> Result<Kind, Fault> {
    let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name);
    kind.ok_or_else(|| Fault::Damaged(format!("an object is of the kind `{name}`, which is none")))
}

/// Keys as columns.
#[derive(Default)]
struct Rows {
    kinds: Vec<&'static str>,
    scopes: Vec<Vec<u8>>,
    keys: Vec<String>,
    values: Vec<Vec<u8>>,
    owners: Vec<Uuid>,
}

impl Rows {
    fn key(&mut self, key: &Key) {
        self.kinds.push(key.kind.name());
        self.scopes.push(key.scope.clone());
        self.keys.push(key.key.clone());
        self.values.push(key.value.clone());
    }
}

/// Objects as columns.
#[derive(Default)]
struct Bodies {
    kinds: Vec<&'static str>,
    ids: Vec<Uuid>,
    accounts: Vec<Uuid>,
    /// Arrays as text: there are no arrays of arrays of different lengths.
    members: Vec<String>,
    bodies: Vec<String>,
    revisions: Vec<i64>,
}

impl Bodies {
    fn name(&mut self, (kind, id): Object) {
        self.kinds.push(kind.name());
        self.ids.push(id);
    }

    fn object(&mut self, object: Object, stands: &Stands) {
        let AccountId(account) = stands.account;
        self.name(object);
        self.accounts.push(account);
        self.members.push(members(&stands.body));
        self.bodies.push(stands.body.to_string());
        self.revisions.push(signed(stands.revision));
    }
}

/// Entries of the audit trail as columns.
#[derive(Default)]
struct Trail {
    sequences: Vec<i64>,
    times: Vec<i64>,
    accounts: Vec<Uuid>,
    actors: Vec<String>,
    addresses: Vec<Option<String>>,
    actions: Vec<&'static str>,
    kinds: Vec<&'static str>,
    objects: Vec<Uuid>,
    changed: Vec<String>,
}

/// What a group leaves, as statements take it.
#[derive(Default)]
struct Written {
    /// Objects whose keys are others now, and those.
    rekeyed: Bodies,
    keys: Rows,
    created: Bodies,
    updated: Bodies,
    deleted: Bodies,
    trail: Trail,
    sequence: i64,
}

/// A statement and what it is sent with.
type Sent<'a> = (&'static str, Vec<&'a (dyn ToSql + Sync)>);

impl Written {
    fn new(plan: &Plan, changes: &[&Change]) -> Self {
        let mut all = Self { sequence: signed(plan.sequence), ..Self::default() };
        for (object, place) in &plan.places {
            if place.keys != place.keys_before {
                all.rekeyed.name(*object);
                for key in &place.keys {
                    all.keys.key(key);
                    all.keys.owners.push(object.1);
                }
            }
            match (&place.before, &place.now) {
                (None, Some(now)) => all.created.object(*object, now),
                (Some(before), Some(now)) if before.revision != now.revision => {
                    all.updated.object(*object, now);
                }
                (Some(_), None) => all.deleted.name(*object),
                _ => {}
            }
        }
        for entry in &plan.entries {
            let Some(change) = changes.get(entry.change) else { continue };
            let (kind, id) = change.object();
            let AccountId(account) = change.account;
            let trail = &mut all.trail;
            trail.sequences.push(signed(entry.sequence));
            trail.times.push(change.at.as_micros());
            trail.accounts.push(account);
            trail.actors.push(text(&change.actor.name));
            trail.addresses.push(change.actor.address.as_deref().map(text));
            trail.actions.push(entry.action);
            trail.kinds.push(kind.name());
            trail.objects.push(id);
            trail.changed.push(Json::from(entry.changed.clone()).to_string());
        }
        all
    }

    fn statements(&self) -> Vec<Sent<'_>> {
        let mut all: Vec<Sent<'_>> = Vec::with_capacity(8);
        let Self { rekeyed, keys, created, updated, deleted, trail, sequence } = self;
        if !rekeyed.ids.is_empty() {
            all.push((
                "DELETE FROM keys k USING unnest($1::text[], $2::uuid[]) AS t (kind, id) \
                 WHERE k.kind = t.kind AND k.object = t.id",
                vec![&rekeyed.kinds, &rekeyed.ids],
            ));
        }
        if !keys.keys.is_empty() {
            all.push((
                "INSERT INTO keys (kind, scope, key, value, object) SELECT * \
                 FROM unnest($1::text[], $2::bytea[], $3::text[], $4::bytea[], $5::uuid[])",
                vec![&keys.kinds, &keys.scopes, &keys.keys, &keys.values, &keys.owners],
            ));
        }
        if !deleted.ids.is_empty() {
            all.push((
                "DELETE FROM objects o USING unnest($1::text[], $2::uuid[]) AS t (kind, id) \
                 WHERE o.kind = t.kind AND o.id = t.id",
                vec![&deleted.kinds, &deleted.ids],
            ));
        }
        if !created.ids.is_empty() {
            all.push((
                "INSERT INTO objects (kind, id, account, members, body, revision) \
                 SELECT kind, id, account, members::bigint[], body, revision FROM unnest(\
                   $1::text[], $2::uuid[], $3::uuid[], $4::text[], $5::text[], $6::bigint[]\
                 ) AS t (kind, id, account, members, body, revision)",
                created.terms(),
            ));
        }
        if !updated.ids.is_empty() {
            all.push((
                "UPDATE objects o SET account = t.account, members = t.members::bigint[], \
                 body = t.body, revision = t.revision FROM unnest(\
                   $1::text[], $2::uuid[], $3::uuid[], $4::text[], $5::text[], $6::bigint[]\
                 ) AS t (kind, id, account, members, body, revision) \
                 WHERE o.kind = t.kind AND o.id = t.id",
                updated.terms(),
            ));
        }
        all.push((
            "INSERT INTO audit (sequence, at, account, actor, address, action, kind, object, changed) \
             SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::uuid[], $4::text[], $5::text[], \
                                  $6::text[], $7::text[], $8::uuid[], $9::text[])",
            vec![
                &trail.sequences,
                &trail.times,
                &trail.accounts,
                &trail.actors,
                &trail.addresses,
                &trail.actions,
                &trail.kinds,
                &trail.objects,
                &trail.changed,
            ],
        ));
        all.push(("UPDATE counter SET sequence = $1", vec![sequence]));
        // Told of where `follow.rs` listens, which reads all up to it.
        let tell =
            "SELECT pg_notify(current_schema()::text || '_changes', sequence::text) FROM counter";
        all.push((tell, Vec::new()));
        all
    }

    /// Prepares all statements before any is sent, so that they go together.
    async fn prepare(&self, link: &Link) -> Result<Vec<tokio_postgres::Statement>, Fault> {
        let mut prepared = Vec::new();
        for (sql, _) in self.statements() {
            prepared.push(link.prepared(sql).await?);
        }
        Ok(prepared)
    }

    /// Sends everything and the commit, without waiting in between: each fails where one before it has, and
    /// a commit after a failure keeps nothing.
    async fn send(&self, link: &Link, prepared: &[tokio_postgres::Statement]) -> Result<(), Fault> {
        let statements = self.statements();
        let all = statements.iter().zip(prepared).map(|((_, terms), statement)| {
            let client = &link.client;
            async move { client.execute(statement, terms).await }
        });
        // A standby may take its time to confirm the commit; giving up would be to lie.
        let end = link.client.batch_execute("SET LOCAL statement_timeout = 0; COMMIT");
        let (all, ended) = tokio::join!(try_join_all(all), end);
        all?;
        Ok(ended?)
    }
}

impl Bodies {
    fn terms(&self) -> Vec<&(dyn ToSql + Sync)> {
        let Self { kinds, ids, accounts, members, bodies, revisions } = self;
        vec![kinds, ids, accounts, members, bodies, revisions]
    }
}

/// A hash of each top-level member, as the text of an array.
fn members(body: &Json) -> String {
    let members = body.as_object().into_iter().flatten();
    let hashes = members.map(|(name, value)| read::member_hash(name, value).to_string());
    format!("{{{}}}", hashes.collect::<Vec<_>>().join(","))
}

/// Text as PostgreSQL takes it: it has no NUL.
fn text(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}
