//! The registry in SQLite: the conformance suite, and what a file can do to us.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::conformance::{client_store, registry};
use fieldline_contracts::registry::ParameterObject;
use fieldline_contracts::{
    Actor, ClientStore as _, Draft, Kind, Page, Registry, RegistryError, RegistryExt as _,
    SystemClock, WillChange, WillKey,
};
use fieldline_model::dictionary::dictionary;
use fieldline_model::{AccountId, ParamName, ParamSpec, Timestamp};
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_clients_leave_conforms_and_outlives_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.sqlite");
    client_store::run(Arc::new(open(&path).unwrap())).await;
    let (account, limits) = (
        AccountId::from_bytes([1; 16]),
        fieldline_contracts::RetainLimits { messages: 10, bytes: 1_000 },
    );
    let message = fieldline_contracts::RetainedMessage {
        topic: "client/a".into(),
        payload: vec![1].into(),
        props: Default::default(),
        at_least_once: true,
        expires_at: None,
    };
    let key = WillKey { account, client_id: "a".into(), number: 1 };
    let begin = WillChange::Begin { key: key.clone(), will: Some("x".to_owned()) };
    let now = Timestamp::from_seconds(1);
    {
        let store = open(&path).unwrap();
        store.retain(account, vec![message.clone()], limits, now).await.unwrap();
        store.keep_wills(7, &[begin]).await.unwrap();
        assert_eq!(store.adopt(7, Duration::ZERO).await.unwrap(), None, "its own");
    }
    let store = open(&path).unwrap();
    assert_eq!(store.retained(account, "client/", None, 10).await.unwrap(), [message]);
    assert_eq!(store.adopt(8, Duration::from_secs(3_600)).await.unwrap(), Some(7), "it is gone");
    assert_eq!(store.wills(7, 10).await.unwrap(), [(key, "x".to_owned())]);
    store.forget_owner(7).await.unwrap();
    assert_eq!(store.adopt(8, Duration::ZERO).await.unwrap(), None);
    // What an account retained goes with it.
    let body = serde_json::json!({});
    let draft = Draft { kind: Kind::Account, id: account.0, unique: Default::default(), body };
    store.create(account, draft, &Actor::system("test")).await.unwrap();
    store.delete(account, Kind::Account, account.0, None, &Actor::system("test")).await.unwrap();
    assert_eq!(store.retained(account, "", None, 10).await.unwrap(), []);
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
    // That one was not answered: it is not in the mark.
    std::fs::remove_file(after.join("registry.sqlite-mark")).unwrap();
    let torn = open(&after.join("registry.sqlite")).unwrap();
    let found = torn.list(account, Kind::Device, &Page::first(100)).await.unwrap();
    assert_eq!(found.len(), 49, "only the write that was torn is gone, and it is gone whole");
    assert_eq!(torn.audit(account, None, 100).await.unwrap().len(), 49);
}

/// What SQLite takes for the end of the journal is known for a loss.
#[tokio::test]
async fn a_journal_that_lost_its_end_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.sqlite");
    let account = AccountId::from_bytes([1; 16]);
    let registry = open(&path).unwrap();
    for n in 1..=50 {
        registry.create(account, draft(n), &Actor::system("test")).await.unwrap();
    }
    let files = ["registry.sqlite", "registry.sqlite-wal", "registry.sqlite-mark"];
    let copy = |name: &str| {
        let after = dir.path().join(name);
        std::fs::create_dir(&after).unwrap();
        for file in files {
            std::fs::copy(dir.path().join(file), after.join(file)).unwrap();
        }
        after
    };
    let whole = copy("whole");
    assert_eq!(open(&whole.join(files[0])).unwrap().changes(0, 100).await.unwrap().len(), 50);

    let cut = copy("cut");
    let wal = std::fs::OpenOptions::new().write(true).open(cut.join(files[1])).unwrap();
    wal.set_len(wal.metadata().unwrap().len() / 2).unwrap();
    let flipped = copy("flipped");
    let mut bytes = std::fs::read(flipped.join(files[1])).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(flipped.join(files[1]), &bytes).unwrap();
    let gone = copy("gone");
    std::fs::remove_file(gone.join(files[1])).unwrap();
    for damaged in [&cut, &flipped, &gone] {
        let before = std::fs::read(damaged.join(files[1])).ok();
        for _ in 0..2 {
            let error = open(&damaged.join(files[0])).err().unwrap();
            assert!(matches!(error, OpenError::Shortened { known: 50, .. }), "{error}");
            assert!(error.to_string().contains("restore a backup"), "{error}");
        }
        let journal = std::fs::read(damaged.join(files[1])).unwrap_or_default();
        assert!(before.is_none_or(|before| before == journal), "the journal is left as it was");
        // Whoever takes the loss says so.
        std::fs::remove_file(damaged.join(files[2])).unwrap();
        open(&damaged.join(files[0])).unwrap();
    }
}

/// Who copies the file alone misses seconds at most, and nothing after a clean end.
#[tokio::test]
async fn the_journal_is_brought_into_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.sqlite");
    let account = AccountId::from_bytes([1; 16]);
    let registry = open(&path).unwrap();
    let alone = |name: &str| {
        let copy = dir.path().join(name);
        std::fs::copy(&path, &copy).unwrap();
        copy
    };
    registry.create(account, draft(1), &Actor::system("test")).await.unwrap();
    let mut tries = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let journal = dir.path().join("registry.sqlite-wal").metadata().unwrap().len();
        if journal == 0 {
            break;
        }
        tries += 1;
        assert!(tries < 300, "the journal holds {journal} bytes after half a minute");
    }
    let copied = open(&alone("quiet")).unwrap();
    assert_eq!(copied.list(account, Kind::Device, &Page::first(9)).await.unwrap().len(), 1);

    registry.create(account, draft(2), &Actor::system("test")).await.unwrap();
    registry.settle().await.unwrap();
    let copied = open(&alone("settled")).unwrap();
    assert_eq!(copied.list(account, Kind::Device, &Page::first(9)).await.unwrap().len(), 2);
    registry.create(account, draft(3), &Actor::system("test")).await.unwrap();
}

/// A damaged object is an error where it is asked for, and no hindrance to those beside it.
#[tokio::test]
async fn a_damaged_object_hides_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.sqlite");
    let account = AccountId::from_bytes([1; 16]);
    let registry = open(&path).unwrap();
    for n in 1..=5 {
        registry.create(account, draft(n), &Actor::system("test")).await.unwrap();
    }
    drop(registry);
    let db = rusqlite::Connection::open(&path).unwrap();
    let damage = |n: u128, body: &[u8]| {
        let sql = "UPDATE objects SET body = CAST(?2 AS TEXT) WHERE id = ?1";
        assert_eq!(db.execute(sql, (Uuid::from_u128(n).as_bytes(), body)).unwrap(), 1);
    };
    damage(2, b"{\"n\": \"2\", \xff");
    damage(4, b"{\"n\": ");
    drop(db);
    let registry = open(&path).unwrap();
    let all = registry.list(account, Kind::Device, &Page::first(9)).await.unwrap();
    assert_eq!(all.len(), 5);
    assert_eq!(all.iter().filter(|record| record.body.is_null()).count(), 2);
    let equals = vec![("n".to_owned(), "3".into())];
    let page = Page { equals, ..Page::first(9) };
    assert_eq!(registry.list(account, Kind::Device, &page).await.unwrap().len(), 1);
    let error = registry.get(account, Kind::Device, Uuid::from_u128(2)).await.unwrap_err();
    assert!(matches!(error, RegistryError::Corrupt { .. }), "{error}");
    let by = Actor::system("test");
    registry.delete(account, Kind::Device, Uuid::from_u128(2), None, &by).await.unwrap();
}

/// Pages of typed objects are full where there are more, whatever was passed over.
#[tokio::test]
async fn pages_go_on_behind_what_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let registry = open(&dir.path().join("registry.sqlite")).unwrap();
    let (account, by) = (AccountId::from_bytes([1; 16]), Actor::system("test"));
    for n in 1..=9 {
        let mut spec = ParamSpec::clone(&dictionary()[0]);
        spec.name = ParamName::new(format!("p{n}")).unwrap();
        if [2, 3, 4, 9].contains(&n) {
            let mut bad = draft(n);
            bad.kind = Kind::Parameter;
            registry.create(account, bad, &by).await.unwrap();
        } else {
            let object = ParameterObject { id: Uuid::from_u128(n), spec };
            registry.create_object(account, &object, &by).await.unwrap();
        }
    }
    let (mut page, mut pages) = (Page::first(2), Vec::<Vec<String>>::new());
    loop {
        let found = registry.list_objects::<ParameterObject>(account, &page).await.unwrap();
        page.after = found.last().map(|found| found.object.id);
        pages.push(found.iter().map(|found| found.object.spec.name.as_str().to_owned()).collect());
        if found.len() < 2 {
            break;
        }
    }
    let wanted: [&[&str]; 3] = [&["p1", "p5"], &["p6", "p7"], &["p8"]];
    assert_eq!(pages, wanted);
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

/// A file of the version before is brought up to date, with all that it has.
#[tokio::test]
async fn an_older_schema_is_brought_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.sqlite");
    let (account, actor) = (AccountId::from_bytes([1; 16]), Actor::system("test"));
    open(&path).unwrap().create(account, draft(1), &actor).await.unwrap();
    let db = rusqlite::Connection::open(&path).unwrap();
    db.execute_batch("DROP TABLE retained; DROP TABLE wills; PRAGMA user_version = 1").unwrap();
    drop(db);
    let registry = open(&path).unwrap();
    assert!(registry.get(account, Kind::Device, Uuid::from_u128(1)).await.unwrap().is_some());
    assert_eq!(registry.retained(account, "", None, 1).await.unwrap(), []);
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
