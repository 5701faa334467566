//! SIGKILL of master and worker at random moments under load: every
//! acknowledged message is there once, in order.
//!
//! Here a few rounds; `bench/kill.sh` runs a hundred.

use std::time::Duration;

use serde_json::json;

use crate::device::{self, Fleet};
use crate::server::{PATIENCE, Server, wait_for};

/// Devices under load.
const DEVICES: usize = 16;

/// A cheap source of differing waits; printed with a failure by its rounds.
fn waits() -> impl Iterator<Item = Duration> {
    let mut state = u64::from(std::process::id()) | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        Duration::from_millis(50 + state % 900)
    })
}

#[test]
fn nothing_acknowledged_is_lost_or_doubled() {
    let rounds = std::env::var("FIELDLINE_KILL_ROUNDS").map_or(4, |text| text.parse().unwrap());
    let data = tempfile::tempdir().unwrap();
    let mut server = Server::start(data.path(), &[]);
    let (_, port) = server.channel("wialon_ips", "tcp", json!({}));
    let fleet = Fleet::start(port, DEVICES);
    for (round, wait) in waits().take(rounds).enumerate() {
        let before = fleet.acked();
        wait_for("messages to be acknowledged", || (fleet.acked() > before).then_some(()));
        std::thread::sleep(wait);
        server.kill();
        server = Server::start(data.path(), &[]);
        println!("round {round}: killed after {wait:?}, {} acknowledged", fleet.acked());
    }
    let before = fleet.acked();
    wait_for("messages after the last kill", || (fleet.acked() > before).then_some(()));
    let acknowledged = fleet.finish();
    let compared = device::check(&server, &acknowledged);
    println!("{rounds} rounds, {compared} acknowledged messages: 0 lost, 0 doubled");
    server.stop();

    // And once more after a clean end.
    let server = Server::start(data.path(), &[]);
    device::check(&server, &acknowledged);
}

#[test]
fn a_dead_worker_is_started_again_and_leaves_a_report() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start(data.path(), &[]);
    let before = std::fs::read_to_string(data.path().join("run.json")).unwrap();
    rustix::process::kill_process(server.worker(), rustix::process::Signal::ABORT).unwrap();
    let reports = wait_for("a crash report", || {
        let folder = std::fs::read_dir(data.path().join("crash")).ok()?;
        let reports: Vec<_> = folder.map(|entry| entry.unwrap().path()).collect();
        (!reports.is_empty()).then_some(reports)
    });
    let report = std::fs::read_to_string(&reports[0]).unwrap();
    assert!(report.contains("SIGABRT"), "{report}");
    wait_for("the next worker", || {
        let run = std::fs::read_to_string(data.path().join("run.json")).ok()?;
        (run != before && !run.is_empty()).then_some(())
    });
}

#[test]
fn a_worker_whose_master_is_dead_ends_by_itself() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start(data.path(), &[]);
    let worker = server.worker();
    let master =
        std::fs::read_to_string(format!("/proc/{}/stat", worker.as_raw_nonzero())).unwrap();
    let master: i32 =
        master.rsplit(')').next().unwrap().split_whitespace().nth(1).unwrap().parse().unwrap();
    let master = rustix::process::Pid::from_raw(master).unwrap();
    rustix::process::kill_process(master, rustix::process::Signal::KILL).unwrap();
    let began = std::time::Instant::now();
    wait_for("the worker's end", || {
        rustix::process::test_kill_process(worker).is_err().then_some(())
    });
    assert!(began.elapsed() < PATIENCE);
}
