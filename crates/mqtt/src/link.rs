//! What stands between the routing table and one connection: a bounded queue.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::task::{Context, Waker};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::time::Instant;
use uuid::Uuid;

use crate::codec::Reason;

/// A message, encoded once for every client that gets it.
#[derive(Debug)]
pub(crate) struct Message {
    /// Where.
    pub(crate) topic: Arc<str>,
    /// What.
    pub(crate) payload: Bytes,
    /// MQTT 5 properties of its publisher, encoded.
    pub(crate) props: Bytes,
    /// When it is worth nothing any more.
    pub(crate) expires_at: Option<Instant>,
    /// Highest QoS it is delivered with, 0 or 1.
    pub(crate) qos: u8,
    /// Whether it was published as a retained one.
    pub(crate) retain: bool,
    /// The session that published it; 0 for the server.
    pub(crate) publisher: u64,
    /// The device or other object it is about: clients restricted to devices
    /// get it only if it is one of theirs.
    pub(crate) object: Option<Uuid>,
}

impl Message {
    /// What it counts for in a queue, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.topic.len() + self.payload.len() + self.props.len()
    }
}

/// What the client knows the matching subscriptions by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Identifiers {
    /// They have none.
    #[default]
    None,
    /// One.
    One(u32),
    /// Several, because the filters overlap.
    Many(Arc<[u32]>),
}

impl Identifiers {
    /// The numbers.
    pub(crate) fn as_slice(&self) -> &[u32] {
        match self {
            Self::None => &[],
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

/// A message on its way to one client.
#[derive(Clone, Debug)]
pub(crate) struct Delivery {
    /// The message.
    pub(crate) message: Arc<Message>,
    /// QoS for this client, 0 or 1.
    pub(crate) qos: u8,
    /// The retain flag for this client.
    pub(crate) retain: bool,
    /// For MQTT 5.
    pub(crate) identifiers: Identifiers,
}

/// What became of a message that was pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pushed {
    /// It waits.
    Queued,
    /// The queue is full and the message is of QoS 0: it is gone, for this client alone.
    Dropped,
    /// The queue is full and the message is of QoS 1: the connection is told to end.
    Overflowed,
}

/// Bounds of a queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueLimits {
    /// Most messages.
    pub(crate) messages_max: usize,
    /// Most bytes of topics and payloads.
    pub(crate) bytes_max: usize,
}

#[derive(Default)]
struct Queue {
    items: VecDeque<Delivery>,
    bytes: usize,
}

/// One connection, as the rest of the server sees it.
#[derive(Default)]
pub(crate) struct Link {
    queue: Mutex<Queue>,
    waker: AtomicWaker,
    /// Number of the reason to end with; 0 to go on.
    kicked: AtomicU8,
    /// Whether last values must be sent again, because some were lost.
    stale: AtomicBool,
}

impl Link {
    /// Queues a message. Never waits.
    pub(crate) fn push(&self, delivery: Delivery, limits: QueueLimits) -> Pushed {
        let bytes = delivery.message.bytes();
        let mut queue = self.queue.lock();
        let full = queue.items.len() >= limits.messages_max
            || (queue.bytes + bytes > limits.bytes_max && !queue.items.is_empty());
        if full {
            drop(queue);
            if delivery.qos == 0 {
                return Pushed::Dropped;
            }
            self.kick(Reason::QuotaExceeded);
            return Pushed::Overflowed;
        }
        queue.bytes += bytes;
        queue.items.push_back(delivery);
        drop(queue);
        self.waker.wake();
        Pushed::Queued
    }

    /// Puts `deliveries` before what was queued after the first `mark` items.
    /// The bound does not count: the caller is the connection itself, and asks
    /// for a page only while little waits.
    pub(crate) fn insert(&self, mark: usize, deliveries: Vec<Delivery>) {
        let mut queue = self.queue.lock();
        queue.bytes += deliveries.iter().map(|d| d.message.bytes()).sum::<usize>();
        let mark = mark.min(queue.items.len());
        let later = queue.items.split_off(mark);
        queue.items.extend(deliveries);
        queue.items.extend(later);
    }

    /// The next message, if `takes` agrees to it.
    pub(crate) fn pop_if(&self, takes: impl FnOnce(&Delivery) -> bool) -> Option<Delivery> {
        let mut queue = self.queue.lock();
        if !takes(queue.items.front()?) {
            return None;
        }
        let delivery = queue.items.pop_front()?;
        queue.bytes = queue.bytes.saturating_sub(delivery.message.bytes());
        if queue.items.is_empty() {
            // An idle session holds no memory for what once waited.
            queue.items = VecDeque::new();
            queue.bytes = 0;
        }
        Some(delivery)
    }

    /// QoS of the next message, if one waits.
    pub(crate) fn front_qos(&self) -> Option<u8> {
        self.queue.lock().items.front().map(|d| d.qos)
    }

    /// How many messages wait.
    pub(crate) fn len(&self) -> usize {
        self.queue.lock().items.len()
    }

    /// Tells the connection to end. The first reason stays.
    pub(crate) fn kick(&self, reason: Reason) {
        let first =
            self.kicked.compare_exchange(0, reason.number(), Ordering::AcqRel, Ordering::Acquire);
        if first.is_ok() {
            self.waker.wake();
        }
    }

    /// Why the connection is to end, if it is.
    pub(crate) fn kicked(&self) -> Option<Reason> {
        let number = self.kicked.load(Ordering::Acquire);
        if number == 0 {
            return None;
        }
        Some(
            Reason::ALL
                .iter()
                .copied()
                .find(|r| r.number() == number)
                .unwrap_or(Reason::Unspecified),
        )
    }

    /// Whether the connection is told to end, or to send last values again.
    pub(crate) fn is_signalled(&self) -> bool {
        self.kicked.load(Ordering::Acquire) != 0 || self.stale.load(Ordering::Acquire)
    }

    /// Asks the connection to send last values again.
    pub(crate) fn mark_stale(&self) {
        self.stale.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Whether last values are to be sent again; asked once for each time.
    pub(crate) fn take_stale(&self) -> bool {
        self.stale.swap(false, Ordering::AcqRel)
    }

    /// Registers for the next change. Look at the queue after this, not before.
    pub(crate) fn register(&self, context: &Context<'_>) {
        let waker: &Waker = context.waker();
        self.waker.register(waker);
    }
}
