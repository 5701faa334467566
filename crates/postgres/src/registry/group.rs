//! The one task of a node that makes changes. What waits while it commits goes together with the next commit,
//! so that a sync of the disk is shared by all who asked meanwhile: a change alone takes one, and of many at
//! once each takes a part of one.
//!
//! First in, first out. When [`QUEUE_MAX`] wait, callers wait for a place. What was queued is made whatever
//! becomes of its caller; what one change may not do fails for that one alone.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::{Record, RegistryError};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_postgres::error::SqlState;

use crate::error::{Fault, Verdict};
use crate::pool::Pool;
use crate::registry::follow;
use crate::registry::plan::Change;
use crate::registry::write::{self, Answers, Mark, Stop, was_kept};

/// Longest that a change waits and is tried, reconnecting included.
const TRY_MAX: Duration = Duration::from_secs(20);
/// Changes that wait.
const QUEUE_MAX: usize = 1_024;
/// Changes of one transaction.
const GROUP_MAX: usize = 128;
/// Bytes of objects after which a transaction takes no further change.
const GROUP_BYTES: usize = 4 << 20;

/// Where changes are queued. Dropped, those that wait are made, and the task ends.
pub(crate) struct Groups {
    sender: mpsc::Sender<Job>,
}

struct Job {
    change: Change,
    /// Until when it is tried.
    until: Instant,
    /// Taken once it is answered.
    answer: Option<oneshot::Sender<Result<Record, RegistryError>>>,
}

impl Job {
    fn answer(&mut self, answer: Result<Record, RegistryError>) {
        // Who asked may be gone; what was asked for is done.
        let gone = self.answer.take().is_some_and(|waits| waits.send(answer).is_err());
        if gone {
            tracing::debug!("who asked for a change of the registry is gone");
        }
    }
}

fn unavailable(text: impl Into<String>) -> RegistryError {
    RegistryError::Unavailable(text.into())
}

impl Groups {
    /// Starts the task on the present runtime.
    pub(crate) fn start(pool: Arc<Pool>, newest: watch::Sender<u64>) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE_MAX);
        tokio::spawn(run(receiver, pool, newest));
        Self { sender }
    }

    /// Queues a change and waits for its answer. Dropped before it has a place, it is not made; after, it is.
    pub(crate) async fn change(&self, change: Change) -> Result<Record, RegistryError> {
        let until = Instant::now() + TRY_MAX;
        let (answer, answered) = oneshot::channel();
        let job = Job { change, until, answer: Some(answer) };
        match tokio::time::timeout_at(until, self.sender.send(job)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(unavailable("the task that makes changes ended")),
            Err(_) => return Err(unavailable(format!("{QUEUE_MAX} changes wait already"))),
        }
        let waiting = self.sender.max_capacity() - self.sender.capacity();
        metrics::gauge!("fieldline_postgres_changes_waiting")
            .set(f64::from(u32::try_from(waiting).unwrap_or(u32::MAX)));
        answered.await.unwrap_or_else(|_| Err(unavailable("the task that makes changes ended")))
    }
}

async fn run(mut receiver: mpsc::Receiver<Job>, pool: Arc<Pool>, newest: watch::Sender<u64>) {
    while let Some(first) = receiver.recv().await {
        let mut bytes = first.change.bytes();
        let mut jobs = vec![first];
        while jobs.len() < GROUP_MAX
            && bytes < GROUP_BYTES
            && let Ok(next) = receiver.try_recv()
        {
            bytes += next.change.bytes();
            jobs.push(next);
        }
        metrics::counter!("fieldline_postgres_change_groups_total").increment(1);
        metrics::counter!("fieldline_postgres_changes_total").increment(jobs.len() as u64);
        // A task of its own: were there a fault of ours in it, those after it are made all the same.
        let (pool, newest) = (Arc::clone(&pool), newest.clone());
        if let Err(error) = tokio::spawn(async move { serve(&pool, &newest, jobs).await }).await {
            tracing::error!(%error, "a group of changes of the registry ended badly");
        }
    }
}

/// A group whose commit was cut off: how to know whether it is there, and what is said if it is.
type Unknown = Option<(Mark, Answers)>;

/// Makes a group and answers each, in parts where something fails that only one may have caused.
async fn serve(pool: &Arc<Pool>, newest: &watch::Sender<u64>, jobs: Vec<Job>) {
    let mut groups = VecDeque::from([jobs]);
    while let Some(mut jobs) = groups.pop_front() {
        if let Some(fault) = whole(pool, newest, &mut jobs).await {
            if jobs.len() > 1 {
                tracing::warn!(%fault, changes = jobs.len(), "a group of changes is made in two");
                let rest = jobs.split_off(jobs.len() / 2);
                groups.push_front(rest);
                groups.push_front(jobs);
            } else {
                jobs.iter_mut().for_each(|job| job.answer(Err(fault.registry())));
            }
        }
    }
}

/// Tries a group until each is answered. A fault that trying again does not mend, and that one of them alone
/// may have caused, is returned: then none was made.
async fn whole(
    pool: &Arc<Pool>,
    newest: &watch::Sender<u64>,
    jobs: &mut Vec<Job>,
) -> Option<Fault> {
    let mut unknown: Unknown = None;
    loop {
        let fault = match attempt(pool, jobs, &mut unknown).await {
            Ok((answers, sequence)) => {
                if let Some(sequence) = sequence {
                    follow::tell(newest, sequence);
                }
                jobs.iter_mut().zip(answers).for_each(|(job, answer)| job.answer(answer));
                return None;
            }
            Err(Stop::Failed(fault)) => fault,
            Err(Stop::Unknown(fault, mark, answers)) => {
                unknown = Some((mark, answers));
                fault
            }
        };
        let verdict = fault.verdict();
        let passes = !matches!(verdict, Verdict::Final | Verdict::Full | Verdict::NoTable);
        let too_much = fault.is(&SqlState::QUERY_CANCELED) && jobs.len() > 1;
        if unknown.is_none() && (verdict == Verdict::Final || too_much) {
            return Some(fault);
        }
        let not_known = if unknown.is_some() {
            "; whether the change was made is not known: look before you repeat it"
        } else {
            ""
        };
        let now = Instant::now();
        let over = !passes || pool.is_closed();
        for job in jobs.iter_mut().filter(|job| over || job.until <= now) {
            job.answer(Err(unavailable(format!("{fault}{not_known}"))));
        }
        if unknown.is_none() {
            jobs.retain(|job| job.answer.is_some());
        }
        if jobs.iter().all(|job| job.answer.is_none()) {
            return None;
        }
        tracing::debug!(%fault, "changes of the registry are tried again");
        tokio::time::sleep(Duration::from_millis(50 + rand::random::<u64>() % 100)).await;
    }
}

async fn attempt(
    pool: &Arc<Pool>,
    jobs: &mut Vec<Job>,
    unknown: &mut Unknown,
) -> Result<(Answers, Option<u64>), Stop> {
    let limit = pool.servers.statement_timeout + Duration::from_secs(1);
    let lease = pool.take().await?;
    if let Some((mark, answers)) = unknown.take() {
        match crate::connect::within(limit, was_kept(&lease, &mark)).await {
            Ok(true) => {
                lease.give_back();
                return Ok((answers, Some(mark.sequence())));
            }
            Ok(false) => jobs.retain(|job| job.answer.is_some()),
            Err(fault) => return Err(Stop::Unknown(fault, mark, answers)),
        }
    }
    let changes: Vec<&Change> = jobs.iter().map(|job| &job.change).collect();
    let done = write::make(&lease, &changes, limit).await?;
    lease.give_back();
    Ok(done)
}
