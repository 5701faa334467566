//! Last values from history, when Redis lost its memory or may have missed something.
//!
//! One node does it, under a lock that expires. To fill anew, every device is removed first, so
//! that nothing old can stay, and the marker by which reads know that all is there is set at the
//! end, if nothing was lost meanwhile. Every step that could do harm asks for the lock: a node that
//! was stopped in the midst and wakes up later changes nothing. Messages that come meanwhile are
//! applied as ever; which of two values is newer does not depend on the order they are written in.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fieldline_contracts::HistoryError;
use fieldline_model::{AccountId, DeviceId, ParamName, Series, SeriesKind, Timestamp, Value};
use redis::aio::MultiplexedConnection;
use redis::{Cmd, PushInfo};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::connect::connect;
use crate::encoding::{FORMAT, Version};
use crate::inner::{BULK_TIMEOUT, Inner, pipeline, script};
use crate::monitor::within;

/// How long the lock outlives a node that does not renew it.
const LOCK_TTL: Duration = Duration::from_secs(10);
/// How soon another try is made after one that failed.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Values that are written at once.
const BATCH_VALUES: usize = 2_000;
/// Keys that are removed at once.
const WIPE_KEYS: usize = 500;

/// The last values of one device.
struct Restored {
    account: AccountId,
    device: DeviceId,
    values: Vec<(ParamName, Value, Timestamp)>,
}

/// What the name of a generation ends with that the process `run_id` holds in our format.
pub(crate) fn origin(run_id: &str) -> String {
    format!(":{FORMAT}:{run_id}")
}

/// Fills or mends if there is need and no other node does; has the monitor look afterwards.
pub(crate) async fn run(inner: Arc<Inner>) {
    match attempt(&inner).await {
        Ok(true) => {}
        // Another node does it: its marker is seen at one of the next looks.
        Ok(false) => tokio::time::sleep(RETRY_DELAY / 4).await,
        Err(reason) => {
            tracing::warn!(reason, "reading last values into Redis failed; it is tried again");
            tokio::time::sleep(RETRY_DELAY).await;
        }
    }
    inner.wake.notify_one();
}

struct Work<'a> {
    inner: &'a Inner,
    connection: MultiplexedConnection,
    token: String,
}

/// Returns false if there was nothing to do here.
async fn attempt(inner: &Arc<Inner>) -> Result<bool, String> {
    let nobody = None::<fn(PushInfo) -> Result<(), ()>>;
    let connected = connect(&inner.client, &inner.scripts, nobody).await;
    let connected = connected.map_err(|error| error.to_string())?;
    let token = format!("{:032x}", rand::random::<u128>());
    // At most 64 bytes: with a longer field Redis would keep every device in twice the memory.
    let generation = format!("{:016x}{}", rand::random::<u64>(), origin(&connected.run_id));
    let mut work = Work { inner, connection: connected.connection, token };
    let keys = &inner.keys;
    let names = [&keys.lock, &keys.marker, &keys.stale, &keys.mended, &keys.lost];
    let mut lock = script(&inner.scripts.lock, &names.map(String::as_str));
    lock.arg(&work.token).arg(LOCK_TTL_MS);
    let locked: Vec<String> = work.ask(lock).await?;
    let [todo, stale, lost] = locked.as_slice() else { return Ok(false) };
    let fill = todo == "fill";
    let began = Instant::now();
    tracing::info!(fill, "last values are being read from history into Redis");
    if fill {
        work.wipe().await?;
    }
    let devices = work.restore(if fill { &generation } else { "" }).await?;
    let names = [&keys.lock, &keys.marker, &keys.mended, &keys.lost];
    let mut finish = script(&inner.scripts.finish, &names.map(String::as_str));
    finish.arg(&work.token).arg(if fill { &generation } else { "" }).arg(stale).arg(lost);
    match work.ask::<String>(finish).await?.as_str() {
        "done" => {
            let took = began.elapsed();
            metrics::counter!("fieldline_redis_resyncs_total").increment(1);
            metrics::histogram!("fieldline_redis_resync_seconds").record(took);
            tracing::info!(fill, devices, ?took, "last values are in Redis again");
            Ok(true)
        }
        "again" => {
            tracing::info!("writes were lost meanwhile: last values are read from history again");
            Ok(true)
        }
        _ => Err("it took longer than the lock, which another node holds now".to_owned()),
    }
}

const LOCK_TTL_MS: u64 = 10_000;
const _: () = assert!(LOCK_TTL.as_secs() * 1_000 == LOCK_TTL_MS);

impl Work<'_> {
    async fn ask<T: redis::FromRedisValue>(&mut self, cmd: Cmd) -> Result<T, String> {
        within(self.inner, BULK_TIMEOUT, cmd.query_async(&mut self.connection)).await
    }

    /// Renews the lock and removes `keys`.
    fn guarded(&self, keys: &[String]) -> Cmd {
        let mut names = vec![self.inner.keys.lock.as_str()];
        names.extend(keys.iter().map(String::as_str));
        let mut cmd = script(&self.inner.scripts.wipe, &names);
        cmd.arg(&self.token).arg(LOCK_TTL_MS);
        cmd
    }

    fn still_ours(&self, answer: i64) -> Result<(), String> {
        match answer {
            1 => Ok(()),
            _ => Err("the lock is another node's by now".to_owned()),
        }
    }

    /// Removes all devices.
    async fn wipe(&mut self) -> Result<(), String> {
        let mut cursor = 0_u64;
        loop {
            let mut scan = redis::cmd("SCAN");
            scan.arg(cursor)
                .arg("MATCH")
                .arg(self.inner.keys.devices())
                .arg("COUNT")
                .arg(WIPE_KEYS);
            let (next, keys): (u64, Vec<String>) = self.ask(scan).await?;
            let answer = self.ask(self.guarded(&keys)).await?;
            self.still_ours(answer)?;
            if next == 0 {
                return Ok(());
            }
            cursor = next;
        }
    }

    /// Writes what history has; returns the count of devices.
    async fn restore(&mut self, generation: &str) -> Result<u64, String> {
        let (sender, mut receiver) = mpsc::channel::<Restored>(256);
        let history = Arc::clone(&self.inner.history);
        // On a thread that may wait: history gives values away without awaiting anybody.
        let handle = Handle::current();
        let reading = tokio::task::spawn_blocking(move || {
            let mut gather = Gather { sender, present: None };
            let read = handle.block_on(history.last_values(&mut |series, name, value, at| {
                gather.value(series, name, value, at);
            }));
            gather.flush();
            read
        });
        let mut devices = 0_u64;
        loop {
            let mut batch = Vec::new();
            let mut values = 0;
            let first = tokio::time::timeout(LOCK_TTL / 4, receiver.recv()).await;
            let mut next = match first {
                Ok(None) => break,
                Ok(Some(first)) => Some(first),
                Err(_) => None,
            };
            while let Some(device) = next.take() {
                values += device.values.len();
                batch.push(device);
                if values < BATCH_VALUES {
                    next = receiver.try_recv().ok();
                }
            }
            devices += batch.len() as u64;
            self.write(&batch, generation).await?;
        }
        let read: Result<(), HistoryError> = reading.await.map_err(|error| error.to_string())?;
        read.map_err(|error| format!("last values cannot be read from history: {error}"))?;
        Ok(devices)
    }

    /// Writes a batch, which may be empty, and renews the lock.
    async fn write(&mut self, batch: &[Restored], generation: &str) -> Result<(), String> {
        let mut cmds = vec![self.guarded(&[])];
        for of in batch {
            let seen = of.values.iter().map(|(_, _, at)| *at).max().unwrap_or(Timestamp::MIN);
            let version = |at: Timestamp| Version { timestamp: at, seq: 0 };
            let values: Vec<_> = of.values.iter().map(|(n, v, at)| (n, version(*at), v)).collect();
            let device = (of.account, of.device);
            cmds.extend(self.inner.write_device(device, seen, generation, &values));
        }
        let pipeline = pipeline(cmds);
        let call = pipeline.query_async(&mut self.connection);
        let answers: Vec<redis::Value> = within(self.inner, BULK_TIMEOUT, call).await?;
        let ours = matches!(answers.first(), Some(redis::Value::Int(1)));
        self.still_ours(i64::from(ours))
    }
}

/// Gathers the values of one series, which come together, and hands them on.
struct Gather {
    sender: mpsc::Sender<Restored>,
    present: Option<Restored>,
}

impl Gather {
    fn value(&mut self, series: Series, name: &ParamName, value: &Value, at: Timestamp) {
        if series.kind != SeriesKind::Message || self.sender.is_closed() {
            return;
        }
        let (account, device) = (series.account, DeviceId(series.object));
        let same = |p: &Restored| p.account == account && p.device == device;
        if !self.present.as_ref().is_some_and(same) {
            self.flush();
        }
        let new = || Restored { account, device, values: Vec::new() };
        self.present.get_or_insert_with(new).values.push((name.clone(), value.clone(), at));
    }

    /// Waits while the other side is behind: what is read is not to gather in memory.
    fn flush(&mut self) {
        let Some(mut device) = self.present.take() else { return };
        while let Err(TrySendError::Full(back)) = self.sender.try_send(device) {
            device = back;
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use fieldline_testkit::servers::Redis;
    use redis::aio::MultiplexedConnection;

    use super::*;
    use crate::keys::Keys;
    use crate::scripts::Scripts;

    struct World {
        _redis: Redis,
        keys: Keys,
        scripts: Scripts,
        connection: MultiplexedConnection,
    }

    impl World {
        async fn new() -> Self {
            let redis = Redis::start();
            let client = redis::Client::open(redis.url()).unwrap();
            let mut connection = client.get_multiplexed_async_connection().await.unwrap();
            let scripts = Scripts::new();
            for script in scripts.all() {
                script.load_async(&mut connection).await.unwrap();
            }
            Self { _redis: redis, keys: Keys::new("test"), scripts, connection }
        }

        async fn lock(&mut self, token: &str) -> Vec<String> {
            let k = &self.keys;
            let names = [&k.lock, &k.marker, &k.stale, &k.mended, &k.lost];
            let mut cmd = script(&self.scripts.lock, &names.map(String::as_str));
            cmd.arg(token).arg(LOCK_TTL_MS);
            cmd.query_async(&mut self.connection).await.unwrap()
        }

        async fn wipe(&mut self, token: &str, keys: &[&str]) -> i64 {
            let mut names = vec![self.keys.lock.as_str()];
            names.extend(keys);
            let mut cmd = script(&self.scripts.wipe, &names);
            cmd.arg(token).arg(LOCK_TTL_MS);
            cmd.query_async(&mut self.connection).await.unwrap()
        }

        async fn finish(&mut self, token: &str, lost: &str) -> String {
            let k = &self.keys;
            let names = [&k.lock, &k.marker, &k.mended, &k.lost];
            let mut cmd = script(&self.scripts.finish, &names.map(String::as_str));
            cmd.arg(token).arg(format!("of-{token}")).arg("0").arg(lost);
            cmd.query_async(&mut self.connection).await.unwrap()
        }

        async fn run(&mut self, command: &[&str]) -> Option<String> {
            let mut cmd = redis::cmd(command[0]);
            command[1..].iter().for_each(|arg| _ = cmd.arg(*arg));
            cmd.query_async(&mut self.connection).await.unwrap()
        }
    }

    /// One that was stopped in the midst and wakes when another has taken over removes nothing and
    /// sets no marker.
    #[tokio::test]
    async fn who_lost_the_lock_changes_nothing() {
        let mut world = World::new().await;
        assert_eq!(world.lock("a").await, ["fill", "0", "0"]);
        assert_eq!(world.lock("b").await, ["held"]);
        assert_eq!(world.wipe("a", &["device"]).await, 1);
        // Its time has run out while it was stopped.
        world.run(&["DEL", "test:lock"]).await;
        assert_eq!(world.lock("b").await, ["fill", "0", "0"]);
        world.run(&["SET", "device", "as b restored it"]).await;
        assert_eq!(world.wipe("a", &["device"]).await, 0);
        assert_eq!(world.finish("a", "0").await, "lock");
        assert!(world.run(&["GET", "device"]).await.is_some());
        assert_eq!(world.run(&["GET", "test:marker"]).await, None);
        assert_eq!(world.finish("b", "0").await, "done");
        assert_eq!(world.run(&["GET", "test:marker"]).await.as_deref(), Some("of-b"));
        assert_eq!(world.lock("a").await, ["none"], "all is there");
    }

    /// What was lost after the filling began may be missing in it: it is no whole one.
    #[tokio::test]
    async fn a_loss_in_the_midst_is_not_covered_up() {
        let mut world = World::new().await;
        assert_eq!(world.lock("a").await, ["fill", "0", "0"]);
        let cmd = script(&world.scripts.lost, &[&world.keys.marker, &world.keys.lost]);
        let _marker: i64 = cmd.query_async(&mut world.connection).await.unwrap();
        assert_eq!(world.finish("a", "0").await, "again");
        assert_eq!(world.run(&["GET", "test:marker"]).await, None);
        assert_eq!(world.lock("a").await, ["fill", "0", "1"]);
        assert_eq!(world.finish("a", "1").await, "done");
    }
}
