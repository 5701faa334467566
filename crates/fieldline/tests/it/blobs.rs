//! Object storage under the program: starts that cannot be, and storage that goes away.

use std::process::Command;

use fieldline_testkit::servers::S3;

use crate::server::{Server, wait_for};

fn section(server: &S3, secret: &str, bucket: &str) -> String {
    let (key, _) = server.key();
    format!(
        "[blobs]\nurl = \"s3://{bucket}/fieldline\"\nendpoint = \"{}\"\naccess_key_id = \"{key}\"\nsecret_access_key = \"{secret}\"\nlook_every = \"200ms\"\ntimeout = \"1s\"\nretry_for = \"0s\"\n",
        server.endpoint()
    )
}

/// What is wrong with the storage ends the start with a sentence, and the doctor says the same.
#[test]
fn wrong_storage_ends_the_start_and_is_found_by_the_doctor() {
    let (server, data) = (S3::start(), tempfile::tempdir().unwrap());
    let (_, secret) = server.key();
    let config = data.path().join("config.toml");
    let folder = data.path().join("data");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fieldline"));
        command.args(arguments).arg("--config").arg(&config).arg("--data").arg(&folder);
        let ended = command.env("RUST_LOG", "warn").output().unwrap();
        let said = [ended.stdout, ended.stderr].concat();
        (ended.status.code(), String::from_utf8_lossy(&said).into_owned())
    };
    let both = format!("{}directory = \"/blobs\"\n", section(&server, secret, "fieldline"));
    for (text, remedy) in [
        (section(&server, "another", "fieldline"), "blobs.secret_access_key"),
        (section(&server, secret, "another"), "make it, or name another in blobs.url"),
        (both, "are both set"),
    ] {
        std::fs::write(&config, text).unwrap();
        let (code, said) =
            run(&["up", "--no-master", "--http", "127.0.0.1:0", "--mqtt", "127.0.0.1:0"]);
        assert_eq!(code, Some(78), "{said}");
        assert!(said.contains(remedy), "{said}");
        let (code, said) = run(&["doctor"]);
        assert!(code != Some(0) && said.contains(remedy), "{said}");
    }
}

/// Storage that goes away while the program runs is a warning, and no more.
#[test]
fn storage_that_is_away_is_a_warning() {
    let (mut server, data) = (S3::start(), tempfile::tempdir().unwrap());
    let config = data.path().join("config.toml");
    std::fs::write(&config, section(&server, server.key().1, "fieldline")).unwrap();
    let config = config.to_str().unwrap();
    let program = Server::start(&data.path().join("data"), &["--config", config]);
    let ready = |warned: bool| {
        let what = if warned { "the warning" } else { "the warning to go" };
        wait_for(what, || {
            let ready = program.ask("GET", "/readyz", None);
            let warnings = ready["warnings"].to_string();
            assert_eq!(ready["ready"], true, "{ready}");
            (warnings.contains("blobs") == warned).then_some(())
        });
    };
    ready(false);
    server.process.kill();
    ready(true);
    server.restart();
    ready(false);
    program.stop();
}
