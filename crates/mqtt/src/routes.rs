//! Which subscriptions a topic matches: a tree of levels.

use std::collections::HashMap;

/// How one subscription wants its messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// Highest QoS, 0 or 1.
    pub(crate) qos: u8,
    /// Not what this client published itself.
    pub(crate) no_local: bool,
    /// Keep the retain flag as published.
    pub(crate) retain_as_published: bool,
    /// What the client knows the subscription by; 0 for none.
    pub(crate) identifier: u32,
}

/// A subscription of a session.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// The session.
    pub(crate) session: u64,
    /// How it wants them.
    pub(crate) options: Options,
}

#[derive(Default)]
struct Node {
    children: HashMap<Box<str>, Node>,
    /// The level `+`.
    any: Option<Box<Node>>,
    /// Subscriptions that end here.
    here: Vec<Entry>,
    /// Subscriptions that go on with `#`: they match here and below.
    below: Vec<Entry>,
}

impl Node {
    fn is_empty(&self) -> bool {
        self.children.is_empty()
            && self.any.is_none()
            && self.here.is_empty()
            && self.below.is_empty()
    }
}

/// The subscriptions of one account. Filters were checked before: at most
/// [`crate::topic::LEVELS_MAX`] levels, which bounds the recursion.
#[derive(Default)]
pub(crate) struct Routes {
    root: Node,
}

impl Routes {
    /// Adds a subscription, in the place of one of the same session and filter.
    /// Returns whether it is new.
    pub(crate) fn insert(&mut self, filter: &str, entry: Entry) -> bool {
        let mut node = &mut self.root;
        for level in filter.split('/') {
            node = match level {
                "#" => return put(&mut node.below, entry),
                "+" => node.any.get_or_insert_default(),
                // Looked up twice, because `entry` would want an owned key each time.
                _ if node.children.contains_key(level) => match node.children.get_mut(level) {
                    Some(child) => child,
                    None => return false,
                },
                _ => node.children.entry(level.into()).or_default(),
            };
        }
        put(&mut node.here, entry)
    }

    /// Takes a subscription out. Returns whether it was there.
    pub(crate) fn remove(&mut self, filter: &str, session: u64) -> bool {
        remove(&mut self.root, &mut filter.split('/'), session)
    }

    /// Whether a topic that begins with `root` may match anything.
    pub(crate) fn listens_to(&self, root: &str) -> bool {
        self.root.any.is_some()
            || !self.root.below.is_empty()
            || self.root.children.contains_key(root)
    }

    /// Appends every subscription that matches `topic`.
    pub(crate) fn find(&self, topic: &str, hits: &mut Vec<Entry>) {
        find(&self.root, topic.split('/'), hits);
    }

    /// Whether there are none.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.root.is_empty()
    }
}

fn put(entries: &mut Vec<Entry>, entry: Entry) -> bool {
    match entries.iter_mut().find(|e| e.session == entry.session) {
        Some(present) => {
            *present = entry;
            false
        }
        None => {
            entries.push(entry);
            true
        }
    }
}

fn take(entries: &mut Vec<Entry>, session: u64) -> bool {
    match entries.iter().position(|e| e.session == session) {
        Some(at) => {
            entries.swap_remove(at);
            if entries.is_empty() {
                *entries = Vec::new();
            }
            true
        }
        None => false,
    }
}

fn remove(node: &mut Node, levels: &mut std::str::Split<'_, char>, session: u64) -> bool {
    match levels.next() {
        None => take(&mut node.here, session),
        Some("#") => take(&mut node.below, session),
        Some("+") => {
            let Some(any) = &mut node.any else { return false };
            let removed = remove(any, levels, session);
            if any.is_empty() {
                node.any = None;
            }
            removed
        }
        Some(level) => {
            let Some(child) = node.children.get_mut(level) else { return false };
            let removed = remove(child, levels, session);
            if child.is_empty() {
                node.children.remove(level);
            }
            removed
        }
    }
}

fn find(node: &Node, mut levels: std::str::Split<'_, char>, hits: &mut Vec<Entry>) {
    hits.extend_from_slice(&node.below);
    let Some(level) = levels.next() else {
        hits.extend_from_slice(&node.here);
        return;
    };
    if let Some(any) = &node.any {
        find(any, levels.clone(), hits);
    }
    if let Some(child) = node.children.get(level) {
        find(child, levels, hits);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::topic::matches;

    fn entry(session: u64) -> Entry {
        let options =
            Options { qos: 0, no_local: false, retain_as_published: false, identifier: 0 };
        Entry { session, options }
    }

    fn level() -> impl Strategy<Value = String> {
        prop_oneof![Just("a".to_owned()), Just("b".to_owned()), Just(String::new())]
    }

    fn filter() -> impl Strategy<Value = String> {
        let part = prop_oneof![4 => level(), 1 => Just("+".to_owned())];
        (proptest::collection::vec(part, 1..5), any::<bool>()).prop_map(|(mut parts, rest)| {
            if rest {
                parts.push("#".to_owned());
            }
            parts.join("/")
        })
    }

    proptest! {
        /// The tree finds what comparing each filter finds, and is empty after all are removed.
        #[test]
        fn the_tree_agrees_with_comparing_each_filter(
            filters in proptest::collection::vec(filter(), 0..12),
            topic in proptest::collection::vec(level(), 1..5).prop_map(|l| l.join("/")),
        ) {
            let mut routes = Routes::default();
            for (at, filter) in filters.iter().enumerate() {
                prop_assert!(routes.insert(filter, entry(at as u64)));
                prop_assert!(!routes.insert(filter, entry(at as u64)));
            }
            let mut hits = Vec::new();
            routes.find(&topic, &mut hits);
            let mut found: Vec<u64> = hits.iter().map(|e| e.session).collect();
            found.sort_unstable();
            let expected: Vec<u64> = filters
                .iter()
                .enumerate()
                .filter(|(_, f)| matches(f, &topic))
                .map(|(at, _)| at as u64)
                .collect();
            prop_assert_eq!(found, expected);
            for (at, filter) in filters.iter().enumerate() {
                prop_assert!(routes.remove(filter, at as u64));
                prop_assert!(!routes.remove(filter, at as u64));
            }
            prop_assert!(routes.is_empty());
        }
    }
}
