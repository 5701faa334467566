//! `ClientStore`: what MQTT clients leave with the server, where every node finds it: retained messages, and the wills of
//! those that are connected.
//!
//! It outlives every process. A node whose process ended without a word leaves its wills behind; another adopts and
//! publishes them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use fieldline_model::{AccountId, Timestamp};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::RegistryError;

/// A retained message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetainedMessage {
    /// Where.
    pub topic: Arc<str>,
    /// What; empty to forget what is retained there.
    pub payload: Bytes,
    /// The MQTT 5 properties that receivers get, encoded as MQTT encodes them.
    pub props: Bytes,
    /// Whether it was published with QoS 1.
    pub at_least_once: bool,
    /// When it is worth nothing any more.
    pub expires_at: Option<Timestamp>,
}

impl RetainedMessage {
    /// What it counts for in [`RetainLimits::bytes`].
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.topic.len() + self.payload.len() + self.props.len()
    }
}

/// How much an account may retain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetainLimits {
    /// Messages.
    pub messages: usize,
    /// Bytes of topics, payloads and properties.
    pub bytes: usize,
}

/// How much an account retains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RetainUse {
    /// Messages.
    pub messages: usize,
    /// Bytes of topics, payloads and properties.
    pub bytes: usize,
}

/// What becomes of messages that are to be retained: worked out here, the same for every backend.
#[derive(Debug, Default)]
pub struct Settled {
    /// For each message whether it was taken.
    pub taken: Vec<bool>,
    /// What each topic that changes has then: nothing where it is forgotten.
    pub changes: BTreeMap<Arc<str>, Option<RetainedMessage>>,
    /// What the account has then.
    pub used: RetainUse,
}

/// Works out what becomes of `messages`, in order, where `present` has the bytes of those of their topics that are
/// retained now.
#[must_use]
pub fn settle(
    messages: &[RetainedMessage],
    present: &HashMap<String, usize>,
    used: RetainUse,
    limits: RetainLimits,
) -> Settled {
    let mut present = present.clone();
    let mut settled = Settled { used, ..Settled::default() };
    for message in messages {
        let before = present.get(&*message.topic).copied();
        let rest = RetainUse {
            messages: settled.used.messages.saturating_sub(usize::from(before.is_some())),
            bytes: settled.used.bytes.saturating_sub(before.unwrap_or(0)),
        };
        if message.payload.is_empty() {
            if before.is_some() {
                present.remove(&*message.topic);
                settled.used = rest;
                settled.changes.insert(Arc::clone(&message.topic), None);
            }
            settled.taken.push(true);
            continue;
        }
        let after = RetainUse { messages: rest.messages + 1, bytes: rest.bytes + message.bytes() };
        let fits = after.messages <= limits.messages && after.bytes <= limits.bytes;
        settled.taken.push(fits);
        if fits {
            present.insert((*message.topic).to_owned(), message.bytes());
            settled.used = after;
            settled.changes.insert(Arc::clone(&message.topic), Some(message.clone()));
        }
    }
    settled
}

/// The session that a will is of.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WillKey {
    /// The account.
    pub account: AccountId,
    /// The client, which has one session in it.
    pub client_id: Arc<str>,
    /// Orders its sessions over all nodes.
    pub number: u64,
}

/// What becomes of a client's will.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WillChange {
    /// A session began: this is its will, if it has one. What an older session left is gone.
    Begin {
        /// The session.
        key: WillKey,
        /// The will, in a form that the service knows.
        will: Option<String>,
    },
    /// A session ended, and its will is published or is not to be.
    End {
        /// The session.
        key: WillKey,
    },
}

/// What MQTT clients leave with the server.
#[async_trait]
pub trait ClientStore: Send + Sync + 'static {
    /// Retains messages of an account, in order, each in the place of the one of its topic; an empty payload forgets
    /// that. Of writers on several nodes the last to be stored counts. When this returns it is durable. Returns for each
    /// message whether it was taken: false if the account would have more than `limits`. What has expired by `now` does
    /// not count.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unavailable`]: it is not known whether any was taken.
    async fn retain(
        &self,
        account: AccountId,
        messages: Vec<RetainedMessage>,
        limits: RetainLimits,
        now: Timestamp,
    ) -> Result<Vec<bool>, RegistryError>;

    /// Up to `limit` retained messages of an account whose topics begin with `prefix`, after topic `after`, in order of
    /// the bytes of topics; those that have expired too.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unavailable`].
    async fn retained(
        &self,
        account: AccountId,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<RetainedMessage>, RegistryError>;

    /// Keeps what became of wills, in order, for the process `owner`. Doing it again changes nothing.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unavailable`].
    async fn keep_wills(&self, owner: u64, changes: &[WillChange]) -> Result<(), RegistryError>;

    /// Says that the process `owner` lives. Returns whether it was known: if not, others may have published its wills,
    /// and it keeps them anew.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unavailable`].
    async fn beat(&self, owner: u64) -> Result<bool, RegistryError>;

    /// A process other than `owner` that left wills and has not said that it lives for `silence`; `owner` looks after it
    /// for as long, while others are not told of it. A backend that no other process can have open knows that all others
    /// are gone.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unavailable`].
    async fn adopt(&self, owner: u64, silence: Duration) -> Result<Option<u64>, RegistryError>;

    /// Up to `limit` wills of a process.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unavailable`].
    async fn wills(
        &self,
        owner: u64,
        limit: usize,
    ) -> Result<Vec<(WillKey, String)>, RegistryError>;

    /// Forgets a process with the wills that are left of it.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unavailable`].
    async fn forget_owner(&self, owner: u64) -> Result<(), RegistryError>;
}

/// What clients leave, in memory: for tests of services. Nodes that share it are processes.
#[derive(Default)]
pub struct MemoryClientStore {
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    retained: BTreeMap<(AccountId, Arc<str>), RetainedMessage>,
    wills: BTreeMap<(AccountId, Arc<str>), (u64, u64, String)>,
    owners: HashMap<u64, Instant>,
}

impl MemoryClientStore {
    /// One that has nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

#[async_trait]
impl ClientStore for MemoryClientStore {
    async fn retain(
        &self,
        account: AccountId,
        messages: Vec<RetainedMessage>,
        limits: RetainLimits,
        now: Timestamp,
    ) -> Result<Vec<bool>, RegistryError> {
        let mut kept = self.kept.lock();
        kept.retained.retain(|(of, _), one| {
            *of != account || one.expires_at.is_none_or(|expires_at| expires_at > now)
        });
        let (mut used, mut present) = (RetainUse::default(), HashMap::new());
        for ((of, topic), one) in &kept.retained {
            if *of == account {
                used.messages += 1;
                used.bytes += one.bytes();
                present.insert((**topic).to_owned(), one.bytes());
            }
        }
        let settled = settle(&messages, &present, used, limits);
        for (topic, change) in settled.changes {
            match change {
                Some(message) => drop(kept.retained.insert((account, topic), message)),
                None => drop(kept.retained.remove(&(account, topic))),
            }
        }
        Ok(settled.taken)
    }

    async fn retained(
        &self,
        account: AccountId,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<RetainedMessage>, RegistryError> {
        let kept = self.kept.lock();
        let wanted = kept.retained.iter().filter(|((of, topic), _)| {
            *of == account
                && topic.starts_with(prefix)
                && after.is_none_or(|after| **topic > *after)
        });
        Ok(wanted.take(limit).map(|(_, message)| message.clone()).collect())
    }

    async fn keep_wills(&self, owner: u64, changes: &[WillChange]) -> Result<(), RegistryError> {
        let mut kept = self.kept.lock();
        for change in changes {
            let (WillChange::Begin { key, .. } | WillChange::End { key }) = change;
            let place = (key.account, Arc::clone(&key.client_id));
            let present = kept.wills.get(&place).map(|(owner, number, _)| (*owner, *number));
            match change {
                WillChange::Begin { will, .. } => {
                    if present.is_some_and(|(_, number)| number > key.number) {
                        continue;
                    }
                    match will {
                        Some(will) => {
                            kept.wills.insert(place, (owner, key.number, will.clone()));
                        }
                        None => drop(kept.wills.remove(&place)),
                    }
                }
                WillChange::End { .. } => {
                    if present == Some((owner, key.number)) {
                        kept.wills.remove(&place);
                    }
                }
            }
        }
        Ok(())
    }

    async fn beat(&self, owner: u64) -> Result<bool, RegistryError> {
        Ok(self.kept.lock().owners.insert(owner, Instant::now()).is_some())
    }

    async fn adopt(&self, owner: u64, silence: Duration) -> Result<Option<u64>, RegistryError> {
        let mut kept = self.kept.lock();
        let silent = |(one, at): &(&u64, &mut Instant)| **one != owner && at.elapsed() >= silence;
        let found = kept.owners.iter_mut().find(silent);
        Ok(found.map(|(one, at)| {
            *at = Instant::now();
            *one
        }))
    }

    async fn wills(
        &self,
        owner: u64,
        limit: usize,
    ) -> Result<Vec<(WillKey, String)>, RegistryError> {
        let kept = self.kept.lock();
        let own = kept.wills.iter().filter(|(_, (of, ..))| *of == owner).take(limit);
        let key = |account: AccountId, client_id: &Arc<str>, number| WillKey {
            account,
            client_id: Arc::clone(client_id),
            number,
        };
        Ok(own
            .map(|((account, client_id), (_, number, will))| {
                (key(*account, client_id, *number), will.clone())
            })
            .collect())
    }

    async fn forget_owner(&self, owner: u64) -> Result<(), RegistryError> {
        let mut kept = self.kept.lock();
        kept.wills.retain(|_, (of, ..)| *of != owner);
        kept.owners.remove(&owner);
        Ok(())
    }
}
