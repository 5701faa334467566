//! A look at the database from outside, for `fieldline doctor`. It makes no tables and changes nothing.

use std::time::Duration;

use fieldline_contracts::Clock;
use fieldline_contracts::finding::Finding;
use fieldline_model::Timestamp;
use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

use crate::connect::{CONNECT_MAX, Link, Servers, within};
use crate::error::{ConnectError, Fault};
use crate::history::bucket::Calendar;
use crate::migrate;
use crate::settings::Settings;

/// Longest that one question may take.
const ASK_MAX: Duration = Duration::from_secs(5);
const DAY_MICROS: i64 = 86_400 * 1_000_000;

/// Looks at the servers of the settings, and at the tables in them.
pub async fn examine(settings: &Settings, clock: &dyn Clock) -> Vec<Finding> {
    let at = "postgres.url";
    let servers = match Servers::new(settings) {
        Ok(servers) => servers,
        Err(error) => return vec![Finding::of_error("postgres", at, &error)],
    };
    let mut findings = away(&servers).await;
    let link = match servers.connect().await {
        Ok(link) => link,
        Err(error) => {
            findings.push(Finding::of_error("postgres", servers.labels(), &error));
            return findings;
        }
    };
    let look = Look { link: &link, servers: &servers, place: servers.labels() };
    let all = [
        look.server(clock).await,
        look.commits().await,
        look.tables(settings.migrate).await,
        look.rights().await,
        look.transactions().await,
        look.partitions(clock.now()).await,
    ];
    for found in all {
        match found {
            Ok(found) => findings.extend(found),
            // The check of rights says so.
            Err(fault) if fault.is(&SqlState::INSUFFICIENT_PRIVILEGE) => {}
            Err(fault) => findings.push(Finding::broken(
                "postgres",
                &look.place,
                format!("a question was not answered: {fault}"),
                "see the log of the server",
            )),
        }
    }
    findings
}

/// Which of several servers do not answer. One alone is looked at by connecting to it.
async fn away(servers: &Servers) -> Vec<Finding> {
    let mut findings = Vec::new();
    if servers.each().len() < 2 {
        return findings;
    }
    for (label, config) in servers.each() {
        let mut any = config.clone();
        any.target_session_attrs(tokio_postgres::config::TargetSessionAttrs::Any);
        let error = match tokio::time::timeout(CONNECT_MAX, servers.open(&any)).await {
            Ok(Ok(_)) => continue,
            Ok(Err(error)) => servers.judge(label, &error),
            Err(_) => ConnectError::Unreachable {
                reason: format!("no answer within {} s", CONNECT_MAX.as_secs()),
            },
        };
        let of_error = Finding::of_error("postgres", label, &error);
        let remedy = of_error.remedy.unwrap_or_default();
        findings.push(Finding::warning("postgres", label, of_error.found, remedy));
    }
    findings
}

struct Look<'a> {
    link: &'a Link,
    servers: &'a Servers,
    place: String,
}

impl Look<'_> {
    async fn ask(&self, sql: &str, with: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Fault> {
        within(ASK_MAX, self.link.client.query(sql, with)).await
    }

    async fn one(&self, sql: &str, with: &[&(dyn ToSql + Sync)]) -> Result<Row, Fault> {
        within(ASK_MAX, self.link.client.query_one(sql, with)).await
    }

    /// What it is, whether it keeps what it confirms, how full it is, and its clock.
    async fn server(&self, clock: &dyn Clock) -> Result<Vec<Finding>, Fault> {
        let before = clock.now();
        let row = self
            .one(
                "SELECT current_setting('server_version'), current_setting('fsync'), current_setting('full_page_writes'), \
                 current_setting('server_encoding'), current_setting('max_connections')::int, \
                 (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')::int, \
                 (extract(epoch FROM clock_timestamp()) * 1000000)::bigint",
                &[],
            )
            .await?;
        let after = clock.now();
        let text = |at: usize| row.try_get::<_, String>(at);
        let place = &self.place;
        let mut findings =
            vec![Finding::ok("postgres", place, format!("it takes writes, version {}", text(0)?))];
        if text(1)? == "off" || text(2)? == "off" {
            findings.push(Finding::broken(
                "postgres durability",
                place,
                "fsync or full_page_writes is off: a crash of its machine damages what was acknowledged",
                "set both to on and start it again",
            ));
        }
        if text(3)? != "UTF8" {
            let database = &self.servers.database;
            findings.push(Finding::broken(
                "postgres",
                place,
                format!("the database keeps text as {}", text(3)?),
                format!("make one with `createdb --encoding=UTF8 --template=template0 {database}`"),
            ));
        }
        let (most, used): (i32, i32) = (row.try_get(4)?, row.try_get(5)?);
        let found = format!("{used} of {most} are used");
        findings.push(if i64::from(used) * 10 > i64::from(most) * 9 {
            let remedy = "raise max_connections, or lower `postgres.connections_max` and `postgres.writers` of the nodes";
            Finding::warning("postgres connections", place, found, remedy)
        } else {
            Finding::ok("postgres connections", place, found)
        });
        let theirs = Timestamp::from_micros(row.try_get(6)?);
        findings.push(Finding::of_clock("clock", place, theirs, (before, after)));
        Ok(findings)
    }

    /// Whether a commit waits for a standby that is not there.
    async fn commits(&self) -> Result<Vec<Finding>, Fault> {
        let row = self
            .one(
                "SELECT current_setting('synchronous_standby_names'), \
                 count(*) FILTER (WHERE sync_state IN ('sync', 'quorum')), count(*), count(sync_state) \
                 FROM pg_stat_replication",
                &[],
            )
            .await?;
        let names: String = row.try_get(0)?;
        let (waited_for, all, seen): (i64, i64, i64) =
            (row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
        let (check, place) = ("postgres standby", &self.place);
        if names.trim().is_empty() {
            let found = "commits wait for no standby: what the primary's machine has not passed on is lost with it";
            return Ok(vec![Finding::ok(check, place, found)]);
        }
        let needed = standbys_needed(&names);
        if waited_for < needed && seen == all {
            return Ok(vec![Finding::broken(
                check,
                place,
                format!(
                    "commits wait for {needed} standby as synchronous_standby_names says (`{names}`), and {waited_for} of those are connected: nothing is acknowledged"
                ),
                "start the standby, or take it out of synchronous_standby_names knowing that the primary is alone then",
            )]);
        }
        let found = if seen < all {
            "there are standbys; grant our user pg_monitor to see whether they are synchronous"
                .to_owned()
        } else {
            format!("{waited_for} that commits wait for, {all} in all")
        };
        Ok(vec![Finding::ok(check, place, found)])
    }

    /// The version of the tables.
    async fn tables(&self, may_migrate: bool) -> Result<Vec<Finding>, Fault> {
        let schema = &self.servers.schema;
        let at = format!("schema {schema}");
        let there = "SELECT to_regclass($1 || '.version') IS NOT NULL";
        if !self.one(there, &[schema]).await?.try_get::<_, bool>(0)? {
            let found = "there are no tables yet: the first start makes them";
            return Ok(vec![Finding::ok("postgres schema", at, found)]);
        }
        // A user who may not read it is found by his rights.
        let Ok(row) = self.one("SELECT version FROM version", &[]).await else {
            return Ok(Vec::new());
        };
        let found: i32 = row.try_get(0)?;
        Ok(vec![match migrate::refused(schema, found, may_migrate) {
            Some(error) => Finding::of_error("postgres schema", at, &error),
            None => Finding::ok("postgres schema", at, format!("of version {found}")),
        }])
    }

    /// Whether our user may do what has to be done.
    async fn rights(&self) -> Result<Vec<Finding>, Fault> {
        let row = self
            .one(
                "SELECT has_database_privilege(current_database(), 'CREATE'), \
                 (SELECT has_schema_privilege(oid, 'CREATE') AND has_schema_privilege(oid, 'USAGE') FROM pg_namespace WHERE nspname = $1)",
                &[&self.servers.schema],
            )
            .await?;
        let (in_database, in_schema): (bool, Option<bool>) = (row.try_get(0)?, row.try_get(1)?);
        let owner: Option<bool> = match in_schema {
            // Who may not look into a schema may not ask this either.
            Some(true) => {
                let owner = "SELECT (SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass($1 || '.messages'))";
                self.one(owner, &[&self.servers.schema]).await?.try_get(0)?
            }
            _ => None,
        };
        let (user, database, schema) =
            (&self.servers.user, &self.servers.database, &self.servers.schema);
        let at = format!("user {user}");
        let lacks = match (in_schema, owner) {
            (None, _) if !in_database => Some((
                format!("he may not make the schema `{schema}`"),
                format!("run GRANT CREATE ON DATABASE \"{database}\" TO \"{user}\""),
            )),
            (Some(false), _) => Some((
                format!("he may not make tables in the schema `{schema}`"),
                format!("run GRANT CREATE, USAGE ON SCHEMA {schema} TO \"{user}\""),
            )),
            (_, Some(false)) => Some((
                "he does not own the tables, and a partition is made each day".to_owned(),
                format!("make him their owner, as REASSIGN OWNED BY … TO \"{user}\" does"),
            )),
            _ => None,
        };
        Ok(vec![match lacks {
            Some((found, remedy)) => Finding::broken("postgres rights", at, found, remedy),
            None => Finding::ok("postgres rights", at, "he may do what has to be done"),
        }])
    }

    /// Transactions of others that keep dead rows from being cleared away, and locks.
    async fn transactions(&self) -> Result<Vec<Finding>, Fault> {
        let rows = self
            .ask(
                "SELECT 'process ' || pid || ' of ' || usename || ' (' || coalesce(application_name, '') || ', ' || state || ')', \
                 extract(epoch FROM clock_timestamp() - xact_start)::float8 \
                 FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() \
                 AND ((state LIKE 'idle in transaction%' AND state_change < clock_timestamp() - interval '5 s') \
                 OR xact_start < clock_timestamp() - interval '5 min') \
                 UNION ALL SELECT 'prepared transaction ' || gid, extract(epoch FROM clock_timestamp() - prepared)::float8 \
                 FROM pg_prepared_xacts WHERE prepared < clock_timestamp() - interval '5 min' \
                 ORDER BY 2 DESC LIMIT 5",
                &[],
            )
            .await?;
        let (check, place) = ("postgres transactions", &self.place);
        if rows.is_empty() {
            return Ok(vec![Finding::ok(check, place, "none is open for long")]);
        }
        let words = |row: &Row| -> Result<Finding, Fault> {
            let (who, seconds): (String, f64) = (row.try_get(0)?, row.try_get(1)?);
            Ok(Finding::warning(
                check,
                place,
                format!(
                    "{who} has had a transaction open for {seconds:.0} s: what it holds is not cleared away, and tables grow"
                ),
                "end it with `SELECT pg_terminate_backend(…)` or ROLLBACK PREPARED, and set idle_in_transaction_session_timeout for its user",
            ))
        };
        rows.iter().map(words).collect()
    }

    /// Whether there are tables for today's and tomorrow's messages.
    async fn partitions(&self, now: Timestamp) -> Result<Vec<Finding>, Fault> {
        let schema = &self.servers.schema;
        let there = "SELECT to_regclass($1 || '.settings') IS NOT NULL";
        if !self.one(there, &[schema]).await?.try_get::<_, bool>(0)? {
            return Ok(Vec::new());
        }
        let read = self.ask("SELECT value FROM settings WHERE name = 'first_day'", &[]).await;
        let Some(row) = read.ok().and_then(|rows| rows.into_iter().next()) else {
            return Ok(Vec::new());
        };
        let first_day = i32::try_from(row.try_get::<_, i64>(0)?).unwrap_or(0);
        let calendar = Calendar { first_day };
        let mut missing = Vec::new();
        for day in 0..2 {
            let table = calendar.bucket(now.plus_micros(day * DAY_MICROS).as_micros()).table();
            let there = "SELECT to_regclass($1 || '.' || $2) IS NOT NULL";
            if !self.one(there, &[schema, &table]).await?.try_get::<_, bool>(0)? {
                missing.push(table);
            }
        }
        let (check, at) = ("postgres partitions", format!("{schema}.messages"));
        Ok(vec![if missing.is_empty() {
            Finding::ok(check, at, "today's and tomorrow's are there")
        } else {
            Finding::warning(
                check,
                at,
                format!("{} not there", missing.join(" and ")),
                "look why no node makes them: one has to run, its user to own the tables, and its clock to be right",
            )
        }])
    }
}

/// How many standbys a commit waits for.
fn standbys_needed(names: &str) -> i64 {
    let names = names.trim();
    let rest = names
        .strip_prefix("ANY ")
        .or_else(|| names.strip_prefix("FIRST "))
        .or_else(|| names.strip_prefix("any "))
        .or_else(|| names.strip_prefix("first "))
        .unwrap_or(names);
    let Some((number, _)) = rest.split_once('(') else { return 1 };
    number.trim().parse().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standbys_that_are_waited_for_are_counted() {
        for (names, needed) in
            [("*", 1), ("a, b", 1), ("ANY 2 (a, b, c)", 2), ("FIRST 1 (*)", 1), ("2 (a, b)", 2)]
        {
            assert_eq!(standbys_needed(names), needed, "{names}");
        }
    }
}
