//! A registry in memory: the whole contract, nothing kept.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use fieldline_contracts::registry::UniqueIn;
use fieldline_contracts::{
    Actor, Audit, AuditAction, Clock, Draft, Kind, Page, Record, Registry, RegistryError,
};
use fieldline_model::AccountId;
use parking_lot::Mutex;
use tokio::sync::watch;
use uuid::Uuid;

/// Where a unique key counts, and what it is.
type Key = (Kind, &'static str, Option<AccountId>, String);

struct Object {
    record: Record,
    keys: Vec<Key>,
}

#[derive(Default)]
struct Content {
    objects: BTreeMap<(KindPlace, Uuid), Object>,
    keys: BTreeMap<(KindPlace, &'static str, Option<AccountId>, String), Uuid>,
    audit: Vec<Audit>,
}

/// A kind by its place in [`Kind::ALL`], since kinds have no order of their own.
type KindPlace = usize;

fn place(kind: Kind) -> KindPlace {
    Kind::ALL.iter().position(|k| *k == kind).unwrap_or(usize::MAX)
}

/// A [`Registry`] in memory, for tests of what stands above one.
pub struct MemoryRegistry {
    content: Mutex<Content>,
    newest: watch::Sender<u64>,
    clock: Arc<dyn Clock>,
}

impl MemoryRegistry {
    /// An empty registry.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { content: Mutex::default(), newest: watch::Sender::new(0), clock }
    }

    fn record_audit(
        &self,
        content: &mut Content,
        record: &Record,
        action: AuditAction,
        changed: Vec<String>,
        actor: &Actor,
    ) -> u64 {
        let sequence = content.audit.len() as u64 + 1;
        content.audit.push(Audit {
            sequence,
            at: self.clock.now(),
            account: record.account,
            actor: actor.clone(),
            action,
            kind: record.kind,
            object: record.id,
            changed,
        });
        sequence
    }
}

fn keys_of(account: AccountId, draft: &Draft) -> Vec<Key> {
    let key = |(name, (scope, value)): (&&'static str, &(UniqueIn, String))| {
        let within = (*scope == UniqueIn::Account).then_some(account);
        (draft.kind, *name, within, value.clone())
    };
    draft.unique.iter().map(key).collect()
}

fn check_free(content: &Content, keys: &[Key], own: Option<Uuid>) -> Result<(), RegistryError> {
    for (kind, name, within, value) in keys {
        let holder = content.keys.get(&(place(*kind), *name, *within, value.clone()));
        if holder.is_some_and(|id| Some(*id) != own) {
            let (key, value) = ((*name).to_owned(), value.clone());
            return Err(RegistryError::Taken { kind: *kind, key, value });
        }
    }
    Ok(())
}

fn matches(record: &Record, page: &Page) -> bool {
    page.equals.iter().all(|(name, value)| record.body.get(name) == Some(value))
}

#[async_trait]
impl Registry for MemoryRegistry {
    async fn create(
        &self,
        account: AccountId,
        draft: Draft,
        actor: &Actor,
    ) -> Result<Record, RegistryError> {
        let mut content = self.content.lock();
        let content = &mut *content;
        let at = (place(draft.kind), draft.id);
        if content.objects.contains_key(&at) {
            let (key, value) = ("id".to_owned(), draft.id.to_string());
            return Err(RegistryError::Taken { kind: draft.kind, key, value });
        }
        let keys = keys_of(account, &draft);
        check_free(content, &keys, None)?;
        let Draft { kind, id, body, .. } = draft;
        let mut record = Record { kind, id, account, revision: 0, body };
        let sequence = self.record_audit(content, &record, AuditAction::Create, Vec::new(), actor);
        record.revision = sequence;
        for (kind, name, within, value) in keys.iter().cloned() {
            content.keys.insert((place(kind), name, within, value), id);
        }
        content.objects.insert(at, Object { record: record.clone(), keys });
        self.newest.send_replace(sequence);
        Ok(record)
    }

    async fn update(
        &self,
        account: AccountId,
        draft: Draft,
        expected: Option<u64>,
        actor: &Actor,
    ) -> Result<Record, RegistryError> {
        let mut content = self.content.lock();
        let content = &mut *content;
        let Draft { kind, id, .. } = draft;
        let at = (place(kind), id);
        let missing = || RegistryError::NotFound { kind, id };
        let old = content.objects.get(&at).map(|object| object.record.clone());
        let old = old.filter(|record| record.account == account).ok_or_else(missing)?;
        if let Some(expected) = expected.filter(|e| *e != old.revision) {
            return Err(RegistryError::Changed { expected, found: old.revision });
        }
        let keys = keys_of(account, &draft);
        check_free(content, &keys, Some(id))?;
        let members = |body: &serde_json::Value| {
            body.as_object().map(|o| o.keys().cloned().collect::<Vec<_>>()).unwrap_or_default()
        };
        let mut changed = members(&old.body);
        changed.extend(members(&draft.body));
        changed.sort_unstable();
        changed.dedup();
        changed.retain(|name| old.body.get(name) != draft.body.get(name));
        let mut record = Record { body: draft.body, ..old };
        record.revision = self.record_audit(content, &record, AuditAction::Update, changed, actor);
        for (kind, name, within, value) in
            content.objects.get(&at).map(|o| o.keys.clone()).unwrap_or_default()
        {
            content.keys.remove(&(place(kind), name, within, value));
        }
        for (kind, name, within, value) in keys.iter().cloned() {
            content.keys.insert((place(kind), name, within, value), id);
        }
        content.objects.insert(at, Object { record: record.clone(), keys });
        self.newest.send_replace(record.revision);
        Ok(record)
    }

    async fn delete(
        &self,
        account: AccountId,
        kind: Kind,
        id: Uuid,
        expected: Option<u64>,
        actor: &Actor,
    ) -> Result<(), RegistryError> {
        let mut content = self.content.lock();
        let content = &mut *content;
        let at = (place(kind), id);
        let missing = || RegistryError::NotFound { kind, id };
        let old = content.objects.get(&at).map(|object| object.record.clone());
        let old = old.filter(|record| record.account == account).ok_or_else(missing)?;
        if let Some(expected) = expected.filter(|e| *e != old.revision) {
            return Err(RegistryError::Changed { expected, found: old.revision });
        }
        if let Some(object) = content.objects.remove(&at) {
            for (kind, name, within, value) in object.keys {
                content.keys.remove(&(place(kind), name, within, value));
            }
        }
        let sequence = self.record_audit(content, &old, AuditAction::Delete, Vec::new(), actor);
        self.newest.send_replace(sequence);
        Ok(())
    }

    async fn get(
        &self,
        account: AccountId,
        kind: Kind,
        id: Uuid,
    ) -> Result<Option<Record>, RegistryError> {
        let content = self.content.lock();
        let found = content.objects.get(&(place(kind), id)).map(|object| object.record.clone());
        Ok(found.filter(|record| record.account == account))
    }

    async fn find(
        &self,
        account: AccountId,
        kind: Kind,
        key: &str,
        value: &str,
    ) -> Result<Option<Record>, RegistryError> {
        let content = self.content.lock();
        let found = content.objects.values().find(|object| {
            object.record.account == account
                && object.keys.iter().any(|(k, n, _, v)| *k == kind && *n == key && v == value)
        });
        Ok(found.map(|object| object.record.clone()))
    }

    async fn find_anywhere(
        &self,
        kind: Kind,
        key: &str,
        value: &str,
    ) -> Result<Option<Record>, RegistryError> {
        let content = self.content.lock();
        let found = content.objects.values().find(|object| {
            object
                .keys
                .iter()
                .any(|(k, n, within, v)| *k == kind && *n == key && within.is_none() && v == value)
        });
        Ok(found.map(|object| object.record.clone()))
    }

    async fn list(
        &self,
        account: AccountId,
        kind: Kind,
        page: &Page,
    ) -> Result<Vec<Record>, RegistryError> {
        let content = self.content.lock();
        let records = content.objects.values().map(|object| &object.record).filter(|record| {
            record.kind == kind
                && record.account == account
                && page.after.is_none_or(|after| record.id > after)
                && matches(record, page)
        });
        Ok(records.take(page.limit.min(Page::LIMIT_MAX)).cloned().collect())
    }

    async fn list_everywhere(&self, kind: Kind, page: &Page) -> Result<Vec<Record>, RegistryError> {
        let content = self.content.lock();
        let records = content.objects.values().map(|object| &object.record).filter(|record| {
            record.kind == kind
                && page.after.is_none_or(|after| record.id > after)
                && matches(record, page)
        });
        Ok(records.take(page.limit.min(Page::LIMIT_MAX)).cloned().collect())
    }

    async fn audit(
        &self,
        account: AccountId,
        before: Option<u64>,
        limit: usize,
    ) -> Result<Vec<Audit>, RegistryError> {
        let content = self.content.lock();
        let of_account = content.audit.iter().rev().filter(|audit| {
            audit.account == account && before.is_none_or(|before| audit.sequence < before)
        });
        Ok(of_account.take(limit).cloned().collect())
    }

    async fn changes(&self, after: u64, limit: usize) -> Result<Vec<Audit>, RegistryError> {
        let content = self.content.lock();
        let from = usize::try_from(after).unwrap_or(usize::MAX);
        Ok(content.audit.iter().skip(from).take(limit).cloned().collect())
    }

    fn watch(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use fieldline_contracts::SystemClock;

    use super::*;

    #[tokio::test]
    async fn it_keeps_the_contract() {
        let registry = Arc::new(MemoryRegistry::new(Arc::new(SystemClock)));
        fieldline_contracts::conformance::registry::run(registry).await;
    }
}
