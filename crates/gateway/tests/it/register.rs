//! Devices that register themselves.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::registry::RegistryExt;
use fieldline_contracts::{MemoryBus, MemoryState, Page, SystemClock};
use fieldline_gateway::GatewayConfig;
use fieldline_ingest::stored_event;
use fieldline_model::{Device, EventKind, SeriesKind, Stored, Transport, Value};
use fieldline_testkit::servers::Postgres;
use fieldline_testkit::teltonika;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::time::timeout;

use crate::nodes::{Backends, Nodes};
use crate::{SOON, World, config, connect, login, payload, receive, rest};

/// Idents that register themselves, each at two nodes at the same moment.
const RACES: usize = 25;

/// A device that goes to another node while the first still registers it: both let it in, and it is one device.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_register_one_ident_at_once() {
    let postgres = Postgres::start();
    let (state, bus) = (Arc::new(MemoryState::new()), Arc::new(MemoryBus::new()));
    let mut backends = Vec::new();
    for _ in 0..2 {
        let settings = fieldline_postgres::Settings::new(postgres.url());
        let clock = Arc::new(SystemClock);
        let registry = fieldline_postgres::PostgresRegistry::connect(&settings, clock);
        let registry = Arc::new(registry.await.unwrap());
        backends.push(Backends { registry, state: state.clone(), bus: bus.clone() });
    }
    let nodes = Nodes::over(backends, Transport::Tcp, config()).await;
    let (a, b) = (nodes.nodes[0].address, nodes.nodes[1].address);
    let mut held = Vec::new();
    for race in 0..RACES {
        let ident = format!("{}", 357_000_000_000_000_u64 + race as u64);
        // Both believe that nobody has it, and have nothing else to make them ask again.
        for node in &nodes.nodes {
            assert!(node.ingest.device_by_ident(nodes.account, &ident).await.unwrap().is_none());
        }
        // `login` fails the test unless it is accepted.
        let ident = ident.as_str();
        held.push(tokio::join!(login(a, ident), login(b, ident)));
    }
    let page = Page::first(1_000);
    let devices = nodes.registry.list_objects::<Device>(nodes.account, &page).await.unwrap();
    let idents: HashSet<&str> = devices.iter().map(|device| &*device.object.ident).collect();
    assert_eq!((devices.len(), idents.len()), (RACES, RACES), "one device each");
    let events = nodes.log(SeriesKind::Event).await;
    let registered = events.iter().filter_map(stored_event);
    let registered = registered.filter(|event| event.kind == EventKind::Registered).count();
    assert_eq!(registered, RACES, "and told of once");
    drop(held);
    nodes.stop_all().await;
}

/// Anybody can send a datagram that names an ident: only one that says something registers it.
#[tokio::test]
async fn a_datagram_of_junk_registers_nobody() {
    let mut world = World::start(config()).await;
    let teltonika = world.create(&world.new_channel("teltonika", Transport::Udp)).await;
    let wialon = world.create(&world.new_channel("wialon_ips", Transport::Udp)).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    // A known head and a body of nothing; a wrong time; no message; then one that is whole.
    let mut junk = teltonika::udp_packet("356307042441020", 1, 1, &payload(1, 1));
    let end = junk.len() - 20;
    junk[end..].fill(0xee);
    socket.send_to(&junk, teltonika).await.unwrap();
    let line = "junk-1#D#999999;000001;5355.0926;N;02732.4099;E;12;90;200;9;1.1;NA;NA;NA;NA;NA\r\n";
    for line in [line, "junk-2#P#\r\n", "junk-3#D#what\r\n"] {
        socket.send_to(line.as_bytes(), wialon).await.unwrap();
    }
    let line = "good-1#D#010126;000001;5355.0926;N;02732.4099;E;12;90;200;9;1.1;NA;NA;NA;NA;NA\r\n";
    socket.send_to(line.as_bytes(), wialon).await.unwrap();
    let mut answer = [0; 64];
    let (count, _) = timeout(SOON, socket.recv_from(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer[..count], b"#AD#1\r\n", "and only it is answered");
    let good = teltonika::udp_packet("356307042441021", 1, 1, &payload(1, 1));
    socket.send_to(&good, teltonika).await.unwrap();
    let (count, _) = timeout(SOON, socket.recv_from(&mut answer)).await.unwrap().unwrap();
    assert_eq!(teltonika::udp_accepted(&answer[..count], 1, 1), Some(1));
    let page = Page::first(1_000);
    let devices = world.registry.list_objects::<Device>(world.account, &page).await.unwrap();
    let mut idents: Vec<&str> = devices.iter().map(|device| &*device.object.ident).collect();
    idents.sort_unstable();
    assert_eq!(idents, ["356307042441021", "good-1"]);
    // One that is known may say as little as it likes.
    socket.send_to(b"good-1#P#\r\n", wialon).await.unwrap();
    let (count, _) = timeout(SOON, socket.recv_from(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer[..count], b"#AP#\r\n");
    world.stop().await;
}

/// A channel's own limit, whoever the devices are.
#[tokio::test]
async fn a_channel_registers_so_many_a_minute() {
    let config = GatewayConfig { channel_registrations_per_min_max: 3, ..config() };
    let mut world = World::start(config).await;
    let (_, address) = world.open("teltonika").await;
    let udp = world.create(&world.new_channel("teltonika", Transport::Udp)).await;
    for number in 0..4_u64 {
        let mut stream = connect(address).await;
        let ident = format!("{}", 356_307_042_441_300 + number);
        stream.write_all(&teltonika::login(&ident)).await.unwrap();
        assert_eq!(receive(&mut stream, 1).await, [u8::from(number < 3)]);
    }
    world.closed_with(SeriesKind::ChannelLog, "registration_limited").await;
    // Each channel has its own; over UDP one too many is left without an answer.
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(udp).await.unwrap();
    for number in 0..4_u8 {
        let ident = format!("{}", 356_307_042_441_400 + u64::from(number));
        let datagram = teltonika::udp_packet(&ident, 1, number, &payload(1, 1));
        socket.send(&datagram).await.unwrap();
        let mut answer = [0; 64];
        if number < 3 {
            let count = timeout(SOON, socket.recv(&mut answer)).await.unwrap().unwrap();
            assert_eq!(teltonika::udp_accepted(&answer[..count], 1, number), Some(1));
        }
    }
    for _ in 0..500 {
        if world.closes(SeriesKind::ChannelLog).await.len() == 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(world.closes(SeriesKind::ChannelLog).await, ["registration_limited"; 2]);
    let page = Page::first(1_000);
    let devices = world.registry.list_objects::<Device>(world.account, &page).await.unwrap();
    assert_eq!(devices.len(), 6);
    world.stop().await;
}

/// Logs are for everybody who may read; passwords are not.
#[tokio::test]
async fn a_password_is_in_no_log() {
    let mut world = World::start(config()).await;
    let (_, address) = world.open("wialon_ips").await;
    // Bytes are hex digits in it.
    let raw = |lines: &[Stored]| -> String {
        let values = lines.iter().flat_map(|line| line.params().iter());
        values.map(|(_, value)| value.to_json().to_string()).collect()
    };
    let hex = |text: &str| text.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
    // Right; with a wrong checksum; with a field too many; and once more when it is known.
    for login in [
        "#L#pump-1;hunter-two\r\n",
        "#L#2.0;pump-1;hunter-two;0000\r\n",
        "#L#pump-1;hunter-two;x\r\n",
        "#L#pump-1;NA\r\n#L#pump-1;hunter-two\r\n#L#2.0;pump-1;hunter-two;0000\r\n",
    ] {
        let mut stream = connect(address).await;
        stream.write_all(login.as_bytes()).await.unwrap();
        let mut answer = [0; 6];
        stream.read_exact(&mut answer).await.unwrap();
        stream.shutdown().await.unwrap();
        rest(&mut stream).await;
    }
    world.deserted().await;
    let device = world.log(SeriesKind::DeviceLog).await;
    let channel = world.log(SeriesKind::ChannelLog).await;
    for (name, lines) in [("device", &device), ("channel", &channel)] {
        let text = raw(lines).to_lowercase();
        assert!(!text.contains("hunter") && !text.contains(&hex("hunter")), "{name}: {text}");
    }
    let masked = |lines: &[Stored]| {
        lines.iter().filter(|line| line.params().get("frame.masked").is_some()).count()
    };
    assert_eq!((masked(&device), masked(&channel)), (3, 2));
    assert!(raw(&device).contains(&hex("pump-1;NA")), "the test would see it");
    // What holds none is kept as it came.
    let whole = Value::from(b"#L#pump-1;NA\r\n".as_slice());
    let kept = device.iter().filter(|line| line.params().get("frame.hex") == Some(&whole));
    assert_eq!(kept.count(), 1);
    world.stop().await;
}
