//! Any bytes as what stands on a topic of the bus between nodes; and what was read, written and read again.
#![no_main]

use fieldline_model::{AccountId, DeviceId};
use fieldline_mqtt_bus::encoding::{About, HEAD_BYTES, Head, ITEMS_MAX, Kind, encode, items, open};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((&choice, bytes)) = bytes.split_first() else { return };
    let all =
        [Kind::Message, Kind::State, Kind::Event, Kind::Log, Kind::Client, Kind::Mark];
    let kind = all[usize::from(choice) % all.len()];
    let account = AccountId::from_bytes([1; 16]);
    let about = About { account, kind, object: DeviceId::from_bytes([2; 16]).0 };
    // The check keeps nearly all out.
    let _opened = open(about, bytes);
    let _about = About::of_topic("fieldline", bytes);
    // Past it.
    let count = u16::from(choice >> 4).min(ITEMS_MAX);
    let head = Head { publisher: 1, sequence: 1, missed: 0, count };
    let Ok(read) = items(about, head, bytes) else { return };
    assert_eq!(read.len(), usize::from(count));
    let mut again = Vec::new();
    for batch in encode(account, &read) {
        assert!(batch.len() > HEAD_BYTES);
        let about = batch.about;
        let payload = batch.seal(7, 8, 9);
        let (head, rest) = open(about, &payload).expect("what was written is ours");
        again.extend(items(about, head, rest).expect("what was written is read"));
    }
    assert_eq!(format!("{read:?}"), format!("{again:?}"));
});
