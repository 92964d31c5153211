//! The entries of the memory store, and their expiry.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use super::leases::Leases;
use crate::model::call::Candidate;
use crate::model::checks::{Line, TOMBSTONE_LIFE, micros};
use crate::model::id::ReservationId;
use crate::model::key::{Key, KeyMap};
use crate::model::kind::Kind;
use crate::model::leaky_bucket::{BucketState, Terms};
use crate::model::usage::Tally;

/// Expired entries that one call removes.
const SWEEP_MAX: usize = 16;
/// For how long it is remembered that a reservation was settled, where no network is in between: who repeats a call does so
/// within seconds.
const TOMBSTONE_LIFE_HERE: Duration = Duration::from_secs(30);
/// The time for which a record outlives its last bucket state.
const MARGIN: Duration = Duration::from_secs(10);

pub(super) type BucketStates = [BucketState; Kind::COUNT];

#[derive(Debug)]
pub(super) struct State {
    /// For how long it is remembered that a reservation was settled.
    pub(super) tombstone_life: Duration,
    records: KeyMap<Record>,
    pub(super) leases: KeyMap<Leases>,
    reservations: HashMap<ReservationId, Reservation>,
    pub(super) usage: KeyMap<Day>,
    /// The time of the next check of every entry that can expire. Each entry is queued once.
    pub(super) due: BinaryHeap<Reverse<(u64, Due)>>,
}

#[derive(Debug)]
pub(super) struct Record {
    bucket_states: BucketStates,
    /// `None` if a bucket never becomes empty.
    expires: Option<u64>,
    queued: bool,
}

#[derive(Debug)]
pub(super) struct Reservation {
    pub(super) stage: Stage,
    pub(super) slot: Option<Key>,
    pub(super) reserved: Vec<(Key, [f64; Kind::COUNT])>,
    pub(super) expires: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Open,
    Settled,
    /// A settlement that came before the grant.
    NeverGranted,
}

/// The usage of a tenant on one day, by model.
#[derive(Debug, Default)]
pub(super) struct Day {
    pub(super) lines: BTreeMap<Arc<str>, Tally>,
    pub(super) expires: u64,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Due {
    Record(Key),
    Usage(Key),
    Leases(Key),
    Reservation(ReservationId),
}

impl Default for State {
    fn default() -> Self {
        Self {
            tombstone_life: TOMBSTONE_LIFE,
            records: KeyMap::default(),
            leases: KeyMap::default(),
            reservations: HashMap::default(),
            usage: KeyMap::default(),
            due: BinaryHeap::default(),
        }
    }
}

impl State {
    /// For callers of this process.
    pub(super) fn here() -> Self {
        Self { tombstone_life: TOMBSTONE_LIFE_HERE, ..Self::default() }
    }

    /// Removes a few expired entries.
    pub(super) fn sweep(&mut self, now: u64) {
        for _ in 0..SWEEP_MAX {
            if self.due.peek().is_none_or(|Reverse((at, _))| *at > now) {
                return;
            }
            let Some(Reverse((_, due))) = self.due.pop() else { return };
            // An entry that was extended meanwhile is queued again with its new expiry; others are removed.
            let again = match &due {
                Due::Record(key) => match self.records.get_mut(key) {
                    Some(record) if record.expires.is_none_or(|at| at > now) => {
                        record.queued = record.expires.is_some();
                        record.expires
                    }
                    _ => {
                        self.records.remove(key);
                        None
                    }
                },
                Due::Usage(key) => {
                    // A usage record expires a fixed time after its first entry. A later one with the same name has
                    // an entry of its own.
                    if self.usage.get(key).is_some_and(|day| day.expires <= now) {
                        self.usage.remove(key);
                    }
                    None
                }
                Due::Leases(key) => {
                    let left = self.leases.get_mut(key).and_then(|set| {
                        set.prune(now);
                        set.first_expiry()
                    });
                    if left.is_none() {
                        self.leases.remove(key);
                    }
                    left
                }
                Due::Reservation(id) => {
                    let left = self.reservations.get(id).map(|held| held.expires).filter(|at| *at > now);
                    if left.is_none() {
                        self.reservations.remove(id);
                    }
                    left.map(|at| at.min(later(now, self.tombstone_life)))
                }
            };
            if let Some(at) = again {
                self.due.push(Reverse((at, due)));
            }
        }
    }

    pub(super) fn bucket_states(&self, key: &Key, now: u64) -> BucketStates {
        let record = self.records.get(key).filter(|record| record.expires.is_none_or(|at| at > now));
        record.map(|record| record.bucket_states).unwrap_or_default()
    }

    /// Writes a record. Kinds without a limit are stored as zero.
    pub(super) fn write_record(&mut self, key: &Key, lines: &[Line], bucket_states: BucketStates, now: u64) {
        let mut kept = BucketStates::default();
        let mut life = 0.0f64;
        for line in lines {
            let bucket_state = bucket_states[line.kind as usize];
            kept[line.kind as usize] = bucket_state;
            life = life.max(line.terms.kept(&bucket_state, now as f64));
        }
        self.put_record(key, kept, Some(life), now);
    }

    /// Writes some kinds of a record and keeps the others. The rates of the others are unknown here, so the record
    /// keeps its former life if that is longer.
    pub(super) fn write_kinds(
        &mut self,
        key: &Key,
        kinds: [Option<Terms>; Kind::COUNT],
        bucket_states: BucketStates,
        now: u64,
    ) {
        let mut life = Some(0.0f64);
        let mut others = false;
        for (bucket_state, terms) in bucket_states.iter().zip(kinds) {
            match terms {
                Some(terms) => life = life.zip(bucket_state.reset(&terms, now as f64)).map(|(a, b)| a.max(b)),
                None => others |= bucket_state.level > 0.0,
            }
        }
        if let (true, Some(record)) = (others, self.records.get(key)) {
            let had = record.expires.map(|at| at.saturating_sub(now) as f64 - MARGIN.as_micros() as f64);
            life = life.zip(had).map(|(a, b)| a.max(b));
        }
        self.put_record(key, bucket_states, life, now);
    }

    /// `life` is the time in microseconds until the last bucket is empty; `None` if one never is.
    fn put_record(&mut self, key: &Key, bucket_states: BucketStates, life: Option<f64>, now: u64) {
        let expires = life.map(|us| later(now, micros(us) + MARGIN));
        let queued = self.records.get(key).is_some_and(|record| record.queued);
        if let (Some(at), false) = (expires, queued) {
            self.due.push(Reverse((at, Due::Record(key.clone()))));
        }
        let record = Record { bucket_states, expires, queued: queued || expires.is_some() };
        self.records.insert(key.clone(), record);
    }

    pub(super) fn reservation(&mut self, id: ReservationId, now: u64) -> Option<&mut Reservation> {
        self.reservations.get_mut(&id).filter(|held| held.expires > now)
    }

    /// Removes a reservation without a trace.
    pub(super) fn forget_reservation(&mut self, id: ReservationId) {
        self.reservations.remove(&id);
    }

    /// Writes a reservation. Most reservations are settled soon, so the first check is at the time when a tombstone
    /// expires.
    pub(super) fn write_reservation(&mut self, id: ReservationId, reservation: Reservation, now: u64) {
        let first_look = later(now, self.tombstone_life);
        if self.reservations.insert(id, reservation).is_none() {
            self.due.push(Reverse((first_look, Due::Reservation(id))));
        }
    }

    /// The unexpired leases of a set.
    pub(super) fn live(&mut self, key: &Key, now: u64) -> &Leases {
        static NONE: std::sync::LazyLock<Leases> = std::sync::LazyLock::new(Leases::default);
        match self.leases.get_mut(key) {
            Some(set) => {
                set.prune(now);
                set
            }
            None => &NONE,
        }
    }

    /// The first candidate with room. Leases of `id` itself do not count.
    pub(super) fn free_slot(
        &mut self,
        candidates: &[Candidate],
        id: Option<ReservationId>,
        now: u64,
    ) -> Option<usize> {
        let bounded = candidates.iter().any(|candidate| candidate.bound.is_some());
        let present = if bounded { self.present(candidates, id, now) } else { 0 };
        candidates.iter().position(|candidate| {
            let most =
                candidate.bound.map_or(u32::MAX, |bound| bound.of(present)).min(candidate.max_concurrency);
            let set = self.live(&candidate.leases, now);
            let own = usize::from(id.is_some_and(|id| set.holds(id)));
            set.len() - own < most as usize
        })
    }

    /// The requests in flight at all candidates; a lease set that several share counts once, and leases of `id` do
    /// not count.
    fn present(&mut self, candidates: &[Candidate], id: Option<ReservationId>, now: u64) -> usize {
        let mut seen: Vec<&Key> = Vec::new();
        let mut present = 0;
        for candidate in candidates {
            if !seen.contains(&&candidate.leases) {
                seen.push(&candidate.leases);
                let set = self.live(&candidate.leases, now);
                present += set.len() - usize::from(id.is_some_and(|id| set.holds(id)));
            }
        }
        present
    }

    pub(super) fn slot_wait(&mut self, candidates: &[Candidate], ttl: Duration, now: u64) -> Duration {
        let opens = candidates.iter().filter_map(|c| self.live(&c.leases, now).opens_at(c.max_concurrency));
        opens.min().map_or(ttl, |at| Duration::from_micros(at.saturating_sub(now).max(1)))
    }

    pub(super) fn take_lease(&mut self, key: &Key, id: ReservationId, expiry: u64) {
        if let Some(set) = self.leases.get_mut(key) {
            return set.put(id, expiry);
        }
        let mut set = Leases::default();
        set.put(id, expiry);
        self.leases.insert(key.clone(), set);
        self.due.push(Reverse((expiry, Due::Leases(key.clone()))));
    }

    /// Removes a lease. An empty set stays until its queued check, so that each set is queued once.
    pub(super) fn drop_lease(&mut self, key: &Key, id: ReservationId) {
        if let Some(set) = self.leases.get_mut(key) {
            set.remove(id);
        }
    }
}

pub(super) fn later(now: u64, by: Duration) -> u64 {
    now.saturating_add(u64::try_from(by.as_micros()).unwrap_or(u64::MAX))
}
