//! Query parameters, and the cursors of pages.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use fieldline_model::{Cursor, Timestamp};
use uuid::Uuid;

use crate::problem::Problem;

/// Longest query, in bytes.
const QUERY_BYTES_MAX: usize = 8 << 10;
/// Most parameters.
const PARAMS_MAX: usize = 64;

/// The parameters of a request, decoded.
#[derive(Clone, Debug, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    /// Reads `text`, and refuses parameters that are not `known`: a mistyped filter would show everything.
    pub(crate) fn read<'a>(
        text: Option<&str>,
        known: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<Self, Problem> {
        let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(Self::default()) };
        if text.len() > QUERY_BYTES_MAX {
            return Err(Problem::bad_query(format!(
                "the query is longer than {QUERY_BYTES_MAX} bytes"
            )));
        }
        let mut params = Vec::new();
        for (name, value) in form_urlencoded::parse(text.as_bytes()) {
            if !known.clone().any(|known| known == name) {
                let name: String = name.chars().take(64).collect();
                let known: Vec<&str> = known.collect();
                let known = if known.is_empty() { "none".to_owned() } else { known.join("`, `") };
                return Err(Problem::bad_query(format!(
                    "this path has no parameter `{name}`; it has: `{known}`"
                )));
            }
            if params.len() >= PARAMS_MAX {
                return Err(Problem::bad_query(format!("more than {PARAMS_MAX} parameters")));
            }
            params.push((name.into_owned(), value.into_owned()));
        }
        Ok(Self(params))
    }

    /// The value of `name`, where it is not empty.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let named = self.0.iter().find(|(n, value)| n == name && !value.is_empty());
        named.map(|(_, value)| value.as_str())
    }

    /// All values of `name`.
    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let named = self.0.iter().filter(move |(n, value)| n == name && !value.is_empty());
        named.map(|(_, value)| value.as_str())
    }

    /// All parameters, for the link to the next page.
    pub(crate) fn pairs(&self) -> &[(String, String)] {
        &self.0
    }

    /// The value of `name` as a `T`.
    pub(crate) fn parsed<T: FromStr>(&self, name: &str) -> Result<Option<T>, Problem>
    where
        T::Err: fmt::Display,
    {
        let read = |text: &str| {
            text.parse().map_err(|error| Problem::bad_query(format!("`{name}`: {error}")))
        };
        self.get(name).map(read).transpose()
    }

    /// A time.
    pub(crate) fn time(&self, name: &str) -> Result<Option<Timestamp>, Problem> {
        self.parsed::<Timestamp>(name)
    }

    /// The times `from` and `to`; all of time where they are not given.
    pub(crate) fn span(&self) -> Result<(Timestamp, Timestamp), Problem> {
        let from = self.time("from")?.unwrap_or(Timestamp::MIN);
        let to = self.time("to")?.unwrap_or(Timestamp::MAX);
        if from > to {
            return Err(Problem::bad_query(format!(
                "`from` ({from}) is later than `to` ({to}): exchange them"
            )));
        }
        Ok((from, to))
    }

    /// `true` or `false`.
    pub(crate) fn flag(&self, name: &str) -> Result<Option<bool>, Problem> {
        match self.get(name) {
            None => Ok(None),
            Some("true" | "1") => Ok(Some(true)),
            Some("false" | "0") => Ok(Some(false)),
            Some(_) => Err(Problem::bad_query(format!("`{name}` is neither `true` nor `false`"))),
        }
    }

    /// A number; below the range is refused, above it is capped.
    pub(crate) fn number(
        &self,
        name: &str,
        default: u64,
        range: RangeInclusive<u64>,
    ) -> Result<u64, Problem> {
        let Some(text) = self.get(name) else { return Ok(default) };
        match text.parse::<u64>() {
            Ok(number) if number >= *range.start() => Ok(number.min(*range.end())),
            _ => Err(Problem::bad_query(format!(
                "`{name}` is not a whole number of at least {}; above {} it counts as that",
                range.start(),
                range.end()
            ))),
        }
    }

    /// How many items are asked for.
    pub(crate) fn limit(&self, default: u64, most: u64) -> Result<usize, Problem> {
        let limit = self.number("limit", default, 1..=most)?;
        usize::try_from(limit).map_err(Problem::fault)
    }

    /// The number after which the page begins.
    pub(crate) fn after_number(&self) -> Result<Option<u64>, Problem> {
        let read = |text: &str| text.parse().map_err(|_| wrong_cursor());
        self.get("cursor").map(read).transpose()
    }

    /// Refuses a cursor, for lists that have one page only.
    pub(crate) fn one_page(&self) -> Result<(), Problem> {
        self.get("cursor").map_or(Ok(()), |_| Err(wrong_cursor()))
    }

    /// The id after which the page begins.
    pub(crate) fn after_id(&self) -> Result<Option<Uuid>, Problem> {
        let read = |text: &str| Uuid::try_parse(text).map_err(|_| wrong_cursor());
        self.get("cursor").map(read).transpose()
    }

    /// The message after which the page begins.
    pub(crate) fn after_message(&self) -> Result<Option<(Timestamp, Cursor)>, Problem> {
        let read = |text: &str| read_cursor(text).ok_or_else(wrong_cursor);
        self.get("cursor").map(read).transpose()
    }
}

fn wrong_cursor() -> Problem {
    Problem::bad_query("`cursor` is not one that this path gave; begin again without it")
}

/// The cursor of the page after the message at `at`.
pub(crate) fn write_cursor(timestamp: Timestamp, at: Cursor) -> String {
    format!("{}.{}.{}", timestamp.as_micros(), at.shard, at.seq)
}

/// Reads what [`write_cursor`] wrote.
fn read_cursor(text: &str) -> Option<(Timestamp, Cursor)> {
    let mut parts = text.split('.');
    let micros = parts.next()?.parse().ok()?;
    let shard = parts.next()?.parse().ok()?;
    let seq = parts.next()?.parse().ok()?;
    let whole = parts.next().is_none();
    whole.then_some((Timestamp::from_micros(micros), Cursor { shard, seq }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KNOWN: [&str; 4] = ["limit", "cursor", "label", "from"];

    fn read(text: &str) -> Result<Query, Problem> {
        Query::read(Some(text), KNOWN.into_iter())
    }

    proptest! {
        #[test]
        fn any_query_is_read_without_a_panic(text in "\\PC{0,200}") {
            if let Ok(query) = read(&text) {
                let _read = (query.after_id(), query.after_message(), query.time("from"), query.limit(1, 9), query.flag("label"));
            }
        }

        #[test]
        fn any_value_of_a_known_parameter_is_judged(value in "\\PC{0,60}") {
            let text: String = form_urlencoded::Serializer::new(String::new()).append_pair("cursor", &value).finish();
            let query = read(&text).unwrap();
            prop_assert_eq!(query.get("cursor").unwrap_or(""), value.as_str());
            let _read = (query.after_id(), query.after_message());
        }

        #[test]
        fn cursors_round_trip(micros: i64, shard: u16, seq: u64) {
            let (at, cursor) = (Timestamp::from_micros(micros), Cursor { shard, seq });
            prop_assert_eq!(read_cursor(&write_cursor(at, cursor)), Some((at, cursor)));
        }
    }

    #[test]
    fn unknown_parameters_are_named_with_the_known_ones() {
        let problem = read("lable=a:b").unwrap_err();
        assert!(problem.detail().contains("`lable`") && problem.detail().contains("`label`"));
    }

    #[test]
    fn a_span_goes_forward_and_cursors_are_worded_alike() {
        const NAMES: [&str; 3] = ["from", "to", "cursor"];
        let read = |text: &str| Query::read(Some(text), NAMES.into_iter()).unwrap();
        assert!(read("from=2026-01-02T00:00:00Z&to=2026-01-01T00:00:00Z").span().is_err());
        assert!(read("from=5&to=5").span().is_ok() && read("").span().is_ok());
        let wrong = read("cursor=zzz");
        let texts = [
            wrong.after_number().unwrap_err(),
            wrong.after_id().unwrap_err(),
            wrong.after_message().unwrap_err(),
            wrong.one_page().unwrap_err(),
        ];
        assert!(texts.iter().all(|problem| problem.detail() == wrong_cursor().detail()));
    }

    #[test]
    fn limits_are_capped_and_nonsense_is_refused() {
        assert_eq!(read("limit=5").unwrap().limit(1, 10).unwrap(), 5);
        assert_eq!(read("limit=99999").unwrap().limit(1, 10).unwrap(), 10);
        assert_eq!(read("limit=").unwrap().limit(3, 10).unwrap(), 3);
        assert!(read("limit=0").unwrap().limit(1, 10).is_err());
        assert!(read("limit=-1").unwrap().limit(1, 10).is_err());
        assert!(read("limit=many").unwrap().limit(1, 10).is_err());
    }
}
