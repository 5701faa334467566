//! The contracts of Fieldline: what services ask of the engines below them.
//!
//! A service holds an `Arc<dyn Trait>` and never knows which backend stands
//! behind it; the `fieldline` program alone chooses. Each contract has a
//! conformance suite (feature `conformance`) that every backend must pass.
//! Contracts cost one dynamic call a batch, never one a message.
//!
//! This crate may import `fieldline-model` and nothing else of the workspace.

pub mod blobs;
pub mod bus;
pub mod calls;
pub mod channels;
pub mod client_store;
pub mod clients;
pub mod clock;
pub mod cluster;
pub mod commands;
#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
pub mod finding;
pub mod history;
pub mod ownership;
pub mod registry;
pub mod state;
pub mod status;

use std::sync::Arc;

pub use blobs::{
    BlobError, BlobFolder, BlobInfo, BlobKey, BlobPage, BlobSource, Blobs, ETag, MemoryBlobs, PutIf,
};
pub use bus::{Bus, BusItem, Lagged, MemoryBus, Subscription, Topic, TopicFilter};
pub use calls::{CallError, Caller, Calls, Duplex, Handlers, MemoryCalls, Opening, TraceParent};
pub use channels::{
    ChannelControl, ChannelStatus, ConnectionInfo, Connections, Missing, NodeChannelStatus,
};
pub use client_store::{
    ClientStore, MemoryClientStore, RetainLimits, RetainedMessage, WillChange, WillKey,
};
pub use clients::{ClientMessage, ClientSessions};
pub use clock::{Clock, SystemClock, TestClock};
pub use cluster::{
    Cluster, ClusterError, Deadline, Holder, Lease, Member, Membership, MemoryCluster, NoPeers,
    Node, Peers, Watchdog,
};
pub use commands::{CommandError, Commands, Dispatch, NewCommand, Outcome, SessionHandle};
pub use history::{History, HistoryError, HistoryStats, Order, Query, Retention};
pub use ownership::Ownership;
pub use registry::{
    Actor, Audit, AuditAction, Draft, Kind, Page, Record, Registry, RegistryError, RegistryExt,
};
pub use state::{
    Changes, LastValue, LastValues, LostSession, MemoryState, Presence, Session, State, StateError,
};
pub use status::{Status, StatusChange, StatusFilter, StatusTable, StatusValue, StatusWatch};

/// The contracts that a service is given.
#[derive(Clone)]
pub struct Platform {
    /// Configuration of accounts: devices, channels, users …
    pub registry: Arc<dyn Registry>,
    /// Messages and logs.
    pub history: Arc<dyn History>,
    /// Last values and presence.
    pub state: Arc<dyn State>,
    /// Live messages.
    pub bus: Arc<dyn Bus>,
    /// Commands to devices.
    pub commands: Arc<dyn Commands>,
    /// The time.
    pub clock: Arc<dyn Clock>,
}
