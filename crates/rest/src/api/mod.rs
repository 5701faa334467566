//! The handlers, by what they are about.

pub(crate) mod accounts;
pub(crate) mod auth;
pub(crate) mod channels;
pub(crate) mod commands;
pub(crate) mod devices;
pub(crate) mod messages;
pub(crate) mod nodes;
pub(crate) mod parameters;
pub(crate) mod protocols;
mod sample;
pub(crate) mod settings;
pub(crate) mod state;
pub(crate) mod system;
pub(crate) mod tokens;
pub(crate) mod trails;
pub(crate) mod users;
