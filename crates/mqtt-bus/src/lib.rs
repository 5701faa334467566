//! `Bus` over an external MQTT 5 broker: what one node of a cluster publishes reaches the subscribers of all.
//!
//! - Items go to `{prefix}/{account}/{kind}/{object}`, those of one object together, encoded as in [`encoding`].
//! - One connection a process, quality of service 1. What is not acknowledged is sent again, in order, on the next connection.
//!   Each item has a number among those of its publisher for its account, so that whoever hears it drops what comes twice and
//!   sees what never came: items of a device never overtake each other, and come once or are told as `Lagged`.
//! - This process listens at the broker to the accounts that it has subscribers of. They are served by a [`MemoryBus`], each at
//!   its own pace. What the process publishes itself reaches them at once, without the broker, be it there or not.
//! - [`MqttBus`] never waits to publish. While the broker is away at most [`MqttBusConfig::queue_items_max`] items and
//!   [`MqttBusConfig::queue_bytes_max`] bytes wait; of more, the oldest of the account that has most are dropped and counted, and
//!   subscribers elsewhere are told `Lagged` in their place. Accounts take turns at being sent.
//! - Whoever subscribes while the broker is away is told `Lagged(0)` once it is listened to there, and so is everybody after the
//!   broker has forgotten its subscribers: items may be missing, and nobody knows how many. So it is while a node of a version
//!   with another encoding publishes.
//! - A device that moves to another node while its first one cannot reach the broker may have the last items of that one heard after
//!   those of the second: order is that of a device *at a node*. Who needs more has the cursors of messages, and history.
//!
//! What the broker must allow is a user that reads and writes `{prefix}/#`. With mosquitto, `max_queued_messages` (1,000 unless
//! told otherwise) is how far a node may fall behind before the broker drops for it; `max_inflight_messages` bounds the speed.
//!
//! The packets are those of `rumqttc`; its event loop is not used, since it puts what it sends again in the order of packet ids,
//! drops it where the broker lost the session, flushes after every packet, and takes `ring` for TLS. Start reading at
//! [`MqttBus::connect`], then `session.rs`. It may import `fieldline-contracts`, `fieldline-model` and nothing else of the workspace,
//! and alone imports `rumqttc`.

mod config;
pub mod encoding;
mod error;
mod examine;
mod heard;
mod interests;
mod metrics;
mod queue;
mod session;
mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use fieldline_contracts::{Bus, BusItem, Clock, Lagged, MemoryBus, Subscription, TopicFilter};
use fieldline_model::{AccountId, Timestamp};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::warn;

pub use config::MqttBusConfig;
pub use error::ConnectError;
pub use examine::examine;

use config::Address;
use interests::Interests;
use metrics::Metrics;
use queue::Queue;
use session::Session;
use wire::{Opened, Target};

/// The broker is away: what other nodes publish does not come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Away {
    /// Since when.
    pub since: Timestamp,
    /// Why, in words.
    pub reason: String,
}

/// How it stands with the broker.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Set while it is away.
    pub away: Option<Away>,
    /// What it refuses although it is there, and how to mend that.
    pub refused: Option<String>,
}

/// What waits to be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Depth {
    /// Items that wait.
    pub items: usize,
    /// Their bytes.
    pub bytes: usize,
    /// Items that were sent and not acknowledged yet.
    pub sent: u64,
    /// Items that were dropped since the start because too many waited.
    pub dropped: u64,
}

pub(crate) struct Shared {
    prefix: String,
    /// This run of this process.
    publisher: u64,
    queue: Queue,
    interests: Interests,
    memory: MemoryBus,
    link: watch::Sender<Link>,
    /// Whether [`Link::refused`] is set.
    refuses: AtomicBool,
    metrics: Metrics,
}

impl Shared {
    /// The broker refused something.
    fn refused(&self, words: String) {
        if !self.refuses.swap(true, Ordering::AcqRel) {
            warn!(words, "the broker refuses");
        }
        self.link.send_modify(|link| link.refused = Some(words));
    }

    /// The broker took something.
    fn accepted(&self) {
        if self.refuses.load(Ordering::Relaxed) && self.refuses.swap(false, Ordering::AcqRel) {
            self.link.send_modify(|link| link.refused = None);
        }
    }
}

/// A bus over an external broker. Its task runs on the runtime that it was made on; its methods work from any. Dropping it ends
/// the connection, [`MqttBus::close`] sends first what waits.
pub struct MqttBus {
    shared: Arc<Shared>,
    subscribe_wait: Duration,
    stop: CancellationToken,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for MqttBus {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl MqttBus {
    /// Connects, at most for twice [`MqttBusConfig::silence_max`]. From then on it keeps itself connected.
    ///
    /// # Errors
    ///
    /// [`ConnectError`] says what is wrong and how to mend it.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub async fn connect(
        config: MqttBusConfig,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, ConnectError> {
        let target = Self::target(&config)?;
        let opened = target.open(true).await?;
        Ok(Self::with(config, clock, target, Some(opened)))
    }

    /// Begins without the broker, which may come later: for a node that starts while it is away.
    ///
    /// # Errors
    ///
    /// [`ConnectError::Settings`].
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn start(config: MqttBusConfig, clock: Arc<dyn Clock>) -> Result<Self, ConnectError> {
        let target = Self::target(&config)?;
        Ok(Self::with(config, clock, target, None))
    }

    pub(crate) fn target(config: &MqttBusConfig) -> Result<Target, ConnectError> {
        config.validate().map_err(|problems| ConnectError::Settings(problems.join("; ")))?;
        let address = Address::of(&config.url).map_err(ConnectError::Settings)?;
        let tls = config::tls(config, &address)?;
        // 23 letters and digits are what every broker must take.
        let client_id = format!("fieldline{:014x}", rand::random::<u64>() >> 8);
        Ok(Target { address, tls, client_id, silence_max: config.silence_max })
    }

    fn with(
        config: MqttBusConfig,
        clock: Arc<dyn Clock>,
        target: Target,
        opened: Option<Opened>,
    ) -> Self {
        let (publisher, metrics) = (rand::random(), Metrics::new());
        let reason = format!("the MQTT broker at {} is not connected yet", target.address);
        let away = opened.is_none().then(|| Away { since: clock.now(), reason });
        let (items, bytes) = (config.queue_items_max, config.queue_bytes_max);
        let shared = Arc::new(Shared {
            prefix: config.prefix,
            publisher,
            queue: Queue::new(items, bytes, publisher, metrics.clone()),
            interests: Interests::default(),
            memory: MemoryBus::new(),
            link: watch::Sender::new(Link { away, refused: None }),
            refuses: AtomicBool::new(false),
            metrics,
        });
        let stop = CancellationToken::new();
        let session = Session::new(Arc::clone(&shared), target, clock);
        let task = tokio::spawn(session.run(opened, stop.clone()));
        let subscribe_wait = config.subscribe_wait;
        Self { shared, subscribe_wait, stop, task: Mutex::new(Some(task)) }
    }

    /// How it stands with the broker; changes are seen at once.
    #[must_use]
    pub fn link(&self) -> watch::Receiver<Link> {
        self.shared.link.subscribe()
    }

    /// What keeps items from going between the nodes, in words with their remedy; empty when nothing does.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let Link { away, refused } = self.shared.link.borrow().clone();
        let away = away.map(|Away { since, reason }| format!("{reason} (away since {since})"));
        away.into_iter().chain(refused).collect()
    }

    /// What waits to be sent.
    #[must_use]
    pub fn depth(&self) -> Depth {
        self.shared.queue.depth()
    }

    /// Items that the broker has not acknowledged.
    fn unsent(&self) -> u64 {
        let Depth { items, sent, .. } = self.depth();
        items as u64 + sent
    }

    /// Sends what waits, for `most` at longest, and ends the connection. Returns the items that were left. Subscriptions stay
    /// open and hear of this process alone. Cancel-safe.
    pub async fn close(&self, most: Duration) -> u64 {
        let sent = async {
            while self.unsent() > 0 && !self.stop.is_cancelled() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        // What was left is counted below.
        tokio::time::timeout(most, sent).await.unwrap_or_default();
        let left = self.unsent();
        self.stop.cancel();
        let task = self.task.lock().take();
        if let Some(task) = task
            && let Err(error) = task.await
        {
            warn!(%error, "the task of the bus ended badly");
        }
        left
    }
}

#[async_trait]
impl Bus for MqttBus {
    /// Encodes the items, hands them to the subscribers of this process, and leaves them to be sent. It waits for nobody.
    async fn publish(&self, account: AccountId, items: Vec<BusItem>) {
        let batches = encoding::encode(account, &items);
        self.shared.memory.publish(account, items).await;
        self.shared.queue.push(account, batches);
    }

    /// Returns when the broker has confirmed, or after [`MqttBusConfig::subscribe_wait`], or at once while it is away. In the
    /// latter two cases the subscriber is told `Lagged(0)` when it has. Cancel-safe.
    async fn subscribe(&self, account: AccountId, filter: TopicFilter) -> Box<dyn Subscription> {
        let inner = self.shared.memory.subscribe(account, filter).await;
        let mut confirmed = self.shared.interests.join(account);
        let subscription = MqttSubscription { inner, shared: Arc::clone(&self.shared), account };
        let mut link = self.shared.link.subscribe();
        tokio::select! {
            // An error says that the bus is gone: there is nothing to wait for.
            confirmed = async { confirmed.wait_for(|confirmed| *confirmed).await.is_ok() } => {
                if confirmed {
                    return Box::new(subscription);
                }
            }
            _away = async { link.wait_for(|link| link.away.is_some()).await.is_ok() } => {}
            () = tokio::time::sleep(self.subscribe_wait) => {}
        }
        self.shared.interests.owe(account);
        Box::new(subscription)
    }
}

struct MqttSubscription {
    inner: Box<dyn Subscription>,
    shared: Arc<Shared>,
    account: AccountId,
}

impl Drop for MqttSubscription {
    fn drop(&mut self) {
        self.shared.interests.leave(self.account);
    }
}

#[async_trait]
impl Subscription for MqttSubscription {
    async fn next(&mut self) -> Option<Result<BusItem, Lagged>> {
        self.inner.next().await
    }
}
