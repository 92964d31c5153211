//! Calls under the same limits travel as one.
//!
//! A script that reads the same records for each of many calls does nearly all of its work once. Nobody waits for
//! that: a call goes out at once while fewer than [`AT_ONCE`] of its kind are under way, and only what comes beyond
//! that stands together until one of those is back, which is when it would have been decided anyway. Order of arrival
//! is kept, and the script decides one after the other: the answers are those of single calls.
//!
//! What fails for a whole batch (a record of another type, say) is asked again one by one, so that nobody gets
//! another's error.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::hash::{BuildHasher, Hash, RandomState};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::model::error::Error;
use crate::model::id::ReservationId;

/// Most calls of one kind that travel apart.
const AT_ONCE: u32 = 4;
/// Most calls in one: a bound for how long a script keeps the server.
pub(super) const BATCH_MAX: usize = 32;

/// What calls that may be merged have in common, by a keyed hash of 128 bits.
pub(super) type Alike = u128;
/// The reply to one call.
pub(super) type Reply = Result<Vec<i64>, Error>;
/// Sends owned calls together; one reply each, in order.
type Send_<C> = dyn Fn(Vec<C>) -> Pin<Box<dyn Future<Output = Vec<Reply>> + Send>> + Send + Sync;

struct Waiter<C> {
    id: ReservationId,
    call: C,
    answer: oneshot::Sender<Reply>,
}

struct Group<C> {
    under_way: u32,
    queue: VecDeque<Waiter<C>>,
}

/// The calls of one script.
pub(super) struct Coalescer<C> {
    keys: [RandomState; 2],
    groups: Mutex<HashMap<Alike, Group<C>>>,
    send: Box<Send_<C>>,
    merged: AtomicU64,
}

/// What becomes of a call.
pub(super) enum Entered<C: Send + 'static> {
    /// It goes out now; the ticket says that it is under way.
    Now(Ticket<C>),
    /// Its answer will come here.
    Later(oneshot::Receiver<Reply>),
}

/// A call, or a batch, under way. When it ends, however it ends, those that stood behind it go.
pub(super) struct Ticket<C: Send + 'static> {
    merge: Arc<Coalescer<C>>,
    alike: Alike,
    /// Whether its place is still counted.
    counted: bool,
}

impl<C: Send + 'static> Coalescer<C> {
    pub(super) fn new(
        send: impl Fn(Vec<C>) -> Pin<Box<dyn Future<Output = Vec<Reply>> + Send>> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            keys: [RandomState::new(), RandomState::new()],
            groups: Mutex::default(),
            send: Box::new(send),
            merged: AtomicU64::new(0),
        })
    }

    pub(super) fn alike(&self, what: &impl Hash) -> Alike {
        let [high, low] = &self.keys;
        Alike::from(high.hash_one(what)) << 64 | Alike::from(low.hash_one(what))
    }

    /// Calls so far that travelled with another one.
    pub(super) fn merged(&self) -> u64 {
        self.merged.load(Ordering::Relaxed)
    }

    /// A call arrives; `own` makes it one that can wait.
    pub(super) fn enter(
        self: &Arc<Self>,
        alike: Alike,
        id: ReservationId,
        own: impl FnOnce() -> C,
    ) -> Entered<C> {
        let mut groups = self.groups();
        let group = groups.entry(alike).or_insert_with(|| Group { under_way: 0, queue: VecDeque::new() });
        // The same id twice in one script call would not see its own grant.
        if group.under_way < AT_ONCE || group.queue.iter().any(|waiter| waiter.id == id) {
            group.under_way += 1;
            return Entered::Now(Ticket { merge: self.clone(), alike, counted: true });
        }
        let (answer, receiver) = oneshot::channel();
        group.queue.push_back(Waiter { id, call: own(), answer });
        Entered::Later(receiver)
    }

    fn groups(&self) -> MutexGuard<'_, HashMap<Alike, Group<C>>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next batch of a group in place of what has ended; none when nobody waits.
    fn next(&self, alike: Alike) -> Vec<Waiter<C>> {
        let mut groups = self.groups();
        let Some(group) = groups.get_mut(&alike) else { return Vec::new() };
        let mut batch = Vec::new();
        while batch.len() < BATCH_MAX
            && let Some(waiter) = group.queue.pop_front()
        {
            // Who is gone is not asked for: nothing was sent, so nothing has to be undone.
            if !waiter.answer.is_closed() {
                batch.push(waiter);
            }
        }
        if batch.is_empty() {
            group.under_way -= 1;
            if group.under_way == 0 {
                groups.remove(&alike);
            }
        }
        batch
    }

    async fn run(self: Arc<Self>, alike: Alike, mut batch: Vec<Waiter<C>>) {
        // A batch that panics, or is cancelled, leaves its place to the next one.
        let mut place = Ticket { merge: self.clone(), alike, counted: true };
        while !batch.is_empty() {
            if batch.len() > 1 {
                self.merged.fetch_add(batch.len() as u64, Ordering::Relaxed);
            }
            let (calls, answers): (Vec<C>, Vec<_>) =
                batch.into_iter().map(|waiter| (waiter.call, waiter.answer)).unzip();
            let replies = (self.send)(calls).await;
            for (answer, reply) in answers.into_iter().zip(replies) {
                // Nobody waits for it any more: the caller cancels by id.
                let _ = answer.send(reply);
            }
            batch = self.next(alike);
        }
        // The last call of `next` gave the place back.
        place.counted = false;
    }
}

impl<C: Send + 'static> Drop for Ticket<C> {
    fn drop(&mut self) {
        if !self.counted {
            return;
        }
        let batch = self.merge.next(self.alike);
        if batch.is_empty() {
            return;
        }
        match tokio::runtime::Handle::try_current() {
            // Bounded by the deadline of each call; ends with the group's queue.
            Ok(runtime) => drop(runtime.spawn(self.merge.clone().run(self.alike, batch))),
            // The runtime is gone, and with it everybody who waits.
            Err(_) => drop(self.merge.groups().remove(&self.alike)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was sent together.
    type Sent = Arc<Mutex<Vec<Vec<u32>>>>;

    fn recorder() -> (Arc<Coalescer<u32>>, Sent) {
        let sent = Sent::default();
        let log = sent.clone();
        let merge = Coalescer::new(move |calls: Vec<u32>| {
            log.lock().expect("log").push(calls.clone());
            Box::pin(async move { calls.into_iter().map(|call| Ok(vec![i64::from(call)])).collect() })
        });
        (merge, sent)
    }

    fn id(n: u32) -> ReservationId {
        ReservationId::from_u128(u128::from(n))
    }

    #[tokio::test]
    async fn nobody_waits_alone_and_the_queue_goes_in_order() {
        let (merge, sent) = recorder();
        let mut tickets = Vec::new();
        for n in 0..AT_ONCE {
            match merge.enter(7, id(n), || n) {
                Entered::Now(ticket) => tickets.push(ticket),
                Entered::Later(_) => panic!("the first go at once"),
            }
        }
        assert!(matches!(merge.enter(8, id(0), || 0), Entered::Now(_)), "another kind");
        let mut waiting = Vec::new();
        for n in 10..10 + 40 {
            match merge.enter(7, id(n), || n) {
                Entered::Now(_) => panic!("too many are under way"),
                Entered::Later(answer) => waiting.push((n, answer)),
            }
        }
        // Who leaves is left out.
        drop(waiting.remove(0));
        assert!(matches!(merge.enter(7, id(12), || 12), Entered::Now(_)), "its double waits");
        drop(tickets);
        for (n, answer) in waiting {
            assert_eq!(answer.await.expect("answered"), Ok(vec![i64::from(n)]));
        }
        let mut all: Vec<Vec<u32>> = sent.lock().expect("log").clone();
        assert!(all.iter().all(|batch| batch.len() <= BATCH_MAX && batch.is_sorted()), "{all:?}");
        all.sort();
        assert_eq!(all.concat(), (11..50).collect::<Vec<_>>());
        let merged: usize = all.iter().map(Vec::len).filter(|len| *len > 1).sum();
        assert_eq!(merge.merged(), merged as u64);
        assert!(merge.groups().is_empty(), "nothing stays behind");
    }

    #[tokio::test]
    async fn a_batch_that_panics_leaves_its_place_to_the_next() {
        let merge = Coalescer::new(|calls: Vec<u32>| {
            Box::pin(async move {
                assert!(!calls.contains(&13), "a bug");
                calls.into_iter().map(|n| Ok(vec![i64::from(n)])).collect()
            })
        });
        // More often than there are places.
        for _ in 0..3 * AT_ONCE {
            let tickets: Vec<_> = (0..AT_ONCE).map(|n| merge.enter(7, id(n), || n)).collect();
            let Entered::Later(lost) = merge.enter(7, id(13), || 13) else {
                panic!("too many are under way")
            };
            drop(tickets);
            assert!(lost.await.is_err(), "it learns that there is no answer");
        }
        let tickets: Vec<_> = (0..AT_ONCE).map(|n| merge.enter(7, id(n), || n)).collect();
        let Entered::Later(answer) = merge.enter(7, id(20), || 20) else { panic!("too many are under way") };
        drop(tickets);
        assert_eq!(answer.await.expect("answered"), Ok(vec![20]));
    }
}
