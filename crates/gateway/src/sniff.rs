//! Recognises peers that speak another protocol by their first bytes.

/// What the first bytes of a connection look like, if it is nothing a tracker would send.
///
/// Only asked where the channel's own protocol can make nothing of them.
pub(crate) fn foreign_protocol(first: &[u8]) -> Option<&'static str> {
    const HTTP: [&[u8]; 9] = [
        b"GET ",
        b"POST ",
        b"HEAD ",
        b"PUT ",
        b"OPTIONS ",
        b"CONNECT ",
        b"DELETE ",
        b"PATCH ",
        b"PRI * HT",
    ];
    let begins = |with: &[u8]| first.starts_with(with);
    if HTTP.iter().any(|method| begins(method)) {
        return Some("http");
    }
    if begins(b"SSH-") {
        return Some("ssh");
    }
    // A TLS record: handshake, version 3.x.
    if let [0x16, 0x03, 0x00..=0x04, ..] = first {
        return Some("tls");
    }
    // Remote desktop: TPKT version 3, then the length of a connection request.
    if let [0x03, 0x00, 0x00, length, ..] = first
        && (7..64).contains(length)
        && first.get(5) == Some(&0xe0)
    {
        return Some("rdp");
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            let _protocol = foreign_protocol(&bytes);
        }
    }

    #[test]
    fn scanners_are_told_from_trackers() {
        assert_eq!(foreign_protocol(b"GET / HT"), Some("http"));
        assert_eq!(foreign_protocol(b"SSH-2.0-"), Some("ssh"));
        assert_eq!(foreign_protocol(&[0x16, 3, 1, 2, 0, 1, 0, 1]), Some("tls"));
        assert_eq!(foreign_protocol(&[3, 0, 0, 19, 14, 0xe0, 0, 0]), Some("rdp"));
        for tracker in [b"\x00\x0f35209".as_slice(), b"#L#imei;", b"##,imei:", b"", b"G", b"\x00"] {
            assert_eq!(foreign_protocol(tracker), None, "{tracker:?}");
        }
    }
}
