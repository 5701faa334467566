//! Keeps the audit trail from growing for ever.

use crate::connect::Link;
use crate::error::Fault;
use crate::pool::whole;

/// Entries deleted in one statement.
const STEP: i64 = 10_000;

/// Entries of the installation that are never let go of, whosever they are: nodes that follow the changes read
/// them, and one that stood still for a while must not miss any.
pub(crate) const RECENT: u64 = 100_000;

/// Lets go of the oldest of a trail that has more than `most` entries: of those accounts that have more than
/// their share, so that one that changes much cannot push out the trail of another; but never of the `recent`
/// newest of all. One node does it at a time.
pub(crate) async fn trim(link: &Link, most: u64, recent: u64) -> Result<(), Fault> {
    let newest = crate::registry::read::newest(link).await?;
    let upto = i64::try_from(newest.saturating_sub(recent)).unwrap_or(i64::MAX);
    let counted = "SELECT account, count(*) FROM audit GROUP BY account ORDER BY count(*)";
    let rows = link.client.query(counted, &[]).await?;
    let mut left = most;
    let mut accounts = u64::try_from(rows.len()).unwrap_or(u64::MAX);
    for row in rows {
        let account: uuid::Uuid = row.try_get(0)?;
        let count = u64::try_from(row.try_get::<_, i64>(1)?).unwrap_or(0);
        // From the smallest: what it leaves of its share is for the others.
        let share = left / accounts.max(1);
        if count > share {
            let keep = i64::try_from(share).unwrap_or(i64::MAX);
            while whole(link, step(link, account, keep, upto)).await? >= STEP {}
        }
        left -= count.min(share);
        accounts = accounts.saturating_sub(1);
    }
    Ok(())
}

async fn step(link: &Link, account: uuid::Uuid, keep: i64, upto: i64) -> Result<i64, Fault> {
    link.client.batch_execute("BEGIN").await?;
    let lock = "SELECT pg_try_advisory_xact_lock(hashtextextended('fieldline trim ' || current_schema(), 0))";
    let mine: bool = link.client.query_one(lock, &[]).await?.try_get(0)?;
    let mut gone = 0;
    if mine {
        let sql = "DELETE FROM audit WHERE sequence IN (\
                     SELECT sequence FROM audit WHERE account = $1 AND sequence <= (\
                       SELECT sequence FROM audit WHERE account = $1 \
                       ORDER BY sequence DESC LIMIT 1 OFFSET $2) \
                     AND sequence <= $4 ORDER BY sequence LIMIT $3)";
        let count = link.client.execute(sql, &[&account, &keep, &STEP, &upto]).await?;
        gone = i64::try_from(count).unwrap_or(0);
    }
    link.client.batch_execute("COMMIT").await?;
    Ok(gone)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use fieldline_testkit::servers::Postgres;

    use super::*;
    use crate::connect::Servers;
    use crate::{Settings, migrate};

    #[tokio::test]
    async fn who_changes_much_trims_only_his_own_trail() {
        let server = Postgres::start();
        let servers = Arc::new(Servers::new(&Settings::new(server.url())).unwrap());
        let link = servers.connect().await.unwrap();
        migrate::prepare(&link, &servers, true).await.unwrap();
        for (account, from, to) in [(1_u128, 1_i64, 10_i64), (2, 11, 210), (3, 211, 260)] {
            let sql = "INSERT INTO audit (sequence, at, account, actor, action, kind, object, changed) \
                       SELECT n, 0, $1, 'a', 'create', 'device', $1, '[]' FROM generate_series($2::bigint, $3::bigint) n";
            let account = uuid::Uuid::from_u128(account);
            link.client.execute(sql, &[&account, &from, &to]).await.unwrap();
        }
        link.client.batch_execute("UPDATE counter SET sequence = 260").await.unwrap();
        let left = async || {
            let mut left = Vec::new();
            for account in 1..=3 {
                let sql = "SELECT count(*), max(sequence) FROM audit WHERE account = $1";
                let account = uuid::Uuid::from_u128(account);
                let row = link.client.query_one(sql, &[&account]).await.unwrap();
                left.push((row.get::<_, i64>(0), row.get::<_, i64>(1)));
            }
            left
        };
        trim(&link, 100, 160).await.unwrap();
        assert_eq!(left().await, [(10, 10), (110, 210), (50, 260)], "who follows may be at 100");
        trim(&link, 100, 0).await.unwrap();
        assert_eq!(left().await, [(10, 10), (45, 210), (45, 260)], "the newest of each stay");
    }
}
