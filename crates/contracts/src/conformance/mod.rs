//! The conformance suites: each takes a backend and panics where it breaks its contract.

pub mod registry;
