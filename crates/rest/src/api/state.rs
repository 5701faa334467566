//! Last values.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use fieldline_contracts::LastValue;
use fieldline_model::{DeviceId, ParamName, Timestamp};
use utoipa::ToSchema;
use xxhash_rust::xxh3::xxh3_64;

use super::devices::{filtered, present};
use crate::call::{Ctx, empty, json_text, with_etag};
use crate::objects::{page_text, write_json_text};
use crate::problem::Problem;
use crate::route::Answer;

/// Most parameters that a list of states may be asked for.
const PARAMS_MAX: usize = 32;

/// The last value of a parameter.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what is written by hand, for speed")]
pub(crate) struct Sample {
    value: fieldline_model::Value,
    /// The timestamp of the message that brought it.
    timestamp: Timestamp,
}

/// What is known of a device now.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what is written by hand, for speed")]
pub(crate) struct DeviceState {
    device: DeviceId,
    /// Its name; in lists only.
    name: Option<String>,
    online: bool,
    /// When its last message was received.
    seen_at: Option<Timestamp>,
    /// Its address, present or last; not in lists.
    peer: Option<String>,
    /// Last values by parameter.
    values: BTreeMap<String, Sample>,
}

/// Appends `{"value":…,"timestamp":"…"}`.
fn write_sample(out: &mut String, last: &LastValue) {
    out.push_str("{\"value\":");
    last.value.write_json(out);
    let written = write!(out, ",\"timestamp\":\"{}\"}}", last.timestamp);
    debug_assert!(written.is_ok(), "writing to a String cannot fail");
}

/// Appends the values as a JSON object.
pub(crate) fn write_values(out: &mut String, values: &BTreeMap<ParamName, LastValue>) {
    out.push('{');
    for (at, (name, last)) in values.iter().enumerate() {
        if at > 0 {
            out.push(',');
        }
        write_json_text(out, name.as_str());
        out.push(':');
        write_sample(out, last);
    }
    out.push('}');
}

/// Appends `,"name":"…"`, or null.
pub(crate) fn write_time(out: &mut String, name: &str, time: Option<Timestamp>) {
    let written = match time {
        Some(time) => write!(out, ",\"{name}\":\"{time}\""),
        None => write!(out, ",\"{name}\":null"),
    };
    debug_assert!(written.is_ok(), "writing to a String cannot fail");
}

/// `GET /devices/{id}/state/{param}`: the most asked of questions.
pub(crate) async fn value(ctx: Ctx) -> Answer {
    let (id, param) = (ctx.device_id(0)?, ctx.segment(1));
    // State is kept by account: nothing of another's can come out here.
    match ctx.app.platform().state.value(ctx.account(), id, param).await? {
        Some(last) => {
            let mut out = String::with_capacity(96);
            write_sample(&mut out, &last);
            Ok(json_text(out))
        }
        None => {
            present(&ctx, id).await?;
            let param: String = param.chars().take(128).collect();
            Err(Problem::not_found(format!("the device has not sent `{param}` yet")))
        }
    }
}

/// `GET /devices/{id}/state`
pub(crate) async fn read(ctx: Ctx) -> Answer {
    let id = ctx.device_id(0)?;
    let state = &ctx.app.platform().state;
    let values = state.get(ctx.account(), id).await?;
    if values.is_empty() {
        present(&ctx, id).await?;
    }
    let presence = state.presence(ctx.account(), id).await?;
    let mut out = String::with_capacity(128 + 80 * values.len());
    let online = presence.connection.is_some();
    let written = write!(out, "{{\"device\":\"{id}\",\"online\":{online}");
    debug_assert!(written.is_ok(), "writing to a String cannot fail");
    write_time(&mut out, "seen_at", presence.seen_at);
    let session = presence.session();
    let node = session.as_ref().and_then(|session| session.node.as_ref());
    for (member, text) in [(",\"node\":", node), (",\"peer\":", presence.peer.as_ref())] {
        out.push_str(member);
        match text {
            Some(text) => write_json_text(&mut out, text),
            None => out.push_str("null"),
        }
    }
    out.push_str(",\"values\":");
    write_values(&mut out, &values);
    out.push('}');
    let etag = format!("\"{:016x}\"", xxh3_64(out.as_bytes()));
    if ctx.has(&etag) {
        return Ok(with_etag(empty(hyper::StatusCode::NOT_MODIFIED), &etag));
    }
    Ok(with_etag(json_text(out), &etag))
}

/// `GET /state`
pub(crate) async fn list(ctx: Ctx) -> Answer {
    let mut params = Vec::new();
    for name in ctx.query.all("params").flat_map(|text| text.split(',')) {
        let name = name.trim();
        if name.is_empty() {
            continue;
        }
        params.push(
            ParamName::new(name)
                .map_err(|error| Problem::bad_query(format!("`params`: {error}")))?,
        );
    }
    if params.len() > PARAMS_MAX {
        return Err(Problem::bad_query(format!(
            "`params` names {}; at most {PARAMS_MAX} are possible at once",
            params.len()
        )));
    }
    let listed = filtered(&ctx).await?;
    let ids: Vec<DeviceId> = listed.items.iter().map(|found| found.object.id).collect();
    let state = &ctx.app.platform().state;
    let values = state.get_many(ctx.account(), &ids, &params).await?;
    let presence = state.presence_many(ctx.account(), &ids).await?;
    let mut out = String::with_capacity(64 + 256 * ids.len());
    out.push('[');
    for (at, ((found, (_, values)), (id, presence))) in
        listed.items.iter().zip(&values).zip(&presence).enumerate()
    {
        if at > 0 {
            out.push(',');
        }
        let online = presence.connection.is_some();
        let written = write!(out, "{{\"device\":\"{id}\",\"online\":{online},\"name\":");
        debug_assert!(written.is_ok(), "writing to a String cannot fail");
        write_json_text(&mut out, &found.object.name);
        write_time(&mut out, "seen_at", presence.seen_at);
        out.push_str(",\"values\":");
        write_values(&mut out, values);
        out.push('}');
    }
    out.push(']');
    Ok(page_text(&ctx, &out, listed.next.map(|id| id.to_string())))
}
