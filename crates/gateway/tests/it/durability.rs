//! Acknowledge only what is durable.

use std::time::Duration;

use fieldline_contracts::HistoryError;
use fieldline_model::{SeriesKind, Transport, Value};
use fieldline_testkit::{Script, teltonika};
use tokio::io::AsyncWriteExt;

use crate::{IMEI, World, config, connect, is_silent, login, packet, payload, receive, rest};

#[tokio::test]
async fn an_acknowledgement_waits_for_the_disk() {
    let mut world = World::start(config()).await;
    let (_, address) = world.open("teltonika").await;
    let mut stream = login(address, IMEI).await;
    let held = world.history.hold().await;
    stream.write_all(&packet(1, 2)).await.unwrap();
    assert!(is_silent(&mut stream).await, "nothing before it is durable");
    assert!(world.history.all(SeriesKind::Message).is_empty());
    drop(held);
    assert_eq!(receive(&mut stream, 4).await, [0, 0, 0, 2]);
    assert_eq!(world.history.all(SeriesKind::Message).len(), 2);
    world.stop().await;
}

#[tokio::test]
async fn what_cannot_be_stored_is_not_acknowledged_and_the_reason_is_visible() {
    let mut world = World::start(config()).await;
    let (_, address) = world.open("teltonika").await;
    let errors = [
        (HistoryError::Full("no space on /data".to_owned()), "no space is left"),
        (HistoryError::Failed("write /data/wal: sync".to_owned()), "not stored for sure"),
    ];
    for (error, text) in errors {
        let mut stream = login(address, IMEI).await;
        world.history.play([Script::Fail(error)]);
        stream.write_all(&packet(1, 3)).await.unwrap();
        assert!(rest(&mut stream).await.is_empty(), "no acknowledgement");
        world.closed_with(SeriesKind::DeviceLog, "storage_unavailable").await;
        let log = world.log(SeriesKind::DeviceLog).await;
        let texts: Vec<&str> =
            log.iter().filter_map(|l| l.params().get("text").and_then(Value::as_str)).collect();
        assert!(texts.iter().any(|told| told.contains(text)), "{texts:?}");
        // Where the operator stores it is not the tenant's.
        assert!(!texts.iter().any(|told| told.contains("/data")), "{texts:?}");
        assert!(world.history.all(SeriesKind::Message).is_empty());
    }
    // It comes again, and is stored once.
    let mut stream = login(address, IMEI).await;
    world.history.play([Script::StoreAndFail(HistoryError::Failed("sync".to_owned()))]);
    stream.write_all(&packet(1, 3)).await.unwrap();
    assert!(rest(&mut stream).await.is_empty());
    let mut stream = login(address, IMEI).await;
    stream.write_all(&packet(1, 3)).await.unwrap();
    assert_eq!(receive(&mut stream, 4).await, [0, 0, 0, 3]);
    assert_eq!(world.history.all(SeriesKind::Message).len(), 3);
    let device = world.device(IMEI).await;
    let values = world.platform.state.get(world.account, device.id).await.unwrap();
    assert!(values.contains_key("position.latitude"));

    // A store that is only busy is waited for.
    world.history.play([Script::Fail(HistoryError::Busy), Script::Fail(HistoryError::Busy)]);
    stream.write_all(&packet(10, 1)).await.unwrap();
    assert_eq!(receive(&mut stream, 4).await, [0, 0, 0, 1]);
    world.stop().await;
}

#[tokio::test]
async fn frames_that_come_together_are_stored_together_and_answered_in_order() {
    let mut world = World::start(config()).await;
    let (_, address) = world.open("teltonika").await;
    let mut stream = login(address, IMEI).await;
    let before = world.history.appends();
    let packets: Vec<u8> = (0..50).flat_map(|n| packet(1 + n * 10, 1 + n % 5)).collect();
    stream.write_all(&packets).await.unwrap();
    for n in 0..50_u32 {
        assert_eq!(receive(&mut stream, 4).await, (1 + n % 5).to_be_bytes());
    }
    let appends = world.history.appends() - before;
    assert!(appends <= 10, "{appends} appends for 50 frames");
    let stored = world.history.all(SeriesKind::Message);
    assert_eq!(stored.len(), 150);
    assert!(stored.is_sorted_by_key(|message| message.timestamp()), "in the order they came");
    world.stop().await;
}

#[tokio::test]
async fn a_datagram_is_acknowledged_when_it_is_durable() {
    let mut world = World::start(config()).await;
    let channel = world.new_channel("teltonika", Transport::Udp);
    let address = world.create(&channel).await;
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(address).await.unwrap();
    let held = world.history.hold().await;
    socket.send(&teltonika::udp_packet(IMEI, 7, 9, &payload(1, 2))).await.unwrap();
    let mut answer = [0; 64];
    let early = tokio::time::timeout(Duration::from_millis(150), socket.recv(&mut answer)).await;
    assert!(early.is_err());
    drop(held);
    let count = socket.recv(&mut answer).await.unwrap();
    assert_eq!(teltonika::udp_accepted(&answer[..count], 7, 9), Some(2));
    world.history.play([Script::Fail(HistoryError::Full("disk".to_owned()))]);
    socket.send(&teltonika::udp_packet(IMEI, 8, 9, &payload(5, 2))).await.unwrap();
    let never = tokio::time::timeout(Duration::from_millis(150), socket.recv(&mut answer)).await;
    assert!(never.is_err());
    world.stop().await;
}

#[tokio::test]
async fn shutdown_finishes_what_is_in_hand() {
    let mut world = World::start(config()).await;
    let (_, address) = world.open("teltonika").await;
    let mut busy = login(address, IMEI).await;
    let mut idle = login(address, "356307042441014").await;
    let _silent = connect(address).await;
    world.history.set_delay(Duration::from_millis(300));
    busy.write_all(&packet(1, 4)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let drained = world.stop().await;
    assert_eq!(drained.abandoned, 0);
    // The frame in hand was stored and answered, then the connection closed.
    assert_eq!(rest(&mut busy).await, [0, 0, 0, 4]);
    assert!(rest(&mut idle).await.is_empty());
    assert_eq!(world.history.all(SeriesKind::Message).len(), 4);
    assert_eq!(world.closes(SeriesKind::DeviceLog).await, ["shutdown"; 2]);
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
    for imei in [IMEI, "356307042441014"] {
        let device = world.device(imei).await;
        assert!(!world.is_online(&device).await);
    }
}

#[tokio::test]
async fn shutdown_cuts_what_does_not_end() {
    let mut config = config();
    config.drain_timeout = Duration::from_millis(200);
    let mut world = World::start(config).await;
    let (_, address) = world.open("teltonika").await;
    let mut stuck = login(address, IMEI).await;
    let history = std::sync::Arc::clone(&world.history);
    let _held = history.hold().await;
    stuck.write_all(&packet(1, 1)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(world.stop().await.abandoned, 1);
    assert!(rest(&mut stuck).await.is_empty(), "and what was cut is not acknowledged");
}
