//! Accounts: tenants. Managed with the scope `root`; every caller sees its own.

use fieldline_contracts::registry::{Versioned, readable};
use fieldline_contracts::{Kind, Page, RegistryError, RegistryExt as _, Retention};
use fieldline_model::object::Labels;
use fieldline_model::{Account, AccountId, DeviceId, Scope, Timestamp};
use hyper::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use utoipa::ToSchema;
use uuid::Uuid;

use super::users::Roots;
use crate::call::{Ctx, empty};
use crate::objects::{
    LIMIT_DEFAULT, LIMIT_MAX, change, check_labels, check_name, check_range, page,
};
use crate::patch::merged;
use crate::problem::{Problem, missing};
use crate::route::Answer;

/// An account.
#[derive(Serialize, ToSchema)]
pub(crate) struct AccountView {
    #[serde(flatten)]
    account: Account,
    /// Counts up with every change; the `ETag`.
    revision: u64,
}

impl AccountView {
    fn of(found: Versioned<Account>) -> Self {
        Self { account: found.object, revision: found.revision }
    }
}

/// An account to be made, and the members of one that can be changed.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct AccountInput {
    /// Unique on this installation.
    #[schema(min_length = 1, max_length = 64)]
    name: String,
    /// Whether its devices, users and tokens are let in.
    #[serde(default = "yes")]
    enabled: bool,
    /// Days that messages are kept; 0 keeps them until space runs out.
    #[serde(default)]
    #[schema(maximum = 36_500)]
    retention_days: u32,
    /// Bytes of messages that are kept; 0 sets no limit.
    #[serde(default)]
    storage_bytes_max: u64,
    /// Labels.
    #[serde(default)]
    labels: Labels,
}

pub(crate) const fn yes() -> bool {
    true
}

impl AccountInput {
    fn of(account: &Account) -> Self {
        let Account { name, enabled, retention_days, storage_bytes_max, labels, .. } =
            account.clone();
        Self { name, enabled, retention_days, storage_bytes_max, labels }
    }

    fn onto(self, account: Account) -> Result<Account, Problem> {
        let Self { name, enabled, retention_days, storage_bytes_max, labels } = self;
        check_name("name", &name, 64)?;
        check_range("retention_days", retention_days, 0, 36_500)?;
        check_labels(&labels)?;
        Ok(Account { name, enabled, retention_days, storage_bytes_max, labels, ..account })
    }
}

/// `GET /accounts`
pub(crate) async fn list(ctx: Ctx) -> Answer {
    if !ctx.identity.may(Scope::Root) {
        let own = ctx.load::<Account>(ctx.account().0).await?;
        return page(&ctx, &[AccountView::of(own)], None);
    }
    let limit = ctx.query.limit(LIMIT_DEFAULT, LIMIT_MAX)?;
    let asked = Page { after: ctx.query.after_id()?, ..Page::first(limit) };
    let found = ctx.app.registry().list_everywhere(Kind::Account, &asked).await?;
    let next = (found.len() == limit).then(|| found.last().map(|last| last.id.to_string()));
    let items: Vec<_> = readable::<Account>(found).into_iter().map(AccountView::of).collect();
    page(&ctx, &items, next.flatten())
}

/// `POST /accounts`
pub(crate) async fn create(ctx: Ctx) -> Answer {
    let input: AccountInput = ctx.json()?;
    let clock = &ctx.app.platform().clock;
    let now = clock.now();
    let blank = Account {
        id: AccountId::new(now, clock.random()),
        name: String::new(),
        enabled: true,
        retention_days: 0,
        storage_bytes_max: 0,
        labels: Labels::new(),
        created_at: now,
    };
    let account = input.onto(blank)?;
    let made = ctx.app.registry().create_object(account.id, &account, &ctx.identity.actor).await?;
    ctx.object(made.revision, &AccountView::of(made))
}

/// The account of this path, if the caller may see it: its own, or any with `root`.
fn seen(ctx: &Ctx) -> Result<AccountId, Problem> {
    let id = AccountId(ctx.id(0, "account")?);
    if id == ctx.account() || ctx.identity.may(Scope::Root) {
        return Ok(id);
    }
    Err(missing("account", ctx.segment(0)))
}

/// `GET /accounts/{id}`
pub(crate) async fn read(ctx: Ctx) -> Answer {
    let id = seen(&ctx)?;
    let found = ctx.app.registry().get_object::<Account>(id, id.0).await?;
    let found = found.ok_or_else(|| missing("account", ctx.segment(0)))?;
    ctx.object(found.revision, &AccountView::of(found))
}

/// `PATCH /accounts/{id}`
pub(crate) async fn patch(ctx: Ctx) -> Answer {
    let id = seen(&ctx)?;
    let body: Json = ctx.json()?;
    let disables = body.get("enabled").is_some_and(|enabled| *enabled == false);
    let roots = Roots::without(&ctx, disables, |user| user.account == id).await?;
    let changed = change::<Account>(&ctx, id, id.0, |account, revision| {
        let view = AccountView { account: account.clone(), revision };
        let input = merged(&AccountInput::of(&account), &view, body.clone())?;
        if !input.enabled && id == ctx.account() {
            return Err(Problem::conflict(
                "you cannot disable the account that you are signed in to",
            ));
        }
        if !input.enabled {
            roots.check()?;
        }
        input.onto(account)
    })
    .await?;
    ctx.object(changed.revision, &AccountView::of(changed))
}

/// `DELETE /accounts/{id}`: with everything in it.
pub(crate) async fn delete(ctx: Ctx) -> Answer {
    let id = seen(&ctx)?;
    if id == ctx.account() {
        return Err(Problem::conflict("you cannot delete the account that you are signed in to"));
    }
    let (registry, by) = (ctx.app.registry(), &ctx.identity.actor);
    let found = registry.get_object::<Account>(id, id.0).await?;
    let found = found.ok_or_else(|| missing("account", ctx.segment(0)))?;
    if let Some(expected) = ctx.if_match()?
        && expected != found.revision
    {
        return Err(RegistryError::Changed { expected, found: found.revision }.into());
    }
    let roots = Roots::without(&ctx, true, |user| user.account == id).await?;
    roots.check()?;
    // Nobody gets in from here on, also if this is cut short and has to be done again.
    if found.object.enabled {
        let closed = Account { enabled: false, ..found.object };
        registry.update_object(id, &closed, Some(found.revision), by).await?;
    }
    drop(roots);
    for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Account) {
        loop {
            let page = registry.list(id, kind, &Page::first(1_000)).await?;
            if page.is_empty() {
                break;
            }
            for record in page {
                if kind == Kind::Device {
                    ctx.forget(id, DeviceId(record.id)).await;
                }
                gone(registry.delete(id, kind, record.id, None, by).await)?;
            }
        }
    }
    let all = Retention { account: id, before: Some(Timestamp::MAX), bytes_max: None };
    ctx.app.platform().history.retain(all).await?;
    gone(registry.delete(id, Kind::Account, id.0, None, by).await)?;
    Ok(empty(StatusCode::NO_CONTENT))
}

/// What is deleted already is as good as deleted.
fn gone(result: Result<(), RegistryError>) -> Result<(), Problem> {
    match result {
        Ok(()) | Err(RegistryError::NotFound { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The account that a request is about: the caller's, or with `root` the one that `account` names.
pub(crate) fn chosen(ctx: &Ctx, named: Option<Uuid>) -> Result<AccountId, Problem> {
    match named {
        Some(id) if id != ctx.account().0 => {
            if ctx.identity.may(Scope::Root) {
                Ok(AccountId(id))
            } else {
                Err(missing("account", &id.to_string()))
            }
        }
        _ => Ok(ctx.account()),
    }
}

/// The account of the query parameter `account`.
pub(crate) fn asked(ctx: &Ctx) -> Result<AccountId, Problem> {
    chosen(ctx, ctx.query.parsed::<Uuid>("account")?)
}
