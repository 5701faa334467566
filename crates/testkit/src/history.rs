//! A history in memory whose failures a test writes the script of.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use fieldline_contracts::{History, HistoryError, HistoryStats, Order, Query, Retention};
use fieldline_model::{
    Accepted, AccountId, Cursor, ParamName, Receipt, Series, SeriesKind, Stored, Timestamp, Value,
};
use parking_lot::Mutex;

/// What one append of messages is told to do. Logs and events never fail.
#[derive(Clone, Debug)]
pub enum Script {
    /// Fail so, with nothing stored.
    Fail(HistoryError),
    /// Store, then fail: durable, but its caller never learns.
    StoreAndFail(HistoryError),
}

#[derive(Default)]
struct Content {
    messages: Vec<Stored>,
    known: HashSet<(Series, Timestamp, u64)>,
    script: Vec<Script>,
    always: Option<HistoryError>,
}

/// A [`History`] in memory. Appends take [`ScriptedHistory::set_delay`] and
/// fail as the script says.
#[derive(Default)]
pub struct ScriptedHistory {
    content: Mutex<Content>,
    delay_us: AtomicU64,
    appends: AtomicUsize,
    held: tokio::sync::Mutex<()>,
}

impl ScriptedHistory {
    /// An empty history that does not fail.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The next appends of messages do what `script` says, one each.
    pub fn play(&self, script: impl IntoIterator<Item = Script>) {
        self.content.lock().script.extend(script);
    }

    /// From now on every append of messages fails so; `None` ends that.
    pub fn fail_always(&self, error: Option<HistoryError>) {
        self.content.lock().always = error;
    }

    /// How long an append takes from now on.
    pub fn set_delay(&self, delay: Duration) {
        let us = u64::try_from(delay.as_micros()).unwrap_or(u64::MAX);
        self.delay_us.store(us, Ordering::SeqCst);
    }

    /// Holds all appends of messages until the guard is dropped.
    pub async fn hold(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.held.lock().await
    }

    /// Count of appends of messages that were begun.
    pub fn appends(&self) -> usize {
        self.appends.load(Ordering::SeqCst)
    }

    /// Everything stored of one kind, in order of arrival.
    pub fn all(&self, kind: SeriesKind) -> Vec<Stored> {
        let content = self.content.lock();
        content.messages.iter().filter(|m| m.series().kind == kind).cloned().collect()
    }

    fn store(&self, batch: Vec<Accepted>) -> Vec<Receipt> {
        let mut content = self.content.lock();
        let mut receipts = Vec::with_capacity(batch.len());
        for accepted in batch {
            let fresh =
                content.known.insert((accepted.series(), accepted.timestamp(), accepted.hash()));
            let seq = if fresh { content.messages.len() as u64 + 1 } else { 0 };
            let receipt = Receipt { cursor: Cursor { shard: 0, seq }, duplicate: !fresh };
            if fresh {
                content.messages.push(accepted.stored(receipt));
            }
            receipts.push(receipt);
        }
        receipts
    }
}

#[async_trait]
impl History for ScriptedHistory {
    async fn append(&self, batch: Vec<Accepted>) -> Result<Vec<Receipt>, HistoryError> {
        if !batch.iter().any(|m| m.series().kind == SeriesKind::Message) {
            return Ok(self.store(batch));
        }
        self.appends.fetch_add(1, Ordering::SeqCst);
        drop(self.held.lock().await);
        let delay = Duration::from_micros(self.delay_us.load(Ordering::SeqCst));
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let next = {
            let mut content = self.content.lock();
            if let Some(error) = &content.always {
                return Err(error.clone());
            }
            (!content.script.is_empty()).then(|| content.script.remove(0))
        };
        match next {
            Some(Script::Fail(error)) => Err(error),
            Some(Script::StoreAndFail(error)) => {
                self.store(batch);
                Err(error)
            }
            None => Ok(self.store(batch)),
        }
    }

    async fn read(&self, query: &Query) -> Result<Vec<Stored>, HistoryError> {
        let content = self.content.lock();
        let within = |m: &&Stored| {
            m.series() == query.series && (query.from..query.to).contains(&m.timestamp())
        };
        let mut found: Vec<Stored> = content.messages.iter().filter(within).cloned().collect();
        found.sort_by_key(|m| (m.timestamp(), m.cursor()));
        if query.order == Order::Descending {
            found.reverse();
        }
        if let Some(after) = query.after {
            found.retain(|m| match query.order {
                Order::Ascending => (m.timestamp(), m.cursor()) > after,
                Order::Descending => (m.timestamp(), m.cursor()) < after,
            });
        }
        found.truncate(query.limit.min(Query::LIMIT_MAX));
        Ok(found)
    }

    fn shards(&self) -> u16 {
        1
    }

    async fn tail(&self, cursor: Cursor, limit: usize) -> Result<Vec<Stored>, HistoryError> {
        let content = self.content.lock();
        let from = usize::try_from(cursor.seq).unwrap_or(usize::MAX);
        Ok(content.messages.iter().skip(from).take(limit).cloned().collect())
    }

    async fn last_values(
        &self,
        visit: &mut (dyn for<'a> FnMut(Series, &'a ParamName, &'a Value, Timestamp) + Send),
    ) -> Result<(), HistoryError> {
        let mut last: HashMap<Series, HashMap<ParamName, (Value, Timestamp)>> = HashMap::new();
        for message in self.all(SeriesKind::Message) {
            let values = last.entry(message.series()).or_default();
            for (name, value) in message.params() {
                let newest = values.get(name).is_none_or(|(_, at)| *at <= message.timestamp());
                if newest {
                    values.insert(name.clone(), (value.clone(), message.timestamp()));
                }
            }
        }
        for (series, values) in last {
            for (name, (value, at)) in values {
                visit(series, &name, &value, at);
            }
        }
        Ok(())
    }

    async fn retain(&self, retention: Retention) -> Result<u64, HistoryError> {
        let mut content = self.content.lock();
        let before = retention.before.unwrap_or(Timestamp::MIN);
        content
            .messages
            .retain(|m| m.series().account != retention.account || m.timestamp() >= before);
        Ok(0)
    }

    fn stats(&self, account: Option<AccountId>) -> HistoryStats {
        let content = self.content.lock();
        let of = |m: &&Stored| account.is_none_or(|account| m.series().account == account);
        let messages = content.messages.iter().filter(of).count() as u64;
        HistoryStats { messages, unsealed: messages, ..HistoryStats::default() }
    }

    async fn close(&self) -> Result<(), HistoryError> {
        self.content.lock().always = Some(HistoryError::Closed);
        Ok(())
    }
}
