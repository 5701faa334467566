//! What a node owns stops with its lease, whether or not the node is awake.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::server::{PATIENCE, Server, wait_for};
use crate::stand::Stand;

/// A worker that is stopped past its lease is ended while it is stopped: nothing of it runs again. Its master starts the next.
#[test]
fn a_stopped_owner_is_ended_and_comes_back() {
    let stand = Stand::start();
    let text = stand
        .text()
        .replace("[http]\nlisten = \"127.0.0.1:0\"\n[mqtt]\nlisten = \"127.0.0.1:0\"\n", "");
    let server = Server::node(&stand.write("node", &text), "node");
    wait_for("the node to own something", || {
        let page = server.ask("GET", "/api/v1/nodes", None).to_string();
        page.contains("retention").then_some(())
    });
    let worker = server.present_worker().unwrap();
    let began = Instant::now();
    server.signal(Signal::STOP);
    wait_for("the end of the stopped worker", || {
        let now = server.present_worker();
        (now != Some(worker)).then_some(())
    });
    let ended = began.elapsed();
    println!("a stopped owner was ended after {ended:?}");
    assert!(ended < Duration::from_secs(6), "{ended:?}");
    wait_for("the next worker", || {
        (server.try_ask("GET", "/readyz", None)?.0 == 200).then_some(())
    });
    println!("its next worker was ready {:?} after it was stopped", began.elapsed());
    assert!(began.elapsed() < PATIENCE);
    server.stop();
}
