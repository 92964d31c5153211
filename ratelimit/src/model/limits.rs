//! The limits of a scope, and the state of each after a decision.

use std::fmt;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::Duration;

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

/// The scopes of a request. Calls under the same scopes share one list, so a copy costs a count of references.
#[derive(Clone, Default)]
pub struct Scopes(Option<Arc<Shared>>);

#[derive(Clone)]
struct Shared {
    scopes: Box<[ScopeLimits]>,
    digest: OnceLock<u128>,
}

impl Scopes {
    /// No scopes.
    pub const fn new() -> Self {
        Self(None)
    }

    /// A keyed hash of what scripts are told of these limits: equal for calls that one script call can decide. Computed
    /// once per list.
    pub(crate) fn digest(&self) -> u128 {
        static KEYS: LazyLock<[RandomState; 2]> = LazyLock::new(Default::default);
        let Some(shared) = &self.0 else { return 0 };
        *shared.digest.get_or_init(|| {
            let [high, low] = KEYS.each_ref().map(|key| key.hash_one(Told(&shared.scopes)));
            u128::from(high) << 64 | u128::from(low)
        })
    }
}

/// The limits of a call, as far as scripts are told of them.
struct Told<'a>(&'a [ScopeLimits]);

impl Hash for Told<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for scope in self.0 {
            (scope.record.as_str(), scope.leases.as_str(), scope.concurrency).hash(state);
            (scope.mode == Mode::Shadow).hash(state);
            for bucket in &scope.buckets {
                bucket.map(|b| (b.capacity, b.rate, b.period)).hash(state);
            }
        }
        self.0.len().hash(state);
    }
}

impl PartialEq for Scopes {
    fn eq(&self, other: &Self) -> bool {
        let same = self.0.as_ref().zip(other.0.as_ref()).is_some_and(|(a, b)| Arc::ptr_eq(a, b));
        same || **self == **other
    }
}

impl fmt::Debug for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self).finish()
    }
}

impl Deref for Scopes {
    type Target = [ScopeLimits];

    fn deref(&self) -> &[ScopeLimits] {
        self.0.as_ref().map_or(&[], |shared| &shared.scopes)
    }
}

/// A list that is shared is copied before it is changed.
impl DerefMut for Scopes {
    fn deref_mut(&mut self) -> &mut [ScopeLimits] {
        let Some(shared) = &mut self.0 else { return &mut [] };
        let own = Arc::make_mut(shared);
        own.digest = OnceLock::new();
        &mut own.scopes
    }
}

impl<'a> IntoIterator for &'a mut Scopes {
    type Item = &'a mut ScopeLimits;
    type IntoIter = std::slice::IterMut<'a, ScopeLimits>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter_mut()
    }
}

impl From<Vec<ScopeLimits>> for Scopes {
    fn from(scopes: Vec<ScopeLimits>) -> Self {
        let shared = |scopes: Vec<_>| Shared { scopes: scopes.into(), digest: OnceLock::new() };
        Self((!scopes.is_empty()).then(|| Arc::new(shared(scopes))))
    }
}

impl<const N: usize> From<[ScopeLimits; N]> for Scopes {
    fn from(scopes: [ScopeLimits; N]) -> Self {
        Vec::from(scopes).into()
    }
}

impl From<&[ScopeLimits]> for Scopes {
    fn from(scopes: &[ScopeLimits]) -> Self {
        scopes.to_vec().into()
    }
}

impl FromIterator<ScopeLimits> for Scopes {
    fn from_iter<I: IntoIterator<Item = ScopeLimits>>(scopes: I) -> Self {
        scopes.into_iter().collect::<Vec<_>>().into()
    }
}

impl<'a> IntoIterator for &'a Scopes {
    type Item = &'a ScopeLimits;
    type IntoIter = std::slice::Iter<'a, ScopeLimits>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

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
