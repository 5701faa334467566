//! A primary that is lost, and a standby that takes over.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use fieldline_contracts::{Actor, Draft, Kind, Registry, SystemClock};
use fieldline_postgres::{PostgresRegistry, Settings};
use fieldline_testkit::servers::{Postgres, free_port};
use tempfile::TempDir;
use uuid::Uuid;

use crate::faults::Load;
use crate::{ACCOUNT, history, psql};

/// A streaming standby of another server; stopped when dropped.
struct Standby {
    data: PathBuf,
    port: u16,
    _folder: TempDir,
}

/// Runs a program of PostgreSQL as a user that it accepts.
fn run(program: &str, folder: &Path, arguments: &[&str]) {
    let versions = std::fs::read_dir("/usr/lib/postgresql").unwrap().flatten();
    let newest = versions.map(|version| version.path().join("bin")).max().unwrap();
    let root = std::fs::metadata("/proc/self")
        .map(|meta| std::os::unix::fs::MetadataExt::uid(&meta))
        .unwrap()
        == 0;
    let mut command = if root {
        let mut command = Command::new("/usr/sbin/runuser");
        command.args(["-u", "postgres", "--"]).arg(newest.join(program));
        command
    } else {
        Command::new(newest.join(program))
    };
    let status =
        command.current_dir(folder).args(arguments).stdout(std::process::Stdio::null()).status();
    assert!(status.unwrap().success(), "{program} {arguments:?}");
}

impl Standby {
    fn of(primary: &Postgres) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut chmod = Command::new("sh");
        let script = "chmod 755 \"$1\"; [ \"$(id -u)\" != 0 ] || chown postgres \"$1\"";
        assert!(chmod.args(["-c", script, "sh"]).arg(folder.path()).status().unwrap().success());
        let (data, port) = (folder.path().join("data"), free_port());
        let (path, from) = (data.to_str().unwrap(), primary.process.port().to_string());
        run(
            "pg_basebackup",
            folder.path(),
            &["-h", "127.0.0.1", "-p", &from, "-U", "postgres", "-D", path, "-R", "-c", "fast"],
        );
        let sockets = folder.path().to_str().unwrap();
        let log = folder.path().join("log");
        let options = format!("-p {port} -k {sockets} -h 127.0.0.1");
        run(
            "pg_ctl",
            folder.path(),
            &["-D", path, "-w", "-l", log.to_str().unwrap(), "-o", &options, "start"],
        );
        Self { data, port, _folder: folder }
    }

    fn promote(&self) {
        run("pg_ctl", Path::new("/"), &["-D", self.data.to_str().unwrap(), "-w", "promote"]);
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        run(
            "pg_ctl",
            Path::new("/"),
            &["-D", self.data.to_str().unwrap(), "-m", "immediate", "stop"],
        );
    }
}

/// The primary is killed under load and the standby promoted: what was acknowledged is there once, and both
/// nodes find the new primary by themselves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promoted_standby_has_all_that_was_acknowledged() {
    let mut primary = Postgres::start();
    let standby = Standby::of(&primary);
    let (one, two) = (primary.process.port(), standby.port);
    let url = format!("postgres://postgres@127.0.0.1:{two},127.0.0.1:{one}/postgres");
    let settings = Settings::new(url);
    psql(&primary, "ALTER SYSTEM SET synchronous_standby_names = '*'");
    psql(&primary, "SELECT pg_reload_conf()");
    let nodes = [history(&settings).await, history(&settings).await];
    let registry =
        PostgresRegistry::connect(&settings, std::sync::Arc::new(SystemClock)).await.unwrap();
    let draft = |n: u128| Draft {
        kind: Kind::Device,
        id: Uuid::from_u128(n),
        unique: Default::default(),
        body: serde_json::json!({}),
    };
    let before = registry.create(ACCOUNT, draft(1), &Actor::system("test")).await.unwrap();
    let load = Load::start(&nodes, 0..12);
    load.goes_on(5_000).await;
    let began = Instant::now();
    primary.process.kill();
    // A change that is made while there is no primary is made in the end.
    let waiting = tokio::spawn({
        let draft = draft(2);
        async move {
            let made = registry.create(ACCOUNT, draft, &Actor::system("test")).await;
            (registry, made)
        }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    standby.promote();
    let promoted = began.elapsed();
    load.goes_on(1_000).await;
    println!("promoted after {promoted:?}, appending again after {:?}", began.elapsed());
    assert!(began.elapsed() < promoted + Duration::from_secs(5));
    load.goes_on(5_000).await;
    let errors = load.check(&nodes[1]).await;
    assert!(errors.is_empty(), "{errors:?}");
    let (registry, made) = waiting.await.unwrap();
    assert!(made.unwrap().revision > before.revision);
    let there = registry.get(ACCOUNT, Kind::Device, before.id).await.unwrap();
    assert_eq!(there, Some(before));
}
