//! The vocabulary of a limit decision.

use std::future::Future;
use std::time::Duration;

use smallvec::SmallVec;
use uuid::Uuid;

use crate::budget;
use crate::data_set::DataSetsLost;
use crate::usage::{Usage, UsageLines};
use crate::{Error, Holder};

/// What a bucket counts. The discriminant is the position inside a record and on the wire to the scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(usize)]
pub enum Kind {
    /// One per request.
    Requests = 0,
    /// Prompt and completion tokens together.
    Tokens = 1,
    /// Prompt tokens.
    InputTokens = 2,
    /// Completion tokens.
    OutputTokens = 3,
    /// Money, in micro-dollars.
    Spend = 4,
}

impl Kind {
    /// How many kinds there are: the width of a record.
    pub const COUNT: usize = 5;
    /// Every kind, in record order.
    pub const ALL: [Kind; Kind::COUNT] =
        [Kind::Requests, Kind::Tokens, Kind::InputTokens, Kind::OutputTokens, Kind::Spend];

    /// The name used in error bodies, metrics labels and headers.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Requests => "requests",
            Kind::Tokens => "tokens",
            Kind::InputTokens => "input_tokens",
            Kind::OutputTokens => "output_tokens",
            Kind::Spend => "spend",
        }
    }
}

/// What a request costs, in whole units per [`Kind`] (spend in micro-dollars).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    units: [u64; Kind::COUNT],
    /// Millionths of a unit on top: what is left of requests that have partly drained.
    parts: [u32; Kind::COUNT],
}

impl Cost {
    /// So many units of each kind.
    pub const fn new(units: [u64; Kind::COUNT]) -> Self {
        Self { units, parts: [0; Kind::COUNT] }
    }

    /// The cost of one request with so many prompt and completion tokens and so much money.
    pub const fn of_request(input_tokens: u64, output_tokens: u64, spend_micro_dollars: u64) -> Self {
        Self::new([
            1,
            input_tokens.saturating_add(output_tokens),
            input_tokens,
            output_tokens,
            spend_micro_dollars,
        ])
    }

    /// The whole units of one kind.
    pub const fn get(&self, kind: Kind) -> u64 {
        self.units[kind as usize]
    }

    /// The amount of one kind in the arithmetic, micro-units.
    pub(crate) fn amount(&self, kind: Kind) -> f64 {
        budget::amount(kind, self.get(kind)) + f64::from(self.parts[kind as usize])
    }

    /// Sets one kind to whole micro-units.
    pub(crate) fn set_amount(&mut self, kind: Kind, amount: f64) {
        let unit = budget::unit(kind);
        self.units[kind as usize] = (amount / unit).floor() as u64;
        self.parts[kind as usize] = (amount % unit) as u32;
    }
}

/// Capacity and drain rate of one bucket. Neither is stored: both come with every call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    /// The most that may be used at once, whole units. At most [`Bucket::MAX_UNITS`]; of money 9e15 micro-dollars.
    pub capacity: u64,
    /// Whole units drained per `period`. Zero never drains; such a meter is forgotten `period` after it was written.
    pub rate: u64,
    /// The period of `rate`; a minute for requests and tokens per minute. At least one millisecond.
    pub period: Duration,
}

impl Bucket {
    /// Largest capacity or rate: 2^53 micro-units, so that doubles in Lua stay exact.
    pub const MAX_UNITS: u64 = 9_000_000_000;

    /// A bucket of `rate` per minute that holds `burst` minutes' worth.
    pub fn per_minute(rate: u64, burst: f64) -> Self {
        Self::per(rate, Duration::from_secs(60), burst)
    }

    /// A bucket of `rate` per period that holds `burst` periods' worth.
    pub fn per(rate: u64, period: Duration, burst: f64) -> Self {
        let capacity = ((rate as f64) * burst.max(0.0)).floor().clamp(0.0, Self::MAX_UNITS as f64) as u64;
        Self { capacity: capacity.max(u64::from(rate > 0)), rate: rate.min(Self::MAX_UNITS), period }
    }
}

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

/// Names a scope's record in the store; built only by [`crate::key`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub(crate) std::sync::Arc<str>);

impl Key {
    /// The key as the store sees it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Every limit of one scope (a tenant, a model, a key, the whole cluster, or a product of them).
#[derive(Debug, Clone, PartialEq)]
pub struct ScopeLimits {
    /// The record that holds this scope's meters.
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
    /// Units of each kind that are set aside for quota taken ahead ([`crate::ahead`]), on top of `buckets`: the capacity
    /// of the limit is that of its bucket and this. Zero for every kind takes nothing ahead.
    pub prefetch: [u64; Kind::COUNT],
}

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

/// Bounds a candidate's part of what all candidates of the call have in flight, the request itself included. Rounded up
/// to whole requests, one at least.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// The largest part, in millionths; more than the whole bounds nothing.
    pub millionths: u32,
    /// The most requests in flight as the caller knows it: where candidates lie on several nodes and no call sees all of
    /// them, this holds instead.
    pub estimate: u32,
}

impl Bound {
    /// The most requests a candidate may have while all of them together have so many.
    pub(crate) fn of(self, present: usize) -> u32 {
        let part = u64::from(self.millionths).saturating_mul(present as u64 + 1).div_ceil(1_000_000);
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

/// The id of a reservation, of its leases and of every retry of the same call.
pub type ReservationId = Uuid;

/// The scopes of a request; few, so kept inline.
pub type Scopes = SmallVec<[ScopeLimits; 6]>;

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
    /// Every scope the request is under, at most [`MAX_SCOPES`].
    pub scopes: Scopes,
    /// Backends in order of preference, at most [`MAX_CANDIDATES`]. Empty: no slot is wanted.
    pub candidates: Vec<Candidate>,
    /// How long leases live without renewal.
    pub lease_ttl: Duration,
}

/// Most scopes in one call.
pub const MAX_SCOPES: usize = 16;
/// Most candidate backends in one call.
pub const MAX_CANDIDATES: usize = 64;

/// The state of one limit after a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LimitState {
    /// Index into [`Acquire::scopes`].
    pub scope: usize,
    /// What was limited.
    pub what: What,
    /// What this limit said.
    pub verdict: Verdict,
    /// Capacity (or the concurrency limit), whole units.
    pub limit: u64,
    /// What is left, whole units, rounded down.
    pub remaining: u64,
    /// Time until the meter is empty again; zero for concurrency, [`crate::FOREVER`] for a meter that does not
    /// drain.
    pub reset: Duration,
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

/// The answer to an [`Acquire`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Granted, or why not.
    pub outcome: Outcome,
    /// Every limit that was looked at, in scope order, buckets in [`Kind`] order, concurrency last.
    pub limits: Vec<LimitState>,
    /// The store's time of the decision, microseconds since an epoch of its own.
    pub now_us: u64,
    /// True when the cluster's store could not decide and this process did, by each limit's [`WithoutStore`].
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
    /// The same scopes as at acquire; their present rates drain the meters.
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

/// The contract; see the crate documentation. Futures may be dropped at any await: an acquire whose caller is
/// gone must be cancelled by its id.
pub trait Limiter: Send + Sync {
    /// Tells when the store has lost all it knew, leases included, where it can tell.
    fn data_sets_lost(&self) -> Option<DataSetsLost> {
        None
    }
    /// Decides every limit and takes a slot, in one atomic call.
    fn acquire(&self, call: &Acquire) -> impl Future<Output = Result<Decision, Error>> + Send;
    /// Moves a reservation's slot: releases `from` (if any) and takes the first free candidate. Used by retries.
    /// `None` when every candidate is full; then `from` is released all the same.
    fn move_slot(
        &self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
    ) -> impl Future<Output = Result<Option<usize>, Error>> + Send;
    /// Applies `actual - reserved` and frees every lease. Idempotent.
    fn settle(&self, call: &Settle) -> impl Future<Output = Result<Settled, Error>> + Send;
    /// Extends leases that still exist; returns the ids that have lost at least one.
    fn renew(
        &self,
        renewals: &[Renewal],
        lease_ttl: Duration,
    ) -> impl Future<Output = Result<Vec<ReservationId>, Error>> + Send;
    /// Frees leases without settling.
    fn release(&self, id: ReservationId, leases: &[Key]) -> impl Future<Output = Result<(), Error>> + Send;
    /// Frees every lease that a holder which is gone took in these sets, at most
    /// [`crate::holder::REAP_SETS_MAX`]; how many. `None` when it says itself that it lives: then nothing is freed.
    /// Idempotent. One that lives all the same finds its leases lost, and may take them again.
    fn reap(&self, holder: Holder, leases: &[Key])
    -> impl Future<Output = Result<Option<u64>, Error>> + Send;
    /// Decides and charges for good, in one atomic call. One limit per charge in the answer, whose `scope` is the
    /// charge's index. A call of unknown outcome may have charged.
    fn charge(&self, charges: &[Charge]) -> impl Future<Output = Result<Decision, Error>> + Send;
    /// How every limit stands now; reads only.
    fn peek(&self, scopes: &[ScopeLimits]) -> impl Future<Output = Result<Vec<LimitState>, Error>> + Send;
    /// What was used, per record of [`Key::usage`] in the order given; one without lines was never written or has
    /// expired. At most [`crate::usage::USAGE_RECORDS_MAX`] records; reads only.
    fn usage(&self, records: &[Key]) -> impl Future<Output = Result<Vec<UsageLines>, Error>> + Send;
}
