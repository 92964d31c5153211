//! The leases that the store granted to this process, so that they can be taken again if the store returns without
//! them.
//!
//! The [`LeaseBook`](crate::reservation::LeaseBook) cannot serve instead. It lists what callers hold, local grants
//! included, and a caller enters a lease only after the answer has reached it. An outage may begin before that, and a
//! caller that has left never enters it; both leases are the store's all the same.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use smallvec::SmallVec;

use crate::model::id::ReservationId;
use crate::model::key::Key;

/// Reservations whose leases are kept. Leases beyond it are not taken again after an outage.
const HELD_MAX: usize = 262_144;

pub(super) type Leases = SmallVec<[Key; 4]>;

/// The leases of a reservation.
#[derive(Debug, Clone)]
pub(super) struct Lease {
    pub(super) leases: Leases,
    /// Their life without renewal.
    pub(super) life: Duration,
}

#[derive(Debug, Default)]
pub(super) struct StoreLeases(Mutex<HashMap<ReservationId, Lease>>);

impl StoreLeases {
    fn all(&self) -> MutexGuard<'_, HashMap<ReservationId, Lease>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn hold(&self, id: ReservationId, leases: Leases, life: Duration) {
        let mut all = self.all();
        if leases.is_empty() {
            all.remove(&id);
        } else if all.len() < HELD_MAX || all.contains_key(&id) {
            all.insert(id, Lease { leases, life });
        }
    }

    /// Replaces the slot `from` by another one.
    pub(super) fn moved(&self, id: ReservationId, from: Option<&Key>, to: Option<Key>, life: Duration) {
        let mut all = self.all();
        let mut leases = all.remove(&id).map(|lease| lease.leases).unwrap_or_default();
        leases.retain(|key| Some(&*key) != from);
        leases.extend(to);
        if !leases.is_empty() && all.len() < HELD_MAX {
            all.insert(id, Lease { leases, life });
        }
    }

    /// Removes leases of a reservation. A reservation without leases is removed.
    pub(super) fn forget(&self, id: ReservationId, leases: &[Key]) {
        let mut all = self.all();
        if let Some(of_id) = all.get_mut(&id) {
            of_id.leases.retain(|key| !leases.contains(key));
            if of_id.leases.is_empty() {
                all.remove(&id);
            }
        }
    }

    pub(super) fn end(&self, id: ReservationId) {
        self.all().remove(&id);
    }

    pub(super) fn each(&self, mut with: impl FnMut(ReservationId, &Lease)) {
        self.all().iter().for_each(|(id, lease)| with(*id, lease));
    }

    pub(super) fn list(&self) -> Vec<(ReservationId, Lease)> {
        self.all().iter().map(|(id, lease)| (*id, lease.clone())).collect()
    }
}
