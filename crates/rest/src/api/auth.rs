//! Signing in and out.

use fieldline_auth::{AuthError, IdentityKind, SESSION_AGE_MICROS_MAX, SignedIn};
use fieldline_contracts::RegistryExt as _;
use fieldline_ingest::own_params;
use fieldline_model::{Account, EventKind, Scope, Token, User};
use hyper::StatusCode;
use hyper::header::{HeaderValue, SET_COOKIE};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::users::UserView;
use crate::call::{Call, Ctx, empty, json};
use crate::problem::Problem;
use crate::route::Answer;
use crate::serve::COOKIE_NAME;

/// A one-time link's secret.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct LinkInput {
    /// What stands after `link=`.
    secret: String,
}

/// A name and a password.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SignInInput {
    /// The user's name.
    name: String,
    /// The password.
    password: String,
}

/// A new password.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct PasswordInput {
    /// The present one; absent where there is none yet, or where a one-time link opened the session.
    #[serde(default)]
    current: Option<String>,
    /// The new one: 10 to 256 characters.
    new: String,
}

/// Who signed in.
#[derive(Serialize, ToSchema)]
pub(crate) struct SignedInView {
    user: UserView,
    /// Whether a password should be set now: the link does not work again.
    must_set_password: bool,
}

/// Who is calling.
#[derive(Serialize, ToSchema)]
pub(crate) struct Me {
    /// `user` or `token`.
    kind: &'static str,
    /// Id of the user or token.
    id: Uuid,
    /// Name of the user or token.
    name: String,
    account: MyAccount,
    /// What the caller may do.
    scopes: Vec<Scope>,
    /// Whether the user has no password yet.
    must_set_password: bool,
    /// Whether setting a password asks for the present one.
    needs_current_password: bool,
}

/// The caller's account.
#[derive(Serialize, ToSchema)]
pub(crate) struct MyAccount {
    id: Uuid,
    name: String,
}

/// `POST /auth/link`
pub(crate) async fn link(call: Call) -> Answer {
    let input: LinkInput = call.json()?;
    let signed_in = call.app.services.auth.redeem_link(&input.secret, call.peer.ip()).await;
    welcome(&call, signed_in, "sign_in_by_link").await
}

/// `POST /auth/sign-in`
pub(crate) async fn sign_in(call: Call) -> Answer {
    let input: SignInInput = call.json()?;
    let auth = &call.app.services.auth;
    let signed_in = auth.sign_in(&input.name, &input.password, call.peer.ip()).await;
    welcome(&call, signed_in, "sign_in").await
}

async fn welcome(call: &Call, signed_in: Result<SignedIn, AuthError>, action: &str) -> Answer {
    let SignedIn { secret, identity, user } = match signed_in {
        Ok(signed_in) => signed_in,
        Err(error) => {
            tracing::warn!(peer = %call.peer.ip(), %error, "sign-in refused");
            return Err(match error {
                AuthError::Unauthenticated(text) => {
                    Problem::unauthenticated(text).titled("The sign-in was refused")
                }
                error => error.into(),
            });
        }
    };
    let ingest = &call.app.services.ingest;
    let params = own_params([
        ("action", action.into()),
        ("actor", identity.actor.name.as_str().into()),
        ("address", call.peer.ip().to_canonical().to_string().into()),
    ]);
    ingest.event(ingest.new_event(identity.account, EventKind::Audit, user.id, params)).await;
    let must_set_password = user.password_hash.is_none();
    let view = SignedInView { user: UserView::of(user, None), must_set_password };
    let mut response = json(StatusCode::OK, &view)?;
    let cookie = cookie(&secret, SESSION_AGE_MICROS_MAX / 1_000_000, call.secure)?;
    response.headers_mut().insert(SET_COOKIE, cookie);
    Ok(response)
}

/// Out of reach of scripts and of other sites; over TLS only, where there is TLS.
fn cookie(secret: &str, age_s: i64, secure: bool) -> Result<HeaderValue, Problem> {
    let secure = if secure { "; Secure" } else { "" };
    let text = format!(
        "{COOKIE_NAME}={secret}; Path=/; HttpOnly; SameSite=Strict; Max-Age={age_s}{secure}"
    );
    HeaderValue::from_str(&text).map_err(Problem::fault)
}

/// `POST /auth/sign-out`
pub(crate) async fn sign_out(ctx: Ctx) -> Answer {
    ctx.app.services.auth.sign_out(&ctx.identity).await?;
    let mut response = empty(StatusCode::NO_CONTENT);
    response.headers_mut().insert(SET_COOKIE, cookie("", 0, ctx.secure)?);
    Ok(response)
}

/// `GET /auth/me`
pub(crate) async fn me(ctx: Ctx) -> Answer {
    let (registry, account) = (ctx.app.registry(), ctx.account());
    let named = registry.get_object::<Account>(account, account.0).await?;
    let account = MyAccount {
        id: account.0,
        name: named.map(|account| account.object.name).unwrap_or_default(),
    };
    let scopes = ctx.identity.scopes.clone();
    let me = match ctx.identity.kind {
        IdentityKind::User(id) => {
            let user = ctx.load::<User>(id.0).await?.object;
            let must_set_password = user.password_hash.is_none();
            let auth = &ctx.app.services.auth;
            let needs_current_password = auth.needs_current_password(&ctx.identity, &user).await?;
            Me {
                kind: "user",
                id: id.0,
                name: user.name,
                account,
                scopes,
                must_set_password,
                needs_current_password,
            }
        }
        IdentityKind::Token(id) => {
            let name = ctx.load::<Token>(id.0).await?.object.name;
            Me {
                kind: "token",
                id: id.0,
                name,
                account,
                scopes,
                must_set_password: false,
                needs_current_password: false,
            }
        }
    };
    json(StatusCode::OK, &me)
}

/// `POST /auth/password`
pub(crate) async fn password(ctx: Ctx) -> Answer {
    let PasswordInput { current, new } = ctx.json()?;
    ctx.app.services.auth.set_password(&ctx.identity, current, new).await?;
    Ok(empty(StatusCode::NO_CONTENT))
}
