//! A whole cluster on this machine, to look at and to break: three etcd, three PostgreSQL under Patroni, Redis, a broker,
//! object storage, three nodes in three zones, a balancer and a fleet. `cargo xtask cluster` builds what it takes and runs it.
//!
//! It stops everything at the end of its input, at Ctrl-C and at SIGTERM; what it started ends too when it is killed.

use std::fmt::Write as _;
use std::io::{BufRead as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use fieldline_testkit::servers::{
    Database, EtcdCluster, Launch, Mosquitto, Pace, Patroni, Place, Process, Redis, S3, Signal,
};
use tokio::signal::unix::{SignalKind, signal};

const ZONES: [&str; 3] = ["a", "b", "c"];
const HTTP_PORT: u16 = 8080;
const NODE_PORT: u16 = 7080;
const MQTT_PORT: u16 = 1883;
/// Where the balancer is, and comes from.
const BALANCER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 10);
/// Channels of the fleet: protocol and port.
const CHANNELS: [(&str, u16); 2] = [("teltonika", 5027), ("wialon_ips", 5039)];
/// Vehicles of each protocol.
const DEVICES: usize = 30;
/// How long what ends in order may take; then it is killed.
const NODE_END_MAX: Duration = Duration::from_secs(15);
const DATABASE_END_MAX: Duration = Duration::from_secs(20);
/// Commands that wait: a person types slower than they are carried out.
const COMMANDS_MAX: usize = 16;

fn main() -> ExitCode {
    // The S3 server is this program, started again.
    if S3::serve_if_told() {
        return ExitCode::SUCCESS;
    }
    // What cannot be started panics with a sentence that says what and where its log is; all that runs is then stopped.
    std::panic::set_hook(Box::new(|panic| {
        say(&format!("\ncannot go on: {}", panic.payload_as_str().unwrap_or("a fault")));
    }));
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(program), Some(deploy), Some(folder)) =
        (arguments.next(), arguments.next(), arguments.next())
    else {
        say("usage: cluster PROGRAM DEPLOY FOLDER");
        return ExitCode::FAILURE;
    };
    let (sender, commands) = sync_channel(COMMANDS_MAX);
    listen(sender);
    // Nothing of it is looked at after a panic.
    let run = AssertUnwindSafe(|| run(&program, &deploy, &folder, &commands));
    let Ok(done) = std::panic::catch_unwind(run) else {
        return ExitCode::FAILURE;
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            say(&format!("\n{failure}"));
            ExitCode::FAILURE
        }
    }
}

/// What ends the cluster, or is done to it.
enum Wish {
    Do(String),
    End,
}

/// Passes on lines of the input, its end, and signals; a second signal ends us at once, and all that we started with us.
fn listen(sender: SyncSender<Wish>) {
    let typed = sender.clone();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { break };
            if typed.send(Wish::Do(line)).is_err() {
                return;
            }
        }
        // Nobody is there to hear it: then it has ended already.
        typed.send(Wish::End).unwrap_or_default();
    });
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let waits = async {
            let mut interrupt = signal(SignalKind::interrupt())?;
            let mut terminate = signal(SignalKind::terminate())?;
            for last in [false, true] {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if last {
                    std::process::exit(1);
                }
                sender.send(Wish::End).unwrap_or_default();
            }
            std::io::Result::Ok(())
        };
        if let Err(error) = runtime.and_then(|runtime| runtime.block_on(waits)) {
            say(&format!("signals cannot be heard: {error}"));
        }
    });
}

/// All that runs. Fields are dropped in this order, which is the order in which to end what is left.
struct Running {
    fleet: Vec<Process>,
    balancer: Process,
    nodes: Vec<Process>,
    redis: Redis,
    broker: Mosquitto,
    s3: S3,
    patroni: Patroni,
    etcd: EtcdCluster,
}

fn run(
    program: &Path,
    deploy: &Path,
    folder: &Path,
    commands: &Receiver<Wish>,
) -> Result<(), String> {
    std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    for log in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if log.path().extension().is_some_and(|extension| extension == "log") {
            std::fs::remove_file(log.path()).map_err(|error| error.to_string())?;
        }
    }
    free()?;
    let place = |last: u8| Place::at(Ipv4Addr::new(127, 0, 0, last)).tied().logging_to(folder);
    say("starting etcd");
    let etcd = EtcdCluster::start_at(&[place(21), place(22), place(23)]);
    say("starting PostgreSQL under Patroni");
    let places = [place(31), place(32), place(33)];
    let mut patroni = Patroni::start_at(&places, &etcd.hosts(), Pace::Shipped);
    let database = patroni.make_database("fieldline");
    say("starting Redis, the broker and object storage");
    let redis = Redis::start_at(&place(41), &[]);
    // As the guide says: twice as many live items, and none dropped at full load.
    let lines = "persistence false\nmax_inflight_messages 0\nmax_queued_messages 100000\nset_tcp_nodelay true";
    let broker = Mosquitto::start_at(&place(51), lines);

    let s3 = S3::start_at(&place(61));
    let (key, secret) = s3.key();

    say("starting three nodes");
    let token = token()?;
    let shared = format!(
        "etcd = [\"{}\"]\n[postgres]\nurl = \"{database}\"\n[redis]\nurl = \"{}\"\n[mqtt_bus]\nurl = \"{}\"\n\
         [blobs]\nurl = \"s3://{}/cluster\"\nendpoint = \"{}\"\naccess_key_id = \"{key}\"\nsecret_access_key = \"{secret}\"\n",
        etcd.urls().join("\", \""),
        redis.url(),
        broker.url(),
        s3.bucket(),
        s3.endpoint(),
    );
    let start =
        |(zone, last): (&&str, u8)| node(program, folder, zone, &place(last), &shared, &token);
    let mut nodes = ZONES.iter().zip(11..).map(start).collect::<Result<Vec<Process>, String>>()?;
    nodes.iter_mut().for_each(ready);
    say("starting the balancer and the fleet");
    let balancer = balancer(deploy, folder, &Place::at(BALANCER).tied().logging_to(folder))?;
    for (protocol, port) in CHANNELS {
        channel(program, &token, protocol, port)?;
    }
    let mut fleet =
        CHANNELS.map(|(protocol, port)| vehicles(program, folder, &place(10), protocol, port));
    for vehicles in &mut fleet {
        let log = vehicles.log();
        vehicles.until(|| acknowledged(&log));
    }
    let mut running =
        Running { fleet: fleet.into(), balancer, nodes, redis, broker, s3, patroni, etcd };

    say("\nA cluster runs on this machine.\n");
    say(&running.table());
    if let Some(link) = sign_in(folder) {
        say(&format!("  Sign in     {link}"));
    }
    say(&format!("  API token   {token}\n  Logs        {}", folder.display()));
    say(HELP);
    while let Ok(Wish::Do(line)) = commands.recv() {
        running.obey(line.trim());
    }
    running.end();
    Ok(())
}

const HELP: &str = "
  Open the page Cluster, and the map beside it. Then type, or send the signals yourself:

    kill node-1       its vehicles go to the others at once; it is gone from the page within 5 s
    start node-1      it takes its share again
    pause node-2      it stands still, and others take over what it did; if it owned something it ends within 3 s, and
                      `start node-2` does what its unit would; if not, `resume node-2`
    kill etcd-1       nothing is noticed; with a second one nothing is placed anew, and devices stay connected
    kill db-N         the one that leads: nothing is acknowledged for some 25 s, and nothing is lost; `show` says who leads
    kill redis        last values are away; after `start redis` they are read again from history
    kill mosquitto    live items stay at their own node until `start mosquitto`

  show  prints the table anew; Ctrl-C or the end of input stops all.
";

/// The thing that a name means.
enum Thing<'a> {
    Process(&'a mut Process),
    Database(&'a mut Database),
}

impl Running {
    fn find(&mut self, name: &str) -> Option<Thing<'_>> {
        let number =
            |prefix: &str| name.strip_prefix(prefix)?.parse::<usize>().ok()?.checked_sub(1);
        if let Some(at) = number("etcd-") {
            return (at < self.etcd.len()).then(|| Thing::Process(self.etcd.process(at)));
        }
        if let Some(at) = number("db-") {
            let there = at < self.patroni.members().len();
            return there.then(|| Thing::Database(self.patroni.member(at)));
        }
        if let Some(at) = number("node-") {
            return self.nodes.get_mut(at).map(Thing::Process);
        }
        match name {
            "redis" => Some(Thing::Process(&mut self.redis.process)),
            "s3" => Some(Thing::Process(&mut self.s3.process)),
            "mosquitto" => Some(Thing::Process(&mut self.broker.process)),
            "balancer" => Some(Thing::Process(&mut self.balancer)),
            _ => None,
        }
    }

    fn obey(&mut self, line: &str) {
        let (verb, name) = line.split_once(' ').unwrap_or((line, ""));
        match (verb, name.trim()) {
            ("", _) => {}
            ("show" | "status", _) => say(&self.table()),
            ("kill" | "start" | "pause" | "resume", name) => match self.find(name) {
                Some(thing) => say(&format!("{name}: {}", act(verb, thing))),
                None => say(&format!("there is no `{name}`: see the first column of `show`")),
            },
            _ => say(HELP),
        }
    }

    /// What runs where.
    fn table(&mut self) -> String {
        let leader = (self.etcd.leader(), self.patroni.leader(), self.patroni.standby());
        let mut rows: Vec<[String; 4]> =
            vec![["", "zone", "where", "processes"].map(str::to_owned)];
        let web = format!("http://{}/", self.balancer.socket());
        rows.push(["balancer".to_owned(), String::new(), web, id(&mut self.balancer)]);
        for (node, zone) in self.nodes.iter_mut().zip(ZONES) {
            let web = format!("http://{}/", node.socket());
            rows.push([node.name().to_owned(), zone.to_owned(), web, id(node)]);
        }
        for (at, zone) in ZONES.iter().enumerate() {
            let leads = if leader.0 == Some(at) { "   leads" } else { "" };
            let process = self.etcd.process(at);
            let place = format!("{}{leads}", process.socket());
            rows.push([process.name().to_owned(), (*zone).to_owned(), place, id(process)]);
        }
        for (at, zone) in ZONES.iter().enumerate() {
            let says = match () {
                () if leader.1 == Some(at) => "   leads",
                () if leader.2 == Some(at) => "   commits wait for it",
                () => "",
            };
            let database = self.patroni.member(at);
            let place = format!("{}:{}{says}", database.process.place().address(), database.port());
            let mut ids = format!("{} (Patroni)", id(&mut database.process));
            if let Some(id) = database.postmaster() {
                write!(ids, " {id} (PostgreSQL)").unwrap_or_default();
            }
            rows.push([database.process.name().to_owned(), (*zone).to_owned(), place, ids]);
        }
        for process in [&mut self.redis.process, &mut self.broker.process, &mut self.s3.process] {
            let place = process.socket().to_string();
            rows.push([process.name().to_owned(), String::new(), place, id(process)]);
        }
        for ((protocol, port), process) in CHANNELS.iter().zip(&mut self.fleet) {
            let place = format!("{DEVICES} vehicles to {}:{port}", self.balancer.place().address());
            rows.push([format!("fleet {protocol}"), String::new(), place, id(process)]);
        }
        let mut text = String::new();
        for [name, zone, place, ids] in rows {
            writeln!(text, "  {name:<18} {zone:<5} {place:<46} {ids}").unwrap_or_default();
        }
        text
    }

    /// Ends all in order: who uses a server ends before it.
    fn end(mut self) {
        say("stopping: fleet, nodes, servers");
        self.fleet.iter_mut().for_each(Process::kill);
        // Those that were paused could not hear it.
        for process in &self.nodes {
            process.resume();
            process.signal(Signal::TERM);
        }
        for process in &mut self.nodes {
            if !process.end(NODE_END_MAX) {
                say(&format!("{} did not end in time and was killed", process.name()));
            }
        }
        for at in 0..self.patroni.members().len() {
            let member = self.patroni.member(at);
            member.resume();
            member.process.signal(Signal::TERM);
        }
        for at in 0..self.patroni.members().len() {
            self.patroni.member(at).end(DATABASE_END_MAX);
        }
        drop(self);
        say("all has ended");
    }
}

fn act(verb: &str, thing: Thing<'_>) -> &'static str {
    match (verb, thing) {
        ("kill", Thing::Process(process)) => process.kill(),
        ("kill", Thing::Database(database)) => database.kill(),
        ("pause", Thing::Process(process)) => process.pause(),
        ("pause", Thing::Database(database)) => database.pause(),
        ("resume", Thing::Process(process)) => process.resume(),
        ("resume", Thing::Database(database)) => database.resume(),
        (_, Thing::Process(process) | Thing::Database(Database { process, .. })) => {
            if process.runs() {
                return "it runs already";
            }
            // It comes up beside: what it says goes to its log.
            process.spawn_again();
        }
    }
    match verb {
        "kill" => "killed",
        "pause" => "stands still",
        "resume" => "goes on",
        _ => "starts",
    }
}

fn id(process: &mut Process) -> String {
    let id = process.id().filter(|_| process.runs());
    id.map_or_else(|| "gone".to_owned(), |id| id.to_string())
}

/// Says who is in the way before anything is started.
fn free() -> Result<(), String> {
    let ours = |last: u8, ports: &[u16]| {
        let address = Ipv4Addr::new(127, 0, 0, last);
        ports.iter().map(move |port| SocketAddr::from((address, *port))).collect::<Vec<_>>()
    };
    let devices = CHANNELS.map(|(_, port)| port);
    let ports = [[HTTP_PORT, MQTT_PORT, NODE_PORT].as_slice(), &devices].concat();
    for socket in (10..=13).flat_map(|last| ours(last, &ports)) {
        if let Err(error) = TcpListener::bind(socket) {
            return Err(format!(
                "{socket} cannot be listened on ({error}): stop what does, such as another cluster or Fieldline"
            ));
        }
    }
    Ok(())
}

/// A token of its own for each cluster.
fn token() -> Result<String, String> {
    use std::io::Read as _;
    let mut bytes = [0_u8; 20];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|error| format!("/dev/urandom: {error}"))?;
    let mut token = "flt_".to_owned();
    for byte in bytes {
        write!(token, "{byte:02x}").unwrap_or_default();
    }
    Ok(token)
}

fn write_file(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

fn node(
    program: &Path,
    folder: &Path,
    zone: &str,
    place: &Place,
    shared: &str,
    token: &str,
) -> Result<Process, String> {
    let address = place.address();
    let number = address.octets()[3] - 10;
    let name = format!("node-{number}");
    let config = folder.join(format!("{name}.toml"));
    let certificates = certificates(program, folder, &name)?.display().to_string();
    let text = format!(
        "[node]\nname = \"{name}\"\nzone = \"{zone}\"\nlisten = \"{address}:{NODE_PORT}\"\n\
         ca = \"{certificates}/ca.pem\"\ncertificate = \"{certificates}/{name}.pem\"\n\
         key = \"{certificates}/{name}.key\"\n{shared}\
         [gateway]\nlisten_address = \"{address}\"\n[http]\nlisten = \"{address}:{HTTP_PORT}\"\n\
         [mqtt]\nlisten = \"{address}:{MQTT_PORT}\"\n[balancers]\naddresses = [\"{BALANCER}\"]\n"
    );
    write_file(&config, &text)?;
    let arguments = ["serve".into(), "--config".into(), config.into_os_string()];
    let launch = Launch::new(program, arguments, folder, HTTP_PORT).named(name).at(place);
    Ok(Process::spawn(launch.with("FIELDLINE_ADMIN_TOKEN", token)))
}

/// The certificate of a node, by an authority that is made where there is none; gives their folder.
fn certificates(program: &Path, folder: &Path, name: &str) -> Result<PathBuf, String> {
    let folder = folder.join("certificates");
    let make = |arguments: &[&str]| {
        let mut command = Command::new(program);
        let made =
            command.arg("certificates").args(arguments).arg("--folder").arg(&folder).output();
        let made = made.map_err(|error| format!("{}: {error}", program.display()))?;
        let said = String::from_utf8_lossy(&made.stderr).into_owned();
        if made.status.success() { Ok(()) } else { Err(said) }
    };
    if !folder.join("ca.key").exists() {
        make(&["new-ca"])?;
    }
    make(&["issue", "--name", name])?;
    Ok(folder)
}

fn ready(node: &mut Process) {
    let place = node.place().clone();
    node.until(|| matches!(place.ask(HTTP_PORT, "/readyz", None), Some((200, _))));
}

/// nginx, as `deploy` has it.
fn balancer(deploy: &Path, folder: &Path, place: &Place) -> Result<Process, String> {
    let nodes: Vec<String> = (11..14).map(|last| format!("127.0.0.{last}")).collect();
    let list = |make: &dyn Fn(&str) -> String| {
        nodes.iter().map(|node| make(node)).collect::<Vec<_>>().join(" ")
    };
    let ports = CHANNELS.map(|(_, port)| port.to_string()).join(" ");
    let own = folder.display().to_string();
    let filled = Command::new("sh")
        .arg(deploy.join("fill.sh"))
        .arg(deploy.join("nginx/nginx.conf.template"))
        .env("HTTP_NODES", list(&|node| format!("{node}:{HTTP_PORT}")))
        .env("MQTT_NODES", list(&|node| format!("{node}:{MQTT_PORT}={node}:{HTTP_PORT}")))
        .env("NODES", list(&|node| format!("{node}={node}:{HTTP_PORT}")))
        .env("LISTEN", place.address().to_string())
        .env("BIND", place.address().to_string())
        .env("HTTP_PORT", HTTP_PORT.to_string())
        .env("TCP_PORTS", &ports)
        .env("UDP_PORTS", "")
        .env("RUN", format!("{own}/nginx.pid"))
        .env("LOG", &own)
        .env("CACHE", &own)
        // Its workers read nothing but what is here; without root they are who it is.
        .env("RUN_AS", "root")
        .output()
        .map_err(|error| format!("cannot run {}: {error}", deploy.join("fill.sh").display()))?;
    if !filled.status.success() {
        let said = String::from_utf8_lossy(&filled.stderr).into_owned();
        return Err(format!("deploy/fill.sh failed: {}", said.trim()));
    }
    let config = folder.join("nginx.conf");
    write_file(&config, &String::from_utf8_lossy(&filled.stdout))?;
    // One process, so that nothing of it is left when it is killed.
    let how = "daemon off; master_process off;";
    let arguments = ["-c".into(), config.into_os_string(), "-g".into(), how.into()];
    let launch = Launch::new(Path::new("/usr/sbin/nginx"), arguments, folder, HTTP_PORT);
    Ok(Process::launch(launch.named("balancer").at(place)))
}

fn channel(program: &Path, token: &str, protocol: &str, port: u16) -> Result<(), String> {
    let made = Command::new(program)
        .args(["ctl", "--url", &format!("http://127.0.0.11:{HTTP_PORT}"), "create", "channels"])
        .args([&format!("name={protocol}"), &format!("protocol={protocol}"), "transport=tcp"])
        .args([&format!("listen=0.0.0.0:{port}"), "auto_register=true"])
        .env("FIELDLINE_TOKEN", token)
        .output()
        .map_err(|error| format!("cannot run {}: {error}", program.display()))?;
    if made.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&made.stderr).into_owned();
    Err(format!("the channel {protocol} could not be made: {}", said.trim()))
}

fn vehicles(program: &Path, folder: &Path, place: &Place, protocol: &str, port: u16) -> Process {
    let target = format!("{}:{port}", place.address());
    let (devices, seed) = (DEVICES.to_string(), port.to_string());
    let arguments = ["simulate", "trackers", "--protocol", protocol, "--target", &target];
    let numbers = ["--rate", "1", "--devices", &devices, "--seed", &seed];
    let launch = Launch::new(program, [arguments, numbers].concat(), folder, port);
    Process::spawn(launch.named(format!("fleet-{protocol}")).at(place))
}

/// Whether the newest line of a fleet's log tells of messages that were acknowledged.
fn acknowledged(log: &Path) -> bool {
    let told = std::fs::read_to_string(log).unwrap_or_default();
    let line = told.lines().last().unwrap_or_default();
    let count = line.split_once(" acked ").and_then(|(_, rest)| rest.split(' ').next());
    count.is_some_and(|count| count != "0")
}

/// The link that the first node printed when it made the first administrator.
fn sign_in(folder: &Path) -> Option<String> {
    let printed = std::fs::read_to_string(folder.join("node-1.log")).ok()?;
    let at = printed.find("/#/sign-in?link=")?;
    let (before, after) = printed.split_at(at);
    let host = before.rsplit(char::is_whitespace).next()?;
    let link = after.split(char::is_whitespace).next()?;
    Some(format!("{host}{link}"))
}

/// Prints a line for the person at the terminal.
fn say(text: &str) {
    // Nothing can be done about a closed terminal.
    writeln!(std::io::stderr(), "{text}").unwrap_or_default();
}
