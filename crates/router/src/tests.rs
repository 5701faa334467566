use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::registry::RegistryExt;
use fieldline_contracts::{
    Actor, Clock, CommandError, Commands, Kind, NewCommand, Outcome, Registry, SessionHandle,
    TestClock,
};
use fieldline_model::{
    AccountId, Command, CommandStatus, ConnectionId, Device, DeviceId, Params, Timestamp, Value,
};
use fieldline_testkit::MemoryRegistry;
use parking_lot::Mutex;

use crate::LocalCommands;

mod nodes;

struct World {
    commands: LocalCommands,
    registry: Arc<MemoryRegistry>,
    clock: Arc<TestClock>,
    account: AccountId,
    device: DeviceId,
    told: Arc<Mutex<Vec<String>>>,
}

fn actor() -> Actor {
    Actor::system("test")
}

fn follow(commands: &LocalCommands) -> Arc<Mutex<Vec<String>>> {
    let told = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&told);
    commands.set_events(move |event| {
        let status = event.params.get("command.status").and_then(Value::as_str).unwrap();
        into.lock().push(status.to_owned());
    });
    told
}

async fn world() -> World {
    let clock = Arc::new(TestClock::at(Timestamp::from_seconds(1_700_000_000)));
    let registry = Arc::new(MemoryRegistry::new(clock.clone()));
    let commands = LocalCommands::new(registry.clone(), clock.clone());
    let told = follow(&commands);
    let account = AccountId::new(clock.now(), [1; 10]);
    let device = Device {
        id: DeviceId::new(clock.now(), [2; 10]),
        account,
        name: "d".to_owned(),
        ident: "1".to_owned(),
        protocol: String::new(),
        kind: String::new(),
        enabled: true,
        settings: Default::default(),
        labels: Default::default(),
        created_at: clock.now(),
    };
    registry.create_object(account, &device, &actor()).await.unwrap();
    World { commands, registry, clock, account, device: device.id, told }
}

fn text(text: &str, ttl_s: u32) -> NewCommand {
    let params: Params = serde_json::from_value(serde_json::json!({ "text": text })).unwrap();
    NewCommand { name: "text".to_owned(), params, ttl_s }
}

impl World {
    async fn submit(&self, what: &str, ttl_s: u32) -> Command {
        // Ids made within one millisecond are in no order.
        self.clock.advance_micros(1_000);
        let new = text(what, ttl_s);
        self.commands.submit(self.account, self.device, new, &actor()).await.unwrap()
    }

    async fn attach(&self, connection: u8) -> (ConnectionId, SessionHandle) {
        let connection = ConnectionId::new(self.clock.now(), [connection; 10]);
        let session = self.commands.attach(self.account, self.device, connection).await;
        (connection, session)
    }

    async fn report(&self, connection: ConnectionId, command: &Command, outcome: Outcome) {
        self.commands.report(self.account, connection, command.id, outcome).await;
    }

    async fn status(&self, command: &Command) -> CommandStatus {
        self.commands.get(self.account, command.id).await.unwrap().status
    }
}

async fn next(session: &mut SessionHandle) -> Option<Command> {
    let next = tokio::time::timeout(Duration::from_secs(5), session.dispatches.recv()).await;
    next.unwrap().map(|dispatch| dispatch.command)
}

fn none_waits(session: &mut SessionHandle) -> bool {
    session.dispatches.try_recv().is_err()
}

#[tokio::test]
async fn a_queued_command_reaches_the_device_when_it_connects() {
    let world = world().await;
    let (first, second) = (world.submit("getinfo", 60).await, world.submit("getver", 60).await);
    let (connection, mut session) = world.attach(1).await;
    assert_eq!(next(&mut session).await.unwrap().id, first.id);
    assert!(none_waits(&mut session), "one at a time");
    world.report(connection, &first, Outcome::Sent).await;
    assert_eq!(world.status(&first).await, CommandStatus::Sent);
    let waiting = tokio::spawn({
        let (commands, account, id) = (world.commands.clone(), world.account, first.id);
        async move { commands.wait(account, id, 5_000).await.unwrap() }
    });
    tokio::task::yield_now().await;
    world.report(connection, &first, Outcome::Answered("RTC:…".to_owned())).await;
    let answered = waiting.await.unwrap();
    assert_eq!(answered.answer.as_deref(), Some("RTC:…"));
    assert_eq!((answered.status, answered.attempts), (CommandStatus::Answered, 1));
    assert_eq!(next(&mut session).await.unwrap().id, second.id);
    world.report(connection, &second, Outcome::Failed("no such command".to_owned())).await;
    let failed = world.commands.get(world.account, second.id).await.unwrap();
    assert_eq!(failed.error.as_deref(), Some("no such command"));
    let list = world.commands.list(world.account, world.device, 10).await.unwrap();
    assert_eq!(list.iter().map(|c| c.id).collect::<Vec<_>>(), [second.id, first.id]);
    assert_eq!(*world.told.lock(), ["queued", "queued", "sent", "answered", "failed"]);
}

#[tokio::test]
async fn a_lost_command_is_sent_again_five_times_at_most() {
    let world = world().await;
    let command = world.submit("getinfo", 3_600).await;
    for attempt in 1..=LocalCommands::ATTEMPTS_MAX {
        let (connection, mut session) = world.attach(u8::try_from(attempt).unwrap()).await;
        assert_eq!(next(&mut session).await.unwrap().id, command.id);
        world.report(connection, &command, Outcome::Sent).await;
        drop(session);
        // The end of a session is told from its drop, so it takes a moment.
        for _ in 0..500 {
            if world.status(&command).await != CommandStatus::Sent {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let lost = world.commands.get(world.account, command.id).await.unwrap();
    assert_eq!((lost.status, lost.attempts), (CommandStatus::Failed, 5));
    assert_eq!(world.commands.inner.all_slots().len(), 0);
}

#[tokio::test]
async fn the_newest_connection_gets_the_commands() {
    let world = world().await;
    let (old, mut old_session) = world.attach(1).await;
    let command = world.submit("a", 60).await;
    assert_eq!(next(&mut old_session).await.unwrap().id, command.id);
    let (new, mut new_session) = world.attach(2).await;
    assert!(next(&mut old_session).await.is_none(), "the old one is told");
    assert_eq!(next(&mut new_session).await.unwrap().id, command.id);
    // What the old one still says is passed over, and so is its end.
    world.report(old, &command, Outcome::Answered("old".to_owned())).await;
    drop(old_session);
    tokio::time::sleep(Duration::from_millis(20)).await;
    world.report(new, &command, Outcome::Answered("new".to_owned())).await;
    let done = world.commands.get(world.account, command.id).await.unwrap();
    assert_eq!(done.answer.as_deref(), Some("new"));
}

#[tokio::test]
async fn commands_expire_waiting_and_in_flight() {
    let world = world().await;
    let (waits, stays) = (world.submit("a", 10).await, world.submit("b", 100).await);
    world.clock.advance_micros(10_000_000);
    world.commands.expire().await;
    assert_eq!(world.status(&waits).await, CommandStatus::Expired);
    let (connection, mut session) = world.attach(1).await;
    assert_eq!(next(&mut session).await.unwrap().id, stays.id);
    world.report(connection, &stays, Outcome::Sent).await;
    let behind = world.submit("c", 1_000).await;
    world.clock.advance_micros(100_000_000);
    world.commands.expire().await;
    assert_eq!(world.status(&stays).await, CommandStatus::Expired);
    assert!(none_waits(&mut session), "the link still has the first in hand");
    world.report(connection, &stays, Outcome::Lost).await;
    assert_eq!(world.status(&stays).await, CommandStatus::Expired);
    assert_eq!(next(&mut session).await.unwrap().id, behind.id);
}

#[tokio::test]
async fn the_next_command_comes_though_the_record_of_the_one_before_is_gone() {
    let world = world().await;
    let (first, second) = (world.submit("a", 60).await, world.submit("b", 60).await);
    let (connection, mut session) = world.attach(1).await;
    assert_eq!(next(&mut session).await.unwrap().id, first.id);
    world.report(connection, &first, Outcome::Sent).await;
    let (registry, id) = (&world.registry, first.id.0);
    registry.delete(world.account, Kind::Command, id, None, &actor()).await.unwrap();
    world.report(connection, &first, Outcome::Answered(String::new())).await;
    assert_eq!(next(&mut session).await.unwrap().id, second.id);
}

#[tokio::test]
async fn only_a_waiting_command_is_cancelled() {
    let world = world().await;
    let first = world.submit("a", 60).await;
    let second = world.submit("b", 60).await;
    let (_, mut session) = world.attach(1).await;
    assert_eq!(next(&mut session).await.unwrap().id, first.id);
    let late = world.commands.cancel(world.account, first.id, &actor()).await;
    assert!(matches!(late, Err(CommandError::TooLate("sent"))), "{late:?}");
    let taken = world.commands.cancel(world.account, second.id, &actor()).await.unwrap();
    assert_eq!(taken.status, CommandStatus::Cancelled);
    let again = world.commands.cancel(world.account, second.id, &actor()).await;
    assert!(matches!(again, Err(CommandError::TooLate("cancelled"))), "{again:?}");
    let other = AccountId::new(world.clock.now(), [9; 10]);
    let foreign = world.commands.cancel(other, first.id, &actor()).await;
    assert!(matches!(foreign, Err(CommandError::NotFound(_))), "{foreign:?}");
    assert!(world.commands.get(other, first.id).await.is_err());
}

#[tokio::test]
async fn the_queue_has_bounds() {
    let world = world().await;
    for _ in 0..LocalCommands::WAITING_MAX {
        world.submit("a", 60).await;
    }
    let submit = |new| world.commands.submit(world.account, world.device, new, &PANEL);
    let full = submit(text("b", 60)).await;
    assert!(matches!(full, Err(CommandError::QueueFull(100))), "{full:?}");
    for ttl in [0, LocalCommands::TTL_S_MAX + 1] {
        assert!(matches!(submit(text("b", ttl)).await, Err(CommandError::Invalid(_))));
    }
    let large = submit(text(&"x".repeat(100_000), 60)).await;
    assert!(matches!(large, Err(CommandError::Invalid(_))), "{large:?}");
    let nobody = DeviceId::new(world.clock.now(), [9; 10]);
    let unknown = world.commands.submit(world.account, nobody, text("a", 1), &actor()).await;
    assert!(matches!(unknown, Err(CommandError::NoDevice(_))), "{unknown:?}");
}

static PANEL: std::sync::LazyLock<Actor> = std::sync::LazyLock::new(actor);

#[tokio::test]
async fn the_queue_survives_a_restart() {
    let world = world().await;
    let (sent, waits) = (world.submit("a", 60).await, world.submit("b", 60).await);
    let (connection, mut session) = world.attach(1).await;
    assert_eq!(next(&mut session).await.unwrap().id, sent.id);
    world.report(connection, &sent, Outcome::Sent).await;

    let commands = LocalCommands::new(world.registry.clone(), world.clock.clone());
    assert_eq!(commands.recover().await.unwrap(), 2);
    let unfinished = commands.inner.unfinished_of((world.account, world.device)).await;
    assert_eq!(unfinished.unwrap().len(), 2);
    let mut session = commands.attach(world.account, world.device, connection).await;
    let again = next(&mut session).await.unwrap();
    assert_eq!((again.id, again.attempts), (sent.id, 1));
    let answered = Outcome::Answered(String::new());
    commands.report(world.account, connection, sent.id, answered).await;
    assert_eq!(next(&mut session).await.unwrap().id, waits.id);
}

#[tokio::test]
async fn commands_of_a_deleted_device_fail_and_old_ones_go() {
    let world = world().await;
    let command = world.submit("a", 60).await;
    let device = world.device.0;
    world.registry.delete(world.account, Kind::Device, device, None, &actor()).await.unwrap();
    world.commands.expire().await;
    let failed = world.commands.get(world.account, command.id).await.unwrap();
    assert_eq!(failed.error.as_deref(), Some("the device was deleted"));
    world.clock.advance_micros(31 * 24 * 3_600 * 1_000_000);
    world.commands.expire().await;
    assert!(world.commands.get(world.account, command.id).await.is_err());
}

#[test]
fn a_session_ends_from_any_thread() {
    let home =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let world = home.block_on(world());
    let elsewhere = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let command = elsewhere.block_on(async {
        let command = world.submit("a", 60).await;
        let (_, mut session) = world.attach(1).await;
        assert_eq!(next(&mut session).await.unwrap().id, command.id);
        command
    });
    drop(elsewhere);
    home.block_on(async {
        let mut session = loop {
            let (_, mut session) = world.attach(2).await;
            if let Some(again) = next(&mut session).await {
                assert_eq!(again.id, command.id);
                break session;
            }
        };
        assert!(none_waits(&mut session));
    });
}
