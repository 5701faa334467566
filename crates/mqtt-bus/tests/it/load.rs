//! Load between two nodes, and its books: what was published came once and in order, or was told as lost.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fieldline_contracts::{Bus, Subscription, TopicFilter};
use fieldline_model::DeviceId;
use fieldline_mqtt_bus::MqttBus;
use tokio::task::JoinHandle;

use super::{account, device, message, number};

const DEVICES: u8 = 8;

/// Publishes without pause until told to stop.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Published>,
}

/// What was published.
#[derive(Debug)]
pub(crate) struct Published {
    pub(crate) items: u64,
    /// The longest that one call took.
    pub(crate) longest: Duration,
    /// The most that waited.
    pub(crate) deepest: usize,
}

impl Load {
    /// About 1,600 items a second, of eight devices: what gathers during a fault has room in the rings of subscribers.
    pub(crate) fn start(bus: Arc<MqttBus>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let task = tokio::spawn(async move {
            let mut published = Published { items: 0, longest: Duration::ZERO, deepest: 0 };
            let mut pace = tokio::time::interval(Duration::from_millis(10));
            let mut next = 0_u64;
            while !stopped.load(Ordering::Relaxed) {
                pace.tick().await;
                for n in 0..DEVICES {
                    let device = device(100 + n);
                    let items = (next..next + 2).map(|seq| message(account(1), device, seq));
                    let items = items.collect();
                    let began = Instant::now();
                    bus.publish(account(1), items).await;
                    published.longest = published.longest.max(began.elapsed());
                    published.items += 2;
                }
                published.deepest = published.deepest.max(bus.depth().items);
                next += 2;
            }
            published
        });
        Self { stop, task }
    }

    pub(crate) async fn stop(self) -> Published {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap()
    }
}

/// Keeps the books of a subscriber.
pub(crate) struct Reader {
    received: Arc<AtomicU64>,
    lost: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Reader {
    pub(crate) async fn of(bus: &MqttBus) -> Self {
        Self::reading(bus.subscribe(account(1), TopicFilter::default()).await)
    }

    fn reading(mut items: Box<dyn Subscription>) -> Self {
        let count = || Arc::new(AtomicU64::new(0));
        let (received, lost) = (count(), count());
        let (received_, lost_) = (Arc::clone(&received), Arc::clone(&lost));
        let task = tokio::spawn(async move {
            let mut last: HashMap<DeviceId, u64> = HashMap::new();
            // Items that were told as lost and are not yet found to be missing.
            let mut told = 0_u64;
            while let Some(item) = items.next().await {
                match item {
                    Ok(item) => {
                        let (device, seq) = number(&item);
                        let expected = last.insert(device, seq).map_or(0, |last| last + 1);
                        assert!(seq >= expected, "{device}: {seq} after {expected} was expected");
                        let missing = seq - expected;
                        assert!(
                            missing <= told,
                            "{device}: {missing} missing and {told} told before {seq}"
                        );
                        told -= missing;
                        received_.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(lagged) => {
                        told += lagged.0;
                        lost_.fetch_add(lagged.0, Ordering::Relaxed);
                    }
                }
            }
        });
        Self { received, lost, task }
    }

    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Waits until every item came or was told as lost. Fails if order was broken, or one came twice.
    pub(crate) async fn settle(self, items: u64) -> (u64, u64) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let (received, lost) = (self.received(), self.lost());
            if self.task.is_finished() {
                self.task.await.unwrap();
                panic!("the subscription ended");
            }
            if received + lost == items {
                // Nothing more may come.
                tokio::time::sleep(Duration::from_millis(300)).await;
                assert_eq!((self.received(), self.lost()), (received, lost));
                self.task.abort();
                return (received, lost);
            }
            assert!(
                Instant::now() < deadline && received + lost < items,
                "{received} received and {lost} told as lost of {items}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
