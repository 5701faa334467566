//! Real servers for tests: each on a free port, in a temporary folder of its own, gone when dropped.
//!
//! They are Debian packages; `cargo xtask test` installs what is missing. A test that finds none fails and says which
//! package it wants: it never passes over what it cannot check.

mod etcd;
mod mosquitto;
mod patroni;
mod place;
mod postgres;
mod process;
mod redis;
mod zones;

pub use etcd::{Etcd, EtcdCluster};
pub use mosquitto::Mosquitto;
pub use patroni::{Database, Pace, Patroni};
pub use place::Place;
pub use postgres::Postgres;
pub use process::{Launch, Process, free_port};
pub use redis::Redis;
pub use zones::Zones;

pub use rustix::process::Signal;

#[cfg(feature = "s3")]
mod s3;
#[cfg(feature = "s3")]
pub use s3::S3;

mod cut;
pub use cut::{Cut, Flow};

#[cfg(test)]
mod tests;
