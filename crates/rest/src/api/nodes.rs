//! The nodes of the cluster and what they own.

use fieldline_contracts::ClusterError;
use hyper::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use crate::call::{Ctx, json};
use crate::problem::Problem;
use crate::route::Answer;

/// Most owned keys of one answer.
const HELD_MAX: usize = 10_000;

/// The cluster, as the node that answers sees it.
#[derive(Serialize, ToSchema)]
pub(crate) struct NodesView {
    /// The node that answers.
    node: String,
    /// Whether the cluster's store answers. While it does not, nodes are those last known and nothing is placed anew.
    fresh: bool,
    /// Nodes, in order of names.
    items: Vec<NodeView>,
    /// What is owned, in order of keys; at most 10,000.
    held: Vec<HeldView>,
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
    let held = match services.cluster.holders("").await {
        Ok(holders) => holders,
        // Who is there is worth knowing even so.
        Err(ClusterError::Unavailable(reason)) => {
            problems.push(format!("what is owned is not known: {reason}"));
            Default::default()
        }
        Err(error) => return Err(Problem::unavailable(error.to_string())),
    };
    let held = held.into_iter().take(HELD_MAX).map(|(key, holder)| HeldView {
        key,
        node: holder.node,
        epoch: holder.epoch.0,
    });
    let view = NodesView {
        node: services.system.node.clone(),
        fresh: membership.fresh,
        items: nodes.collect(),
        held: held.collect(),
        problems,
    };
    json(StatusCode::OK, &view)
}
