//! The end of sessions whose node is gone, told by another one.
//!
//! A node that is killed cannot say that its devices went offline. One node at a time, under a lease, looks for sessions
//! whose process is gone, and tells their end once: stored, published, and in the device's log.
//!
//! A fleet is never declared offline because discovery is empty. Two must agree that a node is gone, and for as long as
//! [`LostConfig::after`]: the state, which the process no longer speaks up to, and the cluster, where it is no member any
//! more while this node is. If either cannot be asked, or forgot everything, the time begins anew. A device that connected
//! elsewhere meanwhile is left alone, since its session is another by then.
//!
//! Whoever dies in the midst has noted when it found a session lost: the next one says the same, and what was stored is
//! recognised. Start reading at [`run`].

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::{
    Cluster, HistoryError, Lease, LostSession, Membership, StateError, cluster,
};
use fieldline_ingest::{Ingest, own_params};
use fieldline_model::{
    Accepted, CloseCode, Event, EventId, EventKind, Params, Series, Timestamp, Value,
};
use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{debug, info, warn};

/// The key of the cluster whose owner does it.
pub const LOST_KEY: &str = "gateway/lost";

/// Sessions that are ended at once: their events meet in one commit.
const TOGETHER: usize = 64;
/// How often it is looked after a change of members: the state may notice later than the cluster.
const LOOKS: u32 = 3;

/// How patient it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LostConfig {
    /// How long a node has to be gone before its sessions are over; its devices connect elsewhere meanwhile.
    pub after: Duration,
    /// Wait after a change of members, until the state has noticed it too.
    pub settle: Duration,
    /// How often it is looked if nothing seems to have changed.
    pub look_every: Duration,
}

impl Default for LostConfig {
    fn default() -> Self {
        Self {
            after: Duration::from_secs(30),
            settle: Duration::from_secs(5),
            look_every: Duration::from_secs(600),
        }
    }
}

/// Why a session was not ended now.
#[derive(Debug, thiserror::Error)]
enum LostError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    History(#[from] HistoryError),
    #[error(transparent)]
    Registry(#[from] fieldline_contracts::RegistryError),
}

/// Ends lost sessions whenever this node, `node`, owns [`LOST_KEY`]; for ever, or until it has left the cluster.
pub async fn run(config: LostConfig, cluster: Arc<dyn Cluster>, node: String, ingest: Ingest) {
    while let Ok(lease) = cluster::hold(&*cluster, LOST_KEY).await {
        let looking = Looking {
            config,
            cluster: &*cluster,
            lease: &lease,
            node: &node,
            ingest: &ingest,
            noticed: HashMap::new(),
        };
        tokio::select! {
            () = looking.run() => {}
            () = lease.lost() => debug!("lost sessions are another node's to end"),
        }
    }
}

/// A process that is gone.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Process {
    node: String,
    process: String,
    /// Another has its node's name: it will not come back, whoever is a member.
    replaced: bool,
}

impl Process {
    fn of(session: &LostSession) -> Self {
        let (node, process) = (session.node.clone(), session.process.clone());
        Self { node, process, replaced: session.replaced }
    }

    /// Whether `members` agree that it is gone.
    fn is_gone(&self, members: &Membership, own: &str) -> bool {
        if self.replaced { members.fresh } else { is_gone(members, own, &self.node) }
    }
}

struct Looking<'a> {
    config: LostConfig,
    cluster: &'a dyn Cluster,
    lease: &'a Lease,
    node: &'a str,
    ingest: &'a Ingest,
    /// Since when a process is gone, as far as everybody knows.
    noticed: HashMap<Process, Instant>,
}

/// Whether `membership` says that a node is no member: only if it says that we are one.
fn is_gone(membership: &Membership, own: &str, node: &str) -> bool {
    let has = |name: &str| membership.members.iter().any(|member| member.node.name == name);
    membership.fresh && has(own) && !has(node)
}

impl Looking<'_> {
    async fn run(mut self) {
        let mut membership = self.cluster.membership();
        let mut next = Instant::now() + self.config.settle;
        let mut looks = LOOKS;
        let mut failing = false;
        loop {
            let members = Arc::clone(&membership.borrow_and_update());
            // Whoever is back, or cannot be asked about, begins anew.
            let known = self.noticed.len();
            self.noticed.retain(|process, _| process.is_gone(&members, self.node));
            if self.noticed.len() < known {
                debug!("nodes that were gone are back, or the cluster cannot be asked");
            }
            match timeout_at(next, membership.changed()).await {
                Ok(Ok(())) => {
                    looks = LOOKS;
                    next = next.min(Instant::now() + self.config.settle);
                    continue;
                }
                // Nobody changes it any more.
                Ok(Err(_)) => sleep_until(next).await,
                Err(_) => {}
            }
            let began = Instant::now();
            if let Err(error) = self.look(&membership).await {
                // Nothing that was noticed counts: it may have come from a state that forgot.
                self.noticed.clear();
                if !failing {
                    warn!(%error, "sessions of nodes that are gone cannot be ended now; it is tried again");
                }
                failing = true;
                next = began + self.config.settle;
                continue;
            }
            failing = false;
            looks = looks.saturating_sub(1);
            let due = self.noticed.values().map(|since| *since + self.config.after).min();
            let soon = began + self.config.settle;
            let later = if looks > 0 { soon } else { began + self.config.look_every };
            next = due.map_or(later, |due| due.max(soon).min(later));
        }
    }

    /// Goes through all lost sessions: notes whose they are, and ends those whose time has come.
    async fn look(
        &mut self,
        membership: &watch::Receiver<Arc<Membership>>,
    ) -> Result<(), LostError> {
        let state = Arc::clone(&self.ingest.platform().state);
        let began = Instant::now();
        let mut seen = HashMap::new();
        let (mut cursor, mut ended) = (0, 0_u64);
        loop {
            let (page, next) = state.lost_sessions(cursor).await?;
            // As they are now: there may be many pages.
            let members = Arc::clone(&membership.borrow());
            let mut due = Vec::new();
            for session in page {
                let process = Process::of(&session);
                if !process.is_gone(&members, self.node) {
                    continue;
                }
                let since = self.noticed.get(&process).copied().unwrap_or(began);
                if since + self.config.after <= began {
                    due.push(session);
                }
                seen.insert(process, since);
            }
            for some in due.chunks(TOGETHER) {
                if !self.lease.is_held() {
                    return Ok(());
                }
                for done in join_all(some.iter().map(|session| self.end(session))).await {
                    ended += u64::from(done?);
                }
            }
            match next {
                Some(next) => cursor = next,
                None => break,
            }
        }
        self.noticed = seen;
        if ended > 0 {
            metrics::counter!("fieldline_gateway_lost_sessions_ended_total").increment(ended);
            info!(ended, "sessions of nodes that are gone were ended");
        }
        Ok(())
    }

    /// Ends one; false if it is not lost any more.
    async fn end(&self, session: &LostSession) -> Result<bool, LostError> {
        let state = &self.ingest.platform().state;
        let Some(at) = state.mark_lost(session, self.ingest.now()).await? else {
            return Ok(false);
        };
        // One that was deleted meanwhile has nobody who would want to know.
        if let Some(device) = self.ingest.device(session.account, session.device).await? {
            let params = own_params([
                ("connection.id", session.connection.to_string().into()),
                ("peer", session.peer.as_str().into()),
                ("ident", device.ident.as_str().into()),
                ("node", session.node.as_str().into()),
                ("connection.epoch", session.epoch.into()),
            ]);
            let ended = Ended {
                account: session.account,
                device: session.device,
                connection: session.connection,
                at,
                text: format!("the node {} is gone", session.node),
            };
            self.ingest.event_stored(vec![ended.line()], ended.event(params)).await?;
        }
        Ok(state.end_lost(session, at).await?)
    }
}

/// A session whose end nobody told who held it.
pub(crate) struct Ended {
    pub(crate) account: fieldline_model::AccountId,
    pub(crate) device: fieldline_model::DeviceId,
    pub(crate) connection: fieldline_model::ConnectionId,
    pub(crate) at: Timestamp,
    pub(crate) text: String,
}

impl Ended {
    /// Code and name, as every end of a connection has them.
    fn close() -> [(&'static str, Value); 2] {
        let code = CloseCode::NodeLost;
        [("close.code", i64::from(code.number()).into()), ("close.name", code.name().into())]
    }

    /// The line of the device's log.
    pub(crate) fn line(&self) -> Accepted {
        let params = own_params([
            ("log.kind", "closed".into()),
            ("connection.id", self.connection.to_string().into()),
            ("text", self.text.as_str().into()),
        ]);
        let params = params.into_iter().chain(own_params(Self::close())).collect();
        Accepted::own(Series::device_log(self.account, self.device), self.at, params)
    }

    /// The event. It is the same whoever makes it: by that it is told once.
    pub(crate) fn event(&self, params: Params) -> Event {
        let mut random = [0; 10];
        for (to, from) in random.iter_mut().zip(self.connection.as_bytes().iter().rev()) {
            *to = *from;
        }
        Event {
            id: EventId::new(self.at, random),
            account: self.account,
            kind: EventKind::Offline,
            object: self.device.0,
            timestamp: self.at,
            params: params.into_iter().chain(own_params(Self::close())).collect(),
        }
    }
}
