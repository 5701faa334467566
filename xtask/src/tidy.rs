//! Tidiness as a test: file lengths, links in documents, words that do not belong.

use std::path::Path;

use crate::{Failure, output, root};

/// A file past this length wants a seam.
const LINES_MAX: usize = 800;

/// Checks every file that git tracks.
pub(crate) fn run() -> Result<(), Failure> {
    let listed = output("git", &["ls-files"]).ok_or("cannot list files with git")?;
    let mut problems = Vec::new();
    for name in listed.lines() {
        let path = root().join(name);
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        let code = [".rs", ".ts", ".svelte", ".pvm", ".css"].iter().any(|end| name.ends_with(end));
        let lines = text.lines().count();
        if code && lines > LINES_MAX {
            problems.push(format!("{name} has {lines} lines; past {LINES_MAX} it wants a seam"));
        }
        if name.ends_with(".md") {
            check_links(name, &path, &text, &mut problems);
        }
        if name.ends_with(".rs") && !name.starts_with("xtask/") {
            for (word, why) in [
                ("todo!(", "unfinished"),
                ("unimplemented!(", "unfinished"),
                ("#[ignore", "a test that is not run"),
            ] {
                if text.contains(word) {
                    problems.push(format!("{name} has `{word}`: {why}"));
                }
            }
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(format!("\n  {}", problems.join("\n  "))) }
}

/// Checks that relative links lead to files.
fn check_links(name: &str, path: &Path, text: &str, problems: &mut Vec<String>) {
    let folder = path.parent().unwrap_or(Path::new(""));
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    for target in targets {
        let file = target.split('#').next().unwrap_or_default();
        let outside = target.contains("://") || target.starts_with("mailto:");
        if outside || file.is_empty() || file.contains(' ') {
            continue;
        }
        if !folder.join(file).exists() {
            problems.push(format!("{name} links to `{target}`, which is not there"));
        }
    }
}
