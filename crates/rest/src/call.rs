//! One request, as handlers see it, and how they answer.

use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::Arc;

use bytes::Bytes;
use fieldline_auth::Identity;
use fieldline_contracts::RegistryError;
use fieldline_contracts::registry::Entity;
use fieldline_model::{AccountId, DeviceId};
use http_body_util::Full;
use hyper::header::{
    CACHE_CONTROL, CONTENT_TYPE, ETAG, HeaderMap, HeaderValue, IF_MATCH, IF_NONE_MATCH,
};
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Response, StatusCode, Uri};
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::app::App;
use crate::problem::{Problem, missing};
use crate::query::Query;
use crate::route::{Answer, Route};

/// A request.
pub(crate) struct Call {
    pub(crate) app: Arc<App>,
    pub(crate) route: &'static Route,
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    pub(crate) headers: HeaderMap,
    pub(crate) path: Vec<String>,
    pub(crate) query: Query,
    pub(crate) body: Bytes,
    pub(crate) peer: SocketAddr,
    /// Whether it came over TLS.
    pub(crate) secure: bool,
    /// Taken by the route that becomes a WebSocket.
    pub(crate) upgrade: Option<OnUpgrade>,
}

/// A request of someone who signed in.
pub(crate) struct Ctx {
    pub(crate) call: Call,
    pub(crate) identity: Identity,
}

impl Deref for Ctx {
    type Target = Call;

    fn deref(&self) -> &Call {
        &self.call
    }
}

impl Call {
    /// The variable part of the path at `at`, decoded.
    pub(crate) fn segment(&self, at: usize) -> &str {
        self.path.get(at).map_or("", String::as_str)
    }

    /// The id at `at` in the path; text that is no id is one that is not there.
    pub(crate) fn id(&self, at: usize, kind: &str) -> Result<Uuid, Problem> {
        let text = self.segment(at);
        Uuid::try_parse(text).map_err(|_| missing(kind, text))
    }

    /// A header's text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The body, an object, as a `T`; errors name the member.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        // An array would pass as the members in their order.
        if self.body.trim_ascii_start().first() == Some(&b'[') {
            return Err(Problem::invalid("the body must be a JSON object, not an array"));
        }
        self.json_any()
    }

    /// The body as a `T`, whatever JSON that is; errors name the member.
    pub(crate) fn json_any<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        if !self.body.is_empty() {
            let declared = self.header("content-type").unwrap_or("");
            let kind = declared.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
            // Only what a foreign page's form cannot send without being asked for.
            let json = kind == "application/json"
                || (kind.starts_with("application/") && kind.ends_with("+json"));
            if !json {
                return Err(Problem::not_json(
                    "send the body as JSON, with the header `Content-Type: application/json`",
                ));
            }
        }
        read_json(&self.body)
    }

    /// The revision that `If-Match` names; `None` where there is none, or `*`.
    pub(crate) fn if_match(&self) -> Result<Option<u64>, Problem> {
        let Some(text) = self.headers.get(IF_MATCH) else { return Ok(None) };
        let text = text.to_str().unwrap_or("").trim();
        if text == "*" {
            return Ok(None);
        }
        let number = text.trim_start_matches("W/").trim_matches('"');
        number.parse().map(Some).map_err(|_| {
            Problem::changed(format!(
                "`If-Match: {}` is no revision of ours; send the `ETag` that you got",
                text.chars().take(64).collect::<String>()
            ))
        })
    }

    /// Whether the client has what `etag` names already.
    pub(crate) fn has(&self, etag: &str) -> bool {
        let text = self.headers.get(IF_NONE_MATCH).and_then(|value| value.to_str().ok());
        text.is_some_and(|text| {
            text.split(',').map(str::trim).any(|one| one.trim_start_matches("W/") == etag)
        })
    }
}

impl Ctx {
    /// The caller's account: what every query is given.
    pub(crate) fn account(&self) -> AccountId {
        self.identity.account
    }

    /// The device id at `at` in the path, if it may be seen. Whether it exists is another matter.
    pub(crate) fn device_id(&self, at: usize) -> Result<DeviceId, Problem> {
        let id = DeviceId(self.id(at, "device")?);
        if self.identity.may_see(id) { Ok(id) } else { Err(missing("device", self.segment(at))) }
    }

    /// Has last values forget a device that was deleted. If they cannot be reached they do it
    /// later: what is asked of the registry is done, and does not wait for it.
    pub(crate) async fn forget(&self, account: AccountId, device: DeviceId) {
        if let Err(error) = self.app.platform().state.forget(account, device).await {
            tracing::warn!(%device, %error, "a deleted device is forgotten later");
        }
    }

    /// Refuses callers who are restricted to some devices.
    pub(crate) fn unrestricted(&self, what: &str) -> Result<(), Problem> {
        if self.identity.sees_all() {
            return Ok(());
        }
        Err(Problem::restricted(format!(
            "{what} needs a token that sees all devices of the account"
        )))
    }

    /// The answer with an object's JSON and its `ETag`; 304 where the client has it.
    pub(crate) fn object(&self, revision: u64, object: &impl Serialize) -> Answer {
        let etag = format!("\"{revision}\"");
        if self.method == Method::GET && self.has(&etag) {
            return Ok(with_etag(empty(StatusCode::NOT_MODIFIED), &etag));
        }
        Ok(with_etag(json(self.status(), object)?, &etag))
    }

    fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.route.status).unwrap_or(StatusCode::OK)
    }

    /// The object of this id in the caller's account.
    pub(crate) async fn load<T: Entity>(
        &self,
        id: Uuid,
    ) -> Result<fieldline_contracts::registry::Versioned<T>, Problem> {
        use fieldline_contracts::RegistryExt as _;
        let found = self.app.registry().get_object::<T>(self.account(), id).await?;
        found.ok_or_else(|| RegistryError::NotFound { kind: T::KIND, id }.into())
    }
}

/// Reads JSON; errors name the member and the place.
pub(crate) fn read_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    if bytes.is_empty() {
        return Err(Problem::bad_request("a JSON body is needed"));
    }
    let mut source = serde_json::Deserializer::from_slice(bytes);
    let read = serde_path_to_error::deserialize(&mut source);
    let value = read.map_err(|error| {
        let member = error.path().to_string();
        let inner = error.into_inner();
        if inner.is_syntax() || inner.is_eof() {
            return Problem::bad_request(format!("the body is not JSON: {inner}"));
        }
        named(&member, &inner)
    })?;
    source.end().map_err(|error| Problem::bad_request(format!("after the JSON body: {error}")))?;
    Ok(value)
}

/// The problem of a JSON value that has another form than wanted.
pub(crate) fn named(member: &str, error: &serde_json::Error) -> Problem {
    let text = error.to_string();
    // Where there is no text, there is no line.
    let text = text.split(" at line ").next().unwrap_or("").to_owned();
    if member == "." || member.is_empty() {
        return Problem::invalid(text);
    }
    Problem::member(member, text)
}

/// An answer without a body.
pub(crate) fn empty(status: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}

/// An answer with JSON.
pub(crate) fn json(status: StatusCode, value: &impl Serialize) -> Answer {
    let bytes = serde_json::to_vec(value).map_err(Problem::fault)?;
    Ok(json_bytes(status, Bytes::from(bytes)))
}

/// An answer with JSON text.
pub(crate) fn json_text(text: String) -> Response<Full<Bytes>> {
    json_bytes(StatusCode::OK, Bytes::from(text))
}

fn json_bytes(status: StatusCode, bytes: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(bytes));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// Adds an `ETag`; it may be kept, and asked for again.
pub(crate) fn with_etag(mut response: Response<Full<Bytes>>, etag: &str) -> Response<Full<Bytes>> {
    if let Ok(value) = HeaderValue::from_str(etag) {
        response.headers_mut().insert(ETAG, value);
    }
    let keep = HeaderValue::from_static("private, no-cache");
    response.headers_mut().insert(CACHE_CONTROL, keep);
    response
}
