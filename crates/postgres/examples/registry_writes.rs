//! Changes a second through `PostgresRegistry`, by one writer and by 64 at once, and bare INSERT with a commit
//! each by as many connections in the same run.
//!
//! `DATABASE` names the server; the tables are made in schemas of their own and removed. See
//! `bench/registry_writes.sh`.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    reason = "a measurement: it ends where something fails, and prints"
)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fieldline_contracts::{Actor, Draft, Kind, Registry, SystemClock};
use fieldline_model::AccountId;
use fieldline_postgres::{PostgresRegistry, Settings};
use tokio_postgres::NoTls;
use uuid::Uuid;

const ACCOUNT: AccountId = AccountId::from_bytes([7; 16]);
const WRITERS: [usize; 2] = [1, 64];
const ROUNDS: usize = 3;
const ROUND: Duration = Duration::from_secs(3);

/// Ids that no other object has.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// A command, as the queue keeps it.
fn command(status: &str, id: Uuid) -> Draft {
    let body = serde_json::json!({
        "id": id, "account": ACCOUNT, "device": Uuid::from_u128(9), "name": "text", "status": status,
        "params": {"text": "open the door"}, "created_at": 1_800_000_000_i64, "attempts": 0,
        "expires_at": 1_800_003_600_i64, "created_by": "user:measure",
    });
    Draft { kind: Kind::Command, id, unique: BTreeMap::new(), body }
}

fn id() -> Uuid {
    Uuid::from_u128(NEXT.fetch_add(1, Ordering::Relaxed).into())
}

/// Runs `writers` tasks that each do one after the other; returns how many a second, and the middle wait.
async fn measure<W, F>(writers: usize, writer: W) -> (f64, Duration)
where
    W: Fn(usize) -> F,
    F: Future<Output = Vec<Duration>> + Send + 'static,
{
    let began = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..writers {
        tasks.spawn(writer(n));
    }
    let mut waits: Vec<Duration> = tasks.join_all().await.into_iter().flatten().collect();
    let rate = waits.len() as f64 / began.elapsed().as_secs_f64();
    waits.sort_unstable();
    (rate, waits[waits.len() / 2])
}

/// Changes of commands: each is created, sent and answered.
async fn through_registry(registry: &Arc<PostgresRegistry>, writers: usize) -> (f64, Duration) {
    let registry = Arc::clone(registry);
    let until = Instant::now() + ROUND;
    measure(writers, |_| {
        let registry = Arc::clone(&registry);
        async move {
            let (actor, mut waits) = (Actor::system("measure"), Vec::new());
            while Instant::now() < until {
                let id = id();
                let asked = Instant::now();
                let made = registry.create(ACCOUNT, command("queued", id), &actor).await.unwrap();
                waits.push(asked.elapsed());
                let mut revision = made.revision;
                for status in ["sent", "answered"] {
                    let asked = Instant::now();
                    let next = command(status, id);
                    let made = registry.update(ACCOUNT, next, Some(revision), &actor).await;
                    waits.push(asked.elapsed());
                    revision = made.unwrap().revision;
                }
            }
            waits
        }
    })
    .await
}

/// The peer: a row of the same text and a commit each, by a connection for each writer.
async fn bare(database: &str, writers: usize) -> (f64, Duration) {
    let mut clients = Vec::new();
    for _ in 0..writers {
        let (client, connection) = tokio_postgres::connect(database, NoTls).await.unwrap();
        tokio::spawn(connection);
        let insert = "INSERT INTO bare_writes (id, body) VALUES ($1, $2)";
        let insert = client.prepare(insert).await.unwrap();
        clients.push(Arc::new((client, insert)));
    }
    let until = Instant::now() + ROUND;
    measure(writers, |n| {
        let client = Arc::clone(&clients[n]);
        async move {
            let (client, insert) = &*client;
            let mut waits = Vec::new();
            while Instant::now() < until {
                let id = id();
                let body = command("queued", id).body.to_string();
                let asked = Instant::now();
                client.execute(insert, &[&id, &body]).await.unwrap();
                waits.push(asked.elapsed());
            }
            waits
        }
    })
    .await
}

#[tokio::main]
async fn main() {
    let database = std::env::var("DATABASE").expect("DATABASE says where PostgreSQL is");
    let schema = format!("registry_writes_{}", std::process::id());
    let settings = Settings { schema: schema.clone(), ..Settings::new(database.clone()) };
    let (client, connection) = tokio_postgres::connect(&database, NoTls).await.unwrap();
    tokio::spawn(connection);
    let made = "DROP TABLE IF EXISTS bare_writes; \
                CREATE TABLE bare_writes (id uuid PRIMARY KEY, body text NOT NULL)";
    client.batch_execute(made).await.unwrap();
    let registry = PostgresRegistry::connect(&settings, Arc::new(SystemClock)).await.unwrap();
    let registry = Arc::new(registry);
    for writers in WRITERS {
        let (mut ours, mut theirs, mut waits) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let (rate, wait) = through_registry(&registry, writers).await;
            ours.push(rate);
            waits.push(wait);
            theirs.push(bare(&database, writers).await.0);
        }
        let middle = |mut all: Vec<f64>| {
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        waits.sort_unstable();
        let (ours, theirs) = (middle(ours), middle(theirs));
        println!(
            "{writers:>3} writers: {ours:.0} changes/s ({:.1} ms each, {:.0} commands/s), bare INSERT and commit {theirs:.0}/s, ratio {:.2}",
            waits[ROUNDS / 2].as_secs_f64() * 1_000.0,
            ours / 3.0,
            ours / theirs
        );
    }
    drop(registry);
    let gone = format!("DROP SCHEMA {schema} CASCADE; DROP TABLE bare_writes");
    client.batch_execute(&gone).await.unwrap();
}
