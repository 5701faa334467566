//! One server process: started, paused, killed, started again over the same folder.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use super::place::Place;

/// Longest that a server may take until it listens.
const START_MAX: Duration = Duration::from_secs(60);
/// Longest that one try to connect may take.
const CONNECT_MAX: Duration = Duration::from_secs(1);
/// Longest that its threads may take to stop.
const STOP_MAX: Duration = Duration::from_secs(10);
/// Of what a server has printed, as much as an error repeats.
const PRINTED_LEN_MAX: usize = 4000;

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

/// How a server is started.
#[derive(Clone, Debug)]
pub struct Launch {
    /// What it is called in errors, and by the log of [`Place::logs`].
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Set in its environment, beside what the environment of this process has.
    pub environment: Vec<(OsString, OsString)>,
    /// Where it runs. What it prints goes to `output` in there, unless [`Place::logs`] says otherwise.
    pub folder: PathBuf,
    /// Where on the network, and before what.
    pub place: Place,
    /// It has started when it listens here, at the place's address.
    pub port: u16,
    /// Who it runs as if this process is root.
    pub user: Option<&'static str>,
}

impl Launch {
    /// `program` with `arguments`, which listens on `port`, here and as who we are.
    pub fn new<A: Into<OsString>>(
        program: &Path,
        arguments: impl IntoIterator<Item = A>,
        folder: &Path,
        port: u16,
    ) -> Self {
        let name = program.file_name().unwrap_or(program.as_os_str());
        Self {
            name: name.to_string_lossy().into_owned(),
            program: program.to_owned(),
            arguments: arguments.into_iter().map(Into::into).collect(),
            environment: Vec::new(),
            folder: folder.to_owned(),
            place: Place::here(),
            port,
            user: None,
        }
    }

    /// The same, called `name`.
    #[must_use]
    pub fn named(self, name: impl Into<String>) -> Self {
        Self { name: name.into(), ..self }
    }

    /// The same, elsewhere.
    #[must_use]
    pub fn at(self, place: &Place) -> Self {
        Self { place: place.clone(), ..self }
    }

    /// The same, with one more variable in its environment.
    #[must_use]
    pub fn with(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Where it writes what it prints.
    fn log(&self) -> PathBuf {
        match self.place.logs() {
            Some(folder) => folder.join(format!("{}.log", self.name)),
            None => self.folder.join("output"),
        }
    }

    fn command(&self) -> Command {
        let user = self.user.filter(|_| rustix::process::geteuid().is_root());
        let mut command = if user.is_some() || self.place.is_tied() {
            // setpriv becomes the server, so that signals reach it and not a parent of it.
            let mut command = self.place.command("/usr/bin/setpriv");
            if let Some(user) = user {
                command.args([&format!("--reuid={user}"), &format!("--regid={user}")]);
                command.arg("--init-groups");
            }
            if self.place.is_tied() {
                command.args(["--pdeathsig", "TERM"]);
            }
            command.arg(&self.program);
            command
        } else {
            self.place.command(&self.program)
        };
        command.args(&self.arguments).envs(self.environment.iter().cloned());
        command.current_dir(&self.folder);
        if self.place.is_tied() {
            // Ctrl-C is for who started it, who then ends it in order.
            command.process_group(0);
        }
        command
    }
}

/// A server as it was told to run; it is killed when dropped.
pub struct Process {
    launch: Launch,
    child: Option<Child>,
    began: Instant,
}

impl Process {
    /// Starts `program` and waits until it listens on `port`. What it prints goes to `folder/output`.
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
        Self::launch(Launch::new(program, arguments, folder, port))
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
        Self::launch(Launch::new(program, arguments, folder, port).at(&place))
    }

    /// Starts it and waits until it listens.
    ///
    /// # Panics
    ///
    /// As [`Process::start`] does.
    #[must_use]
    pub fn launch(launch: Launch) -> Self {
        let mut process = Self::spawn(launch);
        process.listens();
        process
    }

    /// Starts it and does not wait.
    ///
    /// # Panics
    ///
    /// When it is not there.
    #[must_use]
    pub fn spawn(launch: Launch) -> Self {
        let mut process = Self { launch, child: None, began: Instant::now() };
        process.spawn_again();
        process
    }

    /// Starts it again, after [`Process::kill`], as it was started before, and waits until it listens.
    ///
    /// # Panics
    ///
    /// As [`Process::start`] does.
    pub fn start_again(&mut self) {
        self.spawn_again();
        self.listens();
    }

    /// Starts it again, as it was started before or with what was changed in [`Process::how`], and does not wait.
    ///
    /// # Panics
    ///
    /// When it is not there.
    pub fn spawn_again(&mut self) {
        self.kill();
        let path = self.launch.log();
        let output = std::fs::OpenOptions::new().create(true).append(true).open(&path);
        let output = output.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let errors = output.try_clone().expect("a file can be opened twice");
        let mut command = self.launch.command();
        let child = command.stdin(Stdio::null()).stdout(output).stderr(errors).spawn();
        self.began = Instant::now();
        self.child = Some(child.unwrap_or_else(|error| {
            panic!(
                "cannot start {}: {}: {error}; `cargo xtask test` installs it",
                self.launch.name,
                self.launch.program.display()
            )
        }));
    }

    /// Waits until it listens.
    ///
    /// # Panics
    ///
    /// When it ends or does not in time.
    pub fn listens(&mut self) {
        while TcpStream::connect_timeout(&self.socket(), CONNECT_MAX).is_err() {
            self.still_runs();
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until `holds`, which is asked again and again, while the process runs.
    ///
    /// # Panics
    ///
    /// When the process ends, or it does not hold in a minute.
    pub fn until(&mut self, mut holds: impl FnMut() -> bool) {
        self.began = Instant::now();
        while !holds() {
            self.still_runs();
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Panics with what it printed if it has ended, or takes too long.
    fn still_runs(&mut self) {
        let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
        if ended.is_none() && self.began.elapsed() < START_MAX {
            return;
        }
        let what = ended.map_or_else(
            || format!("is not there after {} s", START_MAX.as_secs()),
            |status| format!("ended ({status})"),
        );
        let (name, log) = (&self.launch.name, self.launch.log());
        panic!("{name} {what}; its log is {}{}", log.display(), last(&log));
    }

    /// Where it listens.
    #[must_use]
    pub const fn socket(&self) -> SocketAddr {
        self.launch.place.socket(self.launch.port)
    }

    /// The port on which it listens.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.launch.port
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.launch.name
    }

    /// Where it runs.
    #[must_use]
    pub const fn place(&self) -> &Place {
        &self.launch.place
    }

    /// How it is started the next time.
    #[must_use]
    pub const fn how(&mut self) -> &mut Launch {
        &mut self.launch
    }

    /// Where it writes what it prints.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.launch.log()
    }

    /// Its id, or `None` while it is killed.
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Whether it runs, or stands still; not once it was killed or has ended.
    #[must_use]
    pub fn runs(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Sends SIGKILL and waits until it is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself; what counts is that it is gone.
            child.kill().unwrap_or_default();
            child.wait().map(|_| ()).unwrap_or_default();
        }
    }

    /// Sends SIGTERM and waits until it has ended; SIGKILL after `patience`. Whether it ended by itself.
    pub fn end(&mut self, patience: Duration) -> bool {
        self.signal(Signal::TERM);
        let began = Instant::now();
        while let Some(child) = &mut self.child {
            if matches!(child.try_wait(), Ok(Some(_))) {
                self.child = None;
                return true;
            }
            if began.elapsed() > patience {
                self.kill();
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        true
    }

    /// Sends SIGSTOP, and waits until each of its threads has stopped: it keeps its sockets and answers nothing.
    ///
    /// # Panics
    ///
    /// When it does not stop.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
        let Some(child) = &self.child else { return };
        let began = Instant::now();
        while !stopped(child.id()) {
            assert!(began.elapsed() < STOP_MAX, "{} does not stop", self.name());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sends SIGCONT.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Sends `signal` to it; nothing if it is not running, or has ended by itself.
    ///
    /// # Panics
    ///
    /// When the system refuses to.
    pub fn signal(&self, signal: Signal) {
        let Some(child) = &self.child else { return };
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        match kill_process(pid.expect("a child has an id"), signal) {
            // It ended, and that was noticed.
            Err(Errno::SRCH) => {}
            sent => sent.expect("a child can be signalled"),
        }
    }
}

/// Whether each thread of a process has stopped, or the process has ended.
fn stopped(id: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{id}/task")) else { return true };
    threads.flatten().all(|thread| {
        // One that has ended meanwhile stands still as well. The name before the state is in brackets.
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
        state.is_none_or(|state| "TtZX".contains(state))
    })
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The end of what was printed to `log`.
fn last(log: &Path) -> String {
    let printed = std::fs::read(log).unwrap_or_default();
    let from = printed.len().saturating_sub(PRINTED_LEN_MAX);
    let printed = String::from_utf8_lossy(printed.get(from..).unwrap_or_default()).into_owned();
    let mut text = String::new();
    if !printed.trim().is_empty() {
        // Writing to a text cannot fail.
        write!(text, ", and ends with:\n{}", printed.trim_end()).unwrap_or_default();
    }
    text
}

/// Runs `command` to its end and returns what it printed.
///
/// # Panics
///
/// When it cannot be run or fails.
pub(super) fn ran(command: &mut Command) -> String {
    let output = command.output().expect("the program can be run");
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}: {printed}", command.get_program());
    String::from_utf8_lossy(&output.stdout).into_owned()
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
