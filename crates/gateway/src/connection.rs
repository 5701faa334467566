//! What everyone may know of one connection, and who holds which device.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU64, Ordering};

use fieldline_contracts::ConnectionInfo;
use fieldline_model::{
    AccountId, Channel, ChannelId, CloseCode, ConnectionId, Device, DeviceId, Timestamp, Transport,
};
use parking_lot::Mutex;
use tokio::sync::{Mutex as AsyncMutex, MutexGuard, Notify};

/// One connection as others see it; its task alone owns the socket.
pub(crate) struct Connection {
    pub(crate) id: ConnectionId,
    pub(crate) account: AccountId,
    pub(crate) channel: ChannelId,
    pub(crate) transport: Transport,
    /// The channel as it was set when the connection began.
    pub(crate) settings: Arc<Channel>,
    pub(crate) connected_at: Timestamp,
    /// The address it comes from; over UDP the one last heard of.
    peer: Mutex<SocketAddr>,
    device: Mutex<Option<Arc<Device>>>,
    /// Orders it among the connections of its device; 0 before it has one.
    epoch: AtomicU64,
    received_at_us: AtomicI64,
    received_bytes: AtomicU64,
    sent_bytes: AtomicU64,
    messages: AtomicU64,
    /// Number of the close code asked for; 0 for none. The first one stands.
    close: AtomicU8,
    refresh: AtomicBool,
    wake: Notify,
}

impl Connection {
    pub(crate) fn new(
        id: ConnectionId,
        settings: Arc<Channel>,
        peer: SocketAddr,
        connected_at: Timestamp,
    ) -> Self {
        Self {
            id,
            account: settings.account,
            channel: settings.id,
            transport: settings.transport,
            settings,
            connected_at,
            peer: Mutex::new(peer),
            device: Mutex::new(None),
            epoch: AtomicU64::new(0),
            received_at_us: AtomicI64::new(0),
            received_bytes: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
            messages: AtomicU64::new(0),
            close: AtomicU8::new(0),
            refresh: AtomicBool::new(false),
            wake: Notify::new(),
        }
    }

    /// Asks its task to close it; the first to ask says why.
    pub(crate) fn close(&self, code: CloseCode) {
        let first =
            self.close.compare_exchange(0, code.number(), Ordering::AcqRel, Ordering::Acquire);
        if first.is_ok() {
            self.wake.notify_one();
        }
    }

    /// Asks its task to look at the device's settings again.
    pub(crate) fn refresh(&self) {
        self.refresh.store(true, Ordering::Release);
        self.wake.notify_one();
    }

    /// Waits until something was asked of the task. Cancel-safe: what was asked stays.
    pub(crate) async fn asked(&self) {
        self.wake.notified().await;
    }

    /// Has what was asked noticed once more: whoever noticed it could not see to it.
    pub(crate) fn ask_again(&self) {
        self.wake.notify_one();
    }

    /// Why it is to be closed, if it is.
    pub(crate) fn closing(&self) -> Option<CloseCode> {
        let number = self.close.load(Ordering::Acquire);
        CloseCode::ALL.iter().copied().find(|code| code.number() == number)
    }

    /// Whether the device's settings are to be looked at; once.
    pub(crate) fn take_refresh(&self) -> bool {
        self.refresh.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn peer(&self) -> SocketAddr {
        *self.peer.lock()
    }

    pub(crate) fn set_peer(&self, peer: SocketAddr) {
        *self.peer.lock() = peer;
    }

    pub(crate) fn set_device(&self, device: Option<Arc<Device>>) {
        *self.device.lock() = device;
    }

    /// When it took its device, in the order of all connections that ever had it.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    pub(crate) fn set_epoch(&self, epoch: u64) {
        self.epoch.store(epoch, Ordering::Release);
    }

    pub(crate) fn note_received(&self, bytes: usize, at: Timestamp) {
        self.received_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.received_at_us.store(at.as_micros(), Ordering::Relaxed);
    }

    pub(crate) fn note_sent(&self, bytes: usize) {
        self.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn note_messages(&self, count: usize) {
        self.messages.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub(crate) fn info(&self) -> ConnectionInfo {
        let device = self.device.lock().clone();
        let received_us = self.received_at_us.load(Ordering::Relaxed);
        ConnectionInfo {
            id: self.id,
            node: String::new(),
            channel: self.channel,
            device: device.as_ref().map(|device| device.id),
            ident: device.as_ref().map(|device| device.ident.clone()),
            peer: self.peer().to_string(),
            transport: self.transport,
            connected_at: self.connected_at,
            received_at: (received_us != 0).then(|| Timestamp::from_micros(received_us)),
            received_bytes: self.received_bytes.load(Ordering::Relaxed),
            sent_bytes: self.sent_bytes.load(Ordering::Relaxed),
            messages: self.messages.load(Ordering::Relaxed),
        }
    }
}

#[derive(Default)]
struct Shard {
    holders: Mutex<HashMap<(AccountId, DeviceId), Arc<Connection>>>,
    /// Held while holder and presence are changed together, so that they agree
    /// even if a device's connections come and go on several event loops.
    turn: AsyncMutex<()>,
}

/// Which connection holds which device, over all event loops.
pub(crate) struct Directory {
    shards: Vec<Shard>,
}

impl Directory {
    pub(crate) fn new() -> Self {
        Self { shards: (0..64).map(|_| Shard::default()).collect() }
    }

    fn shard(&self, device: DeviceId) -> &Shard {
        // The last byte of a version 7 id is random.
        let at = usize::from(device.as_bytes()[15]) % self.shards.len();
        #[allow(clippy::indexing_slicing, reason = "at is below the length")]
        &self.shards[at]
    }

    /// Waits for the turn to change a device's holder and presence.
    pub(crate) async fn turn(&self, device: DeviceId) -> MutexGuard<'_, ()> {
        self.shard(device).turn.lock().await
    }

    /// Gives the device to `connection`; the other one that held it is returned, to be closed.
    pub(crate) fn claim(
        &self,
        device: DeviceId,
        connection: &Arc<Connection>,
    ) -> Option<Arc<Connection>> {
        let mut holders = self.shard(device).holders.lock();
        let before = holders.insert((connection.account, device), Arc::clone(connection));
        before.filter(|before| before.id != connection.id)
    }

    /// Takes the device back; false if another connection holds it.
    pub(crate) fn release(&self, device: DeviceId, connection: &Connection) -> bool {
        let key = (connection.account, device);
        let mut holders = self.shard(device).holders.lock();
        let held = holders.get(&key).is_some_and(|holder| holder.id == connection.id);
        if held {
            holders.remove(&key);
        }
        held
    }

    /// All devices that are held, with who holds them.
    pub(crate) fn all(&self) -> Vec<(DeviceId, Arc<Connection>)> {
        let mut all = Vec::new();
        for shard in &self.shards {
            let holders = shard.holders.lock();
            all.extend(holders.iter().map(|((_, device), c)| (*device, Arc::clone(c))));
        }
        all
    }

    pub(crate) fn holder(&self, account: AccountId, device: DeviceId) -> Option<Arc<Connection>> {
        self.shard(device).holders.lock().get(&(account, device)).cloned()
    }
}
