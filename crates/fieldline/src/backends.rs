//! What stands behind the contracts: engines of our own on one machine, foreign servers in a cluster.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::{
    Blobs, Bus, Calls, ClientStore, Clock, Cluster, Handlers, History, MemoryBus, MemoryCalls,
    MemoryCluster, MemoryState, Node, Platform, Registry, State, SystemClock,
};
use fieldline_etcd::EtcdCluster;
use fieldline_ingest::Ingest;
use fieldline_mdb::{Mdb, MdbConfig};
use fieldline_mqtt_bus::MqttBus;
use fieldline_postgres::{PostgresHistory, PostgresRegistry};
use fieldline_redis::RedisState;
use fieldline_rest::{Insight, Lag, LagCheck, Led, ReadyCheck, Size};
use fieldline_router::LocalCommands;
use fieldline_router::calls::ClusterPeers;
use fieldline_runtime::{DataDir, Watchdog};
use fieldline_sqlite::SqliteRegistry;

use crate::between::Between;
use crate::config::Config;
use crate::housekeeping;
use crate::node::{NodeConfig, Role};
use crate::worker::{Failure, setup};

/// How long the last live items may take to reach the broker at the end.
const BUS_CLOSE_MAX: Duration = Duration::from_secs(2);

/// The contracts, and what has to be done with their backends at start and end.
pub(crate) struct Backends {
    pub(crate) platform: Platform,
    pub(crate) cluster: Arc<dyn Cluster>,
    /// What MQTT clients leave with the server.
    pub(crate) client_store: Arc<dyn ClientStore>,
    /// How other nodes are asked.
    pub(crate) calls: Arc<dyn Calls>,
    /// What they may ask of this one.
    pub(crate) handlers: Handlers,
    /// Cold segments and binaries; a cluster may have no place for them.
    blobs: Option<Arc<dyn Blobs>>,
    commands: LocalCommands,
    /// What this node says of itself.
    node: Node,
    engines: Engines,
}

/// What the contracts do not show.
enum Engines {
    Embedded {
        registry: Arc<SqliteRegistry>,
    },
    Cluster {
        state: Arc<RedisState>,
        bus: Arc<MqttBus>,
        cluster: Arc<EtcdCluster>,
        between: Between,
    },
}

impl Backends {
    /// One process that needs nothing else.
    pub(crate) async fn embedded(config: &Config, data: &DataDir) -> Result<Self, Failure> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        check_pair(data)?;
        let sqlite = Arc::new(
            SqliteRegistry::open(&data.join("registry.db"), Arc::clone(&clock)).map_err(setup)?,
        );
        let registry: Arc<dyn Registry> = sqlite.clone();
        let store = store_config(config);
        let history = Mdb::open(data.join("messages"), store, Arc::clone(&clock)).map_err(setup)?;
        let history: Arc<dyn History> = Arc::new(history);
        let memory = MemoryState::new();
        let rebuilt = memory.rebuild(&*history).await;
        rebuilt.map_err(|error| Failure::Running(format!("reading last values: {error}")))?;
        let blobs = crate::blobs::of_one(&config.blobs, &data.join("blobs")).await?;
        let node = describe("fieldline", "", None, &Role::ALL);
        let cluster: Arc<dyn Cluster> = Arc::new(MemoryCluster::new());
        cluster.join(node.clone()).await.map_err(setup)?;
        let commands = LocalCommands::new(Arc::clone(&registry), Arc::clone(&clock))
            .with_cluster(Arc::clone(&cluster));
        let platform = Platform {
            registry,
            history,
            state: Arc::new(memory),
            bus: Arc::new(MemoryBus::new()),
            commands: Arc::new(commands.clone()),
            clock,
        };
        let client_store: Arc<dyn ClientStore> = sqlite.clone();
        let engines = Engines::Embedded { registry: sqlite };
        let calls = MemoryCalls::new(&node.name);
        let (handlers, calls) = (calls.handlers().clone(), Arc::new(calls));
        let blobs = Some(blobs);
        Ok(Self {
            platform,
            cluster,
            client_store,
            blobs,
            calls,
            handlers,
            commands,
            node,
            engines,
        })
    }

    /// One node of several, which keeps nothing itself.
    pub(crate) async fn cluster(
        config: &Config,
        node: &NodeConfig,
        roles: &[Role],
        between: Between,
    ) -> Result<Self, Failure> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let name = node.name.as_str();
        // First: a node that cannot start for it should not have been there.
        let blobs = crate::blobs::of_cluster(&config.blobs).await?;
        let (calls, peers) = (between.calls.clone(), ClusterPeers::new(between.calls.clone()));
        let asked = Arc::new(peers.clone());
        let etcd =
            EtcdCluster::connect(node.etcd().map_err(setup)?, Arc::clone(&clock), asked).await;
        let etcd = Arc::new(etcd.map_err(setup)?);
        let watchdog = Watchdog::start();
        let failed = |error| Failure::Running(format!("the watchdog cannot be started: {error}"));
        etcd.guard_by(Arc::new(watchdog.map_err(failed)?));
        peers.answer_for(&etcd);
        calls.follow(etcd.membership());
        let described = describe(name, &between.address, node.zone.clone(), roles);
        etcd.join(described.clone()).await.map_err(setup)?;
        let registry = PostgresRegistry::connect(&config.postgres, Arc::clone(&clock)).await;
        let postgres = Arc::new(registry.map_err(setup)?);
        let client_store: Arc<dyn ClientStore> = postgres.clone();
        let registry: Arc<dyn Registry> = postgres;
        let history = PostgresHistory::connect(&config.postgres, Arc::clone(&clock)).await;
        let history: Arc<dyn History> = Arc::new(history.map_err(setup)?);
        let state = RedisState::connect(config.redis.clone(), name, Arc::clone(&history)).await;
        let state = Arc::new(state.map_err(setup)?);
        let bus = MqttBus::connect(config.mqtt_bus.clone(), Arc::clone(&clock)).await;
        let bus = Arc::new(bus.map_err(setup)?);
        let commands = LocalCommands::new(Arc::clone(&registry), Arc::clone(&clock))
            .with_cluster(Arc::clone(&etcd) as Arc<dyn Cluster>);
        let platform = Platform {
            registry,
            history,
            state: Arc::clone(&state) as Arc<dyn State>,
            bus: Arc::clone(&bus) as Arc<dyn Bus>,
            commands: Arc::new(commands.clone()),
            clock,
        };
        let engines = Engines::Cluster { state, bus, cluster: Arc::clone(&etcd), between };
        let (handlers, calls) = (calls.handlers().clone(), Arc::new(calls));
        Ok(Self {
            platform,
            cluster: etcd,
            client_store,
            blobs,
            calls,
            handlers,
            commands,
            node: described,
            engines,
        })
    }

    /// Takes up the commands that wait, and tells of their changes through the pipeline.
    pub(crate) async fn begin(&self, ingest: &Ingest) -> Result<(), Failure> {
        let events = ingest.clone();
        self.commands.set_events(move |event| events.event_soon(event));
        let recovered = self.commands.recover().await;
        recovered.map(|_| ()).map_err(|error| Failure::Running(error.to_string()))
    }

    /// The name of this node.
    pub(crate) fn node_name(&self) -> &str {
        &self.node.name
    }

    /// The name of this node where there may be others.
    pub(crate) fn name_among_others(&self) -> Option<&str> {
        matches!(self.engines, Engines::Cluster { .. }).then(|| self.node_name())
    }

    /// Tells the other nodes whether this one takes work.
    pub(crate) async fn announce(&self, ready: bool) -> Result<(), Failure> {
        let node = Node { ready, ..self.node.clone() };
        self.cluster.join(node).await.map_err(|error| Failure::Running(error.to_string()))
    }

    /// Without this it cannot do its work.
    pub(crate) fn ready(&self) -> Vec<ReadyCheck> {
        let history = Arc::clone(&self.platform.history);
        vec![Arc::new(move || history.problems())]
    }

    /// What it can do without for a while.
    pub(crate) fn optional(&self) -> Vec<(&'static str, ReadyCheck)> {
        let blobs = self.blobs.clone().map(|blobs| -> (&'static str, ReadyCheck) {
            ("blobs", Arc::new(move || blobs.problems()))
        });
        let Engines::Cluster { state, bus, cluster, .. } = &self.engines else {
            return blobs.into_iter().collect();
        };
        let (state, bus) = (Arc::clone(state), Arc::clone(bus));
        let membership = cluster.membership();
        let fresh: ReadyCheck = Arc::new(move || {
            let away = "etcd does not answer: nothing is placed anew until it does";
            if membership.borrow().fresh { Vec::new() } else { vec![away.to_owned()] }
        });
        vec![
            ("cluster", fresh),
            ("last values", Arc::new(move || state.problems())),
            ("live items of other nodes", Arc::new(move || bus.problems())),
        ]
        .into_iter()
        .chain(blobs)
        .collect()
    }

    /// What is told of the cluster besides who is there.
    pub(crate) fn insight(&self, ingest: &Ingest) -> Insight {
        let ingest = ingest.clone();
        let append: LagCheck = Arc::new(move || Lag {
            name: "append",
            size: ingest.append_took().map(Size::Took),
            note: None,
        });
        let led = vec![
            Led { key: housekeeping::RETENTION_KEY, what: "lets go of messages beyond retention" },
            Led { key: LocalCommands::UPKEEP_KEY, what: "looks after commands that wait" },
        ];
        let mut lags = vec![append];
        if let Engines::Cluster { state, bus, .. } = &self.engines {
            let (state, bus) = (Arc::clone(state), Arc::clone(bus));
            lags.push(Arc::new(move || {
                let depth = bus.depth();
                let lost = format!("{} dropped since the start", depth.dropped);
                Lag {
                    name: "live_items",
                    size: Some(Size::Waiting(depth.items as u64 + depth.sent)),
                    note: (depth.dropped > 0).then_some(lost),
                }
            }));
            lags.push(Arc::new(move || Lag {
                name: "last_values",
                size: Some(Size::Waiting(state.waiting().0 as u64)),
                // Such as that they are being read again from history.
                note: state.problems().into_iter().next(),
            }));
        }
        let shared = matches!(self.engines, Engines::Cluster { .. });
        Insight { shared, led, spread: Vec::new(), lags }
    }

    /// Ends in order, after all services.
    pub(crate) async fn close(self) -> Result<(), Failure> {
        let closed = self.platform.history.close().await;
        match &self.engines {
            Engines::Embedded { registry } => {
                if let Err(error) = registry.settle().await {
                    tracing::warn!(%error, "the registry's journal could not be emptied");
                }
            }
            Engines::Cluster { state, bus, .. } => {
                let left = bus.close(BUS_CLOSE_MAX).await;
                if left > 0 {
                    tracing::warn!(left, "other nodes do not hear of the last live items");
                }
                state.close().await;
            }
        }
        self.cluster.leave().await;
        if let Engines::Cluster { between, .. } = self.engines {
            between.end().await;
        }
        closed.map_err(|error| Failure::Running(format!("closing the store: {error}")))
    }
}

fn describe(name: &str, address: &str, zone: Option<String>, roles: &[Role]) -> Node {
    Node {
        name: name.to_owned(),
        address: address.to_owned(),
        roles: roles.iter().map(|role| role.name().to_owned()).collect(),
        zone,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ready: false,
    }
}

/// Refuses a store whose registry is gone: a new one would give the account and
/// devices other ids, and what is stored would belong to nobody.
fn check_pair(data: &DataDir) -> Result<(), Failure> {
    let Some(missing) = missing_registry(data.path()) else { return Ok(()) };
    let registry = data.join("registry.db");
    Err(Failure::Setup(format!(
        "`{}`: {missing}; restore it from a backup, or move the data directory aside to begin anew",
        registry.display(),
    )))
}

/// Says so where there is a store in `data`, and no registry.
pub(crate) fn missing_registry(data: &Path) -> Option<String> {
    let store = data.join("messages");
    (store.join("STORE").exists() && !data.join("registry.db").exists())
        .then(|| format!("it is missing, though `{}` holds messages", store.display()))
}

fn store_config(config: &Config) -> MdbConfig {
    MdbConfig {
        wal_bytes_max: config.store.log_file_bytes,
        memtable_bytes_max: config.store.memory_bytes_max,
        ..MdbConfig::default()
    }
}
