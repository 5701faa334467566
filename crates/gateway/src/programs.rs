//! Compiled protocols: an account's own before the built-in ones.

use std::collections::HashMap;
use std::sync::Arc;

use fieldline_contracts::registry::RegistryExt;
use fieldline_contracts::{Registry, RegistryError};
use fieldline_model::{AccountId, Protocol};
use fieldline_pvm::Program;
use parking_lot::Mutex;

/// Compiled programs kept; accounts' own are compiled again beyond it.
const KEPT_MAX: usize = 1_000;

/// Why a channel has no program.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProgramError {
    #[error("there is no protocol `{name}`; built in: {built_in}")]
    Unknown { name: String, built_in: String },
    #[error("protocol `{name}` does not compile: {reason}")]
    Wrong { name: String, reason: String },
    #[error("the protocol cannot be read now; that is tried again")]
    Registry(#[from] RegistryError),
}

/// Whose program it is, its name, and its version (0 for a built-in one).
type Key = (Option<AccountId>, String, u32);

#[derive(Default)]
pub(crate) struct Programs {
    compiled: Mutex<HashMap<Key, Arc<Program>>>,
}

impl Programs {
    /// The program that `name` means to `account` now. The same version gives the same `Arc`.
    pub(crate) async fn get(
        &self,
        registry: &dyn Registry,
        account: AccountId,
        name: &str,
    ) -> Result<Arc<Program>, ProgramError> {
        if let Some(own) = registry.find_object::<Protocol>(account, "name", name).await? {
            let Protocol { source, version, .. } = own.object;
            return self.compile((Some(account), name.to_owned(), version), &source);
        }
        let built_in = fieldline_pvm::library::built_in();
        match built_in.iter().find(|(known, _)| *known == name) {
            Some((_, source)) => self.compile((None, name.to_owned(), 0), source),
            None => {
                let names: Vec<&str> = built_in.iter().map(|(known, _)| *known).collect();
                let (name, built_in) = (name.to_owned(), names.join(", "));
                Err(ProgramError::Unknown { name, built_in })
            }
        }
    }

    fn compile(&self, key: Key, source: &str) -> Result<Arc<Program>, ProgramError> {
        if let Some(known) = self.compiled.lock().get(&key) {
            return Ok(Arc::clone(known));
        }
        let program = fieldline_pvm::compile(&key.1, source).map_err(|diagnostics| {
            ProgramError::Wrong { name: key.1.clone(), reason: diagnostics.to_string() }
        })?;
        let program = Arc::new(program);
        let mut compiled = self.compiled.lock();
        if compiled.len() >= KEPT_MAX {
            compiled.clear();
        }
        compiled.insert(key, Arc::clone(&program));
        Ok(program)
    }
}
