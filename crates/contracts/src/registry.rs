//! `Registry`: the objects that people manage, and the audit trail of every change.
//!
//! An object is a JSON document with an id, an account, a revision and unique
//! keys. Backends know no object by its meaning, so a new kind needs no
//! migration; [`RegistryExt`] gives callers the typed view.

use std::collections::{BTreeMap, BTreeSet};

use async_trait::async_trait;
use fieldline_model::{
    Account, AccountId, Channel, Command, Device, ParamSpec, Protocol, Timestamp, Token, User,
};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Kinds of objects. The names are stored: never reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// [`Account`]; its own account is itself.
    Account,
    /// [`User`].
    User,
    /// [`Token`].
    Token,
    /// [`Device`].
    Device,
    /// [`Channel`].
    Channel,
    /// [`Protocol`].
    Protocol,
    /// [`ParamSpec`].
    Parameter,
    /// [`Command`].
    Command,
    /// A named setting of an account.
    Setting,
    /// A console session or a one-time link.
    Session,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 10] = [
        Self::Account,
        Self::User,
        Self::Token,
        Self::Device,
        Self::Channel,
        Self::Protocol,
        Self::Parameter,
        Self::Command,
        Self::Setting,
        Self::Session,
    ];

    /// The stored name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Account => "account",
            Self::User => "user",
            Self::Token => "token",
            Self::Device => "device",
            Self::Channel => "channel",
            Self::Protocol => "protocol",
            Self::Parameter => "parameter",
            Self::Command => "command",
            Self::Setting => "setting",
            Self::Session => "session",
        }
    }
}

/// Who makes a change, and from where: what the audit trail says of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// `user:NAME`, `token:PREFIX` or `system:PART`.
    pub name: String,
    /// The address it came from, if from outside.
    pub address: Option<String>,
}

impl Actor {
    /// A part of Fieldline itself.
    #[must_use]
    pub fn system(part: &str) -> Self {
        Self { name: format!("system:{part}"), address: None }
    }
}

/// What was done to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuditAction {
    /// It was created.
    Create,
    /// It was changed.
    Update,
    /// It was deleted.
    Delete,
}

/// One change, as the audit trail keeps it. Written in the transaction of the change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audit {
    /// Counts up over the whole installation, without reuse.
    pub sequence: u64,
    /// When.
    pub at: Timestamp,
    /// Whose object.
    pub account: AccountId,
    /// Who and from where.
    pub actor: Actor,
    /// What was done.
    pub action: AuditAction,
    /// To which kind of object.
    pub kind: Kind,
    /// To which object.
    pub object: Uuid,
    /// The names of the top-level members that changed, for an update.
    pub changed: Vec<String>,
}

/// A new state of an object, to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct Draft {
    /// Its kind.
    pub kind: Kind,
    /// Its id.
    pub id: Uuid,
    /// Keys that no other object of this kind may have, by key name. A key's
    /// [`UniqueIn`] says whether in the account or on the installation.
    pub unique: BTreeMap<&'static str, (UniqueIn, String)>,
    /// The object.
    pub body: serde_json::Value,
}

/// Where a key is unique.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UniqueIn {
    /// Among the objects of its account.
    Account,
    /// On the whole installation.
    Installation,
}

/// An object as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Its kind.
    pub kind: Kind,
    /// Its id.
    pub id: Uuid,
    /// Its account.
    pub account: AccountId,
    /// Counts up over the whole installation with every write; the ETag.
    pub revision: u64,
    /// The object.
    pub body: serde_json::Value,
}

/// Which part of a list is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// Only objects after this id, in order of ids (which is order of age).
    pub after: Option<Uuid>,
    /// At most so many; backends cap it at [`Page::LIMIT_MAX`].
    pub limit: usize,
    /// Only objects whose member of this name has this JSON value, such as
    /// (`device`, `"0193…"`) or (`status`, `"queued"`). All must hold.
    pub equals: Vec<(String, serde_json::Value)>,
}

impl Page {
    /// Most objects of one page.
    pub const LIMIT_MAX: usize = 10_000;

    /// The first `limit`.
    #[must_use]
    pub const fn first(limit: usize) -> Self {
        Self { after: None, limit, equals: Vec::new() }
    }
}

/// Why the registry refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// Another object has this unique key.
    #[error("another {kind} has the {key} `{value}`", kind = kind.name())]
    Taken {
        /// Kind of both.
        kind: Kind,
        /// Name of the key.
        key: String,
        /// What both have.
        value: String,
    },
    /// There is no such object in this account.
    #[error("there is no {kind} {id} in this account", kind = kind.name())]
    NotFound {
        /// Kind asked for.
        kind: Kind,
        /// Id asked for.
        id: Uuid,
    },
    /// It was changed since: its revision is not the expected one.
    #[error("the object was changed meanwhile: expected revision {expected}, found {found}")]
    Changed {
        /// What the caller had seen.
        expected: u64,
        /// What is stored.
        found: u64,
    },
    /// A stored object does not have the form expected of its kind.
    #[error("stored {kind} {id} cannot be read: {reason}", kind = kind.name())]
    Corrupt {
        /// Its kind.
        kind: Kind,
        /// Its id.
        id: Uuid,
        /// What is wrong.
        reason: String,
    },
    /// The store failed; the same call may succeed later.
    #[error("the registry is unavailable: {0}")]
    Unavailable(String),
}

/// Holds configuration. Every write is durable, and audited in the same transaction.
///
/// All methods are cancel-safe: a dropped write has happened whole or not at all.
#[async_trait]
pub trait Registry: Send + Sync + 'static {
    /// Creates an object.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Taken`] if a unique key is in use, or `id` itself (key `id`).
    async fn create(
        &self,
        account: AccountId,
        draft: Draft,
        actor: &Actor,
    ) -> Result<Record, RegistryError>;

    /// Replaces an object; `expected` is the revision that the caller has seen, `None` for any.
    ///
    /// # Errors
    ///
    /// [`RegistryError::NotFound`], [`RegistryError::Changed`], [`RegistryError::Taken`].
    async fn update(
        &self,
        account: AccountId,
        draft: Draft,
        expected: Option<u64>,
        actor: &Actor,
    ) -> Result<Record, RegistryError>;

    /// Deletes an object.
    ///
    /// # Errors
    ///
    /// [`RegistryError::NotFound`], [`RegistryError::Changed`].
    async fn delete(
        &self,
        account: AccountId,
        kind: Kind,
        id: Uuid,
        expected: Option<u64>,
        actor: &Actor,
    ) -> Result<(), RegistryError>;

    /// The object of this id.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unavailable`].
    async fn get(
        &self,
        account: AccountId,
        kind: Kind,
        id: Uuid,
    ) -> Result<Option<Record>, RegistryError>;

    /// The object of this account that has a unique key.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unavailable`].
    async fn find(
        &self,
        account: AccountId,
        kind: Kind,
        key: &str,
        value: &str,
    ) -> Result<Option<Record>, RegistryError>;

    /// The object that has a key unique on the installation. For sign-in and
    /// start-up only: everything else knows its account.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unavailable`].
    async fn find_anywhere(
        &self,
        kind: Kind,
        key: &str,
        value: &str,
    ) -> Result<Option<Record>, RegistryError>;

    /// A page of the account's objects of a kind, in order of ids.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unavailable`].
    async fn list(
        &self,
        account: AccountId,
        kind: Kind,
        page: &Page,
    ) -> Result<Vec<Record>, RegistryError>;

    /// A page of all accounts' objects of a kind, in order of ids. For start-up
    /// and installation-wide administration only.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unavailable`].
    async fn list_everywhere(&self, kind: Kind, page: &Page) -> Result<Vec<Record>, RegistryError>;

    /// The account's audit trail, newest first, from before `before`.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unavailable`].
    async fn audit(
        &self,
        account: AccountId,
        before: Option<u64>,
        limit: usize,
    ) -> Result<Vec<Audit>, RegistryError>;

    /// Changes of all accounts after `after`, oldest first: what caches follow.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unavailable`].
    async fn changes(&self, after: u64, limit: usize) -> Result<Vec<Audit>, RegistryError>;

    /// Tells when something changed: holds the newest audit sequence.
    /// After it changes, read [`Registry::changes`].
    fn watch(&self) -> tokio::sync::watch::Receiver<u64>;
}

/// An object of a kind, with its unique keys.
pub trait Entity: Serialize + DeserializeOwned + Send {
    /// Its kind.
    const KIND: Kind;
    /// Its id.
    fn id(&self) -> Uuid;
    /// The keys that no other of its kind may have.
    fn unique(&self) -> BTreeMap<&'static str, (UniqueIn, String)>;
}

macro_rules! entities {
    ($($type:ty, $kind:ident, $id:expr, [$($key:literal in $scope:ident = $value:expr),*];)+) => {$(
        impl Entity for $type {
            const KIND: Kind = Kind::$kind;

            fn id(&self) -> Uuid {
                let id: fn(&$type) -> Uuid = $id;
                id(self)
            }

            fn unique(&self) -> BTreeMap<&'static str, (UniqueIn, String)> {
                BTreeMap::from([$({
                    let value: fn(&$type) -> String = $value;
                    ($key, (UniqueIn::$scope, value(self)))
                }),*])
            }
        }
    )+};
}

entities! {
    Account, Account, |a| a.id.0, ["name" in Installation = |a| a.name.clone()];
    User, User, |u| u.id.0, ["name" in Installation = |u| u.name.clone()];
    Token, Token, |t| t.id.0, ["secret" in Installation = |t| t.secret_hash.clone()];
    Device, Device, |d| d.id.0, ["ident" in Account = |d| d.ident.clone()];
    Channel, Channel, |c| c.id.0, ["listen" in Installation = |c| {
        // UDP and TCP ports are apart.
        let family = if c.transport == fieldline_model::Transport::Udp { "udp" } else { "tcp" };
        format!("{family}:{}", c.listen)
    }, "name" in Account = |c| c.name.clone()];
    Protocol, Protocol, |p| p.id.0, ["name" in Account = |p| p.name.clone()];
    ParameterObject, Parameter, |p| p.id, ["name" in Account = |p| p.spec.name.as_str().to_owned()];
    Command, Command, |c| c.id.0, [];
}

/// A declared parameter of an account, as the registry keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParameterObject {
    /// Its id.
    pub id: Uuid,
    /// What is declared.
    #[serde(flatten)]
    pub spec: ParamSpec,
}

/// A typed object with the revision it was read at.
#[derive(Clone, Debug, PartialEq)]
pub struct Versioned<T> {
    /// The object.
    pub object: T,
    /// Its revision.
    pub revision: u64,
}

/// The typed view of a [`Registry`].
pub trait RegistryExt {
    /// Creates `object`.
    fn create_object<T: Entity + Sync>(
        &self,
        account: AccountId,
        object: &T,
        actor: &Actor,
    ) -> impl Future<Output = Result<Versioned<T>, RegistryError>> + Send;
    /// Replaces the object of the same id.
    fn update_object<T: Entity + Sync>(
        &self,
        account: AccountId,
        object: &T,
        expected: Option<u64>,
        actor: &Actor,
    ) -> impl Future<Output = Result<Versioned<T>, RegistryError>> + Send;
    /// The object of this id.
    fn get_object<T: Entity>(
        &self,
        account: AccountId,
        id: Uuid,
    ) -> impl Future<Output = Result<Option<Versioned<T>>, RegistryError>> + Send;
    /// The object of the account that has a unique key.
    fn find_object<T: Entity>(
        &self,
        account: AccountId,
        key: &str,
        value: &str,
    ) -> impl Future<Output = Result<Option<Versioned<T>>, RegistryError>> + Send;
    /// A page of the account's objects, without those that [`readable`] passes over.
    fn list_objects<T: Entity>(
        &self,
        account: AccountId,
        page: &Page,
    ) -> impl Future<Output = Result<Vec<Versioned<T>>, RegistryError>> + Send;
}

/// The typed object of a record.
///
/// # Errors
///
/// [`RegistryError::Corrupt`] if the body has another form.
pub fn typed<T: Entity>(record: Record) -> Result<Versioned<T>, RegistryError> {
    let Record { kind, id, revision, body, .. } = record;
    match serde_json::from_value(body) {
        Ok(object) => Ok(Versioned { object, revision }),
        Err(error) => Err(RegistryError::Corrupt { kind, id, reason: error.to_string() }),
    }
}

/// The typed objects of records, without those that have another form: each is named in the log,
/// once, and left as it is. One that is damaged must not keep the others from being served.
pub fn readable<T: Entity>(records: Vec<Record>) -> Vec<Versioned<T>> {
    records
        .into_iter()
        .filter_map(|record| typed(record).map_err(|error| tell(&error)).ok())
        .collect()
}

/// Most objects that [`tell`] remembers to have named.
const TOLD_MAX: usize = 1_024;

/// Names an object that cannot be read. Lists are asked for all the time: not each time.
fn tell(error: &RegistryError) {
    static TOLD: Mutex<BTreeSet<Uuid>> = Mutex::new(BTreeSet::new());
    if let RegistryError::Corrupt { id, .. } = error {
        let mut told = TOLD.lock();
        if told.len() >= TOLD_MAX {
            told.clear();
        }
        if !told.insert(*id) {
            return;
        }
    }
    tracing::error!(%error, "it is passed over and left as it is: delete it and make it anew, or restore a backup");
}

/// The draft that writes `object`.
///
/// # Errors
///
/// [`RegistryError::Corrupt`] if it has no JSON form.
pub fn draft<T: Entity>(object: &T) -> Result<Draft, RegistryError> {
    let (kind, id) = (T::KIND, object.id());
    let body = serde_json::to_value(object).map_err(|error| RegistryError::Corrupt {
        kind,
        id,
        reason: error.to_string(),
    })?;
    Ok(Draft { kind, id, unique: object.unique(), body })
}

impl<R: Registry + ?Sized> RegistryExt for R {
    async fn create_object<T: Entity + Sync>(
        &self,
        account: AccountId,
        object: &T,
        actor: &Actor,
    ) -> Result<Versioned<T>, RegistryError> {
        typed(self.create(account, draft(object)?, actor).await?)
    }

    async fn update_object<T: Entity + Sync>(
        &self,
        account: AccountId,
        object: &T,
        expected: Option<u64>,
        actor: &Actor,
    ) -> Result<Versioned<T>, RegistryError> {
        typed(self.update(account, draft(object)?, expected, actor).await?)
    }

    async fn get_object<T: Entity>(
        &self,
        account: AccountId,
        id: Uuid,
    ) -> Result<Option<Versioned<T>>, RegistryError> {
        self.get(account, T::KIND, id).await?.map(typed).transpose()
    }

    async fn find_object<T: Entity>(
        &self,
        account: AccountId,
        key: &str,
        value: &str,
    ) -> Result<Option<Versioned<T>>, RegistryError> {
        self.find(account, T::KIND, key, value).await?.map(typed).transpose()
    }

    async fn list_objects<T: Entity>(
        &self,
        account: AccountId,
        page: &Page,
    ) -> Result<Vec<Versioned<T>>, RegistryError> {
        let (mut page, wanted) = (page.clone(), page.limit.min(Page::LIMIT_MAX));
        let mut objects = Vec::new();
        loop {
            page.limit = wanted - objects.len();
            let records = self.list(account, T::KIND, &page).await?;
            page.after = records.last().map(|record| record.id).or(page.after);
            let complete = records.len() < page.limit;
            objects.extend(readable(records));
            // What was passed over makes room: a page that is not full says that there are no more.
            if complete || objects.len() == wanted {
                return Ok(objects);
            }
        }
    }
}
