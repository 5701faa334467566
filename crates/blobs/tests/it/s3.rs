//! Object storage: conformance, kills, cuts, and starts that cannot be.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fieldline_blobs::{S3Blobs, Settings};
use fieldline_contracts::{BlobError, BlobFolder, BlobKey, Blobs, PutIf, conformance};
use fieldline_testkit::servers::{Cut, Flow, S3};

/// Longest that is waited for anything.
const PATIENCE: Duration = Duration::from_secs(60);

fn settings(server: &S3) -> Settings {
    let (key, secret) = server.key();
    Settings {
        url: Some(format!("s3://{}/tests/of", server.bucket())),
        endpoint: Some(server.endpoint()),
        access_key_id: Some(key.to_owned()),
        secret_access_key: Some(secret.to_owned()),
        look_every: Duration::from_millis(100),
        ..Settings::default()
    }
}

async fn connect(settings: &Settings) -> Arc<S3Blobs> {
    Arc::new(S3Blobs::connect(settings).await.unwrap())
}

async fn refused(settings: &Settings) -> String {
    S3Blobs::connect(settings).await.err().expect("it cannot start so").to_string()
}

async fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn key(name: &str) -> BlobKey {
    BlobKey::shared(name).unwrap()
}

fn content(number: u64, size: usize) -> Vec<u8> {
    number.to_le_bytes().iter().copied().cycle().take(size).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn object_storage_conforms() {
    let server = S3::start();
    let blobs = connect(&settings(&server)).await;
    conformance::blobs::run(blobs).await;
    assert_eq!(server.uploads(), 0);
}

/// Two nodes at one bucket are one store; two prefixes are two.
#[tokio::test]
async fn nodes_share_a_bucket() {
    let server = S3::start();
    let (one, other) = (connect(&settings(&server)).await, connect(&settings(&server)).await);
    let apart = Settings { url: Some(format!("s3://{}", server.bucket())), ..settings(&server) };
    let apart = connect(&apart).await;
    let etag = one.put(&key("shared"), vec![1; 10].into(), PutIf::Absent).await.unwrap();
    let second = other.put(&key("shared"), vec![2; 10].into(), PutIf::Absent).await;
    assert_eq!(second.unwrap_err(), BlobError::AlreadyExists(key("shared")));
    other.put(&key("shared"), vec![3; 10].into(), PutIf::Is(etag)).await.unwrap();
    assert_eq!(one.get(&key("shared"), 10).await.unwrap().1, vec![3; 10]);
    assert!(apart.head(&key("shared")).await.is_err());
    let all = apart.list(&BlobFolder::shared("").unwrap(), None, 10).await.unwrap();
    assert!(all.blobs.is_empty(), "{all:?}");
    // What the start tried is gone.
    assert_eq!(server.files().len(), 1);
}

/// The server is killed and started again under a load of small and large blobs: what was stored is there with its own
/// bytes, nothing is there by half.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_loses_no_blob_and_shows_no_half_one() {
    let mut server = S3::start();
    let blobs = connect(&settings(&server)).await;
    let done = Arc::new(AtomicBool::new(false));
    let mut tasks = tokio::task::JoinSet::new();
    for lane in 0..3_u64 {
        let (blobs, done) = (Arc::clone(&blobs), Arc::clone(&done));
        tasks.spawn(async move {
            let mut stored = HashMap::new();
            for round in 0.. {
                if done.load(Ordering::SeqCst) {
                    break;
                }
                // The third sends large ones in parts, and all of them write again what they wrote.
                let size = if lane == 2 { (17 << 20) + 5 } else { 30_000 };
                let (name, number) = (format!("load/{lane}-{}", round % 4), (lane << 32) | round);
                match blobs.put(&key(&name), content(number, size).into(), PutIf::Any).await {
                    Ok(_) => stored.insert(name, (number, size)),
                    // It may be there or not: the next of this name must be.
                    Err(BlobError::Unavailable(_)) => stored.remove(&name),
                    Err(error) => panic!("{error}"),
                };
            }
            stored
        });
    }
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(300 + rand::random::<u64>() % 300)).await;
        server.process.kill();
        tokio::time::sleep(Duration::from_millis(100)).await;
        server = tokio::task::spawn_blocking(move || {
            server.restart();
            server
        })
        .await
        .unwrap();
    }
    done.store(true, Ordering::SeqCst);
    let mut compared = 0;
    let mut stored = HashMap::new();
    while let Some(lane) = tasks.join_next().await {
        stored.extend(lane.unwrap());
    }
    let page = blobs.list(&BlobFolder::shared("load").unwrap(), None, 100).await.unwrap();
    for blob in &page.blobs {
        let (info, bytes) = blobs.get(&blob.key, 32 << 20).await.expect("what is seen is whole");
        assert_eq!(info.etag, blob.etag);
        let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert!(bytes == content(number, bytes.len()), "a mixture");
        if let Some((expected, size)) = stored.remove(blob.key.name()) {
            assert_eq!((number, bytes.len()), (expected, size), "{}", blob.key);
            compared += 1;
        }
    }
    assert!(stored.is_empty(), "lost: {stored:?}");
    assert!(compared >= 4, "only {compared} were stored");
    println!("{compared} stored blobs after 3 kills of the server: 0 lost, 0 mixed");
}

/// A connection that is cut for a while is waited for; one that stays cut ends in an error, in time.
#[tokio::test]
async fn a_cut_wire_is_waited_for_and_then_told() {
    let server = S3::start();
    let cut = Cut::before(server.process.port()).await;
    let settings = Settings {
        endpoint: Some(format!("http://127.0.0.1:{}", cut.port())),
        retry_for: Duration::from_secs(20),
        ..settings(&server)
    };
    let blobs = connect(&settings).await;
    cut.set(Flow::Refused);
    let (name, bytes) = (key("cut"), content(1, 100_000));
    let waiting = {
        let (blobs, name, bytes) = (Arc::clone(&blobs), name.clone(), bytes.clone());
        tokio::spawn(async move { blobs.put(&name, bytes.into(), PutIf::Any).await })
    };
    wait_for("the cut to be noticed", || !blobs.problems().is_empty()).await;
    cut.set(Flow::Open);
    waiting.await.unwrap().expect("it goes on when the wire is mended");
    assert_eq!(blobs.get(&name, 1 << 20).await.unwrap().1, bytes);
    wait_for("the warning to go", || blobs.problems().is_empty()).await;

    cut.set(Flow::Refused);
    let hasty = Settings { retry_for: Duration::ZERO, ..settings };
    cut.set(Flow::Open);
    let blobs = connect(&hasty).await;
    cut.set(Flow::Refused);
    let error = blobs.get(&name, 1 << 20).await.unwrap_err();
    assert!(error.is_retryable() && error.to_string().contains("127.0.0.1"), "{error}");
}

/// A server that answers nothing any more ends in an error after the deadline; a reader and the node go on after it.
#[tokio::test]
async fn a_server_that_stands_still_hits_the_deadline() {
    let server = S3::start();
    let hasty = Settings {
        timeout: Duration::from_secs(1),
        retry_for: Duration::ZERO,
        ..settings(&server)
    };
    let blobs = connect(&hasty).await;
    blobs.put(&key("still"), vec![1; 10].into(), PutIf::Any).await.unwrap();
    server.process.pause();
    let began = Instant::now();
    let error = blobs.get(&key("still"), 10).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    let error = blobs.put(&key("still"), vec![2; 10].into(), PutIf::Any).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert!(!blobs.problems().is_empty());
    server.process.resume();
    let (_, bytes) = blobs.get(&key("still"), 10).await.unwrap();
    assert!(bytes == vec![1; 10] || bytes == vec![2; 10]);
    wait_for("the warning to go", || blobs.problems().is_empty()).await;
}

/// Parts of an upload that fails or is given up do not stay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_is_given_up_is_aborted() {
    let server = S3::start();
    let blobs = connect(&settings(&server)).await;
    let name = key("given-up");
    let large = content(1, 60 << 20);
    // Dropped while it is sent.
    let putting = {
        let (blobs, name, large) = (Arc::clone(&blobs), name.clone(), large.clone());
        tokio::spawn(async move { blobs.put(&name, large.into(), PutIf::Any).await })
    };
    wait_for("the upload to begin", || server.uploads() == 1 || putting.is_finished()).await;
    // It stands still, so that the upload cannot end before it is given up.
    server.process.pause();
    putting.abort();
    let given_up = putting.await.is_err();
    assert!(given_up, "it was stored before it was given up");
    server.process.resume();
    wait_for("the upload to be aborted", || server.uploads() == 0).await;
    assert_eq!(blobs.head(&name).await.unwrap_err(), BlobError::NotFound(name.clone()));

    // A file that is changed while it is sent.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changing");
    std::fs::write(&path, &large).unwrap();
    let putting = {
        let (blobs, name, path) = (Arc::clone(&blobs), name.clone(), path.clone());
        tokio::spawn(async move { blobs.put(&name, path.into(), PutIf::Any).await })
    };
    wait_for("the upload to begin", || server.uploads() == 1 || putting.is_finished()).await;
    server.process.pause();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"other", (60 << 20) - 10).unwrap();
    server.process.resume();
    match putting.await.unwrap() {
        Err(BlobError::Refused(reason)) => assert!(reason.contains("was changed"), "{reason}"),
        other => panic!("{other:?}"),
    }
    wait_for("the upload to be aborted", || server.uploads() == 0).await;
    assert_eq!(blobs.head(&name).await.unwrap_err(), BlobError::NotFound(name));
}

/// An object that is not what was written is not given out.
#[tokio::test]
async fn damage_is_found() {
    let server = S3::start();
    let blobs = connect(&settings(&server)).await;
    blobs.put(&key("damaged"), vec![7; 1_000].into(), PutIf::Any).await.unwrap();
    let files = server.files();
    let mut bytes = std::fs::read(&files[0]).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&files[0], bytes).unwrap();
    let found = blobs.get(&key("damaged"), 1_000).await;
    assert!(matches!(found, Err(BlobError::Damaged { .. })), "{found:?}");
}

/// Each wrong setting ends the start with a sentence that says what and how to mend it, and no secret.
#[tokio::test]
async fn wrong_settings_end_the_start_with_a_sentence() {
    let server = S3::start();
    let right = settings(&server);
    let with = |change: &dyn Fn(&mut Settings)| {
        let mut settings = right.clone();
        change(&mut settings);
        settings
    };
    let wrong_secret = with(&|s| s.secret_access_key = Some("of no use".to_owned()));
    let wrong_key = with(&|s| s.access_key_id = Some("nobody".to_owned()));
    for settings in [wrong_secret, wrong_key] {
        let said = refused(&settings).await;
        assert!(said.contains("blobs.secret_access_key") && !said.contains("of no use"), "{said}");
    }
    let said = refused(&with(&|s| s.url = Some("s3://another".to_owned()))).await;
    assert!(said.contains("no bucket `another`") && said.contains("blobs.url"), "{said}");
    let port = fieldline_testkit::servers::free_port();
    let away = with(&|s| s.endpoint = Some(format!("http://127.0.0.1:{port}")));
    let said = refused(&away).await;
    assert!(said.contains(&port.to_string()) && said.contains("cannot be reached"), "{said}");
    let said = refused(&with(&|s| s.url = None)).await;
    assert!(said.contains("blobs.url"), "{said}");
    server.process.pause();
    let said = refused(&with(&|s| s.timeout = Duration::from_secs(1))).await;
    assert!(said.contains("blobs.endpoint"), "{said}");
    server.process.resume();
}
