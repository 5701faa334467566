//! A whole API over real sockets, a real registry and a real history.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use fieldline_auth::{Auth, Identity, NewToken};
use fieldline_contracts::channels::{
    ChannelControl, ChannelStatus, ConnectionInfo, Connections, Missing,
};
use fieldline_contracts::ownership::Progress;
use fieldline_contracts::{
    Actor, Cluster, MemoryBus, MemoryCluster, Node, Platform, Registry, RegistryExt as _,
    SystemClock,
};
use fieldline_ingest::Ingest;
use fieldline_mdb::{Mdb, MdbConfig};
use fieldline_model::{
    Account, AccountId, ChannelId, ConnectionId, DeviceId, Scope, Timestamp, Transport,
};
use fieldline_rest::{
    Drained, Insight, Lag, Led, RestConfig, RestListener, Services, Size, Spread, SystemInfo, run,
};
use fieldline_router::LocalCommands;
use fieldline_runtime::tls::{ReloadingTls, TlsFiles};
use fieldline_sqlite::SqliteRegistry;
use fieldline_testkit::SwitchedState;
use http_body_util::{BodyExt as _, Full};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderMap};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::Value as Json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Scopes of everyone but the operator.
pub const TENANT: [Scope; 5] =
    [Scope::Read, Scope::Write, Scope::Command, Scope::Publish, Scope::Admin];

/// Connections of channels, in place of a gateway.
#[derive(Default)]
pub struct Channels {
    pub connections: Mutex<Vec<(AccountId, ConnectionInfo)>>,
    pub problems: Mutex<Vec<String>>,
    pub opening: Mutex<bool>,
    pub missing: Mutex<Vec<Missing>>,
}

#[async_trait]
impl ChannelControl for Channels {
    async fn status(&self, account: AccountId, channel: ChannelId) -> ChannelStatus {
        let held = self.connections.lock();
        let own = held.iter().filter(|(of, info)| *of == account && info.channel == channel);
        let connections = u32::try_from(own.count()).unwrap();
        ChannelStatus { listening: true, connections, ..ChannelStatus::default() }
    }

    async fn connections(&self, account: AccountId, channel: ChannelId) -> Connections {
        let held = self.connections.lock();
        let own = held.iter().filter(|(of, info)| *of == account && info.channel == channel);
        let items = own.map(|(_, info)| info.clone()).collect();
        Connections { items, missing: self.missing.lock().clone() }
    }

    async fn close(
        &self,
        account: AccountId,
        channel: ChannelId,
        connection: ConnectionId,
    ) -> Result<bool, Vec<Missing>> {
        let mut held = self.connections.lock();
        let before = held.len();
        held.retain(|(of, info)| (*of, info.channel, info.id) != (account, channel, connection));
        let missing = self.missing.lock().clone();
        match held.len() < before {
            true => Ok(true),
            false if missing.is_empty() => Ok(false),
            false => Err(missing),
        }
    }

    async fn opened(&self) -> bool {
        !*self.opening.lock()
    }

    async fn problems(&self) -> Vec<String> {
        self.problems.lock().clone()
    }
}

pub struct Bench {
    pub cluster: Arc<MemoryCluster>,
    /// Of the keys that begin with `modules/`.
    pub progress: watch::Sender<Progress>,
    pub address: SocketAddr,
    pub platform: Platform,
    pub ingest: Ingest,
    pub auth: Auth,
    pub channels: Arc<Channels>,
    pub state: Arc<SwitchedState>,
    pub shutdown: CancellationToken,
    pub link: String,
    pub root: Client,
    pub account: AccountId,
    server: Option<JoinHandle<Drained>>,
    _dir: tempfile::TempDir,
}

impl Bench {
    pub async fn start() -> Self {
        Self::with(RestConfig::default(), None).await
    }

    /// Starts with these limits, and with TLS where there is a directory with `cert.pem` and `key.pem`.
    pub async fn with(config: RestConfig, tls: Option<&Path>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(SystemClock);
        let registry: Arc<dyn Registry> = Arc::new(
            SqliteRegistry::open(&dir.path().join("registry.sqlite"), clock.clone()).unwrap(),
        );
        let history =
            Mdb::open(dir.path().join("history"), MdbConfig::default(), clock.clone()).unwrap();
        let state = Arc::new(SwitchedState::new());
        let platform = Platform {
            registry: registry.clone(),
            history: Arc::new(history),
            state: state.clone(),
            bus: Arc::new(MemoryBus::new()),
            commands: Arc::new(LocalCommands::new(registry.clone(), clock.clone())),
            clock: clock.clone(),
        };
        let ingest = Ingest::new(platform.clone());
        let auth = Auth::new(registry, clock);
        let first = auth.bootstrap(None).await.unwrap().unwrap();
        let channels = Arc::new(Channels::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let cluster = Arc::new(MemoryCluster::new());
        let progress = watch::Sender::new(Progress::default());
        let node = Node {
            name: "test".to_owned(),
            address: String::new(),
            roles: vec!["rest".to_owned()],
            zone: Some("a".to_owned()),
            version: "0.0.0-test".to_owned(),
            ready: true,
        };
        cluster.join(node).await.unwrap();
        let services = Services {
            platform: platform.clone(),
            ingest: ingest.clone(),
            auth: auth.clone(),
            cluster: cluster.clone(),
            channels: channels.clone(),
            metrics: Arc::new(|| "fieldline_up 1\n".to_owned()),
            ready: Vec::new(),
            optional: vec![(
                "last values",
                Arc::new({
                    let state = state.clone();
                    move || state.problems()
                }),
            )],
            insight: Insight {
                shared: true,
                led: vec![
                    Led { key: "retention", what: "lets go of messages" },
                    Led { key: "upkeep", what: "looks after commands" },
                ],
                spread: vec![Spread {
                    role: "rest".to_owned(),
                    prefix: "modules/".to_owned(),
                    progress: progress.subscribe(),
                }],
                lags: vec![{
                    let ingest = ingest.clone();
                    Arc::new(move || Lag {
                        name: "append",
                        size: ingest.append_took().map(Size::Took),
                        note: None,
                    })
                }],
            },
            system: SystemInfo {
                node: "test".to_owned(),
                version: "0.0.0-test".to_owned(),
                listeners: vec![("http".to_owned(), address.to_string())],
            },
        };
        let shutdown = CancellationToken::new();
        let tls = tls.map(|dir| {
            let files = TlsFiles { certificate: dir.join("cert.pem"), key: dir.join("key.pem") };
            Arc::new(ReloadingTls::load(files, RestListener::PROTOCOLS).unwrap())
        });
        let listeners = vec![RestListener { listener, tls }];
        let server = tokio::spawn(run(config, listeners, services, shutdown.clone()));
        let token = first.token.unwrap();
        let root = Client { address, token: Some(token.clone()), cookie: None };
        let account = auth.token(&token, address.ip()).await.unwrap().account;
        Self {
            address,
            platform,
            ingest,
            auth,
            channels,
            state,
            shutdown,
            link: first.link_secret,
            root,
            account,
            server: Some(server),
            cluster,
            progress,
            _dir: dir,
        }
    }

    pub fn anyone(&self) -> Client {
        Client { address: self.address, token: None, cookie: None }
    }

    pub fn identity(&self, account: AccountId) -> Identity {
        Identity {
            account,
            actor: Actor::system("test"),
            scopes: Scope::ALL.to_vec(),
            devices: Vec::new(),
            kind: fieldline_auth::IdentityKind::Token(fieldline_model::TokenId::from_bytes(
                [0; 16],
            )),
            session: None,
            expires_at: None,
        }
    }

    /// A token of `account`, not restricted but by its scopes.
    pub async fn token(&self, account: AccountId, scopes: &[Scope]) -> Client {
        self.token_for(account, scopes, Vec::new(), None).await
    }

    pub async fn token_for(
        &self,
        account: AccountId,
        scopes: &[Scope],
        devices: Vec<DeviceId>,
        expires_at: Option<Timestamp>,
    ) -> Client {
        let new = NewToken {
            name: "test".to_owned(),
            scopes: scopes.to_vec(),
            devices,
            networks: Vec::new(),
            expires_at,
        };
        let made = self.auth.create_token(&self.identity(account), account, new).await.unwrap();
        Client { address: self.address, token: Some(made.1), cookie: None }
    }

    /// Another account.
    pub async fn tenant(&self, name: &str) -> AccountId {
        let now = self.platform.clock.now();
        let account = Account {
            id: AccountId::new(now, self.platform.clock.random()),
            name: name.to_owned(),
            enabled: true,
            retention_days: 0,
            storage_bytes_max: 0,
            labels: Default::default(),
            created_at: now,
        };
        let by = Actor::system("test");
        self.platform.registry.create_object(account.id, &account, &by).await.unwrap().object.id
    }

    pub async fn stop(mut self) -> Drained {
        self.shutdown.cancel();
        self.server.take().unwrap().await.unwrap()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// A caller. One connection a request: nothing is shared but what the server keeps.
#[derive(Clone)]
pub struct Client {
    pub address: SocketAddr,
    pub token: Option<String>,
    pub cookie: Option<String>,
}

pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    pub fn json(&self) -> Json {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {:?}", self.body))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body, if the status is `status`.
    #[track_caller]
    pub fn expect(self, status: u16) -> Json {
        assert_eq!(self.status, status, "{}", self.text());
        if self.body.is_empty() { Json::Null } else { self.json() }
    }

    /// The problem's detail, if it has this status and code.
    #[track_caller]
    pub fn problem(self, status: u16, code: &str) -> String {
        assert_eq!(self.status, status, "{}", self.text());
        assert_eq!(self.header("content-type"), "application/problem+json");
        let json = self.json();
        assert_eq!(json["code"], code, "{json}");
        assert_eq!(json["status"], status);
        json["detail"].as_str().unwrap().to_owned()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

impl Client {
    pub async fn get(&self, path: &str) -> Reply {
        self.send(Method::GET, path, &[], None).await
    }

    pub async fn post(&self, path: &str, body: Json) -> Reply {
        self.send(Method::POST, path, &[], Some(body)).await
    }

    pub async fn patch(&self, path: &str, body: Json) -> Reply {
        self.send(Method::PATCH, path, &[], Some(body)).await
    }

    pub async fn put(&self, path: &str, body: Json) -> Reply {
        self.send(Method::PUT, path, &[], Some(body)).await
    }

    pub async fn delete(&self, path: &str) -> Reply {
        self.send(Method::DELETE, path, &[], None).await
    }

    pub async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<Json>,
    ) -> Reply {
        let body = body.map(|body| body.to_string());
        let json: &[(&str, &str)] =
            if body.is_some() { &[(CONTENT_TYPE.as_str(), "application/json")] } else { &[] };
        let headers: Vec<(&str, &str)> = json.iter().chain(headers).copied().collect();
        self.raw(method, path, &headers, body.unwrap_or_default().into_bytes()).await
    }

    pub async fn raw(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> Reply {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let driver = tokio::spawn(connection);
        let mut request =
            Request::builder().method(method).uri(path).header(HOST, self.address.to_string());
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some(cookie) = &self.cookie {
            request = request.header("cookie", format!("fieldline_session={cookie}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body))).unwrap();
        let response = sender.send_request(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        driver.abort();
        Reply { status: parts.status, headers: parts.headers, body }
    }

    /// A device with this ident; returns its id.
    pub async fn device(&self, ident: &str) -> String {
        let made = self.post("/api/v1/devices", serde_json::json!({"ident": ident})).await;
        made.expect(201)["id"].as_str().unwrap().to_owned()
    }
}

/// A connection of a device, as a gateway would tell of it.
pub fn connection(channel: ChannelId, device: Option<DeviceId>, ident: &str) -> ConnectionInfo {
    ConnectionInfo {
        id: ConnectionId::new(Timestamp::from_seconds(1_800_000_000), [7; 10]),
        node: "node-1".to_owned(),
        channel,
        device,
        ident: Some(ident.to_owned()),
        peer: "192.0.2.1:4242".to_owned(),
        transport: Transport::Tcp,
        connected_at: Timestamp::from_seconds(1_800_000_000),
        received_at: None,
        received_bytes: 1,
        sent_bytes: 2,
        messages: 3,
    }
}

/// Waits for a state, never for an edge.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..300 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("within three seconds it did not come to be: {what}");
}

/// The source of a built-in protocol under another name.
pub fn renamed(name: &str, new: &str) -> String {
    let all = fieldline_pvm::library::built_in();
    let (_, source) = all.iter().find(|(built_in, _)| *built_in == name).unwrap();
    source.replacen(&format!("protocol {name}"), &format!("protocol {new}"), 1)
}
