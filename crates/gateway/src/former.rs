//! Sessions of the former run of a process that is alone: it was killed, so nobody told their end.
//!
//! Who is connected is in memory, and gone with the process; what is left is the events. A device whose last one is
//! `Online` was connected when the process ended.

use std::collections::HashMap;
use std::str::FromStr;

use fieldline_contracts::registry::RegistryError;
use fieldline_contracts::{HistoryError, Kind, Order, Page, Query, StateError};
use fieldline_ingest::stored_event;
use fieldline_model::{
    AccountId, ConnectionId, DeviceId, EventKind, Params, Series, Timestamp, Value,
};

use crate::Gateway;
use crate::lost::Ended;

/// Events read in one go.
const PAGE: usize = 1_000;
/// How far before the time that is given events are read too: a clock may have been set back.
const SLACK_US: i64 = 3_600 * 1_000_000;

/// Why sessions of the former run were not ended. What was ended is not ended again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormerError {
    /// Events cannot be read, or written.
    #[error(transparent)]
    History(#[from] HistoryError),
    /// Accounts or devices cannot be read.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Who is connected now is not known.
    #[error(transparent)]
    State(#[from] StateError),
}

/// A session that was not ended.
struct Open {
    connection: ConnectionId,
    params: Params,
}

impl Gateway {
    /// Ends the sessions that a former run of this process left open: events from `since` to `started`, which is when this
    /// run began, are read for them. To be called some time after the start: a device that has been here since is left
    /// alone. Returns how many were ended.
    ///
    /// Not cancel-safe: what was ended until then is.
    ///
    /// # Errors
    ///
    /// [`FormerError`]; call it again with the same times, then or at the next start.
    pub async fn end_former_sessions(
        &self,
        since: Timestamp,
        started: Timestamp,
    ) -> Result<usize, FormerError> {
        let registry = &self.shared.platform().registry;
        let mut page = Page::first(Page::LIMIT_MAX);
        let mut ended = 0;
        loop {
            let accounts = registry.list_everywhere(Kind::Account, &page).await?;
            for account in &accounts {
                let account = AccountId(account.id);
                for (device, open) in self.left_open(account, since, started).await? {
                    ended += usize::from(self.end_former(account, device, open, started).await?);
                }
            }
            page.after = accounts.last().map(|account| account.id);
            if accounts.len() < page.limit {
                return Ok(ended);
            }
        }
    }

    /// The sessions of an account that have a beginning and no end.
    async fn left_open(
        &self,
        account: AccountId,
        since: Timestamp,
        started: Timestamp,
    ) -> Result<HashMap<DeviceId, Open>, FormerError> {
        let mut open = HashMap::new();
        let mut query = Query {
            series: Series::events(account),
            from: since.plus_micros(-SLACK_US).max(Timestamp::MIN),
            to: started,
            order: Order::Ascending,
            after: None,
            limit: PAGE,
        };
        loop {
            let records = self.shared.platform().history.read(&query).await?;
            let Some(last) = records.last() else { return Ok(open) };
            query.after = Some((last.timestamp(), last.cursor()));
            for event in records.iter().filter_map(stored_event) {
                let text = |name: &str| event.params.get(name).and_then(Value::as_str);
                let id = text("connection.id").and_then(|id| ConnectionId::from_str(id).ok());
                let device = DeviceId(event.object);
                match (event.kind, id) {
                    (EventKind::Online, Some(connection)) => {
                        open.insert(device, Open { connection, params: event.params });
                    }
                    // Whichever connection it was of: in one process the events of a device are in order.
                    (EventKind::Offline, _) => _ = open.remove(&device),
                    _ => {}
                }
            }
        }
    }

    async fn end_former(
        &self,
        account: AccountId,
        device: DeviceId,
        open: Open,
        started: Timestamp,
    ) -> Result<bool, FormerError> {
        let shared = &self.shared;
        // In its turn: it may be connecting just now.
        let _turn = shared.directory.turn(device).await;
        let presence = shared.platform().state.presence(account, device).await?;
        let was_here = presence.connection.is_some() || presence.changed_at.is_some();
        if was_here || shared.ingest.device(account, device).await?.is_none() {
            return Ok(false);
        }
        let text = "the program ended before it could be told".to_owned();
        let connection = open.connection;
        let ended = Ended { account, device, connection, at: started, text };
        Ok(shared.ingest.event_stored(vec![ended.line()], ended.event(open.params)).await?)
    }
}
