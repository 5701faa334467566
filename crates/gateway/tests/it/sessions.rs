//! The session scripts, byte for byte.

use std::path::PathBuf;
use std::sync::Arc;

use fieldline_testkit::sessions::{self, LocalServer};

use crate::{World, config};

fn vectors() -> Option<String> {
    let folder = std::env::var_os("FIELDLINE_VECTORS").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/vectors"),
        PathBuf::from,
    );
    let path = folder.join("sessions.json");
    match std::fs::read_to_string(&path) {
        Ok(text) => Some(text),
        Err(error) => {
            let text = format!("VECTORS ABSENT: cannot read {}: {error}", path.display());
            assert!(std::env::var_os("CI").is_none(), "{text}");
            #[allow(clippy::print_stderr, reason = "absent vectors must be seen")]
            {
                eprintln!("{text}");
            }
            None
        }
    }
}

async fn play(protocol: &str, chunk_bytes: Option<usize>) {
    let Some(json) = vectors() else { return };
    let mut world = World::start(config()).await;
    let control = Arc::new(world.gateway.clone());
    let server = LocalServer::new(world.platform.clone(), control);
    let report = sessions::run(&json, Some(protocol), &server, chunk_bytes).await;
    assert!(report.failed == 0 && report.passed >= 3, "{report:#?}");
    assert_eq!(world.stop().await.abandoned, 0);
}

#[tokio::test]
async fn teltonika() {
    play("teltonika", None).await;
}

#[tokio::test]
async fn teltonika_in_pieces() {
    play("teltonika", Some(1)).await;
    play("teltonika", Some(7)).await;
}

#[tokio::test]
async fn wialon_ips() {
    play("wialon_ips", None).await;
}

#[tokio::test]
async fn wialon_ips_in_pieces() {
    play("wialon_ips", Some(1)).await;
    play("wialon_ips", Some(13)).await;
}

#[tokio::test]
async fn an_unknown_protocol_or_none_fails() {
    let mut world = World::start(config()).await;
    let server = LocalServer::new(world.platform.clone(), Arc::new(world.gateway.clone()));
    let report = sessions::run(r#"{"sessions":[]}"#, None, &server, None).await;
    assert_eq!((report.passed, report.failed), (0, 1), "{report:?}");
    let unknown =
        r#"{"sessions":[{"name":"x","protocol":"nothing","transport":"tcp","steps":[]}]}"#;
    let report = sessions::run(unknown, None, &server, None).await;
    assert_eq!((report.passed, report.failed), (0, 1), "{report:?}");
    assert!(report.failures[0].contains("nothing"), "{report:?}");
    world.stop().await;
}
