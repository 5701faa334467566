//! The way of a request: route, right, limits, body, handler, answer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use fieldline_auth::{AuthError, Identity};
use fieldline_contracts::TraceParent;
use fieldline_runtime::Balancers;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{
    ACCEPT, ALLOW, AUTHORIZATION, CONTENT_LENGTH, COOKIE, HeaderMap, HeaderValue, UPGRADE,
};
use hyper::{Method, Request, Response};

use crate::app::App;
use crate::call::{Call, Ctx};
use crate::console;
use crate::idempotency::{Begun, Ending, Key};
use crate::problem::Problem;
use crate::query::Query;
use crate::route::{Answer, Handler, Route};

/// The cookie that holds a session's secret.
pub(crate) const COOKIE_NAME: &str = "fieldline_session";
/// The header that a foreign page cannot make a browser send.
const CSRF_HEADER: &str = "x-fieldline-csrf";

/// Where a request came from.
#[derive(Clone, Copy)]
pub(crate) struct Origin {
    pub(crate) peer: SocketAddr,
    pub(crate) secure: bool,
}

impl Origin {
    /// Where the request came from before it came to balancers, if these are listed and say so.
    fn named(self, balancers: &Balancers, headers: &HeaderMap) -> Self {
        if !balancers.lists(self.peer.ip()) {
            return self;
        }
        let text = |value: &'static str| {
            headers.get_all(value).iter().map(|value| value.to_str().unwrap_or_default())
        };
        let scheme = text("x-forwarded-proto").next_back();
        match balancers.client(self.peer, text(balancers.header_name()), scheme) {
            Some(client) => {
                Self { peer: client.peer, secure: client.secure.unwrap_or(self.secure) }
            }
            None => self,
        }
    }
}

/// Most bytes of a path and query; hyper refuses those beyond its buffer by itself.
const URI_BYTES_MAX: usize = 8 << 10;

/// What the caller says that a request belongs to, or something new.
fn trace(headers: &HeaderMap) -> TraceParent {
    let said = headers.get("traceparent").and_then(|value| value.to_str().ok());
    said.and_then(|text| text.parse().ok()).unwrap_or_else(TraceParent::next)
}

fn too_long() -> Problem {
    Problem::uri_too_long(format!("path and query have at most {URI_BYTES_MAX} bytes"))
}

/// Answers one request.
pub(crate) async fn serve(
    app: Arc<App>,
    origin: Origin,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let began = Instant::now();
    let origin = origin.named(&app.config.balancers, request.headers());
    let long =
        request.uri().path_and_query().is_some_and(|path| path.as_str().len() > URI_BYTES_MAX);
    let (answer, counters) = match app.find(request.uri().path()) {
        _ if long => (Err(too_long()), &app.unmatched),
        Some((routes, path)) => match app.pick(routes, request.method()) {
            Some((route, counters)) => {
                // What other nodes are asked for it belongs to the same trace.
                let trace = trace(request.headers());
                (trace.scope(routed(&app, origin, route, path, request)).await, counters)
            }
            None => (Ok(not_allowed(&request, &App::allowed(routes))), &app.unmatched),
        },
        None => (other(&app, origin, &request).await, &app.unmatched),
    };
    let mut response = answer.unwrap_or_else(Problem::into_response);
    response.headers_mut().insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    counters.count(response.status(), micros);
    response
}

fn not_allowed(request: &Request<Incoming>, allowed: &str) -> Response<Full<Bytes>> {
    let (method, path) = (request.method(), request.uri().path());
    let problem = Problem::method_not_allowed(format!("{path} has {allowed}, not {method}"));
    let mut response = problem.into_response();
    if let Ok(value) = HeaderValue::from_str(allowed) {
        response.headers_mut().insert(ALLOW, value);
    }
    response
}

/// A path that no route has: the console's, or nothing.
async fn other(app: &Arc<App>, origin: Origin, request: &Request<Incoming>) -> Answer {
    let path = request.uri().path();
    let shown: String = path.chars().take(200).collect();
    if path.starts_with("/api/") {
        return Err(Problem::not_found(format!(
            "{shown} is no path of this API; see /openapi.json for those that are"
        )));
    }
    // Any address is the console's to read, but only where a person looks: a program that has
    // mistyped a path is told so.
    let known = path == "/" || accepts_page(request.headers()) || console::has(path);
    if !matches!(*request.method(), Method::GET | Method::HEAD) || !known {
        return Err(Problem::not_found(format!("{shown} is no path of this API")));
    }
    // Who has a session gets a page that may show the account's map tiles.
    let identity = match cookie(request.headers()) {
        Some(secret) => app.services.auth.session(secret, origin.peer.ip()).await.ok(),
        None => None,
    };
    console::page(app, request, identity.as_ref()).await
}

fn accepts_page(headers: &HeaderMap) -> bool {
    let text = headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or("");
    text.split(',').any(|one| one.trim().starts_with("text/html"))
}

async fn routed(
    app: &Arc<App>,
    origin: Origin,
    route: &'static Route,
    path: Vec<String>,
    mut request: Request<Incoming>,
) -> Answer {
    let upgrade = request.headers().contains_key(UPGRADE).then(|| hyper::upgrade::on(&mut request));
    let (parts, body) = request.into_parts();
    let query = Query::read(parts.uri.query(), route.query.iter().map(|param| param.name))?;
    let mut call = Call {
        app: Arc::clone(app),
        route,
        method: parts.method,
        uri: parts.uri,
        headers: parts.headers,
        path,
        query,
        body: Bytes::new(),
        peer: origin.peer,
        secure: origin.secure,
        upgrade,
    };
    match route.handler {
        Handler::Public(handler) => {
            call.body = read_body(app, route, &call, body).await?;
            run(app, route, handler(call)).await
        }
        Handler::Private(scope, handler) => {
            let (identity, by_cookie) = authenticate(app, &call.headers, origin).await?;
            if by_cookie
                && !matches!(call.method, Method::GET | Method::HEAD)
                && !call.headers.contains_key(CSRF_HEADER)
            {
                return Err(Problem::csrf(
                    "a change by cookie needs the header `X-Fieldline-Csrf: 1`, which pages of others cannot send",
                ));
            }
            if let Some(scope) = scope
                && !identity.may(scope)
            {
                return Err(missing_scope(&identity, scope));
            }
            let place = app.tenants.request(identity.account)?;
            call.body = read_body(app, route, &call, body).await?;
            let key = match call.header("idempotency-key") {
                Some(key) if route.method == "POST" => {
                    let path = call.uri.path_and_query().map_or("", |path| path.as_str());
                    let (account, kind) = (identity.account, identity.kind);
                    match app.idempotency.begin(account, kind, key, path, &call.body)? {
                        Begun::First(key) => Some(key),
                        Begun::Again { status, headers, body } => {
                            return Ok(repeated(status, headers, body));
                        }
                    }
                }
                _ => None,
            };
            let Some(key) = key else {
                return run(app, route, handler(Ctx { call, identity })).await;
            };
            // To its end, even if the client goes away: who repeats it then gets this answer.
            let (owned, place) = (Arc::clone(app), place);
            let whole = async move {
                let answer = keep(&owned, &key, route, handler(Ctx { call, identity })).await;
                drop(place);
                answer
            };
            let trace = TraceParent::current().unwrap_or_else(TraceParent::next);
            app.tasks.spawn(trace.scope(whole)).await.map_err(Problem::fault)?
        }
    }
}

/// Runs a request that has a key, and keeps its answer for who sends it again.
async fn keep(
    app: &App,
    key: &Key,
    route: &Route,
    handler: impl Future<Output = Answer>,
) -> Answer {
    // What panics or is cut off by a shutdown leaves its key in use, as it may have been done.
    let answer = run(app, route, handler).await;
    let late = answer.as_ref().is_err_and(Problem::is_timeout);
    let ending = match (late, route.secret) {
        (true, _) => Ending::Unknown,
        (false, true) => Ending::Secret,
        (false, false) => Ending::Answered,
    };
    let response = answer.unwrap_or_else(Problem::into_response);
    let (parts, body) = response.into_parts();
    // A whole body in memory is there at once.
    let body = body.collect().await.map_err(Problem::fault)?.to_bytes();
    app.idempotency.finish(key, parts.status, &parts.headers, &body, ending);
    Ok(Response::from_parts(parts, Full::new(body)))
}

fn repeated(status: hyper::StatusCode, headers: HeaderMap, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response.headers_mut().insert("idempotency-replayed", HeaderValue::from_static("true"));
    response
}

async fn run(app: &App, route: &Route, handler: impl Future<Output = Answer>) -> Answer {
    let limit = if route.waits { app.config.wait_timeout } else { app.config.request_timeout };
    match tokio::time::timeout(limit, handler).await {
        Ok(answer) => answer,
        Err(_) => Err(Problem::timeout(format!(
            "no result within {} s; it is not known whether anything was changed",
            limit.as_secs()
        ))
        .retry_after(5)),
    }
}

async fn read_body(
    app: &App,
    route: &Route,
    call: &Call,
    body: Incoming,
) -> Result<Bytes, Problem> {
    if route.method == "GET" {
        return Ok(Bytes::new());
    }
    let most = route.body_bytes_max;
    let too_large = || Problem::too_large(format!("a body of this path has at most {most} bytes"));
    let declared = call.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    if declared.and_then(|text| text.parse::<usize>().ok()).is_some_and(|bytes| bytes > most) {
        return Err(too_large());
    }
    let limit = app.config.body_timeout;
    match tokio::time::timeout(limit, Limited::new(body, most).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(Problem::bad_request(format!("the body broke off: {error}"))),
        Err(_) => Err(Problem::body_timeout(format!(
            "the body was not whole within {} s",
            limit.as_secs()
        ))),
    }
}

fn missing_scope(identity: &Identity, scope: fieldline_model::Scope) -> Problem {
    let held: Vec<&str> = identity.scopes.iter().map(|scope| scope.name()).collect();
    let held = if held.is_empty() { "none".to_owned() } else { held.join(", ") };
    let scope = scope.name();
    Problem::scope_missing(format!("this needs the scope `{scope}`; you have: {held}"))
        .with("scope", scope)
}

/// Who is calling, and whether a cookie says so.
pub(crate) async fn authenticate(
    app: &App,
    headers: &HeaderMap,
    origin: Origin,
) -> Result<(Identity, bool), Problem> {
    let auth = &app.services.auth;
    if let Some(value) = headers.get(AUTHORIZATION) {
        let secret = value.to_str().ok().and_then(bearer).ok_or_else(|| {
            Problem::unauthenticated(
                "the header has another form than `Authorization: Bearer TOKEN`",
            )
        })?;
        return Ok((auth.token(secret, origin.peer.ip()).await?, false));
    }
    match cookie(headers) {
        Some(secret) => Ok((auth.session(secret, origin.peer.ip()).await?, true)),
        None => Err(AuthError::Unauthenticated(
            "send `Authorization: Bearer TOKEN`, or sign in at the console",
        )
        .into()),
    }
}

fn bearer(value: &str) -> Option<&str> {
    let (scheme, secret) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| secret.trim())
}

/// The session's secret, if a cookie holds one.
pub(crate) fn cookie(headers: &HeaderMap) -> Option<&str> {
    let all = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = all.flat_map(|text| text.split(';'));
    pairs.find_map(|pair| {
        let (name, value) = pair.trim().split_once('=')?;
        (name == COOKIE_NAME && !value.is_empty()).then_some(value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_session_is_found_among_other_cookies() {
        let mut headers = HeaderMap::new();
        headers.append(COOKIE, HeaderValue::from_static("a=1; fieldline_session=fls_x; b=2"));
        assert_eq!(cookie(&headers), Some("fls_x"));
        let mut headers = HeaderMap::new();
        headers.append(COOKIE, HeaderValue::from_static("xfieldline_session=fls_x"));
        headers.append(COOKIE, HeaderValue::from_static("fieldline_session="));
        assert_eq!(cookie(&headers), None);
    }

    #[test]
    fn a_bearer_is_read_whatever_the_case() {
        assert_eq!(bearer("bearer flt_x"), Some("flt_x"));
        assert_eq!(bearer("Bearer  flt_x "), Some("flt_x"));
        assert_eq!(bearer("Basic abc"), None);
        assert_eq!(bearer("flt_x"), None);
    }
}
