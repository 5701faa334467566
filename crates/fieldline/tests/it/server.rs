//! Starts and kills the program, and asks its API.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fieldline_testkit::servers::Place;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value as Json, json};

/// The token of the administrator in these tests.
pub(crate) const TOKEN: &str = "flt_test00000000000000000000000000000000000000";

/// Longest wait for anything; a slow machine is no failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A running program on a data directory of its own.
pub(crate) struct Server {
    master: Child,
    /// Address of its API.
    pub(crate) http: String,
    /// Address of its MQTT broker.
    pub(crate) mqtt: String,
    worker: Pid,
}

/// A port that nobody listens on, over TCP or UDP.
pub(crate) fn free_port() -> u16 {
    loop {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        if UdpSocket::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Calls `probe` until it gives something, and fails naming `what` when patience ends.
pub(crate) fn wait_for<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Server {
    /// Starts the program on `data` with ports of its own and waits until it is ready.
    pub(crate) fn start(data: &Path, args: &[&str]) -> Self {
        let stale = std::fs::read_to_string(data.join("run.json")).unwrap_or_default();
        let master = Command::new(env!("CARGO_BIN_EXE_fieldline"))
            .arg("up")
            .arg("--data")
            .arg(data)
            .args(["--http", "127.0.0.1:0", "--mqtt", "127.0.0.1:0"])
            .args(args)
            .env("FIELDLINE_ADMIN_TOKEN", TOKEN)
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let run = wait_for("run.json of the worker", || {
            let text = std::fs::read_to_string(data.join("run.json")).ok()?;
            if text == stale { None } else { serde_json::from_str::<Json>(&text).ok() }
        });
        let text = |name: &str| run[name].as_str().unwrap().to_owned();
        let worker = Pid::from_raw(i32::try_from(run["pid"].as_i64().unwrap()).unwrap()).unwrap();
        let server = Self { master, http: text("http"), mqtt: text("mqtt"), worker };
        wait_for("readiness", || (server.try_ask("GET", "/readyz", None)?.0 == 200).then_some(()));
        server
    }

    /// Starts one node of a cluster and waits until it is ready.
    pub(crate) fn node(config: &Path, name: &str) -> Self {
        let (http, mqtt) =
            (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
        let node = Command::new(env!("CARGO_BIN_EXE_fieldline"))
            .args(["serve", "--master", "--node", name, "--http", &http, "--mqtt", &mqtt])
            .arg("--config")
            .arg(config)
            .env("FIELDLINE_ADMIN_TOKEN", TOKEN)
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let worker = Pid::from_raw(i32::try_from(node.id()).unwrap()).unwrap();
        let mut server = Self { master: node, http, mqtt, worker };
        wait_for("readiness", || (server.try_ask("GET", "/readyz", None)?.0 == 200).then_some(()));
        server.worker = server.present_worker().expect("a node that is ready has a worker");
        server
    }

    /// Starts one node of a cluster at a place, with these roles and without a master; it may not be ready yet.
    pub(crate) fn node_at(place: &Place, config: &Path, name: &str, roles: &str) -> Self {
        let [http, mqtt] = [(); 2].map(|()| place.socket(free_port()).to_string());
        let node = place
            .command(env!("CARGO_BIN_EXE_fieldline"))
            .args(["serve", "--node", name, "--role", roles])
            .args(["--http", &http, "--mqtt", &mqtt, "--config"])
            .arg(config)
            .env("FIELDLINE_ADMIN_TOKEN", TOKEN)
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let worker = Pid::from_raw(i32::try_from(node.id()).unwrap()).unwrap();
        Self { master: node, http, mqtt, worker }
    }

    /// Sends a signal to the worker, if there is one now: one that was stopped past its lease is ended, and started again.
    pub(crate) fn signal(&self, signal: Signal) {
        let own = i32::try_from(self.master.id()).ok().and_then(Pid::from_raw);
        // One without a master is its own worker.
        let alone = (own == Some(self.worker)).then_some(self.worker);
        if let Some(worker) = self.present_worker().or(alone) {
            // It may end in between.
            let _ended = kill_process(worker, signal);
        }
    }

    /// Whether a node has ended by itself.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.master.try_wait().unwrap().is_some()
    }

    /// The process that holds everything.
    pub(crate) fn worker(&self) -> Pid {
        self.worker
    }

    /// The worker that the master has now.
    pub(crate) fn present_worker(&self) -> Option<Pid> {
        let master = self.master.id().to_string();
        let all = std::fs::read_dir("/proc").unwrap().flatten();
        let of_master = all.filter_map(|entry| {
            let id: i32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            let mut after_name = stat.rsplit(')').next()?.split_whitespace();
            let alive = after_name.next()? != "Z";
            (alive && after_name.next()? == master).then_some(id)
        });
        of_master.into_iter().next().and_then(Pid::from_raw)
    }

    /// Kills master and worker at once, as a power cut would.
    pub(crate) fn kill(mut self) {
        let worker = self.present_worker();
        self.master.kill().unwrap();
        if let Some(worker) = worker {
            // It may have ended by itself in between: its master is dead.
            let _ended = kill_process(worker, Signal::KILL);
        }
        self.master.wait().unwrap();
    }

    /// Asks for a clean end and waits for it.
    pub(crate) fn stop(mut self) {
        let master = Pid::from_raw(i32::try_from(self.master.id()).unwrap()).unwrap();
        kill_process(master, Signal::TERM).unwrap();
        let status = wait_for("a clean end", || self.master.try_wait().unwrap());
        assert!(status.success(), "ended with {status}");
    }

    /// Bytes of memory that the worker holds.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let path = format!("/proc/{}/statm", self.worker.as_raw_nonzero());
        let text = std::fs::read_to_string(path).unwrap();
        text.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4_096
    }

    /// Sends a request as the administrator; status and body, or `None` if nobody answers.
    pub(crate) fn try_ask(
        &self,
        method: &str,
        path: &str,
        body: Option<&Json>,
    ) -> Option<(u16, Json)> {
        request(&self.http, TOKEN, method, path, body)
    }

    /// Sends a request as the administrator, which must succeed.
    pub(crate) fn ask(&self, method: &str, path: &str, body: Option<&Json>) -> Json {
        let (status, answer) = self.try_ask(method, path, body).expect("the API answers");
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    /// Makes a channel that registers devices by itself, and returns its id and port.
    pub(crate) fn channel(&self, protocol: &str, transport: &str, more: Json) -> (String, u16) {
        let port = free_port();
        let mut channel = json!({
            "name": format!("{protocol} {transport} {port}"),
            "protocol": protocol,
            "transport": transport,
            "listen": format!("127.0.0.1:{port}"),
            "auto_register": true,
        });
        for (name, value) in more.as_object().into_iter().flatten() {
            channel[name] = value.clone();
        }
        let made = self.ask("POST", "/api/v1/channels", Some(&channel));
        let id = made["id"].as_str().unwrap().to_owned();
        wait_for("the channel to listen", || {
            let channel = self.ask("GET", &format!("/api/v1/channels/{id}"), None);
            channel["status"]["listening"].as_bool()?.then_some(())
        });
        (id, port)
    }

    /// All items of a list, page by page.
    pub(crate) fn list(&self, path: &str) -> Vec<Json> {
        let (mut items, mut cursor) = (Vec::new(), String::new());
        loop {
            let mark = if path.contains('?') { '&' } else { '?' };
            let page = self.ask("GET", &format!("{path}{mark}limit=1000{cursor}"), None);
            items.extend(page["items"].as_array().unwrap().iter().cloned());
            match page["next"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return items,
            }
        }
    }

    /// The id of the device with this ident, if there is one.
    pub(crate) fn device(&self, ident: &str) -> Option<String> {
        let found = self.ask("GET", &format!("/api/v1/devices?ident={ident}"), None);
        Some(found["items"].get(0)?["id"].as_str()?.to_owned())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // After `kill` or `stop` both are gone already, and nobody has this parent.
        let worker = self.present_worker();
        let _gone = self.master.kill();
        if let Some(worker) = worker {
            let _gone = kill_process(worker, Signal::KILL);
        }
        let _reaped = self.master.wait();
    }
}

/// One request over a connection of its own; `None` if nobody answers.
pub(crate) fn request(
    address: &str,
    token: &str,
    method: &str,
    path: &str,
    body: Option<&Json>,
) -> Option<(u16, Json)> {
    request_within(PATIENCE, address, token, method, path, body)
}

/// The same, for as long as this.
pub(crate) fn request_within(
    patience: Duration,
    address: &str,
    token: &str,
    method: &str,
    path: &str,
    body: Option<&Json>,
) -> Option<(u16, Json)> {
    let mut stream = TcpStream::connect_timeout(&address.parse().ok()?, patience).ok()?;
    stream.set_read_timeout(Some(patience)).ok()?;
    let body = body.map(ToString::to_string).unwrap_or_default();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(body.as_bytes()).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split_whitespace().nth(1)?.parse().ok()?;
    let body = if head.to_lowercase().contains("transfer-encoding: chunked") {
        unchunk(body)
    } else {
        body.to_owned()
    };
    Some((status, serde_json::from_str(&body).unwrap_or(Json::String(body))))
}

fn unchunk(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let length = usize::from_str_radix(length.trim(), 16).unwrap_or(0);
        if length == 0 {
            break;
        }
        whole.push_str(rest.get(..length).unwrap_or(rest));
        body = rest.get(length + 2..).unwrap_or_default();
    }
    whole
}
