//! The broker over real sockets: by real clients, and byte for byte.

mod harness;
mod hostile;
mod isolation;
mod limits;
mod mosquitto;
mod pipeline;
mod protocol;
mod rights;
mod wire;
