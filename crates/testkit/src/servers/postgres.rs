use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::place::Place;
use super::process::{Launch, Process, free_port, ran};

/// A PostgreSQL server with the superuser `postgres`, who needs no password, and an empty database `postgres`.
pub struct Postgres {
    /// The process, for faults. A SIGKILL of it is a crash: it recovers from its log when started again.
    pub process: Process,
    _folder: TempDir,
}

impl Postgres {
    /// Starts it.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts it with further settings, such as `["max_connections=20"]`.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[must_use]
    pub fn start_with(settings: &[&str]) -> Self {
        Self::start_at(&Place::here(), settings)
    }

    /// Starts it at a place, with further settings.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[must_use]
    pub fn start_at(place: &Place, settings: &[&str]) -> Self {
        let (folder, port) = (tempfile::tempdir().expect("a temporary folder"), free_port());
        let (bin, data) = (binaries(), folder.path().join("data"));
        // PostgreSQL refuses to run as root; then it runs as the user of its package.
        let root = rustix::process::geteuid().is_root();
        if root {
            let mut chown = Command::new("chown");
            ran(chown.arg("postgres").arg(folder.path()));
        }
        let mut initdb = as_user(root, &bin.join("initdb"));
        initdb.current_dir(folder.path()).arg("-D").arg(&data);
        ran(initdb.args([
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale=C",
            "--no-sync",
        ]));
        // initdb lets in who connects over the loopback only.
        let access = std::fs::OpenOptions::new().append(true).open(data.join("pg_hba.conf"));
        let mut access = access.expect("initdb made this file");
        writeln!(access, "host all all {}/24 trust", place.address()).expect("it can be written");
        let mut arguments = vec!["-D".to_owned(), data.to_string_lossy().into_owned()];
        arguments.extend(["-k".to_owned(), folder.path().to_string_lossy().into_owned()]);
        arguments.extend([
            "-h".to_owned(),
            place.address().to_string(),
            "-p".to_owned(),
            port.to_string(),
        ]);
        for setting in settings {
            arguments.extend(["-c".to_owned(), (*setting).to_owned()]);
        }
        let launch = Launch::new(&bin.join("postgres"), arguments, folder.path(), port);
        let launch = Launch { user: Some("postgres"), ..launch.at(place) };
        let process = Process::launch(launch);
        let server = Self { process, _folder: folder };
        server.accepts();
        server
    }

    /// Waits until it takes queries: it listens before it has recovered.
    fn accepts(&self) {
        let mut ready = Command::new(binaries().join("pg_isready"));
        let socket = self.process.socket();
        ready.args(["-q", "-t", "30", "-h", &socket.ip().to_string()]);
        ready.args(["-p", &socket.port().to_string()]);
        for _ in 0..300 {
            if ready.status().is_ok_and(|status| status.success()) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        panic!("PostgreSQL takes no queries");
    }

    /// Kills it, children included, and starts it again with its data.
    pub fn crash(&mut self) {
        self.process.kill();
        // Its children notice that they are alone, and hold the shared memory until then.
        std::thread::sleep(std::time::Duration::from_secs(1));
        self.process.start_again();
        self.accepts();
    }

    /// Sends SIGSTOP to it and its children, which serve the connections.
    ///
    /// # Panics
    ///
    /// When the system refuses to.
    pub fn pause(&self) {
        self.process.pause();
        self.signal_children(Signal::STOP);
    }

    /// Sends SIGCONT to all of them.
    ///
    /// # Panics
    ///
    /// When the system refuses to.
    pub fn resume(&self) {
        self.signal_children(Signal::CONT);
        self.process.resume();
    }

    /// It starts no more while it is stopped itself.
    fn signal_children(&self, signal: Signal) {
        let Some(parent) = self.process.id() else { return };
        let path = format!("/proc/{parent}/task/{parent}/children");
        let children = std::fs::read_to_string(path).expect("its children are listed");
        for child in children.split_whitespace().filter_map(|id| id.parse().ok()) {
            // It may have ended meanwhile.
            Pid::from_raw(child).map(|pid| kill_process(pid, signal));
        }
    }

    /// Such as `postgres://postgres@127.0.0.1:40123/postgres`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("postgres://postgres@{}/postgres", self.process.socket())
    }
}

/// Where the newest installed version keeps its programs.
pub(super) fn binaries() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let folders = versions.map(|version| version.path().join("bin"));
    let newest = folders.filter(|folder| folder.join("initdb").is_file()).max();
    newest.expect(
        "PostgreSQL is there: install the Debian package postgresql, or run `cargo xtask test`",
    )
}

fn as_user(root: bool, program: &Path) -> Command {
    if !root {
        return Command::new(program);
    }
    let mut command = Command::new("/usr/sbin/runuser");
    command.args(["-u", "postgres", "--"]).arg(program);
    command
}
