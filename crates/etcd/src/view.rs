//! Who is there, followed by one watch that is begun again where it broke, without a gap.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use etcd_client::{Error, EventType, GetOptions, WatchOptions, WatchStream};
use fieldline_contracts::{Member, Membership};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::keys::Registered;
use crate::{Inner, REQUEST_MAX, epochs};

/// Wait between two tries to reach etcd.
const AGAIN: Duration = Duration::from_millis(200);

/// Members by their keys.
type Members = BTreeMap<Vec<u8>, Member>;

/// Follows the cluster until `stop`, or until nobody holds it any more.
pub(crate) async fn follow(inner: Weak<Inner>, stop: CancellationToken) {
    let follow = async {
        let mut known = false;
        let mut failing = false;
        while let Some(inner) = inner.upgrade() {
            match once(&inner, known).await {
                Ok(mut watched) => {
                    if failing {
                        info!("etcd answers again");
                    }
                    (known, failing) = (true, false);
                    let error = watch(&inner, &mut watched).await;
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
/// were cut off come back, and members are not taken for dead that could not renew.
async fn once(inner: &Inner, after_outage: bool) -> Result<Watched, Error> {
    inner.read_generation().await?;
    if after_outage {
        tokio::time::sleep(inner.ttl + REQUEST_MAX / 2).await;
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
    publish(inner, &members);
    inner.handed_over.send_modify(|changes| *changes += 1);
    Ok(Watched { members, stream })
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

fn publish(inner: &Inner, members: &Members) {
    let members = members.values().cloned().collect();
    inner.membership.send_replace(Arc::new(Membership { members, fresh: true }));
}

/// What is known stays known, and is marked as old.
fn freeze(inner: &Inner) {
    inner.membership.send_if_modified(|membership| {
        let was_fresh = membership.fresh;
        if was_fresh {
            let members = membership.members.clone();
            *membership = Arc::new(Membership { members, fresh: false });
        }
        was_fresh
    });
}

/// Takes over changes until the watch ends; says why it did.
async fn watch(inner: &Inner, watched: &mut Watched) -> Error {
    let mut asked = false;
    loop {
        let message = match timeout(REQUEST_MAX, watched.stream.message()).await {
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
        if of_members {
            publish(inner, &watched.members);
        }
        if of_held {
            inner.handed_over.send_modify(|changes| *changes += 1);
        }
    }
}
