//! A channel that listens: what its event loops share.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use fieldline_model::{AccountId, Channel, ChannelId, CloseCode, ConnectionId, DeviceId};
use fieldline_pvm::Program;
use fieldline_runtime::tls::ReloadingTls;
use parking_lot::{Mutex, RwLock};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connection::Connection;
use crate::limit::RefusalLimit;
use crate::udp::UdpDevice;

pub(crate) struct ChannelLive {
    pub(crate) id: ChannelId,
    pub(crate) account: AccountId,
    /// Where it listens, with the real port.
    pub(crate) address: SocketAddr,
    pub(crate) tls: Option<ReloadingTls>,
    /// Ends accepting; connections are closed one by one.
    pub(crate) stop: CancellationToken,
    /// The tasks that hold the listening sockets.
    pub(crate) listening: TaskTracker,
    pub(crate) refusals: RefusalLimit,
    /// Devices heard of over UDP.
    pub(crate) udp_devices: Mutex<HashMap<DeviceId, Arc<UdpDevice>>>,
    settings: RwLock<Arc<Channel>>,
    program: RwLock<Arc<Program>>,
    connections: Mutex<HashMap<ConnectionId, Arc<Connection>>>,
    count: AtomicU32,
    addresses: Mutex<HashMap<IpAddr, u32>>,
}

impl ChannelLive {
    pub(crate) fn new(
        settings: Arc<Channel>,
        program: Arc<Program>,
        tls: Option<ReloadingTls>,
        address: SocketAddr,
    ) -> Self {
        Self {
            id: settings.id,
            account: settings.account,
            address,
            tls,
            stop: CancellationToken::new(),
            listening: TaskTracker::new(),
            refusals: RefusalLimit::new(),
            udp_devices: Mutex::default(),
            settings: RwLock::new(settings),
            program: RwLock::new(program),
            connections: Mutex::default(),
            count: AtomicU32::new(0),
            addresses: Mutex::default(),
        }
    }

    /// Its settings now; connections see a change at once.
    pub(crate) fn settings(&self) -> Arc<Channel> {
        Arc::clone(&self.settings.read())
    }

    pub(crate) fn set_settings(&self, settings: Arc<Channel>) {
        *self.settings.write() = settings;
    }

    /// The program for the next connection.
    pub(crate) fn program(&self) -> Arc<Program> {
        Arc::clone(&self.program.read())
    }

    /// Sets the program; false if it is the same one.
    pub(crate) fn set_program(&self, program: Arc<Program>) -> bool {
        let mut current = self.program.write();
        if Arc::ptr_eq(&current, &program) {
            return false;
        }
        *current = program;
        true
    }

    /// Takes a place among the channel's connections.
    pub(crate) fn admit(&self) -> Result<(), String> {
        let max = self.settings.read().connections_max;
        let taken = self.count.fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| {
            (count < max).then_some(count + 1)
        });
        if taken.is_err() {
            return Err(format!("the channel holds {max} connections already"));
        }
        Ok(())
    }

    /// Takes a place among the connections of `address`, which are limited.
    pub(crate) fn admit_address(
        &self,
        address: IpAddr,
        per_address_max: u32,
    ) -> Result<(), String> {
        let mut addresses = self.addresses.lock();
        let count = addresses.entry(address).or_insert(0);
        if *count >= per_address_max {
            return Err(format!("{address} has {per_address_max} connections already"));
        }
        *count += 1;
        Ok(())
    }

    pub(crate) fn add(&self, connection: Arc<Connection>) {
        self.connections.lock().insert(connection.id, connection);
    }

    /// Gives a place back that `admit` took, and that of an address.
    pub(crate) fn remove(&self, id: ConnectionId, address: Option<IpAddr>) {
        self.connections.lock().remove(&id);
        self.count.fetch_sub(1, Ordering::AcqRel);
        if let Some(address) = address {
            let mut addresses = self.addresses.lock();
            if let Some(count) = addresses.get_mut(&address) {
                *count -= 1;
                if *count == 0 {
                    addresses.remove(&address);
                }
            }
        }
    }

    pub(crate) fn count(&self) -> u32 {
        self.count.load(Ordering::Acquire)
    }

    pub(crate) fn connections(&self) -> Vec<Arc<Connection>> {
        self.connections.lock().values().cloned().collect()
    }

    pub(crate) fn connection(&self, id: ConnectionId) -> Option<Arc<Connection>> {
        self.connections.lock().get(&id).cloned()
    }

    pub(crate) fn close_all(&self, code: CloseCode) {
        for connection in self.connections.lock().values() {
            connection.close(code);
        }
    }
}
