//! One queue for each device that is held here, and the commands' way through it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use fieldline_contracts::registry::{RegistryExt, Versioned};
use fieldline_contracts::{Clock, Dispatch, Lease, Outcome, Page, Registry};
use fieldline_model::{
    AccountId, Command, CommandId, CommandStatus, ConnectionId, DeviceId, Event, Timestamp,
};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{Mutex as AsyncMutex, Semaphore, mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::LocalCommands;
use crate::index::Index;
use crate::write::{Written, cut, finished, same};

/// How long a command may stay on the wire of another node without a word, while its device is held here. Links give
/// up on an answer long before; so it is a node that died right after it had sent.
const FOREIGN_MAX: Duration = Duration::from_secs(180);
/// Devices whose queues are read or reconciled at a time.
pub(crate) const READS_MAX: usize = 32;

pub(crate) type Key = (AccountId, DeviceId);
type EventSink = Box<dyn Fn(Event) + Send + Sync>;
/// A command at the revision that is known.
pub(crate) type Known = Versioned<Command>;

pub(crate) struct Inner {
    pub(crate) registry: Arc<dyn Registry>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) runtime: Handle,
    slots: Mutex<HashMap<Key, Arc<Slot>>>,
    /// The device and the newest revision of each command that a slot has in memory.
    pub(crate) tracked: Mutex<HashMap<CommandId, (Key, u64)>>,
    pub(crate) waits: Mutex<HashMap<CommandId, watch::Sender<u64>>>,
    sessions: AtomicU64,
    pub(crate) events: OnceLock<EventSink>,
    pub(crate) index: Mutex<Index>,
    /// The last change of the registry that was followed.
    pub(crate) followed: watch::Sender<u64>,
    pub(crate) reads: Arc<Semaphore>,
    /// Devices that were deleted since upkeep last looked.
    pub(crate) deleted: Mutex<HashSet<Key>>,
    pub(crate) upkeep: Mutex<Upkeep>,
    /// Tasks that end with this.
    pub(crate) tasks: Mutex<Vec<AbortHandle>>,
    /// When finished commands were last looked through, in microseconds.
    pub(crate) swept_at: AtomicI64,
}

/// Who does what one node does for all.
pub(crate) enum Upkeep {
    /// There is but this node.
    Alone,
    /// The owner of a key: this node, if there is a lease.
    Owner(Option<Arc<Lease>>),
}

/// The queue of one device; there is one while it is attached, or something is not written yet.
pub(crate) struct Slot {
    pub(crate) key: Key,
    pub(crate) content: AsyncMutex<Content>,
}

#[derive(Default)]
pub(crate) struct Content {
    pub(crate) session: Option<Session>,
    /// Whether the lists below are those of the registry. They are empty while nobody is attached.
    loaded: bool,
    /// Queued, oldest first.
    waiting: VecDeque<Waiting>,
    in_flight: Option<InFlight>,
    /// On the wire of another node that has yet to let go of the device.
    foreign: Vec<Foreign>,
    /// What the registry could not be told yet.
    unwritten: Vec<Unwritten>,
    /// One that was created as sent, of which it is not known whether it was written.
    doubtful: Option<Command>,
}

pub(crate) struct Session {
    number: u64,
    connection: ConnectionId,
    dispatches: mpsc::Sender<Dispatch>,
}

struct Waiting {
    known: Known,
    /// As it was to be taken, where it is not known whether that was written.
    claim: Option<Command>,
}

/// Handed to a session that has not yet said what became of it.
struct InFlight {
    /// As it stands in the registry: sent.
    known: Known,
    /// As it was before it was taken.
    before: Command,
    connection: ConnectionId,
    /// Whether the session said that it is on the wire.
    on_wire: bool,
    /// It ended otherwise, or was taken over by another node: what the session says of it is passed over.
    over: bool,
}

struct Foreign {
    id: CommandId,
    revision: u64,
    since: Instant,
}

struct Unwritten {
    wanted: Command,
    base: Known,
}

impl Inner {
    pub(crate) fn start(
        registry: Arc<dyn Registry>,
        clock: Arc<dyn Clock>,
        runtime: Handle,
    ) -> Arc<Self> {
        let newest = registry.watch();
        let inner = Arc::new(Self {
            registry,
            clock,
            runtime,
            slots: Mutex::default(),
            tracked: Mutex::default(),
            waits: Mutex::default(),
            sessions: AtomicU64::new(0),
            events: OnceLock::new(),
            index: Mutex::default(),
            followed: watch::Sender::new(0),
            reads: Arc::new(Semaphore::new(READS_MAX)),
            deleted: Mutex::default(),
            upkeep: Mutex::new(Upkeep::Alone),
            tasks: Mutex::default(),
            swept_at: AtomicI64::new(0),
        });
        inner.spawn_owned(crate::follow::follow(Arc::downgrade(&inner), newest));
        inner
    }

    /// Runs what ends when this is dropped.
    pub(crate) fn spawn_owned(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.lock().push(self.runtime.spawn(task).abort_handle());
    }

    pub(crate) fn set_events(&self, sink: EventSink) {
        if self.events.set(sink).is_err() {
            warn!("command events have a receiver already, the second one is passed over");
        }
    }

    pub(crate) fn next_session(&self) -> u64 {
        self.sessions.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn slot(&self, key: Key) -> Arc<Slot> {
        let mut slots = self.slots.lock();
        let slot = slots
            .entry(key)
            .or_insert_with(|| Arc::new(Slot { key, content: AsyncMutex::default() }));
        Arc::clone(slot)
    }

    pub(crate) fn all_slots(&self) -> Vec<Arc<Slot>> {
        self.slots.lock().values().cloned().collect()
    }

    pub(crate) fn known_slot(&self, key: Key) -> Option<Arc<Slot>> {
        self.slots.lock().get(&key).cloned()
    }

    /// Lets go of a slot; the last one who does takes an empty one away.
    pub(crate) fn release(&self, slot: Arc<Slot>) {
        let mut slots = self.slots.lock();
        // Clones are made under this lock: two are the map's and ours.
        if Arc::strong_count(&slot) > 2 {
            return;
        }
        let empty = slot.content.try_lock().is_ok_and(|content| {
            content.session.is_none() && content.in_flight.is_none() && content.unwritten.is_empty()
        });
        if empty {
            slots.remove(&slot.key);
        }
    }

    pub(crate) fn track(&self, known: &Known) {
        let command = &known.object;
        let entry = ((command.account, command.device), known.revision);
        self.tracked.lock().insert(command.id, entry);
    }

    fn untrack(&self, id: CommandId) {
        self.tracked.lock().remove(&id);
    }

    /// Hands the oldest waiting command to the session, if there is one that has nothing in hand. False if the
    /// registry does not answer: then it is tried again within a second.
    ///
    /// It is `sent` in the registry before it is handed over. So of those who want to send, cancel or expire it one
    /// is first, on whichever node, and the others see that they were not.
    pub(crate) async fn dispatch(&self, slot: &Slot, content: &mut Content) -> bool {
        if !self.write_again(content).await {
            return false;
        }
        if content.session.is_some() && !content.loaded && !self.load(slot, content).await {
            return false;
        }
        loop {
            if content.session.is_none() {
                return true;
            }
            // A device has one in flight at a time, be it on another node's connection.
            if content.in_flight.is_some() || !content.foreign.is_empty() {
                return true;
            }
            let now = self.clock.now();
            // Those that have expired are finished by `expire`, within a second.
            let fresh = |waiting: &Waiting| waiting.known.object.expires_at > now;
            let Some(at) = content.waiting.iter().position(fresh) else { return true };
            let Some(Waiting { known, claim }) = content.waiting.remove(at) else { return true };
            let doubt = claim.is_some();
            let claim = claim.unwrap_or_else(|| claimed(&known.object, now));
            match self.write(&claim, &known, doubt).await {
                Written::Done(taken) => {
                    self.hand_over(content, taken, known.object);
                    return true;
                }
                Written::Lost(found) => self.heard(content, known.object.id, found),
                Written::Unknown => {
                    content.waiting.push_front(Waiting { known, claim: Some(claim) });
                    return false;
                }
            }
        }
    }

    /// Gives a command, which stands in the registry as `taken`, to the session.
    pub(crate) fn hand_over(&self, content: &mut Content, taken: Known, before: Command) {
        let Some(session) = &content.session else { return };
        self.track(&taken);
        let connection = session.connection;
        let dispatch = Dispatch { command: before.clone() };
        if session.dispatches.try_send(dispatch).is_err() {
            debug!(command = %before.id, "the connection ends: its command waits for the next");
        }
        // If it could not be handed over its guard will tell, and it waits again.
        content.in_flight =
            Some(InFlight { known: taken, before, connection, on_wire: false, over: false });
    }

    /// A new command as it is taken to be sent, where it can be at once: the device is held here, and nothing is before
    /// it. It is created so, which saves a write of the three that a command takes.
    pub(crate) fn claim_at_once(&self, content: &Content, new: &Command) -> Option<Command> {
        let Content { session, loaded, waiting, in_flight, foreign, unwritten, doubtful } = content;
        let held = session.as_ref().is_some_and(|session| !session.dispatches.is_closed());
        let first = waiting.is_empty() && in_flight.is_none() && foreign.is_empty();
        let certain = *loaded && unwritten.is_empty() && doubtful.is_none();
        (held && first && certain).then(|| claimed(new, self.clock.now()))
    }

    /// It is not known whether `claim` was created. If it was, it will be heard of, and sent then.
    pub(crate) fn doubt(&self, content: &mut Content, claim: Command) {
        content.doubtful = Some(claim);
    }

    pub(crate) async fn attach(
        self: Arc<Self>,
        key: Key,
        connection: ConnectionId,
        number: u64,
        dispatches: mpsc::Sender<Dispatch>,
        known: oneshot::Sender<()>,
    ) {
        let slot = self.slot(key);
        let mut content = slot.content.lock().await;
        // A session with a higher number came by another thread and is newer; one that has ended meanwhile will not
        // be told of again.
        let newer = content.session.as_ref().is_none_or(|session| session.number < number);
        if newer && !dispatches.is_closed() {
            self.unload(&mut content);
            content.session = Some(Session { number, connection, dispatches });
            // Whoever attaches waits for this much only.
            known.send(()).unwrap_or_default();
            self.lose(&mut content).await;
            self.dispatch(&slot, &mut content).await;
        }
        drop(content);
        self.release(slot);
    }

    pub(crate) async fn detach(&self, key: Key, number: u64) {
        let Some(slot) = self.known_slot(key) else { return };
        let mut content = slot.content.lock().await;
        if content.session.as_ref().is_some_and(|session| session.number == number) {
            content.session = None;
            self.unload(&mut content);
            self.lose(&mut content).await;
        }
        drop(content);
        self.release(slot);
    }

    /// Forgets what waits: the registry has it.
    fn unload(&self, content: &mut Content) {
        content.loaded = false;
        // What is read as sent then counts as lost.
        content.doubtful = None;
        for Waiting { known, claim } in content.waiting.drain(..) {
            self.untrack(known.object.id);
            // It may stand there as sent, and nobody has it.
            if let Some(claim) = claim {
                let wanted = known.object.clone();
                let base = Known { object: claim, revision: known.revision };
                content.unwritten.push(Unwritten { wanted, base });
            }
        }
        content.foreign.drain(..).for_each(|foreign| self.untrack(foreign.id));
    }

    /// Reads what waits for a device that has just been attached. What is on the wire there was sent by a connection
    /// that this one took the place of, so it is lost. False if the registry does not answer.
    async fn load(&self, slot: &Slot, content: &mut Content) -> bool {
        if self.surely_none(slot.key) {
            content.loaded = true;
            return true;
        }
        let (account, device) = slot.key;
        let mut found: HashMap<CommandId, Known> = HashMap::new();
        // Twice, since the lists are not of one instant: what goes from one to the other meanwhile is in one of three.
        for status in ["queued", "sent", "queued"] {
            let mut page = Page::first(4 * LocalCommands::WAITING_MAX);
            page.equals.push(("device".to_owned(), device.to_string().into()));
            page.equals.push(("status".to_owned(), status.into()));
            match self.registry.list_objects::<Command>(account, &page).await {
                Ok(list) => {
                    for known in list {
                        let newer = found
                            .get(&known.object.id)
                            .is_none_or(|before| before.revision < known.revision);
                        if newer {
                            found.insert(known.object.id, known);
                        }
                    }
                }
                Err(error) => {
                    warn!(%error, %device, "waiting commands cannot be read yet");
                    return false;
                }
            }
        }
        content.loaded = true;
        let mut found: Vec<Known> = found.into_values().collect();
        found.sort_by_key(|known| (known.object.created_at, known.revision));
        for known in found {
            let id = known.object.id;
            let has = content.in_flight.as_ref().is_some_and(|f| f.known.object.id == id)
                || content.unwritten.iter().any(|u| u.wanted.id == id);
            if has {
                continue;
            }
            match known.object.status {
                CommandStatus::Queued => self.enqueue(content, known),
                CommandStatus::Sent => self.again(content, known, None).await,
                _ => {}
            }
        }
        true
    }

    /// Puts a queued command where its age belongs.
    fn enqueue(&self, content: &mut Content, known: Known) {
        if content.session.is_none() || !content.loaded {
            return;
        }
        self.track(&known);
        let older = |waiting: &Waiting| waiting.known.object.created_at <= known.object.created_at;
        let at = content.waiting.iter().rposition(older).map_or(0, |at| at + 1);
        content.waiting.insert(at, Waiting { known, claim: None });
    }

    /// How many of a device's commands are not finished, if that is known here.
    pub(crate) fn count_here(content: &Content) -> Option<usize> {
        let known = content.session.is_some() && content.loaded;
        known.then(|| {
            let in_flight = content.in_flight.iter().filter(|in_flight| !in_flight.over).count();
            content.waiting.len() + content.foreign.len() + in_flight
        })
    }

    /// A command was created here.
    pub(crate) async fn created(self: Arc<Self>, key: Key, known: Known) {
        let Some(slot) = self.known_slot(key) else { return };
        let mut content = slot.content.lock().await;
        if !self.has(&content, known.object.id) {
            self.enqueue(&mut content, known);
        }
        self.dispatch(&slot, &mut content).await;
        drop(content);
        self.release(slot);
    }

    fn has(&self, content: &Content, id: CommandId) -> bool {
        content.waiting.iter().any(|waiting| waiting.known.object.id == id)
            || content.in_flight.as_ref().is_some_and(|f| f.known.object.id == id)
            || content.foreign.iter().any(|foreign| foreign.id == id)
            || content.unwritten.iter().any(|unwritten| unwritten.wanted.id == id)
    }

    /// Something changed a command of a device that is held here: reads it again.
    pub(crate) async fn reconcile(self: Arc<Self>, key: Key, id: CommandId) {
        let Some(slot) = self.known_slot(key) else { return };
        let mut content = slot.content.lock().await;
        if content.session.is_some() && content.loaded {
            match self.registry.get_object::<Command>(key.0, id.0).await {
                Ok(found) => self.heard(&mut content, id, found),
                // What was missed is read with all the rest.
                Err(error) => {
                    warn!(%error, command = %id, "a command that changed cannot be read yet");
                    self.unload(&mut content);
                }
            }
        }
        self.dispatch(&slot, &mut content).await;
        drop(content);
        self.release(slot);
    }

    /// Takes over how a command stands in the registry.
    fn heard(&self, content: &mut Content, id: CommandId, found: Option<Known>) {
        let found = found.filter(|known| !known.object.status.is_final());
        if let Some(in_flight) = &mut content.in_flight
            && in_flight.known.object.id == id
        {
            // Whatever was done to it, this node did not: the link still has it in hand, and the next waits until it
            // lets go.
            let own = |known: &Known| known.revision <= in_flight.known.revision;
            if !found.as_ref().is_some_and(own) {
                in_flight.over = true;
            }
            return;
        }
        // It is about to be written, and will be seen then.
        if content.unwritten.iter().any(|unwritten| unwritten.wanted.id == id) {
            return;
        }
        let before = content.waiting.iter().find(|waiting| waiting.known.object.id == id);
        if before.is_some_and(|w| found.as_ref().is_some_and(|f| f.revision <= w.known.revision)) {
            return;
        }
        let doubtful = content.doubtful.take_if(|doubtful| doubtful.id == id);
        let claim = before.and_then(|waiting| waiting.claim.clone()).or(doubtful);
        content.waiting.retain(|waiting| waiting.known.object.id != id);
        let revision = found.as_ref().map(|known| known.revision);
        let as_before = |f: &&Foreign| f.id == id && Some(f.revision) == revision;
        let since = content.foreign.iter().find(as_before).map(|f| f.since);
        content.foreign.retain(|foreign| foreign.id != id);
        // Nobody is attached, or all is about to be read.
        let found = found.filter(|_| content.session.is_some() && content.loaded);
        match found {
            None => self.untrack(id),
            Some(known) if known.object.status == CommandStatus::Queued => {
                self.enqueue(content, known);
            }
            // The try that was in doubt: it was written.
            Some(known) if claim.as_ref().is_some_and(|claim| same(claim, &known.object)) => {
                self.track(&known);
                content.waiting.push_front(Waiting { known, claim });
            }
            Some(known) => {
                self.track(&known);
                let since = since.unwrap_or_else(Instant::now);
                content.foreign.push(Foreign { id, revision: known.revision, since });
            }
        }
    }

    pub(crate) async fn report(
        &self,
        account: AccountId,
        connection: ConnectionId,
        id: CommandId,
        outcome: Outcome,
    ) {
        // From memory: were the registry asked and failed, the device would get no command more.
        let key = self.tracked.lock().get(&id).map(|(key, _)| *key);
        let Some(key) = key.filter(|key| key.0 == account) else { return };
        let Some(slot) = self.known_slot(key) else { return };
        let mut content = slot.content.lock().await;
        let holds = |f: &InFlight| f.known.object.id == id && f.connection == connection;
        if content.in_flight.as_ref().is_some_and(holds) {
            self.settle(&slot, &mut content, outcome).await;
        }
        drop(content);
        self.release(slot);
    }

    /// Takes over what became of the command in flight.
    async fn settle(&self, slot: &Slot, content: &mut Content, outcome: Outcome) {
        if outcome == Outcome::Sent {
            if let Some(in_flight) = &mut content.in_flight
                && !in_flight.over
            {
                in_flight.on_wire = true;
                self.tell(&in_flight.known.object);
            }
            return;
        }
        if outcome == Outcome::Lost {
            self.lose(content).await;
        } else if let Some(in_flight) = content.in_flight.take() {
            self.untrack(in_flight.known.object.id);
            if !in_flight.over {
                let now = self.clock.now();
                let wanted = match outcome {
                    Outcome::Failed(text) => {
                        let failed = CommandStatus::Failed;
                        finished(in_flight.as_it_was(), failed, Some(cut(text)), now)
                    }
                    Outcome::Answered(text) => {
                        let command = in_flight.known.object.clone();
                        let mut wanted = finished(command, CommandStatus::Answered, None, now);
                        wanted.answer = Some(cut(text));
                        wanted
                    }
                    Outcome::Sent | Outcome::Lost => in_flight.as_it_was(),
                };
                self.put(content, in_flight.known, wanted).await;
            }
        }
        self.dispatch(slot, content).await;
    }

    /// The command in flight got no answer: it waits again, in front, or is over.
    async fn lose(&self, content: &mut Content) {
        let Some(in_flight) = content.in_flight.take() else { return };
        self.untrack(in_flight.known.object.id);
        if !in_flight.over {
            let was = in_flight.as_it_was();
            self.again(content, in_flight.known, Some(was)).await;
        }
    }

    /// Lets a command that was on the wire wait for another try, as it `was` there, if it is worth one.
    async fn again(&self, content: &mut Content, base: Known, was: Option<Command>) {
        let mut wanted = was.unwrap_or_else(|| base.object.clone());
        let now = self.clock.now();
        if wanted.expires_at <= now {
            wanted.status = CommandStatus::Expired;
            wanted.finished_at = Some(now);
        } else if wanted.attempts >= LocalCommands::ATTEMPTS_MAX {
            wanted.status = CommandStatus::Failed;
            wanted.error = Some(format!("sent {} times without an answer", wanted.attempts));
            wanted.finished_at = Some(now);
        } else {
            wanted.status = CommandStatus::Queued;
        }
        self.put(content, base, wanted).await;
    }

    /// Writes what became of a command, now or when the registry is back.
    async fn put(&self, content: &mut Content, base: Known, wanted: Command) {
        match self.write(&wanted, &base, false).await {
            Written::Done(known) => self.was_put(content, known),
            Written::Lost(found) => {
                debug!(command = %wanted.id, "somebody else was first with a command");
                self.heard(content, wanted.id, found);
            }
            Written::Unknown => content.unwritten.push(Unwritten { wanted, base }),
        }
    }

    fn was_put(&self, content: &mut Content, known: Known) {
        self.tell(&known.object);
        if known.object.status == CommandStatus::Queued {
            self.enqueue(content, known);
        }
    }

    /// Writes what could not be written before. False if the registry still does not answer.
    async fn write_again(&self, content: &mut Content) -> bool {
        while let Some(Unwritten { wanted, base }) = content.unwritten.pop() {
            match self.write(&wanted, &base, true).await {
                Written::Done(known) => self.was_put(content, known),
                Written::Lost(found) => self.heard(content, wanted.id, found),
                Written::Unknown => {
                    content.unwritten.push(Unwritten { wanted, base });
                    return false;
                }
            }
        }
        true
    }

    /// Finishes what has expired here and tries again what the registry was not told. False if it does not answer.
    pub(crate) async fn tend(&self, slot: &Slot, content: &mut Content) -> bool {
        let now = self.clock.now();
        let expired = |command: &Command| command.expires_at <= now;
        while let Some(at) = content.waiting.iter().position(|w| expired(&w.known.object)) {
            let Some(Waiting { known, claim }) = content.waiting.remove(at) else { break };
            self.untrack(known.object.id);
            let base = match claim {
                Some(claim) => Known { object: claim, revision: known.revision },
                None => known,
            };
            let wanted = finished(base.object.clone(), CommandStatus::Expired, None, now);
            self.put(content, base, wanted).await;
        }
        if let Some(in_flight) = &mut content.in_flight
            && !in_flight.over
            && expired(&in_flight.known.object)
        {
            // The link still has it in hand: the next waits until it lets go.
            in_flight.over = true;
            let base = in_flight.known.clone();
            let wanted = finished(base.object.clone(), CommandStatus::Expired, None, now);
            match self.write(&wanted, &base, false).await {
                Written::Done(known) => self.tell(&known.object),
                Written::Lost(_) => {}
                Written::Unknown => content.unwritten.push(Unwritten { wanted, base }),
            }
        }
        // By now it was created or never will be.
        content.doubtful.take_if(|doubtful| expired(doubtful));
        let silent = |foreign: &Foreign| foreign.since.elapsed() >= FOREIGN_MAX;
        let dead = content.foreign.iter().find(|f| silent(f)).map(|f| (f.id, f.revision));
        if let Some((id, revision)) = dead {
            content.foreign.retain(|foreign| foreign.id != id);
            self.untrack(id);
            match self.registry.get_object::<Command>(slot.key.0, id.0).await {
                Ok(Some(known)) if known.revision == revision => {
                    self.again(content, known, None).await;
                }
                Ok(found) => self.heard(content, id, found),
                Err(_) => self.unload(content),
            }
        }
        self.dispatch(slot, content).await
    }
}

/// A command as it is taken to be sent.
fn claimed(command: &Command, now: Timestamp) -> Command {
    let mut claim = command.clone();
    claim.status = CommandStatus::Sent;
    claim.sent_at = Some(now);
    claim.attempts += 1;
    claim
}

impl InFlight {
    /// The command without the attempt, if that was not made.
    fn as_it_was(&self) -> Command {
        if self.on_wire { self.known.object.clone() } else { self.before.clone() }
    }
}

/// Ends a session when dropped, from whatever thread.
pub(crate) struct Guard {
    inner: Weak<Inner>,
    key: Key,
    number: u64,
}

impl Guard {
    pub(crate) fn new(
        inner: &Arc<Inner>,
        account: AccountId,
        device: DeviceId,
        number: u64,
    ) -> Self {
        Self { inner: Arc::downgrade(inner), key: (account, device), number }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let Some(inner) = self.inner.upgrade() else { return };
        let (key, number) = (self.key, self.number);
        let runtime = inner.runtime.clone();
        runtime.spawn(async move { inner.detach(key, number).await });
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.tasks.get_mut().iter().for_each(AbortHandle::abort);
    }
}
