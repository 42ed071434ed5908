//! Topic names and topic filters: what is allowed, and which filter matches which name (MQTT 5, section 4.7).
//!
//! Nothing here cuts a string within a character, recurses on levels, or allocates.

/// The most bytes that MQTT can carry in a string.
const TOPIC_BYTES_MAX: usize = 65_535;
const SHARE: &str = "$share";

/// What is wrong with a topic name or filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    /// [MQTT-4.7.3-1].
    #[error("a topic has at least one character")]
    Empty,
    /// [MQTT-4.7.3-3].
    #[error("a topic has at most 65535 bytes")]
    TooLong,
    /// [MQTT-4.7.3-2].
    #[error("a topic has no NUL character")]
    Nul,
    /// Ours: a bound on the work per topic.
    #[error("a topic has at most {max} levels here")]
    TooManyLevels {
        /// The limit.
        max: usize,
    },
    /// [MQTT-3.3.2-2].
    #[error("a topic name has no wildcards (+ or #)")]
    WildcardInName,
    /// [MQTT-4.7.1-1], [MQTT-4.7.1-2].
    #[error("in a topic filter + stands for a whole level, and # for the whole rest")]
    MisplacedWildcard,
    /// [MQTT-4.8.2-1], [MQTT-4.8.2-2].
    #[error("a shared subscription is $share/GROUP/FILTER: neither part empty, no wildcards in the group")]
    MalformedShare,
}

/// A shared subscription's filter in its two parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shared<'a> {
    /// The group's name.
    pub group: &'a str,
    /// What it subscribes to.
    pub filter: &'a str,
}

/// Whether a message may be published under this name.
pub fn validate_topic_name(topic: &str, levels_max: usize) -> Result<(), TopicError> {
    validate_string(topic)?;
    validate_levels(topic, levels_max)?;
    if topic.contains(['+', '#']) { Err(TopicError::WildcardInName) } else { Ok(()) }
}

/// Whether this may be subscribed to; `Some` if it is a shared subscription. `levels_max` does not count `$share` and the group.
pub fn validate_topic_filter(filter: &str, levels_max: usize) -> Result<Option<Shared<'_>>, TopicError> {
    validate_string(filter)?;
    let shared = match filter.split_once('/') {
        Some((SHARE, rest)) => match rest.split_once('/') {
            Some((group, filter)) if !group.is_empty() && !filter.is_empty() && !group.contains(['+', '#']) => {
                Some(Shared { group, filter })
            }
            _ => return Err(TopicError::MalformedShare),
        },
        None if filter == SHARE => return Err(TopicError::MalformedShare),
        _ => None,
    };
    let filter = shared.map_or(filter, |shared| shared.filter);
    validate_levels(filter, levels_max)?;
    let mut levels = filter.split('/').peekable();
    while let Some(level) = levels.next() {
        let alone = match level {
            "+" => true,
            "#" => levels.peek().is_none(),
            other => !other.contains(['+', '#']),
        };
        if !alone {
            return Err(TopicError::MisplacedWildcard);
        }
    }
    Ok(shared)
}

/// The parts of a valid filter that is shared.
pub fn shared(filter: &str) -> Option<Shared<'_>> {
    let (group, filter) = filter.strip_prefix(SHARE)?.strip_prefix('/')?.split_once('/')?;
    Some(Shared { group, filter })
}

fn validate_string(topic: &str) -> Result<(), TopicError> {
    if topic.is_empty() {
        Err(TopicError::Empty)
    } else if topic.len() > TOPIC_BYTES_MAX {
        Err(TopicError::TooLong)
    } else if topic.contains('\0') {
        Err(TopicError::Nul)
    } else {
        Ok(())
    }
}

fn validate_levels(topic: &str, levels_max: usize) -> Result<(), TopicError> {
    if topic.split('/').count() > levels_max { Err(TopicError::TooManyLevels { max: levels_max }) } else { Ok(()) }
}

/// Whether it may match more than one name.
pub fn has_wildcard(filter: &str) -> bool {
    filter.contains(['+', '#'])
}

/// Whether a valid, unshared filter matches a valid name. A wildcard in the first level does not match a name that begins with `$`
/// [MQTT-4.7.2-1].
pub fn matches(filter: &str, topic: &str) -> bool {
    if topic.starts_with('$') && filter.starts_with(['+', '#']) {
        return false;
    }
    let mut levels = topic.split('/');
    for wanted in filter.split('/') {
        if wanted == "#" {
            // It stands for the parent too: `a/#` matches `a`.
            return true;
        }
        match levels.next() {
            Some(level) if wanted == "+" || wanted == level => {}
            _ => return false,
        }
    }
    levels.next().is_none()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEVELS: usize = 128;

    #[test]
    fn names() {
        for good in ["a", "/", "a//b", " ", "ä", "€/💬", "$SYS/x", &"/".repeat(LEVELS - 1), &"ü".repeat(32_767)] {
            assert_eq!(validate_topic_name(good, LEVELS), Ok(()), "{good:?}");
        }
        for (bad, error) in [
            ("", TopicError::Empty),
            ("a/+", TopicError::WildcardInName),
            ("a#", TopicError::WildcardInName),
            ("a\0", TopicError::Nul),
            (&"/".repeat(LEVELS), TopicError::TooManyLevels { max: LEVELS }),
            (&"ü".repeat(32_768), TopicError::TooLong),
        ] {
            assert_eq!(validate_topic_name(bad, LEVELS), Err(error));
        }
    }

    #[test]
    fn filters() {
        for good in ["#", "+", "+/+", "a/+/b", "a/#", "/", "/#", "+/#", "$SYS/#", "$shared/a", "$sharea"] {
            assert_eq!(validate_topic_filter(good, LEVELS), Ok(None), "{good:?}");
        }
        for bad in ["a#", "a/#/b", "#/", "a+", "+a", "++", "a/b+/c", "##", "#+"] {
            assert_eq!(validate_topic_filter(bad, LEVELS), Err(TopicError::MisplacedWildcard), "{bad:?}");
        }
        assert_eq!(validate_topic_filter("", LEVELS), Err(TopicError::Empty));
        assert_eq!(validate_topic_filter("a\0", LEVELS), Err(TopicError::Nul));
        assert_eq!(validate_topic_filter(&"a".repeat(65_536), LEVELS), Err(TopicError::TooLong));
        assert_eq!(validate_topic_filter(&"+/".repeat(LEVELS), LEVELS), Err(TopicError::TooManyLevels { max: LEVELS }));
    }

    #[test]
    fn shared_filters() {
        assert_eq!(validate_topic_filter("$share/g/a/+/#", LEVELS), Ok(Some(Shared { group: "g", filter: "a/+/#" })));
        assert_eq!(validate_topic_filter("$share/g//", LEVELS), Ok(Some(Shared { group: "g", filter: "/" })));
        for filter in ["$share/g/a/+/#", "$share/g//", "$shared/g/a", "a/b/c", "$SYS/a/b"] {
            assert_eq!(Ok(shared(filter)), validate_topic_filter(filter, LEVELS), "{filter}");
        }
        for bad in ["$share", "$share/", "$share/g", "$share/g/", "$share//a", "$share/+/a", "$share/g#/a"] {
            assert_eq!(validate_topic_filter(bad, LEVELS), Err(TopicError::MalformedShare), "{bad:?}");
        }
        assert_eq!(validate_topic_filter("$share/g/a#", LEVELS), Err(TopicError::MisplacedWildcard));
        assert_eq!(validate_topic_filter("$share/\0/a", LEVELS), Err(TopicError::Nul));
    }

    /// The examples of section 4.7 of the specification, and some at the edges.
    #[test]
    fn matching() {
        for (filter, topic) in [
            ("sport/tennis/player1/#", "sport/tennis/player1"),
            ("sport/tennis/player1/#", "sport/tennis/player1/ranking"),
            ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon"),
            ("sport/#", "sport"),
            ("#", "a/b"),
            ("sport/tennis/+", "sport/tennis/player1"),
            ("sport/+", "sport/"),
            ("+/+", "/finance"),
            ("/+", "/finance"),
            ("$SYS/#", "$SYS/a"),
            ("$SYS/monitor/+", "$SYS/monitor/Clients"),
            ("é/+", "é/ü"),
            ("a//b", "a//b"),
        ] {
            assert!(matches(filter, topic), "{filter} {topic}");
        }
        for (filter, topic) in [
            ("sport/tennis/+", "sport/tennis/player1/ranking"),
            ("sport/+", "sport"),
            ("+", "/finance"),
            ("#", "$SYS/a"),
            ("+/monitor/Clients", "$SYS/monitor/Clients"),
            ("a", "A"),
            ("a/b", "a"),
            ("a", "a/b"),
            ("a/#", "ab"),
        ] {
            assert!(!matches(filter, topic), "{filter} {topic}");
        }
    }

    /// Says the same as `matches`, straight from the specification's words.
    fn model(filter: &[&str], topic: &[&str]) -> bool {
        match (filter, topic) {
            (["#"], _) => true,
            ([], []) => true,
            (["+", filter @ ..], [_, topic @ ..]) => model(filter, topic),
            ([wanted, filter @ ..], [level, topic @ ..]) => wanted == level && model(filter, topic),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn matching_is_as_specified(filter in "(([ab$ü]|[+]|)/){0,3}([ab]|[+]|#)", topic in "[ab$ü/]{1,7}") {
            let hidden = topic.starts_with('$') && filter.starts_with(['+', '#']);
            let levels = |topic: &str| topic.split('/').map(str::to_owned).collect::<Vec<_>>();
            let (filter_levels, topic_levels) = (levels(&filter), levels(&topic));
            let filter_levels: Vec<&str> = filter_levels.iter().map(String::as_str).collect();
            let topic_levels: Vec<&str> = topic_levels.iter().map(String::as_str).collect();
            prop_assert_eq!(matches(&filter, &topic), !hidden && model(&filter_levels, &topic_levels));
        }

        #[test]
        fn nothing_panics(filter in "\\PC*", topic in "\\PC*") {
            let valid_name = validate_topic_name(&topic, LEVELS).is_ok();
            if let Ok(shared) = validate_topic_filter(&filter, LEVELS) {
                let plain = shared.map_or(filter.as_str(), |shared| shared.filter);
                let matched = matches(plain, &topic);
                prop_assert!(!(valid_name && plain == "#" && !topic.starts_with('$')) || matched);
            }
            prop_assert!(!valid_name || matches(&topic, &topic), "a name is a filter that matches itself");
        }
    }
}
