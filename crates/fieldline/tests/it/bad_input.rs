//! What a hostile or broken peer can do: it gets its close code, and nobody else notices.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::{Value as Json, json};

use crate::device::Fleet;
use crate::server::{PATIENCE, Server, wait_for};

/// A configuration with short waits.
const CONFIG: &str = "[gateway]\nlogin_timeout = \"4s\"\nframe_timeout = \"2s\"\n";

fn start(data: &std::path::Path) -> Server {
    let config = data.join("config.toml");
    std::fs::write(&config, CONFIG).unwrap();
    Server::start(&data.join("data"), &["--config", config.to_str().unwrap()])
}

/// Sends bytes and reads until the server closes.
fn send(port: u16, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // The server may have closed before it was sent all.
    let _closed_early = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _reset = stream.read_to_end(&mut answer);
    answer
}

/// Waits for a line in the channel's log that says how a connection ended.
fn closed_as(server: &Server, channel: &str, name: &str) -> Json {
    wait_for(&format!("close code {name}"), || {
        let page = server.ask(
            "GET",
            &format!("/api/v1/channels/{channel}/log?reverse=true&limit=1000"),
            None,
        );
        page["items"].as_array().unwrap().iter().find(|line| line["close.name"] == name).cloned()
    })
}

#[test]
fn each_fault_has_its_close_code() {
    let data = tempfile::tempdir().unwrap();
    let server = start(data.path());
    let (teltonika, port) = server.channel("teltonika", "tcp", json!({ "frame_bytes_max": 4096 }));
    let (closed, closed_port) =
        server.channel("teltonika", "tcp", json!({ "auto_register": false }));
    let (text, text_port) = server.channel("wialon_ips", "tcp", json!({ "frame_bytes_max": 4096 }));

    send(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    closed_as(&server, &teltonika, "wrong_protocol");
    let silent = TcpStream::connect(("127.0.0.1", port)).unwrap();
    closed_as(&server, &teltonika, "login_timeout");
    drop(silent);
    // A login of which only the first byte comes.
    let mut slow = TcpStream::connect(("127.0.0.1", port)).unwrap();
    slow.write_all(&[0]).unwrap();
    closed_as(&server, &teltonika, "frame_timeout");
    // A device that nobody has registered is refused in the protocol's words.
    assert_eq!(send(closed_port, b"\x00\x0f356307042441013"), [0]);
    closed_as(&server, &closed, "unknown_device");
    // A line without an end, longer than the channel takes.
    send(text_port, &[b"#D#".as_slice(), &vec![b'1'; 8_192]].concat());
    closed_as(&server, &text, "frame_too_large");
    server.stop();
}

#[test]
fn a_wrong_checksum_stores_nothing_and_is_not_acknowledged() {
    let data = tempfile::tempdir().unwrap();
    let server = start(data.path());
    let (_, port) = server.channel("teltonika", "tcp", json!({}));
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"\x00\x0f356307042441013").unwrap();
    let mut accepted = [0; 1];
    stream.read_exact(&mut accepted).unwrap();
    assert_eq!(accepted, [1]);
    // One codec 8 record with nothing in it, and a wrong CRC.
    let mut body = vec![8, 1];
    body.extend([0; 24]);
    body.extend([0; 6]);
    body.push(1);
    let mut packet = vec![0; 4];
    packet.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
    packet.extend(body);
    packet.extend([0, 0, 0xBA, 0xD0]);
    stream.write_all(&packet).unwrap();
    let mut answer = Vec::new();
    let _reset = stream.read_to_end(&mut answer);
    assert!(answer.is_empty() || answer == [0; 4], "acknowledged: {answer:?}");
    let device = server.device("356307042441013").unwrap();
    wait_for("the log to say why", || {
        let log = server.list(&format!("/api/v1/devices/{device}/log"));
        log.iter().any(|line| line["error.class"] == "bad_crc").then_some(())
    });
    assert!(server.list(&format!("/api/v1/devices/{device}/messages")).is_empty());
}

#[test]
fn silent_connections_and_random_bytes_do_not_stop_others() {
    let data = tempfile::tempdir().unwrap();
    let server = start(data.path());
    let (_, port) = server.channel("wialon_ips", "tcp", json!({}));
    let (_, binary) = server.channel("teltonika", "tcp", json!({}));
    let fleet = Fleet::start(port, 4);
    wait_for("messages", || (fleet.acked() > 20).then_some(()));
    let before = server.resident_bytes();
    let mut held = Vec::new();
    for _ in 0..2_000 {
        held.push(TcpStream::connect(("127.0.0.1", port)).unwrap());
    }
    let mut seed = 0x9E37_79B9_7F4A_7C15_u64;
    for _ in 0..50 {
        let mut noise = Vec::with_capacity(4_096);
        while noise.len() < 4_096 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            noise.extend(seed.to_le_bytes());
        }
        for port in [port, binary] {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
            let _closed_early = stream.write_all(&noise);
        }
    }
    let acked = fleet.acked();
    wait_for("messages of others", || (fleet.acked() > acked + 100).then_some(()));
    let grown = server.resident_bytes().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes for 2,000 silent connections");
    // They are let go of by themselves.
    wait_for("silent connections to be closed", || {
        let channels = server.list("/api/v1/channels");
        let open: u64 = channels.iter().filter_map(|c| c["status"]["connections"].as_u64()).sum();
        (open <= 4).then_some(())
    });
    fleet.finish();
    server.stop();
}
