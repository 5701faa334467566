//! Limits on how much and how often, by buckets that time refills.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};

use fieldline_model::ChannelId;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::config::GatewayConfig;

/// A bucket of tokens: holds `burst`, refilled by `per_s` each second.
pub(crate) struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    pub(crate) fn full(burst: f64, now: Instant) -> Self {
        Self { left: burst, at: now }
    }

    /// Takes `count` tokens; false, and nothing taken, if there are fewer.
    pub(crate) fn take(&mut self, count: f64, per_s: f64, burst: f64, now: Instant) -> bool {
        let elapsed_s = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        self.left = (self.left + elapsed_s * per_s).min(burst);
        if self.left < count {
            return false;
        }
        self.left -= count;
        true
    }

    /// Whether it would be full by now: one that nobody needs to remember.
    fn is_full(&self, per_s: f64, burst: f64, now: Instant) -> bool {
        let elapsed_s = now.saturating_duration_since(self.at).as_secs_f64();
        self.left + elapsed_s * per_s >= burst
    }
}

/// Addresses whose registrations are counted at a time; about 64 bytes each. Beyond it further ones are limited by their
/// channel alone.
const ADDRESSES_MAX: usize = 65_536;
/// Channels likewise.
const CHANNELS_MAX: usize = 65_536;

/// How many devices may yet register themselves, by address and by channel.
#[derive(Default)]
pub(crate) struct Registrations {
    addresses: Mutex<HashMap<IpAddr, Bucket>>,
    channels: Mutex<HashMap<ChannelId, Bucket>>,
}

impl Registrations {
    /// Counts a registration from `address` on `channel`; if it is one too many, by which limit and in what words.
    pub(crate) fn refuse(
        &self,
        config: &GatewayConfig,
        channel: ChannelId,
        address: IpAddr,
    ) -> Option<(&'static str, String)> {
        let now = Instant::now();
        let max = config.address_registrations_per_min_max;
        // A balancer stands for many.
        if !config.balancers.lists(address)
            && !take(&self.addresses, network(address), max, ADDRESSES_MAX, now)
        {
            let text = format!(
                "{address} has registered {max} devices within a minute \
                 (gateway.address_registrations_per_min_max); it is to try again"
            );
            return Some(("address", text));
        }
        let max = config.channel_registrations_per_min_max;
        if !take(&self.channels, channel, max, CHANNELS_MAX, now) {
            let text = format!(
                "{max} devices have registered themselves on the channel within a minute \
                 (gateway.channel_registrations_per_min_max); it is to try again"
            );
            return Some(("channel", text));
        }
        None
    }
}

/// Takes one of `per_min_max`, which 0 does not limit, from the bucket of `key`.
fn take<K: Hash + Eq>(
    buckets: &Mutex<HashMap<K, Bucket>>,
    key: K,
    per_min_max: u32,
    keys_max: usize,
    now: Instant,
) -> bool {
    if per_min_max == 0 {
        return true;
    }
    let burst = f64::from(per_min_max);
    let per_s = burst / 60.0;
    let mut buckets = buckets.lock();
    if buckets.len() >= keys_max && !buckets.contains_key(&key) {
        buckets.retain(|_, bucket| !bucket.is_full(per_s, burst, now));
        if buckets.len() >= keys_max {
            return true;
        }
    }
    let bucket = buckets.entry(key).or_insert_with(|| Bucket::full(burst, now));
    bucket.take(1.0, per_s, burst, now)
}

/// What counts as one address: who has one of IPv6 has a network of 64 bits.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

/// Lets so many log lines a second through, and counts those it holds back.
pub(crate) struct LineLimit {
    bucket: Bucket,
    suppressed: u64,
    per_s: f64,
    burst: f64,
}

impl LineLimit {
    pub(crate) fn new(per_s: f64, burst: f64, now: Instant) -> Self {
        Self { bucket: Bucket::full(burst, now), suppressed: 0, per_s, burst }
    }

    /// Whether a line may be written now; if so, how many were held back since the last one.
    pub(crate) fn allow(&mut self, now: Instant) -> Option<u64> {
        if self.bucket.take(1.0, self.per_s, self.burst, now) {
            return Some(std::mem::take(&mut self.suppressed));
        }
        self.suppressed += 1;
        None
    }
}

/// Refusals of a channel that are logged a second.
const REFUSALS_PER_S: f64 = 20.0;

/// The limit on lines that many connections write, such as those that never became a device's.
pub(crate) struct RefusalLimit(Mutex<LineLimit>);

impl RefusalLimit {
    pub(crate) fn new() -> Self {
        Self::of(REFUSALS_PER_S)
    }

    /// A limit of so many lines a second.
    pub(crate) fn of(per_s: f64) -> Self {
        Self(Mutex::new(LineLimit::new(per_s, per_s, Instant::now())))
    }

    pub(crate) fn allow(&self) -> Option<u64> {
        self.0.lock().allow(Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_bucket_averages() {
        let begin = Instant::now();
        let mut bucket = Bucket::full(100.0, begin);
        assert!(bucket.take(100.0, 10.0, 100.0, begin));
        assert!(!bucket.take(1.0, 10.0, 100.0, begin));
        assert!(bucket.take(10.0, 10.0, 100.0, begin + Duration::from_secs(1)));
        // Never more than a burst, however long nobody came.
        assert!(!bucket.take(101.0, 10.0, 100.0, begin + Duration::from_secs(1_000)));
    }

    #[test]
    fn registrations_are_limited_by_address_and_channel() {
        let config = GatewayConfig {
            address_registrations_per_min_max: 2,
            channel_registrations_per_min_max: 3,
            ..GatewayConfig::default()
        };
        let registrations = Registrations::default();
        let channel = |number: u8| ChannelId::from_bytes([number; 16]);
        let refused = |of: u8, address: &str| {
            let refused = registrations.refuse(&config, channel(of), address.parse().unwrap());
            refused.map(|(limit, _)| limit)
        };
        assert_eq!([refused(1, "192.0.2.1"), refused(1, "::ffff:192.0.2.1")], [None, None]);
        assert_eq!(refused(1, "192.0.2.1"), Some("address"));
        assert_eq!(refused(1, "2001:db8::1"), None);
        assert_eq!(refused(1, "2001:db8::2"), Some("channel"));
        assert_eq!(refused(2, "2001:db8::ffff"), Some("address"), "of the same network");
        assert_eq!(refused(2, "2001:db8:0:1::1"), None);
        // What is remembered has a bound.
        let (buckets, now) = (Mutex::new(HashMap::new()), Instant::now());
        for key in 0..10 {
            assert!(take(&buckets, key, 1, 4, now));
        }
        assert_eq!(buckets.lock().len(), 4);
        assert!(!take(&buckets, 0, 1, 4, now));
        assert!(take(&buckets, 11, 1, 4, now + Duration::from_secs(60)));
        assert_eq!(buckets.lock().len(), 1, "those that time has refilled are forgotten");
    }

    #[test]
    fn what_was_held_back_is_counted() {
        let begin = Instant::now();
        let mut limit = LineLimit::new(1.0, 2.0, begin);
        assert_eq!([limit.allow(begin), limit.allow(begin)], [Some(0), Some(0)]);
        assert_eq!([limit.allow(begin), limit.allow(begin)], [None, None]);
        assert_eq!(limit.allow(begin + Duration::from_secs(1)), Some(2));
    }
}
