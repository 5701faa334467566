//! Which connection has a device: the newest, over all event loops and all nodes.
//!
//! Connections of a device are ordered by an epoch, not by clocks. Within a
//! node the directory decides; among nodes the state does, which takes the end
//! or the beginning of a connection only if none with a higher epoch is known.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fieldline_contracts::{
    BusItem, Platform, SessionHandle, StateError, Subscription, Topic, TopicFilter,
};
use fieldline_ingest::own_params;
use fieldline_model::{CloseCode, ConnectionId, Device, Event, EventKind, Timestamp, Value};
use tokio::time::timeout;

use crate::channel::ChannelLive;
use crate::connection::Connection;
use crate::journal::Line;
use crate::shared::{End, Shared};

/// Times that a connection is said to be newer than one that came in between.
const TRIES_MAX: u32 = 5;
/// Longest that a device waits for another node to let go of it: what it said there is stored first.
const LET_GO_WAIT: Duration = Duration::from_secs(1);

/// Who had the device before.
#[derive(Default)]
struct Before {
    /// The connection of another node.
    elsewhere: Option<ConnectionId>,
    /// Whether that could not be asked.
    unknown: bool,
    /// Whether others connect faster than can be told: this one gives in.
    refused: bool,
}

impl Shared {
    /// Gives `device` to `connection`: the one that held it is closed, others are told. `None` if
    /// another connection has it for good; then this one is asked to close.
    ///
    /// If the device was held by another node this waits until that one has let go of it, which
    /// takes a moment, and is at most a second.
    pub(crate) async fn attach(
        &self,
        channel: &ChannelLive,
        connection: &Arc<Connection>,
        device: &Arc<Device>,
    ) -> Option<SessionHandle> {
        connection.set_device(Some(Arc::clone(device)));
        let (account, peer, now) = (device.account, connection.peer(), self.now());
        let turn = self.directory.turn(device.id).await;
        let local = self.directory.claim(device.id, connection);
        let before = self.note_connected(connection, device, local.as_deref(), now).await;
        // Within the turn as well: who comes later is the newer one here too.
        let handle = match before.refused {
            true => None,
            false => Some(self.platform().commands.attach(account, device.id, connection.id).await),
        };
        drop(turn);
        let replaces = local.is_some();
        if let Some(local) = local {
            local.close(CloseCode::Replaced);
        }
        let line = || Line::new("connected").connection(connection).peer(peer).channel(channel);
        let connected = line().transport(connection);
        self.ingest.log(vec![connected.of_device(device, connection.connected_at)]).await;
        let login = Line::new("login").connection(connection).ident(&device.ident);
        self.ingest.log(vec![login.of_device(device, now)]).await;
        if before.refused {
            connection.close(CloseCode::Replaced);
            return None;
        }
        // Other nodes know by it that the device is here.
        let tell = !replaces || before.elsewhere.is_some() || before.unknown;
        let datagrams = connection.transport == fieldline_model::Transport::Udp;
        let end = match before.elsewhere.filter(|_| !datagrams) {
            Some(other) => Some((other, self.log_of(device).await)),
            None => None,
        };
        if tell {
            let event = self.presence_event(EventKind::Online, channel, connection, device);
            self.ingest.event(event).await;
        }
        if let Some((other, log)) = end {
            let ended = timeout(LET_GO_WAIT, closed(log, other)).await;
            let outcome = if ended.is_ok() { "let_go" } else { "silent" };
            metrics::counter!("fieldline_gateway_handovers_total", "outcome" => outcome)
                .increment(1);
        }
        handle
    }

    /// Notes in the state that the device is here, as the newest connection that it has. To be called in
    /// the device's turn.
    async fn note_connected(
        &self,
        connection: &Connection,
        device: &Device,
        local: Option<&Connection>,
        now: Timestamp,
    ) -> Before {
        let state = &self.platform().state;
        let (account, peer) = (device.account, connection.peer().to_string());
        let mut before = Before::default();
        let mut known = None;
        // Alone there is nobody else to have it.
        if self.node.is_some() {
            match state.presence(account, device.id).await {
                Ok(presence) => known = Some(presence),
                Err(error) => {
                    before.unknown = true;
                    self.state_noted(Err(error));
                }
            }
        }
        let is_local = |other: &ConnectionId| local.is_some_and(|local| local.id == *other);
        let mut epoch = match (local, &known) {
            // Just one above: if another came in between this is refused, and noticed so.
            (Some(local), None) => local.epoch() + 1,
            (Some(local), Some(known)) if known.connection.as_ref().is_some_and(is_local) => {
                local.epoch() + 1
            }
            (_, Some(known)) => self.epoch_above(known.epoch),
            // It cannot be asked: by the clock, above what a node gives that was started before. If that is wrong, it is
            // found once it can be asked, and the device connects anew.
            (_, None) if before.unknown => {
                self.epoch_above(u64::try_from(now.as_micros()).unwrap_or(0))
            }
            (_, None) => self.epoch_above(0),
        };
        before.elsewhere =
            known.and_then(|known| known.connection).filter(|other| !is_local(other));
        for _ in 0..TRIES_MAX {
            self.epochs.fetch_max(epoch + 1, Ordering::AcqRel);
            connection.set_epoch(epoch);
            let peer = peer.clone();
            match state.connected(account, device.id, connection.id, epoch, peer, now).await {
                Ok(true) => return before,
                // Another node's is known that counts as newer: by its clock, or because it came in between. This
                // one is there now.
                Ok(false) => match state.presence(account, device.id).await {
                    Ok(known) => {
                        epoch = self.epoch_above(known.epoch);
                        let other = known.connection.filter(|other| !is_local(other));
                        before.elsewhere = other.or(before.elsewhere);
                    }
                    Err(error) => {
                        before.unknown = true;
                        self.state_noted(Err(error));
                        return before;
                    }
                },
                // The state notes it by itself when it can: no reason to put a device off.
                Err(error) => {
                    before.unknown = self.node.is_some();
                    self.state_noted(Err(error));
                    return before;
                }
            }
        }
        before.refused = true;
        before
    }

    /// An epoch above `other` and all that this node gave.
    fn epoch_above(&self, other: u64) -> u64 {
        self.epochs.fetch_max(other + 1, Ordering::AcqRel);
        self.epochs.fetch_add(1, Ordering::AcqRel)
    }

    /// Lets go of a device whose connection ended.
    pub(crate) async fn detach(
        &self,
        channel: &ChannelLive,
        connection: &Connection,
        device: &Arc<Device>,
        end: &End,
    ) {
        let (account, now) = (device.account, self.now());
        let turn = self.directory.turn(device.id).await;
        let mut offline = self.directory.release(device.id, connection);
        if offline {
            let Platform { state, .. } = self.platform();
            let epoch = connection.epoch();
            let noted = state.disconnected(account, device.id, connection.id, epoch, now).await;
            // Unknown to the state, the directory's word counts; and one that was replaced has another elsewhere.
            offline = *noted.as_ref().unwrap_or(&(end.code != CloseCode::Replaced));
            self.state_noted(noted.map(|_| ()));
        }
        drop(turn);
        let line = Line::new("closed").connection(connection).close(end.code).text(&end.text);
        self.ingest.log(vec![line.of_device(device, now)]).await;
        if offline {
            let mut event = self.presence_event(EventKind::Offline, channel, connection, device);
            let close = own_params([
                ("close.code", i64::from(end.code.number()).into()),
                ("close.name", end.code.name().into()),
            ]);
            event.params = event.params.into_iter().chain(close).collect();
            self.ingest.event(event).await;
        }
    }

    pub(crate) fn state_noted(&self, noted: Result<(), StateError>) {
        let Err(error) = noted else { return };
        metrics::counter!("fieldline_gateway_presence_failures_total").increment(1);
        if let Some(suppressed) = self.failures.allow() {
            tracing::warn!(%error, suppressed, "presence is noted later");
        }
    }

    fn presence_event(
        &self,
        kind: EventKind,
        channel: &ChannelLive,
        connection: &Connection,
        device: &Device,
    ) -> Event {
        let mut params = own_params([
            ("connection.id", connection.id.to_string().into()),
            ("peer", connection.peer().to_string().into()),
            ("channel.id", channel.id.to_string().into()),
            ("ident", device.ident.as_str().into()),
        ]);
        if let Some(node) = &self.node {
            let own = own_params([
                ("node", node.as_str().into()),
                ("connection.epoch", connection.epoch().into()),
            ]);
            params = params.into_iter().chain(own).collect();
        }
        self.ingest.new_event(device.account, kind, device.id, params)
    }

    /// The log of a device as it is written from now on.
    async fn log_of(&self, device: &Device) -> Box<dyn Subscription> {
        let filter = TopicFilter { topics: vec![Topic::Log], objects: vec![device.id.0] };
        self.platform().bus.subscribe(device.account, filter).await
    }
}

/// Waits until the log says that `connection` is closed: all that it took is stored then.
async fn closed(mut log: Box<dyn Subscription>, connection: ConnectionId) {
    let id = connection.to_string();
    while let Some(item) = log.next().await {
        let Ok(BusItem::Log { lines, .. }) = item else { continue };
        let has = |line: &fieldline_model::Stored, name: &str, text: &str| {
            line.params().get(name).and_then(Value::as_str) == Some(text)
        };
        let closed = |line: &&fieldline_model::Stored| {
            has(line, "log.kind", "closed") && has(line, "connection.id", &id)
        };
        if lines.iter().any(|line| closed(&line)) {
            return;
        }
    }
}
