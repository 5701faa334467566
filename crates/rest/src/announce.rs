//! Tells of changes as they happen: an event for each change in the audit trail.
//!
//! The trail itself is in the registry, written with the change; the events make
//! it prompt for those who watch live. Sessions and commands have events of their own.

use std::sync::Arc;

use fieldline_contracts::registry::AuditAction;
use fieldline_contracts::{Audit, Kind};
use fieldline_ingest::own_params;
use fieldline_model::{EventKind, Value};

use crate::app::App;

/// Changes read at once.
const PAGE: usize = 500;

/// Follows the registry until shutdown.
pub(crate) async fn changes(app: Arc<App>) {
    let mut changed = app.registry().watch();
    let mut after = *changed.borrow_and_update();
    loop {
        tokio::select! {
            () = app.shutdown.cancelled() => return,
            moved = changed.changed() => {
                if moved.is_err() {
                    return;
                }
            }
        }
        changed.mark_unchanged();
        loop {
            let page = match app.registry().changes(after, PAGE).await {
                Ok(page) => page,
                Err(error) => {
                    tracing::warn!(%error, "changes could not be read, the next one is tried again");
                    break;
                }
            };
            let whole = page.len() < PAGE;
            for audit in page {
                after = audit.sequence;
                if !matches!(audit.kind, Kind::Session | Kind::Command) {
                    announce(&app, audit).await;
                }
            }
            if whole {
                break;
            }
        }
    }
}

async fn announce(app: &App, audit: Audit) {
    let Audit { sequence, at, account, actor, action, kind, object, changed } = audit;
    let action = match action {
        AuditAction::Create => "create",
        AuditAction::Update => "update",
        AuditAction::Delete => "delete",
    };
    let mut pairs: Vec<(&str, Value)> = vec![
        ("action", action.into()),
        ("object.kind", kind.name().into()),
        ("actor", actor.name.into()),
        ("audit.sequence", Value::from(sequence)),
    ];
    pairs.extend(actor.address.map(|address| ("address", Value::from(address))));
    if !changed.is_empty() {
        pairs.push(("changed", Value::Json(Arc::new(changed.into()))));
    }
    let ingest = &app.services.ingest;
    let mut event = ingest.new_event(account, EventKind::Audit, object, own_params(pairs));
    event.timestamp = at;
    ingest.event(event).await;
}
