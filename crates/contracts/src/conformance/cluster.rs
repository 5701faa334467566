//! What every [`Cluster`] must do. Checks make names and keys of their own, so they may share one cluster.
#![allow(
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a suite for tests: it panics by design"
)]

use std::sync::Arc;
use std::time::Duration;

use crate::cluster::hold;
use crate::{Cluster, ClusterError, Membership, Node};

/// Longest that a change may take to be seen.
const SEEN_MAX: Duration = Duration::from_secs(10);

/// Runs every check; panics at the first that fails. `node` gives a further node of one cluster each time, which has not joined.
pub async fn run(node: impl AsyncFn() -> Arc<dyn Cluster>) {
    members_see_each_other_come_change_and_go(&node).await;
    a_name_is_taken_once(&node).await;
    who_has_not_joined_owns_nothing(&node).await;
    of_many_exactly_one_owns(&node).await;
    a_key_given_up_is_free_and_epochs_grow(&node).await;
    who_waits_gets_the_key(&node).await;
    who_leaves_owns_nothing(&node).await;
    holders_are_listed_by_prefix(&node).await;
}

fn name() -> String {
    format!("node-{:016x}", rand::random::<u64>())
}

fn described(name: &str, ready: bool) -> Node {
    Node {
        name: name.to_owned(),
        address: format!("https://{name}:7080"),
        roles: vec!["gateway".to_owned(), "rest".to_owned()],
        zone: Some("a".to_owned()),
        version: "0.1.0".to_owned(),
        ready,
    }
}

async fn joined(node: &impl AsyncFn() -> Arc<dyn Cluster>) -> (Arc<dyn Cluster>, String) {
    let (cluster, name) = (node().await, name());
    cluster.join(described(&name, true)).await.expect("a free name can join");
    (cluster, name)
}

async fn seen(cluster: &Arc<dyn Cluster>, what: impl FnMut(&Arc<Membership>) -> bool) {
    let mut membership = cluster.membership();
    let seen = tokio::time::timeout(SEEN_MAX, membership.wait_for(what)).await;
    seen.expect("the change is seen").expect("the cluster is open");
}

fn has(membership: &Membership, name: &str, ready: bool) -> bool {
    membership.members.iter().any(|one| one.node == described(name, ready))
}

/// A join, a change of readiness and a leave are seen by others; members are in order of names.
async fn members_see_each_other_come_change_and_go(node: &impl AsyncFn() -> Arc<dyn Cluster>) {
    let (one, first) = joined(node).await;
    let (two, second) = joined(node).await;
    for cluster in [&one, &two] {
        seen(cluster, |all| all.fresh && has(all, &first, true) && has(all, &second, true)).await;
        let names: Vec<String> =
            cluster.membership().borrow().members.iter().map(|one| one.node.name.clone()).collect();
        assert!(names.is_sorted(), "{names:?}");
    }
    assert!(one.membership().borrow().ready("gateway").any(|name| name == second));
    assert_eq!(one.membership().borrow().ready("mqtt").count(), 0);
    two.join(described(&second, false)).await.expect("a member may change");
    seen(&one, |all| has(all, &second, false)).await;
    assert!(one.membership().borrow().ready("gateway").all(|name| name != second));
    two.leave().await;
    seen(&one, |all| has(all, &first, true) && !all.members.iter().any(|m| m.node.name == second))
        .await;
    one.leave().await;
}

/// A second process by the name of one that lives is refused, and does not disturb it.
async fn a_name_is_taken_once(node: &impl AsyncFn() -> Arc<dyn Cluster>) {
    let (one, name) = joined(node).await;
    let other = node().await;
    let refused = other.join(described(&name, true)).await;
    assert!(matches!(refused, Err(ClusterError::NameTaken(taken)) if taken == name));
    seen(&one, |all| has(all, &name, true)).await;
    one.leave().await;
    other.join(described(&name, true)).await.expect("the name is free again");
    other.leave().await;
}

async fn who_has_not_joined_owns_nothing(node: &impl AsyncFn() -> Arc<dyn Cluster>) {
    let cluster = node().await;
    assert!(matches!(cluster.claim(&name()).await, Err(ClusterError::NotJoined)));
}

/// Of many that claim a key at once, exactly one gets it.
async fn of_many_exactly_one_owns(node: &impl AsyncFn() -> Arc<dyn Cluster>) {
    let ((one, first), (two, second), key) = (joined(node).await, joined(node).await, name());
    let mut claims = tokio::task::JoinSet::new();
    for cluster in [&one, &two].into_iter().cycle().take(20) {
        let (cluster, key) = (Arc::clone(cluster), key.clone());
        claims.spawn(async move { cluster.claim(&key).await.expect("the cluster answers") });
    }
    let leases: Vec<_> = claims.join_all().await.into_iter().flatten().collect();
    assert_eq!(leases.len(), 1, "{leases:?}");
    let lease = &leases[0];
    assert!(lease.is_held() && lease.key() == key);
    let holder = one.holders(&key).await.expect("the cluster answers")[&key].clone();
    assert_eq!(holder.epoch, lease.epoch());
    assert!([&first, &second].contains(&&holder.node));
    let lost = tokio::time::timeout(Duration::from_millis(100), lease.lost()).await;
    assert!(lost.is_err(), "it is not lost");
    one.leave().await;
    two.leave().await;
}

/// A key that is dropped or released is free, and each new owner of anything has a greater epoch.
async fn a_key_given_up_is_free_and_epochs_grow(node: &impl AsyncFn() -> Arc<dyn Cluster>) {
    let ((one, _), (two, _), key) = (joined(node).await, joined(node).await, name());
    let mut newest = None;
    for (turn, cluster) in [&one, &two].into_iter().cycle().take(6).enumerate() {
        let lease = tokio::time::timeout(SEEN_MAX, hold(&**cluster, &key)).await;
        let lease = lease.expect("the key becomes free").expect("a member may hold");
        assert!(Some(lease.epoch()) > newest, "{lease:?} after {newest:?}");
        newest = Some(lease.epoch());
        let other = cluster.claim(&name()).await.expect("the cluster answers").expect("it is free");
        assert!(Some(other.epoch()) > newest, "epochs grow over all keys");
        newest = Some(other.epoch());
        if turn % 2 == 0 {
            lease.release();
        }
    }
    one.leave().await;
    two.leave().await;
}

/// Who waits for a key is told when it becomes free, and does not wait for a deadline.
async fn who_waits_gets_the_key(node: &impl AsyncFn() -> Arc<dyn Cluster>) {
    let ((one, _), (two, _), key) = (joined(node).await, joined(node).await, name());
    let lease = one.claim(&key).await.expect("the cluster answers").expect("it is free");
    let waiting = {
        let (two, key) = (Arc::clone(&two), key.clone());
        tokio::spawn(async move { hold(&*two, &key).await })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished() && lease.is_held());
    lease.release();
    let lease =
        tokio::time::timeout(SEEN_MAX, waiting).await.expect("it is told").expect("no panic");
    assert!(lease.expect("a member may hold").is_held());
    one.leave().await;
    two.leave().await;
}

/// Who leaves has lost all at once.
async fn who_leaves_owns_nothing(node: &impl AsyncFn() -> Arc<dyn Cluster>) {
    let ((one, _), (two, _), key) = (joined(node).await, joined(node).await, name());
    let lease = one.claim(&key).await.expect("the cluster answers").expect("it is free");
    one.leave().await;
    assert!(!lease.is_held());
    tokio::time::timeout(SEEN_MAX, lease.lost()).await.expect("it is told");
    assert!(matches!(one.claim(&key).await, Err(ClusterError::NotJoined)));
    let next = tokio::time::timeout(SEEN_MAX, hold(&*two, &key)).await.expect("it is free");
    let next = next.expect("a member may hold");
    // What the one before drops late does not take the key from who has it now.
    drop(lease);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(next.is_held());
    assert!(two.holders(&key).await.expect("the cluster answers").contains_key(&key));
    two.leave().await;
}

async fn holders_are_listed_by_prefix(node: &impl AsyncFn() -> Arc<dyn Cluster>) {
    let ((one, first), (two, second), prefix) = (joined(node).await, joined(node).await, name());
    let mut leases = Vec::new();
    for (cluster, key) in [(&one, "a"), (&two, "b"), (&one, "c")] {
        let key = format!("{prefix}/{key}");
        leases.push(cluster.claim(&key).await.expect("the cluster answers").expect("it is free"));
    }
    let other = one.claim(&name()).await.expect("the cluster answers");
    assert!(other.is_some());
    let holders = two.holders(&format!("{prefix}/")).await.expect("the cluster answers");
    let nodes: Vec<(&str, &str)> = holders
        .iter()
        .map(|(key, holder)| (key.strip_prefix(&prefix).unwrap_or_default(), holder.node.as_str()))
        .collect();
    assert_eq!(nodes, [("/a", first.as_str()), ("/b", &second), ("/c", &first)]);
    for (limit, keys) in [(0, 0), (1, 1), (2, 2), (3, 3), (4, 3)] {
        let few = two.first_holders(&format!("{prefix}/"), limit).await;
        let few = few.expect("the cluster answers");
        assert!(few.iter().eq(holders.iter().take(keys)), "the first {limit}: {few:?}");
    }
    one.leave().await;
    two.leave().await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryCluster;

    #[tokio::test]
    async fn the_cluster_in_memory_conforms() {
        let cluster = MemoryCluster::new();
        run(async || Arc::new(cluster.beside()) as Arc<dyn Cluster>).await;
    }
}
