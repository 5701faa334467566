//! What is done every second: each node looks after the devices that it holds, and one of them after all others.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use fieldline_contracts::cluster::hold;
use fieldline_contracts::registry::{Versioned, readable};
use fieldline_contracts::{Actor, Cluster, Kind, Page, RegistryError};
use fieldline_model::{Command, CommandStatus};
use tracing::{info, warn};

use crate::LocalCommands;
use crate::queue::{Inner, Key, Upkeep};

const HOUR_MICROS: i64 = 3_600 * 1_000_000;
/// Longest wait for the newest changes to be known.
const CATCH_UP_WAIT: Duration = Duration::from_secs(1);
/// Wait before the ownership of upkeep is tried for again.
const CAMPAIGN_AGAIN: Duration = Duration::from_secs(1);
/// Expired commands that are finished in one go; the next follow a second later.
const DUE_MAX: usize = 5_000;

impl Inner {
    /// From now on upkeep is done by the owner of a key.
    pub(crate) fn campaign(self: &Arc<Self>, cluster: Arc<dyn Cluster>) {
        *self.upkeep.lock() = Upkeep::Owner(None);
        self.spawn_owned(campaign(Arc::downgrade(self), cluster));
    }

    fn is_upkeeper(&self) -> bool {
        match &*self.upkeep.lock() {
            Upkeep::Alone => true,
            Upkeep::Owner(lease) => lease.as_ref().is_some_and(|lease| lease.is_held()),
        }
    }

    pub(crate) async fn expire(&self) {
        if !self.caught_up(CATCH_UP_WAIT).await {
            warn!("changes of commands are not known yet");
        }
        for slot in self.all_slots() {
            // Whoever is at work there sees to it.
            let answers = match slot.content.try_lock() {
                Ok(mut content) => self.tend(&slot, &mut content).await,
                Err(_) => true,
            };
            self.release(slot);
            if !answers {
                // The others would wait for the same.
                break;
            }
        }
        let deleted = std::mem::take(&mut *self.deleted.lock());
        let upkeeper = self.is_upkeeper();
        let waiting = if upkeeper { self.unfinished() } else { 0 };
        let waiting = f64::from(u32::try_from(waiting).unwrap_or(u32::MAX));
        metrics::gauge!("fieldline_router_commands_waiting").set(waiting);
        if !upkeeper {
            return;
        }
        for key in deleted {
            if let Err(error) = self.end_all(key).await {
                warn!(%error, device = %key.1, "commands of a deleted device are ended later");
                self.deleted.lock().insert(key);
            }
        }
        if let Err(error) = self.end_due().await {
            warn!(%error, "commands that have expired are ended later");
        }
        let now = self.clock.now().as_micros();
        if now - self.swept_at.load(Ordering::Relaxed) >= HOUR_MICROS {
            self.swept_at.store(now, Ordering::Relaxed);
            if let Err(error) = self.sweep().await {
                warn!(%error, "finished commands cannot be tidied up");
            }
        }
    }

    /// Ends what has expired, on whichever node it waits.
    async fn end_due(&self) -> Result<(), RegistryError> {
        let now = self.clock.now();
        if self.index.lock().lacks(now) {
            self.load_index().await?;
        }
        let due = self.index.lock().due(now, DUE_MAX);
        for (account, id) in due {
            let Some(known) = self.read(account, id).await? else {
                self.index.lock().remove(id);
                continue;
            };
            if known.object.status.is_final() {
                self.index.lock().remove(id);
            } else if known.object.expires_at <= now {
                // If somebody else was first it is due again, or over.
                self.finish(known, CommandStatus::Expired, None).await?;
            }
        }
        Ok(())
    }

    /// Ends the commands of a device that was deleted.
    async fn end_all(&self, key: Key) -> Result<(), RegistryError> {
        if self.surely_none(key) {
            return Ok(());
        }
        for known in self.unfinished_of(key).await? {
            let mut known = Some(known);
            while let Some(one) = known {
                let because = Some("the device was deleted".to_owned());
                known = self.finish(one, CommandStatus::Failed, because).await?;
            }
        }
        Ok(())
    }

    /// Deletes commands that finished long ago.
    async fn sweep(&self) -> Result<(), RegistryError> {
        let kept_micros = LocalCommands::FINISHED_DAYS * 24 * HOUR_MICROS;
        let before = self.clock.now().plus_micros(-kept_micros);
        let actor = Actor::system("router");
        let mut page = Page::first(1_000);
        loop {
            let records = self.registry.list_everywhere(Kind::Command, &page).await?;
            page.after = records.last().map(|record| record.id);
            let complete = records.len() < page.limit;
            for Versioned { object: command, .. } in readable::<Command>(records) {
                let (account, id) = (command.account, command.id.0);
                // Ids are in order of age: nothing behind this one is old enough.
                if command.created_at >= before {
                    return Ok(());
                }
                let over = command.status.is_final()
                    && command.finished_at.is_none_or(|finished| finished < before);
                if !over {
                    continue;
                }
                match self.registry.delete(account, Kind::Command, id, None, &actor).await {
                    // An owner before this one was at it as well.
                    Ok(()) | Err(RegistryError::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            if complete {
                return Ok(());
            }
        }
    }
}

/// Tries for the ownership of upkeep, for as long as `inner` is there.
async fn campaign(inner: Weak<Inner>, cluster: Arc<dyn Cluster>) {
    let own = |lease| {
        let inner = inner.upgrade()?;
        *inner.upkeep.lock() = Upkeep::Owner(lease);
        Some(())
    };
    loop {
        match hold(&*cluster, LocalCommands::UPKEEP_KEY).await {
            Ok(lease) => {
                let lease = Arc::new(lease);
                if own(Some(Arc::clone(&lease))).is_none() {
                    return;
                }
                info!(epoch = %lease.epoch(), "expires commands for all nodes");
                lease.lost().await;
                if own(None).is_none() {
                    return;
                }
                info!("expires commands for all nodes no more");
            }
            // Not a member yet, or no more.
            Err(_) => tokio::time::sleep(CAMPAIGN_AGAIN).await,
        }
    }
}
