//! Nodes that ask each other, with certificates made by the program's own command.

use std::fmt::Write as _;
use std::fs::Permissions;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use fieldline_testkit::servers::{Etcd, Mosquitto, Postgres, Redis};
use rustix::process::Signal;
use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::device::Fleet;
use crate::server::{PATIENCE, Server, TOKEN, free_port, wait_for};

/// Longest that the API takes when a node does not answer: its deadline of a second, and a slow machine.
const API_MAX: Duration = Duration::from_secs(4);

/// Runs `fieldline certificates` on the files in `folder`.
pub(crate) fn certificates(folder: &Path, args: &[&str]) {
    let made = Command::new(env!("CARGO_BIN_EXE_fieldline"))
        .arg("certificates")
        .args(args)
        .arg("--folder")
        .arg(folder)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

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
        let folder = tempfile::tempdir().unwrap();
        certificates(folder.path(), &["new-ca"]);
        Self { etcd, postgres, redis, broker, folder }
    }

    /// The configuration of a node that has the certificate of `of` by the authority in `ca`.
    fn config(&self, number: usize, more: &str, of: &str, ca: &Path) -> PathBuf {
        let (etcd, postgres, redis) = (self.etcd.url(), self.postgres.url(), self.redis.url());
        let mut text = format!(
            "[postgres]\nurl = \"{postgres}\"\n[redis]\nurl = \"{redis}\"\n[mqtt_bus]\nurl = \"mqtt://127.0.0.1:{}\"\n[gateway]\nlisten_address = \"127.0.0.{}\"\nlisten_retry_delay = \"200ms\"\n[node]\netcd = [\"{etcd}\"]\n{more}\n",
            self.broker.port(),
            number + 1,
        );
        if !of.is_empty() {
            let (ca, file) = (ca.display(), ca.join(of).display().to_string());
            writeln!(
                text,
                "ca = \"{ca}/ca.pem\"\ncertificate = \"{file}.pem\"\nkey = \"{file}.key\""
            )
            .unwrap();
        }
        let path = self.folder.path().join(format!("node-{number}-{}.toml", free_port()));
        std::fs::write(&path, text).unwrap();
        path
    }

    /// A node with a certificate of its own.
    fn node(&self, number: usize) -> Server {
        let (name, listen) = (format!("node-{number}"), format!("127.0.0.{}:0", number + 1));
        certificates(self.folder.path(), &["issue", "--name", &name]);
        let more = format!("listen = \"{listen}\"");
        Server::node(&self.config(number, &more, &name, self.folder.path()), &name)
    }

    /// What a node says that ends while it starts.
    fn refused(&self, config: &Path, name: &str) -> String {
        let ended: Output = Command::new(env!("CARGO_BIN_EXE_fieldline"))
            .args(["serve", "--node", name, "--http", "127.0.0.1:0", "--mqtt", "127.0.0.1:0"])
            .arg("--config")
            .arg(config)
            .stdout(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(78), "{text}");
        println!("{}", text.lines().last().unwrap_or_default());
        text
    }
}

/// The lines that a live feed of the logs sends, until one holds `part`.
fn log_until(node: &Server, device: &str, part: &str) -> String {
    let mut stream = TcpStream::connect(&node.http).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(
        stream,
        "GET /api/v1/ws HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {TOKEN}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
        node.http
    )
    .unwrap();
    let text = json!({ "subscribe": ["log"], "devices": [device] }).to_string();
    // A short text frame, masked with zeros.
    let mut frame = vec![0x81, 0x80 | u8::try_from(text.len()).unwrap(), 0, 0, 0, 0];
    frame.extend(text.as_bytes());
    assert!(text.len() < 126);
    let (mut seen, mut buffer, mut sent) = (String::new(), [0; 16_384], false);
    loop {
        let count = stream.read(&mut buffer).expect("the feed goes on");
        assert!(count > 0, "the feed ended: {seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        if !sent && seen.contains("\r\n\r\n") {
            assert!(seen.starts_with("HTTP/1.1 101"), "{seen}");
            stream.write_all(&frame).unwrap();
            sent = true;
        }
        if seen.contains(part) {
            return seen;
        }
    }
}

/// Three nodes with certificates: each shows the connections of all, closes those of others, says who holds a device and
/// shows its frames as they come; one that sleeps is named, and costs no more than its deadline.
#[test]
fn any_node_shows_all_and_one_that_sleeps_is_named() {
    let world = World::start();
    let nodes: Vec<Server> = (1..=3).map(|number| world.node(number)).collect();
    for node in &nodes {
        let members = node.ask("GET", "/api/v1/nodes", None)["items"].clone();
        assert!(
            members
                .as_array()
                .unwrap()
                .iter()
                .all(|one| one["address"].as_str().unwrap().starts_with("https://"))
        );
    }
    let (id, port) = nodes[0].channel("wialon_ips", "tcp", json!({}));
    let path = format!("/api/v1/channels/{id}");
    let places: Vec<String> = (2..=4).map(|last| format!("127.0.0.{last}:{port}")).collect();
    wait_for("the channel on all nodes", || {
        let on = nodes[2].ask("GET", &path, None)["status"]["nodes"].clone();
        let on = on.as_array()?;
        (on.len() == 3 && on.iter().all(|one| one["listening"] == true)).then_some(())
    });
    // One device, at the second node.
    let fleet = Fleet::start_at(&places[1..2], 1);
    let connections = |node: &Server| node.ask("GET", &format!("{path}/connections"), None);
    let first = wait_for("its connection, seen from the third", || {
        let found = connections(&nodes[2]);
        let items = found["items"].as_array()?;
        items.iter().find(|one| one["device"].is_string()).cloned()
    });
    assert_eq!(first["node"], "node-2");
    for node in &nodes {
        let found = connections(node);
        assert_eq!(found["unreachable"], json!([]), "{found}");
        assert_eq!(node.ask("GET", &path, None)["status"]["connections"], 1);
    }
    let device = first["device"].as_str().unwrap().to_owned();
    for node in &nodes {
        wait_for("who holds it", || {
            let found = node.ask("GET", &format!("/api/v1/devices/{device}"), None);
            // Last values are being read from history yet.
            let (_, state) =
                node.try_ask("GET", &format!("/api/v1/devices/{device}/state"), None)?;
            (found["node"] == "node-2" && state["node"] == "node-2").then_some(())
        });
    }
    let lines = log_until(&nodes[0], &device, "frame.hex");
    assert!(lines.contains(&device), "{lines}");

    // Closed from the first; it comes back by itself.
    let close = format!("{path}/connections/{}", first["id"].as_str().unwrap());
    nodes[0].ask("DELETE", &close, None);
    wait_for("a connection in its place", || {
        let found = connections(&nodes[0]);
        let items = found["items"].as_array()?;
        (items.len() == 1 && items[0]["id"] != first["id"]).then_some(())
    });
    let (status, _) = nodes[2].try_ask("DELETE", &close, None).unwrap();
    assert_eq!(status, 404);

    // It sleeps: the others say so, in time.
    nodes[1].signal(Signal::STOP);
    let (mut longest, mut named) = (Duration::ZERO, false);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(8) {
        let asked = Instant::now();
        let found = connections(&nodes[0]);
        longest = longest.max(asked.elapsed());
        named |= found["unreachable"][0]["node"] == "node-2";
        // Its lease has ended: it is no member any more, and nobody asks it.
        if named && found["unreachable"] == json!([]) {
            break;
        }
    }
    assert!(named, "the node that sleeps is named");
    assert!(longest < API_MAX, "the API took {longest:?}");
    println!("with a node asleep the API took {longest:?} at most");
    nodes[1].signal(Signal::CONT);
    wait_for("all of it again", || {
        let found = connections(&nodes[0]);
        let held = found["items"].as_array()?.iter().any(|one| one["node"] == "node-2");
        (held && found["unreachable"] == json!([])).then_some(())
    });
    drop(fleet.finish());
    for node in nodes {
        node.stop();
    }
}

/// Without certificates, with another node's or another authority's, a node does not start, or is not answered.
#[test]
fn who_has_not_the_right_certificate_is_refused() {
    let world = World::start();
    let folder = world.folder.path();
    let wide = world.config(1, "listen = \"0.0.0.0:0\"", "", folder);
    let said = world.refused(&wide, "node-1");
    assert!(said.contains("fieldline certificates issue --name NODE"), "{said}");
    certificates(folder, &["issue", "--name", "node-2"]);
    let other = world.config(1, "listen = \"127.0.0.1:0\"", "node-2", folder);
    let said = world.refused(&other, "node-1");
    assert!(said.contains("issue one for node-1"), "{said}");
    let key = std::fs::metadata(folder.join("node-2.key")).unwrap().permissions();
    assert_eq!(key.mode() & 0o777, Permissions::from_mode(0o600).mode());

    // One of another authority starts, since that is its own; nobody believes it.
    let foreign = tempfile::tempdir().unwrap();
    certificates(foreign.path(), &["new-ca"]);
    certificates(foreign.path(), &["issue", "--name", "node-2"]);
    let one = world.node(1);
    let listen = "listen = \"127.0.0.3:0\"";
    let two = Server::node(&world.config(2, listen, "node-2", foreign.path()), "node-2");
    let (id, _) = one.channel("wialon_ips", "tcp", json!({}));
    let path = format!("/api/v1/channels/{id}/connections");
    for (node, other) in [(&one, "node-2"), (&two, "node-1")] {
        let found = wait_for("it to be named", || {
            let found = node.ask("GET", &path, None);
            (found["unreachable"][0]["node"] == other).then_some(found)
        });
        let reason = found["unreachable"][0]["reason"].as_str().unwrap();
        assert!(reason.contains("node.ca"), "{reason}");
        println!("{reason}");
    }
    let health = |node: &Server| -> Json { node.ask("GET", "/api/v1/nodes", None) };
    assert_eq!(health(&one)["items"].as_array().unwrap().len(), 2, "it is a member even so");
    two.stop();
    one.stop();
}
