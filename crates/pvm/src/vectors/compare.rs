//! Compares what a vector states with a message and a trace.

use fieldline_model::{Decoded, Timestamp, Value};
use serde_json::Value as Json;

use crate::{Program, TraceField};

/// A frame, or one message of it.
pub(super) struct Frame<'a> {
    pub(super) program: &'a Program,
    pub(super) fields: &'a [TraceField],
    /// The message that is looked at; without one, the whole trace is.
    pub(super) message: Option<usize>,
    pub(super) decoded: Option<&'a Decoded>,
}

impl<'a> Frame<'a> {
    /// Adds to `problems` if `key` is not as stated.
    pub(super) fn check(&self, key: &str, stated: &Json, problems: &mut Vec<String>) {
        match (key, stated) {
            ("io", Json::Object(entries)) => {
                for (id, raw) in entries {
                    if !self.has_entry(id, raw) {
                        problems.push(format!("io {id} is not {raw}{}", self.entry_found(id)));
                    }
                }
            }
            ("io.size", Json::Object(sizes)) => {
                for (id, size) in sizes {
                    let size = size.as_u64();
                    if !self.entries(id).any(|f| Some((f.end - f.start) as u64) == size) {
                        problems.push(format!("io {id} has not the size {size:?}"));
                    }
                }
            }
            ("io.variable", Json::Array(ids)) => {
                for id in ids.iter().filter_map(Json::as_str) {
                    let bytes = |f: &TraceField| {
                        matches!(f.value, Some(Value::Bytes(_) | Value::Text(_)) | None)
                    };
                    if !self.entries(id).any(bytes) {
                        problems.push(format!("io {id} is not of variable length"));
                    }
                }
            }
            ("params" | "tlv", Json::Object(params)) => {
                for (name, value) in params {
                    self.check_one(name, value, problems);
                }
            }
            (_, Json::Object(inner)) => {
                for (name, value) in inner {
                    self.check(&format!("{key}.{name}"), value, problems);
                }
            }
            _ => self.check_one(key, stated, problems),
        }
    }

    fn check_one(&self, key: &str, stated: &Json, problems: &mut Vec<String>) {
        if stated.is_null() || self.shows(key, stated) {
            return;
        }
        let stem = key.strip_suffix(".hex").or_else(|| key.strip_suffix(".text"));
        if stem.is_some_and(|stem| self.shows(stem, stated)) {
            return;
        }
        let found: Vec<String> =
            self.values(key).map(|v| v.to_json().to_string()).take(3).collect();
        let found = if found.is_empty() { "nothing".into() } else { found.join(", ") };
        problems.push(format!("{key} is {found}, not {stated}"));
    }

    fn shows(&self, key: &str, stated: &Json) -> bool {
        if key == "timestamp"
            && let (Some(at), Some(stated)) =
                (self.decoded.and_then(|d| d.timestamp), stated.as_str())
        {
            return stated.parse::<Timestamp>().is_ok_and(|stated| stated == at);
        }
        self.values(key).any(|value| same(key, stated, &value))
    }

    /// Values of that name in the message and in the trace.
    fn values(&self, key: &str) -> impl Iterator<Item = Value> {
        let params = self.decoded.into_iter().flat_map(|d| d.params.iter());
        let params =
            params.filter(|(name, _)| name.as_str() == key).map(|(_, value)| value.clone());
        let traced = self.traced().filter(|f| f.name == key).filter_map(|f| f.value.clone());
        let values: Vec<Value> = params.chain(traced).collect();
        values.into_iter()
    }

    /// Fields of the message, or of the frame.
    fn traced(&self) -> impl Iterator<Item = &'a TraceField> {
        let message = self.message;
        self.fields.iter().filter(move |f| message.is_none() || f.message == message)
    }

    /// Fields that a table named by this id.
    fn entries(&self, id: &str) -> impl Iterator<Item = &'a TraceField> {
        let note = format!("id {id}");
        self.traced().filter(move |f| f.note.as_ref() == Some(&note))
    }

    fn entry_found(&self, id: &str) -> String {
        let found: Vec<String> = self
            .entries(id)
            .map(|f| {
                format!("{} = {}", f.name, f.value.as_ref().map_or(Json::Null, Value::to_json))
            })
            .collect();
        if found.is_empty() { String::new() } else { format!(" but {}", found.join(", ")) }
    }

    /// Whether the message has the id's raw value, or what a table makes of it.
    fn has_entry(&self, id: &str, raw: &Json) -> bool {
        let Some(decoded) = self.decoded else {
            return self.entries(id).any(|f| f.value.as_ref().is_some_and(|v| same("io", raw, v)));
        };
        let named = format!("io.{id}");
        if decoded.params.iter().any(|(n, v)| n.as_str() == named && same("io", raw, v)) {
            return true;
        }
        let Ok(id) = id.parse::<u64>() else { return false };
        let rows = self.program.tables.iter().filter_map(|table| table.rows().get(&id));
        for entry in rows {
            let has =
                |value: &Value| decoded.params.iter().any(|(n, v)| *n == entry.name && v == value);
            if let Some(raw) = raw.as_u64() {
                // The width decides over the sign: any that the number fits may be meant.
                let made = [1, 2, 4, 8].map(|width| crate::vm::named_value(entry, raw, width));
                if made.iter().any(|(name, value)| *name == entry.name && has(value)) {
                    return true;
                }
            }
            let bytes = raw.as_str().and_then(fieldline_model::value::from_hex);
            if let Some(bytes) = bytes {
                let text = std::str::from_utf8(&bytes).is_ok_and(|text| has(&Value::from(text)));
                if text || has(&Value::from(bytes.as_slice())) {
                    return true;
                }
            }
        }
        false
    }
}

/// Whether a value is what a vector states, within the tolerances of its kind.
fn same(key: &str, stated: &Json, value: &Value) -> bool {
    match (stated, value) {
        (Json::Bool(a), Value::Bool(b)) => a == b,
        (Json::Number(n), Value::Int(_) | Value::Uint(_) | Value::Decimal(_))
            if (n.is_i64() || n.is_u64()) && !key.starts_with("position.") =>
        {
            // Whole numbers are compared to the last digit.
            Value::from_json(stated.clone()).is_some_and(|stated| stated == *value)
        }
        (Json::Number(n), _) => match (n.as_f64(), value.as_f64()) {
            (Some(a), Some(b)) => close(key, a, b),
            _ => false,
        },
        (Json::String(a), Value::Text(b)) => {
            **a == **b || *a == fieldline_model::value::to_hex(b.as_bytes()) || same_time(a, b)
        }
        (Json::String(a), Value::Bytes(b)) => {
            a.eq_ignore_ascii_case(&fieldline_model::value::to_hex(b)) || a.as_bytes() == &**b
        }
        (Json::Array(list), Value::Json(json)) => same_list(key, list, json),
        _ => false,
    }
}

fn same_time(a: &str, b: &str) -> bool {
    matches!((a.parse::<Timestamp>(), b.parse::<Timestamp>()), (Ok(a), Ok(b)) if a == b)
}

fn same_list(key: &str, stated: &[Json], json: &Json) -> bool {
    let Some(list) = json.as_array().filter(|list| list.len() == stated.len()) else {
        return false;
    };
    stated.iter().zip(list).all(|(stated, item)| match Value::from_json(item.clone()) {
        None => stated.is_null(),
        Some(item) => same(key, stated, &item),
    })
}

/// Coordinates to a millionth of a degree, speeds to 0.02 km/h, all else to a millionth of itself.
fn close(key: &str, a: f64, b: f64) -> bool {
    let allowed = match key {
        "position.latitude" | "position.longitude" => 1e-6,
        "position.speed" => 0.02,
        _ => a.abs().max(b.abs()) * 1e-6,
    };
    (a - b).abs() <= allowed
}
