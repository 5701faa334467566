use std::path::PathBuf;

use tempfile::TempDir;

use super::place::Place;
use super::process::{Launch, Process, find, free_port};

/// A Redis server that keeps nothing on disk.
pub struct Redis {
    /// The process, for faults.
    pub process: Process,
    folder: TempDir,
}

impl Redis {
    /// Starts it.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts it with further options, such as `["--requirepass", "secret"]`.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[must_use]
    pub fn start_with(options: &[&str]) -> Self {
        Self::start_at(&Place::here(), options)
    }

    /// Starts it at a place, with further options.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[must_use]
    pub fn start_at(place: &Place, options: &[&str]) -> Self {
        let (folder, port) = (tempfile::tempdir().expect("a temporary folder"), free_port());
        let port_text = port.to_string();
        let address = place.address().to_string();
        let mut arguments = vec!["--port", &port_text, "--bind", &address, "--save", ""];
        arguments.extend(["--appendonly", "no", "--daemonize", "no", "--protected-mode", "no"]);
        arguments.extend(options);
        let program: PathBuf = find("redis-server", "redis-server");
        let process = Process::launch(
            Launch::new(&program, arguments, folder.path(), port).named("redis").at(place),
        );
        Self { process, folder }
    }

    /// Kills it and starts it again without its data.
    pub fn restart_empty(&mut self) {
        self.process.start_again();
    }

    /// Such as `redis://127.0.0.1:40123`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("redis://{}", self.process.socket())
    }

    /// Its folder.
    #[must_use]
    pub fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }
}
