//! The API over real sockets.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    unreachable_pub,
    reason = "a test fails by panicking, and is no library"
)]

mod commands;
mod forwarded;
mod live;
mod messages;
mod objects;
mod protocols;
mod server;
mod sessions;
mod support;
mod tenants;
