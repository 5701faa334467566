//! The tools for protocols, by the command line.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn protocol(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fieldline")).arg("protocol").args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The folder of device vectors; where it is absent that is said, and is a failure where CI is set.
fn vectors() -> Option<PathBuf> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/vectors");
    let folder = std::env::var_os("FIELDLINE_VECTORS").map_or(default, PathBuf::from);
    if folder.join("telematics.json").is_file() {
        return Some(folder);
    }
    println!("VECTORS ABSENT: {} is not there, so they were not run", folder.display());
    assert!(std::env::var_os("CI").is_none(), "the vectors must be present where CI is set");
    None
}

#[test]
fn all_vectors_and_sessions_of_the_built_in_protocols_pass() {
    let Some(folder) = vectors() else { return };
    let (frames, sessions) = (folder.join("telematics.json"), folder.join("sessions.json"));
    let ended = protocol(&[
        "test",
        "--protocol",
        "teltonika",
        "--protocol",
        "wialon_ips",
        "--vectors",
        frames.to_str().unwrap(),
        "--sessions",
        sessions.to_str().unwrap(),
    ]);
    let printed = text(&ended.stdout);
    assert!(ended.status.success(), "{printed}{}", text(&ended.stderr));
    let last = printed.lines().last().unwrap();
    let passed: usize =
        last.strip_suffix(" passed, 0 failed").unwrap_or_else(|| panic!("{last}")).parse().unwrap();
    assert!(passed >= 56 + 65 + 7, "{last}");
}

#[test]
fn what_cannot_be_run_has_failed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vectors.json");
    for content in [
        r#"{"vectors": []}"#,
        r#"{"vectors": [{"id": "x-1", "protocol": "nobody", "transport": "tcp", "direction": "device", "kind": "data", "hex": "00", "count": 0, "expected": {}}]}"#,
    ] {
        std::fs::write(&file, content).unwrap();
        let ended = protocol(&["test", "--vectors", file.to_str().unwrap()]);
        assert!(!ended.status.success(), "{content}");
        assert!(
            text(&ended.stdout).trim_end().ends_with("0 passed, 1 failed"),
            "{}",
            text(&ended.stdout)
        );
    }
}

#[test]
fn bytes_are_decoded_and_traced() {
    let line = "235344233031303132343b3030303030303b353534342e363032353b4e3b30333733392e363833343b453b36303b3237303b3135303b390d0a";
    let decoded = protocol(&["decode", "wialon_ips", line, "--ident", "1"]);
    let printed = text(&decoded.stdout);
    assert!(decoded.status.success() && printed.contains("55.743375"), "{decoded:?}");
    let traced = protocol(&["trace", "wialon_ips", line, "--ident", "1"]);
    assert!(text(&traced.stdout).contains("position.latitude"), "{traced:?}");
    let wrong = protocol(&["decode", "wialon_ips", "zz"]);
    assert!(!wrong.status.success() && text(&wrong.stderr).contains("hex digits"), "{wrong:?}");
}

#[test]
fn a_wrong_protocol_is_reported_with_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("wrong.pvm");
    std::fs::write(&file, "protocol\n").unwrap();
    let ended = protocol(&["check", file.to_str().unwrap()]);
    assert!(!ended.status.success());
    assert!(text(&ended.stdout).contains("wrong.pvm:"), "{ended:?}");
    let unknown = protocol(&["check", "nobody"]);
    assert!(text(&unknown.stdout).contains("teltonika"), "{unknown:?}");
}
