//! What the pipeline knows of the registry: devices, declared parameters, accounts.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fieldline_contracts::registry::{ParameterObject, RegistryExt};
use fieldline_contracts::{Audit, AuditAction, Kind, Page, Registry, RegistryError};
use fieldline_model::{Account, AccountId, Device, DeviceId, Schema, Timestamp};
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
use tracing::warn;

use crate::Ingest;

/// Devices kept in memory; about 500 bytes each.
const DEVICES_MAX: usize = 200_000;
/// Unknown idents kept in memory, so that devices nobody registered cost no
/// look-up each time they try; about 100 bytes each.
const UNKNOWN_MAX: usize = 20_000;
/// Wait before the registry is asked again after it failed.
const RETRY_DELAY: Duration = Duration::from_millis(200);
/// Changes read in one go.
const CHANGES_MAX: usize = 1_000;

/// A map that forgets what was not used lately: two generations, the older of
/// which goes when the younger is full.
struct Generations<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
    young_max: usize,
}

impl<K: Eq + Hash + Clone, V: Clone> Generations<K, V> {
    fn new(max: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), young_max: max / 2 }
    }

    fn get(&mut self, key: &K) -> Option<V> {
        if let Some(value) = self.young.get(key) {
            return Some(value.clone());
        }
        let value = self.old.remove(key)?;
        self.insert(key.clone(), value.clone());
        Some(value)
    }

    fn insert(&mut self, key: K, value: V) {
        if self.young.len() >= self.young_max {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, value);
    }

    fn remove(&mut self, key: &K) -> Option<V> {
        let (young, old) = (self.young.remove(key), self.old.remove(key));
        young.or(old)
    }

    fn clear(&mut self) {
        self.young.clear();
        self.old.clear();
    }
}

struct Devices {
    /// Leads to `by_id`, which alone has the device: an entry whose device
    /// was forgotten there, or has another ident now, says nothing.
    by_ident: Generations<(AccountId, Arc<str>), DeviceId>,
    by_id: Generations<(AccountId, DeviceId), Arc<Device>>,
    /// Idents that no device has.
    unknown: Generations<(AccountId, Arc<str>), ()>,
    /// Counts changes: what was read before a change must not be kept after it.
    generation: u64,
}

/// How many registrations an account has left; refilled by time.
struct Allowance {
    left: f64,
    at: Timestamp,
}

pub(crate) struct Caches {
    devices: Mutex<Devices>,
    schemas: RwLock<HashMap<AccountId, Arc<Schema>>>,
    dictionary: Arc<Schema>,
    disabled: RwLock<HashSet<AccountId>>,
    registrations: Mutex<HashMap<AccountId, Allowance>>,
    loaded: watch::Sender<bool>,
    newest: watch::Receiver<u64>,
    /// The last change that the caches have followed.
    followed: AtomicU64,
}

impl Caches {
    pub(crate) fn new(newest: watch::Receiver<u64>) -> Self {
        Self {
            devices: Mutex::new(Devices {
                by_ident: Generations::new(DEVICES_MAX),
                by_id: Generations::new(DEVICES_MAX),
                unknown: Generations::new(UNKNOWN_MAX),
                generation: 0,
            }),
            schemas: RwLock::default(),
            dictionary: Arc::new(Schema::with_dictionary([])),
            disabled: RwLock::default(),
            registrations: Mutex::default(),
            loaded: watch::Sender::new(false),
            newest,
            followed: AtomicU64::new(0),
        }
    }

    /// Whether every change that was made before this call has been followed.
    fn is_fresh(&self) -> bool {
        self.followed.load(Ordering::Acquire) >= *self.newest.borrow()
    }

    pub(crate) fn by_ident(&self, account: AccountId, ident: &str) -> Option<Option<Arc<Device>>> {
        if !self.is_fresh() {
            return None;
        }
        let key = (account, Arc::from(ident));
        let mut devices = self.devices.lock();
        if devices.unknown.get(&key).is_some() {
            return Some(None);
        }
        let id = devices.by_ident.get(&key)?;
        let device = devices.by_id.get(&(account, id))?;
        (device.ident == ident).then_some(Some(device))
    }

    pub(crate) fn by_id(&self, account: AccountId, id: DeviceId) -> Option<Arc<Device>> {
        if !self.is_fresh() {
            return None;
        }
        self.devices.lock().by_id.get(&(account, id))
    }

    /// To be read before the registry is, and given back to `learn`.
    pub(crate) fn generation(&self) -> u64 {
        self.devices.lock().generation
    }

    pub(crate) fn learn_ident(
        &self,
        generation: u64,
        account: AccountId,
        ident: &str,
        found: Option<Arc<Device>>,
    ) {
        let mut devices = self.devices.lock();
        // What was read while the follower is behind may be older than the
        // change it has yet to see; it would then be forgotten in time.
        if devices.generation != generation {
            return;
        }
        let key = (account, Arc::from(ident));
        match found {
            Some(device) => {
                devices.unknown.remove(&key);
                devices.by_ident.insert(key, device.id);
                devices.by_id.insert((account, device.id), device);
            }
            None => devices.unknown.insert(key, ()),
        }
    }

    pub(crate) fn learn(&self, generation: u64, account: AccountId, device: &Arc<Device>) {
        self.learn_ident(generation, account, &device.ident, Some(Arc::clone(device)));
    }

    pub(crate) fn schema(&self, account: AccountId) -> Arc<Schema> {
        let schemas = self.schemas.read();
        Arc::clone(schemas.get(&account).unwrap_or(&self.dictionary))
    }

    pub(crate) fn account_enabled(&self, account: AccountId) -> bool {
        !self.disabled.read().contains(&account)
    }

    /// Takes one registration of the account's allowance.
    pub(crate) fn may_register(&self, account: AccountId, now: Timestamp) -> bool {
        let burst = f64::from(Ingest::REGISTRATIONS_BURST);
        let mut registrations = self.registrations.lock();
        let allowance = registrations.entry(account).or_insert(Allowance { left: burst, at: now });
        #[allow(clippy::cast_precision_loss, reason = "microseconds since the last call are few")]
        let elapsed_s = now.micros_since(allowance.at).max(0) as f64 / 1e6;
        allowance.at = now;
        allowance.left =
            (allowance.left + elapsed_s * f64::from(Ingest::REGISTRATIONS_PER_S)).min(burst);
        if allowance.left < 1.0 {
            return false;
        }
        allowance.left -= 1.0;
        true
    }

    pub(crate) async fn loaded(&self, limit: Duration) -> bool {
        if *self.loaded.borrow() {
            return true;
        }
        let mut loaded = self.loaded.subscribe();
        let waited = tokio::time::timeout(limit, loaded.wait_for(|loaded| *loaded)).await;
        matches!(waited, Ok(Ok(_)))
    }

    fn forget_device(&self, account: AccountId, id: DeviceId) {
        let mut devices = self.devices.lock();
        devices.generation += 1;
        devices.by_id.remove(&(account, id));
        // It may be the answer to an ident that was unknown.
        devices.unknown.clear();
    }
}

/// Keeps the caches up to date until it is aborted.
pub(crate) async fn follow(registry: Arc<dyn Registry>, caches: Arc<Caches>) {
    let mut newest = registry.watch();
    let mut seen = *newest.borrow_and_update();
    while let Err(error) = load(&*registry, &caches).await {
        warn!(%error, "declared parameters cannot be read yet, trying again");
        tokio::time::sleep(RETRY_DELAY).await;
    }
    caches.followed.store(seen, Ordering::Release);
    caches.loaded.send_replace(true);
    loop {
        match catch_up(&*registry, &caches, &mut seen).await {
            Ok(()) => {
                if newest.changed().await.is_err() {
                    return;
                }
            }
            Err(error) => {
                warn!(%error, "changes of the registry cannot be read, trying again");
                tokio::time::sleep(RETRY_DELAY).await;
            }
        }
    }
}

async fn catch_up(
    registry: &dyn Registry,
    caches: &Caches,
    seen: &mut u64,
) -> Result<(), RegistryError> {
    loop {
        let changes = registry.changes(*seen, CHANGES_MAX).await?;
        let Some(last) = changes.last() else { return Ok(()) };
        let last = last.sequence;
        let mut parameters_of = HashSet::new();
        for change in &changes {
            match change.kind {
                Kind::Device => caches.forget_device(change.account, DeviceId(change.object)),
                Kind::Parameter => {
                    parameters_of.insert(change.account);
                }
                Kind::Account => follow_account(registry, caches, change).await?,
                _ => {}
            }
        }
        for account in parameters_of {
            load_schema(registry, caches, account).await?;
        }
        *seen = last;
        caches.followed.store(last, Ordering::Release);
    }
}

async fn follow_account(
    registry: &dyn Registry,
    caches: &Caches,
    change: &Audit,
) -> Result<(), RegistryError> {
    let id = AccountId(change.object);
    let enabled = match change.action {
        AuditAction::Delete => true,
        _ => registry
            .get_object::<Account>(id, id.0)
            .await?
            .is_none_or(|account| account.object.enabled),
    };
    let mut disabled = caches.disabled.write();
    if enabled {
        disabled.remove(&id);
    } else {
        disabled.insert(id);
    }
    Ok(())
}

async fn load(registry: &dyn Registry, caches: &Caches) -> Result<(), RegistryError> {
    let mut page = Page::first(Page::LIMIT_MAX);
    let mut accounts = HashSet::new();
    loop {
        let records = registry.list_everywhere(Kind::Parameter, &page).await?;
        accounts.extend(records.iter().map(|record| record.account));
        page.after = records.last().map(|record| record.id);
        if records.len() < page.limit {
            break;
        }
    }
    for account in accounts {
        load_schema(registry, caches, account).await?;
    }
    let mut page = Page::first(Page::LIMIT_MAX);
    page.equals.push(("enabled".to_owned(), false.into()));
    loop {
        let records = registry.list_everywhere(Kind::Account, &page).await?;
        page.after = records.last().map(|record| record.id);
        let complete = records.len() < page.limit;
        // By their ids: one that cannot be read otherwise stays disabled too.
        caches.disabled.write().extend(records.iter().map(|record| AccountId(record.id)));
        if complete {
            return Ok(());
        }
    }
}

async fn load_schema(
    registry: &dyn Registry,
    caches: &Caches,
    account: AccountId,
) -> Result<(), RegistryError> {
    let mut page = Page::first(Page::LIMIT_MAX);
    let mut own = Vec::new();
    loop {
        let objects = registry.list_objects::<ParameterObject>(account, &page).await?;
        page.after = objects.last().map(|parameter| parameter.object.id);
        let complete = objects.len() < page.limit;
        own.extend(objects.into_iter().map(|parameter| parameter.object.spec));
        if complete {
            break;
        }
    }
    let mut schemas = caches.schemas.write();
    if own.is_empty() {
        schemas.remove(&account);
    } else {
        schemas.insert(account, Arc::new(Schema::with_dictionary(own)));
    }
    Ok(())
}
