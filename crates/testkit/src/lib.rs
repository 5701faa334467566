//! What tests and demonstrations stand on: simulated trackers, scripted sessions,
//! and backends in memory whose failures a test decides.
//!
//! The simulators are also what `fieldline simulate` and `up --demo` run, so
//! this crate stays light. It decodes nothing: the simulators' encoders are
//! written by hand, apart from the protocol language, so that one checks the
//! other. Start reading at [`fleet`]. It may import `fieldline-contracts` and
//! `fieldline-model`.

pub mod fleet;
pub mod history;
pub mod registry;
pub mod route;
#[cfg(feature = "servers")]
pub mod servers;
pub mod sessions;
pub mod state;
pub mod stats;
pub mod teltonika;
pub mod wialon;

pub use fleet::{Fleet, Protocol};
pub use history::{Script, ScriptedHistory};
pub use registry::MemoryRegistry;
pub use state::SwitchedState;
pub use stats::{AckJournal, Stats};
