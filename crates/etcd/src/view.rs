//! Who is there, followed by one watch that is begun again where it broke, without a gap.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use etcd_client::{Error, EventType, GetOptions, WatchOptions, WatchStream};
use fieldline_contracts::{Member, Membership};
use futures_util::future::select_ok;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::keys::Registered;
use crate::{Inner, REQUEST_MAX, epochs, error};

/// Wait between two tries to reach etcd.
const AGAIN: Duration = Duration::from_millis(200);
/// How long etcd may take to show that it is there, when another node asks: that one waits for little more.
const PROBE_MAX: Duration = Duration::from_millis(250);

/// Members by their keys.
type Members = BTreeMap<Vec<u8>, Member>;

/// Follows the cluster until `stop`, or until nobody holds it any more.
pub(crate) async fn follow(inner: Weak<Inner>, stop: CancellationToken) {
    let follow = async {
        let mut known = false;
        let mut failing = false;
        while let Some(inner) = inner.upgrade() {
            let told = *inner.told_gone.borrow();
            match once(&inner, known || told > 0, told).await {
                Ok(mut watched) => {
                    if failing {
                        info!("etcd answers again");
                    }
                    (known, failing) = (true, false);
                    let error = watch(&inner, &mut watched, told).await;
                    warn!(%error, "the cluster cannot be followed: nothing is placed anew until it can");
                }
                Err(error) if !failing => {
                    failing = true;
                    warn!(%error, "etcd does not answer: members stay as last known, and nothing is placed anew");
                }
                Err(_) => {}
            }
            freeze(&inner);
            drop(inner);
            tokio::time::sleep(AGAIN).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = follow => {}
    }
}

struct Watched {
    members: Members,
    stream: WatchStream,
}

/// Reads everything and begins to watch from there. After an outage it rests first, for the time of a lease: those who
/// were cut off come back, and members are not taken for dead that could not renew. Whoever was `told` meanwhile that etcd
/// is gone here goes on by that: then it rests anew.
async fn once(inner: &Inner, after_outage: bool, told: u64) -> Result<Watched, Error> {
    inner.read_generation().await?;
    if after_outage {
        let mut told_gone = inner.told_gone.subscribe();
        let rest = told_gone.wait_for(|now| *now != told);
        if timeout(inner.ttl + REQUEST_MAX / 2, rest).await.is_ok() {
            return Err(told_another());
        }
    }
    let all = GetOptions::new().with_prefix();
    let mut client = inner.client();
    let read = inner.ask(REQUEST_MAX, client.get(inner.keys.root.as_str(), Some(all))).await?;
    let mut members = Members::new();
    for entry in read.kvs() {
        insert(inner, &mut members, entry);
    }
    let revision = read.header().map_or(0, etcd_client::ResponseHeader::revision);
    let from = WatchOptions::new().with_prefix().with_start_revision(revision + 1);
    let stream = inner.ask(REQUEST_MAX, client.watch(inner.keys.root.as_str(), Some(from))).await?;
    if !publish(inner, &members, told) {
        return Err(told_another());
    }
    inner.handed_over.send_modify(|changes| *changes += 1);
    Ok(Watched { members, stream })
}

fn told_another() -> Error {
    Error::Internal("another node was told that etcd is gone here".to_owned())
}

fn insert(inner: &Inner, members: &mut Members, entry: &etcd_client::KeyValue) {
    if !inner.keys.is_member(entry.key()) {
        return;
    }
    let Some(registered) = Registered::from_json(entry.value()) else {
        warn!(key = %String::from_utf8_lossy(entry.key()), "a member that cannot be read is passed over");
        return;
    };
    let generation = inner.generation.load(Ordering::Acquire);
    let epoch = epochs::epoch(generation, entry.create_revision());
    members.insert(entry.key().to_owned(), Member { node: registered.node, epoch });
}

/// Makes the members known; not if another node was told in between that etcd is gone here.
fn publish(inner: &Inner, members: &Members, told: u64) -> bool {
    let members = members.values().cloned().collect();
    inner.membership.send_if_modified(|membership| {
        let holds = *inner.told_gone.borrow() == told;
        if holds {
            *membership = Arc::new(Membership { members, fresh: true });
        }
        holds
    })
}

/// What is known stays known, and is marked as old.
fn freeze(inner: &Inner) {
    inner.membership.send_if_modified(stale);
}

fn stale(membership: &mut Arc<Membership>) -> bool {
    let was_fresh = membership.fresh;
    if was_fresh {
        let members = membership.members.clone();
        *membership = Arc::new(Membership { members, fresh: false });
    }
    was_fresh
}

impl Inner {
    /// Tries whether etcd is out of reach, for another node that then goes on with what it holds. From then on nothing is
    /// claimed here until etcd answers and a rest is over: see [`once`].
    pub(crate) async fn is_gone(&self) -> bool {
        let reads = self.clients.iter().map(|client| {
            let mut client = client.kv_client();
            Box::pin(async move {
                match timeout(PROBE_MAX, client.get(self.keys.generation.as_str(), None)).await {
                    Ok(Err(error)) if error::may_pass(&error) => Err(()),
                    Err(_) => Err(()),
                    // A refusal is an answer.
                    Ok(_) => Ok(()),
                }
            })
        });
        if select_ok(reads).await.is_ok() {
            return false;
        }
        self.membership.send_if_modified(|membership| {
            self.told_gone.send_modify(|told| *told += 1);
            stale(membership)
        });
        true
    }
}

/// Takes over changes until the watch ends; says why it did.
async fn watch(inner: &Inner, watched: &mut Watched, told: u64) -> Error {
    let mut asked = false;
    let mut told_gone = inner.told_gone.subscribe();
    loop {
        let message = tokio::select! {
            message = timeout(REQUEST_MAX, watched.stream.message()) => message,
            _ = told_gone.wait_for(|now| *now != told) => return told_another(),
        };
        let message = match message {
            Ok(message) => message,
            // Silence is good news only from one who answers.
            Err(_) if !asked => {
                asked = true;
                match inner.ask(REQUEST_MAX, watched.stream.request_progress()).await {
                    Ok(()) => continue,
                    Err(error) => return error,
                }
            }
            Err(_) => return Error::Internal("etcd has become silent".to_owned()),
        };
        asked = false;
        let response = match message {
            Ok(Some(response)) => response,
            Ok(None) => return Error::Internal("etcd ended the watch".to_owned()),
            Err(error) => return error,
        };
        if response.canceled() {
            let (reason, compacted) = (response.cancel_reason(), response.compact_revision());
            return Error::Internal(format!(
                "the watch was cancelled: {reason} (compacted at {compacted})"
            ));
        }
        let (mut of_members, mut of_held) = (false, false);
        for event in response.events() {
            let Some(entry) = event.kv() else { continue };
            if inner.keys.of_held(entry.key()).is_some()
                || entry.key() == inner.keys.young.as_bytes()
            {
                of_held = true;
            } else if event.event_type() == EventType::Delete {
                of_members |= watched.members.remove(entry.key()).is_some();
            } else {
                insert(inner, &mut watched.members, entry);
                of_members = true;
            }
        }
        if of_members && !publish(inner, &watched.members, told) {
            return told_another();
        }
        if of_held {
            inner.handed_over.send_modify(|changes| *changes += 1);
        }
    }
}
