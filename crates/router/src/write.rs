//! How a command's next state is written, so that of several who want to one is first; and how it is told.

use std::time::Duration;

use fieldline_contracts::registry::RegistryExt;
use fieldline_contracts::{Actor, RegistryError};
use fieldline_model::{
    Command, CommandStatus, Event, EventId, EventKind, ParamName, Params, Timestamp, Value,
};
use tracing::warn;

use crate::LocalCommands;
use crate::queue::{Inner, Known};

/// Tries to write a command's status, and the wait between them.
const WRITE_TRIES: u32 = 5;
const WRITE_RETRY_DELAY: Duration = Duration::from_millis(100);

/// What became of a write.
pub(crate) enum Written {
    Done(Known),
    /// Somebody else was first; what stands there now.
    Lost(Option<Known>),
    /// The registry does not answer. It may have been written.
    Unknown,
}

impl Inner {
    /// Writes a command's new state over the one that is known. In `doubt` it may have been written already.
    pub(crate) async fn write(&self, wanted: &Command, base: &Known, mut doubt: bool) -> Written {
        let actor = Actor::system("router");
        let mut expected = base.revision;
        let mut tries = 1;
        loop {
            let account = wanted.account;
            let error =
                match self.registry.update_object(account, wanted, Some(expected), &actor).await {
                    Ok(known) => return Written::Done(known),
                    Err(RegistryError::Changed { .. }) => {
                        match self.registry.get_object::<Command>(account, wanted.id.0).await {
                            Ok(Some(found)) if doubt && same(&found.object, wanted) => {
                                return Written::Done(found);
                            }
                            // The write that this one builds on, of which it was not known whether it was made.
                            Ok(Some(found))
                                if same(&found.object, &base.object)
                                    && found.revision != expected =>
                            {
                                expected = found.revision;
                                continue;
                            }
                            Ok(found) => return Written::Lost(found),
                            Err(error) => error,
                        }
                    }
                    Err(error) => error,
                };
            match error {
                RegistryError::Unavailable(_) => {
                    doubt = true;
                    if tries == WRITE_TRIES {
                        warn!(%error, command = %wanted.id, "a command's status is written later");
                        return Written::Unknown;
                    }
                    tries += 1;
                    tokio::time::sleep(WRITE_RETRY_DELAY).await;
                }
                RegistryError::NotFound { .. } => return Written::Lost(None),
                error => {
                    warn!(%error, command = %wanted.id, "a command's status was not written");
                    return Written::Lost(None);
                }
            }
        }
    }

    /// Finishes a command that is in nobody's hands. What stands there if somebody else was first; `None` if it is
    /// over either way.
    pub(crate) async fn finish(
        &self,
        known: Known,
        status: CommandStatus,
        error: Option<String>,
    ) -> Result<Option<Known>, RegistryError> {
        let wanted = finished(known.object.clone(), status, error, self.clock.now());
        match self.write(&wanted, &known, false).await {
            Written::Done(known) => {
                self.tell(&known.object);
                Ok(None)
            }
            Written::Lost(found) => Ok(found.filter(|known| !known.object.status.is_final())),
            Written::Unknown => Err(RegistryError::Unavailable("it does not answer".to_owned())),
        }
    }

    /// Tells that a command has changed: to those who wait, and as an event.
    pub(crate) fn tell(&self, command: &Command) {
        self.wake(command.id);
        if command.status.is_final() {
            self.index.lock().remove(command.id);
        }
        let status = status_name(command.status);
        metrics::counter!("fieldline_router_commands_total", "status" => status).increment(1);
        let Some(sink) = self.events.get() else { return };
        let mut params = Params::with_capacity(5);
        let mut push = |name: &str, value: Value| {
            if let Ok(name) = ParamName::new(name) {
                params.push(name, value);
            }
        };
        push("command.id", command.id.to_string().into());
        push("command.name", command.name.as_str().into());
        push("command.status", status.into());
        if let Some(answer) = &command.answer {
            push("command.answer", answer.as_str().into());
        }
        if let Some(error) = &command.error {
            push("command.error", error.as_str().into());
        }
        let now = self.clock.now();
        sink(Event {
            id: EventId::new(now, self.clock.random()),
            account: command.account,
            kind: EventKind::Command,
            object: command.device.0,
            timestamp: now,
            params,
        });
    }
}

pub(crate) fn finished(
    mut command: Command,
    status: CommandStatus,
    error: Option<String>,
    now: Timestamp,
) -> Command {
    command.status = status;
    command.error = error;
    command.finished_at = Some(now);
    command
}

/// Whether two are of one state. The instant of a try is its mark: no two have the same.
pub(crate) fn same(one: &Command, other: &Command) -> bool {
    let state = |c: &Command| (c.status, c.attempts, c.sent_at, c.finished_at);
    state(one) == state(other) && one.answer == other.answer && one.error == other.error
}

pub(crate) fn status_name(status: CommandStatus) -> &'static str {
    match status {
        CommandStatus::Queued => "queued",
        CommandStatus::Sent => "sent",
        CommandStatus::Answered => "answered",
        CommandStatus::Failed => "failed",
        CommandStatus::Expired => "expired",
        CommandStatus::Cancelled => "cancelled",
    }
}

/// The text, cut at a character's border to what is kept.
pub(crate) fn cut(mut text: String) -> String {
    let mut end = LocalCommands::ANSWER_BYTES_MAX.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}
