//! The queue in front of a writer: bounded by bytes, taken whole.

use std::collections::VecDeque;
use std::time::Duration;

use fieldline_contracts::HistoryError;
use fieldline_model::{Accepted, Receipt};
use parking_lot::{Condvar, Mutex};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

/// Messages of one append, and who waits for them.
pub(crate) struct Job {
    pub(crate) messages: Vec<Accepted>,
    pub(crate) reply: oneshot::Sender<Answer>,
    /// Room in the queue; free again when the writer has taken the job on.
    pub(crate) room: OwnedSemaphorePermit,
}

/// What became of a job. The messages go back to be freed by the thread that made them: the
/// writer, which all wait for, would spend more time on that than on writing.
pub(crate) struct Answer {
    pub(crate) receipts: Result<Vec<Receipt>, HistoryError>,
    pub(crate) messages: Vec<Accepted>,
}

impl Job {
    pub(crate) fn answer(self, receipts: Result<Vec<Receipt>, HistoryError>) {
        let Self { messages, reply, room } = self;
        drop(room);
        // The caller may have gone; its messages are durable all the same.
        drop(reply.send(Answer { receipts, messages }));
    }
}

/// What a writer is asked for.
pub(crate) enum Work {
    /// Write these.
    Jobs(Vec<Job>),
    /// Freeze the memtable, then answer all of these whether it could be.
    Freeze(Vec<oneshot::Sender<bool>>),
    /// Nothing more will come.
    End,
}

#[derive(Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    freezes: VecDeque<oneshot::Sender<bool>>,
    messages: usize,
    /// Whether a freeze was taken last: then jobs have their turn.
    froze: bool,
    closed: bool,
}

/// Its bound is the semaphore whose permits the jobs hold; the queue itself never refuses.
#[derive(Default)]
pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    filled: Condvar,
}

impl Queue {
    /// Adds a job, or gives it back after [`Queue::close`].
    pub(crate) fn push(&self, job: Job) -> Result<(), Job> {
        let mut waiting = self.waiting.lock();
        if waiting.closed {
            return Err(job);
        }
        waiting.messages += job.messages.len();
        waiting.jobs.push_back(job);
        drop(waiting);
        self.filled.notify_one();
        Ok(())
    }

    /// Asks for a freeze; dropped, and so answered, when the queue is closed.
    pub(crate) fn freeze(&self, reply: oneshot::Sender<bool>) {
        let mut waiting = self.waiting.lock();
        if !waiting.closed {
            waiting.freezes.push_back(reply);
            drop(waiting);
            self.filled.notify_one();
        }
    }

    /// Refuses what comes later; what waits is still written.
    pub(crate) fn close(&self) {
        self.waiting.lock().closed = true;
        self.filled.notify_all();
    }

    /// Refuses what comes later and what waits: nobody is there to take it.
    pub(crate) fn abandon(&self) {
        let mut waiting = self.waiting.lock();
        waiting.closed = true;
        waiting.jobs.clear();
        waiting.freezes.clear();
        waiting.messages = 0;
    }

    /// Messages that wait.
    pub(crate) fn depth(&self) -> usize {
        self.waiting.lock().messages
    }

    /// Waits for work; takes all that is there, up to `messages_max` or one job. Freezes
    /// and jobs take turns where both wait, so that neither starves.
    pub(crate) fn take(&self, messages_max: usize) -> Work {
        let mut waiting = self.waiting.lock();
        loop {
            let freezes = !waiting.freezes.is_empty();
            if freezes && (!waiting.froze || waiting.jobs.is_empty()) {
                waiting.froze = true;
                return Work::Freeze(waiting.freezes.drain(..).collect());
            }
            if !waiting.jobs.is_empty() {
                waiting.froze = false;
                let mut jobs = Vec::new();
                let mut count = 0;
                while let Some(job) = waiting.jobs.front() {
                    if count > 0 && count + job.messages.len() > messages_max {
                        break;
                    }
                    count += job.messages.len();
                    jobs.extend(waiting.jobs.pop_front());
                }
                waiting.messages -= count;
                return Work::Jobs(jobs);
            }
            if waiting.closed {
                return Work::End;
            }
            self.filled.wait_for(&mut waiting, Duration::from_secs(60));
        }
    }
}
