//! The first start, the next ones, and starts that cannot be.

use std::process::{Command, Output};

use serde_json::json;

use crate::server::{Server, TOKEN, free_port, request, wait_for};

/// Runs the program to its end.
fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fieldline"))
        .args(args)
        .env("RUST_LOG", "warn")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn the_first_start_prints_a_link_that_works_once() {
    let data = tempfile::tempdir().unwrap();
    let log = data.path().join("out");
    let folder = data.path().join("data");
    let (http, mqtt) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
    let mut program = Command::new(env!("CARGO_BIN_EXE_fieldline"))
        .args(["up", "--http", &http, "--mqtt", &mqtt, "--no-master", "--data"])
        .arg(&folder)
        .env_remove("FIELDLINE_ADMIN_TOKEN")
        .stdout(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let printed = wait_for("what the start prints", || {
        let text = std::fs::read_to_string(&log).ok()?;
        text.contains("Data").then_some(text)
    });
    let after = |mark: &str| {
        let rest = printed.split(mark).nth(1).unwrap_or_else(|| panic!("no {mark} in: {printed}"));
        rest.split_whitespace().next().unwrap().to_owned()
    };
    let (secret, token) = (after("link="), after("API token"));
    let (status, me) = request(&http, &token, "GET", "/api/v1/auth/me", None).unwrap();
    assert_eq!((status, me["account"]["name"].as_str()), (200, Some("default")), "{me}");
    let link = json!({ "secret": secret });
    let redeem = || request(&http, "", "POST", "/api/v1/auth/link", Some(&link)).unwrap().0;
    assert_eq!(redeem(), 200);
    assert!((400..500).contains(&redeem()), "the link worked twice");
    program.kill().unwrap();
    program.wait().unwrap();
}

#[test]
fn wrong_settings_end_the_start_with_a_sentence() {
    let data = tempfile::tempdir().unwrap();
    let config = data.path().join("config.toml");
    std::fs::write(&config, "[http]\nlistn = 1\n").unwrap();
    let folder = data.path().join("data");
    let (folder, config) = (folder.to_str().unwrap(), config.to_str().unwrap());
    let ended = run(&["up", "--data", folder, "--config", config]);
    let said = text(&ended.stderr);
    assert_eq!(ended.status.code(), Some(78), "{said}");
    assert!(said.contains("listn") && said.contains("line 2"), "{said}");

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ended = run(&["up", "--data", folder, "--http", &address]);
    let said = text(&ended.stderr);
    assert_eq!(ended.status.code(), Some(78), "{said}");
    assert!(said.contains(&address) && said.contains("http.listen"), "{said}");
}

#[test]
fn a_clean_end_keeps_everything() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start(data.path(), &[]);
    server.ask("POST", "/api/v1/devices", Some(&json!({ "name": "Van 1", "ident": "v1" })));
    server.stop();
    let server = Server::start(data.path(), &[]);
    assert!(server.device("v1").is_some());
    let ctl = run(&[
        "ctl",
        "--url",
        &format!("http://{}", server.http),
        "--token",
        TOKEN,
        "list",
        "devices",
    ]);
    assert!(ctl.status.success() && text(&ctl.stdout).contains("Van 1"), "{ctl:?}");
    let refused = run(&[
        "ctl",
        "--url",
        &format!("http://{}", server.http),
        "--token",
        "flt_wrong",
        "list",
        "devices",
    ]);
    assert!(!refused.status.success() && text(&refused.stderr).contains("401"), "{refused:?}");
}

/// A channel that cannot listen is a warning, and no reason to wait.
#[test]
fn a_channel_that_cannot_listen_holds_no_start_up() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start(data.path(), &[]);
    let (id, port) = server.channel("teltonika", "tcp", json!({}));
    server.stop();
    let _taken = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let began = std::time::Instant::now();
    let server = Server::start(data.path(), &[]);
    let ready = server.ask("GET", "/readyz", None);
    assert!(began.elapsed() < std::time::Duration::from_secs(9), "{:?}", began.elapsed());
    assert!(ready["warnings"][0].as_str().unwrap().contains(&id), "{ready}");
}

/// The registry is whole in its file after a clean end, and a loss of changes ends the start.
#[test]
fn a_registry_that_lost_changes_is_refused() {
    let data = tempfile::tempdir().unwrap();
    let (file, journal) = (data.path().join("registry.db"), data.path().join("registry.db-wal"));
    let bytes = |path: &std::path::Path| path.metadata().map_or(0, |meta| meta.len());
    let server = Server::start(data.path(), &[]);
    server.ask("POST", "/api/v1/devices", Some(&json!({ "name": "Van 1", "ident": "v1" })));
    server.stop();
    assert_eq!(bytes(&journal), 0);
    assert!(bytes(&file) > 4_096, "{}", bytes(&file));

    let server = Server::start(data.path(), &[]);
    server.ask("POST", "/api/v1/devices", Some(&json!({ "name": "Van 2", "ident": "v2" })));
    let before = std::fs::read(&file).unwrap();
    server.kill();
    // As from before the last change.
    std::fs::write(&file, before).unwrap();
    std::fs::write(&journal, b"").unwrap();
    let path = data.path().to_str().unwrap();
    let ended = run(&["up", "--data", path, "--http", "127.0.0.1:0", "--mqtt", "127.0.0.1:0"]);
    let said = text(&ended.stderr);
    assert_eq!(ended.status.code(), Some(78), "{said}");
    assert!(said.contains("registry.db ends at change") && said.contains("backup"), "{said}");
}

#[test]
fn the_demo_moves() {
    let data = tempfile::tempdir().unwrap();
    let server =
        Server::start(data.path(), &["--demo", "--demo-devices", "8", "--demo-free-ports"]);
    let positions = || {
        let path = "/api/v1/state?params=position.latitude,position.longitude";
        let items = server.list(path);
        let moving = items.iter().filter(|item| {
            item["online"] == true && item["values"]["position.latitude"].is_object()
        });
        moving.map(|item| item["values"].to_string()).collect::<Vec<_>>()
    };
    let first =
        wait_for("all vehicles on the map", || Some(positions()).filter(|all| all.len() >= 8));
    wait_for("movement", || (positions() != first).then_some(()));
    let protocols: std::collections::BTreeSet<String> = server
        .list("/api/v1/channels")
        .iter()
        .filter(|channel| channel["status"]["connections"].as_u64() > Some(0))
        .map(|channel| format!("{} {}", channel["protocol"], channel["transport"]))
        .collect();
    assert!(protocols.len() >= 4, "both protocols over TCP and UDP, found {protocols:?}");
    server.stop();
}
