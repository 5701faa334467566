//! Brings the tables to the present version: once, under a lock, whole or not at all.
//!
//! Own, and not a library: what matters here is which versions may meet (a cluster is brought up to date
//! node by node), and no library knows that; the rest is one transaction.

use std::time::Duration;

use tokio_postgres::error::SqlState;

use crate::connect::{Link, Servers, within};
use crate::error::{ConnectError, Fault};
use crate::schema::MIGRATIONS;

/// The tables' version that this program knows.
const KNOWN: i32 = 2;

/// Longest that one exchange may take: another node may be making the tables.
const LIMIT: Duration = Duration::from_secs(300);

/// What to do about tables of some version.
#[derive(Debug, PartialEq, Eq)]
enum Course {
    Use,
    Migrate,
    Refuse(&'static str),
}

/// `found` is 0 where there are no tables yet.
const fn course(found: i32, known: i32, may_migrate: bool) -> Course {
    if found > known + 1 {
        return Course::Refuse(
            "start a newer Fieldline, at most one version older than the tables",
        );
    }
    if found >= known {
        return Course::Use;
    }
    if may_migrate {
        return Course::Migrate;
    }
    if found > 0 && found == known - 1 {
        return Course::Use;
    }
    Course::Refuse("start this Fieldline once with `migrate = true` and a user who may make tables")
}

/// Why tables of version `found` cannot be used, if so.
pub(crate) fn refused(schema: &str, found: i32, may_migrate: bool) -> Option<ConnectError> {
    let Course::Refuse(remedy) = course(found, KNOWN, may_migrate) else { return None };
    let (schema, oldest, newest) = (schema.to_owned(), (KNOWN - 1).max(1), KNOWN + 1);
    Some(ConnectError::Version { schema, found, oldest, newest, remedy })
}

/// Checks the database and makes or changes the tables as needed.
pub(crate) async fn prepare(
    link: &Link,
    servers: &Servers,
    may_migrate: bool,
) -> Result<(), ConnectError> {
    let named = |fault: Fault| match &fault {
        Fault::Connect(error) => error.clone(),
        other if other.is(&SqlState::INSUFFICIENT_PRIVILEGE) => ConnectError::NoRight {
            user: servers.user.clone(),
            database: servers.database.clone(),
            schema: servers.schema.clone(),
            reason: other.to_string(),
        },
        other => ConnectError::Other(other.to_string()),
    };
    within(LIMIT, transact(link, servers, may_migrate)).await.map_err(named)
}

async fn transact(link: &Link, servers: &Servers, may_migrate: bool) -> Result<(), Fault> {
    let (client, schema) = (&link.client, &servers.schema);
    let row = client.query_one("SHOW server_encoding", &[]).await?;
    let found: String = row.try_get(0)?;
    if found != "UTF8" {
        let database = servers.database.clone();
        return Err(ConnectError::Encoding { database, found }.into());
    }
    let row = client.query_one("SHOW fsync", &[]).await?;
    if row.try_get::<_, &str>(0)? == "off" {
        tracing::error!(
            "PostgreSQL runs with fsync=off: a crash of its machine damages what was acknowledged; set fsync=on"
        );
    }
    // The lock goes with the transaction, however that ends.
    client.batch_execute("BEGIN; SET LOCAL lock_timeout = '240s'; SET LOCAL statement_timeout = '280s'; SET LOCAL idle_in_transaction_session_timeout = '60s'").await?;
    let lock = "SELECT pg_advisory_xact_lock(hashtextextended('fieldline migration ' || $1, 0))";
    client.query_one(lock, &[schema]).await?;
    let there = "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1), \
                 to_regclass($1 || '.version') IS NOT NULL";
    let row = client.query_one(there, &[schema]).await?;
    let (has_schema, has_version): (bool, bool) = (row.try_get(0)?, row.try_get(1)?);
    let mut found = 0;
    if has_version {
        found = client.query_one("SELECT version FROM version", &[]).await?.try_get(0)?;
    }
    match course(found, KNOWN, may_migrate) {
        Course::Use => {}
        Course::Refuse(remedy) => {
            client.batch_execute("ROLLBACK").await?;
            let (schema, oldest, newest) = (schema.clone(), (KNOWN - 1).max(1), KNOWN + 1);
            return Err(ConnectError::Version { schema, found, oldest, newest, remedy }.into());
        }
        Course::Migrate => {
            if !has_schema {
                // Checked when it was set: nothing in it has to be quoted.
                client.batch_execute(&format!("CREATE SCHEMA {schema}")).await?;
            }
            if !has_version {
                client
                    .batch_execute(
                        "CREATE TABLE version (version integer NOT NULL); INSERT INTO version VALUES (0)",
                    )
                    .await?;
            }
            for migration in MIGRATIONS.iter().skip(usize::try_from(found).unwrap_or(0)) {
                client.batch_execute(migration).await?;
            }
            client.execute("UPDATE version SET version = $1", &[&KNOWN]).await?;
            tracing::info!(schema, from = found, to = KNOWN, "the tables were brought up to date");
        }
    }
    client.batch_execute("COMMIT").await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_migration_counts() {
        assert_eq!(MIGRATIONS.len(), usize::try_from(KNOWN).unwrap());
    }

    #[test]
    fn one_version_of_skew_is_allowed_either_way() {
        for known in 1..5 {
            assert_eq!(course(known, known, true), Course::Use);
            assert_eq!(course(known + 1, known, true), Course::Use);
            assert_eq!(course(known + 1, known, false), Course::Use);
            assert!(matches!(course(known + 2, known, true), Course::Refuse(_)));
            assert_eq!(course(known - 1, known, true), Course::Migrate);
            assert_eq!(course(0, known, true), Course::Migrate);
            assert!(matches!(course(0, known, false), Course::Refuse(_)));
        }
        assert_eq!(course(3, 4, false), Course::Use);
        assert!(matches!(course(2, 4, false), Course::Refuse(_)));
    }
}
