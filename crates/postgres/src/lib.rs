//! Registry and History in PostgreSQL, for a cluster.
//!
//! Every node opens both over the same database. Nothing here is owned by a node: writers of one shard
//! take turns by the lock of its row, so that what is read in order of arrival has no gaps, and a node
//! that dies holds nobody up for longer than the server needs to notice.
//!
//! Start reading at [`Settings`]; `connect.rs` finds the server that takes writes, `schema.rs` has the
//! tables. `registry.rs` and `history.rs` are the two backends: `history/writer.rs` says how messages
//! become durable and `history/commit.rs` what one transaction does.
//!
//! **What an acknowledgement is worth.** Every commit waits for the disk of the primary, whatever the
//! server's default is. Whether it also waits for a standby is the server's `synchronous_standby_names`:
//! with one standby named there (or Patroni's `synchronous_mode`), what was acknowledged survives the
//! loss of the primary's machine; without, the last moments may be lost with it. A commit never gives up
//! waiting for the standby to answer: no statement timeout is in force there.
//!
//! It may import `fieldline-contracts` and `fieldline-model`.

mod connect;
mod error;
mod examine;
mod history;
mod migrate;
mod pool;
mod registry;
mod schema;
mod settings;
mod tls;

/// Most changes that the audit trail keeps; the oldest of the accounts with the most go first.
pub const AUDIT_MAX: u64 = 1_000_000;

#[doc(hidden)]
pub use crate::history::row;

pub use crate::error::ConnectError;
pub use crate::examine::examine;
pub use crate::history::PostgresHistory;
pub use crate::registry::PostgresRegistry;
pub use crate::settings::{Settings, TlsSettings};
