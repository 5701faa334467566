//! Nodes behind the balancers of `deploy/`: the templates of nginx and haproxy, filled in by the script beside them.

use std::io::{Read as _, Write as _};
use std::net::{TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use fieldline_testkit::servers::{Process, free_port};
use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

use super::{DEVICES, World, address, channel, finish, gets_on};
use crate::device::Fleet;
use crate::server::{PATIENCE, Server, TOKEN, request, wait_for};

/// Where balancers connect to nodes from: what these list.
pub(crate) const ADDRESS: &str = "127.0.0.99";
/// Where haproxy listens: its channels have the ports of nginx's.
const HAPROXY: &str = "127.0.0.98";
/// Where Debian's package `libnginx-mod-stream` puts it.
const STREAM_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// nginx or haproxy before some nodes.
struct Balancer {
    http: String,
    mqtt: String,
    process: Process,
    _folder: TempDir,
}

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy")
}

/// The template as `deploy/fill.sh` fills it.
fn filled(template: &str, values: &[(&str, String)]) -> String {
    let mut fill = Command::new("sh");
    fill.arg(deploy().join("fill.sh")).arg(deploy().join(template));
    let output = fill.envs(values.iter().map(|(name, value)| (name, value))).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.is_empty(), "{template}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

impl Drop for Balancer {
    fn drop(&mut self) {
        // Killed, it would leave its workers behind.
        self.process.signal(Signal::TERM);
        wait_for("the balancer to end", || TcpStream::connect(&self.http).is_err().then_some(()));
    }
}

impl Balancer {
    /// What both are filled with: `http` and `mqtt` are ports of `listen`.
    fn values(
        nodes: &[&Server],
        listen: &str,
        (http, mqtt): (u16, u16),
        tcp_port: &str,
    ) -> Vec<(&'static str, String)> {
        let each = |one: &dyn Fn(usize, &Server) -> String| {
            let all = nodes.iter().enumerate().map(|(index, node)| one(index + 1, node));
            all.collect::<Vec<_>>().join(" ")
        };
        vec![
            ("HTTP_NODES", each(&|_, node| node.http.clone())),
            ("MQTT_NODES", each(&|_, node| format!("{}={}", node.mqtt, node.http))),
            ("NODES", each(&|number, node| format!("{}={}", address(number), node.http))),
            ("TCP_PORTS", tcp_port.to_owned()),
            ("LISTEN", listen.to_owned()),
            ("HTTP_PORT", http.to_string()),
            ("MQTT_PORT", mqtt.to_string()),
            ("SEND_PROXY", "on".to_owned()),
            ("BIND", ADDRESS.to_owned()),
        ]
    }

    fn nginx(nodes: &[&Server], tcp_port: &str, udp_port: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (http, mqtt) = (free_port(), free_port());
        let path = folder.path().to_str().unwrap().to_owned();
        let mut values = Self::values(nodes, "127.0.0.1", (http, mqtt), tcp_port);
        values.extend([
            ("UDP_PORTS", udp_port.to_owned()),
            ("RUN", format!("{path}/nginx.pid")),
            ("LOG", path.clone()),
            ("CACHE", path.clone()),
            ("RUN_AS", "root".to_owned()),
            ("STREAM_MODULE", STREAM_MODULE.to_owned()),
        ]);
        assert!(
            Path::new(STREAM_MODULE).is_file(),
            "install the Debian package libnginx-mod-stream"
        );
        let file = folder.path().join("nginx.conf");
        std::fs::write(&file, filled("nginx/nginx.conf.template", &values)).unwrap();
        let how = "daemon off;".to_owned();
        let arguments = ["-c".into(), file.into_os_string(), "-g".into(), how.into()];
        let nginx = Path::new("/usr/sbin/nginx");
        let process = Process::start(nginx, arguments, folder.path(), http);
        let at = |port: u16| format!("127.0.0.1:{port}");
        Self { http: at(http), mqtt: at(mqtt), process, _folder: folder }
    }

    fn haproxy(nodes: &[&Server], tcp_port: &str) -> Self {
        let haproxy = Path::new("/usr/sbin/haproxy");
        assert!(haproxy.is_file(), "install the Debian package haproxy");
        let folder = tempfile::tempdir().unwrap();
        let (http, mqtt) = (free_port(), free_port());
        let values = Self::values(nodes, HAPROXY, (http, mqtt), tcp_port);
        let mut filled = filled("haproxy/haproxy.cfg.template", &values);
        // For the harness, which looks at 127.0.0.1 whether it runs.
        let ready = free_port();
        filled.push_str(&format!("\nfrontend ready\n    bind 127.0.0.1:{ready}\n"));
        let file = folder.path().join("haproxy.cfg");
        std::fs::write(&file, filled).unwrap();
        let arguments = ["-db".into(), "-f".into(), file.into_os_string()];
        let process = Process::start(haproxy, arguments, folder.path(), ready);
        let at = |port: u16| format!("{HAPROXY}:{port}");
        Self { http: at(http), mqtt: at(mqtt), process, _folder: folder }
    }

    /// That nodes know who is behind it: a token that works from one address alone works from there, and only from there.
    fn names_its_clients(&self, node: &Server) {
        let token = |network: &str| {
            let new = json!({"name": format!("{network} by {}", self.http), "scopes": ["read"], "networks": [network]});
            let made = node.ask("POST", "/api/v1/tokens", Some(&new));
            made["secret"].as_str().unwrap().to_owned()
        };
        let (ours, balancers) = (token("127.0.0.1"), token(ADDRESS));
        for (token, allowed) in [(&ours, true), (&balancers, false)] {
            let answer = request(&self.http, token, "GET", "/api/v1/devices?limit=1", None);
            assert_eq!(answer.map(|(status, _)| status), Some(if allowed { 200 } else { 401 }));
            let accepted = self.connect_mqtt(token).is_ok_and(|answer| answer == [0x20, 2, 0, 0]);
            assert_eq!(accepted, allowed, "MQTT");
        }
    }

    fn get(&self, path: &str) -> u16 {
        request(&self.http, TOKEN, "GET", path, None).map_or(0, |(status, _)| status)
    }

    /// Opens a live feed and waits until it tells of a message.
    fn feed(&self) {
        let mut stream = TcpStream::connect(&self.http).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let head = format!(
            "GET /api/v1/ws HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        let wanted = br#"{"subscribe":["message"],"id":1}"#;
        // A final text frame, masked with zeroes.
        let length = u8::try_from(wanted.len()).unwrap();
        stream.write_all(&[0x81, 0x80 | length, 0, 0, 0, 0]).unwrap();
        stream.write_all(wanted).unwrap();
        let mut heard = Vec::new();
        let mut part = [0; 4_096];
        loop {
            let count = stream.read(&mut part).unwrap();
            heard.extend_from_slice(&part[..count]);
            let text = String::from_utf8_lossy(&heard);
            assert!(count > 0 && text.starts_with("HTTP/1.1 101"), "{text}");
            if text.contains(r#""type":"message""#) {
                return;
            }
        }
    }

    /// Signs in as an MQTT client.
    fn connect_mqtt(&self, token: &str) -> std::io::Result<[u8; 4]> {
        let mut stream = TcpStream::connect(&self.mqtt)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        // MQTT 3.1.1, clean session, name and password, keep-alive of 60 s; then client id, name, password.
        let mut body = b"\x00\x04MQTT\x04\xc2\x00\x3c".to_vec();
        for text in ["balanced", "any", token] {
            body.extend(u16::try_from(text.len()).unwrap().to_be_bytes());
            body.extend(text.as_bytes());
        }
        stream.write_all(&[0x10, u8::try_from(body.len()).unwrap()])?;
        stream.write_all(&body)?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer)?;
        Ok(answer)
    }

    fn takes_mqtt(&self) {
        wait_for("an MQTT client to be let in", || {
            (self.connect_mqtt(TOKEN).ok()? == [0x20, 2, 0, 0]).then_some(())
        });
    }
}

/// That nodes know where devices come from; those over UDP come from the balancer.
fn names_its_devices(nodes: &[Server]) {
    let mut devices = 0;
    for node in nodes {
        for channel in node.list("/api/v1/channels") {
            let path = format!("/api/v1/channels/{}/connections", channel["id"].as_str().unwrap());
            let from = if channel["transport"] == "udp" { ADDRESS } else { "127.0.0.1" };
            for connection in node.list(&path) {
                let peer = connection["peer"].as_str().unwrap();
                assert!(peer.starts_with(&format!("{from}:")), "{connection}");
                devices += 1;
            }
        }
    }
    assert!(devices >= DEVICES, "{devices} devices");
}

/// Sends one message in a datagram, as often as a device does: until it is acknowledged.
fn datagram(port: u16, second: usize) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(("127.0.0.1", port)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let line = format!(
        "balanced-udp#D#010126;0000{second:02};5355.0926;N;02732.4099;E;12;90;200;9;1.1;NA;NA;NA;NA;NA\r\n"
    );
    wait_for("a datagram to be acknowledged", || {
        socket.send(line.as_bytes()).ok()?;
        let mut answer = [0; 64];
        let count = socket.recv(&mut answer).ok()?;
        answer[..count].starts_with(b"#AD#1").then_some(())
    });
}

/// All that devices and clients speak goes through nginx or haproxy to two nodes; each dies in turn, and the other goes on.
#[test]
fn nodes_may_die_behind_a_balancer() {
    let world = World::start();
    let mut nodes: Vec<Server> = (1..=2).map(|number| world.node(number)).collect();
    let places = channel(&nodes.iter().collect::<Vec<_>>());
    let port = places[0].rsplit(':').next().unwrap().to_owned();
    let (id, udp_port) = nodes[0].channel("wialon_ips", "udp", json!({}));
    wait_for("the other node to listen for datagrams", || {
        let channel = nodes[1].ask("GET", &format!("/api/v1/channels/{id}"), None);
        channel["status"]["listening"].as_bool()?.then_some(())
    });

    let all: Vec<&Server> = nodes.iter().collect();
    let balancer = Balancer::nginx(&all, &port, &udp_port.to_string());
    assert_eq!(balancer.get("/balancer"), 200);
    assert_eq!(balancer.get("/metrics"), 404, "numbers are not for everybody");
    assert_eq!(balancer.get("/api/v1/system"), 200);
    // haproxy asks a node for its readiness: it sends nothing to one that is not there.
    let haproxy = Balancer::haproxy(&all, &port);
    wait_for("haproxy to know a ready node", || (haproxy.get("/readyz") == 200).then_some(()));
    assert_eq!((haproxy.get("/balancer"), haproxy.get("/metrics")), (200, 404));
    let places = [format!("127.0.0.1:{port}"), format!("{HAPROXY}:{port}")];
    let fleet = Fleet::start_at(&places, DEVICES);
    gets_on(&fleet, "the first messages");
    datagram(udp_port, 1);
    for balancer in [&balancer, &haproxy] {
        balancer.feed();
        balancer.takes_mqtt();
        balancer.names_its_clients(&nodes[0]);
    }
    names_its_devices(&nodes);

    nodes.remove(0).kill();
    let began = Instant::now();
    for _ in 0..50 {
        assert_eq!(balancer.get("/api/v1/system"), 200, "one node is enough");
    }
    println!("a node killed: none of 50 requests failed, in {:?}", began.elapsed());
    let took = gets_on(&fleet, "messages through the other node");
    println!("a node killed: devices got on after {took:?}");
    for balancer in [&balancer, &haproxy] {
        balancer.feed();
        balancer.takes_mqtt();
    }
    datagram(udp_port, 2);
    println!("a node killed: everything worked after {:?}", began.elapsed());

    // It comes back where the balancer looks for its channels, and takes them all when the other dies.
    let back = world.node(1);
    nodes.remove(0).kill();
    let took = gets_on(&fleet, "messages through the node that came back");
    println!("the other node killed: devices got on after {took:?}");
    datagram(udp_port, 3);
    finish(fleet, &back, "nodes killed behind balancers");
    back.stop();
}
