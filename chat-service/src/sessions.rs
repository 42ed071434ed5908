//! How many sessions each user has stored.
//!
//! Counted from memory where that is known, and from the log otherwise and before anybody is refused: what is remembered may be too high,
//! never too low. Sessions that have expired do not count, and go when they are seen. Sessions of one user are made one after another.

use std::hash::BuildHasher;
use std::sync::Arc;

use broker::service::{NotCreated, ServiceError};
use chat_protocol::UserId;
use rustc_hash::{FxBuildHasher, FxHashMap};
use tokio::sync::{Mutex, MutexGuard};

use crate::log::{Device, Log, LogError, SessionRecord};

const SHARDS: usize = 64;
/// Users whose sessions are counted in memory, in a shard; when it is full all of them are forgotten and counted again.
const USERS_MAX: usize = 4_000;
/// A session that has expired only now may just be coming back; it is removed when it has been expired for so long.
const REMOVED_AFTER_MS: u64 = 60_000;

type Counts = FxHashMap<UserId, usize>;

/// Makes sessions, as many for each user as may be.
pub struct Sessions<L> {
    log: Arc<L>,
    /// Zero: no limit.
    per_user: usize,
    shards: Vec<Mutex<Counts>>,
}

impl<L: Log> Sessions<L> {
    /// `per_user` 0: no limit.
    pub fn new(log: Arc<L>, per_user: usize) -> Self {
        Self { log, per_user, shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }

    /// Stores a session that is not stored yet.
    ///
    /// # Errors
    /// The user has too many, or the log cannot be read or written.
    pub async fn create(&self, device: &Device, record: SessionRecord, now_ms: u64) -> Result<(), NotCreated> {
        let unavailable = |error: LogError| ServiceError(error.to_string());
        if self.per_user == 0 {
            return Ok(self.log.put_session(device, record).await.map_err(unavailable)?);
        }
        let mut counts = self.shard(&device.user).await;
        let count = match counts.get(&device.user) {
            Some(count) if *count < self.per_user => *count,
            _ => self.count(&device.user, now_ms).await.map_err(unavailable)?,
        };
        if count >= self.per_user {
            let sentence = format!(
                "you have {count} sessions, of which {} is the most: connect with one of their client identifiers, or without a session \
                 that is kept",
                self.per_user
            );
            return Err(NotCreated::TooMany(sentence));
        }
        self.log.put_session(device, record).await.map_err(unavailable)?;
        if counts.len() >= USERS_MAX {
            counts.clear();
        }
        counts.insert(device.user.clone(), count + 1);
        Ok(())
    }

    /// Removes a session.
    ///
    /// # Errors
    /// The log cannot be written.
    pub async fn delete(&self, device: &Device) -> Result<(), LogError> {
        self.log.delete_session(device).await?;
        if self.per_user > 0 {
            self.shard(&device.user).await.remove(&device.user);
        }
        Ok(())
    }

    async fn shard(&self, user: &UserId) -> MutexGuard<'_, Counts> {
        // The upper bits: the map inside the shard uses the lower ones.
        let index = usize::try_from(FxBuildHasher.hash_one(user) >> 58).unwrap_or(0) % SHARDS;
        self.shards[index].lock().await
    }

    /// As the log has them, without those that have expired.
    async fn count(&self, user: &UserId, now_ms: u64) -> Result<usize, LogError> {
        let mut count = 0;
        for (device, record) in self.log.sessions(Some(user)).await? {
            if !has_expired(&record, now_ms) {
                count += 1;
            } else if has_expired(&record, now_ms.saturating_sub(REMOVED_AFTER_MS)) {
                self.log.delete_session(&device).await?;
            }
        }
        Ok(count)
    }
}

/// Whether a session outlived its expiry: its last connection ended so many seconds ago.
pub fn has_expired(record: &SessionRecord, now_ms: u64) -> bool {
    let Some(ended_at_ms) = record.ended_at_ms else { return false };
    record.expiry_s != u32::MAX && ended_at_ms.saturating_add(u64::from(record.expiry_s) * 1_000) <= now_ms
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::MemoryLog;

    fn device(client_id: &str) -> Device {
        Device { user: UserId::parse("alice").expect("a valid name"), client_id: client_id.into() }
    }

    fn record(expiry_s: u32, ended_at_ms: Option<u64>) -> SessionRecord {
        SessionRecord { expiry_s, ended_at_ms, ..SessionRecord::default() }
    }

    async fn create(sessions: &Sessions<MemoryLog>, client_id: &str, now_ms: u64) -> bool {
        match sessions.create(&device(client_id), record(u32::MAX, None), now_ms).await {
            Ok(()) => true,
            Err(NotCreated::TooMany(_)) => false,
            Err(NotCreated::Unavailable(error)) => panic!("{error}"),
        }
    }

    #[tokio::test]
    async fn so_many_and_no_more_and_again_when_one_goes() {
        let sessions = Sessions::new(Arc::new(MemoryLog::new()), 2);
        assert!(create(&sessions, "a", 0).await && create(&sessions, "b", 0).await);
        assert!(!create(&sessions, "c", 0).await);
        sessions.delete(&device("never there")).await.unwrap();
        assert!(!create(&sessions, "c", 0).await);
        sessions.delete(&device("a")).await.unwrap();
        assert!(create(&sessions, "c", 0).await && !create(&sessions, "d", 0).await);
    }

    #[tokio::test]
    async fn what_was_stored_before_counts_and_what_has_expired_does_not() {
        let log = Arc::new(MemoryLog::new());
        log.put_session(&device("old"), record(10, Some(1_000))).await.unwrap();
        log.put_session(&device("kept"), record(u32::MAX, Some(1_000))).await.unwrap();
        let sessions = Sessions::new(Arc::clone(&log), 2);
        assert!(!create(&sessions, "new", 10_999).await);
        assert!(create(&sessions, "new", 11_000).await);
        assert!(log.session(&device("old")).await.unwrap().is_some(), "it may be coming back");
        assert!(!create(&sessions, "newer", 11_000 + REMOVED_AFTER_MS).await);
        assert!(log.session(&device("old")).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn many_at_once_are_no_more() {
        let sessions = Arc::new(Sessions::new(Arc::new(MemoryLog::new()), 5));
        let creating: Vec<_> = (0..20)
            .map(|number| {
                let sessions = Arc::clone(&sessions);
                tokio::spawn(async move { create(&sessions, &number.to_string(), 0).await })
            })
            .collect();
        let mut created = 0;
        for one in creating {
            created += usize::from(one.await.unwrap());
        }
        assert_eq!(created, 5);
    }

    #[tokio::test]
    async fn zero_is_no_limit() {
        let sessions = Sessions::new(Arc::new(MemoryLog::new()), 0);
        for number in 0..300 {
            assert!(create(&sessions, &number.to_string(), 0).await);
        }
    }
}
