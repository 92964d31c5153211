//! The limits of a scope, and the state of each after a decision.

use std::time::Duration;

use smallvec::SmallVec;

use crate::model::id::ReservationId;
use crate::model::key::Key;
use crate::model::kind::{Bucket, Kind};

/// Whether a limit refuses, or only counts what it would have refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Refuses.
    #[default]
    Enforce,
    /// Counts and reports, never refuses.
    Shadow,
}

/// What a limit does while the store cannot decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WithoutStore {
    /// Each gateway enforces its share: the limit over the gateways there are.
    #[default]
    LocalShare,
    /// Admits everything; what was admitted is charged when the store is back.
    Open,
    /// The call fails with the store's error.
    Closed,
}

/// Every limit of one scope (a tenant, a model, a key, the whole cluster, or a product of them).
#[derive(Debug, Clone, PartialEq)]
pub struct ScopeLimits {
    /// The record that holds this scope's bucket states.
    pub record: Key,
    /// The sorted set that holds this scope's leases; used only when `concurrency` is set.
    pub leases: Key,
    /// The bucket per kind, where the scope limits that kind.
    pub buckets: [Option<Bucket>; Kind::COUNT],
    /// How many requests may be in flight at once.
    pub concurrency: Option<u32>,
    /// Enforce or shadow.
    pub mode: Mode,
    /// What these limits do while the store is away.
    pub without_store: WithoutStore,
    /// Units of each kind that are set aside for quota taken ahead ([`crate::layers::quota_prefetch`]), on top of `buckets`: the capacity
    /// of the limit is that of its bucket and this. Zero for every kind takes nothing ahead.
    pub prefetch: [u64; Kind::COUNT],
}

/// Most scopes in one call: those of a request's key, tenant, tenant and model, model and everything, each with limits of
/// its own and limit resources, each with a budget besides, and those of a provider account.
pub const MAX_SCOPES: usize = 64;
/// The scopes of a request; few, so kept inline.
pub type Scopes = SmallVec<[ScopeLimits; 6]>;

impl Key {
    /// The record of the reservation of a call with these scopes.
    pub fn reservation_of(scopes: &[ScopeLimits], id: ReservationId) -> Key {
        Key::reservation(scopes.first().map_or("g", |scope| scope.record.tag()), id)
    }
}

/// The state of one limit after a decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LimitState {
    /// The record of its scope, [`ScopeLimits::record`]: with [`LimitState::what`] the id of the limit, whatever the
    /// call it came from.
    pub scope: Key,
    /// What was limited.
    pub what: What,
    /// What this limit said.
    pub verdict: Verdict,
    /// Capacity (or the concurrency limit), whole units.
    pub limit: u64,
    /// What is left, whole units, rounded down.
    pub remaining: u64,
    /// Time until the bucket state is empty again; zero for concurrency, [`crate::model::leaky_bucket::FOREVER`] for a bucket state that does not
    /// drain.
    pub reset: Duration,
}

impl LimitState {
    /// The scope that this limit is one of.
    pub fn scope_in<'a>(&self, scopes: &'a [ScopeLimits]) -> Option<&'a ScopeLimits> {
        scopes.iter().find(|scope| scope.record == self.scope)
    }

    /// Where that scope stands among these.
    pub fn position_in(&self, scopes: &[ScopeLimits]) -> Option<usize> {
        scopes.iter().position(|scope| scope.record == self.scope)
    }

    /// Whether this limit refuses a call under these scopes.
    pub fn refuses(&self, scopes: &[ScopeLimits]) -> bool {
        self.verdict != Verdict::Fits
            && self.scope_in(scopes).is_some_and(|scope| scope.mode == Mode::Enforce)
    }
}

/// A bucket of some kind, or the number of requests in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum What {
    /// A bucket.
    Bucket(Kind),
    /// Requests in flight.
    Concurrency,
}

/// What one limit says about one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It fits.
    Fits,
    /// It fits after this long if nobody else takes it. For concurrency this is when enough leases have expired:
    /// an upper bound, since a release can come sooner.
    Wait(Duration),
    /// It never fits: an explicit cost above capacity, a full bucket that does not drain, or a limit of zero.
    Never,
}
