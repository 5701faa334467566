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

mod aggregate;
mod block;
mod cache;
mod codec;
mod columns;
mod config;
mod dict;
mod disk;
mod hash;
mod index;
mod inspect;
mod manifest;
mod memtable;
mod merge;
mod open;
mod queue;
mod read;
mod retain;
mod seal;
mod segment;
mod segment_writer;
mod shard;
mod snapshot;
mod store;
mod tail;
mod value;
mod wal;
mod writer;

pub use aggregate::Aggregate;
pub use config::{MdbConfig, OpenError};
pub use disk::{Disk, DiskFile, RealDisk};
pub use inspect::{Depth, inspect};
pub use store::Mdb;

/// Entries for fuzzing: they read bytes as what is on disk, and must never panic.
#[doc(hidden)]
pub mod fuzz {
    /// Recovers a log file, the first of shard 0, with right checksums put in where they are wrong.
    /// Returns how many messages it holds.
    #[must_use]
    pub fn wal(bytes: &[u8]) -> usize {
        let mut count = 0;
        let mut visit = |message: crate::wal::Replayed<'_>| {
            count += usize::from(!message.body.is_empty());
        };
        crate::wal::replay(bytes, 1, 0, &mut visit);
        // Past the checksums, which random bytes never pass.
        crate::wal::replay(&crate::wal::with_checksums(bytes), 1, 0, &mut visit);
        count
    }

    /// Reads a segment without regard to checksums. Returns how many messages it holds.
    #[must_use]
    pub fn segment(bytes: &[u8]) -> usize {
        crate::segment::read_any(bytes).unwrap_or(0)
    }
}
