//! The store as callers see it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use fieldline_contracts::history::BATCH_MAX;
use fieldline_contracts::{Clock, History, HistoryError, HistoryStats, Query, Retention};
use fieldline_model::{
    Accepted, AccountId, Cursor, ParamName, Receipt, Series, Stored, Timestamp, Value,
};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tracing::warn;

use crate::aggregate::Aggregate;
use crate::config::{MdbConfig, OpenError};
use crate::disk::{Disk, RealDisk};
use crate::open::{Opened, open};
use crate::queue::{Answer, Job};
use crate::shard::{Sealing, Shard};
use crate::{merge, retain};

/// A message store in a directory of its own.
///
/// Appends wait in a bounded queue per shard: there they exert back-pressure,
/// for at most [`MdbConfig::queue_wait_max`], and are then refused as
/// [`HistoryError::Busy`]. All that waits is written as one group with one
/// sync. Dropping it stops its threads; what was acknowledged is durable anyhow.
pub struct Mdb {
    shards: Vec<Arc<Shard>>,
    closed: AtomicBool,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Held until it is closed, so that no second process writes here.
    lock: Mutex<Option<Box<dyn Send + Sync>>>,
}

impl Mdb {
    /// Opens the store in `dir`, which is made if it is not there, and recovers
    /// what the log holds: takes time by what is not sealed, not by what is stored.
    ///
    /// # Errors
    ///
    /// See [`OpenError`].
    pub fn open(
        dir: impl AsRef<Path>,
        config: MdbConfig,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, OpenError> {
        Self::open_on(Arc::new(RealDisk), dir, config, clock)
    }

    /// Opens a store on a disk of the caller's: what tests do.
    ///
    /// # Errors
    ///
    /// See [`OpenError`].
    pub fn open_on(
        disk: Arc<dyn Disk>,
        dir: impl AsRef<Path>,
        config: MdbConfig,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, OpenError> {
        let Opened { shards, threads, lock } = open(disk, dir.as_ref(), config, clock)?;
        Ok(Self {
            shards,
            closed: AtomicBool::new(false),
            threads: Mutex::new(threads),
            lock: Mutex::new(Some(lock)),
        })
    }

    /// Seals what is in memory, and waits for it: before a backup, and in tests.
    ///
    /// # Errors
    ///
    /// What sealing failed with; it is tried again by itself.
    pub async fn seal(&self) -> Result<(), HistoryError> {
        self.check_open()?;
        for shard in &self.shards {
            flush(shard).await?;
        }
        Ok(())
    }

    /// Merges segments until there is nothing to merge: what else happens in the background.
    ///
    /// # Errors
    ///
    /// [`HistoryError::Failed`] where a merged segment could not be written.
    pub async fn merge(&self) -> Result<(), HistoryError> {
        self.check_open()?;
        for shard in &self.shards {
            let shard = shard.clone();
            blocking(move || {
                while merge::merge_once(&shard)
                    .map_err(|error| HistoryError::Failed(format!("merge segments: {error}")))?
                {
                }
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    /// Aggregates parameter `name` of a series from `from` on and before `to`; `None`
    /// where it has no number there. Costs little over long spans: whole blocks are
    /// answered from their statistics.
    ///
    /// # Errors
    ///
    /// [`HistoryError::Corrupt`], [`HistoryError::Closed`].
    pub async fn aggregate(
        &self,
        series: Series,
        name: &str,
        from: Timestamp,
        to: Timestamp,
    ) -> Result<Option<Aggregate>, HistoryError> {
        self.check_open()?;
        let (shard, name) = (self.shard_of(&series)?.1.clone(), name.to_owned());
        blocking(move || shard.aggregate(series, &name, from, to)).await
    }

    /// Directory of a shard.
    #[must_use]
    pub fn shard_dir(&self, shard: u16) -> Option<PathBuf> {
        self.shards.get(usize::from(shard)).map(|shard| shard.dir.clone())
    }

    async fn read_tail(
        &self,
        cursor: Cursor,
        limit: usize,
        over_damage: bool,
    ) -> Result<Vec<Stored>, HistoryError> {
        self.check_open()?;
        let Some(shard) = self.shards.get(usize::from(cursor.shard)).cloned() else {
            return Ok(Vec::new());
        };
        blocking(move || shard.tail(cursor.seq, limit.min(Query::LIMIT_MAX), over_damage)).await
    }

    fn shard_of(&self, series: &Series) -> Result<(usize, &Arc<Shard>), HistoryError> {
        let at = usize::try_from(series.hash64() % self.shards.len() as u64).unwrap_or(0);
        self.shards.get(at).map(|shard| (at, shard)).ok_or(HistoryError::Closed)
    }

    fn check_open(&self) -> Result<(), HistoryError> {
        if self.closed.load(Ordering::Acquire) { Err(HistoryError::Closed) } else { Ok(()) }
    }

    fn stop(&self) {
        self.closed.store(true, Ordering::Release);
        for shard in &self.shards {
            shard.queue.close();
            shard.sealing.lock().stop = true;
            shard.frozen.notify_all();
            shard.sealed.notify_all();
        }
    }
}

impl Drop for Mdb {
    fn drop(&mut self) {
        self.stop();
        for thread in self.threads.lock().drain(..) {
            // A panic of the thread was printed where it happened.
            drop(thread.join());
        }
        for shard in &self.shards {
            shard.end();
        }
    }
}

/// Runs what may wait for the disk where it stops no event loop.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, HistoryError> + Send + 'static,
) -> Result<T, HistoryError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(HistoryError::Failed(format!("a task of the store ended: {error}"))),
    }
}

/// Seals what is in memory now, and waits for it.
async fn flush(shard: &Arc<Shard>) -> Result<(), HistoryError> {
    let failures = shard.sealing.lock().failures;
    // Only what fails from now on counts: an earlier failure may be over.
    let failed_since = move |sealing: &Sealing| {
        if sealing.failures > failures { sealing.failed.clone() } else { None }
    };
    shard.frozen.notify_all();
    loop {
        let (reply, frozen) = oneshot::channel();
        shard.queue.freeze(reply);
        if frozen.await.map_err(|_| HistoryError::Closed)? {
            break;
        }
        // Sealing lags behind: either it goes on, or this says why it does not.
        if let Some(failed) = failed_since(&shard.sealing.lock()) {
            return Err(failed);
        }
    }
    let shard = shard.clone();
    blocking(move || {
        let mut sealing = shard.sealing.lock();
        loop {
            if shard.view.read().frozen.is_empty() {
                return Ok(());
            }
            if let Some(failed) = failed_since(&sealing) {
                return Err(failed);
            }
            if sealing.stop {
                return Err(HistoryError::Closed);
            }
            shard.sealed.wait_for(&mut sealing, Duration::from_secs(1));
        }
    })
    .await
}

/// Puts the messages of one shard into its queue.
async fn enqueue(
    shard: &Shard,
    messages: Vec<Accepted>,
) -> Result<oneshot::Receiver<Answer>, HistoryError> {
    let mut kib = 1;
    for message in &messages {
        let bytes = message.params().content_bytes();
        if bytes > MESSAGE_BYTES_MAX {
            return Err(HistoryError::Failed(format!(
                "a message has {bytes} bytes; at most {MESSAGE_BYTES_MAX} are kept"
            )));
        }
        kib += bytes + 128;
    }
    let kib = u32::try_from((kib / 1024).clamp(1, shard.config.queue_bytes_max / 1024))
        .unwrap_or(u32::MAX);
    let room = match shard.room.clone().try_acquire_many_owned(kib) {
        Ok(room) => room,
        Err(_) => {
            let wait = shard.room.clone().acquire_many_owned(kib);
            match tokio::time::timeout(shard.config.queue_wait_max, wait).await {
                Ok(Ok(room)) => room,
                Ok(Err(_)) => return Err(HistoryError::Closed),
                Err(_) => {
                    metrics::counter!(
                        "fieldline_mdb_refused_total",
                        "shard" => shard.label.clone(), "code" => HistoryError::Busy.code(),
                    )
                    .increment(messages.len() as u64);
                    return Err(HistoryError::Busy);
                }
            }
        }
    };
    let (reply, answer) = oneshot::channel();
    shard.queue.push(Job { messages, reply, room }).map_err(|_| HistoryError::Closed)?;
    Ok(answer)
}

/// Largest content of one message; twice as much must fit into a frame of the log.
const MESSAGE_BYTES_MAX: usize = 4 << 20;

async fn answered(answer: oneshot::Receiver<Answer>) -> Result<Vec<Receipt>, HistoryError> {
    match answer.await {
        Ok(Answer { receipts, messages }) => {
            drop(messages);
            receipts
        }
        Err(_) => Err(HistoryError::Failed("the writer has ended".to_owned())),
    }
}

#[async_trait]
impl History for Mdb {
    async fn append(&self, batch: Vec<Accepted>) -> Result<Vec<Receipt>, HistoryError> {
        self.check_open()?;
        if batch.len() > BATCH_MAX {
            return Err(HistoryError::Failed(format!(
                "a batch has {} messages; at most {BATCH_MAX} are taken",
                batch.len()
            )));
        }
        let Some(first) = batch.first() else { return Ok(Vec::new()) };
        let (home, shard) = self.shard_of(&first.series())?;
        // Most batches are of one device, and so of one shard.
        let mut places = Vec::with_capacity(batch.len());
        for message in &batch {
            places.push(self.shard_of(&message.series())?.0);
        }
        if places.iter().all(|place| *place == home) {
            return answered(enqueue(shard, batch).await?).await;
        }
        let mut parts: Vec<Vec<Accepted>> = vec![Vec::new(); self.shards.len()];
        for (message, place) in batch.into_iter().zip(&places) {
            if let Some(part) = parts.get_mut(*place) {
                part.push(message);
            }
        }
        // Into all queues first, so that the shards write at the same time.
        let mut answers = Vec::with_capacity(parts.len());
        for (shard, part) in self.shards.iter().zip(parts) {
            answers.push(if part.is_empty() { None } else { Some(enqueue(shard, part).await?) });
        }
        let mut receipts = Vec::with_capacity(answers.len());
        for answer in answers {
            receipts.push(match answer {
                Some(answer) => answered(answer).await?.into_iter(),
                None => Vec::new().into_iter(),
            });
        }
        let in_order = places.iter().map(|place| receipts.get_mut(*place)?.next());
        in_order
            .collect::<Option<Vec<Receipt>>>()
            .ok_or_else(|| HistoryError::Failed("a receipt is missing".to_owned()))
    }

    async fn read(&self, query: &Query) -> Result<Vec<Stored>, HistoryError> {
        self.check_open()?;
        let shard = self.shard_of(&query.series)?.1.clone();
        let query = query.clone();
        blocking(move || shard.read(&query)).await
    }

    fn shards(&self) -> u16 {
        u16::try_from(self.shards.len()).unwrap_or(u16::MAX)
    }

    async fn tail(&self, cursor: Cursor, limit: usize) -> Result<Vec<Stored>, HistoryError> {
        self.read_tail(cursor, limit, false).await
    }

    async fn tail_over_damage(
        &self,
        cursor: Cursor,
        limit: usize,
    ) -> Result<Vec<Stored>, HistoryError> {
        self.read_tail(cursor, limit, true).await
    }

    async fn last_values(
        &self,
        visit: &mut (dyn for<'a> FnMut(Series, &'a ParamName, &'a Value, Timestamp) + Send),
    ) -> Result<(), HistoryError> {
        self.check_open()?;
        for shard in &self.shards {
            // Read on a thread that may wait for the disk, handed over a few at a time.
            let (sender, mut receiver) = mpsc::channel(64);
            let shard = shard.clone();
            let reading = blocking(move || {
                shard.last_values(|series, values| sender.blocking_send((series, values)).is_ok())
            });
            let visiting = async {
                while let Some((series, values)) = receiver.recv().await {
                    for (name, (value, timestamp)) in values.iter() {
                        visit(series, name, value, Timestamp::from_micros(*timestamp));
                    }
                }
            };
            let (read, ()) = tokio::join!(reading, visiting);
            read?;
        }
        Ok(())
    }

    async fn retain(&self, retention: Retention) -> Result<u64, HistoryError> {
        self.check_open()?;
        let Retention { account, before, bytes_max } = retention;
        let before = before.map_or(i64::MIN, Timestamp::as_micros);
        for shard in &self.shards {
            if retain::holds_old(shard, account, before) {
                match flush(shard).await {
                    // On a full disk this fails, and what is sealed must go all the more.
                    Err(error @ (HistoryError::Full(_) | HistoryError::Failed(_))) => {
                        warn!(shard = shard.number, %error, "retention leaves what is not sealed");
                    }
                    other => other?,
                }
            }
        }
        let shards = self.shards.clone();
        blocking(move || {
            let by_bytes = bytes_max.and_then(|max| retain::cut_by_bytes(&shards, account, max));
            let cut = before.max(by_bytes.unwrap_or(i64::MIN));
            let mut freed = 0;
            for shard in &shards {
                freed += retain::drop_before(shard, account, cut, by_bytes.is_some())?;
            }
            Ok(freed)
        })
        .await
    }

    fn stats(&self, account: Option<AccountId>) -> HistoryStats {
        let mut stats = HistoryStats::default();
        for shard in &self.shards {
            shard.stats(account, &mut stats);
        }
        stats
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for shard in &self.shards {
            shard.problems(&mut problems);
        }
        problems
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        for shard in &self.shards {
            shard.warnings(&mut warnings);
        }
        warnings
    }

    async fn close(&self) -> Result<(), HistoryError> {
        self.check_open()?;
        self.stop();
        let threads = std::mem::take(&mut *self.threads.lock());
        let shards = self.shards.clone();
        let ended = blocking(move || {
            let panicked = threads.into_iter().filter_map(|thread| thread.join().err()).count();
            // Retention or a merge may be at work for a caller: another process must not
            // get the directory before they are done.
            for shard in &shards {
                shard.end();
            }
            if panicked > 0 {
                return Err(HistoryError::Failed("a thread of the store panicked".to_owned()));
            }
            Ok(())
        })
        .await;
        drop(self.lock.lock().take());
        ended
    }
}
