//! `State`: what is known of each device now.

use std::collections::{BTreeMap, HashMap};

use async_trait::async_trait;
use fieldline_model::{
    AccountId, ConnectionId, DeviceId, ParamName, SeriesKind, Stored, Timestamp, Value,
};
use parking_lot::RwLock;

/// The newest value of a parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct LastValue {
    /// The value.
    pub value: Value,
    /// The timestamp of the message that brought it.
    pub timestamp: Timestamp,
}

/// Whether a device is connected.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Presence {
    /// Its connection, if it has one.
    pub connection: Option<ConnectionId>,
    /// The address of its connection, present or last.
    pub peer: Option<String>,
    /// When it last connected or disconnected.
    pub changed_at: Option<Timestamp>,
    /// When its last message was received.
    pub seen_at: Option<Timestamp>,
}

/// Holds last values and presence. Values of one device never go back in time.
#[async_trait]
pub trait State: Send + Sync + 'static {
    /// Takes over the values of `messages`; for each parameter the newest
    /// timestamp wins, and of equal ones the later message. Other series than
    /// messages are passed over. Returns those that did change something.
    async fn apply(&self, messages: &[Stored]) -> Vec<(AccountId, DeviceId, Vec<ParamName>)>;

    /// The last values of a device, by name.
    async fn get(&self, account: AccountId, device: DeviceId) -> BTreeMap<ParamName, LastValue>;

    /// One last value of a device.
    async fn value(&self, account: AccountId, device: DeviceId, param: &str) -> Option<LastValue> {
        self.get(account, device).await.remove(param)
    }

    /// The last values of several devices at once; only `params` if any are named.
    async fn get_many(
        &self,
        account: AccountId,
        devices: &[DeviceId],
        params: &[ParamName],
    ) -> Vec<(DeviceId, BTreeMap<ParamName, LastValue>)>;

    /// Sets one value, at the rebuild from history.
    fn restore(
        &self,
        account: AccountId,
        device: DeviceId,
        name: &ParamName,
        value: &Value,
        timestamp: Timestamp,
    );

    /// Notes that a device connected. The newest connection wins.
    async fn connected(
        &self,
        account: AccountId,
        device: DeviceId,
        connection: ConnectionId,
        peer: String,
        at: Timestamp,
    );

    /// Notes that a connection ended; nothing if another has taken its place.
    /// Returns whether the device is now offline.
    async fn disconnected(
        &self,
        account: AccountId,
        device: DeviceId,
        connection: ConnectionId,
        at: Timestamp,
    ) -> bool;

    /// Whether a device is connected.
    async fn presence(&self, account: AccountId, device: DeviceId) -> Presence;

    /// Presence of several devices at once.
    async fn presence_many(
        &self,
        account: AccountId,
        devices: &[DeviceId],
    ) -> Vec<(DeviceId, Presence)>;

    /// Forgets a device.
    async fn forget(&self, account: AccountId, device: DeviceId);
}

/// Most bytes of names and contents of one device's last values. A value that
/// does not fit is in history only. Backends and the store's own summary of
/// last values keep the same bound.
pub const DEVICE_BYTES_MAX: usize = 256 << 10;

#[derive(Default)]
struct DeviceState {
    values: BTreeMap<ParamName, LastValue>,
    bytes: usize,
    presence: Presence,
}

/// Bytes that a value counts for.
fn cost(name: &ParamName, value: &Value) -> usize {
    name.as_str().len() + 16 + value.heap_bytes()
}

impl DeviceState {
    /// Takes a value over; false if the present one is newer or it does not fit.
    /// One that does not fit takes the one before it away: absent is not wrong, old is.
    fn set(&mut self, name: &ParamName, value: &Value, timestamp: Timestamp) -> bool {
        let before = match self.values.get(name) {
            Some(last) if last.timestamp > timestamp => return false,
            Some(last) => cost(name, &last.value),
            None => 0,
        };
        let after = self.bytes - before + cost(name, value);
        let fits = after <= DEVICE_BYTES_MAX
            && (before > 0 || self.values.len() < MemoryState::PARAMS_MAX);
        if !fits {
            if self.values.remove(name).is_some() {
                self.bytes -= before;
            }
            return false;
        }
        self.bytes = after;
        let last = LastValue { value: value.clone(), timestamp };
        match self.values.get_mut(name) {
            Some(slot) => *slot = last,
            None => {
                self.values.insert(name.clone(), last);
            }
        }
        true
    }
}

type Shard = HashMap<(AccountId, DeviceId), DeviceState>;

/// State in memory; rebuilt from history at start.
pub struct MemoryState {
    shards: Vec<RwLock<Shard>>,
}

impl MemoryState {
    /// Most parameters of one device; further names are in history only.
    pub const PARAMS_MAX: usize = 4_096;

    /// An empty state.
    #[must_use]
    pub fn new() -> Self {
        Self { shards: (0..64).map(|_| RwLock::default()).collect() }
    }

    fn shard(&self, device: DeviceId) -> &RwLock<Shard> {
        // The last byte of a version 7 id is random.
        let at = usize::from(device.as_bytes()[15]) % self.shards.len();
        #[allow(clippy::indexing_slicing, reason = "at is below the length")]
        &self.shards[at]
    }
}

impl Default for MemoryState {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl State for MemoryState {
    async fn apply(&self, messages: &[Stored]) -> Vec<(AccountId, DeviceId, Vec<ParamName>)> {
        let mut changes = Vec::new();
        for message in messages.iter().filter(|m| m.series().kind == SeriesKind::Message) {
            let (account, device) = (message.series().account, DeviceId(message.series().object));
            let mut shard = self.shard(device).write();
            let state = shard.entry((account, device)).or_default();
            state.presence.seen_at = state.presence.seen_at.max(Some(message.received()));
            let set = |(name, value): &(ParamName, Value)| {
                state.set(name, value, message.timestamp()).then(|| name.clone())
            };
            let changed: Vec<ParamName> = message.params().iter().filter_map(set).collect();
            if !changed.is_empty() {
                changes.push((account, device, changed));
            }
        }
        changes
    }

    async fn get(&self, account: AccountId, device: DeviceId) -> BTreeMap<ParamName, LastValue> {
        let shard = self.shard(device).read();
        shard.get(&(account, device)).map(|state| state.values.clone()).unwrap_or_default()
    }

    async fn value(&self, account: AccountId, device: DeviceId, param: &str) -> Option<LastValue> {
        self.shard(device).read().get(&(account, device))?.values.get(param).cloned()
    }

    async fn get_many(
        &self,
        account: AccountId,
        devices: &[DeviceId],
        params: &[ParamName],
    ) -> Vec<(DeviceId, BTreeMap<ParamName, LastValue>)> {
        let read = |device: &DeviceId| {
            let shard = self.shard(*device).read();
            let Some(state) = shard.get(&(account, *device)) else {
                return (*device, BTreeMap::new());
            };
            if params.is_empty() {
                return (*device, state.values.clone());
            }
            let wanted =
                params.iter().filter_map(|n| Some((n.clone(), state.values.get(n)?.clone())));
            (*device, wanted.collect())
        };
        devices.iter().map(read).collect()
    }

    fn restore(
        &self,
        account: AccountId,
        device: DeviceId,
        name: &ParamName,
        value: &Value,
        timestamp: Timestamp,
    ) {
        let mut shard = self.shard(device).write();
        let state = shard.entry((account, device)).or_default();
        state.set(name, value, timestamp);
        state.presence.seen_at = state.presence.seen_at.max(Some(timestamp));
    }

    async fn connected(
        &self,
        account: AccountId,
        device: DeviceId,
        connection: ConnectionId,
        peer: String,
        at: Timestamp,
    ) {
        let mut shard = self.shard(device).write();
        let presence = &mut shard.entry((account, device)).or_default().presence;
        presence.connection = Some(connection);
        presence.peer = Some(peer);
        presence.changed_at = Some(at);
    }

    async fn disconnected(
        &self,
        account: AccountId,
        device: DeviceId,
        connection: ConnectionId,
        at: Timestamp,
    ) -> bool {
        let mut shard = self.shard(device).write();
        match shard.get_mut(&(account, device)) {
            Some(state) if state.presence.connection == Some(connection) => {
                state.presence.connection = None;
                state.presence.changed_at = Some(at);
                true
            }
            _ => false,
        }
    }

    async fn presence(&self, account: AccountId, device: DeviceId) -> Presence {
        let shard = self.shard(device).read();
        shard.get(&(account, device)).map(|state| state.presence.clone()).unwrap_or_default()
    }

    async fn presence_many(
        &self,
        account: AccountId,
        devices: &[DeviceId],
    ) -> Vec<(DeviceId, Presence)> {
        let read = |device: &DeviceId| {
            let shard = self.shard(*device).read();
            let presence = shard.get(&(account, *device)).map(|state| state.presence.clone());
            (*device, presence.unwrap_or_default())
        };
        devices.iter().map(read).collect()
    }

    async fn forget(&self, account: AccountId, device: DeviceId) {
        self.shard(device).write().remove(&(account, device));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a device says is bounded in count by names, and in bytes by this: it
    /// must not be able to fill our memory with values that nobody asked for.
    #[test]
    fn last_values_have_a_bound_in_bytes() {
        let name = |n: usize| ParamName::new(format!("p{n}")).unwrap();
        let large = Value::from("x".repeat(60 << 10));
        let mut state = DeviceState::default();
        let at = Timestamp::from_seconds;
        let taken = (0..10).filter(|n| state.set(&name(*n), &large, at(1))).count();
        assert_eq!(taken, 4);
        assert!(state.bytes <= DEVICE_BYTES_MAX);
        // One that grew out of its place is absent, not old.
        let larger = Value::from("x".repeat(200 << 10));
        assert!(!state.set(&name(0), &larger, at(2)));
        assert!(!state.values.contains_key(&name(0)));
        assert!(state.set(&name(0), &Value::Int(1), at(3)));
        let counted: usize = state.values.iter().map(|(n, last)| cost(n, &last.value)).sum();
        assert_eq!(state.bytes, counted);
    }
}
