//! What goes on beside the services: expiry of commands and retention of messages.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::registry::typed;
use fieldline_contracts::{Cluster, Kind, Lease, Page, Platform, Retention, cluster};
use fieldline_gateway::Gateway;
use fieldline_model::{Account, Timestamp};

/// How often expired commands are looked for.
const EXPIRE_EVERY: Duration = Duration::from_secs(1);
/// How often what is beyond retention is looked for.
const RETAIN_EVERY: Duration = Duration::from_secs(10 * 60);
/// A clock that is ahead of the last look by more than this may be wrong.
const JUMP_MICROS_MAX: i64 = 48 * 3_600 * 1_000_000;
/// Looks that a clock which jumped has to go on steadily before it is believed: an hour.
const STEADY_LOOKS: u32 = 6;
/// Microseconds of a day.
/// Who holds it lets go of messages beyond retention.
pub(crate) const RETENTION_KEY: &str = "retention";
const DAY_MICROS: i64 = 24 * 3_600 * 1_000_000;

/// Ends the sessions that the former run left open, once devices have had the time `wait` to be here again. `mark` is a file that
/// keeps since when some may be open; this run began at `started`.
pub(crate) async fn end_former_sessions(
    gateway: Gateway,
    mark: PathBuf,
    started: Timestamp,
    wait: Duration,
) {
    let since = read_mark(&mark).unwrap_or(Timestamp::MIN);
    tokio::time::sleep(wait).await;
    match gateway.end_former_sessions(since, started).await {
        Ok(ended) => {
            if ended > 0 {
                tracing::info!(ended, "sessions that the former run left open were ended");
            }
            if let Err(error) = std::fs::write(&mark, started.to_string()) {
                tracing::warn!(%error, "it cannot be noted that no former session is open");
            }
        }
        Err(error) => {
            tracing::warn!(%error, "sessions of the former run cannot be ended; the next start tries again");
        }
    }
}

/// Drops commands that have expired, for ever.
pub(crate) async fn expire(platform: Platform) {
    let mut ticks = tokio::time::interval(EXPIRE_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        platform.commands.expire().await;
    }
}

/// Lets go of messages beyond retention, for ever: on one node at a time. `mark` is a file that keeps the time of the last look.
pub(crate) async fn retain(platform: Platform, cluster: Arc<dyn Cluster>, mark: Option<PathBuf>) {
    loop {
        match cluster::hold(&*cluster, RETENTION_KEY).await {
            Ok(lease) => {
                // Who slept past its lease does nothing more, though it was about to.
                tokio::select! {
                    biased;
                    () = lease.lost() => {}
                    () = retain_alone(&platform, &lease, mark.as_deref()) => {}
                }
            }
            // It has left: the end.
            Err(_) => return,
        }
    }
}

async fn retain_alone(platform: &Platform, lease: &Lease, mark: Option<&Path>) {
    let mut ticks = tokio::time::interval(RETAIN_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut trust = Trust { last: mark.and_then(read_mark), steady: STEADY_LOOKS };
    loop {
        ticks.tick().await;
        let now = platform.clock.now();
        if !trust.believes(now) {
            tracing::warn!(%now, "the clock has jumped: messages beyond retention are kept until it has been steady for an hour");
            continue;
        }
        if let Some(Err(error)) = mark.map(|mark| std::fs::write(mark, now.to_string())) {
            tracing::warn!(%error, "the time of the last retention cannot be noted");
        }
        if let Err(error) = all_accounts(platform, lease, now).await {
            tracing::warn!(error, "accounts could not be listed for retention; trying again later");
        }
    }
}

fn read_mark(mark: &Path) -> Option<Timestamp> {
    std::fs::read_to_string(mark).ok()?.trim().parse().ok()
}

/// Whether the clock can be believed. A machine that starts with a clock of
/// years ahead must not take every message for too old.
struct Trust {
    last: Option<Timestamp>,
    /// Looks since it last jumped.
    steady: u32,
}

impl Trust {
    fn believes(&mut self, now: Timestamp) -> bool {
        let jumped = self.last.is_some_and(|last| now.micros_since(last) > JUMP_MICROS_MAX);
        self.last = Some(now);
        self.steady = if jumped { 0 } else { self.steady.saturating_add(1) };
        self.steady >= STEADY_LOOKS
    }
}

/// Retention of each account, for as long as the lease is held. One that fails is tried again next time, and does not end
/// the others'.
async fn all_accounts(platform: &Platform, lease: &Lease, now: Timestamp) -> Result<(), String> {
    let mut page = Page::first(1_000);
    loop {
        let listed = platform.registry.list_everywhere(Kind::Account, &page).await;
        let records = listed.map_err(|error| error.to_string())?;
        let Some(last) = records.last() else { return Ok(()) };
        page.after = Some(last.id);
        for record in records {
            let account = match typed::<Account>(record) {
                Ok(account) => account.object,
                Err(error) => {
                    tracing::warn!(%error, "an account cannot be read, so nothing of it is let go of");
                    continue;
                }
            };
            let days = i64::from(account.retention_days);
            let retention = Retention {
                account: account.id,
                before: (days > 0).then(|| now.plus_micros(-days * DAY_MICROS)),
                bytes_max: (account.storage_bytes_max > 0).then_some(account.storage_bytes_max),
            };
            if retention.before.is_none() && retention.bytes_max.is_none() {
                continue;
            }
            if !lease.is_held() {
                return Ok(());
            }
            match platform.history.retain(retention).await {
                Ok(0) => {}
                Ok(bytes) => {
                    tracing::info!(account = %account.name, bytes, "messages beyond retention are gone")
                }
                Err(error) => {
                    tracing::warn!(%error, account = %account.name, "retention failed; trying again later")
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_seconds(1_800_000_000);

    #[test]
    fn a_clock_of_years_ahead_is_not_believed_at_once() {
        let mut trust = Trust { last: Some(NOW), steady: STEADY_LOOKS };
        assert!(trust.believes(NOW.plus_micros(600_000_000)));
        let ahead = NOW.plus_micros(70 * 365 * DAY_MICROS);
        assert!(!trust.believes(ahead));
        // It was set right meanwhile: going back is no jump, but an hour has to pass.
        assert!(!trust.believes(NOW));
        let believed =
            (0..STEADY_LOOKS).map(|_| trust.believes(NOW)).filter(|believed| *believed).count();
        assert!(believed > 0);
    }

    #[test]
    fn a_first_start_believes_its_clock() {
        assert!(Trust { last: None, steady: STEADY_LOOKS }.believes(NOW));
    }
}
