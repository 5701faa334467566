//! Any bytes as a value, as stores and the bus keep them: refused or read within its bounds, and what is read is
//! written so that it is read again.
#![no_main]

use fieldline_model::codec::{Input, Kind, PARTS_MAX, put_tagged, take_tagged, take_value};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some((&kind, rest)) = bytes.split_first()
        && let Ok(kind) = Kind::from_u8(kind & 7)
    {
        let _untagged = take_value(&mut Input(rest), kind, bytes.len() as u8);
    }
    let mut input = Input(bytes);
    let mut parts = PARTS_MAX;
    let Ok(value) = take_tagged(&mut input, &mut parts) else { return };
    let mut again = Vec::new();
    put_tagged(&mut again, &value);
    let read = take_tagged(&mut Input(&again), &mut { PARTS_MAX });
    assert_eq!(read, Ok(value));
});
