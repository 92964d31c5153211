//! Which lease sets this process has prolonged lately.
//!
//! A lease set must outlive its leases and not its last user. To say so on every admission costs a command; the script
//! does it when the set was empty, and when it is told to, which is at least once in [`EVERY`] per set and process.
//! Each time the set is given two minutes, so it never has less than one and a half left for the next lease.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::model::key::Key;

/// Between two times a set is prolonged.
const EVERY: Duration = Duration::from_secs(30);
/// Leases that live longer prolong their sets every time.
const LEASE_LIFE_MAX: Duration = Duration::from_secs(60);
/// Sets remembered; past that all are forgotten, which costs one command each.
const SETS_MAX: usize = 16_384;

#[derive(Debug, Default)]
pub(super) struct ProlongedSets(Mutex<HashMap<Key, Instant>>);

impl ProlongedSets {
    /// Whether the next call must prolong this set.
    pub(super) fn is_due(&self, key: &Key, lease_ttl: Duration) -> bool {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(key).copied();
        lease_ttl > LEASE_LIFE_MAX || last.is_none_or(|at| at.elapsed() >= EVERY)
    }

    /// A call that was sent at `at` has prolonged it.
    pub(super) fn done(&self, key: &Key, at: Instant) {
        let mut sets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if sets.len() >= SETS_MAX {
            sets.clear();
        }
        sets.insert(key.clone(), at);
    }
}
