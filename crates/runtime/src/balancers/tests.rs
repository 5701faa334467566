use proptest::prelude::*;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;

use super::*;

fn balancers(header: Forwarded) -> Balancers {
    let addresses = ["127.0.0.1", "10.0.0.0/8"].map(|text| text.parse().unwrap());
    Balancers { addresses: addresses.to_vec(), header }
}

/// Writes `parts` with pauses and tells what came of it, and what is left in the stream.
async fn received(
    parts: &[&[u8]],
    header: Header,
    listed: bool,
) -> (Result<SocketAddr, HeaderError>, Vec<u8>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    client.set_nodelay(true).unwrap();
    let (mut stream, peer) = listener.accept().await.unwrap();
    let balancers = if listed { balancers(Forwarded::default()) } else { Balancers::default() };
    let write = async {
        for part in parts {
            client.write_all(part).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        client.shutdown().await.unwrap();
    };
    let read = async {
        let named = balancers.peer(&mut stream, peer, header).await;
        let mut left = Vec::new();
        // Refused, it is not read any further.
        if named.is_ok() {
            stream.read_to_end(&mut left).await.unwrap();
        }
        (named, left)
    };
    let (_, (named, left)) = tokio::join!(write, read);
    let named = named.map(|named| if named == peer { "0.0.0.0:0".parse().unwrap() } else { named });
    (named, left)
}

#[tokio::test]
async fn the_stream_goes_on_after_the_header() {
    let own: SocketAddr = "0.0.0.0:0".parse().unwrap();
    let far: SocketAddr = "203.0.113.7:51820".parse().unwrap();
    let line = b"PROXY TCP4 203.0.113.7 10.0.0.9 51820 5027\r\n".as_slice();
    let two =
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0f\xcb\0\x71\x07\x0a\0\0\x09\xca\x6c\x13\xa3\x04\0\0"
            .as_slice();
    let unknown = b"PROXY UNKNOWN\r\n".as_slice();
    for (header, whole, peer) in [
        (Header::Required, line, far),
        (Header::Optional, two, far),
        (Header::Required, unknown, own),
    ] {
        let all = [whole, b"\x16\x03\nrest"].concat();
        let (named, left) = received(&[&all], header, true).await;
        assert_eq!((named.unwrap(), left.as_slice()), (peer, b"\x16\x03\nrest".as_slice()));
        // However it is cut.
        for at in [1, 5, 11, whole.len() - 1] {
            let (begin, end) = all.split_at(at);
            let (named, left) = received(&[begin, end], header, true).await;
            assert_eq!((named.unwrap(), left.as_slice()), (peer, b"\x16\x03\nrest".as_slice()));
        }
    }
    // Nobody else is believed, or even read.
    let (named, left) = received(&[line], Header::Required, false).await;
    assert_eq!((named.unwrap(), left.as_slice()), (own, line));
    // Over HTTP it may be left out.
    let request = b"POST / HTTP/1.1\r\n".as_slice();
    let (named, left) = received(&[b"P", &request[1..]], Header::Optional, true).await;
    assert_eq!((named.unwrap(), left.as_slice()), (own, request));
}

#[tokio::test]
async fn what_is_wrong_is_said() {
    let long = [b"PROXY ".as_slice(), &[b'x'; 200]].concat();
    let huge = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff".as_slice();
    for (bytes, said) in [
        (b"\x00\x0f356307042441013".as_slice(), "sent no PROXY header: set `proxy_protocol on`"),
        (&long, "the line of version 1 does not end"),
        (huge, "more than 2064 bytes"),
        (b"PROXY TCP4 x\r\n", "is not as it should be"),
        (b"", "closed before"),
        (b"PROXY TCP4 20", "closed before"),
    ] {
        let (named, _) = received(&[bytes], Header::Required, true).await;
        let text = named.unwrap_err().to_string();
        assert!(text.contains(said), "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_header_that_does_not_come_is_waited_for_a_while() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (mut stream, peer) = listener.accept().await.unwrap();
    let named = balancers(Forwarded::default()).peer(&mut stream, peer, Header::Required).await;
    assert!(matches!(named, Err(HeaderError::Late(_))), "{named:?}");
}

/// Who asks when the request came from the first listed balancer with these values.
fn client(header: Forwarded, values: &[&str]) -> String {
    let peer = "10.0.0.8:4000".parse().unwrap();
    balancers(header).client(peer, values.iter().copied(), None).unwrap().peer.to_string()
}

#[test]
fn the_client_is_the_last_that_no_balancer_is() {
    let x = |values: &[&str]| client(Forwarded::XForwardedFor, values);
    assert_eq!(x(&["203.0.113.7"]), "203.0.113.7:0");
    assert_eq!(x(&["203.0.113.7:81"]), "203.0.113.7:81");
    assert_eq!(x(&["[2001:db8::7]:81"]), "[2001:db8::7]:81");
    assert_eq!(x(&["2001:db8::7"]), "[2001:db8::7]:0");
    // What the client sent itself stands before, in the same line or another.
    assert_eq!(x(&["192.0.2.1, 203.0.113.7"]), "203.0.113.7:0");
    assert_eq!(x(&["192.0.2.1", "10.0.0.1,203.0.113.7"]), "203.0.113.7:0");
    // Two balancers in a row; and only balancers.
    assert_eq!(x(&["203.0.113.7, 10.0.0.9"]), "203.0.113.7:0");
    assert_eq!(x(&["10.1.2.3, 10.0.0.9"]), "10.1.2.3:0");
    // Nothing that can be read.
    assert_eq!(x(&[]), "10.0.0.8:4000");
    assert_eq!(x(&["unknown"]), "10.0.0.8:4000");
    assert_eq!(x(&["203.0.113.7, unknown, 10.0.0.9"]), "10.0.0.9:0");

    let f = |values: &[&str]| client(Forwarded::Forwarded, values);
    assert_eq!(f(&["for=203.0.113.7;proto=https"]), "203.0.113.7:0");
    assert_eq!(f(&["For=\"[2001:db8::7]:4711\" ; by=10.0.0.8"]), "[2001:db8::7]:4711");
    assert_eq!(
        f(&["for=192.0.2.1", "for=\"a,b;for=192.0.2.9\", for=203.0.113.7"]),
        "203.0.113.7:0"
    );
    assert_eq!(f(&["for=203.0.113.7, for=_hidden"]), "10.0.0.8:4000");

    // Whoever is not listed is who he is, whatever he says.
    let stranger = "192.0.2.9:1".parse().unwrap();
    let said = balancers(Forwarded::default()).client(stranger, ["203.0.113.7"], Some("https"));
    assert_eq!(said, None);
}

#[test]
fn how_the_client_came_is_said_by_the_nearest() {
    let peer = "10.0.0.8:4000".parse().unwrap();
    let secure = |header, values: &[&str], scheme| {
        balancers(header).client(peer, values.iter().copied(), scheme).unwrap().secure
    };
    let x = Forwarded::XForwardedFor;
    assert_eq!(secure(x, &["203.0.113.7"], Some("https")), Some(true));
    assert_eq!(secure(x, &["203.0.113.7"], Some("https, http")), Some(false));
    assert_eq!(secure(x, &["203.0.113.7"], None), None);
    let f = Forwarded::Forwarded;
    assert_eq!(secure(f, &["for=203.0.113.7;proto=HTTPS"], Some("http")), Some(true));
    assert_eq!(secure(f, &["for=192.0.2.1;proto=https, for=203.0.113.7"], None), None);
}

#[test]
fn settings_are_read_whole() {
    let read = |json: &str| serde_json::from_str::<Balancers>(json);
    let both = read(r#"{"addresses": ["10.0.0.0/8", "::1"], "header": "forwarded"}"#).unwrap();
    assert!(both.lists("10.2.3.4".parse().unwrap()) && both.lists("::1".parse().unwrap()));
    assert_eq!(both.header, Forwarded::Forwarded);
    assert_eq!(read("{}").unwrap(), Balancers::default());
    assert!(read(r#"{"address": []}"#).is_err());
    let wrong = read(r#"{"addresses": ["10.0.0.0/40"]}"#).unwrap_err().to_string();
    assert!(wrong.contains("is not a network"), "{wrong}");
}

proptest! {
    #[test]
    fn any_header_is_survived(values: Vec<String>, scheme: Option<String>, forwarded: bool) {
        let header = if forwarded { Forwarded::Forwarded } else { Forwarded::XForwardedFor };
        let peer = "10.0.0.8:4000".parse().unwrap();
        let values = values.iter().map(String::as_str);
        prop_assert!(balancers(header).client(peer, values, scheme.as_deref()).is_some());
    }
}
