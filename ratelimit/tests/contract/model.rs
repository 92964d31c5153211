//! What the contract says, in exact integers: the oracle for every store. It shares no arithmetic with them.
//!
//! It has no clock: every call says when the store did it. Where a store does not tell, the caller knows two moments
//! between which it was, and a wait that depends on it is known to lie between two others.

use std::collections::BTreeMap;

use uuid::Uuid;
use weir_ratelimit::*;

/// A bucket state whose record nobody writes is forgotten so long after it is empty, microseconds.
const MARGIN_US: i128 = 10_000_000;
/// No level is ever above this, micro-units.
const LEVEL_MAX: i128 = 9_000_000_000_000_000;

/// A moment, microseconds: between the two.
pub(crate) type Moment = (i128, i128);

/// What a limit must say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Said {
    Fits,
    Wait(Moment),
    Never,
}

/// What must be said of one limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Expected {
    pub(crate) scope: Key,
    pub(crate) what: What,
    pub(crate) said: Said,
    pub(crate) limit: u64,
    pub(crate) remaining: u64,
    /// Microseconds; `None` is never.
    pub(crate) reset: Option<i128>,
}

/// What a decision must come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ends {
    Granted(Option<usize>),
    Limited(Option<Moment>),
    NoSlot(Moment),
}

#[derive(Debug, Clone, Copy, Default)]
struct BucketState {
    level: i128,
    since: i128,
}

#[derive(Debug, Clone, Copy, Default)]
struct Record {
    bucket_states: [BucketState; Kind::COUNT],
    forgotten_at: i128,
}

#[derive(Debug, Clone)]
enum Reservation {
    Open { slot: Option<Key>, reserved: BTreeMap<Key, [i128; Kind::COUNT]> },
    Settled { slot: Option<Key> },
    NeverGranted,
}

/// Everything a store holds.
#[derive(Debug, Default)]
pub(crate) struct Model {
    records: BTreeMap<Key, Record>,
    leases: BTreeMap<Key, BTreeMap<Uuid, Moment>>,
    reservations: BTreeMap<Uuid, Reservation>,
}

/// Micro-units of one unit; money comes in millionths.
const fn unit(kind: Kind) -> i128 {
    if matches!(kind, Kind::Spend) { 1 } else { 1_000_000 }
}

fn capacity(kind: Kind, bucket: &Bucket) -> i128 {
    i128::from(bucket.capacity) * unit(kind)
}

/// Micro-units drained in so many microseconds.
fn drained(kind: Kind, bucket: &Bucket, us: i128) -> i128 {
    us.max(0) * i128::from(bucket.rate) * unit(kind) / bucket.period.as_micros() as i128
}

/// The least time that drains so much; `None` when none does.
fn time_to_drain(kind: Kind, bucket: &Bucket, amount: i128) -> Option<i128> {
    let per = i128::from(bucket.rate) * unit(kind);
    let needed = amount.max(0) * bucket.period.as_micros() as i128;
    if needed == 0 { Some(0) } else { (per > 0).then(|| (needed + per - 1) / per) }
}

impl BucketState {
    fn at(&self, kind: Kind, bucket: &Bucket, now: i128) -> i128 {
        (self.level - drained(kind, bucket, now - self.since)).max(0)
    }

    fn judge(&self, kind: Kind, bucket: &Bucket, cost: i128, now: i128) -> Said {
        let room = capacity(kind, bucket) - cost;
        if room < 0 {
            return Said::Never;
        }
        if self.at(kind, bucket, now) <= room {
            return Said::Fits;
        }
        let Some(time) = time_to_drain(kind, bucket, self.level - room) else { return Said::Never };
        let wait = (self.since + time - now).max(1);
        Said::Wait((wait, wait))
    }

    fn charge(&mut self, kind: Kind, bucket: &Bucket, by: i128, now: i128) {
        if by == 0 {
            return;
        }
        let level = self.at(kind, bucket, now);
        let ceiling = (2 * capacity(kind, bucket)).min(LEVEL_MAX).max(level);
        self.level = if by > 0 { (level + by).min(ceiling) } else { (level + by).max(0) };
        self.since = self.since.max(now);
    }

    fn reset(&self, kind: Kind, bucket: &Bucket, now: i128) -> Option<i128> {
        if self.at(kind, bucket, now) == 0 {
            return Some(0);
        }
        Some((self.since + time_to_drain(kind, bucket, self.level)? - now).max(0))
    }
}

fn buckets(scope: &ScopeLimits) -> impl Iterator<Item = (Kind, Bucket)> {
    Kind::ALL.into_iter().filter_map(|kind| Some((kind, scope.buckets[kind as usize]?)))
}

impl Model {
    /// What must come of an acquire at `now`.
    pub(crate) fn acquire(&mut self, call: &Acquire, now: u64) -> (Ends, Vec<Expected>) {
        let now = i128::from(now);
        if let Some(known) = self.reservations.get(&call.id).cloned() {
            let ends = match known {
                Reservation::NeverGranted => Ends::Limited(None),
                Reservation::Open { slot, .. } | Reservation::Settled { slot } => {
                    Ends::Granted(call.candidates.iter().position(|c| slot.as_ref() == Some(&c.leases)))
                }
            };
            let mut limits = self.peek(&call.scopes, now);
            limits.iter_mut().for_each(|limit| limit.said = Said::Fits);
            return (ends, limits);
        }
        let cost = |kind: Kind, bucket: &Bucket| {
            let units = call.cost.get(kind);
            let guessed = call.estimated && kind != Kind::Requests;
            i128::from(if guessed { units.min(bucket.capacity) } else { units }) * unit(kind)
        };
        let mut limits = self.peek(&call.scopes, now);
        for limit in &mut limits {
            let scope = call.scopes.iter().find(|scope| scope.record == limit.scope).expect("of the call");
            if let What::Bucket(kind) = limit.what {
                let bucket = scope.buckets[kind as usize].expect("it was listed");
                limit.said = self.bucket_state(&scope.record, kind, now).judge(
                    kind,
                    &bucket,
                    cost(kind, &bucket),
                    now,
                );
            }
        }
        let enforced = |limit: &Expected| {
            call.scopes.iter().any(|scope| scope.record == limit.scope && scope.mode == Mode::Enforce)
        };
        let refusals: Vec<Said> = limits
            .iter()
            .filter(|limit| limit.said != Said::Fits && enforced(limit))
            .map(|limit| limit.said)
            .collect();
        if !refusals.is_empty() {
            let longest = refusals.into_iter().try_fold((0, 0), |(a, b), said| match said {
                Said::Wait((lo, hi)) => Some((lo.max(a), hi.max(b))),
                Said::Fits | Said::Never => None,
            });
            return (Ends::Limited(longest), limits);
        }
        let slot = self.free_slot(&call.candidates, None, now);
        if slot.is_none() && !call.candidates.is_empty() {
            let opens: Vec<Moment> = call
                .candidates
                .iter()
                .filter_map(|c| self.opens_in(&c.leases, c.max_concurrency, now))
                .collect();
            let ttl = call.lease_ttl.as_micros() as i128;
            let soonest = opens.into_iter().reduce(|(a, b), (lo, hi)| (a.min(lo), b.min(hi)));
            return (Ends::NoSlot(soonest.unwrap_or((ttl, ttl))), limits);
        }

        let expiry = now + call.lease_ttl.as_micros() as i128;
        let mut reserved = BTreeMap::new();
        for scope in &call.scopes {
            let mut amounts = [0; Kind::COUNT];
            let charges: Vec<_> = buckets(scope).map(|(kind, bucket)| (kind, cost(kind, &bucket))).collect();
            let before: Vec<i128> = buckets(scope)
                .map(|(kind, bucket)| self.bucket_state(&scope.record, kind, now).at(kind, &bucket, now))
                .collect();
            self.charge(scope, &charges, now);
            for ((kind, bucket), before) in buckets(scope).zip(before) {
                let after = self.bucket_state(&scope.record, kind, now).at(kind, &bucket, now);
                if cost(kind, &bucket) > 0 {
                    amounts[kind as usize] = after - before;
                }
            }
            reserved.insert(scope.record.clone(), amounts);
            if scope.concurrency.is_some() {
                self.take(&scope.leases, call.id, (expiry, expiry));
            }
        }
        let held = slot.map(|at| call.candidates[at].leases.clone());
        if let Some(key) = &held {
            self.take(key, call.id, (expiry, expiry));
        }
        self.reservations.insert(call.id, Reservation::Open { slot: held, reserved });
        for (after, limit) in self.peek(&call.scopes, now).into_iter().zip(&mut limits) {
            *limit = Expected { said: limit.said, ..after };
        }
        (Ends::Granted(slot), limits)
    }

    /// What must come of a settlement at `now`.
    pub(crate) fn settle(&mut self, call: &Settle, now: u64) -> (bool, Vec<Expected>) {
        let now = i128::from(now);
        let known = self.reservations.get(&call.id).cloned();
        for scope in &call.scopes {
            let spent = |kind: Kind| i128::from(call.actual.get(kind)) * unit(kind);
            let charges: Vec<(Kind, i128)> = buckets(scope)
                .map(|(kind, _)| match &known {
                    Some(Reservation::Open { reserved, .. }) => {
                        let before = reserved.get(&scope.record).map_or(0, |by| by[kind as usize]);
                        (kind, spent(kind) - before)
                    }
                    Some(Reservation::Settled { .. } | Reservation::NeverGranted) => (kind, 0),
                    None => (kind, spent(kind)),
                })
                .collect();
            self.charge(scope, &charges, now);
        }
        for key in call.scopes.iter().map(|scope| &scope.leases).chain(&call.slot) {
            self.release(call.id, key);
        }
        let applied = matches!(known, Some(Reservation::Open { .. }));
        match known {
            Some(Reservation::Open { slot, .. }) => {
                self.reservations.insert(call.id, Reservation::Settled { slot });
            }
            None => {
                self.reservations.insert(call.id, Reservation::NeverGranted);
            }
            Some(Reservation::Settled { .. } | Reservation::NeverGranted) => {}
        }
        (applied, self.peek(&call.scopes, now))
    }

    /// What must come of a move between two moments.
    pub(crate) fn move_slot(
        &mut self,
        id: Uuid,
        from: Option<&Key>,
        candidates: &[Candidate],
        ttl: std::time::Duration,
        at: Moment,
    ) -> Option<usize> {
        let holds = |c: &Candidate| self.live(&c.leases, at.0).any(|(held, _)| held == id);
        let already = candidates.iter().position(|c| Some(&c.leases) != from && holds(c));
        let slot = already.or_else(|| self.free_slot(candidates, Some(id), at.0));
        if let Some(from) = from {
            self.release(id, from);
        }
        let ttl = ttl.as_micros() as i128;
        if let Some(slot) = slot {
            self.take(&candidates[slot].leases, id, (at.0 + ttl, at.1 + ttl));
        }
        slot
    }

    /// Whether a renewal between two moments finds every lease.
    pub(crate) fn renew(&mut self, renewal: &Renewal, ttl: std::time::Duration, at: Moment) -> bool {
        let ttl = ttl.as_micros() as i128;
        let mut whole = true;
        for key in &renewal.leases {
            if self.live(key, at.0).any(|(id, _)| id == renewal.id) {
                self.take(key, renewal.id, (at.0 + ttl, at.1 + ttl));
            } else {
                whole = false;
            }
        }
        whole
    }

    /// Frees a lease.
    pub(crate) fn release(&mut self, id: Uuid, key: &Key) {
        if let Some(held) = self.leases.get_mut(key) {
            held.remove(&id);
        }
    }

    /// How every limit must stand.
    pub(crate) fn peek(&self, scopes: &[ScopeLimits], now: i128) -> Vec<Expected> {
        let mut limits = Vec::new();
        for scope in scopes {
            for (kind, bucket) in buckets(scope) {
                let bucket_state = self.bucket_state(&scope.record, kind, now);
                let left =
                    (capacity(kind, &bucket) - bucket_state.at(kind, &bucket, now)).max(0) / unit(kind);
                limits.push(Expected {
                    scope: scope.record.clone(),
                    what: What::Bucket(kind),
                    said: bucket_state.judge(kind, &bucket, 0, now),
                    limit: bucket.capacity,
                    remaining: left as u64,
                    reset: bucket_state.reset(kind, &bucket, now),
                });
            }
            let Some(most) = scope.concurrency else { continue };
            let live = self.live(&scope.leases, now).count() as u64;
            let said = match self.opens_in(&scope.leases, most, now) {
                _ if live < u64::from(most) => Said::Fits,
                Some(wait) => Said::Wait(wait),
                None => Said::Never,
            };
            limits.push(Expected {
                scope: scope.record.clone(),
                what: What::Concurrency,
                said,
                limit: u64::from(most),
                remaining: u64::from(most).saturating_sub(live),
                reset: Some(0),
            });
        }
        limits
    }

    fn bucket_state(&self, record: &Key, kind: Kind, now: i128) -> BucketState {
        let record = self.records.get(record).filter(|record| record.forgotten_at > now);
        record.map_or_else(BucketState::default, |record| record.bucket_states[kind as usize])
    }

    /// Writes a scope's record if anything is charged. What the scope does not limit any more is forgotten.
    fn charge(&mut self, scope: &ScopeLimits, charges: &[(Kind, i128)], now: i128) {
        if charges.iter().all(|(_, by)| *by == 0) {
            return;
        }
        let (mut written, mut life) = (Record::default(), 0);
        for ((kind, bucket), (_, by)) in buckets(scope).zip(charges) {
            let mut bucket_state = self.bucket_state(&scope.record, kind, now);
            bucket_state.charge(kind, &bucket, *by, now);
            // One that never drains is remembered for its period.
            life =
                life.max(bucket_state.reset(kind, &bucket, now).unwrap_or(bucket.period.as_micros() as i128));
            written.bucket_states[kind as usize] = bucket_state;
        }
        written.forgotten_at = now + life + MARGIN_US;
        self.records.insert(scope.record.clone(), written);
    }

    fn live(&self, key: &Key, now: i128) -> impl Iterator<Item = (Uuid, Moment)> {
        let all = self.leases.get(key).into_iter().flatten();
        all.filter(move |(_, expiry)| expiry.0 > now).map(|(id, expiry)| (*id, *expiry))
    }

    fn take(&mut self, key: &Key, id: Uuid, expiry: Moment) {
        self.leases.entry(key.clone()).or_default().insert(id, expiry);
    }

    fn free_slot(&self, candidates: &[Candidate], own: Option<Uuid>, now: i128) -> Option<usize> {
        candidates.iter().position(|c| {
            let others = self.live(&c.leases, now).filter(|(id, _)| Some(*id) != own).count();
            others < c.max_concurrency as usize
        })
    }

    /// When enough leases have run out for one more; `None` when it is closed.
    fn opens_in(&self, key: &Key, most: u32, now: i128) -> Option<Moment> {
        let sorted = |of: fn(Moment) -> i128| {
            let mut all: Vec<i128> = self.live(key, now).map(|(_, expiry)| of(expiry)).collect();
            all.sort_unstable();
            all
        };
        let nth = |all: &[i128]| {
            let surplus = all.len().saturating_sub(most as usize);
            all.get(surplus).map_or(1, |at| (at - now).max(1))
        };
        (most > 0).then(|| (nth(&sorted(|m| m.0)), nth(&sorted(|m| m.1))))
    }
}
