//! Blobs in a directory and in a real S3 server, and what dies under them.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test panics where it fails, and says what it measured"
)]

mod directory;
mod s3;

/// The server of these tests, which is this program started again; see `testkit::servers::S3`.
#[test]
fn s3_server() {
    if fieldline_testkit::servers::S3::serve_if_told() {
        return;
    }
    let mut server = fieldline_testkit::servers::S3::start();
    server.restart();
    assert_eq!((server.uploads(), server.files().len()), (0, 0));
}
