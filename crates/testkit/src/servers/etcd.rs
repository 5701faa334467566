use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::place::Place;
use super::process::{Launch, Process, find, free_port};

/// Longest that members may take to agree.
const AGREE_MAX: Duration = Duration::from_secs(60);

/// An etcd server of one member.
pub struct Etcd {
    /// The process, for faults.
    pub process: Process,
    folder: TempDir,
}

impl Etcd {
    /// Starts it.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[must_use]
    pub fn start() -> Self {
        Self::start_at(&Place::here())
    }

    /// Starts it there.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[must_use]
    pub fn start_at(place: &Place) -> Self {
        Self::run(place, &[])
    }

    /// Starts it with further options, such as `["--quota-backend-bytes", "16777216"]`; with `--cert-file` it serves by TLS.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[must_use]
    pub fn start_with(options: &[&str]) -> Self {
        Self::run(&Place::here(), options)
    }

    fn run(place: &Place, options: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (port, peer) = (free_port(), free_port());
        let peer = format!("http://{}:{peer}", place.address());
        let launch = launch("default", place, folder.path(), port, &peer);
        let mut launch = with_members(launch, &format!("default={peer}"), "new").named("etcd");
        if options.contains(&"--cert-file") {
            let plain = format!("http://{}:{port}", place.address());
            let clients = launch.arguments.iter_mut().filter(|argument| **argument == *plain);
            clients.for_each(|url| *url = plain.replace("http:", "https:").into());
        }
        launch.arguments.extend(options.iter().map(Into::into));
        Self { process: Process::launch(launch), folder }
    }

    /// Kills it and starts it again with its data.
    pub fn restart(&mut self) {
        self.process.start_again();
    }

    /// Kills it and starts it again without its data.
    ///
    /// # Panics
    ///
    /// When the data cannot be removed.
    pub fn restart_empty(&mut self) {
        self.process.kill();
        std::fs::remove_dir_all(self.folder.path().join("data")).expect("its data can be removed");
        self.process.start_again();
    }

    /// Such as `http://127.0.0.1:40123`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.process.socket())
    }
}

/// An etcd of several members, which agree while more than half of them live.
pub struct EtcdCluster {
    members: Vec<Member>,
}

struct Member {
    process: Process,
    folder: TempDir,
    /// Where the others reach it.
    peer: String,
}

impl EtcdCluster {
    /// Starts three members here.
    ///
    /// # Panics
    ///
    /// When they cannot be started.
    #[must_use]
    pub fn start() -> Self {
        Self::start_at(&[Place::here(), Place::here(), Place::here()])
    }

    /// Starts a member at each of `places` and waits until they agree. They are called `etcd-1` and so on.
    ///
    /// # Panics
    ///
    /// When they cannot be started.
    #[must_use]
    pub fn start_at(places: &[Place]) -> Self {
        let peers: Vec<String> = places
            .iter()
            .map(|place| format!("http://{}:{}", place.address(), free_port()))
            .collect();
        let all = listed((1..).zip(&peers).map(|(number, peer)| (named(number), peer)));
        let start = |(number, (place, peer)): (usize, (&Place, &String))| {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let launch = launch(&named(number), place, folder.path(), free_port(), peer);
            let process = Process::spawn(with_members(launch, &all, "new"));
            Member { process, folder, peer: peer.clone() }
        };
        // All at once: the first one waits for the second.
        let members = (1..).zip(places.iter().zip(&peers)).map(start).collect();
        let mut cluster = Self { members };
        for member in &mut cluster.members {
            member.process.listens();
        }
        for at in 0..cluster.members.len() {
            cluster.agrees(at);
        }
        cluster
    }

    /// How many members there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The process of a member, counted from 0, for faults.
    ///
    /// # Panics
    ///
    /// When there is no such member.
    #[must_use]
    pub fn process(&mut self, at: usize) -> &mut Process {
        &mut self.member(at).process
    }

    /// Where clients reach each member, such as `http://127.0.0.1:40123`.
    #[must_use]
    pub fn urls(&self) -> Vec<String> {
        self.hosts().iter().map(|host| format!("http://{host}")).collect()
    }

    /// Host and port of each member.
    #[must_use]
    pub fn hosts(&self) -> Vec<String> {
        let host = |member: &Member| member.process.socket().to_string();
        self.members.iter().map(host).collect()
    }

    /// Which member leads, counted from 0, or `None` while none that answers does.
    #[must_use]
    pub fn leader(&self) -> Option<usize> {
        self.members.iter().position(|member| {
            let status = post(&member.process, "/v3/maintenance/status", &json!({}));
            status.is_some_and(|status| {
                let leader = status.get("leader").and_then(Value::as_str);
                leader.is_some()
                    && leader == status.pointer("/header/member_id").and_then(Value::as_str)
            })
        })
    }

    /// Kills a member.
    pub fn kill(&mut self, at: usize) {
        self.process(at).kill();
    }

    /// Kills a member and starts it again with its data. Returns once it agrees with the others.
    ///
    /// # Panics
    ///
    /// When it does not come up: it cannot while fewer than half of the others live.
    pub fn restart(&mut self, at: usize) {
        self.process(at).start_again();
        self.agrees(at);
    }

    /// Kills a member and starts it again without its data: the others forget it and take it in as a new one, which is
    /// what etcd wants for a lost disk. Returns once it agrees with the others.
    ///
    /// # Panics
    ///
    /// When the others do not agree, or it does not come up.
    pub fn restart_empty(&mut self, at: usize) {
        self.kill(at);
        self.empty(at);
        let lost = named(at + 1);
        let known = self.of_others(at, "/v3/cluster/member/list", &json!({}));
        let mut members =
            known.get("members").and_then(Value::as_array).cloned().unwrap_or_default();
        let text = |member: &Value, name: &str| {
            member.pointer(name).and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        if let Some(place) = members.iter().position(|member| text(member, "/name") == lost) {
            let member = members.remove(place);
            self.of_others(at, "/v3/cluster/member/remove", &json!({"ID": text(&member, "/ID")}));
        }
        let peer = self.member(at).peer.clone();
        self.of_others(at, "/v3/cluster/member/add", &json!({"peerURLs": [peer]}));
        let others =
            members.iter().map(|member| (text(member, "/name"), text(member, "/peerURLs/0")));
        let all = listed(others.chain([(lost, peer)]));
        let process = self.process(at);
        let how = process.how();
        *how = with_members(how.clone(), &all, "existing");
        process.start_again();
        self.agrees(at);
    }

    /// Kills all members and starts them again with their data. Returns once they agree.
    ///
    /// # Panics
    ///
    /// When they do not come up.
    pub fn restart_all(&mut self) {
        self.members.iter_mut().for_each(|member| member.process.kill());
        self.start_all();
    }

    /// Kills all members and starts them again without their data, as a new cluster at the same addresses. Returns once
    /// they agree.
    ///
    /// # Panics
    ///
    /// When they do not come up.
    pub fn restart_all_empty(&mut self) {
        self.members.iter_mut().for_each(|member| member.process.kill());
        let peers: Vec<String> = self.members.iter().map(|member| member.peer.clone()).collect();
        let all = listed((1..).zip(&peers).map(|(number, peer)| (named(number), peer)));
        for at in 0..self.members.len() {
            self.empty(at);
            let how = self.process(at).how();
            *how = with_members(how.clone(), &all, "new");
        }
        self.start_all();
    }

    fn start_all(&mut self) {
        self.members.iter_mut().for_each(|member| member.process.spawn_again());
        for at in 0..self.members.len() {
            self.process(at).listens();
            self.agrees(at);
        }
    }

    /// Waits until a member takes part in a majority.
    ///
    /// # Panics
    ///
    /// When it does not in time.
    pub fn agrees(&mut self, at: usize) {
        let process = self.process(at);
        let (place, port) = (process.place().clone(), process.port());
        process.until(|| {
            // A read that a majority has to confirm.
            let read = json!({"key": "AA=="}).to_string();
            matches!(place.ask(port, "/v3/kv/range", Some(&read)), Some((200, _)))
        });
    }

    fn member(&mut self, at: usize) -> &mut Member {
        let count = self.members.len();
        self.members.get_mut(at).unwrap_or_else(|| panic!("there is no member {at}, but {count}"))
    }

    fn empty(&mut self, at: usize) {
        let data = self.member(at).folder.path().join("data");
        std::fs::remove_dir_all(data).expect("its data can be removed");
    }

    /// The first answer of a member other than `at`.
    fn of_others(&self, at: usize, path: &str, body: &Value) -> Value {
        let began = Instant::now();
        loop {
            let others = self.members.iter().enumerate().filter(|(other, _)| *other != at);
            let answer =
                others.map(|(_, member)| post(&member.process, path, body)).find_map(|one| one);
            if let Some(answer) = answer {
                return answer;
            }
            assert!(
                began.elapsed() < AGREE_MAX,
                "etcd does not answer {path}: the others are away"
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

fn post(process: &Process, path: &str, body: &Value) -> Option<Value> {
    let (status, text) = process.place().ask(process.port(), path, Some(&body.to_string()))?;
    if status == 200 { serde_json::from_str(&text).ok() } else { None }
}

fn named(number: usize) -> String {
    format!("etcd-{number}")
}

/// As `--initial-cluster` wants it.
fn listed(members: impl Iterator<Item = (String, impl AsRef<str>)>) -> String {
    let all: Vec<String> =
        members.map(|(name, peer)| format!("{name}={}", peer.as_ref())).collect();
    all.join(",")
}

fn launch(name: &str, place: &Place, folder: &Path, port: u16, peer: &str) -> Launch {
    let client = format!("http://{}:{port}", place.address());
    let arguments = [
        ["--name", name],
        ["--data-dir", "data"],
        ["--listen-client-urls", &client],
        ["--advertise-client-urls", &client],
        ["--listen-peer-urls", peer],
        ["--initial-advertise-peer-urls", peer],
        ["--logger", "zap"],
        ["--log-level", "warn"],
    ];
    // A member that was cut off makes no election when it comes back; newer versions do so by themselves. Patroni speaks
    // version 2 of the interface.
    let arguments = arguments.concat().into_iter().chain(["--pre-vote", "--enable-v2"]);
    let program = find("etcd", "etcd-server");
    Launch::new(&program, arguments, folder, port).named(name).at(place)
}

/// The same with these members in the cluster, instead of what it was told before.
fn with_members(mut launch: Launch, all: &str, state: &str) -> Launch {
    if let Some(at) = launch.arguments.iter().position(|argument| argument == "--initial-cluster") {
        launch.arguments.truncate(at);
    }
    let members = ["--initial-cluster", all, "--initial-cluster-state", state];
    launch.arguments.extend(members.map(Into::into));
    launch
}
