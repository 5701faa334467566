//! Messages of devices: reading and publishing. Also the logs, which are messages of ours.

use std::fmt::Write as _;

use fieldline_contracts::{HistoryError, Order, Query};
use fieldline_model::{
    Accepted, ChannelId, Decoded, ParamName, Params, Series, SeriesKind, Stored, Timestamp, Value,
};
use hyper::StatusCode;
use serde::Serialize;
use serde_json::{Map, Value as Json};
use utoipa::ToSchema;

use super::devices::present;
use crate::call::{Ctx, json};
use crate::numbers::{self, Exact};
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
/// Messages read at once before it is known how large they are.
const CHUNK_FIRST: usize = 128;
/// Most messages read at once.
const CHUNK_MAX: usize = 1_000;
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
    /// Too large to be kept; where all are, the status is 422.
    rejected: usize,
    /// Those that were rejected.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<RejectedMessage>,
}

/// A message that was not stored, while others of the same request were.
#[derive(Serialize, ToSchema)]
pub(crate) struct RejectedMessage {
    /// Its place in the array, from 0.
    index: usize,
    /// Why it was not stored.
    detail: String,
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
    write: impl FnMut(&mut String, &Stored) + Send,
) -> Answer {
    let limit = ctx.query.limit(LIMIT_DEFAULT, LIMIT_MAX)?;
    let order = match ctx.query.flag("reverse")? {
        None => order,
        Some(true) => Order::Descending,
        Some(false) => Order::Ascending,
    };
    stored_page(ctx, series, order, limit, write).await
}

/// A page of at most `limit` messages, and of little more than [`PAGE_BYTES_MAX`] bytes. `write`
/// appends a message, or nothing for one that is not to be seen.
pub(crate) async fn stored_page(
    ctx: &Ctx,
    series: Series,
    order: Order,
    limit: usize,
    mut write: impl FnMut(&mut String, &Stored) + Send,
) -> Answer {
    let (from, to) = ctx.query.span()?;
    let mut query = Query {
        series,
        from,
        to,
        order,
        after: ctx.query.after_message()?,
        limit: limit.min(CHUNK_FIRST),
    };
    let mut out = String::from("[");
    let (mut read, mut next) = (0, None);
    'page: loop {
        // In parts: each message may be large, and a page of them would fill the memory.
        let found = match ctx.app.platform().history.read(&query).await {
            // What precedes damage is an answer; the page after it says what is wrong.
            Err(HistoryError::Corrupt(_)) if read > 0 => {
                next = query.after.map(|(at, cursor)| write_cursor(at, cursor));
                break;
            }
            found => found?,
        };
        for message in &found {
            read += 1;
            let before = out.len();
            if before > 1 {
                out.push(',');
            }
            let separated = out.len();
            write(&mut out, message);
            if out.len() == separated {
                out.truncate(before);
            }
            let place = (message.timestamp(), message.cursor());
            query.after = Some(place);
            if read == limit || out.len() > PAGE_BYTES_MAX {
                next = Some(write_cursor(place.0, place.1));
                break 'page;
            }
        }
        // A page that is shorter than asked for is no end.
        if found.is_empty() {
            break;
        }
        let bytes_each = (out.len() / read).max(1);
        let room = (PAGE_BYTES_MAX.saturating_sub(out.len()) / bytes_each).clamp(16, CHUNK_MAX);
        query.limit = room.min(limit - read);
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
    let mut exact = numbers::read(&ctx.body)?;
    let mut decoded = Vec::with_capacity(messages.len());
    for (at, message) in messages.into_iter().enumerate() {
        let Json::Object(members) = message else {
            return Err(Problem::member(&format!("[{at}]"), "a message is an object"));
        };
        let message = read_message(at, members, &mut exact);
        decoded.push(
            message.map_err(|(name, text)| Problem::member(&format!("[{at}].{name}"), text))?,
        );
    }
    let check = |(index, message)| {
        let detail = Accepted::check(message).err()?.to_string();
        Some(RejectedMessage { index, detail })
    };
    let errors: Vec<RejectedMessage> = decoded.iter().enumerate().filter_map(check).collect();
    let all = errors.len() == decoded.len();
    // In a task of its own: a client that goes away in the midst would otherwise leave messages that
    // are stored and in no last value.
    let (ingest, account) = (ctx.app.services.ingest.clone(), ctx.account());
    let submit = async move { ingest.submit(account, id, ingest.now(), decoded).await };
    let submitted = tokio::spawn(submit).await.map_err(Problem::fault)??;
    if all && let Some(first) = errors.first() {
        let detail = match errors.len() {
            1 => first.detail.clone(),
            count => {
                format!("none of the {count} messages was stored; of this one: {}", first.detail)
            }
        };
        let place = format!("[{}]", first.index);
        let errors: Result<Vec<Json>, _> = errors.iter().map(serde_json::to_value).collect();
        return Err(Problem::member(&place, detail).with_errors(errors.map_err(Problem::fault)?));
    }
    let published = Published {
        stored: submitted.stored,
        duplicates: submitted.duplicates,
        rejected: submitted.rejected,
        errors,
    };
    json(StatusCode::OK, &published)
}

/// A message of a JSON object; errors name the member.
fn read_message(
    at: usize,
    members: Map<String, Json>,
    exact: &mut Exact,
) -> Result<Decoded, (String, String)> {
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
                let precise =
                    if exact.is_empty() { None } else { exact.remove(&(at, name.clone())) };
                let value = precise
                    .or_else(|| Value::from_json(value))
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
                let _read = read_message(0, members, &mut Exact::new());
            }
        }
    }

    #[test]
    fn numbers_keep_their_digits_and_errors_name_the_member() {
        let read =
            |text: &str| read_message(0, serde_json::from_str(text).unwrap(), &mut Exact::new());
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
