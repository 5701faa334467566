/// Why there is no connection to the broker, in one sentence that says what and how to mend it. It names the broker's
/// address, never a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The settings are wrong.
    #[error("{0}")]
    Settings(String),
    /// Nobody listens there, or no packets come through.
    #[error(
        "the MQTT broker at {address} cannot be reached ({reason}): start it, or correct `mqtt_bus.url`"
    )]
    Unreachable {
        /// Where it was looked for.
        address: String,
        /// In the system's words.
        reason: String,
    },
    /// The connection is made and no answer comes.
    #[error(
        "what listens at {address} takes the connection and does not answer: see whether the MQTT broker hangs, or correct `mqtt_bus.url`"
    )]
    Silent {
        /// Where.
        address: String,
    },
    /// Something else answers, or an older broker.
    #[error(
        "what listens at {address} is no MQTT 5 broker ({reason}): use one, such as mosquitto 2, or correct `mqtt_bus.url` (mqtts:// if it wants TLS)"
    )]
    NotMqtt5 {
        /// Where.
        address: String,
        /// What came.
        reason: String,
    },
    /// It does not know us.
    #[error(
        "the MQTT broker at {address} refuses the user name or password: correct them in `mqtt_bus.url`, or in the broker"
    )]
    Credentials {
        /// Where.
        address: String,
    },
    /// It refuses us for another reason.
    #[error("the MQTT broker at {address} refuses the connection ({reason}): see its log")]
    Refused {
        /// Where.
        address: String,
        /// In its words.
        reason: String,
    },
    /// It can do less than the bus needs.
    #[error("the MQTT broker at {address} does not allow {what}: allow it in its settings")]
    Unfit {
        /// Where.
        address: String,
        /// What is needed.
        what: &'static str,
    },
    /// The encrypted connection fails.
    #[error(
        "no encrypted connection to the MQTT broker at {address} ({reason}): correct `mqtt_bus.authority`, or the broker's certificate or port"
    )]
    Tls {
        /// Where.
        address: String,
        /// In the library's words.
        reason: String,
    },
}

impl ConnectError {
    /// Whether it may mend itself, as a broker that is started later: a program that can serve without the bus may go on
    /// with [`crate::MqttBus::start`].
    #[must_use]
    pub const fn is_temporary(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Silent { .. })
    }
}
