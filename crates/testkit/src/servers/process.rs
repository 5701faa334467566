//! One server process: started, paused, killed, started again over the same folder.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::place::Place;

/// Longest that a server may take until it listens.
const START_MAX: Duration = Duration::from_secs(30);

/// A TCP port of 127.0.0.1 that nobody listens on now.
///
/// # Panics
///
/// When the system has none.
#[must_use]
pub fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("a bound socket has an address").port()
}

/// A server as it was told to run; it is killed when dropped.
pub struct Process {
    place: Place,
    program: PathBuf,
    arguments: Vec<OsString>,
    folder: PathBuf,
    port: u16,
    child: Option<Child>,
}

impl Process {
    /// Starts `program` and waits until it listens on `port` of 127.0.0.1. What it prints goes to `folder/output`.
    ///
    /// # Panics
    ///
    /// When it is not there, ends or does not listen in time: a test cannot go on.
    pub fn start<A: Into<OsString>>(
        program: &Path,
        arguments: impl IntoIterator<Item = A>,
        folder: &Path,
        port: u16,
    ) -> Self {
        Self::start_at(Place::here(), program, arguments, folder, port)
    }

    /// Starts `program` at `place` and waits until it listens on `port` there.
    ///
    /// # Panics
    ///
    /// As [`Process::start`] does.
    pub fn start_at<A: Into<OsString>>(
        place: Place,
        program: &Path,
        arguments: impl IntoIterator<Item = A>,
        folder: &Path,
        port: u16,
    ) -> Self {
        let arguments = arguments.into_iter().map(Into::into).collect();
        let (program, folder) = (program.to_owned(), folder.to_owned());
        let mut process = Self { place, program, arguments, folder, port, child: None };
        process.start_again();
        process
    }

    /// Starts it again, after [`Process::kill`], as it was started before.
    ///
    /// # Panics
    ///
    /// As [`Process::start`] does.
    pub fn start_again(&mut self) {
        self.kill();
        let path = self.folder.join("output");
        let output = std::fs::OpenOptions::new().create(true).append(true).open(&path);
        let output = output.expect("the server's folder takes a file");
        let mut command = self.place.command(&self.program);
        command.args(&self.arguments).current_dir(&self.folder).stdin(Stdio::null());
        let errors = output.try_clone().expect("a file can be opened twice");
        let child = command.stdout(output).stderr(errors).spawn();
        self.child = Some(child.unwrap_or_else(|error| {
            panic!(
                "cannot start {}: {error}; `cargo xtask test` installs it",
                self.program.display()
            )
        }));
        let began = Instant::now();
        while TcpStream::connect(self.place.socket(self.port)).is_err() {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            let printed = || std::fs::read_to_string(&path).unwrap_or_default();
            assert!(ended.is_none(), "{} ended: {}", self.program.display(), printed());
            let late = began.elapsed() > START_MAX;
            assert!(!late, "{} does not listen: {}", self.program.display(), printed());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Where it runs.
    #[must_use]
    pub const fn place(&self) -> &Place {
        &self.place
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> SocketAddr {
        self.place.socket(self.port)
    }

    /// The port on which it listens.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Sends SIGKILL and waits until it is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself; what counts is that it is gone.
            child.kill().unwrap_or_default();
            child.wait().map(|_| ()).unwrap_or_default();
        }
    }

    /// Sends SIGSTOP: it keeps its sockets and answers nothing.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Sends SIGCONT.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Sends `signal` to it; nothing if it is not running.
    ///
    /// # Panics
    ///
    /// When the system refuses to.
    pub fn signal(&self, signal: Signal) {
        let Some(child) = &self.child else { return };
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.expect("a child has an id"), signal).expect("a child can be signalled");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The first of `names` that is a file, on the path or where Debian keeps servers.
pub(super) fn find(name: &str, package: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders =
        std::env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    let found = folders.map(|folder| folder.join(name)).find(|file| file.is_file());
    found.unwrap_or_else(|| {
        panic!(
            "{name} is not there: install the Debian package {package}, or run `cargo xtask test`"
        )
    })
}
