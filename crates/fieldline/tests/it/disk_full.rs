//! A full disk: acknowledgements stop, the reason is visible, and all goes on
//! by itself when space returns.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::device::{self, Fleet};
use crate::server::{Server, wait_for};

/// A small file system of its own, gone with the test.
pub(crate) struct SmallDisk {
    folder: tempfile::TempDir,
}

impl SmallDisk {
    pub(crate) fn mount() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=48m", "fieldline-test"])
            .arg(folder.path())
            .status()
            .unwrap();
        assert!(
            status.success(),
            "this test mounts a small file system and needs the right to: run it as root, or under `unshare --user --map-root-user --mount`"
        );
        Self { folder }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _status = Command::new("umount").arg("--lazy").arg(self.folder.path()).status();
    }
}

#[test]
fn a_full_disk_stops_acknowledgements_until_space_returns() {
    let disk = SmallDisk::mount();
    let server = Server::start(&disk.path().join("data"), &[]);
    let (_, port) = server.channel("wialon_ips", "tcp", json!({}));
    let fleet = Fleet::start(port, 8);
    wait_for("messages to be acknowledged", || (fleet.acked() > 100).then_some(()));

    // Written until nothing fits: what the store has reserved it may still use.
    let filler = disk.path().join("filler");
    let fill = || {
        let mut file = std::fs::File::options().create(true).append(true).open(&filler).unwrap();
        let block = vec![1_u8; 64 << 10];
        while std::io::Write::write_all(&mut file, &block).is_ok() {}
    };
    let stalled = wait_for("acknowledgements to stop", || {
        fill();
        let before = fleet.acked();
        std::thread::sleep(Duration::from_secs(2));
        (fleet.acked() == before).then_some(before)
    });
    let metrics = server.try_ask("GET", "/metrics", None).unwrap().1.to_string();
    assert!(metrics.contains("storage_full"), "the metrics do not say why");

    std::fs::remove_file(&filler).unwrap();
    wait_for("acknowledgements to go on", || (fleet.acked() > stalled + 50).then_some(()));
    let acknowledged = fleet.finish();
    device::check(&server, &acknowledged);
    server.kill();
    let server = Server::start(&disk.path().join("data"), &[]);
    device::check(&server, &acknowledged);
}
