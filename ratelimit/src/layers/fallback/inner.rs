//! The state that calls and the background task share.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::breaker::{Breaker, Phase};
use super::last_seen::LastSeen;
use super::local::{ClusterView, Local, Pending};
use super::local_share::Sharing;
use super::store_leases::{Leases, StoreLeases};
use crate::model::call::{Acquire, Decision, Outcome, Settle};
use crate::model::data_set::DataSetsLost;
use crate::model::error::{Error, Fault, Trouble};
use crate::model::limiter::Limiter;
use crate::model::limits::{ScopeLimits, WithoutStore};

/// How often a call asks the store before this gateway decides alone although the breaker is closed: some of the keys
/// are not served.
const ASKS_MAX: u32 = 5;
/// The pause before a store that refuses is asked again. Longer than what separates two failures of the breaker.
const ASK_AGAIN: Duration = Duration::from_millis(15);

/// Returns the number of gateways that share the limits, this one included.
pub type LiveGateways = Arc<dyn Fn() -> u32 + Send + Sync>;

pub(super) struct Inner<L> {
    pub(super) store: L,
    pub(super) gateways: LiveGateways,
    pub(super) epoch: Instant,
    pub(super) breaker: Mutex<Breaker>,
    /// Data losses of the store, and how many of them this process has handled.
    pub(super) data_sets_lost: Option<DataSetsLost>,
    pub(super) heard_of: AtomicU64,
    /// The breaker's phase, and whether it counts failures. Every request reads them without a lock.
    pub(super) phase: AtomicU8,
    pub(super) suspicious: AtomicBool,
    pub(super) calls: AtomicU32,
    /// The last failure, and a scope whose keys were part of it: probes use that scope.
    pub(super) reason: Mutex<(Error, Option<ScopeLimits>)>,
    pub(super) last_seen: LastSeen,
    pub(super) store_leases: StoreLeases,
    pub(super) local: Mutex<Local>,
    /// Whether `local` holds decisions.
    pub(super) engaged: AtomicBool,
    pub(super) wake: Notify,
    pub(super) opened: AtomicU64,
    pub(super) local_decisions: AtomicU64,
    pub(super) lost: AtomicU64,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<L: Limiter> Inner<L> {
    pub(super) fn new(store: L, gateways: LiveGateways) -> Self {
        let epoch = Instant::now();
        let data_sets_lost = store.data_sets_lost();
        Self {
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
            last_seen: LastSeen::default(),
            store_leases: StoreLeases::default(),
            local: Mutex::new(Local::new(epoch)),
            engaged: AtomicBool::new(false),
            wake: Notify::new(),
            opened: AtomicU64::new(0),
            local_decisions: AtomicU64::new(0),
            lost: AtomicU64::new(0),
        }
    }

    pub(super) fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    /// The time in microseconds since `epoch`, which local bucket states use.
    pub(super) fn now_us(&self) -> f64 {
        self.now().as_micros() as f64
    }

    pub(super) fn gateways(&self) -> u32 {
        (self.gateways)().max(1)
    }

    /// Among whom limits are divided now.
    pub(super) fn sharing(&self) -> Sharing {
        let gateways = self.gateways();
        let one_in = match gateways {
            1 => Duration::ZERO,
            _ => lock(&self.breaker).known_in(self.now()),
        };
        Sharing { gateways, one_in }
    }

    pub(super) fn is(&self, phase: Phase) -> bool {
        self.phase.load(Ordering::Relaxed) == phase as u8
    }

    /// Whether requests ask the store.
    pub(super) fn is_asked(&self) -> bool {
        self.is(Phase::Closed) || self.is(Phase::Joining)
    }

    pub(super) fn publish(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    pub(super) fn answered(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if self.suspicious.swap(false, Ordering::Relaxed) {
            lock(&self.breaker).answered();
        }
    }

    /// The number of data losses of the store.
    pub(super) fn lost_sets(&self) -> u64 {
        self.data_sets_lost.as_ref().map_or(0, |lost| *lost.borrow())
    }

    /// Handles a data loss of the store that this process has not handled yet: the store is not asked for a while.
    /// Returns whether there was one.
    pub(super) fn hear_of_loss(&self) -> bool {
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
        tracing::warn!("the limit store lost its data; leases are counted again before requests use it");
        self.wake.notify_one();
        true
    }

    /// Records a failure of the store.
    pub(super) fn failed(&self, error: &Error, scope: Option<&ScopeLimits>) {
        let trouble = error.trouble();
        let calls = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        // A store that answers others is not away.
        if !matches!(trouble, Trouble::Away | Trouble::Unknown) || *error == Error::Late {
            return;
        }
        let now = self.now();
        let opened = {
            let mut breaker = lock(&self.breaker);
            if breaker.next_window(now) {
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
            tracing::warn!(%error, "store outage: the limit store is unavailable; limits are decided by their without_store setting");
        }
        self.wake.notify_one();
    }

    /// Asks the store until it answers, or until there is evidence that it serves nobody: a call that fails while the
    /// breaker is closed is no outage, and others may be granted what this gateway would decide alone. `call` asks each
    /// time under the same id, so that an earlier call whose outcome is unknown does no harm.
    pub(super) async fn ask<T, F>(
        &self,
        scope: Option<&ScopeLimits>,
        call: impl Fn() -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let (mut asked, mut unanswered) = (0, None);
        loop {
            let error = match call().await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            if error != Error::Late {
                asked += 1;
            }
            // What a later attempt finds does not tell what came of this one.
            if error.trouble() == Trouble::Unknown {
                unanswered = Some(error.clone());
            }
            let pause = match error.trouble() {
                Trouble::Caller => return Err(error),
                // The record of one limit is broken; that heals by nothing but an operator.
                Trouble::Keys if matches!(error, Error::Refused { fault: Fault::Record, .. }) => {
                    return Err(unanswered.unwrap_or(error));
                }
                Trouble::Unknown => Duration::ZERO,
                Trouble::Away | Trouble::Keys => ASK_AGAIN,
            };
            // A connection may break at any time; what counts is what the next one finds.
            if asked > 1 || error != Error::Lost {
                self.failed(&error, scope);
            }
            if asked >= ASKS_MAX || !self.is_asked() {
                return Err(unanswered.unwrap_or(error));
            }
            tokio::time::sleep(pause).await;
            if !self.is_asked() {
                return Err(unanswered.unwrap_or(error));
            }
        }
    }

    /// The local decisions. The first access takes over the leases that the store granted.
    pub(super) fn local(&self) -> MutexGuard<'_, Local> {
        let mut local = lock(&self.local);
        if !local.is_engaged() {
            // Set before the leases are read: a caller that ends a lease afterwards must find that decisions are
            // local.
            self.engaged.store(true, Ordering::Relaxed);
            local.engage(&self.store_leases, self.now_us());
        }
        local
    }

    /// Records what an answer of the store says and grants.
    pub(super) fn note(&self, call: &Acquire, decision: &Decision) {
        self.answered();
        self.last_seen.note(&call.scopes, &decision.limits, self.now_us());
        if let Outcome::Granted { slot } = decision.outcome {
            self.store_leases.hold(call.id, leases_taken(call, slot), call.lease_ttl);
        }
    }

    pub(super) fn decide(&self, call: &Acquire, error: Error) -> Result<Decision, Error> {
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

    pub(super) fn decide_in(
        &self,
        local: &mut Local,
        call: &Acquire,
        error: &Error,
        unknown: bool,
    ) -> Result<Decision, Error> {
        let cluster =
            ClusterView { sharing: self.sharing(), last_seen: &self.last_seen, now_us: self.now_us() };
        local.decide(call, &cluster, error, unknown)
    }

    /// Queues a call for the store. Without room it counts the call as lost and returns false.
    pub(super) fn defer(&self, local: &mut Local, pending: Pending) -> bool {
        let room = local.defer(pending);
        if !room {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        room
    }
}

/// Whether a failed settlement or release can still be made later.
pub(super) fn waits(error: &Error) -> bool {
    match error {
        Error::Refused { fault, .. } => !matches!(fault, Fault::Record | Fault::Other),
        Error::Timeout(_) | Error::Late | Error::Lost | Error::Unreachable(_) => true,
        Error::Invalid(_) => false,
    }
}

/// The leases of a granted call: those of its scopes and its slot.
pub(super) fn leases_taken(call: &Acquire, slot: Option<usize>) -> Leases {
    let slot = slot.and_then(|at| call.candidates.get(at)).map(|c| c.leases.clone());
    let limited = call.scopes.iter().filter(|scope| scope.concurrency.is_some());
    limited.map(|scope| scope.leases.clone()).chain(slot).collect()
}

pub(super) fn no_room() -> Error {
    Error::Unreachable("too many settlements wait for the limit store".into())
}

/// The error of a call that was not sent because an earlier call failed with `error`.
pub(super) fn not_sent(error: Error) -> Error {
    match error {
        Error::Timeout(_) | Error::Late | Error::Lost => Error::Unreachable("it went silent".into()),
        known => known,
    }
}
