//! Blobs as files of a directory, which one process uses at a time.
//!
//! `data/KEY` is the content and nothing else, so that other programs read it. `sums/KEY` has its size and checksum.
//! Both change by a rename of what was synced in `tmp/`. Between the two renames `sums/KEY` has two lines, of the content
//! before and of the one after: whichever a crash leaves is known. What is in `tmp/` at the start is of nobody.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::UNIX_EPOCH;

use async_trait::async_trait;
use bytes::Bytes;
use fieldline_contracts::blobs::{LIST_MAX, check_range, check_size, check_wanted};
use fieldline_contracts::{
    BlobError, BlobFolder, BlobInfo, BlobKey, BlobPage, BlobSource, Blobs, ETag, PutIf,
};
use fieldline_model::Timestamp;
use parking_lot::{Mutex, RwLock};

use crate::OpenError;
use crate::checksum::{self, Hasher, SourceFile};

/// Most bytes of a file in `sums/`: two lines.
const SUM_BYTES_MAX: u64 = 256;

/// The etag in a list of a blob whose checksum is gone or does not fit its size.
const DAMAGED: &str = "damaged";

/// Blobs in a directory.
pub struct DirectoryBlobs {
    inner: Arc<Inner>,
}

struct Inner {
    root: PathBuf,
    /// Held for as long as the directory is used; the system lets go of it with the process.
    _lock: File,
    /// Written by whoever renames, so that content and checksum are read as a pair.
    names: RwLock<()>,
    temporary: AtomicU64,
    /// What went wrong last, until it goes well.
    problem: Mutex<Option<String>>,
}

/// Size and checksum of a content.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sum {
    size_bytes: u64,
    hash: String,
}

impl Sum {
    fn line(&self) -> String {
        format!("1 {} {}\n", self.size_bytes, self.hash)
    }

    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let (version, size, hash) = (words.next()?, words.next()?, words.next()?);
        let known = version == "1" && words.next().is_none() && hash.len() == 32;
        let size_bytes = size.parse().ok()?;
        known.then(|| Self { size_bytes, hash: hash.to_owned() })
    }
}

/// A temporary file, gone when dropped unless it was renamed.
struct Temporary {
    path: PathBuf,
    file: File,
    renamed: bool,
}

impl Temporary {
    fn rename(&mut self, to: &Path) -> io::Result<()> {
        std::fs::rename(&self.path, to)?;
        self.renamed = true;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.renamed {
            // Else it is removed at the next start.
            std::fs::remove_file(&self.path).unwrap_or_default();
        }
    }
}

fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

impl DirectoryBlobs {
    /// Opens `root`, and makes it if it is not there. What a crash left unfinished is removed. Blocks for the time of a
    /// few syncs.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: it cannot be written, or another process uses it.
    pub fn open(root: &Path) -> Result<Self, OpenError> {
        let cannot = |what: &str, error: &io::Error| {
            OpenError(format!(
                "cannot {what} `{}` for blobs: {error}; check the path, its permissions and the space",
                root.display()
            ))
        };
        let is_new = !root.exists();
        let make = || -> io::Result<File> {
            for folder in ["data", "sums", "tmp"] {
                std::fs::create_dir_all(root.join(folder))?;
            }
            let lock = root.join("lock");
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(lock)
        };
        let lock = make().map_err(|error| cannot("use", &error))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(OpenError(format!(
                    "`{}` is used for blobs by another process: end it, or set another `blobs.directory`; several nodes share a bucket, `blobs.url`",
                    root.display()
                )));
            }
            Err(TryLockError::Error(error)) => return Err(cannot("lock", &error)),
        }
        // Only now: what another process has there is its own.
        let clean = || -> io::Result<()> {
            for left in std::fs::read_dir(root.join("tmp"))? {
                std::fs::remove_file(left?.path())?;
            }
            sync(root)?;
            // Its own name has to be durable too.
            let parent = root.parent().filter(|parent| is_new && !parent.as_os_str().is_empty());
            parent.map_or(Ok(()), sync)
        };
        clean().map_err(|error| cannot("clean", &error))?;
        let inner = Inner {
            root: root.to_owned(),
            _lock: lock,
            names: RwLock::new(()),
            temporary: AtomicU64::new(0),
            problem: Mutex::new(None),
        };
        let temporary = inner.temporary().map_err(|error| cannot("write to", &error))?;
        drop(temporary);
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Looks whether `root` could be opened, and changes nothing. Says what was found.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: it could not.
    pub fn look(root: &Path) -> Result<String, OpenError> {
        let shown = root.display();
        let cannot = |error: io::Error| {
            OpenError(format!("cannot use `{shown}` for blobs: {error}; check its permissions"))
        };
        let lock = match OpenOptions::new().read(true).write(true).open(root.join("lock")) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(format!("`{shown}` is new: the first start makes it"));
            }
            Err(error) => return Err(cannot(error)),
        };
        match lock.try_lock_shared() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Ok(format!("`{shown}` is used by a running Fieldline"));
            }
            Err(TryLockError::Error(error)) => return Err(cannot(error)),
        }
        let path = root.join("tmp").join(format!("look-{}", std::process::id()));
        let written = OpenOptions::new().write(true).create_new(true).open(&path);
        written.and_then(|_| std::fs::remove_file(&path)).map_err(cannot)?;
        Ok(format!("`{shown}` can be written"))
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, BlobError> + Send + 'static,
    ) -> Result<T, BlobError> {
        let inner = Arc::clone(&self.inner);
        let done = tokio::task::spawn_blocking(move || {
            let done = work(&inner);
            *inner.problem.lock() = match &done {
                Err(BlobError::Unavailable(reason)) => Some(reason.clone()),
                _ => None,
            };
            done
        });
        done.await.unwrap_or_else(|error| Err(BlobError::Unavailable(error.to_string())))
    }
}

impl Inner {
    fn data(&self, key: &BlobKey) -> PathBuf {
        self.root.join("data").join(key.as_str())
    }

    fn sums(&self, key: &BlobKey) -> PathBuf {
        self.root.join("sums").join(key.as_str())
    }

    fn temporary(&self) -> io::Result<Temporary> {
        let number = self.temporary.fetch_add(1, Ordering::Relaxed);
        let path = self.root.join("tmp").join(number.to_string());
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        Ok(Temporary { path, file, renamed: false })
    }

    /// What an error of the disk means to a caller.
    fn failed(&self, what: &str, error: &io::Error) -> BlobError {
        let place = self.root.display();
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => BlobError::Unavailable(
                format!("the disk of `{place}` is full: make space, and it goes on by itself"),
            ),
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                BlobError::Refused(format!(
                    "cannot {what} in `{place}`: {error}; check its permissions"
                ))
            }
            _ => BlobError::Unavailable(format!("cannot {what} in `{place}`: {error}")),
        }
    }

    /// Reads what stands in `sums/`; nothing where there is none.
    fn read_sums(&self, key: &BlobKey) -> io::Result<Vec<Sum>> {
        let mut text = String::new();
        match File::open(self.sums(key)) {
            Ok(file) => file.take(SUM_BYTES_MAX).read_to_string(&mut text).map(|_| ())?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(text.lines().filter_map(Sum::parse).collect())
    }

    /// Writes `sums/`, durable by name only if `durable`.
    fn write_sums(&self, key: &BlobKey, sums: &[&Sum], durable: bool) -> io::Result<()> {
        let mut temporary = self.temporary()?;
        let text: String = sums.iter().map(|sum| sum.line()).collect();
        temporary.file.write_all(text.as_bytes())?;
        temporary.file.sync_all()?;
        let path = self.sums(key);
        temporary.rename(&path)?;
        if durable { path.parent().map_or(Ok(()), sync) } else { Ok(()) }
    }

    /// The content of a blob, its size, and the checksums of which one is its own. Under the lock.
    fn find(&self, key: &BlobKey) -> Result<(File, std::fs::Metadata, Vec<Sum>), BlobError> {
        let failed = |error| self.failed("read", &error);
        let file = match File::open(self.data(key)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(BlobError::NotFound(key.clone()));
            }
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
                return Err(BlobError::NotFound(key.clone()));
            }
            Err(error) => return Err(failed(error)),
        };
        let meta = file.metadata().map_err(failed)?;
        if !meta.is_file() {
            return Err(BlobError::NotFound(key.clone()));
        }
        let mut sums = self.read_sums(key).map_err(failed)?;
        sums.retain(|sum| sum.size_bytes == meta.len());
        if sums.is_empty() {
            let reason = format!("its file has {} bytes, and no checksum is of that", meta.len());
            return Err(BlobError::Damaged { key: key.clone(), reason });
        }
        Ok((file, meta, sums))
    }

    /// As [`Inner::find`], with the one checksum that is its own.
    fn settled(&self, key: &BlobKey) -> Result<(File, BlobInfo), BlobError> {
        let (file, meta, mut sums) = self.find(key)?;
        let sum = if let (Some(sum), true) = (sums.pop(), sums.is_empty()) {
            sum
        } else {
            // A crash between both renames, and both contents of one size: only reading it tells.
            let (file, _, sums) = self.find(key)?;
            let hash = hash_of(file).map_err(|error| self.failed("read", &error))?;
            let found = sums.into_iter().find(|sum| sum.hash == hash);
            found.ok_or_else(|| damaged(key))?
        };
        Ok((file, info(key, &meta, sum.hash)))
    }

    fn put(&self, key: &BlobKey, source: BlobSource, when: &PutIf) -> Result<ETag, BlobError> {
        let failed = |error: io::Error| self.failed("write", &error);
        let mut hasher = Hasher::new();
        let mut temporary = self.temporary().map_err(failed)?;
        match source {
            BlobSource::Bytes(bytes) => {
                check_size(key, bytes.len() as u64, when)?;
                hasher.update(&bytes);
                temporary.file.write_all(&bytes).map_err(failed)?;
            }
            BlobSource::File(path) => {
                let mut source = SourceFile::open(key, &path, when)?;
                source.each(|bytes| {
                    hasher.update(bytes);
                    temporary.file.write_all(bytes).map_err(failed)
                })?;
            }
        }
        temporary.file.sync_all().map_err(failed)?;
        let new = Sum { size_bytes: hasher.size_bytes, hash: hasher.finish() };

        let _names = self.names.write();
        let present = match self.settled(key) {
            Ok((_, info)) => Some(info),
            Err(BlobError::NotFound(_)) => None,
            // What is damaged may be replaced: that mends it.
            Err(BlobError::Damaged { .. }) if *when == PutIf::Any => None,
            Err(error) => return Err(error),
        };
        match (when, &present) {
            (PutIf::Absent, Some(_)) => return Err(BlobError::AlreadyExists(key.clone())),
            (PutIf::Is(etag), present) if present.as_ref().map(|info| &info.etag) != Some(etag) => {
                return Err(BlobError::Changed(key.clone()));
            }
            _ => {}
        }
        let (data, sums) = (self.data(key), self.sums(key));
        self.folders(key, &data, "data")?;
        self.folders(key, &sums, "sums")?;
        if data.is_dir() {
            return Err(BlobError::Refused(format!(
                "`{key}` is a folder of other blobs here: choose another name"
            )));
        }
        let older = present.map(|info| Sum { size_bytes: info.size_bytes, hash: info.etag.0 });
        let mut replace = || -> io::Result<()> {
            let lines: Vec<&Sum> = older.iter().chain([&new]).collect();
            self.write_sums(key, &lines, true)?;
            temporary.rename(&data)?;
            data.parent().map_or(Ok(()), sync)
        };
        replace().map_err(failed)?;
        if older.is_some()
            && let Err(error) = self.write_sums(key, &[&new], false)
        {
            // Both lines stay, and the content tells which is its own.
            tracing::debug!(%key, %error, "the checksum before could not be removed");
        }
        Ok(ETag(new.hash))
    }

    /// Makes the folders above `path`, durable, below `root/below`.
    fn folders(&self, key: &BlobKey, path: &Path, below: &str) -> Result<(), BlobError> {
        let top = self.root.join(below);
        let parents: Vec<&Path> =
            path.ancestors().skip(1).take_while(|parent| **parent != *top).collect();
        for folder in parents.into_iter().rev() {
            match std::fs::create_dir(folder) {
                Ok(()) => folder
                    .parent()
                    .map_or(Ok(()), sync)
                    .map_err(|error| self.failed("write", &error))?,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(BlobError::Refused(format!(
                        "a folder of `{key}` is a blob itself here: choose another name"
                    )));
                }
                Err(error) => return Err(self.failed("write", &error)),
            }
        }
        Ok(())
    }

    fn delete(&self, key: &BlobKey) -> Result<(), BlobError> {
        let failed = |error: io::Error| self.failed("delete", &error);
        let _names = self.names.write();
        let (data, sums) = (self.data(key), self.sums(key));
        match self.find(key) {
            Ok(_) | Err(BlobError::Damaged { .. }) => {
                std::fs::remove_file(&data).map_err(failed)?;
                data.parent().map_or(Ok(()), sync).map_err(failed)?;
            }
            Err(BlobError::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
        match std::fs::remove_file(&sums) {
            // A folder of others' is no blob.
            Err(error) if absent(&error) || error.kind() == io::ErrorKind::IsADirectory => {}
            removed => removed.map_err(failed)?,
        }
        // Folders that hold nothing any more; one that still does cannot be removed, and ends it.
        for (path, below) in [(&data, "data"), (&sums, "sums")] {
            let top = self.root.join(below);
            for folder in path.ancestors().skip(1).take_while(|parent| **parent != *top) {
                if std::fs::remove_dir(folder).is_err() {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Up to `limit` keys after `after` below `folder`, in order, into `keys`. `prefix` is what its keys begin with.
    fn walk(
        &self,
        folder: &Path,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
        keys: &mut Vec<BlobKey>,
    ) -> io::Result<()> {
        // A folder stands where its keys do: as its name and `/`. Only as many names as are wanted are kept at once; as
        // some may have no key behind them, it is gone on after the last.
        let mut done: Option<String> = None;
        loop {
            let (mut first, mut more) = (BTreeSet::new(), false);
            let entries = match std::fs::read_dir(folder) {
                Ok(entries) => entries,
                Err(error) if absent(&error) => return Ok(()),
                Err(error) => return Err(error),
            };
            for entry in entries {
                let entry = entry?;
                let Ok(mut name) = entry.file_name().into_string() else { continue };
                if entry.file_type()?.is_dir() {
                    name.push('/');
                }
                let full = format!("{prefix}{name}");
                let passed = after.is_some_and(|after| {
                    full.as_str() <= after && !(full.ends_with('/') && after.starts_with(&full))
                });
                if passed || done.as_ref().is_some_and(|done| name <= *done) {
                    continue;
                }
                first.insert(name);
                if first.len() > limit {
                    first.pop_last();
                    more = true;
                }
            }
            for name in first {
                if keys.len() >= limit {
                    return Ok(());
                }
                let full = format!("{prefix}{name}");
                if name.ends_with('/') {
                    self.walk(&folder.join(&name), &full, after, limit, keys)?;
                } else if let Ok(key) = BlobKey::parse(&full) {
                    keys.push(key);
                }
                done = Some(name);
            }
            if !more {
                return Ok(());
            }
        }
    }

    fn list(
        &self,
        folder: &BlobFolder,
        after: Option<&BlobKey>,
        limit: usize,
    ) -> Result<BlobPage, BlobError> {
        let limit = limit.clamp(1, LIST_MAX);
        let mut keys = Vec::new();
        let path = self.root.join("data").join(folder.as_str());
        let after = after.map(BlobKey::as_str);
        let walked = self.walk(&path, folder.as_str(), after, limit + 1, &mut keys);
        walked.map_err(|error| self.failed("list", &error))?;
        let more = keys.len() > limit;
        keys.truncate(limit);
        let next = if more { keys.last().cloned() } else { None };
        let mut blobs = Vec::new();
        for key in keys {
            let _names = self.names.read();
            match self.settled(&key) {
                Ok((_, info)) => blobs.push(info),
                Err(BlobError::NotFound(_)) => {}
                // It is there, and a list is no reason to fail for it: who reads it is told.
                Err(BlobError::Damaged { .. }) => match std::fs::metadata(self.data(&key)) {
                    Ok(meta) => blobs.push(info(&key, &meta, DAMAGED.to_owned())),
                    Err(error) if absent(&error) => {}
                    Err(error) => return Err(self.failed("list", &error)),
                },
                Err(error) => return Err(error),
            }
        }
        Ok(BlobPage { blobs, next })
    }
}

fn absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn damaged(key: &BlobKey) -> BlobError {
    let reason = "its bytes do not have the checksum they were written with".to_owned();
    BlobError::Damaged { key: key.clone(), reason }
}

fn hash_of(mut file: File) -> io::Result<String> {
    let (mut hasher, mut chunk) = (Hasher::new(), vec![0; 1 << 20]);
    loop {
        let read = file.read(&mut chunk)?;
        match chunk.get(..read) {
            Some(bytes) if read > 0 => hasher.update(bytes),
            _ => return Ok(hasher.finish()),
        }
    }
}

fn info(key: &BlobKey, meta: &std::fs::Metadata, hash: String) -> BlobInfo {
    let since = meta.modified().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    let micros = since.and_then(|since| i64::try_from(since.as_micros()).ok());
    BlobInfo {
        key: key.clone(),
        size_bytes: meta.len(),
        etag: ETag(hash),
        modified: Timestamp::from_micros(micros.unwrap_or_default()),
    }
}

#[async_trait]
impl Blobs for DirectoryBlobs {
    async fn put(&self, key: &BlobKey, source: BlobSource, when: PutIf) -> Result<ETag, BlobError> {
        let key = key.clone();
        self.run(move |inner| inner.put(&key, source, &when)).await
    }

    async fn get(&self, key: &BlobKey, bytes_max: u64) -> Result<(BlobInfo, Bytes), BlobError> {
        let key = key.clone();
        self.run(move |inner| {
            let (mut file, meta, sums) = {
                let _names = inner.names.read();
                inner.find(&key)?
            };
            check_wanted(&key, meta.len(), bytes_max)?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).map_err(|error| inner.failed("read", &error))?;
            let hash = checksum::of(&bytes);
            if !sums.iter().any(|sum| sum.hash == hash && sum.size_bytes == bytes.len() as u64) {
                return Err(damaged(&key));
            }
            Ok((info(&key, &meta, hash), bytes.into()))
        })
        .await
    }

    async fn get_range(
        &self,
        key: &BlobKey,
        range: Range<u64>,
    ) -> Result<(BlobInfo, Bytes), BlobError> {
        check_range(key, &range)?;
        let key = key.clone();
        self.run(move |inner| {
            let (file, info) = {
                let _names = inner.names.read();
                inner.settled(&key)?
            };
            let end = range.end.min(info.size_bytes);
            let length = usize::try_from(end.saturating_sub(range.start)).unwrap_or_default();
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, range.start)
                .map_err(|error| inner.failed("read", &error))?;
            Ok((info, bytes.into()))
        })
        .await
    }

    async fn head(&self, key: &BlobKey) -> Result<BlobInfo, BlobError> {
        let key = key.clone();
        self.run(move |inner| {
            let _names = inner.names.read();
            Ok(inner.settled(&key)?.1)
        })
        .await
    }

    async fn list(
        &self,
        folder: &BlobFolder,
        after: Option<&BlobKey>,
        limit: usize,
    ) -> Result<BlobPage, BlobError> {
        let (folder, after) = (folder.clone(), after.cloned());
        self.run(move |inner| inner.list(&folder, after.as_ref(), limit)).await
    }

    async fn delete(&self, key: &BlobKey) -> Result<(), BlobError> {
        let key = key.clone();
        self.run(move |inner| inner.delete(&key)).await
    }

    fn problems(&self) -> Vec<String> {
        self.inner.problem.lock().iter().cloned().collect()
    }
}
