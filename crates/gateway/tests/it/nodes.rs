//! Several nodes over one platform: a device is on one of them, the newest.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fieldline_contracts::registry::RegistryExt;
use fieldline_contracts::{
    Bus, ChannelControl, Clock, Commands, History, MemoryBus, MemoryState, NewCommand, Platform,
    Registry, State, SystemClock,
};
use fieldline_gateway::{Drained, Gateway, GatewayConfig};
use fieldline_ingest::{Ingest, stored_event};
use fieldline_model::{
    AccountId, Channel, ChannelId, Command, CommandStatus, Device, EventKind, Params, SeriesKind,
    Stored, Transport, Value,
};
use fieldline_mqtt_bus::{MqttBus, MqttBusConfig};
use fieldline_redis::{RedisConfig, RedisState};
use fieldline_router::LocalCommands;
use fieldline_testkit::servers::{Mosquitto, Postgres, Redis};
use fieldline_testkit::teltonika::{self, FromServer};
use fieldline_testkit::{MemoryRegistry, ScriptedHistory};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::{IMEI, SOON, actor, config, login, packet, payload, receive, rest};

pub(crate) struct Node {
    pub(crate) platform: Platform,
    commands: LocalCommands,
    pub(crate) ingest: Ingest,
    pub(crate) gateway: Gateway,
    pub(crate) shutdown: CancellationToken,
    pub(crate) running: Option<JoinHandle<std::io::Result<Drained>>>,
    pub(crate) address: SocketAddr,
}

/// What a node has of what they share.
pub(crate) struct Backends {
    pub(crate) registry: Arc<dyn Registry>,
    pub(crate) state: Arc<dyn State>,
    pub(crate) bus: Arc<dyn Bus>,
}

/// Nodes that share all that is kept, as in a cluster.
pub(crate) struct Nodes {
    pub(crate) account: AccountId,
    pub(crate) registry: Arc<dyn Registry>,
    pub(crate) history: Arc<ScriptedHistory>,
    pub(crate) channel: Channel,
    pub(crate) nodes: Vec<Node>,
}

impl Nodes {
    pub(crate) async fn start(count: usize, transport: Transport, config: GatewayConfig) -> Self {
        let registry = Arc::new(MemoryRegistry::new(Arc::new(SystemClock)));
        let (state, bus) = (Arc::new(MemoryState::new()), Arc::new(MemoryBus::new()));
        let backends = (0..count).map(|_| Backends {
            registry: registry.clone(),
            state: state.clone(),
            bus: bus.clone(),
        });
        Self::over(backends.collect(), transport, config).await
    }

    /// A node over each of `backends`.
    pub(crate) async fn over(
        backends: Vec<Backends>,
        transport: Transport,
        config: GatewayConfig,
    ) -> Self {
        let clock = Arc::new(SystemClock);
        let history = Arc::new(ScriptedHistory::new());
        let account = AccountId::new(clock.now(), clock.random());
        let channel: Channel = serde_json::from_value(serde_json::json!({
            "id": ChannelId::new(clock.now(), clock.random()), "account": account, "name": "trackers",
            "protocol": "teltonika", "transport": transport, "listen": "127.0.0.1:0",
            "enabled": true, "auto_register": true, "created_at": clock.now(),
        }))
        .unwrap();
        let registry = backends[0].registry.clone();
        registry.create_object(account, &channel, &actor()).await.unwrap();
        let mut nodes = Vec::new();
        for (number, Backends { registry, state, bus }) in backends.into_iter().enumerate() {
            let commands = LocalCommands::new(registry.clone(), clock.clone());
            let platform = Platform {
                registry,
                history: history.clone(),
                state,
                bus,
                commands: Arc::new(commands.clone()),
                clock: clock.clone(),
            };
            let ingest = Ingest::new(platform.clone());
            let name = format!("node-{number}");
            let gateway = Gateway::on_node(config.clone(), ingest.clone(), &name);
            let shutdown = CancellationToken::new();
            let running = tokio::spawn(fieldline_gateway::run(gateway.clone(), shutdown.clone()));
            assert!(gateway.ready(SOON).await);
            let status = gateway.status(account, channel.id).await;
            let address = status.address.expect("it listens").parse().unwrap();
            let running = Some(running);
            nodes.push(Node { platform, commands, ingest, gateway, shutdown, running, address });
        }
        Self { account, registry, history, channel, nodes }
    }

    pub(crate) async fn device(&self, ident: &str) -> Device {
        let found = self.registry.find_object::<Device>(self.account, "ident", ident).await;
        found.unwrap().expect("the device is registered").object
    }

    pub(crate) fn counts(&self) -> Vec<usize> {
        self.nodes.iter().map(|node| node.gateway.connections_count()).collect()
    }

    pub(crate) async fn counts_are(&self, expected: &[usize]) {
        for _ in 0..500 {
            if self.counts() == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("connections are {:?}, not {expected:?}", self.counts());
    }

    async fn one_is_left(&self) {
        for _ in 0..500 {
            if self.counts().iter().sum::<usize>() == 1 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("connections are {:?}", self.counts());
    }

    pub(crate) async fn is_online(&self, device: &Device) -> bool {
        let state = &self.nodes[0].platform.state;
        state.presence(self.account, device.id).await.unwrap().connection.is_some()
    }

    pub(crate) async fn log(&self, kind: SeriesKind) -> Vec<Stored> {
        for node in &self.nodes {
            node.ingest.flush().await;
        }
        self.history.all(kind)
    }

    pub(crate) async fn presence_events(&self) -> Vec<EventKind> {
        let events = self.log(SeriesKind::Event).await;
        let kinds = events.iter().filter_map(stored_event).map(|event| event.kind);
        kinds.filter(|kind| matches!(kind, EventKind::Online | EventKind::Offline)).collect()
    }

    async fn submit(&self, node: usize, device: &Device, text: &str) -> Command {
        let params: Params = serde_json::from_value(serde_json::json!({ "text": text })).unwrap();
        let new = NewCommand { name: "text".to_owned(), params, ttl_s: 600 };
        self.nodes[node].commands.submit(self.account, device.id, new, &actor()).await.unwrap()
    }

    pub(crate) async fn stop(&mut self, node: usize) -> Drained {
        self.nodes[node].shutdown.cancel();
        let running = self.nodes[node].running.take().unwrap();
        timeout(Duration::from_secs(30), running).await.unwrap().unwrap().unwrap()
    }

    /// As by SIGKILL: nothing is told to anybody.
    pub(crate) async fn kill(&mut self, node: usize) {
        let mut node = self.nodes.remove(node);
        let running = node.running.take().unwrap();
        running.abort();
        assert!(running.await.unwrap_err().is_cancelled());
    }

    pub(crate) async fn stop_all(mut self) {
        for node in 0..self.nodes.len() {
            self.stop(node).await;
        }
    }
}

/// The next command, or `None` at the end of the stream.
async fn next_command(stream: &mut TcpStream) -> String {
    let mut buffer = receive(stream, 8).await;
    let length = u32::from_be_bytes(buffer[4..8].try_into().unwrap()) as usize;
    buffer.extend(receive(stream, length + 4).await);
    match teltonika::take_from_server(&mut buffer) {
        Some(FromServer::Command(text)) => text,
        other => panic!("{other:?}"),
    }
}

async fn says(stream: &mut TcpStream, from: u32, count: u32) {
    stream.write_all(&packet(from, count)).await.unwrap();
    assert_eq!(receive(stream, 4).await, count.to_be_bytes());
}

#[tokio::test]
async fn a_device_that_connects_to_another_node_is_let_go_of() {
    let nodes = Nodes::start(2, Transport::Tcp, config()).await;
    let (a, b) = (nodes.nodes[0].address, nodes.nodes[1].address);
    let mut first = login(a, IMEI).await;
    says(&mut first, 1, 1).await;
    let device = nodes.device(IMEI).await;
    let began = Instant::now();
    let mut second = login(b, IMEI).await;
    assert!(rest(&mut first).await.is_empty());
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    nodes.counts_are(&[0, 1]).await;
    assert!(nodes.is_online(&device).await, "the end of the old one does not count");
    says(&mut second, 2, 1).await;
    // And back.
    let mut third = login(a, IMEI).await;
    assert!(rest(&mut second).await.is_empty());
    nodes.counts_are(&[1, 0]).await;
    says(&mut third, 3, 1).await;
    // Within one node nobody else needs to know.
    let mut fourth = login(a, IMEI).await;
    assert!(rest(&mut third).await.is_empty());
    nodes.counts_are(&[1, 0]).await;
    says(&mut fourth, 4, 1).await;
    assert!(nodes.is_online(&device).await);
    assert_eq!(nodes.presence_events().await, [EventKind::Online; 3]);
    let log = nodes.log(SeriesKind::DeviceLog).await;
    let name = |line: &Stored| Some(line.params().get("close.name")?.as_str()?.to_owned());
    assert_eq!(log.iter().filter_map(name).collect::<Vec<_>>(), ["replaced"; 3]);
    drop(fourth);
    nodes.counts_are(&[0, 0]).await;
    assert!(!nodes.is_online(&device).await);
    assert_eq!(nodes.presence_events().await.last(), Some(&EventKind::Offline));
    nodes.stop_all().await;
}

/// The clock of a node may be ahead by years: the newest connection is the newest all the same.
#[tokio::test]
async fn clocks_have_no_part_in_who_is_newest() {
    let nodes = Nodes::start(2, Transport::Tcp, config()).await;
    let (a, b) = (nodes.nodes[0].address, nodes.nodes[1].address);
    drop(login(a, IMEI).await);
    let device = nodes.device(IMEI).await;
    let far = u64::MAX / 4;
    let id = fieldline_model::ConnectionId::new(SystemClock.now(), [7; 10]);
    let state = &nodes.nodes[0].platform.state;
    let now = SystemClock.now();
    nodes.counts_are(&[0, 0]).await;
    assert!(state.connected(nodes.account, device.id, id, far, String::new(), now).await.unwrap());
    for (address, counts) in [(a, [1, 0]), (b, [0, 1]), (a, [1, 0])] {
        // It stays open beyond the block: the node closes it.
        std::mem::forget(login(address, IMEI).await);
        nodes.counts_are(&counts).await;
        let presence = state.presence(nodes.account, device.id).await.unwrap();
        assert!(presence.epoch > far && presence.connection != Some(id));
    }
    nodes.stop_all().await;
}

/// What the old node has taken in is stored before what the new one takes in.
#[tokio::test]
async fn what_was_said_first_is_stored_first() {
    let nodes = Nodes::start(2, Transport::Tcp, config()).await;
    let (a, b) = (nodes.nodes[0].address, nodes.nodes[1].address);
    let mut first = login(a, IMEI).await;
    nodes.history.set_delay(Duration::from_millis(300));
    first.write_all(&packet(1, 2)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let second = tokio::spawn(async move {
        let mut second = login(b, IMEI).await;
        says(&mut second, 3, 2).await;
        second
    });
    assert_eq!(rest(&mut first).await, [0, 0, 0, 2], "stored, so it is acknowledged");
    let _second = second.await.unwrap();
    let messages = nodes.history.all(SeriesKind::Message);
    let seconds: Vec<i64> =
        messages.iter().map(|m| m.timestamp().as_micros() / 1_000_000 - 1_700_000_000).collect();
    assert_eq!(seconds, [1, 2, 3, 4]);
    nodes.stop_all().await;
}

#[tokio::test]
async fn a_device_over_udp_is_held_by_the_node_that_heard_it_last() {
    let nodes = Nodes::start(2, Transport::Udp, config()).await;
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for round in 0..6_u8 {
        let node = usize::from(round) % 2;
        let bytes = teltonika::udp_packet(IMEI, 1, round, &payload(u32::from(round) + 1, 1));
        socket.send_to(&bytes, nodes.nodes[node].address).await.unwrap();
        let mut answer = [0; 200];
        let count = timeout(SOON, socket.recv(&mut answer)).await.unwrap().unwrap();
        assert_eq!(teltonika::udp_accepted(&answer[..count], 1, round), Some(1));
        nodes.counts_are(if node == 0 { &[1, 0] } else { &[0, 1] }).await;
    }
    assert_eq!(nodes.history.all(SeriesKind::Message).len(), 6);
    nodes.stop_all().await;
}

/// Fifty times the device goes to the other node while a command is on the wire. One connection stays; each command
/// comes again on the next connection until it is answered, and then never.
#[tokio::test]
async fn commands_follow_a_device_that_goes_to_and_fro() {
    let nodes = Nodes::start(2, Transport::Tcp, config()).await;
    to_and_fro(&nodes, 50).await;
    nodes.stop_all().await;
}

/// The same over PostgreSQL, Redis and an MQTT broker, each node with connections of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_real_servers_it_is_the_same() {
    let (postgres, redis, broker) = (Postgres::start(), Redis::start(), Mosquitto::start());
    let clock = Arc::new(SystemClock);
    let history: Arc<dyn History> = Arc::new(ScriptedHistory::new());
    let mut backends = Vec::new();
    for number in 0..2 {
        let settings = fieldline_postgres::Settings::new(postgres.url());
        let registry = fieldline_postgres::PostgresRegistry::connect(&settings, clock.clone());
        let config = RedisConfig { url: redis.url(), ..RedisConfig::default() };
        let name = format!("node-{number}");
        let state = RedisState::connect(config, &name, history.clone()).await.unwrap();
        assert!(state.ready(SOON).await, "{:?}", state.problems());
        let url = format!("mqtt://127.0.0.1:{}", broker.port());
        let config = MqttBusConfig { url, ..MqttBusConfig::default() };
        let bus = MqttBus::connect(config, clock.clone()).await.unwrap();
        let registry = Arc::new(registry.await.unwrap());
        backends.push(Backends { registry, state: Arc::new(state), bus: Arc::new(bus) });
    }
    let nodes = Nodes::over(backends, Transport::Tcp, config()).await;
    let began = Instant::now();
    to_and_fro(&nodes, 20).await;
    println!("20 rounds over real servers took {:?}", began.elapsed());
    nodes.stop_all().await;
}

async fn to_and_fro(nodes: &Nodes, rounds: usize) {
    let mut stream = login(nodes.nodes[0].address, IMEI).await;
    let device = nodes.device(IMEI).await;
    let mut commands = Vec::new();
    for round in 0..rounds {
        let text = format!("command {round}");
        // Queued on either node, whichever holds the device.
        commands.push(nodes.submit((round / 2) % 2, &device, &text).await);
        assert_eq!(next_command(&mut stream).await, text);
        let mut next = login(nodes.nodes[(round + 1) % 2].address, IMEI).await;
        let began = Instant::now();
        assert!(rest(&mut stream).await.is_empty(), "nothing comes on the old one");
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        assert_eq!(next_command(&mut next).await, text, "it comes again, and no other");
        next.write_all(&teltonika::text_packet(6, &text)).await.unwrap();
        let wait = nodes.nodes[round % 2].commands.wait(nodes.account, commands[round].id, 10_000);
        let done = wait.await.unwrap();
        assert_eq!((done.status, done.answer), (CommandStatus::Answered, Some(text)));
        assert_eq!(done.attempts, 2);
        assert!(nodes.is_online(&device).await);
        stream = next;
    }
    nodes.counts_are(&[1, 0]).await;
    assert!(crate::is_silent(&mut stream).await, "nothing is sent twice");
    assert!(nodes.presence_events().await.iter().all(|kind| *kind == EventKind::Online));
}

/// The device reconnects again and again without waiting for anything, on both nodes at once.
#[tokio::test]
async fn of_connections_at_the_same_time_one_stays() {
    let nodes = Nodes::start(2, Transport::Tcp, config()).await;
    let device = {
        drop(login(nodes.nodes[0].address, IMEI).await);
        nodes.device(IMEI).await
    };
    for _ in 0..10 {
        let logins = (0..8).map(|number| {
            let address = nodes.nodes[number % 2].address;
            tokio::spawn(async move {
                let mut stream = TcpStream::connect(address).await.unwrap();
                stream.write_all(&teltonika::login(IMEI)).await.unwrap();
                stream
            })
        });
        let mut streams = Vec::new();
        for login in logins.collect::<Vec<_>>() {
            streams.push(login.await.unwrap());
        }
        // All but one are closed, and that one is not.
        let mut left: Vec<_> = streams
            .into_iter()
            .map(|mut stream| {
                Box::pin(async move {
                    let mut bytes = Vec::new();
                    // An error is a reset, and that is an end as well.
                    let _end = stream.read_to_end(&mut bytes).await;
                })
            })
            .collect();
        while left.len() > 1 {
            let ended = timeout(SOON, futures_util::future::select_all(left)).await;
            left = ended.expect("all but one are closed").2;
        }
        nodes.one_is_left().await;
        let stays = timeout(Duration::from_millis(300), &mut left[0]).await;
        assert!(stays.is_err(), "one stays");
        let held =
            nodes.nodes.iter().map(|n| n.gateway.connections(nodes.account, nodes.channel.id));
        let held = futures_util::future::join_all(held).await;
        let held: Vec<_> = held.into_iter().flat_map(|found| found.items).collect();
        let presence = nodes.nodes[0].platform.state.presence(nodes.account, device.id).await;
        assert_eq!(
            presence.unwrap().connection,
            Some(held[0].id),
            "and it is the one that is known"
        );
    }
    nodes.stop_all().await;
}

/// A node that drains: nothing new comes in, an answer that is due is taken, and the device goes on elsewhere.
#[tokio::test]
async fn a_node_that_drains_finishes_what_is_begun() {
    let mut nodes = Nodes::start(2, Transport::Tcp, config()).await;
    let (a, b) = (nodes.nodes[0].address, nodes.nodes[1].address);
    let mut idle = login(a, "356307042441014").await;
    let mut asked = login(a, IMEI).await;
    let mut midway = login(a, "356307042441015").await;
    let device = nodes.device(IMEI).await;
    let command = nodes.submit(1, &device, "getinfo").await;
    assert_eq!(next_command(&mut asked).await, "getinfo");
    let bytes = packet(1, 3);
    midway.write_all(&bytes[..20]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    nodes.nodes[0].shutdown.cancel();
    assert!(rest(&mut idle).await.is_empty(), "one that waits for nothing is closed");
    assert!(TcpStream::connect(a).await.is_err());
    assert!(!nodes.nodes[0].gateway.opened().await, "and the node is not ready");
    midway.write_all(&bytes[20..]).await.unwrap();
    assert_eq!(rest(&mut midway).await, [0, 0, 0, 3]);
    asked.write_all(&teltonika::text_packet(6, "here")).await.unwrap();
    assert!(rest(&mut asked).await.is_empty());
    assert_eq!(nodes.stop(0).await.abandoned, 0);
    let done = nodes.nodes[1].commands.get(nodes.account, command.id).await.unwrap();
    assert_eq!((done.answer.as_deref(), done.attempts), (Some("here"), 1));
    let mut next = login(b, IMEI).await;
    says(&mut next, 10, 1).await;
    nodes.stop(1).await;
}

/// An answer that never comes holds a drain for no longer than its time.
#[tokio::test]
async fn a_drain_has_an_end() {
    let config = GatewayConfig { drain_timeout: Duration::from_secs(2), ..config() };
    let mut nodes = Nodes::start(1, Transport::Tcp, config).await;
    let mut stream = login(nodes.nodes[0].address, IMEI).await;
    let device = nodes.device(IMEI).await;
    let command = nodes.submit(0, &device, "getinfo").await;
    assert_eq!(next_command(&mut stream).await, "getinfo");
    let began = Instant::now();
    let (drained, ended) = tokio::join!(nodes.stop(0), rest(&mut stream));
    assert!(ended.is_empty());
    assert_eq!(drained.abandoned, 0);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    // It waits for the device on another node.
    for _ in 0..200 {
        let known = nodes.nodes[0].commands.get(nodes.account, command.id).await.unwrap();
        if known.status == CommandStatus::Queued {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the command does not wait");
}

/// Many connections are closed over some time, so that others can take them.
#[tokio::test]
async fn many_connections_are_closed_over_some_time() {
    let config = GatewayConfig { drain_timeout: Duration::from_secs(2), ..config() };
    let mut nodes = Nodes::start(1, Transport::Tcp, config).await;
    let address = nodes.nodes[0].address;
    let mut ends = Vec::new();
    for number in 0..200_u32 {
        let mut stream =
            login(address, &format!("{}", 350_000_000_000_000_u64 + u64::from(number))).await;
        ends.push(tokio::spawn(async move {
            rest(&mut stream).await;
            Instant::now()
        }));
    }
    let began = Instant::now();
    assert_eq!(nodes.stop(0).await.abandoned, 0);
    assert!(began.elapsed() < Duration::from_secs(2));
    let mut times = Vec::new();
    for end in ends {
        times.push(end.await.unwrap().duration_since(began));
    }
    times.sort();
    assert!(times[199] - times[0] > Duration::from_millis(100), "{:?}", times[199] - times[0]);

    let text =
        |line: &Stored| line.params().get("close.name").and_then(Value::as_str).map(str::to_owned);
    let log = nodes.log(SeriesKind::DeviceLog).await;
    assert_eq!(log.iter().filter_map(text).filter(|name| name == "shutdown").count(), 200);
}
