//! A look at etcd from outside, for `fieldline doctor`. It joins nothing and changes nothing.

use std::time::Duration;

use etcd_client::{AlarmAction, AlarmType, Client, GetOptions};
use fieldline_contracts::Node;
use fieldline_contracts::finding::Finding;

use crate::error::in_time;
use crate::keys::{Keys, Registered};
use crate::{Config, ConnectError, options};

/// Longest that one question may take.
const ASK_MAX: Duration = Duration::from_secs(3);
/// The oldest version that is known to do.
const OLDEST: (u32, u32) = (3, 4);

/// What was found.
#[derive(Debug)]
pub struct Examined {
    /// What the checks say.
    pub findings: Vec<Finding>,
    /// Who is registered; `None` where that cannot be told.
    pub nodes: Option<Vec<Node>>,
}

/// Looks at every member of etcd that `config` names.
pub async fn examine(config: &Config) -> Examined {
    let places = config.endpoints.join(", ");
    let mut findings = Vec::new();
    let (mut up, mut down) = (Vec::new(), Vec::new());
    for endpoint in &config.endpoints {
        let asked = async {
            let mut client = Client::connect([endpoint], Some(options(config))).await?;
            let status = client.status().await?;
            Ok((client, status))
        };
        match in_time(ASK_MAX, Box::pin(asked)).await {
            Ok((client, status)) => up.push((endpoint, client, status)),
            Err(error) => down.push((endpoint, ConnectError::new(endpoint, &error))),
        }
    }
    let Some((_, client, _)) = up.first() else {
        let all = down.iter().map(|(endpoint, error)| Finding::of_error("etcd", *endpoint, error));
        return Examined { findings: all.collect(), nodes: None };
    };
    let mut client = client.clone();
    for (endpoint, error) in &down {
        let error = error.to_string();
        let (found, remedy) = error.rsplit_once(": ").unwrap_or((&error, "mend it"));
        findings.push(Finding::warning("etcd", *endpoint, found, remedy));
    }
    for (endpoint, _, status) in &up {
        findings.push(of_version(endpoint, status.version()));
        findings.extend(status.errors().iter().map(|error| {
            Finding::warning("etcd", *endpoint, format!("it says: {error}"), "see its log")
        }));
    }
    let keys = Keys::under(&config.prefix);
    let all = GetOptions::new().with_prefix();
    let read = in_time(ASK_MAX, client.get(keys.root.as_str(), Some(all))).await;
    let leaderless = up.iter().all(|(_, _, status)| status.leader() == 0);
    let nodes = match read {
        Ok(read) if !leaderless => {
            findings.push(Finding::ok(
                "etcd quorum",
                &places,
                "there is a leader, and reads are answered",
            ));
            let members = read.kvs().iter().filter(|entry| keys.is_member(entry.key()));
            let members = members.filter_map(|entry| Registered::from_json(entry.value()));
            Some(members.map(|registered| registered.node).collect())
        }
        Ok(_) | Err(_) => {
            findings.push(Finding::broken(
                "etcd quorum",
                &places,
                format!(
                    "there is no leader: {} of the {} members named here answer, and more than half of all have to",
                    up.len(),
                    config.endpoints.len()
                ),
                "start the members that are away, or bring their machines back; nothing is placed anew until then",
            ));
            None
        }
    };
    if nodes.is_some()
        && let Ok(listed) = in_time(ASK_MAX, client.member_list()).await
        && listed.members().len() > config.endpoints.len()
    {
        findings.push(Finding::warning(
            "etcd members",
            "node.etcd",
            format!("{} of {} members are named", config.endpoints.len(), listed.members().len()),
            "name all, so that another is asked when one is away",
        ));
    }
    findings.extend(alarms(&mut client, &places).await);
    Examined { findings, nodes }
}

fn of_version(endpoint: &str, version: &str) -> Finding {
    let mut parts = version.split('.').map_while(|part| part.parse::<u32>().ok());
    let number = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    if number >= OLDEST {
        return Finding::ok("etcd", endpoint, format!("it answers, version {version}"));
    }
    let found = format!("version {version}, and 3.4 or newer was tried");
    Finding::warning("etcd", endpoint, found, "bring it up to date")
}

async fn alarms(client: &mut Client, places: &str) -> Vec<Finding> {
    let asked = client.alarm(AlarmAction::Get, AlarmType::None, None);
    let alarms = match in_time(ASK_MAX, asked).await {
        Ok(answer) => answer.alarms().iter().map(|one| (one.member_id(), one.alarm())).collect(),
        // Without a leader nobody knows, which was said.
        Err(_) => Vec::new(),
    };
    let finding = |(member, alarm): &(u64, AlarmType)| match alarm {
        AlarmType::Nospace => Finding::broken(
            "etcd alarm",
            format!("{places}, member {member:x}"),
            "NOSPACE: its database has reached its quota, and it takes no writes: nodes lose their leases",
            "run `etcdctl compact` and `etcdctl defrag`, raise --quota-backend-bytes if it is really needed, then `etcdctl alarm disarm`",
        ),
        other => Finding::broken(
            "etcd alarm",
            format!("{places}, member {member:x}"),
            format!("{other:?}"),
            "take this member out and put an empty one in its place",
        ),
    };
    if alarms.is_empty() {
        return vec![Finding::ok("etcd alarm", places, "none")];
    }
    alarms.iter().map(finding).collect()
}
