//! Parameters: the dictionary, and those that an account declared.

use fieldline_contracts::registry::ParameterObject;
use fieldline_contracts::{Kind, Page, RegistryExt as _};
use fieldline_model::dictionary::dictionary;
use fieldline_model::id::uuid_v7;
use fieldline_model::{Decimal, ParamKind, ParamName, ParamSpec};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::call::Ctx;
use crate::objects::{Listed, change, check_text, page, remove, scan};
use crate::patch::merged;
use crate::problem::Problem;
use crate::route::Answer;

/// Most parameters that an account declares.
const PARAMETERS_MAX: usize = 5_000;

/// Members of a message that are no parameters.
const RESERVED: [&str; 2] = ["timestamp", "received"];

/// A declared parameter.
#[derive(Serialize, ToSchema)]
pub(crate) struct ParameterView {
    /// Absent for one of the dictionary.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<Uuid>,
    #[serde(flatten)]
    spec: ParamSpec,
    /// Whether it is of the dictionary.
    built_in: bool,
    /// Counts up with every change; the `ETag`.
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<u64>,
}

impl ParameterView {
    fn own(object: ParameterObject, revision: u64) -> Self {
        Self { id: Some(object.id), spec: object.spec, built_in: false, revision: Some(revision) }
    }
}

/// A parameter to be declared, and the members of one that can be changed.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ParameterInput {
    /// Its name; one of the dictionary is replaced for this account, but for its kind.
    #[schema(value_type = String, min_length = 1, max_length = 128, pattern = "^[a-z0-9._]+$")]
    name: ParamName,
    /// Kind of its values.
    kind: ParamKind,
    /// Significant bits of a whole number, or 0 if not declared.
    #[serde(default)]
    #[schema(maximum = 64)]
    bits: u8,
    /// Decimals, for the kind `decimal`: 0 to 18.
    #[serde(default)]
    #[schema(maximum = 18)]
    decimals: u8,
    /// Unit by UCUM (`km/h`, `Cel`, `mV`).
    #[serde(default)]
    #[schema(max_length = 32)]
    unit: String,
    /// Title for people.
    #[serde(default)]
    #[schema(max_length = 128)]
    title: String,
    /// What it means.
    #[serde(default)]
    #[schema(max_length = 1_024)]
    description: String,
}

impl ParameterInput {
    fn of(spec: ParamSpec) -> Self {
        let ParamSpec { name, kind, bits, decimals, unit, title, description } = spec;
        Self { name, kind, bits, decimals, unit, title, description }
    }

    fn checked(self) -> Result<ParamSpec, Problem> {
        let Self { name, kind, bits, decimals, unit, title, description } = self;
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._".contains(c);
        if !name.as_str().chars().all(fits) {
            return Err(Problem::member(
                "name",
                "has lower-case letters, digits, dots and _ only, where we declare it",
            ));
        }
        if RESERVED.contains(&name.as_str()) {
            return Err(Problem::member(
                "name",
                format!("`{name}` is a message's own member; choose another name"),
            ));
        }
        // What the console, the map and others rely on stays what it is; the rest may be replaced.
        let built_in = dictionary().iter().find(|spec| spec.name == name);
        if let Some(built_in) = built_in.filter(|spec| spec.kind != kind) {
            let kind = format!("{:?}", built_in.kind).to_lowercase();
            return Err(Problem::member(
                "kind",
                format!("`{name}` is of the dictionary, where its values are of the kind `{kind}`"),
            ));
        }
        if bits > 64 {
            return Err(Problem::member("bits", format!("is {bits}; it may be 0 to 64")));
        }
        if decimals > Decimal::SCALE_MAX {
            return Err(Problem::member(
                "decimals",
                format!("is {decimals}; it may be 0 to {}", Decimal::SCALE_MAX),
            ));
        }
        if decimals > 0 && kind != ParamKind::Decimal {
            return Err(Problem::member("decimals", "is for the kind `decimal` only"));
        }
        check_text("unit", &unit, 32)?;
        check_text("title", &title, 128)?;
        check_text("description", &description, 1_024)?;
        Ok(ParamSpec { name, kind, bits, decimals, unit, title, description })
    }
}

/// `GET /parameters`: the account's own, then the dictionary on the last page.
pub(crate) async fn list(ctx: Ctx) -> Answer {
    let account = ctx.account();
    let Listed { items, next } =
        scan::<ParameterObject>(&ctx, account, Vec::new(), false, |_| true).await?;
    let mut views: Vec<ParameterView> =
        items.into_iter().map(|own| ParameterView::own(own.object, own.revision)).collect();
    if next.is_none() {
        let schema = ctx.app.services.ingest.schema(account);
        // What the account has declared anew is not shown twice.
        let replaced =
            |spec: &ParamSpec| schema.get(spec.name.as_str()).is_some_and(|known| **known != *spec);
        let built_in = dictionary().iter().filter(|spec| !replaced(spec));
        views.extend(built_in.map(|spec| ParameterView {
            id: None,
            spec: (**spec).clone(),
            built_in: true,
            revision: None,
        }));
    }
    page(&ctx, &views, next.map(|id| id.to_string()))
}

/// `POST /parameters`
pub(crate) async fn create(ctx: Ctx) -> Answer {
    ctx.unrestricted("declaring a parameter")?;
    let spec = ctx.json::<ParameterInput>()?.checked()?;
    let (registry, account) = (ctx.app.registry(), ctx.account());
    let page = Page::first(PARAMETERS_MAX);
    if registry.list(account, Kind::Parameter, &page).await?.len() >= PARAMETERS_MAX {
        return Err(Problem::conflict(format!(
            "the account declares {PARAMETERS_MAX} parameters, the most it may; delete some"
        )));
    }
    let clock = &ctx.app.platform().clock;
    let object = ParameterObject { id: uuid_v7(clock.now(), clock.random()), spec };
    let made = registry.create_object(account, &object, &ctx.identity.actor).await?;
    ctx.object(made.revision, &ParameterView::own(made.object, made.revision))
}

/// `GET /parameters/{id}`
pub(crate) async fn read(ctx: Ctx) -> Answer {
    let found = ctx.load::<ParameterObject>(ctx.id(0, "parameter")?).await?;
    ctx.object(found.revision, &ParameterView::own(found.object, found.revision))
}

/// `PATCH /parameters/{id}`
pub(crate) async fn patch(ctx: Ctx) -> Answer {
    ctx.unrestricted("changing a parameter")?;
    let id = ctx.id(0, "parameter")?;
    let body: Json = ctx.json()?;
    let changed = change::<ParameterObject>(&ctx, ctx.account(), id, |object, revision| {
        let view = ParameterView::own(object.clone(), revision);
        let edit = ParameterInput::of(object.spec);
        let spec = merged(&edit, &view, body.clone())?.checked()?;
        Ok(ParameterObject { id: object.id, spec })
    })
    .await?;
    ctx.object(changed.revision, &ParameterView::own(changed.object, changed.revision))
}

/// `DELETE /parameters/{id}`
pub(crate) async fn delete(ctx: Ctx) -> Answer {
    ctx.unrestricted("deleting a parameter")?;
    let id = ctx.id(0, "parameter")?;
    remove::<ParameterObject>(&ctx, ctx.account(), id).await
}
