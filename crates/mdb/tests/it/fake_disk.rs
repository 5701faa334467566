//! A disk in memory that knows what a power cut leaves, and fails when told to.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fieldline_mdb::{Disk, DiskFile};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

#[derive(Clone, Default)]
struct FileState {
    /// What programs see.
    content: Vec<u8>,
    /// What a power cut leaves for certain.
    durable: Vec<u8>,
    /// From here on `content` is not known to be durable.
    dirty_from: usize,
}

/// What the disk is told to do wrong.
#[derive(Default)]
struct Faults {
    /// Bytes that can still be written.
    space: Option<usize>,
    /// So many syncs fail; what they should have kept is lost, as Linux does it.
    failing_syncs: u32,
    /// After so many good syncs, one fails.
    failing_after: Option<u64>,
    /// So many reads of files fail.
    failing_reads: u32,
    /// So many cuts of files fail.
    failing_cuts: u32,
    /// After so many changes the power is gone.
    changes_left: Option<u64>,
}

#[derive(Default)]
struct State {
    files: HashMap<u64, FileState>,
    /// What programs see, and what is durable.
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    locks: BTreeSet<PathBuf>,
    next_file: u64,
    faults: Faults,
    syncs: u64,
    bytes_read: usize,
}

/// Clones are the same disk.
#[derive(Clone, Default)]
pub(crate) struct FakeDisk(Arc<Mutex<State>>);

struct FakeFile {
    disk: FakeDisk,
    id: u64,
}

fn cut_off() -> io::Error {
    io::Error::other("the power is gone")
}

impl State {
    /// Counts a change; fails when the power is gone.
    fn change(&mut self) -> io::Result<()> {
        match &mut self.faults.changes_left {
            Some(0) => Err(cut_off()),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Counts a sync; false if it is to fail.
    fn sync(&mut self) -> bool {
        self.syncs += 1;
        if let Some(left) = &mut self.faults.failing_after {
            if *left == 0 {
                self.faults.failing_after = None;
                return false;
            }
            *left -= 1;
        }
        if self.faults.failing_syncs > 0 {
            self.faults.failing_syncs -= 1;
            return false;
        }
        true
    }

    fn file(&mut self, id: u64) -> &mut FileState {
        self.files.entry(id).or_default()
    }
}

impl FakeDisk {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn disk(&self) -> Arc<dyn Disk> {
        Arc::new(self.clone())
    }

    /// From now on only so many bytes can be written; `None` is without limit.
    pub(crate) fn set_space(&self, bytes: Option<usize>) {
        self.0.lock().faults.space = bytes;
    }

    pub(crate) fn fail_syncs(&self, count: u32) {
        self.0.lock().faults.failing_syncs = count;
    }

    /// After so many good syncs, of files or directories, one fails.
    pub(crate) fn fail_sync_after(&self, count: u64) {
        self.0.lock().faults.failing_after = Some(count);
    }

    pub(crate) fn fail_reads(&self, count: u32) {
        self.0.lock().faults.failing_reads = count;
    }

    pub(crate) fn fail_cuts(&self, count: u32) {
        self.0.lock().faults.failing_cuts = count;
    }

    /// The power goes after so many further changes.
    pub(crate) fn cut_power_after(&self, changes: u64) {
        self.0.lock().faults.changes_left = Some(changes);
    }

    pub(crate) fn restore_power(&self) {
        self.0.lock().faults.changes_left = None;
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.0.lock().faults.changes_left == Some(0)
    }

    pub(crate) fn syncs(&self) -> u64 {
        self.0.lock().syncs
    }

    /// Bytes that were read since the last call.
    pub(crate) fn take_bytes_read(&self) -> usize {
        std::mem::take(&mut self.0.lock().bytes_read)
    }

    /// The disk after a power cut: what was synced, and any part of the rest.
    pub(crate) fn after_power_cut(&self, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let state = self.0.lock();
        let mut next = State { next_file: state.next_file, ..State::default() };
        let paths: BTreeSet<&PathBuf> =
            state.names.keys().chain(state.durable_names.keys()).collect();
        for path in paths {
            let (now, durable) = (state.names.get(path), state.durable_names.get(path));
            // A change of the directory that was not synced may have been kept or not.
            let id = if now == durable || random.random() { now } else { durable };
            let Some(id) = id else { continue };
            let file = &state.files[id];
            let mut content = file.durable.clone();
            let tail = file.content.get(file.dirty_from..).unwrap_or(&[]);
            if !tail.is_empty() && random.random() {
                let end = file.dirty_from + random.random_range(0..=tail.len());
                content.resize(content.len().max(end), 0);
                content[file.dirty_from..end].copy_from_slice(&file.content[file.dirty_from..end]);
                // Pages reach the disk in any order: one before the end may be as it was.
                if end > file.dirty_from && random.random_range(0..3) == 0 {
                    let hole = random.random_range(file.dirty_from..end);
                    let hole = hole..(hole + random.random_range(1..512)).min(end);
                    let before = hole.clone().map(|at| file.durable.get(at).copied().unwrap_or(0));
                    content[hole.clone()].copy_from_slice(&before.collect::<Vec<u8>>());
                }
            }
            let dirty_from = content.len();
            next.files.insert(*id, FileState { durable: content.clone(), content, dirty_from });
            next.names.insert(path.clone(), *id);
        }
        next.durable_names = next.names.clone();
        Self(Arc::new(Mutex::new(next)))
    }

    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        self.0.lock().names.keys().cloned().collect()
    }

    pub(crate) fn find(&self, part: &str) -> Vec<PathBuf> {
        let holds = |path: &PathBuf| path.to_string_lossy().contains(part);
        self.paths().into_iter().filter(holds).collect()
    }

    pub(crate) fn content(&self, path: &Path) -> Vec<u8> {
        let state = self.0.lock();
        state.files[&state.names[path]].content.clone()
    }

    /// Changes a file behind everyone's back.
    pub(crate) fn tamper(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.0.lock();
        let id = state.names[path];
        let file = state.file(id);
        change(&mut file.content);
        file.durable = file.content.clone();
        file.dirty_from = file.content.len();
    }

    /// Bytes of all files.
    pub(crate) fn bytes(&self) -> usize {
        let state = self.0.lock();
        state.names.values().map(|id| state.files[id].content.len()).sum()
    }
}

impl DiskFile for FakeFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.0.lock().file(self.id).content.len() as u64)
    }

    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        state.bytes_read += into.len();
        if state.faults.failing_reads > 0 {
            state.faults.failing_reads -= 1;
            return Err(io::Error::other("the disk does not answer"));
        }
        let content = &state.file(self.id).content;
        let start = usize::try_from(offset).unwrap();
        let from = content.get(start..start + into.len());
        into.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        let dead = state.change().is_err();
        let room = state.faults.space.unwrap_or(usize::MAX);
        let written = match (dead, bytes.len() > room) {
            // The last write may be half done.
            (true, _) => 0,
            (false, true) => room,
            (false, false) => bytes.len(),
        };
        if let Some(space) = &mut state.faults.space {
            *space -= written;
        }
        let file = state.file(self.id);
        let start = usize::try_from(offset).unwrap();
        file.dirty_from = file.dirty_from.min(start);
        if file.content.len() < start + written {
            file.content.resize(start + written, 0);
        }
        file.content[start..start + written].copy_from_slice(&bytes[..written]);
        if dead {
            Err(cut_off())
        } else if written < bytes.len() {
            Err(io::ErrorKind::StorageFull.into())
        } else {
            Ok(())
        }
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        state.change()?;
        if state.faults.failing_cuts > 0 {
            state.faults.failing_cuts -= 1;
            return Err(io::Error::other("the disk does not answer"));
        }
        let bytes = usize::try_from(bytes).unwrap();
        let file = state.file(self.id);
        let freed = file.content.len().saturating_sub(bytes);
        file.content.resize(bytes, 0);
        file.dirty_from = file.dirty_from.min(bytes);
        if let Some(space) = &mut state.faults.space {
            *space += freed;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        state.change()?;
        if !state.sync() {
            let file = state.file(self.id);
            // The pages count as clean from now on, and are lost.
            file.dirty_from = file.content.len();
            return Err(io::Error::other("the disk does not answer"));
        }
        let file = state.file(self.id);
        let from = file.dirty_from.min(file.content.len());
        file.durable.resize(from, 0);
        file.durable.extend_from_slice(&file.content[from..]);
        file.dirty_from = file.content.len();
        Ok(())
    }
}

struct Locked {
    disk: FakeDisk,
    path: PathBuf,
}

impl Drop for Locked {
    fn drop(&mut self) {
        self.disk.0.lock().locks.remove(&self.path);
    }
}

impl Disk for FakeDisk {
    fn create_dir_all(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.change()?;
        if !state.sync() {
            return Err(io::Error::other("the disk does not answer"));
        }
        let State { names, durable_names, .. } = &mut *state;
        durable_names.retain(|name, _| name.parent() != Some(path));
        let inside = names.iter().filter(|(name, _)| name.parent() == Some(path));
        durable_names.extend(inside.map(|(name, id)| (name.clone(), *id)));
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let state = self.0.lock();
        let inside = state.names.keys().filter(|name| name.parent() == Some(path));
        Ok(inside.map(|name| name.file_name().unwrap().to_string_lossy().into_owned()).collect())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.0.lock();
        state.change()?;
        if state.faults.space == Some(0) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let id = state.next_file;
        state.next_file += 1;
        state.files.insert(id, FileState::default());
        state.names.insert(path.to_owned(), id);
        Ok(Box::new(FakeFile { disk: self.clone(), id }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let state = self.0.lock();
        let id = *state.names.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(FakeFile { disk: self.clone(), id }))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.change()?;
        let id = state.names.remove(path).ok_or(io::ErrorKind::NotFound)?;
        let freed = state.files[&id].content.len();
        if let Some(space) = &mut state.faults.space {
            *space += freed;
        }
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.change()?;
        let id = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.names.insert(to.to_owned(), id);
        Ok(())
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn Send + Sync>> {
        if !self.0.lock().locks.insert(path.to_owned()) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(Box::new(Locked { disk: self.clone(), path: path.to_owned() }))
    }
}
