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

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use smallvec::SmallVec;
use tokio::time::{Instant, sleep_until};
use weir_ratelimit::waiting::{Priority, QueueId, QueuePolicy, SlotQueue};
use weir_ratelimit::{Acquire, Decision, Error, Key, Outcome};

use super::attempt::{self, Answer, Target};
use super::call::ModelCall;
use super::context::RequestContext;
use super::refusal;
use crate::error::GatewayError;
use crate::limits::account_groups::CandidateGroups;
use crate::limits::ledger::LEASE_TTL;
use crate::limits::price;
use crate::limits::reservation::{Asked, Reservation};
use crate::limits::slot_lease::NewSlot;
use crate::routing::backend::ModelBackend;
use crate::routing::backend_state::{AttemptOutcome, InFlight};
use crate::routing::balance::Candidate;
use crate::routing::entries::ModelEntry;

/// Attempts of one request under way at once.
const PARALLEL_MAX: usize = 2;

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
    /// From then on another backend is tried as well.
    hedge_at: Option<Instant>,
}

/// A backend whose slot was taken, and what was reserved at its account, if that is limited.
struct Taken {
    index: usize,
    account: Option<Box<Reservation>>,
}

/// What a slot was taken with: it is given back with this value.
enum SlotHold {
    /// By itself, for the request's own reservation.
    Slot(NewSlot),
    /// With a reservation at the account of its backend.
    Account(Box<Reservation>),
}

/// The number of an attempt and what it came to.
type Ended = (u32, Result<Answer, GatewayError>);
type Exchanges = FuturesUnordered<Pin<Box<dyn Future<Output = Ended> + Send>>>;

/// The attempts of a request that was admitted.
pub(super) struct Attempts<'a> {
    call: &'a ModelCall<'a>,
    reservation: &'a mut Reservation,
    context: &'a mut RequestContext,
    /// The backends that were not tried yet, in order of preference.
    left: Vec<Candidate>,
    /// How many attempts were started.
    started: u32,
    under_way: SmallVec<[Attempt; PARALLEL_MAX]>,
    exchanges: Exchanges,
}

impl<'a> Attempts<'a> {
    pub(super) fn new(
        call: &'a ModelCall<'a>,
        reservation: &'a mut Reservation,
        context: &'a mut RequestContext,
        left: Vec<Candidate>,
    ) -> Self {
        let (under_way, exchanges) = (SmallVec::new(), Exchanges::new());
        Self { call, reservation, context, left, started: 0, under_way, exchanges }
    }

    /// Sends to the backend at `first`, whose slot the reservation holds, and as long as it is allowed to those left.
    pub(super) async fn run(mut self, first: usize) -> Result<Won, GatewayError> {
        self.start(Taken { index: first, account: None });
        loop {
            let may_hedge = self.under_way.len() < PARALLEL_MAX && !self.left.is_empty();
            let hedge_at = self.under_way.last().and_then(|last| last.hedge_at).filter(|_| may_hedge);
            let ended = tokio::select! {
                biased;
                Some(ended) = self.exchanges.next() => Some(ended),
                () = sleep_until(hedge_at.unwrap_or_else(Instant::now)), if hedge_at.is_some() => None,
            };
            let Some((number, result)) = ended else {
                self.hedge().await;
                continue;
            };
            let Some(at) = self.under_way.iter().position(|attempt| attempt.number == number) else {
                continue;
            };
            let attempt = self.under_way.remove(at);
            match result {
                Ok(answer) => return Ok(self.won(attempt, answer)),
                Err(error) => self.failed(attempt, error).await?,
            }
        }
    }

    /// Starts an attempt at another backend beside the one that is silent, if that is allowed and a slot is free.
    async fn hedge(&mut self) {
        let next = match self.may_start_another() {
            // The store's trouble is no reason to give up a call under way.
            true => Box::pin(self.take_slot()).await.ok().flatten(),
            false => None,
        };
        match next {
            Some(next) => self.start(next),
            // No budget or no slot now; there may be later.
            None => self.under_way.iter_mut().for_each(Attempt::postpone_hedge),
        }
    }

    /// An attempt failed: leaves it to the other one, or starts the next one. The error is that of the request.
    async fn failed(&mut self, failed: Attempt, error: GatewayError) -> Result<(), GatewayError> {
        if !self.under_way.is_empty() {
            self.give_up(failed);
            return Ok(());
        }
        if !error.facts().retry_elsewhere || self.left.is_empty() || !self.may_start_another() {
            self.stands(failed);
            return Err(error);
        }
        // On the heap, as in `hedge`: few requests come here, and all would be as large.
        match Box::pin(self.wait_for_slot(failed)).await {
            Ok(Some(next)) => {
                self.start(next);
                Ok(())
            }
            Ok(None) => Err(GatewayError::Busy { retry_after: None }),
            Err(_) => Err(error),
        }
    }

    fn may_start_another(&self) -> bool {
        let pool = &self.call.model.pool;
        self.started < pool.spec.retry_budget.max_attempts
            && Instant::now() < self.call.deadline
            && pool.state.may_retry()
    }

    /// Takes a slot at the first of those left that has one and whose account has room.
    async fn take_slot(&mut self) -> Result<Option<Taken>, Error> {
        if self.call.model.accounts.is_empty() {
            return self.move_slot(None).await;
        }
        let (groups, full) = self.full_call();
        let (decision, hold) = ask(self.reservation, &groups, &full, None).await?;
        Ok(self.taken(&decision, hold))
    }

    /// The same where no account is limited, in place of `from` if there is one.
    async fn move_slot(&mut self, from: Option<&Key>) -> Result<Option<Taken>, Error> {
        let candidates = limiter_candidates(self.call.model, &self.left);
        let ledger = self.reservation.ledger();
        let taken = ledger.take_slot(self.reservation.id, from.cloned(), candidates).await?;
        if let Some(from) = from {
            self.reservation.moved(from);
        }
        Ok(taken.map(|(at, slot)| self.took(at, SlotHold::Slot(slot))))
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
            async move { ask(reservation, groups, full, queue.as_ref()).await }
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
            }),
            bytes: 0,
            alternatives: groups.alternatives(),
        }
    }

    /// The call for all that is left, by account.
    fn full_call(&self) -> (CandidateGroups, Acquire) {
        let (call, reserved) = (self.call, &self.reservation.reserved);
        let accounts = &call.model.accounts;
        let groups = refusal::usable_accounts(accounts, &self.left, 0, reserved, &call.least);
        let groups = groups.unwrap_or_default();
        let full = Acquire {
            id: self.reservation.id,
            cost: *reserved,
            estimated: true,
            scopes: groups.entries(accounts).map(|entry| entry.limits.clone()).collect(),
            candidates: limiter_candidates(call.model, &self.left),
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
        let index = self.left.remove(at).index;
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

    fn start(&mut self, taken: Taken) {
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
        self.context.backend = Some(backend.name.to_string());
        self.context.attempts = self.started;
        // From here on the backend may have read the prompt, and where the answer is unary, have written it too: a
        // request that ends now has used that.
        let used = match target.stream {
            true => price::cost(call.model, call.prompt_tokens, 0),
            false => self.reservation.reserved,
        };
        self.reservation.used(used);
        if let Some(account) = &mut account {
            account.used(used);
        }
        let outgoing = call.outgoing(&target, self.context.request_id_header());
        let (number, sending) = (self.started, target.clone());
        self.exchanges.push(Box::pin(async move { (number, attempt::send(&sending, outgoing).await) }));
        self.under_way.push(Attempt {
            number,
            in_flight: InFlight::enter(&backend.state),
            slot: backend.slots.clone(),
            first: number == 1 && call.model.accounts.of(index).is_some(),
            account,
            hedge_at: target.hedge_delay().map(|delay| target.sent + delay),
            target,
        });
    }

    fn won(mut self, winner: Attempt, answer: Answer) -> Won {
        // The other call's connection is closed before its slot is given back.
        self.exchanges.clear();
        let Attempt { number, mut target, in_flight, account, .. } = winner;
        if !matches!(&answer, Answer::Unary { status, .. } if !status.is_success()) {
            target.begin();
        }
        for other in std::mem::take(&mut self.under_way) {
            // Asked later and not answered yet says nothing; asked earlier does.
            if other.number < number {
                other.target.fail(AttemptOutcome::Overtaken);
            }
            self.give_up(other);
        }
        if let Some(account) = account {
            self.reservation.answered_under(account);
        }
        self.context.backend = Some(target.backend.name.to_string());
        Won { answer, target, in_flight }
    }
}

/// Asks for a slot once around, group by group of one account each: where that is limited by a reservation there, else by
/// a slot of the request's own reservation.
async fn ask(
    reservation: &Reservation,
    groups: &CandidateGroups,
    full: &Acquire,
    queue: Option<&QueueId>,
) -> Result<(Decision, Option<SlotHold>), Error> {
    let ledger = reservation.ledger();
    let mut round = groups.round(full, |scopes| ledger.waiting.is_awaited(scopes, queue));
    while let Some((group, acquire)) = round.next() {
        let (decision, hold) = match group.account {
            None => {
                let taken = ledger.take_slot(reservation.id, None, acquire.candidates).await?;
                let (outcome, hold) = match taken {
                    Some((at, slot)) => (Outcome::Granted { slot: Some(at) }, Some(SlotHold::Slot(slot))),
                    None => (Outcome::NoSlot { wait: LEASE_TTL }, None),
                };
                (Decision { outcome, limits: Vec::new(), now_us: 0, degraded: false }, hold)
            }
            Some(_) => {
                let (decision, account) = ask_account(reservation, acquire).await?;
                (decision, Some(SlotHold::Account(account)))
            }
        };
        if let Some(decision) = round.decided(&group, decision) {
            return Ok((decision, hold));
        }
    }
    Ok((round.refusal(|_| LEASE_TTL), None))
}

/// Asks for a reservation at a provider's account, with a slot of one of its backends.
async fn ask_account(
    reservation: &Reservation,
    acquire: Acquire,
) -> Result<(Decision, Box<Reservation>), Error> {
    let candidates = acquire.candidates.clone();
    let asked = Box::pin(Reservation::ask(reservation.ledger(), acquire, None)).await;
    let Asked { decision, reservation: mut account, .. } = asked;
    let decision = decision?;
    account.under_account(0);
    if let Outcome::Granted { slot } = decision.outcome {
        account.granted(slot.map(|slot| candidates[slot].leases.clone()));
    }
    Ok((decision, Box::new(account)))
}

impl Attempt {
    /// Thinks of another backend again after as long as the first time.
    fn postpone_hedge(&mut self) {
        self.hedge_at = self.target.hedge_delay().map(|delay| Instant::now() + delay);
    }
}

/// What the limiter is given, in order of preference.
pub(super) fn limiter_candidates(
    model: &ModelEntry,
    candidates: &[Candidate],
) -> Vec<weir_ratelimit::Candidate> {
    let for_limiter = |candidate: &Candidate| weir_ratelimit::Candidate {
        leases: model.backends[candidate.index].entry.slots.clone(),
        max_concurrency: candidate.slots,
        bound: candidate.bound,
    };
    candidates.iter().take(weir_ratelimit::MAX_CANDIDATES).map(for_limiter).collect()
}

/// The candidates that are left when `chosen` is taken: each backend once, with all its slots.
pub(super) fn others(candidates: &[Candidate], chosen: usize) -> Vec<Candidate> {
    let mut left: Vec<Candidate> = Vec::with_capacity(candidates.len());
    for candidate in candidates.iter().filter(|candidate| candidate.index != candidates[chosen].index) {
        match left.iter_mut().find(|known| known.index == candidate.index) {
            Some(known) => known.slots = known.slots.max(candidate.slots),
            None => left.push(Candidate { bound: None, ..*candidate }),
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
        let candidate = |index, slots| Candidate { index, slots, bound: None };
        let bounded = |index| Candidate {
            bound: Some(Bound { millionths: 400_000, estimate: 3 }),
            ..candidate(index, 50)
        };
        let candidates =
            [bounded(2), bounded(0), bounded(1), candidate(1, 50), candidate(0, 50), candidate(2, 50)];
        assert_eq!(others(&candidates, 0), [candidate(0, 50), candidate(1, 50)]);
        assert_eq!(others(&candidates, 3), [candidate(2, 50), candidate(0, 50)]);
    }
}
