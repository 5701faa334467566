//! `Bus`: live messages, state changes, events, logs and what is between MQTT clients. It makes things prompt;
//! what must not be missed is read from `History`.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use async_trait::async_trait;
use fieldline_model::{AccountId, DeviceId, Event, ParamName, SeriesKind, Stored};
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
use uuid::Uuid;

use crate::clients::{ClientMessage, ClientSessions};

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
    /// What MQTT clients tell each other, and what nodes tell each other of them.
    Client,
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
    /// A message between clients.
    Client(Arc<ClientMessage>),
    /// Sessions of clients.
    Sessions(Arc<ClientSessions>),
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
            Self::Client(_) | Self::Sessions(_) => Topic::Client,
        }
    }

    /// About how many bytes it holds on to.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let of_stored = |all: &[Stored]| {
            all.iter().map(|one| 128 + one.params().content_bytes()).sum::<usize>()
        };
        64 + match self {
            Self::Messages { messages, .. } => of_stored(messages),
            Self::State { params, .. } => params.len() * 16,
            Self::Event(event) => 128 + event.params.content_bytes(),
            Self::Log { lines, .. } => of_stored(lines),
            Self::Client(message) => 128 + message.content_bytes(),
            Self::Sessions(all) => all.sessions.iter().map(|(id, _)| 32 + id.len()).sum(),
        }
    }

    /// The device, channel or other object it is about; nil for what is between clients.
    #[must_use]
    pub fn object(&self) -> Uuid {
        match self {
            Self::Messages { device, .. } | Self::State { device, .. } => device.0,
            Self::Event(event) => event.object,
            Self::Log { object, .. } => *object,
            Self::Client(_) | Self::Sessions(_) => Uuid::nil(),
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

/// The subscriber was too slow, or the bus of a cluster was cut: so many items were dropped for it; 0 where it is not
/// known how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} items were dropped")]
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
/// Each account that is listened to has a ring of at most
/// [`MemoryBus::ITEMS_MAX`] items and [`MemoryBus::BYTES_MAX`] bytes; a
/// subscriber that falls behind by more loses the oldest and is told how many.
#[derive(Default)]
pub struct MemoryBus {
    accounts: RwLock<HashMap<AccountId, Arc<Ring>>>,
}

impl MemoryBus {
    /// Items kept for the slowest subscriber of an account.
    pub const ITEMS_MAX: usize = 16_384;
    /// Bytes of items kept for the slowest subscriber of an account.
    pub const BYTES_MAX: usize = 32 << 20;

    /// A bus without subscribers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Tells every subscriber of an account, in its place among the items, that `count` items never came here; 0 where
    /// some may be missing and nobody knows how many. For a bus whose items come from other processes.
    pub fn missed(&self, account: AccountId, count: u64) {
        self.put(account, |kept| kept.push(Entry::Missed(count)));
    }

    /// Puts into the ring of an account, where it has subscribers.
    fn put(&self, account: AccountId, put: impl FnOnce(&mut Kept)) {
        let accounts = self.accounts.read();
        // No ring means that nobody of this account has ever listened.
        let Some(ring) = accounts.get(&account) else { return };
        let end = {
            let mut kept = ring.kept.lock();
            if kept.subscribers == 0 {
                return;
            }
            put(&mut kept);
            kept.end
        };
        ring.end.send_replace(end);
    }
}

/// What is kept of an account's items, and a sign for those who wait.
struct Ring {
    kept: Mutex<Kept>,
    /// The number of the next item.
    end: watch::Sender<u64>,
}

enum Entry {
    Item(BusItem),
    /// So many items never came.
    Missed(u64),
}

impl Entry {
    /// The items that it stands for.
    const fn weight(&self) -> u64 {
        match self {
            Self::Item(_) => 1,
            Self::Missed(count) => *count,
        }
    }
}

#[derive(Default)]
struct Kept {
    entries: VecDeque<(Entry, usize)>,
    bytes: usize,
    /// The number of the next entry; the oldest kept one's is that less their count.
    end: u64,
    /// Items that all entries so far stood for.
    weight: u64,
    /// Items that the entries stood for which are kept no more.
    weight_gone: u64,
    subscribers: usize,
}

impl Kept {
    fn push(&mut self, entry: Entry) {
        let bytes = match &entry {
            Entry::Item(item) => item.bytes(),
            Entry::Missed(_) => 0,
        };
        self.weight = self.weight.saturating_add(entry.weight());
        self.entries.push_back((entry, bytes));
        self.bytes += bytes;
        self.end += 1;
        // The newest stays, however large it is.
        while self.entries.len() > 1
            && (self.entries.len() > MemoryBus::ITEMS_MAX || self.bytes > MemoryBus::BYTES_MAX)
        {
            if let Some((entry, bytes)) = self.entries.pop_front() {
                self.bytes -= bytes;
                self.weight_gone = self.weight_gone.saturating_add(entry.weight());
            }
        }
    }

    /// Number of the oldest kept entry.
    fn begin(&self) -> u64 {
        self.end - self.entries.len() as u64
    }
}

#[async_trait]
impl Bus for MemoryBus {
    async fn publish(&self, account: AccountId, items: Vec<BusItem>) {
        self.put(account, |kept| {
            items.into_iter().map(Entry::Item).for_each(|item| kept.push(item))
        });
    }

    async fn subscribe(&self, account: AccountId, filter: TopicFilter) -> Box<dyn Subscription> {
        let ring = {
            let mut accounts = self.accounts.write();
            let new = || Arc::new(Ring { kept: Mutex::default(), end: watch::Sender::new(0) });
            Arc::clone(accounts.entry(account).or_insert_with(new))
        };
        let (next, weight) = {
            let mut kept = ring.kept.lock();
            kept.subscribers += 1;
            (kept.end, kept.weight)
        };
        let grown = ring.end.subscribe();
        Box::new(MemorySubscription { ring, grown, next, weight, filter })
    }
}

struct MemorySubscription {
    ring: Arc<Ring>,
    grown: watch::Receiver<u64>,
    /// Number of the next entry to look at.
    next: u64,
    /// Items that all entries before it stood for.
    weight: u64,
    filter: TopicFilter,
}

impl MemorySubscription {
    /// The next item that is wanted among those kept.
    fn take(&mut self) -> Option<Result<BusItem, Lagged>> {
        let kept = self.ring.kept.lock();
        if self.next < kept.begin() {
            let lost = kept.weight_gone.saturating_sub(self.weight);
            (self.next, self.weight) = (kept.begin(), kept.weight_gone);
            return Some(Err(Lagged(lost)));
        }
        let skipped = usize::try_from(self.next - kept.begin()).unwrap_or(usize::MAX);
        for (entry, _) in kept.entries.iter().skip(skipped) {
            self.next += 1;
            self.weight = self.weight.saturating_add(entry.weight());
            match entry {
                Entry::Item(item) if self.filter.wants(item) => return Some(Ok(item.clone())),
                Entry::Item(_) => {}
                Entry::Missed(count) => return Some(Err(Lagged(*count))),
            }
        }
        None
    }
}

#[async_trait]
impl Subscription for MemorySubscription {
    async fn next(&mut self) -> Option<Result<BusItem, Lagged>> {
        loop {
            // Seen before looking, so that what comes meanwhile wakes the wait.
            self.grown.borrow_and_update();
            if let Some(taken) = self.take() {
                return Some(taken);
            }
            self.grown.changed().await.ok()?;
        }
    }
}

impl Drop for MemorySubscription {
    fn drop(&mut self) {
        let mut kept = self.ring.kept.lock();
        kept.subscribers -= 1;
        if kept.subscribers == 0 {
            kept.entries = VecDeque::new();
            kept.bytes = 0;
            kept.weight_gone = kept.weight;
        }
    }
}

#[cfg(test)]
mod tests {
    use fieldline_model::{Cursor, Params, Series, Timestamp, Value};

    use super::*;

    /// A reader that trickles must not hold on to gigabytes of large items.
    #[tokio::test]
    async fn a_slow_reader_holds_on_to_a_bound_of_bytes() {
        let (bus, account) = (MemoryBus::new(), AccountId::from_bytes([1; 16]));
        let mut reader = bus.subscribe(account, TopicFilter::default()).await;
        let device = DeviceId::from_bytes([2; 16]);
        let name = ParamName::new("large").unwrap();
        let params: Params = [(name, Value::from("x".repeat(1 << 20)))].into_iter().collect();
        let at = Timestamp::from_seconds(1);
        let series = Series::messages(account, device);
        let stored = Stored::read_back(series, at, at, params, Cursor::default());
        for _ in 0..100 {
            let messages = Arc::from([stored.clone()]);
            bus.publish(account, vec![BusItem::Messages { device, messages }]).await;
        }
        let lost = reader.next().await.unwrap().unwrap_err();
        assert!((60..75).contains(&lost.0), "{lost}");
        for _ in lost.0..100 {
            reader.next().await.unwrap().unwrap();
        }
    }

    fn log(object: u8) -> BusItem {
        let kind = SeriesKind::DeviceLog;
        BusItem::Log { kind, object: Uuid::from_bytes([object; 16]), lines: Arc::from([]) }
    }

    /// What never came is told between what came before and after it, and counts where a slow reader lost it too.
    #[tokio::test]
    async fn what_never_came_is_told_in_its_place() {
        let (bus, account) = (MemoryBus::new(), AccountId::from_bytes([1; 16]));
        let mut quick = bus.subscribe(account, TopicFilter::default()).await;
        let mut slow = bus.subscribe(account, TopicFilter::default()).await;
        bus.publish(account, vec![log(1)]).await;
        bus.missed(account, 7);
        bus.missed(account, 0);
        bus.publish(account, vec![log(2)]).await;
        assert!(quick.next().await.unwrap().is_ok());
        assert_eq!(quick.next().await.unwrap().unwrap_err(), Lagged(7));
        assert_eq!(quick.next().await.unwrap().unwrap_err(), Lagged(0));
        assert!(quick.next().await.unwrap().is_ok());
        for _ in 0..MemoryBus::ITEMS_MAX {
            bus.publish(account, vec![log(3)]).await;
        }
        assert_eq!(slow.next().await.unwrap().unwrap_err(), Lagged(9));
        assert!(slow.next().await.unwrap().is_ok());
    }
}
