//! Channels and connections of all nodes, as management sees them from any one of them.
//!
//! Each node that holds channels answers for its own; whoever is asked by a user asks them all at once, each with a
//! deadline. One that gives no answer is named with the reason, and never left out.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use fieldline_contracts::calls::CALL_BYTES_MAX;
use fieldline_contracts::{
    CallError, Calls, ChannelControl, ChannelStatus, Cluster, ConnectionInfo, Connections,
    Handlers, Missing, NodeChannelStatus,
};
use fieldline_model::{AccountId, ChannelId, ConnectionId};
use futures_util::future::join_all;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The role of nodes that hold channels.
const ROLE: &str = "gateway";
/// Longest that a node may take to answer, so that one that sleeps holds nobody up for longer.
const ANSWER_MAX: Duration = Duration::from_secs(1);
/// Most connections of one answer.
const CONNECTIONS_MAX: usize = 10_000;
/// Most channels that a node is asked for at once.
const CHANNELS_MAX: usize = 1_000;

const STATUS: &str = "channels/status";
const CONNECTIONS: &str = "channels/connections";
const CLOSE: &str = "channels/close";

/// Asks how channels fare.
#[derive(Serialize, Deserialize)]
struct OfChannels {
    account: AccountId,
    channels: Vec<ChannelId>,
}

/// Asks for connections.
#[derive(Serialize, Deserialize)]
struct OfChannel {
    account: AccountId,
    channel: ChannelId,
}

/// Asks to close a connection.
#[derive(Serialize, Deserialize)]
struct OfConnection {
    account: AccountId,
    channel: ChannelId,
    connection: ConnectionId,
}

/// The channels of all nodes.
pub struct ClusterChannels {
    node: String,
    local: Option<Arc<dyn ChannelControl>>,
    cluster: Arc<dyn Cluster>,
    calls: Arc<dyn Calls>,
}

impl ClusterChannels {
    /// Of the node `node`, which holds `local`, if it holds channels at all; others may ask for these by `handlers` from now
    /// on.
    #[must_use]
    pub fn new(
        node: &str,
        local: Option<Arc<dyn ChannelControl>>,
        cluster: Arc<dyn Cluster>,
        calls: Arc<dyn Calls>,
        handlers: &Handlers,
    ) -> Self {
        if let Some(local) = &local {
            answer(handlers, local);
        }
        Self { node: node.to_owned(), local, cluster, calls }
    }

    /// The other nodes that hold channels, ready or not: one that drains still has its connections.
    fn others(&self) -> Vec<String> {
        let membership = Arc::clone(&self.cluster.membership().borrow());
        let others =
            membership.members.iter().map(|member| &member.node).filter(|node| {
                node.name != self.node && node.roles.iter().any(|role| role == ROLE)
            });
        others.map(|node| node.name.clone()).collect()
    }

    /// Asks all others at once; whoever does not know the question still starts.
    async fn ask<Q: Serialize + Sync, A: DeserializeOwned>(
        &self,
        method: &'static str,
        question: &Q,
    ) -> Vec<(String, Result<A, String>)> {
        let question = Bytes::from(serde_json::to_vec(question).unwrap_or_default());
        let asked = self.others().into_iter().map(|node| {
            let question = question.clone();
            async move {
                let answer = match self.calls.call(&node, method, question, ANSWER_MAX).await {
                    Ok(answer) => serde_json::from_slice(&answer)
                        .map_err(|error| format!("its answer cannot be read: {error}")),
                    // It has just left, or holds nothing yet.
                    Err(CallError::NoSuchNode(_) | CallError::NoSuchMethod(_)) => return None,
                    Err(error) => Err(error.to_string()),
                };
                Some((node, answer))
            }
        });
        join_all(asked).await.into_iter().flatten().collect()
    }
}

/// Answers others for what is held here.
fn answer(handlers: &Handlers, local: &Arc<dyn ChannelControl>) {
    // They belong to the gateway, which may end before the listener for nodes does.
    let weak = Arc::downgrade(local);
    let gone = || CallError::Refused("this node ends".to_owned());
    let control = weak.clone();
    handlers.on_call(STATUS, move |request, _| {
        let control = control.upgrade();
        async move {
            let OfChannels { account, channels } = read(&request)?;
            if channels.len() > CHANNELS_MAX {
                return Err(CallError::Refused(format!("at most {CHANNELS_MAX} channels at once")));
            }
            write(&control.ok_or_else(gone)?.statuses(account, &channels).await)
        }
    });
    let control = weak.clone();
    handlers.on_call(CONNECTIONS, move |request, _| {
        let control = control.upgrade();
        async move {
            let OfChannel { account, channel } = read(&request)?;
            let found = control.ok_or_else(gone)?.connections(account, channel).await;
            Ok(as_many_as_fit(&found.items))
        }
    });
    handlers.on_call(CLOSE, move |request, _| {
        let control = weak.upgrade();
        async move {
            let OfConnection { account, channel, connection } = read(&request)?;
            let closed = control.ok_or_else(gone)?.close(account, channel, connection).await;
            write(&closed.unwrap_or(false))
        }
    });
}

fn read<T: DeserializeOwned>(request: &[u8]) -> Result<T, CallError> {
    serde_json::from_slice(request)
        .map_err(|error| CallError::Refused(format!("the request cannot be read: {error}")))
}

fn write<T: Serialize>(answer: &T) -> Result<Bytes, CallError> {
    serde_json::to_vec(answer)
        .map(Bytes::from)
        .map_err(|error| CallError::Failed(error.to_string()))
}

/// A list of the first ones, as long as an answer may be.
fn as_many_as_fit(items: &[ConnectionInfo]) -> Bytes {
    let mut all = vec![b'['];
    for item in items {
        let Ok(text) = serde_json::to_vec(item) else { continue };
        if all.len() + text.len() + 2 > CALL_BYTES_MAX {
            break;
        }
        if all.len() > 1 {
            all.push(b',');
        }
        all.extend(text);
    }
    all.push(b']');
    all.into()
}

/// What all nodes say of one channel.
fn merged(nodes: Vec<NodeChannelStatus>) -> ChannelStatus {
    let alone = nodes.len() == 1;
    let errors = nodes.iter().filter_map(|status| {
        let error = status.error.as_ref()?;
        Some(if alone { error.clone() } else { format!("{}: {error}", status.node) })
    });
    let errors: Vec<String> = errors.collect();
    let listening = nodes.iter().find(|status| status.listening);
    ChannelStatus {
        listening: listening.is_some(),
        error: (!errors.is_empty()).then(|| errors.join("; ")),
        address: listening.or(nodes.first()).and_then(|status| status.address.clone()),
        connections: nodes.iter().fold(0, |sum, status| sum.saturating_add(status.connections)),
        nodes,
    }
}

fn of_node(node: &str, status: ChannelStatus) -> NodeChannelStatus {
    let ChannelStatus { listening, error, address, connections, nodes: _ } = status;
    NodeChannelStatus { node: node.to_owned(), listening, error, address, connections }
}

#[async_trait]
impl ChannelControl for ClusterChannels {
    async fn status(&self, account: AccountId, channel: ChannelId) -> ChannelStatus {
        self.statuses(account, &[channel]).await.pop().unwrap_or_default()
    }

    async fn statuses(&self, account: AccountId, channels: &[ChannelId]) -> Vec<ChannelStatus> {
        let mut all: Vec<ChannelStatus> = Vec::with_capacity(channels.len());
        for some in channels.chunks(CHANNELS_MAX) {
            let question = OfChannels { account, channels: some.to_vec() };
            let own = async {
                match &self.local {
                    Some(local) => Some(local.statuses(account, some).await),
                    None => None,
                }
            };
            let (own, others) =
                futures_util::join!(own, self.ask::<_, Vec<ChannelStatus>>(STATUS, &question));
            let mut answers: Vec<(String, Result<Vec<ChannelStatus>, String>)> = others;
            answers.extend(own.map(|own| (self.node.clone(), Ok(own))));
            answers.sort_by(|a, b| a.0.cmp(&b.0));
            all.extend((0..some.len()).map(|at| {
                let of_nodes = answers.iter().map(|(node, answer)| match answer {
                    Ok(statuses) => of_node(node, statuses.get(at).cloned().unwrap_or_default()),
                    Err(reason) => {
                        let error = Some(reason.clone());
                        of_node(node, ChannelStatus { error, ..ChannelStatus::default() })
                    }
                });
                merged(of_nodes.collect())
            }));
        }
        all
    }

    async fn connections(&self, account: AccountId, channel: ChannelId) -> Connections {
        let question = OfChannel { account, channel };
        let own = async {
            match &self.local {
                Some(local) => local.connections(account, channel).await,
                None => Connections::default(),
            }
        };
        let (own, others) =
            futures_util::join!(own, self.ask::<_, Vec<ConnectionInfo>>(CONNECTIONS, &question));
        let mut all = own;
        all.items.iter_mut().for_each(|one| one.node.clone_from(&self.node));
        for (node, answer) in others {
            match answer {
                Ok(items) => all.items.extend(
                    items.into_iter().map(|one| ConnectionInfo { node: node.clone(), ..one }),
                ),
                Err(reason) => all.missing.push(Missing { node, reason }),
            }
        }
        all.items.sort_unstable_by_key(|one| one.id);
        all.items.truncate(CONNECTIONS_MAX);
        all
    }

    async fn close(
        &self,
        account: AccountId,
        channel: ChannelId,
        connection: ConnectionId,
    ) -> Result<bool, Vec<Missing>> {
        if let Some(local) = &self.local
            && local.close(account, channel, connection).await?
        {
            return Ok(true);
        }
        let question = OfConnection { account, channel, connection };
        let answers = self.ask::<_, bool>(CLOSE, &question).await;
        if answers.iter().any(|(_, answer)| *answer == Ok(true)) {
            return Ok(true);
        }
        let missing: Vec<Missing> = answers
            .into_iter()
            .filter_map(|(node, answer)| Some(Missing { node, reason: answer.err()? }))
            .collect();
        if missing.is_empty() { Ok(false) } else { Err(missing) }
    }

    async fn opened(&self) -> bool {
        match &self.local {
            Some(local) => local.opened().await,
            None => true,
        }
    }

    async fn problems(&self) -> Vec<String> {
        match &self.local {
            Some(local) => local.problems().await,
            None => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use fieldline_contracts::{MemoryCalls, MemoryCluster, Node};
    use fieldline_model::{Timestamp, Transport};
    use parking_lot::Mutex;

    use super::*;

    /// What one node holds.
    struct Held(Mutex<Vec<ConnectionInfo>>, AccountId, ChannelId);

    #[async_trait]
    impl ChannelControl for Held {
        async fn status(&self, account: AccountId, channel: ChannelId) -> ChannelStatus {
            if (account, channel) != (self.1, self.2) {
                return ChannelStatus::default();
            }
            let connections = u32::try_from(self.0.lock().len()).unwrap();
            let address = Some("0.0.0.0:1".to_owned());
            ChannelStatus { listening: true, address, connections, ..ChannelStatus::default() }
        }

        async fn connections(&self, account: AccountId, channel: ChannelId) -> Connections {
            let items = if (account, channel) == (self.1, self.2) {
                self.0.lock().clone()
            } else {
                Vec::new()
            };
            Connections { items, missing: Vec::new() }
        }

        async fn close(
            &self,
            _: AccountId,
            _: ChannelId,
            connection: ConnectionId,
        ) -> Result<bool, Vec<Missing>> {
            let mut held = self.0.lock();
            let before = held.len();
            held.retain(|one| one.id != connection);
            Ok(held.len() < before)
        }

        async fn opened(&self) -> bool {
            true
        }

        async fn problems(&self) -> Vec<String> {
            Vec::new()
        }
    }

    fn connection(channel: ChannelId, number: u8) -> ConnectionInfo {
        let at = Timestamp::from_seconds(1_800_000_000);
        ConnectionInfo {
            id: ConnectionId::new(at, [number; 10]),
            node: String::new(),
            channel,
            device: None,
            ident: None,
            peer: "192.0.2.1:1".to_owned(),
            transport: Transport::Tcp,
            connected_at: at,
            received_at: None,
            received_bytes: 0,
            sent_bytes: 0,
            messages: 0,
        }
    }

    struct World {
        calls: Vec<Arc<MemoryCalls>>,
        channels: Vec<ClusterChannels>,
        account: AccountId,
        channel: ChannelId,
        _held: Vec<Arc<dyn ChannelControl>>,
        _clusters: Vec<Arc<dyn Cluster>>,
    }

    /// Two nodes that hold one connection each, and one that holds no channels.
    async fn world() -> World {
        let now = Timestamp::from_seconds(1_800_000_000);
        let (account, channel) = (AccountId::new(now, [1; 10]), ChannelId::new(now, [2; 10]));
        let (cluster, first) = (MemoryCluster::new(), MemoryCalls::new("node-1"));
        let mut world = World {
            calls: Vec::new(),
            channels: Vec::new(),
            account,
            channel,
            _held: Vec::new(),
            _clusters: Vec::new(),
        };
        for number in 1..=3_u8 {
            let name = format!("node-{number}");
            let cluster = cluster.beside();
            let role = if number == 3 { "rest" } else { ROLE };
            let joined = cluster.join(Node {
                name: name.clone(),
                address: String::new(),
                roles: vec![role.to_owned()],
                zone: None,
                version: String::new(),
                ready: true,
            });
            joined.await.unwrap();
            let cluster: Arc<dyn Cluster> = Arc::new(cluster);
            let calls = Arc::new(first.beside(&name));
            let held = Held(Mutex::new(vec![connection(channel, number)]), account, channel);
            let held: Option<Arc<dyn ChannelControl>> =
                if number == 3 { None } else { Some(Arc::new(held)) };
            world._held.extend(held.clone());
            world._clusters.push(Arc::clone(&cluster));
            let handlers = calls.handlers().clone();
            world.channels.push(ClusterChannels::new(
                &name,
                held,
                cluster,
                calls.clone(),
                &handlers,
            ));
            world.calls.push(calls);
        }
        world
    }

    #[tokio::test]
    async fn all_nodes_are_seen_from_any() {
        let world = world().await;
        for channels in &world.channels {
            let status = channels.status(world.account, world.channel).await;
            assert!(status.listening && status.error.is_none(), "{status:?}");
            assert_eq!(status.connections, 2);
            let nodes: Vec<&str> = status.nodes.iter().map(|one| one.node.as_str()).collect();
            assert_eq!(nodes, ["node-1", "node-2"]);
            let found = channels.connections(world.account, world.channel).await;
            let nodes: Vec<&str> = found.items.iter().map(|one| one.node.as_str()).collect();
            assert_eq!((nodes, found.missing), (vec!["node-1", "node-2"], Vec::new()));
            // Another account sees none of it.
            let other = AccountId::new(Timestamp::from_seconds(1), [9; 10]);
            assert!(channels.connections(other, world.channel).await.items.is_empty());
            assert!(!channels.status(other, world.channel).await.listening);
        }
    }

    #[tokio::test]
    async fn any_node_closes_what_another_holds() {
        let world = world().await;
        let of = |number| connection(world.channel, number).id;
        for (from, number) in [(2, 1), (0, 2)] {
            let channels = &world.channels[from];
            assert_eq!(channels.close(world.account, world.channel, of(number)).await, Ok(true));
            assert_eq!(channels.close(world.account, world.channel, of(number)).await, Ok(false));
        }
    }

    #[tokio::test]
    async fn who_does_not_answer_is_named() {
        let world = world().await;
        world.calls[1].cut_off(true);
        let channels = &world.channels[2];
        let found = channels.connections(world.account, world.channel).await;
        assert_eq!((found.items.len(), found.missing.len()), (1, 1));
        assert_eq!(found.missing[0].node, "node-2");
        let status = channels.status(world.account, world.channel).await;
        assert!(status.listening, "devices can connect to the other");
        assert!(status.error.unwrap().starts_with("node-2: "), "and it is said what is wrong");
        let unknown = connection(world.channel, 9).id;
        let closed = channels.close(world.account, world.channel, unknown).await;
        assert!(closed.is_err_and(|missing| missing[0].node == "node-2"));
        let first = connection(world.channel, 1).id;
        assert_eq!(channels.close(world.account, world.channel, first).await, Ok(true));
    }

    #[test]
    fn an_answer_is_as_long_as_it_may_be() {
        let channel = ChannelId::new(Timestamp::from_seconds(1), [2; 10]);
        let long = ConnectionInfo { ident: Some("x".repeat(1_000)), ..connection(channel, 1) };
        let text = as_many_as_fit(&vec![long; 10_000]);
        assert!(text.len() <= CALL_BYTES_MAX && text.len() > CALL_BYTES_MAX - 2_000);
        let read: Vec<ConnectionInfo> = serde_json::from_slice(&text).unwrap();
        assert!(read.len() > 1_000);
        assert_eq!(as_many_as_fit(&[]), "[]");
    }
}
