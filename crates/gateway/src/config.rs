//! Settings of the gateway as a whole; channels are objects of the registry.

use std::net::IpAddr;
use std::time::Duration;

use fieldline_runtime::Balancers;
use serde::Deserialize;

/// `[gateway]`: what holds for all channels.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GatewayConfig {
    /// Event loops, each a thread of its own; 0 takes one for each core. At most 256.
    pub event_loops: usize,
    /// Address of this machine that channels listen on instead of the one they name; their ports
    /// stay. For nodes that share a machine, or where devices come by one network only.
    pub listen_address: Option<IpAddr>,
    /// Most connections of all channels together. Each costs about 2 KiB until it speaks.
    pub connections_max: usize,
    /// Most connections from one address; 0 sets no limit, since mobile
    /// operators put whole fleets behind one address.
    pub connections_per_address_max: u32,
    /// Most devices that may register themselves in a minute from one address (from one network of 64 bits, of IPv6); 0 sets
    /// no limit. Each node counts for itself. Mobile operators put whole fleets behind one address: its new devices come in
    /// within minutes, since a refused one tries again. Balancers that are listed do not count as addresses.
    pub address_registrations_per_min_max: u32,
    /// Most devices that may register themselves in a minute on one channel; 0 sets no limit.
    pub channel_registrations_per_min_max: u32,
    /// Time a connection has to identify its device. At least 1 ms, as all times here.
    #[serde(with = "humantime_serde")]
    pub login_timeout: Duration,
    /// Time a begun frame has to be completed.
    #[serde(with = "humantime_serde")]
    pub frame_timeout: Duration,
    /// Time a device has to read what was sent to it.
    #[serde(with = "humantime_serde")]
    pub write_timeout: Duration,
    /// Time a device has to answer a command, before it counts as lost.
    #[serde(with = "humantime_serde")]
    pub answer_timeout: Duration,
    /// Time that connections have to finish at shutdown.
    #[serde(with = "humantime_serde")]
    pub drain_timeout: Duration,
    /// Wait before a channel that could not listen is tried again.
    #[serde(with = "humantime_serde")]
    pub listen_retry_delay: Duration,
    /// How long a node has to be gone before the devices that it held, and that did not connect elsewhere, are told offline.
    /// Where there is but one: how long after its start, if the run before was killed.
    #[serde(with = "humantime_serde")]
    pub lost_after: Duration,
    /// Who may say on whose behalf they connect: not of this section, but `[balancers]` of the whole program.
    #[serde(skip)]
    pub balancers: Balancers,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            event_loops: 0,
            listen_address: None,
            connections_max: 100_000,
            connections_per_address_max: 0,
            address_registrations_per_min_max: 1_000,
            channel_registrations_per_min_max: 5_000,
            login_timeout: Duration::from_secs(30),
            frame_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(30),
            answer_timeout: Duration::from_secs(60),
            drain_timeout: Duration::from_secs(10),
            listen_retry_delay: Duration::from_secs(5),
            lost_after: Duration::from_secs(30),
            balancers: Balancers::default(),
        }
    }
}

/// A setting of the gateway cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("gateway.{key}: {problem}")]
pub struct ConfigError {
    /// The setting.
    pub key: &'static str,
    /// What is wrong and what may stand there.
    pub problem: String,
}

impl GatewayConfig {
    /// Most event loops.
    pub const EVENT_LOOPS_MAX: usize = 256;

    /// Checks what types cannot, and returns every problem at once.
    ///
    /// # Errors
    ///
    /// All settings that cannot be.
    pub fn validate(self) -> Result<Self, Vec<ConfigError>> {
        // Exhaustive on purpose: a new setting does not compile until judged here.
        let Self {
            event_loops,
            listen_address: _,
            connections_max,
            connections_per_address_max: _,
            address_registrations_per_min_max: _,
            channel_registrations_per_min_max: _,
            login_timeout,
            frame_timeout,
            write_timeout,
            answer_timeout,
            drain_timeout: _,
            listen_retry_delay,
            lost_after,
            balancers: _,
        } = &self;
        let mut errors = Vec::new();
        if *event_loops > Self::EVENT_LOOPS_MAX {
            let problem = format!("at most {} event loops", Self::EVENT_LOOPS_MAX);
            errors.push(ConfigError { key: "event_loops", problem });
        }
        if *connections_max == 0 {
            let problem = "at least one connection".to_owned();
            errors.push(ConfigError { key: "connections_max", problem });
        }
        for (key, value) in [
            ("login_timeout", login_timeout),
            ("frame_timeout", frame_timeout),
            ("write_timeout", write_timeout),
            ("answer_timeout", answer_timeout),
            ("listen_retry_delay", listen_retry_delay),
            ("lost_after", lost_after),
        ] {
            if value.is_zero() {
                errors.push(ConfigError { key, problem: "longer than nothing".to_owned() });
            }
        }
        if errors.is_empty() { Ok(self) } else { Err(errors) }
    }

    /// The count of event loops that is meant.
    pub(crate) fn loops(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        if self.event_loops == 0 { cores } else { self.event_loops }.min(Self::EVENT_LOOPS_MAX)
    }
}
