//! `fieldline doctor`: says in words what is wrong, and what to do about it.
//!
//! [`CHECKS`] is a table. To add a check, write a function that looks at the [`Patient`] and returns what it found, and name it
//! there: one that reads files as [`Look::Reads`], one that asks servers as [`Look::Asks`]. What only one adapter knows of its
//! server is looked at there, as `fieldline_redis::examine` does. `docs/doctor.md` has a line for each.

mod blobs;
mod cluster;
mod data;
mod machine;
mod running;
mod tls;

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::finding::{Finding, Verdict};
use serde::Serialize;
use tokio::task::JoinSet;

use crate::cli::{DoctorArgs, Output};
use crate::config::Config;
use crate::protocol::print;

/// Longest that a check which asks servers may take.
const ASK_MAX: Duration = Duration::from_secs(40);

/// Who is looked at.
pub(crate) struct Patient {
    config: Config,
    config_file: Option<PathBuf>,
    /// Where data is kept; none for a node of a cluster.
    data: Option<PathBuf>,
    /// The server to ask, where one was named.
    url: Option<String>,
    ca: Option<PathBuf>,
    /// Whether messages are left unread.
    quick: bool,
}

type Asking = Pin<Box<dyn Future<Output = Vec<Finding>> + Send>>;

/// How one thing is looked at.
#[derive(Clone, Copy)]
enum Look {
    /// On a thread of its own: it may read for long.
    Reads(fn(&Patient) -> Vec<Finding>),
    /// On the network.
    Asks(fn(Arc<Patient>) -> Asking),
}

/// What is looked at, in order.
const CHECKS: &[Look] = &[
    Look::Reads(machine::open_files),
    Look::Reads(machine::clock),
    Look::Reads(tls::certificates),
    Look::Reads(tls::secrets),
    Look::Reads(tls::exposure),
    Look::Reads(running::ports),
    Look::Asks(|patient| Box::pin(running::server(patient))),
    Look::Reads(data::directory),
    Look::Reads(data::format),
    Look::Reads(data::space),
    Look::Reads(data::sync_time),
    Look::Reads(data::registry),
    Look::Reads(data::messages),
    Look::Reads(data::crashes),
    Look::Asks(|patient| Box::pin(cluster::etcd(patient))),
    Look::Asks(|patient| Box::pin(cluster::postgres(patient))),
    Look::Asks(|patient| Box::pin(cluster::redis(patient))),
    Look::Asks(|patient| Box::pin(cluster::broker(patient))),
    Look::Asks(|patient| Box::pin(blobs::place(patient))),
];

/// What all checks found, for programs.
#[derive(Serialize)]
struct Report<'a> {
    version: &'static str,
    broken: usize,
    warnings: usize,
    checks: &'a [Finding],
}

/// Looks at everything; fails if something does not work.
pub(crate) async fn run(args: DoctorArgs) -> Result<(), String> {
    let output = args.output;
    let findings = match Config::load(args.config.as_deref()) {
        Ok(config) => {
            let at = args
                .config
                .as_deref()
                .map_or("no file: defaults".into(), |path| path.display().to_string());
            let mut findings = vec![Finding::ok("configuration", at, "it can be used")];
            let alone = config.node.is_none();
            let default = || alone.then(|| PathBuf::from("fieldline-data"));
            let patient = Patient {
                config,
                config_file: args.config,
                data: args.data.or_else(default),
                url: args.url,
                ca: args.ca,
                quick: args.quick,
            };
            findings.extend(look(Arc::new(patient)).await);
            findings
        }
        Err(error) => {
            let at =
                args.config.as_deref().map_or_else(String::new, |path| path.display().to_string());
            vec![Finding::broken(
                "configuration",
                at,
                error.to_string(),
                "correct it; all else is looked at after that",
            )]
        }
    };
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let (broken, warnings) = (count(Verdict::Broken), count(Verdict::Warning));
    if output == Output::Json {
        let version = env!("CARGO_PKG_VERSION");
        let report = Report { version, broken, warnings, checks: &findings };
        print(&serde_json::to_string_pretty(&report).map_err(|error| error.to_string())?)?;
    } else {
        for finding in &findings {
            print(&line(finding))?;
        }
    }
    match broken {
        0 => Ok(()),
        _ => Err(format!(
            "{broken} broken, {warnings} warnings, of {} things looked at",
            findings.len()
        )),
    }
}

/// All checks at once; what they found in the order of the table.
async fn look(patient: Arc<Patient>) -> Vec<Finding> {
    let mut looking = JoinSet::new();
    for (at, check) in CHECKS.iter().copied().enumerate() {
        let patient = Arc::clone(&patient);
        match check {
            Look::Reads(read) => {
                looking.spawn_blocking(move || (at, read(&patient)));
            }
            Look::Asks(ask) => {
                looking.spawn(async move {
                    let late = || {
                        let found = format!("no answer within {} s", ASK_MAX.as_secs());
                        vec![Finding::broken("doctor", "a check", found, "look at the network")]
                    };
                    let found = tokio::time::timeout(ASK_MAX, ask(patient)).await;
                    (at, found.unwrap_or_else(|_| late()))
                });
            }
        }
    }
    let mut found = looking.join_all().await;
    found.sort_by_key(|(at, _)| *at);
    found.into_iter().flat_map(|(_, findings)| findings).collect()
}

fn line(finding: &Finding) -> String {
    let Finding { check, looked_at, verdict, found, remedy } = finding;
    let mark = match verdict {
        Verdict::Ok => "ok     ",
        Verdict::Warning => "WARNING",
        Verdict::Broken => "BROKEN ",
    };
    let remedy =
        remedy.as_ref().map(|remedy| format!("\n{:33}do: {remedy}", "")).unwrap_or_default();
    format!("{mark}  {check:<22}  {looked_at}: {found}{remedy}")
}
