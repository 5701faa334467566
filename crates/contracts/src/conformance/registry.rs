//! What every [`Registry`] must do. Run [`run`] against a backend, and [`survives_reopening`] if it
//! keeps anything beyond its process.
//!
//! Checks make accounts and names of their own, so they may share one store, even one in use.
#![allow(
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a suite for tests: it panics by design"
)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fieldline_model::AccountId;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::registry::{Actor, AuditAction, Draft, Kind, Page, Record, Registry, UniqueIn};
use crate::{Audit, RegistryError};

/// Runs every check; panics at the first that fails, after printing its name.
pub async fn run(registry: Arc<dyn Registry>) {
    let ran = checks(&registry).await;
    assert!(ran >= 20, "only {ran} checks were run");
}

/// What was written is there, with its revision and audit, after the store was closed and opened
/// again; the revision and the sequence go on counting from where they were.
pub async fn survives_reopening<F, R>(open: F)
where
    F: Fn() -> R,
    R: Future<Output = Arc<dyn Registry>>,
{
    let registry = open().await;
    let account = account();
    let kept = create(&registry, account, json!({"a": 1})).await;
    let deleted = create(&registry, account, json!({"a": 2})).await;
    registry.delete(account, Kind::Device, deleted.id, None, &actor()).await.expect("deletes");
    let trail = registry.audit(account, None, 10).await.expect("reads the audit");
    let newest = *registry.watch().borrow();
    drop(registry);

    let registry = open().await;
    assert_eq!(get(&registry, account, kept.id).await, Some(kept.clone()));
    assert_eq!(get(&registry, account, deleted.id).await, None);
    assert_eq!(registry.audit(account, None, 10).await.expect("reads the audit"), trail);
    assert!(*registry.watch().borrow() >= newest, "the watch starts at the newest sequence");
    let next = create(&registry, account, json!({})).await;
    assert!(next.revision > kept.revision, "revisions go on counting");
    let audit = newest_audit(&registry, account).await;
    assert!(audit.sequence > newest, "sequences are not used again");
}

macro_rules! suite {
    ($($(#[doc = $doc:literal])+ async fn $name:ident($registry:ident) $body:block)+) => {
        $($(#[doc = $doc])+ async fn $name($registry: &Arc<dyn Registry>) $body)+

        /// Runs all, one after the other, and returns how many.
        async fn checks(registry: &Arc<dyn Registry>) -> usize {
            let mut ran = 0;
            $(
                let _named = Named(stringify!($name));
                $name(registry).await;
                ran += 1;
            )+
            ran
        }
    };
}

/// Prints the name of the check that a panic ends.
struct Named(&'static str);

impl Drop for Named {
    #[allow(clippy::print_stderr, reason = "a suite for tests: this is its report")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("registry conformance: the check `{}` failed", self.0);
        }
    }
}

suite! {
    /// What is created can be read, with the body as it was given.
    async fn what_is_created_can_be_read(registry) {
        let account = account();
        let body = json!({"name": "Zürich \u{1F69A} \" ' \\", "n": 9_007_199_254_740_993_i64, "x": 0.1,
            "deep": {"b": [1, null, {"c": true}], "a": ""}});
        let made = create(registry, account, body.clone()).await;
        assert_eq!(made.body, body);
        assert_eq!(made.account, account);
        assert_eq!(get(registry, account, made.id).await, Some(made));
    }

    /// The order of an object's members is kept: people see it again in an editor.
    async fn members_keep_their_order(registry) {
        let account = account();
        let made = create(registry, account, json!({"z": 1, "a": 2, "m": {"y": 1, "b": 2}})).await;
        let read = get(registry, account, made.id).await.expect("is there");
        assert_eq!(read.body.to_string(), r#"{"z":1,"a":2,"m":{"y":1,"b":2}}"#);
    }

    /// What is not there is `None`, not an error.
    async fn what_is_not_there_is_none(registry) {
        assert_eq!(get(registry, account(), fresh()).await, None);
        assert_eq!(registry.find(account(), Kind::Device, "ident", "nobody").await.expect("finds"), None);
        assert_eq!(list(registry, account(), &Page::first(10)).await, []);
    }

    /// Every kind is stored, and objects of one kind are not seen as another.
    async fn kinds_are_apart(registry) {
        let account = account();
        for kind in Kind::ALL {
            let draft = Draft { kind, id: fresh(), unique: BTreeMap::new(), body: json!({"k": kind.name()}) };
            let made = registry.create(account, draft, &actor()).await.expect("creates");
            assert_eq!(made.kind, kind);
            for other in Kind::ALL {
                let found = registry.get(account, other, made.id).await.expect("gets");
                assert_eq!(found.is_some(), other == kind, "{kind:?} read as {other:?}");
            }
            assert_eq!(registry.list(account, kind, &Page::first(10)).await.expect("lists").len(), 1);
        }
    }

    /// Revisions only go up, by every write of any object.
    async fn revisions_go_up(registry) {
        let account = account();
        let one = create(registry, account, json!({})).await;
        let two = create(registry, account, json!({})).await;
        assert!(two.revision > one.revision);
        let again = update(registry, account, one.id, json!({"a": 1}), None).await.expect("updates");
        assert!(again.revision > two.revision);
        assert_eq!(get(registry, account, one.id).await, Some(again));
    }

    /// An update with the revision that is stored passes; with any other it is refused and changes nothing.
    async fn a_lost_update_is_refused(registry) {
        let account = account();
        let first = create(registry, account, json!({"v": 1})).await;
        let second = update(registry, account, first.id, json!({"v": 2}), Some(first.revision)).await
            .expect("the expected revision is stored");
        match update(registry, account, first.id, json!({"v": 3}), Some(first.revision)).await {
            Err(RegistryError::Changed { expected, found }) => {
                assert_eq!((expected, found), (first.revision, second.revision));
            }
            other => panic!("expected `Changed`, got {other:?}"),
        }
        match registry.delete(account, Kind::Device, first.id, Some(first.revision), &actor()).await {
            Err(RegistryError::Changed { .. }) => {}
            other => panic!("expected `Changed`, got {other:?}"),
        }
        assert_eq!(get(registry, account, first.id).await, Some(second));
    }

    /// Updating or deleting what is not there is refused.
    async fn a_missing_object_cannot_be_changed(registry) {
        let (account, id) = (account(), fresh());
        let updated = update(registry, account, id, json!({}), None).await;
        assert!(matches!(updated, Err(RegistryError::NotFound { id: named, .. }) if named == id), "{updated:?}");
        let deleted = registry.delete(account, Kind::Device, id, None, &actor()).await;
        assert!(matches!(deleted, Err(RegistryError::NotFound { .. })), "{deleted:?}");
    }

    /// An id is used once, whoever uses it.
    async fn an_id_is_taken_once(registry) {
        let account_a = account();
        let made = create(registry, account_a, json!({"mine": true})).await;
        for account in [account_a, account()] {
            let again = registry.create(account, device(made.id, json!({})), &actor()).await;
            assert!(matches!(&again, Err(RegistryError::Taken { key, .. }) if key == "id"), "{again:?}");
        }
        assert_eq!(get(registry, account_a, made.id).await, Some(made));
    }

    /// A key unique in the account is taken in it, and free in another.
    async fn account_keys_are_unique_in_the_account(registry) {
        let (a, b, ident) = (account(), account(), unique_text());
        let draft = || keyed(fresh(), "ident", UniqueIn::Account, &ident, json!({}));
        registry.create(a, draft(), &actor()).await.expect("is free");
        match registry.create(a, draft(), &actor()).await {
            Err(RegistryError::Taken { kind: Kind::Device, key, value }) => assert_eq!((key.as_str(), value), ("ident", ident.clone())),
            other => panic!("expected `Taken`, got {other:?}"),
        }
        registry.create(b, draft(), &actor()).await.expect("is free in another account");
        assert_eq!(list(registry, a, &Page::first(10)).await.len(), 1, "what was refused left nothing behind");
    }

    /// A key unique on the installation is taken everywhere, but only for its kind.
    async fn installation_keys_are_unique_everywhere(registry) {
        let (a, b, name) = (account(), account(), unique_text());
        let draft = |kind| Draft { kind, ..keyed(fresh(), "name", UniqueIn::Installation, &name, json!({})) };
        registry.create(a, draft(Kind::User), &actor()).await.expect("is free");
        let taken = registry.create(b, draft(Kind::User), &actor()).await;
        assert!(matches!(taken, Err(RegistryError::Taken { .. })), "{taken:?}");
        registry.create(b, draft(Kind::Account), &actor()).await.expect("another kind has names of its own");
    }

    /// An update moves keys: the old value is free, the new one taken; and it does not clash with itself.
    async fn an_update_moves_the_keys(registry) {
        let (account, old, new) = (account(), unique_text(), unique_text());
        let id = fresh();
        let draft = |id, value: &str, n: u32| keyed(id, "ident", UniqueIn::Account, value, json!({"n": n}));
        registry.create(account, draft(id, &old, 1), &actor()).await.expect("creates");
        registry.update(account, draft(id, &old, 2), None, &actor()).await.expect("keeps its own key");
        registry.update(account, draft(id, &new, 3), None, &actor()).await.expect("takes another");
        assert_eq!(find(registry, account, &old).await, None);
        assert_eq!(find(registry, account, &new).await.map(|r| r.id), Some(id));
        let other = fresh();
        registry.create(account, draft(other, &old, 1), &actor()).await.expect("the old one is free");
        let clash = registry.update(account, draft(other, &new, 2), None, &actor()).await;
        assert!(matches!(clash, Err(RegistryError::Taken { .. })), "{clash:?}");
        assert_eq!(find(registry, account, &old).await.map(|r| r.body), Some(json!({"n": 1})), "a refused update changes nothing");
    }

    /// Deleting frees the keys.
    async fn a_delete_frees_the_keys(registry) {
        let (account, ident) = (account(), unique_text());
        let draft = || keyed(fresh(), "ident", UniqueIn::Account, &ident, json!({}));
        let made = registry.create(account, draft(), &actor()).await.expect("creates");
        registry.delete(account, Kind::Device, made.id, Some(made.revision), &actor()).await.expect("deletes");
        assert_eq!(get(registry, account, made.id).await, None);
        assert_eq!(find(registry, account, &ident).await, None);
        registry.create(account, draft(), &actor()).await.expect("is free again");
    }

    /// Objects are found by their keys, account keys only in the account.
    async fn objects_are_found_by_their_keys(registry) {
        let (a, b, ident, name) = (account(), account(), unique_text(), unique_text());
        let mut draft = keyed(fresh(), "ident", UniqueIn::Account, &ident, json!({}));
        draft.unique.insert("name", (UniqueIn::Installation, name.clone()));
        let made = registry.create(a, draft, &actor()).await.expect("creates");
        let find = async |account, key: &str, value: &str| {
            registry.find(account, Kind::Device, key, value).await.expect("finds").map(|r| r.id)
        };
        assert_eq!(find(a, "ident", &ident).await, Some(made.id));
        assert_eq!(find(a, "name", &name).await, Some(made.id));
        assert_eq!(find(a, "name", &ident).await, None, "keys are apart");
        assert_eq!(find(b, "ident", &ident).await, None);
        assert_eq!(find(b, "name", &name).await, None, "a key of the installation shows nothing to others");
        let anywhere = async |key: &str, value: &str| {
            registry.find_anywhere(Kind::Device, key, value).await.expect("finds").map(|r| (r.account, r.id))
        };
        assert_eq!(anywhere("name", &name).await, Some((a, made.id)));
        assert_eq!(anywhere("ident", &ident).await, None, "only keys of the installation");
    }

    /// A foreign account sees nothing and changes nothing, even with the right id and revision.
    async fn a_foreign_account_sees_nothing(registry) {
        let (mine, other) = (account(), account());
        let made = create(registry, mine, json!({"secret": 1})).await;
        assert_eq!(get(registry, other, made.id).await, None);
        assert_eq!(list(registry, other, &Page::first(100)).await, []);
        let updated = update(registry, other, made.id, json!({}), Some(made.revision)).await;
        assert!(matches!(updated, Err(RegistryError::NotFound { .. })), "{updated:?}");
        let deleted = registry.delete(other, Kind::Device, made.id, Some(made.revision), &actor()).await;
        assert!(matches!(deleted, Err(RegistryError::NotFound { .. })), "{deleted:?}");
        assert_eq!(registry.audit(other, None, 100).await.expect("reads"), []);
        assert_eq!(get(registry, mine, made.id).await, Some(made));
    }

    /// Pages follow each other in order of ids, without gaps or doubles.
    async fn pages_follow_each_other(registry) {
        let account = account();
        let mut ids = Vec::new();
        for n in 0..23 {
            ids.push(create(registry, account, json!({"n": n})).await.id);
        }
        ids.sort_unstable();
        let (mut seen, mut page) = (Vec::new(), Page::first(5));
        loop {
            let records = list(registry, account, &page).await;
            assert!(records.len() <= 5);
            let Some(last) = records.last() else { break };
            page.after = Some(last.id);
            seen.extend(records.iter().map(|r| r.id));
        }
        assert_eq!(seen, ids);
        assert_eq!(list(registry, account, &Page::first(usize::MAX)).await.len(), 23, "a limit is capped, not refused");
    }

    /// `equals` keeps objects whose member has exactly that JSON value.
    async fn a_list_is_filtered_by_members(registry) {
        let account = account();
        let bodies = [
            json!({"status": "queued", "n": 1, "flag": true, "device": "x"}),
            json!({"status": "queued", "n": 2, "flag": false, "device": "y"}),
            json!({"status": "sent", "n": 1, "flag": true, "device": "x", "none": null}),
            json!({"status": "'; drop table objects; --", "n": "1", "flag": 1, "odd name": "é\"\\"}),
        ];
        for body in &bodies {
            create(registry, account, body.clone()).await;
        }
        let count = async |equals: &[(&str, Value)]| {
            let equals = equals.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
            list(registry, account, &Page { equals, ..Page::first(100) }).await.len()
        };
        assert_eq!(count(&[("status", json!("queued"))]).await, 2);
        assert_eq!(count(&[("status", json!("queued")), ("device", json!("x"))]).await, 1);
        assert_eq!(count(&[("n", json!(1))]).await, 2, "the text \"1\" is not the number 1");
        assert_eq!(count(&[("n", json!("1"))]).await, 1);
        assert_eq!(count(&[("flag", json!(true))]).await, 2, "the number 1 is not true");
        assert_eq!(count(&[("flag", json!(1))]).await, 1);
        assert_eq!(count(&[("status", json!("'; drop table objects; --"))]).await, 1);
        assert_eq!(count(&[("odd name", json!("é\"\\"))]).await, 1);
        assert_eq!(count(&[("nowhere", json!("x"))]).await, 0);
        assert_eq!(count(&[("') or 1=1 --", json!("x"))]).await, 0, "a name is never taken for a query");
    }

    /// The list of all accounts holds those of each, and pages in order of ids.
    async fn everywhere_lists_all_accounts(registry) {
        let mark = unique_text();
        let mut ids = Vec::new();
        for _ in 0..4 {
            ids.push(create(registry, account(), json!({"mark": mark})).await.id);
        }
        ids.sort_unstable();
        let mut page = Page { equals: vec![("mark".to_owned(), json!(mark))], ..Page::first(3) };
        let first = registry.list_everywhere(Kind::Device, &page).await.expect("lists");
        page.after = first.last().map(|r| r.id);
        let second = registry.list_everywhere(Kind::Device, &page).await.expect("lists");
        let seen: Vec<Uuid> = first.iter().chain(&second).map(|r| r.id).collect();
        assert_eq!((seen, first.len()), (ids, 3));
    }

    /// Every change is in the audit trail: who, from where, what, and which members.
    async fn every_change_is_audited(registry) {
        let account = account();
        let who = Actor { name: "user:ada".to_owned(), address: Some("2001:db8::1".to_owned()) };
        let id = fresh();
        let made = registry.create(account, device(id, json!({"a": 1, "b": 2, "c": 3})), &who).await.expect("creates");
        let draft = device(id, json!({"a": 1, "b": 5, "d": 4}));
        registry.update(account, draft, Some(made.revision), &Actor::system("test")).await.expect("updates");
        registry.delete(account, Kind::Device, id, None, &who).await.expect("deletes");

        let trail = registry.audit(account, None, 10).await.expect("reads");
        let actions: Vec<AuditAction> = trail.iter().map(|a| a.action).collect();
        assert_eq!(actions, [AuditAction::Delete, AuditAction::Update, AuditAction::Create], "newest first");
        assert!(trail.iter().all(|a| a.object == id && a.kind == Kind::Device && a.account == account));
        assert_eq!(trail[0].actor, who);
        assert_eq!(trail[1].actor, Actor { name: "system:test".to_owned(), address: None });
        let mut changed = trail[1].changed.clone();
        changed.sort_unstable();
        assert_eq!(changed, ["b", "c", "d"]);
        assert!(trail[0].changed.is_empty() && trail[2].changed.is_empty());
    }

    /// What is refused is not in the audit trail.
    async fn what_is_refused_is_not_audited(registry) {
        let account = account();
        let made = create(registry, account, json!({})).await;
        update(registry, account, made.id, json!({"a": 1}), Some(made.revision + 1_000)).await.expect_err("is refused");
        registry.create(account, device(made.id, json!({})), &actor()).await.expect_err("is refused");
        assert_eq!(registry.audit(account, None, 10).await.expect("reads").len(), 1);
    }

    /// The audit trail pages backwards.
    async fn the_audit_pages_backwards(registry) {
        let account = account();
        for _ in 0..7 {
            create(registry, account, json!({})).await;
        }
        let (mut before, mut seen) = (None, Vec::new());
        loop {
            let page = registry.audit(account, before, 3).await.expect("reads");
            let Some(last) = page.last() else { break };
            before = Some(last.sequence);
            seen.extend(page.iter().map(|a| a.sequence));
        }
        assert_eq!(seen.len(), 7);
        assert!(seen.windows(2).all(|pair| pair[0] > pair[1]), "{seen:?}");
    }

    /// Changes are read from any sequence on, oldest first; the watch tells of each and never runs
    /// ahead of what can be read.
    async fn changes_are_followed(registry) {
        let account = account();
        let mut watch = registry.watch();
        let start = *watch.borrow_and_update();
        let made = create(registry, account, json!({})).await;
        update(registry, account, made.id, json!({"a": 1}), None).await.expect("updates");
        tokio::time::timeout(Duration::from_secs(5), watch.changed()).await
            .expect("the watch tells of it within five seconds").expect("the registry is open");

        let (mut after, mut mine) = (start, Vec::new());
        loop {
            let page = registry.changes(after, 2).await.expect("reads");
            let Some(last) = page.last() else { break };
            assert!(page.iter().all(|a| a.sequence > after));
            assert!(page.windows(2).all(|pair| pair[0].sequence < pair[1].sequence));
            after = last.sequence;
            mine.extend(page.into_iter().filter(|a| a.account == account).map(|a| (a.object, a.action)));
        }
        assert_eq!(mine, [(made.id, AuditAction::Create), (made.id, AuditAction::Update)]);
        let told = *watch.borrow_and_update();
        assert!(told <= after || registry.changes(after, 1).await.expect("reads").len() == 1);
        assert!(told > start);
    }

    /// Of many who create the same key at once, one wins; and nothing of the others is left.
    async fn concurrent_creates_have_one_winner(registry) {
        let (account, ident) = (account(), unique_text());
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..32 {
            let draft = keyed(fresh(), "ident", UniqueIn::Account, &ident, json!({"n": n}));
            let registry = Arc::clone(registry);
            tasks.spawn(async move { registry.create(account, draft, &actor()).await });
        }
        let results = tasks.join_all().await;
        let won: Vec<&Record> = results.iter().filter_map(|r| r.as_ref().ok()).collect();
        assert_eq!(won.len(), 1);
        assert!(results.iter().all(|r| matches!(r, Ok(_) | Err(RegistryError::Taken { .. }))));
        assert_eq!(find(registry, account, &ident).await.as_ref(), Some(won[0]));
        assert_eq!(list(registry, account, &Page::first(100)).await.len(), 1);
        assert_eq!(registry.audit(account, None, 100).await.expect("reads").len(), 1);
    }

    /// Of many who update the same revision at once, one wins: counting this way loses nothing.
    async fn concurrent_updates_lose_nothing(registry) {
        let account = account();
        let id = create(registry, account, json!({"n": 0})).await.id;
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let registry = Arc::clone(registry);
            tasks.spawn(async move {
                let mut done = 0;
                while done < 5 {
                    let seen = get(&registry, account, id).await.expect("is there");
                    let n = seen.body["n"].as_i64().expect("a number");
                    match update(&registry, account, id, json!({"n": n + 1}), Some(seen.revision)).await {
                        Ok(_) => done += 1,
                        Err(RegistryError::Changed { .. }) => tokio::task::yield_now().await,
                        Err(other) => panic!("{other}"),
                    }
                }
            });
        }
        tasks.join_all().await;
        assert_eq!(get(registry, account, id).await.map(|r| r.body), Some(json!({"n": 40})));
    }

    /// A write whose caller went away has happened whole or not at all, and the store goes on.
    async fn a_dropped_write_leaves_nothing_half_done(registry) {
        let (account, ident) = (account(), unique_text());
        for _ in 0..8 {
            let draft = keyed(fresh(), "ident", UniqueIn::Account, &ident, json!({}));
            let actor = actor();
            let write = registry.create(account, draft, &actor);
            let cut = tokio::time::timeout(Duration::ZERO, write).await;
            drop(cut);
        }
        let draft = keyed(fresh(), "ident", UniqueIn::Account, &ident, json!({}));
        let last = registry.create(account, draft, &actor()).await;
        assert!(matches!(last, Ok(_) | Err(RegistryError::Taken { .. })), "{last:?}");
        let records = list(registry, account, &Page::first(100)).await;
        assert_eq!(records.len(), 1);
        assert_eq!(find(registry, account, &ident).await.as_ref(), records.first());
        assert_eq!(registry.audit(account, None, 100).await.expect("reads").len(), 1);
    }

    /// A body of a megabyte (a protocol's source) comes back whole.
    async fn large_bodies_come_back_whole(registry) {
        let account = account();
        let source = "frame ü { }\n".repeat(90_000);
        let made = create(registry, account, json!({"source": source})).await;
        let read = get(registry, account, made.id).await.expect("is there");
        assert_eq!(read.body["source"].as_str().map(str::len), Some(source.len()));
    }
}

fn fresh() -> Uuid {
    fieldline_model::id::uuid_v7(crate::Clock::now(&crate::SystemClock), rand::random())
}

fn account() -> AccountId {
    AccountId(fresh())
}

fn unique_text() -> String {
    format!("it's-{}", fresh())
}

fn actor() -> Actor {
    Actor::system("conformance")
}

fn device(id: Uuid, body: Value) -> Draft {
    Draft { kind: Kind::Device, id, unique: BTreeMap::new(), body }
}

fn keyed(id: Uuid, key: &'static str, scope: UniqueIn, value: &str, body: Value) -> Draft {
    Draft {
        kind: Kind::Device,
        id,
        unique: BTreeMap::from([(key, (scope, value.to_owned()))]),
        body,
    }
}

async fn create(registry: &Arc<dyn Registry>, account: AccountId, body: Value) -> Record {
    registry.create(account, device(fresh(), body), &actor()).await.expect("creates")
}

async fn update(
    registry: &Arc<dyn Registry>,
    account: AccountId,
    id: Uuid,
    body: Value,
    expected: Option<u64>,
) -> Result<Record, RegistryError> {
    registry.update(account, device(id, body), expected, &actor()).await
}

async fn get(registry: &Arc<dyn Registry>, account: AccountId, id: Uuid) -> Option<Record> {
    registry.get(account, Kind::Device, id).await.expect("gets")
}

async fn find(registry: &Arc<dyn Registry>, account: AccountId, ident: &str) -> Option<Record> {
    registry.find(account, Kind::Device, "ident", ident).await.expect("finds")
}

async fn list(registry: &Arc<dyn Registry>, account: AccountId, page: &Page) -> Vec<Record> {
    registry.list(account, Kind::Device, page).await.expect("lists")
}

async fn newest_audit(registry: &Arc<dyn Registry>, account: AccountId) -> Audit {
    registry.audit(account, None, 1).await.expect("reads").remove(0)
}
