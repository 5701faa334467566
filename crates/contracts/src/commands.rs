//! `Commands`: one path for everything that is asked of a device.
//!
//! A caller queues a command; the queue is in the `Registry`, so it survives
//! restarts, and any node may add to it. The link that holds the device, on
//! whichever node, attaches a session and is handed one command at a time; it
//! reports what became of it. Offline devices get theirs when they connect,
//! unless it expired first.

use async_trait::async_trait;
use fieldline_model::{AccountId, Command, CommandId, ConnectionId, DeviceId, Params};
use tokio::sync::mpsc;

use crate::{Actor, RegistryError};

/// A command to be queued.
#[derive(Clone, Debug, PartialEq)]
pub struct NewCommand {
    /// Its name in the device's protocol, such as `text`.
    pub name: String,
    /// Its arguments.
    pub params: Params,
    /// How long it is worth sending, in seconds; 1 to 2,592,000.
    pub ttl_s: u32,
}

/// What became of a command that was handed to a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is on the wire.
    Sent,
    /// The device answered.
    Answered(String),
    /// It cannot be sent, or the device refused it or gave no answer in time.
    Failed(String),
    /// The connection ended before an answer came: it waits for the next one.
    Lost,
}

/// A command handed to the link that holds its device.
#[derive(Clone, Debug)]
pub struct Dispatch {
    /// The command, as it was before this try.
    pub command: Command,
}

/// What a link holds while a device is connected. Dropping it detaches, and
/// what was handed over without an outcome counts as [`Outcome::Lost`].
pub struct SessionHandle {
    /// Commands to put on the wire, one at a time: the next comes after the
    /// outcome of the one before. Closed when another connection took the place.
    pub dispatches: mpsc::Receiver<Dispatch>,
    /// Ends the session when dropped.
    pub guard: Box<dyn std::any::Any + Send>,
}

/// Why a command was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError {
    /// There is no such device in this account.
    #[error("there is no device {0} in this account")]
    NoDevice(DeviceId),
    /// There is no such command in this account.
    #[error("there is no command {0} in this account")]
    NotFound(CommandId),
    /// It is past being cancelled.
    #[error("the command is {0} already and cannot be cancelled")]
    TooLate(&'static str),
    /// The device has as many waiting as it may.
    #[error("the device has {0} commands waiting already; cancel some or wait")]
    QueueFull(usize),
    /// An argument is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The registry failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// Takes commands to devices.
#[async_trait]
pub trait Commands: Send + Sync + 'static {
    /// Queues a command; durable when this returns.
    ///
    /// # Errors
    ///
    /// See [`CommandError`].
    async fn submit(
        &self,
        account: AccountId,
        device: DeviceId,
        new: NewCommand,
        actor: &Actor,
    ) -> Result<Command, CommandError>;

    /// Takes a queued command back, from any node: once this returned `Ok` it
    /// is not sent. One that was taken to be sent is past it.
    ///
    /// # Errors
    ///
    /// [`CommandError::NotFound`], [`CommandError::TooLate`].
    async fn cancel(
        &self,
        account: AccountId,
        id: CommandId,
        actor: &Actor,
    ) -> Result<Command, CommandError>;

    /// A command as it stands.
    ///
    /// # Errors
    ///
    /// [`CommandError::NotFound`].
    async fn get(&self, account: AccountId, id: CommandId) -> Result<Command, CommandError>;

    /// Commands of a device, newest first.
    ///
    /// # Errors
    ///
    /// [`CommandError::Registry`].
    async fn list(
        &self,
        account: AccountId,
        device: DeviceId,
        limit: usize,
    ) -> Result<Vec<Command>, CommandError>;

    /// Waits until a command is final or `timeout_ms` has passed; returns it as it then stands. Cancel-safe.
    ///
    /// # Errors
    ///
    /// [`CommandError::NotFound`].
    async fn wait(
        &self,
        account: AccountId,
        id: CommandId,
        timeout_ms: u64,
    ) -> Result<Command, CommandError>;

    /// Tells that a connection holds a device. An earlier one of the same device is detached; one that another node
    /// still holds is taken for gone, and so is what it had in flight.
    async fn attach(
        &self,
        account: AccountId,
        device: DeviceId,
        connection: ConnectionId,
    ) -> SessionHandle;

    /// Reports what became of a command handed to `connection`; passed over if that one holds it no more.
    async fn report(
        &self,
        account: AccountId,
        connection: ConnectionId,
        command: CommandId,
        outcome: Outcome,
    );

    /// Drops what has expired; called every second by the program, on every node.
    async fn expire(&self);
}
