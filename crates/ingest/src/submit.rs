//! The one way in: validate, append, apply, publish.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use fieldline_contracts::history::BATCH_MAX;
use fieldline_contracts::{BusItem, Changes, History, HistoryError, Platform, StateError};
use fieldline_model::{
    Accepted, AccountId, Cursor, Decoded, DeviceId, ParamName, Params, Receipt, Series, Stored,
    Timestamp,
};
use metrics::{Counter, Histogram};

use crate::{Ingest, own_params};

/// What became of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Submitted {
    /// Messages that are stored now and were not before.
    pub stored: usize,
    /// Messages that were stored already: re-sent ones.
    pub duplicates: usize,
    /// Messages too large to be kept. They are not stored, so a batch with any
    /// of them must not be acknowledged as a whole; the device's log says why.
    pub rejected: usize,
}

/// Handles of the metrics of the hot path.
pub(crate) struct Counters {
    messages: Counter,
    duplicates: Counter,
    rejected: Counter,
    append_seconds: Histogram,
    /// Microseconds that the newest append took, plus one; 0 before the first.
    append_micros: AtomicU64,
    /// Batches that last values could not take over at once.
    state_failures: Counter,
    /// Whether the last one could not: an outage is logged once.
    state_fails: AtomicBool,
}

impl Counters {
    pub(crate) fn new() -> Self {
        Self {
            messages: metrics::counter!("fieldline_ingest_messages_total"),
            duplicates: metrics::counter!("fieldline_ingest_duplicates_total"),
            rejected: metrics::counter!("fieldline_ingest_rejected_total"),
            append_seconds: metrics::histogram!("fieldline_ingest_append_seconds"),
            append_micros: AtomicU64::new(0),
            state_failures: metrics::counter!("fieldline_ingest_state_failures_total"),
            state_fails: AtomicBool::new(false),
        }
    }
}

/// How long a submit waits for the declarations of parameters at start-up.
const LOAD_WAIT: Duration = Duration::from_secs(10);

/// Time that an append may take in all while the store is busy. Each try waits within the store
/// already, and the device's connection waits with it.
const BUSY_LIMIT: Duration = Duration::from_secs(5);
const BUSY_RETRY_DELAY: Duration = Duration::from_millis(20);

/// Appends, again and again while the store is busy, for [`BUSY_LIMIT`] in all. The first try
/// has all the time it takes: a slow one is on its way to the disk.
///
/// Not cancel-safe, as [`History::append`].
pub(crate) async fn append_patiently(
    history: &dyn History,
    batch: &[Accepted],
    retry_delay: Duration,
) -> Result<Vec<Receipt>, HistoryError> {
    let deadline = tokio::time::Instant::now() + BUSY_LIMIT;
    let mut outcome = history.append(batch.to_vec()).await;
    while matches!(outcome, Err(HistoryError::Busy)) {
        if tokio::time::Instant::now() + retry_delay >= deadline {
            break;
        }
        tokio::time::sleep(retry_delay).await;
        // Given up in the midst, it may be stored: it comes again then, and is recognised.
        let again = tokio::time::timeout_at(deadline, history.append(batch.to_vec())).await;
        outcome = again.unwrap_or(Err(HistoryError::Busy));
    }
    outcome
}

impl Ingest {
    /// How long the newest batch took until it was durable; none before the first.
    #[must_use]
    pub fn append_took(&self) -> Option<Duration> {
        let micros = self.inner.counters.append_micros.load(Ordering::Relaxed);
        micros.checked_sub(1).map(Duration::from_micros)
    }

    /// Takes what a device said. When this returns `Ok` the messages are
    /// durable, last values have them and subscribers were told: the link may
    /// acknowledge. If last values cannot be reached, they have them later: that
    /// keeps no device waiting.
    ///
    /// Batches of one device are taken one after the other, in the order of
    /// the calls. Batches of different devices meet in one group commit.
    ///
    /// Not cancel-safe: after dropping the future, treat the batch as not
    /// stored and do not acknowledge it. If it was stored all the same, last
    /// values learn of it when the device sends it again.
    ///
    /// # Errors
    ///
    /// See [`HistoryError`]; on any of them nothing may be acknowledged.
    /// [`HistoryError::Busy`] comes only after the store was busy for seconds.
    pub async fn submit(
        &self,
        account: AccountId,
        device: DeviceId,
        received: Timestamp,
        messages: Vec<Decoded>,
    ) -> Result<Submitted, HistoryError> {
        let mut submitted = Submitted::default();
        if messages.is_empty() {
            return Ok(submitted);
        }
        if !self.inner.caches.loaded(LOAD_WAIT).await {
            return Err(HistoryError::Busy);
        }
        let schema = self.inner.caches.schema(account);
        let series = Series::messages(account, device);
        let mut batch = Vec::with_capacity(messages.len());
        for decoded in messages {
            match Accepted::validate(decoded, series, received, &schema) {
                Ok(accepted) => batch.push(accepted),
                Err(reason) => {
                    submitted.rejected += 1;
                    self.log_rejected(account, device, received, &reason.to_string());
                }
            }
        }
        let turn = self.inner.turns.take(device).await;
        while !batch.is_empty() {
            let rest = batch.split_off(batch.len().min(BATCH_MAX));
            self.append(account, device, batch, &mut submitted).await?;
            batch = rest;
        }
        drop(turn);
        let Counters { rejected, .. } = &self.inner.counters;
        rejected.increment(submitted.rejected as u64);
        Ok(submitted)
    }

    /// Stores one batch of a device, then applies and publishes it.
    async fn append(
        &self,
        account: AccountId,
        device: DeviceId,
        batch: Vec<Accepted>,
        submitted: &mut Submitted,
    ) -> Result<(), HistoryError> {
        let Platform { history, state, bus, .. } = &self.inner.platform;
        let Counters { messages, duplicates, append_seconds, .. } = &self.inner.counters;
        let begun = std::time::Instant::now();
        let appended = append_patiently(&**history, &batch, BUSY_RETRY_DELAY).await;
        let receipts = appended.inspect_err(|error| {
            let code = error.code();
            metrics::counter!("fieldline_ingest_failures_total", "code" => code).increment(1);
        })?;
        let took = begun.elapsed();
        append_seconds.record(took);
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).saturating_add(1);
        self.inner.counters.append_micros.store(micros, Ordering::Relaxed);
        if receipts.len() != batch.len() {
            let (got, of) = (receipts.len(), batch.len());
            return Err(HistoryError::Failed(format!("{got} receipts for {of} messages")));
        }
        let mut stored = Vec::with_capacity(batch.len());
        let mut again = Vec::new();
        for (accepted, receipt) in batch.into_iter().zip(receipts) {
            let target = if receipt.duplicate { &mut again } else { &mut stored };
            target.push(accepted.stored(receipt));
        }
        submitted.stored += stored.len();
        submitted.duplicates += again.len();
        messages.increment(stored.len() as u64);
        duplicates.increment(again.len() as u64);
        let mut changed = self.catch_up(account, device, &again).await;
        let stored: Arc<[Stored]> = stored.into();
        let mut items = Vec::with_capacity(2);
        if !stored.is_empty() {
            for (_, _, names) in self.applied(&stored, state.apply(&stored).await) {
                merge(&mut changed, names);
            }
            items.push(BusItem::Messages { device, messages: stored });
        }
        if !changed.is_empty() {
            items.push(BusItem::State { device, params: changed.into() });
        }
        if !items.is_empty() {
            bus.publish(account, items).await;
        }
        Ok(())
    }

    /// Brings last values up to re-sent messages that they do not know: an
    /// append may have succeeded without its caller learning of it. Only newer
    /// instants count, since a re-sent message says nothing of the order
    /// within one.
    async fn catch_up(
        &self,
        account: AccountId,
        device: DeviceId,
        again: &[Stored],
    ) -> Vec<ParamName> {
        let mut changed = Vec::new();
        if again.is_empty() {
            return changed;
        }
        let state = &self.inner.platform.state;
        let known = match state.get(account, device).await {
            Ok(known) => known,
            // What it knows cannot be asked: it decides by itself, when it is back.
            Err(_) => {
                for (_, _, names) in self.applied(again, state.apply(again).await) {
                    merge(&mut changed, names);
                }
                return changed;
            }
        };
        for message in again {
            let newer: Params = message
                .params()
                .iter()
                .filter(|(name, _)| {
                    known.get(name).is_none_or(|last| last.timestamp < message.timestamp())
                })
                .cloned()
                .collect();
            if newer.is_empty() {
                continue;
            }
            let (timestamp, received) = (message.timestamp(), message.received());
            let cursor = Cursor::default();
            let part = Stored::read_back(message.series(), timestamp, received, newer, cursor);
            let part = std::slice::from_ref(&part);
            for (_, _, names) in self.applied(part, state.apply(part).await) {
                merge(&mut changed, names);
            }
        }
        changed
    }

    /// What changed by `messages`. If last values could not take them over, everything in them may
    /// have: who follows last values reads them when they are back.
    fn applied(&self, messages: &[Stored], result: Result<Changes, StateError>) -> Changes {
        let Counters { state_failures, state_fails, .. } = &self.inner.counters;
        let error = match result {
            Ok(changes) => {
                // Read first: the common case writes nothing that is shared.
                if state_fails.load(Ordering::Relaxed) && state_fails.swap(false, Ordering::AcqRel)
                {
                    tracing::info!("last values take over what comes in again");
                }
                return changes;
            }
            Err(error) => error,
        };
        state_failures.increment(1);
        if !state_fails.swap(true, Ordering::AcqRel) {
            tracing::warn!(%error, "last values are behind; messages are stored and acknowledged");
        }
        let names = |message: &Stored| message.params().iter().map(|(n, _)| n.clone()).collect();
        let of = |message: &Stored| (message.series().account, DeviceId(message.series().object));
        let changed = messages.iter().map(|message| {
            let (account, device) = of(message);
            (account, device, names(message))
        });
        changed.collect()
    }

    fn log_rejected(&self, account: AccountId, device: DeviceId, at: Timestamp, reason: &str) {
        let params = own_params([
            ("log.kind", "error".into()),
            ("error.class", "rejected".into()),
            ("error.text", reason.into()),
        ]);
        let line = Accepted::own(Series::device_log(account, device), at, params);
        self.inner.journal.line(line);
    }
}

/// Adds to `changed` what it does not have. Names of one message are distinct,
/// and the messages of a device mostly have the same ones: shared texts decide.
fn merge(changed: &mut Vec<ParamName>, names: Vec<ParamName>) {
    if changed.is_empty() {
        *changed = names;
        return;
    }
    if changed.len() + names.len() > 64 {
        changed.extend(names);
        changed.sort_unstable();
        changed.dedup();
        return;
    }
    for name in names {
        if !changed.iter().any(|known| known.same_text(&name) || *known == name) {
            changed.push(name);
        }
    }
}
