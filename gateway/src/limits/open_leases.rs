//! The leases of what is under way here.

use std::collections::HashMap;

use smallvec::SmallVec;
use uuid::Uuid;
use weir_ratelimit::Key;

/// Reservation -> the leases it holds, and how many there are of each set.
#[derive(Debug, Default)]
pub(super) struct OpenLeases {
    by_id: HashMap<Uuid, SmallVec<[Key; 4]>>,
    counts: HashMap<Key, u32>,
}

impl OpenLeases {
    /// Reservations with leases.
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Leases of this set.
    pub(super) fn at(&self, key: &Key) -> u32 {
        self.counts.get(key).copied().unwrap_or(0)
    }

    pub(super) fn get(&self, id: Uuid) -> Option<&SmallVec<[Key; 4]>> {
        self.by_id.get(&id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Uuid, &SmallVec<[Key; 4]>)> {
        self.by_id.iter().map(|(id, leases)| (*id, leases))
    }

    /// These are all that it holds now.
    pub(super) fn insert(&mut self, id: Uuid, leases: SmallVec<[Key; 4]>) {
        for key in &leases {
            *self.counts.entry(key.clone()).or_default() += 1;
        }
        let before = self.by_id.insert(id, leases);
        self.uncount(before);
    }

    /// It holds none any more.
    pub(super) fn remove(&mut self, id: Uuid) {
        let before = self.by_id.remove(&id);
        self.uncount(before);
    }

    fn uncount(&mut self, leases: Option<SmallVec<[Key; 4]>>) {
        for key in leases.into_iter().flatten() {
            if let Some(count) = self.counts.get_mut(&key) {
                *count -= 1;
                if *count == 0 {
                    self.counts.remove(&key);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use smallvec::smallvec;

    use super::*;

    #[test]
    fn what_is_held_of_each_set_is_counted_and_forgotten_with_the_last() {
        let (a, b) = (Key::backend_slots("a"), Key::backend_slots("b"));
        let (mut open, one, two) = (OpenLeases::default(), Uuid::from_u128(1), Uuid::from_u128(2));
        open.insert(one, smallvec![a.clone()]);
        open.insert(two, smallvec![a.clone(), b.clone()]);
        assert_eq!((open.at(&a), open.at(&b), open.len()), (2, 1, 2));
        open.insert(one, smallvec![b.clone()]);
        open.insert(one, smallvec![b.clone()]);
        assert_eq!((open.at(&a), open.at(&b), open.len()), (1, 2, 2));
        open.remove(two);
        open.remove(two);
        open.remove(one);
        assert_eq!((open.at(&a), open.at(&b), open.len(), open.counts.len()), (0, 0, 0, 0));
    }
}
