//! One transaction that makes a group of messages durable.
//!
//! It locks the rows of the shards that it appends to, in order: from there until it ends, nobody else
//! gives out sequences of these shards, on any node. So sequences have no gaps, become visible in their
//! order, and what is a duplicate cannot change meanwhile.
//!
//! A message that is newer than everything of its series is no duplicate. The newest time of each series
//! is remembered from commit to commit, for as long as the shard's row shows that nobody else appended in
//! between; so the usual message costs no look at the index.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

use bytes::{BufMut as _, Bytes, BytesMut};
use fieldline_model::{AccountId, Cursor, Receipt, Series};
use futures_util::SinkExt as _;
use tokio_postgres::types::ToSql;

use crate::connect::Link;
use crate::error::{Fault, Verdict};
use crate::history::Shared;
use crate::history::bucket::{Bucket, Calendar};
use crate::history::partition;
use crate::history::usage::{Added, ROW_BYTES};
use crate::history::writer::{Entry, Group};

/// Bytes sent to the server at once.
const CHUNK_BYTES: usize = 128 << 10;

/// Most series that a writer remembers, about 100 bytes each; beyond it, half are forgotten.
const SERIES_MAX: usize = 400_000;

/// What a writer knows of the server that it is connected to; gone with the connection, since what was not
/// replicated may be gone with the server.
#[derive(Default)]
pub(crate) struct Known {
    series: HashMap<Series, SeriesKnown>,
    shards: HashMap<u16, ShardKnown>,
    buckets: HashSet<Bucket>,
    /// Of the names that the server has.
    edition: Option<u64>,
}

#[derive(Clone, Copy)]
struct SeriesKnown {
    id: i64,
    /// [`ShardKnown::generation`] for which the other two hold.
    generation: u64,
    /// Of what is at this time or later…
    from: i64,
    /// … this is the newest; `i64::MIN` where there is nothing.
    newest: i64,
}

#[derive(Clone, Copy, Default)]
struct ShardKnown {
    /// The shard's row as it was last.
    row: (i64, i64),
    /// Counts how often somebody else had appended. From 1.
    generation: u64,
}

/// What becomes of one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) seq: i64,
    pub(crate) duplicate: bool,
}

impl Place {
    pub(crate) fn receipt(self, shard: u16) -> Receipt {
        let seq = u64::try_from(self.seq).unwrap_or(0);
        Receipt { cursor: Cursor { shard, seq }, duplicate: self.duplicate }
    }
}

/// A commit that was sent: what it puts where.
pub(crate) struct Sent {
    ids: Vec<i64>,
    places: Vec<Place>,
}

/// What a group became.
pub(crate) struct Done {
    pub(crate) places: Vec<Place>,
    pub(crate) added: Vec<Added>,
}

impl Known {
    /// The partitions are not what they were.
    pub(crate) fn forget_partitions(&mut self) {
        self.buckets.clear();
    }
}

/// Stores `group`, or finds that it is stored. `sent` is set as long as it is not known whether a commit
/// that was sent has been kept; given again, that is found out first.
pub(crate) async fn store(
    link: &Link,
    known: &mut Known,
    shared: &Shared,
    group: &Group,
    sent: &mut Option<Sent>,
) -> Result<Done, Fault> {
    let calendar = shared.calendar;
    for edition in group.editions() {
        if known.edition != Some(edition) {
            known.edition = Some(shared.book.load(link).await?.number);
        }
        if known.edition != Some(edition) {
            let text =
                "the server lacks names that the messages were written with; send them again";
            return Err(Fault::Damaged(text.to_owned()));
        }
    }
    let ids = identify(link, known, group).await?;
    for (entry, _) in group.entries() {
        if !known.buckets.contains(&entry.bucket) {
            partition::ensure(link, calendar, entry.bucket).await?;
            known.buckets.insert(entry.bucket);
        }
    }
    let heads = lock(link, group).await?;
    if let Some(before) = sent.as_ref() {
        // Whoever had sent it is gone by now: we have the locks.
        if kept(link, group, before).await? {
            // Written to, so that this commit too waits for the standby.
            let shards: Vec<i16> = heads.keys().map(|shard| shard.cast_signed()).collect();
            let touch = link.prepared("UPDATE shards SET seq = seq WHERE shard = ANY($1)").await?;
            link.client.execute(&touch, &[&shards]).await?;
            commit(link).await?;
            let added = added(group, &before.places);
            let places = sent.take().map(|before| before.places).unwrap_or_default();
            return Ok(Done { places, added });
        }
        *sent = None;
    }
    for (shard, row) in &heads {
        let shard = known.shards.entry(*shard).or_default();
        if shard.row != *row || shard.generation == 0 {
            *shard = ShardKnown { row: *row, generation: shard.generation + 1 };
        }
    }
    probe(link, known, calendar, group, &ids).await?;
    let places = place(link, known, group, &ids, &heads).await?;
    copy(link, group, &ids, &places).await?;
    finish(link, known, group, ids, places, &heads, sent).await
}

/// The id of each message's series; new series are made known to all, in a transaction of its own.
async fn identify(link: &Link, known: &mut Known, group: &Group) -> Result<Vec<i64>, Fault> {
    let mut asked: Vec<Series> = group
        .entries()
        .map(|(entry, _)| entry.series)
        .filter(|series| !known.series.contains_key(series))
        .collect();
    // In order: two nodes that make the same ones do not wait for each other crosswise.
    asked.sort_unstable();
    asked.dedup();
    if known.series.len() + asked.len() > SERIES_MAX {
        let mut keep = false;
        let wanted: HashSet<Series> = group.entries().map(|(entry, _)| entry.series).collect();
        known.series.retain(|series, _| {
            keep = !keep;
            keep || wanted.contains(series)
        });
    }
    for insert in [false, true, true] {
        if asked.is_empty() {
            break;
        }
        let accounts: Vec<uuid::Uuid> = asked.iter().map(|series| series.account.0).collect();
        let kinds: Vec<i16> = asked.iter().map(|series| i16::from(series.kind as u8)).collect();
        let objects: Vec<uuid::Uuid> = asked.iter().map(|series| series.object).collect();
        let terms: [&(dyn ToSql + Sync); 3] = [&accounts, &kinds, &objects];
        if insert {
            let make = link
                .prepared(
                    "INSERT INTO series (account, kind, object) \
                     SELECT * FROM unnest($1::uuid[], $2::smallint[], $3::uuid[]) \
                     ON CONFLICT DO NOTHING",
                )
                .await?;
            link.client.execute(&make, &terms).await?;
        }
        let find = link
            .prepared(
                "SELECT u.n, s.id FROM unnest($1::uuid[], $2::smallint[], $3::uuid[]) \
                 WITH ORDINALITY AS u (account, kind, object, n) \
                 JOIN series s USING (account, kind, object)",
            )
            .await?;
        let mut found = HashSet::new();
        for row in link.client.query(&find, &terms).await? {
            let at = usize::try_from(row.try_get::<_, i64>(0)? - 1).unwrap_or(usize::MAX);
            let Some(series) = asked.get(at) else { continue };
            let (id, unknown) = (row.try_get(1)?, i64::MIN);
            known
                .series
                .insert(*series, SeriesKnown { id, generation: 0, from: unknown, newest: unknown });
            found.insert(*series);
        }
        asked.retain(|series| !found.contains(series));
    }
    let id = |entry: &Entry| known.series.get(&entry.series).map(|series| series.id);
    let ids: Option<Vec<i64>> = group.entries().map(|(entry, _)| id(entry)).collect();
    ids.ok_or_else(|| Fault::Damaged("a series was made and is not there".to_owned()))
}

/// Begins, and locks the shards; returns the row of each.
async fn lock(link: &Link, group: &Group) -> Result<HashMap<u16, (i64, i64)>, Fault> {
    let mut shards: Vec<i16> = Vec::new();
    for (entry, _) in group.entries() {
        let shard = entry.shard.cast_signed();
        if !shards.contains(&shard) {
            shards.push(shard);
        }
    }
    let statement = link
        .prepared(
            "SELECT shard, seq, writer FROM shards WHERE shard = ANY($1) ORDER BY shard FOR UPDATE",
        )
        .await?;
    let terms: [&(dyn ToSql + Sync); 1] = [&shards];
    let (begun, rows) = tokio::join!(
        biased;
        link.client.batch_execute("BEGIN"),
        link.client.query(&statement, &terms),
    );
    begun?;
    let mut heads = HashMap::new();
    for row in rows? {
        let shard: i16 = row.try_get(0)?;
        heads.insert(shard.cast_unsigned(), (row.try_get(1)?, row.try_get(2)?));
    }
    if heads.len() == shards.len() {
        return Ok(heads);
    }
    Err(Fault::Damaged("the table `shards` lacks a row; restore a backup".to_owned()))
}

/// Whether what was sent is there: all of it, or nothing.
async fn kept(link: &Link, group: &Group, sent: &Sent) -> Result<bool, Fault> {
    let (mut ids, mut times, mut hashes) = (Vec::new(), Vec::new(), Vec::new());
    let (mut shards, mut seqs) = (Vec::new(), Vec::new());
    for (((entry, _), id), place) in group.entries().zip(&sent.ids).zip(&sent.places) {
        if !place.duplicate {
            ids.push(*id);
            times.push(entry.at);
            hashes.push(entry.hash);
            shards.push(entry.shard.cast_signed());
            seqs.push(place.seq);
        }
    }
    if ids.is_empty() {
        // Only duplicates: storing them again changes nothing.
        return Ok(false);
    }
    let statement = link
        .prepared(
            "SELECT count(*) FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::smallint[], \
             $5::bigint[]) AS u (series, at, hash, shard, seq) \
             JOIN messages m USING (series, at, hash, shard, seq)",
        )
        .await?;
    let row = link.client.query_one(&statement, &[&ids, &times, &hashes, &shards, &seqs]).await?;
    let count: i64 = row.try_get(0)?;
    Ok(usize::try_from(count).is_ok_and(|count| count == ids.len()))
}

/// Finds out the newest time of the series of which it is not known.
async fn probe(
    link: &Link,
    known: &mut Known,
    calendar: Calendar,
    group: &Group,
    ids: &[i64],
) -> Result<(), Fault> {
    let mut asked: HashMap<i64, Series> = HashMap::new();
    let mut latest: Option<Bucket> = None;
    for ((entry, _), id) in group.entries().zip(ids) {
        if !known.current(entry) {
            asked.insert(*id, entry.series);
            // Years are below zero, the older the higher; a day is later than any of them.
            let newer = latest
                .is_none_or(|latest| calendar.range(entry.bucket).0 > calendar.range(latest).0);
            if newer {
                latest = Some(entry.bucket);
            }
        }
    }
    let Some(latest) = latest else { return Ok(()) };
    // Older partitions are not looked into: what is late is looked up one by one.
    let from = calendar.range(latest).0;
    let statement = link
        .prepared(
            "SELECT u.series, (SELECT m.at FROM messages m WHERE m.series = u.series \
             AND m.at >= $2 ORDER BY m.at DESC LIMIT 1) FROM unnest($1::bigint[]) AS u (series)",
        )
        .await?;
    let series: Vec<i64> = asked.keys().copied().collect();
    for row in link.client.query(&statement, &[&series, &from]).await? {
        let Some(series) = asked.get(&row.try_get(0)?) else { continue };
        let newest: Option<i64> = row.try_get(1)?;
        let shard = group.shard_of(series);
        let generation = known.shards.get(&shard).map_or(0, |shard| shard.generation);
        if let Some(entry) = known.series.get_mut(series) {
            let newest = newest.unwrap_or(i64::MIN);
            *entry = SeriesKnown { generation, from, newest, ..*entry };
        }
    }
    Ok(())
}

impl Known {
    /// Whether the newest time of the message's series is known.
    fn current(&self, entry: &Entry) -> bool {
        let generation = self.shards.get(&entry.shard).map(|shard| shard.generation);
        self.series.get(&entry.series).is_some_and(|series| Some(series.generation) == generation)
    }

    /// Whether the message is newer than everything of its series.
    fn is_new(&self, entry: &Entry) -> bool {
        let series = self.series.get(&entry.series);
        series.is_some_and(|series| entry.at >= series.from && entry.at > series.newest)
    }
}

/// Tells duplicates from what is new, and gives what is new its sequence.
async fn place(
    link: &Link,
    known: &Known,
    group: &Group,
    ids: &[i64],
    heads: &HashMap<u16, (i64, i64)>,
) -> Result<Vec<Place>, Fault> {
    let mut first: HashMap<(i64, i64, i64), usize, BuildHasherDefault<Fold>> =
        HashMap::with_capacity_and_hasher(ids.len(), BuildHasherDefault::default());
    // Of a duplicate within the group, where the first one is.
    let mut same_as: Vec<Option<usize>> = Vec::with_capacity(ids.len());
    let mut asked: HashMap<Bucket, Vec<usize>> = HashMap::new();
    for (at, ((entry, _), id)) in group.entries().zip(ids).enumerate() {
        let before = *first.entry((*id, entry.at, entry.hash)).or_insert(at);
        same_as.push((before != at).then_some(before));
        if before == at && !known.is_new(entry) {
            asked.entry(entry.bucket).or_default().push(at);
        }
    }
    let mut there: HashMap<usize, i64> = HashMap::new();
    for (bucket, rows) in asked {
        look_up(link, group, ids, bucket, &rows, &mut there).await?;
    }
    let mut next: HashMap<u16, i64> = heads.iter().map(|(shard, row)| (*shard, row.0)).collect();
    let mut places: Vec<Place> = Vec::with_capacity(ids.len());
    for (at, ((entry, _), same_as)) in group.entries().zip(same_as).enumerate() {
        let of_first = same_as.and_then(|first| places.get(first));
        let place = if let Some(first) = of_first {
            Place { seq: first.seq, duplicate: true }
        } else if let Some(seq) = there.get(&at) {
            Place { seq: *seq, duplicate: true }
        } else {
            let seq = next.entry(entry.shard).or_default();
            *seq += 1;
            Place { seq: *seq, duplicate: false }
        };
        places.push(place);
    }
    Ok(places)
}

/// Which of `rows`, all of one bucket, are stored, and where.
async fn look_up(
    link: &Link,
    group: &Group,
    ids: &[i64],
    bucket: Bucket,
    rows: &[usize],
    there: &mut HashMap<usize, i64>,
) -> Result<(), Fault> {
    let wanted: HashSet<usize> = rows.iter().copied().collect();
    let (mut series, mut times, mut hashes, mut numbers) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (at, ((entry, _), id)) in group.entries().zip(ids).enumerate() {
        if wanted.contains(&at) {
            series.push(*id);
            times.push(entry.at);
            hashes.push(entry.hash);
            numbers.push(i64::try_from(at).unwrap_or(i64::MAX));
        }
    }
    let sql = format!(
        "SELECT u.n, m.seq FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[]) \
         AS u (series, at, hash, n) JOIN {} m USING (series, at, hash)",
        bucket.table()
    );
    let statement = link.prepared(&sql).await?;
    for row in link.client.query(&statement, &[&series, &times, &hashes, &numbers]).await? {
        let at = usize::try_from(row.try_get::<_, i64>(0)?).unwrap_or(usize::MAX);
        there.insert(at, row.try_get(1)?);
    }
    Ok(())
}

/// Puts what is new into its tables.
async fn copy(link: &Link, group: &Group, ids: &[i64], places: &[Place]) -> Result<(), Fault> {
    let mut buckets: Vec<Bucket> = Vec::new();
    for ((entry, _), place) in group.entries().zip(places) {
        if !place.duplicate && !buckets.contains(&entry.bucket) {
            buckets.push(entry.bucket);
        }
    }
    for bucket in buckets {
        let sql = format!(
            "COPY {} (series, at, received, shard, seq, hash, body) FROM STDIN (FORMAT binary)",
            bucket.table()
        );
        let statement = link.prepared(&sql).await?;
        let sink = link.client.copy_in::<_, Bytes>(&statement).await?;
        let mut sink = std::pin::pin!(sink);
        let mut out = BytesMut::with_capacity(CHUNK_BYTES + 4_096);
        out.put_slice(b"PGCOPY\n\xff\r\n\0");
        // Flags, and the length of the header's extension.
        out.put_u64(0);
        for (((entry, body), id), place) in group.entries().zip(ids).zip(places) {
            if place.duplicate || entry.bucket != bucket {
                continue;
            }
            put_row(&mut out, *id, entry, place.seq, body);
            if out.len() >= CHUNK_BYTES {
                sink.send(out.split().freeze()).await?;
                out.reserve(CHUNK_BYTES + 4_096);
            }
        }
        out.put_i16(-1);
        sink.send(out.freeze()).await?;
        sink.finish().await?;
    }
    Ok(())
}

/// One row of a binary COPY: the count of fields, then each after its length.
fn put_row(out: &mut BytesMut, id: i64, entry: &Entry, seq: i64, body: &[u8]) {
    out.put_i16(7);
    for number in [id, entry.at, entry.received] {
        out.put_i32(8);
        out.put_i64(number);
    }
    out.put_i32(2);
    out.put_i16(entry.shard.cast_signed());
    for number in [seq, entry.hash] {
        out.put_i32(8);
        out.put_i64(number);
    }
    // A message has a megabyte at most.
    out.put_i32(i32::try_from(body.len()).unwrap_or(i32::MAX));
    out.put_slice(body);
}

/// Notes what was added, moves the shards on, and commits.
async fn finish(
    link: &Link,
    known: &mut Known,
    group: &Group,
    ids: Vec<i64>,
    places: Vec<Place>,
    heads: &HashMap<u16, (i64, i64)>,
    sent: &mut Option<Sent>,
) -> Result<Done, Fault> {
    let mut ends: HashMap<(i16, i32), i64> = HashMap::new();
    let mut used: HashMap<(i16, i32, uuid::Uuid), (i64, i64)> = HashMap::new();
    let mut seqs: HashMap<u16, i64> = heads.iter().map(|(shard, row)| (*shard, row.0)).collect();
    for ((entry, body), place) in group.entries().zip(&places) {
        if place.duplicate {
            continue;
        }
        let (shard, bucket) = (entry.shard.cast_signed(), entry.bucket.0);
        ends.insert((shard, bucket), place.seq);
        seqs.insert(entry.shard, place.seq);
        let used = used.entry((shard, bucket, entry.series.account.0)).or_default();
        used.0 += 1;
        used.1 += (body.len() as u64 + ROW_BYTES).cast_signed();
    }
    // Of this transaction alone: who finds it in the row knows that nobody came in between.
    let writer: i64 = rand::random();
    let (shards, newest): (Vec<i16>, Vec<i64>) =
        seqs.iter().map(|(shard, seq)| (shard.cast_signed(), *seq)).unzip();
    let (end_keys, end_seqs): (Vec<(i16, i32)>, Vec<i64>) = ends.into_iter().unzip();
    let (end_shards, end_buckets): (Vec<i16>, Vec<i32>) = end_keys.into_iter().unzip();
    let mut columns = (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for ((shard, bucket, account), (messages, bytes)) in used {
        columns.0.push(shard);
        columns.1.push(bucket);
        columns.2.push(account);
        columns.3.push(messages);
        columns.4.push(bytes);
    }
    let end = link
        .prepared(
            "INSERT INTO ends (shard, bucket, seq) \
             SELECT * FROM unnest($1::smallint[], $2::integer[], $3::bigint[]) \
             ON CONFLICT (shard, bucket) DO UPDATE SET seq = EXCLUDED.seq",
        )
        .await?;
    let count = link
        .prepared(
            "INSERT INTO usage (shard, bucket, account, messages, bytes) \
             SELECT * FROM unnest($1::smallint[], $2::integer[], $3::uuid[], $4::bigint[], $5::bigint[]) \
             ON CONFLICT (shard, bucket, account) DO UPDATE \
             SET messages = usage.messages + EXCLUDED.messages, bytes = usage.bytes + EXCLUDED.bytes",
        )
        .await?;
    let go_on = link
        .prepared(
            "UPDATE shards SET seq = u.seq, writer = $3 \
             FROM unnest($1::smallint[], $2::bigint[]) AS u (shard, seq) \
             WHERE shards.shard = u.shard",
        )
        .await?;
    let end_terms: [&(dyn ToSql + Sync); 3] = [&end_shards, &end_buckets, &end_seqs];
    let count_terms: [&(dyn ToSql + Sync); 5] =
        [&columns.0, &columns.1, &columns.2, &columns.3, &columns.4];
    let go_on_terms: [&(dyn ToSql + Sync); 3] = [&shards, &newest, &writer];
    // From here on nobody but the server knows.
    let before = sent.insert(Sent { ids, places });
    let (ended, counted, gone_on, committed) = tokio::join!(
        biased;
        link.client.execute(&end, &end_terms),
        link.client.execute(&count, &count_terms),
        link.client.execute(&go_on, &go_on_terms),
        commit(link),
    );
    // Where one of them failed, the server has taken the commit for a rollback.
    let all = ended.and(counted).and(gone_on).map_err(Fault::from).and(committed);
    if let Err(fault) = all {
        if fault.verdict() != Verdict::Lost {
            *sent = None;
        }
        return Err(fault);
    }
    for (shard, seq) in &seqs {
        if let Some(shard) = known.shards.get_mut(shard) {
            shard.row = (*seq, writer);
        }
    }
    for (entry, _) in group.entries() {
        if let Some(series) = known.series.get_mut(&entry.series) {
            series.newest = series.newest.max(entry.at);
        }
    }
    let added = added(group, &before.places);
    let places = std::mem::take(&mut before.places);
    *sent = None;
    Ok(Done { places, added })
}

/// Commits. No statement timeout is in force: the server would take it as leave to confirm what no standby
/// has yet.
async fn commit(link: &Link) -> Result<(), Fault> {
    let (unlimited, committed) = tokio::join!(
        biased;
        link.client.batch_execute("SET LOCAL statement_timeout = 0"),
        link.client.batch_execute("COMMIT"),
    );
    unlimited?;
    committed?;
    Ok(())
}

/// What the group added, by shard and account.
fn added(group: &Group, places: &[Place]) -> Vec<Added> {
    let mut all: HashMap<(u16, AccountId), Added> = HashMap::new();
    for ((entry, body), place) in group.entries().zip(places) {
        if place.duplicate {
            continue;
        }
        let (shard, account) = (entry.shard, entry.series.account);
        let nothing = Added { shard, seq: 0, account, messages: 0, bytes: 0 };
        let one = all.entry((shard, account)).or_insert(nothing);
        one.seq = one.seq.max(place.seq);
        one.messages += 1;
        one.bytes += body.len() as u64 + ROW_BYTES;
    }
    all.into_values().collect()
}

/// Folds words by multiplication. Not for keys that somebody else may choose to collide: of these, one is
/// a time and one a hash, and a group is all that suffers.
#[derive(Default)]
struct Fold(u64);

impl Hasher for Fold {
    fn finish(&self) -> u64 {
        self.0.wrapping_mul(0xbf58_476d_1ce4_e5b9).rotate_left(26)
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, word: u64) {
        let mixed = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 29);
    }

    fn write_i64(&mut self, word: i64) {
        self.write_u64(word.cast_unsigned());
    }
}
