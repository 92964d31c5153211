//! Waiting for a limit instead of being refused at once.
//!
//! A refused call stands in the queue of what refused it: a scope's buckets, its concurrency, or the slots of some
//! backends. Only the head of a queue asks again: at the moment the limiter named, at once when something was given
//! back in this process ([`Waiting::released`]), and for leases, whose end nobody can name, every few milliseconds.
//! Whoever could not be served in time is told so at once, with the time at which it would fit.
//!
//! Waiters hold nothing: dropping the future leaves the queue, and whatever the dropped ask may have been granted is
//! the caller's to cancel by the call's id.

#[cfg(test)]
mod fairness;
mod queue;
#[cfg(test)]
mod tests;
mod wait;

use std::future::Future;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use smallvec::SmallVec;
use tokio::sync::Notify;
use tokio::time::Instant;

pub use self::queue::{BYTES_MAX, Entry, Full, Note, Outlook, QueueId, Queues, Turn, WAITERS_MAX};
use self::wait::Wait;
use crate::{Acquire, Decision, Key, Outcome, ScopeLimits};

/// Most waiters of one limit's queue.
pub const LIMIT_QUEUE_MAX: usize = 1000;
/// Between two asks for a lease, at first; doubled up to [`POLL_MAX`].
const POLL_MIN: Duration = Duration::from_millis(5);
/// Between two asks for a lease, at most: how late a release by another process is noticed.
const POLL_MAX: Duration = Duration::from_millis(50);
/// A process with more than its even part leaves places to others for this long: each of them has asked by then.
const OFFER: Duration = Duration::from_millis(60);
/// The least time between two asks of a head that several processes contend with.
const ASK_PAUSE_MIN: Duration = Duration::from_millis(1);

/// Who goes first when several wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Priority {
    /// Before all others.
    High = 0,
    /// The rest.
    #[default]
    Normal = 1,
    /// Only when nobody else waits.
    Low = 2,
}

impl Priority {
    /// How many there are.
    pub const COUNT: usize = 3;

    /// The name used in metrics labels.
    pub const fn name(self) -> &'static str {
        match self {
            Priority::High => "high",
            Priority::Normal => "normal",
            Priority::Low => "low",
        }
    }
}

/// How long a call may wait, and as whom.
#[derive(Debug, Clone)]
pub struct Patience {
    /// Whose share it is served from.
    pub tenant: Arc<str>,
    /// Its class.
    pub priority: Priority,
    /// The caller's own deadline.
    pub deadline: Instant,
    /// The longest wait for each scope of the call, in its order; a missing one is zero: refused at once.
    pub scopes: SmallVec<[Duration; 8]>,
    /// How to wait for a slot; `None` refuses at once.
    pub slots: Option<SlotPatience>,
    /// What the caller keeps in memory meanwhile.
    pub bytes: u64,
    /// Places of the call's scopes of which one run must have room, not all: limits of accounts that can stand in for
    /// each other. Scopes in none of them must have room in any case. Empty: all must.
    pub alternatives: Alternatives,
}

/// Runs of scopes, by their places in a call, that can stand in for each other.
pub type Alternatives = SmallVec<[Range<usize>; 2]>;

/// How to wait for a slot.
#[derive(Debug, Clone)]
pub struct SlotPatience {
    /// The queue: all that wait for the same backends share one.
    pub queue: Arc<str>,
    /// The longest wait.
    pub max_wait: Duration,
    /// Most waiters in that queue.
    pub bound: usize,
}

/// Why a call that was refused did not wait longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GaveUp {
    /// It would not have fitted in time, or not at all.
    TooLong,
    /// The queue had no room.
    QueueFull,
    /// It waited as long as it may.
    Expired,
}

impl GaveUp {
    /// The name used in metrics labels.
    pub const fn name(self) -> &'static str {
        match self {
            GaveUp::TooLong => "too_long",
            GaveUp::QueueFull => "queue_full",
            GaveUp::Expired => "expired",
        }
    }
}

/// What waiting came to.
#[derive(Debug)]
pub struct Waited<T> {
    /// The last decision. One that comes from the queue alone names only the limit that the queue waits for.
    pub decision: Decision,
    /// What the last ask gave beside it; `None` when it never asked.
    pub with: Option<T>,
    /// The time spent in queues.
    pub waited: Duration,
    /// How many stood before it when it first joined a queue; `None` when it never did.
    pub ahead: Option<usize>,
    /// Why it was refused; `None` when it was granted.
    pub gave_up: Option<GaveUp>,
}

/// The queues of one process. All of its callers share one.
#[derive(Debug)]
pub struct Waiting {
    epoch: Instant,
    queues: Mutex<Queues<Arc<Notify>>>,
}

impl Default for Waiting {
    fn default() -> Self {
        Self { epoch: Instant::now(), queues: Mutex::default() }
    }
}

impl Waiting {
    fn queues(&self) -> MutexGuard<'_, Queues<Arc<Notify>>> {
        // Every change is complete before anything can panic, so a poisoned lock still guards a whole state.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn us(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.epoch).as_micros()).unwrap_or(u64::MAX)
    }

    fn at(&self, us: u64) -> Option<Instant> {
        self.epoch.checked_add(Duration::from_micros(us))
    }

    /// How many wait now.
    pub fn len(&self) -> usize {
        self.queues().len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether somebody waits for one of these limits, in a queue other than `own`.
    pub fn is_awaited(&self, scopes: &[ScopeLimits], own: Option<&QueueId>) -> bool {
        let queues = self.queues();
        if queues.is_empty() {
            return false;
        }
        let ids =
            scopes.iter().flat_map(|scope| [&scope.record, &scope.leases]).map(|k| QueueId::Limit(k.clone()));
        ids.into_iter().any(|id| Some(&id) != own && queues.has(&id))
    }

    /// These records and lease sets have room again: the heads that wait for them ask at once.
    pub fn released<'a>(&self, keys: impl IntoIterator<Item = &'a Key>) {
        let woken = self.queues().release(keys);
        woken.iter().for_each(|head| head.notify_one());
    }

    /// A lease of this set was given back by this process, which holds `held` more of it and is one of `processes` that
    /// share it. Whoever is told first would take it again, and a process without any would wait in vain while others
    /// hand their places on among themselves. So one with more than its even part lets the others ask first, for one
    /// place at a time; else its heads ask at once, as with [`Waiting::released`].
    pub fn gave_back(&self, key: &Key, held: u32, processes: u32) {
        let now = self.us(Instant::now());
        let offer = u64::try_from(OFFER.as_micros()).unwrap_or(u64::MAX);
        let offered = processes > 1 && self.queues().give_back(key, held, processes, now, offer);
        if !offered {
            self.released([key]);
        }
    }

    /// Asks, and waits in turn as long as it is refused and patience lasts. `ask` must decide `call` as it stands at
    /// that time; what it gives beside the decision is passed on. It is told at the head of which queue the call
    /// stands, so that it can pass over alternatives that others wait for ([`Waiting::is_awaited`]). Where all
    /// alternatives refuse, its decision must name the limits of the one to wait for, and of no other.
    ///
    /// Cancel-safe: a dropped caller leaves its queue.
    ///
    /// # Errors
    /// Those of `ask`, at once.
    pub async fn acquire<T, E, F>(
        &self,
        call: &Acquire,
        patience: &Patience,
        mut ask: impl FnMut(Option<&QueueId>) -> F,
    ) -> Result<Waited<T>, E>
    where
        F: Future<Output = Result<(Decision, T), E>>,
    {
        let mut wait = Wait::new(self, call, patience);
        if let Err((refusal, reason)) = wait.line_up() {
            return Ok(wait.refused(refusal, None, reason));
        }
        let mut last = None;
        loop {
            if !wait.turn().await {
                let (decision, with) = match last {
                    Some((decision, with)) => (decision, Some(with)),
                    None => (wait.refusal_of_queue(), None),
                };
                return Ok(wait.refused(decision, with, GaveUp::Expired));
            }
            let seen = self.queues().releases();
            let (decision, with) = ask(wait.queue()).await?;
            if matches!(decision.outcome, Outcome::Granted { .. }) {
                return Ok(wait.granted(decision, with));
            }
            if let Err(reason) = wait.again(&decision, seen) {
                return Ok(wait.refused(decision, Some(with), reason));
            }
            last = Some((decision, with));
        }
    }
}
