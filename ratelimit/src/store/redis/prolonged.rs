//! Lease sets whose expiry in Redis this process has extended within the last [`EVERY`].
//!
//! A lease set must outlive its leases. Extending its expiry on every admission would cost a command each time. So the
//! script extends it when the set was empty and when the call asks for it, which each process does at least once per
//! [`EVERY`] and set. The new expiry is two minutes, so a set never has less than one and a half left for the next lease.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use weir_runtime::RecentMap;

use crate::model::key::Key;

/// Between two extensions of a set's expiry.
const EVERY: Duration = Duration::from_secs(30);
/// Leases that live longer extend the expiry of their sets every time.
const LEASE_LIFE_MAX: Duration = Duration::from_secs(60);
/// Sets remembered. A forgotten one costs one more command.
const SETS_MAX: usize = 16_384;

#[derive(Debug)]
pub(super) struct ProlongedSets(Mutex<RecentMap<Key, ()>>);

impl Default for ProlongedSets {
    fn default() -> Self {
        Self(Mutex::new(RecentMap::new(SETS_MAX, EVERY)))
    }
}

impl ProlongedSets {
    /// Whether the next call must extend the expiry of this set.
    pub(super) fn is_due(&self, key: &Key, lease_ttl: Duration) -> bool {
        let sets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lease_ttl > LEASE_LIFE_MAX || sets.get(key, Instant::now()).is_none()
    }

    /// Records that a call sent at `at` has extended it.
    pub(super) fn done(&self, key: &Key, at: Instant) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone(), (), at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_set_is_extended_again_after_thirty_seconds_and_always_for_long_leases() {
        let (sets, key) = (ProlongedSets::default(), Key::backend_slots("b"));
        let lease_ttl = Duration::from_secs(15);
        assert!(sets.is_due(&key, lease_ttl));
        sets.done(&key, Instant::now());
        assert!(!sets.is_due(&key, lease_ttl) && sets.is_due(&key, LEASE_LIFE_MAX * 2));
        tokio::time::advance(EVERY).await;
        assert!(sets.is_due(&key, lease_ttl));
    }
}
