//! What callers ask, on any node: to queue a command, to take it back, to wait for it.

use std::sync::Arc;

use fieldline_contracts::registry::{RegistryExt, Versioned};
use fieldline_contracts::{Actor, CommandError, Kind, Page, RegistryError};
use fieldline_model::{Command, CommandId, CommandStatus};
use tokio::sync::watch;

use crate::LocalCommands;
use crate::queue::{Inner, Key};
use crate::write::status_name;

/// Times that a cancel reads a command again that others change.
const CANCEL_TRIES: u32 = 20;

impl Inner {
    pub(crate) async fn submit(
        self: &Arc<Self>,
        command: Command,
        actor: &Actor,
    ) -> Result<Command, CommandError> {
        let key = (command.account, command.device);
        let slot = self.slot(key);
        // Those of this node come one after the other; those of other nodes are told by the registry.
        let mut content = slot.content.lock().await;
        let claim = self.claim_at_once(&content, &command);
        let stored = claim.as_ref().unwrap_or(&command);
        let submitted = async {
            let waiting = match Self::count_here(&content) {
                Some(count) => count,
                None => self.unfinished_of(key).await?.len(),
            };
            if waiting >= LocalCommands::WAITING_MAX {
                return Err(CommandError::QueueFull(waiting));
            }
            let created = self.registry.create_object(command.account, stored, actor).await?;
            // Only that many at once on other nodes could have been missed.
            if waiting >= LocalCommands::WAITING_MAX / 2 {
                self.withdraw_beyond_max(key, &created, actor).await?;
            }
            Ok(created)
        };
        let submitted = submitted.await;
        if let (Ok(created), Some(_)) = (&submitted, &claim) {
            self.index.lock().insert(&created.object);
            self.tell(&command);
            self.hand_over(&mut content, created.clone(), command.clone());
        } else if let (Err(CommandError::Registry(RegistryError::Unavailable(_))), Some(claim)) =
            (&submitted, claim.clone())
        {
            self.doubt(&mut content, claim);
        }
        drop(content);
        self.release(slot);
        let created = submitted?;
        if claim.is_some() {
            return Ok(command);
        }
        self.index.lock().insert(&created.object);
        self.tell(&created.object);
        // The caller need not wait for it to be sent.
        self.runtime.spawn(Arc::clone(self).created(key, created));
        Ok(command)
    }

    /// Commands of a device that are not finished, a few more than there may be at most.
    pub(crate) async fn unfinished_of(
        &self,
        (account, device): Key,
    ) -> Result<Vec<Versioned<Command>>, RegistryError> {
        let mut all: Vec<Versioned<Command>> = Vec::new();
        for status in ["queued", "sent"] {
            let mut page = Page::first(2 * LocalCommands::WAITING_MAX);
            page.equals.push(("device".to_owned(), device.to_string().into()));
            page.equals.push(("status".to_owned(), status.into()));
            let found = self.registry.list_objects::<Command>(account, &page).await?;
            all.retain(|one| found.iter().all(|other| other.object.id != one.object.id));
            all.extend(found);
        }
        Ok(all)
    }

    /// Takes a new command back if others, on other nodes, were created before it and filled the queue.
    async fn withdraw_beyond_max(
        &self,
        key: Key,
        created: &Versioned<Command>,
        actor: &Actor,
    ) -> Result<(), CommandError> {
        let all = match self.unfinished_of(key).await {
            Ok(all) => all,
            // It is queued: that is what the caller asked for.
            Err(_) => return Ok(()),
        };
        let before = all.iter().filter(|one| one.revision < created.revision).count();
        if before < LocalCommands::WAITING_MAX {
            return Ok(());
        }
        let (account, id) = (created.object.account, created.object.id.0);
        let kind = Kind::Command;
        match self.registry.delete(account, kind, id, Some(created.revision), actor).await {
            Ok(()) => Err(CommandError::QueueFull(before)),
            // It is being sent already, or cannot be taken back now.
            Err(_) => Ok(()),
        }
    }

    /// Takes a queued command back. What the registry says counts: whoever wants to send it has to be first there.
    pub(crate) async fn cancel(
        &self,
        account: fieldline_model::AccountId,
        id: CommandId,
        actor: &Actor,
    ) -> Result<Command, CommandError> {
        let mut tries = 1;
        loop {
            let known = self.registry.get_object::<Command>(account, id.0).await?;
            let Versioned { object: mut command, revision } =
                known.ok_or(CommandError::NotFound(id))?;
            if command.status != CommandStatus::Queued {
                return Err(CommandError::TooLate(status_name(command.status)));
            }
            command.status = CommandStatus::Cancelled;
            command.finished_at = Some(self.clock.now());
            match self.registry.update_object(account, &command, Some(revision), actor).await {
                Ok(cancelled) => {
                    self.tell(&cancelled.object);
                    return Ok(cancelled.object);
                }
                Err(RegistryError::Changed { .. }) if tries < CANCEL_TRIES => tries += 1,
                Err(RegistryError::NotFound { .. }) => return Err(CommandError::NotFound(id)),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// A sign for each time that the command may have changed.
    pub(crate) fn wait_for(self: &Arc<Self>, id: CommandId) -> Wait {
        let mut waits = self.waits.lock();
        let sender = waits.entry(id).or_insert_with(|| watch::Sender::new(0));
        Wait { changes: Some(sender.subscribe()), inner: Arc::clone(self), id }
    }

    /// Wakes those who wait for a command.
    pub(crate) fn wake(&self, id: CommandId) {
        if let Some(sender) = self.waits.lock().get(&id) {
            sender.send_modify(|version| *version = version.wrapping_add(1));
        }
    }
}

/// Somebody waits for a command.
pub(crate) struct Wait {
    inner: Arc<Inner>,
    id: CommandId,
    changes: Option<watch::Receiver<u64>>,
}

impl Wait {
    /// Waits for the next sign. Cancel-safe.
    pub(crate) async fn changed(&mut self) -> Result<(), watch::error::RecvError> {
        match &mut self.changes {
            Some(changes) => changes.changed().await,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        let mut waits = self.inner.waits.lock();
        // Gone before it is counted.
        self.changes = None;
        if waits.get(&self.id).is_some_and(|sender| sender.receiver_count() == 0) {
            waits.remove(&self.id);
        }
    }
}
