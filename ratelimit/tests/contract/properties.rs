//! Random operations against oracles that share no arithmetic with the limiters.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use smallvec::smallvec;
use uuid::Uuid;
use weir_ratelimit::*;

use crate::harness::*;

const TENANTS: [&str; 2] = ["acme", "zenith"];

#[derive(Debug, Clone)]
enum Op {
    Acquire { tenants: usize, cost: u64, estimated: bool },
    Again { which: usize },
    Settle { which: usize, actual: u64 },
    Release { which: usize },
    Move { which: usize },
    Pass { us: u64 },
}

#[derive(Debug, Clone)]
struct Case {
    buckets: [Bucket; 2],
    concurrency: u32,
    slots: [u32; 2],
    ops: Vec<Op>,
}

impl Case {
    fn scopes(&self, tenants: usize) -> Scopes {
        let scope = |n: usize| {
            let mut scope = limited(TENANTS[n], Kind::Tokens, Some(self.buckets[n]));
            scope.concurrency = Some(self.concurrency);
            scope
        };
        match tenants {
            0 => smallvec![scope(0)],
            1 => smallvec![scope(1)],
            _ => smallvec![scope(0), scope(1)],
        }
    }

    fn candidates(&self) -> Vec<Candidate> {
        vec![candidate("a", self.slots[0]), candidate("b", self.slots[1])]
    }
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0usize..3, 0u64..60, any::<bool>()).prop_map(|(tenants, cost, estimated)| Op::Acquire { tenants, cost, estimated }),
        1 => any::<usize>().prop_map(|which| Op::Again { which }),
        3 => (any::<usize>(), 0u64..90).prop_map(|(which, actual)| Op::Settle { which, actual }),
        1 => any::<usize>().prop_map(|which| Op::Release { which }),
        1 => any::<usize>().prop_map(|which| Op::Move { which }),
        2 => (0u64..20_000).prop_map(|us| Op::Pass { us }),
    ]
}

fn a_case(rates: std::ops::Range<u64>) -> impl Strategy<Value = Case> {
    let one = (1u64..100, rates, 1u64..2_000_000).prop_map(|(capacity, rate, us)| Bucket {
        capacity,
        rate,
        period: Duration::from_micros(us.max(1_000)),
    });
    let ops = prop::collection::vec(op(), 1..50);
    ([one.clone(), one], 0u32..8, [0u32..4, 0u32..4], ops)
        .prop_map(|(buckets, concurrency, slots, ops)| Case { buckets, concurrency, slots, ops })
}

/// What one run of a case showed: every decision with its call, and every other answer as text.
#[derive(Default)]
struct Log {
    decisions: Vec<(Acquire, Decision)>,
    answers: Vec<String>,
}

async fn play(world: &World, case: &Case, ids: u128) -> Log {
    let mut log = Log::default();
    let mut calls: Vec<Acquire> = Vec::new();
    for (n, op) in case.ops.iter().enumerate() {
        let pick = |which: &usize| calls.get(which % calls.len().max(1)).cloned();
        match op {
            Op::Acquire { tenants, cost, estimated } => {
                let call = Acquire {
                    id: Uuid::from_u128(ids + n as u128),
                    estimated: *estimated,
                    candidates: case.candidates(),
                    ..tokens(case.scopes(*tenants), *cost)
                };
                let decision = world.acquire(&call).await;
                if granted(&decision) {
                    calls.push(call.clone());
                }
                log.answers.push(timeless(&decision.outcome));
                log.decisions.push((call, decision));
            }
            Op::Again { which } => {
                let Some(call) = pick(which) else { continue };
                log.answers.push(timeless(&world.acquire(&call).await.outcome));
            }
            Op::Settle { which, actual } => {
                let Some(call) = pick(which) else { continue };
                let settled = world.settle(&call, Cost::of_request(*actual, 0, 0), None).await;
                log.answers.push(format!("{:?}", settled.applied));
            }
            Op::Release { which } => {
                let Some(call) = pick(which) else { continue };
                let leases: Vec<Key> = call.scopes.iter().map(|scope| scope.leases.clone()).collect();
                world.limiter.release(call.id, &leases).await.expect("release");
            }
            Op::Move { which } => {
                let Some(call) = pick(which) else { continue };
                let from = &call.candidates[0].leases;
                let moved = world.limiter.move_slot(call.id, Some(from), &call.candidates, LEASE).await;
                log.answers.push(format!("{:?}", moved.expect("move")));
            }
            Op::Pass { us } => world.pass(Duration::from_micros(*us)).await,
        }
    }
    log
}

/// An outcome without the wait, which depends on when it was asked.
fn timeless(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Granted { slot } => format!("granted {slot:?}"),
        Outcome::Limited { wait } => format!("limited, ever: {}", wait.is_some()),
        Outcome::NoSlot { .. } => "no slot".into(),
    }
}

fn run<F: Future<Output = Result<(), TestCaseError>>>(
    runtime: &tokio::runtime::Runtime,
    cases: u32,
    strategy: impl Strategy<Value = Case>,
    test: impl Fn(Case) -> F,
) {
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 200, ..Config::default() };
    let outcome = TestRunner::new(config).run(&strategy, |case| runtime.block_on(test(case)));
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
}

fn paused() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().expect("runtime")
}

fn real() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime")
}

/// Over all windows at once: the sum of what was granted between two moments never exceeds the capacity and
/// what drained between them. A meter in exact integers is over capacity if and only if some window is.
fn check_envelope(log: &Log) -> Result<(), TestCaseError> {
    // Units times the period, so that no division is needed.
    let mut levels: BTreeMap<Key, (i128, u64)> = BTreeMap::new();
    for (call, decision) in log.decisions.iter().filter(|(_, decision)| granted(decision)) {
        for scope in &call.scopes {
            let Some(bucket) = scope.buckets[Kind::Tokens as usize] else { continue };
            let period = bucket.period.as_micros() as i128;
            let cost = call.cost.get(Kind::Tokens);
            let cost = i128::from(if call.estimated { cost.min(bucket.capacity) } else { cost }) * period;
            let (level, since) = levels.entry(scope.record.clone()).or_insert((0, decision.now_us));
            let drained = i128::from(decision.now_us - *since) * i128::from(bucket.rate);
            *level = (*level - drained).max(0) + cost;
            *since = decision.now_us;
            prop_assert!(
                *level <= i128::from(bucket.capacity) * period,
                "over by {level} at {}",
                decision.now_us
            );
        }
    }
    Ok(())
}

fn without_settlement(mut case: Case) -> Case {
    // Credits would make room, rightly; leases would refuse, which hides what buckets do.
    case.ops.retain(|op| matches!(op, Op::Acquire { .. } | Op::Pass { .. } | Op::Again { .. }));
    (case.concurrency, case.slots) = (1_000, [1_000; 2]);
    case
}

#[test]
fn memory_never_exceeds_the_envelope() {
    run(&paused(), 200, a_case(0..1_000), async |case| {
        check_envelope(&play(&World::memory(), &without_settlement(case), 1).await)
    });
}

#[test]
fn redis_never_exceeds_the_envelope() {
    let runtime = real();
    let world = runtime.block_on(World::redis());
    run(&runtime, 25, a_case(0..1_000_000), async |case| {
        world.flush().await;
        check_envelope(&play(&world, &without_settlement(case), 1).await)
    });
}

/// Without draining there is no clock, so both stores must say the same to everything, word for word.
#[test]
fn memory_and_redis_agree() {
    let runtime = real();
    let redis = runtime.block_on(World::redis());
    run(&runtime, 60, a_case(0..1), async |mut case| {
        case.ops.retain(|op| !matches!(op, Op::Pass { .. }));
        redis.flush().await;
        let memory = World::memory();
        let (a, b) = (play(&memory, &case, 1).await, play(&redis, &case, 1).await);
        prop_assert_eq!(a.answers, b.answers);
        for ((_, a), (_, b)) in a.decisions.iter().zip(&b.decisions) {
            prop_assert_eq!(figures(&a.limits), figures(&b.limits));
        }
        let scopes = case.scopes(2);
        prop_assert_eq!(figures(&memory.peek(&scopes).await), figures(&redis.peek(&scopes).await));
        Ok(())
    });
}

/// Everything about limits that does not depend on the moment.
fn figures(limits: &[LimitState]) -> Vec<(What, u64, u64, bool, bool)> {
    let fits = |limit: &LimitState| (limit.verdict == Verdict::Fits, limit.verdict == Verdict::Never);
    limits.iter().map(|l| (l.what, l.limit, l.remaining, fits(l).0, fits(l).1)).collect()
}

/// Verdict, remaining and wait of every decision, replayed in exact integers at the store's own times.
fn check_replay(log: &Log) -> Result<(), TestCaseError> {
    let mut meters: BTreeMap<Key, (i128, i128)> = BTreeMap::new();
    for (call, decision) in &log.decisions {
        let now = i128::from(decision.now_us);
        let mut after = Vec::new();
        for (scope, said) in call.scopes.iter().zip(decision.limits.chunks(2)) {
            let bucket = scope.buckets[Kind::Tokens as usize].expect("limited");
            let (num, den) = (i128::from(bucket.rate) * 1_000_000, bucket.period.as_micros() as i128);
            let cap = i128::from(bucket.capacity) * 1_000_000;
            let cost = call.cost.get(Kind::Tokens);
            let cost = i128::from(if call.estimated { cost.min(bucket.capacity) } else { cost }) * 1_000_000;
            let (level, since) = meters.get(&scope.record).copied().unwrap_or((0, now));
            let at = |time: i128| (level - (time - since).max(0) * num / den).max(0);
            let over = at(now) + cost > cap;
            let verdict = if cost > cap || (over && num == 0) {
                Verdict::Never
            } else if over {
                let time = since + ((level + cost - cap) * den + num - 1) / num;
                Verdict::Wait(Duration::from_micros((time - now) as u64))
            } else {
                Verdict::Fits
            };
            prop_assert_eq!(said[0].verdict, verdict);
            let paid = granted(decision) && cost > 0;
            let left = cap - at(now) - if paid { cost } else { 0 };
            prop_assert_eq!(i128::from(said[0].remaining), left / 1_000_000);
            if paid {
                after.push((scope.record.clone(), (at(now) + cost, now)));
            }
        }
        meters.extend(after);
    }
    Ok(())
}

#[test]
fn memory_is_the_model() {
    run(&paused(), 300, a_case(0..100_000), async |case| {
        check_replay(&play(&World::memory(), &without_settlement(case), 1).await)
    });
}

#[test]
fn redis_is_the_model() {
    let runtime = real();
    let world = runtime.block_on(World::redis());
    run(&runtime, 25, a_case(0..100_000), async |case| {
        world.flush().await;
        check_replay(&play(&world, &without_settlement(case), 1).await)
    });
}
