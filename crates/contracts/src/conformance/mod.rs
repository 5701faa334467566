//! The conformance suites: each takes a backend and panics where it breaks its contract.

pub mod blobs;
pub mod bus;
pub mod calls;
pub mod client_store;
pub mod cluster;
pub mod history;
pub mod registry;
pub mod state;
