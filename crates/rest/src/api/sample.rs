//! A first message to try a channel with, as a command for a shell that has
//! nothing but bash.

use std::fmt::Write as _;

use fieldline_model::{Channel, Timestamp, Transport};

/// The device that the samples come from.
const TEXT_IDENT: &str = "test-device";
/// The same for protocols whose devices are named by fifteen digits.
const IMEI: &str = "350000000000006";

/// The command that sends a first message to `channel`, which is reached at
/// `host` and `port`, and shows the answer.
pub(crate) fn test_command(channel: &Channel, host: &str, port: u16, now: Timestamp) -> String {
    let udp = channel.transport == Transport::Udp;
    let sample = match channel.protocol.as_str() {
        "wialon_ips" => Some(wialon_ips(udp)),
        "teltonika" => Some(teltonika(udp, now)),
        _ => None,
    };
    let (send, show) = match sample {
        Some(bytes) => (format!("printf \"{}\"", escaped(&bytes)), "od -An -c"),
        None => ("cat frame.bin".to_owned(), "od -An -tx1"),
    };
    match channel.transport {
        Transport::Tcp => {
            format!(
                "bash -c 'exec 3<>/dev/tcp/{host}/{port}; {send} >&3; timeout 2 cat <&3 | {show}'"
            )
        }
        Transport::Udp => {
            format!(
                "bash -c 'exec 3<>/dev/udp/{host}/{port}; {send} >&3; timeout 2 dd bs=2048 count=1 status=none <&3 | {show}'"
            )
        }
        Transport::Tls => {
            format!(
                "bash -c '({send}; sleep 2) | openssl s_client -quiet -connect {host}:{port} | {show}'"
            )
        }
    }
}

/// Bytes as the text of a `printf` within double quotes: letters, digits and a few signs as they are.
fn escaped(bytes: &[u8]) -> String {
    let mut out = String::new();
    let mut after_escape = false;
    for byte in bytes {
        // A hex digit after an escape could be read as part of it by some shells.
        let plain = matches!(byte, b'#' | b';' | b'.' | b'-')
            || byte.is_ascii_alphanumeric() && !(after_escape && byte.is_ascii_hexdigit());
        if plain {
            out.push(char::from(*byte));
        } else {
            // Writing to a String cannot fail.
            let _written = write!(out, "\\x{byte:02x}");
        }
        after_escape = !plain;
    }
    out
}

/// A login and a position, over UDP both in one.
fn wialon_ips(udp: bool) -> Vec<u8> {
    let position = "#SD#NA;NA;5441.9000;N;02516.7000;E;40;90;120;9\r\n";
    let text = if udp {
        format!("{TEXT_IDENT}{position}")
    } else {
        format!("#L#{TEXT_IDENT};NA\r\n{position}")
    };
    text.into_bytes()
}

/// A login and one codec 8 record, over UDP both in one.
fn teltonika(udp: bool, now: Timestamp) -> Vec<u8> {
    let mut data = vec![0x08, 1];
    data.extend((now.as_micros() / 1_000).to_be_bytes());
    data.push(0);
    data.extend(252_783_333_i32.to_be_bytes());
    data.extend(546_983_333_i32.to_be_bytes());
    data.extend(120_i16.to_be_bytes());
    data.extend(90_u16.to_be_bytes());
    data.push(9);
    data.extend(40_u16.to_be_bytes());
    // Event 0; one value: ignition on; no values of the wider kinds; the count again.
    data.extend([0, 1, 1, 239, 1, 0, 0, 0, 1]);
    let length = |bytes: usize| u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes();
    let ident = [&length(IMEI.len()), IMEI.as_bytes()].concat();
    if udp {
        let datagram = [&[0xCA, 0xFE, 1, 1], ident.as_slice(), &data].concat();
        return [&length(datagram.len()), datagram.as_slice()].concat();
    }
    let crc = crc16_arc(&data);
    [&ident, [0; 4].as_slice(), &[0, 0], &length(data.len()), &data, &[0, 0], &crc.to_be_bytes()]
        .concat()
}

/// CRC-16/ARC, as Teltonika's packets end with.
fn crc16_arc(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte), |crc, _| {
            if crc & 1 == 1 { (crc >> 1) ^ 0xA001 } else { crc >> 1 }
        })
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use fieldline_pvm::{Options, Session, Step, library};

    use super::*;

    /// Each sample is a login and one message in the built-in protocol.
    #[test]
    fn samples_are_understood() {
        let now = Timestamp::from_seconds(1_800_000_000);
        for (name, make) in [("teltonika", true), ("wialon_ips", false)] {
            for udp in [false, true] {
                let bytes = if make { teltonika(udp, now) } else { wialon_ips(udp) };
                let source = library::built_in().iter().find(|(n, _)| *n == name).unwrap().1;
                let program = Arc::new(fieldline_pvm::compile(name, source).unwrap());
                let transport = if udp { Transport::Udp } else { Transport::Tcp };
                let mut session = Session::new(program, Options::new(transport));
                session.feed(&bytes);
                session.end_of_input();
                let (mut logins, mut messages) = (0, 0);
                loop {
                    match session.step(now) {
                        Step::NeedMore => break,
                        Step::Login { .. } => {
                            logins += 1;
                            session.login_accepted(&BTreeMap::new());
                        }
                        Step::Frame(frame) => {
                            assert_eq!(frame.error, None, "{name} udp {udp}");
                            messages += frame.messages.len();
                        }
                    }
                }
                assert_eq!((logins, messages), (1, 1), "{name} udp {udp}");
            }
        }
    }

    #[test]
    fn bytes_survive_the_shell() {
        assert_eq!(escaped(b"#L#a\r\n1;\x00f"), "#L#a\\x0d\\x0a\\x31;\\x00\\x66");
    }
}
