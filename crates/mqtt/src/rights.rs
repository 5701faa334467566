//! Ends connections whose token was revoked, changed or has expired. Looks once a
//! second, and reports how full the queues are while it is about it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use fieldline_auth::{AuthError, Identity, IdentityKind};
use tracing::warn;

use crate::codec::Reason;
use crate::{Shared, metrics};

/// How often expiry is looked at, and how soon a change is acted on.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Watches until the server stops.
pub(crate) async fn watch(shared: Arc<Shared>) {
    let mut changes = shared.services.auth.changes();
    changes.mark_unchanged();
    let mut look = tokio::time::interval(LOOK_EVERY);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut due = false;
    loop {
        // Changes are taken together once a second: a bulk of them costs one look.
        tokio::select! {
            () = shared.stop.cancelled() => return,
            _ = look.tick() => {}
        }
        let now = shared.services.platform.clock.now();
        let mut depths = (0, 0, 0);
        for hub in shared.hubs() {
            let (sum, most, answers) = hub.depths();
            depths = (depths.0 + sum, depths.1.max(most), depths.2 + answers);
            hub.each_member(|member| {
                if member.identity.expired(now) {
                    member.link.kick(Reason::NotAuthorized);
                }
            });
        }
        metrics::depths(depths);
        due |= changes.has_changed().unwrap_or(false);
        if due {
            changes.mark_unchanged();
            due = !recheck(&shared).await;
            shared.forget_idle_hubs();
        }
    }
}

/// Asks for every token in use whether it still holds. Returns whether all
/// could be asked.
async fn recheck(shared: &Shared) -> bool {
    let mut asked = true;
    for hub in shared.hubs() {
        let mut identities: HashMap<IdentityKind, Vec<Arc<Identity>>> = HashMap::new();
        hub.each_member(|member| {
            let same = identities.entry(member.identity.kind).or_default();
            if !same.iter().any(|known| known.same_rights(&member.identity)) {
                same.push(Arc::clone(&member.identity));
            }
        });
        for identity in identities.into_values().flatten() {
            match shared.services.auth.recheck(&identity).await {
                Ok(()) => {}
                Err(AuthError::Unauthenticated(_)) => hub.each_member(|member| {
                    if member.identity.kind == identity.kind
                        && member.identity.same_rights(&identity)
                    {
                        member.link.kick(Reason::NotAuthorized);
                    }
                }),
                Err(error) => {
                    asked = false;
                    warn!(%error, "tokens of MQTT clients cannot be checked, trying again");
                }
            }
        }
    }
    asked
}

/// Whether two identities of one token were given the same rights.
trait SameRights {
    fn same_rights(&self, other: &Self) -> bool;
}

impl SameRights for Identity {
    fn same_rights(&self, other: &Self) -> bool {
        self.scopes == other.scopes && self.devices == other.devices
    }
}
