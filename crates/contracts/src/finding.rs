//! What a look at one thing found: how adapters tell `fieldline doctor` about the servers that they alone know.

use fieldline_model::Timestamp;
use serde::Serialize;

/// How it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// It works, and not well, or not for long.
    Warning,
    /// It does not work.
    Broken,
}

/// What was found, in words for who runs it. No part of it may hold a secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The name of the check; the same in all versions.
    pub check: &'static str,
    /// The file, address or setting.
    pub looked_at: String,
    /// How it stands.
    pub verdict: Verdict,
    /// What was seen.
    pub found: String,
    /// What to do; there is one where the verdict is not [`Verdict::Ok`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// Clocks that are further apart than this are a warning: which of two values is newer goes by them.
const CLOCK_WARNING_MICROS: i64 = 2_000_000;
/// Clocks that are further apart than this are wrong.
const CLOCK_BROKEN_MICROS: i64 = 60_000_000;

impl Finding {
    /// As it should be.
    pub fn ok(check: &'static str, at: impl Into<String>, found: impl Into<String>) -> Self {
        let (looked_at, found) = (at.into(), found.into());
        Self { check, looked_at, verdict: Verdict::Ok, found, remedy: None }
    }

    /// Not well.
    pub fn warning(
        check: &'static str,
        at: impl Into<String>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        let remedy = Some(remedy.into());
        Self { verdict: Verdict::Warning, remedy, ..Self::ok(check, at, found) }
    }

    /// Does not work.
    pub fn broken(
        check: &'static str,
        at: impl Into<String>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { verdict: Verdict::Broken, ..Self::warning(check, at, found, remedy) }
    }

    /// Does not work, as an error says whose sentence ends with what to do.
    pub fn of_error(
        check: &'static str,
        at: impl Into<String>,
        error: &dyn std::error::Error,
    ) -> Self {
        let text = error.to_string();
        let (found, remedy) = text
            .rsplit_once(": ")
            .or_else(|| text.rsplit_once("; "))
            .unwrap_or((text.as_str(), "see its log"));
        Self::broken(check, at, found, remedy)
    }

    /// How far another clock, which showed `theirs` at some instant from `before` to `after`, is from ours.
    pub fn of_clock(
        check: &'static str,
        at: impl Into<String>,
        theirs: Timestamp,
        (before, after): (Timestamp, Timestamp),
    ) -> Self {
        let apart = theirs.micros_since(after).max(before.micros_since(theirs)).max(0);
        let (whole, tenth) = (apart / 1_000_000, apart / 100_000 % 10);
        let found = format!("{whole}.{tenth} s from this machine's");
        let remedy =
            "let all machines follow one source of time, as chrony or systemd-timesyncd do";
        match apart {
            CLOCK_BROKEN_MICROS.. => Self::broken(check, at, found, remedy),
            CLOCK_WARNING_MICROS.. => Self::warning(check, at, found, remedy),
            _ => Self::ok(check, at, "as this machine's"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_compared_with_what_was_between_question_and_answer() {
        let at = Timestamp::from_seconds;
        let verdict =
            |theirs| Finding::of_clock("clock", "x", at(theirs), (at(100), at(105))).verdict;
        for (theirs, expected) in [
            (97, Verdict::Warning),
            (99, Verdict::Ok),
            (103, Verdict::Ok),
            (106, Verdict::Ok),
            (108, Verdict::Warning),
            (165, Verdict::Broken),
            (30, Verdict::Broken),
        ] {
            assert_eq!(verdict(theirs), expected, "{theirs}");
        }
    }
}
