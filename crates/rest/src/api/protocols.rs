//! Protocols: those that are built in, and those that an account uploaded.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use fieldline_contracts::registry::Versioned;
use fieldline_contracts::{Page, RegistryExt as _};
use fieldline_model::value::{from_hex, to_hex};
use fieldline_model::{AccountId, Channel, Protocol, ProtocolId, Timestamp, Transport};
use fieldline_pvm::{Diagnostics, Options, Program, Session, Step};
use hyper::StatusCode;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};
use utoipa::ToSchema;

use crate::app::{App, ByName};
use crate::call::{Ctx, empty, json as answer, with_etag};
use crate::objects::{LIMIT_MAX, page};
use crate::problem::{Problem, missing};
use crate::route::Answer;

/// Longest source.
const SOURCE_BYTES_MAX: usize = 512 << 10;
/// Most protocols of an account.
const PROTOCOLS_MAX: usize = 200;
/// Most compiled programs of accounts that are kept.
const KEPT_MAX: usize = 1_000;
/// Most bytes that the playground takes.
const DECODE_BYTES_MAX: usize = 256 << 10;
/// Most frames that the playground shows.
const DECODE_FRAMES_MAX: usize = 1_000;
/// Longest run of the playground.
const DECODE_TIME_MAX: Duration = Duration::from_secs(3);

/// A protocol.
#[derive(Serialize, ToSchema)]
pub(crate) struct ProtocolView {
    name: String,
    description: String,
    /// Whether it comes with Fieldline.
    built_in: bool,
    /// Counts up with every upload; absent for one that is built in.
    version: Option<u32>,
    /// The `ETag`; absent for one that is built in.
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<u64>,
    /// What can carry it.
    transports: Vec<Transport>,
    /// Settings of a device that it reads.
    #[schema(value_type = Vec<Object>)]
    settings: Json,
    /// Commands that it can send.
    #[schema(value_type = Vec<Object>)]
    commands: Json,
    /// Why this version of Fieldline cannot run it.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// The source text; not in lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
}

/// A source text.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SourceInput {
    /// The protocol, in its language.
    source: String,
}

/// Bytes to be decoded.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DecodeInput {
    /// The bytes as hex digits; white space is passed over.
    hex: String,
    /// A source to use in place of the stored one.
    #[serde(default)]
    source: Option<String>,
    /// What carries the bytes; the protocol's first where absent.
    #[serde(default)]
    transport: Option<Transport>,
    /// Whether the device is known already, so that the bytes need not begin with a login.
    #[serde(default)]
    identified: bool,
    /// Settings of the device.
    #[serde(default)]
    #[schema(value_type = Object)]
    settings: BTreeMap<String, Json>,
    /// Whether failed checks are noted instead of ending the frame.
    #[serde(default)]
    lenient: bool,
}

/// What bytes say.
#[derive(Serialize, ToSchema)]
pub(crate) struct DecodedView {
    #[schema(value_type = Vec<Object>)]
    frames: Vec<Json>,
    /// Bytes that belong to no whole frame.
    remaining: String,
    /// Why it ended before the bytes did.
    #[serde(skip_serializing_if = "Option::is_none")]
    stopped: Option<&'static str>,
}

/// A protocol that was looked up.
#[derive(Clone)]
pub(crate) struct Found {
    pub(crate) name: String,
    pub(crate) source: Arc<str>,
    pub(crate) own: Option<(ProtocolId, u32, u64)>,
    pub(crate) program: Result<Arc<Program>, Arc<Diagnostics>>,
}

/// Compiled programs.
pub(crate) struct Programs {
    built_in: OnceLock<Vec<Found>>,
    own: Mutex<ByName<(u64, Found)>>,
}

impl Programs {
    pub(crate) fn new() -> Self {
        Self { built_in: OnceLock::new(), own: Mutex::default() }
    }

    async fn built_in(&self) -> Result<&[Found], Problem> {
        if let Some(found) = self.built_in.get() {
            return Ok(found);
        }
        let compile = || {
            let each = fieldline_pvm::library::built_in().iter().map(|(name, source)| Found {
                name: (*name).to_owned(),
                source: (*source).into(),
                own: None,
                program: compile(name, source),
            });
            each.collect::<Vec<_>>()
        };
        let compiled = tokio::task::spawn_blocking(compile).await.map_err(Problem::fault)?;
        Ok(self.built_in.get_or_init(|| compiled))
    }

    /// The uploaded protocol as a compiled one; from memory where it was compiled before.
    async fn compiled(&self, found: Versioned<Protocol>) -> Result<Found, Problem> {
        let Versioned { object, revision } = found;
        let key = object.id.to_string();
        if let Some((at, found)) = self.own.lock().get(&key)
            && *at == revision
        {
            return Ok(found.clone());
        }
        let compile = move || Found {
            program: compile(&object.name, &object.source),
            name: object.name,
            source: object.source.into(),
            own: Some((object.id, object.version, revision)),
        };
        let found = tokio::task::spawn_blocking(compile).await.map_err(Problem::fault)?;
        let mut own = self.own.lock();
        if own.len() >= KEPT_MAX {
            own.clear();
        }
        own.insert(key, (revision, found.clone()));
        Ok(found)
    }

    /// The account's protocol of this name; its own comes before one that is built in.
    pub(crate) async fn find(
        &self,
        app: &App,
        account: AccountId,
        name: &str,
    ) -> Result<Option<Found>, Problem> {
        let own = app.registry().find_object::<Protocol>(account, "name", name).await?;
        if let Some(own) = own {
            return self.compiled(own).await.map(Some);
        }
        Ok(self.built_in().await?.iter().find(|found| found.name == name).cloned())
    }

    /// All protocols of an account by name.
    async fn all(&self, app: &App, account: AccountId) -> Result<Vec<Found>, Problem> {
        let page = Page::first(PROTOCOLS_MAX);
        let mut all: BTreeMap<String, Found> = BTreeMap::new();
        for found in self.built_in().await? {
            all.insert(found.name.clone(), found.clone());
        }
        for own in app.registry().list_objects::<Protocol>(account, &page).await? {
            let found = self.compiled(own).await?;
            all.insert(found.name.clone(), found);
        }
        Ok(all.into_values().collect())
    }

    /// The names of all protocols of an account.
    pub(crate) async fn names(
        &self,
        app: &App,
        account: AccountId,
    ) -> Result<Vec<String>, Problem> {
        let page = Page::first(PROTOCOLS_MAX);
        let own = app.registry().list_objects::<Protocol>(account, &page).await?;
        let built_in =
            fieldline_pvm::library::built_in().iter().map(|(name, _)| (*name).to_owned());
        let mut names: Vec<String> =
            built_in.chain(own.into_iter().map(|own| own.object.name)).collect();
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }
}

fn compile(name: &str, source: &str) -> Result<Arc<Program>, Arc<Diagnostics>> {
    fieldline_pvm::compile(name, source).map(Arc::new).map_err(Arc::new)
}

fn view(found: &Found, with_source: bool) -> Result<ProtocolView, Problem> {
    let (version, revision) = match found.own {
        Some((_, version, revision)) => (Some(version), Some(revision)),
        None => (None, None),
    };
    let mut view = ProtocolView {
        name: found.name.clone(),
        description: String::new(),
        built_in: found.own.is_none(),
        version,
        revision,
        transports: Vec::new(),
        settings: json!([]),
        commands: json!([]),
        error: None,
        source: with_source.then(|| found.source.to_string()),
    };
    match &found.program {
        Ok(program) => {
            program.description().clone_into(&mut view.description);
            view.transports = program.transports().to_vec();
            view.settings = serde_json::to_value(program.settings()).map_err(Problem::fault)?;
            view.commands = serde_json::to_value(program.commands()).map_err(Problem::fault)?;
        }
        Err(diagnostics) => view.error = Some(first(diagnostics)),
    }
    Ok(view)
}

fn first(diagnostics: &Diagnostics) -> String {
    match diagnostics.items().first() {
        Some(one) => format!("line {}, column {}: {}", one.line, one.column, one.message),
        None => "it does not compile".to_owned(),
    }
}

fn does_not_compile(diagnostics: &Diagnostics) -> Problem {
    let count = diagnostics.items().len();
    let more = if count > 1 { format!(" ({} more)", count - 1) } else { String::new() };
    let errors = diagnostics.items().iter().take(100);
    let errors = errors.filter_map(|item| serde_json::to_value(item).ok()).collect();
    Problem::does_not_compile(format!("{}{more}", first(diagnostics))).with_errors(errors)
}

fn check_source(source: &str) -> Result<(), Problem> {
    if source.len() > SOURCE_BYTES_MAX {
        return Err(Problem::member(
            "source",
            format!("has {} bytes; at most {SOURCE_BYTES_MAX} are possible", source.len()),
        ));
    }
    Ok(())
}

/// `GET /protocols`
pub(crate) async fn list(ctx: Ctx) -> Answer {
    // All at once: there are few.
    ctx.query.limit(LIMIT_MAX, LIMIT_MAX)?;
    ctx.query.one_page()?;
    let all = ctx.app.programs.all(&ctx.app, ctx.account()).await?;
    let views: Result<Vec<ProtocolView>, Problem> =
        all.iter().map(|one| view(one, false)).collect();
    page(&ctx, &views?, None)
}

/// The protocol of this path.
async fn named(ctx: &Ctx) -> Result<Found, Problem> {
    let name = ctx.segment(0);
    let found = ctx.app.programs.find(&ctx.app, ctx.account(), name).await?;
    found.ok_or_else(|| missing("protocol", name))
}

/// `GET /protocols/{name}`
pub(crate) async fn read(ctx: Ctx) -> Answer {
    let found = named(&ctx).await?;
    let view = view(&found, true)?;
    match view.revision {
        Some(revision) => ctx.object(revision, &view),
        None => answer(StatusCode::OK, &view),
    }
}

/// `PUT /protocols/{name}`
pub(crate) async fn put(ctx: Ctx) -> Answer {
    ctx.unrestricted("uploading a protocol")?;
    let SourceInput { source } = ctx.json()?;
    let name = ctx.segment(0).to_owned();
    let fits = (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    if !fits {
        return Err(Problem::invalid(
            "a protocol's name has 1 to 64 lower-case letters, digits and _",
        ));
    }
    check_source(&source)?;
    let (called, text) = (name.clone(), source.clone());
    let compiled = tokio::task::spawn_blocking(move || compile(&called, &text));
    let program = compiled.await.map_err(Problem::fault)?.map_err(|all| does_not_compile(&all))?;
    if program.name() != name {
        let own: String = program.name().chars().take(64).collect();
        return Err(Problem::member(
            "source",
            format!(
                "calls itself `{own}`; upload it under that name, or change its first line to `{name}`"
            ),
        ));
    }
    let (registry, account, by) = (ctx.app.registry(), ctx.account(), &ctx.identity.actor);
    let clock = &ctx.app.platform().clock;
    let now = clock.now();
    let before = registry.find_object::<Protocol>(account, "name", &name).await?;
    let (status, written) = match before {
        Some(before) => {
            if let Some(expected) = ctx.if_match()?
                && expected != before.revision
            {
                let found = before.revision;
                return Err(fieldline_contracts::RegistryError::Changed { expected, found }.into());
            }
            let version = before.object.version.saturating_add(1);
            let next = Protocol { source, version, updated_at: now, ..before.object };
            let written = registry.update_object(account, &next, Some(before.revision), by).await?;
            (StatusCode::OK, written)
        }
        None => {
            let page = Page::first(PROTOCOLS_MAX);
            if registry.list_objects::<Protocol>(account, &page).await?.len() >= PROTOCOLS_MAX {
                return Err(Problem::conflict(format!(
                    "the account has {PROTOCOLS_MAX} protocols, the most it may; delete some"
                )));
            }
            let first = Protocol {
                id: ProtocolId::new(now, clock.random()),
                account,
                name,
                source,
                version: 1,
                created_at: now,
                updated_at: now,
            };
            (StatusCode::CREATED, registry.create_object(account, &first, by).await?)
        }
    };
    let etag = format!("\"{}\"", written.revision);
    let found = ctx.app.programs.compiled(written).await?;
    Ok(with_etag(answer(status, &view(&found, true)?)?, &etag))
}

/// `DELETE /protocols/{name}`
pub(crate) async fn delete(ctx: Ctx) -> Answer {
    ctx.unrestricted("deleting a protocol")?;
    let found = named(&ctx).await?;
    let Some((id, _, revision)) = found.own else {
        return Err(Problem::conflict(format!(
            "`{}` is built in; upload another under its name to replace it",
            found.name
        )));
    };
    let (registry, account) = (ctx.app.registry(), ctx.account());
    let built_in = fieldline_pvm::library::built_in().iter().any(|(name, _)| *name == found.name);
    if !built_in {
        let page = Page {
            equals: vec![("protocol".to_owned(), Json::from(found.name.as_str()))],
            ..Page::first(5)
        };
        let users = registry.list_objects::<Channel>(account, &page).await?;
        if !users.is_empty() {
            let names: Vec<String> = users.into_iter().map(|user| user.object.name).collect();
            return Err(Problem::conflict(format!(
                "channels use it: {}; delete or change them first",
                names.join(", ")
            )));
        }
    }
    let expected = ctx.if_match()?.unwrap_or(revision);
    let kind = fieldline_contracts::Kind::Protocol;
    registry.delete(account, kind, id.0, Some(expected), &ctx.identity.actor).await?;
    Ok(empty(StatusCode::NO_CONTENT))
}

/// `POST /protocols/{name}/check`
pub(crate) async fn check(ctx: Ctx) -> Answer {
    let SourceInput { source } = ctx.json()?;
    check_source(&source)?;
    let name = ctx.segment(0).to_owned();
    let compiled = tokio::task::spawn_blocking(move || Found {
        program: compile(&name, &source),
        name,
        source: source.into(),
        own: None,
    });
    let mut found = compiled.await.map_err(Problem::fault)?;
    match &found.program {
        Ok(program) => program.name().clone_into(&mut found.name),
        Err(diagnostics) => return Err(does_not_compile(diagnostics)),
    }
    let checked = ProtocolView { built_in: false, ..view(&found, false)? };
    answer(StatusCode::OK, &checked)
}

/// `POST /protocols/{name}/decode`
pub(crate) async fn decode(ctx: Ctx) -> Answer {
    let input: DecodeInput = ctx.json()?;
    let Some(bytes) = from_hex(&input.hex) else {
        return Err(Problem::member(
            "hex",
            "holds something else than pairs of hex digits and white space",
        ));
    };
    if bytes.len() > DECODE_BYTES_MAX {
        return Err(Problem::member(
            "hex",
            format!("has {} bytes; at most {DECODE_BYTES_MAX} are possible", bytes.len()),
        ));
    }
    let program = match &input.source {
        Some(source) => {
            check_source(source)?;
            let (name, source) = (ctx.segment(0).to_owned(), source.clone());
            let compiled = tokio::task::spawn_blocking(move || compile(&name, &source));
            compiled.await.map_err(Problem::fault)?
        }
        None => named(&ctx).await?.program,
    };
    let program = program.map_err(|diagnostics| does_not_compile(&diagnostics))?;
    // Each run may take a core for a while: a few at once, the others wait.
    let turn = ctx.app.decodes.acquire().await.map_err(Problem::fault)?;
    let now = ctx.app.platform().clock.now();
    let run = tokio::task::spawn_blocking(move || playground(program, &input, &bytes, now));
    let decoded = run.await.map_err(Problem::fault)?;
    drop(turn);
    answer(StatusCode::OK, &decoded)
}

/// Runs `bytes` through `program`, with the fields of every frame.
fn playground(
    program: Arc<Program>,
    input: &DecodeInput,
    bytes: &[u8],
    now: Timestamp,
) -> DecodedView {
    let began = Instant::now();
    let fallback = program.transports().first().copied().unwrap_or(Transport::Tcp);
    let transport = input.transport.unwrap_or(fallback);
    let mut options = Options::new(transport);
    options.lenient = input.lenient;
    options.trace = true;
    options.limits.steps_max = options.limits.steps_max.min(2_000_000);
    let mut session = Session::new(program, options);
    if input.identified {
        session.identify("playground", &input.settings);
    }
    session.feed(bytes);
    if transport == Transport::Udp {
        session.end_of_input();
    }
    let (mut frames, mut stopped) = (Vec::new(), None);
    loop {
        if began.elapsed() > DECODE_TIME_MAX || frames.len() >= DECODE_FRAMES_MAX {
            stopped = Some("the playground shows what fits three seconds and 1,000 frames");
            break;
        }
        match session.step(now) {
            Step::NeedMore => break,
            Step::Login { .. } => session.login_accepted(&input.settings),
            Step::Frame(frame) => {
                let end = bytes.len().saturating_sub(session.buffered());
                let start = end.saturating_sub(frame.bytes.len());
                let closes = frame.close.is_some();
                let idle = frame.bytes.is_empty() && frame.error.is_none();
                frames.push(frame_json(&frame, start, end));
                if closes || (idle && session.buffered() == 0) {
                    break;
                }
            }
        }
    }
    let left = bytes.len().saturating_sub(session.buffered());
    let remaining = to_hex(bytes.get(left..).unwrap_or(&[]));
    DecodedView { frames, remaining, stopped }
}

fn frame_json(frame: &fieldline_pvm::Frame, start: usize, end: usize) -> Json {
    let messages: Vec<Json> = frame
        .messages
        .iter()
        .map(|message| {
            let mut members = serde_json::Map::new();
            if let Some(timestamp) = message.timestamp {
                members.insert("timestamp".to_owned(), Json::from(timestamp.to_string()));
            }
            let params =
                message.params.iter().map(|(name, value)| (name.to_string(), value.to_json()));
            members.extend(params);
            Json::Object(members)
        })
        .collect();
    let error = frame.error.as_ref().map(|error| {
        json!({
            "class": &*error.class,
            "message": error.message,
            "offset": error.offset,
            "rule": &*error.rule,
            "line": error.line,
        })
    });
    let fields: Vec<Json> = frame
        .fields
        .iter()
        .map(|field| {
            let value = field.value.as_ref().map_or(Json::Null, fieldline_model::Value::to_json);
            json!({
                "name": field.name,
                "start": field.start,
                "end": field.end,
                "value": value,
                "note": field.note,
                "message": field.message,
            })
        })
        .collect();
    let replies: Vec<String> = frame.replies.iter().map(|reply| to_hex(&reply.bytes)).collect();
    json!({
        "hex": to_hex(&frame.bytes),
        "start": start,
        "end": end,
        "ident": frame.ident.as_deref(),
        "messages": messages,
        "replies": replies,
        "command_answer": frame.command_answer.as_ref().map(|answer| &answer.text),
        "error": error,
        "close": frame.close.map(fieldline_model::CloseCode::name),
        "fields": fields,
    })
}
