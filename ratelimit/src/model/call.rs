//! The calls of a limiter and their answers.

use std::time::Duration;

use smallvec::SmallVec;

use crate::model::cost::Cost;
use crate::model::id::ReservationId;
use crate::model::key::Key;
use crate::model::kind::{Bucket, Kind};
use crate::model::limits::{LimitState, Scopes};
use crate::model::usage::Usage;

/// One admission.
#[derive(Debug, Clone)]
pub struct Acquire {
    /// A repeated call with the id of a granted one returns the stored grant and charges nothing, also after
    /// its settlement. One that arrives after a settlement that came first is refused without a wait.
    pub id: ReservationId,
    /// What to reserve.
    pub cost: Cost,
    /// True when the token part of `cost` was estimated and not stated by the caller: such a cost is clamped to
    /// a bucket's capacity instead of being refused for ever.
    pub estimated: bool,
    /// Every scope the request is under, at most [`MAX_SCOPES`](crate::MAX_SCOPES).
    pub scopes: Scopes,
    /// Backends in order of preference, at most [`MAX_CANDIDATES`]. Empty: no slot is wanted.
    pub candidates: Vec<Candidate>,
    /// How long leases live without renewal.
    pub lease_ttl: Duration,
}

/// Most lease sets in one call of [`Limiter::free_orphans`](crate::model::limiter::Limiter::free_orphans).
pub const ORPHAN_SETS_MAX: usize = 64;
/// Most candidate backends in one call.
pub const MAX_CANDIDATES: usize = 64;

/// A place a request may be sent to: the leases of one backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The sorted set of the backend's leases.
    pub leases: Key,
    /// The most requests the whole cluster may have in flight there. Zero is closed.
    pub max_concurrency: u32,
    /// A bound besides, relative to what the others have.
    pub bound: Option<Bound>,
}

/// Bounds a candidate's part of what all candidates of the call and those elsewhere have in flight, the request itself
/// included. Rounded up to whole requests, one at least.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// The largest part, in millionths; more than the whole bounds nothing.
    pub millionths: u32,
    /// What backends have in flight that are no candidates of this call, as the caller knows it.
    pub elsewhere: u32,
    /// The most requests in flight as the caller knows it: where candidates lie on several nodes and no call sees all of
    /// them, this holds instead.
    pub estimate: u32,
}

impl Bound {
    /// The most requests a candidate may have while all of them together have so many.
    pub(crate) fn of(self, present: usize) -> u32 {
        let all = (present as u64).saturating_add(u64::from(self.elsewhere)).saturating_add(1);
        let part = u64::from(self.millionths).saturating_mul(all).div_ceil(1_000_000);
        u32::try_from(part).unwrap_or(u32::MAX).max(1)
    }
}

impl Candidate {
    /// The candidate for a call that does not see the others.
    pub fn apart(&self) -> Self {
        let estimate = self.bound.map_or(u32::MAX, |bound| bound.estimate);
        Self { leases: self.leases.clone(), max_concurrency: self.max_concurrency.min(estimate), bound: None }
    }
}

/// The answer to an [`Acquire`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Granted, or why not.
    pub outcome: Outcome,
    /// Every limit that was looked at, in scope order, buckets in [`Kind`] order, concurrency last.
    pub limits: Vec<LimitState>,
    /// The store's time of the decision, microseconds since an epoch of its own.
    pub now_us: u64,
    /// True when the cluster's store could not decide and this process did, by each limit's
    /// [`WithoutStore`](crate::WithoutStore).
    pub degraded: bool,
}

/// What an admission came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Reserved. `slot` is the index of the candidate whose slot was taken; `None` when none was asked for.
    Granted {
        /// Index into [`Acquire::candidates`].
        slot: Option<usize>,
    },
    /// A limit of the caller refused; nothing was written. `wait` is when every refusing limit would fit,
    /// `None` when one of them never will.
    Limited {
        /// Time until it would fit.
        wait: Option<Duration>,
    },
    /// The limits would have granted, but every candidate is full; nothing was written.
    NoSlot {
        /// When the first candidate has a slot if nothing is released or renewed: an upper bound. The lease
        /// time when every candidate is closed.
        wait: Duration,
    },
}

/// Ends a reservation.
#[derive(Debug, Clone)]
pub struct Settle {
    /// The reservation.
    pub id: ReservationId,
    /// What was really used; all zero undoes the reservation (the request never reached a model).
    pub actual: Cost,
    /// The same scopes as at acquire; their present rates drain the bucket states.
    pub scopes: Scopes,
    /// The backend whose slot is held, if one is.
    pub slot: Option<Key>,
    /// What to add to the account of who used what; added exactly when `actual` is charged.
    pub usage: Option<Usage>,
}

/// The outcome of a settlement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settled {
    /// False when the reservation was settled before, had expired or was never granted. Of an unknown
    /// reservation the actual is debited once and nothing is credited: what it reserved is not known, and
    /// limits never under-count.
    pub applied: bool,
    /// The limits afterwards, for response headers of the next answer.
    pub limits: Vec<LimitState>,
    /// The store's time of the settlement, like [`Decision::now_us`]; zero when it waits for the store.
    pub now_us: u64,
}

/// A debit or credit that is final: nothing is remembered that could be settled, and a repeated call charges again.
#[derive(Debug, Clone, PartialEq)]
pub struct Charge {
    /// The scope's record.
    pub record: Key,
    /// What is counted.
    pub kind: Kind,
    /// The bucket of that kind. What the record holds of other kinds is kept.
    pub bucket: Bucket,
    /// What must fit, whole units.
    pub needed: u64,
    /// What is charged, whole units; negative gives back.
    pub added: i64,
    /// What becomes of it when something does not fit.
    pub rule: ChargeRule,
}

/// Most charges in one call.
pub const MAX_CHARGES: usize = 64;

/// What becomes of a charge when something does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChargeRule {
    /// Refuses when it does not fit. Written only when nothing refuses.
    AllOrNothing,
    /// Refuses when it does not fit, and is written all the same (into debt, to the ceiling), unless a charge of all or
    /// nothing refuses.
    Always,
    /// Never refuses. Written unless a charge of all or nothing refuses.
    Note,
}

/// One reservation in a batched renewal.
#[derive(Debug, Clone)]
pub struct Renewal {
    /// The reservation.
    pub id: ReservationId,
    /// Every sorted set that holds one of its leases.
    pub leases: SmallVec<[Key; 4]>,
}
