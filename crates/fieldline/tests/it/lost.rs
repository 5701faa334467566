//! A killed node cannot say that its devices went offline: another does, once.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use serde_json::{Value as Json, json};

use super::{World, address};
use crate::server::{Server, wait_for};

fn login(place: &str, ident: &str) -> TcpStream {
    let mut stream = TcpStream::connect(place).unwrap();
    stream.write_all(format!("#L#{ident};NA\r\n").as_bytes()).unwrap();
    let mut answer = [0; 7];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"#AL#1\r\n");
    stream
}

fn offline(node: &Server, ident: &str) -> Vec<Json> {
    let events = node.list("/api/v1/events");
    let of = |event: &&Json| event["kind"] == "offline" && event["params"]["ident"] == ident;
    events.iter().filter(of).cloned().collect()
}

#[test]
fn a_killed_nodes_devices_are_told_offline() {
    let world = World::start();
    let mut nodes: Vec<Server> = (1..=3).map(|number| world.node(number)).collect();
    let (id, port) = nodes[0].channel("wialon_ips", "tcp", json!({}));
    for node in &nodes {
        wait_for("the channel to listen on each node", || {
            let channel = node.ask("GET", &format!("/api/v1/channels/{id}"), None);
            channel["status"]["listening"].as_bool()?.then_some(())
        });
    }
    let at = |number: usize| format!("{}:{port}", address(number));
    let (_gone, _moved) = (login(&at(3), "gone"), login(&at(3), "moved"));
    let _here = login(&at(1), "here");
    nodes.remove(2).kill();
    let began = std::time::Instant::now();
    let _again = login(&at(2), "moved");
    let events = wait_for("the device to be told offline", || {
        let events = offline(&nodes[0], "gone");
        (!events.is_empty()).then_some(events)
    });
    println!("a node killed: its device was told offline after {:?}", began.elapsed());
    assert_eq!(
        (&events[0]["params"]["close.name"], &events[0]["params"]["node"]),
        (&json!("node_lost"), &json!("node-3"))
    );
    // The node comes back as another process: nothing more is to be told, of anybody.
    let back = world.node(3);
    wait_for("the one that moved to be online", || {
        let device = nodes[0].device("moved")?;
        let found = nodes[0].ask("GET", &format!("/api/v1/devices/{device}"), None);
        found["online"].as_bool()?.then_some(())
    });
    for ident in ["moved", "here"] {
        assert_eq!(offline(&nodes[0], ident), Vec::<Json>::new(), "{ident}");
    }
    assert_eq!(offline(&back, "gone").len(), 1);
    back.stop();
    for node in nodes {
        node.stop();
    }
}
