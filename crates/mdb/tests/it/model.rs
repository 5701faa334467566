//! Random operations, faults and power cuts against a model: whatever happens, what
//! was acknowledged is there once, in its order, and the tail has no gap.

use std::collections::{BTreeMap, BTreeSet};

use fieldline_contracts::{History, Query};
use fieldline_mdb::Mdb;
use fieldline_model::{Accepted, Cursor, Series, Stored, Timestamp, Value};
use proptest::prelude::*;

use crate::common::{all, device, message, open, small};
use crate::fake_disk::FakeDisk;

#[derive(Clone, Debug)]
enum Op {
    /// Messages as device, second, content.
    Append(Vec<(u8, i64, i64)>),
    /// The batch of an earlier append again.
    Again(usize),
    Seal,
    Merge,
    Reopen,
    PowerCut(u64),
    /// The power goes in the middle of what comes next.
    PowerCutAfter(u64, u64),
    FailSyncs(u32),
    FailCuts(u32),
    Full(usize),
    SpaceAgain,
    Poll(usize),
}

fn any_op() -> impl Strategy<Value = Op> {
    let batch = prop::collection::vec((0_u8..4, 0_i64..40, 0_i64..3), 1..30);
    prop_oneof![
        12 => batch.prop_map(Op::Append),
        3 => any::<usize>().prop_map(Op::Again),
        3 => Just(Op::Seal),
        2 => Just(Op::Merge),
        1 => Just(Op::Reopen),
        2 => any::<u64>().prop_map(Op::PowerCut),
        2 => (0_u64..40, any::<u64>()).prop_map(|(n, seed)| Op::PowerCutAfter(n, seed)),
        1 => (1_u32..3).prop_map(Op::FailSyncs),
        1 => (1_u32..3).prop_map(Op::FailCuts),
        1 => (0_usize..2_000).prop_map(Op::Full),
        2 => Just(Op::SpaceAgain),
        3 => (1_usize..40).prop_map(Op::Poll),
    ]
}

type Content = (Series, i64, i64);

fn content(message: &Stored) -> Content {
    let n = message.params().get("n").unwrap().as_i64().unwrap();
    (message.series(), message.timestamp().as_micros(), n)
}

/// What must be true, and the store it is about.
struct World {
    disk: FakeDisk,
    store: Option<Mdb>,
    /// Acknowledged, with the place it was told; `None` if it was told a duplicate's.
    acknowledged: BTreeMap<Content, Option<Cursor>>,
    /// Tried without success: may be there.
    attempted: BTreeSet<Content>,
    batches: Vec<Vec<(u8, i64, i64)>>,
    /// A reader of the tail that stops and goes on.
    seen: Vec<Content>,
    cursor: Cursor,
    /// Seed of the power cut that is under way.
    dying: Option<u64>,
}

impl World {
    fn new() -> Self {
        let disk = FakeDisk::new();
        let store = Some(open(&disk.disk(), small()).unwrap());
        Self {
            disk,
            store,
            acknowledged: BTreeMap::new(),
            attempted: BTreeSet::new(),
            batches: Vec::new(),
            seen: Vec::new(),
            cursor: Cursor::default(),
            dying: None,
        }
    }

    fn store(&self) -> &Mdb {
        self.store.as_ref().unwrap()
    }

    async fn append(&mut self, batch: &[(u8, i64, i64)]) {
        let messages: Vec<Accepted> =
            batch.iter().map(|(d, at, n)| message(device(*d), *at, *n)).collect();
        let contents: Vec<Content> = messages
            .iter()
            .zip(batch)
            .map(|(m, (_, _, n))| (m.series(), m.timestamp().as_micros(), *n))
            .collect();
        match self.store().append(messages).await {
            Ok(receipts) => {
                for (content, receipt) in contents.into_iter().zip(receipts) {
                    let known = self.acknowledged.contains_key(&content);
                    let attempted = self.attempted.contains(&content);
                    assert!(
                        receipt.duplicate || !known,
                        "a duplicate was taken for new: {content:?}"
                    );
                    assert!(
                        !receipt.duplicate || known || attempted,
                        "new was taken for a duplicate: {content:?}"
                    );
                    if !known {
                        let place = (!receipt.duplicate).then_some(receipt.cursor);
                        self.acknowledged.insert(content, place);
                    }
                }
            }
            Err(_) => self.attempted.extend(contents),
        }
    }

    fn power_cut(&mut self, seed: u64) {
        // What the store does while it ends must not reach the disk any more.
        self.disk.cut_power_after(0);
        drop(self.store.take());
        self.disk = self.disk.after_power_cut(seed);
        self.store = Some(open(&self.disk.disk(), small()).unwrap());
        self.dying = None;
    }

    async fn poll(&mut self, page: usize) {
        let more = self.store().tail(self.cursor, page).await.unwrap();
        if let Some(last) = more.last() {
            self.cursor = last.cursor();
        }
        self.seen.extend(more.iter().map(content));
    }

    async fn check(&self) {
        let store = self.store();
        let mut total = 0;
        let mut by_read = BTreeMap::new();
        for number in 0..4 {
            let series = device(number);
            let messages = all(store, series).await;
            assert!(messages.is_sorted_by_key(|m| (m.timestamp(), m.cursor())));
            total += messages.len();
            let mut values: BTreeMap<String, (Value, Timestamp)> = BTreeMap::new();
            for message in &messages {
                let content = content(message);
                let told = self.acknowledged.get(&content);
                assert!(
                    told.is_some() || self.attempted.contains(&content),
                    "never sent: {content:?}"
                );
                if let Some(Some(place)) = told {
                    assert_eq!(message.cursor(), *place, "{content:?} moved");
                }
                assert!(by_read.insert(content, message.cursor()).is_none(), "twice: {content:?}");
                for (name, value) in message.params() {
                    values.insert(name.as_str().to_owned(), (value.clone(), message.timestamp()));
                }
            }
            let newest = store.read(&Query::newest(series, 10_000)).await.unwrap();
            assert!(newest.iter().rev().eq(messages.iter()), "backwards is not the reverse");
            let mut last = BTreeMap::new();
            let mut visit = |of: Series, name: &fieldline_model::ParamName, value: &Value, at| {
                if of == series {
                    last.insert(name.as_str().to_owned(), (value.clone(), at));
                }
            };
            store.last_values(&mut visit).await.unwrap();
            assert_eq!(last, values, "last values of device {number}");
        }
        for content in self.acknowledged.keys() {
            assert!(by_read.contains_key(content), "lost: {content:?}");
        }
        let tail = crate::common::tail(store, Cursor::default(), 17).await;
        assert!(tail.is_sorted_by_key(|m| m.cursor().seq));
        assert_eq!(tail.len(), total, "the tail and reads differ");
        assert!(tail.iter().all(|m| by_read.get(&content(m)) == Some(&m.cursor())));
        assert_eq!(store.stats(None).messages, total as u64);
    }

    async fn run(&mut self, op: Op) {
        match op {
            Op::Append(batch) => {
                self.append(&batch).await;
                self.batches.push(batch);
            }
            Op::Again(which) => {
                if !self.batches.is_empty() {
                    let batch = self.batches[which % self.batches.len()].clone();
                    self.append(&batch).await;
                }
            }
            // With faults these may fail; the checks tell whether that did harm.
            Op::Seal => drop(self.store().seal().await),
            Op::Merge => drop(self.store().merge().await),
            Op::Reopen => {
                drop(self.store.take());
                self.heal();
                match (open(&self.disk.disk(), small()), self.dying) {
                    (Ok(store), _) => self.store = Some(store),
                    // The power goes while it opens.
                    (Err(_), Some(seed)) if self.disk.is_dead() => self.power_cut(seed),
                    (Err(error), _) => panic!("{error}"),
                }
            }
            Op::PowerCut(seed) => self.power_cut(seed),
            Op::PowerCutAfter(changes, seed) => {
                self.disk.cut_power_after(changes);
                self.dying = Some(seed);
            }
            Op::FailSyncs(count) => self.disk.fail_syncs(count),
            Op::FailCuts(count) => self.disk.fail_cuts(count),
            Op::Full(bytes) => self.disk.set_space(Some(bytes)),
            Op::SpaceAgain => self.heal(),
            Op::Poll(page) => self.poll(page).await,
        }
        if let Some(seed) = self.dying
            && self.disk.is_dead()
        {
            self.power_cut(seed);
        }
    }

    fn heal(&self) {
        self.disk.set_space(None);
        self.disk.fail_syncs(0);
        self.disk.fail_cuts(0);
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_nothing_acknowledged_is_lost_or_doubled(
        ops in prop::collection::vec(any_op(), 1..60)
    ) {
        runtime().block_on(async {
            let mut world = World::new();
            for op in ops {
                let reopens = matches!(op, Op::Reopen | Op::PowerCut(_));
                world.run(op).await;
                if reopens {
                    world.check().await;
                }
            }
            if let Some(seed) = world.dying {
                world.power_cut(seed);
            }
            world.heal();
            world.check().await;
            // After faults it goes on by itself.
            world.append(&[(0, 1_000, 1), (1, 1_000, 1)]).await;
            assert!(world.acknowledged.keys().any(|(_, at, _)| *at > 1_800_000_900_000_000), "it did not recover");
            world.store().seal().await.unwrap();
            world.check().await;
            loop {
                let before = world.seen.len();
                world.poll(7).await;
                if world.seen.len() == before {
                    break;
                }
            }
            let seen: BTreeSet<&Content> = world.seen.iter().collect();
            assert_eq!(seen.len(), world.seen.len(), "the tail gave a message twice");
            for content in world.acknowledged.keys() {
                assert!(seen.contains(content), "the tail skipped {content:?}");
            }
        });
    }
}
