//! Random operations against oracles that share no arithmetic with the limiters: [`Model`], which says every verdict,
//! remainder and wait to the last bit, and the envelope over all windows.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use uuid::Uuid;
use weir_ratelimit::*;

use crate::harness::*;
use crate::model::{Ends, Expected, Model, Moment, Said};

/// A tenant, its key, its use of a model, the model, an account, its use for the model, and everything: every product
/// there is.
const SCOPES: [Scope<'static>; 7] = [
    Scope::Tenant("acme"),
    Scope::ApiKey { tenant: "acme", key: "k1" },
    Scope::TenantModel { tenant: "acme", model: "m" },
    Scope::Model("m"),
    Scope::Account("x"),
    Scope::AccountModel { account: "x", model: "m" },
    Scope::Global,
];
const SLOTS: [&str; 3] = ["a", "b", "c"];

#[derive(Debug, Clone)]
enum Op {
    Acquire {
        scopes: u8,
        cost: [u64; Kind::COUNT],
        estimated: bool,
        slots: u8,
    },
    /// Ended before it was asked for.
    Early {
        scopes: u8,
        actual: [u64; Kind::COUNT],
    },
    Again {
        which: usize,
    },
    Settle {
        which: usize,
        actual: [u64; Kind::COUNT],
    },
    Cancel {
        which: usize,
    },
    Move {
        which: usize,
        slots: u8,
    },
    Release {
        which: usize,
    },
    Renew {
        which: usize,
    },
    Edit {
        scope: usize,
        kind: usize,
        bucket: Option<Bucket>,
    },
    EditConcurrency {
        scope: usize,
        most: Option<u32>,
    },
    EditMode {
        scope: usize,
        shadow: bool,
    },
    EditSlots {
        slot: usize,
        most: u32,
    },
    Pass {
        us: u64,
    },
}

#[derive(Debug, Clone)]
struct Limits {
    buckets: [Option<Bucket>; Kind::COUNT],
    concurrency: Option<u32>,
    shadow: bool,
}

#[derive(Debug, Clone)]
struct Case {
    scopes: Vec<Limits>,
    slots: [u32; 3],
    ops: Vec<Op>,
}

fn a_bucket() -> impl Strategy<Value = Bucket> {
    (0u64..120, prop_oneof![1 => 0u64..1, 2 => 0u64..100, 2 => 0u64..100_000], 1_000u64..2_000_000)
        .prop_map(|(capacity, rate, us)| Bucket { capacity, rate, period: Duration::from_micros(us) })
}

fn maybe<T: std::fmt::Debug>(some: impl Strategy<Value = T>) -> impl Strategy<Value = Option<T>> {
    prop::option::weighted(0.5, some)
}

fn a_cost() -> impl Strategy<Value = [u64; Kind::COUNT]> {
    [0u64..3, 0u64..90, 0u64..60, 0u64..60, 0u64..90]
}

/// `longest`: of the times that pass, microseconds.
fn an_op(longest: u64) -> impl Strategy<Value = Op> {
    let which = any::<usize>;
    prop_oneof![
        8 => (1u8..128, a_cost(), any::<bool>(), 0u8..8)
            .prop_map(|(scopes, cost, estimated, slots)| Op::Acquire { scopes, cost, estimated, slots }),
        1 => (1u8..32, a_cost()).prop_map(|(scopes, actual)| Op::Early { scopes, actual }),
        1 => which().prop_map(|which| Op::Again { which }),
        4 => (which(), a_cost()).prop_map(|(which, actual)| Op::Settle { which, actual }),
        1 => which().prop_map(|which| Op::Cancel { which }),
        1 => (which(), 0u8..8).prop_map(|(which, slots)| Op::Move { which, slots }),
        1 => which().prop_map(|which| Op::Release { which }),
        1 => which().prop_map(|which| Op::Renew { which }),
        2 => (0usize..7, 0usize..5, maybe(a_bucket()))
            .prop_map(|(scope, kind, bucket)| Op::Edit { scope, kind, bucket }),
        1 => (0usize..7, maybe(0u32..4)).prop_map(|(scope, most)| Op::EditConcurrency { scope, most }),
        1 => (0usize..7, any::<bool>()).prop_map(|(scope, shadow)| Op::EditMode { scope, shadow }),
        1 => (0usize..3, 0u32..4).prop_map(|(slot, most)| Op::EditSlots { slot, most }),
        2 => (0..longest).prop_map(|us| Op::Pass { us }),
        1 => (0..longest / 1000 + 1).prop_map(|us| Op::Pass { us }),
    ]
}

fn a_case(longest: u64) -> impl Strategy<Value = Case> {
    let buckets =
        [maybe(a_bucket()), maybe(a_bucket()), maybe(a_bucket()), maybe(a_bucket()), maybe(a_bucket())];
    let limits = (buckets, maybe(0u32..6), prop::bool::weighted(0.2))
        .prop_map(|(buckets, concurrency, shadow)| Limits { buckets, concurrency, shadow });
    let ops = prop::collection::vec(an_op(longest), 1..60);
    (prop::collection::vec(limits, 7..=7), [0u32..4, 0u32..4, 0u32..4], ops)
        .prop_map(|(scopes, slots, ops)| Case { scopes, slots, ops })
}

impl Case {
    fn scopes(&self, mask: u8) -> Scopes {
        let chosen = SCOPES.into_iter().zip(&self.scopes).enumerate().filter(|(n, _)| mask >> n & 1 == 1);
        chosen
            .map(|(_, (scope, limits))| {
                let (record, leases) = scope_keys(scope);
                ScopeLimits {
                    record,
                    leases,
                    buckets: limits.buckets,
                    concurrency: limits.concurrency,
                    mode: if limits.shadow { Mode::Shadow } else { Mode::Enforce },
                    without_store: WithoutStore::LocalShare,
                    prefetch: Default::default(),
                }
            })
            .collect()
    }

    fn candidates(&self, mask: u8) -> Vec<Candidate> {
        let chosen = SLOTS.into_iter().zip(self.slots).enumerate().filter(|(n, _)| mask >> n & 1 == 1);
        chosen.map(|(_, (name, most))| candidate(name, most)).collect()
    }

    fn edit(&mut self, op: &Op) {
        match op {
            Op::Edit { scope, kind, bucket } => self.scopes[*scope].buckets[*kind] = *bucket,
            Op::EditConcurrency { scope, most } => self.scopes[*scope].concurrency = *most,
            Op::EditMode { scope, shadow } => self.scopes[*scope].shadow = *shadow,
            Op::EditSlots { slot, most } => self.slots[*slot] = *most,
            _ => {}
        }
    }
}

/// A call that was made, and the slot it holds as far as its caller knows.
#[derive(Debug, Clone)]
struct Made {
    call: Acquire,
    scopes: u8,
    slots: u8,
    slot: Option<Key>,
}

/// Whether a store said what it must.
fn same_limits(said: &[LimitState], must: &[Expected]) -> Result<(), TestCaseError> {
    prop_assert_eq!(said.len(), must.len());
    for (said, must) in said.iter().zip(must) {
        prop_assert_eq!((&said.scope, said.what, said.limit), (&must.scope, must.what, must.limit));
        prop_assert_eq!(said.remaining, must.remaining, "{:?} {:?}", said, must);
        let reset = must.reset.map_or(FOREVER, |us| Duration::from_micros(us as u64));
        prop_assert_eq!(said.reset, reset, "{:?} {:?}", said, must);
        let fits = match (said.verdict, must.said) {
            (Verdict::Fits, Said::Fits) | (Verdict::Never, Said::Never) => true,
            (Verdict::Wait(wait), Said::Wait(moment)) => within(wait, moment),
            _ => false,
        };
        prop_assert!(fits, "{:?} {:?}", said, must);
    }
    Ok(())
}

fn within(wait: Duration, (least, most): Moment) -> bool {
    (least..=most).contains(&(wait.as_micros() as i128))
}

fn same_outcome(said: &Outcome, must: &Ends) -> Result<(), TestCaseError> {
    let same = match (said, must) {
        (Outcome::Granted { slot: a }, Ends::Granted(b)) => a == b,
        (Outcome::Limited { wait: None }, Ends::Limited(None)) => true,
        (Outcome::Limited { wait: Some(wait) }, Ends::Limited(Some(moment)))
        | (Outcome::NoSlot { wait }, Ends::NoSlot(moment)) => within(*wait, *moment),
        _ => false,
    };
    prop_assert!(same, "{:?} {:?}", said, must);
    Ok(())
}

/// Plays a case and compares every answer with the model's.
async fn follows_the_model(world: &World, mut case: Case, lease: Duration) -> Result<(), TestCaseError> {
    let mut model = Model::default();
    let mut made: Vec<Made> = Vec::new();
    for (n, op) in case.ops.clone().into_iter().enumerate() {
        case.edit(&op);
        let pick = |which: usize| (!made.is_empty()).then(|| which % made.len());
        match op {
            Op::Acquire { scopes, cost, estimated, slots } => {
                let call = Acquire {
                    id: Uuid::from_u128(n as u128 + 1),
                    cost: Cost::new(cost),
                    estimated,
                    scopes: case.scopes(scopes),
                    candidates: case.candidates(slots),
                    lease_ttl: lease,
                };
                made.push(Made { call, scopes, slots, slot: None });
                asked(world, &mut model, made.last_mut().expect("just made")).await?;
            }
            Op::Early { scopes, actual } => {
                let call = Acquire { id: Uuid::from_u128(n as u128 + 1), ..call(case.scopes(scopes)) };
                let early = Made { call, scopes, slots: 0, slot: None };
                settled(world, &mut model, &case, &early, actual).await?;
                made.push(early);
            }
            Op::Again { which } => {
                let Some(at) = pick(which) else { continue };
                let Made { scopes, slots, .. } = made[at];
                made[at].call.scopes = case.scopes(scopes);
                made[at].call.candidates = case.candidates(slots);
                asked(world, &mut model, &mut made[at]).await?;
            }
            Op::Settle { which, actual } => {
                let Some(at) = pick(which) else { continue };
                settled(world, &mut model, &case, &made[at], actual).await?;
            }
            Op::Cancel { which } => {
                let Some(at) = pick(which) else { continue };
                settled(world, &mut model, &case, &made[at], [0; Kind::COUNT]).await?;
            }
            Op::Move { which, slots } => {
                let Some(at) = pick(which) else { continue };
                let (id, from) = (made[at].call.id, made[at].slot.clone());
                let candidates = case.candidates(slots);
                let before = world.now().await.into();
                let moved =
                    world.limiter.move_slot(id, from.as_ref(), &candidates, lease).await.expect("moved");
                let span = (before, world.now().await.into());
                prop_assert_eq!(moved, model.move_slot(id, from.as_ref(), &candidates, lease, span));
                made[at].slot = moved.map(|slot| candidates[slot].leases.clone());
            }
            Op::Release { which } => {
                let Some(at) = pick(which) else { continue };
                let leases: Vec<Key> =
                    made[at].call.scopes.iter().map(|scope| scope.leases.clone()).collect();
                world.limiter.release(made[at].call.id, &leases).await.expect("released");
                leases.iter().for_each(|key| model.release(made[at].call.id, key));
            }
            Op::Renew { which } => {
                let Some(at) = pick(which) else { continue };
                let scopes = made[at].call.scopes.iter().map(|scope| scope.leases.clone());
                let leases = scopes.chain(made[at].slot.clone()).collect();
                let renewal = Renewal { id: made[at].call.id, leases };
                let before = world.now().await.into();
                let lost = world.limiter.renew(std::slice::from_ref(&renewal), lease).await.expect("renewed");
                let span = (before, world.now().await.into());
                prop_assert_eq!(lost.is_empty(), model.renew(&renewal, lease, span));
            }
            Op::Pass { us } => world.pass(Duration::from_micros(us)).await,
            Op::Edit { .. } | Op::EditConcurrency { .. } | Op::EditMode { .. } | Op::EditSlots { .. } => {}
        }
    }
    Ok(())
}

async fn asked(world: &World, model: &mut Model, made: &mut Made) -> Result<(), TestCaseError> {
    let said = world.acquire(&made.call).await;
    let (ends, limits) = model.acquire(&made.call, said.now_us);
    same_outcome(&said.outcome, &ends)?;
    same_limits(&said.limits, &limits)?;
    if let Outcome::Granted { slot: Some(slot) } = said.outcome {
        made.slot = Some(made.call.candidates[slot].leases.clone());
    }
    Ok(())
}

async fn settled(
    world: &World,
    model: &mut Model,
    case: &Case,
    made: &Made,
    actual: [u64; Kind::COUNT],
) -> Result<(), TestCaseError> {
    let scopes = case.scopes(made.scopes);
    let call =
        Settle { id: made.call.id, actual: Cost::new(actual), scopes, slot: made.slot.clone(), usage: None };
    let said = world.limiter.settle(&call).await.expect("settled");
    let (applied, limits) = model.settle(&call, said.now_us);
    prop_assert_eq!(said.applied, applied);
    same_limits(&said.limits, &limits)
}

fn run<T: std::fmt::Debug, F: Future<Output = Result<(), TestCaseError>>>(
    runtime: &tokio::runtime::Runtime,
    cases: u32,
    strategy: impl Strategy<Value = T>,
    test: impl Fn(T) -> F,
) {
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 500, ..Config::default() };
    let outcome = TestRunner::new(config).run(&strategy, |case| runtime.block_on(test(case)));
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
}

fn paused() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().expect("runtime")
}

fn real() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime")
}

/// With clock steps of up to nine seconds, in which leases expire and records are removed.
#[test]
fn memory_is_the_model() {
    run(&paused(), 400, a_case(9_000_000), async |case| {
        follows_the_model(&World::memory(), case, Duration::from_secs(5)).await
    });
}

#[test]
fn redis_is_the_model() {
    let runtime = real();
    let world = runtime.block_on(World::redis());
    run(&runtime, 60, a_case(8_000), async |case| {
        world.flush().await;
        follows_the_model(&world, case, LEASE).await
    });
}

/// Requests of two tenants for so many tokens, and the time that passes before each.
#[derive(Debug, Clone)]
struct Requests {
    buckets: [Bucket; 2],
    asked: Vec<(u8, u64, u64)>,
}

fn requests(rates: std::ops::Range<u64>) -> impl Strategy<Value = Requests> {
    let bucket = (1u64..100, rates, 1_000u64..2_000_000).prop_map(|(capacity, rate, us)| Bucket {
        capacity,
        rate,
        period: Duration::from_micros(us),
    });
    let asked = prop::collection::vec((1u8..4, 0u64..60, 0u64..4_000), 1..50);
    ([bucket.clone(), bucket], asked).prop_map(|(buckets, asked)| Requests { buckets, asked })
}

/// Over all windows at once: the sum of what was granted between two moments never exceeds the capacity and
/// what drained between them. A bucket state in exact integers is over capacity if and only if some window is.
async fn keeps_the_envelope(world: &World, case: Requests) -> Result<(), TestCaseError> {
    // Units times the period, so that no division is needed.
    let mut levels: BTreeMap<Key, (i128, u64)> = BTreeMap::new();
    for (tenants, cost, pause) in case.asked {
        world.pass(Duration::from_micros(pause)).await;
        let both = ["acme", "zenith"].into_iter().zip(case.buckets).enumerate();
        let scopes: Scopes = both
            .filter(|(n, _)| tenants >> n & 1 == 1)
            .map(|(_, (tenant, bucket))| limited(tenant, Kind::Tokens, Some(bucket)))
            .collect();
        let call = tokens(scopes, cost);
        let decision = world.acquire(&call).await;
        for scope in call.scopes.iter().filter(|_| granted(&decision)) {
            let Some(bucket) = scope.buckets[Kind::Tokens as usize] else { continue };
            let period = bucket.period.as_micros() as i128;
            let (level, since) = levels.entry(scope.record.clone()).or_insert((0, decision.now_us));
            let drained = i128::from(decision.now_us - *since) * i128::from(bucket.rate);
            *level = (*level - drained).max(0) + i128::from(cost) * period;
            *since = decision.now_us;
            prop_assert!(*level <= i128::from(bucket.capacity) * period, "over by {level}");
        }
    }
    Ok(())
}

#[test]
fn memory_never_exceeds_the_envelope() {
    run(&paused(), 200, requests(0..1_000), async |case| keeps_the_envelope(&World::memory(), case).await);
}

#[test]
fn redis_never_exceeds_the_envelope() {
    let runtime = real();
    let world = runtime.block_on(World::redis());
    run(&runtime, 25, requests(0..1_000_000), async |case| {
        world.flush().await;
        keeps_the_envelope(&world, case).await
    });
}
