//! Last values in memory that a test takes away and gives back.

use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use fieldline_contracts::{
    Changes, LastValues, MemoryState, Presence, State, StateError, Status, StatusFilter,
    StatusWatch,
};
use fieldline_model::{AccountId, ConnectionId, DeviceId, ParamName, Stored, Timestamp, Value};

/// A [`MemoryState`] that can be away: then nothing is written, and nothing can be read.
#[derive(Default)]
pub struct SwitchedState {
    inner: MemoryState,
    away: AtomicBool,
}

impl SwitchedState {
    /// One that is there.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes it away, or gives it back. What was to be written meanwhile is not made good.
    pub fn set_away(&self, away: bool) {
        self.away.store(away, Ordering::Release);
    }

    /// Why it cannot be asked, in words.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        self.there().err().iter().map(ToString::to_string).collect()
    }

    fn there(&self) -> Result<&MemoryState, StateError> {
        match self.away.load(Ordering::Acquire) {
            true => Err(StateError::Unavailable("a test took it away".to_owned())),
            false => Ok(&self.inner),
        }
    }
}

#[async_trait]
impl State for SwitchedState {
    async fn apply(&self, messages: &[Stored]) -> Result<Changes, StateError> {
        self.there()?.apply(messages).await
    }

    async fn get(&self, account: AccountId, device: DeviceId) -> Result<LastValues, StateError> {
        self.there()?.get(account, device).await
    }

    async fn get_many(
        &self,
        account: AccountId,
        devices: &[DeviceId],
        params: &[ParamName],
    ) -> Result<Vec<(DeviceId, LastValues)>, StateError> {
        self.there()?.get_many(account, devices, params).await
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
        self.there()?.connected(account, device, connection, epoch, peer, at).await
    }

    async fn disconnected(
        &self,
        account: AccountId,
        device: DeviceId,
        connection: ConnectionId,
        epoch: u64,
        at: Timestamp,
    ) -> Result<bool, StateError> {
        self.there()?.disconnected(account, device, connection, epoch, at).await
    }

    async fn presence(&self, account: AccountId, device: DeviceId) -> Result<Presence, StateError> {
        self.there()?.presence(account, device).await
    }

    async fn presence_many(
        &self,
        account: AccountId,
        devices: &[DeviceId],
    ) -> Result<Vec<(DeviceId, Presence)>, StateError> {
        self.there()?.presence_many(account, devices).await
    }

    async fn forget(&self, account: AccountId, device: DeviceId) -> Result<(), StateError> {
        self.there()?.forget(account, device).await
    }

    async fn ticket(&self, floor: u64) -> Result<u64, StateError> {
        self.there()?.ticket(floor).await
    }

    async fn status_set(
        &self,
        account: AccountId,
        key: &str,
        epoch: u64,
        name: &str,
        value: &Value,
    ) -> Result<bool, StateError> {
        self.there()?.status_set(account, key, epoch, name, value).await
    }

    async fn status_get(&self, account: AccountId, key: &str) -> Result<Status, StateError> {
        self.there()?.status_get(account, key).await
    }

    async fn status_clear(
        &self,
        account: AccountId,
        key: &str,
        epoch: u64,
    ) -> Result<(), StateError> {
        self.there()?.status_clear(account, key, epoch).await
    }

    async fn status_watch(
        &self,
        account: AccountId,
        filter: StatusFilter,
    ) -> Result<Box<dyn StatusWatch>, StateError> {
        self.inner.status_watch(account, filter).await
    }
}
