//! How far each publisher of an account was heard: repeats are told from what is new, and gaps are seen.

use std::collections::HashMap;

use tokio::time::Instant;

use crate::encoding::Head;

/// Publishers of an account whose place is known. A process that starts again is another; of more, the one that was silent
/// longest is forgotten.
const PUBLISHERS_MAX: usize = 1_024;

/// The publishers of one account.
#[derive(Default)]
pub(crate) struct Heard(HashMap<u64, Place>);

struct Place {
    /// Number of the next item.
    next: u64,
    at: Instant,
}

/// What a payload brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct News {
    /// Items that are missing before it.
    pub(crate) missed: u64,
    /// Items at its begin that came before.
    pub(crate) skip: usize,
}

impl Heard {
    /// What is new of a payload; `None` if all of it came before.
    pub(crate) fn take(&mut self, head: Head, now: Instant) -> Option<News> {
        let Head { publisher, sequence, missed, count } = head;
        let end = sequence + u64::from(count);
        let Some(place) = self.0.get_mut(&publisher) else {
            if self.0.len() >= PUBLISHERS_MAX {
                let silent = self.0.iter().min_by_key(|(_, place)| place.at);
                if let Some(silent) = silent.map(|(publisher, _)| *publisher) {
                    self.0.remove(&silent);
                }
            }
            self.0.insert(publisher, Place { next: end, at: now });
            // What it published before we listened is no loss; what it dropped right before this may be.
            return Some(News { missed: missed.into(), skip: 0 });
        };
        place.at = now;
        if end < place.next || (end == place.next && count > 0) {
            return None;
        }
        let missed = sequence.saturating_sub(place.next);
        let skip = usize::try_from(place.next.saturating_sub(sequence)).unwrap_or(usize::MAX);
        place.next = end;
        Some(News { missed, skip })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(publisher: u64, sequence: u64, missed: u32, count: u16) -> Head {
        Head { publisher, sequence, missed, count }
    }

    #[tokio::test]
    async fn repeats_are_dropped_and_gaps_are_seen() {
        let (mut heard, now) = (Heard::default(), Instant::now());
        let mut take = |sequence, missed, count| {
            heard.take(head(7, sequence, missed, count), now).map(|news| (news.missed, news.skip))
        };
        // It was on its way when we began to listen.
        assert_eq!(take(500, 0, 10), Some((0, 0)));
        assert_eq!(take(510, 0, 1), Some((0, 0)));
        // After a reconnection the last ones come again.
        assert_eq!([take(500, 0, 10), take(510, 0, 1)], [None, None]);
        assert_eq!(take(511, 0, 5), Some((0, 0)));
        // 516 to 520 never came.
        assert_eq!(take(521, 5, 2), Some((5, 0)));
        // A mark says nothing new, or that the last two are missing.
        assert_eq!(take(523, 0, 0), Some((0, 0)));
        assert_eq!(take(525, 0, 0), Some((2, 0)));
        assert_eq!(take(523, 0, 0), None);
        assert_eq!(take(524, 0, 3), Some((0, 1)));
    }

    #[tokio::test]
    async fn a_new_publisher_tells_what_it_dropped_and_the_silent_are_forgotten() {
        let (mut heard, now) = (Heard::default(), Instant::now());
        assert_eq!(heard.take(head(1, 40, 39, 1), now), Some(News { missed: 39, skip: 0 }));
        for publisher in 2..5_000 {
            let at = now + std::time::Duration::from_millis(publisher);
            assert_eq!(heard.take(head(publisher, 1, 0, 1), at), Some(News { missed: 0, skip: 0 }));
        }
        assert_eq!(heard.0.len(), PUBLISHERS_MAX);
        assert!(!heard.0.contains_key(&1) && heard.0.contains_key(&4_999));
    }
}
