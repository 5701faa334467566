//! The HTTP client behind `ctl` and `doctor`: one request, one answer.

use std::net::ToSocketAddrs as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::RootCertStore;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use serde_json::Value as Json;
use tokio::net::TcpStream;

/// Longest wait for an answer, the server's own wait for a command included.
const TIMEOUT: Duration = Duration::from_secs(90);
/// Largest answer taken.
const BODY_BYTES_MAX: usize = 64 << 20;

/// A server to talk to.
pub(crate) struct Client {
    base: Uri,
    token: Option<String>,
    roots: Arc<RootCertStore>,
}

/// An answer.
pub(crate) struct Answer {
    /// Its status.
    pub(crate) status: StatusCode,
    /// Its body.
    pub(crate) body: Bytes,
}

impl Answer {
    /// The body as JSON, or the problem in words.
    pub(crate) fn json(self) -> Result<Json, String> {
        let json = serde_json::from_slice(&self.body).unwrap_or(Json::Null);
        if self.status.is_success() {
            return Ok(json);
        }
        let text =
            |name: &str| json.get(name).and_then(Json::as_str).unwrap_or_default().to_owned();
        let mut problem = format!("{} {}", self.status, text("title"));
        // Where errors are listed, the detail sums them up.
        let errors = errors(&json);
        let part = if errors.is_empty() { text("detail") } else { errors };
        if !part.is_empty() {
            problem.push_str(": ");
            problem.push_str(&part);
        }
        Err(problem)
    }
}

/// The list of errors of a problem document, a line each.
fn errors(json: &Json) -> String {
    let list = json.get("errors").and_then(Json::as_array).map(Vec::as_slice).unwrap_or_default();
    let line = |error: &Json| {
        let text = |name: &str| {
            error.get(name).map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned))
        };
        let place =
            text("line").zip(text("column")).map(|(line, column)| format!("{line}:{column}: "));
        format!("\n  {}{}", place.unwrap_or_default(), text("message").unwrap_or_default())
    };
    list.iter().map(line).collect()
}

impl Client {
    /// A client of the server at `url`, trusting the system's authorities and those in `ca`.
    pub(crate) fn new(url: &str, token: Option<String>, ca: Option<&Path>) -> Result<Self, String> {
        let base: Uri =
            url.parse().map_err(|error| format!("`{url}` is not an address: {error}"))?;
        if !matches!(base.scheme_str(), Some("http" | "https")) || base.host().is_none() {
            return Err(format!(
                "`{url}` is not an address: expected http://HOST:PORT or https://HOST:PORT"
            ));
        }
        let mut roots = RootCertStore::empty();
        if base.scheme_str() == Some("https") {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
        if let Some(path) = ca {
            let certificates = CertificateDer::pem_file_iter(path)
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .map_err(|error| format!("cannot read `{}`: {error}", path.display()))?;
            roots.add_parsable_certificates(certificates);
        }
        Ok(Self { base, token, roots: Arc::new(roots) })
    }

    /// Sends a request and reads the whole answer.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Json>,
    ) -> Result<Answer, String> {
        let sent = tokio::time::timeout(TIMEOUT, self.exchange(method, path, body)).await;
        sent.unwrap_or_else(|_| Err(format!("{} did not answer within {TIMEOUT:?}", self.base)))
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Option<&Json>,
    ) -> Result<Answer, String> {
        let host = self.base.host().unwrap_or_default();
        let https = self.base.scheme_str() == Some("https");
        let port = self.base.port_u16().unwrap_or(if https { 443 } else { 80 });
        let mut request =
            Request::builder().method(method).uri(path).header(HOST, format!("{host}:{port}"));
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let bytes = match body {
            Some(json) => {
                request = request.header(CONTENT_TYPE, "application/json");
                Bytes::from(json.to_string())
            }
            None => Bytes::new(),
        };
        let request =
            request.body(Full::new(bytes)).map_err(|error| format!("`{path}`: {error}"))?;
        let unreachable = |error: &dyn std::fmt::Display| {
            format!(
                "cannot reach {}: {error}; is the server running, and is this its address?",
                self.base
            )
        };
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let address = (bare, port)
            .to_socket_addrs()
            .map_err(|error| unreachable(&error))?
            .next()
            .ok_or_else(|| unreachable(&"the name has no address"))?;
        let stream = TcpStream::connect(address).await.map_err(|error| unreachable(&error))?;
        let response = if https {
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let config = rustls::ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .map_err(|error| unreachable(&error))?
                .with_root_certificates(Arc::clone(&self.roots))
                .with_no_client_auth();
            let name =
                ServerName::try_from(bare.to_owned()).map_err(|error| unreachable(&error))?;
            let stream = tokio_rustls::TlsConnector::from(Arc::new(config))
                .connect(name, stream)
                .await
                .map_err(|error| unreachable(&error))?;
            request_over(TokioIo::new(stream), request).await
        } else {
            request_over(TokioIo::new(stream), request).await
        };
        let response = response.map_err(|error| unreachable(&error))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), BODY_BYTES_MAX)
            .collect()
            .await
            .map_err(|error| format!("the answer of {} broke off: {error}", self.base))?
            .to_bytes();
        Ok(Answer { status, body })
    }
}

async fn request_over<IO>(
    io: IO,
    request: Request<Full<Bytes>>,
) -> hyper::Result<Response<Incoming>>
where
    IO: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(io).await?;
    // Ends with the answer; what it could report the answer reports too.
    tokio::spawn(connection);
    sender.send_request(request).await
}
