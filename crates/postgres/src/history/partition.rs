//! Makes partitions, ahead of time and when a message needs one.
//!
//! A partition is made as a table of its own and then attached, which keeps nobody from writing to the
//! others. Nodes make them one after the other, by a lock that only they take, and never while they hold
//! the lock of a shard: no two can wait for each other.

use crate::connect::Link;
use crate::error::Fault;
use crate::history::bucket::{Bucket, Calendar};
use crate::pool::whole;

/// Makes the partition of `bucket`, unless it is there.
pub(crate) async fn ensure(link: &Link, calendar: Calendar, bucket: Bucket) -> Result<(), Fault> {
    whole(link, make(link, calendar, bucket)).await
}

async fn make(link: &Link, calendar: Calendar, bucket: Bucket) -> Result<(), Fault> {
    let there = link.prepared("SELECT 1 FROM buckets WHERE bucket = $1").await?;
    if link.client.query_opt(&there, &[&bucket.0]).await?.is_some() {
        return Ok(());
    }
    link.client.batch_execute("BEGIN").await?;
    lock(link).await?;
    if link.client.query_opt(&there, &[&bucket.0]).await?.is_none() {
        let (low, high) = calendar.bounds(bucket);
        let from = low.map_or_else(|| "MINVALUE".to_owned(), |low| low.to_string());
        let to = high.map_or_else(|| "MAXVALUE".to_owned(), |high| high.to_string());
        // The check spares the server looking through the table when it is attached.
        let check = match (low, high) {
            (Some(low), Some(high)) => format!("at >= {low} AND at < {high}"),
            (Some(low), None) => format!("at >= {low}"),
            (None, Some(high)) => format!("at < {high}"),
            (None, None) => "true".to_owned(),
        };
        let table = bucket.table();
        let sql = format!(
            "CREATE TABLE {table} (LIKE messages INCLUDING ALL, CONSTRAINT bounds CHECK ({check})); \
             ALTER TABLE messages ATTACH PARTITION {table} FOR VALUES FROM ({from}) TO ({to}); \
             ALTER TABLE {table} DROP CONSTRAINT bounds"
        );
        link.client.batch_execute(&sql).await?;
        let note = link.prepared("INSERT INTO buckets (bucket, low, high) VALUES ($1, $2, $3)");
        let (low, high) = calendar.range(bucket);
        link.client.execute(&note.await?, &[&bucket.0, &low, &high]).await?;
        tracing::info!(table, "a partition of messages was made");
    }
    link.client.batch_execute("COMMIT").await?;
    Ok(())
}

/// Held by who makes or drops a partition, until the transaction ends.
pub(crate) async fn lock(link: &Link) -> Result<(), Fault> {
    let sql = "SELECT pg_advisory_xact_lock(hashtextextended('fieldline partition ' || current_schema(), 0))";
    let statement = link.prepared(sql).await?;
    link.client.query_one(&statement, &[]).await?;
    Ok(())
}
