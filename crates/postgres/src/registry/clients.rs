//! What MQTT clients leave with the server: retained messages and wills.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use fieldline_contracts::RegistryError;
use fieldline_contracts::client_store::{
    ClientStore, RetainLimits, RetainUse, RetainedMessage, WillChange, WillKey, settle,
};
use fieldline_model::{AccountId, Timestamp};
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::PostgresRegistry;
use super::read::{signed, unsigned};
use crate::connect::Link;
use crate::error::Fault;
use crate::pool::whole;

fn small(number: i64) -> usize {
    usize::try_from(number).unwrap_or(0)
}

fn large(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Messages of an account that are to be retained.
struct Retain {
    account: AccountId,
    messages: Vec<RetainedMessage>,
    limits: RetainLimits,
    now: Timestamp,
}

impl Retain {
    async fn run(&self, link: &Link) -> Result<Vec<bool>, Fault> {
        whole(link, async {
            let (client, account) = (&link.client, &self.account.0);
            client.batch_execute("BEGIN").await?;
            // Of nodes that write for one account one at a time does: the last to come counts, and the bound holds.
            let sql = "SELECT pg_advisory_xact_lock(hashtextextended(\
                       'fieldline retained ' || current_schema() || $1::uuid::text, 0))";
            client.execute(&link.prepared(sql).await?, &[account]).await?;
            let mut settled = self.settle(link).await?;
            if settled.taken.contains(&false) {
                // What has expired makes room.
                let sql = "DELETE FROM retained WHERE account = $1 AND expires_at <= $2";
                let now = self.now.as_micros();
                client.execute(&link.prepared(sql).await?, &[account, &now]).await?;
                settled = self.settle(link).await?;
            }
            self.write(link, settled.changes).await?;
            client.batch_execute("SET LOCAL statement_timeout = 0; COMMIT").await?;
            Ok(settled.taken)
        })
        .await
    }

    async fn settle(
        &self,
        link: &Link,
    ) -> Result<fieldline_contracts::client_store::Settled, Fault> {
        let (client, account) = (&link.client, &self.account.0);
        let topics: Vec<&str> = self.messages.iter().map(|one| &*one.topic).collect();
        let sql = "SELECT topic, bytes FROM retained WHERE account = $1 AND topic = ANY ($2)";
        let rows = client.query(&link.prepared(sql).await?, &[account, &topics]).await?;
        let read = |row: Row| Ok((row.try_get(0)?, small(row.try_get(1)?)));
        let present: HashMap<String, usize> =
            rows.into_iter().map(read).collect::<Result<_, Fault>>()?;
        let sql =
            "SELECT count(*), coalesce(sum(bytes), 0)::bigint FROM retained WHERE account = $1";
        let row = client.query_one(&link.prepared(sql).await?, &[account]).await?;
        let used = RetainUse { messages: small(row.try_get(0)?), bytes: small(row.try_get(1)?) };
        Ok(settle(&self.messages, &present, used, self.limits))
    }

    async fn write(
        &self,
        link: &Link,
        changes: std::collections::BTreeMap<Arc<str>, Option<RetainedMessage>>,
    ) -> Result<(), Fault> {
        let (client, account) = (&link.client, &self.account.0);
        let gone: Vec<&str> =
            changes.iter().filter(|(_, change)| change.is_none()).map(|(one, _)| &**one).collect();
        if !gone.is_empty() {
            let sql = "DELETE FROM retained WHERE account = $1 AND topic = ANY ($2)";
            client.execute(&link.prepared(sql).await?, &[account, &gone]).await?;
        }
        let put: Vec<&RetainedMessage> = changes.values().flatten().collect();
        if put.is_empty() {
            return Ok(());
        }
        let sql = "INSERT INTO retained \
                   (account, topic, payload, props, at_least_once, expires_at, bytes) \
                   SELECT $1::uuid, n.* FROM unnest($2::text[], $3::bytea[], $4::bytea[], $5::boolean[], \
                   $6::bigint[], $7::bigint[]) AS n \
                   ON CONFLICT (account, topic) DO UPDATE SET payload = excluded.payload, \
                   props = excluded.props, at_least_once = excluded.at_least_once, \
                   expires_at = excluded.expires_at, bytes = excluded.bytes";
        let topics: Vec<&str> = put.iter().map(|one| &*one.topic).collect();
        let payloads: Vec<&[u8]> = put.iter().map(|one| &one.payload[..]).collect();
        let props: Vec<&[u8]> = put.iter().map(|one| &one.props[..]).collect();
        let once: Vec<bool> = put.iter().map(|one| one.at_least_once).collect();
        let expires: Vec<Option<i64>> =
            put.iter().map(|one| one.expires_at.map(Timestamp::as_micros)).collect();
        let bytes: Vec<i64> = put.iter().map(|one| large(one.bytes())).collect();
        let terms: [&(dyn ToSql + Sync); 7] =
            [account, &topics, &payloads, &props, &once, &expires, &bytes];
        client.execute(&link.prepared(sql).await?, &terms).await?;
        Ok(())
    }
}

fn message(row: &Row) -> Result<RetainedMessage, Fault> {
    Ok(RetainedMessage {
        topic: row.try_get::<_, String>(0)?.into(),
        payload: Bytes::from(row.try_get::<_, Vec<u8>>(1)?),
        props: Bytes::from(row.try_get::<_, Vec<u8>>(2)?),
        at_least_once: row.try_get(3)?,
        expires_at: row.try_get::<_, Option<i64>>(4)?.map(Timestamp::from_micros),
    })
}

async fn keep(link: &Link, owner: i64, changes: &[WillChange]) -> Result<(), Fault> {
    whole(link, async {
        let client = &link.client;
        let put = link
            .prepared(
                "INSERT INTO wills (account, client_id, number, owner, will) \
                 VALUES ($1, $2, $3, $4, $5) ON CONFLICT (account, client_id) DO UPDATE SET \
                 number = excluded.number, owner = excluded.owner, will = excluded.will \
                 WHERE wills.number <= excluded.number",
            )
            .await?;
        let clear = link
            .prepared("DELETE FROM wills WHERE account = $1 AND client_id = $2 AND number <= $3")
            .await?;
        let end = link
            .prepared(
                "DELETE FROM wills WHERE account = $1 AND client_id = $2 AND number = $3 \
                 AND owner = $4",
            )
            .await?;
        client.batch_execute("BEGIN").await?;
        for change in changes {
            let (WillChange::Begin { key, .. } | WillChange::End { key }) = change;
            let (account, client_id, number) =
                (&key.account.0, &*key.client_id, signed(key.number));
            match change {
                WillChange::Begin { will: Some(will), .. } => {
                    let terms: [&(dyn ToSql + Sync); 5] =
                        [account, &client_id, &number, &owner, will];
                    client.execute(&put, &terms).await?
                }
                WillChange::Begin { will: None, .. } => {
                    client.execute(&clear, &[account, &client_id, &number]).await?
                }
                WillChange::End { .. } => {
                    client.execute(&end, &[account, &client_id, &number, &owner]).await?
                }
            };
        }
        client.batch_execute("COMMIT").await?;
        Ok(())
    })
    .await
}

impl PostgresRegistry {
    /// What an account retained goes after it. Should it stay, nobody can reach it: no other account gets its id.
    pub(super) async fn forget_retained(&self, account: AccountId) {
        let forgotten = self.on_link(move |link| {
            async move {
                let sql = "DELETE FROM retained WHERE account = $1";
                link.client.execute(&link.prepared(sql).await?, &[&account.0]).await?;
                Ok(())
            }
            .boxed()
        });
        if let Err(error) = forgotten.await {
            tracing::warn!(%account, %error, "what a deleted account retained is left in the database");
        }
    }

    /// Runs what may be done twice.
    async fn on_link<T, W>(&self, work: W) -> Result<T, RegistryError>
    where
        W: for<'a> Fn(&'a Link) -> BoxFuture<'a, Result<T, Fault>>,
    {
        self.pool.run(work).await.map_err(|fault| fault.registry())
    }
}

#[async_trait]
impl ClientStore for PostgresRegistry {
    async fn retain(
        &self,
        account: AccountId,
        messages: Vec<RetainedMessage>,
        limits: RetainLimits,
        now: Timestamp,
    ) -> Result<Vec<bool>, RegistryError> {
        let retain = Arc::new(Retain { account, messages, limits, now });
        self.on_link(move |link| {
            let retain = Arc::clone(&retain);
            async move { retain.run(link).await }.boxed()
        })
        .await
    }

    async fn retained(
        &self,
        account: AccountId,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<RetainedMessage>, RegistryError> {
        // Behind every topic that begins so.
        let end = format!("{prefix}\u{10ffff}");
        let range = Arc::new((prefix.to_owned(), end, after.unwrap_or_default().to_owned()));
        self.on_link(move |link| {
            let range = Arc::clone(&range);
            async move {
                let sql = "SELECT topic, payload, props, at_least_once, expires_at FROM retained \
                           WHERE account = $1 AND topic >= $2 AND topic < $3 AND topic > $4 \
                           ORDER BY topic LIMIT $5";
                let (from, end, after) = &*range;
                let terms: [&(dyn ToSql + Sync); 5] = [&account.0, from, end, after, &large(limit)];
                let rows = link.client.query(&link.prepared(sql).await?, &terms).await?;
                rows.iter().map(message).collect()
            }
            .boxed()
        })
        .await
    }

    async fn keep_wills(&self, owner: u64, changes: &[WillChange]) -> Result<(), RegistryError> {
        let changes: Arc<[WillChange]> = changes.into();
        self.on_link(move |link| {
            let changes = Arc::clone(&changes);
            async move { keep(link, owner.cast_signed(), &changes).await }.boxed()
        })
        .await
    }

    async fn beat(&self, owner: u64) -> Result<bool, RegistryError> {
        self.on_link(move |link| {
            async move {
                // `xmax` is 0 of a row that was not there before.
                let sql = "INSERT INTO will_owners (owner, seen_at) VALUES ($1, clock_timestamp()) \
                           ON CONFLICT (owner) DO UPDATE SET seen_at = excluded.seen_at \
                           RETURNING xmax <> 0";
                let statement = link.prepared(sql).await?;
                let row = link.client.query_one(&statement, &[&owner.cast_signed()]).await?;
                Ok(row.try_get(0)?)
            }
            .boxed()
        })
        .await
    }

    async fn adopt(&self, owner: u64, silence: Duration) -> Result<Option<u64>, RegistryError> {
        self.on_link(move |link| {
            async move {
                let sql = "UPDATE will_owners SET seen_at = clock_timestamp() WHERE owner = (\
                             SELECT owner FROM will_owners WHERE owner <> $1 \
                             AND seen_at < clock_timestamp() - $2 * interval '1 second' \
                             LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING owner";
                let statement = link.prepared(sql).await?;
                let terms: [&(dyn ToSql + Sync); 2] =
                    [&owner.cast_signed(), &silence.as_secs_f64()];
                let row = link.client.query_opt(&statement, &terms).await?;
                let found: Option<i64> = row.map(|row| row.try_get(0)).transpose()?;
                Ok(found.map(i64::cast_unsigned))
            }
            .boxed()
        })
        .await
    }

    async fn wills(
        &self,
        owner: u64,
        limit: usize,
    ) -> Result<Vec<(WillKey, String)>, RegistryError> {
        self.on_link(move |link| {
            async move {
                let sql =
                    "SELECT account, client_id, number, will FROM wills WHERE owner = $1 LIMIT $2";
                let terms: [&(dyn ToSql + Sync); 2] = [&owner.cast_signed(), &large(limit)];
                let rows = link.client.query(&link.prepared(sql).await?, &terms).await?;
                let read = |row: &Row| -> Result<(WillKey, String), Fault> {
                    let key = WillKey {
                        account: AccountId(row.try_get::<_, Uuid>(0)?),
                        client_id: row.try_get::<_, String>(1)?.into(),
                        number: unsigned(row.try_get(2)?),
                    };
                    Ok((key, row.try_get(3)?))
                };
                rows.iter().map(read).collect()
            }
            .boxed()
        })
        .await
    }

    async fn forget_owner(&self, owner: u64) -> Result<(), RegistryError> {
        self.on_link(move |link| {
            async move {
                // In the order of `keep_wills`: what is left of it first.
                let owner = owner.cast_signed();
                let sql = "DELETE FROM wills WHERE owner = $1";
                link.client.execute(&link.prepared(sql).await?, &[&owner]).await?;
                let sql = "DELETE FROM will_owners WHERE owner = $1";
                link.client.execute(&link.prepared(sql).await?, &[&owner]).await?;
                Ok(())
            }
            .boxed()
        })
        .await
    }
}
