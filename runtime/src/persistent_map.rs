//! An ordered map whose copies share what they have in common.
//!
//! The entries are in chunks, and a copy of the map shares all chunks. A change copies one chunk and the list of chunks, so that
//! its cost hardly grows with the map: a clone is one reference, and [`PersistentMap::changes`] passes over what two versions
//! share. A map of a million entries has some 5000 chunks.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

/// Entries of a chunk. Fewer mean a longer list of chunks to copy, more mean more entries to copy, for each change.
const CHUNK_MAX: usize = 256;
/// Room that a full chunk gets for more entries, which is not doubled as a vector would do it.
const CHUNK_ROOM: usize = 8;

type Chunk<K, V> = Arc<Vec<(K, V)>>;

/// An ordered map with cheap copies.
pub struct PersistentMap<K, V> {
    /// No chunk is empty; all are in order.
    chunks: Arc<Vec<Chunk<K, V>>>,
    len: usize,
}

impl<K, V> Clone for PersistentMap<K, V> {
    fn clone(&self) -> Self {
        Self { chunks: Arc::clone(&self.chunks), len: self.len }
    }
}

impl<K, V> Default for PersistentMap<K, V> {
    fn default() -> Self {
        Self { chunks: Arc::default(), len: 0 }
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for PersistentMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<K, V> PersistentMap<K, V> {
    /// The number of entries.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether both are copies of each other without a change since.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.chunks, &other.chunks)
    }

    /// All entries in the order of their keys.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&K, &V)> + Clone {
        self.chunks.iter().flat_map(|chunk| chunk.iter()).map(|(key, value)| (key, value))
    }

    /// All keys in order.
    pub fn keys(&self) -> impl DoubleEndedIterator<Item = &K> + Clone {
        self.iter().map(|(key, _)| key)
    }

    /// All values in the order of their keys.
    pub fn values(&self) -> impl DoubleEndedIterator<Item = &V> + Clone {
        self.iter().map(|(_, value)| value)
    }
}

impl<K: Ord, V> PersistentMap<K, V> {
    /// The chunk that holds a key or would, and where in it.
    fn position<Q: Ord + ?Sized>(&self, key: &Q) -> (usize, Result<usize, usize>)
    where
        K: Borrow<Q>,
    {
        let ends_before = |chunk: &Chunk<K, V>| chunk.last().is_some_and(|(last, _)| last.borrow() < key);
        let at = self.chunks.partition_point(ends_before);
        let found = self
            .chunks
            .get(at)
            .map_or(Err(0), |chunk| chunk.binary_search_by(|(candidate, _)| candidate.borrow().cmp(key)));
        (at, found)
    }

    /// The value of a key.
    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let (at, found) = self.position(key);
        self.chunks.get(at)?.get(found.ok()?).map(|(_, value)| value)
    }

    /// Whether there is an entry of this key.
    pub fn contains_key<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.position(key).1.is_ok()
    }

    /// The entries from this key on, in order.
    pub fn from<Q: Ord + ?Sized>(&self, key: &Q) -> impl Iterator<Item = (&K, &V)>
    where
        K: Borrow<Q>,
    {
        let (at, found) = self.position(key);
        let within = found.unwrap_or_else(|place| place);
        let first = self.chunks.get(at).and_then(|chunk| chunk.get(within..)).unwrap_or_default();
        let rest = self.chunks.iter().skip(at + 1).flat_map(|chunk| chunk.iter());
        first.iter().chain(rest).map(|(key, value)| (key, value))
    }

    /// The entries from the first key on that does not come before something; the keys that do come first.
    pub fn from_where(&self, is_before: impl Fn(&K) -> bool) -> impl Iterator<Item = (&K, &V)> {
        let ends_before = |chunk: &Chunk<K, V>| chunk.last().is_some_and(|(last, _)| is_before(last));
        let at = self.chunks.partition_point(ends_before);
        let chunk = self.chunks.get(at).map_or(&[][..], |chunk| chunk.as_slice());
        let first = chunk.get(chunk.partition_point(|(key, _)| is_before(key))..).unwrap_or_default();
        let rest = self.chunks.iter().skip(at + 1).flat_map(|chunk| chunk.iter());
        first.iter().chain(rest).map(|(key, value)| (key, value))
    }

    /// Every entry by which two versions of a map may differ, with its value in this and in the newer one, in the order of the
    /// keys. What the versions share is passed over; an entry beside a changed one may be equal in both.
    pub fn changes<'a>(&'a self, newer: &'a Self) -> Changes<'a, K, V> {
        Changes { old: Cursor::of(self), new: Cursor::of(newer) }
    }
}

impl<K: Ord + Clone, V: Clone> PersistentMap<K, V> {
    /// Sets the value of a key and returns the one before.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let (at, found) = self.position(&key);
        let chunks = Arc::make_mut(&mut self.chunks);
        // A key beyond all others goes into the last chunk.
        let at = at.min(chunks.len().saturating_sub(1));
        let Some(chunk) = chunks.get_mut(at) else {
            chunks.push(Arc::new(vec![(key, value)]));
            self.len = 1;
            return None;
        };
        let place = match found {
            Ok(place) => {
                let old = Arc::make_mut(chunk).get_mut(place);
                return old.map(|(_, old)| std::mem::replace(old, value));
            }
            Err(place) if chunk.last().is_some_and(|(last, _)| *last < key) => place.max(chunk.len()),
            Err(place) => place,
        };
        self.len += 1;
        if chunk.len() < CHUNK_MAX {
            insert(chunk, place, (key, value));
        } else if place == chunk.len() {
            // Keys that come in order leave full chunks behind.
            chunks.insert(at + 1, Arc::new(vec![(key, value)]));
        } else {
            let mut upper = Arc::new(chunk.get(CHUNK_MAX / 2..).unwrap_or_default().to_vec());
            Arc::make_mut(chunk).truncate(CHUNK_MAX / 2);
            match place.checked_sub(CHUNK_MAX / 2) {
                Some(place) => insert(&mut upper, place, (key, value)),
                None => insert(chunk, place, (key, value)),
            }
            chunks.insert(at + 1, upper);
        }
        None
    }

    /// Removes a key and returns its value.
    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let (at, Ok(place)) = self.position(key) else { return None };
        let chunks = Arc::make_mut(&mut self.chunks);
        let chunk = chunks.get_mut(at)?;
        let (_, value) = Arc::make_mut(chunk).remove(place);
        self.len -= 1;
        if chunk.is_empty() {
            chunks.remove(at);
            return Some(value);
        }
        // Chunks that are nearly empty are joined, or a map that shrinks would keep a long list of them.
        for low in [Some(at), at.checked_sub(1)].into_iter().flatten() {
            let lens =
                (chunks.get(low).map(|chunk| chunk.len()), chunks.get(low + 1).map(|chunk| chunk.len()));
            if let (Some(lower), Some(upper)) = lens
                && lower.min(upper) < CHUNK_MAX / 4
                && lower + upper <= CHUNK_MAX / 2
            {
                let upper = chunks.remove(low + 1);
                if let Some(lower) = chunks.get_mut(low) {
                    Arc::make_mut(lower).extend(upper.iter().cloned());
                }
                break;
            }
        }
        Some(value)
    }
}

/// Inserts into a chunk; a full vector grows by a little only.
fn insert<K: Clone, V: Clone>(chunk: &mut Chunk<K, V>, place: usize, entry: (K, V)) {
    let chunk = Arc::make_mut(chunk);
    if chunk.len() == chunk.capacity() {
        chunk.reserve_exact(CHUNK_ROOM);
    }
    chunk.insert(place, entry);
}

impl<K: Ord + Clone, V: Clone> FromIterator<(K, V)> for PersistentMap<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut map = Self::default();
        map.extend(entries);
        map
    }
}

impl<K: Ord + Clone, V: Clone> Extend<(K, V)> for PersistentMap<K, V> {
    fn extend<I: IntoIterator<Item = (K, V)>>(&mut self, entries: I) {
        for (key, value) in entries {
            self.insert(key, value);
        }
    }
}

impl<K: Ord, V: PartialEq> PartialEq for PersistentMap<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.changes(other).all(|(_, old, new)| old == new)
    }
}

impl<K: Ord, V: Eq> Eq for PersistentMap<K, V> {}

/// A position in a map.
struct Cursor<'a, K, V> {
    chunks: &'a [Chunk<K, V>],
    at: usize,
    place: usize,
}

impl<'a, K, V> Cursor<'a, K, V> {
    fn of(map: &'a PersistentMap<K, V>) -> Self {
        Self { chunks: &map.chunks, at: 0, place: 0 }
    }

    fn peek(&self) -> Option<&'a (K, V)> {
        self.chunks.get(self.at)?.get(self.place)
    }

    /// The chunk that begins here.
    fn whole(&self) -> Option<&'a Chunk<K, V>> {
        self.chunks.get(self.at).filter(|_| self.place == 0)
    }

    fn advance(&mut self) {
        self.place += 1;
        if self.chunks.get(self.at).is_none_or(|chunk| self.place >= chunk.len()) {
            (self.at, self.place) = (self.at + 1, 0);
        }
    }
}

/// The entries by which two versions of a map may differ; see [`PersistentMap::changes`].
#[expect(missing_debug_implementations, reason = "an iterator that lives for one loop")]
pub struct Changes<'a, K, V> {
    old: Cursor<'a, K, V>,
    new: Cursor<'a, K, V>,
}

impl<'a, K: Ord, V> Iterator for Changes<'a, K, V> {
    type Item = (&'a K, Option<&'a V>, Option<&'a V>);

    fn next(&mut self) -> Option<Self::Item> {
        while let (Some(old), Some(new)) = (self.old.whole(), self.new.whole())
            && Arc::ptr_eq(old, new)
        {
            self.old.at += 1;
            self.new.at += 1;
        }
        let order = match (self.old.peek(), self.new.peek()) {
            (None, None) => return None,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((old, _)), Some((new, _))) => old.cmp(new),
        };
        let old = self.old.peek().filter(|_| order.is_le());
        let new = self.new.peek().filter(|_| order.is_ge());
        if old.is_some() {
            self.old.advance();
        }
        if new.is_some() {
            self.new.advance();
        }
        let (key, _) = old.or(new)?;
        Some((key, old.map(|(_, value)| value), new.map(|(_, value)| value)))
    }
}

#[cfg(test)]
mod tests;
