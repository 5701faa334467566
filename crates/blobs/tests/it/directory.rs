//! A directory: conformance, kills, damage, a full disk.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use fieldline_blobs::DirectoryBlobs;
use fieldline_contracts::{BlobError, BlobFolder, BlobKey, Blobs, PutIf, conformance};

const DIR: &str = "FIELDLINE_BLOBS_KILL_DIR";
const FIRST: &str = "FIELDLINE_BLOBS_KILL_FIRST";
const KEYS: u64 = 6;

fn key(name: &str) -> BlobKey {
    BlobKey::shared(name).unwrap()
}

fn open(path: &Path) -> DirectoryBlobs {
    DirectoryBlobs::open(path).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_conforms() {
    let folder = tempfile::tempdir().unwrap();
    conformance::blobs::run(Arc::new(open(&folder.path().join("blobs")))).await;
}

/// What a number stands for, of a size that a number before or after it may share.
fn content(number: u64) -> Vec<u8> {
    let size = usize::try_from(number % 5 * 40_000 + 16).unwrap();
    number.to_le_bytes().iter().copied().cycle().take(size).collect()
}

/// The process that is killed: replaces a few blobs again and again, and prints what was stored.
async fn child(path: String) {
    let first: u64 = std::env::var(FIRST).unwrap().parse().unwrap();
    let blobs = Arc::new(open(Path::new(&path)));
    let mut tasks = tokio::task::JoinSet::new();
    for lane in 0..2_u64 {
        let blobs = Arc::clone(&blobs);
        tasks.spawn(async move {
            for number in (first..).skip(usize::try_from(lane).unwrap()).step_by(2) {
                let name = format!("kill/{}/blob", number % KEYS);
                blobs.put(&key(&name), content(number).into(), PutIf::Any).await.unwrap();
                let mut out = std::io::stdout().lock();
                writeln!(out, "ACK {number}").unwrap();
                out.flush().unwrap();
            }
        });
    }
    tasks.join_next().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_process_loses_no_blob_and_shows_no_half_one() {
    // The test starts itself again as the process that is killed.
    if let Ok(path) = std::env::var(DIR) {
        return child(path).await;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut stored: HashMap<u64, u64> = HashMap::new();
    for round in 1..=6_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "directory::a_killed_process_loses_no_blob_and_shows_no_half_one",
                "--nocapture",
            ])
            .env(DIR, folder.path())
            .env(FIRST, (round * KEYS * 1_000_000).to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (told, heard) = std::sync::mpsc::sync_channel(1 << 16);
        let reader = std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                // The test harness prints before it on the first line.
                let number = line.split_once("ACK ").and_then(|(_, number)| number.parse().ok());
                if let Some(number) = number
                    && told.send(number).is_err()
                {
                    return;
                }
            }
        });
        // Killed somewhere in a write, after some were told.
        let mut numbers: Vec<u64> = Vec::new();
        for _ in 0..5 + rand::random::<u64>() % 20 {
            numbers.push(heard.recv_timeout(Duration::from_secs(30)).expect("blobs are stored"));
        }
        std::thread::sleep(Duration::from_micros(rand::random::<u64>() % 20_000));
        child.kill().unwrap();
        child.wait().unwrap();
        reader.join().unwrap();
        // The last line may be cut, and then its number is another.
        numbers.extend(heard.try_iter());
        numbers.pop();
        for number in numbers {
            let newest = stored.entry(number % KEYS).or_default();
            *newest = number.max(*newest);
        }
        let blobs = open(folder.path());
        assert_eq!(std::fs::read_dir(folder.path().join("tmp")).unwrap().count(), 0);
        for (which, number) in &stored {
            let (_, bytes) = blobs.get(&key(&format!("kill/{which}/blob")), 1 << 20).await.unwrap();
            let found = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            assert!(bytes == content(found), "a part of a blob");
            assert!(found >= *number && found % KEYS == *which, "{number} is lost: {found}");
        }
        let page = blobs.list(&BlobFolder::shared("kill").unwrap(), None, 100).await.unwrap();
        for blob in page.blobs {
            let (info, bytes) = blobs.get(&blob.key, 1 << 20).await.expect("what is seen is whole");
            assert_eq!((info.etag, info.size_bytes), (blob.etag, bytes.len() as u64));
        }
    }
    assert!(!stored.is_empty());
}

/// A content that changed on disk is not given out, is told, and is mended by storing it again.
#[tokio::test]
async fn damage_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = open(folder.path());
    let (one, other) = (key("a/one"), key("a/other"));
    for key in [&one, &other] {
        blobs.put(key, vec![7; 1_000].into(), PutIf::Any).await.unwrap();
    }
    let file = folder.path().join("data").join(one.as_str());
    let mut bytes = std::fs::read(&file).unwrap();
    assert_eq!(bytes, [7; 1_000], "a file is the content and nothing else");
    bytes[500] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let damaged = |error| matches!(error, BlobError::Damaged { .. });
    assert!(damaged(blobs.get(&one, 2_000).await.unwrap_err()));
    std::fs::write(&file, &bytes[..999]).unwrap();
    assert!(damaged(blobs.get(&one, 2_000).await.unwrap_err()));
    assert!(damaged(blobs.head(&one).await.unwrap_err()));
    std::fs::remove_file(folder.path().join("sums").join(other.as_str())).unwrap();
    assert!(damaged(blobs.get(&other, 2_000).await.unwrap_err()));
    let page = blobs.list(&BlobFolder::shared("a").unwrap(), None, 10).await.unwrap();
    assert_eq!(page.blobs.len(), 2, "damage hides nothing else");
    for key in [&one, &other] {
        blobs.put(key, vec![8; 10].into(), PutIf::Any).await.unwrap();
        assert_eq!(blobs.get(key, 10).await.unwrap().1, vec![8; 10]);
    }
}

/// A crash between the two renames of a replacement: either content is known as its own.
#[tokio::test]
async fn both_contents_of_a_replacement_are_known() {
    let folder = tempfile::tempdir().unwrap();
    let key = key("replaced");
    let sums = folder.path().join("sums").join(key.as_str());
    let data = folder.path().join("data").join(key.as_str());
    let mut lines = String::new();
    let mut etags = Vec::new();
    for byte in [1, 2] {
        let blobs = open(folder.path());
        etags.push(blobs.put(&key, vec![byte; 50].into(), PutIf::Any).await.unwrap());
        lines.push_str(&std::fs::read_to_string(&sums).unwrap());
    }
    std::fs::write(&sums, &lines).unwrap();
    for (byte, etag) in [1_u8, 2].into_iter().zip(etags) {
        std::fs::write(&data, [byte; 50]).unwrap();
        let blobs = open(folder.path());
        assert_eq!(blobs.get(&key, 50).await.unwrap().1, vec![byte; 50]);
        assert_eq!(blobs.head(&key).await.unwrap().etag, etag);
    }
    // And a third is neither.
    std::fs::write(&data, [3; 50]).unwrap();
    let blobs = open(folder.path());
    assert!(matches!(blobs.get(&key, 50).await, Err(BlobError::Damaged { .. })));
    assert!(matches!(blobs.head(&key).await, Err(BlobError::Damaged { .. })));
}

#[tokio::test]
async fn what_a_crash_left_is_removed_and_two_processes_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a/blobs");
    drop(open(&path));
    std::fs::write(path.join("tmp/17"), "half").unwrap();
    let blobs = open(&path);
    assert_eq!(std::fs::read_dir(path.join("tmp")).unwrap().count(), 0);
    let refused = DirectoryBlobs::open(&path).err().expect("one at a time").to_string();
    assert!(refused.contains("another process") && refused.contains("blobs.url"), "{refused}");
    drop(blobs);
    drop(open(&path));
    std::fs::write(folder.path().join("file"), "").unwrap();
    let refused =
        DirectoryBlobs::open(&folder.path().join("file/blobs")).err().unwrap().to_string();
    assert!(refused.contains("file/blobs"), "{refused}");
}

/// A file system cannot have a file and a folder of one name.
#[tokio::test]
async fn a_blob_is_no_folder() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = open(folder.path());
    blobs.put(&key("a/b"), vec![1].into(), PutIf::Any).await.unwrap();
    for name in ["a/b/c", "a"] {
        let refused = blobs.put(&key(name), vec![2].into(), PutIf::Any).await;
        assert!(
            matches!(&refused, Err(BlobError::Refused(why)) if why.contains("another name")),
            "{refused:?}"
        );
        let none = blobs.get(&key(name), 10).await;
        assert_eq!(none.unwrap_err(), BlobError::NotFound(key(name)));
        blobs.delete(&key(name)).await.unwrap();
    }
    assert_eq!(blobs.get(&key("a/b"), 1).await.unwrap().1, vec![1]);
    blobs.delete(&key("a/b")).await.unwrap();
    blobs.put(&key("a"), vec![2].into(), PutIf::Any).await.unwrap();
}

/// A small file system of its own, gone with the test.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=4m", "fieldline-test"])
            .arg(folder.path())
            .status()
            .unwrap();
        assert!(
            mounted.success(),
            "this test mounts a small file system: run it as root, or under `unshare --user --map-root-user --mount`"
        );
        Self(folder)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _status = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_full_disk_is_told_and_gone_on_after() {
    let disk = SmallDisk::mount();
    let blobs = open(disk.0.path());
    blobs.put(&key("small"), vec![1; 1_000].into(), PutIf::Any).await.unwrap();
    let full = blobs.put(&key("small"), vec![2; 6 << 20].into(), PutIf::Any).await.unwrap_err();
    assert!(full.is_retryable() && full.to_string().contains("is full"), "{full}");
    assert!(blobs.problems()[0].contains("is full"));
    assert_eq!(std::fs::read_dir(disk.0.path().join("tmp")).unwrap().count(), 0);
    assert_eq!(blobs.get(&key("small"), 1_000).await.unwrap().1, vec![1; 1_000]);
    blobs.put(&key("small"), vec![3; 2 << 20].into(), PutIf::Any).await.unwrap();
    assert!(blobs.problems().is_empty());
}
