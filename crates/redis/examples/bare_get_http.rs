//! The peer of `bench/last_value_redis.sh`: an HTTP server that answers every request with one bare
//! GET of Redis, and nothing else. No sign-in, no limits, no routes.
//!
//! `bare_get_http ADDRESS REDIS_URL KEY`

#![allow(clippy::expect_used, reason = "a measurement that cannot run ends")]

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use redis::aio::MultiplexedConnection;
use tokio::net::TcpListener;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().expect("ADDRESS REDIS_URL KEY");
    let (address, url, key) = (next(), next(), next());
    let client = redis::Client::open(url).expect("an address of Redis");
    let connection = client.get_multiplexed_async_connection().await.expect("Redis answers");
    let listener = TcpListener::bind(address).await.expect("the address is free");
    let key: Arc<str> = key.into();
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        stream.set_nodelay(true).expect("a socket takes an option");
        let (connection, key) = (connection.clone(), Arc::clone(&key));
        tokio::spawn(async move {
            let answer =
                service_fn(move |_: Request<Incoming>| get(connection.clone(), Arc::clone(&key)));
            let serving = hyper::server::conn::http1::Builder::new();
            // A client that goes away is none of our business.
            serving.serve_connection(TokioIo::new(stream), answer).await.unwrap_or_default();
        });
    }
}

async fn get(
    mut connection: MultiplexedConnection,
    key: Arc<str>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let mut cmd = redis::cmd("GET");
    cmd.arg(&*key);
    let found: Option<Vec<u8>> = cmd.query_async(&mut connection).await.unwrap_or_default();
    let (status, body) = match found {
        Some(body) => (StatusCode::OK, body),
        None => (StatusCode::NOT_FOUND, Vec::new()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}
