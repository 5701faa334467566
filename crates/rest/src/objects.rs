//! What all kinds of objects have in common: pages, changes, deletions, and checks of their members.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use fieldline_contracts::registry::{Entity, Versioned};
use fieldline_contracts::{Page, RegistryError, RegistryExt as _};
use fieldline_model::AccountId;
use fieldline_model::object::Labels;
use hyper::header::{HeaderValue, LINK};
use hyper::{Response, StatusCode};
use serde::Serialize;
use serde_json::Value as Json;
use uuid::Uuid;

use crate::call::{Ctx, empty, json_text};
use crate::problem::Problem;
use crate::route::Answer;

/// Objects of a page, where the client does not say how many.
pub(crate) const LIMIT_DEFAULT: u64 = 100;
/// Most objects of a page.
pub(crate) const LIMIT_MAX: u64 = 1_000;
/// Objects looked at for one page of a filtered list, at most; the next page goes on from there.
const SCANNED_MAX: usize = 20_000;
/// Objects read at once where a list is filtered.
const CHUNK: usize = 1_000;
/// How often a change is tried again that another one overtook.
const TRIES_MAX: usize = 5;

/// A page of objects.
pub(crate) struct Listed<T> {
    pub(crate) items: Vec<Versioned<T>>,
    /// The id after which the next page begins.
    pub(crate) next: Option<Uuid>,
}

/// A page of the objects of `account` that `keep` holds for; with `filtered`, few of them may be.
pub(crate) async fn scan<T: Entity>(
    ctx: &Ctx,
    account: AccountId,
    equals: Vec<(String, Json)>,
    filtered: bool,
    keep: impl Fn(&T) -> bool + Send,
) -> Result<Listed<T>, Problem> {
    let limit = ctx.query.limit(LIMIT_DEFAULT, LIMIT_MAX)?;
    let mut page = Page { after: ctx.query.after_id()?, limit, equals };
    if filtered {
        page.limit = CHUNK;
    }
    let mut items = Vec::new();
    let mut scanned = 0;
    loop {
        let chunk = ctx.app.registry().list_objects::<T>(account, &page).await?;
        let last = chunk.len() < page.limit;
        scanned += chunk.len();
        for found in chunk {
            page.after = Some(found.object.id());
            if keep(&found.object) {
                items.push(found);
                if items.len() == limit {
                    return Ok(Listed { items, next: page.after });
                }
            }
        }
        if last {
            return Ok(Listed { items, next: None });
        }
        if scanned >= SCANNED_MAX {
            return Ok(Listed { items, next: page.after });
        }
    }
}

/// The answer with a page.
pub(crate) fn page<T: Serialize>(ctx: &Ctx, items: &[T], next: Option<String>) -> Answer {
    let items = serde_json::to_string(items).map_err(Problem::fault)?;
    Ok(page_text(ctx, &items, next))
}

/// The answer with a page whose items are JSON text already, brackets included.
pub(crate) fn page_text(
    ctx: &Ctx,
    items: &str,
    next: Option<String>,
) -> Response<http_body_util::Full<bytes::Bytes>> {
    let cursor = next.as_ref().map_or(Json::Null, |next| Json::from(next.as_str()));
    let mut response = json_text(format!("{{\"items\":{items},\"next\":{cursor}}}"));
    if let Some(next) = next {
        let mut query = form_urlencoded::Serializer::new(String::new());
        for (name, value) in ctx.query.pairs().iter().filter(|(name, _)| name != "cursor") {
            query.append_pair(name, value);
        }
        query.append_pair("cursor", &next);
        let link = format!("<{}?{}>; rel=\"next\"", ctx.uri.path(), query.finish());
        if let Ok(value) = HeaderValue::from_str(&link) {
            response.headers_mut().insert(LINK, value);
        }
    }
    response
}

/// Changes an object as `edit` says.
///
/// With `If-Match` the change is refused where another one came first; without,
/// it is made again on top of that one.
pub(crate) async fn change<T: Entity + Sync>(
    ctx: &Ctx,
    account: AccountId,
    id: Uuid,
    mut edit: impl FnMut(T, u64) -> Result<T, Problem> + Send,
) -> Result<Versioned<T>, Problem> {
    let wanted = ctx.if_match()?;
    let registry = ctx.app.registry();
    let mut tries = 1;
    loop {
        let found = registry.get_object::<T>(account, id).await?;
        let found = found.ok_or(RegistryError::NotFound { kind: T::KIND, id })?;
        let revision = found.revision;
        if let Some(expected) = wanted
            && expected != revision
        {
            return Err(RegistryError::Changed { expected, found: revision }.into());
        }
        let object = edit(found.object, revision)?;
        let by = &ctx.identity.actor;
        match registry.update_object(account, &object, Some(revision), by).await {
            Err(RegistryError::Changed { .. }) if wanted.is_none() && tries < TRIES_MAX => {
                tries += 1;
            }
            written => return Ok(written?),
        }
    }
}

/// Deletes an object.
pub(crate) async fn remove<T: Entity>(ctx: &Ctx, account: AccountId, id: Uuid) -> Answer {
    let expected = ctx.if_match()?;
    let by = &ctx.identity.actor;
    ctx.app.registry().delete(account, T::KIND, id, expected, by).await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

/// Checks a text that people see.
pub(crate) fn check_text(member: &str, text: &str, most: usize) -> Result<(), Problem> {
    let chars = text.chars().count();
    if chars > most {
        return Err(Problem::member(
            member,
            format!("has {chars} characters; at most {most} are kept"),
        ));
    }
    if text.chars().any(char::is_control) {
        return Err(Problem::member(member, "holds control characters"));
    }
    if let Some(wrong) = text.chars().find(|c| unseen(*c)) {
        let wrong = wrong.escape_unicode();
        return Err(Problem::member(member, format!("holds the invisible character {wrong}")));
    }
    Ok(())
}

/// Whether a character is not seen, or turns the direction of those that are: two names could look
/// the same. Those that join letters are not among them, as some scripts need them.
pub(crate) const fn unseen(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}' | '\u{200e}' | '\u{200f}'
        | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
        | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Whether a character joins letters or keeps them apart.
pub(crate) const fn joins(c: char) -> bool {
    matches!(c, '\u{200c}' | '\u{200d}')
}

/// Checks a text that must not be empty.
pub(crate) fn check_name(member: &str, text: &str, most: usize) -> Result<(), Problem> {
    if text.trim().is_empty() {
        return Err(Problem::member(member, "is empty"));
    }
    check_text(member, text, most)
}

/// Checks labels.
pub(crate) fn check_labels(labels: &Labels) -> Result<(), Problem> {
    const LABELS_MAX: usize = 64;
    if labels.len() > LABELS_MAX {
        return Err(Problem::member(
            "labels",
            format!("has {}; at most {LABELS_MAX} are kept", labels.len()),
        ));
    }
    for (key, value) in labels {
        check_name("labels", key, 64)?;
        if key.contains(':') {
            return Err(Problem::member(
                "labels",
                format!("the key `{key}` holds a colon, which separates key and value in filters"),
            ));
        }
        check_text("labels", value, 256)?;
    }
    Ok(())
}

/// Checks a number.
pub(crate) fn check_range(member: &str, number: u32, least: u32, most: u32) -> Result<(), Problem> {
    if (least..=most).contains(&number) {
        return Ok(());
    }
    Err(Problem::member(member, format!("is {number}; it may be {least} to {most}")))
}

/// The labels that a list is filtered by: `label=KEY:VALUE`, or `label=KEY` for any value.
pub(crate) struct LabelFilter(Vec<(String, Option<String>)>);

impl LabelFilter {
    pub(crate) fn of(ctx: &Ctx) -> Self {
        let read = |text: &str| match text.split_once(':') {
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => (text.to_owned(), None),
        };
        Self(ctx.query.all("label").map(read).collect())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn holds(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|(key, value)| {
            labels.get(key).is_some_and(|has| value.as_ref().is_none_or(|value| value == has))
        })
    }
}

/// Appends `text` as a JSON string.
pub(crate) fn write_json_text(out: &mut String, text: &str) {
    // Nearly all names are plain: no need to look for what must be escaped twice.
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-: ".contains(&b));
    if plain {
        out.push('"');
        out.push_str(text);
        out.push('"');
    } else {
        let written = write!(out, "{}", Json::from(text));
        debug_assert!(written.is_ok(), "writing to a String cannot fail");
    }
}
