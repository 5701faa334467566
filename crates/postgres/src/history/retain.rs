//! Retention: what is too old or too much goes, by whole partitions where they hold nobody else's.
//!
//! A day goes when all of it is too old. Where a partition holds several accounts, the rows of one are
//! deleted in small transactions, each under the lock of one shard, so that appends are held up for
//! moments only.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::Retention;
use fieldline_model::{AccountId, Series};
use futures_util::FutureExt as _;

use crate::connect::Link;
use crate::error::{Fault, Verdict};
use crate::history::bucket::Bucket;
use crate::history::writer::shard_of;
use crate::history::{Shared, partition, read};
use crate::pool::whole;

/// Rows deleted in one transaction.
const STEP: i64 = 10_000;

/// Series of an account that are looked at together.
const SERIES: i64 = 5_000;

/// How often dropping a partition is tried while others read from it; then its rows are deleted.
const DROP_TRIES: u32 = 5;

/// How often the time is found anew before which enough has gone.
const CUTS_MAX: u32 = 16;

const DAY_MICROS: i64 = 86_400 * 1_000_000;

/// What an account has in one partition.
#[derive(Clone, Copy)]
struct Share {
    bucket: Bucket,
    low: i64,
    high: i64,
    bytes: i64,
}

pub(crate) async fn retain(shared: &Arc<Shared>, retention: Retention) -> Result<u64, Fault> {
    let Retention { account, before, bytes_max } = retention;
    if before.is_none() && bytes_max.is_none() {
        return Ok(0);
    }
    let mut freed = 0;
    let mut gone_before = i64::MIN;
    if let Some(before) = before {
        // By whole days, also in partitions that are longer.
        let before = before.as_micros().div_euclid(DAY_MICROS).saturating_mul(DAY_MICROS);
        gone_before = before;
        for share in shares(shared, account).await? {
            if share.high <= before {
                freed += take(shared, account, share.bucket).await?;
            } else if share.low < before {
                freed += delete(shared, account, share.bucket, before).await?;
            }
        }
    }
    if let Some(bytes_max) = bytes_max {
        let bytes_max = i64::try_from(bytes_max).unwrap_or(i64::MAX);
        freed += shrink(shared, account, bytes_max).await?;
    }
    shared.pool.run(move |link| forget(link, account, gone_before).boxed()).await?;
    shared.usage.look(&shared.pool).await?;
    Ok(freed)
}

/// Lets the oldest go until no more than `bytes_max` is left.
async fn shrink(shared: &Arc<Shared>, account: AccountId, bytes_max: i64) -> Result<u64, Fault> {
    let mut freed = 0;
    for turn in 0..CUTS_MAX {
        let shares = shares(shared, account).await?;
        let excess = shares.iter().map(|share| share.bytes).sum::<i64>() - bytes_max;
        let Some(oldest) = shares.first().filter(|_| excess > 0) else { return Ok(freed) };
        if shares.len() > 1 || bytes_max == 0 {
            // A day more or less; it is bounded by what one day holds.
            let mut excess = excess;
            for share in shares.iter().take(shares.len() - usize::from(bytes_max > 0)) {
                if excess > 0 {
                    freed += take(shared, account, share.bucket).await?;
                    excess -= share.bytes;
                }
            }
            continue;
        }
        // One partition alone: as if it had come evenly, and then again.
        let bucket = oldest.bucket;
        let span = shared.pool.run(move |link| span(link, account, bucket).boxed()).await?;
        let Some((from, until)) = span else { return Ok(freed) };
        let part =
            (i128::from(until) - i128::from(from)) * i128::from(excess) * i128::from(turn + 1)
                / i128::from(oldest.bytes.max(1));
        let cut = from.saturating_add(i64::try_from(part).unwrap_or(i64::MAX)).saturating_add(1);
        freed += delete(shared, account, oldest.bucket, cut).await?;
    }
    Ok(freed)
}

/// What the account has, oldest first.
async fn shares(shared: &Arc<Shared>, account: AccountId) -> Result<Vec<Share>, Fault> {
    shared.pool.run(move |link| shares_on(link, account).boxed()).await
}

async fn shares_on(link: &Link, account: AccountId) -> Result<Vec<Share>, Fault> {
    let statement = link
        .prepared(
            "SELECT b.bucket, b.low, b.high, sum(u.bytes)::bigint FROM usage u JOIN buckets b \
             USING (bucket) WHERE u.account = $1 AND u.messages > 0 GROUP BY 1, 2, 3 ORDER BY b.low",
        )
        .await?;
    let mut shares = Vec::new();
    for row in link.client.query(&statement, &[&account.0]).await? {
        shares.push(Share {
            bucket: Bucket(row.try_get(0)?),
            low: row.try_get(1)?,
            high: row.try_get(2)?,
            bytes: row.try_get(3)?,
        });
    }
    Ok(shares)
}

/// The times of the first and the last message of an account in a partition.
async fn span(
    link: &Link,
    account: AccountId,
    bucket: Bucket,
) -> Result<Option<(i64, i64)>, Fault> {
    let table = bucket.table();
    let sql = format!(
        "SELECT min((SELECT at FROM {table} m WHERE m.series = s.id ORDER BY at LIMIT 1)), \
                max((SELECT at FROM {table} m WHERE m.series = s.id ORDER BY at DESC LIMIT 1)) \
         FROM series s WHERE s.account = $1"
    );
    let statement = link.prepared(&sql).await?;
    let row = link.client.query_one(&statement, &[&account.0]).await?;
    let (first, last): (Option<i64>, Option<i64>) = (row.try_get(0)?, row.try_get(1)?);
    Ok(first.zip(last))
}

/// Takes all that an account has in a partition; the partition itself where nobody else has anything there.
async fn take(shared: &Arc<Shared>, account: AccountId, bucket: Bucket) -> Result<u64, Fault> {
    for _ in 0..DROP_TRIES {
        let dropped = shared
            .pool
            .run(move |link| {
                async move { whole(link, drop_partition(link, account, bucket)).await }.boxed()
            })
            .await;
        match dropped {
            Ok(Some(bytes)) => return Ok(bytes),
            Ok(None) => break,
            Err(fault) if fault.verdict() == Verdict::Again => {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Err(fault) => return Err(fault),
        }
    }
    delete(shared, account, bucket, i64::MAX).await
}

/// Drops the partition, unless others have messages there. Nobody appends meanwhile.
async fn drop_partition(
    link: &Link,
    account: AccountId,
    bucket: Bucket,
) -> Result<Option<u64>, Fault> {
    // Appends wait for as long as we do: not for long.
    link.client.batch_execute("BEGIN; SET LOCAL lock_timeout = '500ms'").await?;
    let all = link.prepared("SELECT shard FROM shards ORDER BY shard FOR UPDATE").await?;
    link.client.query(&all, &[]).await?;
    partition::lock(link).await?;
    let held = link
        .prepared(
            "SELECT count(*) FILTER (WHERE account <> $2 AND messages > 0), \
             coalesce(sum(bytes), 0)::bigint FROM usage WHERE bucket = $1",
        )
        .await?;
    let row = link.client.query_one(&held, &[&bucket.0, &account.0]).await?;
    let (others, bytes): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    if others > 0 {
        link.client.batch_execute("ROLLBACK").await?;
        return Ok(None);
    }
    let (table, number) = (bucket.table(), bucket.0);
    let sql = format!(
        "DROP TABLE IF EXISTS {table}; DELETE FROM usage WHERE bucket = {number}; \
         DELETE FROM ends WHERE bucket = {number}; DELETE FROM buckets WHERE bucket = {number}; COMMIT"
    );
    link.client.batch_execute(&sql).await?;
    tracing::info!(table, bytes, "a partition of messages was dropped");
    Ok(Some(u64::try_from(bytes).unwrap_or(0)))
}

/// Deletes what an account has in a partition from before `before`.
async fn delete(
    shared: &Arc<Shared>,
    account: AccountId,
    bucket: Bucket,
    before: i64,
) -> Result<u64, Fault> {
    let (mut freed, mut after) = (0, i64::MIN);
    loop {
        let page = shared.pool.run(move |link| series_after(link, account, after).boxed()).await?;
        let Some((last, _)) = page.last() else { return Ok(freed) };
        after = *last;
        // A series is of one shard: to look for the shard's rows among those of all series would read the rest of the
        // partition again and again, with the shard locked.
        let mut shards: BTreeMap<u16, Vec<i64>> = BTreeMap::new();
        for (id, series) in page {
            if let Some(series) = series {
                shards.entry(shard_of(&series, shared.shards)).or_default().push(id);
            }
        }
        for (shard, series) in shards {
            let series: Arc<[i64]> = series.into();
            loop {
                let own = Arc::clone(&series);
                let (count, bytes) = shared
                    .pool
                    .run(move |link| {
                        let series = Arc::clone(&own);
                        let shard = shard.cast_signed();
                        async move {
                            let of = (account, shard, &*series);
                            whole(link, delete_some(link, of, bucket, before)).await
                        }
                        .boxed()
                    })
                    .await?;
                freed += u64::try_from(bytes).unwrap_or(0);
                if count < STEP {
                    break;
                }
            }
        }
    }
}

/// The next series of an account; `None` for one of a kind that only a newer program knows, which lets go of it itself.
async fn series_after(
    link: &Link,
    account: AccountId,
    after: i64,
) -> Result<Vec<(i64, Option<Series>)>, Fault> {
    let statement = link
        .prepared(
            "SELECT id, kind, object FROM series WHERE account = $1 AND id > $2 ORDER BY id LIMIT $3",
        )
        .await?;
    let mut found = Vec::new();
    for row in link.client.query(&statement, &[&account.0, &after, &SERIES]).await? {
        found.push((
            row.try_get(0)?,
            read::series_of(account.0, row.try_get(1)?, row.try_get(2)?).ok(),
        ));
    }
    Ok(found)
}

/// Deletes some rows of `series`, all of one shard of an account.
async fn delete_some(
    link: &Link,
    (account, shard, series): (AccountId, i16, &[i64]),
    bucket: Bucket,
    before: i64,
) -> Result<(i64, i64), Fault> {
    link.client.batch_execute("BEGIN").await?;
    let lock = link.prepared("SELECT seq FROM shards WHERE shard = $1 FOR UPDATE").await?;
    link.client.query(&lock, &[&shard]).await?;
    let there = link.prepared("SELECT 1 FROM buckets WHERE bucket = $1").await?;
    if link.client.query_opt(&there, &[&bucket.0]).await?.is_none() {
        link.client.batch_execute("ROLLBACK").await?;
        return Ok((0, 0));
    }
    let table = bucket.table();
    let sql = format!(
        "WITH gone AS (DELETE FROM {table} WHERE ctid = ANY (ARRAY(\
            SELECT m.ctid FROM unnest($1::bigint[]) AS s (id) JOIN {table} m ON m.series = s.id \
            WHERE m.at < $2 LIMIT $3)) \
            RETURNING octet_length(body) + $4::integer AS bytes) \
         SELECT count(*), coalesce(sum(bytes), 0)::bigint FROM gone"
    );
    let statement = link.prepared(&sql).await?;
    let row_bytes = i32::try_from(crate::history::usage::ROW_BYTES).unwrap_or(0);
    let row = link.client.query_one(&statement, &[&series, &before, &STEP, &row_bytes]).await?;
    let (count, bytes): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    let note = link
        .prepared(
            "UPDATE usage SET messages = messages - $4, bytes = bytes - $5 \
             WHERE shard = $1 AND bucket = $2 AND account = $3",
        )
        .await?;
    link.client.execute(&note, &[&shard, &bucket.0, &account.0, &count, &bytes]).await?;
    let clear = link
        .prepared(
            "DELETE FROM usage WHERE shard = $1 AND bucket = $2 AND account = $3 AND messages <= 0",
        )
        .await?;
    link.client.execute(&clear, &[&shard, &bucket.0, &account.0]).await?;
    link.client.batch_execute("COMMIT").await?;
    Ok((count, bytes))
}

/// Lets go of the last values of series of which nothing is left.
async fn forget(link: &Link, account: AccountId, before: i64) -> Result<(), Fault> {
    let statement = link
        .prepared(
            "DELETE FROM last_values l USING series s \
             WHERE s.id = l.series AND s.account = $1 AND l.newest < $2",
        )
        .await?;
    link.client.execute(&statement, &[&account.0, &before]).await?;
    Ok(())
}
