//! What the history holds, by account: counted in the transaction of each append, and known here without
//! asking, since readiness and quotas ask all the time.
//!
//! Own commits are added at once; what other nodes stored is seen with the next look at the tables.

use std::collections::HashMap;
use std::sync::Arc;

use fieldline_contracts::HistoryStats;
use fieldline_model::AccountId;
use futures_util::FutureExt as _;
use parking_lot::Mutex;

use crate::connect::Link;
use crate::error::Fault;
use crate::pool::Pool;

/// What one row takes beside its parameters, indexes included: measured on a table filled in order of time.
pub(crate) const ROW_BYTES: u64 = 160;

/// What one commit added to one shard for one account.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Added {
    pub(crate) shard: u16,
    /// The shard's newest sequence after it.
    pub(crate) seq: i64,
    pub(crate) account: AccountId,
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
}

#[derive(Default)]
struct Known {
    totals: HashMap<AccountId, (u64, u64)>,
    partitions: u64,
    /// Up to which sequence of each shard the totals count.
    upto: HashMap<u16, i64>,
    /// What was committed since the look under way began.
    meanwhile: Option<Vec<Added>>,
}

impl Known {
    fn add(&mut self, added: &Added) {
        if self.upto.get(&added.shard).is_some_and(|upto| added.seq <= *upto) {
            return;
        }
        let total = self.totals.entry(added.account).or_default();
        total.0 += added.messages;
        total.1 += added.bytes;
    }
}

#[derive(Default)]
pub(crate) struct Usage {
    known: Mutex<Known>,
    looking: tokio::sync::Mutex<()>,
}

impl Usage {
    /// Counts what was committed.
    pub(crate) fn add(&self, added: &[Added]) {
        let mut known = self.known.lock();
        for one in added {
            known.add(one);
        }
        if let Some(meanwhile) = &mut known.meanwhile {
            meanwhile.extend_from_slice(added);
        }
    }

    pub(crate) fn stats(&self, account: Option<AccountId>) -> HistoryStats {
        let known = self.known.lock();
        let (messages, bytes) = match account {
            Some(account) => known.totals.get(&account).copied().unwrap_or_default(),
            None => known.totals.values().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1)),
        };
        HistoryStats { messages, bytes, segments: known.partitions, unsealed: 0 }
    }

    /// Looks at the tables. One at a time: an older look must not replace a newer one.
    pub(crate) async fn look(&self, pool: &Arc<Pool>) -> Result<(), Fault> {
        let _alone = self.looking.lock().await;
        self.known.lock().meanwhile = Some(Vec::new());
        let found = pool.run(|link| counted(link).boxed()).await;
        let mut known = self.known.lock();
        let meanwhile = known.meanwhile.take().unwrap_or_default();
        let (totals, upto, partitions) = found?;
        (known.totals, known.upto, known.partitions) = (totals, upto, partitions);
        for one in &meanwhile {
            known.add(one);
        }
        Ok(())
    }
}

type Counted = (HashMap<AccountId, (u64, u64)>, HashMap<u16, i64>, u64);

async fn counted(link: &Link) -> Result<Counted, Fault> {
    // One statement sees one moment: what is counted and up to where.
    let statement = link
        .prepared(
            "SELECT s.shard, s.seq, u.account, sum(u.messages)::bigint, sum(u.bytes)::bigint, \
             (SELECT count(*) FROM buckets) \
             FROM shards s LEFT JOIN usage u USING (shard) GROUP BY 1, 2, 3",
        )
        .await?;
    let (mut totals, mut upto, mut partitions) = (HashMap::new(), HashMap::new(), 0);
    for row in link.client.query(&statement, &[]).await? {
        let shard: i16 = row.try_get(0)?;
        upto.insert(u16::try_from(shard).unwrap_or(0), row.try_get(1)?);
        partitions = u64::try_from(row.try_get::<_, i64>(5)?).unwrap_or(0);
        let Some(account) = row.try_get::<_, Option<uuid::Uuid>>(2)? else { continue };
        let total: &mut (u64, u64) = totals.entry(AccountId(account)).or_default();
        total.0 += u64::try_from(row.try_get::<_, i64>(3)?).unwrap_or(0);
        total.1 += u64::try_from(row.try_get::<_, i64>(4)?).unwrap_or(0);
    }
    Ok((totals, upto, partitions))
}
