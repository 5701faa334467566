//! What MQTT clients leave with the server: retained messages and wills.
//!
//! The file is this process's alone, so every other process that left wills in it is gone.

use std::collections::HashMap;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use fieldline_contracts::RegistryError;
use fieldline_contracts::client_store::{
    ClientStore, RetainLimits, RetainUse, RetainedMessage, WillChange, WillKey, settle,
};
use fieldline_model::{AccountId, Timestamp};
use rusqlite::{Connection, OptionalExtension as _, Row};
use uuid::Uuid;

use crate::SqliteRegistry;
use crate::read::{signed, unsigned};
use crate::thread::unavailable;

type Done<T> = rusqlite::Result<T>;

fn small(number: i64) -> usize {
    usize::try_from(number).unwrap_or(0)
}

fn large(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn used(db: &Connection, account: AccountId) -> Done<RetainUse> {
    let sql = "SELECT count(*), coalesce(sum(bytes), 0) FROM retained WHERE account = ?1";
    db.prepare_cached(sql)?.query_row([account.as_bytes()], |row| {
        Ok(RetainUse { messages: small(row.get(0)?), bytes: small(row.get(1)?) })
    })
}

fn present(
    db: &Connection,
    account: AccountId,
    messages: &[RetainedMessage],
) -> Done<HashMap<String, usize>> {
    let sql = "SELECT bytes FROM retained WHERE account = ?1 AND topic = ?2";
    let mut query = db.prepare_cached(sql)?;
    let mut present = HashMap::new();
    for message in messages {
        let found: Option<i64> =
            query.query_row((account.as_bytes(), &*message.topic), |row| row.get(0)).optional()?;
        present.extend(found.map(|bytes| ((*message.topic).to_owned(), small(bytes))));
    }
    Ok(present)
}

fn retain(
    db: &Connection,
    account: AccountId,
    messages: &[RetainedMessage],
    limits: RetainLimits,
    now: Timestamp,
) -> Done<Vec<bool>> {
    let mut settled =
        settle(messages, &present(db, account, messages)?, used(db, account)?, limits);
    if settled.taken.contains(&false) {
        // What has expired makes room.
        db.prepare_cached("DELETE FROM retained WHERE account = ?1 AND expires_at <= ?2")?
            .execute((account.as_bytes(), now.as_micros()))?;
        settled = settle(messages, &present(db, account, messages)?, used(db, account)?, limits);
    }
    for (topic, change) in settled.changes {
        let Some(message) = change else {
            db.prepare_cached("DELETE FROM retained WHERE account = ?1 AND topic = ?2")?
                .execute((account.as_bytes(), &*topic))?;
            continue;
        };
        db.prepare_cached(
            "INSERT INTO retained (account, topic, payload, props, at_least_once, expires_at, bytes) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) \
             ON CONFLICT (account, topic) DO UPDATE SET payload = excluded.payload, \
             props = excluded.props, at_least_once = excluded.at_least_once, \
             expires_at = excluded.expires_at, bytes = excluded.bytes",
        )?
        .execute((
            account.as_bytes(),
            &*topic,
            &message.payload[..],
            &message.props[..],
            message.at_least_once,
            message.expires_at.map(Timestamp::as_micros),
            large(message.bytes()),
        ))?;
    }
    Ok(settled.taken)
}

fn message(row: &Row<'_>) -> Done<RetainedMessage> {
    Ok(RetainedMessage {
        topic: row.get::<_, String>(0)?.into(),
        payload: Bytes::from(row.get::<_, Vec<u8>>(1)?),
        props: Bytes::from(row.get::<_, Vec<u8>>(2)?),
        at_least_once: row.get(3)?,
        expires_at: row.get::<_, Option<i64>>(4)?.map(Timestamp::from_micros),
    })
}

fn retained(
    db: &Connection,
    account: AccountId,
    (prefix, end): (&str, &str),
    after: Option<&str>,
    limit: usize,
) -> Done<Vec<RetainedMessage>> {
    let sql = "SELECT topic, payload, props, at_least_once, expires_at FROM retained \
               WHERE account = ?1 AND topic >= ?2 AND topic < ?3 AND topic > ?4 \
               ORDER BY topic LIMIT ?5";
    let terms = (account.as_bytes(), prefix, end, after.unwrap_or_default(), large(limit));
    db.prepare_cached(sql)?.query_map(terms, message)?.collect()
}

fn keep_wills(db: &Connection, owner: u64, changes: &[WillChange]) -> Done<()> {
    for change in changes {
        let (WillChange::Begin { key, .. } | WillChange::End { key }) = change;
        let (account, client_id, number) =
            (key.account.as_bytes(), &*key.client_id, signed(key.number));
        match change {
            WillChange::Begin { will: Some(will), .. } => db
                .prepare_cached(
                    "INSERT INTO wills (account, client_id, number, owner, will) \
                     VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT (account, client_id) DO UPDATE SET \
                     number = excluded.number, owner = excluded.owner, will = excluded.will \
                     WHERE number <= excluded.number",
                )?
                .execute((account, client_id, number, owner.cast_signed(), will))?,
            WillChange::Begin { will: None, .. } => db
                .prepare_cached(
                    "DELETE FROM wills WHERE account = ?1 AND client_id = ?2 AND number <= ?3",
                )?
                .execute((account, client_id, number))?,
            WillChange::End { .. } => db
                .prepare_cached(
                    "DELETE FROM wills WHERE account = ?1 AND client_id = ?2 AND number = ?3 \
                     AND owner = ?4",
                )?
                .execute((account, client_id, number, owner.cast_signed()))?,
        };
    }
    Ok(())
}

fn wills(db: &Connection, owner: u64, limit: usize) -> Done<Vec<(WillKey, String)>> {
    let sql = "SELECT account, client_id, number, will FROM wills WHERE owner = ?1 LIMIT ?2";
    let read = |row: &Row<'_>| {
        let key = WillKey {
            account: AccountId(Uuid::from_bytes(row.get(0)?)),
            client_id: row.get::<_, String>(1)?.into(),
            number: unsigned(row.get(2)?),
        };
        Ok((key, row.get(3)?))
    };
    db.prepare_cached(sql)?.query_map((owner.cast_signed(), large(limit)), read)?.collect()
}

#[async_trait]
impl ClientStore for SqliteRegistry {
    async fn retain(
        &self,
        account: AccountId,
        messages: Vec<RetainedMessage>,
        limits: RetainLimits,
        now: Timestamp,
    ) -> Result<Vec<bool>, RegistryError> {
        self.write(move |db| {
            retain(db, account, &messages, limits, now).map_err(|error| unavailable(&error))
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
        let (prefix, after) = (prefix.to_owned(), after.map(str::to_owned));
        self.read(move |db| {
            // Behind every topic that begins so.
            let end = format!("{prefix}\u{10ffff}");
            retained(db, account, (&prefix, &end), after.as_deref(), limit)
                .map_err(|error| unavailable(&error))
        })
        .await
    }

    async fn keep_wills(&self, owner: u64, changes: &[WillChange]) -> Result<(), RegistryError> {
        let changes = changes.to_vec();
        self.write(move |db| keep_wills(db, owner, &changes).map_err(|error| unavailable(&error)))
            .await
    }

    async fn beat(&self, _owner: u64) -> Result<bool, RegistryError> {
        Ok(true)
    }

    async fn adopt(&self, owner: u64, _silence: Duration) -> Result<Option<u64>, RegistryError> {
        self.read(move |db| {
            let sql = "SELECT owner FROM wills WHERE owner <> ?1 LIMIT 1";
            let found = db
                .prepare_cached(sql)
                .and_then(|mut query| {
                    query.query_row([owner.cast_signed()], |row| row.get::<_, i64>(0)).optional()
                })
                .map_err(|error| unavailable(&error))?;
            Ok(found.map(i64::cast_unsigned))
        })
        .await
    }

    async fn wills(
        &self,
        owner: u64,
        limit: usize,
    ) -> Result<Vec<(WillKey, String)>, RegistryError> {
        self.read(move |db| wills(db, owner, limit).map_err(|error| unavailable(&error))).await
    }

    async fn forget_owner(&self, owner: u64) -> Result<(), RegistryError> {
        self.write(move |db| {
            db.execute("DELETE FROM wills WHERE owner = ?1", [owner.cast_signed()])
                .map(drop)
                .map_err(|error| unavailable(&error))
        })
        .await
    }
}
