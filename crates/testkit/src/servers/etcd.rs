use tempfile::TempDir;

use super::place::Place;
use super::process::{Process, find, free_port};

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

    /// Starts it at a place.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[must_use]
    pub fn start_at(place: &Place) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (port, peer) = (free_port(), free_port());
        let [client, peer] = [port, peer].map(|port| format!("http://{}", place.socket(port)));
        let cluster = format!("default={peer}");
        let arguments = [
            ["--data-dir", "data"],
            ["--listen-client-urls", &client],
            ["--advertise-client-urls", &client],
            ["--listen-peer-urls", &peer],
            ["--initial-advertise-peer-urls", &peer],
            ["--initial-cluster", &cluster],
            ["--log-level", "warn"],
        ];
        let program = find("etcd", "etcd-server");
        let process =
            Process::start_at(place.clone(), &program, arguments.concat(), folder.path(), port);
        Self { process, folder }
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
