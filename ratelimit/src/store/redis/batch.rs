//! Several admissions, or settlements, under the same limits in one script call.

use std::collections::HashMap;
use std::hash::Hash;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::client::Client;
use super::coalesce::{Coalescer, Reply};
use super::script::{self, ms, us};
use crate::model::call::{Acquire, Settle};
use crate::model::checks;
use crate::model::error::{Error, Trouble};
use crate::model::key::Key;
use crate::model::kind::{Bucket, Kind};
use crate::model::limits::{Mode, ScopeLimits};
use crate::model::usage::{OTHER_MODELS, USAGE_LIFE, USAGE_MODELS_MAX};

/// A borrowed call, or an owned one that can wait in a queue. Futures hold it, so it is small.
pub(super) enum MaybeOwned<'a, T> {
    Borrowed(&'a T),
    Owned(Box<T>),
}

impl<T> Deref for MaybeOwned<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match self {
            MaybeOwned::Borrowed(lent) => lent,
            MaybeOwned::Owned(own) => own,
        }
    }
}

/// An admission and the key of its reservation.
pub(super) struct Ask<'a> {
    pub(super) call: MaybeOwned<'a, Acquire>,
    pub(super) reservation: MaybeOwned<'a, Key>,
    pub(super) life: Duration,
}

/// A settlement and the key of its reservation.
pub(super) struct End<'a> {
    pub(super) call: MaybeOwned<'a, Settle>,
    pub(super) reservation: MaybeOwned<'a, Key>,
    pub(super) life: Duration,
}

impl<'a> Ask<'a> {
    /// The properties that calls must share to be decided by one script call. Scopes with the same hash slot share
    /// the key of their reservations; a call without scopes has the hash slot of its candidate, of which a Cluster
    /// gets one per call.
    pub(super) fn alike(&self) -> impl Hash + '_ {
        let place = self.call.candidates.first().filter(|_| self.call.scopes.is_empty());
        let place = place.map(|c| c.leases.as_str());
        (self.call.scopes.digest(), self.call.lease_ttl, self.life, self.reservation.tag(), place)
    }

    pub(super) fn to_owned_call(&self) -> Ask<'static> {
        let (call, reservation) = (Box::new((*self.call).clone()), Box::new((*self.reservation).clone()));
        Ask { call: MaybeOwned::Owned(call), reservation: MaybeOwned::Owned(reservation), life: self.life }
    }
}

impl<'a> End<'a> {
    /// The properties that settlements must share, as in [`Ask::alike`]. They also write the same usage line, or
    /// none.
    pub(super) fn alike(&self) -> impl Hash + '_ {
        let place = self.call.slot.as_ref().filter(|_| self.call.scopes.is_empty());
        let usage = self.call.usage.as_ref().map(|usage| (usage.record.as_str(), &*usage.model));
        (self.call.scopes.digest(), self.life, self.reservation.tag(), place.map(Key::as_str), usage)
    }

    pub(super) fn to_owned_call(&self) -> End<'static> {
        let (call, reservation) = (Box::new((*self.call).clone()), Box::new((*self.reservation).clone()));
        End { call: MaybeOwned::Owned(call), reservation: MaybeOwned::Owned(reservation), life: self.life }
    }
}

/// A call that can be sent together with others under the same limits.
pub(super) trait Batched: Send + Sync + Sized + 'static {
    /// Sends these in one script call.
    fn send(client: &Client, calls: &[Self]) -> impl Future<Output = Result<Vec<i64>, Error>> + Send;
}

impl Batched for Ask<'static> {
    async fn send(client: &Client, calls: &[Self]) -> Result<Vec<i64>, Error> {
        client.acquire_many(calls).await
    }
}

impl Batched for End<'static> {
    async fn send(client: &Client, calls: &[Self]) -> Result<Vec<i64>, Error> {
        client.settle_many(calls).await
    }
}

/// Sends calls of one kind over these connections, coalesced. If one of them may have failed its whole batch, each is sent
/// alone.
pub(super) fn coalescer<C: Batched>(client: &Arc<Client>) -> Arc<Coalescer<C>> {
    let client = client.clone();
    Coalescer::new(move |calls: Vec<C>| {
        let client = client.clone();
        Box::pin(async move {
            if let Some(replies) = apart(C::send(&client, &calls).await, calls.len()) {
                return replies;
            }
            let mut replies = Vec::with_capacity(calls.len());
            for call in &calls {
                replies.push(C::send(&client, std::slice::from_ref(call)).await);
            }
            replies
        })
    })
}

/// Splits the reply to a batch into one reply per call; all have the same length, since all calls are under the same
/// limits. `None` if each call must be sent alone, because one of them may have failed the whole batch.
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

/// Keys among which one is searched faster than looked up by its hash.
const SEARCHED_MAX: usize = 16;

/// Positions of keys in a list without duplicates, counted from one.
#[derive(Default)]
struct KeyPositions<'a> {
    keys: Vec<&'a Key>,
    /// The position of each, once there are more than [`SEARCHED_MAX`].
    positions: HashMap<&'a Key, usize>,
}

impl<'a> KeyPositions<'a> {
    fn of(&mut self, key: &'a Key) -> u64 {
        let known = match self.positions.is_empty() {
            true => self.keys.iter().position(|other| *other == key),
            false => self.positions.get(key).copied(),
        };
        known.unwrap_or_else(|| self.add(key)) as u64 + 1
    }

    fn add(&mut self, key: &'a Key) -> usize {
        let at = self.keys.len();
        self.keys.push(key);
        if at == SEARCHED_MAX {
            self.positions.extend(self.keys.iter().copied().zip(0..));
        } else if at > SEARCHED_MAX {
            self.positions.insert(key, at);
        }
        at
    }
}

impl Client {
    pub(super) async fn acquire_many(&self, asks: &[Ask<'_>]) -> Result<Vec<i64>, Error> {
        let Some(first) = asks.first() else { return Ok(Vec::new()) };
        let (scopes, lease_ttl) = (&first.call.scopes, first.call.lease_ttl);
        let mut places = KeyPositions::default();
        for candidate in asks.iter().flat_map(|ask| &ask.call.candidates) {
            places.of(&candidate.leases);
        }
        let mut keys: Vec<&Key> = scopes.iter().map(|scope| &scope.record).collect();
        keys.extend(asks.iter().map(|ask| &*ask.reservation));
        keys.extend(scopes.iter().map(|scope| &scope.leases));
        keys.extend(&places.keys);

        let (asked, mut touched) = (Instant::now(), Vec::new());
        let mut touch = |key| {
            let due = self.prolonged.is_due(key, lease_ttl);
            if due {
                touched.push(key);
            }
            due
        };
        let mut args = script::Args::default();
        args.int(us(lease_ttl)).int(scopes.len() as u64).int(places.keys.len() as u64).int(asks.len() as u64);
        for scope in scopes {
            let due = scope.concurrency.is_some() && touch(&scope.leases);
            args.flag(scope.mode == Mode::Shadow).concurrency(scope).flag(due).buckets(scope);
        }
        for key in &places.keys {
            args.flag(touch(key));
        }
        args.text(ms(first.life));
        for Ask { call, .. } in asks {
            for (kind, bucket) in buckets(scopes) {
                args.number(checks::reserved(call)(kind, bucket));
            }
            args.int(call.candidates.len() as u64);
            for candidate in &call.candidates {
                args.int(places.of(&candidate.leases)).number(f64::from(candidate.max_concurrency));
                let (part, elsewhere) = candidate.bound.map_or((0, 0), |b| (b.millionths, b.elsewhere));
                args.int(u64::from(part)).int(u64::from(elsewhere));
            }
            args.id(call.id);
        }
        let reply = self.run(&script::ACQUIRE, &keys, &args).await?;
        if !touched.is_empty() && !first.life.is_zero() {
            // The script extends the expiry of a set only if it took a lease in it.
            for (ask, reply) in asks.iter().zip(reply.chunks((reply.len() / asks.len()).max(1))) {
                let [0, slot, ..] = reply else { continue };
                let slot = usize::try_from(*slot).ok().and_then(|at| ask.call.candidates.get(at));
                let taken = scopes.iter().map(|scope| &scope.leases).chain(slot.map(|slot| &slot.leases));
                for key in taken.filter(|key| touched.contains(key)) {
                    self.prolonged.done(key, asked);
                }
            }
        }
        Ok(reply)
    }

    pub(super) async fn settle_many(&self, ends: &[End<'_>]) -> Result<Vec<i64>, Error> {
        let Some(first) = ends.first() else { return Ok(Vec::new()) };
        let scopes = &first.call.scopes;
        let mut places = KeyPositions::default();
        for slot in ends.iter().flat_map(|end| &end.call.slot) {
            places.of(slot);
        }
        let mut keys: Vec<&Key> = scopes.iter().map(|scope| &scope.record).collect();
        keys.extend(ends.iter().map(|end| &*end.reservation));
        keys.extend(scopes.iter().map(|scope| &scope.leases));
        keys.extend(&places.keys);
        let usage = first.call.usage.as_ref();
        keys.extend(usage.map(|usage| &usage.record));
        let mut args = script::Args::default();
        args.int(scopes.len() as u64).int(places.keys.len() as u64).int(ends.len() as u64);
        args.int(usage.map_or(0, |_| USAGE_MODELS_MAX as u64));
        for scope in scopes {
            args.concurrency(scope).buckets(scope);
        }
        args.text(ms(first.life));
        for End { call, .. } in ends {
            for (kind, bucket) in buckets(scopes) {
                args.number(checks::spent(&call.actual)(kind, bucket));
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

/// All buckets, in the order in which scripts read them.
fn buckets(scopes: &[ScopeLimits]) -> impl Iterator<Item = (Kind, &Bucket)> {
    scopes.iter().flat_map(|scope| {
        Kind::ALL.into_iter().filter_map(|kind| Some((kind, scope.buckets[kind as usize].as_ref()?)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_one_position_among_few_and_among_many() {
        let keys: Vec<Key> = (0..4 * SEARCHED_MAX).map(|n| Key::backend_slots(&format!("b{n}"))).collect();
        let mut positions = KeyPositions::default();
        // Every second one comes again at once, and all of them later.
        for (n, key) in keys.iter().enumerate() {
            assert_eq!(positions.of(key), n as u64 + 1);
            assert_eq!(positions.of(&keys[n / 2]), n as u64 / 2 + 1);
        }
        assert!((1..).zip(&keys).all(|(n, key)| positions.of(key) == n));
        assert_eq!(positions.keys, keys.iter().collect::<Vec<_>>());
    }
}
