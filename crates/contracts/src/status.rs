//! Module status: what a module says of itself now, and who waits for it to change.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use fieldline_model::Value;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::StateError;

/// Longest key of a module, and longest name of one of its values, in bytes.
pub const STATUS_NAME_BYTES_MAX: usize = 128;
/// Most bytes of names and contents of one module's status.
pub const STATUS_BYTES_MAX: usize = 64 << 10;
/// Most modules of an account that have a status.
pub const STATUS_KEYS_MAX: usize = 4_096;
/// Ends of modules that are remembered for watchers that have not heard of them yet.
const ENDS_MAX: usize = 1_024;

/// One value of a module's status.
#[derive(Clone, Debug, PartialEq)]
pub struct StatusValue {
    /// The value.
    pub value: Value,
    /// Grows with every change of this value, also after the store lost its memory.
    pub version: u64,
    /// The epoch of the owner that set it.
    pub epoch: u64,
}

/// A module's status.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// The newest epoch that has written; 0 before the first.
    pub epoch: u64,
    /// The values by name.
    pub values: BTreeMap<Arc<str>, StatusValue>,
}

/// Which modules of an account a watcher wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StatusFilter {
    /// Only these keys; all if empty.
    pub keys: BTreeSet<String>,
}

impl StatusFilter {
    /// Whether changes of `key` are wanted.
    #[must_use]
    pub fn wants(&self, key: &str) -> bool {
        self.keys.is_empty() || self.keys.contains(key)
    }
}

/// What a watcher is told.
#[derive(Clone, Debug, PartialEq)]
pub enum StatusChange {
    /// A value is now this. Values in between may be left out, the newest never.
    Set {
        /// The module.
        key: Arc<str>,
        /// The value's name.
        name: Arc<str>,
        /// The value.
        value: StatusValue,
    },
    /// A module has no status any more.
    Gone {
        /// The module.
        key: Arc<str>,
    },
    /// Changes may have been missed: forget what was told before; all that is there now follows.
    Resynced,
}

/// A running watch; dropping it ends it.
#[async_trait]
pub trait StatusWatch: Send {
    /// The next change: first everything that is there, then what changes. Waits while the store
    /// cannot be reached, and `None` when it has closed. Cancel-safe.
    async fn next(&mut self) -> Option<StatusChange>;
}

/// Checks a module's key or a value's name.
///
/// # Errors
///
/// [`StateError::Refused`] if it is empty, too long or holds control characters.
pub fn check_status_name(what: &str, name: &str) -> Result<(), StateError> {
    let fits = (1..=STATUS_NAME_BYTES_MAX).contains(&name.len());
    if fits && !name.chars().any(char::is_control) {
        return Ok(());
    }
    Err(StateError::Refused(format!(
        "a {what} of a status has 1 to {STATUS_NAME_BYTES_MAX} bytes and no control characters"
    )))
}

/// Bytes that a value of a status counts for.
#[must_use]
pub fn status_cost(name: &str, value: &Value) -> usize {
    name.len() + 16 + value.heap_bytes()
}

struct Entry {
    value: StatusValue,
    bytes: usize,
    /// Its place in `order`.
    at: u64,
}

#[derive(Default)]
struct Module {
    epoch: u64,
    bytes: usize,
    values: BTreeMap<Arc<str>, Entry>,
    /// The place of its end in `order`, and the version, while it has no values.
    end: Option<(u64, u64)>,
}

#[derive(Default)]
struct Table {
    modules: BTreeMap<Arc<str>, Module>,
    /// What changed last at which place: at most one for each value and ended module.
    order: BTreeMap<u64, (Arc<str>, Option<Arc<str>>)>,
    /// Ends in `order`.
    ends: BTreeSet<u64>,
    last: u64,
    /// Watchers that have not come beyond this place have missed the end of a module.
    forgotten: u64,
    /// Counts the times that everything is told anew.
    resyncs: u64,
    closed: bool,
}

/// The status of one account's modules in memory, with its watchers.
///
/// Nothing is kept for a watcher but its place, so a slow one costs nothing and hears of the
/// newest values only. Backends elsewhere keep one as the copy that their watchers look at.
pub struct StatusTable {
    table: Mutex<Table>,
    grown: watch::Sender<()>,
}

impl Default for StatusTable {
    fn default() -> Self {
        Self { table: Mutex::default(), grown: watch::Sender::new(()) }
    }
}

impl StatusTable {
    /// Sets a value as its owner. Returns whether it changed.
    ///
    /// # Errors
    ///
    /// [`StateError::Superseded`] if a newer epoch has written, [`StateError::Refused`] if a
    /// limit is reached.
    pub fn write(
        &self,
        key: &str,
        epoch: u64,
        name: &str,
        value: &Value,
    ) -> Result<bool, StateError> {
        check_status_name("key", key)?;
        check_status_name("name", name)?;
        let mut table = self.table.lock();
        let version = table.last + 1;
        if let Some(module) = table.modules.get(key) {
            module.admits(key, epoch)?;
            let before = module.values.get(name);
            if before.is_some_and(|b| b.value.value == *value && b.value.epoch == epoch) {
                return Ok(false);
            }
            let after = module.bytes - before.map_or(0, |b| b.bytes) + status_cost(name, value);
            check_status_bytes(key, after)?;
        } else {
            check_status_bytes(key, status_cost(name, value))?;
        }
        let is_new = table.modules.get(key).is_none_or(|module| module.end.is_some());
        let held = table.modules.len() - table.ends.len();
        check_status_keys(if is_new { held + 1 } else { held })?;
        let value = StatusValue { value: value.clone(), version, epoch };
        table.set(key, name, value);
        drop(table);
        self.grown.send_replace(());
        Ok(true)
    }

    /// Ends a module's status as its owner.
    ///
    /// # Errors
    ///
    /// [`StateError::Superseded`] if a newer epoch has written.
    pub fn clear(&self, key: &str, epoch: u64) -> Result<(), StateError> {
        let mut table = self.table.lock();
        let Some(module) = table.modules.get(key) else { return Ok(()) };
        module.admits(key, epoch)?;
        let version = table.last + 1;
        table.end(key, epoch, version);
        drop(table);
        self.grown.send_replace(());
        Ok(())
    }

    /// Takes over a value that was written elsewhere, unless a newer one is known.
    pub fn learn(&self, key: &str, name: &str, value: StatusValue) {
        let mut table = self.table.lock();
        if table.known_version(key, name) >= value.version {
            return;
        }
        table.set(key, name, value);
        drop(table);
        self.grown.send_replace(());
    }

    /// Takes over the end of a module that was written elsewhere, unless something newer is known.
    pub fn learn_end(&self, key: &str, epoch: u64, version: u64) {
        let mut table = self.table.lock();
        let Some(module) = table.modules.get(key) else { return };
        let newest = module.values.values().map(|entry| entry.value.version).max();
        if newest.or(module.end.map(|(_, version)| version)).is_some_and(|newest| newest > version)
        {
            return;
        }
        table.end(key, epoch, version);
        drop(table);
        self.grown.send_replace(());
    }

    /// Takes over everything that is there elsewhere, as read after `version` was the newest, and
    /// has watchers told anew. What is newer than `version` and not in `all` is kept: it was
    /// learnt while `all` was being read.
    pub fn resync(&self, version: u64, all: Vec<(Arc<str>, Status)>) {
        let mut table = self.table.lock();
        let mut present = BTreeSet::new();
        for (key, status) in all {
            for (name, value) in status.values {
                if table.known_version(&key, &name) < value.version {
                    table.set(&key, &name, value);
                }
                present.insert((Arc::clone(&key), name));
            }
        }
        let stale = |key: &Arc<str>, name: &Arc<str>, entry: &Entry| {
            entry.value.version <= version
                && !present.contains(&(Arc::clone(key), Arc::clone(name)))
        };
        let gone: Vec<(Arc<str>, Arc<str>)> = table
            .modules
            .iter()
            .flat_map(|(key, module)| module.values.iter().map(move |(name, e)| (key, name, e)))
            .filter(|(key, name, entry)| stale(key, name, entry))
            .map(|(key, name, _)| (Arc::clone(key), Arc::clone(name)))
            .collect();
        for (key, name) in gone {
            table.remove(&key, &name);
        }
        table.resyncs += 1;
        drop(table);
        self.grown.send_replace(());
    }

    /// Lets go of everything without a word: what is learnt from here on is of another store, and
    /// its versions say nothing about these. [`StatusTable::resync`] is to follow.
    pub fn forget(&self) {
        let mut table = self.table.lock();
        let (last, resyncs, closed) = (table.last, table.resyncs, table.closed);
        *table = Table { last, resyncs, closed, forgotten: last, ..Table::default() };
    }

    /// A module's status.
    #[must_use]
    pub fn read(&self, key: &str) -> Status {
        let table = self.table.lock();
        let Some(module) = table.modules.get(key) else { return Status::default() };
        let values = module.values.iter().map(|(n, e)| (Arc::clone(n), e.value.clone())).collect();
        Status { epoch: module.epoch, values }
    }

    /// Watches it.
    #[must_use]
    pub fn watch(self: &Arc<Self>, filter: StatusFilter) -> Box<dyn StatusWatch> {
        let grown = self.grown.subscribe();
        let (began, resyncs) = {
            let table = self.table.lock();
            (table.last, table.resyncs)
        };
        Box::new(Watcher { table: Arc::clone(self), grown, filter, seen: 0, began, resyncs })
    }

    /// How many watch it.
    #[must_use]
    pub fn watchers(&self) -> usize {
        self.grown.receiver_count()
    }

    /// Ends all watches.
    pub fn close(&self) {
        self.table.lock().closed = true;
        self.grown.send_replace(());
    }
}

/// Checks the bytes of one module's status.
///
/// # Errors
///
/// [`StateError::Refused`].
pub fn check_status_bytes(key: &str, bytes: usize) -> Result<(), StateError> {
    if bytes <= STATUS_BYTES_MAX {
        return Ok(());
    }
    Err(StateError::Refused(format!(
        "the status of `{key}` would have more than {STATUS_BYTES_MAX} bytes; say less in it"
    )))
}

/// Checks the count of an account's modules that have a status.
///
/// # Errors
///
/// [`StateError::Refused`].
pub fn check_status_keys(count: usize) -> Result<(), StateError> {
    if count <= STATUS_KEYS_MAX {
        return Ok(());
    }
    Err(StateError::Refused(format!(
        "{STATUS_KEYS_MAX} modules of the account have a status already; clear those that are gone"
    )))
}

impl Module {
    fn admits(&self, key: &str, epoch: u64) -> Result<(), StateError> {
        if epoch >= self.epoch {
            return Ok(());
        }
        Err(StateError::Superseded { key: key.to_owned(), given: epoch, present: self.epoch })
    }
}

impl Table {
    /// The version of a value, or of the end of its module; 0 if neither is known.
    fn known_version(&self, key: &str, name: &str) -> u64 {
        let Some(module) = self.modules.get(key) else { return 0 };
        let end = module.end.map_or(0, |(_, version)| version);
        module.values.get(name).map_or(end, |entry| entry.value.version)
    }

    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn set(&mut self, key: &str, name: &str, value: StatusValue) {
        let at = self.next();
        let shared = self.modules.get_key_value(key).map(|(key, _)| Arc::clone(key));
        let key = shared.unwrap_or_else(|| key.into());
        let module = self.modules.entry(Arc::clone(&key)).or_default();
        if let Some((end, _)) = module.end.take() {
            self.order.remove(&end);
            self.ends.remove(&end);
        }
        module.epoch = module.epoch.max(value.epoch);
        let bytes = status_cost(name, &value.value);
        let shared = module.values.get_key_value(name).map(|(name, _)| Arc::clone(name));
        let name = shared.unwrap_or_else(|| name.into());
        let entry = Entry { value, bytes, at };
        module.bytes += bytes;
        if let Some(before) = module.values.insert(Arc::clone(&name), entry) {
            module.bytes -= before.bytes;
            self.order.remove(&before.at);
        }
        self.order.insert(at, (key, Some(name)));
    }

    /// Takes one value away without a word: watchers are told anew.
    fn remove(&mut self, key: &str, name: &str) {
        let Some(module) = self.modules.get_mut(key) else { return };
        if let Some(entry) = module.values.remove(name) {
            module.bytes -= entry.bytes;
            self.order.remove(&entry.at);
        }
        if module.values.is_empty() && module.end.is_none() {
            self.modules.remove(key);
        }
    }

    fn end(&mut self, key: &str, epoch: u64, version: u64) {
        let at = self.next();
        let Some((key, _)) = self.modules.get_key_value(key) else { return };
        let key = Arc::clone(key);
        let Some(module) = self.modules.get_mut(&key) else { return };
        for entry in std::mem::take(&mut module.values).into_values() {
            self.order.remove(&entry.at);
        }
        module.bytes = 0;
        module.epoch = module.epoch.max(epoch);
        if let Some((before, _)) = module.end.replace((at, version)) {
            self.order.remove(&before);
            self.ends.remove(&before);
        }
        self.order.insert(at, (key, None));
        self.ends.insert(at);
        while self.ends.len() > ENDS_MAX {
            let Some(oldest) = self.ends.pop_first() else { break };
            self.forgotten = oldest;
            if let Some((key, _)) = self.order.remove(&oldest) {
                self.modules.remove(&key);
            }
        }
    }
}

struct Watcher {
    table: Arc<StatusTable>,
    grown: watch::Receiver<()>,
    filter: StatusFilter,
    /// The place up to which everything was told.
    seen: u64,
    /// Ends up to this place came before it, or before it was told anew.
    began: u64,
    resyncs: u64,
}

impl Watcher {
    /// The next change, `None` when there is none yet; `Err` when the table has closed.
    fn take(&mut self) -> Result<Option<StatusChange>, ()> {
        let table = self.table.table.lock();
        if table.closed {
            return Err(());
        }
        let missed = self.seen > 0 && self.seen < table.forgotten;
        if missed || self.resyncs < table.resyncs {
            (self.seen, self.began, self.resyncs) = (0, table.last, table.resyncs);
            return Ok(Some(StatusChange::Resynced));
        }
        for (at, (key, name)) in table.order.range(self.seen + 1..) {
            let unheard = name.is_none() && *at <= self.began;
            if unheard || !self.filter.wants(key) {
                continue;
            }
            let value = name.as_ref().and_then(|name| {
                let entry = table.modules.get(key)?.values.get(name)?;
                Some((Arc::clone(name), entry.value.clone()))
            });
            self.seen = *at;
            let key = Arc::clone(key);
            return Ok(Some(match value {
                Some((name, value)) => StatusChange::Set { key, name, value },
                None => StatusChange::Gone { key },
            }));
        }
        self.seen = table.last;
        Ok(None)
    }
}

#[async_trait]
impl StatusWatch for Watcher {
    async fn next(&mut self) -> Option<StatusChange> {
        loop {
            // Seen before looking, so that what comes meanwhile wakes the wait.
            self.grown.borrow_and_update();
            if let Some(change) = self.take().ok()? {
                return Some(change);
            }
            self.grown.changed().await.ok()?;
        }
    }
}
