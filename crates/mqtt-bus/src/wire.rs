//! A connection to the broker, from the address to the broker's welcome.

use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use rumqttc::v5::mqttbytes::Error as PacketError;
use rumqttc::v5::mqttbytes::v5::{
    ConnAck, Connect, ConnectProperties, ConnectReturnCode, Login, Packet,
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::ConnectError;
use crate::config::{Address, Tls};
use crate::encoding::PAYLOAD_BYTES_MAX;

/// How long the broker keeps for us what comes while we are away.
pub(crate) const SESSION_EXPIRY: Duration = Duration::from_secs(60);
/// Deliveries that the broker may have on their way to us. We keep none of them.
const RECEIVE_MAX: u16 = 4_096;
/// Publications that we have on their way to it, if it allows as many.
const WINDOW_MAX: u16 = 1_024;
/// Topic and properties around a payload.
const AROUND_BYTES: usize = 4 << 10;
/// Largest packet that we take.
#[allow(clippy::cast_possible_truncation, reason = "both are constants of a few megabytes")]
pub(crate) const PACKET_BYTES_MAX: u32 = (PAYLOAD_BYTES_MAX + AROUND_BYTES) as u32;

pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Whom to connect to, and as whom.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) address: Address,
    pub(crate) tls: Option<Tls>,
    pub(crate) client_id: String,
    pub(crate) silence_max: Duration,
}

/// A connection that the broker welcomed.
pub(crate) struct Opened {
    pub(crate) stream: Box<dyn Stream>,
    /// What came after the welcome.
    pub(crate) inbox: BytesMut,
    /// Whether the broker remembers our subscriptions and kept what came meanwhile.
    pub(crate) session_present: bool,
    /// Publications that may be on their way.
    pub(crate) window: usize,
    /// Largest packet that it takes.
    pub(crate) packet_bytes_max: usize,
}

impl Target {
    /// Connects. `fresh` makes the broker forget an earlier session.
    pub(crate) async fn open(&self, fresh: bool) -> Result<Opened, ConnectError> {
        let address = self.address.to_string();
        match timeout(self.silence_max, self.stream()).await {
            Ok(Ok(stream)) => match timeout(self.silence_max, self.welcome(stream, fresh)).await {
                Ok(opened) => opened,
                Err(_) => Err(ConnectError::Silent { address }),
            },
            Ok(Err(error)) => Err(error),
            Err(_) => {
                let reason = format!("no answer in {} s", self.silence_max.as_secs());
                Err(ConnectError::Unreachable { address, reason })
            }
        }
    }

    async fn stream(&self) -> Result<Box<dyn Stream>, ConnectError> {
        let address = || self.address.to_string();
        let unreachable = |error: std::io::Error| ConnectError::Unreachable {
            address: address(),
            reason: error.to_string(),
        };
        let place = (self.address.host.as_str(), self.address.port);
        let stream = TcpStream::connect(place).await.map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        let Some(Tls { connector, name }) = &self.tls else { return Ok(Box::new(stream)) };
        let encrypted = connector.connect(name.clone(), stream).await;
        let encrypted = encrypted
            .map_err(|error| ConnectError::Tls { address: address(), reason: error.to_string() })?;
        Ok(Box::new(encrypted))
    }

    async fn welcome(
        &self,
        mut stream: Box<dyn Stream>,
        fresh: bool,
    ) -> Result<Opened, ConnectError> {
        let address = || self.address.to_string();
        let expiry = u32::try_from(SESSION_EXPIRY.as_secs()).unwrap_or(u32::MAX);
        let connect = Connect {
            keep_alive: u16::try_from(self.silence_max.as_secs() * 2).unwrap_or(60).max(2),
            client_id: self.client_id.clone(),
            clean_start: fresh,
            properties: Some(ConnectProperties {
                session_expiry_interval: Some(expiry),
                receive_maximum: Some(RECEIVE_MAX),
                max_packet_size: Some(PACKET_BYTES_MAX),
                ..ConnectProperties::new()
            }),
        };
        let login = self.address.login.as_ref().map(|(user, password)| Login::new(user, password));
        let mut out = BytesMut::new();
        let refused = |reason: String| ConnectError::Refused { address: address(), reason };
        let not_mqtt = |reason: String| ConnectError::NotMqtt5 { address: address(), reason };
        let packet = Packet::Connect(connect, None, login);
        packet.write(&mut out, None).map_err(|error| refused(error.to_string()))?;
        let ended = |error: std::io::Error| not_mqtt(format!("it ended the connection: {error}"));
        stream.write_all(&out).await.map_err(ended)?;
        stream.flush().await.map_err(ended)?;
        let mut inbox = BytesMut::with_capacity(64 << 10);
        loop {
            // A server of another protocol may say more than an MQTT broker ever would.
            if inbox.len() > 64 << 10 {
                return Err(not_mqtt("its answer is too long".to_owned()));
            }
            match Packet::read(&mut inbox, Some(PACKET_BYTES_MAX)) {
                Ok(Packet::ConnAck(welcome)) => {
                    return self.judge(welcome).map(|opened| Opened { stream, inbox, ..opened });
                }
                Ok(_) => return Err(not_mqtt("its answer was no welcome".to_owned())),
                Err(PacketError::InsufficientBytes(_)) => {}
                // A broker of an older version says so in a form of its own.
                Err(error) => return Err(not_mqtt(error.to_string().to_lowercase())),
            }
            match stream.read_buf(&mut inbox).await {
                Ok(0) if inbox.has_remaining() => {
                    return Err(not_mqtt("its answer was cut short".to_owned()));
                }
                Ok(0) => return Err(not_mqtt("it ended the connection".to_owned())),
                Ok(_) => {}
                Err(error) if self.tls.is_some() => {
                    let reason = error.to_string();
                    return Err(ConnectError::Tls { address: address(), reason });
                }
                Err(error) => return Err(ended(error)),
            }
        }
    }

    fn judge(&self, welcome: ConnAck) -> Result<Opened, ConnectError> {
        let address = self.address.to_string();
        match welcome.code {
            ConnectReturnCode::Success => {}
            ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized => {
                return Err(ConnectError::Credentials { address });
            }
            ConnectReturnCode::UnsupportedProtocolVersion
            | ConnectReturnCode::RefusedProtocolVersion => {
                let reason = "it refuses version 5".to_owned();
                return Err(ConnectError::NotMqtt5 { address, reason });
            }
            other => {
                return Err(ConnectError::Refused { address, reason: format!("{other:?}") });
            }
        }
        let properties = welcome.properties.as_ref();
        if properties.is_some_and(|all| all.max_qos == Some(0)) {
            return Err(ConnectError::Unfit { address, what: "quality of service 1" });
        }
        if properties.is_some_and(|all| all.wildcard_subscription_available == Some(0)) {
            return Err(ConnectError::Unfit { address, what: "subscriptions with wildcards" });
        }
        let window = properties.and_then(|all| all.receive_max).unwrap_or(WINDOW_MAX);
        let largest = properties.and_then(|all| all.max_packet_size).unwrap_or(u32::MAX);
        Ok(Opened {
            stream: Box::new(tokio::io::empty()),
            inbox: BytesMut::new(),
            session_present: welcome.session_present,
            window: window.clamp(1, WINDOW_MAX).into(),
            packet_bytes_max: usize::try_from(largest).unwrap_or(usize::MAX),
        })
    }
}
