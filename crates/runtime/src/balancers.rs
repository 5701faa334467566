//! Who is at the other end where balancers stand between: the PROXY protocol and forwarded headers, believed from listed
//! addresses only.
//!
//! A listed address speaks for others, so it is believed for as long as it does what it was listed for. Over TCP, where a
//! balancer passes bytes on as they come, it must begin each connection with a PROXY header: one that does not would let
//! its clients write the header themselves. Over HTTP, where it writes requests itself, the header is taken if it comes.
//!
//! Start reading at [`Balancers::peer`].

pub mod proxy;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use fieldline_model::Network;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;

use proxy::{Beginning, Malformed, V1_BYTES_MAX, V2_HEAD_BYTES, V2_REST_BYTES_MAX};

/// Longest that a balancer may take for its header, which it sends before anything else.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Wait before the first bytes are looked at again where they do not yet say what they begin.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Least time between two warnings about balancers.
const WARN_EVERY: Duration = Duration::from_secs(10);
/// Most balancers in a row that a forwarded header may name.
const HOPS_MAX: usize = 16;

/// `[balancers]`: who may say on whose behalf they connect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Balancers {
    /// Addresses and networks of balancers, such as `10.0.0.8` or `10.0.0.0/29`. Nobody else must be able to connect from
    /// them. None by default: peers are who they are.
    pub addresses: Vec<Network>,
    /// The header by which they name their client to the API.
    pub header: Forwarded,
}

/// A header that names the client. One of them: where a balancer sets one, the other is as its client sent it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Forwarded {
    /// `X-Forwarded-For`, with `X-Forwarded-Proto`: what most send.
    #[default]
    XForwardedFor,
    /// `Forwarded`, of RFC 7239.
    Forwarded,
}

/// Whether a listed balancer has to send a PROXY header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// It passes bytes on: without one the connection is refused.
    Required,
    /// It may speak HTTP itself.
    Optional,
}

/// Why a balancer's connection cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// It began with something else.
    #[error(
        "{0} is listed in balancers.addresses and sent no PROXY header: set `proxy_protocol on` (nginx) or \
         `send-proxy-v2` (haproxy) there, or take it off the list"
    )]
    Missing(IpAddr),
    /// It is none that is understood.
    #[error("the PROXY header of the balancer {0} cannot be read: {1}")]
    Malformed(IpAddr, Malformed),
    /// It did not come in time.
    #[error("the balancer {0} sent no whole PROXY header within 5 s")]
    Late(IpAddr),
    /// It closed first, as those do that only look whether the port is open.
    #[error("the balancer closed before it sent a header")]
    Closed,
    /// The network failed.
    #[error(transparent)]
    Network(#[from] io::Error),
}

/// What a forwarded header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// Who asks. Its port is 0 where the header names none.
    pub peer: SocketAddr,
    /// Whether it does so by HTTPS; `None` where nobody says.
    pub secure: Option<bool>,
}

impl Balancers {
    /// Whether `address` is listed.
    #[must_use]
    pub fn lists(&self, address: IpAddr) -> bool {
        self.addresses.iter().any(|network| network.contains(address))
    }

    /// Who is at the other end of a connection that was just accepted from `peer`. Only a listed peer is asked: of another
    /// one not a byte is read, so that a header is what any junk is. The stream is left at the first byte after the header.
    ///
    /// Takes at most [`HEADER_TIMEOUT`] and 2 KiB. Not cancel-safe: drop the stream with the future.
    ///
    /// # Errors
    ///
    /// [`HeaderError`]: close the connection.
    pub async fn peer(
        &self,
        stream: &mut TcpStream,
        peer: SocketAddr,
        header: Header,
    ) -> Result<SocketAddr, HeaderError> {
        if !self.lists(peer.ip()) {
            return Ok(peer);
        }
        // Boxed: a connection that waits for its first byte is to stay small.
        let read = Box::pin(timeout(HEADER_TIMEOUT, read_header(stream, peer.ip(), header)));
        match read.await.unwrap_or(Err(HeaderError::Late(peer.ip()))) {
            Ok(named) => Ok(named.unwrap_or(peer)),
            Err(error) => {
                warn_seldom(&error);
                Err(error)
            }
        }
    }

    /// The name of [`Self::header`], in lower case.
    #[must_use]
    pub const fn header_name(&self) -> &'static str {
        match self.header {
            Forwarded::XForwardedFor => "x-forwarded-for",
            Forwarded::Forwarded => "forwarded",
        }
    }

    /// Who asks, as the forwarded header says: `values` are those of [`Self::header_name`] in order, `scheme` the value of
    /// `X-Forwarded-Proto`. `None` where `peer`, from which the request came, is not listed: then it is the one who asks.
    ///
    /// Read from the end, where the nearest balancer wrote: the first that is not listed is the client, whatever it claims
    /// itself further on. What cannot be read ends the reading.
    #[must_use]
    pub fn client<'a>(
        &self,
        peer: SocketAddr,
        values: impl IntoIterator<Item = &'a str>,
        scheme: Option<&str>,
    ) -> Option<Client> {
        if !self.lists(peer.ip()) {
            return None;
        }
        let mut hops: Vec<Hop<'_>> = Vec::new();
        for value in values {
            for element in split(value, b',') {
                hops.push(match self.header {
                    Forwarded::XForwardedFor => Hop { address: Some(element), scheme: None },
                    Forwarded::Forwarded => Hop::read(element),
                });
            }
        }
        let last = |text: &str| {
            text.rsplit(',').next().map(|one| one.trim().eq_ignore_ascii_case("https"))
        };
        let secure = match self.header {
            Forwarded::XForwardedFor => scheme.and_then(last),
            Forwarded::Forwarded => hops.last().and_then(|hop| hop.scheme).and_then(last),
        };
        let mut client = Client { peer, secure };
        for hop in hops.iter().rev().take(HOPS_MAX) {
            let Some(named) = hop.address.and_then(address) else { break };
            client.peer = named;
            if !self.lists(named.ip()) {
                break;
            }
        }
        Some(client)
    }
}

/// Says what is the operator's to mend; not for every connection.
fn warn_seldom(error: &HeaderError) {
    static WARNED: Mutex<Option<Instant>> = Mutex::new(None);
    if matches!(error, HeaderError::Closed | HeaderError::Network(_)) {
        return;
    }
    metrics::counter!("fieldline_balancer_headers_refused_total").increment(1);
    let now = Instant::now();
    let mut warned = WARNED.lock();
    if warned.is_none_or(|last| now.duration_since(last) >= WARN_EVERY) {
        *warned = Some(now);
        tracing::warn!(%error, "a balancer's connection is refused");
    }
}

async fn read_header(
    stream: &mut TcpStream,
    peer: IpAddr,
    header: Header,
) -> Result<Option<SocketAddr>, HeaderError> {
    let malformed = |error| HeaderError::Malformed(peer, error);
    let mut first = [0; V1_BYTES_MAX];
    let begun = loop {
        let count = stream.peek(&mut first).await?;
        if count == 0 {
            return Err(HeaderError::Closed);
        }
        match proxy::beginning(first.get(..count).unwrap_or(&first)) {
            Beginning::Unclear => tokio::time::sleep(LOOK_AGAIN).await,
            begun => break begun,
        }
    };
    match begun {
        Beginning::V1 => {
            let mut line = Vec::with_capacity(V1_BYTES_MAX);
            while line.last() != Some(&b'\n') {
                if line.len() == V1_BYTES_MAX {
                    return Err(malformed(Malformed("the line of version 1 does not end")));
                }
                // All up to the end of the line, if that came; else all that came, which is before it.
                let room = V1_BYTES_MAX - line.len();
                let mut part = [0; V1_BYTES_MAX];
                let Some(part) = part.get_mut(..room) else { break };
                let count = stream.peek(part).await?;
                let came = part.get(..count).unwrap_or_default();
                let end = came.iter().position(|byte| *byte == b'\n');
                let taken = end.map_or(count, |at| at + 1);
                if taken == 0 {
                    return Err(HeaderError::Closed);
                }
                let Some(part) = part.get_mut(..taken) else { break };
                stream.read_exact(part).await?;
                line.extend_from_slice(part);
            }
            proxy::read_v1(&line).map_err(malformed)
        }
        Beginning::V2 => {
            let mut head = [0; V2_HEAD_BYTES];
            stream.read_exact(&mut head).await?;
            let length = proxy::v2_rest(&head).map_err(malformed)?;
            let mut rest = [0; V2_REST_BYTES_MAX];
            let rest = rest.get_mut(..length).unwrap_or_default();
            stream.read_exact(rest).await?;
            proxy::read_v2(&head, rest).map_err(malformed)
        }
        Beginning::None | Beginning::Unclear if header == Header::Required => {
            Err(HeaderError::Missing(peer))
        }
        Beginning::None | Beginning::Unclear => Ok(None),
    }
}

/// One balancer's part of a forwarded header.
struct Hop<'a> {
    address: Option<&'a str>,
    scheme: Option<&'a str>,
}

impl<'a> Hop<'a> {
    /// Reads an element of `Forwarded`, such as `for="[2001:db8::7]:4711";proto=https`.
    fn read(element: &'a str) -> Self {
        let mut hop = Self { address: None, scheme: None };
        for pair in split(element, b';') {
            let Some((name, value)) = pair.split_once('=') else { continue };
            let quoted = value.trim().strip_prefix('"').and_then(|value| value.strip_suffix('"'));
            let value = quoted.unwrap_or(value.trim());
            match name.trim() {
                name if name.eq_ignore_ascii_case("for") => hop.address = Some(value),
                name if name.eq_ignore_ascii_case("proto") => hop.scheme = Some(value),
                _ => {}
            }
        }
        hop
    }
}

/// The parts between separators, those within quotes aside, without the spaces around them.
fn split(text: &str, separator: u8) -> impl Iterator<Item = &str> {
    let (mut quoted, mut escaped) = (false, false);
    text.split(move |c: char| {
        let was_escaped = std::mem::take(&mut escaped);
        match c {
            '\\' if quoted && !was_escaped => escaped = true,
            '"' if !was_escaped => quoted = !quoted,
            _ => return !quoted && c == char::from(separator),
        }
        false
    })
    .map(str::trim)
}

/// An address as headers have it: `192.0.2.7`, `192.0.2.7:80`, `2001:db8::7`, `[2001:db8::7]`, `[2001:db8::7]:80`.
fn address(text: &str) -> Option<SocketAddr> {
    let plain = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let read = match plain.parse::<IpAddr>() {
        Ok(address) => SocketAddr::new(address, 0),
        Err(_) => text.parse().ok()?,
    };
    Some(SocketAddr::new(read.ip().to_canonical(), read.port()))
}

#[cfg(test)]
mod tests;
