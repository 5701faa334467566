//! Tests of the protocol language from outside.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test that stumbles fails"
)]

mod docs;
mod lang;
mod properties;
mod vectors;
