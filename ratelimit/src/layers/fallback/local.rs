//! The local decisions during a store outage, and the part of them that is not reported to the store yet.

mod owed;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;
use tokio::time::Instant;

use super::last_seen::LastSeen;
use super::local_share::{self, Sharing};
use super::store_leases::StoreLeases;
use crate::model::call::{Acquire, Candidate, Decision, Outcome, Renewal, Settle, Settled};
use crate::model::checks::TOMBSTONE_LIFE;
use crate::model::cost::Cost;
use crate::model::error::Error;
use crate::model::id::ReservationId;
use crate::model::key::{Key, KeyMap};
use crate::model::kind::Kind;
use crate::model::leaky_bucket::{BucketState, Terms};
use crate::model::limits::{LimitState, Mode, ScopeLimits, Verdict, What, WithoutStore};
use crate::model::usage::Tally;
use crate::store::memory::MemoryLimiter;

/// Records that can be counted locally. A call that needs more is refused like one under a closed limit.
const RECORDS_MAX: usize = 65_536;
/// Settlements and releases that can wait for the store.
pub(super) const PENDING_MAX: usize = 65_536;
/// For so long a settlement whose outcome is unknown is told again under its id: well below the time for which the store
/// remembers that it has carried it out.
const TOLD_AGAIN_MAX: Duration = Duration::from_secs(TOMBSTONE_LIFE.as_secs() / 4 * 3);
/// The life of a lease that the store granted. Its request ends it.
const HELD_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);

/// A call that waits for the store.
#[derive(Debug, Clone)]
pub(super) enum Pending {
    Settle(Box<Settle>),
    Release(ReservationId, SmallVec<[Key; 4]>),
}

/// A local reservation that is not settled.
#[derive(Debug, Clone)]
pub(super) struct Grant {
    /// The whole call, as the store would have got it; `None` for a slot that a reservation of the store took
    /// locally.
    pub(super) call: Option<Acquire>,
    pub(super) slot: Option<Key>,
    pub(super) lease_ttl: Duration,
    /// The store may have granted the same id.
    pub(super) unknown: bool,
    /// The store is being asked. The grant is not reported before it has answered.
    asking: bool,
    charged: Vec<(Key, [f64; Kind::COUNT])>,
}

/// The part of a local record that the store knows.
#[derive(Debug)]
struct LocalRecord {
    full: ScopeLimits,
    /// The part of each local bucket state that the store has, drained at the rate of the local share.
    known: [BucketState; Kind::COUNT],
    /// A charge in progress. It keeps its id until the outcome is known.
    charge: Option<Settle>,
}

/// A usage record.
#[derive(Debug, Default)]
struct UnreportedUsage {
    /// Usage that was not sent to the store.
    tally: Tally,
    /// Usage that is being sent. It keeps its id until the outcome is known.
    reporting: Option<Settle>,
}

/// The cluster as this process knows it while it decides alone.
pub(super) struct ClusterView<'a> {
    /// Among whom the limits are divided.
    pub(super) sharing: Sharing,
    /// Buckets and leases as the store last reported them.
    pub(super) last_seen: &'a LastSeen,
    /// The time, in microseconds of this process.
    pub(super) now_us: f64,
}

#[derive(Debug)]
pub(super) struct Local {
    epoch: Instant,
    limiter: MemoryLimiter,
    grants: HashMap<ReservationId, Grant>,
    records: KeyMap<LocalRecord>,
    usage: HashMap<(Key, Arc<str>), UnreportedUsage>,
    pub(super) pending: VecDeque<Pending>,
    /// Settlements that the store may have carried out, and since when. Each of them waits in this state too.
    doubtful: HashMap<ReservationId, Instant>,
    /// When local decisions began, in microseconds, and the leases of the store that this process held then.
    engaged: Option<(f64, KeyMap<u32>)>,
}

impl Local {
    pub(super) fn new(epoch: Instant) -> Self {
        Self {
            epoch,
            limiter: MemoryLimiter::since(epoch),
            grants: HashMap::new(),
            records: KeyMap::default(),
            usage: HashMap::new(),
            pending: VecDeque::new(),
            doubtful: HashMap::new(),
            engaged: None,
        }
    }

    /// Whether there were local decisions since the last [`Local::reset`].
    pub(super) fn is_engaged(&self) -> bool {
        self.engaged.is_some()
    }

    /// Whether everything is reported to the store.
    pub(super) fn is_clear(&self) -> bool {
        let charged = self.records.values().all(|b| b.charge.is_none());
        charged && self.grants.is_empty() && self.waiting() == 0
    }

    /// Takes over the leases that the store granted, so that they count against the local share of slots.
    pub(super) fn engage(&mut self, held: &StoreLeases, now: f64) {
        if self.engaged.is_some() {
            return;
        }
        let mut own = KeyMap::<u32>::default();
        held.each(|id, lease| {
            self.limiter.hold(id, &lease.leases, HELD_LIFE);
            for key in &lease.leases {
                *own.entry(key.clone()).or_default() += 1;
            }
        });
        self.engaged = Some((now, own));
    }

    /// The local share of requests in flight during the first lease lifetime, and how much of that lifetime is left;
    /// see [`local_share::at_first`].
    fn at_first(
        &self,
        full: &ScopeLimits,
        life: Duration,
        cluster: &ClusterView<'_>,
    ) -> Option<(u32, Duration)> {
        let (since, own) = self.engaged.as_ref()?;
        let own = own.get(&full.leases).copied().unwrap_or(0);
        let in_flight = cluster.last_seen.in_flight(&full.leases)?;
        let part = local_share::at_first(full.concurrency?, cluster.sharing, own, in_flight);
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
        let mut share = local_share::call(call, cluster.sharing);
        let mut leases_in = SmallVec::<[Duration; 8]>::new();
        for (full, share) in call.scopes.iter().zip(&mut share.scopes) {
            let at_first = self.at_first(full, call.lease_ttl, cluster);
            share.concurrency = at_first.map(|(part, _)| part).or(share.concurrency);
            let one_in = cluster.sharing.one_in;
            let few = full.concurrency.is_some_and(|most| most < cluster.sharing.gateways);
            let withheld = few && !one_in.is_zero();
            let lease_in = at_first.map_or(call.lease_ttl, |(_, rest)| rest);
            leases_in.push(if withheld { lease_in.min(one_in) } else { lease_in });
            self.start_record(full, share, cluster).ok_or_else(|| error.clone())?;
        }
        let mut decision = self.limiter.decide(&share)?;
        decision.degraded = true;
        limit_waits(&mut decision, call, &leases_in, cluster.sharing.one_in);
        show_full_limits(&mut decision.limits, &call.scopes);
        match decision.outcome {
            Outcome::Granted { slot } => {
                let charged = self.limiter.charged(call.id);
                let slot = slot.and_then(|at| call.candidates.get(at)).map(|c| c.leases.clone());
                let call_ = Some(call.clone());
                let grant =
                    Grant { call: call_, slot, lease_ttl: call.lease_ttl, unknown, asking: false, charged };
                self.grants.entry(call.id).or_insert(grant).unknown |= unknown;
            }
            Outcome::Limited { .. } | Outcome::NoSlot { .. } if unknown => {
                self.cancel(call.id, &call.scopes, None);
                self.release_all(call.id, &call.candidates);
            }
            Outcome::Limited { .. } | Outcome::NoSlot { .. } => {}
        }
        Ok(decision)
    }

    /// Starts to count a record at the last seen bucket state of the cluster. Returns `None` without room.
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
        let gateways = cluster.sharing.gateways;
        let known = Kind::ALL.map(|kind| {
            let level = cluster.last_seen.level(&full.record, kind, cluster.now_us) / f64::from(gateways);
            let buckets = full.buckets[kind as usize].zip(share.buckets[kind as usize]);
            let withheld = buckets
                .filter(|(full, _)| local_share::is_burst_withheld(full, gateways))
                .map_or(0.0, |(_, share)| Terms::of(kind, &share).cap);
            BucketState { level: level.ceil().max(withheld), ts: cluster.now_us }
        });
        if known.iter().any(|bucket_state| bucket_state.level > 0.0) {
            self.limiter.put_bucket_states(share, known);
        }
        self.records.insert(full.record.clone(), LocalRecord { full: full.clone(), known, charge: None });
        Some(())
    }

    /// Settles a reservation that this process granted. Returns `None` if the store granted it.
    pub(super) fn settle(&mut self, call: &Settle, sharing: Sharing) -> Option<Result<Settled, Error>> {
        let grant = self.grants.remove(&call.id)?;
        // Usage is reported to the store separately.
        let share = Settle {
            usage: None,
            scopes: call.scopes.iter().map(|s| local_share::scope(s, sharing)).collect(),
            ..call.clone()
        };
        if grant.call.is_none() {
            self.limiter.free(call.id, &leases_of(call));
            return None;
        }
        if grant.unknown || grant.asking {
            self.cancel(call.id, &call.scopes, grant.slot);
            self.release_all(call.id, grant.call.iter().flat_map(|call| &call.candidates));
        }
        let mut settled = self.limiter.end(&share);
        if let Ok(settled) = &mut settled {
            show_full_limits(&mut settled.limits, &call.scopes);
        }
        Some(settled)
    }

    /// Frees the leases of a reservation of the store that ends during the outage.
    pub(super) fn forget_held(&mut self, id: ReservationId, leases: &[Key]) {
        self.limiter.free(id, leases);
    }

    /// Queues the undoing of what the store may have granted under this id. Without room the grant stands.
    fn cancel(&mut self, id: ReservationId, scopes: &[ScopeLimits], slot: Option<Key>) {
        let cancel = Settle { id, actual: Cost::default(), scopes: scopes.into(), slot, usage: None };
        self.defer(Pending::Settle(Box::new(cancel)));
    }

    /// Queues the release of whichever of these slots the store may have given. Without room its lease expires.
    pub(super) fn release_all<'a>(
        &mut self,
        id: ReservationId,
        candidates: impl IntoIterator<Item = &'a Candidate>,
    ) {
        let slots: SmallVec<[Key; 4]> = candidates.into_iter().map(|c| c.leases.clone()).collect();
        if !slots.is_empty() {
            self.defer(Pending::Release(id, slots));
        }
    }

    /// Queues a call for the store. Returns false without room.
    pub(super) fn defer(&mut self, pending: Pending) -> bool {
        let room = self.pending.len() < PENDING_MAX;
        if room {
            self.pending.push_back(pending);
        }
        room
    }

    /// Records how the telling of a settlement ended, if it is told again otherwise.
    pub(super) fn told(&mut self, id: ReservationId, unknown: bool) {
        if unknown {
            self.doubtful.entry(id).or_insert_with(Instant::now);
        } else {
            self.doubtful.remove(&id);
        }
    }

    /// Whether a settlement may have been carried out so long ago that the store would do so once more.
    pub(super) fn is_too_late(&self, id: ReservationId) -> bool {
        self.doubtful.get(&id).is_some_and(|since| since.elapsed() >= TOLD_AGAIN_MAX)
    }

    /// Records that the store is being asked about a grant.
    pub(super) fn asking(&mut self, id: ReservationId) {
        if let Some(grant) = self.grants.get_mut(&id) {
            grant.asking = true;
        }
    }

    /// Records that the store's answer is unknown. The grant stands and is reported like any other.
    pub(super) fn asked(&mut self, id: ReservationId) {
        if let Some(grant) = self.grants.get_mut(&id) {
            (grant.asking, grant.unknown) = (false, true);
        }
    }

    /// Undoes a local grant that the store refused.
    pub(super) fn undo(&mut self, call: &Acquire, sharing: Sharing) {
        let Some(grant) = self.grants.remove(&call.id) else { return };
        let nothing = Settle {
            id: call.id,
            actual: Cost::default(),
            scopes: call.scopes.iter().map(|s| local_share::scope(s, sharing)).collect(),
            slot: grant.slot,
            usage: None,
        };
        self.limiter.take_back(&nothing);
    }

    /// The candidates with room in the local share. A slot that `id` holds counts.
    pub(super) fn with_room(
        &self,
        id: ReservationId,
        candidates: &[Candidate],
        sharing: Sharing,
    ) -> SmallVec<[usize; 8]> {
        let shares = local_share::candidates(candidates, sharing);
        (0..shares.len()).filter(|at| self.limiter.has_room(id, &shares[*at])).collect()
    }

    /// Takes a slot of the local share for a reservation of the store.
    pub(super) fn take_slot(
        &mut self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
        sharing: Sharing,
    ) -> Result<Option<usize>, Error> {
        let placed = self.place_in_share(id, from, candidates, lease_ttl, sharing)?;
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
        sharing: Sharing,
    ) -> Result<Option<usize>, Error> {
        let placed = self.place_in_share(id, from, candidates, lease_ttl, sharing)?;
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

    fn place_in_share(
        &self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
        sharing: Sharing,
    ) -> Result<Option<usize>, Error> {
        self.limiter.place(id, from, &local_share::candidates(candidates, sharing), lease_ttl)
    }

    pub(super) fn renew(&self, renewal: &Renewal, lease_ttl: Duration) -> bool {
        self.limiter.extend(renewal, lease_ttl)
    }

    pub(super) fn release(&mut self, id: ReservationId, leases: &[Key]) {
        self.limiter.free(id, leases);
        // A grant of a slot alone ends with its slot, because it is never settled.
        let of_slot_alone =
            |grant: &Grant| grant.call.is_none() && grant.slot.iter().all(|s| leases.contains(s));
        if self.grants.get(&id).is_some_and(of_slot_alone) {
            self.grants.remove(&id);
        }
    }

    pub(super) fn peek(&self, scopes: &[ScopeLimits], sharing: Sharing) -> Result<Vec<LimitState>, Error> {
        let share: Vec<ScopeLimits> = scopes.iter().map(|s| local_share::scope(s, sharing)).collect();
        let mut limits = self.limiter.look(&share)?;
        show_full_limits(&mut limits, scopes);
        Ok(limits)
    }

    /// Settlements, releases and usage records that wait for the store.
    pub(super) fn waiting(&self) -> usize {
        self.pending.len() + self.usage.len()
    }

    /// Forgets the local decisions. The next one starts at the bucket states that are last seen then.
    pub(super) fn reset(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        let usage = std::mem::take(&mut self.usage);
        let doubtful = std::mem::take(&mut self.doubtful);
        *self = Self { pending, usage, doubtful, ..Self::new(self.epoch) };
    }
}

pub(super) fn leases_of(call: &Settle) -> SmallVec<[Key; 4]> {
    let scopes = call.scopes.iter().filter(|s| s.concurrency.is_some()).map(|s| s.leases.clone());
    scopes.chain(call.slot.clone()).collect()
}

/// Bounds the waits of a refusal. Leases of the store have no expiry here, and a share of zero never fits, so a wait
/// for a lease is at most the lease lifetime of its scope.
///
/// A cost beyond the share never fits either, until it is clamped in `one_in`.
fn limit_waits(decision: &mut Decision, call: &Acquire, leases_in: &[Duration], one_in: Duration) {
    let wait = match &mut decision.outcome {
        Outcome::Granted { .. } => return,
        Outcome::NoSlot { wait } => return *wait = call.lease_ttl.min(*wait),
        Outcome::Limited { wait } => wait,
    };
    for limit in &mut decision.limits {
        let Some(scope) = limit.scope_in(&call.scopes) else { continue };
        if let (What::Bucket(kind), Verdict::Never) = (limit.what, limit.verdict) {
            let fits = scope.buckets[kind as usize]
                .is_some_and(|full| full.capacity > 0 && call.cost.get(kind) <= full.capacity);
            if !one_in.is_zero() && (fits || call.estimated) {
                limit.verdict = Verdict::Wait(one_in);
            }
        }
        let open = scope.concurrency != Some(0);
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

/// Replaces the local share by the full limit, which answers to clients show.
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
