//! What happened: events, and the audit trail.

use fieldline_contracts::registry::AuditAction;
use fieldline_contracts::{Audit, Kind, Order};
use fieldline_ingest::stored_event;
use fieldline_model::{Event, Series, Timestamp};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use super::messages::stored_page;
use crate::call::Ctx;
use crate::objects::{LIMIT_DEFAULT, LIMIT_MAX, page};
use crate::route::Answer;

/// One change of an object.
#[derive(Serialize, ToSchema)]
pub(crate) struct AuditView {
    /// Counts up over the whole installation; pass the last one as `before` for the page after.
    sequence: u64,
    at: Timestamp,
    actor: ActorView,
    /// `create`, `update` or `delete`.
    #[schema(value_type = String)]
    action: AuditAction,
    /// Kind of the object.
    #[schema(value_type = String)]
    kind: Kind,
    object: Uuid,
    /// Names of the members that changed, for an update.
    changed: Vec<String>,
}

/// Who made a change.
#[derive(Serialize, ToSchema)]
pub(crate) struct ActorView {
    /// `user:NAME`, `token:PREFIX` or `system:PART`.
    name: String,
    /// The address it came from.
    address: Option<String>,
}

impl AuditView {
    fn of(audit: Audit) -> Self {
        let Audit { sequence, at, account: _, actor, action, kind, object, changed } = audit;
        let actor = ActorView { name: actor.name, address: actor.address };
        Self { sequence, at, actor, action, kind, object, changed }
    }
}

/// `GET /events`, newest first
pub(crate) async fn events(ctx: Ctx) -> Answer {
    let limit = ctx.query.limit(LIMIT_DEFAULT, LIMIT_MAX)?;
    let series = Series::events(ctx.account());
    stored_page(&ctx, series, Order::Descending, limit, |out, stored| {
        let heard = stored_event(stored).filter(|event: &Event| ctx.identity.may_hear(event));
        if let Some(Ok(text)) = heard.map(|event| serde_json::to_string(&event)) {
            out.push_str(&text);
        }
    })
    .await
}

/// `GET /audit`, newest first
pub(crate) async fn audit(ctx: Ctx) -> Answer {
    ctx.unrestricted("the audit trail")?;
    let limit = ctx.query.limit(LIMIT_DEFAULT, LIMIT_MAX)?;
    let before = ctx.query.parsed::<u64>("before")?.or(ctx.query.after_number()?);
    let found = ctx.app.registry().audit(ctx.account(), before, limit).await?;
    let last = found.last().filter(|_| found.len() == limit);
    let next = last.map(|last| last.sequence.to_string());
    let items: Vec<AuditView> = found.into_iter().map(AuditView::of).collect();
    page(&ctx, &items, next)
}
