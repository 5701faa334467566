//! The servers that a node of a cluster stands on, and the other nodes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::finding::Finding;
use fieldline_contracts::{Node, SystemClock};

use super::{Patient, running};

/// Longest that a connection to another node may take.
const CONNECT_MAX: Duration = Duration::from_secs(3);

/// etcd, and the nodes that are registered there.
pub(super) async fn etcd(patient: Arc<Patient>) -> Vec<Finding> {
    let Some(node) = &patient.config.node else { return Vec::new() };
    let config = match node.etcd() {
        Ok(config) => config,
        Err(error) => return vec![Finding::broken("etcd", "node", error, "correct the path")],
    };
    let examined = fieldline_etcd::examine(&config).await;
    let mut findings = examined.findings;
    let Some(nodes) = examined.nodes else { return findings };
    findings.push(Finding::ok("nodes", "etcd", format!("{} are registered", nodes.len())));
    findings.extend(names(&patient, &node.name, &nodes));
    findings.extend(addresses(&nodes).await);
    findings.extend(versions(&nodes));
    findings
}

/// Whether another machine uses the name of this configuration.
fn names(patient: &Patient, own: &str, nodes: &[Node]) -> Option<Finding> {
    let there = nodes.iter().any(|node| node.name == own);
    let chosen_port = running::here(patient.config.http.listen).is_some();
    if !there || !chosen_port || running::answers(patient) {
        return None;
    }
    Some(Finding::broken(
        "node name",
        format!("node.name {own}"),
        format!(
            "a node of this name is registered, and none answers at {}: another process has the name",
            patient.config.http.listen
        ),
        "give each node a name of its own; if it has just ended, look again in 5 s",
    ))
}

/// Whether each address is one node's, and leads to it from here.
async fn addresses(nodes: &[Node]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut by_address: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for node in nodes.iter().filter(|node| !node.address.is_empty()) {
        by_address.entry(&node.address).or_default().push(&node.name);
    }
    for (address, names) in by_address {
        let (check, at) = ("node address", format!("{} {address}", names.join(", ")));
        if names.len() > 1 {
            findings.push(Finding::broken(
                check,
                &at,
                format!("{} nodes name one address: calls for one reach another", names.len()),
                "give each its own `node.address`",
            ));
        }
        let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
        let place = rest.split('/').next().unwrap_or_default().to_owned();
        let connect = tokio::net::TcpStream::connect(&place);
        let reason = match tokio::time::timeout(CONNECT_MAX, connect).await {
            Ok(Ok(_)) => {
                findings.push(Finding::ok(check, at, "it can be reached from here"));
                continue;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", CONNECT_MAX.as_secs()),
        };
        findings.push(Finding::broken(
            check,
            at,
            format!("it cannot be reached from here: {reason}"),
            "correct `node.address` there, or open the way between the nodes",
        ));
    }
    findings
}

/// One version of skew is allowed, and more is not.
fn versions(nodes: &[Node]) -> Vec<Finding> {
    let number = |version: &str| {
        let mut parts = version.split('.').map_while(|part| part.parse::<u64>().ok());
        Some((parts.next()?, parts.next()?))
    };
    let known = nodes.iter().filter_map(|node| Some((number(&node.version)?, node)));
    let known: Vec<((u64, u64), &Node)> = known.collect();
    let own = number(env!("CARGO_PKG_VERSION")).unwrap_or_default();
    let all = known.iter().map(|(version, _)| *version).chain([own]);
    let (Some(oldest), Some(newest)) = (all.clone().min(), all.max()) else { return Vec::new() };
    let check = "node versions";
    let listed = || {
        let each = known.iter().map(|(_, node)| format!("{} {}", node.name, node.version));
        each.collect::<Vec<_>>().join(", ")
    };
    let apart = newest.0 != oldest.0 || newest.1 - oldest.1 > 1;
    vec![if apart {
        Finding::broken(
            check,
            listed(),
            format!(
                "versions from {}.{} to {}.{}, this program included: only one step is allowed",
                oldest.0, oldest.1, newest.0, newest.1
            ),
            "bring the oldest up to date, one version after the other",
        )
    } else {
        Finding::ok(check, listed(), "at most one step apart")
    }]
}

/// The database.
pub(super) async fn postgres(patient: Arc<Patient>) -> Vec<Finding> {
    if patient.config.node.is_none() {
        return Vec::new();
    }
    fieldline_postgres::examine(&patient.config.postgres, &SystemClock).await
}

/// Last values.
pub(super) async fn redis(patient: Arc<Patient>) -> Vec<Finding> {
    if patient.config.node.is_none() {
        return Vec::new();
    }
    fieldline_redis::examine(&patient.config.redis, &SystemClock).await
}

/// What carries live items between nodes.
pub(super) async fn broker(patient: Arc<Patient>) -> Vec<Finding> {
    if patient.config.node.is_none() {
        return Vec::new();
    }
    fieldline_mqtt_bus::examine(&patient.config.mqtt_bus).await
}

#[cfg(test)]
mod tests {
    use fieldline_contracts::finding::Verdict;

    use super::*;

    #[test]
    fn versions_may_be_one_step_apart() {
        let node = |version: &str| Node {
            name: version.to_owned(),
            address: String::new(),
            roles: Vec::new(),
            zone: None,
            version: version.to_owned(),
            ready: true,
        };
        let own = env!("CARGO_PKG_VERSION");
        let verdict = |all: &[&str]| {
            let nodes: Vec<Node> = all.iter().map(|version| node(version)).collect();
            versions(&nodes).first().map(|finding| finding.verdict)
        };
        assert_eq!(verdict(&[own, own]), Some(Verdict::Ok));
        assert_eq!(verdict(&[own, "7.3.0"]), Some(Verdict::Broken));
        assert_eq!(verdict(&[]), Some(Verdict::Ok));
    }
}
