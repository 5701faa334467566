//! What can be watched of the bus.

use metrics::{Counter, Gauge, counter, gauge};

/// Handles, so that the hot path looks nothing up. Clones count together.
#[derive(Clone)]
pub(crate) struct Metrics {
    waiting_items: Gauge,
    waiting_bytes: Gauge,
    /// 1 while the broker is away.
    pub(crate) away: Gauge,
    /// Items that the broker acknowledged.
    pub(crate) sent: Counter,
    /// Items that came from other nodes.
    pub(crate) received: Counter,
    /// Items that were dropped because too many waited.
    pub(crate) dropped_full: Counter,
    /// Items that were dropped because the broker takes none as large.
    pub(crate) dropped_large: Counter,
    /// Items that the broker refused.
    pub(crate) dropped_refused: Counter,
    /// Items of others that never came.
    pub(crate) missed: Counter,
    /// Payloads that came again.
    pub(crate) repeats: Counter,
    /// Payloads that were none of ours.
    pub(crate) garbage: Counter,
    /// Connections that were made.
    pub(crate) connections: Counter,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let dropped = |reason: &'static str| counter!("fieldline_bus_dropped_items_total", "reason" => reason);
        Self {
            waiting_items: gauge!("fieldline_bus_queue_items"),
            waiting_bytes: gauge!("fieldline_bus_queue_bytes"),
            away: gauge!("fieldline_bus_away"),
            sent: counter!("fieldline_bus_sent_items_total"),
            received: counter!("fieldline_bus_received_items_total"),
            dropped_full: dropped("full"),
            dropped_large: dropped("large"),
            dropped_refused: dropped("refused"),
            missed: counter!("fieldline_bus_missed_items_total"),
            repeats: counter!("fieldline_bus_repeats_total"),
            garbage: counter!("fieldline_bus_garbage_total"),
            connections: counter!("fieldline_bus_connections_total"),
        }
    }

    #[allow(
        clippy::cast_precision_loss,
        reason = "a gauge is a float; the bounds are far below 2^53"
    )]
    pub(crate) fn waiting(&self, items: usize, bytes: usize) {
        self.waiting_items.set(items as f64);
        self.waiting_bytes.set(bytes as f64);
    }
}
