//! The wait of one call in the queues.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::policy::{
    ASK_PAUSE_MIN, GaveUp, LIMIT_QUEUE_MAX, POLL_MAX, POLL_MIN, Places, QueuePolicy, Waited,
};
use super::queue::{Entry, Full, Note, QueueId, Turn};
use super::shared::Waiting;
use crate::model::call::{Acquire, Decision, Outcome};
use crate::model::key::Key;
use crate::model::kind::Kind;
use crate::model::limits::{LimitState, Mode, Verdict, What};

/// A place in a queue. Dropping it leaves the queue.
struct Seat<'a> {
    waiting: &'a Waiting,
    tenant: Arc<str>,
    id: QueueId,
    number: u64,
    handle: Arc<Notify>,
    /// The end of the longest wait in this queue.
    until: Instant,
    served: bool,
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        let next = self.waiting.queues().leave(&self.id, &self.tenant, self.number, self.served);
        if let Some(next) = next {
            next.notify_one();
        }
    }
}

/// The wait of one call in the queues.
pub(super) struct Wait<'a> {
    waiting: &'a Waiting,
    call: &'a Acquire,
    policy: &'a QueuePolicy,
    seat: Option<Seat<'a>>,
    /// When it first joined each queue. A call that moves between queues gains no time.
    since: SmallVec<[(QueueId, Instant); 4]>,
    /// When it first joined a queue.
    started: Option<Instant>,
    ahead: Option<usize>,
    poll: Duration,
}

/// The queue in which a refused call may wait.
struct Plan {
    id: QueueId,
    max_wait: Duration,
    bound: usize,
    due: Instant,
    note: Option<Note>,
}

impl<'a> Wait<'a> {
    pub(super) fn new(waiting: &'a Waiting, call: &'a Acquire, policy: &'a QueuePolicy) -> Self {
        Self {
            waiting,
            call,
            policy,
            seat: None,
            since: SmallVec::new(),
            started: None,
            ahead: None,
            poll: POLL_MIN,
        }
    }

    /// Every queue that this call must not overtake, with its longest wait and its bound.
    fn queues_of(&self) -> impl Iterator<Item = (QueueId, Duration, usize)> + '_ {
        let needed = (0..self.call.scopes.len()).filter(|at| !self.is_alternative(*at));
        let limits = needed.flat_map(|at| self.limit_queues(at..at + 1));
        let slots = self.policy.slots.iter();
        limits.chain(slots.map(|s| (QueueId::Slots(s.queue.clone()), s.max_wait, s.bound)))
    }

    /// The queue whose head it is when its turn has come.
    pub(super) fn queue(&self) -> Option<&QueueId> {
        self.seat.as_ref().map(|seat| &seat.id)
    }

    fn is_alternative(&self, scope: usize) -> bool {
        self.policy.alternatives.iter().any(|run| run.contains(&scope))
    }

    /// Whether this is the queue of a limit that another one can stand in for.
    fn is_of_alternative(&self, id: &QueueId) -> bool {
        let QueueId::Limit(key) = id else { return false };
        let of =
            |scope: usize| self.call.scopes.get(scope).is_some_and(|s| s.record == *key || s.leases == *key);
        self.policy.alternatives.iter().cloned().flatten().any(of)
    }

    /// The queues of these scopes.
    fn limit_queues(&self, scopes: Range<usize>) -> impl Iterator<Item = (QueueId, Duration, usize)> + '_ {
        let scopes = scopes.filter_map(|at| self.call.scopes.get(at).map(|scope| (at, scope)));
        let enforced = scopes.filter(|(_, scope)| scope.mode == Mode::Enforce);
        enforced.flat_map(|(at, scope)| {
            let max_wait = self.max_wait(at);
            let buckets = scope.buckets.iter().any(Option::is_some).then_some(&scope.record);
            let leases = scope.concurrency.is_some().then_some(&scope.leases);
            let keys = buckets.into_iter().chain(leases);
            keys.map(move |key| (QueueId::Limit(key.clone()), max_wait, LIMIT_QUEUE_MAX))
        })
    }

    fn max_wait_for(&self, limit: &LimitState) -> Duration {
        limit.position_in(&self.call.scopes).map_or(Duration::ZERO, |at| self.max_wait(at))
    }

    fn max_wait(&self, scope: usize) -> Duration {
        self.policy.scopes.get(scope).copied().unwrap_or_default()
    }

    /// Joins the queue of a limit for which others wait already. Refuses the call if it could not be served in time.
    pub(super) fn line_up(&mut self) -> Result<(), (Decision, GaveUp)> {
        let now = Instant::now();
        let found = {
            let queues = self.waiting.queues();
            if queues.is_empty() {
                return Ok(());
            }
            let behind = |(id, max_wait, bound): (QueueId, Duration, usize)| {
                let QueuePolicy { tenant, priority, .. } = self.policy;
                let outlook =
                    queues.has(&id).then(|| queues.outlook(&id, tenant, *priority, &self.call.cost))??;
                (outlook.ahead > 0).then_some((id, max_wait, bound, outlook))
            };
            let needed = self.queues_of().find_map(behind);
            needed.or_else(|| {
                // Of alternatives, only if others wait for each of them: then the one where the call would fit first.
                let runs = self.policy.alternatives.iter().cloned();
                let found: Option<Vec<_>> = runs.map(|run| self.limit_queues(run).find_map(behind)).collect();
                found?
                    .into_iter()
                    .min_by_key(|(.., outlook)| (outlook.fits_at.is_none(), outlook.fits_at, outlook.ahead))
            })
        };
        let Some((id, max_wait, bound, outlook)) = found else { return Ok(()) };
        let until = self.until(&id, max_wait, now);
        if let Some(fits_at) = outlook.fits_at.and_then(|us| self.waiting.at(us)) {
            let fits_at = fits_at.max(now);
            if fits_at > until {
                let wait = fits_at.saturating_duration_since(now);
                return Err((self.refusal(&id, outlook.note, wait), GaveUp::TooLong));
            }
        }
        if until <= now {
            return Err((self.refusal(&id, outlook.note, POLL_MAX), GaveUp::TooLong));
        }
        let joined = self.join(id.clone(), bound, until, now);
        joined.map_err(|Full| (self.refusal(&id, outlook.note, POLL_MAX), GaveUp::QueueFull))
    }

    fn until(&self, id: &QueueId, max_wait: Duration, now: Instant) -> Instant {
        // A call that moves between alternatives gains no time either.
        let of_alternative = self.is_of_alternative(id);
        let same = |known: &QueueId| known == id || of_alternative && self.is_of_alternative(known);
        let since = self.since.iter().find(|(known, _)| same(known)).map_or(now, |(_, since)| *since);
        (since + max_wait).min(self.policy.deadline)
    }

    fn join(&mut self, id: QueueId, bound: usize, until: Instant, due: Instant) -> Result<(), Full> {
        let now = Instant::now();
        let handle = Arc::new(Notify::new());
        let QueuePolicy { tenant, priority, bytes, .. } = self.policy;
        let places = match &id {
            QueueId::Slots(_) => self.slots(),
            QueueId::Limit(key) => {
                let scope = self.call.scopes.iter().find(|scope| scope.leases == *key);
                Arc::new(
                    scope.and_then(|scope| Some((key.clone(), scope.concurrency?))).into_iter().collect(),
                )
            }
        };
        let (slots, wakes) = match &id {
            QueueId::Slots(_) => (Some(places.clone()), self.wakes()),
            QueueId::Limit(_) if self.policy.alternatives.len() > 1 && self.is_of_alternative(&id) => {
                (Some(self.slots()), self.wakes())
            }
            QueueId::Limit(_) => (None, Vec::new()),
        };
        let entry = Entry {
            tenant: tenant.clone(),
            priority: *priority,
            cost: self.call.cost,
            bytes: *bytes,
            places,
            slots,
            wakes,
            handle: handle.clone(),
        };
        let mut queues = self.waiting.queues();
        let ahead = queues.outlook(&id, tenant, *priority, &self.call.cost).map_or(0, |o| o.ahead);
        let number = queues.join(&id, entry, bound, self.waiting.us(due))?;
        drop(queues);
        self.ahead.get_or_insert(ahead);
        self.started.get_or_insert(now);
        if !self.since.iter().any(|(known, _)| *known == id) {
            self.since.push((id.clone(), now));
        }
        let (waiting, tenant) = (self.waiting, tenant.clone());
        self.seat = Some(Seat { waiting, tenant, id, number, handle, until, served: false });
        Ok(())
    }

    /// The lease sets of its backends.
    fn slots(&self) -> Arc<Places> {
        let known = self.policy.slots.as_ref().and_then(|slots| slots.places.clone());
        let candidates = self.call.candidates.iter();
        known.unwrap_or_else(|| Arc::new(candidates.map(|c| (c.leases.clone(), c.max_concurrency)).collect()))
    }

    /// The keys of every alternative.
    fn wakes(&self) -> Vec<Key> {
        let scopes = self.policy.alternatives.iter().cloned().flatten();
        let scopes = scopes.filter_map(|at| self.call.scopes.get(at));
        scopes.flat_map(|scope| [&scope.record, &scope.leases]).cloned().collect()
    }

    /// Waits for its turn. Returns false if the policy ends the wait before that.
    pub(super) async fn turn(&self) -> bool {
        let Some(seat) = &self.seat else { return true };
        loop {
            let now = Instant::now();
            let turn = self.waiting.queues().turn(&seat.id, seat.number, self.waiting.us(now));
            let wake = match turn {
                Turn::Now => return true,
                _ if now >= seat.until => return false,
                Turn::At(due) => self.waiting.at(due).map_or(seat.until, |due| due.min(seat.until)),
                Turn::Later => seat.until,
            };
            tokio::select! {
                () = seat.handle.notified() => {}
                () = sleep_until(wake) => {}
            }
        }
    }

    /// Records a refusal: the call stays in its queue or moves to the queue of the limit that refused. An error if it
    /// may not wait.
    pub(super) fn again(&mut self, decision: &Decision, seen: u64) -> Result<(), GaveUp> {
        let now = Instant::now();
        let plan = self.plan(decision, now).ok_or(GaveUp::TooLong)?;
        let until = self.until(&plan.id, plan.max_wait, now);
        if now >= until || (plan.due > until && plan.note.as_ref().is_some_and(|n| n.bucket.is_some())) {
            let expired = self.since.iter().any(|(id, _)| *id == plan.id);
            return Err(if expired { GaveUp::Expired } else { GaveUp::TooLong });
        }
        let Plan { id, bound, due, note, .. } = plan;
        if self.seat.as_ref().is_none_or(|seat| seat.id != id) {
            self.seat = None;
            self.join(id, bound, until, due).map_err(|Full| GaveUp::QueueFull)?;
        }
        if let Some(seat) = &self.seat {
            let due = self.waiting.us(due);
            self.waiting.queues().postpone(&seat.id, seat.number, due, seen, note);
        }
        Ok(())
    }

    /// The queue in which to wait after this refusal. `None` if waiting cannot help.
    fn plan(&mut self, decision: &Decision, now: Instant) -> Option<Plan> {
        if let Outcome::NoSlot { .. } = decision.outcome {
            let slots = self.policy.slots.as_ref()?;
            let id = QueueId::Slots(slots.queue.clone());
            return Some(Plan {
                id,
                max_wait: slots.max_wait,
                bound: slots.bound,
                due: now + self.next_poll(),
                note: None,
            });
        }
        let mut worst: Option<(&LimitState, Duration)> = None;
        for limit in decision.limits.iter().filter(|limit| limit.refuses(&self.call.scopes)) {
            let Verdict::Wait(wait) = limit.verdict else { return None };
            let max_wait = self.max_wait_for(limit);
            // A lease may end before its expiry; a bucket never has room before this time.
            let (least, sure) = match limit.what {
                What::Bucket(_) => (wait, true),
                What::Concurrency => (Duration::ZERO, false),
            };
            let key = self.key(limit)?;
            if now + least > self.until(&QueueId::Limit(key), max_wait, now) || max_wait.is_zero() {
                return None;
            }
            if worst.is_none_or(|(before, longest)| {
                let before_sure = matches!(before.what, What::Bucket(_));
                (sure, least) > (before_sure, longest)
            }) {
                worst = Some((limit, least));
            }
        }
        let (limit, wait) = worst?;
        let max_wait = self.max_wait_for(limit);
        let id = QueueId::Limit(self.key(limit)?);
        let pause = match limit.what {
            What::Bucket(_) => wait.max(ASK_PAUSE_MIN),
            What::Concurrency => self.next_poll(),
        };
        let bucket = match limit.what {
            What::Bucket(kind) => self.bucket(limit, kind),
            What::Concurrency => None,
        };
        let note = Some(Note { state: limit.clone(), bucket });
        Some(Plan { id, max_wait, bound: LIMIT_QUEUE_MAX, due: now + pause, note })
    }

    fn key(&self, limit: &LimitState) -> Option<Key> {
        let scope = limit.scope_in(&self.call.scopes)?;
        Some(match limit.what {
            What::Bucket(_) => scope.record.clone(),
            What::Concurrency => scope.leases.clone(),
        })
    }

    fn bucket(&self, limit: &LimitState, kind: Kind) -> Option<(Kind, crate::model::kind::Bucket)> {
        let bucket = limit.scope_in(&self.call.scopes)?.buckets[kind as usize]?;
        Some((kind, bucket))
    }

    fn next_poll(&mut self) -> Duration {
        let pause = self.poll;
        self.poll = (pause * 2).min(POLL_MAX);
        pause
    }

    /// The refusal of a call that never asked: the last refusal of its queue.
    pub(super) fn refusal_of_queue(&self) -> Decision {
        let Some(seat) = &self.seat else { return self.refusal(&QueueId::Slots("".into()), None, POLL_MAX) };
        let QueuePolicy { tenant, priority, .. } = self.policy;
        let outlook = self.waiting.queues().outlook(&seat.id, tenant, *priority, &self.call.cost);
        let now = Instant::now();
        let wait = outlook.as_ref().and_then(|o| self.waiting.at(o.fits_at?));
        let wait = wait.map_or(POLL_MAX, |at| at.saturating_duration_since(now)).max(ASK_PAUSE_MIN);
        self.refusal(&seat.id, outlook.and_then(|o| o.note), wait)
    }

    fn refusal(&self, id: &QueueId, note: Option<Note>, wait: Duration) -> Decision {
        let QueueId::Limit(_) = id else {
            return Decision {
                outcome: Outcome::NoSlot { wait },
                limits: Vec::new(),
                now_us: 0,
                degraded: false,
            };
        };
        let state = note.map(|note| LimitState { verdict: Verdict::Wait(wait), ..note.state });
        let limits = state.into_iter().collect();
        Decision { outcome: Outcome::Limited { wait: Some(wait) }, limits, now_us: 0, degraded: false }
    }

    fn waited(&self) -> Duration {
        self.started.map_or(Duration::ZERO, |started| started.elapsed())
    }

    pub(super) fn granted<T>(mut self, decision: Decision, with: T) -> Waited<T> {
        if let Some(seat) = &mut self.seat {
            seat.served = true;
        }
        let (waited, ahead) = (self.waited(), self.ahead);
        Waited { decision, with: Some(with), waited, ahead, gave_up: None }
    }

    pub(super) fn refused<T>(self, decision: Decision, with: Option<T>, reason: GaveUp) -> Waited<T> {
        let (waited, ahead) = (self.waited(), self.ahead);
        Waited { decision, with, waited, ahead, gave_up: Some(reason) }
    }
}
