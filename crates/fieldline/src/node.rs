//! `fieldline serve`: what makes a process one node of a cluster.

use async_trait::async_trait;
use clap::ValueEnum;
use fieldline_contracts::{ChannelControl, ChannelStatus, ConnectionInfo};
use fieldline_etcd::Config as EtcdConfig;
use fieldline_model::{AccountId, ChannelId, ConnectionId};
use serde::Deserialize;

use crate::cli::ServeArgs;
use crate::config::Config;

/// What a node does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// Holds connections of devices
    Gateway,
    /// Serves the API, the live feed and the console
    Rest,
    /// Serves MQTT clients
    Mqtt,
}

impl Role {
    /// All, which is what a node does that is not told otherwise.
    pub(crate) const ALL: [Self; 3] = [Self::Gateway, Self::Rest, Self::Mqtt];

    /// As it is given on the command line and seen in the cluster.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Rest => "rest",
            Self::Mqtt => "mqtt",
        }
    }
}

/// `[node]`: this process among others.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct NodeConfig {
    /// Its name, unique and the same after a restart. Default: the name of the machine.
    pub(crate) name: String,
    /// Where other nodes reach it.
    pub(crate) address: String,
    /// The zone of failure that it is in.
    pub(crate) zone: Option<String>,
    /// Members of etcd, such as `http://10.0.0.1:2379`.
    pub(crate) etcd: Vec<String>,
    /// Before all keys in etcd. Default `fieldline/`.
    pub(crate) etcd_prefix: String,
    /// Name at etcd, where it asks for one.
    pub(crate) etcd_user: Option<String>,
    /// Password at etcd.
    pub(crate) etcd_password: Option<String>,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            address: String::new(),
            zone: None,
            etcd: Vec::new(),
            etcd_prefix: "fieldline/".to_owned(),
            etcd_user: None,
            etcd_password: None,
        }
    }
}

impl NodeConfig {
    /// How the cluster is reached.
    pub(crate) fn etcd(&self) -> EtcdConfig {
        EtcdConfig {
            prefix: self.etcd_prefix.clone(),
            user: self.etcd_user.clone().zip(self.etcd_password.clone()),
            ..EtcdConfig::new(self.etcd.clone())
        }
    }

    /// Checks what types cannot.
    pub(crate) fn check(&self, check: &mut impl FnMut(bool, String)) {
        // Exhaustive on purpose: a new key does not compile until it is judged here.
        let Self { name, address: _, zone: _, etcd, etcd_prefix, etcd_user, etcd_password } = self;
        check(
            (1..=128).contains(&name.len()) && !name.contains(['/', '\n']),
            "node.name must have 1 to 128 bytes and no `/`".to_owned(),
        );
        check(
            !etcd.is_empty(),
            "node.etcd is missing: name the members of etcd, such as [\"http://10.0.0.1:2379\"]"
                .to_owned(),
        );
        check(etcd_prefix.ends_with('/'), "node.etcd_prefix must end with `/`".to_owned());
        check(
            etcd_user.is_some() == etcd_password.is_some(),
            "node.etcd_user and node.etcd_password belong together: set both, or neither"
                .to_owned(),
        );
    }
}

/// Takes over what the command line says, and the name of the machine.
///
/// # Errors
///
/// A sentence about what a cluster cannot do without.
pub(crate) fn complete(mut config: Config, args: &ServeArgs) -> Result<Config, String> {
    let Some(node) = &mut config.node else {
        return Err(format!(
            "`{}` has no section `node`: add it with `etcd = [\"http://HOST:2379\"]`, or start everything in one process with `fieldline up`",
            args.config.display()
        ));
    };
    if let Some(name) = &args.node {
        node.name.clone_from(name);
    }
    config.http.listen = args.http.unwrap_or(config.http.listen);
    config.mqtt.listen = args.mqtt.unwrap_or(config.mqtt.listen);
    Ok(config)
}

/// Stands for channels on a node that holds none: its gateways are other nodes.
pub(crate) struct NoGateway;

#[async_trait]
impl ChannelControl for NoGateway {
    async fn status(&self, _account: AccountId, _channel: ChannelId) -> ChannelStatus {
        let error = "this node holds no channels: ask one that has the role gateway".to_owned();
        ChannelStatus { error: Some(error), ..ChannelStatus::default() }
    }

    async fn connections(&self, _account: AccountId, _channel: ChannelId) -> Vec<ConnectionInfo> {
        Vec::new()
    }

    async fn close(&self, _: AccountId, _: ChannelId, _: ConnectionId) -> bool {
        false
    }

    async fn opened(&self) -> bool {
        true
    }

    async fn problems(&self) -> Vec<String> {
        Vec::new()
    }
}
