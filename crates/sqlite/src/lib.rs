//! The registry in SQLite: one file, no server.
//!
//! Two threads own a connection each: one writes, one reads. Callers hand them
//! work through bounded queues ([`QUEUE_MAX`]) and wait where a queue is full.
//! Writes that wait are committed together, each in a savepoint of its own, so
//! many callers share one sync of the disk; an answer is given only after the
//! commit. The journal is a write-ahead log with `synchronous=FULL`: what was
//! answered survives the loss of power. It is brought into the file within
//! seconds and at the end, and `mark.rs` tells whether it was cut short meanwhile.
//!
//! Beside the registry the file holds what MQTT clients leave with the server (`clients.rs`).
//!
//! It is not a place for the meaning of objects: they are JSON documents here.
//! Start reading at [`SqliteRegistry::open`]; `read.rs` and `write.rs` have the
//! queries, `schema.rs` the tables. It may import `fieldline-contracts` and
//! `fieldline-model`.

mod clients;
mod mark;
mod read;
mod schema;
mod thread;
mod write;

use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use fieldline_contracts::{
    Actor, Audit, Clock, Draft, Kind, Page, Record, Registry, RegistryError,
};
use fieldline_model::AccountId;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};
use tokio::sync::watch;
use uuid::Uuid;

use crate::mark::Mark;
use crate::thread::{Worker, Writer};

/// Most requests that wait for each of the two threads; callers beyond it wait for a place.
pub const QUEUE_MAX: usize = 1_024;

/// Most changes that the audit trail keeps; the oldest of the accounts with the most go first.
pub const AUDIT_MAX: u64 = 1_000_000;

/// Largest file that is checked whole after an unclean end; larger ones are checked as they are read.
const CHECK_BYTES_MAX: u64 = 64 << 20;

/// Why the file cannot serve as a registry.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another process has it open.
    #[error(
        "the registry {} is in use by another process: stop the other Fieldline, or choose another data directory",
        path.display()
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// It was written by a newer version.
    #[error(
        "the registry {} has schema {found}, and this program knows up to {known}: start the newer \
         Fieldline that wrote it, or restore a backup made before",
        path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: u32,
        /// The newest schema known here.
        known: u32,
    },
    /// It is no SQLite file, or its contents are damaged.
    #[error(
        "the registry {} is damaged: {reason}; move it aside and restore a backup",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// Changes that were answered are gone.
    #[error(
        "the registry {} ends at change {found}, but change {known} was made: its journal was damaged or \
         removed, or an older copy was put in its place; restore a backup, or remove {} to go on \
         without the changes that are lost",
        path.display(), mark::path_of(path).display()
    )]
    Shortened {
        /// The file.
        path: PathBuf,
        /// The newest change that it has.
        found: u64,
        /// The newest change that was made.
        known: u64,
    },
    /// It is the registry of something else.
    #[error("{} is a SQLite file of another program: choose another data directory", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// The system refused.
    #[error("the registry {} cannot be opened: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
}

/// The registry in one SQLite file.
///
/// Dropping it finishes what is queued, then closes the file.
pub struct SqliteRegistry {
    // The order matters: the writer ends first, and its end empties the journal.
    writer: Worker<thread::WriteJob>,
    reader: Worker<thread::ReadJob>,
    newest: watch::Sender<u64>,
    clock: Arc<dyn Clock>,
    // Held for as long as the file is open.
    _lock: File,
}

impl SqliteRegistry {
    /// Opens or creates the file at `path` and brings its tables to the present schema.
    ///
    /// Blocks for some milliseconds: call it at start-up.
    ///
    /// # Errors
    ///
    /// See [`OpenError`]; each says what to do.
    pub fn open(path: &Path, clock: Arc<dyn Clock>) -> Result<Self, OpenError> {
        let lock = lock(path)?;
        let unclean = journal(path).metadata().is_ok_and(|meta| meta.len() > 0);
        let named = |error: rusqlite::Error| open_error(path, &error);
        let io = |error: std::io::Error| OpenError::Io {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        let mut write = Connection::open(path).map_err(named)?;
        // Should it be refused, its journal is left as it is.
        let keep_journal = DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE;
        write.set_db_config(keep_journal, true).map_err(named)?;
        schema::configure(&write).map_err(named)?;
        let small = path.metadata().is_ok_and(|meta| meta.len() <= CHECK_BYTES_MAX);
        if unclean && small {
            schema::check(&write)
                .map_err(named)?
                .map_err(|reason| OpenError::Damaged { path: path.to_owned(), reason })?;
        }
        let (mut mark, noted) = Mark::open(path).map_err(io)?;
        let found = read::newest_sequence(&write).map_err(named)?;
        if let Some(known) = noted.filter(|noted| *noted > found) {
            return Err(OpenError::Shortened { path: path.to_owned(), found, known });
        }
        schema::migrate(&mut write, path)?;
        let newest = read::newest_sequence(&write).map_err(named)?;
        mark.note(newest);
        write.set_db_config(keep_journal, false).map_err(named)?;
        let read = Connection::open(path).map_err(named)?;
        schema::configure(&read).map_err(named)?;
        read.pragma_update(None, "query_only", true).map_err(named)?;

        let (newest, _) = watch::channel(newest);
        let timer = thread::timer().map_err(io)?;
        let writing = Writer { db: write, newest: newest.clone(), mark, timer };
        let writer = Worker::start("registry-write", QUEUE_MAX, move |jobs| writing.run(jobs))
            .map_err(io)?;
        let reader = Worker::start("registry-read", QUEUE_MAX, move |jobs| {
            thread::read_loop(&read, jobs);
        })
        .map_err(io)?;
        Ok(Self { writer, reader, newest, clock, _lock: lock })
    }

    /// Brings all that was written into the file itself, so that it is whole without its journal.
    /// For a clean end; it can be used afterwards. Cancel-safe.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unavailable`] if it was not possible: then the journal still holds it.
    pub async fn settle(&self) -> Result<(), RegistryError> {
        if thread::settle(&self.writer).await? {
            return Ok(());
        }
        Err(RegistryError::Unavailable(
            "another program reads it, so its journal stays; keep it with the file".to_owned(),
        ))
    }

    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, RegistryError> + Send + 'static,
    ) -> Result<T, RegistryError> {
        thread::write(&self.writer, work).await
    }

    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, RegistryError> + Send + 'static,
    ) -> Result<T, RegistryError> {
        thread::read(&self.reader, work).await
    }
}

/// Looks at the registry at `path` without opening it for use, also beside a running server: false if it is not there. Reads
/// all of it and changes nothing.
///
/// # Errors
///
/// [`OpenError`] as a start would have it.
pub fn inspect(path: &Path) -> Result<bool, OpenError> {
    match path.metadata() {
        Ok(meta) if meta.len() == 0 => return Ok(false),
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => {
            let reason = error.to_string();
            return Err(OpenError::Io { path: path.to_owned(), reason });
        }
    }
    // Before the file: beside a running server it may only be older.
    let noted = Mark::noted(path);
    let named = |error: rusqlite::Error| open_error(path, &error);
    // Nothing is written; but a journal that is there can only be read by one who may.
    let db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE).map_err(named)?;
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map_err(named)?;
    db.busy_timeout(std::time::Duration::from_secs(5)).map_err(named)?;
    db.pragma_update(None, "query_only", true).map_err(named)?;
    schema::known(&db, path)?;
    schema::check(&db)
        .map_err(named)?
        .map_err(|reason| OpenError::Damaged { path: path.to_owned(), reason })?;
    let found = read::newest_sequence(&db).map_err(named)?;
    match noted.filter(|noted| *noted > found) {
        Some(known) => Err(OpenError::Shortened { path: path.to_owned(), found, known }),
        None => Ok(true),
    }
}

/// Takes the file for this process. A lock of the system, so it goes with the process, however that ends.
fn lock(path: &Path) -> Result<File, OpenError> {
    let io =
        |error: &std::io::Error| OpenError::Io { path: path.to_owned(), reason: error.to_string() };
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(Path::new(&name))
        .map_err(|error| io(&error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(error)) => Err(io(&error)),
    }
}

fn journal(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    PathBuf::from(name)
}

fn open_error(path: &Path, error: &rusqlite::Error) -> OpenError {
    use rusqlite::ErrorCode;
    let (path, reason) = (path.to_owned(), error.to_string());
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            OpenError::Damaged { path, reason }
        }
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => OpenError::InUse { path },
        _ => OpenError::Io { path, reason },
    }
}

#[async_trait]
impl Registry for SqliteRegistry {
    async fn create(
        &self,
        account: AccountId,
        draft: Draft,
        actor: &Actor,
    ) -> Result<Record, RegistryError> {
        let (actor, at) = (actor.clone(), self.clock.now());
        self.write(move |db| write::create(db, account, draft, &actor, at)).await
    }

    async fn update(
        &self,
        account: AccountId,
        draft: Draft,
        expected: Option<u64>,
        actor: &Actor,
    ) -> Result<Record, RegistryError> {
        let (actor, at) = (actor.clone(), self.clock.now());
        self.write(move |db| write::update(db, account, draft, expected, &actor, at)).await
    }

    async fn delete(
        &self,
        account: AccountId,
        kind: Kind,
        id: Uuid,
        expected: Option<u64>,
        actor: &Actor,
    ) -> Result<(), RegistryError> {
        let (actor, at) = (actor.clone(), self.clock.now());
        self.write(move |db| write::delete(db, account, kind, id, expected, &actor, at)).await
    }

    async fn get(
        &self,
        account: AccountId,
        kind: Kind,
        id: Uuid,
    ) -> Result<Option<Record>, RegistryError> {
        self.read(move |db| read::get(db, account, kind, id)).await
    }

    async fn find(
        &self,
        account: AccountId,
        kind: Kind,
        key: &str,
        value: &str,
    ) -> Result<Option<Record>, RegistryError> {
        let (key, value) = (key.to_owned(), value.to_owned());
        self.read(move |db| read::find(db, Some(account), kind, &key, &value)).await
    }

    async fn find_anywhere(
        &self,
        kind: Kind,
        key: &str,
        value: &str,
    ) -> Result<Option<Record>, RegistryError> {
        let (key, value) = (key.to_owned(), value.to_owned());
        self.read(move |db| read::find(db, None, kind, &key, &value)).await
    }

    async fn list(
        &self,
        account: AccountId,
        kind: Kind,
        page: &Page,
    ) -> Result<Vec<Record>, RegistryError> {
        let page = page.clone();
        let found = self.read(move |db| read::list(db, Some(account), kind, &page)).await?;
        Ok(found.into_iter().map(|found| found.listed(kind)).collect())
    }

    async fn list_everywhere(&self, kind: Kind, page: &Page) -> Result<Vec<Record>, RegistryError> {
        let page = page.clone();
        let found = self.read(move |db| read::list(db, None, kind, &page)).await?;
        Ok(found.into_iter().map(|found| found.listed(kind)).collect())
    }

    async fn audit(
        &self,
        account: AccountId,
        before: Option<u64>,
        limit: usize,
    ) -> Result<Vec<Audit>, RegistryError> {
        self.read(move |db| read::audit(db, account, before, limit)).await
    }

    async fn changes(&self, after: u64, limit: usize) -> Result<Vec<Audit>, RegistryError> {
        self.read(move |db| read::changes(db, after, limit)).await
    }

    fn watch(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }
}
