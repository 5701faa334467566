//! The names of parameters, numbered: how the shared dictionary grows, and what keeps it true.
//!
//! A name gets its number in the background, after it was first met; until then it is written as text. A number
//! is used only when its row is committed. Should a server take over that lacks it, a writer notices with its
//! first use of the new connection, before it writes anything: what was encoded with the old numbers is then
//! given back to its senders.

use std::collections::HashSet;
use std::sync::Arc;

use fieldline_model::ParamName;
use parking_lot::{Mutex, RwLock};

use crate::connect::Link;
use crate::error::Fault;
use crate::history::row::Dictionary;

/// Most names with a number. Devices may make names up: what comes later stays text.
const NUMBERED_MAX: usize = 10_000;

/// Most names that wait for a number.
const WANTED_MAX: usize = 1_000;

/// The dictionary as it is known here.
#[derive(Default)]
pub(crate) struct Book {
    current: RwLock<Edition>,
    wanted: Mutex<HashSet<ParamName>>,
    loading: tokio::sync::Mutex<()>,
}

/// Numbers of one edition never mean anything else; names are added to it.
#[derive(Clone, Default)]
pub(crate) struct Edition {
    pub(crate) number: u64,
    pub(crate) dictionary: Arc<Dictionary>,
}

impl Book {
    pub(crate) fn current(&self) -> Edition {
        self.current.read().clone()
    }

    /// Asks for a number of `name`.
    pub(crate) fn want(&self, name: &ParamName) {
        if self.current.read().dictionary.len() >= NUMBERED_MAX {
            return;
        }
        let mut wanted = self.wanted.lock();
        if wanted.len() < WANTED_MAX && !wanted.contains(name) {
            wanted.insert(name.clone());
        }
    }

    /// Reads the table; begins another edition where it lacks what was thought to be there.
    pub(crate) async fn load(&self, link: &Link) -> Result<Edition, Fault> {
        // One at a time: what was read earlier must not be taken for what is there later.
        let _alone = self.loading.lock().await;
        let statement = link.prepared("SELECT id, name FROM names").await?;
        let mut names = Vec::new();
        for row in link.client.query(&statement, &[]).await? {
            let number = u32::try_from(row.try_get::<_, i32>(0)?).unwrap_or(0);
            // A row that cannot be one of ours names nothing.
            if let Ok(name) = ParamName::new(row.try_get::<_, String>(1)?) {
                names.push((number, name));
            }
        }
        let found = Arc::new(Dictionary::of(names));
        let mut current = self.current.write();
        if current.dictionary.is_within(&found) {
            current.dictionary = found;
        } else {
            tracing::error!(
                "the server lacks names that it had: a standby was promoted that was behind, or a backup was restored"
            );
            *current = Edition { number: current.number + 1, dictionary: found };
        }
        Ok(current.clone())
    }

    /// Gives numbers to the names that wait for one.
    pub(crate) async fn learn(&self, link: &Link) -> Result<(), Fault> {
        let mut wanted: Vec<String> =
            self.wanted.lock().iter().map(|name| name.as_str().to_owned()).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        // In order: two nodes that add the same ones do not wait for each other crosswise.
        wanted.sort_unstable();
        let statement = link
            .prepared(
                "INSERT INTO names (name) SELECT u.name FROM unnest($1::text[]) AS u (name) \
                 WHERE NOT EXISTS (SELECT FROM names n WHERE n.name = u.name) \
                 AND (SELECT count(*) FROM names) < $2 ON CONFLICT DO NOTHING",
            )
            .await?;
        let most = i64::try_from(NUMBERED_MAX).unwrap_or(i64::MAX);
        link.client.execute(&statement, &[&wanted, &most]).await?;
        self.load(link).await?;
        let known = self.current();
        self.wanted.lock().retain(|name| {
            known.dictionary.number(name).is_none() && known.dictionary.len() < NUMBERED_MAX
        });
        Ok(())
    }
}
