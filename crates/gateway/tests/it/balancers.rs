//! Who is at the other end where a balancer stands between.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use fieldline_contracts::ChannelControl;
use fieldline_gateway::GatewayConfig;
use fieldline_model::{Channel, SeriesKind, Stored, Value};
use fieldline_runtime::Balancers;
use fieldline_testkit::teltonika;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};

use crate::{IMEI, World, config, packet, receive, rest};

/// Where the balancer connects from; anybody else is no balancer.
const BALANCER: &str = "127.0.0.9";

fn behind() -> GatewayConfig {
    let addresses = vec![BALANCER.parse().unwrap()];
    GatewayConfig { balancers: Balancers { addresses, ..Balancers::default() }, ..config() }
}

async fn connect_from(from: &str, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(from.parse::<IpAddr>().unwrap(), 0)).unwrap();
    let stream = socket.connect(to).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// What the device behind a balancer sends, in version 2 of the PROXY protocol.
fn version_2(port: u16) -> Vec<u8> {
    let mut bytes = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xcb\0\x71\x07\x0a\0\0\x09".to_vec();
    bytes.extend(port.to_be_bytes());
    bytes.extend(5027_u16.to_be_bytes());
    bytes
}

fn said(line: &Stored, name: &str) -> String {
    line.params().get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
}

async fn peers(world: &World, channel: &Channel) -> Vec<String> {
    let connections = world.gateway.connections(world.account, channel.id).await;
    connections.items.iter().map(|connection| connection.peer.clone()).collect()
}

#[tokio::test]
async fn the_true_peer_is_seen_everywhere() {
    let mut world = World::start(behind()).await;
    let (channel, address) = world.open("teltonika").await;
    let mut stream = connect_from(BALANCER, address).await;
    let line = b"PROXY TCP4 203.0.113.7 10.0.0.9 51820 5027\r\n";
    stream.write_all(line).await.unwrap();
    stream.write_all(&teltonika::login(IMEI)).await.unwrap();
    assert_eq!(receive(&mut stream, 1).await, [1]);
    stream.write_all(&packet(1, 2)).await.unwrap();
    assert_eq!(receive(&mut stream, 4).await, [0, 0, 0, 2]);
    let peer = "203.0.113.7:51820";
    assert_eq!(peers(&world, &channel).await, [peer]);
    let device = world.device(IMEI).await;
    let presence = world.platform.state.presence(world.account, device.id).await.unwrap();
    assert_eq!(presence.peer.as_deref(), Some(peer));
    let log = world.log(SeriesKind::DeviceLog).await;
    assert_eq!(said(&log[0], "peer"), peer);

    // The other version, with the first bytes of the device in the same packet.
    let mut stream = connect_from(BALANCER, address).await;
    let both = [version_2(4_711), teltonika::login("356307042441014")].concat();
    stream.write_all(&both).await.unwrap();
    assert_eq!(receive(&mut stream, 1).await, [1]);
    assert!(peers(&world, &channel).await.contains(&"203.0.113.7:4711".to_owned()));
    world.stop().await;
}

#[tokio::test]
async fn nobody_else_is_believed_and_a_silent_balancer_is_refused() {
    let mut world = World::start(behind()).await;
    let (channel, address) = world.open("teltonika").await;
    // Somebody who is no balancer: his header is junk, and he is who he is.
    let mut liar = connect_from("127.0.0.1", address).await;
    liar.write_all(&[version_2(1), teltonika::login(IMEI)].concat()).await.unwrap();
    assert_ne!(rest(&mut liar).await, [1], "what comes after it is no login");
    world.deserted().await;
    let log = world.log(SeriesKind::ChannelLog).await;
    let closed = log.iter().find(|line| !said(line, "close.name").is_empty()).unwrap();
    assert!(said(closed, "peer").starts_with("127.0.0.1:"), "{}", said(closed, "peer"));
    let mut honest = connect_from("127.0.0.1", address).await;
    honest.write_all(&teltonika::login(IMEI)).await.unwrap();
    assert_eq!(receive(&mut honest, 1).await, [1]);
    assert!(peers(&world, &channel).await[0].starts_with("127.0.0.1:"));

    // A balancer that passes on what its client sends would let that one name any peer.
    let mut silent = connect_from(BALANCER, address).await;
    silent.write_all(&teltonika::login(IMEI)).await.unwrap();
    assert!(rest(&mut silent).await.is_empty());
    world.closed_with(SeriesKind::ChannelLog, "wrong_protocol").await;
    let log = world.log(SeriesKind::ChannelLog).await;
    let closed =
        log.iter().rev().find(|line| said(line, "close.name") == "wrong_protocol").unwrap();
    assert!(said(closed, "text").contains("sent no PROXY header: set `proxy_protocol on`"));
    // One that only looks whether the port is open disturbs nobody.
    drop(connect_from(BALANCER, address).await);
    world.closed_with(SeriesKind::ChannelLog, "device_closed").await;
    world.stop().await;
}

#[tokio::test]
async fn limits_by_address_count_true_peers() {
    let config = GatewayConfig {
        connections_per_address_max: 1,
        address_registrations_per_min_max: 2,
        ..behind()
    };
    let mut world = World::start(config).await;
    let (channel, address) = world.open("teltonika").await;
    let from = async |peer: &str| {
        let mut stream = connect_from(BALANCER, address).await;
        let line = format!("PROXY TCP4 {peer} 10.0.0.9 51820 5027\r\n");
        stream.write_all(line.as_bytes()).await.unwrap();
        stream
    };
    // As many behind one balancer as there are peers, one of each.
    let first = from("203.0.113.1").await;
    let second = from("203.0.113.2").await;
    let mut third = from("203.0.113.1").await;
    assert!(rest(&mut third).await.is_empty());
    world.closed_with(SeriesKind::ChannelLog, "too_many_connections").await;
    assert_eq!(world.gateway.connections_count(), 2);
    drop((first, second));
    world.deserted().await;
    // The place is free again.
    for number in 0..3_u64 {
        let mut stream = from("203.0.113.1").await;
        let ident = format!("{}", 356_307_042_441_100 + number);
        stream.write_all(&teltonika::login(&ident)).await.unwrap();
        let answer = receive(&mut stream, 1).await;
        assert_eq!(answer, [u8::from(number < 2)], "the third is one too many");
        drop(stream);
        world.deserted().await;
    }
    world.closed_with(SeriesKind::ChannelLog, "registration_limited").await;
    let log = world.log(SeriesKind::ChannelLog).await;
    let refused = log.iter().find(|line| said(line, "close.name") == "registration_limited");
    let refused = refused.unwrap();
    assert_eq!(said(refused, "log.kind"), "refused");
    assert!(said(refused, "text").starts_with("203.0.113.1 has registered 2 devices"));
    assert_eq!(said(refused, "peer"), "203.0.113.1:51820");
    // Another address, and a device that is known, are let in.
    for (peer, ident) in [("203.0.113.2", "356307042441200"), ("203.0.113.1", "356307042441100")] {
        let mut stream = from(peer).await;
        stream.write_all(&teltonika::login(ident)).await.unwrap();
        assert_eq!(receive(&mut stream, 1).await, [1], "{peer}");
    }
    assert!(peers(&world, &channel).await.len() <= 2);
    world.stop().await;
}

/// A header that does not come keeps a place for seconds, and a drain for no longer than it takes to say so.
#[tokio::test]
async fn a_connection_without_a_header_does_not_hold_a_drain() {
    let mut world = World::start(behind()).await;
    let (_, address) = world.open("teltonika").await;
    let mut silent = connect_from(BALANCER, address).await;
    for _ in 0..500 {
        if world.gateway.connections_count() == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(world.stop().await.abandoned, 0);
    assert!(rest(&mut silent).await.is_empty());
}
