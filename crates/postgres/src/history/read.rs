//! Queries that read messages.

use std::sync::Arc;

use fieldline_contracts::history::Gap;
use fieldline_contracts::{Order, Query};
use fieldline_model::{AccountId, Cursor, Params, Series, SeriesKind, Stored, Timestamp};
use futures_util::FutureExt as _;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use crate::connect::Link;
use crate::error::Fault;
use crate::history::Shared;
use crate::history::book::Book;
use crate::history::row::{self, Damage, Names, UNNAMED};

/// Most bytes of parameters that the server sends for one answer, beyond its first message; by their
/// content, answers are cut to [`Query::BYTES_MAX`] here.
const ANSWER_BYTES: i64 = 8 << 20;

/// Partitions looked into at first; each further query looks into four times as many.
const WINDOW: usize = 2;

/// Messages of one series.
pub(crate) async fn read(shared: &Arc<Shared>, query: &Query) -> Result<Vec<Stored>, Fault> {
    let (query, own) = (query.clone(), Arc::clone(shared));
    shared
        .pool
        .run(move |link| {
            let (query, shared) = (query.clone(), Arc::clone(&own));
            async move { read_on(link, &shared.book, &query).await }.boxed()
        })
        .await
}

async fn read_on(link: &Link, book: &Book, query: &Query) -> Result<Vec<Stored>, Fault> {
    let (mut from, mut to) = (query.from.as_micros(), query.to.as_micros());
    let (account, kind) = (query.series.account.0, i16::from(query.series.kind as u8));
    let after = query.after.map(|(at, cursor)| (at.as_micros(), signed(cursor.seq)));
    // Where the last page ended bounds what has to be looked into.
    match (query.order, after) {
        (Order::Ascending, Some((at, _))) => from = from.max(at),
        (Order::Descending, Some((at, _))) => to = to.min(at.saturating_add(1)),
        (_, None) => {}
    }
    let limit = query.limit.min(Query::LIMIT_MAX);
    if from >= to || limit == 0 {
        return Ok(Vec::new());
    }
    let which = link
        .prepared("SELECT id FROM series WHERE account = $1 AND kind = $2 AND object = $3")
        .await?;
    let parts = link
        .prepared("SELECT low, high FROM buckets WHERE low < $2 AND high > $1 ORDER BY low")
        .await?;
    let which_terms: [&(dyn ToSql + Sync); 3] = [&account, &kind, &query.series.object];
    let parts_terms: [&(dyn ToSql + Sync); 2] = [&from, &to];
    let (series, parts) = tokio::join!(
        link.client.query_opt(&which, &which_terms),
        link.client.query(&parts, &parts_terms),
    );
    let Some(series) = series? else { return Ok(Vec::new()) };
    let series: i64 = series.try_get(0)?;
    let mut ranges = Vec::new();
    for row in parts? {
        let (low, high): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
        ranges.push((low.max(from), high.min(to)));
    }
    if query.order == Order::Descending {
        ranges.reverse();
    }
    let statement = link.prepared(page_sql(query.order)).await?;
    // No message has these: nothing is excluded.
    let (after_at, after_seq) = after.unwrap_or(match query.order {
        Order::Ascending => (i64::MIN, -1),
        Order::Descending => (i64::MAX, i64::MAX),
    });
    let (mut found, mut names) = (Vec::new(), Names::of(book.current().dictionary));
    let (mut window, mut rest, mut bytes) = (WINDOW, ranges.as_slice(), 0);
    while !rest.is_empty() && found.len() < limit {
        let (part, more) = rest.split_at(window.min(rest.len()));
        (rest, window) = (more, window * 4);
        let low = part.iter().map(|(low, _)| *low).min().unwrap_or(from);
        let high = part.iter().map(|(_, high)| *high).max().unwrap_or(to);
        let left = i64::try_from(limit - found.len()).unwrap_or(i64::MAX);
        let terms: [&(dyn ToSql + Sync); 7] =
            [&series, &low, &high, &after_at, &after_seq, &left, &ANSWER_BYTES];
        let mut sent = 0;
        for row in link.client.query(&statement, &terms).await? {
            let (at, received, shard, seq): (i64, i64, i16, i64) =
                (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
            let body: &[u8] = row.try_get(4)?;
            sent += body.len();
            let place = (at, received, shard, seq);
            let params = params_of(link, book, body, &mut names).await?;
            match stored(query.series, place, params) {
                Ok(message) => {
                    bytes += message.params().content_bytes();
                    if bytes > Query::BYTES_MAX && !found.is_empty() {
                        return Ok(found);
                    }
                    found.push(message);
                }
                Err(damage) if found.is_empty() => return Err(damage),
                // The page ends before it; the next one tells.
                Err(_) => return Ok(found),
            }
        }
        if sent >= Query::BYTES_MAX {
            // The server cut it: what follows is for the next page.
            break;
        }
    }
    Ok(found)
}

/// A page of a series: of what the limit takes, as much as there is room for.
const fn page_sql(order: Order) -> &'static str {
    match order {
        Order::Ascending => {
            "SELECT at, received, shard, seq, body FROM (\
                SELECT at, received, shard, seq, body, sum(octet_length(body)) \
                    OVER (ORDER BY at, seq ROWS UNBOUNDED PRECEDING) AS total FROM messages \
                WHERE series = $1 AND at >= $2 AND at < $3 AND (at, seq) > ($4, $5) \
                ORDER BY at, seq LIMIT $6) AS page \
             WHERE total - octet_length(body) < $7 ORDER BY at, seq"
        }
        Order::Descending => {
            "SELECT at, received, shard, seq, body FROM (\
                SELECT at, received, shard, seq, body, sum(octet_length(body)) \
                    OVER (ORDER BY at DESC, seq DESC ROWS UNBOUNDED PRECEDING) AS total \
                FROM messages \
                WHERE series = $1 AND at >= $2 AND at < $3 AND (at, seq) < ($4, $5) \
                ORDER BY at DESC, seq DESC LIMIT $6) AS page \
             WHERE total - octet_length(body) < $7 ORDER BY at DESC, seq DESC"
        }
    }
}

/// Messages of a shard after a cursor, in order of arrival; `over` what cannot be read, or up to there.
pub(crate) async fn tail(
    shared: &Arc<Shared>,
    cursor: Cursor,
    limit: usize,
    over: bool,
) -> Result<Vec<Stored>, Fault> {
    let limit = limit.min(Query::LIMIT_MAX);
    if cursor.shard >= shared.shards || limit == 0 {
        return Ok(Vec::new());
    }
    let mut cursor = cursor;
    loop {
        let own = Arc::clone(shared);
        let page = shared.pool.run(move |link| {
            let shared = Arc::clone(&own);
            async move { tail_on(link, &shared.book, cursor, limit).await }.boxed()
        });
        let page = page.await?;
        if let Some(gap) = page.gap
            && !over
        {
            return Err(Fault::Gap(Box::new(gap)));
        }
        match page.upto {
            // All of it was passed over: it is no end.
            Some(upto) if over && page.found.is_empty() => cursor = upto,
            _ => return Ok(page.found.into_iter().map(|(_, message)| message).collect()),
        }
    }
}

/// A page of the tail.
#[derive(Default)]
pub(crate) struct Page {
    /// Messages with the ids of their series.
    pub(crate) found: Vec<(i64, Stored)>,
    /// Up to where it reaches; `None` where there is nothing.
    pub(crate) upto: Option<Cursor>,
    /// The first message that cannot be read. Where it comes first, those after it are there.
    pub(crate) gap: Option<Gap>,
}

/// What follows `cursor`: up to a message that cannot be read, or, where that comes first, what is after it.
pub(crate) async fn tail_on(
    link: &Link,
    book: &Book,
    cursor: Cursor,
    limit: usize,
) -> Result<Page, Fault> {
    // Up to where the shard is filled, and in which partitions the rest of it lies: of one moment.
    // What is appended later is beyond that.
    let ends = link
        .prepared(
            "SELECT s.seq, min(b.low), max(b.high) FROM shards s \
             JOIN ends e ON e.shard = s.shard AND e.seq > $2 JOIN buckets b USING (bucket) \
             WHERE s.shard = $1 GROUP BY s.seq",
        )
        .await?;
    let (shard, after) = (cursor.shard.cast_signed(), signed(cursor.seq));
    let Some(row) = link.client.query_opt(&ends, &[&shard, &after]).await? else {
        return Ok(Page::default());
    };
    let (newest, low, high): (i64, i64, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let page = link
        .prepared(
            "SELECT page.at, page.received, page.seq, page.body, page.series, \
                    s.account, s.kind, s.object \
             FROM (SELECT series, at, received, seq, body, sum(octet_length(body)) \
                    OVER (ORDER BY seq ROWS UNBOUNDED PRECEDING) AS total FROM messages \
                WHERE shard = $1 AND seq > $2 AND seq <= $3 AND at >= $4 \
                AND (at < $5 OR $5 = 9223372036854775807) \
                ORDER BY seq LIMIT $6) AS page LEFT JOIN series s ON s.id = page.series \
             WHERE total - octet_length(body) < $7 ORDER BY page.seq",
        )
        .await?;
    let count = i64::try_from(limit).unwrap_or(i64::MAX);
    let terms: [&(dyn ToSql + Sync); 7] =
        [&shard, &after, &newest, &low, &high, &count, &ANSWER_BYTES];
    let rows = link.client.query(&page, &terms).await?;
    let mut names = Names::of(book.current().dictionary);
    let mut all = Page::default();
    let mut bytes = 0;
    for row in &rows {
        let seq: i64 = row.try_get(2)?;
        let here = Cursor { shard: cursor.shard, seq: u64::try_from(seq).unwrap_or(0) };
        let params = params_of(link, book, row.try_get(3)?, &mut names).await?;
        match tailed(row, here, params) {
            Ok((id, message)) => {
                bytes += message.params().content_bytes();
                if bytes > Query::BYTES_MAX && !all.found.is_empty() {
                    return Ok(all);
                }
                all.found.push((id, message));
            }
            Err(Fault::Damaged(_)) if !all.found.is_empty() => return Ok(all),
            Err(Fault::Damaged(reason)) => match &mut all.gap {
                Some(gap) => gap.to = here,
                None => all.gap = Some(Gap { from: here, to: here, reason }),
            },
            Err(other) => return Err(other),
        }
        all.upto = Some(here);
    }
    Ok(all)
}

/// The parameters of a row. A name that was numbered since is looked up.
async fn params_of(
    link: &Link,
    book: &Book,
    body: &[u8],
    names: &mut Names,
) -> Result<Result<Params, Damage>, Fault> {
    let read = row::decode(body, names);
    if read != Err(UNNAMED) {
        return Ok(read);
    }
    names.dictionary = book.load(link).await?.dictionary;
    Ok(row::decode(body, names))
}

fn tailed(
    row: &Row,
    cursor: Cursor,
    params: Result<Params, Damage>,
) -> Result<(i64, Stored), Fault> {
    let (at, received, seq): (i64, i64, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let id: i64 = row.try_get(4)?;
    let account: Option<Uuid> = row.try_get(5)?;
    let Some(account) = account else {
        return Err(Fault::Damaged("its series is not there".to_owned()));
    };
    let series = series_of(account, row.try_get(6)?, row.try_get(7)?)?;
    let place = (at, received, cursor.shard.cast_signed(), seq);
    Ok((id, stored(series, place, params)?))
}

pub(crate) fn series_of(account: Uuid, kind: i16, object: Uuid) -> Result<Series, Fault> {
    let kind = u8::try_from(kind).ok().and_then(SeriesKind::from_u8);
    let kind = kind.ok_or_else(|| {
        Fault::Damaged("a series is of a kind that this version does not know".to_owned())
    })?;
    Ok(Series { account: AccountId(account), kind, object })
}

fn stored(
    series: Series,
    (at, received, shard, seq): (i64, i64, i16, i64),
    params: Result<Params, Damage>,
) -> Result<Stored, Fault> {
    let params = params.map_err(|damage| {
        let text = damage.0;
        Fault::Damaged(format!("message {seq} of shard {shard} cannot be read: {text}"))
    })?;
    let cursor = Cursor { shard: shard.cast_unsigned(), seq: u64::try_from(seq).unwrap_or(0) };
    let (at, received) = (Timestamp::from_micros(at), Timestamp::from_micros(received));
    Ok(Stored::read_back(series, at, received, params, cursor))
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
