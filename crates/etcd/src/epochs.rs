//! Epochs from revisions, which also grow when etcd has lost its data and begins to count again.
//!
//! An epoch is the minute in which the keyspace was made, counted from 2026, times 2²⁹, plus the revision. Minutes pass faster than
//! revisions are used up (a cluster writes a few each second), so that a keyspace made anew begins above all that was given
//! before. For 32 years epochs are below 2⁵³ and survive as numbers in JSON and Lua.

use std::sync::atomic::Ordering;

use etcd_client::{Compare, CompareOp, Error, PutOptions, Txn, TxnOp, TxnOpResponse};
use fieldline_contracts::Clock;
use fieldline_model::placement::Epoch;

use crate::{Inner, REQUEST_MAX};

/// Unix seconds of 2026-01-01.
const ORIGIN_S: i64 = 1_767_225_600;
/// Bits of the revision.
const REVISION_BITS: u32 = 29;

pub(crate) fn epoch(generation: u64, revision: i64) -> Epoch {
    Epoch((generation << REVISION_BITS).saturating_add(u64::try_from(revision).unwrap_or(0)))
}

/// The present minute.
fn minute(clock: &dyn Clock) -> u64 {
    let seconds = clock.now().as_micros() / 1_000_000 - ORIGIN_S;
    u64::try_from(seconds / 60).unwrap_or(0) + 1
}

impl Inner {
    /// Learns in which minute the keyspace was made; makes it where there is none. True when it is another than was known.
    pub(crate) async fn read_generation(&self) -> Result<bool, Error> {
        self.ask(REQUEST_MAX, Box::pin(self.ask_generation())).await
    }

    async fn ask_generation(&self) -> Result<bool, Error> {
        let known = self.generation.load(Ordering::Acquire);
        let new = minute(&*self.clock).max(known + 1);
        let mut client = self.client();
        let ttl = i64::try_from(self.ttl.as_secs()).unwrap_or(i64::MAX).saturating_add(1);
        // A keyspace that was just made is young for longer than a lease: nobody may claim yet.
        let young = client.lease_grant(ttl, None).await?.id();
        let key = self.keys.generation.as_str();
        let make = Txn::new()
            .when([Compare::create_revision(key, CompareOp::Equal, 0)])
            .and_then([
                TxnOp::put(key, new.to_string(), None),
                TxnOp::put(self.keys.young.as_str(), "", Some(PutOptions::new().with_lease(young))),
            ])
            .or_else([TxnOp::get(key, None)]);
        let answer = client.txn(make).await?;
        let generation = if answer.succeeded() {
            new
        } else {
            client.lease_revoke(young).await?;
            let stored = answer.op_responses().into_iter().find_map(|one| match one {
                TxnOpResponse::Get(found) => {
                    std::str::from_utf8(found.kvs().first()?.value()).ok()?.parse().ok()
                }
                _ => None,
            });
            stored.ok_or_else(|| {
                let text = format!("`{key}` holds no number: another program uses this prefix");
                Error::InvalidArgs(text)
            })?
        };
        self.generation.store(generation, Ordering::Release);
        Ok(known != 0 && generation != known)
    }
}

#[cfg(test)]
mod tests {
    use fieldline_contracts::TestClock;
    use fieldline_model::Timestamp;

    use super::*;

    #[test]
    fn epochs_grow_over_a_loss_of_all_data() {
        let at = |seconds| minute(&TestClock::at(Timestamp::from_seconds(ORIGIN_S + seconds)));
        let (before, after) = (at(600), at(660));
        assert!(epoch(before, 500_000_000) < epoch(after, 1));
        assert!(epoch(before, 7) < epoch(before, 8));
        let in_2057 = at(31 * 365 * 86_400);
        assert!(epoch(in_2057, i64::from(i32::MAX)).0 < 1 << 53);
    }
}
