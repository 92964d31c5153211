//! API keys by the digest of their secret: what every request looks up.
//!
//! A digest is as good as random, so its first bits choose one of many small shards and the rest a place in it. Versions of a
//! table share all shards that are equal in both: a change copies the shards of the changed keys and the list of shards.

use std::sync::Arc;

use super::entries::KeyEntry;

/// Keys of a shard, on average at most. Fewer mean a longer list of shards to copy, more mean a longer search.
const SHARD_KEYS: usize = 64;
/// Room that a full shard gets for more keys.
const SHARD_ROOM: usize = 4;

/// A key, with the start of its digest beside it: a search reads entries only where that is equal.
#[derive(Debug, Clone)]
struct Slot {
    start: u64,
    entry: Arc<KeyEntry>,
}

/// In the order of digests, and of names where several keys have one digest.
type Shard = Arc<Vec<Slot>>;

/// All keys of a snapshot.
#[derive(Debug, Clone)]
pub struct KeyTable {
    /// A power of two of them.
    shards: Arc<Vec<Shard>>,
    len: usize,
}

impl Default for KeyTable {
    fn default() -> Self {
        Self { shards: Arc::new(vec![Arc::default()]), len: 0 }
    }
}

fn start(digest: &[u8; 32]) -> u64 {
    digest.first_chunk().map_or(0, |start| u64::from_be_bytes(*start))
}

impl Slot {
    fn order(&self) -> (u64, &[u8; 32], &str) {
        (self.start, &self.entry.digest, self.entry.name.as_str())
    }
}

impl KeyTable {
    /// The number of keys; a resource with two digests counts twice.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All keys.
    pub fn values(&self) -> impl Iterator<Item = &Arc<KeyEntry>> {
        self.shards.iter().flat_map(|shard| shard.iter()).map(|slot| &slot.entry)
    }

    /// The shard of a digest that starts so.
    fn shard(&self, start: u64) -> usize {
        let bits = self.shards.len().trailing_zeros();
        // A shift by all bits would be an overflow.
        start.checked_shr(u64::BITS - bits).map_or(0, |at| usize::try_from(at).unwrap_or(0))
    }

    /// The key with this digest; of several, the last one by name.
    pub fn get(&self, digest: &[u8; 32]) -> Option<&Arc<KeyEntry>> {
        let start = start(digest);
        let shard = self.shards.get(self.shard(start))?;
        let end = shard.partition_point(|slot| (slot.start, &slot.entry.digest) <= (start, digest));
        let last = shard.get(end.checked_sub(1)?)?;
        (last.entry.digest == *digest).then_some(&last.entry)
    }

    /// Adds a key, in place of one with the same digest and name.
    pub(super) fn insert(&mut self, entry: Arc<KeyEntry>) {
        if self.len >= self.shards.len() * SHARD_KEYS {
            self.grow();
        }
        let slot = Slot { start: start(&entry.digest), entry };
        let at = self.shard(slot.start);
        let Some(shard) = Arc::make_mut(&mut self.shards).get_mut(at) else { return };
        let shard = Arc::make_mut(shard);
        match shard.binary_search_by(|other| other.order().cmp(&slot.order())) {
            Ok(place) => {
                if let Some(old) = shard.get_mut(place) {
                    *old = slot;
                }
            }
            Err(place) => {
                if shard.len() == shard.capacity() {
                    shard.reserve_exact(SHARD_ROOM);
                }
                shard.insert(place, slot);
                self.len += 1;
            }
        }
    }

    /// Removes a key.
    pub(super) fn remove(&mut self, entry: &Arc<KeyEntry>) {
        let slot = Slot { start: start(&entry.digest), entry: Arc::clone(entry) };
        let at = self.shard(slot.start);
        let Some(shard) = self.shards.get(at) else { return };
        let Ok(place) = shard.binary_search_by(|other| other.order().cmp(&slot.order())) else { return };
        if let Some(shard) = Arc::make_mut(&mut self.shards).get_mut(at) {
            Arc::make_mut(shard).remove(place);
            self.len -= 1;
        }
    }

    /// Doubles the number of shards; each is divided in two.
    fn grow(&mut self) {
        let bits = (self.shards.len() * 2).trailing_zeros();
        let upper = |slot: &Slot| slot.start >> (u64::BITS - bits) & 1 == 1;
        let halves = self.shards.iter().flat_map(|shard| {
            let (low, high) = shard.split_at(shard.partition_point(|slot| !upper(slot)));
            [Arc::new(low.to_vec()), Arc::new(high.to_vec())]
        });
        self.shards = Arc::new(halves.collect());
    }
}
