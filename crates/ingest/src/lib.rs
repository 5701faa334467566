//! The pipeline as a library: resolve, validate, append, acknowledge, publish.
//!
//! Every link (gateway, mqtt, rest) hands what devices say to one [`Ingest`].
//! [`Ingest::submit`] returns when the messages are durable: only then may the
//! link acknowledge. It is not a service: it has no sockets, and its two
//! background tasks (one follows the registry for the caches, one writes log
//! lines and events) run on the runtime it was made on. Its methods work from
//! any runtime.
//!
//! Start reading at [`Ingest::submit`]. It may import `fieldline-contracts`,
//! `fieldline-model` and nothing else of the workspace.

mod cache;
mod journal;
mod submit;
mod turns;

#[cfg(test)]
mod tests;

use std::future::{Ready, ready};
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::registry::RegistryExt;
use fieldline_contracts::{Actor, BusItem, HistoryError, Platform, RegistryError};
use fieldline_model::{
    Accepted, AccountId, Channel, Device, DeviceId, Event, EventId, EventKind, ParamName, Params,
    Schema, Timestamp, Value,
};
use tokio::runtime::Handle;
use uuid::Uuid;

pub use journal::stored_event;
pub use submit::Submitted;

use cache::Caches;
use journal::Journal;
use submit::Counters;
use turns::Turns;

/// How often a device is tried to be registered whose ident others take and give up meanwhile.
const REGISTER_TRIES_MAX: u32 = 3;

/// Why a device was not registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// [`is_ident`] does not hold.
    #[error(
        "an ident that registers itself has 1 to {} printable characters without # + /, none of \
         them invisible, and no space at an end",
        Ingest::IDENT_CHARS_MAX
    )]
    Ident,
    /// The account's allowance is used up.
    #[error(
        "more than {} devices have registered themselves; the next may in a moment",
        Ingest::REGISTRATIONS_BURST
    )]
    TooMany,
    /// The registry could not be asked.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// Whether a device may have this ident: 1 to [`Ingest::IDENT_CHARS_MAX`] characters that can be
/// seen and told apart, without those that have a meaning in topics (`#`, `+`, `/`).
#[must_use]
pub fn is_ident(ident: &str) -> bool {
    let count = ident.chars().count();
    (1..=Ingest::IDENT_CHARS_MAX).contains(&count)
        && ident.trim() == ident
        && !ident.chars().any(|c| c.is_control() || "#+/".contains(c) || is_invisible(c))
}

/// Characters that show nothing, or change the direction of what stands beside them.
fn is_invisible(c: char) -> bool {
    matches!(
        u32::from(c),
        0xad | 0x34f | 0x61c | 0x115f | 0x1160 | 0x17b4 | 0x17b5 | 0x180b..=0x180f
            | 0x200b..=0x200f | 0x2028..=0x202e | 0x2060..=0x206f | 0x3164 | 0xfe00..=0xfe0f
            | 0xfeff | 0xffa0 | 0xfff0..=0xfffb | 0x1d173..=0x1d17a | 0xe0000..=0xe0fff
    )
}

/// The pipeline. Clones share it.
#[derive(Clone)]
pub struct Ingest {
    inner: Arc<Inner>,
}

struct Inner {
    platform: Platform,
    caches: Arc<Caches>,
    journal: Journal,
    turns: Turns,
    counters: Counters,
    follower: tokio::task::AbortHandle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The journal's task ends by itself when its queue closes, after writing what is in it.
        self.follower.abort();
    }
}

impl Ingest {
    /// Devices that may register themselves in one account in a burst. Beyond
    /// it [`Self::REGISTRATIONS_PER_S`] go on, so that nobody can fill the
    /// registry with invented idents in an hour.
    pub const REGISTRATIONS_BURST: u32 = 20_000;
    /// Devices a second that may register themselves in one account in the long run.
    pub const REGISTRATIONS_PER_S: u32 = 10;
    /// Longest ident of a device that registers itself, in characters.
    pub const IDENT_CHARS_MAX: usize = 64;

    /// Makes the pipeline; its background tasks run on the present runtime.
    ///
    /// Metrics are registered here: install the recorder before.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[must_use]
    pub fn new(platform: Platform) -> Self {
        Self::on(platform, &Handle::current())
    }

    /// Makes the pipeline; its background tasks run on `runtime`.
    #[must_use]
    pub fn on(platform: Platform, runtime: &Handle) -> Self {
        let caches = Arc::new(Caches::new(platform.registry.watch()));
        let follower =
            runtime.spawn(cache::follow(Arc::clone(&platform.registry), Arc::clone(&caches)));
        let journal =
            Journal::start(Arc::clone(&platform.history), Arc::clone(&platform.bus), runtime);
        let inner = Inner {
            platform,
            caches,
            journal,
            turns: Turns::new(),
            counters: Counters::new(),
            follower: follower.abort_handle(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The contracts it was made with.
    #[must_use]
    pub fn platform(&self) -> &Platform {
        &self.inner.platform
    }

    /// Waits until declared parameters and accounts are known; `submit` waits by itself.
    /// Returns false if that took longer than `limit`. Cancel-safe.
    pub async fn ready(&self, limit: Duration) -> bool {
        self.inner.caches.loaded(limit).await
    }

    /// Takes log lines of devices and channels ([`Accepted::own`]): best effort.
    ///
    /// They are queued at once and written in batches; what does not fit the
    /// queue is dropped and counted in `fieldline_ingest_log_lines_dropped_total`. The
    /// future is ready already.
    pub fn log(&self, lines: Vec<Accepted>) -> Ready<()> {
        for line in lines {
            self.inner.journal.line(line);
        }
        ready(())
    }

    /// Takes a log line that is made only if there is room for it, away from
    /// the caller's thread. `bytes` is about how much it holds on to.
    pub fn log_with(&self, bytes: usize, make: impl FnOnce() -> Accepted + Send + 'static) {
        self.inner.journal.lazy(bytes, Box::new(make));
    }

    /// Stores and publishes an event. Waits while the queue is full; on return
    /// it is queued, in order with this caller's log lines, not yet durable.
    /// Cancel-safe: a dropped call has queued it or not.
    pub async fn event(&self, event: Event) {
        self.inner.journal.event(event).await;
    }

    /// Like [`Self::event`] where waiting is not possible: dropped, and counted
    /// in `fieldline_ingest_events_dropped_total`, if the queue is full.
    pub fn event_soon(&self, event: Event) {
        self.inner.journal.event_soon(event);
    }

    /// Stores an event, with log lines that belong to it, and tells of them; on return they are durable. False if the event
    /// was stored already: then nobody is told again.
    ///
    /// Not cancel-safe, as [`fieldline_contracts::History::append`].
    ///
    /// # Errors
    ///
    /// See [`HistoryError`]: it is not stored for sure.
    pub async fn event_stored(
        &self,
        lines: Vec<Accepted>,
        event: Event,
    ) -> Result<bool, HistoryError> {
        let Platform { history, bus, .. } = &self.inner.platform;
        journal::store_now(&**history, &**bus, lines, event).await
    }

    /// A fresh event about `object`, now.
    #[must_use]
    pub fn new_event(
        &self,
        account: AccountId,
        kind: EventKind,
        object: impl Into<Uuid>,
        params: Params,
    ) -> Event {
        let clock = &self.inner.platform.clock;
        let now = clock.now();
        Event {
            id: EventId::new(now, clock.random()),
            account,
            kind,
            object: object.into(),
            timestamp: now,
            params,
        }
    }

    /// Waits until all log lines and events queued so far are written or dropped. Cancel-safe.
    pub async fn flush(&self) {
        self.inner.journal.flush().await;
    }

    /// The device of this ident. Cached; a change in the registry is seen by
    /// the next call after it. Cancel-safe.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unavailable`], [`RegistryError::Corrupt`].
    pub async fn device_by_ident(
        &self,
        account: AccountId,
        ident: &str,
    ) -> Result<Option<Arc<Device>>, RegistryError> {
        match self.inner.caches.by_ident(account, ident) {
            Some(known) => Ok(known),
            None => self.read_ident(account, ident).await,
        }
    }

    /// As [`Self::device_by_ident`], whatever the cache says.
    async fn read_ident(
        &self,
        account: AccountId,
        ident: &str,
    ) -> Result<Option<Arc<Device>>, RegistryError> {
        let caches = &self.inner.caches;
        let generation = caches.generation();
        let registry = &self.inner.platform.registry;
        let found = registry.find_object::<Device>(account, "ident", ident).await?;
        let found = found.map(|device| Arc::new(device.object));
        caches.learn_ident(generation, account, ident, found.clone());
        Ok(found)
    }

    /// The device of this id. Cached as [`Self::device_by_ident`] is. Cancel-safe.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unavailable`], [`RegistryError::Corrupt`].
    pub async fn device(
        &self,
        account: AccountId,
        id: DeviceId,
    ) -> Result<Option<Arc<Device>>, RegistryError> {
        let caches = &self.inner.caches;
        if let Some(known) = caches.by_id(account, id) {
            return Ok(Some(known));
        }
        let generation = caches.generation();
        let found = self.inner.platform.registry.get_object::<Device>(account, id.0).await?;
        let found = found.map(|device| Arc::new(device.object));
        if let Some(device) = &found {
            caches.learn(generation, account, device);
        }
        Ok(found)
    }

    /// Registers a device that named itself on `channel`, and tells by an event.
    /// If another connection was faster, on this node or another, that one's device is returned.
    ///
    /// # Errors
    ///
    /// [`RegisterError`].
    pub async fn register(
        &self,
        channel: &Channel,
        ident: &str,
    ) -> Result<Arc<Device>, RegisterError> {
        if !is_ident(ident) {
            return Err(RegisterError::Ident);
        }
        let Platform { registry, clock, .. } = &self.inner.platform;
        let now = clock.now();
        if !self.inner.caches.may_register(channel.account, now) {
            return Err(RegisterError::TooMany);
        }
        let device = Device {
            id: DeviceId::new(now, clock.random()),
            account: channel.account,
            name: ident.to_owned(),
            ident: ident.to_owned(),
            protocol: channel.protocol.clone(),
            kind: String::new(),
            enabled: true,
            settings: std::collections::BTreeMap::new(),
            labels: std::collections::BTreeMap::new(),
            created_at: now,
        };
        let actor = Actor::system("ingest");
        let mut tries = 1;
        loop {
            match registry.create_object(channel.account, &device, &actor).await {
                Ok(created) => {
                    let params = own_params([
                        ("ident", ident.into()),
                        ("channel.id", channel.id.to_string().into()),
                        ("protocol", channel.protocol.as_str().into()),
                    ]);
                    let object = created.object.id.0;
                    let registered = EventKind::Registered;
                    self.event(self.new_event(channel.account, registered, object, params)).await;
                    return Ok(Arc::new(created.object));
                }
                // Somebody was faster. The cache may not have heard of it yet, and say that nobody has the ident.
                Err(taken @ RegistryError::Taken { .. }) => {
                    if let Some(winner) = self.read_ident(channel.account, ident).await? {
                        return Ok(winner);
                    }
                    // Deleted again already.
                    if tries == REGISTER_TRIES_MAX {
                        return Err(taken.into());
                    }
                    tries += 1;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Whether the account lets devices in; true for one that is unknown,
    /// whose objects cannot be found anyway.
    #[must_use]
    pub fn account_enabled(&self, account: AccountId) -> bool {
        self.inner.caches.account_enabled(account)
    }

    /// The parameters that are declared for `account`: the dictionary alone
    /// until [`Self::ready`].
    #[must_use]
    pub fn schema(&self, account: AccountId) -> Arc<Schema> {
        self.inner.caches.schema(account)
    }

    /// Publishes an item that needs no store, such as a presence change.
    pub async fn publish(&self, account: AccountId, items: Vec<BusItem>) {
        self.inner.platform.bus.publish(account, items).await;
    }

    /// The present instant.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.inner.platform.clock.now()
    }
}

/// Parameters of a log line or event from names that are written in the code.
/// A name that breaks the rules of [`ParamName`] is left out.
#[must_use]
pub fn own_params<'a>(pairs: impl IntoIterator<Item = (&'a str, Value)>) -> Params {
    pairs
        .into_iter()
        .filter_map(|(name, value)| Some((ParamName::new(name).ok()?, value)))
        .collect()
}
