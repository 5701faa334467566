//! Recovery of a log file of any bytes: no panic, no growth beyond its size.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _messages = fieldline_mdb::fuzz::wal(bytes);
});
