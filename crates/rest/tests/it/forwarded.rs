//! Who asks, where a balancer stands between.

use fieldline_model::Network;
use fieldline_rest::RestConfig;
use fieldline_runtime::Balancers;
use fieldline_runtime::balancers::Forwarded;
use hyper::Method;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::{Bench, Client};

async fn behind(network: &str, header: Forwarded) -> Bench {
    let addresses: Vec<Network> = vec![network.parse().unwrap()];
    let balancers = Balancers { addresses, header };
    Bench::with(RestConfig { balancers, ..RestConfig::default() }, None).await
}

/// A token that works from 203.0.113.0/24 alone.
async fn token(bench: &Bench) -> Client {
    let new = json!({"name": "ci", "scopes": ["read"], "networks": ["203.0.113.0/24"]});
    let made = bench.root.post("/api/v1/tokens", new).await.expect(201);
    Client { token: Some(made["secret"].as_str().unwrap().to_owned()), ..bench.anyone() }
}

async fn get(client: &Client, headers: &[(&str, &str)]) -> u16 {
    client.send(Method::GET, "/api/v1/devices", headers, None).await.status.as_u16()
}

#[tokio::test]
async fn a_listed_balancer_says_who_asks() {
    let bench = behind("127.0.0.1", Forwarded::XForwardedFor).await;
    let client = token(&bench).await;
    let name = "x-forwarded-for";
    assert_eq!(get(&client, &[]).await, 401, "the balancer itself");
    assert_eq!(get(&client, &[(name, "203.0.113.7")]).await, 200);
    assert_eq!(get(&client, &[(name, "198.51.100.1")]).await, 401);
    // What stands before the last was sent by the client.
    assert_eq!(get(&client, &[(name, "203.0.113.7, 198.51.100.1")]).await, 401);
    assert_eq!(get(&client, &[(name, "203.0.113.7"), (name, "198.51.100.1")]).await, 401);
    assert_eq!(get(&client, &[(name, "198.51.100.1, 203.0.113.7, 127.0.0.1")]).await, 200);
    // The other header is as the client sent it.
    assert_eq!(get(&client, &[("forwarded", "for=203.0.113.7")]).await, 401);

    // Where the client came by HTTPS its cookie stays there.
    let link = json!({"secret": bench.link});
    let https = [(name, "203.0.113.7"), ("x-forwarded-proto", "https")];
    let anyone = bench.anyone();
    let reply = anyone.send(Method::POST, "/api/v1/auth/link", &https, Some(link)).await;
    assert!(reply.header("set-cookie").contains("; Secure"), "{}", reply.header("set-cookie"));
    bench.stop().await;
}

#[tokio::test]
async fn forwarded_of_rfc_7239_is_read_where_it_is_what_they_send() {
    let bench = behind("127.0.0.0/8", Forwarded::Forwarded).await;
    let client = token(&bench).await;
    let name = "forwarded";
    assert_eq!(get(&client, &[(name, "for=203.0.113.7;proto=https")]).await, 200);
    assert_eq!(get(&client, &[(name, "for=203.0.113.7, for=\"[2001:db8::1]:80\"")]).await, 401);
    assert_eq!(get(&client, &[("x-forwarded-for", "203.0.113.7")]).await, 401);
    bench.stop().await;
}

#[tokio::test]
async fn nobody_else_is_believed() {
    let bench = behind("10.0.0.0/8", Forwarded::XForwardedFor).await;
    let client = token(&bench).await;
    assert_eq!(get(&client, &[("x-forwarded-for", "203.0.113.7")]).await, 401);
    let reply = proxied(&bench, &client, "203.0.113.7").await;
    assert!(!reply.contains("200 OK"), "{reply}");
    bench.stop().await;
}

/// Asks over a connection that begins with a PROXY header.
async fn proxied(bench: &Bench, client: &Client, peer: &str) -> String {
    let mut stream = TcpStream::connect(bench.address).await.unwrap();
    let (token, head) =
        (client.token.as_deref().unwrap(), "GET /api/v1/devices HTTP/1.1\r\nhost: x");
    let request = format!(
        "PROXY TCP4 {peer} 10.0.0.9 51820 8080\r\n{head}\r\nauthorization: Bearer {token}\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut reply = String::new();
    // A reset is an answer as well.
    let _end = stream.read_to_string(&mut reply).await;
    reply
}

#[tokio::test]
async fn the_proxy_protocol_names_the_peer_of_a_connection() {
    let bench = behind("127.0.0.1", Forwarded::XForwardedFor).await;
    let client = token(&bench).await;
    let reply = proxied(&bench, &client, "203.0.113.7").await;
    assert!(reply.starts_with("HTTP/1.1 200 OK"), "{reply}");
    let reply = proxied(&bench, &client, "198.51.100.1").await;
    assert!(reply.starts_with("HTTP/1.1 401"), "{reply}");
    bench.stop().await;
}
