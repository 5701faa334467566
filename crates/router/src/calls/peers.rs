//! The question that the cluster asks past its own store: is it gone for you too?

use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use fieldline_contracts::{CallError, Cluster, Node, Peers};
use tracing::debug;

use super::NodeCalls;

/// The method; an answer is `true` or `false`.
const METHOD: &str = "cluster/without";
/// How long the answer is of use.
const DEADLINE: Duration = Duration::from_millis(400);

/// Asks other nodes by calls, and is asked.
#[derive(Clone)]
pub struct ClusterPeers {
    calls: NodeCalls,
}

impl ClusterPeers {
    /// Asks by `calls`.
    #[must_use]
    pub const fn new(calls: NodeCalls) -> Self {
        Self { calls }
    }

    /// Answers for `cluster` from now on, for as long as it lives. Until then this node does not know the question,
    /// which is no answer.
    pub fn answer_for<C: Cluster>(&self, cluster: &Arc<C>) {
        let cluster: Weak<C> = Arc::downgrade(cluster);
        self.calls.handlers().on_call(METHOD, move |_, caller| {
            let cluster = cluster.upgrade();
            async move {
                let leaving = || CallError::Refused("this node leaves the cluster".to_owned());
                let gone = cluster.ok_or_else(leaving)?.is_gone().await;
                debug!(node = caller.node, gone, "asked whether the cluster is gone");
                Ok(Bytes::from_static(if gone { b"true" } else { b"false" }))
            }
        });
    }
}

#[async_trait]
impl Peers for ClusterPeers {
    async fn without_cluster(&self, node: &Node) -> Option<bool> {
        match self.calls.call_node(node, METHOD, Bytes::new(), DEADLINE).await {
            Ok(answer) => match &*answer {
                b"true" => Some(true),
                b"false" => Some(false),
                _ => None,
            },
            Err(error) => {
                debug!(node = node.name, %error, "a peer does not say whether the cluster is gone");
                None
            }
        }
    }
}
