//! Who holds what in a cluster: pure functions of a key and the names of the nodes.
//!
//! [`Rendezvous`] places modules, triggers and partitions: when a node comes or goes, only what it gains or leaves
//! behind moves. [`Ring`] places WebSocket devices where clients of XMiDT's redirector expect them. [`Rebalance`] turns
//! two placements into bounded steps.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::DeviceId;

/// A number that grows with every change of an owner: stores refuse what an older one writes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl std::fmt::Display for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// First half of MurmurHash3 x64-128 with seed 0.
fn murmur3(bytes: &[u8]) -> u64 {
    mur3::murmurhash3_x64_128(bytes, 0).0
}

/// Highest random weight: of all nodes, the one whose hash with the key is highest.
///
/// The score is the first half of MurmurHash3 x64-128 over `<node>-<key>`; of equal scores the greater name wins. That is
/// how PlaceOS places modules, so that both agree on who owns what.
#[derive(Clone, Debug, Default)]
pub struct Rendezvous {
    /// `<node>-` of each node, in order of names.
    prefixes: Vec<String>,
}

impl Rendezvous {
    /// Places over these nodes; a name that comes twice counts once.
    pub fn over<'a>(nodes: impl IntoIterator<Item = &'a str>) -> Self {
        let nodes: BTreeSet<&str> = nodes.into_iter().collect();
        Self { prefixes: nodes.into_iter().map(|node| format!("{node}-")).collect() }
    }

    /// The node that holds `key`; none where there are no nodes.
    #[must_use]
    pub fn owner(&self, key: &str) -> Option<&str> {
        let mut bytes = Vec::with_capacity(128);
        let score = |prefix: &&String| {
            bytes.clear();
            bytes.extend_from_slice(prefix.as_bytes());
            bytes.extend_from_slice(key.as_bytes());
            murmur3(&bytes)
        };
        // Of equal scores `max_by_key` takes the last, which has the greatest name.
        let prefix = self.prefixes.iter().max_by_key(score)?;
        prefix.strip_suffix('-')
    }
}

/// A ring of hashes on which each node has many places.
///
/// Place `i` of a node is the first half of MurmurHash3 x64-128 over `<i>=<node>`; a key belongs to the first place at
/// or after its own hash, around the ring. That is how XMiDT's redirector spreads devices.
#[derive(Clone, Debug, Default)]
pub struct Ring {
    nodes: Vec<String>,
    /// Hash and index of the node, in order.
    places: Vec<(u64, u32)>,
}

impl Ring {
    /// Places of each node unless told otherwise.
    pub const PLACES: u32 = 211;

    /// A ring of these nodes' host names; a name that comes twice counts once.
    pub fn over<'a>(nodes: impl IntoIterator<Item = &'a str>, places: u32) -> Self {
        let nodes: BTreeSet<&str> = nodes.into_iter().collect();
        let nodes: Vec<String> = nodes.into_iter().map(str::to_owned).collect();
        let mut all: Vec<(u64, u32)> = (0..)
            .zip(&nodes)
            .flat_map(|(index, node)| {
                (0..places).map(move |place| (murmur3(format!("{place}={node}").as_bytes()), index))
            })
            .collect();
        all.sort_unstable();
        Self { nodes, places: all }
    }

    /// The node that holds `key`; none where there are no nodes.
    #[must_use]
    pub fn owner(&self, key: &[u8]) -> Option<&str> {
        let hash = murmur3(key);
        let at = self.places.partition_point(|(place, _)| *place < hash);
        let (_, node) = self.places.get(at).or_else(|| self.places.first())?;
        self.nodes.get(usize::try_from(*node).ok()?).map(String::as_str)
    }
}

/// The partition of a device, of `count`: work of one device is done in one place, in order.
///
/// It must never change: cursors and leases are kept by partition.
#[must_use]
pub fn partition(device: DeviceId, count: u16) -> u16 {
    let count = u64::from(count.max(1));
    #[allow(clippy::cast_possible_truncation, reason = "the remainder is below a u16")]
    let partition = (murmur3(device.as_bytes()) % count) as u16;
    partition
}

/// One key that changes hands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Move {
    /// What moves.
    pub key: String,
    /// Who holds it now; nobody where its node is gone.
    pub from: Option<String>,
    /// Who is to hold it; nobody where there are no nodes.
    pub to: Option<String>,
}

/// What is left to do until every key is where it belongs.
///
/// Keys without a living owner come first: they are served by nobody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rebalance {
    moves: Vec<Move>,
}

impl Rebalance {
    /// The moves from who holds each key now to where `nodes` place it. A holder that is none of `nodes` is gone.
    #[must_use]
    pub fn plan(holders: &BTreeMap<String, Option<String>>, nodes: &BTreeSet<String>) -> Self {
        let placement = Rendezvous::over(nodes.iter().map(String::as_str));
        let mut moves: Vec<Move> = holders
            .iter()
            .filter_map(|(key, holder)| {
                let to = placement.owner(key);
                let from = holder.as_deref().filter(|holder| nodes.contains(*holder));
                (to != from).then(|| Move {
                    key: key.clone(),
                    from: from.map(str::to_owned),
                    to: to.map(str::to_owned),
                })
            })
            .collect();
        moves.sort_by_key(|one| one.from.is_some());
        Self { moves }
    }

    /// All moves, most urgent first.
    #[must_use]
    pub fn moves(&self) -> &[Move] {
        &self.moves
    }

    /// What may move now, at most `moves_max` keys that have an owner at a time, so that a rebalance disturbs few. Keys without one are
    /// never held back.
    pub fn step(&self, moves_max: usize) -> impl Iterator<Item = &Move> {
        let (orphans, owned): (Vec<_>, Vec<_>) =
            self.moves.iter().partition(|one| one.from.is_none());
        orphans.into_iter().chain(owned.into_iter().take(moves_max))
    }

    /// Whether every key is where it belongs.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.moves.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Published answers of PlaceOS.
    #[test]
    fn rendezvous_agrees_with_placeos() {
        let placement = Rendezvous::over(["node0", "node1"]);
        for (key, owner) in [("Ebert", "node0"), ("Stratton", "node1"), ("Pomeranz", "node0")] {
            assert_eq!(placement.owner(key), Some(owner), "{key}");
        }
        assert_eq!(Rendezvous::over([]).owner("Ebert"), None);
    }

    /// Known answers of XMiDT's redirector.
    #[test]
    fn the_ring_agrees_with_xmidt() {
        assert_eq!(murmur3(b"0=talaria-0"), 0x914c_13de_7a02_667b);
        assert_eq!(murmur3(b"mac:112233445566"), 0xc228_2373_3d6d_1e78);
        let ring = Ring::over(["talaria-0", "talaria-1", "talaria-2"], Ring::PLACES);
        for (key, owner) in [
            ("mac:112233445566", "talaria-2"),
            ("mac:14cfe2142142", "talaria-2"),
            ("mac:ffffffffdae4", "talaria-1"),
            ("uuid:1234", "talaria-0"),
            ("serial:A1", "talaria-1"),
        ] {
            assert_eq!(ring.owner(key.as_bytes()), Some(owner), "{key}");
        }
        assert_eq!(Ring::over([], Ring::PLACES).owner(b"uuid:1234"), None);
    }

    /// 30,000 sequential addresses over three nodes, counted by the reference.
    #[test]
    fn the_ring_spreads_as_xmidt_does() {
        let ring = Ring::over(["talaria-0", "talaria-1", "talaria-2"], Ring::PLACES);
        let mut counts = BTreeMap::new();
        for n in 0..30_000_u64 {
            let key = format!("mac:{:012x}", 0x1122_3344_0000_u64 + n);
            *counts.entry(ring.owner(key.as_bytes()).unwrap().to_owned()).or_insert(0_u32) += 1;
        }
        assert!(counts.values().all(|count| (9_000..11_000).contains(count)), "{counts:?}");
    }

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|n| format!("https://node-{n}.example:7080")).collect()
    }

    /// A join moves keys to the one who joins only, a leave from the one who leaves only, and
    /// not more than 1.05 of the share that must move, from 2 to 16 nodes and a million keys.
    #[test]
    #[allow(clippy::print_stdout, reason = "a test says what it measured")]
    fn joins_and_leaves_move_what_they_must() {
        const KEYS: u32 = 1_000_000;
        let names = names(16);
        // Who holds a key among the first n nodes follows from the scores alone, so each is made once.
        let prefixes: Vec<String> = names.iter().map(|name| format!("{name}-")).collect();
        let mut moved = [0_u32; 17];
        let mut bytes = Vec::new();
        for key in 0..KEYS {
            let mut best = 0;
            for (nodes, prefix) in (1..).zip(&prefixes) {
                bytes.clear();
                bytes.extend_from_slice(prefix.as_bytes());
                bytes.extend_from_slice(key.to_string().as_bytes());
                let score = murmur3(&bytes);
                // With one node more the key moves only where that one scores highest: leaving again moves the same keys.
                if score > best {
                    best = score;
                    moved[nodes] += 1;
                }
            }
        }
        for nodes in 2..=16_u32 {
            let moved = f64::from(moved[nodes as usize]);
            let share = f64::from(KEYS) / f64::from(nodes);
            println!(
                "placement: {KEYS} keys, a join to or a leave from {nodes} nodes moves {moved}, {:.4} of the share that must move",
                moved / share
            );
            assert!(moved <= share * 1.05 && moved >= share * 0.95, "{nodes} nodes: {moved}");
        }
        // The shortcut above is what `owner` answers.
        for nodes in [2, 5, 16] {
            let now = Rendezvous::over(names[..nodes].iter().map(String::as_str));
            let before = Rendezvous::over(names[..nodes - 1].iter().map(String::as_str));
            for key in (0..2_000).map(|key| key.to_string()) {
                let (now, before) = (now.owner(&key).unwrap(), before.owner(&key).unwrap());
                assert!(now == before || now == names[nodes - 1], "{key}: {before} to {now}");
            }
        }
    }

    #[test]
    fn a_plan_moves_orphans_first_and_the_others_in_steps() {
        let nodes: BTreeSet<String> = names(3).into_iter().collect();
        let old: Vec<String> = names(2);
        let before = Rendezvous::over(old.iter().map(String::as_str));
        let mut holders: BTreeMap<String, Option<String>> = (0..300)
            .map(|n| format!("module-{n}"))
            .map(|key| (key.clone(), before.owner(&key).map(str::to_owned)))
            .collect();
        for n in 0..20 {
            holders.insert(format!("orphan-{n}"), Some("gone".to_owned()));
        }
        let mut rounds = 0;
        loop {
            let plan = Rebalance::plan(&holders, &nodes);
            if plan.is_done() {
                break;
            }
            let step: Vec<Move> = plan.step(10).cloned().collect();
            assert!(step.iter().filter(|one| one.from.is_some()).count() <= 10);
            if rounds == 0 {
                assert!(step.iter().take(20).all(|one| one.key.starts_with("orphan")));
            }
            for one in step {
                holders.insert(one.key, one.to);
            }
            rounds += 1;
        }
        assert!(
            (8..=13).contains(&rounds),
            "{rounds} rounds for a third of 300 keys, ten at a time"
        );
    }

    proptest! {
        /// The order in which nodes are named does not matter, and every owner is one of them.
        #[test]
        fn placement_depends_on_the_set_alone(
            mut nodes in prop::collection::vec("[a-z0-9:/.-]{1,20}", 1..8), key in ".{0,40}",
        ) {
            let owners = |nodes: &[String]| {
                let names = || nodes.iter().map(String::as_str);
                let rendezvous = Rendezvous::over(names()).owner(&key).unwrap().to_owned();
                let ring = Ring::over(names(), 16).owner(key.as_bytes()).unwrap().to_owned();
                (rendezvous, ring)
            };
            let before = owners(&nodes);
            prop_assert!(nodes.contains(&before.0) && nodes.contains(&before.1));
            nodes.reverse();
            nodes.push(nodes[0].clone());
            prop_assert_eq!(before, owners(&nodes));
        }

        /// A ring moves keys to the one who joins, and to nobody else.
        #[test]
        fn a_ring_moves_only_to_who_joins(count in 1_usize..6, keys in prop::collection::vec(".{1,20}", 50)) {
            let names = names(count + 1);
            let before = Ring::over(names[..count].iter().map(String::as_str), 50);
            let after = Ring::over(names.iter().map(String::as_str), 50);
            let joined = names[count].as_str();
            for key in keys {
                let (was, is) = (before.owner(key.as_bytes()), after.owner(key.as_bytes()));
                prop_assert!(is == was || is == Some(joined));
            }
        }

        #[test]
        fn a_partition_is_one_of_them(bytes in any::<[u8; 16]>(), count in 0_u16..) {
            prop_assert!(partition(DeviceId::from_bytes(bytes), count) < count.max(1));
        }
    }
}
