//! `History`: what devices said, durable and in order.

use async_trait::async_trait;
use fieldline_model::{
    Accepted, AccountId, Cursor, ParamName, Receipt, Series, Stored, Timestamp, Value,
};

/// Which way messages are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Oldest first.
    #[default]
    Ascending,
    /// Newest first.
    Descending,
}

/// Which messages of a series are asked for. Order is by timestamp, then by arrival.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// The series.
    pub series: Series,
    /// From this instant on.
    pub from: Timestamp,
    /// Before this instant.
    pub to: Timestamp,
    /// Which way.
    pub order: Order,
    /// Only beyond this message, in the order asked for: where the last page ended.
    pub after: Option<(Timestamp, Cursor)>,
    /// At most so many; backends cap it at [`Query::LIMIT_MAX`], and end a page before it would
    /// have more than [`Query::BYTES_MAX`].
    pub limit: usize,
}

impl Query {
    /// Most messages of one answer.
    pub const LIMIT_MAX: usize = 10_000;
    /// Most content of one answer in bytes, if it has more than one message.
    pub const BYTES_MAX: usize = 8 << 20;

    /// The newest `limit` messages of `series`.
    #[must_use]
    pub const fn newest(series: Series, limit: usize) -> Self {
        Self {
            series,
            from: Timestamp::MIN,
            to: Timestamp::MAX,
            order: Order::Descending,
            after: None,
            limit,
        }
    }

    /// The oldest `limit` messages of `series`.
    #[must_use]
    pub const fn oldest(series: Series, limit: usize) -> Self {
        Self {
            series,
            from: Timestamp::MIN,
            to: Timestamp::MAX,
            order: Order::Ascending,
            after: None,
            limit,
        }
    }
}

/// How much of an account is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Whose.
    pub account: AccountId,
    /// Messages with an earlier timestamp may go; `None` keeps them.
    pub before: Option<Timestamp>,
    /// Most bytes on disk; the oldest go first. `None` sets no limit.
    pub bytes_max: Option<u64>,
}

/// What the store holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HistoryStats {
    /// Messages, duplicates not counted.
    pub messages: u64,
    /// Bytes on disk, log included.
    pub bytes: u64,
    /// Sealed segments.
    pub segments: u64,
    /// Messages in memory, waiting to be sealed.
    pub unsealed: u64,
}

/// A stretch of the tail of which some messages cannot be read, and may never be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "messages {} to {} of shard {} cannot all be read: {reason}; restore it from a backup, or pass over it",
    from.seq, to.seq, from.shard
)]
pub struct Gap {
    /// The first that may be missing.
    pub from: Cursor,
    /// The last that may be missing: the tail goes on after it.
    pub to: Cursor,
    /// What is damaged, in words that name no path.
    pub reason: String,
}

/// Why the store refused or lost an operation. A variant exists only where a caller acts differently.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HistoryError {
    /// No space on disk. Nothing was written; the same call may succeed later.
    #[error("no space is left to store messages: {0}")]
    Full(String),
    /// More is waiting to be written than the queue takes. Nothing was written; try again soon.
    #[error("the store is busy: its queue is full")]
    Busy,
    /// It is not known whether the batch is durable: do not acknowledge it.
    /// Appending goes on being refused until the store has recovered by itself.
    #[error("the store could not make messages durable: {0}")]
    Failed(String),
    /// What was asked for lies in a damaged part of the store. Says which part, what it hides and
    /// what to do, in words that name no path. Everything else can be read.
    #[error("stored data is damaged: {0}")]
    Corrupt(String),
    /// The tail has come to messages of which some cannot be read.
    #[error("{0}")]
    Gap(Box<Gap>),
    /// The store is shutting down.
    #[error("the store is closed")]
    Closed,
}

impl HistoryError {
    /// Stable label for metrics and answers.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Full(_) => "storage_full",
            Self::Busy => "storage_busy",
            Self::Failed(_) => "storage_failed",
            Self::Corrupt(_) => "storage_corrupt",
            Self::Gap(_) => "storage_gap",
            Self::Closed => "storage_closed",
        }
    }
}

/// Holds messages and logs.
#[async_trait]
pub trait History: Send + Sync + 'static {
    /// Appends a batch of any series; receipts are in its order.
    ///
    /// When this returns `Ok` the batch is durable: its senders may be
    /// acknowledged. A message that is there already (same series, timestamp
    /// and content) is not stored again, and its receipt says so. Messages of
    /// one series keep their order. At most [`BATCH_MAX`] messages.
    ///
    /// Not cancel-safe: after dropping the future it is not known whether the
    /// batch was written; do not acknowledge it.
    ///
    /// # Errors
    ///
    /// See [`HistoryError`]; on any of them nothing may be acknowledged.
    async fn append(&self, batch: Vec<Accepted>) -> Result<Vec<Receipt>, HistoryError>;

    /// Reads messages of one series. Sees everything whose append has returned.
    ///
    /// A page may have fewer messages than its limit though more follow, since its bytes are bounded
    /// too ([`Query::BYTES_MAX`]); only an empty one is the end. Damage does not reach beyond what it hides: a page ends before it, and
    /// the page that would begin with it is an error; other series and times are read as ever.
    ///
    /// # Errors
    ///
    /// [`HistoryError::Corrupt`], [`HistoryError::Closed`].
    async fn read(&self, query: &Query) -> Result<Vec<Stored>, HistoryError>;

    /// The number of shards; cursors run in each.
    fn shards(&self) -> u16;

    /// Messages of all series after `cursor`, in order of arrival, without gaps:
    /// what must not be missed is read so. A page may have fewer messages than `limit` though more
    /// follow, since its bytes are bounded too ([`Query::BYTES_MAX`]); only an empty one is the end. A cursor before what retention has left starts at the
    /// oldest left. Messages that a damaged log lost before they were sealed are no gap here:
    /// [`History::warnings`] tells of them.
    ///
    /// # Errors
    ///
    /// [`HistoryError::Gap`] where some of the next messages cannot be read, again and again until
    /// the consumer decides: it waits for a backup to be restored, or goes on with
    /// [`History::tail_over_damage`] until its cursor is at the gap's end or beyond, and then with this.
    /// [`HistoryError::Closed`].
    async fn tail(&self, cursor: Cursor, limit: usize) -> Result<Vec<Stored>, HistoryError>;

    /// As [`History::tail`], but what cannot be read is left out: what a consumer that was told of
    /// a gap goes on with. What lies between unreadable messages and can be read is given.
    ///
    /// # Errors
    ///
    /// [`HistoryError::Closed`].
    async fn tail_over_damage(
        &self,
        cursor: Cursor,
        limit: usize,
    ) -> Result<Vec<Stored>, HistoryError> {
        self.tail(cursor, limit).await
    }

    /// The newest value of each parameter of every message series: what `State`
    /// is rebuilt from. Calls `visit` for each; one series' values come together.
    ///
    /// # Errors
    ///
    /// [`HistoryError::Corrupt`], [`HistoryError::Closed`].
    async fn last_values(
        &self,
        visit: &mut (dyn for<'a> FnMut(Series, &'a ParamName, &'a Value, Timestamp) + Send),
    ) -> Result<(), HistoryError>;

    /// Lets go of what is beyond `retention`. Returns the bytes set free.
    ///
    /// # Errors
    ///
    /// [`HistoryError::Failed`], [`HistoryError::Closed`].
    async fn retain(&self, retention: Retention) -> Result<u64, HistoryError>;

    /// What the store holds; of one account, or of all.
    fn stats(&self, account: Option<AccountId>) -> HistoryStats;

    /// What keeps the store from storing, in words; empty when nothing does.
    fn problems(&self) -> Vec<String> {
        Vec::new()
    }

    /// What was lost or cannot be read though the store works, in words; empty when nothing was.
    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }

    /// Writes out what waits and closes. Later calls return [`HistoryError::Closed`].
    ///
    /// # Errors
    ///
    /// [`HistoryError::Failed`]; everything acknowledged is durable all the same.
    async fn close(&self) -> Result<(), HistoryError>;
}

/// Most messages of one [`History::append`].
pub const BATCH_MAX: usize = 10_000;
