//! The whole program, over real sockets and real signals.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test panics where it fails, and says what it measured"
)]

mod bad_input;
mod calls;
mod cluster;
mod config_errors;
mod device;
mod disk_full;
mod doctor;
mod kill;
mod mqtt;
mod mqtt_nodes;
mod protocols;
mod server;
mod stand;
mod start;
mod watchdog;
