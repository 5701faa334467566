//! What MQTT clients leave with the server.

use std::sync::Arc;

use fieldline_contracts::client_store::ClientStore;
use fieldline_contracts::conformance::client_store;
use fieldline_contracts::{Actor, Draft, Kind, Registry as _, SystemClock};
use fieldline_model::{AccountId, Timestamp};
use fieldline_postgres::PostgresRegistry;
use fieldline_testkit::servers::Postgres;

use super::{psql, settings};

async fn open(server: &Postgres) -> Arc<PostgresRegistry> {
    Arc::new(PostgresRegistry::connect(&settings(server), Arc::new(SystemClock)).await.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms() {
    let server = Postgres::start();
    let (one, two) = (open(&server).await, open(&server).await);
    tokio::join!(client_store::run(one), client_store::the_silent_are_adopted(two));
}

/// What an account retained goes with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_account_takes_its_retained_messages_with_it() {
    let server = Postgres::start();
    let registry = open(&server).await;
    let (account, other) = (AccountId::from_bytes([1; 16]), AccountId::from_bytes([2; 16]));
    let actor = Actor::system("test");
    for id in [account, other] {
        let body = serde_json::json!({ "name": id.to_string() });
        let draft = Draft { kind: Kind::Account, id: id.0, unique: Default::default(), body };
        registry.create(id, draft, &actor).await.unwrap();
        let message = fieldline_contracts::RetainedMessage {
            topic: "client/a".into(),
            payload: vec![1].into(),
            props: bytes::Bytes::new(),
            at_least_once: true,
            expires_at: None,
        };
        let limits = fieldline_contracts::RetainLimits { messages: 1, bytes: 100 };
        let now = Timestamp::from_seconds(1);
        assert_eq!(registry.retain(id, vec![message], limits, now).await.unwrap(), [true]);
    }
    registry.delete(account, Kind::Account, account.0, None, &actor).await.unwrap();
    assert_eq!(
        psql(&server, "SELECT count(*), min(account::text) FROM fieldline.retained"),
        format!("1|{other}")
    );
}

/// Tables of the version before are brought up to date; until then a node does without what they have not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn older_tables_are_brought_up_to_date() {
    let server = Postgres::start();
    drop(open(&server).await);
    psql(&server, "DROP TABLE fieldline.retained, fieldline.wills, fieldline.will_owners");
    psql(&server, "UPDATE fieldline.version SET version = 1");
    let never = fieldline_postgres::Settings { migrate: false, ..settings(&server) };
    let early = PostgresRegistry::connect(&never, Arc::new(SystemClock)).await.unwrap();
    let account = AccountId::from_bytes([1; 16]);
    let body = serde_json::json!({ "name": "a" });
    let draft = Draft { kind: Kind::Account, id: account.0, unique: Default::default(), body };
    let actor = Actor::system("test");
    early.create(account, draft, &actor).await.unwrap();
    assert!(early.retained(account, "client/", None, 1).await.is_err());
    early.delete(account, Kind::Account, account.0, None, &actor).await.unwrap();
    let registry = open(&server).await;
    assert_eq!(psql(&server, "SELECT version FROM fieldline.version"), "2");
    assert_eq!(registry.retained(account, "client/", None, 1).await.unwrap(), []);
    assert_eq!(early.retained(account, "client/", None, 1).await.unwrap(), []);
}
