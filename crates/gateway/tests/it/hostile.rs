//! Bad input: each gets its close code, and nobody else feels it.

use std::time::{Duration, Instant};

use fieldline_gateway::GatewayConfig;
use fieldline_model::{SeriesKind, Transport};
use fieldline_testkit::route::Random;
use tokio::io::AsyncWriteExt;

use crate::{IMEI, World, config, connect, is_silent, kinds, login, packet, receive, rest};

#[tokio::test]
async fn silence_has_an_end() {
    let config = GatewayConfig { login_timeout: Duration::from_millis(300), ..config() };
    let mut world = World::start(config).await;
    let mut channel = world.new_channel("teltonika", Transport::Tcp);
    channel.idle_timeout_s = 1;
    let address = world.create(&channel).await;
    // Never a byte; then a login that is never finished.
    let mut silent = connect(address).await;
    let mut slow = connect(address).await;
    slow.write_all(&[0, 15, b'3']).await.unwrap();
    rest(&mut silent).await;
    rest(&mut slow).await;
    world.deserted().await;
    assert_eq!(world.closes(SeriesKind::ChannelLog).await, ["login_timeout", "login_timeout"]);
    let begun = Instant::now();
    let mut idle = login(address, IMEI).await;
    rest(&mut idle).await;
    assert!(begun.elapsed() >= Duration::from_millis(900));
    world.closed_with(SeriesKind::DeviceLog, "idle_timeout").await;
    world.stop().await;
}

#[tokio::test]
async fn a_frame_that_drips_is_cut() {
    let config = GatewayConfig { frame_timeout: Duration::from_millis(500), ..config() };
    let mut world = World::start(config).await;
    let (_, address) = world.open("teltonika").await;
    let mut stream = login(address, IMEI).await;
    // A byte now and then keeps no connection: the time counts from the frame's first.
    for byte in packet(1, 1) {
        if stream.write_all(&[byte]).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    rest(&mut stream).await;
    world.closed_with(SeriesKind::DeviceLog, "frame_timeout").await;
    // Frames that are done in time may come for ever.
    let mut stream = login(address, IMEI).await;
    for round in 1..6 {
        let packet = packet(round, 1);
        let (head, tail) = packet.split_at(20);
        stream.write_all(head).await.unwrap();
        tokio::time::sleep(Duration::from_millis(150)).await;
        stream.write_all(tail).await.unwrap();
        assert_eq!(receive(&mut stream, 4).await, [0, 0, 0, 1]);
    }
    world.stop().await;
}

#[tokio::test]
async fn a_frame_too_large_is_cut_before_it_is_kept() {
    let mut world = World::start(config()).await;
    let mut channel = world.new_channel("teltonika", Transport::Tcp);
    channel.frame_bytes_max = 2_000;
    let address = world.create(&channel).await;
    let mut stream = login(address, IMEI).await;
    // The length says 16 MiB; the device goes on sending.
    let head = [0, 0, 0, 0, 1, 0, 0, 0, 8, 1];
    let mut refused = stream.write_all(&head).await.is_err();
    for _ in 0..64 {
        refused |= stream.write_all(&[0; 1_024]).await.is_err();
    }
    rest(&mut stream).await;
    world.closed_with(SeriesKind::DeviceLog, "frame_too_large").await;
    let _either_way = refused;

    let mut channel = world.new_channel("wialon_ips", Transport::Tcp);
    channel.frame_bytes_max = 2_000;
    let mut stream = connect(world.create(&channel).await).await;
    stream.write_all(b"#L#77;NA\r\n").await.unwrap();
    assert_eq!(receive(&mut stream, 7).await, b"#AL#1\r\n");
    stream.write_all(b"#D#").await.unwrap();
    let endless = stream.write_all(&[b'7'; 200_000]).await;
    let _either_way = endless;
    rest(&mut stream).await;
    world.deserted().await;
    assert_eq!(world.closes(SeriesKind::DeviceLog).await, ["frame_too_large"; 2]);
    world.stop().await;
}

#[tokio::test]
async fn other_protocols_are_recognised() {
    let mut world = World::start(config()).await;
    for protocol in ["teltonika", "wialon_ips"] {
        let (_, address) = world.open(protocol).await;
        for hello in [
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".as_slice(),
            b"SSH-2.0-OpenSSH_9.6\r\n",
            &[0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01, 0xfc, 0x03, 0x03],
        ] {
            let mut stream = connect(address).await;
            stream.write_all(hello).await.unwrap();
            let begun = Instant::now();
            rest(&mut stream).await;
            assert!(begun.elapsed() < Duration::from_secs(5), "{protocol}: at once");
        }
    }
    world.deserted().await;
    let closes = world.closes(SeriesKind::ChannelLog).await;
    assert_eq!(closes, ["wrong_protocol"; 6], "{closes:?}");
    world.stop().await;
}

#[tokio::test]
async fn random_bytes_end_with_a_code_and_store_nothing() {
    let config = GatewayConfig {
        login_timeout: Duration::from_millis(500),
        frame_timeout: Duration::from_millis(500),
        ..config()
    };
    let mut world = World::start(config).await;
    let mut random = Random::new(7);
    for protocol in ["teltonika", "wialon_ips"] {
        let (_, address) = world.open(protocol).await;
        for round in 0..30_usize {
            let mut stream = connect(address).await;
            let bytes: Vec<u8> =
                (0..20 + round * 40).map(|_| random.next_u64().to_be_bytes()[0]).collect();
            // The gateway may hang up before it has read all.
            let written = stream.write_all(&bytes).await;
            let _either_way = written;
        }
    }
    world.deserted().await;
    assert!(world.history.all(SeriesKind::Message).is_empty());
    assert!(!world.closes(SeriesKind::ChannelLog).await.is_empty());
    world.stop().await;
}

#[tokio::test]
async fn a_wrong_checksum_is_not_acknowledged() {
    let mut world = World::start(config()).await;
    let (_, address) = world.open("teltonika").await;
    let mut stream = login(address, IMEI).await;
    let mut wrong = packet(1, 2);
    *wrong.last_mut().unwrap() ^= 1;
    stream.write_all(&wrong).await.unwrap();
    stream.shutdown().await.unwrap();
    let answer = rest(&mut stream).await;
    assert!(answer.is_empty() || answer == [0, 0, 0, 0], "{answer:?}");
    world.deserted().await;
    assert!(world.history.all(SeriesKind::Message).is_empty());
    let log = world.log(SeriesKind::DeviceLog).await;
    let error = log.iter().find(|l| kinds(std::slice::from_ref(l)) == ["error"]).unwrap();
    assert_eq!(error.params().get("error.class").unwrap().as_str(), Some("bad_crc"));
    assert!(error.params().get("frame.hex").is_some());
    world.stop().await;
}

#[tokio::test]
async fn messages_before_a_login_are_neither_kept_nor_acknowledged() {
    let mut world = World::start(config()).await;
    let (_, address) = world.open("teltonika").await;
    let mut stream = connect(address).await;
    stream.write_all(&packet(1, 3)).await.unwrap();
    let answer = if is_silent(&mut stream).await { Vec::new() } else { rest(&mut stream).await };
    assert!(answer.is_empty(), "{answer:?}");
    assert!(world.history.all(SeriesKind::Message).is_empty());
    world.stop().await;
}

#[tokio::test]
async fn the_rate_of_bytes_has_a_limit() {
    let mut world = World::start(config()).await;
    let mut channel = world.new_channel("teltonika", Transport::Tcp);
    channel.connection_bytes_per_s_max = 500;
    let address = world.create(&channel).await;
    let mut stream = login(address, IMEI).await;
    let mut acked = 0;
    for round in 0..200 {
        if stream.write_all(&packet(1 + round * 10, 10)).await.is_err() {
            break;
        }
        let answer = tokio::io::AsyncReadExt::read(&mut stream, &mut [0; 4]).await;
        if !matches!(answer, Ok(4)) {
            break;
        }
        acked += 1;
    }
    assert!((1..100).contains(&acked), "{acked}");
    world.closed_with(SeriesKind::DeviceLog, "rate_limited").await;
    world.stop().await;
}

#[tokio::test]
async fn connections_have_a_limit() {
    let config = GatewayConfig { connections_per_address_max: 3, ..config() };
    let mut world = World::start(config).await;
    let mut channel = world.new_channel("teltonika", Transport::Tcp);
    channel.connections_max = 2;
    let address = world.create(&channel).await;
    let first = login(address, "1").await;
    let _second = login(address, "2").await;
    let mut third = connect(address).await;
    assert!(rest(&mut third).await.is_empty());
    world.closed_with(SeriesKind::ChannelLog, "too_many_connections").await;
    drop(first);
    world.closed_with(SeriesKind::DeviceLog, "device_closed").await;
    for _ in 0..500 {
        if world.gateway.connections_count() == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    login(address, "3").await;

    let (_, address) = world.open("teltonika").await;
    let mut held = Vec::new();
    for number in 0..3 {
        held.push(login(address, &format!("10{number}")).await);
    }
    let mut fourth = connect(address).await;
    assert!(rest(&mut fourth).await.is_empty());
    world.stop().await;
}

/// Resident memory of this process, in bytes.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4_096
}

#[tokio::test]
async fn many_connections_that_send_nothing_cost_little() {
    const COUNT: u64 = 2_000;
    let config = GatewayConfig { login_timeout: Duration::from_secs(120), ..config() };
    let mut world = World::start(config).await;
    let (_, address) = world.open("teltonika").await;
    let mut warm = Vec::new();
    for _ in 0..200 {
        warm.push(connect(address).await);
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let before = resident_bytes();
    let mut silent = Vec::new();
    for _ in 0..COUNT {
        silent.push(connect(address).await);
    }
    for _ in 0..500 {
        if world.gateway.connections_count() as u64 == COUNT + 200 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(world.gateway.connections_count() as u64, COUNT + 200);
    // Ours and the test's own end of each.
    let each = resident_bytes().saturating_sub(before) / COUNT;
    assert!(each < 6 << 10, "{each} bytes for each silent connection");
    // A device gets its answer as ever.
    let mut stream = login(address, IMEI).await;
    let begun = Instant::now();
    for round in 0..20 {
        stream.write_all(&packet(1 + round, 1)).await.unwrap();
        receive(&mut stream, 4).await;
    }
    assert!(begun.elapsed() < Duration::from_secs(2));
    drop(silent);
    drop(warm);
    drop(stream);
    world.deserted().await;
    let lines = world.closes(SeriesKind::ChannelLog).await.len();
    assert!(lines < 200, "{lines} lines for {COUNT} connections");
    let log = world.log(SeriesKind::ChannelLog).await;
    let counted = |line: &fieldline_model::Stored| line.params().get("suppressed")?.as_i64();
    // What was held back is told by the next line that is not.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut last = connect(address).await;
    last.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    rest(&mut last).await;
    world.closed_with(SeriesKind::ChannelLog, "wrong_protocol").await;
    let after = world.log(SeriesKind::ChannelLog).await;
    let held_back: i64 = after.iter().filter_map(counted).sum();
    assert!(after.len() > log.len() && held_back > 1_000, "{held_back}");
    world.stop().await;
}
