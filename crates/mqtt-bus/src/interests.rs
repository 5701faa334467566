//! Which accounts this process listens to, by how many of its subscribers.

use std::collections::{HashMap, HashSet};

use fieldline_contracts::MemoryBus;
use fieldline_model::AccountId;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

#[derive(Default)]
pub(crate) struct Interests {
    kept: Mutex<Kept>,
    /// Told when an account comes or goes.
    pub(crate) wake: Notify,
}

#[derive(Default)]
struct Kept {
    accounts: HashMap<AccountId, Interest>,
    /// Those that came or went since they were last looked at.
    changed: HashSet<AccountId>,
}

struct Interest {
    subscribers: usize,
    /// Whether the broker has confirmed.
    confirmed: watch::Sender<bool>,
    /// Whether a subscriber is to be told once it does, since items may be missing.
    owed: bool,
}

impl Interests {
    /// One subscriber more; what it gets changes once the broker has confirmed.
    pub(crate) fn join(&self, account: AccountId) -> watch::Receiver<bool> {
        let mut kept = self.kept.lock();
        let new = || Interest { subscribers: 0, confirmed: watch::Sender::new(false), owed: false };
        let interest = kept.accounts.entry(account).or_insert_with(new);
        interest.subscribers += 1;
        let (first, confirmed) = (interest.subscribers == 1, interest.confirmed.subscribe());
        if first {
            kept.changed.insert(account);
            self.wake.notify_one();
        }
        confirmed
    }

    /// One subscriber less.
    pub(crate) fn leave(&self, account: AccountId) {
        let mut kept = self.kept.lock();
        let Some(interest) = kept.accounts.get_mut(&account) else { return };
        interest.subscribers -= 1;
        if interest.subscribers == 0 {
            kept.accounts.remove(&account);
            kept.changed.insert(account);
            self.wake.notify_one();
        }
    }

    /// Whoever waits no longer for the broker is told once it has confirmed.
    pub(crate) fn owe(&self, account: AccountId) {
        if let Some(interest) = self.kept.lock().accounts.get_mut(&account) {
            interest.owed |= !*interest.confirmed.borrow();
        }
    }

    /// The broker has confirmed.
    pub(crate) fn confirm(&self, account: AccountId, memory: &MemoryBus) {
        let mut kept = self.kept.lock();
        let Some(interest) = kept.accounts.get_mut(&account) else { return };
        if std::mem::take(&mut interest.owed) {
            memory.missed(account, 0);
        }
        interest.confirmed.send_replace(true);
    }

    /// The broker has forgotten all: everybody is told once it confirms anew.
    pub(crate) fn forget(&self) {
        let mut kept = self.kept.lock();
        let Kept { accounts, changed } = &mut *kept;
        for (account, interest) in accounts {
            interest.owed |= interest.confirmed.send_replace(false);
            changed.insert(*account);
        }
    }

    /// Looks at an account again later.
    pub(crate) fn again(&self, account: AccountId) {
        self.kept.lock().changed.insert(account);
    }

    /// Accounts that came or went, and whether they are listened to now.
    pub(crate) fn changes(&self) -> Vec<(AccountId, bool)> {
        let mut kept = self.kept.lock();
        let changed = std::mem::take(&mut kept.changed);
        changed.into_iter().map(|account| (account, kept.accounts.contains_key(&account))).collect()
    }
}
