//! `cargo xtask cluster`: servers, three nodes and a fleet on this machine, to look at and to break.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{Failure, console, packages, root, run, say, target};

const NODES: u8 = 3;
/// The API of the first node; the others follow.
const HTTP_PORT: u16 = 8080;
const MQTT_PORT: u16 = 1883;
/// Channels of the fleet: protocol and port.
const CHANNELS: [(&str, u16); 2] = [("teltonika", 5027), ("wialon_ips", 5039)];
/// Vehicles of each protocol at each node.
const DEVICES: u16 = 10;
/// Longest that a node may take to be ready.
const READY_MAX: Duration = Duration::from_secs(60);

/// What runs; it is stopped when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have been killed by who tries the cluster.
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// The servers; they end, and tidy up, when their input does.
struct Servers(Child);

impl Drop for Servers {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _reaped = self.0.wait();
    }
}

/// Starts everything, says where, and runs until the end of input or Ctrl-C.
pub(crate) fn start() -> Result<(), Failure> {
    packages::ensure(packages::SERVERS)?;
    console::build()?;
    run("cargo", ["build", "--release", "--locked", "--package", "fieldline"])?;
    if TcpStream::connect((Ipv4Addr::LOCALHOST, HTTP_PORT)).is_ok() {
        return Err(format!("somebody listens on port {HTTP_PORT}: stop the Fieldline that runs"));
    }
    let folder = target().join("cluster");
    std::fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let (_servers, places) = servers()?;
    let token = token()?;
    let program = target().join("release/fieldline");
    let mut nodes = Vec::new();
    for number in 1..=NODES {
        nodes.push(node(&program, &folder, number, &places, &token)?);
    }
    for number in 1..=NODES {
        ready(number)?;
    }
    let url = format!("http://127.0.0.1:{HTTP_PORT}");
    for (protocol, port) in CHANNELS {
        let name = format!("name={protocol}");
        let (protocol, listen) = (format!("protocol={protocol}"), format!("listen=0.0.0.0:{port}"));
        let status = Command::new(&program)
            .args(["ctl", "--url", &url, "create", "channels", &name, &protocol, "transport=tcp"])
            .args([&listen, "auto_register=true"])
            .env("FIELDLINE_TOKEN", &token)
            .stdout(Stdio::null())
            .status();
        if !status.is_ok_and(|status| status.success()) {
            return Err(format!("the channel {name} could not be made"));
        }
    }
    let mut fleet = Vec::new();
    for number in 1..=NODES {
        for (protocol, port) in CHANNELS {
            fleet.push(vehicles(&program, &folder, number, protocol, port)?);
        }
    }
    say(
        "\nA cluster runs on this machine. Its first node has printed a link to sign in with; see the page Cluster.\n",
    );
    for (number, node) in (1..).zip(&nodes) {
        let http = HTTP_PORT + u16::from(number) - 1;
        let (pid, address) = (node.0.id(), device_address(number));
        say(&format!(
            "  node-{number}   http://127.0.0.1:{http}/   devices at {address}   process {pid}"
        ));
    }
    say(&format!("\n  API token   {token}\n  Logs        {}\n", folder.display()));
    say(
        "Try: kill -9 a node and start nothing; kill -STOP one for ten seconds; look at the map all the while. Ctrl-C ends all.",
    );
    let mut input = [0];
    // The end of input, or a key.
    let _ended = std::io::stdin().read(&mut input);
    Ok(())
}

/// Starts the servers; they stop when their input is closed, whatever becomes of us.
fn servers() -> Result<(Servers, Places), Failure> {
    let mut child = Command::new("cargo")
        .args(["run", "--quiet", "--locked", "--package", "fieldline-testkit"])
        .args(["--features", "servers", "--example", "servers"])
        .current_dir(root())
        // Ctrl-C is not for them: they end, and tidy up, when their input does.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start the servers: {error}"))?;
    let output = child.stdout.take().ok_or("the servers have no output")?;
    let running = Servers(child);
    let mut line = String::new();
    let read = BufReader::new(output).read_line(&mut line);
    read.map_err(|error| format!("reading what the servers print: {error}"))?;
    let places = Places::read(&line).ok_or("the servers could not be started")?;
    Ok((running, places))
}

/// Where the servers are.
struct Places {
    etcd: String,
    postgres: String,
    redis: String,
    bus: String,
}

impl Places {
    /// Takes them out of a line of JSON whose texts have no characters that it escapes.
    fn read(line: &str) -> Option<Self> {
        let text = |name: &str| {
            let (_, rest) = line.split_once(&format!("\"{name}\":\""))?;
            Some(rest.split_once('"')?.0.to_owned())
        };
        Some(Self {
            etcd: text("etcd")?,
            postgres: text("postgres")?,
            redis: text("redis")?,
            bus: text("bus")?,
        })
    }
}

/// A token of its own for each cluster.
fn token() -> Result<String, Failure> {
    let mut bytes = [0_u8; 20];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|error| format!("/dev/urandom: {error}"))?;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("flt_{hex}"))
}

/// Where the channels of a node listen: nodes share the machine, and not its addresses.
fn device_address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 0, number + 1)
}

fn log(path: PathBuf) -> Result<Stdio, Failure> {
    File::create(&path).map(Stdio::from).map_err(|error| format!("{}: {error}", path.display()))
}

fn node(
    program: &Path,
    folder: &Path,
    number: u8,
    places: &Places,
    token: &str,
) -> Result<Running, Failure> {
    let config = folder.join(format!("node-{number}.toml"));
    let (http, mqtt) = (HTTP_PORT + u16::from(number) - 1, MQTT_PORT + u16::from(number) - 1);
    let text = format!(
        "[node]\nname = \"node-{number}\"\nzone = \"{}\"\naddress = \"http://127.0.0.1:{http}\"\netcd = [\"{}\"]\n\n[postgres]\nurl = \"{}\"\n\n[redis]\nurl = \"{}\"\n\n[mqtt_bus]\nurl = \"{}\"\n\n[gateway]\nlisten_address = \"{}\"\n\n[http]\nlisten = \"127.0.0.1:{http}\"\n\n[mqtt]\nlisten = \"127.0.0.1:{mqtt}\"\n",
        char::from(b'a' + number - 1),
        places.etcd,
        places.postgres,
        places.redis,
        places.bus,
        device_address(number),
    );
    std::fs::write(&config, text).map_err(|error| format!("{}: {error}", config.display()))?;
    let mut command = Command::new(program);
    command.args(["serve", "--config"]).arg(&config).env("FIELDLINE_ADMIN_TOKEN", token);
    command.stdin(Stdio::null()).stderr(log(folder.join(format!("node-{number}.log")))?);
    if number > 1 {
        command.stdout(Stdio::null());
    }
    let child = command.spawn();
    child.map(Running).map_err(|error| format!("cannot start node {number}: {error}"))
}

/// Waits until a node says that it is ready.
fn ready(number: u8) -> Result<(), Failure> {
    let (port, began) = (HTTP_PORT + u16::from(number) - 1, Instant::now());
    let ask = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream
            .write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.starts_with("HTTP/1.1 200"))
    };
    while !ask().unwrap_or(false) {
        if began.elapsed() > READY_MAX {
            return Err(format!("node {number} is not ready after a minute; see its log"));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn vehicles(
    program: &Path,
    folder: &Path,
    number: u8,
    protocol: &str,
    port: u16,
) -> Result<Running, Failure> {
    // A seed of its own for each: vehicles of one seed are the same vehicles, which two would fight over.
    let target = format!("{}:{port}", device_address(number));
    let output = log(folder.join(format!("fleet-{number}-{protocol}.log")))?;
    let child = Command::new(program)
        .args(["simulate", "trackers", "--protocol", protocol, "--rate", "1", "--target", &target])
        .args([
            "--devices",
            &DEVICES.to_string(),
            "--seed",
            &(port + u16::from(number)).to_string(),
        ])
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(Stdio::null())
        .spawn();
    child.map(Running).map_err(|error| format!("cannot start the fleet: {error}"))
}
