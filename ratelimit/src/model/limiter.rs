//! The contract that every store and every layer keeps.

use std::future::Future;
use std::time::Duration;

use crate::model::call::{Acquire, Candidate, Charge, Decision, Renewal, Settle, Settled};
use crate::model::data_set::DataSetsLost;
use crate::model::error::Error;
use crate::model::id::{OwnerId, ReservationId};
use crate::model::key::Key;
use crate::model::limits::{LimitState, ScopeLimits};
use crate::model::usage::UsageLines;

/// The contract; see the crate documentation. Futures may be dropped at any await: an acquire whose caller is
/// gone must be cancelled by its id.
pub trait Limiter: Send + Sync {
    /// Tells when the store has lost all it knew, leases included, where it can tell.
    fn data_sets_lost(&self) -> Option<DataSetsLost> {
        None
    }
    /// Decides every limit and takes a slot, in one atomic call.
    fn acquire(&self, call: &Acquire) -> impl Future<Output = Result<Decision, Error>> + Send;
    /// Moves a reservation's slot: releases `from` (if any) and takes the first free candidate. Used by retries.
    /// `None` when every candidate is full; then `from` is released all the same.
    fn move_slot(
        &self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
    ) -> impl Future<Output = Result<Option<usize>, Error>> + Send;
    /// Applies `actual - reserved` and frees every lease. Idempotent.
    fn settle(&self, call: &Settle) -> impl Future<Output = Result<Settled, Error>> + Send;
    /// Extends leases that still exist; returns the ids that have lost at least one.
    fn renew(
        &self,
        renewals: &[Renewal],
        lease_ttl: Duration,
    ) -> impl Future<Output = Result<Vec<ReservationId>, Error>> + Send;
    /// Frees leases without settling.
    fn release(&self, id: ReservationId, leases: &[Key]) -> impl Future<Output = Result<(), Error>> + Send;
    /// Frees every lease that a process which is gone took in these sets, at most
    /// [`crate::model::call::ORPHAN_SETS_MAX`]; returns how many. `None` when it is a member: then nothing is freed.
    /// Idempotent. A process that lives all the same finds its leases lost, and may take them again.
    fn free_orphans(
        &self,
        owner: OwnerId,
        leases: &[Key],
    ) -> impl Future<Output = Result<Option<u64>, Error>> + Send;
    /// Decides and charges for good, in one atomic call. One limit per charge in the answer, whose `scope` is the
    /// charge's index. A call of unknown outcome may have charged.
    fn charge(&self, charges: &[Charge]) -> impl Future<Output = Result<Decision, Error>> + Send;
    /// How every limit stands now; reads only.
    fn peek(&self, scopes: &[ScopeLimits]) -> impl Future<Output = Result<Vec<LimitState>, Error>> + Send;
    /// What was used, per record of [`Key::usage`] in the order given; one without lines was never written or has
    /// expired. At most [`crate::model::usage::USAGE_RECORDS_MAX`] records; reads only.
    fn usage(&self, records: &[Key]) -> impl Future<Output = Result<Vec<UsageLines>, Error>> + Send;
}
