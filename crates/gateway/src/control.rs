//! What management asks of the gateway.

use async_trait::async_trait;
use fieldline_contracts::{ChannelControl, ChannelStatus, Connections, Missing};
use fieldline_model::{AccountId, ChannelId, CloseCode, ConnectionId};

use crate::Gateway;

/// Most connections of one answer.
const CONNECTIONS_MAX: usize = 10_000;

impl Gateway {
    fn live(
        &self,
        account: AccountId,
        channel: ChannelId,
    ) -> Option<std::sync::Arc<crate::channel::ChannelLive>> {
        let channels = self.shared.channels.read();
        channels.get(&channel).filter(|entry| entry.account == account)?.live.clone()
    }
}

#[async_trait]
impl ChannelControl for Gateway {
    async fn status(&self, account: AccountId, channel: ChannelId) -> ChannelStatus {
        let channels = self.shared.channels.read();
        let entry = channels.get(&channel).filter(|entry| entry.account == account);
        let Some(entry) = entry else { return ChannelStatus::default() };
        ChannelStatus {
            listening: entry.live.is_some(),
            error: entry.error.clone(),
            address: entry.live.as_ref().map(|live| live.address.to_string()),
            connections: entry.live.as_ref().map_or(0, |live| live.count()),
            nodes: Vec::new(),
        }
    }

    async fn connections(&self, account: AccountId, channel: ChannelId) -> Connections {
        let Some(live) = self.live(account, channel) else { return Connections::default() };
        let mut connections = live.connections();
        connections.sort_unstable_by_key(|connection| connection.id);
        let items = connections.iter().take(CONNECTIONS_MAX).map(|connection| connection.info());
        Connections { items: items.collect(), missing: Vec::new() }
    }

    async fn close(
        &self,
        account: AccountId,
        channel: ChannelId,
        connection: ConnectionId,
    ) -> Result<bool, Vec<Missing>> {
        let found = self.live(account, channel).and_then(|live| live.connection(connection));
        if let Some(connection) = &found {
            connection.close(CloseCode::ClosedByOperator);
        }
        Ok(found.is_some())
    }

    async fn opened(&self) -> bool {
        *self.ready.borrow()
    }

    async fn problems(&self) -> Vec<String> {
        let channels = self.shared.channels.read();
        let failed = channels.iter().filter(|(_, entry)| entry.enabled && entry.live.is_none());
        let text = |(id, entry): (&ChannelId, &crate::shared::Entry)| {
            entry.error.as_ref().map(|error| format!("channel {id}: {error}"))
        };
        failed.filter_map(text).collect()
    }
}
