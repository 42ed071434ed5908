//! Topic names and topic filters: validity and matching (MQTT 5, section 4.7).

/// A name or filter that MQTT, or this server, does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    /// [MQTT-4.7.3-1].
    #[error("a topic has at least one character")]
    Empty,
    /// [MQTT-4.7.3-2].
    #[error("a topic holds no NUL character")]
    Nul,
    /// [MQTT-4.7.3-3].
    #[error("a topic has at most 65535 bytes")]
    TooLong,
    /// This server's limit.
    #[error("a topic has at most {0} levels here")]
    TooManyLevels(usize),
    /// [MQTT-3.3.2-2].
    #[error("a topic name holds no wildcards")]
    Wildcard,
    /// [MQTT-4.7.1-1] and [MQTT-4.7.1-2].
    #[error("in a filter + stands for a whole level, and # for the whole rest")]
    MisplacedWildcard,
}

fn validate(topic: &str, levels_max: usize) -> Result<(), TopicError> {
    if topic.is_empty() {
        return Err(TopicError::Empty);
    }
    if topic.len() > usize::from(u16::MAX) {
        return Err(TopicError::TooLong);
    }
    if topic.bytes().any(|byte| byte == 0) {
        return Err(TopicError::Nul);
    }
    if topic.bytes().filter(|byte| *byte == b'/').count() >= levels_max {
        return Err(TopicError::TooManyLevels(levels_max));
    }
    Ok(())
}

/// Whether a message can be published to this name.
pub fn validate_topic_name(topic: &str, levels_max: usize) -> Result<(), TopicError> {
    validate(topic, levels_max)?;
    if topic.contains(['+', '#']) { Err(TopicError::Wildcard) } else { Ok(()) }
}

/// Whether this filter can be subscribed to.
pub fn validate_topic_filter(filter: &str, levels_max: usize) -> Result<(), TopicError> {
    validate(filter, levels_max)?;
    let mut levels = filter.split('/').peekable();
    while let Some(level) = levels.next() {
        let alone = match level {
            "+" => true,
            "#" => levels.peek().is_none(),
            _ => !level.contains(['+', '#']),
        };
        if !alone {
            return Err(TopicError::MisplacedWildcard);
        }
    }
    Ok(())
}

/// Whether a valid filter matches a valid name. Wildcards in the first level do not match names that begin with `$` [MQTT-4.7.2-1].
pub fn matches(filter: &str, topic: &str) -> bool {
    if topic.starts_with('$') && filter.starts_with(['+', '#']) {
        return false;
    }
    let mut levels = topic.split('/');
    for wanted in filter.split('/') {
        if wanted == "#" {
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
    use super::*;

    #[test]
    fn matching_is_the_specification_s() {
        for (filter, topic) in [
            ("#", "a"),
            ("a/#", "a"),
            ("a/#", "a/b/c"),
            ("+", "a"),
            ("+/+", "/a"),
            ("/+", "/a"),
            ("a/+/c", "a//c"),
            ("$SYS/#", "$SYS/x"),
            ("ä/+", "ä/ö"),
        ] {
            assert!(matches(filter, topic), "{filter} {topic}");
        }
        for (filter, topic) in [
            ("+", "/a"),
            ("a/+", "a"),
            ("a", "a/b"),
            ("a/b", "a"),
            ("#", "$SYS/x"),
            ("+/x", "$SYS/x"),
            ("a/b/#", "a"),
            ("A", "a"),
        ] {
            assert!(!matches(filter, topic), "{filter} {topic}");
        }
    }

    #[test]
    fn what_is_no_name_or_filter() {
        assert_eq!(validate_topic_name("", 9), Err(TopicError::Empty));
        assert_eq!(validate_topic_name("a\0", 9), Err(TopicError::Nul));
        assert_eq!(validate_topic_name("a/+", 9), Err(TopicError::Wildcard));
        assert_eq!(validate_topic_name(&"a".repeat(65_536), 9), Err(TopicError::TooLong));
        assert_eq!(validate_topic_name(&"/".repeat(9), 9), Err(TopicError::TooManyLevels(9)));
        assert_eq!(validate_topic_name(&"/".repeat(8), 9), Ok(()));
        for filter in ["#/a", "a#", "a+/b", "a/#/b", "##", "++"] {
            assert_eq!(validate_topic_filter(filter, 9), Err(TopicError::MisplacedWildcard), "{filter}");
        }
        for filter in ["#", "+", "/", "a/+/b/#", "+/+", "/#", "ä/#"] {
            assert_eq!(validate_topic_filter(filter, 9), Ok(()), "{filter}");
        }
    }
}
