//! One script call each: all keys share a slot, or there is but one server.

use std::hash::Hash;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::merge::{Entered, Merge, Reply};
use super::reply::Reader;
use super::{Inner, RedisLimiter, script};
use crate::call::{self, RESERVATION_LIFE};
use crate::usage::{OTHER_MODELS, USAGE_LIFE, USAGE_MODELS_MAX};
use crate::{
    Acquire, Candidate, Charge, Decision, Error, Holder, Key, Kind, LimitState, Renewal, ReservationId,
    ScopeLimits, Settle, Settled, Trouble, UsageLines,
};

/// Renewals in one script call; a longer list is cut so that no call holds the server for long.
const RENEWALS_PER_CALL: usize = 256;

/// What a caller lends, or what has to wait without its caller. Small, since futures hold it.
pub(super) enum Held<'a, T> {
    Lent(&'a T),
    Own(Box<T>),
}

impl<T> Deref for Held<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match self {
            Held::Lent(lent) => lent,
            Held::Own(own) => own,
        }
    }
}

/// An admission and where its reservation is kept.
pub(super) struct Ask<'a> {
    call: Held<'a, Acquire>,
    reservation: Held<'a, Key>,
    life: Duration,
}

/// A settlement and where its reservation is kept.
pub(super) struct End<'a> {
    call: Held<'a, Settle>,
    reservation: Held<'a, Key>,
    life: Duration,
}

impl<'a> Ask<'a> {
    pub(super) fn merge(inner: &Arc<Inner>) -> Arc<Merge<Ask<'static>>> {
        let inner = inner.clone();
        Merge::new(move |asks: Vec<Ask<'static>>| {
            let inner = inner.clone();
            Box::pin(async move {
                let replies = inner.acquire_many(&asks).await;
                match apart(replies, asks.len()) {
                    Some(replies) => replies,
                    None => {
                        let mut replies = Vec::with_capacity(asks.len());
                        for ask in &asks {
                            replies.push(inner.acquire_many(std::slice::from_ref(ask)).await);
                        }
                        replies
                    }
                }
            })
        })
    }

    /// What calls must share to be decided by one script call. Scopes that share a slot do so with their reservations;
    /// of a call without scopes it is that of the candidates, which one call has one of on a Cluster.
    fn alike(&self) -> impl Hash + '_ {
        let place = self.call.candidates.first().filter(|_| self.call.scopes.is_empty());
        let place = place.map(|c| c.leases.as_str());
        (Under(&self.call.scopes), self.call.lease_ttl, self.life, self.reservation.tag(), place)
    }

    fn to_own(&self) -> Ask<'static> {
        let (call, reservation) = (Box::new((*self.call).clone()), Box::new((*self.reservation).clone()));
        Ask { call: Held::Own(call), reservation: Held::Own(reservation), life: self.life }
    }
}

impl<'a> End<'a> {
    pub(super) fn merge(inner: &Arc<Inner>) -> Arc<Merge<End<'static>>> {
        let inner = inner.clone();
        Merge::new(move |ends: Vec<End<'static>>| {
            let inner = inner.clone();
            Box::pin(async move {
                let replies = inner.settle_many(&ends).await;
                match apart(replies, ends.len()) {
                    Some(replies) => replies,
                    None => {
                        let mut replies = Vec::with_capacity(ends.len());
                        for end in &ends {
                            replies.push(inner.settle_many(std::slice::from_ref(end)).await);
                        }
                        replies
                    }
                }
            })
        })
    }

    /// See [`Ask::alike`]; and they note usage in one line, or none.
    fn alike(&self) -> impl Hash + '_ {
        let place = self.call.slot.as_ref().filter(|_| self.call.scopes.is_empty());
        let usage = self.call.usage.as_ref().map(|usage| (usage.record.as_str(), &*usage.model));
        (Under(&self.call.scopes), self.life, self.reservation.tag(), place.map(Key::as_str), usage)
    }

    fn to_own(&self) -> End<'static> {
        let (call, reservation) = (Box::new((*self.call).clone()), Box::new((*self.reservation).clone()));
        End { call: Held::Own(call), reservation: Held::Own(reservation), life: self.life }
    }
}

/// The replies of a batch, each for itself; all the same length, since all are under the same limits. `None` when each
/// call has to be asked for itself: one of them may have failed all.
fn apart(replies: Result<Vec<i64>, Error>, calls: usize) -> Option<Vec<Reply>> {
    match replies {
        Ok(numbers) => {
            let each = numbers.len() / calls.max(1);
            Some(numbers.chunks(each.max(1)).map(|reply| Ok(reply.to_vec())).collect())
        }
        Err(error) if calls > 1 && error.trouble() == Trouble::Keys => None,
        Err(error) => Some(vec![Err(error); calls]),
    }
}

/// Limits as far as scripts are told of them.
struct Under<'a>(&'a [ScopeLimits]);

impl Hash for Under<'_> {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        for scope in self.0 {
            (scope.record.as_str(), scope.leases.as_str(), scope.concurrency).hash(state);
            (scope.mode == crate::Mode::Shadow).hash(state);
            for bucket in &scope.buckets {
                bucket.map(|b| (b.capacity, b.rate, b.period)).hash(state);
            }
        }
        self.0.len().hash(state);
    }
}

/// Places of keys in a list without repetition, from one.
#[derive(Default)]
struct Places<'a>(Vec<&'a Key>);

impl<'a> Places<'a> {
    fn of(&mut self, key: &'a Key) -> u64 {
        let known = self.0.iter().position(|other| *other == key);
        let at = known.unwrap_or_else(|| {
            self.0.push(key);
            self.0.len() - 1
        });
        at as u64 + 1
    }
}

impl Inner {
    async fn acquire_many(&self, asks: &[Ask<'_>]) -> Result<Vec<i64>, Error> {
        let Some(first) = asks.first() else { return Ok(Vec::new()) };
        let (scopes, lease_ttl) = (&first.call.scopes, first.call.lease_ttl);
        let mut places = Places::default();
        for candidate in asks.iter().flat_map(|ask| &ask.call.candidates) {
            places.of(&candidate.leases);
        }
        let mut keys: Vec<&Key> = scopes.iter().map(|scope| &scope.record).collect();
        keys.extend(asks.iter().map(|ask| &*ask.reservation));
        keys.extend(scopes.iter().map(|scope| &scope.leases));
        keys.extend(&places.0);

        let (asked, mut touched) = (Instant::now(), Vec::new());
        let mut touch = |key| {
            let due = self.touched.is_due(key, lease_ttl);
            if due {
                touched.push(key);
            }
            due
        };
        let mut args = script::Args::default();
        args.int(us(lease_ttl)).int(scopes.len() as u64).int(places.0.len() as u64).int(asks.len() as u64);
        for scope in scopes {
            let due = scope.concurrency.is_some() && touch(&scope.leases);
            args.flag(scope.mode == crate::Mode::Shadow).concurrency(scope).flag(due).buckets(scope);
        }
        for key in &places.0 {
            args.flag(touch(key));
        }
        args.text(ms(first.life));
        for Ask { call, .. } in asks {
            for (kind, bucket) in buckets(scopes) {
                args.number(call::reserved(call)(kind, bucket));
            }
            args.int(call.candidates.len() as u64);
            for candidate in &call.candidates {
                args.int(places.of(&candidate.leases)).number(f64::from(candidate.max_concurrency));
                args.int(candidate.bound.map_or(0, |bound| u64::from(bound.millionths)));
            }
            args.id(call.id);
        }
        let reply = self.run(&script::ACQUIRE, &keys, &args).await?;
        if !touched.is_empty() && !first.life.is_zero() {
            // Only sets that a lease was taken in were prolonged.
            for (ask, reply) in asks.iter().zip(reply.chunks((reply.len() / asks.len()).max(1))) {
                let [0, slot, ..] = reply else { continue };
                let slot = usize::try_from(*slot).ok().and_then(|at| ask.call.candidates.get(at));
                let taken = scopes.iter().map(|scope| &scope.leases).chain(slot.map(|slot| &slot.leases));
                for key in taken.filter(|key| touched.contains(key)) {
                    self.touched.done(key, asked);
                }
            }
        }
        Ok(reply)
    }

    async fn settle_many(&self, ends: &[End<'_>]) -> Result<Vec<i64>, Error> {
        let Some(first) = ends.first() else { return Ok(Vec::new()) };
        let scopes = &first.call.scopes;
        let mut places = Places::default();
        for slot in ends.iter().flat_map(|end| &end.call.slot) {
            places.of(slot);
        }
        let mut keys: Vec<&Key> = scopes.iter().map(|scope| &scope.record).collect();
        keys.extend(ends.iter().map(|end| &*end.reservation));
        keys.extend(scopes.iter().map(|scope| &scope.leases));
        keys.extend(&places.0);
        let usage = first.call.usage.as_ref();
        keys.extend(usage.map(|usage| &usage.record));
        let mut args = script::Args::default();
        args.int(scopes.len() as u64).int(places.0.len() as u64).int(ends.len() as u64);
        args.int(usage.map_or(0, |_| USAGE_MODELS_MAX as u64));
        for scope in scopes {
            args.concurrency(scope).buckets(scope);
        }
        args.text(ms(first.life));
        for End { call, .. } in ends {
            for (kind, bucket) in buckets(scopes) {
                args.number(call::spent(&call.actual)(kind, bucket));
            }
            args.int(call.slot.as_ref().map_or(0, |slot| places.of(slot))).id(call.id);
            if let Some(usage) = &call.usage {
                for amount in usage.tally.to_array() {
                    args.number(amount as f64);
                }
            }
        }
        if let Some(usage) = usage {
            args.word(&usage.model).word(OTHER_MODELS).text(ms(USAGE_LIFE));
        }
        self.run(&script::SETTLE, &keys, &args).await
    }
}

/// Every bucket in the order of the scripts.
fn buckets(scopes: &[ScopeLimits]) -> impl Iterator<Item = (Kind, &crate::Bucket)> {
    scopes.iter().flat_map(|scope| {
        Kind::ALL.into_iter().filter_map(|kind| Some((kind, scope.buckets[kind as usize].as_ref()?)))
    })
}

impl RedisLimiter {
    pub(super) async fn acquire_raw(
        &self,
        call: &Acquire,
        reservation: &Key,
        life: Duration,
    ) -> Result<Vec<i64>, Error> {
        let ask = Ask { call: Held::Lent(call), reservation: Held::Lent(reservation), life };
        if !self.merge {
            return self.inner.acquire_many(&[ask]).await;
        }
        let alike = self.acquires.alike(&ask.alike());
        match self.acquires.enter(alike, call.id, || ask.to_own()) {
            Entered::Now(_ticket) => self.inner.acquire_many(&[ask]).await,
            Entered::Later(reply) => self.later(reply).await,
        }
    }

    pub(super) async fn settle_whole(
        &self,
        call: &Settle,
        reservation: &Key,
        life: Duration,
    ) -> Result<Settled, Error> {
        let end = End { call: Held::Lent(call), reservation: Held::Lent(reservation), life };
        let reply = if self.merge {
            let alike = self.settles.alike(&end.alike());
            match self.settles.enter(alike, call.id, || end.to_own()) {
                Entered::Now(_ticket) => self.inner.settle_many(&[end]).await?,
                Entered::Later(reply) => self.later(reply).await?,
            }
        } else {
            self.inner.settle_many(&[end]).await?
        };
        Reader::new(&reply).settled(&call.scopes)
    }

    /// The reply to a call that stands behind others; its deadline includes that.
    async fn later(&self, reply: tokio::sync::oneshot::Receiver<Reply>) -> Reply {
        match self.inner.in_time(reply).await {
            Some(reply) => reply.unwrap_or(Err(Error::Lost)),
            None => Err(Error::Timeout(self.inner.deadline)),
        }
    }

    pub(super) async fn move_whole(
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
        let reply = self.inner.run(&script::MOVE_SLOT, &keys, &args).await?;
        Reader::new(&reply).index(candidates.len())
    }

    pub(super) async fn renew_whole(
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
            let reply = self.inner.run(&script::RENEW, &keys, &args).await?;
            lost.extend(
                batch.iter().zip(reply).filter(|(_, gone)| *gone != 0).map(|(renewal, _)| renewal.id),
            );
        }
        Ok(lost)
    }

    pub(super) async fn release_whole(&self, id: ReservationId, leases: &[Key]) -> Result<(), Error> {
        let keys: Vec<&Key> = leases.iter().collect();
        let mut args = script::Args::default();
        args.id(id);
        self.inner.run(&script::RELEASE, &keys, &args).await.map(drop)
    }

    /// With the roll among the keys or without it; `None` when the holder is on it.
    pub(super) async fn reap_whole(
        &self,
        holder: Holder,
        roll: Option<&Key>,
        leases: &[Key],
    ) -> Result<Option<u64>, Error> {
        let keys: Vec<&Key> = roll.into_iter().chain(leases).collect();
        let mut args = script::Args::default();
        args.word(&holder.mark());
        match roll {
            Some(_) => args.id(holder.on_roll()),
            None => args.word(""),
        };
        let reply = self.inner.run(&script::REAP, &keys, &args).await?;
        let freed = reply.first().ok_or_else(super::reply::malformed)?;
        Ok(u64::try_from(*freed).ok())
    }

    pub(super) async fn charge_whole(&self, charges: &[Charge]) -> Result<Decision, Error> {
        let keys: Vec<&Key> = charges.iter().map(|charge| &charge.record).collect();
        let mut args = script::Args::default();
        args.int(charges.len() as u64);
        for charge in charges {
            args.charge(charge);
        }
        let reply = self.inner.run(&script::CHARGE, &keys, &args).await?;
        Reader::new(&reply).charged(charges)
    }

    pub(super) async fn peek_whole(&self, scopes: &[ScopeLimits]) -> Result<Vec<LimitState>, Error> {
        let keys: Vec<&Key> =
            scopes.iter().map(|s| &s.record).chain(scopes.iter().map(|s| &s.leases)).collect();
        let mut args = script::Args::default();
        args.int(scopes.len() as u64);
        for scope in scopes {
            args.concurrency(scope).buckets(scope);
        }
        let reply = self.inner.run(&script::PEEK, &keys, &args).await?;
        Reader::new(&reply).peeked(scopes)
    }

    pub(super) async fn usage_whole(&self, records: &[Key]) -> Result<Vec<UsageLines>, Error> {
        let keys: Vec<&Key> = records.iter().collect();
        let reply = self.inner.run(&script::USAGE, &keys, &script::Args::default()).await?;
        Reader::new(&reply).usage(records.len())
    }

    /// Whether a call over these keys has to be split.
    pub(super) fn splits<'a>(&self, keys: impl Iterator<Item = &'a Key>) -> bool {
        self.inner.is_cluster && !super::split::is_whole(keys)
    }
}

fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
