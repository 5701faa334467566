//! The message store of Fieldline: a write-ahead log with group commit,
//! memtables, and sealed segments of columns.
//!
//! [`Mdb`] implements [`fieldline_contracts::History`]; start reading there,
//! then `writer` (the way in), `shard` (the way out), `seal` (from memory to
//! segments) and `open` (recovery). It knows nothing of devices or protocols,
//! and may import `fieldline-model` and `fieldline-contracts` only.
//!
//! **Invariants.** An append is answered after its group is synced. A message
//! becomes visible after it is durable. A log file is removed only after the
//! manifest that names the segment of its messages is durable. Segments are
//! never changed. Whatever is read back is checked against its checksum.

mod block;
mod cache;
mod codec;
mod columns;
mod config;
mod dict;
mod disk;
mod hash;
mod manifest;
mod memtable;
mod merge;
mod open;
mod queue;
mod read;
mod retain;
mod seal;
mod segment;
mod shard;
mod snapshot;
mod store;
mod value;
mod wal;
mod writer;

pub use config::{MdbConfig, OpenError};
pub use disk::{Disk, DiskFile, RealDisk};
pub use store::Mdb;
