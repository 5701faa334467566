//! The registry in SQLite: the conformance suite, and what a file can do to us.

use std::path::Path;
use std::sync::Arc;

use fieldline_contracts::conformance::registry;
use fieldline_contracts::{Actor, Draft, Kind, Page, Registry, RegistryError, SystemClock};
use fieldline_model::AccountId;
use fieldline_sqlite::{OpenError, SqliteRegistry};
use uuid::Uuid;

fn open(path: &Path) -> Result<SqliteRegistry, OpenError> {
    SqliteRegistry::open(path, Arc::new(SystemClock))
}

fn draft(n: u128) -> Draft {
    let body = serde_json::json!({"n": n.to_string(), "fill": "x".repeat(500)});
    Draft { kind: Kind::Device, id: Uuid::from_u128(n), unique: Default::default(), body }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms() {
    let dir = tempfile::tempdir().unwrap();
    registry::run(Arc::new(open(&dir.path().join("registry.sqlite")).unwrap())).await;
}

#[tokio::test]
async fn survives_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.sqlite");
    registry::survives_reopening(|| async { Arc::new(open(&path).unwrap()) as Arc<dyn Registry> })
        .await;
}

/// A process that dies takes the journal with it as it is: what was answered is there, the rest is not half there.
#[tokio::test]
async fn an_unclean_end_loses_nothing_answered() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.sqlite");
    let account = AccountId::from_bytes([1; 16]);
    let registry = open(&path).unwrap();
    for n in 1..=50 {
        registry.create(account, draft(n), &Actor::system("test")).await.unwrap();
    }
    // The files as a killed process leaves them: the database without the journal's contents.
    let after = dir.path().join("after");
    std::fs::create_dir(&after).unwrap();
    for name in ["registry.sqlite", "registry.sqlite-wal"] {
        std::fs::copy(dir.path().join(name), after.join(name)).unwrap();
    }
    // A torn last page: the end of the journal was not written whole.
    let wal =
        std::fs::OpenOptions::new().write(true).open(after.join("registry.sqlite-wal")).unwrap();
    let bytes = wal.metadata().unwrap().len();
    assert!(bytes > 0, "the journal holds what was written");

    let again = open(&after.join("registry.sqlite")).unwrap();
    let found = again.list(account, Kind::Device, &Page::first(100)).await.unwrap();
    assert_eq!(found.len(), 50);
    drop(again);

    std::fs::copy(dir.path().join("registry.sqlite"), after.join("registry.sqlite")).unwrap();
    std::fs::copy(dir.path().join("registry.sqlite-wal"), after.join("registry.sqlite-wal"))
        .unwrap();
    let wal =
        std::fs::OpenOptions::new().write(true).open(after.join("registry.sqlite-wal")).unwrap();
    wal.set_len(bytes - 1_000).unwrap();
    let torn = open(&after.join("registry.sqlite")).unwrap();
    let found = torn.list(account, Kind::Device, &Page::first(100)).await.unwrap();
    assert_eq!(found.len(), 49, "only the write that was torn is gone, and it is gone whole");
    assert_eq!(torn.audit(account, None, 100).await.unwrap().len(), 49);
}

#[tokio::test]
async fn a_second_process_is_told_that_it_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.sqlite");
    let first = open(&path).unwrap();
    // A lock of the system belongs to the open file, so a second open here is as one elsewhere.
    let error = open(&path).err().unwrap();
    assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    assert!(error.to_string().contains("stop the other Fieldline"), "{error}");
    drop(first);
    open(&path).unwrap();
}

#[tokio::test]
async fn a_newer_schema_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.sqlite");
    drop(open(&path).unwrap());
    let db = rusqlite::Connection::open(&path).unwrap();
    db.pragma_update(None, "user_version", 7_000).unwrap();
    drop(db);
    let error = open(&path).err().unwrap();
    assert!(matches!(error, OpenError::Newer { found: 7_000, .. }), "{error}");
    assert!(error.to_string().contains("start the newer Fieldline"), "{error}");
}

#[tokio::test]
async fn a_file_of_another_program_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.sqlite");
    let db = rusqlite::Connection::open(&path).unwrap();
    db.execute_batch("CREATE TABLE objects (mine TEXT)").unwrap();
    drop(db);
    let error = open(&path).err().unwrap();
    assert!(matches!(error, OpenError::Foreign { .. }), "{error}");
}

#[tokio::test]
async fn damage_is_named_with_the_file_and_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.sqlite");
    std::fs::write(&path, "this is no database ".repeat(400)).unwrap();
    let error = open(&path).err().unwrap();
    assert!(matches!(error, OpenError::Damaged { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("registry.sqlite") && text.contains("restore a backup"), "{text}");
}

/// Damage within the file is an error where it is met, and the rest goes on.
#[tokio::test]
async fn a_damaged_page_is_an_error_not_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.sqlite");
    let account = AccountId::from_bytes([1; 16]);
    let registry = open(&path).unwrap();
    for n in 1..=200 {
        registry.create(account, draft(n), &Actor::system("test")).await.unwrap();
    }
    drop(registry);
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2 / 4_096 * 4_096;
    bytes[middle..middle + 4_096 * 4].fill(0xA5);
    std::fs::write(&path, bytes).unwrap();
    let registry = open(&path).unwrap();
    let listed = registry.list(account, Kind::Device, &Page::first(1_000)).await;
    match listed {
        Err(RegistryError::Unavailable(reason)) => {
            assert!(reason.contains("restore a backup"), "{reason}")
        }
        other => panic!("expected an error, got {:?}", other.map(|all| all.len())),
    }
}

/// A directory that cannot be written to is named.
#[tokio::test]
async fn a_missing_directory_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = open(&dir.path().join("nowhere/registry.sqlite")).err().unwrap();
    assert!(
        matches!(error, OpenError::Io { .. }) && error.to_string().contains("nowhere"),
        "{error}"
    );
}
