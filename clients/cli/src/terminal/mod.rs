//! The chat in the terminal.
//!
//! The way of what happens: [`mod@run`] brings keys, events and answers to the [`model`], which decides and says what is to be done; [`layout`] says what goes where,
//! [`view`] draws it. Only `run` touches the terminal and the network, and only it knows what time it is.

mod clock;
mod compose;
mod conversation;
mod drafts;
mod keys;
mod layout;
mod model;
mod repaint;
mod run;
mod search;
#[cfg(test)]
mod tests;
mod timeline;
mod view;
mod wrap;

use std::time::Instant;

pub(crate) use run::run;

/// The time at which something happens.
#[derive(Clone, Copy, Debug)]
struct Now {
    /// For waiting.
    instant: Instant,
    /// For showing: milliseconds since the Unix epoch.
    wall_ms: u64,
}
