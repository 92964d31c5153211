//! Which process holds a lease, and whether it lives.
//!
//! A process puts its mark on the ids of its reservations, so that a lease tells who took it. When a process has
//! died, others free what it held ([`Limiter::reap`]) instead of waiting until it runs out. A process that is only
//! cut off from those who watch it must not lose its leases, so each one says in the store itself that it lives: it
//! holds a lease of a few seconds on the roll ([`beat`]), and nothing of a holder on the roll is freed.

use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::{Candidate, Error, Key, Limiter, ReservationId};

/// How long a holder is taken to live after it last said so. Several times the time between two beats.
pub const ROLL_LIFE: Duration = Duration::from_secs(3);
/// Most lease sets in one call of [`Limiter::reap`].
pub const REAP_SETS_MAX: usize = 64;

/// A process that takes leases. Two processes have the same mark by a chance of one in four thousand million.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Holder(u32);

impl Holder {
    /// The holder of that name. A process that starts again has another name.
    pub fn of(incarnation: &str) -> Self {
        let digest = Sha256::digest(incarnation.as_bytes());
        Self(u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]))
    }

    /// A new id with this holder's mark: a UUID v7 whose last 32 bits, otherwise random, are the mark. The others
    /// hold time and a counter of this process, so its ids stay different.
    pub fn id(self) -> ReservationId {
        let id = ReservationId::now_v7().as_u128();
        ReservationId::from_u128(id >> 32 << 32 | u128::from(self.0))
    }

    /// Whether an id has this holder's mark.
    pub(crate) fn took(self, id: ReservationId) -> bool {
        id.as_u128() as u32 == self.0
    }

    /// The last digits of every id with the mark.
    pub(crate) fn mark(self) -> String {
        format!("{:08x}", self.0)
    }

    /// Its entry on the roll.
    pub(crate) fn on_roll(self) -> ReservationId {
        ReservationId::from_u128(u128::from(self.0))
    }
}

/// Says that `holder` lives, for [`ROLL_LIFE`].
///
/// # Errors
/// Those of the store; then it counts as living as long as it last said.
pub async fn beat(limiter: &impl Limiter, holder: Holder) -> Result<(), Error> {
    let roll = [Candidate { leases: Key::roll(), max_concurrency: u32::MAX, bound: None }];
    limiter.move_slot(holder.on_roll(), None, &roll, ROLL_LIFE).await.map(drop)
}

/// Says that `holder` has ended.
///
/// # Errors
/// Those of the store.
pub async fn leave(limiter: &impl Limiter, holder: Holder) -> Result<(), Error> {
    limiter.release(holder.on_roll(), &[Key::roll()]).await
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn ids_carry_the_mark_and_are_different() {
        let (a, b) = (Holder::of("a"), Holder::of("b"));
        let ids: HashSet<_> = (0..100_000).map(|_| a.id()).collect();
        assert_eq!(ids.len(), 100_000);
        assert!(ids.iter().all(|id| a.took(*id) && !b.took(*id) && id.get_version_num() == 7));
        assert!(ids.iter().all(|id| id.simple().to_string().ends_with(&a.mark())));
    }
}
