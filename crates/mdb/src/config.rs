//! Settings of the store, and why it did not open.

use std::path::PathBuf;
use std::time::Duration;

/// Settings of a store. The worst case of memory is
/// `shards × (queue_bytes_max + (frozen_max + 1) × memtable_bytes_max) + cache_bytes_max`, and
/// the directories of the segments' indexes, some 60 bytes for every 8 KiB of index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MdbConfig {
    /// Shards, each with its own log and writer thread; 1 to 64. Fixed when the
    /// store is created: later the number on disk counts.
    pub shards: u16,
    /// A log file is closed and its messages are sealed beyond this size, in bytes. At least 64 KiB.
    pub wal_bytes_max: u64,
    /// Messages in memory are sealed beyond this size, in bytes. At least 64 KiB.
    pub memtable_bytes_max: usize,
    /// Memtables that may wait to be sealed, per shard. At this number, appends
    /// wait for at most [`MdbConfig::seal_wait_max`] and are then refused as busy.
    pub frozen_max: usize,
    /// Longest that a group of appends waits for sealing to catch up.
    pub seal_wait_max: Duration,
    /// Messages are sealed at this age at the latest, so that a restart replays
    /// no more. Judged once a second by the store's clock.
    pub seal_age_max: Duration,
    /// Bytes of messages that may wait for a writer, per shard. Appends beyond
    /// wait for room for at most [`MdbConfig::queue_wait_max`].
    pub queue_bytes_max: usize,
    /// Longest that an append waits for room in the queue before it is refused as busy.
    pub queue_wait_max: Duration,
    /// Most messages written with one sync.
    pub group_messages_max: usize,
    /// Decoded blocks, pages of indexes and tail windows kept in memory, in bytes.
    pub cache_bytes_max: usize,
    /// A segment of this size is not merged any more, in bytes.
    pub segment_bytes_max: u64,
    /// Segments of one day and shard at which the smallest are merged; at least 2.
    pub merge_fan_in: usize,
    /// Segments whose indexes come to more together are not merged, in bytes: while
    /// they are, the index is in memory whole, several times its size. At most 32 MiB.
    pub merge_index_bytes_max: usize,
}

impl Default for MdbConfig {
    fn default() -> Self {
        Self {
            shards: 1,
            wal_bytes_max: 64 << 20,
            memtable_bytes_max: 24 << 20,
            frozen_max: 2,
            seal_wait_max: Duration::from_secs(2),
            seal_age_max: Duration::from_secs(15 * 60),
            queue_bytes_max: 16 << 20,
            queue_wait_max: Duration::from_secs(5),
            group_messages_max: 20_000,
            cache_bytes_max: 24 << 20,
            segment_bytes_max: 256 << 20,
            merge_fan_in: 6,
            merge_index_bytes_max: 16 << 20,
        }
    }
}

impl MdbConfig {
    /// Checks what types cannot.
    pub(crate) fn validate(&self) -> Result<(), OpenError> {
        // Exhaustive on purpose: a new field does not compile until judged here.
        let Self {
            shards,
            wal_bytes_max,
            memtable_bytes_max,
            frozen_max,
            seal_wait_max: _,
            seal_age_max: _,
            queue_bytes_max,
            queue_wait_max: _,
            group_messages_max,
            cache_bytes_max: _,
            segment_bytes_max,
            merge_fan_in,
            merge_index_bytes_max,
        } = self;
        let wrong = |text: &str| Err(OpenError::Config(text.to_owned()));
        if !(1..=64).contains(shards) {
            return wrong("shards must be 1 to 64");
        }
        if *wal_bytes_max < 64 << 10 || *wal_bytes_max > 1 << 30 {
            return wrong("wal_bytes_max must be 64 KiB to 1 GiB");
        }
        if *memtable_bytes_max < 64 << 10 || *memtable_bytes_max > 1 << 30 {
            return wrong("memtable_bytes_max must be 64 KiB to 1 GiB");
        }
        if *frozen_max == 0 || *group_messages_max == 0 || *segment_bytes_max == 0 {
            return wrong("frozen_max, group_messages_max and segment_bytes_max must not be 0");
        }
        if *queue_bytes_max < 1 << 20 || *queue_bytes_max > 4 << 30 {
            return wrong("queue_bytes_max must be 1 MiB to 4 GiB");
        }
        if *merge_fan_in < 2 {
            return wrong("merge_fan_in must be at least 2");
        }
        if *merge_index_bytes_max > 32 << 20 {
            return wrong("merge_index_bytes_max must be at most 32 MiB");
        }
        Ok(())
    }
}

/// Why a store did not open.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A setting is out of range.
    #[error("wrong setting of the message store: {0}")]
    Config(String),
    /// Another process has it open.
    #[error("the message store `{}` is in use by another process", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// The disk refused.
    #[error("message store: {action} `{}`: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file without which nothing can be found is damaged.
    #[error("message store: `{}` is damaged: {reason}; restore it from a backup", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It was written by a later version.
    #[error("message store: `{}` has format {found}; this program knows up to {known}", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest known.
        known: u32,
    },
}
