//! A broker that does what a test says: for what a real one does rarely.

use std::sync::Arc;

use bytes::BytesMut;
use fieldline_contracts::{Bus, SystemClock};
use fieldline_mqtt_bus::MqttBus;
use fieldline_mqtt_bus::encoding::{About, open};
use rumqttc::v5::mqttbytes::Error;
use rumqttc::v5::mqttbytes::v5::{
    ConnAck, ConnAckProperties, ConnectReturnCode, Packet, PubAck, PubAckReason, Publish,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::{account, config, device, eventually, message};

struct Broker(TcpListener);

struct Connection {
    stream: TcpStream,
    inbox: BytesMut,
}

impl Broker {
    async fn accept(&self, receive_max: u16, packet_bytes_max: u32) -> Connection {
        let (stream, _) = self.0.accept().await.unwrap();
        let mut connection = Connection { stream, inbox: BytesMut::new() };
        assert!(matches!(connection.next().await, Packet::Connect(..)));
        let properties = ConnAckProperties {
            receive_max: Some(receive_max),
            max_packet_size: Some(packet_bytes_max),
            session_expiry_interval: None,
            max_qos: None,
            retain_available: None,
            assigned_client_identifier: None,
            topic_alias_max: None,
            reason_string: None,
            user_properties: Vec::new(),
            wildcard_subscription_available: None,
            subscription_identifiers_available: None,
            shared_subscription_available: None,
            server_keep_alive: None,
            response_information: None,
            server_reference: None,
            authentication_method: None,
            authentication_data: None,
        };
        let welcome = ConnAck {
            session_present: false,
            code: ConnectReturnCode::Success,
            properties: Some(properties),
        };
        connection.send(Packet::ConnAck(welcome)).await;
        connection
    }
}

impl Connection {
    async fn next(&mut self) -> Packet {
        loop {
            match Packet::read(&mut self.inbox, None) {
                Ok(packet) => return packet,
                Err(Error::InsufficientBytes(_)) => {}
                Err(error) => panic!("{error}"),
            }
            assert!(self.stream.read_buf(&mut self.inbox).await.unwrap() > 0, "it went away");
        }
    }

    async fn publish(&mut self) -> Publish {
        loop {
            match self.next().await {
                Packet::Publish(publish) => return publish,
                Packet::PingReq(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    async fn send(&mut self, packet: Packet) {
        let mut out = BytesMut::new();
        packet.write(&mut out, None).unwrap();
        self.stream.write_all(&out).await.unwrap();
    }

    async fn acknowledge(&mut self, publish: &Publish, reason: PubAckReason) {
        let ack = PubAck { reason, ..PubAck::new(publish.pkid, None) };
        self.send(Packet::PubAck(ack)).await;
    }

    /// Nothing comes but signs of life.
    async fn quiet(&mut self) {
        let next = tokio::time::timeout(std::time::Duration::from_millis(100), self.publish());
        let next = next.await;
        assert!(next.is_err(), "unexpected: {next:?}");
    }
}

/// The number of the first item of a payload.
fn sequence(publish: &Publish) -> u64 {
    let about = About::of_topic("fieldline", &publish.topic).unwrap();
    open(about, &publish.payload).unwrap().0.sequence
}

async fn start(receive_max: u16) -> (Broker, Connection, MqttBus) {
    super::log();
    let broker = Broker(TcpListener::bind("127.0.0.1:0").await.unwrap());
    let port = broker.0.local_addr().unwrap().port();
    let connect = MqttBus::connect(config(port), Arc::new(SystemClock));
    let (connection, bus) = tokio::join!(broker.accept(receive_max, 1 << 20), connect);
    (broker, connection, bus.unwrap())
}

/// What was not acknowledged comes again in order before all else, and never more than the broker allows.
#[tokio::test]
async fn what_is_sent_again_keeps_order_and_window() {
    let (broker, mut connection, bus) = start(100).await;
    for n in 0..20 {
        bus.publish(account(1), vec![message(account(1), device(1), n)]).await;
    }
    let mut first = Vec::new();
    for _ in 0..20 {
        first.push(connection.publish().await);
    }
    assert!(first.iter().map(sequence).eq(1..=20));
    // Acknowledgements out of order: what was acknowledged does not come again.
    for at in [0, 2, 19] {
        connection.acknowledge(&first[at], PubAckReason::Success).await;
    }
    eventually("they are done with", || bus.depth().sent == 17).await;
    drop(connection);
    // A broker that allows fewer at a time.
    let mut connection = broker.accept(3, 1 << 20).await;
    bus.publish(account(1), vec![message(account(1), device(1), 20)]).await;
    let expected: Vec<u64> = [2].into_iter().chain(4..=19).chain([21]).collect();
    let mut waiting = std::collections::VecDeque::new();
    for (at, expected) in expected.iter().enumerate() {
        if waiting.len() == 3 {
            if at == 3 {
                connection.quiet().await;
            }
            let oldest = waiting.pop_front().unwrap();
            connection.acknowledge(&oldest, PubAckReason::Success).await;
        }
        let publish = connection.publish().await;
        assert_eq!(sequence(&publish), *expected);
        waiting.push_back(publish);
    }
    for publish in waiting {
        connection.acknowledge(&publish, PubAckReason::Success).await;
    }
    eventually("all is done with", || bus.depth().sent == 0 && bus.depth().items == 0).await;
}

/// What is too large for the broker is left out, be it that it came back with other settings; the rest goes on.
#[tokio::test]
async fn what_is_too_large_does_not_stop_the_rest() {
    let (broker, mut connection, bus) = start(100).await;
    let large = |n| {
        let items = (0..100).map(|_| message(account(1), device(1), n)).collect::<Vec<_>>();
        bus.publish(account(1), items)
    };
    large(0).await;
    let publish = connection.publish().await;
    assert!(publish.payload.len() > 2_000);
    drop(connection);
    let mut connection = broker.accept(100, 500).await;
    large(1).await;
    bus.publish(account(1), vec![message(account(1), device(1), 2)]).await;
    let publish = connection.publish().await;
    assert_eq!(sequence(&publish), 201);
    // It refuses what it takes: that is said, until it takes something.
    connection.acknowledge(&publish, PubAckReason::QuotaExceeded).await;
    eventually("it is said", || bus.problems().iter().any(|words| words.contains("QuotaExceeded")))
        .await;
    bus.publish(account(1), vec![message(account(1), device(1), 3)]).await;
    let publish = connection.publish().await;
    connection.acknowledge(&publish, PubAckReason::Success).await;
    eventually("it is well again", || bus.problems().is_empty()).await;
    assert_eq!(bus.depth().sent, 0);
}
