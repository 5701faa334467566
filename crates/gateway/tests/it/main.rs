//! The gateway over real sockets, with backends in memory whose failures the tests decide.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "a test fails by panicking, and prints what it measured"
)]

mod balancers;
mod commands;
mod durability;
mod fleet;
mod hostile;
mod identity;
mod live;
mod lost;
mod nodes;
mod register;
mod sessions;
mod transport;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use fieldline_contracts::registry::RegistryExt;
use fieldline_contracts::{
    Actor, ChannelControl, Clock, MemoryBus, MemoryState, Platform, SystemClock,
};
use fieldline_gateway::{Drained, Gateway, GatewayConfig};
use fieldline_ingest::Ingest;
use fieldline_model::{
    AccountId, Channel, ChannelId, Device, DeviceId, SeriesKind, Stored, Transport, Value,
};
use fieldline_router::LocalCommands;
use fieldline_testkit::route::Vehicle;
use fieldline_testkit::teltonika::{self, Codec, Record};
use fieldline_testkit::{MemoryRegistry, ScriptedHistory};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Time in which what must come has to come.
const SOON: Duration = Duration::from_secs(10);
const IMEI: &str = "356307042441013";

pub(crate) struct World {
    pub(crate) platform: Platform,
    pub(crate) registry: Arc<MemoryRegistry>,
    pub(crate) history: Arc<ScriptedHistory>,
    pub(crate) ingest: Ingest,
    pub(crate) gateway: Gateway,
    pub(crate) account: AccountId,
    pub(crate) shutdown: CancellationToken,
    running: Option<JoinHandle<std::io::Result<Drained>>>,
    channels: AtomicU8,
}

pub(crate) fn actor() -> Actor {
    Actor::system("test")
}

/// Timeouts that a test can wait for; those it does not are long.
pub(crate) fn config() -> GatewayConfig {
    GatewayConfig {
        event_loops: 2,
        listen_retry_delay: Duration::from_millis(100),
        drain_timeout: Duration::from_secs(5),
        ..GatewayConfig::default()
    }
}

impl World {
    pub(crate) async fn start(config: GatewayConfig) -> Self {
        let clock = Arc::new(SystemClock);
        let registry = Arc::new(MemoryRegistry::new(clock.clone()));
        let history = Arc::new(ScriptedHistory::new());
        let account = AccountId::new(clock.now(), clock.random());
        Self::over(config, registry, history, account).await
    }

    /// As after a kill: what is kept is there, what was in memory is not.
    pub(crate) async fn killed_and_started_again(&mut self, config: GatewayConfig) -> Self {
        let running = self.running.take().unwrap();
        running.abort();
        assert!(running.await.unwrap_err().is_cancelled());
        let (registry, history) = (self.registry.clone(), self.history.clone());
        Self::over(config, registry, history, self.account).await
    }

    async fn over(
        config: GatewayConfig,
        registry: Arc<MemoryRegistry>,
        history: Arc<ScriptedHistory>,
        account: AccountId,
    ) -> Self {
        let clock = Arc::new(SystemClock);
        let commands = Arc::new(LocalCommands::new(registry.clone(), clock.clone()));
        let platform = Platform {
            registry: registry.clone(),
            history: history.clone(),
            state: Arc::new(MemoryState::new()),
            bus: Arc::new(MemoryBus::new()),
            commands: commands.clone(),
            clock,
        };
        let ingest = Ingest::new(platform.clone());
        let events = ingest.clone();
        commands.set_events(move |event| events.event_soon(event));
        let gateway = Gateway::new(config.validate().unwrap(), ingest.clone());
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(fieldline_gateway::run(gateway.clone(), shutdown.clone()));
        assert!(gateway.ready(SOON).await);
        Self {
            platform,
            registry,
            history,
            ingest,
            gateway,
            account,
            shutdown,
            running: Some(running),
            channels: AtomicU8::new(1),
        }
    }

    pub(crate) async fn stop(&mut self) -> Drained {
        self.shutdown.cancel();
        let running = self.running.take().unwrap();
        timeout(Duration::from_secs(30), running).await.unwrap().unwrap().unwrap()
    }

    /// A channel as it may be changed before it is created.
    pub(crate) fn new_channel(&self, protocol: &str, transport: Transport) -> Channel {
        // Each on an address of its own: `host:0` may be taken once.
        let number = self.channels.fetch_add(1, Ordering::SeqCst);
        let now = SystemClock.now();
        serde_json::from_value(serde_json::json!({
            "id": ChannelId::new(now, SystemClock.random()), "account": self.account,
            "name": format!("channel {number}"), "protocol": protocol, "transport": transport,
            "listen": format!("127.0.0.{number}:0"), "enabled": true, "auto_register": true,
            "created_at": now,
        }))
        .unwrap()
    }

    pub(crate) async fn create(&self, channel: &Channel) -> SocketAddr {
        self.registry.create_object(self.account, channel, &actor()).await.unwrap();
        self.address(channel).await
    }

    pub(crate) async fn update(&self, channel: &Channel) {
        self.registry.update_object(self.account, channel, None, &actor()).await.unwrap();
    }

    /// Where a channel listens, once it does.
    pub(crate) async fn address(&self, channel: &Channel) -> SocketAddr {
        let mut status = Default::default();
        for _ in 0..500 {
            status = self.gateway.status(self.account, channel.id).await;
            if let Some(address) = &status.address {
                return address.parse().unwrap();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the channel does not listen: {status:?}");
    }

    pub(crate) async fn open(&self, protocol: &str) -> (Channel, SocketAddr) {
        let channel = self.new_channel(protocol, Transport::Tcp);
        let address = self.create(&channel).await;
        (channel, address)
    }

    pub(crate) async fn register(&self, ident: &str) -> Device {
        let now = SystemClock.now();
        let device = Device {
            id: DeviceId::new(now, SystemClock.random()),
            account: self.account,
            name: ident.to_owned(),
            ident: ident.to_owned(),
            protocol: String::new(),
            kind: String::new(),
            enabled: true,
            settings: Default::default(),
            labels: Default::default(),
            created_at: now,
        };
        self.registry.create_object(self.account, &device, &actor()).await.unwrap();
        device
    }

    pub(crate) async fn device(&self, ident: &str) -> Device {
        let found = self.registry.find_object::<Device>(self.account, "ident", ident).await;
        found.unwrap().expect("the device is registered").object
    }

    pub(crate) async fn is_online(&self, device: &Device) -> bool {
        self.platform.state.presence(self.account, device.id).await.unwrap().connection.is_some()
    }

    /// Log lines of one kind of object, in order.
    pub(crate) async fn log(&self, kind: SeriesKind) -> Vec<Stored> {
        self.ingest.flush().await;
        self.history.all(kind)
    }

    /// Names of the close codes in the logs of devices and channels, in order.
    pub(crate) async fn closes(&self, kind: SeriesKind) -> Vec<String> {
        let name = |line: &Stored| Some(line.params().get("close.name")?.as_str()?.to_owned());
        self.log(kind).await.iter().filter_map(name).collect()
    }

    /// Waits until the log of a kind has a line with this close code.
    pub(crate) async fn closed_with(&self, kind: SeriesKind, code: &str) {
        let mut found = Vec::new();
        for _ in 0..500 {
            found = self.closes(kind).await;
            if found.iter().any(|name| name == code) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("no connection was closed with {code}, but: {found:?}");
    }

    /// Waits until nothing is connected.
    pub(crate) async fn deserted(&self) {
        for _ in 0..500 {
            if self.gateway.connections_count() == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{} connections are left", self.gateway.connections_count());
    }
}

/// Kinds of the lines of a log, such as `frame`.
pub(crate) fn kinds(lines: &[Stored]) -> Vec<&str> {
    lines.iter().filter_map(|line| line.params().get("log.kind").and_then(Value::as_str)).collect()
}

pub(crate) async fn connect(address: SocketAddr) -> TcpStream {
    let stream = timeout(SOON, TcpStream::connect(address)).await.unwrap().unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// The next `count` bytes.
pub(crate) async fn receive<S: AsyncRead + Unpin>(stream: &mut S, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    timeout(SOON, stream.read_exact(&mut bytes)).await.expect("an answer in time").unwrap();
    bytes
}

/// Everything until the end of the stream.
pub(crate) async fn rest<S: AsyncRead + Unpin>(stream: &mut S) -> Vec<u8> {
    let mut bytes = Vec::new();
    // An error is a reset, and that is an end as well.
    let _end = timeout(SOON, stream.read_to_end(&mut bytes)).await.expect("an end in time");
    bytes
}

pub(crate) async fn is_silent<S: AsyncRead + Unpin>(stream: &mut S) -> bool {
    timeout(Duration::from_millis(150), stream.read(&mut [0; 1])).await.is_err()
}

pub(crate) async fn login(address: SocketAddr, imei: &str) -> TcpStream {
    let mut stream = connect(address).await;
    stream.write_all(&teltonika::login(imei)).await.unwrap();
    assert_eq!(receive(&mut stream, 1).await, [1], "the login is accepted");
    stream
}

/// A packet of `count` records, the first with sequence number `from`.
pub(crate) fn packet(from: u32, count: u32) -> Vec<u8> {
    teltonika::tcp_packet(&payload(from, count))
}

pub(crate) fn payload(from: u32, count: u32) -> Vec<u8> {
    let mut vehicle = Vehicle::new(1, 1);
    let records: Vec<Record> = (from..from + count)
        .map(|sequence| Record {
            at: fieldline_model::Timestamp::from_seconds(1_700_000_000 + i64::from(sequence)),
            sample: vehicle.drive(1.0),
            sequence,
        })
        .collect();
    teltonika::payload(Codec::EightExtended, &records)
}
