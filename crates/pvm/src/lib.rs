//! The protocol language: parser, checker, formatter, compiler and virtual machine.
//!
//! A protocol is a text that reads like its specification (`docs/protocol-language.md`).
//! [`compile`] makes a [`Program`] of it; a [`Session`] runs that over the bytes of one connection
//! and says what to store and what to answer. Nothing here opens a socket, reads a clock or a file:
//! tests, the server and the playground run the same code.

pub mod library;
pub mod vectors;

mod ast;
mod check;
mod compile;
mod diagnostics;
mod format;
mod lexer;
mod op;
mod parser;
mod program;
mod session;
mod vm;

pub use diagnostics::{Diagnostic, Diagnostics};
pub use program::{CommandDecl, DeclKind, ParamDecl, Program, SettingDecl};
pub use session::{
    CommandAnswer, CommandError, EncodedCommand, Frame, FrameError, Limits, Options, Reply,
    Session, Step, TraceField,
};

/// Compiles the protocol `source`; `name` is what messages call the source.
///
/// # Errors
///
/// Everything that is wrong with it, each with its place.
pub fn compile(name: &str, source: &str) -> Result<Program, Diagnostics> {
    let mut findings = Vec::new();
    let file = parser::parse(source, &mut findings);
    let program = compile::compile(source, &file, &mut findings);
    if findings.is_empty() {
        Ok(program)
    } else {
        Err(diagnostics::diagnostics(name, source, findings))
    }
}

/// The source in the one accepted layout; comments are kept.
///
/// # Errors
///
/// If it does not parse.
pub fn format(source: &str) -> Result<String, Diagnostics> {
    let mut findings = Vec::new();
    let _file = parser::parse(source, &mut findings);
    if !findings.is_empty() {
        return Err(diagnostics::diagnostics("source", source, findings));
    }
    Ok(format::format(source))
}
