//! Automation of the repository: `cargo xtask up|cluster|test|bench|codegen`.

mod bench;
mod cluster;
mod codegen;
mod console;
mod packages;
mod tests;
mod tidy;

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// What went wrong, in a sentence for the person who ran the command.
pub(crate) type Failure = String;

const HELP: &str = "\
cargo xtask COMMAND

  up [ARGS…]         build everything and start Fieldline; ARGS go to `fieldline up` (try --demo)
  cluster            start a whole cluster with a fleet on this machine, to look at and to break
  test [STEP…]       run every check and test, or only the steps named
  bench [NAME…]      run the measurements of bench/, or only those named
  codegen [--check]  write what is generated from code; --check fails if it differs
  tidy               check file lengths, links and forbidden words
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (command, rest) = match args.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("help", [].as_slice()),
    };
    // What builds the program needs.
    let builds = ["up", "cluster", "test", "bench", "codegen"].contains(&command);
    let ready = if builds { packages::ensure(packages::FOR_BUILD) } else { Ok(()) };
    let result = ready.and_then(|()| match command {
        "up" => up(rest),
        "cluster" => cluster::start(),
        "test" => tests::run_steps(rest),
        "bench" => bench::run_all(rest),
        "codegen" => codegen::run(rest.iter().any(|arg| arg == "--check")),
        "tidy" => tidy::run(),
        "help" | "--help" | "-h" => {
            say(HELP);
            Ok(())
        }
        other => Err(format!("there is no command `{other}`\n\n{HELP}")),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            say(&format!("xtask {command}: {failure}"));
            ExitCode::FAILURE
        }
    }
}

/// Builds everything, then becomes `fieldline up`.
fn up(args: &[String]) -> Result<(), Failure> {
    console::build()?;
    run("cargo", ["build", "--release", "--locked", "--package", "fieldline"])?;
    let program = target().join("release/fieldline");
    use std::os::unix::process::CommandExt as _;
    let error = Command::new(&program).arg("up").args(args).exec();
    Err(format!("cannot start {}: {error}", program.display()))
}

/// Prints a line for the person at the terminal.
pub(crate) fn say(text: &str) {
    // Nothing can be done about a closed terminal.
    let _closed = writeln!(std::io::stderr(), "{text}");
}

/// The repository's root.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(PathBuf::new, Path::to_owned)
}

/// Where cargo puts what it builds.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Runs a program in the repository's root; its output goes to the terminal.
pub(crate) fn run<S: AsRef<OsStr>>(
    program: &str,
    args: impl IntoIterator<Item = S>,
) -> Result<(), Failure> {
    run_in(&root(), program, args, &[])
}

/// Runs a program in `folder` with additional environment variables.
pub(crate) fn run_in<S: AsRef<OsStr>>(
    folder: &Path,
    program: &str,
    args: impl IntoIterator<Item = S>,
    environment: &[(&str, &str)],
) -> Result<(), Failure> {
    let args: Vec<_> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
    let shown = args.iter().map(|arg| arg.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let status = Command::new(program)
        .args(&args)
        .current_dir(folder)
        .envs(environment.iter().copied())
        .status()
        .map_err(|error| format!("cannot run `{program}`: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("`{program} {shown}` ended with {status}")) }
}

/// What a program prints, or `None` if it cannot be run or fails.
pub(crate) fn output(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).current_dir(root()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}
