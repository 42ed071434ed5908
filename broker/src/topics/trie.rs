//! Who subscribes to what: topic filters by level, so that a publish looks at the filters that could match and no others.
//!
//! Nodes stand in one vector and point by index, so nothing recurses, not even dropping. A node without subscribers and children is freed
//! at once. Work for a topic: at most one step per node, and per level at most twice the steps of the level before.

use std::collections::HashMap;
use std::hash::Hash;

use super::filter;

const ROOT: usize = 0;

/// Subscriptions by filter and subscriber. Filters have to be valid and unshared.
#[derive(Clone, Debug)]
pub struct SubscriptionTrie<K, O> {
    nodes: Vec<Node<K, O>>,
    /// Indices of nodes that are not in use.
    free: Vec<usize>,
    subscriptions: usize,
}

/// One level of some filters. What clients choose (levels) is hashed with a random key.
#[derive(Clone, Debug)]
struct Node<K, O> {
    children: HashMap<Box<str>, usize>,
    /// The child under `+`.
    plus: Option<usize>,
    /// Filters that end here.
    here: HashMap<K, O>,
    /// Filters that end with `#` below here.
    below: HashMap<K, O>,
}

impl<K, O> Default for Node<K, O> {
    fn default() -> Self {
        Self { children: HashMap::new(), plus: None, here: HashMap::new(), below: HashMap::new() }
    }
}

impl<K, O> Node<K, O> {
    fn is_empty(&self) -> bool {
        self.children.is_empty() && self.plus.is_none() && self.here.is_empty() && self.below.is_empty()
    }

    fn child(&self, level: &str) -> Option<usize> {
        if level == "+" { self.plus } else { self.children.get(level).copied() }
    }
}

impl<K: Copy + Eq + Hash, O: Clone> Default for SubscriptionTrie<K, O> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K: Copy + Eq + Hash, O: Clone> SubscriptionTrie<K, O> {
    /// No subscriptions.
    pub fn new() -> Self {
        Self { nodes: vec![Node::default()], free: Vec::new(), subscriptions: 0 }
    }

    /// How many subscriptions there are.
    pub fn len(&self) -> usize {
        self.subscriptions
    }

    /// Levels that are kept for them, the root included.
    pub fn levels(&self) -> usize {
        self.nodes.len() - self.free.len()
    }

    /// Whether nobody subscribes.
    pub fn is_empty(&self) -> bool {
        self.subscriptions == 0
    }

    /// Subscribes. `Some` are the options of the same subscriber's subscription to the same filter, which this one replaces.
    pub fn insert(&mut self, filter: &str, key: K, options: O) -> Option<O> {
        let (parents, below) = split(filter);
        let mut node = ROOT;
        for level in parents {
            node = match self.nodes[node].child(level) {
                Some(child) => child,
                None => self.grow(node, level),
            };
        }
        let node = &mut self.nodes[node];
        let replaced = if below { &mut node.below } else { &mut node.here }.insert(key, options);
        self.subscriptions += usize::from(replaced.is_none());
        replaced
    }

    /// Ends a subscription; `None` if there was none.
    pub fn remove(&mut self, filter: &str, key: &K) -> Option<O> {
        let (levels, below) = split(filter);
        let mut way = Vec::new();
        let mut node = ROOT;
        for level in levels {
            way.push((node, level));
            node = self.nodes[node].child(level)?;
        }
        let end = &mut self.nodes[node];
        let subscribers = if below { &mut end.below } else { &mut end.here };
        let removed = subscribers.remove(key)?;
        shrink(subscribers);
        self.subscriptions -= 1;
        while let Some((parent, level)) = way.pop() {
            if !self.nodes[node].is_empty() {
                break;
            }
            self.nodes[node] = Node::default();
            self.free.push(node);
            let parent_node = &mut self.nodes[parent];
            if level == "+" {
                parent_node.plus = None;
            } else {
                parent_node.children.remove(level);
                shrink(&mut parent_node.children);
            }
            node = parent;
        }
        if self.subscriptions == 0 {
            *self = Self::new();
        }
        Some(removed)
    }

    /// Visits every subscription whose filter matches the name, in no order; a subscriber as often as filters of its match.
    pub fn matching(&self, topic: &str, visit: &mut impl FnMut(&K, &O)) {
        self.reach(topic, &mut |subscribers| subscribers.iter().for_each(|(key, options)| visit(key, options)));
    }

    /// The subscribers of each level that a filter which matches the name ends in.
    fn reach(&self, topic: &str, visit_all: &mut impl FnMut(&HashMap<K, O>)) {
        // Wildcards in the first level do not match names that begin with `$` [MQTT-4.7.2-1].
        let mut wildcards = !topic.starts_with('$');
        let mut reached = vec![ROOT];
        let mut next = Vec::new();
        for level in topic.split('/') {
            for node in reached.drain(..) {
                let node = &self.nodes[node];
                if wildcards {
                    visit_all(&node.below);
                    next.extend(node.plus);
                }
                next.extend(node.children.get(level));
            }
            wildcards = true;
            std::mem::swap(&mut reached, &mut next);
            if reached.is_empty() {
                return;
            }
        }
        for node in reached {
            let node = &self.nodes[node];
            visit_all(&node.here);
            // `a/#` matches `a`.
            visit_all(&node.below);
        }
    }

    /// Levels and subscriptions that [`SubscriptionTrie::matching`] comes to for this name. Does not look at the subscriptions themselves.
    pub fn work(&self, topic: &str) -> usize {
        let mut work = 0;
        self.reach(topic, &mut |subscribers| work += 1 + subscribers.len());
        work
    }

    fn grow(&mut self, parent: usize, level: &str) -> usize {
        let node = self.free.pop().unwrap_or_else(|| {
            self.nodes.push(Node::default());
            self.nodes.len() - 1
        });
        let parent = &mut self.nodes[parent];
        if level == "+" {
            parent.plus = Some(node);
        } else {
            parent.children.insert(level.into(), node);
        }
        node
    }
}

/// The levels before a trailing `#`, and whether there was one.
fn split(filter: &str) -> (impl Iterator<Item = &str>, bool) {
    debug_assert!(filter::validate_topic_filter(filter, usize::MAX) == Ok(None), "not a plain filter: {filter:?}");
    let (levels, below) = match filter.strip_suffix('#') {
        Some("") => (None, true),
        Some(parents) => (Some(parents.strip_suffix('/').unwrap_or(parents)), true),
        None => (Some(filter), false),
    };
    (levels.into_iter().flat_map(|levels| levels.split('/')), below)
}

/// Gives memory back when three quarters of a map are empty; amortised over the removals that emptied it.
fn shrink<A: Eq + Hash, B>(map: &mut HashMap<A, B>) {
    if map.len() < map.capacity() / 4 {
        map.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matching(trie: &SubscriptionTrie<u8, u8>, topic: &str) -> Vec<(u8, u8)> {
        let mut found = Vec::new();
        trie.matching(topic, &mut |key, options| found.push((*key, *options)));
        found.sort_unstable();
        found
    }

    #[test]
    fn a_subscription_is_replaced_and_removed() {
        let mut trie = SubscriptionTrie::new();
        assert_eq!(trie.insert("a/+", 1, 10), None);
        assert_eq!(trie.insert("a/+", 1, 11), Some(10));
        assert_eq!(trie.insert("a/#", 1, 12), None);
        assert_eq!(trie.insert("a/+", 2, 20), None);
        assert_eq!(trie.len(), 3);
        assert_eq!(matching(&trie, "a/b"), [(1, 11), (1, 12), (2, 20)]);
        assert_eq!(matching(&trie, "a"), [(1, 12)]);
        assert_eq!(trie.remove("a/b", &1), None);
        assert_eq!(trie.remove("a/+", &3), None);
        assert_eq!(trie.remove("a/+", &1), Some(11));
        assert_eq!(trie.remove("a/+", &1), None);
        assert_eq!(matching(&trie, "a/b"), [(1, 12), (2, 20)]);
    }

    #[test]
    fn work_is_what_is_looked_at() {
        let mut trie = SubscriptionTrie::new();
        assert!(trie.work("a/b") < 3);
        for key in 0..100 {
            trie.insert("a/+", key, 0);
            trie.insert("#", key, 0);
            trie.insert("other/#", key, 0);
        }
        assert!((200..210).contains(&trie.work("a/b")), "{}", trie.work("a/b"));
        assert!((100..105).contains(&trie.work("c")), "{}", trie.work("c"));
    }

    #[test]
    fn leading_wildcards_do_not_see_server_topics() {
        let mut trie = SubscriptionTrie::new();
        for (key, filter) in ["#", "+/b", "$a/b", "$a/#", "$a/+"].into_iter().enumerate() {
            trie.insert(filter, u8::try_from(key).expect("few"), 0);
        }
        assert_eq!(matching(&trie, "$a/b").iter().map(|(key, _)| *key).collect::<Vec<_>>(), [2, 3, 4]);
        assert_eq!(matching(&trie, "a/b").iter().map(|(key, _)| *key).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn nothing_is_left_of_what_is_gone() {
        let mut trie = SubscriptionTrie::new();
        trie.insert("keep/it", 0, 0);
        let filters: Vec<String> = (0..500).map(|n| format!("{}/+/{n}/ü/#", n % 7)).collect();
        for filter in &filters {
            trie.insert(filter, 1, 1);
        }
        let in_use = trie.nodes.len();
        for filter in &filters {
            assert_eq!(trie.remove(filter, &1), Some(1));
        }
        assert_eq!(trie.nodes.len() - trie.free.len(), 3, "the root and two levels");
        for filter in &filters {
            trie.insert(filter, 1, 1);
        }
        assert_eq!(trie.nodes.len(), in_use, "freed nodes are used again");
        for filter in &filters {
            trie.remove(filter, &1);
        }
        trie.remove("keep/it", &0);
        assert_eq!((trie.nodes.len(), trie.free.len(), trie.len()), (1, 0, 0));
    }

    #[test]
    fn thousands_of_levels_are_only_slow() {
        let mut trie = SubscriptionTrie::new();
        let deep = "/".repeat(65_000);
        trie.insert(&deep, 1, 1);
        trie.insert(&"+/".repeat(30_000), 1, 2);
        assert_eq!(matching(&trie, &deep), [(1, 1)]);
        drop(trie.clone());
        assert_eq!(trie.remove(&deep, &1), Some(1));
    }

    fn level() -> impl Strategy<Value = String> {
        prop_oneof![Just("a"), Just("b"), Just(""), Just("$a"), Just("ü")].prop_map(str::to_owned)
    }

    fn topic() -> impl Strategy<Value = String> {
        prop::collection::vec(level(), 1..5)
            .prop_map(|levels| levels.join("/"))
            .prop_filter("never empty", |topic| !topic.is_empty())
    }

    fn topic_filter() -> impl Strategy<Value = String> {
        let level = prop_oneof![3 => level(), 2 => Just("+".to_owned())];
        (prop::collection::vec(level, 0..5), any::<bool>())
            .prop_map(|(mut levels, below)| {
                if below {
                    levels.push("#".to_owned());
                }
                levels.join("/")
            })
            .prop_filter("never empty", |filter| !filter.is_empty())
    }

    proptest! {
        #[test]
        fn the_trie_finds_what_matches(
            changes in prop::collection::vec((topic_filter(), 0u8..3, any::<u8>(), any::<bool>()), 0..40),
            topics in prop::collection::vec(topic(), 1..10),
        ) {
            let mut trie = SubscriptionTrie::new();
            let mut model: HashMap<(String, u8), u8> = HashMap::new();
            for (filter, key, options, insert) in changes {
                if insert {
                    prop_assert_eq!(trie.insert(&filter, key, options), model.insert((filter, key), options));
                } else {
                    prop_assert_eq!(trie.remove(&filter, &key), model.remove(&(filter, key)));
                }
            }
            prop_assert_eq!(trie.len(), model.len());
            for topic in topics {
                let mut expected: Vec<(u8, u8)> = model
                    .iter()
                    .filter(|((filter, _), _)| filter::matches(filter, &topic))
                    .map(|((_, key), options)| (*key, *options))
                    .collect();
                expected.sort_unstable();
                prop_assert_eq!(matching(&trie, &topic), expected);
            }
            for (filter, key) in model.into_keys() {
                prop_assert!(trie.remove(&filter, &key).is_some());
            }
            prop_assert_eq!(trie.nodes.len(), 1);
        }
    }
}
