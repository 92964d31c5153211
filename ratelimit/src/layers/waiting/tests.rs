//! Order, fairness, bounds and wake-ups, with time paused and the limiter in memory.

mod alternatives;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use smallvec::SmallVec;
use tokio::task::JoinSet;
use tokio::time::{Instant, advance, sleep};
use uuid::Uuid;

use super::policy::{ASK_PAUSE_MIN, POLL_MAX};
use super::*;
use crate::model::call::{Acquire, Candidate, Decision, Outcome, Settle};
use crate::model::cost::Cost;
use crate::model::error::Error;
use crate::model::key::{Key, Scope, scope_keys};
use crate::model::kind::{Bucket, Kind};
use crate::model::limiter::Limiter;
use crate::model::limits::{Mode, ScopeLimits, Scopes, Verdict, WithoutStore};
use crate::store::memory::MemoryLimiter;

const SECOND: Duration = Duration::from_secs(1);

/// A process with a limiter, its queues and a count of asks.
struct Process {
    limiter: MemoryLimiter,
    waiting: Waiting,
    asks: AtomicUsize,
    order: Mutex<Vec<String>>,
}

fn process() -> Arc<Process> {
    Arc::new(Process {
        limiter: MemoryLimiter::new(),
        waiting: Waiting::default(),
        asks: AtomicUsize::new(0),
        order: Mutex::default(),
    })
}

fn per_second(capacity: u64, rate: u64) -> ScopeLimits {
    let mut limits = scope(None);
    limits.buckets[Kind::Tokens as usize] = Some(Bucket { capacity, rate, period: SECOND });
    limits
}

fn scope(concurrency: Option<u32>) -> ScopeLimits {
    let (record, leases) = scope_keys(Scope::Model("m"));
    let without_store = WithoutStore::default();
    ScopeLimits {
        record,
        leases,
        buckets: [None; Kind::COUNT],
        concurrency,
        mode: Mode::Enforce,
        without_store,
        prefetch: Default::default(),
    }
}

fn call(scopes: &[ScopeLimits], tokens: u64, candidates: Vec<Candidate>) -> Acquire {
    Acquire {
        id: Uuid::now_v7(),
        cost: Cost::of_request(tokens, 0, 0),
        estimated: true,
        scopes: scopes.iter().cloned().collect(),
        candidates,
        lease_ttl: 15 * SECOND,
    }
}

fn policy(tenant: &str, wait: Duration) -> QueuePolicy {
    QueuePolicy {
        tenant: tenant.into(),
        priority: Priority::Normal,
        deadline: Instant::now() + 600 * SECOND,
        scopes: SmallVec::from_elem(wait, 4),
        slots: Some(SlotQueue { queue: "m".into(), max_wait: wait, bound: 3, places: None }),
        bytes: 10,
        alternatives: Alternatives::new(),
    }
}

impl Process {
    async fn ask(&self, call: &Acquire, policy: &QueuePolicy) -> Waited<()> {
        let ask = |_: Option<&QueueId>| async {
            self.asks.fetch_add(1, Ordering::Relaxed);
            Ok::<_, Error>((self.limiter.acquire(call).await?, ()))
        };
        self.waiting.acquire(call, policy, ask).await.expect("memory always answers")
    }

    async fn settle(&self, call: &Acquire) {
        let scopes: Scopes = call.scopes.clone();
        let slot = call.candidates.first().map(|c| c.leases.clone());
        let settle = Settle { id: call.id, actual: Cost::default(), scopes, slot, usage: None };
        self.limiter.settle(&settle).await.expect("memory always answers");
        let keys = call.scopes.iter().map(|s| &s.leases).chain(call.candidates.iter().map(|c| &c.leases));
        self.waiting.released(keys);
    }

    /// Asks in a task of its own and notes its name when it is granted.
    fn spawn(self: &Arc<Self>, tasks: &mut JoinSet<()>, name: &str, call: Acquire, policy: QueuePolicy) {
        let (process, name) = (self.clone(), name.to_owned());
        tasks.spawn(async move {
            if process.ask(&call, &policy).await.gave_up.is_none() {
                process.order.lock().unwrap().push(name);
            }
        });
    }

    async fn waiters(&self, count: usize) {
        while self.waiting.len() != count {
            sleep(Duration::from_micros(10)).await;
        }
    }
}

fn slot(max_concurrency: u32) -> Vec<Candidate> {
    vec![Candidate { leases: Key::backend_slots("b"), max_concurrency, bound: None }]
}

#[tokio::test(start_paused = true)]
async fn a_refused_call_is_granted_at_the_moment_the_limiter_named() {
    let process = process();
    let limits = [per_second(10, 2)];
    assert!(process.ask(&call(&limits, 10, vec![]), &policy("a", SECOND)).await.gave_up.is_none());
    let began = Instant::now();
    let waited = process.ask(&call(&limits, 6, vec![]), &policy("a", 5 * SECOND)).await;
    assert_eq!((waited.gave_up, waited.ahead), (None, Some(0)));
    let late = began.elapsed() - 3 * SECOND;
    assert!(late <= Duration::from_millis(1), "three seconds and not more: {late:?}");
    assert_eq!(process.asks.load(Ordering::Relaxed), 3, "once at first, once when it fits");
    assert!(process.waiting.is_empty());
}

#[tokio::test(start_paused = true)]
async fn only_the_head_asks_however_many_wait() {
    let process = process();
    let limits = [per_second(1, 1)];
    let mut tasks = JoinSet::new();
    for i in 0..20 {
        process.spawn(&mut tasks, &i.to_string(), call(&limits, 1, vec![]), policy("a", 30 * SECOND));
    }
    tasks.join_all().await;
    let order: Vec<String> = (0..20).map(|i| i.to_string()).collect();
    assert_eq!(*process.order.lock().unwrap(), order, "first come, first served");
    assert!(process.asks.load(Ordering::Relaxed) <= 2 * 20, "{:?}", process.asks);
}

#[tokio::test(start_paused = true)]
async fn tenants_take_turns_in_a_models_queue() {
    let process = process();
    let limits = [per_second(1, 1)];
    process.ask(&call(&limits, 1, vec![]), &policy("z", SECOND)).await;
    let mut tasks = JoinSet::new();
    for i in 0..6 {
        process.spawn(&mut tasks, &format!("a{i}"), call(&limits, 1, vec![]), policy("a", 60 * SECOND));
        process.waiters(i + 1).await;
    }
    for i in 0..2 {
        process.spawn(&mut tasks, &format!("b{i}"), call(&limits, 1, vec![]), policy("b", 60 * SECOND));
        process.waiters(7 + i).await;
    }
    tasks.join_all().await;
    assert_eq!(process.order.lock().unwrap().join(" "), "a0 b0 a1 b1 a2 a3 a4 a5");
}

#[tokio::test(start_paused = true)]
async fn shares_are_of_what_is_taken_not_of_how_often() {
    let process = process();
    let limits = [per_second(100, 100)];
    process.ask(&call(&limits, 100, vec![]), &policy("z", SECOND)).await;
    let mut tasks = JoinSet::new();
    for i in 0..3 {
        process.spawn(&mut tasks, &format!("A{i}"), call(&limits, 60, vec![]), policy("a", 60 * SECOND));
        process.waiters(i + 1).await;
    }
    for i in 0..6 {
        process.spawn(&mut tasks, &format!("b{i}"), call(&limits, 20, vec![]), policy("b", 60 * SECOND));
        process.waiters(4 + i).await;
    }
    tasks.join_all().await;
    assert_eq!(process.order.lock().unwrap().join(" "), "A0 b0 b1 b2 A1 b3 b4 b5 A2");
}

#[tokio::test(start_paused = true)]
async fn a_large_request_is_not_starved_by_small_ones() {
    let process = process();
    let limits = [per_second(100, 10)];
    process.ask(&call(&limits, 100, vec![]), &policy("a", SECOND)).await;
    let mut tasks = JoinSet::new();
    process.spawn(&mut tasks, "large", call(&limits, 100, vec![]), policy("a", 60 * SECOND));
    process.waiters(1).await;
    advance(5 * SECOND).await;
    for i in 0..5 {
        process.spawn(&mut tasks, "small", call(&limits, 1, vec![]), policy("a", 60 * SECOND));
        process.waiters(2 + i).await;
    }
    tasks.join_all().await;
    assert_eq!(process.order.lock().unwrap()[0], "large", "half of it was free when the small ones came");
}

#[tokio::test(start_paused = true)]
async fn a_higher_priority_goes_first() {
    let process = process();
    let limits = [per_second(1, 1)];
    process.ask(&call(&limits, 1, vec![]), &policy("z", SECOND)).await;
    let mut tasks = JoinSet::new();
    for (i, (name, priority)) in
        [("low", Priority::Low), ("normal", Priority::Normal), ("high", Priority::High)]
            .into_iter()
            .enumerate()
    {
        let policy = QueuePolicy { priority, ..policy(name, 60 * SECOND) };
        process.spawn(&mut tasks, name, call(&limits, 1, vec![]), policy);
        process.waiters(i + 1).await;
    }
    tasks.join_all().await;
    assert_eq!(process.order.lock().unwrap().join(" "), "high normal low");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_goes_away_leaves_the_queue_and_the_next_takes_its_turn() {
    let process = process();
    let limits = [per_second(10, 1)];
    process.ask(&call(&limits, 10, vec![]), &policy("a", SECOND)).await;
    let (mut gone, mut tasks) = (JoinSet::new(), JoinSet::new());
    process.spawn(&mut gone, "gone", call(&limits, 10, vec![]), policy("a", 60 * SECOND));
    process.waiters(1).await;
    process.spawn(&mut tasks, "next", call(&limits, 2, vec![]), policy("a", 60 * SECOND));
    process.waiters(2).await;
    let began = Instant::now();
    gone.shutdown().await;
    tasks.join_all().await;
    assert_eq!(*process.order.lock().unwrap(), ["next"]);
    assert!(began.elapsed() < 3 * SECOND, "it does not wait for what the other one needed");
    assert!(process.waiting.is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_cannot_fit_in_time_is_refused_at_once_with_the_true_wait() {
    let process = process();
    let limits = [per_second(10, 1)];
    process.ask(&call(&limits, 10, vec![]), &policy("a", SECOND)).await;
    let began = Instant::now();
    let alone = process.ask(&call(&limits, 8, vec![]), &policy("a", 5 * SECOND)).await;
    assert_eq!(alone.gave_up, Some(GaveUp::TooLong));
    assert_eq!(alone.decision.outcome, Outcome::Limited { wait: Some(8 * SECOND) });
    let mut tasks = JoinSet::new();
    process.spawn(&mut tasks, "head", call(&limits, 4, vec![]), policy("a", 5 * SECOND));
    process.waiters(1).await;
    let asks = process.asks.load(Ordering::Relaxed);
    let behind = process.ask(&call(&limits, 3, vec![]), &policy("b", 5 * SECOND)).await;
    assert_eq!(behind.gave_up, Some(GaveUp::TooLong));
    assert_eq!(process.asks.load(Ordering::Relaxed), asks, "the queue knows without asking");
    let Outcome::Limited { wait: Some(wait) } = behind.decision.outcome else { panic!("{behind:?}") };
    assert!(
        wait.abs_diff(7 * SECOND) < Duration::from_millis(2),
        "four of the head, three of its own: {wait:?}"
    );
    assert_eq!(behind.decision.limits[0].verdict, Verdict::Wait(wait), "and which limit it is");
    assert!(began.elapsed() < Duration::from_millis(10), "only the waits of this test itself");
    tasks.join_all().await;
}

#[tokio::test(start_paused = true)]
async fn a_freed_slot_wakes_the_head_at_once_and_waiters_hold_nothing() {
    let process = process();
    let owner = call(&[scope(Some(5))], 1, slot(1));
    process.ask(&owner, &policy("a", SECOND)).await;
    let mut tasks = JoinSet::new();
    process.spawn(&mut tasks, "first", call(&[scope(Some(5))], 1, slot(1)), policy("a", 60 * SECOND));
    process.waiters(1).await;
    let seen = process.limiter.peek(&[scope(Some(5))]).await.expect("memory always answers");
    assert_eq!(seen[0].remaining, 4, "who waits for a slot holds no lease of its tenant");
    sleep(Duration::from_millis(1234)).await;
    let began = Instant::now();
    process.settle(&owner).await;
    tasks.join_all().await;
    assert!(began.elapsed() < Duration::from_millis(1), "no poll in between: {:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_release_elsewhere_is_noticed_within_a_poll() {
    let process = process();
    let owner = call(&[], 1, slot(1));
    process.ask(&owner, &policy("a", SECOND)).await;
    let mut tasks = JoinSet::new();
    process.spawn(&mut tasks, "first", call(&[], 1, slot(1)), policy("a", 60 * SECOND));
    process.waiters(1).await;
    sleep(3 * SECOND).await;
    let began = Instant::now();
    process.limiter.release(owner.id, &[Key::backend_slots("b")]).await.expect("memory always answers");
    tasks.join_all().await;
    assert!(began.elapsed() <= POLL_MAX + ASK_PAUSE_MIN);
}

#[tokio::test(start_paused = true)]
async fn a_release_while_the_head_is_asking_is_not_lost() {
    let waiting = Waiting::default();
    let asked = AtomicUsize::new(0);
    let call = call(&[], 1, slot(1));
    let began = Instant::now();
    let ask = |_: Option<&QueueId>| async {
        let outcome = match asked.fetch_add(1, Ordering::Relaxed) {
            0 => {
                // Decided: no slot. Freed before the answer is back.
                waiting.released([&Key::backend_slots("b")]);
                Outcome::NoSlot { wait: SECOND }
            }
            _ => Outcome::Granted { slot: Some(0) },
        };
        Ok::<_, Error>((Decision { outcome, limits: vec![], now_us: 0, degraded: false }, ()))
    };
    let waited = waiting.acquire(&call, &policy("a", SECOND), ask).await.expect("asks do not fail");
    assert_eq!((waited.gave_up, began.elapsed()), (None, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn a_queue_has_a_bound_and_every_wait_an_end() {
    let process = process();
    process.ask(&call(&[], 1, slot(1)), &policy("z", SECOND)).await;
    let mut tasks = JoinSet::new();
    for i in 0..3 {
        process.spawn(&mut tasks, "in", call(&[], 1, slot(1)), policy("a", 5 * SECOND));
        process.waiters(i + 1).await;
    }
    let fourth = process.ask(&call(&[], 1, slot(1)), &policy("b", 5 * SECOND)).await;
    assert_eq!(fourth.gave_up, Some(GaveUp::QueueFull));
    let began = Instant::now();
    tasks.join_all().await;
    assert!(began.elapsed() <= 5 * SECOND + Duration::from_millis(2), "{:?}", began.elapsed());
    assert!(process.waiting.is_empty() && process.order.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_callers_deadline_ends_a_wait_before_the_limits_own() {
    let process = process();
    process.ask(&call(&[], 1, slot(1)), &policy("z", SECOND)).await;
    let began = Instant::now();
    let hurry = QueuePolicy { deadline: Instant::now() + SECOND, ..policy("a", 60 * SECOND) };
    let waited = process.ask(&call(&[], 1, slot(1)), &hurry).await;
    assert_eq!(waited.gave_up, Some(GaveUp::Expired));
    assert!(matches!(waited.decision.outcome, Outcome::NoSlot { .. }));
    assert!(began.elapsed() < 2 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn what_never_fits_does_not_wait() {
    let process = process();
    let never = Acquire { estimated: false, ..call(&[per_second(10, 1)], 11, vec![]) };
    let waited = process.ask(&never, &policy("a", 60 * SECOND)).await;
    assert_eq!(waited.gave_up, Some(GaveUp::TooLong));
    assert_eq!(waited.decision.outcome, Outcome::Limited { wait: None });
    assert_eq!(waited.waited, Duration::ZERO);
}

#[test]
fn coming_and_going_gains_a_tenant_nothing() {
    let mut queues: Queues<()> = Queues::default();
    let id = QueueId::Slots("m".into());
    let entry = |tenant: &str| Entry {
        tenant: tenant.into(),
        priority: Priority::Normal,
        cost: Cost::of_request(1, 0, 0),
        bytes: 0,
        places: Arc::default(),
        slots: None,
        wakes: vec![],
        handle: (),
    };
    let many: Vec<u64> = (0..10).map(|_| queues.join(&id, entry("a"), 100, 0).unwrap()).collect();
    let mut served = Vec::new();
    let mut rest = many.into_iter();
    let mut first_of_a = rest.next();
    let mut b = queues.join(&id, entry("b"), 100, 0).unwrap();
    for _ in 0..8 {
        if queues.turn(&id, b, 0) == Turn::Now {
            queues.leave(&id, "b", b, true);
            served.push('b');
            b = queues.join(&id, entry("b"), 100, 0).unwrap();
        } else {
            let number = first_of_a.take().expect("somebody's turn");
            assert_eq!(queues.turn(&id, number, 0), Turn::Now);
            queues.leave(&id, "a", number, true);
            first_of_a = rest.next();
            served.push('a');
        }
    }
    assert_eq!(served.into_iter().collect::<String>(), "abababab");
}

#[tokio::test(start_paused = true)]
async fn a_release_at_any_of_many_backends_wakes_who_named_only_some_of_them() {
    let process = process();
    let another = Key::backend_slots("another");
    let places = [(Key::backend_slots("b"), 1), (another.clone(), 1)].into_iter().collect();
    let holder = call(&[], 1, slot(1));
    assert!(process.ask(&holder, &policy("a", Duration::ZERO)).await.gave_up.is_none());
    let mut policy = policy("a", SECOND);
    policy.slots.as_mut().expect("it waits for slots").places = Some(Arc::new(places));
    let mut tasks = JoinSet::new();
    process.spawn(&mut tasks, "waiter", call(&[], 1, slot(1)), policy);
    process.waiters(1).await;
    for (key, asks) in [(&another, 1), (&Key::backend_slots("of another model"), 0)] {
        let before = process.asks.load(Ordering::Relaxed);
        process.waiting.released([key]);
        sleep(Duration::from_micros(10)).await;
        assert_eq!(process.asks.load(Ordering::Relaxed) - before, asks, "{key:?}");
    }
}
