//! Clients that come by a balancer.

use fieldline_auth::NewToken;
use fieldline_model::Scope;
use fieldline_mqtt::MqttConfig;
use fieldline_runtime::Balancers;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::{SOON, Server};
use crate::wire::Hello;

/// The first bytes that come back; none if the connection was closed.
async fn answer(server: &Server, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = vec![0; 4];
    let read = tokio::time::timeout(SOON, stream.read(&mut answer)).await.expect("in time");
    answer.truncate(read.unwrap_or(0));
    answer
}

#[tokio::test]
async fn the_proxy_protocol_names_the_peer() {
    for (listed, balancer) in [("127.0.0.1", true), ("10.0.0.0/8", false)] {
        let addresses = vec![listed.parse().unwrap()];
        let balancers = Balancers { addresses, ..Balancers::default() };
        let config = MqttConfig { balancers, ..MqttConfig::default() };
        let server = Server::with(config, None).await;
        let tenant = server.tenant("tenant").await;
        let new = NewToken {
            name: "ci".into(),
            scopes: vec![Scope::Read],
            networks: vec!["203.0.113.0/24".into()],
            ..NewToken::default()
        };
        let (_, token) = server.new_token(tenant.account, new).await;
        let hello = Hello::new(false, "client", &token).bytes();
        let by = |peer: &str| {
            [format!("PROXY TCP4 {peer} 10.0.0.9 51820 1883\r\n").as_bytes(), &hello].concat()
        };
        let accepted = [0x20, 2, 0, 0];
        assert_eq!(answer(&server, &by("203.0.113.7")).await == accepted, balancer);
        assert_ne!(answer(&server, &by("198.51.100.1")).await, accepted);
        // A balancer that does not say whose the connection is, and anybody else, who is who he is.
        let anyone = Hello::new(false, "client", &tenant.token).bytes();
        let expected = if balancer { Vec::new() } else { accepted.to_vec() };
        assert_eq!(answer(&server, &anyone).await, expected);
        server.shutdown.cancel();
        server.running.await.unwrap();
    }
}
