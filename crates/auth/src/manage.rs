//! Making and changing users, tokens and links.

use std::net::{IpAddr, Ipv4Addr};

use fieldline_contracts::registry::{Versioned, readable, typed};
use fieldline_contracts::{Actor, Kind, Page, RegistryError, RegistryExt as _};
use fieldline_model::{
    Account, AccountId, DeviceId, Scope, Timestamp, Token, TokenId, User, UserId,
};
use serde_json::Value as Json;
use uuid::Uuid;

use crate::auth::{fresh_id, too_many};
use crate::secret::{self, SecretHash};
use crate::session::{Purpose, SESSIONS_MAX, Session};
use crate::{Auth, AuthError, Identity, Network, password};

/// Most tokens of an account.
pub const TOKENS_MAX: usize = 10_000;
/// Most users of an account.
pub const USERS_MAX: usize = 10_000;

/// Characters of names.
const NAME_CHARS_MAX: usize = 64;
/// Most networks of a token.
const NETWORKS_MAX: usize = 64;
/// Most devices that a token may be restricted to.
pub const DEVICES_MAX: usize = 1_000;

/// A token to be made.
#[derive(Clone, Debug, Default)]
pub struct NewToken {
    /// What it is for.
    pub name: String,
    /// What it may do.
    pub scopes: Vec<Scope>,
    /// The only devices it may see; empty for all.
    pub devices: Vec<DeviceId>,
    /// The only networks it works from; empty for all.
    pub networks: Vec<String>,
    /// When it stops working.
    pub expires_at: Option<Timestamp>,
}

/// A user to be made.
#[derive(Clone, Debug)]
pub struct NewUser {
    /// The name to sign in with.
    pub name: String,
    /// What the user may do.
    pub scopes: Vec<Scope>,
    /// A password; without one the user signs in by a link first.
    pub password: Option<String>,
}

/// What a person needs who starts Fieldline for the first time. Shown once, kept nowhere.
#[derive(Clone, Debug)]
pub struct Bootstrap {
    /// Secret of the one-time link, for `http://HOST/#/sign-in?link=SECRET`.
    pub link_secret: String,
    /// Secret of an API token with all scopes; only at the very first start, and not if one was given.
    pub token: Option<String>,
}

impl Auth {
    /// Makes what a first start needs: the account `default` and its user
    /// `admin`, without a password. Run again it makes only what is missing; as
    /// long as `admin` has no password, each start gives another link.
    ///
    /// `admin_token` is an API token with all scopes that the operator chose.
    ///
    /// # Errors
    ///
    /// [`AuthError::Refused`] if `admin_token` is too short, [`AuthError::Registry`].
    pub async fn bootstrap(
        &self,
        admin_token: Option<String>,
    ) -> Result<Option<Bootstrap>, AuthError> {
        let (registry, by) = (&self.inner.registry, Actor::system("start"));
        let hash = match &admin_token {
            Some(secret) => Some(SecretHash::of(secret).ok_or_else(|| {
                AuthError::Refused(
                    "FIELDLINE_ADMIN_TOKEN has a wrong form: 20 to 256 visible ASCII characters \
                     are needed"
                        .to_owned(),
                )
            })?),
            None => None,
        };
        self.drop_unreadable_sessions(&by).await?;
        let account = match registry.find_anywhere(Kind::Account, "name", "default").await? {
            Some(found) => found.account,
            None => self.create_account("default", &by).await?.id,
        };
        let first = registry.list_everywhere(Kind::User, &Page::first(1)).await?.is_empty();
        if first {
            let admin = self.user_object(account, "admin", Scope::ALL.to_vec());
            registry.create_object(account, &admin, &by).await?;
        }
        if let (Some(secret), Some(hash)) = (&admin_token, hash)
            && registry.find_anywhere(Kind::Token, "secret", &hash.to_hex()).await?.is_none()
        {
            let new = NewToken {
                name: "given at start".to_owned(),
                scopes: Scope::ALL.to_vec(),
                ..NewToken::default()
            };
            self.write_token(account, new, secret, &by).await?;
        }
        let admin = registry.find_anywhere(Kind::User, "name", "admin").await?;
        let Some(admin) = readable::<User>(admin.into_iter().collect()).pop() else {
            return Ok(None);
        };
        let admin = admin.object;
        if admin.password_hash.is_some() || !admin.enabled {
            return Ok(None);
        }
        self.make_room(&admin, &by).await?;
        let (link_secret, _) = self.write_session(&admin, Purpose::Link, false, &by).await?;
        let token = if first && admin_token.is_none() {
            let secret = secret::fresh("flt_");
            let new = NewToken {
                name: "made at first start".to_owned(),
                scopes: Scope::ALL.to_vec(),
                ..NewToken::default()
            };
            self.write_token(account, new, &secret, &by).await?;
            Some(secret)
        } else {
            None
        };
        Ok(Some(Bootstrap { link_secret, token }))
    }

    /// Deletes sessions and links that cannot be read, as after damage of the disk: their users sign
    /// in again. What else cannot be read is left as it is, and named where it is met.
    async fn drop_unreadable_sessions(&self, by: &Actor) -> Result<(), AuthError> {
        let registry = &self.inner.registry;
        let mut page = Page::first(1_000);
        loop {
            let records = registry.list_everywhere(Kind::Session, &page).await?;
            page.after = records.last().map(|record| record.id);
            let complete = records.len() < page.limit;
            for record in records {
                let (account, id) = (record.account, record.id);
                if let Err(error) = typed::<Session>(record) {
                    tracing::warn!(%error, "a session is dropped; its user signs in again");
                    registry.delete(account, Kind::Session, id, None, by).await?;
                }
            }
            if complete {
                return Ok(());
            }
        }
    }

    async fn create_account(&self, name: &str, by: &Actor) -> Result<Account, AuthError> {
        let (now, random) = fresh_id(&*self.inner.clock);
        let account = Account {
            id: AccountId::new(now, random),
            name: name.to_owned(),
            enabled: true,
            retention_days: 0,
            storage_bytes_max: 0,
            labels: fieldline_model::object::Labels::new(),
            created_at: now,
        };
        Ok(self.inner.registry.create_object(account.id, &account, by).await?.object)
    }

    /// Checks that `by` may hand out these rights: nobody gives more than he has.
    ///
    /// # Errors
    ///
    /// [`AuthError::Refused`].
    pub fn check_grant(
        &self,
        by: &Identity,
        scopes: &[Scope],
        devices: &[DeviceId],
    ) -> Result<(), AuthError> {
        if scopes.is_empty() {
            return Err(AuthError::Refused("`scopes` is empty: name one at least".to_owned()));
        }
        if let Some(scope) = scopes.iter().find(|scope| !by.may(**scope)) {
            let name = scope.name();
            return Err(AuthError::Refused(format!(
                "`scopes`: `{name}` cannot be given by someone who has it not"
            )));
        }
        let within = by.sees_all()
            || (!devices.is_empty() && devices.iter().all(|device| by.may_see(*device)));
        if !within {
            return Err(AuthError::Refused(
                "`devices` must name some of the devices that you may see yourself".to_owned(),
            ));
        }
        Ok(())
    }

    /// Makes a token of `account`; returns it with its secret, which is shown this once.
    ///
    /// # Errors
    ///
    /// [`AuthError::Refused`], [`AuthError::Registry`].
    pub async fn create_token(
        &self,
        by: &Identity,
        account: AccountId,
        new: NewToken,
    ) -> Result<(Versioned<Token>, String), AuthError> {
        self.check_grant(by, &new.scopes, &new.devices)?;
        check_token(&new.name, &new.devices, &new.networks)?;
        if new.expires_at.is_some_and(|at| at <= self.inner.clock.now()) {
            return Err(AuthError::Refused(
                "`expires_at` has passed already: the token would never work".to_owned(),
            ));
        }
        self.check_count(account, Kind::Token, TOKENS_MAX).await?;
        let secret = secret::fresh("flt_");
        let token = self.write_token(account, new, &secret, &by.actor).await?;
        Ok((token, secret))
    }

    async fn write_token(
        &self,
        account: AccountId,
        new: NewToken,
        secret: &str,
        by: &Actor,
    ) -> Result<Versioned<Token>, AuthError> {
        let NewToken { name, mut scopes, devices, networks, expires_at } = new;
        scopes.sort_unstable();
        scopes.dedup();
        let hash = SecretHash::of(secret)
            .ok_or_else(|| AuthError::Refused("the token's secret has a wrong form".to_owned()))?;
        let (now, random) = fresh_id(&*self.inner.clock);
        let token = Token {
            id: TokenId::new(now, random),
            account,
            name,
            secret_hash: hash.to_hex(),
            prefix: secret::prefix(secret),
            scopes,
            devices,
            networks,
            expires_at,
            created_at: now,
            created_by: by.name.clone(),
        };
        Ok(self.inner.registry.create_object(account, &token, by).await?)
    }

    /// Checks the members of a token that is changed.
    ///
    /// # Errors
    ///
    /// [`AuthError::Refused`].
    pub fn check_token(&self, by: &Identity, token: &Token) -> Result<(), AuthError> {
        self.check_grant(by, &token.scopes, &token.devices)?;
        check_token(&token.name, &token.devices, &token.networks)
    }

    /// Makes a user of `account`; one without a password also gets a one-time
    /// link, whose secret is returned.
    ///
    /// # Errors
    ///
    /// [`AuthError::Refused`], [`AuthError::Registry`], [`AuthError::TooMany`].
    pub async fn create_user(
        &self,
        by: &Identity,
        account: AccountId,
        new: NewUser,
    ) -> Result<(Versioned<User>, Option<String>), AuthError> {
        let NewUser { name, scopes, password } = new;
        self.check_grant(by, &scopes, &[])?;
        check_name(&name)?;
        self.check_count(account, Kind::User, USERS_MAX).await?;
        let mut user = self.user_object(account, &name, scopes);
        if let Some(password) = password {
            password::check_new(&name, &password)?;
            user.password_hash = Some(self.inner.passwords.hash(password).await?);
        }
        let made = self.inner.registry.create_object(account, &user, &by.actor).await?;
        let link = if user.password_hash.is_none() {
            Some(self.write_session(&user, Purpose::Link, false, &by.actor).await?.0)
        } else {
            None
        };
        Ok((made, link))
    }

    /// Checks a user's name and rights before they are changed.
    ///
    /// # Errors
    ///
    /// [`AuthError::Refused`].
    pub fn check_user(&self, by: &Identity, user: &User) -> Result<(), AuthError> {
        self.check_grant(by, &user.scopes, &[])?;
        check_name(&user.name)
    }

    /// Whether someone with all rights can sign in who is not `leaving`: if nobody can, only a token
    /// or a restart could let anyone in again. Where none of those who leave has a password, one
    /// without is enough. Nobody is missed where nobody who leaves has all rights.
    ///
    /// # Errors
    ///
    /// [`AuthError::Registry`].
    pub async fn leaves_root(
        &self,
        leaving: impl Fn(&User) -> bool + Send,
    ) -> Result<bool, AuthError> {
        let registry = &self.inner.registry;
        let mut page = Page::first(1_000);
        // Whether one is there at all, and whether one has a password.
        let (mut gone, mut left) = ((false, false), (false, false));
        loop {
            let records = registry.list_everywhere(Kind::User, &page).await?;
            page.after = records.last().map(|record| record.id);
            let complete = records.len() < page.limit;
            for user in readable::<User>(records).into_iter().map(|found| found.object) {
                let able = user.enabled && user.scopes.contains(&Scope::Root);
                if able && self.account_enabled(user.account).await? {
                    let side = if leaving(&user) { &mut gone } else { &mut left };
                    *side = (true, side.1 || user.password_hash.is_some());
                }
            }
            if complete {
                return Ok(!gone.0 || left.1 || (left.0 && !gone.1));
            }
        }
    }

    fn user_object(&self, account: AccountId, name: &str, mut scopes: Vec<Scope>) -> User {
        scopes.sort_unstable();
        scopes.dedup();
        let (now, random) = fresh_id(&*self.inner.clock);
        User {
            id: UserId::new(now, random),
            account,
            name: name.to_owned(),
            scopes,
            password_hash: None,
            enabled: true,
            created_at: now,
        }
    }

    /// Makes a one-time link for a user who lost the password; returns its secret.
    ///
    /// # Errors
    ///
    /// [`AuthError::Registry`]: also where there is no such user.
    pub async fn create_link(
        &self,
        account: AccountId,
        user: UserId,
        by: &Actor,
    ) -> Result<String, AuthError> {
        let found = self.inner.registry.get_object::<User>(account, user.0).await?;
        let user = found.ok_or(RegistryError::NotFound { kind: Kind::User, id: user.0 })?.object;
        self.make_room(&user, by).await?;
        Ok(self.write_session(&user, Purpose::Link, false, by).await?.0)
    }

    /// Sets the password of a signed-in user, and ends all other sessions.
    ///
    /// A user who has one must give the `current` one, but for who came by a one-time link: that
    /// is how a forgotten one is replaced. It holds for one new password.
    ///
    /// # Errors
    ///
    /// [`AuthError::Unauthenticated`], [`AuthError::Refused`], [`AuthError::TooMany`], [`AuthError::Registry`].
    pub async fn set_password(
        &self,
        identity: &Identity,
        current: Option<String>,
        new: String,
    ) -> Result<(), AuthError> {
        let crate::IdentityKind::User(id) = identity.kind else {
            return Err(AuthError::Refused(
                "a token has no password; sign in as a user".to_owned(),
            ));
        };
        let inner = &self.inner;
        let found = inner.registry.get_object::<User>(identity.account, id.0).await?;
        let found = found.ok_or(RegistryError::NotFound { kind: Kind::User, id: id.0 })?;
        let (mut user, revision) = (found.object, found.revision);
        let link = self.opened_by_link(identity).await?;
        if let Some(hash) = user.password_hash.take()
            && link.is_none()
        {
            // Counted by the name alone, whatever address a stolen session comes from; nobody signs
            // in from this one.
            let key = (user.name.clone(), IpAddr::V4(Ipv4Addr::UNSPECIFIED));
            if let Some(wait) = inner.by_name_and_address.wait(&key) {
                return Err(too_many(wait));
            }
            let current = current.unwrap_or_default();
            if current.len() > 4 * crate::PASSWORD_CHARS.end() {
                return Err(AuthError::Refused("the current password is wrong".to_owned()));
            }
            inner.by_name_and_address.failed(key.clone());
            if !inner.passwords.verify(current, Some(hash)).await? {
                return Err(AuthError::Refused("the current password is wrong".to_owned()));
            }
            inner.by_name_and_address.succeeded(&key);
        }
        password::check_new(&user.name, &new)?;
        user.password_hash = Some(inner.passwords.hash(new).await?);
        let by = &identity.actor;
        inner.registry.update_object(identity.account, &user, Some(revision), by).await?;
        if let Some(link) = link {
            let used = Session { by_link: false, ..link.object };
            inner.registry.update_object(identity.account, &used, None, by).await?;
        }
        self.end_sessions(identity.account, id, identity.session, by).await
    }

    /// Whether [`Auth::set_password`] asks this user for the present one.
    ///
    /// # Errors
    ///
    /// [`AuthError::Registry`].
    pub async fn needs_current_password(
        &self,
        identity: &Identity,
        user: &User,
    ) -> Result<bool, AuthError> {
        Ok(user.password_hash.is_some() && self.opened_by_link(identity).await?.is_none())
    }

    /// The caller's session, if a one-time link opened it.
    async fn opened_by_link(
        &self,
        identity: &Identity,
    ) -> Result<Option<Versioned<Session>>, AuthError> {
        let Some(session) = identity.session else { return Ok(None) };
        let found = self.inner.registry.get_object::<Session>(identity.account, session).await?;
        Ok(found.filter(|found| found.object.by_link))
    }

    /// Ends one session.
    ///
    /// # Errors
    ///
    /// [`AuthError::Registry`].
    pub async fn sign_out(&self, identity: &Identity) -> Result<(), AuthError> {
        let Some(session) = identity.session else { return Ok(()) };
        let (registry, account) = (&self.inner.registry, identity.account);
        match registry.delete(account, Kind::Session, session, None, &identity.actor).await {
            Ok(()) | Err(RegistryError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends all sessions and links of a user, but for `except`.
    ///
    /// # Errors
    ///
    /// [`AuthError::Registry`].
    pub async fn end_sessions(
        &self,
        account: AccountId,
        user: UserId,
        except: Option<Uuid>,
        by: &Actor,
    ) -> Result<(), AuthError> {
        for session in self.sessions(account, user).await? {
            if Some(session.id) != except {
                self.end(&session, by).await?;
            }
        }
        Ok(())
    }

    /// Ends what has expired, and the longest unused where a user has too many.
    pub(crate) async fn make_room(&self, user: &User, by: &Actor) -> Result<(), AuthError> {
        let now = self.inner.clock.now();
        let (mut live, expired): (Vec<_>, Vec<_>) = self
            .sessions(user.account, user.id)
            .await?
            .into_iter()
            .partition(|session| session.expires_at() > now);
        live.sort_by_key(|session| session.seen_at);
        let over = (live.len() + 1).saturating_sub(SESSIONS_MAX);
        for session in expired.iter().chain(live.iter().take(over)) {
            self.end(session, by).await?;
        }
        Ok(())
    }

    async fn sessions(&self, account: AccountId, user: UserId) -> Result<Vec<Session>, AuthError> {
        let equals = vec![("user".to_owned(), Json::from(user.to_string()))];
        let page = Page { equals, ..Page::first(Page::LIMIT_MAX) };
        let found = self.inner.registry.list_objects::<Session>(account, &page).await?;
        Ok(found.into_iter().map(|found| found.object).collect())
    }

    async fn end(&self, session: &Session, by: &Actor) -> Result<(), AuthError> {
        let (registry, account) = (&self.inner.registry, session.account);
        match registry.delete(account, Kind::Session, session.id, None, by).await {
            Ok(()) | Err(RegistryError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    async fn check_count(
        &self,
        account: AccountId,
        kind: Kind,
        most: usize,
    ) -> Result<(), AuthError> {
        let there = self.inner.registry.list(account, kind, &Page::first(most)).await?.len();
        if there >= most {
            let kind = kind.name();
            return Err(AuthError::Refused(format!(
                "the account has {most} {kind}s, the most it may; delete some"
            )));
        }
        Ok(())
    }
}

fn check_name(name: &str) -> Result<(), AuthError> {
    let chars = name.chars().count();
    let fits = (1..=NAME_CHARS_MAX).contains(&chars)
        && !name.chars().any(char::is_control)
        && name.trim() == name;
    if fits {
        return Ok(());
    }
    Err(AuthError::Refused(format!(
        "`name` needs 1 to {NAME_CHARS_MAX} printable characters, without spaces at its ends"
    )))
}

fn check_token(name: &str, devices: &[DeviceId], networks: &[String]) -> Result<(), AuthError> {
    check_name(name)?;
    if devices.len() > DEVICES_MAX {
        return Err(AuthError::Refused(format!(
            "`devices` names {}; at most {DEVICES_MAX} are possible",
            devices.len()
        )));
    }
    if networks.len() > NETWORKS_MAX {
        return Err(AuthError::Refused(format!(
            "`networks` names {}; at most {NETWORKS_MAX} are possible",
            networks.len()
        )));
    }
    for network in networks {
        let read: Result<Network, _> = network.parse();
        read.map_err(|error| AuthError::Refused(format!("`networks`: {error}")))?;
    }
    Ok(())
}
