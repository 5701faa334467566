//! JSON that clients publish: messages of devices, arguments of commands.

use std::fmt;

use fieldline_model::{Accepted, Command, Decoded, ParamName, Params, Timestamp, Value};
use serde_json::{Map, Value as Json};

/// Most messages of one payload.
pub const MESSAGES_MAX: usize = 1_000;

/// Why a payload cannot be used, in words for whoever published it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PayloadError(String);

impl PayloadError {
    fn new(text: impl fmt::Display) -> Self {
        Self(text.to_string())
    }
}

/// Reads what was published to `ingest/{device}`: an object, or an array of at
/// most [`MESSAGES_MAX`]. Each has parameters by name and perhaps `timestamp`
/// (RFC 3339 text or Unix seconds). A member `received` is passed over, so what
/// was read from `message/…` can be published as it is; `null` means absent.
///
/// # Errors
///
/// If it is no such JSON, or a message is larger than what is kept.
pub fn messages(payload: &[u8]) -> Result<Vec<Decoded>, PayloadError> {
    let text = std::str::from_utf8(payload)
        .map_err(|_| PayloadError::new("the payload is not UTF-8 text"))?;
    match serde_json::from_str(text).map_err(PayloadError::new)? {
        Json::Object(members) => Ok(vec![message(members, None)?]),
        Json::Array(items) if items.is_empty() || items.len() > MESSAGES_MAX => {
            Err(PayloadError::new(format!(
                "the array has {} messages; 1 to {MESSAGES_MAX} are taken",
                items.len()
            )))
        }
        Json::Array(items) => {
            let each = items.into_iter().enumerate().map(|(at, item)| match item {
                Json::Object(members) => message(members, Some(at)),
                _ => Err(PayloadError::new(format!("message {at} is no JSON object"))),
            });
            each.collect()
        }
        _ => Err(PayloadError::new(
            r#"the payload is no JSON object or array of objects, such as {"battery.voltage":12.5}"#,
        )),
    }
}

fn message(members: Map<String, Json>, at: Option<usize>) -> Result<Decoded, PayloadError> {
    let place = |text: &dyn fmt::Display| match at {
        Some(at) => PayloadError::new(format!("message {at}: {text}")),
        None => PayloadError::new(text),
    };
    let mut decoded = Decoded { timestamp: None, params: Params::with_capacity(members.len()) };
    for (name, json) in members {
        match name.as_str() {
            "timestamp" if json.is_null() => {}
            "timestamp" => {
                let at = serde_json::from_value::<Timestamp>(json).map_err(|e| place(&e))?;
                decoded.timestamp = Some(at);
            }
            "received" => {}
            _ => {
                let name = ParamName::new(name).map_err(|error| place(&error))?;
                if let Some(value) = Value::from_json(json) {
                    decoded.params.push(name, value);
                }
            }
        }
    }
    if decoded.params.is_empty() {
        return Err(place(&"it has no parameters"));
    }
    let (count, bytes) = (decoded.params.len(), decoded.params.content_bytes());
    if count > Accepted::PARAMS_MAX || bytes > Accepted::BYTES_MAX {
        return Err(place(&format!(
            "it has {count} parameters and {bytes} bytes; at most {} and {} are kept",
            Accepted::PARAMS_MAX,
            Accepted::BYTES_MAX
        )));
    }
    Ok(decoded)
}

/// Reads the arguments of a command: a JSON object, nothing, or plain text,
/// which then is the argument `text`.
///
/// # Errors
///
/// If it is neither.
pub fn arguments(payload: &[u8]) -> Result<Params, PayloadError> {
    if payload.is_empty() {
        return Ok(Params::new());
    }
    let text = std::str::from_utf8(payload)
        .map_err(|_| PayloadError::new("the payload is not UTF-8 text"))?;
    if text.trim_start().starts_with('{') {
        return serde_json::from_str(text).map_err(PayloadError::new);
    }
    let name = ParamName::new("text").map_err(PayloadError::new)?;
    Ok([(name, Value::from(text))].into_iter().collect())
}

/// What became of a command, as its answer's payload.
#[must_use]
pub fn answer(command: &Command) -> String {
    serde_json::json!({
        "id": command.id,
        "device": command.device,
        "name": command.name,
        "status": command.status,
        "answer": command.answer,
        "error": command.error,
        "finished_at": command.finished_at,
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use fieldline_model::Decimal;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_object_and_an_array_are_read() {
        let one = messages(
            br#"{"timestamp":"2026-11-20T10:00:00Z","a":12.50,"b":null,"received":"x","c":{"d":1}}"#,
        )
        .unwrap();
        assert_eq!(one[0].timestamp, Some("2026-11-20T10:00:00Z".parse().unwrap()));
        assert_eq!(one[0].params.len(), 2);
        assert_eq!(one[0].params.get("a"), Some(&Value::Decimal(Decimal::parse("12.5").unwrap())));
        let two = messages(br#" [{"timestamp":1795168800,"a":1},{"a":2}]"#).unwrap();
        assert_eq!(two[0].timestamp, Some(Timestamp::from_seconds(1_795_168_800)));
        assert_eq!((two.len(), two[1].timestamp), (2, None));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (payload, says) in [
            (&b""[..], "EOF"),
            (b"12", "no JSON object"),
            (b"[]", "0 messages"),
            (b"[{\"a\":1},{}]", "message 1: it has no parameters"),
            (b"{\"timestamp\":\"noon\",\"a\":1}", "is not a time"),
            (b"{\"a\":1", "EOF"),
            (b"\xff", "not UTF-8"),
        ] {
            let error = messages(payload).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        let many = format!("[{}]", vec!["{\"a\":1}"; 1_001].join(","));
        assert!(messages(many.as_bytes()).is_err());
    }

    #[test]
    fn plain_text_is_the_argument_text() {
        assert_eq!(arguments(b"getinfo").unwrap().get("text"), Some(&Value::from("getinfo")));
        assert_eq!(arguments(br#"{"text":"x"}"#).unwrap().get("text"), Some(&Value::from("x")));
        assert!(arguments(b"").unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn any_payload_is_read_or_refused(payload: Vec<u8>, text in "[\\[\\]{}\":,0-9a-z.]{0,60}") {
            let _read = (messages(&payload).is_ok(), messages(text.as_bytes()).is_ok());
            let _read = (arguments(&payload).is_ok(), arguments(text.as_bytes()).is_ok());
        }
    }
}
