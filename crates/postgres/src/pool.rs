//! Connections that calls take turns with.
//!
//! A connection goes back only when the call that had it says that it is in order; one of a call that was
//! dropped or timed out is ended, so that the next never meets what another left behind.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::connect::{Link, Servers, within};
use crate::error::{Fault, Verdict};

/// Longest that a call waits for a connection to be free.
const WAIT_MAX: Duration = Duration::from_secs(10);

pub(crate) struct Pool {
    pub(crate) servers: Arc<Servers>,
    idle: Mutex<Vec<Link>>,
    places: Arc<Semaphore>,
    most: usize,
}

impl Pool {
    pub(crate) fn new(servers: Arc<Servers>, most: usize) -> Arc<Self> {
        let (idle, places) = (Mutex::default(), Arc::new(Semaphore::new(most)));
        Arc::new(Self { servers, idle, places, most })
    }

    /// A connection of its own for the caller. A fresh one where `fresh`.
    async fn lease(self: &Arc<Self>, fresh: bool) -> Result<Lease, Fault> {
        let place = Arc::clone(&self.places).acquire_owned();
        let place = tokio::time::timeout(WAIT_MAX, place).await;
        let Ok(Ok(place)) = place else { return Err(Fault::Exhausted(self.most)) };
        loop {
            let idle = if fresh { None } else { self.idle.lock().pop() };
            let link = match idle {
                Some(link) if link.client.is_closed() => continue,
                Some(link) => link,
                None => self.servers.connect().await?,
            };
            return Ok(Lease { link, pool: Arc::clone(self), place });
        }
    }

    /// Runs `work` with a connection; again with a fresh one where the one it had turns out to be dead.
    /// For reads, and for what may be done twice.
    pub(crate) async fn run<T, W>(self: &Arc<Self>, work: W) -> Result<T, Fault>
    where
        W: for<'a> Fn(&'a Link) -> futures_util::future::BoxFuture<'a, Result<T, Fault>>,
    {
        let limit = self.servers.statement_timeout + Duration::from_secs(1);
        let mut fresh = false;
        loop {
            let lease = self.lease(fresh).await?;
            let done = within(limit, work(&lease)).await;
            let sound = done.as_ref().err().is_none_or(|fault| fault.verdict() != Verdict::Lost);
            if sound {
                lease.give_back();
                return done;
            }
            // The server may have been restarted since: nobody was told anything yet.
            self.idle.lock().clear();
            if fresh || matches!(done, Err(Fault::Slow(_))) {
                return done;
            }
            fresh = true;
        }
    }

    /// A connection for a transaction of the caller's, who gives it back.
    pub(crate) async fn take(self: &Arc<Self>) -> Result<Lease, Fault> {
        self.lease(false).await
    }

    /// Whether it was closed: nobody gets a connection any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.places.is_closed()
    }

    /// Ends the connections that nobody uses.
    pub(crate) fn close(&self) {
        self.places.close();
        self.idle.lock().clear();
    }
}

/// Waits for `work`, a transaction; where it fails, the connection is left without one.
pub(crate) async fn whole<T>(
    link: &Link,
    work: impl Future<Output = Result<T, Fault>>,
) -> Result<T, Fault> {
    let done = work.await;
    if done.is_err() && !link.client.is_closed() {
        link.client.batch_execute("ROLLBACK").await?;
    }
    done
}

/// A connection on loan. Dropped, it is ended.
pub(crate) struct Lease {
    link: Link,
    pool: Arc<Pool>,
    place: OwnedSemaphorePermit,
}

impl Lease {
    /// For the next; only where no transaction is open.
    pub(crate) fn give_back(self) {
        let Self { link, pool, place } = self;
        if !link.client.is_closed() && !pool.places.is_closed() {
            pool.idle.lock().push(link);
        }
        drop(place);
    }
}

impl Deref for Lease {
    type Target = Link;

    fn deref(&self) -> &Link {
        &self.link
    }
}
