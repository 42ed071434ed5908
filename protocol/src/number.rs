//! Numbers with a meaning: a place in a conversation, a time.

use std::fmt;
use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

/// An entry's place in its conversation: 1, 2, 3, … without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seq(NonZeroU64);

impl Seq {
    /// The first entry's.
    pub const FIRST: Seq = Seq(NonZeroU64::MIN);

    /// `None` for 0.
    pub fn new(seq: u64) -> Option<Self> {
        NonZeroU64::new(seq).map(Self)
    }

    /// As a number.
    pub fn get(self) -> u64 {
        self.0.get()
    }

    /// The next entry's. At `u64::MAX` it stays: a million messages a second would take half a million years to get there.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A time on the server's clock, in milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(u64);

impl Timestamp {
    /// From milliseconds since the Unix epoch.
    pub fn from_ms(ms: u64) -> Self {
        Self(ms)
    }

    /// Milliseconds since the Unix epoch.
    pub fn as_ms(self) -> u64 {
        self.0
    }
}
