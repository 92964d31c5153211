//! Deciding without the store, and telling it afterwards.
//!
//! Goes around a limiter whose store can fail. While the store does not serve, each scope does what its
//! [`WithoutStore`] says; a gateway's share starts where the cluster's meters were last seen, and the leases it
//! already holds count against its share of slots.
//!
//! **No double burst.** What was admitted here is told to the store when it is back, before requests go there again:
//! settlements that had to wait, open grants (taken over under their own ids, so that they settle like any other),
//! leases, and the rest of each local meter as one charge. A gateway's meter drains at its share of the rate from its
//! share of the level, so the shares' meters together are never below the meter one store would have had. Gateways go
//! back to the store one after the other, each at first within its share; see `join`.
//!
//! **A store that forgot is an outage.** One that comes back empty within milliseconds has lost every lease. Until the
//! gateways have counted theirs again, the grace of any return, each decides alone.
//!
//! **Nobody waits for a dead store.** Once the [`Breaker`] is open only the background asks; see there.

mod calls;
mod held;
mod join;
mod local;
mod recovery;
mod seen;
mod share;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use self::held::{Held, Leases};
use self::local::{Local, Pending};
use self::seen::Seen;
use crate::breaker::{Breaker, Phase};
use crate::data_set::DataSetsLost;
use crate::{Acquire, Decision, Error, Fault, Limiter, Outcome, ScopeLimits, Settle, Trouble, WithoutStore};

/// How many gateways share the limits now, this one included.
pub type LiveGateways = Arc<dyn Fn() -> u32 + Send + Sync>;

/// A limiter that decides also without its store. Dropping it stops its background task.
pub struct Fallback<L> {
    inner: Arc<Inner<L>>,
    worker: JoinHandle<()>,
}

/// How a [`Fallback`] stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Whether requests ask the store.
    pub phase: Phase,
    /// Times the breaker opened.
    pub opened: u64,
    /// Decisions made here.
    pub local_decisions: u64,
    /// Settlements, releases and lines of usage that wait for the store.
    pub pending: usize,
    /// Settlements and releases that found no room or that the store will never take.
    pub lost: u64,
}

struct Inner<L> {
    store: L,
    gateways: LiveGateways,
    epoch: Instant,
    breaker: Mutex<Breaker>,
    /// Data sets of the store's that were lost, and how many of them this process has heard of.
    data_sets_lost: Option<DataSetsLost>,
    heard_of: AtomicU64,
    /// The breaker's phase, and whether it holds evidence: what every request reads without a lock.
    phase: AtomicU8,
    suspicious: AtomicBool,
    calls: AtomicU32,
    /// The last trouble, and a scope whose keys showed it: where a probe asks.
    reason: Mutex<(Error, Option<ScopeLimits>)>,
    seen: Seen,
    held: Held,
    local: Mutex<Local>,
    /// Whether `local` has anything to say.
    engaged: AtomicBool,
    wake: Notify,
    opened: AtomicU64,
    local_decisions: AtomicU64,
    lost: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<L: Limiter + 'static> Fallback<L> {
    /// Starts the background task; needs a tokio runtime.
    pub fn new(store: L, gateways: LiveGateways) -> Self {
        let epoch = Instant::now();
        let data_sets_lost = store.data_sets_lost();
        let inner = Arc::new(Inner {
            heard_of: AtomicU64::new(data_sets_lost.as_ref().map_or(0, |lost| *lost.borrow())),
            data_sets_lost,
            store,
            gateways,
            epoch,
            breaker: Mutex::default(),
            phase: AtomicU8::new(Phase::Closed as u8),
            suspicious: AtomicBool::new(false),
            calls: AtomicU32::new(0),
            reason: Mutex::new((Error::Unreachable("not asked yet".into()), None)),
            seen: Seen::default(),
            held: Held::default(),
            local: Mutex::new(Local::new(epoch)),
            engaged: AtomicBool::new(false),
            wake: Notify::new(),
            opened: AtomicU64::new(0),
            local_decisions: AtomicU64::new(0),
            lost: AtomicU64::new(0),
        });
        let worker = tokio::spawn(recovery::run(inner.clone()));
        Self { inner, worker }
    }

    /// The limiter inside.
    pub fn store(&self) -> &L {
        &self.inner.store
    }

    /// How many gateways share the limits now, this one included.
    pub fn gateways(&self) -> u32 {
        self.inner.gateways()
    }

    /// How it stands.
    pub fn status(&self) -> Status {
        Status {
            phase: lock(&self.inner.breaker).phase(),
            opened: self.inner.opened.load(Ordering::Relaxed),
            local_decisions: self.inner.local_decisions.load(Ordering::Relaxed),
            pending: lock(&self.inner.local).waiting(),
            lost: self.inner.lost.load(Ordering::Relaxed),
        }
    }

    /// Tells the store what it can before the process ends, for at most so long; how much it could not.
    pub async fn flush(&self, most: Duration) -> usize {
        if self.inner.engaged.load(Ordering::Relaxed) {
            let told = tokio::time::timeout(most, recovery::tell(&self.inner)).await;
            if !matches!(told, Ok(Ok(()))) {
                tracing::warn!("the limit store was not told all that was decided without it");
            }
        }
        lock(&self.inner.local).waiting()
    }
}

impl<L> Drop for Fallback<L> {
    fn drop(&mut self) {
        self.worker.abort();
    }
}

impl<L> fmt::Debug for Fallback<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fallback").field("phase", &lock(&self.inner.breaker).phase()).finish_non_exhaustive()
    }
}

impl<L: Limiter> Inner<L> {
    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    /// Microseconds, the time of the meters here.
    fn now_us(&self) -> f64 {
        self.now().as_micros() as f64
    }

    fn gateways(&self) -> u32 {
        (self.gateways)().max(1)
    }

    fn is(&self, phase: Phase) -> bool {
        self.phase.load(Ordering::Relaxed) == phase as u8
    }

    /// Whether the store is asked.
    fn is_asked(&self) -> bool {
        self.is(Phase::Closed) || self.is(Phase::Joining)
    }

    fn publish(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    fn answered(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if self.suspicious.swap(false, Ordering::Relaxed) {
            lock(&self.breaker).answered();
        }
    }

    /// How many data sets the store has lost.
    fn lost_sets(&self) -> u64 {
        self.data_sets_lost.as_ref().map_or(0, |lost| *lost.borrow())
    }

    /// Whether the store has lost what it knew since this was asked last; then it is not asked for a while.
    fn hear_of_loss(&self) -> bool {
        let lost = self.lost_sets();
        if self.heard_of.swap(lost, Ordering::Relaxed) == lost {
            return false;
        }
        {
            let mut breaker = lock(&self.breaker);
            if breaker.phase() == Phase::Closed {
                self.opened.fetch_add(1, Ordering::Relaxed);
            }
            breaker.lost(self.now());
            self.publish(breaker.phase());
        }
        lock(&self.reason).0 = Error::Unreachable("it has lost its data".into());
        tracing::warn!("the limit store has lost its data; leases are counted again before it is asked");
        self.wake.notify_one();
        true
    }

    /// Evidence against the store.
    fn failed(&self, error: &Error, scope: Option<&ScopeLimits>) {
        let trouble = error.trouble();
        let calls = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        if !matches!(trouble, Trouble::Away | Trouble::Unknown) {
            return;
        }
        let now = self.now();
        let opened = {
            let mut breaker = lock(&self.breaker);
            if breaker.roll(now) {
                self.calls.store(1, Ordering::Relaxed);
            }
            let opened = breaker.failed(now, trouble, calls);
            self.publish(breaker.phase());
            opened
        };
        self.suspicious.store(true, Ordering::Relaxed);
        if let Some(scope) = scope {
            lock(&self.reason).1 = Some(scope.clone());
        }
        if opened {
            lock(&self.reason).0 = error.clone();
            self.opened.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(%error, "the limit store is away; each limit does what it says for that");
        }
        self.wake.notify_one();
    }

    /// Asks the store; once more, under the same id, when the connection was lost during the call.
    async fn ask(&self, call: &Acquire) -> Result<Decision, Error> {
        match self.store.acquire(call).await {
            Err(Error::Lost) => self.store.acquire(call).await,
            decided => decided,
        }
    }

    /// The local side, taking over the leases the store granted when it begins to decide.
    fn local(&self) -> MutexGuard<'_, Local> {
        let mut local = lock(&self.local);
        if !local.is_engaged() {
            // Before it looks at what is held: who ends a lease after that must find that something is decided here.
            self.engaged.store(true, Ordering::Relaxed);
            local.engage(&self.held, self.now_us());
        }
        local
    }

    /// What an answer of the store's says, and what it grants.
    fn note(&self, call: &Acquire, decision: &Decision) {
        self.answered();
        self.seen.note(&call.scopes, &decision.limits, self.now_us());
        if let Outcome::Granted { slot } = decision.outcome {
            self.held.hold(call.id, leases_taken(call, slot), call.lease_ttl);
        }
    }

    fn decide(&self, call: &Acquire, error: Error) -> Result<Decision, Error> {
        let unknown = error.trouble() == Trouble::Unknown;
        if call.scopes.iter().any(|scope| scope.without_store == WithoutStore::Closed) {
            if unknown {
                let cancel = Settle {
                    id: call.id,
                    actual: Default::default(),
                    scopes: call.scopes.clone(),
                    slot: None,
                    usage: None,
                };
                self.defer(&mut self.local(), Pending::Settle(Box::new(cancel)));
            }
            return Err(error);
        }
        let decided = self.decide_in(&mut self.local(), call, &error, unknown);
        self.local_decisions.fetch_add(1, Ordering::Relaxed);
        if self.is(Phase::Closed) {
            self.wake.notify_one();
        }
        decided
    }

    fn decide_in(
        &self,
        local: &mut Local,
        call: &Acquire,
        error: &Error,
        unknown: bool,
    ) -> Result<Decision, Error> {
        local.decide(call, self.gateways(), &self.seen, self.now_us(), error, unknown)
    }

    /// False, and counted, when there is no room.
    fn defer(&self, local: &mut Local, pending: Pending) -> bool {
        let room = local.defer(pending);
        if !room {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        room
    }
}

/// Whether a failed settlement or release can still be made later.
fn waits(error: &Error) -> bool {
    match error {
        Error::Refused { fault, .. } => !matches!(fault, Fault::Record | Fault::Other),
        Error::Timeout(_) | Error::Lost | Error::Unreachable(_) => true,
        Error::Invalid(_) => false,
    }
}

/// The leases of a granted call: those of its scopes, and its slot.
fn leases_taken(call: &Acquire, slot: Option<usize>) -> Leases {
    let slot = slot.and_then(|at| call.candidates.get(at)).map(|c| c.leases.clone());
    let limited = call.scopes.iter().filter(|scope| scope.concurrency.is_some());
    limited.map(|scope| scope.leases.clone()).chain(slot).collect()
}

fn no_room() -> Error {
    Error::Unreachable("too many settlements wait for the limit store".into())
}

/// The error a call gets that was never sent because of an earlier one's.
fn not_sent(error: Error) -> Error {
    match error {
        Error::Timeout(_) | Error::Lost => Error::Unreachable("it went silent".into()),
        known => known,
    }
}
