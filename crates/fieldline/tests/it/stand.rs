//! What a node stands on.

use std::path::PathBuf;

use fieldline_testkit::servers::{Etcd, Mosquitto, Postgres, Redis};
use tempfile::TempDir;

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
            "[node]\nname = \"node\"\netcd = [\"{}\"]\n[postgres]\nurl = \"{}\"\n[redis]\nurl = \"{}\"\n[mqtt_bus]\nurl = \"{}\"\n[http]\nlisten = \"127.0.0.1:0\"\n[mqtt]\nlisten = \"127.0.0.1:0\"\n",
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
