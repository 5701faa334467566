//! Bytes that no client would send: never a panic, always an end.

use bytes::BytesMut;
use fieldline_mqtt::codec::{Connect, Packet, Version, take_frame};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::harness::{SOON, Server};
use crate::wire::{Hello, Wire, packet};

/// Reads all packets of `bytes` in both revisions; returns how many were whole.
fn decode(bytes: &[u8]) -> usize {
    let mut whole = 0;
    for version in [Version::V3, Version::V5] {
        let mut input = BytesMut::from(bytes);
        while let Ok(Some(frame)) = take_frame(&mut input, 64 * 1024) {
            whole += 1;
            drop(Connect::decode(&frame));
            drop(Packet::decode(frame, version));
        }
    }
    whole
}

/// Bodies that look like packets, so that the inner parsers are reached.
fn plausible() -> impl Strategy<Value = Vec<u8>> {
    let first = prop_oneof![
        Just(0x10_u8),
        Just(0x82),
        Just(0xa2),
        Just(0x40),
        Just(0xe0),
        0x30_u8..0x40,
        any::<u8>()
    ];
    let piece = prop_oneof![
        Just(b"\x00\x04MQTT\x05".to_vec()),
        Just(b"\x00\x04MQTT\x04".to_vec()),
        Just(b"\x00\x08client/x".to_vec()),
        (1_u8..43).prop_map(|id| vec![id]),
        proptest::collection::vec(any::<u8>(), 0..6),
    ];
    (first, proptest::collection::vec(piece, 0..10))
        .prop_map(|(first, pieces)| packet(first, &pieces.concat()))
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        decode(&bytes);
    }

    #[test]
    fn any_packet_is_read_or_refused(packets in proptest::collection::vec(plausible(), 1..5)) {
        for bytes in &packets {
            prop_assert_eq!(decode(bytes), 2);
        }
    }

    /// However the network cuts the stream, the same packets come out.
    #[test]
    fn any_chunking_gives_the_same_packets(
        packets in proptest::collection::vec(plausible(), 1..6),
        chunk in 1_usize..20,
    ) {
        let (mut input, mut count) = (BytesMut::new(), 0);
        for piece in packets.concat().chunks(chunk) {
            input.extend_from_slice(piece);
            while let Some(frame) = take_frame(&mut input, 64 * 1024).unwrap() {
                prop_assert_eq!(packet(frame.first, &frame.body), packets[count].clone());
                count += 1;
            }
        }
        prop_assert_eq!(count, packets.len());
    }
}

/// Over real sockets: whatever is sent, the server ends it or answers, and goes on.
#[tokio::test]
async fn the_server_outlives_any_bytes() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let strategy = proptest::collection::vec(plausible(), 1..6);
    for round in 0..150 {
        let bytes = strategy.new_tree(&mut runner).unwrap().current().concat();
        let mut wire = Wire::open(&server).await;
        if round % 3 > 0 {
            wire.v5 = round % 3 == 1;
            wire.send(&Hello::new(wire.v5, "hostile", &tenant.token).bytes()).await;
        }
        // The server may have closed before all was sent.
        let sent = wire.stream.write_all(&bytes).await;
        drop(sent);
        let ended = wire.stream.shutdown().await;
        drop(ended);
        let mut rest = vec![];
        let read = tokio::time::timeout(SOON, wire.stream.read_to_end(&mut rest)).await;
        assert!(read.is_ok(), "round {round}: the connection stays open after {bytes:?}");
    }
    let mut wire = Wire::join(&server, true, "fine", &tenant.token).await;
    wire.send(&[0xc0, 0]).await;
    assert_eq!(wire.recv().await.first, 0xd0);
}

#[tokio::test]
async fn violations_end_with_their_reason() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    let cases: [(&str, Vec<u8>, u8); 20] = [
        ("a second CONNECT", Hello::new(true, "x", "y").bytes(), 0x82),
        ("a packet of type 0", vec![0x00, 0], 0x81),
        ("QoS 3", vec![0x36, 3, 0, 0, 0], 0x81),
        ("a QoS 0 message sent again", vec![0x38, 3, 0, 0, 0], 0x81),
        ("a length of five bytes", vec![0x30, 0x80, 0x80, 0x80, 0x80, 0x01], 0x81),
        ("SUBSCRIBE with wrong flags", vec![0x80, 2, 0, 1], 0x81),
        ("SUBSCRIBE without filters", vec![0x82, 3, 0, 1, 0], 0x82),
        ("packet id 0", packet(0x82, b"\x00\x00\x00\x00\x01#\x00"), 0x81),
        ("reserved options", packet(0x82, b"\x00\x01\x00\x00\x01#\xc0"), 0x81),
        ("retain handling 3", packet(0x82, b"\x00\x01\x00\x00\x01#\x30"), 0x81),
        ("subscription identifier 0", packet(0x82, b"\x00\x01\x02\x0b\x00\x00\x01#\x00"), 0x82),
        ("a foreign property", packet(0x82, b"\x00\x01\x02\x24\x01\x00\x01#\x00"), 0x82),
        ("an unknown property", packet(0x82, b"\x00\x01\x02\x7f\x01\x00\x01#\x00"), 0x81),
        ("a property twice", packet(0x30, b"\x00\x08client/x\x04\x01\x01\x01\x01"), 0x82),
        ("U+0000 in a topic", packet(0x30, b"\x00\x08client/\x00\x00"), 0x81),
        ("a topic that is not UTF-8", packet(0x30, b"\x00\x08client/\xff\x00"), 0x81),
        ("a wildcard in a topic", packet(0x30, b"\x00\x08client/#\x00"), 0x90),
        ("neither topic nor alias", packet(0x30, b"\x00\x00\x00"), 0x82),
        ("PINGREQ with a body", vec![0xc0, 1, 0], 0x81),
        ("AUTH", vec![0xf0, 0], 0x82),
    ];
    for (what, bytes, reason) in cases {
        let mut wire = Wire::join(&server, true, "c", &tenant.token).await;
        wire.send(&bytes).await;
        assert_eq!(wire.closed().await, Some(reason), "{what}");
        let mut old = Wire::join(&server, false, "d", &tenant.token).await;
        if bytes[0] & 0xf0 != 0x80 && bytes[0] & 0xf0 != 0x30 {
            old.send(&bytes).await;
            assert_eq!(old.closed().await, None, "{what}");
        }
    }
}

/// A QoS 2 handshake, and packets of a server, are no client's.
#[tokio::test]
async fn packets_of_a_server_are_refused() {
    let server = Server::start().await;
    let tenant = server.tenant("a").await;
    for first in [0x20_u8, 0x50, 0x62, 0x70, 0x90, 0xb0, 0xd0] {
        let mut wire = Wire::join(&server, true, "c", &tenant.token).await;
        wire.send(&packet(first, &[0, 1])).await;
        let reason = wire.closed().await;
        assert!(matches!(reason, Some(0x81 | 0x82)), "{first:x}: {reason:?}");
    }
}
