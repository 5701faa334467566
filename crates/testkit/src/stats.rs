//! What simulated trackers count, and the journal of what was acknowledged.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::teltonika::Record;

/// Counts of a fleet; all count up but `connected`.
#[derive(Debug, Default)]
pub struct Stats {
    /// Devices connected now (over UDP: acknowledged once).
    pub connected: AtomicU64,
    /// Connections made.
    pub connects: AtomicU64,
    /// Connections that were refused, failed or lost.
    pub failures: AtomicU64,
    /// Records put on the wire, re-sent ones as well.
    pub sent: AtomicU64,
    /// Records acknowledged.
    pub acked: AtomicU64,
    /// Records put on the wire once more, because no answer had come.
    pub resent: AtomicU64,
    /// Records that no longer fitted a device's memory.
    pub overflowed: AtomicU64,
    /// Commands answered.
    pub commands: AtomicU64,
    /// Time from sending a packet to its answer.
    pub latency: Latency,
}

impl Stats {
    pub(crate) fn add(counter: &AtomicU64, count: usize) {
        counter.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// A count as it stands.
    #[must_use]
    pub fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }

    /// One line about the fleet.
    #[must_use]
    pub fn summary(&self) -> String {
        let Self { connected, sent, acked, resent, failures, commands, latency, .. } = self;
        format!(
            "connected {} sent {} acked {} resent {} failures {} commands {} latency p50 {:?} p99 {:?}",
            Self::get(connected),
            Self::get(sent),
            Self::get(acked),
            Self::get(resent),
            Self::get(failures),
            Self::get(commands),
            latency.quantile(0.5),
            latency.quantile(0.99),
        )
    }
}

/// Buckets for each doubling of a latency.
const STEPS: usize = 8;

/// A histogram of times, each bucket about 9 % wide.
#[derive(Debug)]
pub struct Latency(Vec<AtomicU64>);

impl Default for Latency {
    fn default() -> Self {
        Self((0..40 * STEPS).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Latency {
    /// Notes one time.
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a place in a table of a few hundred"
    )]
    pub fn record(&self, time: Duration) {
        let micros = (time.as_micros() as f64).max(1.0);
        let place = (micros.log2() * STEPS as f64) as usize;
        if let Some(bucket) = self.0.get(place.min(self.0.len() - 1)) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The time that `part` (0 to 1) of all are not above; zero if there are none.
    #[must_use]
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of a count"
    )]
    pub fn quantile(&self, part: f64) -> Duration {
        let counts: Vec<u64> = self.0.iter().map(|c| c.load(Ordering::Relaxed)).collect();
        let wanted = (counts.iter().sum::<u64>() as f64 * part).ceil() as u64;
        let mut seen = 0;
        for (place, count) in counts.iter().enumerate() {
            seen += count;
            if wanted > 0 && seen >= wanted {
                let micros = ((place + 1) as f64 / STEPS as f64).exp2();
                return Duration::from_micros(micros as u64);
            }
        }
        Duration::ZERO
    }
}

/// A file of what was acknowledged: `ident,sequence,timestamp in microseconds` a line.
///
/// A line is with the system before the next record is sent: it outlives the
/// server under test, and this process, but not the machine.
#[derive(Debug)]
pub struct AckJournal(Mutex<File>);

impl AckJournal {
    /// Creates or continues the file.
    ///
    /// # Errors
    ///
    /// If it cannot be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(Mutex::new(File::options().create(true).append(true).open(path)?)))
    }

    pub(crate) fn note(&self, ident: &str, records: &[Record]) -> io::Result<()> {
        let mut lines = String::new();
        for record in records {
            let at_us = record.at.as_micros();
            lines.push_str(&format!("{ident},{},{at_us}\n", record.sequence));
        }
        self.0.lock().write_all(lines.as_bytes())
    }

    /// Reads a journal: ident, sequence, timestamp in microseconds. A line cut short is left out.
    ///
    /// # Errors
    ///
    /// If the file cannot be read.
    pub fn read(path: &Path) -> io::Result<Vec<(String, u32, i64)>> {
        let text = std::fs::read_to_string(path)?;
        let line = |line: &str| {
            let mut parts = line.split(',');
            let ident = parts.next()?.to_owned();
            Some((ident, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
        };
        // The last line may be torn; without its end it is not one.
        let whole = text.rfind('\n').and_then(|end| text.get(..end)).unwrap_or("");
        Ok(whole.lines().filter_map(line).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_near() {
        let latency = Latency::default();
        assert_eq!(latency.quantile(0.5), Duration::ZERO);
        for ms in 1..=1_000 {
            latency.record(Duration::from_millis(ms));
        }
        let half = latency.quantile(0.5).as_millis();
        assert!((480..=560).contains(&half), "{half}");
    }
}
