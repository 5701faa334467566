//! What a Teltonika tracker writes and reads, by hand.

use fieldline_model::Timestamp;

use crate::route::Sample;

/// AVL id that carries a record's sequence number (a free one of the manual CAN range).
pub const SEQUENCE_ID: u16 = 145;
/// The parameter by which a stored message shows it.
pub const SEQUENCE_PARAM: &str = "io.145";

/// Which record format a tracker uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// Codec 8: ids of one byte.
    Eight,
    /// Codec 8 extended: ids of two bytes.
    EightExtended,
}

/// One AVL record.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Record {
    /// When.
    pub at: Timestamp,
    /// What was measured.
    pub sample: Sample,
    /// Counts up within a device, from 1.
    pub sequence: u32,
}

/// CRC-16/ARC.
#[must_use]
pub fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |mut crc: u16, byte| {
        crc ^= u16::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xa001 } else { crc >> 1 };
        }
        crc
    })
}

/// The first bytes of a connection.
#[must_use]
pub fn login(ident: &str) -> Vec<u8> {
    let length = u16::try_from(ident.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes()[..], ident.as_bytes()].concat()
}

#[allow(clippy::cast_possible_truncation, reason = "degrees × 10⁷ fit 32 bits")]
fn degrees(value: f64) -> [u8; 4] {
    ((value * 1e7).round() as i32).to_be_bytes()
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped to the range before"
)]
fn short(value: f64) -> [u8; 2] {
    (value.round().clamp(0.0, 65_535.0) as u16).to_be_bytes()
}

/// The codec id, the records and their counts: what TCP and UDP packets share.
#[must_use]
pub fn payload(codec: Codec, records: &[Record]) -> Vec<u8> {
    let count = u8::try_from(records.len()).unwrap_or(u8::MAX);
    let mut out = vec![if codec == Codec::Eight { 0x08 } else { 0x8e }, count];
    for record in records.iter().take(usize::from(count)) {
        push_record(codec, record, &mut out);
    }
    out.push(count);
    out
}

fn push_record(codec: Codec, record: &Record, out: &mut Vec<u8>) {
    let Record { at, sample, sequence } = record;
    out.extend((at.as_micros() / 1_000).to_be_bytes());
    out.push(0);
    out.extend(degrees(sample.longitude));
    out.extend(degrees(sample.latitude));
    out.extend(short(sample.altitude_m));
    out.extend(short(sample.direction.floor()));
    out.push(sample.satellites);
    out.extend(short(sample.speed_kmh));
    let moving = u8::from(sample.speed_kmh > 1.0);
    let ones: [(u16, [u8; 1]); 3] =
        [(239, [u8::from(sample.ignition)]), (240, [moving]), (21, [sample.gsm_signal])];
    let twos: [(u16, [u8; 2]); 2] =
        [(66, sample.external_mv.to_be_bytes()), (67, sample.battery_mv.to_be_bytes())];
    let fours: [(u16, [u8; 4]); 2] =
        [(16, sample.odometer_m.to_be_bytes()), (SEQUENCE_ID, sequence.to_be_bytes())];
    let number = |value: u16, out: &mut Vec<u8>| match codec {
        // Ids and counts here are all below 256.
        Codec::Eight => out.push(value.to_be_bytes()[1]),
        Codec::EightExtended => out.extend(value.to_be_bytes()),
    };
    number(0, out);
    number(7, out);
    number(3, out);
    ones.iter().for_each(|(id, value)| {
        number(*id, out);
        out.extend(value);
    });
    number(2, out);
    twos.iter().for_each(|(id, value)| {
        number(*id, out);
        out.extend(value);
    });
    number(2, out);
    fours.iter().for_each(|(id, value)| {
        number(*id, out);
        out.extend(value);
    });
    number(0, out);
    if codec == Codec::EightExtended {
        number(0, out);
    }
}

/// A TCP packet around a payload.
#[must_use]
pub fn tcp_packet(payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let crc = u32::from(crc16(payload));
    [&[0; 4][..], &length.to_be_bytes(), payload, &crc.to_be_bytes()].concat()
}

/// A datagram around a payload; its answer repeats `packet` and `avl`.
#[must_use]
pub fn udp_packet(ident: &str, packet: u16, avl: u8, payload: &[u8]) -> Vec<u8> {
    let mut body = packet.to_be_bytes().to_vec();
    body.extend([0x01, avl]);
    body.extend(login(ident));
    body.extend(payload);
    let length = u16::try_from(body.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes()[..], &body].concat()
}

/// How many records the answer to a datagram accepts, if it is the answer to this one.
#[must_use]
pub fn udp_accepted(answer: &[u8], packet: u16, avl: u8) -> Option<u32> {
    match answer {
        [0, 5, high, low, 1, of, count] if *of == avl => {
            // Some servers answer with packet id 0.
            let id = u16::from_be_bytes([*high, *low]);
            (id == packet || id == 0).then(|| u32::from(*count))
        }
        _ => None,
    }
}

/// A codec 12 packet: a device's answer (type 6) or a command (type 5).
#[must_use]
pub fn text_packet(kind: u8, text: &str) -> Vec<u8> {
    tcp_packet(&text_payload(kind, text))
}

/// What stands in a codec 12 packet, or in a datagram.
#[must_use]
pub fn text_payload(kind: u8, text: &str) -> Vec<u8> {
    let size = u32::try_from(text.len()).unwrap_or(u32::MAX);
    let mut payload = vec![0x0c, 1, kind];
    payload.extend(size.to_be_bytes());
    payload.extend(text.as_bytes());
    payload.push(1);
    payload
}

/// The command in a datagram from the server, if it is one: it has the form it has over TCP.
#[must_use]
pub fn udp_command(datagram: &[u8]) -> Option<String> {
    if !datagram.starts_with(&[0; 4]) {
        return None;
    }
    match take_from_server(&mut datagram.to_vec())? {
        FromServer::Command(text) => Some(text),
        FromServer::Accepted(_) => None,
    }
}

/// What the server sends over TCP after the login.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromServer {
    /// So many records were accepted.
    Accepted(u32),
    /// A command by codec 12.
    Command(String),
}

/// Takes one of the server's words off `buffer`; `None` until it is whole.
pub fn take_from_server(buffer: &mut Vec<u8>) -> Option<FromServer> {
    let head: [u8; 4] = buffer.first_chunk().copied()?;
    if head != [0; 4] {
        buffer.drain(..4);
        return Some(FromServer::Accepted(u32::from_be_bytes(head)));
    }
    let length: [u8; 4] = buffer.get(4..8)?.try_into().ok()?;
    let length = usize::try_from(u32::from_be_bytes(length)).ok()?;
    let total = length.checked_add(12)?;
    if buffer.len() < total {
        return None;
    }
    let packet: Vec<u8> = buffer.drain(..total).collect();
    // Codec, count, type and size before the text; a count after it.
    let text = packet.get(15..7 + length).unwrap_or_default();
    Some(FromServer::Command(String::from_utf8_lossy(text).into_owned()))
}

#[cfg(test)]
mod tests {
    use fieldline_model::value::to_hex;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_command_packet_is_what_trackers_know() {
        let packet = text_packet(5, "getinfo");
        assert_eq!(to_hex(&packet), "000000000000000f0c010500000007676574696e666f0100004312");
        let mut buffer = [&packet[..], &[0, 0, 0, 3]].concat();
        assert_eq!(take_from_server(&mut buffer), Some(FromServer::Command("getinfo".to_owned())));
        assert_eq!(take_from_server(&mut buffer), Some(FromServer::Accepted(3)));
        assert_eq!(take_from_server(&mut buffer), None);
    }

    #[test]
    fn a_datagram_is_a_command_or_an_answer() {
        assert_eq!(udp_command(&text_packet(5, "getinfo")).as_deref(), Some("getinfo"));
        assert_eq!(udp_command(&[0, 5, 0, 1, 1, 1, 3]), None);
        assert_eq!(udp_command(&[0, 0, 0, 0, 0, 0, 0, 9, 1]), None);
    }

    #[test]
    fn the_checksum_is_the_known_one() {
        assert_eq!(crc16(b"123456789"), 0xbb3d);
    }

    proptest! {
        #[test]
        fn anything_from_the_server_is_survived(mut bytes: Vec<u8>) {
            for _ in 0..10 {
                let _command = udp_command(&bytes);
                let _word = take_from_server(&mut bytes);
            }
        }
    }
}
