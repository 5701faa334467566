//! The registry: the conformance suite, and several nodes over one database.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fieldline_contracts::conformance::registry;
use fieldline_contracts::registry::UniqueIn;
use fieldline_contracts::{Actor, Audit, Draft, Kind, Page, Registry, RegistryError, SystemClock};
use fieldline_model::AccountId;
use fieldline_postgres::{PostgresRegistry, Settings};
use fieldline_testkit::servers::{Cut, Flow, Postgres};
use uuid::Uuid;

use crate::{psql, settings};

async fn open(settings: &Settings) -> PostgresRegistry {
    PostgresRegistry::connect(settings, Arc::new(SystemClock)).await.unwrap()
}

fn draft(n: u128) -> Draft {
    let unique = BTreeMap::from([("ident", (UniqueIn::Account, n.to_string()))]);
    Draft {
        kind: Kind::Device,
        id: Uuid::from_u128(n),
        unique,
        body: serde_json::json!({"n": n.to_string()}),
    }
}

const ACCOUNT: AccountId = AccountId::from_bytes([1; 16]);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms() {
    let server = Postgres::start();
    registry::run(Arc::new(open(&settings(&server)).await)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn survives_reopening() {
    let server = Postgres::start();
    let settings = settings(&server);
    registry::survives_reopening(|| async { Arc::new(open(&settings).await) as Arc<dyn Registry> })
        .await;
}

/// Text that PostgreSQL has its own ideas about comes back as it was.
#[tokio::test]
async fn text_with_nul_and_long_keys_are_kept() {
    let server = Postgres::start();
    let registry = open(&settings(&server)).await;
    let mut draft = draft(1);
    let long = format!("a\0b{}", "x".repeat(20_000));
    draft.unique.insert("name", (UniqueIn::Installation, long.clone()));
    draft.body = serde_json::json!({"name": long, "nul\u{0}": "\u{0}"});
    let actor = Actor { name: "user:a\0b".to_owned(), address: None };
    let made = registry.create(ACCOUNT, draft.clone(), &actor).await.unwrap();
    assert_eq!(registry.get(ACCOUNT, Kind::Device, made.id).await.unwrap(), Some(made.clone()));
    let found = registry.find_anywhere(Kind::Device, "name", &long).await.unwrap();
    assert_eq!(found, Some(made));
    let equals = vec![("nul\u{0}".to_owned(), serde_json::json!("\u{0}"))];
    let page = Page { equals, ..Page::first(10) };
    assert_eq!(registry.list(ACCOUNT, Kind::Device, &page).await.unwrap().len(), 1);
    draft.id = Uuid::from_u128(2);
    draft.unique.remove("ident");
    let taken = registry.create(ACCOUNT, draft, &actor).await;
    assert!(matches!(taken, Err(RegistryError::Taken { key, .. }) if key == "name"));
}

/// Two nodes write while a third follows: it is told of every change, once and in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_follows_skips_no_change_of_several_nodes() {
    let server = Postgres::start();
    let settings = settings(&server);
    let (one, two) = (Arc::new(open(&settings).await), Arc::new(open(&settings).await));
    let follower = open(&settings).await;
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..8_u128 {
        let node = Arc::clone(if writer % 2 == 0 { &one } else { &two });
        writers.spawn(async move {
            let mut refused = 0;
            for n in 0..40_u128 {
                // Some are refused: they must not leave a gap.
                let id = if n % 5 == 4 { 999_999 } else { writer * 1_000 + n };
                match node.create(ACCOUNT, draft(id), &Actor::system("test")).await {
                    Ok(_) => {}
                    Err(RegistryError::Taken { .. }) => refused += 1,
                    Err(other) => panic!("{other}"),
                }
            }
            refused
        });
    }
    let mut watch = follower.watch();
    let (mut after, mut seen): (u64, Vec<Audit>) = (0, Vec::new());
    let wanted = 8 * 32 + 1;
    while seen.len() < wanted {
        let told = *watch.borrow_and_update();
        let page = follower.changes(after, 7).await.unwrap();
        if page.is_empty() {
            assert!(told <= after, "told of {told}, and nothing after {after} can be read");
            tokio::time::timeout(Duration::from_secs(5), watch.changed()).await.unwrap().unwrap();
        }
        for change in page {
            assert_eq!(change.sequence, after + 1, "a change was skipped");
            after = change.sequence;
            seen.push(change);
        }
    }
    let mut refused = 0;
    while let Some(count) = writers.join_next().await {
        refused += count.unwrap();
    }
    assert_eq!((seen.len(), refused), (wanted, 8 * 8 - 1));
}

/// A change of one node is known to the other within a second, also when the connection that listens was
/// ended by the server or lies behind a dead link for a while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_is_known_elsewhere_within_a_second() {
    let server = Postgres::start();
    let here = open(&settings(&server)).await;
    let wire = Cut::before(server.process.port()).await;
    let url = format!("postgres://postgres@127.0.0.1:{}/postgres", wire.port());
    let elsewhere = open(&Settings::new(url)).await;
    let mut watch = elsewhere.watch();
    let mut n = 0;
    let mut change = async |what: &str| {
        n += 1;
        let made = here.create(ACCOUNT, draft(n), &Actor::system("test")).await.unwrap();
        let began = Instant::now();
        let seen = watch.wait_for(|sequence| *sequence >= made.revision);
        tokio::time::timeout(Duration::from_secs(10), seen).await.expect(what).unwrap();
        let took = began.elapsed();
        assert!(took < Duration::from_secs(1), "{what}: seen after {took:?}");
        assert_eq!(elsewhere.changes(made.revision - 1, 10).await.unwrap().len(), 1);
    };
    for _ in 0..5 {
        change("an open wire").await;
    }
    // Ends the connection that listens, and all others of that node.
    wire.set(Flow::Refused);
    tokio::time::sleep(Duration::from_millis(50)).await;
    wire.set(Flow::Open);
    change("right after the connections ended").await;
    wire.set(Flow::Held);
    tokio::time::sleep(Duration::from_secs(4)).await;
    wire.set(Flow::Open);
    change("right after a dead link").await;
    change("later").await;
}

/// What was answered is there after crashes of the server; what was not is there whole or not at all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_loses_nothing_answered() {
    let mut server = Postgres::start();
    let registry = Arc::new(open(&settings(&server)).await);
    let mut answered = Vec::new();
    for round in 0..3_u128 {
        let mut writers = tokio::task::JoinSet::new();
        for writer in 0..4_u128 {
            let registry = Arc::clone(&registry);
            writers.spawn(async move {
                let mut made = Vec::new();
                for n in 0..150_u128 {
                    let id = round * 100_000 + writer * 1_000 + n;
                    let record = registry.create(ACCOUNT, draft(id), &Actor::system("test")).await;
                    made.extend(record.ok().map(|record| (record.id, record.revision)));
                }
                made
            });
        }
        tokio::time::sleep(Duration::from_millis(150)).await;
        server = tokio::task::spawn_blocking(move || {
            server.crash();
            server
        })
        .await
        .unwrap();
        answered.extend(writers.join_all().await.into_iter().flatten());
    }
    // Whoever waited was served in the end.
    assert_eq!(answered.len(), 3 * 4 * 150);
    let changes = registry.changes(0, 10_000).await.unwrap();
    let told: Vec<(Uuid, u64)> =
        changes.iter().map(|change| (change.object, change.sequence)).collect();
    assert!(told.iter().map(|(_, n)| *n).eq(1..=told.len() as u64), "numbers have a gap");
    for made in answered {
        assert!(told.contains(&made), "{made:?} was answered and is gone");
    }
    for (id, revision) in told {
        let there = registry.get(ACCOUNT, Kind::Device, id).await.unwrap().expect("half a change");
        assert_eq!(there.revision, revision);
    }
}

/// Changes that are asked for at once go in few transactions; each has its own answer, and what one may not do,
/// or the server refuses of one, is no matter of the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_at_once_share_a_commit_and_nothing_else() {
    let server = Postgres::start();
    let registry = Arc::new(open(&settings(&server)).await);
    let actor = Actor::system("test");
    let first = registry.create(ACCOUNT, draft(1), &actor).await.unwrap();
    psql(
        &server,
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS \
         $$ BEGIN IF NEW.body LIKE '%poison%' THEN RAISE 'refused'; END IF; RETURN NEW; END $$; \
         CREATE TRIGGER refuse BEFORE INSERT ON fieldline.objects FOR EACH ROW EXECUTE FUNCTION refuse()",
    );
    // All wait for whoever has the counter.
    let mut holder = Command::new("psql")
        .args(["-X", "-q", &server.url()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = holder.stdin.take().unwrap();
    let held = "BEGIN; SELECT 'held' FROM fieldline.counter FOR UPDATE;\n";
    input.write_all(held.as_bytes()).unwrap();
    let output = BufReader::new(holder.stdout.take().unwrap());
    assert!(output.lines().map_while(Result::ok).any(|line| line.contains("held")));
    let mut asked = tokio::task::JoinSet::new();
    for n in 100..164_u128 {
        let (registry, actor) = (Arc::clone(&registry), actor.clone());
        asked.spawn(async move {
            let mut draft = draft(n);
            match n % 16 {
                // A key that another has.
                0 => draft.unique = BTreeMap::from([("ident", (UniqueIn::Account, "1".into()))]),
                1 => draft.body = serde_json::json!({"n": "poison"}),
                _ => {}
            }
            (n, registry.create(ACCOUNT, draft, &actor).await)
        });
    }
    for expected in [first.revision + 7, first.revision] {
        let (registry, actor) = (Arc::clone(&registry), actor.clone());
        asked.spawn(async move {
            (1, registry.update(ACCOUNT, draft(1), Some(expected), &actor).await)
        });
    }
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
    while psql(&server, waiting) == "0" {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(input);
    holder.wait().unwrap();
    let (mut made, mut taken, mut refused, mut changed) = (0, 0, 0, 0);
    while let Some(answer) = asked.join_next().await {
        match answer.unwrap() {
            (n, Ok(record)) => {
                assert_eq!(record.id, Uuid::from_u128(n));
                made += 1;
            }
            (n, Err(RegistryError::Taken { key, value, .. })) => {
                assert_eq!((n % 16, key.as_str(), value.as_str()), (0, "ident", "1"));
                taken += 1;
            }
            (n, Err(RegistryError::Unavailable(why))) => {
                assert!(n % 16 == 1 && why.contains("refused"), "{n}: {why}");
                refused += 1;
            }
            (_, Err(RegistryError::Changed { expected, found })) => {
                assert_eq!((expected, found), (first.revision + 7, first.revision));
                changed += 1;
            }
            (n, Err(other)) => panic!("{n}: {other}"),
        }
    }
    assert_eq!((made, taken, refused, changed), (57, 4, 4, 1));
    let trail = registry.changes(0, 1_000).await.unwrap();
    assert!(trail.iter().map(|change| change.sequence).eq(1..=58), "numbers have a gap");
    let transactions = psql(&server, "SELECT count(DISTINCT xmin::text) FROM fieldline.audit");
    println!("57 changes at once, 4 of which the server refused, in {transactions} transactions");
    assert!(transactions.parse::<u32>().unwrap() < 30, "{transactions} transactions");
    let count = Page::first(1_000);
    assert_eq!(registry.list(ACCOUNT, Kind::Device, &count).await.unwrap().len(), 57);
}
