use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

#[test]
fn servers_start_and_start_again() {
    let mut redis = Redis::start();
    let ping = |port| {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.write_all(b"PING\r\n").unwrap();
        let mut answer = [0; 7];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"+PONG\r\n");
    };
    ping(redis.process.port());
    redis.restart_empty();
    ping(redis.process.port());
    let mut etcd = Etcd::start();
    etcd.restart();
    etcd.restart_empty();
    let _mosquitto = Mosquitto::start();
    let mut postgres = Postgres::start();
    postgres.crash();
}

#[tokio::test]
async fn a_cut_wire_holds_bytes_back_and_delivers_them_later() {
    let redis = Redis::start();
    let cut = Cut::before(redis.process.port()).await;
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", cut.port())).await.unwrap();
    let mut answer = [0; 7];
    stream.write_all(b"PING\r\n").await.unwrap();
    stream.read_exact(&mut answer).await.unwrap();
    for held in [Flow::ToServerHeld, Flow::ToClientHeld, Flow::Held] {
        cut.set(held);
        stream.write_all(b"PING\r\n").await.unwrap();
        let read = tokio::time::timeout(Duration::from_millis(200), stream.read_exact(&mut answer));
        assert!(read.await.is_err(), "{held:?} let it through");
        cut.set(Flow::Open);
        stream.read_exact(&mut answer).await.unwrap();
    }
    cut.set(Flow::Refused);
    assert_eq!(stream.read(&mut answer).await.unwrap(), 0);
}

/// What is cut off hears and says nothing, one way or both, and all that waited goes on after.
#[test]
fn zones_can_be_cut_off() {
    let zones = Zones::start(2);
    let servers = [0, 1].map(|zone| Redis::start_at(&zones.place(zone), &[]));
    let connect = |zone: usize| {
        let address = servers[zone].process.socket();
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5)).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        stream
    };
    let ping = |mut stream: &TcpStream| stream.write_all(b"PING\r\n").unwrap();
    let answered = |mut stream: &TcpStream| {
        let mut answer = [0; 7];
        stream.read_exact(&mut answer).is_ok()
    };
    let other = connect(1);
    let commands = |zone: usize| {
        let text = servers[zone].process.place().command("redis-cli");
        let mut command = text;
        let address = servers[zone].process.socket();
        command.args(["-h", &address.ip().to_string(), "-p", &address.port().to_string()]);
        let output = command.args(["info", "stats"]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find(|line| line.starts_with("total_commands_processed:")).unwrap();
        line.rsplit(':').next().unwrap().trim().parse::<u64>().unwrap()
    };
    for (cut, arrives) in
        [(Zones::cut as fn(&Zones, usize), false), (Zones::cut_from, true), (Zones::cut_to, false)]
    {
        let stream = connect(0);
        ping(&stream);
        assert!(answered(&stream));
        // Asking counts itself.
        let before = commands(0);
        cut(&zones, 0);
        ping(&stream);
        assert!(!answered(&stream), "it was cut off");
        assert_eq!(commands(0) - before, if arrives { 2 } else { 1 });
        ping(&other);
        assert!(answered(&other), "the other was not");
        zones.heal(0);
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert!(answered(&stream), "the connection is the same");
    }
}

/// Zones of a process that was killed are removed by the next, with what ran in them; those in use are left alone.
#[test]
fn zones_that_were_left_behind_are_removed() {
    let ours = Zones::start(1);
    let output = std::process::Command::new("ip").args(["netns", "add", "flz999-left"]).output();
    assert!(output.unwrap().status.success());
    let mut left = Place::within(["ip", "netns", "exec", "flz999-left"], ours.host())
        .command("sleep")
        .arg("600")
        .spawn()
        .unwrap();
    let _next = Zones::start(1);
    // Another test that begins now may be the one that removes it.
    let began = std::time::Instant::now();
    while left.try_wait().unwrap().is_none() {
        assert!(began.elapsed() < Duration::from_secs(20), "what ran in it is left");
        std::thread::sleep(Duration::from_millis(20));
    }
    let listed = std::process::Command::new("ip").args(["netns", "list"]).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let redis = Redis::start_at(&ours.place(0), &[]);
    assert!(TcpStream::connect(redis.process.socket()).is_ok(), "{listed}");
}

/// What ended by itself can be signalled and ended like what runs.
#[test]
fn a_process_may_end_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let none: [&str; 0] = [];
    let mut process =
        Process::spawn(Launch::new(std::path::Path::new("/bin/true"), none, folder.path(), 1));
    let began = std::time::Instant::now();
    while process.runs() {
        assert!(began.elapsed() < Duration::from_secs(20), "it does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
    process.pause();
    process.resume();
    assert!(process.end(Duration::from_secs(20)));
}

#[test]
fn etcd_members_come_and_go() {
    let mut etcd = EtcdCluster::start();
    let write = |etcd: &mut EtcdCluster, at: usize, value: &str| {
        let (place, port) = (etcd.process(at).place().clone(), etcd.process(at).port());
        let body = format!(r#"{{"key": "a2V5", "value": "{value}"}}"#);
        place.ask(port, "/v3/kv/put", Some(&body)).is_some_and(|(status, _)| status == 200)
    };
    let holds = |etcd: &mut EtcdCluster, at: usize, value: &str| {
        let (place, port) = (etcd.process(at).place().clone(), etcd.process(at).port());
        let (_, answer) = place.ask(port, "/v3/kv/range", Some(r#"{"key": "a2V5"}"#)).unwrap();
        answer.contains(&format!(r#""value":"{value}""#))
    };
    assert!(write(&mut etcd, 0, "b25l"));
    let leader = etcd.leader().unwrap();
    etcd.kill(leader);
    let other = (leader + 1) % 3;
    etcd.agrees(other);
    assert!(holds(&mut etcd, other, "b25l"));
    etcd.restart(leader);
    etcd.restart_empty(leader);
    assert!(holds(&mut etcd, leader, "b25l"), "a member without data gets it from the others");
    etcd.process(leader).pause();
    assert!(!write(&mut etcd, leader, "dHdv"), "a paused member answers");
    etcd.process(leader).resume();
    etcd.agrees(leader);
    etcd.restart_all();
    assert!(holds(&mut etcd, 0, "b25l") || holds(&mut etcd, 0, "dHdv"));
    etcd.restart_all_empty();
    assert!(!holds(&mut etcd, 0, "b25l") && !holds(&mut etcd, 0, "dHdv"));
}

fn say(text: &str) {
    writeln!(std::io::stderr(), "{text}").unwrap();
}

/// Two of three die, one after the other, and what was confirmed is there.
#[test]
fn patroni_promotes_the_standby_that_has_it_all() {
    let etcd = Etcd::start();
    let began = std::time::Instant::now();
    let mut patroni = Patroni::start(&[etcd.url().replace("http://", "")]);
    say(&format!("a leader and a standby after {:.1} s", began.elapsed().as_secs_f64()));
    patroni.sql("CREATE TABLE numbers (n int)");
    patroni.sql("INSERT INTO numbers VALUES (1)");
    let (leader, standby) = (patroni.leader().unwrap(), patroni.standby().unwrap());
    patroni.member(leader).kill();
    let began = std::time::Instant::now();
    assert_eq!(patroni.settled(), standby);
    say(&format!("a leader and a standby again after {:.1} s", began.elapsed().as_secs_f64()));
    patroni.sql("INSERT INTO numbers VALUES (2)");
    patroni.member(leader).restart();
    patroni.whole();
    // One that stands still is no standby any more, and nothing waits for it.
    let standby = patroni.standby().unwrap();
    patroni.member(standby).pause();
    patroni.sql("INSERT INTO numbers VALUES (3)");
    patroni.member(standby).resume();
    assert_eq!(patroni.sql("SELECT count(*) FROM numbers").trim(), "3");
    let processes: Vec<u32> = patroni.members().iter().filter_map(Database::postmaster).collect();
    assert_eq!(processes.len(), 3);
    drop(patroni);
    for id in processes {
        let state = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        assert!(state.is_empty() || state.contains(") Z "), "PostgreSQL lives on: {state}");
    }
}
