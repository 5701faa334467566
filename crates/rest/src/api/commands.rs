//! Commands to devices.

use fieldline_contracts::NewCommand;
use fieldline_model::{Command, CommandId, Params, Value};
use fieldline_pvm::{CommandDecl, DeclKind};
use hyper::StatusCode;
use serde::Deserialize;
use utoipa::ToSchema;

use super::devices::present;
use crate::call::{Ctx, json};
use crate::objects::{LIMIT_DEFAULT, LIMIT_MAX, page};
use crate::problem::{Problem, missing};
use crate::route::Answer;

/// Longest wait for an answer.
const WAIT_MS_MAX: u64 = 60_000;

/// A command to be sent.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CommandInput {
    /// Its name in the device's protocol, such as `text`.
    #[schema(min_length = 1, max_length = 64)]
    name: String,
    /// Its arguments by name.
    #[serde(default)]
    params: Params,
    /// How long it is worth sending, in seconds.
    #[serde(default = "an_hour")]
    #[schema(minimum = 1, maximum = 2_592_000)]
    ttl_s: u32,
}

const fn an_hour() -> u32 {
    3_600
}

/// `GET /devices/{id}/commands`, newest first
pub(crate) async fn list(ctx: Ctx) -> Answer {
    let id = ctx.device_id(0)?;
    present(&ctx, id).await?;
    let limit = ctx.query.limit(LIMIT_DEFAULT, LIMIT_MAX)?;
    let commands = ctx.app.platform().commands.list(ctx.account(), id, limit).await?;
    page(&ctx, &commands, None)
}

/// `POST /devices/{id}/commands`
pub(crate) async fn create(ctx: Ctx) -> Answer {
    let id = ctx.device_id(0)?;
    let CommandInput { name, params, ttl_s } = ctx.json()?;
    let wait_ms = ctx.query.number("wait_ms", 0, 0..=WAIT_MS_MAX)?;
    let device = present(&ctx, id).await?;
    if !device.enabled {
        return Err(Problem::conflict(format!(
            "the device `{}` is disabled; enable it first",
            device.name
        )));
    }
    // Where the protocol is known, what it does not have is refused now, not when the device connects.
    if !device.protocol.is_empty() {
        let found = ctx.app.programs.find(&ctx.app, ctx.account(), &device.protocol).await?;
        if let Some(program) = found.and_then(|found| found.program.ok()) {
            check(&device.protocol, program.commands(), &name, &params)?;
        }
    }
    let commands = &ctx.app.platform().commands;
    let new = NewCommand { name, params, ttl_s };
    let mut command = commands.submit(ctx.account(), id, new, &ctx.identity.actor).await?;
    if wait_ms > 0 {
        command = commands.wait(ctx.account(), command.id, wait_ms).await?;
    }
    json(StatusCode::CREATED, &command)
}

/// Checks a command by what its protocol declares.
fn check(
    protocol: &str,
    commands: &[CommandDecl],
    name: &str,
    params: &Params,
) -> Result<(), Problem> {
    let listed = |names: Vec<&str>| match names.as_slice() {
        [] => "none".to_owned(),
        names => names.join(", "),
    };
    let Some(command) = commands.iter().find(|command| command.name == name) else {
        let known = listed(commands.iter().map(|command| command.name.as_str()).collect());
        let name: String = name.chars().take(64).collect();
        return Err(Problem::member(
            "name",
            format!("the protocol {protocol} has no command `{name}`; it has: {known}"),
        ));
    };
    for param in &command.params {
        let wrong = |text: &str| Err(Problem::member(&format!("params.{}", param.name), text));
        let Some(value) = params.get(&param.name) else {
            return wrong("is missing");
        };
        let (fits, kind) = match param.kind {
            DeclKind::Bool => (matches!(value, Value::Bool(_)), "is neither `true` nor `false`"),
            DeclKind::Int => (value.as_i64().is_some(), "is no whole number"),
            DeclKind::Text => (value.as_str().is_some(), "is no text"),
        };
        if !fits {
            return wrong(kind);
        }
    }
    let declared = |name: &str| command.params.iter().any(|param| param.name == name);
    if let Some((unknown, _)) = params.iter().find(|(name, _)| !declared(name.as_str())) {
        let known = listed(command.params.iter().map(|param| param.name.as_str()).collect());
        return Err(Problem::member(
            &format!("params.{unknown}"),
            format!("the command `{name}` has no such parameter; it has: {known}"),
        ));
    }
    Ok(())
}

/// The command of this path, if the caller may see its device.
async fn seen(ctx: &Ctx) -> Result<Command, Problem> {
    let id = CommandId(ctx.id(0, "command")?);
    let command = ctx.app.platform().commands.get(ctx.account(), id).await?;
    if ctx.identity.may_see(command.device) {
        return Ok(command);
    }
    Err(missing("command", ctx.segment(0)))
}

/// `GET /commands/{id}`
pub(crate) async fn read(ctx: Ctx) -> Answer {
    let wait_ms = ctx.query.number("wait_ms", 0, 0..=WAIT_MS_MAX)?;
    let mut command = seen(&ctx).await?;
    if wait_ms > 0 && !command.status.is_final() {
        command = ctx.app.platform().commands.wait(ctx.account(), command.id, wait_ms).await?;
    }
    json(StatusCode::OK, &command)
}

/// `DELETE /commands/{id}`: takes it back, as long as it waits.
pub(crate) async fn cancel(ctx: Ctx) -> Answer {
    let command = seen(&ctx).await?;
    let commands = &ctx.app.platform().commands;
    let cancelled = commands.cancel(ctx.account(), command.id, &ctx.identity.actor).await?;
    json(StatusCode::OK, &cancelled)
}
