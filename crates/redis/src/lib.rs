//! `State` in Redis: last values, presence and module status, shared by all nodes.
//!
//! Redis is a copy that can be lost at any time: messages are in history, connections and status
//! are known to the nodes that hold them. So nothing waits for it long, and it is never believed
//! more than it can know:
//!
//! - A write that fails is kept, bounded, and written when the server is back. Which of two values
//!   is newer is decided by timestamp and order of arrival, in the server: writes may come late,
//!   twice and in any order.
//! - Last values are read only while the marker of a whole filling is there. If it is gone (the
//!   server restarted, was flushed, or another took over) one node fills it from history, and
//!   until then reads say that they cannot know.
//! - A connection counts while its node speaks up, so a dead node's devices are offline after
//!   [`RedisConfig::node_ttl`] without anybody doing anything. For the same time after a loss of
//!   memory presence and status are not told: by then every living node has told its own again.
//! - A memory belongs to the process that it began in. One that was started again with what a file had, or
//!   a replica that took over, may lack the last that was written: to it everything is told anew, and last
//!   values are read from history, as after a loss.
//! - The end of a dead node's connections is told by whoever asks for them (`lost.rs`).
//! - A node that ends without a word may have kept something that nobody else knows: last values
//!   are mended from history then, while they are read.
//!
//! Keys are `{prefix}:a:{account}:d:{device}` (a hash: value by parameter), `…:p:{device}`
//! (presence), `…:s:{module}` (status), and a few of the installation (see `keys.rs`).
//!
//! Start reading at [`RedisState`], then `monitor.rs`. It may import `fieldline-contracts`,
//! `fieldline-model` and nothing else of the workspace, and alone imports `redis`.

mod config;
mod connect;
mod encoding;
mod examine;
mod inner;
mod keys;
mod lost;
mod monitor;
mod resync;
mod scripts;
mod state;
mod status;
mod waiting;

use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::History;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub use config::{ConnectError, RedisConfig};
pub use examine::examine;

use inner::{Inner, Link};
use keys::Keys;
use monitor::Monitor;
use scripts::Scripts;

/// Last values, presence and module status in Redis.
///
/// Its task runs on the runtime that it was made on; its methods work from any.
pub struct RedisState {
    inner: Arc<Inner>,
    stop: CancellationToken,
    monitor: Mutex<Option<JoinHandle<()>>>,
}

impl RedisState {
    /// Connects as the node `node`, a name of its own in the installation and the same after a
    /// restart. `history` is what last values are read from when Redis does not have them; see
    /// [`RedisState::ready`] for when they are there.
    ///
    /// # Errors
    ///
    /// [`ConnectError`]: the settings are wrong, or the server is away or not fit.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub async fn connect(
        config: RedisConfig,
        node: &str,
        history: Arc<dyn History>,
    ) -> Result<Self, ConnectError> {
        if let Err(problems) = config.validate() {
            return Err(ConnectError(problems.join("; ")));
        }
        if !(1..=128).contains(&node.len()) || node.chars().any(char::is_control) {
            let words = "a node's name has 1 to 128 bytes and no control characters";
            return Err(ConnectError(words.to_owned()));
        }
        let info = connect::info(&config.url)?;
        connect::choose_provider(&info);
        let address = info.addr().to_string();
        let client = connect::client(info, config.tls_ca.as_deref())?;
        let inner = Arc::new_cyclic(|me| Inner {
            me: me.clone(),
            keys: Keys::new(&config.prefix),
            config,
            client,
            address,
            scripts: Scripts::new(),
            history,
            node: node.to_owned(),
            incarnation: format!("{:016x}", rand::random::<u64>()),
            link: RwLock::new(Link {
                connection: None,
                home: None,
                local: std::collections::HashMap::new(),
                run_id: String::new(),
                serial: 0,
                open: false,
                generation: None,
                settled: None,
                reason: "Redis is not connected yet".into(),
            }),
            waiting: Mutex::default(),
            held: Mutex::default(),
            statuses: Mutex::default(),
            mirrors: RwLock::default(),
            wake: Notify::new(),
            looked: watch::Sender::new(()),
        });
        let mut monitor = Monitor::new(Arc::clone(&inner));
        // The first look here: what is wrong with the settings ends the start.
        monitor.look().await.map_err(ConnectError)?;
        let stop = CancellationToken::new();
        let task = tokio::spawn(monitor.run(stop.clone()));
        Ok(Self { inner, stop, monitor: Mutex::new(Some(task)) })
    }

    /// Waits until last values, presence and status can be read, `limit` at most. On a server
    /// whose memory is new that takes [`RedisConfig::node_ttl`] at least. Cancel-safe.
    pub async fn ready(&self, limit: Duration) -> bool {
        let mut looked = self.inner.looked.subscribe();
        let all = async {
            while !self.problems().is_empty() {
                if looked.changed().await.is_err() {
                    return false;
                }
            }
            true
        };
        tokio::time::timeout(limit, all).await.unwrap_or(false)
    }

    /// What keeps last values, presence or status from being read, in words; empty when nothing does.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Err(error) = self.inner.readable() {
            problems.push(error.to_string());
        } else if let Err(error) = self.inner.settled() {
            problems.push(error.to_string());
        }
        problems
    }

    /// Messages that wait to be written, and their bytes.
    #[must_use]
    pub fn waiting(&self) -> (usize, usize) {
        self.inner.waiting.lock().len()
    }

    /// Ends in order: what waits is written if the server answers, and others need not mend what
    /// this node may have left. Calls fail from here on.
    pub async fn close(&self) {
        self.stop.cancel();
        let task = self.monitor.lock().take();
        if let Some(Err(error)) = async { Some(task?.await) }.await {
            tracing::error!(%error, "the task that keeps the connection to Redis ended badly");
        }
        let mut link = self.inner.link.write();
        link.open = false;
        link.connection = None;
        link.local.clear();
        link.reason = "this node is shutting down".into();
        drop(link);
        self.inner.mirrors.read().values().for_each(|mirror| mirror.table.close());
    }
}

impl Drop for RedisState {
    fn drop(&mut self) {
        // As a crash: nothing is told, so that nobody waits for it here.
        if let Some(task) = self.monitor.lock().take() {
            task.abort();
        }
        self.inner.mirrors.read().values().for_each(|mirror| mirror.table.close());
    }
}
