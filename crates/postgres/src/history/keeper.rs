//! What is done beside the calls: partitions ahead, a look at what is stored, the fold of last values.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;

use crate::connect::Link;
use crate::error::Fault;
use crate::history::{Shared, fold, partition};

/// Between two looks whether the server is there and nobody holds up the others.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Looks between two counts of what is stored, and two folds.
const COUNT_EVERY: u64 = 5;

/// Looks between two times that partitions are made ahead.
const AHEAD_EVERY: u64 = 300;

/// Partitions made ahead: today's, and those of the days after.
const DAYS_AHEAD: i64 = 3;

/// Body of the task; `part` is its number among those that can be in trouble.
pub(crate) async fn run(shared: Arc<Shared>, part: usize) {
    let mut turn = 0_u64;
    // As long as a writer may take for one attempt.
    let limit = shared.servers.statement_timeout + Duration::from_secs(1);
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        turn += 1;
        let there = if turn.is_multiple_of(COUNT_EVERY) {
            shared.usage.look(&shared.pool).await
        } else {
            shared.pool.run(move |link| reap(link, limit).boxed()).await
        };
        match there {
            Ok(()) => shared.trouble.clear(part),
            Err(Fault::Exhausted(_)) => {}
            Err(fault) => shared.trouble.note(part, &shared.now(), &fault.to_string()),
        }
        let learner = Arc::clone(&shared);
        let learnt = shared.pool.run(move |link| {
            let shared = Arc::clone(&learner);
            async move { shared.book.learn(link).await }.boxed()
        });
        let mut done = learnt.await;
        if turn.is_multiple_of(AHEAD_EVERY) {
            done = done.and(partitions_ahead(&shared).await);
        }
        if turn.is_multiple_of(COUNT_EVERY) {
            done = done.and(fold::behind(&shared).await);
        }
        if let Err(fault) = done {
            tracing::warn!(%fault, "the history's upkeep is put off");
        }
    }
}

/// Ends sessions that hold shards and wait for a node that says nothing more: one that stands still, or is
/// behind a dead link, in the middle of a COPY. There the server's own limits do not hold: a COPY that waits for
/// its client is not cancelled. Its owner has given up by then, if it can.
async fn reap(link: &Link, limit: Duration) -> Result<(), Fault> {
    let statement = link
        .prepared(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
             WHERE datname = current_database() AND usename = current_user \
             AND state = 'active' AND wait_event = 'ClientRead' AND query LIKE 'COPY messages%' \
             AND query_start < clock_timestamp() - $1 * interval '1 millisecond'",
        )
        .await?;
    let limit_ms = limit.as_secs_f64() * 1e3;
    let ended: i64 = link.client.query_one(&statement, &[&limit_ms]).await?.try_get(0)?;
    if ended > 0 {
        tracing::warn!(
            ended,
            "sessions of a node that says nothing more were ended: they held shards"
        );
    }
    Ok(())
}

/// Makes the partitions of today and the next days.
pub(crate) async fn partitions_ahead(shared: &Arc<Shared>) -> Result<(), Fault> {
    let now = shared.now();
    for day in 0..DAYS_AHEAD {
        let at = now.plus_micros(day * 86_400 * 1_000_000);
        let (calendar, bucket) = (shared.calendar, shared.calendar.bucket(at.as_micros()));
        shared.pool.run(move |link| partition::ensure(link, calendar, bucket).boxed()).await?;
    }
    Ok(())
}
