//! The end of a gateway: nothing new, what is begun is finished, and devices go to other nodes a few at a time.

use std::sync::Arc;
use std::time::Duration;

use fieldline_model::{ChannelId, CloseCode};
use futures_util::future::join_all;
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{info, warn};

use crate::connection::Connection;
use crate::supervisor::Supervisor;

/// Connections that are closed in one go, and the time to the next: a thousand a second.
const STEP: Duration = Duration::from_millis(10);
const STEP_CONNECTIONS: usize = 10;

/// Time that a connection takes for its last words.
const LAST_WORDS: Duration = Duration::from_secs(1);

impl Supervisor {
    /// Closes all listeners, then all connections. Returns how many did not end in time.
    pub(crate) async fn drain(&self) -> usize {
        let began = Instant::now();
        let limit = self.shared.config.drain_timeout;
        // A little is left for those that are told last.
        let until = began + limit.saturating_sub(LAST_WORDS).max(limit / 2);
        self.shared.drain.get_or_init(|| until);
        let ids: Vec<ChannelId> = self.shared.channels.read().keys().copied().collect();
        let live: Vec<_> = ids.into_iter().filter_map(|id| self.take_live(id)).collect();
        join_all(live.iter().map(|live| self.stop_listening(live, CloseCode::Shutdown))).await;
        let connections: Vec<_> = live.iter().flat_map(|live| live.connections()).collect();
        let count = connections.len();
        self.close_spread(connections, began + limit / 2).await;
        // One that was accepted at the last moment.
        live.iter().for_each(|live| live.close_all(CloseCode::Shutdown));

        // Channels that were changed lately may still have connections.
        self.shared.tasks.close();
        let drained = timeout_at(began + limit, self.shared.tasks.wait()).await;
        let abandoned = if drained.is_ok() { 0 } else { self.shared.tasks.len() };
        if abandoned > 0 {
            let code = CloseCode::Shutdown.name();
            warn!(abandoned, code, "drain timeout reached, cutting connections");
        }
        info!(closed = count, abandoned, "connections drained");
        abandoned
    }

    /// Asks connections to end, evenly until `until` if they are many.
    async fn close_spread(&self, connections: Vec<Arc<Connection>>, until: Instant) {
        let mut next = Instant::now();
        let steps = until.saturating_duration_since(next).as_millis() / STEP.as_millis();
        let steps = usize::try_from(steps).unwrap_or(usize::MAX).max(1);
        let at_once = connections.len().div_ceil(steps).max(STEP_CONNECTIONS);
        for (number, some) in connections.chunks(at_once).enumerate() {
            if number > 0 {
                next += STEP;
                sleep_until(next).await;
            }
            some.iter().for_each(|connection| connection.close(CloseCode::Shutdown));
        }
    }
}
