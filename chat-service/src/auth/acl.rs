//! The access file: who may read and write which topics outside `chat/`, in the syntax of mosquitto's `acl_file`.
//!
//! A file with a line that is wrong is refused whole: a line that is misread could open a topic. What nothing grants is closed, and what a
//! `deny` names is closed whatever else is granted. Pure, but for reading the file; nothing is remembered of what was asked.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use broker::topics::filter::validate_topic_filter;
use broker::topics::trie::SubscriptionTrie;
use chat_protocol::{UserId, topic};

/// Levels of a rule's filter: as many as any topic can have.
const LEVELS_MAX: usize = 65_536;

/// What is wrong with an access file.
#[derive(Debug, thiserror::Error)]
pub enum AclFileError {
    /// It cannot be read.
    #[error("{}: {cause}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },
    /// A line is not what it has to be.
    #[error("{}, line {line}: {reason}", path.display())]
    Line { path: PathBuf, line: usize, reason: String },
}

/// What a rule says about the topics that its filter matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    ReadWrite,
    Deny,
}

impl Access {
    fn parse(word: &str) -> Option<Self> {
        match word {
            "read" => Some(Self::Read),
            "write" => Some(Self::Write),
            "readwrite" => Some(Self::ReadWrite),
            "deny" => Some(Self::Deny),
            _ => None,
        }
    }

    fn grants(self, wanted: Wanted) -> bool {
        match self {
            Self::ReadWrite => true,
            Self::Read => wanted == Wanted::Read,
            Self::Write => wanted == Wanted::Write,
            Self::Deny => false,
        }
    }
}

/// What somebody wants to do with a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Receive its messages.
    Read,
    /// Publish to it.
    Write,
}

/// Whose rights are asked for.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    pub user: &'a str,
    pub client_id: &'a str,
}

impl Client<'_> {
    /// Whether its client identifier is one level of a topic, and no wildcard: only then may `%c` stand for it (CVE-2017-7650).
    fn has_plain_id(&self) -> bool {
        !self.client_id.contains(['+', '#', '/', '\0'])
    }
}

/// A part of a pattern's level.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(Box<str>),
    User,
    ClientId,
}

/// A level of a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Level {
    /// `+`
    Any,
    /// `#`
    Rest,
    Pieces(Vec<Piece>),
}

impl Level {
    fn parse(level: &str) -> Self {
        match level {
            "+" => return Self::Any,
            "#" => return Self::Rest,
            _ => {}
        }
        let (mut pieces, mut text, mut rest) = (Vec::new(), String::new(), level);
        let end = |text: &mut String, pieces: &mut Vec<Piece>| {
            if !text.is_empty() {
                pieces.push(Piece::Text(std::mem::take(text).into()));
            }
        };
        while let Some(next) = rest.chars().next() {
            let piece = match rest.get(..2) {
                Some("%u") => Some(Piece::User),
                Some("%c") => Some(Piece::ClientId),
                _ => None,
            };
            match piece {
                Some(piece) => {
                    end(&mut text, &mut pieces);
                    pieces.push(piece);
                    rest = &rest[2..];
                }
                None => {
                    text.push(next);
                    rest = &rest[next.len_utf8()..];
                }
            }
        }
        end(&mut text, &mut pieces);
        Self::Pieces(pieces)
    }

    fn names_client_id(&self) -> bool {
        matches!(self, Self::Pieces(pieces) if pieces.contains(&Piece::ClientId))
    }
}

/// A rule for everybody, in which `%u` and `%c` stand for who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pattern {
    access: Access,
    levels: Vec<Level>,
}

impl Pattern {
    fn matches(&self, client: Client<'_>, topic: &str) -> bool {
        let plain_id = client.has_plain_id();
        let mut levels = topic.split('/');
        for wanted in &self.levels {
            if *wanted == Level::Rest {
                return true;
            }
            let Some(level) = levels.next() else { return false };
            let fits = match wanted {
                Level::Any | Level::Rest => true,
                // What is denied to a client whose identifier fits nowhere is denied in its every form.
                Level::Pieces(_) if !plain_id && wanted.names_client_id() => self.access == Access::Deny,
                Level::Pieces(pieces) => fits(pieces, client, level),
            };
            if !fits {
                return false;
            }
        }
        levels.next().is_none()
    }

    /// The filter that it is for this client; `None` if it does not apply.
    fn filter(&self, client: Client<'_>) -> Option<String> {
        let plain_id = client.has_plain_id();
        let mut levels = Vec::with_capacity(self.levels.len());
        for level in &self.levels {
            levels.push(match level {
                Level::Any => "+".to_owned(),
                Level::Rest => "#".to_owned(),
                Level::Pieces(_) if !plain_id && level.names_client_id() => match self.access {
                    Access::Deny => "+".to_owned(),
                    _ => return None,
                },
                Level::Pieces(pieces) => pieces.iter().map(|piece| piece.text(client)).collect(),
            });
        }
        Some(levels.join("/"))
    }
}

impl Piece {
    fn text<'a>(&'a self, client: Client<'a>) -> &'a str {
        match self {
            Self::Text(text) => text,
            Self::User => client.user,
            Self::ClientId => client.client_id,
        }
    }
}

/// Whether the pieces, one after the other, are this level.
fn fits(pieces: &[Piece], client: Client<'_>, level: &str) -> bool {
    let rest = pieces.iter().try_fold(level, |rest, piece| rest.strip_prefix(piece.text(client)));
    rest == Some("")
}

/// The rules of one user.
#[derive(Clone, Debug, Default)]
struct Rules {
    by_topic: SubscriptionTrie<usize, Access>,
    listed: Vec<(Access, String)>,
}

/// The rules of an access file.
#[derive(Clone, Debug, Default)]
pub struct Acl {
    users: HashMap<Box<str>, Rules>,
    patterns: Vec<Pattern>,
    /// Lines before the first `user`, which are for clients without a name in mosquitto.
    for_nobody: Vec<usize>,
}

impl Acl {
    /// # Errors
    /// [`AclFileError`] for the first thing that is wrong.
    pub fn read(path: &Path) -> Result<Self, AclFileError> {
        let text = std::fs::read_to_string(path).map_err(|cause| AclFileError::Io { path: path.to_owned(), cause })?;
        let acl = parse(&text).map_err(|(line, reason)| AclFileError::Line { path: path.to_owned(), line, reason })?;
        if let Some(line) = acl.for_nobody.first() {
            tracing::warn!(
                path = %path.display(),
                line,
                lines = acl.for_nobody.len(),
                "topic lines before the first user are for clients without a name, and here everybody has one: they grant nothing; a rule for \
                 everybody begins with pattern"
            );
        }
        Ok(acl)
    }

    /// Lines that grant nothing because they stand before the first `user`.
    pub fn for_nobody(&self) -> &[usize] {
        &self.for_nobody
    }

    /// Whether this topic (a valid name) may be read or written now.
    pub fn allows(&self, client: Client<'_>, topic: &str, wanted: Wanted) -> bool {
        let (mut granted, mut denied) = (false, false);
        let mut hears = |access: Access| match access {
            Access::Deny => denied = true,
            access => granted |= access.grants(wanted),
        };
        if let Some(rules) = self.users.get(client.user) {
            rules.by_topic.matching(topic, &mut |_: &usize, access: &Access| hears(*access));
        }
        for pattern in self.patterns.iter().filter(|_| !topic.starts_with('$')) {
            if pattern.matches(client, topic) {
                hears(pattern.access);
            }
        }
        granted && !denied
    }

    /// Whether a subscription to this filter could bring anything: `false` if it is certain that no topic that it matches may be read. What it
    /// does bring is asked again for each message.
    pub fn could_read(&self, client: Client<'_>, filter: &str) -> bool {
        if filter.starts_with('$') {
            return false;
        }
        let listed = self.users.get(client.user).into_iter().flat_map(|rules| &rules.listed);
        let rules: Vec<(Access, String)> = listed
            .cloned()
            .chain(self.patterns.iter().filter_map(|pattern| Some((pattern.access, pattern.filter(client)?))))
            .collect();
        let denied = |both: &str| rules.iter().any(|(access, rule)| *access == Access::Deny && covers(rule, both));
        rules.iter().any(|(access, rule)| {
            access.grants(Wanted::Read) && intersection(rule, filter).is_some_and(|both| !denied(&both))
        })
    }
}

/// Reads rules. `Err` with the number of the line that is wrong, and why.
pub fn parse(text: &str) -> Result<Acl, (usize, String)> {
    let mut acl = Acl::default();
    let mut user: Option<UserId> = None;
    for (number, line) in (1..).zip(text.lines()) {
        let wrong = |reason: String| (number, reason);
        // A comment begins in the first column: elsewhere # is a wildcard.
        let words = line.trim_end().trim_start_matches(' ');
        if line.starts_with('#') || words.is_empty() {
            continue;
        }
        let (keyword, rest) = words.split_once(' ').unwrap_or((words, ""));
        let rest = rest.trim_start_matches(' ');
        match keyword {
            "user" => user = Some(parse_user(rest).map_err(wrong)?),
            "topic" => {
                let (access, filter) = parse_rule(rest).map_err(wrong)?;
                check_filter(filter).map_err(wrong)?;
                let Some(user) = &user else {
                    acl.for_nobody.push(number);
                    continue;
                };
                let rules = acl.users.entry(user.as_str().into()).or_default();
                rules.by_topic.insert(filter, rules.listed.len(), access);
                rules.listed.push((access, filter.to_owned()));
            }
            "pattern" => {
                let (access, filter) = parse_rule(rest).map_err(wrong)?;
                // Names have no wildcards: one stands for all.
                check_filter(&filter.replace("%u", "u").replace("%c", "c")).map_err(wrong)?;
                acl.patterns.push(Pattern { access, levels: filter.split('/').map(Level::parse).collect() });
            }
            other => {
                return Err(wrong(format!("{other:?}: a line begins with user, topic, pattern or #")));
            }
        }
    }
    Ok(acl)
}

fn parse_user(name: &str) -> Result<UserId, String> {
    if name.is_empty() {
        return Err("whose rules follow? A line is: user NAME".to_owned());
    }
    UserId::parse(name).map_err(|error| format!("{name:?}: {error}"))
}

/// `[read|write|readwrite|deny] FILTER`. A word alone is the filter.
fn parse_rule(rest: &str) -> Result<(Access, &str), String> {
    let Some((word, filter)) = rest.split_once(' ') else {
        return if rest.is_empty() {
            Err("it has no topic: a line is topic [read|write|readwrite|deny] FILTER".to_owned())
        } else {
            Ok((Access::ReadWrite, rest))
        };
    };
    let access = Access::parse(word).ok_or_else(|| {
        format!("{word:?} is not one of read, write, readwrite, deny; a topic with spaces needs one of them before it")
    })?;
    Ok((access, filter.trim_start_matches(' ')))
}

fn check_filter(filter: &str) -> Result<(), String> {
    if filter.starts_with('$') {
        return Err(format!("{filter:?}: topics that begin with $ have no rules; $SYS is for the role admin"));
    }
    if topic::is_chat(filter) {
        return Err(format!(
            "{filter:?}: topics below chat/ have rules of their own, and roles for those who need more"
        ));
    }
    validate_topic_filter(filter, LEVELS_MAX).map(|_| ()).map_err(|error| format!("{filter:?}: {error}"))
}

/// Whether one begins with `$` and the other with a wildcard, which does not stand for it.
fn are_apart(one: &str, other: &str) -> bool {
    let apart = |one: &str, other: &str| one.starts_with('$') && other.starts_with(['+', '#']);
    apart(one, other) || apart(other, one)
}

/// The filter of the topics that both filters match; `None` if there are none.
fn intersection(one: &str, other: &str) -> Option<String> {
    if are_apart(one, other) {
        return None;
    }
    let mut both = Vec::new();
    let (mut ones, mut others) = (one.split('/'), other.split('/'));
    loop {
        match (ones.next(), others.next()) {
            // `a/#` matches `a` too.
            (None, None) | (Some("#"), None) | (None, Some("#")) => break,
            (Some("#"), Some(level)) => {
                both.push(level);
                both.extend(others);
                break;
            }
            (Some(level), Some("#")) => {
                both.push(level);
                both.extend(ones);
                break;
            }
            (Some("+"), Some(level)) | (Some(level), Some("+")) => both.push(level),
            (Some(one), Some(other)) if one == other => both.push(one),
            _ => return None,
        }
    }
    Some(both.join("/"))
}

/// Whether a filter matches every topic that another one matches.
fn covers(wide: &str, narrow: &str) -> bool {
    if narrow.starts_with('$') && wide.starts_with(['+', '#']) {
        return false;
    }
    let (mut wides, mut narrows) = (wide.split('/'), narrow.split('/'));
    loop {
        match (wides.next(), narrows.next()) {
            (Some("#"), _) | (None, None) => return true,
            (_, Some("#")) => return false,
            (Some("+"), Some(_)) => {}
            (Some(wide), Some(narrow)) if wide == narrow => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use broker::topics::filter;
    use proptest::prelude::*;

    use super::*;

    const ALICE: Client<'_> = Client { user: "alice", client_id: "phone" };
    const BOB: Client<'_> = Client { user: "bob", client_id: "phone" };

    fn reads(acl: &Acl, client: Client<'_>, topic: &str) -> bool {
        acl.allows(client, topic, Wanted::Read)
    }

    fn writes(acl: &Acl, client: Client<'_>, topic: &str) -> bool {
        acl.allows(client, topic, Wanted::Write)
    }

    #[test]
    fn a_file_as_for_mosquitto_is_understood() {
        let acl = parse(
            "# everybody\n\
             pattern read public/#\n\
             \n\
             user alice\n\
             topic read home/+/temperature\n\
             topic write home/lamp\r\n\
             topic home/door\n\
             topic readwrite living room/tv\n\
             topic   deny   public/secret   \n\
             user bob\n\
             topic read\n\
             pattern write devices/%c/%u/#\n\
             user alice\n\
             topic read home/cellar/#\n",
        )
        .unwrap();
        for (topic, read, write) in [
            ("public/news", true, false),
            ("public", true, false),
            ("public/secret", false, false),
            ("home/kitchen/temperature", true, false),
            ("home/lamp", false, true),
            ("home/door", true, true),
            ("living room/tv", true, true),
            ("home/cellar/a/b", true, false),
            ("devices/phone/alice/x", false, true),
            ("devices/phone/bob/x", false, false),
            ("devices/laptop/alice/x", false, false),
            ("read", false, false),
            ("other", false, false),
            ("$SYS/broker/version", false, false),
        ] {
            assert_eq!((reads(&acl, ALICE, topic), writes(&acl, ALICE, topic)), (read, write), "{topic}");
        }
        assert!(reads(&acl, BOB, "public/secret"), "denied to alice only");
        assert!(reads(&acl, BOB, "read") && writes(&acl, BOB, "read"), "a word alone is the topic");
        assert!(!writes(&acl, BOB, "home/lamp"));
        assert!(acl.for_nobody().is_empty());
    }

    #[test]
    fn deny_wins_wherever_it_stands() {
        let texts = [
            "user alice\ntopic a/#\ntopic deny a/b\n",
            "user alice\ntopic deny a/b\ntopic a/b\n",
            "user alice\ntopic a/b\npattern deny +/b\npattern a/b\n",
            "pattern deny a/%c/#\npattern deny a/b\npattern readwrite #\n",
        ];
        for text in texts {
            let acl = parse(text).unwrap();
            assert!(!reads(&acl, ALICE, "a/b") && !writes(&acl, ALICE, "a/b"), "{text}");
            assert!(!acl.could_read(ALICE, "a/b"), "{text}");
        }
    }

    #[test]
    fn rules_for_clients_without_a_name_grant_nothing() {
        let acl = parse("topic read a\n# comment\ntopic write b\nuser alice\ntopic c\n").unwrap();
        assert_eq!(acl.for_nobody(), [1, 3]);
        assert!(!reads(&acl, ALICE, "a") && !writes(&acl, ALICE, "b") && reads(&acl, ALICE, "c"));
        let nameless = Client { user: "", client_id: "" };
        assert!(!reads(&acl, nameless, "a"));
    }

    /// CVE-2017-7650: a client identifier is the client's own choice.
    #[test]
    fn a_client_identifier_with_wildcards_widens_nothing() {
        let acl = parse("pattern devices/%c/#\npattern devices/x-%c\npattern own/%u\n").unwrap();
        for client_id in ["+", "#", "a/b", "+/x", "x/#", "/"] {
            let client = Client { user: "alice", client_id };
            for topic in ["devices/a/b", "devices/a", "devices/x", "devices/x-a", "devices/+", "devices/a/b/c"] {
                assert!(!reads(&acl, client, topic) && !writes(&acl, client, topic), "{client_id}: {topic}");
            }
            assert!(!acl.could_read(client, "devices/#") && !acl.could_read(client, "devices/+/b"), "{client_id}");
            assert!(reads(&acl, client, "own/alice"), "other patterns apply");
        }
        assert!(reads(&acl, ALICE, "devices/phone/x") && reads(&acl, ALICE, "devices/x-phone"));
        // And what is denied stays denied.
        let acl = parse("pattern deny a/%c\npattern a/#\n").unwrap();
        let client = Client { user: "alice", client_id: "b/c" };
        assert!(!reads(&acl, client, "a/b") && reads(&acl, client, "a/b/c"));
    }

    #[test]
    fn a_line_that_is_wrong_refuses_the_file() {
        for (wrong, part) in [
            ("topics a", "\"topics\""),
            ("TOPIC a", "begins with user, topic, pattern"),
            (" # no comment", "begins with"),
            ("topic\ta", "begins with"),
            ("topic", "no topic"),
            ("pattern   ", "no topic"),
            ("user", "user NAME"),
            ("user Bob", "user name"),
            ("user +", "user name"),
            ("user a b", "user name"),
            ("topic admin a", "\"admin\" is not one of"),
            ("topic living room", "a topic with spaces needs"),
            ("topic read a/#/b", "for the whole rest"),
            ("topic read a+", "stands for a whole level"),
            ("pattern %u+/x", "stands for a whole level"),
            ("topic read $SYS/#", "$SYS"),
            ("topic $share/g/a", "begin with $"),
            ("topic chat/bob/inbox", "chat/"),
            ("pattern read chat/%u/#", "chat/"),
            ("topic deny chat/#", "chat/"),
            ("topic read a\0b", "NUL"),
        ] {
            let (line, reason) = parse(&format!("# rules\nuser alice\n{wrong}\n")).unwrap_err();
            assert!(line == 3 && reason.contains(part), "{wrong:?}: {line}, {reason}");
        }
    }

    #[test]
    fn a_subscription_is_granted_if_it_could_bring_something() {
        let acl = parse("user alice\ntopic read home/+/x\ntopic read a/#\ntopic deny a/b/#\ntopic write w\n").unwrap();
        for (filter, could) in [
            ("#", true),
            ("+", true),
            ("+/+/+", true),
            ("home/#", true),
            ("home/kitchen/+", true),
            ("home/kitchen/y", false),
            ("home", false),
            ("a", true),
            ("a/b", false),
            ("a/b/#", false),
            ("a/b/c/d", false),
            ("a/+/c", true),
            ("w", false),
            ("$SYS/#", false),
            ("b/#", false),
        ] {
            assert_eq!(acl.could_read(ALICE, filter), could, "{filter}");
            assert!(!acl.could_read(BOB, filter));
        }
    }

    fn level() -> impl Strategy<Value = &'static str> {
        prop::sample::select(vec!["a", "b", "", "+", "alice", "phone"])
    }

    fn a_filter() -> impl Strategy<Value = String> {
        (prop::collection::vec(level(), 0..4), any::<bool>()).prop_map(|(mut levels, rest)| {
            if rest || levels.is_empty() {
                levels.push("#");
            }
            levels.join("/")
        })
    }

    fn a_topic() -> impl Strategy<Value = String> {
        prop::collection::vec(prop::sample::select(vec!["a", "b", "", "alice", "phone", "$x"]), 1..5)
            .prop_map(|levels| levels.join("/"))
            .prop_filter("a topic has a character", |topic| !topic.is_empty())
    }

    fn a_rule() -> impl Strategy<Value = String> {
        let pieces = prop::sample::select(vec!["a", "b", "", "+", "%u", "%c", "a%u", "%c%u"]);
        let filter = (prop::collection::vec(pieces, 1..4), any::<bool>()).prop_map(|(mut levels, rest)| {
            if rest {
                levels.push("#");
            }
            levels.join("/")
        });
        let access = prop::sample::select(vec!["read ", "write ", "readwrite ", "deny ", "deny ", ""]);
        let keyword = prop::sample::select(vec!["topic", "pattern"]);
        (keyword, access, filter).prop_map(|(keyword, access, filter)| format!("{keyword} {access}{filter}"))
    }

    proptest! {
        #[test]
        fn both_filters_match_what_their_intersection_does(one in a_filter(), other in a_filter(), topic in a_topic()) {
            let both = filter::matches(&one, &topic) && filter::matches(&other, &topic);
            let met = intersection(&one, &other);
            prop_assert_eq!(met.as_deref().is_some_and(|met| filter::matches(met, &topic)), both, "{:?}", met);
            if covers(&one, &other) && filter::matches(&other, &topic) {
                prop_assert!(filter::matches(&one, &topic));
            }
        }

        /// The rules as they are said, the slow way.
        #[test]
        fn rules_mean_what_they_say(
            rules in prop::collection::vec(a_rule(), 0..6),
            filter in a_filter(),
            topic in a_topic(),
            client_id in prop::sample::select(vec!["phone", "+", "#", "a/b", "a"]),
        ) {
            let text = format!("user alice\n{}", rules.join("\n"));
            let Ok(acl) = parse(&text) else { return Ok(()) };
            let client = Client { user: "alice", client_id };
            for wanted in [Wanted::Read, Wanted::Write] {
                let (mut granted, mut denied) = (false, false);
                for rule in &rules {
                    let (keyword, rest) = rule.split_once(' ').unwrap();
                    let (access, said) = parse_rule(rest).unwrap();
                    let said = if keyword == "topic" {
                        said.to_owned()
                    } else if said.contains("%c") && client_id.contains(['+', '#', '/']) {
                        if access != Access::Deny {
                            continue;
                        }
                        let levels = said.split('/').map(|level| if level.contains("%c") { "+" } else { level });
                        levels.collect::<Vec<_>>().join("/").replace("%u", "alice")
                    } else {
                        said.replace("%u", "alice").replace("%c", client_id)
                    };
                    if filter::matches(&said, &topic) {
                        denied |= access == Access::Deny;
                        granted |= access.grants(wanted);
                    }
                }
                prop_assert_eq!(acl.allows(client, &topic, wanted), granted && !denied, "{}", text);
            }
            // A subscription that is refused would have brought nothing.
            if reads(&acl, client, &topic) && filter::matches(&filter, &topic) {
                prop_assert!(acl.could_read(client, &filter), "{}", text);
            }
        }

        #[test]
        fn no_file_panics_or_opens_what_has_rules_of_its_own(text in "((topic|pattern|user|read|deny|%u|%c|chat|\\$SYS|[ /+#a\\n])|\\PC){0,60}") {
            if let Ok(acl) = parse(&text) {
                prop_assert!(!reads(&acl, ALICE, "$SYS/broker/version"));
                acl.could_read(ALICE, "#");
            }
        }
    }
}
