//! What could not be written and waits until it can: bounded, and counted.

use std::collections::{HashMap, VecDeque};

use fieldline_model::{AccountId, ConnectionId, DeviceId, Stored, Timestamp};

/// Devices to forget that are remembered while the server is away; their keys stay beyond it.
const FORGET_MAX: usize = 100_000;

/// Messages and forgotten devices, in the order they came.
#[derive(Default)]
pub(crate) struct Waiting {
    messages: VecDeque<Stored>,
    bytes: usize,
    forgotten: Vec<(AccountId, DeviceId)>,
    /// How often messages were dropped, and how many of those times the server was told: last values are to
    /// be read from history.
    losses: u64,
    told: u64,
    /// None is kept, since all are to be read from history anyway.
    dropping: bool,
}

fn bytes_of(message: &Stored) -> usize {
    256 + message.params().content_bytes() + 48 * message.params().len()
}

impl Waiting {
    /// Keeps `messages`. Once there are too many, none is kept until it is told that all are to be read from
    /// history.
    pub(crate) fn keep(&mut self, messages: &[Stored], bytes_max: usize) {
        if self.dropping {
            return;
        }
        self.bytes += messages.iter().map(bytes_of).sum::<usize>();
        self.messages.extend(messages.iter().cloned());
        if self.bytes > bytes_max {
            self.messages = VecDeque::new();
            self.bytes = 0;
            self.losses += 1;
            self.dropping = true;
        }
        self.measure();
    }

    /// Whether there was a loss that the server does not know of.
    pub(crate) const fn overflowed(&self) -> bool {
        self.losses > self.told
    }

    /// Keeps again what comes, and returns the losses that are to be told, if there are any.
    pub(crate) fn begin_to_tell(&mut self) -> Option<u64> {
        self.dropping = false;
        self.overflowed().then_some(self.losses)
    }

    /// The server knows of these losses.
    pub(crate) fn told(&mut self, losses: u64) {
        self.told = losses;
    }

    pub(crate) fn keep_forgotten(&mut self, account: AccountId, device: DeviceId) {
        if self.forgotten.len() < FORGET_MAX {
            self.forgotten.push((account, device));
        }
    }

    /// Up to `count` of the oldest messages. They stay until [`Waiting::written`].
    pub(crate) fn oldest(&self, count: usize) -> Vec<Stored> {
        self.messages.iter().take(count).cloned().collect()
    }

    /// Lets go of the `count` oldest messages: they were written.
    pub(crate) fn written(&mut self, count: usize) {
        let taken: Vec<Stored> = self.messages.drain(..count.min(self.messages.len())).collect();
        self.bytes = self.bytes.saturating_sub(taken.iter().map(bytes_of).sum());
        if self.messages.is_empty() {
            self.messages = VecDeque::new();
        }
        self.measure();
    }

    pub(crate) fn take_forgotten(&mut self) -> Vec<(AccountId, DeviceId)> {
        std::mem::take(&mut self.forgotten)
    }

    pub(crate) fn put_back_forgotten(&mut self, mut devices: Vec<(AccountId, DeviceId)>) {
        devices.append(&mut self.forgotten);
        devices.truncate(FORGET_MAX);
        self.forgotten = devices;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.messages.is_empty() && self.forgotten.is_empty() && !self.overflowed()
    }

    /// Messages and bytes.
    pub(crate) fn len(&self) -> (usize, usize) {
        (self.messages.len(), self.bytes)
    }

    fn measure(&self) {
        metrics::gauge!("fieldline_redis_waiting_messages").set(self.messages.len() as f64);
        metrics::gauge!("fieldline_redis_waiting_bytes").set(self.bytes as f64);
    }
}

/// A connection that this node holds, or held and has not told the end of.
#[derive(Clone)]
pub(crate) struct Held {
    pub(crate) connection: ConnectionId,
    pub(crate) epoch: u64,
    pub(crate) peer: String,
    pub(crate) at: Timestamp,
    /// Since when it is over.
    pub(crate) ended_at: Option<Timestamp>,
    /// Whether Redis knows this.
    pub(crate) told: bool,
}

/// The connections of this node: what it says again to a server that lost its memory. Bounded by
/// the connections of a node, and by the ends it can meet while the server is away.
#[derive(Default)]
pub(crate) struct HeldConnections {
    held: HashMap<(AccountId, DeviceId), Held>,
    untold: usize,
}

/// Most ends of connections that wait to be told. Beyond it they are dropped: the devices count as
/// connected until they connect again or this node ends.
const ENDED_MAX: usize = 1_000_000;

impl HeldConnections {
    pub(crate) fn put(&mut self, account: AccountId, device: DeviceId, held: Held) {
        if held.ended_at.is_some() && self.untold >= ENDED_MAX {
            self.remove(account, device, held.epoch);
            return;
        }
        self.untold += usize::from(!held.told);
        if let Some(before) = self.held.insert((account, device), held) {
            self.untold -= usize::from(!before.told);
        }
    }

    pub(crate) fn get(&self, account: AccountId, device: DeviceId) -> Option<&Held> {
        self.held.get(&(account, device))
    }

    /// Notes that Redis took it over; one that is over is not needed any more.
    pub(crate) fn told(&mut self, account: AccountId, device: DeviceId, told: &Held) {
        let Some(held) = self.held.get_mut(&(account, device)) else { return };
        if held.epoch != told.epoch || held.ended_at != told.ended_at {
            return;
        }
        self.untold -= usize::from(!held.told);
        held.told = true;
        if held.ended_at.is_some() {
            self.held.remove(&(account, device));
        }
    }

    /// Drops it if it is of `epoch`: another connection is known to be newer.
    pub(crate) fn remove(&mut self, account: AccountId, device: DeviceId, epoch: u64) {
        let known = self.held.get(&(account, device)).filter(|held| held.epoch == epoch);
        if let Some(held) = known {
            self.untold -= usize::from(!held.told);
            self.held.remove(&(account, device));
        }
    }

    /// All are to be told again.
    pub(crate) fn forget_told(&mut self) {
        self.held.values_mut().for_each(|held| held.told = false);
        self.untold = self.held.len();
    }

    /// Up to `count` that were not told.
    pub(crate) fn untold(&self, count: usize) -> Vec<(AccountId, DeviceId, Held)> {
        if self.untold == 0 {
            return Vec::new();
        }
        let untold = self.held.iter().filter(|(_, held)| !held.told).take(count);
        untold.map(|((account, device), held)| (*account, *device, held.clone())).collect()
    }

    pub(crate) fn is_told(&self) -> bool {
        self.untold == 0
    }
}

#[cfg(test)]
mod tests {
    use fieldline_model::{Cursor, ParamName, Params, Series, Value};

    use super::*;

    fn message(bytes: usize) -> Stored {
        let series =
            Series::messages(AccountId::from_bytes([1; 16]), DeviceId::from_bytes([2; 16]));
        let name = ParamName::new("large").unwrap();
        let params: Params = [(name, Value::from("x".repeat(bytes)))].into_iter().collect();
        let at = Timestamp::from_seconds(1);
        Stored::read_back(series, at, at, params, Cursor::default())
    }

    /// A server that is away for days must not take our memory with it.
    #[test]
    fn what_waits_is_bounded_in_bytes() {
        let mut waiting = Waiting::default();
        for _ in 0..10 {
            waiting.keep(&[message(60_000)], 1 << 20);
        }
        assert_eq!(waiting.len().0, 10);
        for _ in 0..100 {
            waiting.keep(&[message(60_000)], 1 << 20);
            assert!(waiting.len().1 <= 1 << 20);
        }
        assert!(waiting.overflowed() && waiting.len() == (0, 0));
    }

    /// History is read from when the loss is told on, at the earliest: what comes meanwhile is kept.
    #[test]
    fn what_comes_while_a_loss_is_told_is_kept() {
        let mut waiting = Waiting::default();
        waiting.keep(&[message(2 << 20)], 1 << 20);
        assert!(waiting.overflowed());
        let losses = waiting.begin_to_tell().unwrap();
        waiting.keep(&[message(1)], 1 << 20);
        assert_eq!(waiting.len().0, 1);
        // Another loss before the first was told is told anew.
        waiting.keep(&[message(2 << 20)], 1 << 20);
        waiting.told(losses);
        assert!(waiting.overflowed() && waiting.len().0 == 0);
        let losses = waiting.begin_to_tell().unwrap();
        waiting.told(losses);
        assert!(!waiting.overflowed() && waiting.is_empty());
    }

    #[test]
    fn what_was_written_is_let_go_of_in_order() {
        let mut waiting = Waiting::default();
        waiting.keep(&[message(1), message(2), message(3)], 1 << 20);
        assert_eq!(waiting.oldest(2).len(), 2);
        waiting.written(2);
        assert_eq!(waiting.oldest(9), [message(3)]);
        waiting.written(1);
        assert!(waiting.is_empty() && waiting.len() == (0, 0));
    }

    #[test]
    fn connections_are_told_once_and_again_after_a_loss() {
        let (account, device) = (AccountId::from_bytes([1; 16]), DeviceId::from_bytes([2; 16]));
        let at = Timestamp::from_seconds(1);
        let connection = ConnectionId::from_bytes([3; 16]);
        let held = |epoch, ended_at| {
            let peer = String::new();
            Held { connection, epoch, peer, at, ended_at, told: false }
        };
        let mut all = HeldConnections::default();
        all.put(account, device, held(1, None));
        let untold = all.untold(9);
        assert_eq!(untold.len(), 1);
        // It ended while its beginning was being told.
        all.put(account, device, held(1, Some(at)));
        all.told(account, device, &untold[0].2);
        assert!(!all.is_told());
        let untold = all.untold(9);
        all.told(account, device, &untold[0].2);
        assert!(all.is_told() && all.get(account, device).is_none());
        all.put(account, device, held(2, None));
        let untold = all.untold(9);
        all.told(account, device, &untold[0].2);
        assert!(all.is_told());
        all.forget_told();
        assert_eq!(all.untold(9).len(), 1);
    }
}
