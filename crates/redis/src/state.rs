//! The contract, call by call.

use std::sync::Arc;

use async_trait::async_trait;
use fieldline_contracts::status::{STATUS_BYTES_MAX, STATUS_KEYS_MAX};
use fieldline_contracts::status::{check_status_bytes, check_status_keys, check_status_name};
use fieldline_contracts::{
    Changes, LastValue, LastValues, LostSession, Presence, State, StateError, Status, StatusFilter,
    StatusTable, StatusWatch,
};
use fieldline_model::{AccountId, ConnectionId, DeviceId, ParamName, Stored, Timestamp, Value};
use redis::{Cmd, FromRedisValue, Value as Answer};

use crate::RedisState;
use crate::encoding::{read_record, read_time};
use crate::inner::{Inner, Mirror, OwnStatus, by_device, pipeline, script};
use crate::scripts::{END_MS, digits, field};
use crate::status::read_status;
use crate::waiting::Held;

/// Devices that are asked for in one pipeline.
const CHUNK: usize = 256;

/// What is read of one device: its values, and the generation that it is whole in.
type Read = (LastValues, Option<Vec<u8>>);

fn unreadable() -> StateError {
    StateError::Unavailable(
        "what Redis holds was not written by this version: look who else writes under the prefix"
            .to_owned(),
    )
}

fn bytes(answer: Answer) -> Result<Option<Vec<u8>>, StateError> {
    match answer {
        Answer::Nil => Ok(None),
        Answer::BulkString(bytes) => Ok(Some(bytes)),
        _ => Err(unreadable()),
    }
}

fn last_value(record: &[u8]) -> Result<LastValue, StateError> {
    let (value, timestamp) = read_record(record).ok_or_else(unreadable)?;
    Ok(LastValue { value, timestamp })
}

/// The answer of `HMGET` with `params` and the generation, or of `HGETALL` if there are none.
fn read_device(answer: Answer, params: &[ParamName]) -> Result<Read, StateError> {
    let mut values = LastValues::new();
    let mut generation = None;
    if params.is_empty() {
        let fields: Vec<(Vec<u8>, Vec<u8>)> =
            FromRedisValue::from_redis_value(answer).map_err(|_| unreadable())?;
        for (name, content) in fields {
            let name = String::from_utf8(name).map_err(|_| unreadable())?;
            if name == field::GENERATION {
                generation = Some(content);
            } else if !name.starts_with('\0') {
                let name = ParamName::new(name).map_err(|_| unreadable())?;
                values.insert(name, last_value(&content)?);
            }
        }
        return Ok((values, generation));
    }
    let Answer::Array(mut fields) = answer else { return Err(unreadable()) };
    generation = bytes(fields.pop().unwrap_or(Answer::Nil))?.or(generation);
    for (name, content) in params.iter().zip(fields) {
        if let Some(content) = bytes(content)? {
            values.insert(name.clone(), last_value(&content)?);
        }
    }
    Ok((values, generation))
}

fn read_presence(answer: Answer, since: &[u8]) -> Result<Option<Presence>, StateError> {
    let Answer::Array(fields) = answer else { return Err(unreadable()) };
    let fields = fields.into_iter().map(bytes).collect::<Result<Vec<_>, _>>()?;
    let get = |at: usize| fields.get(at).and_then(Option::as_deref);
    if get(0) != Some(since) {
        return Ok(None);
    }
    let text = |at| get(at).and_then(|bytes| std::str::from_utf8(bytes).ok());
    let connection: Option<[u8; 16]> = get(2).and_then(|bytes| bytes.try_into().ok());
    Ok(Some(Presence {
        connection: connection.map(ConnectionId::from_bytes),
        epoch: text(3).and_then(|text| text.parse().ok()).unwrap_or(0),
        node: text(4).map(ToOwned::to_owned),
        peer: text(5).map(ToOwned::to_owned),
        changed_at: text(6).and_then(|text| text.parse().ok()).map(Timestamp::from_micros),
        seen_at: get(1).and_then(read_time),
    }))
}

impl Inner {
    fn get_values(&self, account: AccountId, device: DeviceId, params: &[ParamName]) -> Cmd {
        let key = self.keys.device(account, device);
        let mut cmd = redis::cmd(if params.is_empty() { "HGETALL" } else { "HMGET" });
        cmd.arg(key);
        if !params.is_empty() {
            params.iter().for_each(|name| _ = cmd.arg(name.as_str()));
            cmd.arg(field::GENERATION);
        }
        cmd
    }

    fn get_marker(&self) -> Cmd {
        let mut cmd = redis::cmd("GET");
        cmd.arg(&self.keys.marker);
        cmd
    }

    pub(crate) fn forget(&self, account: AccountId, device: DeviceId) -> Cmd {
        let mut cmd = redis::cmd("UNLINK");
        cmd.arg(self.keys.device(account, device)).arg(self.keys.presence(account, device));
        cmd
    }

    /// Reads devices. What bears the present generation is the truth at once; else, and if there is
    /// nothing, the marker in the same answer must say that all is there.
    async fn read_devices(
        &self,
        account: AccountId,
        devices: &[DeviceId],
        params: &[ParamName],
    ) -> Result<Vec<LastValues>, StateError> {
        for _ in 0..3 {
            let (mut call, generation) = self.readable()?;
            let cmds = devices.iter().map(|device| self.get_values(account, *device, params));
            let pipeline = pipeline(cmds.chain([self.get_marker()]));
            let answers = self.answer(call.serial, pipeline.query_async(&mut call.connection));
            let mut answers: Vec<Answer> = answers.await?;
            let marker = bytes(answers.pop().unwrap_or(Answer::Nil))?;
            let Some(marker) = marker else { return Err(self.doubted(call.serial)) };
            if *marker != *generation {
                // Filled anew since we looked last: what was read before is of either.
                let mut link = self.link.write();
                if link.serial == call.serial && link.generation.is_some() {
                    link.generation = Some(marker.into());
                }
                continue;
            }
            let values = answers.into_iter().map(|answer| Ok(read_device(answer, params)?.0));
            return values.collect();
        }
        Err(StateError::Unavailable("Redis is filled anew again and again".to_owned()))
    }
}

#[async_trait]
impl State for RedisState {
    async fn apply(&self, messages: &[Stored]) -> Result<Changes, StateError> {
        let inner = &*self.inner;
        let devices = by_device(messages);
        if devices.is_empty() {
            return Ok(Vec::new());
        }
        let mut call = match inner.writable() {
            Ok(call) => call,
            Err(_) => {
                let mut waiting = inner.waiting.lock();
                // Opened meanwhile, nobody would come for what is kept now.
                match inner.writable() {
                    Ok(call) => call,
                    Err(error) => {
                        waiting.keep(messages, inner.config.waiting_bytes_max);
                        return Err(error);
                    }
                }
            }
        };
        let mut parts = Vec::with_capacity(devices.len());
        let mut cmds = Vec::with_capacity(devices.len());
        for of in &devices {
            let before = cmds.len();
            cmds.extend(inner.write_device((of.account, of.device), of.seen, "", &of.values));
            parts.push(cmds.len() - before);
        }
        let pipeline = pipeline(cmds);
        let written = pipeline.query_async::<Vec<Vec<usize>>>(&mut call.connection);
        let written = match inner.answer(call.serial, written).await {
            Ok(written) => written,
            Err(error) => {
                inner.keep(messages, Some(call.serial), &error.to_string());
                return Err(error);
            }
        };
        let mut written = written.into_iter();
        let mut changes = Vec::with_capacity(devices.len());
        for (of, parts) in devices.iter().zip(parts) {
            let mut names = Vec::new();
            for part in 0..parts {
                let base = part * crate::inner::VALUES_MAX;
                let places = written.next().unwrap_or_default();
                let name = |at: usize| Some(of.values.get(base + at)?.0.clone());
                names.extend(places.into_iter().filter_map(name));
            }
            if !names.is_empty() {
                changes.push((of.account, of.device, names));
            }
        }
        Ok(changes)
    }

    async fn get(&self, account: AccountId, device: DeviceId) -> Result<LastValues, StateError> {
        let inner = &*self.inner;
        let (mut call, generation) = inner.readable()?;
        let cmd = inner.get_values(account, device, &[]);
        let answer: Answer =
            inner.answer(call.serial, cmd.query_async(&mut call.connection)).await?;
        let (values, of) = read_device(answer, &[])?;
        if of.as_deref() == Some(&*generation) {
            return Ok(values);
        }
        let all = inner.read_devices(account, &[device], &[]).await?;
        Ok(all.into_iter().next().unwrap_or_default())
    }

    async fn value(
        &self,
        account: AccountId,
        device: DeviceId,
        param: &str,
    ) -> Result<Option<LastValue>, StateError> {
        let inner = &*self.inner;
        let (mut call, generation) = inner.readable()?;
        // Also keeps our own fields from being asked for.
        let Ok(name) = ParamName::new(param) else { return Ok(None) };
        let params = [name];
        let cmd = inner.get_values(account, device, &params);
        let answer = inner.answer(call.serial, cmd.query_async(&mut call.connection));
        let [record, of]: [Option<Vec<u8>>; 2] = answer.await?;
        if of.as_deref() == Some(&*generation) {
            return record.as_deref().map(last_value).transpose();
        }
        let all = inner.read_devices(account, &[device], &params).await?;
        Ok(all.into_iter().next().and_then(|mut values| values.remove(param)))
    }

    async fn get_many(
        &self,
        account: AccountId,
        devices: &[DeviceId],
        params: &[ParamName],
    ) -> Result<Vec<(DeviceId, LastValues)>, StateError> {
        let mut all = Vec::with_capacity(devices.len());
        for chunk in devices.chunks(CHUNK) {
            let values = self.inner.read_devices(account, chunk, params).await?;
            all.extend(chunk.iter().copied().zip(values));
        }
        Ok(all)
    }

    async fn connected(
        &self,
        account: AccountId,
        device: DeviceId,
        connection: ConnectionId,
        epoch: u64,
        peer: String,
        at: Timestamp,
    ) -> Result<bool, StateError> {
        let held = Held { connection, epoch, peer, at, ended_at: None, told: false };
        self.tell_of(account, device, held).await
    }

    async fn disconnected(
        &self,
        account: AccountId,
        device: DeviceId,
        connection: ConnectionId,
        epoch: u64,
        at: Timestamp,
    ) -> Result<bool, StateError> {
        let peer = String::new();
        let held = Held { connection, epoch, peer, at, ended_at: Some(at), told: false };
        self.tell_of(account, device, held).await
    }

    async fn lost_sessions(
        &self,
        cursor: u64,
    ) -> Result<(Vec<LostSession>, Option<u64>), StateError> {
        self.inner.lost_sessions(cursor).await
    }

    async fn mark_lost(
        &self,
        session: &LostSession,
        at: Timestamp,
    ) -> Result<Option<Timestamp>, StateError> {
        self.inner.mark_lost(session, at).await
    }

    async fn end_lost(&self, session: &LostSession, at: Timestamp) -> Result<bool, StateError> {
        self.inner.end_lost(session, at).await
    }

    async fn presence(&self, account: AccountId, device: DeviceId) -> Result<Presence, StateError> {
        let all = self.presence_many(account, &[device]).await?;
        Ok(all.into_iter().next().map(|(_, presence)| presence).unwrap_or_default())
    }

    async fn presence_many(
        &self,
        account: AccountId,
        devices: &[DeviceId],
    ) -> Result<Vec<(DeviceId, Presence)>, StateError> {
        let inner = &*self.inner;
        let keys = &inner.keys;
        let mut all = Vec::with_capacity(devices.len());
        for chunk in devices.chunks(CHUNK) {
            let (mut call, since) = inner.settled()?;
            let cmds = chunk.iter().map(|device| {
                let names =
                    [&keys.presence(account, *device), &keys.device(account, *device), &keys.since];
                let mut cmd = script(&inner.scripts.presence, &names.map(String::as_str));
                cmd.arg(&keys.node);
                cmd
            });
            let pipeline = pipeline(cmds);
            let answers = inner.answer(call.serial, pipeline.query_async(&mut call.connection));
            let answers: Vec<Answer> = answers.await?;
            for (device, answer) in chunk.iter().zip(answers) {
                match read_presence(answer, &since)? {
                    Some(presence) => all.push((*device, presence)),
                    None => return Err(inner.doubted(call.serial)),
                }
            }
        }
        Ok(all)
    }

    async fn forget(&self, account: AccountId, device: DeviceId) -> Result<(), StateError> {
        let inner = &*self.inner;
        let epoch = inner.held.lock().get(account, device).map(|held| held.epoch);
        if let Some(epoch) = epoch {
            inner.held.lock().remove(account, device, epoch);
        }
        let forgotten = async {
            let mut call = inner.writable()?;
            let cmd = inner.forget(account, device);
            inner.answer(call.serial, cmd.query_async::<i64>(&mut call.connection)).await
        };
        let forgotten = forgotten.await;
        if forgotten.is_err() {
            inner.waiting.lock().keep_forgotten(account, device);
            inner.wake.notify_one();
        }
        forgotten.map(|_| ())
    }

    async fn ticket(&self, floor: u64) -> Result<u64, StateError> {
        let inner = &*self.inner;
        let mut call = inner.writable()?;
        let mut cmd = script(&inner.scripts.ticket, &[&inner.keys.ticket]);
        cmd.arg(floor);
        inner.answer(call.serial, cmd.query_async(&mut call.connection)).await
    }

    async fn status_set(
        &self,
        account: AccountId,
        key: &str,
        epoch: u64,
        name: &str,
        value: &Value,
    ) -> Result<bool, StateError> {
        check_status_name("key", key)?;
        check_status_name("name", name)?;
        check_status_bytes(key, fieldline_contracts::status::status_cost(name, value))?;
        let inner = &*self.inner;
        let mut call = inner.writable()?;
        let cmd = inner.set_status(account, key, epoch, name, value);
        let answer = inner.answer(call.serial, cmd.query_async(&mut call.connection)).await?;
        let changed = self.judged(account, key, epoch, answer)?;
        let mut statuses = inner.statuses.lock();
        let own = statuses.entry((account, key.to_owned()));
        let own = own.or_insert_with(|| OwnStatus { epoch, values: Default::default() });
        own.epoch = own.epoch.max(epoch);
        own.values.insert(name.to_owned(), value.clone());
        Ok(changed)
    }

    async fn status_get(&self, account: AccountId, key: &str) -> Result<Status, StateError> {
        let inner = &*self.inner;
        let (mut call, since) = inner.settled()?;
        let mut all = redis::cmd("HGETALL");
        all.arg(inner.keys.status(account, key));
        let mut memory = redis::cmd("GET");
        memory.arg(&inner.keys.since);
        let pipeline = pipeline([all, memory]);
        let answer = inner.answer(call.serial, pipeline.query_async(&mut call.connection));
        let (fields, memory): (Vec<(Vec<u8>, Vec<u8>)>, Option<Vec<u8>>) = answer.await?;
        if memory.as_deref() != Some(&*since) {
            return Err(inner.doubted(call.serial));
        }
        Ok(read_status(fields))
    }

    async fn status_clear(
        &self,
        account: AccountId,
        key: &str,
        epoch: u64,
    ) -> Result<(), StateError> {
        check_status_name("key", key)?;
        let inner = &*self.inner;
        let keys = &inner.keys;
        let mut call = inner.writable()?;
        let names = [
            &keys.status(account, key),
            &keys.status_keys(account),
            &keys.version,
            &keys.channel(account),
        ];
        let mut cmd = script(&inner.scripts.status_clear, &names.map(String::as_str));
        cmd.arg(digits(epoch)).arg(key).arg(END_MS);
        let answer = inner.answer(call.serial, cmd.query_async(&mut call.connection)).await?;
        self.judged(account, key, epoch, answer)?;
        inner.statuses.lock().remove(&(account, key.to_owned()));
        Ok(())
    }

    async fn status_watch(
        &self,
        account: AccountId,
        filter: StatusFilter,
    ) -> Result<Box<dyn StatusWatch>, StateError> {
        let inner = &*self.inner;
        if self.stop.is_cancelled() {
            return Err(StateError::Unavailable("this node is shutting down".to_owned()));
        }
        let mut mirrors = inner.mirrors.write();
        let mirror = mirrors.entry(account).or_insert_with(|| Mirror {
            table: Arc::new(StatusTable::default()),
            subscribed: None,
            read: None,
        });
        // Watched before the lock is let go of: one that nobody watches is removed.
        let watch = mirror.table.watch(filter);
        if mirror.read.is_none() {
            inner.wake.notify_one();
        }
        Ok(watch)
    }
}

impl RedisState {
    /// Tells of a connection or its end, now or when it can be told. Returns whether it counts.
    async fn tell_of(
        &self,
        account: AccountId,
        device: DeviceId,
        held: Held,
    ) -> Result<bool, StateError> {
        let inner = &*self.inner;
        {
            let mut all = inner.held.lock();
            let newer = all.get(account, device).is_some_and(|known| known.epoch > held.epoch);
            if newer {
                return Ok(false);
            }
            all.put(account, device, held.clone());
        }
        let told = async {
            let mut call = inner.writable()?;
            let cmd = inner.tell(account, device, &held);
            inner.answer(call.serial, cmd.query_async::<i64>(&mut call.connection)).await
        };
        match told.await {
            Ok(0) => {
                inner.held.lock().remove(account, device, held.epoch);
                Ok(false)
            }
            Ok(_) => {
                inner.held.lock().told(account, device, &held);
                Ok(true)
            }
            Err(error) => {
                // It stays untold: the monitor comes for it.
                inner.wake.notify_one();
                Err(error)
            }
        }
    }

    /// What the script said to a write of a status.
    fn judged(
        &self,
        account: AccountId,
        key: &str,
        epoch: u64,
        answer: Vec<String>,
    ) -> Result<bool, StateError> {
        let (word, more) = match answer.as_slice() {
            [word, more @ ..] => (word.as_str(), more.first()),
            [] => return Err(unreadable()),
        };
        match word {
            "set" => Ok(true),
            "same" => Ok(false),
            "superseded" => {
                let mut statuses = self.inner.statuses.lock();
                let own = (account, key.to_owned());
                if statuses.get(&own).is_some_and(|status| status.epoch <= epoch) {
                    statuses.remove(&own);
                }
                let present = more.and_then(|text| text.parse().ok()).unwrap_or(u64::MAX);
                let key = key.to_owned();
                Err(StateError::Superseded { key, given: epoch, present })
            }
            "bytes" => check_status_bytes(key, STATUS_BYTES_MAX + 1).map(|()| false),
            _ => check_status_keys(STATUS_KEYS_MAX + 1).map(|()| false),
        }
    }
}
