//! An S3 server. Debian has none that is small, so it is one of our own: the `s3s` library speaks the protocol and
//! checks every signature; `store.rs` keeps objects so that a kill leaves each whole or not there, as the real ones do.
//!
//! It is the program of the test, started again: the test `s3_server` of each program that needs one calls
//! [`S3::serve_if_told`] first.

mod store;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use tokio::net::TcpListener;

use super::place::Place;
use super::process::{Launch, Process, free_port};

/// In the folder that a process starts in, it says that the process is the server.
const TOLD: &str = "s3-server.json";
/// The key that it knows.
const KEY: &str = "fieldline-test";
/// The secret of that key.
const SECRET: &str = "a secret+of/tests";
/// The bucket that is there.
const BUCKET: &str = "fieldline";

#[derive(Serialize, Deserialize)]
struct Told {
    listen: SocketAddr,
    key: String,
    secret: String,
}

/// An S3 server with one bucket and one key.
pub struct S3 {
    /// The process, for faults.
    pub process: Process,
    folder: TempDir,
    listen: SocketAddr,
}

impl S3 {
    /// Starts it.
    ///
    /// # Panics
    ///
    /// When it cannot be started, such as where the program has no test `s3_server`.
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
        let (folder, port) = (tempfile::tempdir().expect("a temporary folder"), free_port());
        std::fs::create_dir_all(folder.path().join("buckets").join(BUCKET))
            .expect("the server's folder takes one");
        let listen = place.socket(port);
        let told = Told { listen, key: KEY.to_owned(), secret: SECRET.to_owned() };
        let told = serde_json::to_vec(&told).expect("settings are JSON");
        std::fs::write(folder.path().join(TOLD), told).expect("the server's folder takes a file");
        let program: PathBuf = std::env::current_exe().expect("a program knows its file");
        let arguments = ["--exact", "s3_server", "--nocapture"];
        let launch = Launch::new(&program, arguments, folder.path(), port);
        let process = Process::launch(launch.named("s3").at(place));
        Self { process, folder, listen }
    }

    /// Is the server, and does not return before it ends, if this process was started as one.
    ///
    /// # Panics
    ///
    /// When it cannot serve.
    #[must_use]
    pub fn serve_if_told() -> bool {
        let Ok(told) = std::fs::read(TOLD) else { return false };
        let told: Told = serde_json::from_slice(&told).expect("settings of the server");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(serve(told));
        true
    }

    /// Kills it and starts it again with what it stored.
    pub fn restart(&mut self) {
        self.process.start_again();
    }

    /// Such as `http://127.0.0.1:40123`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.listen)
    }

    /// The bucket that is there.
    #[must_use]
    pub const fn bucket(&self) -> &'static str {
        BUCKET
    }

    /// The key that it knows, and its secret.
    #[must_use]
    pub const fn key(&self) -> (&'static str, &'static str) {
        (KEY, SECRET)
    }

    /// Uploads that were begun, and neither completed nor aborted.
    ///
    /// # Panics
    ///
    /// When its folder cannot be read.
    #[must_use]
    pub fn uploads(&self) -> usize {
        let uploads = std::fs::read_dir(self.folder.path().join("uploads"));
        uploads.expect("the server's folder").count()
    }

    /// Files of stored objects, to damage them.
    ///
    /// # Panics
    ///
    /// When its folder cannot be read.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        let folder: &Path = self.folder.path();
        let files = std::fs::read_dir(folder.join("buckets").join(BUCKET));
        files.expect("the bucket").filter_map(|file| Some(file.ok()?.path())).collect()
    }
}

async fn serve(told: Told) {
    let store = store::Store::open(Path::new(".")).expect("the server's folder");
    let mut service = S3ServiceBuilder::new(store);
    service.set_auth(SimpleAuth::from_single(told.key, told.secret));
    let service = service.build();
    let listener = TcpListener::bind(told.listen).await.expect("its port");
    while let Ok((socket, _)) = listener.accept().await {
        let service = service.clone();
        tokio::spawn(async move {
            let http = Builder::new(TokioExecutor::new());
            // How a connection ends is the client's matter.
            http.serve_connection(TokioIo::new(socket), service).await.unwrap_or_default();
        });
    }
}
