//! A process that owns keys of a cluster and does nothing else: for the test `faults/owners.rs`, which kills, stops and
//! cuts off several of them and then compares what they noted.
//!
//! `owner NAME ETCD REDIS FOLDER KEYS` writes three files to the folder. `NAME.samples`: each millisecond, by the wall
//! clock, which keys it believes to hold. `NAME.acts`: what it did as an owner. `NAME.stale`: what it tried with the
//! epochs of keys that it had lost.

#![allow(clippy::expect_used, reason = "a program for a test ends where it cannot go on")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::ownership::{Ownership, Progress, Work};
use fieldline_contracts::{
    Clock as _, Cluster, History, Lease, NoPeers, Node, State, StateError, SystemClock,
};
use fieldline_etcd::{Config, EtcdCluster};
use fieldline_model::{AccountId, Value};
use fieldline_redis::{RedisConfig, RedisState};
use fieldline_testkit::history::ScriptedHistory;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// Rest of an owner between two acts.
const REST: Duration = Duration::from_millis(700);
/// Rest between two tries with an epoch that is over.
const TRY_AGAIN: Duration = Duration::from_millis(300);

/// What is owned now, by number of key.
type Owned = Arc<Mutex<BTreeMap<usize, Arc<Lease>>>>;

/// A file of lines.
#[derive(Clone)]
struct Notes(Arc<Mutex<File>>);

impl Notes {
    fn open(folder: &Path, name: &str) -> Self {
        let file = File::options().create(true).append(true).open(folder.join(name));
        Self(Arc::new(Mutex::new(file.expect("the folder takes a file"))))
    }

    fn write(&self, line: &str) {
        self.0.lock().write_all(line.as_bytes()).expect("the file takes a line");
    }
}

fn now_us() -> i64 {
    SystemClock.now().as_micros()
}

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, etcd, redis, folder, keys] =
        <[String; 5]>::try_from(arguments).expect("owner NAME ETCD REDIS FOLDER KEYS");
    let folder = Path::new(&folder);
    let clock = Arc::new(SystemClock);
    let cluster = EtcdCluster::connect(Config::new(vec![etcd]), clock, Arc::new(NoPeers)).await;
    let cluster = Arc::new(cluster.expect("etcd answers"));
    let node = Node {
        name: name.clone(),
        address: String::new(),
        roles: vec!["work".to_owned()],
        zone: None,
        version: String::new(),
        ready: true,
    };
    cluster.join(node).await.expect("it becomes a member");
    let config = RedisConfig { url: redis, ..RedisConfig::default() };
    let history: Arc<dyn History> = Arc::new(ScriptedHistory::new());
    let state = RedisState::connect(config, &name, history).await.expect("Redis answers");
    let state: Arc<dyn State> = Arc::new(state);

    let owned = Owned::default();
    let samples =
        File::options().create(true).append(true).open(folder.join(format!("{name}.samples")));
    let samples = samples.expect("the folder takes a file");
    std::thread::spawn({
        let owned = Arc::clone(&owned);
        move || sample(&owned, samples)
    });
    // At most one for each key and loss.
    let (lost, mut losses) = mpsc::channel(100_000);
    let stale = Notes::open(folder, &format!("{name}.stale"));
    tokio::spawn({
        let state = Arc::clone(&state);
        async move {
            while let Some((key, epoch)) = losses.recv().await {
                tokio::spawn(try_stale(Arc::clone(&state), stale.clone(), key, epoch));
            }
        }
    });
    let acts = Notes::open(folder, &format!("{name}.acts"));
    let work = Arc::new(Acting { owned, state, acts, lost });
    let ownership = Ownership {
        prefix: "work/".to_owned(),
        role: "work".to_owned(),
        node: name,
        moves_max: 50,
        stop_max: Duration::from_secs(1),
    };
    let keys: usize = keys.parse().expect("KEYS is a number");
    let keys = Arc::new((0..keys).map(|key| format!("{key:04}")).collect());
    let (_keys, wanted) = watch::channel(keys);
    let (progress, _seen) = watch::channel(Progress::default());
    ownership.run(cluster, wanted, work, progress, CancellationToken::new()).await;
}

fn account() -> AccountId {
    AccountId::from_bytes([7; 16])
}

/// Acts for each key that it owns.
struct Acting {
    owned: Owned,
    state: Arc<dyn State>,
    acts: Notes,
    lost: mpsc::Sender<(String, u64)>,
}

/// A key that is owned, until this is dropped.
struct Turn<'a> {
    work: &'a Acting,
    number: usize,
    key: String,
    epoch: u64,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.work.owned.lock().remove(&self.number);
        // Lost or given up: in both cases its epoch is over soon.
        self.work.lost.try_send((self.key.clone(), self.epoch)).expect("few keys are lost");
    }
}

impl Work for Acting {
    async fn run(&self, key: String, lease: Arc<Lease>, stop: CancellationToken) {
        let epoch = lease.epoch().0;
        let number = key.parse().expect("keys are numbers");
        self.owned.lock().insert(number, Arc::clone(&lease));
        let _turn = Turn { work: self, number, key: key.clone(), epoch };
        while !stop.is_cancelled() {
            let before = now_us();
            if !lease.is_held() {
                return;
            }
            // What it does outside; noted at once, as a driver would send a command.
            self.acts.write(&format!("act {number} {epoch} {before} {}\n", now_us()));
            let value = Value::Int(before);
            let written = self.state.status_set(account(), &key, epoch, "act", &value).await;
            let word = match written {
                Ok(_) => "written",
                Err(StateError::Superseded { .. }) => "refused",
                Err(_) => "away",
            };
            self.acts.write(&format!("{word} {number} {epoch} {before} {}\n", now_us()));
            tokio::select! {
                () = tokio::time::sleep(REST) => {}
                () = stop.cancelled() => {}
            }
        }
    }
}

/// An owner that has not heard of its loss: writes with the old epoch until it is told that it is over.
async fn try_stale(state: Arc<dyn State>, notes: Notes, key: String, epoch: u64) {
    let number: usize = key.parse().expect("keys are numbers");
    loop {
        let before = now_us();
        let value = Value::Int(-before);
        let word = match state.status_set(account(), &key, epoch, "act", &value).await {
            Ok(_) => "written",
            Err(StateError::Superseded { .. }) => "refused",
            Err(_) => "away",
        };
        notes.write(&format!("{word} {number} {epoch} {before} {}\n", now_us()));
        if word == "refused" {
            return;
        }
        tokio::time::sleep(TRY_AGAIN).await;
    }
}

/// Notes a `start`, then each millisecond what is held: `beat N BEGAN` for each look, `from KEY EPOCH ENDED` for a key that was not held
/// at the look before, `until KEY EPOCH BEGAN` with the last look at which it was.
fn sample(owned: &Owned, mut file: File) {
    let mut held: BTreeMap<usize, u64> = BTreeMap::new();
    let mut last = now_us();
    file.write_all(format!("start 0 0 {last}\n").as_bytes()).expect("the file takes a line");
    loop {
        let began = now_us();
        let now: BTreeMap<usize, u64> = {
            let owned = owned.lock();
            let held = owned.iter().filter(|(_, lease)| lease.is_held());
            held.map(|(key, lease)| (*key, lease.epoch().0)).collect()
        };
        let ended = now_us();
        let mut lines = String::new();
        for (key, epoch) in held.iter().filter(|(key, epoch)| now.get(*key) != Some(*epoch)) {
            lines.push_str(&format!("until {key} {epoch} {last}\n"));
        }
        for (key, epoch) in now.iter().filter(|(key, epoch)| held.get(*key) != Some(*epoch)) {
            lines.push_str(&format!("from {key} {epoch} {ended}\n"));
        }
        lines.push_str(&format!("beat {} 0 {began}\n", now.len()));
        file.write_all(lines.as_bytes()).expect("the file takes lines");
        (held, last) = (now, began);
        std::thread::sleep(Duration::from_millis(1));
    }
}
