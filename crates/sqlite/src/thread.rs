//! The two threads and their queues.

use std::io;
use std::thread::JoinHandle;

use fieldline_contracts::RegistryError;
use rusqlite::{Connection, TransactionBehavior};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{AUDIT_MAX, read};

/// Most writes that share one commit: bounds how long the first of them waits for the last.
const GROUP_MAX: usize = 128;

/// Commits between two looks at the length of the audit trail.
const TRIM_EVERY: u32 = 256;

/// Work for the reading thread.
pub(crate) type ReadJob = Box<dyn FnOnce(&Connection) + Send>;

/// Work for the writing thread: runs in a savepoint, and returns whether to keep what it wrote and
/// what to call when the commit has succeeded or failed.
pub(crate) type WriteJob = Box<dyn FnOnce(&Connection) -> (bool, Finish) + Send>;

/// Answers the caller, once it is known whether the commit is durable.
pub(crate) type Finish = Box<dyn FnOnce(Result<(), &str>) + Send>;

/// A thread with a bounded queue. Dropping it lets the queue run out and waits for the end.
pub(crate) struct Worker<J> {
    jobs: Option<mpsc::Sender<J>>,
    thread: Option<JoinHandle<()>>,
    name: &'static str,
}

impl<J: Send + 'static> Worker<J> {
    pub(crate) fn start(
        name: &'static str,
        queue_max: usize,
        body: impl FnOnce(mpsc::Receiver<J>) + Send + 'static,
    ) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel(queue_max);
        let thread =
            std::thread::Builder::new().name(name.to_owned()).spawn(move || body(queue))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread), name })
    }

    /// Queues a job, waiting for a place if need be.
    async fn queue(&self, job: J) -> Result<(), RegistryError> {
        let Some(jobs) = &self.jobs else { return Err(closed()) };
        let waiting = jobs.max_capacity() - jobs.capacity();
        // A queue holds 1,024 at most: exact as a float.
        metrics::gauge!("fieldline_registry_queue", "thread" => self.name)
            .set(u32::try_from(waiting).map_or(f64::INFINITY, f64::from));
        jobs.send(job).await.map_err(|_| closed())
    }
}

impl<J> Drop for Worker<J> {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(thread = self.name, "the registry's thread had panicked");
        }
    }
}

fn closed() -> RegistryError {
    RegistryError::Unavailable("its thread has ended; restart Fieldline".to_owned())
}

/// What SQLite said, as callers see it.
pub(crate) fn unavailable(error: &rusqlite::Error) -> RegistryError {
    use rusqlite::ErrorCode;
    let remedy = match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => "; free some space on the disk",
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => "; restore a backup",
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            "; another program holds the file"
        }
        Some(ErrorCode::ReadOnly) => "; make the data directory writable",
        _ => "",
    };
    RegistryError::Unavailable(format!("{error}{remedy}"))
}

/// Runs `work` on the reading thread.
pub(crate) async fn read<T: Send + 'static>(
    worker: &Worker<ReadJob>,
    work: impl FnOnce(&Connection) -> Result<T, RegistryError> + Send + 'static,
) -> Result<T, RegistryError> {
    let (answer, answered) = oneshot::channel();
    let job = move |db: &Connection| {
        if !answer.is_closed() {
            // The caller may have gone away: nobody is left to be told.
            drop(answer.send(work(db)));
        }
    };
    worker.queue(Box::new(job)).await?;
    answered.await.map_err(|_| closed())?
}

/// Runs `work` on the writing thread, and returns when it is durable.
pub(crate) async fn write<T: Send + 'static>(
    worker: &Worker<WriteJob>,
    work: impl FnOnce(&Connection) -> Result<T, RegistryError> + Send + 'static,
) -> Result<T, RegistryError> {
    let (answer, answered) = oneshot::channel();
    let job = move |db: &Connection| -> (bool, Finish) {
        let result = work(db);
        let keep = result.is_ok();
        let finish = move |committed: Result<(), &str>| {
            // What was refused needs no commit to be true.
            let told = match (result, committed) {
                (Ok(_), Err(reason)) => Err(RegistryError::Unavailable(reason.to_owned())),
                (result, _) => result,
            };
            drop(answer.send(told));
        };
        (keep, Box::new(finish))
    };
    worker.queue(Box::new(job)).await?;
    answered.await.map_err(|_| closed())?
}

/// Body of the reading thread.
pub(crate) fn read_loop(db: &Connection, mut jobs: mpsc::Receiver<ReadJob>) {
    while let Some(job) = jobs.blocking_recv() {
        job(db);
    }
}

/// Body of the writing thread: whatever waits is committed together.
pub(crate) fn write_loop(
    db: &mut Connection,
    mut jobs: mpsc::Receiver<WriteJob>,
    newest: &watch::Sender<u64>,
) {
    let mut group = Vec::with_capacity(GROUP_MAX);
    let mut commits = 0_u32;
    while jobs.blocking_recv_many(&mut group, GROUP_MAX) > 0 {
        let mut finishes = Vec::with_capacity(group.len());
        match commit(db, &mut group, &mut finishes) {
            Ok(sequence) => {
                // Before the answers: who is told that a write is done may rely on the watch.
                newest.send_if_modified(|seen| {
                    let newer = sequence > *seen;
                    *seen = sequence.max(*seen);
                    newer
                });
                finishes.into_iter().for_each(|finish: Finish| finish(Ok(())));
            }
            Err(error) => {
                let reason = match unavailable(&error) {
                    RegistryError::Unavailable(reason) => reason,
                    other => other.to_string(),
                };
                tracing::error!(reason, "the registry could not commit");
                finishes.into_iter().for_each(|finish| finish(Err(&reason)));
                // Begun without success: those jobs have not run, and run to be told why.
                for job in group.drain(..) {
                    job(db).1(Err(&reason));
                }
            }
        }
        commits = commits.wrapping_add(1);
        if commits.is_multiple_of(TRIM_EVERY)
            && let Err(error) = trim(db, *newest.borrow())
        {
            tracing::warn!(%error, "the audit trail could not be trimmed");
        }
    }
    // An empty journal at rest: the next start need not read it.
    if let Err(error) = db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)") {
        tracing::warn!(%error, "the registry's journal could not be emptied");
    }
}

/// Runs `group` in one transaction; returns the newest audit sequence.
fn commit(
    db: &mut Connection,
    group: &mut Vec<WriteJob>,
    finishes: &mut Vec<Finish>,
) -> rusqlite::Result<u64> {
    let mut tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for job in group.drain(..) {
        let point = tx.savepoint()?;
        let (keep, finish) = job(&point);
        finishes.push(finish);
        if keep {
            point.commit()?;
        } else {
            // Rolls back, and ends it.
            point.finish()?;
        }
    }
    let sequence = read::newest_sequence(&tx)?;
    tx.commit()?;
    Ok(sequence)
}

/// Lets go of the oldest of a trail that is too long.
fn trim(db: &Connection, newest: u64) -> rusqlite::Result<()> {
    let Some(last) = newest.checked_sub(AUDIT_MAX) else { return Ok(()) };
    let last = i64::try_from(last).unwrap_or(i64::MAX);
    db.prepare_cached("DELETE FROM audit WHERE sequence <= ?1")?.execute([last]).map(|_| ())
}
