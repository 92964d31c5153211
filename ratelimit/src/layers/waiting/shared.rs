//! The queues that all callers of one process share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::policy::OFFER;
use super::queue::{QueueId, Queues};
use crate::model::key::Key;
use crate::model::limits::ScopeLimits;

/// The queues of one process. All of its callers share them.
#[derive(Debug)]
pub struct Waiting {
    epoch: Instant,
    queues: Mutex<Queues<Arc<Notify>>>,
}

impl Default for Waiting {
    fn default() -> Self {
        Self { epoch: Instant::now(), queues: Mutex::default() }
    }
}

impl Waiting {
    pub(super) fn queues(&self) -> MutexGuard<'_, Queues<Arc<Notify>>> {
        // Every change is complete before anything can panic, so a poisoned lock guards a consistent state.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn us(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.epoch).as_micros()).unwrap_or(u64::MAX)
    }

    pub(super) fn at(&self, us: u64) -> Option<Instant> {
        self.epoch.checked_add(Duration::from_micros(us))
    }

    /// The number of waiters.
    pub fn len(&self) -> usize {
        self.queues().len()
    }

    /// Whether there are no waiters.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether somebody waits for one of these limits in a queue other than `own`.
    pub fn is_awaited(&self, scopes: &[ScopeLimits], own: Option<&QueueId>) -> bool {
        let queues = self.queues();
        if queues.is_empty() {
            return false;
        }
        let ids =
            scopes.iter().flat_map(|scope| [&scope.record, &scope.leases]).map(|k| QueueId::Limit(k.clone()));
        ids.into_iter().any(|id| Some(&id) != own && queues.has(&id))
    }

    /// Records that these records and lease sets have room again. The heads that wait for them ask at once.
    pub fn released<'a>(&self, keys: impl IntoIterator<Item = &'a Key>) {
        let woken = self.queues().release(keys);
        woken.iter().for_each(|head| head.notify_one());
    }

    /// Records that this process, one of `processes` that share a lease set, gave back a lease and holds `held` more.
    /// Whoever is woken first would take it again, and a process without leases would wait in vain while others pass
    /// theirs among themselves. So a process with more than its even part lets the others ask first, for one lease at
    /// a time. Otherwise its heads ask at once, as with [`Waiting::released`].
    pub fn gave_back(&self, key: &Key, held: u32, processes: u32) {
        let now = self.us(Instant::now());
        let offer = u64::try_from(OFFER.as_micros()).unwrap_or(u64::MAX);
        let offered = processes > 1 && self.queues().give_back(key, held, processes, now, offer);
        if !offered {
            self.released([key]);
        }
    }
}
