//! The whole program, over real sockets and real signals.

mod server;
mod device;
mod start;
mod kill;
mod disk_full;
mod bad_input;
mod mqtt;
mod protocols;
