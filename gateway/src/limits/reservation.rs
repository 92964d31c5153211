//! What is reserved for one request, and how it is given back.

use std::sync::Arc;

use jiff::civil::Date;
use smallvec::SmallVec;
use uuid::Uuid;
use weir_ratelimit::reservation::{self, Leases};
use weir_ratelimit::{
    Acquire, Cost, Decision, Error, Key, Kind, Limiter, Outcome, ScopeLimits, Scopes, Settle, Tally, Usage,
};

use super::ledger::{Job, Ledger};
use super::spend_period;

/// Tokens that a stream may be ahead of what it was charged for. What it generates beyond its reservation is charged
/// in steps of this size, so that a long answer weighs on its limits while it runs.
pub const STEP_TOKENS: u64 = 256;

/// For whom and for what something is reserved.
#[derive(Debug, Clone)]
pub struct Subject {
    /// The tenant's name.
    pub tenant: Arc<str>,
    /// The model's name.
    pub model: Arc<str>,
    /// Bytes of the prompt; `None` when they say little about its tokens.
    pub prompt_bytes: Option<u64>,
    /// Answers asked for, at least one.
    pub choices: u32,
}

/// The answer to a reservation that was asked for.
#[derive(Debug)]
pub struct Asked {
    /// The decision.
    pub decision: Result<Decision, Error>,
    /// Armed only if it was granted, or may have been.
    pub reservation: Reservation,
    /// The limiter was not asked: the refusal was known.
    pub from_deny_cache: bool,
}

/// A reservation and its leases, from before it is asked for to the end of the request, or of one attempt.
#[derive(Debug)]
pub struct Reservation {
    ledger: Arc<Ledger>,
    /// The reservation.
    pub id: Uuid,
    /// What the request is under: its own scopes, and after them those of the account of its first attempt.
    pub scopes: Scopes,
    /// How many of them are its own.
    own: usize,
    /// The attempt under that account is over: what was reserved there stands, and its leases are not ours any more.
    left: bool,
    /// What is reserved at the account of the backend that answers, when it is another attempt's.
    elsewhere: Option<Box<Reservation>>,
    /// What was reserved.
    pub reserved: Cost,
    actual: Cost,
    /// What was charged beyond the reservation while the answer streamed.
    stepped: Cost,
    /// The day of its usage record: the one on which it was admitted.
    day: Date,
    /// What the usage record has of it so far.
    noted: Tally,
    /// `None` for a reservation at a provider's account alone.
    subject: Option<Subject>,
    /// One, or two while a silent backend is not waited for alone.
    slots: SmallVec<[Key; 2]>,
    /// Its leases.
    held: reservation::Reservation,
    armed: bool,
}

impl Reservation {
    /// Ready to ask. Dropped from here on, it cancels whatever the limiter may have granted: a caller that goes
    /// away while the limiter is asked leaves nothing behind.
    pub fn prepare(ledger: &Arc<Ledger>, scopes: Scopes, reserved: Cost, subject: Option<Subject>) -> Self {
        let id = ledger.holder.id();
        Self {
            own: scopes.len(),
            left: false,
            elsewhere: None,
            ledger: ledger.clone(),
            id,
            day: spend_period::day_of(weir_runtime::wall_clock()),
            noted: Tally::default(),
            scopes,
            reserved,
            actual: Cost::default(),
            stepped: Cost::default(),
            subject,
            slots: SmallVec::new(),
            held: ledger.leases.open(id),
            armed: true,
        }
    }

    /// Asks the limiter for a call, under an id of its own. `subject` is whom the usage is recorded for; a reservation at a
    /// provider's account has none. Large: it holds all layers of the limiter, so it belongs on the heap.
    pub async fn ask(ledger: &Arc<Ledger>, mut call: Acquire, subject: Option<Subject>) -> Asked {
        // Made before the call: if this future is dropped while the limiter decides, the grant is cancelled.
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

    /// Only so many of its scopes are the request's own; the rest are those of the account of its first attempt.
    pub fn under_account(&mut self, own: usize) {
        self.own = own;
    }

    /// The ledger that it belongs to.
    pub(crate) fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// Who decides and settles.
    pub fn limiter(&self) -> &impl Limiter {
        &self.ledger.limiter
    }

    /// Refused: nothing was written, nothing is to be settled.
    pub fn refused(&mut self) {
        self.armed = false;
    }

    /// Granted, with the slot of this backend.
    pub fn granted(&mut self, slot: Option<Key>) {
        self.slots = slot.into_iter().collect();
        self.enter();
    }

    /// A slot of another backend was taken as well.
    pub fn took(&mut self, slot: Key) {
        self.slots.push(slot);
        self.enter();
    }

    /// This slot is held no more: the limiter has freed it.
    pub fn moved(&mut self, from: &Key) {
        self.slots.retain(|slot| slot != from);
        self.enter();
        self.ledger.gave_back(from);
    }

    /// This slot is not needed any more, while the request goes on.
    pub fn release(&mut self, slot: &Key) {
        self.slots.retain(|held| held != slot);
        self.enter();
        // Without room in the queue its lease runs out.
        let _ = self.ledger.queue.try_send(Job::Release(self.id, slot.clone()));
    }

    /// The attempt under the account it was admitted with is over, without the answer that counts: what was reserved there
    /// stands. Its leases are given back now, while the request goes on.
    pub fn leave_account(&mut self) {
        for lease in self.depart() {
            let _ = self.ledger.queue.try_send(Job::Release(self.id, lease));
        }
    }

    /// Gives this slot back, and leaves the account if the attempt was under it; returns once others can have both.
    ///
    /// # Errors
    /// Those of the limiter; what was not given back then runs out.
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

    /// Leaves the account; the leases that are to be given back.
    fn depart(&mut self) -> SmallVec<[Key; 4]> {
        if std::mem::replace(&mut self.left, true) {
            return SmallVec::new();
        }
        self.enter();
        leases(&self.scopes[self.own..]).collect()
    }

    /// The backend that answers is under this account, and not under the one it was admitted with.
    pub fn answered_under(&mut self, account: Box<Reservation>) {
        self.elsewhere = Some(account);
    }

    /// The scopes that weigh on what it goes on using.
    fn weighing(&self) -> &[ScopeLimits] {
        if self.left { &self.scopes[..self.own] } else { &self.scopes }
    }

    /// Says to the ledger which leases to renew.
    fn enter(&self) {
        let concurrency = leases(self.weighing());
        self.held.set_leases(concurrency.chain(self.slots.iter().cloned()).collect());
    }

    /// What the request has used so far: what is settled if it ends now.
    pub fn used(&mut self, actual: Cost) {
        self.actual = actual;
        if let Some(account) = &mut self.elsewhere {
            account.used(actual);
        }
    }

    /// A stream has used so much by now. What goes beyond the reservation by a whole step is charged at once, under an
    /// id of its own; the settlement charges the rest.
    pub fn streamed(&mut self, so_far: Cost) {
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
        // Without room the next step, or the settlement, charges this one too.
        if self.ledger.queue.try_send(job).is_ok() {
            self.ledger.metrics.settlement_steps.inc();
            let all = Kind::ALL.map(|kind| self.stepped.get(kind).saturating_add(step.get(kind)));
            self.stepped = Cost::new(all);
            self.noted = noted;
        }
    }

    /// What the usage record lacks of `used`.
    fn usage(&self, used: &Cost) -> Option<Usage> {
        let subject = self.subject.as_ref()?;
        let tally = Tally::of(used).minus(self.noted);
        let record = || Key::usage(&subject.tenant, &self.day.to_string());
        (!tally.is_zero()).then(|| Usage { record: record(), model: subject.model.clone(), tally })
    }

    /// What the provider counted of a whole answer: the next estimates follow it.
    pub fn learn(&self, prompt: Option<u64>, completion: Option<u64>) {
        let Some(Subject { tenant, model, prompt_bytes, choices }) = &self.subject else { return };
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
        while self.slots.len() > 1 {
            let slot = self.slots[1].clone();
            self.release(&slot);
        }
        self.held.set_leases(Leases::new());
        let actual = minus(&self.actual, &self.stepped);
        let credit = Kind::ALL.iter().any(|kind| self.actual.get(*kind) < self.reserved.get(*kind));
        let (settlements, perhaps) = (self.settlements(actual), self.held.take_unanswered());
        let job = match perhaps.is_empty() {
            true => Job::Settle(settlements, credit),
            false => Job::Cancel(settlements, Box::new((self.id, perhaps))),
        };
        if self.ledger.queue.try_send(job).is_err() {
            self.ledger.metrics.settlements_lost.inc();
        }
    }
}

impl Reservation {
    /// What ends it. A settlement applies one cost to all scopes of a reservation. Where the account stands at what was
    /// reserved, that is the smaller of the two; the account is debited the rest before, the request's own scopes after.
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

/// The lease sets of those that limit concurrency.
fn leases(scopes: &[ScopeLimits]) -> impl Iterator<Item = Key> {
    scopes.iter().filter(|scope| scope.concurrency.is_some()).map(|scope| scope.leases.clone())
}

/// A debit under a new reservation id: it is charged once, and credits nothing.
fn debit(actual: Cost, scopes: &[ScopeLimits]) -> Settle {
    let scopes = scopes.iter().map(|scope| ScopeLimits { concurrency: None, ..scope.clone() }).collect();
    Settle { id: Uuid::now_v7(), actual, scopes, slot: None, usage: None }
}

fn minus(a: &Cost, b: &Cost) -> Cost {
    Cost::new(Kind::ALL.map(|kind| a.get(kind).saturating_sub(b.get(kind))))
}

#[cfg(test)]
mod tests;
