//! SIGKILL of a process that appends, at any moment: what it was told is durable is there, once.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::{History, SystemClock};
use fieldline_mdb::Mdb;
use fieldline_model::Cursor;

use crate::common::{device, message, small, tail};

const DIR: &str = "FIELDLINE_MDB_KILL_DIR";
const FIRST: &str = "FIELDLINE_MDB_KILL_FIRST";

/// The process that is killed. Appends, and prints what was acknowledged.
#[allow(clippy::print_stdout, reason = "what it prints is what its parent checks")]
async fn child(dir: String) {
    let first: i64 = std::env::var(FIRST).unwrap().parse().unwrap();
    let store = Arc::new(Mdb::open(dir, small(), Arc::new(SystemClock)).unwrap());
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..8_u8 {
        let store = store.clone();
        tasks.spawn(async move {
            for n in (first..).step_by(5) {
                let batch = (n..n + 5).map(|n| message(device(number), n, n * n % 911)).collect();
                store.append(batch).await.unwrap();
                let mut out = std::io::stdout().lock();
                writeln!(out, "ACK {number} {n}").unwrap();
                out.flush().unwrap();
            }
        });
    }
    tasks.join_next().await;
}

#[tokio::test]
async fn a_killed_process_loses_nothing_it_acknowledged() {
    // The test starts itself again as the process that is killed.
    if let Ok(dir) = std::env::var(DIR) {
        return child(dir).await;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged: BTreeSet<(u8, i64)> = BTreeSet::new();
    for round in 0..8_i64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "kill::a_killed_process_loses_nothing_it_acknowledged",
                "--nocapture",
            ])
            .env(DIR, dir.path())
            .env(FIRST, (round * 1_000_000).to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let reader = std::thread::spawn(move || {
            let mut lines = Vec::new();
            for line in output.lines().map_while(Result::ok) {
                // The test harness prints before it on the first line.
                let Some((_, told)) = line.split_once("ACK ") else { continue };
                // A line cut by the kill was not told.
                if let Some((device, n)) = told.split_once(' ')
                    && let (Ok(device), Ok(n)) = (device.parse(), n.parse())
                {
                    lines.push((device, n));
                }
            }
            lines.pop();
            lines
        });
        // Long enough to start, and then anywhere in appending and sealing.
        std::thread::sleep(Duration::from_millis(150 + rand::random::<u64>() % 250));
        child.kill().unwrap();
        child.wait().unwrap();
        for (device, first) in reader.join().unwrap() {
            acknowledged.extend((first..first + 5).map(|n| (device, n)));
        }
        let store = Mdb::open(dir.path(), small(), Arc::new(SystemClock)).unwrap();
        let mut seen: BTreeMap<(uuid::Uuid, i64), Cursor> = BTreeMap::new();
        let mut last: BTreeMap<uuid::Uuid, i64> = BTreeMap::new();
        for message in tail(&store, Cursor::default(), 5_000).await {
            let (object, at) = (message.series().object, message.timestamp().as_seconds());
            let before = last.insert(object, at);
            assert!(before.is_none_or(|before| before < at), "order of a device was not kept");
            assert!(
                seen.insert((object, at), message.cursor()).is_none(),
                "a message is there twice"
            );
        }
        for (number, n) in &acknowledged {
            let at = crate::common::START.as_seconds() + n;
            assert!(
                seen.contains_key(&(device(*number).object, at)),
                "round {round}: {number} {n} is lost"
            );
        }
    }
    assert!(acknowledged.len() > 500, "only {} messages were acknowledged", acknowledged.len());
}
