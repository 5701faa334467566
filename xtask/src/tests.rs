//! `cargo xtask test`: every check and test, in order of how soon each can fail.

use std::time::Instant;

use crate::{Failure, codegen, console, packages, root, run, run_in, say, tidy};

type Step = (&'static str, &'static str, fn() -> Result<(), Failure>);

const STEPS: &[Step] = &[
    ("fmt", "formatting", fmt),
    ("tidy", "file lengths, links, words", tidy::run),
    ("console", "console: build, types, unit tests", console_tests),
    ("clippy", "lints", clippy),
    ("deny", "licences, sources, direction of crates", deny),
    ("rust", "Rust tests", rust),
    ("doc", "documentation", doc),
    ("codegen", "generated files", || codegen::run(true)),
    ("vectors", "protocol vectors and sessions", vectors),
    ("browser", "console in Chromium", browser),
];

/// Runs the steps named, or all.
pub(crate) fn run_steps(names: &[String]) -> Result<(), Failure> {
    for name in names {
        if !STEPS.iter().any(|(step, ..)| step == name) {
            let all: Vec<&str> = STEPS.iter().map(|(step, ..)| *step).collect();
            return Err(format!("there is no step `{name}`; there are {}", all.join(", ")));
        }
    }
    let began = Instant::now();
    for (name, title, step) in STEPS {
        if !names.is_empty() && !names.iter().any(|wanted| wanted == name) {
            continue;
        }
        say(&format!("\n── {name}: {title}"));
        let step_began = Instant::now();
        step().map_err(|failure| {
            format!("step `{name}` failed: {failure}\nrun it alone with: cargo xtask test {name}")
        })?;
        say(&format!("── {name}: ok in {:.0} s", step_began.elapsed().as_secs_f32()));
    }
    say(&format!("\nall steps passed in {:.0} s", began.elapsed().as_secs_f32()));
    if vectors_folder().is_none() {
        say(
            "VECTORS ABSENT: the device vectors were not found, so protocols were tested on their own examples only.",
        );
        say("Set FIELDLINE_VECTORS to their folder, or put it at ../shared/vectors.");
        if std::env::var_os("CI").is_some() {
            return Err("the vectors must be present where CI is set".to_owned());
        }
    }
    Ok(())
}

fn fmt() -> Result<(), Failure> {
    run("cargo", ["fmt", "--all", "--check"])
}

fn clippy() -> Result<(), Failure> {
    run(
        "cargo",
        [
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--quiet",
            "--",
            "--deny",
            "warnings",
        ],
    )
}

fn deny() -> Result<(), Failure> {
    packages::ensure_cargo("deny")?;
    // Advisories change without us: they are for a nightly run, not for a gate.
    run(
        "cargo",
        ["deny", "--log-level", "error", "--all-features", "check", "bans", "licenses", "sources"],
    )
}

fn rust() -> Result<(), Failure> {
    packages::ensure(&["mosquitto_sub", "psql", "nginx"])?;
    packages::ensure_cargo("nextest")?;
    run("cargo", ["nextest", "run", "--workspace", "--locked", "--no-fail-fast"])
}

fn doc() -> Result<(), Failure> {
    let environment = [("RUSTDOCFLAGS", "--deny warnings")];
    run_in(
        &root(),
        "cargo",
        ["doc", "--workspace", "--no-deps", "--locked", "--quiet"],
        &environment,
    )
}

fn console_tests() -> Result<(), Failure> {
    console::install()?;
    console::build()?;
    let folder = root().join("console");
    run_in(&folder, "npm", ["run", "--silent", "check"], &[])?;
    run_in(&folder, "npm", ["test", "--silent"], &[])
}

/// The device vectors' folder, if it is there.
fn vectors_folder() -> Option<std::path::PathBuf> {
    let folder = std::env::var_os("FIELDLINE_VECTORS")
        .map_or_else(|| root().join("../shared/vectors"), std::path::PathBuf::from);
    folder.join("telematics.json").is_file().then_some(folder)
}

/// Runs the vectors by the program, as a user does.
fn vectors() -> Result<(), Failure> {
    run("cargo", ["build", "--package", "fieldline", "--locked", "--quiet"])?;
    let program = crate::target().join("debug/fieldline");
    let program = program.to_string_lossy();
    for protocol in ["protocols/teltonika", "protocols/wialon_ips"] {
        run(&program, ["protocol", "test", protocol])?;
    }
    let Some(folder) = vectors_folder() else { return Ok(()) };
    let file = |name: &str| folder.join(name).to_string_lossy().into_owned();
    run(
        &program,
        [
            "protocol",
            "test",
            "--protocol",
            "teltonika",
            "--protocol",
            "wialon_ips",
            "--vectors",
            &file("telematics.json"),
            "--sessions",
            &file("sessions.json"),
        ],
    )
}

/// Runs the console's tests in Chromium against the program with its demo fleet.
fn browser() -> Result<(), Failure> {
    packages::ensure(&["chromium"])?;
    console::install()?;
    run("cargo", ["build", "--package", "fieldline", "--locked", "--quiet"])?;
    let program = crate::target().join("debug/fieldline");
    let environment = [("FIELDLINE_PROGRAM", program.to_string_lossy().into_owned())];
    let environment: Vec<(&str, &str)> =
        environment.iter().map(|(k, v)| (*k, v.as_str())).collect();
    run_in(&root().join("console"), "npm", ["run", "--silent", "e2e"], &environment)
}
