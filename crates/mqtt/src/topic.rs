//! Topics and filters inside an account's own namespace.
//!
//! No topic names an account: a client's account comes from its token, and each
//! account has a routing table of its own, so there is nothing to write that
//! would reach another's.

use fieldline_model::DeviceId;
use uuid::Uuid;

use crate::codec::Reason;

/// Longest topic or filter, in bytes.
pub(crate) const TOPIC_BYTES_MAX: usize = 1_024;
/// Most levels of a topic or filter.
pub(crate) const LEVELS_MAX: usize = 16;

/// First levels that can be subscribed to.
pub const ROOTS: [&str; 6] = ["message", "state", "event", "log", "command", "client"];

/// Where a client's PUBLISH goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target<'a> {
    /// `ingest/{device}`: into the pipeline.
    Ingest {
        /// Id or ident.
        device: &'a str,
    },
    /// `command/{device}/{name}`: to the device.
    Command {
        /// The device.
        device: DeviceId,
        /// The command's name.
        name: &'a str,
    },
    /// `client/…`: to other clients of the account.
    Client {
        /// The object it is about, if the second level is an id.
        object: Option<Uuid>,
    },
}

impl Target<'_> {
    /// A label for metrics.
    pub(crate) const fn kind(&self) -> &'static str {
        match self {
            Self::Ingest { .. } => "ingest",
            Self::Command { .. } => "command",
            Self::Client { .. } => "client",
        }
    }
}

/// Where `topic` goes, or why nothing can be published to it.
pub(crate) fn target(topic: &str) -> Result<Target<'_>, &'static str> {
    if topic.len() > TOPIC_BYTES_MAX || topic.split('/').count() > LEVELS_MAX {
        return Err("the topic is longer than 1024 bytes or 16 levels");
    }
    let (root, rest) = topic.split_once('/').unwrap_or((topic, ""));
    match root {
        // The ident may itself hold slashes: devices make them up.
        "ingest" if !rest.is_empty() => Ok(Target::Ingest { device: rest }),
        "ingest" => Err("publish to ingest/{device id or ident}"),
        "command" => match rest.split_once('/') {
            Some((device, name)) if !name.is_empty() && !name.contains('/') => {
                let device =
                    device.parse().map_err(|_| "the second level of command/ is no device id")?;
                Ok(Target::Command { device, name })
            }
            _ => Err("publish to command/{device id}/{name}"),
        },
        "client" if !rest.is_empty() => {
            let second = rest.split('/').next().unwrap_or(rest);
            Ok(Target::Client { object: Uuid::try_parse(second).ok() })
        }
        "message" | "state" | "event" | "log" => {
            Err("this topic is written by the server; devices publish to ingest/{device}")
        }
        _ => Err("publish to ingest/, command/ or client/"),
    }
}

/// What a topic that came from another node is about: a client's, or that of an answer to a command. `None` if it is
/// neither.
pub(crate) fn of_another_node(topic: &str) -> Option<Option<Uuid>> {
    if topic.contains(['+', '#', '\0']) {
        return None;
    }
    if let Some(command) = topic.strip_suffix("/answer") {
        let Ok(Target::Command { device, .. }) = target(command) else {
            let Ok(Target::Client { object }) = target(topic) else { return None };
            return Some(object);
        };
        return Some(Some(device.0));
    }
    match target(topic) {
        Ok(Target::Client { object }) => Some(object),
        _ => None,
    }
}

/// Checks a filter.
///
/// # Errors
///
/// The reason for SUBACK: a filter that can match nothing is refused rather
/// than left to wait for ever.
pub(crate) fn check_filter(filter: &str) -> Result<(), Reason> {
    if filter.starts_with("$share/") {
        return Err(Reason::SharedSubscriptionsNotSupported);
    }
    if filter.len() > TOPIC_BYTES_MAX {
        return Err(Reason::TopicFilterInvalid);
    }
    let mut levels = 0;
    let mut rest = filter.split('/').peekable();
    while let Some(level) = rest.next() {
        levels += 1;
        let wild = level.contains(['+', '#']);
        if levels > LEVELS_MAX
            || (wild && level.len() > 1)
            || (level == "#" && rest.peek().is_some())
            || (levels == 1 && !wild && !ROOTS.contains(&level))
        {
            return Err(Reason::TopicFilterInvalid);
        }
    }
    Ok(())
}

/// Whether `filter` matches `topic`. Topics that begin with `$` do not exist here.
pub(crate) fn matches(filter: &str, topic: &str) -> bool {
    let (mut filter, mut topic) = (filter.split('/'), topic.split('/'));
    loop {
        match (filter.next(), topic.next()) {
            (Some("#"), _) => return true,
            (Some("+"), Some(_)) => {}
            (Some(f), Some(t)) if f == t => {}
            (None, None) => return true,
            _ => return false,
        }
    }
}

/// Appends a parameter's name as one level: what would divide or match levels is
/// written as `%` and two hex digits.
pub(crate) fn push_level(topic: &mut String, name: &str) {
    for c in name.chars() {
        match c {
            '%' => topic.push_str("%25"),
            '+' => topic.push_str("%2B"),
            '#' => topic.push_str("%23"),
            '/' => topic.push_str("%2F"),
            _ => topic.push(c),
        }
    }
}

/// Which last values a filter asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StateFilter {
    /// None.
    None,
    /// Of one device.
    One(DeviceId),
    /// Of every device.
    All,
}

/// Which last values `filter` asks for.
pub(crate) fn state_filter(filter: &str) -> StateFilter {
    let mut levels = filter.split('/');
    match levels.next() {
        Some("#") => return StateFilter::All,
        Some("state" | "+") => {}
        _ => return StateFilter::None,
    }
    match levels.next() {
        Some("#" | "+") => StateFilter::All,
        Some(device) => match device.parse() {
            Ok(device) => StateFilter::One(device),
            Err(_) => StateFilter::None,
        },
        None => StateFilter::None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn filters_match_as_the_standard_says() {
        for (filter, topic, expected) in [
            ("#", "message/a", true),
            ("message/#", "message", true),
            ("message/#", "message/a/b", true),
            ("message/+", "message/a", true),
            ("message/+", "message", false),
            ("message/+", "message/a/b", false),
            ("+/+", "message/a", true),
            ("+", "message/a", false),
            ("state/+/x", "state/a/x", true),
            ("state/+/x", "state/a/y", false),
            ("client//x", "client//x", true),
            ("client/+/x", "client//x", true),
        ] {
            assert_eq!(matches(filter, topic), expected, "{filter} on {topic}");
        }
    }

    #[test]
    fn a_filter_that_can_match_nothing_is_refused() {
        for filter in ["", "/", "mesage/#", "message/#/x", "message/a+", "$SYS/#", "ingest/#"] {
            assert_eq!(check_filter(filter), Err(Reason::TopicFilterInvalid), "{filter}");
        }
        assert_eq!(
            check_filter("$share/g/message/#"),
            Err(Reason::SharedSubscriptionsNotSupported)
        );
        for filter in ["#", "+/+", "message/#", "client/a/+/b", "command/+/+/answer"] {
            assert_eq!(check_filter(filter), Ok(()), "{filter}");
        }
        assert!(check_filter(&"client/".repeat(17)).is_err());
    }

    #[test]
    fn clients_publish_to_three_places_only() {
        for topic in ["message/x", "state/x/y", "event/a/b", "log/device/x", "x", "", "client"] {
            assert!(target(topic).is_err(), "{topic}");
        }
        assert_eq!(target("ingest/a/b"), Ok(Target::Ingest { device: "a/b" }));
        assert!(target("command/nonsense/text").is_err());
        assert!(target("command/01932f6e-8f7a-7cc0-98c4-dc0c0c07398f/text/answer").is_err());
    }

    #[test]
    fn other_nodes_send_what_is_between_clients_alone() {
        let device = "01932f6e-8f7a-7cc0-98c4-dc0c0c07398f";
        let id = Uuid::try_parse(device).ok();
        for (topic, about) in [
            ("client/a", Some(None)),
            ("client/a/answer", Some(None)),
            (&*format!("client/{device}/x"), Some(id)),
            (&*format!("client/{device}/answer"), Some(id)),
            (&*format!("command/{device}/text/answer"), Some(id)),
            (&*format!("command/{device}/text"), None),
            (&*format!("message/{device}"), None),
            ("ingest/a", None),
            ("client/+", None),
            ("client/", None),
            ("/answer", None),
            ("", None),
        ] {
            assert_eq!(of_another_node(topic), about, "{topic}");
        }
    }

    proptest! {
        #[test]
        fn any_name_is_one_level(name in "[^\\x00-\\x1f]{1,40}") {
            let mut topic = "state/d/".to_owned();
            push_level(&mut topic, &name);
            prop_assert_eq!(topic.split('/').count(), 3);
            prop_assert!(!topic.contains(['+', '#']));
        }

        #[test]
        fn checking_never_panics(text in ".{0,60}") {
            let _checked = (target(&text).is_ok(), check_filter(&text), state_filter(&text));
        }
    }
}
