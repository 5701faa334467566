//! `cargo xtask cluster`: servers, three nodes, a balancer and a fleet on this machine, to look at and to break.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use crate::{Failure, console, packages, root, run, target};

/// Builds everything, then becomes the cluster: an example of the testkit, which starts servers as tests do.
pub(crate) fn start() -> Result<(), Failure> {
    let balancer = ["nginx", "/usr/lib/nginx/modules/ngx_stream_module.so"];
    packages::ensure(&[packages::SERVERS, balancer.as_slice()].concat())?;
    console::build()?;
    run("cargo", ["build", "--release", "--locked", "--package", "fieldline"])?;
    let example = ["--package", "fieldline-testkit", "--features", "s3", "--example", "cluster"];
    run("cargo", [["build", "--locked"].as_slice(), &example].concat())?;
    let program = target().join("debug/examples/cluster");
    // It is this process from here on: Ctrl-C reaches it, and it ends what it started in order.
    let error = Command::new(&program)
        .arg(target().join("release/fieldline"))
        .arg(root().join("deploy"))
        .arg(target().join("cluster"))
        .exec();
    Err(format!("cannot start {}: {error}", program.display()))
}
