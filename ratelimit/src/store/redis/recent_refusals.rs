//! Hash slots of a Redis Cluster that refused within the last second. The limiter asks them first.
//!
//! A call over several hash slots charges one after the other and takes its charges back when a later one refuses. Until
//! then other calls see the charge and may be refused although there is room. If the refusing slot is asked first, no
//! charge has to be taken back.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use weir_runtime::RecentMap;

/// After this time a hash slot may have room again.
const LATELY: Duration = Duration::from_secs(1);
/// Hash tags remembered. A forgotten one costs calls whose charges are taken back.
const TAGS_MAX: usize = 16_384;

#[derive(Debug)]
pub(super) struct RecentRefusals(Mutex<RecentMap<Arc<str>, ()>>);

impl Default for RecentRefusals {
    fn default() -> Self {
        Self(Mutex::new(RecentMap::new(TAGS_MAX, LATELY)))
    }
}

impl RecentRefusals {
    /// Records a refusal by a key with this hash tag.
    pub(super) fn note(&self, tag: &str) {
        let (mut tags, now) = (self.0.lock().unwrap_or_else(PoisonError::into_inner), Instant::now());
        if !tags.touch(tag, now) {
            tags.insert(tag.into(), (), now);
        }
    }

    /// Whether a key with this hash tag refused within the last second.
    pub(super) fn lately(&self, tag: &str) -> bool {
        let tags = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tags.get(tag, Instant::now()).is_some()
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
