//! What is said when the database cannot be used.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fieldline_contracts::{History, SystemClock};
use fieldline_postgres::{ConnectError, PostgresHistory, PostgresRegistry, Settings, TlsSettings};
use fieldline_testkit::servers::{Cut, Flow, Postgres, free_port};

use crate::{at, device, history, psql, settings};

async fn error(settings: &Settings) -> ConnectError {
    match PostgresHistory::connect(settings, Arc::new(SystemClock)).await {
        Ok(_) => panic!("it connects"),
        Err(error) => error,
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_is_named() {
    let port = free_port();
    let settings = Settings::new(format!("postgres://a:s3cret@127.0.0.1:{port}/x"));
    let error = error(&settings).await;
    let text = error.to_string();
    assert!(matches!(error, ConnectError::Unreachable { .. }), "{text}");
    assert!(
        text.contains(&format!("127.0.0.1:{port}"))
            && text.contains("refused")
            && !text.contains("s3cret"),
        "{text}"
    );
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up() {
    let server = Postgres::start();
    let wire = Cut::before(server.process.port()).await;
    wire.set(Flow::Held);
    let url = |list: &str| Settings::new(format!("postgres://postgres@{list}/postgres"));
    let held = format!("127.0.0.1:{}", wire.port());
    let began = Instant::now();
    let error = error(&url(&held)).await;
    assert!(matches!(error, ConnectError::Unreachable { .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(5));
    // It does not keep from the next.
    let both = format!("{held},127.0.0.1:{}", server.process.port());
    history(&url(&both)).await.append(vec![at(device(1), 1, 1)]).await.unwrap();
}

#[tokio::test]
async fn who_is_not_let_in_is_told_so() {
    let server = Postgres::start();
    psql(&server, "CREATE ROLE ada LOGIN PASSWORD 'right'");
    psql(&server, "CREATE ROLE bob LOGIN");
    // The first lines are the ones that count.
    psql(
        &server,
        "COPY (SELECT 'host all ada 127.0.0.1/32 scram-sha-256' UNION ALL SELECT 'host all all 127.0.0.1/32 trust' UNION ALL SELECT 'local all all trust') TO PROGRAM 'cat > pg_hba.conf'",
    );
    psql(&server, "SELECT pg_reload_conf()");
    let port = server.process.port();
    let url = |who: &str, database: &str| {
        Settings::new(format!("postgres://{who}@127.0.0.1:{port}/{database}"))
    };
    let wrong = error(&url("ada:wrong", "postgres")).await;
    assert!(matches!(&wrong, ConnectError::Refused { user, .. } if user == "ada"), "{wrong}");
    assert!(
        !wrong.to_string().contains("wrong,") && wrong.to_string().contains("pg_hba.conf"),
        "{wrong}"
    );
    let none = error(&url("ada", "postgres")).await;
    assert!(matches!(none, ConnectError::Refused { .. }), "{none}");
    let unknown = error(&url("eve", "postgres")).await;
    assert!(matches!(unknown, ConnectError::Refused { .. }), "{unknown}");
    let missing = error(&url("postgres", "nowhere")).await;
    assert!(
        matches!(&missing, ConnectError::NoDatabase { database, .. } if database == "nowhere"),
        "{missing}"
    );
    assert!(missing.to_string().contains("createdb nowhere"));
    let right = error(&url("bob", "postgres")).await;
    assert!(matches!(right, ConnectError::NoRight { .. }), "{right}");
    // What the sentence says helps.
    psql(&server, "GRANT CREATE ON DATABASE postgres TO bob");
    history(&url("bob", "postgres")).await.append(vec![at(device(1), 1, 1)]).await.unwrap();
    psql(
        &server,
        "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'",
    );
    let latin = error(&url("postgres", "latin")).await;
    assert!(matches!(&latin, ConnectError::Encoding { found, .. } if found == "LATIN1"), "{latin}");
}

#[tokio::test]
async fn a_standby_is_not_written_to_and_the_next_is_found() {
    let (standby, primary) =
        (Postgres::start_with(&["default_transaction_read_only=on"]), Postgres::start());
    let only = error(&settings(&standby)).await;
    assert!(matches!(only, ConnectError::ReadOnly { .. }), "{only}");
    let (one, two) = (standby.process.port(), primary.process.port());
    let both =
        Settings::new(format!("postgres://postgres@127.0.0.1:{one},127.0.0.1:{two}/postgres"));
    history(&both).await.append(vec![at(device(1), 1, 1)]).await.unwrap();
    let gone = Settings::new(format!(
        "postgres://postgres@127.0.0.1:{one},127.0.0.1:{}/postgres",
        free_port()
    ));
    let error = error(&gone).await;
    assert!(matches!(error, ConnectError::ReadOnly { .. }), "{error}");
    assert!(
        error.to_string().contains("standby") && error.to_string().contains("refused"),
        "{error}"
    );
}

#[tokio::test]
async fn wrong_settings_are_refused_before_connecting() {
    for (settings, part) in [
        (Settings::new(""), "`url` is missing"),
        (Settings::new("mysql://x"), "no PostgreSQL URL"),
        (Settings::new("postgres://a@h/x?sslmode=require"), "tls.ca"),
        (Settings::new("postgres://a@h/x?sslmode=verify-full"), "always verified"),
        (Settings { shards: Some(0), ..Settings::new("postgres://a@h/x") }, "`shards`"),
        (Settings { schema: "a;b".to_owned(), ..Settings::new("postgres://a@h/x") }, "`schema`"),
    ] {
        let text = error(&settings).await.to_string();
        assert!(text.contains(part), "{text}");
    }
}

/// The tables may be one version newer; two are too many. The shards are chosen once.
#[tokio::test]
async fn one_version_of_skew_is_allowed() {
    let server = Postgres::start();
    let settings = settings(&server);
    let never = Settings { migrate: false, ..settings.clone() };
    let error_of = error(&never).await;
    assert!(matches!(error_of, ConnectError::Version { found: 0, .. }), "{error_of}");
    assert!(error_of.to_string().contains("migrate = true"), "{error_of}");
    history(&settings).await.append(vec![at(device(1), 1, 1)]).await.unwrap();
    history(&never).await.append(vec![at(device(1), 2, 1)]).await.unwrap();

    let version = || psql(&server, "SELECT version FROM fieldline.version");
    let known: i32 = version().parse().unwrap();
    let set = |to: i32| psql(&server, &format!("UPDATE fieldline.version SET version = {to}"));
    set(known + 1);
    history(&settings).await.append(vec![at(device(1), 3, 1)]).await.unwrap();
    PostgresRegistry::connect(&settings, Arc::new(SystemClock)).await.map(|_| ()).unwrap();
    assert_eq!(version(), (known + 1).to_string(), "an older program leaves it");
    set(known + 2);
    let newer = error(&settings).await;
    let ConnectError::Version { found, newest, .. } = &newer else { panic!("{newer}") };
    assert_eq!((*found, *newest), (known + 2, known + 1));
    assert!(newer.to_string().contains("start a newer Fieldline"), "{newer}");
    set(known);

    let other = error(&Settings { shards: Some(16), ..settings.clone() }).await;
    assert!(matches!(other, ConnectError::Shards { found: 8, asked: 16, .. }), "{other}");
}

/// Nodes that start at once make the tables once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_are_made_once() {
    let server = Postgres::start();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..10 {
        let settings = settings(&server);
        tasks.spawn(async move {
            if n % 2 == 0 {
                PostgresRegistry::connect(&settings, Arc::new(SystemClock)).await.map(|_| ())
            } else {
                PostgresHistory::connect(&settings, Arc::new(SystemClock)).await.map(|_| ())
            }
        });
    }
    for done in tasks.join_all().await {
        done.unwrap();
    }
    assert_eq!(psql(&server, "SELECT count(*) FROM fieldline.version"), "1");
}

/// Over TLS, the server is who the certificates say, or nobody.
#[tokio::test]
async fn tls_verifies_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let authority = |name: &str| {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let certificate = params.self_signed(&key).unwrap();
        (certificate.pem(), rcgen::Issuer::new(params, key))
    };
    let (ours, issuer) = authority("ours");
    let (foreign, _) = authority("foreign");
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let (ours, foreign) = (file("ours.pem", ours), file("foreign.pem", foreign));
    let (certificate, key) =
        (file("server.pem", certificate.pem()), file("server.key", key.serialize_pem()));
    // The server reads them as its own user, and refuses a key that others may read.
    let script = "chmod 755 \"$1\" && chmod 600 \"$2\" && { [ \"$(id -u)\" != 0 ] || chown postgres \"$2\"; }";
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", script, "sh"]).arg(folder.path()).arg(&key);
    assert!(shell.status().unwrap().success());
    let server = Postgres::start_with(&[
        "ssl=on",
        &format!("ssl_cert_file={}", certificate.display()),
        &format!("ssl_key_file={}", key.display()),
    ]);
    let url = |host: &str| format!("postgres://postgres@{host}:{}/postgres", server.process.port());
    let with = |host: &str, ca: &std::path::Path| {
        let tls = Some(TlsSettings { ca: ca.to_owned(), certificate: None, key: None });
        Settings { tls, ..Settings::new(url(host)) }
    };
    history(&with("localhost", &ours)).await.append(vec![at(device(1), 1, 1)]).await.unwrap();
    let used = "SELECT count(*) > 0 FROM pg_stat_ssl s JOIN pg_stat_activity a USING (pid) \
                WHERE a.application_name = 'fieldline' AND NOT s.ssl";
    assert_eq!(psql(&server, used), "f", "a connection is not encrypted");
    let error_of = error(&with("localhost", &foreign)).await.to_string();
    assert!(error_of.contains("certificate"), "{error_of}");
    let error_of = error(&with("127.0.0.1", &ours)).await.to_string();
    assert!(error_of.contains("certificate"), "another name: {error_of}");
    let error_of = error(&with("localhost", std::path::Path::new("/nowhere.pem"))).await;
    assert!(matches!(error_of, ConnectError::Settings(_)), "{error_of}");
}
