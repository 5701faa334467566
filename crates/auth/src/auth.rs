//! Turning secrets into identities.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use fieldline_contracts::registry::{AuditAction, typed};
use fieldline_contracts::{Actor, Clock, Kind, Registry, RegistryExt as _};
use fieldline_model::{Account, AccountId, Timestamp, Token, User};
use parking_lot::RwLock;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::backoff::{Backoff, Policy, address_key};
use crate::password::Passwords;
use crate::secret::{self, SecretHash};
use crate::session::{Purpose, SEEN_EVERY_MICROS, Session};
use crate::{AuthError, Identity, IdentityKind, Network, actor};

/// How long an answer of the registry is trusted without asking again, should
/// its changes not reach us. Revocations of this process come through those, at once.
const CACHE_AGE_MAX: Duration = Duration::from_secs(5);

/// Most secrets remembered.
const CACHE_MAX: usize = 20_000;

/// Sign-in by one name from one address: a person mistypes, so the wait begins late.
const BY_NAME_AND_ADDRESS: Policy =
    Policy { free: 5, wait_max: Duration::from_secs(300), forget: Duration::from_secs(3_600) };

/// Sign-in by one name from anywhere. It makes nobody wait who has not failed himself, or anyone
/// could keep a person out: see [`ATTACKED_WAIT`]. The wait is not used.
const BY_NAME: Policy =
    Policy { free: 50, wait_max: Duration::ZERO, forget: Duration::from_secs(900) };

/// While a name fails from many addresses, each of them waits so long after its first failure:
/// who has many addresses gets one try from each, not five.
const ATTACKED_WAIT: Duration = Duration::from_secs(30);

/// Longest name that is looked for, in bytes: as many as its 64 characters can have.
const NAME_BYTES_MAX: usize = 256;

/// Sign-in from one address.
const BY_ADDRESS: Policy =
    Policy { free: 10, wait_max: Duration::from_secs(300), forget: Duration::from_secs(3_600) };

/// Unknown tokens from one address. A token cannot be guessed: this keeps a
/// misconfigured fleet from occupying the registry, and others behind the same
/// address that are known already are not held up.
const BY_TOKEN: Policy =
    Policy { free: 30, wait_max: Duration::from_secs(30), forget: Duration::from_secs(300) };

const WRONG_TOKEN: &str = "the token is not valid: it was mistyped, revoked, or never existed";
const WRONG_PASSWORD: &str = "the name or the password is wrong";
const WRONG_LINK: &str = "the link was used already, or is older than fifteen minutes; \
                          restart Fieldline or ask an administrator for another";
const WRONG_SESSION: &str = "the session has ended; sign in again";

/// Lets people and programs in. Clones share everything.
#[derive(Clone)]
pub struct Auth {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) registry: Arc<dyn Registry>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) passwords: Passwords,
    cache: RwLock<HashMap<SecretHash, Arc<Entry>>>,
    /// Counts changes of accounts, users, tokens and sessions.
    generation: watch::Sender<u64>,
    /// The newest change of the registry, and the newest that `generation` has taken in.
    newest: watch::Receiver<u64>,
    followed: AtomicU64,
    following: OnceLock<()>,
    by_name: Backoff<String>,
    pub(crate) by_name_and_address: Backoff<(String, IpAddr)>,
    by_address: Backoff<IpAddr>,
    by_token: Backoff<IpAddr>,
}

/// A person who has just signed in.
pub struct SignedIn {
    /// The session's secret, for the cookie.
    pub secret: String,
    /// Who it is.
    pub identity: Identity,
    /// The user.
    pub user: User,
}

struct Entry {
    subject: Subject,
    loaded: Instant,
    generation: u64,
}

enum Subject {
    Token { token: Token, networks: Vec<Network> },
    Session { session: Session, revision: u64, user: User },
}

impl Auth {
    /// Lets in whom `registry` knows.
    #[must_use]
    pub fn new(registry: Arc<dyn Registry>, clock: Arc<dyn Clock>) -> Self {
        let newest = registry.watch();
        let inner = Inner {
            registry,
            clock,
            passwords: Passwords::new(),
            cache: RwLock::default(),
            generation: watch::channel(0).0,
            newest,
            followed: AtomicU64::new(0),
            following: OnceLock::new(),
            by_name: Backoff::new(BY_NAME),
            by_name_and_address: Backoff::new(BY_NAME_AND_ADDRESS),
            by_address: Backoff::new(BY_ADDRESS),
            by_token: Backoff::new(BY_TOKEN),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Who uses this API token, from `peer`.
    ///
    /// Answers from memory for tokens in use; a revocation is heard of through
    /// the registry's changes, and after five seconds at the latest.
    ///
    /// # Errors
    ///
    /// [`AuthError::Unauthenticated`], [`AuthError::TooMany`], [`AuthError::Registry`].
    pub async fn token(&self, secret: &str, peer: IpAddr) -> Result<Identity, AuthError> {
        let hash = SecretHash::of(secret).ok_or_else(|| self.unknown(peer, WRONG_TOKEN))?;
        let entry = self.entry(hash, Purpose::Token, peer).await?;
        let Subject::Token { token, networks } = &entry.subject else {
            return Err(AuthError::Unauthenticated(WRONG_TOKEN));
        };
        if token.expires_at.is_some_and(|at| at <= self.inner.clock.now()) {
            return Err(AuthError::Unauthenticated("the token has expired; create another"));
        }
        if !networks.is_empty() && !networks.iter().any(|network| network.contains(peer)) {
            return Err(AuthError::Unauthenticated("the token may not be used from this address"));
        }
        Ok(Identity {
            account: token.account,
            actor: actor(format!("token:{}", token.prefix), peer),
            scopes: token.scopes.clone(),
            devices: token.devices.clone(),
            kind: IdentityKind::Token(token.id),
            session: None,
            expires_at: token.expires_at,
        })
    }

    /// Who uses this console session, from `peer`. Its use is noted once an hour.
    ///
    /// # Errors
    ///
    /// [`AuthError::Unauthenticated`], [`AuthError::TooMany`], [`AuthError::Registry`].
    pub async fn session(&self, secret: &str, peer: IpAddr) -> Result<Identity, AuthError> {
        let hash = SecretHash::of(secret).ok_or(AuthError::Unauthenticated(WRONG_SESSION))?;
        let entry = self.entry(hash, Purpose::Session, peer).await?;
        let Subject::Session { session, revision, user } = &entry.subject else {
            return Err(AuthError::Unauthenticated(WRONG_SESSION));
        };
        let now = self.inner.clock.now();
        if session.expires_at() <= now {
            return Err(AuthError::Unauthenticated(WRONG_SESSION));
        }
        let identity = session_identity(session, user, peer);
        if now.micros_since(session.seen_at) >= SEEN_EVERY_MICROS {
            let seen = Session { seen_at: now, ..session.clone() };
            let registry = &self.inner.registry;
            let noted =
                registry.update_object(session.account, &seen, Some(*revision), &identity.actor);
            // Another request may have noted it in the same moment, which is as good.
            if let Err(error) = noted.await {
                tracing::debug!(%error, "the use of a session was not noted");
            }
            self.inner.cache.write().remove(&hash);
        }
        Ok(identity)
    }

    /// Signs a person in by name and password.
    ///
    /// Takes as long for names that do not exist. After some failures from one
    /// address, of this name or of any, each further one makes the next from there
    /// wait longer. Failures of the name elsewhere make no other address wait.
    ///
    /// # Errors
    ///
    /// [`AuthError::Unauthenticated`], [`AuthError::TooMany`], [`AuthError::Registry`].
    pub async fn sign_in(
        &self,
        name: &str,
        password: &str,
        peer: IpAddr,
    ) -> Result<SignedIn, AuthError> {
        let inner = &self.inner;
        let (name, address) = (name.trim().to_owned(), address_key(peer));
        // Hashing longer ones would only cost time: none can be right.
        if name.len() > NAME_BYTES_MAX || password.len() > 4 * crate::PASSWORD_CHARS.end() {
            return Err(AuthError::Unauthenticated(WRONG_PASSWORD));
        }
        let attacked = inner.by_name.is_over(&name);
        let least = if attacked { ATTACKED_WAIT } else { Duration::ZERO };
        let both = (name.clone(), address);
        let wait = inner.by_name_and_address.wait_at_least(&both, least);
        if let Some(wait) = wait.max(inner.by_address.wait(&address)) {
            return Err(too_many(wait));
        }
        // Counted before the outcome is known, so that many at once are counted too.
        inner.by_name.failed(name.clone());
        inner.by_name_and_address.failed(both.clone());
        inner.by_address.failed(address);
        let found = inner.registry.find_anywhere(Kind::User, "name", &name).await?;
        let user = found.map(typed::<User>).transpose()?.map(|found| found.object);
        let hash = user.as_ref().and_then(|user| user.password_hash.clone());
        let fits = inner.passwords.verify(password.to_owned(), hash).await?;
        let allowed = match user {
            Some(user) if fits && user.enabled => {
                self.account_enabled(user.account).await?.then_some(user)
            }
            _ => None,
        };
        let Some(user) = allowed else {
            metrics::counter!("fieldline_auth_failures_total", "what" => "password").increment(1);
            return Err(AuthError::Unauthenticated(WRONG_PASSWORD));
        };
        inner.by_name_and_address.succeeded(&both);
        inner.by_name.undo(&name);
        inner.by_address.undo(&address);
        self.begin_session(user, peer, false).await
    }

    /// Signs a person in by a one-time link, which ends with it.
    ///
    /// # Errors
    ///
    /// [`AuthError::Unauthenticated`], [`AuthError::TooMany`], [`AuthError::Registry`].
    pub async fn redeem_link(&self, secret: &str, peer: IpAddr) -> Result<SignedIn, AuthError> {
        let inner = &self.inner;
        let address = address_key(peer);
        if let Some(wait) = inner.by_address.wait(&address) {
            return Err(too_many(wait));
        }
        let wrong = || {
            inner.by_address.failed(address);
            metrics::counter!("fieldline_auth_failures_total", "what" => "link").increment(1);
            AuthError::Unauthenticated(WRONG_LINK)
        };
        let hash = SecretHash::of(secret).ok_or_else(wrong)?;
        let found = inner.registry.find_anywhere(Kind::Session, "secret", &hash.to_hex()).await?;
        let Some(found) = found.map(typed::<Session>).transpose()? else { return Err(wrong()) };
        let (link, revision) = (found.object, found.revision);
        if link.purpose != Purpose::Link || link.expires_at() <= inner.clock.now() {
            return Err(wrong());
        }
        let user = inner.registry.get_object::<User>(link.account, link.user.0).await?;
        let user = user.map(|user| user.object).filter(|user| user.enabled).ok_or_else(wrong)?;
        if !self.account_enabled(user.account).await? {
            return Err(wrong());
        }
        // Of two at once, one deletes it; the other finds it gone.
        let by = actor(format!("user:{}", user.name), peer);
        let ended =
            inner.registry.delete(link.account, Kind::Session, link.id, Some(revision), &by).await;
        match ended {
            Ok(()) => self.begin_session(user, peer, true).await,
            Err(
                fieldline_contracts::RegistryError::NotFound { .. }
                | fieldline_contracts::RegistryError::Changed { .. },
            ) => Err(wrong()),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether an identity that was let in earlier is still welcome, with the
    /// rights it was let in with. For connections that last; call it when
    /// [`Auth::changes`] moves.
    ///
    /// # Errors
    ///
    /// [`AuthError::Unauthenticated`] if it is not, [`AuthError::Registry`] if it cannot be known.
    pub async fn recheck(&self, identity: &Identity) -> Result<(), AuthError> {
        let ended = |text| Err(AuthError::Unauthenticated(text));
        let (registry, now) = (&self.inner.registry, self.inner.clock.now());
        if identity.expired(now) {
            return ended("the token or session has expired");
        }
        if !self.account_enabled(identity.account).await? {
            return ended("the account is disabled");
        }
        match identity.kind {
            IdentityKind::Token(id) => {
                let token = registry.get_object::<Token>(identity.account, id.0).await?;
                let Some(token) = token.map(|token| token.object) else {
                    return ended(WRONG_TOKEN);
                };
                if token.scopes != identity.scopes || token.devices != identity.devices {
                    return ended("the rights of the token were changed; connect again");
                }
                // What was let in asks its own copy when it ends: a new end is for a new one.
                if token.expires_at != identity.expires_at {
                    return ended("the expiry of the token was changed; connect again");
                }
                let parsed = token.networks.iter().filter_map(|text| text.parse::<Network>().ok());
                let networks: Vec<Network> = parsed.collect();
                let address = identity.actor.address.as_deref();
                let peer = address.and_then(|text| text.parse::<IpAddr>().ok());
                let inside = |peer: IpAddr| networks.iter().any(|network| network.contains(peer));
                if !token.networks.is_empty() && !peer.is_some_and(inside) {
                    return ended("the token may not be used from this address");
                }
            }
            IdentityKind::User(id) => {
                let user = registry.get_object::<User>(identity.account, id.0).await?;
                let welcome = |user: &User| user.enabled && user.scopes == identity.scopes;
                if !user.is_some_and(|user| welcome(&user.object)) {
                    return ended(WRONG_SESSION);
                }
                if let Some(session) = identity.session
                    && registry.get(identity.account, Kind::Session, session).await?.is_none()
                {
                    return ended(WRONG_SESSION);
                }
            }
        }
        Ok(())
    }

    /// Moves whenever an account, user or token changed, or a session ended:
    /// connections that last then [`Auth::recheck`] theirs.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.follow();
        self.inner.generation.subscribe()
    }

    pub(crate) async fn begin_session(
        &self,
        user: User,
        peer: IpAddr,
        by_link: bool,
    ) -> Result<SignedIn, AuthError> {
        let by = actor(format!("user:{}", user.name), peer);
        self.make_room(&user, &by).await?;
        let (secret, session) = self.write_session(&user, Purpose::Session, by_link, &by).await?;
        let identity = session_identity(&session, &user, peer);
        Ok(SignedIn { secret, identity, user })
    }

    /// Writes a session or link of `user`; returns it with its secret.
    pub(crate) async fn write_session(
        &self,
        user: &User,
        purpose: Purpose,
        by_link: bool,
        by: &Actor,
    ) -> Result<(String, Session), AuthError> {
        let secret = secret::fresh(match purpose {
            Purpose::Link => "fll_",
            _ => "fls_",
        });
        let hash = SecretHash::of(&secret)
            .ok_or_else(|| AuthError::Failed("a fresh secret has a wrong form".to_owned()))?;
        let now = self.inner.clock.now();
        let session = Session {
            id: fieldline_model::id::uuid_v7(now, self.inner.clock.random()),
            account: user.account,
            user: user.id,
            purpose,
            by_link,
            secret_hash: hash.to_hex(),
            address: by.address.clone(),
            created_at: now,
            seen_at: now,
        };
        self.inner.registry.create_object(user.account, &session, by).await?;
        Ok((secret, session))
    }

    pub(crate) async fn account_enabled(&self, account: AccountId) -> Result<bool, AuthError> {
        let found = self.inner.registry.get_object::<Account>(account, account.0).await?;
        Ok(found.is_some_and(|account| account.object.enabled))
    }

    /// The entry of a secret: from memory while that is fresh, otherwise from the registry.
    async fn entry(
        &self,
        hash: SecretHash,
        purpose: Purpose,
        peer: IpAddr,
    ) -> Result<Arc<Entry>, AuthError> {
        self.follow();
        let inner = &self.inner;
        // What was changed in this instant and is not followed yet may concern the secret.
        let followed = inner.followed.load(Ordering::Acquire) >= *inner.newest.borrow();
        let generation = *inner.generation.borrow();
        let cached = inner.cache.read().get(&hash).cloned();
        match &cached {
            Some(entry)
                if followed
                    && entry.generation == generation
                    && entry.loaded.elapsed() < CACHE_AGE_MAX =>
            {
                return Ok(Arc::clone(entry));
            }
            // Known before: it is read again whatever others at its address do.
            Some(_) => {}
            None => {
                if let Some(wait) = inner.by_token.wait(&address_key(peer)) {
                    return Err(too_many(wait));
                }
            }
        }
        let (loaded, subject) = (Instant::now(), self.load(hash, purpose).await?);
        let Some(subject) = subject else {
            inner.cache.write().remove(&hash);
            let what = if purpose == Purpose::Token { WRONG_TOKEN } else { WRONG_SESSION };
            return Err(self.unknown(peer, what));
        };
        let entry = Arc::new(Entry { subject, loaded, generation });
        let mut cache = inner.cache.write();
        if cache.len() >= CACHE_MAX && !cache.contains_key(&hash) {
            cache.retain(|_, entry| entry.loaded.elapsed() < CACHE_AGE_MAX);
            if cache.len() >= CACHE_MAX {
                cache.clear();
            }
        }
        cache.insert(hash, Arc::clone(&entry));
        Ok(entry)
    }

    async fn load(&self, hash: SecretHash, purpose: Purpose) -> Result<Option<Subject>, AuthError> {
        let registry = &self.inner.registry;
        let hex = hash.to_hex();
        let subject = if purpose == Purpose::Token {
            let Some(found) = registry.find_anywhere(Kind::Token, "secret", &hex).await? else {
                return Ok(None);
            };
            let token = typed::<Token>(found)?.object;
            // Written by us, and checked then: one that cannot be read lets nobody in.
            let networks: Result<Vec<Network>, _> =
                token.networks.iter().map(|network| network.parse()).collect();
            let Ok(networks) = networks else { return Ok(None) };
            Subject::Token { token, networks }
        } else {
            let Some(found) = registry.find_anywhere(Kind::Session, "secret", &hex).await? else {
                return Ok(None);
            };
            let found = typed::<Session>(found)?;
            let (session, revision) = (found.object, found.revision);
            let user = registry.get_object::<User>(session.account, session.user.0).await?;
            match user.map(|user| user.object) {
                Some(user) if user.enabled && session.purpose == Purpose::Session => {
                    Subject::Session { session, revision, user }
                }
                _ => return Ok(None),
            }
        };
        let account = match &subject {
            Subject::Token { token, .. } => token.account,
            Subject::Session { session, .. } => session.account,
        };
        Ok(self.account_enabled(account).await?.then_some(subject))
    }

    fn unknown(&self, peer: IpAddr, text: &'static str) -> AuthError {
        self.inner.by_token.failed(address_key(peer));
        metrics::counter!("fieldline_auth_failures_total", "what" => "token").increment(1);
        AuthError::Unauthenticated(text)
    }

    /// Starts following the registry's changes, once.
    fn follow(&self) {
        self.inner.following.get_or_init(|| {
            let changed = self.inner.registry.watch();
            let after = *changed.borrow();
            self.inner.followed.store(after, Ordering::Release);
            tokio::spawn(follow(Arc::downgrade(&self.inner), changed, after));
        });
    }
}

/// Follows the registry until it or the last [`Auth`] is gone.
async fn follow(inner: Weak<Inner>, mut changed: watch::Receiver<u64>, mut after: u64) {
    const PAGE: usize = 1_000;
    while changed.changed().await.is_ok() {
        let newest = *changed.borrow_and_update();
        let Some(inner) = inner.upgrade() else { return };
        let mut concerned = false;
        loop {
            let Ok(page) = inner.registry.changes(after, PAGE).await else {
                // What changed is not known: all is read again.
                (concerned, after) = (true, newest.max(after));
                break;
            };
            concerned |= page.iter().any(|change| match change.kind {
                Kind::Account | Kind::User | Kind::Token => true,
                // That a session was used ends nothing.
                Kind::Session => change.action == AuditAction::Delete,
                _ => false,
            });
            after = page.last().map_or(after, |last| last.sequence);
            if page.len() < PAGE {
                break;
            }
        }
        if concerned {
            inner.generation.send_modify(|generation| *generation += 1);
        }
        inner.followed.store(after, Ordering::Release);
    }
}

fn session_identity(session: &Session, user: &User, peer: IpAddr) -> Identity {
    Identity {
        account: user.account,
        actor: actor(format!("user:{}", user.name), peer),
        scopes: user.scopes.clone(),
        devices: Vec::new(),
        kind: IdentityKind::User(user.id),
        session: Some(session.id),
        expires_at: Some(session.expires_at()),
    }
}

pub(crate) fn too_many(wait: Duration) -> AuthError {
    AuthError::TooMany { retry_after_s: wait.as_secs() + 1 }
}

/// The present instant and a fresh id for it.
pub(crate) fn fresh_id(clock: &dyn Clock) -> (Timestamp, [u8; 10]) {
    (clock.now(), clock.random())
}
