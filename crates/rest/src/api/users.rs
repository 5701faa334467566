//! Users: people who sign in.

use fieldline_auth::{IdentityKind, LINK_AGE_MICROS_MAX, NewUser};
use fieldline_contracts::registry::Versioned;
use fieldline_model::{Scope, Timestamp, User, UserId};
use hyper::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use tokio::sync::MutexGuard;
use utoipa::ToSchema;
use uuid::Uuid;

use super::accounts::{asked, chosen, yes};
use crate::call::{Ctx, json, with_etag};
use crate::objects::{change, page, remove, scan};
use crate::patch::merged;
use crate::problem::Problem;
use crate::route::Answer;

/// A user, without what never leaves the server.
#[derive(Serialize, ToSchema)]
pub(crate) struct UserView {
    id: Uuid,
    account: Uuid,
    /// The name to sign in with.
    name: String,
    scopes: Vec<Scope>,
    enabled: bool,
    /// Whether a password is set.
    has_password: bool,
    created_at: Timestamp,
    /// Counts up with every change; the `ETag`.
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<u64>,
    /// Address of a one-time link, shown once, where the user was made without a password.
    #[serde(skip_serializing_if = "Option::is_none")]
    link: Option<String>,
}

impl UserView {
    pub(crate) fn of(user: User, revision: Option<u64>) -> Self {
        let User { id, account, name, scopes, password_hash, enabled, created_at } = user;
        Self {
            id: id.0,
            account: account.0,
            name,
            scopes,
            enabled,
            has_password: password_hash.is_some(),
            created_at,
            revision,
            link: None,
        }
    }

    fn versioned(user: Versioned<User>) -> Self {
        Self::of(user.object, Some(user.revision))
    }
}

/// A user to be made.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct UserInput {
    /// Unique on this installation.
    name: String,
    /// What the user may do.
    scopes: Vec<Scope>,
    /// Without one the user signs in by the link in the answer, and sets one.
    #[serde(default)]
    password: Option<String>,
    /// The account, for callers with the scope `root`; their own where absent.
    #[serde(default)]
    account: Option<Uuid>,
}

/// Members of a user that can be changed.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct UserPatch {
    /// Unique on this installation.
    name: String,
    /// What the user may do.
    scopes: Vec<Scope>,
    /// Whether the user is let in.
    #[serde(default = "yes")]
    enabled: bool,
}

/// A one-time link.
#[derive(Serialize, ToSchema)]
pub(crate) struct LinkView {
    /// Address to open, beginning at the server's own.
    link: String,
    /// When it stops working.
    expires_at: Timestamp,
}

fn link(secret: &str) -> String {
    format!("/#/sign-in?link={secret}")
}

/// `GET /users`
pub(crate) async fn list(ctx: Ctx) -> Answer {
    ctx.unrestricted("the list of users")?;
    let account = asked(&ctx)?;
    let listed = scan::<User>(&ctx, account, Vec::new(), false, |_| true).await?;
    let items: Vec<UserView> = listed.items.into_iter().map(UserView::versioned).collect();
    page(&ctx, &items, listed.next.map(|id| id.to_string()))
}

/// `POST /users`
pub(crate) async fn create(ctx: Ctx) -> Answer {
    let UserInput { name, scopes, password, account } = ctx.json()?;
    let account = chosen(&ctx, account)?;
    let new = NewUser { name, scopes, password };
    let auth = &ctx.app.services.auth;
    let (made, secret) = auth.create_user(&ctx.identity, account, new).await?;
    let revision = made.revision;
    let mut view = UserView::versioned(made);
    view.link = secret.map(|secret| link(&secret));
    Ok(with_etag(json(StatusCode::CREATED, &view)?, &format!("\"{revision}\"")))
}

/// `GET /users/{id}`
pub(crate) async fn read(ctx: Ctx) -> Answer {
    ctx.unrestricted("a user")?;
    let user = ctx.load::<User>(ctx.id(0, "user")?).await?;
    ctx.object(user.revision, &UserView::versioned(user))
}

/// Alone among those who may let users with the scope `root` go: of two at once, one has to stay.
pub(crate) struct Roots<'a> {
    _alone: Option<MutexGuard<'a, ()>>,
    left: bool,
}

impl<'a> Roots<'a> {
    /// Looks who is there beside those that are `leaving`. Where none of them `may_be` one with
    /// that scope, there is nothing to look for.
    pub(crate) async fn without(
        ctx: &'a Ctx,
        may_be: bool,
        leaving: impl Fn(&User) -> bool + Send,
    ) -> Result<Self, Problem> {
        if !may_be {
            return Ok(Self { _alone: None, left: true });
        }
        let alone = ctx.app.roots.lock().await;
        let left = ctx.app.services.auth.leaves_root(leaving).await?;
        Ok(Self { _alone: Some(alone), left })
    }

    /// Refuses to let the last one go.
    pub(crate) fn check(&self) -> Result<(), Problem> {
        if self.left {
            return Ok(());
        }
        Err(Problem::conflict(
            "nobody with the scope `root` could sign in any more; give it to another user with a \
             password first",
        ))
    }
}

/// `PATCH /users/{id}`
pub(crate) async fn patch(ctx: Ctx) -> Answer {
    let id = ctx.id(0, "user")?;
    let body: Json = ctx.json()?;
    let auth = &ctx.app.services.auth;
    let root = ctx.load::<User>(id).await?.object.scopes.contains(&Scope::Root);
    let roots = Roots::without(&ctx, root, |user| user.id == UserId(id)).await?;
    let changed = change::<User>(&ctx, ctx.account(), id, |user, revision| {
        // Neither what the user has nor what it is to get may be beyond the caller.
        auth.check_user(&ctx.identity, &user)?;
        let view = UserView::of(user.clone(), Some(revision));
        let edit = UserPatch {
            name: user.name.clone(),
            scopes: user.scopes.clone(),
            enabled: user.enabled,
        };
        let UserPatch { name, mut scopes, enabled } = merged(&edit, &view, body.clone())?;
        let own = ctx.identity.kind == IdentityKind::User(user.id);
        if own && (!enabled || scopes.len() < user.scopes.len()) {
            return Err(Problem::conflict("you cannot disable yourself or take scopes from yourself; ask another administrator"));
        }
        if !enabled || !scopes.contains(&Scope::Root) {
            roots.check()?;
        }
        scopes.sort_unstable();
        scopes.dedup();
        let user = User { name, scopes, enabled, ..user };
        auth.check_user(&ctx.identity, &user)?;
        Ok(user)
    })
    .await?;
    ctx.object(changed.revision, &UserView::versioned(changed))
}

/// `DELETE /users/{id}`
pub(crate) async fn delete(ctx: Ctx) -> Answer {
    let id = ctx.id(0, "user")?;
    let user = ctx.load::<User>(id).await?.object;
    let auth = &ctx.app.services.auth;
    auth.check_user(&ctx.identity, &user)?;
    if ctx.identity.kind == IdentityKind::User(user.id) {
        return Err(Problem::conflict("you cannot delete yourself; ask another administrator"));
    }
    let root = user.scopes.contains(&Scope::Root);
    let roots = Roots::without(&ctx, root, |user| user.id == UserId(id)).await?;
    roots.check()?;
    let answer = remove::<User>(&ctx, ctx.account(), id).await?;
    auth.end_sessions(ctx.account(), UserId(id), None, &ctx.identity.actor).await?;
    Ok(answer)
}

/// `POST /users/{id}/link`
pub(crate) async fn create_link(ctx: Ctx) -> Answer {
    let id = ctx.id(0, "user")?;
    let user = ctx.load::<User>(id).await?.object;
    let auth = &ctx.app.services.auth;
    auth.check_user(&ctx.identity, &user)?;
    let secret = auth.create_link(ctx.account(), user.id, &ctx.identity.actor).await?;
    let expires_at = ctx.app.platform().clock.now().plus_micros(LINK_AGE_MICROS_MAX);
    json(StatusCode::CREATED, &LinkView { link: link(&secret), expires_at })
}
