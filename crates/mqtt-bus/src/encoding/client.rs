//! How what is between MQTT clients travels.
//!
//! ```text
//! item     = 0 origin (8) flags (1) [expires at] topic payload props
//!          | 1 origin (8) count (client id, number)*
//! flags    = 1: at least once, 2: retained, 4: it expires
//! ```

use std::sync::Arc;

use bytes::Bytes;
use fieldline_contracts::clients::{CLIENT_MESSAGE_BYTES_MAX, CLIENT_SESSIONS_MAX};
use fieldline_contracts::{BusItem, ClientMessage, ClientSessions};
use fieldline_model::Timestamp;
use fieldline_model::codec::{Damage, Input, part, put_bytes, put_varint};

use super::input::UNKNOWN;

const MESSAGE: u8 = 0;
const SESSIONS: u8 = 1;

const AT_LEAST_ONCE: u8 = 1;
const RETAIN: u8 = 2;
const EXPIRES: u8 = 4;

pub(super) fn put_message(out: &mut Vec<u8>, message: &ClientMessage) {
    let ClientMessage { origin, topic, payload, props, at_least_once, retain, expires_at } =
        message;
    let flag = |set: bool, flag: u8| if set { flag } else { 0 };
    out.push(MESSAGE);
    out.extend_from_slice(&origin.to_be_bytes());
    out.push(
        flag(*at_least_once, AT_LEAST_ONCE)
            | flag(*retain, RETAIN)
            | flag(expires_at.is_some(), EXPIRES),
    );
    out.extend(expires_at.iter().flat_map(|at| at.as_micros().to_be_bytes()));
    put_bytes(out, topic.as_bytes());
    put_bytes(out, payload);
    put_bytes(out, props);
}

pub(super) fn put_sessions(out: &mut Vec<u8>, sessions: &ClientSessions) {
    out.push(SESSIONS);
    out.extend_from_slice(&sessions.origin.to_be_bytes());
    put_varint(out, sessions.sessions.len() as u64);
    for (client_id, number) in &sessions.sessions {
        put_bytes(out, client_id.as_bytes());
        out.extend_from_slice(&number.to_be_bytes());
    }
}

/// The next item.
pub(super) fn read(input: &mut Input<'_>, parts: &mut usize) -> Result<BusItem, Damage> {
    part(parts)?;
    let kind = input.u8()?;
    let origin = u64::from_be_bytes(input.array()?);
    match kind {
        MESSAGE => message(input, origin).map(|one| BusItem::Client(Arc::new(one))),
        SESSIONS => sessions(input, parts, origin).map(|all| BusItem::Sessions(Arc::new(all))),
        _ => Err(UNKNOWN),
    }
}

fn message(input: &mut Input<'_>, origin: u64) -> Result<ClientMessage, Damage> {
    let flags = input.u8()?;
    if flags & !(AT_LEAST_ONCE | RETAIN | EXPIRES) != 0 {
        return Err(UNKNOWN);
    }
    let expires_at = match flags & EXPIRES {
        0 => None,
        _ => Some(Timestamp::from_micros(i64::from_be_bytes(input.array()?))),
    };
    let message = ClientMessage {
        origin,
        topic: input.text()?.into(),
        payload: Bytes::copy_from_slice(input.bytes()?),
        props: Bytes::copy_from_slice(input.bytes()?),
        at_least_once: flags & AT_LEAST_ONCE != 0,
        retain: flags & RETAIN != 0,
        expires_at,
    };
    if message.content_bytes() > CLIENT_MESSAGE_BYTES_MAX {
        return Err(UNKNOWN);
    }
    Ok(message)
}

fn sessions(
    input: &mut Input<'_>,
    parts: &mut usize,
    origin: u64,
) -> Result<ClientSessions, Damage> {
    let count = input.count()?;
    if count > CLIENT_SESSIONS_MAX {
        return Err(UNKNOWN);
    }
    let mut sessions = Vec::with_capacity(count);
    for _ in 0..count {
        part(parts)?;
        let client_id = input.text()?.into();
        sessions.push((client_id, u64::from_be_bytes(input.array()?)));
    }
    Ok(ClientSessions { origin, sessions })
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn bytes() -> impl Strategy<Value = Bytes> {
        vec(any::<u8>(), 0..200).prop_map(Bytes::from)
    }

    /// A message of a client.
    pub(in super::super) fn message() -> impl Strategy<Value = BusItem> {
        let flags = (any::<bool>(), any::<bool>(), any::<Option<i64>>());
        (any::<u64>(), ".{0,20}", bytes(), bytes(), flags).prop_map(
            |(origin, topic, payload, props, (at_least_once, retain, at))| {
                BusItem::Client(Arc::new(ClientMessage {
                    origin,
                    topic: topic.into(),
                    payload,
                    props,
                    at_least_once,
                    retain,
                    expires_at: at.map(Timestamp::from_micros),
                }))
            },
        )
    }

    /// Sessions of clients.
    pub(in super::super) fn sessions() -> impl Strategy<Value = BusItem> {
        let one = (".{0,12}".prop_map(Arc::from), any::<u64>());
        (any::<u64>(), vec(one, 0..5)).prop_map(|(origin, sessions)| {
            BusItem::Sessions(Arc::new(ClientSessions { origin, sessions }))
        })
    }
}
