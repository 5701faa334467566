use tempfile::TempDir;

use super::place::Place;
use super::process::{Launch, Process, find, free_port};

/// A mosquitto broker that lets anybody in.
pub struct Mosquitto {
    /// The process, for faults.
    pub process: Process,
    _folder: TempDir,
}

impl Mosquitto {
    /// Starts it.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// Starts it with further lines of configuration.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[must_use]
    pub fn start_with(lines: &str) -> Self {
        Self::start_at(&Place::here(), lines)
    }

    /// Starts it at a place, with further lines of configuration.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[must_use]
    pub fn start_at(place: &Place, lines: &str) -> Self {
        let (folder, port) = (tempfile::tempdir().expect("a temporary folder"), free_port());
        // As root it would change to a user that cannot read the folder.
        let text = format!(
            "listener {port} {}\nallow_anonymous true\nuser root\n{lines}\n",
            place.address()
        );
        let file = folder.path().join("mosquitto.conf");
        std::fs::write(&file, text).expect("the folder takes a file");
        let program = find("mosquitto", "mosquitto");
        let arguments = ["-c".into(), file.into_os_string()];
        let process = Process::launch(
            Launch::new(&program, arguments, folder.path(), port).named("mosquitto").at(place),
        );
        Self { process, _folder: folder }
    }

    /// Such as `mqtt://127.0.0.1:40123`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("mqtt://{}", self.process.socket())
    }

    /// The port on which it listens.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.process.port()
    }
}
