//! The fields that packets are made of: numbers, strings and MQTT 5 properties.

use std::fmt;

use bytes::{Buf as _, Bytes, BytesMut};

use crate::codec::CodecError;
use crate::reason::Reason;

/// Most user properties of one packet: each costs an allocation, none is ours.
pub const USER_PROPERTIES_MAX: usize = 64;

pub(crate) const fn malformed(what: &'static str) -> CodecError {
    CodecError { reason: Reason::Malformed, what }
}

pub(crate) const fn protocol(what: &'static str) -> CodecError {
    CodecError { reason: Reason::ProtocolError, what }
}

/// Text that was checked to be UTF-8 without U+0000; clones share the bytes.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Text(Bytes);

impl Text {
    fn check(bytes: Bytes) -> Result<Self, CodecError> {
        match std::str::from_utf8(&bytes) {
            Ok(text) if !text.contains('\0') => Ok(Self(bytes)),
            _ => Err(malformed("a string is not UTF-8, or holds U+0000")),
        }
    }

    /// Text of our own; `None` if it could not be a client's.
    pub(crate) fn new(text: String) -> Option<Self> {
        Self::check(text.into()).ok()
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        // Checked at construction: the fallback is never taken.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

/// MQTT 5 properties of a PUBLISH or a will.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PublishProps {
    /// Seconds after which it is worth nothing.
    pub expiry_s: Option<u32>,
    /// Number that stands for the topic.
    pub topic_alias: Option<u16>,
    /// Where the answer is to go.
    pub response_topic: Option<Text>,
    /// What the asker knows the answer by.
    pub correlation: Option<Bytes>,
    /// The properties that receivers get, encoded; expiry and alias are not among them.
    pub forward: Bytes,
}

/// Numbers of the MQTT 5 properties.
pub(crate) mod id {
    pub(crate) const PAYLOAD_FORMAT: u8 = 1;
    pub(crate) const MESSAGE_EXPIRY: u8 = 2;
    pub(crate) const RESPONSE_TOPIC: u8 = 8;
    pub(crate) const CORRELATION_DATA: u8 = 9;
    pub(crate) const SUBSCRIPTION_IDENTIFIER: u8 = 11;
    pub(crate) const SESSION_EXPIRY: u8 = 17;
    pub(crate) const ASSIGNED_CLIENT_ID: u8 = 18;
    pub(crate) const SERVER_KEEP_ALIVE: u8 = 19;
    pub(crate) const AUTHENTICATION_METHOD: u8 = 21;
    pub(crate) const REQUEST_PROBLEM_INFORMATION: u8 = 23;
    pub(crate) const WILL_DELAY: u8 = 24;
    pub(crate) const REQUEST_RESPONSE_INFORMATION: u8 = 25;
    pub(crate) const REASON_STRING: u8 = 31;
    pub(crate) const RECEIVE_MAXIMUM: u8 = 33;
    pub(crate) const TOPIC_ALIAS_MAXIMUM: u8 = 34;
    pub(crate) const TOPIC_ALIAS: u8 = 35;
    pub(crate) const MAXIMUM_QOS: u8 = 36;
    pub(crate) const USER_PROPERTY: u8 = 38;
    pub(crate) const MAXIMUM_PACKET_SIZE: u8 = 39;
    pub(crate) const SHARED_SUBSCRIPTION_AVAILABLE: u8 = 42;
}

/// Which properties each packet may have, one bit each.
pub(crate) mod allowed {
    const fn bits(ids: &[u8]) -> u64 {
        let (mut mask, mut rest) = (0, ids);
        while let [id, tail @ ..] = rest {
            mask |= 1 << *id;
            rest = tail;
        }
        mask
    }

    pub(crate) const CONNECT: u64 = bits(&[17, 33, 39, 34, 25, 23, 38, 21, 22]);
    pub(crate) const WILL: u64 = bits(&[24, 1, 2, 3, 8, 9, 38]);
    pub(crate) const PUBLISH: u64 = bits(&[1, 2, 3, 8, 9, 35, 38]);
    pub(crate) const FORWARDED: u64 = bits(&[1, 3, 8, 9, 38]);
    pub(crate) const ACK: u64 = bits(&[31, 38]);
    pub(crate) const SUBSCRIBE: u64 = bits(&[11, 38]);
    pub(crate) const UNSUBSCRIBE: u64 = bits(&[38]);
    pub(crate) const DISCONNECT: u64 = bits(&[17, 31, 38]);
}

/// A property's value.
pub(crate) enum Value {
    Number(u32),
    Text(Text),
    Binary(Bytes),
    Pair,
}

/// Reads a property block and hands each property to `visit`.
pub(crate) fn properties(
    body: &mut Bytes,
    allowed: u64,
    visit: impl FnMut(u8, Value) -> Result<(), CodecError>,
) -> Result<(), CodecError> {
    let length = take_varint(body)? as usize;
    if length > body.remaining() {
        return Err(malformed("the properties are longer than the packet"));
    }
    each_property(body.split_to(length), allowed, visit)
}

/// Whether `props` are properties as receivers get them, whole and of the right kinds.
pub(crate) fn are_forwarded(props: &Bytes) -> bool {
    each_property(props.clone(), allowed::FORWARDED, |_, _| Ok(())).is_ok()
}

/// The properties that `forward` and an expiry were taken from.
pub(crate) fn read_forwarded(forward: &Bytes, expiry_s: Option<u32>) -> Option<PublishProps> {
    let mut block = BytesMut::new();
    crate::encode::put_varint(&mut block, forward.len());
    block.extend_from_slice(forward);
    let props = publish_properties(&mut block.freeze(), allowed::FORWARDED).ok()?;
    Some(PublishProps { expiry_s, ..props })
}

fn each_property(
    mut block: Bytes,
    allowed: u64,
    mut visit: impl FnMut(u8, Value) -> Result<(), CodecError>,
) -> Result<(), CodecError> {
    let (mut seen, mut user) = (0_u64, 0_usize);
    while block.has_remaining() {
        let id = take_u8(&mut block)?;
        let value = match id {
            1 | 23 | 25 | 36 | 37 | 40 | 41 | 42 => Value::Number(take_u8(&mut block)?.into()),
            19 | 33 | 34 | 35 => Value::Number(take_u16(&mut block)?.into()),
            2 | 17 | 24 | 39 => Value::Number(take_u32(&mut block)?),
            11 => Value::Number(take_varint(&mut block)?),
            3 | 8 | 18 | 21 | 26 | 28 | 31 => Value::Text(take_text(&mut block)?),
            9 | 22 => Value::Binary(take_bytes(&mut block)?),
            38 => {
                take_text(&mut block)?;
                take_text(&mut block)?;
                Value::Pair
            }
            _ => return Err(malformed("a property is not in the standard")),
        };
        let bit = 1_u64 << id;
        if allowed & bit == 0 {
            return Err(protocol("a property does not belong to this packet"));
        }
        if id == id::USER_PROPERTY {
            user += 1;
            if user > USER_PROPERTIES_MAX {
                return Err(CodecError {
                    reason: Reason::QuotaExceeded,
                    what: "a packet has more than 64 user properties",
                });
            }
        } else if seen & bit != 0 && id != id::SUBSCRIPTION_IDENTIFIER {
            return Err(protocol("a property comes twice"));
        }
        seen |= bit;
        visit(id, value)?;
    }
    Ok(())
}

pub(crate) fn publish_properties(
    body: &mut Bytes,
    allowed: u64,
) -> Result<PublishProps, CodecError> {
    let mut props = PublishProps::default();
    // What is forwarded is copied out of the block as it stands, so it needs no second encoder.
    let block = body.clone();
    properties(body, allowed, |id, value| {
        match (id, value) {
            (id::MESSAGE_EXPIRY, Value::Number(n)) => props.expiry_s = Some(n),
            (id::TOPIC_ALIAS, Value::Number(n)) => match u16::try_from(n) {
                Ok(n) if n > 0 => props.topic_alias = Some(n),
                _ => {
                    return Err(CodecError {
                        reason: Reason::TopicAliasInvalid,
                        what: "the topic alias is 0",
                    });
                }
            },
            (id::PAYLOAD_FORMAT, Value::Number(n)) => {
                flag(n)?;
            }
            (id::RESPONSE_TOPIC, Value::Text(topic)) => {
                if topic.as_str().is_empty() || topic.as_str().contains(['+', '#']) {
                    return Err(protocol("the response topic is empty or holds a wildcard"));
                }
                props.response_topic = Some(topic);
            }
            (id::CORRELATION_DATA, Value::Binary(data)) => props.correlation = Some(data),
            _ => {}
        }
        Ok(())
    })?;
    props.forward = forwarded(block, body.remaining())?;
    Ok(props)
}

/// The properties at the front of `block` that receivers get; `after` bytes follow them.
fn forwarded(mut block: Bytes, after: usize) -> Result<Bytes, CodecError> {
    take_varint(&mut block)?;
    block.truncate(block.remaining().saturating_sub(after));
    let mut out = BytesMut::new();
    while block.has_remaining() {
        let whole = block.clone();
        let id = take_u8(&mut block)?;
        match id {
            id::PAYLOAD_FORMAT => drop(take_u8(&mut block)?),
            id::TOPIC_ALIAS => drop(take_u16(&mut block)?),
            id::MESSAGE_EXPIRY | id::WILL_DELAY => drop(take_u32(&mut block)?),
            id::USER_PROPERTY => {
                take_bytes(&mut block)?;
                take_bytes(&mut block)?;
            }
            _ => drop(take_bytes(&mut block)?),
        }
        let used = whole.remaining() - block.remaining();
        if !matches!(id, id::MESSAGE_EXPIRY | id::TOPIC_ALIAS | id::WILL_DELAY) {
            out.extend_from_slice(&whole.slice(..used));
        }
    }
    Ok(out.freeze())
}

pub(crate) fn flag(n: u32) -> Result<bool, CodecError> {
    match n {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(protocol("a flag property is neither 0 nor 1")),
    }
}

pub(crate) fn nonzero_u16(n: u32) -> Result<u16, CodecError> {
    match u16::try_from(n) {
        Ok(n) if n > 0 => Ok(n),
        _ => Err(protocol("receive maximum is 0")),
    }
}

const SHORT: CodecError = malformed("the packet ends too early");

pub(crate) fn take_u8(body: &mut Bytes) -> Result<u8, CodecError> {
    body.try_get_u8().map_err(|_| SHORT)
}

pub(crate) fn take_u16(body: &mut Bytes) -> Result<u16, CodecError> {
    body.try_get_u16().map_err(|_| SHORT)
}

fn take_u32(body: &mut Bytes) -> Result<u32, CodecError> {
    body.try_get_u32().map_err(|_| SHORT)
}

fn take_varint(body: &mut Bytes) -> Result<u32, CodecError> {
    let mut number = 0;
    for at in 0..4 {
        let byte = take_u8(body)?;
        number |= u32::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(malformed("a variable number takes more than four bytes"))
}

pub(crate) fn take_bytes(body: &mut Bytes) -> Result<Bytes, CodecError> {
    let length = usize::from(take_u16(body)?);
    if length > body.remaining() {
        return Err(SHORT);
    }
    Ok(body.split_to(length))
}

pub(crate) fn take_text(body: &mut Bytes) -> Result<Text, CodecError> {
    Text::check(take_bytes(body)?)
}

pub(crate) fn take_packet_id(body: &mut Bytes) -> Result<u16, CodecError> {
    match take_u16(body)? {
        0 => Err(malformed("the packet id is 0")),
        packet_id => Ok(packet_id),
    }
}

pub(crate) fn end(body: &Bytes) -> Result<(), CodecError> {
    if body.has_remaining() {
        return Err(malformed("bytes follow the end of the packet"));
    }
    Ok(())
}
