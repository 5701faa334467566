//! What a group of changes does, one after the other, to the objects that it touches: decided here, so that
//! what one change may not do is no matter of the others. No I/O.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use fieldline_contracts::registry::UniqueIn;
use fieldline_contracts::{Actor, Draft, Kind, Record, RegistryError};
use fieldline_model::{AccountId, Timestamp};
use serde_json::Value as Json;
use uuid::Uuid;

/// What is to be changed, by whom and when.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) account: AccountId,
    pub(crate) actor: Actor,
    pub(crate) at: Timestamp,
    pub(crate) what: What,
}

#[derive(Debug)]
pub(crate) enum What {
    Create(Draft),
    Update(Draft, Option<u64>),
    Delete(Kind, Uuid, Option<u64>),
}

/// Names an object.
pub(crate) type Object = (Kind, Uuid);

impl Change {
    pub(crate) fn object(&self) -> Object {
        match &self.what {
            What::Create(draft) | What::Update(draft, _) => (draft.kind, draft.id),
            What::Delete(kind, id, _) => (*kind, *id),
        }
    }

    pub(crate) fn draft(&self) -> Option<&Draft> {
        match &self.what {
            What::Create(draft) | What::Update(draft, _) => Some(draft),
            What::Delete(..) => None,
        }
    }

    /// Bytes that it has the server take, about.
    pub(crate) fn bytes(&self) -> usize {
        256 + self.draft().map_or(0, |draft| json_bytes(&draft.body))
    }
}

fn json_bytes(json: &Json) -> usize {
    match json {
        Json::String(text) => 2 + text.len(),
        Json::Array(items) => items.iter().map(|item| 1 + json_bytes(item)).sum(),
        Json::Object(members) => {
            members.iter().map(|(name, value)| 4 + name.len() + json_bytes(value)).sum()
        }
        _ => 8,
    }
}

/// A key that one object of a kind has.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    pub(crate) kind: Kind,
    /// The account, or empty where it is unique on the installation.
    pub(crate) scope: Vec<u8>,
    pub(crate) key: String,
    pub(crate) value: Vec<u8>,
}

impl Key {
    pub(crate) fn of(
        kind: Kind,
        account: AccountId,
        key: &str,
        unique: &(UniqueIn, String),
    ) -> Self {
        let scope = match unique.0 {
            UniqueIn::Account => account.as_bytes().to_vec(),
            UniqueIn::Installation => Vec::new(),
        };
        Self { kind, scope, key: key.to_owned(), value: unique.1.as_bytes().to_vec() }
    }
}

/// An object as it stands.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stands {
    pub(crate) account: AccountId,
    pub(crate) revision: u64,
    pub(crate) body: Json,
}

/// An object that is touched.
#[derive(Debug, Default)]
pub(crate) struct Place {
    pub(crate) before: Option<Stands>,
    pub(crate) now: Option<Stands>,
    pub(crate) keys_before: BTreeSet<Key>,
    pub(crate) keys: BTreeSet<Key>,
}

/// An entry of the audit trail.
#[derive(Debug, PartialEq)]
pub(crate) struct Entry {
    /// Which of the group's changes.
    pub(crate) change: usize,
    pub(crate) sequence: u64,
    pub(crate) action: &'static str,
    pub(crate) changed: Vec<String>,
}

/// Objects and keys as the group's changes leave them.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// In the order that they are written in.
    pub(crate) places: BTreeMap<Object, Place>,
    owners: HashMap<Key, Uuid>,
    pub(crate) sequence: u64,
    pub(crate) entries: Vec<Entry>,
}

impl Plan {
    /// A plan on top of the change of this number.
    pub(crate) fn new(sequence: u64) -> Self {
        Self { sequence, ..Self::default() }
    }

    /// An object that was found.
    pub(crate) fn found(&mut self, object: Object, stands: Stands) {
        let place = self.places.entry(object).or_default();
        place.before = Some(stands.clone());
        place.now = Some(stands);
    }

    /// A key that was found, and whose it is.
    pub(crate) fn found_key(&mut self, key: Key, object: Uuid) {
        if let Some(place) = self.places.get_mut(&(key.kind, object)) {
            place.keys_before.insert(key.clone());
            place.keys.insert(key.clone());
        }
        self.owners.insert(key, object);
    }

    /// Makes the `at`th change of the group, if it may be made. Returns the object as it is now, or was.
    pub(crate) fn make(&mut self, at: usize, change: &Change) -> Result<Record, RegistryError> {
        let object @ (kind, id) = change.object();
        let account = change.account;
        let stands = self.places.get(&object).and_then(|place| place.now.as_ref());
        let (action, changed, removed) = match &change.what {
            What::Create(_) if stands.is_some() => {
                let (key, value) = ("id".to_owned(), id.to_string());
                return Err(RegistryError::Taken { kind, key, value });
            }
            What::Create(_) => ("create", Vec::new(), None),
            What::Update(draft, expected) => {
                let before = present(stands, change, *expected)?;
                ("update", differing(&before.body, &draft.body), None)
            }
            What::Delete(_, _, expected) => {
                let before = present(stands, change, *expected)?;
                ("delete", Vec::new(), Some(before.body.clone()))
            }
        };
        let mut keys = BTreeSet::new();
        for (name, unique) in change.draft().iter().flat_map(|draft| &draft.unique) {
            let key = Key::of(kind, account, name, unique);
            if self.owners.get(&key).is_some_and(|owner| *owner != id) {
                let (key, value) = ((*name).to_owned(), unique.1.clone());
                return Err(RegistryError::Taken { kind, key, value });
            }
            keys.insert(key);
        }
        // From here on it is made.
        self.sequence += 1;
        let revision = self.sequence;
        self.entries.push(Entry { change: at, sequence: revision, action, changed });
        let place = self.places.entry(object).or_default();
        for key in std::mem::replace(&mut place.keys, keys) {
            self.owners.remove(&key);
        }
        for key in &place.keys {
            self.owners.insert(key.clone(), id);
        }
        let body = removed.or_else(|| change.draft().map(|draft| draft.body.clone()));
        let body = body.unwrap_or(Json::Null);
        place.now = change.draft().map(|_| Stands { account, revision, body: body.clone() });
        Ok(Record { kind, id, account, revision, body })
    }
}

/// The object, which has to be there, the account's, and of the expected revision.
fn present<'a>(
    stands: Option<&'a Stands>,
    change: &Change,
    expected: Option<u64>,
) -> Result<&'a Stands, RegistryError> {
    let (kind, id) = change.object();
    let stands = stands.filter(|stands| stands.account == change.account);
    let stands = stands.ok_or(RegistryError::NotFound { kind, id })?;
    match expected {
        Some(expected) if expected != stands.revision => {
            Err(RegistryError::Changed { expected, found: stands.revision })
        }
        _ => Ok(stands),
    }
}

/// Names of top-level members that differ, those of the new body first.
fn differing(before: &Json, after: &Json) -> Vec<String> {
    let empty = serde_json::Map::new();
    let before = before.as_object().unwrap_or(&empty);
    let after = after.as_object().unwrap_or(&empty);
    let set = after.iter().filter(|(name, value)| before.get(*name) != Some(value));
    let gone = before.iter().filter(|(name, _)| !after.contains_key(*name));
    set.chain(gone).map(|(name, _)| name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const ACCOUNTS: [AccountId; 2] =
        [AccountId::from_bytes([1; 16]), AccountId::from_bytes([2; 16])];

    fn change() -> impl Strategy<Value = Change> {
        // Few objects and few keys, so that changes meet.
        let draft = (0_u128..4, vec((0_usize..2, any::<bool>(), 0_u8..3), 0..3), any::<u8>());
        let draft = draft.prop_map(|(id, keys, n)| Draft {
            kind: Kind::Device,
            id: Uuid::from_u128(id),
            unique: keys
                .into_iter()
                .map(|(name, own, value)| {
                    let scope = if own { UniqueIn::Account } else { UniqueIn::Installation };
                    (["ident", "name"][name], (scope, value.to_string()))
                })
                .collect(),
            body: serde_json::json!({ "n": n }),
        });
        let expected = prop_oneof![3 => Just(None), 1 => (1_u64..30).prop_map(Some)];
        (0_usize..2, draft, expected, 0_u8..4).prop_map(|(account, draft, expected, what)| Change {
            account: ACCOUNTS[account],
            actor: Actor::system("test"),
            at: Timestamp::from_seconds(1),
            what: match what {
                0 | 1 => What::Create(draft),
                2 => What::Update(draft, expected),
                _ => What::Delete(draft.kind, draft.id, expected),
            },
        })
    }

    /// What is stored after a plan: objects, and keys with their owners.
    type Stored = (BTreeMap<Object, Stands>, BTreeMap<Key, Uuid>);

    /// Makes `changes` as one group on what is stored.
    fn group(stored: &mut Stored, sequence: u64, changes: &[Change]) -> (Plan, Vec<String>) {
        let mut plan = Plan::new(sequence);
        for change in changes {
            if let Some(stands) = stored.0.get(&change.object()) {
                plan.found(change.object(), stands.clone());
            }
        }
        for (key, owner) in &stored.1 {
            let own = plan.places.contains_key(&(key.kind, *owner));
            let wanted = changes.iter().any(|change| {
                let unique = change.draft().into_iter().flat_map(|draft| &draft.unique);
                let mut keys =
                    unique.map(|(name, u)| Key::of(Kind::Device, change.account, name, u));
                keys.any(|wanted| wanted == *key)
            });
            if own || wanted {
                plan.found_key(key.clone(), *owner);
            }
        }
        let make = |(at, change)| format!("{:?}", plan.make(at, change));
        let answers = changes.iter().enumerate().map(make).collect();
        for (object, place) in &plan.places {
            assert_eq!(place.before.as_ref(), stored.0.get(object));
            stored.0.remove(object);
            stored.1.retain(|key, _| !place.keys_before.contains(key));
            if let Some(now) = &place.now {
                stored.0.insert(*object, now.clone());
            }
        }
        for (object, place) in &plan.places {
            for key in &place.keys {
                assert_eq!(stored.1.insert(key.clone(), object.1), None, "two have {key:?}");
            }
        }
        (plan, answers)
    }

    proptest! {
        /// However changes are grouped: the same answers, and the same is left.
        #[test]
        fn a_group_does_what_its_changes_do_one_by_one(
            changes in vec(change(), 0..24),
            cuts in vec(1_usize..9, 24),
        ) {
            let (mut singly, mut one_by_one) = (Stored::default(), Vec::new());
            let mut sequence = 0;
            for change in &changes {
                let (plan, answers) = group(&mut singly, sequence, std::slice::from_ref(change));
                sequence = plan.sequence;
                one_by_one.extend(answers);
            }
            let (mut grouped, mut in_groups, mut at) = (Stored::default(), Vec::new(), 0);
            let (mut rest, mut numbers) = (&changes[..], Vec::new());
            for cut in cuts {
                let (head, tail) = rest.split_at(cut.min(rest.len()));
                let (plan, answers) = group(&mut grouped, at, head);
                numbers.extend(plan.entries.iter().map(|entry| entry.sequence));
                at = plan.sequence;
                in_groups.extend(answers);
                rest = tail;
            }
            prop_assert_eq!(in_groups, one_by_one);
            prop_assert_eq!(grouped, singly);
            prop_assert!(numbers.iter().copied().eq(1..=sequence), "numbers have a gap");
        }
    }
}
