//! The history: messages in partitions by day, appended by shards.
//!
//! Start reading at [`PostgresHistory::append`]; `writer.rs` has the queues and what happens when the
//! server is away, `commit.rs` the transaction, `read.rs` the queries.
//!
//! Last values are not kept at append: that would be an update a series and batch on the path of the
//! acknowledgement, for something that is asked for when Redis has lost its memory. They are folded from
//! the tail into a table, in the background when many messages have come and at once when asked for; the
//! fold's progress is in the same transaction, so any node may do it and be killed meanwhile (`fold.rs`).

mod book;
pub(crate) mod bucket;
mod commit;
mod fold;
mod keeper;
mod partition;
mod read;
mod retain;
#[doc(hidden)]
pub mod row;
mod usage;
mod writer;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use fieldline_contracts::history::BATCH_MAX;
use fieldline_contracts::{Clock, History, HistoryError, HistoryStats, Query, Retention};
use fieldline_model::{
    Accepted, AccountId, Cursor, ParamName, Receipt, Series, Stored, Timestamp, Value,
};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::connect::{Link, Servers};
use crate::error::{ConnectError, Fault};
use crate::history::book::{Book, Edition};
use crate::history::bucket::Calendar;
use crate::history::row::Dictionary;
use crate::history::usage::Usage;
use crate::history::writer::{Entry, Job, QUEUE_MAX, Writer, shard_of};
use crate::migrate;
use crate::pool::Pool;
use crate::settings::Settings;

/// Shards of a history that is made, where the settings do not say.
const SHARDS: u16 = 8;

/// Bytes that one unit of the queue's semaphore stands for.
const ROOM_BYTES: usize = 1_024;

/// Messages that are encoded before others get their turn.
const ENCODE_AT_ONCE: usize = 1_000;

/// What all parts share.
struct Shared {
    servers: Arc<Servers>,
    pool: Arc<Pool>,
    clock: Arc<dyn Clock>,
    calendar: Calendar,
    shards: u16,
    append_timeout: Duration,
    usage: Usage,
    book: Book,
    trouble: Trouble,
}

impl Shared {
    fn now(&self) -> Timestamp {
        self.clock.now()
    }
}

/// What keeps each part from its work, and since when.
#[derive(Default)]
struct Trouble(Mutex<BTreeMap<usize, (Timestamp, String)>>);

impl Trouble {
    fn note(&self, part: usize, now: &Timestamp, reason: &str) {
        let mut parts = self.0.lock();
        let known = parts.contains_key(&part);
        let entry = parts.entry(part).or_insert_with(|| (*now, String::new()));
        reason.clone_into(&mut entry.1);
        if !known {
            tracing::error!(reason, "messages cannot be stored in PostgreSQL");
        }
    }

    fn clear(&self, part: usize) {
        // Asked for with each commit; mostly there is nothing.
        if self.0.lock().remove(&part).is_some() {
            tracing::info!("messages can be stored in PostgreSQL again");
        }
    }
}

/// The history in PostgreSQL. Any number of nodes may have it open.
pub struct PostgresHistory {
    shared: Arc<Shared>,
    /// The writers' queues; `None` when closed.
    queues: RwLock<Option<Arc<[mpsc::Sender<Job>]>>>,
    room: Arc<Semaphore>,
    room_units: u32,
    writers: Mutex<Vec<JoinHandle<()>>>,
    keeper: JoinHandle<()>,
}

impl PostgresHistory {
    /// Connects, and makes or changes the tables as needed.
    ///
    /// # Errors
    ///
    /// See [`ConnectError`]; each says what to do.
    pub async fn connect(settings: &Settings, clock: Arc<dyn Clock>) -> Result<Self, ConnectError> {
        let servers = Arc::new(Servers::new(settings)?);
        let link = servers.connect().await?;
        migrate::prepare(&link, &servers, settings.migrate).await?;
        let (shards, calendar) = chosen(&link, settings, clock.now()).await?;
        let pool = Pool::new(Arc::clone(&servers), settings.connections_max);
        let shared = Arc::new(Shared {
            servers,
            pool,
            clock,
            calendar,
            shards,
            append_timeout: settings.append_timeout,
            usage: Usage::default(),
            book: Book::default(),
            trouble: Trouble::default(),
        });
        let other = |fault: Fault| ConnectError::Other(fault.to_string());
        keeper::partitions_ahead(&shared).await.map_err(other)?;
        shared.usage.look(&shared.pool).await.map_err(other)?;
        shared.book.load(&link).await.map_err(other)?;
        let count = usize::from(settings.writers.min(shards));
        let mut link = Some((link, commit::Known::default()));
        let (mut queues, mut writers) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for number in 0..count {
            let (queue, jobs) = mpsc::channel(QUEUE_MAX);
            let shared = Arc::clone(&shared);
            let writer = Writer { number, shared, jobs, link: link.take() };
            writers.push(tokio::spawn(writer.run()));
            queues.push(queue);
        }
        let keeper = tokio::spawn(keeper::run(Arc::clone(&shared), count));
        let units = usize::try_from(settings.queue_bytes_max).unwrap_or(usize::MAX) / ROOM_BYTES;
        Ok(Self {
            shared,
            queues: RwLock::new(Some(queues.into())),
            room: Arc::new(Semaphore::new(units)),
            room_units: u32::try_from(units).unwrap_or(u32::MAX),
            writers: Mutex::new(writers),
            keeper,
        })
    }

    fn queues(&self) -> Result<Arc<[mpsc::Sender<Job>]>, HistoryError> {
        self.queues.read().clone().ok_or(HistoryError::Closed)
    }

    /// Splits a batch by writers: for each that gets any, its messages and their numbers in the batch.
    async fn split(
        &self,
        batch: &[Accepted],
        dictionary: &Dictionary,
        writers: usize,
    ) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        parts.resize_with(writers, Part::default);
        for (number, message) in batch.iter().enumerate() {
            let series = message.series();
            let shard = shard_of(&series, self.shared.shards);
            let Some(part) = parts.get_mut(usize::from(shard) % writers.max(1)) else { continue };
            let mut unknown = |name: &ParamName| self.shared.book.want(name);
            row::encode(&mut part.bodies, message.params(), dictionary, &mut unknown);
            let at = message.timestamp().as_micros();
            part.entries.push(Entry {
                series,
                shard,
                bucket: self.shared.calendar.bucket(at),
                at,
                received: message.received().as_micros(),
                hash: message.hash().cast_signed(),
                end: part.bodies.len(),
            });
            part.numbers.push(number);
            if number % ENCODE_AT_ONCE == ENCODE_AT_ONCE - 1 {
                tokio::task::yield_now().await;
            }
        }
        parts
    }
}

/// What one writer gets of a batch.
#[derive(Default)]
struct Part {
    entries: Vec<Entry>,
    bodies: Vec<u8>,
    numbers: Vec<usize>,
}

/// The count of shards and the calendar: chosen by whoever comes first.
async fn chosen(
    link: &Link,
    settings: &Settings,
    now: Timestamp,
) -> Result<(u16, Calendar), ConnectError> {
    let choose = async {
        let client = &link.client;
        let put = "INSERT INTO settings (name, value) VALUES ($1, $2) ON CONFLICT DO NOTHING";
        let get = "SELECT value FROM settings WHERE name = $1";
        let asked = i64::from(settings.shards.unwrap_or(SHARDS));
        let first_day = i64::from(Calendar::beginning(now).first_day);
        for (name, value) in [("shards", asked), ("first_day", first_day)] {
            client.execute(put, &[&name, &value]).await?;
        }
        let shards: i64 = client.query_one(get, &[&"shards"]).await?.try_get(0)?;
        let first_day: i64 = client.query_one(get, &[&"first_day"]).await?.try_get(0)?;
        let last = i16::try_from(shards - 1).unwrap_or(0);
        for sql in [
            "INSERT INTO shards (shard, seq, writer) \
             SELECT n, 0, 0 FROM generate_series(0, $1::smallint) AS n ON CONFLICT DO NOTHING",
            "INSERT INTO folds (shard, seq) \
             SELECT n, 0 FROM generate_series(0, $1::smallint) AS n ON CONFLICT DO NOTHING",
        ] {
            client.execute(sql, &[&last]).await?;
        }
        Ok::<_, Fault>((shards, first_day))
    };
    let other = |fault: Fault| ConnectError::Other(fault.to_string());
    let (shards, first_day) = choose.await.map_err(other)?;
    let shards = u16::try_from(shards).unwrap_or(SHARDS);
    if let Some(asked) = settings.shards
        && asked != shards
    {
        let schema = settings.schema.clone();
        return Err(ConnectError::Shards { schema, found: shards, asked });
    }
    let first_day = i32::try_from(first_day).unwrap_or(0);
    Ok((shards, Calendar { first_day }))
}

impl Drop for PostgresHistory {
    fn drop(&mut self) {
        // The writers end when they have stored what waits.
        self.keeper.abort();
        self.shared.pool.close();
    }
}

#[async_trait]
impl History for PostgresHistory {
    async fn append(&self, batch: Vec<Accepted>) -> Result<Vec<Receipt>, HistoryError> {
        let queues = self.queues()?;
        if batch.len() > BATCH_MAX {
            let text =
                format!("a batch of {} messages; at most {BATCH_MAX} are taken", batch.len());
            return Err(HistoryError::Failed(text));
        }
        let since = Instant::now();
        let Edition { number: edition, dictionary } = self.shared.book.current();
        let parts = self.split(&batch, &dictionary, queues.len()).await;
        let count = batch.len();
        drop(batch);
        let bytes: usize = parts
            .iter()
            .map(|part| part.bodies.len() + part.entries.len() * size_of::<Entry>())
            .sum();
        // One that is larger than the whole room waits for nobody else to be there.
        let units = u32::try_from(bytes / ROOM_BYTES + 1).unwrap_or(u32::MAX).min(self.room_units);
        let room = Arc::clone(&self.room).try_acquire_many_owned(units);
        let room = Arc::new(room.map_err(|_| HistoryError::Busy)?);
        // All or none: what is refused as busy is not written.
        let mut places = Vec::new();
        for (part, queue) in parts.into_iter().zip(queues.iter()) {
            if !part.entries.is_empty() {
                places.push((part, queue.try_reserve().map_err(|_| HistoryError::Busy)?));
            }
        }
        let mut waiting = Vec::new();
        for (part, place) in places {
            let Part { entries, bodies, numbers } = part;
            let (answer, answered) = oneshot::channel();
            let room = Arc::clone(&room);
            place.send(Job { entries, bodies, edition, answer, since, room });
            waiting.push((answered, numbers));
        }
        drop((room, queues));
        let mut receipts = vec![Receipt { cursor: Cursor::default(), duplicate: false }; count];
        let mut failed = None;
        for (answered, numbers) in waiting {
            let ended = || HistoryError::Failed("the task that writes has ended".to_owned());
            match answered.await.unwrap_or_else(|_| Err(ended())) {
                Ok(own) => {
                    for (number, receipt) in numbers.into_iter().zip(own) {
                        if let Some(slot) = receipts.get_mut(number) {
                            *slot = receipt;
                        }
                    }
                }
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(receipts), Err)
    }

    async fn read(&self, query: &Query) -> Result<Vec<Stored>, HistoryError> {
        self.queues()?;
        read::read(&self.shared, query).await.map_err(|fault| fault.history())
    }

    fn shards(&self) -> u16 {
        self.shared.shards
    }

    async fn tail(&self, cursor: Cursor, limit: usize) -> Result<Vec<Stored>, HistoryError> {
        self.queues()?;
        read::tail(&self.shared, cursor, limit, false).await.map_err(|fault| fault.history())
    }

    async fn tail_over_damage(
        &self,
        cursor: Cursor,
        limit: usize,
    ) -> Result<Vec<Stored>, HistoryError> {
        self.queues()?;
        read::tail(&self.shared, cursor, limit, true).await.map_err(|fault| fault.history())
    }

    async fn last_values(
        &self,
        visit: &mut (dyn for<'a> FnMut(Series, &'a ParamName, &'a Value, Timestamp) + Send),
    ) -> Result<(), HistoryError> {
        self.queues()?;
        fold::visit(&self.shared, visit).await.map_err(|fault| fault.history())
    }

    async fn retain(&self, retention: Retention) -> Result<u64, HistoryError> {
        self.queues()?;
        let freed = retain::retain(&self.shared, retention).await;
        freed.map_err(|fault| HistoryError::Failed(fault.to_string()))
    }

    fn stats(&self, account: Option<AccountId>) -> HistoryStats {
        self.shared.usage.stats(account)
    }

    fn problems(&self) -> Vec<String> {
        let parts = self.shared.trouble.0.lock();
        // The parts mostly suffer from the same.
        let mut reasons: BTreeMap<&str, Timestamp> = BTreeMap::new();
        for (since, reason) in parts.values() {
            let first = reasons.entry(reason).or_insert(*since);
            *first = (*first).min(*since);
        }
        let text =
            |(reason, since)| format!("PostgreSQL does not store messages since {since}: {reason}");
        reasons.into_iter().map(text).collect()
    }

    async fn close(&self) -> Result<(), HistoryError> {
        drop(self.queues.write().take());
        let writers = std::mem::take(&mut *self.writers.lock());
        for writer in writers {
            writer
                .await
                .map_err(|_| HistoryError::Failed("a task that writes had panicked".to_owned()))?;
        }
        self.keeper.abort();
        self.shared.pool.close();
        Ok(())
    }
}
