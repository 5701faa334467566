use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

#[test]
fn servers_start_and_start_again() {
    let mut redis = Redis::start();
    let ping = |port| {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.write_all(b"PING\r\n").unwrap();
        let mut answer = [0; 7];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"+PONG\r\n");
    };
    ping(redis.process.port());
    redis.restart_empty();
    ping(redis.process.port());
    let mut etcd = Etcd::start();
    etcd.restart();
    etcd.restart_empty();
    let _mosquitto = Mosquitto::start();
    let mut postgres = Postgres::start();
    postgres.crash();
}

#[tokio::test]
async fn a_cut_wire_holds_bytes_back_and_delivers_them_later() {
    let redis = Redis::start();
    let cut = Cut::before(redis.process.port()).await;
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", cut.port())).await.unwrap();
    let mut answer = [0; 7];
    stream.write_all(b"PING\r\n").await.unwrap();
    stream.read_exact(&mut answer).await.unwrap();
    for held in [Flow::ToServerHeld, Flow::ToClientHeld, Flow::Held] {
        cut.set(held);
        stream.write_all(b"PING\r\n").await.unwrap();
        let read = tokio::time::timeout(Duration::from_millis(200), stream.read_exact(&mut answer));
        assert!(read.await.is_err(), "{held:?} let it through");
        cut.set(Flow::Open);
        stream.read_exact(&mut answer).await.unwrap();
    }
    cut.set(Flow::Refused);
    assert_eq!(stream.read(&mut answer).await.unwrap(), 0);
}
