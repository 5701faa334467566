//! Back-off after failures, by address and by what was tried.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// How fast waiting grows, and where it ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policy {
    /// Failures without a wait.
    pub(crate) free: u32,
    /// Longest wait.
    pub(crate) wait_max: Duration,
    /// Time without a failure after which all is forgotten.
    pub(crate) forget: Duration,
}

/// Most keys remembered; beyond it the longest quiet one is forgotten.
const KEYS_MAX: usize = 8_192;

struct Failures {
    count: u32,
    last: Instant,
}

/// Failures by key. Bounded by [`KEYS_MAX`].
pub(crate) struct Backoff<K> {
    policy: Policy,
    keys: Mutex<HashMap<K, Failures>>,
}

impl<K: Eq + Hash + Clone> Backoff<K> {
    pub(crate) fn new(policy: Policy) -> Self {
        Self { policy, keys: Mutex::default() }
    }

    /// How long `key` has to wait still, if it has to.
    pub(crate) fn wait(&self, key: &K) -> Option<Duration> {
        self.wait_at_least(key, Duration::ZERO)
    }

    /// As [`Backoff::wait`], and for any failure `least`, if that is longer.
    pub(crate) fn wait_at_least(&self, key: &K, least: Duration) -> Option<Duration> {
        let keys = self.keys.lock();
        let failures = keys.get(key).filter(|failures| failures.count > 0)?;
        let over = failures.count.checked_sub(self.policy.free);
        // One second, doubled by each failure.
        let wait = over.map_or(Duration::ZERO, |over| Duration::from_secs(1 << over.min(20)));
        let wait = wait.min(self.policy.wait_max).max(least);
        wait.checked_sub(failures.last.elapsed()).filter(|left| !left.is_zero())
    }

    /// Whether `key` has failed more often than is free, and not been quiet since.
    pub(crate) fn is_over(&self, key: &K) -> bool {
        let keys = self.keys.lock();
        keys.get(key).is_some_and(|failures| {
            failures.count > self.policy.free && failures.last.elapsed() < self.policy.forget
        })
    }

    /// Notes a failure.
    pub(crate) fn failed(&self, key: K) {
        let mut keys = self.keys.lock();
        let now = Instant::now();
        if !keys.contains_key(&key) && keys.len() >= KEYS_MAX {
            let forget = self.policy.forget;
            keys.retain(|_, failures| now.duration_since(failures.last) < forget);
            if keys.len() >= KEYS_MAX {
                let quiet = keys.iter().min_by_key(|(_, f)| f.last).map(|(key, _)| key.clone());
                quiet.and_then(|key| keys.remove(&key));
            }
        }
        let failures = keys.entry(key).or_insert(Failures { count: 0, last: now });
        if now.duration_since(failures.last) >= self.policy.forget {
            failures.count = 0;
        }
        failures.count = failures.count.saturating_add(1);
        failures.last = now;
    }

    /// Takes one failure back, counted before its outcome was known.
    pub(crate) fn undo(&self, key: &K) {
        if let Some(failures) = self.keys.lock().get_mut(key) {
            failures.count = failures.count.saturating_sub(1);
        }
    }

    /// Forgets the failures of `key`, after a success.
    pub(crate) fn succeeded(&self, key: &K) {
        self.keys.lock().remove(key);
    }
}

/// The address as back-off counts it: of IPv6 the network, since one host has a whole one.
pub(crate) fn address_key(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() & !0xFFFF_FFFF_FFFF_FFFF).into()),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: Policy =
        Policy { free: 3, wait_max: Duration::from_secs(60), forget: Duration::from_secs(900) };

    #[tokio::test(start_paused = true)]
    async fn waiting_doubles_ends_and_is_forgotten() {
        let backoff = Backoff::new(POLICY);
        for _ in 0..2 {
            backoff.failed("ada");
            assert_eq!(backoff.wait(&"ada"), None);
        }
        let mut waits = Vec::new();
        for _ in 0..8 {
            backoff.failed("ada");
            waits.push(backoff.wait(&"ada").unwrap().as_secs());
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(backoff.wait(&"bob"), None);
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(backoff.wait(&"ada"), None);
        tokio::time::advance(Duration::from_secs(900)).await;
        backoff.failed("ada");
        assert_eq!(backoff.wait(&"ada"), None, "the earlier failures are forgotten");
        for _ in 0..5 {
            backoff.failed("ada");
        }
        backoff.succeeded(&"ada");
        assert_eq!(backoff.wait(&"ada"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_map_does_not_grow_without_bound() {
        let backoff = Backoff::new(POLICY);
        for key in 0..KEYS_MAX + 100 {
            backoff.failed(key);
        }
        assert_eq!(backoff.keys.lock().len(), KEYS_MAX);
    }

    #[test]
    fn a_host_cannot_step_aside_within_its_network() {
        let key = |text: &str| address_key(text.parse().unwrap());
        assert_eq!(key("2001:db8:1:2::1"), key("2001:db8:1:2:ffff::9"));
        assert_ne!(key("2001:db8:1:2::1"), key("2001:db8:1:3::1"));
        assert_eq!(key("::ffff:10.0.0.1"), key("10.0.0.1"));
        assert_ne!(key("10.0.0.2"), key("10.0.0.1"));
    }
}
