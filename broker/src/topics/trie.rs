//! Who subscribes to a topic: filters as a tree of levels.
//!
//! Matching looks only at branches that can match. A node lives as long as something is below it: clients that come and go leave nothing
//! behind.

use std::collections::hash_map::Entry;
use std::hash::Hash;

use rustc_hash::FxHashMap;

type NodeId = usize;

#[derive(Debug)]
struct Node<K, O> {
    /// Filters that end here.
    here: FxHashMap<K, O>,
    /// Filters that end here with `#`.
    rest: FxHashMap<K, O>,
    children: FxHashMap<Box<str>, NodeId>,
    /// The child for `+`.
    any: Option<NodeId>,
}

impl<K, O> Default for Node<K, O> {
    fn default() -> Self {
        Self { here: FxHashMap::default(), rest: FxHashMap::default(), children: FxHashMap::default(), any: None }
    }
}

impl<K, O> Node<K, O> {
    fn is_empty(&self) -> bool {
        self.here.is_empty() && self.rest.is_empty() && self.children.is_empty() && self.any.is_none()
    }
}

/// Subscriptions by filter: of each subscriber `K` the options `O`.
#[derive(Debug)]
pub struct SubscriptionTrie<K, O> {
    /// Nodes by number; the root is 0. Free places are listed, so removing frees memory without recursion.
    nodes: Vec<Node<K, O>>,
    free: Vec<NodeId>,
}

impl<K, O> Default for SubscriptionTrie<K, O> {
    fn default() -> Self {
        Self { nodes: vec![Node::default()], free: Vec::new() }
    }
}

impl<K: Copy + Eq + Hash, O> SubscriptionTrie<K, O> {
    /// No subscriptions.
    pub fn new() -> Self {
        Self::default()
    }

    /// Subscribes to a valid filter; gives the options that were there before.
    pub fn insert(&mut self, filter: &str, key: K, options: O) -> Option<O> {
        let mut at = 0;
        for level in filter.split('/') {
            match level {
                "#" => return self.nodes[at].rest.insert(key, options),
                "+" => {
                    at = match self.nodes[at].any {
                        Some(next) => next,
                        None => {
                            let next = self.new_node();
                            self.nodes[at].any = Some(next);
                            next
                        }
                    };
                }
                level => {
                    at = match self.nodes[at].children.get(level) {
                        Some(next) => *next,
                        None => {
                            let next = self.new_node();
                            self.nodes[at].children.insert(level.into(), next);
                            next
                        }
                    };
                }
            }
        }
        self.nodes[at].here.insert(key, options)
    }

    /// Unsubscribes; gives the options that were there.
    pub fn remove(&mut self, filter: &str, key: &K) -> Option<O> {
        let mut path: Vec<(NodeId, &str)> = Vec::new();
        let mut at = 0;
        let mut rest = false;
        for level in filter.split('/') {
            let next = match level {
                "#" => {
                    rest = true;
                    break;
                }
                "+" => self.nodes[at].any,
                level => self.nodes[at].children.get(level).copied(),
            }?;
            path.push((at, level));
            at = next;
        }
        let subscribers = if rest { &mut self.nodes[at].rest } else { &mut self.nodes[at].here };
        let removed = subscribers.remove(key)?;
        while let Some((parent, level)) = path.pop() {
            if !self.nodes[at].is_empty() {
                break;
            }
            if level == "+" {
                self.nodes[parent].any = None;
            } else if let Entry::Occupied(child) = self.nodes[parent].children.entry(level.into()) {
                child.remove();
            }
            // A fresh node, not a cleared one: its maps give their memory back.
            self.nodes[at] = Node::default();
            self.free.push(at);
            at = parent;
        }
        if self.free.len() + 1 == self.nodes.len() {
            self.nodes.truncate(1);
            self.nodes.shrink_to_fit();
            self.free = Vec::new();
        }
        Some(removed)
    }

    /// Calls `found` for every subscription whose filter matches a valid name; a subscriber with several such filters is found several times.
    pub fn matching(&self, topic: &str, found: &mut impl FnMut(&K, &O)) {
        let wildcards_match = !topic.starts_with('$');
        // At each level a node leads to at most two: the work is bounded by the filters that share the topic's levels.
        let mut nodes: Vec<NodeId> = vec![0];
        let mut next: Vec<NodeId> = Vec::new();
        for (depth, level) in topic.split('/').enumerate() {
            let wildcards = depth > 0 || wildcards_match;
            for at in nodes.drain(..) {
                let node = &self.nodes[at];
                if wildcards {
                    node.rest.iter().for_each(|(key, options)| found(key, options));
                    next.extend(node.any);
                }
                next.extend(node.children.get(level));
            }
            if next.is_empty() {
                return;
            }
            std::mem::swap(&mut nodes, &mut next);
        }
        for at in nodes {
            let node = &self.nodes[at];
            node.here.iter().for_each(|(key, options)| found(key, options));
            // `a/#` matches `a` too.
            node.rest.iter().for_each(|(key, options)| found(key, options));
        }
    }

    /// Nodes in use, the root among them.
    pub fn node_count(&self) -> usize {
        self.nodes.len() - self.free.len()
    }

    fn new_node(&mut self) -> NodeId {
        match self.free.pop() {
            Some(id) => id,
            None => {
                self.nodes.push(Node::default());
                self.nodes.len() - 1
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::topics::filter;

    fn found(trie: &SubscriptionTrie<u64, u8>, topic: &str) -> Vec<u64> {
        let mut keys = Vec::new();
        trie.matching(topic, &mut |key, _| keys.push(*key));
        keys.sort_unstable();
        keys
    }

    #[test]
    fn thousands_of_levels_cost_no_stack() {
        let mut trie = SubscriptionTrie::new();
        let deep = vec!["+"; 30_000].join("/");
        trie.insert(&deep, 1, 0);
        assert_eq!(found(&trie, &vec!["a"; 30_000].join("/")), [1]);
        trie.remove(&deep, &1);
        assert_eq!(trie.node_count(), 1);
    }

    proptest! {
        #[test]
        fn the_trie_finds_what_matches(
            filters in prop::collection::vec("([ab$]?|\\+)(/([ab]?|\\+)){0,3}(/#)?|#", 0..12),
            removed in prop::collection::vec(any::<bool>(), 12),
            topics in prop::collection::vec("[ab$]?(/[ab]?){0,4}", 0..12),
        ) {
            let mut trie = SubscriptionTrie::new();
            for (key, filter) in filters.iter().enumerate() {
                prop_assert_eq!(trie.insert(filter, key as u64, 0), None);
            }
            let gone = |key: usize| removed[key];
            for (key, filter) in filters.iter().enumerate().filter(|(key, _)| gone(*key)) {
                prop_assert_eq!(trie.remove(filter, &(key as u64)), Some(0));
                prop_assert_eq!(trie.remove(filter, &(key as u64)), None);
            }
            for topic in &topics {
                let expected: Vec<u64> = filters
                    .iter()
                    .enumerate()
                    .filter(|(key, filter)| !gone(*key) && filter::matches(filter, topic))
                    .map(|(key, _)| key as u64)
                    .collect();
                prop_assert_eq!(found(&trie, topic), expected, "{}", topic);
            }
            for (key, filter) in filters.iter().enumerate().filter(|(key, _)| !gone(*key)) {
                trie.remove(filter, &(key as u64));
            }
            prop_assert_eq!(trie.node_count(), 1);
        }
    }
}
