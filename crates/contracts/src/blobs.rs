//! `Blobs`: whole files by key, written once and read often: cold segments, binaries of drivers and releases.
//!
//! A key says whose it is: [`BlobKey`] and [`BlobFolder`] are made for one account or for the installation, and no
//! folder reaches over two accounts. So whoever holds an [`AccountId`] can name nothing of another.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use fieldline_model::{AccountId, Timestamp};
use parking_lot::RwLock;

use crate::Clock;

/// Most bytes of a blob.
pub const BLOB_BYTES_MAX: u64 = 16 << 30;

/// Most bytes of a blob that is written under a condition ([`PutIf::Absent`], [`PutIf::Is`]): storage services decide
/// on a condition within one request, which is held in memory.
pub const CONDITIONAL_BYTES_MAX: u64 = 16 << 20;

/// Most blobs of one page of a list.
pub const LIST_MAX: usize = 1_000;

/// Most bytes of a key's name, without what says whose it is.
pub const NAME_BYTES_MAX: usize = 256;

/// Most bytes of one part of a name, between `/`.
pub const PART_BYTES_MAX: usize = 128;

/// What keys of an account begin with.
const ACCOUNTS: &str = "accounts/";
/// What keys of the installation begin with.
const SHARED: &str = "shared/";

/// The name of a blob, and whose it is.
///
/// A name is parts between `/`, each of `a-z 0-9 - _ . =` and beginning with none of `-.=`: it is the same on every
/// file system and in every URL. No blob may be named as the folder of another, `a` beside `a/b`: a backend that cannot
/// keep both refuses the second.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobKey(Arc<str>);

/// Blobs whose keys begin alike: all of an account, of the installation, or of a folder there.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct BlobFolder(Arc<str>);

/// Why a name is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` cannot name a blob: {reason}")]
pub struct BlobNameError {
    name: String,
    reason: &'static str,
}

fn check(name: &str) -> Result<(), BlobNameError> {
    let plain =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.=".contains(&byte);
    let part = |part: &str| {
        if part.is_empty() {
            Some("a part between `/` is empty")
        } else if part.len() > PART_BYTES_MAX {
            Some("a part between `/` has more than 128 bytes")
        } else if !part.bytes().all(plain) {
            Some("only a-z, 0-9, `-`, `_`, `.`, `=` and `/` may be in it")
        } else if part.starts_with(['-', '.', '=']) {
            Some("a part begins with `-`, `.` or `=`")
        } else {
            None
        }
    };
    let reason = if name.len() > NAME_BYTES_MAX {
        Some("it has more than 256 bytes")
    } else {
        name.split('/').find_map(part)
    };
    let shown = || name.chars().take(NAME_BYTES_MAX).collect();
    reason.map_or(Ok(()), |reason| Err(BlobNameError { name: shown(), reason }))
}

impl BlobKey {
    /// The blob `name` of an account.
    ///
    /// # Errors
    ///
    /// [`BlobNameError`].
    pub fn of(account: AccountId, name: &str) -> Result<Self, BlobNameError> {
        check(name)?;
        Ok(Self(format!("{ACCOUNTS}{account}/{name}").into()))
    }

    /// The blob `name` of the installation, which belongs to no account.
    ///
    /// # Errors
    ///
    /// [`BlobNameError`].
    pub fn shared(name: &str) -> Result<Self, BlobNameError> {
        check(name)?;
        Ok(Self(format!("{SHARED}{name}").into()))
    }

    /// As [`BlobKey::as_str`] gave it: what a backend finds in its store, or a cursor from outside.
    ///
    /// # Errors
    ///
    /// [`BlobNameError`]: it is none of ours.
    pub fn parse(text: &str) -> Result<Self, BlobNameError> {
        let foreign = || BlobNameError {
            name: text.chars().take(NAME_BYTES_MAX).collect(),
            reason: "it begins neither with `shared/` nor with an account",
        };
        if let Some(name) = text.strip_prefix(SHARED) {
            return Self::shared(name);
        }
        let rest = text.strip_prefix(ACCOUNTS).ok_or_else(foreign)?;
        let (account, name) = rest.split_once('/').ok_or_else(foreign)?;
        let key = Self::of(account.parse().map_err(|_| foreign())?, name)?;
        // One text for one key: ids may be written in several ways.
        if key.as_str() == text { Ok(key) } else { Err(foreign()) }
    }

    /// All of it, such as `accounts/0192…/cold/2026-11-20.parquet`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The account whose it is; `None` for one of the installation.
    #[must_use]
    pub fn account(&self) -> Option<AccountId> {
        let rest = self.0.strip_prefix(ACCOUNTS)?;
        rest.split_once('/')?.0.parse().ok()
    }

    /// Its name, without what says whose it is.
    #[must_use]
    pub fn name(&self) -> &str {
        if let Some(name) = self.0.strip_prefix(SHARED) {
            return name;
        }
        let rest = self.0.strip_prefix(ACCOUNTS).and_then(|rest| rest.split_once('/'));
        rest.map_or("", |(_, name)| name)
    }
}

impl BlobFolder {
    /// A folder of an account; all of its blobs for an empty `name`.
    ///
    /// # Errors
    ///
    /// [`BlobNameError`].
    pub fn of(account: AccountId, name: &str) -> Result<Self, BlobNameError> {
        Self::under(format!("{ACCOUNTS}{account}/"), name)
    }

    /// A folder of the installation; all of its blobs for an empty `name`.
    ///
    /// # Errors
    ///
    /// [`BlobNameError`].
    pub fn shared(name: &str) -> Result<Self, BlobNameError> {
        Self::under(SHARED.to_owned(), name)
    }

    fn under(mut text: String, name: &str) -> Result<Self, BlobNameError> {
        if !name.is_empty() {
            check(name)?;
            text.push_str(name);
            text.push('/');
        }
        Ok(Self(text.into()))
    }

    /// What its keys begin with; ends with `/`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `key` is in it, or in a folder of it.
    #[must_use]
    pub fn holds(&self, key: &BlobKey) -> bool {
        key.0.starts_with(&*self.0)
    }
}

impl fmt::Display for BlobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BlobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BlobFolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Stands for the content of a blob: two with different contents never have the same, at one key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ETag(pub String);

/// What is known of a blob without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobInfo {
    /// Its name.
    pub key: BlobKey,
    /// Bytes of its content.
    pub size_bytes: u64,
    /// Stands for its content.
    pub etag: ETag,
    /// When it was written, by the clock of the store.
    pub modified: Timestamp,
}

/// What is to be stored.
#[derive(Clone, Debug)]
pub enum BlobSource {
    /// These bytes.
    Bytes(Bytes),
    /// A file, which must not change meanwhile: it is read twice, with bounded memory.
    File(PathBuf),
}

impl From<Bytes> for BlobSource {
    fn from(bytes: Bytes) -> Self {
        Self::Bytes(bytes)
    }
}

impl From<Vec<u8>> for BlobSource {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes.into())
    }
}

impl From<PathBuf> for BlobSource {
    fn from(path: PathBuf) -> Self {
        Self::File(path)
    }
}

/// On what condition a blob is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PutIf {
    /// None: what is there is replaced.
    Any,
    /// Nothing is there.
    Absent,
    /// What is there is still this.
    Is(ETag),
}

/// One page of a list, in the order of keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlobPage {
    /// The blobs.
    pub blobs: Vec<BlobInfo>,
    /// Where the next page begins: after this key. `None` when there is none.
    pub next: Option<BlobKey>,
}

/// Why a blob could not be written or read. A variant exists only where a caller acts differently.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BlobError {
    /// There is none of this key.
    #[error("there is no blob `{0}`")]
    NotFound(BlobKey),
    /// There is one of this key, and the new one was to be the first.
    #[error("there is a blob `{0}` already")]
    AlreadyExists(BlobKey),
    /// What is there is not what was to be replaced: read it and decide anew.
    #[error("the blob `{0}` was changed or removed meanwhile")]
    Changed(BlobKey),
    /// The store cannot be reached, has no space or did not answer in time. The same call may succeed later. What was
    /// to be written may be there, whole, or not.
    #[error("blobs are not available: {0}")]
    Unavailable(String),
    /// What is stored is not what was written. It is not given out; only another copy helps.
    #[error("the blob `{key}` is damaged: {reason}")]
    Damaged {
        /// The blob.
        key: BlobKey,
        /// What does not fit.
        reason: String,
    },
    /// It is not possible, now or later: too large, a file that cannot be read, rights that are missing.
    #[error("{0}")]
    Refused(String),
}

impl BlobError {
    /// Stable label for metrics and answers.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NotFound(_) => "blob_not_found",
            Self::AlreadyExists(_) => "blob_exists",
            Self::Changed(_) => "blob_changed",
            Self::Unavailable(_) => "blobs_unavailable",
            Self::Damaged { .. } => "blob_damaged",
            Self::Refused(_) => "blob_refused",
        }
    }

    /// Whether the same call may succeed later.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}

/// Holds blobs.
///
/// A reader sees a blob whole as it was before a write or whole as it is after it, never a part and never a mixture,
/// whatever dies meanwhile. What was written is read by everybody from then on.
#[async_trait]
pub trait Blobs: Send + Sync + 'static {
    /// Stores a blob: durable when this returns. At most [`BLOB_BYTES_MAX`], under a condition at most
    /// [`CONDITIONAL_BYTES_MAX`]. Memory is bounded whatever the size.
    ///
    /// Dropping the future leaves it open whether the blob is there; it is there whole, or not.
    ///
    /// # Errors
    ///
    /// [`BlobError::AlreadyExists`] for [`PutIf::Absent`], [`BlobError::Changed`] for [`PutIf::Is`],
    /// [`BlobError::Unavailable`], [`BlobError::Refused`].
    async fn put(&self, key: &BlobKey, source: BlobSource, when: PutIf) -> Result<ETag, BlobError>;

    /// Reads a blob of at most `bytes_max` whole; its checksum is verified. Cancel-safe.
    ///
    /// # Errors
    ///
    /// [`BlobError::NotFound`], [`BlobError::Damaged`], [`BlobError::Refused`] for a larger one,
    /// [`BlobError::Unavailable`].
    async fn get(&self, key: &BlobKey, bytes_max: u64) -> Result<(BlobInfo, Bytes), BlobError>;

    /// Reads some bytes of a blob: fewer, or none, where it ends before `range`. The checksum is of the whole and is
    /// not verified here: formats that are read in parts have checksums of their own. Parts of one content have the
    /// same [`BlobInfo::etag`]. Cancel-safe.
    ///
    /// # Errors
    ///
    /// [`BlobError::NotFound`], [`BlobError::Refused`] for more than [`CONDITIONAL_BYTES_MAX`] at once,
    /// [`BlobError::Unavailable`].
    async fn get_range(
        &self,
        key: &BlobKey,
        range: Range<u64>,
    ) -> Result<(BlobInfo, Bytes), BlobError>;

    /// What is known of a blob. Cancel-safe.
    ///
    /// # Errors
    ///
    /// [`BlobError::NotFound`], [`BlobError::Unavailable`].
    async fn head(&self, key: &BlobKey) -> Result<BlobInfo, BlobError>;

    /// Blobs of a folder and those below it, in the order of their keys, those `after` a key. At most `limit`, and at
    /// most [`LIST_MAX`]. One written or deleted meanwhile may be there or not; all others are. Cancel-safe.
    ///
    /// # Errors
    ///
    /// [`BlobError::Unavailable`].
    async fn list(
        &self,
        folder: &BlobFolder,
        after: Option<&BlobKey>,
        limit: usize,
    ) -> Result<BlobPage, BlobError>;

    /// Removes a blob; nothing if there is none.
    ///
    /// # Errors
    ///
    /// [`BlobError::Unavailable`]: it may be gone.
    async fn delete(&self, key: &BlobKey) -> Result<(), BlobError>;

    /// What keeps blobs from being written or read, in words; empty when nothing does. Answers at once, with what was
    /// last seen.
    fn problems(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Refuses what no backend takes, so that all refuse the same.
///
/// # Errors
///
/// [`BlobError::Refused`].
pub fn check_size(key: &BlobKey, size_bytes: u64, when: &PutIf) -> Result<(), BlobError> {
    let limit = if *when == PutIf::Any { BLOB_BYTES_MAX } else { CONDITIONAL_BYTES_MAX };
    if size_bytes <= limit {
        return Ok(());
    }
    let condition = if *when == PutIf::Any { "" } else { " when it is stored under a condition" };
    Err(BlobError::Refused(format!(
        "the blob `{key}` has {size_bytes} bytes; at most {limit} are possible{condition}"
    )))
}

/// Refuses a blob that is larger than the reader wants.
///
/// # Errors
///
/// [`BlobError::Refused`].
pub fn check_wanted(key: &BlobKey, size_bytes: u64, bytes_max: u64) -> Result<(), BlobError> {
    if size_bytes <= bytes_max {
        return Ok(());
    }
    Err(BlobError::Refused(format!(
        "the blob `{key}` has {size_bytes} bytes, more than the {bytes_max} that can be used here"
    )))
}

/// The length of a range, if it may be read at once.
///
/// # Errors
///
/// [`BlobError::Refused`].
pub fn check_range(key: &BlobKey, range: &Range<u64>) -> Result<u64, BlobError> {
    let length = range.end.saturating_sub(range.start);
    if length <= CONDITIONAL_BYTES_MAX {
        return Ok(length);
    }
    Err(BlobError::Refused(format!(
        "{length} bytes of the blob `{key}` were asked for at once; at most {CONDITIONAL_BYTES_MAX} are possible"
    )))
}

struct Held {
    content: Bytes,
    version: u64,
    modified: Timestamp,
}

#[derive(Default)]
struct MemoryTable {
    blobs: BTreeMap<BlobKey, Held>,
    version: u64,
}

/// Blobs in memory: for tests, and for what is thrown away.
pub struct MemoryBlobs {
    table: RwLock<MemoryTable>,
    clock: Arc<dyn Clock>,
}

impl MemoryBlobs {
    /// None yet.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { table: RwLock::default(), clock }
    }

    fn read<T>(
        &self,
        key: &BlobKey,
        take: impl FnOnce(BlobInfo, &Bytes) -> Result<T, BlobError>,
    ) -> Result<T, BlobError> {
        let table = self.table.read();
        let held = table.blobs.get(key).ok_or_else(|| BlobError::NotFound(key.clone()))?;
        take(info(key, held), &held.content)
    }
}

fn info(key: &BlobKey, held: &Held) -> BlobInfo {
    BlobInfo {
        key: key.clone(),
        size_bytes: held.content.len() as u64,
        etag: ETag(held.version.to_string()),
        modified: held.modified,
    }
}

#[async_trait]
impl Blobs for MemoryBlobs {
    async fn put(&self, key: &BlobKey, source: BlobSource, when: PutIf) -> Result<ETag, BlobError> {
        let refused = |path: &PathBuf, error: std::io::Error| {
            BlobError::Refused(format!("cannot read `{}`: {error}", path.display()))
        };
        let content = match source {
            BlobSource::Bytes(bytes) => bytes,
            BlobSource::File(path) => {
                let meta = tokio::fs::metadata(&path).await.map_err(|e| refused(&path, e))?;
                check_size(key, meta.len(), &when)?;
                tokio::fs::read(&path).await.map_err(|e| refused(&path, e))?.into()
            }
        };
        check_size(key, content.len() as u64, &when)?;
        let modified = self.clock.now();
        let mut table = self.table.write();
        let present = table.blobs.get(key).map(|held| held.version.to_string());
        match (&when, &present) {
            (PutIf::Absent, Some(_)) => return Err(BlobError::AlreadyExists(key.clone())),
            (PutIf::Is(etag), present) if present.as_ref() != Some(&etag.0) => {
                return Err(BlobError::Changed(key.clone()));
            }
            _ => {}
        }
        table.version += 1;
        let version = table.version;
        table.blobs.insert(key.clone(), Held { content, version, modified });
        Ok(ETag(version.to_string()))
    }

    async fn get(&self, key: &BlobKey, bytes_max: u64) -> Result<(BlobInfo, Bytes), BlobError> {
        self.read(key, |info, content| {
            check_wanted(key, info.size_bytes, bytes_max)?;
            Ok((info, content.clone()))
        })
    }

    async fn get_range(
        &self,
        key: &BlobKey,
        range: Range<u64>,
    ) -> Result<(BlobInfo, Bytes), BlobError> {
        check_range(key, &range)?;
        self.read(key, |info, content| {
            let within = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(content.len());
            let (start, end) = (within(range.start), within(range.end));
            Ok((info, content.slice(start..end.max(start))))
        })
    }

    async fn head(&self, key: &BlobKey) -> Result<BlobInfo, BlobError> {
        self.read(key, |info, _| Ok(info))
    }

    async fn list(
        &self,
        folder: &BlobFolder,
        after: Option<&BlobKey>,
        limit: usize,
    ) -> Result<BlobPage, BlobError> {
        let limit = limit.clamp(1, LIST_MAX);
        let table = self.table.read();
        let first = BlobKey(Arc::clone(&folder.0));
        let from = after.filter(|after| **after > first).unwrap_or(&first);
        let mut blobs: Vec<BlobInfo> = table
            .blobs
            .range(from.clone()..)
            .filter(|(key, _)| after != Some(*key))
            .take_while(|(key, _)| folder.holds(key))
            .take(limit + 1)
            .map(|(key, held)| info(key, held))
            .collect();
        Ok(page(&mut blobs, limit))
    }

    async fn delete(&self, key: &BlobKey) -> Result<(), BlobError> {
        self.table.write().blobs.remove(key);
        Ok(())
    }
}

/// A page of at most `limit` from up to one more, which tells whether there is a next.
pub fn page(blobs: &mut Vec<BlobInfo>, limit: usize) -> BlobPage {
    let more = blobs.len() > limit;
    blobs.truncate(limit);
    let next = if more { blobs.last().map(|blob| blob.key.clone()) } else { None };
    BlobPage { blobs: std::mem::take(blobs), next }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ACCOUNT: AccountId = AccountId::from_bytes([7; 16]);

    #[test]
    fn names_that_could_mean_another_are_refused() {
        for name in [
            "", "/", "a/", "/a", "a//b", ".", "..", "a/../b", ".hidden", "-rf", "=a", "A", "ä",
            "a b", "a\\b", "a%2fb", "a\n", "a~", "a*",
        ] {
            assert!(BlobKey::of(ACCOUNT, name).is_err(), "{name:?}");
            assert!(BlobKey::shared(name).is_err(), "{name:?}");
            assert!(name.is_empty() || BlobFolder::of(ACCOUNT, name).is_err(), "{name:?}");
        }
        for name in ["a", "cold/2026-11-20/s_1.parquet", "x..y", "year=2026/m=1", "_"] {
            let key = BlobKey::of(ACCOUNT, name).unwrap();
            assert_eq!((key.name(), key.account()), (name, Some(ACCOUNT)));
            let key = BlobKey::shared(name).unwrap();
            assert_eq!((key.name(), key.account()), (name, None));
        }
        let part = "p".repeat(PART_BYTES_MAX);
        assert!(BlobKey::shared(&format!("{part}/{}", "p".repeat(PART_BYTES_MAX - 1))).is_ok());
        assert!(BlobKey::shared(&format!("{part}/{part}")).is_err());
        assert!(BlobKey::shared(&format!("{part}p")).is_err());
    }

    #[test]
    fn an_account_reaches_nothing_of_another() {
        let other = AccountId::from_bytes([8; 16]);
        let (own, foreign) = (BlobKey::of(ACCOUNT, "a").unwrap(), BlobKey::of(other, "a").unwrap());
        let all = BlobFolder::of(ACCOUNT, "").unwrap();
        assert!(all.holds(&own) && !all.holds(&foreign));
        assert!(!all.holds(&BlobKey::shared("a").unwrap()));
        // A name cannot lead out of its account, nor be taken for another's.
        let trick = format!("accounts/{other}/a");
        let key = BlobKey::of(ACCOUNT, &trick).unwrap();
        assert!(all.holds(&key) && key != foreign);
        assert!(BlobKey::parse(foreign.as_str()).is_ok());
        // An id that is written otherwise would be a second key for one blob.
        assert!(
            BlobKey::parse(&format!("accounts/{}/a", other.to_string().replace('-', ""))).is_err()
        );
    }

    proptest! {
        /// Whatever is read as a key is one, and is written as it was read.
        #[test]
        fn what_is_parsed_is_the_same_again(text in "(shared|accounts)?(/[a-z0-9./=-]{0,40}){0,4}") {
            if let Ok(key) = BlobKey::parse(&text) {
                prop_assert_eq!(key.as_str(), &text);
                let again = match key.account() {
                    Some(account) => BlobKey::of(account, key.name()),
                    None => BlobKey::shared(key.name()),
                };
                prop_assert_eq!(again.unwrap(), key);
            }
        }

        #[test]
        fn every_name_that_is_taken_is_parsed(name in "[a-z0-9_][a-z0-9._=-]{0,20}(/[a-z0-9_][a-z0-9.=-]{0,20}){0,3}") {
            let key = BlobKey::of(ACCOUNT, &name).unwrap();
            prop_assert_eq!(BlobKey::parse(key.as_str()).unwrap(), key);
        }
    }
}
