//! `RedisState` against real servers, and what becomes of it when they fail.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test that cannot go on panics, and prints what it measured"
)]

mod conformance;
mod connect;
mod faults;
mod nodes;
mod status;
mod support;
