//! Scripts of whole connections, played against a running gateway.
//!
//! A script says what the device sends, what the server must have sent by then
//! byte for byte, and which messages must be stored. A member that is not
//! understood fails the script: nothing is passed over.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use fieldline_contracts::registry::RegistryExt;
use fieldline_contracts::{Actor, ChannelControl, Kind, NewCommand, Page, Platform, Query};
use fieldline_model::value::{from_hex, to_hex};
use fieldline_model::{
    Account, AccountId, Channel, ChannelId, CommandId, Device, ParamName, Params, Series, Transport,
};
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{sleep, timeout};

/// Time that the server has for what a step expects.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// Time in which nothing may come where nothing is expected.
const SILENCE: Duration = Duration::from_millis(200);

/// A file of scripts.
#[derive(Deserialize)]
struct File {
    sessions: Vec<Session>,
}

#[derive(Deserialize)]
struct Session {
    name: String,
    protocol: String,
    transport: String,
    steps: Vec<serde_json::Map<String, serde_json::Value>>,
}

/// The server that scripts are played against.
#[async_trait]
pub trait Server: Send + Sync {
    /// Opens a channel in an account of its own, which lets unknown devices in.
    async fn begin(&self, protocol: &str, transport: Transport) -> Result<SocketAddr, String>;
    /// Count of messages stored since `begin`, of one device or of all.
    async fn stored(&self, ident: Option<&str>) -> Result<usize, String>;
    /// Queues a text command for the device of this session.
    async fn command(&self, text: &str) -> Result<(), String>;
    /// The answer to that command, waited for.
    async fn command_result(&self) -> Result<String, String>;
    /// Closes the channel.
    async fn end(&self) -> Result<(), String>;
}

/// How scripts went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Scripts that passed.
    pub passed: usize,
    /// Scripts that failed.
    pub failed: usize,
    /// Each failure: the script's name and what was wrong.
    pub failures: Vec<String>,
}

/// Plays the scripts of `json`, of one protocol or of all. With `chunk_bytes` what the
/// device sends is cut into pieces of that size. No scripts at all count as one failure.
pub async fn run(
    json: &str,
    only: Option<&str>,
    server: &dyn Server,
    chunk_bytes: Option<usize>,
) -> Report {
    let mut report = Report::default();
    let fail = |report: &mut Report, name: &str, reason: String| {
        report.failed += 1;
        report.failures.push(format!("{name}: {reason}"));
    };
    let file: File = match serde_json::from_str(json) {
        Ok(file) => file,
        Err(error) => {
            fail(&mut report, "sessions", format!("not a file of sessions: {error}"));
            return report;
        }
    };
    let wanted = |session: &&Session| only.is_none_or(|only| session.protocol == only);
    for session in file.sessions.iter().filter(wanted) {
        let played = play(session, server, chunk_bytes).await;
        let ended = server.end().await;
        match played.and(ended) {
            Ok(()) => report.passed += 1,
            Err(reason) => fail(&mut report, &session.name, reason),
        }
    }
    if report.passed + report.failed == 0 {
        let of = only.map(|only| format!(" of protocol {only}")).unwrap_or_default();
        fail(&mut report, "sessions", format!("there are none{of}"));
    }
    report
}

/// The device's end of the connection.
enum Wire {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

impl Wire {
    async fn send(&mut self, bytes: &[u8], chunk_bytes: Option<usize>) -> std::io::Result<()> {
        match self {
            Self::Tcp(stream) => {
                let chunks = bytes.chunks(chunk_bytes.unwrap_or(usize::MAX).max(1));
                for (number, chunk) in chunks.enumerate() {
                    stream.write_all(chunk).await?;
                    // So that the pieces come apart: some surely, the others mostly.
                    if chunk_bytes.is_some() && number % 16 == 0 {
                        sleep(Duration::from_millis(1)).await;
                    } else {
                        tokio::task::yield_now().await;
                    }
                }
                Ok(())
            }
            Self::Udp(socket) => socket.send(bytes).await.map(|_| ()),
        }
    }

    /// Bytes that come next; none at the end of the stream.
    async fn receive(&mut self) -> std::io::Result<Vec<u8>> {
        let mut buffer = vec![0; 64 << 10];
        let count = match self {
            Self::Tcp(stream) => stream.read(&mut buffer).await,
            Self::Udp(socket) => socket.recv(&mut buffer).await,
        };
        match count {
            Ok(count) => {
                buffer.truncate(count);
                Ok(buffer)
            }
            // A server that closes with our bytes unread resets the connection.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

struct Player<'a> {
    server: &'a dyn Server,
    wire: Wire,
    /// Received and not yet expected.
    received: Vec<u8>,
    closed: bool,
    stored_before: std::collections::HashMap<Option<String>, usize>,
}

async fn play(
    session: &Session,
    server: &dyn Server,
    chunk_bytes: Option<usize>,
) -> Result<(), String> {
    let transport = match session.transport.as_str() {
        "tcp" => Transport::Tcp,
        "udp" => Transport::Udp,
        other => return Err(format!("transport `{other}` is not known")),
    };
    let address = server.begin(&session.protocol, transport).await?;
    let wire = connect(transport, address).await.map_err(|error| error.to_string())?;
    let mut player = Player {
        server,
        wire,
        received: Vec::new(),
        closed: false,
        stored_before: std::collections::HashMap::new(),
    };
    for (number, step) in session.steps.iter().enumerate() {
        let played = player.step(step, chunk_bytes).await;
        played.map_err(|reason| format!("step {}: {reason}", number + 1))?;
    }
    player.silence().await.map_err(|reason| format!("after the last step: {reason}"))
}

async fn connect(transport: Transport, address: SocketAddr) -> std::io::Result<Wire> {
    if transport == Transport::Udp {
        let socket = UdpSocket::bind("127.0.0.1:0").await?;
        socket.connect(address).await?;
        return Ok(Wire::Udp(socket));
    }
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(Wire::Tcp(stream))
}

fn text<'a>(value: &'a serde_json::Value, name: &str) -> Result<&'a str, String> {
    value.as_str().ok_or_else(|| format!("`{name}` is no text"))
}

fn hex(value: &serde_json::Value, name: &str) -> Result<Vec<u8>, String> {
    from_hex(text(value, name)?).ok_or_else(|| format!("`{name}` is not hex digits"))
}

impl Player<'_> {
    async fn step(
        &mut self,
        step: &serde_json::Map<String, serde_json::Value>,
        chunk_bytes: Option<usize>,
    ) -> Result<(), String> {
        let ident = step.get("ident").map(|ident| text(ident, "ident")).transpose()?;
        for (name, value) in step {
            match name.as_str() {
                "send" => {
                    let bytes = hex(value, name)?;
                    let sent = self.wire.send(&bytes, chunk_bytes).await;
                    sent.map_err(|error| format!("cannot send: {error}"))?;
                }
                "expect" => self.expect(&hex(value, name)?).await?,
                "expect_one_of" => self.expect_one_of(value).await?,
                "server_command" => self.server.command(text(value, name)?).await?,
                "command_result" => {
                    let (wanted, found) = (text(value, name)?, self.server.command_result().await?);
                    if wanted != found {
                        return Err(format!("the command's answer is `{found}`, not `{wanted}`"));
                    }
                }
                // Below: they follow what the step expects.
                "messages" | "ident" | "note" => {}
                other => return Err(format!("`{other}` is not known to this runner")),
            }
        }
        if let Some(wanted) = step.get("messages") {
            let wanted = wanted.as_u64().and_then(|count| usize::try_from(count).ok());
            let wanted = wanted.ok_or("`messages` is no count")?;
            let stored = self.server.stored(ident).await?;
            let before = self.stored_before.insert(ident.map(str::to_owned), stored).unwrap_or(0);
            if stored - before != wanted {
                let of = ident.unwrap_or("all devices");
                return Err(format!("{} messages of {of} stored, not {wanted}", stored - before));
            }
        }
        Ok(())
    }

    /// Reads until there are `count` bytes, the stream ends or the time is over.
    async fn fill(&mut self, count: usize, limit: Duration) -> Result<(), String> {
        let reading = async {
            while self.received.len() < count && !self.closed {
                let bytes = self.wire.receive().await.map_err(|error| error.to_string())?;
                self.closed |= bytes.is_empty();
                self.received.extend(bytes);
            }
            Ok(())
        };
        // Too late is seen by the caller: fewer bytes than asked for.
        timeout(limit, reading).await.unwrap_or(Ok(()))
    }

    async fn silence(&mut self) -> Result<(), String> {
        let before = self.received.len();
        self.fill(before + 1, SILENCE).await?;
        if self.received.is_empty() {
            return Ok(());
        }
        Err(format!("the server sent {} unasked", to_hex(&self.received)))
    }

    async fn expect(&mut self, wanted: &[u8]) -> Result<(), String> {
        if wanted.is_empty() {
            return self.silence().await;
        }
        self.fill(wanted.len(), ANSWER_WAIT).await?;
        let count = wanted.len().min(self.received.len());
        let found: Vec<u8> = self.received.drain(..count).collect();
        if found == wanted {
            return Ok(());
        }
        let end = if self.closed { ", then closed" } else { "" };
        Err(format!("the server sent {}{end}, not {}", to_hex(&found), to_hex(wanted)))
    }

    async fn expect_one_of(&mut self, options: &serde_json::Value) -> Result<(), String> {
        let options = options.as_array().ok_or("`expect_one_of` is no list")?;
        let mut silence = false;
        let mut close = false;
        let mut answers = Vec::new();
        for option in options {
            match text(option, "expect_one_of")? {
                "" => silence = true,
                "close" => close = true,
                _ => answers.push(hex(option, "expect_one_of")?),
            }
        }
        let longest = answers.iter().map(Vec::len).max().unwrap_or(0).max(1);
        // Where silence is an answer, it is taken for one after a while.
        let limit = if silence { SILENCE * 3 } else { ANSWER_WAIT };
        self.fill(longest, limit).await?;
        let found = std::mem::take(&mut self.received);
        let right =
            answers.contains(&found) || (found.is_empty() && (close && self.closed || silence));
        if right {
            return Ok(());
        }
        let end = if self.closed { ", then closed" } else { "" };
        Err(format!("the server sent `{}`{end}, none of {options:?}", to_hex(&found)))
    }
}

/// A server made of a platform and a gateway in this process.
pub struct LocalServer {
    platform: Platform,
    control: Arc<dyn ChannelControl>,
    present: Mutex<Option<Present>>,
}

#[derive(Clone, Copy)]
struct Present {
    account: AccountId,
    channel: ChannelId,
    command: Option<CommandId>,
}

impl LocalServer {
    /// Scripts are played against the gateway behind `control`, over `platform`.
    #[must_use]
    pub fn new(platform: Platform, control: Arc<dyn ChannelControl>) -> Self {
        Self { platform, control, present: Mutex::new(None) }
    }

    fn present(&self) -> Result<Present, String> {
        (*self.present.lock()).ok_or_else(|| "no session has begun".to_owned())
    }

    async fn devices(&self, account: AccountId) -> Result<Vec<Device>, String> {
        let page = Page::first(Page::LIMIT_MAX);
        let devices = self.platform.registry.list_objects::<Device>(account, &page).await;
        let devices = devices.map_err(|error| error.to_string())?;
        Ok(devices.into_iter().map(|device| device.object).collect())
    }
}

#[async_trait]
impl Server for LocalServer {
    async fn begin(&self, protocol: &str, transport: Transport) -> Result<SocketAddr, String> {
        let Platform { registry, clock, .. } = &self.platform;
        let (now, actor) = (clock.now(), Actor::system("sessions"));
        let id = AccountId::new(now, clock.random());
        let account = Account {
            id,
            name: format!("session {id}"),
            enabled: true,
            retention_days: 0,
            storage_bytes_max: 0,
            labels: Default::default(),
            created_at: now,
        };
        let created = registry.create_object(id, &account, &actor).await;
        created.map_err(|error| error.to_string())?;
        let channel: Channel = serde_json::from_value(serde_json::json!({
            "id": ChannelId::new(now, clock.random()),
            "account": id,
            "name": "session",
            "protocol": protocol,
            "transport": transport,
            "listen": "127.0.0.1:0",
            "enabled": true,
            "auto_register": true,
            "created_at": now,
        }))
        .map_err(|error| error.to_string())?;
        let created = registry.create_object(id, &channel, &actor).await;
        created.map_err(|error| error.to_string())?;
        let present = Present { account: id, channel: channel.id, command: None };
        *self.present.lock() = Some(present);
        for _ in 0..500 {
            let status = self.control.status(id, channel.id).await;
            if let Some(error) = status.error {
                return Err(error);
            }
            if let Some(address) = status.address {
                return address.parse().map_err(|_| format!("`{address}` is no address"));
            }
            sleep(Duration::from_millis(10)).await;
        }
        Err("the channel does not listen".to_owned())
    }

    async fn stored(&self, ident: Option<&str>) -> Result<usize, String> {
        let account = self.present()?.account;
        let mut count = 0;
        for device in self.devices(account).await? {
            if ident.is_none_or(|ident| device.ident == ident) {
                let query = Query::oldest(Series::messages(account, device.id), Query::LIMIT_MAX);
                let messages = self.platform.history.read(&query).await;
                count += messages.map_err(|error| error.to_string())?.len();
            }
        }
        Ok(count)
    }

    async fn command(&self, text: &str) -> Result<(), String> {
        let account = self.present()?.account;
        let devices = self.devices(account).await?;
        let device = devices.first().ok_or("no device has come yet")?;
        let mut params = Params::new();
        params.push(ParamName::new("text").map_err(|error| error.to_string())?, text.into());
        let new = NewCommand { name: "text".to_owned(), params, ttl_s: 60 };
        let actor = Actor::system("sessions");
        let queued = self.platform.commands.submit(account, device.id, new, &actor).await;
        let command = queued.map_err(|error| error.to_string())?.id;
        if let Some(present) = &mut *self.present.lock() {
            present.command = Some(command);
        }
        Ok(())
    }

    async fn command_result(&self) -> Result<String, String> {
        let present = self.present()?;
        let id = present.command.ok_or("no command was sent")?;
        let wait_ms = u64::try_from(ANSWER_WAIT.as_millis()).unwrap_or(u64::MAX);
        let command = self.platform.commands.wait(present.account, id, wait_ms).await;
        let command = command.map_err(|error| error.to_string())?;
        let status = command.status;
        command.answer.ok_or_else(|| format!("the command has no answer, it is {status:?}"))
    }

    async fn end(&self) -> Result<(), String> {
        let Some(present) = self.present.lock().take() else { return Ok(()) };
        let (registry, actor) = (&self.platform.registry, Actor::system("sessions"));
        let (account, channel) = (present.account, present.channel.0);
        let deleted = registry.delete(account, Kind::Channel, channel, None, &actor).await;
        deleted.map_err(|error| error.to_string())
    }
}
