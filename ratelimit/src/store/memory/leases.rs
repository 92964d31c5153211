//! The leases of one scope or backend.

use std::collections::{BTreeSet, HashMap};

use crate::model::id::ReservationId;

/// Leases by id and by expiry. A lease counts while its expiry is in the future.
#[derive(Debug, Default)]
pub(super) struct Leases {
    by_id: HashMap<ReservationId, u64>,
    by_expiry: BTreeSet<(u64, ReservationId)>,
}

impl Leases {
    /// Removes expired leases.
    pub(super) fn prune(&mut self, now: u64) {
        while let Some(&(expiry, id)) = self.by_expiry.first()
            && expiry <= now
        {
            self.by_expiry.pop_first();
            self.by_id.remove(&id);
        }
    }

    /// Adds a lease or moves its expiry.
    pub(super) fn put(&mut self, id: ReservationId, expiry: u64) {
        self.remove(id);
        self.by_id.insert(id, expiry);
        self.by_expiry.insert((expiry, id));
    }

    pub(super) fn remove(&mut self, id: ReservationId) {
        if let Some(expiry) = self.by_id.remove(&id) {
            self.by_expiry.remove(&(expiry, id));
        }
    }

    /// Returns the number of removed leases.
    pub(super) fn remove_all(&mut self, which: impl Fn(ReservationId) -> bool) -> u64 {
        let gone: Vec<ReservationId> = self.by_id.keys().copied().filter(|id| which(*id)).collect();
        gone.iter().for_each(|id| self.remove(*id));
        gone.len() as u64
    }

    pub(super) fn holds(&self, id: ReservationId) -> bool {
        self.by_id.contains_key(&id)
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn first_expiry(&self) -> Option<u64> {
        self.by_expiry.first().map(|(expiry, _)| *expiry)
    }

    /// When enough leases have expired that one more stays within `limit`; `None` if the limit is zero.
    pub(super) fn opens_at(&self, limit: u32) -> Option<u64> {
        let surplus = self.len().saturating_sub(limit as usize);
        let nth = self.by_expiry.iter().nth(surplus).map(|(expiry, _)| *expiry);
        (limit > 0).then(|| nth.unwrap_or_default())
    }
}
