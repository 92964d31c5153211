//! The calls of the limiter's contract, decided by the store or locally.

use std::sync::atomic::Ordering;
use std::time::Duration;

use smallvec::smallvec;

use super::breaker::Phase;
use super::handle::Fallback;
use super::inner::{lock, no_room, not_sent, waits};
use super::local::{Pending, leases_of};
use crate::model::call::{Acquire, Candidate, Charge, Decision, Renewal, Settle, Settled};
use crate::model::error::{Error, Trouble};
use crate::model::id::{OwnerId, ReservationId};
use crate::model::key::Key;
use crate::model::limiter::Limiter;
use crate::model::limits::{LimitState, ScopeLimits};
use crate::model::usage::UsageLines;

impl<L: Limiter + 'static> Limiter for Fallback<L> {
    async fn acquire(&self, call: &Acquire) -> Result<Decision, Error> {
        let inner = &self.inner;
        inner.hear_of_loss();
        if inner.joins(call) {
            return inner.join(call).await;
        }
        if !inner.is_asked() {
            let error = lock(&inner.reason).0.clone();
            return inner.decide(call, not_sent(error));
        }
        let lost_sets = inner.lost_sets();
        match inner.ask(call.scopes.first(), || inner.store.acquire(call)).await {
            // The answer is from a data set without the leases in flight. Its grant is undone or taken over later.
            Ok(_) if inner.lost_sets() != lost_sets => {
                inner.hear_of_loss();
                inner.decide(call, Error::Lost)
            }
            Ok(decision) => {
                inner.note(call, &decision);
                Ok(decision)
            }
            Err(error) if error.trouble() == Trouble::Caller => Err(error),
            Err(error) => inner.decide(call, error),
        }
    }

    async fn move_slot(
        &self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
    ) -> Result<Option<usize>, Error> {
        let inner = &self.inner;
        let sharing = inner.sharing();
        if inner.engaged.load(Ordering::Relaxed) {
            let mut local = inner.local();
            if local.grant(id).is_some() {
                return local.place(id, from, candidates, lease_ttl, sharing);
            }
        }
        let mut unknown = false;
        if inner.is_asked() {
            let moved = if inner.is(Phase::Joining) {
                inner.join_slot(id, from, candidates, lease_ttl).await
            } else {
                inner.ask(None, || inner.store.move_slot(id, from, candidates, lease_ttl)).await
            };
            match moved {
                Ok(moved) => {
                    inner.answered();
                    let slot = moved.and_then(|at| candidates.get(at)).map(|c| c.leases.clone());
                    inner.store_leases.moved(id, from, slot, lease_ttl);
                    return Ok(moved);
                }
                Err(error) if error.trouble() == Trouble::Caller => return Err(error),
                Err(error) => unknown = error.trouble() == Trouble::Unknown,
            }
        }
        let mut local = inner.local();
        if let Some(from) = from {
            inner.defer(&mut local, Pending::Release(id, smallvec![from.clone()]));
            inner.store_leases.forget(id, std::slice::from_ref(from));
        }
        let placed = local.place(id, from, candidates, lease_ttl, sharing)?;
        if unknown {
            // The store may have given another one.
            let others = candidates.iter().enumerate().filter(|(at, _)| Some(*at) != placed);
            local.release_all(id, others.map(|(_, candidate)| candidate));
        }
        Ok(placed)
    }

    async fn settle(&self, call: &Settle) -> Result<Settled, Error> {
        let inner = &self.inner;
        // Before the settlement is sent, so that local decisions that start meanwhile do not take over leases that
        // are being released.
        inner.store_leases.end(call.id);
        if inner.engaged.load(Ordering::Relaxed) {
            let mut local = inner.local();
            if let Some(settled) = local.settle(call, inner.sharing()) {
                if settled.is_ok() && !call.usage.iter().all(|usage| local.note_usage(usage)) {
                    inner.lost.fetch_add(1, Ordering::Relaxed);
                }
                return settled;
            }
            local.forget_held(call.id, &leases_of(call));
        }
        let mut unknown = false;
        if inner.is_asked() {
            let mut settled = inner.store.settle(call).await;
            if matches!(settled, Err(Error::Lost)) {
                unknown = true;
                settled = inner.store.settle(call).await;
            }
            match settled {
                Ok(settled) => {
                    inner.answered();
                    inner.last_seen.note(&call.scopes, &settled.limits, inner.now_us());
                    return Ok(settled);
                }
                Err(error) if !waits(&error) => return Err(error),
                Err(error) => {
                    unknown |= error.trouble() == Trouble::Unknown;
                    inner.failed(&error, call.scopes.first());
                }
            }
        }
        let mut local = inner.local();
        if !inner.defer(&mut local, Pending::Settle(Box::new(call.clone()))) {
            return Err(no_room());
        }
        if unknown {
            local.told(call.id, true);
        }
        inner.wake.notify_one();
        Ok(Settled { applied: false, limits: Vec::new(), now_us: 0 })
    }

    async fn renew(&self, renewals: &[Renewal], lease_ttl: Duration) -> Result<Vec<ReservationId>, Error> {
        let inner = &self.inner;
        let mut lost = Vec::new();
        let mut theirs = Vec::with_capacity(renewals.len());
        if inner.engaged.load(Ordering::Relaxed) {
            let local = inner.local();
            for renewal in renewals {
                match local.grant(renewal.id) {
                    Some(_) if !local.renew(renewal, lease_ttl) => lost.push(renewal.id),
                    Some(_) => {}
                    None => theirs.push(renewal.clone()),
                }
            }
        } else {
            theirs.extend_from_slice(renewals);
        }
        // Leases of the store cannot be renewed during an outage. They are taken again when the store is back.
        if inner.is_asked() && !theirs.is_empty() {
            match inner.store.renew(&theirs, lease_ttl).await {
                Ok(gone) => {
                    inner.answered();
                    lost.extend(gone);
                }
                Err(error) => {
                    inner.failed(&error, None);
                    return Err(error);
                }
            }
        }
        Ok(lost)
    }

    async fn release(&self, id: ReservationId, leases: &[Key]) -> Result<(), Error> {
        let inner = &self.inner;
        inner.store_leases.forget(id, leases);
        if inner.engaged.load(Ordering::Relaxed) {
            let mut local = inner.local();
            local.release(id, leases);
            if local.grant(id).is_some() {
                return Ok(());
            }
        }
        if inner.is_asked() {
            match inner.store.release(id, leases).await {
                Ok(()) => {
                    inner.answered();
                    return Ok(());
                }
                Err(error) if !waits(&error) => return Err(error),
                Err(error) => inner.failed(&error, None),
            }
        }
        let room = inner.defer(&mut inner.local(), Pending::Release(id, leases.into()));
        inner.wake.notify_one();
        if room { Ok(()) } else { Err(no_room()) }
    }

    /// Never decided locally: only the store knows which processes are members and who holds which lease.
    async fn free_orphans(&self, owner: OwnerId, leases: &[Key]) -> Result<Option<u64>, Error> {
        let inner = &self.inner;
        if !inner.is_asked() {
            return Err(not_sent(lock(&inner.reason).0.clone()));
        }
        inner.store.free_orphans(owner, leases).await
    }

    /// Never decided locally: a charge is final, and callers that charge have a policy of their own for failures.
    async fn charge(&self, charges: &[Charge]) -> Result<Decision, Error> {
        let inner = &self.inner;
        if !inner.is_asked() {
            return Err(not_sent(lock(&inner.reason).0.clone()));
        }
        let charged = inner.store.charge(charges).await;
        match &charged {
            Ok(_) => inner.answered(),
            Err(error) if error.trouble() == Trouble::Caller => {}
            Err(error) => inner.failed(error, None),
        }
        charged
    }

    async fn peek(&self, scopes: &[ScopeLimits]) -> Result<Vec<LimitState>, Error> {
        let inner = &self.inner;
        if inner.is_asked() {
            match inner.store.peek(scopes).await {
                Ok(limits) => {
                    inner.answered();
                    return Ok(limits);
                }
                Err(error) if error.trouble() == Trouble::Caller => return Err(error),
                Err(error) => inner.failed(&error, scopes.first()),
            }
        }
        let local = lock(&inner.local);
        local.peek(scopes, inner.sharing())
    }

    /// Never decided locally: only the store knows the usage of the whole cluster. Local usage is missing in it until
    /// it is reported.
    async fn usage(&self, records: &[Key]) -> Result<Vec<UsageLines>, Error> {
        let inner = &self.inner;
        if !inner.is_asked() {
            return Err(not_sent(lock(&inner.reason).0.clone()));
        }
        // A failure does not count against the store, because no request waits for this call.
        inner.store.usage(records).await
    }
}
