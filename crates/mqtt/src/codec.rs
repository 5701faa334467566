//! MQTT 3.1.1 and 5 packets as bytes: what a server reads and what it writes.
//!
//! Pure: no I/O and no clock. Everything a client may send is either read whole
//! or refused with the reason code of the standard; nothing is reserved by a
//! declared length, and topics, payloads and properties share the bytes that
//! came in. Start at [`take_frame`], then [`Packet::decode`].

use bytes::{Buf as _, Bytes, BytesMut};

use crate::fields::{
    Value, allowed, end, flag, id, malformed, nonzero_u16, properties, protocol,
    publish_properties, take_bytes, take_packet_id, take_text, take_u8, take_u16,
};

pub use crate::encode::{
    ConnackProps, connack, disconnect, pingresp, puback, publish, suback, unsuback,
};
pub use crate::fields::{PublishProps, Text, USER_PROPERTIES_MAX};
pub use crate::reason::Reason;

/// Longest remaining length that four bytes can say, in bytes.
pub const REMAINING_BYTES_MAX: usize = 268_435_455;
/// Most topic filters of one SUBSCRIBE or UNSUBSCRIBE.
pub const FILTERS_MAX: usize = 1_024;

/// Which revision of the protocol a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// MQTT 3.1.1 (protocol level 4).
    V3,
    /// MQTT 5 (protocol level 5).
    V5,
}

/// How surely a message is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
#[repr(u8)]
pub enum Qos {
    /// At most once.
    #[default]
    AtMostOnce = 0,
    /// At least once.
    AtLeastOnce = 1,
    /// Exactly once. Read, so that it can be refused by its name.
    ExactlyOnce = 2,
}

impl Qos {
    const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::AtMostOnce),
            1 => Some(Self::AtLeastOnce),
            2 => Some(Self::ExactlyOnce),
            _ => None,
        }
    }
}

/// The bytes cannot be read; the connection ends with `reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct CodecError {
    /// What to tell an MQTT 5 client.
    pub reason: Reason,
    /// What is wrong, in words.
    pub what: &'static str,
}

/// One control packet: its first byte and what follows the length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Type in the high half, flags in the low one.
    pub first: u8,
    /// What the remaining length counts.
    pub body: Bytes,
}

/// Takes one packet off the front of `input`, or `None` until it is whole.
///
/// The limit, in bytes of the whole packet, is checked before the body is
/// waited for. `input` is untouched unless a packet is returned.
///
/// # Errors
///
/// If the length is not one, or above the limit.
pub fn take_frame(input: &mut BytesMut, limit_bytes: usize) -> Result<Option<Frame>, CodecError> {
    let Some((&first, rest)) = input.split_first() else { return Ok(None) };
    let mut remaining = 0_usize;
    for (at, &byte) in rest.iter().take(4).enumerate() {
        remaining |= usize::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 != 0 {
            continue;
        }
        let header = at + 2;
        if header + remaining > limit_bytes {
            return Err(CodecError {
                reason: Reason::PacketTooLarge,
                what: "the packet is larger than the limit",
            });
        }
        if input.len() < header + remaining {
            return Ok(None);
        }
        input.advance(header);
        return Ok(Some(Frame { first, body: input.split_to(remaining).freeze() }));
    }
    if rest.len() >= 4 {
        return Err(malformed("the remaining length takes more than four bytes"));
    }
    Ok(None)
}

/// What a client asks to be published if it is lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Will {
    /// Where.
    pub topic: Text,
    /// What.
    pub payload: Bytes,
    /// How surely.
    pub qos: Qos,
    /// Whether it is kept.
    pub retain: bool,
    /// Its MQTT 5 properties.
    pub props: PublishProps,
}

/// CONNECT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connect {
    /// The protocol's revision.
    pub version: Version,
    /// Clean session (3.1.1) or clean start (5).
    pub clean_start: bool,
    /// Longest silence of the client, in seconds; 0 for any.
    pub keep_alive_s: u16,
    /// Its name; empty if it wants one.
    pub client_id: Text,
    /// Its will.
    pub will: Option<Will>,
    /// The user name.
    pub user_name: Option<Text>,
    /// The password.
    pub password: Option<Bytes>,
    /// Most QoS 1 messages it takes at once.
    pub receive_maximum: u16,
    /// Longest packet it takes, in bytes.
    pub packet_bytes_max: u32,
    /// Whether it wants reason strings.
    pub problem_information: bool,
    /// Whether it asked for enhanced authentication.
    pub authentication_method: bool,
}

/// PUBLISH.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publish {
    /// Whether it may have been sent before.
    pub dup: bool,
    /// How surely.
    pub qos: Qos,
    /// Whether it is kept.
    pub retain: bool,
    /// Where; empty with a topic alias.
    pub topic: Text,
    /// Its number, above QoS 0.
    pub packet_id: Option<u16>,
    /// MQTT 5 properties.
    pub props: PublishProps,
    /// What.
    pub payload: Bytes,
}

/// One filter of a SUBSCRIBE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscription {
    /// Which topics.
    pub filter: Text,
    /// Highest QoS wanted.
    pub qos: Qos,
    /// Not what this client published itself.
    pub no_local: bool,
    /// Keep the retain flag as published.
    pub retain_as_published: bool,
    /// 0 retained messages now; 1 only if the subscription is new; 2 never.
    pub retain_handling: u8,
}

/// SUBSCRIBE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscribe {
    /// Its number.
    pub packet_id: u16,
    /// What the client knows these subscriptions by; 0 for none.
    pub identifier: u32,
    /// The filters.
    pub filters: Vec<Subscription>,
}

/// What a client may send after CONNECT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packet {
    /// PUBLISH.
    Publish(Publish),
    /// PUBACK of a message that we sent.
    Puback {
        /// Its number.
        packet_id: u16,
    },
    /// SUBSCRIBE.
    Subscribe(Subscribe),
    /// UNSUBSCRIBE.
    Unsubscribe {
        /// Its number.
        packet_id: u16,
        /// The filters.
        filters: Vec<Text>,
    },
    /// PINGREQ.
    Pingreq,
    /// DISCONNECT.
    Disconnect {
        /// Whether the will is to be published all the same (reason 0x04).
        with_will: bool,
    },
}

impl Connect {
    /// Whether the client wants, and takes, reason strings.
    #[must_use]
    pub fn wants_reasons(&self) -> bool {
        self.problem_information && self.packet_bytes_max >= crate::encode::REASON_PACKET_BYTES_MIN
    }

    /// Reads the first packet of a connection.
    ///
    /// # Errors
    ///
    /// If it is no CONNECT, of an unknown revision, or breaks the standard.
    pub fn decode(frame: &Frame) -> Result<Self, CodecError> {
        if frame.first != 0x10 {
            return Err(protocol("the first packet is not CONNECT"));
        }
        let mut body = frame.body.clone();
        let name = take_bytes(&mut body)?;
        let level = take_u8(&mut body)?;
        let version = match (&*name, level) {
            (b"MQTT", 4) => Version::V3,
            (b"MQTT", 5) => Version::V5,
            (b"MQTT" | b"MQIsdp", _) => {
                return Err(CodecError {
                    reason: Reason::UnsupportedVersion,
                    what: "MQTT 3.1.1 and 5 are spoken here",
                });
            }
            _ => return Err(protocol("the protocol name is not MQTT")),
        };
        let flags = take_u8(&mut body)?;
        if flags & 1 != 0 {
            return Err(malformed("the reserved flag of CONNECT is set"));
        }
        let keep_alive_s = take_u16(&mut body)?;
        let mut connect = Self {
            version,
            clean_start: flags & 0x02 != 0,
            keep_alive_s,
            client_id: Text::default(),
            will: None,
            user_name: None,
            password: None,
            receive_maximum: u16::MAX,
            packet_bytes_max: u32::MAX,
            problem_information: true,
            authentication_method: false,
        };
        if version == Version::V5 {
            properties(&mut body, allowed::CONNECT, |id, value| {
                match (id, value) {
                    (id::RECEIVE_MAXIMUM, Value::Number(n)) => {
                        connect.receive_maximum = nonzero_u16(n)?;
                    }
                    (id::MAXIMUM_PACKET_SIZE, Value::Number(0)) => {
                        return Err(protocol("maximum packet size is 0"));
                    }
                    (id::MAXIMUM_PACKET_SIZE, Value::Number(n)) => connect.packet_bytes_max = n,
                    (id::REQUEST_PROBLEM_INFORMATION, Value::Number(n)) => {
                        connect.problem_information = flag(n)?;
                    }
                    (id::REQUEST_RESPONSE_INFORMATION, Value::Number(n)) => {
                        flag(n)?;
                    }
                    (id::AUTHENTICATION_METHOD, _) => connect.authentication_method = true,
                    _ => {}
                }
                Ok(())
            })?;
        }
        connect.client_id = take_text(&mut body)?;
        let (will_qos, will_retain) = ((flags >> 3) & 3, flags & 0x20 != 0);
        if flags & 0x04 != 0 {
            let Some(qos) = Qos::from_bits(will_qos) else {
                return Err(malformed("the will's QoS is 3"));
            };
            let props = match version {
                Version::V5 => publish_properties(&mut body, allowed::WILL)?,
                Version::V3 => PublishProps::default(),
            };
            let topic = take_text(&mut body)?;
            let payload = take_bytes(&mut body)?;
            connect.will = Some(Will { topic, payload, qos, retain: will_retain, props });
        } else if will_qos != 0 || will_retain {
            return Err(malformed("will flags are set without a will"));
        }
        if flags & 0x80 != 0 {
            connect.user_name = Some(take_text(&mut body)?);
        } else if version == Version::V3 && flags & 0x40 != 0 {
            return Err(malformed("there is a password without a user name"));
        }
        if flags & 0x40 != 0 {
            connect.password = Some(take_bytes(&mut body)?);
        }
        end(&body)?;
        Ok(connect)
    }
}

impl Packet {
    /// Reads a packet that follows CONNECT.
    ///
    /// # Errors
    ///
    /// If it breaks the standard, or is one that only servers send.
    pub fn decode(frame: Frame, version: Version) -> Result<Self, CodecError> {
        let Frame { first, mut body } = frame;
        let v5 = version == Version::V5;
        match first {
            0x30..=0x3f => decode_publish(first, body, v5).map(Self::Publish),
            0x40 => {
                let packet_id = take_packet_id(&mut body)?;
                if v5 && body.has_remaining() {
                    take_u8(&mut body)?;
                    if body.has_remaining() {
                        properties(&mut body, allowed::ACK, |_, _| Ok(()))?;
                    }
                }
                end(&body)?;
                Ok(Self::Puback { packet_id })
            }
            0x82 => decode_subscribe(body, v5).map(Self::Subscribe),
            0xa2 => {
                let packet_id = take_packet_id(&mut body)?;
                if v5 {
                    properties(&mut body, allowed::UNSUBSCRIBE, |_, _| Ok(()))?;
                }
                let mut filters = Vec::new();
                while body.has_remaining() {
                    within(filters.len())?;
                    filters.push(take_text(&mut body)?);
                }
                if filters.is_empty() {
                    return Err(protocol("UNSUBSCRIBE names no filter"));
                }
                Ok(Self::Unsubscribe { packet_id, filters })
            }
            0xc0 => {
                end(&body)?;
                Ok(Self::Pingreq)
            }
            0xe0 => {
                let mut with_will = false;
                if v5 && body.has_remaining() {
                    with_will = take_u8(&mut body)? == 0x04;
                    if body.has_remaining() {
                        properties(&mut body, allowed::DISCONNECT, |_, _| Ok(()))?;
                    }
                }
                end(&body)?;
                Ok(Self::Disconnect { with_will })
            }
            0x10 => Err(protocol("a second CONNECT")),
            0x50 | 0x62 | 0x70 => Err(protocol("a QoS 2 packet, and QoS 2 was not agreed")),
            0xf0 if v5 => Err(protocol("AUTH, and no authentication method was agreed")),
            _ => Err(malformed("the packet's type or flags are not a client's")),
        }
    }
}

fn decode_publish(first: u8, mut body: Bytes, v5: bool) -> Result<Publish, CodecError> {
    let Some(qos) = Qos::from_bits((first >> 1) & 3) else {
        return Err(malformed("the QoS is 3"));
    };
    let dup = first & 0x08 != 0;
    if dup && qos == Qos::AtMostOnce {
        return Err(malformed("a QoS 0 message is marked as sent again"));
    }
    let topic = take_text(&mut body)?;
    if topic.as_str().contains(['+', '#']) {
        return Err(CodecError {
            reason: Reason::TopicNameInvalid,
            what: "a topic to publish to holds a wildcard",
        });
    }
    let packet_id = match qos {
        Qos::AtMostOnce => None,
        _ => Some(take_packet_id(&mut body)?),
    };
    let props = match v5 {
        true => publish_properties(&mut body, allowed::PUBLISH)?,
        false => PublishProps::default(),
    };
    if topic.as_str().is_empty() && props.topic_alias.is_none() {
        return Err(protocol("PUBLISH has neither topic nor topic alias"));
    }
    Ok(Publish { dup, qos, retain: first & 1 != 0, topic, packet_id, props, payload: body })
}

fn decode_subscribe(mut body: Bytes, v5: bool) -> Result<Subscribe, CodecError> {
    let packet_id = take_packet_id(&mut body)?;
    let mut identifier = 0;
    if v5 {
        properties(&mut body, allowed::SUBSCRIBE, |id, value| {
            if let (id::SUBSCRIPTION_IDENTIFIER, Value::Number(n)) = (id, value) {
                if n == 0 || identifier != 0 {
                    return Err(protocol("the subscription identifier is 0 or comes twice"));
                }
                identifier = n;
            }
            Ok(())
        })?;
    }
    let mut filters = Vec::new();
    while body.has_remaining() {
        within(filters.len())?;
        let filter = take_text(&mut body)?;
        let options = take_u8(&mut body)?;
        let Some(qos) = Qos::from_bits(options & 3) else {
            return Err(malformed("the QoS asked for is 3"));
        };
        let retain_handling = (options >> 4) & 3;
        let reserved = if v5 { 0xc0 } else { 0xfc };
        if options & reserved != 0 || retain_handling == 3 {
            return Err(malformed("reserved subscription options are set"));
        }
        filters.push(Subscription {
            filter,
            qos,
            no_local: options & 0x04 != 0,
            retain_as_published: options & 0x08 != 0,
            retain_handling,
        });
    }
    if filters.is_empty() {
        return Err(protocol("SUBSCRIBE names no filter"));
    }
    Ok(Subscribe { packet_id, identifier, filters })
}

fn within(count: usize) -> Result<(), CodecError> {
    if count >= FILTERS_MAX {
        return Err(CodecError {
            reason: Reason::QuotaExceeded,
            what: "a packet names more than 1024 filters",
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
