//! The broker over real sockets: by real clients, and byte for byte.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says what it measured"
)]

mod balancers;
mod harness;
mod hostile;
mod isolation;
mod limits;
mod mosquitto;
mod nodes;
mod pipeline;
mod protocol;
mod rights;
mod wire;
