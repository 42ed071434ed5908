//! How many distinct ordinary filters each user has, over all their sessions.
//!
//! Each makes every publish dearer for everybody. Whoever puts a filter into the trie counts it here, and takes it off when it goes. A
//! user without filters is not remembered.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

/// The filters by user, each with the number of sessions that have it.
#[derive(Debug)]
pub(crate) struct UserFilters {
    /// Zero: no limit.
    max: usize,
    users: Mutex<HashMap<Arc<str>, HashMap<String, usize>>>,
}

/// The user has as many distinct filters as may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("all your sessions together may have {max} different filters outside chat/")]
pub(crate) struct FiltersFull {
    max: usize,
}

impl UserFilters {
    pub(crate) fn new(max: usize) -> Self {
        Self { max, users: Mutex::default() }
    }

    /// One more session has it, unless that would be one filter too many.
    pub(crate) fn add(&self, user: &Arc<str>, filter: &str) -> Result<(), FiltersFull> {
        let mut users = self.users.lock();
        if let Some(filters) = users.get(user)
            && self.max > 0
            && filters.len() >= self.max
            && !filters.contains_key(filter)
        {
            return Err(FiltersFull { max: self.max });
        }
        *users.entry(Arc::clone(user)).or_default().entry(filter.to_owned()).or_default() += 1;
        Ok(())
    }

    /// One more session has it, as it had before.
    pub(crate) fn restore(&self, user: &Arc<str>, filter: &str) {
        *self.users.lock().entry(Arc::clone(user)).or_default().entry(filter.to_owned()).or_default() += 1;
    }

    /// A session has it no more.
    pub(crate) fn remove(&self, user: &str, filter: &str) {
        let mut users = self.users.lock();
        let Some(filters) = users.get_mut(user) else { return };
        if let Some(sessions) = filters.get_mut(filter) {
            *sessions -= 1;
            if *sessions == 0 {
                filters.remove(filter);
            }
        }
        if filters.is_empty() {
            users.remove(user);
        }
    }

    /// Of all users.
    pub(crate) fn len(&self) -> usize {
        self.users.lock().values().map(HashMap::len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distinct_filters_count_once() {
        let filters = UserFilters::new(2);
        let (alice, bob): (Arc<str>, Arc<str>) = ("alice".into(), "bob".into());
        for _ in 0..3 {
            assert_eq!(filters.add(&alice, "a/#"), Ok(()));
        }
        assert_eq!(filters.add(&alice, "b"), Ok(()));
        assert_eq!(filters.add(&alice, "c"), Err(FiltersFull { max: 2 }));
        assert_eq!(filters.add(&alice, "b"), Ok(()), "another session may have the same");
        assert_eq!(filters.add(&bob, "c"), Ok(()), "another user has their own");
        filters.restore(&alice, "what was there before");
        filters.remove("alice", "what was there before");
        filters.remove("alice", "b");
        assert_eq!(filters.add(&alice, "c"), Err(FiltersFull { max: 2 }));
        filters.remove("alice", "b");
        assert_eq!(filters.add(&alice, "c"), Ok(()));
    }

    #[test]
    fn nothing_is_left_behind() {
        let filters = UserFilters::new(0);
        let alice: Arc<str> = "alice".into();
        for filter in 0..100 {
            filters.add(&alice, &filter.to_string()).expect("zero is no limit");
        }
        for filter in 0..100 {
            filters.remove("alice", &filter.to_string());
        }
        filters.remove("alice", "never there");
        assert_eq!((filters.len(), filters.users.lock().len()), (0, 0));
    }
}
