//! The server itself: version, health, metrics, its own description.

use std::time::Duration;

use bytes::Bytes;
use fieldline_model::{CloseCode, Scope};
use http_body_util::Full;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;
use serde_json::json;
use utoipa::ToSchema;

use crate::call::{Call, Ctx, json};
use crate::route::Answer;

/// How long after the start channels that are still to be opened keep the server from being ready.
/// One that has failed to open is its account's own matter: no tenant takes the server out of service.
const OPENING_MAX: Duration = Duration::from_secs(10);

/// Most channels that a look at the readiness names.
const WARNINGS_MAX: usize = 10;

/// The server.
#[derive(Serialize, ToSchema)]
pub(crate) struct SystemView {
    /// The node that answers.
    node: String,
    version: String,
    uptime_s: u64,
    /// Where it listens; for callers with the scope `root`.
    listeners: Vec<ListenerView>,
    /// What is stored of the account; of all accounts for callers with the scope `root`.
    history: HistoryView,
    /// Memory of the process; for callers with the scope `root`.
    memory: Option<MemoryView>,
    /// Why connections end.
    close_codes: Vec<CloseCodeView>,
}

/// A listener.
#[derive(Serialize, ToSchema)]
pub(crate) struct ListenerView {
    name: String,
    address: String,
}

/// What is stored.
#[derive(Serialize, ToSchema)]
pub(crate) struct HistoryView {
    messages: u64,
    bytes: u64,
    segments: u64,
    /// Messages in memory, in the log and not yet in a segment.
    unsealed: u64,
}

/// Memory in use.
#[derive(Serialize, ToSchema)]
pub(crate) struct MemoryView {
    resident_bytes: u64,
}

/// A reason why a connection ends.
#[derive(Serialize, ToSchema)]
pub(crate) struct CloseCodeView {
    number: u8,
    name: &'static str,
    description: &'static str,
}

/// `GET /system`
pub(crate) async fn read(ctx: Ctx) -> Answer {
    let root = ctx.identity.may(Scope::Root);
    let info = &ctx.app.services.system;
    let stats = ctx.app.platform().history.stats((!root).then(|| ctx.account()));
    let listeners = info
        .listeners
        .iter()
        .filter(|_| root)
        .map(|(name, address)| ListenerView { name: name.clone(), address: address.clone() });
    let code = |code: &CloseCode| CloseCodeView {
        number: code.number(),
        name: code.name(),
        description: code.description(),
    };
    let memory = if root {
        let status = tokio::fs::read_to_string("/proc/self/status").await;
        status
            .ok()
            .and_then(|text| resident_bytes(&text))
            .map(|resident_bytes| MemoryView { resident_bytes })
    } else {
        None
    };
    let view = SystemView {
        node: info.node.clone(),
        version: info.version.clone(),
        uptime_s: ctx.app.started.elapsed().as_secs(),
        listeners: listeners.collect(),
        history: HistoryView {
            messages: stats.messages,
            bytes: stats.bytes,
            segments: stats.segments,
            unsealed: stats.unsealed,
        },
        memory,
        close_codes: CloseCode::ALL.iter().map(code).collect(),
    };
    json(StatusCode::OK, &view)
}

/// The resident memory that `/proc/self/status` names.
fn resident_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1_024)
}

/// `GET /healthz`: the process answers.
pub(crate) async fn healthz(_call: Call) -> Answer {
    Ok(text("text/plain; charset=utf-8", Bytes::from_static(b"ok\n")))
}

/// `GET /readyz`: it can do its work.
pub(crate) async fn readyz(call: Call) -> Answer {
    let app = &call.app;
    let mut reasons: Vec<String> = app.services.ready.iter().flat_map(|check| check()).collect();
    if app.shutdown.is_cancelled() {
        reasons.push("the server is shutting down".to_owned());
    }
    let channels = &app.services.channels;
    if !channels.opened().await && app.started.elapsed() < OPENING_MAX {
        reasons.push("channels are being opened".to_owned());
    }
    let problems = channels.problems().await;
    // The reason is for the channel's account: this is for anyone, and it may name files.
    let name = |problem: &String| {
        let channel = problem.split(": ").next().unwrap_or_default();
        format!("{channel} does not listen; see its status")
    };
    let mut warnings = app.platform().history.warnings();
    // The reason may name addresses.
    let optional = app.services.optional.iter().filter(|(_, check)| !check().is_empty());
    warnings.extend(optional.map(|(name, _)| format!("{name}: away; see /api/v1/nodes")));
    warnings.extend(problems.iter().take(WARNINGS_MAX).map(name));
    if let Some(more @ 1..) = problems.len().checked_sub(WARNINGS_MAX) {
        warnings.push(format!("{more} more channels do not listen"));
    }
    let ready = reasons.is_empty();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    json(status, &json!({ "ready": ready, "reasons": reasons, "warnings": warnings }))
}

/// `GET /metrics`
pub(crate) async fn metrics(call: Call) -> Answer {
    let rendered = (call.app.services.metrics)();
    Ok(text("text/plain; version=0.0.4; charset=utf-8", Bytes::from(rendered)))
}

/// `GET /openapi.json`
pub(crate) async fn openapi(call: Call) -> Answer {
    Ok(text("application/json", call.app.openapi.clone()))
}

fn text(kind: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    #[test]
    fn memory_is_read_from_the_kernels_words() {
        let status = "Name:\tfieldline\nVmPeak:\t  1 kB\nVmRSS:\t   84212 kB\nThreads:\t5\n";
        assert_eq!(super::resident_bytes(status), Some(84_212 * 1_024));
        assert_eq!(super::resident_bytes(""), None);
    }
}
