//! The nodes of the cluster and what they own.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use fieldline_contracts::registry::{Kind, Page};
use fieldline_contracts::{ClusterError, Holder};
use hyper::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use crate::call::{Ctx, json};
use crate::insight::{Lag, Led, Size, Spread};
use crate::problem::Problem;
use crate::route::Answer;

/// Most owned keys of one answer.
const HELD_MAX: usize = 10_000;
/// Longest that the database is asked for the sake of its lag.
const PROBE_MAX: Duration = Duration::from_secs(2);

/// The cluster, as the node that answers sees it.
#[derive(Serialize, ToSchema)]
pub(crate) struct NodesView {
    /// The node that answers.
    node: String,
    /// Whether the cluster's store answers. While it does not, nodes are those last known and nothing is placed anew.
    fresh: bool,
    /// Nodes, in order of names.
    items: Vec<NodeView>,
    /// What is owned, in order of keys; at most the first 10,000.
    held: Vec<HeldView>,
    /// Work that one node at a time does for all, and who does it now.
    led: Vec<LedView>,
    /// Roles whose keys are spread over the nodes, and how far they are where they belong.
    spread: Vec<SpreadView>,
    /// What can be behind at the node that answers.
    lags: Vec<LagView>,
    /// What keeps the node that answers from doing all its work, in words.
    problems: Vec<String>,
}

/// A node.
#[derive(Serialize, ToSchema)]
pub(crate) struct NodeView {
    name: String,
    /// Where other nodes reach it.
    address: String,
    roles: Vec<String>,
    /// The zone of failure that it is in.
    zone: Option<String>,
    version: String,
    /// Whether it takes work.
    ready: bool,
    /// Grows each time that a node of this name joins.
    epoch: u64,
}

/// Something that one node at a time does.
#[derive(Serialize, ToSchema)]
pub(crate) struct HeldView {
    key: String,
    node: String,
    /// Grows with every change of hands.
    epoch: u64,
}

/// Work that one node at a time does for all.
#[derive(Serialize, ToSchema)]
pub(crate) struct LedView {
    /// The key that says who does it.
    key: String,
    /// What it is, in words.
    what: String,
    /// Who does it; null while nobody does, or where it is not known.
    node: Option<String>,
    /// Grows with every change of hands.
    epoch: Option<u64>,
}

/// A role whose keys are spread over the nodes that are ready for it, as the node that answers sees it.
#[derive(Serialize, ToSchema)]
pub(crate) struct SpreadView {
    role: String,
    /// Before each of its keys.
    prefix: String,
    /// Keys there are.
    keys: usize,
    /// Keys that the node that answers holds.
    held: usize,
    /// Keys that nobody holds.
    orphans: usize,
    /// Keys that belong elsewhere than where they are.
    misplaced: usize,
    /// Whether nothing moves because the cluster's store does not answer.
    frozen: bool,
}

/// Something that can be behind at the node that answers.
#[derive(Serialize, ToSchema)]
pub(crate) struct LagView {
    /// `append`: how long the newest batch of messages took until it was durable, its standby included. `database` and
    /// `cluster`: how long they took to answer just now. `live_items`: what waits for the broker. `last_values`: messages
    /// that wait for Redis.
    name: String,
    /// Null where nothing was measured yet, or where there is no answer.
    value: Option<f64>,
    /// `ms` or `items`.
    unit: String,
    /// What else is to be known of it, in words.
    note: Option<String>,
}

/// `GET /nodes`
pub(crate) async fn read(ctx: Ctx) -> Answer {
    let services = &ctx.app.services;
    let membership = services.cluster.membership().borrow().clone();
    let nodes = membership.members.iter().map(|member| NodeView {
        name: member.node.name.clone(),
        address: member.node.address.clone(),
        roles: member.node.roles.clone(),
        zone: member.node.zone.clone(),
        version: member.node.version.clone(),
        ready: member.node.ready,
        epoch: member.epoch.0,
    });
    let mut problems: Vec<String> = services.ready.iter().flat_map(|check| check()).collect();
    problems.extend(services.optional.iter().flat_map(|(_, check)| check()));
    let (owned, database) = tokio::join!(owned(&ctx), database(&ctx));
    let mut lags = vec![database];
    let (mut holders, mut led) = (BTreeMap::new(), BTreeMap::new());
    let cluster = match owned {
        Ok(owned) => {
            (holders, led) = (owned.holders, owned.led);
            Lag { name: "cluster", size: Some(Size::Took(owned.took)), note: None }
        }
        // Who is there is worth knowing even so.
        Err(ClusterError::Unavailable(reason)) => {
            problems.push(format!("what is owned is not known: {reason}"));
            Lag { name: "cluster", size: None, note: Some(reason) }
        }
        Err(error) => return Err(Problem::unavailable(error.to_string())),
    };
    // Within one process the members stand in its memory: there is nothing to wait for.
    if services.insight.shared {
        lags.push(cluster);
    }
    lags.extend(services.insight.lags.iter().map(|check| check()));
    let held = holders.into_iter().map(|(key, holder)| HeldView {
        key,
        node: holder.node,
        epoch: holder.epoch.0,
    });
    let led = services.insight.led.iter().map(|work| {
        let holder = led.get(work.key);
        LedView {
            key: work.key.to_owned(),
            what: work.what.to_owned(),
            node: holder.map(|holder| holder.node.clone()),
            epoch: holder.map(|holder| holder.epoch.0),
        }
    });
    let view = NodesView {
        node: services.system.node.clone(),
        fresh: membership.fresh,
        items: nodes.collect(),
        held: held.collect(),
        led: led.collect(),
        spread: services.insight.spread.iter().map(spread).collect(),
        lags: lags.into_iter().map(lag).collect(),
        problems,
    };
    json(StatusCode::OK, &view)
}

struct Owned {
    /// The first keys.
    holders: BTreeMap<String, Holder>,
    /// Who holds the keys of what is led.
    led: BTreeMap<&'static str, Holder>,
    /// How long the cluster's store took to tell the first keys.
    took: Duration,
}

async fn owned(ctx: &Ctx) -> Result<Owned, ClusterError> {
    let services = &ctx.app.services;
    let began = Instant::now();
    let holders = services.cluster.first_holders("", HELD_MAX).await?;
    let took = began.elapsed();
    let mut led = BTreeMap::new();
    for Led { key, .. } in &services.insight.led {
        // Where there are more keys than were told, it may be beyond them. Of those that begin so it is the first.
        let beyond = match holders.get(*key) {
            None if holders.len() >= HELD_MAX => {
                services.cluster.first_holders(key, 1).await?.remove(*key)
            }
            found => found.cloned(),
        };
        led.extend(beyond.map(|holder| (*key, holder)));
    }
    Ok(Owned { holders, led, took })
}

/// How long the objects take to answer.
async fn database(ctx: &Ctx) -> Lag {
    let began = Instant::now();
    let first = Page::first(1);
    let read = ctx.app.services.platform.registry.list_everywhere(Kind::Account, &first);
    let (size, note) = match tokio::time::timeout(PROBE_MAX, read).await {
        Ok(Ok(_)) => (Some(Size::Took(began.elapsed())), None),
        Ok(Err(error)) => (None, Some(error.to_string())),
        Err(_) => (None, Some(format!("no answer in {} s", PROBE_MAX.as_secs()))),
    };
    Lag { name: "database", size, note }
}

fn spread(one: &Spread) -> SpreadView {
    let progress = one.progress.borrow().clone();
    SpreadView {
        role: one.role.clone(),
        prefix: one.prefix.clone(),
        keys: progress.keys,
        held: progress.held,
        orphans: progress.orphans,
        misplaced: progress.misplaced,
        frozen: progress.frozen,
    }
}

fn lag(lag: Lag) -> LagView {
    #[allow(clippy::cast_precision_loss, reason = "nothing waits in numbers beyond 2^53")]
    let (value, unit) = match lag.size {
        Some(Size::Took(took)) => (Some(took.as_secs_f64() * 1000.0), "ms"),
        Some(Size::Waiting(count)) => (Some(count as f64), "items"),
        None => (None, "ms"),
    };
    LagView { name: lag.name.to_owned(), value, unit: unit.to_owned(), note: lag.note }
}
