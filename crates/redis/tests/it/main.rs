//! `RedisState` against real servers, and what becomes of it when they fail.

mod conformance;
mod connect;
mod faults;
mod nodes;
mod status;
mod support;
