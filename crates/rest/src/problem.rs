//! Problem documents (RFC 9457): every error that a client sees.

use bytes::Bytes;
use fieldline_auth::AuthError;
use fieldline_contracts::{CommandError, HistoryError, RegistryError, StateError};
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use hyper::{Response, StatusCode};
use serde::Serialize;
use serde_json::{Map, Value as Json};
use utoipa::ToSchema;

/// An error for a client. Boxed, since hardly any request has one.
#[derive(Debug)]
pub(crate) struct Problem(Box<Document>);

/// What went wrong, in a form that a person can act on and a program can tell apart by `code`.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Problem)]
pub(crate) struct Document {
    /// Always `about:blank`: `code` tells problems apart.
    #[serde(rename = "type")]
    kind: &'static str,
    /// What kind of problem it is, for people.
    title: &'static str,
    /// The HTTP status.
    status: u16,
    /// What exactly is wrong, and what to do.
    detail: String,
    /// Stable name of the kind of problem.
    code: &'static str,
    /// Places, where there are several: lines of a source text. A single member of the body is named by `member`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<Object>)]
    errors: Vec<Json>,
    /// Further members.
    #[serde(flatten)]
    #[schema(ignore)]
    more: Map<String, Json>,
    #[serde(skip)]
    #[schema(ignore)]
    retry_after_s: Option<u64>,
}

macro_rules! problems {
    ($($(#[doc = $doc:literal])+ $name:ident = $status:ident, $code:literal, $title:literal;)+) => {
        impl Problem {
            $($(#[doc = $doc])+ pub(crate) fn $name(detail: impl Into<String>) -> Self {
                Self::new(StatusCode::$status, $code, $title, detail.into())
            })+

            /// Every code with its status and title, for documents.
            pub(crate) const ALL: &'static [(&'static str, StatusCode, &'static str)] =
                &[$(($code, StatusCode::$status, $title),)+];
        }
    };
}

problems! {
    /// The address, query or body cannot be read.
    bad_request = BAD_REQUEST, "bad_request", "The request cannot be read";
    /// A query parameter is unknown or has a wrong form.
    bad_query = BAD_REQUEST, "bad_query", "A query parameter is wrong";
    /// The caller is unknown.
    unauthenticated = UNAUTHORIZED, "unauthenticated", "Sign in, or send a valid token";
    /// A scope is missing.
    scope_missing = FORBIDDEN, "scope_missing", "A right is missing";
    /// The token is restricted to some devices.
    restricted = FORBIDDEN, "restricted", "This token is restricted to some devices";
    /// A write by cookie without the header that a foreign page cannot send.
    csrf = FORBIDDEN, "csrf", "The header X-Fieldline-Csrf is missing";
    /// There is no such thing in this account.
    not_found = NOT_FOUND, "not_found", "There is no such thing here";
    /// The path is there, the method is not.
    method_not_allowed = METHOD_NOT_ALLOWED, "method_not_allowed", "This path has other methods";
    /// The body did not come in time.
    body_timeout = REQUEST_TIMEOUT, "body_timeout", "The body did not come in time";
    /// It clashes with what is there.
    conflict = CONFLICT, "conflict", "It clashes with what is there";
    /// A unique key is in use.
    taken = CONFLICT, "taken", "The name is taken";
    /// The same request is being done or was done.
    repeated = CONFLICT, "repeated", "The same request was sent before";
    /// The object was changed meanwhile.
    changed = PRECONDITION_FAILED, "changed", "The object was changed meanwhile";
    /// The body is too large.
    too_large = PAYLOAD_TOO_LARGE, "too_large", "The body is too large";
    /// The address is too long.
    uri_too_long = URI_TOO_LONG, "uri_too_long", "The address is too long";
    /// The body is not JSON.
    not_json = UNSUPPORTED_MEDIA_TYPE, "not_json", "The body must be JSON";
    /// A value is not possible.
    invalid = UNPROCESSABLE_ENTITY, "invalid", "A value is not possible";
    /// A protocol's source does not compile.
    does_not_compile = UNPROCESSABLE_ENTITY, "does_not_compile", "The source does not compile";
    /// Too many requests.
    too_many = TOO_MANY_REQUESTS, "too_many", "Too many requests";
    /// A fault of ours.
    internal = INTERNAL_SERVER_ERROR, "internal", "A fault of the server";
    /// A store cannot answer now.
    unavailable = SERVICE_UNAVAILABLE, "unavailable", "The server cannot do this now";
    /// Last values cannot be read now.
    state_unavailable = SERVICE_UNAVAILABLE, "state_unavailable", "Last values cannot be read now";
    /// It took too long.
    timeout = SERVICE_UNAVAILABLE, "timeout", "It took too long";
}

impl Problem {
    fn new(status: StatusCode, code: &'static str, title: &'static str, detail: String) -> Self {
        Self(Box::new(Document {
            kind: "about:blank",
            title,
            status: status.as_u16(),
            detail,
            code,
            errors: Vec::new(),
            more: Map::new(),
            retry_after_s: None,
        }))
    }

    /// With places.
    pub(crate) fn with_errors(mut self, errors: Vec<Json>) -> Self {
        self.0.errors = errors;
        self
    }

    /// With another title than is usual for its code.
    pub(crate) fn titled(mut self, title: &'static str) -> Self {
        self.0.title = title;
        self
    }

    /// With a further member.
    pub(crate) fn with(mut self, name: &str, value: impl Into<Json>) -> Self {
        self.0.more.insert(name.to_owned(), value.into());
        self
    }

    /// With the time after which it is worth trying again.
    pub(crate) fn retry_after(mut self, seconds: u64) -> Self {
        self.0.retry_after_s = Some(seconds.max(1));
        self
    }

    /// A value of a member that is not possible.
    pub(crate) fn member(name: &str, detail: impl std::fmt::Display) -> Self {
        // Said once: `errors` is for where there are several.
        Self::invalid(format!("`{name}`: {detail}")).with("member", name)
    }

    /// A fault of ours: the log has the details, the client does not.
    pub(crate) fn fault(error: impl std::fmt::Display) -> Self {
        tracing::error!(%error, "a request failed");
        Self::internal("the server's log has the details; please report them")
    }

    pub(crate) fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// Whether it says that the outcome is not known.
    pub(crate) fn is_timeout(&self) -> bool {
        self.0.code == "timeout"
    }

    pub(crate) fn detail(&self) -> &str {
        &self.0.detail
    }

    pub(crate) fn into_response(self) -> Response<Full<Bytes>> {
        let body = serde_json::to_vec(&*self.0).unwrap_or_default();
        let mut response = Response::new(Full::new(Bytes::from(body)));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = self.0.retry_after_s {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.0.status == StatusCode::UNAUTHORIZED.as_u16() {
            let scheme = HeaderValue::from_static("Bearer realm=\"fieldline\"");
            headers.insert(WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

impl From<RegistryError> for Problem {
    fn from(error: RegistryError) -> Self {
        match error {
            RegistryError::Taken { kind, key, value } => {
                let kind = kind.name();
                Self::taken(format!(
                    "another {kind} has the {key} `{value}`; choose another, or change that one"
                ))
                .with("member", key)
            }
            RegistryError::NotFound { kind, id } => missing(kind.name(), &id.to_string()),
            RegistryError::Changed { expected, found } => Self::changed(format!(
                "you saw revision {expected}, it is at {found} now; read it again, then change it"
            )),
            RegistryError::Unavailable(reason) => {
                tracing::error!(reason, "the registry is unavailable");
                Self::unavailable(
                    "the registry does not answer; try again in a moment, and see the server's log",
                )
                .retry_after(1)
            }
            // What is stored cannot be read: not the caller's doing.
            error => Self::fault(error),
        }
    }
}

/// There is no `kind` with this id or name.
pub(crate) fn missing(kind: &str, id: &str) -> Problem {
    // Quoted back in part only: it is from outside.
    let id: String = id.chars().take(64).collect();
    Problem::not_found(format!("there is no {kind} `{id}` in this account"))
}

impl From<AuthError> for Problem {
    fn from(error: AuthError) -> Self {
        match error {
            AuthError::Unauthenticated(text) => Self::unauthenticated(text),
            AuthError::TooMany { retry_after_s } => {
                Self::too_many(error.to_string()).retry_after(retry_after_s)
            }
            AuthError::Refused(text) => Self::invalid(text),
            AuthError::Registry(error) => error.into(),
            error => Self::fault(error),
        }
    }
}

impl From<HistoryError> for Problem {
    fn from(error: HistoryError) -> Self {
        let code = error.code();
        let problem = match &error {
            HistoryError::Full(_) => Self::unavailable(
                "the disk is full: nothing was stored; it goes on when space returns",
            )
            .retry_after(30),
            HistoryError::Busy => {
                Self::unavailable("the store has more to write than it can take; try again")
                    .retry_after(1)
            }
            HistoryError::Closed => Self::unavailable("the server is shutting down").retry_after(5),
            HistoryError::Corrupt(text) => Self::internal(text).titled("Stored data is damaged"),
            _ => {
                tracing::error!(%error, "history failed");
                Self::unavailable("the store failed: it is not known whether the messages were stored; send them again, doubles are recognised")
                    .retry_after(5)
            }
        };
        problem.with("reason", code)
    }
}

impl From<StateError> for Problem {
    fn from(error: StateError) -> Self {
        match error {
            // Its own log has the details; addresses and the like are not for tenants.
            StateError::Unavailable(_) => Self::state_unavailable(
                "what is known of devices now cannot be read at the moment; messages are stored all the same, and can be read",
            )
            .retry_after(1),
            StateError::Superseded { .. } => Self::conflict(error.to_string()),
            StateError::Refused(text) => Self::invalid(text),
            error => Self::fault(error),
        }
    }
}

impl From<CommandError> for Problem {
    fn from(error: CommandError) -> Self {
        match error {
            CommandError::NoDevice(id) => missing("device", &id.to_string()),
            CommandError::NotFound(id) => missing("command", &id.to_string()),
            CommandError::TooLate(_) => Self::conflict(error.to_string()),
            CommandError::QueueFull(_) => Self::too_many(error.to_string()).retry_after(10),
            CommandError::Invalid(text) => Self::invalid(text),
            CommandError::Registry(error) => error.into(),
            error => Self::fault(error),
        }
    }
}
