//! What clients of one account retain under `client/`: in the store, where every node sees it and it outlives all of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fieldline_contracts::{ClientStore, Clock, RegistryError, RetainLimits, RetainedMessage};
use fieldline_model::{AccountId, Timestamp};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use crate::link::Message;
use crate::topic::{Target, target};

/// Most messages, and bytes of them, that are stored together.
const BATCH_MESSAGES_MAX: usize = 256;
const BATCH_BYTES_MAX: usize = 1 << 20;
/// Longest that a client waits for a page at a time: what is live has to get its turn.
const PAGE_MAX: Duration = Duration::from_secs(1);

/// Why a message was not retained.
#[derive(Debug)]
pub(crate) enum NotRetained {
    /// The account has as many messages or bytes as it may.
    Full,
    /// It could not be stored, or it is not known.
    Failed(String),
}

type Answer = oneshot::Sender<Result<(), NotRetained>>;

/// The retained messages of one account.
pub(crate) struct Retained {
    account: AccountId,
    store: Arc<dyn ClientStore>,
    clock: Arc<dyn Clock>,
    limits: RetainLimits,
    /// What waits to be stored: at most one message of each session, which waits for it.
    waiting: Mutex<Vec<(RetainedMessage, Answer)>>,
    /// Held while something is stored: an account has one write under way, which takes all that waits, so that it
    /// cannot keep the store's connections from others.
    writing: tokio::sync::Mutex<()>,
    /// Whether the store failed when last asked: an outage is logged once.
    fails: AtomicBool,
}

impl Retained {
    pub(crate) fn new(
        account: AccountId,
        store: Arc<dyn ClientStore>,
        clock: Arc<dyn Clock>,
        limits: RetainLimits,
    ) -> Self {
        let (waiting, writing) = (Mutex::default(), tokio::sync::Mutex::default());
        let fails = AtomicBool::new(false);
        Self { account, store, clock, limits, waiting, writing, fails }
    }

    /// Keeps a retained message, or forgets the topic's if the payload is empty. When this returns it is durable.
    pub(crate) async fn put(&self, message: &Message) -> Result<(), NotRetained> {
        let now = self.clock.now();
        let left = message.expires_at.map(|at| at.saturating_duration_since(Instant::now()));
        let kept = RetainedMessage {
            topic: Arc::clone(&message.topic),
            payload: message.payload.clone(),
            props: message.props.clone(),
            at_least_once: message.qos > 0,
            expires_at: left.map(|left| {
                let micros = i64::try_from(left.as_micros()).unwrap_or(i64::MAX);
                Timestamp::from_micros(now.as_micros().saturating_add(micros))
            }),
        };
        let (answer, mut answered) = oneshot::channel();
        self.waiting.lock().push((kept, answer));
        loop {
            let turn = tokio::select! {
                biased;
                done = &mut answered => {
                    // Who stored it went in the midst.
                    let unknown = || NotRetained::Failed("it was not finished".to_owned());
                    return done.unwrap_or_else(|_| Err(unknown()));
                }
                turn = self.writing.lock() => turn,
            };
            self.write().await;
            drop(turn);
        }
    }

    /// Stores what waits, as much as goes together.
    async fn write(&self) {
        let batch: Vec<(RetainedMessage, Answer)> = {
            let mut waiting = self.waiting.lock();
            let mut bytes = 0;
            let fits = |(message, _): &&(RetainedMessage, Answer)| {
                bytes += message.bytes();
                bytes <= BATCH_BYTES_MAX
            };
            // One at least, however large.
            let count = waiting.iter().take(BATCH_MESSAGES_MAX).take_while(fits).count().max(1);
            let count = count.min(waiting.len());
            waiting.drain(..count).collect()
        };
        if batch.is_empty() {
            return;
        }
        let messages = batch.iter().map(|(message, _)| message.clone()).collect();
        let stored = self.store.retain(self.account, messages, self.limits, self.clock.now()).await;
        let mut taken = match self.told(stored) {
            Ok(taken) => taken.into_iter(),
            Err(error) => {
                for (_, answer) in batch {
                    // Its session may have ended meanwhile.
                    drop(answer.send(Err(NotRetained::Failed(error.to_string()))));
                }
                return;
            }
        };
        for (_, answer) in batch {
            let taken = taken.next().unwrap_or(false);
            drop(answer.send(if taken { Ok(()) } else { Err(NotRetained::Full) }));
        }
    }

    /// What the store answered; that it is away is logged once an outage.
    fn told<T>(&self, answer: Result<T, RegistryError>) -> Result<T, RegistryError> {
        match &answer {
            Ok(_) => {
                // Read first: the common case writes nothing that is shared.
                if self.fails.load(Ordering::Relaxed) && self.fails.swap(false, Ordering::AcqRel) {
                    tracing::info!(account = %self.account, "what clients retain can be stored and read again");
                }
            }
            Err(error) => {
                if !self.fails.swap(true, Ordering::AcqRel) {
                    tracing::warn!(account = %self.account, %error, "what clients retain cannot be stored or read now");
                }
            }
        }
        answer
    }

    /// Up to `limit` messages whose topics begin with `prefix`, after topic `after`; and the last topic that was looked
    /// at, if there may be more. What has expired is left out.
    pub(crate) async fn page(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<(Vec<Message>, Option<Arc<str>>), RegistryError> {
        let found =
            timeout(PAGE_MAX, self.store.retained(self.account, prefix, after, limit)).await;
        let slow = || RegistryError::Unavailable("it is slow".to_owned());
        let found = self.told(found.unwrap_or_else(|_| Err(slow())))?;
        let last = found.last().map(|last| Arc::clone(&last.topic));
        let more = last.filter(|_| found.len() >= limit);
        let now = self.clock.now();
        let messages = found.into_iter().filter_map(|kept| message(kept, now));
        Ok((messages.collect(), more))
    }
}

fn message(kept: RetainedMessage, now: Timestamp) -> Option<Message> {
    let expires_at = match kept.expires_at {
        None => None,
        Some(at) if at <= now => return None,
        Some(at) => {
            let left = at.as_micros().saturating_sub(now.as_micros()).unsigned_abs();
            let most = u64::from(u32::MAX) * 1_000_000;
            Some(Instant::now() + Duration::from_micros(left.min(most)))
        }
    };
    let object = match target(&kept.topic) {
        Ok(Target::Client { object }) => object,
        // Nothing else is retained by clients.
        _ => return None,
    };
    Some(Message {
        topic: kept.topic,
        payload: kept.payload,
        props: kept.props,
        expires_at,
        qos: u8::from(kept.at_least_once),
        retain: true,
        publisher: 0,
        object,
    })
}

/// What the topics of messages begin with that clients retained and `filter` matches; and whether it is the whole topic.
pub(crate) fn client_prefix(filter: &str) -> (&str, bool) {
    match filter.find(['+', '#']) {
        None => (filter, true),
        // The first level may be wild: then only `client` is of clients.
        Some(0) => ("client/", false),
        Some(at) => (filter.get(..at).unwrap_or(filter), false),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use fieldline_contracts::{MemoryClientStore, TestClock};

    use super::*;

    fn retained(limits: RetainLimits) -> (Arc<TestClock>, Arc<Retained>) {
        let clock = Arc::new(TestClock::at(Timestamp::from_seconds(1_800_000_000)));
        let store = Arc::new(MemoryClientStore::new());
        let account = AccountId::from_bytes([1; 16]);
        (clock.clone(), Arc::new(Retained::new(account, store, clock, limits)))
    }

    fn said(topic: &str, payload: &str, expires_at: Option<Instant>) -> Message {
        Message {
            topic: topic.into(),
            payload: Bytes::copy_from_slice(payload.as_bytes()),
            props: Bytes::new(),
            expires_at,
            qos: 1,
            retain: true,
            publisher: 1,
            object: None,
        }
    }

    #[test]
    fn prefixes_of_filters() {
        for (filter, expected) in [
            ("client/a/b", ("client/a/b", true)),
            ("client/#", ("client/", false)),
            ("client/a/+/c", ("client/a/", false)),
            ("#", ("client/", false)),
            ("+/a", ("client/", false)),
        ] {
            assert_eq!(client_prefix(filter), expected, "{filter}");
        }
    }

    /// Many at once are stored together, each is answered, and the bound is kept.
    #[tokio::test]
    async fn many_at_once_are_each_answered() {
        let (_, retained) = retained(RetainLimits { messages: 600, bytes: 1 << 20 });
        let mut putting = tokio::task::JoinSet::new();
        for n in 0..1_000 {
            let retained = Arc::clone(&retained);
            putting.spawn(async move {
                retained.put(&said(&format!("client/{n:04}"), "x", None)).await.is_ok()
            });
        }
        let taken = putting.join_all().await.into_iter().filter(|taken| *taken).count();
        assert_eq!(taken, 600);
        let (page, more) = retained.page("client/", None, 500).await.unwrap();
        assert_eq!((page.len(), more.is_some()), (500, true));
        let (page, more) = retained.page("client/", more.as_deref(), 500).await.unwrap();
        assert_eq!((page.len(), more), (100, None));
    }

    #[tokio::test(start_paused = true)]
    async fn what_expired_is_not_told() {
        let (clock, retained) = retained(RetainLimits { messages: 10, bytes: 1_000 });
        let at = Instant::now() + Duration::from_secs(10);
        retained.put(&said("client/a", "x", Some(at))).await.unwrap();
        clock.advance_micros(9_000_000);
        tokio::time::advance(Duration::from_secs(9)).await;
        let (page, _) = retained.page("client/a", None, 1).await.unwrap();
        assert_eq!(page.first().and_then(|message| message.expires_at), Some(at));
        clock.advance_micros(1_000_000);
        assert!(retained.page("client/a", None, 1).await.unwrap().0.is_empty());
    }
}
