//! Where the attempts of a request get their slots: by themselves, or with a reservation at a provider's account.

use weir_ratelimit::waiting::QueueId;
use weir_ratelimit::{Acquire, Decision, Error, Outcome};

use crate::limits::account_groups::CandidateGroups;
use crate::limits::ledger::LEASE_TTL;
use crate::limits::reservation::{Asked, Reservation};
use crate::limits::slot_lease::NewSlot;
use crate::routing::balance::Candidate;
use crate::routing::entries::ModelEntry;

/// A backend whose slot was taken, and what was reserved at its account, if that is limited.
pub(super) struct Taken {
    pub(super) index: usize,
    pub(super) account: Option<Box<Reservation>>,
}

/// What a slot was taken with: it is given back with this value.
pub(super) enum SlotHold {
    /// By itself, for the request's own reservation.
    Slot(NewSlot),
    /// With a reservation at the account of its backend.
    Account(Box<Reservation>),
}

/// Asks for a slot once around, group by group of one account each: where that is limited by a reservation there, else by
/// a slot of the request's own reservation.
pub(super) async fn ask(
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

/// What the limiter is given, in order of preference, in as many calls as it takes.
pub(super) fn limiter_candidates(
    model: &ModelEntry,
    candidates: &[Candidate],
) -> Vec<weir_ratelimit::Candidate> {
    let for_limiter = |candidate: &Candidate| weir_ratelimit::Candidate {
        leases: model.backends[candidate.index].entry.slots.clone(),
        max_concurrency: candidate.slots,
        bound: candidate.bound,
    };
    candidates.iter().map(for_limiter).collect()
}
