//! One queue for each device, and the commands' way through it.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use fieldline_contracts::registry::RegistryExt;
use fieldline_contracts::{Actor, Clock, CommandError, Dispatch, Outcome, Registry};
use fieldline_model::{
    AccountId, Command, CommandId, CommandStatus, ConnectionId, DeviceId, Event, EventId,
    EventKind, ParamName, Params, Value,
};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{Mutex as AsyncMutex, MutexGuard, mpsc, watch};
use tracing::warn;

use crate::LocalCommands;

/// Tries to write a command's status, and the wait between them.
const WRITE_TRIES: u32 = 5;
const WRITE_RETRY_DELAY: Duration = Duration::from_millis(100);

type Key = (AccountId, DeviceId);
type EventSink = Box<dyn Fn(Event) + Send + Sync>;

pub(crate) struct Inner {
    pub(crate) registry: Arc<dyn Registry>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) runtime: Handle,
    slots: Mutex<HashMap<Key, Arc<Slot>>>,
    /// Devices of the commands that links have in hand.
    handed: Mutex<HashMap<(AccountId, CommandId), DeviceId>>,
    sessions: AtomicU64,
    events: OnceLock<EventSink>,
    /// The last change of the registry that `expire` has seen.
    pub(crate) followed: AtomicU64,
    /// When finished commands were last looked through, in microseconds.
    pub(crate) swept_at: AtomicI64,
}

/// The queue of one device; there is one while it is attached or something waits.
pub(crate) struct Slot {
    key: Key,
    content: AsyncMutex<Content>,
    /// Counts changes, to wake those who wait for a command.
    version: watch::Sender<u64>,
}

#[derive(Default)]
pub(crate) struct Content {
    session: Option<Session>,
    /// Queued, oldest first.
    pub(crate) waiting: VecDeque<Command>,
    in_flight: Option<InFlight>,
}

struct Session {
    number: u64,
    connection: ConnectionId,
    dispatches: mpsc::Sender<Dispatch>,
}

/// Handed to a session that has not yet said what became of it.
struct InFlight {
    command: Command,
    connection: ConnectionId,
}

impl Slot {
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }
}

impl Inner {
    pub(crate) fn new(registry: Arc<dyn Registry>, clock: Arc<dyn Clock>, runtime: Handle) -> Self {
        let followed = AtomicU64::new(*registry.watch().borrow());
        Self {
            registry,
            clock,
            runtime,
            slots: Mutex::default(),
            handed: Mutex::default(),
            sessions: AtomicU64::new(0),
            events: OnceLock::new(),
            followed,
            swept_at: AtomicI64::new(0),
        }
    }

    pub(crate) fn set_events(&self, sink: EventSink) {
        if self.events.set(sink).is_err() {
            warn!("command events have a receiver already, the second one is passed over");
        }
    }

    pub(crate) fn next_session(&self) -> u64 {
        self.sessions.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn slot(&self, account: AccountId, device: DeviceId) -> Arc<Slot> {
        let key = (account, device);
        let mut slots = self.slots.lock();
        let slot = slots.entry(key).or_insert_with(|| {
            Arc::new(Slot { key, content: AsyncMutex::default(), version: watch::Sender::new(0) })
        });
        Arc::clone(slot)
    }

    pub(crate) fn all_slots(&self) -> Vec<Arc<Slot>> {
        self.slots.lock().values().cloned().collect()
    }

    pub(crate) fn known_slot(&self, account: AccountId, device: DeviceId) -> Option<Arc<Slot>> {
        self.slots.lock().get(&(account, device)).cloned()
    }

    /// Lets go of a slot; the last one who does takes an empty one away.
    pub(crate) fn release(&self, slot: Arc<Slot>) {
        let mut slots = self.slots.lock();
        // Clones are made under this lock: two are the map's and ours.
        if Arc::strong_count(&slot) > 2 {
            return;
        }
        let empty = slot.content.try_lock().is_ok_and(|content| {
            content.session.is_none() && content.waiting.is_empty() && content.in_flight.is_none()
        });
        if empty {
            slots.remove(&slot.key);
        }
    }

    pub(crate) async fn content<'a>(&self, slot: &'a Slot) -> MutexGuard<'a, Content> {
        slot.content.lock().await
    }

    pub(crate) async fn submit(
        &self,
        command: Command,
        actor: &Actor,
    ) -> Result<Command, CommandError> {
        let slot = self.slot(command.account, command.device);
        let mut content = slot.content.lock().await;
        let waiting = content.waiting.len() + usize::from(content.in_flight.is_some());
        let outcome = if waiting >= LocalCommands::WAITING_MAX {
            Err(CommandError::QueueFull(waiting))
        } else {
            match self.registry.create_object(command.account, &command, actor).await {
                Ok(created) => {
                    content.waiting.push_back(created.object);
                    self.tell(&slot, &command);
                    self.dispatch(&mut content);
                    Ok(command)
                }
                Err(error) => Err(error.into()),
            }
        };
        drop(content);
        self.release(slot);
        outcome
    }

    pub(crate) async fn cancel(
        &self,
        known: Command,
        actor: &Actor,
    ) -> Result<Command, CommandError> {
        let slot = self.slot(known.account, known.device);
        let mut content = slot.content.lock().await;
        let outcome = match content.waiting.iter().position(|c| c.id == known.id) {
            Some(at) => match content.waiting.remove(at) {
                Some(command) => {
                    Ok(self.finish(&slot, command, CommandStatus::Cancelled, None, actor).await)
                }
                None => Err(CommandError::NotFound(known.id)),
            },
            None if content.in_flight.as_ref().is_some_and(|f| f.command.id == known.id) => {
                Err(CommandError::TooLate("sent"))
            }
            None => Err(CommandError::TooLate(match known.status {
                CommandStatus::Answered => "answered",
                CommandStatus::Failed => "failed",
                CommandStatus::Expired => "expired",
                CommandStatus::Cancelled => "cancelled",
                CommandStatus::Queued | CommandStatus::Sent => "finished",
            })),
        };
        drop(content);
        self.release(slot);
        outcome
    }

    /// Hands the oldest waiting command to the session, if there is one that has nothing in hand.
    fn dispatch(&self, content: &mut Content) {
        let Some(session) = &content.session else { return };
        if content.in_flight.is_some() {
            return;
        }
        let now = self.clock.now();
        // Those that have expired are finished by `expire`, within a second.
        let Some(at) = content.waiting.iter().position(|c| c.expires_at > now) else { return };
        let Some(command) = content.waiting.remove(at) else { return };
        let dispatch = Dispatch { command: command.clone() };
        match session.dispatches.try_send(dispatch) {
            Ok(()) => {
                let key = (command.account, command.id);
                self.handed.lock().insert(key, command.device);
                content.in_flight = Some(InFlight { command, connection: session.connection });
            }
            // The connection has just ended; its guard will tell.
            Err(_) => content.waiting.push_front(command),
        }
    }

    pub(crate) async fn attach(
        &self,
        account: AccountId,
        device: DeviceId,
        connection: ConnectionId,
        number: u64,
        dispatches: mpsc::Sender<Dispatch>,
    ) {
        let slot = self.slot(account, device);
        let mut content = slot.content.lock().await;
        // A session with a higher number came by another thread and is newer.
        if content.session.as_ref().is_none_or(|session| session.number < number) {
            self.lose(&slot, &mut content).await;
            content.session = Some(Session { number, connection, dispatches });
            self.dispatch(&mut content);
        }
        drop(content);
        self.release(slot);
    }

    pub(crate) async fn detach(&self, account: AccountId, device: DeviceId, number: u64) {
        let Some(slot) = self.known_slot(account, device) else { return };
        let mut content = slot.content.lock().await;
        if content.session.as_ref().is_some_and(|session| session.number == number) {
            content.session = None;
            self.lose(&slot, &mut content).await;
        }
        drop(content);
        self.release(slot);
    }

    pub(crate) async fn report(
        &self,
        account: AccountId,
        connection: ConnectionId,
        id: CommandId,
        outcome: Outcome,
    ) {
        // From memory: were the registry asked and failed, the device would get no command more.
        let device = self.handed.lock().get(&(account, id)).copied();
        let Some(device) = device else { return };
        let Some(slot) = self.known_slot(account, device) else { return };
        let mut content = slot.content.lock().await;
        let holds = |f: &InFlight| f.command.id == id && f.connection == connection;
        if content.in_flight.as_ref().is_some_and(holds) {
            self.settle(&slot, &mut content, outcome).await;
        }
        drop(content);
        self.release(slot);
    }

    /// Takes over what became of the command in flight.
    async fn settle(&self, slot: &Slot, content: &mut Content, outcome: Outcome) {
        let actor = Actor::system("router");
        let Some(mut in_flight) = content.in_flight.take() else { return };
        self.handed.lock().remove(&(in_flight.command.account, in_flight.command.id));
        // It expired while in the link's hands: that was its end already.
        let over = in_flight.command.status.is_final();
        match outcome {
            Outcome::Sent => {
                let command = &in_flight.command;
                self.handed.lock().insert((command.account, command.id), command.device);
                if !over {
                    in_flight.command.status = CommandStatus::Sent;
                    in_flight.command.sent_at = Some(self.clock.now());
                    in_flight.command.attempts += 1;
                    self.write(&in_flight.command, &actor).await;
                    self.tell(slot, &in_flight.command);
                }
                content.in_flight = Some(in_flight);
                return;
            }
            _ if over => {}
            Outcome::Answered(text) => {
                let mut command = in_flight.command;
                command.answer = Some(cut(text));
                self.finish(slot, command, CommandStatus::Answered, None, &actor).await;
            }
            Outcome::Failed(text) => {
                let error = Some(cut(text));
                self.finish(slot, in_flight.command, CommandStatus::Failed, error, &actor).await;
            }
            Outcome::Lost => {
                content.in_flight = Some(in_flight);
                self.lose(slot, content).await;
            }
        }
        self.dispatch(content);
    }

    /// The command in flight got no answer: it waits again, in front, or is over.
    async fn lose(&self, slot: &Slot, content: &mut Content) {
        let Some(InFlight { command, .. }) = content.in_flight.take() else { return };
        self.handed.lock().remove(&(command.account, command.id));
        if let Some(command) = self.again(slot, command).await {
            content.waiting.push_front(command);
        }
    }

    /// The command as it waits for another try; `None` if it is over.
    pub(crate) async fn again(&self, slot: &Slot, mut command: Command) -> Option<Command> {
        let actor = Actor::system("router");
        if command.status.is_final() {
            return None;
        }
        if command.expires_at <= self.clock.now() {
            self.finish(slot, command, CommandStatus::Expired, None, &actor).await;
            return None;
        }
        if command.attempts >= LocalCommands::ATTEMPTS_MAX {
            let error = Some(format!("sent {} times without an answer", command.attempts));
            self.finish(slot, command, CommandStatus::Failed, error, &actor).await;
            return None;
        }
        if command.status != CommandStatus::Queued {
            command.status = CommandStatus::Queued;
            self.write(&command, &actor).await;
            self.tell(slot, &command);
        }
        Some(command)
    }

    /// Finishes what has expired or lost its device; returns how many still wait.
    pub(crate) async fn settle_overdue(&self, slot: &Slot, deleted: bool) -> usize {
        let actor = Actor::system("router");
        let now = self.clock.now();
        let mut content = slot.content.lock().await;
        let (over, keep): (VecDeque<_>, VecDeque<_>) =
            content.waiting.drain(..).partition(|c| deleted || c.expires_at <= now);
        content.waiting = keep;
        for command in over {
            self.end_overdue(slot, command, deleted, &actor).await;
        }
        if let Some(in_flight) = &mut content.in_flight
            && !in_flight.command.status.is_final()
            && (deleted || in_flight.command.expires_at <= now)
        {
            // The link still has it in hand: the next waits until it lets go.
            let command = in_flight.command.clone();
            in_flight.command = self.end_overdue(slot, command, deleted, &actor).await;
        }
        self.dispatch(&mut content);
        content.waiting.len()
    }

    async fn end_overdue(
        &self,
        slot: &Slot,
        command: Command,
        deleted: bool,
        actor: &Actor,
    ) -> Command {
        let (status, error) = if deleted {
            (CommandStatus::Failed, Some("the device was deleted".to_owned()))
        } else {
            (CommandStatus::Expired, None)
        };
        self.finish(slot, command, status, error, actor).await
    }

    pub(crate) async fn finish(
        &self,
        slot: &Slot,
        mut command: Command,
        status: CommandStatus,
        error: Option<String>,
        actor: &Actor,
    ) -> Command {
        command.status = status;
        command.error = error;
        command.finished_at = Some(self.clock.now());
        self.write(&command, actor).await;
        self.tell(slot, &command);
        command
    }

    /// Writes a command's new status. If the registry stays away the change is
    /// in memory alone: after a restart the command may be sent once more.
    async fn write(&self, command: &Command, actor: &Actor) {
        let mut tries = 1;
        loop {
            match self.registry.update_object(command.account, command, None, actor).await {
                Ok(_) => return,
                Err(error @ fieldline_contracts::RegistryError::Unavailable(_))
                    if tries < WRITE_TRIES =>
                {
                    warn!(%error, command = %command.id, "a command's status cannot be written yet");
                    tries += 1;
                    tokio::time::sleep(WRITE_RETRY_DELAY).await;
                }
                Err(error) => {
                    warn!(%error, command = %command.id, "a command's status was not written");
                    return;
                }
            }
        }
    }

    /// Tells that a command has changed: to those who wait, and as an event.
    fn tell(&self, slot: &Slot, command: &Command) {
        slot.version.send_modify(|version| *version = version.wrapping_add(1));
        let status = status_name(command.status);
        metrics::counter!("fieldline_router_commands_total", "status" => status).increment(1);
        let Some(sink) = self.events.get() else { return };
        let mut params = Params::with_capacity(5);
        let mut push = |name: &str, value: Value| {
            if let Ok(name) = ParamName::new(name) {
                params.push(name, value);
            }
        };
        push("command.id", command.id.to_string().into());
        push("command.name", command.name.as_str().into());
        push("command.status", status.into());
        if let Some(answer) = &command.answer {
            push("command.answer", answer.as_str().into());
        }
        if let Some(error) = &command.error {
            push("command.error", error.as_str().into());
        }
        let now = self.clock.now();
        sink(Event {
            id: EventId::new(now, self.clock.random()),
            account: command.account,
            kind: EventKind::Command,
            object: command.device.0,
            timestamp: now,
            params,
        });
    }
}

fn status_name(status: CommandStatus) -> &'static str {
    match status {
        CommandStatus::Queued => "queued",
        CommandStatus::Sent => "sent",
        CommandStatus::Answered => "answered",
        CommandStatus::Failed => "failed",
        CommandStatus::Expired => "expired",
        CommandStatus::Cancelled => "cancelled",
    }
}

/// The text, cut at a character's border to what is kept.
fn cut(mut text: String) -> String {
    let mut end = LocalCommands::ANSWER_BYTES_MAX.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

/// Ends a session when dropped, from whatever thread.
pub(crate) struct Guard {
    inner: Weak<Inner>,
    account: AccountId,
    device: DeviceId,
    number: u64,
}

impl Guard {
    pub(crate) fn new(
        inner: &Arc<Inner>,
        account: AccountId,
        device: DeviceId,
        number: u64,
    ) -> Self {
        Self { inner: Arc::downgrade(inner), account, device, number }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let Some(inner) = self.inner.upgrade() else { return };
        let (account, device, number) = (self.account, self.device, self.number);
        let runtime = inner.runtime.clone();
        runtime.spawn(async move { inner.detach(account, device, number).await });
    }
}
