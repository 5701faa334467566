//! Any bytes as the parameters of a row: refused or read, and what is read is written as it can be read again.
#![no_main]

use fieldline_postgres::row::{Names, decode, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut names = Names::default();
    if let Ok(params) = decode(bytes, &mut names) {
        let mut again = Vec::new();
        encode(&mut again, &params);
        assert_eq!(decode(&again, &mut names), Ok(params));
    }
});
