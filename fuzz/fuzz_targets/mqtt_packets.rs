//! Any bytes, in any pieces, as what an MQTT client sends.
#![no_main]

use bytes::BytesMut;
use fieldline_mqtt::codec::{Connect, Packet, Version, take_frame};
use fieldline_mqtt::payload;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&chunk, bytes)) = data.split_first() else { return };
    for version in [Version::V3, Version::V5] {
        let mut input = BytesMut::new();
        for piece in bytes.chunks(usize::from(chunk).max(1)) {
            input.extend_from_slice(piece);
            while let Ok(Some(frame)) = take_frame(&mut input, 4_096) {
                if let Ok(connect) = Connect::decode(&frame) {
                    assert!(connect.receive_maximum > 0);
                }
                if let Ok(Packet::Publish(publish)) = Packet::decode(frame, version) {
                    let _read = payload::messages(&publish.payload);
                    let _read = payload::arguments(&publish.payload);
                    // What is forwarded is a part of what came.
                    assert!(publish.props.forward.len() <= bytes.len());
                }
            }
        }
    }
});
