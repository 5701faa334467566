//! How items travel: exact, compact, versioned, and told from anything else.
//!
//! ```text
//! payload = version (1) publisher (8) sequence (8) missed (4) count (2) check (4) item*
//! item    = of a message topic:  stored* 0
//!           of a log topic:      series kind (1) stored* 0
//!           of a state topic:    name* 0
//!           of an event topic:   account? id (16) kind (1) timestamp params
//!           of a client topic:   see `client.rs`
//! stored  = 1 | 2 account (16) series kind (1) object (16); timestamp received shard seq params
//! params  = (name value)* 0
//! name    = 1 length text, which gives it the next number from 2 on in this payload | number
//! value   = a tagged value of `fieldline_model::codec`
//! ```
//!
//! Numbers in the head are big-endian, others of variable length, signed ones zigzag. The check is the CRC-32C of the topic and
//! of all else: nothing is taken for an item that was not published as one, on this topic. What a payload may make a reader
//! reserve is bounded by its length and by [`PARTS_MAX`].

mod client;
mod input;

use std::collections::HashMap;
use std::sync::Arc;

use fieldline_contracts::BusItem;
use fieldline_model::codec::{Damage, Input, put_bytes, put_signed, put_tagged, put_varint};
use fieldline_model::{
    AccountId, Cursor, DeviceId, Event, EventId, EventKind, ParamName, Params, Series, SeriesKind,
    Stored, Timestamp,
};
use uuid::Uuid;

use input::{Reader, UNKNOWN};

/// The version that is written, and the only one that is read. A change of the encoding takes another.
pub const VERSION: u8 = 2;
/// Bytes before the items.
pub const HEAD_BYTES: usize = 27;
/// A payload ends where it has grown beyond this: what follows goes into the next one.
pub const SPLIT_BYTES: usize = 64 << 10;
/// Largest payload: one message that is as large as messages may be, and all that surrounds it.
pub const PAYLOAD_BYTES_MAX: usize = 2 << 20;
/// Most items of a payload.
pub const ITEMS_MAX: u16 = 1_024;
/// Most messages, names, values and nodes of JSON trees of a payload together, so that few bytes cannot take much memory.
pub const PARTS_MAX: usize = fieldline_model::codec::PARTS_MAX;

/// What the items of a payload are; the third level of its topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Messages of a device.
    Message,
    /// Changes of last values of a device.
    State,
    /// Events of an object.
    Event,
    /// Log lines of a device or channel.
    Log,
    /// What is between the account's MQTT clients.
    Client,
    /// Nothing: how far a publisher has come, so that a loss at its end is noticed.
    Mark,
}

impl Kind {
    /// Its name in topics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Message => "message",
            Self::State => "state",
            Self::Event => "event",
            Self::Log => "log",
            Self::Client => "client",
            Self::Mark => "mark",
        }
    }

    /// The kind of this name.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        let all = [Self::Message, Self::State, Self::Event, Self::Log, Self::Client, Self::Mark];
        all.into_iter().find(|kind| kind.name() == name)
    }

    fn of(item: &BusItem) -> Self {
        match item {
            BusItem::Messages { .. } => Self::Message,
            BusItem::State { .. } => Self::State,
            BusItem::Event(_) => Self::Event,
            BusItem::Log { .. } => Self::Log,
            BusItem::Client(_) | BusItem::Sessions(_) => Self::Client,
        }
    }
}

/// What a payload is about: its topic without the prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct About {
    /// Whose the items are.
    pub account: AccountId,
    /// What they are.
    pub kind: Kind,
    /// The device, channel or other object they are about.
    pub object: Uuid,
}

impl About {
    /// The topic below `prefix`.
    #[must_use]
    pub fn topic(&self, prefix: &str) -> String {
        format!("{prefix}/{}/{}/{}", self.account, self.kind.name(), self.object)
    }

    /// What a topic below `prefix` is about; `None` if it is none of ours.
    #[must_use]
    pub fn of_topic(prefix: &str, topic: &[u8]) -> Option<Self> {
        let topic = std::str::from_utf8(topic).ok()?.strip_prefix(prefix)?.strip_prefix('/')?;
        let mut levels = topic.split('/');
        let about = Self {
            account: AccountId(Uuid::try_parse(levels.next()?).ok()?),
            kind: Kind::of_name(levels.next()?)?,
            object: Uuid::try_parse(levels.next()?).ok()?,
        };
        levels.next().is_none().then_some(about)
    }

    fn check(&self) -> u32 {
        let check = crc32c::crc32c(self.account.as_bytes());
        let check = crc32c::crc32c_append(check, self.kind.name().as_bytes());
        crc32c::crc32c_append(check, self.object.as_bytes())
    }
}

/// What stands before the items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Who published them: one run of one process.
    pub publisher: u64,
    /// The number of the first item, among those of the publisher for the account.
    pub sequence: u64,
    /// Items right before it that the publisher dropped.
    pub missed: u32,
    /// How many items there are.
    pub count: u16,
}

/// Items of one object that are not yet numbered.
#[derive(Debug)]
pub struct Batch {
    /// What they are about.
    pub about: About,
    /// How many there are.
    pub count: u16,
    /// Room for the head, then the items.
    bytes: Vec<u8>,
}

impl Batch {
    /// A batch without items.
    #[must_use]
    pub fn mark(account: AccountId, object: Uuid) -> Self {
        let about = About { account, kind: Kind::Mark, object };
        Self { about, count: 0, bytes: vec![0; HEAD_BYTES] }
    }

    /// Bytes of the payload.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it has no items.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The payload, once its place is known.
    #[must_use]
    pub fn seal(self, publisher: u64, sequence: u64, missed: u32) -> Vec<u8> {
        let Self { about, count, mut bytes } = self;
        let mut head = [0; HEAD_BYTES];
        head_into(&mut head, Head { publisher, sequence, missed, count });
        let check = check(about, &head, bytes.get(HEAD_BYTES..).unwrap_or_default());
        if let Some(place) = bytes.first_chunk_mut() {
            *place = head;
        }
        if let Some(place) = bytes.get_mut(HEAD_BYTES - 4..HEAD_BYTES) {
            place.copy_from_slice(&check.to_be_bytes());
        }
        bytes
    }
}

/// Writes all but the check, which stays zero.
fn head_into(bytes: &mut [u8; HEAD_BYTES], head: Head) {
    let Head { publisher, sequence, missed, count } = head;
    let fields = [VERSION]
        .into_iter()
        .chain(publisher.to_be_bytes())
        .chain(sequence.to_be_bytes())
        .chain(missed.to_be_bytes())
        .chain(count.to_be_bytes());
    bytes.iter_mut().zip(fields).for_each(|(byte, field)| *byte = field);
}

fn check(about: About, head: &[u8; HEAD_BYTES], items: &[u8]) -> u32 {
    let before = head.get(..HEAD_BYTES - 4).unwrap_or_default();
    crc32c::crc32c_append(crc32c::crc32c_append(about.check(), before), items)
}

/// Items of one account as batches, in order: one object each, neighbours of one object and kind together.
#[must_use]
pub fn encode(account: AccountId, items: &[BusItem]) -> Vec<Batch> {
    let mut writer = Writer { account, done: Vec::new(), open: None };
    for item in items {
        writer.item(item);
    }
    writer.finish();
    writer.done
}

struct Writer<'a> {
    account: AccountId,
    done: Vec<Batch>,
    open: Option<Open<'a>>,
}

/// A batch that is being written.
struct Open<'a> {
    batch: Batch,
    names: Names<'a>,
}

/// Which names a payload has, by their numbers.
#[derive(Default)]
struct Names<'a> {
    all: Vec<&'a ParamName>,
    numbers: HashMap<&'a str, usize>,
    /// The one that comes next if messages repeat each other.
    guess: usize,
}

impl<'a> Names<'a> {
    fn put(&mut self, out: &mut Vec<u8>, name: &'a ParamName) {
        let guessed =
            self.all.get(self.guess).is_some_and(|one| one.same_text(name) || *one == name);
        let known =
            if guessed { Some(self.guess) } else { self.numbers.get(name.as_str()).copied() };
        if let Some(at) = known {
            self.guess = at + 1;
            put_count(out, at + 2);
            return;
        }
        self.numbers.insert(name.as_str(), self.all.len());
        self.all.push(name);
        self.guess = self.all.len();
        out.push(1);
        put_bytes(out, name.as_str().as_bytes());
    }

    fn params(&mut self, out: &mut Vec<u8>, params: &'a Params) {
        for (name, value) in params {
            self.put(out, name);
            put_tagged(out, value);
        }
        out.push(0);
    }
}

impl<'a> Writer<'a> {
    fn item(&mut self, item: &'a BusItem) {
        let about = About { account: self.account, kind: Kind::of(item), object: item.object() };
        match item {
            BusItem::Messages { device, messages } => {
                let own = Series::messages(self.account, *device);
                self.stored(about, None, own, messages);
            }
            BusItem::Log { kind, object, lines } => {
                let own = Series { account: self.account, kind: *kind, object: *object };
                self.stored(about, Some(*kind as u8), own, lines);
            }
            BusItem::State { params, .. } => {
                self.begin(about);
                for (at, name) in params.iter().enumerate() {
                    if at > 0 && self.is_full() {
                        self.end();
                        self.finish();
                        self.begin(about);
                    }
                    self.with(|out, names| names.put(out, name));
                }
                self.end();
            }
            BusItem::Event(event) => {
                self.begin(about);
                let account = self.account;
                self.with(|out, names| put_event(out, names, account, event));
                self.count();
            }
            BusItem::Client(message) => {
                self.begin(about);
                self.with(|out, _| client::put_message(out, message));
                self.count();
            }
            BusItem::Sessions(sessions) => {
                self.begin(about);
                self.with(|out, _| client::put_sessions(out, sessions));
                self.count();
            }
        }
    }

    /// Messages or lines: as many items as it takes for no payload to become too large.
    fn stored(&mut self, about: About, kind: Option<u8>, own: Series, all: &'a [Stored]) {
        self.begin(about);
        self.with(|out, _| out.extend(kind));
        for (at, one) in all.iter().enumerate() {
            if at > 0 && self.is_full() {
                self.end();
                self.finish();
                self.begin(about);
                self.with(|out, _| out.extend(kind));
            }
            self.with(|out, names| put_stored(out, names, own, one));
        }
        self.end();
    }

    /// Makes room for an item.
    fn begin(&mut self, about: About) {
        let fits = self.open.as_ref().is_some_and(|open| {
            open.batch.about == about && open.batch.count < ITEMS_MAX && !self.is_full()
        });
        if !fits {
            self.finish();
            let batch = Batch { about, count: 0, bytes: vec![0; HEAD_BYTES] };
            self.open = Some(Open { batch, names: Names::default() });
        }
    }

    fn is_full(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.batch.bytes.len() > SPLIT_BYTES)
    }

    fn with(&mut self, put: impl FnOnce(&mut Vec<u8>, &mut Names<'a>)) {
        if let Some(open) = &mut self.open {
            put(&mut open.batch.bytes, &mut open.names);
        }
    }

    /// Ends an item that is a list.
    fn end(&mut self) {
        self.with(|out, _| out.push(0));
        self.count();
    }

    fn count(&mut self) {
        if let Some(open) = &mut self.open {
            open.batch.count += 1;
        }
    }

    fn finish(&mut self) {
        self.done.extend(self.open.take().map(|open| open.batch));
    }
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    put_varint(out, count as u64);
}

fn put_series(out: &mut Vec<u8>, series: Series) {
    out.extend_from_slice(series.account.as_bytes());
    out.push(series.kind as u8);
    out.extend_from_slice(series.object.as_bytes());
}

fn put_stored<'a>(out: &mut Vec<u8>, names: &mut Names<'a>, own: Series, stored: &'a Stored) {
    if stored.series() == own {
        out.push(1);
    } else {
        out.push(2);
        put_series(out, stored.series());
    }
    let (timestamp, received) = (stored.timestamp().as_micros(), stored.received().as_micros());
    put_signed(out, timestamp);
    put_signed(out, received.wrapping_sub(timestamp));
    put_varint(out, stored.cursor().shard.into());
    put_varint(out, stored.cursor().seq);
    names.params(out, stored.params());
}

const fn event_number(kind: EventKind) -> u8 {
    match kind {
        EventKind::Online => 0,
        EventKind::Offline => 1,
        EventKind::Registered => 2,
        EventKind::Rejected => 3,
        EventKind::Command => 4,
        EventKind::Audit => 5,
    }
}

const fn event_kind(number: u8) -> Option<EventKind> {
    Some(match number {
        0 => EventKind::Online,
        1 => EventKind::Offline,
        2 => EventKind::Registered,
        3 => EventKind::Rejected,
        4 => EventKind::Command,
        5 => EventKind::Audit,
        _ => return None,
    })
}

fn put_event<'a>(out: &mut Vec<u8>, names: &mut Names<'a>, account: AccountId, event: &'a Event) {
    if event.account == account {
        out.push(0);
    } else {
        out.push(1);
        out.extend_from_slice(event.account.as_bytes());
    }
    out.extend_from_slice(event.id.as_bytes());
    out.push(event_number(event.kind));
    put_signed(out, event.timestamp.as_micros());
    names.params(out, &event.params);
}

/// Why a payload was not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Too short, too long, or not what was published on this topic.
    #[error("it is no payload of the bus, or was damaged")]
    Damaged,
    /// A newer or older node wrote it.
    #[error("it is of version {0} of the encoding; this node reads version {VERSION}")]
    Version(u8),
    /// The check holds and the items make no sense, such as an event of a kind that only a newer node knows.
    #[error("its items are of no form that this node knows")]
    Malformed,
}

/// Reads the head of a payload; the items are left for [`items`].
///
/// # Errors
///
/// [`Refused::Damaged`], [`Refused::Version`].
pub fn open(about: About, payload: &[u8]) -> Result<(Head, &[u8]), Refused> {
    let (head, items) = payload.split_first_chunk::<HEAD_BYTES>().ok_or(Refused::Damaged)?;
    if payload.len() > PAYLOAD_BYTES_MAX {
        return Err(Refused::Damaged);
    }
    let mut input = Input(head);
    let mut read = || {
        let version = input.u8()?;
        let head = Head {
            publisher: u64::from_be_bytes(input.array()?),
            sequence: u64::from_be_bytes(input.array()?),
            missed: u32::from_be_bytes(input.array()?),
            count: u16::from_be_bytes(input.array()?),
        };
        Ok::<_, Damage>((version, head, u32::from_be_bytes(input.array()?)))
    };
    let (version, read, expected) = read().map_err(|_| Refused::Damaged)?;
    if check(about, head, items) != expected {
        return Err(Refused::Damaged);
    }
    if version != VERSION {
        return Err(Refused::Version(version));
    }
    // The numbers of a publisher would last for longer than the sun.
    if read.count > ITEMS_MAX || read.sequence > u64::MAX / 2 {
        return Err(Refused::Malformed);
    }
    Ok((read, items))
}

/// Reads the items that [`open`] left.
///
/// # Errors
///
/// [`Refused::Malformed`].
pub fn items(about: About, head: Head, items: &[u8]) -> Result<Vec<BusItem>, Refused> {
    let mut reader = Reader { input: Input(items), parts: PARTS_MAX, names: Vec::new() };
    let mut read = || {
        let mut all = Vec::with_capacity(head.count.into());
        for _ in 0..head.count {
            all.push(reader.item(about)?);
        }
        if reader.input.is_empty() { Ok(all) } else { Err(UNKNOWN) }
    };
    read().map_err(|_: Damage| Refused::Malformed)
}

#[cfg(test)]
mod tests;
