//! What every Fieldline process needs around its services: supervision,
//! shutdown, logs, metrics, TLS, and who is at the other end behind a balancer.
//!
//! It knows no service; it may import `fieldline-contracts` and
//! `fieldline-model`. Start reading at [`supervise`] for how a process lives
//! and dies.

pub mod balancers;
pub mod crash;
pub mod datadir;
pub mod limits;
pub mod mutual_tls;
pub mod shutdown;
pub mod supervise;
pub mod telemetry;
pub mod tls;
pub mod watchdog;

pub use balancers::Balancers;
pub use datadir::DataDir;
pub use tls::{ReloadingTls, TlsFiles};
pub use watchdog::Watchdog;
