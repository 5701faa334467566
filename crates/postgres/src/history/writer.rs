//! The tasks that write: each has its shards, its queue, and a connection.
//!
//! What waits in the queue is committed together, so many callers share one sync of the server's disk.
//! While the server is away a group is tried again until its time is up, others wait behind it, and what
//! finds no place is refused as busy: memory is bounded, and a caller knows within
//! [`crate::Settings::append_timeout`] and one attempt.

use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::HistoryError;
use fieldline_model::{Receipt, Series};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::Instant;

use crate::connect::{Link, within};
use crate::error::{Fault, Verdict};
use crate::history::Shared;
use crate::history::bucket::Bucket;
use crate::history::commit::{self, Done, Known, Sent};

/// Most messages of one transaction, except where one append has more left.
const GROUP_MESSAGES: usize = 20_000;

/// Most bytes of parameters of one transaction, with the same exception.
const GROUP_BYTES: usize = 16 << 20;

/// Appends that wait for one writer, at most; their bytes are bounded besides.
pub(crate) const QUEUE_MAX: usize = 1_024;

/// A message on its way.
pub(crate) struct Entry {
    pub(crate) series: Series,
    pub(crate) shard: u16,
    pub(crate) bucket: Bucket,
    pub(crate) at: i64,
    pub(crate) received: i64,
    pub(crate) hash: i64,
    /// Where its parameters end in [`Job::bodies`]; they begin where the ones before end.
    pub(crate) end: usize,
}

/// The part of an append that one writer stores.
pub(crate) struct Job {
    pub(crate) entries: Vec<Entry>,
    pub(crate) bodies: Vec<u8>,
    /// Of the numbers that stand for names in it.
    pub(crate) edition: u64,
    pub(crate) answer: oneshot::Sender<Result<Vec<Receipt>, HistoryError>>,
    pub(crate) since: Instant,
    /// Its place among the bytes that may wait.
    pub(crate) room: Arc<OwnedSemaphorePermit>,
}

/// What is committed together.
pub(crate) struct Group {
    jobs: Vec<Job>,
    shards: u16,
}

impl Group {
    /// The messages with their parameters, in the order of arrival.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&Entry, &[u8])> {
        self.jobs.iter().flat_map(|job| {
            let mut from = 0;
            job.entries.iter().map(move |entry| {
                let body = job.bodies.get(from..entry.end).unwrap_or_default();
                from = entry.end;
                (entry, body)
            })
        })
    }

    pub(crate) fn editions(&self) -> impl Iterator<Item = u64> {
        self.jobs.iter().map(|job| job.edition)
    }

    pub(crate) fn shard_of(&self, series: &Series) -> u16 {
        shard_of(series, self.shards)
    }

    fn has_room(&self) -> bool {
        let messages: usize = self.jobs.iter().map(|job| job.entries.len()).sum();
        let bytes: usize = self.jobs.iter().map(|job| job.bodies.len()).sum();
        messages < GROUP_MESSAGES && bytes < GROUP_BYTES
    }
}

/// Where a series belongs, on every node and for ever.
pub(crate) fn shard_of(series: &Series, shards: u16) -> u16 {
    u16::try_from(series.hash64() % u64::from(shards.max(1))).unwrap_or(0)
}

/// One of the tasks.
pub(crate) struct Writer {
    pub(crate) number: usize,
    pub(crate) shared: Arc<Shared>,
    pub(crate) jobs: mpsc::Receiver<Job>,
    pub(crate) link: Option<(Link, Known)>,
}

impl Writer {
    /// Body of the task: ends when nobody can append any more and all is stored.
    pub(crate) async fn run(mut self) {
        while let Some(first) = self.jobs.recv().await {
            let mut group = Group { jobs: vec![first], shards: self.shared.shards };
            while group.has_room()
                && let Ok(next) = self.jobs.try_recv()
            {
                group.jobs.push(next);
            }
            let result = self.store(&group).await;
            answer(group, result);
        }
    }

    async fn store(&mut self, group: &Group) -> Result<Done, HistoryError> {
        let oldest = group.jobs.iter().map(|job| job.since).min().unwrap_or_else(Instant::now);
        let deadline = oldest + self.shared.append_timeout;
        let mut sent: Option<Sent> = None;
        let mut pause = Duration::from_millis(20);
        let mut tries = 0_u32;
        loop {
            let fault = match self.attempt(group, deadline, &mut sent).await {
                Ok(done) => {
                    self.shared.trouble.clear(self.number);
                    self.shared.usage.add(&done.added);
                    return Ok(done);
                }
                Err(fault) => fault,
            };
            let (text, verdict) = (fault.to_string(), fault.verdict());
            // Two that met are no trouble yet.
            if tries > 0 || !matches!(verdict, Verdict::Again | Verdict::NoTable) {
                self.shared.trouble.note(self.number, &self.shared.now(), &text);
            }
            tries += 1;
            match verdict {
                Verdict::Full => return Err(HistoryError::Full(text)),
                Verdict::Final => return Err(HistoryError::Failed(text)),
                Verdict::Again | Verdict::NoTable | Verdict::Lost => {}
            }
            if Instant::now() + pause >= deadline {
                return Err(HistoryError::Failed(text));
            }
            tracing::debug!(writer = self.number, fault = text, "an append is tried again");
            metrics::counter!("fieldline_postgres_append_retries_total").increment(1);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(500));
        }
    }

    /// Tries once; leaves a connection without a transaction, or none.
    async fn attempt(
        &mut self,
        group: &Group,
        deadline: Instant,
        sent: &mut Option<Sent>,
    ) -> Result<Done, Fault> {
        let (link, mut known) = match self.link.take() {
            Some((link, known)) if !link.client.is_closed() => (link, known),
            _ => (self.shared.servers.connect().await?, Known::default()),
        };
        // No more than the server would take either: another server may have taken over meanwhile. And
        // one that begins late has a second all the same.
        let most = self.shared.servers.statement_timeout + Duration::from_secs(1);
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = left.min(most).max(Duration::from_secs(1));
        let shared = &self.shared;
        let stored = within(limit, commit::store(&link, &mut known, shared, group, sent)).await;
        match &stored {
            Ok(_) => self.link = Some((link, known)),
            Err(fault) if fault.verdict() == Verdict::Lost => {}
            Err(fault) => {
                if fault.verdict() == Verdict::NoTable {
                    known.forget_partitions();
                }
                let rolled_back = within(limit, link.client.batch_execute("ROLLBACK")).await;
                if rolled_back.is_ok() {
                    self.link = Some((link, known));
                }
            }
        }
        stored
    }
}

/// Tells each caller what became of its messages.
fn answer(group: Group, result: Result<Done, HistoryError>) {
    let mut places = match &result {
        Ok(done) => done.places.as_slice(),
        Err(_) => &[],
    };
    for job in group.jobs {
        let told = match &result {
            Ok(_) => {
                let (own, rest) = places.split_at_checked(job.entries.len()).unwrap_or_default();
                places = rest;
                let receipts = job.entries.iter().zip(own);
                Ok(receipts.map(|(entry, place)| place.receipt(entry.shard)).collect())
            }
            Err(error) => Err(error.clone()),
        };
        drop(job.room);
        // The caller may have gone away: then nobody acknowledges it.
        drop(job.answer.send(told));
    }
}
