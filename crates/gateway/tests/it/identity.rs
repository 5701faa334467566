//! Who is let in, and what happens when two are the same.

use fieldline_contracts::registry::RegistryExt;
use fieldline_contracts::{ChannelControl, Kind, Registry};
use fieldline_ingest::stored_event;
use fieldline_model::{EventKind, SeriesKind, Transport, Value};
use fieldline_testkit::teltonika;
use tokio::io::AsyncWriteExt;

use crate::{IMEI, World, actor, config, connect, kinds, login, packet, receive, rest};

#[tokio::test]
async fn an_unknown_device_is_refused_in_its_protocols_words() {
    let mut world = World::start(config()).await;
    let mut channel = world.new_channel("teltonika", Transport::Tcp);
    channel.auto_register = false;
    let address = world.create(&channel).await;
    let mut stream = connect(address).await;
    stream.write_all(&teltonika::login(IMEI)).await.unwrap();
    assert_eq!(rest(&mut stream).await, [0]);
    world.closed_with(SeriesKind::ChannelLog, "unknown_device").await;
    let log = world.log(SeriesKind::ChannelLog).await;
    let refused = log.iter().find(|l| kinds(std::slice::from_ref(l)) == ["refused"]).unwrap();
    assert_eq!(refused.params().get("ident"), Some(&Value::from(IMEI)));
    assert!(refused.params().get("peer").is_some());
    let events = world.log(SeriesKind::Event).await;
    let event = events.iter().filter_map(stored_event).next().unwrap();
    assert_eq!((event.kind, event.object), (EventKind::Rejected, channel.id.0));

    // Once it is registered it is let in, and at once.
    world.register(IMEI).await;
    login(address, IMEI).await;

    // And the text protocol, in its own words.
    let mut channel = world.new_channel("wialon_ips", Transport::Tcp);
    channel.auto_register = false;
    let mut stream = connect(world.create(&channel).await).await;
    stream.write_all(b"#L#77;NA\r\n").await.unwrap();
    assert_eq!(rest(&mut stream).await, b"#AL#0\r\n");
    world.stop().await;
}

#[tokio::test]
async fn an_unknown_device_registers_itself_where_the_channel_lets_it() {
    let mut world = World::start(config()).await;
    let (channel, address) = world.open("teltonika").await;
    let mut stream = login(address, IMEI).await;
    let device = world.device(IMEI).await;
    assert_eq!((device.name.as_str(), device.protocol.as_str()), (IMEI, "teltonika"));
    assert!(world.is_online(&device).await);
    stream.write_all(&packet(1, 2)).await.unwrap();
    assert_eq!(receive(&mut stream, 4).await, [0, 0, 0, 2]);

    let connections = world.gateway.connections(world.account, channel.id).await.items;
    assert_eq!(connections.len(), 1);
    assert_eq!((connections[0].device, connections[0].messages), (Some(device.id), 2));
    assert_eq!(connections[0].ident.as_deref(), Some(IMEI));
    assert!(connections[0].received_bytes > 100 && connections[0].sent_bytes == 5);
    // Nobody else sees or closes it.
    let other = fieldline_model::AccountId::new(world.ingest.now(), [9; 10]);
    assert!(world.gateway.connections(other, channel.id).await.items.is_empty());
    assert_eq!(world.gateway.close(other, channel.id, connections[0].id).await, Ok(false));
    assert!(!world.gateway.status(other, channel.id).await.listening);

    assert_eq!(world.gateway.close(world.account, channel.id, connections[0].id).await, Ok(true));
    rest(&mut stream).await;
    world.closed_with(SeriesKind::DeviceLog, "closed_by_operator").await;
    world.deserted().await;
    assert!(!world.is_online(&device).await);
    let events: Vec<EventKind> = world
        .log(SeriesKind::Event)
        .await
        .iter()
        .filter_map(stored_event)
        .map(|event| event.kind)
        .collect();
    assert_eq!(events, [EventKind::Registered, EventKind::Online, EventKind::Offline]);
    let log = world.log(SeriesKind::DeviceLog).await;
    let expected = ["connected", "login", "frame", "reply", "frame", "reply", "closed"];
    assert_eq!(kinds(&log), expected);
    let frame = log[2].params();
    assert_eq!(frame.get("channel.id"), Some(&Value::from(channel.id.to_string())));
    assert_eq!(frame.get("protocol"), Some(&Value::from("teltonika")));
    assert_eq!(frame.get("transport"), Some(&Value::from("tcp")));
    world.stop().await;
}

#[tokio::test]
async fn the_newest_connection_of_a_device_wins() {
    let mut world = World::start(config()).await;
    let (_, address) = world.open("teltonika").await;
    let mut streams = Vec::new();
    // Enough that both event loops get some.
    for round in 0..8 {
        let mut stream = login(address, IMEI).await;
        stream.write_all(&packet(round + 1, 1)).await.unwrap();
        assert_eq!(receive(&mut stream, 4).await, [0, 0, 0, 1]);
        streams.push(stream);
    }
    let newest = streams.pop().unwrap();
    for mut old in streams {
        assert!(rest(&mut old).await.is_empty());
    }
    let device = world.device(IMEI).await;
    for _ in 0..500 {
        if world.gateway.connections_count() == 1 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert!(world.is_online(&device).await, "the old ones' ends do not take it offline");
    assert_eq!(world.closes(SeriesKind::DeviceLog).await, ["replaced"; 7]);
    let events = world.log(SeriesKind::Event).await;
    let presence = events.iter().filter_map(stored_event).map(|event| event.kind);
    let presence: Vec<EventKind> = presence.collect();
    assert_eq!(presence, [EventKind::Registered, EventKind::Online]);
    drop(newest);
    world.closed_with(SeriesKind::DeviceLog, "device_closed").await;
    world.stop().await;
}

#[tokio::test]
async fn a_disabled_or_deleted_device_is_let_go() {
    let mut world = World::start(config()).await;
    let (_, address) = world.open("teltonika").await;
    let mut device = world.register(IMEI).await;
    let mut stream = login(address, IMEI).await;
    device.enabled = false;
    world.registry.update_object(world.account, &device, None, &actor()).await.unwrap();
    rest(&mut stream).await;
    world.closed_with(SeriesKind::DeviceLog, "device_disabled").await;
    // And is not let in again.
    let mut stream = connect(address).await;
    stream.write_all(&teltonika::login(IMEI)).await.unwrap();
    assert_eq!(rest(&mut stream).await, [0]);
    world.closed_with(SeriesKind::ChannelLog, "device_disabled").await;

    let other = world.register("356307042441014").await;
    let mut stream = login(address, "356307042441014").await;
    let (account, registry) = (world.account, &world.registry);
    registry.delete(account, Kind::Device, other.id.0, None, &actor()).await.unwrap();
    rest(&mut stream).await;
    world.closed_with(SeriesKind::DeviceLog, "unknown_device").await;
    world.stop().await;
}

#[tokio::test]
async fn a_device_of_another_protocol_is_refused() {
    let mut world = World::start(config()).await;
    let (_, address) = world.open("teltonika").await;
    let mut device = world.register(IMEI).await;
    device.protocol = "wialon_ips".to_owned();
    world.registry.update_object(world.account, &device, None, &actor()).await.unwrap();
    let mut stream = connect(address).await;
    stream.write_all(&teltonika::login(IMEI)).await.unwrap();
    assert_eq!(rest(&mut stream).await, [0]);
    world.closed_with(SeriesKind::ChannelLog, "unknown_device").await;
    let log = world.log(SeriesKind::ChannelLog).await;
    let refused = log.iter().find(|l| kinds(std::slice::from_ref(l)) == ["refused"]).unwrap();
    let text = refused.params().get("text").and_then(Value::as_str).unwrap();
    assert!(text.contains("wialon_ips") && text.contains("teltonika"), "{text}");
    device.protocol = "teltonika".to_owned();
    world.registry.update_object(world.account, &device, None, &actor()).await.unwrap();
    let mut stream = login(address, IMEI).await;
    // Changed under an open connection, it ends.
    device.protocol = "wialon_ips".to_owned();
    world.registry.update_object(world.account, &device, None, &actor()).await.unwrap();
    assert!(rest(&mut stream).await.is_empty());
    world.stop().await;
}

#[tokio::test]
async fn an_ident_that_cannot_be_one_registers_nothing() {
    let mut world = World::start(config()).await;
    let (_, address) = world.open("wialon_ips").await;
    for ident in ["a/b", "a+b", "a\u{202e}b"] {
        let mut stream = connect(address).await;
        stream.write_all(format!("#L#{ident};NA\r\n").as_bytes()).await.unwrap();
        assert_eq!(rest(&mut stream).await, b"#AL#0\r\n", "{ident:?}");
    }
    let log = world.log(SeriesKind::ChannelLog).await;
    let mut texts = log.iter().filter_map(|l| l.params().get("text").and_then(Value::as_str));
    assert!(texts.any(|text| text.contains("without # + /")), "{log:?}");
    // Over UDP nothing is believed of a datagram of no known type.
    let udp = world.create(&world.new_channel("wialon_ips", Transport::Udp)).await;
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(udp).await.unwrap();
    for junk in [&b"=+c#x#y"[..], b"abc###", b"zz#\x01#", b"~&#SDX#1"] {
        socket.send(junk).await.unwrap();
    }
    let said = b"78#SD#200424;120000;5630.0000;N;00915.0000;E;50;90;10;8\r\n";
    socket.send(said).await.unwrap();
    let mut bytes = [0; 100];
    let answer = tokio::time::timeout(crate::SOON, socket.recv(&mut bytes)).await;
    assert_eq!(&bytes[..answer.unwrap().unwrap()], b"#ASD#1\r\n");
    let page = fieldline_contracts::Page::first(100);
    let devices =
        world.registry.list_objects::<fieldline_model::Device>(world.account, &page).await.unwrap();
    assert_eq!(devices.len(), 1, "{devices:?}");
    world.stop().await;
}

#[tokio::test]
async fn a_wrong_password_is_refused() {
    let mut world = World::start(config()).await;
    let (_, address) = world.open("wialon_ips").await;
    let mut device = world.register("77").await;
    device.settings.insert("password".to_owned(), "secret".into());
    world.registry.update_object(world.account, &device, None, &actor()).await.unwrap();
    for guess in [&b"guess"[..], b"NA", b"", b"\xff", b"secret\xff"] {
        let mut wrong = connect(address).await;
        wrong.write_all(&[b"#L#77;", guess, b"\r\n"].concat()).await.unwrap();
        let answer = rest(&mut wrong).await;
        assert!(answer.starts_with(b"#AL#0"), "{guess:?}: {answer:?}");
    }
    // Nor is a protocol without passwords a way round.
    let udp = world.create(&world.new_channel("wialon_ips", Transport::Udp)).await;
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let line = b"77#SD#200424;120000;5630.0000;N;00915.0000;E;50;90;10;8\r\n";
    socket.send_to(line, udp).await.unwrap();
    let (_, other) = world.open("teltonika").await;
    let mut wrong = connect(other).await;
    wrong.write_all(&teltonika::login("77")).await.unwrap();
    assert_eq!(rest(&mut wrong).await, [0]);
    assert!(world.history.all(SeriesKind::Message).is_empty());
    let mut right = connect(address).await;
    right.write_all(b"#L#77;secret\r\n").await.unwrap();
    assert_eq!(receive(&mut right, 7).await, b"#AL#1\r\n");
    world.stop().await;
}
