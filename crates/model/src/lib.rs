//! The pure data of Fieldline: what a device, a message, a value and a command are.
//!
//! It is not a place for I/O, clocks or randomness: callers pass times and
//! random bytes in. It may import nothing of the workspace. Start reading at
//! [`stage`], which names the one direction that data flows in.

pub mod close;
pub mod codec;
pub mod command;
pub mod dictionary;
pub mod event;
pub mod id;
pub mod network;
pub mod object;
pub mod param;
pub mod placement;
pub mod stage;
pub mod time;
pub mod value;

pub use close::CloseCode;
pub use command::{Command, CommandStatus};
pub use event::{Event, EventKind};
pub use id::{
    AccountId, ChannelId, CommandId, ConnectionId, DeviceId, EventId, ProtocolId, TokenId, UserId,
};
pub use network::{Network, NetworkError};
pub use object::{Account, Channel, Device, Protocol, Scope, Token, Transport, User};
pub use param::{ParamKind, ParamName, ParamSpec, Params, Schema};
pub use placement::Epoch;
pub use stage::{Accepted, Cursor, Decoded, Receipt, Rejected, Series, SeriesKind, Stored};
pub use time::Timestamp;
pub use value::{Decimal, Value};
