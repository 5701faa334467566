//! The header of the PROXY protocol, version 1 (a line) and 2 (binary): bytes in, an address out. No sockets.
//!
//! Written here and not taken from a crate, because of what is around it: the socket must be left at the first byte after
//! the header (TLS begins there), and how many bytes are looked at must be bounded by us.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// What version 1 begins with.
const V1: &[u8] = b"PROXY ";
/// What version 2 begins with: bytes that no line of text has.
const V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// Longest line of version 1, its end included: the protocol's own limit.
pub const V1_BYTES_MAX: usize = 107;
/// What stands before the addresses in version 2.
pub const V2_HEAD_BYTES: usize = 16;
/// Most bytes after that. The protocol allows 65,535; balancers send addresses and a few extensions.
pub const V2_REST_BYTES_MAX: usize = 2_048;

/// How a connection begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beginning {
    /// Not with a header.
    None,
    /// So few bytes came that it may yet be either.
    Unclear,
    /// A line, which ends with a line feed.
    V1,
    /// [`V2_HEAD_BYTES`], then as many as these say.
    V2,
}

/// What the first bytes of a connection begin.
#[must_use]
pub fn beginning(first: &[u8]) -> Beginning {
    let begins = |with: &[u8]| first.iter().zip(with).all(|(a, b)| a == b);
    match first {
        [] => Beginning::Unclear,
        _ if begins(V1) && first.len() >= V1.len() => Beginning::V1,
        _ if begins(V2) && first.len() >= V2.len() => Beginning::V2,
        _ if begins(V1) || begins(V2) => Beginning::Unclear,
        _ => Beginning::None,
    }
}

/// Why a header is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

/// Reads a line of version 1, with its end. `None` where the balancer says that it does not know.
///
/// # Errors
///
/// [`Malformed`].
pub fn read_v1(line: &[u8]) -> Result<Option<SocketAddr>, Malformed> {
    let wrong = || Malformed("the line of version 1 is not as it should be");
    if line.len() > V1_BYTES_MAX {
        return Err(Malformed("the line of version 1 has more than 107 bytes"));
    }
    let text = line.strip_prefix(V1).and_then(|rest| rest.strip_suffix(b"\r\n"));
    let text = text.and_then(|text| std::str::from_utf8(text).ok()).ok_or_else(wrong)?;
    // What follows it is to be passed over.
    if text == "UNKNOWN" || text.starts_with("UNKNOWN ") {
        return Ok(None);
    }
    let mut parts = text.split(' ');
    let mut next = || parts.next().ok_or_else(wrong);
    let (family, source, target) = (next()?, next()?, next()?);
    let (source_port, target_port) = (port(next()?)?, port(next()?)?);
    if parts.next().is_some() {
        return Err(wrong());
    }
    let read = |text: &str| -> Result<IpAddr, Malformed> {
        match family {
            "TCP4" => text.parse().map(IpAddr::V4).map_err(|_| wrong()),
            "TCP6" => text.parse().map(IpAddr::V6).map_err(|_| wrong()),
            _ => Err(wrong()),
        }
    };
    let (source, _, _) = (read(source)?, read(target)?, target_port);
    Ok(Some(SocketAddr::new(source.to_canonical(), source_port)))
}

/// Digits only, and none before that count for nothing.
fn port(text: &str) -> Result<u16, Malformed> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let plain = digits && (text == "0" || !text.starts_with('0'));
    let port = if plain { text.parse().ok() } else { None };
    port.ok_or(Malformed("a port of the line of version 1 is no number up to 65535"))
}

/// How many bytes follow the head of version 2.
///
/// # Errors
///
/// [`Malformed`], also for more than [`V2_REST_BYTES_MAX`].
pub fn v2_rest(head: &[u8; V2_HEAD_BYTES]) -> Result<usize, Malformed> {
    if !head.starts_with(V2) {
        return Err(Malformed("it is not of version 2"));
    }
    let [.., high, low] = *head;
    let rest = usize::from(u16::from_be_bytes([high, low]));
    if rest > V2_REST_BYTES_MAX {
        return Err(Malformed("the header of version 2 has more than 2064 bytes"));
    }
    Ok(rest)
}

/// Reads the head of version 2 and what follows it. `None` where the balancer speaks for itself, as when it asks whether
/// we live, or came by no internet address.
///
/// # Errors
///
/// [`Malformed`].
pub fn read_v2(head: &[u8; V2_HEAD_BYTES], rest: &[u8]) -> Result<Option<SocketAddr>, Malformed> {
    let short = Malformed("the header of version 2 is shorter than its addresses");
    let [.., version, family, _, _] = *head;
    if rest.len() != v2_rest(head)? {
        return Err(Malformed("the header of version 2 has another length than it says"));
    }
    match version {
        0x20 => return Ok(None),
        0x21 => {}
        _ => return Err(Malformed("the command of the header of version 2 is unknown")),
    }
    match family >> 4 {
        1 => {
            let [a, b, c, d, _, _, _, _, high, low] =
                *rest.first_chunk::<10>().filter(|_| rest.len() >= 12).ok_or(short)?;
            let address = IpAddr::V4(Ipv4Addr::new(a, b, c, d));
            Ok(Some(SocketAddr::new(address, u16::from_be_bytes([high, low]))))
        }
        2 => {
            let source = *rest.first_chunk::<16>().ok_or(short)?;
            let ports = rest.get(32..36).and_then(|ports| ports.first_chunk::<2>()).ok_or(short)?;
            let address = IpAddr::V6(Ipv6Addr::from(source)).to_canonical();
            Ok(Some(SocketAddr::new(address, u16::from_be_bytes(*ports))))
        }
        0 | 3 => Ok(None),
        _ => Err(Malformed("the address family of the header of version 2 is unknown")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v2(command: u8, family: u8, rest: &[u8]) -> ([u8; V2_HEAD_BYTES], Vec<u8>) {
        let mut head = [0; V2_HEAD_BYTES];
        head[..12].copy_from_slice(V2);
        head[12] = command;
        head[13] = family;
        head[14..].copy_from_slice(&u16::try_from(rest.len()).unwrap().to_be_bytes());
        (head, rest.to_vec())
    }

    #[test]
    fn lines_of_version_1() {
        let read = |line: &str| read_v1(line.as_bytes());
        let peer = |text: &str| Ok(Some(text.parse().unwrap()));
        assert_eq!(
            read("PROXY TCP4 203.0.113.7 10.0.0.9 51820 5027\r\n"),
            peer("203.0.113.7:51820")
        );
        assert_eq!(read("PROXY TCP6 2001:db8::7 ::1 1 65535\r\n"), peer("[2001:db8::7]:1"));
        assert_eq!(read("PROXY TCP6 ::ffff:203.0.113.7 ::1 1 2\r\n"), peer("203.0.113.7:1"));
        assert_eq!(read("PROXY UNKNOWN\r\n"), Ok(None));
        assert_eq!(read("PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n"), Ok(None));
        let long = format!("PROXY UNKNOWN {}\r\n", "x".repeat(100));
        for wrong in [
            "PROXY TCP4 203.0.113.7 10.0.0.9 51820 5027\n",
            "PROXY TCP4 203.0.113.7 10.0.0.9 51820\r\n",
            "PROXY TCP4 203.0.113.7 10.0.0.9 51820 5027 1\r\n",
            "PROXY TCP4  203.0.113.7 10.0.0.9 51820 5027\r\n",
            "PROXY TCP4 2001:db8::7 10.0.0.9 51820 5027\r\n",
            "PROXY TCP4 203.0.113.7 10.0.0.9 051820 5027\r\n",
            "PROXY TCP4 203.0.113.7 10.0.0.9 +1 5027\r\n",
            "PROXY TCP4 203.0.113.7 10.0.0.9 65536 5027\r\n",
            "PROXY UDP4 203.0.113.7 10.0.0.9 1 5027\r\n",
            "PROXY \r\n",
            "proxy TCP4 203.0.113.7 10.0.0.9 1 5027\r\n",
            &long,
        ] {
            assert!(read(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn headers_of_version_2() {
        // Source address, target address, source port, target port; then an extension of no meaning here.
        let four = [203, 0, 113, 7, 10, 0, 0, 9, 0xca, 0x6c, 0x13, 0xa3, 4, 0, 1, 0];
        let read = |command, family, rest: &[u8]| {
            let (head, rest) = v2(command, family, rest);
            read_v2(&head, &rest)
        };
        assert_eq!(read(0x21, 0x11, &four), Ok(Some("203.0.113.7:51820".parse().unwrap())));
        assert_eq!(read(0x21, 0x11, &four[..12]), read(0x21, 0x11, &four));
        let mut six = [0; 36];
        six[..2].copy_from_slice(&[0x20, 0x01]);
        six[32..34].copy_from_slice(&[0, 7]);
        assert_eq!(read(0x21, 0x21, &six), Ok(Some("[2001::]:7".parse().unwrap())));
        assert_eq!(read(0x20, 0x00, &[]), Ok(None), "the balancer asks whether we live");
        assert_eq!(read(0x20, 0x11, &four), Ok(None));
        assert_eq!(read(0x21, 0x00, &[]), Ok(None));
        assert_eq!(read(0x21, 0x31, &[0; 216]), Ok(None));
        for (command, family, rest) in [
            (0x21, 0x11, &four[..11]),
            (0x21, 0x21, &six[..35]),
            (0x22, 0x11, &four),
            (0x11, 0x11, &four),
            (0x21, 0x41, &four),
        ] {
            assert!(read(command, family, rest).is_err(), "{command:x} {family:x} {rest:?}");
        }
        let (mut head, _) = v2(0x21, 0x11, &four);
        assert!(read_v2(&head, &four[..12]).is_err(), "shorter than it says");
        head[14] = 0xff;
        assert!(v2_rest(&head).is_err(), "longer than is taken");
    }

    #[test]
    fn a_header_is_told_from_what_devices_and_clients_send() {
        for first in [b"PR".as_slice(), b"PROXY", b"\r", &V2[..11], b""] {
            assert_eq!(beginning(first), Beginning::Unclear, "{first:?}");
        }
        let others: [&[u8]; 8] = [
            b"POST /",
            b"PRI * HTTP",
            b"GET",
            b"\x16\x03",
            b"\x00\x0f35",
            b"\r\n#",
            b"\x10\x20",
            b"PROXY\t",
        ];
        for first in others {
            assert_eq!(beginning(first), Beginning::None, "{first:?}");
        }
        assert_eq!(beginning(b"PROXY T"), Beginning::V1);
        assert_eq!(beginning(V2), Beginning::V2);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>, head: [u8; V2_HEAD_BYTES]) {
            let _begun = beginning(&bytes);
            let _read = read_v1(&bytes);
            let _read = read_v2(&head, &bytes);
        }

        #[test]
        fn almost_a_line_is_survived(text in "PROXY (TCP4|TCP6|UNKNOWN)?[ 0-9a-f:.]{0,60}\r?\n?") {
            if let Ok(Some(peer)) = read_v1(text.as_bytes()) {
                prop_assert!(text.starts_with("PROXY TCP"));
                prop_assert!(!peer.to_string().is_empty());
            }
        }

        #[test]
        fn what_a_balancer_writes_is_read(address: [u8; 16], port: u16, target: u16, four: bool) {
            let address = if four {
                IpAddr::V4(Ipv4Addr::new(address[0], address[1], address[2], address[3]))
            } else {
                IpAddr::V6(Ipv6Addr::from(address))
            };
            let family = if four { "TCP4" } else { "TCP6" };
            let line = format!("PROXY {family} {address} {address} {port} {target}\r\n");
            let peer = SocketAddr::new(address.to_canonical(), port);
            prop_assert_eq!(read_v1(line.as_bytes()), Ok(Some(peer)));
            let mut rest = Vec::new();
            for _ in 0..2 {
                match address {
                    IpAddr::V4(address) => rest.extend(address.octets()),
                    IpAddr::V6(address) => rest.extend(address.octets()),
                }
            }
            rest.extend(port.to_be_bytes());
            rest.extend(target.to_be_bytes());
            let (head, rest) = v2(0x21, if four { 0x11 } else { 0x21 }, &rest);
            prop_assert_eq!(read_v2(&head, &rest), Ok(Some(peer)));
        }
    }
}
