//! Devices that connect to another node while they are held here.
//!
//! The other node tells by an `Online` event, and this one lets go at once. What a lost event would leave behind is
//! found by asking the state for all devices that are held, twice a minute. Who has a device is what the state says;
//! clocks have no part in it.

use std::collections::{HashMap, HashSet};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::{BusItem, Presence, Topic, TopicFilter};
use fieldline_model::{AccountId, CloseCode, ConnectionId, DeviceId, Event, EventKind, Value};
use parking_lot::Mutex;
use tokio::task::AbortHandle;
use tracing::{debug, warn};

use crate::connection::Connection;
use crate::shared::Shared;

/// How often the state is asked for all devices that are held.
const CHECK_EVERY: Duration = Duration::from_secs(30);
/// Devices that the state is asked for at once.
const CHECK_MAX: usize = 500;
/// Wait before events are subscribed to again after the subscription ended.
const SUBSCRIBE_AGAIN: Duration = Duration::from_secs(1);

/// Follows the events of the accounts whose channels are served here. Dropping it ends that.
pub(crate) struct Elsewhere {
    shared: Arc<Shared>,
    accounts: Mutex<HashMap<AccountId, AbortHandle>>,
    check: Option<AbortHandle>,
}

impl Elsewhere {
    pub(crate) fn new(shared: &Arc<Shared>) -> Self {
        // Alone, nobody else tells of anything.
        let check = shared.node.as_ref().map(|_| {
            let shared = Arc::clone(shared);
            let checks = async move {
                loop {
                    tokio::time::sleep(CHECK_EVERY).await;
                    shared.check_held(None).await;
                }
            };
            tokio::spawn(checks).abort_handle()
        });
        Self { shared: Arc::clone(shared), accounts: Mutex::default(), check }
    }

    /// Follows the accounts that have channels now, and no others.
    pub(crate) fn follow(&self) {
        if self.shared.node.is_none() {
            return;
        }
        let served: HashSet<AccountId> =
            self.shared.channels.read().values().map(|entry| entry.account).collect();
        let mut accounts = self.accounts.lock();
        accounts.retain(|account, task| {
            let stays = served.contains(account);
            if !stays {
                task.abort();
            }
            stays
        });
        for account in served {
            accounts.entry(account).or_insert_with(|| {
                tokio::spawn(watch(Arc::clone(&self.shared), account)).abort_handle()
            });
        }
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        self.accounts.get_mut().values().chain(&self.check).for_each(AbortHandle::abort);
    }
}

/// Follows the events of an account for ever.
async fn watch(shared: Arc<Shared>, account: AccountId) {
    loop {
        let filter = TopicFilter { topics: vec![Topic::Event], objects: Vec::new() };
        let mut events = shared.platform().bus.subscribe(account, filter).await;
        // What was told before, nobody heard here.
        shared.check_held(Some(account)).await;
        while let Some(item) = events.next().await {
            match item {
                Ok(BusItem::Event(event)) => shared.heard(&event).await,
                Ok(_) => {}
                Err(lagged) => {
                    debug!(%lagged, "events of other nodes were missed");
                    shared.check_held(Some(account)).await;
                }
            }
        }
        tokio::time::sleep(SUBSCRIBE_AGAIN).await;
    }
}

fn text<'a>(event: &'a Event, name: &str) -> Option<&'a str> {
    event.params.get(name).and_then(Value::as_str)
}

/// Whether another connection has taken the place of `held`.
fn superseded(held: &Connection, presence: &Presence) -> bool {
    presence.epoch > held.epoch() && presence.connection != Some(held.id)
}

impl Shared {
    /// Takes note of an event of another node.
    async fn heard(&self, event: &Event) {
        if event.kind != EventKind::Online || text(event, "node") == self.node.as_deref() {
            return;
        }
        let device = DeviceId(event.object);
        let Some(held) = self.directory.holder(event.account, device) else { return };
        let other = text(event, "connection.id").and_then(|id| ConnectionId::from_str(id).ok());
        if other.is_none() || other == Some(held.id) {
            return;
        }
        // In its turn: one that is just being attached has no epoch yet.
        let turn = self.directory.turn(device).await;
        let newer = match self.platform().state.presence(event.account, device).await {
            Ok(presence) => superseded(&held, &presence),
            Err(error) => {
                self.state_noted(Err(error));
                let epoch = match event.params.get("connection.epoch") {
                    Some(Value::Int(epoch)) => u64::try_from(*epoch).unwrap_or(0),
                    _ => 0,
                };
                epoch > held.epoch()
            }
        };
        drop(turn);
        if newer {
            held.close(CloseCode::Replaced);
        }
    }

    /// Asks the state for the devices that are held here, and lets go of those that are elsewhere.
    pub(crate) async fn check_held(&self, account: Option<AccountId>) {
        let mut of: HashMap<AccountId, Vec<(DeviceId, Arc<Connection>)>> = HashMap::new();
        for (device, held) in self.directory.all() {
            if account.is_none_or(|account| account == held.account) {
                of.entry(held.account).or_default().push((device, held));
            }
        }
        for (account, held) in of {
            for chunk in held.chunks(CHECK_MAX) {
                let devices: Vec<DeviceId> = chunk.iter().map(|(device, _)| *device).collect();
                let known = self.platform().state.presence_many(account, &devices).await;
                let known: HashMap<DeviceId, Presence> = match known {
                    Ok(known) => known.into_iter().collect(),
                    Err(error) => {
                        warn!(%error, "where devices are cannot be checked now");
                        return;
                    }
                };
                for (device, held) in chunk {
                    // One that is just being attached tells the state itself.
                    let gone = held.epoch() != 0
                        && known.get(device).is_some_and(|presence| superseded(held, presence));
                    if gone {
                        held.close(CloseCode::Replaced);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use fieldline_contracts::{Clock, MemoryBus, MemoryState, Platform, State, SystemClock};
    use fieldline_ingest::Ingest;
    use fieldline_model::{ChannelId, Params};
    use fieldline_router::LocalCommands;
    use fieldline_testkit::{MemoryRegistry, ScriptedHistory};

    use super::*;
    use crate::config::GatewayConfig;

    struct World {
        shared: Arc<Shared>,
        state: Arc<MemoryState>,
        account: AccountId,
    }

    fn world() -> World {
        let (clock, state) = (Arc::new(SystemClock), Arc::new(MemoryState::new()));
        let registry = Arc::new(MemoryRegistry::new(clock.clone()));
        let platform = Platform {
            registry: registry.clone(),
            history: Arc::new(ScriptedHistory::new()),
            state: state.clone(),
            bus: Arc::new(MemoryBus::new()),
            commands: Arc::new(LocalCommands::new(registry, clock.clone())),
            clock: clock.clone(),
        };
        let (config, node) = (GatewayConfig::default(), Some("here".to_owned()));
        let shared = Arc::new(Shared::new(config, Ingest::new(platform), node));
        World { shared, state, account: AccountId::new(clock.now(), clock.random()) }
    }

    impl World {
        fn id(&self) -> ConnectionId {
            self.shared.fresh_id(self.shared.now())
        }

        /// A device that is held here, since `epoch`.
        async fn held(&self, epoch: u64) -> (DeviceId, Arc<Connection>) {
            let now = self.shared.now();
            let settings = serde_json::from_value(serde_json::json!({
                "id": ChannelId::new(now, SystemClock.random()), "account": self.account, "name": "c",
                "protocol": "teltonika", "transport": "tcp", "listen": "127.0.0.1:0",
                "enabled": true, "auto_register": true, "created_at": now,
            }));
            let peer = "127.0.0.1:1".parse().unwrap();
            let settings = Arc::new(settings.unwrap());
            let connection = Arc::new(Connection::new(self.id(), settings, peer, now));
            let device = DeviceId::new(now, SystemClock.random());
            assert!(self.shared.directory.claim(device, &connection).is_none());
            connection.set_epoch(epoch);
            assert!(self.connected(device, connection.id, epoch).await);
            (device, connection)
        }

        async fn connected(&self, device: DeviceId, id: ConnectionId, epoch: u64) -> bool {
            let now = self.shared.now();
            let connected =
                self.state.connected(self.account, device, id, epoch, String::new(), now);
            connected.await.unwrap()
        }

        fn online(&self, device: DeviceId, node: &str, id: ConnectionId) -> Event {
            let params: Params = fieldline_ingest::own_params([
                ("node", node.into()),
                ("connection.id", id.to_string().into()),
                ("connection.epoch", 1_000_000_u64.into()),
            ]);
            let ingest = &self.shared.ingest;
            ingest.new_event(self.account, EventKind::Online, device, params)
        }
    }

    #[tokio::test]
    async fn a_device_whose_event_was_lost_is_found_by_the_check() {
        let world = world();
        let mut all = Vec::new();
        // More than one batch.
        for _ in 0..CHECK_MAX + 20 {
            all.push(world.held(10).await);
        }
        for (number, (device, _)) in all.iter().enumerate() {
            match number % 4 {
                // It is elsewhere; it was, and went from there as well; somebody older was refused.
                0 => assert!(world.connected(*device, world.id(), 11).await),
                1 => {
                    let (id, now) = (world.id(), world.shared.now());
                    let gone = world.state.disconnected(world.account, *device, id, 12, now);
                    assert!(gone.await.unwrap());
                }
                2 => assert!(!world.connected(*device, world.id(), 9).await),
                _ => {}
            }
        }
        world.shared.check_held(None).await;
        for (number, (_, connection)) in all.iter().enumerate() {
            let expected = (number % 4 < 2).then_some(CloseCode::Replaced);
            assert_eq!(connection.closing(), expected, "number {number}");
        }
    }

    #[tokio::test]
    async fn who_has_a_device_is_what_the_state_says() {
        let world = world();
        let (device, connection) = world.held(10).await;
        // It claims to be newer, and is not known to be.
        let other = world.id();
        world.shared.heard(&world.online(device, "there", other)).await;
        assert_eq!(connection.closing(), None);
        assert!(world.connected(device, other, 11).await);
        // One's own events, and those of other devices, say nothing new.
        world.shared.heard(&world.online(device, "here", other)).await;
        let unknown = DeviceId::new(world.shared.now(), SystemClock.random());
        world.shared.heard(&world.online(unknown, "there", other)).await;
        assert_eq!(connection.closing(), None);
        world.shared.heard(&world.online(device, "there", other)).await;
        assert_eq!(connection.closing(), Some(CloseCode::Replaced));
    }
}
