//! What is done at start and every second: recovery, expiry, tidying up.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use fieldline_contracts::registry::{Versioned, readable};
use fieldline_contracts::{Actor, AuditAction, Kind, Page, RegistryError};
use fieldline_model::{Command, DeviceId};
use tracing::{info, warn};

use crate::LocalCommands;
use crate::queue::Inner;

const HOUR_MICROS: i64 = 3_600 * 1_000_000;
/// Changes of the registry read in one go.
const CHANGES_MAX: usize = 1_000;

impl Inner {
    pub(crate) async fn recover(self: &Arc<Self>) -> Result<usize, RegistryError> {
        let mut commands = Vec::new();
        for status in ["sent", "queued"] {
            let mut page = Page::first(Page::LIMIT_MAX);
            page.equals.push(("status".to_owned(), status.into()));
            loop {
                let records = self.registry.list_everywhere(Kind::Command, &page).await?;
                page.after = records.last().map(|record| record.id);
                let complete = records.len() < page.limit;
                let found = readable::<Command>(records);
                commands.extend(found.into_iter().map(|command| command.object));
                if complete {
                    break;
                }
            }
        }
        // Ids are in order of age. One that was on the wire is older than those behind it.
        commands.sort_by_key(|command| command.id);
        let mut waiting = 0;
        for command in commands {
            let slot = self.slot(command.account, command.device);
            if let Some(command) = self.again(&slot, command).await {
                self.content(&slot).await.waiting.push_back(command);
                waiting += 1;
            }
            self.release(slot);
        }
        if waiting > 0 {
            info!(waiting, "took up commands of an earlier run");
        }
        Ok(waiting)
    }

    pub(crate) async fn expire(&self) {
        if let Err(error) = self.follow_deletions().await {
            warn!(%error, "changes of the registry cannot be read");
        }
        let mut waiting = 0_u32;
        for slot in self.all_slots() {
            let left = self.settle_overdue(&slot, false).await;
            waiting = waiting.saturating_add(u32::try_from(left).unwrap_or(u32::MAX));
            self.release(slot);
        }
        metrics::gauge!("fieldline_router_commands_waiting").set(f64::from(waiting));
        let now = self.clock.now().as_micros();
        if now - self.swept_at.load(Ordering::Relaxed) >= HOUR_MICROS {
            self.swept_at.store(now, Ordering::Relaxed);
            if let Err(error) = self.sweep().await {
                warn!(%error, "finished commands cannot be tidied up");
            }
        }
    }

    /// Ends the commands of devices that were deleted.
    async fn follow_deletions(&self) -> Result<(), RegistryError> {
        loop {
            let after = self.followed.load(Ordering::Relaxed);
            let changes = self.registry.changes(after, CHANGES_MAX).await?;
            let Some(last) = changes.last() else { return Ok(()) };
            let last = last.sequence;
            for change in changes {
                let deleted = change.kind == Kind::Device && change.action == AuditAction::Delete;
                if deleted
                    && let Some(slot) = self.known_slot(change.account, DeviceId(change.object))
                {
                    self.settle_overdue(&slot, true).await;
                    self.release(slot);
                }
            }
            self.followed.store(last, Ordering::Relaxed);
        }
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
                if over {
                    self.registry.delete(account, Kind::Command, id, None, &actor).await?;
                }
            }
            if complete {
                return Ok(());
            }
        }
    }

    /// Commands of a device that wait now, for tests.
    #[cfg(test)]
    pub(crate) async fn waiting(
        &self,
        account: fieldline_model::AccountId,
        device: DeviceId,
    ) -> usize {
        let Some(slot) = self.known_slot(account, device) else { return 0 };
        let count = self.content(&slot).await.waiting.len();
        self.release(slot);
        count
    }
}
