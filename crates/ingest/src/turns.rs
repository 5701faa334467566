//! Turns: what one device says is taken one batch after another, whoever brings it.

use std::collections::HashMap;
use std::sync::Arc;

use fieldline_model::DeviceId;
use parking_lot::Mutex;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

type Shard = Mutex<HashMap<DeviceId, Arc<AsyncMutex<()>>>>;

/// A lock for each device that is in use now, and none for the others.
pub(crate) struct Turns {
    shards: Vec<Shard>,
}

impl Turns {
    pub(crate) fn new() -> Self {
        Self { shards: (0..64).map(|_| Shard::default()).collect() }
    }

    fn shard(&self, device: DeviceId) -> &Shard {
        // The last byte of a version 7 id is random.
        let at = usize::from(device.as_bytes()[15]) % self.shards.len();
        #[allow(clippy::indexing_slicing, reason = "at is below the length")]
        &self.shards[at]
    }

    /// Waits for this device's turn; callers get it in the order they asked.
    /// Cancel-safe, but a cancelled caller loses its place.
    pub(crate) async fn take(&self, device: DeviceId) -> Turn<'_> {
        let lock = Arc::clone(self.shard(device).lock().entry(device).or_default());
        // Made before waiting, so that a caller that gives up tidies up as well.
        let mut turn = Turn { turns: self, device, guard: None };
        turn.guard = Some(lock.lock_owned().await);
        turn
    }

    #[cfg(test)]
    pub(crate) fn in_use(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }
}

/// A device's turn; the next one's begins when it is dropped.
pub(crate) struct Turn<'a> {
    turns: &'a Turns,
    device: DeviceId,
    guard: Option<OwnedMutexGuard<()>>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        drop(self.guard.take());
        let mut shard = self.turns.shard(self.device).lock();
        // Clones are made under the shard's lock only: a count of one means nobody waits.
        if shard.get(&self.device).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            shard.remove(&self.device);
        }
    }
}
