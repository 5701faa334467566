//! Reason codes of MQTT 5.

/// Reason codes of MQTT 5 that we send or act on. The numbers are the standard's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Reason {
    /// Done.
    Success = 0x00,
    /// Done, and nobody is subscribed.
    NoMatchingSubscribers = 0x10,
    /// There was no such subscription.
    NoSubscriptionExisted = 0x11,
    /// It failed, and the reason string says why.
    Unspecified = 0x80,
    /// The bytes are no packet.
    Malformed = 0x81,
    /// The packet may not come here or so.
    ProtocolError = 0x82,
    /// The standard allows it; we do not offer it.
    ImplementationSpecific = 0x83,
    /// Neither 3.1.1 nor 5.
    UnsupportedVersion = 0x84,
    /// The client id cannot be used.
    ClientIdNotValid = 0x85,
    /// The token is not valid.
    BadUserNameOrPassword = 0x86,
    /// The token does not allow it.
    NotAuthorized = 0x87,
    /// A store that is needed does not answer.
    ServerUnavailable = 0x88,
    /// As many connections as may be.
    ServerBusy = 0x89,
    /// Enhanced authentication is not offered.
    BadAuthenticationMethod = 0x8c,
    /// No packet within one and a half keep alives.
    KeepAliveTimeout = 0x8d,
    /// Another connection took the client id.
    SessionTakenOver = 0x8e,
    /// The filter matches no topic that exists.
    TopicFilterInvalid = 0x8f,
    /// The topic cannot be published to.
    TopicNameInvalid = 0x90,
    /// More unacknowledged messages than agreed.
    ReceiveMaximumExceeded = 0x93,
    /// The topic alias is 0 or above the agreed one.
    TopicAliasInvalid = 0x94,
    /// The packet is larger than agreed.
    PacketTooLarge = 0x95,
    /// A limit of the account or of the session is reached.
    QuotaExceeded = 0x97,
    /// The token was changed or revoked.
    AdministrativeAction = 0x98,
    /// The payload is not what this topic takes.
    PayloadFormatInvalid = 0x99,
    /// QoS 2 is not offered yet.
    QosNotSupported = 0x9b,
    /// Shared subscriptions are not offered yet.
    SharedSubscriptionsNotSupported = 0x9e,
    /// Too many failed sign-ins from this address.
    ConnectionRateExceeded = 0x9f,
    /// The server is shutting down.
    ServerShuttingDown = 0x8b,
}

impl Reason {
    /// Every one.
    pub const ALL: &'static [Self] = &[
        Self::Success,
        Self::NoMatchingSubscribers,
        Self::NoSubscriptionExisted,
        Self::Unspecified,
        Self::Malformed,
        Self::ProtocolError,
        Self::ImplementationSpecific,
        Self::UnsupportedVersion,
        Self::ClientIdNotValid,
        Self::BadUserNameOrPassword,
        Self::NotAuthorized,
        Self::ServerUnavailable,
        Self::ServerBusy,
        Self::BadAuthenticationMethod,
        Self::KeepAliveTimeout,
        Self::SessionTakenOver,
        Self::TopicFilterInvalid,
        Self::TopicNameInvalid,
        Self::ReceiveMaximumExceeded,
        Self::TopicAliasInvalid,
        Self::PacketTooLarge,
        Self::QuotaExceeded,
        Self::AdministrativeAction,
        Self::PayloadFormatInvalid,
        Self::QosNotSupported,
        Self::SharedSubscriptionsNotSupported,
        Self::ConnectionRateExceeded,
        Self::ServerShuttingDown,
    ];

    /// The number on the wire.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// Whether it is a refusal.
    #[must_use]
    pub const fn is_error(self) -> bool {
        self.number() >= 0x80
    }

    /// Stable label for metrics and logs.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::NoMatchingSubscribers => "no_matching_subscribers",
            Self::NoSubscriptionExisted => "no_subscription_existed",
            Self::Unspecified => "unspecified",
            Self::Malformed => "malformed_packet",
            Self::ProtocolError => "protocol_error",
            Self::ImplementationSpecific => "implementation_specific",
            Self::UnsupportedVersion => "unsupported_version",
            Self::ClientIdNotValid => "client_id_not_valid",
            Self::BadUserNameOrPassword => "bad_user_name_or_password",
            Self::NotAuthorized => "not_authorized",
            Self::ServerUnavailable => "server_unavailable",
            Self::ServerBusy => "server_busy",
            Self::BadAuthenticationMethod => "bad_authentication_method",
            Self::KeepAliveTimeout => "keep_alive_timeout",
            Self::SessionTakenOver => "session_taken_over",
            Self::TopicFilterInvalid => "topic_filter_invalid",
            Self::TopicNameInvalid => "topic_name_invalid",
            Self::ReceiveMaximumExceeded => "receive_maximum_exceeded",
            Self::TopicAliasInvalid => "topic_alias_invalid",
            Self::PacketTooLarge => "packet_too_large",
            Self::QuotaExceeded => "quota_exceeded",
            Self::AdministrativeAction => "administrative_action",
            Self::PayloadFormatInvalid => "payload_format_invalid",
            Self::QosNotSupported => "qos_not_supported",
            Self::SharedSubscriptionsNotSupported => "shared_subscriptions_not_supported",
            Self::ConnectionRateExceeded => "connection_rate_exceeded",
            Self::ServerShuttingDown => "server_shutting_down",
        }
    }
}
