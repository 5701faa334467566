//! The registry: objects and the trail of their changes.
//!
//! A change is made in a transaction that locks the row of `counter` and keeps it until it is committed:
//! numbers are given in the order in which changes become visible, without gaps, whichever nodes make them.
//! Changes that are asked for at once share a transaction: `group.rs` gathers them, `plan.rs` decides what
//! each does, `write.rs` writes what all of them leave.

mod clients;
mod follow;
mod group;
mod plan;
mod read;
mod trim;
mod write;

use std::sync::Arc;

use async_trait::async_trait;
use fieldline_contracts::{
    Actor, Audit, Clock, Draft, Kind, Page, Record, Registry, RegistryError,
};
use fieldline_model::AccountId;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::connect::Servers;
use crate::error::{ConnectError, Fault};
use crate::migrate;
use crate::pool::Pool;
use crate::registry::group::Groups;
use crate::registry::plan::{Change, What};
use crate::settings::Settings;

/// The registry in PostgreSQL. Any number of nodes may have it open.
pub struct PostgresRegistry {
    pool: Arc<Pool>,
    newest: watch::Sender<u64>,
    clock: Arc<dyn Clock>,
    groups: Groups,
    follower: JoinHandle<()>,
}

impl PostgresRegistry {
    /// Connects, and makes or changes the tables as needed.
    ///
    /// # Errors
    ///
    /// See [`ConnectError`]; each says what to do.
    pub async fn connect(settings: &Settings, clock: Arc<dyn Clock>) -> Result<Self, ConnectError> {
        let servers = Arc::new(Servers::new(settings)?);
        let link = servers.connect().await?;
        migrate::prepare(&link, &servers, settings.migrate).await?;
        let other = |fault: Fault| ConnectError::Other(fault.to_string());
        let (newest, _) = watch::channel(read::newest(&link).await.map_err(other)?);
        let follower = tokio::spawn(follow::run(Arc::clone(&servers), newest.clone()));
        let pool = Pool::new(servers, settings.connections_max);
        let groups = Groups::start(Arc::clone(&pool), newest.clone());
        Ok(Self { pool, newest, clock, groups, follower })
    }
}

impl Drop for PostgresRegistry {
    fn drop(&mut self) {
        self.follower.abort();
        self.pool.close();
    }
}

#[async_trait]
impl Registry for PostgresRegistry {
    async fn create(
        &self,
        account: AccountId,
        draft: Draft,
        actor: &Actor,
    ) -> Result<Record, RegistryError> {
        let (actor, at) = (actor.clone(), self.clock.now());
        self.groups.change(Change { account, actor, at, what: What::Create(draft) }).await
    }

    async fn update(
        &self,
        account: AccountId,
        draft: Draft,
        expected: Option<u64>,
        actor: &Actor,
    ) -> Result<Record, RegistryError> {
        let (actor, at) = (actor.clone(), self.clock.now());
        self.groups.change(Change { account, actor, at, what: What::Update(draft, expected) }).await
    }

    async fn delete(
        &self,
        account: AccountId,
        kind: Kind,
        id: Uuid,
        expected: Option<u64>,
        actor: &Actor,
    ) -> Result<(), RegistryError> {
        let (actor, at) = (actor.clone(), self.clock.now());
        let what = What::Delete(kind, id, expected);
        self.groups.change(Change { account, actor, at, what }).await?;
        if kind == Kind::Account {
            self.forget_retained(account).await;
        }
        Ok(())
    }

    async fn get(
        &self,
        account: AccountId,
        kind: Kind,
        id: Uuid,
    ) -> Result<Option<Record>, RegistryError> {
        read::get(&self.pool, account, kind, id).await
    }

    async fn find(
        &self,
        account: AccountId,
        kind: Kind,
        key: &str,
        value: &str,
    ) -> Result<Option<Record>, RegistryError> {
        read::find(&self.pool, Some(account), kind, key, value).await
    }

    async fn find_anywhere(
        &self,
        kind: Kind,
        key: &str,
        value: &str,
    ) -> Result<Option<Record>, RegistryError> {
        read::find(&self.pool, None, kind, key, value).await
    }

    async fn list(
        &self,
        account: AccountId,
        kind: Kind,
        page: &Page,
    ) -> Result<Vec<Record>, RegistryError> {
        read::list(&self.pool, Some(account), kind, page).await
    }

    async fn list_everywhere(&self, kind: Kind, page: &Page) -> Result<Vec<Record>, RegistryError> {
        read::list(&self.pool, None, kind, page).await
    }

    async fn audit(
        &self,
        account: AccountId,
        before: Option<u64>,
        limit: usize,
    ) -> Result<Vec<Audit>, RegistryError> {
        read::audit(&self.pool, account, before, limit).await
    }

    async fn changes(&self, after: u64, limit: usize) -> Result<Vec<Audit>, RegistryError> {
        read::changes(&self.pool, after, limit).await
    }

    fn watch(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }
}
