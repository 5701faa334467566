//! Any bytes as the parameters of a row: refused or read, and what is read is written as it can be read again.
#![no_main]

use std::sync::Arc;

use fieldline_model::ParamName;
use fieldline_postgres::row::{Dictionary, Names, decode, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let names =
        ["position.latitude", "n", "power.voltage"].map(|name| ParamName::new(name).unwrap());
    let dictionary = Arc::new(Dictionary::of((1..).zip(names)));
    let mut names = Names::of(Arc::clone(&dictionary));
    if let Ok(params) = decode(bytes, &mut names) {
        let mut again = Vec::new();
        encode(&mut again, &params, &dictionary, &mut |_| {});
        assert_eq!(decode(&again, &mut names), Ok(params));
    }
});
