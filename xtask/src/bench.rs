//! `cargo xtask bench`: runs the scripts of `bench/`.

use crate::{Failure, packages, root, run, say};

/// Runs the scripts named, or all in order of their names.
pub(crate) fn run_all(names: &[String]) -> Result<(), Failure> {
    packages::ensure(&["psql", "nginx", "wrk", "mosquitto_sub"])?;
    let folder = root().join("bench");
    let entries =
        std::fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut scripts: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter_map(|name| name.strip_suffix(".sh").map(str::to_owned))
        .collect();
    scripts.sort();
    if let Some(unknown) = names.iter().find(|name| !scripts.contains(name)) {
        return Err(format!("there is no bench/{unknown}.sh; there are {}", scripts.join(", ")));
    }
    for script in scripts.iter().filter(|script| names.is_empty() || names.contains(script)) {
        say(&format!("\n── {script}"));
        run("bash", [format!("bench/{script}.sh")])?;
    }
    Ok(())
}
