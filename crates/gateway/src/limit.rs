//! Limits on how much and how often, by buckets that time refills.

use parking_lot::Mutex;
use tokio::time::Instant;

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
    fn what_was_held_back_is_counted() {
        let begin = Instant::now();
        let mut limit = LineLimit::new(1.0, 2.0, begin);
        assert_eq!([limit.allow(begin), limit.allow(begin)], [Some(0), Some(0)]);
        assert_eq!([limit.allow(begin), limit.allow(begin)], [None, None]);
        assert_eq!(limit.allow(begin + Duration::from_secs(1)), Some(2));
    }
}
