use fieldline_model::{Decimal, Value};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const ACCOUNT: AccountId = AccountId::from_bytes([7; 16]);
const KINDS: [Kind; 6] =
    [Kind::Message, Kind::State, Kind::Event, Kind::Log, Kind::Client, Kind::Mark];

/// The codec has its own properties: here a few of each kind are enough.
fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::Int),
        any::<u64>().prop_map(Value::from),
        (any::<i64>(), 0..=Decimal::SCALE_MAX)
            .prop_map(|(mantissa, scale)| Value::Decimal(Decimal::new(mantissa, scale).unwrap())),
        any::<f64>().prop_filter_map("finite", Value::float),
        ".{0,40}".prop_map(Value::from),
        vec(any::<u8>(), 0..40).prop_map(|bytes| Value::from(bytes.as_slice())),
        any::<i64>().prop_map(|n| Value::Json(Arc::new(serde_json::json!({"a": [n]})))),
    ]
}

fn name() -> impl Strategy<Value = ParamName> {
    // Few names, so that messages repeat them.
    prop_oneof!["[a-d]", "[a-z.]{1,20}", "[^\\p{Cc}]{1,20}"]
        .prop_filter_map("a name", |text| ParamName::new(text).ok())
}

fn params() -> impl Strategy<Value = Params> {
    vec((name(), value()), 0..8).prop_map(|all| all.into_iter().collect())
}

fn series(own: Series) -> impl Strategy<Value = Series> {
    let other =
        (any::<[u8; 16]>(), 0_u8..4, any::<[u8; 16]>()).prop_map(|(account, kind, object)| {
            Series {
                account: AccountId::from_bytes(account),
                kind: SeriesKind::from_u8(kind).unwrap(),
                object: Uuid::from_bytes(object),
            }
        });
    prop_oneof![9 => Just(own), 1 => other]
}

fn stored(own: Series) -> impl Strategy<Value = Stored> {
    (series(own), any::<i64>(), any::<i64>(), params(), any::<u16>(), any::<u64>()).prop_map(
        |(series, timestamp, received, params, shard, seq)| {
            let (timestamp, received) =
                (Timestamp::from_micros(timestamp), Timestamp::from_micros(received));
            Stored::read_back(series, timestamp, received, params, Cursor { shard, seq })
        },
    )
}

fn item() -> impl Strategy<Value = BusItem> {
    // Few objects, so that neighbours share them.
    (0_u8..3).prop_map(|n| Uuid::from_bytes([n; 16])).prop_flat_map(|object| {
        let device = DeviceId(object);
        let kind = SeriesKind::DeviceLog;
        let (messages, log) =
            (Series::messages(ACCOUNT, device), Series { account: ACCOUNT, kind, object });
        prop_oneof![
            vec(stored(messages), 0..4)
                .prop_map(move |all| BusItem::Messages { device, messages: all.into() }),
            vec(name(), 0..6).prop_map(move |all| BusItem::State { device, params: all.into() }),
            vec(stored(log), 0..4).prop_map(move |all| BusItem::Log {
                kind,
                object,
                lines: all.into()
            }),
            (any::<[u8; 16]>(), any::<bool>(), 0_u8..6, any::<i64>(), params()).prop_map(
                move |(id, own, kind, at, params)| {
                    let id = EventId::from_bytes(id);
                    let account = if own { ACCOUNT } else { AccountId::from_bytes([9; 16]) };
                    let kind = event_kind(kind).unwrap();
                    let timestamp = Timestamp::from_micros(at);
                    BusItem::Event(Arc::new(Event { id, account, kind, object, timestamp, params }))
                }
            ),
            client::tests::message(),
            client::tests::sessions(),
        ]
    })
}

/// All that an item says, to the last bit: `Value` compares numbers by their worth alone.
fn exact(item: &BusItem) -> String {
    let decimals = |params: &Params| -> Vec<(i64, u8)> {
        let decimal = |value: &Value| match value {
            Value::Decimal(d) => Some((d.mantissa(), d.scale())),
            _ => None,
        };
        params.iter().filter_map(|(_, value)| decimal(value)).collect()
    };
    let exact = match item {
        BusItem::Messages { messages: all, .. } | BusItem::Log { lines: all, .. } => {
            all.iter().map(|one| decimals(one.params())).collect()
        }
        BusItem::Event(event) => vec![decimals(&event.params)],
        BusItem::State { .. } | BusItem::Client(_) | BusItem::Sessions(_) => Vec::new(),
    };
    format!("{item:?} {exact:?}")
}

fn read(batch: Batch, sequence: u64) -> Vec<BusItem> {
    let (about, count) = (batch.about, batch.count);
    let payload = batch.seal(1, sequence, 3);
    let (head, rest) = open(about, &payload).unwrap();
    assert_eq!(head, Head { publisher: 1, sequence, missed: 3, count });
    items(about, head, rest).unwrap()
}

proptest! {
    #[test]
    fn items_travel_exactly_and_in_order(all in vec(item(), 0..12)) {
        let mut sequence = 1;
        let mut came = Vec::new();
        for batch in encode(ACCOUNT, &all) {
            let count = u64::from(batch.count);
            came.extend(read(batch, sequence));
            sequence += count;
        }
        let exactly = |items: &[BusItem]| items.iter().map(exact).collect::<Vec<_>>();
        prop_assert_eq!(exactly(&came), exactly(&all));
    }

    #[test]
    fn any_bytes_are_refused(bytes in vec(any::<u8>(), 0..200), about in 0_usize..6) {
        let kind = KINDS[about];
        let about = About { account: ACCOUNT, kind, object: Uuid::nil() };
        prop_assert!(open(about, &bytes).is_err());
    }

    /// Past the check, as a newer node or a fault of ours would come.
    #[test]
    fn any_items_are_read_or_refused(bytes in vec(any::<u8>(), 0..400), count in 0_u16..5) {
        let object = Uuid::nil();
        for kind in KINDS {
            let head = Head { publisher: 1, sequence: 1, missed: 0, count };
            let read = items(About { account: ACCOUNT, kind, object }, head, &bytes);
            if let Ok(read) = read {
                prop_assert_eq!(read.len(), usize::from(count));
            }
        }
    }

    #[test]
    fn any_changed_byte_is_noticed(all in vec(item(), 1..4), at: prop::sample::Index, to in 1_u8..) {
        for batch in encode(ACCOUNT, &all) {
            let about = batch.about;
            let mut payload = batch.seal(1, 1, 0);
            let at = at.index(payload.len());
            payload[at] ^= to;
            prop_assert!(open(about, &payload).is_err());
        }
    }

    #[test]
    fn topics_are_read_back(object: [u8; 16], kind in 0_usize..6, text in ".{0,60}") {
        let kind = KINDS[kind];
        let about = About { account: ACCOUNT, kind, object: Uuid::from_bytes(object) };
        prop_assert_eq!(About::of_topic("a.b", about.topic("a.b").as_bytes()), Some(about));
        prop_assert_eq!(About::of_topic("a", about.topic("a.b").as_bytes()), None);
        prop_assert_eq!(About::of_topic("a", text.as_bytes()), None);
    }
}

fn message(device: DeviceId, bytes: usize, seq: u64) -> Stored {
    let name = ParamName::new("text").unwrap();
    let params = [(name, Value::from("x".repeat(bytes)))].into_iter().collect();
    let at = Timestamp::from_seconds(1_800_000_000);
    let series = Series::messages(ACCOUNT, device);
    Stored::read_back(series, at, at, params, Cursor { shard: 1, seq })
}

#[test]
fn a_large_batch_is_split_between_messages() {
    let device = DeviceId::from_bytes([1; 16]);
    let messages: Arc<[Stored]> = (0..1_000).map(|n| message(device, 1_000, n)).collect();
    let batches = encode(ACCOUNT, &[BusItem::Messages { device, messages }]);
    assert!((15..=17).contains(&batches.len()), "{}", batches.len());
    let mut expected = 0;
    for batch in batches {
        assert!(batch.len() < SPLIT_BYTES + 2_000);
        for item in read(batch, 1) {
            let BusItem::Messages { messages, .. } = item else { panic!("{item:?}") };
            for one in messages.iter() {
                assert_eq!(one.cursor().seq, expected);
                expected += 1;
            }
        }
    }
    assert_eq!(expected, 1_000);
}

/// A message is at most a megabyte: it travels, alone.
#[test]
fn the_largest_message_travels() {
    let device = DeviceId::from_bytes([1; 16]);
    let messages: Arc<[Stored]> = (0..3).map(|n| message(device, 1 << 20, n)).collect();
    let batches = encode(ACCOUNT, &[BusItem::Messages { device, messages }]);
    assert_eq!(batches.len(), 3);
    for batch in batches {
        assert!(batch.len() <= PAYLOAD_BYTES_MAX);
        assert_eq!(read(batch, 1).len(), 1);
    }
}

/// What most payloads are: ten messages of a tracker.
#[test]
fn a_payload_is_small() {
    let device = DeviceId::from_bytes([1; 16]);
    let params: Params = [
        ("position.latitude", Value::scaled(547_146_368, 7).unwrap()),
        ("position.longitude", Value::scaled(252_978_016, 7).unwrap()),
        ("position.speed", Value::Int(42)),
        ("battery.voltage", Value::scaled(12_610, 3).unwrap()),
    ]
    .into_iter()
    .map(|(name, value)| (ParamName::new(name).unwrap(), value))
    .collect();
    let at = Timestamp::from_seconds(1_800_000_000);
    let one = |seq| {
        let series = Series::messages(ACCOUNT, device);
        Stored::read_back(series, at, at, params.clone(), Cursor { shard: 1, seq })
    };
    let messages: Arc<[Stored]> = (0..10).map(one).collect();
    let batches = encode(ACCOUNT, &[BusItem::Messages { device, messages }]);
    assert_eq!(batches.len(), 1);
    assert!(batches[0].len() < 480, "{} bytes", batches[0].len());
}

#[test]
fn another_version_is_named() {
    let batch = Batch::mark(ACCOUNT, Uuid::nil());
    let about = batch.about;
    let mut payload = batch.seal(1, 1, 0);
    payload[0] = 1;
    let head: [u8; HEAD_BYTES] = payload[..HEAD_BYTES].try_into().unwrap();
    let fresh = check(about, &head, &[]);
    payload[HEAD_BYTES - 4..].copy_from_slice(&fresh.to_be_bytes());
    assert_eq!(open(about, &payload), Err(Refused::Version(1)));
}
