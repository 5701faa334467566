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
