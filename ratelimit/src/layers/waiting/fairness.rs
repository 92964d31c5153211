//! Several processes share the slots of a backend: each of them is served, and few slots stay unused for that.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use smallvec::SmallVec;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::*;
use crate::model::call::{Acquire, Candidate, Settle};
use crate::model::cost::Cost;
use crate::model::error::Error;
use crate::model::key::Key;
use crate::model::limiter::Limiter;
use crate::model::limits::Scopes;
use crate::store::memory::MemoryLimiter;

const SLOTS: u32 = 16;
const RUN: Duration = Duration::from_secs(30);
/// The time of a call to the store.
const TRIP: Duration = Duration::from_millis(1);

#[derive(Default)]
struct Process {
    waiting: Waiting,
    held: AtomicU32,
}

/// What the clients of one process measured.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    served: u32,
    gave_up: u32,
    longest: Duration,
}

impl Process {
    /// One client: asks, is served for a time, asks again.
    async fn client(&self, limiter: &MemoryLimiter, processes: u32, takes: Duration, until: Instant) -> Seen {
        let mut seen = Seen::default();
        while Instant::now() < until {
            let place = Candidate { leases: Key::backend_slots("b"), max_concurrency: SLOTS, bound: None };
            let key = place.leases.clone();
            let call = Acquire {
                id: Uuid::now_v7(),
                cost: Cost::default(),
                estimated: false,
                scopes: Scopes::new(),
                candidates: vec![place],
                lease_ttl: Duration::from_secs(15),
            };
            let max_wait = Duration::from_secs(5);
            let policy = QueuePolicy {
                tenant: "a".into(),
                priority: Priority::Normal,
                deadline: Instant::now() + Duration::from_secs(60),
                scopes: SmallVec::new(),
                slots: Some(SlotQueue { queue: "m".into(), max_wait, bound: 1000, places: None }),
                bytes: 0,
                alternatives: Alternatives::new(),
            };
            let ask = |_: Option<&QueueId>| async {
                sleep(TRIP).await;
                Ok::<_, Error>((limiter.acquire(&call).await?, ()))
            };
            let waited = self.waiting.acquire(&call, &policy, ask).await.expect("memory always answers");
            seen.longest = seen.longest.max(waited.waited);
            if waited.gave_up.is_some() {
                seen.gave_up += 1;
                continue;
            }
            self.held.fetch_add(1, Ordering::Relaxed);
            // Answers differ in length.
            sleep(takes.mul_f64(0.75 + f64::from(seen.served % 7) / 12.0)).await;
            let held = self.held.fetch_sub(1, Ordering::Relaxed) - 1;
            sleep(TRIP).await;
            let (actual, scopes) = (Cost::default(), Scopes::new());
            let settle = Settle { id: call.id, actual, scopes, slot: Some(key.clone()), usage: None };
            limiter.settle(&settle).await.expect("memory always answers");
            self.waiting.gave_back(&key, held, processes);
            seen.served += 1;
        }
        seen
    }
}

/// Processes with a number of clients each, of which the first process starts a second before the others.
async fn share(clients: &[u32], takes: Duration) -> Vec<Seen> {
    let limiter = Arc::new(MemoryLimiter::new());
    let processes: Vec<Arc<Process>> = clients.iter().map(|_| Arc::default()).collect();
    let until = Instant::now() + RUN;
    let mut tasks = JoinSet::new();
    for (i, (&clients, process)) in clients.iter().zip(&processes).enumerate() {
        for _ in 0..clients {
            let (process, limiter, among) = (process.clone(), limiter.clone(), processes.len() as u32);
            tasks.spawn(async move {
                sleep(Duration::from_secs(u64::from(i > 0))).await;
                (i, process.client(&limiter, among, takes, until).await)
            });
        }
    }
    let mut seen = vec![Seen::default(); clients.len()];
    while let Some(done) = tasks.join_next().await {
        let (i, one) = done.expect("no panic");
        seen[i].served += one.served;
        seen[i].gave_up += one.gave_up;
        seen[i].longest = seen[i].longest.max(one.longest);
    }
    seen
}

#[tokio::test(start_paused = true)]
async fn a_process_that_comes_late_gets_its_part_of_the_slots_and_nobody_waits_in_vain() {
    for takes in [Duration::from_millis(100), Duration::from_millis(500)] {
        let seen = share(&[16; 4], takes).await;
        let even = f64::from(SLOTS) * RUN.as_secs_f64() / takes.as_secs_f64() / 4.0;
        for process in &seen {
            assert_eq!(process.gave_up, 0, "{takes:?}: {seen:?}");
            assert!(f64::from(process.served) > 0.8 * even, "{takes:?}: {seen:?}");
        }
        let served: u32 = seen.iter().map(|process| process.served).sum();
        assert!(f64::from(served) > 0.95 * 4.0 * even, "{takes:?}: {seen:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_process_alone_with_its_demand_uses_nearly_all_slots() {
    for takes in [Duration::from_millis(100), Duration::from_secs(1)] {
        let seen = share(&[64, 0, 0, 0], takes).await;
        let most = f64::from(SLOTS) * RUN.as_secs_f64() / takes.as_secs_f64();
        assert!(f64::from(seen[0].served) > 0.95 * most, "of {most}: {seen:?}");
    }
}
