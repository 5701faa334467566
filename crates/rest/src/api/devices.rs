//! Devices.

use std::collections::BTreeMap;

use fieldline_auth::Identity;
use fieldline_contracts::registry::Versioned;
use fieldline_contracts::{Presence, RegistryExt as _};
use fieldline_model::object::Labels;
use fieldline_model::{Device, DeviceId, Scope, Timestamp};
use fieldline_pvm::{DeclKind, SettingDecl};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use utoipa::ToSchema;

use super::accounts::yes;
use crate::call::Ctx;
use crate::objects::{
    LIMIT_DEFAULT, LIMIT_MAX, LabelFilter, Listed, change, check_labels, check_name, check_text,
    joins, page, remove, scan, unseen,
};
use crate::patch::merged;
use crate::problem::Problem;
use crate::route::Answer;

/// Characters of an ident.
const IDENT_CHARS_MAX: usize = 64;
/// Most settings of a device.
const SETTINGS_MAX: usize = 64;
/// Most bytes of a device's settings, as JSON.
const SETTINGS_BYTES_MAX: usize = 16 << 10;

/// The setting that any device may have: the password of its login.
const PASSWORD: &str = "password";

/// A device and whether it is there.
#[derive(Serialize, ToSchema)]
pub(crate) struct DeviceView {
    #[serde(flatten)]
    device: Device,
    /// Counts up with every change; the `ETag`.
    revision: u64,
    /// Whether it is connected; null while that is not known.
    online: Option<bool>,
    /// The node that holds its connection; null while it is not connected, or that is not known.
    node: Option<String>,
    /// When its last message was received.
    seen_at: Option<Timestamp>,
}

impl DeviceView {
    /// `presence` is `None` where it cannot be told.
    fn of(device: Versioned<Device>, presence: Option<&Presence>) -> Self {
        let Versioned { object, revision } = device;
        let node = presence.and_then(Presence::session).and_then(|session| session.node);
        let online = presence.map(|presence| presence.connection.is_some());
        let seen_at = presence.and_then(|presence| presence.seen_at);
        Self { device: object, revision, online, node, seen_at }
    }

    /// What `identity` may see of it: passwords are for those who may set them.
    fn seen_by(mut self, identity: &Identity) -> Self {
        if !identity.may(Scope::Write) {
            self.device.settings.remove(PASSWORD);
        }
        self
    }
}

/// A device to be made, and the members of one that can be changed.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DeviceInput {
    /// Name for people; the ident where absent.
    #[serde(default)]
    #[schema(max_length = 128)]
    name: String,
    /// What it calls itself on the wire (IMEI, serial number); unique in the account.
    #[schema(min_length = 1, max_length = 64, pattern = "^[^#+/]+$")]
    ident: String,
    /// The protocol it speaks; empty for any.
    #[serde(default)]
    protocol: String,
    /// Kind or model, free text.
    #[serde(default, rename = "type")]
    #[schema(max_length = 64)]
    kind: String,
    /// Whether it is let in.
    #[serde(default = "yes")]
    enabled: bool,
    /// Settings that its protocol declares, by name.
    #[serde(default)]
    #[schema(value_type = Object)]
    settings: BTreeMap<String, Json>,
    /// Labels.
    #[serde(default)]
    labels: Labels,
}

impl DeviceInput {
    fn of(device: &Device) -> Self {
        let Device { name, ident, protocol, kind, enabled, settings, labels, .. } = device.clone();
        Self { name, ident, protocol, kind, enabled, settings, labels }
    }

    fn onto(self, device: Device, protocols: &[String]) -> Result<Device, Problem> {
        let Self { name, ident, protocol, kind, enabled, settings, labels } = self;
        // One that a device gave itself may be another than we would take; it is left alone.
        if ident.is_empty() || ident != device.ident {
            check_ident(&ident)?;
        }
        let name = if name.trim().is_empty() { ident.clone() } else { name };
        if name != device.name && name != ident {
            check_text("name", &name, 128)?;
        }
        check_text("type", &kind, 64)?;
        check_labels(&labels)?;
        // One that was set before may have been deleted since: then it is left alone.
        if !protocol.is_empty() && protocol != device.protocol {
            check_protocol(&protocol, protocols)?;
        }
        if settings.len() > SETTINGS_MAX {
            return Err(Problem::member(
                "settings",
                format!("has {}; at most {SETTINGS_MAX} are kept", settings.len()),
            ));
        }
        for key in settings.keys() {
            check_name("settings", key, 64)?;
        }
        let bytes = serde_json::to_string(&settings).map_err(Problem::fault)?.len();
        if bytes > SETTINGS_BYTES_MAX {
            return Err(Problem::member(
                "settings",
                format!("takes {bytes} bytes; at most {SETTINGS_BYTES_MAX} are kept"),
            ));
        }
        Ok(Device { name, ident, protocol, kind, enabled, settings, labels, ..device })
    }
}

/// The settings that a protocol declares; `None` where that is not known.
async fn declared(ctx: &Ctx, protocol: &str) -> Result<Option<Vec<SettingDecl>>, Problem> {
    if protocol.is_empty() {
        return Ok(None);
    }
    let found = ctx.app.programs.find(&ctx.app, ctx.account(), protocol).await?;
    let program = found.and_then(|found| found.program.ok());
    Ok(program.map(|program| program.settings().to_vec()))
}

/// Checks those settings that are not as in `kept`: a mistyped one would have no effect, silently.
fn check_settings(
    device: &Device,
    kept: &BTreeMap<String, Json>,
    declared: &Option<Vec<SettingDecl>>,
) -> Result<(), Problem> {
    for (name, value) in
        device.settings.iter().filter(|(name, value)| kept.get(*name) != Some(value))
    {
        let wrong = |text: String| Err(Problem::member(&format!("settings.{name}"), text));
        if name == PASSWORD {
            if !value.is_string() {
                return wrong("is not a text".to_owned());
            }
            continue;
        }
        // Without a protocol, any channel's may be meant.
        let Some(declared) = declared else { continue };
        let Some(setting) = declared.iter().find(|setting| setting.name == *name) else {
            let known: Vec<&str> = declared.iter().map(|setting| setting.name.as_str()).collect();
            let known = [known.as_slice(), &[PASSWORD]].concat().join("`, `");
            return wrong(format!(
                "the protocol {} has no such setting; there are: `{known}`",
                device.protocol
            ));
        };
        let (fits, kind) = match setting.kind {
            DeclKind::Bool => (value.is_boolean(), "`true` or `false`"),
            DeclKind::Int => (value.is_i64(), "a whole number"),
            DeclKind::Text => (value.is_string(), "a text"),
        };
        if !fits {
            return wrong(format!("is not {kind}"));
        }
    }
    Ok(())
}

fn check_ident(ident: &str) -> Result<(), Problem> {
    let chars = ident.chars().count();
    if !(1..=IDENT_CHARS_MAX).contains(&chars) {
        return Err(Problem::member(
            "ident",
            format!("has {chars} characters; it needs 1 to {IDENT_CHARS_MAX}"),
        ));
    }
    // The ident can stand in an MQTT topic.
    let wrong = |c: &char| c.is_control() || unseen(*c) || joins(*c) || "#+/".contains(*c);
    if let Some(wrong) = ident.chars().find(wrong) {
        return Err(Problem::member(
            "ident",
            format!(
                "holds {wrong:?}; control characters, invisible ones and # + / are not possible"
            ),
        ));
    }
    if ident.trim() != ident {
        return Err(Problem::member("ident", "begins or ends with a space"));
    }
    Ok(())
}

/// Checks that there is such a protocol.
pub(crate) fn check_protocol(name: &str, known: &[String]) -> Result<(), Problem> {
    if known.iter().any(|known| known == name) {
        return Ok(());
    }
    let name: String = name.chars().take(64).collect();
    let known = known.join(", ");
    Err(Problem::member("protocol", format!("there is no protocol `{name}`; there are: {known}")))
}

/// A page of devices by the filters of the query, of those that the caller may see.
pub(crate) async fn filtered(ctx: &Ctx) -> Result<Listed<Device>, Problem> {
    let limit = ctx.query.limit(LIMIT_DEFAULT, LIMIT_MAX)?;
    let after = ctx.query.after_id()?;
    let labels = LabelFilter::of(ctx);
    let wanted = ctx.query.get("q").map(str::to_lowercase);
    let ident = ctx.query.get("ident").map(str::to_owned);
    let keep = |device: &Device| {
        labels.holds(&device.labels)
            && wanted.as_ref().is_none_or(|q| {
                device.name.to_lowercase().contains(q) || device.ident.to_lowercase().contains(q)
            })
            && ident.as_ref().is_none_or(|ident| *ident == device.ident)
    };
    if ctx.identity.sees_all() {
        if let Some(ident) = &ident {
            let found = ctx.app.registry();
            let found = found.find_object::<Device>(ctx.account(), "ident", ident).await?;
            let items = found.into_iter().filter(|found| keep(&found.object)).collect();
            return Ok(Listed { items, next: None });
        }
        let narrow = !labels.is_empty() || wanted.is_some();
        return scan::<Device>(ctx, ctx.account(), Vec::new(), narrow, keep).await;
    }
    // A restricted caller names its devices itself.
    let mut ids = ctx.identity.devices.clone();
    ids.sort_unstable();
    ids.dedup();
    let mut items = Vec::new();
    for id in ids.into_iter().filter(|id| after.is_none_or(|after| id.0 > after)) {
        let found = ctx.app.registry().get_object::<Device>(ctx.account(), id.0).await?;
        if let Some(found) = found.filter(|found| keep(&found.object)) {
            items.push(found);
            if items.len() == limit {
                return Ok(Listed { items, next: Some(id.0) });
            }
        }
    }
    Ok(Listed { items, next: None })
}

/// `GET /devices`
pub(crate) async fn list(ctx: Ctx) -> Answer {
    let online = ctx.query.flag("online")?;
    let Listed { items, next } = filtered(&ctx).await?;
    let ids: Vec<DeviceId> = items.iter().map(|found| found.object.id).collect();
    let presence = ctx.app.platform().state.presence_many(ctx.account(), &ids).await;
    // Devices can be managed while it is not known who is connected, but not told apart by it.
    let presence = match (presence, online) {
        (Err(error), Some(_)) => return Err(error.into()),
        (presence, _) => presence.ok(),
    };
    let presence = |at: usize| Some(&presence.as_ref()?.get(at)?.1);
    let items: Vec<DeviceView> = items
        .into_iter()
        .enumerate()
        .map(|(at, device)| DeviceView::of(device, presence(at)).seen_by(&ctx.identity))
        .filter(|view| online.is_none() || view.online == online)
        .collect();
    page(&ctx, &items, next.map(|id| id.to_string()))
}

/// `POST /devices`
pub(crate) async fn create(ctx: Ctx) -> Answer {
    ctx.unrestricted("making a device")?;
    let input: DeviceInput = ctx.json()?;
    let protocols = ctx.app.programs.names(&ctx.app, ctx.account()).await?;
    let clock = &ctx.app.platform().clock;
    let now = clock.now();
    let blank = Device {
        id: DeviceId::new(now, clock.random()),
        account: ctx.account(),
        name: String::new(),
        ident: String::new(),
        protocol: String::new(),
        kind: String::new(),
        enabled: true,
        settings: BTreeMap::new(),
        labels: Labels::new(),
        created_at: now,
    };
    let device = input.onto(blank, &protocols)?;
    check_settings(&device, &BTreeMap::new(), &declared(&ctx, &device.protocol).await?)?;
    let registry = ctx.app.registry();
    let made = registry.create_object(ctx.account(), &device, &ctx.identity.actor).await?;
    ctx.object(made.revision, &DeviceView::of(made, Some(&Presence::default())))
}

/// `GET /devices/{id}`
pub(crate) async fn read(ctx: Ctx) -> Answer {
    let id = ctx.device_id(0)?;
    let device = ctx.load::<Device>(id.0).await?;
    let presence = ctx.app.platform().state.presence(ctx.account(), id).await.ok();
    // What is not in the revision may have changed: no 304 for it.
    let etag = format!("\"{}\"", device.revision);
    let view = DeviceView::of(device, presence.as_ref()).seen_by(&ctx.identity);
    Ok(crate::call::with_etag(crate::call::json(hyper::StatusCode::OK, &view)?, &etag))
}

/// `PATCH /devices/{id}`
pub(crate) async fn patch(ctx: Ctx) -> Answer {
    let id = ctx.device_id(0)?;
    let body: Json = ctx.json()?;
    let protocols = ctx.app.programs.names(&ctx.app, ctx.account()).await?;
    let presence = ctx.app.platform().state.presence(ctx.account(), id).await.ok();
    let chosen = body.get("protocol").and_then(Json::as_str).unwrap_or_default();
    let chosen = declared(&ctx, chosen).await?;
    let present = ctx.load::<Device>(id.0).await?.object.protocol;
    let present = declared(&ctx, &present).await?;
    let changed = change::<Device>(&ctx, ctx.account(), id.0, |device, revision| {
        let seen = Versioned { object: device.clone(), revision };
        let view = DeviceView::of(seen, presence.as_ref());
        let before = device.clone();
        let after =
            merged(&DeviceInput::of(&device), &view, body.clone())?.onto(device, &protocols)?;
        // Those of a protocol that is chosen now are all looked at, otherwise those that change.
        let kept =
            if after.protocol == before.protocol { before.settings } else { BTreeMap::new() };
        let declared = if after.protocol == before.protocol { &present } else { &chosen };
        check_settings(&after, &kept, declared)?;
        Ok(after)
    })
    .await?;
    ctx.object(changed.revision, &DeviceView::of(changed, presence.as_ref()))
}

/// `DELETE /devices/{id}`
pub(crate) async fn delete(ctx: Ctx) -> Answer {
    let id = ctx.device_id(0)?;
    ctx.unrestricted("deleting a device")?;
    let answer = remove::<Device>(&ctx, ctx.account(), id.0).await?;
    ctx.forget(ctx.account(), id).await;
    Ok(answer)
}

/// That there is such a device in the account, and the caller may see it.
pub(crate) async fn present(ctx: &Ctx, id: DeviceId) -> Result<std::sync::Arc<Device>, Problem> {
    let found = ctx.app.services.ingest.device(ctx.account(), id).await?;
    found.ok_or_else(|| crate::problem::missing("device", &id.to_string()))
}
