//! Which slots of a Cluster refused lately: they are asked first.
//!
//! A call over several slots charges one after the other, and takes back what it charged when a later one refuses. In
//! between others see that charge, and may be refused by it although there is room. Asked first, who refuses has
//! nothing before it to take back.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// What refused so long ago may have room again.
const LATELY: Duration = Duration::from_secs(1);
/// Slots remembered; past that all are forgotten, which costs calls that are taken back.
const TAGS_MAX: usize = 16_384;

#[derive(Debug, Default)]
pub(super) struct RecentRefusals(Mutex<HashMap<String, Instant>>);

impl RecentRefusals {
    /// Something with this tag has just refused.
    pub(super) fn note(&self, tag: &str) {
        let mut tags = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = tags.get_mut(tag) {
            *at = Instant::now();
            return;
        }
        if tags.len() >= TAGS_MAX {
            tags.clear();
        }
        tags.insert(tag.to_owned(), Instant::now());
    }

    /// Whether something with this tag refused within the last second.
    pub(super) fn lately(&self, tag: &str) -> bool {
        let tags = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tags.get(tag).is_some_and(|at| at.elapsed() < LATELY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_remembered_for_a_second() {
        let refused = RecentRefusals::default();
        refused.note("t:acme");
        assert!(refused.lately("t:acme") && !refused.lately("t:other"));
        tokio::time::advance(LATELY).await;
        assert!(!refused.lately("t:acme"));
    }
}
