//! What waits for the broker: bounded in items and bytes, numbered, in order for each account.
//!
//! Accounts take turns, a payload each, so that one that publishes much does not keep another waiting. When all is full
//! the oldest of the account that has most is dropped.

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
    /// The accounts that have something waiting, in the order of their turns.
    turns: VecDeque<AccountId>,
    items: usize,
    bytes: usize,
    dropped: u64,
    /// Items that were sent and are not done with.
    sent: u64,
    /// One entry for each account that ever published here.
    accounts: HashMap<AccountId, Lane>,
}

/// What waits of one account, and how far it came.
struct Lane {
    batches: VecDeque<(Batch, u64)>,
    items: usize,
    bytes: usize,
    /// Number of the next item that is published.
    next: u64,
    /// Number of the next item that is sent.
    sent: u64,
    /// What others were told to expect next.
    told: u64,
    at: Instant,
}

impl Lane {
    fn new() -> Self {
        let (batches, at) = (VecDeque::new(), Instant::now());
        Self { batches, items: 0, bytes: 0, next: 1, sent: 1, told: 1, at }
    }

    fn push(&mut self, batch: Batch, sequence: u64) {
        self.items += usize::from(batch.count);
        self.bytes += batch.len() + OVERHEAD_BYTES;
        self.batches.push_back((batch, sequence));
    }

    fn pop(&mut self) -> Option<(Batch, u64)> {
        let (batch, sequence) = self.batches.pop_front()?;
        self.items -= usize::from(batch.count);
        self.bytes -= batch.len() + OVERHEAD_BYTES;
        if self.batches.is_empty() {
            // An account that once had much waiting does not keep the room.
            self.batches = VecDeque::new();
        }
        Some((batch, sequence))
    }
}

impl Waiting {
    /// The next batch of an account.
    fn take(&mut self, account: AccountId) -> Option<(Batch, u64)> {
        let (batch, sequence) = self.accounts.get_mut(&account)?.pop()?;
        self.items -= usize::from(batch.count);
        self.bytes -= batch.len() + OVERHEAD_BYTES;
        Some((batch, sequence))
    }

    /// Drops the oldest of the account that has most of what there is too much of; returns the items.
    fn drop_oldest(&mut self, by_bytes: bool) -> Option<u64> {
        let lanes = self.turns.iter().filter_map(|one| Some((one, self.accounts.get(one)?)));
        let most = lanes.max_by_key(|(_, lane)| if by_bytes { lane.bytes } else { lane.items });
        let account = *most?.0;
        let (batch, _) = self.take(account)?;
        if self.accounts.get(&account).is_none_or(|lane| lane.batches.is_empty()) {
            self.turns.retain(|one| *one != account);
        }
        Some(u64::from(batch.count))
    }
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
            let lane = waiting.accounts.entry(account).or_insert_with(Lane::new);
            lane.at = Instant::now();
            let (was_empty, items, bytes) = (lane.batches.is_empty(), lane.items, lane.bytes);
            for batch in batches {
                let sequence = lane.next;
                lane.next += u64::from(batch.count);
                lane.push(batch, sequence);
            }
            waiting.items += lane.items - items;
            waiting.bytes += lane.bytes - bytes;
            if was_empty && !lane.batches.is_empty() {
                waiting.turns.push_back(account);
            }
            while waiting.items > self.items_max || waiting.bytes > self.bytes_max {
                let by_bytes = waiting.bytes > self.bytes_max;
                let Some(items) = waiting.drop_oldest(by_bytes) else { break };
                dropped += items;
            }
            waiting.dropped += dropped;
            self.metrics.waiting(waiting.items, waiting.bytes);
        }
        if dropped > 0 {
            self.metrics.dropped_full.increment(dropped);
        }
        self.wake.notify_one();
    }

    /// The oldest that waits of the account whose turn it is. What was dropped before it is said in it.
    pub(crate) fn pop(&self) -> Option<Ready> {
        let (batch, sequence, missed) = {
            let mut waiting = self.waiting.lock();
            let waiting = &mut *waiting;
            let account = waiting.turns.pop_front()?;
            let (batch, sequence) = waiting.take(account)?;
            let lane = waiting.accounts.get_mut(&account)?;
            if !lane.batches.is_empty() {
                waiting.turns.push_back(account);
            }
            let missed = u32::try_from(sequence - lane.sent).unwrap_or(u32::MAX);
            lane.sent = sequence + u64::from(batch.count);
            waiting.sent += u64::from(batch.count);
            self.metrics.waiting(waiting.items, waiting.bytes);
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
        let waiting = &mut *waiting;
        if !waiting.turns.is_empty() {
            return;
        }
        for (account, lane) in &mut waiting.accounts {
            if lane.told != lane.next && lane.at.elapsed() >= MARK_AFTER {
                lane.told = lane.next;
                let mark = Batch::mark(*account, Uuid::from_u64_pair(0, self.publisher));
                waiting.bytes += mark.len() + OVERHEAD_BYTES;
                lane.push(mark, lane.next);
                waiting.turns.push_back(*account);
            }
        }
    }

    /// How much there is of what.
    pub(crate) fn depth(&self) -> Depth {
        let Waiting { items, bytes, dropped, sent, .. } = *self.waiting.lock();
        Depth { items, bytes, sent, dropped }
    }
}

#[cfg(test)]
mod tests {
    use fieldline_contracts::{BusItem, ClientMessage};

    use super::*;
    use crate::encoding::encode;

    fn batches(account: AccountId, count: usize, bytes: usize) -> Vec<Batch> {
        let one = || {
            BusItem::Client(std::sync::Arc::new(ClientMessage {
                origin: 1,
                topic: "client/a".into(),
                payload: vec![0; bytes].into(),
                props: bytes::Bytes::new(),
                at_least_once: true,
                retain: false,
                expires_at: None,
            }))
        };
        (0..count).flat_map(|_| encode(account, &[one()])).collect()
    }

    fn sequence(ready: &Ready) -> u64 {
        crate::encoding::open(ready.about, &ready.payload).unwrap().0.sequence
    }

    /// A flood of one account keeps another waiting for a payload, not for all of it; and only its own are dropped.
    #[test]
    fn one_account_delays_no_other_and_loses_its_own_alone() {
        let (flood, quiet) = (AccountId::from_bytes([1; 16]), AccountId::from_bytes([2; 16]));
        let queue = Queue::new(1_000, 1 << 20, 7, Metrics::new());
        queue.push(flood, batches(flood, 900, 10));
        queue.push(quiet, batches(quiet, 3, 10));
        queue.push(flood, batches(flood, 900, 10));
        let Depth { items, dropped, .. } = queue.depth();
        assert_eq!((items, dropped), (1_000, 803));
        let mut order = Vec::new();
        for _ in 0..6 {
            let ready = queue.pop().unwrap();
            order.push((ready.about.account, sequence(&ready)));
        }
        assert_eq!(
            order,
            [(flood, 804), (quiet, 1), (flood, 805), (quiet, 2), (flood, 806), (quiet, 3)]
        );
        // By bytes as well: the small ones stay.
        queue.push(quiet, batches(quiet, 1, 10));
        queue.push(flood, batches(flood, 40, 60_000));
        let mut kept = Vec::new();
        while let Some(ready) = queue.pop() {
            kept.push((ready.about.account, sequence(&ready)));
        }
        assert!(kept.contains(&(quiet, 4)), "{kept:?}");
        assert_eq!(kept.last(), Some(&(flood, 1_840)), "the newest stay");
        let Depth { items, bytes, .. } = queue.depth();
        assert_eq!((items, bytes), (0, 0));
    }
}
