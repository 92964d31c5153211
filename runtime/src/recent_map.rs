//! A map of bounded size that keeps the entries written last, each for a limited time.
//!
//! Entries are queued in the order of their writes, so the oldest and the expired ones are found without a scan. Writing
//! an entry again leaves its former position in the queue, which is skipped later and removed when such positions are the
//! larger part of the queue. Every operation takes constant time on average.

use std::borrow::Borrow;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::hash::Hash;
use std::time::Duration;

use tokio::time::Instant;

/// Former positions that the queue may hold beside one position per entry.
const FORMER_MIN: usize = 16;

/// A map of bounded size whose entries expire. The caller passes the time, so that decisions by it are functions of their
/// arguments. Times must not fall; an entry written with an earlier time may only be removed later, and is never returned
/// after its own life.
#[derive(Clone)]
pub struct RecentMap<K, V> {
    entries: HashMap<K, Entry<V>>,
    /// The number of each write with its key, the oldest write first.
    writes: VecDeque<(u64, K)>,
    last_write: u64,
    capacity: usize,
    life: Duration,
}

#[derive(Clone)]
struct Entry<V> {
    value: V,
    written: Instant,
    write: u64,
}

impl<K: Hash + Eq + Clone, V> RecentMap<K, V> {
    /// A map of at most `capacity` entries, each of which lives for `life` after it was last written. With
    /// [`Duration::MAX`] only the capacity bounds it.
    pub fn new(capacity: usize, life: Duration) -> Self {
        Self { entries: HashMap::new(), writes: VecDeque::new(), last_write: 0, capacity, life }
    }

    /// The value of a key that has not expired.
    pub fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q, now: Instant) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.entries.get(key).filter(|entry| self.lives(entry, now)).map(|entry| &entry.value)
    }

    /// Writes a value. Where the map is full, the oldest entry is removed.
    pub fn insert(&mut self, key: K, value: V, now: Instant) {
        self.make_room(&key, now);
        if self.entries.len() >= self.capacity && !self.entries.contains_key(&key) {
            self.remove_oldest();
        }
        self.write(key, value, now);
    }

    /// The value of a key; a missing or expired one is written first. `None` where the map is full of other entries that
    /// have not expired: for tables in which strangers must not push out the entries of others.
    pub fn get_or_insert_with(&mut self, key: K, now: Instant, make: impl FnOnce() -> V) -> Option<&mut V> {
        if self.get(&key, now).is_none() {
            self.make_room(&key, now);
            if self.entries.len() >= self.capacity && !self.entries.contains_key(&key) {
                return None;
            }
            self.write(key.clone(), make(), now);
        }
        self.entries.get_mut(&key).map(|entry| &mut entry.value)
    }

    /// Lets an entry live as long as one written now; false where there is none.
    pub fn touch<Q: Hash + Eq + ?Sized>(&mut self, key: &Q, now: Instant) -> bool
    where
        K: Borrow<Q>,
    {
        let Some((key, entry)) = self.entries.get_key_value(key) else { return false };
        if !self.lives(entry, now) {
            return false;
        }
        let (key, write) = (key.clone(), self.next_write());
        if let Some(entry) = self.entries.get_mut::<K>(&key) {
            (entry.written, entry.write) = (now, write);
        }
        self.queue(write, key);
        true
    }

    /// Removes an entry and returns its value, expired or not.
    pub fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        self.entries.remove(key).map(|entry| entry.value)
    }

    /// Removes what has expired.
    pub fn expire(&mut self, now: Instant) {
        while let Some((write, key)) = self.writes.front() {
            if let Some(entry) = self.entries.get(key).filter(|entry| entry.write == *write) {
                if self.lives(entry, now) {
                    return;
                }
                self.entries.remove(key);
            }
            self.writes.pop_front();
        }
    }

    /// Every entry that has not expired, in any order.
    pub fn iter(&self, now: Instant) -> impl Iterator<Item = (&K, &V)> {
        self.entries.iter().filter(move |(_, entry)| self.lives(entry, now)).map(|(k, e)| (k, &e.value))
    }

    /// Entries in memory, which may include expired ones.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no entry is in memory.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn lives(&self, entry: &Entry<V>, now: Instant) -> bool {
        now.saturating_duration_since(entry.written) < self.life
    }

    /// Removes what has expired if a write of this key makes the map larger.
    fn make_room(&mut self, key: &K, now: Instant) {
        if !self.entries.contains_key(key) {
            self.expire(now);
        }
    }

    fn remove_oldest(&mut self) {
        while let Some((write, key)) = self.writes.pop_front() {
            if self.entries.get(&key).is_some_and(|entry| entry.write == write) {
                self.entries.remove(&key);
                return;
            }
        }
    }

    fn write(&mut self, key: K, value: V, now: Instant) {
        let write = self.next_write();
        self.entries.insert(key.clone(), Entry { value, written: now, write });
        self.queue(write, key);
    }

    fn next_write(&mut self) -> u64 {
        self.last_write += 1;
        self.last_write
    }

    fn queue(&mut self, write: u64, key: K) {
        self.writes.push_back((write, key));
        if self.writes.len() > 2 * self.entries.len() + FORMER_MIN {
            let entries = &self.entries;
            self.writes.retain(|(write, key)| entries.get(key).is_some_and(|entry| entry.write == *write));
        }
    }
}

impl<K, V> fmt::Debug for RecentMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Keys and values may be what clients sent, and there may be many.
        f.debug_struct("RecentMap").field("len", &self.entries.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIFE: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn an_entry_lives_from_its_last_write_on() {
        let mut map = RecentMap::new(10, LIFE);
        map.insert("a", 1, Instant::now());
        map.insert("b", 2, Instant::now());
        tokio::time::advance(LIFE / 2).await;
        assert!(map.touch("a", Instant::now()) && !map.touch("c", Instant::now()));
        tokio::time::advance(LIFE / 2).await;
        let now = Instant::now();
        assert_eq!((map.get("a", now), map.get("b", now)), (Some(&1), None));
        assert!(!map.touch("b", now), "an expired entry is not revived");
        assert_eq!(map.get_or_insert_with("b", now, || 3), Some(&mut 3), "and is written anew");
        tokio::time::advance(LIFE).await;
        map.expire(Instant::now());
        assert!(map.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_map_removes_the_oldest_or_takes_nothing_new() {
        let (mut map, now) = (RecentMap::new(2, LIFE), Instant::now());
        map.insert("a", 1, now);
        map.insert("b", 2, now);
        assert_eq!(map.get_or_insert_with("c", now, || 3), None);
        assert_eq!(map.get_or_insert_with("a", now, || 9), Some(&mut 1));
        map.insert("a", 4, now);
        map.insert("c", 3, now);
        let mut kept: Vec<_> = map.iter(now).collect();
        kept.sort_unstable();
        assert_eq!(kept, [(&"a", &4), (&"c", &3)]);
        tokio::time::advance(LIFE).await;
        assert_eq!(map.get_or_insert_with("d", Instant::now(), || 5), Some(&mut 5));
        assert_eq!(map.len(), 1, "expired entries are removed before a new one is refused");
    }

    #[tokio::test(start_paused = true)]
    async fn keys_in_use_stay_and_the_queue_has_a_bound() {
        let (mut map, now) = (RecentMap::new(200, Duration::MAX), Instant::now());
        for i in 0..10_000_u32 {
            map.insert(i, i, now);
            map.insert(7, 7, now);
            assert!(map.len() <= 200 && map.writes.len() <= 2 * 200 + FORMER_MIN);
        }
        assert_eq!(
            (map.get(&7, now), map.get(&9_999, now), map.get(&1, now)),
            (Some(&7), Some(&9_999), None)
        );
        for i in 0..200 {
            map.remove(&(9_999 - i));
            map.touch(&7, now);
        }
        assert_eq!(map.len(), 1);
        assert!(map.writes.len() <= 2 + FORMER_MIN, "{}", map.writes.len());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u8, u32),
        Touch(u8),
        GetOrInsert(u8, u32),
        Remove(u8),
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let key = 0..12_u8;
        prop_oneof![
            4 => (key.clone(), any::<u32>()).prop_map(|(key, value)| Step::Insert(key, value)),
            2 => key.clone().prop_map(Step::Touch),
            3 => (key.clone(), any::<u32>()).prop_map(|(key, value)| Step::GetOrInsert(key, value)),
            1 => key.prop_map(Step::Remove),
            2 => (0..8_u64).prop_map(Step::Wait),
        ]
    }

    /// The same rules over a list in the order of writes.
    #[derive(Default)]
    struct Model(Vec<(u8, u32, u64)>);

    impl Model {
        fn write(&mut self, key: u8, value: u32, now: u64) {
            self.0.retain(|entry| entry.0 != key);
            self.0.push((key, value, now));
        }

        fn get(&self, key: u8) -> Option<u32> {
            self.0.iter().find(|entry| entry.0 == key).map(|entry| entry.1)
        }
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_plain_list(capacity in 1..8_usize, steps in prop::collection::vec(step(), 0..200)) {
            let (start, mut now) = (Instant::now(), 0);
            let at = |now: u64| start + Duration::from_secs(now);
            let (mut map, mut model) = (RecentMap::new(capacity, LIFE), Model::default());
            for step in steps {
                model.0.retain(|entry| now - entry.2 < LIFE.as_secs());
                match step {
                    Step::Insert(key, value) => {
                        map.insert(key, value, at(now));
                        if model.get(key).is_none() && model.0.len() == capacity {
                            model.0.remove(0);
                        }
                        model.write(key, value, now);
                    }
                    Step::Touch(key) => {
                        let known = model.get(key);
                        prop_assert_eq!(map.touch(&key, at(now)), known.is_some());
                        known.into_iter().for_each(|value| model.write(key, value, now));
                    }
                    Step::GetOrInsert(key, value) => {
                        let found = map.get_or_insert_with(key, at(now), || value).copied();
                        if model.get(key).is_none() && model.0.len() < capacity {
                            model.write(key, value, now);
                        }
                        prop_assert_eq!(found, model.get(key));
                    }
                    Step::Remove(key) => {
                        map.remove(&key);
                        model.0.retain(|entry| entry.0 != key);
                    }
                    Step::Wait(seconds) => now += seconds,
                }
                model.0.retain(|entry| now - entry.2 < LIFE.as_secs());
                for key in 0..12 {
                    prop_assert_eq!(map.get(&key, at(now)).copied(), model.get(key));
                }
                prop_assert_eq!(map.iter(at(now)).count(), model.0.len());
                prop_assert!(map.len() <= capacity);
                prop_assert!(map.writes.len() <= 2 * capacity + FORMER_MIN);
            }
        }
    }
}
