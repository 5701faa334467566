//! Both sides over real sockets, with real certificates.

use fieldline_contracts::conformance::calls as suite;
use fieldline_contracts::{Member, MemoryCluster};
use fieldline_model::placement::Epoch;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// Who signs certificates.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { issuer: Issuer::new(params, key), certificate }
    }

    /// The certificate of a node, trusting `trusted`.
    fn issue(&self, name: &str, trusted: &Self) -> MutualTls {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let chain = vec![params.signed_by(&key, &self.issuer).unwrap().der().clone()];
        let key = || PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut roots = RootCertStore::empty();
        roots.add(trusted.certificate.clone()).unwrap();
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier.build().unwrap())
            .with_single_cert(chain.clone(), key())
            .unwrap();
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key())
            .unwrap();
        server.alpn_protocols = vec![b"h2".to_vec()];
        client.alpn_protocols = vec![b"h2".to_vec()];
        MutualTls { server: Arc::new(server), client: Arc::new(client) }
    }
}

/// Nodes that find each other.
struct Network {
    membership: watch::Sender<Arc<Membership>>,
}

struct Running {
    calls: NodeCalls,
    node: Node,
    _stop: DropGuard,
}

impl Network {
    fn new() -> Self {
        Self { membership: watch::Sender::new(Arc::default()) }
    }

    fn join(&self, node: Node) {
        self.membership.send_modify(|membership| {
            let mut members = membership.members.clone();
            members.retain(|member| member.node.name != node.name);
            members.push(Member { node, epoch: Epoch(1) });
            *membership = Arc::new(Membership { members, fresh: true });
        });
    }

    fn described(&self, name: &str, address: String) -> Node {
        let (roles, version) = (Vec::new(), String::new());
        Node { name: name.to_owned(), address, roles, zone: None, version, ready: true }
    }

    /// A node with a certificate, or without.
    async fn start(&self, name: &str, tls: Option<MutualTls>) -> Running {
        let security = match tls {
            Some(tls) => Security::Mutual(Arc::new(move || tls.clone())),
            None => Security::Plain,
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("{}://{}", security.scheme(), listener.local_addr().unwrap());
        let calls = NodeCalls::new(name, Handlers::new(), security, Handle::current());
        calls.follow(self.membership.subscribe());
        let stop = CancellationToken::new();
        let (serving, until) = (calls.clone(), stop.clone());
        tokio::spawn(async move { serving.serve(listener, until).await });
        calls.handlers().on_call("test/echo", |request, _| async move { Ok(request) });
        let node = self.described(name, address);
        self.join(node.clone());
        Running { calls, node, _stop: stop.drop_guard() }
    }
}

impl Running {
    async fn ask(&self, name: &str) -> Result<Bytes, CallError> {
        self.calls.call(name, "test/echo", Bytes::from_static(b"x"), PATIENCE).await
    }

    async fn refused(&self, name: &str) -> String {
        match self.ask(name).await {
            Err(error @ (CallError::Unreachable(_) | CallError::Refused(_))) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }
}

async fn conform(tls: impl Fn(&str) -> Option<MutualTls>) {
    let network = Network::new();
    let counter = std::sync::atomic::AtomicUsize::new(1);
    let all = Mutex::new(Vec::new());
    suite::run(async || {
        let number = counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("node-{number}");
        let running = network.start(&name, tls(&name)).await;
        let (calls, handlers) = (running.calls.clone(), running.calls.handlers().clone());
        all.lock().push(running);
        suite::TestNode { name, handlers, calls: Arc::new(calls) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_over_mutual_tls_keep_the_contract() {
    let authority = Authority::new();
    conform(|name| Some(authority.issue(name, &authority))).await;
}

#[tokio::test]
async fn calls_without_tls_keep_the_contract() {
    conform(|_| None).await;
}

/// Nobody is answered, and nobody asked, whose certificate is of another authority or for another name.
#[tokio::test]
async fn a_node_is_who_its_certificate_says() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let network = Network::new();
    let one = network.start("node-1", Some(ours.issue("node-1", &ours))).await;
    let two = network.start("node-2", Some(ours.issue("node-2", &ours))).await;
    assert!(one.ask("node-2").await.is_ok() && two.ask("node-1").await.is_ok());

    // Its certificate is of another authority, which it trusts alone.
    let foreign = network.start("node-3", Some(theirs.issue("node-3", &theirs))).await;
    let said = one.refused("node-3").await;
    assert!(said.contains("of another authority than node.ca"), "{said}");
    assert!(foreign.refused("node-1").await.contains("of another authority"));
    // It trusts ours, but is not trusted.
    let foreign = network.start("node-4", Some(theirs.issue("node-4", &ours))).await;
    let said = foreign.refused("node-1").await;
    assert!(said.contains("refuses the certificate of this node"), "{said}");

    // The right authority, and another's name: as who is asked, and as who asks.
    let other = network.start("node-5", Some(ours.issue("node-6", &ours))).await;
    let said = one.refused("node-5").await;
    assert!(said.contains("not for node-5"), "{said}");
    let said = other.refused("node-1").await;
    assert!(said.contains("not for node-5"), "{said}");
    // One that would be right, and is no member.
    let stranger = network.start("node-7", Some(ours.issue("node-7", &ours))).await;
    network.membership.send_modify(|membership| {
        let mut members = membership.members.clone();
        members.retain(|member| member.node.name != "node-7");
        *membership = Arc::new(Membership { members, fresh: true });
    });
    let said = stranger.refused("node-1").await;
    assert!(said.contains("node-7 is no member"), "{said}");
    // None at all.
    let bare = network.start("node-8", None).await;
    let said = bare.refused("node-1").await;
    assert!(said.contains("set node.ca"), "{said}");
    let said = one.refused("node-8").await;
    assert!(said.contains("give all nodes certificates"), "{said}");
    let mut plain =
        TcpStream::connect(one.node.address.trim_start_matches("https://")).await.unwrap();
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let read = tokio::time::timeout(PATIENCE, plain.read_to_end(&mut answer)).await.unwrap();
    assert!(read.is_err() || answer.len() < 20, "{answer:?}");
}

/// A node that died, came back at another address, or has new certificates is reached again; while it is away who asks is
/// told at once.
#[tokio::test]
async fn a_node_that_comes_back_is_reached_again() {
    let authority = Authority::new();
    let network = Network::new();
    let one = network.start("node-1", Some(authority.issue("node-1", &authority))).await;
    let two = network.start("node-2", Some(authority.issue("node-2", &authority))).await;
    assert!(one.ask("node-2").await.is_ok());
    drop(two);
    let gone = tokio::time::timeout(PATIENCE, async { while one.ask("node-2").await.is_ok() {} });
    gone.await.expect("it is noticed");
    let began = Instant::now();
    assert!(one.ask("node-2").await.is_err());
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    let _two = network.start("node-2", Some(authority.issue("node-2", &authority))).await;
    let back = tokio::time::timeout(PATIENCE, async { while one.ask("node-2").await.is_err() {} });
    back.await.expect("it is reached again");
}

/// One that accepts and then says nothing costs no more than the deadline, and once it is known nothing.
#[tokio::test]
async fn a_silent_node_is_noticed() {
    let authority = Authority::new();
    let network = Network::new();
    let one = network.start("node-1", Some(authority.issue("node-1", &authority))).await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("https://{}", silent.local_addr().unwrap());
    network.join(network.described("node-2", address));
    let deadline = Duration::from_millis(300);
    let ask = || one.calls.call("node-2", "test/echo", Bytes::new(), deadline);
    assert_eq!(ask().await, Err(CallError::DeadlineExceeded));
    let noticed = async {
        loop {
            if let Err(CallError::Unreachable(text)) = ask().await {
                return text;
            }
        }
    };
    let text = tokio::time::timeout(PATIENCE, noticed).await.expect("it is noticed");
    assert!(text.contains("no answer in 2s"), "{text}");
}

/// Many that hang take nothing from others: they are counted by peer.
#[tokio::test]
async fn calls_of_one_peer_are_bounded() {
    let network = Network::new();
    let one = network.start("node-1", None).await;
    let two = network.start("node-2", None).await;
    let three = network.start("node-3", None).await;
    let (begun, mut begins) = tokio::sync::mpsc::channel(CALLS_OF_PEER_MAX);
    two.calls.handlers().on_call("test/hang", move |_, _| {
        let begun = begun.clone();
        async move {
            begun.send(()).await.unwrap();
            std::future::pending().await
        }
    });
    let mut hanging = tokio::task::JoinSet::new();
    for _ in 0..CALLS_OF_PEER_MAX {
        let calls = one.calls.clone();
        hanging.spawn(async move {
            calls.call("node-2", "test/hang", Bytes::new(), PATIENCE * 5).await
        });
    }
    for _ in 0..CALLS_OF_PEER_MAX {
        tokio::time::timeout(PATIENCE, begins.recv()).await.unwrap().unwrap();
    }
    let more = one.ask("node-2").await;
    assert!(
        matches!(&more, Err(CallError::Refused(text)) if text.contains("try again")),
        "{more:?}"
    );
    assert!(three.ask("node-2").await.is_ok(), "another peer is served");
    hanging.shutdown().await;
    let free = tokio::time::timeout(PATIENCE, async { while one.ask("node-2").await.is_err() {} });
    free.await.expect("who gave up is not counted");
}

/// A program two versions away is told so.
#[tokio::test]
async fn a_program_too_far_away_is_refused() {
    let network = Network::new();
    let two = network.start("node-2", None).await;
    let one = network.start("node-1", None).await;
    let mut head = one.calls.head("node-2", PATIENCE, TraceParent::next(), None);
    head.version = "0.99.0".parse().unwrap();
    let answer = one.calls.inner.ask(&two.node, "test/echo", head, Bytes::new()).await;
    assert!(
        matches!(&answer, Err(CallError::Refused(text)) if text.contains("0.99.0")),
        "{answer:?}"
    );
}

/// An address that leads to another node is noticed, also where no certificate says so.
#[tokio::test]
async fn the_node_that_answers_is_the_one_that_was_meant() {
    let network = Network::new();
    let one = network.start("node-1", None).await;
    let address = one.node.address.clone();
    network.join(network.described("node-2", address));
    let said = one.refused("node-2").await;
    assert!(said.contains("this is node-1, and node-2 was meant"), "{said}");
}

#[tokio::test]
async fn peers_say_whether_the_cluster_is_gone() {
    let network = Network::new();
    let one = network.start("node-1", None).await;
    let two = network.start("node-2", None).await;
    let (asking, asked) =
        (ClusterPeers::new(one.calls.clone()), ClusterPeers::new(two.calls.clone()));
    use fieldline_contracts::Peers as _;
    assert_eq!(asking.without_cluster(&two.node).await, None, "it does not know the question yet");
    let cluster = Arc::new(MemoryCluster::new());
    asked.answer_for(&cluster);
    assert_eq!(asking.without_cluster(&two.node).await, Some(false));
    drop(cluster);
    assert_eq!(asking.without_cluster(&two.node).await, None, "it leaves");
}
