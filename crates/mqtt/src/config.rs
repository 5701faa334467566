//! Settings of the MQTT service, and every limit that it has.

use std::time::Duration;

use fieldline_runtime::Balancers;

/// Settings of the broker. [`MqttConfig::default`] is meant for production.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MqttConfig {
    /// Most signed-in connections at once. At least 1.
    pub connections_max: usize,
    /// Most signed-in connections of one account. At least 1.
    pub account_connections_max: usize,
    /// Most connections that have not signed in yet; another one takes the place
    /// of the oldest. At least 1.
    pub handshakes_max: usize,
    /// How long a connection may take to send CONNECT, TLS handshake included,
    /// and again to be signed in.
    pub connect_timeout: Duration,
    /// Longest CONNECT, in bytes: 1,024 to 1,048,576.
    pub connect_bytes_max: usize,
    /// Longest packet that is taken, in bytes: 1,024 to 16,777,216.
    pub packet_bytes_max: usize,
    /// How long a packet may take from its first byte to its last.
    pub packet_timeout: Duration,
    /// How long a client may take nothing of what it is sent.
    pub write_timeout: Duration,
    /// Longest keep alive, in seconds: MQTT 5 clients that ask for more, or for
    /// none, are given this one. At least 5.
    pub keep_alive_s_max: u16,
    /// Most messages that wait for one client. Beyond it messages of QoS 0 are
    /// dropped for this client, and one of QoS 1 ends its connection. At least 16.
    pub queue_messages_max: usize,
    /// Most bytes of topics and payloads that wait for one client. At least 65,536.
    pub queue_bytes_max: usize,
    /// Most QoS 1 messages on their way to one client: 1 to 65,535.
    pub inflight_max: u16,
    /// Most QoS 1 messages taken from one client before it has to wait for
    /// acknowledgements: 1 to 65,535.
    pub receive_maximum: u16,
    /// Most subscriptions of one client. At least 1.
    pub subscriptions_max: usize,
    /// Messages a second that the clients of one account may publish together,
    /// averaged over ten seconds; beyond it they are read more slowly. One of
    /// more than 4 KiB counts as several. At least 1.
    pub account_publishes_per_s_max: u32,
    /// Most retained messages under `client/` of one account.
    pub retained_messages_max: usize,
    /// Most bytes of retained topics and payloads of one account.
    pub retained_bytes_max: usize,
    /// Most commands of one account whose answers are awaited for MQTT.
    pub answers_max: usize,
    /// How long clients are given to take what is queued at shutdown.
    pub drain_timeout: Duration,
    /// Who may say on whose behalf they connect: these begin each connection with a PROXY header.
    pub balancers: Balancers,
}

impl Default for MqttConfig {
    fn default() -> Self {
        Self {
            connections_max: 15_000,
            account_connections_max: 10_000,
            handshakes_max: 1_000,
            connect_timeout: Duration::from_secs(10),
            connect_bytes_max: 64 * 1024,
            packet_bytes_max: 256 * 1024,
            packet_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            keep_alive_s_max: 3_600,
            queue_messages_max: 16_384,
            queue_bytes_max: 8 << 20,
            inflight_max: 128,
            receive_maximum: 256,
            subscriptions_max: 256,
            account_publishes_per_s_max: 10_000,
            retained_messages_max: 10_000,
            retained_bytes_max: 8 << 20,
            answers_max: 1_000,
            drain_timeout: Duration::from_secs(5),
            balancers: Balancers::default(),
        }
    }
}

/// A setting that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`mqtt.{name}` is {found}; it must be {expected}")]
pub struct ConfigError {
    /// The setting.
    pub name: &'static str,
    /// What it is.
    pub found: String,
    /// What it may be.
    pub expected: &'static str,
}

impl MqttConfig {
    /// Checks what types cannot, and returns every problem at once.
    ///
    /// # Errors
    ///
    /// One for each setting out of its range.
    pub fn validate(self) -> Result<Self, Vec<ConfigError>> {
        // Exhaustive on purpose: a new field does not compile until judged here.
        let Self {
            connections_max,
            account_connections_max,
            handshakes_max,
            connect_timeout,
            connect_bytes_max,
            packet_bytes_max,
            packet_timeout,
            write_timeout,
            keep_alive_s_max,
            queue_messages_max,
            queue_bytes_max,
            inflight_max,
            receive_maximum,
            subscriptions_max,
            account_publishes_per_s_max,
            // 0 is a choice for these: nothing is kept, or nothing waited for.
            retained_messages_max: _,
            retained_bytes_max: _,
            answers_max: _,
            drain_timeout: _,
            balancers: _,
        } = &self;
        let mut errors = Vec::new();
        let mut check = |fits: bool, name, found: String, expected| {
            if !fits {
                errors.push(ConfigError { name, found, expected });
            }
        };
        let numbers = [
            ("connections_max", *connections_max, 1, usize::MAX, "at least 1"),
            ("account_connections_max", *account_connections_max, 1, usize::MAX, "at least 1"),
            ("handshakes_max", *handshakes_max, 1, usize::MAX, "at least 1"),
            ("connect_bytes_max", *connect_bytes_max, 1_024, 1 << 20, "1024 to 1048576"),
            ("packet_bytes_max", *packet_bytes_max, 1_024, 1 << 24, "1024 to 16777216"),
            ("queue_messages_max", *queue_messages_max, 16, usize::MAX, "at least 16"),
            ("queue_bytes_max", *queue_bytes_max, 65_536, usize::MAX, "at least 65536"),
            ("inflight_max", usize::from(*inflight_max), 1, 65_535, "1 to 65535"),
            ("receive_maximum", usize::from(*receive_maximum), 1, 65_535, "1 to 65535"),
            ("subscriptions_max", *subscriptions_max, 1, usize::MAX, "at least 1"),
            ("keep_alive_s_max", usize::from(*keep_alive_s_max), 5, 65_535, "5 to 65535"),
        ];
        for (name, found, low, high, expected) in numbers {
            check((low..=high).contains(&found), name, found.to_string(), expected);
        }
        let rate = *account_publishes_per_s_max;
        check(rate > 0, "account_publishes_per_s_max", rate.to_string(), "at least 1");
        let times = [
            ("connect_timeout", connect_timeout),
            ("packet_timeout", packet_timeout),
            ("write_timeout", write_timeout),
        ];
        for (name, found) in times {
            check(!found.is_zero(), name, format!("{found:?}"), "longer than 0");
        }
        if errors.is_empty() { Ok(self) } else { Err(errors) }
    }
}
