use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::place::Place;
use super::postgres::binaries;
use super::process::{Launch, Process, find, free_port, ran};

/// Longest that members may take to have a leader and a standby.
const SETTLE_MAX: Duration = Duration::from_secs(150);
/// Longest that a PostgreSQL may take to end when told to at once.
const END_MAX: Duration = Duration::from_secs(5);
/// What is shipped.
const SHIPPED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/postgres/patroni.yml");
/// What [`Pace::Quick`] changes of it. The lists replace those that are shipped.
const QUICK: &str = "
bootstrap:
  dcs:
    ttl: 10
    loop_wait: 1
    retry_timeout: 3
    postgresql: {parameters: {fsync: \"off\"}}
  initdb: [{encoding: UTF8}, {locale: C.UTF-8}, data-checksums, no-sync]
";

/// How soon a failover comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// As `deploy/postgres/patroni.yml` says.
    Shipped,
    /// Half of that, and nothing waits for a disk: for tests, whose machines do not lose power.
    Quick,
}

/// PostgreSQL servers under Patroni, as `deploy/postgres/patroni.yml` ships them: one leads, a commit waits for one
/// standby, and only that one is promoted.
pub struct Patroni {
    members: Vec<Database>,
    password: String,
}

/// One PostgreSQL server with its Patroni.
pub struct Database {
    /// Patroni. A signal to it alone leaves PostgreSQL as it is: see [`Database::kill`] and [`Database::pause`].
    pub process: Process,
    port: u16,
    folder: TempDir,
}

impl Patroni {
    /// Starts three here, quick, which agree through the etcd at `etcd_hosts` (see `EtcdCluster::hosts`). Returns once one
    /// leads and one is its standby.
    ///
    /// # Panics
    ///
    /// When they cannot be started.
    #[must_use]
    pub fn start(etcd_hosts: &[String]) -> Self {
        Self::start_at(&[Place::here(), Place::here(), Place::here()], etcd_hosts, Pace::Quick)
    }

    /// Starts one at each of `places`, called `db-1` and so on, which agree through the etcd at `etcd_hosts` (such as
    /// `127.0.0.1:40123`). Returns once one leads and one is its standby.
    ///
    /// # Panics
    ///
    /// When they cannot be started.
    #[must_use]
    pub fn start_at(places: &[Place], etcd_hosts: &[String], pace: Pace) -> Self {
        let password = secret();
        let start = |(number, place)| database(number, place, etcd_hosts, &password, pace);
        let members = (1..).zip(places).map(start).collect();
        let mut all = Self { members, password: password.clone() };
        all.settled();
        all
    }

    /// A member, counted from 0, for faults.
    ///
    /// # Panics
    ///
    /// When there is no such member.
    #[must_use]
    pub fn member(&mut self, at: usize) -> &mut Database {
        let count = self.members.len();
        self.members.get_mut(at).unwrap_or_else(|| panic!("there is no member {at}, but {count}"))
    }

    /// All members.
    #[must_use]
    pub fn members(&self) -> &[Database] {
        &self.members
    }

    /// Which member takes writes, counted from 0: Patroni says so only of who holds the leader's lease.
    #[must_use]
    pub fn leader(&self) -> Option<usize> {
        self.members.iter().position(|member| member.says("/primary"))
    }

    /// Which member has every confirmed commit beside the leader, counted from 0.
    #[must_use]
    pub fn standby(&self) -> Option<usize> {
        self.members.iter().position(|member| member.says("/synchronous"))
    }

    /// Waits until one leads and one is its standby, and returns who leads.
    ///
    /// # Panics
    ///
    /// When it takes too long.
    pub fn settled(&mut self) -> usize {
        let began = Instant::now();
        loop {
            if let (Some(leader), Some(standby)) = (self.leader(), self.standby())
                && leader != standby
                && self.members.get(leader).is_some_and(Database::takes_writes)
            {
                return leader;
            }
            self.in_time(began, "a leader and a standby that commits wait for");
        }
    }

    /// Waits until every member runs, one leads and one is its standby, and returns who leads.
    ///
    /// # Panics
    ///
    /// When it takes too long.
    pub fn whole(&mut self) -> usize {
        let began = Instant::now();
        while !self
            .members
            .iter()
            .all(|member| member.says("/readiness") || member.says("/replica"))
        {
            self.in_time(began, "every member to run");
        }
        self.settled()
    }

    /// Waits a little, or panics with what the members say if it has been too long.
    fn in_time(&mut self, began: Instant, what: &str) {
        if began.elapsed() > SETTLE_MAX {
            let mut said = String::new();
            for member in &self.members {
                let place = member.process.place();
                let answer = place.ask(member.rest_port(), "/patroni", None);
                let answer = answer.map_or_else(|| "no answer".to_owned(), |(_, text)| text);
                // Writing to a text cannot fail.
                let log = member.process.log();
                writeln!(said, "{} ({}): {answer}", member.process.name(), log.display())
                    .unwrap_or_default();
            }
            panic!("waited {} s for {what}:\n{said}", SETTLE_MAX.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    }

    /// Where all members are, for the superuser `postgres`: a client has to find out who takes writes.
    #[must_use]
    pub fn url(&self) -> String {
        self.url_of("postgres", &self.password, "postgres")
    }

    fn url_of(&self, user: &str, password: &str, database: &str) -> String {
        let host =
            |member: &Database| format!("{}:{}", member.process.place().address(), member.port);
        let hosts: Vec<String> = self.members.iter().map(host).collect();
        format!("postgres://{user}:{password}@{}/{database}", hosts.join(","))
    }

    /// Makes a user and a database of its own, both called `name`, and returns its URL.
    ///
    /// # Panics
    ///
    /// When it cannot be made.
    #[must_use]
    pub fn make_database(&mut self, name: &str) -> String {
        let password = secret();
        self.sql(&format!("CREATE ROLE {name} LOGIN PASSWORD '{password}'"));
        self.sql(&format!("CREATE DATABASE {name} OWNER {name}"));
        self.url_of(name, &password, name)
    }

    /// Runs a statement at who leads, as superuser in the database `postgres`; rows are lines, fields parted by `|`.
    ///
    /// # Panics
    ///
    /// When nobody leads in time, or the statement fails.
    pub fn sql(&mut self, statement: &str) -> String {
        let leader = self.settled();
        let password = self.password.clone();
        self.member(leader).sql(&password, statement)
    }
}

impl Database {
    /// The port of PostgreSQL.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// The port of Patroni's HTTP: `/primary`, `/synchronous`, `/cluster`.
    #[must_use]
    pub const fn rest_port(&self) -> u16 {
        self.process.port()
    }

    /// Whether Patroni answers a question with yes.
    #[must_use]
    pub fn says(&self, path: &str) -> bool {
        let answer = self.process.place().ask(self.rest_port(), path, None);
        answer.is_some_and(|(status, _)| status == 200)
    }

    /// Whether PostgreSQL takes writes: who holds the leader's lease may not have promoted it yet.
    #[must_use]
    pub fn takes_writes(&self) -> bool {
        let answer = self.process.place().ask(self.rest_port(), "/patroni", None);
        let status: Option<serde_json::Value> =
            answer.and_then(|(_, text)| serde_json::from_str(&text).ok());
        let text = |name: &str| status.as_ref()?.get(name)?.as_str();
        // Patroni 4 calls it primary.
        matches!(text("role"), Some("master" | "primary")) && text("state") == Some("running")
    }

    fn sql(&self, password: &str, statement: &str) -> String {
        let place = self.process.place();
        let target =
            format!("host={} port={} user=postgres dbname=postgres", place.address(), self.port);
        let mut command = place.command(binaries().join("psql"));
        command.args(["-q", "-A", "-t", "-X", "-d", &target, "-c", statement]);
        ran(command.env("PGPASSWORD", password))
    }

    /// The process of PostgreSQL itself, if it runs.
    #[must_use]
    pub fn postmaster(&self) -> Option<u32> {
        let file = std::fs::read_to_string(self.folder.path().join("data/postmaster.pid")).ok()?;
        let id = file.lines().next()?.trim().parse().ok()?;
        // The file outlives a killed server, and its number may be somebody else's by now.
        let name = std::fs::read_to_string(format!("/proc/{id}/comm")).ok()?;
        (name.trim() == "postgres").then_some(id)
    }

    /// Patroni, PostgreSQL and all their children.
    fn tree(&self) -> BTreeSet<u32> {
        let mut tree: BTreeSet<u32> =
            self.process.id().into_iter().chain(self.postmaster()).collect();
        let processes = processes();
        loop {
            let before = tree.len();
            for (id, parent) in &processes {
                if tree.contains(parent) {
                    tree.insert(*id);
                }
            }
            if tree.len() == before {
                return tree;
            }
        }
    }

    /// Sends SIGKILL to Patroni, PostgreSQL and all their children, and waits until they are gone: the machine is dead.
    pub fn kill(&mut self) {
        let tree = self.tree();
        self.process.kill();
        tree.iter().for_each(|id| send(*id, Signal::KILL));
        gone(&tree, END_MAX);
    }

    /// Sends SIGKILL to PostgreSQL alone: its Patroni lives and sees it.
    pub fn kill_postgres(&self) {
        if let Some(id) = self.postmaster() {
            send(id, Signal::KILL);
        }
    }

    /// Sends SIGSTOP to Patroni, PostgreSQL and all their children: the machine stands still, its sockets stay.
    pub fn pause(&self) {
        self.tree().into_iter().for_each(|id| send(id, Signal::STOP));
    }

    /// Sends SIGCONT to all of them.
    pub fn resume(&self) {
        self.tree().into_iter().for_each(|id| send(id, Signal::CONT));
    }

    /// Kills all of it and starts it again with its data.
    ///
    /// # Panics
    ///
    /// When Patroni does not come up.
    pub fn restart(&mut self) {
        self.kill();
        self.process.start_again();
    }

    /// Kills all of it and starts it again without its data: it copies who leads.
    ///
    /// # Panics
    ///
    /// When Patroni does not come up.
    pub fn restart_empty(&mut self) {
        self.kill();
        std::fs::remove_dir_all(self.folder.path().join("data")).expect("its data can be removed");
        self.process.start_again();
    }

    /// Ends both in order: PostgreSQL first writes what it has. Longest `patience`, then it is killed.
    pub fn end(&mut self, patience: Duration) -> bool {
        self.process.end(patience)
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        self.resume();
        let tree = self.tree();
        self.process.kill();
        if let Some(id) = self.postmaster() {
            // At once, but it gives its shared memory back, which a killed one leaves behind.
            send(id, Signal::QUIT);
        }
        if !gone(&tree, END_MAX) {
            tree.iter().for_each(|id| send(*id, Signal::KILL));
            gone(&tree, END_MAX);
        }
    }
}

fn database(
    number: usize,
    place: &Place,
    etcd_hosts: &[String],
    password: &str,
    pace: Pace,
) -> Database {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = folder.path().join("config");
    std::fs::create_dir(&config).expect("the folder takes a folder");
    std::fs::copy(SHIPPED, config.join("1-shipped.yml")).expect("deploy/postgres/patroni.yml");
    if pace == Pace::Quick {
        std::fs::write(config.join("2-quick.yml"), QUICK).expect("the folder takes a file");
    }
    if rustix::process::geteuid().is_root() {
        // PostgreSQL refuses to run as root; then it runs as the user of its package.
        ran(Command::new("chown").arg("postgres").arg(folder.path()));
    }
    let (rest, port) = (free_port(), free_port());
    let at = |port: u16| format!("{}:{port}", place.address());
    let path = |path: &Path| path.to_string_lossy().into_owned();
    let program = find("patroni", "patroni");
    assert!(
        PathBuf::from("/usr/lib/python3/dist-packages/etcd").is_dir(),
        "Patroni cannot speak to etcd: install the Debian package python3-etcd, or run `cargo xtask test`"
    );
    let mut launch = Launch::new(&program, [config], folder.path(), rest);
    launch = Launch { user: Some("postgres"), ..launch.named(format!("db-{number}")).at(place) };
    let environment = [
        ("NAME", format!("db-{number}")),
        ("ETCD_HOSTS", etcd_hosts.join(",")),
        ("RESTAPI_LISTEN", at(rest)),
        ("RESTAPI_CONNECT_ADDRESS", at(rest)),
        ("POSTGRESQL_LISTEN", at(port)),
        ("POSTGRESQL_CONNECT_ADDRESS", at(port)),
        ("POSTGRESQL_DATA_DIR", path(&folder.path().join("data"))),
        ("POSTGRESQL_PGPASS", path(&folder.path().join("pgpass"))),
        ("POSTGRESQL_BIN_DIR", path(&binaries())),
        ("SUPERUSER_USERNAME", "postgres".to_owned()),
        ("SUPERUSER_PASSWORD", password.to_owned()),
        ("REPLICATION_USERNAME", "replicator".to_owned()),
        ("REPLICATION_PASSWORD", password.to_owned()),
    ];
    for (name, value) in environment {
        launch = launch.with(format!("PATRONI_{name}"), value);
    }
    Database { process: Process::spawn(launch), port, folder }
}

/// All processes with their parents.
fn processes() -> Vec<(u32, u32)> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let parent = |entry: std::fs::DirEntry| {
        let id = entry.file_name().to_str()?.parse().ok()?;
        Some((id, stat(id)?.1))
    };
    entries.filter_map(parent).collect()
}

/// State and parent of a process.
fn stat(id: u32) -> Option<(char, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The name stands in brackets, and may have brackets and spaces itself.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// Sends a signal to a process that may be gone.
fn send(id: u32, signal: Signal) {
    if let Some(id) = i32::try_from(id).ok().and_then(Pid::from_raw) {
        kill_process(id, signal).unwrap_or_default();
    }
}

/// Waits until all of `processes` are gone; whether they are after `patience`.
fn gone(processes: &BTreeSet<u32>, patience: Duration) -> bool {
    let began = Instant::now();
    // A dead one of which its parent took no note yet is gone.
    while processes.iter().any(|id| stat(*id).is_some_and(|(state, _)| state != 'Z')) {
        if began.elapsed() > patience {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

/// A password that nobody else on the machine knows.
fn secret() -> String {
    let mut bytes = [0_u8; 16];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.expect("the system has random bytes");
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
