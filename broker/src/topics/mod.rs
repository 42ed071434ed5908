//! Ordinary topics: which filters match a name, who subscribes, what is retained.
//!
//! Everything here is iterative and bounded by the levels of one topic: a client chooses names and filters, and must not choose the stack
//! or the time that they cost.

pub mod filter;
pub mod message;
pub mod retained;
pub mod trie;
