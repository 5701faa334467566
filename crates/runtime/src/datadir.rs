//! The data directory: one process uses it at a time.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// It cannot be created or opened.
    #[error("cannot use the data directory `{path}`: {source}; choose another with --data", path = path.display())]
    Open {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process has it.
    #[error("the data directory `{path}` is used by another Fieldline; stop that one or choose another with --data", path = path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// It was written by a later version.
    #[error(
        "the data directory `{path}` has format {found}, and this program knows formats up to {known}; use a newer Fieldline or restore a backup made before the upgrade",
        path = path.display()
    )]
    TooNew {
        /// The directory.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest that is known here.
        known: u32,
    },
}

/// A locked data directory. The lock goes with the process, however it ends.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _lock: File,
}

/// Format of the directory's layout; counts up when an older program could not read it.
const FORMAT: u32 = 1;

impl DataDir {
    /// Creates the directory where it is missing and locks it.
    ///
    /// Waits up to `patience` for another process to let go: a worker whose
    /// master was killed needs a moment to finish.
    ///
    /// # Errors
    ///
    /// See [`DataDirError`].
    pub fn open(path: &Path, patience: Duration) -> Result<Self, DataDirError> {
        let failed = |source| DataDirError::Open { path: path.to_owned(), source };
        // What is in it is nobody else's: tokens' hashes and all messages.
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join("lock"))
            .map_err(failed)?;
        let began = Instant::now();
        let mut told = false;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if began.elapsed() < patience => {
                    if !told {
                        tracing::warn!(path = %path.display(), ?patience, "the data directory is in use, waiting for its process to end");
                        told = true;
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(DataDirError::InUse { path: path.to_owned() });
                }
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
        }
        if Self::format(path)?.is_none() {
            std::fs::write(path.join("format"), format!("{FORMAT}\n")).map_err(failed)?;
        }
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// The format of the directory at `path`, where it has one yet.
    ///
    /// # Errors
    ///
    /// [`DataDirError::TooNew`], [`DataDirError::Open`].
    pub fn format(path: &Path) -> Result<Option<u32>, DataDirError> {
        match std::fs::read_to_string(path.join("format")) {
            Ok(text) => {
                let found = text.trim().parse().unwrap_or(u32::MAX);
                if found > FORMAT {
                    let path = path.to_owned();
                    return Err(DataDirError::TooNew { path, found, known: FORMAT });
                }
                Ok(Some(found))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(DataDirError::Open { path: path.to_owned(), source }),
        }
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path inside it.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_user_is_refused_until_the_first_lets_go() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("data");
        let first = DataDir::open(&path, Duration::ZERO).unwrap();
        let refused = DataDir::open(&path, Duration::ZERO).unwrap_err();
        assert!(matches!(refused, DataDirError::InUse { .. }), "{refused}");
        drop(first);
        DataDir::open(&path, Duration::ZERO).unwrap();
    }

    #[test]
    fn a_newer_format_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        std::fs::write(parent.path().join("format"), "2\n").unwrap();
        let refused = DataDir::open(parent.path(), Duration::ZERO).unwrap_err();
        assert!(matches!(refused, DataDirError::TooNew { found: 2, .. }), "{refused}");
    }
}
