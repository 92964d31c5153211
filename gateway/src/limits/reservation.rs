//! The reservation of one request: what is reserved for it, charged and given back.

use std::sync::Arc;

use smallvec::SmallVec;
use tokio::time::Instant;
use uuid::Uuid;
use weir_ratelimit::reservation::{self, Leases};
use weir_ratelimit::{
    Acquire, Charge, ChargeRule, Cost, Decision, Error, Key, Kind, Limiter, Outcome, ScopeLimits, Scopes,
    Settle, Tally, Usage,
};

use super::ledger::{Job, Ledger};

/// Tokens by which a stream may exceed its charges. Output beyond the reservation is charged in steps of this size,
/// so that a long answer counts in its limits while it runs.
pub const STEP_TOKENS: u64 = 256;

/// The tenant and the request that a reservation is for.
#[derive(Debug, Clone)]
pub struct Subject {
    /// The tenant's name.
    pub tenant: Arc<str>,
    /// The model's name.
    pub model: Arc<str>,
    /// The record of what the tenant uses on the day of the admission.
    pub record: Key,
    /// Bytes of the prompt; `None` if they say little about its tokens.
    pub prompt_bytes: Option<u64>,
    /// The number of answers asked for, at least one.
    pub choices: u32,
}

/// The result of asking for a reservation.
#[derive(Debug)]
pub struct Asked {
    /// The decision.
    pub decision: Result<Decision, Error>,
    /// Armed only if it was granted or may have been.
    pub reservation: Reservation,
    /// Whether the deny cache answered and the limiter was not asked.
    pub from_deny_cache: bool,
}

/// A reservation and its leases, from before it is asked for to the end of the request or of one attempt.
#[derive(Debug)]
pub struct Reservation {
    ledger: Arc<Ledger>,
    /// Its id.
    pub id: Uuid,
    /// The scopes of the request: its own, and behind them those of the account of its first attempt.
    pub scopes: Scopes,
    /// The number of its own scopes.
    own: usize,
    /// Whether the attempt under that account is over. Its reserved cost stays charged, and its leases are released.
    left: bool,
    /// The reservation at the account of the backend that answers, if that is the account of another attempt.
    elsewhere: Option<Box<Reservation>>,
    /// The reserved cost.
    pub reserved: Cost,
    actual: Cost,
    /// The cost that was charged beyond the reservation while the answer streamed.
    stepped: Cost,
    /// The part that the usage record has already.
    noted: Tally,
    /// `None` for a reservation at a provider account alone.
    subject: Option<Subject>,
    /// One slot, or two while a hedge runs beside a silent backend.
    slots: SmallVec<[Key; 2]>,
    /// Its entry in the book of leases.
    held: reservation::Reservation,
    /// When it was granted, where it holds leases of limits.
    granted_at: Option<Instant>,
    armed: bool,
}

impl Reservation {
    /// A reservation that is about to be asked for. Dropping it cancels whatever the limiter may have granted, so a
    /// caller that leaves during the call leaves nothing behind.
    pub fn prepare(ledger: &Arc<Ledger>, scopes: Scopes, reserved: Cost, subject: Option<Subject>) -> Self {
        let id = ledger.holder.id();
        Self {
            own: scopes.len(),
            left: false,
            elsewhere: None,
            ledger: ledger.clone(),
            id,
            noted: Tally::default(),
            scopes,
            reserved,
            actual: Cost::default(),
            stepped: Cost::default(),
            subject,
            slots: SmallVec::new(),
            held: ledger.leases.open(id),
            granted_at: None,
            armed: true,
        }
    }

    /// Asks the limiter for a call, under an id of its own. Usage is recorded for `subject`; a reservation at a
    /// provider account has none. The future is large, because it holds all layers of the limiter, so it belongs on
    /// the heap.
    pub async fn ask(ledger: &Arc<Ledger>, mut call: Acquire, subject: Option<Subject>) -> Asked {
        // Created before the call: if this future is dropped while the limiter decides, the grant is cancelled.
        let mut reservation = Self::prepare(ledger, call.scopes.clone(), call.cost, subject);
        call.id = reservation.id;
        let decided = reservation.held.ask(&ledger.denials, &ledger.limiter, &call).await;
        let (decision, from_deny_cache) = match decided {
            Ok((decision, from_deny_cache)) => (Ok(decision), from_deny_cache),
            Err(error) => (Err(error), false),
        };
        match decision.as_ref().map(|decision| &decision.outcome) {
            Ok(Outcome::Granted { slot }) => {
                let place = slot.and_then(|at| call.candidates.get(at));
                reservation.slots = place.map(|place| place.leases.clone()).into_iter().collect();
            }
            Ok(_) => reservation.refused(),
            Err(_) => {}
        }
        Asked { decision, reservation, from_deny_cache }
    }

    /// Sets the number of the request's own scopes. The others belong to the account of its first attempt.
    pub fn under_account(&mut self, own: usize) {
        self.own = own;
    }

    /// The ledger of this reservation.
    pub(crate) fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// The limiter that decides and settles.
    pub fn limiter(&self) -> &impl Limiter {
        &self.ledger.limiter
    }

    /// Records a refusal: nothing was written, so nothing is settled.
    pub fn refused(&mut self) {
        self.armed = false;
    }

    /// Records a grant with the slot of a backend.
    pub fn granted(&mut self, slot: Option<Key>) {
        self.slots = slot.into_iter().collect();
        self.granted_at = leases(&self.scopes).next().map(|_| Instant::now());
        self.enter();
    }

    /// Records that a slot of another backend was taken as well.
    pub fn took(&mut self, slot: Key) {
        self.slots.push(slot);
        self.enter();
    }

    /// Records that the limiter has freed a slot.
    pub fn moved(&mut self, from: &Key) {
        self.slots.retain(|slot| slot != from);
        self.enter();
        self.ledger.gave_back(from);
    }

    /// Releases a slot that the continuing request does not need any more.
    pub fn release(&mut self, slot: &Key) {
        self.slots.retain(|held| held != slot);
        self.enter();
        // Without room in the queue the lease expires.
        let _ = self.ledger.hand_over(Job::Release(self.id, slot.clone()));
    }

    /// Leaves the account of the first attempt, which ended without the answer that counts: its reserved cost stays
    /// charged. Its leases are released now, while the request continues.
    pub fn leave_account(&mut self) {
        for lease in self.depart() {
            let _ = self.ledger.hand_over(Job::Release(self.id, lease));
        }
    }

    /// Releases a slot, and leaves the account of the first attempt if asked to. Returns when others can have both.
    ///
    /// # Errors
    /// Those of the limiter. Leases that were not released then expire.
    pub async fn vacate(&mut self, slot: &Key, leave_account: bool) -> Result<(), Error> {
        let mut leases = if leave_account { self.depart() } else { SmallVec::new() };
        leases.push(slot.clone());
        self.limiter().release(self.id, &leases).await?;
        self.slots.retain(|held| held != slot);
        self.enter();
        self.ledger.denials.given_back(&leases);
        leases.iter().for_each(|lease| self.ledger.gave_back(lease));
        Ok(())
    }

    /// Marks the account as left and returns the leases to release.
    fn depart(&mut self) -> SmallVec<[Key; 4]> {
        if std::mem::replace(&mut self.left, true) {
            return SmallVec::new();
        }
        self.enter();
        leases(&self.scopes[self.own..]).collect()
    }

    /// Records that the backend that answers is under another account than that of the first attempt.
    pub fn answered_under(&mut self, account: Box<Reservation>) {
        self.elsewhere = Some(account);
    }

    /// The scopes that further usage counts in.
    fn weighing(&self) -> &[ScopeLimits] {
        if self.left { &self.scopes[..self.own] } else { &self.scopes }
    }

    /// Tells the ledger which leases to renew.
    fn enter(&self) {
        let concurrency = leases(self.weighing());
        self.held.set_leases(concurrency.chain(self.slots.iter().cloned()).collect());
    }

    /// Sets the usage so far, which is settled if the request ends now.
    pub fn used(&mut self, actual: Cost) {
        self.actual = actual;
        if let Some(account) = &mut self.elsewhere {
            account.used(actual);
        }
    }

    /// Sets the usage of a stream so far. Usage beyond the reservation is charged in whole steps, each under an id of
    /// its own. The settlement charges the rest, or gives back what the steps charged too much.
    pub fn streamed(&mut self, so_far: Cost) {
        self.actual = so_far;
        if let Some(account) = &mut self.elsewhere {
            account.streamed(so_far);
        }
        let step = Cost::new(Kind::ALL.map(|kind| {
            match kind {
                Kind::Requests => 0,
                _ => so_far
                    .get(kind)
                    .saturating_sub(self.reserved.get(kind).saturating_add(self.stepped.get(kind))),
            }
        }));
        if step.get(Kind::Tokens) < STEP_TOKENS {
            return;
        }
        let usage = self.usage(&so_far);
        let noted = usage.as_ref().map_or(self.noted, |usage| self.noted.plus(usage.tally));
        let settle = Settle { usage, ..debit(step, self.weighing()) };
        let job = Job::Settle(smallvec::smallvec![Box::new(settle)], false);
        // Without room in the queue the next step or the settlement charges it.
        if self.ledger.hand_over(job) {
            self.ledger.metrics.settlement_steps.inc();
            let all = Kind::ALL.map(|kind| self.stepped.get(kind).saturating_add(step.get(kind)));
            self.stepped = Cost::new(all);
            self.noted = noted;
        }
    }

    /// The part of `used` that the usage record lacks.
    fn usage(&self, used: &Cost) -> Option<Usage> {
        let subject = self.subject.as_ref()?;
        let tally = Tally::of(used).minus(self.noted);
        (!tally.is_zero()).then(|| Usage {
            record: subject.record.clone(),
            model: subject.model.clone(),
            tally,
        })
    }

    /// Teaches the estimates what the provider counted for a complete answer.
    pub fn learn(&self, prompt: Option<u64>, completion: Option<u64>) {
        let Some(Subject { tenant, model, prompt_bytes, choices, .. }) = &self.subject else { return };
        if let (Some(bytes), Some(tokens)) = (prompt_bytes, prompt) {
            self.ledger.estimates.learn_prompt(model, *bytes, tokens);
        }
        if let Some(tokens) = completion {
            self.ledger.estimates.learn_output(tenant, model, tokens.div_ceil(u64::from(*choices).max(1)));
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        if let (Some(at), Some(Subject { tenant, model, .. })) = (self.granted_at, &self.subject) {
            self.ledger.estimates.learn_hold(tenant, model, at.elapsed());
        }
        while self.slots.len() > 1 {
            let slot = self.slots[1].clone();
            self.release(&slot);
        }
        self.held.set_leases(Leases::new());
        let actual = minus(&self.actual, &self.stepped);
        let too_much = credits(&minus(&self.stepped, &self.actual), self.weighing());
        let credit = Kind::ALL.iter().any(|kind| self.actual.get(*kind) < self.reserved.get(*kind));
        let (settlements, perhaps) = (self.settlements(actual), self.held.take_unanswered());
        let job = match perhaps.is_empty() {
            true => Job::Settle(settlements, credit),
            false => Job::Cancel(settlements, Box::new((self.id, perhaps))),
        };
        if !self.ledger.hand_over(job) {
            self.ledger.metrics.settlements_lost.inc();
        }
        if !too_much.is_empty() {
            // Without room in the queue the excess stays charged.
            let _ = self.ledger.hand_over(Job::GiveBack(too_much));
        }
    }
}

impl Reservation {
    /// The settlements of this reservation. A settlement applies one cost to all scopes. If the account keeps its
    /// reserved cost, the common settlement has the smaller of both costs; before it the account is debited the
    /// difference, after it the request's own scopes are.
    fn settlements(&mut self, actual: Cost) -> SmallVec<[Box<Settle>; 1]> {
        let usage = self.usage(&self.actual);
        let (id, slot) = (self.id, self.slots.pop());
        let scopes = std::mem::take(&mut self.scopes);
        if !self.left {
            return smallvec::smallvec![Box::new(Settle { id, actual, scopes, slot, usage })];
        }
        let common = Cost::new(Kind::ALL.map(|kind| actual.get(kind).min(self.reserved.get(kind))));
        let (own, account) = scopes.split_at(self.own);
        let of_account = Box::new(debit(minus(&self.reserved, &common), account));
        let of_own = Box::new(debit(minus(&actual, &common), own));
        let all = Box::new(Settle { id, actual: common, scopes, slot, usage });
        let needed = |settle: &Settle| {
            settle.id == id || (settle.actual != Cost::default() && !settle.scopes.is_empty())
        };
        [of_account, all, of_own].into_iter().filter(|settle| needed(settle)).collect()
    }
}

/// The lease sets of the scopes with a concurrency limit.
fn leases(scopes: &[ScopeLimits]) -> impl Iterator<Item = Key> {
    scopes.iter().filter(|scope| scope.concurrency.is_some()).map(|scope| scope.leases.clone())
}

/// A debit under a new reservation id: it is charged once and credits nothing.
fn debit(actual: Cost, scopes: &[ScopeLimits]) -> Settle {
    let scopes = scopes.iter().map(|scope| ScopeLimits { concurrency: None, ..scope.clone() }).collect();
    Settle { id: Uuid::now_v7(), actual, scopes, slot: None, usage: None }
}

/// Charges that give this cost back to the buckets of these scopes.
fn credits(cost: &Cost, scopes: &[ScopeLimits]) -> Vec<Charge> {
    let of_scope = |scope: &ScopeLimits| {
        let (record, buckets) = (scope.record.clone(), scope.buckets);
        Kind::ALL.into_iter().filter_map(move |kind| {
            let too_much = i64::try_from(cost.get(kind)).ok().filter(|units| *units > 0)?;
            let (record, bucket, rule) = (record.clone(), buckets[kind as usize]?, ChargeRule::Note);
            Some(Charge { record, kind, bucket, needed: 0, added: -too_much, rule })
        })
    };
    scopes.iter().flat_map(of_scope).collect()
}

fn minus(a: &Cost, b: &Cost) -> Cost {
    Cost::new(Kind::ALL.map(|kind| a.get(kind).saturating_sub(b.get(kind))))
}

#[cfg(test)]
mod tests;
