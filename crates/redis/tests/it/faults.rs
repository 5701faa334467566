//! The server killed, emptied, stopped and cut off, under writes and reads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use fieldline_contracts::{State, StateError};
use fieldline_model::{AccountId, DeviceId, Value};
use fieldline_redis::{RedisConfig, RedisState};
use fieldline_testkit::history::ScriptedHistory;
use fieldline_testkit::servers::{Cut, Flow, Redis};
use tokio::task::JoinHandle;

use crate::support::{
    account, config, device, eventually, last, node, node_with, raw, ready, run, submit,
};

/// Longest that a submit may wait for last values: the deadline, and a shared machine.
const STALL_MAX: Duration = Duration::from_millis(900);

/// Devices that go on saying 1, 2, 3 …, while others read: what is read never goes back, and is
/// never nothing once there was something.
struct World {
    account: AccountId,
    devices: Vec<DeviceId>,
    history: Arc<ScriptedHistory>,
    stop: Arc<AtomicBool>,
    /// How far each device has come.
    said: Arc<Vec<AtomicI64>>,
    longest_us: Arc<AtomicI64>,
    unavailable: Arc<AtomicI64>,
    tasks: Vec<JoinHandle<()>>,
}

impl World {
    async fn new(history: &Arc<ScriptedHistory>, first: &RedisState) -> Self {
        let world = Self {
            account: account(),
            devices: (0..8).map(|_| device()).collect(),
            history: Arc::clone(history),
            stop: Arc::default(),
            said: Arc::new((0..8).map(|_| AtomicI64::new(1)).collect()),
            longest_us: Arc::default(),
            unavailable: Arc::default(),
            tasks: Vec::new(),
        };
        for device in &world.devices {
            submit(history, first, world.account, *device, 1).await.unwrap();
        }
        world
    }

    fn writes(&mut self, state: &Arc<RedisState>) {
        for (at, device) in self.devices.iter().copied().enumerate() {
            let (state, history, account) =
                (Arc::clone(state), Arc::clone(&self.history), self.account);
            let (stop, said, longest) =
                (Arc::clone(&self.stop), Arc::clone(&self.said), Arc::clone(&self.longest_us));
            self.tasks.push(tokio::spawn(async move {
                while !stop.load(Ordering::Acquire) {
                    let n = said[at].load(Ordering::Acquire) + 1;
                    let began = Instant::now();
                    // A failure keeps nobody from being acknowledged.
                    submit(&history, &*state, account, device, n).await.unwrap_or_default();
                    let took = i64::try_from(began.elapsed().as_micros()).unwrap();
                    longest.fetch_max(took, Ordering::AcqRel);
                    said[at].store(n, Ordering::Release);
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }));
        }
    }

    fn reads(&mut self, state: &Arc<RedisState>) {
        for device in self.devices.iter().copied() {
            let (state, account) = (Arc::clone(state), self.account);
            let (stop, unavailable) = (Arc::clone(&self.stop), Arc::clone(&self.unavailable));
            self.tasks.push(tokio::spawn(async move {
                let mut newest = 1;
                while !stop.load(Ordering::Acquire) {
                    match read(&*state, account, device).await {
                        Ok(found) => {
                            let n = found.expect("nothing, where there was something");
                            assert!(n >= newest, "{n} after {newest}");
                            newest = n;
                        }
                        Err(StateError::Unavailable(_)) => {
                            unavailable.fetch_add(1, Ordering::AcqRel);
                        }
                        Err(error) => panic!("{error}"),
                    }
                    tokio::time::sleep(Duration::from_millis(3)).await;
                }
            }));
        }
    }

    /// Stops, and looks whether all is as history has it.
    async fn ends_in_truth(self, states: &[&Arc<RedisState>]) {
        self.stop.store(true, Ordering::Release);
        for task in self.tasks {
            task.await.unwrap();
        }
        for state in states {
            ready(state).await;
            for (device, said) in self.devices.iter().zip(&*self.said) {
                let n = said.load(Ordering::Acquire);
                let found = state.value(self.account, *device, "n").await.unwrap();
                assert_eq!(found, Some(last(n, n)));
            }
        }
        let longest = Duration::from_micros(self.longest_us.load(Ordering::Acquire).unsigned_abs());
        let unavailable = self.unavailable.load(Ordering::Acquire);
        println!("longest submit {longest:?}, {unavailable} reads said that they cannot know");
        assert!(longest < STALL_MAX, "a submit waited {longest:?}");
    }
}

/// One value, by one of the three ways.
async fn read(
    state: &dyn State,
    account: AccountId,
    device: DeviceId,
) -> Result<Option<i64>, StateError> {
    let found = match rand::random_range(0..3) {
        0 => state.value(account, device, "n").await?,
        1 => state.get(account, device).await?.remove("n"),
        _ => state.get_many(account, &[device], &[]).await?.remove(0).1.remove("n"),
    };
    Ok(found.map(|last| match last.value {
        Value::Int(n) => n,
        other => panic!("{other:?}"),
    }))
}

async fn pause(ms: u64) {
    tokio::time::sleep(Duration::from_millis(ms)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_killed_and_started_empty_is_filled_again() {
    let mut redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let (a, b) = (node(&redis.url(), "a", &history).await, node(&redis.url(), "b", &history).await);
    let mut world = World::new(&history, &a).await;
    world.writes(&a);
    world.reads(&a);
    world.reads(&b);
    pause(300).await;
    redis.process.kill();
    pause(1_000).await;
    assert!(matches!(
        a.get(world.account, world.devices[0]).await,
        Err(StateError::Unavailable(_))
    ));
    assert!(!a.problems().is_empty());
    redis.restart_empty();
    let took = ready(&a).await;
    println!("killed and started empty: all can be read {took:?} after it listens");
    pause(300).await;
    world.ends_in_truth(&[&a, &b]).await;
}

/// FLUSHALL keeps connections: nothing but the marker tells of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flushed_server_never_answers_as_if_there_were_nothing() {
    let redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let (a, b) = (node(&redis.url(), "a", &history).await, node(&redis.url(), "b", &history).await);
    let mut world = World::new(&history, &a).await;
    let idle = device();
    submit(&history, &*a, world.account, idle, 7).await.unwrap();
    world.writes(&a);
    world.reads(&a);
    world.reads(&b);
    for _ in 0..3 {
        pause(200).await;
        run(&redis.url(), &["FLUSHALL"]).await;
        let began = Instant::now();
        let mut told = None;
        while told.is_none() {
            // At no instant is a device that is known without its value.
            told = b.value(world.account, idle, "n").await.ok();
            pause(1).await;
        }
        assert_eq!(told, Some(Some(last(7, 7))));
        println!("flushed: values can be read again after {:?}", began.elapsed());
    }
    world.ends_in_truth(&[&a, &b]).await;
}

/// Presence is not told before every node had the time to tell its own again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_outlive_a_flushed_server() {
    let redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let (a, b) = (node(&redis.url(), "a", &history).await, node(&redis.url(), "b", &history).await);
    let (account, device) = (account(), device());
    let connection = fieldline_model::ConnectionId::from_bytes([7; 16]);
    let at = crate::support::at(1);
    assert!(a.connected(account, device, connection, 5, "peer".to_owned(), at).await.unwrap());
    run(&redis.url(), &["FLUSHALL"]).await;
    let began = Instant::now();
    let presence = loop {
        match b.presence(account, device).await {
            Ok(presence) => break presence,
            Err(StateError::Unavailable(_)) => pause(5).await,
            Err(error) => panic!("{error}"),
        }
        assert!(began.elapsed() < crate::support::RECOVERY);
    };
    println!("flushed: presence can be read again after {:?}", began.elapsed());
    assert_eq!((presence.connection, presence.epoch), (Some(connection), 5));
    assert_eq!(presence.node.as_deref(), Some("a"));
}

/// A paused server keeps its sockets and answers nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_server_keeps_no_submit_waiting() {
    let redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let a = node(&redis.url(), "a", &history).await;
    let mut world = World::new(&history, &a).await;
    world.writes(&a);
    world.reads(&a);
    pause(300).await;
    redis.process.pause();
    pause(3_000).await;
    assert!(matches!(
        a.get(world.account, world.devices[0]).await,
        Err(StateError::Unavailable(_))
    ));
    assert!(a.waiting().0 > 0);
    redis.process.resume();
    let took = ready(&a).await;
    println!("stopped for 3 s: all can be read {took:?} after it goes on");
    assert_eq!(a.waiting(), (0, 0));
    world.ends_in_truth(&[&a]).await;
}

/// Commands arrive and are done, but no answer comes; and the other way round.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wire_held_one_way_is_made_good() {
    let redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let cut = Cut::before(redis.process.port()).await;
    let url = format!("redis://127.0.0.1:{}", cut.port());
    let a = node(&url, "a", &history).await;
    // Reads by the other see only what was written, whatever became of the answers.
    let b = node(&redis.url(), "b", &history).await;
    let mut world = World::new(&history, &a).await;
    world.writes(&a);
    world.reads(&a);
    world.reads(&b);
    for held in [Flow::ToClientHeld, Flow::ToServerHeld, Flow::Held, Flow::Refused] {
        pause(300).await;
        cut.set(held);
        pause(1_500).await;
        let word = a.get(world.account, world.devices[0]).await;
        assert!(matches!(word, Err(StateError::Unavailable(_))), "{held:?}: {word:?}");
        cut.set(Flow::Open);
        let took = ready(&a).await;
        println!("{held:?} for 1.5 s: all can be read {took:?} after it opens");
    }
    world.ends_in_truth(&[&a, &b]).await;
}

/// A server that comes back with what it had minutes ago is not believed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_with_old_data_is_filled_again() {
    let mut redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let a = node(&redis.url(), "a", &history).await;
    let (account, device) = (account(), device());
    submit(&history, &*a, account, device, 1).await.unwrap();
    run(&redis.url(), &["SAVE"]).await;
    submit(&history, &*a, account, device, 2).await.unwrap();
    redis.process.start_again();
    let old: Option<String> = redis::cmd("GET")
        .arg("fieldline:marker")
        .query_async(&mut raw(&redis.url()).await)
        .await
        .unwrap();
    println!("after the restart the marker is {old:?}");
    eventually("it is read again", || async {
        match a.value(account, device, "n").await {
            Ok(found) => {
                assert_eq!(found, Some(last(2, 2)));
                true
            }
            Err(_) => false,
        }
    })
    .await;
}

/// A server that comes back with what it had minutes ago, as a replica that took over does, lacks connections
/// and status of since: they are told again, and nothing is told before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_and_status_outlive_a_server_with_old_data() {
    let mut redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let (a, b) = (node(&redis.url(), "a", &history).await, node(&redis.url(), "b", &history).await);
    let (account, device) = (account(), device());
    let connection = |n| fieldline_model::ConnectionId::from_bytes([n; 16]);
    let at = crate::support::at;
    let peer = || "peer".to_owned();
    assert!(a.connected(account, device, connection(1), 1, peer(), at(1)).await.unwrap());
    a.status_set(account, "m", 4, "n", &Value::Int(1)).await.unwrap();
    run(&redis.url(), &["SAVE"]).await;
    assert!(a.connected(account, device, connection(2), 2, peer(), at(2)).await.unwrap());
    a.status_set(account, "m", 5, "n", &Value::Int(2)).await.unwrap();
    let before = b.status_get(account, "m").await.unwrap().values["n"].version;
    redis.process.start_again();
    let began = Instant::now();
    let presence = loop {
        match b.presence(account, device).await {
            Ok(presence) => break presence,
            Err(StateError::Unavailable(_)) => pause(5).await,
            Err(error) => panic!("{error}"),
        }
        assert!(began.elapsed() < crate::support::RECOVERY);
    };
    assert_eq!((presence.connection, presence.epoch), (Some(connection(2)), 2));
    let status = b.status_get(account, "m").await.unwrap();
    assert_eq!((status.epoch, &status.values["n"].value), (5, &Value::Int(2)));
    assert!(status.values["n"].version > before, "a version went back");
}

/// A node that has much to tell after an outage takes long for it, and is alive meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_tells_much_stays_alive() {
    let redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let cut = Cut::before(redis.process.port()).await;
    let config = RedisConfig {
        node_ttl: Duration::from_secs(3),
        ..config(&format!("redis://127.0.0.1:{}", cut.port()))
    };
    let a = node_with(config, "a", &history).await;
    let (account, device) = (account(), device());
    cut.set(Flow::Held);
    let mut n = 1;
    let mut feed = async |least: usize| {
        while a.waiting().0 < least {
            submit(&history, &*a, account, device, n).await.unwrap_err();
            n += 1;
        }
        n - 1
    };
    feed(4_000).await;
    cut.set(Flow::Open);
    let mut server = raw(&redis.url()).await;
    let alive = redis::cmd("EXISTS").arg("fieldline:n:a").to_owned();
    eventually("it is back", || async {
        let mut server = raw(&redis.url()).await;
        alive.query_async::<i64>(&mut server).await.unwrap() == 1
    })
    .await;
    // Every answer takes its time, and more comes to wait meanwhile.
    let (began, mut newest) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(7) {
        assert_eq!(alive.query_async::<i64>(&mut server).await.unwrap(), 1, "taken for dead");
        assert!(a.waiting().0 > 0, "told too quickly to prove anything");
        let mut pause_all = redis::cmd("CLIENT");
        pause_all.arg("PAUSE").arg(300).arg("ALL");
        pause_all.query_async::<()>(&mut server).await.unwrap();
        newest = feed(3_000).await;
    }
    eventually("all is told", || async { a.waiting() == (0, 0) }).await;
    ready(&a).await;
    assert_eq!(a.value(account, device, "n").await.unwrap(), Some(last(newest, newest)));
}

/// More than may wait: it is dropped here, and read from history.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_is_bounded_and_read_from_history_beyond() {
    let redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let small = RedisConfig { waiting_bytes_max: 1 << 20, ..config(&redis.url()) };
    let a = node_with(small, "a", &history).await;
    let (account, device) = (account(), device());
    submit(&history, &*a, account, device, 1).await.unwrap();
    redis.process.pause();
    for n in 2..6_000 {
        submit(&history, &*a, account, device, n).await.unwrap_err();
        assert!(a.waiting().1 <= 1 << 20);
    }
    assert_eq!(a.waiting(), (0, 0));
    redis.process.resume();
    ready(&a).await;
    assert_eq!(a.value(account, device, "n").await.unwrap(), Some(last(5_999, 5_999)));
}

/// Deleted while the server is away, a device is gone when it is back.
#[tokio::test]
async fn what_was_forgotten_meanwhile_is_gone() {
    let redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let a = node(&redis.url(), "a", &history).await;
    let (account, device) = (account(), device());
    submit(&history, &*a, account, device, 1).await.unwrap();
    redis.process.pause();
    a.forget(account, device).await.unwrap_err();
    redis.process.resume();
    ready(&a).await;
    assert_eq!(a.value(account, device, "n").await.unwrap(), None);
}

/// Memory that is full refuses writes; they wait, and no read tells what is out of date.
#[tokio::test]
async fn a_full_server_is_said() {
    let redis = Redis::start();
    let history = Arc::new(ScriptedHistory::new());
    let a = node(&redis.url(), "a", &history).await;
    let (account, device) = (account(), device());
    submit(&history, &*a, account, device, 1).await.unwrap();
    run(&redis.url(), &["CONFIG", "SET", "maxmemory", "1"]).await;
    submit(&history, &*a, account, device, 2).await.unwrap_err();
    pause(300).await;
    let word = a.value(account, device, "n").await.unwrap_err().to_string();
    assert!(word.contains("maxmemory"), "{word}");
    run(&redis.url(), &["CONFIG", "SET", "maxmemory", "0"]).await;
    ready(&a).await;
    assert_eq!(a.value(account, device, "n").await.unwrap(), Some(last(2, 2)));
}
