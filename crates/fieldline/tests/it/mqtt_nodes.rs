//! MQTT clients of a cluster: they must not notice that there are several nodes, nor that one died.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use fieldline_testkit::servers::{Etcd, Mosquitto, Postgres, Redis};
use tempfile::TempDir;

use crate::mqtt::{lines, subscribe};
use crate::server::{PATIENCE, Server, TOKEN, wait_for};

/// The servers that a cluster stands on.
struct World {
    etcd: Etcd,
    postgres: Postgres,
    redis: Redis,
    broker: Mosquitto,
    folder: TempDir,
}

impl World {
    fn start() -> Self {
        let (etcd, postgres) = (Etcd::start(), Postgres::start());
        let (redis, broker) = (Redis::start(), Mosquitto::start());
        Self { etcd, postgres, redis, broker, folder: tempfile::tempdir().unwrap() }
    }

    fn config(&self) -> PathBuf {
        let text = format!(
            "[node]\nlisten = \"127.0.0.1:0\"\netcd = [\"{}\"]\n[postgres]\nurl = \"{}\"\n[redis]\nurl = \"{}\"\n[mqtt_bus]\nurl = \"mqtt://127.0.0.1:{}\"\n",
            self.etcd.url(),
            self.postgres.url(),
            self.redis.url(),
            self.broker.port(),
        );
        let path = self.folder.path().join("node.toml");
        std::fs::write(&path, text).unwrap();
        path
    }

    fn node(&self, name: &str) -> Server {
        Server::node(&self.config(), name)
    }
}

/// Runs `mosquitto_pub` with QoS 1; it ends when the message is acknowledged.
fn publish(server: &Server, topic: &str, payload: &str, more: &[&str]) {
    let (host, port) = server.mqtt.rsplit_once(':').unwrap();
    let done = Command::new("mosquitto_pub")
        .args(["-V", "5", "-q", "1", "-h", host, "-p", port, "-u", "any", "-P", TOKEN])
        .args(["-t", topic, "-m", payload])
        .args(more)
        .output()
        .expect("mosquitto_pub runs; `cargo xtask test rust` installs it");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// Waits for a line that begins so; returns it.
fn expect(lines: &Receiver<String>, begin: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let line = lines.recv_timeout(left).unwrap_or_else(|_| panic!("no line `{begin}…`"));
        if line.starts_with(begin) {
            return line;
        }
    }
}

/// A connection of a client, which says nothing by itself.
struct Raw(TcpStream);

impl Raw {
    /// Connects by MQTT 5 as `client_id`, with a retained will if one is given.
    fn connect(server: &Server, client_id: &str, will: Option<(&str, &str)>) -> Self {
        let mut stream = TcpStream::connect(&server.mqtt).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let text = |body: &mut Vec<u8>, text: &str| {
            body.extend(u16::try_from(text.len()).unwrap().to_be_bytes());
            body.extend(text.as_bytes());
        };
        let flags = 0xc2 | if will.is_some() { 0x2c } else { 0 };
        let mut body = vec![0, 4, b'M', b'Q', b'T', b'T', 5, flags, 0, 60, 0];
        text(&mut body, client_id);
        if let Some((topic, payload)) = will {
            body.push(0);
            text(&mut body, topic);
            text(&mut body, payload);
        }
        text(&mut body, "any");
        text(&mut body, TOKEN);
        // Short enough for a length of one byte.
        let mut packet = vec![0x10, u8::try_from(body.len()).unwrap()];
        assert!(body.len() < 128);
        packet.extend(body);
        stream.write_all(&packet).unwrap();
        let connack = Self::packet(&mut stream).expect("CONNACK");
        assert_eq!((connack.0, connack.1[1]), (0x20, 0), "{connack:?}");
        Self(stream)
    }

    /// The next packet; `None` at the end of the connection.
    fn packet(stream: &mut TcpStream) -> Option<(u8, Vec<u8>)> {
        let mut head = [0; 2];
        stream.read_exact(&mut head).ok()?;
        let mut body = vec![0; usize::from(head[1])];
        stream.read_exact(&mut body).ok()?;
        Some((head[0], body))
    }

    /// Waits to be told that another connection took its place; returns how long that took.
    fn taken_over(&mut self) -> Duration {
        let began = Instant::now();
        let (first, body) = Self::packet(&mut self.0).expect("DISCONNECT");
        assert_eq!((first, body[0]), (0xe0, 0x8e));
        began.elapsed()
    }

    /// Whether it is still there.
    fn is_there(&mut self) -> bool {
        let _may_be_gone = self.0.write_all(&[0xc0, 0]);
        matches!(Self::packet(&mut self.0), Some((0xd0, _)))
    }
}

fn end(mut client: Child) {
    client.kill().unwrap();
    client.wait().unwrap();
}

/// Three nodes, real clients: messages, retained messages, one session for each client id, a node that is killed with the
/// wills of its clients, servers that are away, and a restart of all.
#[test]
fn clients_do_not_notice_that_there_are_several_nodes() {
    let mut world = World::start();
    let [one, two, three] = ["node-1", "node-2", "node-3"].map(|name| world.node(name));

    // Messages, with all that MQTT 5 says of them.
    let (host, port) = three.mqtt.rsplit_once(':').unwrap();
    let mut shows = Command::new("mosquitto_sub");
    shows.args(["-V", "5", "-q", "1", "-h", host, "-p", port, "-u", "any", "-P", TOKEN]);
    shows.args(["-t", "client/said/#", "-F", "%t %p %R %D %C %P %r"]);
    let mut shows = shows.stdout(Stdio::piped()).spawn().unwrap();
    let shown = lines(&mut shows);
    let (watch, watched) = subscribe(&two, TOKEN, "client/#");
    // What is retained tells both that they have subscribed.
    publish(&one, "client/said/kept", "first", &["-r"]);
    expect(&shown, "client/said/kept first");
    expect(&watched, "client/said/kept first");
    let mut more = Vec::new();
    for property in [
        &["response-topic", "client/answers"][..],
        &["correlation-data", "seven"],
        &["content-type", "text/plain"],
        &["user-property", "key", "value"],
    ] {
        more.extend(["-D", "publish"]);
        more.extend(property);
    }
    publish(&one, "client/said/x", "hello", &more);
    let line = expect(&shown, "client/said/x");
    assert_eq!(line, "client/said/x hello client/answers seven text/plain key:value 0");
    expect(&watched, "client/said/x hello");
    end(shows);

    // One session for each client id.
    let mut old = Raw::connect(&one, "same", None);
    for node in [&two, &three, &one] {
        let newer = Raw::connect(node, "same", None);
        let took = old.taken_over();
        println!("the older connection of a client id was told after {took:?}");
        assert!(took < Duration::from_secs(1), "{took:?}");
        old = newer;
    }
    world.redis.process.kill();
    let mut last = Raw::connect(&two, "same", None);
    println!("without Redis it was told after {:?}", old.taken_over());
    assert!(last.is_there());

    world.redis.restart_empty();

    // Without the broker each node serves its own; once it is back, all again.
    world.broker.process.kill();
    publish(&two, "client/said/here", "now", &[]);
    expect(&watched, "client/said/here now");
    world.broker.process.start_again();
    wait_for("the nodes to hear each other again", || {
        publish(&three, "client/said/there", "later", &[]);
        let line = watched.recv_timeout(Duration::from_millis(100)).ok()?;
        line.starts_with("client/said/there").then_some(())
    });

    // A node is killed: wills of its clients are published by another, but of those that have come back.
    let _stays = Raw::connect(&one, "stays", Some(("client/will/stays", "gone")));
    let _moves = Raw::connect(&one, "moves", Some(("client/will/moves", "gone")));
    let mut bye = Raw::connect(&one, "bye", Some(("client/will/bye", "gone")));
    bye.0.write_all(&[0xe0, 0]).unwrap();
    assert!(!bye.is_there());
    let kept = "SELECT count(*) FROM fieldline.wills";
    wait_for("wills to be kept", || (psql(&world.postgres, kept) == "2").then_some(()));
    let began = Instant::now();
    one.kill();
    let mut moved = Raw::connect(&two, "moves", None);
    expect(&watched, "client/will/stays gone");
    println!("the will of a client whose node was killed came after {:?}", began.elapsed());
    wait_for("nothing to be left", || (psql(&world.postgres, kept) == "0").then_some(()));
    publish(&three, "client/said/last", "x", &[]);
    let between: Vec<String> = std::iter::from_fn(|| watched.recv_timeout(PATIENCE).ok())
        .take_while(|line| !line.starts_with("client/said/last"))
        .collect();
    assert!(between.is_empty(), "{between:?}");
    assert!(moved.is_there() && last.is_there());
    end(watch);

    // What was retained outlives all of it; an empty payload ends it.
    publish(&two, "client/said/gone", "x", &["-r"]);
    publish(&three, "client/said/gone", "", &["-r"]);
    for node in [two, three] {
        node.stop();
    }
    let again = world.node("node-1");
    let (client, found) = subscribe(&again, TOKEN, "client/#");
    let mut found: Vec<String> =
        (0..2).map(|_| found.recv_timeout(PATIENCE).expect("what is retained")).collect();
    found.sort();
    assert_eq!(found, ["client/said/kept first", "client/will/stays gone"]);
    end(client);
    again.stop();
}

fn psql(postgres: &Postgres, sql: &str) -> String {
    let done = Command::new("psql").args(["-X", "-A", "-t", "-c", sql, &postgres.url()]).output();
    String::from_utf8_lossy(&done.expect("psql is there").stdout).trim().to_owned()
}

/// In one process that needs nothing else: retained messages are there after it was killed, and so are wills.
#[test]
fn what_clients_leave_outlives_the_process() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start(data.path(), &[]);
    publish(&server, "client/kept", "first", &["-r"]);
    let _left = Raw::connect(&server, "left", Some(("client/will", "gone")));
    Raw::connect(&server, "bye", Some(("client/bye", "gone"))).0.write_all(&[0xe0, 0]).unwrap();
    // Two began and one ended.
    wait_for("wills to be kept", || {
        let (_, metrics) = server.try_ask("GET", "/metrics", None)?;
        metrics.as_str()?.contains("fieldline_mqtt_will_changes_total 3").then_some(())
    });
    server.kill();
    let server = Server::start(data.path(), &[]);
    let (client, found) = subscribe(&server, TOKEN, "client/#");
    let mut found = [expect(&found, "client/"), expect(&found, "client/")];
    found.sort();
    assert_eq!(found, ["client/kept first", "client/will gone"]);
    end(client);
    server.stop();
}
