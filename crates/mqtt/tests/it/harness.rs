//! A whole broker on a port of its own, with real backends.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fieldline_auth::{Auth, Identity, IdentityKind, NewToken};
use fieldline_contracts::{
    Actor, Bus, BusItem, ClientStore, Clock as _, History, MemoryBus, MemoryClientStore, Platform,
    RegistryExt as _, Subscription, SystemClock, TopicFilter,
};
use fieldline_ingest::Ingest;
use fieldline_model::{
    Account, AccountId, Decoded, Device, DeviceId, Event, EventId, EventKind, ParamName, Params,
    Scope, Series, Timestamp, UserId, Value,
};
use fieldline_mqtt::{Acceptor, Drained, Listener, MqttConfig, Services, run};
use fieldline_router::LocalCommands;
use fieldline_sqlite::SqliteRegistry;
use fieldline_testkit::{ScriptedHistory, SwitchedState};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Longest that a test waits for what must come.
pub(crate) const SOON: Duration = Duration::from_secs(10);
/// How long a test waits for what must not come.
pub(crate) const NEVER: Duration = Duration::from_millis(300);

/// A running broker.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) services: Services,
    pub(crate) history: Arc<ScriptedHistory>,
    pub(crate) state: Arc<SwitchedState>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) running: JoinHandle<Drained>,
    _directory: Option<tempfile::TempDir>,
}

/// One account, with a device and a token that may do everything in it.
pub(crate) struct Tenant {
    pub(crate) account: AccountId,
    pub(crate) device: Device,
    pub(crate) token: String,
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::with(MqttConfig::default(), None).await
    }

    pub(crate) async fn with(config: MqttConfig, tls: Option<Acceptor>) -> Self {
        Self::over(config, tls, None).await
    }

    /// Over a store of the caller's instead of the scripted one.
    pub(crate) async fn over(
        config: MqttConfig,
        tls: Option<Acceptor>,
        store: Option<Arc<dyn History>>,
    ) -> Self {
        let config = config.validate().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let clock = Arc::new(SystemClock);
        let registry =
            Arc::new(SqliteRegistry::open(&directory.path().join("r.db"), clock.clone()).unwrap());
        let history = Arc::new(ScriptedHistory::new());
        let commands = LocalCommands::new(registry.clone(), clock.clone());
        let state = Arc::new(SwitchedState::new());
        let platform = Platform {
            registry: registry.clone(),
            history: store.unwrap_or_else(|| history.clone()),
            state: state.clone(),
            bus: Arc::new(MemoryBus::new()),
            commands: Arc::new(commands.clone()),
            clock: clock.clone(),
        };
        let ingest = Ingest::new(platform.clone());
        let sink = ingest.clone();
        commands.set_events(move |event| sink.event_soon(event));
        let auth = Auth::new(registry.clone(), clock);
        let services = Services { platform, ingest, auth, store: registry, node: None };
        let place = (history, state, Some(directory));
        Self::serve(config, tls, services, place).await
    }

    /// Two nodes over the same backends, with a bus between them.
    pub(crate) async fn nodes(config: MqttConfig) -> ([Self; 2], Arc<LinkedBus>) {
        let base = Self::with(config.clone(), None).await;
        let bus = Arc::new(LinkedBus::default());
        let store: Arc<dyn ClientStore> = Arc::new(MemoryClientStore::new());
        let node = |at: usize| {
            let mut services = base.services.clone();
            services.platform.bus = Arc::new(End { bus: Arc::clone(&bus), at });
            services.ingest = Ingest::new(services.platform.clone());
            services.store = Arc::clone(&store);
            services.node = Some(format!("node-{at}"));
            let (history, state) = (Arc::clone(&base.history), Arc::clone(&base.state));
            Self::serve(config.clone(), None, services, (history, state, None))
        };
        let (mut one, two) = (node(0).await, node(1).await);
        // Its place is needed; itself it is not.
        let Self { shutdown, _directory, .. } = base;
        shutdown.cancel();
        one._directory = _directory;
        ([one, two], bus)
    }

    async fn serve(
        config: MqttConfig,
        tls: Option<Acceptor>,
        services: Services,
        (history, state, _directory): (
            Arc<ScriptedHistory>,
            Arc<SwitchedState>,
            Option<tempfile::TempDir>,
        ),
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let listeners = vec![Listener { listener, tls }];
        let running = tokio::spawn(run(config, listeners, services.clone(), shutdown.clone()));
        Self { address, services, history, state, shutdown, running, _directory }
    }

    /// Makes an account with one device.
    pub(crate) async fn tenant(&self, name: &str) -> Tenant {
        let clock = SystemClock;
        let account = Account {
            id: AccountId::new(clock.now(), clock.random()),
            name: name.to_owned(),
            enabled: true,
            retention_days: 0,
            storage_bytes_max: 0,
            labels: Default::default(),
            created_at: clock.now(),
        };
        let registry = &self.services.platform.registry;
        registry.create_object(account.id, &account, &Actor::system("test")).await.unwrap();
        let device = self.device(account.id, &format!("{name}-1")).await;
        let scopes = vec![Scope::Read, Scope::Publish, Scope::Command];
        let token = self.token(account.id, scopes, vec![]).await;
        Tenant { account: account.id, device, token }
    }

    pub(crate) async fn device(&self, account: AccountId, ident: &str) -> Device {
        let clock = SystemClock;
        let device = Device {
            id: DeviceId::new(clock.now(), clock.random()),
            account,
            name: ident.to_owned(),
            ident: ident.to_owned(),
            protocol: String::new(),
            kind: String::new(),
            enabled: true,
            settings: Default::default(),
            labels: Default::default(),
            created_at: clock.now(),
        };
        let registry = &self.services.platform.registry;
        registry.create_object(account, &device, &Actor::system("test")).await.unwrap().object
    }

    pub(crate) async fn token(
        &self,
        account: AccountId,
        scopes: Vec<Scope>,
        devices: Vec<DeviceId>,
    ) -> String {
        let new = NewToken { name: "test".into(), scopes, devices, ..NewToken::default() };
        self.new_token(account, new).await.1
    }

    /// Makes a token; returns its id and secret.
    pub(crate) async fn new_token(
        &self,
        account: AccountId,
        new: NewToken,
    ) -> (fieldline_model::TokenId, String) {
        let by = Identity {
            account,
            actor: Actor::system("test"),
            scopes: vec![Scope::Root],
            devices: vec![],
            kind: IdentityKind::User(UserId::from_bytes([1; 16])),
            session: None,
            expires_at: None,
        };
        let (token, secret) = self.services.auth.create_token(&by, account, new).await.unwrap();
        (token.object.id, secret)
    }

    /// What a device says, as any link submits it.
    pub(crate) async fn say(&self, account: AccountId, device: DeviceId, said: &[(&str, Value)]) {
        let params: Params =
            said.iter().map(|(n, v)| (ParamName::new(*n).unwrap(), v.clone())).collect();
        let decoded = Decoded { timestamp: None, params };
        let now = self.services.ingest.now();
        self.services.ingest.submit(account, device, now, vec![decoded]).await.unwrap();
    }

    /// An event about `object`.
    pub(crate) async fn happen(&self, account: AccountId, kind: EventKind, object: DeviceId) {
        let ingest = &self.services.ingest;
        let clock = SystemClock;
        let event = Event {
            id: EventId::new(clock.now(), clock.random()),
            account,
            kind,
            object: object.0,
            timestamp: clock.now(),
            params: Params::new(),
        };
        ingest.event(event).await;
        ingest.flush().await;
    }

    /// A line in the log of a device or channel.
    pub(crate) async fn log(&self, series: Series) {
        let params = fieldline_ingest::own_params([("log.kind", "connected".into())]);
        let at: Timestamp = self.services.ingest.now();
        let line = fieldline_model::Accepted::own(series, at, params);
        self.services.ingest.log(vec![line]).await;
        self.services.ingest.flush().await;
    }

    /// Stops the broker and returns how that went.
    pub(crate) async fn stop(self) -> Drained {
        self.shutdown.cancel();
        tokio::time::timeout(SOON, self.running).await.unwrap().unwrap()
    }
}

/// Waits until `done` says so.
pub(crate) async fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + SOON;
    while !done() {
        assert!(tokio::time::Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A bus between two nodes that can be cut: then each hears itself alone.
#[derive(Default)]
pub(crate) struct LinkedBus {
    ends: [MemoryBus; 2],
    cut: Mutex<Option<HashSet<AccountId>>>,
}

impl LinkedBus {
    /// Cuts it.
    pub(crate) fn cut(&self) {
        self.cut.lock().unwrap().get_or_insert_default();
    }

    /// Mends it: both are told that something may be missing.
    pub(crate) fn mend(&self) {
        for account in self.cut.lock().unwrap().take().into_iter().flatten() {
            self.ends.iter().for_each(|end| end.missed(account, 0));
        }
    }
}

/// One end of a bus.
struct End {
    bus: Arc<LinkedBus>,
    at: usize,
}

#[async_trait::async_trait]
impl Bus for End {
    async fn publish(&self, account: AccountId, items: Vec<BusItem>) {
        self.bus.ends[self.at].publish(account, items.clone()).await;
        if let Some(missed) = &mut *self.bus.cut.lock().unwrap() {
            missed.insert(account);
            return;
        }
        self.bus.ends[1 - self.at].publish(account, items).await;
    }

    async fn subscribe(&self, account: AccountId, filter: TopicFilter) -> Box<dyn Subscription> {
        self.bus.ends[self.at].subscribe(account, filter).await
    }
}
