//! What can be wrong at the start, said in one sentence; and TLS.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use fieldline_contracts::{Bus, SystemClock, TopicFilter};
use fieldline_mqtt_bus::{ConnectError, MqttBus, MqttBusConfig};
use fieldline_testkit::servers::Mosquitto;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::{account, config, device, eventually, message, next_number, silent};

async fn refused(config: MqttBusConfig) -> (ConnectError, String) {
    let connected = MqttBus::connect(config, Arc::new(SystemClock)).await;
    let error = connected.err().expect("it cannot connect");
    let words = error.to_string();
    println!("{words}");
    (error, words)
}

/// A server that answers the first bytes with `answer` and waits or ends.
async fn answering(answer: &'static [u8], ends: bool) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut first = [0; 64];
            assert!(stream.read(&mut first).await.unwrap() > 0);
            stream.write_all(answer).await.unwrap();
            if !ends {
                kept.push(stream);
            }
        }
    });
    port
}

#[tokio::test]
async fn a_broker_that_is_not_there() {
    let (error, words) = refused(config(1)).await;
    assert!(error.is_temporary());
    assert!(
        words.contains("127.0.0.1:1 cannot be reached") && words.contains("start it"),
        "{words}"
    );
}

#[tokio::test]
async fn what_is_no_mqtt_5_broker() {
    let old = answering(&[0x20, 2, 0, 1], true).await;
    let web = answering(b"HTTP/1.1 400 Bad Request\r\n\r\n", true).await;
    let closing = answering(b"", true).await;
    for port in [old, web, closing] {
        let (error, words) = refused(config(port)).await;
        assert!(matches!(error, ConnectError::NotMqtt5 { .. }), "{words}");
        assert!(words.contains("is no MQTT 5 broker") && words.contains("use one"), "{words}");
    }
    let (error, words) = refused(config(answering(b"", false).await)).await;
    assert!(matches!(error, ConnectError::Silent { .. }), "{words}");
}

#[tokio::test]
async fn wrong_settings() {
    let (_, words) = refused(MqttBusConfig { url: "10.0.0.1".to_owned(), ..config(1) }).await;
    assert!(words.contains("write it like mqtt://"), "{words}");
}

fn with_password(folder: &Path, password: &str) -> String {
    let file = folder.join("passwords");
    let made = Command::new("mosquitto_passwd")
        .arg("-b")
        .arg("-c")
        .arg(&file)
        .args(["node", password])
        .status();
    assert!(made.unwrap().success());
    format!("allow_anonymous false\npassword_file {}", file.display())
}

#[tokio::test]
async fn a_wrong_password() {
    let folder = tempfile::tempdir().unwrap();
    let broker = Mosquitto::start_with(&with_password(folder.path(), "secret:1"));
    let url = |login: &str| format!("mqtt://{login}127.0.0.1:{}", broker.port());
    for login in ["", "node:wrong@", "else:secret%3A1@"] {
        let (error, words) =
            refused(MqttBusConfig { url: url(login), ..config(broker.port()) }).await;
        assert!(matches!(error, ConnectError::Credentials { .. }), "{words}");
        assert!(!words.contains("wrong@") && !words.contains("secret"), "{words}");
    }
    let right = MqttBusConfig { url: url("node:secret%3A1@"), ..config(broker.port()) };
    MqttBus::connect(right, Arc::new(SystemClock)).await.unwrap();
}

/// A user who may not use the topics: the bus says so, and serves its own process.
#[tokio::test(flavor = "multi_thread")]
async fn a_user_without_rights() {
    let folder = tempfile::tempdir().unwrap();
    let rights = folder.path().join("rights");
    std::fs::write(&rights, "topic read elsewhere/#\n").unwrap();
    let broker = Mosquitto::start_with(&format!("acl_file {}", rights.display()));
    let config =
        MqttBusConfig { subscribe_wait: Duration::from_millis(300), ..config(broker.port()) };
    let bus = MqttBus::connect(config, Arc::new(SystemClock)).await.unwrap();
    let mut items = bus.subscribe(account(1), TopicFilter::default()).await;
    bus.publish(account(1), vec![message(account(1), device(1), 1)]).await;
    assert_eq!(next_number(&mut items).await, 1);
    silent(&mut items, 100).await;
    eventually("it is said", || {
        bus.problems().iter().any(|words| words.contains("fieldline/#") && words.contains("allow"))
    })
    .await;
    println!("{:?}", bus.problems());
}

/// An authority, and what it signed for 127.0.0.1, in `folder`.
fn certificates(folder: &Path, name: &str) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, format!("{name} authority"));
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    std::fs::write(folder.join(format!("{name}-ca.pem")), authority.pem()).unwrap();
    for who in ["broker", "node"] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, who);
        let signed = params.signed_by(&key, &authority).unwrap();
        std::fs::write(folder.join(format!("{name}-{who}.pem")), signed.pem()).unwrap();
        std::fs::write(folder.join(format!("{name}-{who}.key")), key.serialize_pem()).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn both_sides_show_certificates() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    certificates(folder.path(), "own");
    certificates(folder.path(), "foreign");
    let broker = Mosquitto::start_with(&format!(
        "cafile {}\ncertfile {}\nkeyfile {}\nrequire_certificate true\n",
        path("own-ca.pem").display(),
        path("own-broker.pem").display(),
        path("own-broker.key").display(),
    ));
    let tls = |authority: &str, own: &str| MqttBusConfig {
        url: format!("mqtts://127.0.0.1:{}", broker.port()),
        authority: Some(path(&format!("{authority}-ca.pem"))),
        certificate: Some(path(&format!("{own}-node.pem"))),
        key: Some(path(&format!("{own}-node.key"))),
        ..config(broker.port())
    };
    let node = async || MqttBus::connect(tls("own", "own"), Arc::new(SystemClock)).await.unwrap();
    let (here, there) = (node().await, node().await);
    let mut items = there.subscribe(account(1), TopicFilter::default()).await;
    for n in 0..1_000 {
        here.publish(account(1), vec![message(account(1), device(1), n)]).await;
    }
    for n in 0..1_000 {
        assert_eq!(next_number(&mut items).await, n);
    }
    for config in [tls("foreign", "own"), tls("own", "foreign")] {
        let (error, words) = refused(config).await;
        assert!(matches!(error, ConnectError::Tls { .. }), "{words}");
    }
    let (error, words) = refused(config(broker.port())).await;
    assert!(matches!(error, ConnectError::NotMqtt5 { .. }), "{words}");
    let (_, words) =
        refused(MqttBusConfig { authority: Some(path("none.pem")), ..tls("own", "own") }).await;
    assert!(words.contains("none.pem cannot be read"), "{words}");
}
