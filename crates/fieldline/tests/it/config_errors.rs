//! What is wrong with a configuration ends the start, soon, with one sentence that says what and how to mend it, and with no
//! password in it or in any line of the log.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Output;
use std::time::{Duration, Instant};

use fieldline_testkit::servers::{Etcd, Mosquitto, Postgres, Redis, free_port};
use socket2::{Domain, Socket, Type};

use crate::server::Server;
use crate::stand::{Certificates, Stand, psql, run, serve, tool};

/// In every password here.
const SECRET: &str = "hunter2";
/// Longest until the sentence is there: each server has a few seconds to answer, a broker ten.
const SAID_MAX: Duration = Duration::from_secs(40);
/// Starts that are tried at a time.
const AT_A_TIME: usize = 5;

/// An address that takes no connection and refuses none, as behind a dead link.
struct BlackHole {
    address: SocketAddr,
    _listener: Socket,
    _queued: Vec<Socket>,
}

impl BlackHole {
    fn open() -> Self {
        let socket = || Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let listener = socket();
        listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        // Once its queue is full, the system drops what else comes.
        let mut queued = Vec::new();
        loop {
            let one = socket();
            let connected = one.connect_timeout(&address.into(), Duration::from_millis(300));
            queued.push(one);
            if connected.is_err() {
                return Self { address, _listener: listener, _queued: queued };
            }
        }
    }
}

/// The configuration of a node, part by part.
#[derive(Clone)]
struct Text {
    node: String,
    etcd: String,
    postgres: String,
    redis: String,
    broker: String,
    http: String,
}

impl Text {
    fn of(stand: &Stand) -> Self {
        Self {
            node: String::new(),
            etcd: format!("etcd = [\"{}\"]", stand.etcd.url()),
            postgres: url(&stand.postgres.url()),
            redis: url(&stand.redis.url()),
            broker: url(&stand.broker_url()),
            http: "listen = \"127.0.0.1:0\"".to_owned(),
        }
    }

    fn whole(&self, name: &str) -> String {
        let Self { node, etcd, postgres, redis, broker, http } = self;
        let name = if node.is_empty() { format!("name = \"{name}\"") } else { node.clone() };
        format!(
            "[node]\n{name}\nlisten = \"127.0.0.1:0\"\n{etcd}\n[postgres]\n{postgres}\n[redis]\n{redis}\n[mqtt_bus]\n{broker}\n[http]\n{http}\n[mqtt]\nlisten = \"127.0.0.1:0\"\n"
        )
    }
}

fn url(url: &str) -> String {
    format!("url = \"{url}\"")
}

struct Case {
    name: String,
    text: String,
    said: Vec<String>,
}

/// All that can be wrong, gathered.
struct Cases {
    good: Text,
    all: Vec<Case>,
}

impl Cases {
    /// The good configuration with a change, and what has to be said of it.
    fn add(&mut self, name: &str, change: impl FnOnce(&mut Text), said: &[&str]) {
        let mut text = self.good.clone();
        change(&mut text);
        let text = text.whole(&name.replace([' ', ','], "-"));
        let said = said.iter().map(|part| (*part).to_owned()).collect();
        self.all.push(Case { name: name.to_owned(), text, said });
    }
}

fn judge(name: &str, said: &[String], took: Duration, ended: &Output) {
    let text = String::from_utf8_lossy(&ended.stderr).into_owned();
    let sentence = text.lines().last().unwrap_or_default();
    println!("{name}: {took:.1?}: {sentence}");
    let tail = || text.lines().rev().take(20).collect::<Vec<_>>().join("\n");
    assert_eq!(ended.status.code(), Some(78), "{name}: {}", tail());
    assert!(sentence.starts_with("fieldline: "), "{name}: {}", tail());
    for part in said {
        assert!(sentence.contains(part.as_str()), "{name}: `{part}` is not in: {sentence}");
    }
    assert!(took < SAID_MAX, "{name}: {took:?}");
    let secret = text.lines().find(|line| line.contains(SECRET));
    assert_eq!(secret, None, "{name}: a password is in the log");
    assert!(
        !String::from_utf8_lossy(&ended.stdout).contains(SECRET),
        "{name}: a password is printed"
    );
}

/// Tries all, a few at a time, and says of each that is not as it should be.
fn try_all(stand: &Stand, cases: &[Case]) {
    let mut failed = Vec::new();
    for some in cases.chunks(AT_A_TIME) {
        std::thread::scope(|scope| {
            let tried = some.iter().map(|case| {
                let tried = scope.spawn(move || {
                    let file = stand.write(&case.name.replace([' ', ','], "-"), &case.text);
                    let began = Instant::now();
                    let ended = serve(&file);
                    judge(&case.name, &case.said, began.elapsed(), &ended);
                });
                (&case.name, tried)
            });
            let tried: Vec<_> = tried.collect();
            failed
                .extend(tried.into_iter().filter_map(|(name, one)| one.join().err().map(|_| name)));
        });
    }
    assert!(failed.is_empty(), "{failed:?}: what was said is above");
}

/// The servers are there; what is said of them is wrong.
#[test]
fn wrong_keys_and_addresses_are_said_in_a_sentence() {
    let stand = Stand::start();
    let mut cases = Cases { good: Text::of(&stand), all: Vec::new() };
    let good = cases.good.clone();

    let secret = |place: &str| format!("postgres://a:{SECRET}@{place}/x");
    cases.add(
        "unknown key, node",
        |text| text.etcd = text.etcd.replace("etcd", "ectd"),
        &["no key or section `ectd`", "did you mean `etcd`?", "line 4"],
    );
    cases.add(
        "unknown key, postgres",
        |text| text.postgres = format!("{}\nconection_max = 1", url(&secret("h"))),
        &["`conection_max`", "did you mean `connections_max`?"],
    );
    cases.add(
        "unknown key, redis",
        |text| text.redis = format!("ulr = \"redis://:{SECRET}@h\""),
        &["`ulr`", "did you mean `url`?"],
    );
    cases.add(
        "unknown key, broker",
        |text| text.broker = format!("{}\nprefixx = \"a\"", good.broker),
        &["`prefixx`", "did you mean `prefix`?"],
    );
    cases.add(
        "unknown section",
        |text| text.http = format!("{}\n[redsi]\nurl = \"{SECRET}\"", good.http),
        &["`redsi`", "did you mean `redis`?"],
    );
    cases.add(
        "a value of another form",
        |text| text.redis = format!("url = [\"redis://:{SECRET}@h\"]"),
        &["wrong in line", "expected a string"],
    );
    cases.add(
        "no address",
        |text| text.postgres = url(&format!("{SECRET}@host")),
        &["`url` is no PostgreSQL URL", "it looks like"],
    );
    cases.add(
        "a password in an endpoint",
        |text| text.etcd = format!("etcd = [\"http://root:{SECRET}@h:2379\"]"),
        &["node.etcd_user"],
    );

    cases.add(
        "nobody there, etcd",
        |text| text.etcd = "etcd = [\"http://127.0.0.1:1\"]".to_owned(),
        &["etcd at http://127.0.0.1:1 does not answer", "refused", "start it"],
    );
    cases.add(
        "nobody there, postgres",
        |text| text.postgres = url(&secret("127.0.0.1:1")),
        &["PostgreSQL cannot be reached", "127.0.0.1:1", "refused", "start it"],
    );
    cases.add(
        "nobody there, redis",
        |text| text.redis = url(&format!("redis://:{SECRET}@127.0.0.1:1")),
        &["no Redis listens at 127.0.0.1:1", "start it"],
    );
    cases.add(
        "nobody there, broker",
        |text| text.broker = url(&format!("mqtt://a:{SECRET}@127.0.0.1:1")),
        &["MQTT broker at 127.0.0.1:1 cannot be reached", "refused", "start it"],
    );

    let open = BlackHole::open();
    let hole = open.address;
    let place = hole.to_string();
    cases.add(
        "black hole, etcd",
        |text| text.etcd = format!("etcd = [\"http://{hole}\"]"),
        &["etcd at", &place, "does not answer", "start it"],
    );
    cases.add(
        "black hole, postgres",
        |text| text.postgres = url(&secret(&place)),
        &["PostgreSQL cannot be reached", &place],
    );
    cases.add(
        "black hole, redis",
        |text| text.redis = url(&format!("redis://:{SECRET}@{hole}")),
        &[&place, "correct `redis.url`"],
    );
    cases.add(
        "black hole, broker",
        |text| text.broker = url(&format!("mqtt://a:{SECRET}@{hole}")),
        &[&place, "correct `mqtt_bus.url`"],
    );

    let nowhere = "/nowhere/ca.pem";
    let https = stand.etcd.url().replace("http:", "https:");
    cases.add(
        "unreadable file, etcd",
        |text| text.etcd = format!("etcd = [\"{https}\"]\netcd_ca = \"{nowhere}\""),
        &["node.etcd_ca", nowhere, "correct the path"],
    );
    cases.add(
        "unreadable file, postgres",
        |text| text.postgres = format!("{}\n[postgres.tls]\nca = \"{nowhere}\"", good.postgres),
        &[nowhere],
    );
    cases.add(
        "unreadable file, redis",
        |text| text.redis = format!("url = \"rediss://h\"\ntls_ca = \"{nowhere}\""),
        &["`redis.tls_ca`", nowhere, "cannot be read"],
    );
    cases.add(
        "unreadable file, broker",
        |text| text.broker = format!("url = \"mqtts://h\"\nauthority = \"{nowhere}\""),
        &["`mqtt_bus.authority`", nowhere, "correct the path"],
    );
    cases.add(
        "unreadable file, http",
        |text| {
            text.http =
                format!("{}\ntls_certificate = \"{nowhere}\"\ntls_key = \"{nowhere}\"", good.http)
        },
        &["http.tls_certificate", nowhere],
    );

    let sql = "CREATE SCHEMA newer; CREATE TABLE newer.version (version integer); INSERT INTO newer.version VALUES (99)";
    psql(&stand.postgres.url(), sql);
    cases.add(
        "version too new",
        |text| text.postgres = format!("{}\nschema = \"newer\"", good.postgres),
        &["tables in schema `newer` are of version 99", "start a newer Fieldline"],
    );
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().to_string();
    cases.add(
        "port taken",
        |text| text.http = format!("listen = \"{port}\""),
        &["cannot listen on", &port, "http.listen", "stop what uses it"],
    );
    try_all(&stand, &cases.all);

    // A name that another has; it is waited for, since one that was killed has it for a moment.
    let text = good
        .whole("twice")
        .replace("[http]\nlisten = \"127.0.0.1:0\"\n[mqtt]\nlisten = \"127.0.0.1:0\"\n", "");
    let server = Server::node(&stand.write("first", &text), "twice");
    let began = Instant::now();
    let ended = serve(&stand.write("second", &good.whole("twice")));
    let said = ["by the name `twice`".to_owned(), "give each node a name of its own".to_owned()];
    judge("a name that another has", &said, began.elapsed(), &ended);
    server.stop();

    let missing = stand.folder.path().join("none.toml");
    let ended = serve(&missing);
    judge(
        "no such file",
        &["none.toml".to_owned(), "check the path".to_owned()],
        Duration::ZERO,
        &ended,
    );
    let newer = stand.folder.path().join("newer");
    std::fs::create_dir(&newer).unwrap();
    std::fs::write(newer.join("format"), "99\n").unwrap();
    let addresses = ["--http", "127.0.0.1:0", "--mqtt", "127.0.0.1:0"];
    let mut args = vec!["up", "--data", newer.to_str().unwrap()];
    args.extend(addresses);
    let said = ["has format 99".to_owned(), "use a newer Fieldline".to_owned()];
    judge("a data directory that is too new", &said, Duration::ZERO, &run(&args));
}

/// The servers want a password or TLS, or do not offer it, or show a certificate that nobody knows.
#[test]
fn wrong_passwords_and_certificates_are_said_in_a_sentence() {
    let certificates = Certificates::make();
    let stand = Stand::start();
    let (ca, foreign) = (certificates.path("own.pem"), certificates.path("foreign.pem"));
    let (certificate, key) = (certificates.path("server.pem"), certificates.path("server.key"));
    let mut cases = Cases { good: Text::of(&stand), all: Vec::new() };

    // etcd: one with TLS, one with users.
    let tls = Etcd::start_with(&["--cert-file", &certificate, "--key-file", &key]);
    let closed = Etcd::start();
    let etcdctl = |args: &[&str]| {
        let endpoint = format!("--endpoints={}", closed.url());
        tool("etcdctl", &[[endpoint.as_str()].as_slice(), args].concat());
    };
    etcdctl(&["user", "add", "root:right"]);
    etcdctl(&["user", "grant-role", "root", "root"]);
    etcdctl(&["auth", "enable"]);
    let etcd = |url: &str, more: &str| format!("etcd = [\"{url}\"]\n{more}");
    let secure = |url: String| url.replace("http:", "https:");
    let (plain, secured) = (secure(stand.etcd.url()), secure(tls.url()));
    let with_ca = |ca: &str| format!("etcd_ca = \"{ca}\"");
    let user = format!("etcd_user = \"root\"\netcd_password = \"{SECRET}\"");
    cases.add(
        "wrong password, etcd",
        |text| text.etcd = etcd(&closed.url(), &user),
        &["etcd at", "authentication failed", "node.etcd_password"],
    );
    cases.add(
        "TLS wanted, etcd",
        |text| text.etcd = etcd(&tls.url(), ""),
        &["etcd at", "https:// if it wants TLS"],
    );
    cases.add(
        "TLS not offered, etcd",
        |text| text.etcd = etcd(&plain, &with_ca(&ca)),
        &["etcd at", "write http://"],
    );
    cases.add(
        "unknown authority, etcd",
        |text| text.etcd = etcd(&secured, &with_ca(&foreign)),
        &["etcd at", "certificate", "`node.etcd_ca`"],
    );
    cases.add(
        "no authority, etcd",
        |text| text.etcd = etcd(&secured, ""),
        &["node.etcd_ca is missing"],
    );

    // PostgreSQL: for all but its superuser only with TLS and a password.
    let rules = stand.write("hba", "local all all trust\nhostssl all postgres 127.0.0.1/32 trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n");
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(stand.folder.path(), open).unwrap();
    let server = Postgres::start_with(&[
        "ssl=on",
        &format!("ssl_cert_file={certificate}"),
        &format!("ssl_key_file={}", certificates.path("postgres.key")),
        &format!("hba_file={}", rules.display()),
    ]);
    psql(&format!("{}?sslmode=require", server.url()), "CREATE ROLE app LOGIN PASSWORD 'right'");
    let port = server.process.port();
    let postgres = |url_: &str, ca: Option<&str>| {
        let tls = ca.map(|ca| format!("\n[postgres.tls]\nca = \"{ca}\"")).unwrap_or_default();
        format!("{}{tls}", url(url_))
    };
    let app = format!("postgres://app:{SECRET}@127.0.0.1:{port}/postgres");
    cases.add(
        "wrong password, postgres",
        |text| text.postgres = postgres(&app, Some(&ca)),
        &["does not let `app` in", "password authentication failed", "correct user and password"],
    );
    cases.add(
        "TLS wanted, postgres",
        |text| text.postgres = postgres(&app, None),
        &["no encrypted connection", "set `postgres.tls.ca`"],
    );
    cases.add(
        "TLS not offered, postgres",
        |text| text.postgres = postgres(&stand.postgres.url(), Some(&ca)),
        &["no encrypted connection", "does not support TLS", "leave `postgres.tls` out"],
    );
    cases.add(
        "unknown authority, postgres",
        |text| text.postgres = postgres(&app, Some(&foreign)),
        &["no encrypted connection", "certificate", "`postgres.tls.ca`"],
    );
    cases.add(
        "no such database",
        |text| {
            let port = stand.postgres.process.port();
            text.postgres = url(&format!("postgres://postgres:{SECRET}@127.0.0.1:{port}/none"));
        },
        &["has no database `none`", "createdb none"],
    );

    // Redis.
    let tls_port = free_port().to_string();
    let redis = Redis::start_with(&[
        "--requirepass",
        "right",
        "--tls-port",
        &tls_port,
        "--tls-cert-file",
        &certificate,
        "--tls-key-file",
        &key,
        "--tls-auth-clients",
        "no",
    ]);
    let port = redis.process.port();
    let with = |url_: String, ca: &str| format!("{}\ntls_ca = \"{ca}\"", url(&url_));
    cases.add(
        "wrong password, redis",
        |text| text.redis = url(&format!("redis://:{SECRET}@127.0.0.1:{port}")),
        &["refuses the user or password", "redis.url"],
    );
    cases.add("no password, redis", |text| text.redis = url(&redis.url()), &["wants a password"]);
    cases.add(
        "TLS wanted, redis",
        |text| text.redis = url(&format!("redis://:{SECRET}@127.0.0.1:{tls_port}")),
        &["correct `redis.url`"],
    );
    cases.add(
        "TLS not offered, redis",
        |text| text.redis = with(format!("rediss://:{SECRET}@127.0.0.1:{port}"), &ca),
        &["correct `redis.url`"],
    );
    cases.add(
        "unknown authority, redis",
        |text| text.redis = with(format!("rediss://:{SECRET}@127.0.0.1:{tls_port}"), &foreign),
        &["certificate that is not trusted", "redis.tls_ca"],
    );
    let replica = Redis::start_with(&["--replicaof", "127.0.0.1", "1"]);
    cases.add(
        "a replica, redis",
        |text| text.redis = url(&replica.url()),
        &["is a replica", "name the primary"],
    );

    // The broker.
    let users = stand.folder.path().join("users").to_str().unwrap().to_owned();
    tool("mosquitto_passwd", &["-b", "-c", &users, "node", "right"]);
    let closed = Mosquitto::start_with(&format!("allow_anonymous false\npassword_file {users}"));
    let tls = Mosquitto::start_with(&format!("certfile {certificate}\nkeyfile {key}"));
    let old = Mosquitto::start_with("max_qos 0");
    let broker = |scheme: &str, port: u16, ca: Option<&str>| {
        let authority = ca.map(|ca| format!("\nauthority = \"{ca}\"")).unwrap_or_default();
        format!("{}{authority}", url(&format!("{scheme}://node:{SECRET}@127.0.0.1:{port}")))
    };
    cases.add(
        "wrong password, broker",
        |text| text.broker = broker("mqtt", closed.port(), None),
        &["refuses the user name or password", "mqtt_bus.url"],
    );
    cases.add(
        "TLS wanted, broker",
        |text| text.broker = broker("mqtt", tls.port(), None),
        &["no MQTT 5 broker", "mqtts:// if it wants TLS"],
    );
    cases.add(
        "TLS not offered, broker",
        |text| text.broker = broker("mqtts", closed.port(), Some(&ca)),
        &["no encrypted connection"],
    );
    cases.add(
        "unknown authority, broker",
        |text| text.broker = broker("mqtts", tls.port(), Some(&foreign)),
        &["no encrypted connection", "mqtt_bus.authority"],
    );
    cases.add(
        "too little allowed, broker",
        |text| text.broker = broker("mqtt", old.port(), None),
        &["does not allow quality of service 1"],
    );
    try_all(&stand, &cases.all);
}
