//! Opening and reading a segment of any bytes, past its checksums: no panic, no growth without bound.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _messages = fieldline_mdb::fuzz::segment(bytes);
});
