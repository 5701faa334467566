//! Last values, folded from the tail.
//!
//! `last_values` has the newest value of each parameter up to `folds.seq` of each shard; both are written
//! in one transaction, so any node may go on from there. Asked for, the rest of the tail is folded first.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use fieldline_contracts::state::{DEVICE_BYTES_MAX, PARAMS_MAX, cost};
use fieldline_model::{Cursor, ParamName, Series, SeriesKind, Stored, Timestamp, Value};
use futures_util::FutureExt as _;
use tokio_postgres::types::ToSql;

use crate::connect::Link;
use crate::error::Fault;
use crate::history::book::Book;
use crate::history::row::{
    Damage, Input, NEWER, Names, PARTS_MAX, put_bytes, put_signed, put_tagged, put_varint,
    take_format, take_tagged,
};
use crate::history::{Shared, read};
use crate::pool::whole;

/// Messages folded in one transaction.
const STEP: usize = 5_000;

/// Messages of a shard that may wait to be folded until somebody asks.
const BEHIND_MAX: i64 = 50_000;

/// Series in one answer of the server: each has [`DEVICE_BYTES_MAX`] at most.
const CHUNK: i64 = 250;

/// The format of `last_values.body`.
const FORMAT: u8 = 2;

/// The newest values of a series.
type Latest = BTreeMap<ParamName, (i64, Value)>;

/// Folds what is far behind; for the background. Leaves to another node what that one folds.
pub(crate) async fn behind(shared: &Arc<Shared>) -> Result<(), Fault> {
    for shard in 0..shared.shards {
        while !step(shared, shard, None).await? {}
    }
    Ok(())
}

/// Calls `visit` for each newest value of every message series.
pub(crate) async fn visit(
    shared: &Arc<Shared>,
    visit: &mut (dyn for<'a> FnMut(Series, &'a ParamName, &'a Value, Timestamp) + Send),
) -> Result<(), Fault> {
    for shard in 0..shared.shards {
        let newest = shared.pool.run(move |link| head(link, shard).boxed()).await?;
        while !step(shared, shard, Some(newest)).await? {}
    }
    let mut after = i64::MIN;
    loop {
        let chunk = shared.pool.run(move |link| chunk(link, after).boxed()).await?;
        let Some((last, _, _)) = chunk.last() else { return Ok(()) };
        after = *last;
        for (_, series, latest) in &chunk {
            for (name, (at, value)) in latest {
                visit(*series, name, value, Timestamp::from_micros(*at));
            }
        }
    }
}

/// Up to where a shard is filled.
async fn head(link: &Link, shard: u16) -> Result<i64, Fault> {
    let statement = link.prepared("SELECT seq FROM shards WHERE shard = $1").await?;
    Ok(link.client.query_one(&statement, &[&shard.cast_signed()]).await?.try_get(0)?)
}

async fn chunk(link: &Link, after: i64) -> Result<Vec<(i64, Series, Latest)>, Fault> {
    let statement = link
        .prepared(
            "SELECT l.series, l.body, s.account, s.kind, s.object \
             FROM last_values l JOIN series s ON s.id = l.series \
             WHERE l.series > $1 ORDER BY l.series LIMIT $2",
        )
        .await?;
    let mut names = Names::default();
    let mut found = Vec::new();
    for row in link.client.query(&statement, &[&after, &CHUNK]).await? {
        let id: i64 = row.try_get(0)?;
        let series = read::series_of(row.try_get(2)?, row.try_get(3)?, row.try_get(4)?)?;
        // What cannot be read must not keep the others from being known.
        let latest = decode(row.try_get(1)?, &mut names).unwrap_or_else(|damage| {
            tracing::error!(
                series = id,
                damage = damage.0,
                "the last values of a series cannot be read"
            );
            Latest::new()
        });
        found.push((id, series, latest));
    }
    Ok(found)
}

/// Folds the next messages of a shard, up to `target` or, without one, as long as it is far behind.
/// Returns whether that is done.
async fn step(shared: &Arc<Shared>, shard: u16, target: Option<i64>) -> Result<bool, Fault> {
    let own = Arc::clone(shared);
    shared
        .pool
        .run(move |link| {
            let shared = Arc::clone(&own);
            async move { whole(link, fold(link, &shared.book, shard, target)).await }.boxed()
        })
        .await
}

async fn fold(link: &Link, book: &Book, shard: u16, target: Option<i64>) -> Result<bool, Fault> {
    link.client.batch_execute("BEGIN").await?;
    let sql = match target {
        Some(_) => {
            "SELECT f.seq, s.seq FROM folds f JOIN shards s USING (shard) WHERE f.shard = $1 \
             FOR UPDATE OF f"
        }
        None => {
            "SELECT f.seq, s.seq FROM folds f JOIN shards s USING (shard) WHERE f.shard = $1 \
             FOR UPDATE OF f SKIP LOCKED"
        }
    };
    let statement = link.prepared(sql).await?;
    let number = shard.cast_signed();
    let row = link.client.query_opt(&statement, &[&number]).await?;
    let (from, newest): (i64, i64) = match &row {
        Some(row) => (row.try_get(0)?, row.try_get(1)?),
        None => (0, 0),
    };
    let done = match target {
        Some(target) => from >= target,
        None => newest - from < BEHIND_MAX,
    };
    if done {
        link.client.batch_execute("ROLLBACK").await?;
        return Ok(true);
    }
    let cursor = Cursor { shard, seq: u64::try_from(from).unwrap_or(0) };
    let page = read::tail_on(link, book, cursor, STEP).await?;
    if let Some(gap) = &page.gap {
        tracing::error!(%gap, "last values are made without what cannot be read");
    }
    // Where there is no more, retention took the rest.
    let upto = page.upto.map_or(newest, |upto| i64::try_from(upto.seq).unwrap_or(i64::MAX));
    put(link, &page.found).await?;
    let note = link.prepared("UPDATE folds SET seq = $2 WHERE shard = $1").await?;
    link.client.execute(&note, &[&number, &upto]).await?;
    link.client.batch_execute("COMMIT").await?;
    Ok(false)
}

/// Merges messages into the last values of their series.
async fn put(link: &Link, messages: &[(i64, Stored)]) -> Result<(), Fault> {
    let mut series: HashMap<i64, Latest> = HashMap::new();
    for (id, message) in messages {
        if message.series().kind == SeriesKind::Message {
            series.entry(*id).or_default();
        }
    }
    if series.is_empty() {
        return Ok(());
    }
    let ids: Vec<i64> = series.keys().copied().collect();
    let known =
        link.prepared("SELECT series, body FROM last_values WHERE series = ANY($1)").await?;
    let mut names = Names::default();
    for row in link.client.query(&known, &[&ids]).await? {
        let id = row.try_get(0)?;
        match decode(row.try_get(1)?, &mut names) {
            Ok(latest) => {
                series.insert(id, latest);
            }
            // A newer node's: to write ours over it would lose what it has.
            Err(NEWER) => {
                let what = "last values are folded by a newer program: update this node";
                return Err(Fault::Damaged(what.to_owned()));
            }
            Err(damage) => tracing::error!(
                series = id,
                damage = damage.0,
                "the last values of a series cannot be read, and begin anew"
            ),
        }
    }
    for (id, message) in messages {
        let Some(latest) = series.get_mut(id) else { continue };
        let at = message.timestamp().as_micros();
        for (name, value) in message.params() {
            match latest.get_mut(name) {
                // Of one instant the later message's: they come in order of arrival.
                Some(before) if before.0 > at => {}
                Some(before) => *before = (at, value.clone()),
                None => {
                    latest.insert(name.clone(), (at, value.clone()));
                }
            }
        }
    }
    let (mut ids, mut newest, mut bodies) = (Vec::new(), Vec::new(), Vec::new());
    for (id, mut latest) in series {
        bound(&mut latest);
        ids.push(id);
        newest.push(latest.values().map(|(at, _)| *at).max().unwrap_or(i64::MIN));
        bodies.push(encode(&latest));
    }
    let statement = link
        .prepared(
            "INSERT INTO last_values (series, newest, body) \
             SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bytea[]) \
             ON CONFLICT (series) DO UPDATE SET newest = EXCLUDED.newest, body = EXCLUDED.body",
        )
        .await?;
    let terms: [&(dyn ToSql + Sync); 3] = [&ids, &newest, &bodies];
    link.client.execute(&statement, &terms).await?;
    Ok(())
}

/// Lets go of what is beyond the bounds that all backends of last values keep, in count and in bytes: what was not set
/// for longest goes first. Without it, one device that makes up names could make a row that no statement can write,
/// and its whole shard would never be folded again.
fn bound(latest: &mut Latest) {
    let bytes: usize = latest.iter().map(|(name, (_, value))| cost(name, value)).sum();
    if latest.len() <= PARAMS_MAX && bytes <= DEVICE_BYTES_MAX {
        return;
    }
    let mut all: Vec<(ParamName, (i64, Value))> = std::mem::take(latest).into_iter().collect();
    // Of one instant in the order of names: the same ones stay each time.
    all.sort_by_key(|(_, (at, _))| std::cmp::Reverse(*at));
    let mut left = DEVICE_BYTES_MAX;
    for (name, last) in all {
        let cost = cost(&name, &last.1);
        if cost <= left && latest.len() < PARAMS_MAX {
            left -= cost;
            latest.insert(name, last);
        }
    }
}

fn encode(latest: &Latest) -> Vec<u8> {
    let mut out = vec![FORMAT];
    put_varint(&mut out, latest.len() as u64);
    for (name, (at, value)) in latest {
        put_bytes(&mut out, name.as_str().as_bytes());
        put_signed(&mut out, *at);
        put_tagged(&mut out, value);
    }
    out
}

fn decode(bytes: &[u8], names: &mut Names) -> Result<Latest, Damage> {
    let mut input = Input(bytes);
    take_format(&mut input, FORMAT)?;
    let mut latest = Latest::new();
    for _ in 0..input.count()? {
        let name = names.text(input.text()?)?;
        let at = input.signed()?;
        // The values of many messages: each may be as large as one.
        latest.insert(name, (at, take_tagged(&mut input, &mut { PARTS_MAX })?));
    }
    if input.is_empty() { Ok(latest) } else { Err(Damage("bytes are left after the values")) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn last_values_round_trip(all in prop::collection::btree_map("[a-z.]{1,12}", (any::<i64>(), any::<i64>()), 0..20)) {
            let latest: Latest = all
                .into_iter()
                .map(|(name, (at, n))| (ParamName::new(name).unwrap(), (at, Value::Int(n))))
                .collect();
            prop_assert_eq!(decode(&encode(&latest), &mut Names::default()), Ok(latest));
        }

        #[test]
        fn a_newer_format_is_told_from_damage(format in FORMAT + 1.., rest: Vec<u8>) {
            let newer = decode(&[&[format][..], &rest].concat(), &mut Names::default());
            prop_assert_eq!(newer, Err(NEWER));
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let _read = decode(&[&[FORMAT][..], &bytes].concat(), &mut Names::default());
        }
    }

    #[test]
    fn of_too_many_the_oldest_go() {
        let name = |n: usize| ParamName::new(format!("p{n:05}")).unwrap();
        let mut latest: Latest = (0..PARAMS_MAX + 10)
            .map(|n| (name(n), (i64::try_from(n).unwrap(), Value::Bool(true))))
            .collect();
        bound(&mut latest);
        assert_eq!(latest.len(), PARAMS_MAX);
        assert!(!latest.contains_key(&name(9)) && latest.contains_key(&name(10)));
    }
    /// A tenant that makes up names for large values must not keep the last values of others from being folded.
    #[test]
    fn of_too_large_the_oldest_go() {
        let name = |n: i64| ParamName::new(format!("p{n:05}")).unwrap();
        let large = |n: i64| (name(n), (n, Value::from("x".repeat(60 << 10))));
        let mut latest: Latest = (0..100).map(large).collect();
        bound(&mut latest);
        assert_eq!(
            latest.keys().cloned().collect::<Vec<_>>(),
            (96..100).map(name).collect::<Vec<_>>()
        );
        assert!(encode(&latest).len() <= DEVICE_BYTES_MAX);
        // One that alone is too large is absent; what is older stays.
        latest.insert(name(200), (200, Value::from("x".repeat(DEVICE_BYTES_MAX))));
        bound(&mut latest);
        assert!(latest.len() == 4 && !latest.contains_key(&name(200)));
    }
}
