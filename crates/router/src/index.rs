//! Which commands are not finished: so that a device for which nothing waits costs no question when it attaches, and
//! that what expires is found in time.

use std::collections::{BTreeSet, HashMap};

use fieldline_model::{AccountId, Command, CommandId, Timestamp};

use crate::queue::Key;

/// Most commands that are known; about 200 bytes each. Of more, those that expire last are left out, and looked up
/// when their time has come.
const COMMANDS_MAX: usize = 200_000;

/// Unfinished commands of all devices, as far as this node has heard.
#[derive(Default)]
pub(crate) struct Index {
    of: HashMap<CommandId, (Key, Timestamp)>,
    by_expiry: BTreeSet<(Timestamp, CommandId)>,
    devices: HashMap<Key, u32>,
    /// The earliest expiry of those that were left out.
    missing_from: Option<Timestamp>,
}

impl Index {
    pub(crate) fn len(&self) -> usize {
        self.of.len()
    }

    pub(crate) fn insert(&mut self, command: &Command) {
        self.add(command.id, (command.account, command.device), command.expires_at);
    }

    /// Takes over what was read anew, beside what was heard of meanwhile.
    pub(crate) fn absorb(&mut self, read: Self) {
        self.missing_from = read.missing_from;
        for (id, (key, expiry)) in read.of {
            self.add(id, key, expiry);
        }
    }

    fn add(&mut self, id: CommandId, key: Key, expiry: Timestamp) {
        if self.of.contains_key(&id) {
            return;
        }
        if self.of.len() >= COMMANDS_MAX {
            let last = self.by_expiry.last().copied();
            match last {
                Some((latest, other)) if latest > expiry => {
                    self.remove(other);
                    self.leave_out(latest);
                }
                _ => return self.leave_out(expiry),
            }
        }
        self.of.insert(id, (key, expiry));
        self.by_expiry.insert((expiry, id));
        *self.devices.entry(key).or_insert(0) += 1;
    }

    fn leave_out(&mut self, expiry: Timestamp) {
        self.missing_from = Some(self.missing_from.map_or(expiry, |from| from.min(expiry)));
    }

    pub(crate) fn remove(&mut self, id: CommandId) {
        let Some((key, expiry)) = self.of.remove(&id) else { return };
        self.by_expiry.remove(&(expiry, id));
        if let Some(count) = self.devices.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                self.devices.remove(&key);
            }
        }
    }

    pub(crate) fn device(&self, id: CommandId) -> Option<Key> {
        self.of.get(&id).map(|(key, _)| *key)
    }

    /// Whether this device has none, as far as was heard.
    pub(crate) fn has_none(&self, key: Key) -> bool {
        self.missing_from.is_none() && !self.devices.contains_key(&key)
    }

    /// Those that have expired, `max` at most.
    pub(crate) fn due(&self, now: Timestamp, max: usize) -> Vec<(AccountId, CommandId)> {
        let due = self.by_expiry.iter().take_while(|(expiry, _)| *expiry <= now).take(max);
        due.filter_map(|(_, id)| Some((self.device(*id)?.0, *id))).collect()
    }

    /// Whether what was left out is to be looked up now.
    pub(crate) fn lacks(&self, now: Timestamp) -> bool {
        self.missing_from.is_some_and(|from| from <= now)
    }
}

#[cfg(test)]
mod tests {
    use fieldline_model::{CommandStatus, DeviceId, Params};

    use super::*;

    fn command(number: u32, expires_s: i64) -> Command {
        let mut id = [0; 16];
        id[..4].copy_from_slice(&number.to_be_bytes());
        let at = Timestamp::from_seconds;
        Command {
            id: CommandId::from_bytes(id),
            account: AccountId::from_bytes([1; 16]),
            device: DeviceId::from_bytes([2; 16]),
            name: "text".to_owned(),
            params: Params::new(),
            status: CommandStatus::Queued,
            created_at: at(1),
            expires_at: at(expires_s),
            sent_at: None,
            finished_at: None,
            attempts: 0,
            answer: None,
            error: None,
            created_by: String::new(),
        }
    }

    #[test]
    fn what_does_not_fit_is_known_to_be_missing() {
        let mut index = Index::default();
        let max = u32::try_from(COMMANDS_MAX).unwrap();
        let key = (AccountId::from_bytes([1; 16]), DeviceId::from_bytes([2; 16]));
        assert!(index.has_none(key));
        for number in 0..max {
            index.insert(&command(number, 1_000));
        }
        assert!(!index.lacks(Timestamp::from_seconds(5_000)));
        // One that expires sooner takes the place of one that expires later.
        index.insert(&command(max, 10));
        index.insert(&command(max + 1, 2_000));
        assert_eq!(index.len(), COMMANDS_MAX);
        assert_eq!(index.due(Timestamp::from_seconds(10), 5).len(), 1);
        assert!(!index.lacks(Timestamp::from_seconds(999)));
        assert!(index.lacks(Timestamp::from_seconds(1_000)));
        for number in 0..max + 2 {
            index.remove(command(number, 0).id);
        }
        assert_eq!((index.len(), index.by_expiry.len(), index.devices.len()), (0, 0, 0));
        assert!(!index.has_none(key), "some may be there that are not known");
    }
}
