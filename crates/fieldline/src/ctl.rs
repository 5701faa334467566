//! `fieldline ctl`: the objects of a running server.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};

use hyper::Method;
use serde_json::{Map, Value as Json, json};

use crate::cli::{CtlArgs, CtlCommand, Objects, Output};
use crate::http_client::Client;

/// Most columns of a table.
const COLUMNS_MAX: usize = 12;
/// Objects of one page that `list` asks for.
const PAGE: usize = 1_000;

/// Runs one command and prints its result.
pub(crate) async fn run(args: CtlArgs) -> Result<(), String> {
    if args.token.as_deref().is_none_or(str::is_empty) {
        return Err("no API token: give --token, or set FIELDLINE_TOKEN to the one that the first start printed".to_owned());
    }
    let client = Client::new(&args.url, args.token, args.ca.as_deref())?;
    let result = match args.command {
        CtlCommand::List { objects, filters } => list(&client, objects, &filters).await?,
        CtlCommand::Get { objects, id } => {
            ask(&client, Method::GET, &format!("/{}/{}", path(objects), segment(&id)), None).await?
        }
        CtlCommand::Create { objects, members, json } => {
            let body = body(members, json)?;
            ask(&client, Method::POST, &format!("/{}", path(objects)), Some(&body)).await?
        }
        CtlCommand::Patch { objects, id, members, json } => {
            let body = body(members, json)?;
            ask(
                &client,
                Method::PATCH,
                &format!("/{}/{}", path(objects), segment(&id)),
                Some(&body),
            )
            .await?
        }
        CtlCommand::Delete { objects, id } => {
            ask(&client, Method::DELETE, &format!("/{}/{}", path(objects), segment(&id)), None)
                .await?;
            json!({ "deleted": id })
        }
        CtlCommand::Upload { name, file } => {
            let source = std::fs::read_to_string(&file)
                .map_err(|error| format!("{}: {error}", file.display()))?;
            let body = json!({ "source": source });
            ask(&client, Method::PUT, &format!("/protocols/{}", segment(&name)), Some(&body))
                .await?
        }
        CtlCommand::Messages { device, limit } => {
            let path = format!("/devices/{}/messages?reverse=true&limit={limit}", segment(&device));
            ask(&client, Method::GET, &path, None).await?
        }
        CtlCommand::State { device } => {
            ask(&client, Method::GET, &format!("/devices/{}/state", segment(&device)), None).await?
        }
        CtlCommand::Log { device, limit } => {
            let path = format!("/devices/{}/log?reverse=true&limit={limit}", segment(&device));
            let log = ask(&client, Method::GET, &path, None).await?;
            if matches!(args.output, Output::Table) { told(&log) } else { log }
        }
        CtlCommand::Send { device, name, params, ttl_s, wait_ms } => {
            let body = json!({ "name": name, "params": pairs(params)?, "ttl_s": ttl_s });
            let path = format!("/devices/{}/commands?wait_ms={wait_ms}", segment(&device));
            let command = ask(&client, Method::POST, &path, Some(&body)).await?;
            print(&command, args.output)?;
            return ended_well(&command);
        }
        CtlCommand::System => ask(&client, Method::GET, "/system", None).await?,
    };
    print(&result, args.output)
}

/// Whether a command was answered, or waits still: a script looks at the exit code.
fn ended_well(command: &Json) -> Result<(), String> {
    let member = |name: &str| command.get(name).and_then(Json::as_str);
    match member("status") {
        Some(status @ ("failed" | "expired" | "cancelled")) => {
            let why = member("error").map(|error| format!(": {error}")).unwrap_or_default();
            Err(format!("the command {status}{why}"))
        }
        _ => Ok(()),
    }
}

async fn ask(
    client: &Client,
    method: Method,
    path: &str,
    body: Option<&Json>,
) -> Result<Json, String> {
    client.send(method, &format!("/api/v1{path}"), body).await?.json()
}

/// All pages of a list.
async fn list(client: &Client, objects: Objects, filters: &[String]) -> Result<Json, String> {
    let mut items = Vec::new();
    let mut cursor: Option<String> = None;
    loop {
        let mut query = format!("/{}?limit={PAGE}", path(objects));
        for filter in filters {
            let (name, value) =
                filter.split_once('=').ok_or_else(|| format!("`{filter}` is not NAME=VALUE"))?;
            // Writing to a String cannot fail.
            let _written = write!(query, "&{}={}", segment(name), segment(value));
        }
        if let Some(cursor) = &cursor {
            let _written = write!(query, "&cursor={}", segment(cursor));
        }
        let mut page = ask(client, Method::GET, &query, None).await?;
        if let Some(Json::Array(more)) = page.get_mut("items").map(Json::take) {
            items.extend(more);
        }
        match page.get("next").and_then(Json::as_str) {
            Some(next) => cursor = Some(next.to_owned()),
            None => return Ok(json!({ "items": items })),
        }
    }
}

const fn path(objects: Objects) -> &'static str {
    match objects {
        Objects::Accounts => "accounts",
        Objects::Users => "users",
        Objects::Tokens => "tokens",
        Objects::Devices => "devices",
        Objects::Channels => "channels",
        Objects::Protocols => "protocols",
        Objects::Parameters => "parameters",
    }
}

/// Text as a part of an address, by RFC 3986.
fn segment(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                out.push(char::from(byte))
            }
            _ => {
                let _written = write!(out, "%{byte:02X}");
            }
        }
    }
    out
}

/// The object of NAME=VALUE pairs, or of JSON text.
fn body(members: Vec<String>, json: Option<String>) -> Result<Json, String> {
    let Some(text) = json else { return pairs(members) };
    if !members.is_empty() {
        return Err("give either NAME=VALUE pairs or --json".to_owned());
    }
    let text = if text == "-" {
        let mut input = String::new();
        std::io::stdin()
            .read_to_string(&mut input)
            .map_err(|error| format!("standard input: {error}"))?;
        input
    } else {
        text
    };
    serde_json::from_str(&text).map_err(|error| format!("this is not JSON: {error}"))
}

/// The object of NAME=VALUE pairs; a value that is JSON is taken as such, any other as text.
fn pairs(members: Vec<String>) -> Result<Json, String> {
    let mut object = Map::new();
    for member in members {
        let (name, value) =
            member.split_once('=').ok_or_else(|| format!("`{member}` is not NAME=VALUE"))?;
        let value = match serde_json::from_str(value) {
            // Identities are digits, but text all the same.
            Ok(Json::Number(_)) if matches!(name, "ident" | "text" | "name" | "password") => {
                value.into()
            }
            Ok(json) => json,
            Err(_) => value.into(),
        };
        object.insert(name.to_owned(), value);
    }
    Ok(Json::Object(object))
}

fn print(result: &Json, output: Output) -> Result<(), String> {
    let text = match (output, result.get("items").and_then(Json::as_array)) {
        (Output::Table, Some(items)) => table(items),
        (Output::Table, None) if result.is_object() => record(result),
        _ => serde_json::to_string_pretty(result).map_err(|error| error.to_string())?,
    };
    match writeln!(std::io::stdout(), "{text}") {
        // Whoever reads has seen enough, as `head` has.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.to_string()),
        _ => Ok(()),
    }
}

/// Lines of a log for looking at: when, what, and what there is to say of it.
fn told(log: &Json) -> Json {
    let line = |item: &Json| {
        let text = |name: &str| match item.get(name) {
            Some(Json::String(text)) if !text.is_empty() => Some(text.clone()),
            _ => None,
        };
        let messages = item.get("messages").and_then(Json::as_array).map(Vec::len);
        let messages = match messages {
            None | Some(0) => None,
            Some(1) => Some("1 message".to_owned()),
            Some(count) => Some(format!("{count} messages")),
        };
        let names = ["ident", "peer", "close.name", "error.class", "error.text", "text"];
        let parts: Vec<String> = names.into_iter().filter_map(text).chain(messages).collect();
        json!({
            "timestamp": item.get("timestamp"),
            "kind": item.get("log.kind"),
            "about": parts.join(", "),
        })
    };
    let items = log.get("items").and_then(Json::as_array).map(Vec::as_slice).unwrap_or_default();
    json!({ "items": items.iter().map(line).collect::<Vec<_>>() })
}

/// A cell's text: long ones are cut, since a table is for looking.
fn cell(name: &str, value: &Json) -> String {
    // Words of a log are what it is looked at for.
    let most = if name == "about" { 160 } else { 48 };
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let text = text.replace(['\n', '\r'], " ");
    if text.chars().count() > most {
        return text.chars().take(most - 1).chain(['…']).collect();
    }
    text
}

/// Rows with a column for each member that any row has.
fn table(items: &[Json]) -> String {
    let hidden = [
        "account",
        "created_at",
        "revision",
        "source",
        "settings",
        "labels",
        "messages",
        "frame.hex",
    ];
    let mut columns: Vec<&String> = Vec::new();
    for name in items.iter().filter_map(Json::as_object).flat_map(Map::keys) {
        if !hidden.contains(&name.as_str())
            && !columns.contains(&name)
            && columns.len() < COLUMNS_MAX
        {
            columns.push(name);
        }
    }
    if columns.is_empty() {
        return "nothing".to_owned();
    }
    let mut rows = vec![columns.iter().map(|name| name.to_uppercase()).collect::<Vec<_>>()];
    let row = |item: &Json| {
        let shown = |name: &&String| item.get(name.as_str()).map(|value| cell(name, value));
        columns.iter().map(|name| shown(name).unwrap_or_default()).collect()
    };
    rows.extend(items.iter().map(row));
    let width = |at: usize| {
        rows.iter().filter_map(|row| Some(row.get(at)?.chars().count())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(text, width)| format!("{text:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// One object, a member a line.
fn record(object: &Json) -> String {
    let members: Vec<(&String, &Json)> = object.as_object().into_iter().flatten().collect();
    let width = members.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let line = |(name, value): &(&String, &Json)| {
        let text = match value {
            Json::String(text) => text.clone(),
            Json::Object(_) | Json::Array(_) => {
                serde_json::to_string_pretty(value).unwrap_or_default()
            }
            other => other.to_string(),
        };
        format!("{name:<width$}  {}", text.replace('\n', &format!("\n{:width$}  ", "")))
    };
    members.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_json_where_they_can_be() {
        let members = ["ident=356307042441013", "enabled=true", "labels={\"a\":\"b\"}", "note=a=b"];
        let object = pairs(members.map(str::to_owned).to_vec()).unwrap();
        assert_eq!(
            object,
            json!({ "ident": "356307042441013", "enabled": true, "labels": { "a": "b" }, "note": "a=b" })
        );
        assert!(pairs(vec!["oops".to_owned()]).is_err());
    }

    #[test]
    fn a_command_that_failed_is_a_failure() {
        for (status, well) in
            [("answered", true), ("queued", true), ("sent", true), ("failed", false)]
        {
            let command = json!({ "status": status, "error": "no" });
            assert_eq!(ended_well(&command).is_ok(), well, "{status}");
        }
        let expired = ended_well(&json!({ "status": "expired", "error": null }));
        assert_eq!(expired.unwrap_err(), "the command expired");
    }

    #[test]
    fn addresses_are_escaped() {
        assert_eq!(segment("a/b c"), "a%2Fb%20c");
    }

    #[test]
    fn a_log_tells_why_a_connection_was_closed() {
        let line = json!({
            "timestamp": "t", "received": "t", "log.kind": "closed", "close.code": 4,
            "close.name": "idle_timeout", "text": "silent for 600 s", "messages": [],
        });
        let told = told(&json!({ "items": [line] }));
        let about = "idle_timeout, silent for 600 s";
        assert_eq!(told["items"][0], json!({ "timestamp": "t", "kind": "closed", "about": about }));
    }

    #[test]
    fn tables_align() {
        let items = [json!({ "id": "1" }), json!({ "id": "22", "name": "Truck" })];
        assert_eq!(table(&items), "ID  NAME\n1\n22  Truck");
    }
}
