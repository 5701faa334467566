//! Log lines and events: one bounded queue, one writer, batched appends.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use fieldline_contracts::{Bus, BusItem, History, HistoryError};
use fieldline_model::{
    Accepted, AccountId, Cursor, Event, EventId, EventKind, ParamName, Params, Receipt, Series,
    SeriesKind, Stored, Value,
};
use metrics::{Counter, Gauge};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};
use tracing::warn;

use crate::own_params;
use crate::submit::append_patiently;

/// Entries that wait to be written. Full: log lines are dropped, events wait.
const QUEUE_MAX: usize = 16_384;
/// Bytes that waiting lines may hold on to. Full: log lines are dropped.
const QUEUE_BYTES_MAX: usize = 16 << 20;
/// Entries of one append.
const BATCH_MAX: usize = 1_024;
/// Least time from one append to the next, so that many lines share one sync of the disk: each append of its own
/// would stand in the way of the messages of all devices. A line that comes alone is written at once.
const GATHER: Duration = Duration::from_millis(50);
/// Wait between two tries of one append while the store is busy.
const RETRY_DELAY: Duration = Duration::from_millis(50);

enum Entry {
    Line(Accepted),
    Lazy(Box<dyn FnOnce() -> Accepted + Send>),
    Event(Event),
    /// Answered when everything before it is written.
    Flush(oneshot::Sender<()>),
}

struct Queued {
    entry: Entry,
    bytes: usize,
}

pub(crate) struct Journal {
    queue: mpsc::Sender<Queued>,
    bytes: Arc<AtomicUsize>,
    lines_dropped: Counter,
    events_dropped: Counter,
}

impl Journal {
    pub(crate) fn start(history: Arc<dyn History>, bus: Arc<dyn Bus>, runtime: &Handle) -> Self {
        let (queue, entries) = mpsc::channel(QUEUE_MAX);
        let bytes = Arc::new(AtomicUsize::new(0));
        let lines_dropped = metrics::counter!("fieldline_ingest_log_lines_dropped_total");
        let events_dropped = metrics::counter!("fieldline_ingest_events_dropped_total");
        let writer = Writer {
            history,
            bus,
            entries,
            bytes: Arc::clone(&bytes),
            depth: metrics::gauge!("fieldline_ingest_log_queue_depth"),
            lines_dropped: lines_dropped.clone(),
            events_dropped: events_dropped.clone(),
        };
        runtime.spawn(writer.run());
        Self { queue, bytes, lines_dropped, events_dropped }
    }

    pub(crate) fn line(&self, line: Accepted) {
        let bytes = line.params().content_bytes();
        self.offer(bytes, || Entry::Line(line));
    }

    pub(crate) fn lazy(&self, bytes: usize, make: Box<dyn FnOnce() -> Accepted + Send>) {
        self.offer(bytes, || Entry::Lazy(make));
    }

    fn offer(&self, bytes: usize, entry: impl FnOnce() -> Entry) {
        let before = self.bytes.fetch_add(bytes, Ordering::AcqRel);
        if before.saturating_add(bytes) <= QUEUE_BYTES_MAX
            && let Ok(permit) = self.queue.try_reserve()
        {
            permit.send(Queued { entry: entry(), bytes });
            return;
        }
        self.bytes.fetch_sub(bytes, Ordering::AcqRel);
        self.lines_dropped.increment(1);
    }

    pub(crate) async fn event(&self, event: Event) {
        let sent = self.queue.send(Queued { entry: Entry::Event(event), bytes: 0 }).await;
        if sent.is_err() {
            // The writer is gone only after its runtime has shut down.
            self.events_dropped.increment(1);
        }
    }

    pub(crate) fn event_soon(&self, event: Event) {
        if self.queue.try_send(Queued { entry: Entry::Event(event), bytes: 0 }).is_err() {
            self.events_dropped.increment(1);
        }
    }

    pub(crate) async fn flush(&self) {
        let (done, wait) = oneshot::channel();
        let flush = Queued { entry: Entry::Flush(done), bytes: 0 };
        if self.queue.send(flush).await.is_ok() {
            // An error says that the writer is gone, and so is what it had.
            wait.await.unwrap_or_default();
        }
    }
}

struct Writer {
    history: Arc<dyn History>,
    bus: Arc<dyn Bus>,
    entries: mpsc::Receiver<Queued>,
    bytes: Arc<AtomicUsize>,
    depth: Gauge,
    lines_dropped: Counter,
    events_dropped: Counter,
}

impl Writer {
    /// Writes until the queue is closed and empty.
    async fn run(mut self) {
        let mut queued = Vec::with_capacity(BATCH_MAX);
        let mut failing = false;
        let mut next = Instant::now();
        while self.gather(&mut queued, next).await {
            next = Instant::now() + GATHER;
            #[allow(clippy::cast_precision_loss, reason = "a queue is short")]
            self.depth.set(self.entries.len() as f64);
            let mut batch = Vec::with_capacity(queued.len());
            let mut events = Vec::new();
            let mut flushes = Vec::new();
            let mut bytes = 0;
            for Queued { entry, bytes: of_entry } in queued.drain(..) {
                bytes += of_entry;
                match entry {
                    Entry::Line(line) => batch.push(line),
                    Entry::Lazy(make) => batch.push(make()),
                    Entry::Event(event) => {
                        batch.push(event_record(&event));
                        events.push(event);
                    }
                    Entry::Flush(done) => flushes.push(done),
                }
            }
            if !batch.is_empty() {
                match self.append(&batch).await {
                    Ok(receipts) => {
                        failing = false;
                        self.publish(batch, Some(receipts), events).await;
                    }
                    Err(error) => {
                        let lines = batch.len() - events.len();
                        // Once, not for every batch: the metric counts the rest.
                        if !failing {
                            warn!(%error, lines, events = events.len(), "log lines and events were not stored");
                        }
                        failing = true;
                        self.lines_dropped.increment(lines as u64);
                        self.events_dropped.increment(events.len() as u64);
                        self.publish(batch, None, events).await;
                    }
                }
            }
            self.bytes.fetch_sub(bytes, Ordering::AcqRel);
            for done in flushes {
                // Whoever asked may have stopped waiting.
                done.send(()).unwrap_or_default();
            }
        }
    }

    /// Takes what waits: at once when `until` is past, when somebody waits for a flush and when a batch is full.
    /// False when the queue is closed and empty.
    async fn gather(&mut self, queued: &mut Vec<Queued>, until: Instant) -> bool {
        let mut new = self.entries.recv_many(queued, BATCH_MAX).await;
        while new > 0 && queued.len() < BATCH_MAX {
            let flush = |queued: &Queued| matches!(queued.entry, Entry::Flush(_));
            if queued.iter().rev().take(new).any(flush) {
                break;
            }
            let room = BATCH_MAX - queued.len();
            new = timeout_at(until, self.entries.recv_many(queued, room)).await.unwrap_or(0);
        }
        !queued.is_empty()
    }

    async fn append(&self, batch: &[Accepted]) -> Result<Vec<Receipt>, HistoryError> {
        append_patiently(&*self.history, batch, RETRY_DELAY).await
    }

    /// Publishes what was written. What could not be written is shown to those
    /// who watch live all the same: it is then that they need it most.
    async fn publish(
        &self,
        batch: Vec<Accepted>,
        receipts: Option<Vec<Receipt>>,
        events: Vec<Event>,
    ) {
        let mut receipts = receipts.map(Vec::into_iter);
        let mut items: Vec<(AccountId, BusItem)> = Vec::new();
        let mut lines: Vec<Stored> = Vec::new();
        for line in batch {
            let receipt = receipts.as_mut().and_then(Iterator::next);
            if line.series().kind == SeriesKind::Event {
                continue;
            }
            let unwritten = Receipt { cursor: Cursor::default(), duplicate: false };
            let line = line.stored(receipt.unwrap_or(unwritten));
            if lines.last().is_some_and(|last| last.series() != line.series()) {
                items.extend(log_item(std::mem::take(&mut lines)));
            }
            lines.push(line);
        }
        items.extend(log_item(lines));
        items.extend(
            events.into_iter().map(|event| (event.account, BusItem::Event(Arc::new(event)))),
        );
        // One call for each run of one account; mostly there is one account.
        let mut run: Option<(AccountId, Vec<BusItem>)> = None;
        for (account, item) in items {
            match &mut run {
                Some((of, items)) if *of == account => items.push(item),
                _ => {
                    if let Some((of, items)) = run.replace((account, vec![item])) {
                        self.bus.publish(of, items).await;
                    }
                }
            }
        }
        if let Some((of, items)) = run {
            self.bus.publish(of, items).await;
        }
    }
}

fn log_item(lines: Vec<Stored>) -> Option<(AccountId, BusItem)> {
    let series = lines.first()?.series();
    let item = BusItem::Log { kind: series.kind, object: series.object, lines: lines.into() };
    Some((series.account, item))
}

/// Stores an event and its lines, past the queue, and publishes them if the event is new.
pub(crate) async fn store_now(
    history: &dyn History,
    bus: &dyn Bus,
    lines: Vec<Accepted>,
    event: Event,
) -> Result<bool, HistoryError> {
    let mut batch = lines;
    batch.push(event_record(&event));
    let receipts = append_patiently(history, &batch, RETRY_DELAY).await?;
    batch.pop();
    if receipts.last().is_some_and(|receipt| receipt.duplicate) {
        return Ok(false);
    }
    let lines = batch.into_iter().zip(receipts).map(|(line, receipt)| line.stored(receipt));
    let mut items: Vec<BusItem> = lines.filter_map(|line| Some(log_item(vec![line])?.1)).collect();
    let account = event.account;
    items.push(BusItem::Event(Arc::new(event)));
    bus.publish(account, items).await;
    Ok(true)
}

/// The stored form of an event: `event.id`, `event.kind`, `event.object`, then its own parameters.
fn event_record(event: &Event) -> Accepted {
    let head = own_params([
        ("event.id", event.id.to_string().into()),
        ("event.kind", event.kind.name().into()),
        ("event.object", event.object.to_string().into()),
    ]);
    let params = head.into_iter().chain(event.params.iter().cloned()).collect();
    Accepted::own(Series::events(event.account), event.timestamp, params)
}

/// The event that a record of [`Series::events`] holds; `None` for a record of another form.
#[must_use]
pub fn stored_event(record: &Stored) -> Option<Event> {
    let text = |name: &str| record.params().get(name).and_then(Value::as_str);
    let kind = serde_json::from_value::<EventKind>(text("event.kind")?.into()).ok()?;
    let own =
        |name: &ParamName| matches!(name.as_str(), "event.id" | "event.kind" | "event.object");
    let params: Params = record.params().iter().filter(|(name, _)| !own(name)).cloned().collect();
    Some(Event {
        id: text("event.id")?.parse::<EventId>().ok()?,
        account: record.series().account,
        kind,
        object: text("event.object")?.parse::<EventId>().ok()?.0,
        timestamp: record.timestamp(),
        params,
    })
}
