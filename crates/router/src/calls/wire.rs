//! What calls between nodes write into paths, headers and bodies, and how that is read: all of it comes from outside.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use fieldline_contracts::calls::METHOD_BYTES_MAX;
use fieldline_contracts::{CallError, TraceParent};
use hyper::header::{HeaderMap, HeaderValue};
use serde::{Deserialize, Serialize};

/// Before the name of a method.
const PATH: &str = "/v1/";
/// Longest name of a node, in bytes.
const NODE_BYTES_MAX: usize = 128;
/// Most bytes of a problem that are read.
pub const PROBLEM_BYTES_MAX: usize = 64 << 10;
/// Most bytes of the reason within a problem; the rest is cut off.
const DETAIL_BYTES_MAX: usize = 8 << 10;

const NODE: &str = "fieldline-node";
const TO: &str = "fieldline-to";
const VERSION: &str = "fieldline-version";
const DEADLINE: &str = "fieldline-deadline-ms";
const HELLO: &str = "fieldline-hello-bytes";
const TRACE: &str = "traceparent";

/// The version of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    major: u32,
    minor: u32,
    patch: u32,
}

impl Version {
    /// That of this program.
    pub const OWN: Self = Self {
        major: number(env!("CARGO_PKG_VERSION_MAJOR")),
        minor: number(env!("CARGO_PKG_VERSION_MINOR")),
        patch: number(env!("CARGO_PKG_VERSION_PATCH")),
    };

    /// Whether programs of both versions may be in one cluster: they are one minor version apart at most, or the newer
    /// one is the first of its major version.
    #[must_use]
    pub const fn fits(self, other: Self) -> bool {
        if self.major == other.major {
            return self.minor.abs_diff(other.minor) <= 1;
        }
        let newer = if self.major > other.major { self } else { other };
        self.major.abs_diff(other.major) == 1 && newer.minor == 0
    }
}

/// A number that Cargo gave as text.
const fn number(text: &str) -> u32 {
    match u32::from_str_radix(text, 10) {
        Ok(number) => number,
        Err(_) => 0,
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl FromStr for Version {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split('.').map(|part| {
            let plain = part.len() <= 9 && part.bytes().all(|b| b.is_ascii_digit());
            part.parse::<u32>().ok().filter(|_| plain).ok_or(())
        });
        let mut next = || parts.next().unwrap_or(Err(()));
        let version = Self { major: next()?, minor: next()?, patch: next()? };
        if parts.next().is_some() { Err(()) } else { Ok(version) }
    }
}

/// What every call says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Who asks.
    pub node: String,
    /// Who is meant: an address may lead to another.
    pub to: String,
    /// The program that asks.
    pub version: Version,
    /// How long the answer is of use.
    pub deadline: Duration,
    /// What it belongs to.
    pub trace: TraceParent,
    /// For a stream: how many of its first bytes are what opens it.
    pub hello: Option<usize>,
}

impl Head {
    /// Writes it.
    ///
    /// # Errors
    ///
    /// [`CallError::Refused`] if the name of a node cannot be written.
    pub fn write(&self, headers: &mut HeaderMap) -> Result<(), CallError> {
        for (key, name) in [(NODE, &self.node), (TO, &self.to)] {
            let value = HeaderValue::from_str(name).map_err(|_| {
                let text = format!("the node's name {name:?} has letters that no header can carry");
                CallError::Refused(text)
            })?;
            headers.insert(key, value);
        }
        // The other side gives up a little later than this one.
        let deadline = u64::try_from(self.deadline.as_millis()).unwrap_or(u64::MAX).max(1);
        headers.insert(DEADLINE, HeaderValue::from(deadline));
        if let Some(bytes) = self.hello {
            headers.insert(HELLO, HeaderValue::from(bytes));
        }
        for (key, text) in [(VERSION, self.version.to_string()), (TRACE, self.trace.to_string())] {
            if let Ok(value) = HeaderValue::from_str(&text) {
                headers.insert(key, value);
            }
        }
        Ok(())
    }

    /// Reads it. A trace that cannot be read begins anew; all else must be right.
    ///
    /// # Errors
    ///
    /// [`CallError::Refused`] naming the header.
    pub fn read(headers: &HeaderMap) -> Result<Self, CallError> {
        let text = |key: &str| headers.get(key).and_then(|value| value.to_str().ok());
        let wrong = |key: &str| CallError::Refused(format!("the header {key} is missing or wrong"));
        let number = |text: &str| {
            let plain = (1..=18).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
            text.parse::<u64>().ok().filter(|_| plain)
        };
        let name = |key| {
            let name = text(key).filter(|name| (1..=NODE_BYTES_MAX).contains(&name.len()));
            name.map(ToOwned::to_owned).ok_or_else(|| wrong(key))
        };
        let deadline = text(DEADLINE).and_then(number).filter(|deadline| *deadline > 0);
        let hello = match headers.get(HELLO) {
            None => None,
            Some(_) => {
                let bytes = text(HELLO).and_then(number).and_then(|n| usize::try_from(n).ok());
                Some(bytes.ok_or_else(|| wrong(HELLO))?)
            }
        };
        Ok(Self {
            node: name(NODE)?,
            to: name(TO)?,
            version: text(VERSION).and_then(|v| v.parse().ok()).ok_or_else(|| wrong(VERSION))?,
            deadline: Duration::from_millis(deadline.ok_or_else(|| wrong(DEADLINE))?),
            trace: text(TRACE).and_then(|t| t.parse().ok()).unwrap_or_else(TraceParent::next),
            hello,
        })
    }
}

/// The path of a method.
#[must_use]
pub fn path(method: &str) -> String {
    format!("{PATH}{method}")
}

/// The method of a path.
#[must_use]
pub fn method(path: &str) -> Option<&str> {
    path.strip_prefix(PATH).filter(|method| (1..=METHOD_BYTES_MAX).contains(&method.len()))
}

/// The type of a body that says why there is no answer.
pub const PROBLEM_TYPE: &str = "application/problem+json";

/// Why there is no answer, as RFC 9457 shapes it; the class is what counts.
#[derive(Debug, Serialize, Deserialize)]
struct Problem {
    #[serde(default)]
    title: String,
    #[serde(default)]
    status: u16,
    #[serde(default)]
    detail: String,
    class: String,
}

/// Status and body that say `error`.
#[must_use]
pub fn problem(error: &CallError) -> (u16, Bytes) {
    let (status, detail) = match error {
        CallError::NoSuchNode(text) | CallError::NoSuchMethod(text) => (404, text.as_str()),
        CallError::Refused(text) => (503, text.as_str()),
        CallError::Failed(text) => (500, text.as_str()),
        CallError::Unreachable(text) => (502, text.as_str()),
        CallError::DeadlineExceeded => (504, ""),
        other => (500, other.class()),
    };
    let cut = |text: &str| {
        text.get(..text.floor_char_boundary(DETAIL_BYTES_MAX)).unwrap_or("").to_owned()
    };
    let title = cut(&error.to_string());
    let problem = Problem { title, status, detail: cut(detail), class: error.class().to_owned() };
    (status, serde_json::to_vec(&problem).map(Bytes::from).unwrap_or_default())
}

/// Reads what [`problem`] wrote; `None` for what no node wrote.
#[must_use]
pub fn read_problem(body: &[u8]) -> Option<CallError> {
    if body.len() > PROBLEM_BYTES_MAX {
        return None;
    }
    let Problem { detail, class, .. } = serde_json::from_slice(body).ok()?;
    Some(match class.as_str() {
        "no_such_node" => CallError::NoSuchNode(detail),
        "no_such_method" => CallError::NoSuchMethod(detail),
        "refused" => CallError::Refused(detail),
        "unreachable" => CallError::Unreachable(detail),
        "deadline_exceeded" => CallError::DeadlineExceeded,
        // Classes that only newer programs know are failures.
        _ => CallError::Failed(detail),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn head() -> impl Strategy<Value = Head> {
        let hello = proptest::option::of(0_usize..1 << 30);
        let names = ("[!-~]{1,128}", "[!-~]{1,128}");
        (names, 1_u64..1 << 50, hello, any::<[u16; 3]>()).prop_map(
            |((node, to), deadline, hello, [major, minor, patch])| Head {
                node,
                to,
                version: Version { major: major.into(), minor: minor.into(), patch: patch.into() },
                deadline: Duration::from_millis(deadline),
                trace: TraceParent::next(),
                hello,
            },
        )
    }

    proptest! {
        #[test]
        fn a_head_is_read_as_it_was_written(head in head()) {
            let mut headers = HeaderMap::new();
            head.write(&mut headers).unwrap();
            prop_assert_eq!(Head::read(&headers), Ok(head));
        }

        #[test]
        fn any_headers_are_read_or_refused(
            values in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 6),
        ) {
            let mut headers = HeaderMap::new();
            for (key, value) in [NODE, TO, VERSION, DEADLINE, HELLO, TRACE].into_iter().zip(values) {
                if let Ok(value) = HeaderValue::from_bytes(&value) {
                    headers.insert(key, value);
                }
            }
            if let Ok(head) = Head::read(&headers) {
                let mut again = HeaderMap::new();
                head.write(&mut again).unwrap();
                prop_assert_eq!(Head::read(&again), Ok(head));
            }
        }

        #[test]
        fn any_problem_is_read_or_passed_over(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(error) = read_problem(&body) {
                prop_assert_eq!(read_problem(&problem(&error).1), Some(error));
            }
        }

        #[test]
        fn a_problem_is_read_as_it_was_written(text in "\\PC{0,50}", which in 0..6) {
            let error = match which {
                0 => CallError::NoSuchNode(text),
                1 => CallError::NoSuchMethod(text),
                2 => CallError::Refused(text),
                3 => CallError::Unreachable(text),
                4 => CallError::DeadlineExceeded,
                _ => CallError::Failed(text),
            };
            let (status, body) = problem(&error);
            prop_assert!((400..600).contains(&status));
            prop_assert_eq!(read_problem(&body), Some(error));
        }
    }

    #[test]
    fn a_long_reason_is_cut_off_and_arrives() {
        let (_, body) = problem(&CallError::Failed("ü".repeat(100_000)));
        assert!(body.len() < PROBLEM_BYTES_MAX);
        let Some(CallError::Failed(text)) = read_problem(&body) else { panic!() };
        assert_eq!(text.len(), DETAIL_BYTES_MAX);
    }

    #[test]
    fn one_version_of_skew_fits() {
        let version = |text: &str| text.parse::<Version>().unwrap();
        for (one, other, fits) in [
            ("0.1.0", "0.1.7", true),
            ("0.1.0", "0.2.0", true),
            ("0.1.0", "0.3.0", false),
            ("0.9.1", "1.0.0", true),
            ("0.9.1", "1.1.0", false),
            ("1.0.0", "3.0.0", false),
        ] {
            assert_eq!(version(one).fits(version(other)), fits, "{one} and {other}");
            assert_eq!(version(other).fits(version(one)), fits, "{other} and {one}");
        }
        for text in ["", "1", "1.2", "1.2.3.4", "1.2.x", "+1.2.3", "1.2.99999999999"] {
            assert!(text.parse::<Version>().is_err(), "{text}");
        }
        assert_eq!(Version::OWN.to_string(), env!("CARGO_PKG_VERSION"));
    }

    #[test]
    fn methods_are_in_paths() {
        assert_eq!(method(&path("channels/status")), Some("channels/status"));
        assert_eq!(method("/v2/channels"), None);
        assert_eq!(method("/v1/"), None);
        assert_eq!(method(&path(&"a".repeat(65))), None);
    }
}
