//! Names and contents of the keys in etcd.

use fieldline_contracts::Node;
use fieldline_model::placement::Epoch;
use serde::{Deserialize, Serialize};

/// The keys of one installation.
pub(crate) struct Keys {
    /// The minute in which the keyspace was made.
    pub(crate) generation: String,
    /// There for a while after that.
    pub(crate) young: String,
    /// Before all of these.
    pub(crate) root: String,
    members: String,
    held: String,
}

impl Keys {
    pub(crate) fn under(prefix: &str) -> Self {
        let under = |name: &str| format!("{prefix}{name}");
        Self {
            generation: under("generation"),
            young: under("young"),
            root: prefix.to_owned(),
            members: under("members/"),
            held: under("held/"),
        }
    }

    pub(crate) fn member(&self, name: &str) -> String {
        format!("{}{name}", self.members)
    }

    pub(crate) fn held(&self, key: &str) -> String {
        format!("{}{key}", self.held)
    }

    pub(crate) fn is_member(&self, key: &[u8]) -> bool {
        key.starts_with(self.members.as_bytes())
    }

    pub(crate) fn of_held<'a>(&self, key: &'a [u8]) -> Option<&'a str> {
        std::str::from_utf8(key.strip_prefix(self.held.as_bytes())?).ok()
    }
}

/// What a member's key holds.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Registered {
    #[serde(flatten)]
    pub(crate) node: Node,
    /// Tells this process from another of the same name.
    pub(crate) instance: u64,
}

/// What the key of something owned holds.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Held {
    pub(crate) node: String,
    /// Tells this claim from all others.
    pub(crate) nonce: u64,
    /// Where it was taken back after etcd lost it; else its revision says it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) epoch: Option<Epoch>,
}

impl Held {
    /// What etcd may hold of this claim: it has the epoch once it was taken back.
    pub(crate) fn stored(&self) -> [Vec<u8>; 2] {
        [Self { epoch: None, ..self.clone() }.to_json(), self.to_json()]
    }
}

macro_rules! json {
    ($($type:ty),*) => {$(
        impl $type {
            #[allow(clippy::expect_used, reason = "texts and numbers always have a JSON form")]
            pub(crate) fn to_json(&self) -> Vec<u8> {
                serde_json::to_vec(self).expect("it has a JSON form")
            }

            pub(crate) fn from_json(bytes: &[u8]) -> Option<Self> {
                serde_json::from_slice(bytes).ok()
            }
        }
    )*};
}

json!(Registered, Held);
