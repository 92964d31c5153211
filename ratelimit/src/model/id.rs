//! Ids of reservations, and of the processes that make them.

use sha2::{Digest, Sha256};
use uuid::Uuid;

/// The id of a reservation, of its leases and of every retry of the same call.
pub type ReservationId = Uuid;

/// The id of a process that takes leases. Two processes have the same one with a probability of one in 2^32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OwnerId(u32);

impl OwnerId {
    /// The id of the process with that name. A process that starts again has another name.
    pub fn of(incarnation: &str) -> Self {
        let digest = Sha256::digest(incarnation.as_bytes());
        Self(u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]))
    }

    /// A new reservation id: a UUID v7 whose last 32 bits, otherwise random, are the owner id. The others hold the time
    /// and a counter of this process, so its ids stay different.
    pub fn id(self) -> ReservationId {
        let id = ReservationId::now_v7().as_u128();
        ReservationId::from_u128(id >> 32 << 32 | u128::from(self.0))
    }

    /// Whether this process made a reservation.
    pub(crate) fn made(self, id: ReservationId) -> bool {
        id.as_u128() as u32 == self.0
    }

    /// The last digits of every reservation id that this process makes.
    pub(crate) fn id_suffix(self) -> String {
        format!("{:08x}", self.0)
    }

    /// Its entry in the membership set.
    pub(crate) fn membership_entry(self) -> ReservationId {
        ReservationId::from_u128(u128::from(self.0))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn reservation_ids_carry_the_owner_id_and_are_different() {
        let (a, b) = (OwnerId::of("a"), OwnerId::of("b"));
        let ids: HashSet<_> = (0..100_000).map(|_| a.id()).collect();
        assert_eq!(ids.len(), 100_000);
        assert!(ids.iter().all(|id| a.made(*id) && !b.made(*id) && id.get_version_num() == 7));
        assert!(ids.iter().all(|id| id.simple().to_string().ends_with(&a.id_suffix())));
    }
}
