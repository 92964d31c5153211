//! Each call as one script call: all of its keys share a hash slot, or there is one server.

use std::time::Duration;

use tokio::sync::oneshot;

use super::batch::{Ask, End, MaybeOwned};
use super::client::is_one_slot;
use super::coalesce::{Entered, Reply};
use super::limiter::RedisLimiter;
use super::reply::{self, Reader};
use super::script::{self, ms, us};
use crate::model::call::{Acquire, Candidate, Charge, Decision, Renewal, Settle, Settled};
use crate::model::checks::RESERVATION_LIFE;
use crate::model::error::Error;
use crate::model::id::{OwnerId, ReservationId};
use crate::model::key::Key;
use crate::model::limits::{LimitState, ScopeLimits};
use crate::model::usage::UsageLines;

/// Renewals per script call. A longer list is split, so that no call blocks the server for long.
const RENEWALS_PER_CALL: usize = 256;

impl RedisLimiter {
    pub(super) async fn acquire_raw(
        &self,
        call: &Acquire,
        reservation: &Key,
        life: Duration,
    ) -> Result<Vec<i64>, Error> {
        let ask =
            Ask { call: MaybeOwned::Borrowed(call), reservation: MaybeOwned::Borrowed(reservation), life };
        if !self.coalesce {
            return self.client.acquire_many(&[ask]).await;
        }
        let alike = self.acquires.alike(&ask.alike());
        match self.acquires.enter(alike, call.id, || ask.to_owned_call()) {
            Entered::Now(_ticket) => self.client.acquire_many(&[ask]).await,
            Entered::Later(reply) => self.later(reply).await,
        }
    }

    pub(super) async fn settle_one_slot(
        &self,
        call: &Settle,
        reservation: &Key,
        life: Duration,
    ) -> Result<Settled, Error> {
        let end =
            End { call: MaybeOwned::Borrowed(call), reservation: MaybeOwned::Borrowed(reservation), life };
        let reply = if self.coalesce {
            let alike = self.settles.alike(&end.alike());
            match self.settles.enter(alike, call.id, || end.to_owned_call()) {
                Entered::Now(_ticket) => self.client.settle_many(&[end]).await?,
                Entered::Later(reply) => self.later(reply).await?,
            }
        } else {
            self.client.settle_many(&[end]).await?
        };
        Reader::new(&reply).settled(&call.scopes)
    }

    /// Waits for the reply to a call that stands in a queue.
    async fn later(&self, reply: oneshot::Receiver<Reply>) -> Reply {
        match self.client.silence.within(reply).await {
            Some(reply) => reply.unwrap_or(Err(Error::Lost)),
            None => Err(self.client.late()),
        }
    }

    pub(super) async fn move_one_slot(
        &self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
    ) -> Result<Option<usize>, Error> {
        let keys: Vec<&Key> = candidates.iter().map(|candidate| &candidate.leases).chain(from).collect();
        if keys.is_empty() {
            return Ok(None);
        }
        let mut args = script::Args::default();
        args.int(us(lease_ttl)).int(candidates.len() as u64);
        for candidate in candidates {
            args.number(f64::from(candidate.max_concurrency));
        }
        args.id(id);
        let reply = self.client.run(&script::MOVE_SLOT, &keys, &args).await?;
        Reader::new(&reply).index(candidates.len())
    }

    pub(super) async fn renew_one_slot(
        &self,
        renewals: &[Renewal],
        lease_ttl: Duration,
    ) -> Result<Vec<ReservationId>, Error> {
        let mut lost = Vec::new();
        for batch in renewals.chunks(RENEWALS_PER_CALL) {
            let records: Vec<_> =
                batch.iter().map(|renewal| Key::reservations_near(&renewal.leases, renewal.id)).collect();
            let mut keys = Vec::new();
            let mut args = script::Args::default();
            args.int(us(lease_ttl)).int(batch.len() as u64).text(ms(RESERVATION_LIFE));
            for (renewal, records) in batch.iter().zip(&records) {
                keys.extend(renewal.leases.iter().chain(records));
                args.int(renewal.leases.len() as u64).int(records.len() as u64).id(renewal.id);
            }
            let reply = self.client.run(&script::RENEW, &keys, &args).await?;
            lost.extend(
                batch.iter().zip(reply).filter(|(_, gone)| *gone != 0).map(|(renewal, _)| renewal.id),
            );
        }
        Ok(lost)
    }

    pub(super) async fn release_one_slot(&self, id: ReservationId, leases: &[Key]) -> Result<(), Error> {
        let keys: Vec<&Key> = leases.iter().collect();
        let mut args = script::Args::default();
        args.id(id);
        self.client.run(&script::RELEASE, &keys, &args).await.map(drop)
    }

    /// Frees orphans, after a check of the membership set if its key is given. `None` if the owner is a member.
    pub(super) async fn free_orphans_one_slot(
        &self,
        owner: OwnerId,
        members: Option<&Key>,
        leases: &[Key],
    ) -> Result<Option<u64>, Error> {
        let keys: Vec<&Key> = members.into_iter().chain(leases).collect();
        let mut args = script::Args::default();
        args.word(&owner.id_suffix());
        match members {
            Some(_) => args.id(owner.membership_entry()),
            None => args.word(""),
        };
        let reply = self.client.run(&script::FREE_ORPHANS, &keys, &args).await?;
        let freed = reply.first().ok_or_else(reply::malformed)?;
        Ok(u64::try_from(*freed).ok())
    }

    pub(super) async fn charge_one_slot(&self, charges: &[Charge]) -> Result<Decision, Error> {
        let keys: Vec<&Key> = charges.iter().map(|charge| &charge.record).collect();
        let mut args = script::Args::default();
        args.int(charges.len() as u64);
        for charge in charges {
            args.charge(charge);
        }
        let reply = self.client.run(&script::CHARGE, &keys, &args).await?;
        Reader::new(&reply).charged(charges)
    }

    pub(super) async fn peek_one_slot(&self, scopes: &[ScopeLimits]) -> Result<Vec<LimitState>, Error> {
        let keys: Vec<&Key> =
            scopes.iter().map(|s| &s.record).chain(scopes.iter().map(|s| &s.leases)).collect();
        let mut args = script::Args::default();
        args.int(scopes.len() as u64);
        for scope in scopes {
            args.concurrency(scope).buckets(scope);
        }
        let reply = self.client.run(&script::PEEK, &keys, &args).await?;
        Reader::new(&reply).peeked(scopes)
    }

    pub(super) async fn usage_one_slot(&self, records: &[Key]) -> Result<Vec<UsageLines>, Error> {
        let keys: Vec<&Key> = records.iter().collect();
        let reply = self.client.report(&script::USAGE, &keys).await?;
        Reader::new(&reply).usage(records.len())
    }

    /// Whether a call over these keys must be split.
    pub(super) fn splits<'a>(&self, keys: impl Iterator<Item = &'a Key>) -> bool {
        self.client.is_cluster && !is_one_slot(keys)
    }
}
