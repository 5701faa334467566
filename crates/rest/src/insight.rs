//! What is told of the cluster besides who is there: who leads what, how far keys are where they belong, and what lags.

use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::ownership::Progress;
use tokio::sync::watch;

/// What the wiring knows and the contracts do not show. The default is a node of which nothing is known.
#[derive(Clone, Default)]
pub struct Insight {
    /// Whether the cluster has a store that nodes share.
    pub shared: bool,
    /// Work that one node of the cluster at a time does.
    pub led: Vec<Led>,
    /// Roles that share keys.
    pub spread: Vec<Spread>,
    /// What can be behind at this node, beside what is measured while asking.
    pub lags: Vec<LagCheck>,
}

/// Work that who holds a key does alone.
#[derive(Clone, Copy, Debug)]
pub struct Led {
    /// The key in the cluster.
    pub key: &'static str,
    /// What its holder does, in words.
    pub what: &'static str,
}

/// A role whose keys are spread over the nodes.
#[derive(Clone, Debug)]
pub struct Spread {
    /// The role.
    pub role: String,
    /// Before each of its keys, such as `modules/`.
    pub prefix: String,
    /// How far they are where they belong, as this node sees it.
    pub progress: watch::Receiver<Progress>,
}

/// Measures something that can be behind, without waiting for it.
pub type LagCheck = Arc<dyn Fn() -> Lag + Send + Sync>;

/// How far something is behind.
#[derive(Clone, Debug)]
pub struct Lag {
    /// What, such as `live_items`.
    pub name: &'static str,
    /// The newest figure; none where there is none yet, or what was asked does not answer.
    pub size: Option<Size>,
    /// What else is to be known of it, in words.
    pub note: Option<String>,
}

/// A figure with its unit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Size {
    /// How long something took, or takes.
    Took(Duration),
    /// Things that wait.
    Waiting(u64),
}
