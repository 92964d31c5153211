//! The attempts of one admitted request: at the first backend, elsewhere when that fails, and at a second one as well when
//! the first is silent for longer than it ever needs.
//!
//! Invariants:
//! - Nothing has been sent to the client while this runs.
//! - Every attempt holds a slot of its backend, and no slot is held without an attempt.
//! - Where accounts are limited, every attempt is reserved at the account of its backend: the first one with the request's
//!   own limits, each later one by itself, also under the same account, since the provider counts both.
//! - Attempts after the first are paid from the pool's retry budget, and bounded per request.
//! - The first good answer wins. The other call is cancelled by dropping it, and settled with the request: once.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use smallvec::SmallVec;
use tokio::time::{Instant, sleep_until};
use weir_ratelimit::waiting::{Patience, Priority, QueueId, SlotPatience};
use weir_ratelimit::{Acquire, Candidate, Cost, Decision, Error, Key, Outcome};

use crate::error::GatewayError;
use crate::http::attempt::{self, Answer, Outgoing, Target};
use crate::http::context::RequestContext;
use crate::http::refusal;
use crate::limits::account_groups::Groups;
use crate::limits::ledger::LEASE_TTL;
use crate::limits::price;
use crate::limits::reservation::{Asked, Reservation};
use crate::limits::slot_lease::NewSlot;
use crate::metrics::Metrics;
use crate::routing::backend::ModelBackend;
use crate::routing::backend_state::{AttemptOutcome, InFlight};
use crate::routing::balance::Place;
use crate::routing::entries::ModelEntry;

/// Attempts of one request under way at once.
const PARALLEL_MAX: usize = 2;

/// A request that was admitted.
pub(crate) struct Attempts<'a, F> {
    pub(crate) model: &'a Arc<ModelEntry>,
    pub(crate) reservation: &'a mut Reservation,
    pub(crate) metrics: &'a Metrics,
    pub(crate) context: Option<&'a mut RequestContext>,
    pub(crate) stream: bool,
    pub(crate) prompt_tokens: u64,
    pub(crate) deadline: Instant,
    /// Whose turn it takes when it must wait again.
    pub(crate) tenant: Arc<str>,
    /// What the request needs at the least: an account that holds less is not asked.
    pub(crate) least: Cost,
    /// What to send to a backend.
    pub(crate) outgoing: F,
}

/// The answer that won.
pub(crate) struct Won {
    pub(crate) answer: Answer,
    pub(crate) target: Target,
    pub(crate) in_flight: InFlight,
}

/// An attempt under way.
struct Attempt {
    number: u32,
    target: Target,
    in_flight: InFlight,
    slot: Key,
    /// Its reservation at its account, where that is not part of the request's own.
    account: Option<Box<Reservation>>,
    /// Whether the account's part of the request's own reservation is for this attempt.
    first: bool,
    /// From then on it is not waited for alone.
    patient_until: Option<Instant>,
}

/// A backend whose slot was taken, and what was reserved at its account, if that is limited.
struct Taken {
    index: usize,
    account: Option<Box<Reservation>>,
}

/// What a slot was taken with: it is given back with this value.
enum Held {
    /// By itself, for the request's own reservation.
    Slot(NewSlot),
    /// With a reservation at the account of its backend.
    Account(Box<Reservation>),
}

type Done = (u32, Result<Answer, GatewayError>);
type Running = FuturesUnordered<Pin<Box<dyn Future<Output = Done> + Send>>>;

impl<F: Fn(&Target) -> Result<Outgoing, GatewayError>> Attempts<'_, F> {
    /// Sends to `first`, whose slot the admission holds, and as long as it is allowed to those of `left`.
    pub(crate) async fn run(mut self, first: usize, mut left: Vec<Place>) -> Result<Won, GatewayError> {
        let mut futures = Running::new();
        let mut attempts: SmallVec<[Attempt; PARALLEL_MAX]> = SmallVec::new();
        let mut started = 0;
        let first = Taken { index: first, account: None };
        self.start(first, &mut started, &mut attempts, &mut futures)?;
        loop {
            let may_hedge = attempts.len() < PARALLEL_MAX && !left.is_empty();
            let hedge_at = attempts.last().and_then(|t| t.patient_until).filter(|_| may_hedge);
            tokio::select! {
                biased;
                Some((number, result)) = futures.next() => {
                    let Some(at) = attempts.iter().position(|t| t.number == number) else { continue };
                    let done = attempts.remove(at);
                    match result {
                        Ok(answer) => {
                            // The other call's connection is closed before its slot is given back.
                            futures.clear();
                            return Ok(self.won(done, answer, attempts));
                        }
                        Err(error) => {
                            if !attempts.is_empty() {
                                self.give_up(done);
                                continue;
                            }
                            if !error.facts().retry_elsewhere || left.is_empty() || !self.may_try(started) {
                                self.stands(done);
                                return Err(error);
                            }
                            // On the heap, as below: few requests come here, and all would be as large.
                            match Box::pin(self.wait_for_slot(done, &mut left)).await {
                                Ok(Some(next)) => self.start(next, &mut started, &mut attempts, &mut futures)?,
                                Ok(None) => return Err(GatewayError::Busy { retry_after: None }),
                                Err(_) => return Err(error),
                            }
                        }
                    }
                }
                () = sleep_until(hedge_at.unwrap_or_else(Instant::now)), if hedge_at.is_some() => {
                    let next = match self.may_try(started) {
                        // The store's trouble is no reason to give up a call under way.
                        true => Box::pin(self.take_slot(&mut left)).await.ok().flatten(),
                        false => None,
                    };
                    match next {
                        Some(next) => self.start(next, &mut started, &mut attempts, &mut futures)?,
                        // No budget or no slot now; there may be later.
                        None => attempts.iter_mut().for_each(|t| t.patient_until = t.again()),
                    }
                }
            }
        }
    }

    fn may_try(&self, started: u32) -> bool {
        let pool = &self.model.pool;
        started < pool.spec.retry_budget.max_attempts
            && Instant::now() < self.deadline
            && pool.state.may_retry()
    }

    /// Takes a slot at the first of `left` that has one and whose account has room.
    async fn take_slot(&mut self, left: &mut Vec<Place>) -> Result<Option<Taken>, Error> {
        if self.model.accounts.is_empty() {
            return self.move_slot(None, left).await;
        }
        let (groups, whole) = self.whole(left);
        let (decision, held) = ask(self.reservation, &groups, &whole, None).await?;
        Ok(self.taken(&decision, held, left))
    }

    /// The same where no account is limited, in place of `from` if there is one.
    async fn move_slot(&mut self, from: Option<&Key>, left: &mut Vec<Place>) -> Result<Option<Taken>, Error> {
        let candidates = candidates(self.model, left);
        let ledger = self.reservation.ledger();
        let taken = ledger.take_slot(self.reservation.id, from.cloned(), candidates).await?;
        if let Some(from) = from {
            self.reservation.moved(from);
        }
        Ok(taken.map(|(at, slot)| self.took(at, Held::Slot(slot), left)))
    }

    /// The same for a request whose attempt has failed and that has no other one under way, in place of that: when all slots
    /// are taken it waits for one where those wait that have none yet, and before them, since it has waited once.
    async fn wait_for_slot(
        &mut self,
        failed: Attempt,
        left: &mut Vec<Place>,
    ) -> Result<Option<Taken>, Error> {
        let taken = match self.model.accounts.is_empty() {
            true => {
                let slot = failed.slot.clone();
                // It is not in flight any more.
                drop(failed);
                self.move_slot(Some(&slot), left).await?
            }
            false => {
                // Before others are asked: the same account may have room for one at a time only.
                self.vacate(failed).await?;
                self.take_slot(left).await?
            }
        };
        if taken.is_some() {
            return Ok(taken);
        }
        let queue = &self.model.pool.spec.queue;
        let (groups, call) = self.whole(left);
        if groups.is_empty() {
            return Ok(None);
        }
        let patience = Patience {
            tenant: self.tenant.clone(),
            priority: Priority::High,
            deadline: self.deadline,
            scopes: SmallVec::from_elem(queue.max_wait, call.scopes.len()),
            slots: Some(SlotPatience {
                queue: self.model.queue.clone(),
                max_wait: queue.max_wait,
                bound: queue.max_waiting as usize,
            }),
            bytes: 0,
            alternatives: groups.alternatives(),
        };
        let ledger = self.reservation.ledger().clone();
        let reservation = &*self.reservation;
        let asking = |queue: Option<&QueueId>| {
            let queue = queue.cloned();
            let (groups, call) = (&groups, &call);
            async move { ask(reservation, groups, call, queue.as_ref()).await }
        };
        let waited = ledger.waiting.acquire(&call, &patience, asking).await?;
        if let Some(context) = &mut self.context {
            context.waited += waited.waited;
        }
        Ok(self.taken(&waited.decision, waited.with.flatten(), left))
    }

    /// The call for what is left, by account.
    fn whole(&self, left: &[Place]) -> (Groups, Acquire) {
        let (accounts, reserved) = (&self.model.accounts, &self.reservation.reserved);
        let groups = refusal::usable_accounts(accounts, left, 0, reserved, &self.least).unwrap_or_default();
        let call = Acquire {
            id: self.reservation.id,
            cost: *reserved,
            estimated: true,
            scopes: groups.entries(accounts).map(|entry| entry.limits.clone()).collect(),
            candidates: candidates(self.model, left),
            lease_ttl: LEASE_TTL,
        };
        (groups, call)
    }

    fn taken(&mut self, decision: &Decision, held: Option<Held>, left: &mut Vec<Place>) -> Option<Taken> {
        match decision.outcome {
            Outcome::Granted { slot: Some(at) } => Some(self.took(at, held?, left)),
            _ => None,
        }
    }

    fn took(&mut self, at: usize, held: Held, left: &mut Vec<Place>) -> Taken {
        let index = left.remove(at).index;
        let account = match held {
            // The slot is part of the reservation there.
            Held::Account(account) => Some(account),
            Held::Slot(slot) => {
                slot.keep().into_iter().for_each(|slot| self.reservation.took(slot));
                None
            }
        };
        Taken { index, account }
    }

    /// This attempt is over while another goes on: what it holds is given back, what was reserved at its account stands.
    fn give_up(&mut self, done: Attempt) {
        match done.account {
            // Dropped here, which ends it.
            Some(mut account) => account.used(account.reserved),
            None => {
                self.reservation.release(&done.slot);
                if done.first {
                    self.reservation.leave_account();
                }
            }
        }
    }

    /// This attempt is over and the request with it, which gives back the slot.
    fn stands(&mut self, done: Attempt) {
        match done.account {
            Some(mut account) => account.used(account.reserved),
            None if done.first => self.reservation.leave_account(),
            None => {}
        }
    }

    /// This attempt is over and another shall follow: returns once what it held can be taken.
    async fn vacate(&mut self, done: Attempt) -> Result<(), Error> {
        drop(done.in_flight);
        match done.account {
            Some(mut account) => {
                account.used(account.reserved);
                account.vacate(&done.slot, true).await
            }
            None => self.reservation.vacate(&done.slot, done.first).await,
        }
    }

    fn start(
        &mut self,
        taken: Taken,
        started: &mut u32,
        attempts: &mut SmallVec<[Attempt; PARALLEL_MAX]>,
        futures: &mut Running,
    ) -> Result<(), GatewayError> {
        let Taken { index, mut account } = taken;
        let ModelBackend { entry: backend, upstream_model } = &self.model.backends[index];
        let target = Target {
            model: self.model.clone(),
            backend: backend.clone(),
            upstream_model: upstream_model.clone(),
            metrics: self.metrics.clone(),
            stream: self.stream,
            prompt_tokens: self.prompt_tokens,
            sent: Instant::now(),
            began: None,
        };
        *started += 1;
        if let Some(context) = &mut self.context {
            context.backend = Some(backend.name.to_string());
            context.attempts = *started;
        }
        // From here on the backend may have read the prompt, and where the answer comes whole, have written it too: a
        // request that ends now has used that.
        let used = match self.stream {
            true => price::cost(self.model, self.prompt_tokens, 0),
            false => self.reservation.reserved,
        };
        self.reservation.used(used);
        let outgoing = (self.outgoing)(&target)?;
        if let Some(account) = &mut account {
            account.used(used);
        }
        let (number, sending) = (*started, target.clone());
        futures.push(Box::pin(async move { (number, attempt::send(&sending, outgoing).await) }));
        attempts.push(Attempt {
            number,
            in_flight: InFlight::enter(&backend.state),
            slot: backend.slots.clone(),
            first: number == 1 && self.model.accounts.of(index).is_some(),
            account,
            patient_until: target.patience().map(|patience| target.sent + patience),
            target,
        });
        Ok(())
    }

    fn won(&mut self, winner: Attempt, answer: Answer, others: SmallVec<[Attempt; PARALLEL_MAX]>) -> Won {
        let Attempt { number, mut target, in_flight, account, .. } = winner;
        if !matches!(&answer, Answer::Whole { status, .. } if !status.is_success()) {
            target.begin();
        }
        for other in others {
            // Asked later and not answered yet says nothing; asked earlier does.
            if other.number < number {
                other.target.fail(AttemptOutcome::Overtaken);
            }
            self.give_up(other);
        }
        if let Some(account) = account {
            self.reservation.answered_under(account);
        }
        if let Some(context) = &mut self.context {
            context.backend = Some(target.backend.name.to_string());
        }
        Won { answer, target, in_flight }
    }
}

/// Asks for a slot once around, run by run of one account each: where that is limited by a reservation there, else by a
/// slot of the request's own reservation.
async fn ask(
    reservation: &Reservation,
    groups: &Groups,
    whole: &Acquire,
    queue: Option<&QueueId>,
) -> Result<(Decision, Option<Held>), Error> {
    let ledger = reservation.ledger();
    let mut round = groups.round(whole, |scopes| ledger.waiting.is_awaited(scopes, queue));
    while let Some((run, call)) = round.next() {
        let (decision, held) = match run.account {
            None => {
                let taken = ledger.take_slot(reservation.id, None, call.candidates).await?;
                let (outcome, held) = match taken {
                    Some((at, slot)) => (Outcome::Granted { slot: Some(at) }, Some(Held::Slot(slot))),
                    None => (Outcome::NoSlot { wait: LEASE_TTL }, None),
                };
                (Decision { outcome, limits: Vec::new(), now_us: 0, degraded: false }, held)
            }
            Some(_) => {
                let candidates = call.candidates.clone();
                let asked = Box::pin(Reservation::ask(ledger, call, None)).await;
                let Asked { decision, mut reservation, .. } = asked;
                let decision = decision?;
                reservation.under_account(0);
                if let Outcome::Granted { slot } = decision.outcome {
                    reservation.granted(slot.map(|slot| candidates[slot].leases.clone()));
                }
                (decision, Some(Held::Account(Box::new(reservation))))
            }
        };
        if let Some(decision) = round.heard(&run, decision) {
            return Ok((decision, held));
        }
    }
    Ok((round.refusal(|_| LEASE_TTL), None))
}

impl Attempt {
    /// When to think of another backend again.
    fn again(&self) -> Option<Instant> {
        self.target.patience().map(|patience| Instant::now() + patience)
    }
}

/// What the limiter is given, in order of preference.
pub(crate) fn candidates(model: &ModelEntry, places: &[Place]) -> Vec<Candidate> {
    let candidate = |place: &Place| Candidate {
        leases: model.backends[place.index].entry.slots.clone(),
        max_concurrency: place.slots,
        bound: place.bound,
    };
    places.iter().take(weir_ratelimit::MAX_CANDIDATES).map(candidate).collect()
}

/// The places that are left when `chosen` is taken: each backend once, with all its slots.
pub(crate) fn others(places: &[Place], chosen: usize) -> Vec<Place> {
    let mut left: Vec<Place> = Vec::with_capacity(places.len());
    for place in places.iter().filter(|place| place.index != places[chosen].index) {
        match left.iter_mut().find(|seen| seen.index == place.index) {
            Some(seen) => seen.slots = seen.slots.max(place.slots),
            None => left.push(Place { bound: None, ..*place }),
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use weir_ratelimit::Bound;

    use super::*;

    #[test]
    fn what_is_left_names_each_backend_once_with_all_its_slots() {
        let place = |index, slots| Place { index, slots, bound: None };
        let bounded =
            |index| Place { bound: Some(Bound { millionths: 400_000, estimate: 3 }), ..place(index, 50) };
        let places = [bounded(2), bounded(0), bounded(1), place(1, 50), place(0, 50), place(2, 50)];
        assert_eq!(others(&places, 0), [place(0, 50), place(1, 50)]);
        assert_eq!(others(&places, 3), [place(2, 50), place(0, 50)]);
    }
}
