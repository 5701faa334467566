//! Changes while devices are connected.

use std::time::Duration;

use fieldline_contracts::registry::RegistryExt;
use fieldline_contracts::{ChannelControl, Kind, Registry};
use fieldline_model::{Account, Protocol, ProtocolId, SeriesKind};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::{IMEI, World, actor, config, connect, kinds, login, packet, receive, rest};

async fn serves(stream: &mut TcpStream, from: u32) {
    stream.write_all(&packet(from, 1)).await.unwrap();
    assert_eq!(receive(stream, 4).await, [0, 0, 0, 1]);
}

#[tokio::test]
async fn channels_come_change_and_go_without_touching_others() {
    let mut world = World::start(config()).await;
    let (_, other) = world.open("teltonika").await;
    let mut bystander = login(other, "1").await;
    let (mut channel, address) = world.open("teltonika").await;
    let mut stream = login(address, IMEI).await;

    // A setting that needs no other listener: connections stay.
    channel.idle_timeout_s = 5_000;
    channel.name = "renamed".to_owned();
    channel.auto_register = false;
    world.update(&channel).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    serves(&mut stream, 1).await;
    let mut refused = connect(address).await;
    refused.write_all(&fieldline_testkit::teltonika::login("2")).await.unwrap();
    assert_eq!(rest(&mut refused).await, [0]);

    // Another port: connections are closed, the new one listens, the old one does not.
    let elsewhere = world.new_channel("teltonika", channel.transport);
    channel.listen = elsewhere.listen;
    world.update(&channel).await;
    rest(&mut stream).await;
    world.closed_with(SeriesKind::DeviceLog, "channel_changed").await;
    let mut moved = address;
    for _ in 0..500 {
        moved = world.address(&channel).await;
        if moved != address {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut stream = login(moved, IMEI).await;
    assert!(TcpStream::connect(address).await.is_err());

    channel.enabled = false;
    world.update(&channel).await;
    rest(&mut stream).await;
    assert!(TcpStream::connect(moved).await.is_err());
    assert!(!world.gateway.status(world.account, channel.id).await.listening);
    channel.enabled = true;
    world.update(&channel).await;
    let moved = world.address(&channel).await;
    let mut stream = login(moved, IMEI).await;
    let (account, registry) = (world.account, &world.registry);
    registry.delete(account, Kind::Channel, channel.id.0, None, &actor()).await.unwrap();
    rest(&mut stream).await;
    assert!(TcpStream::connect(moved).await.is_err());

    serves(&mut bystander, 1).await;
    let log = world.log(SeriesKind::ChannelLog).await;
    let kinds = kinds(&log);
    assert_eq!(kinds.iter().filter(|kind| **kind == "started").count(), 4);
    assert_eq!(kinds.iter().filter(|kind| **kind == "stopped").count(), 3);
    world.stop().await;
}

#[tokio::test]
async fn a_taken_port_is_told_and_tried_again() {
    let mut world = World::start(config()).await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let mut channel = world.new_channel("teltonika", fieldline_model::Transport::Tcp);
    channel.listen = address.to_string();
    world.registry.create_object(world.account, &channel, &actor()).await.unwrap();
    let mut problems = Vec::new();
    for _ in 0..500 {
        problems = world.gateway.problems().await;
        if !problems.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(problems[0].contains(&address.to_string()), "{problems:?}");
    drop(taken);
    assert_eq!(world.address(&channel).await, address);
    login(address, IMEI).await;
    world.stop().await;
}

fn own_protocol(world: &World, name: &str, source: String, version: u32) -> Protocol {
    let now = world.ingest.now();
    Protocol {
        id: ProtocolId::new(now, [version.to_be_bytes()[3]; 10]),
        account: world.account,
        name: name.to_owned(),
        source,
        version,
        created_at: now,
        updated_at: now,
    }
}

#[tokio::test]
async fn a_protocol_is_replaced_for_new_connections_only() {
    let mut world = World::start(config()).await;
    let (_, source) =
        fieldline_pvm::library::built_in().iter().find(|(name, _)| *name == "wialon_ips").unwrap();
    // Known by its words to a ping.
    let changed = source.replace("#AP#", "#AP#2");
    assert_ne!(changed, *source, "the protocol has the words that this test changes");
    let (_, teltonika) = world.open("teltonika").await;
    let mut bystander = login(teltonika, "1").await;
    let (channel, address) = world.open("wialon_ips").await;
    let ping = async |stream: &mut TcpStream| {
        stream.write_all(b"#P#\r\n").await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n") {
            answer.extend(receive(stream, 1).await);
        }
        String::from_utf8(answer).unwrap()
    };
    let log_in = async |ident: &str| {
        let mut stream = connect(address).await;
        stream.write_all(format!("#L#{ident};NA\r\n").as_bytes()).await.unwrap();
        assert_eq!(receive(&mut stream, 7).await, b"#AL#1\r\n");
        stream
    };
    let mut old = log_in("77").await;
    assert_eq!(ping(&mut old).await, "#AP#\r\n");

    let mut own = own_protocol(&world, "wialon_ips", changed, 1);
    world.registry.create_object(world.account, &own, &actor()).await.unwrap();
    let compiled = async |count: usize| {
        for _ in 0..500 {
            let log = world.log(SeriesKind::ChannelLog).await;
            if kinds(&log).iter().filter(|kind| **kind == "compile").count() == count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the change was not taken over");
    };
    compiled(1).await;
    assert_eq!(ping(&mut log_in("78").await).await, "#AP#2\r\n");
    assert_eq!(ping(&mut old).await, "#AP#\r\n", "who was connected goes on as before");
    serves(&mut bystander, 1).await;

    // A source that does not compile changes nothing but the channel's status.
    (own.source, own.version) = ("this is no protocol".to_owned(), 2);
    world.registry.update_object(world.account, &own, None, &actor()).await.unwrap();
    let mut error = None;
    for _ in 0..500 {
        let status = world.gateway.status(world.account, channel.id).await;
        assert!(status.listening);
        error = status.error;
        if error.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(error.unwrap().contains("does not compile"));
    assert_eq!(ping(&mut log_in("79").await).await, "#AP#2\r\n");

    // Deleted: the built-in one is in force again.
    let (account, id) = (world.account, own.id.0);
    world.registry.delete(account, Kind::Protocol, id, None, &actor()).await.unwrap();
    compiled(2).await;
    assert_eq!(ping(&mut log_in("80").await).await, "#AP#\r\n");
    serves(&mut bystander, 2).await;
    world.stop().await;
}

#[tokio::test]
async fn a_channel_waits_for_its_protocol() {
    let mut world = World::start(config()).await;
    let channel = world.new_channel("mine", fieldline_model::Transport::Tcp);
    world.registry.create_object(world.account, &channel, &actor()).await.unwrap();
    let mut problems = Vec::new();
    for _ in 0..500 {
        problems = world.gateway.problems().await;
        if !problems.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(problems[0].contains("there is no protocol `mine`"), "{problems:?}");
    let (_, source) =
        fieldline_pvm::library::built_in().iter().find(|(name, _)| *name == "teltonika").unwrap();
    let own = own_protocol(&world, "mine", (*source).to_owned(), 1);
    world.registry.create_object(world.account, &own, &actor()).await.unwrap();
    login(world.address(&channel).await, IMEI).await;
    world.stop().await;
}

#[tokio::test]
async fn a_disabled_account_has_no_channels() {
    let mut world = World::start(config()).await;
    let (channel, address) = world.open("teltonika").await;
    let mut account = Account {
        id: world.account,
        name: "tenant".to_owned(),
        enabled: false,
        retention_days: 0,
        storage_bytes_max: 0,
        labels: Default::default(),
        created_at: world.ingest.now(),
    };
    let mut stream = login(address, IMEI).await;
    world.registry.create_object(world.account, &account, &actor()).await.unwrap();
    rest(&mut stream).await;
    assert!(TcpStream::connect(address).await.is_err());
    account.enabled = true;
    world.registry.update_object(world.account, &account, None, &actor()).await.unwrap();
    login(world.address(&channel).await, IMEI).await;
    world.stop().await;
}

#[tokio::test]
async fn settings_of_a_device_reach_its_connection() {
    let mut world = World::start(config()).await;
    let (_, address) = world.open("teltonika").await;
    let mut device = world.register(IMEI).await;
    let mut stream = login(address, IMEI).await;
    device.settings.insert("io16".to_owned(), true.into());
    world.registry.update_object(world.account, &device, None, &actor()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    // The connection goes on; codec 8E does not depend on the setting.
    serves(&mut stream, 1).await;
    world.stop().await;
}
