//! A tiny client that sends any bytes, and reads packets by a parser that is not ours.

use std::time::Duration;

use mqtt_protocol_core::mqtt::packet::{Property, v5_0};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::{NEVER, SOON, Server};

/// A packet as it came: first byte and body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Got {
    pub(crate) first: u8,
    pub(crate) body: Vec<u8>,
}

/// A received PUBLISH.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) topic: String,
    pub(crate) payload: String,
    pub(crate) qos: u8,
    pub(crate) retain: bool,
    pub(crate) packet_id: Option<u16>,
    pub(crate) identifiers: Vec<u32>,
    pub(crate) props: Vec<Property>,
}

/// A connection.
pub(crate) struct Wire {
    pub(crate) stream: TcpStream,
    pub(crate) v5: bool,
    next_id: u16,
}

/// What to connect with.
#[derive(Clone)]
pub(crate) struct Hello<'a> {
    pub(crate) v5: bool,
    pub(crate) client_id: &'a str,
    pub(crate) user_name: Option<&'a str>,
    pub(crate) password: Option<&'a str>,
    pub(crate) keep_alive_s: u16,
    /// Encoded properties of CONNECT.
    pub(crate) props: Vec<u8>,
    /// Topic, payload, QoS, retain.
    pub(crate) will: Option<(&'a str, &'a str, u8, bool)>,
    pub(crate) clean: bool,
}

impl<'a> Hello<'a> {
    pub(crate) fn new(v5: bool, client_id: &'a str, token: &'a str) -> Self {
        Self {
            v5,
            client_id,
            user_name: Some("any"),
            password: Some(token),
            keep_alive_s: 60,
            props: vec![],
            will: None,
            clean: true,
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut body = vec![0, 4, b'M', b'Q', b'T', b'T', if self.v5 { 5 } else { 4 }];
        let mut flags = u8::from(self.clean) << 1;
        if let Some((_, _, qos, retain)) = self.will {
            flags |= 0x04 | qos << 3 | u8::from(retain) << 5;
        }
        flags |= u8::from(self.user_name.is_some()) << 7;
        flags |= u8::from(self.password.is_some()) << 6;
        body.push(flags);
        body.extend(self.keep_alive_s.to_be_bytes());
        if self.v5 {
            body.extend(varint(self.props.len()));
            body.extend(&self.props);
        }
        text(&mut body, self.client_id);
        if let Some((topic, payload, _, _)) = self.will {
            if self.v5 {
                body.push(0);
            }
            text(&mut body, topic);
            text(&mut body, payload);
        }
        for part in [self.user_name, self.password].into_iter().flatten() {
            text(&mut body, part);
        }
        packet(0x10, &body)
    }
}

pub(crate) fn varint(mut n: usize) -> Vec<u8> {
    let mut out = vec![];
    loop {
        let byte = (n % 128) as u8;
        n /= 128;
        out.push(if n > 0 { byte | 0x80 } else { byte });
        if n == 0 {
            return out;
        }
    }
}

pub(crate) fn text(out: &mut Vec<u8>, text: &str) {
    out.extend(u16::try_from(text.len()).unwrap().to_be_bytes());
    out.extend(text.as_bytes());
}

pub(crate) fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![first];
    out.extend(varint(body.len()));
    out.extend(body);
    out
}

impl Wire {
    pub(crate) async fn open(server: &Server) -> Self {
        let stream = TcpStream::connect(server.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream, v5: true, next_id: 0 }
    }

    /// Connects and expects to be let in; returns CONNACK's body too.
    pub(crate) async fn hello(server: &Server, hello: &Hello<'_>) -> (Self, Vec<u8>) {
        let mut wire = Self::open(server).await;
        wire.v5 = hello.v5;
        wire.send(&hello.bytes()).await;
        let connack = wire.recv().await;
        assert_eq!((connack.first, connack.body[1]), (0x20, 0), "{connack:?}");
        (wire, connack.body)
    }

    pub(crate) async fn join(server: &Server, v5: bool, client_id: &str, token: &str) -> Self {
        Self::hello(server, &Hello::new(v5, client_id, token)).await.0
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The next packet.
    pub(crate) async fn recv(&mut self) -> Got {
        self.try_recv(SOON).await.unwrap_or_else(|why| panic!("no packet: {why}"))
    }

    pub(crate) async fn try_recv(&mut self, limit: Duration) -> Result<Got, &'static str> {
        let read = async {
            let first = self.stream.read_u8().await.map_err(|_| "closed")?;
            let (mut length, mut shift) = (0_usize, 0);
            loop {
                let byte = self.stream.read_u8().await.map_err(|_| "closed")?;
                length |= usize::from(byte & 0x7f) << shift;
                shift += 7;
                if byte & 0x80 == 0 {
                    break;
                }
            }
            let mut body = vec![0; length];
            self.stream.read_exact(&mut body).await.map_err(|_| "closed")?;
            Ok(Got { first, body })
        };
        tokio::time::timeout(limit, read).await.unwrap_or(Err("silent"))
    }

    /// Fails if anything comes.
    pub(crate) async fn silent(&mut self) {
        match self.try_recv(NEVER).await {
            Err("silent") => {}
            other => panic!("expected silence, got {other:?}"),
        }
    }

    /// Waits for the end of the connection; returns the DISCONNECT's reason, if one came.
    pub(crate) async fn closed(&mut self) -> Option<u8> {
        let mut reason = None;
        loop {
            match self.try_recv(SOON).await {
                Ok(got) if got.first == 0xe0 => {
                    reason = Some(got.body.first().copied().unwrap_or(0))
                }
                Ok(_) => {}
                Err("closed") => return reason,
                Err(why) => panic!("the connection stays open: {why}"),
            }
        }
    }

    fn id(&mut self) -> u16 {
        self.next_id += 1;
        self.next_id
    }

    /// Subscribes; `options` is the option byte. Returns the result code.
    pub(crate) async fn subscribe(&mut self, filter: &str, options: u8) -> u8 {
        self.subscribe_as(filter, options, &[]).await
    }

    pub(crate) async fn subscribe_as(&mut self, filter: &str, options: u8, props: &[u8]) -> u8 {
        let id = self.id();
        let mut body = id.to_be_bytes().to_vec();
        if self.v5 {
            body.extend(varint(props.len()));
            body.extend(props);
        }
        text(&mut body, filter);
        body.push(options);
        self.send(&packet(0x82, &body)).await;
        let suback = self.recv().await;
        assert_eq!((suback.first, &suback.body[..2]), (0x90, &id.to_be_bytes()[..]), "{suback:?}");
        *suback.body.last().unwrap()
    }

    /// Publishes; `props` are encoded. Returns the packet id of a QoS 1 or 2 message.
    pub(crate) async fn publish(
        &mut self,
        topic: &str,
        payload: &str,
        flags: u8,
        props: &[u8],
    ) -> Option<u16> {
        let mut body = vec![];
        text(&mut body, topic);
        let id = (flags & 0x06 != 0).then(|| self.id());
        if let Some(id) = id {
            body.extend(id.to_be_bytes());
        }
        if self.v5 {
            body.extend(varint(props.len()));
            body.extend(props);
        }
        body.extend(payload.as_bytes());
        self.send(&packet(0x30 | flags, &body)).await;
        id
    }

    /// Publishes with QoS 1 and returns the reason in PUBACK.
    pub(crate) async fn publish_acked(&mut self, topic: &str, payload: &str) -> u8 {
        let id = self.publish(topic, payload, 0x02, &[]).await.unwrap();
        self.puback(id).await
    }

    /// Waits for this PUBACK; returns its reason.
    pub(crate) async fn puback(&mut self, id: u16) -> u8 {
        let got = self.recv().await;
        assert_eq!((got.first, &got.body[..2]), (0x40, &id.to_be_bytes()[..]), "{got:?}");
        if self.v5 {
            let (parsed, used) = v5_0::Puback::parse(&got.body).unwrap();
            assert_eq!(used, got.body.len());
            drop(parsed);
        }
        got.body.get(2).copied().unwrap_or(0)
    }

    /// The next packet, which must be a PUBLISH.
    pub(crate) async fn message(&mut self) -> Received {
        let got = self.recv().await;
        received(&got, self.v5)
    }

    pub(crate) async fn ack(&mut self, id: u16) {
        self.send(&packet(0x40, &id.to_be_bytes())).await;
    }
}

/// Reads a PUBLISH by a parser that is not ours.
pub(crate) fn received(got: &Got, v5: bool) -> Received {
    use mqtt_protocol_core::mqtt::packet::v3_1_1;
    assert_eq!(got.first >> 4, 3, "expected PUBLISH, got {got:?}");
    let flags = got.first & 0x0f;
    let body: std::sync::Arc<[u8]> = got.body.clone().into();
    if v5 {
        let (publish, _) = v5_0::Publish::parse(flags, body).unwrap();
        let props = publish.props().clone();
        let identifiers = props
            .iter()
            .filter_map(|p| match p {
                Property::SubscriptionIdentifier(id) => Some(id.val()),
                _ => None,
            })
            .collect();
        return Received {
            topic: publish.topic_name().to_owned(),
            payload: String::from_utf8(publish.payload().as_slice().to_vec()).unwrap(),
            qos: publish.qos() as u8,
            retain: publish.retain(),
            packet_id: publish.packet_id(),
            identifiers,
            props,
        };
    }
    let (publish, _) = v3_1_1::Publish::parse(flags, body).unwrap();
    Received {
        topic: publish.topic_name().to_owned(),
        payload: String::from_utf8(publish.payload().as_slice().to_vec()).unwrap(),
        qos: publish.qos() as u8,
        retain: publish.retain(),
        packet_id: publish.packet_id(),
        identifiers: vec![],
        props: vec![],
    }
}
