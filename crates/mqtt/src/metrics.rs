//! The metrics of this service. Label sets are bounded; accounts are none.

use metrics::{counter, gauge};

use crate::codec::Reason;

/// What ended a connection, as a label.
pub(crate) fn closed(reason: &'static str) {
    counter!("fieldline_mqtt_connections_closed_total", "reason" => reason).increment(1);
}

/// A connection was refused before it became a session.
pub(crate) fn refused(reason: &'static str) {
    counter!("fieldline_mqtt_connections_refused_total", "reason" => reason).increment(1);
}

/// Sessions now.
pub(crate) fn sessions(change: f64) {
    gauge!("fieldline_mqtt_sessions").increment(change);
}

/// Messages that went into a client's queue.
pub(crate) fn delivered(count: usize) {
    counter!("fieldline_mqtt_messages_out_total").increment(count as u64);
}

/// A message was not delivered to one client; `why` is one of a few words.
pub(crate) fn dropped(why: &'static str) {
    counter!("fieldline_mqtt_messages_dropped_total", "why" => why).increment(1);
}

/// How full the queues are: all together, the fullest one, and awaited answers.
pub(crate) fn depths((sum, most, answers): (usize, usize, usize)) {
    gauge!("fieldline_mqtt_queued_messages").set(sum as f64);
    gauge!("fieldline_mqtt_queued_messages_of_fullest").set(most as f64);
    gauge!("fieldline_mqtt_answers_awaited").set(answers as f64);
}

/// Items of the bus that were lost because they came faster than they could be routed.
pub(crate) fn lagged(count: u64) {
    counter!("fieldline_mqtt_bus_lagged_total").increment(count);
}

/// Last values could not be read: they are sent later.
pub(crate) fn state_failed() {
    counter!("fieldline_mqtt_state_failures_total").increment(1);
}

/// A PUBLISH of a client, by the kind of topic and what became of it.
pub(crate) fn published(kind: &'static str, reason: Reason) {
    counter!("fieldline_mqtt_publishes_total", "kind" => kind, "result" => reason.code())
        .increment(1);
}

/// A client was read more slowly, because its account publishes too fast.
pub(crate) fn throttled() {
    counter!("fieldline_mqtt_throttled_total").increment(1);
}

/// Beginnings and ends of sessions were stored, for their wills.
pub(crate) fn wills_stored(count: usize) {
    counter!("fieldline_mqtt_will_changes_total").increment(count as u64);
}

/// A will of a client whose node is gone was published.
pub(crate) fn will_adopted() {
    counter!("fieldline_mqtt_wills_of_the_gone_total").increment(1);
}

/// A message of a client went to the other nodes (`out`) or came from one (`in`).
pub(crate) fn between_nodes(direction: &'static str) {
    counter!("fieldline_mqtt_between_nodes_total", "direction" => direction).increment(1);
}
