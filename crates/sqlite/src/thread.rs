//! The two threads and their queues.

use std::io;
use std::thread::JoinHandle;
use std::time::Duration;

use fieldline_contracts::RegistryError;
use rusqlite::{Connection, TransactionBehavior};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout_at};

use crate::mark::Mark;
use crate::{AUDIT_MAX, read, schema};

/// Most writes that share one commit: bounds how long the first of them waits for the last.
const GROUP_MAX: usize = 128;

/// Commits between two looks at the length of the audit trail.
const TRIM_EVERY: u32 = 256;

/// How long a change may be in the journal alone: who copies the file without it misses no more.
const JOURNAL_AGE_MAX: Duration = Duration::from_secs(5);

/// Work for the reading thread.
pub(crate) type ReadJob = Box<dyn FnOnce(&Connection) + Send>;

/// Work for the writing thread.
pub(crate) enum WriteJob {
    /// Writes something.
    Run(Run),
    /// Empties the journal, and tells whether that was possible.
    Settle(oneshot::Sender<bool>),
}

/// What is to be written: runs in a savepoint, and returns whether to keep what it wrote and
/// what to call when the commit has succeeded or failed. Without a connection nothing is run: there
/// was no transaction to run it in.
pub(crate) type Run = Box<dyn FnOnce(Option<&Connection>) -> (bool, Finish) + Send>;

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
    let job = move |db: Option<&Connection>| -> (bool, Finish) {
        let result = db.map(work);
        let keep = matches!(result, Some(Ok(_)));
        let finish = move |committed: Result<(), &str>| {
            let told = match (result, committed) {
                // What was refused needs no commit to be true.
                (Some(Err(refused)), _) => Err(refused),
                (Some(Ok(done)), Ok(())) => Ok(done),
                (_, Err(reason)) => Err(RegistryError::Unavailable(reason.to_owned())),
                (None, Ok(())) => Err(RegistryError::Unavailable("it was not run".to_owned())),
            };
            drop(answer.send(told));
        };
        (keep, Box::new(finish))
    };
    worker.queue(WriteJob::Run(Box::new(job))).await?;
    answered.await.map_err(|_| closed())?
}

/// Empties the journal; tells whether that was possible.
pub(crate) async fn settle(worker: &Worker<WriteJob>) -> Result<bool, RegistryError> {
    let (answer, answered) = oneshot::channel();
    worker.queue(WriteJob::Settle(answer)).await?;
    answered.await.map_err(|_| closed())
}

/// Body of the reading thread.
pub(crate) fn read_loop(db: &Connection, mut jobs: mpsc::Receiver<ReadJob>) {
    while let Some(job) = jobs.blocking_recv() {
        job(db);
    }
}

/// What wakes the writing thread.
pub(crate) fn timer() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_time().build()
}

/// What the writing thread owns.
pub(crate) struct Writer {
    pub(crate) db: Connection,
    /// Tells of the newest sequence.
    pub(crate) newest: watch::Sender<u64>,
    pub(crate) mark: Mark,
    /// Wakes the thread when the journal is to be emptied.
    pub(crate) timer: Runtime,
}

impl Writer {
    /// Body of the writing thread: whatever waits is committed together.
    pub(crate) fn run(mut self, mut jobs: mpsc::Receiver<WriteJob>) {
        let mut received = Vec::with_capacity(GROUP_MAX);
        let mut commits = 0_u32;
        // Since when something is in the journal alone.
        let mut dirty: Option<Instant> = None;
        loop {
            let waiting = async {
                let some = jobs.recv_many(&mut received, GROUP_MAX);
                match dirty {
                    None => Some(some.await),
                    Some(since) => timeout_at(since + JOURNAL_AGE_MAX, some).await.ok(),
                }
            };
            let count = self.timer.block_on(waiting);
            if count == Some(0) {
                break;
            }
            let (mut group, mut settled) = (Vec::with_capacity(received.len()), Vec::new());
            for job in received.drain(..) {
                match job {
                    WriteJob::Run(job) => group.push(job),
                    WriteJob::Settle(answer) => settled.push(answer),
                }
            }
            if !group.is_empty() {
                self.write(group);
                dirty = dirty.or_else(|| Some(Instant::now()));
                commits = commits.wrapping_add(1);
                if commits.is_multiple_of(TRIM_EVERY)
                    && *self.newest.borrow() > AUDIT_MAX
                    && let Err(error) = trim(&self.db, AUDIT_MAX)
                {
                    tracing::warn!(%error, "the audit trail could not be trimmed");
                }
            }
            let old = dirty.is_some_and(|since| since.elapsed() >= JOURNAL_AGE_MAX);
            if old || !settled.is_empty() {
                // Where another program reads the file, it is tried again later.
                dirty = (!self.empty_journal()).then(Instant::now);
                for answer in settled {
                    let _gone_meanwhile = answer.send(dirty.is_none());
                }
            }
        }
        self.empty_journal();
    }

    fn write(&mut self, mut group: Vec<Run>) {
        let mut finishes = Vec::with_capacity(group.len());
        match commit(&mut self.db, &mut group, &mut finishes) {
            Ok(sequence) => {
                // Before the answers: who is told that a write is done may rely on both.
                self.mark.note(sequence);
                self.newest.send_if_modified(|seen| {
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
                // These have not run, and must not: outside a transaction each statement would be kept.
                for job in group {
                    job(None).1(Err(&reason));
                }
            }
        }
    }

    /// Brings what is in the journal into the file; tells whether all of it is there now.
    fn empty_journal(&self) -> bool {
        let emptied = schema::without_waiting(&self.db, |db| {
            db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, bool>(0))
        });
        match emptied {
            Ok(busy) => {
                self.mark.sync();
                !busy
            }
            Err(error) => {
                tracing::warn!(%error, "the registry's journal could not be emptied");
                false
            }
        }
    }
}

/// Runs `group` in one transaction; returns the newest audit sequence.
fn commit(
    db: &mut Connection,
    group: &mut Vec<Run>,
    finishes: &mut Vec<Finish>,
) -> rusqlite::Result<u64> {
    let mut tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let mut jobs = group.drain(..);
    let ran = jobs.by_ref().try_for_each(|job| {
        let point = match tx.savepoint() {
            Ok(point) => point,
            Err(error) => {
                finishes.push(job(None).1);
                return Err(error);
            }
        };
        let (keep, finish) = job(Some(&point));
        finishes.push(finish);
        // The other rolls back, and ends it.
        if keep { point.commit() } else { point.finish() }
    });
    if let Err(error) = ran {
        // Those behind are told the same.
        finishes.extend(jobs.map(|job| job(None).1));
        return Err(error);
    }
    drop(jobs);
    let sequence = read::newest_known(&tx)?;
    tx.commit()?;
    Ok(sequence)
}

/// Lets go of the oldest of a trail that has more than `most` entries: of those accounts that have
/// more than their share, so that one that changes much cannot push out the trail of another.
fn trim(db: &Connection, most: u64) -> rusqlite::Result<()> {
    let counts: Vec<(Vec<u8>, u64)> = db
        .prepare_cached("SELECT account, count(*) FROM audit GROUP BY account ORDER BY count(*)")?
        .query_map([], |row| Ok((row.get(0)?, read::unsigned(row.get(1)?))))?
        .collect::<rusqlite::Result<_>>()?;
    // From the smallest: what it leaves of its share is for the others.
    let mut left = most;
    let mut accounts = u64::try_from(counts.len()).unwrap_or(u64::MAX);
    for (account, count) in counts {
        let share = left / accounts.max(1);
        if count > share {
            db.prepare_cached(
                "DELETE FROM audit WHERE account = ?1 AND sequence <= (SELECT sequence FROM audit \
                 WHERE account = ?1 ORDER BY sequence DESC LIMIT 1 OFFSET ?2)",
            )?
            .execute((account, read::signed(share)))?;
        }
        left -= count.min(share);
        accounts = accounts.saturating_sub(1);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn what_could_not_begin_is_not_run() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry.sqlite");
        let mut db = Connection::open(&path).unwrap();
        schema::configure(&db).unwrap();
        schema::migrate(&mut db, &path).unwrap();
        db.busy_timeout(Duration::from_millis(20)).unwrap();
        // A backup or a shell holds the file for longer than we wait.
        let other = Connection::open(&path).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();

        let writer = Writer {
            db,
            newest: watch::channel(0).0,
            mark: Mark::open(&path).unwrap().0,
            timer: timer().unwrap(),
        };
        let worker = Worker::start("test", 8, move |jobs| writer.run(jobs)).unwrap();
        let ran = Arc::new(AtomicBool::new(false));
        let noted = Arc::clone(&ran);
        let told = write(&worker, move |_| {
            noted.store(true, Ordering::SeqCst);
            Ok(())
        })
        .await;
        assert!(matches!(told, Err(RegistryError::Unavailable(_))), "{told:?}");
        assert!(!ran.load(Ordering::SeqCst), "outside a transaction it would be kept in parts");

        other.execute_batch("COMMIT").unwrap();
        write(&worker, |_| Ok(())).await.unwrap();
    }

    #[test]
    fn who_changes_much_trims_only_his_own_trail() {
        let mut db = Connection::open_in_memory().unwrap();
        schema::migrate(&mut db, std::path::Path::new("memory")).unwrap();
        let add = |account: u8, count: usize| {
            for _ in 0..count {
                db.execute(
                    "INSERT INTO audit (at, account, actor, action, kind, object, changed) \
                     VALUES (0, ?1, 'a', 'create', 'device', x'00', '[]')",
                    [vec![account; 16]],
                )
                .unwrap();
            }
        };
        add(1, 10);
        add(2, 200);
        add(3, 50);
        trim(&db, 100).unwrap();
        let count = |account: u8| -> u64 {
            let sql = "SELECT count(*) FROM audit WHERE account = ?1";
            db.query_row(sql, [vec![account; 16]], |row| row.get(0)).map(read::unsigned).unwrap()
        };
        assert_eq!((count(1), count(2), count(3)), (10, 45, 45));
        let newest: i64 =
            db.query_row("SELECT max(sequence) FROM audit", [], |row| row.get(0)).unwrap();
        assert_eq!(newest, 260, "the newest stay");
    }
}
