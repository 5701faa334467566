//! Settings of an account.

use std::collections::BTreeMap;

use fieldline_contracts::registry::{Entity, UniqueIn};
use fieldline_contracts::{Kind, Page, RegistryError, RegistryExt as _};
use fieldline_model::AccountId;
use fieldline_model::id::uuid_v7;
use hyper::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::app::App;
use crate::call::{Ctx, json};
use crate::objects::check_text;
use crate::problem::Problem;
use crate::route::Answer;

/// Settings by name, such as `{"map.tiles_url": null}`.
#[derive(ToSchema)]
#[schema(value_type = Object)]
#[allow(dead_code, reason = "documents what is read as free JSON and then judged by name")]
pub(crate) struct SettingsInput(Json);

/// A setting that has a value.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Setting {
    id: Uuid,
    name: String,
    value: Json,
}

impl Entity for Setting {
    const KIND: Kind = Kind::Setting;

    fn id(&self) -> Uuid {
        self.id
    }

    fn unique(&self) -> BTreeMap<&'static str, (UniqueIn, String)> {
        BTreeMap::from([("name", (UniqueIn::Account, self.name.clone()))])
    }
}

/// A setting that there is: its name, and what checks a value.
type Known = (&'static str, fn(&Json) -> Result<(), Problem>);

/// Address of map tiles, with `{z}`, `{x}` and `{y}`; the built-in map where null.
pub(crate) const TILES_URL: &str = "map.tiles_url";

/// All settings.
const KNOWN: &[Known] = &[(TILES_URL, check_tiles_url), ("map.attribution", check_attribution)];

fn check_tiles_url(value: &Json) -> Result<(), Problem> {
    let wrong = |text: &str| Err(Problem::member(TILES_URL, text));
    let Some(url) = value.as_str() else { return wrong("is neither text nor null") };
    check_text(TILES_URL, url, 512)?;
    let of_an_address =
        |c: char| c.is_ascii_alphanumeric() || "-._~:/?#[]@!$&()*+,=%{}".contains(c);
    if tiles_origin(url).is_none() || !url.chars().all(of_an_address) {
        return wrong("is no address such as https://tiles.example.org/{z}/{x}/{y}.png");
    }
    if !["{z}", "{x}", "{y}"].iter().all(|part| url.contains(part)) {
        return wrong("needs the parts {z}, {x} and {y}");
    }
    Ok(())
}

fn check_attribution(value: &Json) -> Result<(), Problem> {
    match value.as_str() {
        Some(text) => check_text("map.attribution", text, 256),
        None => Err(Problem::member("map.attribution", "is neither text nor null")),
    }
}

/// Scheme, host and port of an address of tiles: what the console's page may load images from.
/// Nothing but a host can be in it, since it goes into a header.
fn tiles_origin(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    if !matches!(scheme, "http" | "https") {
        return None;
    }
    // `{s}` for several hosts is refused: name one.
    let host = rest.split('/').next()?;
    let fits =
        !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || ".-:[]".contains(c));
    fits.then(|| format!("{scheme}://{host}"))
}

/// What the console's page of this account may load images from, besides the server.
pub(crate) async fn image_origin(app: &App, account: AccountId) -> Option<String> {
    let found = app.registry().find_object::<Setting>(account, "name", TILES_URL).await;
    tiles_origin(found.ok()??.object.value.as_str()?)
}

async fn all(ctx: &Ctx) -> Result<Map<String, Json>, Problem> {
    let page = Page::first(1_000);
    let set = ctx.app.registry().list_objects::<Setting>(ctx.account(), &page).await?;
    let mut all: Map<String, Json> =
        KNOWN.iter().map(|(name, _)| ((*name).to_owned(), Json::Null)).collect();
    for setting in set.into_iter().map(|set| set.object) {
        if let Some(place) = all.get_mut(&setting.name) {
            *place = setting.value;
        }
    }
    Ok(all)
}

/// `GET /settings`
pub(crate) async fn read(ctx: Ctx) -> Answer {
    json(StatusCode::OK, &all(&ctx).await?)
}

/// `PATCH /settings`
pub(crate) async fn patch(ctx: Ctx) -> Answer {
    ctx.unrestricted("changing settings")?;
    let wanted: Map<String, Json> = ctx.json()?;
    // All are judged before the first is written.
    for (name, value) in &wanted {
        let Some((_, check)) = KNOWN.iter().find(|(known, _)| known == name) else {
            let known: Vec<&str> = KNOWN.iter().map(|(name, _)| *name).collect();
            let name: String = name.chars().take(64).collect();
            return Err(Problem::member(
                &name,
                format!("there is no such setting; there are: {}", known.join(", ")),
            ));
        };
        if !value.is_null() {
            check(value)?;
        }
    }
    let (registry, account, by) = (ctx.app.registry(), ctx.account(), &ctx.identity.actor);
    for (name, value) in wanted {
        let found = registry.find_object::<Setting>(account, "name", &name).await?;
        match (found, value) {
            (None, Json::Null) => {}
            (Some(found), Json::Null) => {
                let gone = registry.delete(account, Kind::Setting, found.object.id, None, by).await;
                match gone {
                    Ok(()) | Err(RegistryError::NotFound { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            (Some(found), value) => {
                let next = Setting { value, ..found.object };
                registry.update_object(account, &next, None, by).await?;
            }
            (None, value) => {
                let clock = &ctx.app.platform().clock;
                let id = uuid_v7(clock.now(), clock.random());
                registry.create_object(account, &Setting { id, name, value }, by).await?;
            }
        }
    }
    json(StatusCode::OK, &all(&ctx).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_host_gets_into_the_header() {
        assert_eq!(
            tiles_origin("https://t.example.org:8443/{z}/{x}/{y}.png").as_deref(),
            Some("https://t.example.org:8443")
        );
        for wrong in [
            "tiles",
            "ftp://x/{z}",
            "https://a b/{z}",
            "https://x;script-src *",
            "https://{s}.x/{z}",
            "https:///x",
            "javascript://x/{z}",
        ] {
            assert_eq!(tiles_origin(wrong), None, "{wrong}");
        }
        for wrong in ["https://x.org/{z}/{x}.png", "https://x.org/{z}/{x}/{y}; script-src *"] {
            assert!(check_tiles_url(&Json::from(wrong)).is_err(), "{wrong}");
        }
        check_tiles_url(&Json::from("https://x.org/{z}/{x}/{y}.png")).unwrap();
    }
}
