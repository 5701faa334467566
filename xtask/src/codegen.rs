//! Files that are generated from code: written, or checked to be as they would be written.

use crate::{Failure, output, root, say, target};

/// File and the arguments of `fieldline` that print it.
const FILES: &[(&str, &[&str])] = &[
    ("docs/api/openapi.json", &["generate", "openapi"]),
    ("docs/reference/cli.md", &["generate", "cli"]),
    ("docs/reference/close-codes.md", &["generate", "close-codes"]),
    ("docs/reference/parameters.md", &["generate", "parameters"]),
];

/// Writes the files, or with `check` only compares them.
pub(crate) fn run(check: bool) -> Result<(), Failure> {
    crate::run("cargo", ["build", "--package", "fieldline", "--locked", "--quiet"])?;
    let program = target().join("debug/fieldline");
    let mut stale = Vec::new();
    for (name, args) in FILES {
        let made = output(&program.to_string_lossy(), args)
            .ok_or_else(|| format!("`fieldline {}` failed", args.join(" ")))?;
        let path = root().join(name);
        if std::fs::read_to_string(&path).is_ok_and(|there| there == made) {
            continue;
        }
        if check {
            stale.push(*name);
            continue;
        }
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)
                .map_err(|error| format!("{}: {error}", folder.display()))?;
        }
        std::fs::write(&path, made).map_err(|error| format!("{name}: {error}"))?;
        say(&format!("wrote {name}"));
    }
    if stale.is_empty() {
        Ok(())
    } else {
        Err(format!("out of date: {}; run cargo xtask codegen", stale.join(", ")))
    }
}
