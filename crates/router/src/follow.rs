//! How a node hears of what others did: by the registry's changes, at once.

use std::sync::{Arc, Weak};
use std::time::Duration;

use fieldline_contracts::registry::{RegistryExt, readable};
use fieldline_contracts::{Audit, AuditAction, Kind, Page, RegistryError};
use fieldline_model::{AccountId, Command, CommandId, DeviceId};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::warn;

use crate::index::Index;
use crate::queue::{Inner, Key, Known};

/// Wait before the registry is asked again after it failed.
const RETRY_DELAY: Duration = Duration::from_millis(200);
/// Changes read in one go.
const CHANGES_MAX: usize = 1_000;
/// Deleted devices that are remembered for upkeep. Commands of more expire.
const DELETED_MAX: usize = 100_000;

/// Follows the registry until it or `inner` is gone.
pub(crate) async fn follow(inner: Weak<Inner>, mut newest: watch::Receiver<u64>) {
    let mut seen = *newest.borrow_and_update();
    let mut loaded = false;
    loop {
        let Some(strong) = inner.upgrade() else { return };
        let followed = async {
            if !loaded {
                strong.load_index().await?;
                loaded = true;
                strong.followed.send_replace(seen);
            }
            strong.catch_up(&mut seen).await
        };
        let followed = followed.await;
        drop(strong);
        match followed {
            Ok(()) => {
                if newest.changed().await.is_err() {
                    return;
                }
            }
            Err(error) => {
                warn!(%error, "changes of commands cannot be read, trying again");
                tokio::time::sleep(RETRY_DELAY).await;
            }
        }
    }
}

impl Inner {
    /// Waits until all changes made before this call were followed; false if that takes longer than `limit`.
    pub(crate) async fn caught_up(&self, limit: Duration) -> bool {
        let newest = *self.registry.watch().borrow();
        let mut followed = self.followed.subscribe();
        // Nothing was followed before the first load, whatever the number.
        let done = timeout(limit, followed.wait_for(|followed| *followed >= newest.max(1)));
        newest == 0 || matches!(done.await, Ok(Ok(_)))
    }

    /// Whether it is certain that a device has no unfinished command that this node could know of.
    pub(crate) fn surely_none(&self, key: Key) -> bool {
        let newest = *self.registry.watch().borrow();
        *self.followed.borrow() >= newest.max(1) && self.index.lock().has_none(key)
    }

    pub(crate) fn unfinished(&self) -> usize {
        self.index.lock().len()
    }

    /// Reads all commands that are not finished.
    pub(crate) async fn load_index(&self) -> Result<(), RegistryError> {
        let mut index = Index::default();
        // In this order: one that is sent meanwhile is in both.
        for status in ["queued", "sent", "queued"] {
            let mut page = Page::first(Page::LIMIT_MAX);
            page.equals.push(("status".to_owned(), status.into()));
            loop {
                let records = self.registry.list_everywhere(Kind::Command, &page).await?;
                page.after = records.last().map(|record| record.id);
                let complete = records.len() < page.limit;
                for command in readable::<Command>(records) {
                    index.insert(&command.object);
                }
                if complete {
                    break;
                }
            }
        }
        self.index.lock().absorb(index);
        Ok(())
    }

    async fn catch_up(self: &Arc<Self>, seen: &mut u64) -> Result<(), RegistryError> {
        loop {
            let changes = self.registry.changes(*seen, CHANGES_MAX).await?;
            let Some(last) = changes.last() else { return Ok(()) };
            let last = last.sequence;
            let created = self.read_created(&changes).await?;
            for change in &changes {
                match change.kind {
                    Kind::Command => self.follow_command(change).await,
                    Kind::Device if change.action == AuditAction::Delete => {
                        let mut deleted = self.deleted.lock();
                        if deleted.len() < DELETED_MAX {
                            deleted.insert((change.account, DeviceId(change.object)));
                        }
                    }
                    _ => {}
                }
            }
            for known in created {
                let key = (known.object.account, known.object.device);
                self.reconcile_soon(key, known.object.id).await;
            }
            *seen = last;
            self.followed.send_replace(last);
        }
    }

    /// The unfinished commands among those that others created.
    async fn read_created(
        self: &Arc<Self>,
        changes: &[Audit],
    ) -> Result<Vec<Known>, RegistryError> {
        let new = |change: &&Audit| {
            let created = change.kind == Kind::Command && change.action == AuditAction::Create;
            created && self.index.lock().device(CommandId(change.object)).is_none()
        };
        let mut found = Vec::new();
        let mut reads: JoinSet<Result<Option<Known>, RegistryError>> = JoinSet::new();
        let mut new = changes.iter().filter(new).map(|change| (change.account, change.object));
        loop {
            while reads.len() < crate::queue::READS_MAX
                && let Some((account, id)) = new.next()
            {
                let inner = Arc::clone(self);
                reads.spawn(async move { inner.read(account, CommandId(id)).await });
            }
            let Some(read) = reads.join_next().await else { break };
            let read = read.map_err(|error| RegistryError::Unavailable(error.to_string()))?;
            if let Some(known) = read?.filter(|known| !known.object.status.is_final()) {
                self.index.lock().insert(&known.object);
                found.push(known);
            }
        }
        // As they were queued.
        found.sort_by_key(|known| (known.object.created_at, known.revision));
        Ok(found)
    }

    /// A command that is there and can be read.
    pub(crate) async fn read(
        &self,
        account: AccountId,
        id: CommandId,
    ) -> Result<Option<Known>, RegistryError> {
        match self.registry.get_object::<Command>(account, id.0).await {
            Err(error @ RegistryError::Corrupt { .. }) => {
                warn!(%error, "the command is passed over");
                Ok(None)
            }
            read => read,
        }
    }

    async fn follow_command(self: &Arc<Self>, change: &Audit) {
        let id = CommandId(change.object);
        let of = self.index.lock().device(id);
        let tracked = self.tracked.lock().get(&id).copied();
        // Whatever has an end has the time of it.
        let over = change.action == AuditAction::Delete
            || change.changed.iter().any(|member| member == "finished_at");
        if over {
            self.index.lock().remove(id);
        }
        if change.action == AuditAction::Create {
            return;
        }
        self.wake(id);
        // A revision is the number of the change that made it: these are our own.
        if tracked.is_some_and(|(_, revision)| revision >= change.sequence) {
            return;
        }
        if let Some(key) = tracked.map(|(key, _)| key).or(of) {
            self.reconcile_soon(key, id).await;
        }
    }

    /// Has a command of a device read again, if the device is held here. Many devices at a time, one after the other
    /// of each.
    async fn reconcile_soon(self: &Arc<Self>, key: Key, id: CommandId) {
        if self.known_slot(key).is_none() {
            return;
        }
        // An error says that this is ending.
        let Ok(permit) = Arc::clone(&self.reads).acquire_owned().await else { return };
        let inner = Arc::clone(self);
        self.runtime.spawn(async move {
            inner.reconcile(key, id).await;
            drop(permit);
        });
    }
}
