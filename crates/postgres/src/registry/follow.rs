//! Follows what other nodes change: told by the server, and looked up each second all the same.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::AUDIT_MAX;
use crate::connect::{Link, Servers, within};
use crate::error::Fault;
use crate::registry::{read, trim};

/// Between two looks where nothing was told.
const POLL: Duration = Duration::from_millis(500);

/// Longest that a look may take until the connection counts as dead.
const LOOK_MAX: Duration = Duration::from_secs(2);

/// Between two attempts to connect.
const AGAIN: Duration = Duration::from_millis(200);

/// Between two looks at the length of the audit trail.
const TRIM_EVERY: Duration = Duration::from_secs(600);

/// Raises what the watch holds; it never falls.
pub(crate) fn tell(newest: &watch::Sender<u64>, sequence: u64) {
    newest.send_if_modified(|seen| {
        let newer = sequence > *seen;
        *seen = sequence.max(*seen);
        newer
    });
}

/// Body of the task.
pub(crate) async fn run(servers: Arc<Servers>, newest: watch::Sender<u64>) {
    let mut failing = false;
    loop {
        let ended = match servers.connect().await {
            Ok(link) => follow(&link, &servers.schema, &newest, &mut failing).await,
            Err(error) => Err(error.into()),
        };
        if let Err(fault) = ended
            && !failing
        {
            failing = true;
            tracing::warn!(%fault, "changes of other nodes are not heard of for now");
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn follow(
    link: &Link,
    schema: &str,
    newest: &watch::Sender<u64>,
    failing: &mut bool,
) -> Result<(), Fault> {
    within(LOOK_MAX, link.client.batch_execute(&format!("LISTEN {schema}_changes"))).await?;
    let mut told_back = false;
    let mut trimmed = Instant::now();
    loop {
        // What was changed before we listened, or could not be told, is found here.
        let told = *newest.borrow();
        let sequence = within(LOOK_MAX, read::newest(link)).await?;
        if *failing {
            *failing = false;
            tracing::info!("changes of other nodes are heard of again");
        }
        // What was told meanwhile is newer than the look.
        if sequence < told && !told_back {
            told_back = true;
            tracing::error!(
                sequence,
                "the registry went back to an older state: a standby was promoted that lacked the newest changes, or a backup was restored; restart this node"
            );
        }
        tell(newest, sequence);
        if trimmed.elapsed() >= TRIM_EVERY {
            trimmed = Instant::now();
            if let Err(fault) = trim::trim(link, AUDIT_MAX, trim::RECENT).await {
                tracing::warn!(%fault, "the audit trail could not be trimmed");
            }
        }
        // Either way it is time to look.
        let _waited = tokio::time::timeout(POLL, link.notified.notified()).await;
    }
}
