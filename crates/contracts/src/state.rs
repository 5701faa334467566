//! `State`: what is known of each device now.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use fieldline_model::{
    AccountId, ConnectionId, DeviceId, ParamName, Series, SeriesKind, Stored, Timestamp, Value,
};
use parking_lot::RwLock;

use crate::status::{Status, StatusFilter, StatusTable, StatusWatch};
use crate::{History, HistoryError};

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
    /// Orders its connections, present or last.
    pub epoch: u64,
    /// The node that holds or held its connection; `None` where there is but one.
    pub node: Option<String>,
    /// The address of its connection, present or last.
    pub peer: Option<String>,
    /// When it last connected or disconnected.
    pub changed_at: Option<Timestamp>,
    /// When its last message was received.
    pub seen_at: Option<Timestamp>,
}

/// Who holds a connected device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The node; `None` where there is but one.
    pub node: Option<String>,
    /// Its connection there.
    pub connection: ConnectionId,
    /// Orders the device's connections: what belongs to an older one is over.
    pub epoch: u64,
}

impl Presence {
    /// The session directory: which node holds the device, if it is connected.
    #[must_use]
    pub fn session(&self) -> Option<Session> {
        let connection = self.connection?;
        Some(Session { node: self.node.clone(), connection, epoch: self.epoch })
    }
}

/// A session that nobody tells the end of: the process that took it is gone, as far as the state knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostSession {
    /// Whose device.
    pub account: AccountId,
    /// The device.
    pub device: DeviceId,
    /// Its connection.
    pub connection: ConnectionId,
    /// Orders it among the device's connections.
    pub epoch: u64,
    /// The node that held it.
    pub node: String,
    /// The process of that node.
    pub process: String,
    /// The address that it came from.
    pub peer: String,
    /// Whether another process has the node's name by now, so that the one that took it will not come back.
    pub replaced: bool,
}

/// Why the state refused or could not be asked. A variant exists only where a caller acts differently.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// It cannot be reached, or does not hold the truth yet. The same call may succeed later. What
    /// was to be written is made good by the backend itself once it is back.
    #[error("last values are not available: {0}")]
    Unavailable(String),
    /// A newer epoch has written: the caller owns this no more, and must stop acting for it.
    #[error("epoch {given} of `{key}` is over: epoch {present} has written since")]
    Superseded {
        /// What is owned.
        key: String,
        /// The caller's epoch.
        given: u64,
        /// The newest that has written.
        present: u64,
    },
    /// It is not possible, now or later: a limit is reached or a name is none.
    #[error("{0}")]
    Refused(String),
}

impl StateError {
    /// Stable label for metrics and answers.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Unavailable(_) => "state_unavailable",
            Self::Superseded { .. } => "state_superseded",
            Self::Refused(_) => "state_refused",
        }
    }
}

/// What changed: parameters of devices.
pub type Changes = Vec<(AccountId, DeviceId, Vec<ParamName>)>;

/// Last values by name.
pub type LastValues = BTreeMap<ParamName, LastValue>;

/// Holds last values, presence and module status. Values of one device never go back in time.
///
/// Every answer is the truth as far as it was written, or [`StateError::Unavailable`]: a backend
/// that lost its memory, or is being filled anew, does not answer as if there were nothing.
#[async_trait]
pub trait State: Send + Sync + 'static {
    /// Takes over the values of `messages`; for each parameter the newest
    /// timestamp wins, and of equal ones the later message. Other series than
    /// messages are passed over. Returns those that did change something.
    ///
    /// # Errors
    ///
    /// [`StateError::Unavailable`], within a bounded time: the messages are stored, so they may be
    /// acknowledged all the same; the backend takes them over by itself when it can.
    async fn apply(&self, messages: &[Stored]) -> Result<Changes, StateError>;

    /// The last values of a device, by name.
    ///
    /// # Errors
    ///
    /// [`StateError::Unavailable`].
    async fn get(&self, account: AccountId, device: DeviceId) -> Result<LastValues, StateError>;

    /// One last value of a device.
    ///
    /// # Errors
    ///
    /// [`StateError::Unavailable`].
    async fn value(
        &self,
        account: AccountId,
        device: DeviceId,
        param: &str,
    ) -> Result<Option<LastValue>, StateError> {
        Ok(self.get(account, device).await?.remove(param))
    }

    /// The last values of several devices at once; only `params` if any are named.
    ///
    /// # Errors
    ///
    /// [`StateError::Unavailable`].
    async fn get_many(
        &self,
        account: AccountId,
        devices: &[DeviceId],
        params: &[ParamName],
    ) -> Result<Vec<(DeviceId, LastValues)>, StateError>;

    /// Notes that a device connected to this node. `epoch` orders the connections of a device
    /// wherever they are, whatever the clocks there say: the later one has the higher, and none is
    /// 0. Returns false if a later connection, or the end of this one, is known already.
    ///
    /// # Errors
    ///
    /// [`StateError::Unavailable`]; the backend notes it by itself when it can.
    async fn connected(
        &self,
        account: AccountId,
        device: DeviceId,
        connection: ConnectionId,
        epoch: u64,
        peer: String,
        at: Timestamp,
    ) -> Result<bool, StateError>;

    /// Notes that a connection ended; nothing if another has taken its place.
    /// Returns whether the device is now offline.
    ///
    /// # Errors
    ///
    /// [`StateError::Unavailable`]; the backend notes it by itself when it can.
    async fn disconnected(
        &self,
        account: AccountId,
        device: DeviceId,
        connection: ConnectionId,
        epoch: u64,
        at: Timestamp,
    ) -> Result<bool, StateError>;

    /// A page of the sessions whose process is gone, and where the next page begins; the first is at 0. One may come twice.
    /// That a process is silent does not say that it is dead: ask the cluster too before saying so.
    ///
    /// None where sessions end with the process that holds the state.
    ///
    /// # Errors
    ///
    /// [`StateError::Unavailable`], also until all processes have told of theirs after a loss of memory.
    async fn lost_sessions(
        &self,
        _cursor: u64,
    ) -> Result<(Vec<LostSession>, Option<u64>), StateError> {
        Ok((Vec::new(), None))
    }

    /// Notes that a lost session is being ended since `at`. Returns the time that was noted first, so that who goes on
    /// where another left off says the same; `None` if the device has another session, or this one's process is back.
    ///
    /// # Errors
    ///
    /// [`StateError::Unavailable`].
    async fn mark_lost(
        &self,
        _session: &LostSession,
        _at: Timestamp,
    ) -> Result<Option<Timestamp>, StateError> {
        Ok(None)
    }

    /// Ends a lost session by raising the epoch above it, so that a process that was only cut off lets go of it. False, and
    /// nothing done, where [`State::mark_lost`] would say `None`.
    ///
    /// # Errors
    ///
    /// [`StateError::Unavailable`].
    async fn end_lost(&self, _session: &LostSession, _at: Timestamp) -> Result<bool, StateError> {
        Ok(false)
    }

    /// Whether a device is connected. A connection of a node that died counts for a bounded time.
    ///
    /// # Errors
    ///
    /// [`StateError::Unavailable`].
    async fn presence(&self, account: AccountId, device: DeviceId) -> Result<Presence, StateError>;

    /// Presence of several devices at once.
    ///
    /// # Errors
    ///
    /// [`StateError::Unavailable`].
    async fn presence_many(
        &self,
        account: AccountId,
        devices: &[DeviceId],
    ) -> Result<Vec<(DeviceId, Presence)>, StateError>;

    /// Forgets a device.
    ///
    /// # Errors
    ///
    /// [`StateError::Unavailable`]; the backend forgets it by itself when it can.
    async fn forget(&self, account: AccountId, device: DeviceId) -> Result<(), StateError>;

    /// A number above `floor` and above all that were given before, to any node: it orders what happens on different
    /// nodes. A backend that lost its memory knows of none before, so `floor` should be the time in microseconds, or the
    /// highest number that the caller has met if that is more.
    ///
    /// # Errors
    ///
    /// [`StateError::Unavailable`].
    async fn ticket(&self, floor: u64) -> Result<u64, StateError>;

    /// Sets a value of the status of the module `key`, as its owner since `epoch`. Returns whether
    /// it changed. Refused for good to an epoch older than one that has written.
    ///
    /// # Errors
    ///
    /// [`StateError::Superseded`], [`StateError::Refused`] (see [`crate::status`] for the limits),
    /// [`StateError::Unavailable`]: not written; the owner sets it again.
    async fn status_set(
        &self,
        account: AccountId,
        key: &str,
        epoch: u64,
        name: &str,
        value: &Value,
    ) -> Result<bool, StateError>;

    /// The status of a module.
    ///
    /// # Errors
    ///
    /// [`StateError::Unavailable`].
    async fn status_get(&self, account: AccountId, key: &str) -> Result<Status, StateError>;

    /// Ends the status of a module that is no more, as its owner.
    ///
    /// # Errors
    ///
    /// As [`State::status_set`].
    async fn status_clear(
        &self,
        account: AccountId,
        key: &str,
        epoch: u64,
    ) -> Result<(), StateError>;

    /// Watches the status of an account's modules: first what is there, then what changes. A
    /// watcher may miss values in between, never the newest; see [`crate::StatusChange`].
    ///
    /// # Errors
    ///
    /// [`StateError::Unavailable`] only if it has closed: a watch waits by itself.
    async fn status_watch(
        &self,
        account: AccountId,
        filter: StatusFilter,
    ) -> Result<Box<dyn StatusWatch>, StateError>;
}

/// Most bytes of names and contents of one device's last values. A value that
/// does not fit is in history only. Backends and the store's own summary of
/// last values keep the same bound.
pub const DEVICE_BYTES_MAX: usize = 256 << 10;

/// Most parameters of one device; further names are in history only.
pub const PARAMS_MAX: usize = 4_096;

#[derive(Default)]
struct DeviceState {
    values: BTreeMap<ParamName, LastValue>,
    bytes: usize,
    presence: Presence,
}

/// Bytes that a value counts for in [`DEVICE_BYTES_MAX`].
#[must_use]
pub fn cost(name: &ParamName, value: &Value) -> usize {
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
        let fits = after <= DEVICE_BYTES_MAX && (before > 0 || self.values.len() < PARAMS_MAX);
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
    status: RwLock<HashMap<AccountId, Arc<StatusTable>>>,
    ticket: AtomicU64,
}

impl MemoryState {
    /// An empty state.
    #[must_use]
    pub fn new() -> Self {
        Self {
            shards: (0..64).map(|_| RwLock::default()).collect(),
            status: RwLock::default(),
            ticket: AtomicU64::new(0),
        }
    }

    /// Takes over the last values that `history` has: at start.
    ///
    /// # Errors
    ///
    /// As [`History::last_values`].
    pub async fn rebuild(&self, history: &dyn History) -> Result<(), HistoryError> {
        let mut visit = |series: Series, name: &ParamName, value: &Value, timestamp: Timestamp| {
            if series.kind == SeriesKind::Message {
                self.restore(series.account, DeviceId(series.object), name, value, timestamp);
            }
        };
        history.last_values(&mut visit).await
    }

    /// Sets one value, as read from history.
    pub fn restore(
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

    fn table(&self, account: AccountId) -> Arc<StatusTable> {
        if let Some(table) = self.status.read().get(&account) {
            return Arc::clone(table);
        }
        Arc::clone(self.status.write().entry(account).or_default())
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
    async fn apply(&self, messages: &[Stored]) -> Result<Changes, StateError> {
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
        Ok(changes)
    }

    async fn get(&self, account: AccountId, device: DeviceId) -> Result<LastValues, StateError> {
        let shard = self.shard(device).read();
        Ok(shard.get(&(account, device)).map(|state| state.values.clone()).unwrap_or_default())
    }

    async fn value(
        &self,
        account: AccountId,
        device: DeviceId,
        param: &str,
    ) -> Result<Option<LastValue>, StateError> {
        let shard = self.shard(device).read();
        Ok(shard.get(&(account, device)).and_then(|state| state.values.get(param)).cloned())
    }

    async fn get_many(
        &self,
        account: AccountId,
        devices: &[DeviceId],
        params: &[ParamName],
    ) -> Result<Vec<(DeviceId, LastValues)>, StateError> {
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
        Ok(devices.iter().map(read).collect())
    }

    async fn connected(
        &self,
        account: AccountId,
        device: DeviceId,
        connection: ConnectionId,
        epoch: u64,
        peer: String,
        at: Timestamp,
    ) -> Result<bool, StateError> {
        let mut shard = self.shard(device).write();
        let presence = &mut shard.entry((account, device)).or_default().presence;
        let again = presence.epoch == epoch && presence.connection == Some(connection);
        if presence.epoch >= epoch && !again {
            return Ok(false);
        }
        presence.connection = Some(connection);
        presence.epoch = epoch;
        presence.peer = Some(peer);
        presence.changed_at = Some(at);
        Ok(true)
    }

    async fn disconnected(
        &self,
        account: AccountId,
        device: DeviceId,
        connection: ConnectionId,
        epoch: u64,
        at: Timestamp,
    ) -> Result<bool, StateError> {
        let mut shard = self.shard(device).write();
        let presence = &mut shard.entry((account, device)).or_default().presence;
        let holds = presence.epoch == epoch && presence.connection == Some(connection);
        // Later than all that is known: its beginning was not, and does not count any more.
        if !holds && presence.epoch >= epoch {
            return Ok(false);
        }
        presence.connection = None;
        presence.epoch = epoch;
        presence.changed_at = Some(at);
        Ok(true)
    }

    async fn presence(&self, account: AccountId, device: DeviceId) -> Result<Presence, StateError> {
        let shard = self.shard(device).read();
        Ok(shard.get(&(account, device)).map(|state| state.presence.clone()).unwrap_or_default())
    }

    async fn presence_many(
        &self,
        account: AccountId,
        devices: &[DeviceId],
    ) -> Result<Vec<(DeviceId, Presence)>, StateError> {
        let read = |device: &DeviceId| {
            let shard = self.shard(*device).read();
            let presence = shard.get(&(account, *device)).map(|state| state.presence.clone());
            (*device, presence.unwrap_or_default())
        };
        Ok(devices.iter().map(read).collect())
    }

    async fn forget(&self, account: AccountId, device: DeviceId) -> Result<(), StateError> {
        self.shard(device).write().remove(&(account, device));
        Ok(())
    }

    async fn ticket(&self, floor: u64) -> Result<u64, StateError> {
        let next = |last: u64| Some(last.max(floor).saturating_add(1));
        let last = self.ticket.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
        Ok(last.unwrap_or_default().max(floor).saturating_add(1))
    }

    async fn status_set(
        &self,
        account: AccountId,
        key: &str,
        epoch: u64,
        name: &str,
        value: &Value,
    ) -> Result<bool, StateError> {
        self.table(account).write(key, epoch, name, value)
    }

    async fn status_get(&self, account: AccountId, key: &str) -> Result<Status, StateError> {
        let table = self.status.read().get(&account).cloned();
        Ok(table.map(|table| table.read(key)).unwrap_or_default())
    }

    async fn status_clear(
        &self,
        account: AccountId,
        key: &str,
        epoch: u64,
    ) -> Result<(), StateError> {
        self.table(account).clear(key, epoch)
    }

    async fn status_watch(
        &self,
        account: AccountId,
        filter: StatusFilter,
    ) -> Result<Box<dyn StatusWatch>, StateError> {
        Ok(self.table(account).watch(filter))
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
