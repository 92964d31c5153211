//! Coalescing: calls under the same limits share a script call.
//!
//! A script that reads the same records for many calls does most of its work once. No call waits for others without
//! need: it is sent at once while fewer than [`AT_ONCE`] calls of its kind are in progress. Further calls queue until
//! one of these ends, and are then sent together. Calls keep the order of their arrival, and the script decides one
//! after the other, so each answer is that of a single call.
//!
//! If a whole batch fails (because of a record of another type, for instance), its calls are sent again one by one,
//! so that no call gets the error of another one.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::hash::{BuildHasher, Hash, RandomState};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::model::error::Error;
use crate::model::id::ReservationId;

/// Calls of one kind that are sent separately; further ones queue.
const AT_ONCE: u32 = 4;
/// Calls in one batch: bounds the time for which a script blocks the server.
pub(super) const BATCH_MAX: usize = 32;

/// The common properties of calls that may be coalesced, as a keyed hash of 128 bits.
pub(super) type Alike = u128;
/// The reply to one call.
pub(super) type Reply = Result<Vec<i64>, Error>;
/// Sends owned calls together and returns one reply per call, in order.
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

/// The queues of the calls of one script.
pub(super) struct Coalescer<C> {
    keys: [RandomState; 2],
    groups: Mutex<HashMap<Alike, Group<C>>>,
    send: Box<Send_<C>>,
    coalesced: AtomicU64,
}

/// What happens to a call.
pub(super) enum Entered<C: Send + 'static> {
    /// It is sent now; the ticket counts it as in progress.
    Now(Ticket<C>),
    /// It waits; its reply comes through this channel.
    Later(oneshot::Receiver<Reply>),
}

/// A call or a batch in progress. When it ends, for whatever reason, the next calls in its queue are sent.
pub(super) struct Ticket<C: Send + 'static> {
    coalescer: Arc<Coalescer<C>>,
    alike: Alike,
    /// Whether the call still counts as in progress.
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
            coalesced: AtomicU64::new(0),
        })
    }

    pub(super) fn alike(&self, what: &impl Hash) -> Alike {
        let [high, low] = &self.keys;
        Alike::from(high.hash_one(what)) << 64 | Alike::from(low.hash_one(what))
    }

    /// Calls that shared a script call with others.
    pub(super) fn coalesced(&self) -> u64 {
        self.coalesced.load(Ordering::Relaxed)
    }

    /// Admits a call. `own` makes an owned copy, which can wait.
    pub(super) fn enter(
        self: &Arc<Self>,
        alike: Alike,
        id: ReservationId,
        own: impl FnOnce() -> C,
    ) -> Entered<C> {
        let mut groups = self.groups();
        let group = groups.entry(alike).or_insert_with(|| Group { under_way: 0, queue: VecDeque::new() });
        // A script call would not see the first of two calls with the same id.
        if group.under_way < AT_ONCE || group.queue.iter().any(|waiter| waiter.id == id) {
            group.under_way += 1;
            return Entered::Now(Ticket { coalescer: self.clone(), alike, counted: true });
        }
        let (answer, receiver) = oneshot::channel();
        group.queue.push_back(Waiter { id, call: own(), answer });
        Entered::Later(receiver)
    }

    fn groups(&self) -> MutexGuard<'_, HashMap<Alike, Group<C>>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next batch of a group, in place of one that has ended; empty if no call waits.
    fn next(&self, alike: Alike) -> Vec<Waiter<C>> {
        let mut groups = self.groups();
        let Some(group) = groups.get_mut(&alike) else { return Vec::new() };
        let mut batch = Vec::new();
        while batch.len() < BATCH_MAX
            && let Some(waiter) = group.queue.pop_front()
        {
            // A call whose caller has left was never sent, so nothing has to be undone.
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
        // If a batch panics or is cancelled, the next one is sent in its place.
        let mut place = Ticket { coalescer: self.clone(), alike, counted: true };
        while !batch.is_empty() {
            if batch.len() > 1 {
                self.coalesced.fetch_add(batch.len() as u64, Ordering::Relaxed);
            }
            let (calls, answers): (Vec<C>, Vec<_>) =
                batch.into_iter().map(|waiter| (waiter.call, waiter.answer)).unzip();
            let replies = (self.send)(calls).await;
            for (answer, reply) in answers.into_iter().zip(replies) {
                // The caller may have left; it cancels by id.
                let _ = answer.send(reply);
            }
            batch = self.next(alike);
        }
        // The last call of `next` has decreased the count already.
        place.counted = false;
    }
}

impl<C: Send + 'static> Drop for Ticket<C> {
    fn drop(&mut self) {
        if !self.counted {
            return;
        }
        let batch = self.coalescer.next(self.alike);
        if batch.is_empty() {
            return;
        }
        match tokio::runtime::Handle::try_current() {
            // Ends when the queue of the group is empty; each call has a deadline.
            Ok(runtime) => drop(runtime.spawn(self.coalescer.clone().run(self.alike, batch))),
            // Without a runtime there are no waiting callers.
            Err(_) => drop(self.coalescer.groups().remove(&self.alike)),
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
        let coalescer = Coalescer::new(move |calls: Vec<u32>| {
            log.lock().expect("log").push(calls.clone());
            Box::pin(async move { calls.into_iter().map(|call| Ok(vec![i64::from(call)])).collect() })
        });
        (coalescer, sent)
    }

    fn id(n: u32) -> ReservationId {
        ReservationId::from_u128(u128::from(n))
    }

    #[tokio::test]
    async fn nobody_waits_alone_and_the_queue_goes_in_order() {
        let (coalescer, sent) = recorder();
        let mut tickets = Vec::new();
        for n in 0..AT_ONCE {
            match coalescer.enter(7, id(n), || n) {
                Entered::Now(ticket) => tickets.push(ticket),
                Entered::Later(_) => panic!("the first go at once"),
            }
        }
        assert!(matches!(coalescer.enter(8, id(0), || 0), Entered::Now(_)), "another kind");
        let mut waiting = Vec::new();
        for n in 10..10 + 40 {
            match coalescer.enter(7, id(n), || n) {
                Entered::Now(_) => panic!("too many are under way"),
                Entered::Later(answer) => waiting.push((n, answer)),
            }
        }
        // Who leaves is left out.
        drop(waiting.remove(0));
        assert!(matches!(coalescer.enter(7, id(12), || 12), Entered::Now(_)), "its double waits");
        drop(tickets);
        for (n, answer) in waiting {
            assert_eq!(answer.await.expect("answered"), Ok(vec![i64::from(n)]));
        }
        let mut all: Vec<Vec<u32>> = sent.lock().expect("log").clone();
        assert!(all.iter().all(|batch| batch.len() <= BATCH_MAX && batch.is_sorted()), "{all:?}");
        all.sort();
        assert_eq!(all.concat(), (11..50).collect::<Vec<_>>());
        let coalesced: usize = all.iter().map(Vec::len).filter(|len| *len > 1).sum();
        assert_eq!(coalescer.coalesced(), coalesced as u64);
        assert!(coalescer.groups().is_empty(), "nothing stays behind");
    }

    #[tokio::test]
    async fn a_batch_that_panics_leaves_its_place_to_the_next() {
        let coalescer = Coalescer::new(|calls: Vec<u32>| {
            Box::pin(async move {
                assert!(!calls.contains(&13), "a bug");
                calls.into_iter().map(|n| Ok(vec![i64::from(n)])).collect()
            })
        });
        // More often than there are places.
        for _ in 0..3 * AT_ONCE {
            let tickets: Vec<_> = (0..AT_ONCE).map(|n| coalescer.enter(7, id(n), || n)).collect();
            let Entered::Later(lost) = coalescer.enter(7, id(13), || 13) else {
                panic!("too many are under way")
            };
            drop(tickets);
            assert!(lost.await.is_err(), "it learns that there is no answer");
        }
        let tickets: Vec<_> = (0..AT_ONCE).map(|n| coalescer.enter(7, id(n), || n)).collect();
        let Entered::Later(answer) = coalescer.enter(7, id(20), || 20) else {
            panic!("too many are under way")
        };
        drop(tickets);
        assert_eq!(answer.await.expect("answered"), Ok(vec![20]));
    }
}
