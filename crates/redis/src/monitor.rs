//! The one task that connects, looks, mends and opens the link again.
//!
//! It speaks up for this node, notices when the server is another one or lost its memory, has last
//! values read from history then, tells what waited, and keeps the copies that watchers look at.

use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::Status;
use fieldline_model::AccountId;
use redis::aio::MultiplexedConnection;
use redis::{Cmd, FromRedisValue, PushInfo, PushKind, RedisResult};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::connect::connect;
use crate::inner::{BULK_TIMEOUT, Inner, Mirror, by_device, pipeline, script};
use crate::status::{Told, read_message, read_status};

/// Longest that a look may wait for one answer.
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);
/// How soon a look that failed, or was asked for, is done again.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// Messages, connections or statuses that are told at once.
const CHUNK: usize = 256;

pub(crate) struct Monitor {
    inner: Arc<Inner>,
    /// A connection of its own, so that what is urgent does not wait behind what is much.
    control: Option<MultiplexedConnection>,
    run_id: String,
    /// The memory that everything of this node is to be told to.
    telling: Option<Arc<[u8]>>,
    /// The memory that has been told everything of this node.
    told: Option<Arc<[u8]>>,
    /// The memory that was told everything of every node.
    settled: Option<Arc<[u8]>>,
    resync: Option<AbortOnDropHandle<()>>,
    /// When the server last heard that this node lives.
    beat_at: Instant,
}

/// What a look finds: the server's time in milliseconds, when its memory began, the marker, the
/// nodes that ended without a word, those of them that were mended for, whether a node is filling
/// or mending, and how many others have yet to tell what is theirs.
type Beat = (u64, Vec<u8>, Option<Vec<u8>>, u64, u64, bool, u64);

/// Something did not work, in words.
type Failed = String;

impl Monitor {
    pub(crate) fn new(inner: Arc<Inner>) -> Self {
        Self {
            inner,
            control: None,
            run_id: String::new(),
            telling: None,
            told: None,
            settled: None,
            resync: None,
            beat_at: Instant::now(),
        }
    }

    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let beat = self.inner.config.node_ttl / 5;
        let mut retry = RETRY_MIN;
        loop {
            let looked = tokio::select! {
                () = stop.cancelled() => break,
                looked = self.look() => looked,
            };
            self.inner.looked.send_replace(());
            let wait = match looked {
                Ok(()) => {
                    retry = RETRY_MIN;
                    beat
                }
                Err(reason) => {
                    let serial = self.inner.link.read().serial;
                    self.inner.failed(serial, &reason);
                    self.control = None;
                    retry = (retry * 2).min(RETRY_MAX);
                    retry
                }
            };
            let until = Instant::now() + wait;
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep_until(until) => {}
                // Not again and again without a pause, whoever asks.
                () = self.inner.wake.notified() => tokio::time::sleep(RETRY_MIN.min(wait)).await,
            }
        }
        self.resync = None;
        self.leave().await;
    }

    /// Looks once, and does what is to be done.
    pub(crate) async fn look(&mut self) -> Result<(), Failed> {
        let inner = Arc::clone(&self.inner);
        let (serial, was_open) = self.connected().await?;
        let (now_ms, since, marker, stale, mended, locked, untold) = self.beat().await?;
        let since: Arc<[u8]> = since.into();
        let marker = self.trusted(marker).await?;
        self.sound(was_open).await?;
        if self.telling.as_ref() != Some(&since) {
            // Another memory, or our first look: all that is this node's is told again.
            inner.link.write().settled = None;
            inner.held.lock().forget_told();
            self.telling = Some(Arc::clone(&since));
        }
        let all_told = self.told.as_ref() == Some(&since);
        if !all_told {
            self.tell_statuses().await?;
        }
        self.tell_connections().await?;
        if !all_told {
            self.told = Some(Arc::clone(&since));
            // The others wait to hear of it.
            inner.wake.notify_one();
        }
        // From here on what comes is kept again: as soon as this is told, history may be read before that.
        let losses = inner.waiting.lock().begin_to_tell();
        let marker = if let Some(losses) = losses {
            self.ask::<i64>(script(&inner.scripts.lost, &[&inner.keys.marker, &inner.keys.lost]))
                .await?;
            inner.waiting.lock().told(losses);
            tracing::warn!("too much waited for Redis: all last values are read from history");
            None
        } else {
            marker
        };
        self.tell_waiting().await?;
        let age_ms = now_ms.saturating_sub(began_ms(&since));
        // By then every node that lives has spoken up, and those that did have told all.
        let old_enough = u128::from(age_ms) >= inner.config.node_ttl.as_millis();
        if old_enough && untold == 0 {
            self.settled = Some(Arc::clone(&since));
        }
        // A node that joins later has nothing that this memory could have lost.
        let settled = self.settled.as_ref() == Some(&since);
        self.open(serial, marker.as_deref(), settled.then_some(&since));
        if (marker.is_none() || stale != mended) && !locked {
            self.start_resync();
        }
        if settled {
            self.follow(serial, &since).await?;
        }
        if !settled {
            // Looked at again when it is time, or soon.
            let left = inner.config.node_ttl.saturating_sub(Duration::from_millis(age_ms));
            let (inner, left) = (Arc::downgrade(&inner), left + RETRY_MIN);
            tokio::spawn(async move {
                tokio::time::sleep(left).await;
                if let Some(inner) = inner.upgrade() {
                    inner.wake.notify_one();
                }
            });
        }
        Ok(())
    }

    /// Sees to both connections. Returns the number of the link's, and whether it is open.
    async fn connected(&mut self) -> Result<(u64, bool), Failed> {
        let inner = Arc::clone(&self.inner);
        {
            let link = inner.link.read();
            if self.control.is_some() && link.connection.is_some() {
                return Ok((link.serial, link.open));
            }
        }
        self.control = None;
        let serial = {
            let mut link = inner.link.write();
            link.connection = None;
            link.local.clear();
            link.open = false;
            link.generation = None;
            link.serial += 1;
            link.serial
        };
        let nobody = None::<fn(PushInfo) -> Result<(), ()>>;
        let control = connect(&inner.client, &inner.scripts, nobody);
        let control = control.await.map_err(|error| error.to_string())?;
        let weak = Arc::downgrade(&inner);
        let push = move |info: PushInfo| -> Result<(), ()> {
            let inner = weak.upgrade().ok_or(())?;
            pushed(&inner, serial, &info);
            Ok(())
        };
        let data = connect(&inner.client, &inner.scripts, Some(push)).await;
        let data = data.map_err(|error| error.to_string())?;
        if control.run_id != data.run_id {
            let address = &inner.address;
            return Err(format!("two connections to {address} led to two servers: look again"));
        }
        if self.run_id != data.run_id {
            // Its versions may be below those of the one before: none is compared with them.
            inner.mirrors.read().values().for_each(|mirror| mirror.table.forget());
            self.run_id = data.run_id;
        }
        self.control = Some(control.connection);
        let mut link = inner.link.write();
        link.connection = Some(data.connection);
        link.home = Some(std::thread::current().id());
        link.run_id.clone_from(&self.run_id);
        Ok((serial, false))
    }

    /// Asks by the monitor's own connection.
    async fn ask<T: FromRedisValue>(&mut self, cmd: Cmd) -> Result<T, Failed> {
        let Some(control) = &mut self.control else { return Err("there is no connection".into()) };
        within(&self.inner, LOOK_TIMEOUT, cmd.query_async(control)).await
    }

    async fn beat(&mut self) -> Result<Beat, Failed> {
        let inner = Arc::clone(&self.inner);
        let keys = &inner.keys;
        let node = format!("{}{}", keys.node, inner.node);
        let names = [
            &node,
            &keys.nodes,
            &keys.since,
            &keys.marker,
            &keys.stale,
            &keys.mended,
            &keys.lock,
            &keys.version,
        ];
        let mut cmd = script(&inner.scripts.beat, &names.map(String::as_str));
        cmd.arg(&inner.node).arg(&inner.incarnation).arg(self.ttl_ms());
        cmd.arg(&keys.node).arg(self.told.as_deref().unwrap_or_default()).arg(&self.run_id);
        self.beat_at = Instant::now();
        self.ask(cmd).await
    }

    fn ttl_ms(&self) -> u64 {
        u64::try_from(self.inner.config.node_ttl.as_millis()).unwrap_or(u64::MAX)
    }

    /// Says that this node lives, in the midst of what may take longer than it counts as alive.
    async fn still_here(&mut self) -> Result<(), Failed> {
        if self.beat_at.elapsed() < self.inner.config.node_ttl / 5 {
            return Ok(());
        }
        self.beat_at = Instant::now();
        let mut cmd = redis::cmd("SET");
        cmd.arg(format!("{}{}", self.inner.keys.node, self.inner.node));
        cmd.arg(&self.inner.incarnation).arg("PX").arg(self.ttl_ms());
        self.ask(cmd).await
    }

    /// The marker, if the server that answers is the one that it was set on, in our format. One that
    /// was restarted or took over may have older values than were written.
    async fn trusted(&mut self, marker: Option<Vec<u8>>) -> Result<Option<Vec<u8>>, Failed> {
        let Some(marker) = marker else { return Ok(None) };
        if marker.ends_with(crate::resync::origin(&self.run_id).as_bytes()) {
            return Ok(Some(marker));
        }
        tracing::info!(
            "Redis is another process than before, or another version of Fieldline filled it: last values are read from history"
        );
        let mut cmd = script(&self.inner.scripts.distrust, &[&self.inner.keys.marker]);
        cmd.arg(marker);
        self.ask::<i64>(cmd).await?;
        Ok(None)
    }

    /// Whether the link's connection answers, also while nobody uses it; after a failure, whether
    /// it has the scripts as well.
    async fn sound(&self, was_open: bool) -> Result<(), Failed> {
        let Some(mut connection) = self.inner.link.read().connection.clone() else {
            return Err("there is no connection".into());
        };
        if !was_open {
            for script in self.inner.scripts.all() {
                within(&self.inner, LOOK_TIMEOUT, script.load_async(&mut connection)).await?;
            }
        }
        let ping = redis::cmd("PING");
        let _pong: redis::Value =
            within(&self.inner, LOOK_TIMEOUT, ping.query_async(&mut connection)).await?;
        Ok(())
    }

    /// Runs commands by the monitor's connection.
    async fn tell<T: FromRedisValue>(&mut self, cmds: Vec<Cmd>) -> Result<Vec<T>, Failed> {
        let Some(control) = &mut self.control else { return Err("there is no connection".into()) };
        let pipeline = pipeline(cmds);
        within(&self.inner, BULK_TIMEOUT, pipeline.query_async(control)).await
    }

    async fn tell_connections(&mut self) -> Result<(), Failed> {
        let inner = Arc::clone(&self.inner);
        loop {
            self.still_here().await?;
            let untold = inner.held.lock().untold(CHUNK);
            if untold.is_empty() {
                return Ok(());
            }
            let cmds =
                untold.iter().map(|(account, device, held)| inner.tell(*account, *device, held));
            let answers: Vec<i64> = self.tell(cmds.collect()).await?;
            let mut all = inner.held.lock();
            for ((account, device, held), counts) in untold.iter().zip(answers) {
                match counts {
                    0 => all.remove(*account, *device, held.epoch),
                    _ => all.told(*account, *device, held),
                }
            }
        }
    }

    async fn tell_statuses(&mut self) -> Result<(), Failed> {
        let inner = Arc::clone(&self.inner);
        let keys: Vec<(AccountId, String)> = inner.statuses.lock().keys().cloned().collect();
        for (account, key) in keys {
            self.still_here().await?;
            let Some(own) = inner.statuses.lock().get(&(account, key.clone())).cloned() else {
                continue;
            };
            let set = |(name, value): (&String, _)| {
                inner.set_status(account, &key, own.epoch, name, value)
            };
            let cmds: Vec<Cmd> = own.values.iter().map(set).collect();
            let answers: Vec<Vec<String>> = self.tell(cmds).await?;
            let superseded =
                |answer: &Vec<String>| answer.first().is_some_and(|a| a == "superseded");
            if answers.iter().any(superseded) {
                inner.statuses.lock().remove(&(account, key));
            }
        }
        Ok(())
    }

    /// Writes what waited.
    async fn tell_waiting(&mut self) -> Result<(), Failed> {
        let inner = Arc::clone(&self.inner);
        let forgotten = inner.waiting.lock().take_forgotten();
        for chunk in forgotten.chunks(CHUNK) {
            // An error says it of what follows as well.
            self.still_here().await.unwrap_or_default();
            let cmds = chunk.iter().map(|(account, device)| inner.forget(*account, *device));
            if let Err(failed) = self.tell::<i64>(cmds.collect()).await {
                inner.waiting.lock().put_back_forgotten(forgotten);
                return Err(failed);
            }
        }
        loop {
            self.still_here().await?;
            let oldest = inner.waiting.lock().oldest(CHUNK);
            if oldest.is_empty() {
                return Ok(());
            }
            let devices = by_device(&oldest);
            let cmds = devices.iter().flat_map(|of| {
                inner.write_device((of.account, of.device), of.seen, "", &of.values)
            });
            self.tell::<Vec<i64>>(cmds.collect()).await?;
            inner.waiting.lock().written(oldest.len());
        }
    }

    /// Lets calls through, unless something has come to wait meanwhile.
    fn open(&self, serial: u64, marker: Option<&[u8]>, settled: Option<&Arc<[u8]>>) {
        // Held until the link is open: who finds it closed under this lock is heard next time.
        let waiting = self.inner.waiting.lock();
        let told = waiting.is_empty() && self.inner.held.lock().is_told();
        if !told {
            self.inner.wake.notify_one();
            return;
        }
        let mut link = self.inner.link.write();
        if link.serial != serial || link.connection.is_none() {
            return;
        }
        if !link.open {
            tracing::info!(address = self.inner.address, "Redis answers");
        }
        link.open = true;
        link.settled = settled.cloned();
        match marker {
            Some(marker) if link.generation.as_deref() == Some(marker) => {}
            Some(marker) => link.generation = Some(marker.into()),
            None => {
                link.generation = None;
                link.reason = "last values are being read from history into Redis".into();
            }
        }
    }

    fn start_resync(&mut self) {
        if self.resync.as_ref().is_some_and(|running| !running.is_finished()) {
            return;
        }
        let resync = tokio::spawn(crate::resync::run(Arc::clone(&self.inner)));
        self.resync = Some(AbortOnDropHandle::new(resync));
    }

    /// Sees that all copies follow, and that those nobody looks at are let go of.
    async fn follow(&mut self, serial: u64, since: &Arc<[u8]>) -> Result<(), Failed> {
        let inner = Arc::clone(&self.inner);
        let mut left = Vec::new();
        inner.mirrors.write().retain(|account, mirror| {
            let watched = mirror.table.watchers() > 0;
            if !watched {
                left.push(*account);
            }
            watched
        });
        let Some(mut connection) = inner.link.read().connection.clone() else { return Ok(()) };
        for account in left {
            let unsubscribed = connection.unsubscribe(inner.keys.channel(account));
            within(&inner, LOOK_TIMEOUT, unsubscribed).await?;
        }
        let here = (serial, Arc::clone(since));
        let behind: Vec<(AccountId, bool)> = {
            let mirrors = inner.mirrors.read();
            let behind = mirrors.iter().filter(|(_, mirror)| mirror.read.as_ref() != Some(&here));
            behind.map(|(a, mirror)| (*a, mirror.subscribed == Some(serial))).collect()
        };
        for (account, subscribed) in behind {
            if !subscribed {
                let subscribing = connection.subscribe(inner.keys.channel(account));
                within(&inner, LOOK_TIMEOUT, subscribing).await?;
            }
            self.still_here().await?;
            // Read after the subscription stands, so that nothing falls between.
            let (version, all) = self.read_statuses(account).await?;
            if let Some(mirror) = inner.mirrors.write().get_mut(&account) {
                mirror.table.resync(version, all);
                mirror.subscribed = Some(serial);
                mirror.read = Some(here.clone());
            }
        }
        Ok(())
    }

    /// Everything that an account's modules say, and the version that was the newest before.
    async fn read_statuses(
        &mut self,
        account: AccountId,
    ) -> Result<(u64, Vec<(Arc<str>, Status)>), Failed> {
        let inner = Arc::clone(&self.inner);
        let mut version = redis::cmd("GET");
        version.arg(&inner.keys.version);
        let version: Option<u64> = self.ask(version).await?;
        let mut names = redis::cmd("SMEMBERS");
        names.arg(inner.keys.status_keys(account));
        let names: Vec<String> = self.ask(names).await?;
        let mut all = Vec::with_capacity(names.len());
        for chunk in names.chunks(CHUNK) {
            self.still_here().await?;
            let get = |key: &String| {
                let mut cmd = redis::cmd("HGETALL");
                cmd.arg(inner.keys.status(account, key));
                cmd
            };
            let found: Vec<Vec<(Vec<u8>, Vec<u8>)>> =
                self.tell(chunk.iter().map(get).collect()).await?;
            all.extend(
                chunk
                    .iter()
                    .zip(found)
                    .map(|(key, fields)| (Arc::from(key.as_str()), read_status(fields))),
            );
        }
        Ok((version.unwrap_or(0), all))
    }

    /// Tells what waits, if it can be told soon, and that this node ends.
    async fn leave(&mut self) {
        let told = async {
            self.tell_connections().await?;
            self.tell_waiting().await
        };
        // Not told in order, it is noticed by others, and last values are read from history.
        let told: Result<(), Failed> = told.await;
        if let Err(reason) = told {
            tracing::warn!(reason, "what waited for Redis is left to be read from history");
            return;
        }
        if self.inner.waiting.lock().overflowed() {
            return;
        }
        let inner = Arc::clone(&self.inner);
        let node = format!("{}{}", inner.keys.node, inner.node);
        let mut cmd = script(&inner.scripts.leave, &[&node, &inner.keys.nodes]);
        cmd.arg(&inner.node).arg(&inner.incarnation);
        if let Err(reason) = self.ask::<i64>(cmd).await {
            tracing::warn!(reason, "Redis was not told that this node ends");
        }
    }
}

/// Waits for an answer of the background.
pub(crate) async fn within<T>(
    inner: &Inner,
    limit: Duration,
    call: impl Future<Output = RedisResult<T>>,
) -> Result<T, String> {
    match timeout(limit, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(inner.words(&error)),
        Err(_) => Err(format!("Redis at {} did not answer within {limit:?}", inner.address)),
    }
}

/// When a memory began, by its name.
fn began_ms(since: &[u8]) -> u64 {
    let digits = since.split(|byte| *byte == b':').next().unwrap_or_default();
    std::str::from_utf8(digits).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Takes in what the server says of itself. Runs on the connection's own task: nothing queues.
fn pushed(inner: &Inner, serial: u64, info: &PushInfo) {
    match info.kind {
        PushKind::Message => {
            let [redis::Value::BulkString(channel), redis::Value::BulkString(payload)] =
                info.data.as_slice()
            else {
                return;
            };
            let Some(account) = inner.keys.account_of(channel) else { return };
            let mirrors = inner.mirrors.read();
            let Some(Mirror { table, .. }) = mirrors.get(&account) else { return };
            match read_message(payload) {
                Some(Told::Set { key, name, value }) => table.learn(&key, &name, value),
                Some(Told::End { key, epoch, version }) => table.learn_end(&key, epoch, version),
                None => tracing::warn!("a message about a status cannot be read"),
            }
        }
        PushKind::Disconnection => {
            {
                let mut link = inner.link.write();
                if link.serial != serial {
                    return;
                }
                link.connection = None;
            }
            let address = &inner.address;
            inner.failed(serial, &format!("Redis at {address} closed the connection"));
        }
        _ => {}
    }
}
