//! The limiter in Redis and its calls. A call over several hash slots is split.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use tokio::task::JoinHandle;

use super::batch::{Ask, End, coalescer};
use super::client::Client;
use super::coalesce::Coalescer;
use super::connection::Connection;
use super::options::{CONNECT_TIMEOUT, RedisOptions};
use super::prolonged::ProlongedSets;
use super::recent_refusals::RecentRefusals;
use super::reply::Reader;
use super::silence::Silence;
use super::topology::Source;
use crate::model::call::{Acquire, Candidate, Charge, Decision, Renewal, Settle, Settled};
use crate::model::checks::{self, RESERVATION_LIFE, TOMBSTONE_LIFE};
use crate::model::data_set::{DataSet, DataSetsLost};
use crate::model::error::Error;
use crate::model::id::{OwnerId, ReservationId};
use crate::model::key::Key;
use crate::model::limiter::Limiter;
use crate::model::limits::{LimitState, ScopeLimits};
use crate::model::usage::UsageLines;

/// How many times the longest silence one call may wait while others are answered.
const CALL_SILENCES_MAX: u32 = 3;

/// Limits that are shared through Redis: one server, a primary behind Sentinels, or a Cluster.
pub struct RedisLimiter {
    pub(super) client: Arc<Client>,
    pub(super) acquires: Arc<Coalescer<Ask<'static>>>,
    pub(super) settles: Arc<Coalescer<End<'static>>>,
    pub(super) coalesce: bool,
    pub(super) recent_refusals: RecentRefusals,
    monitor: JoinHandle<()>,
}

impl RedisLimiter {
    /// Connects and checks that the server answers.
    pub async fn connect(url: &str, options: RedisOptions) -> Result<Self, Error> {
        let limiter = Self::open(url, options)?;
        tokio::time::timeout(CONNECT_TIMEOUT, limiter.client.connections[0].connected())
            .await
            .map_err(|_| Error::Timeout(CONNECT_TIMEOUT))??;
        Ok(limiter)
    }

    /// Starts connecting in the background; calls fail until a connection is there. Needs a tokio runtime.
    ///
    /// Addresses: `redis://[user:password@]host[:port][/db]`,
    /// `redis+sentinel://[user:password@]host[:port],.../service[/db]`,
    /// `redis+cluster://[user:password@]host[:port],...`; the same with `rediss` for TLS.
    pub fn open(url: &str, options: RedisOptions) -> Result<Self, Error> {
        let connections = options.connections.max(1);
        let source = Source::parse(url, CONNECT_TIMEOUT)?;
        // The shards of a Cluster are silent each for itself, so that the answers of others say nothing about a call.
        let call_max = options.silence * if source.is_cluster() { 1 } else { CALL_SILENCES_MAX };
        let silence = Silence::new(options.silence, call_max);
        let monitor = tokio::spawn({
            let silence = silence.clone();
            async move { silence.run().await }
        });
        let data_set = Arc::new(DataSet::default());
        let connect =
            |_| Connection::start(source.clone(), options.cold_start, data_set.clone(), silence.clone());
        let client = Arc::new(Client {
            silence: silence.clone(),
            is_cluster: source.is_cluster(),
            connections: (0..connections).map(connect).collect(),
            data_set: data_set.clone(),
            source: source.clone(),
            next: AtomicUsize::new(0),
            prolonged: ProlongedSets::default(),
        });
        let (acquires, settles) = (coalescer(&client), coalescer(&client));
        Ok(Self {
            client,
            acquires,
            settles,
            coalesce: options.coalesce,
            recent_refusals: RecentRefusals::default(),
            monitor,
        })
    }

    /// Admissions and settlements that shared a script call with others.
    pub fn coalesced_calls(&self) -> u64 {
        self.acquires.coalesced() + self.settles.coalesced()
    }
}

impl Drop for RedisLimiter {
    fn drop(&mut self) {
        self.monitor.abort();
    }
}

impl fmt::Debug for RedisLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisLimiter")
            .field("connections", &self.client.connections.len())
            .field("silence", &self.client.silence.longest())
            .finish_non_exhaustive()
    }
}

impl Limiter for RedisLimiter {
    fn data_sets_lost(&self) -> Option<DataSetsLost> {
        Some(self.client.data_set.lost())
    }

    async fn acquire(&self, call: &Acquire) -> Result<Decision, Error> {
        checks::check_acquire(call)?;
        let reservation = Key::reservation_of(&call.scopes, call.id);
        let scopes = call.scopes.iter().map(|scope| &scope.record);
        let candidates = call.candidates.iter().map(|candidate| &candidate.leases);
        if self.splits(std::iter::once(&reservation).chain(scopes).chain(candidates)) {
            return self.acquire_split(call).await;
        }
        let reply = self.acquire_raw(call, &reservation, RESERVATION_LIFE).await?;
        Reader::new(&reply).decision(&call.scopes)
    }

    async fn move_slot(
        &self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
    ) -> Result<Option<usize>, Error> {
        checks::check_move(candidates, lease_ttl)?;
        if self.splits(candidates.iter().map(|candidate| &candidate.leases).chain(from)) {
            return self.move_split(id, from, candidates, lease_ttl).await;
        }
        self.move_one_slot(id, from, candidates, lease_ttl).await
    }

    async fn settle(&self, call: &Settle) -> Result<Settled, Error> {
        checks::check_scopes(&call.scopes)?;
        let reservation = Key::reservation_of(&call.scopes, call.id);
        let scopes = call.scopes.iter().map(|scope| &scope.record);
        let usage = call.usage.as_ref().map(|usage| &usage.record);
        if self.splits(std::iter::once(&reservation).chain(scopes).chain(&call.slot).chain(usage)) {
            return self.settle_split(call).await;
        }
        self.settle_one_slot(call, &reservation, TOMBSTONE_LIFE).await
    }

    async fn renew(&self, renewals: &[Renewal], lease_ttl: Duration) -> Result<Vec<ReservationId>, Error> {
        checks::check_lease(lease_ttl)?;
        if self.splits(renewals.iter().flat_map(|renewal| &renewal.leases)) {
            return self.renew_split(renewals, lease_ttl).await;
        }
        self.renew_one_slot(renewals, lease_ttl).await
    }

    async fn release(&self, id: ReservationId, leases: &[Key]) -> Result<(), Error> {
        if leases.is_empty() {
            return Ok(());
        }
        if self.splits(leases.iter()) {
            return self.release_split(id, leases).await;
        }
        self.release_one_slot(id, leases).await
    }

    async fn free_orphans(&self, owner: OwnerId, leases: &[Key]) -> Result<Option<u64>, Error> {
        checks::check_orphans(leases)?;
        let members = Key::membership();
        if self.splits(std::iter::once(&members).chain(leases)) {
            return self.free_orphans_split(owner, &members, leases).await;
        }
        self.free_orphans_one_slot(owner, Some(&members), leases).await
    }

    async fn charge(&self, charges: &[Charge]) -> Result<Decision, Error> {
        checks::check_charges(charges)?;
        if self.splits(charges.iter().map(|charge| &charge.record)) {
            return self.charge_split(charges).await;
        }
        self.charge_one_slot(charges).await
    }

    async fn peek(&self, scopes: &[ScopeLimits]) -> Result<Vec<LimitState>, Error> {
        checks::check_scopes(scopes)?;
        if self.splits(scopes.iter().map(|scope| &scope.record)) {
            return self.peek_split(scopes).await;
        }
        self.peek_one_slot(scopes).await
    }

    async fn usage(&self, records: &[Key]) -> Result<Vec<UsageLines>, Error> {
        checks::check_usage(records)?;
        if self.splits(records.iter()) {
            return self.usage_split(records).await;
        }
        self.usage_one_slot(records).await
    }
}
