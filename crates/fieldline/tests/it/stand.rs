//! What a node stands on, and the program run to its end.

use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use fieldline_testkit::servers::{Etcd, Mosquitto, Postgres, Redis};
use tempfile::TempDir;

use crate::server::PATIENCE;

/// One of each server.
pub(crate) struct Stand {
    pub(crate) etcd: Etcd,
    pub(crate) postgres: Postgres,
    pub(crate) redis: Redis,
    pub(crate) broker: Mosquitto,
    pub(crate) folder: TempDir,
}

impl Stand {
    /// Starts them at once.
    pub(crate) fn start() -> Self {
        std::thread::scope(|scope| {
            let etcd = scope.spawn(Etcd::start);
            let postgres = scope.spawn(Postgres::start);
            let broker = scope.spawn(|| {
                Mosquitto::start_with("max_inflight_messages 0\nmax_queued_messages 100000")
            });
            let redis = Redis::start();
            Self {
                etcd: etcd.join().unwrap(),
                postgres: postgres.join().unwrap(),
                redis,
                broker: broker.join().unwrap(),
                folder: tempfile::tempdir().unwrap(),
            }
        })
    }

    /// The configuration of a node named `node`.
    pub(crate) fn text(&self) -> String {
        format!(
            "[node]\nname = \"node\"\nlisten = \"127.0.0.1:0\"\netcd = [\"{}\"]\n[postgres]\nurl = \"{}\"\n[redis]\nurl = \"{}\"\n[mqtt_bus]\nurl = \"{}\"\n[http]\nlisten = \"127.0.0.1:0\"\n[mqtt]\nlisten = \"127.0.0.1:0\"\n",
            self.etcd.url(),
            self.postgres.url(),
            self.redis.url(),
            self.broker_url(),
        )
    }

    pub(crate) fn broker_url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.broker.port())
    }

    /// Writes `text` to a file of its own.
    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(format!("{name}.toml"));
        std::fs::write(&path, text).unwrap();
        path
    }
}
/// Runs a command, which must succeed; gives what it printed.
pub(crate) fn tool<A: AsRef<std::ffi::OsStr>>(program: &str, args: &[A]) -> String {
    let output = Command::new(program).args(args).env("ETCDCTL_API", "3").output();
    let output = output.unwrap_or_else(|error| panic!("{program} cannot be run: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {errors}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Runs a statement at a server of PostgreSQL.
pub(crate) fn psql(url: &str, sql: &str) -> String {
    tool("psql", &["-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql, url])
}

/// An authority, what it signed for this machine, and an authority that signed nothing.
pub(crate) struct Certificates {
    folder: TempDir,
}

impl Certificates {
    pub(crate) fn make() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = |name: &str| {
            let key = rcgen::KeyPair::generate().unwrap();
            let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            let certificate = params.self_signed(&key).unwrap();
            std::fs::write(folder.path().join(name), certificate.pem()).unwrap();
            rcgen::Issuer::new(params, key)
        };
        let issuer = authority("own.pem");
        authority("foreign.pem");
        let key = rcgen::KeyPair::generate().unwrap();
        let names = ["127.0.0.1".to_owned(), "localhost".to_owned()];
        let params = rcgen::CertificateParams::new(names).unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        std::fs::write(folder.path().join("server.pem"), certificate.pem()).unwrap();
        for name in ["server.key", "postgres.key"] {
            std::fs::write(folder.path().join(name), key.serialize_pem()).unwrap();
        }
        let made = Self { folder };
        // PostgreSQL reads them as its own user, and refuses a key that others may read.
        tool("chmod", &["755", made.folder.path().to_str().unwrap()]);
        tool("chmod", &["600", &made.path("postgres.key"), &made.path("server.key")]);
        if rustix::process::geteuid().is_root() {
            tool("chown", &["postgres", &made.path("postgres.key")]);
        }
        made
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }
}

/// Runs the program to its end, which must come.
pub(crate) fn run<A: AsRef<std::ffi::OsStr>>(args: &[A]) -> Output {
    let mut errors = tempfile::tempfile().unwrap();
    let mut printed = tempfile::tempfile().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_fieldline"))
        .args(args)
        // All that can be logged: no password may be in it.
        .env("RUST_LOG", "trace")
        .env_remove("FIELDLINE_ADMIN_TOKEN")
        .stdin(Stdio::null())
        .stdout(printed.try_clone().unwrap())
        .stderr(errors.try_clone().unwrap())
        .spawn()
        .unwrap();
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if began.elapsed() > PATIENCE {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    };
    let all = |file: &mut std::fs::File| {
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    };
    let (stdout, stderr) = (all(&mut printed), all(&mut errors));
    let status = status.unwrap_or_else(|| panic!("no end: {}", String::from_utf8_lossy(&stderr)));
    Output { status, stdout, stderr }
}

/// Starts a node that must not come up.
pub(crate) fn serve(config: &Path) -> Output {
    run(&["serve".as_ref(), "--config".as_ref(), config.as_os_str()])
}
