//! Why a device's connection ended.

use serde::{Deserialize, Serialize};

macro_rules! close_codes {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal, $text:literal;)+) => {
        /// Why a connection ended: stable numbers for logs, metrics and documents.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        #[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
        #[repr(u8)]
        pub enum CloseCode {
            $($(#[doc = $doc])+ $name = $number,)+
        }

        impl CloseCode {
            /// Every code.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The stable number.
            #[must_use]
            pub const fn number(self) -> u8 {
                self as u8
            }

            /// The stable name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }

            /// What happened, in words.
            #[must_use]
            pub const fn description(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii(),)+ }
            }
        }
    };
}

close_codes! {
    /// The device closed the connection.
    DeviceClosed = 1, "device_closed";
    /// The device was silent for longer than the channel's idle timeout.
    IdleTimeout = 2, "idle_timeout";
    /// The device connected again elsewhere; the newest connection wins.
    Replaced = 3, "replaced";
    /// The bytes break the protocol: a wrong checksum, length or structure.
    ProtocolError = 4, "protocol_error";
    /// A fault of ours; the log has the details.
    InternalError = 5, "internal_error";
    /// A frame is larger than the channel allows.
    FrameTooLarge = 6, "frame_too_large";
    /// The device is not registered and the channel registers none by itself.
    UnknownDevice = 7, "unknown_device";
    /// The channel was changed or removed, or its protocol was replaced.
    ChannelChanged = 8, "channel_changed";
    /// No device identified itself within the login timeout.
    LoginTimeout = 9, "login_timeout";
    /// More bytes or messages than the channel's rate limit.
    RateLimited = 10, "rate_limited";
    /// The channel holds as many connections as it may.
    TooManyConnections = 11, "too_many_connections";
    /// The device is disabled.
    DeviceDisabled = 12, "device_disabled";
    /// The server is shutting down.
    Shutdown = 13, "shutdown";
    /// Messages could not be stored, so they were not acknowledged.
    StorageUnavailable = 14, "storage_unavailable";
    /// The TLS handshake failed.
    TlsFailed = 15, "tls_failed";
    /// A frame was begun and not finished within the frame timeout.
    FrameTimeout = 16, "frame_timeout";
    /// The device did not read what was sent to it in time.
    WriteTimeout = 17, "write_timeout";
    /// The protocol does not know this packet.
    Unsupported = 18, "unsupported";
    /// The peer speaks another protocol, such as HTTP; usually a scanner.
    WrongProtocol = 19, "wrong_protocol";
    /// A frame took more steps, depth or memory than a protocol may use.
    LimitExceeded = 20, "limit_exceeded";
    /// The network failed.
    NetworkError = 21, "network_error";
    /// An operator closed it.
    ClosedByOperator = 22, "closed_by_operator";
    /// More devices than may in a minute wanted to register themselves, from one address or on one channel.
    RegistrationLimited = 23, "registration_limited";
    /// The node that held the connection is gone; when and how it ended is not known.
    NodeLost = 24, "node_lost";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_unique() {
        for (at, code) in CloseCode::ALL.iter().enumerate() {
            let clash =
                |other: &CloseCode| other.number() == code.number() || other.name() == code.name();
            assert!(!CloseCode::ALL[at + 1..].iter().any(clash), "{code:?}");
            assert!(code.description().ends_with('.'), "{code:?}");
        }
    }
}
