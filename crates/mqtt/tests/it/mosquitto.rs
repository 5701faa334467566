//! Real clients: the Mosquitto command line tools, as users have them.

use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use fieldline_contracts::Outcome;
use fieldline_model::{ConnectionId, EventKind, Series, Value};
use fieldline_mqtt::{Acceptor, MqttConfig};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout};

use crate::harness::{NEVER, SOON, Server, Tenant};

fn tool(name: &str, server: &Server, token: &str, version: &str) -> Command {
    let mut probe = Command::new(name);
    probe.arg("--help").stdout(Stdio::null()).stderr(Stdio::null());
    assert!(
        probe.status().is_ok(),
        "`{name}` is not installed: `cargo xtask test` installs what the tests need \
         (Debian package mosquitto-clients)"
    );
    let mut command = Command::new(name);
    let port = server.address.port().to_string();
    command.args(["-h", "127.0.0.1", "-p", &port, "-V", version, "-u", "any", "-P", token]);
    command
}

/// Runs a tool to its end, without holding up this thread.
async fn run(mut command: Command) -> Output {
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// A running `mosquitto_sub`.
struct Subscriber {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Subscriber {
    /// Starts it and waits until it is subscribed.
    async fn start(mut command: Command) -> Self {
        // `-d` tells when it is subscribed, and `stdbuf` when it does, not when a block is full.
        command.args(["-d", "-v"]);
        let mut lined = tokio::process::Command::new("stdbuf");
        lined.arg("-oL").arg(command.get_program()).args(command.get_args());
        let command = lined.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.kill_on_drop(true).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let subscribed = async {
            while let Some(line) = lines.next_line().await.unwrap() {
                if line.contains("received SUBACK") {
                    return true;
                }
            }
            false
        };
        assert!(tokio::time::timeout(SOON, subscribed).await.unwrap(), "not subscribed");
        Self { child, lines }
    }

    /// The next message, `topic payload`.
    async fn next(&mut self) -> Option<String> {
        loop {
            let line = self.lines.next_line().await.unwrap()?;
            let chatter = ["Client ", "Subscribed ", ""];
            if !chatter.iter().any(|c| line.starts_with(c) && (!c.is_empty() || line.is_empty())) {
                return Some(line);
            }
        }
    }

    async fn expect(&mut self) -> String {
        tokio::time::timeout(SOON, self.next()).await.expect("no message came").unwrap()
    }

    async fn silent(&mut self) {
        if let Ok(line) = tokio::time::timeout(NEVER, self.next()).await {
            panic!("expected nothing, got {line:?}");
        }
    }
}

async fn everything(server: &Server, tenant: &Tenant) {
    let (account, device) = (tenant.account, tenant.device.id);
    server.say(account, device, &[("position.speed", Value::Int(42))]).await;
    server.happen(account, EventKind::Online, device).await;
    server.log(Series::device_log(account, device)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mosquitto_sub_prints_the_live_messages_of_its_account_and_nothing_else() {
    let server = Server::start().await;
    let (own, foreign) = (server.tenant("own").await, server.tenant("foreign").await);
    for version in ["mqttv311", "mqttv5"] {
        let all = ["-q", "1", "-t", "#"];
        let mut command = tool("mosquitto_sub", &server, &foreign.token, version);
        command.args(all);
        let mut spy = Subscriber::start(command).await;
        let mut command = tool("mosquitto_sub", &server, &own.token, version);
        command.args(["-q", "1", "-t", "message/#", "-t", "event/#", "-t", "log/#"]);
        let mut member = Subscriber::start(command).await;
        everything(&server, &own).await;
        let device = own.device.id;
        let mut lines = vec![];
        for _ in 0..3 {
            lines.push(member.expect().await);
        }
        lines.sort();
        assert!(lines[0].starts_with(&format!("event/online/{device} {{")), "{lines:?}");
        assert!(lines[1].starts_with(&format!("log/device/{device} {{")), "{lines:?}");
        assert!(lines[2].starts_with(&format!("message/{device} {{")), "{lines:?}");
        assert!(lines[2].contains(r#""position.speed":42"#), "{lines:?}");
        spy.silent().await;
        // Last values are retained: they come to one who subscribes later.
        let mut command = tool("mosquitto_sub", &server, &own.token, version);
        command.args(["-t", "state/#", "-C", "1", "-v", "-W", "10"]);
        let output = run(command).await;
        let text = String::from_utf8(output.stdout).unwrap();
        let expected = format!("state/{device}/position.speed {{\"value\":42,");
        assert!(text.starts_with(&expected), "{text}");
        let mut command = tool("mosquitto_sub", &server, &foreign.token, version);
        command.args(["-t", "#", "-W", "1", "-v"]);
        assert_eq!(run(command).await.stdout, b"");
        drop((spy.child, member.child));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_token_is_refused() {
    let server = Server::start().await;
    for (version, says) in
        [("mqttv311", "bad user name or password"), ("mqttv5", "bad user name or password")]
    {
        let wrong = "flt_0000000000000000000000000000000000000000";
        let mut command = tool("mosquitto_sub", &server, wrong, version);
        command.args(["-t", "message/#", "-W", "5"]);
        let output = run(command).await;
        let text = String::from_utf8_lossy(&output.stderr).to_lowercase();
        assert!(!output.status.success() && text.contains(says), "{version}: {text}");
        assert_eq!(output.stdout, b"");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mosquitto_pub_publishes_into_the_pipeline() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let topic = format!("ingest/{}", tenant.device.ident);
    for (version, qos) in [("mqttv311", "0"), ("mqttv311", "1"), ("mqttv5", "0"), ("mqttv5", "1")] {
        let mut command = tool("mosquitto_sub", &server, &tenant.token, version);
        command.args(["-t", "message/+"]);
        let mut watch = Subscriber::start(command).await;
        let mut command = tool("mosquitto_pub", &server, &tenant.token, version);
        let payload = format!(r#"{{"battery.voltage":12.{qos}5,"from":"{version}"}}"#);
        command.args(["-t", &topic, "-q", qos, "-m", &payload]);
        let output = run(command).await;
        assert!(output.status.success(), "{output:?}");
        let line = watch.expect().await;
        assert!(line.contains(&format!(r#""battery.voltage":12.{qos}5"#)), "{line}");
    }
    // A refusal can be seen: the tool fails.
    let mut command = tool("mosquitto_pub", &server, &tenant.token, "mqttv5");
    command.args(["-t", "ingest/nobody", "-q", "1", "-m", r#"{"x":1}"#]);
    let output = run(command).await;
    let text = String::from_utf8_lossy(&output.stderr).to_lowercase();
    assert!(text.contains("topic name invalid"), "{output:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mosquitto_rr_asks_a_device() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let commands = server.services.platform.commands.clone();
    let connection = ConnectionId::from_bytes([3; 16]);
    let (account, device) = (tenant.account, tenant.device.id);
    let mut held = commands.attach(account, device, connection).await;
    let answering = tokio::spawn(async move {
        while let Some(dispatch) = held.dispatches.recv().await {
            let id = dispatch.command.id;
            commands.report(account, connection, id, Outcome::Sent).await;
            commands.report(account, connection, id, Outcome::Answered("v1.2".into())).await;
        }
    });
    let mut command = tool("mosquitto_rr", &server, &tenant.token, "mqttv5");
    let topic = format!("command/{device}/text");
    command.args(["-t", &topic, "-e", "client/answers/rr", "-m", "getver", "-q", "1", "-W", "10"]);
    let output = run(command).await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(r#""answer":"v1.2""#), "{text} {:?}", output.stderr);
    answering.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wills_and_retained_messages_work_between_clients() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    for version in ["mqttv311", "mqttv5"] {
        let topic = format!("client/{version}");
        let mut command = tool("mosquitto_pub", &server, &tenant.token, version);
        command.args(["-t", &topic, "-r", "-q", "1", "-m", "kept"]);
        assert!(run(command).await.status.success());
        let mut command = tool("mosquitto_sub", &server, &tenant.token, version);
        command.args(["-t", &topic, "-q", "1"]);
        let mut watch = Subscriber::start(command).await;
        assert_eq!(watch.expect().await, format!("{topic} kept"));
        let mut command = tool("mosquitto_sub", &server, &tenant.token, version);
        command.args(["-t", "client/none", "--will-topic", &topic, "--will-payload", "killed"]);
        let mut victim = Subscriber::start(command).await;
        victim.child.kill().await.unwrap();
        assert_eq!(watch.expect().await, format!("{topic} killed"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_carries_the_same() {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let authority = directory.path().join("ca.pem");
    std::fs::write(&authority, made.cert.pem()).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let tls = Arc::new(tls);
    let acceptor: Acceptor = Arc::new(move || Arc::clone(&tls).into());
    let server = Server::with(MqttConfig::default(), Some(acceptor)).await;
    let tenant = server.tenant("a").await;
    let port = server.address.port().to_string();
    let mut command = Command::new("mosquitto_sub");
    command.args(["-h", "localhost", "-p", &port, "-u", "any", "-P", &tenant.token]);
    command.arg("--cafile").arg(&authority).args(["-t", "message/#"]);
    let mut watch = Subscriber::start(command).await;
    let long = "x".repeat(100_000);
    server.say(tenant.account, tenant.device.id, &[("text", Value::from(long.as_str()))]).await;
    assert!(watch.expect().await.contains(&long));
    // Without TLS nobody gets in, and nobody waits.
    let mut command = tool("mosquitto_sub", &server, &tenant.token, "mqttv5");
    command.args(["-t", "message/#", "-W", "5"]);
    assert!(!run(command).await.status.success());
}
