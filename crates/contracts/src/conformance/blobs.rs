//! What every [`Blobs`] must do. Checks make accounts of their own, so they may share one store.
#![allow(
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a suite for tests: it panics by design"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use fieldline_model::{AccountId, Timestamp};

use crate::blobs::{BLOB_BYTES_MAX, CONDITIONAL_BYTES_MAX, NAME_BYTES_MAX, PART_BYTES_MAX};
use crate::{BlobError, BlobFolder, BlobKey, BlobSource, Blobs, PutIf};

const START: Timestamp = Timestamp::from_seconds(1_800_000_000);

/// More than one part of an upload, and no multiple of any power of two.
const LARGE_BYTES: usize = (20 << 20) + 12_345;

/// Runs every check; panics at the first that fails.
pub async fn run(blobs: Arc<dyn Blobs>) {
    let ran = checks(&blobs).await;
    assert!(ran >= 13, "only {ran} checks were run");
}

fn account() -> AccountId {
    AccountId::new(START, rand::random())
}

fn key(account: AccountId, name: &str) -> BlobKey {
    BlobKey::of(account, name).expect("a name")
}

fn folder(account: AccountId, name: &str) -> BlobFolder {
    BlobFolder::of(account, name).expect("a name")
}

/// Bytes that are nowhere the same as next to them; `seed` makes them others.
fn content(bytes: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut all = Vec::with_capacity(bytes + 8);
    while all.len() < bytes {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        all.extend_from_slice(&state.rotate_left(23).to_le_bytes());
    }
    all.truncate(bytes);
    all.into()
}

/// A file with `content`, gone when dropped.
struct File(PathBuf);

impl File {
    fn with(content: &[u8]) -> Self {
        let name = format!("fieldline-blobs-{:016x}", rand::random::<u64>());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, content).expect("the temporary folder takes a file");
        Self(path)
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for File {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).unwrap_or_default();
    }
}

async fn put(blobs: &Arc<dyn Blobs>, key: &BlobKey, bytes: &Bytes) {
    blobs.put(key, bytes.clone().into(), PutIf::Any).await.expect("a blob is stored");
}

async fn read(blobs: &Arc<dyn Blobs>, key: &BlobKey) -> Bytes {
    let (info, bytes) = blobs.get(key, BLOB_BYTES_MAX).await.expect("a blob is read");
    assert_eq!((&info.key, info.size_bytes), (key, bytes.len() as u64));
    bytes
}

/// All names of a folder, by pages of `limit`.
async fn names(blobs: &Arc<dyn Blobs>, folder: &BlobFolder, limit: usize) -> Vec<String> {
    let (mut names, mut after) = (Vec::new(), None);
    loop {
        let page = blobs.list(folder, after.as_ref(), limit).await.expect("a list");
        assert!(page.blobs.len() <= limit, "{} of at most {limit}", page.blobs.len());
        names.extend(page.blobs.iter().map(|blob| blob.key.name().to_owned()));
        after = page.next;
        if after.is_none() {
            return names;
        }
        assert!(names.len() < 1_000, "a list without end");
    }
}

macro_rules! suite {
    ($($(#[doc = $doc:literal])+ async fn $name:ident($blobs:ident) $body:block)+) => {
        $($(#[doc = $doc])+ async fn $name($blobs: &Arc<dyn Blobs>) $body)+

        /// Runs all, one after the other, and returns how many.
        async fn checks(blobs: &Arc<dyn Blobs>) -> usize {
            let mut ran = 0;
            $(
                tracing::info!(check = stringify!($name), "conformance of Blobs");
                Box::pin($name(blobs)).await;
                ran += 1;
            )+
            ran
        }
    };
}

suite! {
    /// What was written is read, with what is known of it; an empty blob is one too.
    async fn what_was_written_is_read(blobs) {
        let account = account();
        for (name, bytes) in [("empty", 0), ("one", 1), ("a/b/c.bin", 70_000)] {
            let (key, bytes) = (key(account, name), content(bytes, 1));
            let etag = blobs.put(&key, bytes.clone().into(), PutIf::Any).await.expect("it is stored");
            assert!(read(blobs, &key).await == bytes, "{name}: other bytes");
            let info = blobs.head(&key).await.expect("it is there");
            assert_eq!((&info.key, info.size_bytes, &info.etag), (&key, bytes.len() as u64, &etag));
            assert!(info.modified.as_micros() > 0, "{info:?}");
        }
        let shared = BlobKey::shared(&format!("suite/{}", rand::random::<u32>())).expect("a name");
        put(blobs, &shared, &content(10, 2)).await;
        assert!(read(blobs, &shared).await == content(10, 2));
        blobs.delete(&shared).await.expect("it is deleted");
    }

    /// What is not there is not found, and is deleted all the same.
    async fn what_is_not_there_is_not_found(blobs) {
        let key = key(account(), "none");
        let none = BlobError::NotFound(key.clone());
        assert_eq!(blobs.get(&key, 1).await.expect_err("it is refused"), none);
        assert_eq!(blobs.get_range(&key, 0..1).await.expect_err("it is refused"), none);
        assert_eq!(blobs.head(&key).await.expect_err("it is refused"), none);
        blobs.delete(&key).await.expect("nothing to do");
    }

    /// A deleted blob is gone, can be deleted again, and written again.
    async fn a_deleted_blob_is_gone(blobs) {
        let account = account();
        let (one, other) = (key(account, "x/one"), key(account, "x/other"));
        put(blobs, &one, &content(5, 1)).await;
        put(blobs, &other, &content(5, 2)).await;
        for _ in 0..2 {
            blobs.delete(&one).await.expect("it is deleted");
            assert_eq!(blobs.head(&one).await.expect_err("it is refused"), BlobError::NotFound(one.clone()));
        }
        assert_eq!(names(blobs, &folder(account, ""), 10).await, ["x/other"]);
        blobs.put(&one, content(6, 3).into(), PutIf::Absent).await.expect("nothing is there");
        assert!(read(blobs, &one).await == content(6, 3));
        assert!(read(blobs, &other).await == content(5, 2));
    }

    /// A blob that is written again is replaced, and has another etag if it is another.
    async fn a_blob_is_replaced(blobs) {
        let key = key(account(), "replaced");
        let mut etags = Vec::new();
        for size in [9, 4, 70_000, 0] {
            let etag = blobs.put(&key, content(size, 9).into(), PutIf::Any).await.expect("stored");
            assert!(read(blobs, &key).await == content(size, 9));
            assert!(!etags.contains(&etag), "{etag:?} stands for two contents");
            etags.push(etag);
        }
    }

    /// The first stays: a second under the condition that none is there is refused.
    async fn the_first_stays(blobs) {
        let key = key(account(), "first");
        blobs.put(&key, content(3, 1).into(), PutIf::Absent).await.expect("it is the first");
        for again in [content(3, 1), content(4, 2)] {
            let refused = blobs.put(&key, again.into(), PutIf::Absent).await;
            assert_eq!(refused.expect_err("it is refused"), BlobError::AlreadyExists(key.clone()));
        }
        assert!(read(blobs, &key).await == content(3, 1));
    }

    /// Of many that write the first at once, one does, and it is what is there.
    async fn of_many_first_one_is(blobs) {
        let account = account();
        for round in 0..4_u64 {
            let key = key(account, &format!("race-{round}"));
            let one = |seed: u64| {
                let (blobs, key) = (Arc::clone(blobs), key.clone());
                async move { blobs.put(&key, content(2_000, seed).into(), PutIf::Absent).await }
            };
            let mut tasks = tokio::task::JoinSet::new();
            for seed in 1..=6 {
                let put = one(seed);
                tasks.spawn(async move { (seed, put.await) });
            }
            let mut won = Vec::new();
            while let Some(done) = tasks.join_next().await {
                match done.expect("no panic") {
                    (seed, Ok(_)) => won.push(seed),
                    (_, Err(error)) => assert_eq!(error, BlobError::AlreadyExists(key.clone())),
                }
            }
            assert_eq!(won.len(), 1, "{won:?} all won");
            assert!(read(blobs, &key).await == content(2_000, won[0]), "another's content");
        }
    }

    /// A change of what was read is made only if it is still there.
    async fn changes_can_be_guarded(blobs) {
        let key = key(account(), "guarded");
        let one = blobs.put(&key, content(10, 1).into(), PutIf::Any).await.expect("stored");
        let guarded = |etag| blobs.put(&key, content(10, 2).into(), PutIf::Is(etag));
        let two = guarded(one.clone()).await.expect("it is still the one");
        let changed = BlobError::Changed(key.clone());
        assert_eq!(guarded(one).await.expect_err("it is refused"), changed);
        assert_eq!(blobs.head(&key).await.expect("it is there").etag, two);
        blobs.delete(&key).await.expect("it is deleted");
        assert_eq!(guarded(two).await.expect_err("it is refused"), changed);
        assert_eq!(blobs.head(&key).await.expect_err("it is refused"), BlobError::NotFound(key.clone()));
    }

    /// Of many that change what they read at once, none overwrites another unseen: a counter counts each.
    async fn no_guarded_change_is_lost(blobs) {
        const EACH: u64 = 4;
        let key = key(account(), "counter");
        put(blobs, &key, &Bytes::from("0")).await;
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..3 {
            let (blobs, key) = (Arc::clone(blobs), key.clone());
            tasks.spawn(async move {
                let mut counted = 0;
                while counted < EACH {
                    let (info, bytes) = blobs.get(&key, 100).await.expect("it is there");
                    let text = std::str::from_utf8(&bytes).expect("a number");
                    let next = (text.parse::<u64>().expect("a number") + 1).to_string();
                    let next = Bytes::from(next).into();
                    match blobs.put(&key, next, PutIf::Is(info.etag)).await {
                        Ok(_) => counted += 1,
                        Err(error) => assert_eq!(error, BlobError::Changed(key.clone())),
                    }
                }
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.expect("no panic");
        }
        assert_eq!(read(blobs, &key).await, "12");
    }

    /// Who reads while a blob is replaced sees one of both, whole, with its own size and etag.
    async fn readers_see_no_mixture(blobs) {
        let key = key(account(), "busy");
        let sizes = [150_000_usize, 3, 90_000];
        put(blobs, &key, &content(sizes[0], 0)).await;
        let done = Arc::new(AtomicBool::new(false));
        let reader = {
            let (blobs, key, done) = (Arc::clone(blobs), key.clone(), Arc::clone(&done));
            tokio::spawn(async move {
                let mut seen = 0;
                while !done.load(Ordering::SeqCst) || seen == 0 {
                    let (info, bytes) = blobs.get(&key, 1 << 20).await.expect("always whole");
                    let at = sizes.iter().position(|size| *size == bytes.len()).expect("a size of ours");
                    assert!(bytes == content(bytes.len(), at as u64), "a mixture");
                    assert_eq!(info.size_bytes, bytes.len() as u64);
                    seen += 1;
                    tokio::task::yield_now().await;
                }
                seen
            })
        };
        for round in 1..25_usize {
            let at = round % sizes.len();
            put(blobs, &key, &content(sizes[at], at as u64)).await;
        }
        done.store(true, Ordering::SeqCst);
        assert!(reader.await.expect("the reader saw no mixture") > 0);
    }

    /// Parts of a blob are read, also beyond its end.
    async fn parts_are_read(blobs) {
        let (key, bytes) = (key(account(), "parts"), content(100_000, 4));
        let etag = blobs.put(&key, bytes.clone().into(), PutIf::Any).await.expect("stored");
        for (range, expected) in [
            (0..1, 0..1),
            (0..100_000, 0..100_000),
            (40_000..70_001, 40_000..70_001),
            (99_999..100_000, 99_999..100_000),
            (99_990..200_000, 99_990..100_000),
            (100_000..100_001, 0..0),
            (5_000_000..5_000_001, 0..0),
            (7..7, 0..0),
        ] {
            let (info, part) = blobs.get_range(&key, range.clone()).await.expect("a part");
            assert!(part == bytes[expected], "{range:?}: other bytes");
            assert_eq!((info.size_bytes, &info.etag), (100_000, &etag), "{range:?}");
        }
        let far = blobs.get_range(&key, 0..CONDITIONAL_BYTES_MAX + 1).await;
        assert!(matches!(far, Err(BlobError::Refused(_))), "{far:?}");
    }

    /// A large blob goes through, from memory and from a file, and is replaced by a small one.
    async fn a_large_blob_goes_through(blobs) {
        let (key, bytes) = (key(account(), "large.bin"), content(LARGE_BYTES, 5));
        let file = File::with(&bytes);
        for source in [BlobSource::from(bytes.clone()), file.path().to_owned().into()] {
            let etag = blobs.put(&key, source, PutIf::Any).await.expect("it is stored");
            assert!(read(blobs, &key).await == bytes, "other bytes");
            let info = blobs.head(&key).await.expect("it is there");
            assert_eq!((info.size_bytes, info.etag), (LARGE_BYTES as u64, etag));
            for at in [8 << 20, 16 << 20, LARGE_BYTES - 3] {
                let range = at as u64 - 3..at as u64 + 3;
                let (_, part) = blobs.get_range(&key, range).await.expect("a part");
                assert!(part == bytes[at - 3..at + 3], "other bytes at {at}");
            }
            blobs.delete(&key).await.expect("it is deleted");
        }
        blobs.put(&key, file.path().to_owned().into(), PutIf::Any).await.expect("it is stored");
        put(blobs, &key, &content(10, 1)).await;
        assert!(read(blobs, &key).await == content(10, 1));
    }

    /// What is too large, or cannot be read, is refused, and nothing is stored.
    async fn limits_are_kept(blobs) {
        let key = key(account(), "limits");
        let refused = |result: Result<_, BlobError>| match result {
            Err(BlobError::Refused(reason)) => reason,
            other => panic!("expected a refusal: {:?}", other.map(|_: crate::ETag| ())),
        };
        let large = content(LARGE_BYTES, 1);
        let file = File::with(&large);
        let absent = blobs.put(&key, file.path().to_owned().into(), PutIf::Absent).await;
        assert!(refused(absent).contains(&LARGE_BYTES.to_string()));
        refused(blobs.put(&key, large.into(), PutIf::Absent).await);
        let missing = file.path().with_extension("missing");
        let reason = refused(blobs.put(&key, missing.into(), PutIf::Any).await);
        assert!(reason.contains("missing"), "{reason}");
        assert_eq!(blobs.head(&key).await.expect_err("it is refused"), BlobError::NotFound(key.clone()));
        put(blobs, &key, &content(100, 1)).await;
        assert!(matches!(blobs.get(&key, 99).await, Err(BlobError::Refused(_))));
        blobs.get(&key, 100).await.expect("it is no larger");
    }

    /// Lists are in the order of keys, by pages, and hold what is in the folder and nothing else.
    async fn lists_are_in_order(blobs) {
        let account = account();
        // Bytes before and after `/`, and names that begin like folders.
        let sorted = ["a-b", "a.x/1", "a/1", "a/b-c", "a/b/1", "a/b/2", "a0/1", "aa", "b", "c/d/e/f"];
        let mut shuffled = sorted;
        shuffled.reverse();
        shuffled.swap(1, 6);
        for (at, name) in shuffled.iter().enumerate() {
            put(blobs, &key(account, name), &content(at, 1)).await;
        }
        for limit in [1, 2, 3, 9, 10, 11, 1_000] {
            assert_eq!(names(blobs, &folder(account, ""), limit).await, sorted, "by {limit}");
        }
        assert_eq!(names(blobs, &folder(account, "a"), 2).await, ["a/1", "a/b-c", "a/b/1", "a/b/2"]);
        assert_eq!(names(blobs, &folder(account, "a/b"), 1).await, ["a/b/1", "a/b/2"]);
        assert_eq!(names(blobs, &folder(account, "c"), 1).await, ["c/d/e/f"]);
        assert!(names(blobs, &folder(account, "none"), 1).await.is_empty());
        assert!(names(blobs, &folder(account, "b"), 1).await.is_empty());
        // A cursor need not be there any more.
        let after = key(account, "a/b");
        let page = blobs.list(&folder(account, "a"), Some(&after), 10).await.expect("a list");
        let found: Vec<&str> = page.blobs.iter().map(|blob| blob.key.name()).collect();
        assert_eq!((found, page.next), (vec!["a/b-c", "a/b/1", "a/b/2"], None));
        let whole = blobs.list(&folder(account, ""), None, 100).await.expect("a list");
        for listed in whole.blobs {
            let head = blobs.head(&listed.key).await.expect("it is there");
            assert_eq!((listed.size_bytes, &listed.etag), (head.size_bytes, &head.etag), "{:?}", listed.key);
        }
    }

    /// An account's blobs are its own, and those of the installation nobody's.
    async fn accounts_are_apart(blobs) {
        let (one, other) = (account(), account());
        put(blobs, &key(one, "same"), &content(4, 1)).await;
        put(blobs, &key(other, "same"), &content(4, 2)).await;
        assert!(read(blobs, &key(one, "same")).await == content(4, 1));
        assert_eq!(names(blobs, &folder(one, ""), 5).await, ["same"]);
        blobs.delete(&key(one, "same")).await.expect("it is deleted");
        assert!(read(blobs, &key(other, "same")).await == content(4, 2));
        // A cursor of another account leads nowhere else.
        let after = key(one, "a");
        let page = blobs.list(&folder(other, ""), Some(&after), 5).await.expect("a list");
        assert!(page.blobs.iter().all(|blob| blob.key.account() == Some(other)), "{page:?}");
    }

    /// The longest name can be used.
    async fn the_longest_name_is_one(blobs) {
        let account = account();
        let part = "n".repeat(PART_BYTES_MAX);
        let rest = "m".repeat(NAME_BYTES_MAX - PART_BYTES_MAX - 1);
        let name = format!("{part}/{rest}");
        let key = key(account, &name);
        put(blobs, &key, &content(20, 1)).await;
        assert!(read(blobs, &key).await == content(20, 1));
        assert_eq!(names(blobs, &folder(account, &part), 5).await, [name]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn blobs_in_memory_conform() {
        run(Arc::new(crate::MemoryBlobs::new(Arc::new(crate::SystemClock)))).await;
    }
}
