//! The way back of a publish to a bound topic: from the service to the connection that waits for it.
//!
//! A [`Reply`] belongs to one publish. [`complete`] answers many at once and wakes each connection once. A reply that is
//! dropped unanswered counts as [`PublishOutcome::Unknown`]: the edge closes the connection rather than acknowledge.

use std::sync::Arc;

use crate::mailbox::Mailbox;
use crate::service::PublishOutcome;

/// Where the outcome of one publish goes.
#[derive(Debug)]
pub struct Reply {
    target: Option<(Arc<Mailbox>, u64)>,
}

impl Reply {
    pub(crate) fn new(mailbox: Arc<Mailbox>, token: u64) -> Self {
        Self { target: Some((mailbox, token)) }
    }

    /// A reply that nobody waits for (a will).
    pub fn nobody() -> Self {
        Self { target: None }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some((mailbox, token)) = self.target.take() {
            mailbox.push_outcomes(std::iter::once((token, PublishOutcome::Unknown)));
        }
    }
}

/// Answers publishes, in any order. Neighbours of one connection are handed over together.
pub fn complete(outcomes: Vec<(Reply, PublishOutcome)>) {
    let mut run: Vec<(u64, PublishOutcome)> = Vec::new();
    let mut owner: Option<Arc<Mailbox>> = None;
    for (mut reply, outcome) in outcomes {
        let Some((mailbox, token)) = reply.target.take() else { continue };
        match &owner {
            Some(current) if Arc::ptr_eq(current, &mailbox) => {}
            _ => {
                if let Some(previous) = owner.replace(mailbox) {
                    previous.push_outcomes(run.drain(..));
                }
            }
        }
        run.push((token, outcome));
    }
    if let Some(last) = owner {
        last.push_outcomes(run.drain(..));
    }
}
