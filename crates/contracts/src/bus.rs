//! `Bus`: live messages, state changes, events and logs. It makes things prompt;
//! what must not be missed is read from `History`.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use fieldline_model::{AccountId, DeviceId, Event, ParamName, SeriesKind, Stored};
use parking_lot::RwLock;
use tokio::sync::broadcast;
use uuid::Uuid;

/// What kind of item is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Topic {
    /// Messages of devices.
    Message,
    /// Changes of last values.
    State,
    /// Events.
    Event,
    /// Log lines of devices and channels.
    Log,
}

/// One published item. Clones are cheap.
#[derive(Clone, Debug)]
pub enum BusItem {
    /// Messages of one device, in order.
    Messages {
        /// The device.
        device: DeviceId,
        /// The messages.
        messages: Arc<[Stored]>,
    },
    /// Last values that changed, by the messages that changed them.
    State {
        /// The device.
        device: DeviceId,
        /// The parameters that changed; their values are in `State`.
        params: Arc<[ParamName]>,
    },
    /// An event.
    Event(Arc<Event>),
    /// Log lines of one object.
    Log {
        /// Whether of a device or a channel.
        kind: SeriesKind,
        /// The device or channel.
        object: Uuid,
        /// The lines.
        lines: Arc<[Stored]>,
    },
}

impl BusItem {
    /// Its topic.
    #[must_use]
    pub const fn topic(&self) -> Topic {
        match self {
            Self::Messages { .. } => Topic::Message,
            Self::State { .. } => Topic::State,
            Self::Event(_) => Topic::Event,
            Self::Log { .. } => Topic::Log,
        }
    }

    /// The device, channel or other object it is about.
    #[must_use]
    pub fn object(&self) -> Uuid {
        match self {
            Self::Messages { device, .. } | Self::State { device, .. } => device.0,
            Self::Event(event) => event.object,
            Self::Log { object, .. } => *object,
        }
    }
}

/// Which items of an account a subscriber wants.
#[derive(Clone, Debug, Default)]
pub struct TopicFilter {
    /// Only these topics; all if empty.
    pub topics: Vec<Topic>,
    /// Only about these objects; all if empty.
    pub objects: Vec<Uuid>,
}

impl TopicFilter {
    /// Whether `item` is wanted.
    #[must_use]
    pub fn wants(&self, item: &BusItem) -> bool {
        (self.topics.is_empty() || self.topics.contains(&item.topic()))
            && (self.objects.is_empty() || self.objects.contains(&item.object()))
    }
}

/// The subscriber was too slow: so many items were dropped for it alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too slow: {0} items were dropped")]
pub struct Lagged(pub u64);

/// A running subscription; dropping it ends it.
#[async_trait]
pub trait Subscription: Send {
    /// The next item, `None` when the bus has closed. Cancel-safe.
    ///
    /// # Errors
    ///
    /// [`Lagged`] where items were dropped; the next call goes on after them.
    async fn next(&mut self) -> Option<Result<BusItem, Lagged>>;
}

/// Publishes to whoever listens now.
#[async_trait]
pub trait Bus: Send + Sync + 'static {
    /// Publishes items of an account, in order. Never waits for a slow subscriber.
    async fn publish(&self, account: AccountId, items: Vec<BusItem>);

    /// Subscribes to items of one account.
    async fn subscribe(&self, account: AccountId, filter: TopicFilter) -> Box<dyn Subscription>;
}

/// A bus within this process.
///
/// Each account has a ring of [`MemoryBus::CAPACITY`] items; a subscriber that
/// falls behind by more loses the oldest and is told how many.
#[derive(Default)]
pub struct MemoryBus {
    accounts: RwLock<HashMap<AccountId, broadcast::Sender<BusItem>>>,
}

impl MemoryBus {
    /// Items kept for the slowest subscriber of an account.
    pub const CAPACITY: usize = 16_384;

    /// A bus without subscribers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

#[async_trait]
impl Bus for MemoryBus {
    async fn publish(&self, account: AccountId, items: Vec<BusItem>) {
        let accounts = self.accounts.read();
        // No ring means that nobody of this account has ever listened.
        let Some(sender) = accounts.get(&account) else { return };
        if sender.receiver_count() == 0 {
            return;
        }
        for item in items {
            // An error says that the last subscriber has just left.
            if sender.send(item).is_err() {
                break;
            }
        }
    }

    async fn subscribe(&self, account: AccountId, filter: TopicFilter) -> Box<dyn Subscription> {
        let receiver = {
            let mut accounts = self.accounts.write();
            accounts
                .entry(account)
                .or_insert_with(|| broadcast::channel(Self::CAPACITY).0)
                .subscribe()
        };
        Box::new(MemorySubscription { receiver, filter })
    }
}

struct MemorySubscription {
    receiver: broadcast::Receiver<BusItem>,
    filter: TopicFilter,
}

#[async_trait]
impl Subscription for MemorySubscription {
    async fn next(&mut self) -> Option<Result<BusItem, Lagged>> {
        loop {
            match self.receiver.recv().await {
                Ok(item) if self.filter.wants(&item) => return Some(Ok(item)),
                Ok(_) => {}
                Err(broadcast::error::RecvError::Lagged(count)) => return Some(Err(Lagged(count))),
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}
