//! Programs that tests and builds need, installed where they are missing.

use std::path::Path;

use crate::{Failure, output, run, say};

/// Debian packages by the program or file that shows they are there.
const DEBIAN: &[(&str, &str)] = &[
    ("mosquitto_sub", "mosquitto-clients"),
    ("mosquitto", "mosquitto"),
    ("chromium", "chromium"),
    ("nginx", "nginx-light"),
    ("/usr/lib/nginx/modules/ngx_stream_module.so", "libnginx-mod-stream"),
    ("haproxy", "haproxy"),
    ("psql", "postgresql"),
    ("redis-server", "redis-server"),
    ("etcd", "etcd-server"),
    ("patroni", "patroni"),
    ("/usr/lib/python3/dist-packages/etcd/__init__.py", "python3-etcd"),
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("protoc", "protobuf-compiler"),
    ("/usr/include/google/protobuf/descriptor.proto", "libprotobuf-dev"),
    ("wrk", "wrk"),
];

/// The servers that a cluster stands on.
pub(crate) const SERVERS: &[&str] = &[
    "etcd",
    "psql",
    "patroni",
    "/usr/lib/python3/dist-packages/etcd/__init__.py",
    "redis-server",
    "mosquitto",
];

/// What builds the program needs: the client of etcd is made from its protocol's description.
pub(crate) const FOR_BUILD: &[&str] = &["protoc", "/usr/include/google/protobuf/descriptor.proto"];

/// Whether a program can be found: on the path, or where Debian keeps servers.
pub(crate) fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain([Path::new("/usr/sbin").to_owned()]);
    folders.into_iter().any(|folder| folder.join(program).is_file())
}

/// Installs the Debian packages behind `programs` where they are missing.
pub(crate) fn ensure(programs: &[&str]) -> Result<(), Failure> {
    let missing: Vec<&str> = DEBIAN
        .iter()
        .filter(|(program, _)| programs.contains(program) && !is_there(program))
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    say(&format!("installing {}", missing.join(", ")));
    let root = output("id", &["-u"]).is_some_and(|id| id.trim() == "0");
    let install = |command: &[&str]| {
        let environment = [("DEBIAN_FRONTEND", "noninteractive")];
        let (program, args) = if root { ("apt-get", command) } else { ("sudo", command) };
        let args = if root { args.to_vec() } else { [&["apt-get"], args].concat() };
        crate::run_in(&crate::root(), program, args, &environment)
    };
    let asked = |failure| {
        format!("{failure}; install these packages by hand and run again: {}", missing.join(" "))
    };
    install(&["update", "--quiet"]).map_err(asked)?;
    let command =
        [&["install", "--yes", "--quiet", "--no-install-recommends"], missing.as_slice()].concat();
    install(&command).map_err(asked)?;
    // Debian starts servers as it installs them; tests start their own.
    for service in
        ["haproxy", "mosquitto", "nginx", "patroni", "postgresql", "redis-server", "etcd"]
    {
        let _not_running = output("service", &[service, "stop"]);
    }
    Ok(())
}

/// Installs a cargo subcommand where it is missing.
pub(crate) fn ensure_cargo(subcommand: &str) -> Result<(), Failure> {
    if output("cargo", &[subcommand, "--version"]).is_some() {
        return Ok(());
    }
    let package = format!("cargo-{subcommand}");
    say(&format!("installing {package}"));
    run("cargo", ["install", "--locked", package.as_str()])
}

/// Checks that Node.js can build the console.
pub(crate) fn ensure_node() -> Result<(), Failure> {
    let version = output("node", &["--version"]).unwrap_or_default();
    let major = version
        .trim()
        .trim_start_matches('v')
        .split('.')
        .next()
        .and_then(|n| n.parse::<u32>().ok());
    match major {
        Some(20..) if is_there("npm") => Ok(()),
        _ => Err(format!(
            "the console needs Node.js 20 or later with npm, found {}; install it and run again",
            if version.is_empty() { "none" } else { version.trim() }
        )),
    }
}
