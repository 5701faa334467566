//! What every Fieldline process needs around its services: configuration,
//! supervision, shutdown, logs, metrics and TLS.
//!
//! It knows no service; it may import `fieldline-contracts` and
//! `fieldline-model`. Start reading at [`supervise`] for how a process lives
//! and dies, and at [`config`] for what it is told.

pub mod config;
pub mod crash;
pub mod datadir;
pub mod shutdown;
pub mod supervise;
pub mod telemetry;
pub mod tls;

pub use config::{Config, ConfigError};
pub use datadir::DataDir;
pub use tls::{ReloadingTls, TlsFiles};
