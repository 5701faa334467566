//! Builds the web console.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

use crate::{Failure, packages, root, run_in, say};

/// Builds `console/dist` where it is missing or older than its sources.
pub(crate) fn build() -> Result<(), Failure> {
    let folder = root().join("console");
    let built = modified(&folder.join("dist/index.html"));
    let sources =
        ["src", "public", "index.html", "package.json", "package-lock.json", "vite.config.ts"];
    let newest = sources.iter().filter_map(|name| newest(&folder.join(name))).max();
    if built.is_some() && built >= newest {
        return Ok(());
    }
    install()?;
    say("building the console");
    run_in(&folder, "npm", ["run", "--silent", "build"], &[])
}

/// Installs what the console is built with where the lock file has changed.
pub(crate) fn install() -> Result<(), Failure> {
    packages::ensure_node()?;
    let folder = root().join("console");
    if modified(&folder.join("node_modules/.package-lock.json"))
        >= modified(&folder.join("package-lock.json"))
    {
        return Ok(());
    }
    run_in(&folder, "npm", ["ci", "--no-audit", "--no-fund", "--silent"], &[])
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|meta| meta.modified()).ok()
}

/// The newest change of a file or anything below a folder.
fn newest(path: &Path) -> Option<SystemTime> {
    let Ok(entries) = fs::read_dir(path) else { return modified(path) };
    entries.filter_map(|entry| newest(&entry.ok()?.path())).max()
}
