//! Messages of devices: reading and publishing. Also the logs, which are messages of ours.

use std::fmt::Write as _;

use fieldline_contracts::{Order, Query};
use fieldline_model::{
    ChannelId, Decoded, ParamName, Params, Series, SeriesKind, Stored, Timestamp, Value,
};
use hyper::StatusCode;
use serde::Serialize;
use serde_json::{Map, Value as Json};
use utoipa::ToSchema;

use super::devices::present;
use crate::call::{Ctx, json};
use crate::objects::{page_text, write_json_text};
use crate::problem::Problem;
use crate::query::write_cursor;
use crate::route::Answer;

/// Messages of a page, where the client does not say how many.
const LIMIT_DEFAULT: u64 = 100;
/// Most messages of a page.
const LIMIT_MAX: u64 = 10_000;
/// Most bytes of a page; one that would be larger ends earlier, and `next` goes on.
const PAGE_BYTES_MAX: usize = 8 << 20;
/// Most messages that are published at once.
const PUBLISH_MAX: usize = 10_000;

/// A message: its times, then its parameters by name.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what is written by hand, so that every digit is kept")]
pub(crate) struct Message {
    /// When it was so, by the device; when it was received, where the device sent no time.
    timestamp: Timestamp,
    /// When it was received.
    received: Timestamp,
    /// Parameters by name.
    #[schema(inline)]
    #[serde(flatten)]
    params: Params,
}

/// Messages to be published: one, or an array.
#[derive(ToSchema)]
#[schema(value_type = Vec<Object>)]
#[allow(dead_code, reason = "documents what is read by hand")]
pub(crate) struct MessagesInput(Json);

/// What became of published messages.
#[derive(Serialize, ToSchema)]
pub(crate) struct Published {
    /// Stored now, durably.
    stored: usize,
    /// Stored before: the same time and content.
    duplicates: usize,
    /// Too large to be kept; see the device's log.
    rejected: usize,
}

/// `GET /devices/{id}/messages`
pub(crate) async fn list(ctx: Ctx) -> Answer {
    let id = ctx.device_id(0)?;
    present(&ctx, id).await?;
    let fields: Vec<String> = ctx
        .query
        .all("fields")
        .flat_map(|text| text.split(','))
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .collect();
    series(&ctx, Series::messages(ctx.account(), id), Order::Ascending, |out, message| {
        write_message(out, message, &fields);
    })
    .await
}

/// `GET /devices/{id}/log`
pub(crate) async fn device_log(ctx: Ctx) -> Answer {
    let id = ctx.device_id(0)?;
    present(&ctx, id).await?;
    let log = Series::device_log(ctx.account(), id);
    series(&ctx, log, Order::Descending, |out, line| line.write_json(out)).await
}

/// `GET /channels/{id}/log`
pub(crate) async fn channel_log(ctx: Ctx) -> Answer {
    ctx.unrestricted("the log of a channel")?;
    let id = ctx.id(0, "channel")?;
    ctx.load::<fieldline_model::Channel>(id).await?;
    let log = Series::channel_log(ctx.account(), ChannelId(id));
    series(&ctx, log, Order::Descending, |out, line| line.write_json(out)).await
}

/// A page of a series, as the query asks.
async fn series(
    ctx: &Ctx,
    series: Series,
    order: Order,
    mut write: impl FnMut(&mut String, &Stored) + Send,
) -> Answer {
    let limit = ctx.query.limit(LIMIT_DEFAULT, LIMIT_MAX)?;
    let order = match ctx.query.flag("reverse")? {
        None => order,
        Some(true) => Order::Descending,
        Some(false) => Order::Ascending,
    };
    let query = Query {
        series,
        from: ctx.query.time("from")?.unwrap_or(Timestamp::MIN),
        to: ctx.query.time("to")?.unwrap_or(Timestamp::MAX),
        order,
        after: ctx.query.after_message()?,
        limit,
    };
    let found = ctx.app.platform().history.read(&query).await?;
    let mut out = String::with_capacity(64 + 160 * found.len());
    out.push('[');
    let mut next = None;
    let whole = found.len();
    for (at, message) in found.iter().enumerate() {
        if at > 0 {
            out.push(',');
        }
        write(&mut out, message);
        let last_of_full = at + 1 == whole && whole == limit;
        let too_large = out.len() > PAGE_BYTES_MAX && at + 1 < whole;
        if last_of_full || too_large {
            next = Some(write_cursor(message.timestamp(), message.cursor()));
        }
        if too_large {
            break;
        }
    }
    out.push(']');
    Ok(page_text(ctx, &out, next))
}

fn write_message(out: &mut String, message: &Stored, fields: &[String]) {
    if fields.is_empty() {
        message.write_json(out);
        return;
    }
    let (timestamp, received) = (message.timestamp(), message.received());
    let written = write!(out, "{{\"timestamp\":\"{timestamp}\",\"received\":\"{received}\"");
    debug_assert!(written.is_ok(), "writing to a String cannot fail");
    for name in fields {
        if let Some(value) = message.params().get(name) {
            out.push(',');
            write_json_text(out, name);
            out.push(':');
            value.write_json(out);
        }
    }
    out.push('}');
}

/// `POST /devices/{id}/messages`
pub(crate) async fn publish(ctx: Ctx) -> Answer {
    let id = ctx.device_id(0)?;
    let messages = match ctx.json_any::<Json>()? {
        Json::Array(items) => items,
        one @ Json::Object(_) => vec![one],
        _ => return Err(Problem::invalid("the body is a message, or an array of messages")),
    };
    if messages.len() > PUBLISH_MAX {
        return Err(Problem::invalid(format!(
            "{} messages at once; at most {PUBLISH_MAX} are possible",
            messages.len()
        )));
    }
    let device = present(&ctx, id).await?;
    if !device.enabled {
        return Err(Problem::conflict(format!(
            "the device `{}` is disabled; enable it first",
            device.name
        )));
    }
    let mut decoded = Vec::with_capacity(messages.len());
    for (at, message) in messages.into_iter().enumerate() {
        let Json::Object(members) = message else {
            return Err(Problem::member(&format!("[{at}]"), "a message is an object"));
        };
        let message = read_message(members);
        decoded.push(
            message.map_err(|(name, text)| Problem::member(&format!("[{at}].{name}"), text))?,
        );
    }
    // In a task of its own: a client that goes away in the midst would otherwise leave messages that
    // are stored and in no last value.
    let (ingest, account) = (ctx.app.services.ingest.clone(), ctx.account());
    let submit = async move { ingest.submit(account, id, ingest.now(), decoded).await };
    let submitted = tokio::spawn(submit).await.map_err(Problem::fault)??;
    let published = Published {
        stored: submitted.stored,
        duplicates: submitted.duplicates,
        rejected: submitted.rejected,
    };
    json(StatusCode::OK, &published)
}

/// A message of a JSON object; errors name the member.
fn read_message(members: Map<String, Json>) -> Result<Decoded, (String, String)> {
    let mut decoded = Decoded { timestamp: None, params: Params::with_capacity(members.len()) };
    for (name, value) in members {
        match name.as_str() {
            "timestamp" => {
                let timestamp = serde_json::from_value(value);
                decoded.timestamp = Some(timestamp.map_err(|error| (name, error.to_string()))?);
            }
            // A message that was read may be sent back; this time is ours to say.
            "received" => {}
            _ => {
                let key = ParamName::new(name.as_str())
                    .map_err(|error| (name.chars().take(64).collect(), error.to_string()))?;
                // Null says that the parameter is absent.
                if value.is_null() {
                    continue;
                }
                let value = Value::from_json(value)
                    .ok_or_else(|| (name, "is a number out of range".to_owned()))?;
                decoded.params.push(key, value);
            }
        }
    }
    Ok(decoded)
}

/// The name of a log in pushes.
pub(crate) const fn is_log(kind: SeriesKind) -> bool {
    matches!(kind, SeriesKind::DeviceLog | SeriesKind::ChannelLog)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_json_object_is_read_without_a_panic(text in "\\{(\"[a-z\\.]{0,6}\":(null|true|-?[0-9]{1,25}(\\.[0-9]{1,20})?|\"[a-z0-9]{0,5}\"|\\[\\]),?){0,4}\\}") {
            if let Ok(Json::Object(members)) = serde_json::from_str(&text) {
                let _read = read_message(members);
            }
        }
    }

    #[test]
    fn numbers_keep_their_digits_and_errors_name_the_member() {
        let read = |text: &str| read_message(serde_json::from_str(text).unwrap());
        let message =
            read(r#"{"timestamp": 1800000000.5, "a": 54.7146368, "b": null, "received": 1}"#)
                .unwrap();
        assert_eq!(message.timestamp.unwrap().as_micros(), 1_800_000_000_500_000);
        assert_eq!(message.params.len(), 1);
        let mut out = String::new();
        message.params.get("a").unwrap().write_json(&mut out);
        assert_eq!(out, "54.7146368");
        assert_eq!(read(r#"{"timestamp": "soon"}"#).unwrap_err().0, "timestamp");
        assert_eq!(read(r#"{"a\nb": 1}"#).unwrap_err().0, "a\nb");
    }
}
