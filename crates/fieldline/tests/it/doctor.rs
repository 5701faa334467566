//! `fieldline doctor` names each broken set-up, made with the real thing, and has nothing to say of a healthy one.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::{Clock as _, Cluster as _, NoPeers, Node, SystemClock};
use fieldline_etcd::EtcdCluster;
use fieldline_testkit::servers::{Etcd, EtcdCluster as Members, Mosquitto, Redis};
use serde_json::{Value as Json, json};

use crate::device::Fleet;
use crate::disk_full::SmallDisk;
use crate::server::{Server, free_port, wait_for};
use crate::stand::{Stand, psql, run, tool};

/// What doctor said.
struct Report {
    json: Json,
    succeeded: bool,
}

fn doctor(args: &[&str]) -> Report {
    let ended = run(&[["doctor", "--output", "json"].as_slice(), args].concat());
    let text = String::from_utf8_lossy(&ended.stdout);
    let json = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    Report { json, succeeded: ended.status.success() }
}

impl Report {
    fn checks(&self) -> &[Json] {
        self.json["checks"].as_array().unwrap()
    }

    /// It found this, with a remedy.
    fn says(&self, verdict: &str, check: &str, part: &str) {
        let found = self.checks().iter().find(|one| {
            one["check"] == check
                && one["verdict"] == verdict
                && format!("{} {}", one["looked_at"], one["found"]).contains(part)
        });
        let found = found
            .unwrap_or_else(|| panic!("no `{check}` is {verdict} with `{part}`: {:#}", self.json));
        let remedy = found["remedy"].as_str().unwrap_or_default();
        assert!(remedy.len() > 5, "{found}");
        assert_eq!(self.succeeded, self.json["broken"] == 0);
        println!("{check}: {}; {remedy}", found["found"].as_str().unwrap());
    }

    /// It found nothing wrong. How fast the disk is, is this machine's.
    fn is_healthy(&self) {
        let wrong = self
            .checks()
            .iter()
            .filter(|one| one["verdict"] != "ok" && one["check"] != "disk sync");
        let wrong: Vec<&Json> = wrong.collect();
        assert!(wrong.is_empty() && self.succeeded, "{wrong:#?}");
        assert!(self.checks().len() > 5);
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// A configuration whose ports are free.
fn config(folder: &Path, name: &str, more: &str) -> PathBuf {
    let path = folder.join(format!("{name}.toml"));
    let (http, mqtt) = (free_port(), free_port());
    let more = more.replace("[http]\n", &format!("[http]\nlisten = \"127.0.0.1:{http}\"\n"));
    let http = if more.contains("[http]") {
        String::new()
    } else {
        format!("[http]\nlisten = \"127.0.0.1:{http}\"\n")
    };
    std::fs::write(&path, format!("{http}{more}[mqtt]\nlisten = \"127.0.0.1:{mqtt}\"\n")).unwrap();
    path
}

/// Changes a byte of a file.
fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn one_machine() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let free = config(folder.path(), "free", "");
    doctor(&["--data", text(&data), "--config", text(&free)]).is_healthy();

    let server = Server::start(&data, &[]);
    let (_, port) = server.channel("wialon_ips", "tcp", json!({}));
    let fleet = Fleet::start(port, 4);
    wait_for("messages", || (fleet.acked() > 200).then_some(()));
    doctor(&["--data", text(&data)]).is_healthy();
    fleet.finish();
    wait_for("the registry in its file", || {
        (data.join("registry.db").metadata().unwrap().len() > 12_288).then_some(())
    });
    server.kill();
    doctor(&["--data", text(&data), "--config", text(&free)]).is_healthy();

    // A copy for each thing that is wrong.
    let broken = |name: &str, change: &dyn Fn(&Path), verdict: &str, check: &str, part: &str| {
        let copy = folder.path().join(name.replace(' ', "-"));
        tool("cp", &["-a", text(&data), text(&copy)]);
        change(&copy);
        doctor(&["--data", text(&copy), "--config", text(&free)]).says(verdict, check, part);
        tool("chmod", &["-R", "u+rwX", text(&copy)]);
        std::fs::remove_dir_all(&copy).unwrap();
    };
    let log = |data: &Path| -> PathBuf {
        let shards = std::fs::read_dir(data.join("messages")).unwrap().flatten();
        let logs = shards.filter_map(|shard| {
            let files = std::fs::read_dir(shard.path()).ok()?.flatten().map(|file| file.path());
            files
                .filter(|file| text(file).contains("wal-") && text(file).ends_with(".log"))
                .max_by_key(|file| file.metadata().unwrap().len())
        });
        logs.max_by_key(|file| file.metadata().unwrap().len()).unwrap()
    };
    broken("damaged log", &|data| flip(&log(data), 40), "broken", "messages", "is damaged at byte");
    broken(
        "no registry",
        &|data| std::fs::remove_file(data.join("registry.db")).unwrap(),
        "broken",
        "registry",
        "is missing, though",
    );
    let scribble = |data: &Path| {
        let path = data.join("registry.db");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[4_096..12_288].fill(0xAA);
        std::fs::write(&path, bytes).unwrap();
        // As if it had been copied without its journal.
        std::fs::write(data.join("registry.db-wal"), []).unwrap();
    };
    broken("damaged registry", &scribble, "broken", "registry", "damaged");
    broken(
        "open to write",
        &|data| mode(data, 0o777),
        "broken",
        "data directory",
        "others may write",
    );
    broken(
        "open to read",
        &|data| mode(data, 0o755),
        "warning",
        "data directory",
        "may look into it",
    );
    broken(
        "too new",
        &|data| std::fs::write(data.join("format"), "99\n").unwrap(),
        "broken",
        "data format",
        "has format 99",
    );
    let ahead = |data: &Path| {
        let file = std::fs::File::options().append(true).open(data.join("format")).unwrap();
        file.set_modified(
            std::fs::metadata(data).unwrap().modified().unwrap() + Duration::from_secs(86_400),
        )
        .unwrap();
    };
    broken("clock behind", &ahead, "broken", "clock", "files here were written at");
    let crash = |data: &Path| {
        std::fs::create_dir_all(data.join("crash")).unwrap();
        std::fs::write(data.join("crash/2026-11-20T10-00-00Z.txt"), "end: signal: 6").unwrap();
    };
    broken("crashed", &crash, "warning", "crashes", "the worker died");
    assert!(
        rustix::process::geteuid().is_root(),
        "the owner of a file is changed: run this as root, or under `unshare --user --map-root-user --mount`"
    );
    broken(
        "another owner",
        &|data| {
            tool("chown", &["1", text(&data.join("messages"))]);
        },
        "broken",
        "data directory",
        "belongs to user 1",
    );

    // A disk with little space, and one without.
    let disk = SmallDisk::mount();
    let on_disk = disk.path().join("data");
    tool("cp", &["-a", text(&data), text(&on_disk)]);
    let mut filler = std::fs::File::create(disk.path().join("filler")).unwrap();
    while filler.write_all(&[1; 65_536]).is_ok() {}
    doctor(&["--data", text(&on_disk), "--config", text(&free)]).says(
        "broken",
        "disk space",
        " MiB free",
    );

    // What is around it.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let busy = folder.path().join("busy.toml");
    std::fs::write(&busy, format!("[http]\nlisten = \"{}\"\n", taken.local_addr().unwrap()))
        .unwrap();
    doctor(&["--data", text(&data), "--config", text(&busy)]).says(
        "broken",
        "port",
        "cannot be listened on",
    );
    doctor(&["--data", text(&data), "--config", text(&free), "--url", "http://127.0.0.1:1"]).says(
        "broken",
        "server",
        "127.0.0.1:1",
    );
    std::fs::write(&busy, "[http]\nlistn = 1\n").unwrap();
    doctor(&["--config", text(&busy)]).says("broken", "configuration", "did you mean `listen`?");
    let limited = format!(
        "ulimit -n 512; exec {} doctor --output json --data {} --config {}",
        env!("CARGO_BIN_EXE_fieldline"),
        text(&data),
        text(&free)
    );
    let json = serde_json::from_str(&tool("sh", &["-c", &limited])).unwrap();
    Report { json, succeeded: true }.says("warning", "open files", "at most 512");

    // And the words for people.
    let said = run(&["doctor", "--data", text(&data), "--config", text(&free)]);
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("ok       registry") && !said.contains("BROKEN"), "{said}");
}

#[test]
fn certificates_and_secrets() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        mode(&path, 0o600);
        path.to_str().unwrap().to_owned()
    };
    let days_from_1970 = i32::try_from(SystemClock.now().as_micros() / 86_400_000_000).unwrap();
    let certificate = |name: &str, days: i32| {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let day = |day: i32| {
            rcgen::date_time_ymd(1970, 1, 1)
                + Duration::from_secs(u64::try_from(day).unwrap() * 86_400)
        };
        (params.not_before, params.not_after) =
            (day(days_from_1970 - 100), day(days_from_1970 + days));
        let made = params.self_signed(&key).unwrap();
        (
            file(&format!("{name}.pem"), &made.pem()),
            file(&format!("{name}.key"), &key.serialize_pem()),
        )
    };
    let with = |name: &str, (certificate, key): &(String, String)| {
        let more = format!("[http]\ntls_certificate = \"{certificate}\"\ntls_key = \"{key}\"\n");
        let config = config(folder.path(), name, &more);
        doctor(&["--data", text(&folder.path().join("none")), "--config", text(&config)])
    };
    let good = certificate("good", 90);
    with("good", &good).is_healthy();
    with("ended", &certificate("ended", -3)).says("broken", "certificate", "ended 3 days ago");
    with("soon", &certificate("soon", 5)).says("warning", "certificate", "ends in");
    let other = certificate("other", 90);
    with("mixed", &(good.0.clone(), other.1)).says(
        "broken",
        "certificate",
        "cannot be used for TLS",
    );
    mode(Path::new(&good.1), 0o644);
    with("open", &good).says("broken", "certificate key", "everybody on this machine");

    let public = folder.path().join("public.toml");
    std::fs::write(&public, "[http]\nlisten = \"203.0.113.7:8080\"\n").unwrap();
    doctor(&["--data", text(&folder.path().join("none")), "--config", text(&public)]).says(
        "warning",
        "encryption",
        "public address",
    );
    // Nothing of these servers is there; what is looked at is the file.
    let plain = folder.path().join("plain.toml");
    let node = "[node]\nlisten = \"127.0.0.1:0\"\netcd = [\"http://127.0.0.1:1\"]\n[postgres]\nurl = \"postgres://a:hunter2@127.0.0.1:1/x\"\n[redis]\nurl = \"redis://127.0.0.1:1\"\n[mqtt_bus]\nurl = \"mqtt://127.0.0.1:1\"\n[http]\nlisten = \"127.0.0.1:0\"\n[mqtt]\nlisten = \"127.0.0.1:0\"\n";
    std::fs::write(&plain, node.replace("[node]", "[node]\naddress = \"http://10.0.0.1:7080\""))
        .unwrap();
    let said = "nodes on several machines know each other by certificates";
    doctor(&["--config", text(&plain)]).says("broken", "configuration", said);
    std::fs::write(&plain, node).unwrap();
    let report = doctor(&["--config", text(&plain)]);
    report.says("warning", "passwords", "everybody on this machine");
    for server in ["etcd", "postgres", "redis", "broker"] {
        report.says("broken", server, "127.0.0.1:1");
    }
    assert!(!report.json.to_string().contains("hunter2"), "{:#}", report.json);
}

/// Asks Redis something by a line of text.
fn redis(port: u16, line: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(format!("{line}\r\nQUIT\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_cluster() {
    let stand = Stand::start();
    let good = stand.text();
    let look = |name: &str, from: &str, to: &str| {
        let changed = good.replace(from, to);
        assert!(from == to || changed != good, "{from}");
        doctor(&["--config", text(&stand.write(name, &changed))])
    };
    look("new", "", "").is_healthy();
    let without = "[http]\nlisten = \"127.0.0.1:0\"\n[mqtt]\nlisten = \"127.0.0.1:0\"\n";
    let server = Server::node(&stand.write("node", &good.replace(without, "")), "node");
    wait_for("a server that is ready without a warning", || {
        let ready = server.ask("GET", "/readyz", None);
        (ready["warnings"] == json!([])).then_some(())
    });
    let running = good.replace(
        "[http]\nlisten = \"127.0.0.1:0\"",
        &format!("[http]\nlisten = \"{}\"", server.http),
    );
    let running = running.replace(
        "[mqtt]\nlisten = \"127.0.0.1:0\"",
        &format!("[mqtt]\nlisten = \"{}\"", server.mqtt),
    );
    doctor(&["--config", text(&stand.write("running", &running))]).is_healthy();
    let elsewhere = good.replace(
        "[http]\nlisten = \"127.0.0.1:0\"",
        &format!("[http]\nlisten = \"127.0.0.1:{}\"", free_port()),
    );
    doctor(&["--config", text(&stand.write("elsewhere", &elsewhere))]).says(
        "broken",
        "node name",
        "another process has the name",
    );

    std::thread::scope(|scope| {
        scope.spawn(|| nodes_and_etcd(&stand, &look));
        scope.spawn(|| database(&stand, &look));
        scope.spawn(|| last_values(&stand, &look));
        scope.spawn(|| live_items(&stand, &look));
    });
    server.stop();
}

type Look<'a> = &'a (dyn Fn(&str, &str, &str) -> Report + Sync);

fn nodes_and_etcd(stand: &Stand, look: Look<'_>) {
    let node = |name: &str, address: &str, version: &str| Node {
        name: name.to_owned(),
        address: address.to_owned(),
        roles: Vec::new(),
        zone: None,
        version: version.to_owned(),
        ready: false,
    };
    let join = async |node: Node| {
        let config = fieldline_etcd::Config::new(vec![stand.etcd.url()]);
        let member =
            EtcdCluster::connect(config, Arc::new(SystemClock), Arc::new(NoPeers)).await.unwrap();
        member.join(node).await.unwrap();
        member
    };
    let (there, told) = std::sync::mpsc::channel();
    let (done, end) = tokio::sync::oneshot::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let one = join(node("one", "https://127.0.0.1:1", "7.3.0")).await;
                let two = join(node("two", "https://127.0.0.1:1", env!("CARGO_PKG_VERSION"))).await;
                there.send(()).unwrap();
                // Either way it ends.
                end.await.unwrap_or_default();
                one.leave().await;
                two.leave().await;
            });
        });
        told.recv().unwrap();
        let report = look("nodes", "", "");
        report.says("broken", "node versions", "only one step is allowed");
        report.says("broken", "node address", "2 nodes name one address");
        report.says("broken", "node address", "cannot be reached from here");
        drop(done);
    });

    let url = stand.etcd.url();
    // A database that is full.
    let full = Etcd::start_with(&["--quota-backend-bytes", "4194304"]);
    let endpoint = format!("--endpoints={}", full.url());
    let value = "x".repeat(100_000);
    for number in 0..200 {
        let put = ["put", &format!("key-{number}"), &value, endpoint.as_str()].map(str::to_owned);
        if !Command::new("etcdctl")
            .args(put)
            .env("ETCDCTL_API", "3")
            .output()
            .unwrap()
            .status
            .success()
        {
            break;
        }
    }
    look("etcd-full", &url, &full.url()).says("broken", "etcd alarm", "NOSPACE");

    // Three members, of which one goes, and then another.
    let mut members = Members::start();
    let all = members.urls().join("\", \"");
    let first = members.urls()[0].clone();
    look("one-named", &url, &first).says("warning", "etcd members", "1 of 3 members are named");
    members.kill(2);
    // It may have been the leader.
    members.agrees(0);
    let report = look("member-away", &url, &all);
    report.says("warning", "etcd", &members.urls()[2]);
    assert!(
        report.checks().iter().any(|one| one["check"] == "etcd quorum" && one["verdict"] == "ok")
    );
    members.kill(1);
    look("quorum", &url, &all).says("broken", "etcd quorum", "there is no leader");
}

fn database(stand: &Stand, look: Look<'_>) {
    let url = stand.postgres.url();
    let sql = |sql: &str| psql(&url, sql);
    // A transaction that somebody has forgotten.
    let mut forgotten = Command::new("psql")
        .args(["-X", "-q", "-A", "-t", &url])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    forgotten
        .stdin
        .as_mut()
        .unwrap()
        .write_all(b"BEGIN; SELECT 'begun' FROM fieldline.version;\n")
        .unwrap();
    let mut line = String::new();
    BufReader::new(forgotten.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "begun\n");
    wait_for("a transaction that is old enough", || {
        let old = "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction' AND state_change < clock_timestamp() - interval '5 s'";
        (sql(old) != "0").then_some(())
    });
    look("forgotten", "", "").says("warning", "postgres transactions", "idle in transaction");
    forgotten.kill().unwrap();
    forgotten.wait().unwrap();

    let tomorrow = sql("SELECT to_char((now() AT TIME ZONE 'UTC') + interval '1 day', 'YYYYMMDD')");
    sql(&format!("DROP TABLE fieldline.messages_{tomorrow}"));
    look("partitions", "", "").says("warning", "postgres partitions", &tomorrow);

    let version = sql("SELECT version FROM fieldline.version");
    sql("UPDATE fieldline.version SET version = 99");
    look("schema", "", "").says("broken", "postgres schema", "of version 99");
    sql(&format!("UPDATE fieldline.version SET version = {version}"));

    sql("CREATE ROLE weak LOGIN");
    look("rights", "//postgres@", "//weak@").says(
        "broken",
        "postgres rights",
        "may not make tables",
    );

    let reload = |setting: &str| {
        sql(&format!("ALTER SYSTEM {setting}"));
        sql("SELECT pg_reload_conf()");
    };
    let shows = |name: &str, value: &str| {
        wait_for("the setting", || (sql(&format!("SHOW {name}")) == value).then_some(()));
    };
    reload("SET synchronous_standby_names = 'gone'");
    shows("synchronous_standby_names", "gone");
    look("standby", "", "").says("broken", "postgres standby", "commits wait for 1 standby");
    reload("RESET synchronous_standby_names");
    shows("synchronous_standby_names", "");
    reload("SET default_transaction_read_only = on");
    shows("default_transaction_read_only", "on");
    look("no-primary", "", "").says("broken", "postgres", "no PostgreSQL that takes writes");
    reload("RESET default_transaction_read_only");
}

fn last_values(stand: &Stand, look: Look<'_>) {
    let own = stand.redis.url();
    let with = |name: &str, options: &[&str]| {
        let other = Redis::start_with(options);
        (look(name, &own, &other.url()), other)
    };
    with("eviction", &["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"]).0.says(
        "broken",
        "redis",
        "forgets keys",
    );
    with("replica", &["--replicaof", "127.0.0.1", "1"]).0.says("broken", "redis", "is a replica");
    with("memory", &["--maxmemory", "1mb", "--maxmemory-policy", "noeviction"]).0.says(
        "warning",
        "redis memory",
        "MiB used",
    );

    // It cannot save, and refuses writes for it.
    let other = Redis::start_with(&["--save", "1 1"]);
    let port = other.process.port();
    std::fs::remove_dir_all(other.folder()).unwrap();
    wait_for("a save that fails", || {
        redis(port, "SET key value");
        redis(port, "INFO persistence").contains("rdb_last_bgsave_status:err").then_some(())
    });
    let report = look("unsaved", &own, &other.url());
    report.says("broken", "redis writes", "MISCONF");
    report.says("warning", "redis persistence", "could not save");
}

fn live_items(stand: &Stand, look: Look<'_>) {
    let own = stand.broker_url();
    let at = |port: u16, login: &str| format!("mqtt://{login}127.0.0.1:{port}");
    let few = Mosquitto::start();
    look("queue", &own, &at(few.port(), "")).says(
        "warning",
        "broker queue",
        "of 2000 publications",
    );
    let users = stand.folder.path().join("broker-users").to_str().unwrap().to_owned();
    tool("mosquitto_passwd", &["-b", "-c", &users, "node", "right"]);
    tool("chmod", &["644", &users]);
    let open = Mosquitto::start_with(&format!("password_file {users}\nmax_queued_messages 100000"));
    look("anonymous", &own, &at(open.port(), "node:right@")).says(
        "warning",
        "broker access",
        "lets anybody in",
    );
    let closed = Mosquitto::start_with(&format!(
        "allow_anonymous false\npassword_file {users}\nmax_queued_messages 100000\nmax_inflight_messages 0"
    ));
    let healthy = look("closed", &own, &at(closed.port(), "node:right@"));
    let of_broker =
        healthy.checks().iter().filter(|one| one["check"].as_str().unwrap().starts_with("broker"));
    assert!(
        of_broker.clone().count() > 2 && of_broker.clone().all(|one| one["verdict"] == "ok"),
        "{:#}",
        healthy.json
    );
    let little = Mosquitto::start_with("max_qos 0");
    look("qos", &own, &at(little.port(), "")).says("broken", "broker", "quality of service 1");
    let small = Mosquitto::start_with("max_packet_size 20000\nmax_queued_messages 100000");
    look("packets", &own, &at(small.port(), "")).says("warning", "broker packets", "20000 bytes");
}
