//! The conformance vectors, strict and in any chunking.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use fieldline_pvm::{Program, library, vectors};

static PROGRAMS: LazyLock<HashMap<&'static str, Arc<Program>>> = LazyLock::new(|| {
    let compiled = library::built_in().iter().map(|(name, source)| {
        let program = fieldline_pvm::compile(name, source);
        (*name, Arc::new(program.unwrap_or_else(|e| panic!("{e}"))))
    });
    compiled.collect()
});

pub(crate) fn program(name: &str) -> Option<Arc<Program>> {
    PROGRAMS.get(name).cloned()
}

/// The shared vectors; `None`, loudly, where they are absent.
pub(crate) fn shared(file: &str) -> Option<String> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/vectors");
    let directory = std::env::var_os("FIELDLINE_VECTORS").map_or(here, PathBuf::from);
    let path = directory.join(file);
    match std::fs::read_to_string(&path) {
        Ok(text) => Some(text),
        Err(error) => {
            eprintln!("VECTORS ABSENT: {}: {error}", path.display());
            assert!(std::env::var_os("CI").is_none(), "the vectors must be there in CI");
            None
        }
    }
}

fn all_pass(protocol: &str) {
    let Some(json) = shared("telematics.json") else { return };
    let report = vectors::run(&json, Some(protocol), &program);
    assert_eq!(report.failed, 0, "{report}");
    println!("{protocol}: {report}");
}

#[test]
fn teltonika() {
    all_pass("teltonika");
}

#[test]
fn wialon_ips() {
    all_pass("wialon_ips");
}
