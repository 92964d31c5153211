//! Charges: final debits and credits, decided and written in one step.

use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use weir_ratelimit::*;

use crate::harness::*;

const MINUTE: Duration = Duration::from_secs(60);

/// A charge to a tenant's requests, of a capacity that does not drain.
fn charge(tenant: &str, capacity: u64, needed: u64, added: i64, rule: ChargeRule) -> Charge {
    let bucket = Bucket { capacity, rate: 0, period: MINUTE };
    Charge { record: Key::tenant(tenant), kind: Kind::Requests, bucket, needed, added, rule }
}

fn enforce(tenant: &str, capacity: u64, hits: u64) -> Charge {
    charge(tenant, capacity, hits, hits as i64, ChargeRule::AllOrNothing)
}

async fn make(world: &World, charges: &[Charge]) -> (bool, Vec<LimitState>) {
    let decision = world.limiter.charge(charges).await.expect("charged");
    (granted(&decision), decision.limits)
}

async fn left(world: &World, tenant: &str, capacity: u64) -> u64 {
    make(world, &[charge(tenant, capacity, 0, 0, ChargeRule::Note)]).await.1[0].remaining
}

pub(crate) async fn a_refused_charge_changes_nothing(world: World) {
    assert!(make(&world, &[enforce("a", 10, 7)]).await.0);
    let before = world.dump().await;
    let note = charge("c", 10, 1, 1, ChargeRule::Note);
    let (ok, limits) = make(&world, &[enforce("b", 10, 1), enforce("a", 10, 4), note]).await;
    assert!(!ok);
    assert_eq!((limits[0].verdict, limits[1].verdict), (Verdict::Fits, Verdict::Never));
    assert_eq!(limits.iter().map(|l| l.remaining).collect::<Vec<_>>(), [10, 3, 10]);
    assert_eq!(limits[1].scope, enforce("a", 10, 4).record);
    assert_eq!(world.dump().await, before);
}

pub(crate) async fn a_charge_shares_the_bucket_of_reservations(world: World) {
    let scope = limited("acme", Kind::Requests, bucket(3, 0, MINUTE));
    assert!(granted(&world.acquire(&call([scope.clone()])).await));
    assert!(make(&world, &[enforce("acme", 3, 2)]).await.0);
    assert!(!make(&world, &[enforce("acme", 3, 1)]).await.0);
    assert!(!granted(&world.acquire(&call([scope])).await));
}

pub(crate) async fn an_always_charge_goes_into_debt_and_refuses_until_something_is_left(world: World) {
    let bucket_state = |added| charge("a", 10, 1, added, ChargeRule::Always);
    assert!(make(&world, &[bucket_state(15)]).await.0, "something was left before it");
    let (ok, limits) = make(&world, &[bucket_state(2), enforce("b", 10, 1)]).await;
    assert!(!ok && limits[0].remaining == 0);
    assert_eq!(left(&world, "b", 10).await, 10, "what is all or nothing was left out");
    assert!(make(&world, &[charge("a", 10, 0, -7, ChargeRule::Note)]).await.0);
    assert!(!make(&world, &[bucket_state(0)]).await.0, "at capacity nothing is left");
    assert!(make(&world, &[charge("a", 10, 0, -1, ChargeRule::Note)]).await.0);
    assert!(make(&world, &[bucket_state(0)]).await.0);
    let refused = [bucket_state(1), enforce("b", 10, 11)];
    assert!(!make(&world, &refused).await.0);
    assert_eq!(left(&world, "a", 10).await, 1, "a refusal of all or nothing stops it too");
}

pub(crate) async fn a_noted_charge_never_refuses_and_stops_at_the_ceiling(world: World) {
    for _ in 0..5 {
        assert!(make(&world, &[charge("a", 10, 7, 7, ChargeRule::Note)]).await.0);
    }
    assert!(make(&world, &[charge("a", 10, 0, -15, ChargeRule::Note)]).await.0);
    assert_eq!(left(&world, "a", 10).await, 5, "35 were charged, 20 counted");
}

pub(crate) async fn a_credit_never_goes_below_empty(world: World) {
    assert!(make(&world, &[enforce("a", 10, 3)]).await.0);
    assert!(make(&world, &[charge("a", 10, 0, -100, ChargeRule::Note)]).await.0);
    assert_eq!(left(&world, "a", 10).await, 10);
    assert!(!make(&world, &[enforce("a", 10, 11)]).await.0);
}

pub(crate) async fn charges_of_one_record_see_each_other(world: World) {
    let (ok, limits) = make(&world, &[enforce("a", 10, 6), enforce("a", 10, 6)]).await;
    assert!(!ok);
    assert_eq!((limits[0].verdict, limits[1].verdict), (Verdict::Fits, Verdict::Never));
    assert!(make(&world, &[enforce("a", 10, 6), enforce("a", 10, 4)]).await.0);
    assert_eq!(left(&world, "a", 10).await, 0);
}

pub(crate) async fn other_kinds_of_the_record_are_kept(world: World) {
    let scope = limited("a", Kind::Tokens, bucket(100, 1, Duration::from_secs(3600)));
    assert!(granted(&world.acquire(&tokens([scope.clone()], 60)).await));
    let mut requests = enforce("a", 10, 1);
    requests.bucket.rate = 1000;
    assert!(make(&world, &[requests]).await.0);
    // The requests drain in no time; the tokens must outlive them.
    world.pass(Duration::from_millis(200)).await;
    assert_eq!(world.peek(&[scope]).await[0].remaining, 40);
    if world.has_server() {
        let mut raw = world.server().raw().await;
        let life: i64 =
            ::redis::cmd("PTTL").arg(Key::tenant("a").as_str()).query_async(&mut raw).await.expect("ttl");
        assert!(life > 59 * 3_600_000, "{life}");
    }
}

pub(crate) async fn an_exact_wait_is_told(world: World) {
    let mut hit = enforce("a", 1, 1);
    hit.bucket.rate = 5;
    hit.bucket.period = Duration::from_secs(1);
    assert!(make(&world, &[hit.clone()]).await.0);
    let decision = world.limiter.charge(&[hit.clone()]).await.expect("charged");
    let Outcome::Limited { wait: Some(wait) } = decision.outcome else { panic!("{decision:?}") };
    world.until(decision.now_us + wait.as_micros() as u64).await;
    assert!(make(&world, &[hit]).await.0);
}

pub(crate) async fn exactly_so_many_of_many_charges(world: World) {
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..1000 {
        let limiter = world.limiter.clone();
        calls.spawn(async move { granted(&limiter.charge(&[enforce("a", 100, 1)]).await.expect("charged")) });
    }
    assert_eq!(calls.join_all().await.into_iter().filter(|ok| *ok).count(), 100);
}

pub(crate) async fn broken_charges_are_refused(world: World) {
    let mut wrong = enforce("a", 10, 1);
    wrong.bucket.capacity = Bucket::MAX_UNITS + 1;
    let many = vec![enforce("a", 10, 1); MAX_CHARGES + 1];
    for charges in [&[][..], &[wrong], &many] {
        assert!(matches!(world.limiter.charge(charges).await, Err(Error::Invalid(_))));
    }
    let huge = charge("a", Bucket::MAX_UNITS, u64::MAX, i64::MIN, ChargeRule::Note);
    assert!(make(&world, &[huge]).await.0);
}

/// Time does not matter to buckets that never drain, so both stores must agree to the last bit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_and_redis_agree_on_random_charges() {
    let (memory, redis) = (World::memory(), World::redis().await);
    let rule = prop_oneof![Just(ChargeRule::AllOrNothing), Just(ChargeRule::Always), Just(ChargeRule::Note)];
    let tenant = prop_oneof![Just("a"), Just("b")];
    let kind = prop_oneof![Just(Kind::Requests), Just(Kind::Tokens)];
    let one = (tenant, kind, 1u64..60, 0u64..40, -20i64..40, rule).prop_map(
        |(tenant, kind, cap, needed, added, rule)| Charge {
            kind,
            ..charge(tenant, cap, needed, added, rule)
        },
    );
    let calls = prop::collection::vec(prop::collection::vec(one, 1..5), 1..30);
    let handle = tokio::runtime::Handle::current();
    tokio::task::block_in_place(|| {
        let mut runner =
            TestRunner::new(Config { failure_persistence: None, cases: 40, ..Config::default() });
        let runs = std::sync::atomic::AtomicU32::new(0);
        runner
            .run(&calls, |calls| {
                let run = runs.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                for mut charges in calls {
                    for charge in &mut charges {
                        charge.record =
                            Key::tenant(&format!("{}-{run}", charge.record.tag().replace(':', "-")));
                    }
                    let (a, b) = handle.block_on(async {
                        (memory.limiter.charge(&charges).await, redis.limiter.charge(&charges).await)
                    });
                    let (a, b) = (a.expect("memory"), b.expect("redis"));
                    prop_assert_eq!((a.outcome, a.limits), (b.outcome, b.limits));
                }
                Ok(())
            })
            .unwrap_or_else(|e| panic!("{e}"));
    });
}
