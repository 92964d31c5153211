//! What this process decided without the store, and what of it was not reported to the store.

mod owed;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;
use tokio::time::Instant;

use super::last_seen::LastSeen;
use super::local_share;
use super::store_leases::StoreLeases;
use crate::model::call::{Acquire, Candidate, Decision, Outcome, Renewal, Settle, Settled};
use crate::model::cost::Cost;
use crate::model::error::Error;
use crate::model::id::ReservationId;
use crate::model::key::Key;
use crate::model::kind::Kind;
use crate::model::leaky_bucket::BucketState;
use crate::model::limits::{LimitState, Mode, ScopeLimits, Verdict, What, WithoutStore};
use crate::model::usage::Tally;
use crate::store::memory::MemoryLimiter;

/// Records that may be counted here. A call that would need more is refused the way a closed limit is.
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
    /// The store is being asked: until it has answered, the grant is not reported.
    asking: bool,
    charged: Vec<(Key, [f64; Kind::COUNT])>,
}

/// What the store knows of a record that is metered here.
#[derive(Debug)]
struct LocalRecord {
    full: ScopeLimits,
    /// The part of each local bucket state that the store has, drained at this process's share of the rate.
    known: [BucketState; Kind::COUNT],
    /// A charge under way, asked again under its id until its outcome is known.
    charge: Option<Settle>,
}

/// A line of the account of who used what.
#[derive(Debug, Default)]
struct UnreportedUsage {
    /// What the store has not been sent.
    tally: Tally,
    /// What it is being sent, under its id until the outcome is known.
    reporting: Option<Settle>,
}

/// What this process knows of the cluster while it decides alone.
pub(super) struct ClusterView<'a> {
    /// How many gateways share the limits, this one included.
    pub(super) gateways: u32,
    /// How buckets and leases stood when the store last answered.
    pub(super) last_seen: &'a LastSeen,
    /// The time, microseconds of this process.
    pub(super) now_us: f64,
}

#[derive(Debug)]
pub(super) struct Local {
    epoch: Instant,
    limiter: MemoryLimiter,
    grants: HashMap<ReservationId, Grant>,
    records: HashMap<Key, LocalRecord>,
    usage: HashMap<(Key, Arc<str>), UnreportedUsage>,
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
            records: HashMap::new(),
            usage: HashMap::new(),
            pending: VecDeque::new(),
            engaged: None,
        }
    }

    /// Whether anything was decided here since the last [`Local::reset`].
    pub(super) fn is_engaged(&self) -> bool {
        self.engaged.is_some()
    }

    /// Whether everything was reported to the store.
    pub(super) fn is_clear(&self) -> bool {
        let charged = self.records.values().all(|b| b.charge.is_none());
        charged && self.grants.is_empty() && self.waiting() == 0
    }

    /// Takes over the leases the store granted, so that they count against this process's share of slots.
    pub(super) fn engage(&mut self, held: &StoreLeases, now: f64) {
        if self.engaged.is_some() {
            return;
        }
        let mut own: HashMap<Key, u32> = HashMap::new();
        held.each(|id, lease| {
            self.limiter.hold(id, &lease.leases, HELD_LIFE);
            for key in &lease.leases {
                *own.entry(key.clone()).or_default() += 1;
            }
        });
        self.engaged = Some((now, own));
    }

    /// This process's part of a number of requests in flight for the time of a lease, and how much of that is left; see
    /// [`local_share::at_first`].
    fn at_first(
        &self,
        full: &ScopeLimits,
        life: Duration,
        cluster: &ClusterView<'_>,
    ) -> Option<(u32, Duration)> {
        let (since, own) = self.engaged.as_ref()?;
        let own = own.get(&full.leases).copied().unwrap_or(0);
        let in_flight = cluster.last_seen.in_flight(&full.leases)?;
        let part = local_share::at_first(full.concurrency?, cluster.gateways, own, in_flight);
        let left = life.checked_sub(Duration::from_micros((cluster.now_us - since) as u64))?;
        (!left.is_zero()).then_some((part, left))
    }

    pub(super) fn decide(
        &mut self,
        call: &Acquire,
        cluster: &ClusterView<'_>,
        error: &Error,
        unknown: bool,
    ) -> Result<Decision, Error> {
        let mut share = local_share::call(call, cluster.gateways);
        let mut leases_in = SmallVec::<[Duration; 8]>::new();
        for (full, share) in call.scopes.iter().zip(&mut share.scopes) {
            let at_first = self.at_first(full, call.lease_ttl, cluster);
            share.concurrency = at_first.map(|(part, _)| part).or(share.concurrency);
            leases_in.push(at_first.map_or(call.lease_ttl, |(_, rest)| rest));
            self.start_record(full, share, cluster).ok_or_else(|| error.clone())?;
        }
        let mut decision = self.limiter.decide(&share)?;
        decision.degraded = true;
        limit_waits(&mut decision, call, &leases_in);
        show_full_limits(&mut decision.limits, &call.scopes);
        match decision.outcome {
            Outcome::Granted { slot } => {
                let charged = self.limiter.charged(&share.scopes, call.id);
                let slot = slot.and_then(|at| call.candidates.get(at)).map(|c| c.leases.clone());
                let call_ = Some(call.clone());
                let grant =
                    Grant { call: call_, slot, lease_ttl: call.lease_ttl, unknown, asking: false, charged };
                self.grants.entry(call.id).or_insert(grant).unknown |= unknown;
            }
            Outcome::Limited { .. } | Outcome::NoSlot { .. } if unknown => {
                self.cancel(call.id, &call.scopes, None)
            }
            Outcome::Limited { .. } | Outcome::NoSlot { .. } => {}
        }
        Ok(decision)
    }

    /// Starts counting a record from where the cluster's bucket state was last seen. `None` when there is no room.
    fn start_record(
        &mut self,
        full: &ScopeLimits,
        share: &ScopeLimits,
        cluster: &ClusterView<'_>,
    ) -> Option<()> {
        if let Some(base) = self.records.get_mut(&full.record) {
            base.full = full.clone();
            return Some(());
        }
        if self.records.len() >= RECORDS_MAX {
            return None;
        }
        let known = Kind::ALL.map(|kind| BucketState {
            level: (cluster.last_seen.level(&full.record, kind, cluster.now_us)
                / f64::from(cluster.gateways))
            .ceil(),
            ts: cluster.now_us,
        });
        if known.iter().any(|bucket_state| bucket_state.level > 0.0) {
            self.limiter.put_bucket_states(share, known);
        }
        self.records.insert(full.record.clone(), LocalRecord { full: full.clone(), known, charge: None });
        Some(())
    }

    /// Settles a reservation that this process granted. `None` when the store granted it.
    pub(super) fn settle(&mut self, call: &Settle, gateways: u32) -> Option<Result<Settled, Error>> {
        let grant = self.grants.remove(&call.id)?;
        // Its usage is for the store alone.
        let share = Settle {
            usage: None,
            scopes: call.scopes.iter().map(|s| local_share::scope(s, gateways)).collect(),
            ..call.clone()
        };
        if grant.call.is_none() {
            self.limiter.free(call.id, &leases_of(call));
            return None;
        }
        if grant.unknown || grant.asking {
            self.cancel(call.id, &call.scopes, grant.slot);
        }
        let mut settled = self.limiter.end(&share);
        if let Ok(settled) = &mut settled {
            show_full_limits(&mut settled.limits, &call.scopes);
        }
        Some(settled)
    }

    /// Frees the leases of a reservation that the store granted and that ends while the store is away.
    pub(super) fn forget_held(&mut self, id: ReservationId, leases: &[Key]) {
        self.limiter.free(id, leases);
    }

    /// Undoes at the store, once it is back, what it may have granted under this id. Without room for that it stands.
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

    /// The store is being asked about a grant.
    pub(super) fn asking(&mut self, id: ReservationId) {
        if let Some(grant) = self.grants.get_mut(&id) {
            grant.asking = true;
        }
    }

    /// The answer is not known here: the grant stands and is reported like any other.
    pub(super) fn asked(&mut self, id: ReservationId) {
        if let Some(grant) = self.grants.get_mut(&id) {
            (grant.asking, grant.unknown) = (false, true);
        }
    }

    /// The store has refused what was granted here.
    pub(super) fn undo(&mut self, call: &Acquire, gateways: u32) {
        let Some(grant) = self.grants.remove(&call.id) else { return };
        let nothing = Settle {
            id: call.id,
            actual: Cost::default(),
            scopes: call.scopes.iter().map(|s| local_share::scope(s, gateways)).collect(),
            slot: grant.slot,
            usage: None,
        };
        self.limiter.take_back(&nothing);
    }

    /// Which candidates have room in this process's share, counting the slot that `id` has out.
    pub(super) fn with_room(
        &self,
        id: ReservationId,
        candidates: &[Candidate],
        gateways: u32,
    ) -> SmallVec<[usize; 8]> {
        let shares = local_share::candidates(candidates, gateways);
        (0..shares.len()).filter(|at| self.limiter.has_room(id, &shares[*at])).collect()
    }

    /// A slot of this process's share for a request of the store's.
    pub(super) fn take_slot(
        &mut self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
        gateways: u32,
    ) -> Result<Option<usize>, Error> {
        let placed =
            self.limiter.place(id, from, &local_share::candidates(candidates, gateways), lease_ttl)?;
        if let Some(slot) = placed.and_then(|at| candidates.get(at)) {
            self.limiter.hold(id, std::slice::from_ref(&slot.leases), HELD_LIFE);
        }
        Ok(placed)
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
        let placed =
            self.limiter.place(id, from, &local_share::candidates(candidates, gateways), lease_ttl)?;
        let slot = placed.and_then(|at| candidates.get(at)).map(|c| c.leases.clone());
        match self.grants.get_mut(&id) {
            Some(grant) => grant.slot = slot,
            None if slot.is_some() => {
                let charged = Vec::new();
                let grant = Grant { call: None, slot, lease_ttl, unknown: false, asking: false, charged };
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
        let share: Vec<ScopeLimits> = scopes.iter().map(|s| local_share::scope(s, gateways)).collect();
        let mut limits = self.limiter.look(&share)?;
        show_full_limits(&mut limits, scopes);
        Ok(limits)
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

/// Leases of the store's have no end here, and a part of nothing never fits: a lease is waited for no longer than those
/// of its scope take, or than any lease lives.
fn limit_waits(decision: &mut Decision, call: &Acquire, leases_in: &[Duration]) {
    let wait = match &mut decision.outcome {
        Outcome::Granted { .. } => return,
        Outcome::NoSlot { wait } => return *wait = call.lease_ttl.min(*wait),
        Outcome::Limited { wait } => wait,
    };
    for limit in &mut decision.limits {
        let open = limit.scope_in(&call.scopes).is_some_and(|scope| scope.concurrency != Some(0));
        if limit.what != What::Concurrency || limit.verdict == Verdict::Fits || !open {
            continue;
        }
        let at = limit.position_in(&call.scopes);
        let most = at.and_then(|at| leases_in.get(at)).copied().unwrap_or_default();
        limit.verdict = match limit.verdict {
            Verdict::Wait(wait) => Verdict::Wait(wait.min(most)),
            _ => Verdict::Wait(most),
        };
    }
    let refuses = |s: &ScopeLimits| s.mode == Mode::Enforce && s.without_store != WithoutStore::Open;
    let mut refusing =
        decision.limits.iter().filter(|limit| limit.scope_in(&call.scopes).is_some_and(refuses));
    *wait = refusing.try_fold(Duration::ZERO, |longest, limit| match limit.verdict {
        Verdict::Fits => Some(longest),
        Verdict::Wait(wait) => Some(longest.max(wait)),
        Verdict::Never => None,
    });
}

/// Puts the full limit in place of this process's share: answers to clients show the limit.
fn show_full_limits(limits: &mut [LimitState], scopes: &[ScopeLimits]) {
    for limit in limits {
        let Some(scope) = limit.scope_in(scopes) else { continue };
        let full = match limit.what {
            What::Bucket(kind) => scope.buckets[kind as usize].map(|bucket| bucket.capacity),
            What::Concurrency => scope.concurrency.map(u64::from),
        };
        limit.limit = full.unwrap_or(limit.limit);
    }
}
