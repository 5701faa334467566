//! The examples of the documents compile, and the built-in protocols are in order.

use std::path::Path;

use fieldline_pvm::{library, vectors};

#[test]
fn examples_in_the_language_reference_compile() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/protocol-language.md");
    let text = std::fs::read_to_string(path).unwrap();
    let mut count = 0;
    for block in text.split("```pvm\n").skip(1) {
        let source = block.split("```").next().unwrap();
        // Pieces of programs are shown too: they stand in for the body of a rule or for declarations.
        let whole = if source.starts_with("protocol ") {
            source.to_owned()
        } else if source.starts_with("// statements") {
            let head = "protocol example \"x\"\ntransport tcp\nerror bad_crc, bad_time, bad_length\nsession version = null\n\
                        setting io16: bool = false \"x\"\ntable io \"io.{id}\" {\n}\non tcp {\n    head: u8\n}\n";
            format!("{head}rule example() {{\n{source}\n}}")
        } else {
            format!("protocol example \"x\"\ntransport tcp\non tcp {{\n    head: u8\n}}\n{source}")
        };
        if let Err(found) = fieldline_pvm::compile("docs", &whole) {
            panic!("{found}\n{whole}");
        }
        count += 1;
    }
    assert!(count >= 7, "only {count} examples");
}

#[test]
fn built_in_protocols_are_laid_out_and_pass_their_own_vectors() {
    for (name, source) in library::built_in() {
        assert_eq!(
            fieldline_pvm::format(source).as_deref(),
            Ok(*source),
            "{name}: run `fieldline protocol fmt`"
        );
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../protocols").join(name);
        let json = std::fs::read_to_string(directory.join("vectors.json")).unwrap();
        let report = vectors::run(&json, Some(name), &crate::vectors::program);
        assert_eq!(report.failed, 0, "{report}");
        assert!(report.passed >= 10, "{name}: only {} vectors", report.passed);
        assert!(directory.join("README.md").exists());
        assert_eq!(crate::vectors::program(name).unwrap().name(), *name);
    }
}
