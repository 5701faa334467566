//! What is done beside the calls: partitions ahead, a look at what is stored, the fold of last values.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;

use crate::error::Fault;
use crate::history::{Shared, fold, partition};

/// Between two looks at the server.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Looks between two folds.
const FOLD_EVERY: u64 = 5;

/// Looks between two times that partitions are made ahead.
const AHEAD_EVERY: u64 = 300;

/// Partitions made ahead: today's, and those of the days after.
const DAYS_AHEAD: i64 = 3;

/// Body of the task; `part` is its number among those that can be in trouble.
pub(crate) async fn run(shared: Arc<Shared>, part: usize) {
    let mut turn = 0_u64;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        turn += 1;
        match shared.usage.look(&shared.pool).await {
            Ok(()) => shared.trouble.clear(part),
            Err(Fault::Exhausted(_)) => {}
            Err(fault) => shared.trouble.note(part, &shared.now(), &fault.to_string()),
        }
        let mut done = Ok(());
        if turn.is_multiple_of(AHEAD_EVERY) {
            done = partitions_ahead(&shared).await;
        }
        if turn.is_multiple_of(FOLD_EVERY) {
            done = done.and(fold::behind(&shared).await);
        }
        if let Err(fault) = done {
            tracing::warn!(%fault, "the history's upkeep is put off");
        }
    }
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
