//! What all parts share: the connection, what may be believed of it, and what waits for it.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::{Arc, Weak};
use std::thread::ThreadId;
use std::time::Duration;

use fieldline_contracts::history::History;
use fieldline_contracts::state::{DEVICE_BYTES_MAX, PARAMS_MAX, cost};
use fieldline_contracts::status::STATUS_KEYS_MAX;
use fieldline_contracts::{StateError, StatusTable};
use fieldline_model::{AccountId, DeviceId, ParamName, SeriesKind, Stored, Timestamp, Value};
use parking_lot::{Mutex, RwLock};
use redis::aio::MultiplexedConnection;
use redis::{Client, Cmd, Pipeline, RedisError, RedisResult, Script};
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use crate::config::RedisConfig;
use crate::encoding::{Version, record, time_bytes};
use crate::keys::Keys;
use crate::scripts::Scripts;
use crate::waiting::{HeldConnections, Waiting};

/// Most values that one call of a script takes: Lua has a bound on what it unpacks.
pub(crate) const VALUES_MAX: usize = 500;
/// Most threads that have a connection of their own; others share one.
const LOCAL_MAX: usize = 16;
/// Longest that a pipeline of the background may take.
pub(crate) const BULK_TIMEOUT: Duration = Duration::from_secs(5);

/// The connection that reads and writes go by, and what may be believed.
pub(crate) struct Link {
    pub(crate) connection: Option<MultiplexedConnection>,
    /// Where its task runs: calls from there need no other.
    pub(crate) home: Option<ThreadId>,
    /// Connections of other threads, so that an answer does not have to wake two; `None` while one
    /// is being made, or could not be.
    pub(crate) local: HashMap<ThreadId, Option<MultiplexedConnection>>,
    /// The process that they all lead to.
    pub(crate) run_id: String,
    /// Counts connections: an error of an earlier one says nothing of this.
    pub(crate) serial: u64,
    /// Whether calls are made at all; if not they fail at once.
    pub(crate) open: bool,
    /// The generation in which last values are whole; without one they are not read.
    pub(crate) generation: Option<Arc<[u8]>>,
    /// When the server's memory began; without it presence and status are not read, since not
    /// every node has had the time to tell its own again.
    pub(crate) settled: Option<Arc<[u8]>>,
    /// Why calls fail while they do.
    pub(crate) reason: Arc<str>,
}

/// The copy of an account's statuses that its watchers look at.
pub(crate) struct Mirror {
    pub(crate) table: Arc<StatusTable>,
    /// The connection by which it follows.
    pub(crate) subscribed: Option<u64>,
    /// The connection and memory that it was read from as a whole.
    pub(crate) read: Option<(u64, Arc<[u8]>)>,
}

/// What this node set of a module's status, to be said again to a server that lost its memory.
#[derive(Clone)]
pub(crate) struct OwnStatus {
    pub(crate) epoch: u64,
    pub(crate) values: BTreeMap<String, Value>,
}

pub(crate) type OwnStatuses = HashMap<(AccountId, String), OwnStatus>;

pub(crate) struct Inner {
    /// Itself, for what it has done elsewhere.
    pub(crate) me: Weak<Inner>,
    pub(crate) config: RedisConfig,
    pub(crate) client: Client,
    pub(crate) address: String,
    pub(crate) keys: Keys,
    pub(crate) scripts: Scripts,
    pub(crate) history: Arc<dyn History>,
    /// The name of this node.
    pub(crate) node: String,
    /// Names this process among those that had the node's name.
    pub(crate) incarnation: String,
    pub(crate) link: RwLock<Link>,
    /// Held while the link opens, so that nothing is kept for later that nobody comes for.
    pub(crate) waiting: Mutex<Waiting>,
    pub(crate) held: Mutex<HeldConnections>,
    pub(crate) statuses: Mutex<OwnStatuses>,
    pub(crate) mirrors: RwLock<HashMap<AccountId, Mirror>>,
    /// Asks the monitor to look now.
    pub(crate) wake: Notify,
    /// Told after each look of the monitor.
    pub(crate) looked: watch::Sender<()>,
}

/// The connection for one call.
pub(crate) struct Call {
    pub(crate) connection: MultiplexedConnection,
    pub(crate) serial: u64,
}

impl Inner {
    /// A connection for one call by this thread, if calls are let through and `wanted` is there.
    fn call<T>(&self, wanted: impl FnOnce(&Link) -> Option<T>) -> Result<(Call, T), StateError> {
        let thread = std::thread::current().id();
        let link = self.link.read();
        let unavailable = || StateError::Unavailable(link.reason.to_string());
        let shared = link.connection.as_ref().filter(|_| link.open).ok_or_else(unavailable)?;
        let wanted = wanted(&link).ok_or_else(unavailable)?;
        let own = if link.home == Some(thread) { Some(&None) } else { link.local.get(&thread) };
        let connection = own.and_then(Option::as_ref).unwrap_or(shared).clone();
        let call = Call { connection, serial: link.serial };
        if own.is_none() && link.local.len() < LOCAL_MAX {
            drop(link);
            self.connect_here(thread, call.serial);
        }
        Ok((call, wanted))
    }

    /// Makes a connection whose task runs where this is called; until it is there the shared one does.
    fn connect_here(&self, thread: ThreadId, serial: u64) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        {
            let mut link = self.link.write();
            if link.serial != serial || link.local.insert(thread, None).is_some() {
                return;
            }
        }
        let me = self.me.clone();
        runtime.spawn(async move {
            let Some(inner) = me.upgrade() else { return };
            let nobody = None::<fn(redis::PushInfo) -> Result<(), ()>>;
            let made = crate::connect::connect(&inner.client, &inner.scripts, nobody).await;
            let mut link = inner.link.write();
            match made {
                Ok(made) if link.serial == serial && made.run_id == link.run_id => {
                    if let Some(place) = link.local.get_mut(&thread) {
                        *place = Some(made.connection);
                    }
                }
                Ok(_) => {}
                // The shared one goes on; when it does not, the monitor says why.
                Err(error) => tracing::debug!(%error, "a thread has no connection of its own"),
            }
        });
    }

    /// A connection to write by.
    pub(crate) fn writable(&self) -> Result<Call, StateError> {
        Ok(self.call(|_| Some(()))?.0)
    }

    /// A connection to read last values by, and the generation that is the truth.
    pub(crate) fn readable(&self) -> Result<(Call, Arc<[u8]>), StateError> {
        self.call(|link| link.generation.clone())
    }

    /// A connection to read presence and status by, and the memory that is the truth.
    pub(crate) fn settled(&self) -> Result<(Call, Arc<[u8]>), StateError> {
        self.call(|link| link.settled.clone()).map_err(|error| {
            let link = self.link.read();
            match link.open && link.settled.is_none() {
                true => StateError::Unavailable(
                    "Redis lost its memory; nodes tell their connections and status again"
                        .to_owned(),
                ),
                false => error,
            }
        })
    }

    /// Waits for an answer as long as a caller may wait. A failure closes the link until the
    /// monitor has looked at it.
    pub(crate) async fn answer<T>(
        &self,
        serial: u64,
        call: impl Future<Output = RedisResult<T>>,
    ) -> Result<T, StateError> {
        let reason = match timeout(self.config.deadline, call).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => self.words(&error),
            Err(_) => {
                let ms = self.config.deadline.as_millis();
                format!("Redis at {} did not answer within {ms} ms", self.address)
            }
        };
        self.failed(serial, &reason);
        Err(StateError::Unavailable(reason))
    }

    pub(crate) fn words(&self, error: &RedisError) -> String {
        crate::connect::in_words(&self.address, error).to_string()
    }

    /// Closes the link if it still is that of `serial`, and has the monitor look.
    pub(crate) fn failed(&self, serial: u64, reason: &str) {
        {
            let mut link = self.link.write();
            if link.serial != serial {
                return;
            }
            if link.open {
                tracing::warn!(reason, "Redis is away: last values are not told, and follow later");
                metrics::counter!("fieldline_redis_outages_total").increment(1);
            }
            link.open = false;
            link.reason = reason.into();
            // The monitor looks at the shared one only.
            link.local.clear();
        }
        self.wake.notify_one();
    }

    /// What the server holds is not what was believed: nothing is until the monitor has looked.
    pub(crate) fn doubted(&self, serial: u64) -> StateError {
        let reason = "Redis lost its memory; last values are read from history";
        let mut link = self.link.write();
        if link.serial == serial {
            link.generation = None;
            link.settled = None;
            link.reason = reason.into();
            self.wake.notify_one();
        }
        StateError::Unavailable(reason.to_owned())
    }

    /// Keeps messages for later; they were not written, or it is not known.
    pub(crate) fn keep(&self, messages: &[Stored], serial: Option<u64>, reason: &str) {
        let mut waiting = self.waiting.lock();
        waiting.keep(messages, self.config.waiting_bytes_max);
        if let Some(serial) = serial {
            self.failed(serial, reason);
        }
    }

    /// The commands that write `values` of one device; `generation` as in the script. The places
    /// that each answers with are of its own part.
    pub(crate) fn write_device<'a>(
        &self,
        (account, device): (AccountId, DeviceId),
        seen: Timestamp,
        generation: &str,
        values: &'a [(&ParamName, Version, &Value)],
    ) -> impl Iterator<Item = Cmd> + use<'a, '_> {
        let key = self.keys.device(account, device);
        // One call at least: that a message came counts, whatever it says.
        let last = values.len().div_ceil(VALUES_MAX).max(1) - 1;
        let generation = generation.to_owned();
        (0..=last).map(move |at| {
            let rest = values.get(at * VALUES_MAX..).unwrap_or_default();
            let part = rest.get(..VALUES_MAX).unwrap_or(rest);
            let mut cmd = script(&self.scripts.apply, &[&key, &self.keys.marker]);
            // Whole only with its last part.
            cmd.arg(if at == last { generation.as_str() } else { "-" });
            cmd.arg(&time_bytes(seen)[..]).arg(DEVICE_BYTES_MAX).arg(PARAMS_MAX);
            for (name, version, value) in part {
                let cost = cost(name, value);
                cmd.arg(name.as_str()).arg(record(*version, cost, DEVICE_BYTES_MAX, value));
            }
            cmd
        })
    }

    /// The command that tells of a connection, or of its end.
    pub(crate) fn tell(
        &self,
        account: AccountId,
        device: DeviceId,
        held: &crate::waiting::Held,
    ) -> Cmd {
        let key = self.keys.presence(account, device);
        let epoch = crate::scripts::digits(held.epoch);
        match held.ended_at {
            Some(at) => {
                let mut cmd = script(&self.scripts.disconnected, &[&key]);
                cmd.arg(&held.connection.as_bytes()[..]).arg(epoch).arg(at.as_micros());
                cmd
            }
            None => {
                let mut cmd = script(&self.scripts.connected, &[&key]);
                cmd.arg(&held.connection.as_bytes()[..]).arg(epoch).arg(&self.node);
                cmd.arg(&self.incarnation).arg(&held.peer).arg(held.at.as_micros());
                cmd
            }
        }
    }

    /// The command that sets a value of a module's status.
    pub(crate) fn set_status(
        &self,
        account: AccountId,
        key: &str,
        epoch: u64,
        name: &str,
        value: &Value,
    ) -> Cmd {
        use fieldline_contracts::status::{STATUS_BYTES_MAX, status_cost};
        let keys = &self.keys;
        let names = [
            &keys.status(account, key),
            &keys.status_keys(account),
            &keys.version,
            &keys.channel(account),
        ];
        let mut content = Vec::with_capacity(16);
        crate::encoding::put_value(&mut content, value);
        let mut cmd = script(&self.scripts.status_set, &names.map(String::as_str));
        cmd.arg(crate::scripts::digits(epoch)).arg(key).arg(name).arg(status_cost(name, value));
        cmd.arg(content).arg(STATUS_BYTES_MAX).arg(STATUS_KEYS_MAX);
        cmd
    }
}

/// A call of a loaded script.
pub(crate) fn script(script: &Script, keys: &[&str]) -> Cmd {
    let mut cmd = redis::cmd("EVALSHA");
    cmd.arg(script.get_hash()).arg(keys.len());
    for key in keys {
        cmd.arg(*key);
    }
    cmd
}

/// Several commands as one pipeline.
pub(crate) fn pipeline(cmds: impl IntoIterator<Item = Cmd>) -> Pipeline {
    let mut pipeline = redis::pipe();
    for cmd in cmds {
        pipeline.add_command(cmd);
    }
    pipeline
}

/// The values that messages of one device leave: of each parameter the newest, of equally new ones
/// the later.
pub(crate) struct DeviceValues<'a> {
    pub(crate) account: AccountId,
    pub(crate) device: DeviceId,
    pub(crate) seen: Timestamp,
    pub(crate) values: Vec<(&'a ParamName, Version, &'a Value)>,
}

/// Gathers messages by device; other series are passed over.
pub(crate) fn by_device(messages: &[Stored]) -> Vec<DeviceValues<'_>> {
    let mut devices: Vec<DeviceValues<'_>> = Vec::new();
    let mut places: HashMap<(AccountId, DeviceId), usize> = HashMap::new();
    for message in messages.iter().filter(|m| m.series().kind == SeriesKind::Message) {
        let (account, device) = (message.series().account, DeviceId(message.series().object));
        let at = *places.entry((account, device)).or_insert_with(|| {
            devices.push(DeviceValues {
                account,
                device,
                seen: Timestamp::MIN,
                values: Vec::new(),
            });
            devices.len() - 1
        });
        let Some(of) = devices.get_mut(at) else { continue };
        of.seen = of.seen.max(message.received());
        let version = Version { timestamp: message.timestamp(), seq: message.cursor().seq };
        of.values.extend(message.params().iter().map(|(name, value)| (name, version, value)));
    }
    for of in &mut devices {
        // Stable: of equally new ones the later stays behind the earlier, and is the one kept.
        of.values.sort_by(|a, b| a.0.cmp(b.0).then(a.1.cmp(&b.1)));
        let mut newest: Vec<(&ParamName, Version, &Value)> = Vec::with_capacity(of.values.len());
        for value in of.values.drain(..) {
            match newest.last_mut() {
                Some(last) if last.0 == value.0 => *last = value,
                _ => newest.push(value),
            }
        }
        of.values = newest;
    }
    devices
}
