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

/// Every number, text and switch of the expectations, changed one at a time, must be noticed.
#[test]
fn a_wrong_expectation_fails() {
    let Some(json) = shared("telematics.json") else { return };
    let file: serde_json::Value = serde_json::from_str(&json).unwrap();
    let (mut changed, mut missed) = (0, Vec::new());
    for vector in file["vectors"].as_array().unwrap() {
        if program(vector["protocol"].as_str().unwrap()).is_none() {
            continue;
        }
        for place in places(vector) {
            let mut vector = vector.clone();
            let slot = vector.pointer_mut(&place).unwrap();
            *slot = match &*slot {
                serde_json::Value::Number(n) => match n.as_i64() {
                    Some(n) => (n + 3).into(),
                    None => (n.as_f64().unwrap() + 3.0).into(),
                },
                serde_json::Value::Bool(b) => (!b).into(),
                serde_json::Value::String(text) => match text.parse::<fieldline_model::Timestamp>()
                {
                    Ok(at) if text.contains('T') => at.plus_micros(1_000_000).to_string().into(),
                    _ => format!("{text}0a").into(),
                },
                _ => continue,
            };
            changed += 1;
            let report = vectors::run(&serde_json::json!([vector]).to_string(), None, &program);
            if report.failed == 0 {
                missed.push(format!("{}{place}", vector["id"]));
            }
        }
    }
    assert!(changed > 1_000, "only {changed} changes");
    let some = missed.iter().take(40).collect::<Vec<_>>();
    assert!(missed.is_empty(), "{} of {changed} changes are not noticed: {some:#?}", missed.len());
}

/// Pointers to what a vector states, the first of each list.
fn places(vector: &serde_json::Value) -> Vec<String> {
    let mut places = Vec::new();
    for key in ["count", "reply_hex"] {
        if vector.get(key).is_some() {
            places.push(format!("/{key}"));
        }
    }
    for key in ["expected", "lenient"] {
        if let Some(stated) = vector.get(key) {
            leaves(stated, &format!("/{key}"), &mut places);
        }
    }
    places
}

fn leaves(json: &serde_json::Value, path: &str, places: &mut Vec<String>) {
    match json {
        serde_json::Value::Object(map) => {
            for (key, value) in map {
                leaves(
                    value,
                    &format!("{path}/{}", key.replace('~', "~0").replace('/', "~1")),
                    places,
                );
            }
        }
        serde_json::Value::Array(list) => {
            for (at, value) in list.iter().enumerate().take(2) {
                leaves(value, &format!("{path}/{at}"), places);
            }
        }
        serde_json::Value::Null => {}
        _ => places.push(path.to_owned()),
    }
}

#[test]
fn what_cannot_be_run_fails() {
    let failed = |json: &str, only: Option<&str>| vectors::run(json, only, &program).failed;
    assert_eq!(failed("", None), 1);
    assert_eq!(failed("{\"vectors\":[]}", None), 1);
    assert_eq!(failed("[{\"protocol\":\"teltonika\",\"hex\":\"ff\"}]", Some("wialon_ips")), 1);
    assert_eq!(failed("[{\"protocol\":\"unheard_of\",\"hex\":\"ff\"}]", None), 1);
    assert_eq!(failed("[{\"protocol\":\"teltonika\",\"hex\":\"zz\"}]", None), 1);
    assert_eq!(
        failed("[{\"protocol\":\"teltonika\",\"hex\":\"ff\",\"requires\":\"wings\"}]", None),
        1
    );
    assert_eq!(failed("[{\"protocol\":\"teltonika\",\"hex\":\"ff\"}]", None), 0);
}
