//! The attempts of one admitted request: at the first backend, elsewhere when that fails, and at a second one as well when
//! the first is silent for longer than it ever needs.
//!
//! Invariants:
//! - Nothing has been sent to the client while this runs.
//! - Every attempt holds a slot of its backend, and no slot is held without an attempt.
//! - Where accounts are limited, every attempt is reserved at the account of its backend: the first one with the request's
//!   own limits, each later one by itself, also under the same account, since the provider counts both.
//! - Attempts after the first are paid from the pool's retry budget, and bounded per request. After the deadline nothing is
//!   sent.
//! - The first good answer wins. The other call is cancelled by dropping it, and settled with the request: once.

use smallvec::SmallVec;
use tokio::time::Instant;
use weir_proto::v1::HealthState;
use weir_ratelimit::waiting::{Priority, QueueId, QueuePolicy, SlotQueue};
use weir_ratelimit::{Acquire, Cost, Decision, Error, Key, MAX_CANDIDATES, Outcome};

use super::attempt::{self, Answer, Failure, Fault, Target};
use super::blame::Suspects;
use super::call::ModelCall;
use super::context::RequestContext;
use super::exchanges::{Exchanges, PARALLEL_MAX};
use super::hedge::{self, Cause, HedgeClock};
use super::others::Others;
use super::refusal;
use super::slot_round::{self, SlotHold, Taken, limiter_candidates};
use crate::error::GatewayError;
use crate::limits::account_groups::CandidateGroups;
use crate::limits::ledger::LEASE_TTL;
use crate::limits::price;
use crate::limits::reservation::Reservation;
use crate::routing::backend::ModelBackend;
use crate::routing::backend_state::{AttemptOutcome, InFlight};
use crate::routing::balance::Candidate;
use crate::routing::probation::Probation;

/// The answer that won.
pub(super) struct Won {
    pub(super) answer: Answer,
    pub(super) target: Target,
    pub(super) in_flight: InFlight,
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
    /// Why it was started beside another one, if it was.
    hedge: Option<Cause>,
    /// When another backend is tried beside this one.
    hedge_clock: HedgeClock,
    /// Its probe, if the backend is on probation.
    probation: Option<Probation>,
    /// It is sent again without the `stream_options` that Weir had added.
    without_addition: bool,
}

impl Attempt {
    /// It failed without the addition too: the addition was not the reason, and is made again next time.
    fn keep_addition(&self) {
        if self.without_addition {
            self.target.set_refuses_addition(false);
        }
    }
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) struct Failed {
    /// What the client hears.
    pub(super) error: GatewayError,
    /// A backend may have generated all the same.
    pub(super) unknown_outcome: bool,
}

/// The attempts of a request that was admitted.
pub(super) struct Attempts<'a> {
    call: &'a ModelCall<'a>,
    reservation: &'a mut Reservation,
    context: &'a mut RequestContext,
    /// The backends that were not tried yet, in order of preference.
    left: Others,
    /// How many attempts were started.
    started: u32,
    /// One of those that ended may have used something.
    unknown_outcome: bool,
    under_way: SmallVec<[Attempt; PARALLEL_MAX]>,
    exchanges: Exchanges,
    /// Failed attempts that count against their backends only if another one answers well.
    suspects: Suspects,
}

impl<'a> Attempts<'a> {
    pub(super) fn new(
        call: &'a ModelCall<'a>,
        reservation: &'a mut Reservation,
        context: &'a mut RequestContext,
        left: Others,
    ) -> Self {
        Self {
            call,
            reservation,
            context,
            left,
            started: 0,
            unknown_outcome: false,
            under_way: SmallVec::new(),
            exchanges: Exchanges::default(),
            suspects: Suspects::default(),
        }
    }

    /// Sends to the backend at `first`, whose slot the reservation holds, and as long as it is allowed to those left.
    /// `probation` is the probe of the first.
    pub(super) async fn run(mut self, first: usize, probation: Option<Probation>) -> Result<Won, Failed> {
        // It may have waited to be admitted.
        if self.is_late() {
            return Err(Failed { error: GatewayError::Deadline, unknown_outcome: false });
        }
        self.start(Taken { index: first, account: None }, None, probation);
        let call = self.call;
        loop {
            let (number, result) = tokio::select! {
                biased;
                ended = self.exchanges.next() => ended,
                cause = hedge_due(call, &self.under_way), if self.left.may_be() => {
                    self.hedge(cause).await;
                    continue;
                }
            };
            let Some(at) = self.under_way.iter().position(|attempt| attempt.number == number) else {
                continue;
            };
            let attempt = self.under_way.remove(at);
            match result {
                Ok(answer) => return Ok(self.won(attempt, answer)),
                Err(failure) => {
                    self.unknown_outcome |= failure.error.leaves_outcome_unknown();
                    if let Err(error) = self.failed(attempt, failure).await {
                        return Err(Failed { error, unknown_outcome: self.unknown_outcome });
                    }
                }
            }
        }
    }

    fn is_late(&self) -> bool {
        Instant::now() >= self.call.deadline
    }

    /// Starts an attempt at another backend beside the one that is silent, or in place of it where two are under way, if that
    /// is allowed and a slot is free.
    async fn hedge(&mut self, cause: Cause) {
        self.left.widen(self.call);
        // Where all are unhealthy, one is as good as another.
        let is_ill = |at: &Candidate| {
            let state = &self.call.model.backends[at.index].entry.state;
            state.health() == HealthState::Unhealthy || state.own_probes().is_unreachable()
        };
        self.left.candidates.sort_by_key(is_ill);
        // Trouble that this gateway has with all of them is no reason to ask, and pay, twice.
        let is_ours = |attempt: &Attempt| attempt.target.backend.state.health() != HealthState::Unhealthy;
        let is_in_vain = cause == Cause::Unhealthy
            && self.left.candidates.first().is_some_and(is_ill)
            && self.under_way.last().is_some_and(is_ours);
        let is_in_vain = is_in_vain || self.left.candidates.is_empty();
        let next = match !is_in_vain && self.may_start_another(Some(cause)) {
            // The store's trouble is no reason to give up a call under way.
            true => Box::pin(self.take_slot()).await.ok().flatten(),
            false => None,
        };
        match next.filter(|_| !self.is_late()) {
            Some(next) => {
                if !has_room(&self.under_way) {
                    self.give_up_last();
                }
                self.start(next, Some(cause), None);
            }
            // No budget or no slot now; there may be later.
            None => self.under_way.iter_mut().for_each(|attempt| {
                attempt.hedge_clock.postpone(&attempt.target, cause);
            }),
        }
    }

    /// Ends the last attempt, whose backend was found unhealthy: it counts as if another had answered first, if one does.
    fn give_up_last(&mut self) {
        let Some(over) = self.under_way.pop() else { return };
        self.exchanges.end(over.number);
        // Its backend may have generated all the same.
        self.unknown_outcome = true;
        hedge::count_lost(&over.target, &self.used_by(&over.target));
        self.suspects.given_up(over.target.clone());
        self.give_up(over);
    }

    /// An attempt failed: leaves it to the other one, or starts the next one. The error is that of the request.
    async fn failed(&mut self, failed: Attempt, failure: Failure) -> Result<(), GatewayError> {
        if failure.fault == Fault::Addition && failed.target.set_refuses_addition(true) {
            self.exchange(Attempt { without_addition: true, ..failed });
            return Ok(());
        }
        self.context.failed = Some((failure.status, failure.seen.clone()));
        failed.keep_addition();
        let error = self.suspects.record(&failed.target, failure);
        if !self.under_way.is_empty() {
            if error.leaves_outcome_unknown() {
                hedge::count_lost(&failed.target, &self.used_by(&failed.target));
            }
            self.give_up(failed);
            return Ok(());
        }
        if error.facts().retry_elsewhere {
            self.left.widen(self.call);
        }
        let nowhere = !error.facts().retry_elsewhere || self.left.candidates.is_empty();
        if nowhere || !self.may_start_another(None) {
            self.stands(failed);
            return Err(error);
        }
        // On the heap, as in `hedge`: few requests come here, and all would be as large.
        match Box::pin(self.wait_for_slot(failed)).await {
            // It may have waited for the slot, which is given back with the request.
            Ok(Some(_)) if self.is_late() => Err(error),
            Ok(Some(next)) => {
                self.start(next, None, None);
                Ok(())
            }
            Ok(None) => Err(GatewayError::Busy { retry_after: None }),
            Err(_) => Err(error),
        }
    }

    /// Whether another attempt is allowed, beside one under way for that cause or in place of one that failed.
    fn may_start_another(&self, hedge: Option<Cause>) -> bool {
        let pool = &self.call.model.pool;
        let is_paid = || match hedge {
            Some(Cause::Silent) => pool.state.may_hedge(),
            Some(Cause::Unhealthy) | None => pool.state.may_retry(),
        };
        self.started < pool.spec.retry_budget.max_attempts && !self.is_late() && is_paid()
    }

    /// What a call has used when it is given up before its answer: the backend may have read the prompt, and where the
    /// answer is unary, have written it too.
    fn used_by(&self, target: &Target) -> Cost {
        match target.stream {
            true => price::cost(&target.model, target.prompt_tokens, 0),
            false => self.reservation.reserved,
        }
    }

    /// Takes a slot at the first of those left that has one and whose account has room.
    async fn take_slot(&mut self) -> Result<Option<Taken>, Error> {
        if self.call.model.accounts.is_empty() {
            return self.move_slot(None).await;
        }
        let (groups, full) = self.full_call();
        let (decision, hold) = slot_round::ask(self.reservation, &groups, &full, None).await?;
        Ok(self.taken(&decision, hold))
    }

    /// The same where no account is limited, in place of `from` if there is one.
    async fn move_slot(&mut self, from: Option<&Key>) -> Result<Option<Taken>, Error> {
        let candidates = limiter_candidates(self.call.model, &self.left.candidates);
        let (mut from, mut before) = (from, 0);
        for part in candidates.chunks(MAX_CANDIDATES) {
            let ledger = self.reservation.ledger();
            let taken = ledger.take_slot(self.reservation.id, from.cloned(), part.to_vec()).await?;
            if let Some(from) = from.take() {
                self.reservation.moved(from);
            }
            if let Some((at, slot)) = taken {
                return Ok(Some(self.took(before + at, SlotHold::Slot(slot))));
            }
            before += part.len();
        }
        Ok(None)
    }

    /// The same for a request whose attempt has failed and that has no other one under way, in place of that: when all
    /// slots are taken it waits for one where those wait that have none yet, and before them, since it has waited once.
    async fn wait_for_slot(&mut self, failed: Attempt) -> Result<Option<Taken>, Error> {
        let taken = match self.call.model.accounts.is_empty() {
            true => {
                let slot = failed.slot.clone();
                // It is not in flight any more.
                drop(failed);
                self.move_slot(Some(&slot)).await?
            }
            false => {
                // Before others are asked: the same account may have room for one at a time only.
                self.vacate(failed).await?;
                self.take_slot().await?
            }
        };
        if taken.is_some() {
            return Ok(taken);
        }
        let (groups, full) = self.full_call();
        if groups.is_empty() {
            return Ok(None);
        }
        let patience = self.patience(&groups, full.scopes.len());
        let ledger = self.reservation.ledger().clone();
        let reservation = &*self.reservation;
        let asking = |queue: Option<&QueueId>| {
            let queue = queue.cloned();
            let (groups, full) = (&groups, &full);
            async move { slot_round::ask(reservation, groups, full, queue.as_ref()).await }
        };
        let waited = ledger.waiting.acquire(&full, &patience, asking).await?;
        self.context.waited += waited.waited;
        Ok(self.taken(&waited.decision, waited.with.flatten()))
    }

    /// How long it may wait for another slot.
    fn patience(&self, groups: &CandidateGroups, scopes: usize) -> QueuePolicy {
        let queue = &self.call.model.pool.spec.queue;
        QueuePolicy {
            tenant: self.call.call.key.tenant.queue.clone(),
            priority: Priority::High,
            deadline: self.call.deadline,
            scopes: SmallVec::from_elem(queue.max_wait, scopes),
            slots: Some(SlotQueue {
                queue: self.call.model.queue.clone(),
                max_wait: queue.max_wait,
                bound: queue.max_waiting as usize,
                places: Some(self.call.model.places()),
            }),
            bytes: 0,
            alternatives: groups.alternatives(),
        }
    }

    /// The call for all that is left, by account.
    fn full_call(&self) -> (CandidateGroups, Acquire) {
        let (call, reserved) = (self.call, &self.reservation.reserved);
        let accounts = &call.model.accounts;
        let groups = refusal::usable_accounts(accounts, &self.left.candidates, 0, reserved, &call.least);
        let groups = groups.unwrap_or_default();
        let full = Acquire {
            id: self.reservation.id,
            cost: *reserved,
            estimated: true,
            scopes: groups.entries(accounts).map(|entry| entry.limits.clone()).collect(),
            candidates: limiter_candidates(call.model, &self.left.candidates),
            lease_ttl: LEASE_TTL,
        };
        (groups, full)
    }

    fn taken(&mut self, decision: &Decision, hold: Option<SlotHold>) -> Option<Taken> {
        match decision.outcome {
            Outcome::Granted { slot: Some(at) } => Some(self.took(at, hold?)),
            _ => None,
        }
    }

    fn took(&mut self, at: usize, hold: SlotHold) -> Taken {
        let index = self.left.candidates.remove(at).index;
        let account = match hold {
            // The slot is part of the reservation there.
            SlotHold::Account(account) => Some(account),
            SlotHold::Slot(slot) => {
                slot.keep().into_iter().for_each(|slot| self.reservation.took(slot));
                None
            }
        };
        Taken { index, account }
    }

    /// This attempt is over while another goes on: what it holds is given back, what was reserved at its account stands.
    fn give_up(&mut self, over: Attempt) {
        match over.account {
            // Dropped here, which ends it.
            Some(mut account) => account.used(account.reserved),
            None => {
                self.reservation.release(&over.slot);
                if over.first {
                    self.reservation.leave_account();
                }
            }
        }
    }

    /// This attempt is over and the request with it, which gives back the slot.
    fn stands(&mut self, over: Attempt) {
        match over.account {
            Some(mut account) => account.used(account.reserved),
            None if over.first => self.reservation.leave_account(),
            None => {}
        }
    }

    /// This attempt is over and another shall follow: returns once what it held can be taken.
    async fn vacate(&mut self, over: Attempt) -> Result<(), Error> {
        drop(over.in_flight);
        match over.account {
            Some(mut account) => {
                account.used(account.reserved);
                account.vacate(&over.slot, true).await
            }
            None => self.reservation.vacate(&over.slot, over.first).await,
        }
    }

    fn start(&mut self, taken: Taken, hedge: Option<Cause>, probation: Option<Probation>) {
        let Taken { index, mut account } = taken;
        let call = self.call;
        let ModelBackend { entry: backend, upstream_model } = &call.model.backends[index];
        let target = Target {
            model: call.model.clone(),
            backend: backend.clone(),
            upstream_model: upstream_model.clone(),
            metrics: call.call.gateway.metrics.clone(),
            stream: call.call.request.stream,
            prompt_tokens: call.prompt_tokens,
            sent: Instant::now(),
            began: None,
        };
        self.started += 1;
        self.context.backend = Some(backend.name.clone());
        self.context.attempts = self.started;
        // From here on a request that ends has used something.
        let used = self.used_by(&target);
        self.reservation.used(used);
        if let Some(account) = &mut account {
            account.used(used);
        }
        if let Some(cause) = hedge {
            hedge::count_started(&target, cause);
        }
        self.exchange(Attempt {
            number: self.started,
            in_flight: InFlight::enter(&backend.state),
            slot: backend.slots.clone(),
            first: self.started == 1 && call.model.accounts.of(index).is_some(),
            account,
            hedge,
            hedge_clock: HedgeClock::of(&target),
            probation,
            without_addition: false,
            target,
        });
    }

    /// Sends what an attempt sends.
    fn exchange(&mut self, attempt: Attempt) {
        let outgoing = self.call.outgoing(&attempt.target, self.context.request_id.clone());
        let (number, target) = (attempt.number, attempt.target.clone());
        self.exchanges.push(number, async move { attempt::send(&target, outgoing).await });
        self.under_way.push(attempt);
    }

    fn won(mut self, winner: Attempt, answer: Answer) -> Won {
        // The other call's connection is closed before its slot is given back.
        self.exchanges.clear();
        let is_good = !matches!(&answer, Answer::Unary { status, .. } if !status.is_success());
        if !is_good {
            winner.keep_addition();
        }
        let Attempt { number, mut target, in_flight, account, hedge, probation, .. } = winner;
        probation.into_iter().for_each(Probation::answered);
        if let Some(cause) = hedge {
            hedge::count_won(&target, cause);
        }
        if is_good {
            target.begin();
            self.suspects.blame();
        }
        for other in std::mem::take(&mut self.under_way) {
            // Asked later and not answered yet says nothing; asked earlier does.
            if other.number < number {
                other.target.fail(AttemptOutcome::Overtaken);
            }
            hedge::count_lost(&other.target, &self.used_by(&other.target));
            self.give_up(other);
        }
        if let Some(account) = account {
            self.reservation.answered_under(account);
        }
        self.context.backend = Some(target.backend.name.clone());
        Won { answer, target, in_flight }
    }
}

/// A client that leaves while two calls are under way has paid for none of them.
impl Drop for Attempts<'_> {
    fn drop(&mut self) {
        for attempt in self.under_way.iter().filter(|attempt| attempt.hedge.is_some()) {
            hedge::count_lost(&attempt.target, &self.used_by(&attempt.target));
        }
    }
}

/// Waits until another backend is to be tried beside the last of these, which may be for ever. With as many under way as may
/// be at once, only one that is found unhealthy makes room for another.
async fn hedge_due(call: &ModelCall<'_>, under_way: &[Attempt]) -> Cause {
    let Some(last) = under_way.last() else { return std::future::pending().await };
    let backend = &last.target.backend;
    let probe = || call.call.gateway.probes.want(&backend.name);
    last.hedge_clock.due(&backend.state, has_room(under_way), probe).await
}

fn has_room(under_way: &[Attempt]) -> bool {
    under_way.len() < PARALLEL_MAX
}
