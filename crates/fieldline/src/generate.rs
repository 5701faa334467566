//! Documents that are generated from the code, for `cargo xtask codegen`.

use std::fmt::Write as _;

use clap::CommandFactory as _;
use fieldline_model::{CloseCode, ParamKind, dictionary};

use crate::cli::{Cli, Document};
use crate::protocol::print;

/// Prints a document.
pub(crate) fn run(document: Document) -> Result<(), String> {
    print(&match document {
        Document::Openapi => fieldline_rest::openapi(),
        Document::Cli => command_line(),
        Document::CloseCodes => close_codes(),
        Document::Parameters => parameters(),
    })
}

/// Help of every command, as Markdown.
fn command_line() -> String {
    let mut out =
        "# The command line\n\nGenerated from the program: `cargo xtask codegen`.\n".to_owned();
    help(&Cli::command(), "", 2, &mut out);
    out
}

fn help(command: &clap::Command, parents: &str, depth: usize, out: &mut String) {
    let name = format!("{parents}{}", command.get_name());
    let text = command
        .clone()
        .mut_args(|arg| arg.hide_env_values(true))
        .bin_name(&name)
        .term_width(100)
        .render_long_help()
        .to_string();
    let text: Vec<&str> = text.lines().map(str::trim_end).collect();
    // Writing to a String cannot fail.
    let _written = writeln!(
        out,
        "\n{} `{name}`\n\n```text\n{}\n```",
        "#".repeat(depth),
        text.join("\n").trim()
    );
    for sub in
        command.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help")
    {
        help(sub, &format!("{name} "), (depth + 1).min(4), out);
    }
}

fn close_codes() -> String {
    let mut out = "# Close codes\n\nWhy a device's connection ended: `close.code` and `close.name` in logs, `code` of the metric\n`fieldline_gateway_connections_closed_total`. Generated from the program: `cargo xtask codegen`.\n\n| code | name | meaning |\n|---|---|---|\n".to_owned();
    for code in CloseCode::ALL {
        let _written =
            writeln!(out, "| {} | `{}` | {} |", code.number(), code.name(), code.description());
    }
    out
}

fn parameters() -> String {
    let mut out = "# Built-in parameters\n\nGenerated from the program: `cargo xtask codegen`. Units are UCUM; a parameter of known decimals is stored as\na scaled integer, exactly.\n\n| name | kind | decimals or bits | unit | meaning |\n|---|---|---|---|---|\n".to_owned();
    for spec in dictionary::dictionary() {
        let (kind, size) = match spec.kind {
            ParamKind::Decimal => ("decimal", spec.decimals.to_string()),
            ParamKind::Int => ("int", spec.bits.to_string()),
            ParamKind::Bool => ("bool", String::new()),
            ParamKind::Float => ("float", String::new()),
            ParamKind::Text => ("text", String::new()),
            ParamKind::Bytes => ("bytes", String::new()),
            ParamKind::Json => ("json", String::new()),
        };
        let unit = if spec.unit.is_empty() { String::new() } else { format!("`{}`", spec.unit) };
        let _written =
            writeln!(out, "| `{}` | {kind} | {size} | {unit} | {} |", spec.name, spec.description);
    }
    out
}
