//! How many ordinary subscriptions each user has, over all their sessions, and to how many distinct filters.
//!
//! Each makes every publish dearer for everybody. Whoever puts a filter into the trie counts it here, and takes it off when it goes. A
//! user without filters is not remembered.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

/// The filters by user.
#[derive(Debug)]
pub(crate) struct UserFilters {
    /// Zero: no limit.
    filters_max: usize,
    /// Zero: no limit.
    subscriptions_max: usize,
    users: Mutex<HashMap<Arc<str>, OfUser>>,
}

#[derive(Debug, Default)]
struct OfUser {
    /// Each with the number of sessions that have it.
    filters: HashMap<String, usize>,
    /// The sum of those numbers.
    subscriptions: usize,
}

/// The user has as many as may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FiltersFull {
    #[error("all your sessions together may have {max} different filters outside chat/")]
    Filters { max: usize },
    #[error("all your sessions together may have {max} subscriptions outside chat/")]
    Subscriptions { max: usize },
}

impl FiltersFull {
    /// The setting that says so.
    pub(crate) fn limit(self) -> &'static str {
        match self {
            Self::Filters { .. } => "filters_per_user",
            Self::Subscriptions { .. } => "subscriptions_per_user",
        }
    }
}

impl UserFilters {
    pub(crate) fn new(filters_max: usize, subscriptions_max: usize) -> Self {
        Self { filters_max, subscriptions_max, users: Mutex::default() }
    }

    /// One more session has it, unless that would be one too many.
    pub(crate) fn add(&self, user: &Arc<str>, filter: &str) -> Result<(), FiltersFull> {
        let mut users = self.users.lock();
        if let Some(OfUser { filters, subscriptions }) = users.get(user) {
            let (max, is_new) = (self.filters_max, !filters.contains_key(filter));
            if max > 0 && filters.len() >= max && is_new {
                return Err(FiltersFull::Filters { max });
            }
            let max = self.subscriptions_max;
            if max > 0 && *subscriptions >= max {
                return Err(FiltersFull::Subscriptions { max });
            }
        }
        users.entry(Arc::clone(user)).or_default().add(filter);
        Ok(())
    }

    /// One more session has it, as it had before.
    pub(crate) fn restore(&self, user: &Arc<str>, filter: &str) {
        self.users.lock().entry(Arc::clone(user)).or_default().add(filter);
    }

    /// A session has it no more.
    pub(crate) fn remove(&self, user: &str, filter: &str) {
        let mut users = self.users.lock();
        let Some(of_user) = users.get_mut(user) else { return };
        if let Some(sessions) = of_user.filters.get_mut(filter) {
            *sessions -= 1;
            if *sessions == 0 {
                of_user.filters.remove(filter);
            }
            of_user.subscriptions -= 1;
        }
        if of_user.filters.is_empty() {
            users.remove(user);
        }
    }

    /// Distinct ones, of all users.
    pub(crate) fn len(&self) -> usize {
        self.users.lock().values().map(|of_user| of_user.filters.len()).sum()
    }
}

impl OfUser {
    fn add(&mut self, filter: &str) {
        *self.filters.entry(filter.to_owned()).or_default() += 1;
        self.subscriptions += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distinct_filters_count_once() {
        let filters = UserFilters::new(2, 0);
        let (alice, bob): (Arc<str>, Arc<str>) = ("alice".into(), "bob".into());
        for _ in 0..3 {
            assert_eq!(filters.add(&alice, "a/#"), Ok(()));
        }
        assert_eq!(filters.add(&alice, "b"), Ok(()));
        assert_eq!(filters.add(&alice, "c"), Err(FiltersFull::Filters { max: 2 }));
        assert_eq!(filters.add(&alice, "b"), Ok(()), "another session may have the same");
        assert_eq!(filters.add(&bob, "c"), Ok(()), "another user has their own");
        filters.restore(&alice, "what was there before");
        filters.remove("alice", "what was there before");
        filters.remove("alice", "b");
        assert_eq!(filters.add(&alice, "c"), Err(FiltersFull::Filters { max: 2 }));
        filters.remove("alice", "b");
        assert_eq!(filters.add(&alice, "c"), Ok(()));
    }

    #[test]
    fn the_same_filter_counts_for_each_session_that_has_it() {
        let filters = UserFilters::new(0, 3);
        let alice: Arc<str> = "alice".into();
        for filter in ["a", "a", "b"] {
            assert_eq!(filters.add(&alice, filter), Ok(()));
        }
        assert_eq!(filters.add(&alice, "a"), Err(FiltersFull::Subscriptions { max: 3 }));
        filters.restore(&alice, "b");
        filters.remove("alice", "never there");
        filters.remove("alice", "b");
        assert_eq!(filters.add(&alice, "a"), Err(FiltersFull::Subscriptions { max: 3 }));
        filters.remove("alice", "a");
        assert_eq!(filters.add(&alice, "c"), Ok(()));
    }

    #[test]
    fn nothing_is_left_behind() {
        let filters = UserFilters::new(0, 0);
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
