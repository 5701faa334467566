//! `cargo xtask test`: every check and test, in order of how soon each can fail.

use std::io::{BufRead as _, BufReader, Read};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::{Failure, codegen, console, packages, root, run, run_in, say, target, tidy};

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
    // Their client, balancers with the module for streams, and what makes zones and cuts them off.
    let stream = "/usr/lib/nginx/modules/ngx_stream_module.so";
    let beside = ["mosquitto_sub", "nginx", stream, "haproxy", "ip", "nft"];
    packages::ensure(&[packages::SERVERS, beside.as_slice()].concat())?;
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
    let program = target().join("debug/fieldline");
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
    let data = target().join("browser-test");
    let _absent = std::fs::remove_dir_all(&data);
    let mut server = Command::new(target().join("debug/fieldline"))
        .args([
            "up",
            "--demo",
            "--demo-free-ports",
            "--http",
            "127.0.0.1:0",
            "--mqtt",
            "127.0.0.1:0",
            "--data",
        ])
        .arg(&data)
        .env_remove("FIELDLINE_ADMIN_TOKEN")
        .env("RUST_LOG", "warn")
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start the program: {error}"))?;
    let output = server.stdout.take().ok_or("the program has no output")?;
    let result = read_start(output).and_then(|(url, link, token)| {
        let environment = [
            ("FIELDLINE_URL", url.as_str()),
            ("FIELDLINE_LINK", link.as_str()),
            ("FIELDLINE_TOKEN", token.as_str()),
        ];
        run_in(&root().join("console"), "npm", ["run", "--silent", "e2e"], &environment)
    });
    let stopped = server.kill().and_then(|()| server.wait());
    result?;
    stopped.map_err(|error| format!("cannot stop the program: {error}"))?;
    let _gone = std::fs::remove_dir_all(&data);
    Ok(())
}

/// Address, one-time link and API token of what the first start prints.
fn read_start(output: impl Read) -> Result<(String, String, String), Failure> {
    let (mut url, mut link, mut token) = (None, None, None);
    for line in BufReader::new(output).lines() {
        let line = line.map_err(|error| format!("reading what the program prints: {error}"))?;
        let last = line.split_whitespace().last().unwrap_or_default().to_owned();
        match line.trim_start() {
            text if text.starts_with("Console") => {
                url = Some(last.trim_end_matches('/').to_owned())
            }
            text if text.starts_with("Sign in") => link = Some(last),
            text if text.starts_with("API token") => token = Some(last),
            text if text.starts_with("Data") => break,
            _ => {}
        }
    }
    url.zip(link)
        .zip(token)
        .map(|((url, link), token)| (url, link, token))
        .ok_or_else(|| "the program did not say where it is".to_owned())
}
