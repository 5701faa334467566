//! A server that crashes, a wire that is cut.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fieldline_contracts::{History, HistoryError};
use fieldline_postgres::Settings;
use fieldline_testkit::servers::{Cut, Flow, Postgres};

use crate::{at, device, everything, history, number, settings};

/// Devices that send and wait for an answer, again where there was an error: as links do.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    tasks: tokio::task::JoinSet<(u8, i64, Vec<HistoryError>)>,
}

impl Load {
    pub(crate) fn start<H: History>(nodes: &[Arc<H>], devices: std::ops::Range<u8>) -> Self {
        let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut tasks = tokio::task::JoinSet::new();
        for number in devices {
            let node = Arc::clone(&nodes[usize::from(number) % nodes.len()]);
            let (stop, acknowledged) = (Arc::clone(&stop), Arc::clone(&acknowledged));
            tasks.spawn(async move {
                let (mut next, mut errors) = (0, Vec::new());
                while !stop.load(Ordering::SeqCst) {
                    let batch = (next..next + 20).map(|n| at(device(number), n, n)).collect();
                    match node.append(batch).await {
                        Ok(receipts) => {
                            assert_eq!(receipts.len(), 20);
                            next += 20;
                            acknowledged.fetch_add(20, Ordering::SeqCst);
                        }
                        Err(error) => {
                            errors.push(error);
                            tokio::time::sleep(Duration::from_millis(50)).await;
                        }
                    }
                }
                (number, next, errors)
            });
        }
        Self { stop, acknowledged, tasks }
    }

    /// Waits until this many more were acknowledged, and returns how long it took.
    pub(crate) async fn goes_on(&self, more: u64) -> Duration {
        let began = Instant::now();
        let from = self.acknowledged.load(Ordering::SeqCst);
        while self.acknowledged.load(Ordering::SeqCst) < from + more {
            assert!(began.elapsed() < Duration::from_secs(60), "appending does not go on");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        began.elapsed()
    }

    /// Ends it, and checks that what was acknowledged is there once and in order, and nothing twice.
    pub(crate) async fn check(
        self,
        node: &fieldline_postgres::PostgresHistory,
    ) -> Vec<HistoryError> {
        self.stop.store(true, Ordering::SeqCst);
        let sent = self.tasks.join_all().await;
        let mut stored = everything(node).await;
        let mut all_errors = Vec::new();
        for (number_of, next, errors) in sent {
            let mut found: Vec<i64> =
                stored.remove(&device(number_of)).unwrap_or_default().iter().map(number).collect();
            assert!(found.is_sorted(), "device {number_of} is out of order");
            let before = found.len();
            found.dedup();
            assert_eq!(found.len(), before, "device {number_of} has doubles");
            let found: HashSet<i64> = found.into_iter().collect();
            for n in 0..next {
                assert!(
                    found.contains(&n),
                    "message {n} of device {number_of} was acknowledged and is gone"
                );
            }
            // What was under way last may be there or not.
            assert!(found.len() <= usize::try_from(next).unwrap() + 20);
            all_errors.extend(errors);
        }
        all_errors
    }
}

async fn crash(mut server: Postgres) -> Postgres {
    let crashed = tokio::task::spawn_blocking(move || {
        server.crash();
        server
    });
    crashed.await.unwrap()
}

/// Five times, the server is killed while two nodes append.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crashes_lose_and_double_nothing() {
    let mut server = Postgres::start();
    let settings = settings(&server);
    let nodes = [history(&settings).await, history(&settings).await];
    let load = Load::start(&nodes, 0..12);
    load.goes_on(1_000).await;
    for _ in 0..5 {
        server = crash(server).await;
        load.goes_on(1_000).await;
    }
    let errors = load.check(&nodes[0]).await;
    assert!(errors.is_empty(), "the server was back in time, but {errors:?}");
    // What looks after it looks each two seconds.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!((nodes[0].problems(), nodes[1].problems()), (Vec::new(), Vec::new()));
}

/// A connection that the server ends, at any moment of a transaction, is no error for anybody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_the_server_ends_are_made_anew() {
    let server = Postgres::start();
    let settings = settings(&server);
    let nodes = [history(&settings).await, history(&settings).await];
    let load = Load::start(&nodes, 0..8);
    for _ in 0..20 {
        load.goes_on(200).await;
        crate::psql(
            &server,
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'fieldline'",
        );
    }
    load.goes_on(200).await;
    let errors = load.check(&nodes[0]).await;
    assert!(errors.is_empty(), "{errors:?}");
}

/// A wire that is held or refused: an append is answered in time, says why not, and goes on by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_wire_is_bounded_and_recovers() {
    let server = Postgres::start();
    let wire = Cut::before(server.process.port()).await;
    let mut cut = Settings::new(format!("postgres://postgres@127.0.0.1:{}/postgres", wire.port()));
    cut.append_timeout = Duration::from_secs(2);
    cut.statement_timeout = Duration::from_secs(2);
    let here = history(&cut).await;
    let direct = history(&settings(&server)).await;
    let flows = [Flow::Refused, Flow::Held, Flow::ToClientHeld, Flow::ToServerHeld];
    for (round, flow) in (0_u8..).zip(flows) {
        let load = Load::start(std::slice::from_ref(&here), round * 10..round * 10 + 6);
        load.goes_on(200).await;
        wire.set(flow);
        tokio::time::sleep(Duration::from_millis(300)).await;
        let began = Instant::now();
        let refused = here.append(vec![at(device(200), i64::from(round), 1)]).await;
        let took = began.elapsed();
        let Err(error) = refused else { panic!("{flow:?}: appended through a cut wire") };
        assert!(took < Duration::from_secs(8), "{flow:?}: answered after {took:?}");
        assert!(
            error.to_string().contains("127.0.0.1") || error.to_string().contains("no answer"),
            "{error}"
        );
        let problems = here.problems();
        assert!(!problems.is_empty(), "{flow:?}: nothing is said of it");
        let began = Instant::now();
        let read = here.read(&fieldline_contracts::Query::newest(device(0), 1)).await;
        assert!(read.is_err() && began.elapsed() < Duration::from_secs(8), "{flow:?}: {read:?}");
        // Others are not held up by what it left behind.
        let began = Instant::now();
        direct.append((0..50).map(|n| at(device(201 + round), n, n)).collect()).await.unwrap();
        let held_up = began.elapsed();
        assert!(held_up < Duration::from_secs(12), "{flow:?}: others were held up {held_up:?}");
        wire.set(Flow::Open);
        let recovered = load.goes_on(400).await;
        let errors = load.check(&direct).await;
        assert!(!errors.is_empty());
        assert!(
            errors.iter().all(|e| matches!(e, HistoryError::Failed(_) | HistoryError::Busy)),
            "{errors:?}"
        );
        println!(
            "{flow:?}: answered after {took:?}, others held up {held_up:?}, recovered in {recovered:?}"
        );
        tokio::time::sleep(Duration::from_millis(2_500)).await;
        assert!(here.problems().is_empty(), "{:?}", here.problems());
    }
}

/// More than the queue takes is refused at once, and nothing of it is stored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_is_busy() {
    let server = Postgres::start();
    let mut settings = settings(&server);
    settings.queue_bytes_max = 1 << 20;
    settings.append_timeout = Duration::from_secs(5);
    let node = history(&settings).await;
    node.append(vec![at(device(1), 0, 0)]).await.unwrap();
    server.process.pause();
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..40_i64 {
        let node = Arc::clone(&node);
        tasks.spawn(async move {
            let batch = (0..1_000).map(|n| at(device(2), task * 1_000 + n, n)).collect();
            let began = Instant::now();
            (task, node.append(batch).await, began.elapsed())
        });
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    server.process.resume();
    let (mut stored, mut busy) = (0, 0);
    for (_, result, took) in tasks.join_all().await {
        match result {
            Ok(receipts) => stored += receipts.len(),
            Err(HistoryError::Busy) => {
                assert!(took < Duration::from_secs(1), "busy is said at once, not after {took:?}");
                busy += 1;
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert!(busy > 0 && stored > 0, "{busy} busy, {stored} stored");
    assert_eq!(crate::all(&node, device(2)).await.len(), stored.min(10_000));
}

/// A commit that no standby confirms is not acknowledged, however long that takes; when one confirms,
/// everything goes on and is there once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_standby_has_is_not_acknowledged() {
    let server = Postgres::start();
    let mut settings = settings(&server);
    settings.append_timeout = Duration::from_secs(3);
    settings.statement_timeout = Duration::from_secs(1);
    let node = history(&settings).await;
    let load = Load::start(std::slice::from_ref(&node), 0..4);
    load.goes_on(200).await;
    crate::psql(&server, "ALTER SYSTEM SET synchronous_standby_names = 'absent'");
    crate::psql(&server, "SELECT pg_reload_conf()");
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = load.acknowledged.load(Ordering::SeqCst);
    let waits = node.append(vec![at(device(100), 1, 1)]).await;
    assert!(matches!(waits, Err(HistoryError::Failed(_))), "{waits:?}");
    tokio::time::sleep(Duration::from_secs(6)).await;
    let after = load.acknowledged.load(Ordering::SeqCst);
    assert_eq!(after, before, "acknowledged though no standby has it");
    crate::psql(&server, "ALTER SYSTEM RESET synchronous_standby_names");
    crate::psql(&server, "SELECT pg_reload_conf()");
    let recovered = load.goes_on(400).await;
    println!("recovered in {recovered:?}");
    load.check(&node).await;
}

/// A node that stands still in the middle of a transaction does not hold up the others for long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_node_holds_nobody_up() {
    let server = Postgres::start();
    let settings = settings(&server);
    let node = history(&settings).await;
    node.append(vec![at(device(1), 0, 0)]).await.unwrap();
    // What a paused process leaves: a session with the locks of all shards that says nothing more.
    let mut paused = std::process::Command::new("psql")
        .args(["-X", "-q", &server.url()])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut wire = paused.stdin.take().unwrap();
    let sql = "SET idle_in_transaction_session_timeout = '3s'; BEGIN; SELECT seq FROM fieldline.shards ORDER BY shard FOR UPDATE;\n";
    std::io::Write::write_all(&mut wire, sql.as_bytes()).unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let began = Instant::now();
    node.append(vec![at(device(1), 1, 1)]).await.unwrap();
    let took = began.elapsed();
    println!("appended after {took:?}");
    assert!(took < Duration::from_secs(8), "held up for {took:?}");
    drop(wire);
    paused.wait().unwrap();
}

/// A node that stands still in the middle of a COPY, where the server's own limits do not hold.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_paused_in_a_copy_holds_nobody_up() {
    let server = Postgres::start();
    let settings = settings(&server);
    let node = history(&settings).await;
    node.append(vec![at(device(1), 0, 0)]).await.unwrap();
    let mut paused = std::process::Command::new("psql")
        .args(["-X", "-q", &server.url()])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut wire = paused.stdin.take().unwrap();
    let sql = "SET search_path = fieldline; SET statement_timeout = '1s'; BEGIN;\n\
               SELECT seq FROM shards ORDER BY shard FOR UPDATE;\n\
               COPY messages_20270115 (series, at, received, shard, seq, hash, body) FROM STDIN;\n";
    std::io::Write::write_all(&mut wire, sql.as_bytes()).unwrap();
    std::io::Write::flush(&mut wire).unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let began = Instant::now();
    node.append(vec![at(device(1), 1, 1)]).await.unwrap();
    let took = began.elapsed();
    println!("appended after {took:?}");
    assert!(
        took > Duration::from_secs(2) && took < Duration::from_secs(12),
        "held up for {took:?}"
    );
    drop(wire);
    paused.wait().unwrap();
}
