//! The names of all keys. An account's begin with the account, so that nothing reaches another's.

use fieldline_model::{AccountId, DeviceId};

pub(crate) struct Keys {
    prefix: String,
    /// When this memory began, and in which process: absent or another's, all of it is lost.
    pub(crate) since: String,
    /// The generation in which all last values are there; absent while they are not.
    pub(crate) marker: String,
    /// Who fills or mends.
    pub(crate) lock: String,
    /// Counts nodes that ended without a word.
    pub(crate) stale: String,
    /// The count of those up to which last values were mended.
    pub(crate) mended: String,
    /// Counts losses of writes.
    pub(crate) lost: String,
    /// The last version of a status.
    pub(crate) version: String,
    /// The last ticket.
    pub(crate) ticket: String,
    /// Which process each node is that has not left in order.
    pub(crate) nodes: String,
    /// What the keys of living nodes begin with.
    pub(crate) node: String,
}

impl Keys {
    pub(crate) fn new(prefix: &str) -> Self {
        let key = |name: &str| format!("{prefix}:{name}");
        Self {
            prefix: prefix.to_owned(),
            since: key("since"),
            marker: key("marker"),
            lock: key("lock"),
            stale: key("stale"),
            mended: key("mended"),
            lost: key("lost"),
            version: key("version"),
            ticket: key("ticket"),
            nodes: key("nodes"),
            node: key("n:"),
        }
    }

    pub(crate) fn device(&self, account: AccountId, device: DeviceId) -> String {
        format!("{}:a:{account}:d:{device}", self.prefix)
    }

    /// Matches the keys of all devices.
    pub(crate) fn devices(&self) -> String {
        format!("{}:a:*:d:*", self.prefix)
    }

    pub(crate) fn presence(&self, account: AccountId, device: DeviceId) -> String {
        format!("{}:a:{account}:p:{device}", self.prefix)
    }

    /// Matches the keys of presence of all devices.
    pub(crate) fn presences(&self) -> String {
        format!("{}:a:*:p:*", self.prefix)
    }

    /// The account and device of a key of presence.
    pub(crate) fn presence_of(&self, key: &str) -> Option<(AccountId, DeviceId)> {
        crate::lost::of_key(&self.prefix, key)
    }

    pub(crate) fn status(&self, account: AccountId, key: &str) -> String {
        format!("{}:a:{account}:s:{key}", self.prefix)
    }

    /// The set of an account's modules that have a status.
    pub(crate) fn status_keys(&self, account: AccountId) -> String {
        format!("{}:a:{account}:k", self.prefix)
    }

    /// Where changes of an account's statuses are published.
    pub(crate) fn channel(&self, account: AccountId) -> String {
        format!("{}:a:{account}:status", self.prefix)
    }

    /// The account of a channel.
    pub(crate) fn account_of(&self, channel: &[u8]) -> Option<AccountId> {
        let rest = std::str::from_utf8(channel).ok()?.strip_prefix(self.prefix.as_str())?;
        rest.strip_prefix(":a:")?.strip_suffix(":status")?.parse().ok()
    }
}
