//! TLS and UDP.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::ChannelControl;
use fieldline_model::{SeriesKind, Transport};
use fieldline_testkit::teltonika;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::AsyncWriteExt;
use tokio::net::UdpSocket;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::{IMEI, World, config, connect, kinds, packet, payload, receive, rest};

fn write_certificate(folder: &Path) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(folder.join("cert.pem"), made.cert.pem()).unwrap();
    std::fs::write(folder.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    made.cert.der().clone()
}

async fn connect_tls(
    address: std::net::SocketAddr,
    trusted: &CertificateDer<'static>,
) -> std::io::Result<TlsStream<tokio::net::TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, connect(address).await).await
}

#[tokio::test]
async fn tls_carries_a_protocol_and_follows_its_certificate() {
    let mut world = World::start(config()).await;
    let folder = tempfile::tempdir().unwrap();
    let first = write_certificate(folder.path());
    let mut channel = world.new_channel("teltonika", Transport::Tls);
    let file = |name: &str| Some(folder.path().join(name).to_str().unwrap().to_owned());
    (channel.tls_certificate, channel.tls_key) = (file("cert.pem"), file("key.pem"));
    let address = world.create(&channel).await;

    let mut held = connect_tls(address, &first).await.unwrap();
    held.write_all(&teltonika::login(IMEI)).await.unwrap();
    assert_eq!(receive(&mut held, 1).await, [1]);

    // Plain bytes are no handshake.
    let mut plain = connect(address).await;
    plain.write_all(&teltonika::login(IMEI)).await.unwrap();
    rest(&mut plain).await;
    world.closed_with(SeriesKind::ChannelLog, "tls_failed").await;

    // New files are used by new connections; the old one goes on.
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    let second = write_certificate(folder.path());
    let mut renewed = connect_tls(address, &second).await.unwrap();
    renewed.write_all(&teltonika::login("356307042441014")).await.unwrap();
    assert_eq!(receive(&mut renewed, 1).await, [1]);
    assert!(connect_tls(address, &first).await.is_err());
    held.write_all(&packet(1, 3)).await.unwrap();
    assert_eq!(receive(&mut held, 4).await, [0, 0, 0, 3]);

    // Files that cannot be used leave the ones before in force.
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    std::fs::write(folder.path().join("cert.pem"), "no certificate").unwrap();
    connect_tls(address, &second).await.unwrap();
    world.stop().await;
}

#[tokio::test]
async fn a_tls_channel_without_files_says_so_and_is_tried_again() {
    let mut world = World::start(config()).await;
    let folder = tempfile::tempdir().unwrap();
    let mut channel = world.new_channel("teltonika", Transport::Tls);
    let file = |name: &str| Some(folder.path().join(name).to_str().unwrap().to_owned());
    (channel.tls_certificate, channel.tls_key) = (file("cert.pem"), file("key.pem"));
    use fieldline_contracts::registry::RegistryExt;
    world.registry.create_object(world.account, &channel, &crate::actor()).await.unwrap();
    let mut error = None;
    for _ in 0..500 {
        error = world.gateway.status(world.account, channel.id).await.error;
        if error.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(error.unwrap().contains("cert.pem"));
    assert_eq!(world.gateway.problems().await.len(), 1);
    let trusted = write_certificate(folder.path());
    let address = world.address(&channel).await;
    connect_tls(address, &trusted).await.unwrap();
    assert!(world.gateway.problems().await.is_empty());
    world.stop().await;
}

async fn ask(socket: &UdpSocket, datagram: &[u8]) -> Vec<u8> {
    let mut answer = vec![0; 2_000];
    socket.send(datagram).await.unwrap();
    let count = tokio::time::timeout(crate::SOON, socket.recv(&mut answer)).await;
    answer.truncate(count.expect("an answer in time").unwrap());
    answer
}

async fn udp_to(address: std::net::SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(address).await.unwrap();
    socket
}

#[tokio::test]
async fn a_device_over_udp_is_one_connection_wherever_it_sends_from() {
    let mut world = World::start(config()).await;
    let mut channel = world.new_channel("teltonika", Transport::Udp);
    channel.idle_timeout_s = 1;
    let address = world.create(&channel).await;
    for (round, from) in [1_u32, 10, 20, 30, 40].into_iter().enumerate() {
        // Each time from another port, as behind some mobile networks.
        let socket = udp_to(address).await;
        let id = u16::try_from(round).unwrap() + 1;
        let datagram = teltonika::udp_packet(IMEI, id, 5, &payload(from, 3));
        let answer = ask(&socket, &datagram).await;
        assert_eq!(teltonika::udp_accepted(&answer, id, 5), Some(3));
        // The same again is acknowledged and not stored twice.
        let answer = ask(&socket, &datagram).await;
        assert_eq!(teltonika::udp_accepted(&answer, id, 5), Some(3));
    }
    assert_eq!(world.history.all(SeriesKind::Message).len(), 15);
    assert_eq!(world.gateway.connections(world.account, channel.id).await.items.len(), 1);
    let device = world.device(IMEI).await;
    assert!(world.is_online(&device).await);
    world.closed_with(SeriesKind::DeviceLog, "idle_timeout").await;
    world.deserted().await;
    assert!(!world.is_online(&device).await);
    let log = world.log(SeriesKind::DeviceLog).await;
    let connected = kinds(&log).iter().filter(|kind| **kind == "connected").count();
    assert_eq!(connected, 1);
    world.stop().await;
}

#[tokio::test]
async fn a_text_protocol_over_udp() {
    let mut world = World::start(config()).await;
    let channel = world.new_channel("wialon_ips", Transport::Udp);
    let socket = udp_to(world.create(&channel).await).await;
    let answer = ask(&socket, b"77#SD#200424;120000;5630.0000;N;00915.0000;E;50;90;10;8\r\n").await;
    assert_eq!(answer, b"#ASD#1\r\n");
    let device = world.device("77").await;
    let values = world.platform.state.get(world.account, device.id).await.unwrap();
    assert_eq!(values.get("position.speed").unwrap().value.as_i64(), Some(50));
    world.stop().await;
}

#[tokio::test]
async fn a_datagram_above_the_rate_leaves_nothing_behind() {
    let mut world = World::start(config()).await;
    let mut channel = world.new_channel("teltonika", Transport::Udp);
    channel.connection_bytes_per_s_max = 30;
    let socket = udp_to(world.create(&channel).await).await;
    // Ten seconds of the rate are less than the first one.
    let large = teltonika::udp_packet(IMEI, 1, 1, &payload(1, 10));
    assert!(large.len() > 300);
    socket.send(&large).await.unwrap();
    world.closed_with(SeriesKind::ChannelLog, "rate_limited").await;
    assert_eq!(world.gateway.connections_count(), 0);
    let answer = ask(&socket, &teltonika::udp_packet(IMEI, 2, 2, &payload(1, 1))).await;
    assert_eq!(teltonika::udp_accepted(&answer, 2, 2), Some(1));
    assert_eq!(world.gateway.connections_count(), 1);
    assert!(world.is_online(&world.device(IMEI).await).await);
    world.stop().await;
}

#[tokio::test]
async fn strangers_over_udp_cost_nothing_and_get_nothing() {
    let mut world = World::start(config()).await;
    let mut channel = world.new_channel("teltonika", Transport::Udp);
    channel.auto_register = false;
    let address = world.create(&channel).await;
    let socket = udp_to(address).await;
    for number in 0..200_u8 {
        let unknown = teltonika::udp_packet(IMEI, 1, 1, &payload(1, 1));
        socket.send(&unknown).await.unwrap();
        socket.send(&[number; 40]).await.unwrap();
    }
    world.closed_with(SeriesKind::ChannelLog, "unknown_device").await;
    assert_eq!(world.gateway.connections_count(), 0);
    assert!(world.history.all(SeriesKind::Message).is_empty());
    let mut answer = [0; 100];
    let positive = loop {
        match tokio::time::timeout(Duration::from_millis(200), socket.recv(&mut answer)).await {
            Ok(Ok(count)) if teltonika::udp_accepted(&answer[..count], 1, 1) > Some(0) => {
                break true;
            }
            Ok(_) => {}
            Err(_) => break false,
        }
    };
    assert!(!positive);
    // And who is known is served all the while.
    world.register(IMEI).await;
    let known = teltonika::udp_packet(IMEI, 2, 2, &payload(1, 1));
    let answer = ask(&socket, &known).await;
    assert_eq!(teltonika::udp_accepted(&answer, 2, 2), Some(1));
    world.stop().await;
}
