//! Any bytes, as what a listed balancer sends before its client's: a PROXY header, or a forwarded one.
#![no_main]

use fieldline_runtime::Balancers;
use fieldline_runtime::balancers::Forwarded;
use fieldline_runtime::balancers::proxy::{self, Beginning, V1_BYTES_MAX, V2_HEAD_BYTES};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(Some(_)) = proxy::read_v1(data) {
        assert!(data.len() <= V1_BYTES_MAX && proxy::beginning(data) == Beginning::V1);
    }
    if let Some((head, rest)) = data.split_first_chunk::<V2_HEAD_BYTES>()
        && let Ok(Some(_)) = proxy::read_v2(head, rest)
    {
        assert_eq!(proxy::beginning(data), Beginning::V2);
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    let peer = std::net::SocketAddr::from(([10, 0, 0, 8], 4_000));
    for header in [Forwarded::XForwardedFor, Forwarded::Forwarded] {
        let addresses = "10.0.0.0/8".parse().into_iter().collect();
        let client = Balancers { addresses, header }.client(peer, text.lines(), Some(text));
        assert!(client.is_some(), "a listed peer is always answered for");
    }
});
