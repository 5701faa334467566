//! Several nodes over one registry.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use async_trait::async_trait;
use fieldline_contracts::{
    Audit, Cluster, Dispatch, Draft, MemoryCluster, Node, Page, Record, RegistryError, SystemClock,
};
use tokio::sync::watch;
use uuid::Uuid;

use super::*;

/// A registry that answers late, or not at all, or after it has done what it was asked without saying so.
struct Moody {
    inner: Arc<MemoryRegistry>,
    away: AtomicBool,
    /// Writes to come that are made and not answered.
    unanswered: AtomicU32,
    /// Creations to come that are made and not answered.
    created_unanswered: AtomicU32,
    delay_us_max: AtomicU64,
}

impl Moody {
    fn over(inner: Arc<MemoryRegistry>) -> Arc<Self> {
        Arc::new(Self {
            inner,
            away: AtomicBool::new(false),
            unanswered: AtomicU32::new(0),
            created_unanswered: AtomicU32::new(0),
            delay_us_max: AtomicU64::new(0),
        })
    }

    async fn mood(&self) -> Result<(), RegistryError> {
        let max = self.delay_us_max.load(Ordering::Relaxed);
        if max > 0 {
            let [a, b, ..] = SystemClock.random();
            let us = u64::from(u16::from_be_bytes([a, b])) % max;
            tokio::time::sleep(Duration::from_micros(us)).await;
        }
        match self.away.load(Ordering::Relaxed) {
            true => Err(RegistryError::Unavailable("away".to_owned())),
            false => Ok(()),
        }
    }

    fn answers(left: &AtomicU32) -> bool {
        let count = |left: u32| left.checked_sub(1);
        left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, count).is_err()
    }
}

#[async_trait]
impl Registry for Moody {
    async fn create(&self, a: AccountId, d: Draft, by: &Actor) -> Result<Record, RegistryError> {
        self.mood().await?;
        let record = self.inner.create(a, d, by).await?;
        if Self::answers(&self.created_unanswered) {
            return Ok(record);
        }
        Err(RegistryError::Unavailable("the answer is lost".to_owned()))
    }

    async fn update(
        &self,
        account: AccountId,
        draft: Draft,
        expected: Option<u64>,
        actor: &Actor,
    ) -> Result<Record, RegistryError> {
        self.mood().await?;
        let record = self.inner.update(account, draft, expected, actor).await?;
        if Self::answers(&self.unanswered) {
            return Ok(record);
        }
        Err(RegistryError::Unavailable("the answer is lost".to_owned()))
    }

    async fn delete(
        &self,
        account: AccountId,
        kind: Kind,
        id: Uuid,
        expected: Option<u64>,
        actor: &Actor,
    ) -> Result<(), RegistryError> {
        self.mood().await?;
        self.inner.delete(account, kind, id, expected, actor).await
    }

    async fn get(&self, a: AccountId, k: Kind, id: Uuid) -> Result<Option<Record>, RegistryError> {
        self.mood().await?;
        self.inner.get(a, k, id).await
    }

    async fn find(
        &self,
        account: AccountId,
        kind: Kind,
        key: &str,
        value: &str,
    ) -> Result<Option<Record>, RegistryError> {
        self.inner.find(account, kind, key, value).await
    }

    async fn find_anywhere(
        &self,
        kind: Kind,
        key: &str,
        value: &str,
    ) -> Result<Option<Record>, RegistryError> {
        self.inner.find_anywhere(kind, key, value).await
    }

    async fn list(&self, a: AccountId, k: Kind, p: &Page) -> Result<Vec<Record>, RegistryError> {
        self.mood().await?;
        self.inner.list(a, k, p).await
    }

    async fn list_everywhere(&self, kind: Kind, p: &Page) -> Result<Vec<Record>, RegistryError> {
        self.mood().await?;
        self.inner.list_everywhere(kind, p).await
    }

    async fn audit(
        &self,
        account: AccountId,
        before: Option<u64>,
        limit: usize,
    ) -> Result<Vec<Audit>, RegistryError> {
        self.inner.audit(account, before, limit).await
    }

    async fn changes(&self, after: u64, limit: usize) -> Result<Vec<Audit>, RegistryError> {
        self.mood().await?;
        self.inner.changes(after, limit).await
    }

    fn watch(&self) -> watch::Receiver<u64> {
        self.inner.watch()
    }
}

/// The world's node and another, each with a registry of its own moods over the same objects.
struct Two {
    world: World,
    moods: [Arc<Moody>; 2],
    a: LocalCommands,
    b: LocalCommands,
}

async fn two() -> Two {
    let world = world().await;
    let moods = [(); 2].map(|()| Moody::over(world.registry.clone()));
    let node = |mood: &Arc<Moody>| LocalCommands::new(mood.clone(), world.clock.clone());
    let (a, b) = (node(&moods[0]), node(&moods[1]));
    Two { moods, a, b, world }
}

impl Two {
    async fn submit(&self, node: &LocalCommands, what: &str, ttl_s: u32) -> Command {
        self.world.clock.advance_micros(1_000);
        let World { account, device, .. } = self.world;
        node.submit(account, device, text(what, ttl_s), &actor()).await.unwrap()
    }

    async fn attach(&self, node: &LocalCommands, number: u8) -> (ConnectionId, SessionHandle) {
        let connection = ConnectionId::new(self.world.clock.now(), [number; 10]);
        let World { account, device, .. } = self.world;
        (connection, node.attach(account, device, connection).await)
    }

    async fn report(&self, node: &LocalCommands, by: ConnectionId, id: &Command, what: Outcome) {
        node.report(self.world.account, by, id.id, what).await;
    }

    async fn get(&self, command: &Command) -> Command {
        self.a.get(self.world.account, command.id).await.unwrap()
    }

    async fn is(&self, command: &Command, status: CommandStatus) -> Command {
        let mut seen = command.clone();
        for _ in 0..1_000 {
            seen = self.get(command).await;
            if seen.status == status {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("it is not {status:?}: {seen:?}");
    }
}

#[tokio::test]
async fn a_command_queued_on_one_node_is_sent_by_the_one_that_holds_the_device() {
    let two = two().await;
    let (connection, mut session) = two.attach(&two.b, 1).await;
    let began = tokio::time::Instant::now();
    let first = two.submit(&two.a, "a", 60).await;
    let second = two.submit(&two.a, "b", 60).await;
    assert_eq!(next(&mut session).await.unwrap().id, first.id);
    assert!(began.elapsed() < Duration::from_millis(500), "at once, not when somebody looks");
    assert!(none_waits(&mut session), "one at a time");
    let wait = two.a.wait(two.world.account, first.id, 5_000);
    let answer = async {
        two.report(&two.b, connection, &first, Outcome::Sent).await;
        two.report(&two.b, connection, &first, Outcome::Answered("yes".to_owned())).await;
    };
    let (answered, ()) = tokio::join!(wait, answer);
    assert_eq!(answered.unwrap().answer.as_deref(), Some("yes"));
    assert!(began.elapsed() < Duration::from_secs(1));
    assert_eq!(next(&mut session).await.unwrap().id, second.id);
    // Told by whoever did it, once.
    two.report(&two.b, connection, &second, Outcome::Failed("no".to_owned())).await;
    assert_eq!(two.is(&second, CommandStatus::Failed).await.attempts, 0);
}

#[tokio::test]
async fn a_command_waits_on_no_node_and_goes_where_the_device_comes() {
    let two = two().await;
    let commands = [two.submit(&two.a, "1", 60).await, two.submit(&two.b, "2", 60).await];
    assert!(two.a.inner.all_slots().is_empty() && two.b.inner.all_slots().is_empty());
    let (connection, mut session) = two.attach(&two.b, 1).await;
    for command in &commands {
        assert_eq!(next(&mut session).await.unwrap().id, command.id);
        let answered = Outcome::Answered(String::new());
        two.report(&two.b, connection, command, answered).await;
    }
    drop(session);
    for _ in 0..200 {
        if two.b.inner.all_slots().is_empty() && two.b.inner.tracked.lock().is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(two.b.inner.all_slots().is_empty() && two.b.inner.tracked.lock().is_empty());
}

#[tokio::test]
async fn a_node_that_dies_leaves_its_command_to_the_next() {
    let two = two().await;
    let (connection, mut session) = two.attach(&two.a, 1).await;
    let (sent, behind) = (two.submit(&two.b, "a", 60).await, two.submit(&two.b, "b", 60).await);
    assert_eq!(next(&mut session).await.unwrap().id, sent.id);
    two.report(&two.a, connection, &sent, Outcome::Sent).await;
    let Two { a, b, world, moods } = two;
    // Nothing that it would still say is heard.
    moods[0].away.store(true, Ordering::Relaxed);
    drop(a);
    let connection = ConnectionId::new(world.clock.now(), [2; 10]);
    let mut session = b.attach(world.account, world.device, connection).await;
    for command in [&sent, &behind] {
        assert_eq!(next(&mut session).await.unwrap().id, command.id);
        b.report(world.account, connection, command.id, Outcome::Sent).await;
        let answered = Outcome::Answered(String::new());
        b.report(world.account, connection, command.id, answered).await;
    }
    let done = b.get(world.account, sent.id).await.unwrap();
    assert_eq!((done.status, done.attempts), (CommandStatus::Answered, 2));
}

#[tokio::test]
async fn a_session_that_moves_takes_the_command_in_flight_along() {
    let two = two().await;
    let (old, mut old_session) = two.attach(&two.a, 1).await;
    let command = two.submit(&two.a, "a", 600).await;
    assert_eq!(next(&mut old_session).await.unwrap().id, command.id);
    two.report(&two.a, old, &command, Outcome::Sent).await;
    let (new, mut new_session) = two.attach(&two.b, 2).await;
    assert_eq!(next(&mut new_session).await.unwrap().id, command.id);
    two.report(&two.b, new, &command, Outcome::Sent).await;
    // What the old one still says is passed over, and so is its end.
    two.report(&two.a, old, &command, Outcome::Answered("old".to_owned())).await;
    drop(old_session);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(two.get(&command).await.status, CommandStatus::Sent);
    two.report(&two.b, new, &command, Outcome::Answered("new".to_owned())).await;
    let done = two.is(&command, CommandStatus::Answered).await;
    assert_eq!((done.answer.as_deref(), done.attempts), (Some("new"), 2));
}

/// Two nodes that both believe to hold the device: each command is sent once, by either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_who_hold_the_device_one_sends() {
    let two = two().await;
    two.moods.iter().for_each(|mood| mood.delay_us_max.store(2_000, Ordering::Relaxed));
    let sent: Arc<Mutex<HashMap<String, u32>>> = Arc::default();
    let mut links = Vec::new();
    for (number, node) in [(1, &two.a), (2, &two.b)] {
        let (connection, session) = two.attach(node, number).await;
        let (node, sent, account) = (node.clone(), sent.clone(), two.world.account);
        links.push(tokio::spawn(async move {
            // With its guard, which a part alone would leave behind.
            let mut session = session;
            while let Some(Dispatch { command }) = session.dispatches.recv().await {
                let what = command.params.get("text").and_then(Value::as_str).unwrap().to_owned();
                *sent.lock().entry(what).or_insert(0) += 1;
                node.report(account, connection, command.id, Outcome::Sent).await;
                let answered = Outcome::Answered(String::new());
                node.report(account, connection, command.id, answered).await;
            }
        }));
    }
    let mut commands = Vec::new();
    for number in 0..60 {
        let node = if number % 2 == 0 { &two.a } else { &two.b };
        commands.push(two.submit(node, &number.to_string(), 600).await);
    }
    for command in &commands {
        let done = two.is(command, CommandStatus::Answered).await;
        assert_eq!(done.attempts, 1, "{done:?}");
    }
    let sent = sent.lock();
    assert_eq!(sent.len(), 60);
    assert!(sent.values().all(|times| *times == 1), "{sent:?}");
    links.iter().for_each(tokio::task::JoinHandle::abort);
}

/// A cancel that returned ok was before the command was sent; one that was too late says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_command_is_not_sent() {
    let two = two().await;
    two.moods.iter().for_each(|mood| mood.delay_us_max.store(300, Ordering::Relaxed));
    let (connection, mut session) = two.attach(&two.b, 1).await;
    let (sent, into) = (Arc::new(Mutex::new(HashMap::new())), two.world.account);
    let link = tokio::spawn({
        let (sent, node) = (sent.clone(), two.b.clone());
        async move {
            while let Some(Dispatch { command }) = session.dispatches.recv().await {
                sent.lock().insert(command.id, ());
                node.report(into, connection, command.id, Outcome::Sent).await;
                let answered = Outcome::Answered(String::new());
                node.report(into, connection, command.id, answered).await;
            }
        }
    });
    let (mut cancelled, mut late) = (Vec::new(), Vec::new());
    for round in 0_u32..300 {
        let command = two.submit(&two.a, &round.to_string(), 600).await;
        let node = if round % 2 == 0 { &two.a } else { &two.b };
        tokio::time::sleep(Duration::from_micros(u64::from(round % 16) * 100)).await;
        match node.cancel(two.world.account, command.id, &actor()).await {
            Ok(taken) => {
                assert_eq!(taken.status, CommandStatus::Cancelled);
                assert!(!sent.lock().contains_key(&command.id), "sent before it was cancelled");
                cancelled.push(command);
            }
            Err(CommandError::TooLate(_)) => late.push(command),
            Err(error) => panic!("{error}"),
        }
    }
    for command in &late {
        two.is(command, CommandStatus::Answered).await;
    }
    for command in &cancelled {
        assert_eq!(two.get(command).await.status, CommandStatus::Cancelled);
        assert!(!sent.lock().contains_key(&command.id), "sent after it was cancelled");
    }
    assert!(!cancelled.is_empty() && !late.is_empty(), "{} {}", cancelled.len(), late.len());
    link.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_bound_of_a_queue_holds_over_all_nodes() {
    let two = two().await;
    let World { account, device, .. } = two.world;
    let submits = (0..160).map(|number| {
        let node = if number % 2 == 0 { two.a.clone() } else { two.b.clone() };
        tokio::spawn(async move {
            node.submit(account, device, text(&number.to_string(), 60), &actor()).await.is_ok()
        })
    });
    let mut taken = 0;
    for submit in submits.collect::<Vec<_>>() {
        taken += usize::from(submit.await.unwrap());
    }
    assert_eq!(taken, LocalCommands::WAITING_MAX);
    let left = two.a.inner.unfinished_of((account, device)).await.unwrap();
    assert_eq!(left.len(), LocalCommands::WAITING_MAX);
}

#[tokio::test]
async fn the_owner_of_upkeep_expires_what_nobody_holds() {
    let two = two().await;
    let cluster = MemoryCluster::new();
    let clusters = [cluster.beside(), cluster.beside()].map(Arc::new);
    for (name, cluster) in ["a", "b"].iter().zip(&clusters) {
        let node = serde_json::json!({
            "name": name, "address": "", "roles": [], "version": "", "ready": true
        });
        cluster.join(serde_json::from_value::<Node>(node).unwrap()).await.unwrap();
    }
    let a = two.a.clone().with_cluster(clusters[0].clone());
    let owner = async || {
        for _ in 0..500 {
            let holders = cluster.holders(LocalCommands::UPKEEP_KEY).await.unwrap();
            if let Some(holder) = holders.get(LocalCommands::UPKEEP_KEY) {
                return holder.node.clone();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("nobody owns upkeep");
    };
    assert_eq!(owner().await, "a");
    let b = two.b.clone().with_cluster(clusters[1].clone());
    let command = two.submit(&b, "a", 10).await;
    two.world.clock.advance_micros(10_000_000);
    b.expire().await;
    assert_eq!(two.get(&command).await.status, CommandStatus::Queued, "it is not b's to do");
    let waiting = tokio::spawn({
        let (b, account) = (b.clone(), two.world.account);
        async move { b.wait(account, command.id, 5_000).await.unwrap().status }
    });
    a.expire().await;
    assert_eq!(waiting.await.unwrap(), CommandStatus::Expired);
    // The owner goes, and the other takes over.
    let command = two.submit(&a, "b", 10).await;
    clusters[0].leave().await;
    assert_eq!(owner().await, "b");
    two.world.clock.advance_micros(10_000_000);
    for _ in 0..500 {
        b.expire().await;
        if two.get(&command).await.status == CommandStatus::Expired {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the new owner expires nothing");
}

/// An answer that came while the registry was away is not lost, and the command is not sent again.
#[tokio::test(start_paused = true)]
async fn what_the_registry_could_not_be_told_is_told_later() {
    let two = two().await;
    let (connection, mut session) = two.attach(&two.b, 1).await;
    let (first, second) = (two.submit(&two.b, "a", 600).await, two.submit(&two.b, "b", 600).await);
    assert_eq!(next(&mut session).await.unwrap().id, first.id);
    two.report(&two.b, connection, &first, Outcome::Sent).await;
    two.moods[1].away.store(true, Ordering::Relaxed);
    two.report(&two.b, connection, &first, Outcome::Answered("yes".to_owned())).await;
    two.b.expire().await;
    assert_eq!(two.get(&first).await.status, CommandStatus::Sent);
    assert!(none_waits(&mut session), "what cannot be noted is not sent");
    two.moods[1].away.store(false, Ordering::Relaxed);
    two.b.expire().await;
    let done = two.get(&first).await;
    assert_eq!((done.status, done.answer.as_deref()), (CommandStatus::Answered, Some("yes")));
    assert_eq!(next(&mut session).await.unwrap().id, second.id);
    assert_eq!(two.get(&second).await.attempts, 1);
}

/// A write that was made without an answer counts once.
#[tokio::test(start_paused = true)]
async fn a_write_whose_answer_is_lost_is_recognised() {
    let two = two().await;
    let (connection, mut session) = two.attach(&two.b, 1).await;
    for (round, unanswered) in [(0, 1), (1, 2), (2, 7)] {
        two.moods[1].unanswered.store(unanswered, Ordering::SeqCst);
        let command = two.submit(&two.b, &round.to_string(), 6_000).await;
        for _ in 0..5 {
            two.b.expire().await;
        }
        assert_eq!(next(&mut session).await.unwrap().id, command.id);
        assert!(none_waits(&mut session));
        two.moods[1].unanswered.store(1, Ordering::SeqCst);
        two.report(&two.b, connection, &command, Outcome::Sent).await;
        let answered = Outcome::Answered(String::new());
        two.report(&two.b, connection, &command, answered).await;
        let done = two.is(&command, CommandStatus::Answered).await;
        assert_eq!(done.attempts, 1);
    }
}

/// Sessions come and go on three nodes while commands are queued on all: every command is answered, or was tried as
/// often as may be; none is sent after it was answered, and no try is made twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_moves_no_command_is_lost_or_doubled() {
    let world = world().await;
    let moods = [(); 3].map(|()| Moody::over(world.registry.clone()));
    let nodes: Vec<LocalCommands> = moods
        .iter()
        .map(|mood| {
            mood.delay_us_max.store(500, Ordering::Relaxed);
            LocalCommands::new(mood.clone(), world.clock.clone())
        })
        .collect();
    let (account, device) = (world.account, world.device);
    let tries: Arc<Mutex<HashMap<String, u32>>> = Arc::default();
    let submitter = tokio::spawn({
        let (nodes, clock) = (nodes.clone(), world.clock.clone());
        async move {
            let mut commands = Vec::new();
            for number in 0..80_usize {
                clock.advance_micros(1_000);
                let new = text(&number.to_string(), 3_600);
                let node = &nodes[number % 3];
                commands.push(node.submit(account, device, new, &actor()).await.unwrap());
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
            commands
        }
    });
    // The device: it is on one connection at a time, and answers every second command that it gets.
    let mut round = 0_u8;
    while !submitter.is_finished() || round < 40 {
        round = round.wrapping_add(1);
        let node = &nodes[usize::from(round) % 3];
        let connection = ConnectionId::new(world.clock.now(), [round; 10]);
        let mut session = node.attach(account, device, connection).await;
        let until = tokio::time::Instant::now() + Duration::from_millis(15);
        let mut got = u32::from(round);
        while let Ok(Some(Dispatch { command })) =
            tokio::time::timeout_at(until, session.dispatches.recv()).await
        {
            let what = command.params.get("text").and_then(Value::as_str).unwrap().to_owned();
            *tries.lock().entry(what).or_insert(0) += 1;
            node.report(account, connection, command.id, Outcome::Sent).await;
            got += 1;
            if got % 2 == 0 {
                break;
            }
            let answered = Outcome::Answered(String::new());
            node.report(account, connection, command.id, answered).await;
        }
        // The node hears of its end late, or never says a word of it.
        if round.is_multiple_of(3) {
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(30)).await;
                drop(session);
            });
        }
    }
    let commands = submitter.await.unwrap();
    // Then it stays.
    let connection = ConnectionId::new(world.clock.now(), [255; 10]);
    let mut session = nodes[0].attach(account, device, connection).await;
    while let Ok(Some(Dispatch { command })) =
        tokio::time::timeout(Duration::from_secs(1), session.dispatches.recv()).await
    {
        let what = command.params.get("text").and_then(Value::as_str).unwrap().to_owned();
        *tries.lock().entry(what).or_insert(0) += 1;
        nodes[0].report(account, connection, command.id, Outcome::Sent).await;
        let answered = Outcome::Answered(String::new());
        nodes[0].report(account, connection, command.id, answered).await;
    }
    for (number, command) in commands.iter().enumerate() {
        let done = nodes[1].get(account, command.id).await.unwrap();
        let tried = tries.lock().get(&number.to_string()).copied().unwrap_or(0);
        match done.status {
            // One that was taken by a node that let go of it untold counts as a try.
            CommandStatus::Answered => assert!(tried >= 1 && tried <= done.attempts, "{done:?}"),
            CommandStatus::Failed => assert!(done.attempts >= LocalCommands::ATTEMPTS_MAX),
            _ => panic!("number {number} is left: {done:?}"),
        }
    }
}

/// A node may send right after the device was attached elsewhere, and die before a word of it is written.
#[tokio::test(start_paused = true)]
async fn what_a_dead_node_sent_at_the_last_moment_is_taken_up_in_the_end() {
    let two = two().await;
    let (_, mut old_session) = two.attach(&two.a, 1).await;
    let (connection, mut session) = two.attach(&two.b, 2).await;
    // The new holder is not as fast.
    two.moods[1].away.store(true, Ordering::Relaxed);
    let (command, behind) =
        (two.submit(&two.a, "a", 3_600).await, two.submit(&two.a, "b", 3_600).await);
    assert_eq!(next(&mut old_session).await.unwrap().id, command.id);
    two.moods[0].away.store(true, Ordering::Relaxed);
    two.moods[1].away.store(false, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(1)).await;
    two.b.expire().await;
    assert!(none_waits(&mut session), "one is on the wire, for all that is known");
    tokio::time::sleep(Duration::from_secs(180)).await;
    two.b.expire().await;
    let again = next(&mut session).await.unwrap();
    assert_eq!((again.id, again.attempts), (command.id, 1));
    let answered = Outcome::Answered(String::new());
    two.report(&two.b, connection, &command, answered).await;
    assert_eq!(next(&mut session).await.unwrap().id, behind.id);
}

/// One node may expire what is on the wire of another: its link lets go of it in its own time.
#[tokio::test]
async fn a_command_that_another_node_ended_makes_room_when_the_link_lets_go() {
    let two = two().await;
    let (connection, mut session) = two.attach(&two.b, 1).await;
    let (first, second) = (two.submit(&two.a, "a", 10).await, two.submit(&two.a, "b", 600).await);
    assert_eq!(next(&mut session).await.unwrap().id, first.id);
    two.report(&two.b, connection, &first, Outcome::Sent).await;
    two.world.clock.advance_micros(20_000_000);
    two.a.expire().await;
    assert_eq!(two.get(&first).await.status, CommandStatus::Expired);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(none_waits(&mut session), "the link still has the first in hand");
    two.report(&two.b, connection, &first, Outcome::Answered("late".to_owned())).await;
    assert_eq!(two.get(&first).await.status, CommandStatus::Expired);
    assert_eq!(next(&mut session).await.unwrap().id, second.id);
    // And so with one whose device is gone.
    let World { account, device, ref registry, .. } = two.world;
    two.report(&two.b, connection, &second, Outcome::Sent).await;
    let third = two.submit(&two.a, "c", 600).await;
    registry.delete(account, Kind::Device, device.0, None, &actor()).await.unwrap();
    two.a.expire().await;
    for command in [&second, &third] {
        let failed = two.get(command).await;
        assert_eq!(failed.error.as_deref(), Some("the device was deleted"));
    }
    two.report(&two.b, connection, &second, Outcome::Lost).await;
    assert!(none_waits(&mut session));
    assert_eq!(two.get(&second).await.status, CommandStatus::Failed);
}

/// A command for a device that is held here and does nothing takes two writes: it is created as sent, and answered.
/// Those behind it, and those of devices that are away, take three.
#[tokio::test]
async fn a_command_for_an_idle_device_takes_two_writes() {
    let world = world().await;
    let writes = async || {
        let changes = world.registry.changes(0, 1_000).await.unwrap();
        changes.iter().filter(|change| change.kind == Kind::Command).count()
    };
    let (connection, mut session) = world.attach(1).await;
    let first = world.submit("getinfo", 60).await;
    assert_eq!((first.status, first.attempts), (CommandStatus::Queued, 0));
    let handed = next(&mut session).await.unwrap();
    assert_eq!((handed.id, handed.attempts), (first.id, 0));
    let stands = world.commands.get(world.account, first.id).await.unwrap();
    assert_eq!((stands.status, stands.attempts), (CommandStatus::Sent, 1));
    let cancelled = world.commands.cancel(world.account, first.id, &actor()).await;
    assert!(matches!(cancelled, Err(CommandError::TooLate("sent"))), "{cancelled:?}");
    let second = world.submit("getver", 60).await;
    assert!(none_waits(&mut session), "one at a time");
    world.report(connection, &first, Outcome::Sent).await;
    world.report(connection, &first, Outcome::Answered("1".to_owned())).await;
    assert_eq!(writes().await, 4, "two of the first, and the second is queued and sent");
    assert_eq!(next(&mut session).await.unwrap().id, second.id);
    world.report(connection, &second, Outcome::Sent).await;
    world.report(connection, &second, Outcome::Answered("2".to_owned())).await;
    assert_eq!(writes().await, 5);
    assert_eq!(*world.told.lock(), ["queued", "queued", "sent", "answered", "sent", "answered"]);
    for _ in 0..500 {
        if world.commands.inner.unfinished() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the index keeps commands that are over");
}

/// The connection ends between the creation of a command as sent and the wire: it waits for the next, and its try
/// does not count.
#[tokio::test]
async fn a_command_that_was_created_as_sent_is_not_lost_with_its_connection() {
    let world = world().await;
    let (_, session) = world.attach(1).await;
    let command = world.submit("getinfo", 60).await;
    drop(session);
    for _ in 0..500 {
        if world.status(&command).await == CommandStatus::Queued {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let waits = world.commands.get(world.account, command.id).await.unwrap();
    assert_eq!((waits.status, waits.attempts), (CommandStatus::Queued, 0));
    let (_, mut session) = world.attach(2).await;
    assert_eq!(next(&mut session).await.unwrap().id, command.id);
}

/// Whether a command was created is not known to its caller; if it was, it is sent once, and holds nothing up.
#[tokio::test]
async fn a_creation_whose_answer_is_lost_is_heard_of() {
    let two = two().await;
    let (connection, mut session) = two.attach(&two.a, 1).await;
    two.moods[0].created_unanswered.store(1, Ordering::SeqCst);
    let device = two.world.device;
    let new = text("unknown", 60);
    let lost = two.a.submit(two.world.account, device, new, &actor()).await;
    assert!(matches!(lost, Err(CommandError::Registry(_))), "{lost:?}");
    let sent = next(&mut session).await.unwrap();
    assert_eq!(sent.params, text("unknown", 60).params);
    two.report(&two.a, connection, &sent, Outcome::Sent).await;
    two.report(&two.a, connection, &sent, Outcome::Answered("1".to_owned())).await;
    let answered = two.is(&sent, CommandStatus::Answered).await;
    assert_eq!(answered.attempts, 1);
    let after = two.submit(&two.a, "after", 60).await;
    assert_eq!(next(&mut session).await.unwrap().id, after.id);
}
