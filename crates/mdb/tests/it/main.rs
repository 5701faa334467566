//! Tests of the message store through its public face.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "a test may panic"
)]

mod common;
mod conformance;
mod damage;
mod fake_disk;
mod faults;
mod formats;
mod inspect;
mod kill;
mod late;
mod limits;
mod logs;
mod model;
mod mutations;
mod sealed;
