//! The OpenAPI document, made from the table of routes.

use std::collections::BTreeMap;

use fieldline_model::Scope;
use serde_json::{Map, Value as Json, json};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::Schema;

use crate::problem::{self, Problem};
use crate::route::{Param, Route, Shape, TypeDoc, of};
use crate::routes::ROUTES;

/// The document as JSON, with its members in a fixed order.
pub(crate) fn render() -> String {
    let mut schemas = Schemas::default();
    let problem = schemas.reference(of::<problem::Document>());
    let mut paths: BTreeMap<&str, Map<String, Json>> = BTreeMap::new();
    for route in ROUTES {
        let operation = operation(route, &mut schemas, &problem);
        paths.entry(route.path).or_default().insert(route.method.to_lowercase(), operation);
    }
    let codes: Vec<String> = Problem::ALL
        .iter()
        .map(|(code, status, title)| format!("| `{code}` | {} | {title} |", status.as_u16()))
        .collect();
    let about = format!(
        "Lists answer `{{\"items\": […], \"next\": \"…\"}}`; pass `next` as `cursor`. Objects carry `revision`, also \
         as `ETag`; send it as `If-Match` and a change made meanwhile is answered with 412. `PATCH` is a JSON \
         merge patch (RFC 7396). A `POST` with an `Idempotency-Key` is done once within a day, as long as the \
         server runs. Changes by cookie need the header `X-Fieldline-Csrf: 1`. What belongs to another account \
         does not exist: 404. Errors are problem documents (RFC 9457):\n\n| code | status | |\n|---|---|---|\n{}",
        codes.join("\n")
    );
    let groups = ROUTES.iter().map(|route| route.group);
    let mut tags: Vec<Json> = Vec::new();
    for group in groups {
        let tag = json!({ "name": group });
        if !tags.contains(&tag) {
            tags.push(tag);
        }
    }
    let document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Fieldline",
            "version": env!("CARGO_PKG_VERSION"),
            "description": about,
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "tags": tags,
        "paths": paths,
        "components": {
            "schemas": schemas.named,
            "securitySchemes": {
                "token": { "type": "http", "scheme": "bearer", "description": "An API token" },
                "session": { "type": "apiKey", "in": "cookie", "name": crate::serve::COOKIE_NAME, "description": "A console session" },
            },
        },
    });
    let mut text = serde_json::to_string_pretty(&document).unwrap_or_default();
    text.push('\n');
    text
}

#[derive(Default)]
struct Schemas {
    named: BTreeMap<String, Json>,
}

impl Schemas {
    /// A reference to a type's schema, which is added with all that it refers to.
    fn reference(&mut self, of: TypeDoc) -> Json {
        let mut parts: Vec<(String, RefOr<Schema>)> = Vec::new();
        (of.parts)(&mut parts);
        for (name, schema) in parts {
            self.add(&name, &schema);
        }
        let name = (of.name)().into_owned();
        self.add(&name, &(of.schema)());
        json!({ "$ref": format!("#/components/schemas/{name}") })
    }

    /// As [`Self::reference`], for a merge patch: no member is needed, and null takes one away.
    fn patch_reference(&mut self, of: TypeDoc) -> Json {
        self.reference(of);
        let name = (of.name)().into_owned();
        let mut schema = self.named.get(&name).cloned().unwrap_or_default();
        if let Some(members) = schema.as_object_mut() {
            members.remove("required");
            let about = "Members to change; null takes one back to its default.";
            members.insert("description".to_owned(), json!(about));
            let properties = members.get_mut("properties").and_then(Json::as_object_mut);
            for property in properties.into_iter().flat_map(|all| all.values_mut()) {
                *property = json!({ "oneOf": [property.take(), { "type": "null" }] });
            }
        }
        let name = format!("{}Change", name.trim_end_matches("Patch").trim_end_matches("Input"));
        self.named.insert(name.clone(), schema);
        json!({ "$ref": format!("#/components/schemas/{name}") })
    }

    fn add(&mut self, name: &str, schema: &RefOr<Schema>) {
        if !self.named.contains_key(name) {
            let json = serde_json::to_value(schema).unwrap_or_default();
            self.named.insert(name.to_owned(), json);
        }
    }
}

fn operation(route: &Route, schemas: &mut Schemas, problem: &Json) -> Json {
    let mut parameters: Vec<Json> = path_parameters(route.path);
    parameters.extend(route.query.iter().map(query_parameter));
    let header = |name: &str, about: &str| json!({ "name": name, "in": "header", "required": false, "description": about, "schema": { "type": "string" } });
    if route.revision && matches!(route.method, "PUT" | "PATCH" | "DELETE") {
        parameters.push(header(
            "If-Match",
            "The `ETag` that was read; 412 where the object was changed since",
        ));
    }
    if route.method == "POST" && !route.is_public() {
        parameters.push(header(
            "Idempotency-Key",
            "The same key again gets the same answer, without doing it again",
        ));
    }
    let mut responses = Map::new();
    responses.insert(route.status.to_string(), success(route, schemas));
    let failure = |title: &str| json!({ "description": title, "content": { "application/problem+json": { "schema": problem } } });
    if route.method == "PUT" {
        // The same object, made instead of changed.
        responses.insert("201".to_owned(), success(route, schemas));
    }
    for (status, title) in failures(route) {
        responses.insert(status.to_string(), failure(title));
    }
    let mut operation = Map::new();
    operation.insert("tags".to_owned(), json!([route.group]));
    operation.insert("summary".to_owned(), json!(route.title));
    let mut about = route.about.to_owned();
    if let Some(scope) = route.scope() {
        if !about.is_empty() {
            about.push_str("\n\n");
        }
        about.push_str(&format!("Scope: `{}`.", scope.name()));
    }
    if !about.is_empty() {
        operation.insert("description".to_owned(), json!(about));
    }
    operation.insert("operationId".to_owned(), json!(operation_id(route)));
    if !parameters.is_empty() {
        operation.insert("parameters".to_owned(), json!(parameters));
    }
    if let Some(body) = route.body {
        let patch = route.method == "PATCH";
        let kind = if patch { "application/merge-patch+json" } else { "application/json" };
        let schema = if patch { schemas.patch_reference(body) } else { schemas.reference(body) };
        operation.insert(
            "requestBody".to_owned(),
            json!({ "required": true, "content": { kind: { "schema": schema } } }),
        );
    }
    operation.insert("responses".to_owned(), Json::Object(responses));
    if !route.is_public() {
        operation.insert("security".to_owned(), security(route.scope()));
    }
    Json::Object(operation)
}

fn security(scope: Option<Scope>) -> Json {
    let scopes: Vec<&str> = scope.iter().map(|scope| scope.name()).collect();
    json!([{ "token": scopes }, { "session": scopes }])
}

fn success(route: &Route, schemas: &mut Schemas) -> Json {
    let json_of = |schema: Json| json!({ "application/json": { "schema": schema } });
    let mut response = Map::new();
    let (about, content) = match route.shape {
        Shape::Empty => ("Done", None),
        Shape::Upgrade => ("The connection becomes a WebSocket", None),
        Shape::Text => ("Text", Some(json!({ "text/plain": { "schema": { "type": "string" } } }))),
        Shape::Object => ("An object", Some(json_of(json!({ "type": "object" })))),
        Shape::One(of) => ("The object", Some(json_of(schemas.reference(of)))),
        Shape::List(of) => {
            let items = schemas.reference(of);
            let page = json!({
                "type": "object",
                "required": ["items", "next"],
                "properties": {
                    "items": { "type": "array", "items": items },
                    "next": { "type": ["string", "null"], "description": "Cursor of the next page" },
                },
            });
            ("A page", Some(json_of(page)))
        }
    };
    response.insert("description".to_owned(), json!(about));
    if let Some(content) = content {
        response.insert("content".to_owned(), content);
    }
    Json::Object(response)
}

/// The failures that are worth naming for this route.
fn failures(route: &Route) -> Vec<(u16, &'static str)> {
    let mut all = Vec::new();
    let mut add = |holds: bool, status: u16, title: &'static str| {
        if holds {
            all.push((status, title));
        }
    };
    let private = !route.is_public();
    add(!route.query.is_empty() || route.body.is_some(), 400, "The request cannot be read");
    add(private || route.group == "auth", 401, "Not signed in");
    add(private, 403, "A right is missing");
    add(route.path.contains('{'), 404, "There is no such thing in this account");
    add(
        matches!(route.method, "POST" | "PUT" | "PATCH" | "DELETE") && private,
        409,
        "It clashes with what is there",
    );
    add(
        route.revision && matches!(route.method, "PUT" | "PATCH" | "DELETE"),
        412,
        "It was changed meanwhile",
    );
    add(route.body.is_some(), 413, "The body is too large");
    add(route.body.is_some(), 415, "The body is not JSON");
    add(route.body.is_some(), 422, "A value is not possible");
    add(private || route.group == "auth", 429, "Too many requests");
    add(true, 503, "Not possible now");
    all
}

fn path_parameters(path: &str) -> Vec<Json> {
    let names = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let parameter = |name: &str| {
        let schema = match name {
            "id" | "connection" => json!({ "type": "string", "format": "uuid" }),
            _ => json!({ "type": "string" }),
        };
        json!({ "name": name, "in": "path", "required": true, "schema": schema })
    };
    names.map(parameter).collect()
}

fn query_parameter(param: &Param) -> Json {
    let schema = match param.kind {
        "date-time" | "uuid" => json!({ "type": "string", "format": param.kind }),
        kind => json!({ "type": kind }),
    };
    json!({ "name": param.name, "in": "query", "required": false, "description": param.about, "schema": schema })
}

/// A name for generated clients: `get_devices_id_state`.
fn operation_id(route: &Route) -> String {
    let path = route.path.trim_start_matches("/api/v1").replace(['{', '}', '.'], "");
    let parts = path.split(['/', '-']).filter(|part| !part.is_empty());
    let name: Vec<&str> = parts.collect();
    format!("{}_{}", route.method.to_lowercase(), name.join("_"))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn references(json: &Json, out: &mut Vec<String>) {
        match json {
            Json::Object(members) => {
                if let Some(Json::String(reference)) = members.get("$ref") {
                    out.push(reference.clone());
                }
                members.values().for_each(|member| references(member, out));
            }
            Json::Array(items) => items.iter().for_each(|item| references(item, out)),
            _ => {}
        }
    }

    #[test]
    fn every_route_is_in_the_document_and_every_reference_leads_somewhere() {
        let document: Json = serde_json::from_str(&render()).unwrap();
        for route in ROUTES {
            let operation = &document["paths"][route.path][route.method.to_lowercase()];
            assert!(operation["summary"].is_string(), "{} {}", route.method, route.path);
        }
        let mut all = Vec::new();
        references(&document, &mut all);
        assert!(all.len() > 50);
        for reference in all {
            let name = reference.strip_prefix("#/components/schemas/").unwrap();
            assert!(document["components"]["schemas"][name].is_object(), "{reference}");
        }
    }

    #[test]
    fn operations_have_names_of_their_own() {
        let names: HashSet<String> = ROUTES.iter().map(operation_id).collect();
        assert_eq!(names.len(), ROUTES.len());
    }

    #[test]
    fn no_hash_of_a_secret_is_described() {
        let text = render();
        assert!(!text.contains("password_hash") && !text.contains("secret_hash"));
    }
}
