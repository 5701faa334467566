//! The whole program, over real sockets and real signals.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test panics where it fails, and says what it measured"
)]

mod bad_input;
mod blobs;
mod calls;
mod cluster;
mod config_errors;
mod device;
mod disk_full;
mod doctor;
mod faults;
mod kill;
mod mqtt;
mod mqtt_nodes;
mod protocols;
mod server;
mod stand;
mod start;
mod watchdog;

/// The S3 server of these tests, which is this program started again; see `testkit::servers::S3`.
#[test]
fn s3_server() {
    if fieldline_testkit::servers::S3::serve_if_told() {
        return;
    }
    let mut server = fieldline_testkit::servers::S3::start();
    server.restart();
    assert_eq!(server.uploads(), 0);
}
