//! A look at the broker from outside, for `fieldline doctor`: what it allows, whom it lets in, and how much it keeps for a
//! client that has fallen behind, which only a try tells.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use fieldline_contracts::finding::Finding;
use rumqttc::v5::mqttbytes::v5::{
    Disconnect, DisconnectReasonCode, Filter, Packet, PubAck, PubAckReason, Publish, Subscribe,
    SubscribeReasonCode,
};
use rumqttc::v5::mqttbytes::{Error as PacketError, QoS};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

use crate::wire::{Opened, PACKET_BYTES_MAX, Target};
use crate::{ConnectError, MqttBus, MqttBusConfig};

/// Publications that a broker has to keep for a client that is away for a moment: more than what mosquitto keeps unless told.
const KEPT: u16 = 2_000;
/// Longest wait for a packet.
const PACKET_MAX: Duration = Duration::from_secs(3);
/// So long nothing comes after the last that was kept.
const QUIET: Duration = Duration::from_millis(700);

/// Looks at the broker.
pub async fn examine(config: &MqttBusConfig) -> Vec<Finding> {
    let failed = |error: &ConnectError| Finding::of_error("broker", "mqtt_bus.url", error);
    let target = match MqttBus::target(config) {
        Ok(target) => target,
        Err(error) => return vec![failed(&error)],
    };
    let place = target.address.to_string();
    let opened = match target.open(true).await {
        Ok(opened) => opened,
        Err(error) => return vec![failed(&error)],
    };
    let mut findings = vec![Finding::ok("broker", &place, "it answers, and speaks MQTT 5")];
    if opened.packet_bytes_max < PACKET_BYTES_MAX as usize {
        findings.push(Finding::warning(
            "broker packets",
            &place,
            format!(
                "it takes packets of at most {} bytes: live items of large messages are dropped",
                opened.packet_bytes_max
            ),
            format!("let max_packet_size of the broker be at least {PACKET_BYTES_MAX}"),
        ));
    }
    findings.push(strangers(&target, &place).await);
    findings.push(match queue(config, &target, opened).await {
        Ok(kept) if kept >= KEPT => {
            Finding::ok("broker queue", &place, format!("it keeps {KEPT} and more for who falls behind"))
        }
        Ok(kept) => Finding::warning(
            "broker queue",
            &place,
            format!("of {KEPT} publications it kept {kept} for a client that was away: a node that falls behind misses live items"),
            "set max_queued_messages 100000 and max_inflight_messages 0 in mosquitto.conf, or what your broker calls them",
        ),
        Err(reason) => Finding::broken(
            "broker queue",
            &place,
            reason,
            format!("allow its user to read and write {}/#", config.prefix),
        ),
    });
    findings
}

/// Whether anybody is let in.
async fn strangers(target: &Target, place: &str) -> Finding {
    let check = "broker access";
    let own = target.address.is_private();
    if target.address.login.is_none() && target.tls.is_none() && own {
        return Finding::ok(
            check,
            place,
            "nobody is asked for a name, on an address that is not public",
        );
    }
    let mut stranger = target.clone();
    stranger.address.login = None;
    if stranger.open(true).await.is_err() {
        return Finding::ok(check, place, "strangers are refused");
    }
    Finding::warning(
        check,
        place,
        "it lets anybody in without a name: who reaches it reads and writes what all accounts send",
        "set allow_anonymous false in mosquitto.conf, and let `mqtt_bus.url` have a name and password",
    )
}

/// How many publications the broker keeps for a client that goes away and comes back.
async fn queue(config: &MqttBusConfig, target: &Target, publisher: Opened) -> Result<u16, String> {
    let topic = format!("{}/doctor-{}/probe", config.prefix, target.client_id);
    // Of another length than the publisher's, so never the same: the broker would end one of them.
    let own = target.client_id.get(9..).unwrap_or(&target.client_id);
    let away = Target { client_id: format!("away{own}"), ..target.clone() };
    let text = |error: ConnectError| error.to_string();
    let mut line = Line(away.open(true).await.map_err(text)?);
    let mut subscribe = Subscribe::new_many([Filter::new(topic.clone(), QoS::AtLeastOnce)], None);
    subscribe.pkid = 1;
    line.put(&Packet::Subscribe(subscribe)).await?;
    loop {
        if let Packet::SubAck(ack) = line.packet(PACKET_MAX).await? {
            match ack.return_codes.first() {
                Some(SubscribeReasonCode::Success(_)) => break,
                other => return Err(format!("it refuses a subscription to {topic} ({other:?})")),
            }
        }
    }
    // Without a word, as a node does whose network fails.
    drop(line);
    let mut publisher = Line(publisher);
    let window = u16::try_from(publisher.0.window).unwrap_or(u16::MAX).max(1);
    let mut acknowledged = 0;
    for id in 1..=KEPT {
        let publish = Publish {
            dup: false,
            qos: QoS::AtLeastOnce,
            retain: false,
            topic: Bytes::from(topic.clone()),
            pkid: id,
            payload: Bytes::copy_from_slice(&id.to_be_bytes()),
            properties: None,
        };
        publisher.put(&Packet::Publish(publish)).await?;
        while id - acknowledged >= window || (id == KEPT && acknowledged < KEPT) {
            if let Packet::PubAck(ack) = publisher.packet(PACKET_MAX).await? {
                acknowledged += 1;
                if !matches!(
                    ack.reason,
                    PubAckReason::Success | PubAckReason::NoMatchingSubscribers
                ) {
                    return Err(format!("it refuses a publication to {topic} ({:?})", ack.reason));
                }
            }
        }
    }
    publisher.goodbye().await;
    let mut line = Line(away.open(false).await.map_err(text)?);
    let mut kept = BTreeSet::new();
    while kept.len() < usize::from(KEPT) {
        match line.packet(QUIET).await {
            Ok(Packet::Publish(publish)) => {
                kept.insert(publish.payload.to_vec());
                let ack =
                    PubAck { pkid: publish.pkid, reason: PubAckReason::Success, properties: None };
                line.put(&Packet::PubAck(ack)).await?;
            }
            Ok(_) => {}
            Err(_) => break,
        }
    }
    drop(line);
    // A clean start forgets the session.
    if let Ok(last) = away.open(true).await {
        Line(last).goodbye().await;
    }
    Ok(u16::try_from(kept.len()).unwrap_or(KEPT))
}

/// A connection, packet by packet.
struct Line(Opened);

impl Line {
    async fn put(&mut self, packet: &Packet) -> Result<(), String> {
        let mut out = BytesMut::new();
        packet.write(&mut out, None).map_err(|error| error.to_string())?;
        let written = timeout(PACKET_MAX, async {
            self.0.stream.write_all(&out).await?;
            self.0.stream.flush().await
        });
        match written.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("it ended the connection: {error}")),
            Err(_) => Err("it takes nothing more".to_owned()),
        }
    }

    async fn packet(&mut self, most: Duration) -> Result<Packet, String> {
        loop {
            match Packet::read(&mut self.0.inbox, Some(PACKET_BYTES_MAX)) {
                Ok(Packet::Disconnect(words)) => {
                    return Err(format!("it ended the connection, {:?}", words.reason_code));
                }
                Ok(packet) => return Ok(packet),
                Err(PacketError::InsufficientBytes(_)) => {}
                Err(error) => return Err(format!("its packet is not understood: {error}")),
            }
            match timeout(most, self.0.stream.read_buf(&mut self.0.inbox)).await {
                Ok(Ok(1..)) => {}
                Ok(Ok(0)) => return Err("it ended the connection".to_owned()),
                Ok(Err(error)) => return Err(format!("it ended the connection: {error}")),
                Err(_) => return Err(format!("it said nothing for {} ms", most.as_millis())),
            }
        }
    }

    async fn goodbye(mut self) {
        let words = Disconnect::new(DisconnectReasonCode::NormalDisconnection);
        // It goes all the same.
        self.put(&Packet::Disconnect(words)).await.unwrap_or_default();
    }
}
