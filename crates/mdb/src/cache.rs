//! What was decoded a short while ago, within a bound of bytes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::block::Block;
use crate::index::{SeriesPage, ShapePage};
use crate::tail::Window;

/// What is kept. The first number is the shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    /// A page of the index of a segment, by its number.
    SeriesPage(u16, u64, usize),
    /// A page of the shapes of a segment, by its number.
    ShapePage(u16, u64, usize),
    /// The times of a block, by its offset.
    Times(u16, u64, u64),
    /// A block of a segment, by its offset.
    Block(u16, u64, u64),
    /// Sealed messages in order of arrival: first and last sequence, and how often retention ran.
    Window(u16, u64, u64, u64),
}

#[derive(Clone)]
pub(crate) enum Item {
    SeriesPage(Arc<SeriesPage>),
    ShapePage(Arc<ShapePage>),
    Times(Arc<[i64]>),
    Block(Arc<Block>),
    Window(Arc<Window>),
    /// A window that is too large: its parts are kept.
    TooLarge,
}

struct Entry {
    item: Item,
    bytes: usize,
    used: u64,
}

#[derive(Default)]
struct Content {
    entries: HashMap<Key, Entry>,
    /// By last use, oldest first.
    order: BTreeMap<u64, Key>,
    bytes: usize,
    uses: u64,
}

/// Forgets what was not used for longest.
pub(crate) struct Cache {
    content: Mutex<Content>,
    bytes_max: usize,
}

impl Cache {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { content: Mutex::default(), bytes_max }
    }

    pub(crate) fn get(&self, key: Key) -> Option<Item> {
        let mut content = self.content.lock();
        content.uses += 1;
        let now = content.uses;
        let entry = content.entries.get_mut(&key)?;
        let before = std::mem::replace(&mut entry.used, now);
        let item = entry.item.clone();
        content.order.remove(&before);
        content.order.insert(now, key);
        Some(item)
    }

    pub(crate) fn put(&self, key: Key, item: Item, bytes: usize) {
        if bytes > self.bytes_max {
            return;
        }
        let mut content = self.content.lock();
        content.uses += 1;
        let used = content.uses;
        if let Some(before) = content.entries.insert(key, Entry { item, bytes, used }) {
            content.bytes -= before.bytes;
            content.order.remove(&before.used);
        }
        content.order.insert(used, key);
        content.bytes += bytes;
        while content.bytes > self.bytes_max {
            let Some((_, oldest)) = content.order.pop_first() else { break };
            if let Some(entry) = content.entries.remove(&oldest) {
                content.bytes -= entry.bytes;
            }
        }
    }

    /// Bytes kept.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        self.content.lock().bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_used_for_longest_goes_first() {
        let cache = Cache::new(100);
        let item = || Item::Window(Arc::default());
        let key = |n| Key::Block(0, n, 0);
        for n in 0..10 {
            cache.put(key(n), item(), 10);
        }
        assert!(cache.get(key(0)).is_some());
        cache.put(key(10), item(), 15);
        assert!(cache.get(key(0)).is_some() && cache.get(key(1)).is_none());
        assert!(cache.bytes() <= 100);
        cache.put(key(11), item(), 101);
        assert!(cache.get(key(11)).is_none(), "too large to be kept");
    }
}
