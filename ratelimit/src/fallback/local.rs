//! What this process decided without the store, and what of it the store has not been told.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;
use tokio::time::Instant;

use super::seen::Seen;
use super::share;
use crate::budget::{Meter, Terms};
use crate::memory::MemoryLimiter;
use crate::{
    Acquire, Candidate, Cost, Decision, Error, Key, Kind, LimitState, Outcome, Renewal, ReservationId,
    ScopeLimits, Scopes, Settle, Settled, Tally, Usage, What,
};

/// Records that may be metered here. A call that would need more is refused the way a closed limit is.
const RECORDS_MAX: usize = 65_536;
/// Settlements and releases that may wait for the store.
pub(super) const PENDING_MAX: usize = 65_536;
/// A lease that the store granted lives here until its request ends.
const HELD_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);

/// What waits for the store.
#[derive(Debug, Clone)]
pub(super) enum Pending {
    Settle(Box<Settle>),
    Release(ReservationId, SmallVec<[Key; 4]>),
}

/// A reservation made here that is not settled.
#[derive(Debug, Clone)]
pub(super) struct Grant {
    /// The whole call, as the store would have got it; `None` for a slot moved here from a grant of the store.
    pub(super) call: Option<Acquire>,
    pub(super) slot: Option<Key>,
    pub(super) lease_ttl: Duration,
    /// The store may have granted the same id.
    unknown: bool,
    charged: Vec<(Key, [f64; Kind::COUNT])>,
}

/// What the store knows of a record that is metered here.
#[derive(Debug)]
struct Base {
    whole: ScopeLimits,
    /// The part of each local meter that the store has, drained at this process's share of the rate.
    known: [Meter; Kind::COUNT],
    /// A charge under way, asked again under its id until its outcome is known.
    charge: Option<Settle>,
}

/// A line of the account of who used what.
#[derive(Debug, Default)]
struct Noted {
    /// What the store has not been sent.
    tally: Tally,
    /// What it is being sent, under its id until the outcome is known.
    telling: Option<Settle>,
}

#[derive(Debug)]
pub(super) struct Local {
    epoch: Instant,
    limiter: MemoryLimiter,
    grants: HashMap<ReservationId, Grant>,
    bases: HashMap<Key, Base>,
    usage: HashMap<(Key, Arc<str>), Noted>,
    pub(super) pending: VecDeque<Pending>,
    /// Since when something is decided here, microseconds, and the leases this process held of the store then.
    engaged: Option<(f64, HashMap<Key, u32>)>,
}

impl Local {
    pub(super) fn new(epoch: Instant) -> Self {
        Self {
            epoch,
            limiter: MemoryLimiter::since(epoch),
            grants: HashMap::new(),
            bases: HashMap::new(),
            usage: HashMap::new(),
            pending: VecDeque::new(),
            engaged: None,
        }
    }

    /// Whether anything was decided here since the last [`Local::reset`].
    pub(super) fn is_engaged(&self) -> bool {
        self.engaged.is_some()
    }

    /// Whether the store has been told everything.
    pub(super) fn is_clear(&self) -> bool {
        let charged = self.bases.values().all(|b| b.charge.is_none());
        charged && self.grants.is_empty() && self.waiting() == 0
    }

    /// Takes over the leases the store granted, so that they count against this process's share of slots.
    pub(super) fn engage<'a>(
        &mut self,
        held: impl Iterator<Item = (&'a ReservationId, &'a SmallVec<[Key; 4]>)>,
        now: f64,
    ) {
        if self.engaged.is_some() {
            return;
        }
        let mut own: HashMap<Key, u32> = HashMap::new();
        for (id, leases) in held {
            self.limiter.hold(*id, leases, HELD_LIFE);
            for key in leases {
                *own.entry(key.clone()).or_default() += 1;
            }
        }
        self.engaged = Some((now, own));
    }

    /// This process's part of a number of requests in flight; see [`share::at_first`].
    fn at_once(
        &self,
        whole: &ScopeLimits,
        life: Duration,
        gateways: u32,
        seen: &Seen,
        now: f64,
    ) -> Option<u32> {
        let (since, own) = self.engaged.as_ref()?;
        if now - since >= life.as_micros() as f64 {
            return None;
        }
        let own = own.get(&whole.leases).copied().unwrap_or(0);
        Some(share::at_first(whole.concurrency?, gateways, own, seen.in_flight(&whole.leases)?))
    }

    pub(super) fn decide(
        &mut self,
        call: &Acquire,
        gateways: u32,
        seen: &Seen,
        now: f64,
        error: &Error,
        unknown: bool,
    ) -> Result<Decision, Error> {
        let mut share = share::call(call, gateways);
        for (whole, share) in call.scopes.iter().zip(&mut share.scopes) {
            share.concurrency =
                self.at_once(whole, call.lease_ttl, gateways, seen, now).or(share.concurrency);
            self.base(whole, share, gateways, seen, now).ok_or_else(|| error.clone())?;
        }
        let mut decision = self.limiter.decide(&share)?;
        decision.degraded = true;
        show_whole(&mut decision.limits, &call.scopes);
        match decision.outcome {
            Outcome::Granted { slot } => {
                let charged = self.limiter.charged(&share.scopes, call.id);
                let slot = slot.and_then(|at| call.candidates.get(at)).map(|c| c.leases.clone());
                let grant =
                    Grant { call: Some(call.clone()), slot, lease_ttl: call.lease_ttl, unknown, charged };
                self.grants.entry(call.id).or_insert(grant).unknown |= unknown;
            }
            Outcome::Limited { .. } | Outcome::NoSlot { .. } if unknown => {
                self.cancel(call.id, &call.scopes, None)
            }
            Outcome::Limited { .. } | Outcome::NoSlot { .. } => {}
        }
        Ok(decision)
    }

    /// Starts metering a record where the cluster's meter was last seen.
    fn base(
        &mut self,
        whole: &ScopeLimits,
        share: &ScopeLimits,
        gateways: u32,
        seen: &Seen,
        now: f64,
    ) -> Option<()> {
        if let Some(base) = self.bases.get_mut(&whole.record) {
            base.whole = whole.clone();
            return Some(());
        }
        if self.bases.len() >= RECORDS_MAX {
            return None;
        }
        let known = Kind::ALL.map(|kind| Meter {
            level: (seen.level(&whole.record, kind, now) / f64::from(gateways)).ceil(),
            ts: now,
        });
        if known.iter().any(|meter| meter.level > 0.0) {
            self.limiter.put_meters(share, known);
        }
        self.bases.insert(whole.record.clone(), Base { whole: whole.clone(), known, charge: None });
        Some(())
    }

    /// Of a grant made here; `None` when the store made it.
    pub(super) fn settle(&mut self, call: &Settle, gateways: u32) -> Option<Result<Settled, Error>> {
        let grant = self.grants.remove(&call.id)?;
        // Its usage is for the store alone.
        let share = Settle {
            usage: None,
            scopes: call.scopes.iter().map(|s| share::scope(s, gateways)).collect(),
            ..call.clone()
        };
        if grant.call.is_none() {
            self.limiter.free(call.id, &leases_of(call));
            return None;
        }
        if grant.unknown {
            self.cancel(call.id, &call.scopes, grant.slot);
        }
        let mut settled = self.limiter.end(&share);
        if let Ok(settled) = &mut settled {
            show_whole(&mut settled.limits, &call.scopes);
        }
        Some(settled)
    }

    /// Of a grant of the store that ends while it is away.
    pub(super) fn forget_held(&mut self, id: ReservationId, leases: &[Key]) {
        self.limiter.free(id, leases);
    }

    /// What may have been granted under this id is undone when the store is back. Without room it stands there.
    fn cancel(&mut self, id: ReservationId, scopes: &[ScopeLimits], slot: Option<Key>) {
        let cancel = Settle { id, actual: Cost::default(), scopes: scopes.into(), slot, usage: None };
        self.defer(Pending::Settle(Box::new(cancel)));
    }

    /// False when there is no room.
    pub(super) fn defer(&mut self, pending: Pending) -> bool {
        let room = self.pending.len() < PENDING_MAX;
        if room {
            self.pending.push_back(pending);
        }
        room
    }

    pub(super) fn grant(&self, id: ReservationId) -> Option<&Grant> {
        self.grants.get(&id)
    }

    pub(super) fn place(
        &mut self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
        gateways: u32,
    ) -> Result<Option<usize>, Error> {
        let placed = self.limiter.place(id, from, &share::candidates(candidates, gateways), lease_ttl)?;
        let slot = placed.and_then(|at| candidates.get(at)).map(|c| c.leases.clone());
        match self.grants.get_mut(&id) {
            Some(grant) => grant.slot = slot,
            None if slot.is_some() => {
                let grant = Grant { call: None, slot, lease_ttl, unknown: false, charged: Vec::new() };
                self.grants.insert(id, grant);
            }
            None => {}
        }
        Ok(placed)
    }

    pub(super) fn renew(&self, renewal: &Renewal, lease_ttl: Duration) -> bool {
        self.limiter.extend(renewal, lease_ttl)
    }

    pub(super) fn release(&mut self, id: ReservationId, leases: &[Key]) {
        self.limiter.free(id, leases);
        // A slot without a call is all there is to that grant: nobody settles it.
        let of_slot_alone =
            |grant: &Grant| grant.call.is_none() && grant.slot.iter().all(|s| leases.contains(s));
        if self.grants.get(&id).is_some_and(of_slot_alone) {
            self.grants.remove(&id);
        }
    }

    pub(super) fn peek(&self, scopes: &[ScopeLimits], gateways: u32) -> Result<Vec<LimitState>, Error> {
        let share: Vec<ScopeLimits> = scopes.iter().map(|s| share::scope(s, gateways)).collect();
        let mut limits = self.limiter.look(&share)?;
        show_whole(&mut limits, scopes);
        Ok(limits)
    }

    /// Grants the store does not know yet.
    pub(super) fn unadopted(&self) -> Vec<(ReservationId, Grant)> {
        self.grants.iter().map(|(id, grant)| (*id, grant.clone())).collect()
    }

    /// The store has taken over a grant, its charge included.
    pub(super) fn adopted(&mut self, id: ReservationId, leases: &[Key], gateways: u32, now: f64) {
        let Some(grant) = self.grants.remove(&id) else { return };
        for (record, amounts) in grant.charged {
            let Some(base) = self.bases.get_mut(&record) else { continue };
            for kind in Kind::ALL {
                let Some(bucket) = base.whole.buckets[kind as usize] else { continue };
                let terms = Terms::of(kind, &share::bucket(&bucket, gateways));
                let level = base.known[kind as usize].level_at(&terms, now) + amounts[kind as usize];
                base.known[kind as usize] = Meter { level, ts: now };
            }
        }
        // Held further, as any lease of the store's is while something is decided here.
        self.limiter.hold(id, leases, HELD_LIFE);
    }

    /// What each record is to be charged: what its meter holds beyond what the store knows and what
    /// open grants will bring along. Asked again, a charge keeps its id until [`Local::charged`].
    pub(super) fn charges(&mut self, gateways: u32, now: f64) -> Vec<Settle> {
        let mut open: HashMap<&Key, [f64; Kind::COUNT]> = HashMap::new();
        for (record, amounts) in self.grants.values().flat_map(|grant| &grant.charged) {
            let sum = open.entry(record).or_default();
            (0..Kind::COUNT).for_each(|k| sum[k] += amounts[k]);
        }
        let mut charges = Vec::new();
        for (record, base) in &mut self.bases {
            if let Some(charge) = &base.charge {
                charges.push(charge.clone());
                continue;
            }
            let meters = self.limiter.meters(record);
            let mut cost = Cost::default();
            for kind in Kind::ALL {
                let Some(bucket) = base.whole.buckets[kind as usize] else { continue };
                let terms = Terms::of(kind, &share::bucket(&bucket, gateways));
                let known = base.known[kind as usize].level_at(&terms, now);
                let level = meters[kind as usize].level_at(&terms, now);
                let waits = open.get(record).map_or(0.0, |sum| sum[kind as usize]);
                // The part of a unit stays owed: rounded up each time, it would grow to whole units that nobody used.
                let owed = ((level - known - waits) / terms.unit).floor().max(0.0);
                cost.0[kind as usize] = owed as u64;
                if owed > 0.0 {
                    base.known[kind as usize] = Meter { level: known + owed * terms.unit, ts: now };
                }
            }
            if cost == Cost::default() {
                continue;
            }
            let scope = ScopeLimits { concurrency: None, ..base.whole.clone() };
            let id = ReservationId::now_v7();
            let charge =
                Settle { id, actual: cost, scopes: smallvec::smallvec![scope], slot: None, usage: None };
            base.charge = Some(charge.clone());
            charges.push(charge);
        }
        charges
    }

    /// A charge is done, or can never be.
    pub(super) fn charged(&mut self, charge: &Settle) {
        let record = charge.scopes.first().map(|scope| &scope.record);
        if let Some(base) = record.and_then(|record| self.bases.get_mut(record)) {
            base.charge = None;
        }
    }

    /// What ended here used so much. False when there is no room for another line.
    pub(super) fn note_usage(&mut self, usage: &Usage) -> bool {
        let line = (usage.record.clone(), usage.model.clone());
        if self.usage.len() >= RECORDS_MAX && !self.usage.contains_key(&line) {
            return false;
        }
        let noted = self.usage.entry(line).or_default();
        noted.tally = noted.tally.plus(usage.tally);
        true
    }

    /// What the account in the store lacks, a line each. Asked again, a note keeps its id until [`Local::noted`].
    pub(super) fn usage_notes(&mut self) -> Vec<Settle> {
        let note = |((record, model), noted): (&(Key, Arc<str>), &mut Noted)| {
            let note = noted.telling.get_or_insert_with(|| Settle {
                id: ReservationId::now_v7(),
                actual: Cost::default(),
                scopes: Scopes::new(),
                slot: None,
                usage: Some(Usage {
                    record: record.clone(),
                    model: model.clone(),
                    tally: std::mem::take(&mut noted.tally),
                }),
            });
            note.clone()
        };
        self.usage.iter_mut().map(note).collect()
    }

    /// A note is done, or can never be.
    pub(super) fn noted(&mut self, note: &Settle) {
        let Some(usage) = &note.usage else { return };
        let line = (usage.record.clone(), usage.model.clone());
        if let Some(noted) = self.usage.get_mut(&line) {
            noted.telling = None;
            if noted.tally.is_zero() {
                self.usage.remove(&line);
            }
        }
    }

    /// Settlements, releases and lines of usage that wait for the store.
    pub(super) fn waiting(&self) -> usize {
        self.pending.len() + self.usage.len()
    }

    /// Forgets what was decided here; the next decision starts from what was seen by then.
    pub(super) fn reset(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        let usage = std::mem::take(&mut self.usage);
        *self = Self { pending, usage, ..Self::new(self.epoch) };
    }
}

pub(super) fn leases_of(call: &Settle) -> SmallVec<[Key; 4]> {
    let scopes = call.scopes.iter().filter(|s| s.concurrency.is_some()).map(|s| s.leases.clone());
    scopes.chain(call.slot.clone()).collect()
}

/// Clients are told their limit, not this process's share of it.
fn show_whole(limits: &mut [LimitState], scopes: &[ScopeLimits]) {
    for limit in limits {
        let Some(scope) = scopes.get(limit.scope) else { continue };
        let whole = match limit.what {
            What::Bucket(kind) => scope.buckets[kind as usize].map(|bucket| bucket.capacity),
            What::Concurrency => scope.concurrency.map(u64::from),
        };
        limit.limit = whole.unwrap_or(limit.limit);
    }
}
