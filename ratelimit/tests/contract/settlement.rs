//! Reserve, then settle.

use std::time::Duration;

use uuid::Uuid;
use weir_ratelimit::*;

use crate::harness::*;

fn still(capacity: u64) -> Option<Bucket> {
    bucket(capacity, 0, Duration::from_secs(30 * 24 * 3600))
}

fn used(tokens: u64) -> Cost {
    Cost::of_request(tokens, 0, 0)
}

pub(crate) async fn credit_returns_what_was_not_used(world: World) {
    let mut limits = limited("acme", Kind::Tokens, still(100));
    limits.buckets[Kind::Requests as usize] = still(2);
    let scopes: Scopes = [limits].into();
    let one = tokens(scopes.clone(), 100);
    assert!(granted(&world.acquire(&one).await));
    let settled = world.settle(&one, used(30), None).await;
    assert!(settled.applied);
    assert_eq!((settled.limits[0].remaining, settled.limits[1].remaining), (1, 70));
    let two = tokens(scopes.clone(), 70);
    assert!(granted(&world.acquire(&two).await));
    // All zero undoes everything, the request included.
    let settled = world.settle(&two, Cost::default(), None).await;
    assert_eq!((settled.limits[0].remaining, settled.limits[1].remaining), (1, 70));
}

pub(crate) async fn debit_goes_into_bounded_debt(world: World) {
    let scopes: Scopes = [limited("acme", Kind::Tokens, bucket(100, 100, Duration::from_secs(60)))].into();
    let call = tokens(scopes.clone(), 10);
    world.acquire(&call).await;
    let settled = world.settle(&call, used(100_000), None).await;
    assert_eq!(settled.limits[0].remaining, 0);
    let Verdict::Wait(wait) = settled.limits[0].verdict else { panic!("{settled:?}") };
    assert!(
        wait > Duration::from_secs(50) && wait <= Duration::from_secs(60),
        "one capacity of debt: {wait:?}"
    );
    let refused = world.acquire(&tokens(scopes, 50)).await;
    let Outcome::Limited { wait: Some(wait) } = refused.outcome else { panic!("{refused:?}") };
    assert!(wait > Duration::from_secs(80) && wait <= Duration::from_secs(90), "{wait:?}");
}

pub(crate) async fn settling_twice_applies_once(world: World) {
    let scopes: Scopes = [limited("acme", Kind::Tokens, still(100))].into();
    let call = tokens(scopes.clone(), 50);
    world.acquire(&call).await;
    assert!(world.settle(&call, used(20), None).await.applied);
    for actual in [20, 0, 90] {
        let again = world.settle(&call, used(actual), None).await;
        assert!(!again.applied);
        assert_eq!(again.limits[0].remaining, 80);
    }
}

pub(crate) async fn a_cancelled_acquire_that_comes_late_is_refused(world: World) {
    let scopes: Scopes = [limited("acme", Kind::Tokens, still(100))].into();
    let call = tokens(scopes.clone(), 50);
    assert!(!world.settle(&call, Cost::default(), None).await.applied);
    assert_eq!(world.acquire(&call).await.outcome, Outcome::Limited { wait: None });
    assert_eq!(world.peek(&scopes).await[0].remaining, 100);
}

pub(crate) async fn an_unknown_reservation_is_debited_once(world: World) {
    let scopes: Scopes = [limited("acme", Kind::Tokens, still(100))].into();
    let stranger = Acquire { id: Uuid::now_v7(), ..tokens(scopes.clone(), 0) };
    for _ in 0..2 {
        let settled = world.settle(&stranger, used(30), None).await;
        assert!(!settled.applied);
        assert_eq!(settled.limits[0].remaining, 70);
    }
}

pub(crate) async fn a_settlement_after_expiry_gives_no_credit(world: World) {
    let scopes: Scopes = [limited("acme", Kind::Tokens, still(100))].into();
    let call = tokens(scopes.clone(), 50);
    world.acquire(&call).await;
    world.expire_reservation(&call).await;
    let settled = world.settle(&call, Cost::default(), None).await;
    assert!(!settled.applied);
    assert_eq!(settled.limits[0].remaining, 50, "the estimate stands");
}

pub(crate) async fn scopes_of_different_size_settle_exactly(world: World) {
    let mut small = limited("acme", Kind::Tokens, still(100));
    (small.record, small.leases) = scope_keys(Scope::TenantModel { tenant: "acme", model: "m" });
    let scopes: Scopes = [small, limited("acme", Kind::Tokens, still(10_000))].into();
    let mut call = Acquire { estimated: true, ..tokens(scopes, 4_000) };
    let decision = world.acquire(&call).await;
    assert_eq!(decision.limits.iter().map(|l| l.remaining).collect::<Vec<_>>(), [0, 6_000]);
    // In another order, as after a change of configuration: what was reserved is known by record.
    call.scopes.reverse();
    let settled = world.settle(&call, used(60), None).await;
    assert!(settled.applied);
    assert_eq!(settled.limits.iter().map(|l| l.remaining).collect::<Vec<_>>(), [9_940, 40]);
}

/// As gateways use it: an account's scopes after the request's own, and settled by the scopes of both.
pub(crate) async fn an_account_refuses_and_settles_with_the_requests_own_scopes(world: World) {
    let of = |scope: Scope<'_>, capacity| {
        let mut limits = limited("any", Kind::Tokens, still(capacity));
        (limits.record, limits.leases) = scope_keys(scope);
        limits.concurrency = Some(2);
        limits
    };
    let under = |tenant: &str| -> Scopes {
        let account = [
            of(Scope::Account("x"), 100),
            of(Scope::AccountModel { account: "x", model: "m" }, 90),
            of(Scope::Global, 10_000),
        ];
        std::iter::once(of(Scope::Tenant(tenant), 1000)).chain(account).collect()
    };
    let stands = async |tenant: &str| -> Vec<u64> {
        world.peek(&under(tenant)).await.iter().map(|limit| limit.remaining).collect()
    };
    let first = tokens(under("acme"), 80);
    assert!(granted(&world.acquire(&first).await));
    let refused = world.acquire(&tokens(under("zenith"), 20)).await;
    assert_eq!(refused.outcome, Outcome::Limited { wait: None }, "a bucket that does not drain");
    let verdicts: Vec<_> = refused
        .limits
        .iter()
        .filter(|l| l.verdict != Verdict::Fits)
        .map(|l| l.position_in(&under("zenith")))
        .collect();
    assert_eq!(verdicts, [Some(2)], "the account has room, but not for this model");
    assert_eq!(stands("zenith").await, [1000, 2, 20, 1, 10, 1, 9920, 1], "a refusal writes nothing");
    assert!(world.settle(&first, used(30), None).await.applied);
    assert_eq!(stands("acme").await, [970, 2, 70, 2, 60, 2, 9970, 2]);
}

pub(crate) async fn credit_never_goes_below_empty(world: World) {
    let scopes: Scopes =
        [limited("acme", Kind::Tokens, bucket(100, 1_000_000, Duration::from_secs(1)))].into();
    let call = tokens(scopes.clone(), 100);
    world.acquire(&call).await;
    world.pass(Duration::from_millis(5)).await;
    let settled = world.settle(&call, Cost::default(), None).await;
    assert_eq!(settled.limits[0].remaining, 100);
    let frozen: Scopes = [limited("acme", Kind::Tokens, still(100))].into();
    assert!(granted(&world.acquire(&tokens(frozen.clone(), 100)).await));
    assert!(!granted(&world.acquire(&tokens(frozen, 1)).await));
}

/// P10 of docs/pains.md: each settlement renewed the counter's expiry, so a counter under steady traffic never
/// expired. Ten tokens per second are allowed and nine are used, for an hour.
#[tokio::test(start_paused = true)]
async fn p10_steady_traffic_does_not_keep_a_limit_used_up() {
    let world = World::memory();
    let scopes: Scopes = [limited("acme", Kind::Tokens, bucket(600, 600, Duration::from_secs(60)))].into();
    for second in 0..3600 {
        let call = Acquire { estimated: true, ..tokens(scopes.clone(), 20) };
        assert!(granted(&world.acquire(&call).await), "refused in second {second}");
        world.settle(&call, Cost::of_request(9, 0, 0), None).await;
        tokio::time::advance(Duration::from_secs(1)).await;
    }
}
