//! Any text, as what stands in an address, a list of networks or a token.
#![no_main]

use fieldline_auth::Network;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(network) = text.parse::<Network>() {
        assert_eq!(network.to_string().parse(), Ok(network));
    }
    fieldline_rest::read_query(text);
});
