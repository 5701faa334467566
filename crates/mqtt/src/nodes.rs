//! Several nodes, and clients that must not notice.
//!
//! What a client says to others goes over the bus to every node that has clients of its account. Of several sessions of one
//! client id the newest stays, wherever it is: each has a number that `State` gives, which orders them whatever the clocks
//! of the nodes say, and each is told to the other nodes, which end what is older and answer with what is newer. Nothing is
//! registered anywhere, so a node that died leaves nothing behind that could be in the way of a client.
//!
//! While `State` is away, numbers are the time: then clocks decide between two connections of one moment. While the bus
//! is away, other nodes hear of a session once it is back; whoever missed something tells all that it has again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fieldline_contracts::clients::CLIENT_SESSIONS_MAX;
use fieldline_contracts::{BusItem, ClientMessage, ClientSessions, Clock, State};
use fieldline_model::Timestamp;
use tokio::time::Instant;

use crate::fields::are_forwarded;
use crate::link::Message;
use crate::topic::of_another_node;

/// This node among others.
pub(crate) struct Nodes {
    /// This run of this service.
    origin: u64,
    clock: Arc<dyn Clock>,
    state: Arc<dyn State>,
    /// The highest number of a session that was met.
    met: AtomicU64,
}

impl Nodes {
    pub(crate) fn new(clock: Arc<dyn Clock>, state: Arc<dyn State>) -> Self {
        let [a, b, c, d, e, f, g, h, ..] = clock.random();
        let origin = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
        Self { origin, clock, state, met: AtomicU64::new(0) }
    }

    /// Names this run of this service.
    pub(crate) const fn origin(&self) -> u64 {
        self.origin
    }

    /// The number of a session that begins now: above those of all that began before.
    pub(crate) async fn number(&self) -> u64 {
        let now = u64::try_from(self.clock.now().as_micros()).unwrap_or(0);
        let floor = self.met.load(Ordering::Acquire).max(now);
        let number = match self.state.ticket(floor).await {
            Ok(number) => number,
            Err(error) => {
                tracing::debug!(%error, "sessions are ordered by the clock");
                floor.saturating_add(1)
            }
        };
        self.meet(number);
        number
    }

    /// Takes note of a number that another node gave.
    pub(crate) fn meet(&self, number: u64) {
        self.met.fetch_max(number, Ordering::AcqRel);
    }

    /// What the other nodes are told of sessions here.
    pub(crate) fn sessions(&self, sessions: &[(Arc<str>, u64)]) -> Vec<BusItem> {
        let tell = |part: &[(Arc<str>, u64)]| {
            let told = ClientSessions { origin: self.origin, sessions: part.to_vec() };
            BusItem::Sessions(Arc::new(told))
        };
        sessions.chunks(CLIENT_SESSIONS_MAX).map(tell).collect()
    }

    /// A message as the other nodes get it.
    pub(crate) fn outgoing(&self, message: &Message) -> BusItem {
        let left = message.expires_at.map(|at| at.saturating_duration_since(Instant::now()));
        let expires_at = left.map(|left| {
            let micros = i64::try_from(left.as_micros()).unwrap_or(i64::MAX);
            Timestamp::from_micros(self.clock.now().as_micros().saturating_add(micros))
        });
        BusItem::Client(Arc::new(ClientMessage {
            origin: self.origin,
            topic: Arc::clone(&message.topic),
            payload: message.payload.clone(),
            props: message.props.clone(),
            at_least_once: message.qos > 0,
            retain: message.retain,
            expires_at,
        }))
    }

    /// A message of another node; `None` if it is our own or is none that clients may be sent.
    pub(crate) fn incoming(&self, told: &ClientMessage) -> Option<Message> {
        if told.origin == self.origin || !are_forwarded(&told.props) {
            return None;
        }
        let object = of_another_node(&told.topic)?;
        let expires_at = told.expires_at.map(|at| {
            let left = at.as_micros().saturating_sub(self.clock.now().as_micros()).max(0);
            let left = std::time::Duration::from_micros(left.unsigned_abs());
            Instant::now() + left.min(EXPIRY_MAX)
        });
        Some(Message {
            topic: Arc::clone(&told.topic),
            payload: told.payload.clone(),
            props: told.props.clone(),
            expires_at,
            qos: u8::from(told.at_least_once),
            retain: told.retain,
            publisher: 0,
            object,
        })
    }
}

/// Longest that MQTT can say that a message is worth something.
const EXPIRY_MAX: std::time::Duration = std::time::Duration::from_secs(u32::MAX as u64);

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use fieldline_contracts::{MemoryState, TestClock};
    use proptest::prelude::*;

    use super::*;

    fn nodes() -> (Arc<TestClock>, Nodes, Nodes) {
        let clock = Arc::new(TestClock::at(Timestamp::from_seconds(1_800_000_000)));
        let state = Arc::new(MemoryState::new());
        let node = || Nodes::new(clock.clone(), state.clone());
        let (one, two) = (node(), node());
        (clock, one, two)
    }

    fn message(expires_at: Option<Instant>) -> Message {
        Message {
            topic: "client/01932f6e-8f7a-7cc0-98c4-dc0c0c07398f/x".into(),
            payload: Bytes::from_static(b"payload"),
            // A user property.
            props: Bytes::from_static(&[38, 0, 1, b'a', 0, 1, b'b']),
            expires_at,
            qos: 1,
            retain: true,
            publisher: 7,
            object: None,
        }
    }

    fn told(item: BusItem) -> ClientMessage {
        let BusItem::Client(told) = item else { panic!("{item:?}") };
        Arc::unwrap_or_clone(told)
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_arrives_as_it_left_and_not_at_its_sender() {
        let (clock, one, two) = nodes();
        let expires_at = Instant::now() + Duration::from_secs(10);
        let sent = message(Some(expires_at));
        let sent = told(one.outgoing(&sent));
        assert!(one.incoming(&sent).is_none());
        // Four seconds on the way.
        clock.advance_micros(4_000_000);
        tokio::time::advance(Duration::from_secs(4)).await;
        let came = two.incoming(&sent).unwrap();
        let before = message(None);
        assert_eq!(
            (&came.topic, &came.payload, &came.props, came.qos, came.retain, came.publisher),
            (&before.topic, &before.payload, &before.props, 1, true, 0)
        );
        assert!(came.object.is_some(), "those that are restricted to devices get only theirs");
        assert_eq!(came.expires_at, Some(expires_at));
    }

    #[tokio::test]
    async fn nothing_else_is_taken_from_another_node() {
        let (_, one, two) = nodes();
        let good = told(one.outgoing(&message(None)));
        assert!(two.incoming(&good).is_some());
        for topic in ["message/x", "state/x/y", "client/#", "client", "ingest/a", "$SYS/x"] {
            assert!(two.incoming(&ClientMessage { topic: topic.into(), ..good.clone() }).is_none());
        }
        // A session expiry, half a property, an alias.
        for props in [&[17, 0, 0, 0, 1][..], &[38, 0, 1], &[35, 0, 1], &[9, 255, 255, 1]] {
            let props = Bytes::copy_from_slice(props);
            assert!(two.incoming(&ClientMessage { props, ..good.clone() }).is_none());
        }
        let gone = Some(Timestamp::MIN);
        let come = two.incoming(&ClientMessage { expires_at: gone, ..good.clone() }).unwrap();
        assert!(come.expires_at.unwrap() <= Instant::now());
        let never = Some(Timestamp::from_micros(i64::MAX));
        assert!(two.incoming(&ClientMessage { expires_at: never, ..good }).is_some());
    }

    #[tokio::test]
    async fn numbers_grow_over_nodes_and_outages() {
        let (clock, one, two) = nodes();
        let first = one.number().await;
        assert!(two.number().await > first);
        // By the clock alone, as while the state is away.
        let far = first + 60_000_000;
        two.meet(far);
        assert!(two.number().await > far);
        assert!(one.number().await > far, "one node's clock does not matter to another");
        clock.advance_micros(-3_600_000_000);
        assert!(one.number().await > far);
    }

    proptest! {
        #[test]
        fn any_properties_are_judged(props: Vec<u8>) {
            let (_, one, two) = nodes();
            let told = told(one.outgoing(&message(None)));
            let judged = two.incoming(&ClientMessage { props: props.clone().into(), ..told });
            prop_assert_eq!(judged.is_some(), are_forwarded(&props.into()));
        }
    }
}
