//! Commands to whichever link holds the device, on whichever node.
//!
//! [`LocalCommands`] is one node's part of the `Commands` contract. The queue is in the `Registry` that all nodes
//! share, so it survives restarts and any node may add to it; the node that holds a device's newest session sends its
//! commands, one in flight at a time, first in, first out. Nodes hear of each other by the registry's changes alone.
//! Every step of a command is a compare-and-set on its revision: of two nodes that want the same one, one wins, and
//! the other reads again. A process that is alone does just the same, with itself.
//!
//! It knows no protocol: links encode commands and understand answers.
//!
//! [`calls`] is how nodes ask each other directly, and [`ClusterChannels`] what management sees of all of them.
//!
//! Start reading at `Inner::dispatch` in `queue.rs`; `follow.rs` is how a node hears of what others did, and
//! `upkeep.rs` what one of them does for all. It may import `fieldline-contracts`, `fieldline-model` and nothing else
//! of the workspace.

pub mod calls;
mod channels;
mod follow;
mod index;
mod queue;
mod requests;
mod upkeep;
mod write;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use fieldline_contracts::registry::RegistryExt;
use fieldline_contracts::{
    Actor, Clock, Cluster, CommandError, Commands, Dispatch, NewCommand, Outcome, Page, Registry,
    RegistryError, SessionHandle,
};
use fieldline_model::{
    AccountId, Command, CommandId, CommandStatus, ConnectionId, Device, DeviceId, Event,
};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

pub use channels::ClusterChannels;
use queue::{Guard, Inner};

/// Longest that a link waits for what it reports to be written, and for its session to be known: what takes longer
/// goes on without it, so that a registry that does not answer keeps no device from being served.
const LINK_WAIT: Duration = Duration::from_secs(2);
/// Longest wait for the unfinished commands to be known.
const RECOVER_WAIT: Duration = Duration::from_secs(30);

/// One node's part in taking commands to devices. Clones share it.
#[derive(Clone)]
pub struct LocalCommands {
    inner: Arc<Inner>,
}

impl LocalCommands {
    /// Most commands of one device that wait or are in flight.
    pub const WAITING_MAX: usize = 100;
    /// How often a command is put on the wire at most.
    pub const ATTEMPTS_MAX: u32 = 5;
    /// Longest that a command may be worth sending: 30 days.
    pub const TTL_S_MAX: u32 = 2_592_000;
    /// Longest name of a command, in bytes.
    pub const NAME_BYTES_MAX: usize = 64;
    /// Most bytes of a command's arguments.
    pub const PARAMS_BYTES_MAX: usize = 64 << 10;
    /// Longest answer and error kept, in bytes; the rest is cut off.
    pub const ANSWER_BYTES_MAX: usize = 64 << 10;
    /// Days that finished commands are kept.
    pub const FINISHED_DAYS: i64 = 30;
    /// The key of the cluster whose owner expires and tidies up commands for all nodes.
    pub const UPKEEP_KEY: &str = "router/upkeep";

    /// A node's part, over the `registry` that all nodes share; its work runs on the present runtime, whichever
    /// runtime calls.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[must_use]
    pub fn new(registry: Arc<dyn Registry>, clock: Arc<dyn Clock>) -> Self {
        Self::on(registry, clock, Handle::current())
    }

    /// As [`Self::new`], with its work on `runtime`.
    #[must_use]
    pub fn on(registry: Arc<dyn Registry>, clock: Arc<dyn Clock>, runtime: Handle) -> Self {
        Self { inner: Inner::start(registry, clock, runtime) }
    }

    /// With others beside it: what one node does for all, expiry and tidying up, is from now on done by the one that
    /// owns the key [`Self::UPKEEP_KEY`] of `cluster`. Without, a node does it by itself.
    #[must_use]
    pub fn with_cluster(self, cluster: Arc<dyn Cluster>) -> Self {
        self.inner.campaign(cluster);
        self
    }

    /// Waits until the commands that are not finished are known, and returns how many there are. Nothing depends on
    /// it: a device's are taken up when it attaches. One that was on the wire when its node ended counts as lost then,
    /// and is sent again while attempts are left.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unavailable`] if that takes too long.
    pub async fn recover(&self) -> Result<usize, RegistryError> {
        if self.inner.caught_up(RECOVER_WAIT).await {
            return Ok(self.inner.unfinished());
        }
        Err(RegistryError::Unavailable("waiting commands cannot be read".to_owned()))
    }

    /// Sets who is told of every change, as an [`fieldline_model::EventKind::Command`] event.
    /// It must not block. Only the first call has an effect.
    pub fn set_events(&self, sink: impl Fn(Event) + Send + Sync + 'static) {
        self.inner.set_events(Box::new(sink));
    }

    /// Runs `work` on the queue's own runtime, to its end even if the caller gives up.
    async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        self.inner.runtime.spawn(work).await.ok()
    }
}

fn shutting_down() -> CommandError {
    RegistryError::Unavailable("the command queue is shutting down".to_owned()).into()
}

fn check(new: &NewCommand) -> Result<(), CommandError> {
    let (name_max, params_max) = (LocalCommands::NAME_BYTES_MAX, LocalCommands::PARAMS_BYTES_MAX);
    if !(1..=name_max).contains(&new.name.len()) {
        let text = format!("a command's name has 1 to {name_max} bytes");
        return Err(CommandError::Invalid(text));
    }
    if new.params.content_bytes() > params_max {
        let text = format!("a command's params have at most {params_max} bytes");
        return Err(CommandError::Invalid(text));
    }
    let ttl_max = LocalCommands::TTL_S_MAX;
    if !(1..=ttl_max).contains(&new.ttl_s) {
        return Err(CommandError::Invalid(format!("ttl_s is 1 to {ttl_max} seconds")));
    }
    Ok(())
}

#[async_trait]
impl Commands for LocalCommands {
    async fn submit(
        &self,
        account: AccountId,
        device: DeviceId,
        new: NewCommand,
        actor: &Actor,
    ) -> Result<Command, CommandError> {
        check(&new)?;
        let known = self.inner.registry.get_object::<Device>(account, device.0).await?;
        if known.is_none() {
            return Err(CommandError::NoDevice(device));
        }
        let now = self.inner.clock.now();
        let command = Command {
            id: CommandId::new(now, self.inner.clock.random()),
            account,
            device,
            name: new.name,
            params: new.params,
            status: CommandStatus::Queued,
            created_at: now,
            expires_at: now.plus_micros(i64::from(new.ttl_s) * 1_000_000),
            sent_at: None,
            finished_at: None,
            attempts: 0,
            answer: None,
            error: None,
            created_by: actor.name.clone(),
        };
        let (inner, actor) = (Arc::clone(&self.inner), actor.clone());
        let queued = self.run(async move { inner.submit(command, &actor).await }).await;
        queued.unwrap_or_else(|| Err(shutting_down()))
    }

    async fn cancel(
        &self,
        account: AccountId,
        id: CommandId,
        actor: &Actor,
    ) -> Result<Command, CommandError> {
        let (inner, actor) = (Arc::clone(&self.inner), actor.clone());
        let cancelled = self.run(async move { inner.cancel(account, id, &actor).await }).await;
        cancelled.unwrap_or_else(|| Err(shutting_down()))
    }

    async fn get(&self, account: AccountId, id: CommandId) -> Result<Command, CommandError> {
        let found = self.inner.registry.get_object::<Command>(account, id.0).await?;
        found.map(|command| command.object).ok_or(CommandError::NotFound(id))
    }

    async fn list(
        &self,
        account: AccountId,
        device: DeviceId,
        limit: usize,
    ) -> Result<Vec<Command>, CommandError> {
        // The registry lists oldest first; finished commands go after a month,
        // so this is a page or two.
        let mut page = Page::first(Page::LIMIT_MAX);
        page.equals.push(("device".to_owned(), device.to_string().into()));
        let mut newest = std::collections::VecDeque::new();
        loop {
            let found = self.inner.registry.list_objects::<Command>(account, &page).await?;
            page.after = found.last().map(|command| command.object.id.0);
            let complete = found.len() < page.limit;
            for command in found {
                newest.push_front(command.object);
                newest.truncate(limit);
            }
            if complete {
                return Ok(newest.into());
            }
        }
    }

    async fn wait(
        &self,
        account: AccountId,
        id: CommandId,
        timeout_ms: u64,
    ) -> Result<Command, CommandError> {
        let mut command = self.get(account, id).await?;
        if command.status.is_final() {
            return Ok(command);
        }
        let mut wait = self.inner.wait_for(id);
        let deadline = tokio::time::Instant::now() + Duration::from_millis(timeout_ms);
        loop {
            // Subscribed before reading: a change in between wakes at once.
            command = self.get(account, id).await?;
            if command.status.is_final() {
                return Ok(command);
            }
            let changed = tokio::time::timeout_at(deadline, wait.changed()).await;
            if !matches!(changed, Ok(Ok(()))) {
                return Ok(command);
            }
        }
    }

    async fn attach(
        &self,
        account: AccountId,
        device: DeviceId,
        connection: ConnectionId,
    ) -> SessionHandle {
        // One at a time is in flight, so one place is enough.
        let (sender, dispatches) = mpsc::channel::<Dispatch>(1);
        let number = self.inner.next_session();
        let guard = Guard::new(&self.inner, account, device, number);
        let inner = Arc::clone(&self.inner);
        let (known, is_known) = oneshot::channel();
        self.inner.runtime.spawn(async move {
            inner.attach((account, device), connection, number, sender, known).await;
        });
        // Either it is known now, or the registry is slow, or we are shutting down: then nothing comes.
        timeout(LINK_WAIT, is_known).await.map(|_| ()).unwrap_or_default();
        SessionHandle { dispatches, guard: Box::new(guard) }
    }

    async fn report(
        &self,
        account: AccountId,
        connection: ConnectionId,
        command: CommandId,
        outcome: Outcome,
    ) {
        let inner = Arc::clone(&self.inner);
        let work = async move { inner.report(account, connection, command, outcome).await };
        // While shutting down it stays `sent`, and counts as lost when the device attaches next.
        timeout(LINK_WAIT, self.run(work)).await.map(|_| ()).unwrap_or_default();
    }

    async fn expire(&self) {
        let inner = Arc::clone(&self.inner);
        self.run(async move { inner.expire().await }).await.unwrap_or_default();
    }
}
