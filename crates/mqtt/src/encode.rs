//! The packets that a server writes, appended to a buffer.

use bytes::{BufMut, BytesMut};

use crate::codec::{Qos, Reason, Version};
use crate::fields::id;

/// Longest reason string, in bytes; the rest is cut off.
const REASON_BYTES_MAX: usize = 512;

/// Longest packet that a client must take to be sent reason strings, in bytes:
/// they must not make a packet longer than it takes.
pub const REASON_PACKET_BYTES_MIN: u32 = 1_024;

/// What CONNACK tells an MQTT 5 client.
#[derive(Clone, Debug, Default)]
pub struct ConnackProps<'a> {
    /// The id we chose, if the client sent none.
    pub assigned_client_id: Option<&'a str>,
    /// Seconds that the session outlives the connection.
    pub session_expiry_s: Option<u32>,
    /// The keep alive that holds instead of the asked one, in seconds.
    pub keep_alive_s: Option<u16>,
    /// Most QoS 1 messages that we take at once.
    pub receive_maximum: u16,
    /// Longest packet that we take, in bytes.
    pub packet_bytes_max: u32,
    /// Highest topic alias that we take.
    pub topic_alias_max: u16,
    /// Why it was refused, in words.
    pub reason_string: Option<&'a str>,
}

/// Appends CONNACK. The reason becomes the nearest return code for 3.1.1.
pub fn connack(out: &mut BytesMut, version: Version, reason: Reason, props: &ConnackProps<'_>) {
    if version == Version::V3 {
        let code = match reason {
            Reason::Success => 0,
            Reason::UnsupportedVersion => 1,
            Reason::ClientIdNotValid => 2,
            Reason::BadUserNameOrPassword => 4,
            Reason::NotAuthorized | Reason::TopicNameInvalid => 5,
            _ => 3,
        };
        out.extend_from_slice(&[0x20, 2, 0, code]);
        return;
    }
    let mut block = BytesMut::new();
    if reason.is_error() {
        reason_string(&mut block, props.reason_string);
    } else {
        if let Some(seconds) = props.session_expiry_s {
            block.put_u8(id::SESSION_EXPIRY);
            block.put_u32(seconds);
        }
        block.put_u8(id::RECEIVE_MAXIMUM);
        block.put_u16(props.receive_maximum);
        block.put_slice(&[id::MAXIMUM_QOS, 1]);
        block.put_u8(id::MAXIMUM_PACKET_SIZE);
        block.put_u32(props.packet_bytes_max);
        if let Some(client_id) = props.assigned_client_id {
            block.put_u8(id::ASSIGNED_CLIENT_ID);
            put_bytes(&mut block, client_id.as_bytes());
        }
        block.put_u8(id::TOPIC_ALIAS_MAXIMUM);
        block.put_u16(props.topic_alias_max);
        block.put_slice(&[id::SHARED_SUBSCRIPTION_AVAILABLE, 0]);
        if let Some(seconds) = props.keep_alive_s {
            block.put_u8(id::SERVER_KEEP_ALIVE);
            block.put_u16(seconds);
        }
    }
    out.put_u8(0x20);
    put_varint(out, 2 + varint_bytes(block.len()) + block.len());
    out.extend_from_slice(&[0, reason.number()]);
    put_varint(out, block.len());
    out.extend_from_slice(&block);
}

/// Appends PUBACK; 3.1.1 knows only the positive one.
pub fn puback(
    out: &mut BytesMut,
    version: Version,
    packet_id: u16,
    reason: Reason,
    text: Option<&str>,
) {
    if version == Version::V3 || (reason == Reason::Success && text.is_none()) {
        out.extend_from_slice(&[0x40, 2]);
        out.put_u16(packet_id);
        return;
    }
    let mut block = BytesMut::new();
    reason_string(&mut block, text);
    out.put_u8(0x40);
    put_varint(out, 3 + varint_bytes(block.len()) + block.len());
    out.put_u16(packet_id);
    out.put_u8(reason.number());
    put_varint(out, block.len());
    out.extend_from_slice(&block);
}

/// Appends SUBACK; a refusal becomes 0x80 for 3.1.1.
pub fn suback(
    out: &mut BytesMut,
    version: Version,
    packet_id: u16,
    results: &[Result<Qos, Reason>],
    text: Option<&str>,
) {
    acks(out, 0x90, version, packet_id, text, results.len());
    for result in results {
        out.put_u8(match (result, version) {
            (Ok(qos), _) => *qos as u8,
            (Err(_), Version::V3) => 0x80,
            (Err(reason), Version::V5) => reason.number(),
        });
    }
}

/// Appends UNSUBACK.
pub fn unsuback(out: &mut BytesMut, version: Version, packet_id: u16, results: &[Reason]) {
    let count = if version == Version::V5 { results.len() } else { 0 };
    acks(out, 0xb0, version, packet_id, None, count);
    for reason in results.iter().take(count) {
        out.put_u8(reason.number());
    }
}

fn acks(
    out: &mut BytesMut,
    first: u8,
    version: Version,
    packet_id: u16,
    text: Option<&str>,
    count: usize,
) {
    let mut block = BytesMut::new();
    if version == Version::V5 {
        let mut props = BytesMut::new();
        reason_string(&mut props, text);
        put_varint(&mut block, props.len());
        block.extend_from_slice(&props);
    }
    out.put_u8(first);
    put_varint(out, 2 + block.len() + count);
    out.put_u16(packet_id);
    out.extend_from_slice(&block);
}

/// Appends PINGRESP.
pub fn pingresp(out: &mut BytesMut) {
    out.extend_from_slice(&[0xd0, 0]);
}

/// Appends DISCONNECT; nothing for 3.1.1, where only clients send it.
pub fn disconnect(out: &mut BytesMut, version: Version, reason: Reason, text: Option<&str>) {
    if version == Version::V3 {
        return;
    }
    let mut block = BytesMut::new();
    reason_string(&mut block, text);
    out.put_u8(0xe0);
    put_varint(out, 1 + varint_bytes(block.len()) + block.len());
    out.put_u8(reason.number());
    put_varint(out, block.len());
    out.extend_from_slice(&block);
}

/// A PUBLISH to be written.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    /// Where.
    pub topic: &'a str,
    /// What.
    pub payload: &'a [u8],
    /// Its number, for QoS 1.
    pub packet_id: Option<u16>,
    /// Whether it is a retained one.
    pub retain: bool,
    /// MQTT 5 properties of the publisher, encoded.
    pub props: &'a [u8],
    /// Seconds that it is still worth something.
    pub expiry_s: Option<u32>,
    /// What the client knows the matching subscriptions by.
    pub identifiers: &'a [u32],
}

/// The bytes that [`publish`] will append.
#[must_use]
pub fn publish_bytes(version: Version, message: &Outgoing<'_>) -> usize {
    let remaining = publish_remaining(version, message);
    1 + varint_bytes(remaining) + remaining
}

fn publish_props_bytes(message: &Outgoing<'_>) -> usize {
    let identifiers: usize =
        message.identifiers.iter().map(|n| 1 + varint_bytes(*n as usize)).sum();
    message.props.len() + message.expiry_s.map_or(0, |_| 5) + identifiers
}

fn publish_remaining(version: Version, message: &Outgoing<'_>) -> usize {
    let plain = 2 + message.topic.len() + message.packet_id.map_or(0, |_| 2);
    let props = match version {
        Version::V3 => 0,
        Version::V5 => {
            let bytes = publish_props_bytes(message);
            varint_bytes(bytes) + bytes
        }
    };
    plain + props + message.payload.len()
}

/// Appends PUBLISH.
pub fn publish(out: &mut BytesMut, version: Version, message: &Outgoing<'_>) {
    let qos = if message.packet_id.is_some() { 0x02 } else { 0 };
    let remaining = publish_remaining(version, message);
    out.reserve(5 + remaining);
    out.put_u8(0x30 | qos | u8::from(message.retain));
    put_varint(out, remaining);
    put_bytes(out, message.topic.as_bytes());
    if let Some(packet_id) = message.packet_id {
        out.put_u16(packet_id);
    }
    if version == Version::V5 {
        put_varint(out, publish_props_bytes(message));
        if let Some(seconds) = message.expiry_s {
            out.put_u8(id::MESSAGE_EXPIRY);
            out.put_u32(seconds);
        }
        for number in message.identifiers {
            out.put_u8(id::SUBSCRIPTION_IDENTIFIER);
            put_varint(out, *number as usize);
        }
        out.extend_from_slice(message.props);
    }
    out.extend_from_slice(message.payload);
}

/// The property that carries `correlation` data, encoded.
#[must_use]
pub fn correlation(data: &[u8]) -> BytesMut {
    let mut out = BytesMut::with_capacity(3 + data.len());
    out.put_u8(id::CORRELATION_DATA);
    put_bytes(&mut out, data);
    out
}

fn reason_string(block: &mut BytesMut, text: Option<&str>) {
    if let Some(text) = text {
        let mut end = text.len().min(REASON_BYTES_MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        block.put_u8(id::REASON_STRING);
        put_bytes(block, text.as_bytes().get(..end).unwrap_or_default());
    }
}

fn put_bytes(out: &mut BytesMut, bytes: &[u8]) {
    // Longer than 65,535 bytes is nothing that we write; it is cut rather than garbled.
    let bytes = bytes.get(..usize::from(u16::MAX)).unwrap_or(bytes);
    out.put_u16(u16::try_from(bytes.len()).unwrap_or(u16::MAX));
    out.extend_from_slice(bytes);
}

pub(crate) fn put_varint(out: &mut BytesMut, number: usize) {
    let mut rest = number;
    loop {
        let low = u8::try_from(rest & 0x7f).unwrap_or(0);
        rest >>= 7;
        out.put_u8(if rest > 0 { low | 0x80 } else { low });
        if rest == 0 {
            return;
        }
    }
}

const fn varint_bytes(number: usize) -> usize {
    match number {
        0..=0x7f => 1,
        0x80..=0x3fff => 2,
        0x4000..=0x1f_ffff => 3,
        _ => 4,
    }
}
