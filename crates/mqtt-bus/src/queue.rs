//! What waits for the broker: bounded in items and bytes, in order, numbered. When it is full the oldest is dropped.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use fieldline_model::AccountId;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use crate::Depth;
use crate::encoding::Batch;
use crate::metrics::Metrics;

/// How long nothing of an account is published until others are told how far it came.
const MARK_AFTER: Duration = Duration::from_secs(1);
/// What a batch takes beside its payload.
const OVERHEAD_BYTES: usize = 128;

pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    /// Told of every batch that comes.
    pub(crate) wake: Notify,
    items_max: usize,
    bytes_max: usize,
    publisher: u64,
    metrics: Metrics,
}

#[derive(Default)]
struct Waiting {
    batches: VecDeque<(Batch, u64)>,
    items: usize,
    bytes: usize,
    dropped: u64,
    /// Items that were sent and are not done with.
    sent: u64,
    /// How far each account came: one entry for each that ever published here.
    accounts: HashMap<AccountId, Numbers>,
}

struct Numbers {
    /// Of the next item that is published.
    next: u64,
    /// Of the next item that is sent.
    sent: u64,
    /// What others were told to expect next.
    told: u64,
    at: Instant,
}

/// A payload that is ready to be sent.
pub(crate) struct Ready {
    pub(crate) about: crate::encoding::About,
    pub(crate) payload: Vec<u8>,
    pub(crate) items: u64,
}

impl Queue {
    pub(crate) fn new(
        items_max: usize,
        bytes_max: usize,
        publisher: u64,
        metrics: Metrics,
    ) -> Self {
        let (waiting, wake) = (Mutex::default(), Notify::new());
        Self { waiting, wake, items_max, bytes_max, publisher, metrics }
    }

    /// Numbers batches of an account and keeps them until they are sent. Never waits.
    pub(crate) fn push(&self, account: AccountId, batches: Vec<Batch>) {
        let mut dropped = 0;
        {
            let mut waiting = self.waiting.lock();
            let waiting = &mut *waiting;
            let new = || Numbers { next: 1, sent: 1, told: 1, at: Instant::now() };
            let numbers = waiting.accounts.entry(account).or_insert_with(new);
            numbers.at = Instant::now();
            for batch in batches {
                let sequence = numbers.next;
                numbers.next += u64::from(batch.count);
                waiting.items += usize::from(batch.count);
                waiting.bytes += batch.len() + OVERHEAD_BYTES;
                waiting.batches.push_back((batch, sequence));
            }
            while waiting.items > self.items_max || waiting.bytes > self.bytes_max {
                let Some((batch, _)) = waiting.batches.pop_front() else { break };
                waiting.items -= usize::from(batch.count);
                waiting.bytes -= batch.len() + OVERHEAD_BYTES;
                dropped += u64::from(batch.count);
            }
            waiting.dropped += dropped;
            self.metrics.waiting(waiting.items, waiting.bytes);
        }
        if dropped > 0 {
            self.metrics.dropped_full.increment(dropped);
        }
        self.wake.notify_one();
    }

    /// The oldest that waits. What was dropped before it is said in it.
    pub(crate) fn pop(&self) -> Option<Ready> {
        let (batch, sequence, missed) = {
            let mut waiting = self.waiting.lock();
            let (batch, sequence) = waiting.batches.pop_front()?;
            waiting.items -= usize::from(batch.count);
            waiting.bytes -= batch.len() + OVERHEAD_BYTES;
            self.metrics.waiting(waiting.items, waiting.bytes);
            let numbers = waiting.accounts.get_mut(&batch.about.account)?;
            let missed = u32::try_from(sequence - numbers.sent).unwrap_or(u32::MAX);
            numbers.sent = sequence + u64::from(batch.count);
            waiting.sent += u64::from(batch.count);
            (batch, sequence, missed)
        };
        let (about, items) = (batch.about, u64::from(batch.count));
        Some(Ready { about, payload: batch.seal(self.publisher, sequence, missed), items })
    }

    /// Items of [`Queue::pop`] were acknowledged or dropped.
    pub(crate) fn done(&self, items: u64) {
        self.waiting.lock().sent -= items;
    }

    /// Adds a mark for each account that fell silent: what it lost at its end is noticed by it. Only while all else was
    /// sent.
    pub(crate) fn mark(&self) {
        let mut waiting = self.waiting.lock();
        if !waiting.batches.is_empty() {
            return;
        }
        let waiting = &mut *waiting;
        for (account, numbers) in &mut waiting.accounts {
            if numbers.told != numbers.next && numbers.at.elapsed() >= MARK_AFTER {
                numbers.told = numbers.next;
                let mark = Batch::mark(*account, Uuid::from_u64_pair(0, self.publisher));
                waiting.bytes += mark.len() + OVERHEAD_BYTES;
                waiting.batches.push_back((mark, numbers.next));
            }
        }
    }

    /// How much there is of what.
    pub(crate) fn depth(&self) -> Depth {
        let Waiting { items, bytes, dropped, sent, .. } = *self.waiting.lock();
        Depth { items, bytes, sent, dropped }
    }
}
