//! The one thread that writes a shard's log: takes all that waits, writes it as
//! one group, syncs once, makes it visible, and answers.
//!
//! A write or sync that failed leaves the end of the file unknown. The group is
//! refused, the file is cut back to the last durable byte, and writing goes on
//! there, or in a new file after a failed sync. While even that fails, every
//! group is refused and each tries again first: the shard heals by itself.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fieldline_contracts::HistoryError;
use fieldline_model::{Cursor, Receipt, Series};
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use tracing::{debug, error, info, warn};

use crate::dict::Dict;
use crate::disk::DiskFile;
use crate::hash::FoldMap;
use crate::memtable::Message;
use crate::queue::{Job, Work};
use crate::shard::Shard;
use crate::value::put_value;
use crate::wal::{FileBefore, Frames, HEADER_BYTES, Record, header};

/// A larger buffer, left by a large group, is not kept for the next.
const FRAME_BUFFER_BYTES_KEPT: usize = 1 << 20;
/// How often a failure that lasts is logged.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);

/// The file that is written now.
struct LogFile {
    number: u64,
    path: PathBuf,
    file: Box<dyn DiskFile>,
    /// Up to here it is durable.
    durable: u64,
}

/// Where the log stands.
enum Log {
    /// Writing goes on here.
    Ready(LogFile),
    /// The file's end is unknown and could not be cut off yet.
    Torn(LogFile),
    /// A new file is needed and could not be made yet.
    Absent,
}

/// How a group failed.
enum Failure {
    Write(io::Error),
    Sync(io::Error),
}

/// What is counted of every group: looked up once, not by name for each.
struct Meters {
    queue_messages: Gauge,
    messages: Counter,
    duplicates: Counter,
    log_bytes: Counter,
    group_messages: Histogram,
    sync_seconds: Histogram,
}

impl Meters {
    fn of_shard(label: &str) -> Self {
        let label = || label.to_owned();
        Self {
            queue_messages: gauge!("fieldline_mdb_queue_messages", "shard" => label()),
            messages: counter!("fieldline_mdb_messages_total", "shard" => label()),
            duplicates: counter!("fieldline_mdb_duplicates_total", "shard" => label()),
            log_bytes: counter!("fieldline_mdb_log_bytes_total", "shard" => label()),
            group_messages: histogram!("fieldline_mdb_group_messages", "shard" => label()),
            sync_seconds: histogram!("fieldline_mdb_sync_seconds", "shard" => label()),
        }
    }
}

pub(crate) struct Writer {
    shard: Arc<Shard>,
    meters: Meters,
    dict: Dict,
    log: Log,
    next_file: u64,
    /// The file that was written last before this one.
    file_before: Option<FileBefore>,
    next_seq: u64,
    /// The newest timestamp of every series, of memory and disk. One that is too
    /// late costs a look-up; one that is too early would let a duplicate in.
    newest: FoldMap<Series, i64>,
    frame_buffer: Vec<u8>,
    /// When a failure was last logged, while nothing can be appended.
    complained: Option<Instant>,
}

/// Why nothing can be appended, in the caller's words.
fn refusal(action: &str, path: &std::path::Path, error: &io::Error) -> HistoryError {
    let text = format!("{action} `{}`: {error}", path.display());
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => HistoryError::Full(text),
        _ => HistoryError::Failed(text),
    }
}

impl Writer {
    pub(crate) fn new(
        shard: Arc<Shard>,
        mut dict: Dict,
        next_file: u64,
        file_before: Option<FileBefore>,
        next_seq: u64,
        newest: FoldMap<Series, i64>,
    ) -> Self {
        // Nothing is defined in the file that is still to be made.
        dict.epoch = 1;
        let log = Log::Absent;
        Self {
            meters: Meters::of_shard(&shard.label),
            shard,
            dict,
            log,
            next_file,
            file_before,
            next_seq,
            newest,
            frame_buffer: Vec::new(),
            complained: None,
        }
    }

    /// Writes until the queue is closed and empty.
    pub(crate) fn run(mut self) {
        let _abandon = Abandon(self.shard.clone());
        loop {
            match self.shard.queue.take(self.shard.config.group_messages_max) {
                Work::Jobs(jobs) => self.write(jobs),
                Work::Freeze(replies) => {
                    let frozen = self.freeze(true);
                    for reply in replies {
                        if reply.send(frozen).is_err() {
                            debug!("nobody waits for the freeze any more");
                        }
                    }
                }
                Work::End => return,
            }
        }
    }

    /// Writes and answers one group.
    fn write(&mut self, jobs: Vec<Job>) {
        self.meters.queue_messages.set(to_f64(self.shard.queue.depth()));
        if let Err(error) = self.make_room().and_then(|()| self.prepare_log()) {
            self.refuse(jobs, &error);
            return;
        }
        let group = self.encode(&jobs);
        if !group.messages.is_empty()
            && let Err(error) = self.commit(&group)
        {
            self.refuse(jobs, &error);
            return;
        }
        if self.shard.trouble.lock().take().is_some() {
            self.complained = None;
            info!(shard = self.shard.number, "messages are appended again");
        }
        let stored = group.messages.len();
        self.meters.messages.increment(stored as u64);
        self.meters.duplicates.increment((group.receipts.len() - stored) as u64);
        self.meters.group_messages.record(to_f64(stored));
        if group.frames.capacity() <= FRAME_BUFFER_BYTES_KEPT {
            self.frame_buffer = group.frames;
        }
        self.publish(group.messages, group.bodies);
        let mut receipts = group.receipts.into_iter();
        for job in jobs {
            let own: Vec<Receipt> = receipts.by_ref().take(job.messages.len()).collect();
            job.answer(Ok(own));
        }
        if self.shard.is_full(self.dict.bytes) {
            self.freeze(false);
        }
    }

    fn refuse(&self, jobs: Vec<Job>, error: &HistoryError) {
        // Before anybody is answered, who may ask for the reason at once.
        *self.shard.trouble.lock() = Some(error.clone());
        counter!("fieldline_mdb_refused_total", "shard" => self.shard.label.clone(), "code" => error.code())
            .increment(jobs.iter().map(|job| job.messages.len() as u64).sum());
        for job in jobs {
            job.answer(Err(error.clone()));
        }
    }

    /// Whether a failure is to be logged: the first, then one every ten seconds.
    fn complains(&mut self) -> bool {
        let now = Instant::now();
        let again = self.complained.is_none_or(|last| now - last >= COMPLAINT_INTERVAL);
        if again {
            self.complained = Some(now);
        }
        again
    }

    /// Waits, within a bound, while the memtable is full and too many are to be sealed.
    fn make_room(&mut self) -> Result<(), HistoryError> {
        if self.shard.is_full(self.dict.bytes) {
            self.freeze(true);
        }
        if self.shard.is_full(self.dict.bytes) {
            return Err(self.shard.seal_refusal());
        }
        Ok(())
    }

    /// Recognises duplicates, numbers and encodes the rest. Changes nothing that
    /// a failed write would have to take back: dictionary entries do no harm, and
    /// numbers that were given are not given again.
    fn encode(&mut self, jobs: &[Job]) -> Group {
        let (file, is_first) = match &self.log {
            Log::Ready(log) => (log.number, log.durable == HEADER_BYTES as u64),
            Log::Torn(_) | Log::Absent => (0, false),
        };
        let file_before = self.file_before.filter(|_| is_first);
        let count = jobs.iter().map(|job| job.messages.len()).sum();
        let mut frames = Frames::new(std::mem::take(&mut self.frame_buffer), file, file_before);
        let mut group = Group {
            messages: Vec::with_capacity(count),
            receipts: Vec::with_capacity(count),
            bodies: Vec::new(),
            frames: Vec::new(),
        };
        // What the group holds itself; made when the first late message asks.
        let mut within: Option<FoldMap<(u32, i64, u64), u64>> = None;
        let mut last: Option<(Series, u32)> = None;
        for message in jobs.iter().flat_map(|job| &job.messages) {
            let series = message.series();
            let id = match last {
                Some((same, id)) if same == series => id,
                _ => self.dict.series(series, || self.newest.get(&series).copied()),
            };
            last = Some((series, id));
            let (timestamp, hash) = (message.timestamp().as_micros(), message.hash());
            let newest = self.dict.series.get(id as usize).and_then(|entry| entry.item.newest);
            // Newer than everything of its series: it cannot be there already.
            if newest.is_some_and(|newest| timestamp <= newest) {
                let within = within.get_or_insert_with(|| {
                    let known = |m: &Message| ((m.series, m.timestamp, m.hash), m.seq);
                    group.messages.iter().map(known).collect()
                });
                let first = within.get(&(id, timestamp, hash)).copied();
                let first = first.or_else(|| self.shard.find(&series, timestamp, hash));
                if let Some(seq) = first {
                    let cursor = Cursor { shard: self.shard.number, seq };
                    group.receipts.push(Receipt { cursor, duplicate: true });
                    continue;
                }
            } else if let Some(entry) = self.dict.series.get_mut(id as usize) {
                entry.item.newest = Some(timestamp);
            }
            let seq = self.next_seq;
            self.next_seq += 1;
            if let Some(within) = &mut within {
                within.insert((id, timestamp, hash), seq);
            }
            let shape = self.dict.shape(id, message.params());
            let start = group.bodies.len();
            for (_, value) in message.params() {
                put_value(&mut group.bodies, value);
            }
            let body = group.bodies.get(start..).unwrap_or(&[]);
            let received = message.received().as_micros();
            let record = Record { seq, series: id, shape, timestamp, received, hash, body };
            frames.push(&mut self.dict, &record);
            group.messages.push(Message {
                seq,
                timestamp,
                received,
                hash,
                series: id,
                shape,
                chunk: 0,
                start: u32::try_from(start).unwrap_or(u32::MAX),
                length: u32::try_from(body.len()).unwrap_or(u32::MAX),
            });
            let cursor = Cursor { shard: self.shard.number, seq };
            group.receipts.push(Receipt { cursor, duplicate: false });
        }
        frames.close();
        group.frames = frames.out;
        group
    }

    /// Makes the group durable.
    fn commit(&mut self, group: &Group) -> Result<(), HistoryError> {
        let Log::Ready(log) = &mut self.log else {
            return Err(HistoryError::Failed("the log is not ready".to_owned()));
        };
        let started = Instant::now();
        let written = log
            .file
            .write_all_at(&group.frames, log.durable)
            .map_err(Failure::Write)
            .and_then(|()| log.file.sync().map_err(Failure::Sync));
        self.meters.sync_seconds.record(started.elapsed().as_secs_f64());
        match written {
            Ok(()) => {
                log.durable += group.frames.len() as u64;
                self.meters.log_bytes.increment(group.frames.len() as u64);
                Ok(())
            }
            Err(failure) => {
                counter!("fieldline_mdb_write_errors_total", "shard" => self.shard.label.clone())
                    .increment(1);
                Err(self.heal(failure))
            }
        }
    }

    /// Cuts off what a failed group may have left. Returns what its senders are told.
    fn heal(&mut self, failure: Failure) -> HistoryError {
        // The file may forget definitions of the group: they are written again.
        self.dict.epoch += 1;
        let complains = self.complains();
        let Log::Ready(log) = std::mem::replace(&mut self.log, Log::Absent) else {
            return HistoryError::Failed("the log is not ready".to_owned());
        };
        let (action, cause, reusable) = match &failure {
            Failure::Write(cause) => ("write", cause, true),
            // After a failed sync the system may have dropped pages of this file
            // and call them clean: it is not written any more.
            Failure::Sync(cause) => ("sync", cause, false),
        };
        let answer = refusal(action, &log.path, cause);
        if complains {
            error!(path = %log.path.display(), %cause, "the log could not be made durable, appends are refused");
        }
        match log.file.set_len(log.durable).and_then(|()| log.file.sync()) {
            Ok(()) if reusable => self.log = Log::Ready(log),
            Ok(()) => self.leave(&log),
            Err(error) => {
                let answer = refusal("cut", &log.path, &error);
                self.log = Log::Torn(log);
                return match answer {
                    // Something may be left of the group: then it is not certain that nothing was written.
                    HistoryError::Full(text) => HistoryError::Failed(text),
                    other => other,
                };
            }
        }
        answer
    }

    /// Brings the log into a state that can be written.
    fn prepare_log(&mut self) -> Result<(), HistoryError> {
        match std::mem::replace(&mut self.log, Log::Absent) {
            Log::Ready(log) => {
                self.log = Log::Ready(log);
                return Ok(());
            }
            Log::Torn(log) => {
                if let Err(error) = log.file.set_len(log.durable).and_then(|()| log.file.sync()) {
                    let answer = refusal("cut", &log.path, &error);
                    self.log = Log::Torn(log);
                    return Err(answer);
                }
                info!(path = %log.path.display(), bytes = log.durable, "the log was cut at the last durable byte");
                self.leave(&log);
            }
            Log::Absent => {}
        }
        let number = self.next_file;
        let path = self.shard.wal_path(number);
        match self.create(number, &path) {
            Ok(file) => {
                // Only now: a gap in the numbers says that a file was lost.
                self.next_file += 1;
                self.log = Log::Ready(LogFile { number, path, file, durable: HEADER_BYTES as u64 });
                self.shard.log_began(number);
                Ok(())
            }
            Err(error) => {
                if self.complains() {
                    warn!(path = %path.display(), %error, "no new log file could be made");
                }
                drop(self.shard.disk.remove(&path));
                counter!("fieldline_mdb_write_errors_total", "shard" => self.shard.label.clone())
                    .increment(1);
                Err(refusal("create", &path, &error))
            }
        }
    }

    /// Notes a file that is not written any more: the next one tells how long it is.
    fn leave(&mut self, log: &LogFile) {
        self.file_before = Some(FileBefore { number: log.number, bytes: log.durable });
    }

    fn create(&self, number: u64, path: &std::path::Path) -> io::Result<Box<dyn DiskFile>> {
        let file = self.shard.disk.create(path)?;
        file.write_all_at(&header(number, self.shard.number), 0)?;
        file.sync()?;
        self.shard.disk.sync_dir(&self.shard.dir)?;
        Ok(file)
    }

    fn publish(&mut self, messages: Vec<Message>, bodies: Vec<u8>) {
        if messages.is_empty() {
            return;
        }
        let file_bytes = match &self.log {
            Log::Ready(log) => log.durable,
            Log::Torn(_) | Log::Absent => 0,
        };
        self.shard.publish(&self.dict, messages, bodies.into(), file_bytes);
    }

    /// Hands the memtable over to be sealed and begins an empty one with a log
    /// file of its own. Waits within a bound where too many wait already; then
    /// the memtable stays.
    fn freeze(&mut self, wait: bool) -> bool {
        if !self.shard.freeze(wait) {
            return false;
        }
        let dict = std::mem::take(&mut self.dict);
        for entry in dict.series {
            if let Some(newest) = entry.item.newest {
                self.newest.insert(entry.item.series, newest);
            }
        }
        self.dict.epoch = dict.epoch + 1;
        self.log = match std::mem::replace(&mut self.log, Log::Absent) {
            // Its end is still to be cut off: recovery would read it otherwise.
            Log::Torn(log) => Log::Torn(log),
            Log::Ready(log) => {
                self.leave(&log);
                Log::Absent
            }
            Log::Absent => Log::Absent,
        };
        true
    }
}

/// Answers whoever waits when the writer ends, also by a panic.
struct Abandon(Arc<Shard>);

impl Drop for Abandon {
    fn drop(&mut self) {
        self.0.queue.abandon();
        if std::thread::panicking() {
            error!(
                shard = self.0.number,
                "the writer of a shard panicked, its appends are refused"
            );
        }
    }
}

/// A group on its way to disk.
struct Group {
    messages: Vec<Message>,
    receipts: Vec<Receipt>,
    bodies: Vec<u8>,
    frames: Vec<u8>,
}

#[allow(clippy::cast_precision_loss, reason = "metrics are floats")]
pub(crate) const fn to_f64(count: usize) -> f64 {
    count as f64
}
