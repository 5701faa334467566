//! The console's files.

use std::borrow::Cow;

use bytes::Bytes;
use fieldline_auth::Identity;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{
    ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG,
    HeaderValue, IF_NONE_MATCH, VARY,
};
use hyper::{Request, Response, StatusCode};
use xxhash_rust::xxh3::xxh3_64;

use crate::api::settings;
use crate::app::App;
use crate::call::empty;
use crate::problem::Problem;
use crate::route::Answer;

#[cfg(feature = "console")]
#[derive(rust_embed::RustEmbed)]
#[folder = "../../console/dist"]
// A program can be built before its console.
#[allow_missing = true]
struct Files;

/// Shown where the program was built without the console.
const WITHOUT: &str = "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Fieldline</title>\
<h1>Fieldline is running</h1>\
<p>This program was built without its console. Build it with <code>cargo xtask up</code>, or: \
<code>npm --prefix console ci &amp;&amp; npm --prefix console run build</code>, then \
<code>cargo build --features console</code>.</p>\
<p>The API is at <code>/api/v1</code>, its description at <a href=\"/openapi.json\">/openapi.json</a>.</p></html>";

fn file(name: &str) -> Option<Cow<'static, [u8]>> {
    #[cfg(feature = "console")]
    {
        Files::get(name).map(|file| file.data)
    }
    #[cfg(not(feature = "console"))]
    {
        let _name = name;
        None
    }
}

/// Whether a build may have made this path. Other names have nothing that a console needs: no dots but
/// for the ending, no percent signs.
fn plain(name: &str) -> bool {
    !name.is_empty()
        && !name.contains("..")
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b))
}

/// Whether the console has a file of this path, or is the one to say that it has not.
pub(crate) fn has(path: &str) -> bool {
    let name = path.trim_start_matches('/');
    name == "index.html" || name.starts_with("assets/") || plain(name) && file(name).is_some()
}

/// The file of this path; the console's page for any other, since its own router reads the address.
pub(crate) async fn page(
    app: &App,
    request: &Request<Incoming>,
    identity: Option<&Identity>,
) -> Answer {
    let name = request.uri().path().trim_start_matches('/');
    let asset = name.starts_with("assets/");
    if plain(name) && name != "index.html" {
        let packed = accepts_gzip(request).then(|| file(&format!("{name}.gz"))).flatten();
        let gzip = packed.is_some();
        if let Some(bytes) = packed.or_else(|| file(name)) {
            let mut response = content(request, kind(name), bytes);
            let headers = response.headers_mut();
            let keep = if asset { "public, max-age=31536000, immutable" } else { "no-cache" };
            headers.insert(CACHE_CONTROL, HeaderValue::from_static(keep));
            headers.insert(VARY, HeaderValue::from_static("accept-encoding"));
            if gzip {
                headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            }
            return Ok(response);
        }
    }
    if asset {
        // A page in its place would be taken for a script.
        return Err(Problem::not_found("there is no such file; reload the page"));
    }
    let index = file("index.html").unwrap_or(Cow::Borrowed(WITHOUT.as_bytes()));
    let images = match identity {
        Some(identity) => settings::image_origin(app, identity.account).await,
        None => None,
    };
    let images = images.map(|origin| format!(" {origin}")).unwrap_or_default();
    let policy = format!(
        "default-src 'self'; img-src 'self' data: blob:{images}; object-src 'none'; \
         base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    );
    let mut response = content(request, "text/html; charset=utf-8", index);
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    let policy = HeaderValue::from_str(&policy).map_err(Problem::fault)?;
    headers.insert(CONTENT_SECURITY_POLICY, policy);
    headers.insert("referrer-policy", HeaderValue::from_static("no-referrer"));
    headers.insert("x-frame-options", HeaderValue::from_static("DENY"));
    headers.insert("cross-origin-opener-policy", HeaderValue::from_static("same-origin"));
    Ok(response)
}

fn accepts_gzip(request: &Request<Incoming>) -> bool {
    let text = request.headers().get(ACCEPT_ENCODING).and_then(|value| value.to_str().ok());
    text.is_some_and(|text| text.split(',').any(|one| one.trim().starts_with("gzip")))
}

fn content(
    request: &Request<Incoming>,
    kind: &'static str,
    bytes: Cow<'static, [u8]>,
) -> Response<Full<Bytes>> {
    let etag = format!("\"{:016x}\"", xxh3_64(&bytes));
    let known = request.headers().get(IF_NONE_MATCH).and_then(|value| value.to_str().ok());
    let mut response = if known == Some(etag.as_str()) {
        empty(StatusCode::NOT_MODIFIED)
    } else {
        let bytes = match bytes {
            Cow::Borrowed(bytes) => Bytes::from_static(bytes),
            Cow::Owned(bytes) => Bytes::from(bytes),
        };
        Response::new(Full::new(bytes))
    };
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    if let Ok(etag) = HeaderValue::from_str(&etag) {
        response.headers_mut().insert(ETAG, etag);
    }
    response
}

/// The media type by a name's ending.
fn kind(name: &str) -> &'static str {
    match name.rsplit('.').next().unwrap_or("") {
        "html" => "text/html; charset=utf-8",
        "js" | "mjs" => "text/javascript; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "json" | "map" => "application/json",
        "webmanifest" => "application/manifest+json",
        "svg" => "image/svg+xml",
        "png" => "image/png",
        "webp" => "image/webp",
        "ico" => "image/x-icon",
        "woff2" => "font/woff2",
        "wasm" => "application/wasm",
        "txt" => "text/plain; charset=utf-8",
        _ => "application/octet-stream",
    }
}
