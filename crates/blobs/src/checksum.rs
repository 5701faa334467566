//! The checksum of a content, and reading a source for it.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use fieldline_contracts::blobs::check_size;
use fieldline_contracts::{BlobError, BlobKey, PutIf};
use xxhash_rust::xxh3::Xxh3;

/// Bytes that are read at once.
const CHUNK_BYTES: usize = 1 << 20;

/// Takes a content piece by piece.
pub(crate) struct Hasher {
    state: Box<Xxh3>,
    pub(crate) size_bytes: u64,
}

impl Hasher {
    pub(crate) fn new() -> Self {
        Self { state: Box::new(Xxh3::new()), size_bytes: 0 }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.state.update(bytes);
        self.size_bytes += bytes.len() as u64;
    }

    /// As 32 hexadecimal digits.
    pub(crate) fn finish(&self) -> String {
        format!("{:032x}", self.state.digest128())
    }
}

/// The checksum of `bytes`.
pub(crate) fn of(bytes: &[u8]) -> String {
    let mut hasher = Hasher::new();
    hasher.update(bytes);
    hasher.finish()
}

/// Why a source cannot be read.
pub(crate) fn unreadable(path: &Path, error: &std::io::Error) -> BlobError {
    BlobError::Refused(format!(
        "cannot read `{}` to store it: {error}; check the path and its permissions",
        path.display()
    ))
}

/// A file that is to be stored, read once from its beginning.
pub(crate) struct SourceFile {
    path: PathBuf,
    file: File,
    pub(crate) size_bytes: u64,
}

impl SourceFile {
    /// Opens it; refuses one that is too large.
    pub(crate) fn open(key: &BlobKey, path: &Path, when: &PutIf) -> Result<Self, BlobError> {
        let open = || -> std::io::Result<(File, std::fs::Metadata)> {
            let file = File::open(path)?;
            let meta = file.metadata()?;
            Ok((file, meta))
        };
        let (file, meta) = open().map_err(|error| unreadable(path, &error))?;
        if !meta.is_file() {
            let reason = std::io::Error::other("it is no file");
            return Err(unreadable(path, &reason));
        }
        check_size(key, meta.len(), when)?;
        Ok(Self { path: path.to_owned(), file, size_bytes: meta.len() })
    }

    /// The next bytes, up to `bytes_max`; none at the end.
    pub(crate) fn next(&mut self, bytes_max: usize) -> Result<Vec<u8>, BlobError> {
        let mut bytes = Vec::new();
        let read = (&mut self.file).take(bytes_max as u64).read_to_end(&mut bytes);
        read.map_err(|error| unreadable(&self.path, &error))?;
        Ok(bytes)
    }

    /// Reads it to its end.
    pub(crate) fn each(
        &mut self,
        mut take: impl FnMut(&[u8]) -> Result<(), BlobError>,
    ) -> Result<(), BlobError> {
        let mut left = self.size_bytes;
        loop {
            let bytes = self.next(CHUNK_BYTES)?;
            if bytes.is_empty() {
                return if left == 0 { Ok(()) } else { Err(self.changed()) };
            }
            // One that grows must not be followed for ever.
            left = left.checked_sub(bytes.len() as u64).ok_or_else(|| self.changed())?;
            take(&bytes)?;
        }
    }

    pub(crate) fn changed(&self) -> BlobError {
        BlobError::Refused(format!(
            "`{}` was changed while it was stored: store it when it is finished",
            self.path.display()
        ))
    }
}
