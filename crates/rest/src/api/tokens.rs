//! API tokens.

use fieldline_auth::{DEVICES_MAX, NewToken};
use fieldline_contracts::registry::Versioned;
use fieldline_model::{AccountId, DeviceId, Scope, Timestamp, Token};
use hyper::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use utoipa::ToSchema;
use uuid::Uuid;

use super::accounts::{asked, chosen};
use crate::call::{Ctx, json, with_etag};
use crate::objects::{change, page, remove, scan};
use crate::patch::merged;
use crate::problem::Problem;
use crate::route::Answer;

/// A token, without what never leaves the server.
#[derive(Serialize, ToSchema)]
pub(crate) struct TokenView {
    id: Uuid,
    account: Uuid,
    /// What it is for.
    name: String,
    /// The first characters of the secret, to tell tokens apart.
    prefix: String,
    scopes: Vec<Scope>,
    /// The only devices it may see; empty for all of the account.
    devices: Vec<DeviceId>,
    /// The only networks it works from; empty for all.
    networks: Vec<String>,
    /// When it stops working.
    expires_at: Option<Timestamp>,
    created_at: Timestamp,
    created_by: String,
    /// Counts up with every change; the `ETag`.
    revision: u64,
    /// The secret, shown this once.
    #[serde(skip_serializing_if = "Option::is_none")]
    secret: Option<String>,
}

impl TokenView {
    fn of(token: Versioned<Token>) -> Self {
        let Versioned { object, revision } = token;
        let Token {
            id,
            account,
            name,
            secret_hash: _,
            prefix,
            scopes,
            devices,
            networks,
            expires_at,
            created_at,
            created_by,
        } = object;
        Self {
            id: id.0,
            account: account.0,
            name,
            prefix,
            scopes,
            devices,
            networks,
            expires_at,
            created_at,
            created_by,
            revision,
            secret: None,
        }
    }
}

/// A token to be made.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TokenInput {
    /// What it is for.
    name: String,
    /// What it may do; nobody gives more than he has.
    scopes: Vec<Scope>,
    /// The only devices it may see; empty for all of the account.
    #[serde(default)]
    devices: Vec<DeviceId>,
    /// The only networks it works from (`10.0.0.0/8`); empty for all.
    #[serde(default)]
    networks: Vec<String>,
    /// When it stops working; absent for never.
    #[serde(default)]
    expires_at: Option<Timestamp>,
    /// The account, for callers with the scope `root`; their own where absent.
    #[serde(default)]
    account: Option<Uuid>,
}

/// Members of a token that can be changed.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TokenPatch {
    /// What it is for.
    name: String,
    /// What it may do.
    scopes: Vec<Scope>,
    /// The only devices it may see.
    #[serde(default)]
    devices: Vec<DeviceId>,
    /// The only networks it works from.
    #[serde(default)]
    networks: Vec<String>,
    /// When it stops working.
    #[serde(default)]
    expires_at: Option<Timestamp>,
}

/// Checks that the account has these devices, but for those that a token named before.
async fn check_devices(
    ctx: &Ctx,
    account: AccountId,
    devices: &[DeviceId],
    kept: &[DeviceId],
) -> Result<(), Problem> {
    for device in devices.iter().filter(|device| !kept.contains(device)) {
        if ctx.app.services.ingest.device(account, *device).await?.is_none() {
            return Err(Problem::member(
                "devices",
                format!("there is no device {device} in this account"),
            ));
        }
    }
    Ok(())
}

/// `GET /tokens`
pub(crate) async fn list(ctx: Ctx) -> Answer {
    ctx.unrestricted("the list of tokens")?;
    let account = asked(&ctx)?;
    let listed = scan::<Token>(&ctx, account, Vec::new(), false, |_| true).await?;
    let items: Vec<TokenView> = listed.items.into_iter().map(TokenView::of).collect();
    page(&ctx, &items, listed.next.map(|id| id.to_string()))
}

/// `POST /tokens`
pub(crate) async fn create(ctx: Ctx) -> Answer {
    let TokenInput { name, scopes, devices, networks, expires_at, account } = ctx.json()?;
    let account = chosen(&ctx, account)?;
    if devices.len() <= DEVICES_MAX {
        check_devices(&ctx, account, &devices, &[]).await?;
    }
    let new = NewToken { name, scopes, devices, networks, expires_at };
    let auth = &ctx.app.services.auth;
    let (made, secret) = auth.create_token(&ctx.identity, account, new).await?;
    let revision = made.revision;
    let view = TokenView { secret: Some(secret), ..TokenView::of(made) };
    Ok(with_etag(json(StatusCode::CREATED, &view)?, &format!("\"{revision}\"")))
}

/// `GET /tokens/{id}`
pub(crate) async fn read(ctx: Ctx) -> Answer {
    ctx.unrestricted("a token")?;
    let token = ctx.load::<Token>(ctx.id(0, "token")?).await?;
    ctx.object(token.revision, &TokenView::of(token))
}

/// `PATCH /tokens/{id}`
pub(crate) async fn patch(ctx: Ctx) -> Answer {
    let id = ctx.id(0, "token")?;
    let body: Json = ctx.json()?;
    let auth = &ctx.app.services.auth;
    let named = body.get("devices").map(Vec::<DeviceId>::deserialize);
    if let Some(Ok(named)) = named
        && named.len() <= DEVICES_MAX
    {
        let kept = ctx.load::<Token>(id).await?.object.devices;
        check_devices(&ctx, ctx.account(), &named, &kept).await?;
    }
    let now = ctx.app.platform().clock.now();
    let changed = change::<Token>(&ctx, ctx.account(), id, |token, revision| {
        auth.check_token(&ctx.identity, &token)?;
        let view = TokenView::of(Versioned { object: token.clone(), revision });
        let edit = TokenPatch {
            name: token.name.clone(),
            scopes: token.scopes.clone(),
            devices: token.devices.clone(),
            networks: token.networks.clone(),
            expires_at: token.expires_at,
        };
        let TokenPatch { name, mut scopes, devices, networks, expires_at } =
            merged(&edit, &view, body.clone())?;
        if expires_at != token.expires_at && expires_at.is_some_and(|at| at <= now) {
            return Err(Problem::member(
                "expires_at",
                "has passed already; delete the token to end it now",
            ));
        }
        scopes.sort_unstable();
        scopes.dedup();
        let token = Token { name, scopes, devices, networks, expires_at, ..token };
        auth.check_token(&ctx.identity, &token)?;
        Ok(token)
    })
    .await?;
    ctx.object(changed.revision, &TokenView::of(changed))
}

/// `DELETE /tokens/{id}`
pub(crate) async fn delete(ctx: Ctx) -> Answer {
    ctx.unrestricted("deleting a token")?;
    let id = ctx.id(0, "token")?;
    remove::<Token>(&ctx, ctx.account(), id).await
}
