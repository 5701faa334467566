//! `fieldline serve`: what makes a process one node of a cluster.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::ValueEnum;
use fieldline_etcd::{Config as EtcdConfig, Tls as EtcdTls};
use fieldline_router::calls::PORT;
use fieldline_runtime::mutual_tls::MutualTlsFiles;
use serde::Deserialize;

use crate::between;
use crate::cli::ServeArgs;
use crate::config::{Config, check_file};

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
#[derive(Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct NodeConfig {
    /// Its name, unique and the same after a restart. Default: the name of the machine.
    pub(crate) name: String,
    /// Address to listen on for other nodes. Default `127.0.0.1:7080`, which is for nodes on one machine.
    pub(crate) listen: SocketAddr,
    /// Where other nodes reach it, such as `https://10.0.0.1:7080`. Default: where it listens; if that is all addresses, its
    /// name.
    pub(crate) address: String,
    /// PEM file of the authority that issues the certificates of all nodes.
    pub(crate) ca: Option<PathBuf>,
    /// PEM file of this node's certificate chain; it names `name`.
    pub(crate) certificate: Option<PathBuf>,
    /// PEM file of its private key.
    pub(crate) key: Option<PathBuf>,
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
    /// With `https://`: PEM file with the certificates of those who sign etcd's.
    pub(crate) etcd_ca: Option<PathBuf>,
    /// PEM file with this node's certificate, where etcd asks for one. Needs `etcd_key`.
    pub(crate) etcd_certificate: Option<PathBuf>,
    /// PEM file with the key of that.
    pub(crate) etcd_key: Option<PathBuf>,
}

impl std::fmt::Debug for NodeConfig {
    /// Without the password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NodeConfig({}, {})", self.name, self.etcd.join(", "))
    }
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            listen: SocketAddr::from(([127, 0, 0, 1], PORT)),
            address: String::new(),
            ca: None,
            certificate: None,
            key: None,
            zone: None,
            etcd: Vec::new(),
            etcd_prefix: "fieldline/".to_owned(),
            etcd_user: None,
            etcd_password: None,
            etcd_ca: None,
            etcd_certificate: None,
            etcd_key: None,
        }
    }
}

impl NodeConfig {
    /// How the cluster is reached. Reads files.
    ///
    /// # Errors
    ///
    /// A sentence about a file that cannot be read.
    pub(crate) fn etcd(&self) -> Result<EtcdConfig, String> {
        let read = |key: &str, path: &PathBuf| {
            std::fs::read(path).map_err(|error| {
                let path = path.display();
                format!("node.{key}: `{path}` cannot be read ({error}); correct the path or its permissions")
            })
        };
        let identity = match (&self.etcd_certificate, &self.etcd_key) {
            (Some(certificate), Some(key)) => {
                Some((read("etcd_certificate", certificate)?, read("etcd_key", key)?))
            }
            _ => None,
        };
        let tls = match &self.etcd_ca {
            Some(ca) => Some(EtcdTls { authority: read("etcd_ca", ca)?, identity }),
            None => None,
        };
        Ok(EtcdConfig {
            prefix: self.etcd_prefix.clone(),
            user: self.etcd_user.clone().zip(self.etcd_password.clone()),
            tls,
            ..EtcdConfig::new(self.etcd.clone())
        })
    }

    /// The files by which nodes know each other, if there are any.
    pub(crate) fn tls_files(&self) -> Option<MutualTlsFiles> {
        let (ca, certificate) = (self.ca.clone()?, self.certificate.clone()?);
        Some(MutualTlsFiles { ca, certificate, key: self.key.clone()? })
    }

    /// What other nodes are told to reach this one by, which listens at `bound`.
    pub(crate) fn announced(&self, bound: SocketAddr) -> String {
        if self.address.is_empty() {
            let scheme = if self.ca.is_some() { "https" } else { "http" };
            between::announced(scheme, &self.name, bound)
        } else {
            self.address.clone()
        }
    }

    /// Checks what types cannot.
    pub(crate) fn check(&self, check: &mut impl FnMut(bool, String)) {
        // Exhaustive on purpose: a new key does not compile until it is judged here.
        let Self { name, listen, address, ca, certificate, key, zone: _, .. } = self;
        let Self { etcd, etcd_prefix, etcd_user, etcd_password, .. } = self;
        let Self { etcd_ca, etcd_certificate, etcd_key, .. } = self;
        let files = [("node.ca", ca), ("node.certificate", certificate), ("node.key", key)];
        let set = files.iter().filter(|(_, file)| file.is_some()).count();
        check(
            set == 0 || set == files.len(),
            "node.ca, node.certificate and node.key belong together: set all three".to_owned(),
        );
        for (key, file) in files {
            check_file(key, file.as_deref(), check);
        }
        check(
            set > 0 || (listen.ip().is_loopback() && is_of_this_machine(address)),
            "nodes on several machines know each other by certificates: make them with `fieldline certificates new-ca` and, for each node, `fieldline certificates issue --name NODE`, and set node.ca, node.certificate and node.key; or leave out node.address and let node.listen be a loopback address, for a trial on one machine".to_owned(),
        );
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
        check(
            !etcd.iter().any(|endpoint| endpoint.contains('@')),
            "node.etcd names addresses alone: give name and password as node.etcd_user and node.etcd_password"
                .to_owned(),
        );
        let plain = |endpoint: &String| endpoint.starts_with("http://");
        let secure = |endpoint: &String| endpoint.starts_with("https://");
        check(
            etcd.iter().all(|endpoint| plain(endpoint) || secure(endpoint)),
            "node.etcd: each begins with http:// or https://, such as http://10.0.0.1:2379"
                .to_owned(),
        );
        check(
            etcd_ca.is_some() || !etcd.iter().any(secure),
            "node.etcd_ca is missing: with https://, name the file of the certificates that signed etcd's".to_owned(),
        );
        check(
            etcd_ca.is_none() || !etcd.iter().any(plain),
            "node.etcd_ca is for https://, and node.etcd has http://: let all be one or the other"
                .to_owned(),
        );
        check(
            etcd_certificate.is_some() == etcd_key.is_some(),
            "node.etcd_certificate and node.etcd_key belong together: set both, or neither"
                .to_owned(),
        );
    }
}

/// Whether an address that is announced is one of this machine alone; an empty one says where it listens.
fn is_of_this_machine(address: &str) -> bool {
    let Ok(uri) = address.parse::<hyper::Uri>() else { return address.is_empty() };
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let loopback = host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
    host.is_empty() || host == "localhost" || loopback
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

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(node: &NodeConfig) -> Vec<String> {
        let mut problems = Vec::new();
        node.check(&mut |holds, problem| {
            if !holds {
                problems.push(problem);
            }
        });
        problems
    }

    fn node() -> NodeConfig {
        let etcd = vec!["http://127.0.0.1:2379".to_owned()];
        NodeConfig { name: "node-1".to_owned(), etcd, ..NodeConfig::default() }
    }

    #[test]
    fn nodes_on_several_machines_need_certificates() {
        assert_eq!(problems(&node()), Vec::<String>::new());
        for address in ["http://127.0.0.9:7080", "http://localhost:7080", "http://[::1]:7080"] {
            let node = NodeConfig { address: address.to_owned(), ..node() };
            assert_eq!(problems(&node), Vec::<String>::new(), "{address}");
        }
        let wide = NodeConfig { listen: "0.0.0.0:7080".parse().unwrap(), ..node() };
        let far = NodeConfig { address: "https://node-1:7080".to_owned(), ..node() };
        for node in [wide, far] {
            let said = problems(&node);
            assert!(said.len() == 1 && said[0].contains("issue --name NODE"), "{said:?}");
        }
    }

    #[test]
    fn certificates_come_as_three_files_that_are_there() {
        let said = problems(&NodeConfig { ca: Some("/nowhere/ca.pem".into()), ..node() });
        assert!(said.iter().any(|text| text.contains("belong together")), "{said:?}");
        assert!(said.iter().any(|text| text.contains("/nowhere/ca.pem")), "{said:?}");
    }

    #[test]
    fn a_node_is_reached_where_it_listens_unless_it_is_said() {
        let announced = |listen: &str, node: &NodeConfig| node.announced(listen.parse().unwrap());
        assert_eq!(announced("127.0.0.1:7081", &node()), "http://127.0.0.1:7081");
        let tls = NodeConfig { ca: Some("ca.pem".into()), ..node() };
        assert_eq!(announced("0.0.0.0:7080", &tls), "https://node-1:7080");
        assert_eq!(announced("[::]:7080", &tls), "https://node-1:7080");
        assert_eq!(announced("10.0.0.1:7080", &tls), "https://10.0.0.1:7080");
        let said = NodeConfig { address: "https://n:1".to_owned(), ..tls };
        assert_eq!(announced("0.0.0.0:7080", &said), "https://n:1");
    }
}
